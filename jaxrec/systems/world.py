"""The embedded world as a data recipe: generate it, count what is in it, set real data beside it.

Writes ``result.json`` (the floors, and all figures as tables), ``statistics.json`` and ``statistics.png`` into the
workdir and prints the tables.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrec.config import UsageError, write_atomic
from jaxrec.data.sources import load_interactions
from jaxrec.world import RULES, SCALES, World, generate, world_config
from jaxrec.world.conversations import SPLITS, Conversations, TalkConfig
from jaxrec.world.statistics import (
    Described,
    as_json,
    conversation_rows,
    conversations_table,
    describe,
    describe_conversations,
    describe_world,
    plot,
    shown,
    statistics_rows,
    statistics_table,
)

STAGES = ("describe",)
_SIZES = ("users", "items", "makers")


def make_world(config: Any) -> World:
    """The world of a config. Raises UsageError for a scale or a number of rules that does not exist."""
    if config.scale not in SCALES:
        raise UsageError(f"scale={config.scale!r} must be one of {', '.join(SCALES)}")
    knobs = config.world.to_dict()
    rules = knobs.pop("num_rules")
    if not 0 <= rules <= len(RULES):
        raise UsageError(f"world.num_rules={rules} must lie between 0 and {len(RULES)}")
    knobs = {name: value for name, value in knobs.items() if value or name not in _SIZES}
    return generate(world_config(config.scale, seed=config.seed, rules=RULES[:rules], **knobs))


def conversations(config: Any, world: World) -> dict[str, dict[str, float]]:
    """Figures of a world's conversations, see :func:`describe_conversations`. Raises UsageError for settings that
    cannot be."""
    c = config.conversations
    for split in SPLITS:
        if c[split] < 0:
            raise UsageError(f"conversations.{split}={c[split]} must not be negative")
    try:
        talks = Conversations(world, config.seed, TalkConfig(c.wishes, c.avoid))
    except ValueError as error:
        raise UsageError(f"conversations: {error}") from error
    return describe_conversations(talks, {split: c[split] for split in SPLITS})


def run(config: Any, workdir: Path, stages: Sequence[str]) -> dict[str, Any]:
    """Describe the world, and the data of ``config.compare``; returns the result that is also in result.json."""
    from rich.console import Console

    options = {"with_floors": config.floors, "max_len": config.max_history}
    real = load_interactions(config.compare) if config.compare else None  # first: a wrong path is said at once
    world = make_world(config)
    talks = conversations(config, world)
    own = describe_world(world, f"embedded world ({config.variant})", **options)
    data = [dataclasses.replace(own, conversations=talks)]
    if real is not None:
        data.append(describe(real, Path(config.compare).resolve().name, **options))
    Console().print(statistics_table(data))
    if talks:
        Console().print(conversations_table(data[0]))
    write_atomic(workdir / "statistics.json", json.dumps([as_json(each) for each in data], indent=2) + "\n")
    print(f"Plots: {plot(data, workdir / 'statistics.png')}")
    result = _result(config, data)
    write_atomic(workdir / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def _result(config: Any, data: Sequence[Described]) -> dict[str, Any]:
    protocol = {"split": "leave_one_out", "part": "test", "ranking": "full", "history_excluded": True}
    protocol |= {"users": int(data[0].values["users"]), "max_len": config.max_history}
    rows = [
        {"name": f"{each.name}: {floor}", **{k: v for k, v in metrics.items() if not k.startswith("mrr")}}
        for each in data
        for floor, metrics in each.floors.items()
    ]
    return {
        "system": config.system, "variant": config.variant, "seed": config.seed, "protocol": protocol, "rows": rows,
        "comparisons": [], "tables": _tables(data),
    }  # fmt: skip


def _tables(data: Sequence[Described]) -> list[dict[str, Any]]:
    """All figures, for the report."""
    names = [data[0].name, *(f"real data: {each.name}" for each in data[1:])]
    statistics = _table("Statistics", names, statistics_rows(data))
    talks = data[0].conversations
    return [statistics, *([_table("Conversations", list(talks), conversation_rows(data[0]))] if talks else [])]


def _table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    return {
        "title": title,
        "rows": [{"name": n, **dict(zip(columns, map(shown, values), strict=True))} for n, values in rows.items()],
    }
