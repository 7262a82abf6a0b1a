"""Steering a question's attention towards chosen documents (arXiv 2505.10063, Eq. 8 and 9).

    edit = steer(config, prompts, candidates, delta=math.log(13))
    models.forward(params, config, prompts.tokens, edit=edit)             # all at once, or with the sampler:
    before, starts, behind, rest = split_at_question(prompts)
    session = prefill(weights, config, before, starts, size)              # documents, once
    session = extend(..., behind, rest, longest, reduce=...)              # the question, to find candidates
    session = rewind(session, starts)                                     # the documents' cache stays
    session = extend(..., behind, rest, longest, edit=edit)               # the question again, steered
    decode(..., edit=edit)                                                # steered too with rows="include_generated"

Rows of the documents stand before the question and are not touched, so what the cache holds of them is the same with
and without steering. One edit serves all of these programs: it goes by the places of tokens in a row.
"""

import math
import warnings
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from analysis.heads import Head, check_heads
from analysis.prompts import Prompts
from models.config import Config
from models.sample import Session

SCALINGS = ("bias_after_scale", "literal_eq8")
ROWS = ("question_and_tail", "question_only", "include_generated")
_NO_END = np.iinfo(np.int32).max
_HIDDEN = -1e30  # far below any score, and far from the lowest number, which marks what a mask has closed


@struct.dataclass
class Steer:
    """Edit of "attn.logits": add to the scores of chosen keys, on the rows of queries from ``start`` to before ``end``.

    delta: float32 [L, B or 1, N or 1], by layer, row and head. keys: bool [L, B or 1, T], keys behind T are not chosen.
    start, end: int32 [L, B or 1], places of queries. Scores that a mask has closed stay closed. Works on blocks of
    queries; all fields are numbers that compile nothing anew. For a session whose prompts were repeated, repeat axis 1
    of every array: ``jax.tree.map(lambda x: x.repeat(times, 1), edit)``.
    """

    delta: jax.Array
    keys: jax.Array
    start: jax.Array
    end: jax.Array

    by_block = True  # no field: it has no annotation

    def __call__(self, scores: jax.Array, slots: jax.Array) -> jax.Array:
        B, K, G, _, S = scores.shape
        rows = (slots >= self.start[:, None]) & (slots < self.end[:, None])  # [B or 1, t]
        keys = self.keys[:, :S]
        keys = jnp.pad(keys, ((0, 0), (0, S - keys.shape[1])))
        delta = jnp.broadcast_to(self.delta, (self.delta.shape[0], K * G)).reshape(-1, K, G, 1, 1)
        chosen = rows[:, None, None, :, None] & keys[:, None, None, None, :]
        chosen = chosen & (scores > jnp.finfo(scores.dtype).min)
        return jnp.where(chosen, scores + delta.astype(scores.dtype), scores)


def bias(delta: float, config: Config, scaling: str = "bias_after_scale") -> float:
    """What is added to scores. "bias_after_scale" (default): delta, the weight of a candidate's token grows by e^delta
    against all others, which is what PASTA's code does and delta = log 13 as a notation means. "literal_eq8": delta
    times the model's factor of scores, 1 / sqrt(d), as Eq. 8 of arXiv 2505.10063 has it inside the division; the weight
    grows by e^(delta / sqrt(d)). Raises ValueError for delta that is negative or not finite, and unknown names."""
    if scaling not in SCALINGS:
        raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, not {scaling!r}")
    if not 0 <= delta <= float(np.finfo(np.float32).max):
        raise ValueError(f"delta must be finite and at least 0 (0 steers nothing), not {delta}")
    return float(delta) * (config.score_scale if scaling == "literal_eq8" else 1.0)


def _check_places(places: Sequence[Collection[int]], counts: np.ndarray) -> None:
    if len(places) != len(counts):
        raise ValueError(f"documents of {len(places)} prompts were given for a batch of {len(counts)}")
    for b, (chosen, count) in enumerate(zip(places, counts.tolist())):
        for i in chosen:
            if not 0 <= i < count:
                raise ValueError(f"prompt {b}: {i} is not one of its {count} documents")


def _check_candidates(candidates: Sequence[Collection[int]], counts: np.ndarray) -> None:
    _check_places(candidates, counts)
    for b, (chosen, count) in enumerate(zip(candidates, counts.tolist())):
        if not len(chosen):
            raise ValueError(f"prompt {b}: there are no candidates to steer towards; give at least one document")
        if len(set(chosen)) == count:
            warnings.warn(
                f"prompt {b}: all {count} documents are candidates, so attention is only taken from other tokens",
                stacklevel=3,
            )


