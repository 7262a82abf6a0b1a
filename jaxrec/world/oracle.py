"""What the embedded world's scripted teacher writes about its questions: rollouts, and rewrites from memory.

It plays the parts of the bigger model in R1-Searcher++ (arXiv 2505.17005). It answers from the world's
facts, but it is blind to what the trained model knows: whether a step of its rollouts recalls or searches is drawn. A
share of its texts is wrong on purpose, so that there is something to filter. Everything it writes is a function of the
prompt and of the generator it is handed.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from jaxrec.world.encyclopaedia import Fact
from jaxrec.world.questions import ChainQuestion
from rl.envs.tags import BOX, TagStyle

_ASKED = re.compile(r"Question: (.*?)\nAnswer:(.*)", re.DOTALL)


def read_prompt(prompt: str) -> tuple[str, str]:
    """The question of a rollout's prompt, and what was written so far. Raises ValueError for another form."""
    found = _ASKED.search(prompt)
    if found is None:
        raise ValueError("the prompt of a rollout must hold 'Question: ...' and 'Answer:' on a line of its own")
    return found[1], found[2]


@dataclasses.dataclass(frozen=True)
class OracleConfig:
    """recall: probability that a step of a rollout states its fact instead of searching, where the style has a tag for
    that. error: probability that a text holds a wrong fact. Raises ValueError for shares outside 0..1."""

    recall: float = 0.5
    error: float = 0.0

    def __post_init__(self):
        for name in ("recall", "error"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")


class Oracle:
    """questions: those it can be asked about. style: the tags that it writes."""

    def __init__(self, questions: Sequence[ChainQuestion], style: TagStyle, config: OracleConfig = OracleConfig()):
        self.style, self.config = style, config
        self._facts = {q.text: q.facts for q in questions}

    def facts(self, question: str) -> tuple[Fact, ...]:
        """The hops of a question. Raises ValueError for a question that it was not given."""
        if question not in self._facts:
            raise ValueError(f"the world's teacher knows no question {question!r}")
        return self._facts[question]

    def author(self, prompt: str, rng: np.random.Generator) -> str:
        """The next segment of a rollout: up to the end of a query, or up to the answer.

        prompt: "Question: ...\\nAnswer:" and what was written so far, results included. Raises ValueError for another
        form.
        """
        question, told = read_prompt(prompt)
        facts, style = self.facts(question), self.style
        done = sum(told.count(tag) for tag in (style.result_close, style.internal_close) if tag)
        text = ""
        for fact in facts[done:]:
            if not style.internal_open or rng.random() >= self.config.recall:
                return f"{text} {style.query_open} {fact.question(0)} {style.query_close}"
            text += f" {style.internal_open} {self._stated(fact, rng)} {style.internal_close}"
        think = f" {style.think_close}" if style.think_close else ""
        return f"{text}{think} {BOX}{{ {self._said(facts[-1], rng)} }}"

    def rewrite(self, question: str, documents: Sequence[str], rng: np.random.Generator) -> str:
        """A rollout that recalls every fact and searches for none (R1-Searcher++, section 6); "" where the documents
        and the question do not hold all of the facts' subjects and objects."""
        facts, style = self.facts(question), self.style
        known = " ".join((question, *documents))
        if any(name not in known for fact in facts for name in (fact.subject, fact.object)):
            return ""
        steps = [f" {style.internal_open} {self._stated(fact, rng)} {style.internal_close}" for fact in facts]
        return f"{''.join(steps)} {BOX}{{ {self._said(facts[-1], rng)} }}"

    def _wrong(self, rng: np.random.Generator) -> bool:
        return bool(self.config.error) and rng.random() < self.config.error

    def _stated(self, fact: Fact, rng: np.random.Generator) -> str:
        return fact.statement(0, fake=self._wrong(rng))

    def _said(self, fact: Fact, rng: np.random.Generator) -> str:
        return fact.fake if self._wrong(rng) else fact.object
