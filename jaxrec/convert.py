"""Rewrite a model folder: in another dtype, or with fewer experts."""

import json
from pathlib import Path

import numpy as np


def read_expert_mask(path: str | Path) -> np.ndarray:
    """bool [layers, experts] from the JSON that EASY-EP publishes (arXiv 2504.06792): rows of 1.0 (kept) and 0.0.

    Raises ValueError naming file and row for anything else, FileNotFoundError.
    """
    path = Path(path)
    try:
        rows = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not (isinstance(rows, list) and rows and all(isinstance(row, list) and row for row in rows)):
        raise ValueError(f"{path}: an expert mask is a list of rows, one per layer, of 1.0 (kept) and 0.0 (removed)")
    for number, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(f"{path}: row {number} has {len(row)} values, row 0 has {len(rows[0])}")
        if any(isinstance(value, bool) or value not in (0, 1) for value in row):
            raise ValueError(f"{path}: row {number} holds something other than 0.0 and 1.0")
    return np.array(rows, bool)


def write_expert_mask(path: str | Path, mask: np.ndarray) -> None:
    """The published form: one line of floats, without a line break."""
    Path(path).write_text(json.dumps(np.asarray(mask, float).tolist()))


def convert(source: str, target: str | Path, dtype: str | None = None, keep_experts: str | Path | None = None) -> str:
    """Read ``source``, write ``target``; returns a line that says what was done.

    dtype: "float32", "bfloat16", or None for that of the file. keep_experts: an expert mask; the experts that it leaves
    out are removed. Raises ValueError (the mask does not fit, see ``models.moe``), OSError.
    """
    import models
    from models.moe import keep_experts as keep

    mask = None if keep_experts is None else read_expert_mask(keep_experts)
    model = models.load(source, dtype=dtype)
    before, count = model.config.num_params(), model.config.experts
    if mask is not None:
        if not count:
            raise ValueError(f"{source} is a dense {model.config.family} model: it has no experts to remove")
        params, config = keep(model.params, model.config, mask)
        model = model.replace(params=params, config=config)
    models.save(model, target)
    line = f"{target}: {model.config.num_params():,} of {before:,} weights, {model.params['embed'].dtype}"
    return line if mask is None else f"{line}; {model.config.experts} of {count} experts per layer"
