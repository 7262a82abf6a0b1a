"""Judge an agent that recommends by conversation: greedy play, then ranking metrics over all users.

A conversation without a usable answer is a miss and stays in the denominator. Only answer lines that start with a digit
count, a title counts where it first stands, and an unknown title keeps its place.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxrec.evaluate.ranking import list_metrics, list_values
from models.sharding import use_mesh
from rl.envs.recommend import Catalogue, RecommendEnv, State, line_title, parse_answer
from rl.rewards import broken_rules
from rl.rollout import RolloutConfig, rollout
from rl.trajectory import Status


@dataclasses.dataclass(frozen=True, eq=False)
class Judged:
    """lists int32 [n, K], 0 = unknown title, repeated title or missing line; valid bool [n]: no format rule broken;
    calls int [n]; in_pool bool [n]: the target was among the retrieved items; status int [n]."""

    lists: np.ndarray
    targets: np.ndarray
    valid: np.ndarray
    calls: np.ndarray
    in_pool: np.ndarray
    status: np.ndarray
    states: list[State]

    def values(self, metric: str) -> np.ndarray:
        """One value per user, float64 [n], e.g. of "recall@10"."""
        return list_values(self.lists, self.targets, metric)

    def row(self, kinds: np.ndarray | None = None, intent: int = 1) -> dict[str, float]:
        """Figures for a result table; with ``kinds`` [n] also recall@10 on intent events and on the others."""
        hit = self.values("recall@10") > 0
        row = list_metrics(self.lists, self.targets, (1, 5, 10), ("recall", "ndcg"))
        row.pop("ndcg@1")
        row |= {
            "valid_format": float(self.valid.mean()),
            "turns": float(self.calls.mean()),
            "pool_recall": float(self.in_pool.mean()),
            "hits_in_pool": float(self.in_pool[hit].mean()) if hit.any() else 0.0,
            "distinct_retrieved": float(np.mean([len(_union(s)) for s in self.states])),
            "users": len(hit),
        }
        for status in Status:
            if (count := int((self.status == status).sum())) and status != Status.FINISHED:
                row[f"ended_{status.name.lower()}"] = count
        if kinds is not None and (kinds == intent).any() and (kinds != intent).any():
            row["recall@10_intent"] = float(hit[kinds == intent].mean())
            row["recall@10_other"] = float(hit[kinds != intent].mean())
        return row


def _union(state: State) -> set[int]:
    return {int(item) for call in state.retrieved for item in call}


def answer_ids(state: State, catalogue: Catalogue, answers: int) -> np.ndarray:
    """The answered items int32 [K]: 0 where a line is missing, names no item, or repeats one."""
    ids = np.zeros(answers, np.int32)
    lines = [line for line in parse_answer(state.text) or [] if line[:1].isdigit()]
    found = [catalogue.find(line_title(line)) for line in lines[:answers]]
    ids[: len(found)] = found
    _, first = np.unique(ids, return_index=True)
    again = np.ones(answers, bool)
    again[first] = False
    return np.where(again, 0, ids)


def judge(states: Sequence[State], catalogue: Catalogue, answers: int) -> Judged:
    """Read final states."""
    return Judged(
        lists=np.stack([answer_ids(s, catalogue, answers) for s in states]),
        targets=np.array([s.example.target for s in states], np.int32),
        valid=np.array([not broken_rules(s, answers) for s in states]),
        calls=np.array([s.calls for s in states]),
        in_pool=np.array([s.example.target in _union(s) for s in states]),
        status=np.array([s.status for s in states]),
        states=list(states),
    )


def play(
    params: Any,
    config: Any,
    tokenizer: Any,
    env: RecommendEnv,
    examples: Sequence[Any],
    options: RolloutConfig,
    *,
    batch_size: int,
    seed: int = 0,
    mesh: jax.sharding.Mesh | None = None,
    progress: Callable[[int], None] | None = None,
) -> Judged:
    """Play every example once with ``options`` (temperature 0 for the protocol's greedy figures) and judge the end.

    The last batch is filled up with copies, so that one program serves all; the copies are not counted.
    mesh: where ``params`` lie. ``progress(n)`` is called after each batch with the examples done.
    """
    states: list[State] = []
    key = jax.random.key(seed)
    for low in range(0, len(examples), batch_size):
        part = list(examples[low : low + batch_size])
        filled = part + [part[-1]] * (batch_size - len(part))
        with use_mesh(mesh):
            _, ended = rollout(
                params, config, tokenizer, env, filled, jax.random.fold_in(key, low), options, fuse=mesh is None
            )
        states += ended[: len(part)]
        if progress is not None:
            progress(len(states))
    return judge(states, env.catalogue, env.answers)


def readable(judged: Judged, rows: Sequence[int], catalogue: Catalogue, stage: str, step: int) -> list[dict]:
    """Records for trajectories.jsonl."""
    out = []
    for i in rows:
        state = judged.states[i]
        target = state.example.target
        rank = np.flatnonzero(judged.lists[i] == target)
        segments = [{"by": "prompt", "text": state.prompt}]
        segments += [{"by": author, "text": text} for author, text in state.segments]
        out.append(
            {
                "stage": stage,
                "step": step,
                "example": state.example.index,
                "target": catalogue.titles[target],
                "history": [catalogue.titles[h] for h in state.example.history],
                "segments": segments,
                "reward": {},
                "hit_rank": int(rank[0]) + 1 if len(rank) else None,
            }
        )
    return out
