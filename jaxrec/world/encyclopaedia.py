"""What can be said of the embedded world: facts, the sentences that state them, and short passages.

A fact is *internal* (the base model's training text states it), *external* (passages alone do), or both. Every fact has
a wrong version, an object of the same kind that is true of nothing it is confused with, for passages that contradict.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxrec.world.generate import World

# relation -> (what its subject is, what its object is, sentences that state it, questions that ask for it)
RELATIONS: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "maker": (
        "item", "maker",
        ("{s} was made by {o}.", "The maker of {s} is {o}.", "{o} made {s}."),
        ("Who made {s}?", "Who is the maker of {s}?"),
    ),
    "era": (
        "item", "era",
        ("{s} appeared in the {o}.", "The {o} saw {s} appear.", "{s} is a work of the {o}."),
        ("When did {s} appear?", "Which years is {s} from?"),
    ),
    "genre": (
        "item", "genre",
        ("{s} is a {o}.", "As a work, {s} is a {o}.", "Readers call {s} a {o}."),
        ("What kind of work is {s}?", "What is {s}?"),
    ),
    "mood": (
        "item", "mood",
        ("{s} feels {o}.", "The mood of {s} is {o}.", "Many find {s} {o}."),
        ("How does {s} feel?", "What is the mood of {s}?"),
    ),
    "theme": (
        "item", "theme",
        ("{s} is about {o}.", "The theme of {s} is {o}.", "{s} tells of {o}."),
        ("What is {s} about?", "What is the theme of {s}?"),
    ),
    "birthplace": (
        "maker", "place",
        ("{s} was born in {o}.", "{o} is where {s} was born.", "{s} comes from {o}."),
        ("Where was {s} born?", "Where does {s} come from?"),
    ),
    "region": (
        "place", "region",
        ("{s} lies in {o}.", "{s} is a town in {o}.", "In {o} lies {s}."),
        ("Where does {s} lie?", "In which land is {s}?"),
    ),
}  # fmt: skip
PLAIN_WORDS = ("Passage", "Question", "Answer", "Seeker", "Recommender", "none")


@dataclasses.dataclass(frozen=True)
class Fact:
    """``subject`` has ``object`` by ``relation``; ``fake`` is a wrong object. internal: the base model's training text
    states it. external: passages do."""

    subject: str
    relation: str
    object: str
    fake: str
    internal: bool
    external: bool

    def statement(self, way: int = 0, fake: bool = False, words: Mapping[str, str] | None = None) -> str:
        """One sentence, in one of several ways to say it (counted modulo their number). words: what to call each
        object, by object; None: by its own name."""
        ways = RELATIONS[self.relation][2]
        what = self.fake if fake else self.object
        return ways[way % len(ways)].format(s=self.subject, o=what if words is None else words[what])

    def question(self, way: int = 0) -> str:
        """A question whose answer is the object."""
        ways = RELATIONS[self.relation][3]
        return ways[way % len(ways)].format(s=self.subject)


@dataclasses.dataclass(frozen=True)
class Passage:
    """A few sentences about one subject. stated: the facts, in order; fakes: whether each is stated wrongly."""

    subject: str
    text: str
    stated: tuple[Fact, ...]
    fakes: tuple[bool, ...]


def facts(world: World, seed: int = 0, internal: float = 0.5, both: float = 0.2) -> list[Fact]:
    """All facts of a world, subject by subject. A subject's facts are of one kind: internal with probability
    ``internal`` (the first ``both`` of these shares also in passages), else external.

    Raises ValueError for shares outside 0..1 or ``both`` above ``internal``.
    """
    if not 0 <= both <= internal <= 1:
        raise ValueError(f"want 0 <= both ({both}) <= internal ({internal}) <= 1: shares of subjects")
    rng = np.random.Generator(np.random.PCG64([world.config.seed, seed, 1]))
    chains = {"birthplace": world.maker_place, "region": world.place_region}
    subjects = {"item": world.titles[1:], "maker": world.values["maker"], "place": world.values["place"]}
    out = []
    for kind, names in subjects.items():
        # Whole numbers decide, so that every machine draws alike.
        ticket = rng.integers(0, 10_000, len(names))
        relations = [name for name, (subject, *_) in RELATIONS.items() if subject == kind]
        objects = {name: world.values[RELATIONS[name][1]] for name in relations}
        shift = {name: rng.integers(1, max(len(objects[name]), 2), len(names)) for name in relations}
        for i, name in enumerate(names):
            inside, shared = ticket[i] < round(10_000 * internal), ticket[i] < round(10_000 * both)
            for relation in relations:
                values = objects[relation]
                chain = chains.get(relation)
                at = int(world.attributes[relation][i + 1] if chain is None else chain[i])
                wrong = values[(at + int(shift[relation][i])) % len(values)]
                out.append(Fact(name, relation, values[at], wrong, bool(inside), bool(not inside or shared)))
    return out


def passage(
    stated: Sequence[Fact], ways: Sequence[int], fakes: Sequence[bool] | None = None,
    words: Mapping[str, str] | None = None,
) -> Passage:  # fmt: skip
    """Sentences about one subject, in the order given. words: see :meth:`Fact.statement`."""
    fakes = tuple(fakes) if fakes is not None else (False,) * len(stated)
    text = " ".join(f.statement(w, fake, words) for f, w, fake in zip(stated, ways, fakes, strict=True))
    return Passage(stated[0].subject, text, tuple(stated), fakes)


def by_subject(facts: Sequence[Fact]) -> dict[str, tuple[Fact, ...]]:
    """The facts of each subject, in order."""
    out: dict[str, list[Fact]] = {}
    for fact in facts:
        out.setdefault(fact.subject, []).append(fact)
    return {name: tuple(known) for name, known in out.items()}
