"""Reading a run back, and what the table and the page make of it; texts of a run are hostile here."""

from __future__ import annotations

import html.parser
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from jaxrec import report
from jaxrec.config import UsageError, from_json, save_config
from jaxrec.report_plots import phase_seconds

HOSTILE = (
    "<script>alert('x')</script><img src=\"http://example.invalid/a.png\" onerror=alert(1)> & \x1b[31m \x00 $\\frac{1"
)


def write_run(tmp_path: Path) -> Path:
    save_config(tmp_path, from_json(json.dumps({"system": "deeprec", "variant": HOSTILE, "rl": {"lr": 1e-6}})))
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for stage in ("trm", f"rl {HOSTILE}/../x"):
            for step in range(30):
                row = {"stage": stage, "step": step, "time": 1.0, "reward/hit": step / 30, f"reward/{HOSTILE}": 0.5,
                       "valid_format": 0.9, "turns": 2, "loss": float("nan") if step == 3 else 0.1,
                       "seconds": {"rollout": 0.5, "update": 0.25}}  # fmt: skip
                file.write(json.dumps(row) + "\n")
    result = {
        "system": "deeprec",
        "variant": HOSTILE,
        "seed": 1,
        "protocol": {"split": "leave-one-out", "ranking": "full", "history_excluded": False, "users": 1234},
        "rows": [
            {"name": "popularity", "ndcg@10": 0.1, "valid_format": None, "turns": None, "seconds": 1.0},
            {"name": HOSTILE, "ndcg@10": 0.3, "valid_format": 0.95, "turns": 2.5, "seconds": 3.0,
             "intervals": {"ndcg@10": [0.25, 0.35]}},
            {"name": "third", "ndcg@10": float("nan"), "valid_format": 0.5, "turns": 3.0, "seconds": 2.0},
        ],
        "comparisons": [
            {"name": HOSTILE, "metric": "ndcg@10", "difference": 0.2, "low": 0.1, "high": 0.3, "criterion": "low > 0",
             "met": True},
            {"name": "b", "metric": "ndcg@10", "difference": -0.1, "low": -0.2, "high": 0.1, "criterion": "low > 0",
             "met": False},
        ],
        "tables": [{"title": f"Counts {HOSTILE}", "rows": [{"name": f"lost {HOSTILE}", "rl": 98765, "in all": 5}]}],
        "samples": [
            {"dialogue": f"Seeker: {HOSTILE}\nمرحبا 🎬", "nothing": "", "none": None, "empty": [],
             "rounds": [{"critique": "", "reward": 0.25, "items": [f"Heat {HOSTILE} 0.91", "Up 0.10"]},
                        {"critique": "less crime", "reward": float("nan"), "items": ["It 0.50"]}],
             HOSTILE: ["x" * 7000, 3]},
            "a text alone",
        ],
    }  # fmt: skip
    (tmp_path / "result.json").write_text(json.dumps(result))
    with (tmp_path / "trajectories.jsonl").open("w") as file:
        for number in range(5):
            row = {
                "stage": "rec_rl", "step": 9, "example": number, "target": "Tide & <b>Rock</b>", "history": [HOSTILE],
                "segments": [
                    {"by": "prompt", "text": f"prompt {HOSTILE}"},
                    {"by": "policy", "text": f"I look for Tide & <b>Rock</b> {HOSTILE}"},
                    {"by": "tool", "text": "1. Tide & <b>Rock</b>"},
                ],
                "reward": {"format": -1.0 * number, HOSTILE: 0.1}, "hit_rank": 1 if number == 0 else None,
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
    return tmp_path


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    return write_run(tmp_path)


@pytest.fixture(scope="module")
def page_source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of the hostile run, with a metrics file cut short; drawn once, since plots take seconds."""
    workdir = write_run(tmp_path_factory.mktemp("run"))
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "rl", "st')
    return report.build(workdir).read_text(encoding="utf-8")


class Page(html.parser.HTMLParser):
    """The tags and visible text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source", "line", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data


def test_page_is_self_contained_escaped_and_well_formed(page_source: str):
    page = Page(page_source)
    assert not page.open
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "link", "object", "form", "base", "b>"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "srcset", "href"):
            if name in attributes:
                assert tag in ("img", "source")
                assert attributes[name].startswith("data:image/png;base64,")
    assert "<script>alert('x')</script>" in page.text  # as text
    assert "\x00" not in page_source
    assert "\x1b" not in page_source


