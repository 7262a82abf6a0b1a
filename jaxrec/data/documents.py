"""Sets of questions over many documents, in the field's JSON formats.

    squad    SQuAD 1.1 (arXiv 1606.05250): {"data": [{"title", "paragraphs": [{"context", "qas": [...]}]}]}; the gold
             document is the question's own passage, the others are passages drawn from the whole file
    hotpot   HotpotQA (arXiv 1809.09600): [{"_id", "question", "answer", "context": [[title, [sentence, ...]], ...],
             "supporting_facts": [[title, sentence], ...]}]; gold are the documents of the supporting facts
    jsonl    one object a line: {"question", "answers": [...], "documents": [{"title", "text"}, ...], "gold": [number,
             ...]}, with "id" where there is one

Prompts of many documents are made from SQuAD and HotpotQA as RULER (arXiv 2404.06654) does: other documents of the file
are put among them. Whatever is not as it should be is an error that names the file, the entry and the field.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FORMATS = ("squad", "hotpot", "jsonl")


@dataclasses.dataclass(frozen=True)
class Document:
    """``title`` may be empty."""

    title: str
    text: str


@dataclasses.dataclass(frozen=True)
class Question:
    """``answers`` are all right ones. gold: numbers of the documents that hold the answer. kinds: what each document
    is, where that is known."""

    id: str
    question: str
    answers: tuple[str, ...]
    documents: tuple[Document, ...]
    gold: tuple[int, ...]
    kinds: tuple[str, ...] = ()


def read_questions(
    path: str | Path, form: str, rng: np.random.Generator, documents: int = 0, count: int = 0
) -> list[Question]:
    """``count`` questions of a file (0: all), in random order, each with ``documents`` documents.

    form: one of :data:`FORMATS`. Documents of SQuAD and HotpotQA are filled up from the rest of the file and stand in
    random order; with ``documents=0`` HotpotQA keeps its own, and "jsonl" always does. Which questions are drawn does
    not depend on ``documents``. Raises ValueError as the module says, and for a file with fewer questions than
    ``count`` or too few documents; FileNotFoundError.
    """
    if form not in FORMATS:
        raise ValueError(f"no format {form!r} of documents; formats: {', '.join(FORMATS)}")
    path = Path(path)
    makers = {"squad": _squad, "hotpot": _hotpot, "jsonl": _jsonl}[form](path, documents)
    if len(makers) < max(count, 1):
        raise ValueError(f"{path}: {len(makers)} questions, {max(count, 1)} were asked for")
    order = rng.permutation(len(makers))[: count or None]
    seeds = rng.integers(0, 2**63, len(order))
    return [makers[i](np.random.Generator(np.random.PCG64(int(seed)))) for i, seed in zip(order, seeds)]


Maker = Callable[[np.random.Generator], Question]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no UTF-8, no JSON
        raise ValueError(f"{path}: not JSON: {error}") from error


def _get(entry: Any, field: str, kind: type, where: str, empty: bool = False) -> Any:
    """``entry[field]``, checked. where: file and entry, for the error."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: an object with {field!r} was expected, not {type(entry).__name__}")
    value = entry.get(field)
    if not isinstance(value, kind) or not (empty or value):
        name = {str: "a text", list: "a list"}[kind]
        raise ValueError(f"{where}: field {field!r} is missing{'' if empty else ', empty'} or not {name}")
    return value


def _distinct(values: Sequence[Any], field: str, where: str) -> tuple[str, ...]:
    for value in values:
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}: field {field!r} holds {value!r}, which is empty or no text")
    return tuple(dict.fromkeys(values))


def _among(
    own: Sequence[Document], gold: Sequence[int], pool: Sequence[Document], documents: int, rng: np.random.Generator
) -> tuple[tuple[Document, ...], tuple[int, ...]]:
    """``own`` among documents of the pool with other texts and titles of their own, in random order: (all, gold)."""
    texts, titles = {d.text for d in own}, {d.title for d in own if len(own) > 1}
    more: list[Document] = []
    for i in rng.permutation(len(pool)):
        if len(own) + len(more) >= documents:
            break
        if pool[i].text not in texts and pool[i].title not in titles:
            more.append(pool[i])
            texts.add(pool[i].text)
    everything = [*own, *more]
    if len(everything) < documents:
        raise ValueError(f"{documents} documents were asked for, but the file gives no more than {len(everything)}")
    order = rng.permutation(len(everything))
    place = {int(old): new for new, old in enumerate(order)}
    return tuple(everything[i] for i in order), tuple(sorted(place[i] for i in gold))


