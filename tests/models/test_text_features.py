"""Offline text features: fixed values, phrase algebra, speed of the cached path, errors."""

import time

import numpy as np
import pytest

from models.text_features import TextFeatures

TEXTS = ["space war film", "a quiet comedy", "animated comedy for children", "war drama", "quiet drama of the sea"]


def test_vectors_are_unit_deterministic_and_independent_of_the_batch():
    a, b = TextFeatures.fit(TEXTS, 64), TextFeatures.fit(TEXTS, 64)
    b.encode(["other words first"])
    np.testing.assert_array_equal(a.encode(TEXTS)[::-1], b.encode(TEXTS[::-1]))
    np.testing.assert_allclose(np.linalg.norm(a.encode(TEXTS), axis=1), 1.0, atol=1e-6)
    assert not np.allclose(TextFeatures.fit(TEXTS, 64, seed=1).encode(TEXTS), a.encode(TEXTS))


def test_the_projection_is_the_same_on_every_machine():
    # the signs come from SHAKE-256 of "seed:name" alone: its first byte here is a constant of the hash
    signs = TextFeatures(8)._random(["word:comedy"])[0] > 0
    assert np.packbits(signs)[0] == 83


def test_overlap_orders_texts_and_rare_words_weigh_more():
    f = TextFeatures.fit(TEXTS * 4 + ["film"] * 50, 512)
    query = f.encode(["comedies for children", "war film"])
    against = f.encode(TEXTS)
    assert np.argmax(query[0] @ against.T) == 2
    # "film" is everywhere, "war" is rare: the war drama is nearer than a text that shares only "film"
    assert query[1] @ f.encode(["war drama"])[0] > query[1] @ f.encode(["film drama"])[0]


def test_semicolons_make_phrases_that_average():
    f = TextFeatures.fit(TEXTS, 64)
    whole, a, b = f.encode(["space war; quiet comedy", "space war", "quiet comedy"])
    np.testing.assert_allclose(whole, (a + b) / np.linalg.norm(a + b), atol=1e-6)
    np.testing.assert_allclose(f.encode(["space\nwar"])[0], a, atol=1e-6)


def test_empty_texts_give_zero_vectors():
    f = TextFeatures.fit(TEXTS, 64)
    assert not f.encode(["", " ; ", "?!"]).any()
    assert f.encode([]).shape == (0, 64)


def test_save_and_load(tmp_path):
    f = TextFeatures.fit(TEXTS, 64, seed=3)
    f.save(tmp_path / "features.npz")
    np.testing.assert_array_equal(TextFeatures.load(tmp_path / "features.npz").encode(TEXTS), f.encode(TEXTS))


def test_short_cached_queries_are_fast():
    f, queries = TextFeatures.fit(TEXTS), ["space war; quiet comedy; children"] * 128
    f.encode(queries)

    def once():
        start = time.perf_counter()
        f.encode(queries)
        return time.perf_counter() - start

    # 2 ms on a busy core; the bound leaves room for a busier machine
    assert min(once() for _ in range(20)) < 0.01


def test_bad_arguments():
    with pytest.raises(ValueError, match="multiple of 8"):
        TextFeatures(20)
    with pytest.raises(ValueError, match="no text"):
        TextFeatures.fit([])
    with pytest.raises(TypeError, match="list"):
        TextFeatures(64).encode("one")
