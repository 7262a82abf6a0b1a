"""Contributions to logits: they are complete, the lens ends in the model's own answer, and windows are taken away."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from analysis.batches import _answer_logprobs, answer_logprobs
from analysis.contributions import ablate_window, logit_contributions, logit_lens, mean_outputs, window_effects
from models.layout import decode_weights

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "models"
FORWARD = jax.jit(models.forward, static_argnames=("config", "record"))
RNG = np.random.default_rng(0)
B, T, A, Y = 3, 10, 2, 4
TOKENS = RNG.integers(1, 300, (B, T), dtype=np.int32)
POSITIONS = np.array([[9, 4], [7, 8], [3, -1]])
TARGETS = RNG.integers(1, 300, (B, A, Y))
HERE = POSITIONS >= 0
ROWS = np.arange(B)[:, None]


@pytest.fixture(scope="module")
def model():
    return models.load(FIXTURES / "qwen3_untied")


def forward(model, config=None, **taps):
    return FORWARD(model.params, config or model.config, jnp.asarray(TOKENS), **taps)


def chosen(logits):
    """logits [B, T, V] at the places and targets."""
    return np.asarray(logits)[ROWS[..., None], POSITIONS[..., None], TARGETS]


@pytest.mark.parametrize("name", ["qwen3", "qwen3_untied", "gemma2", "gemma3", "qwen3_moe", "deepseek_v3"])
def test_the_parts_are_complete(name):
    model = models.load(FIXTURES / name)
    parts = logit_contributions(model.params, model.config, TOKENS, POSITIONS, TARGETS)
    want = chosen(forward(model, model.config.replace(final_softcap=None)).logits)
    total = np.asarray(parts.embed + parts.attn.sum(0) + parts.mlp.sum(0))
    scale = np.abs(want[HERE]).max()
    np.testing.assert_allclose(total[HERE], want[HERE], atol=1e-4 * scale)
    np.testing.assert_allclose(np.asarray(parts.logit)[HERE], want[HERE], atol=1e-4 * scale)
    assert parts.attn.shape == (model.config.layers, B, A, Y)
    for part in jax.tree.leaves(parts):
        assert not np.asarray(part)[..., 2, 1, :].any()  # there is no position
    assert np.abs(np.asarray(parts.attn)).max() > 1e-3


def test_a_part_by_hand(model):
    out = forward(model, record=("attn.out", "mlp.out", "resid.post"))
    parts = logit_contributions(model.params, model.config, TOKENS, POSITIONS, TARGETS)
    final = np.asarray(out.records["resid.post"])[-1, 1, 8]
    rms = np.sqrt((final**2).mean() + model.config.norm_eps)
    column = np.asarray(model.params["head"])[:, TARGETS[1, 1, 2]]
    for site, got, cosine in (
        ("attn.out", parts.attn, parts.attn_cosine),
        ("mlp.out", parts.mlp, parts.mlp_cosine),
    ):
        o = np.asarray(out.records[site])[1, 1, 8]
        want = (o * np.asarray(model.params["final_norm"]) / rms) @ column
        np.testing.assert_allclose(got[1, 1, 1, 2], want, rtol=1e-4)
        np.testing.assert_allclose(
            cosine[1, 1, 1, 2], o @ column / np.linalg.norm(o) / np.linalg.norm(column), rtol=1e-4
        )


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_the_lens_ends_in_the_models_own_answer(name):
    model = models.load(FIXTURES / name)
    after_attn, after_mlp = logit_lens(model.params, model.config, TOKENS, POSITIONS, TARGETS)
    out = forward(model, record=("resid.mid",))
    own = chosen(jax.nn.log_softmax(out.logits))
    np.testing.assert_allclose(np.asarray(after_mlp)[-1][HERE], own[HERE], atol=1e-4)
    normed = models.transformer.rms_norm(out.records["resid.mid"][1], model.params["final_norm"], model.config)
    want = chosen(jax.nn.log_softmax(models.unembed(model.params, model.config, normed)))
    np.testing.assert_allclose(np.asarray(after_attn)[1][HERE], want[HERE], atol=1e-4)
    np.testing.assert_allclose(
        answer_logprobs(model.params, model.config, TOKENS, POSITIONS, TARGETS)[HERE], own[HERE], atol=1e-4
    )
    one = answer_logprobs(model.params, model.config, TOKENS, POSITIONS, TARGETS[..., 0])
    np.testing.assert_allclose(one[HERE], own[..., 0][HERE], atol=1e-4)
    assert np.asarray(one)[2, 1] == 0


def test_a_window_of_zeros_or_means_is_put_in_the_layers_outputs(model):
    config = model.config
    counted = RNG.random((B, T)) < 0.5
    for site in ("attn.out", "mlp.out"):
        mean = mean_outputs(model.params, config, [(TOKENS[:1], counted[:1]), (TOKENS[1:], counted[1:])], site)
        plain = np.asarray(forward(model, record=(site,)).records[site])
        np.testing.assert_allclose(mean, plain[:, counted].mean(1), atol=1e-5)
        for value in (None, mean):
            got = forward(model, record=(site,), edit=ablate_window(config, site, 1, 2, value)).records[site]
            want = np.zeros_like(mean) if value is None else mean
            np.testing.assert_allclose(got[1:], np.broadcast_to(want[1:, None, None], got[1:].shape), atol=1e-6)
            np.testing.assert_array_equal(got[0], plain[0])


def test_effects_of_windows_are_differences_and_share_one_program(model):
    params, config = model.params, model.config
    effects = window_effects(params, config, TOKENS, POSITIONS, TARGETS, site="mlp.out", width=2)
    before = _answer_logprobs._cache_size()
    mean = mean_outputs(params, config, [(TOKENS, np.ones((B, T), bool))], "mlp.out")
    other = window_effects(params, config, TOKENS, POSITIONS, TARGETS, site="mlp.out", width=1, mean=mean)
    assert _answer_logprobs._cache_size() == before
    assert (effects.shape, other.shape) == ((2, B, A, Y), (3, B, A, Y))
    cut = {**params, "layers": {**params["layers"], "w_down": params["layers"]["w_down"].at[1:].set(0.0)}}
    want = answer_logprobs(cut, config, TOKENS, POSITIONS, TARGETS) - answer_logprobs(
        params, config, TOKENS, POSITIONS, TARGETS
    )
    np.testing.assert_allclose(effects[1], want, atol=1e-4)
    assert np.abs(effects).max() > 1e-2


def test_errors(model):
    params, config = model.params, model.config
    run = lambda positions=POSITIONS, targets=TARGETS, tokens=TOKENS, params=params: logit_contributions(  # noqa: E731
        params, config, tokens, positions, targets
    )
    with pytest.raises(ValueError, match=r"targets must be \[B, A, Y\]"):
        run(targets=TARGETS[..., 0])
    with pytest.raises(
        ValueError, match=r"targets must be \[B, A\] or \[B, A, Y\] with \[B, A\] = \[3, 2\], got \[3, 1"
    ):
        run(targets=TARGETS[:, :1])
    with pytest.raises(ValueError, match=r"positions must be \[B, A\] with B = 3, got \[2, 2\]"):
        run(positions=POSITIONS[:2])
    with pytest.raises(ValueError, match=r"target ids lie in 0 .. 299, got .* 300"):
        run(targets=np.full_like(TARGETS, 300))
    with pytest.raises(ValueError, match=r"tokens must be integers \[B, T\], got float64 \[3, 10\]"):
        run(tokens=TOKENS.astype(float))
    with pytest.raises(ValueError, match="sampler's layout"):
        run(params=decode_weights(params, config))
    with pytest.raises(ValueError, match=r"a sub-layer is one of attn.out, mlp.out, not 'mlp'"):
        ablate_window(config, "mlp", 0)
    with pytest.raises(ValueError, match=r"layers 0 .. 4 do not lie in 0 .. 2"):
        window_effects(params, config, TOKENS, POSITIONS, TARGETS, site="mlp.out")
    with pytest.raises(ValueError, match=r"mean must be \[L, D\] = \[3, 48\], got \[48\]"):
        ablate_window(config, "mlp.out", 0, 1, np.zeros(48))
