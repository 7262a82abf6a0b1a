"""What the embedded world's teacher writes for SimpleDeepSearcher (arXiv 2505.16834): rollouts with faults of the kinds
that its filters look for, annotations of questions, and summaries of what a search found.

Every hop of a question may go wrong, a later one more often, so that long chains seldom come out clean. A rollout is
drawn whole from its question and its seed, and handed out turn by turn. It follows its own plan, whatever the searches
bring.
"""

import dataclasses
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxrec.world.encyclopaedia import RELATIONS, Fact
from jaxrec.world.oracle import read_prompt
from jaxrec.world.questions import ChainQuestion
from rl.envs.tags import BOX, SIMPLE_DEEP_SEARCHER, TagStyle

# wrong_fact: a result is misread, and the chain goes on from there. guess: a wrong fact in place of a search. extra: a
# search for what was not asked. repeat: the same search again, in other words. reflect: doubts, over and over. ramble:
# the same is told of many other subjects. own_result: the policy writes a result itself. no_close: the thinking never
# ends.
FAULTS = ("wrong_fact", "guess", "extra", "repeat", "reflect", "ramble", "own_result", "no_close")
DOUBTS = ("Wait", "Hmm", "Alternatively")
MARKER = "**Final Information**"
_QUERY = re.compile(r"^Query: (.*)$", re.MULTILINE)
_PAGE = re.compile(r"^\*\*Web Page \d+:\*\*\n", re.MULTILINE)
_SENTENCE = re.compile(r"(?<=[.?]) ")


@dataclasses.dataclass(frozen=True)
class SearcherConfig:
    """error: probability that the first hop of a rollout goes wrong, in one of ``faults``, drawn evenly (a name that
    stands there twice is drawn twice as often); of the n-th hop it is n times that, at most 1. doubts: how many there
    are in a row. ramble: words of such a turn, at least. Raises ValueError for what cannot be."""

    error: float = 0.0
    faults: tuple[str, ...] = FAULTS
    doubts: int = 4
    ramble: int = 48

    def __post_init__(self):
        if not 0 <= self.error <= 1:
            raise ValueError(f"error must lie between 0 and 1, not {self.error}")
        if unknown := set(self.faults) - set(FAULTS):
            raise ValueError(f"no fault {min(unknown)!r}; faults: {', '.join(FAULTS)}")
        if self.error and not self.faults:
            raise ValueError(f"error={self.error} needs faults")


