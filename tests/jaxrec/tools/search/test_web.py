"""Live search against a real server on this machine that behaves, and misbehaves in every way it can."""

import asyncio
import contextlib
import http.server
import json
import logging
import socketserver
import threading
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from jaxrec.tools.search import ResultCache, SearchTool
from jaxrec.tools.search import web as web_module
from jaxrec.tools.search.fetch import FetchSettings
from jaxrec.tools.search.web import WebSearch, WebSettings
from tests.jaxrec.local_server import started

KEY = "s3cret-key-0123456789"
PATIENCE = 60.0  # seconds for what must come in time, on a machine under load


class Handler(http.server.BaseHTTPRequestHandler):
    """GET /page/NAME and POST /search, whose answer the query chooses."""

    def log_message(self, *args):
        pass

    def send(self, status, body=b"", kind="text/html; charset=utf-8", **headers):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        headers.setdefault("Content_Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        with contextlib.suppress(OSError):  # who asked may be gone
            self.wfile.write(body)

    def do_POST(self):
        server = self.server
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append((asked, dict(self.headers)))
            before = sum(a["q"] == asked["q"] for a, _ in server.asked) - 1
        word = asked["q"].split()[0]
        if word.isdecimal():
            return self.send(int(word), f"key {KEY} refused".encode())
        if word == "busy" and before < 2:
            return self.send(429, Retry_After="0")
        if word == "later":
            return self.send(429, Retry_After="3600")
        if word == "flaky" and before < 1:
            return self.send(503)
        if word == "slow":
            server.gate.wait()
        if word == "together":
            server.together.wait(PATIENCE)  # passes only when all are inside
        if word == "late":
            server.clock += PATIENCE
        if word == "moved":
            return self.send(307, Location=f"{server.base}/search")
        bodies = {"garbage": b"<html>", "list": b"[1]", "none": b"{}", "deep": b"[" * 100_000, "huge": b" " * 5_000_000}
        if word in bodies:
            return self.send(200, bodies[word], "application/json")
        if word == "cut":
            return self.send(200, b'{"organic": []}', "application/json", Content_Length="500")
        entries = server.entries.get(word, [])
        return self.send(200, json.dumps({"organic": entries}).encode(), "application/json")

    def do_GET(self):
        server, path = self.server, urlsplit(self.path).path
        with server.lock:
            server.got.append((self.path, self.headers["Host"]))
        name = path.removeprefix("/page/")
        if path == "/robots.txt":
            return self.send(200, b"User-agent: *\nDisallow: /page/forbidden\n", "text/plain")
        if name == "slow":
            server.gate.wait()
        if name == "drip":  # a byte now and then: no single read is late
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while not server.gate.wait(0.05):
                    self.wfile.write(b"x")
            return None
        if name.startswith("loop"):
            return self.send(302, Location=f"/page/loop{int(name[4:] or 0) + 1}")
        if name == "inside":
            return self.send(302, Location="http://169.254.169.254/latest/meta-data/")
        if name == "file":
            return self.send(302, Location="file:///etc/passwd")
        if name == "moved":
            return self.send(301, Location="good")
        if name == "cut":
            return self.send(200, b"<p>half", Content_Length="5000")
        if name == "huge":
            return self.send(200, b"<p>word " * 1_000_000)
        answers = {
            "good": (b"<html><script>no</script><p>A needle in hay.</p></html>", "text/html"),
            "binary": (b"\x00\x01\x02" * 100, "application/octet-stream"),
            "disguised": (b"\x7fELF\x00\x00" * 100, "text/html"),
            "pdf": (b"%PDF-1.7", "application/pdf"),
            "latin": ("Größe der Stadt".encode("latin-1"), "text/plain; charset=ISO-8859-1"),
            "wild": ("Größe €".encode("cp1252"), "text/html"),
            "empty": (b"", "text/html"),
            "tag": (b"<p>&lt;/document&gt; more", "text/html"),
        }
        self.send(200, *answers[name]) if name in answers else self.send(404)
        with server.lock:
            server.given.append(name)
            if server.given.count("good") == server.enough:
                server.gate.set()


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        pass  # connections that the client drops


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", f" {KEY}\n")
    server = Server(("127.0.0.1", 0), Handler)
    server.lock, server.gate = threading.Lock(), threading.Event()
    server.asked, server.got, server.given, server.entries = [], [], [], {}
    server.enough, server.together, server.clock = 0, threading.Barrier(8), 0.0
    with started(server):
        server.base = server.root
        yield server
        server.gate.set()


def entry(server, name, snippet="", **more):
    return {"title": name, "link": f"{server.base}/page/{name}", "snippet": snippet, **more}


def web(server, fetch=None, waits=None, **settings) -> WebSearch:
    async def sleep(seconds):
        if waits is not None:
            waits.append(seconds)

    limits = {"timeout_s": PATIENCE, "deadline_s": 2 * PATIENCE, **settings}
    return WebSearch(WebSettings(f"{server.base}/search", **limits), fetch, sleep=sleep)


def reading(**settings) -> FetchSettings:
    return FetchSettings(**{"allowed_addresses": ("127.0.0.0/8",), "timeout_s": PATIENCE, **settings})


def test_entries_become_passages(server):
    more = [3, {"title": "no link"}, {"link": "ftp://x/y"}, {"link": "http://[bad/"}, {"link": "http://good.org/a"}]
    server.entries["q"] = [entry(server, "good", "a <b>needle</b>", date="2024", site="S")] * 2 + more
    search = web(server)
    (result,) = search.search(["q  one"], 10)
    assert [(p.id, p.title, p.text, p.score) for p in result.passages] == [
        (f"{server.base}/page/good", "good", "a needle", 1.0)
    ]  # the other good one has neither a snippet nor a page
    assert result.failed_pages == 1
    assert search.counts["entries dropped"] == 5
    ((asked, headers),) = server.asked
    assert asked == {"q": "q  one", "num": 11, "mkt": "en-US", "setLang": "en"}
    assert headers["X-API-KEY"] == KEY
    assert server.got == []  # no page was read
    assert search.search(["nothing"], 3)[0].passages == ()
    pages = search.pages(["q"], 1)[0]
    assert (pages[0].date, pages[0].site_name) == ("2024", "S")


def test_pages_are_read_and_failures_fall_back_to_snippets(server):
    names = {
        "good": "", "moved": "", "latin": "", "wild": "", "tag": "", "huge": "", "binary": "content_type",
        "disguised": "content_type", "pdf": "unsupported", "cut": "truncated", "loop": "redirects",
        "inside": "private_address", "file": "bad_url", "gone": "status", "forbidden": "robots",
    }  # fmt: skip
    server.entries["q"] = [entry(server, name, f"snippet of {name}") for name in names]
    search = web(server, reading(max_bytes=100_000))
    (pages,) = search.pages(["q"], len(names))
    assert {p.title: p.error.partition(":")[0] for p in pages} == names
    context = {p.title: p.context for p in pages}
    assert context["good"] == context["moved"] == "A needle in hay."
    assert context["latin"] == "Größe der Stadt"
    assert context["wild"] == "Größe €"
    assert len(context["huge"]) == 6000
    assert all(context[name] == f"snippet of {name}" for name, error in names.items() if error)
    assert sum(path == "/robots.txt" for path, _ in server.got) == 1
    assert not any("forbidden" in path for path, _ in server.got)
    assert sum("loop" in path for path, _ in server.got) == 6  # five redirects followed
    assert search.counts["pages read"] == 6
    assert search.counts["pages robots"] == 1
    (result,) = search.search(["q"], len(names))
    assert len(result.passages) == len(names)
    assert result.failed_pages == len(names) - 6


def test_slow_pages_are_given_up(server):
    server.entries["q"] = [entry(server, name, name) for name in ("slow", "drip")]
    search = web(server, reading(timeout_s=0.3))
    (pages,) = search.pages(["q"], 2)
    assert [(p.context, p.error.partition(":")[0]) for p in pages] == [("slow", "timeout"), ("drip", "timeout")]
    assert search.counts["pages timeout"] == 2
    assert not server.gate.is_set()


def test_private_addresses_are_not_read(server):
    hosts = ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "2130706433", "[::ffff:127.0.0.1]", "10.0.0.1",
             "169.254.169.254", "[fe80::1]", "100.64.0.1", "[64:ff9b::7f00:1]", "[2002:7f00:1::]",
             "[::127.0.0.1]"]  # fmt: skip
    server.entries["q"] = [{"title": h, "link": f"http://{h}:{server.server_port}/page/good"} for h in hosts]
    (pages,) = web(server, FetchSettings(timeout_s=PATIENCE)).pages(["q"], 20)
    assert {p.title: p.error.partition(":")[0] for p in pages} == dict.fromkeys(hosts, "private_address")
    assert server.got == []
    (pages,) = web(server, reading()).pages(["q"], 20)
    assert [p.title for p in pages if not p.error][:2] == ["127.0.0.1", "localhost"]
    assert {host for _, host in server.got} >= {f"localhost:{server.server_port}"}  # the name goes along
    with pytest.raises(ValueError, match="not appear to be an IPv4 or IPv6 network"):
        FetchSettings(allowed_addresses=("home",))


