"""Rollouts and samples: predictions, rewriting of the last turn, and files that come back byte for byte."""

import dataclasses
import json

import pytest

from jaxrec.data.qa import Question
from jaxrec.evaluate.answers import R1_SEARCHER, SIMPLE_DEEP_SEARCHER
from jaxrec.tools.rollouts import Rollout, Search, read_rollouts, scored, write_rollouts
from jaxrec.tools.samples import read_samples, rewrite_answer, to_sample, write_samples
from rl.envs import tags

QUESTION = Question("q", "Who?", ("New York", "NY"), "test")
ROLLOUT = Rollout(
    "q",
    (
        ("policy", "First <|begin_search_query|> a\n<|end_search_query|>"),
        ("tool", "\n\n<|begin_search_result|>é\u2028\r\n<|end_search_result|>\n\n"),
        ("policy", "<|begin_search_query|>a<|end_search_query|>"),
        ("tool", "\n\n<|begin_search_result|>see above<|end_search_result|>\n\n"),
        ("policy", "Thus.</think>\n\nIt is \\boxed{\\text{New York}} indeed."),
    ),
    (Search("a", ("u1", "u2"), ("page one", "page two")),),
    "answer",
    prompt="Prompt: ",
)


def test_scores_of_a_rollout():
    done = scored(ROLLOUT, QUESTION.answers, SIMPLE_DEEP_SEARCHER)
    assert (done.prediction, done.search_count) == ("New York", 1)
    assert done.metrics == {"em": 1.0, "cover": 1.0, "f1": 1.0}
    longer = dataclasses.replace(ROLLOUT, segments=(("policy", r"\boxed{New-York, then}"),))
    assert scored(longer, QUESTION.answers, SIMPLE_DEEP_SEARCHER).metrics == {"em": 0.0, "cover": 0.0, "f1": 0.0}
    assert scored(longer, QUESTION.answers, R1_SEARCHER).metrics == {"em": 0.0, "cover": 1.0, "f1": pytest.approx(0.8)}


def test_no_answer_is_taken_from_what_tools_wrote():
    segments = (("policy", r"\boxed{a"), ("tool", r"\boxed{b}"), ("policy", "} and no more"))
    assert Rollout("q", segments).prediction == ""
    assert Rollout("q", (("policy", r"\boxed{a}"), *segments)).prediction == "a"
    assert Rollout("q", (("policy", r"\boxed{a}"), ("policy", r"\boxed{}"))).prediction == ""


@pytest.mark.parametrize(
    ("text", "rewritten"),
    [
        ("T.</think>\n\nIt is \\boxed{x} indeed.", "T.</think>\n\n\\boxed{x}"),
        ("T.</think>\n\n\\boxed{\\text{x}}!", "T.</think>\n\n\\boxed{\\text{x}}"),  # the first "}" does not end it
        ("T.</think>\n\\boxed{x}", "T.</think>\n\\boxed{x}"),
        ("T.</think>\\boxed{x}", "T.</think>\\boxed{x}"),
        ("T.</think>It is \\boxed{x}", "T.</think>\\boxed{x}"),
        ("T.</think>\n\n\n\n\\boxed{x}", "T.</think>\n\n\\boxed{x}"),
        ("\\boxed{a}</think>\n\n\\boxed{x} \\boxed{y}", "\\boxed{a}</think>\n\n\\boxed{x}"),
        ("T.</think>\n\n\\boxed{x", None),
        ("T.</think>\n\nx", None),
        ("T. \\boxed{x}", None),
        ("", None),
    ],
)
def test_the_last_turn_is_rewritten(text, rewritten):
    assert rewrite_answer(text) == rewritten
    if rewritten:
        assert rewrite_answer(rewritten) == rewritten


def test_rewriting_without_an_end_of_thinking():
    assert rewrite_answer("It is \\boxed{x} indeed.", "") == "It is \\boxed{x}"


def test_a_sample_keeps_every_byte_but_the_last_turn():
    sample = to_sample(ROLLOUT, QUESTION, 1, tags.SIMPLE_DEEP_SEARCHER)
    assert sample.text == ROLLOUT.text
    assert sample.segments == ROLLOUT.segments
    assert [key for key, _ in sample.output] == [
        "gen",
        "search_query",
        "doc",
        "doc_gen",
        "gen",
        "search_query",
        "doc_gen",
        "gen",
    ]
    assert sample.output[1:3] == (("search_query", "a"), ("doc", "page one\n\npage two"))
    short = to_sample(ROLLOUT, QUESTION, 1, tags.SIMPLE_DEEP_SEARCHER, "END")
    assert short.segments == (*ROLLOUT.segments[:-1], ("policy", "END"))
    assert (short.input, short.answers, short.search_count) == ("Prompt: ", QUESTION.answers, 1)


