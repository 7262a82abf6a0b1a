"""Rows and summaries of answered questions: figures by hand, resuming, and judges that fail."""

import json

import pytest

from jaxrec.data.qa import Question
from jaxrec.evaluate.answers import R1_SEARCHER, SIMPLE_DEEP_SEARCHER, Protocol
from jaxrec.evaluate.questions import (
    compare,
    evaluate_questions,
    judge_score,
    read_rows,
    score_question,
    summarize,
    summarize_by,
)
from jaxrec.tools.rollouts import Rollout, Search


def question(number: int) -> Question:
    return Question(f"q{number}", f"Who is {number}?", (f"Ann {number}", "the Ann"), "odd" if number % 2 else "even")


def rollout(q: Question, answer: str, searches: int = 0, reason: str = "answer") -> Rollout:
    found = tuple(Search(f"s{i}", (f"u{i}",), (f"page {i} of Ann.",), failed=i == 2) for i in range(searches))
    segments = [part for i in range(searches) for part in (("policy", "Alternatively I ask. "), ("tool", f"fact {i} "))]
    return Rollout(q.id, (*segments, ("policy", f"Thus {answer}")), found, reason)


QUESTIONS = [question(i) for i in range(4)]
ANSWERS = [r"\boxed{Ann}", r"\boxed{Ann 1, I think}", r"\boxed{Bob}", "no box"]


def play(batch) -> list[Rollout]:
    where = {q.id: i for i, q in enumerate(QUESTIONS)}
    reasons = ["answer", "answer", "answer", "length"]
    return [rollout(q, ANSWERS[where[q.id]], where[q.id], reasons[where[q.id]]) for q in batch]


def test_a_row_by_hand():
    row = score_question(QUESTIONS[1], play([QUESTIONS[1]])[0], SIMPLE_DEEP_SEARCHER)
    assert (row["prediction"], row["em"], row["cover"], row["cover_tokens"]) == ("Ann 1, I think", 0, 1, 1)
    assert row["f1"] == pytest.approx(2 * 2 / (4 + 2))
    assert (row["searches"], row["failed_searches"], row["words"], row["alternatively"]) == (1, 0, 8, 1)
    assert row["contained"] == {"plan": True, "pages": True, "summaries": False}
    assert row["judge"] is None


def test_containment_reads_each_stage_apart():
    stages = [(("policy", "Ann"), ("tool", "x")), (("policy", "x"), ("tool", "the Ann!")), (("policy", "Annex"),)]
    for segments, contained in zip(stages, ((True, False), (False, True), (False, False))):
        row = score_question(QUESTIONS[0], Rollout("q0", segments, (Search("s", (), ("Anna",)),)), SIMPLE_DEEP_SEARCHER)
        assert row["contained"] == {"plan": contained[0], "pages": False, "summaries": contained[1]}


def test_the_summary_by_hand(tmp_path):
    replies = {"q0": "True", "q1": "True.", "q2": "False", "q3": None}
    judge = lambda pairs: [replies[q.id] for q, _ in pairs]  # noqa: E731
    rows = evaluate_questions(QUESTIONS, play, tmp_path / "rows.jsonl", SIMPLE_DEEP_SEARCHER, judge=judge, batch_size=3)
    out = summarize(rows, SIMPLE_DEEP_SEARCHER)
    assert (out["em"], out["cover"], out["f1"]) == (0.25, 0.5, pytest.approx((1 + 2 / 3) / 4))
    assert (out["rc"], out["rc_right"], out["rc_wrong"], out["right"], out["wrong"]) == (1.5, 0.5, 2.5, 2, 2)
    assert (out["lasj"], out["lasj_count"], out["lasj_invalid"], out["lasj_missing"]) == (1 / 3, 3, 1, 1)
    assert (out["failed_searches"], out["no_answer"]) == (1, 1)
    assert out["alternatively"] == 1.5
    assert out["words"] == pytest.approx((2 + 8 + 8 + 12) / 4)
    assert out["reasons"] == {"answer": 3, "length": 1}
    assert out["contained"] == {"plan": 0.5, "pages": 0.75, "summaries": 0.0}
    assert out["protocol"]["questions"] == 4
    assert out["protocol"]["datasets"] == {"even": 2, "odd": 2}
    assert (out["protocol"]["normalization"], out["protocol"]["cover_form"]) == ("squad", "run")
    for metric, (low, high) in out["intervals"].items():
        assert 0 <= low <= out[metric] <= high <= 1
    assert json.loads(json.dumps(out)) == out
    parts = summarize_by(rows, SIMPLE_DEEP_SEARCHER, "dataset")
    assert {name: part["rc"] for name, part in parts.items()} == {"even": 1.0, "odd": 2.0}
    wrong = summarize(rows[2:], SIMPLE_DEEP_SEARCHER)
    assert (wrong["rc_right"], wrong["rc_wrong"]) == (None, 2.5)
    with pytest.raises(ValueError, match="no rows to summarise"):
        summarize([], SIMPLE_DEEP_SEARCHER)


def test_no_judge_is_missing_and_not_zero():
    rows = [{"judge": None}] * 3
    assert judge_score(rows) == {"lasj": None, "lasj_count": 0, "lasj_invalid": 0, "lasj_missing": 3}
    rows = [{"judge": reply} for reply in ("False", "yes", "")]
    assert judge_score(rows) == {"lasj": 0.0, "lasj_count": 3, "lasj_invalid": 2, "lasj_missing": 0}


