"""Splits of interactions into training, validation and test, and the samples models are trained and judged on.

Events are sorted by (user, time) with a stable sort, so that file order decides ties: sorting ties by item id would
make part of every sequence predictable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from jaxrec.data.interactions import Interactions

SPLITS = ("train", "valid", "test")
_CONTEXT_ONLY = 3  # an event that is history for later targets but a target of no split
_CHUNK = 1 << 15


@dataclass(frozen=True, eq=False)
class Samples:
    """Next-item samples: users int32 [n]; history int32 [n, L], oldest first, right-padded with 0; lengths int32 [n]
    (>= 1); targets int32 [n]."""

    users: np.ndarray
    history: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def arrays(self) -> dict[str, np.ndarray]:
        """The four arrays by name, as ``batches`` takes them."""
        return {name: getattr(self, name) for name in ("users", "history", "lengths", "targets")}


@dataclass(frozen=True, eq=False)
class Split:
    """Events grouped by user, each with its part.

    items int32 [M] and times int64 [M], user after user; offsets int64 [U+2]: user u owns offsets[u]..offsets[u+1];
    roles int8 [M]: 0 train, 1 valid, 2 test, 3 context only; order "time" or "random"; report: users without samples.
    """

    items: np.ndarray
    times: np.ndarray
    offsets: np.ndarray
    roles: np.ndarray
    num_items: int
    order: str
    protocol: str
    report: dict[str, int] = field(default_factory=dict)

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 2

    @property
    def event_users(self) -> np.ndarray:
        """User of every event, int32 [M]."""
        return np.repeat(np.arange(self.num_users + 1, dtype=np.int32), np.diff(self.offsets))

    def sequence(self, user: int) -> np.ndarray:
        """All items of one user in order, int32 [n]. Raises IndexError naming an unknown id."""
        if not 1 <= user <= self.num_users:
            raise IndexError(f"user id {user} is not in 1..{self.num_users}")
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def _require_time_order(self) -> None:
        if self.order != "time":
            raise ValueError(
                f"a sequential model needs events in time order, but this split ({self.protocol}) is in {self.order} "
                "order; use leave_one_out, global_time_split or order='time'"
            )

    def target_events(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """(positions int64 [n] of the targets with a history, their users int32 [n])."""
        self._require_time_order()
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
        return self._held_out[split] if split in self._held_out else self._find_targets(split)

    def _find_targets(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        position = np.flatnonzero(self.roles == SPLITS.index(split))
        users = np.searchsorted(self.offsets, position, side="right") - 1
        with_history = position > self.offsets[users]
        return position[with_history], users[with_history].astype(np.int32)

    @cached_property
    def _held_out(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        # Evaluation asks for these once per batch; the targets of training are too many to keep.
        return {split: self._find_targets(split) for split in SPLITS[1:]}

    def samples(self, split: str, max_len: int) -> Samples:
        """One sample per target of ``split``, with the last ``max_len`` earlier items of the same user as history.

        For "train" this is the prefix form: every training item but a user's first is a target once. The history of a
        test target contains the validation item. Raises ValueError for an unknown split, max_len < 1, random order.
        """
        if max_len < 1:
            raise ValueError(f"max_len={max_len}: a history needs at least 1 item")
        position, users = self.target_events(split)
        start = np.maximum(self.offsets[users], position - max_len)
        lengths = (position - start).astype(np.int32)
        history = np.zeros((len(position), max_len), np.int32)
        column = np.arange(max_len)
        for low in range(0, len(position), _CHUNK):  # bounds the int64 index matrix
            part = slice(low, low + _CHUNK)
            inside = column < lengths[part, None]
            history[part] = np.where(inside, self.items[np.where(inside, start[part, None] + column, 0)], 0)
        return Samples(users=users, history=history, lengths=lengths, targets=self.items[position])

    def seen(self, split: str, rows: slice | np.ndarray | None = None, multiple: int = 64) -> np.ndarray:
        """Whole histories of the samples of ``split`` (all, or some ``rows``), int32 [n, E], right-padded with 0.

        E is the longest of them rounded up to ``multiple``, so that few shapes reach the compiler. Rows are in the
        order of ``samples``. Use it to exclude history from the candidates: a truncated history would leave items in.
        """
        position, users = self.target_events(split)
        if rows is not None:
            position, users = position[rows], users[rows]
        start = self.offsets[users]
        lengths = position - start
        width = -(-max(int(lengths.max(initial=0)), 1) // multiple) * multiple
        inside = np.arange(width) < lengths[:, None]
        return np.where(inside, self.items[np.where(inside, start[:, None] + np.arange(width), 0)], 0)

    def train_windows(self, max_len: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
        """All-position form: (items int32 [W, L], targets int32 [W, L]), 0 = padding and no target.

        targets[w, j] follows items[w, j] in the user's training events. Windows start every ``stride`` items; the last
        one of a user ends at the last training target, so no target is lost (some occur in two windows).
        Raises ValueError unless 1 <= stride <= max_len.
        """
        self._require_time_order()
        if not 1 <= stride <= max_len:
            raise ValueError(f"train_windows: stride={stride}, max_len={max_len}; need 1 <= stride <= max_len")
        events = np.add.reduceat(np.append(self.roles == 0, False).astype(np.int64), self.offsets[:-1])
        events[np.diff(self.offsets) == 0] = 0  # reduceat yields the next element for an empty range
        inputs = np.maximum(events - 1, 0)
        windows = np.where(inputs > 0, 1 + -(-np.maximum(inputs - max_len, 0) // stride), 0)
        user = np.repeat(np.arange(len(windows)), windows)
        number = np.arange(len(user)) - np.repeat(np.cumsum(windows) - windows, windows)
        begin = np.minimum(number * stride, np.maximum(inputs[user] - max_len, 0))
        length = np.minimum(inputs[user] - begin, max_len)
        position = (self.offsets[user] + begin)[:, None] + np.arange(max_len)
        inside = np.arange(max_len) < length[:, None]
        position = np.where(inside, position, 0)
        items = np.where(inside, self.items[position], 0)
        targets = np.where(inside, self.items[np.where(inside, position + 1, 0)], 0)
        return items, targets

    def train_events(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Training events: (users int32 [m], items int32 [m], previous item of the same user int32 [m], 0 for none).

        Only these may be counted by anything fitted on data. In random order "previous" is 0 throughout.
        """
        users = self.event_users
        previous = np.concatenate([np.zeros(1, np.int32), self.items[:-1]])[: len(self.items)]
        if self.order == "time":
            previous[self.offsets[users] == np.arange(len(users))] = 0
        else:
            previous = np.zeros_like(previous)
        train = self.roles == 0
        return users[train], self.items[train], previous[train]

    def events(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """(users int32 [m], items int32 [m]) of one part, for models that do not look at order."""
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
        here = self.roles == SPLITS.index(split)
        return self.event_users[here], self.items[here]


class LeaveOneOut(Split):
    """Last item of every user for test, the one before for validation. Made by ``leave_one_out``."""


def _grouped(inter: Interactions, key: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(order of events by user and key, stable; offsets [U+2]; position inside the user [M])."""
    order = _stable_order(inter.users, key)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(inter.users, minlength=inter.num_users + 1))]).astype(np.int64)
    users = inter.users[order]
    return order, offsets, np.arange(len(users)) - offsets[users]


def _stable_order(users: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Stable order by (user, key): one sort of a combined integer where it fits 64 bits, several times faster."""
    if np.issubdtype(key.dtype, np.integer):
        low, high = int(key.min()), int(key.max())
        if (int(users.max()) + 1) * (high - low + 1) < 2**63:
            return np.argsort(users.astype(np.int64) * (high - low + 1) + (key - low), kind="stable")
    return np.lexsort((key, users))


def _time_key(inter: Interactions, float32_times: bool) -> np.ndarray:
    return inter.times.astype(np.float32) if float32_times else inter.times


def leave_one_out(inter: Interactions, float32_times: bool = False) -> LeaveOneOut:
    """Per-user leave-one-out in time order, with RecBole's rule for short users.

    A user with n events has n - 1 samples, of which min(2, n - 2) are held out, filled from the test side: n = 1 gives
    no sample (its event still counts as a training event), n = 2 one for training, n = 3 also one for test, n >= 4 also
    one for validation. report counts the users without a validation or test sample.
    float32_times rounds times to 32-bit floats before sorting, as RecBole does (steps of 64 s near 8.8e8): for
    comparison with its runs only, since it changes the order.
    """
    order, offsets, position = _grouped(inter, _time_key(inter, float32_times))
    count = np.diff(offsets)
    from_end = np.repeat(count, count) - 1 - position
    held = np.repeat(np.clip(count - 2, 0, 2), count)
    roles = np.where(from_end >= held, 0, np.where(from_end == 0, 2, 1)).astype(np.int8)
    report = {
        "users_without_test": int((count[1:] < 3).sum()),
        "users_without_valid": int((count[1:] < 4).sum()),
        "users_without_train_sample": int((count[1:] < 2).sum()),
    }
    return LeaveOneOut(
        items=inter.items[order], times=inter.times[order], offsets=offsets, roles=roles, num_items=inter.num_items,
        order="time", protocol="leave_one_out", report=report,
    )  # fmt: skip


def global_time_split(
    inter: Interactions,
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
    *,
    valid_from: int | None = None,
    test_from: int | None = None,
    targets: str = "first",
    float32_times: bool = False,
) -> Split:
    """One cut in time for everybody: train before ``valid_from``, validate before ``test_from``, test after.

    Unlike leave-one-out, nothing of training happens after a target of validation or test. Without explicit times the
    cuts are the times below which 1 - valid - test and 1 - test of the events lie. targets "first": one target per user
    and part, the first event after the cut; "all": every event. Events before a target are its history. report counts
    targets without any history (they give no sample). Raises ValueError for empty parts and impossible cuts.
    """
    if targets not in ("first", "all"):
        raise ValueError(f"targets={targets!r}: choose 'first' or 'all'")
    if (valid_from is None) != (test_from is None):
        raise ValueError("global_time_split: give both valid_from and test_from, or neither")
    if valid_from is None or test_from is None:
        if not (valid_fraction > 0 and test_fraction > 0 and valid_fraction + test_fraction < 1):
            raise ValueError(
                f"global_time_split: fractions {valid_fraction}, {test_fraction} must be > 0 and sum to < 1"
            )
        times = np.sort(inter.times)
        valid_from = int(times[int(len(times) * (1 - valid_fraction - test_fraction))])
        test_from = int(times[int(len(times) * (1 - test_fraction))])
    if valid_from >= test_from:
        raise ValueError(f"global_time_split: validation starts at {valid_from}, not before the test at {test_from}")
    order, offsets, position = _grouped(inter, _time_key(inter, float32_times))
    times, users = inter.times[order], inter.users[order]
    # Rounded sort keys may put events of one step in file order; roles must still never run backwards within a user.
    roles = np.searchsorted(np.array([valid_from, test_from]), times, side="right").astype(np.int8)
    if float32_times:
        shifted = np.maximum.accumulate(roles.astype(np.int64) + users.astype(np.int64) * 4)
        roles = (shifted - users.astype(np.int64) * 4).astype(np.int8)
    for i, name in enumerate(SPLITS):
        if not (roles == i).any():
            raise ValueError(f"no interactions left after the time split for {name} (cuts {valid_from}, {test_from})")
    if targets == "first":
        before = np.concatenate([[-1], roles[:-1]])
        again = (position > 0) & (roles == before) & (roles > 0)
        roles = np.where(again, np.int8(_CONTEXT_ONLY), roles)
    report = {
        "valid_from": valid_from,
        "test_from": test_from,
        "targets_without_history": int(((position == 0) & np.isin(roles, (1, 2))).sum()),
    }
    return Split(
        items=inter.items[order], times=times, offsets=offsets, roles=roles, num_items=inter.num_items,
        order="time", protocol="global_time", report=report,
    )  # fmt: skip


def ratio_split(
    inter: Interactions, ratios: Sequence[float] = (0.8, 0.1, 0.1), *, order: str = "random", seed: int = 2020
) -> Split:
    """Per-user shares of events for models that ignore order (BPR, LightGCN): RecBole's 8:1:1 protocol.

    Each user's events are shuffled (or put in time order) and cut. Counts are rounded down, the rest goes to training;
    a part whose exact share lies between 0 and 1 gets one event while training keeps more than one, test first.
    """
    if order not in ("random", "time"):
        raise ValueError(f"unknown order {order!r}; choose 'random' or 'time'")
    share = np.asarray(ratios, float)
    if share.shape != (3,) or (share < 0).any() or share[0] <= 0 or not np.isclose(share.sum(), 1):
        raise ValueError(f"ratios={tuple(ratios)}: need three shares (train > 0) that sum to 1")
    key = inter.times if order == "time" else np.random.default_rng(seed).random(len(inter))
    index, offsets, position = _grouped(inter, key)
    count = np.diff(offsets)
    exact = share[:, None] * count
    part = np.floor(exact + 1e-9).astype(np.int64)
    part[0] = count - part[1] - part[2]
    for i in (2, 1):
        extra = (part[0] > 1) & (exact[i] > 0) & (exact[i] < 1 - 1e-9)
        part[i] += extra
        part[0] -= extra
    first, second = np.repeat(part[0], count), np.repeat(part[0] + part[1], count)
    roles = ((position >= first).astype(np.int8) + (position >= second)).astype(np.int8)
    report = {"users_without_test": int((part[2][1:] == 0).sum()), "users_without_valid": int((part[1][1:] == 0).sum())}
    return Split(
        items=inter.items[index], times=inter.times[index], offsets=offsets, roles=roles, num_items=inter.num_items,
        order=order, protocol=f"ratio_{order}", report=report,
    )  # fmt: skip
