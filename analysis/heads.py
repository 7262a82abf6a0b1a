"""Retrieval heads: which attention heads look from a question to the documents that answer it (arXiv 2505.10063).

    alpha = question_attention(params, config, prompts)           # [L, B, N, n], attention from question to documents
    scores = add_samples(scores, alpha, gold, ids, prompts.counts)  # eta of every head, over validation samples
    chosen = head_set(scores, k=4, model="...", stage="coarse")   # the best of them, to be saved
    kept = coarse_filter(alpha[:, b], chosen.heads, m=4)          # D', best document last
    candidates = fine_candidates(alpha_of_D', second.heads, m=2)  # D_cand, for analysis.steering

Heads are query heads, numbered from 0 as (layer, head). What runs on the device is the sum over question rows, inside
each layer and by blocks of queries, so that no [T, T] array is kept; the rest is arithmetic on L N n numbers, on the
host in float64.
"""

import dataclasses
import functools
import json
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from analysis.prompts import Prompts
from models.config import Config
from models.params import Params
from models.taps import Reduced
from models.transformer import forward

AGGREGATIONS = ("mass", "mean_over_doc_tokens")
ORDERS = ("ascending", "original", "random")
_EXACT = jax.lax.Precision.HIGHEST
_DIGITS = 9  # scores that differ by rounding alone are equal

Head = tuple[int, int]


# --- On the device: attention from the question to each document -----------------------------------------------------


@struct.dataclass
class _FromQuestion:
    """The function of a reduction: see :func:`from_question`. document int32 [B, T], question bool [B, T]."""

    document: jax.Array
    question: jax.Array
    documents: int = struct.field(pytree_node=False)
    aggregation: str = struct.field(pytree_node=False)

    def __call__(self, values: Mapping[str, jax.Array], slots: jax.Array) -> jax.Array:
        probs = values["attn.probs"]
        B, K, G, t, S = probs.shape
        rows = self.question / self.question.sum(axis=1, keepdims=True)
        rows = jnp.broadcast_to(at_slots(rows.astype(jnp.float32), slots), (B, t))
        member = jax.nn.one_hot(jnp.asarray(self.document), self.documents, dtype=jnp.float32)  # -1: no document
        sizes = member.sum(axis=1)
        member = jnp.pad(member[:, :S], ((0, 0), (0, max(S - member.shape[1], 0)), (0, 0)))
        seen = jnp.einsum("bkgts,bt->bkgs", probs, rows, precision=_EXACT)
        alpha = jnp.einsum("bkgs,bsn->bkgn", seen, jnp.broadcast_to(member, (B, S, self.documents)), precision=_EXACT)
        if self.aggregation == "mean_over_doc_tokens":
            alpha = alpha / jnp.maximum(sizes, 1.0)[:, None, None]
        return alpha.reshape(B, K * G, self.documents)


def at_slots(values: jax.Array, slots: jax.Array) -> jax.Array:
    """values [B or 1, T] at the queries' ``slots`` int32 [B or 1, t], 0 where there is none (-1, or behind T)."""
    B, T = max(values.shape[0], slots.shape[0]), values.shape[1]
    values, slots = jnp.broadcast_to(values, (B, T)), jnp.broadcast_to(slots, (B, slots.shape[1]))
    inside = (slots >= 0) & (slots < T)
    return jnp.where(inside, jnp.take_along_axis(values, jnp.clip(slots, 0, T - 1), axis=1), 0)


