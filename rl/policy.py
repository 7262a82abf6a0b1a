"""Group-relative policy optimisation: from a trajectory and its rewards to updated weights.

The pieces, in the order ``rl.trainer.train`` calls them: :func:`total_reward`, :func:`loss_mask`, :func:`make_batch`
(host, numpy), :func:`update` (host loop over minibatches) around :func:`update_step` (pure, compiled).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from models.config import Config
from models.sample import bucket
from models.sharding import RULES, shard_batch, to_host, use_mesh
from rl import advantages, losses
from rl.finetune import SFTConfig, sft_loss
from rl.logprobs import selection, token_logprobs
from rl.optimizer import OptimizerConfig, TrainState, accumulate_gradients, apply_gradients
from rl.rows import pad_rows
from rl.trajectory import Status, Trajectory


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """Every choice of the update. Defaults: DeepRec's release (arXiv 2505.16810, section 6), unless said otherwise."""

    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)  # DeepRec: AdamW, lr 1e-6
    prompts_per_step: int = 128  # prompts per rollout
    group_size: int = 8  # trajectories per prompt; more lowers the baseline's noise
    minibatches: int = 2  # updates per pass over a rollout (1,024 trajectories, 512 each); 1 is strictly on-policy
    epochs: int = 1  # passes over a rollout; above 1 only with clipping
    micro_batches: int = 1  # slices a minibatch is run in; raise when memory runs out, results stay the same
    advantage: str = "reinforce_pp_baseline"  # a name in rl.advantages.ADVANTAGES
    adv_clip: float = 10.0  # bound on |A| in reward units before whitening; the two REINFORCE++ forms only
    adv_scale: str = "divide_std"  # "multiply_std" copies DeepRec's released code; the two REINFORCE++ forms only
    # Weight of log(old / reference), taken off the reward at every sampled token (R1-Searcher, arXiv 2503.05592: 1e-4),
    # and discount per token of the returns; the two REINFORCE++ forms only.
    kl_reward: float = 0.0
    gamma: float = 1.0
    clip_low: float = 0.2  # the ratio is clipped below at 1 - clip_low
    clip_high: float = 0.28  # and above at 1 + clip_high; above clip_low keeps rare tokens alive (DAPO)
    dual_clip: float | None = None  # bound on the ratio where A < 0, e.g. 3 (arXiv 1912.09729); None is off
    ratio: str = "token"  # "sequence" is GSPO (arXiv 2507.18071), which wants clips near 3e-4
    aggregation: str = "token"  # "sequence": GRPO; "constant": Dr. GRPO, with constant_tokens
    constant_tokens: int = 0  # tokens, the generation budget that "constant" divides by
    kl: str = "k3"  # estimator of the penalty, see rl.losses.kl_penalty; "k3+" has the gradient of the true KL
    kl_coef: float = 0.0  # weight of the KL penalty to the reference weights; GRPO's paper has 0.04
    tis_cap: float | None = None  # cap of the trainer/sampler correction, e.g. 2; None is off (TRL's default is 3)
    old_logprobs: str = "trainer"  # "sampler" saves a forward pass but adds the sampler's rounding to the ratio
    # Send tokens to the experts that the sampler chose (arXiv 2510.11370): the ratio is then of the same experts. Needs
    # ``RolloutConfig.routing``; the reference weights choose for themselves.
    replay_routing: bool = False
    temperature: float = 1.0  # what the sampler divides its logits by; must be the sampler's own
    max_total: int = 16384  # tokens; longer rows get loss mask 0
    overlong: str = "keep"  # "mask" also drops rows cut off by a length limit from the loss (DAPO, arXiv 2503.14476)
    dynamic_sampling: bool = False  # drop groups whose rewards are all equal from the loss (DAPO)
    reward_weights: tuple[tuple[str, float], ...] = ()  # (reward name, weight); a reward not named weighs 1
    length_buckets: tuple[int, ...] = ()  # padded lengths in tokens, ascending; empty: 16, 24, 32, 48, ...
    logprob_chunk: int = 256  # positions per recomputed piece of the softmax; lower for large vocabularies
    log_entropy: bool = True  # report the policy's entropy in nats per token; costs one more pass over the softmax
    # Weight of the cross-entropy of rows that ``train``'s ``auxiliary`` supplies, added to every update of the step
    # (R1-Searcher++, arXiv 2505.17005: 0.1); 0 leaves them out.
    aux_weight: float = 0.0
    max_env_errors: float = 1.0  # share of a rollout's rows that the environment may fail in before training stops
    save_every: int = 0  # steps between checkpoints; 0 saves only at the end
    seed: int = 0  # order of trajectories in minibatches

    def __post_init__(self):
        for name in ("prompts_per_step", "group_size", "minibatches", "epochs", "micro_batches", "logprob_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        choices = {
            "advantage": tuple(advantages.ADVANTAGES), "adv_scale": ("divide_std", "multiply_std"),
            "ratio": losses.RATIOS, "aggregation": losses.AGGREGATIONS, "kl": losses.KL_KINDS,
            "old_logprobs": ("trainer", "sampler"), "overlong": ("keep", "mask"),
        }  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.group_size == 1 and self.advantage in advantages.HAS_BASELINE:
            raise ValueError("group_size is 1, so a group-relative advantage is 0 everywhere; use at least 2")
        if self.aggregation == "constant" and self.constant_tokens < 1:
            raise ValueError("aggregation 'constant' needs constant_tokens, the generation budget in tokens")
        if self.tis_cap is not None and self.old_logprobs == "sampler":
            raise ValueError("tis_cap corrects the sampler's log-probs, so it needs old_logprobs='trainer'")
        if self.prompts_per_step * self.group_size % (self.minibatches * self.micro_batches):
            raise ValueError(
                f"{self.prompts_per_step} prompts x {self.group_size} trajectories do not split into "
                f"{self.minibatches} minibatches of {self.micro_batches} micro_batches"
            )
        for name in ("kl_reward", "aux_weight", "max_env_errors"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must lie above 0 and be at most 1, not {self.gamma}")
        if (self.kl_reward or self.gamma != 1) and self.advantage not in advantages.WHITENED:
            raise ValueError(
                f"kl_reward and gamma shape the reward of single tokens: they need advantage "
                f"{' or '.join(sorted(advantages.WHITENED))}, not {self.advantage!r}"
            )
        if list(self.length_buckets) != sorted(set(self.length_buckets)):
            raise ValueError(f"length_buckets must ascend, not {self.length_buckets}")

    @property
    def updates_per_step(self) -> int:
        return self.minibatches * self.epochs


@struct.dataclass
class Batch:
    """B rows of T tokens for the update. ids int32 [B, T]; lengths int32 [B]; row int32 [B], place in the rollout;

    mask, advantages, sampler_logprobs float32 [B, T]; old_logprobs, ref_logprobs float32 [B, T] or None;
    select int32 [B, M], the columns that train (``rl.logprobs.selection``), or None for all. routing int16
    [B, T, layers with experts, k], experts to repeat, or None.
    """

    ids: Any
    lengths: Any
    row: Any
    mask: Any
    advantages: Any
    sampler_logprobs: Any
    old_logprobs: Any = None
    ref_logprobs: Any = None
    select: Any = None
    routing: Any = None


def total_reward(rewards: Mapping[str, np.ndarray], valid: np.ndarray, config: GRPOConfig) -> np.ndarray:
    """Weighted sum of the named rewards, float32 [B]; 0 on rows that are not ``valid``.

    Raises FloatingPointError naming reward and sample for a value that is not finite, ValueError for a weight whose
    reward does not exist.
    """
    weights = dict(config.reward_weights)
    if not rewards or set(weights) - set(rewards):
        unknown = sorted(set(weights) - set(rewards))
        raise ValueError(f"reward_weights name {unknown or 'nothing'}, the rollout gave {sorted(rewards) or 'none'}")
    total = np.zeros(len(valid), np.float32)
    for name, values in rewards.items():
        values = np.asarray(values, np.float32)
        if values.shape != total.shape:
            raise ValueError(f"reward {name!r} has shape {values.shape}, wanted one per trajectory: {total.shape}")
        losses.check_finite(f"reward {name!r}", values, valid)
        total += np.where(valid, np.float32(weights.get(name, 1.0)) * values, 0.0)
    return total


def loss_mask(
    trajectory: Trajectory, rewards: np.ndarray, valid: np.ndarray, config: GRPOConfig
) -> tuple[np.ndarray, dict[str, float]]:
    """float32 [B, T], 1 on tokens that train: sampled by us, minus rows that the switches leave out.

    rewards: [B] totals; valid: bool [B], False where the environment failed. Also returns counts per reason.
    """
    too_long = trajectory.lengths > config.max_total
    if config.overlong == "mask":
        too_long = too_long | (trajectory.status == Status.TRUNCATED)
    counts = {"rows_env_error": float((~valid).sum()), "rows_overlong": float((valid & too_long).sum())}
    keep = valid & ~too_long
    if config.dynamic_sampling:
        equal = advantages.equal_reward_groups(rewards, trajectory.groups, valid)
        counts["groups_dropped"] = float(len(np.unique(trajectory.groups[equal])))
        keep &= ~equal
    return (np.asarray(trajectory.sampled) & keep[:, None]).astype(np.float32), counts


def bucket_length(longest: int, buckets: tuple[int, ...] = ()) -> int:
    """Padded length for rows of at most ``longest`` tokens, so that few shapes are ever compiled."""
    if not buckets:
        return bucket(longest)
    fits = [b for b in buckets if b >= longest]
    if not fits:
        raise ValueError(f"a trajectory has {longest} tokens, more than the largest of length_buckets={buckets}")
    return fits[0]


def _fit(x: np.ndarray, size: int) -> np.ndarray:
    """Cut or pad [B, T, ...] to [B, size, ...], with zeros, or -1 (no expert) where there is more than T."""
    x = np.asarray(x)[:, :size]
    pad = ((0, 0), (0, size - x.shape[1])) + ((0, 0),) * (x.ndim - 2)
    return np.pad(x, pad, constant_values=0 if x.ndim == 2 else -1)


@functools.cache
def _estimator(name: str, group_count: int, clip: float, scale: str, gamma: float):
    options = {"clip": clip, "scale": scale, "gamma": gamma} if name in advantages.WHITENED else {}
    return jax.jit(functools.partial(advantages.ADVANTAGES[name], num_groups=group_count, **options))


def estimate(rewards: np.ndarray, groups: np.ndarray, mask: np.ndarray, valid: np.ndarray, config: GRPOConfig, **more):
    """Advantages float32 [B, T] of a whole rollout, on the host: statistics are those of all its rows, whatever the
    mesh. groups: ids as ``advantages.check_groups`` returns them."""
    count = len(groups) // config.group_size
    run = _estimator(config.advantage, count, config.adv_clip, config.adv_scale, config.gamma)
    # valid, not the mask, decides who counts in a group: a row masked out for its length still tells what is good.
    return np.asarray(run(np.asarray(rewards, np.float32), groups, mask, valid=valid.astype(np.float32), **more))


def make_batch(
    trajectory: Trajectory, rewards: np.ndarray, config: GRPOConfig, valid: np.ndarray | None = None
) -> tuple[Batch, dict[str, float]]:
    """Advantages and mask for a rollout, padded to a length bucket; host arrays, and counts for the log.

    rewards: float [B]. valid: bool [B], default all but ``Status.ENV_ERROR``. Raises ValueError when groups are not
    full, and when the routing that the config wants to repeat was not kept.
    """
    if config.replay_routing and trajectory.routing is None:
        raise ValueError("replay_routing repeats the sampler's experts: set RolloutConfig.routing to keep them")
    valid = np.asarray(trajectory.status) != Status.ENV_ERROR if valid is None else np.asarray(valid, bool)
    groups = advantages.check_groups(
        trajectory.groups, config.group_size, baseline=config.advantage in advantages.HAS_BASELINE
    )
    mask, counts = loss_mask(trajectory, rewards, valid, config)
    size = bucket_length(int(trajectory.lengths.max()), config.length_buckets)
    mask = _fit(mask, size)
    batch = Batch(
        ids=_fit(trajectory.ids, size), lengths=np.minimum(trajectory.lengths, size).astype(np.int32),
        row=np.arange(len(groups), dtype=np.int32), mask=mask,
        advantages=estimate(rewards, groups, mask, valid, config),
        sampler_logprobs=_fit(trajectory.logprobs, size), select=selection(mask),
        routing=_fit(trajectory.routing, size) if config.replay_routing else None,
    )  # fmt: skip
    return batch, counts


def score(params, ids, lengths, select, routing, config: GRPOConfig, model_config: Config) -> jax.Array:
    """Log-probs [B, T] of given tokens (0 outside ``select``), in micro-batches, without gradients.

    Whole on every device.
    """
    parts = config.micro_batches
    # Interleaved like accumulate_gradients, so that every slice keeps the batch's sharding.
    split = jax.tree.map(
        lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), (ids, lengths, select, routing)
    )

    def run(micro):
        ids, lengths, select, routing = micro
        return token_logprobs(
            params, model_config, ids, lengths, config.temperature, config.logprob_chunk, select=select, routing=routing
        )  # fmt: skip

    logp = jax.lax.map(run, split)
    logp = logp.swapaxes(0, 1).reshape(ids.shape)
    if jax.sharding.get_abstract_mesh().empty:
        return logp
    return jax.lax.with_sharding_constraint(logp, jax.sharding.PartitionSpec())  # every process reads all rows


