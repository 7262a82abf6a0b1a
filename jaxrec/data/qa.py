"""Questions with short answers, from the field's files: HotpotQA, 2WikiMultiHopQA, MuSiQue, Bamboogle, FRAMES, SQuAD,
and lines of question and answer. ``jaxrec.data.qa_formats`` lists the formats; which one a file has is read off its
first entry.

An entry that cannot be used is an error which names file, entry and id, unless it shall be dropped and counted. What a
file itself marks as unanswerable is always left out and counted.
"""

import csv
import dataclasses
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrec.data.qa_formats import PARSERS, UNANSWERABLE, BadEntry, Question
from jaxrec.evaluate.answers import NORMALIZATIONS, normalize_answer

FORMATS = tuple(PARSERS)
# Texts that steer a search agent or end a turn of a chat. A question that holds one could speak for the environment.
CONTROL_TAGS = (
    "<|begin_search_query|>", "<|end_search_query|>", "<|begin_search_result|>", "<|end_search_result|>",
    "<internal>", "</internal>", "<external>", "</external>", "<document>", "</document>", "<think>", "</think>",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", r"\boxed{",
)  # fmt: skip
_ESCAPES = str.maketrans({"<": "&lt;", ">": "&gt;", "\\": "&#92;"})


@dataclasses.dataclass(frozen=True)
class QuestionFile:
    """A file that was read. records: entries in it, which are the questions and those ``dropped``, by reason.
    empty_golds: right answers that normalise to nothing, left out beside others of their question."""

    path: str
    form: str
    questions: tuple[Question, ...]
    records: int
    dropped: Mapping[str, int]
    empty_golds: int = 0

    def __post_init__(self):
        if self.records != len(self.questions) + sum(self.dropped.values()):
            raise AssertionError(f"{self.path}: {self.records} entries are not all accounted for")


def read_question_file(
    path: str | Path, form: str = "", *, bad: str = "error", escape_tags: bool = False,
    tags: Sequence[str] = CONTROL_TAGS,
) -> QuestionFile:  # fmt: skip
    """All questions of a file in its order, with what was dropped.

    form: one of :data:`FORMATS`, or "" to go by the first entry. bad: "error", or "drop" for entries that are not as
    they should be. tags: what must not occur in a question; with ``escape_tags`` their brackets and backslashes are
    written as HTML does instead. Raises ValueError for such entries (no or empty question, no answer, an answer that
    normalises to nothing, a text where a list is due, an id that was there before, a control tag), for an unknown
    format, and for a file without any question; FileNotFoundError.
    """
    if form and form not in FORMATS:
        raise ValueError(f"no format {form!r} of questions; formats: {', '.join(FORMATS)}")
    if bad not in ("error", "drop"):
        raise ValueError(f"bad must be 'error' or 'drop', not {bad!r}")
    path, entries = Path(path), list(_entries(Path(path)))
    if not entries:
        raise ValueError(f"{path}: no entries")
    form = form or detect_format(entries[0][1], entries[0][0])
    found: dict[str, Question] = {}
    dropped: Counter[str] = Counter()
    empty = 0
    for number, (where, entry) in enumerate(entries, 1):
        try:
            if not isinstance(entry, Mapping):
                raise BadEntry(f"{where}: an object was expected, not {type(entry).__name__}", "malformed")
            question = PARSERS[form][1](entry, number, where)
            question, nothing = _checked(question, f"{where} (id {question.id!r})", tags, escape_tags)
            if question.id in found:
                raise BadEntry(f"{where}: id {question.id!r} was there before; ids must be unique", "id again")
        except BadEntry as error:
            if bad == "error" and error.reason != UNANSWERABLE:
                raise
            dropped[error.reason] += 1
            continue
        found[question.id] = dataclasses.replace(question, dataset=question.dataset or _dataset(form, path))
        empty += nothing
    if not found:
        raise ValueError(f"{path}: none of {len(entries)} entries can be used: {dict(dropped)}")
    return QuestionFile(str(path), form, tuple(found.values()), len(entries), dict(dropped), empty)


def read_questions(path: str | Path, form: str = "", **options: Any) -> list[Question]:
    """The questions of :func:`read_question_file`, for whoever needs no counts."""
    return list(read_question_file(path, form, **options).questions)


def sample_questions(questions: Sequence[Question], count: int, seed: int = 0) -> list[Question]:
    """``count`` random questions in their order, the same ones with every version of Python and NumPy and in whatever
    order the file has them: those whose id has the smallest SHA-256 with the seed (the papers take 500 of a
    development set). Raises ValueError for fewer questions than ``count``, or ids that occur twice."""
    check_ids(questions)
    if not 1 <= count <= len(questions):
        raise ValueError(f"{count} questions were asked for; there are {len(questions)}")
    key = lambda q: hashlib.sha256(f"{seed}\0{q.id}".encode()).digest()  # noqa: E731
    chosen = {q.id for q in sorted(questions, key=key)[:count]}
    return [q for q in questions if q.id in chosen]


def check_ids(questions: Sequence[Question]) -> None:
    """Raise ValueError for an id that two questions have, e.g. of two files."""
    counts = Counter(q.id for q in questions)
    if again := [id for id, count in counts.items() if count > 1]:
        raise ValueError(f"{len(again)} ids of questions occur twice, e.g. {again[0]!r}; rename or drop one of them")


def detect_format(entry: Any, where: str = "the entry") -> str:
    """The format of an entry, by its fields. Raises ValueError for fields that no format has."""
    if isinstance(entry, Mapping):
        for form, (fields, _) in PARSERS.items():
            if fields <= entry.keys():
                return form
    has = ", ".join(map(str, entry)) if isinstance(entry, Mapping) else f"{type(entry).__name__}"
    raise ValueError(
        f"{where}: no known format of questions has these fields: {has:.200}; formats: {', '.join(FORMATS)}"
    )


def _dataset(form: str, path: Path) -> str:
    return path.stem if form in ("ircot", "plain", "searcher") else form


def _checked(question: Question, where: str, tags: Sequence[str], escape: bool) -> tuple[Question, int]:
    """The question without empty answers, and how many of these there were."""
    text = question.text.strip()
    if not text:
        raise BadEntry(f"{where}: the question is empty", "empty question")
    if held := [tag for tag in tags if tag in text]:
        if not escape:
            raise BadEntry(f"{where}: the question holds the control tag {held[0]!r}; escape_tags=True", "control tag")
        for tag in sorted(held, key=len, reverse=True):
            text = text.replace(tag, tag.translate(_ESCAPES))
    answers = tuple(dict.fromkeys(answer.strip() for answer in question.answers))
    if not any(answers):
        raise BadEntry(f"{where}: the right answer is missing or empty", "no answer")
    kept = tuple(a for a in answers if all(normalize_answer(a, n) for n in NORMALIZATIONS))
    if not kept:
        what = f"the right answer {answers[0]!r} normalises to nothing"
        raise BadEntry(f"{where}: {what}, so that no prediction could match it", "answer is nothing")
    return dataclasses.replace(question, text=text, answers=kept), len(answers) - len(kept)


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, entry) of a JSON list, JSON lines, SQuAD's tree or a table with a header."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from error
    first = text.lstrip()[:1]
    if first == "[":
        yield from ((f"{path}: entry {i}", entry) for i, entry in enumerate(_json(text, str(path))))
    elif first == "{":
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        try:
            head = json.loads(lines[0][1])
        except (ValueError, RecursionError):
            head = None  # an object over several lines, unless the whole is no JSON
        if len(lines) == 1 or head is None:
            whole = head if head is not None else _whole_or_line(text, lines[0], path)
            yield from _tree(whole, path) if isinstance(whole, Mapping) and "data" in whole else [(f"{path}:1", whole)]
        else:
            yield from ((f"{path}:{number}", _json(line, f"{path}:{number}")) for number, line in lines)
    elif first:
        yield from _table(text, path)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from error


