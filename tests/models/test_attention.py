"""Every way to compute attention gives the same, and none but the plain one holds a [T, T] array."""

import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models import Config, attention
from models.attention import Look, _splash, _whole
from models.taps import Reduced, Taps, check_sites

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "models"
CONFIG = Config(
    vocab_size=40, dim=16, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=20, qk_norm=True, init_std=0.4
)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 8 queries for everything longer than 8."""
    monkeypatch.setattr(attention, "_LONGEST_WHOLE", 8)
    monkeypatch.setattr(attention, "_BLOCK", 8)


def inputs(key, B=2, T=21, N=4, K=2, H=8, X=8, dtype="float32"):
    shapes = (B, T, N, H), (B, K, T, H), (B, K, T, X)
    keys = jax.random.split(key, 3)
    return tuple(jax.random.normal(k, shape, jnp.float32).astype(dtype) for k, shape in zip(keys, shapes, strict=True))


LOOKS = {
    "causal": Look(jnp.arange(21)[None], straight=True),
    "window": Look(jnp.arange(21)[None], jnp.int32(5), straight=True, sliding=5),
    "packed": Look(jnp.arange(21)[None], segments=jnp.repeat(jnp.array([[1, 2, 3]] * 2), 7, axis=1), straight=True),
    "behind": Look(jnp.arange(21)[None] + jnp.array([[0], [0]])),
}


@pytest.mark.parametrize("kind", LOOKS)
@pytest.mark.parametrize("cap", [None, 2.0])
def test_blocks_equal_the_whole_in_values_and_gradients(kind, cap, key, small_blocks):
    look, config = LOOKS[kind], CONFIG.replace(attn_softcap=cap)
    args = inputs(key, X=6)

    def loss(form):
        return lambda *qkv: jnp.sum(jnp.sin(form(*qkv, look, config, Taps())))

    whole = jax.jit(jax.value_and_grad(loss(lambda *a: _whole(*a)[0]), argnums=(0, 1, 2)))(*args)
    blocks = jax.jit(jax.value_and_grad(loss(attention.attention), argnums=(0, 1, 2)))(*args)
    chex.assert_trees_all_close(blocks, whole, atol=2e-5)


def test_a_long_prompt_has_no_square_buffer(key):
    T = 4096
    q, k, v = inputs(key, B=1, T=T)
    look = Look(jnp.arange(T)[None], straight=True)
    run = jax.grad(lambda q: attention.attention(q, k, v, look, CONFIG, Taps()).sum())
    compiled = jax.jit(run).lower(q).compile()
    assert not re.search(rf"\[([0-9]+,)*{T},{T}\]", compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < CONFIG.heads * T * T  # a fourth of the scores


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "deepseek_v3", "qwen3"])
def test_models_are_the_same_in_blocks(name, small_blocks):
    model, expected = models.load(FIXTURES / name), np.load(FIXTURES / name / "expected.npz")
    logits = models.forward(model.params, model.config, jnp.asarray(expected["tokens"])).logits
    real = np.arange(logits.shape[1]) < expected["lengths"][:, None]
    error = np.abs(np.asarray(logits) - expected["logits"])[real].max()
    assert error <= 1e-4 * np.abs(expected["logits"][real]).max()


def test_long_prompts_are_prefilled_in_blocks(small_blocks):
    from models.layout import decode_weights
    from models.sample import prefill

    model, tokens = models.load(FIXTURES / "gemma3"), np.random.default_rng(0).integers(2, 300, (2, 40), dtype=np.int32)
    weights = decode_weights(model.params, model.config)
    session = prefill(weights, model.config, tokens, np.array([40, 23], np.int32), 64)
    logits = models.forward(model.params, model.config, jnp.asarray(tokens)).logits
    np.testing.assert_allclose(session.logits[0], logits[0, -1], atol=1e-4)
    np.testing.assert_allclose(session.logits[1], logits[1, 22], atol=1e-4)


@pytest.mark.parametrize("kind", ["causal", "window", "packed"])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_the_tpu_kernel_interpreted_equals_the_whole(kind, cap, key):
    T = 256
    look = {
        "causal": Look(jnp.arange(T)[None], straight=True),
        "window": Look(jnp.arange(T)[None], jnp.int32(40), straight=True, sliding=40),
        "packed": Look(jnp.arange(T)[None], segments=jnp.repeat(jnp.array([[1, 2]]), T // 2, axis=1), straight=True),
    }[kind]
    q, k, v = inputs(key, B=1, T=T, H=128, X=128)
    config = CONFIG.replace(attn_softcap=cap)
    ours = _splash(q, k, v, look, config, interpret=True)
    np.testing.assert_allclose(ours, _whole(q, k, v, look, config, Taps())[0], atol=2e-5)


@pytest.mark.parametrize(("T", "kernel"), [(256, True), (250, False)])
def test_on_a_tpu_the_kernel_is_taken_for_whole_tiles(T, kernel, key, monkeypatch):
    """Traced, not run: what a pod's training step takes must not wait for a pod to be tried."""
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    look = Look(jnp.arange(T)[None], straight=True)
    q, k, v = inputs(key, B=1, T=T, H=128, X=128)
    traced = jax.make_jaxpr(lambda *a: attention.attention(*a, look, CONFIG, Taps()))(q, k, v)
    assert traced.out_avals[0].shape == q.shape
    assert ("pallas_call" in str(traced)) == kernel


