"""DeepRec's rewards: the worked numbers of arXiv 2505.16810's released code, and each format rule on its own."""

import dataclasses

import numpy as np
import pytest

from rl.envs.recommend import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    ITEMS_CLOSE,
    ITEMS_OPEN,
    PLACEHOLDERS,
    QUERY_CLOSE,
    QUERY_OPEN,
    THINK_CLOSE,
    THINK_OPEN,
    Catalogue,
    Example,
    PromptStyle,
    RecommendEnv,
    State,
    parse_answer,
)
from rl.rewards import DeepRecReward, RewardConfig, broken_rules, diversity, hit_index, invocation, point

TITLES = ("", *(f"Item {chr(64 + i)}" for i in range(1, 21)))
CATALOGUE = Catalogue(TITLES, ("",) * 21)
TARGET = 4


def conversation(calls: int = 2, answer=None, think: str = "So be it. ") -> State:
    env = RecommendEnv(CATALOGUE, lambda *_: None, results=3, answers=10, style=PromptStyle(instructions=False))
    state = State(Example(0, (1, 2), TARGET), "prompt")
    for n in range(calls):
        state.segments.append(("policy", f"\nlook {QUERY_OPEN}words {n}{QUERY_CLOSE}"))
        state.segments.append(("tool", env.observation([1, 2, 3])))
        state.preferences.append(f"words {n}")
        state.retrieved.append(np.array([1, 2, 3]))
    answer = list(range(1, 11)) if answer is None else answer
    lines = "\n".join(f"{n}. {TITLES[i] if isinstance(i, int) else i}" for n, i in enumerate(answer, start=1))
    state.segments.append(("policy", f"{think}{THINK_CLOSE}\n{ANSWER_OPEN}\n{lines}\n{ANSWER_CLOSE}"))
    return state


def edited(old: str, new: str, *, last: bool = True) -> State:
    """The valid conversation with one edit of policy text: in the last segment, or in the first."""
    state = conversation()
    at = len(state.segments) - 1 if last else 0
    author, text = state.segments[at]
    assert old in text
    state.segments[at] = (author, text.replace(old, new, 1))
    return state


def test_a_valid_conversation_breaks_no_rule():
    assert broken_rules(conversation(), 10) == []


@pytest.mark.parametrize(
    ("rule", "state"),
    [
        ("tag_counts", edited("look ", f"look {ITEMS_OPEN} ", last=False)),
        ("calls", conversation(calls=0, think="")),
        ("role_word", edited("So be it", "Assistant says")),
        ("placeholder", edited("So be it", PLACEHOLDERS[0])),
        ("think", edited("So be it", f"So be it {THINK_OPEN}")),
        ("answer_tags", edited(ANSWER_CLOSE, "")),
        ("reason_on_last", edited("So be it. ", "")),
        ("tags_in_answer", edited("Item C", f"{QUERY_OPEN}{QUERY_CLOSE}")),
        ("answer_lines", edited("\n10. Item J", "")),
        ("cjk", edited("So be it", "\u597d")),
    ],
)
def test_each_rule_alone_turns_format_to_minus_one(rule, state):
    assert rule in broken_rules(state, 10)


@pytest.mark.parametrize("lines", [9, 11])
def test_the_list_has_exactly_k_lines(lines):
    assert "answer_lines" in broken_rules(conversation(answer=list(range(1, lines + 1))), 10)


def test_a_blank_line_in_the_list_counts_as_a_line():
    assert "answer_lines" in broken_rules(edited("\n2. Item B", "\n\n2. Item B"), 10)


def test_role_words_and_snippets_in_tool_text_do_not_count():
    state = conversation()
    state.segments[1] = ("tool", state.segments[1][1].replace("Item A", "The Assistant"))
    assert broken_rules(state, 10) == []


def test_a_result_that_the_policy_types_itself_breaks_the_format():
    state = conversation()
    fake = f"{QUERY_OPEN}x{QUERY_CLOSE}\n\n{ITEMS_OPEN}\n1. Item A\n{ITEMS_CLOSE}\n\n"
    state.segments[0] = ("policy", fake + state.segments[0][1])
    assert "tag_counts" in broken_rules(state, 10)


def test_invocation():
    np.testing.assert_allclose(invocation([0, 1, 2, 3, 8]), [0, 0, 0.5, 1.0, 1.0])


def _unit(angle: float) -> np.ndarray:
    return np.array([np.cos(angle), np.sin(angle)])


def test_diversity():
    a = np.stack([_unit(0), _unit(np.arccos(0.6))])
    assert diversity(a) == pytest.approx(0.08, abs=1e-6)
    gram = np.array([[1, 0.9, 0.5], [0.9, 1, 0.1], [0.5, 0.1, 1]])
    values, vectors = np.linalg.eigh(gram)
    assert diversity(vectors * np.sqrt(np.maximum(values, 0))) == pytest.approx(0.10, abs=2e-3)  # gram is barely psd
    assert diversity(np.stack([_unit(0), _unit(0)])) == pytest.approx(0.0, abs=1e-6)
    assert diversity(np.stack([_unit(0), -_unit(0)])) == pytest.approx(0.4)
    assert diversity(_unit(0)[None]) == 0


