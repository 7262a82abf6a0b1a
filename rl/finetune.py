"""Supervised fine-tuning: next-token cross-entropy over the tokens a mask selects."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from models.config import Config
from models.sharding import shard_batch, use_mesh
from rl import losses
from rl.checkpoint import Checkpointer
from rl.logprobs import selection, token_logprobs
from rl.metrics import MetricsWriter, PhaseTimer
from rl.optimizer import OptimizerConfig, TrainState, accumulate_gradients, apply_gradients


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Settings of :func:`sft`."""

    # lr 1e-5: usual for full fine-tuning of models of 1-8 billion weights
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(lr=1e-5))
    micro_batches: int = 1  # slices the batch is run in; raise when memory runs out, results stay the same
    logprob_chunk: int = 256  # positions per recomputed piece of the softmax; lower for large vocabularies
    save_every: int = 0  # steps between checkpoints; 0 saves only at the end

    def __post_init__(self):
        for name in ("micro_batches", "logprob_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.save_every < 0:
            raise ValueError(f"save_every must be at least 0, not {self.save_every}")


def sft_loss(
    params: Any, batch: Mapping[str, jax.Array], config: SFTConfig, model_config: Config, tokens: jax.Array
) -> tuple[jax.Array, losses.Metrics]:
    """A share of the batch's loss: -sum of masked log-probs / ``tokens``, the masked tokens of the *whole* batch.

    batch: see :func:`sft_step`. Returns (scalar, {"loss": (sum, count)}).
    """
    mask = jnp.asarray(batch["mask"], jnp.float32).at[:, 0].set(0.0)  # nothing predicts a row's first token
    logp = token_logprobs(
        params, model_config, batch["tokens"], batch.get("lengths"), chunk=config.logprob_chunk,
        select=batch.get("select"), positions=batch.get("positions"), segment_ids=batch.get("segment_ids"),
    )  # fmt: skip
    total = losses.cross_entropy(logp, mask)
    return total / tokens, {"loss": (jax.lax.stop_gradient(total), mask.sum())}


def sft_step(
    state: TrainState, batch: Mapping[str, jax.Array], config: SFTConfig, model_config: Config
) -> tuple[TrainState, losses.Metrics]:
    """One update, pure: mean cross-entropy over all masked tokens of the global batch, however it is sliced.

    batch: "tokens" int32 [B, T] right-padded; "mask" bool or float [B, T], 1 on tokens to be learned; optional
    "lengths" int32 [B], "select" int32 [B, M] (``rl.logprobs.selection``), and for packed rows "positions" and
    "segment_ids" int32 [B, T] (mask each segment's first token out). Metrics: loss in nats per token, grad_norm,
    update_norm, tokens; all (sum, count).
    """
    tokens = jnp.maximum(jnp.asarray(batch["mask"], jnp.float32)[:, 1:].sum(), 1.0)
    _, grads, metrics = accumulate_gradients(
        lambda params, micro: sft_loss(params, micro, config, model_config, tokens),
        state.params, dict(batch), config.micro_batches,
    )  # fmt: skip
    state, more = apply_gradients(state, grads, config.optimizer)
    metrics = {**metrics, **more, "tokens": (tokens, jnp.ones(()))}
    return state.replace(step=state.step + 1), metrics


@functools.cache
def jitted_sft_step() -> Callable:
    """:func:`sft_step` compiled once per configuration, shapes and mesh context; its first argument is donated."""
    return jax.jit(sft_step, static_argnames=("config", "model_config"), donate_argnums=0)


def sft(
    config: SFTConfig,
    model_config: Config,
    state: TrainState,
    batches: Iterator[Mapping[str, Any]],
    steps: int,
    writer: MetricsWriter | None = None,
    checkpointer: Checkpointer | None = None,
    mesh: jax.sharding.Mesh | None = None,
    on_step: Callable[[int, TrainState, dict[str, float]], None] | None = None,
) -> TrainState:
    """Train until ``steps`` updates are done in all; with a checkpointer, go on where the last run stopped.

    batches: iterator of host batches (see :func:`sft_step`) of one shape per length bucket; resumable when it has
    ``get_state``/``set_state`` (Grain's do). state: donated, do not use it afterwards. on_step(step, state, scalars)
    is called after each step. Raises FloatingPointError when the loss or the gradient is not finite.
    """
    done = 0
    if checkpointer is not None and (restored := checkpointer.restore(state, batches)) is not None:
        state, done = restored.state, restored.step
    if writer is not None:
        writer.resume(done)
    timer = PhaseTimer()
    update = jitted_sft_step()
    for step in range(done + 1, steps + 1):
        with timer("data"):
            batch = dict(next(batches))
            if (select := selection(batch["mask"])) is not None:
                batch["select"] = select
            batch = shard_batch(mesh, batch)
        with timer("update"), use_mesh(mesh):
            state, metrics = update(state, batch, config, model_config)
            scalars = losses.mean_metrics(metrics)
        check_update(scalars, step)
        if checkpointer is not None and (step == steps or (config.save_every and step % config.save_every == 0)):
            with timer("save"):
                checkpointer.save(step, state, batches)
        if writer is not None:
            writer.write(step, scalars, timer.take())
        if on_step is not None:
            on_step(step, state, scalars)
    return state


def check_update(scalars: Mapping[str, float], step: int) -> None:
    """Raise FloatingPointError when a step's loss or gradient norm is not finite."""
    for name in ("loss", "grad_norm"):
        value = scalars.get(name, 0.0)
        if not abs(value) < float("inf"):
            raise FloatingPointError(
                f"{name} is {value} at step {step}: lower the learning rate or look at this step's batch; "
                "the last checkpoint is from before this step"
            )
