"""Meshes and the one table that maps logical axes to mesh axes.

Mesh axes: ``data`` (replicated weights, split batch), ``fsdp`` (split weights and batch), ``expert`` (split experts and
batch) and ``tensor``.
Arrays are named by logical axes; :data:`RULES` turns these into a ``PartitionSpec``. An axis that a mesh does not
divide evenly stays whole: the program remains correct and only memory is lost.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "expert", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    "experts": ("expert",),
    "latent": (),  # of multi-head latent attention: every head needs all of it
    "router": (),  # columns of a router: every device routes its own tokens
    "rank": (),  # of a low-rank change
    "layers": (),
    "head_dim": (),
    "norm": (),
    "time": (),
    "model": (),  # activations' width: whole, since the batch already uses the fsdp axis
}


def make_mesh(
    data: int = 1, fsdp: int = 1, expert: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with axes ``data, fsdp, expert, tensor``. One size may be -1: it takes the devices that remain.

    devices: all by default. TPUs are put in such an order that neighbours in the mesh are neighbours on the torus, the
    later axes first; others stay as they come.
    Raises ValueError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [data, fsdp, expert, tensor]
    if sizes.count(-1) > 1:
        raise ValueError(f"only one mesh axis may be -1, got {dict(zip(AXES, sizes, strict=True))}")
    if -1 in sizes:
        known = -math.prod(sizes)
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices) or min(sizes) < 1:
        wanted = " * ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
        raise ValueError(
            f"mesh {wanted} does not use {len(devices)} devices; make the product equal, or set one axis to -1"
        )
    # Auto mode: the compiler propagates shardings, so user hooks need not be written against sharded types.
    return Mesh(_arranged(devices, sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(devices: Sequence[jax.Device], sizes: Sequence[int]) -> np.ndarray:
    """The devices in the shape of a mesh; of TPUs by where they stand."""
    one_torus = len({getattr(d, "slice_index", 0) for d in devices}) == 1  # several slices stay one behind the other
    if devices[0].platform == "tpu" and one_torus:
        # Physical axes are split only where sizes leave no other way: whole ones are rings.
        for split in (False, True):
            # The latter where devices are no box: a part of a torus that someone chose.
            with contextlib.suppress(NotImplementedError, AssertionError):
                return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=split)
    return np.asarray(devices).reshape(sizes)


def spec_for(mesh: Mesh | AbstractMesh, shape: Sequence[int], axes: Sequence[str]) -> PartitionSpec:
    """Partition of an array with these logical axes; a mesh axis is used once and only where it divides."""
    used: set[str] = set()
    parts: list[tuple[str, ...] | None] = []
    for size, name in zip(shape, axes, strict=True):
        chosen: list[str] = []
        for axis in RULES[name]:
            extent = mesh.shape.get(axis, 1) * math.prod(mesh.shape[a] for a in chosen)
            if mesh.shape.get(axis, 1) > 1 and axis not in used and size % extent == 0:
                chosen.append(axis)
                used.add(axis)
        parts.append(tuple(chosen) or None)
    return PartitionSpec(*parts)


def axes_of(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return (part,) if isinstance(part, str) else part or ()


def sharding_for(mesh: Mesh | None, shape: Sequence[int], axes: Sequence[str]) -> NamedSharding | None:
    """``NamedSharding`` for an array with these logical axes, or None without a mesh."""
    return None if mesh is None else NamedSharding(mesh, spec_for(mesh, shape, axes))


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[Mesh | None]:
    """Programs traced inside this context constrain their activations to ``mesh`` (None: no constraint).

    JAX's own mesh context, because it is part of what ``jit`` looks a compiled program up by.
    """
    if mesh is None:
        yield None
    else:
        with jax.set_mesh(mesh):
            yield mesh


def no_mesh() -> contextlib.AbstractContextManager:
    """Inside, programs are this process's own again, whatever mesh there is outside: those of an environment's tools,
    whose arrays lie on one device."""
    return jax.set_mesh(Mesh(np.empty((), object), ()))


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Pin an activation to the mesh of :func:`use_mesh` by logical axes; the identity without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec_for(mesh, x.shape, axes))


def place(x, sharding: NamedSharding) -> jax.Array:
    """A host array, or an array of this process's devices, laid out as ``sharding`` says.

    Where the mesh spans several processes, each holds all of ``x`` and puts its own parts: ``device_put`` would send
    the whole of it round first, to compare.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key):
        return jax.jit(_same, out_shardings=sharding)(x)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def to_host(tree):
    """NumPy arrays of a tree of arrays; of a mesh that spans several processes, all of them must call this."""

    def fetch(x):
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            x = jax.jit(_same, out_shardings=NamedSharding(x.sharding.mesh, PartitionSpec()))(x)
        return np.asarray(x)

    return jax.tree.map(fetch, tree)


def join(address: str | None = None, process: int | None = None, count: int | None = None) -> None:
    """Make this process one of several that share one mesh; call it before anything else asks for a device.

    Without arguments a pod of TPUs (or a cluster that JAX knows) says who takes part; else the first process listens at
    ``address`` ("host:port"), and this one is ``process`` of ``count``.
    """
    # Of CPUs only: the default has no collectives between processes, and programs that are dispatched side by side wait
    # for each other for ever, since processes may start them in different orders.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(address, count, process)


def barrier(name: str) -> None:
    """Wait until every process has come here; ``name`` must be the same in all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _same(x):
    return x


def shard_batch(mesh: Mesh | None, batch):
    """Put a tree of host arrays on the mesh, split along the leading axis (replicated where it does not divide).

    Every process passes the whole batch and puts its own rows.
    """
    if mesh is None:
        return jax.device_put(batch)

    def put(x):
        axes = ("batch",) + ("time",) * (np.ndim(x) - 1) if np.ndim(x) else ()
        return place(x, sharding_for(mesh, np.shape(x), axes))

    return jax.tree.map(put, batch)