def from_question(prompts: Prompts, aggregation: str = "mass") -> Reduced:
    """The reduction of "attn.probs" that leaves alpha float32 [L, B, N, n], for ``reduce=`` of ``models.forward``,
    ``prefill`` and ``extend`` (there, of the part with the question).

    alpha[l, b, h, i] is how much of its attention head h of layer l puts on document i, averaged over the rows of the
    question: "mass" sums over the document's tokens, "mean_over_doc_tokens" averages, which takes away the advantage
    of long documents. arXiv 2505.10063 (Eq. 1) leaves open how tokens are put together; both are our choice. Works on
    blocks of queries; new documents of the same padded shape compile nothing.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, not {aggregation!r}")
    function = _FromQuestion(prompts.document, prompts.question, prompts.documents, aggregation)
    return Reduced(("attn.probs",), function, by_block=True)


@functools.partial(jax.jit, static_argnames=("config", "aggregation"))
def _alpha(params, prompts, *, config, aggregation):
    kept = {"alpha": from_question(prompts, aggregation)}
    return forward(params, config, jnp.asarray(prompts.tokens), head=False, reduce=kept).records["alpha"]


def question_attention(params: Params, config: Config, prompts: Prompts, aggregation: str = "mass") -> jax.Array:
    """alpha float32 [L, B, N, n] of whole prompts, by one ``models.forward``; see :func:`from_question`. Columns of
    documents that a prompt does not have are 0."""
    return _alpha(params, prompts, config=config, aggregation=aggregation)


# --- Scores of documents (Eq. 1) and of heads (Eq. 2) ----------------------------------------------------------------


def document_scores(alpha: np.ndarray, counts: np.ndarray | int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(beta float64 [..., n], degenerate bool [...]): attention shared out among documents, arXiv 2505.10063, Eq. 1.

    alpha: float [..., n]. counts: int, broadcast against the leading axes, how many of the n columns are documents
    (default all; for [L, B, N, n] pass ``counts[None, :, None]``). A head whose mass on all documents is 0 or NaN is
    degenerate: it scores all documents alike, 1 / count, for ranking only (our choice).
    """
    alpha = np.asarray(alpha, np.float64)
    n = alpha.shape[-1]
    counts = np.broadcast_to(n if counts is None else np.asarray(counts), alpha.shape[:-1])
    if counts.size and not 1 <= counts.min() <= counts.max() <= n:
        raise ValueError(f"counts must lie between 1 and the {n} columns of alpha, not {counts.min()}..{counts.max()}")
    real = np.arange(n) < counts[..., None]
    mass = np.where(real, alpha, 0.0)
    total = mass.sum(axis=-1)
    degenerate = ~(np.isfinite(total) & (total > 0))
    safe = np.where(degenerate, 1.0, total)[..., None]
    return np.where(degenerate[..., None], real / counts[..., None], mass / safe), degenerate


@dataclasses.dataclass(frozen=True, eq=False)
class HeadScores:
    """Sums over validation samples. eta: float64 [L, N], between 0 and the largest number of gold documents times
    samples. degenerate: int64 [L, N], samples that a head was left out of. samples: their ids."""

    eta: np.ndarray
    degenerate: np.ndarray
    samples: tuple[str, ...]
    aggregation: str

    @classmethod
    def empty(cls, config: Config, aggregation: str = "mass") -> "HeadScores":
        """Before the first sample."""
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, not {aggregation!r}")
        shape = config.layers, config.heads
        return cls(np.zeros(shape), np.zeros(shape, np.int64), (), aggregation)


def check_gold(gold: Collection[int], documents: int, sample: str) -> None:
    """Raise ValueError that names the sample where it has no gold document or one that it does not have."""
    if not len(gold):
        raise ValueError(f"sample {sample!r}: it has no gold document; leave it out of validation")
    for i in gold:
        if not 0 <= i < documents:
            raise ValueError(f"sample {sample!r}: gold document {i} is not one of its {documents} documents")


def add_samples(
    scores: HeadScores,
    alpha: jax.Array | np.ndarray,
    gold: Sequence[Collection[int]],
    samples: Sequence[str],
    counts: Sequence[int] | np.ndarray,
) -> HeadScores:
    """eta with one batch more: the sum over samples and their gold documents of beta, arXiv 2505.10063, Eq. 2.

    alpha: float [L, B, N, n] (:func:`question_attention`). gold: for each sample the numbers of its gold documents, all
    of whose mass counts. samples: their ids. counts: int [B], their documents. Degenerate heads of a sample add nothing
    and are counted (our choice). Raises ValueError that names the sample for gold that is missing or unknown and for a
    sample that was added before.
    """
    counts = np.asarray(counts)
    L, B, N, n = np.shape(alpha)
    if scores.eta.shape != (L, N) or not B == len(gold) == len(samples) == len(counts):
        raise ValueError(
            f"alpha {[L, B, N, n]} goes with {B} samples of a model of {L} layers and {N} heads; got {len(gold)} gold "
            f"sets, {len(samples)} ids, {len(counts)} counts and scores of {list(scores.eta.shape)}"
        )
    for i, sample in enumerate(samples):
        check_gold(gold[i], int(counts[i]), sample)
        if sample in scores.samples or sample in samples[:i]:
            raise ValueError(f"sample {sample!r} was counted before; each counts once")
    beta, degenerate = document_scores(np.asarray(alpha), counts[None, :, None])
    is_gold = np.zeros((B, n))
    for i, ids in enumerate(gold):
        is_gold[i, list(set(ids))] = 1.0
    gain = np.where(degenerate, 0.0, np.einsum("lbhn,bn->lbh", beta, is_gold))
    return dataclasses.replace(
        scores, eta=scores.eta + gain.sum(axis=1), degenerate=scores.degenerate + degenerate.sum(axis=1),
        samples=(*scores.samples, *samples),
    )  # fmt: skip


