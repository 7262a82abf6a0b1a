"""The decoder as pure functions: ``forward`` over whole sequences, ``block`` shared with the sampler.

Einsum letters: B batch, T query time, S key time, D width, N heads, K key-value heads, G queries per key-value head,
H head width, F feed-forward width, V vocabulary. Matches transformers for every family there is.
"""

import functools
from collections.abc import Callable, Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from models.attention import Look, attention, softcap
from models.config import Config
from models.linear import Adapted, Matrix, Quantized, dense, product, product_float32, product_out_in
from models.mlp import mlp
from models.moe import check_expert_mask, moe
from models.params import Params, stacks
from models.rope import apply_rope, rope_table
from models.sharding import constrain
from models.taps import Edit, Reduced, Taps, check_sites, layers_of

_UNROLLED_LAYERS = 4

# (q [B,T,N,H], new keys k [B,T,K,H] and values v [B,T,K,X], taps) -> heads [B,T,N,X]. Without v the values are the
# first ``kv_lora`` columns of the keys: the latent.
Attend = Callable[[jax.Array, jax.Array, jax.Array, Taps], jax.Array]


@struct.dataclass
class Output:
    """logits: [B, T, V] float32 or None; hidden: [B, T, D] after the final norm; records: site, or name of
    something reduced, -> [L, ...]."""

    logits: jax.Array | None
    hidden: jax.Array
    records: dict[str, jax.Array]


def rms_norm(x: jax.Array, scale: jax.Array, config: Config) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32 (arXiv 1910.07467)."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + config.norm_eps)
    scale = scale.astype(jnp.float32)
    return (y * (1.0 + scale if config.norm_offset else scale)).astype(x.dtype)


def _per_head(x: jax.Array, w: Matrix, heads: int) -> jax.Array:
    """x [B, T, D] times w [D, N, H] -> [B, T, N, H]."""
    return product(x, w).reshape(*x.shape[:2], heads, -1)


def _grouped_heads(x: jax.Array, layer: Params, rope, attend: Attend, config: Config, taps: Taps) -> jax.Array:
    """Heads [B, T, N, H] of ordinary attention."""
    q, k, v = _qkv(x, layer, config)
    if config.qk_norm_whole:
        q, k = _whole_norm(q, layer["q_norm"], config), _whole_norm(k, layer["k_norm"], config)
    elif config.qk_norm:
        q = rms_norm(q, layer["q_norm"], config)
        k = rms_norm(k, layer["k_norm"], config)
    q, k, v = taps("attn.q", apply_rope(q, rope)), taps("attn.k", apply_rope(k, rope)), taps("attn.v", v)
    return attend(q, k, v, taps)


def _latent_heads(x: jax.Array, layer: Params, rope, attend: Attend, config: Config, taps: Taps) -> jax.Array:
    """Heads [B, T, N, X] of multi-head latent attention (arXiv 2405.04434, section 2.1).

    Over a whole sequence keys and values are made per head. The sampler's layout ("wk_up", "wv_up", see
    ``models.layout``) keeps the latent itself in the cache and moves the matrices to the other side of
    the products: heads then share one key [latent, turning part], whose latent is also the value.
    """
    C, R = config.kv_lora, config.rope_dim
    compressed = product(x, layer["wkv_a"])
    latent = rms_norm(compressed[..., :C], layer["kv_a_norm"], config)
    turning = apply_rope(compressed[:, :, None, C:], rope, config.rope_interleaved)  # one key for all heads
    if config.q_lora:
        q = rms_norm(product(x, layer["wq_a"]), layer["q_a_norm"], config)
        q = _per_head(q, layer["wq_b"], config.heads)
    else:
        q = _per_head(x, layer["wq"], config.heads)
    plain, turned = q[..., :-R], apply_rope(q[..., -R:], rope, config.rope_interleaved)
    if "wk_up" in layer:
        q = jnp.concatenate([jnp.einsum("btnh,cnh->btnc", plain, layer["wk_up"].astype(x.dtype)), turned], axis=-1)
        k = jnp.concatenate([latent[:, :, None], turning], axis=-1)
        return jnp.einsum("btnc,cnx->btnx", attend(q, k, None, taps), layer["wv_up"].astype(x.dtype))
    made = _per_head(latent, layer["wkv_b"], config.heads)
    k, v = made[..., : -config.value_dim], made[..., -config.value_dim :]
    k = jnp.concatenate([k, jnp.broadcast_to(turning, (*k.shape[:-1], R))], axis=-1)
    q = taps("attn.q", jnp.concatenate([plain, turned], axis=-1))
    return attend(q, taps("attn.k", k), taps("attn.v", v), taps)


