"""DeepRec from the command line in two processes with four devices each: killed, gone on with, beside one process."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import models
from jaxrec.config import resolve_config, save_config
from jaxrec.evaluate import deeprec as judging
from jaxrec.systems import deeprec
from rl.metrics import read_metrics

pytestmark = pytest.mark.slow

ROOT = Path(deeprec.__file__).resolve().parents[2]
SETTINGS = [
    "--config.mesh.data=2", "--config.mesh.fsdp=4", "--config.trm.epochs=2", "--config.trm.layers=1",
    "--config.trm.experts=2", "--config.baselines.epochs=1", "--config.cold_start.steps=40",
    "--config.cold_start.batch_size=32", "--config.cold_start.lr=0.01", "--config.cold_rl.steps=2",
    "--config.rec_rl.steps=1", "--config.rl.save_every=1", "--config.rl.warmup=0", "--config.data.test_users=32",
]  # fmt: skip
# The command, in a process that ends without warning behind a step. All of a pod's processes reach that step.
COMMAND = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from jaxrec import cli
from rl.metrics import MetricsWriter

write = MetricsWriter.write

def write_and_die(self, step, *more):
    write(self, step, *more)
    if f"{self.stage} {step}" == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)

MetricsWriter.write = write_and_die
sys.exit(cli.main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, run_pod) -> dict[str, Path]:
    """Folders of a run: ``killed`` as a pod left it that was killed behind the first step of reinforcement, ``two`` as
    the next pod ended it, ``one`` of one process with eight devices. That one goes on from the pod's supervised start,
    and is not interrupted.
    """
    top = tmp_path_factory.mktemp("pods")
    two, one = top / "two", top / "one"

    def words(death: str):
        run = ["-c", COMMAND, ROOT, death, "run", "--config=deeprec:tiny", f"--workdir={two}", *SETTINGS]
        return lambda address, process, count: [*run, f"--distributed={address},{process},{count}"]

    codes = run_pod(words("cold_rl 1"), top, check=False)
    assert 0 not in codes, "".join(path.read_text()[-3000:] for path in top.glob("*.log"))
    shutil.copytree(two, top / "killed")
    run_pod(words("never"), top)

    config = resolve_config("deeprec:tiny", SETTINGS)
    save_config(one, config)
    deeprec.run(config, one, ("trm", "cold_start"))
    model = Path("checkpoints") / "cold_start" / "model"
    shutil.move(one / model, one / "own_start")
    shutil.copytree(two / model, one / model)
    deeprec.run(config, one, ("cold_rl",))
    return {"killed": top / "killed", "two": two, "one": one}


def metrics(folder: Path, stage: str) -> list[dict]:
    """Without what a clock decides."""
    clock = {"stage", "time", "seconds", "tokens_per_second"}
    return [{k: v for k, v in record.items() if k not in clock} for record in read_metrics(folder, stage)]


def assert_alike(found: list[dict], expected: list[dict], tolerance: float) -> None:
    assert [r["step"] for r in found] == [r["step"] for r in expected]
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance), a["step"]


def test_recommenders_are_those_of_one_process(runs):
    two, one = runs["two"], runs["one"]
    assert_alike(metrics(two, "trm"), metrics(one, "trm"), 1e-6)
    for name in ("trm", "sasrec/setting0"):
        found, expected = (json.loads((run / "checkpoints" / name / "done.json").read_text()) for run in (two, one))
        assert found["valid"] == pytest.approx(expected["valid"], abs=1e-6)


def test_the_supervised_start_is_that_of_one_process_until_rounding_has_grown(runs):
    """Sums over devices come in another order, and a step of Muon is of full size whatever the gradient."""
    two, one = (metrics(runs[name], "cold_start") for name in ("two", "one"))
    assert len(two) == len(one) == 40
    assert_alike(two[:5], one[:5], 1e-4)
    assert two[-1]["loss"] == pytest.approx(one[-1]["loss"], rel=0.05)
    assert two[-1]["loss"] < 0.8 * two[0]["loss"]


def test_a_pod_goes_on_from_a_pods_checkpoint_as_one_process_that_is_not_interrupted(runs):
    two, one = (metrics(runs[name], "cold_rl") for name in ("two", "one"))
    assert [r["step"] for r in two] == [1, 2]
    assert all(r["grad_norm"] > 0 for r in two)
    assert_alike(two, one, 1e-3)


def test_a_pod_does_no_step_twice(runs):
    killed = runs["killed"] / "checkpoints"
    assert os.listdir(killed / "cold_rl" / "steps") == ["1"]
    assert not (killed / "cold_rl" / "model").exists()
    before, after = read_metrics(runs["killed"]), read_metrics(runs["two"])
    assert before == after[: len(before)]  # with their times
    assert [(r["stage"], r["step"]) for r in after[len(before) :]] == [("cold_rl", 2), ("rec_rl", 1)]
    start, end = (models.load(runs["two"] / "checkpoints" / name / "model") for name in ("cold_start", "cold_rl"))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), start.params, end.params)
    assert min(jax.tree.leaves(moved)) > 1e-4


def test_the_pods_result_is_whole(runs):
    result = json.loads((runs["two"] / "result.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    wanted = {judging.NAMES[name] for name in ("popularity", "markov", "sasrec")}
    wanted |= {judging.HISTORY_ONLY, judging.ORACLE, judging.SFT, judging.STAGE1, judging.STAGE2}
    assert wanted < rows.keys()
    assert all(0 <= row[metric] <= 1 for row in rows.values() for metric in judging.METRICS)
    assert rows[judging.STAGE2]["users"] == result["protocol"]["users"] == 32
    assert rows[judging.ORACLE]["recall@10"] > 0
    assert result["comparisons"]
    stages = [json.loads(line)["stage"] for line in (runs["two"] / "trajectories.jsonl").read_text().splitlines()]
    assert {name: stages.count(name) for name in stages} == dict.fromkeys(("cold_start", "cold_rl", "rec_rl"), 12)
    assert (runs["two"] / "report.html").is_file()
    assert not (runs["two"] / "error.txt").exists()
