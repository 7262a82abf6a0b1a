"""Judge GRSU (arXiv 2504.20458): rankings of what searches found, the simulated user, trained recommenders.

Every search is judged over the same dialogues, so differences are paired. All rankings read finished trees; nothing is
asked again but the simulated user about labels and other items, for its AUC.
"""

import collections
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrec.config import write_atomic
from jaxrec.data.dialogues import Instance, spoken
from jaxrec.evaluate.conversation import ARM_RANKINGS, KS, Judged, Ranking, judge, rank, summarize
from jaxrec.evaluate.figures import lines
from jaxrec.evaluate.ranking import paired_interval
from jaxrec.tools.conversation import Counts, User, total_counts
from jaxrec.tools.conversation_search import Tree, replay

STRATEGIES = ("mean", "sum", "vote")
ARMS = {
    "crs_alone": "recommender alone, one list", "resampled": "as many lists, no critique",
    "best_of": "best of the first lists", "beam_1": "one beam", "random_reward": "beams kept by chance",
    "untuned": "simulated user before training",
}  # fmt: skip
FULL = "GRSU"
POLICIES = {"cold_start": "query writer, supervised", "rl": "query writer, RL on the user"}
_NEGATIVES = 8  # items that a label is compared with for the AUC, of each kind


@dataclasses.dataclass(frozen=True, eq=False)
class SeedResult:
    """judged: search -> ranking's strategy -> values. summary: search -> costs and rewards. depth: level -> values of
    the search cut there. auc: user -> float64 [instances], how often a label is scored above another item. policies:
    name -> metric -> float64 [instances]. samples: of the report. counts: stage -> what recommenders and the simulated
    user counted in it."""

    judged: Mapping[str, Mapping[str, Judged]]
    summary: Mapping[str, Mapping[str, Any]]
    depth: Mapping[int, Judged]
    auc: Mapping[str, np.ndarray]
    policies: Mapping[str, Mapping[str, np.ndarray]]
    samples: Sequence[Mapping[str, Any]]
    counts: Mapping[str, Counts] = dataclasses.field(default_factory=dict)


def evaluate_seed(
    this: Any, trees: Mapping[str, Sequence[Tree]], users: Mapping[str, User],
    policies: Mapping[str, tuple[Mapping[str, np.ndarray], Sequence[Any]]],
) -> SeedResult:  # fmt: skip
    """All that is measured of one seed; values of every dialogue are kept in ``values.jsonl``. users: the simulated one
    by name, the one that plays last. policies: values of a recommender's test conversations, and their final states."""
    instances, titles = this.task.parts["test"], this.task.catalogue.titles
    judged, summary = {}, {}
    for name, made in trees.items():
        rankings = {strategy: Ranking(strategy) for strategy in STRATEGIES}
        if name in ARM_RANKINGS:
            rankings |= {"own": ARM_RANKINGS[name]}
        judged[name] = {key: judge(instances, made, titles, ranking) for key, ranking in rankings.items()}
        summary[name] = summarize(judged[name][this.config.evaluate.ranking], made)
    full = trees["full"]
    depth = {
        level: judge(instances, [replay(tree, depth=level) for tree in full], titles)
        for level in range(1, this.config.search.depth + 1)
    }  # fmt: skip
    held = this.task.parts["valid"] or instances
    proposed = this.first_lists(held)
    auc = {name: label_auc(user, held, len(titles), proposed, this.seed) for name, user in users.items()}
    samples = [_sample(this, instance, tree) for instance, tree in zip(instances[:3], full)]
    samples += [_talk_sample(this, name, s) for name, (_, states) in policies.items() for s in states[:2]]
    _write_values(this.folder / "values.jsonl", judged, this.config.evaluate.ranking)
    values = {name: found for name, (found, _) in policies.items()}
    return SeedResult(judged, summary, depth, auc, values, samples)


def short_levels(searches: Mapping[str, tuple[int, Mapping[str, int]]]) -> str:
    """One line about levels of searches with fewer lists than beams; "" where there are none. searches: name ->
    (levels that were wanted, short ones by reason)."""
    parts = [
        f"{ARMS.get(name, FULL)} {sum(short.values())} of {levels} "
        f"({', '.join(f'{reason}: {count}' for reason, count in short.items())})"
        for name, (levels, short) in searches.items() if short
    ]  # fmt: skip
    return "levels with fewer lists than beams: " + "; ".join(parts) if parts else ""


def label_auc(
    user: User, instances: Sequence[Instance], items: int, proposed: Sequence[Sequence[int]], seed: int
) -> np.ndarray:
    """float64 [instances]: the probability that a label is scored above another item, a tie counting half, and so does
    an item without a score; half of the others are drawn from the catalogue, half from what the recommender
    proposed."""
    rng = np.random.Generator(np.random.PCG64([seed, 37]))
    asked = []
    for instance, own in zip(instances, proposed, strict=True):
        barred = {*instance.labels, *instance.dialogue.items}
        drawn = [int(i) for i in rng.integers(0, items, 4 * _NEGATIVES) if int(i) not in barred][:_NEGATIVES]
        near = [i for i in own if i not in barred][:_NEGATIVES]
        asked.append((*instance.labels, *dict.fromkeys((*drawn, *near))))
    out = []
    for instance, scores in zip(instances, user.score([i.dialogue for i in instances], asked), strict=True):
        labels, others = scores[: len(instance.labels), None], scores[None, len(instance.labels) :]
        out.append(np.mean((labels > others) + 0.5 * ~((labels > others) | (labels < others))))
    return np.array(out)


