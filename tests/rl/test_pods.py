"""Two processes with four devices each train as one process with eight: losses, weights, files."""

import importlib.util
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import models
from models.sharding import make_mesh, shard_batch, to_host
from rl.checkpoint import Checkpointer
from rl.metrics import read_metrics
from rl.optimizer import init_state

_WORKER = Path(__file__).with_name("pod_worker.py")
_SPEC = importlib.util.spec_from_file_location("pod_worker", _WORKER)
worker = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(worker)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, run_pod):
    """(folder of the pod's run, folder of one process's run)."""
    top = tmp_path_factory.mktemp("pods")
    worker.store_model(top / "start")
    worker.train(top / "start", top / "one")  # first, so that this process's programs do not wait for the pod's
    run_pod(lambda *place: (_WORKER, top / "start", top / "two", *place), top)
    return top / "two", top / "one"


def test_losses_and_metrics_are_those_of_one_process(runs):
    two, one = map(read_metrics, runs)
    # One line per step: the second process writes none.
    assert [(r["stage"], r["step"]) for r in two] == [("sft", 1), ("sft", 2), ("sft", 3), ("rl", 1), ("rl", 2)]
    for a, b in zip(two, one, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"stage", "time", "seconds", "tokens_per_second"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), (a["stage"], a["step"], name)


def test_the_model_that_all_processes_write_is_that_of_one(runs):
    two, one, start = (
        models.load(folder) for folder in (runs[0] / "model", runs[1] / "model", runs[0].parent / "start")
    )
    assert two.config == one.config
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), two.params, one.params)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), two.params, start.params)
    assert min(jax.tree.leaves(moved)) > 1e-4
    assert not [path for path in runs[0].iterdir() if path.name.startswith(".")]


def test_a_pods_checkpoint_is_read_by_one_process_on_another_mesh(runs):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    target = init_state(models.load(runs[0].parent / "start", mesh).params, worker.optimizer())
    batches = worker.Batches()
    with Checkpointer(runs[0] / "sft") as keeper:
        restored = keeper.restore(target, batches)
    with Checkpointer(runs[1] / "sft") as keeper:
        expected = keeper.restore(target)
    assert (restored.step, batches.position) == (worker.SFT_STEPS, worker.SFT_STEPS)
    assert restored.state.params["embed"].sharding == target.params["embed"].sharding

    def same(a, b):
        if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    jax.tree.map(same, restored.state, expected.state)


@pytest.mark.slow
def test_a_pod_goes_on_from_a_pods_checkpoint(runs, run_pod, tmp_path):
    """Steps 1 and 2 by one pair of processes, step 3 by another pair, beside one process that is never interrupted."""
    start, steps = runs[0].parent / "start", worker.RL_STEPS + 1
    shutil.copytree(runs[0], tmp_path / "two")
    worker.train(start, tmp_path / "one", steps)
    run_pod(lambda *place: (_WORKER, start, tmp_path / "two", *place, steps), tmp_path)
    two, one = (read_metrics(tmp_path / name)[-1] for name in ("two", "one"))
    assert (two["stage"], two["step"]) == (one["stage"], one["step"]) == ("rl", steps)
    for name in one.keys() - {"stage", "time", "seconds", "tokens_per_second"}:
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
    assert [r["step"] for r in read_metrics(tmp_path / "two") if r["stage"] == "rl"] == list(range(1, steps + 1))


def test_to_host_gives_the_whole_array():
    values = {"rows": np.arange(24.0).reshape(8, 3), "one": np.float32(2)}
    found = to_host(shard_batch(make_mesh(data=8), values))
    jax.tree.map(np.testing.assert_array_equal, found, values)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
