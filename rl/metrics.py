"""Where numbers go: metrics.jsonl, one progress line in the terminal, and a clock per phase. Process 0 only."""

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

FILE = "metrics.jsonl"
_LOCK = threading.RLock()  # writers of one process may work side by side on one file and one terminal
_BARS = None  # the terminal's bars, one per writer that shows one; rich allows one live display
_WRITERS = 0  # how many of them there are


class PhaseTimer:
    """Seconds spent per named phase.

        with timer("rollout"): ...
        timer.take()            # {"rollout": 1.2}, and start over

    JAX returns before the device is done: give the phase's result to :meth:`wait` or the time lands in a later phase.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    @staticmethod
    def wait(tree):
        """Block until the arrays in ``tree`` are computed; returns it."""
        return jax.block_until_ready(tree)

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        seconds, self.seconds = self.seconds, {}
        return seconds


def read_metrics(workdir: str | os.PathLike, stage: str | None = None) -> list[dict]:
    """Complete lines of ``workdir/metrics.jsonl``, of one stage or of all; a line cut off by a crash is left out."""
    path = Path(workdir) / FILE
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}); delete that line") from error
        if stage is None or record["stage"] == stage:
            records.append(record)
    return records


class MetricsWriter:
    """Appends ``{"stage", "step", "time", scalars..., "seconds": {phase: s}}`` lines and shows progress.

    stage: name written on every line. total: steps of this stage, for the bar and the ETA. show: scalars named in the
    terminal line, in this order, those present. console: False for silence. Only process 0 writes.
    Use as a context manager, so that the bar is closed when an error passes through.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        stage: str,
        total: int | None = None,
        *,
        show: tuple[str, ...] = ("loss", "reward"),
        console: bool = True,
    ):
        self.path, self.stage, self.total, self.show = Path(workdir) / FILE, stage, total, show
        self.enabled = jax.process_index() == 0
        self._console = console and self.enabled
        self._task = None
        if self.enabled:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def resume(self, step: int) -> None:
        """Forget this stage's lines after ``step``: they are about to be written again. Other stages' lines stay."""
        if not self.enabled or not self.path.exists():
            return
        with _LOCK:
            kept = [r for r in read_metrics(self.path.parent) if r["stage"] != self.stage or r["step"] <= step]
            draft = self.path.with_suffix(".tmp")
            draft.write_text("".join(json.dumps(record) + "\n" for record in kept))
            os.replace(draft, self.path)  # whole old file or whole new one, never half

    def write(self, step: int, scalars: Mapping[str, float], seconds: Mapping[str, float] | None = None) -> None:
        """One line for ``step`` (steps done, from 1). Raises ValueError for a name that the line itself uses."""
        if not self.enabled:
            return
        clash = {"stage", "step", "time", "seconds"} & set(scalars)
        if clash:
            raise ValueError(f"metric name {sorted(clash)[0]!r} is a field of the line itself; rename the metric")
        # JSON has no NaN or infinity, and readers other than Python's reject them.
        values = {k: v if math.isfinite(v) else str(v) for k, v in ((k, float(v)) for k, v in scalars.items())}
        record = {"stage": self.stage, "step": int(step), "time": round(time.time(), 3), **values}
        record["seconds"] = {name: round(s, 4) for name, s in (seconds or {}).items()}
        with _LOCK:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            if self._console:
                self._display(step, scalars, record["seconds"])

    def _display(self, step: int, scalars: Mapping[str, float], seconds: Mapping[str, float]) -> None:
        text = "  ".join(
            [f"{name} {float(scalars[name]):.4g}" for name in self.show if name in scalars]
            + [" ".join(f"{name} {s:.1f}s" for name, s in seconds.items())]
        )
        if not sys.stderr.isatty():  # a log file wants lines, not a bar redrawn in place
            print(f"{self.stage} {step}/{self.total or '?'}  {text}", file=sys.stderr, flush=True)
            return
        if self._task is None:
            self._start(step - 1)
        _BARS.update(self._task, completed=step, text=text)

    def _start(self, done: int) -> None:
        global _BARS, _WRITERS
        if _BARS is None:
            from rich import progress
            from rich.console import Console

            _BARS = progress.Progress(
                progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(), progress.TextColumn("eta"), progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[text]}"), console=Console(stderr=True),
            )  # fmt: skip
            _BARS.start()
        self._task, _WRITERS = _BARS.add_task(self.stage, total=self.total, completed=done, text=""), _WRITERS + 1

    def close(self) -> None:
        """Close the bar; writing again opens a new one."""
        global _BARS, _WRITERS
        with _LOCK:
            if self._task is None:
                return
            self._task, _WRITERS = None, _WRITERS - 1
            if not _WRITERS:
                _BARS.stop()
                _BARS = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()
