"""Hooks in the sampler: what they see and change in a conversation is what they see and change in one full forward."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models.layout import decode_weights
from models.sample import decode, extend, prefill
from models.taps import Add, AddToKeys, Reduced, Scale

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "models"
PROMPTS = np.random.default_rng(0).integers(1, 60, (2, 7), dtype=np.int32)
LENGTHS = np.array([7, 4], np.int32)
MORE, COUNTS = np.random.default_rng(1).integers(1, 60, (4, 3), dtype=np.int32), np.array([3, 1, 2, 0], np.int32)
LIMITS = np.array([4, 2, 0, 3], np.int32)
SITES = {
    "qwen3": ("resid.mid", "attn.q", "mlp.act", "attn.out", "embed", "final"),
    "deepseek_v3": ("resid.post", "mlp.act", "moe.weights", "attn.heads"),  # the first layer has no experts
}


def conversation(model, **hooks):
    """Each prompt twice, a second turn, then greedy tokens; returns the rows, their lengths, and what was kept."""
    config = model.config.replace(eos_ids=())
    weights = decode_weights(model.params, config)
    session = prefill(weights, config, PROMPTS, LENGTHS, 32, repeat=2, **hooks)
    first = session.records
    session = extend(weights, config, session, MORE, COUNTS, 10, **hooks)
    second, between = session.records, np.asarray(session.logits)
    out, session = decode(weights, config, session, jax.random.key(0), LIMITS, steps=6, temperature=0.0, **hooks)
    assert not session.records
    starts = np.repeat(LENGTHS, 2)
    lens = starts + COUNTS + np.asarray(out.counts)
    rows = np.zeros((4, lens.max()), np.int32)
    for b in range(4):
        parts = PROMPTS[b // 2, : starts[b]], MORE[b, : COUNTS[b]], np.asarray(out.tokens)[b, : out.counts[b]]
        rows[b, : lens[b]] = np.concatenate(parts)
    return rows, lens, first, second, between, out


@pytest.mark.parametrize("name", SITES)
def test_records_are_those_of_a_full_forward(name):
    model = models.load(FIXTURES / name)
    sites = SITES[name]
    rows, lens, first, second, _, out = conversation(model, record=sites)
    whole = models.forward(model.params, model.config, jnp.asarray(rows), record=sites).records
    steps = np.asarray(out.counts)
    for site in sites:
        edge = site in ("embed", "final")
        full, one = np.asarray(whole[site]), np.asarray(first[site])
        if site.startswith("moe."):
            full, one = full.reshape(full.shape[0], *rows.shape, -1), one.reshape(one.shape[0], 2, -1, full.shape[-1])
        if edge:
            full, one = full[None], one[None]
        two = np.asarray(second[site])[None] if edge else np.asarray(second[site])
        two = two.reshape(full.shape[0], 4, -1, *full.shape[3:])
        drawn = np.asarray(out.records[site])
        drawn = drawn.reshape(6, full.shape[0], 4, *full.shape[3:])
        scale = np.abs(full).max()
        for b in range(4):
            n, m = LENGTHS[b // 2], COUNTS[b]
            np.testing.assert_allclose(one[:, b // 2, :n], full[:, b, :n], atol=2e-5 * scale)
            np.testing.assert_allclose(two[:, b, :m], full[:, b, n : n + m], atol=2e-5 * scale)
            seen = drawn[: steps[b], :, b].swapaxes(0, 1)
            np.testing.assert_allclose(seen, full[:, b, n + m : lens[b]], atol=2e-5 * scale)


@pytest.mark.parametrize(
    ("name", "site"), [("qwen3", "mlp.act"), ("qwen3", "resid.mid"), ("deepseek_v3", "moe.routed"), ("qwen3", "final")]
)
def test_edits_change_what_a_full_forward_with_them_changes(name, site):
    model = models.load(FIXTURES / name)
    config = model.config
    width = config.ffn_dim if site == "mlp.act" else config.dim
    lead = () if site == "final" else (config.moe_layers if site.startswith("moe.") else config.layers,)
    values = np.random.default_rng(2).uniform(0.2, 1.5, (*lead, width)).astype(np.float32)
    edit = {site: Scale(jnp.asarray(values))}
    rows, lens, *_, between, out = conversation(model, edit=edit)
    logits = np.asarray(models.forward(model.params, config, jnp.asarray(rows), edit=edit).logits)
    plain = np.asarray(models.forward(model.params, config, jnp.asarray(rows)).logits)
    assert np.abs(logits - plain).max() > 0.05 * np.abs(plain).max()
    for b in range(4):
        start = lens[b] - int(out.counts[b])
        np.testing.assert_allclose(between[b], logits[b, start - 1], atol=5e-5 * np.abs(logits).max())
        drawn = np.asarray(out.tokens)[b, : out.counts[b]]
        np.testing.assert_array_equal(drawn, logits[b, start - 1 : lens[b] - 1].argmax(-1))


def test_attention_is_steered_by_key_in_prompts_and_while_decoding():
    """The same array for programs that see 8, 16 and 32 keys; one value per head, 0 behind the array's end."""
    model = models.load(FIXTURES / "qwen3")
    config = model.config
    value = np.zeros((config.layers, 1, config.heads, 5), np.float32)
    value[0, 0, 1, 2:4], value[1, 0, 0, 1] = 3.0, -4.0
    edit = {"attn.logits": AddToKeys(jnp.asarray(value))}
    rows, lens, *_, out = conversation(model, edit=edit)

    T = rows.shape[1]
    grouped = value.reshape(config.layers, 1, config.kv_heads, -1, 1, 5)
    whole = np.pad(grouped, [(0, 0)] * 5 + [(0, T - 5)])
    by_hand = {"attn.logits": Add(jnp.asarray(whole))}
    want = np.asarray(models.forward(model.params, config, jnp.asarray(rows), edit=by_hand).logits)
    same = np.asarray(models.forward(model.params, config, jnp.asarray(rows), edit=edit).logits)
    np.testing.assert_allclose(same, want, atol=1e-5 * np.abs(want).max())
    for b in range(4):
        start = lens[b] - int(out.counts[b])
        np.testing.assert_array_equal(
            np.asarray(out.tokens)[b, : out.counts[b]], want[b, start - 1 : lens[b] - 1].argmax(-1)
        )


