"""Amazon Reviews 2023: JSON lines of reviews and of item metadata, and the benchmark's k-core CSV files.

Formats as documented with the collection (amazon-reviews-2023.github.io; arXiv:2403.03952).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxrec.data.assemble import Columns, ItemTexts, assemble, flushed
from jaxrec.data.delimited import open_bytes, read_blocks, read_lines
from jaxrec.data.interactions import Interactions

CSV_HEADER = ["user_id", "parent_asin", "rating", "timestamp"]
_REVIEW_FIELDS = ("user_id", "parent_asin", "rating", "timestamp")


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for line, text in read_lines(path):
        where = f"{path}, line {line}"
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not a JSON object ({error})") from error
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(value).__name__}")
        if line == 1:
            required = _REVIEW_FIELDS if "user_id" in value or "rating" in value else ("parent_asin",)
            for name in required:
                if name not in value:
                    raise KeyError(f"{where}: field {name!r} is missing; the object has {', '.join(value)}")
        yield where, value


def _token(where: str, value: dict[str, Any], name: str) -> bytes:
    token = value.get(name)
    if token is None:
        return b""  # counted as a row with a missing id
    if not isinstance(token, str) or "\0" in token:
        raise ValueError(f"{where}, field {name!r}: {token!r} is not a plain string")
    return token.encode()


def _reviews(path: Path) -> Iterator[tuple[bytes, bytes, int, float]]:
    for where, value in _objects(path):
        rating, time = value.get("rating"), value.get("timestamp")
        if not isinstance(rating, (int, float)) or isinstance(rating, bool) or not np.isfinite(rating):
            raise ValueError(f"{where}, field 'rating': {rating!r} is not a finite number")
        if not isinstance(time, (int, float)) or isinstance(time, bool) or time != time // 1 or abs(time) >= 2**63:
            raise ValueError(f"{where}, field 'timestamp': {time!r} is not a whole 64-bit number (milliseconds)")
        yield _token(where, value, "user_id"), _token(where, value, "parent_asin"), int(time), float(rating)


def read_meta(path: Path) -> tuple[ItemTexts, int]:
    """Titles and categories (joined by ", ") from ``meta_*.jsonl[.gz]``, and how many lines had no ``parent_asin``."""
    texts, without_id = ItemTexts(), 0
    for where, value in _objects(path):
        token = _token(where, value, "parent_asin")
        if not token:
            without_id += 1
            continue
        title, categories = value.get("title") or "", value.get("categories") or []
        if not isinstance(title, str):
            raise ValueError(f"{where}, field 'title': {title!r} is not a string")
        if not isinstance(categories, list) or not all(isinstance(name, str) for name in categories):
            raise ValueError(f"{where}, field 'categories': {categories!r} is not a list of strings")
        texts.add(token, " ".join(title.split()), ", ".join(categories), where)
    return texts, without_id


def _csv(path: Path) -> Iterator[Columns]:
    for block in read_blocks(path, ",", len(CSV_HEADER), skip_lines=1):
        yield Columns(
            users=block.tokens(0),
            items=block.tokens(1),
            times=block.integers(3, "timestamp"),
            ratings=block.floats(2, "rating"),
        )


def load_amazon(reviews: str | Path, meta: str | Path | None = None) -> Interactions:
    """Reviews (``*.jsonl[.gz]``) or a k-core file (``*.csv[.gz]``), with titles from ``meta`` when given.

    Items are ``parent_asin``; times are milliseconds. Only reviewed items get ids: the metadata of a category
    lists many more, which would change every full ranking; report["items_without_events"] counts them. Lines
    with a null or absent user or item are dropped and counted. Raises ValueError naming file, line and field for a
    broken line, KeyError for a column that is missing altogether.
    """
    path = Path(reviews)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such review file")
    report: dict[str, int] = {}
    texts = ItemTexts()
    if meta is not None:
        texts, report["meta_rows_without_id"] = read_meta(Path(meta))
    if ".csv" not in path.suffixes:
        return assemble(str(path), flushed(_reviews(path)), texts=texts, whole_catalogue=False, report=report)
    with open_bytes(path) as stream:
        header = stream.readline().decode("utf-8", "replace").strip().removeprefix("\ufeff").split(",")
    for name in CSV_HEADER:
        if name not in header:
            raise KeyError(f"{path}: column {name!r} is missing; the header has {', '.join(header)}")
    if header != CSV_HEADER:
        raise ValueError(f"{path}, line 1: the header is {','.join(header)}, expected {','.join(CSV_HEADER)}")
    return assemble(str(path), _csv(path), texts=texts, whole_catalogue=False, report=report)


def find_amazon(folder: Path) -> tuple[Path, Path | None]:
    """(review file, metadata file or None) of a folder. Raises ValueError naming the candidates when unclear."""
    names = sorted(f for f in folder.iterdir() if f.name.removesuffix(".gz").endswith((".jsonl", ".csv")))
    metas = [f for f in names if f.name.startswith("meta_")]
    reviews = [f for f in names if f not in metas]
    if not reviews:
        raise FileNotFoundError(f"{folder}: no review file (*.jsonl, *.jsonl.gz, *.csv or *.csv.gz) here")
    if len(reviews) > 1 or len(metas) > 1:
        raise ValueError(
            f"{folder}: several candidates ({', '.join(f.name for f in names)}); call load_amazon with the right files"
        )
    return reviews[0], metas[0] if metas else None
