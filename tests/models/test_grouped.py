"""Grouped products against ``lax.ragged_dot``: values and gradients, with groups of every awkward size."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractDevice, AbstractMesh

from models.grouped import grouped_product


def both_ways(rows, depth, columns, sizes, dtype, rng):
    """[value, gradients] of our product in ``dtype`` and of ``lax.ragged_dot`` in float32."""
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    x, w, g = draw(rows, depth), draw(len(sizes), depth, columns), draw(rows, columns)
    sizes = jnp.asarray(sizes, jnp.int32)
    real = (jnp.arange(rows) < sizes.sum())[:, None]

    def run(product):
        def values(x, w, g):
            out, back = jax.vjp(lambda x, w: jnp.where(real, product(jnp.where(real, x, 0), w, sizes), 0), x, w)
            return out, *back(g)

        return jax.jit(values)

    with jax.default_matmul_precision("highest"):  # on a GPU float32 is otherwise rounded to ten bits
        ours = run(grouped_product)(x, w, g)
        theirs = run(jax.lax.ragged_dot)(*(a.astype(jnp.float32) for a in (x, w, g)))
    chex.assert_trees_all_equal_shapes(ours, theirs)
    return ours, theirs


@pytest.mark.parametrize(
    ("rows", "depth", "columns", "sizes"),
    [
        (300, 40, 24, [100, 0, 130, 37, 20]),  # groups end inside tiles, one is empty, rows are left over
        (37, 16, 8, [0, 0, 37]),
        (256, 128, 64, [128, 128, 0, 0]),  # groups end where tiles do
        (64, 32, 32, [1, 2, 3, 4, 5, 6, 7, 8]),  # many groups in one tile
        (20, 200, 140, [0, 0]),  # nothing at all
    ],
)
def test_equals_ragged_dot(rows, depth, columns, sizes, rng):
    ours, theirs = both_ways(rows, depth, columns, sizes, jnp.float32, rng)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * max(1.0, float(jnp.abs(b).max())))


def test_it_takes_sizes_that_are_not_known_while_tracing(rng):
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((48, 16), (3, 16, 16)))
    product = jax.jit(grouped_product)
    for sizes in ([48, 0, 0], [5, 20, 23]):
        np.testing.assert_allclose(
            product(x, w, jnp.array(sizes)), jax.lax.ragged_dot(x, w, jnp.array(sizes)), atol=1e-5
        )
    assert product._cache_size() == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lowers_for_a_gpu_without_one(dtype, monkeypatch, capfd):
    """Up to the GPU compiler's input, which needs no GPU."""
    monkeypatch.setattr("jax.experimental.pallas.pallas_call", functools.partial(pl.pallas_call, debug=True))
    shape = jax.ShapeDtypeStruct
    arguments = shape((4096, 256), dtype), shape((16, 256, 384), dtype), shape((16,), jnp.int32)
    run = jax.jit(jax.grad(lambda x, w, s: jnp.sin(grouped_product(x, w, s).astype(jnp.float32)).sum(), argnums=(0, 1)))
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
        run.trace(*arguments).lower(lowering_platforms=("cuda",))
    printed = capfd.readouterr().out
    # A kernel that breaks the dialect's rules is printed in the generic form, with names of operations in quotes.
    assert printed.count("= scf.for ") >= 3
    assert '"scf.for"' not in printed


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_on_a_gpu(dtype, bound, rng):
    sizes = rng.multinomial(4000, np.full(16, 1 / 16)).tolist()
    sizes[3], sizes[4] = 0, sizes[3] + sizes[4]
    ours, theirs = both_ways(4096, 320, 200, sizes, jnp.dtype(dtype), rng)
    for a, b in zip(ours, theirs, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b)
        assert np.isfinite(a).all()
        assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b)
