"""The reinforcement-learning loop: roll out, reward, advantage, update; one pass of the loop is one step.

    state = init_state(params, config.optimizer, seed=0)
    with MetricsWriter(workdir, "rl", steps) as writer, Checkpointer(workdir / "checkpoints") as checkpointer:
        state = train(config, model_config, state, prompts, rollout_fn, steps=80, writer=writer, ...)

The same call again goes on where the last one stopped, bit for bit.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from models.config import Config
from rl import policy
from rl.checkpoint import Checkpointer
from rl.finetune import check_update
from rl.metrics import MetricsWriter, PhaseTimer
from rl.optimizer import TrainState
from rl.policy import GRPOConfig
from rl.trajectory import Status, Trajectory

# (params, examples, key) -> (trajectory, {reward name: float [B]}, info). info holds scalars for the log and may hold
# "seconds": {phase: s} for time inside the call that is not sampling, such as "reward", and "carry": anything that
# ``auxiliary`` wants of the rollout, such as its final states.
RolloutFn = Callable[[Any, Any, jax.Array], tuple[Trajectory, Mapping[str, np.ndarray], Mapping[str, Any]]]
# (step, params, carry) -> supervised rows (rl.rows) that the step's updates learn beside the policy loss, or None.
Auxiliary = Callable[[int, Any, Any], Mapping[str, np.ndarray] | None]


def train(
    config: GRPOConfig,
    model_config: Config,
    state: TrainState,
    prompts: Iterator[Any],
    rollout_fn: RolloutFn,
    *,
    steps: int,
    writer: MetricsWriter | None = None,
    checkpointer: Checkpointer | None = None,
    mesh: jax.sharding.Mesh | None = None,
    ref_params: Any = None,
    auxiliary: Auxiliary | None = None,
    on_step: Callable[[int, TrainState, Trajectory, Mapping[str, np.ndarray], dict[str, float]], None] | None = None,
) -> TrainState:
    """Train until ``steps`` steps are done in all, resuming from ``checkpointer`` when it holds any.

    prompts: iterator of batches of ``config.prompts_per_step`` examples, in whatever form ``rollout_fn`` takes; with a
    checkpointer it needs ``get_state``/``set_state``. state: donated, do not use it afterwards. ref_params: weights of
    the KL penalty, needed when ``kl_coef`` or ``kl_reward`` is not 0; they must not share buffers with ``state``.
    auxiliary: supplies supervised rows for a step, learned with weight ``config.aux_weight``; not called when it is 0.
    on_step(step, state, trajectory, rewards, scalars) runs after each step, e.g. to store examples.

    Step n samples with ``fold_in(state.key, n)``, and the checkpoint of step n holds weights, optimiser, key and the
    prompts' position after n batches, so N steps + kill + resume + N steps equal 2N steps.

    Raises FloatingPointError for a reward, log-prob, loss or gradient that is not finite, ValueError for a batch of
    the wrong size, RuntimeError when the environment failed in more than ``config.max_env_errors`` of the rows; nothing
    of that step is learned.
    """
    # ---- resume -----------------------------------------------------------------------------------------------------
    done = 0
    if checkpointer is not None and (restored := checkpointer.restore(state, prompts)) is not None:
        state, done = restored.state, restored.step
    if writer is not None:
        writer.resume(done)
    timer = PhaseTimer()

    for step in range(done + 1, steps + 1):
        # ---- roll out and reward ------------------------------------------------------------------------------------
        with timer("rollout"):
            examples = next(prompts)
            trajectory, rewards, info = rollout_fn(state.params, examples, jax.random.fold_in(state.key, step))
        info = dict(info)
        for phase, seconds in info.pop("seconds", {}).items():
            timer.seconds[phase] = timer.seconds.get(phase, 0.0) + seconds
            timer.seconds["rollout"] -= seconds
        carry = info.pop("carry", None)
        _check_size(trajectory, config)

        # ---- advantage ----------------------------------------------------------------------------------------------
        with timer("advantage"):
            valid = np.asarray(trajectory.status) != Status.ENV_ERROR
            _check_errors(valid, config, step)
            total = policy.total_reward(rewards, valid, config)
            batch, counts = policy.make_batch(trajectory, total, config, valid)
        with timer("logprobs"):
            batch = policy.add_logprobs(batch, state.params, config, model_config, ref_params, mesh)
            batch = policy.penalise(batch, total, trajectory.groups, valid, config)
        aux = None
        if auxiliary is not None and config.aux_weight:
            with timer("auxiliary"):
                aux = auxiliary(step, state.params, carry)
            counts["aux_rows"] = 0.0 if aux is None else float(len(aux["tokens"]))

        # ---- update -------------------------------------------------------------------------------------------------
        with timer("update"):
            state, scalars = policy.update(state, batch, config, model_config, step, mesh, aux)
            state = timer.wait(state.replace(step=state.step + 1))
        check_update(scalars, step)

        # ---- record -------------------------------------------------------------------------------------------------
        scalars = {**_summary(trajectory, rewards, total, valid, batch.mask), **scalars, **counts, **info}
        if checkpointer is not None and (step == steps or (config.save_every and step % config.save_every == 0)):
            with timer("save"):
                checkpointer.save(step, state, prompts)
        seconds = timer.take()
        scalars["tokens_per_second"] = float(trajectory.sampled.sum()) / max(seconds["rollout"], 1e-9)
        if writer is not None:
            writer.write(step, scalars, seconds)
        if on_step is not None:
            on_step(step, state, trajectory, rewards, scalars)
    return state


def _check_size(trajectory: Trajectory, config: GRPOConfig) -> None:
    rows, wanted = len(trajectory.lengths), config.prompts_per_step * config.group_size
    if rows != wanted:
        raise ValueError(
            f"the rollout has {rows} trajectories, the config wants {config.prompts_per_step} prompts x "
            f"{config.group_size} = {wanted}; let prompts yield {config.prompts_per_step} examples (drop the remainder)"
        )


def _check_errors(valid: np.ndarray, config: GRPOConfig, step: int) -> None:
    failed = int((~valid).sum())
    if failed > config.max_env_errors * len(valid):
        raise RuntimeError(
            f"step {step}: the environment failed in {failed} of {len(valid)} rows, more than "
            f"max_env_errors={config.max_env_errors} allows; nothing was learned from them. See that its tools answer, "
            "then run again: training goes on from the last checkpoint"
        )


def _summary(trajectory, rewards, total, valid, mask) -> dict[str, float]:
    """Means over valid rows of every reward and of the lengths, and the share of each way to end."""
    count = max(int(valid.sum()), 1)

    def mean(values):
        return float(np.where(valid, values, 0.0).sum() / count)

    sampled = np.asarray(trajectory.sampled).sum(axis=1)
    out = {"reward": mean(total), "reward_std": float(np.std(total[valid])) if valid.any() else 0.0}
    out |= {f"reward/{name}": mean(np.asarray(values, np.float64)) for name, values in rewards.items()}
    out["length/sampled"] = mean(sampled)
    out["length/response"] = mean(trajectory.lengths - trajectory.prompt_lengths)  # with what tools wrote
    out["turns"] = mean(np.max(np.where(trajectory.sampled, trajectory.turns, 0), axis=1))
    out |= {f"status/{s.name.lower()}": float(np.mean(np.asarray(trajectory.status) == s)) for s in Status}
    out["trained_tokens"] = float(mask.sum())
    return out
