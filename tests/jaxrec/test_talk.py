"""The conversation in the terminal, with scripted input and stubs for recommender and simulated user."""

import io

import numpy as np
import pytest
from rich.console import Console

from jaxrec.data.dialogues import Dialogue, Turn
from jaxrec.data.item_catalogue import ItemCatalogue
from jaxrec.talk import chat, mentions
from jaxrec.tools.conversation import Reply

CATALOGUE = ItemCatalogue(
    ["Heat (1995)", "Ran [bold]", "Alien (1979)", "Stem\x1b[31m", "Jaws (1975)"],
    [{"genre": "crime", "star": ["Al Pacino", "Val Kilmer"]}, {"genre": "war"}, {}, {}, {"genre": "horror"}],
)


class Recommender:
    """The two lowest items that are not in the path; keeps what it was asked."""

    k = 2

    def __init__(self):
        self.asks = []

    def recommend(self, asks):
        self.asks += asks
        if "broken" in asks[0].dialogue.turns[-1].text:
            raise RuntimeError("no usable reply")
        return [Reply(tuple([i for i in range(5) if i not in ask.past][:2])) for ask in asks]


class User:
    def __init__(self, critique="less [red]crime[/red]\x1b[2J please"):
        self.critique, self.asked = critique, []

    def score(self, dialogues, items):
        return [np.array([np.nan if i == 2 else 0.9 - i / 5 for i in own]) for own in items]

    def criticise(self, requests):
        self.asked += requests
        return [self.critique] * len(requests)


def play(*lines, user=None, end=EOFError):
    """What was returned, printed and asked. end: raised when no line is left."""
    left, out, recommender = list(lines), io.StringIO(), Recommender()

    def ask(prompt):
        if not left:
            raise end
        return left.pop(0)

    user = user or User()
    dialogue = chat(recommender, user, CATALOGUE, ask=ask, show=Console(file=out, width=120, color_system=None))
    assert left == ["never read"][: lines[-1] == "never read"]
    return dialogue, out.getvalue(), recommender.asks, user


def test_a_turn_gets_a_list_with_what_the_user_thinks_of_it():
    dialogue, text, asks, user = play("something like Alien (1979)")
    assert dialogue == Dialogue("chat", (Turn("user", "something like Alien (1979)", (2,)),))
    assert [(a.dialogue, a.shown, a.critique, a.past) for a in asks] == [(dialogue, (), "", ())]
    rows = [line for line in text.splitlines() if "Heat" in line or "Ran" in line]
    assert [cell.strip() for cell in rows[0].split("\u2502")[1:-1]] == [
        "1", "Heat (1995)", "genre: crime; star: Al Pacino, Val Kilmer", "0.90"
    ]  # fmt: skip
    assert "0.70" in rows[1]
    assert "mean score 0.80" in text
    # No markup, no codes that steer the terminal.
    assert "Ran [bold]" in text
    assert "Simulated user: less [red]crime[/red][2J please" in text
    assert "\x1b" not in text
    assert [(r.dialogue, r.shown) for r in user.asked] == [(dialogue, (0, 1))]


def test_a_second_turn_follows_the_list_and_leaves_out_what_was_shown():
    dialogue, text, asks, _ = play("hi", "no, softer")
    assert [t.role for t in dialogue.turns] == ["user", "system", "user"]
    assert dialogue.turns[1] == Turn("system", "Heat (1995); Ran [bold]", (0, 1))
    assert (asks[1].dialogue, asks[1].shown, asks[1].critique, asks[1].past) == (dialogue, (), "", (0, 1))
    assert asks[0].seed != asks[1].seed
    (alien,) = [line for line in text.splitlines() if "Alien" in line]
    assert [cell.strip() for cell in alien.split("\u2502")[1:-1]] == ["1", "Alien (1979)", "", "-"]  # no score


def test_the_simulated_user_answers_for_the_person():
    dialogue, _, asks, user = play("hi", "/critique")
    assert dialogue.turns == (Turn("user", "hi"),)  # a search does not grow the dialogue either
    assert (asks[1].shown, asks[1].critique, asks[1].past) == ((0, 1), user.critique, (0, 1))
    assert [r.shown for r in user.asked] == [(0, 1), (2, 3)]
    _, text, asks, _ = play("/critique")
    assert "no critique to answer with" in text
    assert asks == []
    _, text, asks, _ = play("hi", "/critique", user=User(""))
    assert "says nothing about this list" in text
    assert len(asks) == 1


def test_items_may_come_again_once_too_few_are_left():
    _, _, asks, _ = play("a", "b", "c", "/critique", "/critique")
    assert [a.past for a in asks] == [(), (0, 1), (), (0, 1), (2, 3)]
    assert asks[4].shown == (2, 3)


def test_why():
    _, text, asks, user = play("hi", "/why 1", "/why 2")
    assert "Heat (1995)\n  - genre: crime\n  - star: Al Pacino, Val Kilmer\n" in text
    assert "with probability 0.90 and likes 0 of this list better" in text
    assert "with probability 0.70 and likes 1 of this list better" in text
    assert "Against it: less" in text
    assert [r.shown for r in user.asked] == [(0, 1), (0,), (1,)]
    assert len(asks) == 1
    assert "could not score it" in play("hi", "hm", "/why 1")[1]
    assert "number of an item, 1 to 2" in play("hi", "/why 3")[1]
    assert "number of an item, 1 to 2" in play("hi", "/why one")[1]
    assert "there is no list yet" in play("/why 1")[1]


@pytest.mark.parametrize("line", ["/quit", "", "  "])
def test_it_ends(line):
    dialogue, _, asks, _ = play("hi", line, "never read")
    assert len(asks) == len(dialogue.turns) == 1


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_it_ends_with_the_input(end):
    assert len(play("hi", end=end)[0].turns) == 1


def test_it_goes_on_behind_errors_and_unknown_commands():
    dialogue, text, asks, _ = play("broken", "/help", "hi")
    assert "No answer this time: no usable reply" in text
    assert "no command /help" in text
    assert text.count("/why N tells about") == 2
    assert [t.text for t in dialogue.turns] == ["broken", "hi"]
    assert len(asks) == 2


def test_titles_in_a_line_are_mentions():
    assert mentions("Jaws (1975), then Heat (1995)!", CATALOGUE) == (4, 0)
    assert mentions("heat (1995), Heat, XHeat (1995)", CATALOGUE) == ()
