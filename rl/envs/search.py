"""The search environment: a language model that asks a retriever while it reasons, then answers.

R1-Searcher++ (arXiv 2505.17005), its predecessor (arXiv 2503.05592) and SimpleDeepSearcher (arXiv 2505.16834): one
loop, three sets of tags (``rl.envs.tags``) and of rules (:class:`SearchOptions`). The prompts are worded by us.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from rl.envs.base import Action, Step
from rl.envs.tags import TagStyle, answers, control_tags, cut_words, marked, neutralize, parse_query
from rl.trajectory import Status

FINISH = (
    "answer", "eos_no_answer", "length", "max_turn", "empty_query", "tool_error", "max_retrieval"
)  # fmt: skip
LIMIT_NOTICE = "No more searches are allowed. Answer with what you know."
REPEAT_NOTICE = "You have searched for this before. See the earlier results."
FAILED = "Search unavailable."
NOTHING = "None"


class Passage(Protocol):
    id: Any
    title: str
    text: str


class Result(Protocol):
    """What one query brought: passages, best first, or the reason why there are none ("" or None: they are there)."""

    passages: Sequence[Passage] | None
    error: str | None


# (queries, k) -> one result per query: one call for the whole batch.
Search = Callable[[Sequence[str], int], Sequence[Result]]


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked. Any object with these fields will do; answers are all right ones."""

    id: str
    question: str
    answers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Call:
    """One executed search: what was found, and ``text``, what the policy read of it. error: why the tool failed."""

    query: str
    passages: tuple[Passage, ...]
    text: str
    error: str | None = None


