"""Stop strings checked on token ids, on device.

A stop string need not begin or end at a token border: ``</a`` + ``>\\n`` also ends on ``</a>``. All stop strings are
put into one Aho-Corasick automaton over bytes; each token is run through it once per state ahead of time, which gives a
table ``next_state[state, token]``. During decoding, stopping costs one gather per row and token.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class StopTable:
    """next_state: int16 [states, V]. The last ``len(strings)`` states absorb: state ``first_accept + j`` = string j."""

    next_state: np.ndarray
    first_accept: int
    strings: tuple[str, ...]


def _automaton(patterns: Sequence[bytes]) -> tuple[np.ndarray, int]:
    """Byte automaton int16 [states, 256] whose last len(patterns) states absorb. The match that ends first wins."""
    children: list[dict[int, int]] = [{}]
    found: list[int] = [-1]
    for j, pattern in enumerate(patterns):
        node = 0
        for byte in pattern:
            if byte not in children[node]:
                children[node][byte] = len(children)
                children.append({})
                found.append(-1)
            node = children[node][byte]
        found[node] = j if found[node] < 0 else found[node]
    table = np.zeros((len(children), 256), np.int32)
    fail = [0] * len(children)
    queue = deque([0])
    while queue:
        node = queue.popleft()
        if node and found[node] < 0:
            found[node] = found[fail[node]]
        table[node] = table[fail[node]] if node else 0
        for byte, child in children[node].items():
            fail[child] = table[fail[node], byte] if node else 0
            table[node, byte] = child
            queue.append(child)
    states = len(children)
    accept = np.array([states + j if j >= 0 else i for i, j in enumerate(found)], np.int32)
    table = accept[table]
    absorbing = np.repeat(states + np.arange(len(patterns), dtype=np.int32)[:, None], 256, axis=1)
    return np.concatenate([table, absorbing]).astype(np.int16), states


@functools.lru_cache(maxsize=16)
def stop_table(strings: tuple[str, ...], token_bytes: tuple[bytes, ...]) -> StopTable:
    """Table for ``strings`` over a vocabulary given as the bytes of every id. Cached: it depends on nothing else.

    Raises ValueError for an empty stop string.
    """
    if any(not s for s in strings):
        raise ValueError("a stop string must not be empty")
    byte_table, states = _automaton([s.encode() for s in strings])
    lengths = np.array([len(b) for b in token_bytes], np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    flat = np.frombuffer(b"".join(token_bytes), np.uint8)
    rows = len(byte_table)
    table = np.repeat(np.arange(rows, dtype=np.int16)[:, None], len(token_bytes), axis=1)
    for at in range(int(lengths.max(initial=0))):  # at most the longest token, each step over all states and tokens
        alive = np.flatnonzero(lengths > at)
        table[:, alive] = byte_table[table[:, alive], flat[offsets[alive] + at]]
    return StopTable(table, states, strings)
