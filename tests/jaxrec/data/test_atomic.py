"""RecBole atomic files: typed headers, exact times, ids, counted drops, and errors that name file, line and column."""

from __future__ import annotations

import dataclasses
import gzip
from pathlib import Path

import numpy as np
import pytest

from jaxrec.data import delimited, load_atomic
from jaxrec.data.atomic import save_atomic

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float"


def write(folder: Path, rows: list[str], header: str = HEADER, name: str = "toy") -> Path:
    path = folder / f"{name}.inter"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_ids_follow_first_appearance_and_zero_is_padding(tmp_path: Path):
    inter = load_atomic(write(tmp_path, ["b\ty\t3\t2", "a\tx\t4.5\t1", "b\tx\t1\t3"]))
    assert inter.user_tokens.tolist() == ["[PAD]", "b", "a"]
    assert inter.item_tokens.tolist() == ["[PAD]", "y", "x"]
    assert inter.users.tolist() == [1, 2, 1]
    assert inter.items.tolist() == [1, 2, 2]
    assert inter.times.tolist() == [2, 1, 3]
    assert inter.ratings.tolist() == [3, 4.5, 1]
    assert (inter.users.dtype, inter.items.dtype, inter.times.dtype) == (np.int32, np.int32, np.int64)
    assert (inter.num_users, inter.num_items, len(inter)) == (2, 2, 3)
    assert inter.user_index() == {"b": 1, "a": 2}


def test_feature_files_give_ids_to_items_and_users_without_events(tmp_path: Path):
    path = write(tmp_path, ["u2\ti2\t3\t1", "u3\ti3\t3\t2"])
    path.with_suffix(".item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "i1\tToy Story\t1995\tAnimation Children's Comedy\ni2\tAlready (1990)\t1990\tDrama\n\tLost\t1\t\n",
        encoding="utf-8",
    )
    path.with_suffix(".user").write_text("user_id:token\tage:token\nu1\t24\n", encoding="utf-8")
    inter = load_atomic(path)
    assert inter.item_tokens.tolist() == ["[PAD]", "i1", "i2", "i3"]
    assert inter.user_tokens.tolist() == ["[PAD]", "u1", "u2", "u3"]
    assert inter.titles == ("", "Toy Story (1995)", "Already (1990)", "")
    assert inter.categories == ("", "Animation, Children's, Comedy", "Drama", "")
    assert inter.report["item_rows_without_id"] == 1


def test_rows_with_missing_ids_are_counted(tmp_path: Path):
    inter = load_atomic(write(tmp_path, ["\tx\t1\t1", "a\t\t1\t2", "b\tx\t1\t3"]))
    assert inter.user_tokens.tolist() == ["[PAD]", "b"]
    assert inter.report["missing_user_id"] == 1
    assert inter.report["missing_item_id"] == 1
    with pytest.raises(ValueError, match=r"no interactions left after"):
        load_atomic(write(tmp_path, ["\tx\t1\t1"]))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("881250949", 881250949),
        ("8.8e8", 880000000),
        ("881250949.0", 881250949),
        ("-5", -5),
        ("+7", 7),
        ("9007199254740993", 9007199254740993),  # 2^53 + 1, not a float64
        ("9223372036854775807", 2**63 - 1),
        ("1.6E+12", 1_600_000_000_000),
    ],
)
def test_times_are_exact(tmp_path: Path, text: str, value: int):
    assert load_atomic(write(tmp_path, [f"a\tx\t1\t{text}"])).times.tolist() == [value]


def test_fractional_times_need_a_scale(tmp_path: Path):
    path = write(tmp_path, ["a\tx\t1\t12.345", "a\ty\t1\t1.2345e1", "a\tz\t1\t13"])
    with pytest.raises(ValueError, match=r"line 2, column 'timestamp': '12.345'.*time_scale"):
        load_atomic(path)
    assert load_atomic(path, time_scale=1000).times.tolist() == [12345, 12345, 13000]


@pytest.mark.parametrize("text", ["3", "3.5", "-0.1", ".5", "1e-3", "0.30000000000000004", "123456789.123456789"])
def test_floats_are_correctly_rounded(tmp_path: Path, text: str):
    path = tmp_path / "numbers.txt"
    path.write_text(f"{text}\n")
    (block,) = delimited.read_blocks(path, "\t", 1)
    assert block.floats(0, "x").tolist() == [float(text)]


