"""Knowledge neurons: which units of the MLPs fire for knowledge from parameters, which for knowledge from a passage.

KAPE, knowledge activation probability entropy (arXiv 2505.11995, our reading: the paper's formulas were not at hand).
It is LAPE (arXiv 2402.16438) with two conditions, "internal" and "external"::

    counts = count_firings(params, config, batches)                    once per condition, [L, F] each
    p = activation_probabilities(internal_counts, external_counts)     [2, L, F]
    found = select_neurons(p, Selection())                             found.internal, found.external: bool [L, F]
    edit = deactivate(found.internal, config)                          for models.forward and the sampler

A neuron is unit f of layer l; a set of neurons is a bool array [L, F]. Letters as in the README.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from analysis.batches import check_per_token, check_tokens
from models.config import Config
from models.params import Params
from models.taps import Edit, Reduced, Replace, Scale
from models.transformer import forward

# A firing test by its name in neuron files -> the site that is compared with 0. The site "mlp.gate" stands before the
# activation; SiLU and GELU keep its sign, so that comparing it is comparing the activated gate.
FIRING = {"gate>0": "mlp.gate", "z>0": "mlp.act"}
CONDITIONS = ("internal", "external")


@dataclasses.dataclass(frozen=True)
class Selection:
    """How neurons are counted and chosen; the values are those of LAPE's code (arXiv 2402.16438).

    rate: the share of all neurons to keep. filter_quantile: neurons count whose probability lies above this quantile of
    all probabilities in at least one condition. bar_quantile: a chosen neuron belongs to conditions in which it lies
    above this one. assign: "argmax", the condition with the larger probability (our reading), or "bar", each condition
    above the bar (LAPE). firing: a key of ``FIRING``. min_tokens: fewer counted tokens per condition are refused.
    """

    rate: float = 0.01
    filter_quantile: float = 0.95
    bar_quantile: float = 0.95
    assign: str = "argmax"
    firing: str = "gate>0"
    min_tokens: int = 1000

    def __post_init__(self):
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate is a share of all neurons in (0, 1], not {self.rate}")
        for name in ("filter_quantile", "bar_quantile"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        if self.assign not in ("argmax", "bar"):
            raise ValueError(f"assign must be 'argmax' or 'bar', not {self.assign!r}")
        check_firing(self.firing)
        if self.min_tokens < 1:
            raise ValueError(f"min_tokens must be at least 1, not {self.min_tokens}")


def check_firing(firing: str) -> None:
    """Raise ValueError unless ``firing`` names a firing test."""
    if firing not in FIRING:
        raise ValueError(f"firing must be one of {', '.join(map(repr, FIRING))}, not {firing!r}")


def check_dense(config: Config) -> None:
    """Raise ValueError for models with experts: their units fire only for tokens that were routed to them."""
    if config.experts:
        raise ValueError(
            f"a {config.family} model has {config.experts} experts in {config.moe_layers} of its {config.layers} "
            "layers, whose neurons see routed tokens only; knowledge neurons are defined here for models without "
            "experts"
        )


def check_mask(neurons: np.ndarray, config: Config) -> np.ndarray:
    """``neurons`` as bool [L, F]; ValueError for a mask of another model or dtype."""
    neurons, want = np.asarray(neurons), (config.layers, config.ffn_dim)
    if neurons.shape != want or neurons.dtype != bool:
        raise ValueError(
            f"a set of neurons of this model is bool [layers, ffn_dim] = {list(want)}, got {neurons.dtype} "
            f"{list(neurons.shape)}: was it made for another model?"
        )
    return neurons


# Counting


@struct.dataclass
class FiringCounter:
    """Function of a ``models.taps.Reduced``: how often each unit fires on counted tokens, int32 [F] per layer.

    counted: bool [B, T], cut or padded with False to the width of the site. site: of ``FIRING``.
    """

    counted: jax.Array
    site: str = struct.field(pytree_node=False, default="mlp.gate")

    def __call__(self, values: dict[str, jax.Array]) -> jax.Array:
        x = values[self.site]
        fires = (x > 0) & _of_width(self.counted, x.shape[1])[..., None]
        return jnp.sum(fires, axis=(0, 1), dtype=jnp.int32)


def _of_width(mask: jax.Array, width: int) -> jax.Array:
    """mask [B, T] cut or padded with False to [B, width]: the sampler pads prompts to its buckets."""
    mask = mask[:, :width]
    return jnp.pad(mask, ((0, 0), (0, width - mask.shape[1])))


def firing_counter(counted: jax.Array, firing: str = "gate>0") -> Reduced:
    """What to hand to ``reduce=`` of ``models.forward`` or the sampler: counts int32 [L, F] of units that fire on
    tokens where ``counted`` (bool [B, T]) holds. Nothing per token leaves a layer (arXiv 2402.16438, our reading)."""
    check_firing(firing)
    return Reduced((FIRING[firing],), FiringCounter(counted, FIRING[firing]))


@dataclasses.dataclass(frozen=True)
class Firings:
    """counts: int64 [L, F], on how many counted tokens a unit fired. tokens: how many were counted. Sums with ``+``."""

    counts: np.ndarray
    tokens: int
    firing: str = "gate>0"

    def __add__(self, other: "Firings") -> "Firings":
        if self.firing != other.firing or self.counts.shape != other.counts.shape:
            raise ValueError(
                f"counts of {self.firing} {list(self.counts.shape)} and of {other.firing} "
                f"{list(other.counts.shape)} cannot be added"
            )
        return Firings(self.counts + other.counts, self.tokens + other.tokens, self.firing)


@functools.partial(jax.jit, static_argnames="config")
def _count(params, tokens, counter: Reduced, *, config):
    return forward(params, config, tokens, head=False, reduce={"fired": counter}).records["fired"]


def count_firings(
    params: Params, config: Config, batches: Iterable[tuple[np.ndarray, np.ndarray]], firing: str = "gate>0"
) -> Firings:
    """Count how often each unit fires, over a stream of batches (arXiv 2505.11995, our reading, section 2.4 of LAPE's
    code: the activated gate is above 0 before it is multiplied by "up").

    batches: (tokens int32 [B, T] right-padded, counted bool [B, T]); padding must not be counted. Of one shape, they
    compile once. Counts are int32 on device in a step and int64 on the host between steps, so that chunks, order and
    padding do not matter. Raises ValueError for models with experts.
    """
    check_dense(config)
    check_firing(firing)
    total = Firings(np.zeros((config.layers, config.ffn_dim), np.int64), 0, firing)
    for tokens, counted in batches:
        tokens = check_tokens(tokens, config)
        counted = check_per_token(counted, tokens, "counted").astype(bool)
        fired = _count(params, tokens, firing_counter(jnp.asarray(counted), firing), config=config)
        total = total + Firings(np.asarray(fired, np.int64), int(counted.sum()), firing)
    return total


def split_by_source(sources: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows answered from parameters and rows answered from the passage (condition "conflict", our reading).

    sources: int [n], 0 where the answer was the internal one, 1 the passage's, -1 neither. Returns two int64 arrays of
    row numbers. Raises ValueError where one is empty: then there is nothing to compare.
    """
    sources = np.asarray(sources)
    internal, external = np.flatnonzero(sources == 0), np.flatnonzero(sources == 1)
    if not (len(internal) and len(external)):
        raise ValueError(
            f"{len(internal)} samples were answered from parameters and {len(external)} from the passage, of "
            f"{len(sources)}; both are needed: add items, or mix prompts in which the passage is more and less used"
        )
    return internal, external


