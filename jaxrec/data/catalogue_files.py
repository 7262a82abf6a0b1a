"""Catalogues of titled items from the field's files, and a plain form of our own.

What a file holds is read off its content:

* JSON lines, our own form: ``{"title": ..., "genre": [...], ...}``, every other field an attribute;
* one JSON object of objects: GRSU's ``movie2info.json`` (title -> facts) and iEvaLM-CRS's ``*id2info.json`` (a key of
  its own -> facts with ``name``; ``*item_ids.json`` and ``*entity2id.json`` beside it say which may be recommended);
* a table with a header, parted by tabs or commas, such as INSPIRED's ``movie_database.tsv`` and ReDial's
  ``movies_with_mentions.csv``.

Files of the field hold titles twice, or in two spellings that differ in case or punctuation alone. They become one
item, the first one's title with the facts of both, and are counted. In our own form they are an error.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrec.data.item_catalogue import ATTRIBUTES, ItemCatalogue, title_key
from jaxrec.data.lines import json_lines

MERGED = "titles that another item has too, made one"
_TITLE_COLUMNS = ("title", "movieName")
_NAMES = {
    "actor": "star", "actors": "star", "stars": "star", "genres": "genre", "directors": "director", "writers": "writer",
    "languages": "language", "short_plot": "plot", "long_plot": "plot",
}  # fmt: skip
_COLUMNS = ("year", "genre", "genres", "star", "stars", "actor", "actors", "director", "directors", "writer", "writers",
            "language", "languages", "plot", "short_plot", "long_plot")  # fmt: skip
_WHOLE = ("year", "plot")  # attributes whose text is one value, commas and all
_Facts = dict[str, str | tuple[str, ...]]


def read_catalogue(path: str | Path, order: Sequence[str] = ATTRIBUTES) -> tuple[ItemCatalogue, dict[str, int]]:
    """The catalogue of a file, and counts of what was made one or left out.

    order: the attributes that an item's text shows, in that order. Raises ValueError naming the file, and line or
    title, for what cannot be read, for an attribute that is neither a text nor a list of texts, and for a file without
    any item; FileNotFoundError.
    """
    path = Path(path)
    text = read_text(path)
    counts: Counter[str] = Counter()
    whole = _whole_object(text)
    if whole is not None:
        titles, facts = merge_titles(_only_recommended(_from_object(whole, path, counts), path, counts), counts)
    elif text.lstrip()[:1] == "{":
        titles, facts = _from_lines(path)
    else:
        titles, facts = merge_titles(_from_table(text, path, counts), counts)
    return catalogue_of(titles, facts, order, str(path)), {"items": len(titles), **counts}


def write_catalogue(path: str | Path, catalogue: ItemCatalogue) -> None:
    """A catalogue as JSON lines, which :func:`read_catalogue` reads as the same one. Raises ValueError for an attribute
    of the name that the title has there."""
    for title, known in zip(catalogue.titles, catalogue.attributes, strict=True):
        if "title" in known:
            raise ValueError(f"{title!r}: 'title' cannot be the name of an attribute in {path}")
    lines = [
        {"title": title, **{name: list(values) for name, values in known.items()}}
        for title, known in zip(catalogue.titles, catalogue.attributes, strict=True)
    ]
    Path(path).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def catalogue_of(
    titles: Sequence[str], facts: Sequence[Mapping[str, Any]], order: Sequence[str], where: str
) -> ItemCatalogue:
    """A catalogue whose errors begin with where it comes from."""
    try:
        return ItemCatalogue(titles, facts, order)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def merge_titles(found: Iterable[tuple[str, _Facts]], counts: Counter[str]) -> tuple[list[str], list[_Facts]]:
    """Titles that differ in case, punctuation or blanks alone as one: the first one's spelling, lists of values joined,
    of texts the first that is not empty. ``counts[MERGED]`` grows by the titles that went into another one."""
    items: dict[str, tuple[str, _Facts]] = {}
    for title, facts in found:
        key = title_key(title)
        if key in items:
            counts[MERGED] += 1
        known = items.setdefault(key, (title, {}))[1]
        for name, value in facts.items():
            before = known.get(name, ())
            if isinstance(value, str) or isinstance(before, str):
                known[name] = before or value
            else:
                known[name] = tuple(dict.fromkeys([*before, *value]))
    return [title for title, _ in items.values()], [known for _, known in items.values()]


def read_text(path: Path) -> str:
    """A file's text, without a byte order mark. Raises ValueError for one that is empty or not UTF-8."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from error
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text


