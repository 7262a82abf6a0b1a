"""Supervised steps of a tiny DeepSeek-V3: latent attention, a dense first layer, groups of experts, on a mesh."""

from pathlib import Path

import jax
import numpy as np

import models
from models.sharding import make_mesh, shard_batch, use_mesh
from rl import finetune
from rl.losses import mean_metrics
from rl.optimizer import OptimizerConfig, init_state

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "models" / "deepseek_v3"
# Large eps: an update stays proportional to its gradient, so rounding of tiny gradients is not blown up.
CONFIG = finetune.SFTConfig(OptimizerConfig(lr=2e-3, eps=1e-3), micro_batches=2, logprob_chunk=8)


def steps(mesh, count: int):
    """(loss before each step, parameters after the first) of training on one batch."""
    model = models.load(FOLDER, mesh=mesh)
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(2, 300, (16, 10), dtype=np.int32), "mask": rng.random((16, 10)) < 0.8,
        "lengths": np.full(16, 10, np.int32),
    }  # fmt: skip
    losses, first = [], None
    with use_mesh(mesh):
        state, batch = init_state(model.params, CONFIG.optimizer), shard_batch(mesh, batch)
        for _ in range(count):
            state, metrics = finetune.jitted_sft_step()(state, batch, CONFIG, model.config)
            losses.append(mean_metrics(metrics)["loss"])
            first = jax.device_get(state.params) if first is None else first
    return losses, first


def test_steps_on_eight_devices_lower_the_loss_and_equal_those_of_one():
    before = jax.device_get(models.load(FOLDER).params)
    losses, params = steps(make_mesh(fsdp=2, expert=2, tensor=2), 8)
    assert losses[-1] < 0.9 * losses[0], losses
    alone, expected = steps(None, 1)
    np.testing.assert_allclose(losses[0], alone[0], rtol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected, before)
    assert moved["layers"].pop("router_bias") == 0  # it is no weight: it decides choices alone
    assert min(jax.tree.leaves(moved)) > 0  # dense first layer, latents, router, experts and all others

    def check(found, wanted, old):
        change = max(np.abs(wanted - old).max(), 1e-12)
        np.testing.assert_allclose(found - old, wanted - old, rtol=0, atol=1e-3 * change)

    jax.tree.map(check, params, expected, before)
