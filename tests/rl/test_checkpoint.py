"""Checkpoints: round trip, another mesh, damage, other models, config mismatch, kill -9 in the middle of saves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grain import MapDataset
from jax.sharding import NamedSharding, PartitionSpec

from models.sharding import make_mesh
from rl.checkpoint import Checkpointer, CheckpointError, check_config, fingerprint
from rl.metrics import read_metrics
from rl.optimizer import OptimizerConfig, init_state


def make_state(shift=0.0):
    params = {
        "w": jnp.arange(64.0).reshape(8, 8) + shift,
        "layers": {"b": jnp.arange(6, dtype=jnp.bfloat16), "flag": jnp.array([True, False]), "n": jnp.int32(3)},
    }
    state = init_state({"w": params["w"]}, OptimizerConfig(), seed=5)
    return state.replace(params=params)


def iterator():
    return iter(MapDataset.source(np.arange(20)).seed(3).shuffle().repeat().batch(2).to_iter_dataset())


def equal(a, b):
    def same(x, y):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))

    jax.tree.map(same, a, b)


def test_round_trip_of_weights_optimizer_key_iterator_and_notes(tmp_path):
    data = iterator()
    for _ in range(3):
        next(data)
    with Checkpointer(tmp_path / "c") as checkpointer:
        assert checkpointer.restore(make_state()) is None
        checkpointer.save(3, make_state(1.0), data, {"note": "x"})
        expected = next(data)
    other = iterator()
    with Checkpointer(tmp_path / "c") as checkpointer:
        restored = checkpointer.restore(make_state(), other)
        assert checkpointer.latest_step() == 3
    equal(restored.state, make_state(1.0))
    assert (restored.step, restored.meta) == (3, {"note": "x"})
    np.testing.assert_array_equal(next(other), expected)


def test_keeps_the_newest_and_restores_a_given_step(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, make_state(step))
        equal(checkpointer.restore(make_state(), step=2).state, make_state(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]


def test_restore_onto_another_mesh(tmp_path):
    big, small = make_mesh(fsdp=4, tensor=2), make_mesh(data=1, fsdp=2, devices=jax.devices()[:2])
    saved = jax.device_put(jnp.arange(64.0).reshape(8, 8), NamedSharding(big, PartitionSpec("fsdp", "tensor")))
    target = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(small, PartitionSpec(None, "fsdp")))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": saved})
        restored = checkpointer.restore({"w": target}).state["w"]
    np.testing.assert_array_equal(restored, saved)
    assert restored.sharding == target.sharding


def largest_file(folder: Path) -> Path:
    return max((p for p in (folder / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder: Path):
    file = largest_file(folder)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def remove(folder: Path):
    largest_file(folder).unlink()


def forget_data(folder: Path):
    for file in (folder / "state").rglob("d/*"):
        file.unlink()


@pytest.mark.parametrize("damage", [truncate, remove, forget_data])
def test_damaged_step_falls_back_with_a_warning_then_fails_with_a_remedy(tmp_path, damage):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1.0))
        checkpointer.save(2, make_state(2.0))
    damage(tmp_path / "2")
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.warns(UserWarning, match=r"checkpoint .*2 is damaged .*going on from step 1"):
            restored = checkpointer.restore(make_state())
        assert restored.step == 1
        equal(restored.state, make_state(1.0))
        checkpointer.save(2, make_state(3.0))  # the step can be written again
        equal(checkpointer.restore(make_state()).state, make_state(3.0))
    assert (tmp_path / "damaged_2").is_dir()
    damage(tmp_path / "1")
    damage(tmp_path / "2")
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path} can be read.*Delete that folder"):
            checkpointer.restore(make_state())
    assert {"1", "2"} <= {p.name for p in tmp_path.iterdir()}  # nothing is moved when nothing works


def test_changed_values_are_noticed(tmp_path):
    """What a file format's own checks may miss: the arrays read back well, but are not those that were saved."""
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1.0))
    notes = tmp_path / "1" / "run" / "metadata"
    run = json.loads(notes.read_text())
    run["fingerprint"][".params['w']"] ^= 1
    notes.write_text(json.dumps(run))
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(CheckpointError, match="is not what was saved"):
        checkpointer.restore(make_state())


