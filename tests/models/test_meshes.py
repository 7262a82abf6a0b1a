"""Every mesh of eight devices computes what one device computes: forward, train steps, sampling; float32 1e-5."""

import functools

import jax
import numpy as np
import pytest

import models
from models import Config
from models.layout import decode_weights
from models.sample import decode, extend, prefill
from models.sharding import AXES, make_mesh, shard_batch, use_mesh
from rl import finetune, policy
from rl.losses import mean_metrics
from rl.optimizer import OptimizerConfig, init_state

ALL = [
    dict(zip(AXES, (2**a, 2**b, 2**c, 2 ** (3 - a - b - c)), strict=True))
    for a in range(4)
    for b in range(4 - a)
    for c in range(4 - a - b)
]
SIZES = {"vocab_size": 32, "dim": 16, "layers": 1, "head_dim": 4, "ffn_dim": 16, "init_std": 0.4}
CONFIGS = {
    "dense": Config(**SIZES, heads=8, kv_heads=4, qk_norm=True),
    "experts": Config(
        **SIZES, heads=4, kv_heads=2, family="qwen3_moe", qk_norm=True, experts=8, top_k=2, norm_topk=True,
        tie_embeddings=False,
    ),
    "latent": Config(
        **SIZES | {"layers": 2}, heads=4, kv_heads=4, family="deepseek_v3", kv_lora=8, q_lora=8, rope_dim=2,
        value_dim=4, experts=8, top_k=2, groups=4, top_groups=2, router_score="sigmoid", norm_topk=True, shared_dim=16,
        first_dense=1, dense_ffn_dim=16, tie_embeddings=False,
    ),
    "odd": Config(**SIZES | {"vocab_size": 33, "ffn_dim": 18}, heads=6, kv_heads=3, qk_norm=True),
}  # fmt: skip
# Large eps: an update stays proportional to its gradient, so rounding of tiny gradients is not blown up.
OPTIMIZER = OptimizerConfig(lr=1e-2, eps=1e-3)
SFT = finetune.SFTConfig(OPTIMIZER, micro_batches=2, logprob_chunk=8)
GRPO = policy.GRPOConfig(OPTIMIZER, prompts_per_step=2, group_size=4, minibatches=1, kl_coef=0.1, logprob_chunk=8)


def name_of(axes: dict[str, int]) -> str:
    return "-".join(f"{name}{size}" for name, size in axes.items() if size > 1)


def close(found, expected):
    """Equal to 1e-5 of the largest value."""

    def check(a, b):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(float(np.abs(b).max()), 1e-3))

    jax.tree.map(check, found, expected)


@functools.cache
def weights_of(name: str):
    return jax.device_get(models.init(CONFIGS[name], jax.random.key(0)))


def placed(name: str, mesh):
    """The same weights on any mesh."""
    params, where = weights_of(name), None if mesh is None else models.shardings(CONFIGS[name], mesh)
    return jax.device_put(params, where)


@functools.cache
def tokens(rows: int, vocab: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, vocab, (rows, 8)).astype(np.int32)


def forward(name: str, mesh, rows: int):
    config = CONFIGS[name]
    with use_mesh(mesh):
        params = placed(name, mesh)
        ids = shard_batch(mesh, tokens(rows, config.vocab_size))
        return np.asarray(jax.jit(lambda p, t: models.forward(p, config, t).logits)(params, ids))


def supervised(name: str, mesh, rows: int):
    config, rng = CONFIGS[name], np.random.default_rng(1)
    batch = {"tokens": tokens(rows, config.vocab_size), "mask": rng.random((rows, 8)) < 0.7}
    with use_mesh(mesh):
        state = init_state(placed(name, mesh), OPTIMIZER)
        state, metrics = finetune.jitted_sft_step()(state, shard_batch(mesh, batch), SFT, config)
    return mean_metrics(metrics), jax.device_get(state.params)


