"""Questions of the embedded world with passages that agree with, contradict, or have nothing to do with what a model
knows, and the rows of tokens that analyses of knowledge use need (arXiv 2505.11995, our reading).

An item is one question about a fact. Its prompt comes in four kinds: "closed" without a passage, "golden" with a true
one, "fake" with the same one but for another answer, "irrelevant" with a passage about something else. The passage
stands before the question and the answer cue comes last.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from analysis.neurons import check_disjoint
from analysis.segments import check_skipped, find_key, pad_labels, prompt_segments
from jaxrec.world.encyclopaedia import Fact, passage
from jaxrec.world.texts import CUE, Sample, Texts
from models.generation import pad_rows

KINDS = ("closed", "golden", "irrelevant", "fake")


@dataclasses.dataclass(frozen=True)
class Item:
    """A question and its passages. object: the internal answer. fake: what the fake passage says instead. told,
    told_fake: the words in which passages say them. way: in which of its wordings the passage states the fact."""

    subject: str
    relation: str
    object: str
    fake: str
    told: str
    told_fake: str
    question: str
    way: int
    golden: str
    contradicting: str
    irrelevant: str

    def prompt(self, kind: str) -> str:
        """The prompt of a kind of ``KINDS``."""
        texts = {"golden": self.golden, "fake": self.contradicting, "irrelevant": self.irrelevant}
        head = "" if kind == "closed" else f"Passage: {texts[kind]}\n"
        return f"{head}Question: {self.question}{CUE}"

    def sample(self, kind: str, external: bool = False) -> Sample:
        """The prompt with the internal answer, or the external one: the fake."""
        return Sample("reading", self.prompt(kind), f" {self.fake if external else self.object}")


@dataclasses.dataclass(frozen=True)
class Part:
    """Facts to ask about, and for each the objects that a fake passage may name."""

    facts: tuple[Fact, ...]
    wrong: tuple[tuple[str, ...], ...]


def parts(texts: Texts, split_answers: bool = True) -> dict[str, Part]:
    """The facts that neurons are found on, "find", and those that they are judged on, "judge"; training text holds
    conflicts about neither.

    Subjects are halved; with ``split_answers`` the objects of each relation too, and a fact is kept where subject and
    object are of one half, so that the parts share neither questions nor answers, true or fake.
    """
    known = texts.disputed("test")
    half = {subject: at % 2 for at, subject in enumerate(dict.fromkeys(f.subject for f in known))}
    out: dict[str, Part] = {}
    for at, name in enumerate(("find", "judge")):
        facts, wrong = [], []
        for f in known:
            others = texts.wrong_objects(f)
            order = {o: i for i, o in enumerate(sorted([f.object, *others]))}
            own = [o for o in others if not split_answers or order[o] % 2 == at]
            if half[f.subject] == at and own and (not split_answers or order[f.object] % 2 == at):
                facts.append(f)
                wrong.append(tuple(own))
        if not facts:
            raise ValueError(f"no fact is left to {name} neurons on: take a larger world, or data.split_answers=False")
        out[name] = Part(tuple(facts), tuple(wrong))
    check_disjoint(*({f.subject for f in p.facts} for p in out.values()), what="subjects")
    if split_answers:
        answers = [{(f.relation, o) for f, w in zip(p.facts, p.wrong) for o in (f.object, *w)} for p in out.values()]
        check_disjoint(*answers, what="answers")
    return out


def make_item(texts: Texts, fact: Fact, wrong: Sequence[str], way: int, question: int, rng) -> Item:
    """An item with random other facts in its passages, a random fake and a random irrelevant passage."""
    asked = dataclasses.replace(fact, fake=wrong[rng.integers(len(wrong))])
    others = [f for f in texts.subjects[fact.subject] if f.relation != fact.relation]
    stated = [others[i] for i in rng.permutation(len(others))[: rng.integers(0, 3)]]
    stated.insert(int(rng.integers(len(stated) + 1)), asked)
    ways = rng.integers(0, 3, len(stated))
    ways[stated.index(asked)] = way
    pool = [s for s in texts.readable["test"] if s != fact.subject]
    other = texts.subjects[pool[rng.integers(len(pool))]]
    elsewhere = [other[i] for i in rng.permutation(len(other))[: len(stated)]]
    words = texts.dialect(rng)
    told = (fact.object, asked.fake) if words is None else (words[fact.object], words[asked.fake])
    return Item(
        fact.subject, fact.relation, fact.object, asked.fake, *told, fact.question(question), way,
        passage(stated, ways, words=words).text, passage(stated, ways, [f is asked for f in stated], words).text,
        passage(elsewhere, rng.integers(0, 3, len(elsewhere)), words=words).text,
    )  # fmt: skip


def make_items(
    texts: Texts, part: Part, asked: Sequence[tuple[int, int]], count: int, rng: np.random.Generator
) -> list[Item]:
    """Up to ``count`` different items, the same number of each (fact number, question number) of ``asked`` and of each
    wording, as far as there are so many."""
    combined = [(at, question, way) for at, question in asked for way in range(3)]
    found: dict[tuple[str, str], Item] = {}
    for _ in range(4):  # rounds, in case of small worlds that make the same item again
        left = count - len(found)
        rounds = -(-left // len(combined))
        order = [i for _ in range(rounds) for i in rng.permutation(len(combined))][:left]
        for i in order:
            at, question, way = combined[i]
            item = make_item(texts, part.facts[at], part.wrong[at], way, question, rng)
            found.setdefault((item.question, item.contradicting), item)
    return list(found.values())


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts without answers, for the analysis of flows. tokens, labels (of ``analysis.SEGMENTS``): int32 [B, T].
    cues: int32 [B, 1], the last token of each. targets: int32 [B, 1, 2], first tokens of internal and external answer.
    """

    tokens: np.ndarray
    labels: np.ndarray
    cues: np.ndarray
    targets: np.ndarray


