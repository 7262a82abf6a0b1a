"""What a bigger model is asked and what it answers, whoever it is.

A teacher writes rollouts, judges answers, sums pages up, rewrites, annotates, or plays the other side of a
conversation. Every part is one request: a role, messages, sampling; the role says which prompt and which check belong
to it, and is counted apart. A teacher answers a batch, each request with a reply or with a failure that says what kind
it is; a failure is never a reply with an empty text.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from jaxrec.chat import ROLES as SPEAKERS

# author: trajectories, programs, problems (arXiv 2505.16834, 2504.20426). judge: agreement with an answer, fast and
# slow steps (2505.16834, 2505.16315). summariser: of web pages. rewriter: of trajectories from memory (2505.17005).
# annotator: domains and key points, feedback of a user. recommender: who a simulated user talks to.
ROLES = ("author", "judge", "summariser", "rewriter", "annotator", "recommender")

# timeout, connection: nothing came back (in time). rate_limit: 429 to the end. server: 5xx to the end. auth: 401, 403.
# refused: another 4xx. malformed: an answer outside the protocol. invalid: a reply that does not fit what was asked for
# (jaxrec.tools.teacher.schema). not_asked: given up before its turn, since too many before it failed.
FAILURES = (
    "timeout", "connection", "rate_limit", "server", "auth", "refused", "malformed", "invalid", "not_asked",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How replies are drawn. temperature 0 is greedy; top_k 0 is all; seed None leaves it to the teacher. logprobs:
    None, or how many likeliest tokens to give beside each token."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 1024
    seed: int | None = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self):
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop must hold texts that are not empty, not {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))
        for name in ("temperature", "top_p"):  # 0 and 0.0 are one request
            object.__setattr__(self, name, float(getattr(self, name)))
        if not self.temperature >= 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.max_tokens < 1:
            raise ValueError(f"temperature >= 0, 0 < top_p <= 1, top_k >= 0 and max_tokens >= 1 are wanted, got {self}")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise ValueError(f"logprobs must lie between 0 and 20, not {self.logprobs}")


@dataclasses.dataclass(frozen=True)
class Message:
    """role: who speaks ("system", "user", "assistant", ...)."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class Request:
    """One question to a teacher, of which ``n`` replies are wanted. Raises ValueError for an unknown role, a message
    that is no text, and numbers out of range."""

    role: str
    messages: tuple[Message, ...]
    sampling: Sampling = Sampling()
    n: int = 1

    def __post_init__(self):
        object.__setattr__(self, "messages", tuple(self.messages))
        if self.role not in ROLES:
            raise ValueError(f"no role {self.role!r} of a teacher; roles: {', '.join(ROLES)}")
        if not self.messages or self.n < 1:
            raise ValueError(f"a request needs messages and n of at least 1, got {len(self.messages)} and n={self.n}")
        for i, message in enumerate(self.messages):
            if not isinstance(message.content, str) or message.role not in SPEAKERS:
                raise ValueError(
                    f"messages[{i}] must hold a text by one of {', '.join(SPEAKERS)}, not {message.role!r} and "
                    f"{type(message.content).__name__}"
                )
            try:
                message.content.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"messages[{i}] holds half of a surrogate pair at {error.start}") from error

    def replace(self, **changes) -> "Request":
        """A copy with other fields; those of the sampling too."""
        own = {field.name for field in dataclasses.fields(Sampling)}
        sampling = {name: value for name, value in changes.items() if name in own}
        rest = {name: value for name, value in changes.items() if name not in own}
        return dataclasses.replace(self, sampling=dataclasses.replace(self.sampling, **sampling), **rest)


def ask_text(role: str, text: str, system: str = "", sampling: Sampling | None = None, n: int = 1) -> Request:
    """The common request: one text by the user, perhaps behind a system message."""
    before = (Message("system", system),) if system else ()
    return Request(role, (*before, Message("user", text)), sampling or Sampling(), n)


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A token of a reply; top: (token, logprob) of the likeliest."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens of the prompt and of all replies; of a teacher that does not say, 0."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Reply:
    """texts, one per reply; finish: why each ended ("stop", "length", ...). logprobs: of each reply's tokens, where
    they were asked for and given."""

    texts: tuple[str, ...]
    finish: tuple[str, ...]
    usage: Usage = Usage()
    logprobs: tuple[tuple[TokenLogprob, ...], ...] | None = None

    @property
    def text(self) -> str:
        """The first reply."""
        return self.texts[0]


@dataclasses.dataclass(frozen=True)
class Failure:
    """No reply. kind: one of :data:`FAILURES`. attempts: how often it was tried."""

    kind: str
    message: str
    attempts: int = 1

    def __post_init__(self):
        if self.kind not in FAILURES:
            raise ValueError(f"no kind of failure {self.kind!r}; kinds: {', '.join(FAILURES)}")


Answer = Reply | Failure
Done = Callable[[int, Answer], None]  # called as each request (by its number) is answered, from any thread


class Teacher(Protocol):
    """id: names the model and how it is reached; replies of teachers with one id are taken for each other's."""

    id: str

    def ask(self, requests: Sequence[Request], done: Done | None = None) -> list[Answer]:
        """An answer per request, in their order."""


def request_json(request: Request) -> dict[str, Any]:
    """The request as JSON, every field named."""
    return dataclasses.asdict(request)


def request_hash(request: Request, teacher: str) -> str:
    """sha256 (hexadecimal) of role, messages, sampling, number of replies and the teacher's id."""
    fields = {"teacher": teacher, **request_json(request)}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def reply_json(reply: Reply) -> dict[str, Any]:
    """The reply as JSON; :func:`reply_of` reads it back."""
    return dataclasses.asdict(reply)


def reply_of(fields: Mapping[str, Any]) -> Reply:
    """A reply from its JSON. Raises ValueError (KeyError, TypeError) for anything else."""
    texts, finish = tuple(fields["texts"]), tuple(fields["finish"])
    if not texts or len(texts) != len(finish) or not all(isinstance(t, str) for t in (*texts, *finish)):
        raise ValueError("a reply holds as many reasons for its end as texts")
    logprobs = fields.get("logprobs")
    if logprobs is not None:
        logprobs = tuple(tuple(_token_of(token) for token in text) for text in logprobs)
    return Reply(texts, finish, Usage(**fields["usage"]), logprobs)


def _token_of(fields: Mapping[str, Any]) -> TokenLogprob:
    return TokenLogprob(fields["token"], fields["logprob"], tuple((token, logprob) for token, logprob in fields["top"]))