@dataclasses.dataclass
class State:
    """One conversation. segments: (author, text) with author "policy" or "tool"; turns: policy segments so far.

    finish: one of ``FINISH``. While a result waits to be read it is "length", since that is why a rollout would end the
    row here: the result leaves no room.
    """

    example: Any
    prompt: str
    style: TagStyle
    segments: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    calls: list[Call] = dataclasses.field(default_factory=list)
    turns: int = 0
    notices: int = 0
    finish: str = "length"
    status: Status = Status.FINISHED

    @property
    def searches(self) -> int:
        """Searches that were carried out and answered: the retrieval count."""
        return sum(call.error is None for call in self.calls)

    @property
    def failures(self) -> int:
        """Searches that the tool failed to answer."""
        return len(self.calls) - self.searches

    @property
    def policy_text(self) -> str:
        return "".join(text for author, text in self.segments if author == "policy")

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.segments)

    @property
    def answer(self) -> str:
        """The last complete answer the policy wrote, "" where there is none."""
        found = answers(marked(self.segments), self.style)
        return found[-1][1] if found else ""


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """The loop's rules. Defaults: R1-Searcher++; k = 3 in training and 5 in evaluation is its predecessor's.

    max_searches: calls per conversation; 0 leaves the model to what it knows. max_turns: policy segments; 0 means
    max_searches + 1. at_limit: "stop" ends a conversation that wants another search, "notice" tells it so and goes on.
    repeat_notice: a query asked before is not run again but answered with a notice. on_error, when the tool fails:
    "continue" tells the policy so, "drop" ends the row with ``Status.ENV_ERROR``, which keeps it out of the update.
    max_words: per passage; max_result_words: per result. short: the prompt is the question alone, for a model that
    learned the protocol from examples.
    """

    k: int = 3
    max_searches: int = 8
    max_turns: int = 0
    at_limit: str = "stop"
    repeat_notice: bool = False
    on_error: str = "continue"
    max_words: int = 150
    max_result_words: int = 750
    short: bool = False

    def __post_init__(self):
        for name, least in {"k": 1, "max_searches": 0, "max_turns": 0, "max_words": 1, "max_result_words": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name, known in {"at_limit": ("stop", "notice"), "on_error": ("continue", "drop")}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.at_limit == "notice" and not self.max_turns:
            raise ValueError("at_limit='notice' lets a conversation go on at the limit, so it needs max_turns")

    @property
    def turns(self) -> int:
        """Most policy segments of a conversation; ``RolloutConfig.max_turns`` must be at least this."""
        return self.max_turns or self.max_searches + 1


DEEP_SEARCHER_OPTIONS = SearchOptions(10, 10, 15, "notice", repeat_notice=True)  # arXiv 2505.16834, section 3.1

# (states, queries, passages per query) -> the body of each result: one call for all, so that a summariser fits.
Writer = Callable[[Sequence[State], Sequence[str], Sequence[Sequence[Passage]]], Sequence[str]]


def numbered(passages: Sequence[Passage], max_words: int) -> str:
    """Passages as R1-Searcher's code writes them: "(1)title   text", one per line."""
    lines = []
    for n, passage in enumerate(passages, start=1):
        title, text = " ".join(passage.title.split()), " ".join(cut_words(passage.text, max_words).split())
        lines.append(passage_line(n, title, text))
    return "\n".join(lines)


def passage_line(number: int, title: str, text: str) -> str:
    """One passage of :func:`numbered`; either part may be empty."""
    return f"({number})" + "   ".join(part for part in (title, text) if part)


def web_pages(passages: Sequence[Passage], max_words: int) -> str:
    """Passages as SimpleDeepSearcher's code hands pages to its summariser: JSON under numbered headings."""
    return "\n".join(
        f"**Web Page {n}:**\n"
        + json.dumps({"id": n, "title": p.title, "context": cut_words(p.text, max_words)}, ensure_ascii=False, indent=2)
        for n, p in enumerate(passages, start=1)
    )


def instructions(style: TagStyle, max_searches: int) -> str:
    """What a pretrained model is told; with ``max_searches`` 0 no search is spoken of."""
    parts = ["Answer the question at the end. Reason step by step and let each step settle one fact."]
    if style.internal_open:
        parts.append(f"Put facts that you are sure of between {style.internal_open} and {style.internal_close}.")
    if max_searches:
        parts.append(
            "You can search. When a fact is missing, uncertain or may have changed, write one short query about that "
            f"one fact between {style.query_open} and {style.query_close} and stop. What is found is put between "
            f"{style.result_open} and {style.result_close} by the system; never write these two tags yourself. Then "
            f"go on reasoning. Search again whenever it helps, at most {max_searches} times."
        )
    elif style.internal_open:
        parts.append("Work from memory alone.")
    if style.think_close:
        parts.append(f"Write {style.think_close} once, where your reasoning ends and the answer follows.")
    parts.append(f"Finish with the shortest answer that is complete, ten words at most, as {style.answer_form}.")
    return " ".join(parts)


class SearchEnv:
    """Batched environment over explicit states.

    search: one batched call of the retriever per step, for all rows that ask (equal queries once). write: turns
    passages into the text of a result; default :func:`numbered`. chat: renders messages as a prompt, for instance a
    tokenizer's ``chat``; without it they stand below one another. reserved: strings that a result may not contain, such
    as the tokenizer's special tokens; the tags of the style are always broken up.
    """

    def __init__(
        self, search: Search, style: TagStyle, options: SearchOptions = SearchOptions(), *,
        write: Writer | None = None, chat: Callable[[list[dict[str, str]]], str] | None = None,
        reserved: Sequence[str] = (),
    ):  # fmt: skip
        self.search, self.style, self.options = search, style, options
        self.write, self.chat, self._control = write, chat, control_tags(style, reserved)
        neutralize("", self._control)  # what cannot be broken up is an error now
        self.stop = (style.query_close,)
        self._instructions = "" if options.short else instructions(style, options.max_searches)

    @property
    def prompt_id(self) -> str:
        """Hash of the prompt without its question, to store with data and checkpoints."""
        return hashlib.sha256(self.prompt("").encode()).hexdigest()[:16]

    def prompt(self, question: str, plain: bool = False) -> str:
        """The prompt for a question; where the style opens a think tag, generation starts inside it. plain: without
        ``chat``, for another model than the one that the template is of."""
        if self.options.short:
            text = f"Question: {question}\nAnswer:"
        elif self.chat is None or plain:
            text = f"{self._instructions}\n\nQuestion: {question}\nAnswer:"
        elif self.style.internal_open:
            text = self.chat([{"role": "system", "content": self._instructions}, {"role": "user", "content": question}])
        else:
            text = self.chat([{"role": "user", "content": f"{self._instructions}\n\nQuestion: {question}"}])
        opened = not self.style.think_open or text.rstrip().endswith(self.style.think_open)
        return text if opened else text + self.style.think_open

    def check(self, example: Any) -> None:
        """Raise ValueError for a question that is empty or holds a control tag."""
        text = example.question
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"question {example.id}: the text is empty")
        if held := [tag for tag in self.style.tags if tag in text]:
            raise ValueError(f"question {example.id} holds the control tag {held[0]!r}: remove it or the question")

    def reset(self, examples: Sequence[Any], copies: int = 1) -> tuple[list[State], list[str]]:
        """Fresh states, ``copies`` adjacent ones per example, and one prompt per example."""
        for example in examples:
            self.check(example)
        prompts = [self.prompt(example.question) for example in examples]
        states = [State(e, p, self.style) for e, p in zip(examples, prompts, strict=True) for _ in range(copies)]
        return states, prompts

    def result(self, body: str) -> str:
        """A result as the policy reads it: its body disarmed and cut, between the result tags."""
        body = cut_words(neutralize(body, self._control), self.options.max_result_words)
        gap = "\n" if self.style.lines else ""
        return f"\n\n{self.style.result_open}{gap}{body}{gap}{self.style.result_close}\n\n"

    def step(self, states: Sequence[State], actions: Sequence[Action]) -> Step:
        """One segment of every running conversation; the retriever is called once for all that ask."""
        bodies: list[str | None] = [None] * len(states)
        asking: list[tuple[int, str]] = []
        for i, (state, action) in enumerate(zip(states, actions, strict=True)):
            state.segments.append(("policy", action.text))
            state.turns += 1
            state.finish, state.status, query = self._verdict(state, action)
            if query and state.finish == "length":
                if self._at_limit(state):
                    bodies[i] = LIMIT_NOTICE
                elif self._repeats(state, query):
                    bodies[i] = REPEAT_NOTICE
                else:
                    asking.append((i, query))
                state.notices += bodies[i] is not None
        self._answer(states, asking, bodies)
        observations = [None if body is None else self.result(body) for body in bodies]
        for state, text in zip(states, observations, strict=True):
            if text is not None:
                state.segments.append(("tool", text))
        return Step(list(states), observations, np.array([state.status for state in states], np.int32))

    def _at_limit(self, state: State) -> bool:
        return len(state.calls) >= self.options.max_searches

    def _repeats(self, state: State, query: str) -> bool:
        return self.options.repeat_notice and any(c.query == query and c.error is None for c in state.calls)

    def _verdict(self, state: State, action: Action) -> tuple[str, Status, str | None]:
        """Why this segment ends the conversation; finish "length" with a query where it does not."""
        if action.stop == "length":
            return "length", Status.TRUNCATED, None
        # A sampler that does not know the stop string (a remote teacher) ends on the tag by chance; one that does may
        # leave the rest of a token behind the tag.
        asks = action.stop == self.style.query_close or action.text.rstrip().endswith(self.style.query_close)
        if not asks:
            return ("answer" if state.answer else "eos_no_answer"), Status.FINISHED, None
        query = parse_query(action.text, self.style)
        if not query:
            return "empty_query", Status.INVALID, None
        if self.options.at_limit == "stop" and self._at_limit(state):
            return "max_retrieval", Status.TURN_LIMIT, None
        if state.turns >= self.options.turns:  # nobody would read the result, so the search is not made
            return "max_turn", Status.TURN_LIMIT, None
        return "length", Status.TRUNCATED, query

    def _answer(self, states: Sequence[State], asking: Sequence[tuple[int, str]], bodies: list[str | None]) -> None:
        """Run the searches and fill in the bodies of their results."""
        if not asking:
            return
        queries = list(dict.fromkeys(query for _, query in asking))
        found = self.search(queries, self.options.k)
        if len(found) != len(queries):
            raise ValueError(f"search gave {len(found)} results for {len(queries)} queries; one per query is needed")
        results = dict(zip(queries, found, strict=True))
        good = [(i, query) for i, query in asking if not results[query].error]
        passages = [tuple(results[query].passages)[: self.options.k] for _, query in good]
        for (i, query), hits, body in zip(good, passages, self._write(states, good, passages), strict=True):
            bodies[i] = body if body.strip() else NOTHING
            states[i].calls.append(Call(query, hits, self.result(bodies[i])))
        for i, query in asking:
            if not (error := results[query].error):
                continue
            drop = self.options.on_error == "drop"
            bodies[i] = None if drop else FAILED
            states[i].calls.append(Call(query, (), "" if drop else self.result(FAILED), str(error)))
            if drop:
                states[i].finish, states[i].status = "tool_error", Status.ENV_ERROR

    def _write(self, states: Sequence[State], asking: Sequence[tuple[int, str]], passages: Sequence) -> Sequence[str]:
        if self.write is None:
            return [numbered(hits, self.options.max_words) for hits in passages]
        bodies = self.write([states[i] for i, _ in asking], [query for _, query in asking], passages)
        if len(bodies) != len(asking):
            raise ValueError(f"write gave {len(bodies)} texts for {len(asking)} results; one per result is needed")
        return bodies


def search_counts(states: Sequence[State]) -> dict[str, float]:
    """Figures of finished conversations for the log: mean searches (of answered calls), failed calls, notices, the
    share of rows in which a call failed, and the share of every way to end."""
    n = max(len(states), 1)
    out = {
        "searches": sum(s.searches for s in states) / n,
        "search_failures": float(sum(s.failures for s in states)),
        "rows_search_failed": sum(s.failures > 0 for s in states) / n,
        "notices": sum(s.notices for s in states) / n,
    }
    return out | {f"finish/{name}": sum(s.finish == name for s in states) / n for name in FINISH}
