"""Trains a recommender: one device dispatch per epoch, early stopping, exact resume.

The whole training set lies on the device; an epoch is one jitted ``lax.scan`` over shuffled batches with donated
state. Batches are **stratified by history length**: every batch holds the same share of short, middle and long
histories, and each share runs at its own padded width. Padding changes no state, so results are those of the padded
batch; on MovieLens-100K the short shares save about a fifth of the work.

What happens in epoch e depends on (seed, e) only, so a run that is resumed from any epoch's state equals the
uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.recsys.base import SequenceModel, get_params, set_params
from models.recsys.functional import bce, bpr, check_histories, cross_entropy, draw_negatives

LOSSES = ("ce", "bpr", "bce")
FORMS = ("prefix", "all")


@dataclass(frozen=True)
class RecommenderConfig:
    """How to train. Defaults are RecBole's (batch 2048, Adam 1e-3, at most 300 epochs, patience 10)."""

    lr: float = 1e-3
    batch_size: int = 2048  # rows per step: prefix samples, or windows in the "all" form
    epochs: int = 300
    patience: int = 10  # evaluations without improvement before the run stops
    eval_every: int = 1  # epochs between evaluations
    loss: str = "ce"  # "ce" full softmax | "bpr" | "bce", the latter two with one uniform unseen negative
    form: str = "prefix"  # "prefix" one target per sample | "all" a target at every position of a window
    seed: int = 2020
    select: str = "ndcg@10"  # key of the evaluation that early stopping maximises
    weight_decay: float = 0.0
    beta2: float = 0.999
    clip_norm: float | None = None
    length_buckets: int = 3  # widths per batch (prefix form); 1 = one padded width
    score_budget: int = 2**26  # scores held at once by the softmax loss; beyond it rows go in recomputed chunks

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {LOSSES}, got {self.loss!r}")
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {FORMS}, got {self.form!r}")
        for name in ("batch_size", "epochs", "patience", "eval_every", "length_buckets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class FitResult:
    """module: the best weights (the last ones without an evaluation).  history: one dict per epoch run so far.
    best_epoch: 0-based.  state: the final state, from which ``fit`` continues with more epochs."""

    module: SequenceModel
    history: list[dict[str, float]]
    best_epoch: int
    best_score: float
    state: dict[str, Any]


def init_state(module: SequenceModel, config: RecommenderConfig) -> dict[str, Any]:
    """The state before epoch 0: a pytree of arrays, also the target tree for restoring a checkpoint."""
    params = jax.tree.map(jnp.copy, get_params(module))
    empty = np.full((config.epochs,), np.nan, np.float32)
    return {
        "params": params,
        "opt": _optimizer(config).init(params),
        "best": jax.tree.map(jnp.copy, params),
        "best_epoch": np.int32(-1),
        "epoch": np.int32(0),
        "loss": empty,
        "score": empty.copy(),
        "seconds": empty.copy(),
    }


def fit(
    module: SequenceModel,
    train: Mapping[str, np.ndarray],
    config: RecommenderConfig,
    *,
    evaluate: Callable[[SequenceModel], Mapping[str, float]] | None = None,
    text: Callable[[jax.Array, dict[str, jax.Array]], jax.Array] | None = None,
    seen: np.ndarray | None = None,
    progress: Callable[[dict[str, float]], None] | None = None,
    on_epoch: Callable[[int, dict[str, Any]], None] | None = None,
    state: dict[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> FitResult:
    """Train ``module`` (not changed; the result holds a new one).

    Args:
      train: "history" int32 [n, L] right-padded, "lengths" [n], "targets" [n] (prefix form), or "items" [W, L] and
        "targets" [W, L] with 0 = no target (all-position form). Further arrays with n rows reach ``text`` by name;
        "text" float32 [n, D] is used as the preference text when ``text`` is None.
      evaluate: validation metrics of a module; must hold ``config.select``. Do not keep the module it is given.
      text: ``(key, batch) -> [B, D]``, jittable (a function or a pytree such as ``PhraseMixer``).
      seen: int32 [U+1, M], ids that are never negatives of a user, 0-padded; needs "users" [n] in ``train``. Default:
        the ids of the sample's own history and targets.
      progress: called with {"epoch", "loss", "seconds", metrics...} after each epoch.
      on_epoch: called with (epochs done, state as numpy copies) after each epoch, to write a checkpoint.
      state: a state from ``on_epoch`` or ``FitResult.state`` to continue from.
      mesh: batches are split over its "data" axis, weights replicated.

    Raises ValueError (config or arrays that do not fit), IndexError (an item id), FloatingPointError (loss not finite).
    """
    plan = _plan(module, train, config, 1 if mesh is None else mesh.shape["data"])
    if text is not None and not module.uses_text:
        raise ValueError(f"{type(module).__name__} takes no text: leave text out")
    if seen is not None and "users" not in train:
        raise ValueError('seen needs train["users"], the row of seen for each sample')
    if text is not None and jax.tree.leaves(text) == [text]:
        text = jax.tree_util.Partial(text)
    graphdef, weights, rest = nnx.split(module, nnx.Param, ...)
    treedef, names = jax.tree.structure(weights), tuple(get_params(module))
    place = jnp.asarray if mesh is None else partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec()))
    data = jax.tree.map(
        place, {"train": dict(train), "members": plan.members, "rest": rest, "text": text, "seen": seen}
    )
    state = dict(init_state(module, config) if state is None else state)
    for name in ("loss", "score", "seconds"):
        filled = np.full((config.epochs,), np.nan, np.float32)
        filled[: len(state[name])] = np.asarray(state[name])[: config.epochs]
        state[name] = filled
    # the epoch gives its buffers away: work on copies, so the caller's state stays usable
    trained = jax.tree.map(lambda x: place(jnp.array(x, copy=True)), (state["params"], state["opt"]))
    static = _Static(graphdef, treedef, names, config, plan.widths, plan.quotas, plan.steps, mesh)

    for epoch in range(int(state["epoch"]), config.epochs):
        if evaluate is not None and _evaluations_since_best(state, config, epoch) >= config.patience:
            break
        start = time.perf_counter()
        trained, loss = _epoch(static, data, trained, np.int32(epoch))
        state["loss"][epoch] = float(loss)
        state["seconds"][epoch] = time.perf_counter() - start
        if not np.isfinite(state["loss"][epoch]):
            raise FloatingPointError(f"the training loss is not finite in epoch {epoch}: lower lr ({config.lr})")
        record = {"epoch": epoch, "loss": float(loss), "seconds": float(state["seconds"][epoch])}
        best = state["score"][state["best_epoch"]] if state["best_epoch"] >= 0 else -np.inf
        if evaluate is None:
            state["best_epoch"] = np.int32(epoch)
        elif (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs:
            metrics = dict(evaluate(set_params(module, trained[0])))
            if config.select not in metrics:
                raise ValueError(f"evaluate gave {sorted(metrics)}, but select = {config.select!r} is needed")
            state["score"][epoch] = metrics[config.select]
            record |= metrics
            if state["score"][epoch] > best:
                state["best_epoch"], state["best"] = np.int32(epoch), jax.tree.map(jnp.copy, trained[0])
        state["epoch"] = np.int32(epoch + 1)
        if progress is not None:
            progress(record)
        if on_epoch is not None:
            on_epoch(epoch + 1, _host_copy(state, trained, evaluate is None))
    state = _host_copy(state, trained, evaluate is None)
    history = [
        {"epoch": e, "loss": float(state["loss"][e]), config.select: float(state["score"][e])}
        for e in range(int(state["epoch"]))
    ]
    best_epoch = int(state["best_epoch"])
    best_score = float(state["score"][best_epoch]) if best_epoch >= 0 else float("nan")
    return FitResult(set_params(module, state["best"]), history, best_epoch, best_score, state)


# --- batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    members: tuple[np.ndarray, ...]  # sample numbers of each length bucket
    widths: tuple[int, ...]  # padded width of each bucket
    quotas: tuple[int, ...]  # rows of each bucket in every batch
    steps: int


def _plan(module: SequenceModel, train: Mapping[str, np.ndarray], config: RecommenderConfig, shards: int) -> _Plan:
    if config.form not in module.forms:
        raise ValueError(f"{type(module).__name__} can be trained in the forms {module.forms}, not {config.form!r}")
    need = ("history", "lengths", "targets") if config.form == "prefix" else ("items", "targets")
    missing = [name for name in need if name not in train]
    if missing:
        raise ValueError(f"the {config.form!r} form needs the arrays {need}; missing {missing}")
    counts = {name: len(array) for name, array in train.items()}
    if len(set(counts.values())) != 1 or not counts[need[0]]:
        raise ValueError(f"training arrays must have the same, positive number of rows, got {counts}")
    history, targets = np.asarray(train[need[0]]), np.asarray(train["targets"])
    if history.shape[1] > module.max_len:
        raise ValueError(f"training histories have {history.shape[1]} columns, max_len is {module.max_len}")
    if not module.trims_padding and history.shape[1] != module.max_len:
        raise ValueError(f"training histories must have max_len = {module.max_len} columns, got {history.shape[1]}")
    lengths = np.asarray(train["lengths"]) if config.form == "prefix" else (history > 0).sum(1)
    check_histories(history, lengths, module.num_items)
    low = 1 if config.form == "prefix" else 0
    if targets.min() < low or targets.max() > module.num_items:
        raise IndexError(f"targets span {targets.min()}..{targets.max()}, allowed is {low}..{module.num_items}")

    full = history.shape[1]
    buckets = config.length_buckets if config.form == "prefix" and module.trims_padding else 1
    edges = sorted({math.ceil(full * (i + 1) / buckets) for i in range(buckets)})
    bucket = np.searchsorted(edges, lengths)
    groups = [np.flatnonzero(bucket == i) for i in range(len(edges))]
    kept = [(g.astype(np.int32), w) for g, w in zip(groups, edges, strict=True) if g.size]
    steps = math.ceil(len(history) / config.batch_size)
    quotas = tuple(math.ceil(math.ceil(g.size / steps) / shards) * shards for g, _ in kept)
    return _Plan(tuple(g for g, _ in kept), tuple(w for _, w in kept), quotas, steps)


def _shuffled(key: jax.Array, members: jax.Array, quota: int, steps: int) -> tuple[jax.Array, jax.Array]:
    """Sample numbers and weights [steps, quota]: each member once, the missing rows (weight 0) spread over steps."""
    order = jax.random.permutation(key, members)
    order = jnp.pad(order, (0, quota * steps - members.shape[0]), constant_values=-1)
    order = order.reshape(quota, steps).T
    # a missing row repeats a member: any other sample could be longer than this bucket is wide
    return jnp.where(order >= 0, order, members[0]), (order >= 0).astype(jnp.float32)


# --- the epoch -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Static:
    graphdef: Any
    treedef: Any  # of the module's parameter state
    names: tuple[str, ...]  # its leaves, in order
    config: RecommenderConfig
    widths: tuple[int, ...]
    quotas: tuple[int, ...]
    steps: int
    mesh: Mesh | None


def _optimizer(config: RecommenderConfig) -> optax.GradientTransformation:
    adam = optax.adamw(config.lr, b2=config.beta2, weight_decay=config.weight_decay)
    return adam if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adam)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _epoch(static: _Static, data: dict[str, Any], trained: Any, epoch: jax.Array) -> tuple[Any, jax.Array]:
    key = jax.random.fold_in(jax.random.key(static.config.seed), epoch)
    shuffle_keys = jax.random.split(jax.random.fold_in(key, static.steps), len(static.quotas))
    order = tuple(
        _shuffled(k, members, quota, static.steps)
        for k, members, quota in zip(shuffle_keys, data["members"], static.quotas, strict=True)
    )
    optimizer = _optimizer(static.config)

    def step(carry, batch):
        params, opt = carry
        number, rows = batch
        (total, weight), grads = jax.value_and_grad(_loss, has_aux=True)(
            params, static, data, rows, jax.random.fold_in(key, number)
        )
        updates, opt = optimizer.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), (total * weight, weight)

    trained, (totals, weights) = jax.lax.scan(step, trained, (jnp.arange(static.steps), order))
    return trained, totals.sum() / weights.sum()


