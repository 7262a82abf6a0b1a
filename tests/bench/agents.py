"""Questions per second of the agent loop as more of them are played together, beside one at a time.

    python tests/bench/agents.py [--quick] [--sizes 10M 100M] [--rows 1 8 32 128] [--views 512 128] [--repeats 3]
                                 [--out agents.json]

A random Qwen3 model in float32 with a tokenizer of words plays R1-Searcher++'s environment by ``rl.rollout``, greedy:
two searches, then the answer, 48 tokens each. A random model asks nothing, so a query is put where each segment is
read; the tokens that are sampled, the search (BM25 over 5,000 passages of 40 words, 3 of them a result), the results
that are tokenised and run, and all else are what they are with a trained one. ``rows`` questions are played together,
at least ``--questions`` of them in as many calls as it takes. Sides take turns, the fastest of each counts by wall
clock and by CPU seconds of all threads, which say more where the machine is shared. ``environment`` is its share of the
time: parsing, searching, wording of results. ``views``: the fewest slots of the cache that attention reads, in turns
too; 512 is what it was, 128 what it is on a CPU. Ratios are to the first number of rows with the first of the views.
"""

import argparse
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]  # models.py here is no package
_spec = importlib.util.spec_from_file_location("bench_decode", Path(__file__).with_name("decode.py"))
decode = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(decode)

_SEARCHES, _K, _PASSAGE_WORDS, _QUESTION_WORDS = 2, 3, 40, 8


class Asking:
    """An environment that reads two queries and an answer into whatever the policy writes, and times itself."""

    def __init__(self, env):
        self._env, self.stop, self.seconds = env, (), 0.0

    def reset(self, examples, copies=1):
        return self._env.reset(examples, copies)

    def step(self, states, actions):
        from rl.envs.base import Action

        start, style = time.perf_counter(), self._env.style
        said = []
        for state, action in zip(states, actions, strict=True):
            words = state.example.question.split()[state.turns :]
            query = Action(f"{action.text}{style.query_open} {' '.join(words)} {style.query_close}", style.query_close)
            said.append(query if state.turns < _SEARCHES else Action(f"{action.text} \\boxed{{{words[0]}}}", "eos"))
        made = self._env.step(states, said)
        self.seconds += time.perf_counter() - start
        return made


def make(fields: dict, passages: int, questions: int, folder: Path):
    """(model, environment, questions)."""
    import jax

    import models
    from jaxrec.tools.search import Passage, build_store
    from jaxrec.tools.search.bm25 import build_bm25
    from models.hf import Model
    from rl.envs.search import Question, SearchEnv, SearchOptions
    from rl.envs.tags import R1_SEARCHER_PP

    words = [f" w{i}" for i in range(min(4000, fields["vocab_size"] - 320))]
    tokenizer = models.build_word_tokenizer([*R1_SEARCHER_PP.tags, *words])
    config = models.Config(**fields, family="qwen3", qk_norm=True, init_std=0.05)
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(words, _PASSAGE_WORDS)).strip() for _ in range(passages)]
    store = build_store((Passage(str(i), f"w{i % len(words)}", text) for i, text in enumerate(texts)), folder / "store")
    search = build_bm25(store, folder / "bm25").search
    asked = [Question(str(i), "".join(rng.choice(words, _QUESTION_WORDS)).strip(), ("x",)) for i in range(questions)]
    env = SearchEnv(search, R1_SEARCHER_PP, SearchOptions(k=_K, max_searches=_SEARCHES, short=True))
    return Model(config, models.init(config, jax.random.key(0)), tokenizer), Asking(env), asked


def compare(
    name: str, fields: dict, rows: list[int], views: list[int], questions: int, new: int, passages: int, repeats: int
) -> list[dict]:
    """A row per number of questions that are played together and least view."""
    import jax

    from models import sample
    from rl.rollout import RolloutConfig, rollout

    with tempfile.TemporaryDirectory() as folder:
        model, env, asked = make(fields, passages, max(questions, *rows), Path(folder))
        options = RolloutConfig(max_prompt=64, max_total=1024, max_new=new, max_turns=_SEARCHES + 1, temperature=0.0)

        def play(size: int, view: int) -> dict[str, float]:
            sample.least_view = lambda: view
            count, env.seconds, wall, cpu = max(size, questions), 0.0, time.perf_counter(), time.process_time()
            for low in range(0, count, size):
                part = asked[low : low + size]
                _, states = rollout(model.params, model.config, model.tokenizer, env, part, jax.random.key(0), options)
                assert all(state.searches == _SEARCHES and state.finish == "answer" for state in states)
            wall = time.perf_counter() - wall
            cpu = time.process_time() - cpu
            return {"wall": wall / count, "cpu": cpu / count, "environment": env.seconds / wall}

        sides = [(size, view) for size in rows for view in views]
        for side in sides:  # compiles
            play(*side)
        runs: dict[tuple[int, int], list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(repeats):
            for side in sides:
                runs[side].append(play(*side))
    found = []
    first = {key: min(run[key] for run in runs[sides[0]]) for key in ("wall", "cpu")}
    for size, view in sides:
        wall, cpu = (min(run[key] for run in runs[size, view]) for key in ("wall", "cpu"))
        found.append(
            {
                "model": name,
                "rows": size,
                "view": view,
                "questions_per_s": 1 / wall,
                "questions_per_cpu_s": 1 / cpu,
                "ratio": first["wall"] / wall,
                "cpu_ratio": first["cpu"] / cpu,
                "environment": min(runs[size, view], key=lambda run: run["wall"])["environment"],
            }
        )
    return found


def show(rows: list[dict]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="the agent loop, two searches a question")
    columns = ("model", "rows", "view", "questions/s", "ratio", "questions / CPU s", "ratio by CPU s", "environment")
    for column in columns:
        table.add_column(column, justify="right")
    for r in rows:
        table.add_row(
            r["model"], str(r["rows"]), str(r["view"]), f"{r['questions_per_s']:.2f}", f"{r['ratio']:.2f}x",
            f"{r['questions_per_cpu_s']:.2f}", f"{r['cpu_ratio']:.2f}x", f"{r['environment']:.0%}",
        )  # fmt: skip
    Console().print(table)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, for checking that the script runs")
    parser.add_argument("--sizes", nargs="+", choices=list(decode.SIZES), default=["10M"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 128], help="questions played together")
    parser.add_argument("--views", nargs="+", type=int, default=[512, 128], help="least slots that attention reads")
    parser.add_argument(
        "--questions", type=int, default=32, help="of each run, at least; a multiple of smaller numbers of rows"
    )
    parser.add_argument("--repeats", type=int, default=3, help="interleaved runs; the fastest counts")
    parser.add_argument("--out", type=Path, default=Path("agents.json"), help="where the figures go as JSON")
    options = parser.parse_args(argv)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import jax

    sizes = decode.QUICK if options.quick else {name: decode.SIZES[name] for name in options.sizes}
    rows = [1, 4] if options.quick else options.rows
    questions, new, passages = (4, 8, 200) if options.quick else (options.questions, 48, 5000)
    if wrong := [size for size in rows if size < 1 or (size < questions and questions % size)]:
        parser.error(f"--questions={questions} is no multiple of --rows {wrong[0]}")
    found = []
    for name, fields in sizes.items():
        found += compare(name, fields, rows, options.views, questions, new, passages, options.repeats)
    show(found)
    report = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "device": jax.devices()[0].platform, "versions": {"jax": jax.__version__}, "repeats": options.repeats,
        "load_average": os.getloadavg()[0], "rows": found,
    }  # fmt: skip
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main()
