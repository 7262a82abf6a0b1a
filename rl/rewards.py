"""Rewards of DeepRec as named functions (arXiv 2505.16810, section 3; constants from the released configuration).

Each function maps final states to float32 [B]; a table of weights says which ones a stage adds up. They read policy
text and tool text by provenance, so a tag the policy types itself is never taken for a tool's.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from rl.envs.recommend import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    ITEMS_CLOSE,
    ITEMS_OPEN,
    PLACEHOLDERS,
    QUERY_CLOSE,
    QUERY_OPEN,
    THINK_CLOSE,
    THINK_OPEN,
    Catalogue,
    State,
    cjk,
    line_title,
    normalise_title,
    parse_answer,
)  # fmt: skip

# Without their brackets: a half-written tag in the list is no title either.
_TAG_NAMES = tuple(tag.strip("<|>") for tag in (QUERY_OPEN, QUERY_CLOSE, ITEMS_OPEN, ITEMS_CLOSE))
STAGES = {"cold": ("format", "invocation", "diversity"), "rec": ("format", "hit", "rank", "point")}


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Constants of the released reward; ``answers`` is K. The flags are ours and off by default.

    gate_process: pay invocation and diversity only for well-formed output (released: always).
    distinct: also require K different titles. match: "exact" compares normalised titles with the catalogue,
    "substring" looks for the target's title in the line, as released.
    """

    answers: int = 10
    max_counted_calls: int = 3
    per_call: float = 0.5
    diversity_scale: float = 0.2
    hit: float = 1.0
    rank: float = 0.2
    point: float = 10.0
    gate_process: bool = False
    distinct: bool = False
    match: str = "exact"

    def __post_init__(self):
        if self.match not in ("exact", "substring"):
            raise ValueError(f"match must be 'exact' or 'substring', not {self.match!r}")


def broken_rules(state: State, answers: int, distinct: bool = False) -> list[str]:
    """Names of the format rules a conversation breaks (the ten of the released reward), empty when well formed."""
    whole, policy = state.text.strip(), state.policy_text
    tool = "".join(text for author, text in state.segments if author == "tool")
    outside = whole.rsplit(THINK_CLOSE, 1)
    counts = [
        whole.count(tag)
        for tag in (
            QUERY_OPEN, QUERY_CLOSE, ITEMS_OPEN, ITEMS_OPEN + "\n", ITEMS_OPEN + "\n1.", ITEMS_CLOSE,
            ITEMS_CLOSE + "\n",
        )
    ]  # fmt: skip
    lines = parse_answer(whole) or []
    answer = whole.rsplit(ANSWER_OPEN, 1)[-1].partition(ANSWER_CLOSE)[0]
    last_result = whole.rfind(ITEMS_CLOSE)
    between, thought, _ = whole[last_result + len(ITEMS_CLOSE) :].partition(THINK_CLOSE)
    rules = {
        # A list tag the policy typed makes the counts differ from the calls really made.
        "tag_counts": len(set(counts)) == 1 and tool.count(ITEMS_OPEN) == whole.count(ITEMS_OPEN) == state.calls,
        "calls": state.calls >= 1,
        "role_word": "Assistant" not in policy and "assistant" not in policy,
        "placeholder": not any(snippet in policy for snippet in PLACEHOLDERS),
        "think": whole.count(THINK_OPEN) == 0 and whole.count(THINK_CLOSE) == 1,
        "answer_tags": whole.count(ANSWER_OPEN) == 1
        and whole.count(ANSWER_CLOSE) == 1
        and ANSWER_OPEN in outside[-1]
        and ANSWER_CLOSE in outside[-1],
        "reason_on_last": last_result >= 0 and bool(thought) and bool(between.strip()),
        "tags_in_answer": not any(name in answer for name in _TAG_NAMES),
        "answer_lines": len(lines) == answers,
        "cjk": not cjk(policy),
    }
    if distinct:
        rules["distinct"] = len({normalise_title(line_title(x)) for x in lines}) == len(lines)
    return [name for name, holds in rules.items() if not holds]


def invocation(calls: np.ndarray, most: int = 3, per_call: float = 0.5) -> np.ndarray:
    """0 up to one call, then (min(c, most) - 1) * per_call."""
    calls = np.asarray(calls)
    return np.where(calls <= 1, 0.0, (np.minimum(calls, most) - 1) * per_call).astype(np.float32)


def diversity(vectors: np.ndarray, scale: float = 0.2) -> float:
    """scale * (1 - mean cosine over pairs) of unit query vectors [c, D]; 0 for fewer than two."""
    c = len(vectors)
    if c < 2:
        return 0.0
    cosine = vectors @ vectors.T
    mean = (cosine.sum() - np.trace(cosine)) / (c * (c - 1))
    return float(scale * (1.0 - mean))


