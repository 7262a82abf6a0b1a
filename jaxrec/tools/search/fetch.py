"""GET of untrusted pages: public addresses only, few redirects, little time, no more bytes than allowed.

Names are resolved here and the request goes to the address that was checked, so that a second look-up cannot answer
otherwise. Proxies of the environment are not used: they would resolve names themselves.
"""

import asyncio
import dataclasses
import ipaddress
import socket
import urllib.robotparser
from typing import Any
from urllib.parse import urljoin, urlsplit, urlunsplit

from jaxrec.tools.search.pages import PageError, decode_page, html_text

_HTML = ("text/html", "application/xhtml+xml")
_PLAIN = ("text/plain",)
_TRANSLATED = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("::/96"))


@dataclasses.dataclass(frozen=True)
class FetchSettings:
    """timeout_s: for a page, redirects included. max_bytes: reading stops there, and what was read is used.
    max_redirects: followed ones. concurrency: requests at a time. robots: whether a host's robots.txt is asked and
    followed. allowed_addresses: private addresses or networks that may be read all the same, e.g. "127.0.0.1"."""

    timeout_s: float = 20.0
    max_bytes: int = 2_000_000
    max_redirects: int = 5
    concurrency: int = 20
    robots: bool = True
    agent: str = "Mozilla/5.0 (compatible; jaxrec)"
    allowed_addresses: tuple[str, ...] = ()

    def __post_init__(self):
        if self.timeout_s <= 0 or self.max_bytes < 1 or self.max_redirects < 0 or self.concurrency < 1:
            raise ValueError(f"limits of fetching must be positive: {self}")
        for address in self.allowed_addresses:
            ipaddress.ip_network(address)


