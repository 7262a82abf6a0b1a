"""Popularity and Markov: scores by hand, ties, sizes, errors."""

import numpy as np
import pytest

from models.recsys import Markov, Popularity

# two users: 1 2 3 2 3 and 2 3 4
PREVIOUS = np.array([0, 1, 2, 3, 2, 0, 2, 3])
EVENTS = np.array([1, 2, 3, 2, 3, 2, 3, 4])


def test_popularity_counts():
    scores = Popularity.fit(EVENTS, 5).scores(np.array([[1], [2]]), np.array([1, 1]))
    assert scores.dtype == np.float64
    np.testing.assert_array_equal(scores, [[-np.inf, 1, 3, 3, 1, 0]] * 2)


def test_markov_is_transitions_plus_a_little_popularity():
    history, lengths = np.array([[1, 2, 0], [4, 0, 0], [2, 3, 9]]), np.array([2, 1, 2])
    scores = Markov.fit(PREVIOUS, EVENTS, 5).scores(history, lengths)
    tail = 1e-6 * np.array([0, 1, 3, 3, 1, 0])
    want = np.tile(tail, (3, 1))
    want[0, 3] += 3  # 2 -> 3 three times
    want[2, 2] += 1  # 3 -> 2 and 3 -> 4; what stands behind the length does not count
    want[2, 4] += 1
    want[:, 0] = -np.inf
    assert scores.dtype == np.float64
    np.testing.assert_array_equal(scores, want)


def test_markov_falls_back_to_popularity_without_a_history():
    model = Markov.fit(PREVIOUS, EVENTS, 5)
    np.testing.assert_array_equal(
        model.scores(np.zeros((1, 2), int), np.array([0]))[0, 1:], 1e-6 * np.array([1, 3, 3, 1, 0])
    )


def test_markov_holds_a_large_catalogue(rng):
    items = rng.integers(1, 100_001, 50_000)
    model = Markov.fit(np.concatenate([[0], items[:-1]]), items, 100_000)
    assert len(model.following) < 50_000
    scores = model.scores(items[:3, None], np.ones(3, int))
    assert scores.shape == (3, 100_001)
    np.testing.assert_array_equal(scores[np.arange(2), items[1:3]] >= 1, True)


@pytest.mark.parametrize("bad", [0, 6, -1])
def test_ids_outside_the_catalogue(bad):
    with pytest.raises(IndexError, match=str(bad)):
        Popularity.fit(np.array([1, bad]), 5)
    with pytest.raises(IndexError):
        Markov.fit(np.array([0, 7]), np.array([1, 2]), 5)
    with pytest.raises(ValueError, match="one entry per event"):
        Markov.fit(np.array([0]), np.array([1, 2]), 5)
