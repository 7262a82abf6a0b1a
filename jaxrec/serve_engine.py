"""Many callers, one model: a thread that keeps the rows of a batch filled with whatever is asked for.

Requests wait in a queue. Between slices of a few tokens the worker lets go of rows that are finished or no longer
wanted, runs the prompts of waiting requests into free rows, and goes on: nobody waits for another's answer to end. Rows
are 1, 4, 16, 64, ... on each of the devices that share them, slots of the cache powers of two, prompts are padded to a
few lengths and run 1, 4, 16, ... at a time, and settings are arrays, so that a handful of programs is compiled, never
one per request. A very long prompt holds the others up while it is run.
"""

import collections
import dataclasses
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jaxrec.serve_text import Pieces, Stream
from models.hf import Model
from models.layout import decode_weights
from models.sample import Session, bucket, prefill
from models.sharding import RULES, to_host, use_mesh
from models.slots import Rows, admit, advance, resize

TOP = 20  # likeliest tokens at most
_COUNTS = ("requests", "prompt_tokens", "tokens", "slices", "largest_batch", "failures", "abandoned")  # since the start
_PREFILL = 16384  # tokens of one prefill, padding included, on each device that shares the rows
_SHRINK_AFTER = 16  # slices that half of the rows or slots would have done
_SMALLEST = 128  # slots


class Busy(RuntimeError):
    """Too many requests wait."""


