"""metrics.jsonl survives kills and resumes; the terminal line holds the numbers; phases are timed apart."""

import io
import json
import threading
import time

import pytest

from rl import metrics


def test_lines_append_and_resume_drops_only_later_lines_of_the_stage(tmp_path):
    with metrics.MetricsWriter(tmp_path, "sft", 3, console=False) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1 / step}, {"update": 0.5})
    rl = metrics.MetricsWriter(tmp_path, "rl", 4, console=False)
    for step in (1, 2, 3, 4):
        rl.write(step, {"reward": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "rl", "st')  # killed in the middle of a line
    rl.resume(2)
    rl.write(3, {"reward": 30.0})
    assert [r["reward"] for r in metrics.read_metrics(tmp_path, "rl")] == [1, 2, 30]
    sft = metrics.read_metrics(tmp_path, "sft")
    assert [r["step"] for r in sft] == [1, 2, 3]
    assert sft[0]["seconds"] == {"update": 0.5}
    assert set(sft[0]) == {"stage", "step", "time", "loss", "seconds"}


def test_resume_without_a_file_is_nothing(tmp_path):
    metrics.MetricsWriter(tmp_path / "new", "rl", console=False).resume(5)
    assert metrics.read_metrics(tmp_path / "new") == []


def test_not_a_number_stays_readable_json(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, "rl", console=False)
    writer.write(1, {"loss": float("nan"), "kl": float("inf")})

    def refuse(name):
        raise AssertionError(name)

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert record["loss"] == "nan"
    assert record["kl"] == "inf"


def test_reserved_names_and_broken_lines_are_errors(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, "rl", console=False)
    with pytest.raises(ValueError, match="'step' is a field"):
        writer.write(1, {"step": 2})
    (tmp_path / "metrics.jsonl").write_text("not json\n")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        writer.resume(0)


def test_plain_terminal_gets_one_line_per_step(tmp_path, capsys):
    with metrics.MetricsWriter(tmp_path, "rec_rl", 80, show=("reward", "absent")) as writer:
        writer.write(1, {"reward": 0.25, "hidden": 3.0}, {"rollout": 1.25, "update": 0.5})
    line = capsys.readouterr().err
    assert line == "rec_rl 1/80  reward 0.25  rollout 1.2s update 0.5s\n"


def test_interactive_terminal_gets_a_bar(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("sys.stderr", screen)
    with metrics.MetricsWriter(tmp_path, "sft", 4) as writer:
        for step in (1, 2, 3, 4):
            writer.write(step, {"loss": 0.125})
    assert "sft" in screen.getvalue()
    assert "4/4" in screen.getvalue()
    assert "loss 0.125" in screen.getvalue()


def test_phase_timer_adds_up_and_starts_over():
    timer = metrics.PhaseTimer()
    for _ in range(2):
        with timer("rollout"):
            time.sleep(0.01)
    with pytest.raises(RuntimeError), timer("update"):
        raise RuntimeError
    seconds = timer.take()
    assert seconds["rollout"] >= 0.02
    assert "update" in seconds
    assert timer.take() == {}


def test_writers_side_by_side_share_the_terminal_and_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.sys.stderr, "isatty", lambda: True, raising=False)
    with metrics.MetricsWriter(tmp_path, "a", 20) as one, metrics.MetricsWriter(tmp_path, "b", 20) as other:

        def work(writer):
            for step in range(1, 21):
                writer.write(step, {"loss": 1.0})
                if step == 10:
                    writer.resume(10)

        threads = [threading.Thread(target=work, args=(writer,)) for writer in (one, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert metrics._BARS is not None
    assert metrics._BARS is None
    for stage in ("a", "b"):
        assert [row["step"] for row in metrics.read_metrics(tmp_path, stage)] == list(range(1, 21))
