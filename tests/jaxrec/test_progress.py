"""Lines in a log file, silence inside another; a bar in a terminal."""

import gzip
import io
import sys
import time
from types import SimpleNamespace

import pytest

from jaxrec import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves a second each time it is read."""
    seconds = iter(range(10**6))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))


def test_a_log_file_gets_a_line_now_and_then(clock, capsys):
    assert list(progress.track(range(100), "words")) == list(range(100))
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 20
    done = [int(line.removeprefix("words ").removesuffix("/100")) for line in lines]
    assert done == sorted(done)
    assert 0 < done[0] < done[-1] <= 100
    list(progress.track(iter(range(100)), "words"))
    assert capsys.readouterr().err.splitlines()[0].endswith("/?")


def test_only_the_outermost_is_shown(clock, capsys):
    with progress.progress(3, "outer"):
        assert list(progress.track(range(100), "inner")) == list(range(100))
    assert capsys.readouterr().err == ""
    with pytest.raises(RuntimeError), progress.progress(3, "outer"):
        raise RuntimeError
    list(progress.track(range(100), "later"))
    assert "later" in capsys.readouterr().err


@pytest.mark.parametrize("pack", [open, gzip.open])
def test_lines_of_a_file_by_its_bytes(clock, capsys, tmp_path, pack):
    path = tmp_path / "x"
    with pack(path, "wb") as file:
        file.write(b"some words\n" * 70_000)
    with pack(path, "rb") as file:
        assert list(progress.track_lines(file, path)) == [b"some words\n"] * 70_000
    done, total = capsys.readouterr().err.splitlines()[-1].removeprefix("x ").split("/")
    assert 0 < int(done) <= int(total) == path.stat().st_size


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_AFTER", 0.0)
    with progress.progress(10, "asking") as step:
        step()
        step(4)
        end = time.monotonic() + 300
        while "50%" not in terminal.getvalue():
            assert time.monotonic() < end
            time.sleep(0.01)
    assert "asking" in terminal.getvalue()
