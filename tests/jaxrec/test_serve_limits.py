"""What a server refuses, what it survives, and how it ends."""

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import openai
import pytest

import models
from jaxrec import serve, serve_engine
from jaxrec.serve_engine import Busy, Closed, Engine, Job
from tests.jaxrec.served import PROMPTS, alone, complete, running, until, world_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model():
    return world_model()


@pytest.fixture(scope="module")
def engine(model):
    with Engine(model, max_batch=8, slice_tokens=4) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine):
    with running(engine, max_body=20_000) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:
        yield client


def raw(url: str, path: str, body: bytes = b"", method: str = "POST", **headers) -> tuple[int, dict]:
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=600)
    connection.request(method, place.path + path, body, headers)
    reply = connection.getresponse()
    return reply.status, json.loads(reply.read())


@pytest.fixture
def held(engine, monkeypatch):
    """From a row's second slice on the engine waits until someone has hung up."""
    real = serve_engine.advance

    def advance(*args, **options):
        rows = [row for row in engine._rows if row]
        if all(row.made for row in rows):
            until(lambda: any(row.ticket.cancelled for row in rows))
        return real(*args, **options)

    monkeypatch.setattr(serve_engine, "advance", advance)


def test_a_client_that_hangs_up_frees_its_row(client, engine, held):
    before = engine.counts["abandoned"]
    # Greedy: of an answer that is drawn the first slice may hold nothing that can be shown yet.
    with complete(client, " who", max_tokens=120, stream=True) as stream:
        next(iter(stream))
    until(lambda: engine.state()["active"] == 0)
    assert engine.counts["abandoned"] == before + 1


def test_a_client_that_does_not_wait_for_its_answer_frees_its_rows(url, engine, held):
    before = engine.counts["abandoned"]
    place = urlsplit(url)
    body = json.dumps({"model": "tiny", "prompt": " who", "max_tokens": 120, "n": 3}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(head + body)
        until(lambda: engine.state()["active"] == 3)
    until(lambda: engine.state()["active"] == 0)
    assert engine.counts["abandoned"] == before + 3


def test_a_stream_that_is_cut_leaves_no_task_behind(engine, held):
    """The application alone, in a loop that can be looked into: a task that waits for ever would be kept for ever."""

    async def hang_up() -> list[asyncio.Task]:
        body = json.dumps({"model": "tiny", "prompt": " who", "max_tokens": 120, "stream": True}).encode()
        waiting, begun = [{"type": "http.request", "body": body, "more_body": False}], asyncio.Event()

        async def receive():
            if not waiting:
                await begun.wait()
            return waiting.pop() if waiting else {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.body":
                begun.set()

        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
            "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "headers": [],
        }  # fmt: skip
        await serve.application(engine, "tiny")(scope, receive, send)
        for _ in range(10):
            await asyncio.sleep(0)
        return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    assert asyncio.run(hang_up()) == []
    until(lambda: engine.state()["active"] == 0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": "hot"}, ["temperature", "number from 0 to 2", "'hot'"]),
        ({"temperature": 2.5}, ["temperature"]),
        ({"temperature": float("nan")}, ["temperature"]),
        ({"top_p": 0}, ["top_p", "above 0"]),
        ({"n": 0}, ["'n'"]),
        ({"n": True}, ["'n'"]),
        ({"n": 9}, ["n=9", "8 answers"]),
        ({"max_tokens": 1.5}, ["max_tokens", "whole number"]),
        ({"stop": [""]}, ["stop", "empty"]),
        ({"stop": ["a"] * 17}, ["stop"]),
        ({"seed": "x"}, ["seed"]),
        ({"stream": "yes"}, ["stream"]),
        ({"stream_options": {"include_usage": True}}, ["stream_options", "only for streams"]),
        ({"echo": True}, ["echo"]),
        ({"suffix": "x"}, ["suffix"]),
        ({"best_of": 3}, ["best_of"]),
        ({"presence_penalty": 1}, ["presence_penalty"]),
        ({"logprobs": 21}, ["logprobs"]),
        ({"max_token": 3}, ["max_token", "did you mean max_tokens"]),
        ({"prompt": []}, ["prompt"]),
        ({"prompt": ""}, ["prompt", "no token"]),
        ({"prompt": [5, 10_000]}, ["10000", "vocabulary"]),
        ({"prompt": "\ud800"}, ["surrogate"]),
        ({"prompt": None}, ["prompt", "missing"]),
        ({"max_tokens": 300}, ["max_tokens", "300", "128"]),
        ({"prompt": "x" * 300}, ["300 tokens", "128"]),
    ],
)
def test_wrong_requests_are_refused_by_name(url, fields, words):
    body = {"model": "tiny", "prompt": "x", **fields}
    status, reply = raw(url, "/completions", json.dumps(body).encode())
    assert status == 400
    assert reply["error"]["type"] == "invalid_request_error"
    for word in words:
        assert word in reply["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": []}, ["messages"]),
        ({"messages": [{"role": "robot", "content": "x"}]}, ["messages[0].role", "assistant"]),
        ({"messages": [{"role": "user"}]}, ["messages[0].content"]),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, ["text"]),
        ({"top_logprobs": 3}, ["top_logprobs", "logprobs"]),
        ({"logprobs": 3}, ["logprobs", "true or false"]),
        ({"tools": [{"type": "function"}]}, ["tools"]),
        ({"response_format": {"type": "json_object"}}, ["response_format"]),
    ],
)
def test_wrong_chats_are_refused_by_name(url, fields, words):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], **fields}
    status, reply = raw(url, "/chat/completions", json.dumps(body).encode())
    assert status == 400
    for word in words:
        assert word in reply["error"]["message"]


