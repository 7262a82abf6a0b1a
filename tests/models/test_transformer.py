"""The decoder's parts by hand, and what padding, packing, windows and recomputation must not change."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models import Config
from models.attention import Look, attention
from models.linear import product_float32
from models.taps import Taps
from models.transformer import apply_rope, forward, rms_norm, rope_table, unembed

CONFIG = Config(
    vocab_size=40, dim=16, layers=2, heads=4, kv_heads=2, head_dim=6, ffn_dim=20, qk_norm=True, init_std=0.4
)


@pytest.fixture(scope="module")
def params():
    return models.init(CONFIG, jax.random.key(1))


def _tokens(rng, *shape):
    return rng.integers(0, 40, shape, dtype=np.int32)


def test_rms_norm_by_hand():
    x = jnp.array([[3.0, 4.0]])
    config = CONFIG.replace(norm_eps=0.0)
    y = rms_norm(x, jnp.array([1.0, 2.0]), config)
    np.testing.assert_allclose(y, np.array([[3.0, 8.0]]) / np.sqrt(12.5), rtol=1e-6)
    offset = rms_norm(x, jnp.array([0.0, 1.0]), config.replace(norm_offset=True))  # multiplies by 1 + scale
    np.testing.assert_allclose(offset, y, rtol=1e-6)
    assert rms_norm(x.astype(jnp.bfloat16), jnp.ones(2), CONFIG).dtype == jnp.bfloat16


def test_rope_turns_pairs_and_depends_on_distance_only(rng):
    config = CONFIG.replace(head_dim=4, rope_theta=100.0)
    rope = rope_table(jnp.array([[2]]), config)
    x = jnp.array([1.0, 0.0, 0.0, 1.0]).reshape(1, 1, 1, 4)  # pairs (0, 2) at frequency 1, (1, 3) at 1/10
    expected = [np.cos(2.0), -np.sin(0.2), np.sin(2.0), np.cos(0.2)]
    np.testing.assert_allclose(apply_rope(x, rope).reshape(4), expected, atol=1e-6)
    q, k = rng.standard_normal((2, 1, 1, 1, 4)).astype(np.float32)
    turn = lambda v, at: apply_rope(jnp.asarray(v), rope_table(jnp.array([[at]]), config))  # noqa: E731
    near, far = jnp.sum(turn(q, 7) * turn(k, 3)), jnp.sum(turn(q, 107) * turn(k, 103))
    np.testing.assert_allclose(near, far, rtol=1e-4)


def test_attention_equals_repeated_heads(rng):
    q, k, v = (rng.standard_normal((2, 5, n, 6)).astype(np.float32) for n in (4, 2, 2))
    mask = np.tril(np.ones((1, 5, 5), bool))
    ours = attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), Look(jnp.arange(5)[None]), CONFIG, Taps())
    k, v = np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2)
    scores = np.where(mask[:, None], np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(6), -np.inf)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    np.testing.assert_allclose(ours, np.einsum("bnts,bsnh->btnh", probs, v), atol=1e-5)


def test_masks():
    look = Look(jnp.arange(4)[None])
    np.testing.assert_array_equal(look.mask(4)[0], np.tril(np.ones((4, 4), bool)))
    np.testing.assert_array_equal(look.replace(window=jnp.int32(2)).mask(4)[0].sum(-1), [1, 2, 2, 2])
    packed = look.replace(segments=jnp.array([[1, 1, 2, 2]])).mask(4)[0]
    np.testing.assert_array_equal(packed.astype(int), [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]])


def test_padding_on_the_right_changes_nothing(params, rng):
    tokens = _tokens(rng, 2, 9)
    short = forward(params, CONFIG, tokens[:, :6]).logits
    np.testing.assert_allclose(forward(params, CONFIG, tokens).logits[:, :6], short, atol=1e-5)


def test_packed_sequences_equal_separate_ones(params, rng):
    a, b = _tokens(rng, 1, 5), _tokens(rng, 1, 4)
    packed = forward(
        params, CONFIG, np.concatenate([a, b], axis=1),
        positions=jnp.array([[*range(5), *range(4)]]), segment_ids=jnp.array([[1] * 5 + [2] * 4]),
    ).logits  # fmt: skip
    np.testing.assert_allclose(packed[:, :5], forward(params, CONFIG, a).logits, atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:], forward(params, CONFIG, b).logits, atol=1e-5)


def test_a_sliding_window_limits_what_a_token_sees(params, rng):
    config = CONFIG.replace(sliding_window=3, layers=1)
    one = jax.tree.map(lambda w: w[:1], params["layers"])
    tokens = _tokens(rng, 1, 8)
    changed = tokens.copy()
    changed[0, 2] = (changed[0, 2] + 1) % 40
    difference = np.abs(
        forward(params | {"layers": one}, config, tokens).logits
        - forward(params | {"layers": one}, config, changed).logits
    ).max(-1)[0]
    assert (difference[[2, 3, 4]] > 1e-4).all()
    assert (difference[[0, 1, 5, 6, 7]] == 0).all()


@pytest.mark.parametrize("remat", ["block", "products"])
def test_recomputation_gives_the_same_gradients(remat, params, rng):
    tokens = _tokens(rng, 2, 6)

    def loss(params, config):
        return jnp.mean(forward(params, config, tokens).logits ** 2)

    plain, again = (jax.jit(jax.grad(loss), static_argnums=1)(params, CONFIG.replace(remat=r)) for r in ("none", remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, again)


def test_logits_in_half_precision_send_back_a_rounded_gradient(rng):
    """Value in float32 and both gradients in the dtype of the operands, as close to float32's as that dtype is."""
    x, w, g = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((2, 5, 16), (16, 40), (2, 5, 40)))
    out, back = jax.vjp(product_float32, x, w)
    dx, dw = back(g.astype(jnp.float32))
    assert (out.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    wide = [a.astype(jnp.float32) for a in (x, w, g)]
    np.testing.assert_allclose(out, wide[0] @ wide[1], atol=1e-4)
    np.testing.assert_allclose(dx.astype(jnp.float32), wide[2] @ wide[1].T, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(
        dw.astype(jnp.float32), jnp.einsum("btd,btv->dv", wide[0], wide[2]), rtol=1e-2, atol=1e-2
    )
    text = jax.jit(jax.grad(lambda x, w: product_float32(x, w).sum(), argnums=(0, 1))).lower(x, w).as_text()
    assert not re.search(r"dot_general.*\(tensor<[0-9x]*f32>", text)  # no product of float32


def test_the_head_can_be_left_out(params, rng):
    tokens = _tokens(rng, 2, 6)
    whole, hidden = forward(params, CONFIG, tokens), forward(params, CONFIG, tokens, head=False)
    assert hidden.logits is None
    np.testing.assert_allclose(unembed(params, CONFIG, hidden.hidden), whole.logits, atol=1e-6)
    untied = CONFIG.replace(tie_embeddings=False)
    np.testing.assert_allclose(
        unembed(params | {"head": params["embed"].T}, untied, hidden.hidden), whole.logits, atol=1e-6
    )


def test_bfloat16_activations_keep_float32_logits(params, rng):
    tokens = _tokens(rng, 2, 6)
    out = forward(params, CONFIG.replace(dtype="bfloat16"), tokens)
    exact = forward(params, CONFIG, tokens)
    assert out.hidden.dtype == jnp.bfloat16
    assert out.logits.dtype == jnp.float32
    assert np.abs(out.logits - exact.logits).max() < 0.1 * np.abs(exact.logits).max()


def test_wrong_rank_is_refused(params):
    with pytest.raises(AssertionError, match="rank"):
        forward(params, CONFIG, jnp.zeros(3, jnp.int32))
