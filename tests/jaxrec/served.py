"""Tiny models for the tests of what is served, and a server in a thread."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax

import models
from jaxrec import serve
from jaxrec.serve_engine import Engine
from models.hf import Model

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "models"
PROMPTS = [" old brass lamp", " the clock", " who", "x y z", " brass", "日本 é", " old", " the old clock?"]
PHRASES = [" lamp", " brass", " old", " clock", " the", " é", "日本", "\n\n", "True", "False", " who", "?", "</q>"]


def world_model(max_len: int = 128, seed: int = 0) -> Model:
    """A random model that knows words, characters and single bytes, half of which are no text by themselves."""
    tokenizer = models.build_word_tokenizer(PHRASES)
    config = models.Config(
        vocab_size=tokenizer.vocab_size, dim=16, layers=1, heads=4, kv_heads=2, head_dim=8, ffn_dim=24, qk_norm=True,
        init_std=0.5, max_len=max_len, eos_ids=tokenizer.eos_ids,
    )  # fmt: skip
    return Model(config, models.init(config, jax.random.key(seed)), tokenizer)


@contextlib.contextmanager
def running(engine: Engine, name: str = "tiny", **options) -> Iterator[str]:
    """Serve a started engine from a thread; gives the base URL, and ends as a signal would have it end."""
    bound = serve.bind("127.0.0.1", 0)
    server = serve.server(engine, name, **options)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 120
    while not server.started:
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(120)
        assert not thread.is_alive()


def alone(model, prompt: str, **options) -> models.Generation:
    """The referee: greedy, 21 tokens."""
    return models.generate(model, [prompt], **{"max_new_tokens": 21, **options})[0]


def complete(client, prompt, **options):
    """A completion, greedy, 21 tokens."""
    return client.completions.create(
        **{"model": "tiny", "prompt": prompt, "max_tokens": 21, "temperature": 0, **options}
    )


def until(true, seconds: float = 300) -> None:
    """Wait until ``true()``."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
