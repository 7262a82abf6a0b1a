"""Products of groups of rows with a matrix per group, as one Pallas kernel each, for GPUs.

``lax.ragged_dot`` is dense there: the compiler multiplies all rows with the matrices of all groups. The rows of a group
follow each other, so a tile of rows meets few groups; the kernel visits every (tile, group) pair that meets once. There
are at most ``tiles + groups - 1`` of them, which is what the grid holds, whatever the sizes turn out to be.

Letters: M rows, G groups, K width of rows, N width of results.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from models.platform import platform

# Tiles of a product, and how many bytes of its inner axis a step takes: of the shapes tried on an H100 the fastest.
# Three steps are in flight and take 144 KiB of shared memory, which an A100 has too.
_ROWS, _COLUMNS, _DEPTH, _STAGES = 128, 256, 128, 3


def _side(size: int, most: int) -> int:
    """A power of two that a tile can have: at least 16, the matrix units' own."""
    return min(most, max(16, pl.next_power_of_2(size)))


def _dot(a, b, over: tuple[int, int]):
    return jax.lax.dot_general(a, b, (((over[0],), (over[1],)), ((), ())), preferred_element_type=jnp.float32)


def _visits(sizes: jax.Array, tiles: int, rows: int) -> tuple[jax.Array, ...]:
    """For each visit its group and tile, and the group's first row and the one behind its last; int32 [visits].

    Visits that are not needed get a group without rows.
    """
    G = sizes.shape[0]
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    first = starts // rows
    counts = jnp.where(sizes > 0, (ends - 1) // rows - first + 1, 0)
    behind = jnp.cumsum(counts)
    visit = jnp.arange(tiles + G - 1)
    group = jnp.minimum(jnp.searchsorted(behind, visit, side="right"), G - 1)
    needed = visit < behind[-1]
    tile = jnp.where(needed, first[group] + visit - (behind - counts)[group], 0)
    bounds = jnp.where(needed, starts[group], 0), jnp.where(needed, ends[group], 0)
    return tuple(x.astype(jnp.int32) for x in (group, tile, *bounds))


def _product_kernel(groups, tiles, starts, ends, x, w, out, *, rows, columns, depth, turned):
    """One tile of results of one group. x [M, K]; w [G, K, N], or ``turned`` [G, N, K]; out [M, N]."""
    visit, column = pl.program_id(0), pl.program_id(1) * columns
    group, start, end = groups[visit], starts[visit], ends[visit]
    row = tiles[visit] * rows
    (M, K), N = x.shape, out.shape[1]
    row_ids, column_ids = row + jnp.arange(rows), column + jnp.arange(columns)
    own = (row_ids >= start) & (row_ids < end) & (row_ids < M)

    def step(i, total):
        at = i * depth
        inner = at + jnp.arange(depth) < K
        a = triton.load(x.at[pl.ds(row, rows), pl.ds(at, depth)], mask=own[:, None] & inner[None], other=0)
        if turned:
            mask = (column_ids < N)[:, None] & inner[None]
            b = triton.load(w.at[group, pl.ds(column, columns), pl.ds(at, depth)], mask=mask, other=0)
            return total + _dot(a, b, (1, 1))
        mask = inner[:, None] & (column_ids < N)[None]
        b = triton.load(w.at[group, pl.ds(at, depth), pl.ds(column, columns)], mask=mask, other=0)
        return total + _dot(a, b, (1, 0))

    steps = (end > start).astype(jnp.int32) * pl.cdiv(K, depth)  # a visit that is not needed takes none
    total = jax.lax.fori_loop(0, steps, step, jnp.zeros((rows, columns), jnp.float32))
    mask = own[:, None] & (column_ids < N)[None]
    triton.store(out.at[pl.ds(row, rows), pl.ds(column, columns)], total.astype(out.dtype), mask=mask)


def _outer_kernel(starts, ends, x, y, out, *, rows, columns, depth):
    """One tile of x^T y over the rows of one group. x [M, K], y [M, N], out [G, K, N]."""
    group, row, column = pl.program_id(0), pl.program_id(1) * rows, pl.program_id(2) * columns
    start, end = starts[group], ends[group]
    K, N = out.shape[1:]
    row_ids, column_ids = row + jnp.arange(rows), column + jnp.arange(columns)

    def step(i, total):
        at = start + i * depth
        own = at + jnp.arange(depth) < end
        a = triton.load(x.at[pl.ds(at, depth), pl.ds(row, rows)], mask=own[:, None] & (row_ids < K)[None], other=0)
        b = triton.load(
            y.at[pl.ds(at, depth), pl.ds(column, columns)], mask=own[:, None] & (column_ids < N)[None], other=0
        )
        return total + _dot(a, b, (0, 0))

    steps = pl.cdiv(end - start, depth)
    total = jax.lax.fori_loop(0, steps, step, jnp.zeros((rows, columns), jnp.float32))
    mask = (row_ids < K)[:, None] & (column_ids < N)[None]
    place = out.at[group, pl.ds(row, rows), pl.ds(column, columns)]
    triton.store(place, total.astype(out.dtype), mask=mask)


def _call(kernel, grid: tuple[int, ...], out: jax.ShapeDtypeStruct, inputs: tuple):
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel, grid=grid, out_shape=out, in_specs=[whole] * len(inputs), out_specs=whole,
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=_STAGES), interpret=platform() != "gpu",
    )(*inputs)  # fmt: skip


def _product(x, w, sizes, turned: bool):
    (M, K), N = x.shape, w.shape[1 if turned else 2]
    tile = {"rows": _side(M, _ROWS), "columns": _side(N, _COLUMNS), "depth": _side(K, _DEPTH // x.dtype.itemsize)}
    tiles = pl.cdiv(M, tile["rows"])
    kernel = functools.partial(_product_kernel, turned=turned, **tile)
    grid = (tiles + w.shape[0] - 1, pl.cdiv(N, tile["columns"]))
    inputs = (*_visits(sizes, tiles, tile["rows"]), x, w)
    return _call(kernel, grid, jax.ShapeDtypeStruct((M, N), x.dtype), inputs)


def _outer(x, y, sizes, dtype):
    (M, K), N, G = x.shape, y.shape[1], sizes.shape[0]
    tile = {"rows": _side(K, _ROWS), "columns": _side(N, _COLUMNS), "depth": _side(M, _DEPTH // x.dtype.itemsize)}
    ends = jnp.cumsum(sizes).astype(jnp.int32)
    kernel = functools.partial(_outer_kernel, **tile)
    grid = (G, pl.cdiv(K, tile["rows"]), pl.cdiv(N, tile["columns"]))
    return _call(kernel, grid, jax.ShapeDtypeStruct((G, K, N), dtype), (ends - sizes.astype(jnp.int32), ends, x, y))


@jax.custom_vjp
def grouped_product(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """x [M, K], its first ``sizes[0]`` rows times w[0], the next ``sizes[1]`` times w[1] and so on: [M, N].

    w: [G, K, N] in x's dtype; sizes: int [G], together at most M. Sums in float32. What comes out for rows behind the
    last group is undefined, and so are their gradients. On other platforms than a GPU the kernel is interpreted, which
    is slow.
    """
    return _product(x, w, sizes, turned=False)


def _forward(x, w, sizes):
    return grouped_product(x, w, sizes), (x, w, sizes)


def _backward(kept, g):
    x, w, sizes = kept
    return _product(g, w, sizes, turned=True), _outer(x, g, sizes, w.dtype), None


grouped_product.defvjp(_forward, _backward)