@pytest.mark.parametrize(
    ("query", "kind", "requests"),
    [
        ("401", "auth", 1), ("403", "auth", 1), ("402", "quota", 1), ("400", "bad_query", 1), ("404", "unavailable", 1),
        ("429", "quota", 3), ("500", "unavailable", 3), ("later", "quota", 1), ("cut", "unavailable", 3),
        ("garbage", "unavailable", 1), ("list", "unavailable", 1), ("none", "unavailable", 1),
        ("deep", "unavailable", 1), ("huge", "unavailable", 1), ("moved", "unavailable", 1), (" ", "bad_query", 0),
    ],
)  # fmt: skip
def test_failures_are_typed(server, query, kind, requests):
    (result,) = web(server).search([query], 3)
    assert (result.kind, result.passages) == (kind, None)
    assert len(server.asked) == requests
    assert KEY not in result.error


def test_what_passes_is_tried_again(server):
    server.entries.update({word: [entry(server, "good", word)] for word in ("busy", "flaky")})
    waits: list[float] = []
    search = web(server, waits=waits, backoff_s=2)
    assert [r.passages[0].text for r in search.search(["busy", "flaky"], 3)] == ["busy", "flaky"]
    assert search.counts["requests"] == 5
    assert search.counts["retries"] == 3
    assert sorted(waits)[:2] == [0, 0]  # what Retry-After says
    assert 2 <= sorted(waits)[2] <= 2.5
    waits.clear()
    web(server, waits=waits, tries=4, backoff_s=2).search(["500"], 3)
    assert [2 * 2**i <= wait <= 2.5 * 2**i for i, wait in enumerate(waits)] == [True] * 3
    assert web(server, tries=1).search(["flaky x"], 3)[0].kind == "unavailable"


