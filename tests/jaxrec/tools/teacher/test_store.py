"""What is stored is not asked again: over runs, kills, threads and processes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxrec.tools.teacher import (
    Failure,
    Reply,
    Sampling,
    ScriptedTeacher,
    StoredTeacher,
    TokenLogprob,
    Usage,
    ask_text,
    request_hash,
)

ROOT = Path(__file__).resolve().parents[4]


class Echo:
    """Replies with the text in capitals; fails on those named; counts what it is asked."""

    id = "echo"

    def __init__(self, failing=(), wait=0.0):
        self.failing, self.wait, self.asked = set(failing), wait, []

    def ask(self, requests, done=None):
        out = []
        for number, request in enumerate(requests):
            text = request.messages[-1].content
            self.asked.append(text)
            time.sleep(self.wait)
            known = TokenLogprob("T", -0.5, (("T", -0.5), ("F", -1.0)))
            reply = Reply((text.upper(),), ("stop",), Usage(3, 2), ((known,),))
            out.append(Failure("timeout", "late") if text in self.failing else reply)
            if done is not None:
                done(number, out[-1])
        return out


def asks(*texts, **sampling):
    return [ask_text("summariser", text, sampling=Sampling(**sampling)) for text in texts]


def test_a_second_run_asks_only_what_failed(tmp_path):
    path = tmp_path / "replies.jsonl"
    first = StoredTeacher(Echo(failing=["b"]), path)
    out = first.ask(asks("a", "b", "c"))
    assert [type(answer) for answer in out] == [Reply, Failure, Reply]
    assert first.counts.scalars() == {
        "asked": 3, "stored": 0, "shared": 0, "torn": 0, "prompt_tokens": 6, "completion_tokens": 4,
        "failed_timeout": 1, "role_summariser": 3,
    }  # fmt: skip
    inner = Echo()
    second = StoredTeacher(inner, path)
    heard = []
    again = second.ask(asks("c", "b", "a"), lambda number, answer: heard.append((number, answer.text)))
    assert inner.asked == ["b"]
    assert again[0] == out[2]  # log-probs and usage included
    assert again[2] == out[0]
    assert sorted(heard) == [(0, "C"), (1, "B"), (2, "A")]
    assert (second.counts.stored, second.counts.asked) == (2, 1)
    assert len(StoredTeacher(Echo(), path)) == 3


def test_the_hash_covers_all_that_makes_a_reply_another_one(tmp_path):
    request = ask_text("judge", "x")
    others = [
        ask_text("author", "x"), ask_text("judge", "y"), ask_text("judge", "x", system="s"), request.replace(seed=1),
        request.replace(temperature=0.5), request.replace(top_p=0.9), request.replace(top_k=3),
        request.replace(max_tokens=9), request.replace(stop=("a",)), request.replace(logprobs=2),
        request.replace(n=2), request.replace(seed=None),
    ]  # fmt: skip
    hashes = {request_hash(r, "t") for r in (request, *others)} | {request_hash(request, "u")}
    assert len(hashes) == len(others) + 2
    assert request_hash(ask_text("judge", "x"), "t") == request_hash(request, "t")
    assert request_hash(request.replace(temperature=0), "t") == request_hash(request, "t")
    # Fixed: what runs stored before must be found by later versions.
    text = (
        '{"messages": [{"content": "x", "role": "user"}], "n": 1, "role": "judge", "sampling": {"logprobs": null, '
        '"max_tokens": 1024, "seed": 0, "stop": [], "temperature": 0.0, "top_k": 0, "top_p": 1.0}, "teacher": "t"}'
    )
    assert request_hash(request, "t") == hashlib.sha256(text.encode()).hexdigest()


def test_the_same_request_twice_is_asked_once(tmp_path):
    inner = Echo()
    stored = StoredTeacher(inner, tmp_path / "r.jsonl")
    assert [reply.text for reply in stored.ask(asks("a", "b", "a"))] == ["A", "B", "A"]
    assert inner.asked == ["a", "b"]
    assert stored.counts.shared == 1


def test_threads_share_what_is_on_its_way(tmp_path):
    inner = Echo(wait=0.02)
    stored = StoredTeacher(inner, tmp_path / "r.jsonl")
    texts = [str(i) for i in range(10)]
    outs: list = [None] * 4

    def run(k):
        outs[k] = [reply.text for reply in stored.ask(asks(*texts[k:], *texts[:k]))]

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert outs == [[*texts[k:], *texts[:k]] for k in range(4)]
    assert sorted(inner.asked) == texts
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 10


def test_a_torn_last_line_is_counted_taken_out_and_asked_again(tmp_path):
    path = tmp_path / "r.jsonl"
    StoredTeacher(Echo(), path).ask(asks("a", "b"))
    whole = path.read_bytes()
    for cut in (len(whole) - 1, whole.index(b"\n") + 1 + 40):
        path.write_bytes(whole[:cut])
        inner = Echo()
        stored = StoredTeacher(inner, path)
        assert stored.counts.torn == 1
        stored.ask(asks("a", "b"))
        assert inner.asked == ["b"]
        assert path.read_bytes() == whole
    path.write_bytes(b'{"hash": "')
    assert StoredTeacher(Echo(), path).counts.torn == 1
    assert path.read_bytes() == b""


def test_another_process_killed_meanwhile_spoils_nothing(tmp_path):
    path = tmp_path / "r.jsonl"
    stored = StoredTeacher(Echo(), path)
    stored.ask(asks("a"))
    with path.open("ab") as file:
        file.write(b'{"hash": "12')
    stored.ask(asks("b"))
    assert stored.counts.torn == 1
    assert len(StoredTeacher(Echo(), path)) == 2


KILLED = """
import sys
from tests.jaxrec.tools.teacher.test_store import Echo, asks
from jaxrec.tools.teacher import StoredTeacher
stored = StoredTeacher(Echo(wait=0.01), sys.argv[1])
stored.ask(asks(*(f"{sys.argv[2]}{i}" + "x" * 2000 for i in range(300))))
"""


def test_killed_and_concurrent_processes_lose_nothing_that_was_stored(tmp_path):
    """Two processes write one file and are killed with -9; what they stored is there, and only the rest is asked."""
    path = tmp_path / "r.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    workers = [
        subprocess.Popen([sys.executable, "-c", KILLED, str(path), name], cwd=ROOT, env=environment) for name in "ab"
    ]
    deadline = time.monotonic() + 600
    while not path.exists() or len({line[-60:] for line in path.read_bytes().splitlines()}) < 1 or min(
        path.read_bytes().count(b'"content": "%c' % name) for name in b"ab"
    ) < 20:  # fmt: skip
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for worker in workers:
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    inner = Echo()
    stored = StoredTeacher(inner, path)
    kept = len(stored)
    assert kept >= 40
    texts = [f"{name}{i}" + "x" * 2000 for name in "ab" for i in range(300)]
    assert [reply.text for reply in stored.ask(asks(*texts))] == [text.upper() for text in texts]
    assert len(inner.asked) == 600 - kept
    assert len(StoredTeacher(Echo(), path)) == 600


def test_a_teacher_that_breaks_off_keeps_what_it_had_said(tmp_path):
    class Breaks(Echo):
        def ask(self, requests, done=None):
            super().ask(requests[:2], done)
            raise ConnectionError("gone")

    path = tmp_path / "r.jsonl"
    stored = StoredTeacher(Breaks(), path)
    with pytest.raises(ConnectionError):
        stored.ask(asks("a", "b", "c"))
    assert len(stored) == 2
    inner = Echo()
    resumed = StoredTeacher(inner, path)
    assert [reply.text for reply in resumed.ask(asks("a", "b", "c"))] == ["A", "B", "C"]
    assert inner.asked == ["c"]


def test_what_a_listener_raises_is_raised(tmp_path):
    stored = StoredTeacher(Echo(), tmp_path / "r.jsonl")

    def listen(number, answer):
        raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        stored.ask(asks("a"), listen)
    assert len(stored) == 1


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    stored = StoredTeacher(Echo(), path)
    stored.ask(asks("a"))
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        stored.ask(asks("b"))
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", ["no json", "[]", '{"hash": "x"}', '{"hash": 1, "reply": {}}',
                                  '{"hash": "x", "reply": {"texts": [], "finish": [], "usage": {}}}'])  # fmt: skip
def test_a_wrong_line_is_named(tmp_path, line):
    path = tmp_path / "r.jsonl"
    StoredTeacher(Echo(), path).ask(asks("a"))
    path.write_bytes(path.read_bytes() + line.encode() + b"\n")
    with pytest.raises(ValueError, match=r"r\.jsonl:2 .*delete that line"):
        StoredTeacher(Echo(), path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        StoredTeacher(Echo(), tmp_path / "none" / "r.jsonl")


def test_lines_can_be_audited(tmp_path):
    path = tmp_path / "r.jsonl"
    StoredTeacher(Echo(), path).ask(asks("größe"))
    entry = json.loads(path.read_text())
    assert entry["teacher"] == "echo"
    assert entry["request"]["messages"] == [{"role": "user", "content": "größe"}]
    assert entry["request"]["role"] == "summariser"
    assert entry["reply"]["texts"] == ["GRÖSSE"]


def test_scripted_teachers_err_at_their_rate_and_repeatably():
    def judge(request, choice):
        return "True"

    def wrong(request, text):
        return f"not {text}"

    teacher = ScriptedTeacher({"judge": judge, "author": lambda r, c: f"{c}: a long text", "annotator": judge},
                              error_rate=0.2, wrong={"annotator": wrong})  # fmt: skip
    requests = [ask_text("judge", str(i)) for i in range(1000)]
    texts = [reply.text for reply in teacher.ask(requests)]
    assert set(texts) == {"True", "False"}
    assert 150 <= texts.count("False") <= 250  # four deviations of a binomial
    assert teacher.errors == texts.count("False")
    assert [reply.text for reply in teacher.ask(requests[::-1])] == texts[::-1]
    reseeded = [reply.text for reply in teacher.ask([r.replace(seed=1) for r in requests])]
    assert reseeded != texts
    other = teacher.ask([ask_text("annotator", str(i)) for i in range(100)])
    assert {reply.text for reply in other} == {"True", "not True"}
    (several,) = teacher.ask([ask_text("author", "x", n=50)])
    assert {"stop", "length"} == set(several.finish)
    for choice, (text, finish) in enumerate(zip(several.texts, several.finish)):
        right = f"{choice}: a long text"
        assert text == (right if finish == "stop" else right[: len(right) // 2])


def test_scripted_teachers_without_errors_and_wrong_use():
    teacher = ScriptedTeacher({"judge": lambda r, c: "True"})
    assert {reply.text for reply in teacher.ask([ask_text("judge", str(i)) for i in range(50)])} == {"True"}
    with pytest.raises(ValueError, match="no function for role 'author'"):
        teacher.ask([ask_text("author", "x")])
    with pytest.raises(ValueError, match="error_rate"):
        ScriptedTeacher({}, error_rate=1.5)
    same = ScriptedTeacher({"judge": lambda r, c: "x"}, error_rate=1, wrong={"judge": lambda r, text: text})
    with pytest.raises(ValueError, match="equals the right one"):
        same.ask([ask_text("judge", "x")])
