"""The decoder as pure functions: ``forward`` over whole sequences, ``block`` shared with the sampler.

Einsum letters: B batch, T query time, S key time, D width, N heads, K key-value heads, G queries per key-value head,
H head width, F feed-forward width, V vocabulary. Matches transformers' Llama, Qwen2 and Qwen3 to rounding.
"""

import functools
from collections.abc import Callable, Mapping

import chex
import jax
import jax.numpy as jnp
from flax import struct

from models.config import Config
from models.linear import product
from models.params import Params
from models.sharding import constrain
from models.taps import BLOCK_SITES, Edit, Taps, check_sites

_UNROLLED_LAYERS = 4

# (q [B,T,N,H], new keys k [B,T,K,H] and values v [B,T,K,H], taps) -> heads [B,T,N,H]
Attend = Callable[[jax.Array, jax.Array, jax.Array, Taps], jax.Array]


@struct.dataclass
class Output:
    """logits: [B, T, V] float32 or None; hidden: [B, T, D] after the final norm; records: site -> [L, ...]."""

    logits: jax.Array | None
    hidden: jax.Array
    records: dict[str, jax.Array]


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32 (arXiv 1910.07467)."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


def rope_table(positions: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, 1, H/2] float32 for integer positions [B, T] (arXiv 2104.09864)."""
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    angle = positions[..., None].astype(jnp.float32) / config.rope_theta**exponent
    return jnp.cos(angle)[:, :, None, :], jnp.sin(angle)[:, :, None, :]


def apply_rope(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn the pairs (i, i + H/2) of x [B, T, heads, H]: the half-split layout of HF checkpoints."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, taps: Taps) -> jax.Array:
    """Grouped-query attention without repeating keys.

    q [B,T,N,H]; k, v [B,K,S,H], heads in front of time, as batched matrix products want them; mask bool [B or 1,T,S],
    True where a query may look. Scores and softmax in float32. Returns [B,T,N,H] in q's dtype.
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32) * H**-0.5
    scores = taps("attn.logits", jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min))
    probs = taps("attn.probs", jax.nn.softmax(scores, axis=-1))
    heads = jnp.einsum("bkgts,bksh->bkgth", probs.astype(v.dtype), v)
    return heads.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _qkv(x: jax.Array, layer: Params, config: Config) -> tuple[jax.Array, jax.Array, jax.Array]:
    N, K, H = config.heads, config.kv_heads, config.head_dim
    if "wqkv" in layer:  # one matrix [(N + 2K) H, D]: the sampler's layout, see models.sample.decode_weights
        joined = jnp.einsum("btd,ed->bte", x, layer["wqkv"].astype(x.dtype))
        if "bqkv" in layer:
            joined = joined + layer["bqkv"].astype(x.dtype)
        joined = joined.reshape(*x.shape[:2], N + 2 * K, H)
        return joined[:, :, :N], joined[:, :, N : N + K], joined[:, :, N + K :]
    out = []
    for name in "qkv":
        w = layer["w" + name]
        y = product(x, w.reshape(w.shape[0], -1)).reshape(*x.shape[:2], *w.shape[1:])
        if "b" + name in layer:
            y = y + layer["b" + name].astype(x.dtype)
        out.append(y)
    return tuple(out)


def _mlp(x: jax.Array, layer: Params, taps: Taps) -> jax.Array:
    if "w_gate_up" in layer:
        gate, up = jnp.split(jnp.einsum("btd,fd->btf", x, layer["w_gate_up"].astype(x.dtype)), 2, axis=-1)
    else:
        gate = product(x, layer["w_gate"])
        up = product(x, layer["w_up"])
    act = taps("mlp.act", jax.nn.silu(taps("mlp.gate", gate)) * up)
    act = constrain(act, "batch", "time", "ffn")
    if "w_down_out" in layer:
        return jnp.einsum("btf,df->btd", act, layer["w_down_out"].astype(x.dtype))
    return product(act, layer["w_down"])


