"""Teachers over HTTP: against our own server, and against one that misbehaves in every way it can."""

import contextlib
import email.utils
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import jax
import pytest

import models
from jaxrec.serve_engine import Engine
from jaxrec.tools.teacher import (
    EndpointTeacher,
    Failure,
    Limits,
    LocalTeacher,
    Message,
    Reply,
    Request,
    Sampling,
    StoredTeacher,
    after_marker,
    ask_checked,
    ask_text,
)
from tests.jaxrec.local_server import started
from tests.jaxrec.served import running, world_model

KEY = "sk-very-secret-0123456789"
LIMITS = Limits(concurrency=4, timeout=300, tries=3, first_wait=1.0)


class Misbehaving(http.server.BaseHTTPRequestHandler):
    """Answers by the server's ``script``, a function of (handler, text, how often it came)."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.seen.append((text, body, self.headers.get("Authorization")))
            count = sum(seen == text for seen, *_ in self.server.seen)
        self.server.script(self, text, count)

    def answer(self, value, status=200, headers=(), cut=None):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, content in headers:
            self.send_header(name, content)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True

    def say(self, *texts, **more):
        choices = [
            {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            for i, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": 5, "completion_tokens": 7}
        self.answer({"choices": choices[::-1], "usage": usage, **more})  # order is no promise

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def misbehaving(script: Callable) -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving)
    server.daemon_threads = True
    server.handle_error = lambda *args: None  # it breaks connections on purpose
    server.script, server.seen, server.lock = script, [], threading.Lock()
    with started(server):
        server.url = f"{server.root}/v1"
        yield server


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def teacher(server, limits=LIMITS, waits=None, **options) -> EndpointTeacher:
    sleep = (lambda seconds: None) if waits is None else waits.append
    return EndpointTeacher(server.url, "m", key_env="TEACHER_KEY", limits=limits, sleep=sleep, **options)


def test_a_request_says_what_was_asked_for():
    with misbehaving(lambda h, text, count: h.say("a", "b")) as server:
        asked = Request(
            "author", (Message("system", "s"), Message("user", "u")),
            Sampling(0.7, 0.9, 40, 99, 5, ("x", "y"), 3), n=2,
        )  # fmt: skip
        (reply,) = teacher(server, extra={"chat_template_kwargs": {"enable_thinking": False}}).ask([asked])
        plain = ask_text("judge", "x", sampling=Sampling(seed=None))
        teacher(server).ask([plain])
    assert reply.texts == ("a", "b")
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (5, 7)
    _, body, header = server.seen[0]
    assert header == f"Bearer {KEY}"
    assert body == {
        "model": "m", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        "temperature": 0.7, "top_p": 0.9, "top_k": 40, "max_tokens": 99, "seed": 5, "stop": ["x", "y"], "n": 2,
        "logprobs": True, "top_logprobs": 3, "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip
    assert set(server.seen[1][1]) == {"model", "messages", "temperature", "top_p", "max_tokens"}


def passing(h, text, count):
    """Every failure that may pass, twice; the third time all is well."""
    if count > 2:
        return h.say(text.upper())
    if text == "busy":
        return h.answer({"error": {"message": "slow down"}}, 429, [("Retry-After", "7")])
    if text == "date":
        return h.answer({}, 503, [("Retry-After", email.utils.formatdate(time.time() + 3000, usegmt=True))])
    if text == "broken":
        return h.answer(b"<html>Bad gateway</html>", 502)
    if text == "cut":
        return h.answer({"choices": []}, cut=5)
    if text == "no json":
        return h.answer(b'{"choices": [')
    h.close_connection = True
    return h.connection.shutdown(socket.SHUT_RDWR)  # close() alone would leave its files open


def test_what_may_pass_is_tried_again_after_a_while():
    waits: list[float] = []
    texts = ["busy", "date", "broken", "cut", "no json", "closed"]
    with misbehaving(passing) as server:
        patience = Limits(concurrency=1, timeout=300, tries=3, first_wait=2.0, longest_wait=10_000)
        asked = teacher(server, patience, waits)
        answers = asked.ask([ask_text("judge", text) for text in texts])
    assert [answer.text for answer in answers] == [text.upper() for text in texts]
    assert len(server.seen) == 18
    assert waits[:2] == [7, 7]
    assert all(2000 < wait <= 3001 for wait in waits[2:4])
    for first, second in zip(waits[4::2], waits[5::2], strict=True):
        assert 1 <= first < 3
        assert 2 <= second < 6
    assert len(set(waits[4::2])) > 1  # spread


@pytest.mark.parametrize(
    ("script", "kind", "tries", "words"),
    [
        (lambda h, t, c: h.answer({"error": {"message": "slow down"}}, 429), "rate_limit", 3, "slow down"),
        (lambda h, t, c: h.answer({"error": "oops"}, 500), "server", 3, "status 500: oops"),
        (lambda h, t, c: h.answer(b"not json"), "malformed", 3, "not JSON"),
        (lambda h, t, c: h.answer({"a": 1}, cut=3), "connection", 3, "RemoteProtocolError"),
        (lambda h, t, c: h.answer({"error": {"message": f"wrong key {KEY}"}}, 401), "auth", 1, "wrong key ***"),
        (lambda h, t, c: h.answer({"error": {"message": "too long"}}, 400), "refused", 1, "too long"),
        (lambda h, t, c: h.answer(b"", 302, [("Location", "http://example.invalid")]), "refused", 1, "302"),
        (lambda h, t, c: h.answer({"choices": [{"index": 0}]}), "malformed", 1, "KeyError"),
        (lambda h, t, c: h.answer([]), "malformed", 1, "no chat completion"),
        (lambda h, t, c: h.say("a", "b"), "malformed", 1, "2 choices came, 1 were asked for"),
        (lambda h, t, c: h.say(), "malformed", 1, "0 choices"),
        (lambda h, t, c: h.say(None), "malformed", 1, "no text"),
        (lambda h, t, c: h.say("a", usage={"prompt_tokens": "many"}), "malformed", 1, "ValueError"),
    ],
)  # fmt: skip
def test_what_does_not_pass_is_a_failure_of_its_kind(script, kind, tries, words):
    with misbehaving(script) as server:
        (answer,) = teacher(server).ask([ask_text("judge", "x")])
        assert isinstance(answer, Failure)
        assert (answer.kind, answer.attempts) == (kind, tries)
        assert words in answer.message
        assert KEY not in answer.message
        assert len(server.seen) == tries


@pytest.mark.parametrize("drip", [False, True])
def test_slow_answers_are_given_up(drip):
    """Nothing comes; or a byte now and then, which no limit on single reads would notice."""
    over = threading.Event()

    def slow(h, text, count):
        if drip:
            h.send_response(200)
            h.send_header("Content-Length", "100000")
            h.end_headers()
        while not over.wait(0.1):
            with contextlib.suppress(OSError):
                if drip:
                    h.wfile.write(b" ")

    with misbehaving(slow) as server:
        try:
            (answer,) = teacher(server, Limits(timeout=0.5, tries=1)).ask([ask_text("judge", "x")])
            assert not over.is_set()
        finally:
            over.set()
    assert answer.kind == "timeout"


def test_requests_run_side_by_side_but_no_more_than_allowed():
    inside, most, lock, together = [0], [0], threading.Lock(), threading.Barrier(4)

    def script(h, text, count):
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        together.wait(300)  # passes only when four are inside
        with lock:
            inside[0] -= 1
        h.say(text)

    with misbehaving(script) as server:
        heard = []
        answers = teacher(server).ask([ask_text("judge", str(i)) for i in range(12)], lambda i, a: heard.append(i))
    assert [answer.text for answer in answers] == [str(i) for i in range(12)]
    assert sorted(heard) == list(range(12))
    assert most[0] == 4


def test_a_teacher_that_goes_down_is_given_up_and_a_later_run_loses_nothing(tmp_path):
    """After 20 replies everything fails: the rest is not waited for; the next run asks only what is missing."""
    texts = [str(i) for i in range(60)]
    requests = [ask_text("author", text) for text in texts]
    said: list[str] = []

    def goes_down(h, text, count):
        if len(said) >= 20:
            return h.answer({"error": {"message": "down"}}, 503)
        said.append(text)
        return h.say(f"reply to {text}")

    limits = Limits(concurrency=1, timeout=300, tries=2, give_up_after=3)
    with misbehaving(goes_down) as server:
        inner = teacher(server, limits)
        inner.id = "the same teacher"
        stored = StoredTeacher(inner, tmp_path / "r.jsonl")
        first = stored.ask(requests)
        assert len(server.seen) == 20 + 3 * 2
    assert sum(isinstance(answer, Reply) for answer in first) == 20
    assert dict(stored.counts.failed) == {"server": 3, "not_asked": 37}
    with misbehaving(lambda h, text, count: h.say(f"reply to {text}")) as server:
        inner = teacher(server, limits)
        inner.id = "the same teacher"
        stored = StoredTeacher(inner, tmp_path / "r.jsonl")
        second = stored.ask(requests)
        assert len(server.seen) == 40
    assert [answer.text for answer in second] == [f"reply to {text}" for text in texts]
    assert stored.counts.stored == 20


def test_nobody_there_is_a_failure_to_connect():
    with misbehaving(lambda h, t, c: None) as server:
        pass
    (answer,) = teacher(server).ask([ask_text("judge", "x")])
    assert (answer.kind, answer.attempts) == ("connection", 3)


def test_a_missing_key_is_an_error_before_any_request(monkeypatch):
    for value in (None, "", "  "):
        monkeypatch.delenv("TEACHER_KEY", raising=False)
        if value is not None:
            monkeypatch.setenv("TEACHER_KEY", value)
        with pytest.raises(ValueError, match="set the environment variable TEACHER_KEY"):
            EndpointTeacher("https://example.invalid/v1", "m", key_env="TEACHER_KEY")
    for url in ("example.invalid", "ftp://example.invalid", "https://", "https://me:word@example.invalid"):
        with pytest.raises(ValueError, match="base_url") as caught:
            EndpointTeacher(url, "m", key_env=None)
        assert "word" not in str(caught.value).replace("password", "")


def test_the_key_is_shown_nowhere(tmp_path, caplog):
    with caplog.at_level("DEBUG"), misbehaving(lambda h, text, count: h.say("x")) as server:
        asked = teacher(server)
        StoredTeacher(asked, tmp_path / "r.jsonl").ask([ask_text("judge", "x")])
    assert KEY not in repr(asked) + asked.id + caplog.text + (tmp_path / "r.jsonl").read_text()


def test_limits_and_requests_refuse_what_makes_no_sense():
    for options in ({"concurrency": 0}, {"tries": 0}, {"timeout": 0}, {"first_wait": 9, "longest_wait": 1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Limits(**options)
    for options in (
        {"temperature": -1},
        {"top_p": 0},
        {"max_tokens": 0},
        {"stop": "x"},
        {"stop": ("",)},
        {"logprobs": 21},
    ):
        with pytest.raises(ValueError):
            Sampling(**options)
    with pytest.raises(ValueError, match="no role 'cook'"):
        ask_text("cook", "x")
    with pytest.raises(ValueError, match="surrogate"):
        ask_text("judge", "\ud800")
    with pytest.raises(ValueError, match="messages"):
        Request("judge", ())
    with pytest.raises(ValueError, match=r"messages\[0\]"):
        Request("judge", (Message("robot", "x"),))


@pytest.fixture(scope="module")
def model():
    return world_model()


def test_our_own_server_and_the_local_teacher_say_the_same(model, tmp_path):
    """End to end: endpoint, store and schema over HTTP; greedy equals ``models.generate``, seeds mean the same draw."""
    requests = [ask_text("author", text, sampling=Sampling(max_tokens=21)) for text in (" old brass", " who", "x y")]
    requests.append(ask_text("author", " clock", sampling=Sampling(1.0, max_tokens=12, seed=5, logprobs=2), n=3))
    heard = []
    local = LocalTeacher(model, "tiny", max_batch=4).ask(requests, lambda number, answer: heard.append(number))
    assert sorted(heard) == [0, 1, 2, 3]
    with Engine(model, max_batch=4) as engine, running(engine) as url:
        served = EndpointTeacher(url, "tiny", key_env=None, limits=Limits(concurrency=4, timeout=600))
        over_http = StoredTeacher(served, tmp_path / "r.jsonl").ask(requests)
        refused = served.ask([ask_text("judge", "x" * 400)])
        checked = ask_checked(served, requests[:3], after_marker())
    for request, reply in zip(requests[:3], local):
        (expected,) = models.generate(model, [request.messages[0].content], max_new_tokens=21)
        assert reply.text == expected.text
        assert reply.finish == ("length",)
        assert reply.usage.completion_tokens == 21
    assert [reply.texts for reply in over_http] == [reply.texts for reply in local]
    assert [reply.usage for reply in over_http] == [reply.usage for reply in local]
    assert len(set(local[3].texts)) == 3
    for ours, theirs in zip(local[3].logprobs, over_http[3].logprobs, strict=True):
        assert [token.token for token in ours] == [token.token for token in theirs]
        assert [token.logprob for token in ours] == pytest.approx([token.logprob for token in theirs], abs=1e-5)
        assert [len(token.top) for token in ours] == [2] * len(ours)
    assert refused[0].kind == "refused"
    assert "context" in refused[0].message
    assert all(not isinstance(answer, Failure) or answer.kind == "invalid" for answer in checked)
    stored = StoredTeacher(served, tmp_path / "r.jsonl")  # the server is gone; nothing is asked
    assert stored.ask(requests) == over_http


def test_a_local_teacher_on_eight_devices_says_what_one_says(model):
    """Greedy and drawn, prompts of several widths, more than fit into a batch."""
    texts = (" old brass", " who", "x y", " clock " * 40, " the old clock?", " lamp")
    requests = [ask_text("author", text, sampling=Sampling(1.0, max_tokens=9, seed=i, logprobs=1))
                for i, text in enumerate(texts)]  # fmt: skip
    requests[0] = requests[0].replace(temperature=0.0)
    mesh = models.make_mesh(data=2, fsdp=2, tensor=2)
    placed = model.replace(params=jax.device_put(model.params, models.shardings(model.config, mesh)))
    one, eight = (
        LocalTeacher(own, "tiny", max_batch=4, mesh=where).ask(requests)
        for own, where in ((model, None), (placed, mesh))
    )
    assert len(placed.params["embed"].devices()) == 8
    assert len({reply.text for reply in one}) > 3
    for ours, theirs in zip(eight, one, strict=True):
        assert (ours.texts, ours.finish) == (theirs.texts, theirs.finish)
        assert [t.logprob for t in ours.logprobs[0]] == pytest.approx([t.logprob for t in theirs.logprobs[0]], abs=1e-4)


def test_a_local_teacher_refuses_what_does_not_fit_and_serves_the_rest(model):
    asked = [ask_text("author", "x" * 400), ask_text("author", " who", sampling=Sampling(max_tokens=3))]
    local = LocalTeacher(model, "tiny")
    for _ in range(2):  # and again: the engine begins anew
        refused, reply = local.ask(asked)
        assert refused.kind == "refused"
        assert reply.usage.completion_tokens == 3
    with pytest.raises(ValueError, match="tokenizer"):
        LocalTeacher(model.replace(tokenizer=None), "tiny")