def test_numbers_agree_with_python_on_many_random_cells(tmp_path: Path, rng: np.random.Generator):
    numbers = [f"{value:.{digits}f}" for value, digits in zip(rng.normal(0, 1e4, 500), rng.integers(0, 9, 500))]
    path = tmp_path / "numbers.txt"
    path.write_text("\n".join(numbers))
    blocks = list(delimited.read_blocks(path, "\t", 1, block_bytes=97))
    assert len(blocks) > 10
    assert np.concatenate([block.floats(0, "x") for block in blocks]).tolist() == [float(n) for n in numbers]


def test_blocks_keep_line_numbers_and_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [f"u{i % 7}\ti{i}\t1\t{i}" for i in range(100)]
    whole = load_atomic(write(tmp_path, rows))
    read = delimited.read_blocks
    monkeypatch.setattr("jaxrec.data.atomic.read_blocks", lambda *a, **k: read(*a, **k, block_bytes=33))
    parts = load_atomic(write(tmp_path, rows))
    np.testing.assert_array_equal(parts.items, whole.items)
    np.testing.assert_array_equal(parts.times, whole.times)
    rows[90] = "u1\ti90\t1\tsoon"
    with pytest.raises(ValueError, match=r"toy.inter, line 92, column 'timestamp': 'soon' is not a number"):
        load_atomic(write(tmp_path, rows))


def test_windows_line_ends_byte_order_mark_and_missing_last_line_end(tmp_path: Path):
    path = tmp_path / "toy.inter"
    path.write_bytes(("\ufeff" + HEADER + "\r\nä\tx\t1\t5\r\nb\ty\t2\t6").encode())
    inter = load_atomic(path)
    assert inter.user_tokens.tolist() == ["[PAD]", "ä", "b"]
    assert inter.times.tolist() == [5, 6]


