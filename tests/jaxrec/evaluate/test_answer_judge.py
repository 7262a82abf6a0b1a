"""What a judge of answers is asked, and what becomes of its replies and failures."""

from jaxrec.data.qa import Question
from jaxrec.evaluate.answer_judge import JUDGE, teacher_judge
from jaxrec.evaluate.questions import judge_score
from jaxrec.tools.teacher import Failure, Reply, StoredTeacher

PAIRS = [(Question(f"q{i}", f"Who is {i}?", ("Ann", "the Ann"), "made up"), f"Ann {i}") for i in range(5)]


class Saying:
    """Replies in turn; a failure where one is None."""

    id = "saying"

    def __init__(self, texts):
        self.texts, self.asked = list(texts), []

    def ask(self, requests, done=None):
        self.asked += requests
        given, self.texts = self.texts[: len(requests)], self.texts[len(requests) :]
        return [Failure("refused", "no") if text is None else Reply((text,), ("stop",)) for text in given]


def test_a_judge_reads_question_right_answers_and_prediction():
    teacher = Saying(["True", "False"])
    assert teacher_judge(teacher, 64)([PAIRS[0], (PAIRS[1][0], "")]) == ["True", "False"]
    one, other = (request.messages[-1].content for request in teacher.asked)
    assert one == f"{JUDGE}\n\nQuestion: Who is 0?\nRight answers: Ann; the Ann\nGiven answer: Ann 0"
    assert other.endswith("\nGiven answer: No answer")
    assert {(r.role, r.sampling.temperature, r.sampling.max_tokens, r.n) for r in teacher.asked} == {
        ("judge", 0.0, 64, 1)
    }


def test_only_the_words_true_and_false_are_verdicts():
    replies = teacher_judge(Saying(["<think>False?</think>\n True\n", "True.", "false", None, "False"]), 64)(PAIRS)
    assert replies == ["True", "True.", "false", None, "False"]
    found = judge_score([{"judge": reply} for reply in replies])
    assert found == {"lasj": 1 / 4, "lasj_count": 4, "lasj_invalid": 2, "lasj_missing": 1}


def test_replies_are_kept_and_failures_asked_again(tmp_path):
    first = Saying(["True", None, "False", None, "True"])
    assert teacher_judge(StoredTeacher(first, tmp_path / "judge.jsonl"), 64)(PAIRS).count(None) == 2
    second = Saying(["False", "True"])
    again = teacher_judge(StoredTeacher(second, tmp_path / "judge.jsonl"), 64)(PAIRS)
    assert again == ["True", "False", "False", "True", "True"]
    assert [r.messages[-1].content.rpartition(" ")[2] for r in second.asked] == ["1", "3"]
