"""Passages from the field's files, streamed and checked, and kept on disk where indexes find them by number.

    jsonl   one object a line: {"id" or "_id", "title", "text"}, or {"id", "contents": "title\\ntext"} (Pyserini)
    dpr     DPR's Wikipedia (arXiv 2004.04906): a header ``id text title``, then tab-separated lines, quoted as CSV is
    kilt    R1-Searcher's Wikipedia (arXiv 2503.05592): id, tab, title, three spaces, text; no header
    squad   SQuAD 1.1 (arXiv 1606.05250) as a corpus: a passage per paragraph, with the id "article.paragraph"

Names that end in .gz are unpacked on the way.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrec.config import write_atomic
from jaxrec.data.delimited import open_bytes
from jaxrec.progress import track, track_lines
from jaxrec.tools.search.base import Passage

FORMATS = ("jsonl", "dpr", "kilt", "squad")
_VERSION = 1
_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass
class Report:
    """What became of the passages of a file: how many were read, and how many dropped, by reason, with the place of
    the first one."""

    read: int = 0
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    first: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        reasons = "; ".join(f"{n} {reason} (first: {self.first[reason]})" for reason, n in self.dropped.items())
        return f"{self.read} passages, {sum(self.dropped.values())} dropped{f': {reasons}' if reasons else ''}"


class _Bad(Exception):
    """A passage that cannot be used: a short reason, and the details of this one."""

    def __init__(self, reason: str, details: str = ""):
        super().__init__(f"{reason}{f' ({details})' if details else ''}")
        self.reason = reason


def read_passages(
    path: str | Path, form: str, *, drop: bool = False, require_title: bool = True, report: Report | None = None,
    progress: bool = False,
) -> Iterator[Passage]:  # fmt: skip
    """The passages of a file, one after the other.

    form: one of :data:`FORMATS`. An empty passage, a missing title (unless ``require_title`` is False), an id that was
    there before, bytes that are not UTF-8 or a line of another form is a ValueError that names file and line, or with
    ``drop`` left out and counted in ``report``. Ids are kept in memory for that, about 100 bytes each. progress: a bar
    over the file's bytes. Raises FileNotFoundError.
    """
    if form not in FORMATS:
        raise ValueError(f"no format {form!r} of passages; formats: {', '.join(FORMATS)}")
    if drop and report is None:
        raise ValueError("drop=True counts what it leaves out: give it a report")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of passages")
    entries = _squad(path) if form == "squad" else _lines(path, form, progress)
    return _checked(entries, drop, require_title, Report() if report is None else report)


def _checked(
    entries: Iterator[tuple[str, Callable[[], Passage]]], drop: bool, require_title: bool, report: Report
) -> Iterator[Passage]:
    seen: set[str] = set()
    for where, make in entries:
        try:
            passage = make()
            _check(passage, require_title)
            if passage.id in seen:
                raise _Bad("duplicate id", repr(passage.id))
        except _Bad as bad:
            if not drop:
                raise ValueError(
                    f"{where}: {bad}. Mend the file, or leave such passages out, counted, with drop=True"
                ) from None
            report.dropped[bad.reason] += 1
            report.first.setdefault(bad.reason, where)
            continue
        seen.add(passage.id)
        report.read += 1
        yield passage


def _check(passage: Passage, require_title: bool) -> None:
    if not passage.id.strip():
        raise _Bad("missing id")
    if not passage.text.strip():
        raise _Bad("empty passage", f"id {passage.id!r}")
    if require_title and not passage.title.strip():
        raise _Bad("missing title", f"id {passage.id!r}; require_title=False allows it")
    try:
        f"{passage.id}{passage.title}{passage.text}".encode()
    except UnicodeEncodeError as error:
        raise _Bad("undecodable text", f"id {passage.id!r}: {error.reason}") from None


def _lines(path: Path, form: str, progress: bool) -> Iterator[tuple[str, Callable[[], Passage]]]:
    parse = {"jsonl": _parse_json, "dpr": _parse_dpr, "kilt": _parse_kilt}[form]
    with open_bytes(path) as stream:
        lines = track_lines(stream, path) if progress else stream
        for number, raw in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            raw = (raw.removeprefix(_BOM) if number == 1 else raw).rstrip(b"\r\n")
            if form == "dpr" and number == 1:
                if raw.split(b"\t") != [b"id", b"text", b"title"]:
                    raise ValueError(f"{where}: DPR's files begin with a header: id, text, title, tabs between them")
            elif raw.strip():
                yield where, lambda raw=raw: parse(_decode(raw))


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Bad("undecodable bytes", f"{error.reason} at byte {error.start}") from None


def _parse_json(text: str) -> Passage:
    try:
        entry = json.loads(text)
    except ValueError as error:
        raise _Bad("not JSON", str(error)) from None
    if not isinstance(entry, dict):
        raise _Bad("no object", type(entry).__name__)
    id = next((entry[name] for name in ("id", "_id") if name in entry), None)
    if isinstance(id, bool) or not isinstance(id, (str, int)):
        raise _Bad("missing id", "field 'id' or '_id' is a text or a whole number")
    title, body = entry.get("title", ""), entry.get("text")
    if body is None and isinstance(entry.get("contents"), str):
        body = entry["contents"]
        if not title and "\n" in body:
            head, _, body = body.partition("\n")
            title = head.strip().strip('"')
    if not isinstance(title, str) or not isinstance(body, str):
        raise _Bad("missing text", "fields 'title' and 'text', or 'contents', are texts")
    return Passage(str(id), title, body)


def _parse_dpr(text: str) -> Passage:
    cells = text.split("\t")
    if len(cells) != 3:
        raise _Bad("wrong columns", f"{len(cells)}, not 3")
    id, body, title = (c[1:-1].replace('""', '"') if c[:1] == c[-1:] == '"' and len(c) > 1 else c for c in cells)
    return Passage(id, title, body)


def _parse_kilt(text: str) -> Passage:
    id, tab, rest = text.partition("\t")
    title, gap, body = rest.partition("   ")
    if not tab:
        raise _Bad("wrong columns", "no tab behind the id")
    return Passage(id, title, body) if gap else Passage(id, "", rest)


def _squad(path: Path) -> Iterator[tuple[str, Callable[[], Passage]]]:
    for a, article in enumerate(_list(_load(path), "data", str(path))):
        for p, paragraph in enumerate(_list(article, "paragraphs", f"{path}: data[{a}]")):
            where = f"{path}: data[{a}].paragraphs[{p}]"
            yield where, lambda id=f"{a}.{p}", a=article, p=paragraph: _paragraph(id, a, p)


def _paragraph(id: str, article: dict, paragraph: Any) -> Passage:
    title, text = article.get("title", ""), paragraph.get("context") if isinstance(paragraph, dict) else None
    if not isinstance(title, str) or not isinstance(text, str):
        raise _Bad("missing text", "fields 'title' and 'context' are texts")
    return Passage(id, title.replace("_", " "), text)


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def _list(entry: Any, field: str, where: str) -> list:
    if not isinstance(entry, dict) or not isinstance(entry.get(field), list):
        raise ValueError(f"{where}: field {field!r} is missing or not a list")
    return entry[field]


def split_article(text: str | Sequence[str], words: int = 100) -> list[str]:
    """An article (its text or its paragraphs) as consecutive windows of ``words`` words, without overlap and without
    care for sentences, after KILT's marks of lists and sections (R1-Searcher, arXiv 2503.05592, released code)."""
    if words < 1:
        raise ValueError(f"words={words} must be at least 1")
    whole = text if isinstance(text, str) else "\n".join(text)
    pieces = whole.replace("BULLET::::", " ").replace("Section::::", " ").split()
    return [" ".join(pieces[i : i + words]) for i in range(0, len(pieces), words)]