class Fetcher:
    """Pages of one batch, on one event loop. client: an ``httpx.AsyncClient`` that follows no redirects. robots: what
    sites are known to ask for, by the address of their robots.txt; it grows."""

    def __init__(self, client: Any, settings: FetchSettings, robots: dict[str, urllib.robotparser.RobotFileParser]):
        self.client, self.settings, self.robots = client, settings, robots
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._asking: dict[str, asyncio.Task] = {}
        self._allowed = [ipaddress.ip_network(address) for address in settings.allowed_addresses]

    async def text(self, url: str) -> str:
        """The visible text of an HTML page or a plain text. Raises PageError."""
        async with self._slots:
            try:
                async with asyncio.timeout(self.settings.timeout_s):
                    kind, charset, body = await self._page(url)
                    return await asyncio.to_thread(_readable, kind, charset, body)
            except TimeoutError:
                raise PageError("timeout", f"no page within {self.settings.timeout_s:g} s") from None

    async def _page(self, url: str) -> tuple[str, str | None, bytes]:
        for _ in range(self.settings.max_redirects + 1):
            if self.settings.robots and not await self._may_read(url):
                raise PageError("robots", "the site's robots.txt asks not to read this page")
            status, headers, body = await self._get(url)
            if status in (301, 302, 303, 307, 308) and "location" in headers:
                url = urljoin(url, headers["location"])
                continue
            if status != 200:
                raise PageError("status", f"HTTP status {status}")
            kind, charset = _content_type(headers)
            return kind, charset, body
        raise PageError("redirects", f"more than {self.settings.max_redirects} redirects")

    async def _get(self, url: str, kinds: bool = True) -> tuple[int, Any, bytes]:
        """Status, headers and at most ``max_bytes`` of one answer; the body of a 200 only."""
        import httpx

        address, host = await self._checked_address(url)
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
        target = urlunsplit(parts._replace(netloc=f"[{address}]{port}" if ":" in address else f"{address}{port}"))
        shown = f"[{host}]" if ":" in host else host
        headers = {"Host": f"{shown}{port}", "User-Agent": self.settings.agent, "Accept": "text/html,text/plain;q=0.9"}
        body = bytearray()
        try:
            request = self.client.build_request("GET", target, headers=headers, extensions={"sni_hostname": host})
            response = await self.client.send(request, stream=True)
            try:
                if response.status_code == 200:
                    if kinds:
                        _content_type(response.headers)
                    async for part in response.aiter_bytes(65_536):
                        body += part
                        if len(body) >= self.settings.max_bytes:
                            break
            finally:
                await response.aclose()
        except httpx.TimeoutException:
            raise PageError("timeout", "the server did not answer in time") from None
        except httpx.RemoteProtocolError:
            raise PageError("truncated", "the answer ended before it was whole, or is no HTTP") from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise PageError("unavailable", type(error).__name__) from None
        return response.status_code, response.headers, bytes(body[: self.settings.max_bytes])

    async def _checked_address(self, url: str) -> tuple[str, str]:
        """(address, host) of a URL all of whose addresses may be read. Raises PageError."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
            if parts.scheme not in ("http", "https") or not host:
                raise ValueError("no http or https address")
            host = host.encode("idna").decode() if not host.isascii() else host
        except ValueError as error:
            raise PageError("bad_url", str(error)) from None
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise PageError("unavailable", f"the host has no address ({type(error).__name__})") from None
        addresses = [entry[4][0] for entry in found]
        for address in addresses:
            if not self._public(address):
                raise PageError("private_address", "the host's address is private")
        return addresses[0], host

    def _public(self, address: str) -> bool:
        ip = ipaddress.ip_address(address.partition("%")[0])
        ip = getattr(ip, "ipv4_mapped", None) or ip
        if any(ip.version == network.version and ip in network for network in self._allowed):
            return True
        return ip.is_global and not ip.is_multicast and all(inner.is_global for inner in _embedded(ip))

    async def _may_read(self, url: str) -> bool:
        """By robots.txt (RFC 9309): yes where there is none, no where the server fails to say."""
        parts = urlsplit(url)
        base = urlunsplit((parts.scheme, parts.netloc, "/robots.txt", "", ""))
        if base not in self.robots:
            if base not in self._asking:
                self._asking[base] = asyncio.create_task(self._rules(base))
                self._asking[base].add_done_callback(lambda task: task.cancelled() or task.exception())
            self.robots[base] = await asyncio.shield(self._asking[base])  # several pages wait for one answer
        return self.robots[base].can_fetch("jaxrec", url)

    async def _rules(self, url: str) -> urllib.robotparser.RobotFileParser:
        rules = urllib.robotparser.RobotFileParser()
        try:
            for _ in range(self.settings.max_redirects + 1):
                async with asyncio.timeout(self.settings.timeout_s):
                    status, headers, body = await self._get(url, kinds=False)
                if status not in (301, 302, 303, 307, 308) or "location" not in headers:
                    break
                url = urljoin(url, headers["location"])
        except TimeoutError:
            raise PageError("timeout", "robots.txt did not come in time") from None
        if status == 200:
            rules.parse(body.decode("utf-8", "replace").splitlines())
        rules.allow_all, rules.disallow_all = 300 <= status < 500, status >= 500
        return rules


def _embedded(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """IPv4 addresses to which an IPv6 address may be translated on its way (6to4, Teredo, NAT64, IPv4-compatible)."""
    if ip.version == 4:
        return []
    found = [ip.sixtofour, *(ip.teredo or ())]
    if any(ip in prefix for prefix in _TRANSLATED):
        found.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    return [inner for inner in found if inner is not None]


def _readable(kind: str, charset: str | None, body: bytes) -> str:
    if b"\0" in body[:1024] and "16" not in (charset or ""):
        raise PageError("content_type", f"the page calls itself {kind}, but is binary")
    text = decode_page(body, charset)
    return html_text(text) if kind in _HTML else " ".join(text.split())


def _content_type(headers: Any) -> tuple[str, str | None]:
    """(kind, charset) of an answer that can be read. Raises PageError."""
    kind, _, rest = headers.get("content-type", "text/html").partition(";")
    kind = kind.strip().lower()
    if kind == "application/pdf":
        raise PageError("unsupported", "PDF is not read")
    if kind not in _HTML + _PLAIN:
        raise PageError("content_type", f"{kind[:80]!r} is no text")
    charset = next((p.partition("=")[2] for p in rest.split(";") if p.strip().lower().startswith("charset=")), "")
    return kind, charset.strip().strip("\"'") or None
