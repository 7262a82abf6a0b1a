"""Rewards of search: the worked table of arXiv 2505.17005's group bonus, and each rule of form on its own."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import search_rewards as rewards
from rl.envs.search import Call, Question, State
from rl.envs.tags import R1_SEARCHER, R1_SEARCHER_PP, SIMPLE_DEEP_SEARCHER
from rl.search_rewards import SearchReward, SearchRewardConfig
from rl.trajectory import Status

QUESTION = Question("q1", "Who wrote it?", ("Ann Lee",))
RESULT = "\n\n<document>\n(1)T   x\n</document>\n\n"


def cover(said, answers):
    """A stand-in for the metric: the words of a right answer in a row."""
    return float(any(f" {a.lower()} " in f" {said.lower()} " for a in answers))


def f1(said, answers):
    return 0.8


def conversation(*parts, style=R1_SEARCHER_PP, finish="answer", status=Status.FINISHED, calls=None):
    """Policy texts; a result stands between two of them."""
    state = State(QUESTION, "prompt", style, finish=finish, status=status)
    for at, text in enumerate(parts):
        if at:
            state.segments.append(("tool", RESULT))
        state.segments.append(("policy", text))
    count = len(parts) - 1 if calls is None else calls
    state.calls = [Call(f"q{i}", (), RESULT) for i in range(count)]
    return state


ASK, SAY = "hm <external>who</external>", r"<internal>Ann wrote it</internal> so \boxed{Ann Lee}"

# --- the group bonus --------------------------------------------------------------------------------------------------

# counts of correct rows, then per row the bonus with ddof 0 and with ddof 1 (section 4)
TABLE = [
    ((3, 1, 2), (0, 4 / 3, 0), (0, 2, 0)),
    ((0, 1), (0.5, 0), (1, 0)),
    ((1, 1, 3), (16 / 9, 16 / 9, 0), (2, 2, 0)),
    ((0, 4), (2, 0), (2, 0)),
    ((2, 2, 2), (0, 0, 0), (0, 0, 0)),
    ((1,), (0,), (0,)),  # the sample variance of one is no number: no bonus
    ((), (), ()),
]


@pytest.mark.parametrize("ddof", [0, 1])
def test_all_rows_of_the_table_at_once_in_any_order(ddof, rng):
    """Wrong rows with fewer calls fill each group up; they neither get a bonus nor change one."""
    G = 5
    correct, counts, expected = np.zeros((7, G), bool), np.zeros((7, G), np.int32), np.zeros((7, G), np.float32)
    for q, row in enumerate(TABLE):
        n = len(row[0])
        correct[q, :n], counts[q, :n], expected[q, :n] = True, row[0], row[1 + ddof]
    run = jax.jit(rewards.retrieval_bonus, static_argnames="ddof")
    for _ in range(5):
        order = rng.permuted(np.tile(np.arange(G), (7, 1)), axis=1)
        take = lambda x, order=order: np.take_along_axis(x, order, axis=1)  # noqa: E731
        bonus = run(take(correct), take(counts), 2.0, ddof=ddof)
        assert bonus.dtype == jnp.float32
        np.testing.assert_allclose(bonus, take(expected), rtol=1e-6)
        # Rows in any order over the batch: the group's id decides.
        shuffle = rng.permutation(7 * G)
        groups = np.repeat(rng.permutation(100)[:7], G)
        flat = rewards.group_bonus(
            correct.reshape(-1)[shuffle], counts.reshape(-1)[shuffle], groups[shuffle], 2.0, ddof
        )
        np.testing.assert_allclose(flat, expected.reshape(-1)[shuffle], rtol=1e-6)


@pytest.mark.parametrize("correct", [[1, 1, 1], [1, 0, 0], [0, 0, 0]])
@pytest.mark.parametrize("ddof", [0, 1])
def test_equal_counts_one_or_none_give_exactly_zero_and_finite_gradients(correct, ddof):
    counts = jnp.array([2.0, 2.0, 2.0])
    call = lambda x: rewards.retrieval_bonus(jnp.array(correct, bool), x, 2.0, ddof).sum()  # noqa: E731
    value, gradient = jax.value_and_grad(call)(counts)
    assert value == 0.0
    assert np.isfinite(gradient).all()


def test_groups_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="groups have 1 to 2 rows"):
        rewards.group_bonus(np.ones(3, bool), np.ones(3), np.array([0, 0, 1]))


def test_the_worked_group():
    """A(correct, 3) B(correct, 1) C(wrong, 0) D(correct, 2): 1, 2.3333, 0, 1; a wrong row never beats a right one."""
    states = [
        conversation(ASK, ASK, ASK, SAY), conversation(ASK, SAY), conversation(r"\boxed{Bob}"),
        conversation(ASK, ASK, SAY), conversation(r"<external> \boxed{Ann Lee}"), conversation(r"<external> \boxed{x}"),
    ]  # fmt: skip
    assert [s.searches for s in states[:4]] == [3, 1, 0, 2]
    parts = SearchReward(cover)(states, np.zeros(6, int))
    np.testing.assert_allclose(sum(parts.values()), [1, 2.33333, 0, 1, -1, -2], rtol=1e-5)
    assert {v.dtype for v in parts.values()} == {np.dtype(np.float32)}
    without = SearchReward(cover, SearchRewardConfig(eta=0.0))(states, np.zeros(6, int))
    assert not without["group"].any()


def test_rows_whose_tool_failed_take_no_part():
    states = [conversation(ASK, ASK, ASK, SAY), conversation(ASK, SAY), conversation(ASK, ASK, SAY)]
    broken = conversation(SAY, finish="tool_error", status=Status.ENV_ERROR)
    parts = SearchReward(cover)([*states, broken], np.zeros(4, int))
    np.testing.assert_allclose(sum(parts.values()), [1, 2.33333, 1, 0], rtol=1e-5)


# --- form -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "state",
    [
        conversation(SAY), conversation(ASK, SAY), conversation(ASK + " x", ASK, SAY + "."),
        conversation(r"\boxed{a {b} c}"), conversation("The user asks.\nThe assistant knows: " + SAY),
    ],
)  # fmt: skip
def test_well_formed(state):
    assert rewards.format_faults(state) == []


@pytest.mark.parametrize(
    ("faults", "state"),
    [
        (["query"], conversation(r"<external>who \boxed{Ann Lee}")),  # not closed
        (["query"], conversation(r"who</external> \boxed{Ann Lee}")),
        (["query"], conversation("<external><external>q</external></external>", SAY)),  # nested
        (["query"], conversation("<external> </external>", SAY)),  # empty
        (["query"], conversation("<external>a</external> <external>b</external>", SAY)),  # one without a result
        (["query"], conversation(ASK + SAY)),
        (["internal"], conversation("<internal>a <external>b</external>", "</internal>" + SAY)),  # query in internal
        (["internal"], conversation(r"<internal>a <internal>b</internal> \boxed{Ann Lee}")),
        (["internal"], conversation(r"a</internal> \boxed{Ann Lee}")),
        (["internal"], conversation(r"<internal>a \boxed{Ann Lee}")),
        (["internal", "query"], conversation(r"<external>a</internal> \boxed{Ann Lee}")),
        (["result"], conversation("<document>Ann Lee</document>" + SAY)),
        (["result"], conversation(ASK, "</document>" + SAY)),
        (["answer"], conversation("Ann Lee")),
        (["answer"], conversation(r"so \boxed{Ann Lee")),
        (["answer"], conversation(r"so \boxed{ }")),
        (["answer"], conversation(r"so \boxed{Ann Lee} or \boxed{Bob}")),
        (["answer"], conversation(r"so \boxed{Ann Lee} <internal>yes</internal>")),  # before the last tag
        (["answer"], conversation(r"\boxed{Ann Lee} " + ASK, "so it is")),
        (["stop"], conversation(SAY, finish="length")),
        (["stop"], conversation(SAY, finish="max_turn")),
        (["answer", "stop"], conversation(ASK, ASK, finish="max_retrieval", calls=1)),
        (["answer", "query", "stop"], conversation("<external></external>", finish="empty_query")),
        (["garbled"], conversation("\u597d " + SAY)),
        (["garbled"], conversation("\ufffd " + SAY)),
        (["garbled"], conversation("x y z " * 20 + SAY)),
        (["role"], conversation("a\nassistant: b\n" + SAY)),
        (["role"], conversation("a\n user \nb " + SAY)),
    ],
)
def test_each_fault_costs_the_same_once(faults, state):
    assert rewards.format_faults(state) == faults
    parts = SearchReward(cover)([state, state], np.zeros(2, int))
    np.testing.assert_array_equal(parts["format"], -2.0)
    assert not parts["group"].any()


def test_tags_of_a_result_are_no_fault_of_the_policy():
    state = conversation(ASK, SAY)
    state.segments[1] = ("tool", r"<external>a</external> <document> \boxed{Bob} " + "\u597d x y z" * 99)
    assert rewards.format_faults(state) == []
    assert state.answer == "Ann Lee"


def test_chinese_questions_may_be_answered_in_chinese():
    state = conversation("\u597d " + SAY)
    state.example = dataclasses.replace(QUESTION, question="\u8c01?")
    assert rewards.format_faults(state) == []


def test_the_predecessor():
    style, config = R1_SEARCHER, SearchRewardConfig("r1_searcher")
    ask, say = "a <|begin_of_query|>who<|end_of_query|>", "b</think> <answer>Ann Lee</answer>"
    reward = SearchReward(f1, config)
    good = conversation(ask, say, style=style)
    long = conversation(ask, f"b</think> <answer>{'w ' * 10}Ann</answer>", style=style)
    twice = conversation(ask, "b</think></think>" + say, style=style)
    early = conversation(ask, "<answer>Ann</answer></think>", style=style)
    role = conversation(ask, "the assistant" + say, style=style)
    assert [reward.faults(s) for s in (good, long, twice, early)] == [[], ["length"], ["think"], ["answer"]]
    parts = reward([good, long, twice, early], np.zeros(4, int))
    np.testing.assert_allclose(sum(parts.values()), [0.8, -1.2, -1.2, -1.2], rtol=1e-6)
    assert set(parts) == {"format", "answer"}
    assert reward.faults(role) == []
    assert SearchReward(f1, dataclasses.replace(config, role_word=True)).faults(role) == ["role"]


def test_deep_searcher():
    style, config = SIMPLE_DEEP_SEARCHER, SearchRewardConfig("simple_deep_searcher", max_analysis=50)
    ask, say = "a <|begin_search_query|>who<|end_search_query|>", r"b</think> \boxed{Ann Lee}"
    reward = SearchReward(f1, config)
    words = " ".join(f"w{i}" for i in range(60))
    cases = {
        (): conversation(ask, say, style=style),
        ("result",): conversation(ask, "<|begin_search_result|>" + say, style=style),
        ("garbled",): conversation(ask, "\ufffd" + say, style=style),
        ("reflection",): conversation("Wait, hmm. Alternatively wait", ask, "WAIT Hmmm " + say, style=style),
        ("answer",): conversation(ask, "b</think>", style=style),
        ("retrievals",): conversation(*[ask] * 9, say, style=style),
        ("analysis",): conversation(words + ask, say, style=style),
        ("analysis", "answer"): conversation(words + ask, "b", style=style),
    }
    for faults, state in cases.items():
        assert reward.faults(state) == sorted(faults)
    parts = reward(list(cases.values()), np.zeros(len(cases), int))
    total = sum(parts.values())
    np.testing.assert_allclose(total[:2], [0.8, -1.2], rtol=1e-6)
    five = conversation("Wait, hmm. Alternatively wait", ask, "WAIT " + say, style=style)
    assert reward.faults(five) == []
    both = conversation("\ufffd" + words + ask, say, style=style)  # two violations, one penalty
    assert len(reward.faults(both)) == 2
    np.testing.assert_allclose(sum(reward([both], np.zeros(1, int)).values()), [-1.2], rtol=1e-6)
    counted = SearchReward(f1, config, count_tokens=len)
    assert counted.faults(conversation(ask + "x" * 50, say, style=style)) == ["analysis"]


def test_gibberish():
    assert rewards.trigram_share("x y z x y z x y z", least_words=0) == pytest.approx(3 / 7)
    assert rewards.gibberish("x y z x y z x y z", least_words=0) == "repetition"
    assert rewards.gibberish("x y z x y z x y z") == ""
    assert rewards.gibberish("fine text. " * 3) == ""
    assert rewards.gibberish("#$%&" * 20, symbols=True) == "symbols"
    assert rewards.gibberish("#$%&" * 20) == ""
    assert rewards.gibberish("So (he said): it's 3 - 2, no?" * 3, symbols=True) == ""


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "reward"), [(10, 1.0), (11, 0.0)])
def test_ten_words_pass_and_eleven_fail(words, reward):
    text = " ".join(["Ann Lee", *["w"] * (words - 2)])
    state = conversation(rf"\boxed{{{text}}}")
    assert len(state.answer.split()) == words
    parts = SearchReward(cover)([state, state], np.zeros(2, int))
    np.testing.assert_array_equal(parts["answer"], reward)
    np.testing.assert_array_equal(parts["format"], 0.0)


def test_answers_that_name_several_candidates_are_reported():
    question = Question("q", "Which film?", ("Avatar", "James Cameron's Avatar"))
    found = [SimpleNamespace(id=i, title=t, text="") for i, t in enumerate(["Avatar", "Titanic", "Avatar 2"])]

    def said(answer, titles=found):
        state = conversation(ASK, rf"\boxed{{{answer}}}")
        state.example, state.calls = question, [Call("q", tuple(titles), "")]
        return state

    answers = ["Avatar Titanic Titanic Avatar", "Avatar", "Avatar 2", "the film Avatar, James Cameron's Avatar",
               "Titanic or Avatar", "2009; 1997", "Avatar and avatar"]  # fmt: skip
    assert rewards.reward_hacks([said(a) for a in answers]) == [0, 4, 5]
    # It passes the length test and would be paid: that is why it is listed.
    parts = SearchReward(cover)([said(answers[0]), said("Titanic")], np.zeros(2, int))
    np.testing.assert_array_equal(parts["answer"], [1.0, 0.0])
    assert rewards.reward_hacks([said("Alien Titanic", ())], ["Alien", "Titanic"]) == [0]
    assert rewards.reward_hacks([said("", ())]) == []
    names = ["Titanic", "Avatar", "titanic!", "Alien", "The"]
    assert rewards.named_candidates(answers[0], names) == {"avatar", "titanic"}
    assert rewards.named_candidates("Titanic", names) == {"titanic"}


def test_bad_input():
    state = conversation(SAY)
    for gold in ((), "Ann Lee"):
        state.example = dataclasses.replace(QUESTION, answers=gold)
        with pytest.raises(ValueError, match="question q1: answers must be a list"):
            SearchReward(cover)([state], np.zeros(1, int))
    with pytest.raises(FloatingPointError, match="part 'answer' of question q1 is nan"):
        SearchReward(lambda *_: float("nan"))([conversation(SAY)], np.zeros(1, int))
    for name, value in {"kind": "x", "penalty": 1.0, "eta": -1.0, "ddof": 2, "max_retrievals": -1}.items():
        with pytest.raises(ValueError, match=name):
            SearchRewardConfig(**{name: value})
