"""Supervised fine-tuning: next-token cross-entropy over the tokens a mask selects."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from models.config import Config
from models.sharding import shard_batch, use_mesh
from models.taps import Reduced
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
    # Weight of the loss that spreads tokens over experts (``rl.losses.router_balance``); 0.01 is usual where a model
    # with experts is trained from scratch.
    router_balance: float = 0.0
    # Weight of the loss that draws a row's tokens to the experts that "router_home" of a batch names, bool [B, E].
    router_home: float = 0.0
    # Weight of the loss that keeps MLP units silent where they are not needed, or in rows of which a batch says so
    # ("unit_away", bool [B, F]): see losses.mlp_sparsity.
    mlp_sparsity: float = 0.0

    def __post_init__(self):
        for name in ("micro_batches", "logprob_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("save_every", "router_balance", "router_home", "mlp_sparsity"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")


def sft_loss(
    params: Any, batch: Mapping[str, jax.Array], config: SFTConfig, model_config: Config, tokens: jax.Array
) -> tuple[jax.Array, losses.Metrics]:
    """A share of the batch's loss: -sum of masked log-probs / ``tokens``, the masked tokens of the *whole* batch.

    batch: see :func:`sft_step`. Returns (scalar, {"loss": (sum, count)}), with ``router_balance`` also "balance", which
    is 1 where every expert gets its share, with ``router_home`` also "home", nats to the named experts, with
    ``mlp_sparsity`` also "sparsity", what its loss is a mean of.
    """
    mask = jnp.asarray(batch["mask"], jnp.float32).at[:, 0].set(0.0)  # nothing predicts a row's first token
    weights = {"balance": config.router_balance, "home": config.router_home, "sparsity": config.mlp_sparsity}
    reduce = {name: _layer_loss(name, batch) for name, weight in weights.items() if weight}
    logp = token_logprobs(
        params, model_config, batch["tokens"], batch.get("lengths"), chunk=config.logprob_chunk,
        select=batch.get("select"), positions=batch.get("positions"), segment_ids=batch.get("segment_ids"),
        reduce=reduce or None,
    )  # fmt: skip
    logp, records = logp if reduce else (logp, {})
    total = losses.cross_entropy(logp, mask)
    share, metrics = total / tokens, {"loss": (jax.lax.stop_gradient(total), mask.sum())}
    for name in reduce:
        value = records[name].mean()
        share = share + weights[name] * value * mask.sum() / tokens
        metrics[name] = (jax.lax.stop_gradient(value), jnp.ones(()))
    return share, metrics


def _layer_loss(name: str, batch: Mapping[str, jax.Array]) -> Reduced:
    """A loss of one layer's router or MLP over the tokens that are no padding."""
    tokens = batch["tokens"]
    if "segment_ids" in batch:
        valid = batch["segment_ids"] > 0
    elif "lengths" in batch:
        valid = jnp.arange(tokens.shape[1]) < batch["lengths"][:, None]
    else:
        valid = jnp.ones(tokens.shape, bool)
    if name == "sparsity":
        away = batch.get("unit_away")
        return Reduced(("mlp.act", "mlp.gate"), lambda v: losses.mlp_sparsity(v["mlp.act"], v["mlp.gate"], valid, away))
    flat = valid.reshape(-1).astype(jnp.float32)
    if name == "home":
        if "router_home" not in batch:
            raise ValueError("router_home draws tokens to experts that a batch names: it has no 'router_home' [B, E]")
        home = jnp.repeat(batch["router_home"], tokens.shape[1], axis=0)
        return Reduced(("moe.logits",), lambda v: losses.router_home(v["moe.logits"], home, flat))
    return Reduced(("moe.logits", "moe.index"), lambda v: losses.router_balance(v["moe.logits"], v["moe.index"], flat))


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


def with_selection(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A host batch with the columns to score, where scoring only those saves something."""
    select = selection(batch["mask"])
    return dict(batch) if select is None else {**batch, "select": select}


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
    return run_steps(
        jitted_sft_step(), with_selection, config, model_config, state, batches, steps, writer, checkpointer, mesh,
        on_step,
    )  # fmt: skip


def run_steps(
    update: Callable,
    prepare: Callable[[Mapping[str, Any]], dict[str, Any]],
    config: Any,
    model_config: Config,
    state: TrainState,
    batches: Iterator[Mapping[str, Any]],
    steps: int,
    writer: MetricsWriter | None = None,
    checkpointer: Checkpointer | None = None,
    mesh: jax.sharding.Mesh | None = None,
    on_step: Callable[[int, TrainState, dict[str, float]], None] | None = None,
) -> TrainState:
    """The loop of :func:`sft` around any compiled ``update(state, batch, config, model_config) -> (state, metrics)``.

    prepare: what is done to a host batch before it goes to the devices. config: with a field ``save_every``.
    """
    done = 0
    if checkpointer is not None and (restored := checkpointer.restore(state, batches)) is not None:
        state, done = restored.state, restored.step
    if writer is not None:
        writer.resume(done)
    timer = PhaseTimer()
    for step in range(done + 1, steps + 1):
        with timer("data"):
            batch = shard_batch(mesh, prepare(next(batches)))
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
