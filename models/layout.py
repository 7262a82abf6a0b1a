"""The sampler's layout of the weights: made once per version of the weights, for steps that read every matrix once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from models import lora
from models.config import Config
from models.linear import quantize
from models.moe import check_expert_mask
from models.params import Param, Params, declare, stacks


def decode_weights(
    params: Params, config: Config, fuse: bool = True, expert_mask: jax.Array | None = None, int8: bool = False
) -> dict[str, Any]:
    """The sampler's layout of the weights: one dict per layer in ``config.dtype``.

    Unstacked once per weight version rather than sliced every step; on one device (``fuse``) q, k, v and gate, up are
    joined, which halves the number of small matrix products, and every matrix is stored [out, in]: with few rows the
    product then reads it in order (1.2x to 1.3x per step measured on CPU, long prefills unchanged). Under a mesh leave
    them apart, so that each keeps its own sharding. Low-rank changes are merged. expert_mask: bool [L, E], see
    ``models.transformer.forward``. int8: matrices in eight bits with a scale per output (embeddings: per token); norms,
    biases and routers stay as they are. Weights take a quarter of float32's memory; logits of two trained models of the
    embedded world move by 0.6 and 1.0 % (tests/bench/README.md), those of the tests' tiny random ones by 2 to 11 %
    (tests/models/test_int8.py).
    """
    if expert_mask is not None:
        check_expert_mask(expert_mask, config)
    weights = lay_out(params, config, fuse, int8)
    if expert_mask is None:
        return weights
    masks = iter(jnp.asarray(expert_mask))
    layers = ({**layer, "expert_mask": next(masks)} if "router" in layer else layer for layer in weights["layers"])
    return {**weights, "layers": tuple(layers)}


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def lay_out(params, config, fuse, int8):
    """The device program of :func:`decode_weights`."""
    params, config = lora.merge(params, config)
    exact = {name for name, p in _declared(config).items() if p.exact}

    def cast(name, w):
        return w if name in exact else w.astype(config.dtype)

    def one(stack, i):
        layer = {name: cast(name, w[i]) for name, w in params[stack].items()}
        if config.kv_lora:
            made = layer.pop("wkv_b")
            layer["wk_up"], layer["wv_up"] = made[..., : -config.value_dim], made[..., -config.value_dim :]
        if fuse:
            flat = lambda w: w.reshape(config.dim, -1).T  # noqa: E731
            if not config.kv_lora:
                layer["wqkv"] = jnp.concatenate([flat(layer.pop("w" + name)) for name in "qkv"], axis=0)
            if config.qkv_bias:
                layer["bqkv"] = jnp.concatenate([layer.pop("b" + name).reshape(-1) for name in "qkv"])
            layer["wo_out"] = layer.pop("wo").reshape(-1, config.dim).T
            for kind in ("w_", "s_"):
                if kind + "gate" in layer:
                    pair = layer.pop(kind + "gate").T, layer.pop(kind + "up").T
                    layer[kind + "gate_up"] = jnp.concatenate(pair, axis=0)
                    layer[kind + "down_out"] = layer.pop(kind + "down").T
        return {name: quantize(w, _ins(name, w)) if int8 and _is_matrix(name) else w for name, w in layer.items()}

    names = [name for name, _, _ in stacks(config)]
    top = {name: w.astype(config.dtype) for name, w in params.items() if name not in names}
    if fuse and "head" in top:
        top["head_out"] = top.pop("head").T
    if int8:  # a scale per token: per row of the embedding, per output of the head
        top |= {name: quantize(top[name], 0 if name == "head" else 1) for name in top if name != "final_norm"}
    return {**top, "layers": tuple(one(name, i) for name, _, count in stacks(config) for i in range(count))}


def _is_matrix(name: str) -> bool:
    """Of the sampler's layout: what eight bits are meant for."""
    return name.startswith(("w", "e_", "s_"))


def _ins(name: str, w: jax.Array) -> int | tuple[int, ...]:
    """The axes that one output of a product with this matrix sums over."""
    if name in ("wqkv", "wo_out") or name.startswith("e_") or name.endswith(("gate_up", "down_out")):
        return 1
    return {"wo": (0, 1), "wk_up": 2}.get(name, 0)


def _declared(config: Config) -> dict[str, Param]:
    return {name: p for stack, _, _ in stacks(config) for name, p in declare(config)[stack].items()}
