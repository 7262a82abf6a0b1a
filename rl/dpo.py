"""Direct preference optimisation (arXiv 2305.18290): from pairs of a better and a worse conversation.

    rows = pair_rows(chosen, rejected)                            # arrays of rl.rows
    rows = add_reference(params, rows, config, model_config)      # once: the reference is the model at the start
    state = dpo(config, model_config, state, batches(rows, ...), steps)

What a tool wrote is context, never scored: ``mask`` is that of supervised rows. Log-probabilities are chunked
(``rl.logprobs``), so no array over the vocabulary is held for a whole row.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.config import Config
from models.sharding import shard_batch, to_host, use_mesh
from rl import losses
from rl.checkpoint import Checkpointer
from rl.finetune import run_steps
from rl.logprobs import selection, token_logprobs
from rl.metrics import MetricsWriter
from rl.optimizer import OptimizerConfig, TrainState, accumulate_gradients, apply_gradients
from rl.rows import pad_rows


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """Settings of :func:`dpo`. Defaults: SimpleDeepSearcher's (arXiv 2505.16834, appendix B)."""

    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(lr=5e-7))
    beta: float = 0.1  # how strongly the policy is held to the reference
    micro_batches: int = 1  # slices the batch of pairs is run in; raise when memory runs out, results stay the same
    logprob_chunk: int = 256  # positions per recomputed piece of the softmax; lower for large vocabularies
    save_every: int = 0  # steps between checkpoints; 0 saves only at the end

    def __post_init__(self):
        for name in ("micro_batches", "logprob_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, not {self.beta}")
        if self.save_every < 0:
            raise ValueError(f"save_every must be at least 0, not {self.save_every}")


