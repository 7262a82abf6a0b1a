"""Prompts of many documents and one question, with the exact place of every token.

Prompts are put together from pieces that are tokens already, so that no place is ever searched for in a text that was
tokenised as a whole. A span is a pair [start, end) of places. System text, separators, instructions and the answer cue
belong to no document and not to the question (arXiv 2505.10063 names only documents and question, and shows no
template).
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import numpy as np
from flax import struct

from models.config import Config
from models.sample import bucket

Tokens = Sequence[int]
Span = tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt. tokens: int32 [T]. documents: the span of each, question: its span; ``name`` stands in errors.

    The spans may stand in any order but for the question, which comes behind all documents, since causal attention
    lets it see only what stands before. Raises ValueError for a span that is empty, out of range, overlaps another one
    or is a document behind the question. Our own format.
    """

    tokens: np.ndarray
    documents: tuple[Span, ...]
    question: Span
    name: str = "prompt"

    def __post_init__(self):
        object.__setattr__(self, "tokens", np.asarray(self.tokens, np.int32))
        _check_spans(self)


def _named_spans(prompt: Prompt) -> list[tuple[str, Span]]:
    return [(f"document {i}", span) for i, span in enumerate(prompt.documents)] + [("the question", prompt.question)]


def _check_spans(prompt: Prompt) -> None:
    if prompt.tokens.ndim != 1:
        raise ValueError(f"{prompt.name}: tokens must be one row, not an array of shape {list(prompt.tokens.shape)}")
    if not prompt.documents:
        raise ValueError(f"{prompt.name}: there are no documents; give at least one")
    spans, length = _named_spans(prompt), len(prompt.tokens)
    for what, (start, end) in spans:
        if not 0 <= start <= end <= length:
            raise ValueError(f"{prompt.name}: {what} at [{start}, {end}) is outside of the {length} tokens")
        if start == end:
            raise ValueError(f"{prompt.name}: {what} at [{start}, {end}) is empty; leave it out or give it tokens")
    ordered = sorted(spans, key=lambda named: named[1])
    for (one, first), (other, second) in itertools.pairwise(ordered):
        if second[0] < first[1]:
            raise ValueError(
                f"{prompt.name}: {one} at [{first[0]}, {first[1]}) and {other} at [{second[0]}, {second[1]}) overlap"
            )
    if ordered[-1][1] != prompt.question:
        what, (start, end) = ordered[-1]
        raise ValueError(
            f"{prompt.name}: {what} at [{start}, {end}) stands behind the question at [{prompt.question[0]}, "
            f"{prompt.question[1]}), which cannot see it; put the question last"
        )


def build_prompt(
    documents: Sequence[Tokens],
    question: Tokens,
    *,
    system: Tokens = (),
    separator: Tokens = (),
    instruction: Tokens = (),
    cue: Tokens = (),
    name: str = "prompt",
) -> Prompt:
    """The prompt ``system, (document, separator) for each, instruction, question, cue``, with its spans.

    All pieces are token ids; the pieces that are neither documents nor question may be empty. The order of documents
    is that of the argument, so D' of arXiv 2505.10063 (Eq. 6) is ``[documents[i] for i in filtered.order]``. Raises
    ValueError that names an empty document or question. Our own format: the paper shows no template.
    """
    pieces: list[Tokens] = [system]
    for document in documents:
        pieces += [document, separator]
    pieces += [instruction, question, cue]
    ends = np.cumsum([len(piece) for piece in pieces])
    span = lambda i: (int(ends[i] - len(pieces[i])), int(ends[i]))  # noqa: E731
    tokens = np.concatenate([np.asarray(piece, np.int32).reshape(-1) for piece in pieces])
    places = range(1, 1 + 2 * len(documents), 2)
    return Prompt(tokens, tuple(span(i) for i in places), span(len(pieces) - 2), name)


