"""Replies that must fit a form: checked, asked for again a bounded number of times, and counted where they never fit.

A check is a function from a reply's text to its value, which raises :class:`Misfit`. There are three kinds here, and
any function of that form will do: JSON with named fields (arXiv 2505.16834, query sampling), exactly "True" or "False"
(its judge, and that of 2505.17005), and the text behind a marker (its summariser).
"""

import collections
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from jaxrec.progress import progress
from jaxrec.tools.teacher.base import Answer, Failure, Reply, Request, Teacher

T = TypeVar("T")
Check = Callable[[str], T]
END_OF_THINKING = "</think>"
_BLANK_LINE = re.compile(r"\n[ \t\r]*\n")


class Misfit(ValueError):
    """A reply that does not fit; the message says where."""


@dataclasses.dataclass(frozen=True)
class Checked(Generic[T]):
    """A reply that fits. tries: how many were made."""

    value: T
    reply: Reply
    tries: int


def without_thinking(text: str, marker: str = END_OF_THINKING) -> str:
    """What follows the last end-of-thinking marker; all of a text without one."""
    return text.rpartition(marker)[2]


def parse_json(text: str, marker: str = END_OF_THINKING) -> Any:
    """Decode a reply as arXiv 2505.16834's query sampling does: what follows the last end-of-thinking marker, or, where
    that is no JSON, its part before the first blank line. Raises :class:`Misfit`."""
    text = without_thinking(text, marker).strip()
    first = _BLANK_LINE.split(text, maxsplit=1)[0]
    for part in dict.fromkeys((text, first)):
        try:
            return json.loads(part, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            why = f"not JSON: {error}"
    raise Misfit(why)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


@dataclasses.dataclass(frozen=True)
class Field:
    """What a JSON value may be. kind: str, int, float (any finite number), bool, a list ``[inner]``, an object
    ``{name: inner}``, or a tuple of the values allowed. least, most: of the length of a text (without the space around
    it) or list, or of a number. optional: of an object's field, whether it may be missing or null (then it is None)."""

    kind: Any
    least: float | None = None
    most: float | None = None
    optional: bool = False


def json_fields(form: Mapping[str, Any], marker: str = END_OF_THINKING) -> Check[dict[str, Any]]:
    """A check for a JSON object: ``{"domain": str, "key_points": Field([str], least=2, most=4)}``.

    Types are exact (True is no int, 1 no text), texts must not be blank, fields that the form does not name are
    left out of the value.
    """

    def check(text: str) -> dict[str, Any]:
        return _fit(parse_json(text, marker), Field(dict(form)), "reply")

    return check


def _fit(value: Any, form: Any, where: str) -> Any:
    field = form if isinstance(form, Field) else Field(form)
    kind = field.kind
    if isinstance(kind, tuple):
        if not any(type(value) is type(allowed) and value == allowed for allowed in kind):
            raise Misfit(f"{where} is {_short(value)}, not one of {', '.join(map(repr, kind))}")
        return value
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            raise Misfit(f"{where} is {_short(value)}, not an object")
        return {name: _member(value, name, inner, where) for name, inner in kind.items()}
    if isinstance(kind, list):
        if not isinstance(value, list):
            raise Misfit(f"{where} is {_short(value)}, not a list")
        _bounds(len(value), field, f"the length of {where}")
        return [_fit(item, kind[0], f"{where}[{i}]") for i, item in enumerate(value)]
    wanted = (int, float) if kind is float else (kind,)
    if type(value) not in wanted:
        raise Misfit(f"{where} is {_short(value)}, not {kind.__name__}")
    if kind is str:
        if not value.strip():
            raise Misfit(f"{where} is blank")
        _bounds(len(value.strip()), field, f"the length of {where}")
    elif kind in (int, float):
        _bounds(value, field, where)
    return float(value) if kind is float else value


def _member(value: dict, name: str, form: Any, where: str) -> Any:
    if value.get(name) is None:
        if isinstance(form, Field) and form.optional:
            return None
        raise Misfit(f"{where} has no field {name!r}")
    return _fit(value[name], form, f"{where}.{name}")


def _bounds(number: float, field: Field, what: str) -> None:
    if field.least is not None and number < field.least:
        raise Misfit(f"{what} is {number}, less than {field.least}")
    if field.most is not None and number > field.most:
        raise Misfit(f"{what} is {number}, more than {field.most}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def true_or_false(marker: str = END_OF_THINKING) -> Check[bool]:
    """A judge's verdict: exactly "True" or "False", but for space around it and for thinking before it. "True." does
    not fit."""

    def check(text: str) -> bool:
        said = without_thinking(text, marker).strip()
        if said not in ("True", "False"):
            raise Misfit(f"{_short(said)} is neither True nor False")
        return said == "True"

    return check


def after_marker(marker: str = "**Final Information**", required: bool = False) -> Check[str]:
    """A summary: the text behind the last ``marker``, line ends made spaces, back-ticks and space around it gone.

    Without the marker it is the whole reply behind the thinking, or with ``required`` a misfit (arXiv 2505.16834,
    summariser). What is empty does not fit.
    """

    def check(text: str) -> str:
        if marker not in text and required:
            raise Misfit(f"no {marker!r} in it")
        text = text.rpartition(marker)[2] if marker in text else without_thinking(text)
        said = " ".join(text.split("\n")).strip().strip("`").strip()
        if not said:
            raise Misfit("nothing stands behind the marker")
        return said

    return check


def ask_checked(
    teacher: Teacher, requests: Sequence[Request], check: Check[T], *, tries: int = 3, temperature: float | None = None,
    counts: collections.Counter[str] | None = None,
) -> list[Checked[T] | Failure]:  # fmt: skip
    """Ask, check, and ask what does not fit again with another seed, ``tries`` times in all.

    temperature: of the later tries (None: as the first; a greedy teacher would say the same again). A reply that was
    cut off by its length is checked like any other. What never fits is a Failure "invalid" with the last reason; other
    failures stay as they are. counts: gets "fitting", "misfits" (replies), "invalid" (requests) and failures by kind.
    Raises ValueError for requests of several replies: ask for one each, with seeds of their own.
    """
    if tries < 1:
        raise ValueError(f"tries must be at least 1, not {tries}")
    for i, request in enumerate(requests):
        if request.n != 1:
            raise ValueError(f"request {i} asks for {request.n} replies; checked ones are asked for one by one")
    counts = collections.Counter() if counts is None else counts
    out: list[Checked[T] | Failure | None] = [None] * len(requests)
    left = list(range(len(requests)))
    with progress(len(requests), "asking and checking") as step:
        for attempt in range(tries):
            again = [_again(requests[i], attempt, temperature) for i in left]
            answers = teacher.ask(again) if again else []
            for i, answer in zip(left, answers, strict=True):
                out[i] = _judge(answer, check, attempt + 1)
            waiting = [i for i in left if isinstance(out[i], Failure) and out[i].kind == "invalid"]
            counts["misfits"] += len(waiting)
            for _ in range(len(left) - len(waiting)):
                step()
            left = waiting
    for answer in out:
        counts["fitting" if isinstance(answer, Checked) else answer.kind] += 1
    return out


def _again(request: Request, attempt: int, temperature: float | None) -> Request:
    if attempt == 0:
        return request
    changes = {} if temperature is None else {"temperature": temperature}
    return request.replace(seed=(request.sampling.seed or 0) + attempt, **changes)


def _judge(answer: Answer, check: Check[T], tries: int) -> Checked[T] | Failure:
    if isinstance(answer, Failure):
        return answer
    try:
        return Checked(check(answer.text), answer, tries)
    except Misfit as error:
        return Failure("invalid", str(error), tries)