class PassageStore:
    """Passages by number, read from disk as they are asked for: only a map of the files is in memory.

    A folder with passages.jsonl, their places in it, the order of their ids (by code points), and corpus.json with
    their number and hash. ``ranks[i]`` is the place of passage i in that order: ties are broken by it.
    """

    def __init__(self, folder: str | Path):
        """Open a finished store. Raises FileNotFoundError, ValueError for damage or another version."""
        self.folder = Path(folder)
        facts = read_facts(self.folder / "corpus.json", "passage store", _VERSION)
        self.hash, self._size = facts["hash"], facts["passages"]
        self._offsets = np.load(self.folder / "offsets.npy", mmap_mode="r")
        self.order = np.load(self.folder / "order.npy", mmap_mode="r")
        self.ranks = np.load(self.folder / "ranks.npy", mmap_mode="r")
        path = self.folder / "passages.jsonl"
        if path.stat().st_size != self._offsets[-1] or len(self._offsets) != self._size + 1:
            raise ValueError(f"{path} is not as long as when it was written; build the store again")
        with path.open("rb") as stream:
            self._bytes = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, number: int) -> Passage:
        if not 0 <= number < self._size:
            raise IndexError(f"passage {number} of {self._size}")
        id, title, text, url = json.loads(self._bytes[self._offsets[number] : self._offsets[number + 1]])
        return Passage(id, title, text, url=url)

    def __iter__(self) -> Iterator[Passage]:
        return (self[i] for i in range(self._size))

    def hits(self, rows: Sequence[int], scores: Sequence[float]) -> tuple[Passage, ...]:
        """The passages ``rows`` with their scores."""
        return tuple(dataclasses.replace(self[int(r)], score=float(s)) for r, s in zip(rows, scores, strict=True))

    def verify(self) -> None:
        """Read everything and compare with the hash. Raises ValueError."""
        digest = hashlib.sha256()
        for start in range(0, len(self._bytes), 1 << 20):
            digest.update(self._bytes[start : start + (1 << 20)])
        if digest.hexdigest()[:32] != self.hash:
            raise ValueError(f"{self.folder}/passages.jsonl is not what was written; build the store again")


