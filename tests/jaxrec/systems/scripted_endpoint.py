"""A teacher behind an OpenAI-compatible address whose answers a function gives."""

import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

from tests.jaxrec.local_server import started

# (prompt, seed) -> (what is noted of the request, what is said, why it ends)
Answer = Callable[[str, int], tuple[Any, str, str]]
# What is said -> its tokens, each (text, log-probability, [(text, log-probability) of the likeliest, ...]).
Tokens = Callable[[str], list[tuple[str, float, list[tuple[str, float]]]]]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions"
        (message,) = body["messages"]
        note, said, finish = self.server.answer(message["content"], body.get("seed", 0))
        with self.server.lock:
            self.server.asked.append(note)
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": finish}
        if body.get("logprobs") and self.server.tokens:
            choice["logprobs"] = {
                "content": [
                    {"token": t, "logprob": p, "top_logprobs": [{"token": o, "logprob": q} for o, q in top]}
                    for t, p, top in self.server.tokens(said)
                ]
            }
        out = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(out)))
        self.end_headers()
        self.wfile.write(out)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def endpoint(
    answer: Answer, status: int = 200, tokens: Tokens | None = None
) -> Iterator[http.server.ThreadingHTTPServer]:
    """A server whose ``url`` is a teacher's; ``asked`` lists what was noted of requests. status: of every answer.
    tokens: for requests that want log-probabilities; None gives none."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads, server.asked, server.lock = True, [], threading.Lock()
    server.answer, server.status, server.tokens = answer, status, tokens
    with started(server):
        server.url = f"{server.root}/v1"
        yield server