def _qkv(x: jax.Array, layer: Params, config: Config) -> tuple[jax.Array, jax.Array, jax.Array]:
    N, K, H = config.heads, config.kv_heads, config.head_dim
    if "wqkv" in layer:  # one matrix [(N + 2K) H, D]: the sampler's layout, see models.layout
        joined = product_out_in(x, layer["wqkv"])
        if "bqkv" in layer:
            joined = joined + layer["bqkv"].astype(x.dtype)
        joined = joined.reshape(*x.shape[:2], N + 2 * K, H)
        return joined[:, :, :N], joined[:, :, N : N + K], joined[:, :, N + K :]
    out = []
    for name, heads in (("q", N), ("k", K), ("v", K)):
        y = _per_head(x, layer["w" + name], heads)
        if "b" + name in layer:
            y = y + layer["b" + name].astype(x.dtype)
        out.append(y)
    return tuple(out)


def _whole_norm(x: jax.Array, scale: jax.Array, config: Config) -> jax.Array:
    """Norm over heads and head width together: x [B,T,heads,H], scale [heads,H]."""
    return rms_norm(x.reshape(*x.shape[:2], -1), scale.reshape(-1), config).reshape(x.shape)


def block(x: jax.Array, layer: Params, rope, attend: Attend, config: Config, taps: Taps) -> jax.Array:
    """One pre-norm decoder block. x [B,T,D]; ``attend`` decides what a query sees (the sequence, or a cache)."""
    x = taps("resid.pre", x)
    with jax.named_scope("attention"):
        heads_of = _latent_heads if config.kv_lora else _grouped_heads
        heads = heads_of(rms_norm(x, layer["attn_norm"], config), layer, rope, attend, config, taps)
        heads = taps("attn.heads", heads)
        if "wo_out" in layer:
            out = product_out_in(heads.reshape(*x.shape[:2], -1), layer["wo_out"])
        else:
            out = product(heads.reshape(*x.shape[:2], -1), layer["wo"])
        if config.post_norms:
            out = rms_norm(out, layer["attn_post_norm"], config)
        out = taps("attn.out", out)
        x = taps("resid.mid", constrain(x + out, "batch", "time", "model"))
    with jax.named_scope("mlp"):
        feed_forward = moe if "router" in layer else mlp
        out = feed_forward(rms_norm(x, layer["mlp_norm"], config), layer, config, taps)
        if config.post_norms:
            out = rms_norm(out, layer["mlp_post_norm"], config)
        out = taps("mlp.out", out)
        return taps("resid.post", constrain(x + out, "batch", "time", "model"))


def unembed(params: Params, config: Config, hidden: jax.Array) -> jax.Array:
    """Logits [..., V] in float32 from final hidden states [..., D]."""
    with jax.named_scope("unembed"):
        turned = config.tie_embeddings or "head_out" in params  # stored [V, D]
        head = params["embed" if config.tie_embeddings else "head_out" if turned else "head"]
        scale = head.scale.reshape(-1) if isinstance(head, Quantized) else None
        head = head.values if isinstance(head, Quantized) else dense(head)
        head = head.T if turned else head
        logits = product_float32(hidden, head.astype(hidden.dtype))
        return softcap(logits if scale is None else logits * scale, config.final_softcap)


def embed(weights: Params, config: Config, tokens: jax.Array) -> jax.Array:
    """Token embeddings [B, T, D] in the config's dtype."""
    w = weights["embed"]
    if isinstance(w, Adapted):
        x = (w.w[tokens] + w.scale * (w.a[tokens] @ w.b)).astype(config.dtype)
    else:
        x = w[tokens].astype(config.dtype)
    return x * jnp.asarray(config.dim**0.5, x.dtype) if config.scale_embed else x  # the factor is rounded as HF's is