def share(values):
    return {"ratio": jnp.linalg.norm(values["mlp.out"]) / jnp.linalg.norm(values["resid.mid"])}


def fired(values):
    return jnp.sum(values["mlp.act"] > 0, axis=(0, 1))


def test_a_reduction_is_what_one_would_make_of_the_record(key):
    params, tokens = models.init(CONFIG, key), jax.random.randint(key, (2, 12), 0, 40)
    both = {
        "fired": Reduced(("mlp.act",), fired),
        "share": Reduced(("resid.mid", "mlp.out"), share),
    }  # fmt: skip
    run = jax.jit(lambda p: models.forward(p, CONFIG, tokens, record=("mlp.act",), reduce=both))
    records = run(params).records
    chex.assert_shape(records["fired"], (2, 20))
    np.testing.assert_array_equal(records["fired"], (records["mlp.act"] > 0).sum((1, 2)))
    chex.assert_shape(records["share"]["ratio"], (2,))
    np.testing.assert_allclose(run(params).logits, models.forward(params, CONFIG, tokens).logits, atol=1e-5)


def test_a_reduction_is_the_same_on_a_mesh(key):
    params, tokens = models.init(CONFIG, key), jax.random.randint(key, (8, 12), 0, 40)
    run = jax.jit(lambda p: models.forward(p, CONFIG, tokens, reduce={"fired": Reduced(("mlp.act",), fired)}).records)
    alone = run(params)["fired"]
    mesh = models.make_mesh(data=2, fsdp=2, tensor=2)
    with models.use_mesh(mesh):
        spread = run(jax.device_put(params, models.shardings(CONFIG, mesh)))["fired"]
    np.testing.assert_array_equal(spread, alone)


def test_memory_of_a_reduction_does_not_grow_by_layers_times_tokens(key):
    config = CONFIG.replace(layers=12, ffn_dim=256)
    params = models.init(config, key)

    def memory(**taps):
        tokens = jnp.zeros((1, 1024), jnp.int32)
        run = jax.jit(lambda p: models.forward(p, config, tokens, head=False, **taps).records)
        stats = run.lower(params).compile().memory_analysis()
        return stats.temp_size_in_bytes + stats.output_size_in_bytes

    recorded, reduced = memory(record=("mlp.act",)), memory(reduce={"fired": Reduced(("mlp.act",), fired)})
    assert recorded - reduced > 10 * 1024 * 256 * 4  # eleven of twelve layers' activations