def test_no_server(server):
    (result,) = WebSearch(WebSettings("http://127.0.0.1:9/search", backoff_s=0)).search(["q"], 3)
    assert result.kind == "unavailable"


def test_a_slow_query_and_a_slow_page_stall_nobody(server):
    """What is slow answers only once all the others have been answered."""
    for word in ("q", "slow"):
        server.entries[word] = [entry(server, "slow", "its snippet"), entry(server, "good", f"needle of {word}")]
    server.enough = 2  # good pages, of the two quick queries
    results = web(server, reading()).search(["slow", "q", "slow two", "q two"], 3)
    assert [r.kind for r in results] == [""] * 4
    assert server.given[:2] == ["good", "good"]
    assert [r.failed_pages for r in results] == [1] * 4  # "slow" is no page after all


def test_what_is_late_is_left_out(server, monkeypatch):
    """By the clock of the module: a batch is over once "late" is answered, though its page never is."""
    server.entries["late"] = [entry(server, "slow", "its snippet")]
    monkeypatch.setattr(web_module, "time", SimpleNamespace(monotonic=lambda: server.clock))
    (pages,) = web(server, reading(timeout_s=600), deadline_s=PATIENCE).pages(["late"], 3)
    assert [(p.context, p.error) for p in pages] == [("its snippet", "timeout: batch over")]
    (late,) = web(server, deadline_s=0.2).search(["slow"], 1)
    assert (late.kind, "the batch's 0.2 s" in late.error) == ("timeout", True)
    (late,) = web(server, timeout_s=0.1, tries=2).search(["slow two"], 1)
    assert (late.kind, "within 0.1 s" in late.error) == ("timeout", True)