def block(x: jax.Array, layer: Params, rope, attend: Attend, config: Config, taps: Taps) -> jax.Array:
    """One pre-norm decoder block. x [B,T,D]; ``attend`` decides what a query sees (the sequence, or a cache)."""
    x = taps("resid.pre", x)
    with jax.named_scope("attention"):
        q, k, v = _qkv(rms_norm(x, layer["attn_norm"], config.norm_eps), layer, config)
        if config.qk_norm:
            q = rms_norm(q, layer["q_norm"], config.norm_eps)
            k = rms_norm(k, layer["k_norm"], config.norm_eps)
        q, k, v = taps("attn.q", apply_rope(q, rope)), taps("attn.k", apply_rope(k, rope)), taps("attn.v", v)
        heads = taps("attn.heads", attend(q, k, v, taps))
        if "wo_out" in layer:
            out = jnp.einsum("bte,de->btd", heads.reshape(*x.shape[:2], -1), layer["wo_out"].astype(x.dtype))
        else:
            out = product(heads.reshape(*x.shape[:2], -1), layer["wo"].reshape(-1, config.dim))
        out = taps("attn.out", out)
        x = taps("resid.mid", constrain(x + out, "batch", "time", "model"))
    with jax.named_scope("mlp"):
        out = taps("mlp.out", _mlp(rms_norm(x, layer["mlp_norm"], config.norm_eps), layer, taps))
        return taps("resid.post", constrain(x + out, "batch", "time", "model"))


def unembed(params: Params, config: Config, hidden: jax.Array) -> jax.Array:
    """Logits [..., V] in float32 from final hidden states [..., D]."""
    with jax.named_scope("unembed"):
        if config.tie_embeddings:
            head = params["embed"].T
        else:
            head = params["head_out"].T if "head_out" in params else params["head"]
        return jnp.einsum("...d,dv->...v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def causal_mask(positions: jax.Array, segment_ids: jax.Array | None, window: int | None) -> jax.Array:
    """bool [B or 1, T, T]: a query sees earlier positions of its own segment, at most ``window`` of them."""
    B, T = positions.shape
    query, key = jnp.arange(T)[:, None], jnp.arange(T)[None, :]
    mask = (key <= query)[None]
    if window is not None:
        mask = mask & (query - key < window)[None]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return mask


def forward(
    params: Params,
    config: Config,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    head: bool = True,
    record: tuple[str, ...] = (),
    edit: Mapping[str, Edit] | None = None,
) -> Output:
    """Run the decoder over right-padded sequences.

    tokens: int32 [B, T]. Padding goes on the right, where causal attention keeps it from reaching any real token.
    positions: int32 [B, T], default 0..T-1. segment_ids: int32 [B, T] for packed sequences (pass positions too).
    head: False leaves ``logits`` None, for callers that need only some of them.
    record, edit: taps, see ``models.taps``. Raises ValueError for unknown sites.
    """
    chex.assert_rank(tokens, 2)
    check_sites(record, edit)
    B, T = tokens.shape
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(T), (1, T))
    rope = rope_table(positions, config)
    mask = causal_mask(positions, segment_ids, config.sliding_window)
    edge = Taps(record, edit)
    x = params["embed"].astype(config.dtype)[tokens]
    x = edge("embed", constrain(x, "batch", "time", "model"))

    inner_record = tuple(name for name in record if name in BLOCK_SITES)
    inner_edit = {name: hook for name, hook in (edit or {}).items() if name in BLOCK_SITES}

    def step(x, scanned):
        layer, hooks = scanned
        taps = Taps(inner_record, hooks)
        x = block(x, layer, rope, functools.partial(_attend_full, mask=mask), config, taps)
        return x, taps.values

    if config.remat:
        step = jax.checkpoint(step)
    # A loop over few layers costs more than it saves: its backward pass copies every activation into a stacked buffer
    # (1.5x the time of a step on CPU). Deep models keep the loop, so that compile time does not grow with depth.
    unroll = config.layers if config.layers <= _UNROLLED_LAYERS else 1
    x, records = jax.lax.scan(step, x, (params["layers"], inner_edit), unroll=unroll)
    hidden = edge("final", rms_norm(x, params["final_norm"], config.norm_eps))
    logits = unembed(params, config, hidden) if head else None
    return Output(logits, hidden, {**records, **edge.values})


def _attend_full(q, k, v, taps, *, mask):
    return attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask, taps)
