"""DeepRec end to end on the tiny world: what a run leaves behind, and what running it again or in parts changes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import models
from jaxrec import cli
from jaxrec.config import UsageError, resolve_config, save_config
from jaxrec.evaluate import deeprec as judging
from jaxrec.systems import deeprec
from rl.metrics import read_metrics

SMALL = (
    "trm.epochs=3", "trm.layers=1", "trm.experts=2", "cold_start.traces=256", "cold_start.steps=100",
    "cold_start.batch_size=32", "cold_start.lr=0.01", "cold_rl.steps=1", "rec_rl.steps=3",
    "data.test_users=32", "rl.warmup=0",
)  # fmt: skip


# Every control but the one that would be the run itself: the tiny run has no r_point to take away.
CONTROLS = tuple(name for name in judging.CONTROLS if name != "no_point")


def config(*overrides: str):
    return resolve_config("deeprec:tiny", [f"--config.{o}" for o in (*SMALL, *overrides)])


def weights(folder: Path, name: str) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(models.load(folder / "checkpoints" / name / "model").params)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_weights(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def figures(result: dict) -> dict[str, dict]:
    """Rows without what a clock decides."""
    return {row["name"]: {k: v for k, v in row.items() if k not in ("name", "seconds")} for row in result["rows"]}


def rows_of(folder: Path) -> dict[str, list[dict]]:
    by_stage: dict[str, list[dict]] = {}
    for record in read_metrics(folder):
        by_stage.setdefault(record["stage"], []).append(record)
    return by_stage


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    """One run with every control, stage by stage: (workdir, result)."""
    folder = tmp_path_factory.mktemp("deeprec") / "run"
    chosen = config(f"evaluate.controls={CONTROLS!r}")
    save_config(folder, chosen)
    for stage in deeprec.STAGES:
        result = deeprec.run(chosen, folder, [stage])
        assert bool(result) == (stage == "evaluate")
    return folder, result


def test_result_holds_every_row_protocol_and_comparison(finished):
    folder, result = finished
    assert json.loads((folder / "result.json").read_text()) == result
    assert (result["system"], result["variant"], result["seed"]) == ("deeprec", "tiny", [0])
    names = [row["name"] for row in result["rows"]]
    wanted = [judging.NAMES[name] for name in ("popularity", "markov", "sasrec")]
    wanted += [judging.HISTORY_ONLY, judging.ORACLE, judging.SFT, judging.STAGE1, judging.STAGE2]
    wanted += [judging.LABELS[name] for name in CONTROLS]
    assert set(wanted) <= set(names)
    (best,) = set(names) - set(wanted)
    assert best.startswith(judging.BEST_ALONE)
    for row in result["rows"]:
        assert {*judging.METRICS} <= row.keys(), row["name"]
        for metric in judging.METRICS:
            assert 0.0 <= row[metric] <= 1.0
    by_name = {row["name"]: row for row in result["rows"]}
    for name in (judging.SFT, judging.STAGE1, judging.STAGE2):
        row = by_name[name]
        assert {"valid_format", "turns", "pool_recall", "seconds", "users"} <= row.keys()
        assert row["users"] == 32
        assert row["seconds"] > 0
    assert by_name[judging.STAGE2]["seconds"] >= by_name[judging.SFT]["seconds"]
    protocol = result["protocol"]
    assert protocol["ranking"] == "full"
    assert protocol["part"] == "test"
    assert protocol["history_excluded"] is True
    assert (protocol["users"], protocol["items"], protocol["seeds"]) == (32, 64, [0])
    assert "leave" in protocol["split"].lower()
    asked = [comparison["name"].split(":")[0] for comparison in result["comparisons"]]
    assert asked == [question[0] for question in judging.QUESTIONS if question[0] != "with r_point over without"]
    decided = [c for c in result["comparisons"] if "met" in c]
    assert len(decided) == 1
    assert decided[0]["criterion"] == config().evaluate.criterion
    for c in result["comparisons"]:
        assert c["low"] <= c["difference"] <= c["high"]


def test_learning_rate_0_leaves_the_lists_of_sft(finished):
    folder, result = finished
    assert_same_weights(weights(folder, "control_lr_0"), weights(folder, "cold_start"))
    rows = figures(result)
    rows[judging.SFT].pop(judging.STAGE1_REWARD)  # measured before and after stage 1 only
    assert rows[judging.LABELS["lr_0"]] == rows[judging.SFT]
    kept = {
        name: json.loads(judging._Book(folder / "checkpoints" / "evaluate", None)._path(name).read_text())["values"]
        for name in (judging.SFT, judging.LABELS["lr_0"])
    }
    kept[judging.SFT].pop(judging.STAGE1_REWARD)
    assert kept[judging.SFT] == kept[judging.LABELS["lr_0"]]
    (against,) = [c for c in result["comparisons"] if c["name"].startswith("learning rate 0")]
    assert (against["difference"], against["low"], against["high"]) == (0.0, 0.0, 0.0)


def test_a_stage_moves_the_weights_exactly_when_it_has_a_gradient(finished):
    folder, _ = finished
    order = ["untrained", "cold_start", "cold_rl", "rec_rl"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for before, after in itertools.pairwise(order):
        old, new = weights(folder, before), weights(folder, after)
        gradient = any(line["grad_norm"] > 0 for line in lines if line["stage"] == after)
        assert any((old[name] != new[name]).any() for name in old) == gradient, after
    assert any(line["grad_norm"] > 0 for line in lines if line["stage"] == "cold_start")


def test_one_call_control_calls_once(finished):
    _, result = finished
    assert figures(result)[judging.LABELS["one_call"]]["turns"] <= 1.0


def test_the_reward_of_stage_1_is_measured_before_and_after_it(finished):
    _, result = finished
    measured = {row["name"] for row in result["rows"] if judging.STAGE1_REWARD in row}
    assert measured == {judging.SFT, judging.STAGE1}


def test_metrics_and_trajectories_are_well_formed(finished):
    folder, _ = finished
    by_stage = rows_of(folder)
    steps = {"trm": 3, "cold_start": 100, "cold_rl": 1, "rec_rl": 3}
    for stage, count in steps.items():
        assert [r["step"] for r in by_stage[stage]] == list(range(1, count + 1))
        assert all(r["seconds"] for r in by_stage[stage])
    assert {"reward", "reward/format", "reward/invocation", "valid_format", "calls"} <= by_stage["cold_rl"][0].keys()
    assert {"reward/hit", "reward/rank", "reward/point"} <= by_stage["rec_rl"][0].keys()
    assert set(by_stage["rec_rl"][0]["seconds"]) >= {"rollout", "reward", "update"}

    records = [json.loads(line) for line in (folder / "trajectories.jsonl").read_text().splitlines()]
    assert {r["stage"] for r in records} == {"cold_start", "cold_rl", "rec_rl"}
    for r in records:
        assert r.keys() == {"stage", "step", "example", "target", "history", "segments", "reward", "hit_rank"}
        assert r["segments"][0]["by"] == "prompt"
        assert {s["by"] for s in r["segments"]} <= {"prompt", "policy", "tool"}
        assert r["history"][-1] in r["segments"][0]["text"]
        assert r["hit_rank"] is None or 1 <= r["hit_rank"] <= 10
    assert len(records) == 3 * config().evaluate.trajectories


def test_run_again_does_nothing_new_and_the_command_line_reports(finished, capsys):
    folder, result = finished
    kept = [p for p in folder.rglob("*") if p.is_file() and p.name not in ("result.json", "seconds.json")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert deeprec.run(config(f"evaluate.controls={CONTROLS!r}"), folder, deeprec.STAGES) == result
    after = {p for p in folder.rglob("*") if p.is_file() and p.name not in ("result.json", "seconds.json")}
    assert {path: path.stat().st_mtime_ns for path in after} == before

    words = [f"--config.{o}" for o in (*SMALL, f"evaluate.controls={CONTROLS!r}")]
    code = cli.main(["run", "--config=deeprec:tiny", f"--workdir={folder}", "--stages=evaluate", *words])
    printed = capsys.readouterr()
    assert code == cli.OK, printed.err
    assert judging.STAGE2 in " ".join(printed.out.split())
    page = (folder / "report.html").read_text()
    assert judging.STAGE2 in page
    assert "recall@10" in page
    assert list((folder / "plots").glob("*.png"))

    code = cli.main(["run", "--config=deeprec:tiny", f"--workdir={folder}", *words, "--config.rl.lr=0.1"])
    assert code == cli.USAGE
    assert "rl.lr" in capsys.readouterr().err


def test_one_call_equals_stage_after_stage(finished, tmp_path: Path):
    folder, result = finished
    whole = deeprec.run(config(), tmp_path / "run", deeprec.STAGES)
    for name in ("cold_start", "cold_rl", "rec_rl"):
        assert_same_weights(weights(folder, name), weights(tmp_path / "run", name))
    expected = figures(result)
    assert figures(whole) == {name: expected[name] for name in figures(whole)}


def test_an_interrupted_evaluation_goes_on_with_the_rows_that_are_missing(finished, tmp_path: Path):
    folder, result = finished
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    book = judging._Book(copy / "checkpoints" / "evaluate", None)
    book._path(judging.STAGE1).unlink()
    first = book._path(judging.SFT)
    before = first.stat().st_mtime_ns
    again = deeprec.run(config(f"evaluate.controls={CONTROLS!r}"), copy, ["evaluate"])
    assert figures(again) == figures(result)
    assert first.stat().st_mtime_ns == before
    lines = (copy / "trajectories.jsonl").read_text().splitlines()
    assert len(lines) == len((folder / "trajectories.jsonl").read_text().splitlines())  # replaced, not appended


@pytest.mark.parametrize(
    ("stage", "missing"),
    [("cold_start", "trm"), ("cold_rl", "cold_start"), ("rec_rl", "cold_rl"), ("evaluate", "rec_rl")],
)
def test_a_missing_forerunner_is_named(finished, stage: str, missing: str, tmp_path: Path):
    folder, _ = finished
    for name in deeprec.STAGES[: deeprec.STAGES.index(missing)]:
        shutil.copytree(folder / "checkpoints" / name, tmp_path / "checkpoints" / name)
    with pytest.raises(UsageError, match=f"stage '{missing}' has not finished in .* run --stages={missing} first"):
        deeprec.run(config(), tmp_path, [stage])
    assert not (tmp_path / "metrics.jsonl").exists()


def test_difficulty_that_leaves_too_few_prompts(finished):
    folder, _ = finished
    chosen = config("rl.difficulty=1", "rl.prompts_per_step=60")
    task = deeprec.config_task(chosen.data, chosen.text, 0)
    with pytest.raises(ValueError, match=r"prompts pass rl\.difficulty=1, too few .* 60 prompts a step"):
        deeprec.prompts(deeprec.Run(chosen, 0, folder, task, None))


def test_prompts_are_held_out_and_within_the_difficulty(finished):
    folder, _ = finished
    for limit in (0, 20):
        chosen = config(f"rl.difficulty={limit}")
        task = deeprec.config_task(chosen.data, chosen.text, 0)
        this = deeprec.Run(chosen, 0, folder, task, None)
        rows = deeprec.prompts(this)
        assert len(set(rows.tolist())) == len(rows)
        assert set(rows) <= set(task.prompt_rows(1))
        assert (len(rows) == 160) == (limit == 0)
        np.testing.assert_array_equal(rows, deeprec.prompts(this))


_WORKER = """
import os, signal, sys
sys.path.insert(0, {root!r})
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
from pathlib import Path
from jaxrec.config import resolve_config
from jaxrec.systems import deeprec
from rl.metrics import MetricsWriter