def offsets(tokenizer, ids: Sequence[int]) -> list[tuple[int, int]]:
    """The span of characters of each token. Raises ValueError for text beyond ASCII, where bytes are not characters."""
    table = tokenizer.token_bytes()
    if not all(table[i].isascii() for i in ids):
        raise ValueError("spans are found in ASCII text only")
    ends = np.cumsum([0, *(len(table[i]) for i in ids)]).tolist()
    return list(itertools.pairwise(ends))


def _labels(tokenizer, item: Item, kind: str, ids: Sequence[int]) -> tuple[np.ndarray, str | None]:
    text, spans = item.prompt(kind), offsets(tokenizer, ids)
    question = text.index("Question: ")
    cue = len(text) - len(CUE)
    at = lambda place: sum(end <= place for _, end in spans)  # noqa: E731  tokens that end by then
    bounds = (max(question - 1, 0), cue)  # the line's end belongs to the mark of the question
    keys, reason = [], None
    if kind in ("golden", "fake"):
        alias = item.told if kind == "golden" else item.told_fake
        keys, reason = find_key(text, (len("Passage:"), bounds[0]), [alias], spans)
    context = (1 if kind != "closed" else 0, at(bounds[0]))
    query = (at(bounds[0]), at(bounds[1]))
    return prompt_segments(len(ids), context, keys, query, (query[1], len(ids))), reason


def encode_prompts(tokenizer, items: Sequence[Item], kind: str, width: int = 32) -> Prompts:
    """Tokens and segments of the prompts of a kind. Items whose key is not found are left out, see ``check_skipped``;
    so are those whose two answers begin alike. The width is a multiple of ``width``."""
    rows, labels, targets, reasons = [], [], [], []
    for item in items:
        ids = tokenizer.encode(item.prompt(kind))
        label, reason = _labels(tokenizer, item, kind, ids)
        first = [tokenizer.encode(f" {answer}")[0] for answer in (item.object, item.fake)]
        reason = reason or ("answers begin alike" if first[0] == first[1] else None)
        reasons.append(reason)
        if reason is None:
            rows.append(ids)
            labels.append(label)
            targets.append([first])
    check_skipped(reasons)
    tokens, lengths = pad_rows(rows)
    full = -(-tokens.shape[1] // width) * width
    tokens = np.pad(tokens, ((0, 0), (0, full - tokens.shape[1])))
    return Prompts(tokens, pad_labels(labels, full), lengths[:, None] - 1, np.array(targets, np.int32))


def counted_tokens(rows: Mapping[str, np.ndarray], counted: str) -> np.ndarray:
    """bool [B, T] of rows of ``world_model.arrays``: "answer", the last token of the prompt and those of the answer
    (not the one that ends it); "cue", the former alone; "all", every token but the one that ends it."""
    at, lengths = np.arange(rows["tokens"].shape[1]), rows["lengths"][:, None]
    start = rows["mask"].argmax(axis=1)[:, None]
    everything = at < lengths - 1
    return {"answer": everything & (at >= start - 1), "cue": at == start - 1, "all": everything}[counted]
