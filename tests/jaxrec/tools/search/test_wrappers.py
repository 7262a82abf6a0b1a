"""Cache, replay, de-duplication, counts and deadline around a backend."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from jaxrec.tools.search import Passage, Recorded, Result, ResultCache, SearchTool, failure, wrappers


class Backend:
    """Answers with the query itself; "fail ..." fails, "none" finds nothing, "slow" waits for ``gate``."""

    id = "toy:1"

    def __init__(self):
        self.asked: list[list[str]] = []
        self.gate = threading.Event()

    def search(self, queries, k):
        self.asked.append(list(queries))
        return [self.one(query, k) for query in queries]

    def one(self, query, k):
        if query.startswith("fail"):
            return failure(query.split()[1], "as asked")
        if query == "slow":
            self.gate.wait()
        if query == "broken":
            raise RuntimeError("a fault of the backend")
        return Result(
            () if query == "none" else tuple(Passage(f"{query}{i}", "t", "x\ud800é", 1 / 3) for i in range(k))
        )


def test_a_batch_is_normalised_deduplicated_and_counted(tmp_path):
    backend, cache = Backend(), ResultCache(tmp_path / "cache.jsonl")
    tool = SearchTool(backend, cache)
    first = tool.search(["a", "  b  c ", "a", "b c", " ", "none", "fail quota", "fail quota"], 2)
    assert backend.asked == [["a", "b c", "none", "fail quota"]]
    assert [r.passages and r.passages[0].id for r in first] == ["a0", "b c0", "a0", "b c0", None, (), None, None]
    assert [r.kind for r in first] == ["", "", "", "", "bad_query", "", "quota", "quota"]
    counts = tool.counts
    assert (counts.queries, counts.duplicates, counts.hits, counts.calls, counts.empty) == (8, 3, 0, 4, 1)
    assert counts.failures == {"bad_query": 1, "quota": 2}
    assert counts.queries == counts.duplicates + counts.hits + counts.calls + counts.failures["bad_query"]

    assert tool.search(["b c", "fail quota", "none"], 2) == [first[1], first[6], first[5]]
    assert backend.asked[1:] == [["fail quota"]]  # a failure is asked again, an empty result is not
    tool.search(["a"], 3)  # another k is another question
    assert backend.asked[2:] == [["a"]]
    other = SearchTool(Backend(), cache)
    other.id = "toy:2"
    other.search(["a"], 2)
    assert other.backend.asked == [["a"]]


def test_replay_serves_from_the_file_alone(tmp_path):
    backend = Backend()
    fresh = SearchTool(backend, ResultCache(tmp_path / "cache.jsonl")).search(["a", "none", "fail timeout"], 2)
    replay = SearchTool(Recorded("toy:1"), ResultCache(tmp_path / "cache.jsonl"), replay=True)
    again = replay.search(["a", "none", "fail timeout", "new"], 2)
    assert again[:2] == fresh[:2]  # scores and texts to the last bit
    assert [r.kind for r in again[2:]] == ["unavailable"] * 2
    assert "replay" in again[3].error
    assert (replay.counts.calls, replay.counts.hits) == (0, 2)
    assert len(backend.asked) == 1
    with pytest.raises(ValueError, match="give one"):
        SearchTool(backend, replay=True)
    assert Recorded("x").search(["q"], 1)[0].kind == "unavailable"


@pytest.mark.parametrize("cut", [1, 30])
def test_a_torn_line_is_dropped_and_counted(tmp_path, cut):
    path = tmp_path / "cache.jsonl"
    cache = ResultCache(path)
    for query in ("a", "b"):
        cache.put("toy:1", query, 1, Result((Passage(query, "", ""),)))
    cache.close()
    path.write_bytes(path.read_bytes()[:-cut])
    cache = ResultCache(path)
    assert (len(cache), cache.dropped) == (1, 1)
    assert cache.get("toy:1", "b", 1) is None
    cache.put("toy:1", "b", 1, Result((Passage("B", "", ""),)))
    cache.put("toy:1", "a", 1, Result((Passage("A", "", ""),)))
    assert cache.get("toy:1", "b", 1).passages[0].id == "B"
    cache = ResultCache(path)  # the torn line stays, and stays passed over
    assert [cache.get("toy:1", q, 1).passages[0].id for q in "ab"] == ["A", "B"]
    assert len(cache) == 2
    with path.open("a") as file:
        file.write('{"backend": "toy:1", "query": "c", "k": 1, "passages": [["only", "four", "x", 1]]}\n[1]\n')
    assert ResultCache(path).dropped == cache.dropped + 2
    with pytest.raises(ValueError, match="not stored"):
        cache.put("toy:1", "c", 1, failure("auth", "no"))


def test_what_was_put_survives_a_kill(tmp_path):
    code = (
        "import sys\nfrom jaxrec.tools.search import *\n"
        f"cache = ResultCache({str(tmp_path / 'cache.jsonl')!r})\n"
        "for i in range(10**9):\n"
        "    cache.put('b', str(i), 1, Result((Passage(str(i), 't', 'x' * 5000),)))\n"
        "    print(i, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, bufsize=0)
    while int(process.stdout.readline()) < 50:
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    cache = ResultCache(tmp_path / "cache.jsonl")
    assert len(cache) >= 51
    assert cache.dropped <= 1
    assert all(cache.get("b", str(i), 1).passages[0].id == str(i) for i in range(51))


def test_two_processes_may_append_to_one_file(tmp_path):
    path = tmp_path / "cache.jsonl"
    one, two = ResultCache(path), ResultCache(path)
    for i in range(5):
        one.put("b", f"one {i}", 1, Result((Passage("1", "", "x" * i),)))
        two.put("b", f"two {i}", 1, Result((Passage("2", "", "y" * i),)))
    assert [one.get("b", f"one {i}", 1).passages[0].text for i in range(5)] == ["x" * i for i in range(5)]
    assert [two.get("b", f"two {i}", 1).passages[0].text for i in range(5)] == ["y" * i for i in range(5)]
    assert len(ResultCache(path)) == 10
    assert {"backend", "query", "k", "time"} < set(json.loads(path.read_text().splitlines()[0]))


def test_a_slow_query_fails_alone(tmp_path, monkeypatch):
    """The clock, read at the start and before each answer, stands still until four are there; then time is over."""
    ticks = itertools.chain([0.0] * 5, itertools.repeat(1e6))
    monkeypatch.setattr(wrappers, "time", SimpleNamespace(monotonic=lambda: next(ticks), time=lambda: 0.0))
    backend, cache = Backend(), ResultCache(tmp_path / "cache.jsonl")
    tool = SearchTool(backend, cache, deadline_s=60, split=1, workers=2)
    try:
        results = tool.search(["a", "slow", "b", "c", "d"], 1)
        assert [r.kind for r in results] == ["", "timeout", "", "", ""]
        assert [r.passages[0].id for r in results if not r.failed] == ["a0", "b0", "c0", "d0"]
        assert cache.get("toy:1", "slow", 1) is None
    finally:
        backend.gate.set()
    ticks = itertools.repeat(0.0)
    assert not tool.search(["slow"], 1)[0].failed


def test_calls_that_hang_are_bounded():
    backend = Backend()
    tool = SearchTool(backend, deadline_s=0.05, split=1, workers=1)
    try:
        kinds = [tool.search(["slow"], 1)[0].kind for _ in range(6)]
        assert kinds == ["timeout"] * 4 + ["unavailable"] * 2
    finally:
        backend.gate.set()


def test_faults_and_mistakes_are_raised():
    for tool in (SearchTool(Backend()), SearchTool(Backend(), deadline_s=60, split=1)):
        with pytest.raises(RuntimeError, match="a fault"):
            tool.search(["a", "broken"], 1)
        with pytest.raises(TypeError, match="got one string"):
            tool.search("a", 1)
        for k in (0, -1, True, 1.0):
            with pytest.raises(ValueError, match="k="):
                tool.search(["a"], k)
        with pytest.raises(TypeError, match="query 1 is int"):
            tool.search(["a", 3], 1)
        assert tool.search([], 1) == []
    with pytest.raises(ValueError, match="workers"):
        SearchTool(Backend(), workers=0)