class Closed(RuntimeError):
    """The engine has been stopped."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What is asked for. prompt: token ids. n: answers, which differ by their random numbers. temperature 0 is greedy.
    logprobs: None, or how many likeliest tokens to give beside each token (0 to :data:`TOP`)."""

    prompt: tuple[int, ...]
    max_tokens: int
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of an answer. logprob: under the model itself (temperature 1). offset: its first character's place in the
    answer. top: (id, logprob) of the likeliest, best first."""

    id: int
    logprob: float
    offset: int
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """More of answer ``choice``. tokens: those that begin in ``text``, where logprobs were asked for. finish: "stop",
    "length", or None where more follows. made: tokens sampled so far, end tokens and those of stop strings included."""

    choice: int
    text: str
    tokens: tuple[Token, ...]
    finish: str | None
    made: int


Deliver = Callable[[Part | Exception], None]


class Ticket:
    """A request on its way. ``cancel`` frees its rows before the next slice."""

    def __init__(self, job: Job, deliver: Deliver):
        self.job, self._deliver = job, deliver
        self.cancelled = False

    def cancel(self) -> None:
        """Nothing more is wanted."""
        self.cancelled = True

    def give(self, item: Part | Exception) -> None:
        """Hand over; a receiver that fails is gone."""
        if not self.cancelled:
            try:
                self._deliver(item)
            except Exception:
                self.cancelled = True
            self.cancelled |= isinstance(item, Exception)


@dataclasses.dataclass(eq=False)
class _Row:
    """An answer being made. length: tokens in the cache."""

    ticket: Ticket
    choice: int
    stream: Stream
    length: int
    made: int = 0
    facts: dict[int, tuple] = dataclasses.field(default_factory=dict)  # of tokens that are not given yet

    @property
    def left(self) -> int:
        return self.ticket.job.max_tokens - self.made


def _power(n: int, smallest: int) -> int:
    return max(smallest, 1 << max(n - 1, 0).bit_length())


def _rows_for(n: int, shards: int) -> int:
    """How many rows hold ``n``: 1, 4, 16, ... on each of the ``shards`` devices that share them."""
    rows = shards
    while rows < n:
        rows *= 4
    return rows


def _width_for(n: int) -> int:
    """Tokens that a prompt is padded to: powers of two where padding is cheap, finer steps beyond."""
    return _power(n, 32) if n <= 256 else bucket(n)


class Engine:
    """Serves one model with a tokenizer. Use as a context manager, or ``start`` and ``stop``.

    max_batch: answers made at a time. max_len: tokens of a prompt and its answer, at most (None: the model's context).
    slice_tokens: tokens between two looks at the queue. max_waiting: requests in the queue. mesh: where the model's
    weights lie; answers are split over its ``data``, ``fsdp`` and ``expert`` axes. int8: matrices in eight bits, see
    ``models.decode_weights``. Raises ValueError for a model without tokenizer and for numbers that make no sense.
    """

    def __init__(
        self, model: Model, *, max_batch: int = 16, max_len: int | None = None, slice_tokens: int = 8,
        max_waiting: int = 256, mesh: jax.sharding.Mesh | None = None, int8: bool = False,
    ):  # fmt: skip
        if model.tokenizer is None:
            raise ValueError("the model folder has no tokenizer files, so that text cannot be turned into tokens")
        for name, value in (("max_batch", max_batch), ("slice_tokens", slice_tokens), ("max_waiting", max_waiting)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.max_len = model.config.max_len if max_len is None else max_len
        if not 2 <= self.max_len <= model.config.max_len:
            raise ValueError(f"max_len={max_len} must lie between 2 and the model's context of {model.config.max_len}")
        self.config, self.tokenizer, self.max_batch = model.config, model.tokenizer, max_batch
        self.pieces = Pieces(model.tokenizer)
        self._mesh = mesh
        with use_mesh(mesh):
            self._weights = decode_weights(model.params, model.config, fuse=mesh is None, int8=int8)
        self._shards = 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in RULES["batch"])
        self._most_rows = -(-max_batch // self._shards) * self._shards
        self._slice, self._max_waiting = slice_tokens, max_waiting
        self._session: Session | None = None
        self._rows: list[_Row | None] = []
        self._roomy = 0  # slices that fewer rows or slots would have done
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._change = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None
        self.counts: collections.Counter[str] = collections.Counter(dict.fromkeys(_COUNTS, 0))

    def __enter__(self) -> "Engine":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to serve, or begin again; what was submitted before is served too."""
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="jaxrec-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends after the present slice; whoever still waits gets :class:`Closed`."""
        with self._change:
            self._closing = True
            self._change.notify()
        if self._thread is not None:
            self._thread.join()

    def submit(self, job: Job, deliver: Deliver) -> Ticket:
        """Put a request into the queue. ``deliver`` is called by the worker, for every part or an exception.

        Raises ValueError for a job that can never be served, :class:`Busy` and :class:`Closed`.
        """
        self._check(job)
        ticket = Ticket(job, deliver)
        with self._change:
            if self._closing:
                raise Closed("the server is shutting down")
            if len(self._waiting) >= self._max_waiting:
                raise Busy(f"{len(self._waiting)} requests are waiting; try again later")
            self._waiting.append(ticket)
            self._change.notify()
        return ticket

    def _check(self, job: Job) -> None:
        if not job.prompt:
            raise ValueError("the prompt holds no token; give it some text")
        wrong = next((i for i in job.prompt if not 0 <= i < self.config.vocab_size), None)
        if wrong is not None:
            raise ValueError(f"token id {wrong} lies outside the vocabulary of {self.config.vocab_size}")
        if job.max_tokens < 1 or len(job.prompt) + job.max_tokens > self.max_len:
            raise ValueError(
                f"the prompt has {len(job.prompt)} tokens and {job.max_tokens} may follow, but the context holds "
                f"{self.max_len}: shorten the prompt or lower max_tokens"
            )
        if not 1 <= job.n <= self.max_batch:
            raise ValueError(f"n={job.n} answers were asked for; 1 to {self.max_batch} are made at a time")
        if job.logprobs is not None and not 0 <= job.logprobs <= TOP:
            raise ValueError(f"logprobs={job.logprobs} likeliest tokens; 0 to {TOP} are given")

    def state(self) -> dict[str, int]:
        """Rows in use, requests waiting, and counts since the start."""
        active = sum(row is not None for row in self._rows)
        return {"active": active, "waiting": len(self._waiting), **self.counts}

    def _loop(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closing or self._waiting or self._rows)
                if self._closing:
                    break
            try:
                with use_mesh(self._mesh):
                    self._let_go()
                    self._admit()
                    self._advance()
            except Exception as error:
                # Whatever it was, the cache is not to be trusted: everyone in it is told, the queue goes on.
                self.counts["failures"] += 1
                self._fail(error, {row.ticket for row in self._rows if row})
                self._rows, self._session = [], None
        tickets = {row.ticket for row in self._rows if row} | set(self._waiting)
        self._waiting.clear()
        self._rows, self._session = [], None
        self._fail(Closed("the server is shutting down"), tickets)

    def _fail(self, error: Exception, tickets: Iterable[Ticket]) -> None:
        for ticket in tickets:
            ticket.give(error)

    def _let_go(self) -> None:
        """Free the rows of whoever has gone; without any row left the cache goes too."""
        for i, row in enumerate(self._rows):
            if row is not None and row.ticket.cancelled:
                self._rows[i] = None
                self.counts["abandoned"] += 1
        if not any(self._rows):
            self._rows, self._session, self._roomy = [], None, 0

    def _admit(self) -> None:
        """Run the prompts of waiting requests, in their order, as far as there are rows."""
        room = self.max_batch - sum(row is not None for row in self._rows)
        chosen: list[Ticket] = []
        while self._waiting:
            ticket = self._waiting[0]
            if not ticket.cancelled and ticket.job.n > room:
                break
            self._waiting.popleft()
            if not ticket.cancelled:
                chosen.append(ticket)
                room -= ticket.job.n
        for group in _groups(chosen, self._shards):
            try:
                self._prefill(group)
            except Exception as error:
                self._fail(error, chosen)  # some are in no row, where the loop would find them
                raise

    def _prefill(self, group: list[Ticket]) -> None:
        width = min(_width_for(max(len(ticket.job.prompt) for ticket in group)), bucket(self.max_len))
        tokens = np.full((len(group), width), self.config.pad_id, np.int32)
        lengths = np.zeros(len(tokens), np.int32)
        for i, ticket in enumerate(group):
            lengths[i] = len(ticket.job.prompt)
            tokens[i, : lengths[i]] = ticket.job.prompt
        new = prefill(self._weights, self.config, tokens, lengths, self._slots_for(width))
        answers = [(i, choice) for i, ticket in enumerate(group) for choice in range(ticket.job.n)]
        self._fit(len(answers), int(lengths.max()), new)
        free = [i for i, row in enumerate(self._rows) if row is None]
        source = np.zeros(len(self._rows), np.int32)
        target = np.full(len(self._rows), len(self._rows), np.int32)
        for at, ((i, choice), place) in enumerate(zip(answers, free)):
            source[at], target[at] = i, place
            ticket = group[i]
            self._rows[place] = _Row(ticket, choice, Stream(self.pieces, ticket.job.stop), int(lengths[i]))
        self._session = admit(self._session, new, source, target)
        self.counts["requests"] += len(group)
        self.counts["prompt_tokens"] += int(sum(len(ticket.job.prompt) for ticket in group))

    def _slots_for(self, tokens: int) -> int:
        return min(_power(tokens, _SMALLEST), bucket(self.max_len))

    def _fit(self, more: int, longest: int, new: Session | None = None) -> None:
        """Make room for ``more`` rows, and in every row for the next slice; give room back that long was too much."""
        kept = [i for i, row in enumerate(self._rows) if row is not None]
        reach = max([longest, *(self._rows[i].length for i in kept)]) + self._slice
        rows = min(_rows_for(len(kept) + more, self._shards), self._most_rows)
        slots = self._slots_for(reach)
        session = new if self._session is None else self._session
        have = (0, 0) if self._session is None else (len(self._rows), session.size)
        grows = rows > have[0] or slots > have[1]
        if not more:
            self._roomy = 0 if grows or (rows, slots) == have else self._roomy + 1
        if grows:
            rows, slots = max(rows, have[0]), max(slots, have[1])
        elif self._roomy < _SHRINK_AFTER:
            return
        self._roomy = 0
        index = np.zeros(rows, np.int32)
        index[: len(kept)] = kept
        self._session = resize(session, index, slots)
        self._rows = [self._rows[i] for i in kept] + [None] * (rows - len(kept))

    def _advance(self) -> None:
        """A slice of tokens for every row."""
        if not any(self._rows):
            return
        self._fit(0, 0)
        asked = [row.ticket.job.logprobs for row in self._rows if row]
        top = min(TOP, self.config.vocab_size) if any(asked) else 0
        lengths = np.array([row.length if row else 0 for row in self._rows], np.int64)
        out, self._session = advance(
            self._weights, self.config, self._session, self._settings(), lengths, self._slice, top=top
        )
        out = to_host(out)
        if not np.isfinite(out.logprobs).all():
            raise FloatingPointError("the model's log-probabilities are not finite")
        self.counts["slices"] += 1
        self.counts["tokens"] += int(out.counts.sum())
        self.counts["largest_batch"] = max(self.counts["largest_batch"], len(asked))
        for i, row in enumerate(self._rows):
            if row is not None and self._read(row, out, i):
                self._rows[i] = None

    def _settings(self) -> Rows:
        def column(dtype, free, value: Callable[[_Row], Any]) -> np.ndarray:
            return np.array([free if row is None else value(row) for row in self._rows], dtype)

        seeds = column(np.uint64, 0, lambda row: row.ticket.job.seed % 2**64)
        return Rows(
            limits=column(np.int32, 0, lambda row: min(row.left, self._slice)),
            seeds=np.stack([seeds & 0xFFFFFFFF, seeds >> 32], axis=1).astype(np.uint32),
            choices=column(np.int32, 0, lambda row: row.choice),
            drawn=column(np.int32, 0, lambda row: row.made),
            temperature=column(np.float32, 0, lambda row: row.ticket.job.temperature),
            top_p=column(np.float32, 1, lambda row: row.ticket.job.top_p),
            top_k=column(np.int32, 0, lambda row: row.ticket.job.top_k),
        )

    def _read(self, row: _Row, out, i: int) -> bool:
        """Give row ``i`` what was written for it; whether that was the end."""
        job, count = row.ticket.job, int(out.counts[i])
        for m in range(count):
            if m == count - 1 and out.ended[i]:
                row.made += 1
                break
            if job.logprobs is not None:
                pairs = zip(out.top_tokens[i, m], out.top_logprobs[i, m]) if job.logprobs else ()
                top = tuple((int(t), float(p)) for t, p in itertools.islice(pairs, job.logprobs))
                row.facts[row.made] = (int(out.tokens[i, m]), float(out.logprobs[i, m]), top)
            row.made += 1
            row.stream.push(int(out.tokens[i, m]))
            if row.stream.stopped is not None:
                break
        row.length += count
        finish = "stop" if out.ended[i] or row.stream.stopped is not None else "length" if row.left == 0 else None
        text, placed = row.stream.take(last=finish is not None)
        facts = [(row.facts.pop(place.index, None), place.offset) for place in placed]
        tokens = tuple(Token(fact[0], fact[1], offset, fact[2]) for fact, offset in facts if fact is not None)
        if text or tokens or finish:
            row.ticket.give(Part(row.choice, text, tokens, finish, row.made))
        return finish is not None


def _groups(tickets: list[Ticket], shards: int) -> Iterator[list[Ticket]]:
    """Prompts of one width together: 1, 4, 16, ... of them on each of ``shards`` devices, or in all where there are
    fewer than devices; no more than ``_PREFILL`` tokens on a device unless it is one prompt."""
    by_width: dict[int, list[Ticket]] = {}
    for ticket in tickets:
        by_width.setdefault(_width_for(len(ticket.job.prompt)), []).append(ticket)
    for width, group in by_width.items():
        while group:
            size = spread = shards if shards <= len(group) else 1
            while size * 4 <= len(group) and size * 4 * width <= _PREFILL * spread:
                size *= 4
            yield group[:size]
            group = group[size:]
