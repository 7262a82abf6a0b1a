"""MovieLens' own layouts, Amazon Reviews 2023, and finding out which of them a folder holds."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from jaxrec.data import Interactions, load_amazon, load_interactions
from jaxrec.data.movielens import GENRES_100K
from jaxrec.data.tfds_sources import prepare_interactions

EVENTS = [("1", "2", "3", 881250949), ("2", "1", "4", 891717742), ("1", "3", "5", 878887116)]
TITLES = {"1": "Toy Story (1995)", "2": "Misérables, Les (1995)", "3": "Nowhere (1997)"}
GENRES = {"1": ["Animation", "Children's", "Comedy"], "2": ["Drama"], "3": []}


def ml_100k(folder: Path) -> Path:
    folder.mkdir()
    (folder / "u.data").write_text("".join("\t".join(map(str, event)) + "\n" for event in EVENTS))
    lines = []
    for item, title in TITLES.items():
        flags = ["1" if genre in GENRES[item] else "0" for genre in GENRES_100K]
        lines.append("|".join([item, title, "01-Jan-1995", "", "http://example.org", *flags]))
    (folder / "u.item").write_bytes(("\n".join(lines) + "\n").encode("latin-1"))
    (folder / "u.user").write_text("1|24|M|technician|85711\n2|53|F|other|94043\n3|23|M|writer|32067\n")
    return folder


def ml_1m(folder: Path) -> Path:
    folder.mkdir()
    (folder / "ratings.dat").write_text("".join("::".join(map(str, event)) + "\n" for event in EVENTS))
    lines = [f"{item}::{title}::{'|'.join(GENRES[item])}\n" for item, title in TITLES.items()]
    (folder / "movies.dat").write_bytes("".join(lines).encode("latin-1"))
    (folder / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072\n3::M::25::15::55117\n")
    return folder


def ml_25m(folder: Path) -> Path:
    folder.mkdir()
    (folder / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n" + "".join(",".join(map(str, event)) + "\n" for event in EVENTS)
    )
    lines = [f'{item},"{title}",{"|".join(GENRES[item]) or "(no genres listed)"}\n' for item, title in TITLES.items()]
    (folder / "movies.csv").write_text("movieId,title,genres\n" + "".join(lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize("make", [ml_100k, ml_1m, ml_25m])
def test_movielens_layouts_give_the_same_interactions(tmp_path: Path, make):
    inter = load_interactions(make(tmp_path / "data"))
    assert inter.users.tolist() == [1, 2, 1]
    assert inter.items.tolist() == [2, 1, 3]
    assert inter.times.tolist() == [event[3] for event in EVENTS]
    assert inter.ratings.tolist() == [3, 4, 5]
    assert inter.titles == ("", *TITLES.values())
    assert inter.categories == ("", "Animation, Children's, Comedy", "Drama", "")
    assert inter.num_users == (2 if make is ml_25m else 3)  # the CSV layout has no user file


def test_movielens_half_stars(tmp_path: Path):
    folder = ml_25m(tmp_path / "data")
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,1,3.5,1\n1,2,0.5,2\n")
    assert load_interactions(folder).ratings.tolist() == [3.5, 0.5]


def test_movielens_errors(tmp_path: Path):
    folder = ml_100k(tmp_path / "a")
    (folder / "u.data").write_text("1\t2\t3\t881250949\n1\t2\tfive\t881250949\n")
    with pytest.raises(ValueError, match=r"u.data, line 2, column 'rating': 'five'"):
        load_interactions(folder)
    (folder / "u.item").write_text("1|Toy Story (1995)\n")
    with pytest.raises(ValueError, match=r"u.item, line 1: 2 cells where 24 are expected"):
        load_interactions(folder)
    (folder / "u.item").unlink()
    with pytest.raises(FileNotFoundError, match=r"u.item is missing"):
        load_interactions(folder)
    folder = ml_1m(tmp_path / "b")
    (folder / "ratings.dat").write_text("1::2::3\n")
    with pytest.raises(ValueError, match=r"ratings.dat, line 1: 3 cells where 4 are expected"):
        load_interactions(folder)
    folder = ml_25m(tmp_path / "c")
    (folder / "movies.csv").write_text('movieId,title,genres\n1,"A (1990)",Drama\n1,"B",Drama\n')
    with pytest.raises(ValueError, match=r"movies.csv, line 3: item '1' is described a second time"):
        load_interactions(folder)
    (folder / "movies.csv").write_text('movieId,title,genres\n1,"A "x,Drama\n')
    with pytest.raises(ValueError, match=r"movies.csv, line 2"):
        load_interactions(folder)
    (folder / "movies.csv").write_text("movieId,title,genres\n1,A,Drama\n")
    (folder / "ratings.csv").write_text("userId,movieId,stars,timestamp\n1,1,3,1\n")
    with pytest.raises(KeyError, match=r"ratings.csv: column 'rating' is missing"):
        load_interactions(folder)


REVIEWS = [
    {"user_id": "AE2", "parent_asin": "B01", "rating": 5.0, "timestamp": 1588687728923, "text": 'fine\tand "good"'},
    {"user_id": "AE1", "parent_asin": "B02", "rating": 3.0, "timestamp": 1588615855070},
    {"user_id": None, "parent_asin": "B02", "rating": 3.0, "timestamp": 1},
    {"user_id": "AE1", "rating": 3.0, "timestamp": 2},
]
META = [
    {"parent_asin": "B09", "title": "Never reviewed", "categories": []},
    {"parent_asin": "B02", "title": "Howard  LC0008\nLabel", "categories": ["All Beauty", "Hair"]},
    {"parent_asin": "B01", "title": None, "categories": None},
]


def amazon(folder: Path, packed: bool = False) -> Path:
    folder.mkdir()
    for name, values in (("All_Beauty", REVIEWS), ("meta_All_Beauty", META)):
        data = "".join(json.dumps(value) + "\n" for value in values).encode()
        path = folder / f"{name}.jsonl{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(data) if packed else data)
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_amazon_reviews(tmp_path: Path, packed: bool):
    inter = load_interactions(amazon(tmp_path / "data", packed))
    assert inter.user_tokens.tolist() == ["[PAD]", "AE2", "AE1"]
    assert inter.item_tokens.tolist() == ["[PAD]", "B01", "B02"]
    assert inter.times.tolist() == [1588687728923, 1588615855070]
    assert inter.titles == ("", "", "Howard LC0008 Label")
    assert inter.categories == ("", "", "All Beauty, Hair")
    assert inter.report == {
        "meta_rows_without_id": 0,
        "missing_user_id": 1,
        "missing_item_id": 1,
        "items_without_events": 1,
    }


def test_amazon_core_file(tmp_path: Path):
    path = tmp_path / "All_Beauty.csv"
    path.write_text("user_id,parent_asin,rating,timestamp\nAE2,B01,5.0,1588687728923\nAE1,B02,3.0,1588615855070\n")
    for source in (tmp_path, path):
        inter = load_interactions(source)
        assert inter.times.tolist() == [1588687728923, 1588615855070]
        assert inter.ratings.tolist() == [5, 3]
    path.write_text("user_id,parent_asin,rating,timestamp\nAE2,B01,5.0\n")
    with pytest.raises(ValueError, match=r"All_Beauty.csv, line 2: 3 cells where 4 are expected"):
        load_amazon(path)
    path.write_text("user_id,asin,rating,timestamp\nAE2,B01,5.0,1\n")
    with pytest.raises(KeyError, match=r"column 'parent_asin' is missing"):
        load_amazon(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"user_id": "A", "parent_asin": "B", "rating": 5', r"line 2: not a JSON object"),
        ("[1, 2]", r"line 2: expected a JSON object, found list"),
        (
            '{"user_id": "A", "parent_asin": "B", "timestamp": 5}',
            r"line 2, field 'rating': None is not a finite number",
        ),
        ('{"user_id": "A", "parent_asin": "B", "rating": NaN, "timestamp": 5}', r"line 2, field 'rating': nan"),
        ('{"user_id": "A", "parent_asin": "B", "rating": 5, "timestamp": "x"}', r"line 2, field 'timestamp': 'x'"),
        ('{"user_id": "A", "parent_asin": "B", "rating": 5, "timestamp": Infinity}', r"line 2, field 'timestamp': inf"),
        ('{"user_id": "A", "parent_asin": "B", "rating": 5, "timestamp": 1.5}', r"line 2, field 'timestamp': 1.5"),
        (
            '{"user_id": 3, "parent_asin": "B", "rating": 5, "timestamp": 1}',
            r"line 2, field 'user_id': 3 is not a plain",
        ),
    ],
)
def test_amazon_broken_lines(tmp_path: Path, line: str, message: str):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(REVIEWS[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"x.jsonl, " + message):
        load_amazon(path)


def test_amazon_missing_field_and_bad_meta(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"user_id": "A", "asin": "B", "rating": 5, "timestamp": 1}\n')
    with pytest.raises(KeyError, match=r"field 'parent_asin' is missing"):
        load_amazon(path)
    path.write_text(json.dumps(REVIEWS[0]) + "\n")
    meta = tmp_path / "meta_x.jsonl"
    meta.write_text('{"parent_asin": "B", "title": "T", "categories": "Hair"}\n')
    with pytest.raises(ValueError, match=r"meta_x.jsonl, line 1, field 'categories'"):
        load_interactions(path)
    with pytest.raises(FileNotFoundError, match="no such review file"):
        load_amazon(tmp_path / "y.jsonl")


def test_unknown_and_ambiguous_folders(tmp_path: Path):
    with pytest.raises(
        FileNotFoundError, match=r"holds none of the known layouts.*X.inter.*u.data.*ratings.dat.*jsonl"
    ):
        load_interactions(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_interactions(tmp_path / "nothing")
    folder = ml_100k(tmp_path / "both")
    (folder / "toy.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\na\tx\t1\n")
    with pytest.raises(ValueError, match=r"fits several layouts \(atomic, ml-100k\)"):
        load_interactions(folder)
    assert len(load_interactions(folder, kind="atomic")) == 1
    assert len(load_interactions(folder, kind="ml-100k")) == 3
    with pytest.raises(ValueError, match=r"unknown kind 'netflix'; choose auto, atomic"):
        load_interactions(folder, kind="netflix")
    two = amazon(tmp_path / "two")
    (two / "Books.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"several candidates"):
        load_interactions(two)


def test_prepared_folder_is_found(tmp_path: Path):
    inter = load_interactions(ml_1m(tmp_path / "source"))
    again = load_interactions(prepare_interactions(inter, tmp_path / "prepared"))
    assert isinstance(again, Interactions)
    np.testing.assert_array_equal(again.items, inter.items)
