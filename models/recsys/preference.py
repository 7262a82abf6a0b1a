"""Preference texts for training the TRM, mixed on the device from phrase vectors (arXiv:2505.16810; the release
holds no training code, so the recipe is ours).

A training pair (history X, next item y) gets the normalised mean of a few phrase vectors. Drawn per pair:
with ``no_text`` the zero vector (so that serving without a text is in distribution), else with ``history_only``
phrases of the 1-2 most recent history items alone (so that the model cannot lean on leaked target text), else
phrases of y mixed with those of the recent items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from models.recsys.functional import unit


@struct.dataclass
class PhraseMixer:
    """Callable ``(key, batch) -> text vectors [B, D]`` for ``rl.recommender.fit(text=...)``; jittable, a pytree.

    vectors: float32 [P+1, D] unit phrase vectors, row 0 zero.  item_phrases: int32 [N+1, C] phrase ids, 0 = none.
    history_only: probability of a text from the history alone.  no_text: probability of no text at all.
    max_phrases: upper bound of phrases in one text (3-6 is what the policy is asked to write).
    """

    vectors: jax.Array
    item_phrases: jax.Array
    history_only: float = struct.field(pytree_node=False, default=0.3)
    no_text: float = struct.field(pytree_node=False, default=0.15)
    max_phrases: int = struct.field(pytree_node=False, default=6)

    def __call__(self, key: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
        """batch: history [B, L], lengths [B], targets [B]."""
        kind_key, second_key, pick_key, count_key = jax.random.split(key, 4)
        rows, slots = batch["targets"].shape[0], self.item_phrases.shape[1]
        kind = jax.random.uniform(kind_key, (rows,))
        with_text = kind >= self.no_text
        with_target = kind >= self.no_text + (1.0 - self.no_text) * self.history_only
        target = jnp.where(with_target[:, None], self.item_phrases[batch["targets"]], 0)
        second = jax.random.bernoulli(second_key, 0.5, (rows,)) & (batch["lengths"] > 1)
        recent = _recent(batch["history"], batch["lengths"], 0)
        before = jnp.where(second, _recent(batch["history"], batch["lengths"], 1), 0)
        ids = jnp.concatenate([target, self.item_phrases[recent], self.item_phrases[before]], axis=1)
        # one phrase of y always stays: its best-ranked slot is lifted above all others
        order = jnp.where(ids > 0, jax.random.uniform(pick_key, ids.shape), -1.0)
        first = jnp.argmax(order[:, :slots], axis=1)
        lift = (jnp.arange(ids.shape[1]) == first[:, None]) & (target[jnp.arange(rows), first] > 0)[:, None]
        order = order + 2.0 * lift
        width = min(self.max_phrases, ids.shape[1])
        best, picked = jax.lax.top_k(order, width)
        count = jax.random.randint(count_key, (rows, 1), min(3, width), width + 1)
        keep = (best >= 0) & (jnp.arange(width) < count) & with_text[:, None]
        chosen = jnp.where(keep, jnp.take_along_axis(ids, picked, axis=1), 0)
        return mean_vectors(self.vectors, chosen)

    def oracle(self, targets: np.ndarray | jax.Array) -> jax.Array:
        """Text vectors [B, D] of all phrases of the targets: the upper end that shows the text branch is used."""
        return mean_vectors(self.vectors, self.item_phrases[jnp.asarray(targets)])

    def from_history(self, history: np.ndarray | jax.Array, lengths: np.ndarray | jax.Array) -> jax.Array:
        """Text vectors [B, D] of the phrases of the two most recent items: what is known without the target."""
        history, lengths = jnp.asarray(history), jnp.asarray(lengths)
        before = jnp.where(lengths > 1, _recent(history, lengths, 1), 0)
        recent = _recent(history, lengths, 0)
        return mean_vectors(
            self.vectors, jnp.concatenate([self.item_phrases[recent], self.item_phrases[before]], axis=1)
        )


def _recent(history: jax.Array, lengths: jax.Array, back: int) -> jax.Array:
    position = jnp.maximum(lengths - 1 - back, 0)
    return jnp.take_along_axis(history, position[:, None], axis=1)[:, 0]


def mean_vectors(vectors: jax.Array, ids: jax.Array) -> jax.Array:
    """Bag of phrase ids [n, P] (0 = none) -> unit mean of their vectors [n, D]; zero where there is no phrase."""
    return unit(vectors[ids].sum(axis=1))


def phrase_mixer(
    phrases: Sequence[Sequence[str]],
    encode: Callable[[list[str]], np.ndarray],
    *,
    history_only: float = 0.3,
    no_text: float = 0.15,
    max_phrases: int = 6,
) -> PhraseMixer:
    """Build a mixer from the phrases of every item (row 0 = PAD, ignored) and a text encoder.

    Raises ValueError when no item has a phrase or a probability is outside 0..1.
    """
    if not (0.0 <= history_only <= 1.0 and 0.0 <= no_text <= 1.0):
        raise ValueError(f"history_only and no_text are probabilities, got {history_only} and {no_text}")
    known = sorted({p for row in phrases[1:] for p in row})
    if not known:
        raise ValueError("no item has a phrase: a preference text cannot be made; train with text=None")
    index = {p: i + 1 for i, p in enumerate(known)}
    table = np.zeros((len(phrases), max(len(row) for row in phrases[1:])), np.int32)
    for i, row in enumerate(phrases):
        if i:
            table[i, : len(row)] = [index[p] for p in row]
    vectors = np.asarray(encode(known), np.float32)
    vectors = np.concatenate([np.zeros((1, vectors.shape[1]), np.float32), vectors])
    return PhraseMixer(jnp.asarray(vectors), jnp.asarray(table), history_only, no_text, max_phrases)