def check_heads(heads: Iterable[Head], layers: int, num_heads: int) -> None:
    """Raise ValueError that names a (layer, head) which a model of this shape does not have."""
    for layer, head in heads:
        if not (0 <= layer < layers and 0 <= head < num_heads):
            raise ValueError(
                f"head ({layer}, {head}) is outside of the model's {layers} layers and {num_heads} heads, from (0, 0)"
            )


def whole_layers(config: Config, length: int) -> tuple[int, ...]:
    """Layers in which the last of ``length`` tokens sees all others: those without a sliding window, or with one of at
    least that many tokens. Heads of the others rank the last documents first, whatever is asked."""
    return tuple(i for i, slides in enumerate(config.slides) if not slides or config.sliding_window >= length)


def top_heads(scores: np.ndarray, k: int, layers: Sequence[int] | None = None) -> tuple[Head, ...]:
    """The k best (layer, head) of scores float [L, N], best first, equal ones by layer and head (arXiv 2505.10063,
    Eq. 3; the order of ties is our choice). layers: those to choose from; None: all. Raises ValueError for k below 1
    or above the number of heads there are."""
    scores = np.asarray(scores, np.float64)
    among = sorted(range(len(scores)) if layers is None else set(layers))
    if not 1 <= k <= len(among) * scores.shape[1]:
        whose = "the model's" if layers is None else "the"
        of = "" if layers is None else f" of layers {among}, which see whole prompts"
        raise ValueError(f"k={k} heads: must lie between 1 and {whose} {len(among) * scores.shape[1]} heads{of}")
    best = np.argsort(-scores[among].reshape(-1), kind="stable")[:k]
    return tuple((among[int(i) // scores.shape[1]], int(i) % scores.shape[1]) for i in best)


# --- Files of heads --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class HeadSet:
    """Heads chosen on validation samples, and what they were chosen for.

    heads: (layer, head), best first; values: their scores. model: an id of the weights; layers L and num_heads N of it.
    aggregation: of alpha. validation: ids of the samples, whose number is ``samples``. stage: the caller's name for its
    use, e.g. "coarse" or "fine". score: "retrieval" is eta of arXiv 2505.10063; heads by another score, such as
    :func:`copy_score`, bear its name and are not taken for these.
    """

    heads: tuple[Head, ...]
    values: tuple[float, ...]
    model: str
    layers: int
    num_heads: int
    aggregation: str
    validation: tuple[str, ...]
    stage: str = ""
    score: str = "retrieval"

    def __post_init__(self):
        check_heads(self.heads, self.layers, self.num_heads)
        if not self.heads or len(set(self.heads)) != len(self.heads) or len(self.values) != len(self.heads):
            raise ValueError(f"a head set has one value for each of its different heads, got {self}")
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, not {self.aggregation!r}")

    @property
    def samples(self) -> int:
        return len(self.validation)


def head_set(scores: HeadScores, k: int, model: str, stage: str = "", layers: Sequence[int] | None = None) -> HeadSet:
    """The k best heads of eta (:func:`top_heads`, in ``layers``) with what a file must say of them. Raises ValueError
    without samples, and where one of the k never looked at a document."""
    if not scores.samples:
        raise ValueError("no validation samples were added, so no head is better than another")
    heads = top_heads(scores.eta, k, layers)
    for head in heads:
        if scores.degenerate[head] == len(scores.samples):
            raise ValueError(
                f"head {head} is among the best {k} but has no attention on documents in any of the "
                f"{len(scores.samples)} samples; lower k or look at the prompts' spans"
            )
    return HeadSet(
        heads, tuple(float(scores.eta[head]) for head in heads), model, *scores.eta.shape, scores.aggregation,
        scores.samples, stage,
    )  # fmt: skip


def save_head_set(path: str | Path, heads: HeadSet) -> None:
    """Write a head set as JSON: its fields by name, and the number of samples."""
    content = dataclasses.asdict(heads) | {"samples": heads.samples}
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_head_set(path: str | Path, model: str, config: Config, score: str = "retrieval") -> HeadSet:
    """Read a head set and check that it was made for this model, as ``model`` names it, and by this score. Raises
    ValueError that names the file and the field."""
    content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    fields = [field.name for field in dataclasses.fields(HeadSet)]
    if missing := [name for name in (*fields, "samples") if name not in content]:
        raise ValueError(f"{path}: field {missing[0]!r} is missing; is this a file of save_head_set?")
    wanted = {"model": model, "layers": config.layers, "num_heads": config.heads, "score": score}
    for name, value in wanted.items():
        if content[name] != value:
            raise ValueError(f"{path}: {name} is {content[name]!r}, not {value!r}; choose heads on this model anew")
    content["heads"] = tuple((int(layer), int(head)) for layer, head in content["heads"])
    content |= {"values": tuple(content["values"]), "validation": tuple(content["validation"])}
    if content["samples"] != len(content["validation"]):
        raise ValueError(f"{path}: samples is {content['samples']}, with {len(content['validation'])} ids")
    return HeadSet(**{name: content[name] for name in fields})


def check_head_sets(coarse: HeadSet, fine: HeadSet, test: Collection[str] = ()) -> None:
    """Warn where both stages were chosen on the same samples (arXiv 2505.10063 takes different ones, the second
    with filtered documents). Raise ValueError where they were made for different models or with different
    aggregations, or where a test sample is among them."""
    for name in ("model", "layers", "num_heads", "aggregation"):
        one, other = getattr(coarse, name), getattr(fine, name)
        if one != other:
            raise ValueError(f"the head sets of the two stages differ in {name}: {one!r} and {other!r}")
    for heads in (coarse, fine):
        if both := sorted(set(heads.validation) & set(test)):
            raise ValueError(f"test sample {both[0]!r} chose the heads of stage {heads.stage!r}; take it out of either")
    if set(coarse.validation) == set(fine.validation):
        warnings.warn(
            "both stages' heads were chosen on the same validation samples; take other ones for the second stage, "
            "with prompts that were filtered by the first",
            stacklevel=2,
        )


# --- Documents: the coarse filter (Eq. 4 to 6) and the candidates (Eq. 7) --------------------------------------------


@dataclasses.dataclass(frozen=True)
class Filtered:
    """What the coarse filter keeps. order: D', the original numbers of documents, in the order to put them in.
    gamma: their scores. degenerate: how many of the heads looked at no document."""

    order: tuple[int, ...]
    gamma: tuple[float, ...]
    degenerate: int = 0


def _chosen(alpha: np.ndarray, heads: Sequence[Head], m: int, count: int | None, sample: str):
    """(beta [heads, count], union of their m best documents in original order, degenerate heads)."""
    alpha = np.asarray(alpha)
    if alpha.ndim != 3:
        raise ValueError(f"sample {sample!r}: alpha must be [L, N, n] of one sample, not {list(alpha.shape)}")
    if not len(heads):
        raise ValueError(f"sample {sample!r}: no heads were given; choose at least one")
    if m < 1:
        raise ValueError(f"m={m} documents per head: must be at least 1")
    check_heads(heads, *alpha.shape[:2])
    count = alpha.shape[-1] if count is None else int(count)
    if not 1 <= count <= alpha.shape[-1]:
        raise ValueError(f"sample {sample!r}: count={count} must lie between 1 and {alpha.shape[-1]} documents")
    if count < m:
        warnings.warn(f"sample {sample!r}: {count} documents are fewer than m={m}, so all are taken", stacklevel=3)
    beta, degenerate = document_scores(alpha[tuple(zip(*heads))][:, :count])
    if degenerate.all():
        raise ValueError(
            f"sample {sample!r}: none of the heads {list(heads)} has attention on any document; look at the spans, or "
            "choose other heads"
        )
    best = np.argsort(-np.round(beta, _DIGITS), axis=1, kind="stable")[:, :m]
    return beta, np.unique(best), int(degenerate.sum())


def coarse_filter(
    alpha: jax.Array | np.ndarray,
    heads: Sequence[Head],
    m: int = 4,
    *,
    count: int | None = None,
    order: str = "ascending",
    seed: int = 0,
    sample: str = "",
) -> Filtered:
    """Documents that some head has among its m best (arXiv 2505.10063, Eq. 4), in the order of Eq. 5 and 6.

    alpha: float [L, N, n] of one sample; count: how many of the n columns are documents. order: "ascending" puts the
    highest gamma, the sum of beta over the heads, last, next to the question, and equal ones in their original order
    (our choice); "random" (by ``seed``) and "original" are for comparison, the first being the paper's ablation. Takes
    all documents and warns if there are fewer than m. Raises ValueError that names heads outside of the model, and the
    sample where no head looks at a document.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, not {order!r}")
    beta, kept, degenerate = _chosen(alpha, heads, m, count, sample)
    gamma = np.round(beta.sum(axis=0), _DIGITS)[kept]
    places = {
        "ascending": lambda: np.argsort(gamma, kind="stable"),
        "original": lambda: np.arange(len(kept)),
        "random": lambda: np.random.default_rng(seed).permutation(len(kept)),
    }[order]()
    return Filtered(tuple(kept[places].tolist()), tuple(gamma[places].tolist()), degenerate)


def fine_candidates(
    alpha: jax.Array | np.ndarray,
    heads: Sequence[Head],
    m: int = 2,
    *,
    count: int | None = None,
    sample: str = "",
) -> tuple[int, ...]:
    """D_cand: places in D' of the documents that some head has among its m best, ascending (arXiv 2505.10063, Eq. 7).

    alpha: float [L, N, n] of the prompt with the filtered documents, for the heads of the second stage. One round:
    the paper gives no number of iterations. Warnings and errors as in :func:`coarse_filter`.
    """
    _, kept, _ = _chosen(alpha, heads, m, count, sample)
    return tuple(kept.tolist())


def gold_recall(documents: Collection[int], gold: Collection[int]) -> float:
    """The share of gold documents among ``documents`` (original numbers): to be told of the first stage, since what it
    drops is lost (our choice). Raises ValueError without gold."""
    if not len(gold):
        raise ValueError("recall needs at least one gold document")
    return len(set(documents) & set(gold)) / len(set(gold))


# --- For comparison: heads that copy (Wu et al.) ---------------------------------------------------------------------


def _top_key(values: Mapping[str, jax.Array]) -> jax.Array:
    probs = values["attn.probs"]
    B, K, G, t, _ = probs.shape
    return jnp.argmax(probs, axis=-1).astype(jnp.int32).reshape(B, K * G, t)


# Where each query looks most: int32 [L, B, N, T] of a whole prompt, [steps, L, B, N, 1] of ``decode``. It makes the
# scores of all rows it is given, so use it on ``extend`` and ``decode``.
TOP_KEY = Reduced(("attn.probs",), _top_key)


def copy_score(attended: np.ndarray, generated: np.ndarray, prompt: np.ndarray, needle: tuple[int, int]) -> np.ndarray:
    """Copy scores float64 [L, N] of one sample: the retrieval heads of Wu et al. (arXiv 2404.15574), which are another
    notion than eta and not to be mixed with it.

    attended: int [M, L, N], where each head looks most in the row that token m was drawn from: for the first token the
    prompt's last row, then the row of token m - 1 (:data:`TOP_KEY`). generated: int [M]. prompt: int [T] tokens, needle
    their span [start, end). A head earns 1 / (end - start) for each m with its place inside the needle and on the very
    token that is generated. As in the authors' code, a token that is copied twice counts twice; which samples count is
    the caller's choice (theirs: those that were answered).
    """
    attended, generated, prompt = np.asarray(attended), np.asarray(generated), np.asarray(prompt)
    start, end = needle
    if not 0 <= start < end <= len(prompt):
        raise ValueError(f"the needle [{start}, {end}) must hold tokens of the prompt's {len(prompt)}")
    if attended.ndim != 3 or len(attended) != len(generated):
        raise ValueError(f"attended must be [M, L, N] for {len(generated)} tokens, not {list(attended.shape)}")
    inside = (attended >= start) & (attended < end)
    same = prompt[np.clip(attended, 0, len(prompt) - 1)] == generated[:, None, None]
    return (inside & same).sum(axis=0) / (end - start)
