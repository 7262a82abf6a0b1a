"""Splits and samples against plain per-user loops and the rules of the specification."""

from __future__ import annotations

import numpy as np
import pytest

from jaxrec.data import Interactions, Split, global_time_split, leave_one_out, ratio_split


def make(sequences: dict[int, list[tuple[int, int]]], users: int, items: int) -> Interactions:
    """sequences: user -> [(time, item)] in file order."""
    rows = [(user, item, time) for user, events in sequences.items() for time, item in events]
    user, item, time = (np.array(column) for column in zip(*rows))
    return Interactions(
        users=user.astype(np.int32),
        items=item.astype(np.int32),
        times=time.astype(np.int64),
        ratings=None,
        user_tokens=np.array(["[PAD]", *(f"u{i}" for i in range(1, users + 1))]),
        item_tokens=np.array(["[PAD]", *(f"i{i}" for i in range(1, items + 1))]),
        titles=("",) * (items + 1),
        categories=("",) * (items + 1),
    )


@pytest.fixture
def short_users() -> Split:
    """Users with 0..5 events."""
    lengths = {2: 1, 3: 2, 4: 3, 5: 4, 6: 5}
    return leave_one_out(make({u: [(t, 10 * u + t) for t in range(n)] for u, n in lengths.items()}, 7, 70))


def rows(split: Split, part: str, max_len: int = 3) -> list[tuple[int, list[int], int]]:
    samples = split.samples(part, max_len)
    assert samples.history.shape == (len(samples), max_len)
    assert (np.count_nonzero(samples.history, axis=1) == samples.lengths).all()
    assert {samples.users.dtype, samples.history.dtype, samples.lengths.dtype, samples.targets.dtype} == {
        np.dtype(np.int32)
    }
    return [
        (int(u), h[:n].tolist(), int(t))
        for u, h, n, t in zip(samples.users, samples.history, samples.lengths, samples.targets)
    ]


def test_short_users_follow_recbole(short_users: Split):
    assert rows(short_users, "train") == [
        (3, [30], 31),
        (4, [40], 41),
        (5, [50], 51),
        (6, [60], 61),
        (6, [60, 61], 62),
    ]
    assert rows(short_users, "valid") == [(5, [50, 51], 52), (6, [60, 61, 62], 63)]
    # The validation item is part of the test history.
    assert rows(short_users, "test") == [(4, [40, 41], 42), (5, [50, 51, 52], 53), (6, [61, 62, 63], 64)]
    assert short_users.report == {"users_without_test": 4, "users_without_valid": 5, "users_without_train_sample": 3}


def test_train_events(short_users: Split):
    users, items, previous = short_users.train_events()
    assert users.tolist() == [2, 3, 3, 4, 4, 5, 5, 6, 6, 6]
    assert items.tolist() == [20, 30, 31, 40, 41, 50, 51, 60, 61, 62]
    assert previous.tolist() == [0, 0, 30, 0, 40, 0, 50, 0, 60, 61]


def test_seen_is_the_whole_history(short_users: Split):
    seen = short_users.seen("test", multiple=4)
    assert seen.tolist() == [[40, 41, 0, 0], [50, 51, 52, 0], [60, 61, 62, 63]]
    assert short_users.seen("test", slice(1, 2), multiple=4).tolist() == [[50, 51, 52, 0]]


def test_windows_cover_every_training_target(short_users: Split):
    items, targets = short_users.train_windows(3, 3)
    assert items.tolist() == [[30, 0, 0], [40, 0, 0], [50, 0, 0], [60, 61, 0]]
    assert targets.tolist() == [[31, 0, 0], [41, 0, 0], [51, 0, 0], [61, 62, 0]]


@pytest.mark.parametrize(("length", "stride"), [(5, 5), (5, 3), (4, 1), (20, 7)])
def test_windows_equal_a_plain_loop(length: int, stride: int, rng: np.random.Generator):
    events = {u: [(t, int(rng.integers(1, 30))) for t in range(int(rng.integers(1, 40)))] for u in range(1, 20)}
    split = leave_one_out(make(events, 20, 30))
    items, targets = split.train_windows(length, stride)
    expected = []
    for sequence in events.values():
        train = [item for _, item in sequence][: len(sequence) - min(2, max(len(sequence) - 2, 0))]
        source, target = train[:-1], train[1:]
        last = max(len(source) - length, 0)
        starts = [] if not source else sorted({*range(0, last, stride), last})
        for start in starts:
            row = source[start : start + length], target[start : start + length]
            expected.append(tuple(part + [0] * (length - len(part)) for part in row))
    assert [(a, b) for a, b in zip(items.tolist(), targets.tolist())] == expected


@pytest.mark.parametrize("stride", [0, 4])
def test_windows_refuse_gaps(short_users: Split, stride: int):
    with pytest.raises(ValueError, match=f"stride={stride}, max_len=3"):
        short_users.train_windows(3, stride)


