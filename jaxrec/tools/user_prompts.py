"""What the simulated user of GRSU (arXiv 2504.20458) is asked: one builder, for its training and for the search.

Two requests: whether it would accept one item, and what it says against a list. Every prompt comes in pieces, which are
turned into tokens apart in both places, so that a border between pieces is always one between tokens: the first piece
depends on the dialogue alone and can be run once for all items. Templates are ours; the paper's are not published.
"""

import functools
from collections.abc import Sequence
from typing import Any

from jaxrec.chat import chat_text, has_template
from jaxrec.data.dialogues import SYSTEM, USER, Dialogue
from jaxrec.data.item_catalogue import ItemCatalogue, shown_values
from jaxrec.tools.crs.prompts import MARKUP, one_line

STYLES = ("full", "short")
FEEDBACK = ("negative", "regular")
# What the prompts of style "short" hold beside roles, titles and attributes; a tokenizer of words wants to know them.
SHORT_WORDS = ("\nItem:", "\nAccept?", " -", " Yes", " No")
_CONTENT = "\x00"  # stands for a message while a chat template is taken apart; no tokenizer makes it of ordinary text

_SCORE = (
    "You are the {user} of the conversation. Decide whether you would accept the item that is recommended below: go by "
    "what you said that you like, want and do not want. Give the decision at once and no reason for it, on one line: "
    'the number of the item, its name, a question mark, then Yes or No, as in "1. <name>? Yes" or "1. <name>? No".'
)
_CRITIQUE = (
    "You are the {user} of the conversation. Read what you said that you are looking for, then answer the {system} in "
    "your own voice, in one to four sentences. {tone} Speak about attributes ({attributes}): which of them do not suit "
    "you, and what you would rather have. Do not name titles that have not been mentioned."
)
_TONE = {
    "negative": "Your feedback is negative: this list is not what you hoped for.",
    "regular": "Say honestly what you think of this list.",
}


def spellings(tokenizer: Any, word: str) -> tuple[int, ...]:
    """Ids of the tokens that are ``word`` with or without a blank before it.

    Raises ValueError where neither is one token: the model cannot say the word in one step.
    """
    ids = [tokenizer.encode(text) for text in (f" {word}", word)]
    found = tuple(dict.fromkeys(row[0] for row in ids if len(row) == 1))
    if not found:
        raise ValueError(
            f"the tokenizer has no token for {word!r}, with or without a blank before it, so that no decision can be "
            "read: take a model whose vocabulary holds it"
        )
    return found


