"""What plays in a search over conversations: a recommender that gives lists, a user who scores and criticises them.

Both are asked batches, for many conversations at once, and see the turns of a dialogue, never what was really
recommended next. Items are numbers of the catalogue.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from jaxrec.data.dialogues import Dialogue


@dataclasses.dataclass(frozen=True)
class Ask:
    """A list is wanted. shown, critique: the list to revise and what the user says of it; empty in the first round.
    past: items of all lists on the way here, ``shown`` included. seed: decides what is drawn. name: for messages."""

    dialogue: Dialogue
    shown: tuple[int, ...] = ()
    critique: str = ""
    past: tuple[int, ...] = ()
    seed: int = 0
    name: str = ""

    def __post_init__(self):
        if not self.dialogue.turns:
            raise ValueError(f"dialogue {self.dialogue.id}: at least one turn is needed to recommend from")
        if bool(self.shown) != bool(self.critique) and self.critique:
            raise ValueError(f"dialogue {self.dialogue.id}: a critique needs the list that it is about")


@dataclasses.dataclass(frozen=True)
class Reply:
    """items: different items of the catalogue, best first. text: as the recommender wrote them. tries: how often it was
    asked. unsure: how many names matched no title well."""

    items: tuple[int, ...]
    text: str = ""
    tries: int = 1
    unsure: int = 0


@dataclasses.dataclass(frozen=True)
class Criticise:
    """A critique of a list is wanted."""

    dialogue: Dialogue
    shown: tuple[int, ...]
    seed: int = 0
    name: str = ""


class Recommender(Protocol):
    """``k``: items of a list."""

    k: int

    def recommend(self, asks: Sequence[Ask]) -> list[Reply]:
        """One list of ``k`` items for each, in order. Raises RuntimeError, naming the ask, for one that cannot be had
        in a bounded number of tries."""


class User(Protocol):
    """The simulated user."""

    def score(self, dialogues: Sequence[Dialogue], items: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """For each dialogue float64 [number of its items] in [0, 1], how likely each is accepted; NaN where no score
        could be had."""

    def criticise(self, requests: Sequence[Criticise]) -> list[str]:
        """One text for each, in order, in the user's voice; "" where none could be had in a bounded number of tries."""


def seed_of(*parts: object) -> int:
    """A number in [0, 2**31) that depends on the parts alone, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1