def test_fingerprint_sees_single_bits_order_and_not_the_mesh():
    w = jnp.arange(64.0).reshape(8, 8)
    base = fingerprint({"w": w})
    assert base != fingerprint({"w": w.at[3, 3].set(np.nextafter(np.float32(27), np.float32(28)))})
    assert base != fingerprint({"w": w[::-1]})
    assert base != fingerprint({"w": w.T})
    spread = jax.device_put(w, NamedSharding(make_mesh(data=8), PartitionSpec("data")))
    assert base == fingerprint({"w": spread})


def test_another_model_is_an_error_not_damage(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": jnp.ones((2, 3))})
        with pytest.raises(ValueError, match=r"\['w'\] has shape \(2, 3\), the model wants \(3, 3\)"):
            checkpointer.restore({"w": jnp.ones((3, 3))})
        with pytest.raises(ValueError, match=r"lacks \[\"\['v'\]\"\]"):
            checkpointer.restore({"w": jnp.ones((2, 3)), "v": jnp.ones(1)})
        with pytest.raises(ValueError, match="saved without a data iterator"):
            checkpointer.restore({"w": jnp.ones((2, 3))}, iterator())
    assert (tmp_path / "1").is_dir()


def test_config_check(tmp_path):
    config = {"rl": {"group_size": 8, "optimizer": {"lr": 1e-6}}, "ids": (1, 2), "steps": 5}
    assert check_config(tmp_path / "run", config) is False
    assert check_config(tmp_path / "run", config) is True
    changed = {"rl": {"group_size": 4, "optimizer": {"lr": 1e-6}}, "ids": (1, 3), "steps": 9, "new": True}
    with pytest.raises(ValueError, match="differing fields") as error:
        check_config(tmp_path / "run", changed, ignore=("steps",))
    text = str(error.value)
    for line in ("rl.group_size: 8 -> 4", "ids: [1, 2] -> [1, 3]", "new: (absent) -> True", "--workdir"):
        assert line in text
    assert "lr" not in text
    assert "steps" not in text
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        check_config(tmp_path / "run", config)


def start(workdir: Path, steps: int) -> subprocess.Popen:
    worker = Path(__file__).with_name("kill_worker.py")
    return subprocess.Popen([sys.executable, str(worker), str(workdir), str(steps)], cwd=Path(__file__).parents[2])


def finish(workdir: Path, steps: int) -> dict[str, np.ndarray]:
    assert start(workdir, steps).wait(timeout=240) == 0
    with np.load(workdir / "params.npz") as stored:
        return {name: stored[name] for name in stored.files}


def kill_while_saving(workdir: Path, process: subprocess.Popen, after: int) -> None:
    """SIGKILL as soon as a save beyond step ``after`` is under way."""
    checkpoints, deadline = workdir / "checkpoints", time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        names = os.listdir(checkpoints) if checkpoints.exists() else []
        steps = [int(name.split(".")[0]) for name in names if name.split(".")[0].isdigit()]
        if any(step > after for step in steps):
            process.send_signal(signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.001)
    pytest.fail(f"the worker ended (code {process.poll()}) or stood still before it saved past step {after}")


def killed_equals_uninterrupted(tmp_path: Path, steps: int, kills: list[int]):
    expected = finish(tmp_path / "whole", steps)
    for after in kills:
        kill_while_saving(tmp_path / "killed", start(tmp_path / "killed", steps), after)
    found = finish(tmp_path / "killed", steps)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
    records = read_metrics(tmp_path / "killed")
    assert [r["step"] for r in records] == list(range(1, steps + 1))
    assert [r["loss"] for r in records] == [r["loss"] for r in read_metrics(tmp_path / "whole")]


def test_kill_during_a_save_and_resume_gives_the_same_weights(tmp_path):
    killed_equals_uninterrupted(tmp_path, 4, [1])


@pytest.mark.slow
def test_killed_many_times(tmp_path):
    killed_equals_uninterrupted(tmp_path, 14, [1, 3, 5, 7, 9, 11])


def test_a_target_may_hold_numpy_scalars(tmp_path):
    with Checkpointer(tmp_path / "c") as keeper:
        keeper.save(1, {"epoch": np.array(3, np.int32)})
        assert int(keeper.restore({"epoch": np.int32(0)}).state["epoch"]) == 3