def _loss(params: Any, static: _Static, data: Any, rows: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean loss over the real targets of a batch, and their number."""
    module = nnx.merge(static.graphdef, static.treedef.unflatten([params[n] for n in static.names]), data["rest"])
    parts = []
    for i, ((index, weight), width) in enumerate(zip(rows, static.widths, strict=True)):
        batch = {name: array[index] for name, array in data["train"].items()}
        if static.mesh is not None:
            split = NamedSharding(static.mesh, PartitionSpec("data"))
            batch, weight = jax.lax.with_sharding_constraint((batch, weight), split)
        parts.append(_states(module, static.config, data, batch, width, weight, jax.random.fold_in(key, i)))
    states, targets, weights, seen = (jnp.concatenate(part) for part in zip(*parts, strict=True))
    if static.config.loss == "ce":
        losses = _softmax_loss(module, states, targets, static.config.score_budget)
    else:
        losses = _pair_loss(module, static.config.loss, states, targets, seen, jax.random.fold_in(key, len(parts)))
    weights = weights * (targets > 0)
    total = weights.sum()
    return (losses * weights).sum() / jnp.maximum(total, 1.0), total


def _states(module, config, data, batch, width: int, weight: jax.Array, key: jax.Array) -> tuple[jax.Array, ...]:
    """Flat states [R, d], targets [R], weights [R] of one bucket, and the ids that are no negatives [B, M]."""
    model_key, text_key = jax.random.split(key)
    if config.form == "all":
        lengths = (batch["items"] > 0).sum(1)
        states = module.states(batch["items"], lengths, key=model_key)
        targets = batch["targets"]
        flat = states.reshape(-1, states.shape[-1]), targets.reshape(-1), jnp.repeat(weight, targets.shape[1])
        own = jnp.concatenate([batch["items"], targets], axis=1)
    else:
        extra = {}
        if data["text"] is not None:
            extra["text_vectors"] = data["text"](text_key, batch)
        elif module.uses_text and "text" in batch:
            extra["text_vectors"] = batch["text"]
        states = module.last_state(batch["history"][:, :width], batch["lengths"], key=model_key, **extra)
        flat = states, batch["targets"], weight
        # buckets are concatenated, so every bucket lists its seen ids at the full width
        own = jnp.concatenate([batch["history"], batch["targets"][:, None]], axis=1)
    return *flat, own if data["seen"] is None else data["seen"][batch["users"]]


def _softmax_loss(module: SequenceModel, states: jax.Array, targets: jax.Array, budget: int) -> jax.Array:
    def rows_loss(states, targets):
        return cross_entropy(module.scores(states) / module.temperature, targets)

    rows, columns = states.shape[0], module.num_items + 1
    chunks = math.ceil(rows * columns / budget)
    if chunks == 1:
        return rows_loss(states, targets)
    size = math.ceil(rows / chunks)
    states = jnp.pad(states, ((0, size * chunks - rows), (0, 0))).reshape(chunks, size, -1)
    padded = jnp.pad(targets, (0, size * chunks - rows)).reshape(chunks, size)
    return jax.lax.map(lambda x: jax.checkpoint(rows_loss)(*x), (states, padded)).reshape(-1)[:rows]


def _pair_loss(module, name: str, states: jax.Array, targets: jax.Array, seen: jax.Array, key: jax.Array) -> jax.Array:
    per_row = states.shape[0] // seen.shape[0]
    negatives = draw_negatives(key, seen, module.num_items, per_row).reshape(-1)
    scores = module.score_items(states, jnp.stack([targets, negatives], axis=1))
    return {"bpr": bpr, "bce": bce}[name](scores[:, 0], scores[:, 1])


def _evaluations_since_best(state: dict[str, Any], config: RecommenderConfig, epoch: int) -> int:
    evaluated = np.flatnonzero(np.isfinite(state["score"][:epoch]))
    return int((evaluated > state["best_epoch"]).sum())


def _host_copy(state: dict[str, Any], trained: Any, last_is_best: bool) -> dict[str, Any]:
    """The state as numpy copies: the live buffers are given away to the next epoch."""
    state = state | {"params": trained[0], "opt": trained[1]}
    if last_is_best:
        state["best"] = trained[0]
    return jax.tree.map(lambda x: np.array(x, copy=True), state)
