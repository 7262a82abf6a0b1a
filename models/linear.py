"""Products with a weight matrix, laid out so that their gradients are fast on CPU too."""

import jax

from models.platform import platform


def apart(x: jax.Array) -> jax.Array:
    """On CPU, keep neighbours of a matrix product, and in the backward pass their gradients, out of its fusions.

    The product of a weight's gradient wants its operands transposed; XLA then computes what comes before it (the
    activation, a norm, rotary positions) again, element by element, across the rows. Other backends do better alone.
    """
    return jax.lax.optimization_barrier(x) if platform() == "cpu" else x


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., D] times w [D, E] as one matrix product over all rows; with batch and time apart its gradient is slow."""
    y = apart(apart(x.reshape(-1, x.shape[-1])) @ w.astype(x.dtype))
    return y.reshape(*x.shape[:-1], w.shape[-1])
