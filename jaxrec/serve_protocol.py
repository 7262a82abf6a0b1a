"""The OpenAI protocol: what a request may say, and how answers are written down.

Chat completions and completions, of the published API reference. What is not offered here (tools, penalties, images)
is refused by name, never ignored, unless it says what is the case anyway ("presence_penalty": 0).
"""

import dataclasses
import math
import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from jaxrec.chat import ROLES, chat_ids
from jaxrec.config import nearest
from jaxrec.serve_engine import TOP, Engine, Job, Part, Token

_SEED = 2**63


class Refused(Exception):
    """A request that is not served. status: of HTTP. param: the field it is about. code: for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def _wrong(field: str, value: Any, wanted: str) -> Refused:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return Refused(400, f"'{field}' must be {wanted}, not {shown}", field, "invalid_value")


def _number(low: float, high: float, above: bool = False) -> Callable[[str, Any], float]:
    def check(field: str, value: Any) -> float:
        right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not right or not (low < value if above else low <= value) or value > high:
            raise _wrong(field, value, f"a number {'above' if above else 'from'} {low:g} to {high:g}")
        return float(value)

    return check


def _integer(low: int, high: int | None = None) -> Callable[[str, Any], int]:
    def check(field: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
            raise _wrong(field, value, f"a whole number from {low}" + ("" if high is None else f" to {high}"))
        return value

    return check


def _flag(field: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(field, value, "true or false")
    return value


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(field, value, "a text")
    return _encodable(field, value)


def _encodable(field: str, value: str) -> str:
    """JSON can spell half of a surrogate pair, which no text holds."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Refused(400, f"'{field}' holds half of a surrogate pair", field, "invalid_value") from error
    return value


def _only(*values: Any) -> Callable[[str, Any], None]:
    def check(field: str, value: Any) -> None:
        if value not in values or isinstance(value, bool) != isinstance(values[0], bool):
            raise Refused(400, f"'{field}' is not offered here; leave it out", field, "unsupported_parameter")

    return check