def test_files_come_back_byte_for_byte(tmp_path):
    rollouts = [
        scored(ROLLOUT, QUESTION.answers, SIMPLE_DEEP_SEARCHER),
        dataclasses.replace(ROLLOUT, output=ROLLOUT.text),
    ]
    write_rollouts(tmp_path / "r.jsonl", rollouts)
    assert read_rollouts(tmp_path / "r.jsonl") == rollouts
    sample = to_sample(rollouts[0], QUESTION, 1, tags.SIMPLE_DEEP_SEARCHER)
    samples = [sample, dataclasses.replace(sample, id="r")]
    write_samples(tmp_path / "s.jsonl", samples)
    assert read_samples(tmp_path / "s.jsonl") == samples
    row = json.loads((tmp_path / "s.jsonl").read_text().split("\n")[0])
    assert list(row) == [
        "id", "question", "answer", "input", "output", "text", "metric", "search_count", "min_search",
    ]  # fmt: skip
    assert row["output"][0] == {"gen": ROLLOUT.segments[0][1]}
    assert row["answer"] == ["New York", "NY"]


def test_segments_must_reproduce_the_output():
    with pytest.raises(ValueError, match="question 'q': the segments do not reproduce the output: at character 5"):
        dataclasses.replace(ROLLOUT, output=ROLLOUT.text[:5] + "!")
    with pytest.raises(ValueError, match="no segment is by the policy"):
        Rollout("q", (("tool", "a"),))
    with pytest.raises(ValueError, match="a segment is by 'policy' or 'tool', not 'user'"):
        Rollout("q", (("policy", "a"), ("user", "b")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "other"}, r"s.jsonl:2 \(id 'r'\): the segments do not reproduce the output: at character 0"),
        ({"id": "q"}, "s.jsonl:2: id 'q' was there before"),
        ({"answer": "New York"}, "s.jsonl:2: field 'answer' is missing or not of type list"),
        ({"answer": [1]}, "s.jsonl:2: field 'answer' must be a list of texts"),
        (
            {"output": [{"gen": "a", "doc": "b"}]},
            r"s.jsonl:2: output\[0\] must be one of gen, search_query",
        ),
        ({"output": [{"think": "a"}]}, r"s.jsonl:2: output\[0\] must be one of"),
        ({"output": [3]}, r"s.jsonl:2: output\[0\] must be one of"),
        ({"search_count": "1"}, "s.jsonl:2: field 'search_count' is missing or not of type int"),
    ],
)
def test_rows_that_are_no_samples_are_named(tmp_path, change, message):
    sample = to_sample(ROLLOUT, QUESTION, 1, tags.SIMPLE_DEEP_SEARCHER)
    path = tmp_path / "s.jsonl"
    write_samples(path, [sample, dataclasses.replace(sample, id="r")])
    first, second = path.read_text().rstrip("\n").split("\n")
    path.write_text(first + "\n" + json.dumps(json.loads(second) | change) + "\n")
    with pytest.raises(ValueError, match=message):
        read_samples(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "r.jsonl:1: not JSON"),
        ("[]", "r.jsonl:1: an object was expected, not list"),
        ('{"id": "q"}', "r.jsonl:1: no rollout: KeyError: 'prompt'"),
        ("changed:id:3", "r.jsonl:1: no rollout: ValueError: field 'id' is 3, not of type str"),
        ("changed:more:3", "r.jsonl:1: no rollout: ValueError: unknown field 'more'"),
        ("changed:segments:[[1]]", "r.jsonl:1: no rollout: ValueError"),
        (
            'changed:output:"x"',
            "r.jsonl:1: no rollout: ValueError: rollout of question 'q': the segments do",
        ),
    ],
)
def test_rows_that_are_no_rollouts_are_named(tmp_path, line, message):
    path = tmp_path / "r.jsonl"
    write_rollouts(path, [ROLLOUT])
    if line.startswith("changed:"):
        _, field, value = line.split(":", 2)
        line = json.dumps(json.loads(path.read_text()) | {field: json.loads(value)})
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_rollouts(path)