def _write_values(path: Path, judged: Mapping[str, Mapping[str, Judged]], ranking: str) -> None:
    lines = [
        {"search": name, "id": id, **{metric: float(values[i]) for metric, values in by[ranking].values.items()}}
        for name, by in judged.items() for i, id in enumerate(by[ranking].ids)
    ]  # fmt: skip
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))


def _sample(this: Any, instance: Instance, tree: Tree) -> dict[str, Any]:
    """A dialogue, the way to the best list of the search, and the final ranking, as text for the report."""
    titles = this.task.catalogue.titles
    best = max((n for n in tree.nodes if n.kept and n.depth == tree.depth), key=lambda n: n.reward)
    way = [n for n in tree.nodes if best.path[: n.depth] == n.path]
    labels = set(instance.labels)
    return {
        "dialogue": spoken(instance.dialogue.turns, this.task.roles),
        "rounds": [
            {"critique": n.critique, "reward": n.reward,
             "items": [f"{titles[i]}{' *' if i in labels else ''} {s:.2f}" for i, s in zip(n.items, n.scores)]}
            for n in sorted(way, key=lambda n: n.depth)
        ],
        "ranking": [f"{titles[i]}{' *' if i in labels else ''}" for i in rank(tree, titles)[:10]],
    }  # fmt: skip


def _talk_sample(this: Any, name: str, state: Any) -> dict[str, Any]:
    return {
        "policy": POLICIES[name],
        "dialogue": spoken(state.example.dialogue.turns, this.task.roles),
        "conversation": state.text,
    }


# --- all seeds -------------------------------------------------------------------------------------------------------


