"""Weights and cache in eight bits: the rounding is what it is said to be, and the model's answers move by little."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models.layout import decode_weights
from models.linear import Quantized, dense, product, product_out_in, quantize
from models.sample import decode, extend, prefill
from models.sharding import make_mesh, use_mesh

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "models"
LENGTHS = np.array([9, 5], np.int32)
TOKENS = np.random.default_rng(0).integers(0, 60, (2, 9), dtype=np.int32)


@pytest.mark.parametrize(("shape", "axes"), [((7, 12), 0), ((7, 12), 1), ((4, 3, 5), (0, 1)), ((2, 6, 5), 1)])
def test_rounding_is_at_most_half_a_step(rng, shape, axes):
    x = rng.standard_normal(shape).astype(np.float32)
    x[..., 0] = 0.0
    q = quantize(jnp.asarray(x), axes)
    chex.assert_type([q.values, q.scale], [jnp.int8, jnp.float32])
    assert q.scale.size == x.size // np.prod([shape[a] for a in np.atleast_1d(axes)])
    most = np.abs(x).max(axis=axes, keepdims=True)
    assert (np.abs(np.asarray(dense(q)) - x) <= most / 254 * (1 + 1e-5)).all()
    assert np.abs(np.asarray(q.values)).max() == 127
    again = quantize(dense(q), axes)
    np.testing.assert_array_equal(again.values, q.values)


def test_products_are_those_of_the_rounded_matrix(rng):
    x = rng.standard_normal((2, 3, 8)).astype(np.float32)
    for shape, axes in (((8, 10), 0), ((8, 2, 5), 0), ((2, 4, 10), (0, 1))):
        q = quantize(jnp.asarray(rng.standard_normal(shape), jnp.float32), axes)
        want = x @ np.asarray(dense(q)).reshape(8, 10)
        np.testing.assert_allclose(product(x, q), want, atol=1e-5)
    q = quantize(jnp.asarray(rng.standard_normal((10, 8)), jnp.float32), 1)
    np.testing.assert_allclose(product_out_in(x, q), x @ np.asarray(dense(q)).T, atol=1e-5)


def conversation(model, fuse=True, int8=False, cache=False):
    """Logits after a prompt and after a second turn, of all rows, and the log-probabilities of greedy tokens."""
    config = model.config.replace(eos_ids=())
    weights = decode_weights(model.params, config, fuse, int8=int8)
    session = prefill(weights, config, TOKENS, LENGTHS, 32, int8=cache)
    first = np.asarray(session.logits)
    session = extend(weights, config, session, TOKENS[:, :4], np.array([4, 2], np.int32), 13)
    second = np.asarray(session.logits)
    out, session = decode(weights, config, session, jax.random.key(0), np.full(2, 6, np.int32), temperature=0.0)
    return first, second, out, session, weights


# Random tiny models are harder than trained ones: their rows of eight to sixteen weights give rounding nothing to
# average over. Measured, as the root mean square of the change over that of the logits: .02 to .11 for weights in eight
# bits (most where a token's experts change), .007 to .05 for the cache.
@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "qwen3_moe")), "deepseek_v3"]
)
def test_a_conversation_stays_close(name):
    model = models.load(FIXTURES / name)
    exact = conversation(model)
    for flags, bound in (({"int8": True}, 0.15), ({"cache": True}, 0.08)):
        for one, other in zip(exact[:2], conversation(model, **flags)[:2]):
            chex.assert_equal_shape([one, other])
            assert 0 < np.sqrt(((one - other) ** 2).mean() / (one**2).mean()) < bound
    plain = conversation(model, fuse=False, int8=True)
    fused = conversation(model, int8=True)
    for one, other in zip(plain[:2], fused[:2]):  # joined matrices round alike, since outputs keep their own scale
        np.testing.assert_allclose(one, other, atol=2e-3 * np.abs(one).max())


def test_what_is_kept_in_eight_bits():
    model = models.load(FIXTURES / "qwen3_moe")
    *_, session, weights = conversation(model, int8=True, cache=True)
    layer = weights["layers"][0]
    assert {name for name, w in layer.items() if isinstance(w, Quantized)} == {
        "wqkv", "wo_out", "e_gate", "e_up", "e_down"
    }  # fmt: skip
    assert isinstance(weights["embed"], Quantized)
    assert not isinstance(weights["final_norm"], Quantized)
    assert session.keys[0].values.dtype == jnp.int8
    assert session.keys[0].scale.shape == (*session.keys[0].shape[:3], 1)
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    exact = conversation(model)
    assert size(session.keys) < 0.4 * size(exact[3].keys)  # heads of 8: a quarter, and a scale
    assert size(weights) < 0.5 * size(exact[4])


def test_a_sharded_session_equals_one_device():
    model = models.load(FIXTURES / "qwen3")
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    want = conversation(model, fuse=False, int8=True, cache=True)
    with use_mesh(mesh):
        got = conversation(models.load(FIXTURES / "qwen3", mesh=mesh), fuse=False, int8=True, cache=True)
    for one, other in zip(want[:2], got[:2]):
        np.testing.assert_allclose(one, other, atol=5e-3 * np.abs(one).max())