def test_ties_keep_file_order_and_never_item_order():
    split = leave_one_out(make({1: [(5, 9), (5, 3), (1, 7), (5, 1)], 2: [(2, 4)]}, 2, 9))
    assert split.sequence(1).tolist() == [7, 9, 3, 1]
    with pytest.raises(IndexError, match=r"user id 3 is not in 1\.\.2"):
        split.sequence(3)


def test_far_apart_times_sort_like_near_ones(rng: np.random.Generator):
    times = rng.integers(0, 20, 200)
    events = {u: [(int(t), i + 1) for i, t in enumerate(times)] for u in (1, 2)}
    near = leave_one_out(make(events, 2, 200))
    span = 2**62  # too far apart for the combined sort key
    far = leave_one_out(make({u: [(t * (span // 20), i) for t, i in rows] for u, rows in events.items()}, 2, 200))
    assert near.sequence(2).tolist() == far.sequence(2).tolist()
    assert near.sequence(1).tolist() == [i for _, i in sorted(events[1], key=lambda row: row[0])]


def test_float32_times_change_the_order_on_purpose():
    near = 880_000_000
    inter = make({1: [(near + 30, 1), (near, 2), (near + 100, 3)]}, 1, 3)
    assert leave_one_out(inter).sequence(1).tolist() == [2, 1, 3]
    assert leave_one_out(inter, float32_times=True).sequence(1).tolist() == [1, 2, 3]


def test_samples_refuse_bad_arguments(short_users: Split):
    with pytest.raises(ValueError, match="unknown split 'dev'; choose one of train, valid, test"):
        short_users.samples("dev", 5)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        short_users.events("dev")
    with pytest.raises(ValueError, match="max_len=0"):
        short_users.samples("train", 0)


def test_global_time_split_never_trains_on_the_future():
    inter = make({1: [(0, 1), (10, 2), (20, 3), (21, 4)], 2: [(1, 5), (11, 6)], 3: [(22, 7)]}, 3, 7)
    split = global_time_split(inter, valid_from=10, test_from=20)
    assert rows(split, "valid") == [(1, [1], 2), (2, [5], 6)]
    assert rows(split, "test") == [(1, [1, 2], 3)]
    assert split.report["targets_without_history"] == 1  # user 3
    _, items, _ = split.train_events()
    assert items.tolist() == [1, 5]
    every = global_time_split(inter, valid_from=10, test_from=20, targets="all")
    assert rows(every, "test") == [(1, [1, 2], 3), (1, [1, 2, 3], 4)]


def test_global_time_split_by_fraction_and_its_errors():
    inter = make({1: [(t, 1 + t % 5) for t in range(100)]}, 1, 5)
    split = global_time_split(inter, 0.2, 0.1, targets="all")
    assert [len(split.events(part)[0]) for part in ("train", "valid", "test")] == [70, 20, 10]
    with pytest.raises(ValueError, match="fractions"):
        global_time_split(inter, 0.6, 0.5)
    with pytest.raises(ValueError, match="both valid_from and test_from"):
        global_time_split(inter, valid_from=3)
    with pytest.raises(ValueError, match="not before the test"):
        global_time_split(inter, valid_from=5, test_from=5)
    with pytest.raises(ValueError, match="targets='some'"):
        global_time_split(inter, targets="some")
    with pytest.raises(ValueError, match="no interactions left after the time split for test"):
        global_time_split(inter, valid_from=5, test_from=500)


def test_global_time_split_with_rounded_times_stays_in_order():
    near = 880_000_000
    inter = make({1: [(near + 30, 1), (near, 2), (near - 500, 3), (near + 900, 4)]}, 1, 4)
    split = global_time_split(inter, valid_from=near + 10, test_from=near + 500, float32_times=True, targets="all")
    assert split.sequence(1).tolist() == [3, 1, 2, 4]
    assert split.roles.tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("events", "parts"), [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (10, (8, 1, 1)), (25, (21, 2, 2))]
)
def test_ratio_split_rounds_like_recbole(events: int, parts: tuple[int, int, int]):
    split = ratio_split(make({1: [(t, t + 1) for t in range(events)]}, 1, 30))
    assert tuple(np.bincount(split.roles, minlength=3).tolist()) == parts
    assert sorted(split.items.tolist()) == list(range(1, events + 1))


def test_ratio_split_orders():
    inter = make({1: [(t, t + 1) for t in range(20)]}, 1, 20)
    random = ratio_split(inter, seed=1)
    assert random.items.tolist() != sorted(random.items.tolist())
    assert ratio_split(inter, seed=1).items.tolist() == random.items.tolist()
    for call in (lambda: random.samples("train", 5), lambda: random.train_windows(5, 5)):
        with pytest.raises(ValueError, match="needs events in time order"):
            call()
    assert random.train_events()[2].sum() == 0
    assert rows(ratio_split(inter, order="time"), "test", 2) == [(1, [17, 18], 19), (1, [18, 19], 20)]
    with pytest.raises(ValueError, match="unknown order 'alphabetical'"):
        ratio_split(inter, order="alphabetical")
    with pytest.raises(ValueError, match="three shares"):
        ratio_split(inter, (0.5, 0.1, 0.1))
