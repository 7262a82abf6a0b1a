"""Demonstrations of a domain: prompts with answers, from JSON lines."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """``response`` follows ``prompt``."""

    domain: str
    prompt: str
    response: str


def read_demonstrations(
    files: Sequence[str], calibrate: int, order: str, rng: np.random.Generator
) -> dict[str, tuple[list[Demonstration], list[Demonstration]]]:
    """Domain -> demonstrations to calibrate with, and all others. files: "NAME=FILE.jsonl", each line an object with
    "prompt" and "response". order: "random", or "longest" for the ``calibrate`` longest ones.

    Raises ValueError naming file and line for what is no such object, and for a file with fewer than ``calibrate``
    lines; FileNotFoundError.
    """
    out = {}
    for entry in files:
        name, mark, path = entry.partition("=")
        if not mark or not name or name in out:
            raise ValueError(f"data.files: {entry!r} must be NAME=FILE.jsonl, every name once")
        found = [_line(name, path, number, line) for number, line in _lines(path)]
        if len(found) < calibrate:
            raise ValueError(f"{path}: {len(found)} demonstrations, calibrate.samples asks for {calibrate}")
        chosen = rng.permutation(len(found))[:calibrate]
        if order == "longest":
            lengths = [-len(d.prompt) - len(d.response) for d in found]
            chosen = np.argsort(lengths, kind="stable")[:calibrate]
        rest = sorted(set(range(len(found))) - set(chosen.tolist()))
        out[name] = [found[i] for i in sorted(chosen)], [found[i] for i in rest]
    return out


def _lines(path: str) -> list[tuple[int, str]]:
    text = Path(path).read_text(encoding="utf-8")
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _line(domain: str, path: str, number: int, line: str) -> Demonstration:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path}:{number}: an object with 'prompt' and 'response' was expected")
    for field in ("prompt", "response"):
        if not isinstance(fields.get(field), str) or (field == "prompt" and not fields[field]):
            raise ValueError(f"{path}:{number}: field {field!r} is missing, empty or no text")
    return Demonstration(domain, fields["prompt"], fields["response"])
