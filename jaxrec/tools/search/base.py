"""One protocol for every search tool: a batch of queries in, one typed result per query out.

A backend has ``id`` (what its results depend on: index, settings) and ``search(queries, k)``; its bound method is the
plain callable that an environment is handed. A search that failed is no empty result: it carries a kind and a message,
and has no passages at all (None), so that iterating over them is an error too.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

KINDS = ("timeout", "auth", "quota", "bad_query", "unavailable")

Search = Callable[[Sequence[str], int], "list[Result]"]


@dataclasses.dataclass(frozen=True)
class Passage:
    """``score``: higher is better, comparable within one result only. ``url`` is empty for local corpora."""

    id: str
    title: str
    text: str
    score: float = 0.0
    url: str = ""


@dataclasses.dataclass(frozen=True)
class Result:
    """Passages, best first (an empty tuple: searched, nothing found), or a failure of one of :data:`KINDS`.

    failed_pages: of a live search, pages that could not be read; their snippets stand in. Raises ValueError for
    passages beside a failure, or neither.
    """

    passages: tuple[Passage, ...] | None
    error: str = ""
    kind: str = ""
    failed_pages: int = 0

    def __post_init__(self):
        if self.passages is None and (self.kind not in KINDS or not self.error):
            raise ValueError(f"a failed search has a message and a kind ({', '.join(KINDS)}), not {self.kind!r}")
        if self.passages is not None and (self.kind or self.error):
            raise ValueError("a result has passages or a failure, not both")

    @property
    def failed(self) -> bool:
        return self.passages is None


class Backend(Protocol):
    """What answers queries. ``id`` names index and settings: results under one id and k are functions of the query."""

    id: str

    def search(self, queries: Sequence[str], k: int) -> list[Result]:
        """One result per query, in order. Failures of single queries are results; ValueError is for the caller's
        mistakes (k, types)."""
        ...


def failure(kind: str, error: str) -> Result:
    """A failed search."""
    return Result(None, error or kind, kind)


def normalize_query(query: str) -> str:
    """NFC, whitespace collapsed. Case is kept: some backends mind it."""
    return " ".join(unicodedata.normalize("NFC", query).split())


def check_request(queries: Sequence[str], k: int, size: int | None = None) -> None:
    """Raises TypeError for a single string or queries that are no texts, ValueError for a k that cannot be served.

    size: number of passages in the corpus, where that is known.
    """
    if isinstance(queries, (str, bytes)):
        raise TypeError("search takes a list of queries, got one string")
    for i, query in enumerate(queries):
        if not isinstance(query, str):
            raise TypeError(f"query {i} is {type(query).__name__}, not a text")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k={k!r} must be a whole number of at least 1")
    if size is not None and k > size:
        raise ValueError(f"k={k} is larger than the corpus ({size} passages); ask for fewer passages")


def answer_valid(queries: Sequence[str], answer: Callable[[list[str]], list[Result]]) -> list[Result]:
    """Results of ``answer`` for the queries that hold a word, and a ``bad_query`` failure for each of the others."""
    asked = [i for i, query in enumerate(queries) if query.strip()]
    results = [failure("bad_query", "the query is empty")] * len(queries)
    if asked:
        for i, result in zip(asked, answer([queries[i] for i in asked]), strict=True):
            results[i] = result
    return results


def to_json(result: Result) -> dict[str, Any]:
    """A result that did not fail, as JSON knows it."""
    if result.passages is None:
        raise ValueError("a failed search is not stored")
    return {"passages": [dataclasses.astuple(p) for p in result.passages], "failed_pages": result.failed_pages}


def from_json(record: Mapping[str, Any]) -> Result:
    """The inverse of :func:`to_json`. Raises ValueError, KeyError or TypeError for anything else."""
    passages = []
    for id, title, text, score, url in record["passages"]:
        if not all(isinstance(field, str) for field in (id, title, text, url)):
            raise TypeError("a passage's id, title, text and url are texts")
        passages.append(Passage(id, title, text, float(score), url))
    return Result(tuple(passages), failed_pages=int(record["failed_pages"]))


def one_line(text: str) -> str:
    """Whitespace collapsed, other control characters and lone surrogates removed."""
    return " ".join(re.sub(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]", "", text).split())
