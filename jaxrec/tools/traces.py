"""Cold-start traces: conversations a heuristic writes, so that a model without pre-training learns the protocol.

The writer is blind to how the data came about. It uses what every baseline also trains on: a training prefix, the item
that followed it, and catalogue texts. A query names words of the item that followed (hindsight, as the preference texts
the recommender itself is trained with) or words of recent history items; the final list merges the calls in one of
several plain ways. Which of these work is left for reinforcement learning to find out.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rl.envs.recommend import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    OPEN_QUERY,
    QUERY_CLOSE,
    QUERY_OPEN,
    THINK_CLOSE,
    Example,
    RecommendEnv,
)  # fmt: skip
from rl.rows import encode_rows

MERGES = ("newest", "halves", "interleave", "fused")


@dataclasses.dataclass(frozen=True)
class TraceConfig:
    """count: traces. calls: probability of 1, 2, ... calls. words: probability of 1, 2, ... words in a query, in the
    catalogue's order; a later call takes words that the earlier ones left. hindsight: share of queries with words of
    the item that followed; the others describe one of the ``recent`` last history items, another one at each call.
    open: share of queries that name nothing (``OPEN_QUERY``) and leave the choice to the recommender, so that a policy
    can find out where words help. merges: ways to make the final list, drawn from for each trace; one way is learned
    soonest, several leave more to explore. All ours: the paper needs no cold start, since its model is pretrained."""

    count: int = 6000
    calls: tuple[float, ...] = (0.25, 0.5, 0.25)
    words: tuple[float, ...] = (0.2, 0.5, 0.3)
    hindsight: float = 0.5
    recent: int = 3
    open: float = 0.0
    merges: tuple[str, ...] = ("newest",)


@dataclasses.dataclass(frozen=True)
class Trace:
    """A prompt and what followed: (author, text) with author "policy" or "tool"."""

    prompt: str
    segments: tuple[tuple[str, str], ...]


def merge(calls: Sequence[np.ndarray], how: str, length: int) -> list[int]:
    """One list of different items from several results.

    newest: the newest call first. halves: the better part of each call, in equal shares that fill the list together,
    in the order of the calls. interleave: calls in turn, newest first. fused: by summed reciprocal rank.
    """
    if how == "newest":
        order = [item for call in reversed(calls) for item in call]
    elif how == "halves":
        shares = [(length + len(calls) - 1 - i) // len(calls) for i in range(len(calls))]
        order = [item for call, share in zip(calls, shares, strict=True) for item in call[:share]]
        order += [item for call, share in zip(calls, shares, strict=True) for item in call[share:]]
    elif how == "interleave":
        order = [item for row in zip(*reversed(calls), strict=True) for item in row]
    elif how == "fused":
        score: dict[int, float] = {}
        for call in calls:
            for rank, item in enumerate(call):
                score[item] = score.get(item, 0.0) + 1.0 / (rank + 10)
        order = sorted(score, key=lambda item: -score[item])
    else:
        raise ValueError(f"unknown merge {how!r}; known: {', '.join(MERGES)}")
    return list(dict.fromkeys(int(i) for i in order))[:length]


def query_text(words: Sequence[str]) -> str:
    return QUERY_OPEN + " " + "; ".join(words) + QUERY_CLOSE


def answer_text(env: RecommendEnv, items: Sequence[int]) -> str:
    lines = "\n".join(f"{n}. {env.catalogue.titles[i]}" for n, i in enumerate(items, start=1))
    return f"Rank{THINK_CLOSE}\n{ANSWER_OPEN}\n{lines}\n{ANSWER_CLOSE}"


def write_traces(
    env: RecommendEnv, examples: Sequence[Example], phrases: Sequence[Sequence[str]], config: TraceConfig, seed: int,
    fill: Sequence[int] = (),
) -> list[Trace]:  # fmt: skip
    """``config.count`` traces over training examples (drawn with replacement if there are fewer).

    phrases: per item id the words that describe it. The recommender is called once per turn for all traces, through
    ``env`` as the policy's own queries are, so traces and rollouts look alike. fill: item ids, best first (the most
    chosen ones), that complete a list for which the calls returned too few. Raises ValueError for an unknown way of
    merging, and when calls and ``fill`` may be too few for the final list.
    """
    for way in config.merges:
        if way not in MERGES:
            raise ValueError(f"unknown merge {way!r}; known: {', '.join(MERGES)}")
    if env.results < env.answers and len(fill) < env.answers:
        raise ValueError(
            f"env.results={env.results} is less than env.answers={env.answers}, so a trace with one call cannot "
            f"complete its list: pass at least {env.answers} items as fill, not {len(fill)}"
        )
    rng = np.random.Generator(np.random.PCG64(seed))
    picks = rng.choice(len(examples), config.count, replace=config.count > len(examples))
    chosen = [examples[i] for i in picks]
    calls = 1 + rng.choice(len(config.calls), config.count, p=np.array(config.calls) / sum(config.calls))
    calls = np.minimum(calls, env.max_calls)
    sizes = 1 + rng.choice(len(config.words), (config.count, calls.max()), p=np.array(config.words) / sum(config.words))
    hindsight = rng.random((config.count, calls.max())) < config.hindsight
    shift = rng.integers(0, config.recent, config.count)
    # Drawn only when asked for, so that other traces stay as they are.
    open_query = rng.random(hindsight.shape) < config.open if config.open else np.zeros(hindsight.shape, bool)

    def query(example: Example, n: int, knows: bool, turn: int, shift: int, said: set[str]) -> list[str]:
        recent = example.history[-config.recent :]
        words = phrases[example.target if knows else recent[(turn + shift) % len(recent)]]
        stock = [word for word in words if word not in said] or words  # a later call asks for something else
        return [stock[i] for i in np.sort(rng.permutation(len(stock))[:n])] or [OPEN_QUERY]

    states, _ = env.reset(chosen, 1)
    segments: list[list[tuple[str, str]]] = [[] for _ in chosen]
    results: list[list[np.ndarray]] = [[] for _ in chosen]
    asked: list[set[str]] = [set() for _ in chosen]
    for turn in range(calls.max()):
        rows = np.flatnonzero(calls > turn)
        words = [
            [OPEN_QUERY]
            if open_query[i, turn]
            else query(chosen[i], sizes[i, turn], hindsight[i, turn], turn, shift[i], asked[i])
            for i in rows
        ]
        for i, said in zip(rows, words, strict=True):
            asked[i].update(said)
        texts = ["; ".join(w) for w in words]
        seen = [np.concatenate(results[i]) if results[i] else np.zeros(0, np.int64) for i in rows]
        found = env.retrieve([chosen[i] for i in rows], texts, env.results, seen)
        for i, said, items in zip(rows, words, found, strict=True):
            lead = "\n" if turn == 0 else "Next"
            segments[i] += [("policy", lead + query_text(said)), ("tool", env.observation(items))]
            results[i].append(np.asarray(items))
    ways = rng.choice(len(config.merges), config.count)
    for i, way in enumerate(ways):
        items = merge(results[i], config.merges[way], env.answers)
        items += [item for item in fill if item not in items][: env.answers - len(items)]
        segments[i].append(("policy", answer_text(env, items)))
    return [Trace(state.prompt, tuple(parts)) for state, parts in zip(states, segments, strict=True)]


def encode_traces(traces: Sequence[Trace], tokenizer, eos_id: int, max_len: int) -> tuple[dict[str, np.ndarray], int]:
    """Arrays for supervised training (``rl.rows.encode_rows``): True in the mask on policy tokens and the closing EOS;
    and how many traces were longer than ``max_len`` and are left out."""
    return encode_rows([(trace.prompt, trace.segments) for trace in traces], tokenizer, eos_id, max_len)