def test_path_may_be_folder_prefix_or_file(tmp_path: Path):
    folder = tmp_path / "toy"
    folder.mkdir()
    path = write(folder, ["a\tx\t1\t1"])
    for where in (folder, folder / "toy", path):
        assert len(load_atomic(where)) == 1
    write(folder, ["a\tx\t1\t1", "b\tx\t1\t1"], name="other")
    assert len(load_atomic(folder)) == 1  # the file named like its folder
    write(tmp_path, ["a\tx\t1\t1"], name="one")
    write(tmp_path, ["a\tx\t1\t1"], name="two")
    with pytest.raises(ValueError, match=r"several \.inter files \(one.inter, two.inter\)"):
        load_atomic(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no \.inter file"):
        load_atomic(tmp_path / "nothing")


def test_ratings_are_optional(tmp_path: Path):
    path = write(tmp_path, ["a\tx\t1"], header="user_id:token\titem_id:token\ttimestamp:float")
    assert load_atomic(path).ratings is None


@pytest.mark.parametrize("cell", ["rating", "rating:number", ":float"])
def test_header_without_a_known_type(tmp_path: Path, cell: str):
    path = write(tmp_path, ["a\tx\t1\t1"], header=HEADER.replace("rating:float", cell))
    with pytest.raises(ValueError, match=r"toy.inter, line 1, column 3"):
        load_atomic(path)


@pytest.mark.parametrize("row", ["a\tx\t1", "a\tx\t1\t1\t1", ""])
def test_wrong_number_of_cells(tmp_path: Path, row: str):
    with pytest.raises(ValueError, match=r"toy.inter, line 3: \d cells where 4 are expected"):
        load_atomic(write(tmp_path, ["a\tx\t1\t1", row, "a\tx\t1\t1"]))


@pytest.mark.parametrize("cell", ["good", "", "1_0", "0x10", " ", "1.2.3", "--1", "nan", "inf", "1e999"])
def test_bad_rating(tmp_path: Path, cell: str):
    with pytest.raises(ValueError, match=r"toy.inter, line 3, column 'rating'"):
        load_atomic(write(tmp_path, ["a\tx\t1\t1", f"a\ty\t{cell}\t1"]))


@pytest.mark.parametrize("cell", ["nan", "inf", "-inf", "soon", "", "1e30"])
def test_bad_timestamp(tmp_path: Path, cell: str):
    with pytest.raises(ValueError, match=r"toy.inter, line 2, column 'timestamp'"):
        load_atomic(write(tmp_path, [f"a\tx\t1\t{cell}"]))


def test_bad_number_in_a_column_nobody_uses(tmp_path: Path):
    path = write(tmp_path, ["a\tx\t1\t1\tmany"], header=HEADER + "\tplays:float")
    with pytest.raises(ValueError, match=r"toy.inter, line 2, column 'plays': 'many' is not a number"):
        load_atomic(path)


@pytest.mark.parametrize("name", ["user_id", "item_id", "timestamp"])
def test_missing_column(tmp_path: Path, name: str):
    path = write(tmp_path, ["a\tx\t1\t1"], header=HEADER.replace(name, "other"))
    with pytest.raises(KeyError, match=rf"column '{name}' is missing"):
        load_atomic(path)


def test_column_of_the_wrong_type(tmp_path: Path):
    path = write(tmp_path, ["1\tx\t1\t1"], header=HEADER.replace("user_id:token", "user_id:float"))
    with pytest.raises(ValueError, match=r"column 'user_id' has type float, expected token"):
        load_atomic(path)


def test_bytes_that_are_no_text(tmp_path: Path):
    path = write(tmp_path, ["a\tx\t1\t1"])
    path.write_bytes(path.read_bytes() + b"\xff\xfe\tx\t1\t1\n")
    with pytest.raises(ValueError, match=r"toy.inter, line 3: not valid UTF-8"):
        load_atomic(path)
    path.write_bytes(f"{HEADER}\na\0\tx\t1\t1\n".encode())
    with pytest.raises(ValueError, match=r"toy.inter, line 2: a NUL byte"):
        load_atomic(path)


def test_feature_file_errors_name_the_line(tmp_path: Path):
    path = write(tmp_path, ["a\tx\t1\t1"])
    items = path.with_suffix(".item")
    items.write_text("item_id:token\ttitle:token_seq\nx\tX\nx\tX\n")
    with pytest.raises(ValueError, match=r"toy.item, line 3: item 'x' is described a second time"):
        load_atomic(path)
    items.write_text("item_id:token\ttitle:token_seq\nx\n")
    with pytest.raises(ValueError, match=r"toy.item, line 2: 1 cells where 2 are expected"):
        load_atomic(path)
    items.write_text("item_id:token\tprice:float\nx\tcheap\n")
    with pytest.raises(ValueError, match=r"toy.item, line 2, column 'price': 'cheap' is not a number"):
        load_atomic(path)
    items.write_text("item_id:token\ttitle:token_seq\nx\tX\n")
    with pytest.raises(KeyError, match=r"toy.item: column 'headline' is missing"):
        load_atomic(path, title_field="headline")


def test_padding_token_is_no_id(tmp_path: Path):
    with pytest.raises(ValueError, match=r"\[PAD\]"):
        load_atomic(write(tmp_path, ["[PAD]\tx\t1\t1"]))


def test_gzip_lines_are_read(tmp_path: Path):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(b"1\t2\n3\t4\n"))
    (block,) = delimited.read_blocks(path, "\t", 2)
    assert block.integers(1, "b").tolist() == [2, 4]


def test_what_is_saved_is_read_back(tmp_path: Path):
    rows = ["b\ty\t3\t2", "a\tx\t4.1\t1700000000", "b\tx\t1\t3"]
    path = write(tmp_path, rows)
    path.with_suffix(".item").write_text(
        "item_id:token\ttitle:token_seq\tclass:token_seq\ny\tHall, Great (1990)\tDrama War\nx\tÉlan\t\n",
        encoding="utf-8",
    )
    first = load_atomic(path)
    second = load_atomic(save_atomic(first, tmp_path / "copy", "toy"))
    for field in ("users", "items", "times", "ratings", "user_tokens", "item_tokens"):
        np.testing.assert_array_equal(getattr(second, field), getattr(first, field), err_msg=field)
    assert (second.titles, second.categories) == (first.titles, first.categories)


def test_a_title_with_a_tab_cannot_be_saved(tmp_path: Path):
    inter = load_atomic(write(tmp_path, ["b\ty\t3\t2"]))
    with pytest.raises(ValueError, match="tab or a line break"):
        save_atomic(dataclasses.replace(inter, titles=("", "a\tb")), tmp_path / "copy", "toy")
