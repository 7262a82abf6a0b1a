"""Experts: three ways to run them agree, masked ones are never chosen, masking equals removing."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models.config import Config
from models.moe import block_size, check_expert_mask, keep_experts, moe, route
from models.sample import decode, decode_weights, prefill
from models.taps import Taps, sites

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "models"
CONFIG = Config(
    vocab_size=20, dim=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn_dim=12, family="mixtral", norm_topk=True,
    experts=6, top_k=2, init_std=0.5,
)  # fmt: skip
MASK = np.array([[1, 0, 1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]], bool)


def layer_of(key, config: Config = CONFIG, **changes):
    layers = models.init(config, key)["layers"]
    return {name: w[0] for name, w in layers.items() if name in ("router", "e_gate", "e_up", "e_down")} | changes


def run(layer, x, form: str):
    return moe(x, layer, CONFIG.replace(moe_form=form), Taps())


@pytest.mark.parametrize("form", ["block", "ragged"])
@pytest.mark.parametrize("tokens", [1, 150])
@pytest.mark.parametrize("masked", [False, True])
def test_every_form_agrees_with_dense(form, tokens, masked, key):
    changes = {"expert_mask": jnp.array([True, False, True, True, False, True])} if masked else {}
    layer, x = layer_of(key, **changes), jax.random.normal(key, (1, tokens, CONFIG.dim))

    def loss(layer, x, form):
        return jnp.sum(jnp.sin(run(layer, x, form)))

    chex.assert_shape(run(layer, x, form), x.shape)
    np.testing.assert_allclose(run(layer, x, form), run(layer, x, "dense"), atol=1e-5)
    weights = {name: w for name, w in layer.items() if name != "expert_mask"}

    def gradient(form):
        return jax.jit(jax.grad(lambda w, x: loss(w | changes, x, form), argnums=(0, 1)))(weights, x)

    ours, reference = gradient(form), gradient("dense")
    chex.assert_trees_all_equal_shapes(ours, reference)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))
    if masked:
        for name in ("e_gate", "e_up", "e_down"):
            assert not np.asarray(ours[0][name])[[1, 4]].any()
        assert not np.asarray(ours[0]["router"])[:, [1, 4]].any()


@pytest.mark.parametrize("form", ["block", "ragged"])
def test_no_token_is_dropped_when_all_want_the_same_expert(form, key):
    router = jnp.zeros((CONFIG.dim, CONFIG.experts)).at[:, 3].set(5.0).at[:, 1].set(3.0)
    layer, x = layer_of(key, router=router), jnp.abs(jax.random.normal(key, (1, 200, CONFIG.dim)))
    index, _ = route(x[0], layer, CONFIG, Taps())
    assert set(np.asarray(index).ravel().tolist()) == {1, 3}
    np.testing.assert_allclose(run(layer, x, form), run(layer, x, "dense"), atol=1e-5)


def test_the_work_of_blocks_follows_the_choices_not_the_experts():
    for tokens, top_k, experts in ((512, 2, 8), (512, 2, 64), (4, 2, 64), (4096, 8, 128)):
        size = block_size(tokens, top_k, experts)
        rows = (tokens * top_k // size + min(experts, tokens * top_k)) * size
        assert rows <= 8 * tokens * top_k + 8 * min(experts, tokens * top_k)
        assert 8 <= size <= 128
    few, many = (block_size(512, 2, e) * (512 * 2 // block_size(512, 2, e) + e) for e in (8, 64))
    assert many <= 2 * few  # eight times the experts


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_a_masked_model_equals_one_without_those_experts(name):
    model = models.load(FIXTURES / name)
    tokens = jnp.asarray(np.load(FIXTURES / name / "expected.npz")["tokens"])
    mask = np.ones((3, model.config.experts), bool)
    mask[:, 1] = False
    masked = models.forward(model.params, model.config, tokens, expert_mask=jnp.asarray(mask), record=("moe.index",))
    assert not (np.asarray(masked.records["moe.index"]) == 1).any()
    params, config = keep_experts(model.params, model.config, mask)
    assert (config.experts, params["layers"]["e_gate"].shape[1]) == (model.config.experts - 1,) * 2
    np.testing.assert_allclose(models.forward(params, config, tokens).logits, masked.logits, atol=1e-4)
    free = models.forward(model.params, model.config, tokens).logits
    assert np.abs(np.asarray(free - masked.logits)).max() > 0.1


def test_the_sampler_honours_the_mask():
    model = models.load(FIXTURES / "qwen3_moe")
    config, mask = model.config.replace(eos_ids=()), jnp.asarray(MASK)
    tokens, lengths, new = np.array([[5, 7, 11, 2]], np.int32), np.array([4], np.int32), 12
    weights = decode_weights(model.params, config, expert_mask=mask)
    session = prefill(weights, config, tokens, lengths, size=16)
    out, _ = decode(weights, config, session, jax.random.key(0), np.array([new], np.int32), temperature=0.0)
    written = np.asarray(out.tokens)[:, :new]
    whole = jnp.asarray(np.concatenate([tokens, written], axis=1))
    logits = models.forward(model.params, config, whole, expert_mask=mask).logits
    np.testing.assert_array_equal(np.asarray(logits[:, 3:-1].argmax(-1)), written)
    free = models.generate_tokens(model.params, config, [tokens[0].tolist()], new)
    assert np.asarray(free.tokens)[0, :new].tolist() != written[0].tolist()


@pytest.mark.parametrize("axes", [{"expert": 4, "data": 2}, {"expert": 2, "fsdp": 2, "tensor": 2}])
def test_sharded_experts_agree_with_one_device(axes):
    plain = models.load(FIXTURES / "qwen3_moe")
    tokens = jnp.asarray(np.load(FIXTURES / "qwen3_moe" / "expected.npz")["tokens"])
    mesh = models.make_mesh(**axes)
    model = models.load(FIXTURES / "qwen3_moe", mesh=mesh)
    assert "expert" in str(model.params["layers"]["e_gate"].sharding.spec)
    with models.use_mesh(mesh):
        logits = jax.jit(lambda p, t: models.forward(p, model.config, t).logits)(model.params, tokens)
    alone = models.forward(plain.params, plain.config, tokens).logits
    np.testing.assert_allclose(logits, alone, atol=1e-4 * float(jnp.abs(alone).max()))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((3, 7), bool), r"\[3, 8\]"),
        (np.ones((3, 8), np.float32), "float32"),
        (np.eye(3, 8, dtype=bool), "layer 0, fewer than the 3"),
    ],
)
def test_bad_masks_are_refused(mask, message):
    config = CONFIG.replace(layers=3, experts=8, top_k=3)
    with pytest.raises(ValueError, match=message):
        check_expert_mask(mask, config)


def test_a_checkpoint_has_one_number_of_experts():
    model = models.load(FIXTURES / "qwen3_moe")
    uneven = MASK.copy()
    uneven[2, 5] = True
    with pytest.raises(ValueError, match="4 to 6 experts"):
        keep_experts(model.params, model.config, uneven)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": 0}, "needs experts"),
        ({"family": "llama"}, "has no experts"),
        ({"top_k": 7}, "top_k=7"),
        ({"moe_form": "sparse"}, "dense, block, ragged"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CONFIG.replace(**changes)


def test_sites_are_those_of_the_model(key):
    params, tokens = models.init(CONFIG, key), jnp.asarray([[3, 4, 5]])
    records = models.forward(params, CONFIG, tokens, record=sites(experts=True)).records
    L, M, E, k = CONFIG.layers, 3, CONFIG.experts, CONFIG.top_k
    chex.assert_shape(records["moe.logits"], (L, M, E))
    chex.assert_shape([records["moe.index"], records["moe.weights"]], (L, M, k))
    chex.assert_shape([records["moe.routed"], records["mlp.out"]], (L, 1, M, CONFIG.dim))
    np.testing.assert_allclose(records["moe.weights"].sum(-1), 1.0, atol=1e-6)
    with pytest.raises(ValueError, match=r"mlp\.act.*moe\.index"):
        models.forward(params, CONFIG, tokens, record=("mlp.act",))
