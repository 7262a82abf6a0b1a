"""What plays in a search over conversations: a recommender that gives lists, a user who scores and criticises them.

Both are asked batches, for many conversations at once, and see the turns of a dialogue, never what was really
recommended next. Items are numbers of the catalogue.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
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
    """``k``: items of a list. May have ``counts``, see :class:`Tally`."""

    k: int

    def recommend(self, asks: Sequence[Ask]) -> list[Reply]:
        """One list of ``k`` items for each, in order. Raises RuntimeError, naming the ask, for one that cannot be had
        in a bounded number of tries."""


class User(Protocol):
    """The simulated user. May have ``counts``, see :class:`Tally`."""

    def score(self, dialogues: Sequence[Dialogue], items: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """For each dialogue float64 [number of its items] in [0, 1], how likely each is accepted; NaN where no score
        could be had."""

    def criticise(self, requests: Sequence[Criticise]) -> list[str]:
        """One text for each, in order, in the user's voice; "" where none could be had in a bounded number of tries."""


Counts = Mapping[str, Mapping[str, int]]  # player -> what -> how often


class Tally:
    """What players count from here on: what they did, and what they could not use, by reason.

    players: by the name that they are counted under. Their ``counts`` is a counter that only grows; a player without
    one counts nothing.
    """

    def __init__(self, players: Mapping[str, object]):
        self._players = players
        self._before = self._now()

    def _now(self) -> dict[str, collections.Counter[str]]:
        return {name: collections.Counter(getattr(player, "counts", {})) for name, player in self._players.items()}

    def take(self) -> dict[str, dict[str, int]]:
        """What has been counted since the last call; players that have counted nothing are left out."""
        before, self._before = self._before, self._now()
        found = {name: dict(now - before[name]) for name, now in self._before.items()}
        return {name: counts for name, counts in found.items() if counts}


def total_counts(parts: Iterable[Counts]) -> dict[str, dict[str, int]]:
    """The sum of what was counted at several times."""
    out: dict[str, collections.Counter[str]] = {}
    for part in parts:
        for player, counts in part.items():
            out.setdefault(player, collections.Counter()).update(counts)
    return {player: dict(counts) for player, counts in out.items()}


def seed_of(*parts: object) -> int:
    """A number in [0, 2**31) that depends on the parts alone, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1
