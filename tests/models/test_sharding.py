"""Meshes, rules and the same numbers on eight devices as on one."""

import dataclasses
import importlib.util
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import models
from models import Config
from models.sharding import constrain, no_mesh, shard_batch, spec_for

CONFIG = Config(
    vocab_size=64, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=48, qk_norm=True, init_std=0.3
)


@pytest.mark.parametrize(
    "axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}, {"data": 2, "tensor": 4}, {"data": 8}]
)
def test_forward_and_gradients_equal_one_device(axes, key):
    mesh = models.make_mesh(**axes)
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (8, 12), dtype=np.int32)

    def loss(params, tokens):
        logits = models.forward(params, CONFIG, tokens).logits
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 3]), logits

    run = jax.value_and_grad(loss, has_aux=True)
    (value, logits), gradient = jax.jit(run)(models.init(CONFIG, key), tokens)
    with models.use_mesh(mesh):
        params = models.init(CONFIG, key, mesh=mesh)
        (value8, logits8), gradient8 = jax.jit(lambda *a: run(*a))(params, shard_batch(mesh, tokens))
    np.testing.assert_allclose(value, value8, atol=1e-5)
    np.testing.assert_allclose(logits, logits8, atol=1e-5 * np.abs(logits).max())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, gradient8)


def test_specs_fall_back_where_the_mesh_does_not_divide():
    mesh = models.make_mesh(data=2, fsdp=2, tensor=2)
    assert spec_for(mesh, (32, 4, 8), ("embed", "heads", "head_dim")) == PartitionSpec(("fsdp",), ("tensor",), None)
    assert spec_for(mesh, (31, 3, 8), ("embed", "heads", "head_dim")) == PartitionSpec(None, None, None)
    assert spec_for(mesh, (4, 7), ("batch", "time")) == PartitionSpec(("data", "fsdp"), None)
    assert spec_for(mesh, (2, 7), ("batch", "time")) == PartitionSpec(("data",), None)  # 2 rows: data only
    assert spec_for(mesh, (3, 7), ("batch", "time")) == PartitionSpec(None, None)
    # An axis is used once: the batch has taken fsdp, so the width stays whole.
    assert spec_for(mesh, (4, 32), ("batch", "embed")) == PartitionSpec(("data", "fsdp"), None)
    one = models.make_mesh(devices=jax.devices()[:1])
    assert spec_for(one, (4, 32), ("batch", "embed")) == PartitionSpec(None, None)


def test_programs_of_one_device_run_inside_a_mesh():
    """A tool's arrays lie on one device, wherever the policy's do."""
    mesh, add = models.make_mesh(data=8), jax.jit(lambda x: x + 1)
    x = jax.device_put(jnp.ones(3), jax.devices()[1])
    with models.use_mesh(mesh):
        with pytest.raises(ValueError, match="incompatible devices"):
            add(x)
        with no_mesh():
            assert jax.sharding.get_abstract_mesh().empty
            np.testing.assert_array_equal(add(x), 2 * np.ones(3))
        assert jax.sharding.get_abstract_mesh() == mesh.abstract_mesh


