"""Products with a weight matrix: plain, with a low-rank change beside it, or stored in eight bits.

A matrix is an array, an :class:`Adapted` or a :class:`Quantized`; what multiplies by one calls :func:`product`, what
needs the matrix itself :func:`dense`.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct

from models.platform import platform


@struct.dataclass
class Adapted:
    """``w + scale * a b``: a matrix that stays as it is and a change of low rank to train (LoRA, arXiv 2106.09685).

    w: [experts.., ins.., outs..]; a: [experts.., ins.., r]; b: [experts.., r, outs..], where ins and outs may be
    several axes (a width, or heads and their width). A leading axis of layers may stand before all of them.
    """

    w: jax.Array
    a: jax.Array
    b: jax.Array
    scale: float = struct.field(pytree_node=False, default=1.0)


@struct.dataclass
class Quantized:
    """``values * scale``: int8 in -127..127, and a float32 scale that has 1 for the axes that share it.

    Symmetric and rounded to nearest. Indexing picks along leading axes, as of the plain array.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.values.dtype

    def __getitem__(self, index) -> "Quantized":
        return Quantized(self.values[index], self.scale[index])

    def astype(self, dtype: jnp.dtype) -> jax.Array:
        """The plain array."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


Matrix = jax.Array | Adapted | Quantized


def quantize(x: jax.Array, axes: int | tuple[int, ...]) -> Quantized:
    """``x`` in eight bits with one scale for all of ``axes``: half a step, max |x| / 254, is the largest error."""
    x = x.astype(jnp.float32)
    most = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    scale = jnp.where(most > 0, most, 1.0) / 127.0
    return Quantized(jnp.round(x / scale).astype(jnp.int8), scale)


def dense(w: Matrix) -> jax.Array:
    """The matrix as one array."""
    if isinstance(w, Quantized):
        return w.astype(jnp.float32)
    if not isinstance(w, Adapted):
        return w
    lead = w.a.ndim + w.b.ndim - w.w.ndim - 2  # axes that a, b and w have alike: layers, experts
    fold = math.prod(w.a.shape[:lead])
    rank = w.a.shape[-1]
    change = w.a.reshape(fold, -1, rank) @ w.b.reshape(fold, rank, -1)
    return w.w + (w.scale * change).reshape(w.w.shape).astype(w.w.dtype)


def apart(x: jax.Array) -> jax.Array:
    """On CPU, keep neighbours of a matrix product, and in the backward pass their gradients, out of its fusions.

    The product of a weight's gradient wants its operands transposed; XLA then computes what comes before it (the
    activation, a norm, rotary positions) again, element by element, across the rows. Other backends do better alone.
    """
    return jax.lax.optimization_barrier(x) if platform() == "cpu" else x


def product(x: jax.Array, w: Matrix) -> jax.Array:
    """x [..., D] times w, whose leading axes together are D, with all its other axes as one: [..., E].

    One matrix product over all rows; with batch and time apart its gradient is slow.
    """
    if isinstance(w, Adapted):
        return product(x, w.w) + w.scale * product(product(x, w.a), w.b)
    if isinstance(w, Quantized):
        return product(x, w.values) * w.scale.reshape(-1).astype(x.dtype)
    w = w.reshape(x.shape[-1], -1)
    y = apart(apart(x.reshape(-1, x.shape[-1])) @ w.astype(x.dtype))
    return y.reshape(*x.shape[:-1], w.shape[-1])


def product_out_in(x: jax.Array, w: Matrix) -> jax.Array:
    """x [B, T, D] times a matrix that is stored [E, D]."""
    if isinstance(w, Quantized):
        return jnp.einsum("btd,ed->bte", x, w.values.astype(x.dtype)) * w.scale[:, 0].astype(x.dtype)
    return jnp.einsum("btd,ed->bte", x, w.astype(x.dtype))


def product_float32(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., D] times w [D, V] of the same dtype, in float32: what logits are made by.

    In the backward pass the gradient is rounded to the dtype of x before its own two products. Left alone it would be
    multiplied in float32, at a fraction of the rate that accelerators have for bfloat16.
    """
    if x.dtype == jnp.float32:
        return jnp.einsum("...d,dv->...v", x, w)
    return _rounded_gradient(x, w)


@jax.custom_vjp
def _rounded_gradient(x, w):
    return jnp.einsum("...d,dv->...v", x, w, preferred_element_type=jnp.float32)


def _rounded_forward(x, w):
    return _rounded_gradient(x, w), (x, w)


def _rounded_backward(kept, g):
    x, w = kept
    g = g.astype(x.dtype)
    dw = jnp.einsum("...d,...v->dv", x, g, preferred_element_type=jnp.float32)
    return jnp.einsum("...v,dv->...d", g, w), dw.astype(w.dtype)


_rounded_gradient.defvjp(_rounded_forward, _rounded_backward)