def _stops(field: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > 16 or not all(isinstance(t, str) and t for t in texts):
        raise _wrong(field, value, "a text, or a list of at most 16 texts, none of them empty")
    return tuple(_encodable(field, text) for text in texts)


def _stream_options(field: str, value: Any) -> bool:
    """Whether usage is to follow the stream."""
    if not isinstance(value, dict) or not set(value) <= {"include_usage"}:
        raise _wrong(field, value, 'an object with "include_usage"')
    return _flag(f"{field}.include_usage", value.get("include_usage", False))


def _messages(field: str, value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise _wrong(field, value, "a list of messages")
    out = []
    for i, message in enumerate(value):
        where = f"{field}[{i}]"
        if not isinstance(message, dict) or set(message) - {"role", "content", "name"}:
            raise _wrong(where, message, 'an object with "role" and "content"')
        if message.get("role") not in ROLES:
            raise _wrong(f"{where}.role", message.get("role"), f"one of {', '.join(ROLES)}")
        out.append({"role": message["role"], "content": _content(f"{where}.content", message.get("content"))})
    return out


def _content(field: str, value: Any) -> str:
    """A text, or the API's list of parts, of which only texts are read."""
    if isinstance(value, list) and value:
        parts = []
        for i, part in enumerate(value):
            if not isinstance(part, dict) or part.get("type") != "text" or set(part) != {"type", "text"}:
                raise _wrong(f"{field}[{i}]", part, 'an object with "type": "text" and "text"; nothing else is read')
            parts.append(_text(f"{field}[{i}].text", part["text"]))
        return "".join(parts)
    return _text(field, value)


def _prompts(field: str, value: Any) -> list[str | list[int]]:
    """A text, a list of them, token ids, or lists of those."""

    def ids(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)

    many = [value] if isinstance(value, str) or ids(value) else value
    if not isinstance(many, list) or not many or not all(isinstance(p, str) or ids(p) for p in many):
        raise _wrong(field, value, "a text, a list of texts, token ids, or lists of token ids")
    return [_encodable(field, prompt) if isinstance(prompt, str) else prompt for prompt in many]


_COMMON: dict[str, Callable[[str, Any], Any]] = {
    "model": _text, "temperature": _number(0, 2), "top_p": _number(0, 1, above=True), "top_k": _integer(-1),
    "n": _integer(1), "seed": _integer(-_SEED, _SEED - 1), "max_tokens": _integer(1), "stop": _stops,
    "stream": _flag, "stream_options": _stream_options, "user": _text, "presence_penalty": _only(0),
    "frequency_penalty": _only(0), "logit_bias": _only({}),
}  # fmt: skip
_CHAT = {
    **_COMMON, "messages": _messages, "max_completion_tokens": _integer(1), "logprobs": _flag,
    "top_logprobs": _integer(0, TOP), "response_format": _only({"type": "text"}), "tools": _only([]),
    "store": _only(False),
}  # fmt: skip
_COMPLETION = {
    **_COMMON, "prompt": _prompts, "logprobs": _integer(0, TOP), "echo": _only(False), "best_of": _integer(1),
    "suffix": _only(""),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request, read. One job per prompt; answer ``choice`` of job ``j`` is number ``j * n + choice``."""

    chat: bool
    model: str
    jobs: tuple[Job, ...]
    stream: bool
    usage_after: bool
    id: str
    created: int


def read(body: Any, chat: bool, engine: Engine, name: str) -> Asked:
    """A request's JSON, checked. Raises :class:`Refused` naming the field."""
    table = _CHAT if chat else _COMPLETION
    if not isinstance(body, dict):
        raise Refused(400, "the request must be a JSON object")
    for field in body:
        if field not in table:
            raise Refused(400, f"no field '{field}'{nearest(field, table)}", field, "unknown_parameter")
    fields = {field: table[field](field, value) for field, value in body.items() if value is not None}
    for field in ("model", "messages" if chat else "prompt"):
        if field not in fields:
            raise Refused(400, f"'{field}' is missing", field, "missing_required_parameter")
    if fields["model"] != name:
        what = f"no model '{fields['model']}' is served here; this one is: '{name}'"
        raise Refused(404, what, "model", "model_not_found")
    if fields.get("best_of", fields.get("n", 1)) != fields.get("n", 1):
        raise Refused(400, "'best_of' is offered only equal to 'n'", "best_of", "unsupported_parameter")
    if "stream_options" in fields and not fields.get("stream"):
        raise Refused(400, "'stream_options' is only for streams", "stream_options", "invalid_value")
    prompts = [_chat_ids(fields["messages"], engine)] if chat else [_ids(p, engine) for p in fields["prompt"]]
    if len(prompts) * fields.get("n", 1) > engine.max_batch:
        raise Refused(
            400, f"{len(prompts)} prompts with n={fields.get('n', 1)} are more than the {engine.max_batch} answers "
            "made at a time; send several requests", "n", "invalid_value",
        )  # fmt: skip
    jobs = tuple(_job(fields, chat, tuple(prompt), engine) for prompt in prompts)
    return Asked(
        chat, name, jobs, fields.get("stream", False), fields.get("stream_options", False),
        ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex, int(time.time()),
    )  # fmt: skip


def _chat_ids(messages: list[dict[str, str]], engine: Engine) -> list[int]:
    try:
        return chat_ids(engine.tokenizer, messages)
    except ValueError as error:
        raise Refused(400, str(error), "messages", "invalid_value") from error


def _ids(prompt: str | list[int], engine: Engine) -> list[int]:
    return engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt


def _job(fields: dict[str, Any], chat: bool, prompt: tuple[int, ...], engine: Engine) -> Job:
    room = engine.max_len - len(prompt)
    if room < 1:
        raise Refused(
            400, f"the prompt has {len(prompt)} tokens, and the context holds {engine.max_len} with the answer: "
            "shorten it", "messages" if chat else "prompt", "context_length_exceeded",
        )  # fmt: skip
    most = fields.get("max_completion_tokens", fields.get("max_tokens", room if chat else min(16, room)))
    if most > room:
        raise Refused(
            400, f"the prompt has {len(prompt)} tokens and max_tokens is {most}, but the context holds "
            f"{engine.max_len}: lower max_tokens to {room} or shorten the prompt",
            "max_tokens", "context_length_exceeded",
        )  # fmt: skip
    logprobs = fields.get("logprobs")
    if chat:
        if "top_logprobs" in fields and not logprobs:
            raise Refused(400, "'top_logprobs' needs 'logprobs': true", "top_logprobs", "invalid_value")
        logprobs = fields.get("top_logprobs", 0) if logprobs else None
    seed = fields.get("seed")
    return Job(
        prompt, most, fields.get("n", 1), fields.get("temperature", 1.0), fields.get("top_p", 1.0),
        max(fields.get("top_k", 0), 0), secrets.randbits(63) if seed is None else seed, fields.get("stop", ()),
        logprobs,
    )  # fmt: skip


def usage(asked: Asked, made: int) -> dict[str, int]:
    """made: tokens sampled for all answers. A prompt counts once, however many answers it gets."""
    prompt = sum(len(job.prompt) for job in asked.jobs)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def _envelope(asked: Asked, kind: str) -> dict[str, Any]:
    return {"id": asked.id, "object": kind, "created": asked.created, "model": asked.model}


def _chat_logprobs(tokens: Sequence[Token], engine: Engine) -> dict[str, Any]:
    def entry(index: int, logprob: float) -> dict[str, Any]:
        return {"token": engine.pieces.name(index), "logprob": logprob, "bytes": list(engine.pieces.bytes_of(index))}

    content = [{**entry(t.id, t.logprob), "top_logprobs": [entry(*pair) for pair in t.top]} for t in tokens]
    return {"content": content, "refusal": None}


def _completion_logprobs(tokens: Sequence[Token], wanted: int, engine: Engine) -> dict[str, Any]:
    name = engine.pieces.name
    tops = [{name(index): logprob for index, logprob in (*t.top, (t.id, t.logprob))} for t in tokens]
    return {
        "tokens": [name(t.id) for t in tokens], "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": tops if wanted else None, "text_offset": [t.offset for t in tokens],
    }  # fmt: skip


def _logprobs(asked: Asked, job: int, tokens: Sequence[Token], engine: Engine) -> dict[str, Any] | None:
    wanted = asked.jobs[job].logprobs
    if wanted is None:
        return None
    return _chat_logprobs(tokens, engine) if asked.chat else _completion_logprobs(tokens, wanted, engine)


def whole(asked: Asked, parts: Sequence[tuple[int, Part]], engine: Engine) -> dict[str, Any]:
    """The answer to a request that does not stream. parts: (number of the job, part), in the order they came."""
    choices, made = [], 0
    for j, job in enumerate(asked.jobs):
        for choice in range(job.n):
            own = [part for number, part in parts if number == j and part.choice == choice]
            text = "".join(part.text for part in own)
            tokens = [token for part in own for token in part.tokens]
            message = {"role": "assistant", "content": text, "refusal": None}
            said = {"message": message} if asked.chat else {"text": text}
            choices.append({
                "index": j * job.n + choice, **said, "logprobs": _logprobs(asked, j, tokens, engine),
                "finish_reason": own[-1].finish,
            })  # fmt: skip
            made += own[-1].made
    kind = "chat.completion" if asked.chat else "text_completion"
    return {**_envelope(asked, kind), "choices": choices, "usage": usage(asked, made)}


def opening(asked: Asked) -> list[dict[str, Any]]:
    """Chunks before the first token: a chat says who speaks."""
    if not asked.chat:
        return []
    numbers = range(sum(job.n for job in asked.jobs))
    return [_chunk(asked, i, {"delta": {"role": "assistant", "content": ""}}, None, None) for i in numbers]


def chunk(asked: Asked, job: int, part: Part, engine: Engine) -> dict[str, Any]:
    """A part as a chunk of a stream."""
    logprobs = _logprobs(asked, job, part.tokens, engine)
    said = {"delta": {"content": part.text} if part.text else {}} if asked.chat else {"text": part.text}
    return _chunk(asked, job * asked.jobs[job].n + part.choice, said, logprobs, part.finish)


def closing(asked: Asked, made: int) -> list[dict[str, Any]]:
    """Chunks behind the last token: the usage, where it was asked for."""
    if not asked.usage_after:
        return []
    return [{**_envelope(asked, _kind(asked)), "choices": [], "usage": usage(asked, made)}]


def _kind(asked: Asked) -> str:
    return "chat.completion.chunk" if asked.chat else "text_completion"


def _chunk(asked: Asked, index: int, said: dict, logprobs, finish: str | None) -> dict[str, Any]:
    choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}
    after = {"usage": None} if asked.usage_after else {}
    return {**_envelope(asked, _kind(asked)), "choices": [choice], **after}
