"""A conversation in the terminal with a recommender, and what a simulated user thinks of each thing it recommends."""

import math
import re
from collections.abc import Callable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxrec.data.dialogues import SYSTEM, USER, Dialogue, Turn
from jaxrec.data.item_catalogue import ItemCatalogue, shown_values
from jaxrec.tools.conversation import Ask, Criticise, Recommender, Reply, User, seed_of
from jaxrec.tools.search.base import one_line

_CELL, _WHY = 160, 800  # characters of an attribute in a table, and where an item is told about
HELP = (
    "Say what you look for. /critique lets the simulated user answer for you, /why N tells about item N, /quit (or an "
    "empty line) ends."
)


def chat(
    recommender: Recommender, user: User, catalogue: ItemCatalogue, *, ask: Callable[[str], str] = input,
    show: Console | None = None, seed: int = 0,
) -> Dialogue:  # fmt: skip
    """Talk until "/quit", an empty line, the end of input or Ctrl-C; returns the conversation.

    ask: prompt -> a line. show: where tables go; the terminal by default. What is typed becomes a turn of the user; the
    list that it follows, a turn of the system. A simulated critique revises the latest list and enters no turn, as in a
    search. A list that cannot be had is reported, and the conversation goes on.
    """
    talk = _Talk(recommender, user, catalogue, show or Console(), seed)
    talk.console.print(HELP, style="dim")
    try:
        while (line := ask("You: ").strip()) and line != "/quit":
            talk.hear(line)
    except (EOFError, KeyboardInterrupt):
        talk.console.print()
    return talk.dialogue


class _Talk:
    """The state of a conversation. past: items shown so far; once too few are left, all may come again."""

    def __init__(self, recommender: Recommender, user: User, catalogue: ItemCatalogue, console: Console, seed: int):
        self.recommender, self.user, self.catalogue = recommender, user, catalogue
        self.console, self.seed = console, seed
        self.turns: tuple[Turn, ...] = ()
        self.past: tuple[int, ...] = ()
        self.shown: tuple[int, ...] = ()
        self.scores: tuple[float, ...] = ()
        self.critique = ""
        self.rounds = 0

    @property
    def dialogue(self) -> Dialogue:
        return Dialogue("chat", self.turns)

    def hear(self, line: str) -> None:
        """One line of the person."""
        try:
            self._answer(line)
        except (RuntimeError, ValueError) as error:  # a reply that never fits, a prompt that is too long
            self._say(f"No answer this time: {error}")

    def _answer(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command == "/critique":
            self._revise()
        elif command == "/why":
            self._why(rest.strip())
        elif command.startswith("/"):
            self._say(f"no command {command}. {HELP}")
        else:
            if self.shown:
                titles = "; ".join(self.catalogue.titles[item] for item in self.shown)
                self.turns += (Turn(SYSTEM, titles, self.shown),)
            self.turns += (Turn(USER, line, mentions(line, self.catalogue)),)
            self.shown, self.critique = (), ""
            self._recommend("")

    def _revise(self) -> None:
        if not self.critique:
            self._say("There is no critique to answer with: say something, so that there is a list.")
            return
        self._recommend(self.critique)

    def _recommend(self, critique: str) -> None:
        self.rounds += 1
        if len(self.past) + self.recommender.k > len(self.catalogue):
            self.past = self.shown if len(self.shown) + self.recommender.k <= len(self.catalogue) else ()
        seed = seed_of("chat", self.seed, self.rounds)
        wanted = Ask(self.dialogue, self.shown, critique, self.past, seed, f"list {self.rounds}")
        (reply,) = self.recommender.recommend([wanted])
        self._show(reply, seed)

    def _show(self, reply: Reply, seed: int) -> None:
        (scores,) = self.user.score([self.dialogue], [reply.items])
        (critique,) = self.user.criticise([Criticise(self.dialogue, reply.items, seed, f"list {self.rounds}")])
        self.shown, self.past = reply.items, tuple(dict.fromkeys((*self.past, *reply.items)))
        self.scores, self.critique = tuple(map(float, scores)), critique.strip()
        self.console.print(score_table(self.catalogue, self.shown, self.scores))
        self._say(
            f"Simulated user: {critique}" if self.critique else "The simulated user says nothing about this list."
        )

    def _why(self, number: str) -> None:
        if not number.isdecimal() or not 1 <= int(number) <= len(self.shown):
            there = f"1 to {len(self.shown)}" if self.shown else "and there is no list yet"
            self._say(f"/why wants the number of an item, {there}.")
            return
        item, score = self.shown[int(number) - 1], self.scores[int(number) - 1]
        self._say(self.catalogue.titles[item])
        for name, values in known_values(self.catalogue, item, _WHY):
            self._say(f"- {name}: {values}", indent="  ")
        better = sum(other > score for other in self.scores)
        self._say(
            "The simulated user could not score it." if math.isnan(score) else
            f"The simulated user accepts it with probability {score:.2f} and likes {better} of this list better."
        )  # fmt: skip
        asked = Criticise(self.dialogue, (item,), seed_of("why", self.seed, self.rounds, item), f"item {number}")
        (said,) = self.user.criticise([asked])
        self._say(f"Against it: {said}" if said.strip() else "It says nothing against it.")

    def _say(self, text: str, indent: str = "") -> None:
        """One line: what models and files say holds no markup and no control codes of terminals."""
        self.console.print(Text(indent + one_line(text)))


def score_table(catalogue: ItemCatalogue, items: tuple[int, ...], scores: tuple[float, ...]) -> Table:
    """Number, title, attributes and score of each item; "-" for none."""
    table = Table(caption=_mean(scores), caption_justify="right")
    table.add_column("#", justify="right")
    table.add_column("title")
    table.add_column("attributes")
    table.add_column("score", justify="right")
    for number, (item, score) in enumerate(zip(items, scores, strict=True), start=1):
        values = "; ".join(f"{name}: {text}" for name, text in known_values(catalogue, item, _CELL))
        written = "-" if math.isnan(score) else f"{score:.2f}"
        table.add_row(str(number), Text(one_line(catalogue.titles[item])), Text(one_line(values)), written)
    return table


def known_values(catalogue: ItemCatalogue, item: int, most: int) -> list[tuple[str, str]]:
    """(attribute, its values in at most so many characters) of what is known of an item, in the catalogue's order."""
    known = catalogue.attributes[item]
    return [(name, shown_values(known[name], most)) for name in catalogue.order if known.get(name)]


def _mean(scores: tuple[float, ...]) -> str:
    known = [score for score in scores if not math.isnan(score)]
    return f"mean score {sum(known) / len(known):.2f}" if known else "no score"


def mentions(text: str, catalogue: ItemCatalogue) -> tuple[int, ...]:
    """Items whose title stands in a text as it is written, as whole words, in order of first appearance."""
    found = {}
    for item, title in enumerate(catalogue.titles):
        if title in text and (hit := re.search(rf"(?<!\w){re.escape(title)}(?!\w)", text)):
            found[item] = hit.start()
    return tuple(sorted(found, key=found.get))