def _whole_or_line(text: str, line: tuple[int, str], path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _json(line[1], f"{path}:{line[0]}")  # lines whose first is broken: that is the error to show


def _tree(tree: Mapping[str, Any], path: Path) -> Iterator[tuple[str, Any]]:
    """SQuAD's questions, each with the title and the passage above it."""
    for a, article in enumerate(_list(tree, "data", str(path))):
        at = f"{path}: data[{a}]"
        for p, paragraph in enumerate(_list(article, "paragraphs", at)):
            here = f"{at}.paragraphs[{p}]"
            above = {"title": article.get("title", ""), "context": paragraph.get("context")}
            for q, asked in enumerate(_list(paragraph, "qas", here)):
                where = f"{here}.qas[{q}]"
                yield where, {**asked, **above} if isinstance(asked, Mapping) else asked


def _list(entry: Any, field: str, where: str) -> list[Any]:
    value = entry.get(field) if isinstance(entry, Mapping) else None
    if not isinstance(value, list):
        raise ValueError(f"{where}: field {field!r} is missing or not a list")
    if field != "qas" and not all(isinstance(part, Mapping) for part in value):
        raise ValueError(f"{where}: field {field!r} must hold objects")
    return value


def _table(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    header = text.split("\n", 1)[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in header else ",", strict=True)
    if "Prompt" not in (reader.fieldnames or ()) and "question" not in (reader.fieldnames or ()):
        raise ValueError(f"{path}: neither JSON nor a table: its first line names no column 'Prompt' or 'question'")
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{where}: the row has not the {len(reader.fieldnames)} columns of the header")
            yield where, row
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}") from error
