"""Prepared data sets: exact round trip, random access for Grain, and TensorFlow stays out."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import grain
import numpy as np
import pytest

from jaxrec.data import Interactions
from jaxrec.data.tfds_sources import load_prepared, prepare_interactions, sequence_source


@pytest.fixture
def inter() -> Interactions:
    return Interactions(
        users=np.array([2, 1, 2, 4, 2], np.int32),
        items=np.array([3, 1, 1, 2, 2], np.int32),
        times=np.array([2**40, 5, 5, 1, -3], np.int64),
        ratings=np.array([1, 2.5, 3, 4, 5], np.float32),
        user_tokens=np.array(["[PAD]", "ann", "bo", "cy", "dö"]),
        item_tokens=np.array(["[PAD]", "i1", "i2", "i3"]),
        titles=("", "Misérables, Les (1995)", "", "C"),
        categories=("", "Drama", "", "Drama, War"),
        report={"missing_user_id": 7},
    )


def same(a: Interactions, b: Interactions) -> None:
    for name in ("users", "items", "times", "user_tokens", "item_tokens"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert getattr(a, name).dtype == getattr(b, name).dtype
    assert (a.titles, a.categories, a.report) == (b.titles, b.categories, b.report)
    np.testing.assert_array_equal(a.ratings, b.ratings)


def test_round_trip_keeps_everything(tmp_path: Path, inter: Interactions):
    same(load_prepared(prepare_interactions(inter, tmp_path)), inter)


def test_round_trip_without_ratings(tmp_path: Path, inter: Interactions):
    assert load_prepared(prepare_interactions(replace(inter, ratings=None), tmp_path)).ratings is None


def test_prepared_once_and_never_overwritten(tmp_path: Path, inter: Interactions):
    prepare_interactions(inter, tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    prepare_interactions(inter, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files
    with pytest.raises(ValueError, match="already holds other interactions"):
        prepare_interactions(replace(inter, times=inter.times + 1), tmp_path)
    with pytest.raises(FileNotFoundError, match="run prepare_interactions"):
        load_prepared(tmp_path / "elsewhere")


def test_users_feed_grain_at_random(tmp_path: Path, inter: Interactions):
    source = sequence_source(prepare_interactions(inter, tmp_path))
    assert len(source) == inter.num_users
    assert source[1]["items"].tolist() == [3, 1, 2]
    assert source[2]["items"].tolist() == []
    lengths = (
        grain.MapDataset.source(source).seed(0).shuffle().map(lambda user: (int(user["user"]), len(user["items"])))
    )
    assert sorted(lengths) == [(1, 1), (2, 3), (3, 0), (4, 1)]


SCRIPT = """
import sys
import numpy as np
from jaxrec.data import Interactions
heavy = {"grain", "orbax", "tensorflow_datasets", "transformers", "matplotlib", "torch"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
from jaxrec.data.tfds_sources import load_prepared, prepare_interactions, sequence_source
one = np.ones(1, np.int32)
names = np.array(["[PAD]", "i"])
inter = Interactions(one, one, one.astype(np.int64), None, names, names, ("",) * 2, ("",) * 2)
prepare_interactions(inter, sys.argv[1])
assert load_prepared(sys.argv[1]).item_tokens[1] == "i"
assert sequence_source(sys.argv[1])[0]["items"].tolist() == [1]
assert "tensorflow" not in sys.modules
"""


def test_neither_tensorflow_nor_anything_heavy_is_imported(tmp_path: Path):
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
