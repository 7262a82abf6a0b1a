"""A bar in the terminal for whatever takes more than a few seconds, and a line now and then in a log file."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

_AFTER = 3.0  # seconds; what is over sooner needs no bar
_LINE_EVERY = 30.0  # seconds between lines in a log file
_STEP_EVERY = 0.1  # seconds between two looks at a loop whose rounds are short
_SHOWING = threading.Lock()  # only the outermost shows anything: a teacher around a teacher is asked the same things


@contextlib.contextmanager
def progress(total: int | None, label: str) -> Iterator[Callable[..., None]]:
    """Gives a function to call after each piece of work, from any thread, with the number of pieces if that is not 1.
    Inside another one it does nothing."""
    if not _SHOWING.acquire(blocking=False):
        yield lambda pieces=1: None
        return
    try:
        bar = (_Bar if sys.stderr.isatty() else _Log)(total, label)
        try:
            yield bar.step
        finally:
            bar.close()
    finally:
        _SHOWING.release()


def track(items: Iterable, label: str, total: int | None = None) -> Iterator:
    """``items`` with :func:`progress` of their number."""
    total = len(items) if total is None and hasattr(items, "__len__") else total
    with progress(total, label) as step:
        last, pieces = time.monotonic(), 0
        for item in items:
            yield item
            pieces += 1
            if time.monotonic() - last > _STEP_EVERY:
                step(pieces)
                last, pieces = time.monotonic(), 0
        step(pieces)


def track_lines(stream: IO[bytes], path: Path) -> Iterator[bytes]:
    """Lines of an open file with :func:`progress` of its bytes, packed ones where it is packed."""
    raw, told = getattr(stream, "fileobj", stream), 0
    with progress(path.stat().st_size, path.name) as step:
        for number, line in enumerate(stream):
            if number % 1000 == 0:
                step(raw.tell() - told)
                told = raw.tell()
            yield line


class _Log:
    def __init__(self, total: int | None, label: str):
        self._total, self._label, self._done = total, label, 0
        self._last, self._lock = time.monotonic(), threading.Lock()

    def step(self, pieces: int = 1) -> None:
        with self._lock:
            self._done += pieces
            if time.monotonic() - self._last > _LINE_EVERY:
                self._last = time.monotonic()
                print(f"{self._label} {self._done}/{self._total or '?'}", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class _Bar:
    def __init__(self, total: int | None, label: str):
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task(label, total=total)
        self._lock, self._shown = threading.Lock(), False
        self._timer = threading.Timer(_AFTER, self._show)  # also where the first answer itself takes long
        self._timer.daemon = True
        self._timer.start()

    def _show(self) -> None:
        with self._lock:
            if not self._shown:
                self._shown = True
                self._progress.start()

    def step(self, pieces: int = 1) -> None:
        self._progress.advance(self._task, pieces)

    def close(self) -> None:
        self._timer.cancel()
        with self._lock:
            if self._shown:
                self._progress.stop()
            self._shown = True  # a timer that was already under way must not begin
