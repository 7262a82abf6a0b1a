"""Chunked log-probs equal the plain log-softmax, in value and gradient, and never hold [B, T, V] float32."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import params as model_params
from models.config import Config
from models.transformer import forward
from rl.logprobs import selection, token_logprobs

CONFIG = Config(vocab_size=37, dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn_dim=16)


def plain(params, config, ids, lengths, temperature):
    logp = jax.nn.log_softmax(forward(params, config, ids).logits[:, :-1] / temperature)
    probs = jnp.exp(logp)
    chosen = jnp.take_along_axis(logp, ids[:, 1:, None], axis=-1)[..., 0]
    keep = jnp.arange(ids.shape[1]) < lengths[:, None]
    pad = ((0, 0), (1, 0))
    return jnp.where(keep, jnp.pad(chosen, pad), 0.0), jnp.where(keep, jnp.pad(-(probs * logp).sum(-1), pad), 0.0)


@pytest.mark.parametrize(("tied", "chunk"), [(True, 5), (False, 5), (False, 1), (True, 64)])
def test_value_gradient_and_entropy_equal_plain_log_softmax(tied, chunk):
    config = CONFIG.replace(tie_embeddings=tied)
    params = model_params.init(config, jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (3, 12), 0, 37)
    lengths, weights = jnp.array([12, 7, 1]), jax.random.normal(jax.random.key(2), (3, 12))

    def loss(function):
        def run(params):
            logp, entropy = function(params)
            return (weights * (logp + 0.3 * entropy)).sum(), (logp, entropy)

        return jax.jit(jax.value_and_grad(run, has_aux=True))(params)

    (_, ours), gradient = loss(lambda p: token_logprobs(p, config, ids, lengths, 0.7, chunk, entropy=True))
    (_, theirs), reference = loss(lambda p: plain(p, config, ids, lengths, 0.7))
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-5)
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5)
    assert (ours[0][:, 0] == 0).all()
    assert (ours[0][1, 7:] == 0).all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), gradient, reference)


def buffers(jaxpr):
    """Shapes of every value in a jaxpr and the jaxprs inside it."""
    for eqn in jaxpr.eqns:
        for out in eqn.outvars:
            yield getattr(out.aval, "shape", ())
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from buffers(inner)


def test_no_full_vocabulary_buffer_forward_or_backward():
    config = CONFIG.replace(vocab_size=4096, dim=8, heads=1, head_dim=8)
    params = model_params.init(config, jax.random.key(0))
    B, T, chunk = 4, 129, 16
    ids = jnp.zeros((B, T), jnp.int32)

    def loss(params, chunk):
        return token_logprobs(params, config, ids, chunk=chunk).sum()

    def largest(chunk):
        jaxpr = jax.make_jaxpr(jax.grad(lambda p: loss(p, chunk)))(params).jaxpr
        return max(int(np.prod(shape)) for shape in buffers(jaxpr) if 4096 in shape)

    full = B * (T - 1) * 4096
    assert largest(T) == full  # the check sees a full buffer when there is one
    assert largest(chunk) <= B * chunk * 4096
    compiled = jax.jit(jax.grad(lambda p: loss(p, chunk))).lower(params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * full


def test_bad_arguments():
    params = model_params.init(CONFIG, jax.random.key(0))
    with pytest.raises(ValueError, match="chunk"):
        token_logprobs(params, CONFIG, jnp.zeros((1, 4), jnp.int32), chunk=0)
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(params, CONFIG, jnp.zeros((1, 4), jnp.int32), temperature=0.0)


def test_packed_rows_equal_separate_rows():
    params = model_params.init(CONFIG, jax.random.key(0))
    first = jax.random.randint(jax.random.key(1), (1, 5), 0, 37)
    second = jax.random.randint(jax.random.key(2), (1, 4), 0, 37)
    packed = jnp.concatenate([first, second], axis=1)
    positions = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    segments = jnp.array([[1] * 5 + [2] * 4])
    logp = token_logprobs(params, CONFIG, packed, positions=positions, segment_ids=segments)
    np.testing.assert_allclose(logp[:, 1:5], token_logprobs(params, CONFIG, first)[:, 1:], atol=1e-5)
    np.testing.assert_allclose(logp[:, 6:], token_logprobs(params, CONFIG, second)[:, 1:], atol=1e-5)


def test_selected_columns_equal_all_columns_and_the_rest_is_zero():
    config, params, ids = _tiny_for_selection()
    rng = np.random.default_rng(0)
    mask = rng.random(ids.shape) < 0.2
    mask[:, 0] = False
    mask[1] = False
    select = selection(mask, smallest=16)
    assert select.shape[1] < ids.shape[1]

    def total(params, select):
        logp = token_logprobs(params, config, ids, chunk=8, select=select)
        return (logp * mask).sum(), logp

    (one, all_columns), grad_all = jax.value_and_grad(total, has_aux=True)(params, None)
    (two, some), grad_some = jax.value_and_grad(total, has_aux=True)(params, select)
    chex.assert_trees_all_close(jnp.where(mask, all_columns, 0), jnp.where(mask, some, 0), atol=1e-6)
    chex.assert_trees_all_close((one, grad_all), (two, grad_some), atol=1e-5)
    outside = np.ones(ids.shape, bool)
    outside[np.arange(len(ids))[:, None], select] = False
    assert not np.asarray(some)[outside].any()


def test_selection_is_none_when_it_would_save_nothing():
    assert selection(np.ones((2, 32), bool)) is None


def _tiny_for_selection():
    config = Config(vocab_size=37, dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn_dim=24)
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 37, (3, 64)), jnp.int32)
    return config, model_params.init(config, jax.random.key(0)), ids
