"""Meshes, rules and the same numbers on eight devices as on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import models
from models import Config
from models.sharding import constrain, shard_batch, spec_for

CONFIG = Config(
    vocab_size=64, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=48, qk_norm=True, init_std=0.3
)


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}, {"tensor": 8}, {"data": 8}])
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


def test_make_mesh_counts_devices():
    assert dict(models.make_mesh(data=-1, tensor=2).shape) == {"data": 4, "fsdp": 1, "expert": 1, "tensor": 2}
    with pytest.raises(ValueError, match="does not use 8 devices"):
        models.make_mesh(data=3)
    with pytest.raises(ValueError, match="only one mesh axis may be -1"):
        models.make_mesh(data=-1, fsdp=-1)
    with pytest.raises(ValueError, match="does not use 8 devices"):
        models.make_mesh(data=-1, tensor=16)


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
