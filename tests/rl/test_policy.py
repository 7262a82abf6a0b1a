"""The update on batches, and the whole loop: learning, switches, exact resume, no hidden recompilation."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import policy as grpo
from rl.checkpoint import Checkpointer
from rl.metrics import MetricsWriter, read_metrics
from rl.optimizer import OptimizerConfig, init_state
from rl.trainer import train
from rl.trajectory import Status

_SPEC = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny)


def rolled(seed=0):
    """A trajectory of the untrained model, with rewards that differ in every group."""
    trajectory, _, _ = tiny.rollout(tiny.params(), next(tiny.Prompts()), jax.random.key(seed))
    return trajectory, np.array([1, 0, 0, 2, 3, 1, 1, 0], np.float32)


def batch_for(config, trajectory=None, rewards=None):
    trajectory, default = rolled() if trajectory is None else (trajectory, rewards)
    return grpo.make_batch(trajectory, default if rewards is None else rewards, config)


def gradient_step(config, batch, **changes):
    state = init_state(tiny.params(), config.optimizer)
    return jax.jit(grpo.update_step, static_argnames=("config", "model_config"))(state, batch, config, tiny.CONFIG)


def test_batch_is_padded_to_a_bucket_and_masks_only_sampled_tokens():
    config = tiny.grpo_config()
    trajectory, rewards = rolled()
    batch, counts = batch_for(config, trajectory, rewards)
    assert batch.ids.shape == (8, 16)
    np.testing.assert_array_equal(batch.mask[:, :7], trajectory.sampled)
    np.testing.assert_array_equal(batch.mask[:, 7:], 0)
    assert counts == {"rows_env_error": 0.0, "rows_overlong": 0.0}
    custom = dataclasses.replace(config, length_buckets=(7, 12))
    assert batch_for(custom, trajectory, rewards)[0].ids.shape == (8, 7)
    with pytest.raises(ValueError, match="length_buckets"):
        grpo.bucket_length(13, (7, 12))


def test_micro_batches_change_nothing_for_every_aggregation():
    trajectory, rewards = rolled()
    sampled = trajectory.sampled.copy()
    sampled[0, 4:] = False  # unequal token counts
    trajectory = trajectory.replace(sampled=sampled)
    for aggregation in ("token", "sequence"):
        config = tiny.grpo_config(aggregation=aggregation, minibatches=1)
        batch, _ = batch_for(config, trajectory, rewards)
        whole, metrics = gradient_step(config, batch)
        sliced, other = gradient_step(dataclasses.replace(config, micro_batches=4), batch)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole.params, sliced.params)
        for name in ("loss", "entropy", "ratio", "grad_norm"):
            np.testing.assert_allclose(other[name], metrics[name], rtol=1e-5, atol=1e-6)


def test_ratio_is_one_at_the_first_update_and_matches_the_sampler():
    """Trainer and sampler agree on the log-probs of what was sampled: ratio 1, mismatch near 0."""
    config = tiny.grpo_config()
    batch, _ = batch_for(config)
    batch = grpo.add_logprobs(batch, tiny.params(), config, tiny.CONFIG)
    np.testing.assert_allclose(batch.old_logprobs * batch.mask, batch.sampler_logprobs, atol=1e-5)
    _, metrics = gradient_step(config, batch)
    assert float(metrics["ratio"][0] / metrics["ratio"][1]) == pytest.approx(1.0, abs=1e-6)
    # One update per rollout needs no extra forward: the gradient is the same.
    single = dataclasses.replace(config, minibatches=1)
    plain = grpo.add_logprobs(batch.replace(old_logprobs=None), tiny.params(), single, tiny.CONFIG)
    assert plain.old_logprobs is None
    with_old, _ = gradient_step(single, batch)
    without, _ = gradient_step(single, plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), with_old.params, without.params)


def test_gradient_is_unchanged_by_tokens_that_nobody_sampled_after_the_last_sampled_one():
    config = tiny.grpo_config(minibatches=1)
    batch, _ = batch_for(config)
    ids = batch.ids.copy()
    ids[:, 7:] = 9
    lengths = np.full(8, 16, np.int32)
    first, _ = gradient_step(config, batch)
    second, _ = gradient_step(config, batch.replace(ids=ids, lengths=lengths))
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


def test_env_errors_take_no_part():
    config = tiny.grpo_config()
    trajectory, rewards = rolled()
    status = trajectory.status.copy()
    status[1] = Status.ENV_ERROR
    broken = trajectory.replace(status=status)
    rewards[1] = np.nan
    total = grpo.total_reward({"r": rewards}, status != Status.ENV_ERROR, config)
    batch, counts = batch_for(config, broken, total)
    assert counts["rows_env_error"] == 1
    assert batch.mask[1].sum() == 0
    assert np.isfinite(batch.advantages).all()
    group = batch.advantages[[0, 2, 3], 3] - batch.advantages[[0, 2, 3], 3].mean()
    whitened = np.array([0.0, -1.0, 1.0])  # rewards 1, 0, 2: the NaN row is not in the mean of 1
    np.testing.assert_allclose(group / group[2], whitened, atol=1e-5)


def test_overlong_switches():
    trajectory, rewards = rolled()
    status = trajectory.status.copy()
    status[0] = Status.TRUNCATED
    cut = trajectory.replace(status=status)
    kept, _ = batch_for(tiny.grpo_config(), cut, rewards)
    assert kept.mask[0].sum() == tiny.NEW
    masked, counts = batch_for(tiny.grpo_config(overlong="mask"), cut, rewards)
    assert masked.mask[0].sum() == 0
    assert counts["rows_overlong"] == 1
    everything, counts = batch_for(tiny.grpo_config(max_total=6), trajectory, rewards)  # DeepRec section 10.12
    assert everything.mask.sum() == 0
    assert counts["rows_overlong"] == 8
    _, metrics = gradient_step(tiny.grpo_config(max_total=6), everything)
    assert float(metrics["loss"][0]) == 0.0
    assert float(metrics["grad_norm"][0]) == 0.0


def test_dynamic_sampling_drops_equal_groups_and_counts_them():
    trajectory, rewards = rolled()
    rewards[:4] = 1.0
    batch, counts = batch_for(tiny.grpo_config(dynamic_sampling=True), trajectory, rewards)
    assert counts["groups_dropped"] == 1
    assert batch.mask[:4].sum() == 0
    assert batch.mask[4:].sum() == 4 * tiny.NEW
    # Without a token to learn from, the weights do not move at all.
    rewards[4:] = 1.0
    config = tiny.grpo_config(dynamic_sampling=True)
    batch, _ = batch_for(config, trajectory, rewards)
    state, scalars = grpo.update(init_state(tiny.params(), config.optimizer), batch, config, tiny.CONFIG, 1)
    assert scalars["updates_skipped"] == 2
    jax.tree.map(np.testing.assert_array_equal, state.params, tiny.params())


def test_rows_that_do_not_train_are_not_run_and_change_nothing():
    """Fewer rows reach the device; loss, gradient and weights are those of all rows."""
    trajectory, rewards = rolled()
    rewards[:4] = 1.0
    # A large eps makes Adam's step follow the gradient's size: without it, gradients that are zero but for rounding
    # would step as far as the others.
    config = tiny.grpo_config(dynamic_sampling=True, minibatches=1, optimizer=OptimizerConfig(lr=3e-2, eps=1.0))
    batch, _ = batch_for(config, trajectory, rewards)
    whole, metrics = gradient_step(config, batch)
    few, scalars = grpo.update(init_state(tiny.params(), config.optimizer), batch, config, tiny.CONFIG, 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), whole.params, few.params)
    for name in ("loss", "grad_norm", "tokens", "entropy"):
        assert scalars[name] == pytest.approx(float(metrics[name][0] / metrics[name][1]), rel=1e-5, abs=1e-7)

    trains = np.array([0, 1, 0, 0, 1, 0, 0, 1], bool)
    np.testing.assert_array_equal(grpo.trained_rows(trains, np.arange(8) + 10, 1), [10, 11, 14, 17])
    np.testing.assert_array_equal(grpo.trained_rows(trains, np.arange(8), 2), [0, 1, 4, 7])
    assert len(grpo.trained_rows(trains, np.arange(8), 4)) == 8  # two rows do not split into four slots
    assert len(grpo.trained_rows(trains & False, np.arange(8), 1)) == 0


def test_kl_to_the_reference_pulls_back():
    config = tiny.grpo_config(kl_coef=5.0, kl="k2", minibatches=1)
    trajectory, _ = rolled()
    batch, _ = batch_for(config, trajectory, np.zeros(8, np.float32))
    with pytest.raises(ValueError, match="ref_params"):
        grpo.add_logprobs(batch, tiny.params(), config, tiny.CONFIG)
    filled = grpo.add_logprobs(batch, tiny.params(), config, tiny.CONFIG, ref_params=tiny.params(1))
    state = init_state(tiny.params(), config.optimizer)
    step = jax.jit(grpo.update_step, static_argnames=("config", "model_config"))
    kl = []
    for _ in range(25):
        state, metrics = step(state, filled, config, tiny.CONFIG)
        kl.append(float(metrics["kl_ref"][0] / metrics["kl_ref"][1]))
    assert kl[-1] < 0.5 * kl[0]


def test_not_finite_values_name_the_sample():
    config = tiny.grpo_config()
    with pytest.raises(FloatingPointError, match=r"reward 'hit' is not finite for sample 2"):
        grpo.total_reward({"hit": np.array([0, 1, np.nan, 1.0])}, np.ones(4, bool), config)
    batch, _ = batch_for(config)
    params = tiny.params()
    params["embed"] = params["embed"].at[batch.ids[5, 0]].set(jnp.nan)
    rows = np.flatnonzero((batch.ids == batch.ids[5, 0]).any(axis=1))
    with pytest.raises(FloatingPointError, match=f"log-prob is not finite for sample .*{rows[0]}"):
        grpo.add_logprobs(batch, params, config, tiny.CONFIG)
    sampler = dataclasses.replace(config, old_logprobs="sampler", minibatches=1)
    batch = grpo.add_logprobs(batch, params, sampler, tiny.CONFIG)
    with pytest.raises(FloatingPointError, match=r"log-prob is not finite for sample .* of the rollout at step 3"):
        grpo.update(init_state(params, config.optimizer), batch, sampler, tiny.CONFIG, 3)


def test_reward_weights():
    config = tiny.grpo_config(reward_weights=(("b", 0.5),))
    rewards = {"a": np.array([1.0, 2.0]), "b": np.array([4.0, 0.0])}
    np.testing.assert_array_equal(grpo.total_reward(rewards, np.ones(2, bool), config), [3.0, 2.0])
    with pytest.raises(ValueError, match=r"\['b'\]"):
        grpo.total_reward({"a": rewards["a"]}, np.ones(2, bool), config)
    with pytest.raises(ValueError, match="has shape"):
        grpo.total_reward({"a": np.zeros(3)}, np.ones(2, bool), tiny.grpo_config())


@pytest.mark.parametrize(
    "changes",
    [
        {"advantage": "ppo"}, {"ratio": "word"}, {"kl": "k4"}, {"overlong": "drop"}, {"old_logprobs": "vllm"},
        {"group_size": 1}, {"minibatches": 3}, {"aggregation": "constant"}, {"epochs": 0},
        {"tis_cap": 2.0, "old_logprobs": "sampler"}, {"length_buckets": (8, 4)},
    ],
)  # fmt: skip
def test_bad_settings(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        tiny.grpo_config(**changes)


def run(folder, steps, config, **options):
    with (
        MetricsWriter(folder, "rl", steps, console=False) as writer,
        Checkpointer(folder / "checkpoints") as checkpointer,
    ):
        return train(
            config, tiny.CONFIG, init_state(tiny.params(), config.optimizer, 0), tiny.Prompts(), tiny.rollout,
            steps=steps, writer=writer, checkpointer=checkpointer, **options,
        )  # fmt: skip


def test_two_n_steps_equal_n_and_resume_and_n(tmp_path):
    config = tiny.grpo_config(save_every=2)
    whole = run(tmp_path / "whole", 6, config)
    run(tmp_path / "parts", 3, config)
    parts = run(tmp_path / "parts", 6, config)
    for name in ("params", "opt_state", "step"):
        jax.tree.map(np.testing.assert_array_equal, getattr(whole, name), getattr(parts, name))
    skip = ("time", "seconds", "tokens_per_second")
    first, second = (
        [{k: v for k, v in r.items() if k not in skip} for r in read_metrics(tmp_path / name)]
        for name in ("whole", "parts")
    )
    assert first == second


def test_learns_and_learning_rate_zero_does_not(tmp_path):
    """DeepRec section 10.15 in small: reward rises with the update and does not without it."""
    steps = 25
    config = tiny.grpo_config(prompts_per_step=2, save_every=0)
    run(tmp_path / "learn", steps, config)
    reward = [r["reward"] for r in read_metrics(tmp_path / "learn")]
    assert np.mean(reward[-5:]) > np.mean(reward[:5]) + 0.3
    frozen = tiny.grpo_config(optimizer=OptimizerConfig(lr=0.0))
    state = run(tmp_path / "frozen", 3, frozen)
    jax.tree.map(np.testing.assert_array_equal, state.params, tiny.params())
    record = read_metrics(tmp_path / "learn")[0]
    assert {"reward/target", "status/finished", "turns", "entropy", "clip_high", "extra", "groups"} - set(record) == {
        "groups"
    }
    assert {"rollout", "advantage", "logprobs", "update"} <= set(record["seconds"])


def test_steps_after_the_first_compile_nothing():
    config = tiny.grpo_config()
    seen = []

    def count(step, *_):
        seen.append((grpo.jitted_update_step()._cache_size(), grpo.jitted_score()._cache_size()))

    def lengths_vary(weights, examples, key):
        trajectory, rewards, info = tiny.rollout(weights, examples, key)
        longer = int(jax.random.randint(key, (), 0, 8))  # the buffer's size is not the batch's
        pad = ((0, 0), (0, longer))
        return trajectory.replace(
            ids=np.pad(trajectory.ids, pad), sampled=np.pad(trajectory.sampled, pad),
            logprobs=np.pad(trajectory.logprobs, pad), turns=np.pad(trajectory.turns, pad),
        ), rewards, info  # fmt: skip

    state = init_state(tiny.params(), config.optimizer)
    train(config, tiny.CONFIG, state, tiny.Prompts(), lengths_vary, steps=4, on_step=count)
    assert seen[0] == seen[-1]


def test_wrong_number_of_prompts_is_an_error():
    config = tiny.grpo_config()
    state = init_state(tiny.params(), config.optimizer)
    with pytest.raises(ValueError, match=r"12 trajectories, the config wants 2 prompts x 4 = 8"):
        train(config, tiny.CONFIG, state, tiny.Prompts(3), tiny.rollout, steps=1)