@struct.dataclass
class Prompts:
    """Padded prompts, for the device. All arrays are numpy until a program takes them.

    tokens: int32 [B, T], padded on the right; lengths: int32 [B]. document: int32 [B, T], the number of the document
    that a token belongs to, or -1. question: bool [B, T]. counts: int32 [B], documents of each prompt. starts, ends:
    int32 [B], the span of each question. documents: n, the number of documents that results are padded to.
    """

    tokens: jax.Array
    lengths: jax.Array
    document: jax.Array
    question: jax.Array
    counts: jax.Array
    starts: jax.Array
    ends: jax.Array
    documents: int = struct.field(pytree_node=False)


def check_fits(prompt: Prompt, config: Config, new_tokens: int = 0) -> None:
    """Raise ValueError for a prompt that, with its answer, is longer than the model's context, giving both lengths
    (nothing is ever cut off: that would move spans), and for token ids outside the vocabulary."""
    length = len(prompt.tokens)
    if length + new_tokens > config.max_len:
        answer = f" and an answer of {new_tokens}" if new_tokens else ""
        raise ValueError(
            f"{prompt.name}: a prompt of {length} tokens{answer} does not fit the model's context of {config.max_len}; "
            "give fewer or shorter documents"
        )
    outside = (prompt.tokens < 0) | (prompt.tokens >= config.vocab_size)
    if outside.any():
        raise ValueError(
            f"{prompt.name}: token id {prompt.tokens[outside][0]} is outside the model's vocabulary of "
            f"{config.vocab_size}: is this the tokenizer the model was trained with?"
        )


def pad_prompts(
    prompts: Sequence[Prompt],
    config: Config,
    *,
    width: int | None = None,
    documents: int | None = None,
    new_tokens: int = 0,
) -> Prompts:
    """One batch of prompts that may differ in length and number of documents.

    width: T, documents: n; both default to a bucket that holds the largest (``models.sample.bucket``), so that other
    prompts of about this size run in the same compiled program. new_tokens: room that an answer needs in the model's
    context. Raises ValueError for prompts that do not fit (:func:`check_fits`).
    """
    if not prompts:
        raise ValueError("there are no prompts to pad; give at least one")
    for prompt in prompts:
        check_fits(prompt, config, new_tokens)
    longest, most = max(len(p.tokens) for p in prompts), max(len(p.documents) for p in prompts)
    width = width or bucket(longest)
    documents = documents or bucket(most, smallest=4)
    if width < longest or documents < most:
        what = f"width={width}" if width < longest else f"documents={documents}"
        raise ValueError(f"{what} is too small: prompts have up to {longest} tokens and {most} documents")
    B = len(prompts)
    tokens, document = np.zeros((B, width), np.int32), np.full((B, width), -1, np.int32)
    question = np.zeros((B, width), bool)
    for b, prompt in enumerate(prompts):
        tokens[b, : len(prompt.tokens)] = prompt.tokens
        question[b, slice(*prompt.question)] = True
        for i, span in enumerate(prompt.documents):
            document[b, slice(*span)] = i
    whole = lambda values: np.array(list(values), np.int32)  # noqa: E731
    return Prompts(
        tokens, whole(len(p.tokens) for p in prompts), document, question, whole(len(p.documents) for p in prompts),
        whole(p.question[0] for p in prompts), whole(p.question[1] for p in prompts), documents,
    )  # fmt: skip


def split_at_question(prompts: Prompts) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The prompts in two parts, for the sampler: (tokens int32 [B, P] before the question, how many int32 [B], tokens
    int32 [B, R] from the question on, how many int32 [B]), both padded on the right.

    ``models.prefill`` takes the first part, which holds all documents, and ``models.extend`` the second one, as often
    as needed (``analysis.steering.rewind``): the computation that arXiv 2505.10063 allows to share between the pass
    that finds candidates and the pass that is steered towards them.
    """
    tokens, lengths = np.asarray(prompts.tokens), np.asarray(prompts.lengths)
    starts = np.asarray(prompts.starts)
    rest = lengths - starts
    before = np.where(np.arange(starts.max()) < starts[:, None], tokens[:, : starts.max()], 0)
    offsets = np.arange(rest.max())
    places = np.minimum(starts[:, None] + offsets, tokens.shape[1] - 1)
    behind = np.where(offsets < rest[:, None], np.take_along_axis(tokens, places, axis=1), 0)
    return before, starts, behind, rest
