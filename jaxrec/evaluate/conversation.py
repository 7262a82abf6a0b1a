"""Rank the items that a search over conversations came across, and judge the ranking (GRSU, arXiv 2504.20458).

Ranking reads a tree and asks nothing: an item's scores are those of the nodes that hold it, one for each. Every label
of an instance is a query with one relevant item; values are means over its labels, then over instances.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrec.data.dialogues import Instance
from jaxrec.evaluate.ranking import paired_interval, rank_values
from jaxrec.tools.conversation_search import Node, SearchConfig, Tree

STRATEGIES = ("mean", "sum", "vote", "raw")
NODES = ("all", "selected", "final")
KS = (1, 5, 10, 20, 50)
METRICS = ("recall", "ndcg", "mrr")

_MISS = np.iinfo(np.int32).max  # the rank of a label that was not found: a miss at every K


@dataclasses.dataclass(frozen=True)
class Ranking:
    """strategy: by the mean or the sum of an item's scores, by the number of nodes that hold it ("vote"), or the list
    of the node of the highest reward as it stands ("raw"). nodes: all of the tree, those that were kept ("selected"),
    or those that were kept of the last level ("final"). Raises ValueError for an unknown name."""

    strategy: str = "mean"
    nodes: str = "all"

    def __post_init__(self):
        for name, known in {"strategy": STRATEGIES, "nodes": NODES}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} of a ranking must be one of {', '.join(known)}")


# What each arm of arms() is ranked by.
ARM_RANKINGS: Mapping[str, Ranking] = {
    "full": Ranking("mean"), "crs_alone": Ranking("raw"), "resampled": Ranking("vote"), "best_of": Ranking("raw"),
    "beam_1": Ranking("mean"), "random_reward": Ranking("mean"),
}  # fmt: skip


def arms(config: SearchConfig) -> dict[str, SearchConfig]:
    """A search and what it is compared with. All but two ask for as many lists (``SearchConfig.lists``).

    full: the search itself. crs_alone: one list. resampled: as many first lists, never a critique. best_of: the first
    level alone, no critique. beam_1: one beam, expanded as often as all beams together. random_reward: beams are kept
    by chance. The arm of a user who was not tuned is ``full`` with that user.
    """
    one = dataclasses.replace(config, beams=1, init=config.first)
    return {
        "full": config,
        "crs_alone": dataclasses.replace(one, depth=1, init=1),
        "resampled": dataclasses.replace(config, feedback="none", extend_dialogue=False),
        "best_of": dataclasses.replace(one, depth=1),
        "beam_1": dataclasses.replace(one, expand=config.beams * config.expand),
        "random_reward": dataclasses.replace(config, reward="random", diversity=0.0),
    }


@dataclasses.dataclass(frozen=True)
class Pooled:
    """scores: of the nodes that hold an item, NaN where there is none. depth, position: of the first of them, and there
    in its list, from 0."""

    scores: tuple[float, ...]
    depth: int
    position: int


def pool(tree: Tree, nodes: str = "all") -> dict[int, Pooled]:
    """The different items of a tree's nodes (:class:`Ranking`), in whatever order the nodes are given."""
    scores: dict[int, list[float]] = collections.defaultdict(list)
    first: dict[int, tuple[int, int]] = {}
    for node in _nodes(tree, nodes):
        for position, (item, score) in enumerate(zip(node.items, node.scores)):
            scores[item].append(score)
            first.setdefault(item, (node.depth, position))
    return {item: Pooled(tuple(scores[item]), *first[item]) for item in scores}


def _nodes(tree: Tree, which: str) -> list[Node]:
    chosen = {"all": tree.nodes, "selected": [node for node in tree.nodes if node.kept], "final": tree.final}[which]
    return sorted(chosen, key=lambda node: (node.depth, node.path))


def rank(tree: Tree, titles: Sequence[str], ranking: Ranking = Ranking()) -> list[int]:
    """Items, best first. Equal ones are ordered by the number of nodes that hold them, then by the depth at which and
    the place of the list in which they came first, then by title. Items without a score come last, but in a vote.

    titles: of the catalogue's items, by number.
    """
    if ranking.strategy == "raw":
        return list(max(_nodes(tree, ranking.nodes), key=lambda node: node.reward).items)
    key = {"mean": _mean, "sum": _sum, "vote": len}[ranking.strategy]
    pooled = pool(tree, ranking.nodes)

    def order(item: int) -> tuple:
        found = pooled[item]
        return -key(found.scores), -len(found.scores), found.depth, found.position, titles[item]

    return sorted(pooled, key=order)


def _mean(scores: Sequence[float]) -> float:
    known = [score for score in scores if not math.isnan(score)]
    if not known:
        return -math.inf
    # Between the extremes, so that rounding never parts items whose scores are all the same number.
    return min(max(math.fsum(known) / len(known), min(known)), max(known))


