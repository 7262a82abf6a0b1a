"""A bigger model judges short answers: LLM-as-judge, LasJ (arXiv 2505.16834 and 2505.17005, section 9 of either). The
prompt is worded by us."""

from collections.abc import Sequence

from jaxrec.data.qa import Question
from jaxrec.evaluate.questions import Judge
from jaxrec.tools.teacher import Failure, Sampling, Teacher, ask_text, without_thinking

JUDGE = (
    "Below are a question, its right answers and an answer that somebody gave. Decide whether that answer says the "
    "same as one of the right answers: the same meaning and the same key facts, however it is worded. Reply with one "
    "word, True if it does and False if it does not."
)
NO_ANSWER = "No answer"


def judge_prompt(question: Question, prediction: str) -> str:
    """What the judge reads: all right answers, and "No answer" where the prediction is empty."""
    right = "; ".join(question.answers)
    return f"{JUDGE}\n\nQuestion: {question.text}\nRight answers: {right}\nGiven answer: {prediction or NO_ANSWER}"


def teacher_judge(teacher: Teacher, max_tokens: int) -> Judge:
    """A judge by a teacher's role "judge", greedy and asked once an answer. A reply is what stands behind its thinking,
    without space around it; None where the teacher failed."""
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens)

    def judge(pairs: Sequence[tuple[Question, str]]) -> list[str | None]:
        requests = [ask_text("judge", judge_prompt(*pair), sampling=sampling) for pair in pairs]
        answers = teacher.ask(requests)
        return [None if isinstance(a, Failure) else without_thinking(a.text).strip() for a in answers]

    return judge
