"""The sampler's own layout of the weights, and truncation without sorting, against their plain forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models import Config, sample
from models.draw import _bisect_floor, _truncate
from models.layout import decode_weights
from models.linear import quantize
from models.sample import decode, extend, prefill

BASE = Config(vocab_size=60, dim=16, layers=2, heads=4, kv_heads=2, head_dim=6, ffn_dim=24, init_std=0.4)


@pytest.mark.parametrize(
    "config",
    [
        BASE.replace(qk_norm=True),
        BASE.replace(family="qwen2", qkv_bias=True),
        BASE.replace(family="llama", tie_embeddings=False),
        BASE.replace(
            family="deepseek_v3",
            router_score="sigmoid",
            kv_heads=4,
            kv_lora=8,
            q_lora=10,
            rope_dim=2,
            value_dim=5,
            experts=4,
            top_k=2,
            groups=2,
            top_groups=1,
            shared_dim=24,
            first_dense=1,
            dense_ffn_dim=40,
        ),
    ],
    ids=["qwen3", "qwen2", "llama", "deepseek_v3"],
)
def test_fused_and_plain_weights_decode_the_same(config, key):
    params = models.init(config, key)
    if config.qkv_bias:
        for name in ("bq", "bk", "bv"):
            params["layers"][name] = jax.random.normal(key, params["layers"][name].shape)
    tokens = np.random.default_rng(0).integers(0, 60, (3, 9), dtype=np.int32)
    lengths = np.array([9, 4, 1], np.int32)
    logits, drawn = [], []
    for fuse in (True, False):
        weights = decode_weights(params, config, fuse)
        session = prefill(weights, config, tokens, lengths, size=20)
        logits.append(np.asarray(session.logits))
        out, _ = decode(weights, config, session, key, np.full(3, 8, np.int32), temperature=0.0)
        drawn.append(np.asarray(out.tokens))
    np.testing.assert_allclose(*logits, atol=1e-5)
    np.testing.assert_array_equal(*drawn)
    whole = models.forward(params, config, jnp.asarray(tokens)).logits
    last = np.take_along_axis(np.asarray(whole), lengths[:, None, None] - 1, axis=1)[:, 0]
    np.testing.assert_allclose(logits[0], last, atol=1e-5)


def _by_sorting(row: np.ndarray, top_p: float, top_k: int) -> set[int]:
    """Kept ids of one row of logits without ties, by definition."""
    order = np.argsort(-row.astype(np.float64), kind="stable")
    probs = np.exp(row.astype(np.float64)[order] - row.max())
    probs /= probs.sum()
    before = np.cumsum(probs) - probs
    keep = (before < top_p) | (top_p >= 1)
    if top_k:
        keep &= np.arange(len(row)) < top_k
    keep[0] = True
    return set(order[keep].tolist())


@pytest.mark.parametrize("vocab", [40, 256, 257, 3000])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_truncation_keeps_what_sorting_keeps(vocab, spread, rng):
    logits = (spread * rng.standard_normal((4, vocab))).astype(np.float32)
    truncate, bisect = jax.jit(_truncate), jax.jit(_bisect_floor)
    for top_p, top_k in (
        (0.9, 0),
        (1.0, 20),
        (0.5, 7),
        (0.0, 0),
        (0.95, 300),
        (1e-3, 0),
        (1.0, 1),
        (1.0, 0),
        (0.99, 256),
    ):
        kept = np.isfinite(truncate(logits, jnp.float32(top_p), jnp.int32(top_k)))
        floor = bisect(logits, jnp.float32(top_p if top_p < 1 else np.inf), jnp.int32(top_k or vocab))
        for row, mask, low in zip(logits, kept, np.asarray(floor)):
            wanted = _by_sorting(row, top_p, top_k)
            assert set(np.flatnonzero(mask).tolist()) == wanted, (top_p, top_k)
            assert set(np.flatnonzero(row >= low).tolist()) == wanted, (top_p, top_k)


def test_truncation_keeps_ties_and_ignores_impossible_tokens():
    logits = jnp.array([[2.0, 2.0, 1.0, -jnp.inf], [-jnp.inf, 0.0, -jnp.inf, -jnp.inf]])
    kept = np.isfinite(_truncate(logits, jnp.float32(1.0), jnp.int32(1)))
    np.testing.assert_array_equal(kept, [[True, True, False, False], [False, True, False, False]])
    kept = np.isfinite(_truncate(logits, jnp.float32(1.0), jnp.int32(0)))
    np.testing.assert_array_equal(kept, np.isfinite(logits))


@pytest.mark.parametrize("int8", [False, True])
def test_a_latent_cache_in_whole_lanes_is_the_cache(int8, monkeypatch):
    """The form for TPUs, which has zeros behind every key."""
    config = BASE.replace(
        family="deepseek_v3", kv_heads=4, kv_lora=8, q_lora=10, rope_dim=2, value_dim=6, experts=4, top_k=2,
        router_score="sigmoid", groups=1, top_groups=1, eos_ids=(),
    )  # fmt: skip
    weights = decode_weights(models.init(config, jax.random.key(0)), config)
    tokens = np.random.default_rng(0).integers(0, 60, (2, 9), dtype=np.int32)

    def conversation():
        jax.clear_caches()  # the name that is patched below is no part of a program's key
        session = prefill(weights, config, tokens, np.array([9, 5], np.int32), 32, int8=int8)
        session = extend(weights, config, session, tokens[:, :4], np.array([4, 2], np.int32), 13)
        logits = np.asarray(session.logits)
        out, session = decode(weights, config, session, jax.random.key(0), np.full(2, 6, np.int32), temperature=0.0)
        return logits, out, jax.tree.leaves(session.keys[0])[0]

    plain = conversation()
    with monkeypatch.context() as patch:
        patch.setattr(sample, "platform", lambda: "tpu")
        padded = conversation()
    jax.clear_caches()
    assert (plain[2].shape, padded[2].shape) == ((2, 1, 32, 10), (2, 1, 32, 128))
    np.testing.assert_allclose(padded[0], plain[0], atol=1e-5)
    np.testing.assert_array_equal(padded[1].tokens, plain[1].tokens)
    np.testing.assert_allclose(padded[2][..., :10], plain[2], atol=1e-5)
    assert not np.asarray(padded[2][..., 10:]).any()


@pytest.mark.parametrize("axes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 8}])
@pytest.mark.parametrize("int8", [False, True])
def test_writing_head_by_head_is_writing(axes, int8, monkeypatch):
    """The form for TPUs, with padding that is to be dropped; rows that the mesh divides, and heads that it does not."""
    rng = np.random.default_rng(0)
    cache = jnp.asarray(rng.normal(size=(4, 2, 12, 8)), jnp.float32)
    cache = quantize(cache, -1) if int8 else cache
    x = jnp.asarray(rng.normal(size=(4, 3, 2, 8)), jnp.float32)
    slots = jnp.asarray([[0, 1, 2], [9, 10, 11], [4, 5, 14], [12, 13, 14]])
    rows = jnp.arange(4)[:, None]
    expected = sample._write(cache, rows, slots, x)
    monkeypatch.setattr(sample, "platform", lambda: "tpu")
    with models.use_mesh(models.make_mesh(**axes) if axes else None):
        found = jax.jit(lambda *a: sample._write(*a))(cache, rows, slots, x)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    kept = jax.tree.leaves(found)[0][3], jax.tree.leaves(cache)[0][3]
    np.testing.assert_array_equal(*kept)  # all of its tokens are padding
    assert (np.asarray(jax.tree.leaves(found)[0][1, :, 9:]) != np.asarray(jax.tree.leaves(cache)[0][1, :, 9:])).any()
