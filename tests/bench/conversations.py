"""Searches over conversations: what they cost the host beside players that answer at once.

    python tests/bench/conversations.py [--quick] [--dialogues 64] [--repeats 3] [--parts search] [--out FILE.json]

``search``: dialogues for each CPU second as beams grow, five levels, four lists for each beam, ten items each of 5,000;
the players draw lists and scores and write hardly any text. ``us per list`` is the search's own time, ``players`` the
share of the whole which the same calls take without it. ``rank``, ``store`` and ``read``: milliseconds to rank a tree's
items, to append it to a file, and to find it there again. CPU seconds; the fastest of the repeats counts.
"""

import argparse
import importlib.util
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]  # models.py here is no package
_spec = importlib.util.spec_from_file_location("bench_models", Path(__file__).with_name("models.py"))
bench = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bench)

_ITEMS, _K, _BEAMS = 5_000, 10, (1, 2, 4, 8, 16)


class Players:
    """A recommender and a user in one; ``calls`` is a list of (method, arguments)."""

    k = _K

    def __init__(self):
        self.calls = []
        self._scores = np.random.default_rng(0).random(_ITEMS)

    def recommend(self, asks):
        from jaxrec.tools.conversation import Reply

        self.calls.append(("recommend", (asks,)))
        return [Reply(tuple(random.Random(ask.seed).sample(range(_ITEMS), _K)), "a list") for ask in asks]

    def score(self, dialogues, items):
        self.calls.append(("score", (dialogues, items)))
        return [self._scores[some] for some in items]

    def criticise(self, requests):
        self.calls.append(("criticise", (requests,)))
        return ["None of these."] * len(requests)


def _fastest(call: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return min(seconds)


def search_row(beams: int, count: int, repeats: int, folder: Path) -> dict:
    """The row of a number of beams."""
    from jaxrec.data.dialogues import USER, Dialogue, Turn
    from jaxrec.evaluate.conversation import rank
    from jaxrec.tools.conversation_search import SearchConfig, search
    from jaxrec.tools.conversation_trees import append_trees, read_trees, tree_key

    dialogues = [Dialogue(str(i), (Turn(USER, "Something to laugh about?"),)) for i in range(count)]
    titles = [f"title {i}" for i in range(_ITEMS)]
    config = SearchConfig(k=_K, beams=beams, init=16)
    players = Players()
    trees = search(dialogues, players, players, config)
    calls, keys = list(players.calls), [tree_key(dialogue, config) for dialogue in dialogues]
    path = folder / f"{beams}.jsonl"
    whole = _fastest(lambda: search(dialogues, players, players, config), repeats)
    alone = _fastest(lambda: [getattr(players, name)(*arguments) for name, arguments in calls], repeats)
    ranking = _fastest(lambda: [rank(tree, titles) for tree in trees], repeats)
    storing = _fastest(lambda: append_trees(path, dict(zip(keys, trees))), 1)
    reading = _fastest(lambda: read_trees(path, config, keys), repeats)
    return {
        "beams": beams, "lists": config.lists, "dialogues/CPU_s": count / whole,
        "us_per_list": 1e6 * (whole - alone) / count / config.lists, "players": f"{alone / whole:.0%}",
        "rank_ms": 1e3 * ranking / count, "store_ms": 1e3 * storing / count, "read_ms": 1e3 * reading / count,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 dialogues, one repeat")
    parser.add_argument("--dialogues", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=["search"])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    count, repeats = (4, 1) if given.quick else (given.dialogues, given.repeats)
    with tempfile.TemporaryDirectory() as folder:
        parts = {"search": lambda: [search_row(beams, count, repeats, Path(folder)) for beams in _BEAMS]}
        found = {}
        for part in given.parts:
            found[part] = parts[part]()
            bench.show(part, found[part])
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