def check_disjoint(building: Iterable, testing: Iterable, what: str = "items") -> None:
    """Raise ValueError where neurons were found on what they are tested on (questions, or answer entities)."""
    building, testing = set(building), set(testing)
    if common := building & testing:
        raise ValueError(
            f"{len(common)} {what} are among both the {len(building)} that neurons are found on and the "
            f"{len(testing)} they are tested on, such as {min(common, key=str)!r}: split by question and answer entity"
        )


# The statistic


def activation_probabilities(internal: Firings, external: Firings, min_tokens: int = 1000) -> np.ndarray:
    """float64 [2, L, F], the share of counted tokens on which a unit fires, internal first (arXiv 2402.16438).

    Raises ValueError where a condition has fewer than ``min_tokens`` counted tokens, for different firing tests, and
    where no unit ever fires.
    """
    if internal.firing != external.firing or internal.counts.shape != external.counts.shape:
        raise ValueError(
            f"conditions differ: internal {internal.firing} {list(internal.counts.shape)}, external "
            f"{external.firing} {list(external.counts.shape)}; count both with one model and one firing test"
        )
    if min(internal.tokens, external.tokens) < max(min_tokens, 1):
        raise ValueError(
            f"{internal.tokens} tokens were counted under the internal condition and {external.tokens} under the "
            f"external one; each needs {max(min_tokens, 1)}: add items or lower min_tokens"
        )
    p = np.stack([internal.counts / internal.tokens, external.counts / external.tokens])
    if not p.any():
        raise ValueError(
            f"none of the {p[0].size} neurons ever fires under the test {internal.firing!r}: is the activation one "
            "that is positive where its input is?"
        )
    return p


