"""The file that a set of knowledge neurons is kept in: JSON, one list of indices per layer and condition.

Its fields are "model", "n_layers", "width", "firing", "conditions", "rate", "filter_q", "bar_q", and "internal" and
"external" with sorted indices in exactly ``n_layers`` lists (our reading, after the nested lists of LAPE's code, arXiv
2402.16438).
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis.neurons import CONDITIONS, Selection, check_dense, check_mask
from models.config import Config


@dataclasses.dataclass(frozen=True)
class NeuronFile:
    """model: a name for people. conditions: how the two conditions were made, such as "conflict". selection: how
    neurons were chosen; ``assign`` and ``min_tokens`` are not kept. internal, external: bool [L, F]."""

    model: str
    conditions: str
    selection: Selection
    internal: np.ndarray
    external: np.ndarray


def neuron_lists(neurons: np.ndarray) -> list[list[int]]:
    """bool [L, F] -> the sorted indices of each layer."""
    return [np.flatnonzero(layer).tolist() for layer in np.asarray(neurons)]


def neuron_mask(lists: Sequence[Sequence[int]], layers: int, width: int, name: str = "neurons") -> np.ndarray:
    """Lists of indices, one for each of ``layers`` -> bool [layers, width]. Raises ValueError naming ``name``, the
    layer and the index for another number of lists and for indices that are out of range or not in increasing order."""
    if not isinstance(lists, Sequence) or len(lists) != layers:
        found = f"{len(lists)} lists" if isinstance(lists, Sequence) else repr(lists)
        raise ValueError(f"{name} must hold one list of indices for each of {layers} layers, got {found}")
    mask = np.zeros((layers, width), bool)
    for layer, indices in enumerate(lists):
        for f in indices:
            if type(f) is not int or not 0 <= f < width:
                raise ValueError(f"{name}, layer {layer}: neuron {f!r} is not one of 0 .. {width - 1}")
        if any(a >= b for a, b in itertools.pairwise(indices)):
            raise ValueError(f"{name}, layer {layer}: indices must increase, got {list(indices)[:8]}")
        mask[layer, list(indices)] = True
    return mask


def write_neurons(path: str | os.PathLike, file: NeuronFile, config: Config) -> None:
    """Write ``file`` as JSON. Raises ValueError for masks that are not of the model of ``config``."""
    check_dense(config)
    lists = {name: neuron_lists(check_mask(getattr(file, name), config)) for name in CONDITIONS}
    chosen = file.selection
    head = {
        "model": file.model, "n_layers": config.layers, "width": config.ffn_dim, "firing": chosen.firing,
        "conditions": file.conditions, "rate": chosen.rate, "filter_q": chosen.filter_quantile,
        "bar_q": chosen.bar_quantile,
    }  # fmt: skip
    Path(path).write_text(json.dumps({**head, **lists}) + "\n", encoding="utf-8")


_FIELDS = {
    "model": str, "n_layers": int, "width": int, "firing": str, "conditions": str, "rate": (int, float),
    "filter_q": (int, float), "bar_q": (int, float), "internal": list, "external": list,
}  # fmt: skip


def read_neurons(path: str | os.PathLike, config: Config | None = None) -> NeuronFile:
    """Read a file of :func:`write_neurons`; "bar_q" may be missing and is then "filter_q".

    config: of the model it is to be used with. Raises ValueError that names the file and the field for whatever does
    not fit.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError("it must hold a JSON object")
        return _parse(data, config)
    except ValueError as error:  # a JSONDecodeError is one
        raise ValueError(f"neuron file {os.fspath(path)}: {error}") from error


def _parse(data: dict, config: Config | None) -> NeuronFile:
    data = {"bar_q": data.get("filter_q"), **data}
    if unknown := sorted(set(data) - set(_FIELDS)):
        raise ValueError(f"unknown field {unknown[0]!r}; fields: {', '.join(_FIELDS)}")
    for name, kind in _FIELDS.items():
        if name not in data:
            raise ValueError(f"field {name!r} is missing")
        if not isinstance(data[name], kind) or isinstance(data[name], bool):
            raise ValueError(f"field {name!r} has the wrong type: {data[name]!r:.60}")
    layers, width = data["n_layers"], data["width"]
    if config is not None:
        check_dense(config)
        if (layers, width) != (config.layers, config.ffn_dim):
            raise ValueError(
                f"it is for {layers} layers of {width} neurons (n_layers, width), the model has {config.layers} of "
                f"{config.ffn_dim}"
            )
    selection = Selection(data["rate"], data["filter_q"], data["bar_q"], firing=data["firing"])
    masks = (neuron_mask(data[name], layers, width, name) for name in CONDITIONS)
    return NeuronFile(data["model"], data["conditions"], selection, *masks)
