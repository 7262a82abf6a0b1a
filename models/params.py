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
from models.linear import Adapted
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
    first: the number of its first layer in the model.
    exact: float32 whatever the dtype of the model.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: str
    hf: str
    transpose: bool = False
    first: int = 0
    exact: bool = False

    @property
    def stacked(self) -> int:
        """Number of leading axes that a file has a tensor each for: layers, then experts."""
        return sum(name in ("layers", "experts") for name in self.axes[:2])

    @property
    def hf_names(self) -> list[str]:
        """Names of its tensors, in the order of the leading axes."""
        places = np.ndindex(self.shape[: self.stacked])
        return [self.hf.format(layer=self.first + at[0], expert=at[-1]) if at else self.hf for at in places]

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


def _attention(c: Config, layer: Callable[..., Param]) -> dict[str, Param]:
    D, N, K, H = c.dim, c.heads, c.kv_heads, c.head_dim
    scale = "zeros" if c.norm_offset else "ones"
    heads, kv_heads = ("heads", "head_dim"), ("kv_heads", "head_dim")
    if c.kv_lora:
        return _latent_attention(c, layer)
    out = {
        "wq": layer((D, N, H), ("embed", *heads), "normal", "self_attn.q_proj", True),
        "wk": layer((D, K, H), ("embed", *kv_heads), "normal", "self_attn.k_proj", True),
        "wv": layer((D, K, H), ("embed", *kv_heads), "normal", "self_attn.v_proj", True),
        "wo": layer((N, H, D), (*heads, "embed"), "residual", "self_attn.o_proj", True),
    }
    if c.qkv_bias:
        for name, count, axis in (("q", N, "heads"), ("k", K, "kv_heads"), ("v", K, "kv_heads")):
            out["b" + name] = layer((count, H), (axis, "head_dim"), "zeros", f"self_attn.{name}_proj", part="bias")
    if c.qk_norm:
        out["q_norm"] = layer((H,), ("norm",), scale, "self_attn.q_norm")
        out["k_norm"] = layer((H,), ("norm",), scale, "self_attn.k_norm")
    if c.qk_norm_whole:
        out["q_norm"] = layer((N, H), heads, scale, "self_attn.q_norm")
        out["k_norm"] = layer((K, H), kv_heads, scale, "self_attn.k_norm")
    return out


def _latent_attention(c: Config, layer: Callable[..., Param]) -> dict[str, Param]:
    """DeepSeek's: a query from D or from its own latent, keys and values from one latent, with the shared turning key
    behind it in one matrix."""
    D, N, H, C = c.dim, c.heads, c.head_dim, c.kv_lora
    heads = ("heads", "head_dim")
    out = {
        "wkv_a": layer((D, C + c.rope_dim), ("embed", "latent"), "normal", "self_attn.kv_a_proj_with_mqa", True),
        "kv_a_norm": layer((C,), ("norm",), "ones", "self_attn.kv_a_layernorm"),
        "wkv_b": layer((C, N, H - c.rope_dim + c.value_dim), ("latent", *heads), "normal", "self_attn.kv_b_proj", True),
        "wo": layer((N, c.value_dim, D), (*heads, "embed"), "residual", "self_attn.o_proj", True),
    }
    if not c.q_lora:
        return out | {"wq": layer((D, N, H), ("embed", *heads), "normal", "self_attn.q_proj", True)}
    return out | {
        "wq_a": layer((D, c.q_lora), ("embed", "latent"), "normal", "self_attn.q_a_proj", True),
        "q_a_norm": layer((c.q_lora,), ("norm",), "ones", "self_attn.q_a_layernorm"),
        "wq_b": layer((c.q_lora, N, H), ("latent", *heads), "normal", "self_attn.q_b_proj", True),
    }


def _gated(layer: Callable[..., Param], dim: int, width: int, ours: str, hf: str) -> dict[str, Param]:
    """The three matrices of a gated feed-forward network."""
    return {
        ours + "gate": layer((dim, width), ("embed", "ffn"), "normal", hf + "gate_proj", True),
        ours + "up": layer((dim, width), ("embed", "ffn"), "normal", hf + "up_proj", True),
        ours + "down": layer((width, dim), ("ffn", "embed"), "residual", hf + "down_proj", True),
    }


