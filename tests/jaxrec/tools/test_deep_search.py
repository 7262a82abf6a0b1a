"""Annotations and summaries by a teacher: what fits is used, what does not is counted."""

import json

import pytest

from jaxrec.data.qa import Question
from jaxrec.tools.deep_search import Summariser, annotate, compress_reasoning
from jaxrec.tools.search import Passage
from jaxrec.tools.teacher import Failure, Sampling, ScriptedTeacher
from rl.envs.search import Question as Asked
from rl.envs.search import State
from rl.envs.tags import SIMPLE_DEEP_SEARCHER as TAGS

QUESTIONS = [Question(str(i), f"What is {i}?", (str(i),), "made") for i in range(5)]


def teacher(role, reply):
    return ScriptedTeacher({role: lambda request, choice: reply(request.messages[-1].content)})


def test_annotations_are_lower_case_and_each_key_point_once():
    said = json.dumps({"domain": " Mathematics ", "key_points": ["Number", "number", "Size"]})
    found = annotate(QUESTIONS, teacher("annotator", lambda _: f"Well.</think>{said}"), Sampling())
    assert [c.id for c in found.candidates] == [q.id for q in QUESTIONS]
    assert found.candidates[0].domain == "mathematics"
    assert found.candidates[0].key_points == ("number", "size")
    assert found.failed == {}


def test_questions_without_a_fitting_annotation_are_counted():
    good = json.dumps({"domain": "x", "key_points": ["a", "b"]})
    some = teacher("annotator", lambda text: "one key point" if text.endswith("What is 3?") else good)
    found = annotate(QUESTIONS, some, Sampling(), max_failed=0.2)
    assert [c.id for c in found.candidates] == ["0", "1", "2", "4"]
    assert found.failed == {"invalid": 1}
    with pytest.raises(ValueError, match=r"1 of 5 questions could not be annotated, more than the allowed share 0\.1"):
        annotate(QUESTIONS, some, Sampling(), max_failed=0.1)


def test_reasoning_is_compressed_as_released():
    """By the rule of the paper's code: the first step, the last four, those with a query or a result."""
    short = "\n\n".join("abcde")
    assert compress_reasoning(short, TAGS) == "\n".join(f"Step {i}: {x}" for i, x in enumerate("abcde", 1))
    lines = ["a", "b", "c", f"{TAGS.query_open}q{TAGS.query_close}", "e", "f", "g", "h", "i", "j"]
    found = compress_reasoning("\n".join(lines), TAGS).split("\n")
    assert found == [
        "Step 1: a", "...", f"Step 4: {lines[3]}", "...", "Step 7: g", "Step 8: h", "Step 9: i", "Step 10: j",
    ]  # fmt: skip


def state():
    return State(Asked("1", "Who?"), "Question: Who?\nAnswer:", TAGS, [("policy", " So it is long ago.")])


def test_a_summary_is_what_stands_behind_the_marker_and_the_teacher_sees_everything():
    seen = []

    def reply(text):
        seen.append(text)
        return "Thinking.\n**Final Information**\n```Ann\nwon.```"

    write = Summariser(teacher("summariser", reply), Sampling(), TAGS, lead=" ")
    assert write([state()], ["who won"], [[Passage("1", "Race", "Ann won the race.")]]) == [" Ann won."]
    for part in ("Step 1:  So it is long ago.", "\nQuery: who won\n", "**Web Page 1:**", "Ann won the race."):
        assert part in seen[0]
    assert write.counts["fitting"] == 1


def test_a_summary_that_fails_is_none_and_counted():
    class Failing:
        id = "failing"

        def ask(self, requests, done=None):
            return [Failure("timeout", "late") for _ in requests]

    write = Summariser(Failing(), Sampling(), TAGS)
    assert write([state()], ["q"], [[]]) == ["None"]
    assert write.counts["timeout"] == 1
