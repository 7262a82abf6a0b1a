"""A teacher behind an OpenAI-compatible endpoint: hosted models, vLLM, or our own `jaxrec serve`."""

import dataclasses
import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from jaxrec.progress import progress
from jaxrec.tools.remote import read_key, retry_after
from jaxrec.tools.teacher.base import Answer, Done, Failure, Reply, Request, TokenLogprob, Usage, request_hash

_LARGEST = 64_000_000  # bytes of an answer
_KINDS = {401: "auth", 403: "auth", 429: "rate_limit"}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Patience with an endpoint. concurrency: requests at a time. timeout: seconds for one try, from sending to the
    last byte; connect: to be connected. tries: of a request, where it failed for a reason that may pass (no connection,
    no answer in time, 408, 409, 429, 5xx, an answer that is cut off or no JSON). first_wait: seconds before the second
    try, doubled each time and spread by half, up to longest_wait; a Retry-After header counts instead, up to
    longest_wait too. give_up_after: failures of that kind in a row, every try of theirs, after which the rest are not
    asked: the endpoint is down, and whoever stores replies goes on from there later.
    """

    concurrency: int = 8
    timeout: float = 300.0
    connect: float = 10.0
    tries: int = 5
    first_wait: float = 1.0
    longest_wait: float = 60.0
    give_up_after: int = 16

    def __post_init__(self):
        for name in ("concurrency", "tries", "give_up_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("timeout", "connect"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0 seconds, not {getattr(self, name)}")
        if not 0 <= self.first_wait <= self.longest_wait:
            raise ValueError(f"first_wait={self.first_wait} must lie between 0 and longest_wait={self.longest_wait}")


class _Passing(Exception):
    """A failure that may pass. wait: what the endpoint asked for, in seconds."""

    def __init__(self, kind: str, message: str, wait: float | None = None):
        super().__init__(message)
        self.kind, self.wait = kind, wait


class _Lasting(Exception):
    """A failure that another try would repeat."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class EndpointTeacher:
    """Asks POST {base_url}/chat/completions.

    key_env: the environment variable that holds the key, or None for an endpoint without one; the key is never shown or
    written. extra: more fields of the request ("chat_template_kwargs", ...), part of the teacher's id. With n > 1 the
    endpoint is asked for n choices. Raises ValueError for an address that is none and where the variable is not set.
    """

    def __init__(
        self, base_url: str, model: str, *, key_env: str | None = "OPENAI_API_KEY", limits: Limits | None = None,
        extra: Mapping[str, Any] | None = None, sleep: Callable[[float], None] = time.sleep,
    ):  # fmt: skip
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
            raise ValueError(
                "the base_url of a teacher must have the form https://host[:port]/v1, without a name or password: the "
                "key comes from the environment"
            )
        key = None if key_env is None else read_key(key_env, parts.hostname)
        self.base_url, self.model = base_url.rstrip("/"), model
        self.limits, self._extra, self._key, self._sleep = limits or Limits(), dict(extra or {}), key, sleep
        self.id = f"{self.model} at {self.base_url}"
        if self._extra:
            self.id += f" with {json.dumps(self._extra, sort_keys=True)}"
        self._failed_in_a_row, self._lock = 0, threading.Lock()

    def __repr__(self) -> str:
        return f"EndpointTeacher({self.id!r})"

    def ask(self, requests: Sequence[Request], done: Done | None = None) -> list[Answer]:
        """An answer per request, in order; ``done`` hears of each when it is there."""
        import httpx

        limits = self.limits
        self._failed_in_a_row = 0
        out: list[Answer] = [Failure("not_asked", "interrupted", 0)] * len(requests)
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        pool = httpx.Limits(max_connections=limits.concurrency, max_keepalive_connections=limits.concurrency)
        times = httpx.Timeout(limits.timeout, connect=limits.connect, pool=None)
        secure = self.base_url.startswith("https:")  # else no certificates need to be read
        with (
            httpx.Client(headers=headers, limits=pool, timeout=times, verify=secure) as client,
            progress(len(requests), f"asking {self.model}") as step,
        ):

            def one(number: int) -> None:
                out[number] = self._one(client, requests[number])
                if done is not None:
                    done(number, out[number])
                step()

            workers = ThreadPoolExecutor(limits.concurrency, thread_name_prefix="teacher")
            try:
                for future in [workers.submit(one, number) for number in range(len(requests))]:
                    future.result()
            finally:  # after an error or Ctrl+C nothing more begins, and closing the client ends what has begun
                workers.shutdown(wait=False, cancel_futures=True)
        return out

    def _one(self, client, request: Request) -> Answer:
        for attempt in range(1, self.limits.tries + 1):
            if self._failed_in_a_row >= self.limits.give_up_after:
                why = f"{self._failed_in_a_row} requests in a row had failed"
                return Failure("not_asked", why, attempt - 1)
            try:
                reply = self._try(client, request)
                self._failed_in_a_row = 0
                return reply
            except _Lasting as error:
                return Failure(error.kind, self._hide(str(error)), attempt)
            except _Passing as error:
                last = error
            if attempt < self.limits.tries:
                self._sleep(self._wait(request, attempt, last.wait))
        with self._lock:
            self._failed_in_a_row += 1
        return Failure(last.kind, self._hide(str(last)), self.limits.tries)

    def _wait(self, request: Request, attempt: int, asked: float | None) -> float:
        if asked is not None:
            return min(asked, self.limits.longest_wait)
        # Requests that failed together must not come back together. The spread is a request's own, so that a run can be
        # repeated.
        digest = hashlib.sha256(f"{request_hash(request, self.id)} {attempt}".encode()).digest()
        spread = 0.5 + int.from_bytes(digest[:4], "big") / 2**32
        return min(self.limits.first_wait * 2 ** (attempt - 1) * spread, self.limits.longest_wait)

    def _hide(self, text: str) -> str:
        """Without the key, which some endpoints repeat in their errors."""
        return text.replace(self._key, "***") if self._key else text

    def _try(self, client, request: Request) -> Reply:
        import httpx

        deadline = time.monotonic() + self.limits.timeout
        try:
            with client.stream("POST", f"{self.base_url}/chat/completions", json=self._body(request)) as response:
                body = bytearray()
                for piece in response.iter_bytes():
                    body += piece
                    if time.monotonic() > deadline:  # httpx's limit is for each read
                        raise _Passing("timeout", f"no complete answer within {self.limits.timeout:g} s")
                    if len(body) > _LARGEST:
                        raise _Lasting("malformed", f"the answer is larger than {_LARGEST} bytes")
        except httpx.TimeoutException as error:
            raise _Passing("timeout", f"{type(error).__name__}: no answer in time") from error
        except httpx.DecodingError as error:
            raise _Passing("malformed", f"the answer's encoding is broken: {error}") from error
        except httpx.TransportError as error:
            raise _Passing("connection", f"{type(error).__name__}: {error}") from error
        self._check_status(response, bytes(body))
        return _reply(bytes(body), request)

    def _check_status(self, response, body: bytes) -> None:
        status = response.status_code
        if status == 200:
            return
        message = f"status {status}: {_error_text(body)}"
        if status >= 500 or status in (408, 409, 429):
            kind = "timeout" if status == 408 else _KINDS.get(status, "server")
            raise _Passing(kind, message, retry_after(response.headers.get("retry-after")))
        raise _Lasting(_KINDS.get(status, "refused"), message)

    def _body(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        body = {
            "model": self.model,
            "messages": [{"role": message.role, "content": message.content} for message in request.messages],
            "temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_tokens,
        }  # fmt: skip
        more = {
            "top_k": sampling.top_k or None, "seed": sampling.seed, "stop": list(sampling.stop) or None,
            "n": request.n if request.n > 1 else None, "logprobs": None if sampling.logprobs is None else True,
            "top_logprobs": sampling.logprobs,
        }  # fmt: skip
        return body | {name: value for name, value in more.items() if value is not None} | self._extra


def _error_text(body: bytes) -> str:
    """The endpoint's own words, in one line."""
    text = body[:2000].decode(errors="replace")
    try:
        error = json.loads(body)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return " ".join(str(text).split())[:300] or "no explanation"


def _reply(body: bytes, request: Request) -> Reply:
    """The reply in an answer of status 200; whatever is missing makes it malformed, nothing is made up."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:  # what a connection that broke leaves is no JSON either
        raise _Passing("malformed", f"the answer is not JSON: {error}") from error
    try:
        choices = sorted(fields["choices"], key=lambda choice: choice["index"])
        texts = tuple(choice["message"]["content"] for choice in choices)
        finish = tuple(str(choice["finish_reason"]) for choice in choices)
        logprobs = None
        if request.sampling.logprobs is not None and choices and choices[0].get("logprobs"):
            logprobs = tuple(_logprobs(choice["logprobs"]["content"]) for choice in choices)
        usage = fields.get("usage") or {}
        usage = Usage(int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise _Lasting("malformed", f"the answer is no chat completion: {type(error).__name__} {error}") from error
    if len(texts) != request.n:
        raise _Lasting("malformed", f"{len(texts)} choices came, {request.n} were asked for")
    if not all(isinstance(text, str) for text in texts):
        raise _Lasting("malformed", "a choice holds no text")
    return Reply(texts, finish, usage, logprobs)


def _logprobs(content: list) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            str(entry["token"]), float(entry["logprob"]),
            tuple((str(top["token"]), float(top["logprob"])) for top in entry.get("top_logprobs") or ()),
        )
        for entry in content
    )  # fmt: skip