def kape(p: np.ndarray) -> np.ndarray:
    """Entropy in nats of p normalised over conditions: float [2, ...] -> float64 [...] in [0, ln 2], NaN where p is 0
    under both conditions (arXiv 2505.11995, formula by LAPE, arXiv 2402.16438). Low: tied to one source."""
    p = np.asarray(p, np.float64)
    total = p.sum(axis=0)
    share = np.divide(p, total, out=np.zeros_like(p), where=total > 0)
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    return np.where(total > 0, np.clip(-(share * logs).sum(axis=0), 0.0, np.log(2.0)), np.nan)


def kth_smallest(p: np.ndarray, quantile: float) -> float:
    """The k-th smallest of all values of p, k = round(quantile * size), at least 1 (LAPE's code)."""
    k = max(round(quantile * np.size(p)), 1)
    return float(np.partition(np.ravel(p), k - 1)[k - 1])


def filtered_entropy(p: np.ndarray, threshold: float) -> np.ndarray:
    """:func:`kape` of [2, ...], +inf for neurons with no probability strictly above ``threshold`` and for those that
    never fire (LAPE's code gives the latter 0 and leaves them to the filter; here they are masked)."""
    entropy = kape(p)
    return np.where((np.max(p, axis=0) > threshold) & ~np.isnan(entropy), entropy, np.inf)


@dataclasses.dataclass(frozen=True)
class Selected:
    """What :func:`select_neurons` found. internal, external: bool [L, F], apart with ``assign="argmax"``. entropy:
    float64 [L, F], +inf where filtered out. threshold, bar: the probabilities at the two quantiles. both: bool [L, F],
    chosen and above the bar in both conditions. unassigned: bool [L, F], chosen but above the bar in none, or equal in
    both. inactive: how many neurons never fired."""

    internal: np.ndarray
    external: np.ndarray
    entropy: np.ndarray
    threshold: float
    bar: float
    both: np.ndarray
    unassigned: np.ndarray
    inactive: int


def _lowest(entropy: np.ndarray, most: np.ndarray, count: int) -> np.ndarray:
    """bool [L, F], the ``count`` lowest entropies of all layers; equal ones by larger probability, then by place."""
    order = np.lexsort((-most.ravel(), entropy.ravel()))[:count]
    chosen = np.zeros(entropy.size, bool)
    chosen[order] = True
    return chosen.reshape(entropy.shape)


def select_neurons(p: np.ndarray, selection: Selection | None = None) -> Selected:
    """The neurons tied to one source, of all layers together (arXiv 2402.16438; thresholds are those of its code).

    p: float [2, L, F] of :func:`activation_probabilities`. Neurons with no probability above the filter's quantile are
    out; of the others the round(rate * L * F) with the lowest entropy are chosen and assigned to conditions (see
    :class:`Selection`). Raises ValueError where fewer pass than are wanted; it never fills up with filtered ones.
    """
    selection, p = selection or Selection(), np.asarray(p, np.float64)
    if p.ndim != 3 or len(p) != 2 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p holds probabilities [2, L, F] in [0, 1], got {list(p.shape)}")
    threshold, bar = kth_smallest(p, selection.filter_quantile), kth_smallest(p, selection.bar_quantile)
    entropy = filtered_entropy(p, threshold)
    wanted, left = round(selection.rate * p[0].size), int(np.isfinite(entropy).sum())
    if not 0 < wanted <= left:
        raise ValueError(
            f"{wanted} neurons are wanted (rate {selection.rate} of {p[0].size}) and {left} have a probability above "
            f"the filter's threshold {threshold:.6g}: change rate, or lower filter_quantile={selection.filter_quantile}"
        )
    chosen = _lowest(entropy, p.max(axis=0), wanted)
    above = p > bar
    if selection.assign == "argmax":
        internal, external = chosen & above[0] & (p[0] > p[1]), chosen & above[1] & (p[1] > p[0])
    else:
        internal, external = chosen & above[0], chosen & above[1]
    return Selected(
        internal, external, entropy, threshold, bar, chosen & above.all(axis=0), chosen & ~(internal | external),
        int((p.sum(axis=0) == 0).sum()),
    )  # fmt: skip