def _squad(path: Path, documents: int) -> list[Maker]:
    pool: list[Document] = []
    found: list[tuple[str, str, tuple[str, ...], int]] = []
    for a, article in enumerate(_get(_json(path), "data", list, str(path))):
        where = f"{path}: data[{a}]"
        title = _get(article, "title", str, where, empty=True)
        for p, paragraph in enumerate(_get(article, "paragraphs", list, where)):
            at = f"{where}.paragraphs[{p}]"
            pool.append(Document(title.replace("_", " "), _get(paragraph, "context", str, at)))
            for q, asked in enumerate(_get(paragraph, "qas", list, at, empty=True)):
                here = f"{at}.qas[{q}]"
                answers = [_get(x, "text", str, f"{here}.answers") for x in _get(asked, "answers", list, here)]
                text = _get(asked, "question", str, here).strip()
                found.append((_get(asked, "id", str, here), text, _distinct(answers, "answers", here), len(pool) - 1))
    if len({id for id, *_ in found}) < len(found):
        raise ValueError(f"{path}: field 'id' of two questions is the same")

    def make(id: str, text: str, answers: tuple[str, ...], own: int, rng: np.random.Generator) -> Question:
        return Question(id, text, answers, *_among([pool[own]], [0], pool, documents, rng))

    return [lambda rng, entry=entry: make(*entry, rng) for entry in found]


def _hotpot(path: Path, documents: int) -> list[Maker]:
    entries = _json(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path}: a list of questions was expected")
    found, ids = [], set()
    for e, entry in enumerate(entries):
        where = f"{path}: entry {e}"
        id, text = _get(entry, "_id", str, where), _get(entry, "question", str, where).strip()
        answers = _distinct([_get(entry, "answer", str, where)], "answer", where)
        own = []
        for d, pair in enumerate(_get(entry, "context", list, where)):
            if not (
                isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], list)
            ):
                raise ValueError(f"{where}: field 'context' holds no [title, [sentence, ...]] at {d}")
            sentences = "".join(s for s in pair[1] if isinstance(s, str)).strip()
            if not sentences:
                raise ValueError(f"{where}: field 'context' holds no sentence at {d}")
            own.append(Document(pair[0], sentences))
        titles = {document.title: i for i, document in enumerate(own)}
        gold = set()
        for fact in _get(entry, "supporting_facts", list, where):
            if not (isinstance(fact, list) and fact and fact[0] in titles):
                raise ValueError(f"{where}: field 'supporting_facts' names {fact!r}, which is no title of its context")
            gold.add(titles[fact[0]])
        if id in ids:
            raise ValueError(f"{where}: field '_id' is {id!r} again")
        ids.add(id)
        found.append((id, text, answers, own, sorted(gold)))
    pool = [document for *_, own, _ in found for document in own]

    def make(id, text, answers, own, gold, rng: np.random.Generator) -> Question:
        if not documents:
            return Question(id, text, answers, tuple(own), tuple(gold))
        return Question(id, text, answers, *_among(own, gold, pool, documents, rng))

    return [lambda rng, entry=entry: make(*entry, rng) for entry in found]


def _jsonl(path: Path, documents: int) -> list[Maker]:
    del documents  # the file says which
    found: dict[str, Question] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
        text = _get(entry, "question", str, where).strip()
        answers = _distinct(_get(entry, "answers", list, where), "answers", where)
        listed = _get(entry, "documents", list, where)
        own = tuple(
            Document(
                _get({"title": "", **d} if isinstance(d, dict) else d, "title", str, f"{where}: documents[{i}]", True),
                _get(d, "text", str, f"{where}: documents[{i}]"),
            )
            for i, d in enumerate(listed)
        )
        gold = _get(entry, "gold", list, where)
        for i in gold:
            if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < len(own):
                raise ValueError(f"{where}: field 'gold' holds {i!r}, which is no number of its {len(own)} documents")
        id = str(entry.get("id", number))
        if id in found:
            raise ValueError(f"{where}: field 'id' is {id!r} again")
        found[id] = Question(id, text, answers, own, tuple(sorted(set(gold))))
    return [lambda rng, question=question: question for question in found.values()]