def received(values, slots):
    """Attention that each key gets, summed over queries: [B, K, G, S]."""
    real = (slots >= 0)[:, None, None, :, None]
    return jnp.sum(jnp.where(real, values["attn.probs"], 0.0), axis=3)


class Quieter:
    """Take 2 from the scores of the first three keys for queries from slot 10 on."""

    by_block = True

    def __call__(self, scores, slots):
        late = (slots >= 10)[:, None, None, :, None] & (jnp.arange(scores.shape[-1]) < 3)
        return jnp.where(late, scores - 2.0, scores)


def test_reductions_and_edits_by_block_equal_those_of_the_whole(key, monkeypatch):
    params, tokens = models.init(CONFIG, key), jax.random.randint(key, (2, 21), 0, 40)
    jax.tree_util.register_pytree_node(Quieter, lambda q: ((), None), lambda *_: Quieter())
    taps = {
        "reduce": {"received": Reduced(("attn.probs",), received, by_block=True)},
        "edit": {"attn.logits": Quieter()},
    }
    whole = models.forward(params, CONFIG, tokens, **taps, record=("attn.probs",))
    np.testing.assert_allclose(whole.records["received"], whole.records["attn.probs"].sum(4), atol=1e-5)
    monkeypatch.setattr(attention, "_LONGEST_WHOLE", 8)
    monkeypatch.setattr(attention, "_BLOCK", 8)
    blocks = models.forward(params, CONFIG, tokens, **taps)
    np.testing.assert_allclose(blocks.records["received"], whole.records["received"], atol=1e-5)
    np.testing.assert_allclose(blocks.logits, whole.logits, atol=1e-5)
    assert np.abs(np.asarray(blocks.logits - models.forward(params, CONFIG, tokens).logits)).max() > 0.01


def test_reductions_that_cannot_be_made_are_refused():
    with pytest.raises(ValueError, match=r"not mlp\.act"):
        Reduced(("mlp.act",), fired, by_block=True)
    with pytest.raises(ValueError, match=r"unknown tap site 'moe\.index'"):
        check_sites((), None, CONFIG, {"x": Reduced(("moe.index",), fired)})
    with pytest.raises(ValueError, match="which no layer has all of"):
        check_sites((), None, CONFIG, {"x": Reduced(("embed",), fired)})
    with pytest.raises(ValueError, match="both recorded and"):
        check_sites(("mlp.act",), None, CONFIG, {"mlp.act": Reduced(("mlp.act",), fired)})


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
def test_cudnn_equals_the_whole(window, key):
    T = 512
    look = Look(jnp.arange(T)[None], None if window is None else jnp.int32(window), straight=True, sliding=window)
    q, k, v = inputs(key, B=2, T=T, H=64, X=64, dtype="bfloat16")
    ours = jax.jit(lambda *a: attention.attention(*a, look, CONFIG, Taps()))(q, k, v)
    np.testing.assert_allclose(
        ours.astype(jnp.float32), _whole(q, k, v, look, CONFIG, Taps())[0].astype(jnp.float32), atol=2e-2
    )


@pytest.mark.tpu
@pytest.mark.parametrize("axes", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}])
def test_the_tpu_kernel_compiles_ahead_of_time(axes):
    """The train step of a model on a topology without a TPU: the kernel is in the program, a [T, T] buffer is not."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = models.make_mesh(**axes, devices=devices)
    config = CONFIG.replace(heads=4, kv_heads=2, head_dim=128, dim=256, dtype="bfloat16", remat="block")
    params = models.abstract(config, "float32", mesh)
    tokens = jax.ShapeDtypeStruct((4, 2048), jnp.int32)
    with models.use_mesh(mesh):
        run = jax.grad(lambda p, t: models.forward(p, config, t, head=False).hidden.astype(jnp.float32).sum())
        text = jax.jit(run).lower(params, tokens).compile().as_text()
    assert "tpu_custom_call" in text
    assert not re.search(r"\[([0-9]+,)*2048,2048\]", text)
