"""The ten systems, each a recipe in its own file, and what is known of each without importing it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class System:
    """One published system: its file name here, its own name, one line on it and its stages in running order."""

    name: str
    title: str
    line: str
    stages: tuple[str, ...]

    @property
    def built(self) -> bool:
        """Whether `jaxrec/systems/<name>.py` exists."""
        return importlib.util.find_spec(f"{__name__}.{self.name}") is not None

    def load(self) -> ModuleType:
        """Imports the recipe: `run(config, workdir, stages) -> dict` and `STAGES`.

        Raises:
          ValueError: the system is not built yet, or its STAGES differ from the registry's.
        """
        if not self.built:
            raise ValueError(f"the system {self.title} ({self.name}) is not built yet; built: {', '.join(built())}")
        module = importlib.import_module(f"{__name__}.{self.name}")
        if tuple(module.STAGES) != self.stages:
            raise ValueError(f"{module.__file__}: STAGES is {module.STAGES}, the registry says {self.stages}")
        return module


SYSTEMS = {
    system.name: system
    for system in (
        System(
            "deeprec",
            "DeepRec",
            "an LLM talks to a recommender over several turns, then ranks; trained by two-stage RL",
            ("trm", "cold_start", "cold_rl", "rec_rl", "evaluate"),
        ),
        System(
            "stream_rec",
            "STREAM-Rec",
            "a sequential recommender that reasons before it recommends",
            ("tokenize", "pretrain", "annotate", "sft", "rl", "evaluate"),
        ),
        System(
            "grsu",
            "GRSU",
            "a simulated user scores and critiques; beam search over conversations",
            ("synthesize", "sft", "rl", "interact", "evaluate"),
        ),
        System(
            "simple_deep_searcher",
            "SimpleDeepSearcher",
            "search trajectories synthesised, curated, then SFT",
            ("synthesize", "curate", "sft", "dpo", "rl", "evaluate"),
        ),
        System(
            "r1_searcher_pp",
            "R1-Searcher++",
            "when to recall, when to search; memorise what was retrieved",
            ("cold_start", "rl", "evaluate"),
        ),
        System(
            "acpo",
            "ACPO",
            "fast/slow thinking with a length budget from online difficulty",
            ("cold_start", "rl", "evaluate"),
        ),
        System(
            "rv_syn",
            "RV-Syn",
            "verifiable maths problems from a function library and computation graphs",
            ("library", "graphs", "problems", "export"),
        ),
        System(
            "easy_ep",
            "EASY-EP",
            "prune MoE experts from a few demonstrations",
            ("calibrate", "select", "prune", "evaluate"),
        ),
        System(
            "kape",
            "KAPE",
            "which neurons carry internal or external knowledge; knowledge streams",
            ("collect", "identify", "intervene", "report"),
        ),
        System(
            "cafe",
            "CAFE",
            "retrieval heads find the documents, attention steering reads them",
            ("detect", "filter", "steer", "evaluate"),
        ),
    )
}

# What `jaxrec run` also takes but is no published system: data to look at, and a model to start from.
RECIPES = {
    "world": System("world", "Embedded world", "what the generated data holds, beside real data", ("describe",)),
    "world_lm": System(
        "world_lm", "World LM", "the embedded world's own base language model, dense or with experts",
        ("train", "evaluate"),
    ),
}  # fmt: skip


def built() -> tuple[str, ...]:
    """Names of the systems that can be run."""
    return tuple(name for name, system in SYSTEMS.items() if system.built)


def by_seed(
    recipe: Mapping[str, Callable[[Any], Any]], stages: Sequence[str], seeds: Sequence[int], workdir: Path,
    start: Callable[[int, Path], Any],
) -> list[Any]:  # fmt: skip
    """Run those of a recipe's stages that are in ``stages``, in the recipe's order, for one seed after the other.

    start(seed, folder) gives what the stages take; of several seeds each has a folder of its own. Returns what the last
    stage of the recipe made, by seed; empty without it.
    """
    results, last = [], list(recipe)[-1]
    for seed in seeds:
        this = start(seed, workdir / f"seed{seed}" if len(seeds) > 1 else workdir)
        for name, stage in recipe.items():
            if name in stages:
                made = stage(this)
                if name == last:
                    results.append(made)
    return results
