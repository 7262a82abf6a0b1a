"""SASRec, self-attentive sequential recommendation (arXiv:1808.09781), in RecBole's form and in the paper's own."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from models.recsys.base import SequenceModel
from models.recsys.blocks import PostNormBlock, causal_mask, key_mask, normal_param, ones, split_keys, zeros
from models.recsys.functional import clear_padding, dropout, gather_last, layer_norm, zero_row


@dataclass(frozen=True)
class SASRecConfig:
    """Sizes of a SASRec. Defaults are RecBole's (properties/model/SASRec.yaml).

    ``form="recbole"``: post-LN blocks, GELU, LN on the input sum, tied scores; trained with full softmax by default.
    ``form="paper"``: input scaled by sqrt(d), LN on the queries only, residual from the normalised input, no output
    projection, ReLU point-wise FFN of width d, closing LN. The paper uses dim=50, heads=1, dropout 0.2 (ML-1M) or
    0.5, binary loss with one negative per position, Adam beta2 0.98. Its left padding is right padding here.
    """

    num_items: int
    max_len: int = 50
    dim: int = 64
    layers: int = 2
    heads: int = 2
    ffn_dim: int = 256  # recbole form only
    dropout: float = 0.5
    attention_dropout: float = 0.5
    eps: float = 1e-12
    form: str = "recbole"

    def __post_init__(self):
        if self.form not in ("recbole", "paper"):
            raise ValueError(f"form must be 'recbole' or 'paper', got {self.form!r}")
        if self.dim % self.heads:
            raise ValueError(f"the width {self.dim} is not divisible by {self.heads} heads")
        if self.num_items < 1 or self.max_len < 1:
            raise ValueError(f"num_items and max_len must be positive, got {self.num_items} and {self.max_len}")


class SASRec(SequenceModel):
    """Causal transformer over item and position embeddings; the state at the last item scores all items.

    Parameters (recbole form): (N+1) d + L d + 2d + layers (4 (d^2 + d) + 2 d f + f + d + 4 d): 211,008 for 1,682
    items, 303,232 for 3,123 items at the default sizes.
    """

    def __init__(self, config: SASRecConfig, *, rngs: nnx.Rngs):
        self.config, self.num_items, self.max_len = config, config.num_items, config.max_len
        if config.form == "paper":
            init = jax.nn.initializers.glorot_uniform()
            self.items = nnx.Param(zero_row(init(rngs.params(), (config.num_items + 1, config.dim), jnp.float32)))
            self.positions = nnx.Param(init(rngs.params(), (config.max_len, config.dim), jnp.float32))
            blocks = [_QueryNormBlock(config, rngs=rngs) for _ in range(config.layers)]
        else:
            self.items = nnx.Param(zero_row(normal_param(rngs, config.num_items + 1, config.dim)[...]))
            self.positions = normal_param(rngs, config.max_len, config.dim)
            blocks = [
                PostNormBlock(config.dim, config.heads, config.ffn_dim, eps=config.eps, rngs=rngs)
                for _ in range(config.layers)
            ]
        self.blocks = nnx.List(blocks)
        self.scale, self.bias = ones(config.dim), zeros(config.dim)  # input LN (recbole) or closing LN (paper)

    def item_table(self) -> jax.Array:
        return zero_row(self.items[...])

    def states(self, history: jax.Array, lengths: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        return self._encode(history, lengths, key, last=False)

    def last_state(self, history: jax.Array, lengths: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """As ``gather_last(states(...))``, but the last layer computes one query per row instead of L."""
        return self._encode(history, lengths, key, last=True)[:, 0]

    def _encode(self, history: jax.Array, lengths: jax.Array, key: jax.Array | None, *, last: bool) -> jax.Array:
        c, width = self.config, history.shape[1]
        if width > c.max_len:
            raise ValueError(f"history has {width} columns, max_len is {c.max_len}: use fit_length first")
        history = clear_padding(history, lengths)
        keys = split_keys(key, c.layers + 1)
        x = self.item_table()[history]
        if c.form == "paper":
            x = dropout(x * c.dim**0.5 + self.positions[:width], c.dropout, keys[0])
        else:
            x = layer_norm(x + self.positions[:width], self.scale[...], self.bias[...], c.eps)
            x = dropout(x, c.dropout, keys[0])
        mask = causal_mask(lengths, width)
        rates = {"rate": c.dropout, "attention_rate": c.attention_dropout}
        for i, block in enumerate(self.blocks):
            if last and i == c.layers - 1:
                query = gather_last(x, lengths)[:, None]
                x = block(x, key_mask(lengths, width), query=query, key=keys[i + 1], **rates)
            else:
                x = block(x, mask, key=keys[i + 1], **rates)
        return layer_norm(x, self.scale[...], self.bias[...], c.eps) if c.form == "paper" else x


class _QueryNormBlock(nnx.Module):
    """The block of the SASRec paper's code: q = LN(x); a = q + MHA(q, x, x); h = LN(a); y = h + W2 relu(W1 h)."""

    def __init__(self, config: SASRecConfig, *, rngs: nnx.Rngs):
        d, init = config.dim, jax.nn.initializers.glorot_uniform()

        def square() -> nnx.Param:
            return nnx.Param(init(rngs.params(), (d, d), jnp.float32))

        self.heads, self.eps = config.heads, config.eps
        self.wq, self.wk, self.wv = square(), square(), square()
        self.bq, self.bk, self.bv = zeros(d), zeros(d), zeros(d)
        self.w1, self.b1, self.w2, self.b2 = square(), zeros(d), square(), zeros(d)
        self.attn_scale, self.attn_bias, self.ffn_scale, self.ffn_bias = ones(d), zeros(d), ones(d), zeros(d)

    def __call__(self, x, mask, *, query=None, key=None, rate=0.0, attention_rate=0.0) -> jax.Array:
        attention_key, inner_key, ffn_key = split_keys(key, 3)
        q_in = layer_norm(x if query is None else query, self.attn_scale[...], self.attn_bias[...], self.eps)
        head = x.shape[-1] // self.heads
        q = (q_in @ self.wq[...] + self.bq[...]).reshape(*q_in.shape[:2], self.heads, head)
        k = (x @ self.wk[...] + self.bk[...]).reshape(*x.shape[:2], self.heads, head)
        v = (x @ self.wv[...] + self.bv[...]).reshape(*x.shape[:2], self.heads, head)
        weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k) / jnp.sqrt(1.0 * head) + mask, axis=-1)
        weights = dropout(weights, attention_rate, attention_key)
        a = q_in + jnp.einsum("bnts,bsnh->btnh", weights, v).reshape(q_in.shape)
        h = layer_norm(a, self.ffn_scale[...], self.ffn_bias[...], self.eps)
        inner = dropout(jax.nn.relu(h @ self.w1[...] + self.b1[...]), rate, inner_key)
        return h + dropout(inner @ self.w2[...] + self.b2[...], rate, ffn_key)
