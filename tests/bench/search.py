"""Search tools: queries a second beside loops without them, and what an index of a synthetic corpus costs to build.

    python tests/bench/search.py [--quick] [--passages 200000] [--queries 64] [--repeats 3] [--parts build bm25 dense]

Passages are 60 words drawn by Zipf's law from 100,000, queries 6 words of one passage each; k is 10. ``build``: CPU
seconds and memory at the peak (by which the process grew) of the store and of BM25's index, and their size on disk, per
million passages. ``bm25``: ours with the passages read, bm25s' own retrieval of numbers alone, and one query at a time
over lists of (passage, score) in plain Python. ``dense``: vectors of width 384, ours with all queries in one call on
JAX's devices, numpy one query at a time, and numpy with all of them. Sides take turns; the fastest of each counts, by
wall clock and by CPU seconds of all threads, which say more where the machine is shared.
"""

import argparse
import functools
import heapq
import importlib.util
import json
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]  # models.py here is no package
_spec = importlib.util.spec_from_file_location("bench_models", Path(__file__).with_name("models.py"))
bench = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bench)

_K, _WORDS, _LENGTH, _DIM = 10, 100_000, 60, 384


def corpus(count: int) -> Iterator:
    from jaxrec.tools.search import Passage

    rng = np.random.default_rng(0)
    weights = np.cumsum(1 / np.arange(1, _WORDS + 1))
    for start in range(0, count, 10_000):
        size = min(10_000, count - start)
        words = np.searchsorted(weights, rng.random((size, _LENGTH)) * weights[-1])
        for i, row in enumerate(words.tolist()):
            yield Passage(str(start + i), f"title {start + i}", " ".join(f"w{word}" for word in row))


def _grown(make) -> tuple[object, float, float]:
    """(what ``make`` gives, CPU seconds, bytes by which the process's peak grew)."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    value = make()
    seconds = time.process_time() - start
    return value, seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024.0


def build(folder: Path, count: int):
    """(store, BM25 search, rows of the table)."""
    import bm25s  # noqa: F401  (not part of what is timed)

    from jaxrec.tools.search import build_store
    from jaxrec.tools.search.bm25 import build_bm25

    rows = []
    store, *cost = _grown(lambda: build_store(corpus(count), folder / "store"))
    rows.append(("store, with making the text", *cost, folder / "store"))
    search, *cost = _grown(lambda: build_bm25(store, folder / "bm25"))
    rows.append(("BM25", *cost, folder / "bm25"))
    per_million = 1e6 / count / 1e9
    table = [
        {
            "index": name, "passages": count, "CPU_s_per_million": seconds * 1e6 / count,
            "peak_GB_per_million": peak * per_million,
            "disk_GB_per_million": sum(f.stat().st_size for f in path.iterdir()) * per_million,
        }
        for name, seconds, peak, path in rows
    ]  # fmt: skip
    return store, search, table


def _rates(calls: dict, repeats: int, queries: int) -> list[dict]:
    best = {name: [float("inf")] * 2 for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter(), time.process_time()
            call()
            took = time.perf_counter() - start[0], time.process_time() - start[1]
            best[name] = [min(pair) for pair in zip(best[name], took)]
    ours = best["ours"]
    return [
        {
            "side": name, "queries/s": queries / wall, "ours_is": f"{wall / ours[0]:.2f}x",
            "queries/CPU_s": queries / cpu, "ours_is_by_CPU": f"{cpu / ours[1]:.2f}x",
        }
        for name, (wall, cpu) in best.items()
    ]  # fmt: skip


def _python_loop(postings: dict[str, list[tuple[int, float]]], queries: list[list[str]]) -> list:
    found = []
    for words in queries:
        sums = defaultdict(float)
        for word in words:
            for row, score in postings.get(word, ()):
                sums[row] += score
        found.append(heapq.nsmallest(_K, sums.items(), key=lambda item: (-item[1], item[0])))
    return found


def bm25(folder: Path, store, search, queries: list[str], repeats: int) -> list[dict]:
    import bm25s

    words = [search._tokenize(query) for query in queries]
    postings = {}
    for word in {word for query in words for word in query}:
        column = slice(search._starts[search._vocabulary[word]], search._starts[search._vocabulary[word] + 1])
        postings[word] = list(zip(search._rows[column].tolist(), search._scores[column].tolist()))
    peer = bm25s.BM25.load(str(folder / "bm25"), mmap=True)
    calls = {
        "ours": lambda: search.search(queries, _K),
        "bm25s": lambda: peer.retrieve(words, k=_K, show_progress=False, backend_selection="numpy"),
        "plain Python": lambda: _python_loop(postings, words),
    }
    scores = [[p.score for p in result.passages] for result in calls["ours"]()]
    np.testing.assert_allclose(scores, calls["bm25s"]().scores, rtol=1e-5)
    np.testing.assert_allclose(scores, [[s for _, s in found] for found in calls["plain Python"]()], rtol=1e-5)
    return _rates(calls, repeats, len(queries))


def _numpy_top(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    scores = query @ vectors.T
    best = np.argpartition(scores, -_K, axis=-1)[..., -_K:]
    return np.sort(np.take_along_axis(scores, best, -1), axis=-1)[..., ::-1]


def dense(folder: Path, store, count: int, repeats: int) -> list[dict]:
    from jaxrec.tools.search.dense import DenseSearch, Embedder, build_dense

    draw = np.random.default_rng(0)
    embedder = Embedder("noise", lambda texts: draw.standard_normal((len(texts), _DIM), np.float32))
    build_dense(store, folder / "dense", embedder)
    search = DenseSearch(store, folder / "dense", embedder)
    vectors = np.concatenate([np.load(path) for path in sorted((folder / "dense").glob("*.npy"))])
    queries = embedder.unit([""] * count)
    calls = {
        "ours": lambda: search.top_k(queries, _K)[0],
        "numpy, one at a time": lambda: np.stack([_numpy_top(vectors, query) for query in queries]),
        "numpy, all at once": lambda: _numpy_top(vectors, queries),
    }
    np.testing.assert_allclose(calls["ours"](), calls["numpy, all at once"](), atol=1e-5)
    return _rates(calls, repeats, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,000 passages, one repeat")
    parser.add_argument("--passages", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=["build", "bm25", "dense"])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    count, repeats = (2_000, 1) if given.quick else (given.passages, given.repeats)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store, search, table = build(folder, count)
        rng = np.random.default_rng(1)
        queries = [
            " ".join(rng.choice(store[int(row)].text.split(), 6, replace=False))
            for row in rng.integers(0, count, given.queries)
        ]
        parts = {
            "build": lambda: table,
            "bm25": functools.partial(bm25, folder, store, search, queries, repeats),
            "dense": functools.partial(dense, folder, store, given.queries, repeats),
        }
        found = {}
        for part in given.parts:
            found[part] = parts[part]()
            bench.show(part, found[part])
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