# Switching off


@struct.dataclass
class AtPositions:
    """An edit of a site [B, T, ...] that acts only where ``positions`` (bool [L, B or 1, T]) holds, and nowhere behind
    their end."""

    positions: jax.Array
    edit: Edit

    def __call__(self, x: jax.Array) -> jax.Array:
        here = _of_width(self.positions, x.shape[1])
        return jnp.where(here.reshape(*here.shape, *[1] * (x.ndim - 2)), self.edit(x), x)


def deactivate(
    neurons: np.ndarray, config: Config, *, positions: np.ndarray | None = None, mean: np.ndarray | None = None
) -> dict[str, Edit]:
    """The edit that switches neurons off, in every token of prompts and of generation (arXiv 2505.11995; setting the
    activated gate to 0 is setting the product with "up" to 0).

    neurons: bool [L, F]. positions: bool [B or 1, T], only there (the sampler's prompts; decode without). mean: float
    [L, F] of ``site_means(..., "mlp.act")``, put in the place of 0, a control (our reading). Another set of the same
    model compiles nothing; an empty one changes nothing.
    """
    check_dense(config)
    neurons = check_mask(neurons, config)
    if mean is None:
        edit: Edit = Scale(jnp.asarray(~neurons, config.dtype))
    else:
        if np.shape(mean) != neurons.shape:
            raise ValueError(f"mean has shape {list(np.shape(mean))}, neurons have {list(neurons.shape)}")
        edit = Replace(jnp.asarray(neurons)[:, None, None], jnp.asarray(mean, config.dtype)[:, None, None])
    if positions is not None:
        here = np.asarray(positions)
        if here.ndim != 2 or here.dtype != bool:
            raise ValueError(f"positions must be bool [B or 1, T], got {here.dtype} {list(here.shape)}")
        edit = AtPositions(jnp.broadcast_to(jnp.asarray(here), (config.layers, *here.shape)), edit)
    return {"mlp.act": edit}


def random_sets(
    neurons: np.ndarray, draws: int = 5, seed: int = 0, *, exclude: np.ndarray | None = None,
    match: np.ndarray | None = None, nearest: int = 10,
) -> np.ndarray:  # fmt: skip
    """Control sets with as many neurons in each layer as ``neurons`` (our reading).

    neurons: bool [L, F]. exclude: bool [L, F] that may not be drawn, besides ``neurons`` themselves. match: float
    [L, F], mean activation probability; each neuron is then replaced by one of the ``nearest`` free ones of its layer.
    Returns bool [draws, L, F]. Raises ValueError where a layer has too few other neurons, naming it.
    """
    neurons = np.asarray(neurons)
    if neurons.dtype != bool or neurons.ndim != 2:
        raise ValueError(f"neurons must be bool [L, F], got {neurons.dtype} {list(neurons.shape)}")
    free = ~neurons if exclude is None else ~(neurons | np.asarray(exclude, bool))
    for layer, (want, have) in enumerate(zip(neurons.sum(axis=1), free.sum(axis=1))):
        if want > have:
            raise ValueError(f"layer {layer} has {have} other neurons to draw {want} from: select fewer (rate)")
    out = np.zeros((draws, *neurons.shape), bool)
    for draw, rng in enumerate(np.random.default_rng(seed).spawn(draws)):
        for layer in range(len(neurons)):
            chosen, pool = np.flatnonzero(neurons[layer]), np.flatnonzero(free[layer])
            if match is None:
                out[draw, layer, rng.choice(pool, len(chosen), replace=False)] = True
            else:
                out[draw, layer, _near(chosen, pool, np.asarray(match)[layer], nearest, rng)] = True
    return out


def _near(chosen: np.ndarray, pool: np.ndarray, p: np.ndarray, nearest: int, rng: np.random.Generator) -> list[int]:
    """For each of ``chosen``, in random order, one of the ``nearest`` of what is left of ``pool`` by ``p``."""
    drawn = []
    for neuron in rng.permutation(chosen):
        order = np.argsort(np.abs(p[pool] - p[neuron]), kind="stable")[:nearest]
        at = rng.choice(order)
        drawn.append(int(pool[at]))
        pool = np.delete(pool, at)
    return drawn