def test_replies_are_added_to_rows_and_replaced_by_another_judges(tmp_path):
    path, asked = tmp_path / "rows.jsonl", []

    def judge(replies):
        def ask(pairs):
            asked.extend((q.id, said) for q, said in pairs)
            return replies

        return ask

    plain = evaluate_questions(QUESTIONS, play, path, R1_SEARCHER)
    first = evaluate_questions(QUESTIONS, None, path, R1_SEARCHER, judge=judge(["True", None, "False", "False"]))
    assert asked == [("q0", "Ann"), ("q1", "Ann 1, I think"), ("q2", "Bob"), ("q3", "")]
    assert [row["judge"] for row in first] == ["True", None, "False", "False"]
    assert list(read_rows(path, R1_SEARCHER).values()) == first
    assert [{**row, "judge": None} for row in first] == plain
    before = path.stat().st_mtime_ns
    assert evaluate_questions(QUESTIONS, None, path, R1_SEARCHER) == plain  # nobody judges: no reply is reported
    assert path.stat().st_mtime_ns == before
    evaluate_questions(QUESTIONS, None, path, R1_SEARCHER, judge=judge(["no", "True", None, "False"]))
    assert [row["judge"] for row in read_rows(path, R1_SEARCHER).values()] == ["no", "True", None, "False"]


def test_what_is_on_disk_is_not_scored_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    whole = evaluate_questions(QUESTIONS, play, tmp_path / "whole.jsonl", R1_SEARCHER)
    played = []

    def killed(batch):
        if len(played) == 2:
            raise KeyboardInterrupt
        played.extend(q.id for q in batch)
        return play(batch)

    with pytest.raises(KeyboardInterrupt):
        evaluate_questions(QUESTIONS, killed, path, R1_SEARCHER, batch_size=1)
    assert played == ["q0", "q1"]
    with open(path, "a") as file:
        file.write('{"id": "q2", "em"')  # a row that a kill cut short
    again, done = [], []

    def rest(batch):
        again.extend(q.id for q in batch)
        return play(batch)

    rows = evaluate_questions(QUESTIONS[::-1], rest, path, R1_SEARCHER, batch_size=1, progress=done.append)
    assert again == ["q3", "q2"]
    assert done == [3, 4]
    assert [row["id"] for row in rows] == ["q3", "q2", "q1", "q0"]
    assert rows[::-1] == whole
    assert list(read_rows(path, R1_SEARCHER)) == ["q0", "q1", "q3", "q2"]
    assert evaluate_questions(QUESTIONS, None, path, R1_SEARCHER) == whole  # nothing is left to play


def test_files_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    evaluate_questions(QUESTIONS, play, path, R1_SEARCHER)
    with pytest.raises(ValueError, match=r"rows.jsonl:1: scored by another protocol.*remove"):
        evaluate_questions(QUESTIONS, play, path, SIMPLE_DEEP_SEARCHER)
    with pytest.raises(ValueError, match="holds 1 rows of other questions, e.g. 'q3'; remove the file"):  # noqa: RUF043
        evaluate_questions(QUESTIONS[:3], play, path, R1_SEARCHER)
    text = path.read_text()
    path.write_text(text + text)
    with pytest.raises(ValueError, match=r"rows.jsonl:5: id 'q0' was there before"):
        read_rows(path, R1_SEARCHER)
    path.write_text('{"id": "q0"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:1: no row of a question"):
        read_rows(path, R1_SEARCHER)
    assert read_rows(tmp_path / "none.jsonl", R1_SEARCHER) == {}


def test_every_question_has_one_rollout_and_one_reply(tmp_path):
    with pytest.raises(ValueError, match="3 rollouts came back for 4 questions"):
        evaluate_questions(QUESTIONS, lambda batch: play(batch)[:3], tmp_path / "a.jsonl", R1_SEARCHER)
    with pytest.raises(ValueError, match="or in another order"):
        evaluate_questions(QUESTIONS, lambda batch: play(batch)[::-1], tmp_path / "a.jsonl", R1_SEARCHER)
    with pytest.raises(ValueError, match="the judge gave 0 replies to 4 questions"):
        evaluate_questions(QUESTIONS, play, tmp_path / "a.jsonl", R1_SEARCHER, judge=lambda pairs: [])
    with pytest.raises(ValueError, match="1 ids of questions occur twice"):
        evaluate_questions([*QUESTIONS, QUESTIONS[0]], play, tmp_path / "a.jsonl", R1_SEARCHER)
    assert len(read_rows(tmp_path / "a.jsonl", R1_SEARCHER)) == 4  # a judge that errs costs no rollouts


def test_comparisons_are_paired_by_question(tmp_path):
    better = lambda batch: [rollout(q, rf"\boxed{{{q.answers[0]}}}") for q in batch]  # noqa: E731
    a = evaluate_questions(QUESTIONS, better, tmp_path / "a.jsonl", R1_SEARCHER)
    b = evaluate_questions(QUESTIONS, play, tmp_path / "b.jsonl", R1_SEARCHER)
    difference, low, high = compare(a, b[::-1], "em")
    assert difference == 0.75
    assert 0 <= low <= difference <= high <= 1
    assert compare(a, b, "searches")[0] == -1.5
    with pytest.raises(ValueError, match="only the same questions can be compared: 4 and 3 rows"):
        compare(a, b[:3], "em")
    other = [{**row, "protocol": {}} for row in b]
    with pytest.raises(ValueError, match="different protocols"):
        compare(a, other, "em")


def test_protocols_are_checked():
    with pytest.raises(ValueError, match="normalization must be one of"):
        Protocol("other")
    with pytest.raises(ValueError, match="form must be one of"):
        Protocol(cover="other")
