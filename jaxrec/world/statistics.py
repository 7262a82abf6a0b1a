"""How a data set looks: sizes, skew, what plain counting can predict; for the embedded world also what was planted.

The same figures for real data stand beside those of the world, so that a reader can judge how unlike real data it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxrec.data.dialogues import USER
from jaxrec.data.interactions import Interactions, drop_duplicates
from jaxrec.data.splits import leave_one_out
from jaxrec.world.config import Rule
from jaxrec.world.conversations import Conversations, Wish
from jaxrec.world.generate import INTENT, KINDS, World
from jaxrec.world.interactions import event_kinds, to_interactions

if TYPE_CHECKING:
    from rich.table import Table

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_LARGEST = 4_000_000_000  # scores that ranking floors may compute: minutes on two cores


@dataclasses.dataclass(frozen=True, eq=False)
class Described:
    """Figures of one data set. ``values``: name -> number, in the order they are shown. ``floors``: recommender -> its
    test metrics under leave-one-out and full ranking. per_user int [U], per_item int [N]: events of each.
    candidates int [n]: for every intent event how many unseen items met its rule; None without a world.
    ``conversations``: split -> name -> number, of :func:`describe_conversations`; empty without a world."""

    name: str
    values: dict[str, float]
    floors: dict[str, dict[str, float]]
    per_user: np.ndarray
    per_item: np.ndarray
    candidates: np.ndarray | None = None
    conversations: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)


def gini(counts: np.ndarray) -> float:
    """Gini coefficient of non-negative counts [n]: 0 when all are equal, (n - 1) / n when one holds everything.

    Raises ValueError when there is nothing to share.
    """
    ordered = np.sort(np.asarray(counts, np.float64))
    if len(ordered) == 0 or ordered[0] < 0 or ordered[-1] == 0:
        raise ValueError("gini needs counts that are not negative and not all 0")
    n = len(ordered)
    return float(2 * (np.arange(1, n + 1) * ordered).sum() / (n * ordered.sum()) - (n + 1) / n)


def rule_keys(world: World, rule: Rule) -> np.ndarray:
    """One integer per item id [N+1]: items with the same key have the attribute values that one wish of ``rule`` names
    together. Row 0 is -1."""
    key = np.zeros(world.num_items + 1, np.int64)
    for attribute, _, _ in rule:
        key = key * len(world.values[attribute]) + world.attributes[attribute]
    key[0] = -1
    return key


def intent_candidates(world: World) -> np.ndarray:
    """For every intent event, in event order, how many items its user had not met yet obey the rule: int64 [n], >= 1.

    1 / candidates is what knowing the rule perfectly would give to a blind draw among them.
    """
    count = np.bincount(world.users)
    start = np.concatenate([[0], np.cumsum(count)])
    place = np.arange(len(world.users)) - start[world.users]
    column = np.arange(count.max())
    found = np.zeros(len(world.users), np.int64)
    for number, rule in enumerate(world.config.rules):
        events = np.flatnonzero((world.kind == INTENT) & (world.rule == number))
        keys = rule_keys(world, rule)
        sizes = np.unique(keys[1:], return_counts=True)
        wanted = keys[world.items[events]]
        total = sizes[1][np.searchsorted(sizes[0], wanted)]
        before = column < place[events][:, None]
        earlier = world.items[np.where(before, start[world.users[events]][:, None] + column, 0)]
        found[events] = total - ((keys[earlier] == wanted[:, None]) & before).sum(1)
    return found[world.kind == INTENT]


def _spread(what: str, counts: np.ndarray) -> dict[str, float]:
    names = ("fewest", "lower quartile", "median", "upper quartile", "most")
    return {f"{what}, {n}": float(q) for n, q in zip(names, np.quantile(counts, QUANTILES), strict=True)}


def floors(inter: Interactions, *, max_len: int = 50, world: World | None = None) -> dict[str, dict[str, float]]:
    """Test metrics of popularity and of the first-order Markov chain: leave-one-out, full ranking, history excluded.

    With a world, also recall@10 by the kind of the held-out event. Raises ValueError when users x items is too much.
    """
    from jaxrec.evaluate.ranking import evaluate_ranking, rank_values
    from models.recsys.floors import Markov, Popularity

    if inter.num_users * inter.num_items > _LARGEST:
        raise ValueError(
            f"ranking {inter.num_items} items for {inter.num_users} users takes too long here; "
            "leave the floors out (--config.floors=False)"
        )
    split = leave_one_out(inter)
    _, items, previous = split.train_events()
    scorers = {
        "popularity": Popularity.fit(items, split.num_items).scores,
        "Markov": Markov.fit(previous, items, split.num_items).scores,
    }
    kinds = None if world is None else event_kinds(world, split, "test")
    ks = tuple(k for k in (1, 5, 10, 20) if k <= split.num_items)
    out = {}
    for name, scorer in scorers.items():
        result = evaluate_ranking(scorer, split, "test", max_len=max_len, exclude_history=True, ks=ks)
        out[name] = dict(result.metrics)
        if kinds is not None and 10 in ks:
            hit = rank_values(result.ranks, "recall@10")
            out[name] |= {
                f"recall@10_{label}": float(hit[kinds == kind].mean())
                for kind, label in enumerate(KINDS)
                if (kinds == kind).any()
            }
    return out


def describe(
    inter: Interactions, name: str, *, world: World | None = None, with_floors: bool = True, max_len: int = 50
) -> Described:
    """All figures of one data set; of a world too when ``world`` made these interactions."""
    per_user = np.bincount(inter.users, minlength=inter.num_users + 1)[1:]
    per_item = np.bincount(inter.items, minlength=inter.num_items + 1)[1:]
    ordered = np.sort(per_item)[::-1]
    values: dict[str, float] = {
        "users": inter.num_users,
        "items": inter.num_items,
        "events": len(inter),
        "share of all pairs that are events": len(inter) / (inter.num_users * inter.num_items),
        **_spread("events per user", per_user),
        **_spread("events per item", per_item),
        "popularity Gini": gini(per_item),
        "events on the top tenth of items": float(ordered[: max(len(ordered) // 10, 1)].sum() / len(inter)),
    }
    once = drop_duplicates(inter)
    values["events that repeat an earlier pair"] = 1 - len(once) / len(inter)
    candidates = None
    if world is not None:
        share = np.bincount(world.kind, minlength=len(KINDS)) / len(world.kind)
        values |= {f"{label} events": float(share[kind]) for kind, label in enumerate(KINDS)}
        if share[INTENT]:
            candidates = intent_candidates(world)
            values |= _spread("unseen items that meet an intent", candidates)
            values["recall@10 of a blind draw among them"] = float(np.minimum(10 / candidates, 1).mean())
    # A repeated pair can be no target where the history is excluded, so floors are measured on first meetings.
    measured = floors(once, max_len=max_len, world=world) if with_floors else {}
    return Described(name, values, measured, per_user, per_item, candidates)


def describe_world(world: World, name: str = "embedded world", **options: Any) -> Described:
    """``describe`` for a generated world."""
    return describe(to_interactions(world), name, world=world, **options)


def describe_conversations(talks: Conversations, counts: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Figures of a world's conversations by split, in the order they are shown. counts: of conversations by split; one
    without any is left out."""
    return {split: _conversations(talks, split, count) for split, count in counts.items() if count}