def test_page_shows_what_matters(page_source: str):
    text = Page(page_source).text
    for words in (
        "leave-one-out",
        "full ranking",
        "history not excluded",
        "1,234 users",
        "seed 1",
        "0.2500 – 0.3500",
        "not met",
        "target at rank 1",
        "target not listed",
        "tool result",
        "rl.lr",
        "Where the time went",
    ):
        assert words in text  # fmt: skip
    assert "<mark>Tide &amp; &lt;b&gt;Rock&lt;/b&gt;</mark>" in page_source
    assert page_source.count('class="best"') == 2


def test_page_shows_more_tables_behind_the_result(page_source: str):
    text = Page(page_source).text
    assert text.index("Paired comparisons") < text.index("Counts <script>") < text.index("lost <script>")
    assert text.index("lost <script>") < text.index("98,765") < text.index("Learning curves")


def test_page_shows_samples_of_any_form(page_source: str):
    page = Page(page_source)
    text = page.text
    assert text.index("Samples") < text.index("Sample 1") < text.index("Sample 2") < text.index("a text alone")
    assert text.index("Seeker: <script>alert('x')</script>") < text.index("مرحبا 🎬")
    for words in ("critique", "less crime", "0.2500", " 0.91", "Up 0.10", "It 0.50", "1,000 more characters"):
        assert words in text
    assert "nothing" not in text
    assert "empty" not in text
    assert sum(tag == "ol" for tag, _ in page.tags) == 4  # rounds, their two lists, and the last field


def test_plots_are_files_inside_the_folder(workdir: Path):
    (workdir / "plots").mkdir()
    stale = workdir / "plots" / "stale.png"
    stale.write_bytes(b"")
    report.build(workdir)
    names = {path.name for path in (workdir / "plots").iterdir()}
    assert {"time.png", "time_dark.png", "trm_reward.png", "trm_loss_dark.png"} <= names
    assert not stale.exists()
    assert {path.name for path in workdir.iterdir()} == {
        "config.json", "metrics.jsonl", "result.json", "trajectories.jsonl", "plots", "report.html",
    }  # fmt: skip


def test_a_run_without_anything_yet_has_a_page(tmp_path: Path):
    save_config(tmp_path, from_json('{"system": "deeprec", "variant": "demo"}'))
    assert "not evaluated yet" in report.build(tmp_path).read_text(encoding="utf-8")


def test_no_run_no_report(tmp_path: Path):
    with pytest.raises(UsageError, match="not a run's folder"):
        report.build(tmp_path)


def test_a_line_cut_short_is_left_out_and_reported(workdir: Path, page_source: str):
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "rl", "st')
    run = report.read_run(workdir)
    assert len(run.metrics) == 60
    assert run.notes == ["metrics.jsonl: line 61 was cut short and is left out"]
    assert run.notes[0] in Page(page_source).text


def test_what_a_recipe_notes_is_shown(workdir: Path):
    result = json.loads((workdir / "result.json").read_text())
    (workdir / "result.json").write_text(json.dumps(result | {"notes": ["3 of 4 <levels> were short"]}))
    assert report.read_run(workdir).notes[-1] == "3 of 4 <levels> were short"
    assert "3 of 4 &lt;levels&gt; were short" in report.build(workdir).read_text()


