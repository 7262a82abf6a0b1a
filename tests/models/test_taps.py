"""Hooks: what they record, what they change, and that without them nothing is different."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models import Config
from models import transformer as module
from models.taps import BLOCK_SITES, SITES, Add, Replace, Scale, sites
from models.transformer import forward

CONFIG = Config(
    vocab_size=40, dim=16, layers=3, heads=4, kv_heads=2, head_dim=6, ffn_dim=20, qk_norm=True, init_std=0.4
)
B, T = 2, 7
TOKENS = np.random.default_rng(0).integers(0, 40, (B, T), dtype=np.int32)


@pytest.fixture(scope="module")
def params():
    return models.init(CONFIG, jax.random.key(1))


def test_every_site_is_recorded_with_its_shape(params):
    out = jax.jit(lambda p: forward(p, CONFIG, TOKENS, record=sites(CONFIG)))(params)
    L, D, N, K, H, F = 3, 16, 4, 2, 6, 20
    shapes = {
        "embed": (B, T, D), "final": (B, T, D),
        "resid.pre": (L, B, T, D), "resid.mid": (L, B, T, D), "resid.post": (L, B, T, D),
        "attn.q": (L, B, T, N, H), "attn.k": (L, B, T, K, H), "attn.v": (L, B, T, K, H),
        "attn.logits": (L, B, K, N // K, T, T), "attn.probs": (L, B, K, N // K, T, T),
        "attn.heads": (L, B, T, N, H), "attn.out": (L, B, T, D),
        "mlp.gate": (L, B, T, F), "mlp.act": (L, B, T, F), "mlp.out": (L, B, T, D),
    }  # fmt: skip
    assert {name: value.shape for name, value in out.records.items()} == shapes
    r = out.records
    np.testing.assert_allclose(r["resid.mid"], r["resid.pre"] + r["attn.out"], atol=1e-5)
    np.testing.assert_allclose(r["resid.post"], r["resid.mid"] + r["mlp.out"], atol=1e-5)
    np.testing.assert_array_equal(r["resid.pre"][1:], r["resid.post"][:-1])
    np.testing.assert_array_equal(r["resid.pre"][0], r["embed"])
    np.testing.assert_array_equal(r["final"], out.hidden)
    np.testing.assert_allclose(r["attn.probs"].sum(-1), 1, atol=1e-5)
    assert (np.triu(np.asarray(r["attn.probs"])[0, 0, 0, 0], 1) == 0).all()
    plain = jax.jit(lambda p: forward(p, CONFIG, TOKENS))(params)
    np.testing.assert_allclose(plain.logits, out.logits, atol=1e-5)


def test_edits_differ_by_layer_and_reach_what_follows(params):
    keep = jnp.ones((3, 20)).at[1, 4].set(0.0)
    run = jax.jit(lambda p, e: forward(p, CONFIG, TOKENS, record=("mlp.act", "resid.pre"), edit=e))
    plain = run(params, {})
    edited = run(params, {"mlp.act": Scale(keep)})
    assert (np.asarray(edited.records["mlp.act"])[1, ..., 4] == 0).all()
    np.testing.assert_array_equal(edited.records["resid.pre"][:2], plain.records["resid.pre"][:2])
    assert not np.allclose(edited.records["resid.pre"][2], plain.records["resid.pre"][2])
    # The same as taking the neuron's row out of the weights.
    cut = params | {"layers": params["layers"] | {"w_down": params["layers"]["w_down"].at[1, 4].set(0.0)}}
    np.testing.assert_allclose(edited.logits, run(cut, {}).logits, atol=1e-5)


def test_new_edit_values_do_not_compile_again(params):
    run = jax.jit(lambda p, e: forward(p, CONFIG, TOKENS, edit=e).logits)
    before = run(params, {"attn.heads": Scale(jnp.ones((3, 4, 1)))})
    after = run(params, {"attn.heads": Scale(jnp.ones((3, 4, 1)).at[0, 2].set(0.0))})
    assert run._cache_size() == 1
    assert not np.allclose(before, after)


def test_add_and_replace(params):
    value = jnp.zeros((3, T, 1)).at[2, 3].set(5.0)
    out = forward(params, CONFIG, TOKENS, record=("resid.mid",), edit={"resid.mid": Add(value)})
    plain = forward(params, CONFIG, TOKENS, record=("resid.mid",))
    np.testing.assert_allclose(
        out.records["resid.mid"][2] - plain.records["resid.mid"][2], np.tile(value[2], (B, 1, 16)), atol=1e-5
    )
    # Putting one run's values into another reproduces it from there on (activation patching).
    other = TOKENS[:, ::-1]
    source = forward(params, CONFIG, other, record=("resid.post",))
    mask = jnp.zeros((3, 1, 1, 1), bool).at[2].set(True)
    patched = forward(params, CONFIG, TOKENS, edit={"resid.post": Replace(mask, source.records["resid.post"])})
    np.testing.assert_allclose(patched.logits, source.logits, atol=1e-5)


@pytest.mark.parametrize("site", ["embed", "final"])
def test_edge_sites_can_be_edited(params, site):
    out = forward(params, CONFIG, TOKENS, record=(site,), edit={site: Scale(jnp.float32(0.0))})
    assert (np.asarray(out.records[site]) == 0).all()
    if site == "final":
        assert (np.asarray(out.logits) == 0).all()


def test_gradient_with_respect_to_added_zeros_is_the_activation_gradient(params):
    def target(zeros):
        logits = forward(params, CONFIG, TOKENS, edit={"mlp.out": Add(zeros)}).logits
        return jnp.sum(logits[:, -1, 3])

    zeros = jnp.zeros((3, B, T, 16))
    gradient = np.asarray(jax.grad(target)(zeros))
    assert np.abs(gradient).max() > 0
    rng = np.random.default_rng(0)
    for _ in range(4):
        direction = rng.standard_normal(zeros.shape).astype(np.float32)
        step = 1e-2 / np.linalg.norm(direction) * direction
        slope = (target(jnp.asarray(step)) - target(jnp.asarray(-step))) / 2
        np.testing.assert_allclose(slope, np.sum(gradient * step), rtol=2e-2, atol=1e-4)


def test_taps_work_on_a_mesh(params):
    mesh = models.make_mesh(data=2, fsdp=2, tensor=2)
    edit = {"mlp.act": Scale(jnp.ones((3, 20)).at[0, 1].set(0.0))}
    run = lambda p, t, e: forward(p, CONFIG, t, record=("mlp.act",), edit=e)  # noqa: E731
    plain = jax.jit(run)(params, TOKENS, edit)
    with models.use_mesh(mesh):
        sharded = jax.device_put(params, models.shardings(CONFIG, mesh))
        out = jax.jit(lambda *a: run(*a))(sharded, TOKENS, edit)
    np.testing.assert_allclose(plain.records["mlp.act"], out.records["mlp.act"], atol=1e-4)
    np.testing.assert_allclose(plain.logits, out.logits, atol=1e-4)


def test_unknown_sites_are_named(params):
    for options in ({"record": ("mlp.actt",)}, {"edit": {"mlp.actt": Scale(jnp.ones(3))}}):
        with pytest.raises(ValueError, match=r"unknown tap site 'mlp\.actt'; sites: embed"):
            forward(params, CONFIG, TOKENS, **options)
    assert set(BLOCK_SITES) < set(SITES)


def _program(function, *args) -> str:
    """The program handed to the compiler, without names of places in the source."""
    return jax.jit(lambda *args: function(*args)).lower(*args).as_text()


class _Absent:
    """Stands for the feature having never been written: every site is the value itself."""

    def __init__(self, factor=1):
        self.values, self.factor = {}, factor

    def __call__(self, name, value, slots=None):
        return value * 2 if self.factor == 2 and name == "mlp.out" else value

    def wants(self, name):
        return False

    def wants_blocks(self, name):
        return False

    def reduce_block(self, slots):
        return {}

    def finish(self):
        return {}


def test_without_taps_the_program_is_the_one_without_the_feature(params, monkeypatch):
    run = lambda p, tokens: forward(p, CONFIG, tokens).logits  # noqa: E731
    ours = _program(run, params, TOKENS)
    assert ours != _program(lambda p, t: forward(p, CONFIG, t, record=("mlp.out",)).records["mlp.out"], params, TOKENS)
    with monkeypatch.context() as patch:
        patch.setattr(module, "Taps", lambda *_: _Absent())
        assert _program(run, params, TOKENS) == ours
    with monkeypatch.context() as patch:  # the comparison does see a difference
        patch.setattr(module, "Taps", lambda *_: _Absent(factor=2))
        assert _program(run, params, TOKENS) != ours
