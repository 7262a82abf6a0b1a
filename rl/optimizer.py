"""AdamW or Muon with gradient clipping and a schedule, the training state, and exact gradient accumulation."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from models import lora
from models.sharding import place

SCHEDULES = ("constant", "cosine", "linear")
_NO_DECAY = ("norm", "bias", "scale")
# Decoder weights that Muon steps: axes of the input and of the output; those before them stack layers and experts.
_MATRICES = {
    "wq": ((1,), (2, 3)), "wk": ((1,), (2, 3)), "wv": ((1,), (2, 3)), "wo": ((1, 2), (3,)),
    "w_gate": ((1,), (2,)), "w_up": ((1,), (2,)), "w_down": ((1,), (2,)),
    "e_gate": ((2,), (3,)), "e_up": ((2,), (3,)), "e_down": ((2,), (3,)),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Settings of AdamW (arXiv 1711.05101). Defaults: DeepRec's release (arXiv 2505.16810), unless said otherwise."""

    lr: float = 1e-6  # peak learning rate per update; supervised runs want 1e-5 or more
    schedule: str = "constant"  # "constant", "cosine" or "linear", down to final_scale * lr
    warmup_steps: int = 0  # updates of linear rise from 0 to lr; 0 as in DeepRec, 3-10 % of a supervised run
    horizon_steps: int = 0  # update at which the decay ends; needed by "cosine" and "linear"
    final_scale: float = 0.1  # fraction of lr left after the horizon
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # Adam's denominator guard; optax's default
    weight_decay: float = 0.0  # per update, times lr; never on norms and biases
    clip: float | None = 1.0  # largest global gradient norm; None switches clipping off
    # Above 0: the blocks' matrices take Muon's orthogonal steps (arXiv 2502.16982) of this size, on the same schedule,
    # and only the rest AdamW's. A model from scratch learns to copy several times sooner with it (0.03 works).
    muon_lr: float = 0.0
    # Leaves that stay with AdamW all the same. Orthogonal steps make all of a layer's experts write about equally long
    # outputs, so that these no longer tell which experts matter; with AdamW they differ as they do in published models.
    muon_skip: tuple[str, ...] = ()

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        for name in ("lr", "muon_lr"):
            if getattr(self, name) < 0 or not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite and at least 0, not {getattr(self, name)}")
        if unknown := set(self.muon_skip) - set(_MATRICES):
            raise ValueError(f"muon_skip: no {min(unknown)!r}; matrices that Muon takes: {', '.join(_MATRICES)}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, not {self.warmup_steps}")
        if self.schedule != "constant" and self.horizon_steps <= self.warmup_steps:
            raise ValueError(
                f"schedule {self.schedule!r} needs horizon_steps ({self.horizon_steps}) above "
                f"warmup_steps ({self.warmup_steps})"
            )
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip must be above 0, or None for no clipping, not {self.clip}")


def learning_rate(config: OptimizerConfig, peak: float | None = None) -> optax.Schedule:
    """The schedule as a function of the number of updates done so far; ``peak`` instead of ``lr`` where given."""
    peak = config.lr if peak is None else peak
    decay_steps = max(1, config.horizon_steps - config.warmup_steps)
    main = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay_steps, config.final_scale),
        "linear": lambda: optax.linear_schedule(peak, peak * config.final_scale, decay_steps),
    }[config.schedule]()
    if not config.warmup_steps:
        return main
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, main], [config.warmup_steps])


def decay_mask(params: Any) -> Any:
    """True on the leaves that weight decay applies to: all but norms, scales and biases, told by the leaf's name."""

    def decays(path, _):
        name = _leaf_name(path)
        return not (any(word in name for word in _NO_DECAY) or name in ("bq", "bk", "bv"))

    return jax.tree_util.tree_map_with_path(decays, params)


def _leaf_name(path: tuple) -> str:
    return str(getattr(path[-1], "key", getattr(path[-1], "name", path[-1]))) if path else ""


def _muon_axes(params: Any, skip: tuple[str, ...] = ()) -> Any:
    """Per leaf what Muon takes for its matrix: ``MuonDimensionNumbers``, or None for the leaves AdamW steps."""

    def axes(path, leaf):
        name = _leaf_name(path)
        ins, outs = ((), ()) if name in skip else _MATRICES.get(name, ((), ()))
        fits = ins and min(ins) + len(ins) + len(outs) == getattr(leaf, "ndim", 0)
        return optax.contrib.MuonDimensionNumbers(ins, outs) if fits else None

    return jax.tree_util.tree_map_with_path(axes, params)


