"""The other two roles of SimpleDeepSearcher's synthesis (arXiv 2505.16834, sections 2 and 3): a teacher annotates
questions before they are sampled, and sums up what a search found before the searching model reads it. The prompts are
worded by us.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from jaxrec.data.qa import Question
from jaxrec.tools.sampling import Candidate
from jaxrec.tools.teacher import Failure, Field, Sampling, Teacher, after_marker, ask_checked, ask_text, json_fields
from rl.envs.search import NOTHING, Passage, State, web_pages
from rl.envs.tags import TagStyle

ANNOTATE = (
    "Read the question below; do not answer it. Name one broad subject that it belongs to, and 2 to 4 short key "
    "points of it (one or two words each, in lower case): the things it is about, the properties and relations it asks "
    'for. Reply with JSON alone: {"domain": "...", "key_points": ["...", "..."]}'
)
SUMMARISE = (
    "Somebody answers a question step by step and has just searched the web. Below are the reasoning so far, the query "
    "and the pages that were found. Pick the facts from the pages that answer the query and carry the reasoning on, "
    "and add nothing of your own. Write them, in few sentences, behind the words **Final Information**."
)
_ANNOTATION = json_fields(
    {"domain": Field(str, least=1, most=60), "key_points": Field([Field(str, least=1, most=60)], least=2, most=4)}
)


@dataclasses.dataclass(frozen=True)
class Annotated:
    """candidates: the questions with domain and key points. failed: how many have none, by kind of failure ("invalid":
    no reply fitted)."""

    candidates: tuple[Candidate, ...]
    failed: Mapping[str, int]


def annotate(questions: Sequence[Question], teacher: Teacher, sampling: Sampling, max_failed: float = 0.2) -> Annotated:
    """Ask the teacher for domain and key points of every question, in lower case. A question without a fitting reply is
    left out and counted; more than a share of ``max_failed`` of them raises ValueError."""
    requests = [ask_text("annotator", f"{ANNOTATE}\n\nQuestion: {q.text}", sampling=sampling) for q in questions]
    out, failed, why = [], Counter(), ""
    for question, answer in zip(questions, ask_checked(teacher, requests, _ANNOTATION), strict=True):
        if isinstance(answer, Failure):
            failed[answer.kind] += 1
            why = answer.message
            continue
        points = dict.fromkeys(point.strip().lower() for point in answer.value["key_points"])
        out.append(Candidate(question.id, question.text, answer.value["domain"].strip().lower(), tuple(points)))
    if failed.total() > max_failed * len(questions):
        raise ValueError(
            f"{failed.total()} of {len(questions)} questions could not be annotated, more than the allowed share "
            f"{max_failed:g}: {dict(failed)}; the last one: {why}"
        )
    return Annotated(tuple(out), dict(failed))


def compress_reasoning(text: str, tags: TagStyle) -> str:
    """The reasoning so far as the summariser reads it: non-blank lines as "Step n: ...". Of more than five only the
    first, the last four, and those with a query or a result are kept, with "..." for each run that is left out
    (arXiv 2505.16834, released code)."""
    lines = [line for line in text.split("\n") if line.strip()]
    steps = [f"Step {n}: {line}" for n, line in enumerate(lines, 1)]
    if len(steps) <= 5:
        return "\n".join(steps)
    out: list[str] = []
    for i, step in enumerate(steps):
        if i == 0 or i >= len(steps) - 4 or tags.query_open in step or tags.result_open in step:
            out.append(step)
        elif out[-1] != "...":
            out.append("...")
    return "\n".join(out)


class Summariser:
    """Turns passages into the text of a result, by a teacher's role "summariser": ``SearchEnv``'s ``write``.

    max_words: of each page's text. lead: stands before every summary. ``counts``: "fitting", and failures by kind,
    each of which puts "None" where the summary would stand.
    """

    def __init__(self, teacher: Teacher, sampling: Sampling, tags: TagStyle, max_words: int = 1000, lead: str = ""):
        self.teacher, self.sampling, self.tags = teacher, sampling, tags
        self.max_words, self.lead = max_words, lead
        self.counts: Counter[str] = Counter()

    def __call__(
        self, states: Sequence[State], queries: Sequence[str], passages: Sequence[Sequence[Passage]]
    ) -> list[str]:
        requests = []
        for state, query, hits in zip(states, queries, passages, strict=True):
            reasoning = compress_reasoning(state.text, self.tags)
            pages = web_pages(hits, self.max_words)
            text = f"{SUMMARISE}\n\nReasoning so far:\n{reasoning}\n\nQuery: {query}\n\nPages:\n{pages}"
            requests.append(ask_text("summariser", text, sampling=self.sampling))
        answers = ask_checked(self.teacher, requests, after_marker(), counts=self.counts)
        return [self.lead + (NOTHING if isinstance(answer, Failure) else answer.value) for answer in answers]
