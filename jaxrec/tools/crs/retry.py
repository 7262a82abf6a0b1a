"""Asking again for replies that cannot be used, a bounded number of times (GRSU's released code may loop for ever)."""

import collections
from collections.abc import Callable, Sequence
from typing import TypeVar

from jaxrec.tools.conversation import Ask, seed_of

T = TypeVar("T")


def until_usable(
    asks: Sequence[Ask], step: Callable[[list[int], list[int]], Sequence[tuple[T | None, str]]], tries: int, what: str,
    counts: collections.Counter[str],
) -> list[tuple[T, int]]:  # fmt: skip
    """A usable reply for each ask, and how many tries it took.

    step: (numbers of the asks that still want one, seeds) -> (the reply or None, its text) for each: one call for all.
    what: what a good reply does, for the message. counts: gets "tries", those of them that were "asked again", and
    "misfits", whose reply could not be used or did not come. Raises RuntimeError for an ask without a usable reply
    after ``tries``, with its name, its dialogue and the last text.
    """
    if tries < 1:
        raise ValueError(f"tries={tries} must be at least 1")
    out: list[tuple[T, int] | None] = [None] * len(asks)
    said = [""] * len(asks)
    for attempt in range(tries):
        left = [i for i, reply in enumerate(out) if reply is None]
        if not left:
            break
        replies = step(left, [seed_of(asks[i].seed, attempt) for i in left])
        for i, (reply, text) in zip(left, replies, strict=True):
            said[i] = text
            counts["tries"] += 1
            counts["asked again"] += attempt > 0
            counts["misfits"] += reply is None
            out[i] = None if reply is None else (reply, attempt + 1)
    for ask, reply, last in zip(asks, out, said, strict=True):
        if reply is None:
            raise RuntimeError(f"{name_of(ask)}: none of {tries} replies {what}; the last one: {last[:500]!r}")
    return out


def name_of(ask: Ask) -> str:
    """The ask and its dialogue, for messages."""
    where = f"dialogue {ask.dialogue.id}"
    return ask.name if where in ask.name else f"{ask.name}, {where}".removeprefix(", ")
