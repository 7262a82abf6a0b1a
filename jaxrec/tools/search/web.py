"""Live web search: a Serper-style endpoint, then the pages it names (SimpleDeepSearcher, arXiv 2505.16834, §3).

The endpoint takes a POST of JSON and answers ``{"organic": [{"title", "link", "snippet", ...}, ...]}``. Queries of a
batch, and their pages, are fetched side by side on an event loop of their own, so the caller may have one running. A
page that cannot be read is replaced by its snippet and counted; a search that fails is a typed failure.
"""

import asyncio
import collections
import dataclasses
import functools
import hashlib
import json
import random
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlsplit

from jaxrec.tools.remote import read_key, retry_after
from jaxrec.tools.search.base import Passage, Result, answer_valid, check_request, failure
from jaxrec.tools.search.fetch import Fetcher, FetchSettings
from jaxrec.tools.search.pages import PAGE_CHARS, PageError, WebPage, page_context, plain_snippet

_ANSWER_BYTES = 4_000_000
_FETCH = FetchSettings()


@dataclasses.dataclass(frozen=True)
class WebSettings:
    """An endpoint and how it is asked.

    endpoint: its URL, without a key in it. key_env: the environment variable that holds the key ("": none is sent),
    key_header: where it goes. parameters: fields beside the query and the number of results. results: the field of
    the answer with the list; fields: our names and the endpoint's, of its entries. timeout_s: of one request. tries:
    of a request that failed with 429, 5xx, a timeout or no connection, ``backoff_s`` and twice as much between them,
    or what Retry-After says. rate: requests a second (0: no limit). deadline_s: of a batch. exclude: hosts (or URLs)
    that are never returned, for questions whose answers they publish. page_chars: of a page without a snippet.
    """

    endpoint: str
    key_env: str = "SERPER_API_KEY"
    key_header: str = "X-API-KEY"
    parameters: tuple[tuple[str, str], ...] = (("mkt", "en-US"), ("setLang", "en"))
    results: str = "organic"
    fields: tuple[tuple[str, str], ...] = (
        ("title", "title"), ("url", "link"), ("snippet", "snippet"), ("date", "date"), ("site_name", "site"),
    )  # fmt: skip
    timeout_s: float = 10.0
    tries: int = 3
    backoff_s: float = 0.5
    rate: float = 0.0
    concurrency: int = 8
    deadline_s: float = 30.0
    exclude: tuple[str, ...] = ()
    page_chars: int = PAGE_CHARS

    def __post_init__(self):
        parts = urlsplit(self.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("endpoint must be an http or https address")
        if parts.username or parts.password:
            raise ValueError("endpoint holds a user or password; give the key by key_env instead")
        if min(self.timeout_s, self.deadline_s) <= 0 or min(self.tries, self.concurrency, self.page_chars) < 1:
            raise ValueError("timeout_s, deadline_s, tries, concurrency and page_chars must be positive")
        if self.rate < 0 or self.backoff_s < 0:
            raise ValueError("rate and backoff_s must not be negative")
        for host in self.exclude:
            _host(host)


class _SearchError(Exception):
    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class WebSearch:
    """A search backend over the live web. ``counts``: requests, retries, pages read, pages failed by kind, entries
    dropped. fetch: None reads no pages and returns snippets. sleep: what waits between tries and for the rate.

    Raises ValueError where the key is missing or cannot be sent. The key stands in no repr, message or log of ours.
    """

    def __init__(
        self, settings: WebSettings, fetch: FetchSettings | None = _FETCH, *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):  # fmt: skip
        self.settings, self.fetch, self._sleep = settings, fetch, sleep
        self._key = read_key(settings.key_env, urlsplit(settings.endpoint).hostname) if settings.key_env else ""
        self._lock, self._next = threading.Lock(), 0.0
        self._robots: dict = {}
        self.counts: collections.Counter[str] = collections.Counter()
        # What results depend on; limits of time and number are not among it.
        names = ("endpoint", "parameters", "results", "fields", "exclude", "page_chars")
        key = json.dumps([*(getattr(settings, name) for name in names), fetch and (fetch.max_bytes, fetch.robots)])
        self.id = f"web:{urlsplit(settings.endpoint).hostname}:{hashlib.sha256(key.encode()).hexdigest()[:32]}"

    def __repr__(self) -> str:
        return f"WebSearch({self.settings.endpoint!r})"

    def search(self, queries: Sequence[str], k: int) -> list[Result]:
        """Up to ``k`` pages per query as passages: the id is the address, the text the page's context, the score
        1 / rank."""
        return [found if isinstance(found, Result) else _as_result(found) for found in self.pages(queries, k)]

    def pages(self, queries: Sequence[str], k: int) -> list["list[WebPage] | Result"]:
        """The same as pages, for the summariser, or a failed Result."""
        check_request(queries, k)
        return answer_valid(queries, lambda asked: _run(self._batch(asked, k)))

    def excluding(self, hosts: Sequence[str]) -> "WebSearch":
        """This search without more hosts; another id, so that results are not mixed up."""
        exclude = (*self.settings.exclude, *hosts)
        return WebSearch(dataclasses.replace(self.settings, exclude=exclude), self.fetch, sleep=self._sleep)

    async def _batch(self, queries: list[str], k: int) -> list:
        import httpx

        s = self.settings
        end = time.monotonic() + s.deadline_s
        client = functools.partial(httpx.AsyncClient, verify=_certificates(), timeout=s.timeout_s)
        # No connection is kept for a next page: two hosts at one address must not share one.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with client() as endpoint, client(trust_env=False, limits=limits) as outside:
            fetcher = Fetcher(outside, self.fetch, self._robots) if self.fetch else None
            slots = asyncio.Semaphore(s.concurrency)
            return await asyncio.gather(*(self._one(q, k, endpoint, fetcher, slots, end) for q in queries))

    async def _one(self, query: str, k: int, endpoint, fetcher: Fetcher | None, slots, end: float):
        try:
            async with asyncio.timeout(end - time.monotonic()), slots:
                entries = await self._entries(query, k, endpoint, end)
        except TimeoutError:
            return failure("timeout", f"no answer within the batch's {self.settings.deadline_s:g} s")
        except _SearchError as error:
            return failure(error.kind, self._clean(str(error)))
        if fetcher is None:
            return [dataclasses.replace(page, context=page.snippet) for page in entries]
        tasks = [asyncio.create_task(self._read(page, fetcher)) for page in entries]
        if tasks:
            await asyncio.wait(tasks, timeout=max(end - time.monotonic(), 0))
        read = [t.result() if t.done() else _failed(p, "timeout", "batch over") for t, p in zip(tasks, entries)]
        for task in tasks:
            task.cancel()
        self._count(*(f"pages {page.error.partition(':')[0]}" if page.error else "pages read" for page in read))
        return read

    async def _read(self, page: WebPage, fetcher: Fetcher) -> WebPage:
        try:
            text = await fetcher.text(page.url)
        except PageError as error:
            return _failed(page, error.kind, str(error))
        return dataclasses.replace(page, context=page_context(text, page.snippet, self.settings.page_chars))

    async def _entries(self, query: str, k: int, endpoint, end: float) -> list[WebPage]:
        """The first ``k`` usable entries of the endpoint's answer. Raises _SearchError."""
        hosts = [_host(host) for host in self.settings.exclude]
        asked = " ".join([query, *(f"-site:{host}" for host in hosts)])
        answer = await self._ask({**dict(self.settings.parameters), "q": asked, "num": k + 1}, endpoint, end)
        listed = answer.get(self.settings.results) if isinstance(answer, dict) else None
        if not isinstance(listed, list):  # not an empty list: something else answered
            raise _SearchError("unavailable", f"the answer has no list {self.settings.results!r}")
        pages: dict[str, WebPage] = {}
        for entry in listed:
            page = self._page(entry)
            if page is None or page.url in pages or _excluded(page.url, hosts):
                self._count("entries dropped")
            else:
                pages[page.url] = page
        return list(pages.values())[:k]

    def _page(self, entry: Any) -> WebPage | None:
        if not isinstance(entry, dict):
            return None
        found = {ours: entry.get(theirs) for ours, theirs in self.settings.fields}
        texts = {name: value for name, value in found.items() if isinstance(value, str)}
        texts["snippet"] = plain_snippet(texts.get("snippet", ""))
        url = texts.get("url", "")
        try:
            good = urlsplit(url).scheme in ("http", "https") and urlsplit(url).hostname
        except ValueError:
            good = False
        return WebPage(id=url, **{"title": "", **texts}) if good else None

    async def _ask(self, payload: dict[str, Any], endpoint, end: float) -> Any:
        """The endpoint's JSON, after as many tries as are allowed. Raises _SearchError."""
        for left in reversed(range(self.settings.tries)):
            await self._wait_for_turn()
            try:
                return await self._post(payload, endpoint)
            except _Again as again:
                wait = again.wait_s
                if wait is None:
                    wait = self.settings.backoff_s * 2 ** (self.settings.tries - 1 - left) * random.uniform(1, 1.25)
                if not left or time.monotonic() + wait > end:
                    raise _SearchError(again.kind, str(again)) from None
                self._count("retries")
                await self._sleep(wait)
        raise AssertionError("tries is at least 1")

    async def _post(self, payload: dict[str, Any], endpoint) -> Any:
        import httpx

        self._count("requests")
        headers = {self.settings.key_header: self._key} if self._key else {}
        body = bytearray()
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                async with endpoint.stream("POST", self.settings.endpoint, json=payload, headers=headers) as answer:
                    _check_status(answer)
                    async for part in answer.aiter_bytes(65_536):
                        body += part
                        if len(body) > _ANSWER_BYTES:
                            raise _SearchError("unavailable", f"the answer is longer than {_ANSWER_BYTES} bytes")
        except (TimeoutError, httpx.TimeoutException):
            raise _Again("timeout", f"no answer within {self.settings.timeout_s:g} s", None) from None
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise _Again("unavailable", f"no whole answer ({type(error).__name__})", None) from None
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise _SearchError("unavailable", "the answer is not JSON") from None

    async def _wait_for_turn(self) -> None:
        if not self.settings.rate:
            return
        with self._lock:  # batches of several threads share the rate
            now = time.monotonic()
            turn = self._next = max(now, self._next + 1 / self.settings.rate)
        await self._sleep(turn - now)

    def _count(self, *names: str) -> None:
        with self._lock:
            self.counts.update(names)

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


class _Again(_SearchError):
    """A failure that may pass. wait_s: what the server asked for."""

    def __init__(self, kind: str, message: str, wait_s: float | None):
        super().__init__(kind, message)
        self.wait_s = wait_s


@functools.cache
def _certificates() -> ssl.SSLContext:
    import httpx

    return httpx.create_ssl_context()  # slow to make


def _check_status(answer: Any) -> None:
    """Raises _Again or _SearchError; never with the answer's text, which may repeat the key."""
    status = answer.status_code
    if status == 429:
        raise _Again("quota", "HTTP status 429: too many requests", retry_after(answer.headers.get("retry-after")))
    if status >= 500:
        raise _Again("unavailable", f"HTTP status {status}", retry_after(answer.headers.get("retry-after")))
    if status in (401, 403):
        raise _SearchError("auth", f"HTTP status {status}: the endpoint refuses the key")
    if status == 402:
        raise _SearchError("quota", "HTTP status 402: the endpoint asks for payment")
    if status in (400, 413, 414, 422):
        raise _SearchError("bad_query", f"HTTP status {status}: the endpoint refuses the query")
    if status != 200:
        raise _SearchError("unavailable", f"HTTP status {status}")


def _host(text: str) -> str:
    """The host of a URL, or of a bare host."""
    host = urlsplit(text if "//" in text else f"//{text}").hostname
    if not host or any(c.isspace() for c in host):
        raise ValueError(f"exclude holds {text!r}, which names no host")
    return host


def _excluded(url: str, hosts: Sequence[str]) -> bool:
    own = urlsplit(url).hostname or ""
    return any(own == host or own.endswith(f".{host}") for host in hosts)


def _failed(page: WebPage, kind: str, message: str) -> WebPage:
    return dataclasses.replace(page, context=page.snippet, error=f"{kind}: {message}")


def _as_result(pages: Sequence[WebPage]) -> Result:
    """Pages as passages; those without any text are left out, and counted with the failed ones."""
    passages = [
        Passage(page.id, page.title, page.context, 1 / rank, page.url)
        for rank, page in enumerate(pages, start=1)
        if page.context.strip()
    ]
    failed = sum(bool(page.error) or not page.context.strip() for page in pages)
    return Result(tuple(passages), failed_pages=failed)


def _run(work: Coroutine) -> Any:
    """The result of a coroutine on an event loop in a thread of its own, as soon as it is there: a look-up of a name
    that hangs in a thread of the loop is not waited for."""
    done: Future = Future()

    def run() -> None:
        try:
            asyncio.run(_deliver(work, done.set_result))
        except BaseException as error:
            if not done.done():
                done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done.result()


async def _deliver(work: Coroutine, give: Callable[[Any], None]) -> None:
    give(await work)
