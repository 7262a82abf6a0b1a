"""RecBole's atomic files: UTF-8, tab-separated, a header of ``name:type`` cells.

``X.inter`` holds the events; ``X.item`` and ``X.user`` describe items and users. Layout as documented by RecBole
(user guide, "atomic files"; github.com/RUCAIBox/RecBole).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxrec.data.assemble import Columns, ItemTexts, assemble, with_year
from jaxrec.data.delimited import decode_line, open_bytes, read_blocks, read_lines
from jaxrec.data.interactions import Interactions

TYPES = ("token", "token_seq", "float", "float_seq")
_TITLES = ("title", "movie_title", "item_name", "name", "product_title")
_YEARS = ("release_year", "year")
_CATEGORIES = ("class", "categories", "category", "genres", "genre")


def read_header(path: Path) -> dict[str, str]:
    """Field name -> type, in column order. Raises ValueError naming file and column."""
    with open_bytes(path) as stream:
        text = decode_line(path, 1, stream.readline()).removeprefix("\ufeff")
    fields: dict[str, str] = {}
    for number, cell in enumerate(text.split("\t"), start=1):
        name, colon, kind = cell.rpartition(":")
        if not colon or not name or kind not in TYPES:
            raise ValueError(
                f"{path}, line 1, column {number}: {cell!r} is not name:type with a type among {', '.join(TYPES)}"
            )
        if name in fields:
            raise ValueError(f"{path}, line 1, column {number}: field {name!r} occurs twice")
        fields[name] = kind
    return fields


def column_index(path: Path, fields: dict[str, str], name: str, kind: str) -> int:
    """Position of a field. Raises KeyError when the header lacks it, ValueError when its type is not ``kind``."""
    if name not in fields:
        raise KeyError(f"{path}: column {name!r} is missing; the header has {', '.join(fields)}")
    if fields[name] != kind:
        raise ValueError(f"{path}: column {name!r} has type {fields[name]}, expected {kind}")
    return list(fields).index(name)


def find_atomic(path: Path) -> Path:
    """The ``.inter`` file meant by a folder, a prefix (``folder/ml-100k``) or the file itself.

    Raises FileNotFoundError when there is none, ValueError naming them when a folder has several.
    """
    if path.suffix == ".inter" and path.is_file():
        return path
    prefixed = path.with_name(path.name + ".inter")
    if prefixed.is_file():
        return prefixed
    found = sorted(path.glob("*.inter")) if path.is_dir() else []
    named = [file for file in found if file.stem == path.name]
    if named:
        return named[0]
    if not found:
        raise FileNotFoundError(f"{path}: no .inter file here (looked for a file, {prefixed} and {path / '*.inter'})")
    if len(found) > 1:
        raise ValueError(
            f"{path}: several .inter files ({', '.join(f.name for f in found)}); "
            "name one of them (pre-split files: load_presplit)"
        )
    return found[0]


def _events(
    path: Path, fields: dict[str, str], user: int, item: int, time: int, rating: int | None, scale: int
) -> Iterator[Columns]:
    names = list(fields)
    others = [i for i, kind in enumerate(fields.values()) if kind == "float" and i not in (time, rating)]
    for block in read_blocks(path, "\t", len(fields), skip_lines=1):
        for column in others:  # a broken number is an error even where nobody reads it
            block.floats(column, names[column])
        yield Columns(
            users=block.tokens(user),
            items=block.tokens(item),
            times=block.integers(time, names[time], scale),
            ratings=None if rating is None else block.floats(rating, names[rating]),
        )


def _feature_rows(path: Path, fields: dict[str, str]) -> Iterator[tuple[int, list[str]]]:
    numbers = [(i, name) for i, (name, kind) in enumerate(fields.items()) if kind == "float"]
    for line, text in read_lines(path):
        if line == 1:
            continue
        cells = text.split("\t")
        if len(cells) != len(fields):
            raise ValueError(f"{path}, line {line}: {len(cells)} cells where {len(fields)} are expected")
        for i, name in numbers:
            if not cells[i]:  # features may be unknown
                continue
            try:
                float(cells[i])
            except ValueError as error:
                raise ValueError(f"{path}, line {line}, column {name!r}: {cells[i]!r} is not a number") from error
        yield line, cells


def _pick(path: Path, fields: dict[str, str], wanted: str | None, usual: Sequence[str]) -> int | None:
    if wanted is not None:
        if wanted not in fields:
            raise KeyError(f"{path}: column {wanted!r} is missing; the header has {', '.join(fields)}")
        return list(fields).index(wanted)
    return next((list(fields).index(name) for name in usual if name in fields), None)


def read_item_texts(
    path: Path, *, item_field: str = "item_id", title_field: str | None = None, category_field: str | None = None
) -> tuple[ItemTexts, int]:
    """Titles ``Name (year)`` and categories joined by ", " from an ``.item`` file, and how many rows had no id.

    Without explicit fields the usual names are tried (title, movie_title, ...; class, categories, genre, ...).
    """
    fields = read_header(path)
    key = column_index(path, fields, item_field, "token")
    title, category = _pick(path, fields, title_field, _TITLES), _pick(path, fields, category_field, _CATEGORIES)
    year = _pick(path, fields, None, _YEARS)
    texts, without_id = ItemTexts(), 0
    for line, cells in _feature_rows(path, fields):
        if not cells[key]:
            without_id += 1
            continue
        name = "" if title is None else with_year(cells[title], "" if year is None else cells[year])
        kinds = "" if category is None else ", ".join(cells[category].split())
        texts.add(cells[key].encode(), name, kinds, f"{path}, line {line}")
    return texts, without_id


def load_atomic(
    path: str | Path,
    *,
    user_field: str = "user_id",
    item_field: str = "item_id",
    rating_field: str = "rating",
    time_field: str = "timestamp",
    title_field: str | None = None,
    category_field: str | None = None,
    time_scale: int = 1,
) -> Interactions:
    """Read ``X.inter`` and, where they exist beside it, ``X.item`` and ``X.user``.

    path: the file, its prefix or its folder. Ids follow first appearance in ``.user`` or ``.item``, then in ``.inter``.
    Times are the column times ``time_scale``, exact int64. Ratings are None without a ``rating_field`` column. Rows
    with an empty id are dropped and counted in the report. Raises KeyError for a missing column and ValueError naming
    file, line and column for everything malformed.
    """
    if time_scale < 1:
        raise ValueError(f"time_scale={time_scale}: must be a whole number >= 1")
    inter = find_atomic(Path(path))
    fields = read_header(inter)
    user, item = column_index(inter, fields, user_field, "token"), column_index(inter, fields, item_field, "token")
    time = column_index(inter, fields, time_field, "float")
    rating = column_index(inter, fields, rating_field, "float") if rating_field in fields else None
    report: dict[str, int] = {}
    texts, users = ItemTexts(), []
    item_file, user_file = inter.with_suffix(".item"), inter.with_suffix(".user")
    if item_file.is_file():
        texts, report["item_rows_without_id"] = read_item_texts(
            item_file, item_field=item_field, title_field=title_field, category_field=category_field
        )
    if user_file.is_file():
        user_fields = read_header(user_file)
        key = column_index(user_file, user_fields, user_field, "token")
        cells = [row[key].encode() for _, row in _feature_rows(user_file, user_fields)]
        users = [cell for cell in cells if cell]
        report["user_rows_without_id"] = len(cells) - len(users)
    blocks = _events(inter, fields, user, item, time, rating, time_scale)
    return assemble(str(inter), blocks, texts=texts, extra_users=users, report=report)


def save_atomic(inter: Interactions, folder: str | Path, name: str) -> Path:
    """Write ``<folder>/<name>.inter`` and ``.item`` for RecBole and other readers of the format; returns the folder.

    Categories become a space-separated sequence. A repeated read gives the same users, items, times and ratings.
    Raises ValueError for an id or title that holds a tab or a line break.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    items = inter.item_tokens[1:].tolist()
    for text in (*inter.user_tokens[1:].tolist(), *items, *inter.titles):
        if any(mark in text for mark in "\t\r\n"):
            raise ValueError(f"{text!r} holds a tab or a line break, which an atomic file cannot keep")
    columns = [inter.user_tokens[inter.users], inter.item_tokens[inter.items], inter.times.astype(str)]
    header = "user_id:token\titem_id:token\ttimestamp:float"
    if inter.ratings is not None:
        columns.append(inter.ratings.astype(str))
        header += "\trating:float"
    rows = "\n".join("\t".join(row) for row in zip(*(column.tolist() for column in columns), strict=True))
    (folder / f"{name}.inter").write_text(f"{header}\n{rows}\n", encoding="utf-8")
    kinds = [" ".join(text.replace(",", " ").split()) for text in inter.categories[1:]]
    lines = "\n".join("\t".join(row) for row in zip(items, inter.titles[1:], kinds, strict=True))
    (folder / f"{name}.item").write_text(
        f"item_id:token\ttitle:token_seq\tcategories:token_seq\n{lines}\n", encoding="utf-8"
    )
    return folder
