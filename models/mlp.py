"""The gated feed-forward network of a block, alone or beside experts."""

import jax
import jax.numpy as jnp

from models.config import Config
from models.linear import product, product_out_in
from models.params import Params
from models.sharding import constrain
from models.taps import Taps


def mlp(x: jax.Array, layer: Params, config: Config, taps: Taps, shared: bool = False) -> jax.Array:
    """x [B, T, D] -> [B, T, D] with the matrices "w_gate", "w_up" [D, F] and "w_down" [F, D] of ``layer``, or in the
    sampler's layout "w_gate_up" [2F, D] and "w_down_out" [D, F].

    shared: the network beside the experts, whose names begin with "s_" and which has no taps.
    """
    names = "s_" if shared else "w_"
    taps = Taps() if shared else taps
    if names + "gate_up" in layer:
        joined = product_out_in(x, layer[names + "gate_up"])
        gate, up = jnp.split(joined, 2, axis=-1)
    else:
        gate = product(x, layer[names + "gate"])
        up = product(x, layer[names + "up"])
    activate = jax.nn.silu if config.activation == "silu" else jax.nn.gelu  # gelu's default is the tanh form
    act = taps("mlp.act", activate(taps("mlp.gate", gate)) * up)
    act = constrain(act, "batch", "time", "ffn")
    if names + "down_out" in layer:
        return product_out_in(act, layer[names + "down_out"])
    return product(act, layer[names + "down"])
