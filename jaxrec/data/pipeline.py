"""Batches from arrays in memory, through Grain, with a position that can be saved and restored.

Each element of the Grain source is a whole batch, taken from the arrays by one fancy index. That is several times
faster than Grain's element-wise ``map().batch()`` for small rows, and rows are still reshuffled every epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import grain

_ENDLESS = 1 << 40  # batches in a source that never ends; far beyond any run


class BatchSource:
    """Random access to the batches of all epochs: ``source[i]`` is a dict of numpy arrays [b, ...].

    The order of rows in an epoch depends on seed and epoch only, so that any batch can be made at any time.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        batch_size: int,
        seed: int,
        *,
        shuffle: bool = True,
        drop_remainder: bool = True,
        epochs: int | None = None,
    ) -> None:
        lengths = {name: len(array) for name, array in arrays.items()}
        if not lengths:
            raise ValueError("batches: no arrays given")
        if len(set(lengths.values())) != 1:
            raise ValueError(f"batches: arrays must have equally many rows, got {lengths}")
        if batch_size < 1 or (epochs is not None and epochs < 1):
            raise ValueError(f"batches: batch_size={batch_size}, epochs={epochs}; both must be at least 1")
        self.rows = next(iter(lengths.values()))
        if self.rows == 0 or (drop_remainder and self.rows < batch_size):
            raise ValueError(
                f"batches: {self.rows} rows make no batch of {batch_size}; lower it or pass drop_remainder=False"
            )
        self._arrays, self._batch, self._seed, self._shuffle = dict(arrays), batch_size, seed, shuffle
        self.batches_per_epoch = self.rows // batch_size if drop_remainder else -(-self.rows // batch_size)
        self._length = _ENDLESS if epochs is None else epochs * self.batches_per_epoch
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, batch = divmod(int(index), self.batches_per_epoch)
        low = batch * self._batch
        if not self._shuffle:
            return {name: array[low : low + self._batch] for name, array in self._arrays.items()}
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(self.rows)
        rows = self._order[1][low : low + self._batch]
        return {name: array[rows] for name, array in self._arrays.items()}


def batches(
    arrays: Mapping[str, np.ndarray],
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    drop_remainder: bool = True,
    epochs: int | None = None,
) -> grain.DatasetIterator:
    """Iterator over dicts of numpy batches [batch_size, ...], the arrays' rows in a new order every epoch.

    ``epochs=None`` never ends. ``get_state()`` / ``set_state()`` hold the position (any point, also mid-epoch); the
    iterator can be saved with ``grain.checkpoint.CheckpointSave`` beside an Orbax checkpoint. A state fits only the
    same arrays, batch size, seed and switches. Raises ValueError for arrays of unequal length or too few rows.
    """
    import grain

    source = BatchSource(arrays, batch_size, seed, shuffle=shuffle, drop_remainder=drop_remainder, epochs=epochs)
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # threads slow in-memory data down
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))
