"""What an environment is: batched functions over explicit state.

An environment is any object with these members; nothing inherits. States are opaque to the rollout. ``step`` sees only
the rows that are still running and calls each tool once for all of them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Action:
    """One policy segment. ``text`` decodes the sampled ids, the stop string included; ``stop`` is the stop string that
    ended it, "eos", or "length"."""

    text: str
    stop: str


@dataclasses.dataclass(frozen=True)
class Step:
    """What the environment answers, one entry per running row.

    observations: text to append, or None when the row is done. status: int [n] of ``rl.trajectory.Status``, read where
    a row is done.
    """

    states: list[Any]
    observations: list[str | None]
    status: np.ndarray


class Environment(Protocol):
    """stop: strings that end a policy segment."""

    stop: tuple[str, ...]

    def reset(self, examples: Sequence[Any], copies: int) -> tuple[list[Any], list[str]]:
        """States (``copies`` adjacent ones per example) and one prompt per example."""

    def step(self, states: Sequence[Any], actions: Sequence[Action]) -> Step:
        """Advance the running rows by one segment each."""