def gradients(
    params: Any, batch: Batch, config: GRPOConfig, model_config: Config, aux: Mapping[str, jax.Array] | None = None
) -> tuple[jax.Array, Any, dict[str, Any]]:
    """Loss, gradient and metrics of one minibatch; see :func:`update_step`."""
    below = losses.denominator(batch.mask, config.aggregation, config.constant_tokens)
    rows = batch.row.shape[0]
    index = batch.replace(row=jnp.arange(rows, dtype=jnp.int32))

    def loss(params, micro):
        logp = token_logprobs(
            params, model_config, micro.ids, micro.lengths, config.temperature, config.logprob_chunk,
            entropy=config.log_entropy, select=micro.select, routing=micro.routing,
        )  # fmt: skip
        logp, entropy = logp if config.log_entropy else (logp, None)
        old = jax.lax.stop_gradient(logp) if micro.old_logprobs is None else micro.old_logprobs
        values, metrics = losses.policy_loss(
            logp, old, micro.advantages, micro.mask, clip_low=config.clip_low, clip_high=config.clip_high,
            dual_clip=config.dual_clip, ratio=config.ratio, kl=config.kl, kl_coef=config.kl_coef,
            ref_logp=micro.ref_logprobs, sampler_logp=micro.sampler_logprobs, tis_cap=config.tis_cap,
        )  # fmt: skip
        share = losses.numerator(values, micro.mask, config.aggregation) / below
        if entropy is not None:
            inside = jnp.where(micro.mask > 0, jax.lax.stop_gradient(entropy), 0.0)
            metrics["entropy"] = (inside.sum(), micro.mask.sum())
        bad = (~jnp.isfinite(logp) & (micro.mask > 0)).sum(axis=-1)
        metrics["bad_rows"] = jnp.zeros(rows).at[micro.row].add(bad.astype(jnp.float32))
        return share, metrics

    value, grads, metrics = accumulate_gradients(loss, params, index, config.micro_batches)
    if aux is None or not config.aux_weight:
        return value, grads, metrics
    tokens = jnp.maximum(jnp.asarray(aux["mask"], jnp.float32)[:, 1:].sum(), 1.0)
    settings = SFTConfig(config.optimizer, logprob_chunk=config.logprob_chunk)

    def supervised(params, micro):
        share, more = sft_loss(params, micro, settings, model_config, tokens)
        return config.aux_weight * share, {"aux_loss": more["loss"]}

    more_value, more_grads, more_metrics = accumulate_gradients(supervised, params, dict(aux), config.micro_batches)
    return value + more_value, jax.tree.map(jnp.add, grads, more_grads), {**metrics, **more_metrics}


