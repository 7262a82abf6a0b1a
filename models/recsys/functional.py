"""Pure functions that all sequential recommenders share: masks, losses, negatives, dropout, top-k, input checks.

Conventions (B batch, L history length, d width, N items): histories are int32 [B, L], **right-padded** with 0, the
id 0 is PAD and never an item, lengths are int32 [B] with 1 <= length <= L, score tables are [..., N+1] with
``-inf`` in column 0. A tie between equal scores goes to the smaller id.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

MASKED = -1e4  # additive attention mask; exp(-1e4 - max) is exactly 0 in float32


class UnknownItemError(KeyError, IndexError):
    """An item id outside 1..N. Both a KeyError (a catalogue look-up) and an IndexError (an embedding row)."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


def check_histories(history: np.ndarray, lengths: np.ndarray, num_items: int) -> None:
    """Check a padded batch on the host. Raises ValueError (shape, dtype, empty history), UnknownItemError (id)."""
    history, lengths = np.asarray(history), np.asarray(lengths)
    if history.ndim != 2 or lengths.shape != history.shape[:1]:
        raise ValueError(f"history must be [B, L] and lengths [B], got {history.shape} and {lengths.shape}")
    if not (np.issubdtype(history.dtype, np.integer) and np.issubdtype(lengths.dtype, np.integer)):
        raise ValueError(f"history and lengths must be integers, got {history.dtype} and {lengths.dtype}")
    if history.size == 0:
        raise ValueError("history holds no row or no column: pass at least one history with one item")
    bad = np.flatnonzero((lengths < 1) | (lengths > history.shape[1]))
    if bad.size:
        row = int(bad[0])
        raise ValueError(
            f"row {row} has length {int(lengths[row])} in a history of {history.shape[1]} columns: "
            "history must hold at least one known item"
        )
    real = np.arange(history.shape[1]) < lengths[:, None]
    bad_rows, bad_columns = np.nonzero(real & ((history < 1) | (history > num_items)))
    if bad_rows.size:
        row, column = int(bad_rows[0]), int(bad_columns[0])
        raise UnknownItemError(
            f"unknown item id {int(history[row, column])} at history row {row}, position {column}: "
            f"item ids are 1..{num_items}"
        )


