"""Search trajectories as curation and evaluation read them, whoever wrote them: a policy in training or a teacher."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrec.config import write_atomic
from jaxrec.data.lines import json_lines
from jaxrec.evaluate.answers import Protocol, last_boxed, score_answer
from rl.envs.search import State
from rl.envs.tags import boxes

AUTHORS = ("policy", "tool")


@dataclasses.dataclass(frozen=True)
class Search:
    """One executed search: urls (or ids) and texts of the pages that came back. failed: the backend gave an error."""

    query: str
    urls: tuple[str, ...] = ()
    passages: tuple[str, ...] = ()
    failed: bool = False


@dataclasses.dataclass(frozen=True)
class Rollout:
    """What followed a prompt. id: of the question. segments: (author, text) in order; "tool" wrote results and notices.
    searches: all that were made, failed ones included; notices that no more are allowed, or that a query was asked
    before, are none. reason: why it ended. metrics: see :func:`scored`. output: the raw text, where it is known apart
    from the segments. answer: the prediction, where tags other than a box mark it.

    Raises ValueError for no segment by the policy, an unknown author, and segments that do not give ``output`` byte for
    byte.
    """

    id: str
    segments: tuple[tuple[str, str], ...]
    searches: tuple[Search, ...] = ()
    reason: str = ""
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    prompt: str = ""
    output: str | None = None
    answer: str | None = None

    def __post_init__(self):
        if not any(author == "policy" for author, _ in self.segments):
            raise ValueError(f"rollout of question {self.id!r}: no segment is by the policy")
        for author, text in self.segments:
            if author not in AUTHORS or not isinstance(text, str):
                raise ValueError(f"rollout of question {self.id!r}: a segment is by 'policy' or 'tool', not {author!r}")
        if self.output is not None:
            check_reproduces(self.text, self.output, f"rollout of question {self.id!r}")

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.segments)

    @property
    def policy(self) -> tuple[str, ...]:
        """What the policy wrote, turn by turn."""
        return tuple(text for author, text in self.segments if author == "policy")

    @property
    def search_count(self) -> int:
        return len(self.searches)

    @property
    def prediction(self) -> str:
        r"""``answer``, or the last ``\boxed{...}`` that the policy wrote within one turn; "" where there is none."""
        if self.answer is not None:
            return self.answer
        boxed = [text for text in self.policy if boxes(text)]
        return last_boxed(boxed[-1]) if boxed else ""


def check_reproduces(joined: str, output: str, where: str) -> None:
    """Raise ValueError unless the joined segments are the output."""
    if joined != output:
        at = next((i for i, (a, b) in enumerate(zip(joined, output)) if a != b), min(len(joined), len(output)))
        seen = f"{joined[at : at + 20]!r} instead of {output[at : at + 20]!r}"
        raise ValueError(f"{where}: the segments do not reproduce the output: at character {at} they have {seen}")


def from_state(state: State) -> Rollout:
    """A finished conversation of the search environment."""
    searches = tuple(
        Search(c.query, tuple(p.url or str(p.id) for p in c.passages), tuple(p.text for p in c.passages), bool(c.error))
        for c in state.calls
    )
    answer = state.answer if state.style.answer_open else None
    return Rollout(state.example.id, tuple(state.segments), searches, state.finish, prompt=state.prompt, answer=answer)


def scored(rollout: Rollout, answers: Sequence[str], protocol: Protocol) -> Rollout:
    """The rollout with em, cover and f1 of its prediction."""
    return dataclasses.replace(rollout, metrics=score_answer(rollout.prediction, answers, protocol))


def write_rollouts(path: str | Path, rollouts: Iterable[Rollout]) -> None:
    """One JSON object a line, written whole or not at all."""
    lines = (json.dumps(dataclasses.asdict(r), ensure_ascii=False) + "\n" for r in rollouts)
    write_atomic(Path(path), "".join(lines))


def read_rollouts(path: str | Path) -> list[Rollout]:
    """What :func:`write_rollouts` wrote. Raises ValueError naming file and line for anything else."""
    return [_rollout(entry, where) for where, entry in json_lines(Path(path))]


def _rollout(entry: Mapping[str, Any], where: str) -> Rollout:
    known = {field.name for field in dataclasses.fields(Rollout)}
    try:
        if unknown := entry.keys() - known:
            raise ValueError(f"unknown field {min(unknown)!r}")
        for field, kind in (("id", str), ("prompt", str), ("reason", str), ("metrics", dict)):
            if not isinstance(entry[field], kind):
                raise ValueError(f"field {field!r} is {entry[field]!r:.40}, not of type {kind.__name__}")
        segments = tuple((author, text) for author, text in entry["segments"])
        searches = tuple(
            Search(s["query"], tuple(s["urls"]), tuple(s["passages"]), bool(s["failed"])) for s in entry["searches"]
        )
        return Rollout(**{**entry, "segments": segments, "searches": searches})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where}: no rollout: {type(error).__name__}: {error!s:.300}") from error
