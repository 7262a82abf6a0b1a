"""MovieLens as GroupLens ships it: 100K (``u.data``), 1M (``ratings.dat``), 10M-32M and "latest" (``ratings.csv``).

Formats as described in the README of each collection (grouplens.org/datasets/movielens).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from jaxrec.data.assemble import Columns, ItemTexts, assemble
from jaxrec.data.delimited import open_bytes, read_blocks, read_lines
from jaxrec.data.interactions import Interactions

GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
_NO_GENRE = "(no genres listed)"


def _ratings(path: Path, separator: str, *, skip_lines: int = 0) -> Iterator[Columns]:
    for block in read_blocks(path, separator, 4, skip_lines=skip_lines):
        yield Columns(
            users=block.tokens(0),
            items=block.tokens(1),
            times=block.integers(3, "timestamp"),
            ratings=block.floats(2, "rating"),
        )


def _cells(path: Path, separator: str, count: int, encoding: str) -> Iterator[tuple[str, list[str]]]:
    for line, text in read_lines(path, encoding):
        cells, where = text.split(separator), f"{path}, line {line}"
        if len(cells) != count:
            raise ValueError(f"{where}: {len(cells)} cells where {count} are expected")
        if not cells[0]:
            raise ValueError(f"{where}: the id is empty")
        yield where, cells


def _require(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; unpack the whole MovieLens archive")
    return path


def load_movielens_100k(folder: str | Path) -> Interactions:
    """``u.data`` (user, item, rating, seconds), ``u.item`` (latin-1, ``|``, 19 genre flags), ``u.user`` if any."""
    folder = Path(folder)
    texts = ItemTexts()
    for where, cells in _cells(_require(folder / "u.item"), "|", 5 + len(GENRES_100K), "latin-1"):
        flags = cells[5:]
        if any(flag not in ("0", "1") for flag in flags):
            raise ValueError(f"{where}: genre flags must be 0 or 1, found {flags}")
        genres = [genre for genre, flag in zip(GENRES_100K, flags, strict=True) if flag == "1"]
        texts.add(cells[0].encode(), cells[1].strip(), ", ".join(genres), where)
    users = []
    if (folder / "u.user").is_file():
        users = [cells[0].encode() for _, cells in _cells(folder / "u.user", "|", 5, "latin-1")]
    data = _require(folder / "u.data")
    return assemble(str(data), _ratings(data, "\t"), texts=texts, extra_users=users)


def load_movielens_1m(folder: str | Path) -> Interactions:
    """``ratings.dat`` (user::item::rating::seconds), ``movies.dat`` (latin-1), ``users.dat`` if there."""
    folder = Path(folder)
    texts = ItemTexts()
    for where, cells in _cells(_require(folder / "movies.dat"), "::", 3, "latin-1"):
        texts.add(cells[0].encode(), cells[1].strip(), _genres(cells[2]), where)
    users = []
    if (folder / "users.dat").is_file():
        users = [cells[0].encode() for _, cells in _cells(folder / "users.dat", "::", 5, "latin-1")]
    ratings = _require(folder / "ratings.dat")
    return assemble(str(ratings), _ratings(ratings, "::"), texts=texts, extra_users=users)


def load_movielens_csv(folder: str | Path) -> Interactions:
    """``ratings.csv`` (userId,movieId,rating,timestamp) and ``movies.csv`` (quoted titles): 20M, 25M, 32M, latest."""
    folder = Path(folder)
    movies, ratings = _require(folder / "movies.csv"), _require(folder / "ratings.csv")
    texts = ItemTexts()
    rows = csv.reader((text + "\n" for _, text in read_lines(movies)), strict=True)
    try:
        _require_header(movies, next(rows, []), ["movieId", "title", "genres"])
        for row in rows:
            where = f"{movies}, line {rows.line_num}"
            if len(row) != 3 or not row[0]:
                raise ValueError(f"{where}: {len(row)} cells where movieId, title and genres are expected")
            texts.add(row[0].encode(), row[1].strip(), _genres(row[2]), where)
    except csv.Error as error:
        raise ValueError(f"{movies}, line {rows.line_num}: {error}") from error
    with open_bytes(ratings) as stream:
        header = stream.readline().decode("utf-8", "replace").strip().removeprefix("\ufeff").split(",")
    _require_header(ratings, header, ["userId", "movieId", "rating", "timestamp"])
    return assemble(str(ratings), _ratings(ratings, ",", skip_lines=1), texts=texts)


def _require_header(path: Path, found: list[str], expected: list[str]) -> None:
    missing = [name for name in expected if name not in found]
    if missing:
        raise KeyError(f"{path}: column {missing[0]!r} is missing; the header has {', '.join(found)}")
    if found != expected:
        raise ValueError(f"{path}, line 1: the header is {','.join(found)}, expected {','.join(expected)}")


def _genres(text: str) -> str:
    return "" if text == _NO_GENRE else ", ".join(text.split("|"))
