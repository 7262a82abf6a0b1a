"""Supervised rows beside the policy loss, the KL penalty inside the reward, and the stop on failing tools."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from models.sharding import make_mesh, shard_batch, use_mesh
from rl import policy
from rl.metrics import MetricsWriter, read_metrics
from rl.optimizer import OptimizerConfig, init_state
from rl.rows import stack_rows
from rl.trainer import train
from rl.trajectory import Status

_SPEC = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny)

REWARDS = np.array([1, 0, 0, 2, 3, 1, 1, 0], np.float32)
gradients = jax.jit(policy.gradients, static_argnames=("config", "model_config"))


def config(**changes):
    return tiny.grpo_config(minibatches=1, log_entropy=False, **changes)


def rolled(settings):
    trajectory, _, _ = tiny.rollout(tiny.params(), next(tiny.Prompts()), jax.random.key(0))
    return trajectory, policy.make_batch(trajectory, REWARDS, settings)[0]


def rows(count=3):
    """Rows of 4 to 7 tokens, the first two of each a question."""
    rng = np.random.default_rng(1)
    ids = [rng.integers(1, 11, 4 + i % 4).tolist() for i in range(count)]
    return stack_rows([(x, [False, False] + [True] * (len(x) - 2)) for x in ids])


def assert_same(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, other)


def test_the_gradient_is_the_sum_of_two_gradients():
    """-J and mu L_M, each differentiated alone; L_M by its definition, over all tokens of all rows."""
    mu, settings = 0.3, config(aux_weight=0.3)
    _, batch = rolled(settings)
    data = rows()
    aux = policy.auxiliary_rows(data, settings, 1)
    assert aux["tokens"].shape == (4, 16)  # padded; the added row and tokens count for nothing
    value, both, metrics = gradients(tiny.params(), batch, settings, tiny.CONFIG, aux)
    loss, ours, _ = gradients(tiny.params(), batch, config(), tiny.CONFIG)

    @jax.jit
    def memory(params):
        logits = tiny.forward(params, tiny.CONFIG, data["tokens"]).logits[:, :-1]
        logp = jax.nn.log_softmax(logits)
        each = jax.numpy.take_along_axis(logp, data["tokens"][:, 1:, None], -1)[..., 0]
        return -(each * data["mask"][:, 1:]).sum() / data["mask"].sum()

    nats, theirs = jax.value_and_grad(memory)(tiny.params())
    np.testing.assert_allclose(value, loss + mu * nats, rtol=1e-5)
    np.testing.assert_allclose(metrics["aux_loss"][0] / metrics["aux_loss"][1], nats, rtol=1e-5)
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a, b + mu * c, atol=1e-6), both, ours, theirs)
    sliced = gradients(
        tiny.params(), batch, dataclasses.replace(settings, micro_batches=4), tiny.CONFIG,
        policy.auxiliary_rows(data, settings, 4),
    )  # fmt: skip
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), both, sliced[1])


def test_weight_zero_or_no_rows_is_the_policy_loss_alone_bit_for_bit():
    settings = config()
    _, batch = rolled(settings)
    plain = gradients(tiny.params(), batch, settings, tiny.CONFIG)
    aux = policy.auxiliary_rows(rows(), config(aux_weight=1.0), 1)
    assert_same(gradients(tiny.params(), batch, settings, tiny.CONFIG, aux)[1], plain[1])
    texts = [gradients.lower(tiny.params(), batch, settings, tiny.CONFIG, *more).as_text() for more in ((), (aux,))]
    assert texts[0] == texts[1]  # rows of weight 0 leave nothing in the program
    # No rows: nothing reaches the program either, whatever the weight; and rows that teach nothing add exactly 0.
    empty = {**rows(), "mask": np.zeros_like(rows()["mask"])}
    weighted = config(aux_weight=1.0)
    for none in (None, empty):
        assert policy.auxiliary_rows(none, weighted, 1) is None
        ours, scalars = policy.update(
            init_state(tiny.params(), settings.optimizer), batch, weighted, tiny.CONFIG, 1, aux=none
        )
        theirs, _ = policy.update(init_state(tiny.params(), settings.optimizer), batch, settings, tiny.CONFIG, 1)
        assert_same(ours.params, theirs.params)
        assert "aux_loss" not in scalars
    blank = {name: np.zeros_like(value) for name, value in aux.items()}
    value, zero, metrics = gradients(tiny.params(), batch, weighted, tiny.CONFIG, blank)
    assert float(value) == float(plain[0])
    assert_same(zero, plain[1])
    assert float(metrics["aux_loss"][0]) == 0.0


def test_numbers_of_rows_share_programs():
    settings = config(aux_weight=1.0)
    shapes = {n: policy.auxiliary_rows(rows(n), settings, 2)["tokens"].shape for n in (1, 3, 4, 5, 9)}
    assert shapes == {1: (4, 16), 3: (4, 16), 4: (4, 16), 5: (6, 16), 9: (12, 16)}


def test_rows_on_a_mesh_give_the_same_gradient():
    settings = config(aux_weight=0.5, micro_batches=1)
    _, batch = rolled(settings)
    mesh, aux = make_mesh(data=4, devices=jax.devices()[:4]), policy.auxiliary_rows(rows(), settings, 4)
    one = gradients(tiny.params(), batch, settings, tiny.CONFIG, aux)
    with use_mesh(mesh):
        many = gradients(
            tiny.params(), shard_batch(mesh, batch), settings, tiny.CONFIG, shard_batch(mesh, aux)
        )  # fmt: skip
    np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), b, atol=1e-5), many[1], one[1])


def test_the_trainer_learns_the_rows_it_is_given(tmp_path):
    """Steps with and without rows; the hook gets what the rollout carries; the rows' loss falls."""
    settings, data, seen = config(aux_weight=1.0, optimizer=OptimizerConfig(lr=3e-2)), rows(), []

    def rollout(weights, examples, key):
        trajectory, rewards, info = tiny.rollout(weights, examples, key)
        return trajectory, rewards, {**info, "carry": examples.shape}

    def auxiliary(step, params, carry):
        seen.append((step, carry, set(params)))
        return data if step != 2 else None

    def run(folder, settings):
        with MetricsWriter(folder, "rl", 12, console=False) as writer:
            state = init_state(tiny.params(), settings.optimizer)
            train(
                settings, tiny.CONFIG, state, tiny.Prompts(), rollout, steps=12, writer=writer, auxiliary=auxiliary
            )  # fmt: skip
        return read_metrics(folder)

    records = run(tmp_path / "with", settings)
    assert [step for step, *_ in seen] == list(range(1, 13))
    assert seen[0][1:] == ((2, 3), set(tiny.params()))
    assert [r["aux_rows"] for r in records[:3]] == [3, 0, 3]
    assert "aux_loss" not in records[1]
    assert records[-1]["aux_loss"] < 0.75 * records[0]["aux_loss"]
    assert "auxiliary" in records[0]["seconds"]
    seen.clear()
    assert "aux_rows" not in run(tmp_path / "without", config())[0]
    assert seen == []  # weight 0: nobody asks for rows


