"""Many short sequences in rows of one length, through Grain, with the segments a model needs to keep them apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack(rows: Sequence[tuple[Sequence[int], Sequence[int]]], length: int, bins: int = 64) -> dict[str, np.ndarray]:
    """Rows of ids and of 0/1 (what is to be learned), several to a row of ``length`` tokens, first fit.

    Returns "tokens", "segment_ids" (from 1, 0 is padding), "positions" int32 [B, length] and "mask" float32, which is 0
    on each segment's first token, since nothing before it predicts it. Deterministic. Raises ValueError for a sequence
    that is longer than a row, naming its number, and when there is none.
    """
    import grain

    if not rows:
        raise ValueError("there is nothing to pack")
    for number, (ids, learn) in enumerate(rows):
        if not 0 < len(ids) <= length or len(ids) != len(learn):
            raise ValueError(
                f"sequence {number} has {len(ids)} tokens and {len(learn)} marks; a row has {length}: raise the length "
                "or leave the sequence out"
            )
    items = [{"tokens": np.asarray(i, np.int32), "mask": np.asarray(m, np.float32)} for i, m in rows]
    source = grain.MapDataset.source(items).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    packed = grain.experimental.FirstFitPackIterDataset(
        source, length_struct={"tokens": length, "mask": length}, num_packing_bins=bins, shuffle_bins=False
    )
    found = list(packed)
    stacked = {name: np.stack([row[name] for row in found]) for name in found[0]}
    segments, positions = stacked["tokens_segment_ids"], stacked["tokens_positions"]
    mask = np.where(positions == 0, 0.0, stacked["mask"])
    return {
        "tokens": stacked["tokens"].astype(np.int32), "mask": mask.astype(np.float32),
        "segment_ids": segments.astype(np.int32), "positions": positions.astype(np.int32),
    }  # fmt: skip