def pad_histories(histories: Sequence[Sequence[int]], max_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids (oldest first) -> int32 [B, max_len] right-padded with the most recent ids, int32 lengths [B]."""
    counts = np.fromiter((len(h) for h in histories), np.int64, len(histories))
    flat = np.fromiter((i for h in histories for i in h), np.int64, int(counts.sum()))
    lengths = np.minimum(counts, max_len)
    starts = np.cumsum(counts) - lengths
    real = np.arange(max_len) < lengths[:, None]
    history = np.zeros((len(histories), max_len), np.int32)
    history[real] = flat[(starts[:, None] + np.arange(max_len))[real]]
    return history, lengths.astype(np.int32)


def fit_length(history: jax.Array, lengths: jax.Array, max_len: int) -> tuple[jax.Array, jax.Array]:
    """Bring [B, any] to [B, max_len]: pad on the right, or keep the most recent ``max_len`` ids of each row."""
    width = history.shape[1]
    if width < max_len:
        history = jnp.pad(history, ((0, 0), (0, max_len - width)))
    elif width > max_len:
        start = jnp.maximum(lengths - max_len, 0)
        history = jnp.take_along_axis(history, start[:, None] + jnp.arange(max_len), axis=1)
        lengths = jnp.minimum(lengths, max_len)
    return clear_padding(history, lengths), lengths


def clear_padding(history: jax.Array, lengths: jax.Array) -> jax.Array:
    """Set every id at or after ``lengths`` to PAD, so padding is what the lengths say, whatever the array held."""
    return jnp.where(jnp.arange(history.shape[1]) < lengths[:, None], history, 0)


def gather_last(states: jax.Array, lengths: jax.Array) -> jax.Array:
    """[B, L, d] and lengths [B] -> the state at position length-1, [B, d]."""
    return jnp.take_along_axis(states, (lengths - 1)[:, None, None], axis=1)[:, 0]


def zero_row(table: jax.Array) -> jax.Array:
    """The table with row 0 (PAD) zero, for the forward pass *and* for the gradient.

    Since the gradient of row 0 is exactly 0 and its start value is 0, any optimiser (with or without weight decay)
    leaves the row at exactly 0.
    """
    return table.at[0].set(0.0)


def mask_pad(scores: jax.Array) -> jax.Array:
    """Scores [..., N+1] with PAD (column 0) at -inf."""
    return jnp.where(jnp.arange(scores.shape[-1]) == 0, -jnp.inf, scores)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; ``key=None`` or ``rate=0`` is the identity.

    The mask is a hash of the element's number keyed by two random words (murmur3 finaliser, two rounds): on CPU,
    drawing it with threefry costs as much as the rest of a small recommender, while this fuses into the product.
    """
    if key is None or rate == 0.0:
        return x
    seed = jax.random.bits(key, (2,), jnp.uint32)
    bits = (jax.lax.iota(jnp.uint32, x.size).reshape(x.shape) ^ seed[0]) * jnp.uint32(0x9E3779B1)
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B) + seed[1]
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    bits = bits ^ (bits >> 16)
    return jnp.where(bits >= jnp.uint32(rate * 2**32), x / (1.0 - rate), 0.0)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Layer normalisation over the last axis."""
    mean = x.mean(-1, keepdims=True)
    var = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + eps) * scale + bias


def unit(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """x / |x| over the last axis; a zero vector stays zero and has a zero (not NaN) gradient."""
    square = jnp.sum(x * x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, eps))


def cross_entropy(scores: jax.Array, targets: jax.Array) -> jax.Array:
    """Full-softmax loss per row: scores [..., N+1] (PAD at -inf), targets [...] -> [...]; 0 where the target is 0."""
    picked = jnp.take_along_axis(scores, jnp.maximum(targets, 1)[..., None], axis=-1)[..., 0]
    return jnp.where(targets > 0, jax.nn.logsumexp(scores, axis=-1) - picked, 0.0)


def bpr(positive: jax.Array, negative: jax.Array) -> jax.Array:
    """-log(1e-10 + sigmoid(s_pos - s_neg)) per pair (arXiv:1205.2618 with RecBole's guard)."""
    return -jnp.log(1e-10 + jax.nn.sigmoid(positive - negative))


def bce(positive: jax.Array, negative: jax.Array) -> jax.Array:
    """-log sigmoid(s_pos) - log(1 - sigmoid(s_neg)) per pair, the loss of arXiv:1808.09781 eq. 7."""
    return jax.nn.softplus(-positive) + jax.nn.softplus(negative)


def draw_negatives(key: jax.Array, seen: jax.Array, num_items: int, count: int = 1) -> jax.Array:
    """Uniform ids of 1..N that are *not* in ``seen`` [B, M] (0 = nothing), exactly, without rejection -> [B, count].

    With the seen ids sorted and distinct, s_j - 1 - j unseen ids lie below s_j; a uniform rank among the unseen is
    therefore shifted by the number of j with s_j - 1 - j <= rank. A row that has seen every item gets id N.
    """
    ordered = jnp.sort(jnp.where(seen > 0, seen, num_items + 1), axis=1)
    repeated = jnp.concatenate([jnp.zeros_like(ordered[:, :1], bool), ordered[:, 1:] == ordered[:, :-1]], axis=1)
    ordered = jnp.sort(jnp.where(repeated, num_items + 1, ordered), axis=1)
    distinct = (ordered <= num_items).sum(1)
    free = jnp.maximum(num_items - distinct, 1)
    rank = jnp.minimum(jnp.floor(jax.random.uniform(key, (seen.shape[0], count)) * free[:, None]), free[:, None] - 1)
    below = ordered - 1 - jnp.arange(seen.shape[1])
    below = jnp.where(ordered <= num_items, below, num_items + 1)
    shift = jax.vmap(lambda b, r: jnp.searchsorted(b, r, side="right"))(below, rank.astype(jnp.int32))
    return jnp.minimum(1 + rank.astype(jnp.int32) + shift, num_items)


def exclude_ids(scores: jax.Array, ids: jax.Array) -> jax.Array:
    """Scores [B, N+1] with the listed ids [B, M] at -inf (0 marks an unused slot; PAD is -inf anyway)."""
    return scores.at[jnp.arange(scores.shape[0])[:, None], ids].set(-jnp.inf)


def top_items(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k best ids [B, k] int32 and their scores [B, k]; equal scores are ordered by the smaller id."""
    values, ids = jax.lax.top_k(scores, k)
    return ids.astype(jnp.int32), values
