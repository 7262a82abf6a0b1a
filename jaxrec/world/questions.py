"""Questions over chains of the embedded world's facts, and the passages that answer them.

"What is the region of the birthplace of the maker of Slow Tavern?" needs three facts, each about what the one before
names. A chain has 1 to 3 hops. Every subject has one passage with all that is known of it, so that each hop is found in
one passage; which facts the base model also knows by heart is said by ``Fact.internal``.
"""

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np

from jaxrec.world.encyclopaedia import Fact, by_subject, passage

# Relations whose object is itself a subject, and the one asked of it next.
_NEXT = {"maker": "birthplace", "birthplace": "region"}
MOST_HOPS = 3
SPLITS = ("cold", "train", "test")


@dataclasses.dataclass(frozen=True)
class ChainQuestion:
    """facts: the hops, in the order in which they are found; the answer is the last one's object."""

    id: str
    text: str
    facts: tuple[Fact, ...]

    @property
    def answer(self) -> str:
        return self.facts[-1].object

    @property
    def hops(self) -> int:
        return len(self.facts)

    @property
    def known(self) -> int:
        """How many of its facts the base model's training text states."""
        return sum(f.internal for f in self.facts)


def chain_text(facts: Sequence[Fact]) -> str:
    """ "What is the birthplace of the maker of S?" for the facts (S, maker), (its object, birthplace)."""
    relations = " of ".join(f"the {fact.relation}" for fact in reversed(facts))
    return f"What is {relations} of {facts[0].subject}?"


def chains(facts: Sequence[Fact], hops: int) -> list[tuple[Fact, ...]]:
    """All chains of ``hops`` facts, in the order of their first one. Raises ValueError outside 1..3."""
    if not 1 <= hops <= MOST_HOPS:
        raise ValueError(f"hops={hops} must lie between 1 and {MOST_HOPS}")
    known = {(f.subject, f.relation): f for f in facts}
    out = []
    for first in facts:
        chain = [first]
        while len(chain) < hops and (relation := _NEXT.get(chain[-1].relation)):
            chain.append(known[chain[-1].object, relation])
        if len(chain) == hops:
            out.append(tuple(chain))
    return out


def split_of(chain: Sequence[Fact]) -> str:
    """The split of a chain: "test" and "cold" (for a supervised start) a fifth each, "train" the rest.

    Its first subject alone decides, so that no other split asks about that one, however many hops follow.
    """
    return {0: "test", 1: "cold"}.get(zlib.crc32(chain[0].subject.encode()) % 5, "train")


def questions(
    facts: Sequence[Fact], split: str, rng: np.random.Generator, count: int, hops: Sequence[int] = (1, 2, 3)
) -> list[ChainQuestion]:
    """``count`` questions, no two alike, as evenly as can be over ``hops``. Raises ValueError for an unknown split or
    more questions than there are."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; splits: {', '.join(SPLITS)}")
    pools = {h: [c for c in chains(facts, h) if split_of(c) == split] for h in hops}
    order = {h: rng.permutation(len(pool)) for h, pool in pools.items()}
    if count > (most := sum(map(len, pools.values()))):
        raise ValueError(
            f"{count} questions of {tuple(hops)} hops: {split} has {most}; ask for fewer or a larger world"
        )
    out: list[ChainQuestion] = []
    for turn in range(count):
        for h in hops:
            if len(out) < count and turn < len(pools[h]):
                chain = pools[h][order[h][turn]]
                out.append(ChainQuestion(f"{split}-{h}-{order[h][turn]}", chain_text(chain), chain))
    return out


def encyclopaedia(facts: Sequence[Fact], seed: int = 0) -> list[tuple[str, str]]:
    """(title, text) of one passage per subject that states all of its facts, in an order and wording of its own; a
    single fact in two ways, so that a search in other words than the passage's has something to find."""
    rng = np.random.Generator(np.random.PCG64([seed, 41]))
    out = []
    for subject, known in by_subject(facts).items():
        told, ways = [known[i] for i in rng.permutation(len(known))], rng.integers(0, 3, len(known))
        if len(known) == 1:
            told, ways = told * 2, np.append(0, 1 + rng.integers(2))
        out.append((subject, passage(told, ways).text))
    return out