def update_step(
    state: TrainState,
    batch: Batch,
    config: GRPOConfig,
    model_config: Config,
    aux: Mapping[str, jax.Array] | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """One update on one minibatch, pure: ``(state, batch) -> (state, metrics)``.

    Normalised by the counts of the whole minibatch, so ``micro_batches`` changes memory and nothing else. Without
    ``batch.old_logprobs`` the ratio is 1 by construction (stop_gradient of the same forward). Metrics are (sum, count)
    pairs; "bad_rows" [B] counts log-probs per row that are not finite, for :func:`update` to name.

    aux: supervised rows as ``rl.finetune.sft_step`` takes them, whose mean cross-entropy over all their learned tokens
    is added with weight ``aux_weight``. With None, or weight 0, the program is the one without them.
    """
    value, grads, metrics = gradients(state.params, batch, config, model_config, aux)
    state, more = apply_gradients(state, grads, config.optimizer)
    one = jnp.ones(())
    return state, {**metrics, **more, "loss": (value, one), "tokens": (batch.mask.sum(), one)}


@functools.cache
def jitted_score():
    """:func:`score` compiled once per configuration, shapes and mesh context."""
    return jax.jit(score, static_argnames=("config", "model_config"))


@functools.cache
def jitted_update_step():
    """:func:`update_step` compiled once per configuration, shapes and mesh context; the state is donated."""
    return jax.jit(update_step, static_argnames=("config", "model_config"), donate_argnums=0)


def add_logprobs(
    batch: Batch, params: Any, config: GRPOConfig, model_config: Config, ref_params: Any = None, mesh=None
) -> Batch:
    """Fill ``old_logprobs`` and ``ref_logprobs``, on the host, before any update of this rollout.

    old: the sampler's if the config says so; left None when there is one update per rollout, since then the update's
    own forward gives them; else one forward pass, as ``kl_reward`` needs too. ref: one forward pass of ``ref_params``,
    when given.
    """
    for name in ("kl_coef", "kl_reward"):
        if getattr(config, name) and ref_params is None:
            raise ValueError(f"{name} is not 0: pass ref_params, the weights to stay close to, or set {name}=0")
    inputs = shard_batch(mesh, (batch.ids, batch.lengths, batch.select))
    routing = shard_batch(mesh, batch.routing)

    def run(weights, routing=None):
        with use_mesh(mesh):
            return np.asarray(jitted_score()(weights, *inputs, routing, config, model_config))

    old = batch.sampler_logprobs if config.old_logprobs == "sampler" else None
    if old is None and (config.updates_per_step > 1 or config.kl_reward):
        old = run(params, routing)
        losses.check_finite("log-prob", old, batch.mask)
    reference = None
    if ref_params is not None:
        reference = run(ref_params)
        losses.check_finite("reference log-prob", reference, batch.mask)
    return batch.replace(old_logprobs=old, ref_logprobs=reference)


def penalise(batch: Batch, rewards: np.ndarray, groups: np.ndarray, valid: np.ndarray, config: GRPOConfig) -> Batch:
    """The batch with ``kl_reward`` times log(old / reference), the k1 estimate, taken off every sampled token's reward.

    batch: with both log-probs; rewards, groups, valid: as for :func:`make_batch`. Unchanged when ``kl_reward`` is 0.
    """
    if not config.kl_reward:
        return batch
    groups = advantages.check_groups(groups, config.group_size, baseline=config.advantage in advantages.HAS_BASELINE)
    penalty = config.kl_reward * losses.kl_penalty(np.asarray(batch.old_logprobs), np.asarray(batch.ref_logprobs), "k1")
    return batch.replace(advantages=estimate(rewards, groups, batch.mask, valid, config, penalty=penalty))


def auxiliary_rows(rows: Mapping[str, np.ndarray] | None, config: GRPOConfig, slots: int) -> dict[str, Any] | None:
    """Supervised rows padded to a bucket of lengths and of numbers of rows that ``slots`` divides, so that few shapes
    reach the compiler; None when there is nothing to learn from or ``aux_weight`` is 0."""
    if rows is None or not config.aux_weight or not np.asarray(rows["mask"])[:, 1:].any():
        return None
    n, size = rows["tokens"].shape
    out = pad_rows(rows, -(-bucket(n, 4) // slots) * slots, bucket_length(size, config.length_buckets))
    select = selection(out["mask"])
    return out if select is None else {**out, "select": select}


def trained_rows(trains: np.ndarray, rows: np.ndarray, slots: int) -> np.ndarray:
    """Those of ``rows`` that are run: all that train, in order, filled up with others to a quarter of their number.

    trains: bool [R], whether a row holds a token to learn from; the others add exactly 0 to loss and gradient, so
    running them only costs time. Quarters keep the number of compiled programs at four; a quarter that ``slots`` does
    not divide means all rows. Empty when no row trains.
    """
    wanted, quarter = int(trains.sum()), len(rows) // 4
    if not wanted:
        return rows[:0]
    if quarter % slots or len(rows) % 4:
        return rows
    count = -(-wanted // quarter) * quarter
    return rows[np.sort(np.argsort(~trains, kind="stable")[:count])]


def update(
    state: TrainState, batch: Batch, config: GRPOConfig, model_config: Config, step: int, mesh=None,
    aux: Mapping[str, np.ndarray] | None = None,
) -> tuple[TrainState, dict[str, float]]:  # fmt: skip
    """All updates of one rollout: ``epochs`` passes over ``minibatches`` shuffled parts. Returns mean metrics.

    aux: supervised rows (``rl.rows``) that every update also learns, all of them, with weight ``aux_weight``.

    A part without any token to learn from is skipped and counted: stepping on a zero gradient would still move the
    weights by Adam's momentum. Raises FloatingPointError naming the sample whose log-prob is not finite.
    """
    run = jitted_update_step()
    rows = len(batch.row)
    # What the program does not depend on is no part of its key: stages that differ in rewards share one compilation.
    static = dataclasses.replace(config, reward_weights=(), seed=0, save_every=0, max_env_errors=1.0)
    # What a slice's rows must divide by: the micro-batches, and the devices that a batch is split over.
    slots = config.micro_batches * (1 if mesh is None else math.prod(mesh.shape.get(a, 1) for a in RULES["batch"]))
    aux = auxiliary_rows(aux, config, slots)
    extra = () if aux is None else (shard_batch(mesh, aux),)
    if aux is None:
        static = dataclasses.replace(static, aux_weight=0.0)
    totals: dict[str, tuple[float, float]] = {}
    skipped = 0
    for epoch in range(config.epochs):
        order = np.arange(rows)
        if config.minibatches > 1:
            np.random.default_rng((config.seed, step, epoch)).shuffle(order)
        for part in np.split(order, config.minibatches):
            part = trained_rows(np.asarray(batch.mask)[part].any(axis=1), part, slots)
            if not len(part):
                skipped += 1
                continue
            chosen = jax.tree.map(lambda x, part=part: np.asarray(x)[part], batch)
            with use_mesh(mesh):
                state, metrics = run(state, shard_batch(mesh, chosen), static, model_config, *extra)
            bad = np.flatnonzero(to_host(metrics.pop("bad_rows")))
            if bad.size:
                names = ", ".join(str(chosen.row[i]) for i in bad[:8])
                raise FloatingPointError(
                    f"log-prob is not finite for sample {names} of the rollout at step {step} ({bad.size} of "
                    f"{len(part)} rows): lower the learning rate and restart from the last checkpoint"
                )
            for name, (total, count) in jax.device_get(metrics).items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = (before[0] + float(total), before[1] + float(count))
    means = losses.mean_metrics(totals)
    return state, {**means, "updates_skipped": float(skipped)}