def reinforced(name: str, mesh, rows: int):
    config, rng = CONFIGS[name], np.random.default_rng(2)
    values = rng.normal(size=(4, rows, 8)).astype(np.float32)
    batch = policy.Batch(
        ids=tokens(rows, config.vocab_size), lengths=np.full(rows, 8, np.int32), row=np.arange(rows, dtype=np.int32),
        mask=(rng.random((rows, 8)) < 0.7).astype(np.float32) * (np.arange(8) > 1), advantages=values[0],
        sampler_logprobs=values[1], old_logprobs=-3.5 + 0.1 * values[2], ref_logprobs=-3.5 + 0.1 * values[3],
    )  # fmt: skip
    start = init_state(placed(name, mesh), OPTIMIZER)
    state, metrics = policy.update(start, batch, GRPO, config, 1, mesh)
    return metrics, jax.device_get(state.params)


def sampled(name: str, mesh, rows: int):
    """Greedy: prefill, decode, extend, decode."""
    config, rng = CONFIGS[name], np.random.default_rng(3)
    prompts, lengths = tokens(rows, config.vocab_size)[: rows // 2], np.arange(rows // 2, dtype=np.int32) % 4 + 5
    new, counts = rng.integers(1, 32, (rows, 3)).astype(np.int32), np.arange(rows, dtype=np.int32) % 4
    limits, key = np.full(rows, 4, np.int32), jax.random.key(0)
    with use_mesh(mesh):
        weights = decode_weights(placed(name, mesh), config, fuse=False)
        session = prefill(weights, config, prompts, lengths, 24, repeat=2)
        first, session = decode(weights, config, session, key, limits, temperature=0.0, longest=8, steps=4)
        session = extend(weights, config, session, new, counts, 15)
        second, session = decode(weights, config, session, key, limits, temperature=0.0, longest=15, steps=4)
    parts = [jax.tree.map(np.asarray, decoded) for decoded in (first, second)]
    return [p.tokens for p in parts], [p.logprobs for p in parts], np.asarray(session.logits)


CASES = {
    "dense": (forward, supervised, reinforced, sampled), "experts": (forward, supervised, reinforced, sampled),
    "latent": (forward,), "odd": (forward, supervised, sampled),
}  # fmt: skip


@functools.cache
def alone(run, name: str, rows: int):
    return run(name, None, rows)


def agrees(run, name: str, axes: dict[str, int], rows: int = 8):
    found, expected = run(name, make_mesh(**axes), rows), alone(run, name, rows)
    if run is sampled:
        np.testing.assert_array_equal(found[0], expected[0])
        found, expected = found[1:], expected[1:]
    close(found, expected)


PAIRS = [pytest.param(name, run, id=f"{name}-{run.__name__}") for name, runs in CASES.items() for run in runs]
# The default run: every pair of axes meets in one of these meshes; the whole product is left to the slow run.
SOME = [
    ("dense", sampled, {"fsdp": 8}),
    ("dense", reinforced, {"data": 2, "fsdp": 2, "expert": 2}),
    ("odd", supervised, {"data": 2, "tensor": 4}),
    ("experts", supervised, {"fsdp": 2, "expert": 2, "tensor": 2}),
    ("experts", sampled, {"data": 2, "expert": 2, "tensor": 2}),
    ("latent", forward, {"fsdp": 4, "expert": 2}),
]


def test_there_are_twenty_meshes():
    assert len(ALL) == 20
    assert all(make_mesh(**axes).size == 8 for axes in ALL)


@pytest.mark.parametrize(
    ("name", "run", "axes"), SOME, ids=[f"{name}-{run.__name__}-{name_of(axes)}" for name, run, axes in SOME]
)
def test_some_meshes(name, run, axes):
    agrees(run, name, axes)


@pytest.mark.slow
@pytest.mark.parametrize("axes", ALL, ids=name_of)
@pytest.mark.parametrize(("name", "run"), PAIRS)
def test_every_mesh(name, run, axes):
    agrees(run, name, axes)
    jax.clear_caches()  # hundreds of programs in one process run into the system's limit of memory maps


def test_rows_that_no_axis_divides():
    agrees(sampled, "dense", {"data": 2, "fsdp": 2, "tensor": 2}, rows=6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "run"), [(n, r) for n in ("dense", "experts") for r in (forward, sampled)])
def test_rows_that_no_axis_divides_everywhere(name, run):
    for axes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"expert": 4, "fsdp": 2}, {"data": 8}):
        agrees(run, name, axes, rows=6)
