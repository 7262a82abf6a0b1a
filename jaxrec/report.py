"""What a run's folder holds, read back: the result as a terminal table, the curves as plots/, all of it as report.html.

Reading tolerates what an interrupted run leaves behind (a line cut short, steps written twice after a resume) and says
so in the report; anything else that cannot be read is an error naming the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxrec.config import read_config, write_atomic
from jaxrec.report_explore import read as read_explore

if TYPE_CHECKING:
    from ml_collections import ConfigDict
    from rich.table import Table

# Columns in which more is better; only these have a best. Anything else (turns, seconds) is a description.
_HIGHER_IS_BETTER = ("recall@", "ndcg@", "hit@", "mrr", "accuracy", "valid_format")
_NOT_METRICS = ("name", "intervals", "note", "reference", "users")  # users: said in the protocol line


@dataclass(frozen=True)
class Run:
    """The readable part of a workdir.

    metrics: one dict per (stage, step), in order of first appearance; trajectories: a selection, see `_select`;
    result: result.json or None while there is none; stage_seconds: stage -> seconds in all, where known; notes: what
    was odd about the files, and what the recipe notes beside its result; figures: what the recipe wrote into
    figures.json to be drawn; explore: the widgets of explore.json. Of a run with several seeds, all but result and
    figures is the first seed's.
    """

    workdir: Path
    config: ConfigDict
    metrics: list[dict[str, Any]]
    trajectories: list[dict[str, Any]]
    result: dict[str, Any] | None
    stage_seconds: dict[str, float]
    notes: list[str]
    figures: list[dict[str, Any]] = field(default_factory=list)
    explore: list[dict[str, Any]] = field(default_factory=list)


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The objects of a JSON-lines file, and a note ('' when all is well); a missing file is an empty one.

    A run that is killed leaves a line cut short, at the end or, after a resume, in the middle: such lines are left out
    and counted in the note.

    Raises:
      ValueError: no line at all can be read, so this is no such file.
    """
    if not path.exists():
        return [], ""
    rows: list[dict[str, Any]] = []
    broken: list[int] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken.append(number)
    if broken and not rows and len(broken) > 1:
        raise ValueError(f"{path}:{broken[0]}: not a line of JSON; this file was not written by a run")
    shown = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
    what = f"line {shown} was cut short and is left out" if len(broken) == 1 else f"lines {shown} are left out"
    return rows, f"{path.name}: {what}" if broken else ""


def read_run(workdir: Path) -> Run:
    """Reads what `Run` holds from a run's folder, or from its first `seed*/` where it has several.

    Raises:
      UsageError: no config.json.
      ValueError: a damaged file; names it and the line.
    """
    config = read_config(workdir)
    notes: list[str] = []
    folder = workdir
    seeds = sorted(path for path in workdir.glob("seed*") if path.is_dir())
    if seeds and not (workdir / "metrics.jsonl").exists():
        folder = seeds[0]
        others = ", ".join(path.name for path in seeds[1:]) or "no other"
        notes.append(f"curves, times, trajectories and parts to explore are of {folder.name}; beside it: {others}")
    rows, note = read_jsonl(folder / "metrics.jsonl")
    metrics: dict[tuple[str, Any], dict[str, Any]] = {}
    for row in rows:
        metrics[(str(row.get("stage", "")), row.get("step"))] = row
    notes += [note] if note else []
    if len(metrics) < len(rows):
        again = len(rows) - len(metrics)
        notes.append(f"{again} steps of metrics.jsonl were done again after a resume; the later values are shown")
    trajectories, note = read_jsonl(folder / "trajectories.jsonl")
    notes += [note] if note else []
    seconds = _stage_seconds(folder / "seconds.json")
    chosen, result, figures = _select(trajectories), _read_result(workdir), _read_figures(workdir)
    notes += map(str, (result or {}).get("notes", ()))
    explore, note = read_explore(workdir)
    notes += [note] if note else []
    return Run(workdir, config, list(metrics.values()), chosen, result, seconds, notes, figures, explore)