write = MetricsWriter.write

def write_and_die(self, step, *more):
    write(self, step, *more)
    if (self.stage, step) == {when!r}:
        os.kill(os.getpid(), signal.SIGKILL)

MetricsWriter.write = write_and_die
config = resolve_config("deeprec:tiny", {words!r})
deeprec.run(config, Path({folder!r}), {stages!r})
"""


def _killed(folder: Path, when: tuple[str, int], stages: tuple[str, ...]) -> None:
    """Run stages in a process of their own, which is killed without warning after a step."""
    root = str(Path(deeprec.__file__).resolve().parents[2])
    words = [f"--config.{o}" for o in SMALL]
    program = _WORKER.format(root=root, when=when, words=words, folder=str(folder), stages=stages)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=1200, env={**os.environ}, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.slow
def test_kill_in_the_middle_of_rec_rl(finished, tmp_path: Path):
    folder, _ = finished
    for name in ("trm", "sasrec", "cold_start", "cold_rl"):
        shutil.copytree(folder / "checkpoints" / name, tmp_path / "checkpoints" / name)
    _killed(tmp_path, ("rec_rl", 2), ("rec_rl",))
    assert not (tmp_path / "checkpoints" / "rec_rl" / "model").exists()
    deeprec.run(config(), tmp_path, ["rec_rl"])
    assert_same_weights(weights(tmp_path, "rec_rl"), weights(folder, "rec_rl"))
    assert [r["step"] for r in rows_of(tmp_path)["rec_rl"]][-1] == 3


@pytest.mark.slow
def test_kill_in_the_middle_of_trm(finished, tmp_path: Path):
    folder, _ = finished
    _killed(tmp_path, ("trm", 3), ("trm",))
    assert not (tmp_path / "checkpoints" / "trm" / "done.json").exists()
    deeprec.run(config(), tmp_path, ["trm"])
    facts = [json.loads((f / "checkpoints" / "trm" / "done.json").read_text()) for f in (folder, tmp_path)]
    assert facts[0]["valid"] == facts[1]["valid"]
    assert len(rows_of(tmp_path)["trm"]) <= 4  # epochs 1 to 3, of which only the last was done again
    tables = []
    for place in (folder, tmp_path):
        task = deeprec.config_task(config().data, config().text, 0)
        tables.append(np.asarray(deeprec.Run(config(), 0, place, task, None).trm.module.item_table()))
    np.testing.assert_array_equal(*tables)


@pytest.mark.slow
def test_seeds_pool(tmp_path: Path):
    result = deeprec.run(config("seeds=(0, 1)"), tmp_path, deeprec.STAGES)
    assert result["protocol"]["users"] == 64
    assert result["protocol"]["seeds"] == [0, 1]
    parts = []
    for seed in (0, 1):
        folder = tmp_path / f"seed{seed}" / "checkpoints" / "evaluate"
        parts.append(json.loads(judging._Book(folder, None)._path(judging.STAGE2).read_text())["row"]["recall@10"])
    (row,) = [r for r in result["rows"] if r["name"] == judging.STAGE2]
    assert row["recall@10"] == pytest.approx(np.mean(parts))
    assert row["recall@10_std"] == pytest.approx(np.std(parts, ddof=1))
    assert cli.main(["report", str(tmp_path)]) == cli.USAGE  # no config.json: it was not started by the command
    save_config(tmp_path, config("seeds=(0, 1)"))
    assert cli.main(["report", str(tmp_path)]) == cli.OK