def _mixture(c: Config, layer: Callable[..., Param]) -> dict[str, Param]:
    D, E, F, names = c.dim, c.experts, c.ffn_dim, _EXPERT_NAMES[c.family == "mixtral"]
    out = {
        "router": layer((D, E), ("embed", "router"), "normal", names["router"], True),
        "e_gate": layer((E, D, F), ("experts", "embed", "ffn"), "normal", names["gate"], True),
        "e_up": layer((E, D, F), ("experts", "embed", "ffn"), "normal", names["up"], True),
        "e_down": layer((E, F, D), ("experts", "ffn", "embed"), "residual", names["down"], True),
    }
    if c.router_score == "sigmoid":
        name = f"{names['router']}.e_score_correction"
        out["router_bias"] = layer((E,), ("router",), "zeros", name, part="bias", join="_", exact=True)
    return out | (_gated(layer, D, c.shared_dim, "s_", "mlp.shared_experts.") if c.shared_dim else {})


def _stack(c: Config, first: int, count: int, experts: bool) -> dict[str, Param]:
    """The layers ``first`` to ``first + count``, all alike."""
    scale = "zeros" if c.norm_offset else "ones"

    def layer(shape, axes, init, hf, transpose=False, part="weight", join=".", exact=False):
        name = f"model.layers.{{layer}}.{hf}{join}{part}"
        return Param((count, *shape), ("layers", *axes), init, name, transpose, first, exact)

    def norm(hf):
        return layer((c.dim,), ("norm",), scale, hf)

    before_mlp = "pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"
    out = {"attn_norm": norm("input_layernorm"), "mlp_norm": norm(before_mlp), **_attention(c, layer)}
    if c.post_norms:
        out["attn_post_norm"] = norm("post_attention_layernorm")
        out["mlp_post_norm"] = norm("post_feedforward_layernorm")
    if experts:
        return out | _mixture(c, layer)
    return out | _gated(layer, c.dim, c.dense_ffn_dim if c.first_dense else c.ffn_dim, "w_", "mlp.")


def stacks(config: Config) -> list[tuple[str, int, int]]:
    """The runs of layers that are alike, each stacked in a subtree of its own: (name, first layer, layers)."""
    c = config
    leading = [("dense_layers", 0, c.first_dense)] if c.first_dense else []
    return [*leading, ("layers", c.first_dense, c.layers - c.first_dense)]


def declare(config: Config) -> dict[str, Any]:
    """Nested dict of :class:`Param` for ``config``."""
    c = config
    tree = {"embed": Param((c.vocab_size, c.dim), ("vocab", "embed"), "normal", "model.embed_tokens.weight")}
    for name, first, count in stacks(c):
        tree[name] = _stack(c, first, count, bool(c.experts) and name == "layers")
    tree["final_norm"] = Param((c.dim,), ("norm",), "zeros" if c.norm_offset else "ones", "model.norm.weight")
    if not c.tie_embeddings:
        tree["head"] = Param((c.dim, c.vocab_size), ("embed", "vocab"), "normal", "lm_head.weight", True)
    return _with_changes(tree, c) if c.lora_rank else tree


def _is_matrix(p: Param) -> bool:
    """Not a norm or a bias."""
    return p.init in ("normal", "residual")