def pair_rows(chosen: Mapping[str, np.ndarray], rejected: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Supervised rows of two kinds as pairs: {"tokens": int32 [P, 2, T], "mask": bool [P, 2, T], "lengths": int32
    [P, 2]}, the better one first. Raises ValueError when their numbers differ."""
    count = len(chosen["tokens"])
    if count != len(rejected["tokens"]):
        raise ValueError(f"{count} chosen rows but {len(rejected['tokens'])} rejected ones; pairs need one of each")
    width = max(chosen["tokens"].shape[1], rejected["tokens"].shape[1])
    both = [pad_rows(rows, count, width) for rows in (chosen, rejected)]
    return {name: np.stack([rows[name] for rows in both], axis=1) for name in both[0]}


def preference_loss(scores: jax.Array, reference: jax.Array, beta: float) -> tuple[jax.Array, losses.Metrics]:
    """-log sigmoid(beta m) per pair, m = (s_w - r_w) - (s_l - r_l) (arXiv 2305.18290, equation 7), and metrics.

    scores, reference: float32 [P, 2], sums of log-probabilities of the better and the worse row under policy and
    reference. Returns ([P], {name: (sum, count)}): ``accuracy``, the share of m > 0; ``margin``, beta m; and the two
    implicit rewards beta (s - r).
    """
    rewards = beta * (scores - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    values = {
        "accuracy": (margin > 0).astype(jnp.float32), "margin": margin, "reward_chosen": rewards[:, 0],
        "reward_rejected": rewards[:, 1], "logp_chosen": scores[:, 0], "logp_rejected": scores[:, 1],
    }  # fmt: skip
    count = jnp.float32(len(margin))
    metrics = {name: (jax.lax.stop_gradient(value).sum(), count) for name, value in values.items()}
    return jax.nn.softplus(-margin), metrics


def pair_scores(params: Any, batch: Mapping[str, jax.Array], config: DPOConfig, model_config: Config) -> jax.Array:
    """Sum of the log-probabilities of the learned tokens of each row, float32 [P, 2]."""
    P, _, T = batch["tokens"].shape
    flat = {name: value.reshape(2 * P, *value.shape[2:]) for name, value in batch.items() if name != "reference"}
    mask = jnp.asarray(flat["mask"], jnp.float32).at[:, 0].set(0.0)  # nothing predicts a row's first token
    logp = token_logprobs(
        params, model_config, flat["tokens"], flat.get("lengths"), chunk=config.logprob_chunk,
        select=flat.get("select"),
    )  # fmt: skip
    return jnp.where(mask > 0, logp * mask, 0.0).sum(axis=-1).reshape(P, 2)


def dpo_step(
    state: TrainState, batch: Mapping[str, jax.Array], config: DPOConfig, model_config: Config
) -> tuple[TrainState, losses.Metrics]:
    """One update, pure: the mean loss over the pairs of the global batch, however it is sliced.

    batch: as :func:`pair_rows` and :func:`add_reference` make it, with an optional "select" int32 [P, 2, M]. Metrics:
    loss, those of :func:`preference_loss`, grad_norm, update_norm; all (sum, count).
    """
    pairs = batch["tokens"].shape[0]

    def share(params, micro):
        each, metrics = preference_loss(
            pair_scores(params, micro, config, model_config), micro["reference"], config.beta
        )
        return each.sum() / pairs, {**metrics, "loss": (jax.lax.stop_gradient(each).sum(), jnp.float32(len(each)))}

    _, grads, metrics = accumulate_gradients(share, state.params, dict(batch), config.micro_batches)
    state, more = apply_gradients(state, grads, config.optimizer)
    return state.replace(step=state.step + 1), {**metrics, **more}


@functools.cache
def jitted_dpo_step() -> Callable:
    """:func:`dpo_step` compiled once per configuration, shapes and mesh context; its first argument is donated."""
    return jax.jit(dpo_step, static_argnames=("config", "model_config"), donate_argnums=0)


@functools.cache
def _jitted_scores() -> Callable:
    return jax.jit(pair_scores, static_argnames=("config", "model_config"))


def _with_selection(batch: Mapping[str, Any]) -> dict[str, Any]:
    mask = np.asarray(batch["mask"])
    select = selection(mask.reshape(-1, mask.shape[-1]))
    return dict(batch) if select is None else {**batch, "select": select.reshape(*mask.shape[:2], -1)}


def add_reference(
    params: Any, rows: Mapping[str, np.ndarray], config: DPOConfig, model_config: Config, batch_size: int = 8,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """The pairs with "reference" float32 [P, 2], the scores under ``params``, ``batch_size`` pairs at a time.

    Raises FloatingPointError naming the pair whose score is not finite, ValueError when there is no pair.
    """
    count = len(rows["tokens"])
    if not count:
        raise ValueError("there are no pairs to learn from")
    scores = []
    for start in range(0, count, batch_size):
        take = np.arange(start, start + batch_size) % count  # the last batch is filled up: one shape for all
        batch = _with_selection({name: np.asarray(rows[name])[take] for name in ("tokens", "mask", "lengths")})
        with use_mesh(mesh):
            found = to_host(_jitted_scores()(params, shard_batch(mesh, batch), config, model_config))
        scores.append(found[: count - start])
    reference = np.concatenate(scores)
    losses.check_finite("reference log-prob", reference)
    return {**rows, "reference": reference}


def dpo(
    config: DPOConfig,
    model_config: Config,
    state: TrainState,
    batches: Iterator[Mapping[str, Any]],
    steps: int,
    writer: MetricsWriter | None = None,
    checkpointer: Checkpointer | None = None,
    mesh: jax.sharding.Mesh | None = None,
    on_step: Callable[[int, TrainState, dict[str, float]], None] | None = None,
) -> TrainState:
    """Train on batches of pairs until ``steps`` updates are done in all; everything else is as in
    ``rl.finetune.sft``."""
    return run_steps(
        jitted_dpo_step(), _with_selection, config, model_config, state, batches, steps, writer, checkpointer, mesh,
        on_step,
    )  # fmt: skip
