"""Hooks on the forward pass: record what flows through a named site, or edit it.

``record`` is a tuple of site names; the values come back stacked over the layers that have the site. ``edit`` maps a
site to a pytree with a ``__call__(x) -> x`` whose arrays have that layer axis in front: they are scanned along with the
layers, so an edit can differ by layer and new values never recompile. With neither, the compiled program is the one
without this module.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import struct

from models.config import Config

BLOCK_SITES = (
    "resid.pre", "attn.q", "attn.k", "attn.v", "attn.logits", "attn.probs", "attn.heads", "attn.out",
    "resid.mid", "mlp.gate", "mlp.act", "mlp.out", "resid.post",
    "moe.logits", "moe.index", "moe.weights", "moe.expert_out", "moe.routed",
)  # fmt: skip
EDGE_SITES = ("embed", "final")
SITES = EDGE_SITES + BLOCK_SITES

Edit = Callable[[jax.Array], jax.Array]


@struct.dataclass
class Scale:
    """Multiply a site. ``value``: [L, ...] broadcast against the site's trailing dimensions."""

    value: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.value.astype(x.dtype)


@struct.dataclass
class Add:
    """Add to a site. ``value``: [L, ...]; zeros plus ``jax.grad`` with respect to it is an attribution gradient."""

    value: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.value.astype(x.dtype)


@struct.dataclass
class Replace:
    """Where ``mask`` (bool, [L, ...]) holds, put ``value`` ([L, ...])."""

    mask: jax.Array
    value: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.numpy.where(self.mask, self.value.astype(x.dtype), x)


_DENSE_ONLY = ("mlp.gate", "mlp.act")
_EXPERTS_ONLY = tuple(name for name in BLOCK_SITES if name.startswith("moe."))


def layers_of(config: Config, first: int, count: int) -> dict[str, slice]:
    """The sites of the layers ``first`` to ``first + count``, which are alike: site -> where they stand on its axis of
    layers, which counts only layers that have the site."""
    is_moe = bool(config.experts) and first >= config.first_dense
    out = {}
    for name in BLOCK_SITES:
        if name in (_DENSE_ONLY if is_moe else _EXPERTS_ONLY):
            continue
        start = first - config.first_dense if name in _EXPERTS_ONLY else first  # dense layers come first
        out[name] = slice(start, start + count)
    return out


def sites(config: Config) -> tuple[str, ...]:
    """The sites that a model has: a dense layer has "mlp.gate" and "mlp.act", one with experts the "moe." ones."""
    absent = () if config.experts else _EXPERTS_ONLY
    if config.experts and not config.first_dense:
        absent = _DENSE_ONLY
    return tuple(name for name in SITES if name not in absent)


def check_sites(record: tuple[str, ...], edit: Mapping[str, Edit] | None, config: Config) -> None:
    """Raise ValueError for a site that the model does not have, listing those that it has."""
    known = sites(config)
    for name in (*record, *(edit or ())):
        if name not in known:
            raise ValueError(f"unknown tap site {name!r}; sites: {', '.join(known)}")


class Taps:
    """Trace-time object handed through one block; collects what was asked for."""

    def __init__(self, record: tuple[str, ...] = (), edit: Mapping[str, Edit] | None = None):
        self.record = record
        self.edit = edit or {}
        self.values: dict[str, Any] = {}

    def wants(self, name: str) -> bool:
        """Whether a site is recorded or edited."""
        return name in self.record or name in self.edit

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        if name in self.edit:
            x = self.edit[name](x)
        if name in self.record:
            self.values[name] = x
        return x
