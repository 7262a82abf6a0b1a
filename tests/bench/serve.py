"""Requests and tokens per second of `jaxrec serve` as callers grow, beside the same requests one at a time.

    python tests/bench/serve.py [--quick] [--sizes 10M 100M] [--callers 1 4 16] [--repeats 3] [--out serve.json]
                                                                               (needs pip install '.[serve]')

A random Qwen3 model in float32 with a tokenizer of words, served over HTTP on this machine; every caller sends its next
completion when the last one has come, prompts of 17 to 64 tokens, 64 tokens each, greedy, no early end. ``alone`` is
``models.generate`` on the same prompts, one after the other, without any server: what a caller would get who loads the
model. Callers' runs and ``alone`` take turns and the fastest of each counts. Which sizes of batch occur depends on who
meets whom, so a run in which a program was compiled is not counted but made again. Ratios are by wall clock and by CPU
seconds of all threads, callers and HTTP included, which say more where the machine is shared. ``wait`` is the median
time from a request to its answer, ``first`` that to the first part of a stream.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

_spec = importlib.util.spec_from_file_location("bench_decode", Path(__file__).with_name("decode.py"))
decode = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(decode)


def make_model(fields: dict):
    """A random model whose tokenizer makes one token of each of 4,000 words (fewer where the vocabulary is smaller)."""
    import jax

    import models
    from models.hf import Model

    words = [f" w{i}" for i in range(min(4000, fields["vocab_size"] - 300))]
    tokenizer = models.build_word_tokenizer(words)
    config = models.Config(**fields, family="qwen3", qk_norm=True, init_std=0.05)
    return Model(config, models.init(config, jax.random.key(0)), tokenizer), words


def make_prompts(words: list[str], count: int) -> list[str]:
    """Prompts of 17 to 64 tokens."""
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(words, rng.integers(17, 65))) for _ in range(count)]


def ask(url: str, prompts: list[str], callers: int, new: int) -> list[float]:
    """All prompts by so many callers; seconds that each waited."""
    import httpx

    with httpx.Client(timeout=600) as client, ThreadPoolExecutor(callers) as pool:

        def one(prompt: str) -> float:
            start = time.perf_counter()
            body = {"model": "m", "prompt": prompt, "max_tokens": new, "temperature": 0}
            reply = client.post(f"{url}/completions", json=body)
            reply.raise_for_status()
            assert reply.json()["usage"]["completion_tokens"] == new
            return time.perf_counter() - start

        return list(pool.map(one, prompts))


def first_part(url: str, prompts: list[str], new: int) -> float:
    """Median seconds to the first event of a stream, one caller."""
    import httpx

    seconds = []
    with httpx.Client(timeout=600) as client:
        for prompt in prompts:
            start = time.perf_counter()
            body = {"model": "m", "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True}
            with client.stream("POST", f"{url}/completions", json=body) as reply:
                next(reply.iter_lines())
                seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def fastest(calls: dict[str, Callable[[], object]], repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Fewest seconds of ``repeats`` interleaved runs of each call: by wall clock, and of all threads' CPU time. A run
    that compiles something is made again."""
    wall, cpu = dict.fromkeys(calls, float("inf")), dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            before = -1
            while before != programs():
                before, start, used = programs(), time.perf_counter(), time.process_time()
                call()
                seconds, spent = time.perf_counter() - start, time.process_time() - used
            wall[name], cpu[name] = min(wall[name], seconds), min(cpu[name], spent)
    return wall, cpu


def programs() -> int:
    """How many programs the sampler and the server have compiled."""
    from models import sample, slots

    return sum(f._cache_size() for f in (sample._prefill, sample._decode, slots._admit, slots._advance, slots._resize))


def compare(name: str, fields: dict, callers: list[int], requests: int, new: int, repeats: int) -> list[dict]:
    """A row per number of callers, after that of ``alone``."""
    import threading

    import models
    from jaxrec import serve
    from jaxrec.serve_engine import Engine

    model, words = make_model(fields)
    prompts = make_prompts(words, requests)
    waits: dict[int, list[float]] = {}
    with Engine(model, max_batch=max(callers)) as engine:
        bound, server = serve.bind("127.0.0.1", 0), serve.server(engine, "m")
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"

        def alone() -> None:
            for prompt in prompts:
                models.generate(model, [prompt], max_new_tokens=new)

        def served(count: int):
            def call() -> None:
                waits[count] = ask(url, prompts, count, new)

            return call

        calls = {"alone": alone, **{str(count): served(count) for count in callers}}
        best, cpu = fastest(calls, repeats)
        first = first_part(url, prompts, new)
        server.should_exit = True
        thread.join()
    rows = []
    for key, seconds in best.items():
        rows.append(
            {
                "model": name,
                "callers": key,
                "requests_per_s": requests / seconds,
                "tokens_per_s": requests * new / seconds,
                "ratio": best["alone"] / seconds,
                "cpu_ratio": cpu["alone"] / cpu[key],
                "wait": seconds / requests if key == "alone" else statistics.median(waits[int(key)]),
                "first": first if key == "1" else None,
            }
        )
    return rows


def show(rows: list[dict]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="completions over HTTP, greedy")
    for column in (
        "model",
        "callers",
        "requests/s",
        "tokens/s",
        "ratio to alone",
        "by CPU s",
        "wait s",
        "first part s",
    ):
        table.add_column(column, justify="right")
    for r in rows:
        table.add_row(
            r["model"], r["callers"], f"{r['requests_per_s']:.2f}", f"{r['tokens_per_s']:.0f}", f"{r['ratio']:.2f}x",
            f"{r['cpu_ratio']:.2f}x", f"{r['wait']:.3f}", "" if r["first"] is None else f"{r['first']:.3f}",
        )  # fmt: skip
    Console().print(table)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, for checking that the script runs")
    parser.add_argument("--sizes", nargs="+", choices=list(decode.SIZES), default=["10M"])
    parser.add_argument("--callers", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=32, help="of each run, over all callers")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved runs; the fastest counts")
    parser.add_argument("--out", type=Path, default=Path("serve.json"), help="where the figures go as JSON")
    options = parser.parse_args(argv)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import jax

    sizes = decode.QUICK if options.quick else {name: decode.SIZES[name] for name in options.sizes}
    new, requests = (8, 8) if options.quick else (64, options.requests)
    rows = []
    for name, fields in sizes.items():
        rows += compare(name, fields, options.callers, requests, new, options.repeats)
    show(rows)
    report = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "device": jax.devices()[0].platform, "versions": {"jax": jax.__version__}, "repeats": options.repeats,
        "load_average": os.getloadavg()[0], "rows": rows,
    }  # fmt: skip
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    main()
