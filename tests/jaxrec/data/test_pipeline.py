"""Batches: every row once per epoch, and a restored position that continues exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxrec.data import batches

ARRAYS = {"x": np.arange(10, dtype=np.int32), "y": np.arange(20, dtype=np.float32).reshape(10, 2)}


def take(iterator, count: int) -> list[list[int]]:
    return [next(iterator)["x"].tolist() for _ in range(count)]


def test_every_row_once_per_epoch_in_a_new_order():
    rows = [batch["x"].tolist() for batch in batches(ARRAYS, 5, seed=1, epochs=3)]
    epochs = [rows[i] + rows[i + 1] for i in (0, 2, 4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert take(batches(ARRAYS, 5, seed=1), 6) == rows
    assert take(batches(ARRAYS, 5, seed=2), 6) != rows


def test_rows_of_all_arrays_stay_together():
    for batch in batches(ARRAYS, 4, seed=0, epochs=1):
        np.testing.assert_array_equal(batch["y"][:, 0], 2 * batch["x"])
        assert batch["y"].shape == (4, 2)


def test_remainder_and_file_order():
    whole = list(batches(ARRAYS, 4, seed=0, shuffle=False, drop_remainder=False, epochs=2))
    assert [batch["x"].tolist() for batch in whole] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] * 2
    assert len(list(batches(ARRAYS, 4, seed=0, epochs=2))) == 4


def test_state_restored_in_the_middle_of_an_epoch():
    expected = take(batches(ARRAYS, 3, seed=5), 11)
    first = batches(ARRAYS, 3, seed=5)
    assert take(first, 4) == expected[:4]  # the second batch of the second epoch
    state = first.get_state()
    second = batches(ARRAYS, 3, seed=5)
    second.set_state(state)
    assert take(second, 7) == expected[4:]


def test_state_travels_in_an_orbax_checkpoint(tmp_path: Path):
    import grain
    import orbax.checkpoint as ocp

    expected = take(batches(ARRAYS, 3, seed=5), 9)
    iterator = batches(ARRAYS, 3, seed=5)
    take(iterator, 4)
    tree = {"w": np.arange(3.0)}
    with ocp.CheckpointManager(tmp_path / "ckpt") as manager:
        saved = ocp.args.Composite(state=ocp.args.StandardSave(tree), data=grain.checkpoint.CheckpointSave(iterator))
        manager.save(4, args=saved)
    fresh = batches(ARRAYS, 3, seed=5)
    with ocp.CheckpointManager(tmp_path / "ckpt") as manager:
        wanted = ocp.args.Composite(
            state=ocp.args.StandardRestore(tree), data=grain.checkpoint.CheckpointRestore(fresh)
        )
        restored = manager.restore(4, args=wanted)
    assert take(fresh, 5) == expected[4:]
    np.testing.assert_array_equal(restored["state"]["w"], tree["w"])


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"equally many rows, got \{'x': 10, 'z': 3\}"):
        batches({"x": ARRAYS["x"], "z": np.zeros(3)}, 2, seed=0)
    with pytest.raises(ValueError, match="10 rows make no batch of 11"):
        batches(ARRAYS, 11, seed=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        batches(ARRAYS, 0, seed=0)
    with pytest.raises(ValueError, match="epochs=0"):
        batches(ARRAYS, 2, seed=0, epochs=0)
    with pytest.raises(ValueError, match="no arrays"):
        batches({}, 2, seed=0)
    assert len(next(batches(ARRAYS, 11, seed=0, drop_remainder=False))["x"]) == 10
