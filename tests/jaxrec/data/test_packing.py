"""Packing: every sequence once and whole, apart from its neighbours."""

import jax.numpy as jnp
import numpy as np
import pytest

import models
from jaxrec.data.packing import pack
from models import Config


def test_every_sequence_is_there_once_and_whole(rng):
    rows = [(rng.integers(2, 50, n).tolist(), [1] * n) for n in rng.integers(1, 20, 60)]
    packed = pack(rows, 32)
    found = []
    for b in range(len(packed["tokens"])):
        for segment in range(1, packed["segment_ids"][b].max() + 1):
            inside = packed["segment_ids"][b] == segment
            found.append(packed["tokens"][b][inside].tolist())
            np.testing.assert_array_equal(packed["positions"][b][inside], np.arange(inside.sum()))
            np.testing.assert_array_equal(packed["mask"][b][inside], [0, *[1] * (inside.sum() - 1)])
    assert sorted(found) == sorted(ids for ids, _ in rows)
    assert (packed["mask"][packed["segment_ids"] == 0] == 0).all()
    assert len(packed["tokens"]) < 30  # several to a row


def test_a_packed_model_sees_each_sequence_alone(key, rng):
    config = Config(vocab_size=50, dim=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn_dim=24, qk_norm=True)
    params = models.init(config, key)
    rows = [(rng.integers(2, 50, n).tolist(), [1] * n) for n in (5, 9, 3)]
    packed = pack(rows, 24)
    assert len(packed["tokens"]) == 1
    logits = models.forward(
        params, config, packed["tokens"], positions=packed["positions"], segment_ids=packed["segment_ids"]
    ).logits[0]
    for segment in (1, 2, 3):
        inside = packed["segment_ids"][0] == segment
        alone = models.forward(params, config, jnp.asarray(packed["tokens"][:, inside])).logits[0]
        np.testing.assert_allclose(logits[inside], alone, atol=1e-5)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"sequence 1 has 9 tokens.*a row has 8"):
        pack([([1, 2], [1, 1]), ([3] * 9, [1] * 9)], 8)
    with pytest.raises(ValueError, match="nothing to pack"):
        pack([], 8)