def test_requests_run_side_by_side(server):
    server.entries["together"] = [entry(server, "good", "s")]
    results = web(server).search([f"together {i}" for i in range(8)], 1)
    assert [r.passages[0].text for r in results] == ["s"] * 8


def test_requests_keep_to_the_rate(server, monkeypatch):
    monkeypatch.setattr(web_module, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    waits: list[float] = []
    search = web(server, waits=waits, rate=20)
    search.search([f"x{i}" for i in range(4)], 1)
    search.search(["y"], 1)
    assert waits == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_hosts_are_excluded(server):
    server.entries["q"] = [{"link": f"http://{h}/x", "snippet": h} for h in ("a.org", "b.a.org", "xa.org", "c.net")]
    search = web(server, exclude=("https://a.org/some/page",))
    assert [p.text for p in search.search(["q"], 5)[0].passages] == ["xa.org", "c.net"]
    assert server.asked[0][0]["q"] == "q -site:a.org"
    more = search.excluding(["c.net"])
    assert [p.text for p in more.search(["q"], 5)[0].passages] == ["xa.org"]
    assert server.asked[1][0]["q"] == "q -site:a.org -site:c.net"
    assert len({search.id, more.id, web(server).id}) == 3
    assert web(server).id == web(server, tries=5, deadline_s=3).id
    with pytest.raises(ValueError, match="names no host"):
        web(server, exclude=("two words",))


def test_the_key_is_never_shown(server, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    search = web(server)
    for query in ("401", "500", "garbage", "cut"):
        assert KEY not in repr(search.search([query], 1))
    assert KEY not in repr(search) + repr(search.settings) + repr(vars(search.settings)) + search.id + caplog.text
    for value, message in ((None, "SERPER_API_KEY is not set"), ("", "is not set"), ("sch\u00f6n", "no header")):
        monkeypatch.delenv("SERPER_API_KEY", raising=False)
        if value is not None:
            monkeypatch.setenv("SERPER_API_KEY", value)
        with pytest.raises(ValueError, match=message) as caught:
            web(server)
        assert not value or value not in str(caught.value)
    assert web(server, key_env="").search(["none"], 1)[0].kind == "unavailable"
    assert "X-API-KEY" not in server.asked[-1][1]
    for endpoint in ("ftp://x", "x.org/search"):
        with pytest.raises(ValueError, match="http or https"):
            WebSettings(endpoint)
    with pytest.raises(ValueError, match="user or password") as caught:
        WebSettings(f"https://me:{KEY}@x.org/search")
    assert KEY not in str(caught.value)


def test_as_a_tool_with_a_cache_and_inside_a_running_loop(server, tmp_path):
    server.entries["q"] = [entry(server, "good", "needle")]
    tool = SearchTool(web(server, reading()), ResultCache(tmp_path / "cache.jsonl"))

    async def notebook():
        return tool.search(["q", "500"], 2)

    first = asyncio.run(notebook())
    assert first[0].passages[0].text == "A needle in hay."
    assert tool.search(["q", "500"], 2) == first
    assert sum(asked["q"] == "q" for asked, _ in server.asked) == 1
    assert sum(asked["q"] == "500" for asked, _ in server.asked) == 6  # failures are asked again
