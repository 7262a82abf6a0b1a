"""The part of report.html that is explored: its bounds, its numbers, its script, and hostile texts in all of it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from analysis import experts
from jaxrec import report, report_explore
from jaxrec.config import from_json, save_config
from jaxrec.evaluate import widgets as made
from jaxrec.evaluate.widgets import CurvesView, MapView, Record
from tests.jaxrec.explored import balanced, choices, computed, played, scripts, widgets_of

HOSTILE = "</script><img src=x onerror=alert(1)><!--<script>\u2028 & \x1b[31m \u202eabc __proto__"
CLEAN = HOSTILE.replace("\x1b", "\ufffd").replace("\u202e", "\ufffd")


def rng():
    return np.random.Generator(np.random.PCG64(0))


def hostile_widgets() -> list[dict]:
    """One widget of each kind, whose texts are all hostile."""
    h, values = HOSTILE, np.array([[0.5, np.nan, 0.25], [1e-7, 2.0, 3.0]])
    views = [MapView((h, str(n)), h, values > n, h) for n in (0, 1)] + [MapView((h + "2", "0"), None, values > 2, h)]
    record = Record(h, {h: h}, values, [h] * 3, [h] * 3, ([1], [2, 1]), [(True, h), (False, h)])
    return [
        made.grid_map(h, h, (h, [h, h]), (h, [h] * 3), h, {h: values}, views, (h, "kept"), h, (h,), "row"),
        made.curves(h, h, h, [0, 1, 2], [CurvesView((h,), {h: values[0], "__proto__": values[1]}, [(h, 0, 2)])], (h,)),
        made.table(h, h, {h: values[0], "set": [h, "b", h]}, {h: "range", "set": "choice"}),
        made.ranking(h, h, (h, h), [h, "other"], [(h, False), ("kept", True)], [h, "o"], [record] * 2, (h, "o")),
    ]


def page_of(folder: Path, widgets: list[dict] | None) -> str:
    save_config(folder, from_json('{"system": "cafe", "variant": "demo"}'))
    if widgets is not None:
        (folder / "explore.json").write_text(json.dumps(widgets))
    return report.build(folder).read_text(encoding="utf-8")


# --- The page --------------------------------------------------------------------------------------------------------


def test_hostile_texts_stay_data(tmp_path: Path):
    widgets = hostile_widgets()
    page = page_of(tmp_path, widgets)
    assert widgets_of(page) == json.loads(json.dumps(widgets))
    assert [attributes for attributes, _ in scripts(page)] == [{"type": "application/json", "id": "explore-data"}, {}]
    assert page.count("</script") == 2
    assert "<img" not in page
    assert "<!--" not in page
    assert "onerror" not in page.replace(scripts(page)[0][1], "")
    data = page[page.index('id="explore-data">') : page.index("</script>")]
    assert not set(data.removeprefix('id="explore-data">')) & set("<>&\u2028")


def test_the_policy_lets_this_script_run_and_no_other(tmp_path: Path):
    page = page_of(tmp_path, hostile_widgets())
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    digest = base64.b64encode(hashlib.sha256(scripts(page)[1][1].encode()).digest()).decode()
    assert policy.split("; ") == [
        "default-src 'none'", "img-src data:", "style-src 'unsafe-inline'", f"script-src 'sha256-{digest}'",
    ]  # fmt: skip


def test_a_run_without_widgets_has_the_page_it_had(tmp_path: Path):
    page = page_of(tmp_path, None)
    assert not scripts(page)
    assert "Explore" not in page
    assert "script-src" not in page
    assert ".widget" not in page
    (tmp_path / "explore.json").write_text("[]")
    assert report.build(tmp_path).read_text(encoding="utf-8") == page


def test_readers_without_scripts_are_told_where_to_look(tmp_path: Path):
    page = page_of(tmp_path, hostile_widgets())
    before = page[page.index("<h2>Explore</h2>") : page.index("<script")]
    assert "The figures above show the averages" in before
    assert "explore.json beside this page" in before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", r"explore\.json: .*run the last stage again"),
        ("{}", "a list of widgets was expected"),
        ('[{"kind": "constructor"}]', "widget 0: its kind must be one of map, curves, table, ranking"),
        ("[3]", "widget 0: its kind"),
        ('[{"kind": "table", "title": "", "about": 3}]', "widget 0: about must be a text"),
        ('[{"kind": "map", "title": "", "about": "", "note": "", "selects": {}}]', "widget 0: selects must be a list"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, text: str, message: str):
    (tmp_path / "explore.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        report_explore.read(tmp_path)


def test_a_file_too_large_is_left_out_with_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report_explore, "MAX_BYTES", 2**20)
    save_config(tmp_path, from_json('{"system": "cafe", "variant": "demo"}'))
    (tmp_path / "explore.json").write_text("[" + " " * 2**21 + "]")
    run = report.read_run(tmp_path)
    assert run.explore == []
    assert run.notes == ["explore.json has 2 MiB and is left out: a page shows at most 1 MiB"]


def test_numbers_that_json_does_not_know_become_null():
    text = report_explore.embedded(
        [{"a": [float("nan"), float("inf"), 1.5, True, None, "x"], "b": {"c": -float("inf")}}]
    )
    assert json.loads(text) == [{"a": [None, None, 1.5, True, None, "x"], "b": {"c": None}}]


def test_the_script_is_self_contained_and_makes_no_markup():
    script = report_explore.script()
    assert "\r" not in script
    assert "</script" not in script.lower()
    assert "<!--" not in script
    words = (
        "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "setTimeout(",
        "import(", "fetch(", "XMLHttpRequest", "WebSocket", "localStorage", "cookie", "createContextualFragment",
        "srcdoc", "href", ".src", "setAttributeNS", "window.open", "location",
    )  # fmt: skip
    assert not [word for word in words if word in script]
    assert re.findall(r"\w+://[^\"]*", script) == ["http://www.w3.org/2000/svg"]
    assert balanced(script)
    assert not balanced(script.replace("})();", ")();", 1))
    assert all(len(line) <= 120 for line in script.splitlines())


# --- Bounds ----------------------------------------------------------------------------------------------------------


def test_numbers_have_five_digits_and_gaps():
    assert made.numbers(np.array([[1 / 3, np.nan], [-np.inf, 123456.7]])) == [[0.33333, None], [None, 123460.0]]
    assert made.numbers(np.array([3, 2**40])) == [3, 2**40]


def test_a_map_keeps_the_views_that_fit_and_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(made, "MAX_CELLS", 35)
    grids = {name: np.full((2, 5), n) for n, name in enumerate("abc")}
    views = [MapView((name, str(k)), name, np.eye(2, 5) > 0) for name in "abc" for k in (1, 2)]
    found = made.grid_map("t", "", ("r", "01"), ("c", "01234"), "v", grids, views, ("name", "k"), "kept")
    assert choices(found) == [("a", "1"), ("a", "2")]  # 20 cells and 10 more; the third would need 20
    assert found["views"][1]["marks"] == ["10000", "01000"]
    assert found["grids"] == [[[0] * 5] * 2]
    assert found["note"] == "2 of 6 maps are kept here"


def test_a_table_and_a_ranking_keep_what_matters_and_say_so():
    found = made.table("t", "", {"n": np.arange(6000)}, {}, "in their order")
    assert found["columns"][0]["values"] == list(range(5000))
    assert found["note"] == "5,000 of 6,000 rows are kept here, in their order"
    scores = np.linspace(1, 0, 100)[None]
    record = Record("q", {}, scores, ["k"] * 100, ["x" * 1000] * 100, ([99], [1, 0]), [])
    found = made.ranking(
        "t", "", ("question", "document"), ["s"], [("gold", False), ("kept", True)], [], [record] * 300, ()
    )
    assert len(found["records"]) == 200
    assert found["note"] == "200 of 300 questions are kept here"
    first = found["records"][0]
    assert first["numbers"] == [*range(60), 99]
    assert first["left_out"] == 39
    assert first["scores"][0][-1] == 0.0
    assert first["marks"] == [[99], [1, 0]]
    assert {len(text) for text in first["texts"]} == {240}


# --- The script ------------------------------------------------------------------------------------------------------


def test_overlap_and_ranks_are_those_of_python(tmp_path: Path):
    masks = {name: rng().random((6, 9)) < share for name, share in (("a", 0.4), ("b", 0.6))}
    marks = [["".join("01"[int(m)] for m in row) for row in mask] for mask in masks.values()]
    grid = rng().integers(0, 5, (6, 9))
    got = computed(
        tmp_path,
        "[explore.overlap(a, b).mean, explore.overlap(b, b), grid.map((row, r) => row.map((_, c) => "
        "[explore.rankOf(grid, r, c, 'row'), explore.rankOf(grid, r, c, 'all')])), explore.overlap(['00'], ['11'])]",
        a=marks[0], b=marks[1], grid=grid.tolist(),
    )  # fmt: skip
    np.testing.assert_allclose(got[0], experts.overlap(masks)[0, 1])
    assert got[1] == {"mean": 1, "low": 1, "high": 1}
    by_row = 1 + (grid[:, None] > grid[:, :, None]).sum(axis=2)
    by_all = 1 + (grid.ravel()[None] > grid.ravel()[:, None]).sum(axis=1).reshape(grid.shape)
    np.testing.assert_array_equal(got[2], np.stack([by_row, by_all], axis=-1))
    assert got[3] is None


def test_rows_are_sorted_and_filtered_as_python_does(tmp_path: Path):
    values = [None if n == 5 else int(n) for n in rng().integers(0, 9, 40)]
    names = [str(n) for n in rng().integers(0, 3, 40)]
    got = computed(
        tmp_path,
        "[explore.sorted(explore.passing(columns, [null, null]), columns[0].values, false), "
        "explore.sorted(explore.passing(columns, [null, null]), columns[0].values, true), "
        "explore.passing(columns, [{low: 2, high: null}, {option: '1'}]), "
        "explore.passing(columns, [{low: null, high: null}, null]).length]",
        columns=[{"values": values}, {"values": names}],
    )  # fmt: skip
    rows = range(40)
    assert got[0] == sorted(rows, key=lambda r: (values[r] is None, values[r] or 0))
    assert got[1] == sorted(rows, key=lambda r: (values[r] is None, -(values[r] or 0)))
    assert got[2] == [r for r in rows if names[r] == "1" and values[r] is not None and values[r] >= 2]
    assert got[3] == 40


def test_records_are_found_and_items_ranked_as_python_does(tmp_path: Path):
    flags = rng().random((30, 2)) < 0.5
    records = [
        {"title": f"What is {n}?", "facts": [["answers", f"A{n % 7}"]], "outcomes": [[bool(x), ""] for x in row],
         "numbers": [4, 6, 9], "scores": [[0.2, None, 0.7]], "marks": [[9], [6, 4]]}
        for n, row in enumerate(flags)
    ]  # fmt: skip
    got = computed(
        tmp_path,
        "[explore.matching(records, ' a3 ', [[0, true], [1, null]]), "
        "explore.matching(records, '', [[0, true], [1, false]]), explore.ranked(records[0], 0), "
        "explore.badges(records[0], marks, 4), explore.shortened(records[0], marks, [2, 0, 1], 1, false), "
        "explore.shortened(records[0], [], [2, 0, 1], 1, false)]",
        records=records, marks=[{"name": "gold", "ordered": False}, {"name": "kept", "ordered": True}],
    )  # fmt: skip
    assert got[0] == [n for n in range(30) if n % 7 == 3 and flags[n, 0]]
    assert got[1] == [n for n in range(30) if flags[n, 0] and not flags[n, 1]]
    assert got[2:] == [[2, 0, 1], ["kept, place 2 of 2"], [2, 0, 1], [2]]


def test_numbers_texts_and_axes(tmp_path: Path):
    got = computed(
        tmp_path,
        "[[1234567, 0.123456, 1e-7, 0, null, 'x\\u0000'].map(explore.show), explore.ticks(0, 1, 5), "
        "explore.ticks(0, 57, 10), explore.ticks(0, 0, 5), explore.scaled([1, null, 4]), explore.extent([[null]]), "
        "explore.compared([0, 2], [-1, 1]), explore.compared([0, 2], [-1, 2]), explore.compared([0, 2], [-1, -1]), "
        "[0, 1, 2].map((x) => explore.bandAt([{name: 'a', start: 0, end: 1}, {name: 'b', start: 1, end: 2}], x))]",
    )
    assert got[0] == ["1,234,567", "0.1235", "1.00e-7", "0", "–", "x\ufffd"]
    assert got[1] == [0, 0.5, 1]
    assert got[2] == [0, 10, 20, 30, 40, 50]
    assert got[3] == [0]
    assert got[4] == [0.25, None, 1]
    assert got[5] == [0, 1]
    assert got[6:9] == [[0, 1], None, None]
    assert got[9] == ["a", "b", ""]


def test_the_page_shows_hostile_texts_as_texts(tmp_path: Path):
    page = played(tmp_path, hostile_widgets(), [["list", 1], ["change", "ranked by", 1]])
    assert set(page["tags"]) <= {
        "div", "section", "h3", "h4", "p", "span", "label", "select", "option", "input", "button", "canvas", "table",
        "thead", "tbody", "tr", "th", "td", "svg", "rect", "line", "text", "polyline", "circle",
    }  # fmt: skip
    assert {name for name, _ in page["attributes"]} <= {
        "class", "tabindex", "role", "aria-label", "aria-live", "aria-hidden", "aria-sort", "scope", "type", "step",
        "size", "viewBox", "points", "x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "width", "height",
    }  # fmt: skip
    last = page["said"][-1]
    assert not last["notes"]
    assert last["titles"] == [CLEAN] * 5
    assert CLEAN in page["text"]
    assert "\x1b" not in page["text"]
    assert "\u202e" not in page["text"]


def test_a_reader_compares_filters_and_looks_up(tmp_path: Path):
    masks = {name: np.array([[1, 1, 0, 0], [1, 0, 1, 0]], bool) for name in "ab"} | {"c": np.eye(2, 4) > 0}
    views = [MapView((name,), name, mask, f"About {name}.") for name, mask in masks.items()]
    grids = {name: np.arange(8.0).reshape(2, 4) for name in masks}
    grid = made.grid_map("M", "", ("layer", "56"), ("expert", "0123"), "score", grids, views, ("domain",), "kept",
                         ("domain",), "row")  # fmt: skip
    values = np.arange(45.0)
    table = made.table("T", "", {"unit": values, "set": ["x", "y", "z"] * 15}, {"unit": "range", "set": "choice"})
    view = CurvesView((), {"in": np.array([1.0, 2.0, 4.0])}, [("first", 0, 2)])
    line = made.curves("C", "", "layer", [0, 1, 2], [view], normalise=True)
    records = [
        Record(f"Q{n}", {"answers": "x"}, np.array([[0.1, 0.9]]), ["k", "k"], ["t0", "t1"], ([0],), [(n != 1, "said")])
        for n in range(3)
    ]  # fmt: skip
    rank = made.ranking("R", "", ("question", "document"), ["s"], [("gold", False)], ["m"], records, ("m",))
    steps = [
        ["change", "compare: domain", 3], ["key", "canvas", "ArrowDown"], ["key", "canvas", "End"],
        ["key", "canvas", "ArrowDown"], ["change", "domain", 2],
        ["input", "unit from", "7.5"], ["change", "set", 2], ["click", "unit"], ["click", "unit ▲"],
        ["input", "to", ""], ["key", "svg", "ArrowRight"], ["tick", "each divided by its largest value"],
        ["key", "svg", "End"], ["tick", "in"],
        ["change", "is", 2], ["input", "containing", "Q2"],
    ]  # fmt: skip
    said = played(tmp_path, [grid, table, line, rank], steps)["said"]
    told = [look["told"] for look in said]
    assert told[0][0] == "layer 5, expert 0; score 0; rank 4 of 4 in its layer; kept"
    assert "About a." in said[0]["soft"]
    text = said[1]["soft"]
    shares = [(masks["a"][r] & masks["c"][r]).sum() / 2 for r in (0, 1)]
    assert shares == [0.5, 0.0]
    assert "About a. Of those kept, 25 % are also kept with domain c (mean over rows, which have 0 % to 50 %)." in text
    assert told[2][0] == "layer 6, expert 0; score 4; rank 4 of 4 in its layer; kept; not kept with domain c"
    last = "layer 6, expert 3; score 7; rank 1 of 4 in its layer; not kept; not kept with domain c"
    assert told[3][0] == told[4][0] == last
    assert "About c." in said[5]["soft"]  # compared with itself: nothing to compare
    assert told[0][1] == "Rows 1 to 20 of 45 that the filters let through; 45 in all."
    assert told[6][1] == "Rows 1 to 20 of 37 that the filters let through; 45 in all."
    assert told[7][1] == "Rows 1 to 12 of 12 that the filters let through; 45 in all."
    first = [next(row for row in look["rows"] if len(row) == 2 and row[1] in "xyz") for look in said]
    assert [row[0] for row in first[7:10]] == ["10", "10", "43"]
    assert told[0][2] == "layer 0 (first): in 0.25"
    assert told[11][2] == "layer 1 (first): in 0.5"
    assert told[12][2] == "layer 1 (first): in 2"
    assert told[13][2] == "layer 2: in 4"
    assert told[14][2] == "layer 2: no curve is ticked"
    assert told[0][3] == "Found: 3 of 3. Choose a question:"
    assert told[15][3] == "Found: 1 of 3. Choose a question:"
    assert said[15]["titles"][-1] == "Q1"
    assert ["1", "1", "0.9", "", "k", "t1"] in said[15]["rows"]
    assert ["2", "0", "0.1", "gold", "k", "t0"] in said[15]["rows"]
    assert told[16][3] == "Found: 0 of 3. Choose a question:"
    assert said[16]["titles"][-1] == "No question fits."
    assert not said[-1]["notes"]


def test_a_widget_that_cannot_be_drawn_leaves_the_others(tmp_path: Path):
    widgets = hostile_widgets()
    widgets[0]["rows"] = None
    page = played(tmp_path, widgets, [])
    assert len(page["said"][0]["notes"]) == 1
    assert page["said"][0]["titles"] == [CLEAN] * 5
