"""Any backend as a tool of rollouts: results kept on disk and replayed, asked once per batch, counted, on time."""

import collections
import dataclasses
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxrec.tools.search.base import (
    Backend,
    Result,
    answer_valid,
    check_request,
    failure,
    from_json,
    normalize_query,
    to_json,
)

_LATE_BATCHES = 4  # of worker threads that may still hang in earlier batches


@dataclasses.dataclass
class Counts:
    """Since the tool was made. queries = duplicates (of another query of their batch) + hits + calls + bad queries, and
    in replay misses in place of calls.

    hits: answered from the cache. calls: handed to the backend. empty: calls that found nothing. failures: queries by
    kind, duplicates included.
    """

    queries: int = 0
    duplicates: int = 0
    hits: int = 0
    calls: int = 0
    empty: int = 0
    failures: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


class ResultCache:
    """Results on disk: one JSON object a line, appended, never rewritten; only places in the file are kept in memory.

    A key is (backend id, normalised query, k); of equal keys the last one counts. A process that is killed leaves at
    most one torn line; ``dropped`` counts lines that are torn or damaged, which are passed over. Several processes may
    append to one file, but see each other's lines only when they open it anew.
    """

    def __init__(self, path: str | Path):
        self.path, self.dropped = Path(path), 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._places: dict[str, tuple[int, int]] = {}
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._torn = False  # whether the file ends inside a line
        self._read()

    def _read(self) -> None:
        place = 0
        with self.path.open("rb") as stream:
            for line in stream:
                if line.endswith(b"\n"):
                    self._note(line, place)
                else:
                    self._torn, self.dropped = True, self.dropped + 1
                place += len(line)

    def _note(self, line: bytes, place: int) -> None:
        if not line.strip():
            return
        try:
            record = json.loads(line)
            from_json(record)
            self._places[_key(record["backend"], record["query"], record["k"])] = (place, len(line))
        except (ValueError, KeyError, TypeError):
            self.dropped += 1

    def __len__(self) -> int:
        return len(self._places)

    def get(self, backend: str, query: str, k: int) -> Result | None:
        """The stored result, or None. ``query`` is normalised already."""
        place = self._places.get(_key(backend, query, k))
        if place is None:
            return None
        record = json.loads(os.pread(self._file, place[1], place[0]))
        if (record["backend"], record["query"], record["k"]) != (backend, query, k):
            raise ValueError(f"{self.path} was changed by something that does not append to it; open it anew")
        return from_json(record)

    def put(self, backend: str, query: str, k: int, result: Result) -> None:
        """Store a result. Raises ValueError for a failed one, OSError where the disk refuses."""
        record = {"backend": backend, "query": query, "k": k, "time": round(time.time(), 3), **to_json(result)}
        line = json.dumps(record).encode() + b"\n"
        with self._lock:
            # One write per record, so that lines of several processes do not mix; it goes to the end of the file,
            # wherever another process may have moved that.
            whole = (b"\n" if self._torn else b"") + line
            self._torn = True
            written = os.write(self._file, whole)
            if written != len(whole):
                raise OSError(f"{self.path}: only {written} of {len(whole)} bytes were written; is the disk full?")
            self._torn = False
            end = os.lseek(self._file, 0, os.SEEK_CUR)
            self._places[_key(backend, query, k)] = (end - len(line), len(line))

    def close(self) -> None:
        os.close(self._file)


def _key(backend: str, query: str, k: int) -> str:
    return json.dumps([backend, query, k])


@dataclasses.dataclass(frozen=True)
class Recorded:
    """The name of a backend that is not at hand, for replay: a key or an index need not be there."""

    id: str

    def search(self, queries: Sequence[str], k: int) -> list[Result]:
        return [failure("unavailable", f"the backend {self.id} is not here, only its recorded results are")] * len(
            queries
        )


