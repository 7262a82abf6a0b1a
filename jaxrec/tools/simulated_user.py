"""The simulated user of GRSU (arXiv 2504.20458), played by a language model of ours or by a teacher.

Of our model a score is read where it would say "Yes" or "No": prompt and reply are run up to that place, nothing is
sampled. What items of one dialogue have in common is run once; their rows begin as copies of its cache. Lengths and
numbers of rows are rounded up to a few sizes, so that a level of a search compiles nothing that the one before did not.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.data.dialogues import Dialogue
from jaxrec.tools.conversation import Criticise, seed_of
from jaxrec.tools.teacher import Answer, Failure, Reply, Request, Sampling, Teacher, TokenLogprob, ask_text
from jaxrec.tools.user_prompts import UserPrompts, spellings
from models.hf import Model
from models.layout import decode_weights
from models.sample import Session, bucket, extend, prefill
from models.sharding import to_host, use_mesh
from models.slots import Rows, advance, resize

SCORES = ("normalised", "code")
ROUNDS, MOST_ROUNDS = 3, 5  # of sampling critiques: for every request, and for those of a list that has none yet
TRIES = 5  # of a teacher, to decide about an item
_DECIDED = re.compile(r"^\s*\d+[.)]\s*(.+?)\s*\?[\s*_]*(Yes|No)\b", re.MULTILINE)
_SLICE = 32  # tokens of critiques between two looks for their ends
_PREFILL = 16384  # tokens of one prefill, padding included


@dataclasses.dataclass(frozen=True)
class UserConfig:
    """score: "normalised", P(Yes) / (P(Yes) + P(No)), or "code", as the released code has it: P(Yes) where that is the
    likeliest token of all, 1 - P(No) where that one is, else no score. temperature, top_p, max_new: of critiques. rows:
    prompts run side by side at most; on two CPU cores 16 took four fifths of the time of 64 with long dialogues.
    cache_tokens: slots of all rows of the cache at most.

    Raises ValueError for another score and for numbers that make no sense.
    """

    score: str = "normalised"
    temperature: float = 1.0
    top_p: float = 1.0
    max_new: int = 1024
    rows: int = 64
    cache_tokens: int = 65_536

    def __post_init__(self):
        if self.score not in SCORES:
            raise ValueError(f"score={self.score!r} must be one of {', '.join(SCORES)}")
        for name in ("max_new", "rows", "cache_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature={self.temperature} must be at least 0, top_p={self.top_p} in (0, 1]")


def normalised_score(yes: np.ndarray, no: np.ndarray) -> np.ndarray:
    """P(Yes) / (P(Yes) + P(No)) in float64, of log-probabilities of any shape; NaN where neither can come."""
    yes, no = np.asarray(yes, np.float64), np.asarray(no, np.float64)
    top = np.maximum(yes, no)
    with np.errstate(invalid="ignore"):
        yes, no = np.exp(yes - top), np.exp(no - top)
        return yes / (yes + no)


def code_score(logprob: np.ndarray, yes: np.ndarray, no: np.ndarray) -> np.ndarray:
    """The released code's score in float64: of the token that was said, with this log-probability. yes, no: bool,
    whether it is one of these words; NaN where it is neither."""
    p = np.exp(np.asarray(logprob, np.float64))
    return np.where(yes, p, np.where(no, 1.0 - p, np.nan))


@functools.partial(jax.jit, static_argnames=("yes", "no"))
def _decision(logits: jax.Array, *, yes: tuple[int, ...], no: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Of logits [B, V]: log P(Yes), log P(No), that of the likeliest token (float32 [B]), and its id (int32 [B])."""
    logp = jax.nn.log_softmax(logits)
    words = (jax.nn.logsumexp(logp[:, list(ids)], axis=-1) for ids in (yes, no))
    return *words, jnp.max(logp, axis=-1), jnp.argmax(logp, axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class _Ids:
    """head: of what depends on the dialogue alone. tail: of the rest."""

    head: tuple[int, ...]
    tail: list[int]

    @property
    def length(self) -> int:
        return len(self.head) + len(self.tail)


class ModelUser:
    """``jaxrec.tools.conversation.User`` by a language model.

    prompts: made with the model's tokenizer. mesh: that the weights lie on, or None. A critique's random numbers belong
    to (seed, round, token), so that it does not depend on what else is asked, up to the rounding of products of other
    shapes. Raises ValueError for a model without tokenizer, and for one that cannot say "Yes" and "No" as one token.
    """

    def __init__(
        self, model: Model, prompts: UserPrompts, config: UserConfig | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ):  # fmt: skip
        if model.tokenizer is None or prompts.tokenizer is None:
            raise ValueError("a model that plays the user needs its tokenizer, and prompts made with it")
        self.prompts, self.config, self._model = prompts, config or UserConfig(), model.config
        self._tokenizer, self._mesh = model.tokenizer, mesh
        self._yes, self._no = (spellings(model.tokenizer, word) for word in ("Yes", "No"))
        with use_mesh(mesh):
            self._weights = decode_weights(model.params, model.config, fuse=mesh is None)

    def score(self, dialogues: Sequence[Dialogue], items: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """For each dialogue float64 [number of its items] in [0, 1]; with score="code" NaN where the model would say
        something else. What stands twice is run once. Raises ValueError for a prompt longer than the model's context,
        naming the dialogue, and FloatingPointError where the model's log-probabilities are not finite."""
        pairs = [(dialogue, item) for dialogue, own in zip(dialogues, items, strict=True) for item in own]
        prompts = [self.prompts.score_prompt(*pair) for pair in pairs]
        asked = list(dict.fromkeys(prompts))
        ids = self._encoded([(prefix, (rest, reply)) for prefix, rest, reply in asked])
        self._check_room(ids, [pairs[i][0] for i in _firsts(prompts)], 0)
        read = np.zeros((4, len(asked)))
        with use_mesh(self._mesh):
            for rows, session in self._run(ids):
                read[:, rows] = np.stack(self._decisions(session))[:, : len(rows)]
        if not np.isfinite(read[2]).all():
            raise FloatingPointError("the log-probabilities of the model that plays the user are not finite")
        found = dict(zip(asked, self._scores(*read), strict=True))
        every = iter(prompts)
        return [np.array([found[next(every)] for _ in own], np.float64) for own in items]

    def _decisions(self, session: Session) -> tuple[np.ndarray, ...]:
        return to_host(_decision(session.logits, yes=self._yes, no=self._no))

    def _scores(self, yes: np.ndarray, no: np.ndarray, best: np.ndarray, index: np.ndarray) -> np.ndarray:
        if self.config.score == "normalised":
            return normalised_score(yes, no)
        return code_score(best, np.isin(index, self._yes), np.isin(index, self._no))

    def criticise(self, requests: Sequence[Criticise]) -> list[str]:
        """One text for each. What is cut by its length, or empty, is drawn again (:func:`resampled`). Requests with one
        prompt share its run. Raises ValueError as :meth:`score` does."""
        prompts = [self.prompts.critique_prompt(request.dialogue, request.shown) for request in requests]
        asked = list(dict.fromkeys(prompts))
        ids = self._encoded([(prefix, (rest,)) for prefix, rest in asked])
        self._check_room(ids, [requests[i].dialogue for i in _firsts(prompts)], self.config.max_new)
        number = {prompt: i for i, prompt in enumerate(asked)}
        own = [number[prompt] for prompt in prompts]
        seeds = [request.seed for request in requests]
        return resampled(own, lambda wanted, again: self._sample(ids, own, seeds, wanted, again))

    def _sample(
        self, ids: Sequence[_Ids], own: Sequence[int], seeds: Sequence[int], wanted: Sequence[int], again: int
    ) -> list[str]:
        """Texts for the requests ``wanted``, "" where a reply did not end. own: each request's prompt."""
        used = sorted({own[request] for request in wanted})
        texts: dict[int, str] = {}
        with use_mesh(self._mesh):
            for rows, session in self._run([ids[prompt] for prompt in used]):
                at = {used[row]: i for i, row in enumerate(rows)}
                here = [request for request in wanted if own[request] in at]
                slots = session.size + self.config.max_new
                for chosen, size in _chunks(here, self._most(slots)):
                    source = _filled([at[own[request]] for request in chosen], size)
                    lengths = _filled([ids[own[request]].length for request in chosen], size)
                    drawn = _filled([seeds[request] for request in chosen], size)
                    copied = resize(session, source, slots)
                    texts |= zip(chosen, self._draw(copied, lengths, drawn, again, len(chosen)), strict=True)
        return [texts[request] for request in wanted]

    def _draw(self, session: Session, lengths: np.ndarray, seeds: np.ndarray, again: int, count: int) -> list[str]:
        """Texts of the first ``count`` rows of a session, "" of those that did not end."""
        c, size = self.config, len(lengths)
        made: list[list[int]] = [[] for _ in range(count)]
        texts: dict[int, str] = {}
        pairs = np.stack([seeds % 2**32, seeds // 2**32 % 2**32], axis=1).astype(np.uint32)
        full = functools.partial(np.full, size)
        while waiting := [row for row in range(count) if row not in texts]:
            done = _filled([len(row) for row in made], size)
            limits = np.zeros(size, np.int32)
            limits[waiting] = np.minimum(_SLICE, c.max_new - done[waiting])
            rows = Rows(
                limits, pairs, full(again, np.int32), done.astype(np.int32), full(c.temperature, np.float32),
                full(c.top_p, np.float32), full(0, np.int32),
            )  # fmt: skip
            out, session = advance(self._weights, self._model, session, rows, lengths + done, _SLICE)
            out = to_host(out.replace(logprobs=None))
            for row in waiting:
                made[row] += out.tokens[row, : out.counts[row]].tolist()
                text, ended = self._read(made[row], bool(out.ended[row]))
                if ended or len(made[row]) >= c.max_new:
                    texts[row] = text if ended else ""
        return [texts[row] for row in range(count)]

    def _read(self, ids: list[int], ended: bool) -> tuple[str, bool]:
        """The text so far, and whether it is complete. In style "short" a line end ends it too."""
        text = self._tokenizer.decode(ids[:-1] if ended else ids).lstrip()
        if self.prompts.style == "short":
            text, line_end, _ = text.partition("\n")
            ended |= bool(line_end)
        return text.rstrip(), ended

    # --- prompts on the device ----------------------------------------------------------------------------------------

    def _encoded(self, prompts: Sequence[tuple[str, tuple[str, ...]]]) -> list[_Ids]:
        """Ids of prompts, their pieces apart; what occurs often is encoded once."""
        texts = list(dict.fromkeys(text for prefix, rest in prompts for text in (prefix, *rest)))
        ids = dict(zip(texts, self._tokenizer.encode_batch(texts), strict=True))
        return [_Ids(tuple(ids[prefix]), [i for piece in rest for i in ids[piece]]) for prefix, rest in prompts]

    def _check_room(self, ids: Sequence[_Ids], dialogues: Sequence[Dialogue], new: int) -> None:
        for prompt, dialogue in zip(ids, dialogues, strict=True):
            if prompt.length + new > self._model.max_len:
                raise ValueError(
                    f"dialogue {dialogue.id}: its prompt has {prompt.length} tokens, and {new} may follow, but the "
                    f"model's context holds {self._model.max_len}: leave early turns out, or lower max_new"
                )

    def _most(self, slots: int) -> int:
        return max(1, min(self.config.rows, self.config.cache_tokens // slots))

    def _run(self, ids: Sequence[_Ids]) -> Iterator[tuple[list[int], Session]]:
        """Sessions in which prompts have been run: (numbers of the prompts in its first rows, session)."""
        by_head: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)
        for i, prompt in enumerate(ids):
            by_head[prompt.head].append(i)
        by_width: dict[int, list[tuple[int, ...]]] = collections.defaultdict(list)
        for head in by_head:
            by_width[_width(len(head))].append(head)
        for width, heads in sorted(by_width.items()):
            for chosen, size in _chunks(heads, min(self.config.rows, max(1, _PREFILL // width))):
                session = prefill(self._weights, self._model, *_block(chosen, size, width), width)
                pairs = [(i, row) for row, head in enumerate(chosen) for i in by_head[head]]
                yield from self._continue(session, ids, pairs)

    def _continue(
        self, session: Session, ids: Sequence[_Ids], pairs: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[list[int], Session]]:
        """:meth:`_run` behind heads that have been run. pairs: (number of a prompt, row of its head)."""
        by_width: dict[int, list[tuple[int, int]]] = collections.defaultdict(list)
        for i, row in pairs:
            by_width[bucket(len(ids[i].tail))].append((i, row))
        for width, group in sorted(by_width.items()):
            slots = session.size + width
            for chosen, size in _chunks(group, self._most(slots)):
                rows = [i for i, _ in chosen]
                tokens, counts = _block([ids[i].tail for i in rows], size, width)
                copied = resize(session, _filled([row for _, row in chosen], size), slots)
                longest = max(ids[i].length for i in rows)
                yield rows, extend(self._weights, self._model, copied, tokens, counts, longest)


class TeacherUser:
    """``jaxrec.tools.conversation.User`` by a bigger model that is asked for text (role "judge" scores, "annotator"
    criticises).

    prompts: of style "full" and without a tokenizer. Each item is a request of its own; a reply counts where it holds
    one decision, about this item, and is asked for again at temperature 1 where not, ``TRIES`` times in all. Scores
    come from the log-probabilities of the decision's token and of the likeliest beside it. counts: "replies", requests
    "asked again", failures of the teacher by kind, replies that cannot be used ("misfits" without one such decision,
    "cut by length", "empty"), and what was not to be had in all tries: "no valid decision" of an item, "no critique".
    Raises ValueError for other prompts and, when asked, RuntimeError where a whole batch failed or the teacher gave up:
    a teacher that is down is no user who has no opinion.
    """

    def __init__(self, teacher: Teacher, prompts: UserPrompts, config: UserConfig | None = None):
        if prompts.style != "full" or prompts.tokenizer is not None:
            raise ValueError("a teacher gets prompts as messages: make them with style='full' and no tokenizer")
        self.teacher, self.prompts, self.config = teacher, prompts, config or UserConfig()
        self.counts: collections.Counter[str] = collections.Counter()

    def score(self, dialogues: Sequence[Dialogue], items: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """For each dialogue float64 [number of its items] in [0, 1]; NaN where no reply counted. What stands twice is
        asked once."""
        pairs = [
            ("".join(self.prompts.score_prompt(dialogue, item)[:2]), item)
            for dialogue, own in zip(dialogues, items, strict=True) for item in own
        ]  # fmt: skip
        sampling = Sampling(temperature=0.0, max_tokens=64, seed=42, logprobs=20)
        asked = {pair: ask_text("judge", pair[0].strip(), sampling=sampling) for pair in pairs}
        found = dict.fromkeys(asked, np.nan)
        left = list(asked)
        for attempt in range(TRIES):
            again = {"temperature": 1.0, "seed": 42 + attempt} if attempt else {}
            self.counts["asked again"] += len(left) * bool(attempt)
            answers = self._answers([asked[pair].replace(**again) for pair in left])
            kept, left = zip(left, answers, strict=True), []
            for pair, answer in kept:
                if isinstance(answer, Failure):
                    continue
                if (score := self._score(answer, pair[1])) is not None:
                    found[pair] = score
                else:
                    left.append(pair)
            self.counts["misfits"] += len(left)
        self.counts["no valid decision"] += len(left)
        every = iter(pairs)
        return [np.array([found[next(every)] for _ in own], np.float64) for own in items]

    def _answers(self, requests: Sequence[Request]) -> list[Answer]:
        answers = self.teacher.ask(requests) if requests else []
        failed = collections.Counter(answer.kind for answer in answers if isinstance(answer, Failure))
        if failed["not_asked"] or (len(answers) > 1 and failed.total() == len(answers)):
            last = next(answer for answer in reversed(answers) if isinstance(answer, Failure))
            raise RuntimeError(
                f"{self.teacher.id}, who plays the user, did not answer {failed.total()} of {len(answers)} requests "
                f"({dict(failed)}; {last.message}): see that it does and run again; what it has said is kept"
            )
        self.counts["replies"] += len(answers) - failed.total()
        self.counts.update({f"failed_{kind}": count for kind, count in failed.items()})
        return answers

    def _score(self, reply: Reply, item: int) -> float | None:
        """None for a reply that does not count."""
        lines = list(_DECIDED.finditer(reply.text))
        if len(lines) != 1 or self.prompts.catalogue.find(lines[0][1].strip("*_ ")) != item or not reply.logprobs:
            return None
        token = _decided_token(reply.logprobs[0], lines[0][2])
        if token is None:
            return None
        if self.config.score == "code":
            said = token.token.strip()
            return float(code_score(np.array(token.logprob), np.array(said == "Yes"), np.array(said == "No")))
        likely = dict([*token.top, (token.token, token.logprob)])
        yes, no = (
            np.logaddexp.reduce([-np.inf, *(p for text, p in likely.items() if text.strip() == word)])
            for word in ("Yes", "No")
        )
        return float(normalised_score(yes, no))

    def criticise(self, requests: Sequence[Criticise]) -> list[str]:
        """One text for each, drawn again as :func:`resampled` does where it is cut by its length or empty."""
        texts = ["".join(self.prompts.critique_prompt(r.dialogue, r.shown)).strip() for r in requests]
        number = {text: i for i, text in enumerate(dict.fromkeys(texts))}

        def sample(wanted: list[int], again: int) -> list[str]:
            asked = [self._criticise(texts[i], requests[i].seed, again) for i in wanted]
            self.counts["asked again"] += len(asked) * bool(again)
            return [self._said(answer) for answer in self._answers(asked)]

        said = resampled([number[text] for text in texts], sample)
        self.counts["no critique"] += said.count("")
        return said

    def _criticise(self, text: str, seed: int, again: int) -> Request:
        c = self.config
        own = seed_of(seed, again) if again else seed
        sampling = Sampling(temperature=c.temperature, top_p=c.top_p, max_tokens=c.max_new, seed=own)
        return ask_text("annotator", text, sampling=sampling)

    def _said(self, answer: Answer) -> str:
        if isinstance(answer, Failure):
            return ""
        if answer.finish[0] == "length":
            self.counts["cut by length"] += 1
            return ""
        said = answer.text.strip()
        self.counts["empty"] += not said
        return said


def _decided_token(tokens: Sequence[TokenLogprob], said: str) -> TokenLogprob | None:
    """The token that is the decision of the only line that holds one; None where the tokens do not spell it so."""
    found = _DECIDED.search("".join(token.token for token in tokens))
    end = 0
    for token in tokens if found else ():
        end += len(token.token)
        if end > found.start(2):
            return token if token.token.strip() == said else None
    return None


def resampled(groups: Sequence[int], sample: Callable[[list[int], int], Sequence[str]]) -> list[str]:
    """Draws texts until there are enough, as the released code does: ``ROUNDS`` rounds for every request that has none,
    then up to ``MOST_ROUNDS`` for those of a group without any. "" is left where none came.

    groups: of each request; those of one group are about the same list. sample(requests, round) gives a text for each,
    "" where it cannot be used.
    """
    texts = [""] * len(groups)
    for again in range(MOST_ROUNDS):
        have = {group for group, text in zip(groups, texts, strict=True) if text}
        wanted = [i for i, text in enumerate(texts) if not text and (again < ROUNDS or groups[i] not in have)]
        if not wanted:
            break
        for i, text in zip(wanted, sample(wanted, again), strict=True):
            texts[i] = text
    return texts


def _firsts(prompts: Sequence[tuple]) -> list[int]:
    """Where each different prompt stands first, in order."""
    first: dict[tuple, int] = {}
    for i, prompt in enumerate(prompts):
        first.setdefault(prompt, i)
    return list(first.values())


def _width(n: int) -> int:
    """Tokens that a dialogue is padded to: powers of two where padding is cheap, finer steps beyond."""
    return max(32, 1 << max(n - 1, 0).bit_length()) if n <= 256 else bucket(n)


def _chunks(rows: Sequence[Any], most: int) -> Iterator[tuple[list[Any], int]]:
    """Rows in parts, and the number of rows that each is padded to: 1, 4, 16, ..., at most ``most``, at least half of
    them real."""
    rest = list(rows)
    while rest:
        size = 1
        while size * 4 <= most and size * 2 <= len(rest):
            size *= 4
        yield rest[:size], size
        rest = rest[size:]


def _filled(values: Sequence[int], size: int) -> np.ndarray:
    """int64 [size], the first value repeated behind them."""
    return np.array([*values, *[values[0]] * (size - len(values))], np.int64)


def _block(rows: Sequence[Sequence[int]], size: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 [size, width] of ids, padded with 0, and int32 [size], how many each row holds; the first row is repeated
    behind them."""
    tokens, lengths = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
    for i, row in enumerate([*rows, *[rows[0]] * (size - len(rows))]):
        tokens[i, : len(row)], lengths[i] = row, len(row)
    return tokens, lengths
