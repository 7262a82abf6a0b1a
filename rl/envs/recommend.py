"""The recommendation environment: a language model that queries a recommender, then ranks (arXiv 2505.16810).

A policy segment ends at the query close tag, at end of text, or at its length limit. A query is answered with the
recommender's top items; anything else ends the conversation. The prompt wording is ours; the tags are the paper's.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

from rl.envs.base import Action, Step
from rl.trajectory import Status

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
QUERY_OPEN, QUERY_CLOSE = "<|begin_of_preference|>", "<|end_of_preference|>"
ITEMS_OPEN, ITEMS_CLOSE = "<|begin_of_item_list|>", "<|end_of_item_list|>"
ANSWER_OPEN, ANSWER_CLOSE = "<recommendation_list>", "</recommendation_list>"
OPEN_QUERY = "anything"  # a query that names nothing: the recommender goes by the history alone (ours)
TAGS = (THINK_OPEN, THINK_CLOSE, QUERY_OPEN, QUERY_CLOSE, ITEMS_OPEN, ITEMS_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)

# (examples, preference texts, k, items shown in earlier calls per example) -> item ids int [n, k]: one call for the
# whole batch. The history it ranks with comes from the example, never from the prompt, so the policy cannot change it.
Retriever = Callable[[Sequence["Example"], Sequence[str], int, Sequence[np.ndarray]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Example:
    """One user at one time. history: item ids, oldest first; target: the item to find; index: the sample's id."""

    index: int
    history: tuple[int, ...]
    target: int


def normalise_title(title: str) -> str:
    """Trimmed, case-folded, runs of white space as one blank: what decides that two titles name one item."""
    return " ".join(title.split()).casefold()


class Catalogue:
    """Titles and category texts by item id (row 0 = PAD), and the way back from a title to its id.

    Raises ValueError for an empty title or for two items with one normalised title, listing them.
    """

    def __init__(self, titles: Sequence[str], categories: Sequence[str]):
        if len(titles) != len(categories):
            raise ValueError(
                f"{len(titles)} titles but {len(categories)} category texts; one of each per item is needed"
            )
        self.titles = tuple(titles)
        self.categories = tuple(categories)
        self._ids: dict[str, int] = {}
        clashes = []
        for i, title in enumerate(self.titles[1:], start=1):
            name = normalise_title(title)
            if not name:
                raise ValueError(f"item {i} has no title; drop it or give it one before training")
            if self._ids.setdefault(name, i) != i:
                clashes.append(f"{title!r} (items {self._ids[name]} and {i})")
        if clashes:
            more = f" and {len(clashes) - 5} more" if len(clashes) > 5 else ""
            raise ValueError(
                f"{len(clashes)} titles name two items: {', '.join(clashes[:5])}{more}; add a year or an id to them"
            )

    def __len__(self) -> int:
        return len(self.titles) - 1

    def find(self, title: str) -> int:
        """Id of a title, 0 when the catalogue has no such item."""
        return self._ids.get(normalise_title(title), 0)

    def check(self, example: Example) -> None:
        """Raise for an example that cannot be used: empty history (ValueError), unknown item (KeyError)."""
        if not example.history:
            raise ValueError(f"example {example.index}: the history must hold at least one known item")
        for item in (*example.history, example.target):
            if not 1 <= item <= len(self):
                raise KeyError(f"example {example.index}: item {item} is not in the catalogue (1..{len(self)})")


@dataclasses.dataclass
class State:
    """One conversation. segments: (author, text) with author "policy" or "tool"; retrieved: item ids per call."""

    example: Example
    prompt: str
    segments: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    preferences: list[str] = dataclasses.field(default_factory=list)
    retrieved: list[np.ndarray] = dataclasses.field(default_factory=list)
    status: Status = Status.FINISHED

    @property
    def calls(self) -> int:
        return len(self.retrieved)

    @property
    def policy_text(self) -> str:
        return "".join(text for author, text in self.segments if author == "policy")

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.segments)


