"""Mixture-of-experts layers: routing with experts that can be masked, and three dropless ways to run the experts.

``dense`` runs every expert on every token and is the reference. ``block`` sorts the (token, choice) pairs by expert and
runs them in blocks of one expert each: its work grows with top-k, not with the number of experts; the default on CPU.
``ragged`` is the same with ``lax.ragged_dot``, a grouped matrix product on TPU; the default elsewhere. All agree to
rounding in values and gradients.

Letters: M tokens, E experts, k choices per token, D width, F feed-forward width of one expert.
"""

import jax
import jax.numpy as jnp
import numpy as np

from models.config import Config
from models.params import Params
from models.taps import Taps


def check_expert_mask(mask: np.ndarray, config: Config) -> None:
    """Raise ValueError unless ``mask`` is bool [L, E] and keeps at least top_k experts in every layer."""
    mask = np.asarray(mask)
    if mask.shape != (config.layers, config.experts) or mask.dtype != bool:
        raise ValueError(
            f"expert_mask must be bool [layers, experts] = [{config.layers}, {config.experts}], got {mask.dtype} "
            f"{list(mask.shape)}"
        )
    kept = mask.sum(axis=1)
    if (kept < config.top_k).any():
        layer = int(np.argmin(kept))
        raise ValueError(
            f"expert_mask keeps {int(kept[layer])} experts in layer {layer}, fewer than the {config.top_k} that each "
            "token is sent to"
        )


def route(x: jax.Array, layer: Params, config: Config, taps: Taps) -> tuple[jax.Array, jax.Array]:
    """Chosen experts int32 [M, k] and their weights float32 [M, k] for tokens x [M, D].

    Softmax over the experts that are not masked, then top-k; with ``norm_topk`` the weights of a token sum to 1.
    layer: "router" [D, E], and "expert_mask" bool [E] if some are masked: those are never chosen.
    """
    logits = jnp.einsum("md,de->me", x, layer["router"].astype(x.dtype)).astype(jnp.float32)
    if "expert_mask" in layer:
        logits = jnp.where(layer["expert_mask"], logits, -jnp.inf)
    logits = taps("moe.logits", logits)
    weights, index = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), config.top_k)
    if config.norm_topk:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return taps("moe.index", index), taps("moe.weights", weights)


def _expert(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, product) -> jax.Array:
    """One feed-forward network, or a group of them; ``product`` says how rows meet matrices."""
    return product(jax.nn.silu(product(x, gate)) * product(x, up), down)


def _dense(x, gate, up, down, index, weights):
    M, E = x.shape[0], gate.shape[0]
    share = jnp.zeros((M, E), jnp.float32).at[jnp.arange(M)[:, None], index].add(weights)
    act = jax.nn.silu(jnp.einsum("md,edf->mef", x, gate)) * jnp.einsum("md,edf->mef", x, up)
    return jnp.einsum("mef,efd,me->md", act, down, share.astype(x.dtype))


def _ragged(x, gate, up, down, index, weights):
    M, k = index.shape
    order = jnp.argsort(index.reshape(-1), stable=True)
    sizes = jnp.bincount(index.reshape(-1), length=gate.shape[0]).astype(jnp.int32)
    out = _expert(x[order // k], gate, up, down, lambda a, w: jax.lax.ragged_dot(a, w, sizes))
    back = jnp.zeros_like(order).at[order].set(jnp.arange(M * k), unique_indices=True)
    return jnp.einsum("mkd,mk->md", out[back].reshape(M, k, -1), weights.astype(x.dtype))


def block_size(tokens: int, top_k: int, experts: int) -> int:
    """Rows per block: about the pairs that an expert gets, between 8 and 128, a power of two."""
    share = max(1, tokens * top_k // experts)
    return min(128, max(8, 1 << (share - 1).bit_length()))


def _block(x, gate, up, down, index, weights):
    (M, k), E = index.shape, gate.shape[0]
    size = block_size(M, k, E)
    blocks = M * k // size + min(E, M * k)  # an expert fills its blocks but for the last
    flat = index.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    counts = jnp.bincount(flat, length=E)
    ends = jnp.cumsum(-(-counts // size) * size)  # in slots: every expert's run is padded to whole blocks
    first = ends - -(-counts // size) * size
    rank = jnp.arange(M * k) - (jnp.cumsum(counts) - counts)[flat[order]]
    slot_of_sorted = first[flat[order]] + rank
    slots = jnp.zeros(M * k, slot_of_sorted.dtype).at[order].set(slot_of_sorted, unique_indices=True)
    token = jnp.full(blocks * size, M).at[slot_of_sorted].set(order // k, unique_indices=True)  # M: an empty slot
    rows = jnp.where((token < M)[:, None], x[jnp.minimum(token, M - 1)], 0).reshape(blocks, size, -1)
    owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(blocks) * size, side="right"), E - 1)

    def step(_, block):
        rows, e = block
        return None, _expert(rows, gate[e], up[e], down[e], jnp.matmul)

    out = jax.lax.scan(step, None, (rows, owner))[1].reshape(blocks * size, -1)
    return jnp.einsum("mkd,mk->md", out[slots].reshape(M, k, -1), weights.astype(x.dtype))


_FORMS = {"dense": _dense, "block": _block, "ragged": _ragged}


def moe(x: jax.Array, layer: Params, config: Config, taps: Taps) -> jax.Array:
    """The feed-forward part of a block with experts: x [B, T, D] -> [B, T, D].

    layer: "router" [D, E]; "e_gate", "e_up" [E, D, F], "e_down" [E, F, D]; optionally "expert_mask" bool [E].
    """
    flat = x.reshape(-1, x.shape[-1])
    index, weights = route(flat, layer, config, taps)
    form = config.moe_form
    if form == "auto":
        form = "block" if jax.default_backend() == "cpu" else "ragged"
    matrices = (layer[name].astype(x.dtype) for name in ("e_gate", "e_up", "e_down"))
    out = _FORMS[form](flat, *matrices, index, weights)
    return taps("moe.routed", out.reshape(x.shape))


def keep_experts(params: Params, config: Config, mask: np.ndarray) -> tuple[Params, Config]:
    """The smaller model that holds only the experts where ``mask`` (bool [L, E]) is True; its outputs are those of the
    masked one.

    Raises ValueError for a mask that keeps too few, or not equally many in every layer: one checkpoint has one count.
    """
    check_expert_mask(mask, config)
    kept = np.asarray(mask).sum(axis=1)
    if len(set(kept.tolist())) > 1:
        raise ValueError(
            f"the mask keeps {kept.min()} to {kept.max()} experts per layer, a checkpoint has one number for all; mask "
            "instead, or keep equally many"
        )
    chosen = jnp.asarray(np.stack([np.flatnonzero(row) for row in np.asarray(mask)]))  # [L, kept]
    layers = dict(params["layers"])
    for name in ("e_gate", "e_up", "e_down"):
        layers[name] = jnp.take_along_axis(layers[name], chosen[:, :, None, None], axis=1)
    layers["router"] = jnp.take_along_axis(layers["router"], chosen[:, None, :], axis=2)
    return {**params, "layers": layers}, config.replace(experts=int(kept[0]))
