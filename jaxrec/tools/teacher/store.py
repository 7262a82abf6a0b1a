"""Replies on disk: what a teacher has said once is not asked again.

One JSON object a line, appended: {"hash", "teacher", "request", "reply"}. The hash covers the role, the messages, the
sampling and the teacher's id (``base.request_hash``); prompts are kept beside it, so that the file can be audited. Only
replies are stored; failures are counted and asked again by the next run. A line is written in one piece under a lock as
soon as its reply is there, so that a process that is killed loses what was on its way and nothing else; the line that
it leaves unfinished is counted and taken out.
"""

import collections
import dataclasses
import fcntl
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from jaxrec.data.lines import cut_torn_line
from jaxrec.progress import progress
from jaxrec.tools.teacher.base import (
    Answer,
    Done,
    Reply,
    Request,
    Teacher,
    reply_json,
    reply_of,
    request_hash,
    request_json,
)


@dataclasses.dataclass
class Counts:
    """asked: requests passed on to the teacher. stored: answered from the file. shared: the same request twice, asked
    once. failed: by kind. roles: requests by role. torn: unfinished lines taken out of the file."""

    asked: int = 0
    stored: int = 0
    shared: int = 0
    torn: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    roles: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def scalars(self) -> dict[str, int]:
        """As flat numbers, for metrics and results."""
        plain = ("asked", "stored", "shared", "torn", "prompt_tokens", "completion_tokens")
        out = {name: getattr(self, name) for name in plain}
        out |= {f"failed_{kind}": count for kind, count in sorted(self.failed.items())}
        return out | {f"role_{role}": count for role, count in sorted(self.roles.items())}


class StoredTeacher:
    """A teacher whose replies are kept in ``path`` (made if missing; a folder for it must exist).

    Threads may ask at the same time, and processes may share the file: a request that is already on its way in this
    process is waited for; two processes may both ask it, and the first line counts. Raises ValueError naming file and
    line for anything in the file that is no reply.
    """

    def __init__(self, teacher: Teacher, path: str | Path):
        self._teacher, self.path, self.id = teacher, Path(path), teacher.id
        self.counts = Counts()
        self._lock = threading.Lock()
        self._coming: dict[str, Future[Answer]] = {}
        self._replies = self._read()

    def __len__(self) -> int:
        """Replies in the file when it was opened, and since then by this process."""
        return len(self._replies)

    def ask(self, requests: Sequence[Request], done: Done | None = None) -> list[Answer]:
        """An answer per request, in order, from the file where it is there."""
        hashes = [request_hash(request, self.id) for request in requests]
        mine: dict[str, int] = {}  # hash -> number of the request that is asked for all of its kind
        futures: list[Future[Answer]] = []
        with self._lock:
            for number, (request, key) in enumerate(zip(requests, hashes)):
                self.counts.roles[request.role] += 1
                futures.append(self._future(key, number, mine))
        with progress(len(requests), f"asking {self.id}") as step:
            errors: list[BaseException] = []
            for number, future in enumerate(futures):
                future.add_done_callback(lambda future, number=number: _tell(future, number, done, step, errors))
            if mine:
                self._pass_on(requests, mine)
            answers = [future.result() for future in futures]
        if errors:
            raise errors[0]
        return answers

    def _future(self, key: str, number: int, mine: dict[str, int]) -> Future[Answer]:
        if key in self._replies:
            self.counts.stored += 1
            future: Future[Answer] = Future()
            future.set_result(self._replies[key])
            return future
        if key in self._coming:
            self.counts.shared += 1
            return self._coming[key]
        self.counts.asked += 1
        mine[key] = number
        return self._coming.setdefault(key, Future())

    def _pass_on(self, requests: Sequence[Request], mine: dict[str, int]) -> None:
        keys = list(mine)

        def take(number: int, answer: Answer) -> None:
            self._keep(keys[number], requests[mine[keys[number]]], answer)

        try:
            answers = self._teacher.ask([requests[mine[key]] for key in keys], take)
            for number, answer in enumerate(answers):
                take(number, answer)  # of a teacher that does not tell as it goes
        except BaseException as error:
            with self._lock:
                left = [future for key in keys if (future := self._coming.pop(key, None)) is not None]
            for future in left:  # others may be waiting for them
                future.set_exception(error)
            raise

    def _keep(self, key: str, request: Request, answer: Answer) -> None:
        """Store a reply, count a failure, and give either to all who wait for it; a second time does nothing."""
        with self._lock:
            future = self._coming.get(key)
            if future is None:
                return
            if isinstance(answer, Reply):
                entry = {"hash": key, "teacher": self.id, "request": request_json(request), "reply": reply_json(answer)}
                self._write(entry)
                self._replies[key] = answer
                self.counts.prompt_tokens += answer.usage.prompt_tokens
                self.counts.completion_tokens += answer.usage.completion_tokens
            else:
                self.counts.failed[answer.kind] += 1
            del self._coming[key]
        future.set_result(answer)

    def _write(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, ensure_ascii=True).encode() + b"\n"
        with open(self.path, "a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self.counts.torn += cut_torn_line(file)  # another process may have been killed since
            end = file.seek(0, os.SEEK_END)
            try:
                while line:
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
            except OSError:  # a full disk
                file.truncate(end)
                raise

    def _read(self) -> dict[str, Reply]:
        if not self.path.parent.is_dir():
            raise ValueError(f"{self.path}: no folder {self.path.parent} to store replies in")
        with open(self.path, "a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # nobody is in the middle of a line
            self.counts.torn += cut_torn_line(file)
            file.seek(0)
            content = file.read()
        replies: dict[str, Reply] = {}
        for number, line in enumerate(content.split(b"\n")[:-1], 1):
            key, reply = self._entry(line, f"{self.path}:{number}")
            replies.setdefault(key, reply)
        return replies

    def _entry(self, line: bytes, where: str) -> tuple[str, Reply]:
        try:
            entry = json.loads(line)
            key, reply = entry["hash"], reply_of(entry["reply"])
            if not isinstance(key, str):
                raise TypeError("hash is no text")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{where} holds no stored reply ({type(error).__name__}: {error}); delete that line"
            ) from error
        return key, reply


def _tell(future: Future[Answer], number: int, done: Done | None, step, errors: list[BaseException]) -> None:
    if future.exception() is None and done is not None:
        try:
            done(number, future.result())
        except BaseException as error:  # a future would swallow it
            errors.append(error)
    step()
