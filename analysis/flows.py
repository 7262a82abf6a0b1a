"""How information moves between the parts of a prompt, layer by layer: attention flow, saliency flow, the boundaries of
four stages, and a knock-out as the causal check (arXiv 2505.11995; its formulas were not at hand, so the measures are
our reading, saliency after arXiv 2305.14160).

The flow from X into Y is about the pairs ``S(X, Y) = {(i, j): i in Y, j in X, j < i}``, where query i reads key j.
Everything is summed inside the layer and by blocks of queries: no [T, T] array leaves a layer, and of long prompts none
is made. Letters as in the README, and P segments.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from analysis.batches import (
    answer_logprobs,
    check_answers,
    check_per_token,
    check_tokens,
    traced_answer_logprobs,
    window_of_layers,
)
from analysis.segments import SEGMENTS
from models.config import Config
from models.params import Params
from models.taps import Edit, Reduced
from models.transformer import forward


@dataclasses.dataclass(frozen=True)
class Flow:
    """Flows between segments, averaged in each sample first and then over the samples that have the pair.

    names: of the P segments. mean: float64 [L, P, P], or [L, N, P, P] by head, [from, to]: over pairs. mass: the same,
    summed over the keys and averaged over the queries that have a pair, since means shrink with the length of a
    segment. samples: int64 [P, P]; where it is 0 the flow is absent and both are 0.
    """

    names: tuple[str, ...]
    mean: np.ndarray
    mass: np.ndarray
    samples: np.ndarray

    def curve(self, source: str, target: str, mass: bool = False) -> np.ndarray | None:
        """The flow from ``source`` into ``target`` by layer, float64 [L] or [L, N]; None where it is absent."""
        at = self.names.index(source), self.names.index(target)
        return (self.mass if mass else self.mean)[..., *at] if self.samples[at] else None


# Sums over pairs


def segment_sums(scores: jax.Array, labels: jax.Array, slots: jax.Array, count: int) -> jax.Array:
    """Sum of a score over the pairs of each two segments (arXiv 2505.11995, our reading, the numerator of a flow).

    scores: float32 [B, N, t, S] of a block of queries. labels: int32 [B, n], segment of each token, -1 none and behind
    their end. slots: int32 [B or 1, t], where the queries stand, -1 for none. Returns float32 [B, N, P, P],
    [from, to], P = ``count``.
    """
    B, _, t, S = scores.shape
    labels = jnp.pad(labels[:, :S], ((0, 0), (0, max(S - labels.shape[1], 0))), constant_values=-1)
    slots = jnp.broadcast_to(slots, (B, t))
    of_query = jnp.where(slots >= 0, jnp.take_along_axis(labels, jnp.maximum(slots, 0), axis=1), -1)
    before = jnp.arange(S) < slots[:, :, None]
    scores = jnp.where(before[:, None], scores, 0.0)
    by_key = jnp.einsum("bnts,bsx->bntx", scores, jax.nn.one_hot(labels, count), precision="highest")
    return jnp.einsum("bntx,bty->bnxy", by_key, jax.nn.one_hot(of_query, count), precision="highest")


def _averages(sums: jax.Array, labels: jax.Array):
    """Sums [L, B, N, P, P] -> means of each sample added up over samples, [L, N, P, P] by pair and by query, and how
    many samples have each pair, [P, P]."""
    of = jax.nn.one_hot(labels, sums.shape[-1])
    before = jnp.cumsum(of, axis=1) - of  # [B, T, X], tokens of X before each token
    exact = functools.partial(jnp.einsum, precision="highest")
    pairs = exact("btx,bty->bxy", before, of)
    queries = exact("btx,bty->bxy", (before > 0).astype(of.dtype), of)
    per = lambda by: (sums / jnp.maximum(by, 1.0)[:, None]).sum(axis=1)  # noqa: E731
    return per(pairs), per(queries), (pairs > 0).sum(axis=0)


def _check_labels(labels: np.ndarray, tokens: np.ndarray, names: Sequence[str]) -> np.ndarray:
    labels = check_per_token(labels, tokens, "labels")
    inside = (labels >= -1) & (labels < len(names))
    if not np.issubdtype(labels.dtype, np.integer) or not inside.all():
        raise ValueError(
            f"labels are integers from -1 (none) to {len(names) - 1} ({', '.join(names)}), got {labels.dtype} "
            f"{labels.min()} .. {labels.max()}"
        )
    return labels.astype(np.int32)


def _finished(parts: list, names: Sequence[str]) -> Flow:
    """One :class:`Flow` of the sums of all batches, added in float64."""
    if not parts:
        raise ValueError("no batch of prompts was given")
    mean, mass, samples = (sum(np.asarray(part, np.float64) for part in which) for which in zip(*parts))
    by = np.maximum(samples, 1)
    return Flow(tuple(names), mean / by, mass / by, samples.astype(np.int64))


# Attention flow


@struct.dataclass
class _AttentionSums:
    """Function of a by-block reduction of "attn.probs": :func:`segment_sums` of the mean over heads, or of each."""

    labels: jax.Array
    count: int = struct.field(pytree_node=False)
    by_head: bool = struct.field(pytree_node=False)

    def __call__(self, values: dict[str, jax.Array], slots: jax.Array) -> jax.Array:
        probs = values["attn.probs"]
        B, K, G, t, S = probs.shape
        probs = probs.reshape(B, K * G, t, S)
        probs = probs if self.by_head else probs.mean(axis=1, keepdims=True)
        return segment_sums(probs, self.labels, slots, self.count)


def attention_sums(labels: jax.Array, count: int = len(SEGMENTS), by_head: bool = False) -> Reduced:
    """What to hand to ``reduce=`` of ``models.forward`` or ``prefill``: float32 [L, B, 1 or N, P, P],
    attention summed over the pairs of segments. labels: int32 [B, T], see :func:`segment_sums` (arXiv 2505.11995, our
    reading)."""
    return Reduced(("attn.probs",), _AttentionSums(labels, count, by_head), by_block=True)


@functools.partial(jax.jit, static_argnames=("config", "count", "by_head"))
def _attention_step(params, tokens, labels, *, config, count, by_head):
    taps = {"sums": attention_sums(labels, count, by_head)}
    return _averages(forward(params, config, tokens, head=False, reduce=taps).records["sums"], labels)


def attention_flow(
    params: Params, config: Config, batches: Iterable[tuple[np.ndarray, np.ndarray]],
    names: Sequence[str] = SEGMENTS, by_head: bool = False,
) -> Flow:  # fmt: skip
    """Attention from each segment into each other, by layer (arXiv 2505.11995; the formula is our reading).

    ``F[l](X, Y) = mean over S(X, Y) of mean over heads of A[l, h, i, j]``. batches: (tokens int32 [B, T] right-padded,
    labels int32 [B, T] numbers of ``names``, -1 for none and for padding). by_head: keep heads apart. Prompts of any
    length; every sample has the same weight.
    """
    parts = []
    for tokens, labels in batches:
        tokens = check_tokens(tokens, config)
        labels = _check_labels(labels, tokens, names)
        mean, mass, samples = _attention_step(
            params, tokens, labels, config=config, count=len(names), by_head=by_head
        )  # fmt: skip
        parts.append((mean, mass, samples) if by_head else (mean[:, 0], mass[:, 0], samples))
    return _finished(parts, names)


# Saliency flow


def saliency_scores(probs: jax.Array, gradient: jax.Array) -> jax.Array:
    """``|sum over heads of A * dLoss/dA|``: probs, gradient float32 [B, K, G, t, S] -> [B, t, S]. The sum comes before
    the absolute value (arXiv 2305.14160)."""
    return jnp.abs((probs * gradient).sum(axis=(1, 2)))


@jax.custom_vjp
def _watched(probs, probe, labels, slots):
    """probs itself; the "gradient" of ``probe`` [B, P, P] is the saliency summed over pairs of segments."""
    return probs


def _watched_forward(probs, probe, labels, slots):
    return probs, (probs, probe, labels, slots)


def _watched_backward(kept, gradient):
    probs, probe, labels, slots = kept
    scores = saliency_scores(probs, gradient)[:, None]
    return gradient, segment_sums(scores, labels, slots, probe.shape[-1])[:, 0], None, None


_watched.defvjp(_watched_forward, _watched_backward)


@struct.dataclass
class SaliencyProbe:
    """Edit of "attn.probs" that changes nothing, and whose ``probe`` (zeros float32 [L, B, P, P]) has for its gradient
    the saliency summed over the pairs of segments.

    The backward pass forms ``dLoss/dA[h, i, j] = G[h, i] . V[h, j]`` anyway, from the gradient G at the heads' outputs
    and the values V, one block of queries at a time; the sum is made there and the block is let go. labels: int32
    [L, B, T], the same in all layers.
    """

    probe: jax.Array
    labels: jax.Array

    by_block = True  # no field: it has no annotation

    def __call__(self, probs: jax.Array, slots: jax.Array) -> jax.Array:
        return _watched(probs, self.probe, self.labels, slots)


def saliency_probe(probe: jax.Array, labels: jax.Array) -> dict[str, Edit]:
    """The edit whose gradient with respect to ``probe`` (zeros float32 [L, B, P, P]) is the saliency summed over pairs
    of segments, [from, to], for any loss (arXiv 2305.14160). labels: int32 [B, T]."""
    return {"attn.probs": SaliencyProbe(probe, jnp.broadcast_to(labels, (len(probe), *labels.shape)))}


@functools.partial(jax.jit, static_argnames=("config", "count"))
def _saliency_step(params, tokens, labels, positions, targets, *, config, count):
    def loss(probe):
        return -traced_answer_logprobs(
            params, config, tokens, positions, targets, saliency_probe(probe, labels)
        ).sum()  # fmt: skip

    sums = jax.grad(loss)(jnp.zeros((config.layers, len(tokens), count, count)))
    mean, mass, samples = _averages(sums[:, :, None], labels)
    return (mean[:, 0], mass[:, 0], samples), jnp.isfinite(sums).all(axis=(1, 2, 3))


def saliency_flow(
    params: Params, config: Config, batches: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]],
    names: Sequence[str] = SEGMENTS,
) -> Flow:  # fmt: skip
    """Saliency from each segment into each other, by layer (arXiv 2505.11995; the formula is arXiv 2305.14160's).

    ``I[l, i, j] = |sum over heads of A[l, h, i, j] * dLoss/dA[l, h, i, j]|``, averaged over ``S(X, Y)``; the loss is
    the negative log-likelihood of the answer's tokens. batches: (tokens, labels, positions, targets), the former two of
    :func:`attention_flow`, the latter of ``answer_logprobs``: int32 [B, A] both, -1 positions for none; give one column
    for the first token of the answer only. Blocks are computed again in the backward pass, so that memory is that of
    one layer. With bfloat16 activations G . V is rounded to bfloat16 once; ``config.replace(dtype="float32")`` avoids
    that. Raises ValueError naming the layer where a gradient is not finite.
    """
    parts = []
    config = config.replace(remat="block")
    for tokens, labels, positions, targets in batches:
        tokens = check_tokens(tokens, config)
        labels = _check_labels(labels, tokens, names)
        positions, targets = check_answers(tokens, positions, targets, config)
        part, finite = _saliency_step(params, tokens, labels, positions, targets, config=config, count=len(names))
        if not (finite := np.asarray(finite)).all():
            raise ValueError(
                f"the gradient at attention in layer {np.flatnonzero(~finite)[-1]} is not finite (batch {len(parts)}; "
                "the last such layer, gradients go downwards): check the weights, or use dtype float32"
            )
        parts.append(part)
    return _finished(parts, names)


# Stages


@dataclasses.dataclass(frozen=True)
class Stages:
    """Layers at which elicitation, expression and contestation begin; refinement begins at 0. None: absent."""

    elicitation: int | None
    expression: int | None
    contestation: int | None


def smooth(curve: np.ndarray) -> np.ndarray:
    """Mean of each layer and its neighbours (two of them at the ends), divided by the largest: float [L] -> [L]."""
    curve = np.asarray(curve, np.float64)
    padded = np.pad(curve, 1)
    near = np.minimum(np.arange(len(curve)), 1) + np.minimum(np.arange(len(curve))[::-1], 1) + 1
    out = (padded[:-2] + padded[1:-1] + padded[2:]) / near
    return out / out.max() if out.max() > 0 else out


def stage_boundaries(
    context: np.ndarray | None, query: np.ndarray | None, answer: np.ndarray | None
) -> Stages:  # fmt: skip
    """Where four stages begin (arXiv 2505.11995 names them; this rule is our reading).

    context, query, answer: float [L], flow from the key into the context, the question and the answer cue, or None
    where it is absent. Curves are smoothed and divided by their maxima. Elicitation begins at the first layer where
    query exceeds context; expression at the first from there on where answer exceeds query; contestation at the first
    behind the peak of answer from which on it stays below half of that peak. What does not exist is None.
    """
    curves = [None if curve is None else smooth(curve) for curve in (context, query, answer)]
    lengths = {len(curve) for curve in curves if curve is not None}
    if len(lengths) > 1:
        raise ValueError(f"curves must have the same number of layers, got {sorted(lengths)}")
    context, query, answer = curves
    first = lambda where, start: next((int(i) for i in np.flatnonzero(where) if i >= start), None)  # noqa: E731
    elicitation = None if context is None or query is None else first(query > context, 0)
    expression = None if elicitation is None or answer is None else first(answer > query, elicitation)
    return Stages(elicitation, expression, None if answer is None else _decline(answer))


def _decline(answer: np.ndarray) -> int | None:
    peak = int(answer.argmax())
    high = np.flatnonzero(answer >= 0.5 * answer[peak])
    last = int(high[-1])  # the peak itself is high
    return last + 1 if last + 1 < len(answer) else None


# Knock-out


@struct.dataclass
class KnockOut:
    """Edit of "attn.logits": queries where ``rows`` holds do not see earlier keys where ``columns`` holds.

    rows: bool [L, B or 1, N or 1, T]; columns: bool [L, B or 1, T]; both by where a token stands, and False behind
    their end. A query always sees itself, so that the softmax has something left. Works on blocks of queries.
    """

    rows: jax.Array
    columns: jax.Array

    by_block = True  # no field: it has no annotation

    def __call__(self, scores: jax.Array, slots: jax.Array) -> jax.Array:
        B, K, G, t, S = scores.shape
        heads, n = self.rows.shape[1:]
        slots = jnp.broadcast_to(slots, (B, t))
        rows = jnp.broadcast_to(self.rows, (B, heads, n))
        here = jnp.take_along_axis(rows, jnp.clip(slots, 0, n - 1)[:, None], axis=2)
        here = here & ((slots >= 0) & (slots < n))[:, None]
        here = here.reshape(B, *((K, G) if heads > 1 else (1, 1)), t, 1)
        columns = self.columns[:, :S]
        columns = jnp.pad(columns, ((0, 0), (0, S - columns.shape[1])))[:, None, None, None]
        before = (jnp.arange(S) < slots[:, :, None])[:, None, None]
        return jnp.where(here & columns & before, jnp.finfo(scores.dtype).min, scores)


def knock_out(
    rows: np.ndarray, columns: np.ndarray, config: Config, start: int = 0, width: int | None = None,
    heads: np.ndarray | None = None,
) -> dict[str, Edit]:  # fmt: skip
    """The edit that forbids ``rows`` to see ``columns`` in the layers [start, start + width) (arXiv 2505.11995 leaves
    the check open; our reading).

    rows, columns: bool [B or 1, T], of queries and of keys; only keys before the query are hidden, as in a flow. width:
    None for all layers from ``start``. heads: bool [N], only in these. The softmax renormalises. Other masks, layers
    and heads compile nothing. Also for the sampler, where tokens behind T are neither rows nor columns.
    """
    rows, columns = np.asarray(rows), np.asarray(columns)
    width = config.layers - start if width is None else width
    for name, mask in (("rows", rows), ("columns", columns)):
        if mask.ndim != 2 or mask.dtype != bool:
            raise ValueError(f"{name} must be bool [B or 1, T], got {mask.dtype} {list(mask.shape)}")
    heads = np.ones(config.heads, bool) if heads is None else np.asarray(heads)
    if heads.shape != (config.heads,) or heads.dtype != bool:
        raise ValueError(f"heads must be bool [{config.heads}], got {heads.dtype} {list(heads.shape)}")
    layers = window_of_layers(start, width, config)
    rows = layers[:, None, None, None] & heads[:, None] & rows[:, None]
    columns = np.broadcast_to(columns, (config.layers, *columns.shape))
    return {"attn.logits": KnockOut(jnp.asarray(rows), jnp.asarray(columns))}


def knock_out_effects(
    params: Params, config: Config, tokens: np.ndarray, labels: np.ndarray, positions: np.ndarray, targets: np.ndarray,
    *, source: str, target: str, width: int = 5, names: Sequence[str] = SEGMENTS,
) -> np.ndarray:  # fmt: skip
    """What forbidding the flow from ``source`` into ``target`` in a window of layers does to the answer (our reading).

    tokens, labels: as in :func:`attention_flow`; positions, targets: as in ``answer_logprobs``. Returns float32
    [L - width + 1, *targets.shape]: log-probability with the window that begins here knocked out minus without.
    """
    labels = _check_labels(labels, tokens, names)
    window_of_layers(0, width, config)
    for name in (source, target):
        if name not in names:
            raise ValueError(f"there is no segment {name!r}; segments: {', '.join(names)}")
    rows, columns = labels == names.index(target), labels == names.index(source)
    run = lambda edit: np.asarray(answer_logprobs(params, config, tokens, positions, targets, edit))  # noqa: E731
    plain = run(None)
    starts = range(config.layers - width + 1)
    return np.stack([run(knock_out(rows, columns, config, start, width)) - plain for start in starts])