class SearchTool:
    """A backend with a cache, replay, de-duplication within a batch, counts and a deadline; itself a backend.

    cache: where results are kept; failures never are. replay: serve from the cache alone; a miss is a failure of kind
    "unavailable". deadline_s: seconds after which the queries of a batch that have no answer fail with "timeout"; 0
    is without. split: queries per call of the backend under a deadline (0: the whole batch in one call, which then
    stands or falls together); ``workers`` such calls run at a time. A call that is late goes on in its thread and its
    answer is discarded.
    """

    def __init__(
        self, backend: Backend, cache: ResultCache | None = None, *, replay: bool = False, deadline_s: float = 0,
        split: int = 0, workers: int = 16,
    ):  # fmt: skip
        if replay and cache is None:
            raise ValueError("replay=True serves from a cache: give one")
        if deadline_s < 0 or split < 0 or workers < 1:
            raise ValueError(f"deadline_s={deadline_s} and split={split} must not be negative, workers={workers} < 1")
        self.backend, self.cache, self.replay = backend, cache, replay
        self.deadline_s, self.split, self.workers = deadline_s, split, workers
        self.id, self.counts = backend.id, Counts()
        self._lock, self._running = threading.Lock(), 0

    def search(self, queries: Sequence[str], k: int) -> list[Result]:
        """One result per query, in order. The backend gets normalised queries. Raises TypeError, ValueError for
        mistakes of the caller, as the backend does."""
        check_request(queries, k, getattr(self.backend, "size", None))
        texts = [normalize_query(query) for query in queries]
        results = answer_valid(texts, lambda asked: self._answer(asked, k))
        with self._lock:
            self.counts.queries += len(queries)
            self.counts.failures.update(result.kind for result in results if result.failed)
        return results

    def _answer(self, texts: list[str], k: int) -> list[Result]:
        distinct = list(dict.fromkeys(texts))
        known = {text: self.cache.get(self.id, text, k) for text in distinct} if self.cache is not None else {}
        found = {text: result for text, result in known.items() if result is not None}
        missing = [text for text in distinct if text not in found]
        with self._lock:
            self.counts.duplicates += len(texts) - len(distinct)
            self.counts.hits += len(found)
            self.counts.calls += 0 if self.replay else len(missing)
        if self.replay:
            fresh = [failure("unavailable", f"replay: no result of {self.id} for this query with k={k}")] * len(missing)
        else:
            fresh = self._ask(missing, k) if missing else []
            self._keep(missing, k, fresh)
        found |= zip(missing, fresh, strict=True)
        return [found[text] for text in texts]

    def _keep(self, texts: Sequence[str], k: int, results: Sequence[Result]) -> None:
        with self._lock:
            self.counts.empty += sum(result.passages == () for result in results)
        for text, result in zip(texts, results, strict=True):
            if self.cache is not None and not result.failed:
                self.cache.put(self.id, text, k, result)

    def _ask(self, texts: list[str], k: int) -> list[Result]:
        if not self.deadline_s:
            return _call(self.backend, texts, k)
        size = self.split or len(texts)
        parts = [texts[i : i + size] for i in range(0, len(texts), size)]
        workers = min(self.workers, len(parts))
        with self._lock:
            if self._running + workers > _LATE_BATCHES * self.workers:
                hanging = failure("unavailable", f"{self._running} earlier calls of {self.id} still hang")
                return [hanging] * len(texts)
            self._running += workers
        answers = self._in_threads(parts, k, workers)
        late = failure("timeout", f"no answer within {self.deadline_s:g} s")
        return [result for n, part in enumerate(parts) for result in answers.get(n, [late] * len(part))]

    def _in_threads(self, parts: list[list[str]], k: int, workers: int) -> dict[int, list[Result]]:
        """Answers by number of the part, of those that came in time. Raises what a call raised."""
        todo: queue.SimpleQueue = queue.SimpleQueue()
        done: queue.SimpleQueue = queue.SimpleQueue()
        over = threading.Event()
        for numbered in enumerate(parts):
            todo.put(numbered)

        def work() -> None:
            try:
                while not over.is_set():
                    number, part = todo.get_nowait()
                    done.put((number, _attempt(lambda: _call(self.backend, part, k))))  # noqa: B023
            except queue.Empty:
                pass
            finally:
                with self._lock:
                    self._running -= 1

        end = time.monotonic() + self.deadline_s
        for _ in range(workers):  # daemons: a call that hangs must not keep the process alive
            threading.Thread(target=work, daemon=True).start()
        answers: dict[int, list[Result]] = {}
        try:
            while len(answers) < len(parts):
                number, (value, error) = done.get(timeout=max(end - time.monotonic(), 0.0))
                if error is not None:
                    raise error
                answers[number] = value
        except queue.Empty:
            pass
        finally:
            over.set()
        return answers


def _call(backend: Backend, texts: Sequence[str], k: int) -> list[Result]:
    results = backend.search(texts, k)
    if len(results) != len(texts):
        raise RuntimeError(f"{backend.id} gave {len(results)} results for {len(texts)} queries")
    return results


def _attempt(call: Callable[[], list[Result]]) -> tuple[list[Result] | None, BaseException | None]:
    try:
        return call(), None
    except BaseException as error:  # raised again by the thread that waits
        return None, error