def _conversations(talks: Conversations, split: str, count: int) -> dict[str, float]:
    instances = talks.sample(split, count)
    turns = [instance.dialogue.turns for instance in instances]
    wishes = [talks.stated(instance.dialogue) for instance in instances]
    fitting, nearly = np.array([_met(talks, own) for own in wishes]).T
    items, targets = len(talks.catalogue), {label for instance in instances for label in instance.labels}
    return {
        "conversations": count,
        "items that may be a target": len(talks.items[split]),
        "share of all items": len(talks.items[split]) / items,
        "different targets": len(targets),
        "share of all items that are a target": len(targets) / items,
        "turns, mean": float(np.mean([len(own) for own in turns])),
        "turns of the seeker, mean": float(np.mean([sum(turn.role == USER for turn in own) for own in turns])),
        "wishes, mean": float(np.mean([len(own) for own in wishes])),
        "conversations that say what is not wanted": float(np.mean([not all(w.wanted for w in own) for own in wishes])),
        **_spread("items that meet all wishes", fitting),
        **_spread("items that meet all wishes but one", nearly),
        "recall@10 of a blind draw among those that meet all": float(np.minimum(10 / fitting, 1).mean()),
    }


def _met(talks: Conversations, wishes: Sequence[Wish]) -> tuple[int, int]:
    """How many items meet all wishes, and how many all but one."""
    missed = np.sum([talks.fits(wish) != wish.wanted for wish in wishes], axis=0)
    return int(np.count_nonzero(missed == 0)), int(np.count_nonzero(missed == 1))


