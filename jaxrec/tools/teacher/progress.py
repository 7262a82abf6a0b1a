"""One bar in the terminal while a teacher is asked, for whatever takes more than a few seconds."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

_AFTER = 3.0  # seconds; what is answered sooner needs no bar
_SHOWING = threading.Lock()  # the outermost of teachers around teachers shows the bar


@contextlib.contextmanager
def progress(total: int, label: str) -> Iterator[Callable[[], None]]:
    """Gives a function to call once per answer, from any thread. Silent where no one watches and inside another."""
    if not sys.stderr.isatty() or not _SHOWING.acquire(blocking=False):
        yield lambda: None
        return
    try:
        bar = _Bar(total, label)
        try:
            yield bar.step
        finally:
            bar.close()
    finally:
        _SHOWING.release()


class _Bar:
    def __init__(self, total: int, label: str):
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task(label, total=total)
        self._start, self._lock, self._shown = time.monotonic(), threading.Lock(), False
        self._timer = threading.Timer(_AFTER, self._show)  # also where the first answer itself takes long
        self._timer.daemon = True
        self._timer.start()

    def _show(self) -> None:
        with self._lock:
            if not self._shown:
                self._shown = True
                self._progress.start()

    def step(self) -> None:
        self._progress.advance(self._task)

    def close(self) -> None:
        self._timer.cancel()
        with self._lock:
            if self._shown:
                self._progress.stop()
            self._shown = True  # a timer that was already under way must not begin