def check_tokens(tokens: np.ndarray, config: Config) -> None:
    """Raise ValueError for ids outside the vocabulary: on device a gather would take another row instead, silently."""
    outside = (tokens < 0) | (tokens >= config.vocab_size)
    if outside.any():
        raise ValueError(
            f"token id {tokens[outside][0]} is outside the model's vocabulary of {config.vocab_size}: "
            "is this the tokenizer the model was trained with?"
        )


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
    expert_mask: jax.Array | None = None,
    reduce: Mapping[str, Reduced] | None = None,
    routing: jax.Array | None = None,
) -> Output:
    """Run the decoder over right-padded sequences.

    tokens: int32 [B, T]. Padding goes on the right, where causal attention keeps it from reaching any real token.
    positions: int32 [B, T], default 0..T-1. segment_ids: int32 [B, T] for packed sequences (pass positions too).
    head: False leaves ``logits`` None, for callers that need only some of them.
    record, edit, reduce: taps, see ``models.taps``. Raises ValueError for unknown sites, for a mask that does not fit,
    and of NumPy's arrays for ids outside the vocabulary.
    expert_mask: bool [L, E], a row for each layer with experts; those where it is False are never chosen
    (``models.moe.check_expert_mask``).
    routing: int [layers with experts, B, T, k], experts to take instead of those that the router prefers, or -1
    (``models.sample.routing_of``); their weights are still the router's, and have gradients.
    """
    chex.assert_rank(tokens, 2)
    check_sites(record, edit, config, reduce)
    if isinstance(tokens, np.ndarray):
        check_tokens(tokens, config)
    if expert_mask is not None:
        check_expert_mask(expert_mask, config)
    B, T = tokens.shape
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(T), (1, T))

    mixed = len(set(config.slides)) == 2
    ropes = [rope_table(positions, config, local) for local in sorted(set(config.slides))]
    look = Look(
        jnp.arange(T)[None], None if config.sliding_window is None else jnp.int32(config.sliding_window), segment_ids,
        straight=True, sliding=None if mixed else config.sliding_window,
    )  # fmt: skip
    edge = Taps(record, edit)
    x = edge("embed", constrain(embed(params, config, tokens), "batch", "time", "model"))

    # A loop over few layers costs more than it saves: its backward pass copies every activation into a stacked buffer
    # (1.5x the time of a step on CPU). Deep models keep the loop, so that compile time does not grow with depth.
    unrolled = config.layers <= _UNROLLED_LAYERS
    parts: dict[str, list[jax.Array]] = {}
    for name, first, count in stacks(config):
        layers = params[name]
        if name == "layers":
            extra = {"expert_mask": expert_mask, "routing": routing}
            layers = {**layers, **{key: value for key, value in extra.items() if value is not None}}
        slides = jnp.array(config.slides[first : first + count]) if mixed else None
        here = layers_of(config, first, count)
        names = tuple(site for site in record if site in here)
        sums = {name: what for name, what in (reduce or {}).items() if set(what.sites) <= set(here)}
        hooks = {
            site: jax.tree.map(lambda v, at=here[site]: v[at], h) for site, h in (edit or {}).items() if site in here
        }

        def step(x, scanned, names=names, sums=sums):
            layer, hooks, slides = scanned
            taps = Taps(names, hooks, sums)
            rope, seen = ropes[0], look
            if mixed:
                rope = jax.tree.map(lambda full, local: jnp.where(slides, local, full), *ropes)
                seen = look.replace(window=jnp.where(slides, look.window, T))
            x = block(x, layer, rope, functools.partial(_attend_full, look=seen, config=config), config, taps)
            return x, taps.finish()

        if config.remat != "none":
            keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == "products" else None
            step = jax.checkpoint(step, policy=keep)
        x, records = jax.lax.scan(step, x, (layers, hooks, slides), unroll=count if unrolled else 1)
        for site, values in records.items():
            parts.setdefault(site, []).append(values)
    records = {
        site: v[0] if len(v) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *v) for site, v in parts.items()
    }
    hidden = edge("final", rms_norm(x, params["final_norm"], config))
    logits = unembed(params, config, hidden) if head else None
    return Output(logits, hidden, {**records, **edge.values})


def _attend_full(q, k, v, taps, *, look, config):
    return attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), look, config, taps)
