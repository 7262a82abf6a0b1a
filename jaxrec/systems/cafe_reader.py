"""How CAFE's recipe reads with a model: prompts of documents in batches of few shapes, the attention from questions to
documents, and greedy answers, steered or with documents hidden (arXiv 2505.10063)."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from analysis import heads as finding
from analysis import steering
from analysis.prompts import Prompt, Prompts, build_prompt, check_fits, pad_prompts, split_at_question
from jaxrec.data.documents import Question
from models.sample import bucket, decode, extend, prefill
from models.sharding import to_host, use_mesh
from models.stops import stop_table

if TYPE_CHECKING:
    from jaxrec.systems.cafe import Run

_MARK = "\ue000"  # stands for the prompt in a chat template

Heads = Sequence[finding.Head]
Places = Sequence[Collection[int]]


def make_prompts(this: Run, questions: Sequence[Question], orders: Sequence[Sequence[int]]) -> list[Prompt]:
    """The prompt of each question with the documents of ``orders``, in that order. Texts of documents and questions
    cannot forge control tokens. Raises ValueError for a prompt that, with its answer, is too long for the model."""
    p, tokenizer = this.config.prompt, this.model.tokenizer
    before, behind = p.system, p.cue
    if p.chat:
        before, _, behind = tokenizer.chat([{"role": "user", "content": f"{p.system}{_MARK}{p.cue}"}]).partition(_MARK)
    system, instruction, cue = (tokenizer.encode(text) if text else [] for text in (before, p.instruction, behind))
    out = []
    for question, order in zip(questions, orders, strict=True):
        texts = [
            (p.between if place else "")
            + p.document.format(title=question.documents[i].title, text=question.documents[i].text, number=place + 1)
            for place, i in enumerate(order)
        ]
        *documents, asked = tokenizer.encode_batch(
            [*texts, p.question.format(question=question.question)], specials=False
        )
        prompt = build_prompt(
            documents, asked, system=system, instruction=instruction, cue=cue, name=f"question {question.id!r}"
        )
        check_fits(prompt, this.model.config, this.config.evaluate.max_new)
        out.append(prompt)
    return out


def batches(prompts: Sequence[Prompt], size: int) -> Iterator[tuple[list[int], int]]:
    """Numbers of ``size`` prompts of about equal length, and the width they are padded to, a power of two; the last
    batch of a width is filled up by repeating a prompt, so that there is one shape per width."""
    widths = np.array([1 << (len(p.tokens) - 1).bit_length() for p in prompts])
    for width in np.unique(widths).tolist():
        members = np.flatnonzero(widths == width).tolist()
        for low in range(0, len(members), size):
            part = members[low : low + size]
            yield part + part[-1:] * (size - len(part)), width


def attention(this: Run, prompts: Sequence[Prompt]) -> np.ndarray:
    """alpha float32 [n, L, N, documents] of all prompts (``analysis.heads.question_attention``)."""
    c, most = this.config, bucket(max(len(p.documents) for p in prompts), 4)
    config = this.model.config
    out = np.zeros((len(prompts), config.layers, config.heads, most), np.float32)
    for part, width in batches(prompts, c.evaluate.batch_size):
        padded = pad_prompts([prompts[i] for i in part], config, width=width, documents=most)
        with use_mesh(this.mesh):
            alpha = finding.question_attention(this.model.params, config, padded, c.detect.aggregation)
        out[part] = to_host(alpha).transpose(1, 0, 2, 3)
    return out


def answer(
    this: Run, prompts: Sequence[Prompt], fine: Heads | None = None, hidden: Places | None = None
) -> tuple[list[str], list[tuple[int, ...]]]:
    """Greedy answers, and the places of the documents that were steered towards. With ``fine`` heads attention is
    steered towards their candidates (arXiv 2505.10063, Eq. 7 to 9); else the documents of each prompt at its places
    ``hidden`` are not seen by the question and the answer, and without either nothing is changed."""
    texts: list[str] = [""] * len(prompts)
    places: list[tuple[int, ...]] = [()] * len(prompts)
    rest = bucket(max(len(p.tokens) - p.question[0] for p in prompts))
    most = bucket(max(len(p.documents) for p in prompts), 4)
    for part, width in batches(prompts, this.config.evaluate.batch_size):
        padded = pad_prompts([prompts[i] for i in part], this.model.config, width=width, documents=most)
        with use_mesh(this.mesh):
            names, unseen = [prompts[i].name for i in part], hidden and [hidden[i] for i in part]
            said, chosen = _answer_batch(this, padded, names, width, rest, fine, unseen)
        for i, text, candidates in zip(part, said, chosen, strict=True):
            texts[i], places[i] = text, candidates
    return texts, places


def _answer_batch(
    this: Run, prompts: Prompts, names: Sequence[str], width: int, rest: int, fine: Heads | None, hidden: Places | None
) -> tuple[list[str], list[tuple[int, ...]]]:
    """One batch: the documents once, the question to find candidates, the question again steered, the answer."""
    c, config, weights, tokenizer = this.config, this.model.config, this.weights, this.model.tokenizer
    before, starts, behind, counts = split_at_question(prompts)
    before = np.pad(before, ((0, 0), (0, width - before.shape[1])))
    behind = np.pad(behind, ((0, 0), (0, rest - behind.shape[1])))
    longest, new = int(prompts.lengths.max()), c.evaluate.max_new
    B = len(starts)
    session = prefill(weights, config, before, starts, bucket(width + new))
    chosen: list[tuple[int, ...]] = [()] * B
    edit, generated = None, None
    if fine is None:
        edit = generated = hidden and steering.hide(config, prompts, hidden)
        session = extend(weights, config, session, behind, counts, longest, edit=edit)
    else:
        kept = {"alpha": finding.from_question(prompts, c.detect.aggregation)}
        session = extend(weights, config, session, behind, counts, longest, reduce=kept)
        alpha = to_host(session.records["alpha"])
        chosen = [
            finding.fine_candidates(
                alpha[:, b],
                fine,
                min(c.steer.per_head, int(prompts.counts[b])),
                count=prompts.counts[b],
                sample=names[b],
            )
            for b in range(B)
        ]
        edit = _steer(this, prompts, chosen)
        generated = edit if c.steer.rows == "include_generated" else None
        session = steering.rewind(session, starts)
        session = extend(weights, config, session, behind, counts, longest, edit=edit)
    stops = stop_table(tuple(c.evaluate.stop), tuple(tokenizer.token_bytes())) if c.evaluate.stop else None
    limits = np.full(B, new, np.int32)
    out, _ = decode(
        weights, config, session, jax.random.key(this.seed), limits, stops=stops, longest=longest, temperature=0.0,
        edit=generated,
    )  # fmt: skip
    out = to_host(out)
    said = []
    for tokens, count in zip(out.tokens, out.counts, strict=True):
        ids = [i for i in tokens[:count].tolist() if i not in config.eos_ids]
        text = tokenizer.decode(ids)
        said.append(min((text.partition(stop)[0] for stop in c.evaluate.stop), key=len, default=text).strip())
    return said, chosen


def _steer(this: Run, prompts: Prompts, chosen: Sequence[Collection[int]]) -> dict[str, steering.Steer]:
    s = this.config.steer
    with warnings.catch_warnings():
        # With few documents all may be candidates; the share of these is in the records.
        warnings.simplefilter("ignore", UserWarning)
        return steering.steer(this.model.config, prompts, chosen, s.delta, scaling=s.scaling, rows=s.rows)
