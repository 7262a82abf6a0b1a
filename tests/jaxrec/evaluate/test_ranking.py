"""Ranks, metrics and intervals: worked numbers, the tie rule, and errors."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.data import Interactions, leave_one_out
from jaxrec.evaluate import (
    evaluate_ranking,
    list_metrics,
    list_values,
    paired_interval,
    rank_metrics,
    rank_values,
    ranks,
)
from jaxrec.evaluate.ranking import parse_metric

BACKENDS = pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])


@BACKENDS
def test_ties_are_ordered_by_id(array):
    scores = array(np.array([[9, 1, 3, 3, 2, 3]] * 5, np.float32))
    assert ranks(scores, np.arange(1, 6)).tolist() == [5, 1, 2, 4, 3]  # column 0 outranks nobody
    constant = array(np.zeros((4, 8), np.float32))
    assert ranks(constant, np.array([1, 2, 5, 7])).tolist() == [1, 2, 5, 7]


@BACKENDS
def test_excluded_items_are_no_candidates(array):
    scores = array(np.array([[0, 5, 4, 3, 2], [0, 5, 4, 3, 2]], np.float32))
    exclude = np.array([[1, 2, 0], [3, 0, 0]])
    assert ranks(scores, np.array([3, 4]), exclude).tolist() == [1, 3]
    # A target that is itself excluded can never be a hit: its rank lies beyond the catalogue.
    assert ranks(scores, np.array([2, 3]), exclude).tolist() == [5, 5]


@BACKENDS
def test_minus_infinity_marks_items_out_of_reach(array):
    scores = array(np.array([[-np.inf, -np.inf, 1, -np.inf]], np.float32))
    assert ranks(scores, np.array([2])).tolist() == [1]
    assert ranks(scores, np.array([3])).tolist() == [3]


def test_ranks_match_a_plain_loop_on_host_and_device(rng: np.random.Generator):
    scores = rng.integers(0, 6, (20, 31)).astype(np.float32)  # many ties
    targets = rng.integers(1, 31, 20)
    exclude = np.where(rng.random((20, 9)) < 0.6, rng.integers(1, 31, (20, 9)), 0)
    expected = []
    for row, target, hidden in zip(scores, targets, exclude):
        order = sorted(set(range(1, 31)) - set(hidden.tolist()), key=lambda i: (-row[i], i))
        expected.append(order.index(target) + 1 if target in order else 31)
    assert ranks(scores, targets, exclude).tolist() == expected
    assert ranks(jnp.asarray(scores), targets, exclude).tolist() == expected


def test_numpy_scores_keep_float64():
    scores = np.array([[0, 1e6 + 1e-6, 1e6]])
    assert ranks(scores, np.array([2])).tolist() == [2]
    assert ranks(scores[:, ::1].astype(np.float32), np.array([1])).tolist() == [1]


@BACKENDS
def test_nan_scores_raise(array):
    scores = np.zeros((3, 4), np.float32)
    scores[1, 2] = np.nan
    with pytest.raises(FloatingPointError, match="NaN scores in 1 of 3 rows, first in row 1"):
        ranks(array(scores), np.array([1, 2, 3]))


@BACKENDS
def test_ids_out_of_range_and_wrong_shapes(array):
    scores = array(np.zeros((2, 4), np.float32))
    for target in (0, 4, -1):
        with pytest.raises(IndexError, match=rf"targets: item id {target} in row 1 is not in 1\.\.3"):
            ranks(scores, np.array([1, target]))
    with pytest.raises(IndexError, match="exclude: item id 7 in row 0"):
        ranks(scores, np.array([1, 2]), np.array([[7], [0]]))
    with pytest.raises(ValueError, match="must be"):
        ranks(scores, np.array([1, 2, 3]))
    with pytest.raises(ValueError, match="exclude"):
        ranks(scores, np.array([1, 2]), np.array([1, 2]))


@pytest.mark.parametrize(("rank", "ndcg"), [(1, 1.0), (2, 0.6309), (3, 0.5), (5, 0.3869), (10, 0.2891), (11, 0.0)])
def test_worked_ndcg(rank: int, ndcg: float):
    assert rank_values(np.array([rank]), "ndcg@10")[0] == pytest.approx(ndcg, abs=5e-5)
    lists = np.arange(1, 12)[None]
    assert list_values(lists, np.array([rank]), "ndcg@10")[0] == pytest.approx(ndcg, abs=5e-5)


def test_rank_metrics_by_hand():
    found = rank_metrics(np.array([1, 3, 11]), ks=(1, 10), metrics=("recall", "hit", "precision", "ndcg", "mrr"))
    expected = {
        "recall@1": 1 / 3, "hit@1": 1 / 3, "precision@1": 1 / 3, "ndcg@1": 1 / 3, "mrr@1": 1 / 3,
        "recall@10": 2 / 3, "hit@10": 2 / 3, "precision@10": 2 / 30, "ndcg@10": 0.5, "mrr@10": 4 / 9,
    }  # fmt: skip
    assert found == pytest.approx(expected)


def test_one_target_lists_agree_with_ranks(rng: np.random.Generator):
    lists = np.stack([rng.permutation(30)[:20] + 1 for _ in range(50)])
    targets = rng.integers(1, 31, 50)
    rank = np.where((lists == targets[:, None]).any(1), (lists == targets[:, None]).argmax(1) + 1, 99)
    names = ("recall", "hit", "precision", "ndcg", "mrr")
    assert list_metrics(lists, targets, (1, 5, 20), names) == pytest.approx(rank_metrics(rank, (1, 5, 20), names))
    assert (rank_values(rank, "ndcg@10") <= rank_values(rank, "recall@10")).all()


def test_several_relevant_items():
    lists, targets = np.array([[4, 9, 2, 7, 0]]), np.array([[2, 9, 5, 0]])
    value = {
        name: list_values(lists, targets, f"{name}@4")[0] for name in ("recall", "precision", "mrr", "ndcg", "hit")
    }
    ideal = 1 + 1 / np.log2(3) + 1 / np.log2(4)
    gain = 1 / np.log2(3) + 1 / np.log2(4)
    assert value == pytest.approx({"recall": 2 / 3, "precision": 0.5, "mrr": 0.5, "ndcg": gain / ideal, "hit": 1})
    # More relevant items than places: the ideal list is K long.
    assert list_values(np.array([[1, 2]]), np.array([[1, 2, 3]]), "ndcg@2")[0] == 1.0


def test_empty_places_are_misses_and_repeats_an_error():
    assert list_values(np.array([[0, 3, 0]]), np.array([3]), "mrr@3")[0] == 0.5
    assert list_values(np.array([[0, 0, 0]]), np.array([3]), "recall@3")[0] == 0
    with pytest.raises(ValueError, match="lists: row 1 holds an item twice"):
        list_values(np.array([[1, 2], [3, 3]]), np.array([1, 3]), "recall@2")
    with pytest.raises(ValueError, match="targets: row 0 has no relevant item"):
        list_values(np.array([[1, 2]]), np.array([0]), "recall@2")
    with pytest.raises(ValueError, match="only 2 places"):
        list_values(np.array([[1, 2]]), np.array([1]), "recall@3")


@pytest.mark.parametrize("k", [0, -1, 2.5, True, "10"])
def test_bad_k(k):
    with pytest.raises(ValueError, match="K="):
        rank_metrics(np.array([1]), ks=(k,))


def test_unknown_metrics_and_too_large_k():
    with pytest.raises(ValueError, match="unknown metric 'auc'; choose among recall, hit"):
        rank_metrics(np.array([1]), metrics=("auc",))
    with pytest.raises(ValueError, match="unknown metric 'auc'"):
        rank_values(np.array([1]), "auc@10")
    for text in ("ndcg", "ndcg@", "ndcg@ten", "@10"):
        with pytest.raises(ValueError, match="metric"):
            parse_metric(text)
    with pytest.raises(ValueError, match="K=0"):
        parse_metric("ndcg@0")
    with pytest.raises(ValueError, match="K=20: larger than the number of items, 5"):
        rank_metrics(np.array([1]), ks=(20,), num_items=5)
    with pytest.raises(ValueError, match="non-empty"):
        rank_metrics(np.array([]))
    with pytest.raises(ValueError, match="ranks start at 1, found 0"):
        rank_metrics(np.array([0]))


def test_paired_interval_covers_and_is_reproducible(rng: np.random.Generator):
    a = rng.random(400)
    b = a - 0.1 + rng.normal(0, 0.2, 400)
    difference, low, high = paired_interval(a, b, seed=3)
    assert difference == pytest.approx((a - b).mean())
    # Normal theory: the half-width is 1.96 standard errors.
    assert (high - low) / 2 == pytest.approx(1.96 * (a - b).std(ddof=1) / 20, rel=0.05)
    assert low < difference < high
    assert paired_interval(a, b, seed=3) == (difference, low, high)
    _, narrow_low, narrow_high = paired_interval(a, b, level=0.5, seed=3)
    assert narrow_high - narrow_low < high - low
    assert paired_interval(a, a) == (0, 0, 0)


def test_paired_interval_errors():
    with pytest.raises(ValueError, match="equally long"):
        paired_interval(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="equally long"):
        paired_interval(np.zeros(0), np.zeros(0))
    with pytest.raises(ValueError, match="level=95"):
        paired_interval(np.zeros(3), np.zeros(3), level=95)
    with pytest.raises(FloatingPointError, match="NaN for user 1"):
        paired_interval(np.array([0, np.nan]), np.zeros(2))


@pytest.fixture
def cycles() -> Interactions:
    """Six users who walk the cycle 1, 2, ..., 8 from different starts, ten steps each."""
    items = np.array([[(user + step) % 8 + 1 for step in range(10)] for user in range(6)], np.int32)
    return Interactions(
        users=np.repeat(np.arange(1, 7, dtype=np.int32), 10),
        items=items.ravel(),
        times=np.tile(np.arange(10, dtype=np.int64), 6),
        ratings=None,
        user_tokens=np.array(["[PAD]", *"abcdef"]),
        item_tokens=np.array(["[PAD]", *"12345678"]),
        titles=("",) * 9,
        categories=("",) * 9,
    )


@BACKENDS
def test_evaluate_ranking(cycles: Interactions, array):
    shapes = set()

    def follows(history: np.ndarray, lengths: np.ndarray):
        shapes.add(history.shape)
        last = history[np.arange(len(history)), lengths - 1]
        return array(np.eye(9, dtype=np.float32)[last % 8 + 1])

    split = leave_one_out(cycles)
    result = evaluate_ranking(follows, split, "test", max_len=3, exclude_history=False, ks=(1, 5), batch_size=4)
    assert result.metrics["recall@1"] == 1.0
    assert shapes == {(4, 3)}  # six samples in two batches of one shape
    assert result.users.tolist() == [1, 2, 3, 4, 5, 6]
    assert result.protocol == {
        "split": "leave_one_out", "part": "test", "ranking": "full", "history_excluded": False, "users": 6,
        "targets": 6, "items": 8, "max_len": 3,
    }  # fmt: skip
    # Every user has seen all eight items, beyond the last three too: nothing can be hit once history is excluded.
    excluded = evaluate_ranking(follows, split, "test", max_len=3, exclude_history=True, ks=(8,), batch_size=4)
    assert excluded.ranks.tolist() == [9] * 6
    assert excluded.metrics["recall@8"] == 0.0


def test_evaluate_ranking_errors(cycles: Interactions):
    split = leave_one_out(cycles)

    def constant(history: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return np.zeros((len(history), 9))

    with pytest.raises(ValueError, match="unknown split 'dev'"):
        evaluate_ranking(constant, split, "dev", exclude_history=False, ks=(5,))
    with pytest.raises(ValueError, match="K=10: larger than the number of items, 8"):
        evaluate_ranking(constant, split, exclude_history=False)
    with pytest.raises(ValueError, match=r"scorer returned \[6, 8\], expected \[6, 9\]"):
        evaluate_ranking(lambda h, n: np.zeros((len(h), 8)), split, exclude_history=False, ks=(5,))
    with pytest.raises(FloatingPointError):
        evaluate_ranking(lambda h, n: np.full((len(h), 9), np.nan), split, exclude_history=False, ks=(5,))
    with pytest.raises(ValueError, match="batch_size=0"):
        evaluate_ranking(constant, split, exclude_history=False, ks=(5,), batch_size=0)
