"""The interface every trained sequential recommender has, and one jitted server for all of them."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.recsys.functional import check_histories, exclude_ids, fit_length, mask_pad, top_items


class SequenceModel(nnx.Module):
    """A module with an item table that turns a history into a state and a state into scores.

    Class attributes: ``forms`` (the training forms that are valid for it), ``uses_text`` (``last_state`` takes
    ``text_vectors`` [B, D]), ``trims_padding`` (shorter padded arrays give the same states, so a trainer may bucket
    by length), ``temperature`` (scores are divided by it in the softmax loss).
    """

    forms: ClassVar[tuple[str, ...]] = ("prefix", "all")
    uses_text: ClassVar[bool] = False
    trims_padding: ClassVar[bool] = True
    temperature = 1.0
    num_items: int
    max_len: int

    def states(self, history: jax.Array, lengths: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """[B, L] -> the state after every position, [B, L, d]; ``key`` switches dropout on."""
        raise NotImplementedError(f"{type(self).__name__} has no state per position: train it in the 'prefix' form")

    def last_state(self, history: jax.Array, lengths: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """[B, L] -> the state after the last item of each row, [B, d]."""
        raise NotImplementedError

    def item_table(self) -> jax.Array:
        """Item vectors [N+1, d]; row 0 is zero."""
        raise NotImplementedError

    def query(self, states: jax.Array) -> jax.Array:
        """What is multiplied with the item vectors; the state itself unless the model normalises it."""
        return states

    def scores(self, states: jax.Array) -> jax.Array:
        """States [..., d] -> scores [..., N+1]; column 0 (PAD) is -inf."""
        return mask_pad(self.query(states) @ self.item_table().T)

    def score_items(self, states: jax.Array, ids: jax.Array) -> jax.Array:
        """States [..., d] and ids [..., M] -> scores [..., M] of those items only (for sampled losses)."""
        return jnp.einsum("...d,...md->...m", self.query(states), self.item_table()[ids])

    def prepare(self) -> dict[str, jax.Array]:
        """Arrays that depend on the weights only, computed once for serving and passed to ``last_state`` by name."""
        return {}


def get_params(module: nnx.Module) -> dict[str, jax.Array]:
    """Trainable arrays by name ("blocks/0/wq"): a flat dict, which every checkpoint format can hold."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.state(module, nnx.Param))
    return {_name(path): leaf for path, leaf in leaves}


def set_params(module: nnx.Module, params: dict[str, Any]) -> nnx.Module:
    """A new module with these trainable arrays (as :func:`get_params` names them); frozen arrays are shared.

    Raises ValueError naming what is missing, unknown or of another shape.
    """
    graphdef, state, rest = nnx.split(module, nnx.Param, ...)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
    names = [_name(path) for path, _ in leaves]
    if set(names) != set(params):
        raise ValueError(
            f"parameters do not fit {type(module).__name__}: missing {sorted(set(names) - set(params))}, "
            f"unknown {sorted(set(params) - set(names))}"
        )
    for name, (_, leaf) in zip(names, leaves, strict=True):
        if tuple(params[name].shape) != leaf.shape:
            raise ValueError(f"parameter {name} must have shape {leaf.shape}, got {tuple(params[name].shape)}")
    return nnx.merge(graphdef, treedef.unflatten([jnp.asarray(params[name]) for name in names]), rest)


def _name(path: tuple) -> str:
    parts = [str(getattr(p, "key", getattr(p, "idx", getattr(p, "name", p)))) for p in path]
    return "/".join(part for part in parts if part not in ("value", "raw_value"))


@partial(jax.jit, static_argnums=0)
def _prepare(graphdef: Any, state: Any) -> dict[str, jax.Array]:
    return nnx.merge(graphdef, state).prepare()


@partial(jax.jit, static_argnums=0)
def _scores(graphdef: Any, state: Any, prepared: Any, history: Any, lengths: Any, text: Any) -> jax.Array:
    module = nnx.merge(graphdef, state)
    history, lengths = fit_length(history, lengths, module.max_len)
    extra = {"text_vectors": text} if module.uses_text else {}
    return module.scores(module.last_state(history, lengths, **extra, **prepared))


@partial(jax.jit, static_argnums=(0, 6))
def _recommend(graphdef: Any, state: Any, prepared: Any, history: Any, lengths: Any, text: Any, k: int, exclude: Any):
    scores = _scores(graphdef, state, prepared, history, lengths, text)
    return top_items(scores if exclude is None else exclude_ids(scores, exclude), k)


