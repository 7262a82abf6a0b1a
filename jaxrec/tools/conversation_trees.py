"""Search trees of conversations on disk, so that a search that was killed goes on where it stopped (GRSU, arXiv
2504.20458, section on search: trees are also evaluated with fewer beams or levels afterwards).

One JSON object a line, appended: {"key", "dialogue", "config", "nodes", "skipped", "counts"}. The key is a hash of the
search's config, the dialogue's turns and a text that names the players, so that trees of several searches may share a
file; a changed config or dialogue finds none of them. Scores that could not be had are null. What the players counted
while a batch was searched stands in the line of its first tree, so that no kill parts the two.
"""

import dataclasses
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxrec.data.dialogues import Dialogue
from jaxrec.data.lines import cut_torn_line
from jaxrec.progress import progress
from jaxrec.tools.conversation import Counts, Recommender, Tally, User, total_counts
from jaxrec.tools.conversation_search import Node, SearchConfig, Tree, check_dialogues, search

T = TypeVar("T")


def search_all(
    dialogues: Sequence[Dialogue], recommender: Recommender, user: User, config: SearchConfig, path: str | Path, *,
    batch: int = 16, players: str = "",
) -> list[Tree]:  # fmt: skip
    """A tree for each dialogue, in order: from ``path`` where it is there, else by :func:`search`, ``batch`` dialogues
    at a time, whose trees are then appended.

    players: names the recommender, the user and all that their answers depend on; trees of others are not taken.
    Raises what :func:`search` raises, and ValueError for a batch under 1 and, naming file and line, for anything in the
    file that is no tree.
    """
    if batch < 1:
        raise ValueError(f"batch={batch}: at least one dialogue must be searched at a time")
    check_dialogues(dialogues)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = [tree_key(dialogue, config, players) for dialogue in dialogues]
    trees = read_trees(path, config, keys)
    left = [(key, dialogue) for key, dialogue in zip(keys, dialogues) if key not in trees]
    tally = Tally({"recommender": recommender, "simulated user": user})
    with progress(len(dialogues), "searching conversations") as step:
        step(len(dialogues) - len(left))
        for low in range(0, len(left), batch):
            some = left[low : low + batch]
            found = search([dialogue for _, dialogue in some], recommender, user, config)
            new = {key: tree for (key, _), tree in zip(some, found)}
            append_trees(path, new, tally.take())
            trees |= new
            step(len(some))
    return [trees[key] for key in keys]


def tree_key(dialogue: Dialogue, config: SearchConfig, players: str = "") -> str:
    """What a tree is found by: a hash of all that it depends on."""
    what = {"config": dataclasses.asdict(config), "dialogue": dataclasses.asdict(dialogue), "players": players}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def append_trees(path: Path, trees: dict[str, Tree], counts: Counts | None = None) -> None:
    """Add trees by key, in one piece, after taking out a line that a killed process left unfinished. counts: of the
    players while these trees were searched."""
    entries = [_entry(key, tree) for key, tree in trees.items()]
    entries[0]["counts"] = dict(counts or {})
    lines = b"".join(json.dumps(entry, allow_nan=False).encode() + b"\n" for entry in entries)
    with open(path, "a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cut_torn_line(file)
        end = file.seek(0, os.SEEK_END)
        try:
            while lines:
                lines = lines[file.write(lines) :]
            os.fsync(file.fileno())
        except OSError:  # a full disk
            file.truncate(end)
            raise


def read_trees(path: Path, config: SearchConfig, keys: Collection[str]) -> dict[str, Tree]:
    """Trees of a file whose key is among ``keys``, all of them searched with ``config``; none where there is no file.
    Of two with one key the first counts; a last line without its end is no tree.

    Raises ValueError naming file and line for a line that is no tree.
    """
    return _read(path, keys, lambda entry: _tree(entry, config))


def read_counts(path: Path, keys: Collection[str]) -> dict[str, dict[str, int]]:
    """What the players counted while trees of a file were searched whose key is among ``keys``, in all processes that
    added to it; empty where there is no file. Raises ValueError as :func:`read_trees` does."""
    return total_counts(_read(path, keys, lambda entry: entry.get("counts", {})).values())


def _read(path: Path, keys: Collection[str], make: Callable[[dict[str, Any]], T]) -> dict[str, T]:
    """What ``make`` makes of lines by key, see :func:`read_trees`."""
    if not path.exists():
        return {}
    keys, found = set(keys), {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                if entry["key"] in keys and entry["key"] not in found:
                    found[entry["key"]] = make(entry)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"{path}:{number} holds no search tree ({type(error).__name__}: {error}); delete that line"
                ) from error
    return found


def _entry(key: str, tree: Tree) -> dict[str, Any]:
    nodes = [
        {**vars(node), "scores": [None if math.isnan(score) else score for score in node.scores]}
        for node in tree.nodes
    ]  # fmt: skip
    return {
        "key": key, "dialogue": tree.dialogue, "config": dataclasses.asdict(tree.config), "nodes": nodes,
        "skipped": tree.skipped,
    }  # fmt: skip


def _tree(entry: dict[str, Any], config: SearchConfig) -> Tree:
    nodes = []
    for fields in entry["nodes"]:
        scores = tuple(math.nan if score is None else float(score) for score in fields["scores"])
        node = Node(**{**fields, "path": tuple(fields["path"]), "items": tuple(fields["items"]), "scores": scores})
        if not node.path or not node.items or len(node.items) != len(scores):
            raise ValueError(f"node {fields['path']} needs a path, and a score for each item")
        nodes.append(node)
    if not nodes:
        raise ValueError("no nodes")
    return Tree(entry["dialogue"], config, tuple(nodes), tuple(tuple(path) for path in entry["skipped"]))