def checked(value: Any, where: str) -> str:
    """A text from a file. Raises ValueError for anything else, and for halves of characters, which JSON can hold but no
    tokenizer reads."""
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a text, not {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds half a character (a lone surrogate) at position {error.start}") from error
    return value


def tidy(value: Any, where: str) -> str:
    """:func:`checked`, without blanks at the ends and with runs of them made one."""
    return " ".join(checked(value, where).split())


def _whole_object(text: str) -> dict[str, dict[str, Any]] | None:
    """The object of objects that a file is, if it is one."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return whole if isinstance(whole, dict) and all(isinstance(facts, dict) for facts in whole.values()) else None


def _from_object(
    whole: Mapping[str, Mapping[str, Any]], path: Path, counts: Counter[str]
) -> Iterable[tuple[str, _Facts]]:
    for key, facts in whole.items():
        title = tidy(facts.get("name", key), f"{path}: the name of {key!r}")
        if title:
            yield title, _usual({k: v for k, v in facts.items() if k not in ("name", "title")}, f"{path}: {title!r}")
        else:
            counts["items without a title, left out"] += 1


def _only_recommended(
    found: Iterable[tuple[str, _Facts]], path: Path, counts: Counter[str]
) -> Iterable[tuple[str, _Facts]]:
    """Of iEvaLM-CRS's facts those of items that may be recommended, and such items without any facts."""
    ids, names = (path.with_name(path.name.replace("id2info", part)) for part in ("item_ids", "entity2id"))
    if "id2info" not in path.name or not ids.exists():
        yield from found
        return
    wanted = set(_json(ids, list))
    allowed = {name for name, number in _json(names, dict).items() if number in wanted}
    seen = set()
    for title, facts in found:
        seen.add(title)
        if title in allowed:
            yield title, facts
        else:
            counts["items that may not be recommended, left out"] += 1
    for title in sorted(allowed - seen):
        counts["items without any facts"] += 1
        yield title, {}


def _json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path}: a {kind.__name__} was expected, not {type(value).__name__}")
    return value


def _from_lines(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    titles, facts = [], []
    for where, entry in json_lines(path):
        if "title" not in entry:
            raise ValueError(f"{where}: field 'title' is missing")
        title = checked(entry["title"], f"{where}: field 'title'")
        if not title.strip():
            raise ValueError(f"{where}: field 'title' is empty")
        titles.append(title)
        facts.append(_attributes({k: v for k, v in entry.items() if k != "title"}, f"{where}: {title!r}"))
    return titles, facts


def _attributes(entry: Mapping[str, Any], where: str) -> dict[str, str | list[str]]:
    """Attributes that have a value, numbers as texts."""
    out: dict[str, str | list[str]] = {}
    for name, value in entry.items():
        at = f"{where}: attribute {name!r}"
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            out[name] = [checked(part, at) for part in value]
        elif isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
            out[name] = checked(str(value), at)
        elif value is not None:
            raise ValueError(f"{at} must be a text or a list of texts, not {value!s:.80}")
    return out


def _usual(entry: Mapping[str, Any], where: str) -> _Facts:
    """Attributes under their usual names, tidied, without values that occur twice."""
    out: _Facts = {}
    for name, value in _attributes(entry, where).items():
        whole = isinstance(value, str)
        known = tidy(value, where) if whole else tuple(dict.fromkeys(tidy(part, where) for part in value))
        out[_NAMES.get(name, name)] = out.get(_NAMES.get(name, name)) or known
    return out


def _from_table(text: str, path: Path, counts: Counter[str]) -> Iterable[tuple[str, _Facts]]:
    header = text.split("\n", 1)[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in header else ",")
    column = next((name for name in _TITLE_COLUMNS if name in (reader.fieldnames or ())), None)
    if column is None:
        kinds = "JSON lines, an object of objects, or a table with a column 'title'"
        raise ValueError(f"{path}: no catalogue: it must be {kinds}; it begins with {header:.60}")
    try:
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}:{reader.line_num}: the row has not the {len(reader.fieldnames)} columns of line 1"
                )
            title = tidy(row[column], f"{path}:{reader.line_num}: column {column!r}")
            if not title:
                counts["items without a title, left out"] += 1
                continue
            cells = {name: row[name] for name in _COLUMNS if row.get(name, "").strip()}
            facts = {
                name: value if _NAMES.get(name, name) in _WHOLE else value.split(",") for name, value in cells.items()
            }
            yield _with_year(title, row.get("year", "")), _usual(facts, f"{path}:{reader.line_num}")
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}") from error


def _with_year(title: str, year: str) -> str:
    """As dialogues name films, ``Heat (1995)``."""
    found = re.match(r"\s*(\d{4})\b", year)
    return f"{title} ({found[1]})" if found and not re.search(r"\(\d{4}\)$", title) else title