def test_point():
    one = np.zeros(10)
    one[0] = 1
    assert point(one) == pytest.approx(2.5974, abs=1e-4)
    assert point(one[::-1]) == pytest.approx(0.0260, abs=1e-4)
    assert point(np.array([0.6, 1.0, *[0] * 8])) == pytest.approx(3.6623, abs=1e-4)
    assert point(np.array([0.9, 0.5, 0.4])) == pytest.approx(7.5)


def _reward(text=None, items=None, embed=None, **options) -> DeepRecReward:
    eye = np.eye(21)
    return DeepRecReward(
        CATALOGUE, embed or (lambda texts: np.eye(len(texts))), eye if text is None else text,
        eye if items is None else items, RewardConfig(**options),
    )  # fmt: skip


@pytest.mark.parametrize(("rank", "value"), [(1, 3.0), (2, 2.8), (4, 2.4), (10, 1.2), (None, 0.0)])
def test_hit_and_rank(rank, value):
    answer = [f"unknown {n}" for n in range(10)]
    if rank:
        answer[rank - 1] = TITLES[TARGET]
    parts = _reward()([conversation(answer=answer)], "rec")
    assert parts["hit"][0] + parts["rank"][0] == pytest.approx(value)


@pytest.mark.parametrize(("rank", "total"), [(1, 5.5974), (10, 1.2260)])
def test_stage_two_total(rank, total):
    answer = [f"unknown {n}" for n in range(10)]
    answer[rank - 1] = TITLES[TARGET]
    assert _reward()([conversation(answer=answer)], "rec")["total"][0] == pytest.approx(total, abs=1e-4)


def test_point_halves_text_and_collaborative_cosine():
    def table(cosine):
        rows = np.zeros((21, 2))
        rows[:] = _unit(np.pi)
        rows[TARGET], rows[1] = _unit(0), _unit(np.arccos(cosine))
        return rows

    parts = _reward(table(0.8), table(0.4))([conversation(answer=[1])], "rec")
    assert parts["point"][0] == 0  # a list of one line is malformed where ten are asked for
    reward = _reward(table(0.8), table(0.4), answers=1)
    assert reward([conversation(answer=[1])], "rec")["point"][0] == pytest.approx(6.0)


def test_stage_one():
    def embed(texts):
        return np.stack([_unit(0), _unit(np.pi / 3), _unit(-np.pi / 3)])[: len(texts)]

    def mean_half(texts):  # three unit vectors with pair cosines of one half
        return np.linalg.cholesky(np.full((3, 3), 0.5) + 0.5 * np.eye(3))

    clean = _reward(embed=mean_half)([conversation(calls=3)], "cold")
    assert clean["total"][0] == pytest.approx(1.1)
    broken = conversation(calls=3, answer=[1])
    assert _reward(embed=mean_half)([broken], "cold")["total"][0] == pytest.approx(0.1)
    assert _reward(embed=mean_half, gate_process=True)([broken], "cold")["total"][0] == pytest.approx(-1.0)
    assert _reward(embed=embed)([conversation(calls=1)], "cold")["total"][0] == 0


def test_a_broken_format_pays_nothing_for_a_hit():
    parts = _reward()([conversation(answer=[TARGET])], "rec")
    assert parts["total"][0] == -1


def test_stage_two_ignores_calls_and_diversity():
    one, three = (_reward()([conversation(calls=c)], "rec")["total"][0] for c in (1, 3))
    assert one == three


def test_match_exact_or_substring():
    catalogue = Catalogue(("", "FIFA", "FIFA 16"), ("",) * 3)
    lines = ["1. FIFA 16", "2. fifa"]
    assert hit_index(lines, 1, catalogue) == 1
    assert hit_index(lines, 1, catalogue, "substring") == 0


def test_answers_with_dots_and_capitals():
    catalogue = Catalogue(("", "Mr. Smith", "Other"), ("",) * 3)
    assert hit_index(["1. other", "2. MR. SMITH"], 1, catalogue) == 1
    assert parse_answer(f"{ANSWER_OPEN}\n1. a\n") is None


def test_bad_stage_and_tables():
    with pytest.raises(ValueError, match="cold, rec"):
        _reward()([conversation()], "warm")
    with pytest.raises(ValueError, match="21 rows"):
        _reward(text=np.eye(20))
    with pytest.raises(ValueError, match="substring"):
        RewardConfig(match="fuzzy")
    assert dataclasses.asdict(RewardConfig())["answers"] == 10