class Recommender:
    """Serves a trained model: batched, jitted, deterministic; weights are captured when it is made.

    One call answers a whole batch and compiles once per shape. Calls of different batch size would each compile, so
    batches are padded up to a power of two of at least ``SMALLEST`` rows, and more than ``LARGEST`` rows go in parts
    (rows are independent; neither shows).
    """

    SMALLEST, LARGEST = 64, 1024

    def __init__(self, module: SequenceModel):
        self.num_items, self.max_len, self.uses_text = module.num_items, module.max_len, module.uses_text
        self.text_dim = getattr(module, "text_dim", None)
        self._graphdef, self._state = nnx.split(module)
        self._prepared = _prepare(self._graphdef, self._state)

    def scores(self, history: np.ndarray, lengths: np.ndarray, text_vectors: np.ndarray | None = None) -> jax.Array:
        """Scores float32 [B, N+1] with id 0 at -inf. Arguments and errors as in :meth:`recommend`."""
        rows, arguments = self._batch(history, lengths, text_vectors)
        return _scores(self._graphdef, self._state, self._prepared, *arguments)[:rows]

    def recommend(
        self,
        history: np.ndarray,
        lengths: np.ndarray,
        text_vectors: np.ndarray | None = None,
        *,
        k: int,
        exclude_history: bool = False,
        exclude_seen: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best items: ids int32 [B, k] (distinct, never 0) and scores float32 [B, k], best first.

        Args:
          history: int [B, any], oldest first, right-padded; longer than ``max_len`` keeps the most recent ids.
          lengths: int [B], at least 1.
          text_vectors: float [B, D] preference vectors (models with ``uses_text``); None or a zero row = no text.
          k: number of items, 1 <= k <= number of items left after exclusion.
          exclude_history: leave out the items of ``history`` (all of it, also what ``max_len`` cuts off).
          exclude_seen: int [B, M] further ids to leave out, 0 = unused slot.

        Raises: ValueError (shapes, empty history, k), UnknownItemError (an id outside 1..N).
        """
        if not isinstance(k, int | np.integer) or not 1 <= k <= self.num_items:
            raise ValueError(f"k must be an integer in 1..{self.num_items} (the catalogue), got {k!r}")
        rows, arguments = self._batch(history, lengths, text_vectors)
        excluded = self._excluded(np.asarray(history), np.asarray(lengths), exclude_history, exclude_seen, int(k))
        if excluded is not None:
            excluded = _pad_rows(excluded, arguments[0].shape[0])
        parts = []
        for low in range(0, rows, self.LARGEST):
            chosen = slice(low, low + self.LARGEST)
            part, left_out = jax.tree.map(lambda x, chosen=chosen: x[chosen], (arguments, excluded))
            ids, scores = _recommend(self._graphdef, self._state, self._prepared, *part, int(k), left_out)
            parts.append((np.asarray(ids), np.asarray(scores)))
        ids, scores = (np.concatenate(part)[:rows] for part in zip(*parts, strict=True))
        return ids, scores

    def _batch(self, history: Any, lengths: Any, text: Any) -> tuple[int, tuple]:
        check_histories(history, lengths, self.num_items)
        history, lengths = np.asarray(history, np.int32), np.asarray(lengths, np.int32)
        rows = history.shape[0]
        if text is not None:
            if not self.uses_text:
                raise ValueError("this recommender takes no text: leave text_vectors out")
            if text.shape != (rows, self.text_dim):
                raise ValueError(f"text_vectors must be [{rows}, {self.text_dim}], got {tuple(text.shape)}")
        elif self.uses_text:
            text = np.zeros((rows, self.text_dim), np.float32)
        size = max(self.SMALLEST, 1 << (rows - 1).bit_length())
        if rows > self.LARGEST:
            size = -(-rows // self.LARGEST) * self.LARGEST
        text = None if text is None else _pad_rows(text, size)
        return rows, (_pad_rows(history, size), np.concatenate([lengths, np.ones(size - rows, np.int32)]), text)

    def _excluded(self, history, lengths, exclude_history: bool, seen: Any, k: int) -> np.ndarray | None:
        parts = []
        if exclude_history:
            parts.append(np.where(np.arange(history.shape[1]) < lengths[:, None], history, 0))
        if seen is not None:
            seen = np.asarray(seen)
            if seen.ndim != 2 or len(seen) != len(history):
                raise ValueError(f"exclude_seen must be [{len(history)}, M], got {seen.shape}")
            if seen.size and (seen.min() < 0 or seen.max() > self.num_items):
                bad = int(seen[(seen < 0) | (seen > self.num_items)][0])
                raise ValueError(f"exclude_seen holds id {bad}: ids are 1..{self.num_items}, 0 = unused slot")
            parts.append(seen)
        if not parts:
            return None
        ids = np.sort(np.concatenate(parts, axis=1).astype(np.int32), axis=1)
        fresh = (ids > 0) & np.concatenate([np.ones((len(ids), 1), bool), ids[:, 1:] != ids[:, :-1]], axis=1)
        left = self.num_items - fresh.sum(1)
        if (left < k).any():
            row = int(np.argmin(left))
            raise ValueError(f"row {row} has only {int(left[row])} items left after exclusion, fewer than k = {k}")
        return ids


def _pad_rows(array: np.ndarray, rows: int) -> np.ndarray:
    """Repeat row 0 up to ``rows`` rows (device arrays stay on the device)."""
    missing = rows - array.shape[0]
    if not missing:
        return array
    library = jnp if isinstance(array, jax.Array) else np
    return library.concatenate([array, library.repeat(array[:1], missing, axis=0)])
