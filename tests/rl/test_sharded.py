"""Train steps on eight emulated devices equal one device: loss and updated weights, float32 1e-5."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from models import params as model_params
from models.config import Config
from models.sharding import make_mesh, shard_batch, use_mesh
from rl import finetune as sft
from rl import policy as grpo
from rl.losses import mean_metrics
from rl.optimizer import OptimizerConfig, init_state

_SPEC = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny)

MODEL = Config(vocab_size=16, dim=8, layers=2, heads=2, kv_heads=2, head_dim=4, ffn_dim=16, tie_embeddings=False)
MESHES = {"data=8": {"data": 8}, "fsdp=4 x tensor=2": {"fsdp": 4, "tensor": 2}}
# Adam divides by a gradient's own size, so its first step would blow rounding of tiny gradients up to 1e-5 of itself;
# a large eps keeps the update proportional to the gradient and the comparison about the gradient.
OPTIMIZER = OptimizerConfig(lr=1e-2, eps=1e-3)


def state(mesh):
    return init_state(model_params.init(MODEL, jax.random.key(0), mesh=mesh), OPTIMIZER)


def compare(one, many, metrics, other, mesh):
    a, b = mean_metrics(metrics), mean_metrics(other)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert b[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(np.asarray(y), np.asarray(x), atol=1e-5), one.params, many.params
    )
    # Weights and moments stay where the table puts them.
    wanted = model_params.shardings(MODEL, mesh)
    for tree in (many.params, many.opt_state[1][0].mu, many.opt_state[1][0].nu):
        jax.tree.map(lambda x, s: pytest.fail(str(x.sharding)) if not x.sharding.is_equivalent_to(s, x.ndim) else None,
                     tree, wanted)  # fmt: skip


@pytest.mark.parametrize("name", list(MESHES))
def test_supervised_step(name):
    mesh, rng = make_mesh(**MESHES[name]), np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(1, 16, (16, 8)).astype(np.int32),
        "mask": rng.random((16, 8)) < np.linspace(0.1, 0.9, 16)[:, None],
    }
    config = sft.SFTConfig(OPTIMIZER, micro_batches=2, logprob_chunk=4)
    step = sft.jitted_sft_step()
    one, metrics = step(state(None), batch, config, MODEL)
    with use_mesh(mesh):
        many, other = step(state(mesh), shard_batch(mesh, batch), config, MODEL)
    compare(one, many, metrics, other, mesh)


def test_muon_step():
    mesh, rng = make_mesh(fsdp=4, tensor=2), np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(1, 16, (16, 8)).astype(np.int32),
        "mask": rng.random((16, 8)) < np.linspace(0.1, 0.9, 16)[:, None],
    }
    optimizer = dataclasses.replace(OPTIMIZER, muon_lr=0.02)
    config = sft.SFTConfig(optimizer, logprob_chunk=4)
    start = lambda mesh: init_state(model_params.init(MODEL, jax.random.key(0), mesh=mesh), optimizer)  # noqa: E731
    one, _ = sft.jitted_sft_step()(start(None), batch, config, MODEL)
    with use_mesh(mesh):
        many, _ = sft.jitted_sft_step()(start(mesh), shard_batch(mesh, batch), config, MODEL)
    # Newton-Schulz amplifies the rounding of small singular values, so the bound is wider than Adam's.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(np.asarray(y), np.asarray(x), atol=1e-4), one.params, many.params
    )
    wanted = model_params.shardings(MODEL, mesh)
    placed = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), many.params, wanted)
    assert all(jax.tree.leaves(placed))


@pytest.mark.parametrize("name", list(MESHES))
def test_policy_step(name):
    """The whole update of a rollout: old log-probs in one forward, two minibatches of eight rows."""
    mesh = make_mesh(**MESHES[name])
    config = tiny.grpo_config(optimizer=OPTIMIZER, prompts_per_step=4, clip_high=0.01, clip_low=0.01)
    trajectory, _, _ = tiny.rollout(tiny.params(), next(tiny.Prompts(4)), jax.random.key(0))
    rewards = np.random.default_rng(0).normal(size=16).astype(np.float32)
    batch, _ = grpo.make_batch(trajectory, rewards, config)

    def run(mesh):
        start = state(mesh)
        filled = grpo.add_logprobs(batch, start.params, config, MODEL, mesh=mesh)
        end, scalars = grpo.update(start, filled, config, MODEL, 1, mesh)
        return filled.old_logprobs, end, {name: (value, 1.0) for name, value in scalars.items()}

    old, one, metrics = run(None)
    sharded_old, many, other = run(mesh)
    np.testing.assert_allclose(sharded_old, old, atol=1e-5)
    compare(one, many, metrics, other, mesh)
