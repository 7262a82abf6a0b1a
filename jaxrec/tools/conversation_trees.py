"""Search trees of conversations on disk, so that a search that was killed goes on where it stopped (GRSU, arXiv
2504.20458, section on search: trees are also evaluated with fewer beams or levels afterwards).

One JSON object a line, appended: {"key", "dialogue", "config", "nodes", "skipped"}. The key is a hash of the search's
config, the dialogue's turns and a text that names the players, so that trees of several searches may share a file; a
changed config or dialogue finds none of them. Scores that could not be had are null.
"""

import dataclasses
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from jaxrec.data.dialogues import Dialogue
from jaxrec.data.lines import cut_torn_line
from jaxrec.progress import progress
from jaxrec.tools.conversation import Recommender, User
from jaxrec.tools.conversation_search import Node, SearchConfig, Tree, check_dialogues, search


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
    with progress(len(dialogues), "searching conversations") as step:
        step(len(dialogues) - len(left))
        for low in range(0, len(left), batch):
            some = left[low : low + batch]
            found = search([dialogue for _, dialogue in some], recommender, user, config)
            new = {key: tree for (key, _), tree in zip(some, found)}
            append_trees(path, new)
            trees |= new
            step(len(some))
    return [trees[key] for key in keys]


def tree_key(dialogue: Dialogue, config: SearchConfig, players: str = "") -> str:
    """What a tree is found by: a hash of all that it depends on."""
    what = {"config": dataclasses.asdict(config), "dialogue": dataclasses.asdict(dialogue), "players": players}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def append_trees(path: Path, trees: dict[str, Tree]) -> None:
    """Add trees by key, in one piece, after taking out a line that a killed process left unfinished."""
    lines = b"".join(json.dumps(_entry(key, tree), allow_nan=False).encode() + b"\n" for key, tree in trees.items())
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
    if not path.exists():
        return {}
    keys, trees = set(keys), {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                if entry["key"] in keys and entry["key"] not in trees:
                    trees[entry["key"]] = _tree(entry, config)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"{path}:{number} holds no search tree ({type(error).__name__}: {error}); delete that line"
                ) from error
    return trees


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
