"""A conversation with a simulated user: a language model recommends, is scored and criticised, and recommends anew.

The user of GRSU (arXiv 2504.20458) as an environment: the state is the recommended list, the transition the next list
that follows the critique, the reward what the user thinks of the items. What a policy segment means is left to a
callable: titles, or a query that a retriever answers. No callable is shown what was really recommended next; rewards
(``rl.user_rewards``) read it from the final states.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rl.envs.base import Action, Step
from rl.envs.tags import neutralize
from rl.trajectory import Status


@dataclasses.dataclass(frozen=True)
class Talk:
    """A dialogue to recommend from. index: the sample's id. target: items that were really recommended next; hidden
    from the policy and the user, so what the callables of the environment get has an empty one."""

    index: int
    dialogue: Any
    target: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class ListRequest:
    """A list is wanted for what the policy wrote. text: without the stop string. shown, critique: the latest list and
    what the user says of it, empty in the first round. past: items of all lists so far. seed: the same for all copies
    of an example in one round."""

    talk: Talk
    text: str
    shown: tuple[int, ...]
    critique: str
    past: tuple[int, ...]
    seed: int


# One item list per request, best first: k different items; None where the text cannot be used; an empty one where the
# tool that should have found them failed.
Lists = Callable[[Sequence[ListRequest]], Sequence[Sequence[int] | None]]
# (talks, lists) -> for each float [k] in [0, 1], how likely each item is accepted; NaN where there is no score.
Score = Callable[[Sequence[Talk], Sequence[Sequence[int]]], Sequence[np.ndarray]]
# (talks, lists, seeds) -> one critique for each in the user's voice; "" where there is none.
Criticise = Callable[[Sequence[Talk], Sequence[Sequence[int]], Sequence[int]], Sequence[str]]


@dataclasses.dataclass
class State:
    """One conversation. segments: (author, text) with author "policy" or "tool" (lists and critiques).

    lists: int64 [k] per round; scores: float64 [k] per list, NaN where an item has none; critiques: as the policy read
    them, one fewer than lists unless the user failed. accepted: the user was content early. failure: what part of the
    environment failed ("lists", "score", "critique"), "" for none. While a critique waits to be read the status is
    TRUNCATED, since that is why a rollout would end the row here.
    """

    example: Talk
    prompt: str
    segments: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    lists: list[np.ndarray] = dataclasses.field(default_factory=list)
    scores: list[np.ndarray] = dataclasses.field(default_factory=list)
    critiques: list[str] = dataclasses.field(default_factory=list)
    accepted: bool = False
    failure: str = ""
    status: Status = Status.TRUNCATED

    @property
    def rounds(self) -> int:
        return len(self.lists)

    @property
    def past(self) -> tuple[int, ...]:
        """Items of all lists, each once, in order."""
        return tuple(dict.fromkeys(int(item) for items in self.lists for item in items))

    @property
    def shown(self) -> tuple[int, ...]:
        """The latest list."""
        return tuple(map(int, self.lists[-1])) if self.lists else ()

    @property
    def critique(self) -> str:
        """The latest critique, "" in the first round."""
        return self.critiques[-1] if self.critiques else ""

    @property
    def policy_text(self) -> str:
        return "".join(text for author, text in self.segments if author == "policy")

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.segments)


def accepts(threshold: float) -> Callable[[np.ndarray], bool]:
    """A ``stop_when``: the user takes the first list with an item scored at ``threshold`` or more."""
    if not 0 < threshold <= 1:
        raise ValueError(f"the threshold of acceptance must lie in (0, 1], not {threshold}")
    return lambda scores: bool((scores >= threshold).any())  # NaN is never


class UserEnv:
    """Batched environment over explicit states: a step calls ``lists``, ``score`` and ``criticise`` once each.

    prompt: talk -> what the policy reads first. show: (items, critique) -> what it reads next. k: items of a list.
    rounds: lists of a conversation; after the last one nobody criticises. stop: strings that end what the policy
    writes (a line break for a policy that writes queries); the end of text does so too. stop_when: the scores of a
    list -> whether the user is content and the conversation ends. reserved: strings that a critique may not hold, such
    as the tokenizer's special tokens and the labels of the prompt; stop strings of two visible characters are always
    broken up, and critiques are one line. seed: of lists and critiques; all copies of an example draw alike, so that
    their rewards differ by what they wrote. Raises ValueError for counts below 1.
    """

    def __init__(
        self, prompt: Callable[[Talk], str], lists: Lists, score: Score, criticise: Criticise,
        show: Callable[[Sequence[int], str], str], *, k: int = 10, rounds: int = 3, stop: Sequence[str] = ("\n",),
        stop_when: Callable[[np.ndarray], bool] | None = None, reserved: Sequence[str] = (), seed: int = 0,
    ):  # fmt: skip
        for name, value in (("k", k), ("rounds", rounds)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if isinstance(stop, str):
            raise ValueError(f"stop must be a sequence of strings, not one string: write ({stop!r},)")
        self.prompt, self.lists, self.score, self.criticise, self.show = prompt, lists, score, criticise, show
        self.k, self.rounds, self.stop, self.stop_when, self.seed = k, rounds, tuple(stop), stop_when, seed
        self._control = (*(s for s in self.stop if len(s.strip()) > 1), *reserved)
        neutralize("", self._control)  # what cannot be broken up is an error now

    def reset(self, examples: Sequence[Talk], copies: int = 1) -> tuple[list[State], list[str]]:
        """Fresh states, ``copies`` adjacent ones per example, and one prompt per example."""
        prompts = [self.prompt(_hidden(example)) for example in examples]
        states = [State(e, p) for e, p in zip(examples, prompts, strict=True) for _ in range(copies)]
        return states, prompts

    def step(self, states: Sequence[State], actions: Sequence[Action]) -> Step:
        """One list of every running conversation, what the user thinks of it, and why those end that do.

        Raises ValueError for a callable that answers out of shape.
        """
        for state, action in zip(states, actions, strict=True):
            state.segments.append(("policy", action.text))
            state.status = Status.TRUNCATED
        whole = [
            (s, self._said(a)) for s, a in zip(states, actions, strict=True) if a.stop in (*self.stop, "eos")
        ]  # fmt: skip
        listed = self._list(whole)
        going = self._score(listed)
        observations = self._criticise(going)
        return Step(
            list(states), [observations.get(id(s)) for s in states], np.array([s.status for s in states], np.int32)
        )

    def _said(self, action: Action) -> str:
        return action.text.partition(action.stop)[0] if action.stop in self.stop else action.text

    def _seed(self, state: State) -> int:
        """Of this round: [0, 2**31), the same for all copies of an example."""
        return int(np.random.SeedSequence([self.seed, state.example.index, state.rounds]).generate_state(1)[0] >> 1)

    def _list(self, whole: Sequence[tuple[State, str]]) -> list[State]:
        """Rows that have got a new list; the others have ended."""
        if not whole:
            return []
        requests = [
            ListRequest(_hidden(s.example), text, s.shown, s.critique, s.past, self._seed(s)) for s, text in whole
        ]  # fmt: skip
        answers = _one_each("lists", self.lists(requests), len(whole))
        listed = []
        for (state, _), items in zip(whole, answers, strict=True):
            if items is None:
                state.status = Status.INVALID
            elif not len(items):  # nothing found is a fault of the tool, not of the policy
                _fail(state, "lists")
            else:
                array = np.asarray(items, np.int64)
                if array.shape != (self.k,) or len(np.unique(array)) != self.k:
                    raise ValueError(
                        f"lists gave {array.tolist()} for example {state.example.index}; {self.k} different items are "
                        "needed, None for a text that cannot be used, or an empty list where a tool failed"
                    )
                state.lists.append(array)
                listed.append(state)
        return listed

    def _score(self, listed: Sequence[State]) -> list[State]:
        """Have the new lists scored; returns the rows that go on to another round."""
        if not listed:
            return []
        talks = [_hidden(s.example) for s in listed]
        answers = _one_each("score", self.score(talks, [s.shown for s in listed]), len(listed))
        going = []
        for state, scores in zip(listed, answers, strict=True):
            scores = np.asarray(scores, np.float64)
            known = scores[~np.isnan(scores)]
            if scores.shape != (self.k,) or ((known < 0) | (known > 1)).any():
                raise ValueError(
                    f"score gave {scores.tolist()} for the list of example {state.example.index}; {self.k} numbers in "
                    "[0, 1] are needed, NaN where an item has none"
                )
            state.scores.append(scores)
            if not len(known):
                _fail(state, "score")
            elif self.stop_when is not None and self.stop_when(scores):
                state.accepted, state.status = True, Status.FINISHED
            elif state.rounds >= self.rounds:
                state.status = Status.FINISHED
            else:
                going.append(state)
        return going

    def _criticise(self, going: Sequence[State]) -> dict[int, str]:
        """What the rows that go on read next, by the state's identity."""
        if not going:
            return {}
        talks, shown = [_hidden(s.example) for s in going], [s.shown for s in going]
        answers = _one_each("criticise", self.criticise(talks, shown, [self._seed(s) for s in going]), len(going))
        observations = {}
        for state, critique in zip(going, answers, strict=True):
            critique = neutralize(" ".join(critique.split()), self._control)
            if not critique:
                _fail(state, "critique")
                continue
            state.critiques.append(critique)
            observations[id(state)] = self.show(state.shown, critique)
            state.segments.append(("tool", observations[id(state)]))
        return observations


def _hidden(talk: Talk) -> Talk:
    return dataclasses.replace(talk, target=())


def _fail(state: State, part: str) -> None:
    state.failure, state.status = part, Status.ENV_ERROR


def _one_each(name: str, answers: Sequence, wanted: int) -> Sequence:
    if len(answers) != wanted:
        raise ValueError(f"{name} gave {len(answers)} answers for {wanted} conversations; one for each is needed")
    return answers