def point(similarity: np.ndarray, scale: float = 10.0) -> float:
    """scale * sum(w sim) / sum(w) with w_j = (1 - j/n)^2 over the n answer lines."""
    n = len(similarity)
    if n == 0:
        return 0.0
    weight = (1.0 - np.arange(n) / n) ** 2
    return float(scale * (weight * similarity).sum() / weight.sum())


def hit_index(lines: Sequence[str], target: int, catalogue: Catalogue, match: str = "exact") -> int:
    """0-based line that first names the target, -1 if none."""
    for i, line in enumerate(lines):
        if match == "substring":
            if catalogue.titles[target] in line_title(line):  # the number of a line is no title: "9" is a film
                return i
        elif catalogue.find(line_title(line)) == target:
            return i
    return -1


class DeepRecReward:
    """All parts of both stages for a batch of final states.

    embed: preference texts -> unit vectors [n, D], the recommender's own query encoder. text_vectors [N+1, D] and
    item_vectors [N+1, d]: unit rows of item text and of the recommender's item table, row 0 zero.
    weights: per part, to leave one out (0). Raises ValueError for a stage that does not exist.
    """

    def __init__(
        self, catalogue: Catalogue, embed: Callable[[Sequence[str]], np.ndarray], text_vectors: np.ndarray,
        item_vectors: np.ndarray, config: RewardConfig = RewardConfig(), weights: dict[str, float] | None = None,
    ):  # fmt: skip
        rows = len(catalogue) + 1
        for name, table in (("text_vectors", text_vectors), ("item_vectors", item_vectors)):
            if len(table) != rows:
                raise ValueError(f"{name} has {table.shape} but the catalogue needs {rows} rows (PAD included)")
        unknown = set(weights or ()) - {part for parts in STAGES.values() for part in parts}
        if unknown:
            raise ValueError(f"unknown reward parts {sorted(unknown)}; known: {', '.join(sum(STAGES.values(), ()))}")
        self.catalogue, self.embed, self.config = catalogue, embed, config
        self.text, self.items, self.weights = np.array(text_vectors), np.array(item_vectors), dict(weights or {})
        self.text[0] = self.items[0] = 0.0  # an unknown title is similar to nothing

    def __call__(self, states: Sequence[State], stage: str) -> dict[str, np.ndarray]:
        """{part: float32 [B]} of one stage, ``total`` (their weighted sum) among them.

        Raises ValueError for an unknown stage, FloatingPointError naming the example when a part is not finite.
        """
        if stage not in STAGES:
            raise ValueError(f"unknown stage {stage!r}; stages: {', '.join(STAGES)}")
        c = self.config
        well = np.array([not broken_rules(s, c.answers, c.distinct) for s in states], bool)
        parts = {"format": np.where(well, 0.0, -1.0).astype(np.float32)}
        if stage == "cold":
            paid = well if c.gate_process else np.ones_like(well)
            parts["invocation"] = invocation([s.calls for s in states], c.max_counted_calls, c.per_call) * paid
            parts["diversity"] = self._diversity(states) * paid
        else:
            parts |= self._outcome(states, well)
        for name, value in parts.items():
            if not np.isfinite(value).all():
                bad = states[int(np.flatnonzero(~np.isfinite(value))[0])].example.index
                raise FloatingPointError(
                    f"reward part {name!r} of example {bad} is not finite: look at the recommender's vectors"
                )
        total = sum(self.weights.get(name, 1.0) * value for name, value in parts.items())
        return {**{k: np.asarray(v, np.float32) for k, v in parts.items()}, "total": np.asarray(total, np.float32)}

    def _diversity(self, states: Sequence[State]) -> np.ndarray:
        counts = [len(s.preferences) for s in states]
        texts = [p for s in states for p in s.preferences]
        if not texts:
            return np.zeros(len(states), np.float32)
        pieces = np.split(np.asarray(self.embed(texts)), np.cumsum(counts)[:-1])
        return np.array([diversity(v, self.config.diversity_scale) for v in pieces], np.float32)

    def _outcome(self, states: Sequence[State], well: np.ndarray) -> dict[str, np.ndarray]:
        c = self.config
        hit, rank, points = (np.zeros(len(states), np.float32) for _ in range(3))
        for i in np.flatnonzero(well):
            state = states[i]
            lines = parse_answer(state.text)[: c.answers]
            at = hit_index(lines, state.example.target, self.catalogue, c.match)
            if at >= 0:
                hit[i], rank[i] = c.hit, c.rank * (c.answers - at)
            ids = np.array([self.catalogue.find(line_title(line)) for line in lines])
            target = state.example.target
            similarity = 0.5 * (self.text[ids] @ self.text[target] + self.items[ids] @ self.items[target])
            points[i] = point(similarity, c.point)
        return {"hit": hit, "rank": rank, "point": points}