def pool(config: Any, results: Sequence[SeedResult], workdir: Path) -> dict[str, Any]:
    """Means over dialogues of all seeds and paired intervals; written to result.json, with figures.json beside it."""
    first, ranking = results[0], config.evaluate.ranking
    short = {name: _short(r.summary[name] for r in results) for name in first.judged}
    counts = {stage: total_counts(r.counts.get(stage, {}) for r in results) for stage in _stages(results)}
    costs = {name: _costs(results, name) for name in first.judged}
    rows = [_row(results, name, ranking) for name in first.judged]
    rows += [
        {"name": POLICIES[name], **{_SHOWN[m]: float(_joined(results, name, m).mean()) for m in _SHOWN}}
        for name in first.policies
    ]  # fmt: skip
    result = {
        "system": config.system, "variant": config.variant, "seed": list(config.seeds),
        "protocol": {
            "part": "test", "samples": len(first.judged["full"][ranking].ids), **first.judged["full"][ranking].protocol,
            "beams": config.search.beams, "depth": config.search.depth, "expand": config.search.expand,
            "recommender": config.recommender.kind, "source": config.data.source,
        },
        "rows": rows,
        "comparisons": _comparisons(results, ranking),
        "rankings": {
            strategy: {m: _mean(results, "full", strategy, m) for m in ("recall@10", "ndcg@10", "recall@50")}
            for strategy in STRATEGIES
        },
        "short_levels": {name: {"levels": levels, **why} for name, (levels, why) in short.items()},
        "notes": [line for line in [short_levels(short)] if line],
        "counts": {
            "in all": counts, "by seed": {str(seed): r.counts for seed, r in zip(config.seeds, results, strict=True)}
        },
        "tables": [
            {"title": "What recommenders and the simulated user counted", "rows": _count_rows(counts)},
            {
                "title": "What the searches asked for, and what was not to be had",
                "rows": [{"name": ARMS.get(name, FULL), **spent} for name, spent in costs.items()],
            },
        ],
        "auc": {name: float(np.concatenate([r.auc[name] for r in results]).mean()) for name in first.auc},
        "samples": [sample for r in results for sample in r.samples],
    }  # fmt: skip
    write_atomic(workdir / "result.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    write_atomic(workdir / "figures.json", json.dumps(_figures(results)) + "\n")
    return result


# A policy's values by the name of what they are of a search: its last list is the ranking, all its lists the pool.
_SHOWN = {"hit": "in the pool", "hit_last": "recall@10", "score": "user's score"}
_METRICS = ("recall@1", "recall@10", "recall@50", "ndcg@10", "mrr@10")


def _values(results: Sequence[SeedResult], name: str, ranking: str, metric: str) -> np.ndarray:
    return np.concatenate([r.judged[name][ranking].values[metric] for r in results])


def _mean(results: Sequence[SeedResult], name: str, ranking: str, metric: str) -> float:
    return float(_values(results, name, ranking, metric).mean())


def _joined(results: Sequence[SeedResult], policy: str, metric: str) -> np.ndarray:
    return np.concatenate([r.policies[policy][metric] for r in results])


def _stages(results: Sequence[SeedResult]) -> list[str]:
    return list(dict.fromkeys(stage for r in results for stage in r.counts))


def _count_rows(counts: Mapping[str, Counts]) -> list[dict[str, Any]]:
    """A row for all that a player counts, with a column for each stage and one for all of them."""
    rows = []
    for player, own in total_counts(counts.values()).items():
        for what, total in own.items():
            by_stage = {stage: found.get(player, {}).get(what) for stage, found in counts.items()}
            rows.append({"name": f"{player}: {what.replace('_', ' ')}", **by_stage, "in all": total})
    return rows


def _costs(results: Sequence[SeedResult], name: str) -> dict[str, int]:
    """Of a search, summed over dialogues and seeds."""
    costs: collections.Counter[str] = collections.Counter()
    for r in results:
        costs.update(r.summary[name]["costs"])
    return dict(costs)


def _short(summaries: Iterable[Mapping[str, Any]]) -> tuple[int, dict[str, int]]:
    """(levels, short ones by reason) of all seeds."""
    levels, short = 0, collections.Counter()
    for summary in summaries:
        levels += summary["levels"]
        short.update(summary["short_levels"])
    return levels, dict(short)


def _row(results: Sequence[SeedResult], name: str, ranking: str) -> dict[str, Any]:
    """Of a search: metrics of its best ranking among mean and its own (a vote, the list as it stands), costs."""
    key, costs = _fair(results, name, ranking), _costs(results, name)
    dialogues = len(_values(results, name, key, "recall@10"))
    return {
        "name": ARMS.get(name, FULL), **{m: _mean(results, name, key, m) for m in _METRICS},
        "in the pool": _mean(results, name, key, "pool_recall"), "lists": costs["lists"] / dialogues,
        "critiques": costs["critiques"] / dialogues, "items scored": costs["scored"] / dialogues, "ranked by": key,
    }  # fmt: skip


def _fair(results: Sequence[SeedResult], name: str, ranking: str) -> str:
    """The ranking that a search is judged by. The method has the config's; what it is compared with has the better one,
    by Recall@10, of that and its own, so that no baseline loses by its ranking."""
    if name == "full" or "own" not in results[0].judged[name]:
        return ranking
    return max((ranking, "own"), key=lambda key: _mean(results, name, key, "recall@10"))


def _comparisons(results: Sequence[SeedResult], ranking: str) -> list[dict[str, Any]]:
    ours, out = _values(results, "full", ranking, "recall@10"), []
    for name in (name for name in results[0].judged if name != "full"):
        theirs = _values(results, name, _fair(results, name, ranking), "recall@10")
        out.append(_entry(f"{FULL} - {ARMS[name]}", "recall@10", ours, theirs))
    deep, flat = (
        np.concatenate([r.depth[level].values["recall@50"] for r in results])
        for level in (max(results[0].depth), min(results[0].depth))
    )
    if len(results[0].depth) > 1:
        out.append(_entry(f"{FULL}, all levels - the first", "recall@50", deep, flat))
    *others, player = (np.concatenate([r.auc[name] for r in results]) for name in results[0].auc)
    out.append(_entry("simulated user - chance", "AUC", player, np.full_like(player, 0.5)))
    out += [_entry("simulated user - before training", "AUC", player, other) for other in others]
    if results[0].policies:
        for metric, criterion in (("hit", True), ("hit_last", False), ("score", False)):
            after, before = (_joined(results, name, metric) for name in ("rl", "cold_start"))
            name = f"{POLICIES['rl']} - {POLICIES['cold_start']}"
            out.append(_entry(name, _SHOWN[metric], after, before, criterion))
    return out


def _entry(name: str, metric: str, a: np.ndarray, b: np.ndarray, criterion: bool = True) -> dict[str, Any]:
    difference, low, high = paired_interval(a, b)
    entry = {"name": name, "metric": metric, "difference": difference, "low": low, "high": high}
    if criterion:
        entry |= {"criterion": "lower end of the paired 95 % interval over 0", "met": bool(low > 0)}
    return entry


def _figures(results: Sequence[SeedResult]) -> list[dict[str, Any]]:
    levels = sorted(results[0].depth)

    def found(k: int) -> list[float]:
        return [float(np.concatenate([r.depth[d].values[f"recall@{k}"] for r in results]).mean()) for d in levels]

    def reward(name: str) -> list[float]:
        return [float(np.mean([r.summary[name]["kept_reward"].get(str(d), np.nan) for r in results])) for d in levels]

    by_depth = {f"Recall@{k}": found(k) for k in KS}
    rewards = {ARMS.get(name, FULL): reward(name) for name in results[0].judged}
    rewards = {name: values for name, values in rewards.items() if not np.isnan(values).any()}
    parts = (("What the search finds by depth", by_depth), ("Mean reward of the lists that are kept", rewards))
    return [lines(title, series, "levels", levels) for title, series in parts]