# --- the KL penalty in the reward -------------------------------------------------------------------------------------


def test_kl_in_the_reward_is_the_worked_definition():
    settings = config(kl_reward=0.5, advantage="reinforce_pp", gamma=0.9)
    trajectory, batch = rolled(settings)
    filled = policy.add_logprobs(batch, tiny.params(), settings, tiny.CONFIG, ref_params=tiny.params(1))
    valid = np.ones(8, bool)
    ours = policy.penalise(filled, REWARDS, trajectory.groups, valid, settings).advantages
    kl, mask = filled.old_logprobs - filled.ref_logprobs, filled.mask
    returns = np.zeros_like(mask)
    for t in range(tiny.PROMPT + tiny.NEW - 1, tiny.PROMPT - 1, -1):
        last = t == tiny.PROMPT + tiny.NEW - 1
        returns[:, t] = (REWARDS if last else 0.9 * returns[:, t + 1]) - 0.5 * kl[:, t]
    tokens = returns[mask > 0]
    expected = np.where(mask > 0, (returns - tokens.mean()) / tokens.std(), 0.0)
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    # What nobody sampled has no part in it.
    rubbish = filled.replace(
        old_logprobs=np.where(mask > 0, filled.old_logprobs, np.inf),
        ref_logprobs=np.where(mask > 0, filled.ref_logprobs, 3.0),
    )
    again = policy.penalise(rubbish, REWARDS, trajectory.groups, valid, settings).advantages
    np.testing.assert_array_equal(again, ours)


def test_equal_policies_have_no_penalty_at_all():
    settings = config(kl_reward=0.5)
    trajectory, batch = rolled(settings)
    filled = policy.add_logprobs(batch, tiny.params(), settings, tiny.CONFIG, ref_params=tiny.params())
    np.testing.assert_array_equal(filled.old_logprobs, filled.ref_logprobs)
    out = policy.penalise(filled, REWARDS, trajectory.groups, np.ones(8, bool), settings)
    np.testing.assert_allclose(out.advantages, batch.advantages, atol=1e-6)
    assert policy.penalise(batch, REWARDS, trajectory.groups, np.ones(8, bool), config()) is batch
    with pytest.raises(ValueError, match="kl_reward is not 0: pass ref_params"):
        policy.add_logprobs(batch, tiny.params(), settings, tiny.CONFIG)


def test_kl_in_the_reward_through_the_trainer():
    settings = config(kl_reward=1e-4)
    state = init_state(tiny.params(), settings.optimizer)
    logs = []
    train(
        settings, tiny.CONFIG, state, tiny.Prompts(), tiny.rollout, steps=2, ref_params=tiny.params(),
        on_step=lambda step, state, trajectory, rewards, scalars: logs.append(scalars),
    )  # fmt: skip
    assert logs[0]["kl_ref"] == pytest.approx(0.0, abs=1e-9)
    assert logs[1]["kl_ref"] > 0
    assert logs[0]["ratio"] == pytest.approx(1.0, abs=1e-6)


# --- failing tools ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("failed", "stops"), [(1, False), (2, True)])
def test_a_step_is_given_up_when_too_many_rows_failed(failed, stops):
    settings = config(max_env_errors=0.2)

    def rollout(weights, examples, key):
        trajectory, rewards, info = tiny.rollout(weights, examples, key)
        status = trajectory.status.copy()
        status[:failed] = Status.ENV_ERROR
        return trajectory.replace(status=status), rewards, info

    def run():
        return train(
            settings, tiny.CONFIG, init_state(tiny.params(), settings.optimizer), tiny.Prompts(), rollout, steps=1
        )

    if stops:
        with pytest.raises(RuntimeError, match=r"step 1: the environment failed in 2 of 8 rows"):
            run()
    else:
        run()


@pytest.mark.parametrize(
    "changes",
    [{"aux_weight": -0.1}, {"kl_reward": -1.0}, {"gamma": 0.0}, {"kl_reward": 0.1, "advantage": "grpo"},
     {"gamma": 0.9, "advantage": "rloo"}, {"max_env_errors": -0.1}],
)  # fmt: skip
def test_bad_settings(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        tiny.grpo_config(**changes)