def _sum(scores: Sequence[float]) -> float:
    known = [score for score in scores if not math.isnan(score)]
    return math.fsum(known) if known else -math.inf


def label_values(
    ranked: Sequence[int], labels: Sequence[int], ks: Sequence[int] = KS, released: bool = False
) -> dict[str, float]:
    """{"recall@10": ..., "ndcg@10": ..., "mrr@10": ...} for every K, means over labels; a label that is not ranked is a
    miss. released: NDCG and MRR at every K are those at the greatest, as the released code computes them.

    Raises ValueError for no label and for an item that is ranked twice.
    """
    if not labels:
        raise ValueError("an instance has no label; leave it out before it gets here")
    if len(set(ranked)) != len(ranked):
        raise ValueError(f"a ranking holds {len(ranked) - len(set(ranked))} items twice")
    place = {item: number for number, item in enumerate(ranked, 1)}
    ranks = np.array([place.get(label, _MISS) for label in labels])
    values = {}
    for k in ks:
        for name in METRICS:
            at = max(ks) if released and name != "recall" else k
            values[f"{name}@{k}"] = float(rank_values(ranks, f"{name}@{at}").mean())
    return values


@dataclasses.dataclass(frozen=True, eq=False)
class Judged:
    """ids: of instances. values: metric -> float64 [instances], in that order; "pool_recall" is the share of labels
    that are ranked anywhere. protocol: how it was measured."""

    ids: tuple[str, ...]
    values: dict[str, np.ndarray]
    protocol: dict[str, Any]


def judge(
    instances: Sequence[Instance], trees: Sequence[Tree], titles: Sequence[str], ranking: Ranking = Ranking(), *,
    ks: Sequence[int] = KS, released: bool = False,
) -> Judged:  # fmt: skip
    """Values of the ranking of each tree against the labels of its instance. Raises ValueError where trees are not
    those of the instances, one each and in their order, and without any instance."""
    ids = tuple(instance.dialogue.id for instance in instances)
    if not ids or [tree.dialogue for tree in trees] != list(ids):
        raise ValueError(f"{len(trees)} trees for {len(ids)} instances: one is needed for each, in their order")
    rows = []
    for instance, tree in zip(instances, trees):
        ranked = rank(tree, titles, ranking)
        found = sum(label in ranked for label in instance.labels) / len(instance.labels)
        rows.append({**label_values(ranked, instance.labels, ks, released), "pool_recall": found})
    values = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    protocol = {
        "instances": len(ids), "labels": sum(len(instance.labels) for instance in instances), "items": len(titles),
        "candidates": "items of the search's lists", "ranking": ranking.strategy, "nodes": ranking.nodes,
        "ndcg_mrr": "at the greatest K, as released" if released else "at K",
    }  # fmt: skip
    return Judged(ids, values, protocol)


def summarize(judged: Judged, trees: Sequence[Tree]) -> dict[str, Any]:
    """Means over instances, each with its 95 % bootstrap interval; what the searches cost, summed; levels that were
    wanted, and those with fewer lists than beams, by reason; the mean reward of kept nodes by depth; the mean number of
    different items."""
    means, intervals = {}, {}
    for name, values in judged.values.items():
        means[name], low, high = paired_interval(values, np.zeros_like(values))
        intervals[name] = [low, high]
    costs: collections.Counter[str] = collections.Counter()
    short: collections.Counter[str] = collections.Counter()
    rewards: dict[int, list[float]] = collections.defaultdict(list)
    for tree in trees:
        costs.update(dataclasses.asdict(tree.costs()))
        short.update(tree.short_levels())
        for node in tree.nodes:
            if node.kept:
                rewards[node.depth].append(node.reward)
    return {
        "protocol": judged.protocol, **means, "intervals": intervals, "costs": dict(costs),
        "short_levels": dict(short), "levels": sum(tree.config.depth for tree in trees),
        "kept_reward": {str(depth): math.fsum(values) / len(values) for depth, values in sorted(rewards.items())},
        "pool_size": costs["scored"] / len(trees),
    }  # fmt: skip


def compare(a: Judged, b: Judged, metric: str) -> tuple[float, float, float]:
    """(mean of a - b, low, high) over the same instances: paired 95 % bootstrap interval of one metric. Raises
    ValueError where the instances differ."""
    if sorted(a.ids) != sorted(b.ids):
        raise ValueError(f"only the same instances can be compared: {len(a.ids)} and {len(b.ids)} differ in their ids")
    other = dict(zip(b.ids, b.values[metric]))
    return paired_interval(a.values[metric], np.array([other[id] for id in a.ids]))