class SearcherOracle:
    """facts: all of the world. questions: those it can be asked about."""

    def __init__(
        self, facts: Sequence[Fact], questions: Sequence[ChainQuestion], config: SearcherConfig = SearcherConfig(),
        style: TagStyle = SIMPLE_DEEP_SEARCHER,
    ):  # fmt: skip
        self.config, self.style = config, style
        self._asked = {q.text: q.facts for q in questions}
        self._known = {(f.subject, f.relation): f for f in facts}
        self._of: dict[str, list[Fact]] = {}
        for fact in facts:
            self._of.setdefault(fact.subject, []).append(fact)
        self._queries = {f.question(way): f for f in facts for way in range(len(RELATIONS[f.relation][3]))}

    def facts(self, question: str) -> tuple[Fact, ...]:
        """The hops of a question. Raises ValueError for a question that it was not given."""
        if question not in self._asked:
            raise ValueError(f"the world's teacher knows no question {question!r}")
        return self._asked[question]

    # --- rollouts ---

    def author(self, prompt: str, seed: int) -> str:
        """The next turn of the rollout that a question has under a seed.

        prompt: "Question: ...\\nAnswer:" and what was written so far, results included. Raises ValueError for another
        form, and for a text that is not the beginning of that rollout.
        """
        question, rest = read_prompt(prompt)
        for turn in self.turns(question, seed):
            if not rest:
                return turn
            _, closed, rest = rest.removeprefix(turn).partition(self.style.result_close)
            if not closed:
                break
            rest = rest.removeprefix("\n\n")
        raise ValueError(f"this is no beginning of the rollout of {question!r} under seed {seed}")

    def turns(self, question: str, seed: int) -> list[str]:
        """A whole rollout: all turns but the last end in a query."""
        rng = np.random.Generator(np.random.PCG64([zlib.crc32(question.encode()), seed]))
        facts = self.facts(question)
        faults = [self._fault(hop, rng) for hop in range(len(facts))]
        turns, text, fact = [], "", facts[0]
        for hop, fault in enumerate(faults):
            text += self._before(fact, fault, rng)
            if fault != "guess":
                turns += self._searches(text, fact, fault, rng)
                text = ""
            wrong = fault in ("wrong_fact", "guess")
            text += f" {'' if fault == 'guess' else 'So '}{fact.statement(0, fake=wrong)}"
            said = fact.fake if wrong else fact.object
            if hop + 1 < len(facts):
                fact = self._known[said, facts[hop + 1].relation]
        close = "" if "no_close" in faults else f" {self.style.think_close}"
        return [*turns, f"{text}{close} {BOX}{{ {said} }}"]

    def _fault(self, hop: int, rng: np.random.Generator) -> str:
        drawn, kind = rng.random(), int(rng.integers(max(len(self.config.faults), 1)))
        return self.config.faults[kind] if drawn < self.config.error * (hop + 1) else ""

    def _query(self, text: str, question: str) -> str:
        return f"{text} {self.style.query_open} {question} {self.style.query_close}"

    def _before(self, fact: Fact, fault: str, rng: np.random.Generator) -> str:
        """What is thought before a hop's search."""
        if fault == "reflect":
            doubt = DOUBTS[int(rng.integers(len(DOUBTS)))]
            return f" {doubt}, {fact.question(0)}" * self.config.doubts
        if fault == "ramble":
            others = [f for f in self._known.values() if f.relation == fact.relation]
            order, text = rng.permutation(len(others)), ""
            while len(text.split()) < self.config.ramble:
                text += f" {others[order[0]].statement(0)}"
                order = np.roll(order, -1)
            return text
        if fault == "own_result":
            return f"\n\n{self.style.result_open} {fact.statement(0)}{self.style.result_close}\n\n"
        return ""

    def _searches(self, text: str, fact: Fact, fault: str, rng: np.random.Generator) -> list[str]:
        """The turns that search for a fact, the first one behind ``text``."""
        wanted = fact.question(0)
        if fault == "extra":
            own = self._of[fact.subject]
            other = own[int(rng.integers(len(own)))]
            beside = other.question(1) if other == fact else other.question(0)
            return [self._query(text, beside), self._query("", wanted)]
        return [self._query(text, wanted)] + [self._query("", fact.question(1))] * (fault == "repeat")

    # --- annotations and summaries ---

    def annotate(self, question: str) -> str:
        """JSON: the domain is the relation asked for last, key points are the subject and the relations."""
        facts = self.facts(question)
        points = [facts[0].subject.lower(), *(fact.relation for fact in facts)]
        return json.dumps({"domain": facts[-1].relation, "key_points": points})

    def summarise(self, prompt: str) -> str:
        """The sentences of the pages that concern the query: those that state the fact it asks for, else those with a
        subject that it names; "None" where there are none.

        prompt: with "Query: ..." on a line, then pages as ``rl.envs.search.web_pages`` writes them. Raises ValueError
        for another form.
        """
        found = _QUERY.search(prompt)
        if found is None:
            raise ValueError("the prompt of a summary must hold 'Query: ...' on a line of its own")
        pages = [json.loads(page)["context"] for page in _PAGE.split(prompt[found.end() :])[1:]]
        sentences = list(dict.fromkeys(s for page in pages for s in _SENTENCE.split(page)))
        fact = self._queries.get(found[1])
        told = [s for s in sentences if fact is not None and s in _statements(fact)]
        if not told:
            words = f" {' '.join(re.findall(r'[^ .,?]+', found[1]))} "
            named = [subject for subject in self._of if f" {subject} " in words]
            told = [s for s in sentences if any(subject in s for subject in named)]
        return f"{MARKER} {' '.join(told) or 'None'}"


def _statements(fact: Fact) -> list[str]:
    return [fact.statement(way) for way in range(len(RELATIONS[fact.relation][2]))]


def roles(oracle: SearcherOracle) -> Mapping[str, Callable]:
    """The oracle as functions of a scripted teacher. What is asked stands in the last message."""

    def asked(request) -> str:
        return request.messages[-1].content

    return {
        "author": lambda request, choice: oracle.author(asked(request), (request.sampling.seed or 0) + choice),
        "annotator": lambda request, choice: oracle.annotate(asked(request).rpartition("Question: ")[2]),
        "summariser": lambda request, choice: oracle.summarise(asked(request)),
    }
