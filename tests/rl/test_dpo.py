"""Preference optimisation: the worked numbers of arXiv 2505.16834, masks, reference, sharding, the loop."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.sharding import make_mesh, shard_batch, use_mesh
from models.transformer import forward
from rl import dpo as module
from rl.checkpoint import Checkpointer
from rl.metrics import MetricsWriter, read_metrics
from rl.optimizer import OptimizerConfig, init_state
from rl.rows import stack_rows

_SPEC = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny)

# A large eps keeps Adam's step proportional to the gradient, so that steps can be compared.
CONFIG = module.DPOConfig(OptimizerConfig(lr=1e-2, eps=1.0), logprob_chunk=4)


def pairs(count=8, seed=0):
    """Rows of unequal length: a prompt of two tokens, policy tokens, two of a tool, policy tokens."""
    rng = np.random.default_rng(seed)

    def row(shortest):
        ids = rng.integers(1, 11, rng.integers(shortest, 10)).tolist()
        return ids, [t >= 2 and t not in (3, 4) for t in range(len(ids))]

    return module.pair_rows(stack_rows([row(6) for _ in range(count)]), stack_rows([row(4) for _ in range(count)]))


def test_worked_numbers():
    """Log-ratios +2 and -1 at beta .1: loss .554355, weight .425557; no margin: log 2."""
    reference = jnp.array([[-3.0, -5.0], [-1.0, -2.0]])
    scores = reference + jnp.array([[2.0, -1.0], [0.5, 0.5]])
    each, metrics = module.preference_loss(scores, reference, 0.1)
    np.testing.assert_allclose(each, [0.554355, np.log(2)], atol=1e-6)
    gradient = jax.grad(lambda s: module.preference_loss(s, reference, 0.1)[0].sum())(scores)
    np.testing.assert_allclose(gradient / 0.1, [[-0.425557, 0.425557], [-0.5, 0.5]], atol=1e-6)
    means = {name: float(total / count) for name, (total, count) in metrics.items()}
    assert means["accuracy"] == 0.5  # no margin is no win
    assert means["margin"] == pytest.approx(0.15)
    assert means["reward_chosen"] == pytest.approx((0.2 + 0.05) / 2)
    assert means["reward_rejected"] == pytest.approx((-0.1 + 0.05) / 2)
    assert means["logp_chosen"] == pytest.approx((-1 - 0.5) / 2)


def test_scores_are_sums_over_policy_tokens_only():
    rows, params = pairs(), tiny.params()
    logits = forward(params, tiny.CONFIG, rows["tokens"].reshape(16, -1)).logits
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), rows["tokens"].reshape(16, -1)[:, 1:, None], -1)
    expected = (logp[..., 0] * rows["mask"].reshape(16, -1)[:, 1:]).sum(-1).reshape(8, 2)
    scores = jax.jit(module.pair_scores, static_argnums=(2, 3))(params, rows, CONFIG, tiny.CONFIG)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    filled = module.add_reference(params, rows, CONFIG, tiny.CONFIG, batch_size=3)  # the last batch is filled up
    np.testing.assert_allclose(filled["reference"], expected, rtol=1e-5)
    # The rows padded further score the same; a selection of columns does too.
    wider = {name: np.pad(rows[name], ((0, 0), (0, 0), (0, 90))) for name in ("tokens", "mask")}
    wider = module._with_selection({**wider, "lengths": rows["lengths"]})
    assert wider["select"].shape == (8, 2, 64)
    scores = jax.jit(module.pair_scores, static_argnums=(2, 3))(params, wider, CONFIG, tiny.CONFIG)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_a_step_starts_at_log_two_and_is_the_same_in_slices_and_on_a_mesh():
    params = tiny.params()
    rows = module.add_reference(params, pairs(), CONFIG, tiny.CONFIG)
    start = lambda: init_state(tiny.params(), CONFIG.optimizer)  # noqa: E731
    one, metrics = module.jitted_dpo_step()(start(), rows, CONFIG, tiny.CONFIG)
    assert float(metrics["loss"][0] / metrics["loss"][1]) == pytest.approx(np.log(2), abs=1e-6)
    assert float(metrics["loss"][1]) == 8
    assert int(one.step) == 1
    sliced = module.DPOConfig(CONFIG.optimizer, logprob_chunk=4, micro_batches=4)
    other, _ = module.jitted_dpo_step()(start(), rows, sliced, tiny.CONFIG)
    mesh = make_mesh(data=8)
    with use_mesh(mesh):
        many, more = module.jitted_dpo_step()(start(), shard_batch(mesh, rows), CONFIG, tiny.CONFIG)
    np.testing.assert_allclose(more["grad_norm"][0], metrics["grad_norm"][0], rtol=1e-5)
    for state in (other, many):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), b, atol=1e-6), state.params, one.params)
    assert any(
        (np.asarray(a) != b).any() for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(params), strict=True)
    )


def test_the_loop_learns_to_prefer_and_resumes(tmp_path):
    settings = module.DPOConfig(OptimizerConfig(lr=2e-2), beta=0.5, logprob_chunk=4, save_every=5)
    rows = module.add_reference(tiny.params(), pairs(), settings, tiny.CONFIG)

    class Feed:
        """The same pairs for ever."""

        def __next__(self):
            return rows

        def get_state(self):
            return {"position": 0}

        def set_state(self, state):
            pass

    def run(folder, steps):
        with (
            MetricsWriter(folder, "dpo", steps, console=False) as writer,
            Checkpointer(folder / "checkpoints") as keeper,
        ):
            state = init_state(tiny.params(), settings.optimizer)
            return module.dpo(settings, tiny.CONFIG, state, Feed(), steps, writer, keeper)

    whole = run(tmp_path / "whole", 20)
    run(tmp_path / "parts", 10)
    parts = run(tmp_path / "parts", 20)
    jax.tree.map(np.testing.assert_array_equal, whole.params, parts.params)
    records = read_metrics(tmp_path / "whole")
    assert records[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert records[-1]["loss"] < 0.4
    assert records[-1]["accuracy"] == 1.0
    assert records[-1]["margin"] > 0


def test_bad_input():
    rows = pairs(2)
    one, two = (stack_rows([([1, 2], [False, True])] * n) for n in (1, 2))
    with pytest.raises(ValueError, match="2 chosen rows but 1 rejected"):
        module.pair_rows(two, one)
    with pytest.raises(ValueError, match="no pairs"):
        module.add_reference(tiny.params(), {k: v[:0] for k, v in rows.items()}, CONFIG, tiny.CONFIG)
    broken = tiny.params()
    broken["embed"] = broken["embed"].at[int(rows["tokens"][1, 0, 0])].set(jnp.nan)
    with pytest.raises(FloatingPointError, match="reference log-prob is not finite for sample"):
        module.add_reference(broken, rows, CONFIG, tiny.CONFIG)
    for name, value in {"beta": 0.0, "micro_batches": 0, "logprob_chunk": 0, "save_every": -1}.items():
        with pytest.raises(ValueError, match=name):
            module.DPOConfig(**{name: value})