def test_a_multibyte_character_cut_in_half_is_no_crash(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xc3')
    rows, note = report.read_jsonl(path)
    assert rows == [{"a": 1}]
    assert "line 2" in note


def test_line_separators_inside_a_text_do_not_split_it(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"a": "x\u2028y\x85z"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert report.read_jsonl(path) == ([{"a": "x\u2028y\x85z"}], "")


def test_a_file_of_something_else_is_an_error(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text("not\nJSON\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:1"):
        report.read_jsonl(path)


def test_steps_done_again_count_once(tmp_path: Path):
    save_config(tmp_path, from_json('{"system": "deeprec", "variant": "demo"}'))
    rows = [{"stage": "rl", "step": step, "loss": loss} for step, loss in ((0, 1.0), (1, 2.0), (1, 3.0), (2, 4.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = report.read_run(tmp_path)
    assert [row["loss"] for row in run.metrics] == [1.0, 3.0, 4.0]
    assert "done again after a resume" in run.notes[0]


@pytest.mark.parametrize(
    "text",
    ['{"rows": ', "[]", '{"rows": {}}', '{"rows": [], "tables": [{"title": "x"}]}', '{"rows": [], "tables": [3]}'],
)
def test_a_damaged_result_is_named(workdir: Path, text: str):
    (workdir / "result.json").write_text(text)
    with pytest.raises(ValueError, match=r"result\.json"):
        report.read_run(workdir)


def test_table_shows_best_values_and_protocol(workdir: Path):
    result = report.read_run(workdir).result
    out = io.StringIO()
    Console(file=out, width=160).print(*report.result_tables(result, 160))
    text = out.getvalue()
    for words in ("0.3000", "0.9500", "2.50", "leave-one-out", "–"):
        assert words in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_tables_keep_names_and_figures_whole_at_any_width(width: int):
    metrics = ["recall@10_intent", "seconds", "ndcg@5", "recall@10", "recall@1", "valid_format", "pool_recall", "turns"]
    values = [{m: i + n / 10 for n, m in enumerate(metrics)} for i in (1, 2)]
    rows = [{"name": f"a method with a long name, {i}", **row} for i, row in enumerate(values)]
    out = io.StringIO()
    tables = report.result_tables({"rows": rows}, width)
    Console(file=out, width=width).print(*tables)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in out.getvalue()
    assert sum("a method" in line for line in lines) == 2 * len(tables)
    for n in range(len(metrics)):
        assert f"1.{n}" in out.getvalue()
    assert report.by_reach({"rows": rows})[:5] == ["recall@1", "recall@10", "ndcg@5", "valid_format", "turns"]


def test_best_rows():
    rows = [{"ndcg@10": 0.1, "seconds": 1.0}, {"ndcg@10": 0.30001, "seconds": 9.0}, {"ndcg@10": 0.3, "seconds": 2.0}]
    assert report.best_rows({"rows": rows}, "ndcg@10") == {1, 2}  # equal as shown
    assert report.best_rows({"rows": rows}, "seconds") == set()
    assert report.best_rows({"rows": rows[:1]}, "ndcg@10") == set()


def test_references_and_spreads_do_not_compete():
    rows = [
        {"ndcg@10": 0.1, "ndcg@10_std": 0.2},
        {"ndcg@10": 0.2, "ndcg@10_std": 0.1},
        {"ndcg@10": 0.9, "reference": True},
    ]
    assert report.best_rows({"rows": rows}, "ndcg@10") == {1}
    assert report.best_rows({"rows": rows}, "ndcg@10_std") == set()
    assert report.columns({"rows": rows}) == ["ndcg@10", "ndcg@10_std"]


@pytest.mark.parametrize(
    ("result", "line"),
    [
        ({"seed": 3}, "seed 3"),
        ({"seed": [3], "protocol": {"seeds": [3], "users": 5}}, "5 users · seed 3"),
        ({"seed": [1, 2], "protocol": {"seeds": [1, 2], "ties": "mean"}}, "seeds 1, 2 · ties: mean"),
        ({}, ""),
    ],
)
def test_protocol_line(result: dict, line: str):
    assert report.protocol_line(result) == line


def test_a_run_of_several_seeds_shows_the_first(tmp_path: Path):
    save_config(tmp_path, from_json('{"system": "deeprec", "variant": "demo"}'))
    for seed in (0, 1):
        folder = tmp_path / f"seed{seed}"
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(json.dumps({"stage": "rl", "step": 1, "loss": seed}) + "\n")
        (folder / "seconds.json").write_text('{"rl": 2.5}')
    run = report.read_run(tmp_path)
    assert [row["loss"] for row in run.metrics] == [0]
    assert run.stage_seconds == {"rl": 2.5}
    assert "seed0" in run.notes[0]
    assert "seed1" in run.notes[0]


def test_evaluation_records_without_rewards_are_ordered_by_the_hit():
    rows = [{"stage": "evaluate", "step": 0, "reward": {}, "hit_rank": rank} for rank in (None, 4, 1)]
    assert [row["hit_rank"] for row in report._select(rows)] == [1, None, 4]


def test_the_rest_of_a_stages_time_is_other():
    rows = [{"stage": "rl", "step": 1, "seconds": {"rollout": 1.0}}]
    assert phase_seconds(rows, {"rl": 3.0, "trm": 1.0}) == {"rl": {"rollout": 1.0, "other": 2.0}, "trm": {"other": 1.0}}


def test_phase_seconds_add_up():
    rows = [{"stage": "a", "seconds": {"x": 1.0, "y": 2}}, {"stage": "a", "seconds": {"x": 1.5}}, {"stage": "b"}]
    assert phase_seconds(rows) == {"a": {"x": 2.5, "y": 2.0}}


def test_selection_takes_best_worst_and_middle_of_the_last_step():
    rows = [{"stage": "rl", "step": step, "reward": {"a": value}} for step in (1, 2) for value in (3.0, 1.0, 2.0)]
    chosen = report._select(rows)
    assert [(row["step"], report.total_reward(row)) for row in chosen] == [(2, 3.0), (2, 1.0), (2, 2.0)]


def test_total_is_not_counted_twice():
    assert report.total_reward({"reward": {"a": 1.0, "b": 0.5, "total": 1.5}}) == 1.5
    assert report.total_reward({"reward": {"a": 1.0, "b": float("nan")}}) == 1.0
    assert report.total_reward({}) == 0.0