@dataclasses.dataclass(frozen=True)
class PromptStyle:
    """How much the prompt says. ``full`` instructs a pretrained model; ``short`` is for a model trained from scratch,
    which learns the protocol from examples and only needs the history."""

    instructions: bool = True
    history_categories: bool = True
    result_categories: bool = True
    max_history: int = 20
    max_line: int = 750  # characters; longer history lines are cut (the released code's limit)


PLACEHOLDERS = (
    "phrases that say what the user may want next",
    "your reasoning about the user",
    "the items the recommender returned",
    "what the user chose so far",
    "the final titles, best first",
)


def instructions(results: int, answers: int) -> str:
    """The task description put before the history; its placeholder snippets must not be echoed by the policy."""
    reasoning, query, items, history, final = (PLACEHOLDERS[i] for i in (1, 0, 2, 3, 4))
    return (
        "You recommend items to a user whose past choices you know. You cannot see the catalogue. A recommender can: "
        f"describe what the user may want and it returns {results} items that fit the description and the history.\n\n"
        f"To ask it, write phrases separated by ';' between {QUERY_OPEN} and {QUERY_CLOSE}. It answers between "
        f"{ITEMS_OPEN} and {ITEMS_CLOSE}, each tag on its own line, the items numbered like '1. title'.\n\n"
        "The history lists the user's choices in order, oldest first. Reason about it, then ask. Judge what comes "
        "back, refine the description, and ask again from another side: several good descriptions find more "
        "than one. When the items you have seen suffice, pool and rank them and give the "
        f"{answers} titles the user will most likely choose next, one per line and numbered. All reasoning and every "
        f"query stand inside {THINK_OPEN} and {THINK_CLOSE}; the final list stands after it, between {ANSWER_OPEN} and "
        f"{ANSWER_CLOSE}.\n\n"
        f"For example:\nUser:\n({history})\nAssistant:\n{THINK_OPEN}\n({reasoning})\n"
        f"{QUERY_OPEN}({query}){QUERY_CLOSE}\n\n{ITEMS_OPEN}\n({items})\n{ITEMS_CLOSE}\n\n"
        f"({reasoning})\n{THINK_CLOSE}\n{ANSWER_OPEN}\n({final})\n{ANSWER_CLOSE}\n\n"
    )


def parse_query(text: str) -> str | None:
    """The preference a segment ends with: None without an open tag, "" when it holds nothing but blanks and quotes."""
    if QUERY_OPEN not in text:
        return None
    body = text.rsplit(QUERY_OPEN, 1)[1].partition(QUERY_CLOSE)[0]  # the token that ends the tag may hold more text
    return " ".join(body.replace('"', "").split())


def parse_answer(text: str) -> list[str] | None:
    """Lines of the last answer block, None without a closed one. Blank lines inside it count as lines."""
    if ANSWER_OPEN not in text:
        return None
    body, closed, _ = text.rsplit(ANSWER_OPEN, 1)[1].partition(ANSWER_CLOSE)
    return body.strip().split("\n") if closed and body.strip() else None


def line_title(line: str) -> str:
    """The title on an answer line: everything after the first ". ", or the line itself."""
    return line.split(". ", 1)[1] if ". " in line else line


