"""What conversational recommenders are asked, and how their replies are read (arXiv 2504.20458, section 3).

A prompt holds the dialogue, the latest list and the latest critique, never what was really recommended next. The
wording is ours. Text of dialogues, catalogues and critiques stands on one line, with control tokens broken up.
"""

import re
from collections.abc import Sequence

from jaxrec.data.dialogues import SYSTEM, USER, Dialogue
from jaxrec.data.item_catalogue import ItemCatalogue
from jaxrec.tools.conversation import Ask
from jaxrec.tools.teacher.schema import without_thinking
from rl.envs.tags import neutralize

MARKUP = ("<|", "|>", "</", "<s>", "[INST", "[/INST")  # control tokens of common models
ROLES = ("User", "System")  # as prompts call the two sides
QUERY = "Query:"
_BOLD = re.compile(r"\*\*\s*(\S(?:.*?\S)?)\s*\*\*")

_ACT = "Play the {system} of the conversation above, who recommends {what} to the {user}."
_FIRST = (
    "Name {k} of them that fit what the {user} has said; where nothing shows what is wanted, name any {k}."
)  # fmt: skip
_AGAIN = (
    "The {user} was not content with the Recommendation above. Name {k} others that answer {why}; repeat none of it."
)
_TITLES = (
    "Write one per line, numbered from 1, the name in bold with its year in round brackets, as in "
    "'1. **Name (year)**'. Write no description and nothing else."
)
_SEARCH = (
    "You cannot see the catalogue. A search engine can: it compares a query with names and attributes ({attributes}). "
    "Reason in a few words about what the {user} wants and does not want{why}, then write one query that describes it. "
    "Name no title in the query. Answer in two lines:\nAnalysis: <your reasoning>\n" + QUERY + " <the query>"
)


def one_line(text: str, tags: Sequence[str] = MARKUP) -> str:
    """Text from outside as a prompt may hold it."""
    return neutralize(" ".join(text.split()), tags)


class RecommenderPrompts:
    """Prompts of a pretrained model over one catalogue. what: the items, in the plural. attribute_chars: characters of
    each attribute of an item of a list, 0 for all (:func:`jaxrec.data.item_catalogue.shown_values`). Raises ValueError
    for a catalogue of fewer than k items."""

    def __init__(
        self, catalogue: ItemCatalogue, k: int, *, what: str = "items", roles: tuple[str, str] = ROLES,
        attribute_chars: int = 0,
    ):  # fmt: skip
        check_k(k, catalogue)
        self.catalogue, self.k, self.what, self._chars = catalogue, k, what, attribute_chars
        self._roles = dict(zip((USER, SYSTEM), roles, strict=True))

    def titles(self, ask: Ask) -> str:
        """Asks for k titles."""
        why = f"the Feedback of the {self._roles[USER]}" if ask.critique else "the conversation better"
        task = (_AGAIN if ask.shown else _FIRST).format(k=self.k, user=self._roles[USER], why=why)
        return self._prompt(ask, f"{self._act} {task} {_TITLES}")

    def query(self, ask: Ask) -> str:
        """Asks for an analysis and a search query."""
        why = ", and about the Feedback on the Recommendation" if ask.critique else ""
        attributes = ", ".join(self.catalogue.order)
        return self._prompt(
            ask, f"{self._act} {_SEARCH.format(attributes=attributes, user=self._roles[USER], why=why)}"
        )

    @property
    def _act(self) -> str:
        return _ACT.format(system=self._roles[SYSTEM], user=self._roles[USER], what=self.what)

    def _prompt(self, ask: Ask, instruction: str) -> str:
        turns = [f"{self._roles[turn.role]}: {one_line(turn.text)}" for turn in ask.dialogue.turns]
        parts = ["## Conversation\n" + "\n".join(turns)]
        if ask.shown:
            listing = [f"{number}. {self._item(item)}" for number, item in enumerate(ask.shown, start=1)]
            parts.append("\n".join([f"## Recommendation\n{self._roles[SYSTEM]}:", *listing]))
        if ask.critique:
            parts.append(f"## Feedback\n{self._roles[USER]}: {one_line(ask.critique)}")
        return "\n\n".join([*parts, f"## Instruction\n{instruction}"])

    def _item(self, item: int) -> str:
        return self.catalogue.text(item, self._chars, one_line)


class QueryPrompts:
    """Prompts of a model of ours that has learned to write queries: no instruction, one line per turn, the next line is
    the query. The same for reinforcement learning (``rl.envs.user``) and for a search.

    roles: of user and recommender. turns: latest ones that are shown, 0 for all. attributes: show those of a list's
    items too. reserved: more strings that text from outside may not hold, such as the tokenizer's control tokens.
    """

    stop = ("\n",)

    def __init__(
        self, catalogue: ItemCatalogue, *, roles: tuple[str, str] = ("Seeker", "Recommender"), turns: int = 0,
        attributes: bool = False, reserved: Sequence[str] = (),
    ):  # fmt: skip
        if turns < 0:
            raise ValueError(f"turns={turns} must be at least 1, or 0 for all")
        self.catalogue, self.turns, self.attributes = catalogue, turns, attributes
        self._roles = dict(zip((USER, SYSTEM), roles, strict=True))
        # With the labels broken up, nobody speaks for another.
        self.reserved = (*MARKUP, *reserved, *(f"{role}:" for role in roles), QUERY)

    def prompt(self, dialogue: Dialogue) -> str:
        """Up to the place where the query begins."""
        turns = dialogue.turns[-self.turns :]
        lines = [f"{self._roles[turn.role]}: {one_line(turn.text, self.reserved)}" for turn in turns]
        return "\n".join([*lines, QUERY])

    def show(self, items: Sequence[int], critique: str) -> str:
        """What follows a query: its answer, the critique if there is one, and the place of the next query."""
        said = f"{self._roles[USER]}: {one_line(critique, self.reserved)}\n" if critique else ""
        return f"{self._roles[SYSTEM]}: {'; '.join(map(self._item, items))}\n{said}{QUERY}"

    def _item(self, item: int) -> str:
        known = self.catalogue.attributes[item]
        values = [value for name in self.catalogue.order for value in known.get(name, ())] if self.attributes else []
        return one_line(" ".join([self.catalogue.titles[item], *(["-", *values] if values else [])]), self.reserved)


def bold_titles(text: str) -> list[str]:
    """The first bold text of every line that has one.

    >>> bold_titles("1. **Heat (1995)** with **stars**\\nNo title\\n2. ** Ran **")
    ['Heat (1995)', 'Ran']
    """
    return [found[1] for line in without_thinking(text).splitlines() if (found := _BOLD.search(line))]


def written_query(text: str) -> str:
    """The line behind the last "Query:", without marks of emphasis around it; "" where there is none."""
    _, found, said = without_thinking(text).rpartition(QUERY)
    lines = said.strip().strip("*").strip().splitlines() if found else []
    return " ".join(lines[0].strip("\"'*` ").split()) if lines else ""


def without_speaker(text: str, speaker: str = ROLES[1]) -> str:
    """A reply without the name of its speaker in front. (The released code strips the letters of "System:" there, which
    eats the first letters of some titles.)"""
    return text.strip().removeprefix(f"{speaker}:").lstrip()


def check_k(k: int, catalogue: ItemCatalogue) -> None:
    """Raises ValueError where lists of k different items cannot be had."""
    if not 1 <= k <= len(catalogue):
        raise ValueError(f"k={k} must lie between 1 and the number of items of the catalogue, {len(catalogue)}")
