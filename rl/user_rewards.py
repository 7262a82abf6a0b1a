"""Rewards of a recommender that talks with a simulated user (``rl.envs.user``): named functions over final states.

Each function maps final states to float32 [B] and looks at the lists alone. :class:`UserReward` adds them up and pays
only for conversations that came to their end: a policy that broke off after a good list would be paid for it otherwise.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from rl.envs.user import State
from rl.trajectory import Status

REDUCE = ("mean", "max")
LISTS = ("last", "any")


def _check(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")


def hit(states: Sequence[State], lists: str = "last") -> np.ndarray:
    """1 where a target is in the last list, or in any list; else 0."""
    _check("lists", lists, LISTS)
    out = np.zeros(len(states), np.float32)
    for i, state in enumerate(states):
        seen = state.shown if lists == "last" else state.past
        out[i] = not set(_target(state)).isdisjoint(seen)
    return out


def rank(states: Sequence[State]) -> np.ndarray:
    """1 / place of the best target in the last list, counted from 1; 0 where it holds none."""
    out = np.zeros(len(states), np.float32)
    for i, state in enumerate(states):
        target = set(_target(state))
        out[i] = next((1.0 / place for place, item in enumerate(state.shown, start=1) if item in target), 0.0)
    return out


def score(states: Sequence[State], reduce: str = "mean") -> np.ndarray:
    """Mean or largest score that the user gave an item of the last list: the generative reward model (arXiv 2504.20458,
    section 3). Items without a score are left out; 0 for no list, and for one without any score, which the environment
    marks ``ENV_ERROR``."""
    _check("reduce", reduce, REDUCE)
    out = np.zeros(len(states), np.float32)
    for i, state in enumerate(states):
        known = state.scores[-1][~np.isnan(state.scores[-1])] if state.scores else np.zeros(0)
        if len(known):
            out[i] = known.mean() if reduce == "mean" else known.max()
    return out


def distinct(states: Sequence[State]) -> np.ndarray:
    """Share of the items of revised lists, from the second on, that no earlier list showed; 1 where none was revised,
    0 without a list."""
    out = np.zeros(len(states), np.float32)
    for i, state in enumerate(states):
        seen, fresh, total = set(map(int, state.lists[0])) if state.lists else set(), 0, 0
        for items in state.lists[1:]:
            own = set(map(int, items))
            fresh, total = fresh + len(own - seen), total + len(own)
            seen |= own
        out[i] = (fresh / total if total else 1.0) if state.lists else 0.0
    return out


@dataclasses.dataclass(frozen=True)
class UserRewardConfig:
    """Weights of the parts, 0 to leave one out, and which lists and scores they look at. form: what a conversation
    costs that ended otherwise than it should (an unusable text, a limit). Raises ValueError."""

    hit: float = 1.0
    rank: float = 0.0
    score: float = 1.0
    distinct: float = 0.0
    form: float = 1.0
    hit_lists: str = "last"
    reduce: str = "mean"

    def __post_init__(self):
        _check("hit_lists", self.hit_lists, LISTS)
        _check("reduce", self.reduce, REDUCE)
        if self.form < 0:
            raise ValueError(f"form={self.form} is a cost and must not be negative")


class UserReward:
    """All parts for a batch of final states. config: see :class:`UserRewardConfig`."""

    def __init__(self, config: UserRewardConfig = UserRewardConfig()):
        self.config = config

    def __call__(self, states: Sequence[State]) -> dict[str, np.ndarray]:
        """{"form", "hit", "rank", "score", "distinct": float32 [B], already weighted; parts of weight 0 left out}; the
        reward is their sum. Rows whose environment failed (``Status.ENV_ERROR``) get 0 and belong out of the update.
        Raises ValueError for a conversation without target where a part needs one.
        """
        c = self.config
        status = np.array([s.status for s in states], np.int32)
        ended = status == Status.FINISHED
        parts = {"form": np.where(ended | (status == Status.ENV_ERROR), 0.0, -c.form)}
        if c.hit:
            parts["hit"] = c.hit * hit(states, c.hit_lists) * ended
        if c.rank:
            parts["rank"] = c.rank * rank(states) * ended
        if c.score:
            parts["score"] = c.score * score(states, c.reduce) * ended
        if c.distinct:
            parts["distinct"] = c.distinct * distinct(states) * ended
        return {name: np.asarray(values, np.float32) for name, values in parts.items()}


def user_counts(states: Sequence[State]) -> Mapping[str, float]:
    """Figures of final states for the log: mean rounds, distinct items, first and last score (of rows that have one),
    the share of lists the user took early, what the user failed at and how many items stayed without a score."""
    n = max(len(states), 1)
    scored = [s for s in states if s.scores]
    ends = [(s.scores[0], s.scores[-1]) for s in scored if not np.isnan(s.scores[-1]).all()]
    out = {
        "rounds": sum(s.rounds for s in states) / n,
        "distinct_items": sum(len(s.past) for s in states) / n,
        "accepted": sum(s.accepted for s in states) / n,
        "unscored_items": float(sum(np.isnan(x).sum() for s in scored for x in s.scores)),
    }
    if ends:
        out["score_first"], out["score_last"] = (float(np.mean([np.nanmean(x) for x in end])) for end in zip(*ends))
    out |= {f"failed_{part}": float(sum(s.failure == part for s in states)) for part in ("lists", "score", "critique")}
    return out | {f"status/{kind.name.lower()}": sum(s.status == kind for s in states) / n for kind in Status}


def _target(state: State) -> tuple[int, ...]:
    if not state.example.target:
        raise ValueError(f"example {state.example.index} has no target, so it can be neither hit nor ranked")
    return state.example.target
