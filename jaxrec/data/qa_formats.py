"""What one entry of each question-answering format says, as a :class:`Question`.

    hotpot     HotpotQA (arXiv 1809.09600), also in the column form {"title": [...], "sentences": [...]}
    2wiki      2WikiMultiHopQA (arXiv 2011.01060): the same, with evidence triples
    ircot      HotpotQA as IRCoT (arXiv 2212.10509) writes it: answers_objects, contexts with labels
    musique    MuSiQue (arXiv 2108.00573): paragraphs with labels, question_decomposition, answer_aliases
    bamboogle  Bamboogle (arXiv 2210.03350) with its two hops: Question, Answer, Q1, A1, Q2, A2
    frames     FRAMES (arXiv 2409.12941): Prompt, Answer, wiki_links, reasoning_types
    squad      SQuAD 1.1 (arXiv 1606.05250), a question with its own passage
    searcher   SimpleDeepSearcher's items (arXiv 2505.16834): Question, answer as a list, source
    plain      question and answer, "answers" or "golden_answers": NQ-open, TriviaQA and R1-Searcher's files

An entry that says something else raises :class:`BadEntry`, which names file, entry and field.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

from jaxrec.data.documents import Document


@dataclasses.dataclass(frozen=True)
class Question:
    """A question and what its file says about it.

    answers: all right ones. kind: the file's type, e.g. "bridge". hops: 0 where the file does not say. contexts: the
    file's passages; gold: numbers of those that hold the answer. facts: (title, sentence) of the supporting facts as
    in the file; a sentence may lie past its passage's end. steps: simpler questions with their answers, in order; the
    answers of Bamboogle's last hop need not be those of the question. links: pages that hold the answer.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    dataset: str
    kind: str = ""
    level: str = ""
    hops: int = 0
    contexts: tuple[Document, ...] = ()
    gold: tuple[int, ...] = ()
    facts: tuple[tuple[str, int], ...] = ()
    steps: tuple[tuple[str, tuple[str, ...]], ...] = ()
    links: tuple[str, ...] = ()

    @property
    def gold_titles(self) -> tuple[str, ...]:
        """Titles of the gold passages, or of the linked pages."""
        titles = [self.contexts[i].title for i in self.gold]
        titles += [title for title, _ in self.facts]
        titles += [unquote(urlsplit(link).path.rsplit("/", 1)[-1]).replace("_", " ") for link in self.links]
        return tuple(dict.fromkeys(titles))


class BadEntry(ValueError):
    """An entry that cannot be used. reason: a few words to count it by."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


UNANSWERABLE = "unanswerable"  # the file itself says so; such entries are left out and counted
_KINDS = {str: "a text", list: "a list", dict: "an object", int: "a number"}


def _get(entry: Any, field: str, kind: type, where: str) -> Any:
    if not isinstance(entry, Mapping):
        raise BadEntry(f"{where}: an object with {field!r} was expected, not {type(entry).__name__}", "malformed")
    value = entry.get(field)
    if not isinstance(value, kind) or isinstance(value, bool):
        what = "is missing" if value is None else f"is {value!r:.60}, not {_KINDS[kind]}"
        raise BadEntry(f"{where}: field {field!r} {what}", "malformed")
    return value


def _texts(values: Any, field: str, where: str) -> tuple[str, ...]:
    """A list of answers. A text would be a list of its characters, so it is an error."""
    if isinstance(values, str):
        raise BadEntry(f"{where}: field {field!r} must be a list of answers, not the text {values!r:.60}", "malformed")
    if not isinstance(values, Sequence):
        raise BadEntry(f"{where}: field {field!r} must be a list of answers, not {values!r:.60}", "no answer")
    for value in values:
        if not isinstance(value, str):
            raise BadEntry(f"{where}: field {field!r} holds {value!r:.60}, which is no text", "malformed")
    return tuple(values)


def _answer(entry: Mapping[str, Any], field: str, where: str) -> str:
    if entry.get(field) is None:
        raise BadEntry(f"{where}: field {field!r} is missing: the question has no answer", "no answer")
    return _get(entry, field, str, where)


def _id(entry: Mapping[str, Any], fields: Sequence[str], number: int) -> str:
    """The first of the fields that is there, or the entry's number."""
    for field in fields:
        if isinstance(entry.get(field), str | int) and str(entry[field]).strip():
            return str(entry[field])
    return str(number)


def _optional(entry: Mapping[str, Any], *fields: str) -> str:
    return next((str(entry[f]) for f in fields if isinstance(entry.get(f), str | int)), "")


