"""Low-rank changes to frozen weights (LoRA, arXiv 2106.09685): add them, train them alone, merge them.

A config with ``lora_rank`` declares, for each matrix that ``lora_on`` names, an ``Adapted`` in its place: the matrix,
and two small ones whose product is added. Initial values, shardings and checkpoints follow from the declaration as for
all parameters. Training (``rl.optimizer``) differentiates and steps the small matrices only, so gradients and the
optimiser's state are as small as they are. Any matrix can be named: of attention, of a feed-forward network, of experts
(each gets its own change), the router, "embed" and "head".
"""

from collections.abc import Sequence
from typing import Any

import jax

from models.config import Config
from models.linear import Adapted, dense
from models.params import Param, Params, declare, init_leaf
from models.sharding import sharding_for


def _is_adapted(leaf: Any) -> bool:
    return isinstance(leaf, Adapted)


def add(params: Params, config: Config, key: jax.Array, mesh: jax.sharding.Mesh | None = None) -> Params:
    """``params`` of a plain model with changes as ``config`` (with ``lora_rank``) declares them, all of them 0: one
    factor random, the other zeros, both float32.

    Raises ValueError where ``config`` has no ``lora_rank`` or names a matrix that the model does not have.
    """
    if not config.lora_rank:
        raise ValueError("lora_rank is 0: set it, and lora_on, to have low-rank changes")
    is_leaf = lambda leaf: isinstance(leaf, Param | Adapted)  # noqa: E731
    declared, tree = jax.tree.flatten(declare(config), is_leaf=is_leaf)
    keys = jax.random.split(key, len(declared))

    def small(param: Param, key: jax.Array) -> jax.Array:
        place = sharding_for(mesh, param.shape, param.axes)
        return jax.jit(lambda key: init_leaf(param, key, config, "float32"), out_shardings=place)(key)

    leaves = [
        Adapted(w, small(p.a, k), small(p.b, k), p.scale) if isinstance(p, Adapted) else w
        for w, p, k in zip(tree.flatten_up_to(params), declared, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, leaves)


def adapt(model, rank: int, on: Sequence[str], alpha: float, key: jax.Array, mesh: jax.sharding.Mesh | None = None):
    """A loaded ``models.Model`` with changes of ``rank`` beside the matrices ``on``; itself where ``rank`` is 0."""
    if not rank:
        return model
    config = model.config.replace(lora_rank=rank, lora_on=tuple(on), lora_alpha=alpha)
    return model.replace(config=config, params=add(model.params, config, key, mesh))


def merge(params: Params, config: Config) -> tuple[Params, Config]:
    """The plain model that computes the same: changes added to their matrices, in the matrices' dtype."""
    if not config.lora_rank:
        return params, config
    return jax.tree.map(dense, params, is_leaf=_is_adapted), config.replace(lora_rank=0)


def split(params: Any) -> tuple[Any, Any]:
    """What is trained and what is frozen: two trees with None in the places of the other's leaves.

    With low-rank changes these alone are trained, ``{"a": .., "b": ..}`` each; without any, everything.
    """
    if not any(map(_is_adapted, jax.tree.leaves(params, is_leaf=_is_adapted))):
        return params, jax.tree.map(lambda _: None, params)
    trained = jax.tree.map(lambda p: {"a": p.a, "b": p.b} if _is_adapted(p) else None, params, is_leaf=_is_adapted)
    frozen = jax.tree.map(lambda p: p.replace(a=None, b=None) if _is_adapted(p) else p, params, is_leaf=_is_adapted)
    return trained, frozen


def combine(trained: Any, frozen: Any) -> Any:
    """The parameters that :func:`split` took apart."""
    if not any(map(_is_adapted, jax.tree.leaves(frozen, is_leaf=_is_adapted))):
        return trained

    def whole(p, small):
        return p.replace(**small) if _is_adapted(p) else p

    return jax.tree.map(whole, frozen, trained, is_leaf=_is_adapted)