def test_other_statuses(url, client):
    with pytest.raises(openai.NotFoundError) as caught:
        complete(client, "x", model="other")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, "x" * 300)
    assert caught.value.code == "context_length_exceeded"
    assert raw(url, "/completions", b"x" * 20_001)[0] == 413
    assert raw(url, "/completions", b"{")[0] == 400
    assert raw(url, "/completions", b"[" * 10_000)[0] == 400
    assert raw(url, "/completions", b"[]")[0] == 400
    assert raw(url, "/nothing", method="GET")[0] == 404
    status, reply = raw(url, "/completions", method="GET")
    assert status == 405
    assert "error" in reply


def test_a_body_without_length_is_cut_off_too(url):
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=600)
    connection.request("POST", "/v1/completions", iter([b"x" * 9_000] * 3), encode_chunked=True,
                       headers={"Transfer-Encoding": "chunked"})  # fmt: skip
    assert connection.getresponse().status == 413


def test_models_and_health(client, url):
    assert [model.id for model in client.models.list().data] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    complete(client, " who", max_tokens=1)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    status, state = raw(url.removesuffix("/v1"), "/health", method="GET")
    assert status == 200
    assert state["status"] == "ok"
    assert state["requests"] > 0


def test_a_full_queue_answers_429_and_others_wait(model):
    """Nobody serves yet: two requests wait, the third is refused; then both are served."""
    engine = Engine(model, max_batch=1, max_waiting=2)
    with running(engine) as url, openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(complete, client, prompt) for prompt in PROMPTS[:2]]
            until(lambda: engine.state()["waiting"] == 2)
            with pytest.raises(openai.RateLimitError):
                complete(client, "x")
            engine.start()
            texts = [future.result().choices[0].text for future in waiting]
        assert texts == [alone(model, prompt).text for prompt in PROMPTS[:2]]
        engine.stop()
        with pytest.raises(openai.InternalServerError) as caught:
            complete(client, "x")
        assert caught.value.status_code == 503
    with pytest.raises(Closed):
        engine.submit(Job((1, 2), 3), print)


def test_a_failing_batch_is_told_and_the_next_one_served(model, monkeypatch):
    real, calls = serve_engine.advance, []

    def fails_once(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no memory")
        return real(*args, **options)

    monkeypatch.setattr(serve_engine, "advance", fails_once)
    with Engine(model, max_batch=2, slice_tokens=4) as engine, running(engine) as url:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError) as caught:
                complete(client, PROMPTS[0])
            assert "no memory" not in str(caught.value)
            assert complete(client, PROMPTS[0]).choices[0].text == alone(model, PROMPTS[0]).text
        assert engine.state()["failures"] == 1


def test_running_answers_end_before_the_server_does(model):
    with Engine(model, max_batch=2, slice_tokens=1) as engine, ThreadPoolExecutor(1) as pool:
        with running(engine) as url:
            client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
            late = pool.submit(complete, client, PROMPTS[0], max_tokens=60)
            until(lambda: engine.state()["active"] == 1)
        assert late.result().choices[0].text == alone(model, PROMPTS[0], max_new_tokens=60).text
        client.close()


def test_engines_refuse_what_makes_no_sense(model):
    with pytest.raises(ValueError, match="tokenizer"):
        Engine(model.replace(tokenizer=None))
    with pytest.raises(ValueError, match="context of 128"):
        Engine(model, max_len=300)
    with pytest.raises(ValueError, match="max_batch"):
        Engine(model, max_batch=0)
    engine = Engine(model, max_waiting=1)
    for job, words in (
        (Job((), 3), "no token"), (Job((1,), 0), "lower max_tokens"), (Job((1,), 3, n=17), "n=17"),
        (Job((1,), 3, logprobs=21), "logprobs=21"), (Job((10_000,), 3), "vocabulary"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            engine.submit(job, print)
    engine.submit(Job((1,), 3), print)
    with pytest.raises(Busy):
        engine.submit(Job((1,), 3), print)


def test_the_command_serves_until_a_signal_and_names_a_taken_port(tmp_path):
    models.save(world_model(max_len=64), tmp_path / "m")
    command = [sys.executable, "-m", "jaxrec", "serve", str(tmp_path / "m")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    options = {"cwd": ROOT, "env": environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, "--port=0", "--max_batch=2"], **options) as process:
        try:
            line = process.stdout.readline()
            assert "Serving 'm' without a chat template at http://127.0.0.1:" in line
            url = line.split(" at ")[1].split(",")[0]
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:
                reply = client.completions.create(model="m", prompt=" who", max_tokens=5, temperature=0)
            assert reply.usage.completion_tokens == 5
            port = str(urlsplit(url).port)
            second = subprocess.run([*command, f"--port={port}"], check=False, **options)
            assert second.returncode == 1
            assert f"port {port}" in second.stderr
            process.send_signal(signal.SIGTERM)
            rest, errors = process.communicate(timeout=600)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert "Served 1 requests, 5 tokens" in rest
