"""Reading final conversations: which lines count, and the figures by hand."""

from __future__ import annotations

import numpy as np
import pytest

from jaxrec.evaluate.agent import answer_ids, judge, readable
from rl.envs.recommend import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    ITEMS_CLOSE,
    ITEMS_OPEN,
    QUERY_CLOSE,
    QUERY_OPEN,
    THINK_CLOSE,
    Catalogue,
    Example,
    State,
)  # fmt: skip
from rl.trajectory import Status

TITLES = ("", *(f"Title {c}" for c in "ABCDEFGHIJKLM"), "Dr. No")
CATALOGUE = Catalogue(TITLES, [""] * len(TITLES))


def answered(lines: list[str], target: int = 1, close: str = ANSWER_CLOSE) -> State:
    body = "\n".join(lines)
    text = f"so{THINK_CLOSE}\n{ANSWER_OPEN}\n{body}\n{close}"
    return State(Example(7, (2, 3), target), "User:", [("policy", text)])


def numbered(*items: int) -> list[str]:
    return [f"{n}. {TITLES[i]}" for n, i in enumerate(items, 1)]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (numbered(4, 2, 9), [4, 2, 9, 0]),
        (["Here they are:", *numbered(4, 2)], [4, 2, 0, 0]),  # lines without a digit take no place
        (["- Title A", "* Title B", " 1. Title C", "1. Title D"], [4, 0, 0, 0]),
        (["1. Title D", "", "2. Title B"], [4, 2, 0, 0]),
        (["1. Title Z", "2. Title B"], [0, 2, 0, 0]),  # an unknown title keeps its place
        (numbered(4, 4, 2, 4), [4, 0, 2, 0]),  # a repeated one counts where it first stands
        (["1. Title Z", "2. Title Y", "3. Title B"], [0, 0, 2, 0]),
        (["1.  tITLE   d ", "2. Dr. No"], [4, 14, 0, 0]),
        (["1 Title D", "2. Title B"], [0, 2, 0, 0]),
        (numbered(1, 2, 3, 4, 5, 6), [1, 2, 3, 4]),
        ([], [0, 0, 0, 0]),
    ],
)
def test_answer_ids(lines, expected):
    found = answer_ids(answered(lines), CATALOGUE, 4)
    assert found.dtype == np.int32
    assert found.tolist() == expected


def test_an_answer_that_never_closes_or_never_opens_is_none():
    assert answer_ids(answered(numbered(4), close=""), CATALOGUE, 4).tolist() == [0] * 4
    assert answer_ids(State(Example(0, (1,), 2), "p", [("policy", "1. Title A")]), CATALOGUE, 4).tolist() == [0] * 4
    assert answer_ids(State(Example(0, (1,), 2), "p"), CATALOGUE, 4).tolist() == [0] * 4


def conversation(target: int, calls: list[list[int]], answer: list[int], status=Status.FINISHED) -> State:
    state = State(Example(target, (2, 3), target), "User:\n1. Title C", status=status)
    for n, items in enumerate(calls):
        state.segments.append(("policy", f"\nhm{QUERY_OPEN} words {n}{QUERY_CLOSE}"))
        body = "\n".join(f"{k}. {TITLES[i]}" for k, i in enumerate(items, 1))
        state.segments.append(("tool", f"\n\n{ITEMS_OPEN}\n{body}\n{ITEMS_CLOSE}\n\n"))
        state.preferences.append(f"words {n}")
        state.retrieved.append(np.array(items))
    lines = "\n".join(numbered(*answer))
    text = f"so{THINK_CLOSE}\n{ANSWER_OPEN}\n{lines}\n{ANSWER_CLOSE}" if answer else "so"
    state.segments.append(("policy", text))
    return state


TEN = [1, 4, 5, 6, 7, 8, 9, 10, 11, 12]
STATES = [
    conversation(1, [[1, 4]], TEN),  # rank 1, retrieved
    conversation(6, [[1, 4], [4, 5]], TEN),  # rank 4, from memory
    conversation(13, [[13, 4]], TEN),  # retrieved, not listed
    conversation(9, [[9, 1]], [], Status.TRUNCATED),  # no answer: a miss that stays in the denominator
]


def test_row_by_hand():
    judged = judge(STATES, CATALOGUE, 10)
    assert judged.valid.tolist() == [True, True, True, False]
    assert judged.calls.tolist() == [1, 2, 1, 1]
    assert judged.in_pool.tolist() == [True, False, True, True]
    assert judged.values("recall@1").tolist() == [1, 0, 0, 0]
    assert judged.values("recall@10").tolist() == [1, 1, 0, 0]
    np.testing.assert_allclose(judged.values("ndcg@5"), [1, 1 / np.log2(5), 0, 0])
    row = judged.row()
    expected = {
        "recall@1": 0.25, "recall@5": 0.5, "recall@10": 0.5, "ndcg@5": (1 + 1 / np.log2(5)) / 4,
        "ndcg@10": (1 + 1 / np.log2(5)) / 4, "valid_format": 0.75, "turns": 1.25, "pool_recall": 0.75,
        "hits_in_pool": 0.5, "distinct_retrieved": (2 + 3 + 2 + 2) / 4, "users": 4, "ended_truncated": 1,
    }  # fmt: skip
    assert row == pytest.approx(expected)
    split = judged.row(np.array([1, 0, 1, 2]))
    assert (split["recall@10_intent"], split["recall@10_other"]) == (0.5, 0.5)
    assert "recall@10_intent" not in judged.row(np.ones(4))


def test_no_hit_at_all_is_zero_not_nan():
    row = judge(STATES[2:], CATALOGUE, 10).row()
    assert row["hits_in_pool"] == row["recall@10"] == 0.0


def test_readable_records():
    records = readable(judge(STATES, CATALOGUE, 10), [1, 3], CATALOGUE, "rec_rl", 5)
    assert [r["hit_rank"] for r in records] == [4, None]
    first = records[0]
    assert (first["stage"], first["step"], first["target"], first["history"]) == (
        "rec_rl", 5, "Title F", ["Title B", "Title C"],
    )  # fmt: skip
    assert [s["by"] for s in first["segments"]] == ["prompt", "policy", "tool", "policy", "tool", "policy"]
    assert "".join(s["text"] for s in first["segments"][1:]) == STATES[1].text
