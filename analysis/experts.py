"""EASY-EP: which experts a domain needs, from one forward pass over a few demonstrations (arXiv 2504.06792).

A token's chosen expert counts its gate weight times the length of what it writes, times how much the routed experts
together turn the token (1 minus the cosine of the residual before and after them); an expert's score is the sum over
tokens (section 4). Everything is summed inside the layer that it belongs to, so memory does not grow with the number of
tokens. The paper's display equations were rebuilt from its text and its released code.

Letters: L layers with experts, E experts, k choices per token, M tokens, D width.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

import models
from models.config import Config
from models.linear import Adapted
from models.params import Params
from models.taps import Reduced

BASELINES = ("gate", "frequency")
METHODS = ("easy_ep", *BASELINES, "random")
_SITES = ("resid.mid", "moe.index", "moe.weights", "moe.expert_norm", "moe.routed", "moe.logits")


@struct.dataclass
class Statistics:
    """Sums over tokens, per layer and expert, float32 [L, E] (of one layer while it runs: [E]).

    score: EASY-EP's. gate: gate weights. frequency: how often chosen. count: tokens, [L]. likeness: products of router
    logits [L, E, E], for merging; None where not asked for.
    """

    score: jax.Array
    gate: jax.Array
    frequency: jax.Array
    count: jax.Array
    likeness: jax.Array | None = None

    def __add__(self, other: "Statistics") -> "Statistics":
        return jax.tree.map(lambda a, b: a + b, self, other)


def token_weight(before: jax.Array, routed: jax.Array) -> jax.Array:
    """How much the routed experts turn a token: max(1 - cos(x, x + r), 0), float32 (section 4.3; the clamp is the
    released code's).

    before: the residual x [..., D] as it enters the layer's second half, before the norm; routed: what the routed
    experts add, r [..., D], without shared ones. 0 where x is 0.
    """
    x = before.astype(jnp.float32)
    after = x + routed.astype(jnp.float32)
    lengths = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(after, axis=-1)
    cosine = (x * after).sum(axis=-1) / jnp.maximum(lengths, 1e-8)
    known = (x != 0).any(axis=-1)
    return jnp.where(known, jnp.maximum(1.0 - cosine, 0.0), 0.0)


def layer_statistics(values: Mapping[str, jax.Array], valid: jax.Array, experts: int, likeness: bool) -> Statistics:
    """The statistics of one layer: ``values`` of the sites it reduces, ``valid`` float [M], 1 on tokens that count."""
    index, gate = values["moe.index"], values["moe.weights"].astype(jnp.float32)
    M = index.shape[0]
    weight = token_weight(values["resid.mid"], values["moe.routed"]).reshape(M) * valid
    share = gate * values["moe.expert_norm"] * weight[:, None]
    real = jnp.broadcast_to(valid[:, None], index.shape)

    def by_expert(x):
        return jnp.zeros(experts).at[index].add(x)

    products = None
    if likeness:
        logits = jnp.where(valid[:, None] > 0, values["moe.logits"].astype(jnp.float32), 0.0)
        products = logits.T @ logits
    return Statistics(by_expert(share), by_expert(gate * real), by_expert(real), valid.sum(), products)


@struct.dataclass
class _Layer:
    """:func:`layer_statistics` as a hook that carries which tokens count."""

    valid: jax.Array
    experts: int = struct.field(pytree_node=False)
    likeness: bool = struct.field(pytree_node=False)

    def __call__(self, values: Mapping[str, jax.Array]) -> Statistics:
        return layer_statistics(values, self.valid, self.experts, self.likeness)


def statistics(params: Params, config: Config, tokens: jax.Array, valid: jax.Array, likeness: bool = False):
    """:class:`Statistics` of a batch, pure and ready for ``jit``: tokens int32 [B, T] right-padded, valid bool [B, T],
    False on padding (prompt and answer tokens all count, section 4.1)."""
    hook = _Layer(valid.reshape(-1).astype(jnp.float32), config.experts, likeness)
    sites = _SITES if likeness else _SITES[:-1]
    run = models.forward(params, config, tokens, head=False, reduce={"experts": Reduced(sites, hook)})
    return run.records["experts"]


_statistics = jax.jit(statistics, static_argnames=("config", "likeness"))


class Calibration:
    """Running sums over batches, on device; at the end on the host in float64."""

    def __init__(self, params: Params, config: Config, likeness: bool = False):
        if not config.experts:
            raise ValueError(f"a {config.family} model has no experts to score")
        if isinstance(params["layers"]["e_gate"], Adapted):
            raise ValueError("merge the low-rank changes first (models.lora.merge)")
        self._params, self._config, self._likeness = params, config, likeness
        self._total: Statistics | None = None

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """One batch: tokens int32 [B, T] right-padded, lengths int32 [B]. Equal shapes share one program."""
        tokens = np.asarray(tokens, np.int32)
        outside = (tokens < 0) | (tokens >= self._config.vocab_size)
        if outside.any():
            raise ValueError(f"token id {tokens[outside][0]} is outside the vocabulary of {self._config.vocab_size}")
        valid = np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None]
        new = _statistics(self._params, self._config, tokens, valid, self._likeness)
        # Sums of a batch are float32; the running sum is kept exact enough for millions of tokens on the host.
        new = jax.tree.map(lambda x: np.asarray(x, np.float64), new)
        self._total = new if self._total is None else self._total + new

    def result(self, domain: str = "the calibration data") -> Statistics:
        """All sums, float64. Raises ValueError without tokens, and where a layer's scores are all 0 or not finite."""
        if self._total is None or not self._total.count.min():
            raise ValueError(f"{domain} holds no token to score experts by")
        check_scores(self._total.score, domain)
        return self._total


def check_scores(score: np.ndarray, domain: str) -> None:
    """Raise ValueError naming domain and layer for scores [L, E] that are not finite, or all 0 in a layer."""
    for layer, row in enumerate(np.asarray(score)):
        if not np.isfinite(row).all() or not row.sum() > 0:
            raise ValueError(
                f"{domain}: the expert scores of layer {layer} are "
                + ("all 0" if np.isfinite(row).all() else "not finite")
            )


def mix(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """Scores [L, E] of several domains in one: each made to sum to 1 in every layer, then averaged (section 4.1).

    Raises ValueError without domains, for unequal shapes, and for a layer whose scores cannot be normalised.
    """
    if not scores:
        raise ValueError("no domain to mix")
    shapes = {name: np.shape(score) for name, score in scores.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"scores of different models cannot be mixed: {shapes}")
    for name, score in scores.items():
        check_scores(score, name)
    return np.mean([np.asarray(s, np.float64) / np.sum(s, axis=1, keepdims=True) for s in scores.values()], axis=0)


def select(score: np.ndarray, keep: int) -> np.ndarray:
    """bool [L, E]: the ``keep`` best experts of every layer; of equals, the one with the lower index (our choice).

    Raises ValueError unless 1 <= keep <= E.
    """
    score = np.asarray(score)
    if not 1 <= keep <= score.shape[1]:
        raise ValueError(f"cannot keep {keep} of {score.shape[1]} experts")
    order = np.argsort(-score, axis=1, kind="stable")[:, :keep]
    mask = np.zeros(score.shape, bool)
    np.put_along_axis(mask, order, True, axis=1)
    return mask


def select_by(method: str, found: Statistics, keep: int, seed: int = 0) -> np.ndarray:
    """The mask of one of :data:`METHODS`; "random" draws experts of every layer alike."""
    if method not in METHODS:
        raise ValueError(f"no method {method!r}; known: {', '.join(METHODS)}")
    if method == "random":
        return select(np.random.default_rng(seed).random(np.shape(found.score)), keep)
    return select({"easy_ep": found.score, "gate": found.gate, "frequency": found.frequency}[method], keep)


def overlap(masks: Mapping[str, np.ndarray]) -> np.ndarray:
    """Share of kept experts that two masks have in common, [masks, masks], mean over layers."""
    stack = np.stack([np.asarray(m, bool) for m in masks.values()])
    common = (stack[:, None] & stack[None]).sum(axis=-1)
    return (common / np.maximum(stack.sum(axis=-1)[:, None], 1)).mean(axis=-1)


def masked_picks(params: Params, config: Config, tokens: jax.Array, valid: jax.Array, mask: jax.Array) -> jax.Array:
    """How many choices of tokens that count went to masked experts, int32 [L]: 0 but for "official_zero_fill" (and
    "drop", where they are left out afterwards). mask: bool [L, E]."""
    real = valid.reshape(-1)

    def count(values):
        return jnp.zeros(config.experts, jnp.int32).at[values["moe.index"]].add(real[:, None].astype(jnp.int32))

    reduce = {"picks": Reduced(("moe.index",), count)}
    picks = models.forward(params, config, tokens, head=False, expert_mask=mask, reduce=reduce).records["picks"]
    return jnp.where(mask, 0, picks).sum(axis=1)


def merge_experts(params: Params, config: Config, found: Statistics, keep: int) -> tuple[Params, np.ndarray]:
    """M-SMoE as far as the paper tells (arXiv 2310.01334): the ``keep`` most frequent experts of a layer are dominant,
    every other one joins the dominant whose router logits are most like its own (cosine over calibration tokens), its
    hidden units are permuted to match (Hungarian, on rows of gate, up and down), and members are averaged by frequency.

    Returns parameters in which all members of a group hold the group's weights, which computes what a router that
    points members to their dominant would, and the group of each expert int [L, E] (its dominant's index).
    """
    if found.likeness is None:
        raise ValueError("merging needs Calibration(..., likeness=True)")
    dominant = select(found.frequency, keep)
    length = np.sqrt(np.maximum(np.einsum("lee->le", found.likeness), 1e-30))
    cosine = found.likeness / (length[:, :, None] * length[:, None, :])
    group = np.where(dominant[:, None, :], cosine, -np.inf).argmax(axis=-1)
    group = np.where(dominant, np.arange(dominant.shape[1]), group)
    names = ("e_gate", "e_up", "e_down")
    weights = {name: np.array(params["layers"][name], np.float32) for name in names}
    for layer in range(len(group)):
        # Units as rows: [E, F, 3 D]
        units = np.concatenate(
            [weights["e_gate"][layer].swapaxes(1, 2), weights["e_up"][layer].swapaxes(1, 2), weights["e_down"][layer]],
            axis=-1,
        )
        merged = _merge_layer(units, group[layer], np.asarray(found.frequency[layer], np.float64))
        gate, up, down = np.split(merged, 3, axis=-1)
        weights["e_gate"][layer], weights["e_up"][layer] = gate.swapaxes(1, 2), up.swapaxes(1, 2)
        weights["e_down"][layer] = down
    layers = dict(params["layers"])
    layers |= {name: jnp.asarray(w, layers[name].dtype) for name, w in weights.items()}
    return {**params, "layers": layers}, group


def _merge_layer(units: np.ndarray, group: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """units [E, F, 3 D] of one layer -> the same with every member holding its group's average."""
    from scipy.optimize import linear_sum_assignment

    out = units.copy()
    for lead in np.unique(group):
        members = np.flatnonzero(group == lead)
        total, mass = np.zeros_like(units[0], np.float64), 0.0
        for member in members:
            aligned = units[member]
            if member != lead:
                aligned = aligned[linear_sum_assignment(-(units[lead] @ units[member].T))[1]]
            weight = max(float(frequency[member]), 1e-9)  # a group that was never chosen is its plain average
            total, mass = total + weight * aligned, mass + weight
        out[members] = (total / mass).astype(units.dtype)
    return out
