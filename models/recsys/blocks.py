"""The post-LayerNorm transformer block shared by RecBole's SASRec, DeepRec's TRM and the BERT-family encoder."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from models.linear import apart, product
from models.recsys.functional import MASKED, dropout, layer_norm


def normal_param(rngs: nnx.Rngs, *shape: int, scale: float = 0.02) -> nnx.Param:
    """A parameter drawn from N(0, scale^2), float32.

    Drawn as a vector of a few sizes and cut, since every new shape compiles anew (seconds for a model of small parts);
    the numbers are those of the shape itself, which depend on their place alone.
    """
    count = math.prod(shape)
    size = max(4096, 1 << (count - 1).bit_length()) if count < 2**16 else count
    drawn = scale * jax.random.normal(rngs.params(), (size,), jnp.float32)
    return nnx.Param(drawn[:count].reshape(shape))


def zeros(*shape: int) -> nnx.Param:
    """A parameter of zeros, float32."""
    return nnx.Param(jnp.zeros(shape, jnp.float32))


def ones(*shape: int) -> nnx.Param:
    """A parameter of ones, float32."""
    return nnx.Param(jnp.ones(shape, jnp.float32))


def split_keys(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    """``count`` keys, or ``count`` times None when the pass is deterministic."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def key_mask(lengths: jax.Array, width: int) -> jax.Array:
    """Additive mask [B, 1, 1, L] that hides padded keys."""
    return jnp.where(jnp.arange(width) < lengths[:, None], 0.0, MASKED)[:, None, None, :]


def causal_mask(lengths: jax.Array, width: int) -> jax.Array:
    """Additive mask [B, 1, L, L]: position t sees the real keys 0..t."""
    seen = jnp.tril(jnp.ones((width, width), bool)) & (jnp.arange(width) < lengths[:, None])[:, None, :]
    return jnp.where(seen, 0.0, MASKED)[:, None]


class PostNormBlock(nnx.Module):
    """a = LN(x + drop(MHA(x))); y = LN(a + drop(W2 GELU(W1 a))). Exact GELU, scale 1/sqrt(head width)."""

    def __init__(self, dim: int, heads: int, ffn_dim: int, *, eps: float = 1e-12, rngs: nnx.Rngs):
        if dim % heads:
            raise ValueError(f"the width {dim} is not divisible by {heads} heads")
        self.heads, self.eps = heads, eps
        self.wq, self.bq = normal_param(rngs, dim, dim), zeros(dim)
        self.wk, self.bk = normal_param(rngs, dim, dim), zeros(dim)
        self.wv, self.bv = normal_param(rngs, dim, dim), zeros(dim)
        self.wo, self.bo = normal_param(rngs, dim, dim), zeros(dim)
        self.attn_scale, self.attn_bias = ones(dim), zeros(dim)
        self.w1, self.b1 = normal_param(rngs, dim, ffn_dim), zeros(ffn_dim)
        self.w2, self.b2 = normal_param(rngs, ffn_dim, dim), zeros(dim)
        self.ffn_scale, self.ffn_bias = ones(dim), zeros(dim)

    def probs(self, query: jax.Array, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Attention weights [B, heads, T, S] of queries [B, T, d] over x [B, S, d]."""
        q = self._split(product(query, self.wq[...]) + self.bq[...])
        k = self._split(product(x, self.wk[...]) + self.bk[...])
        return jax.nn.softmax(jnp.einsum("bnth,bnsh->bnts", q, k) / jnp.sqrt(1.0 * q.shape[-1]) + mask, axis=-1)

    def _split(self, x: jax.Array) -> jax.Array:
        """[B, T, d] -> [B, heads, T, d / heads], as batched matrix products want it."""
        return apart(x.reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2))

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        *,
        query: jax.Array | None = None,
        key: jax.Array | None = None,
        rate: float = 0.0,
        attention_rate: float = 0.0,
    ) -> jax.Array:
        """x [B, S, d], additive mask [B, 1, T or 1, S] -> [B, T, d].

        ``query`` [B, T, d] (rows of x; default x itself) restricts the output to those positions: the last layer of
        a model of which only the last state is read needs one query per row, not S.
        """
        attention_key, out_key, ffn_key = split_keys(key, 3)
        query = x if query is None else query
        weights = dropout(self.probs(query, x, mask), attention_rate, attention_key)
        v = self._split(product(x, self.wv[...]) + self.bv[...])
        mixed = apart(jnp.einsum("bnts,bnsh->bnth", weights, v)).swapaxes(1, 2).reshape(query.shape)
        mixed = dropout(product(mixed, self.wo[...]) + self.bo[...], rate, out_key)
        a = layer_norm(query + mixed, self.attn_scale[...], self.attn_bias[...], self.eps)
        inner = jax.nn.gelu(product(a, self.w1[...]) + self.b1[...], approximate=False)
        inner = dropout(product(inner, self.w2[...]) + self.b2[...], rate, ffn_key)
        return layer_norm(a + inner, self.ffn_scale[...], self.ffn_bias[...], self.eps)