class UserPrompts:
    """Prompts over one catalogue.

    style "full" instructs a pretrained chat model, in its chat template where ``tokenizer`` has one; "short" holds no
    instruction, one line per turn and item, for a small model that has learned the protocol from examples. roles: how
    user and system are called. feedback: what the instruction of a critique asks for, "negative" or "regular" (without
    effect in style "short"). tokenizer: of the model that is asked; None for prompts that a teacher gets as messages.
    turns: latest ones of a dialogue that are shown; attribute_chars: characters of each attribute of an item, since
    files list hundreds of actors (:func:`jaxrec.data.item_catalogue.shown_values`); 0 for all of either. decisions: how
    the two decisions are written, yes first, each one token of the tokenizer.

    Text of dialogues and items is put on one line and its control tokens are broken up. Raises ValueError for an
    unknown style or feedback, for negative numbers, and for a tokenizer that has no token for "Yes" or "No".
    """

    def __init__(
        self, catalogue: ItemCatalogue, style: str = "full", *, roles: tuple[str, str] = ("User", "System"),
        feedback: str = "negative", tokenizer: Any = None, turns: int = 0, attribute_chars: int = 0,
    ):  # fmt: skip
        for name, value in (("turns", turns), ("attribute_chars", attribute_chars)):
            if value < 0:
                raise ValueError(f"{name}={value} of a simulated user's prompts must be at least 1, or 0 for all")
        for name, value, allowed in (("style", style, STYLES), ("feedback", feedback, FEEDBACK)):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} of a simulated user's prompts must be one of {', '.join(allowed)}")
        self.catalogue, self.style, self.roles, self.tokenizer = catalogue, style, roles, tokenizer
        self.turns, self.attribute_chars = turns, attribute_chars
        self._roles = dict(zip((USER, SYSTEM), roles, strict=True))
        self._tags = MARKUP + (() if tokenizer is None else tokenizer.control_tokens())
        self.decisions = tuple(_decision(tokenizer, word) for word in ("Yes", "No"))
        self._before, self._behind = _shell(tokenizer) if style == "full" else ("", "")
        attributes = ", ".join(catalogue.order)
        words = {"user": roles[0], "system": roles[1], "attributes": attributes, "tone": _TONE[feedback]}
        self._score, self._critique = _SCORE.format(**words), _CRITIQUE.format(**words)
        self._shown: dict[int, str] = {}
        self._prefix = functools.lru_cache(maxsize=1024)(self._render)

    def messages(self) -> "UserPrompts":
        """The same dialogues and items as a teacher gets them: in style "full", without a tokenizer."""
        return UserPrompts(
            self.catalogue, "full", roles=self.roles, turns=self.turns, attribute_chars=self.attribute_chars
        )

    def score_prompt(self, dialogue: Dialogue, item: int) -> tuple[str, str, str]:
        """(what depends on the dialogue alone, the rest of the prompt, the reply up to its decision).

        Raises ValueError for a dialogue without a turn.
        """
        prefix = self._prefix(dialogue)
        if self.style == "short":
            return prefix, f"{self._item(item)}\nAccept?", ""
        # The instruction stands before the item, so that it is run once for all items.
        asked = f"{prefix}## Instruction\n{self._score}\n\n"
        return asked, f"{self._recommended([item])}{self._behind}", f"1. {self.line(self.catalogue.titles[item])}?"

    def critique_prompt(self, dialogue: Dialogue, items: Sequence[int]) -> tuple[str, str]:
        """(what depends on the dialogue alone, the rest of the prompt). Raises ValueError as :meth:`score_prompt`."""
        prefix = self._prefix(dialogue)
        if self.style == "short":
            return prefix, "".join(map(self._item, items)) + f"\n{self._roles[USER]}:"
        return prefix, f"{self._recommended(items)}\n\n## Instruction\n{self._critique}{self._behind}"

    def critique_reply(self, text: str) -> str:
        """A critique as the reply that a model learns: on one line, behind a blank where the role stands before it."""
        return f" {self.line(text)}" if self.style == "short" else self.line(text)

    def _render(self, dialogue: Dialogue) -> str:
        if not dialogue.turns:
            raise ValueError(f"dialogue {dialogue.id}: at least one turn is needed to play its user")
        shown = dialogue.turns[-self.turns :]
        turns = "\n".join(f"{self._roles[turn.role]}: {self.line(turn.text)}" for turn in shown)
        return turns if self.style == "short" else f"{self._before}## Conversation\n{turns}\n\n"

    def line(self, text: str) -> str:
        """Text from outside as prompts show it: on one line, without control tokens."""
        return one_line(text, self._tags)

    def listing(self, items: Sequence[int]) -> str:
        """A numbered list with attributes, as prompts of style "full" show it."""
        return "\n".join(f"{number}. {self._item(item)}" for number, item in enumerate(items, start=1))

    def _recommended(self, items: Sequence[int]) -> str:
        return f"## Recommendation By {self._roles[SYSTEM]}\n{self.listing(items)}"

    def _item(self, item: int) -> str:
        if item not in self._shown:
            full = self.catalogue.text(item, self.attribute_chars, self.line) if self.style == "full" else ""
            self._shown[item] = full or self._short_item(item)
        return self._shown[item]

    def _short_item(self, item: int) -> str:
        known = self.catalogue.attributes[item]
        values = [
            shown_values(known[name], self.attribute_chars, " ") for name in self.catalogue.order if known.get(name)
        ]
        behind = f" - {' '.join(values)}" if values else ""
        return f"\nItem: {self.line(self.catalogue.titles[item] + behind)}"


def _decision(tokenizer: Any, word: str) -> str:
    """With a blank before it where that is one token, as it follows a question mark; else without."""
    if tokenizer is None:
        return f" {word}"
    spellings(tokenizer, word)
    return f" {word}" if len(tokenizer.encode(f" {word}")) == 1 else word


def _shell(tokenizer: Any) -> tuple[str, str]:
    """What a chat template puts before and behind the only message."""
    if tokenizer is None or not has_template(tokenizer):
        return "", "\n\n"
    shell = chat_text(tokenizer, [{"role": "user", "content": _CONTENT}])
    before, found, behind = shell.partition(_CONTENT)
    if not found or _CONTENT in behind:
        raise ValueError(f"the model's chat template does not show a message once: {shell!r}; use style='short'")
    return before, behind