def steer(
    config: Config,
    prompts: Prompts,
    candidates: Sequence[Collection[int]],
    delta: float = math.log(13),
    *,
    scaling: str = "bias_after_scale",
    rows: str = "question_and_tail",
    heads: Sequence[Head] | None = None,
) -> dict[str, Steer]:
    """The edit, for ``edit=`` of ``models.forward``, ``prefill``, ``extend`` and ``decode``.

    candidates: for each prompt the places of its candidates among its documents. delta: default log 13, of the paper's
    appendix E (its main text says log 10). scaling: see :func:`bias`. rows: which queries are steered:
    "question_and_tail" (default, our choice) the question and what follows it in the prompt, "question_only" what
    Eq. 8 says, "include_generated" also the answer's tokens as they are generated. heads: (layer, head), default all,
    as in the paper; fewer are for ablations. With a cap on scores (Gemma 2) delta is added behind it.

    Multiplying all other tokens' probabilities by a and normalising again (PASTA, arXiv 2311.02262) is the same with
    delta = -log a, see :func:`pasta`. Raises ValueError before any device work for a bad delta, no candidates or such
    that a prompt does not have, and heads outside of the model; warns where all documents are candidates.
    """
    amount = bias(delta, config, scaling)
    if rows not in ROWS:
        raise ValueError(f"rows must be one of {', '.join(ROWS)}, not {rows!r}")
    counts, lengths = np.asarray(prompts.counts), np.asarray(prompts.lengths)
    _check_candidates(candidates, counts)
    on = np.ones((config.layers, config.heads), bool)
    if heads is not None:
        check_heads(heads, config.layers, config.heads)
        on[:] = False
        on[tuple(np.array(list(heads), np.int32).reshape(-1, 2).T)] = True
    end = {
        "question_and_tail": lengths, "question_only": np.asarray(prompts.ends), "include_generated": _NO_END,
    }[rows]  # fmt: skip
    return _from_question(prompts, candidates, on * amount, end)


def hide(config: Config, prompts: Prompts, documents: Sequence[Collection[int]]) -> dict[str, Steer]:
    """The edit under which the question, what follows it in the prompt and what is generated do not see ``documents``,
    places among each prompt's own (possibly none), while other documents still do: the knock-out by which arXiv
    2505.10063 shows which documents a question reads.

    What it gives is for the same places in a program as that of :func:`steer`. Raises ValueError for documents that a
    prompt does not have.
    """
    _check_places(documents, np.asarray(prompts.counts))
    return _from_question(prompts, documents, np.full((config.layers, config.heads), _HIDDEN), _NO_END)


def _from_question(
    prompts: Prompts, documents: Sequence[Collection[int]], amount: np.ndarray, end: np.ndarray | int
) -> dict[str, Steer]:
    """``amount`` [L, N] on the scores of documents' tokens in rows from the question to ``end``, by row or one."""
    (L, _), B = amount.shape, len(documents)
    keys = np.stack([np.isin(row, list(chosen)) for row, chosen in zip(np.asarray(prompts.document), documents)])
    by_layer = lambda x, dtype: jnp.asarray(np.broadcast_to(x, (L, *np.shape(x))), dtype)  # noqa: E731
    edit = Steer(
        jnp.asarray(np.repeat(amount[:, None], B, axis=1), jnp.float32), by_layer(keys, bool),
        by_layer(np.asarray(prompts.starts), jnp.int32), by_layer(np.broadcast_to(end, (B,)), jnp.int32),
    )  # fmt: skip
    return {"attn.logits": edit}


def rewind(session: Session, lens: np.ndarray) -> Session:
    """The session as it was when its rows held ``lens`` int32 [B] tokens, ready for ``extend``: what the cache holds of
    these tokens stays, what came behind is written over. Its logits are not those of that time, so run at least one
    token on every row. Our choice of how arXiv 2505.10063's two passes share the documents' cache."""
    lens = np.asarray(lens, np.int32)
    if lens.shape != session.lens.shape or (lens < 0).any() or (lens > session.size).any():
        raise ValueError(
            f"lens must be int32 {list(session.lens.shape)} between 0 and the session's {session.size} slots, "
            f"got {lens.tolist()}"
        )
    return session.replace(lens=jnp.asarray(lens), records={})


def pasta(probs: jax.Array, highlighted: jax.Array, a: float) -> jax.Array:
    """Attention after PASTA (arXiv 2311.02262): probabilities of tokens that are not ``highlighted`` (bool
    [..., S], one mask for all sections) times ``a`` in (0, 1], then normalised.

    probs: float [..., S], rows that sum to 1. The same as adding -log a to the highlighted tokens' scores.
    """
    if not 0 < a <= 1:
        raise ValueError(f"a must lie in (0, 1], not {a}")
    weighted = jnp.where(highlighted, probs, probs * a)
    return weighted / weighted.sum(axis=-1, keepdims=True)
