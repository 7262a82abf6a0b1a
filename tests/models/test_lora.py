"""Low-rank changes: what they compute, what of them is trained, and what is left of them in a saved folder."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models import lora
from models.layout import decode_weights
from models.linear import Adapted
from models.params import abstract
from models.sample import decode, prefill
from models.sharding import make_mesh, shard_batch, use_mesh
from rl.checkpoint import Checkpointer
from rl.finetune import SFTConfig, sft_step
from rl.optimizer import OptimizerConfig, abstract_state, init_state

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "models"
# Every kind of matrix: with heads going out and coming in, of a network, of experts, of latents, router and head.
MATRICES = {
    "qwen3_untied": ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down", "embed", "head"),
    "qwen3_moe": ("wq", "wo", "e_gate", "e_up", "e_down", "router"),
    "deepseek_v3": ("wq_a", "wq_b", "wkv_a", "wkv_b", "wo", "w_up", "e_down", "s_gate"),
}
TOKENS = np.random.default_rng(0).integers(0, 60, (4, 9), dtype=np.int32)


def changed(name: str, mesh=None):
    """A fixture with changes that are not 0, and its config."""
    model = models.load(FIXTURES / name, mesh=mesh)
    config = model.config.replace(lora_rank=3, lora_on=MATRICES[name], lora_alpha=6.0)
    params = lora.add(model.params, config, jax.random.key(1), mesh)

    def fill(p):
        if not isinstance(p, Adapted):
            return p
        noise = 0.05 * np.random.default_rng(p.b.size).standard_normal(p.b.shape).astype(np.float32)
        return p.replace(b=jax.device_put(noise, p.b.sharding))

    return model, jax.tree.map(fill, params, is_leaf=lambda p: isinstance(p, Adapted)), config


@pytest.mark.parametrize("name", MATRICES)
def test_new_changes_change_nothing_and_filled_ones_equal_their_merged_model(name):
    model, params, config = changed(name)
    fresh = lora.add(model.params, config, jax.random.key(1))
    adapted = [p for p in jax.tree.leaves(fresh, is_leaf=lambda p: isinstance(p, Adapted)) if isinstance(p, Adapted)]
    assert len(adapted) >= len(MATRICES[name])
    assert jax.tree.map(lambda x: x.shape, fresh) == jax.tree.map(lambda x: x.shape, abstract(config))
    own = models.forward(model.params, model.config, TOKENS).logits
    np.testing.assert_array_equal(models.forward(fresh, config, TOKENS).logits, own)
    logits = models.forward(params, config, TOKENS).logits
    merged, plain = lora.merge(params, config)
    assert not plain.lora_rank
    assert jax.tree.map(lambda x: (x.shape, x.dtype), merged) == jax.tree.map(
        lambda x: (x.shape, x.dtype), model.params
    )
    scale = np.abs(logits).max()
    assert np.abs(logits - own).max() > 0.01 * scale
    np.testing.assert_allclose(logits, models.forward(merged, plain, TOKENS).logits, atol=2e-5 * scale)


@pytest.mark.parametrize("name", MATRICES)
def test_the_sampler_and_a_saved_folder_have_the_merged_weights(name, tmp_path):
    model, params, config = changed(name)
    lengths = np.full(4, 9, np.int32)
    weights = decode_weights(params, config)
    session = prefill(weights, config, TOKENS, lengths, 24)
    logits = models.forward(params, config, TOKENS).logits[:, -1]
    np.testing.assert_allclose(session.logits, logits, atol=1e-4 * np.abs(logits).max())
    out, _ = decode(weights, config, session, jax.random.key(0), np.full(4, 3), temperature=0.0)
    models.save(model.replace(params=params, config=config), tmp_path / "saved")
    saved = models.load(tmp_path / "saved")
    assert saved.config == model.config
    again = models.forward(saved.params, saved.config, TOKENS).logits[:, -1]
    np.testing.assert_allclose(again, logits, atol=1e-4 * np.abs(logits).max())
    np.testing.assert_array_equal(out.tokens[:, 0], again.argmax(-1))


def test_gradients_are_those_of_the_chain_rule_through_the_whole_matrix():
    """w + s a b has the gradients s dW b^T and s a^T dW, with dW the gradient of the plain matrix."""
    _, params, config = changed("qwen3_untied")
    merged, plain = lora.merge(params, config)
    trained, frozen = lora.split(params)

    def loss(params, config):
        return (models.forward(params, config, TOKENS).logits ** 2).mean()

    grads = jax.grad(lambda t: loss(lora.combine(t, frozen), config))(trained)
    whole = jax.grad(lambda p: loss(p, plain))(merged)
    for name, ins in (("wq", 1), ("wo", 2), ("w_down", 1)):
        p, dw = params["layers"][name], np.asarray(whole["layers"][name])
        L, r = p.a.shape[0], config.lora_rank
        a, b = np.asarray(p.a).reshape(L, -1, r), np.asarray(p.b).reshape(L, r, -1)
        dw = dw.reshape(L, int(np.prod(dw.shape[1 : 1 + ins])), -1)
        got = grads["layers"][name]
        want_a, want_b = p.scale * dw @ b.swapaxes(1, 2), p.scale * a.swapaxes(1, 2) @ dw
        np.testing.assert_allclose(np.asarray(got["a"]).reshape(L, -1, r), want_a, atol=1e-5 * np.abs(want_a).max())
        np.testing.assert_allclose(np.asarray(got["b"]).reshape(L, r, -1), want_b, atol=1e-5 * np.abs(want_b).max())


def batch():
    return {"tokens": TOKENS, "mask": np.ones(TOKENS.shape, np.float32)}


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_moves_the_changes_alone_and_keeps_moments_of_nothing_else(micro_batches):
    model, _, config = changed("qwen3_moe")
    params = lora.add(model.params, config, jax.random.key(1))
    options = SFTConfig(OptimizerConfig(lr=1e-2), micro_batches=micro_batches)
    state = init_state(params, options.optimizer)
    assert jax.tree.map(lambda x: x.shape, state) == jax.tree.map(
        lambda x: x.shape, abstract_state(abstract(config), options.optimizer)
    )
    small = sum(x.size for x in jax.tree.leaves(lora.split(params)[0]))
    assert sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim) == 2 * small
    losses = []
    for _ in range(12):
        state, metrics = jax.jit(sft_step, static_argnums=(2, 3))(state, batch(), options, config)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert losses[-1] < 0.9 * losses[0]
    before, after = lora.split(params), lora.split(state.params)
    assert all(bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, (before[0], after[0]))))
    jax.tree.map(np.testing.assert_array_equal, before[1], after[1])


def test_a_sharded_step_is_that_of_one_device():
    _, params, config = changed("qwen3_moe")
    mesh = make_mesh(data=2, fsdp=2, expert=1, tensor=2)
    options = SFTConfig(OptimizerConfig(lr=1e-2))
    step = jax.jit(sft_step, static_argnums=(2, 3))
    alone, metrics = step(init_state(params, options.optimizer), batch(), options, config)
    _, params, _ = changed("qwen3_moe", mesh)
    assert not params["layers"]["wq"].b.sharding.is_fully_replicated
    state = init_state(params, options.optimizer)
    with use_mesh(mesh):
        spread, more = step(state, shard_batch(mesh, batch()), options, config)
    np.testing.assert_allclose(more["loss"][0], metrics["loss"][0], rtol=1e-5)
    np.testing.assert_allclose(more["grad_norm"][0], metrics["grad_norm"][0], rtol=1e-4)
    # Moments, not weights: Adam's first step is the sign of a gradient, also where that is nearly 0.
    for one, other in zip(*map(jax.tree.leaves, (alone.opt_state, spread.opt_state))):
        np.testing.assert_allclose(one, other, atol=1e-4 * max(np.abs(one).max(), 1e-9))


def test_a_checkpoint_goes_on_bit_for_bit(tmp_path):
    _, params, config = changed("qwen3_untied")
    options = SFTConfig(OptimizerConfig(lr=1e-2))
    step = jax.jit(sft_step, static_argnums=(2, 3))
    state = step(init_state(params, options.optimizer), batch(), options, config)[0]
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        restored = checkpointer.restore(abstract_state(abstract(config), options.optimizer)).state
    one, other = step(state, batch(), options, config)[0], step(restored, batch(), options, config)[0]
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_wrong_settings_name_the_field(key):
    model = models.load(FIXTURES / "qwen3_untied")
    with pytest.raises(ValueError, match=r"lora_on names \['e_gate'\].*it has .*w_down.*wq"):
        lora.add(model.params, model.config.replace(lora_rank=2, lora_on=("wq", "e_gate")), key)
    with pytest.raises(ValueError, match="lora_rank is 0"):
        lora.add(model.params, model.config, key)
    with pytest.raises(ValueError, match="lora_rank must be at least 0"):
        model.config.replace(lora_rank=-1)


def test_experts_are_removed_from_merged_models_only(key):
    _, params, config = changed("qwen3_moe")
    from models.moe import keep_experts

    mask = np.ones((config.moe_layers, config.experts), bool)
    with pytest.raises(ValueError, match=r"merge the low-rank changes"):
        keep_experts(params, config, mask)
    assert jnp.isfinite(keep_experts(*lora.merge(params, config), mask)[0]["layers"]["router"]).all()
