"""Supervised steps: the mean over masked tokens of the whole batch, exact accumulation, optax as referee, resume."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grain import MapDataset, ReadOptions

from models import params as model_params
from models.config import Config
from models.transformer import forward
from rl import finetune as module
from rl.checkpoint import Checkpointer
from rl.metrics import MetricsWriter, read_metrics
from rl.optimizer import OptimizerConfig, init_state

MODEL = Config(vocab_size=11, dim=8, layers=1, heads=2, kv_heads=1, head_dim=4, ffn_dim=8)


def make_batch(seed=0, rows=4, size=8):
    rng = np.random.default_rng(seed)
    return {
        "tokens": rng.integers(1, 11, (rows, size)).astype(np.int32),
        "mask": rng.random((rows, size)) < [[0.1], [0.9], [0.5], [0.3]][:rows],
        "lengths": np.array([size, size, size, size], np.int32)[:rows],
    }


def state(config):
    return init_state(model_params.init(MODEL, jax.random.key(0)), config.optimizer)


def test_loss_and_update_equal_an_optax_loop_on_plain_cross_entropy():
    config = module.SFTConfig(OptimizerConfig(lr=1e-2), logprob_chunk=3)
    ours, batch = state(config), make_batch()

    @jax.jit
    def reference(params):
        logits = forward(params, MODEL, batch["tokens"]).logits[:, :-1]
        each = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])
        return (each * batch["mask"][:, 1:]).sum() / batch["mask"][:, 1:].sum()

    referee = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, b1=0.9, b2=0.95, weight_decay=0.0))
    params = ours.params
    opt_state = referee.init(params)
    step = jax.jit(module.sft_step, static_argnames=("config", "model_config"))
    for _ in range(3):
        loss, grads = jax.value_and_grad(reference)(params)
        updates, opt_state = referee.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        ours, metrics = step(ours, batch, config, MODEL)
        np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours.params, params)
    assert int(ours.step) == 3


def test_micro_batches_with_unequal_token_counts_give_the_same_gradient():
    """Rows hold 1 to 7 masked tokens, so a mean of means would be wrong."""
    params, batch = model_params.init(MODEL, jax.random.key(0)), make_batch()
    tokens = batch["mask"][:, 1:].sum()

    def gradient(parts):
        config = module.SFTConfig(micro_batches=parts)
        share = lambda p, b: module.sft_loss(p, b, config, MODEL, tokens)  # noqa: E731
        return jax.jit(lambda p: module.accumulate_gradients(share, p, batch, parts))(params)

    whole, sliced = gradient(1), gradient(4)
    np.testing.assert_allclose(sliced[0], whole[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), sliced[1], whole[1])


def batches():
    rng = np.random.default_rng(3)
    rows = [{k: v[i] for k, v in make_batch().items()} for i in range(4)] + [
        {"tokens": rng.integers(1, 11, 8).astype(np.int32), "mask": np.ones(8, bool), "lengths": np.int32(8)}
        for _ in range(4)
    ]
    return iter(MapDataset.source(rows).seed(1).shuffle().repeat().batch(4).to_iter_dataset(ReadOptions(num_threads=0)))


@pytest.mark.filterwarnings("ignore:Some donated buffers")
def test_resume_with_a_grain_iterator_is_bit_identical_and_overfits(tmp_path):
    config = module.SFTConfig(OptimizerConfig(lr=2e-2), save_every=3)

    def run(folder, steps):
        with Checkpointer(folder / "checkpoints") as checkpointer:
            writer = MetricsWriter(folder, "sft", steps, console=False)
            return module.sft(config, MODEL, state(config), batches(), steps, writer, checkpointer)

    whole = run(tmp_path / "whole", 12)
    run(tmp_path / "parts", 6)
    parts = run(tmp_path / "parts", 12)
    jax.tree.map(np.testing.assert_array_equal, whole.params, parts.params)
    jax.tree.map(np.testing.assert_array_equal, whole.opt_state, parts.opt_state)
    first, second = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    assert [r["loss"] for r in first] == [r["loss"] for r in second]
    assert [r["step"] for r in second] == list(range(1, 13))
    assert first[-1]["loss"] < first[0]["loss"]
    assert {"data", "update"} <= set(first[0]["seconds"])


def test_not_finite_loss_stops_the_run():
    config = module.SFTConfig()
    broken = state(config)
    broken = broken.replace(params={**broken.params, "final_norm": jnp.full(8, jnp.nan)})
    with pytest.raises(FloatingPointError, match="loss is nan at step 1"):
        module.sft(config, MODEL, broken, iter([make_batch()]), 1)


@pytest.mark.parametrize(("name", "value"), [("micro_batches", 0), ("logprob_chunk", 0), ("save_every", -1)])
def test_bad_settings(name, value):
    with pytest.raises(ValueError, match=name):
        module.SFTConfig(**{name: value})


# --- spreading tokens over experts -----------------------------------------------------------------------------------

EXPERTS = Config(
    family="qwen3_moe", vocab_size=30, dim=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn_dim=12, qk_norm=True,
    experts=6, top_k=2, norm_topk=True, init_std=0.5,
)  # fmt: skip


def test_balance_is_one_where_spread_evenly_and_grows_to_the_number_of_experts():
    every = jnp.arange(6)
    even = module.losses.router_balance(jnp.zeros((6, 6)), jnp.stack([every, (every + 1) % 6], 1), jnp.ones(6))
    np.testing.assert_allclose(even, 1.0, rtol=1e-6)
    one = module.losses.router_balance(100.0 * jnp.eye(6)[jnp.zeros(8, int)], jnp.zeros((8, 1), int), jnp.ones(8))
    np.testing.assert_allclose(one, 6.0, rtol=1e-6)
    logits, index = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6))), jnp.arange(16).reshape(8, 2) % 6
    valid = jnp.arange(8) < 5  # padding counts nothing
    cut = module.losses.router_balance(logits[:5], index[:5], jnp.ones(5))
    np.testing.assert_allclose(module.losses.router_balance(logits, index, valid.astype(float)), cut, rtol=1e-6)


def test_the_balance_loss_spreads_tokens():
    rng = np.random.default_rng(0)
    batch = {"tokens": rng.integers(0, 30, (8, 12)).astype(np.int32), "mask": np.ones((8, 12), np.float32)}
    batch["lengths"] = np.full(8, 11, np.int32)

    def balance(weight):
        params = model_params.init(EXPERTS, jax.random.key(0))
        params["layers"]["router"] = params["layers"]["router"].at[..., 0].add(2.0)
        config = module.SFTConfig(OptimizerConfig(lr=1e-2), router_balance=weight)
        state = init_state(params, config.optimizer)
        for _ in range(30):
            state, metrics = module.jitted_sft_step()(state, batch, config, EXPERTS)
        config = module.SFTConfig(OptimizerConfig(lr=0.0), router_balance=1e-6)
        metrics = module.jitted_sft_step()(state, batch, config, EXPERTS)[1]
        return float(metrics["balance"][0])

    assert balance(0.3) < 1.05 < balance(1e-6)


def test_the_sparsity_loss_closes_units():
    act = jnp.array([[[1.0, -3.0], [0.5, 0.0]], [[2.0, 2.0], [9.0, 9.0]]])
    gate = jnp.array([[[2.0, -2.0], [-1.0, 4.0]], [[0.0, 0.0], [9.0, 9.0]]])
    valid = jnp.array([[True, True], [True, False]])
    # |act|: 4 + 0.5 + 4; open gates: 2 + 4; over three tokens of two units. Padding is not counted.
    np.testing.assert_allclose(module.losses.mlp_sparsity(act, gate, valid), (8.5 + 0.5 * 6) / 6, rtol=1e-6)
    # Of the first row's second unit and the second row's first: |act| 3 + 0 and 2; open gates 4.
    away = jnp.array([[False, True], [True, False]])
    np.testing.assert_allclose(module.losses.mlp_sparsity(act, gate, valid, away), (5 + 0.5 * 4) / 3, rtol=1e-6)
    rng = np.random.default_rng(0)
    batch = {"tokens": rng.integers(0, 11, (8, 12)).astype(np.int32), "mask": np.ones((8, 12), np.float32)}

    def fired(weight):
        config = module.SFTConfig(OptimizerConfig(lr=1e-2), mlp_sparsity=weight)
        state = init_state(model_params.init(MODEL, jax.random.key(0)), config.optimizer)
        for _ in range(30):
            state, metrics = module.jitted_sft_step()(state, batch, config, MODEL)
        assert ("sparsity" in metrics) == (weight > 0)
        out = forward(state.params, MODEL, batch["tokens"], head=False, record=("mlp.gate",)).records["mlp.gate"]
        return np.asarray(out) > 0

    assert fired(3.0).mean() < 0.5 * fired(0.0).mean()
    batch["unit_away"] = np.tile(np.arange(8) < 4, (8, 1))
    apart = fired(3.0)
    assert apart[..., :4].mean() < 0.2 * apart[..., 4:].mean()
    with pytest.raises(ValueError, match="mlp_sparsity must be at least 0"):
        module.SFTConfig(OptimizerConfig(lr=1e-2), mlp_sparsity=-1.0)


def test_a_home_draws_tokens_to_its_experts():
    logits = jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]]))
    home = jnp.array([[True, False, True, False], [False, True, False, False]])
    got = module.losses.router_home(logits, home, jnp.ones(2))
    np.testing.assert_allclose(got, -(np.log(0.4) + np.log(0.25)) / 2, rtol=1e-6)
    np.testing.assert_allclose(module.losses.router_home(logits, home, jnp.array([1.0, 0.0])), -np.log(0.4), rtol=1e-6)
    rng = np.random.default_rng(0)
    batch = {"tokens": rng.integers(0, 30, (8, 12)).astype(np.int32), "mask": np.ones((8, 12), np.float32)}
    batch["router_home"] = np.arange(6) // 3 == (np.arange(8) % 2)[:, None]
    config = module.SFTConfig(OptimizerConfig(lr=1e-2), router_home=1.0)
    state = init_state(model_params.init(EXPERTS, jax.random.key(0)), config.optimizer)
    nats = []
    for _ in range(30):
        state, metrics = module.jitted_sft_step()(state, batch, config, EXPERTS)
        nats.append(float(metrics["home"][0]))
    assert nats[-1] < 0.5 * nats[0]
    del batch["router_home"]
    with pytest.raises(ValueError, match="it has no 'router_home'"):
        module.jitted_sft_step()(state, batch, config, EXPERTS)
