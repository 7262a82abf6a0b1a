"""Rows of tokens for supervised steps: a prompt, then segments whose author says what is learned.

Segments are tokenised apart, as in a rollout, so that a border between authors is a border between tokens. What a tool
wrote and the prompt are context; what the policy wrote and the closing end-of-text token are targets.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from rl.trajectory import Trajectory

Segments = Sequence[tuple[str, str]]  # (author, text) with author "policy" or anything else, such as "tool"


def encode_segments(prompt: str, segments: Segments, tokenizer, eos_id: int) -> tuple[list[int], list[bool]]:
    """Token ids of one row and, per token, whether it is learned.

    Raises ValueError when the policy did not write last, since the end-of-text token would then be learned after a
    tool's text.
    """
    if not segments or segments[-1][0] != "policy":
        raise ValueError("a row must end with a segment of the policy, behind which it ends its text")
    ids = list(tokenizer.encode(prompt))
    mask = [False] * len(ids)
    for author, text in segments:
        new = tokenizer.encode(text)
        ids += new
        mask += [author == "policy"] * len(new)
    return [*ids, eos_id], [*mask, True]


def encode_rows(
    rows: Sequence[tuple[str, Segments]], tokenizer, eos_id: int, max_len: int
) -> tuple[dict[str, np.ndarray], int]:
    """Arrays of (prompt, segments) pairs, as :func:`stack_rows` gives them, and how many rows were longer than
    ``max_len`` tokens and are left out. Raises ValueError as :func:`encode_pairs` does."""
    pairs, dropped = encode_pairs(rows, tokenizer, eos_id, max_len)
    return stack_rows(pairs), dropped


def encode_pairs(
    rows: Sequence[tuple[str, Segments]], tokenizer, eos_id: int, max_len: int
) -> tuple[list[tuple[list[int], list[bool]]], int]:
    """(ids, whether each is learned) of (prompt, segments) pairs, and how many were longer than ``max_len`` tokens and
    are left out. Raises ValueError naming the row it cannot encode, and when none fits."""
    encoded = []
    for number, (prompt, segments) in enumerate(rows):
        try:
            encoded.append(encode_segments(prompt, segments, tokenizer, eos_id))
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
    fits = [pair for pair in encoded if len(pair[0]) <= max_len]
    if not fits:
        shortest = min((len(ids) for ids, _ in encoded), default=0)
        raise ValueError(f"no row of {len(encoded)} fits max_len={max_len}; the shortest has {shortest} tokens")
    return fits, len(encoded) - len(fits)


def stack_rows(rows: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> dict[str, np.ndarray]:
    """{"tokens": int32 [n, T], "mask": bool [n, T], "lengths": int32 [n]} of (ids, mask) pairs, padded with 0 to the
    longest. Raises ValueError for a row without anything to learn: its loss would be 0 / 0."""
    width = max(len(ids) for ids, _ in rows)
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for at, (ids, learned) in enumerate(rows):
        if not np.any(np.asarray(learned)[1:]):  # nothing predicts the first token
            raise ValueError(f"row {at} of {len(rows)} has no token to learn: the policy wrote nothing in it")
        tokens[at, : len(ids)], mask[at, : len(ids)] = ids, learned
    return {"tokens": tokens, "mask": mask, "lengths": np.array([len(ids) for ids, _ in rows], np.int32)}


def trajectory_rows(trajectory: Trajectory, keep: Sequence[int]) -> dict[str, np.ndarray]:
    """The rows ``keep`` of a rollout as supervised rows: exactly the ids that were sampled, nothing encoded again."""
    return stack_rows(
        [
            (trajectory.ids[row][:length].tolist(), trajectory.sampled[row][:length].tolist())
            for row, length in ((row, int(trajectory.lengths[row])) for row in keep)
        ]
    )


def pad_rows(rows: Mapping[str, np.ndarray], count: int, width: int) -> dict[str, np.ndarray]:
    """Supervised rows padded to ``count`` rows of ``width`` tokens; what is added is never learned.

    Raises ValueError when there are more rows or tokens than that.
    """
    n, size = rows["tokens"].shape
    if n > count or size > width:
        raise ValueError(f"{n} rows of {size} tokens do not fit {count} rows of {width}")
    pad = ((0, count - n), (0, width - size))
    out = {name: np.pad(np.asarray(rows[name]), pad) for name in ("tokens", "mask")}
    return {**out, "lengths": np.pad(np.asarray(rows["lengths"], np.int32), (0, count - n))}
