"""GRU4Rec (arXiv:1511.06939) in RecBole's form: no session-parallel batches, scores over the whole catalogue."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from models.recsys.base import SequenceModel
from models.recsys.blocks import split_keys, zeros
from models.recsys.functional import clear_padding, dropout, gather_last, zero_row


@dataclass(frozen=True)
class GRU4RecConfig:
    """Sizes of a GRU4Rec; defaults are RecBole's."""

    num_items: int
    max_len: int = 50
    dim: int = 64
    hidden: int = 128
    layers: int = 1
    dropout: float = 0.3

    def __post_init__(self):
        if min(self.num_items, self.max_len, self.dim, self.hidden, self.layers) < 1:
            raise ValueError(f"all sizes must be positive, got {self}")


class GRU4Rec(SequenceModel):
    """Embedding -> dropout -> GRU without bias -> dense -> dot with the item embeddings.

    Gate order r, z, n with the reset applied to the hidden product: n = tanh(W_n x + r * (U_n h)).
    Parameters at the default sizes: (N+1) 64 + 64*384 + 128*384 + 128*64 + 64 = 189,696 for 1,682 items.
    """

    def __init__(self, config: GRU4RecConfig, *, rngs: nnx.Rngs):
        self.config, self.num_items, self.max_len = config, config.num_items, config.max_len
        xavier = jax.nn.initializers.glorot_normal()
        uniform = jax.nn.initializers.glorot_uniform()
        self.items = nnx.Param(zero_row(xavier(rngs.params(), (config.num_items + 1, config.dim), jnp.float32)))
        widths = [config.dim] + [config.hidden] * (config.layers - 1)
        self.inputs = nnx.List([nnx.Param(uniform(rngs.params(), (w, 3 * config.hidden), jnp.float32)) for w in widths])
        self.recurrent = nnx.List(
            [nnx.Param(uniform(rngs.params(), (config.hidden, 3 * config.hidden), jnp.float32)) for _ in widths]
        )
        self.dense = nnx.Param(xavier(rngs.params(), (config.hidden, config.dim), jnp.float32))
        self.dense_bias = zeros(config.dim)

    def item_table(self) -> jax.Array:
        return zero_row(self.items[...])

    def states(self, history: jax.Array, lengths: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        return self._hidden(history, lengths, key) @ self.dense[...] + self.dense_bias[...]

    def last_state(self, history: jax.Array, lengths: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        hidden = gather_last(self._hidden(history, lengths, key), lengths)
        return hidden @ self.dense[...] + self.dense_bias[...]

    def _hidden(self, history: jax.Array, lengths: jax.Array, key: jax.Array | None) -> jax.Array:
        x = dropout(self.item_table()[clear_padding(history, lengths)], self.config.dropout, split_keys(key, 1)[0])
        for w, u in zip(self.inputs, self.recurrent, strict=True):
            recurrent = u[...]

            def cell(h, gates, recurrent=recurrent):
                xr, xz, xn = jnp.split(gates, 3, -1)
                hr, hz, hn = jnp.split(h @ recurrent, 3, -1)
                z = jax.nn.sigmoid(xz + hz)
                h = (1.0 - z) * jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn) + z * h
                return h, h

            start = jnp.zeros((x.shape[0], self.config.hidden), x.dtype)
            x = jax.lax.scan(cell, start, (x @ w[...]).swapaxes(0, 1))[1].swapaxes(0, 1)
        return x
