"""From parsed columns to ``Interactions``: the steps every source shares."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from jaxrec.data.delimited import Vocabulary
from jaxrec.data.interactions import Interactions


@dataclass(frozen=True)
class Columns:
    """Parsed events: user and item tokens bytes ``S`` [m], times int64 [m], ratings float64 [m] or None."""

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    ratings: np.ndarray | None


@dataclass
class ItemTexts:
    """Titles and categories of items by token, in the order of the feature file."""

    titles: dict[bytes, str] = field(default_factory=dict)
    categories: dict[bytes, str] = field(default_factory=dict)

    def add(self, token: bytes, title: str, categories: str, where: str) -> None:
        """Raises ValueError when the token was described before."""
        if token in self.titles:
            raise ValueError(f"{where}: item {token.decode()!r} is described a second time")
        self.titles[token] = title
        self.categories[token] = categories


def with_year(title: str, year: str) -> str:
    """``Name (year)``; a title that ends with the year in brackets, or a year that is no number, changes nothing."""
    title, year = title.strip(), year.strip()
    if not title or not year.isdigit() or title.endswith(f"({year})"):
        return title
    return f"{title} ({year})"


def assemble(
    source: str,
    blocks: Iterable[Columns],
    *,
    texts: ItemTexts | None = None,
    extra_users: Iterable[bytes] = (),
    whole_catalogue: bool = True,
    report: dict[str, int] | None = None,
) -> Interactions:
    """Drop rows with missing ids (counted), number users and items by first appearance, attach texts.

    Feature files come first, then events: ids then follow the catalogue's own order, whatever the order of events, and
    the tie rule of full ranking (smaller id first) gives the same numbers for every form of one collection. With
    whole_catalogue False, items that are described but have no event get no id; report["items_without_events"] counts
    them.
    Raises ValueError "no interactions left after ..." when no row is usable.
    """
    texts = texts or ItemTexts()
    users, items = Vocabulary(), Vocabulary()
    users.add(list(dict.fromkeys(extra_users)))
    if whole_catalogue:
        items.add(list(texts.titles))
    dropped = {"missing_user_id": 0, "missing_item_id": 0}
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]] = []
    for block in blocks:
        no_user, no_item = block.users == b"", block.items == b""
        dropped["missing_user_id"] += int(no_user.sum())
        dropped["missing_item_id"] += int((no_item & ~no_user).sum())
        keep = ~(no_user | no_item)
        ratings = None if block.ratings is None else block.ratings[keep].astype(np.float32)
        parts.append((users.add(block.users[keep]), items.add(block.items[keep]), block.times[keep], ratings))
    if not sum(len(part[0]) for part in parts):
        raise ValueError(f"{source}: no interactions left after dropping rows with missing ids ({dropped})")
    dropped = {**(report or {}), **dropped}
    if not whole_catalogue:
        dropped["items_without_events"] = sum(items.get(token) == 0 for token in texts.titles)
    titles, categories = [""] * (len(items) + 1), [""] * (len(items) + 1)
    for token, title in texts.titles.items():
        if item := items.get(token):
            titles[item], categories[item] = title, texts.categories[token]
    rated = parts[0][3] is not None
    return Interactions(
        users=np.concatenate([part[0] for part in parts]),
        items=np.concatenate([part[1] for part in parts]),
        times=np.concatenate([part[2] for part in parts]),
        ratings=np.concatenate([part[3] for part in parts if part[3] is not None]) if rated else None,
        user_tokens=users.tokens(),
        item_tokens=items.tokens(),
        titles=tuple(titles),
        categories=tuple(categories),
        report=dropped,
    )


def flushed(rows: Iterable[tuple[bytes, bytes, int, float]], size: int = 1 << 18) -> Iterator[Columns]:
    """Gather rows that arrive one by one (JSON lines) into columns."""
    chunk: list[tuple[bytes, bytes, int, float]] = []

    def columns() -> Columns:
        users, items, times, ratings = zip(*chunk, strict=True)
        return Columns(np.array(users), np.array(items), np.array(times, np.int64), np.array(ratings, np.float64))

    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield columns()
            chunk.clear()
    if chunk:
        yield columns()
