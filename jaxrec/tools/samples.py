"""Samples of supervised training on search trajectories: how a rollout is rewritten to one, and their files
(SimpleDeepSearcher, arXiv 2505.16834: the form of its released data)."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrec.config import write_atomic
from jaxrec.data.lines import json_lines
from jaxrec.data.qa import Question
from jaxrec.tools.rollouts import Rollout, check_reproduces
from rl.envs.tags import BOX, TagStyle, command_spans, parse_query


def rewrite_answer(text: str, think_close: str = "</think>") -> str | None:
    r"""The last turn as it is trained on: what stands between ``think_close`` (with up to two white-space characters)
    and the first ``\boxed{...}`` after it goes, and what follows the box. None without such a box."""
    start = text.find(think_close)
    if start < 0:
        return None
    start += len(think_close)
    box = next((span for span in command_spans(text, BOX) if span[0] >= start), None)
    if box is None:
        return None
    if not think_close:
        return text[: box[1]]
    gap = text[start : min(start + 2, box[0])]
    return text[: start + len(gap) - len(gap.lstrip())] + text[box[0] : box[1]]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A row of training data. output: (key, text) with keys "gen" (the policy's), "search_query", "doc" (what was
    found) and "doc_gen" (what was put in). min_search: fewest searches among the question's correct rollouts."""

    id: str
    question: str
    answers: tuple[str, ...]
    input: str
    output: tuple[tuple[str, str], ...]
    metrics: Mapping[str, float]
    search_count: int
    min_search: int

    @property
    def segments(self) -> tuple[tuple[str, str], ...]:
        """(author, text), as a rollout has them."""
        authors = {"gen": "policy", "doc_gen": "tool"}
        return tuple((authors[key], text) for key, text in self.output if key in authors)

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.segments)


def to_sample(rollout: Rollout, question: Question, min_search: int, tags: TagStyle, last_turn: str = "") -> Sample:
    """A sample whose texts are the rollout's, with ``last_turn`` in place of the policy's last one if given. Raises
    ValueError if the texts do not reproduce those of the rollout."""
    output: list[tuple[str, str]] = []
    searches = list(rollout.searches)
    for author, text in rollout.segments:
        if author == "tool":
            output.append(("doc_gen", text))
            continue
        output.append(("gen", text))
        if query := parse_query(text, tags):
            output.append(("search_query", query))
            if searches and searches[0].query.strip() == query:
                pages = searches.pop(0).passages
                output += [("doc", "\n\n".join(pages))] if pages else []
    make = lambda parts: Sample(  # noqa: E731
        rollout.id, question.text, question.answers, rollout.prompt, tuple(parts), dict(rollout.metrics),
        rollout.search_count, min_search,
    )  # fmt: skip
    check_reproduces(make(output).text, rollout.text, f"sample {rollout.id!r}")
    if last_turn:
        at = max(i for i, (key, _) in enumerate(output) if key == "gen")
        output[at] = ("gen", last_turn)
    return make(output)


def write_samples(path: str | Path, samples: Sequence[Sample]) -> None:
    """One JSON object a line: id, question, answer, input, output ([{"gen": ...}, ...]), text (what gen and doc_gen
    give together), metric, search_count, min_search."""
    lines = []
    for s in samples:
        row = {"id": s.id, "question": s.question, "answer": s.answers, "input": s.input}
        row |= {"output": [{key: text} for key, text in s.output], "text": s.text, "metric": s.metrics}
        row |= {"search_count": s.search_count, "min_search": s.min_search}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_atomic(Path(path), "".join(lines))


def read_samples(path: str | Path) -> list[Sample]:
    """What :func:`write_samples` wrote. Raises ValueError naming the line for a field that is missing or of another
    kind, an id that was there before, and an output that does not reproduce ``text`` byte for byte."""
    out: dict[str, Sample] = {}
    for where, row in json_lines(Path(path)):
        sample = _sample(row, where)
        if sample.id in out:
            raise ValueError(f"{where}: id {sample.id!r} was there before")
        out[sample.id] = sample
    return list(out.values())


_FIELDS = {"id": str, "question": str, "answer": list, "input": str, "output": list, "text": str, "metric": dict,
           "search_count": int, "min_search": int}  # fmt: skip
_KEYS = ("gen", "search_query", "doc", "doc_gen")


def _sample(row: Mapping[str, Any], where: str) -> Sample:
    for field, kind in _FIELDS.items():
        if not isinstance(row.get(field), kind):
            raise ValueError(f"{where}: field {field!r} is missing or not of type {kind.__name__}")
    parts = []
    for i, part in enumerate(row["output"]):
        pairs = list(part.items()) if isinstance(part, dict) else []
        if len(pairs) != 1 or pairs[0][0] not in _KEYS or not isinstance(pairs[0][1], str):
            raise ValueError(f"{where}: output[{i}] must be one of {', '.join(_KEYS)} with a text")
        parts += pairs
    if not row["answer"] or not all(isinstance(answer, str) for answer in row["answer"]):
        raise ValueError(f"{where}: field 'answer' must be a list of texts")
    sample = Sample(
        row["id"], row["question"], tuple(row["answer"]), row["input"], tuple(parts), row["metric"],
        row["search_count"], row["min_search"],
    )  # fmt: skip
    check_reproduces(sample.text, row["text"], f"{where} (id {sample.id!r})")
    return sample
