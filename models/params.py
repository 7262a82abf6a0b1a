"""One declaration per parameter: shape, logical axes, initialiser and its name in a Hugging Face checkpoint.

Initial values, shardings, restore targets, import and export are all derived from :func:`declare`, so a parameter is
described in exactly one place.

HF names hold ``{layer}`` where the layer index goes. A HF linear stores ``[out, in]``; ours store ``[in, out]`` with
heads unfolded, so ``transpose`` says whether the matrix is turned on the way in and out.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.config import Config
from models.sharding import sharding_for

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Param:
    """Declaration of one array.

    shape: full shape, with the leading layer axis for per-layer weights.
    axes: one logical axis name per dimension (see ``models.sharding.RULES``).
    init: "normal" (std ``init_std``), "residual" (std scaled by 1/sqrt(2 L)), "ones" or "zeros".
    hf: name in a HF checkpoint, ``{layer}`` for the layer index, ``{expert}`` for the expert's.
    transpose: the HF matrix is ``[out, in]`` and is turned; heads are folded in HF and unfolded here.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: str
    hf: str
    transpose: bool = False

    @property
    def stacked(self) -> int:
        """Number of leading axes that a file has a tensor each for: layers, then experts."""
        return sum(name in ("layers", "experts") for name in self.axes[:2])

    @property
    def hf_names(self) -> list[str]:
        """Names of its tensors, in the order of the leading axes."""
        fields = [dict(zip(("layer", "expert"), at)) for at in np.ndindex(self.shape[: self.stacked])]
        return [self.hf.format(**field) for field in fields]

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape of one tensor in the HF file."""
        shape, axes = self.shape[self.stacked :], self.axes[self.stacked :]
        if len(shape) == 1:
            return shape
        if "head_dim" in axes:  # [D, N, H] or [N, H, D] or [N, H]
            at = axes.index("head_dim")
            shape = shape[: at - 1] + (shape[at - 1] * shape[at],) + shape[at + 1 :]
        return shape[::-1] if self.transpose else shape


_EXPERT_NAMES = {  # by whether it is Mixtral
    False: {
        "router": "mlp.gate", "gate": "mlp.experts.{expert}.gate_proj", "up": "mlp.experts.{expert}.up_proj",
        "down": "mlp.experts.{expert}.down_proj",
    },
    True: {
        "router": "block_sparse_moe.gate", "gate": "block_sparse_moe.experts.{expert}.w1",
        "up": "block_sparse_moe.experts.{expert}.w3", "down": "block_sparse_moe.experts.{expert}.w2",
    },
}  # fmt: skip


def declare(config: Config) -> dict[str, Any]:
    """Nested dict of :class:`Param` for ``config``."""
    c = config
    scale = "zeros" if c.norm_offset else "ones"
    L, V, D, N, K, H, F = c.layers, c.vocab_size, c.dim, c.heads, c.kv_heads, c.head_dim, c.ffn_dim
    block = "model.layers.{layer}."

    def layer(shape, axes, init, hf, transpose=False):
        return Param((L, *shape), ("layers", *axes), init, block + hf + ".weight", transpose)

    layers = {
        "attn_norm": layer((D,), ("norm",), scale, "input_layernorm"),
        "wq": layer((D, N, H), ("embed", "heads", "head_dim"), "normal", "self_attn.q_proj", True),
        "wk": layer((D, K, H), ("embed", "kv_heads", "head_dim"), "normal", "self_attn.k_proj", True),
        "wv": layer((D, K, H), ("embed", "kv_heads", "head_dim"), "normal", "self_attn.v_proj", True),
        "wo": layer((N, H, D), ("heads", "head_dim", "embed"), "residual", "self_attn.o_proj", True),
        "mlp_norm": layer(
            (D,), ("norm",), scale, "pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"
        ),
    }
    if c.experts:
        E, names = c.experts, _EXPERT_NAMES[c.family == "mixtral"]
        layers["router"] = layer((D, E), ("embed", "router"), "normal", names["router"], True)
        layers["e_gate"] = layer((E, D, F), ("experts", "embed", "ffn"), "normal", names["gate"], True)
        layers["e_up"] = layer((E, D, F), ("experts", "embed", "ffn"), "normal", names["up"], True)
        layers["e_down"] = layer((E, F, D), ("experts", "ffn", "embed"), "residual", names["down"], True)
    else:
        layers["w_gate"] = layer((D, F), ("embed", "ffn"), "normal", "mlp.gate_proj", True)
        layers["w_up"] = layer((D, F), ("embed", "ffn"), "normal", "mlp.up_proj", True)
        layers["w_down"] = layer((F, D), ("ffn", "embed"), "residual", "mlp.down_proj", True)
    if c.qkv_bias:
        for name, heads, axis in (("q", N, "heads"), ("k", K, "kv_heads"), ("v", K, "kv_heads")):
            hf = f"{block}self_attn.{name}_proj.bias"
            layers["b" + name] = Param((L, heads, H), ("layers", axis, "head_dim"), "zeros", hf)
    if c.qk_norm:
        layers["q_norm"] = layer((H,), ("norm",), scale, "self_attn.q_norm")
        layers["k_norm"] = layer((H,), ("norm",), scale, "self_attn.k_norm")
    if c.qk_norm_whole:
        layers["q_norm"] = layer((N, H), ("heads", "head_dim"), scale, "self_attn.q_norm")
        layers["k_norm"] = layer((K, H), ("kv_heads", "head_dim"), scale, "self_attn.k_norm")
    if c.post_norms:
        layers["attn_post_norm"] = layer((D,), ("norm",), scale, "post_attention_layernorm")
        layers["mlp_post_norm"] = layer((D,), ("norm",), scale, "post_feedforward_layernorm")
    tree = {
        "embed": Param((V, D), ("vocab", "embed"), "normal", "model.embed_tokens.weight"),
        "layers": layers,
        "final_norm": Param((D,), ("norm",), scale, "model.norm.weight"),
    }
    if not c.tie_embeddings:
        tree["head"] = Param((D, V), ("embed", "vocab"), "normal", "lm_head.weight", True)
    return tree


def map_declared(function: Callable[[Param], Any], config: Config) -> Params:
    """Apply ``function`` to every declaration; the result has the tree of the parameters."""
    return jax.tree.map(function, declare(config), is_leaf=lambda leaf: isinstance(leaf, Param))


def abstract(config: Config, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None) -> Params:
    """Shapes, dtypes and (given a mesh) shardings of the parameters: the target of a restore or an import."""
    return map_declared(
        lambda p: jax.ShapeDtypeStruct(p.shape, jnp.dtype(dtype), sharding=sharding_for(mesh, p.shape, p.axes)), config
    )


def shardings(config: Config, mesh: jax.sharding.Mesh) -> Params:
    """A ``NamedSharding`` per parameter."""
    return map_declared(lambda p: sharding_for(mesh, p.shape, p.axes), config)


def _init_leaf(param: Param, key: jax.Array, config: Config, dtype: jnp.dtype) -> jax.Array:
    if param.init in ("ones", "zeros"):
        return getattr(jnp, param.init)(param.shape, dtype)
    std = config.init_std / (math.sqrt(2 * config.layers) if param.init == "residual" else 1.0)
    return (std * jax.random.normal(key, param.shape, jnp.float32)).astype(dtype)


def init(config: Config, key: jax.Array, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None) -> Params:
    """Random parameters (float32 by default), made in place on the mesh when one is given.

    Normal(0, ``init_std``) everywhere, output projections divided by sqrt(2 L) as in GPT-2; norms 1, biases 0.
    The values do not depend on the mesh.
    """
    leaves, tree = jax.tree.flatten(declare(config), is_leaf=lambda leaf: isinstance(leaf, Param))

    def make(key):
        keys = jax.random.split(key, len(leaves))
        arrays = [_init_leaf(p, k, config, jnp.dtype(dtype)) for p, k in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(tree, arrays)

    return jax.jit(make, out_shardings=shardings(config, mesh) if mesh is not None else None)(key)