def statistics_rows(data: Sequence[Described]) -> dict[str, list[float | None]]:
    """Figure -> its value in each data set, None where it has none."""
    rows = {field: [each.values.get(field) for each in data] for each in data for field in each.values}
    for floor in dict.fromkeys(name for each in data for name in each.floors):
        for metric in dict.fromkeys(m for each in data for m in each.floors.get(floor, ())):
            rows[f"{floor} {metric}"] = [each.floors.get(floor, {}).get(metric) for each in data]
    return rows


def conversation_rows(each: Described) -> dict[str, list[float | None]]:
    """Figure -> its value in each split that is described."""
    fields = dict.fromkeys(field for figures in each.conversations.values() for field in figures)
    return {field: [figures.get(field) for figures in each.conversations.values()] for field in fields}


def terminal_table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[float | None]]) -> Table:
    """Figures as a terminal table; – for None."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for field, values in rows.items():
        table.add_row(field, *map(_number, values))
    return table


def statistics_table(data: Sequence[Described]) -> Table:
    """The figures as a terminal table, one column per data set."""
    return terminal_table("Statistics", [each.name for each in data], statistics_rows(data))


def conversations_table(each: Described) -> Table:
    """The figures of a world's conversations as a terminal table, one column per split."""
    return terminal_table("Conversations", list(each.conversations), conversation_rows(each))


def shown(value: float | None) -> int | float | None:
    """A figure as tables show it: without decimals where it has none, but 0.0 as the share that it is."""
    return int(value) if value is not None and float(value).is_integer() and abs(value) >= 1 else value


def _number(value: float | None) -> str:
    value = shown(value)
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) and value else f"{value:.4f}"


def plot(data: Sequence[Described], path: Path) -> Path:
    """One picture [PNG]: events per user, popularity by rank, candidates per intent, and the floors' recall@10."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    users, popularity, intents, bars = figure.subplots(2, 2).ravel()
    for each in data:
        ordered = np.sort(each.per_user)
        users.step(ordered, np.arange(1, len(ordered) + 1) / len(ordered), where="post", label=each.name)
        items = np.sort(each.per_item)[::-1] / each.per_item.sum()
        popularity.plot(np.arange(1, len(items) + 1) / len(items), items * len(items), label=each.name)
        if each.candidates is not None:
            intents.hist(each.candidates, bins=min(40, int(each.candidates.max())), histtype="step", label=each.name)
    users.set(title="Events per user", xlabel="events", ylabel="share of users with at most so many", xscale="log")
    popularity.set(
        title="Popularity", xlabel="rank of the item, as a share of all", ylabel="events, 1 = even share", yscale="log"
    )
    intents.set(title="Choice an intent leaves", xlabel="unseen items that meet it", ylabel="intent events")
    names = list(dict.fromkeys(name for each in data for name in each.floors))
    width = 0.8 / max(len(data), 1)
    for at, each in enumerate(data):
        heights = [each.floors.get(name, {}).get("recall@10", 0.0) for name in names]
        bars.bar(np.arange(len(names)) + at * width, heights, width, label=each.name)
    bars.set(title="What counting predicts", ylabel="test recall@10, full ranking")
    bars.set_xticks(np.arange(len(names)) + width * (len(data) - 1) / 2, names)
    users.legend(frameon=False)
    for axis in (users, popularity, intents, bars):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def as_json(each: Described) -> Mapping[str, Any]:
    """The figures of one data set as JSON types."""
    return {
        "name": each.name, "values": each.values, "floors": each.floors, "conversations": each.conversations
    }  # fmt: skip
