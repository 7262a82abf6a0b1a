"""Hooks on the forward pass: record what flows through a named site, or edit it.

``record`` is a tuple of site names; the values come back stacked over the layers that have the site. ``edit`` maps a
site to a pytree with a ``__call__(x) -> x`` whose arrays have that layer axis in front: they are scanned along with the
layers, so an edit can differ by layer and new values never recompile. With neither, the compiled program is the one
without this module.

``reduce`` maps a name of the caller's to a :class:`Reduced`: what is kept of a layer is a function of some of its
sites, made before the next layer begins. A sum over a long prompt then costs the memory of the sum.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import struct

from models.config import Config

BLOCK_SITES = (
    "resid.pre", "attn.q", "attn.k", "attn.v", "attn.logits", "attn.probs", "attn.heads", "attn.out",
    "resid.mid", "mlp.gate", "mlp.act", "mlp.out", "resid.post",
    "moe.logits", "moe.index", "moe.weights", "moe.expert_out", "moe.expert_norm", "moe.routed",
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


@struct.dataclass
class AddToKeys:
    """Add to the "attn.logits" of the first n keys, in prompts of any length and while decoding: a key is wherever its
    token stands. ``value``: float [L, B or 1, N or 1, n], by layer, row and head; negative steers away. Works on blocks
    of queries."""

    value: jax.Array

    by_block = True  # no field: it has no annotation

    def __call__(self, scores: jax.Array, slots: jax.Array) -> jax.Array:
        B, K, G, _, S = scores.shape
        value = self.value[..., :S]
        value = jax.numpy.pad(value, ((0, 0), (0, 0), (0, S - value.shape[-1])))
        value = jax.numpy.broadcast_to(value, (value.shape[0], K * G, S)).reshape(-1, K, G, 1, S)
        return scores + value.astype(scores.dtype)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Reduced:
    """What to keep of the sites of one layer.

    sites: names of sites. function: ``{site: array} -> pytree``, called once per layer; its results come stacked over
    the layers that have all of these sites. With ``by_block`` it is for "attn.logits" and "attn.probs" of long prompts:
    called as ``function({site: [B, K, G, t, S]}, slots)`` for blocks of t queries that stand at ``slots`` int32
    [B or 1, t] (-1: no query), and its results are summed over the blocks. A function that is a pytree itself
    (``flax.struct.dataclass``) carries arrays that every layer sees whole; the sampler's programs take them as
    arguments, so that new numbers compile nothing.
    """

    sites: tuple[str, ...]
    function: Callable[..., Any]
    by_block: bool = False

    def __post_init__(self):
        if self.by_block and not set(self.sites) <= {"attn.logits", "attn.probs"}:
            raise ValueError(f"only attn.logits and attn.probs come in blocks of queries, not {', '.join(self.sites)}")

    def tree_flatten(self):
        if jax.tree_util.all_leaves([self.function]):  # a plain function is part of the program
            return (), (self.sites, self.function, self.by_block)
        return (self.function,), (self.sites, None, self.by_block)

    @classmethod
    def tree_unflatten(cls, static, children):
        sites, function, by_block = static
        return cls(sites, children[0] if children else function, by_block)


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


def check_sites(
    record: tuple[str, ...],
    edit: Mapping[str, Edit] | None,
    config: Config,
    reduce: Mapping[str, Reduced] | None = None,
) -> None:
    """Raise ValueError for a site that the model does not have, listing those that it has."""
    known = sites(config)
    reduced = [site for what in (reduce or {}).values() for site in what.sites]
    for name in (*record, *(edit or ()), *reduced):
        if name not in known:
            raise ValueError(f"unknown tap site {name!r}; sites: {', '.join(known)}")
    for name, what in (reduce or {}).items():
        here = [layers_of(config, layer, 1) for layer in {0, config.layers - 1}]  # one of either kind of layer
        if not any(set(what.sites) <= set(layer) for layer in here):
            raise ValueError(f"{name!r} reduces {', '.join(what.sites)}, which no layer has all of")
    if twice := set(record) & set(reduce or ()):
        raise ValueError(f"{sorted(twice)[0]!r} is both recorded and the name of something reduced; rename that")


class Taps:
    """Trace-time object handed through one block; collects what was asked for.

    An edit of attention scores that can work on blocks of queries has ``by_block = True`` and is called with the slots
    of the queries too, as :class:`Reduced` says.
    """

    def __init__(
        self,
        record: tuple[str, ...] = (),
        edit: Mapping[str, Edit] | None = None,
        reduce: Mapping[str, Reduced] | None = None,
    ):
        self.record, self.edit, self.reduce = record, edit or {}, reduce or {}
        self.values: dict[str, Any] = {}
        self._kept: dict[str, jax.Array] = {}
        self._needed = {site for what in self.reduce.values() for site in what.sites}

    def wants(self, name: str) -> bool:
        """Whether a site is recorded, edited or reduced as a whole."""
        reduced = any(name in what.sites and not what.by_block for what in self.reduce.values())
        edited = name in self.edit and not getattr(self.edit[name], "by_block", False)
        return name in self.record or edited or reduced

    def wants_blocks(self, name: str) -> bool:
        """Whether a site has a hook at all, be it one that works on blocks."""
        return name in self.record or name in self.edit or name in self._needed

    def __call__(self, name: str, x: jax.Array, slots: jax.Array | None = None) -> jax.Array:
        if name in self.edit:
            hook = self.edit[name]
            x = hook(x, slots) if getattr(hook, "by_block", False) else hook(x)
        if name in self.record:
            self.values[name] = x
        if name in self._needed:
            self._kept[name] = x
        return x

    def for_block(self) -> "Taps":
        """Hooks for one block of queries, whose values are its own."""
        blocks = {name: what for name, what in self.reduce.items() if what.by_block}
        return Taps((), {name: h for name, h in self.edit.items() if name.startswith("attn.")}, blocks)

    def reduce_block(self, slots: jax.Array) -> dict[str, Any]:
        """What the reductions by block make of the scores seen last."""
        blocks = {name: what for name, what in self.reduce.items() if what.by_block}
        return {name: w.function({s: self._kept[s] for s in w.sites}, slots) for name, w in blocks.items()}

    def finish(self) -> dict[str, Any]:
        """All values of the layer, at its end."""
        for name, what in self.reduce.items():
            if not what.by_block:
                self.values[name] = what.function({site: self._kept[site] for site in what.sites})
        return self.values
