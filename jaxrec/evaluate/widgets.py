"""What a recipe writes into explore.json: plain data that report.html draws for a reader to look into.

``jaxrec.report_explore`` reads it. A widget is a map, a table, a ranking or curves, with texts and numbers and nothing
else. Its size is bounded here; what is left out for that is told in its ``note``, which the page shows.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrec.config import write_atomic

MAX_CELLS = 1_000_000  # of a map's grids and marks together
MAX_ROWS = 5_000  # of a table
MAX_RECORDS = 200  # of a ranking
MAX_ITEMS = 60  # of one record of a ranking; marked ones are always there
MAX_TEXT = 240  # characters of one text of a ranking
_DIGITS = 5  # significant ones


@dataclasses.dataclass(frozen=True, eq=False)
class MapView:
    """What a map shows for one choice. choice: an option of each select. grid: name of the values, or None where there
    are marks alone. marks: bool [rows, columns] or None. text: said beside it."""

    choice: tuple[str, ...]
    grid: str | None
    marks: np.ndarray | None = None
    text: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class CurvesView:
    """choice: an option of each select. series: name -> float [n]. bands: (name, first place, place behind the
    last)."""

    choice: tuple[str, ...]
    series: Mapping[str, np.ndarray]
    bands: Sequence[tuple[str, int, int]] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One record of a ranking, n items of which are ranked.

    title: what it is chosen by. facts: name -> text, shown above. scores: float [scores, n]. labels, texts: of each
    item. marks: for each of the ranking's marks the numbers of the items that bear it. outcomes: for each of the
    ranking's outcomes whether it is right, and a text.
    """

    title: str
    facts: Mapping[str, str]
    scores: np.ndarray
    labels: Sequence[str]
    texts: Sequence[str]
    marks: Sequence[Sequence[int]]
    outcomes: Sequence[tuple[bool, str]]


def numbers(values: Any) -> Any:
    """Nested lists of ``values`` with five significant digits, None for what is not finite; integers stay whole."""
    array = np.asarray(values)
    if np.issubdtype(array.dtype, np.integer):
        return array.tolist()
    out = np.empty(array.size, object)
    out[:] = [float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None for value in array.ravel().tolist()]
    return out.reshape(array.shape).tolist()


def _selects(names: Sequence[str], views: Sequence[MapView] | Sequence[CurvesView]) -> list[dict[str, Any]]:
    """The selects of some views, with their options in order of first appearance."""
    return [
        {"name": name, "options": list(dict.fromkeys(view.choice[place] for view in views))}
        for place, name in enumerate(names)
    ]


def _places(selects: Sequence[Mapping[str, Any]], choice: Sequence[str]) -> list[int]:
    return [select["options"].index(option) for select, option in zip(selects, choice, strict=True)]


def grid_map(
    title: str, about: str, rows: tuple[str, Sequence[str]], columns: tuple[str, Sequence[str]], value: str,
    grids: Mapping[str, np.ndarray], views: Sequence[MapView], selects: Sequence[str] = (), mark: str = "",
    compare: Sequence[str] = (), rank: str = "", shade: str = "linear",
) -> dict[str, Any]:  # fmt: skip
    """Cells of rows and columns, coloured by value, some of them marked.

    rows, columns: what they are and the name of each. value: what a number is. grids: name -> float [rows, columns].
    selects: names of what a view is chosen by. mark: what a marked cell is. compare: selects of which a second option
    may be chosen, whose marks are set beside the first ones'. rank: "row" or "all" tells a cell's rank in its row or
    among all cells. shade: "linear", or "root", in which small values can still be told from 0. Views behind
    ``MAX_CELLS`` are left out.
    """
    size = len(rows[1]) * len(columns[1])
    kept: list[MapView] = []
    used: dict[str, int] = {}
    cells = 0
    for view in views:
        cells += size * ((view.marks is not None) + (view.grid is not None and view.grid not in used))
        if cells > MAX_CELLS:
            break
        kept.append(view)
        if view.grid is not None:
            used.setdefault(view.grid, len(used))
    made = _selects(selects, kept)
    return {
        "kind": "map", "title": title, "about": about, "value": value, "mark": mark, "rank": rank,
        "shade": shade,
        "rows": {"name": rows[0], "labels": list(map(str, rows[1]))},
        "columns": {"name": columns[0], "labels": list(map(str, columns[1]))},
        "selects": made, "compare": list(compare), "grids": [numbers(grids[name]) for name in used],
        "views": [
            {"choice": _places(made, v.choice), "grid": None if v.grid is None else used[v.grid],
             "marks": None if v.marks is None else ["".join("01"[int(m)] for m in row) for row in v.marks],
             "text": v.text}
            for v in kept
        ],
        "note": _left_out(len(views), len(kept), "maps"),
    }  # fmt: skip