def build_store(passages: Iterable[Passage], folder: str | Path, *, progress: bool = False) -> PassageStore:
    """Write a store; the folder appears when it is whole. Raises ValueError for no passages or an id used twice,
    FileExistsError for a folder that is there."""
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: open it with PassageStore, or name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write_store(track(passages, "passages") if progress else passages, temporary)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return PassageStore(folder)


def _write_store(passages: Iterable[Passage], folder: Path) -> None:
    ids: list[str] = []
    lengths: list[int] = []
    digest = hashlib.sha256()
    with (folder / "passages.jsonl").open("wb") as stream:
        for p in passages:
            line = json.dumps([p.id, p.title, p.text, p.url], ensure_ascii=False).encode() + b"\n"
            stream.write(line)
            digest.update(line)
            ids.append(p.id)
            lengths.append(len(line))
    if not ids:
        raise ValueError("the corpus is empty: there is no passage to index")
    order = np.asarray(sorted(range(len(ids)), key=ids.__getitem__), np.int64)
    for before, after in itertools.pairwise(order):
        if ids[before] == ids[after]:
            raise ValueError(f"passages {before} and {after} have the same id {ids[after]!r}; ids must be distinct")
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order))
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
    np.save(folder / "order.npy", order)
    np.save(folder / "ranks.npy", ranks)
    facts = {"format": "passage store", "version": _VERSION, "passages": len(ids), "hash": digest.hexdigest()[:32]}
    write_atomic(folder / "corpus.json", json.dumps(facts, indent=1) + "\n")


def read_facts(path: Path, form: str, version: int) -> dict[str, Any]:
    """The small JSON that every index has beside it. Raises FileNotFoundError, ValueError for another format, another
    version or damage."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {path.parent} is no finished {form}; build it first")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        found = facts["format"], facts["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); build the {form} again") from error
    if found != (form, version):
        raise ValueError(f"{path} is {found[0]!r}, version {found[1]}, not {form!r}, version {version}; build it again")
    return facts