class RecommendEnv:
    """Batched environment over explicit states.

    catalogue: titles and categories. retrieve: one batched call of the recommender. results: items per call (20 in the
    paper). answers: length of the final list (10). max_calls: 8 in the paper. first_query_only: later calls are
    answered with the words of the first one; where a tool leaves out what it has shown, they are its next pages (a
    control: as many items, one question). Raises ValueError for sizes that the catalogue cannot serve.
    """

    stop = (QUERY_CLOSE,)

    def __init__(
        self, catalogue: Catalogue, retrieve: Retriever, *, results: int = 20, answers: int = 10, max_calls: int = 8,
        style: PromptStyle = PromptStyle(), stop_on_answer: bool = False, first_query_only: bool = False,
    ):  # fmt: skip
        for name, value in (("results", results), ("answers", answers)):
            if not 1 <= value <= len(catalogue):
                raise ValueError(f"{name}={value} must lie between 1 and the number of items ({len(catalogue)})")
        if max_calls < 1:
            raise ValueError(f"max_calls={max_calls} must be at least 1: without a call the protocol has no answer")
        self.catalogue, self.retrieve, self.style = catalogue, retrieve, style
        self.results, self.answers, self.max_calls = results, answers, max_calls
        self.first_query_only = first_query_only
        self.stop = (QUERY_CLOSE, ANSWER_CLOSE) if stop_on_answer else (QUERY_CLOSE,)
        self._preamble = instructions(results, answers) if style.instructions else ""
        self._result_lines = [self._item(i, style.result_categories) for i in range(len(catalogue) + 1)]

    def _item(self, item: int, categories: bool) -> str:
        title, text = self.catalogue.titles[item], self.catalogue.categories[item]
        if not (categories and text):
            return title
        return f"{title}\n  - categories: {text}" if self.style.instructions else f"{title} - {text}"

    def prompt(self, example: Example) -> str:
        """The prompt for one example; it opens the think tag, so generation starts inside it."""
        lines = []
        for number, item in enumerate(example.history[-self.style.max_history :], start=1):
            text = f"{number}. {self._item(item, self.style.history_categories)}"
            lines += [
                x if len(x) <= self.style.max_line else x[: self.style.max_line] + "..." for x in text.split("\n")
            ]
        return f"{self._preamble}User:\n" + "\n".join(lines) + f"\nAssistant:\n{THINK_OPEN}"

    def reset(self, examples: Sequence[Example], copies: int = 1) -> tuple[list[State], list[str]]:
        """Fresh states, ``copies`` adjacent ones per example, and one prompt per example."""
        for example in examples:
            self.catalogue.check(example)
        prompts = [self.prompt(example) for example in examples]
        states = [State(e, p) for e, p in zip(examples, prompts, strict=True) for _ in range(copies)]
        return states, prompts

    def observation(self, items: Sequence[int]) -> str:
        """A tool result as the policy reads it."""
        body = "\n".join(f"{n}. {self._result_lines[item]}" for n, item in enumerate(items, start=1))
        return f"\n\n{ITEMS_OPEN}\n{body}\n{ITEMS_CLOSE}\n\n"

    def step(self, states: Sequence[State], actions: Sequence[Action]) -> Step:
        """One segment of every running conversation; the recommender is called once for all that ask."""
        observations: list[str | None] = [None] * len(states)
        status = np.full(len(states), Status.FINISHED, np.int32)
        asking, words = [], []
        for i, (state, action) in enumerate(zip(states, actions, strict=True)):
            state.segments.append(("policy", action.text))
            query = parse_query(action.text) if action.stop == QUERY_CLOSE else None
            if action.stop == "length":
                status[i] = Status.TRUNCATED
            elif action.stop == QUERY_CLOSE and state.calls >= self.max_calls:
                status[i] = Status.TURN_LIMIT
            elif action.stop == QUERY_CLOSE and not query:
                status[i] = Status.INVALID
            elif query:
                asking.append(i)
                words.append(query)
        if asking:
            seen = [np.concatenate(states[i].retrieved or [np.zeros(0, np.int64)]) for i in asking]
            texts = [
                states[i].preferences[0] if self.first_query_only and states[i].preferences else own
                for i, own in zip(asking, words, strict=True)
            ]
            answered = self.retrieve([states[i].example for i in asking], texts, self.results, seen)
            for i, text, items in zip(asking, words, answered, strict=True):
                if not len(items):  # nothing found is a fault of the tool, not of the policy
                    status[i] = Status.ENV_ERROR
                    continue
                states[i].preferences.append(text)
                states[i].retrieved.append(np.asarray(items))
                observations[i] = self.observation(items)
                states[i].segments.append(("tool", observations[i]))
        for state, code in zip(states, status, strict=True):
            state.status = Status(int(code))
        return Step(list(states), observations, status)


def cjk(text: str) -> bool:
    """Whether text holds a character of U+4E00..U+9FFF."""
    return re.search("[\u4e00-\u9fff]", text) is not None
