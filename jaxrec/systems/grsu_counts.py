"""What recommenders and the simulated user of GRSU counted in the stages of a seed's run, read back from its files.

Each stage keeps its counts beside what it leaves, so that a run in several processes counts once what it kept once:
``instructions.json``, ``cold_start.json``, the steps of ``metrics.jsonl`` and the trees.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxrec.tools.conversation import Counts, total_counts
from rl.metrics import read_metrics

PLAYERS = "players"  # the field of a stage's JSON file that holds its counts
_METRIC = "counted"


def as_metrics(counts: Counts) -> dict[str, float]:
    """Counts as scalars of a step's metrics; :func:`of_metrics` reads them back."""
    return {f"{_METRIC}/{player}/{what}": float(n) for player, own in counts.items() for what, n in own.items()}


def of_metrics(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Counts of all steps."""
    found = []
    for row in rows:
        for name, value in row.items():
            mark, _, rest = name.partition("/")
            if mark == _METRIC:
                player, _, what = rest.partition("/")
                found.append({player: {what: int(value)}})
    return total_counts(found)


def stage_counts(folder: Path, trees: Iterable[Counts]) -> dict[str, Counts]:
    """By stage, of a seed's folder; trees: of each search. Stages that have counted nothing are left out."""
    found = {
        "synthesize": _players(folder / "instructions.json"), "cold start": _players(folder / "cold_start.json"),
        "rl": of_metrics(read_metrics(folder, "rl")), "interact": total_counts(trees),
    }  # fmt: skip
    return {stage: counts for stage, counts in found.items() if counts}


def _players(path: Path) -> Counts:
    return json.loads(path.read_text(encoding="utf-8")).get(PLAYERS, {}) if path.exists() else {}
