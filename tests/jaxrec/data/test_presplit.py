"""RecBole's pre-split files: samples as written, ids over all parts, counted drops and errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxrec.data import load_interactions, load_presplit

HEADER = "user_id:token\titem_id_list:token_seq\titem_id:token\n"


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    parts = {
        "train": "a\tx y\tz\na\tx\ty\n",
        "valid": "b\tx y z w\tx\n\tx\ty\nb\t\ty\nb\tx\t\n",
        "test": "a\tx y z\tv\n",
    }
    for part, rows in parts.items():
        (tmp_path / f"toy.{part}.inter").write_text(HEADER + rows)
    return tmp_path / "toy"


def test_samples(prefix: Path):
    prefix.with_name("toy.item").write_text("item_id:token\ttitle:token_seq\nz\tZed\nq\tQue\n")
    data = load_presplit(prefix, max_len=3)
    assert data.item_tokens.tolist() == ["[PAD]", "z", "q", "x", "y", "w", "v"]
    assert data.titles == ("", "Zed", "Que", "", "", "", "")
    assert data.num_items == 6
    assert data.samples["train"].history.tolist() == [[3, 4, 0], [3, 0, 0]]
    assert data.samples["train"].targets.tolist() == [1, 4]
    assert data.samples["valid"].history.tolist() == [[4, 1, 5]]  # the oldest item is cut
    assert data.samples["valid"].lengths.tolist() == [3]
    assert data.samples["test"].users.tolist() == [1]
    assert data.report == {
        "missing_user_id": 1, "missing_item_id": 1, "empty_history": 1, "item_rows_without_id": 0,
    }  # fmt: skip
    assert {array.dtype.name for array in data.samples["train"].arrays().values()} == {"int32"}


def test_errors(prefix: Path):
    with pytest.raises(ValueError, match=r"several \.inter files.*load_presplit"):
        load_interactions(prefix.parent)
    with pytest.raises(ValueError, match="max_len=0"):
        load_presplit(prefix, 0)
    test = prefix.with_name("toy.test.inter")
    test.write_text(HEADER + "a\tx\n")
    with pytest.raises(ValueError, match=r"toy.test.inter, line 2: 2 cells where 3"):
        load_presplit(prefix, 3)
    test.write_text(HEADER + "\tx\ty\n")
    with pytest.raises(ValueError, match=r"toy.test.inter: no interactions left after"):
        load_presplit(prefix, 3)
    test.write_text("user_id:token\titem_id:token\na\tx\n")
    with pytest.raises(KeyError, match="column 'item_id_list' is missing"):
        load_presplit(prefix, 3)
    test.unlink()
    with pytest.raises(FileNotFoundError, match=r"toy.test.inter is missing"):
        load_presplit(prefix, 3)