def _pairs(value: Any, names: tuple[str, str], field: str, where: str) -> list[tuple[Any, Any]]:
    """[[a, b], ...], or the same as columns {names[0]: [a, ...], names[1]: [b, ...]}."""
    if isinstance(value, Mapping):
        columns = [_get(value, name, list, f"{where}: {field}") for name in names]
        if len(columns[0]) != len(columns[1]):
            raise BadEntry(f"{where}: field {field!r} has columns of unequal length", "malformed")
        return list(zip(*columns))
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise BadEntry(f"{where}: field {field!r} must be a list of [{', '.join(names)}]", "malformed")
    return [(first, second) for first, second in value]


def _hotpot(entry: Mapping[str, Any], number: int, where: str) -> Question:
    contexts = []
    for title, sentences in _pairs(entry.get("context"), ("title", "sentences"), "context", where):
        if not isinstance(title, str) or not isinstance(sentences, list | tuple):
            raise BadEntry(f"{where}: field 'context' holds no [title, [sentence, ...]]", "malformed")
        contexts.append(Document(title, "".join(_texts(sentences, "context", where)).strip()))
    facts = []
    for title, sentence in _pairs(entry.get("supporting_facts"), ("title", "sent_id"), "supporting_facts", where):
        if not isinstance(title, str) or not isinstance(sentence, int) or title not in {c.title for c in contexts}:
            what = f"names {[title, sentence]!r:.80}, which is no [title, number] of its context"
            raise BadEntry(f"{where}: field 'supporting_facts' {what}", "malformed")
        facts.append((title, sentence))
    named = {title for title, _ in facts}
    return Question(
        _id(entry, ("_id", "id"), number), _get(entry, "question", str, where), (_answer(entry, "answer", where),), "",
        kind=_optional(entry, "type"), level=_optional(entry, "level"), contexts=tuple(contexts),
        gold=tuple(i for i, c in enumerate(contexts) if c.title in named), facts=tuple(facts),
    )  # fmt: skip


def _twowiki(entry: Mapping[str, Any], number: int, where: str) -> Question:
    question = _hotpot(entry, number, where)
    return dataclasses.replace(question, hops=len(_get(entry, "evidences", list, where)))


def _labelled(entry: Mapping[str, Any], field: str, where: str) -> tuple[tuple[Document, ...], tuple[int, ...]]:
    """Passages with "is_supporting": (all, numbers of the supporting ones)."""
    passages, gold = [], []
    for i, passage in enumerate(_get(entry, field, list, where)):
        at = f"{where}: {field}[{i}]"
        passages.append(Document(_get(passage, "title", str, at), _get(passage, "paragraph_text", str, at)))
        if passage.get("is_supporting"):
            gold.append(i)
    return tuple(passages), tuple(gold)


def _ircot(entry: Mapping[str, Any], number: int, where: str) -> Question:
    answers: list[str] = []
    for i, given in enumerate(_get(entry, "answers_objects", list, where)):
        at = f"{where}: answers_objects[{i}]"
        answers += _texts(_get(given, "spans", list, at), "spans", at)
        date = given.get("date") or {}
        parts = [given.get("number") or "", " ".join(str(date.get(k) or "") for k in ("day", "month", "year"))]
        answers += [str(part).strip() for part in parts if str(part).strip()]
    contexts, gold = _labelled(entry, "contexts", where)
    return Question(
        _id(entry, ("question_id",), number), _get(entry, "question_text", str, where), tuple(answers), "",
        kind=_optional(entry, "type"), level=_optional(entry, "level"), contexts=contexts, gold=gold,
    )  # fmt: skip


def _musique(entry: Mapping[str, Any], number: int, where: str) -> Question:
    if entry.get("answerable") is False:
        raise BadEntry(f"{where}: the question is marked as unanswerable", UNANSWERABLE)
    answers = (_answer(entry, "answer", where), *_texts(entry.get("answer_aliases", []), "answer_aliases", where))
    contexts, gold = _labelled(entry, "paragraphs", where)
    steps = []
    for i, step in enumerate(_get(entry, "question_decomposition", list, where)):
        at = f"{where}: question_decomposition[{i}]"
        steps.append((_get(step, "question", str, at), (_get(step, "answer", str, at),)))
    id = _id(entry, ("id",), number)
    return Question(
        id, _get(entry, "question", str, where), answers, "", kind=id.partition("__")[0] if "__" in id else "",
        hops=len(steps), contexts=contexts, gold=gold, steps=tuple(steps),
    )  # fmt: skip


