"""Interactions: the one form every source of user-item events is brought to, and what is done before a split.

Ids are integers in order of first appearance, from 1 (feature files are read before events); 0 is padding.
Filters keep that order and close the gaps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

PAD = "[PAD]"


@dataclass(frozen=True, eq=False)
class Interactions:
    """Events in file order, with the names behind the ids.

    users int32 [M] in 1..U; items int32 [M] in 1..N; times int64 [M] in the unit of the file (seconds for MovieLens,
    milliseconds for Amazon 2023); ratings float32 [M] or None; user_tokens str [U+1] and item_tokens str [N+1], row 0
    ``[PAD]``; titles and categories tuples of N+1 strings, "" where the source has none; report: counts of what
    was left out.
    Raises ValueError on shapes that do not fit together and IndexError on an id out of range.
    """

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray
    ratings: np.ndarray | None
    user_tokens: np.ndarray
    item_tokens: np.ndarray
    titles: tuple[str, ...]
    categories: tuple[str, ...]
    report: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        events = len(self.users)
        for name, kind in (("users", np.int32), ("items", np.int32), ("times", np.int64), ("ratings", np.float32)):
            array = getattr(self, name)
            if array is None and name == "ratings":
                continue
            if array.shape != (events,) or array.dtype != kind:
                raise ValueError(
                    f"interactions.{name}: expected {np.dtype(kind)} [{events}], got {array.dtype} {list(array.shape)}"
                )
        for name, ids, count in (("users", self.users, self.num_users), ("items", self.items, self.num_items)):
            outside = np.flatnonzero((ids < 1) | (ids > count))
            if len(outside):
                raise IndexError(
                    f"interactions.{name}: id {ids[outside[0]]} of event {outside[0]} is not in 1..{count}"
                )
        for name in ("titles", "categories"):
            if len(getattr(self, name)) != self.num_items + 1:
                raise ValueError(
                    f"interactions.{name}: {len(getattr(self, name))} rows for {self.num_items} items + padding"
                )

    def __len__(self) -> int:
        return len(self.users)

    @property
    def num_users(self) -> int:
        return len(self.user_tokens) - 1

    @property
    def num_items(self) -> int:
        return len(self.item_tokens) - 1

    def user_index(self) -> dict[str, int]:
        """Token of a user in the source -> id."""
        return {token: i for i, token in enumerate(self.user_tokens.tolist()) if i}

    def item_index(self) -> dict[str, int]:
        """Token of an item in the source -> id."""
        return {token: i for i, token in enumerate(self.item_tokens.tolist()) if i}


def keep_events(inter: Interactions, keep: np.ndarray, reason: str, report: Mapping[str, int]) -> Interactions:
    """Keep the events where ``keep`` (bool [M]); ids without an event go, the rest move up in order.

    reason names the step in the error raised when nothing is left; report is added to the interactions' own report.
    """
    if not keep.any():
        raise ValueError(f"no interactions left after {reason}")
    users, items = inter.users[keep], inter.items[keep]
    user_kept, item_kept = np.bincount(users) > 0, np.bincount(items) > 0
    user_map = np.cumsum(user_kept, dtype=np.int32)
    item_map = np.cumsum(item_kept, dtype=np.int32)
    rows = [0, *np.flatnonzero(item_kept).tolist()]
    return Interactions(
        users=user_map[users],
        items=item_map[items],
        times=inter.times[keep],
        ratings=None if inter.ratings is None else inter.ratings[keep],
        user_tokens=inter.user_tokens[[0, *np.flatnonzero(user_kept).tolist()]],
        item_tokens=inter.item_tokens[rows],
        titles=tuple(inter.titles[i] for i in rows),
        categories=tuple(inter.categories[i] for i in rows),
        report={**inter.report, **report},
    )


def drop_unused(inter: Interactions) -> Interactions:
    """Remove users and items that have no event (a feature file may list more than was ever touched)."""
    kept = keep_events(inter, np.ones(len(inter), bool), "removing unused ids", {})
    unused = {"unused_users": inter.num_users - kept.num_users, "unused_items": inter.num_items - kept.num_items}
    return replace(kept, report={**inter.report, **unused})


def drop_duplicates(inter: Interactions, keep: str = "first") -> Interactions:
    """Keep one event per (user, item): the first or the last in time, file order deciding ties."""
    if keep not in ("first", "last"):
        raise ValueError(f"keep={keep!r}: choose 'first' or 'last'")
    pair = inter.users.astype(np.int64) * (inter.num_items + 1) + inter.items
    order = np.argsort(inter.times, kind="stable")
    if keep == "last":
        order = order[::-1]
    _, index = np.unique(pair[order], return_index=True)  # index of the first occurrence
    mask = np.zeros(len(inter), bool)
    mask[order[index]] = True
    return keep_events(inter, mask, "removing duplicates", {"duplicate_pairs": int((~mask).sum())})


def filter_rating(inter: Interactions, minimum: float) -> Interactions:
    """Keep events rated at least ``minimum``. Raises ValueError without ratings or when nothing is left."""
    if inter.ratings is None:
        raise ValueError("filter_rating: these interactions have no ratings; load a source with a rating column")
    keep = inter.ratings >= minimum
    return keep_events(inter, keep, f"keeping ratings >= {minimum}", {"below_minimum_rating": int((~keep).sum())})


def k_core(inter: Interactions, k_user: int, k_item: int) -> Interactions:
    """The largest part in which every user has >= k_user and every item >= k_item events.

    Users and items are judged on the same snapshot, again and again until nothing changes (one pass is not enough).
    Raises ValueError for negative k and when nothing is left.
    """
    if k_user < 0 or k_item < 0:
        raise ValueError(f"k_core: k_user={k_user}, k_item={k_item}; both must be 0 or more")
    index, passes = np.arange(len(inter)), 0
    while len(index):
        users, items = inter.users[index], inter.items[index]
        enough = (np.bincount(users)[users] >= k_user) & (np.bincount(items)[items] >= k_item)
        if enough.all():
            break
        index, passes = index[enough], passes + 1
    keep = np.zeros(len(inter), bool)
    keep[index] = True
    report = {"k_core_events": int((~keep).sum()), "k_core_passes": passes}
    return keep_events(inter, keep, f"the {k_user}/{k_item}-core", report)


def require_titles(inter: Interactions) -> Interactions:
    """Drop events of items without a title; report says how many events and items that were."""
    titled = np.array([bool(title) for title in inter.titles])
    keep = titled[inter.items]
    report = {"events_without_title": int((~keep).sum()), "items_without_title": int((~titled[1:]).sum())}
    return keep_events(inter, keep, "dropping items without a title", report)


def _title_key(title: str) -> str:
    return " ".join(title.casefold().split())


def _repeated(titles: tuple[str, ...]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for i, title in enumerate(titles):
        if title:
            groups.setdefault(_title_key(title), []).append(i)
    return {key: ids for key, ids in groups.items() if len(ids) > 1}


def title_index(inter: Interactions) -> dict[str, int]:
    """Title -> id, for the items that have one.

    Raises ValueError listing the titles that several items share (case and spacing aside), since they are no keys.
    """
    repeated = _repeated(inter.titles)
    if repeated:
        shown = "; ".join(
            f"{inter.titles[ids[0]]!r}: items {', '.join(inter.item_tokens[i] for i in ids)}"
            for ids in list(repeated.values())[:20]
        )
        raise ValueError(f"{len(repeated)} titles belong to several items ({shown}); call disambiguate_titles first")
    return {title: i for i, title in enumerate(inter.titles) if title}


def disambiguate_titles(
    inter: Interactions, name: Callable[[str, str], str] = lambda title, token: f"{title} [{token}]"
) -> Interactions:
    """Make titles unique: every item that repeats an earlier item's title gets ``name(title, its token)``.

    report["titles_disambiguated"] counts them. Raises ValueError listing titles that are still shared afterwards.
    """
    titles = list(inter.titles)
    again = [i for ids in _repeated(inter.titles).values() for i in ids[1:]]
    for i in again:
        titles[i] = name(titles[i], str(inter.item_tokens[i]))
    result = replace(inter, titles=tuple(titles), report={**inter.report, "titles_disambiguated": len(again)})
    title_index(result)
    return result
