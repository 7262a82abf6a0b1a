"""Declared parameters: counts, initial values, HF shapes, and values that do not depend on the mesh."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models import Config
from models.config import FAMILIES
from models.params import Param, declare

SMALL = Config(vocab_size=50, dim=16, layers=2, heads=4, kv_heads=2, head_dim=6, ffn_dim=24)
CONFIGS = {
    "llama": SMALL.replace(family="llama", tie_embeddings=False),
    "qwen2": SMALL.replace(family="qwen2", qkv_bias=True),
    "olmoe": SMALL.replace(family="olmoe", qk_norm_whole=True, experts=3, top_k=2),
    "gemma2": SMALL.replace(family="gemma2", **FAMILIES["gemma2"]),
    "qwen3": SMALL.replace(qk_norm=True),
    "deepseek_v3": SMALL.replace(
        family="deepseek_v3", router_score="sigmoid", kv_heads=4, kv_lora=8, q_lora=10, rope_dim=2, value_dim=5,
        experts=4, top_k=2, groups=2, top_groups=1, shared_dim=24, first_dense=1, dense_ffn_dim=40,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_count_and_shapes(name, key):
    config = CONFIGS[name]
    params = models.init(config, key)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == config.num_params()
    described = models.abstract(config, "bfloat16")
    assert jax.tree.structure(described) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape, described, params))
    exact = {"router_bias"}  # float32 whatever the rest is
    for path, leaf in jax.tree_util.tree_leaves_with_path(described):
        assert leaf.dtype == (jnp.float32 if path[-1].key in exact else jnp.bfloat16)
    for param in jax.tree.leaves(declare(config), is_leaf=lambda leaf: isinstance(leaf, Param)):
        rows = param.shape[param.stacked :]
        assert np.prod(param.hf_shape) == np.prod(rows)
        assert len(param.shape) == len(param.axes)
        assert ("{layer}" in param.hf, "{expert}" in param.hf) == (param.stacked > 0, param.stacked > 1)
        assert len(set(param.hf_names)) == math.prod(param.shape[: param.stacked])


def test_hf_shapes_are_out_by_in():
    tree = declare(CONFIGS["qwen2"])
    layers = tree["layers"]
    assert layers["wq"].hf_shape == (24, 16)
    assert layers["wk"].hf_shape == (12, 16)
    assert layers["wo"].hf_shape == (16, 24)
    assert layers["w_down"].hf_shape == (16, 24)
    assert layers["bk"].hf_shape == (12,)
    assert tree["embed"].hf_shape == (50, 16)
    assert declare(CONFIGS["llama"])["head"].hf_shape == (50, 16)


def test_initial_values_have_the_declared_spread(key):
    config = Config(vocab_size=500, dim=64, layers=8, heads=4, kv_heads=4, head_dim=16, ffn_dim=128, qkv_bias=True)
    params = models.init(config.replace(tie_embeddings=False, init_std=0.05), key)
    for name, std in {"wq": 0.05, "w_up": 0.05, "wo": 0.05 / 4, "w_down": 0.05 / 4}.items():  # sqrt(2 * 8) = 4
        values = np.asarray(params["layers"][name])
        np.testing.assert_allclose(values.std(axis=tuple(range(1, values.ndim))), std, rtol=0.05, err_msg=name)
        assert abs(values.mean()) < std / 50
    np.testing.assert_allclose(np.std(params["embed"]), 0.05, rtol=0.03)
    np.testing.assert_allclose(np.std(params["head"]), 0.05, rtol=0.03)
    assert (np.asarray(params["layers"]["attn_norm"]) == 1).all()
    assert (np.asarray(params["layers"]["bq"]) == 0).all()
    # Different parameters and layers have different values.
    assert not np.array_equal(params["layers"]["w_gate"], params["layers"]["w_up"])
    assert not np.array_equal(params["layers"]["wq"][0], params["layers"]["wq"][1])


def test_values_do_not_depend_on_the_mesh(key):
    config = CONFIGS["qwen3"]
    mesh = models.make_mesh(data=2, fsdp=2, tensor=2)
    plain, sharded = models.init(config, key), models.init(config, key, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, plain, sharded)
    wanted = models.shardings(config, mesh)
    assert jax.tree.all(jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), sharded, wanted))
    assert not sharded["layers"]["wq"].sharding.is_fully_replicated
    assert models.init(config, key, dtype="bfloat16")["embed"].dtype == jnp.bfloat16
