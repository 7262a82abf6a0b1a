"""Filters, k-core as a fixed point, duplicates and unique titles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jaxrec.data import (
    Interactions,
    disambiguate_titles,
    drop_duplicates,
    drop_unused,
    filter_rating,
    k_core,
    require_titles,
    title_index,
)


def make(
    pairs: list[tuple[int, int]],
    users: int,
    items: int,
    times: list[int] | None = None,
    ratings: list[float] | None = None,
    titles: tuple[str, ...] | None = None,
) -> Interactions:
    return Interactions(
        users=np.array([u for u, _ in pairs], np.int32),
        items=np.array([i for _, i in pairs], np.int32),
        times=np.array(times if times is not None else range(len(pairs)), np.int64),
        ratings=None if ratings is None else np.array(ratings, np.float32),
        user_tokens=np.array(["[PAD]", *(f"u{i}" for i in range(1, users + 1))]),
        item_tokens=np.array(["[PAD]", *(f"i{i}" for i in range(1, items + 1))]),
        titles=titles or ("",) * (items + 1),
        categories=("",) * (items + 1),
    )


def named(inter: Interactions) -> list[tuple[str, str]]:
    return list(zip(inter.user_tokens[inter.users].tolist(), inter.item_tokens[inter.items].tolist()))


def test_k_core_is_a_fixed_point():
    # The chain of the specification: d goes, then item 3, then c.
    inter = make([(1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (3, 3), (4, 3)], users=4, items=3)
    core = k_core(inter, 2, 2)
    assert named(core) == [("u1", "i1"), ("u1", "i2"), ("u2", "i1"), ("u2", "i2")]
    assert (core.num_users, core.num_items) == (2, 2)
    assert core.report["k_core_events"] == 3
    assert core.report["k_core_passes"] == 3


def test_k_core_matches_a_plain_loop(rng: np.random.Generator):
    pairs = [(int(u), int(i)) for u, i in zip(rng.integers(1, 40, 400), rng.integers(1, 50, 400))]
    left = pairs
    while True:
        users, items = [u for u, _ in left], [i for _, i in left]
        kept = [(u, i) for u, i in left if users.count(u) >= 7 and items.count(i) >= 6]
        if kept == left:
            break
        left = kept
    core = k_core(make(pairs, 39, 49), 7, 6)
    assert core.report["k_core_passes"] > 2
    assert named(core) == [(f"u{u}", f"i{i}") for u, i in left]


def test_filters_that_leave_nothing_and_bad_arguments():
    inter = make([(1, 1), (2, 2)], 2, 2, ratings=[1, 2])
    with pytest.raises(ValueError, match="no interactions left after the 2/2-core"):
        k_core(inter, 2, 2)
    with pytest.raises(ValueError, match="no interactions left after keeping ratings >= 3"):
        filter_rating(inter, 3)
    with pytest.raises(ValueError, match="have no ratings"):
        filter_rating(make([(1, 1)], 1, 1), 3)
    with pytest.raises(ValueError, match="k_user=-1"):
        k_core(inter, -1, 2)


def test_filter_rating_drops_orphans_and_keeps_order():
    inter = make([(1, 3), (2, 1), (2, 2), (3, 3)], 3, 4, ratings=[1, 4, 3, 5], titles=("", "A", "B", "C", "D"))
    kept = filter_rating(inter, 3)
    assert named(kept) == [("u2", "i1"), ("u2", "i2"), ("u3", "i3")]
    assert kept.item_tokens.tolist() == ["[PAD]", "i1", "i2", "i3"]
    assert kept.titles == ("", "A", "B", "C")
    assert kept.report == {"below_minimum_rating": 1}
    assert kept.ratings.tolist() == [4, 3, 5]


def test_drop_unused_counts():
    kept = drop_unused(make([(2, 3)], 3, 4))
    assert named(kept) == [("u2", "i3")]
    assert kept.report == {"unused_users": 2, "unused_items": 3}


@pytest.mark.parametrize(("keep", "times"), [("first", [5, 1]), ("last", [9, 1])])
def test_drop_duplicates_by_time(keep: str, times: list[int]):
    inter = make([(1, 1), (1, 1), (1, 2), (1, 1)], 1, 2, times=[9, 5, 1, 5])
    kept = drop_duplicates(inter, keep)
    assert sorted(kept.times.tolist()) == sorted(times)
    assert kept.report["duplicate_pairs"] == 2
    with pytest.raises(ValueError, match="keep='newest'"):
        drop_duplicates(inter, "newest")


def test_require_titles():
    kept = require_titles(make([(1, 1), (1, 2)], 1, 2, titles=("", "A", "")))
    assert named(kept) == [("u1", "i1")]
    assert kept.report == {"events_without_title": 1, "items_without_title": 1}


def test_shared_titles_are_an_error_until_made_unique():
    inter = make([(1, 1), (1, 2), (1, 3), (1, 4)], 1, 4, titles=("", "Evita (1996)", "evita  (1996)", "B", ""))
    with pytest.raises(ValueError, match=r"'Evita \(1996\)': items i1, i2.*disambiguate_titles"):
        title_index(inter)
    unique = disambiguate_titles(inter)
    assert unique.titles == ("", "Evita (1996)", "evita  (1996) [i2]", "B", "")
    assert unique.report["titles_disambiguated"] == 1
    assert title_index(unique) == {"Evita (1996)": 1, "evita  (1996) [i2]": 2, "B": 3}


def test_titles_that_stay_shared_are_listed():
    inter = make([(1, 1), (1, 2), (1, 3)], 1, 3, titles=("", "A", "A", "A [i2]"))
    with pytest.raises(ValueError, match=r"'A \[i2\]': items i2, i3"):
        disambiguate_titles(inter)


def test_inconsistent_interactions_are_refused():
    inter = make([(1, 1), (2, 2)], 2, 2)
    with pytest.raises(IndexError, match=r"items: id 3 of event 1 is not in 1..2"):
        replace(inter, items=np.array([1, 3], np.int32))
    with pytest.raises(IndexError, match=r"users: id 0 of event 0"):
        replace(inter, users=np.array([0, 1], np.int32))
    with pytest.raises(ValueError, match=r"times: expected int64 \[2\], got float32 \[2\]"):
        replace(inter, times=np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="titles: 1 rows for 2 items"):
        replace(inter, titles=("",))
