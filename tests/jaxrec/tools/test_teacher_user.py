"""The simulated user behind a teacher: worked scores from log-probabilities, replies that count, and bounded tries."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxrec.tools.conversation import Criticise
from jaxrec.tools.simulated_user import TeacherUser, UserConfig
from jaxrec.tools.teacher import Failure, Reply, ScriptedTeacher, TokenLogprob
from jaxrec.tools.user_prompts import UserPrompts
from tests.jaxrec.tools.user_world import CATALOGUE, DIALOGUES, TITLES, prompts

PROMPTS = UserPrompts(CATALOGUE, "full")


def decided(title: str, word: str, p: float, **beside: float) -> Reply:
    """ "1. title? word", with the probability of the decision and of tokens beside it."""
    top = tuple((f" {other}", math.log(q)) for other, q in {word: p, **beside}.items())
    tokens = [TokenLogprob(text, -0.1) for text in ("1", ".", f" {title}", "?")]
    last = TokenLogprob(f" {word}", math.log(p), top)
    return Reply((f"1. {title}? {word}",), ("stop",), logprobs=((*tokens, last),))


class Stub:
    """Gives scripted answers in turn, by the title that is asked about."""

    id = "stub"

    def __init__(self, script):
        self.script, self.asked = {title: list(answers) for title, answers in script.items()}, []

    def ask(self, requests, done=None):
        self.asked += requests
        shown = [r.messages[-1].content.partition("\n1. ")[2].partition("\n")[0] for r in requests]
        return [self.script[title].pop(0) for title in shown]


def scores(score: str, *answers: Reply) -> list[float]:
    stub = Stub({title: [answer] for title, answer in zip(TITLES, answers, strict=False)})
    found = TeacherUser(stub, PROMPTS, UserConfig(score=score)).score([DIALOGUES[0]], [range(len(answers))])
    return found[0].tolist()


def test_worked_values_of_the_paper():
    """Of arXiv 2504.20458: Yes at .8; No at .7; Yes .6 / No .3; Yes .2 / No .7; titles may end in a question mark."""
    answers = [
        decided(TITLES[0], "Yes", 0.8), decided(TITLES[1], "No", 0.7), decided(TITLES[2], "Yes", 0.6, No=0.3, no=0.1),
        decided(TITLES[3], "No", 0.7, Yes=0.2),
    ]  # fmt: skip
    np.testing.assert_allclose(scores("code", *answers), [0.8, 0.3, 0.6, 0.3], atol=1e-6)
    np.testing.assert_allclose(scores("normalised", *answers), [1, 0, 2 / 3, 2 / 9], atol=1e-6)


def test_a_word_in_a_title_is_no_decision():
    one = decided("Who Knows?", "No", 0.7, Yes=0.2)
    spelled = (TokenLogprob("1. Who", 0.0), TokenLogprob(" No", -9.0), TokenLogprob("ws??", 0.0), one.logprobs[0][-1])
    tricky = Reply(("1. Who Nows?? No",), ("stop",), logprobs=(spelled,))
    assert scores("code", *[decided(t, "Yes", 0.8) for t in TITLES[:3]], one)[3] == pytest.approx(0.3)
    stub = Stub({"Who Knows?": [tricky, one]})  # another name: asked again
    assert TeacherUser(stub, PROMPTS).score([DIALOGUES[0]], [[3]])[0] == pytest.approx(2 / 9)


def test_replies_that_do_not_count_are_asked_for_five_times_and_then_there_is_no_score():
    good, title = decided(TITLES[1], "Yes", 0.8, No=0.1), TITLES[1]
    split = (TokenLogprob(f"1. {title}? Y", 0.0), TokenLogprob("es", 0.0))
    bad = [
        Reply((f"{title}: yes",), ("stop",)),
        Reply((f"1. {title}? Yes\n2. {TITLES[0]}? No",), ("stop",), logprobs=good.logprobs),
        Reply((f"1. {TITLES[0]}? Yes",), ("stop",), logprobs=good.logprobs),
        Reply(good.texts, ("stop",)),  # no log-probabilities
        Reply(good.texts, ("stop",), logprobs=(split,)),
    ]
    stub = Stub({title: [*bad[:4], good], TITLES[2]: bad, TITLES[3]: [Failure("timeout", "late")]})
    user = TeacherUser(stub, PROMPTS)
    found = user.score(DIALOGUES[:2], [[1, 1], [2, 3]])
    np.testing.assert_allclose(found[0], [8 / 9, 8 / 9])
    assert np.isnan(found[1]).all()
    assert +user.counts == {
        "replies": 10, "asked again": 8, "misfits": 9, "failed_timeout": 1, "no valid decision": 1,
    }  # fmt: skip
    mine = [r.sampling for r in stub.asked if f"\n1. {title}\n" in r.messages[-1].content]
    assert [(s.temperature, s.seed, s.max_tokens, s.logprobs) for s in mine] == [
        (0.0, 42, 64, 20), (1.0, 43, 64, 20), (1.0, 44, 64, 20), (1.0, 45, 64, 20), (1.0, 46, 64, 20),
    ]  # fmt: skip


def test_critiques_by_seed_with_those_that_are_cut_drawn_again():
    said = []

    def annotator(request, choice):
        said.append((request.sampling.seed, request.messages[-1].content))
        return f" too old {request.sampling.seed} \n"

    teacher = ScriptedTeacher({"annotator": annotator}, error_rate=0.5)  # a wrong reply breaks off
    user = TeacherUser(teacher, PROMPTS, UserConfig(max_new=30))
    requests = [Criticise(DIALOGUES[seed // 8], (seed % 8, 7 - seed % 8), seed) for seed in range(12)]
    texts = user.criticise(requests)
    assert all(text.startswith("too old ") for text in texts)
    assert any(text == f"too old {seed}" for seed, text in enumerate(texts))
    assert user.counts["cut by length"] == user.counts["asked again"] == len(said) - 12 > 0
    assert (user.counts["replies"], user.counts["no critique"]) == (len(said), 0)
    assert {text for _, text in said} == {
        "".join(PROMPTS.critique_prompt(r.dialogue, r.shown)).strip() for r in requests
    }


def test_a_teacher_that_never_ends_a_reply_gives_nothing_after_five_rounds():
    teacher = ScriptedTeacher({"annotator": lambda r, c: "too old"}, error_rate=1.0)
    user = TeacherUser(teacher, PROMPTS)
    assert user.criticise([Criticise(DIALOGUES[0], (0,))]) == [""]
    assert teacher.errors == 5
    assert +user.counts == {"replies": 5, "asked again": 4, "cut by length": 5, "no critique": 1}


def test_critiques_that_fail_or_are_empty_are_counted_apart():
    blank, failed, good = Reply((" ",), ("stop",)), Failure("server", "busy"), Reply(("too old",), ("stop",))
    user = TeacherUser(Stub({TITLES[0]: [blank, failed, good], TITLES[1]: [good]}), PROMPTS)
    requests = [Criticise(DIALOGUES[0], (item,), item) for item in (0, 1)]
    assert user.criticise(requests) == ["too old", "too old"]
    assert +user.counts == {"replies": 3, "asked again": 2, "empty": 1, "failed_server": 1}


def test_prompts_for_a_model_are_refused():
    with pytest.raises(ValueError, match="style='full' and no tokenizer"):
        TeacherUser(Stub({}), prompts("full"))
    with pytest.raises(ValueError, match="style='full'"):
        TeacherUser(Stub({}), UserPrompts(CATALOGUE, "short"))
