"""A teacher made of functions: the embedded world's own knowledge in the place of a bigger model, with known errors."""

import hashlib
from collections.abc import Callable, Mapping, Sequence

from jaxrec.tools.teacher.base import Answer, Done, Reply, Request, Usage, request_hash

Says = Callable[[Request, int], str]  # (request, number of the reply) -> text
Errs = Callable[[Request, str], str]  # (request, right reply) -> a wrong one


class ScriptedTeacher:
    """Answers every role by a function of its own; what an oracle may know is in the function's closure.

    error_rate: the share of replies that are wrong, drawn from the request's hash and the reply's number: the same
    request always errs or never does, with another seed it is drawn anew. wrong: per role, what a wrong reply says;
    without it a verdict "True" or "False" is turned round, and another text breaks off in the middle ("length"). Words
    are counted as tokens. Raises ValueError for a rate outside 0 to 1, a role without function (when asked), and for a
    wrong reply that equals the right one; what a function raises is a defect of the script and passes through.
    """

    def __init__(
        self, functions: Mapping[str, Says], *, error_rate: float = 0.0, wrong: Mapping[str, Errs] | None = None,
        id: str = "scripted",
    ):  # fmt: skip
        if not 0 <= error_rate <= 1:
            raise ValueError(f"error_rate must lie between 0 and 1, not {error_rate}")
        self._functions, self._rate, self._wrong = dict(functions), error_rate, dict(wrong or {})
        self.id = f"{id}, error rate {error_rate:g}"
        self.errors = 0  # wrong replies given so far

    def ask(self, requests: Sequence[Request], done: Done | None = None) -> list[Answer]:
        """A reply per request, in order."""
        for request in requests:
            if request.role not in self._functions:
                known = ", ".join(self._functions)
                raise ValueError(f"{self.id}: no function for role {request.role!r}; it has {known}")
        out = []
        for number, request in enumerate(requests):
            out.append(self._reply(request))
            if done is not None:
                done(number, out[-1])
        return out

    def _reply(self, request: Request) -> Reply:
        digest = request_hash(request, self.id)
        said = [self._one(request, choice, digest) for choice in range(request.n)]
        made = sum(len(text.split()) for text, _ in said)
        usage = Usage(sum(len(message.content.split()) for message in request.messages), made)
        return Reply(tuple(text for text, _ in said), tuple(finish for _, finish in said), usage)

    def _one(self, request: Request, choice: int, digest: str) -> tuple[str, str]:
        text = self._functions[request.role](request, choice)
        drawn = int.from_bytes(hashlib.sha256(f"{digest} {choice}".encode()).digest()[:8], "big") / 2**64
        if drawn >= self._rate:
            return text, "stop"
        self.errors += 1
        if request.role in self._wrong:
            wrong = self._wrong[request.role](request, text)
            if wrong == text:
                raise ValueError(f"{self.id}: the wrong reply of role {request.role!r} equals the right one: {text!r}")
            return wrong, "stop"
        if text in ("True", "False"):
            return {"True": "False", "False": "True"}[text], "stop"
        return text[: len(text) // 2], "length"