def _bamboogle(entry: Mapping[str, Any], number: int, where: str) -> Question:
    steps = [(_get(entry, f"Q{i}", str, where), _texts(entry.get(f"A{i}"), f"A{i}", where)) for i in (1, 2)]
    text, answers = _get(entry, "Question", str, where), (_answer(entry, "Answer", where),)
    return Question(_id(entry, ("id", "idx"), number), text, answers, "", hops=2, steps=tuple(steps))


def _links(value: Any, where: str) -> tuple[str, ...]:
    """Addresses from a list, or from the text of one in quotes and brackets, which the published table holds."""
    if isinstance(value, list):
        return _texts(value, "wiki_links", where)
    text = value.strip() if isinstance(value, str) else ""
    found = re.findall(r"\"([^\"]*)\"|'([^']*)'", text)
    if text and not re.fullmatch(r"\[(\s*(\"[^\"]*\"|'[^']*')\s*,?)*\s*\]", text):
        raise BadEntry(f"{where}: field 'wiki_links' is no list of addresses in quotes: {text!r:.80}", "malformed")
    return tuple(double or single for double, single in found)


def _frames(entry: Mapping[str, Any], number: int, where: str) -> Question:
    return Question(
        _id(entry, ("id", "Unnamed: 0", ""), number), _get(entry, "Prompt", str, where),
        (_answer(entry, "Answer", where),), "", kind=_optional(entry, "reasoning_types"),
        links=_links(entry.get("wiki_links"), where),
    )  # fmt: skip


def _squad(entry: Mapping[str, Any], number: int, where: str) -> Question:
    if entry.get("is_impossible"):
        raise BadEntry(f"{where}: the question is marked as unanswerable", UNANSWERABLE)
    answers = tuple(_get(a, "text", str, f"{where}.answers") for a in _get(entry, "answers", list, where))
    title = _get(entry, "title", str, where).replace("_", " ")
    passage = Document(title, _get(entry, "context", str, where))
    text = _get(entry, "question", str, where)
    return Question(_id(entry, ("id",), number), text, answers, "", contexts=(passage,), gold=(0,))


def _searcher(entry: Mapping[str, Any], number: int, where: str) -> Question:
    return Question(
        _id(entry, ("id",), number), _get(entry, "Question", str, where), _texts(entry.get("answer"), "answer", where),
        _optional(entry, "source"), level=_optional(entry, "Level"),
    )  # fmt: skip


def _plain(entry: Mapping[str, Any], number: int, where: str) -> Question:
    listed = next((f for f in ("answers", "golden_answers") if f in entry), None)
    if listed:
        answers = _texts(entry[listed], listed, where)
    elif isinstance(entry.get("answer"), list):
        answers = _texts(entry["answer"], "answer", where)
    else:
        answers = (_answer(entry, "answer", where),)
        if re.fullmatch(r"\[\s*(['\"]).*\1\s*\]", answers[0].strip(), re.DOTALL):
            what = f"holds a list written as a text: {answers[0]!r:.60}; make it a JSON list"
            raise BadEntry(f"{where}: field 'answer' {what}", "malformed")
    return Question(
        _id(entry, ("id", "_id", "idx", "question_id"), number), _get(entry, "question", str, where), answers,
        _optional(entry, "source", "data_source"), kind=_optional(entry, "type"), level=_optional(entry, "level"),
    )  # fmt: skip


Parser = Callable[[Mapping[str, Any], int, str], Question]
# In the order in which they are recognised: by the first whose fields an entry has.
PARSERS: dict[str, tuple[frozenset[str], Parser]] = {
    "squad": (frozenset({"context", "title", "answers", "question"}), _squad),
    "ircot": (frozenset({"question_text", "answers_objects"}), _ircot),
    "musique": (frozenset({"question", "paragraphs"}), _musique),
    "2wiki": (frozenset({"question", "context", "supporting_facts", "evidences"}), _twowiki),
    "hotpot": (frozenset({"question", "context", "supporting_facts"}), _hotpot),
    "frames": (frozenset({"Prompt", "Answer"}), _frames),
    "bamboogle": (frozenset({"Question", "Answer", "Q1", "A1", "Q2", "A2"}), _bamboogle),
    "searcher": (frozenset({"Question", "answer"}), _searcher),
    "plain": (frozenset({"question"}), _plain),
}