def test_make_mesh_counts_devices():
    assert dict(models.make_mesh(data=-1, tensor=2).shape) == {"data": 4, "fsdp": 1, "expert": 1, "tensor": 2}
    with pytest.raises(ValueError, match="does not use 8 devices"):
        models.make_mesh(data=3)
    with pytest.raises(ValueError, match="only one mesh axis may be -1"):
        models.make_mesh(data=-1, fsdp=-1)
    with pytest.raises(ValueError, match="does not use 8 devices"):
        models.make_mesh(data=-1, tensor=16)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX asks of a TPU to find its place."""

    coords: tuple[int, int, int]
    id: int
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    core_on_chip: int = 0
    process_index: int = 0


def torus(x: int, y: int, z: int, slice_index: int = 0) -> list[Chip]:
    """Chips in the order in which JAX lists them: process by process, each with a square of 2 x 2."""
    places = itertools.product(range(z), range(0, y, 2), range(0, x, 2), range(2), range(2))
    return [Chip((a + c, b + d, k), i, slice_index) for i, (k, b, a, d, c) in enumerate(places)]


def steps(mesh, axis: str) -> set[int]:
    """How far neighbours along an axis of the mesh stand from each other."""
    devices = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0)
    pairs = zip(devices[:-1].reshape(-1), devices[1:].reshape(-1), strict=True)
    return {sum(abs(p - q) for p, q in zip(a.coords, b.coords, strict=True)) for a, b in pairs}


def test_neighbours_in_the_mesh_are_neighbours_on_the_torus():
    chips = torus(4, 4, 4)
    plain = np.asarray(chips).reshape(4, 4, 4)
    assert {c.coords for c in plain[0, 0]} == {(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)}  # no line of the torus
    mesh = models.make_mesh(data=4, fsdp=-1, tensor=4, devices=chips)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 4, "expert": 1, "tensor": 4}
    assert steps(mesh, "data") == steps(mesh, "fsdp") == steps(mesh, "tensor") == {1}
    assert set(mesh.devices.reshape(-1)) == set(chips)
    # Sizes that no whole axes make up: still a mesh of all chips, its last axis along a line.
    split = models.make_mesh(data=2, fsdp=8, expert=2, tensor=2, devices=chips)
    assert set(split.devices.reshape(-1)) == set(chips)
    assert steps(split, "tensor") == {1}


def test_devices_stay_as_they_come_where_no_torus_orders_them():
    for chips in (torus(4, 4, 1)[:3], torus(2, 2, 1) + torus(2, 2, 1, slice_index=1)):
        mesh = models.make_mesh(data=-1, devices=chips)
        assert mesh.devices.reshape(-1).tolist() == chips
    back = jax.devices()[::-1]
    assert models.make_mesh(data=2, tensor=4, devices=back).devices.reshape(-1).tolist() == back


@pytest.mark.tpu
@pytest.mark.parametrize("name", ["v5e:4x4", "v5p:2x4x4"])
def test_the_chips_that_the_tpu_compiler_describes_are_ordered(name):
    if importlib.util.find_spec("libtpu") is None:
        pytest.fail("needs the TPU compiler: pip install '.[tpu]'")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    mesh = models.make_mesh(data=len(devices) // 16, fsdp=4, tensor=4, devices=devices)
    assert set(mesh.devices.reshape(-1)) == set(devices)
    assert steps(mesh, "fsdp") == steps(mesh, "tensor") == {1}


def test_heads_must_divide(key):
    mesh = models.make_mesh(tensor=8)
    with pytest.raises(ValueError, match=r"tensor=8, which does not divide the model's heads=4: take a divisor of 4"):
        models.init(CONFIG, key, mesh=mesh)
    mesh = models.make_mesh(data=2, tensor=4)  # two key-value heads: they stay whole
    layers = models.init(CONFIG, key, mesh=mesh)["layers"]
    heads = [layers[name].addressable_shards[0].data.shape[2] for name in ("wq", "wk")]
    assert heads == [1, 2]


def test_batches_are_split_along_rows():
    mesh = models.make_mesh(data=4, fsdp=2)
    batch = shard_batch(mesh, {"ids": np.zeros((8, 3)), "odd": np.zeros((3, 2)), "step": np.float32(1)})
    assert batch["ids"].addressable_shards[0].data.shape == (1, 3)
    assert batch["odd"].sharding.is_fully_replicated
    assert batch["step"].sharding.is_fully_replicated
    assert isinstance(shard_batch(None, {"ids": np.zeros(3)})["ids"], jax.Array)


def test_constrain_without_a_mesh_is_the_identity():
    x = jnp.ones((4, 2))
    assert constrain(x, "batch", "time") is x
    with models.use_mesh(models.make_mesh(data=8)):
        pass
    assert constrain(x, "batch", "time") is x