def _with_changes(tree: dict[str, Any], c: Config) -> dict[str, Any]:
    """The tree with an ``Adapted`` in the place of each matrix that ``lora_on`` names."""
    names, found = set(c.lora_on), set()

    def change(name: str, p: Param) -> Param | Adapted:
        if name not in names or not _is_matrix(p):
            return p
        found.add(name)
        ins = p.stacked + (2 if p.axes[p.stacked] == "heads" else 1)  # heads and their width come in together
        lead, r = p.stacked, c.lora_rank
        a = Param((*p.shape[:ins], r), (*p.axes[:ins], "rank"), "normal", "", first=p.first)
        b = Param((*p.shape[:lead], r, *p.shape[ins:]), (*p.axes[:lead], "rank", *p.axes[ins:]), "zeros", "")
        return Adapted(p, a, b, c.lora_alpha / r)

    stacked = {name for name, _, _ in stacks(c)}
    out = {
        name: {n: change(n, p) for n, p in part.items()} if name in stacked else change(name, part)
        for name, part in tree.items()
    }
    if names - found:
        matrices = sorted({n for name in stacked for n, p in tree[name].items() if _is_matrix(p)})
        matrices += [name for name in ("embed", "head") if name in tree]
        raise ValueError(
            f"lora_on names {sorted(names - found)}, which this model has no matrix of; it has {', '.join(matrices)}"
        )
    return out


def count(config: Config) -> int:
    """Number of weights, tied embeddings counted once, and low-rank changes not."""
    config = dataclasses.replace(config, lora_rank=0)
    leaves = jax.tree.leaves(declare(config), is_leaf=lambda leaf: isinstance(leaf, Param))
    return sum(math.prod(param.shape) for param in leaves)


def map_declared(function: Callable[[Param], Any], config: Config) -> Params:
    """Apply ``function`` to every declaration; the result has the tree of the parameters."""
    return jax.tree.map(function, declare(config), is_leaf=lambda leaf: isinstance(leaf, Param))


def _dtype(param: Param, dtype: str) -> jnp.dtype:
    return jnp.dtype("float32" if param.exact else dtype)


def abstract(config: Config, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None) -> Params:
    """Shapes, dtypes and (given a mesh) shardings of the parameters: the target of a restore or an import."""
    return map_declared(
        lambda p: jax.ShapeDtypeStruct(p.shape, _dtype(p, dtype), sharding=sharding_for(mesh, p.shape, p.axes)), config
    )


def shardings(config: Config, mesh: jax.sharding.Mesh) -> Params:
    """A ``NamedSharding`` per parameter."""
    return map_declared(lambda p: sharding_for(mesh, p.shape, p.axes), config)


def check_mesh(config: Config, mesh: jax.sharding.Mesh | None) -> None:
    """Raise ValueError where the ``tensor`` axis of a mesh does not divide the attention heads.

    Any other axis that a mesh does not divide stays whole, key-value heads among them; but heads that stay whole are
    most of the model's arithmetic, done once more on every device.
    """
    tensor = 1 if mesh is None else mesh.shape.get("tensor", 1)
    if config.heads % tensor:
        raise ValueError(
            f"the mesh has tensor={tensor}, which does not divide the model's heads={config.heads}: take a divisor of "
            f"{config.heads} and give the other devices to data, fsdp or expert"
        )


def init_leaf(param: Param, key: jax.Array, config: Config, dtype: str) -> jax.Array:
    """Random values of one parameter, see :func:`init`."""
    if param.init in ("ones", "zeros"):
        return getattr(jnp, param.init)(param.shape, _dtype(param, dtype))
    std = config.init_std / (math.sqrt(2 * config.layers) if param.init == "residual" else 1.0)
    return (std * jax.random.normal(key, param.shape, jnp.float32)).astype(dtype)


def init(config: Config, key: jax.Array, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None) -> Params:
    """Random parameters (float32 by default), made in place on the mesh when one is given.

    Normal(0, ``init_std``) everywhere, output projections divided by sqrt(2 L) as in GPT-2; norms 1, biases 0.
    The values do not depend on the mesh. Raises ValueError for a mesh whose ``tensor`` does not divide the heads.
    """
    check_mesh(config, mesh)
    leaves, tree = jax.tree.flatten(declare(config), is_leaf=lambda leaf: isinstance(leaf, Param))

    def make(key):
        keys = jax.random.split(key, len(leaves))
        arrays = [init_leaf(p, k, config, dtype) for p, k in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(tree, arrays)

    return jax.jit(make, out_shardings=shardings(config, mesh) if mesh is not None else None)(key)