def test_a_reduction_comes_once_per_step_and_new_numbers_compile_nothing():
    model = models.load(FIXTURES / "qwen3")
    config = model.config
    fired = Reduced(("mlp.act",), lambda values: (values["mlp.act"] > 0).sum(axis=1))
    *_, first, second, _, out = conversation(model, reduce={"fired": fired}, record=("mlp.act",))
    chex.assert_shape(first["fired"], (config.layers, 2, config.ffn_dim))
    chex.assert_shape(second["fired"], (config.layers, 4, config.ffn_dim))
    chex.assert_shape(out.records["fired"], (6, config.layers, 4, config.ffn_dim))
    np.testing.assert_array_equal(out.records["fired"], (np.asarray(out.records["mlp.act"]) > 0).sum(axis=3))
    assert np.asarray(out.records["fired"])[:4].any()
    assert not np.asarray(out.records["fired"])[4:].any()  # no row ran that long

    from models import sample

    programs = (sample._prefill, sample._extend, sample._decode)
    conversation(model, edit={"mlp.act": Scale(jnp.ones((config.layers, config.ffn_dim)))})
    before = [program._cache_size() for program in programs]
    conversation(model, edit={"mlp.act": Scale(jnp.zeros((config.layers, config.ffn_dim)))})
    assert [program._cache_size() for program in programs] == before


def test_unknown_sites_are_refused_before_anything_runs():
    model = models.load(FIXTURES / "qwen3")
    weights = decode_weights(model.params, model.config)
    with pytest.raises(ValueError, match=r"unknown tap site 'mlp\.acts'"):
        prefill(weights, model.config, PROMPTS, LENGTHS, 32, record=("mlp.acts",))
