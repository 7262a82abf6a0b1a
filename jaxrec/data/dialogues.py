"""Conversations in which items are recommended, and the instances that they are tested with (arXiv 2504.20458).

Items are numbers of a :class:`jaxrec.data.item_catalogue.ItemCatalogue`, from 0. What a recommender or a simulated user
sees is a :class:`Dialogue`; the items that were really recommended next stand apart, in an :class:`Instance`.
"""

import collections
import dataclasses
from collections.abc import Sequence

USER, SYSTEM = "user", "system"
ROLES = (USER, SYSTEM)
REPEATED = "an item was named before"  # why a turn is no instance where only new items count


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one side said. items: numbers of the catalogue's items that it names, in order.

    Raises ValueError for another role than :data:`ROLES`.
    """

    role: str
    text: str
    items: tuple[int, ...] = ()

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r} of a turn must be one of {', '.join(ROLES)}")


def spoken(turns: Sequence[Turn], names: Sequence[str]) -> str:
    """Turns as text, a line each. names: of user and system."""
    own = dict(zip(ROLES, names, strict=True))
    return "\n".join(f"{own[turn.role]}: {turn.text}" for turn in turns)


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """Turns in order, oldest first."""

    id: str
    turns: tuple[Turn, ...]

    @property
    def items(self) -> tuple[int, ...]:
        """Items that either side named, each once, in order."""
        return tuple(dict.fromkeys(item for turn in self.turns for item in turn.items))


@dataclasses.dataclass(frozen=True)
class Instance:
    """A dialogue up to a turn of the system, and the items which that turn recommends (``labels``, never empty)."""

    dialogue: Dialogue
    labels: tuple[int, ...]

    def __post_init__(self):
        if not self.labels:
            raise ValueError(f"instance {self.dialogue.id} has no label; leave it out before it gets here")
        if not self.dialogue.turns:
            raise ValueError(f"instance {self.dialogue.id} has no turn before its label; at least one is needed")


def instances(
    dialogues: Sequence[Dialogue], *, only_new: bool = True, drop_skipped_turns: bool = False
) -> tuple[list[Instance], dict[str, int]]:
    """Every system turn that names items, with the turns before it, as the released code of GRSU cuts them.

    only_new: leave out turns that name an item which either side named before. drop_skipped_turns: as the released code
    does, leave such a turn out of the history of later instances too. Returns instances, whose ids are
    "<dialogue>:<number of the turn>", and how many system turns were not used, by reason.
    """
    out: list[Instance] = []
    skipped: collections.Counter[str] = collections.Counter()
    for dialogue in dialogues:
        past: list[Turn] = []
        for number, turn in enumerate(dialogue.turns):
            seen = {item for earlier in past for item in earlier.items}
            reason = _unused(turn, past, seen if only_new else set())
            if turn.role == SYSTEM and reason:
                skipped[reason] += 1
            elif turn.role == SYSTEM:
                labels = tuple(dict.fromkeys(turn.items))
                out.append(Instance(Dialogue(f"{dialogue.id}:{number}", tuple(past)), labels))
            if not (drop_skipped_turns and turn.role == SYSTEM and reason == REPEATED):
                past.append(turn)
    return out, dict(skipped)


def _unused(turn: Turn, past: Sequence[Turn], seen: set[int]) -> str:
    if not turn.items:
        return "no item of the catalogue"
    if not past:
        return "no turn before it"
    return REPEATED if seen & set(turn.items) else ""
