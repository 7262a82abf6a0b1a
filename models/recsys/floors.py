"""Recommenders without learning that every table must show: popularity and the first-order Markov chain.

Both count **training** events only and score in float64 on the host, because their ties are part of the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def _counts(items: np.ndarray, num_items: int) -> np.ndarray:
    items = np.asarray(items)
    if items.size and (items.min() < 1 or items.max() > num_items):
        bad = int(items[(items < 1) | (items > num_items)][0])
        raise IndexError(f"item id {bad} is outside 1..{num_items}")
    return np.bincount(items, minlength=num_items + 1).astype(np.float64)


@dataclass(frozen=True)
class Popularity:
    """score(j) = number of training events of item j."""

    counts: np.ndarray  # float64 [N+1]

    @classmethod
    def fit(cls, items: np.ndarray, num_items: int) -> Popularity:
        """items: int [M], the items of all training events."""
        return cls(_counts(items, num_items))

    def scores(self, history: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """float64 [B, N+1], the same row for every history; id 0 is -inf."""
        scores = np.tile(self.counts, (len(history), 1))
        scores[:, 0] = -np.inf
        return scores


@dataclass(frozen=True)
class Markov:
    """score(j | last item i) = #(i directly followed by j in training) + 1e-6 * #(j in training).

    Transitions are kept as sorted rows (offsets, ids, counts), so a catalogue of 10^5 items costs memory by the
    number of distinct transitions. An empty history is scored by the popularity part alone.
    """

    popularity: np.ndarray  # float64 [N+1]
    offsets: np.ndarray  # int64 [N+2]: transitions from item i stand in offsets[i]:offsets[i+1]
    following: np.ndarray  # int32 [Q]
    counts: np.ndarray  # float64 [Q]

    @classmethod
    def fit(cls, previous: np.ndarray, items: np.ndarray, num_items: int) -> Markov:
        """previous, items: int [M]; the item before each training event of the same user (0 = first event)."""
        previous, items = np.asarray(previous, np.int64), np.asarray(items, np.int64)
        if previous.shape != items.shape:
            raise ValueError(f"previous {previous.shape} and items {items.shape} must have one entry per event")
        popularity = _counts(items, num_items)
        real = previous != 0
        _counts(previous[real], num_items)
        pairs, counts = np.unique(previous[real] * (num_items + 1) + items[real], return_counts=True)
        source, following = np.divmod(pairs, num_items + 1)
        offsets = np.searchsorted(source, np.arange(num_items + 2))
        return cls(popularity, offsets, following.astype(np.int32), counts.astype(np.float64))

    def scores(self, history: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """History int [B, L] right-padded, lengths [B] -> float64 [B, N+1]; id 0 is -inf."""
        history, lengths = np.asarray(history), np.asarray(lengths)
        last = np.where(lengths > 0, history[np.arange(len(history)), np.maximum(lengths - 1, 0)], 0)
        if last.size and (last.min() < 0 or last.max() >= len(self.popularity)):
            raise IndexError(f"item id {int(last.max())} is outside 1..{len(self.popularity) - 1}")
        tail = 1e-6 * self.popularity
        scores = np.tile(tail, (len(history), 1))
        widths = self.offsets[last + 1] - self.offsets[last]
        rows = np.repeat(np.arange(len(history)), widths)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(widths) - widths, widths)
        entries = np.repeat(self.offsets[last], widths) + within
        columns = self.following[entries]
        scores[rows, columns] = self.counts[entries] + tail[columns]
        scores[:, 0] = -np.inf
        return scores
