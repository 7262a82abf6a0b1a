"""The embedded world: deterministic bytes, honest labels, no leak."""

import dataclasses
import hashlib
import time

import numpy as np
import pytest

from jaxrec.data.interactions import k_core
from jaxrec.data.splits import leave_one_out
from jaxrec.world import INTENT, NOISE, RULES, TASTE, WorldConfig, generate, world_config
from jaxrec.world.interactions import event_kinds, to_interactions


def digest(world) -> str:
    state = hashlib.sha256("|".join(world.titles).encode())
    for array in (*world.attributes.values(), world.users, world.items, world.times, world.kind, world.rule):
        state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()[:16]


@pytest.fixture(scope="module")
def world():
    return generate(world_config("demo", users=600, items=480, intent_share=0.7))


def test_same_seed_same_bytes():
    one, two, other = (generate(world_config("tiny", seed=s)) for s in (0, 0, 1))
    assert digest(one) == digest(two) != digest(other)
    # Written down once: integer draws from PCG64 are the same on every machine and Python.
    assert digest(one) == "1d627170da4f3213"


def test_no_user_meets_an_item_twice_and_time_goes_on(world):
    pair = world.users.astype(np.int64) * 10_000 + world.items
    assert len(np.unique(pair)) == len(pair)
    same = world.users[1:] == world.users[:-1]
    assert (np.diff(world.times)[same] > 0).all()
    assert world.items.min() >= 1
    assert world.items.max() <= world.num_items


def test_intent_events_obey_their_rule(world):
    first = np.searchsorted(world.users, world.users, "left")
    checked = 0
    for number, rule in enumerate(RULES):
        events = np.flatnonzero((world.kind == INTENT) & (world.rule == number))
        checked += len(events)
        for attribute, offset, shift in rule:
            assert (events - offset >= first[events]).all()
            values = world.attributes[attribute]
            np.testing.assert_array_equal(
                values[world.items[events]], values[world.items[events - offset]] + shift, f"rule {number}, {attribute}"
            )
    assert checked > 500
    np.testing.assert_array_equal(
        world.attributes["region"][1:], world.place_region[world.maker_place[world.attributes["maker"][1:]]]
    )


def test_intents_can_be_switched_off():
    off = generate(world_config("tiny", intent_share=0.0))
    assert not (off.kind == INTENT).any()
    assert (off.kind == TASTE).any()


def test_shares_follow_their_knobs():
    shares = []
    for intent, noise in ((0.3, 0.1), (0.6, 0.1), (0.6, 0.4)):
        kind = generate(world_config("demo", users=800, intent_share=intent, noise=noise)).kind
        shares.append(np.bincount(kind, minlength=3) / len(kind))
    intents, noises = (np.array(shares)[:, kind] for kind in (INTENT, NOISE))
    # A wish that no unseen item meets becomes another event, so the knob is a bound that rises and falls with it.
    assert intents[0] < 0.3
    assert intents[0] < 0.75 * intents[1]
    assert intents[1] < 0.6
    np.testing.assert_allclose(noises, [0.1, 0.1, 0.4], atol=0.04)


def test_drift_changes_rules():
    fixed, moving = (generate(world_config("tiny", drift=drift)) for drift in (0.0, 1.0))
    for world, changes in ((fixed, False), (moving, True)):
        same_user = world.users[1:] == world.users[:-1]
        assert (np.diff(world.rule)[same_user] != 0).any() == changes


def test_the_demo_takes_seconds():
    start = time.process_time()
    generate(world_config("demo"))
    assert time.process_time() - start < 3


def test_every_item_of_a_large_catalogue_can_be_chosen():
    world = generate(world_config("tiny", items=20_000, users=2000, intent_share=0.0))
    assert len(np.unique(world.items)) > 7000  # of some 24000 events; a third of these come from the popular few


def test_held_out_events_do_not_leak_and_keep_their_labels(world):
    inter = to_interactions(world)
    split = leave_one_out(inter)
    kinds = event_kinds(world, split, "test")
    samples = split.samples("test", 20)
    last = np.flatnonzero(np.append(world.users[1:] != world.users[:-1], True))
    np.testing.assert_array_equal(samples.targets, world.items[last])
    np.testing.assert_array_equal(kinds, world.kind[last])
    code = lambda users, items: users.astype(np.int64) * 10_000 + items  # noqa: E731
    train = split.samples("train", 20)
    users, items, _ = split.train_events()
    for part in ("valid", "test"):
        held_out = split.samples(part, 20)
        kinds = event_kinds(world, split, part)
        assert len(kinds) == len(held_out)
        secret = code(held_out.users, held_out.targets)
        assert not np.isin(secret, code(users, items)).any()
        assert not np.isin(secret, code(train.users, train.targets)).any()
        seen = code(train.users[:, None], train.history)[train.history > 0]
        assert not np.isin(secret, seen).any()
        where = np.flatnonzero(np.isin(code(world.users, world.items), secret))
        np.testing.assert_array_equal(kinds, world.kind[where])


def test_labels_need_all_events(world):
    inter = to_interactions(world)
    with pytest.raises(ValueError, match="leave a labelled world whole"):
        event_kinds(world, leave_one_out(k_core(inter, 0, 60)), "test")


def test_titles_are_unique_at_every_size():
    for items in (64, 7000):
        titles = generate(WorldConfig(items=items, users=20, makers=30)).titles[1:]
        assert len({title.casefold() for title in titles}) == items
    for items in (90, 300, 2500):
        titles = generate(WorldConfig(items=items, users=20, title_words=10)).titles[1:]
        assert len(set(titles)) == items
        assert len({word for title in titles for word in title.split() if not word.isdigit()}) <= 20


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"intent_share": 1.5}, "between 0 and 1"),
        ({"items": 10}, "too few"),
        ({"events": (1, 2)}, "fewest"),
        ({"rules": ((("colour", 1, 0),),)}, "bad part"),
        ({"rules": ((("maker", 14, 0),),)}, "looks back"),
        ({"rules": ((),)}, "looks back"),
        ({"makers": 0}, r"world.makers=0 must lie between 1 and 4608"),
        ({"genres": 13}, "between 1 and 12"),
        ({"users": 0}, "world.users"),
        ({"seed": -1}, "world.seed"),
        ({"noise": -0.1}, "world.noise"),
        ({"title_words": 81}, "world.title_words=81 must lie between 1 and 80"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(WorldConfig(), **knobs)


def test_unknown_scale():
    with pytest.raises(ValueError, match="tiny, demo, full, talk, huge"):
        world_config("enormous")