def _kinds(params: Any, skip: tuple[str, ...] = ()) -> Any:
    """ "muon" or "adamw" per leaf."""
    is_axes = lambda x: x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)  # noqa: E731
    return jax.tree.map(lambda axes: "adamw" if axes is None else "muon", _muon_axes(params, skip), is_leaf=is_axes)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (with ``muon_lr``: Muon on the blocks' matrices), as an optax transformation."""
    step = optax.adamw(
        learning_rate(config), config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decay_mask
    )
    if config.muon_lr:
        matrices = optax.contrib.muon(
            learning_rate(config, config.muon_lr), weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=functools.partial(_muon_axes, skip=config.muon_skip),
        )  # fmt: skip
        kinds = functools.partial(_kinds, skip=config.muon_skip)
        step = optax.multi_transform({"adamw": step, "muon": matrices}, kinds)
    return step if config.clip is None else optax.chain(optax.clip_by_global_norm(config.clip), step)


@struct.dataclass
class TrainState:
    """All that a training run changes, as one pytree (and so one checkpoint item).

    params: weights; keep them float32, since at these learning rates bfloat16 would round updates away (those that
    low-rank changes leave frozen, ``models.lora``, can be bfloat16). opt_state: optax's, of what is trained.
    step: int32 scalar, trainer steps done. key: typed PRNG key, constant; step n uses ``fold_in(key, n)``.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array


def init_state(params: Any, config: OptimizerConfig, seed: int | jax.Array = 0) -> TrainState:
    """A fresh state around ``params``; moments lie where their parameters lie, whatever the mesh.

    seed: int, or a typed key.
    """
    optimizer = make_optimizer(config)
    key = jax.random.key(seed) if isinstance(seed, int) else seed
    step = jnp.zeros((), jnp.int32)
    trained, _ = lora.split(params)
    places = _places(trained, optimizer)
    if places is None:
        return TrainState(params, jax.jit(optimizer.init)(trained), step, key)
    shardings, whole = places
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(trained)
    return TrainState(params, opt_state, place(step, whole), place(key, whole))


def abstract_state(params: Any, config: OptimizerConfig) -> TrainState:
    """What :func:`init_state` would make, as shapes, dtypes and places; params: a tree of ``ShapeDtypeStruct``."""
    optimizer = make_optimizer(config)
    trained, _ = lora.split(params)
    shardings, whole = _places(trained, optimizer) or (None, None)

    def struct_of(leaf, place=None):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    opt_state = jax.eval_shape(optimizer.init, trained)
    opt_state = jax.tree.map(struct_of, opt_state, *(() if shardings is None else (shardings,)))
    step, key = jax.eval_shape(lambda: (jnp.zeros((), jnp.int32), jax.random.key(0)))
    return TrainState(params, opt_state, struct_of(step, whole), struct_of(key, whole))


def _places(params: Any, optimizer: optax.GradientTransformation) -> tuple[Any, jax.sharding.NamedSharding] | None:
    """Shardings of the optimiser's state, and the one that replicates; None where the weights lie on no mesh."""
    placed = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params)]
    mesh = next((s.mesh for s in placed if isinstance(s, jax.sharding.NamedSharding)), None)
    if mesh is None:
        return None
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    # zeros_like carries no sharding through jit, so the moments' places are given explicitly: a leaf of the optimiser's
    # state whose path ends like a weight's lies where that weight lies (counts and the like: everywhere).
    weights = dict(jax.tree_util.tree_flatten_with_path(params)[0])

    def beside(path, leaf):
        twin = next((weights[path[i:]] for i in range(len(path)) if path[i:] in weights), None)
        return twin.sharding if twin is not None and twin.shape == leaf.shape else whole

    return jax.tree_util.tree_map_with_path(beside, jax.eval_shape(optimizer.init, params)), whole


def apply_gradients(state: TrainState, grads: Any, config: OptimizerConfig) -> tuple[TrainState, dict[str, Any]]:
    """One optimiser update; ``step`` is left to the caller, since a trainer step may hold several updates.

    grads: of what is trained (``models.lora.split``). Returns the state and metrics ``grad_norm`` (before clipping) and
    ``update_norm`` as (sum, count) pairs. An update of exactly 0 leaves a weight's bits alone (adding 0.0 would turn
    -0.0 into 0.0).
    """
    trained, frozen = lora.split(state.params)
    updates, opt_state = make_optimizer(config).update(grads, state.opt_state, trained)
    trained = jax.tree.map(lambda p, u: jnp.where(u == 0, p, p + u.astype(p.dtype)), trained, updates)
    params = lora.combine(trained, frozen)
    one = jnp.ones((), jnp.float32)
    metrics = {"grad_norm": (optax.tree.norm(grads), one), "update_norm": (optax.tree.norm(updates), one)}
    return state.replace(params=params, opt_state=opt_state), metrics


def accumulate_gradients(
    loss: Callable[[Any, Any], tuple[jax.Array, dict[str, Any]]], params: Any, batch: Any, micro_batches: int
) -> tuple[jax.Array, Any, dict[str, Any]]:
    """Value, gradient and metrics of ``loss`` summed over ``micro_batches`` slices of the batch's leading axis.

    The gradient is with respect to what is trained of ``params`` (``models.lora.split``): all, or low-rank changes.
    loss(params, micro) -> (scalar, {name: (sum, count)}): a *share* of the batch's loss, already divided by the whole
    batch's denominator, so the sum is exact however tokens are spread. Memory is that of one slice. Sums are float32.
    Raises ValueError when the batch does not divide.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    if micro_batches < 1 or rows % micro_batches:
        raise ValueError(f"{rows} rows cannot be split into micro_batches={micro_batches} equal parts")
    params, frozen = lora.split(params)
    differentiate = jax.value_and_grad(lambda params, micro: loss(lora.combine(params, frozen), micro), has_aux=True)
    if micro_batches == 1:
        (value, metrics), grads = differentiate(params, batch)
        return value, grads, metrics
    # Slice i takes rows i, i+n, ...: a batch split over devices stays split the same way in every slice.
    slices = jax.tree.map(lambda x: x.reshape(rows // micro_batches, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total, micro):
        (value, metrics), grads = differentiate(params, micro)
        return jax.tree.map(jnp.add, total, (value, grads, metrics)), None

    first = jax.eval_shape(lambda p, b: differentiate(p, jax.tree.map(lambda x: x[0], b)), params, slices)
    (value, metrics), grads = first
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (value, grads, metrics))
    total, _ = jax.lax.scan(add, zeros, slices)
    return total