def _read_figures(workdir: Path) -> list[dict[str, Any]]:
    path = workdir / "figures.json"
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(f, dict) and f["kind"] in ("heatmap", "lines") for f in found):
            return found
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: {error!r}; run the last stage again") from error
    raise ValueError(f"{path}: a list of heatmaps and lines was expected; run the last stage again")


def _stage_seconds(path: Path) -> dict[str, float]:
    """stage -> seconds in all, as the recipe wrote them; empty where it has not."""
    if not path.exists():
        return {}
    try:
        return {str(stage): float(value) for stage, value in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}; remove that file, the times are then those of metrics.jsonl") from error


def _read_result(workdir: Path) -> dict[str, Any] | None:
    path = workdir / "result.json"
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; run the evaluate stage again") from error
    if not isinstance(result, dict) or not isinstance(result.get("rows"), list):
        raise ValueError(f"{path}: a JSON object with a list `rows` was expected; run the evaluate stage again")
    for table in result.get("tables", ()):  # beside the rows: what else a recipe has to tell in figures
        if not isinstance(table, dict) or "title" not in table or not isinstance(table.get("rows"), list):
            raise ValueError(f"{path}: each of its `tables` needs a title and a list `rows`; run the last stage again")
    return result


def _select(rows: Sequence[dict[str, Any]], stages: int = 3, per_stage: int = 3) -> list[dict[str, Any]]:
    """Of the last step of each of the last stages, latest stage first: the best reward, the worst, the middle one."""
    last: dict[str, Any] = {}
    for row in rows:
        last[str(row.get("stage", ""))] = row.get("step")
    chosen: list[dict[str, Any]] = []
    for stage in list(last)[::-1][:stages]:
        group = [row for row in rows if str(row.get("stage", "")) == stage and row.get("step") == last[stage]]
        group.sort(key=_merit, reverse=True)
        places = dict.fromkeys([0, len(group) - 1, len(group) // 2][:per_stage])
        chosen += [group[place] for place in places]
    return chosen


def _merit(trajectory: Mapping[str, Any]) -> tuple[float, float]:
    """Reward, then the rank of the hit: evaluation records carry no reward."""
    rank = trajectory.get("hit_rank")
    return total_reward(trajectory), -float(rank) if is_number(rank) else -math.inf


def total_reward(trajectory: Mapping[str, Any]) -> float:
    """The `total` of a trajectory's reward parts, or their sum; 0 where there are none."""
    parts = trajectory.get("reward") or {}
    if is_number(parts.get("total")):
        return float(parts["total"])
    return float(sum(value for value in parts.values() if is_number(value)))


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number (JSON's NaN and booleans are not)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def format_value(column: str, value: Any) -> str:
    """A table cell: metrics with 4 decimals, seconds and turns with 1 or 2, '–' for what is absent or not finite."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if not is_number(value):
        return "–"
    if column.startswith("seconds"):
        return f"{value:,.1f}"
    if column in ("turns", "calls"):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def columns(result: Mapping[str, Any]) -> list[str]:
    """The metric columns of a result: every key of any row, in order of first appearance."""
    seen = {key: None for row in result["rows"] for key in row if key not in _NOT_METRICS}
    return [key for key in seen if any(row.get(key) is not None for row in result["rows"])]


def best_rows(result: Mapping[str, Any], column: str) -> set[int]:
    """Indices of the rows that show the column's best value; empty where more is not better, or where all are equal."""
    if not column.startswith(_HIGHER_IS_BETTER) or column.endswith("_std"):
        return set()
    shown = {
        i: row[column]
        for i, row in enumerate(result["rows"])
        if is_number(row.get(column)) and not row.get("reference")  # a bound told the answer does not compete
    }
    if len(shown) < 2 or max(shown.values()) == min(shown.values()):
        return set()
    best = format_value(column, max(shown.values()))
    return {i for i, value in shown.items() if format_value(column, value) == best}


def protocol_line(result: Mapping[str, Any]) -> str:
    """How the figures were made, in one line: split, candidates, users, seed."""
    protocol = dict(result.get("protocol") or {})
    words = []
    if "split" in protocol:
        words.append(f"split: {protocol.pop('split')}")
    if "ranking" in protocol:
        words.append(f"{protocol.pop('ranking')} ranking")
    if "history_excluded" in protocol:
        words.append("history excluded" if protocol.pop("history_excluded") else "history not excluded")
    if "users" in protocol:
        users = protocol.pop("users")
        words.append(f"{users:,} users" if isinstance(users, int) else f"{users} users")
    seeds = protocol.pop("seeds", result.get("seed"))
    if seeds is not None:
        seeds = seeds if isinstance(seeds, list) else [seeds]
        words.append(f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}")
    words += [f"{key.replace('_', ' ')}: {value}" for key, value in protocol.items()]
    return " · ".join(words)


def result_tables(result: Mapping[str, Any], width: int = 80) -> list[Table]:
    """The result as terminal tables no wider than ``width``, the best of each column in bold.

    What does not fit into the first goes on in the next; the protocol stands below the first.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = result["rows"]
    labels = [str(row.get("name", i)) for i, row in enumerate(rows)]
    label_width = min(max(map(len, labels), default=0), 24)
    groups: list[list[str]] = []
    room = 0
    for name in by_reach(result):
        cells = [format_value(name, row.get(name)) for row in rows]
        needed = 1 + max(map(len, [*cells, *_heading(name).split("\n")]))
        if needed > room:
            groups.append([])
            room = width - label_width
        groups[-1].append(name)
        room -= needed
    title = f"{result.get('system', '')} · {result.get('variant', '')}".strip(" ·")
    tables = []
    for number, group in enumerate(groups or [[]]):
        table = Table(
            title=Text(title) if number == 0 else None,
            caption=Text(protocol_line(result)) if number == 0 else None,  # the widest table
            box=box.SIMPLE_HEAD,
            padding=0,
            pad_edge=False,
            title_justify="left",
            caption_justify="left",
        )
        table.add_column("", width=label_width)
        for name in group:
            table.add_column(_heading(name), justify="right", no_wrap=True)
        best = {name: best_rows(result, name) for name in group}
        for i, row in enumerate(rows):
            cells = [Text(format_value(n, row.get(n)), style="bold green" if i in best[n] else "") for n in group]
            table.add_row(Text(labels[i]), *cells)
        tables.append(table)
    return tables


def _heading(column: str) -> str:
    """ "recall@10_intent" -> two lines, "recall@10" over "intent"."""
    return column.replace("_", "\n", 1).replace("_", " ")


def by_reach(result: Mapping[str, Any]) -> list[str]:
    """Columns: ranking metrics of whole lists first, in rising cut-off, then the rest as the rows bring them."""

    def order(name: str) -> tuple[int, float]:
        metric, _, cut = name.partition("@")
        plain = metric in ("recall", "ndcg", "hit") and cut.isdigit()
        places = {"valid_format": 3, "turns": 4, "seconds": 5}
        return (("recall", "ndcg", "hit").index(metric), int(cut)) if plain else (places.get(name, 6), 0)

    return sorted(columns(result), key=order)


def comparison_line(comparison: Mapping[str, Any]) -> str:
    """One comparison as text: 'met: A vs B, ndcg@10 +0.0123 [+0.0040, +0.0200] (criterion)'."""
    state = {True: "met", False: "NOT met"}.get(comparison.get("met"), "no criterion")
    numbers = [comparison.get(key) for key in ("difference", "low", "high")]
    text = [f"{value:+.4f}" if is_number(value) else "–" for value in numbers]
    criterion = f" ({comparison['criterion']})" if comparison.get("criterion") else ""
    return f"{state}: {comparison.get('name')}, {comparison.get('metric')} {text[0]} [{text[1]}, {text[2]}]{criterion}"


def build(workdir: Path) -> Path:
    """Writes plots/*.png and report.html of a run's folder, finished or not; returns the path of report.html."""
    from jaxrec.report_html import page
    from jaxrec.report_plots import draw

    run = read_run(workdir)
    plots = draw(run, workdir / "plots")
    path = workdir / "report.html"
    write_atomic(path, page(run, plots))
    return path