def curves(
    title: str, about: str, x: str, at: Sequence[float], views: Sequence[CurvesView], selects: Sequence[str] = (),
    normalise: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Series over ``at``, with bands behind them. normalise: begin with each divided by its largest value."""
    made = _selects(selects, views)
    return {
        "kind": "curves", "title": title, "about": about, "x": x, "at": list(at), "selects": made,
        "normalise": normalise, "note": "",
        "views": [
            {"choice": _places(made, v.choice),
             "series": [{"name": name, "values": numbers(values)} for name, values in v.series.items()],
             "bands": [{"name": name, "start": start, "end": end} for name, start, end in v.bands]}
            for v in views
        ],
    }  # fmt: skip


def table(
    title: str, about: str, columns: Mapping[str, Sequence[Any] | np.ndarray], filters: Mapping[str, str],
    order: str = "",
) -> dict[str, Any]:  # fmt: skip
    """A table to sort and to filter. columns: name -> numbers or texts, the rows that matter most first, of which
    ``MAX_ROWS`` are kept; order says by what they come. filters: column -> "range" or "choice"."""
    total = len(next(iter(columns.values())))
    kept = {name: values[:MAX_ROWS] for name, values in columns.items()}
    return {
        "kind": "table", "title": title, "about": about,
        "columns": [
            {"name": name, "filter": filters.get(name, ""),
             "values": list(map(str, values)) if filters.get(name) == "choice" else numbers(values)}
            for name, values in kept.items()
        ],
        "note": _left_out(total, min(total, MAX_ROWS), "rows") + (f", {order}" if total > MAX_ROWS and order else ""),
    }  # fmt: skip


def ranking(
    title: str, about: str, of: tuple[str, str], scores: Sequence[str], marks: Sequence[tuple[str, bool]],
    outcomes: Sequence[str], records: Sequence[Record], filters: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Records, chosen one at a time, whose items are ranked by one of several scores.

    of: what a record is, and what an item. marks: their names, and whether the order of the numbers is told; items with
    the first mark stand out. outcomes: names of what is right or wrong. filters: the outcomes that the page's filters
    begin with, one each. Records behind ``MAX_RECORDS`` are left out, and of a
    record with more than ``MAX_ITEMS`` the unmarked items with the lowest first scores.
    """
    return {
        "kind": "ranking", "title": title, "about": about, "record": of[0], "item": of[1], "scores": list(scores),
        "marks": [{"name": name, "ordered": ordered} for name, ordered in marks], "outcomes": list(outcomes),
        "filters": [list(outcomes).index(name) for name in filters],
        "records": [_record(record) for record in records[:MAX_RECORDS]],
        "note": _left_out(len(records), min(len(records), MAX_RECORDS), f"{of[0]}s"),
    }  # fmt: skip


def _record(record: Record) -> dict[str, Any]:
    count = record.scores.shape[1]
    best = np.argsort(-record.scores[0], kind="stable")[:MAX_ITEMS].tolist()
    shown = sorted({*best, *(number for numbers_ in record.marks for number in numbers_)})
    return {
        "title": _short(record.title), "facts": [[name, _short(text)] for name, text in record.facts.items()],
        "numbers": shown, "left_out": count - len(shown),
        "scores": [numbers(row[shown]) for row in record.scores],
        "labels": [record.labels[i] for i in shown], "texts": [_short(record.texts[i]) for i in shown],
        "marks": [list(map(int, marked)) for marked in record.marks],
        "outcomes": [[bool(right), _short(text)] for right, text in record.outcomes],
    }  # fmt: skip


def _short(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def _left_out(total: int, kept: int, what: str) -> str:
    return "" if kept == total else f"{kept:,} of {total:,} {what} are kept here"


def write(workdir: Path, widgets: Sequence[Mapping[str, Any]]) -> None:
    """Write explore.json, which ``jaxrec.report_explore.read`` reads."""
    write_atomic(workdir / "explore.json", json.dumps(list(widgets), allow_nan=False, separators=(",", ":")) + "\n")
