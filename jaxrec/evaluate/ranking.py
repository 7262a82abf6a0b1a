"""Full-ranking evaluation with a tie rule, metrics over explicit lists, and paired bootstrap intervals.

Definitions as in RecBole's evaluator (arXiv:2011.01731), with one deviation: equal scores are ordered by item id, so
that results do not depend on a device's top-k kernel, and a constant scorer is never perfect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.data.splits import Samples, Split

METRICS = ("recall", "hit", "precision", "ndcg", "mrr")
DEFAULT_METRICS = ("recall", "ndcg", "mrr")
DEFAULT_KS = (1, 5, 10, 20)

Scorer = Callable[[np.ndarray, np.ndarray], "np.ndarray | jax.Array"]


def _rank(xp: object, scores: jax.Array, targets: jax.Array, exclude: jax.Array | None) -> tuple:
    """(ranks, rows with NaN). ``xp`` is numpy or jax.numpy: float64 scores keep their precision in numpy only."""
    rows, width = scores.shape
    ids = xp.arange(width)
    candidate = xp.broadcast_to(ids > 0, (rows, width))
    if exclude is not None:
        where = xp.arange(rows)[:, None], exclude
        hidden = xp.zeros((rows, width), bool)
        if xp is np:
            hidden[where] = True
        else:
            hidden = hidden.at[where].set(True)
        candidate = candidate & ~hidden
    target_score = xp.take_along_axis(scores, targets[:, None], axis=1)
    before = (scores > target_score) | ((scores == target_score) & (ids < targets[:, None]))
    rank = 1 + (before & candidate).sum(axis=1)
    reachable = xp.take_along_axis(candidate, targets[:, None], axis=1)[:, 0]
    return xp.where(reachable, rank, width).astype(xp.int32), xp.isnan(scores).any(axis=1)


_device_rank = jax.jit(partial(_rank, jnp))


def _check_ids(name: str, ids: np.ndarray, low: int, high: int) -> None:
    outside = np.argwhere((ids < low) | (ids > high))
    if len(outside):
        row = tuple(outside[0].tolist())
        raise IndexError(f"{name}: item id {ids[row]} in row {row[0]} is not in {low}..{high}")


def ranks(scores: np.ndarray | jax.Array, targets: np.ndarray, exclude: np.ndarray | None = None) -> np.ndarray:
    """Rank of every target among all items: 1 + #{better score} + #{equal score and smaller id}.

    scores [B, N+1] (column 0 is padding and never a candidate): JAX arrays are ranked on their device under jit, numpy
    arrays in numpy at their own precision (float64 stays exact). targets int [B] in 1..N. exclude int [B, E], ids that
    are no candidates (0 = none): usually the history; an excluded target gets rank N+1, a miss at every K.
    Returns int32 [B]. Raises FloatingPointError on NaN scores, IndexError on ids out of range, ValueError on shapes.
    """
    targets = np.asarray(targets)
    if scores.ndim != 2 or targets.shape != scores.shape[:1]:
        raise ValueError(
            f"ranks: scores {list(scores.shape)} and targets {list(targets.shape)} must be [B, N+1] and [B]"
        )
    last = scores.shape[1] - 1
    _check_ids("targets", targets, 1, last)
    if exclude is not None:
        exclude = np.asarray(exclude)
        if exclude.ndim != 2 or len(exclude) != len(targets):
            raise ValueError(f"ranks: exclude {list(exclude.shape)} must be [B, E] with B = {len(targets)}")
        _check_ids("exclude", exclude, 0, last)
    on_host = isinstance(scores, np.ndarray)
    result, nan = _rank(np, scores, targets, exclude) if on_host else _device_rank(scores, targets, exclude)
    bad = np.flatnonzero(np.asarray(nan))
    if len(bad):
        raise FloatingPointError(f"ranks: NaN scores in {len(bad)} of {len(targets)} rows, first in row {bad[0]}")
    return np.asarray(result)


def _check_k(k: object, num_items: int | None = None) -> int:
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise ValueError(f"K={k!r}: must be a whole number >= 1")
    if num_items is not None and k > num_items:
        raise ValueError(f"K={k}: larger than the number of items, {num_items}")
    return int(k)


def _check_metric(name: str) -> str:
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}; choose among {', '.join(METRICS)}")
    return name


def parse_metric(text: str) -> tuple[str, int]:
    """``"ndcg@10"`` -> ("ndcg", 10). Raises ValueError for an unknown name or K."""
    name, at, k = text.partition("@")
    if not at or not k.isdecimal():
        raise ValueError(f"metric {text!r} must look like ndcg@10, with a name among {', '.join(METRICS)}")
    return _check_metric(name), _check_k(int(k))


def _check_ranks(rank: np.ndarray) -> np.ndarray:
    rank = np.asarray(rank)
    if rank.ndim != 1 or len(rank) == 0:
        raise ValueError(f"ranks must be a non-empty vector, got shape {list(rank.shape)}")
    if (rank < 1).any():
        raise ValueError(f"ranks start at 1, found {rank.min()}")
    return rank


def rank_values(rank: np.ndarray, metric: str) -> np.ndarray:
    """Values float64 [n] of one metric such as ``"ndcg@10"`` for ranks int [n] of single targets.

    recall = hit = [rank <= K]; precision = hit / K; ndcg = hit / log2(rank + 1); mrr = hit / rank.
    """
    rank = _check_ranks(rank)
    name, k = parse_metric(metric)
    hit = (rank <= k).astype(np.float64)
    gain = {"recall": 1.0, "hit": 1.0, "precision": 1 / k, "ndcg": 1 / np.log2(rank + 1.0), "mrr": 1.0 / rank}
    return hit * gain[name]


def rank_metrics(
    rank: np.ndarray,
    ks: Sequence[int] = DEFAULT_KS,
    metrics: Sequence[str] = DEFAULT_METRICS,
    num_items: int | None = None,
) -> dict[str, float]:
    """Means over users: {"recall@10": ..., "ndcg@10": ..., "mrr@10": ...} for every K of ``ks``.

    With num_items, K above it is a ValueError. Also raises ValueError for unknown metrics, K <= 0 and no ranks.
    """
    names = [_check_metric(name) for name in metrics]
    tops = [_check_k(k, num_items) for k in ks]
    return {f"{name}@{k}": float(rank_values(rank, f"{name}@{k}").mean()) for k in tops for name in names}


def list_values(lists: np.ndarray, targets: np.ndarray, metric: str) -> np.ndarray:
    """Values float64 [B] of one metric for ranked lists int [B, W] (0 = empty slot) and their relevant items.

    targets: int [B], or int [B, R] right-padded with 0 for users with several relevant items (at least one each).
    An empty slot keeps its position. Raises ValueError for K > W, repeated items in a list or no target in a row.
    """
    lists, targets = np.asarray(lists), np.asarray(targets)
    if targets.ndim == 1:
        targets = targets[:, None]
    if lists.ndim != 2 or targets.ndim != 2 or len(lists) != len(targets) or len(lists) == 0:
        raise ValueError(
            f"lists {list(lists.shape)} and targets {list(targets.shape)} must be [B, W] and [B] or [B, R]"
        )
    name, k = parse_metric(metric)
    if k > lists.shape[1]:
        raise ValueError(f"{metric}: the lists have only {lists.shape[1]} places")
    for what, array in (("lists", lists), ("targets", targets)):
        ordered = np.sort(array, axis=1)
        again = np.flatnonzero(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != 0)).any(axis=1))
        if len(again):
            raise ValueError(f"{what}: row {again[0]} holds an item twice ({array[again[0]].tolist()}); remove repeats")
    relevant = (targets != 0).sum(axis=1)
    if (relevant == 0).any():
        raise ValueError(f"targets: row {np.flatnonzero(relevant == 0)[0]} has no relevant item")
    top = lists[:, :k]
    hits = ((top[:, :, None] == targets[:, None, :]) & (top[:, :, None] != 0)).any(axis=2)
    place = np.arange(1, k + 1)
    if name == "hit":
        return hits.any(axis=1).astype(np.float64)
    if name == "recall":
        return hits.sum(axis=1) / relevant
    if name == "precision":
        return hits.sum(axis=1) / k
    if name == "mrr":
        return (hits / place).max(axis=1)
    discount = 1 / np.log2(place + 1.0)
    return (hits * discount).sum(axis=1) / np.cumsum(discount)[np.minimum(relevant, k) - 1]


def list_metrics(
    lists: np.ndarray,
    targets: np.ndarray,
    ks: Sequence[int] = (1, 5, 10),
    metrics: Sequence[str] = DEFAULT_METRICS,
) -> dict[str, float]:
    """Means of ``list_values`` over users, for every metric and K; names as in ``rank_metrics``."""
    names = [_check_metric(name) for name in metrics]
    tops = [_check_k(k) for k in ks]
    return {f"{name}@{k}": float(list_values(lists, targets, f"{name}@{k}").mean()) for k in tops for name in names}


def paired_interval(
    a: np.ndarray, b: np.ndarray, level: float = 0.95, seed: int = 0, resamples: int = 10_000
) -> tuple[float, float, float]:
    """(mean of a - b, low, high): percentile bootstrap over users of the paired differences.

    a, b: float [n], one value per user, the same users in the same order. Raises ValueError on unequal or empty input
    and FloatingPointError on NaN.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 1 or a.shape != b.shape or len(a) == 0:
        raise ValueError(f"paired_interval: need two equally long vectors, got {list(a.shape)} and {list(b.shape)}")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"paired_interval: level={level} must lie in (0, 1) and resamples={resamples} be positive")
    difference = a - b
    if np.isnan(difference).any():
        raise FloatingPointError(f"paired_interval: NaN for user {np.flatnonzero(np.isnan(difference))[0]}")
    rng, n = np.random.default_rng(seed), len(difference)
    chunk = max(1, (1 << 22) // n)  # bounds the index matrix
    means = np.concatenate(
        [
            difference[rng.integers(n, size=(min(chunk, resamples - i), n))].mean(axis=1)
            for i in range(0, resamples, chunk)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(difference.mean()), float(low), float(high)


@dataclass(frozen=True, eq=False)
class RankingResult:
    """ranks and users int32 [n] in the order of ``Split.samples``; metrics by name; protocol: how it was measured."""

    ranks: np.ndarray
    users: np.ndarray
    metrics: dict[str, float]
    protocol: dict[str, str | int | bool]


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])


def _batch_ranks(
    scorer: Scorer, split: Split, samples: Samples, order: np.ndarray, part: str, exclude_history: bool, batch_size: int
) -> Iterator[np.ndarray]:
    if not len(samples):
        raise ValueError(f"evaluate_ranking: no user has a {part} sample under the {split.protocol} split")
    size = min(batch_size, len(order))
    for low in range(0, len(order), size):
        rows = order[low : low + size]
        targets = samples.targets[rows]
        # The last batch is filled up so that the scorer is compiled for one shape only.
        scores = scorer(_padded(samples.history[rows], size), _padded(samples.lengths[rows], size))
        if scores.shape != (size, split.num_items + 1):
            raise ValueError(f"scorer returned {list(scores.shape)}, expected {[size, split.num_items + 1]}")
        exclude = _padded(split.seen(part, rows), size) if exclude_history else None
        yield ranks(scores, _padded(targets, size), exclude)[: len(targets)]


def evaluate_ranking(
    scorer: Scorer,
    split: Split,
    part: str = "test",
    *,
    max_len: int = 50,
    exclude_history: bool,
    ks: Sequence[int] = DEFAULT_KS,
    metrics: Sequence[str] = DEFAULT_METRICS,
    batch_size: int = 256,
    rows: np.ndarray | None = None,
) -> RankingResult:
    """Full ranking of the whole catalogue for every sample of a part ("valid" or "test").

    scorer(history int32 [B, max_len], lengths int32 [B]) -> scores [B, N+1] (numpy or JAX). exclude_history removes a
    user's whole history, not only its last max_len items, from the candidates; it has no default because it changes
    results a lot and is stored in the protocol. rows: only these samples, in this order. Raises ValueError when there
    is nothing to evaluate or K > items.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    for k in ks:
        _check_k(k, split.num_items)
    samples = split.samples(part, max_len)
    order = np.arange(len(samples)) if rows is None else np.asarray(rows)
    users = samples.users[order]
    rank = np.concatenate(list(_batch_ranks(scorer, split, samples, order, part, exclude_history, batch_size)))
    protocol = {
        "split": split.protocol,
        "part": part,
        "ranking": "full",
        "history_excluded": exclude_history,
        "users": len(np.unique(users)),
        "targets": len(rank),
        "items": split.num_items,
        "max_len": max_len,
    }
    return RankingResult(rank, users, rank_metrics(rank, ks, metrics, split.num_items), protocol)
