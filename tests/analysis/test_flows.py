"""Flows between segments: analytic values, saliency against plain autodiff, stages, and knock-outs."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from analysis.batches import _answer_logprobs, answer_logprobs
from analysis.flows import (
    Stages,
    attention_flow,
    attention_sums,
    knock_out,
    knock_out_effects,
    saliency_flow,
    saliency_probe,
    saliency_scores,
    segment_sums,
    smooth,
    stage_boundaries,
)
from analysis.segments import SEGMENTS
from models import Config
from models.layout import decode_weights
from models.sample import prefill
from models.taps import Add

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "models"
FORWARD = jax.jit(models.forward, static_argnames=("config", "record"))
RNG = np.random.default_rng(0)
B, T = 3, 12
TOKENS = RNG.integers(1, 300, (B, T), dtype=np.int32)
LABELS = np.array([
    [-1, 0, 0, 1, 1, 0, 2, 2, 2, -1, 3, 3],
    [0, 1, 0, 0, 2, 2, 2, 3, 3, -1, -1, -1],
    [0, 0, 0, 0, 0, 2, 2, 2, 2, 3, 3, -1],  # no key
])  # fmt: skip
POSITIONS = np.array([[10, 11], [8, -1], [9, 10]])
TARGETS = RNG.integers(1, 300, (B, 2))


@pytest.fixture(scope="module")
def model():
    return models.load(FIXTURES / "qwen3")


def by_hand(scores, labels=LABELS, count=4):
    """Mean over pairs, mass, and presence [L, B, from, to] of scores [L, B, T, T], pair by pair."""
    L, rows, t, _ = scores.shape
    mean, mass, there = np.zeros((3, L, rows, count, count))
    earlier = np.tril(np.ones((t, t), bool), -1)
    for b in range(rows):
        for x in range(count):
            for y in range(count):
                pairs = earlier & (labels[b] == y)[:, None] & (labels[b] == x)[None]
                if pairs.any():
                    there[:, b, x, y] = 1
                    mean[:, b, x, y] = scores[:, b, pairs].mean(-1)
                    mass[:, b, x, y] = scores[:, b, pairs].sum(-1) / pairs.any(1).sum()
    return mean, mass, there


def over_samples(value, there):
    return value.sum(1) / np.maximum(there.sum(1), 1)


def check(flow, scores, atol=1e-6):
    mean, mass, there = by_hand(np.asarray(scores, np.float64))
    np.testing.assert_array_equal(flow.samples, there.sum(1)[0])
    np.testing.assert_allclose(flow.mean, over_samples(mean, there), atol=atol)
    np.testing.assert_allclose(flow.mass, over_samples(mass, there), atol=atol)


def record(model, site, config=None):
    return np.asarray(FORWARD(model.params, config or model.config, TOKENS, record=(site,)).records[site])


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "deepseek_v3"])
def test_attention_flow_is_what_one_would_make_of_the_record(name):
    model = models.load(FIXTURES / name)
    probs = record(model, "attn.probs")
    heads = probs.reshape(*probs.shape[:2], -1, T, T)
    flow = attention_flow(model.params, model.config, [(TOKENS, LABELS)])
    check(flow, heads.mean(2))
    apart = attention_flow(model.params, model.config, [(TOKENS, LABELS)], by_head=True)
    np.testing.assert_allclose(apart.mean.mean(1), flow.mean, atol=1e-7)
    one, _, there = by_hand(heads[:, :, 1].astype(np.float64))
    np.testing.assert_allclose(apart.mean[:, 1], over_samples(one, there), atol=1e-6)


def test_streams_padding_and_absent_pairs(model):
    flow = attention_flow(model.params, model.config, [(TOKENS, LABELS)])
    longer = np.pad(TOKENS, ((0, 1), (0, 5))), np.pad(LABELS, ((0, 1), (0, 5)), constant_values=-1)
    for stream in ([longer], [(TOKENS[i : i + 1], LABELS[i : i + 1]) for i in (2, 0, 1)]):
        other = attention_flow(model.params, model.config, stream)
        np.testing.assert_array_equal(other.samples, flow.samples)
        np.testing.assert_allclose(other.mean, flow.mean, atol=1e-6)
        np.testing.assert_allclose(other.mass, flow.mass, atol=1e-6)
    assert flow.samples[SEGMENTS.index("key"), SEGMENTS.index("query")] == 2
    assert flow.curve("answer", "context") is None
    assert flow.curve("key", "query").shape == (3,)
    np.testing.assert_array_equal(flow.curve("key", "query", mass=True), flow.mass[:, 1, 2])
    no_key = attention_flow(model.params, model.config, [(TOKENS[2:], LABELS[2:])])
    assert no_key.curve("key", "query") is None
    assert np.isfinite(no_key.mean).all()


def uniform(T, config=None):
    """A model whose queries are 0: row i attends 1 / (i + 1) to each of its tokens."""
    config = config or Config(vocab_size=50, dim=8, layers=2, heads=2, kv_heads=1, head_dim=4, ffn_dim=8)
    params = models.init(config, jax.random.key(0))
    params["layers"]["wq"] *= 0
    return params, config, RNG.integers(0, 50, (1, T), dtype=np.int32)


@pytest.mark.parametrize("T", [12, 1300])  # the longer one runs in blocks of queries
def test_uniform_attention_has_the_analytic_flow(T):
    params, config, tokens = uniform(T)
    labels = np.repeat([0, 1, 0, 2, 3, -1], T // 6)
    labels = np.pad(labels, (0, T - len(labels)), constant_values=-1)[None]
    flow = attention_flow(params, config, [(tokens, labels)])
    scores = np.tril(np.tile(1 / (np.arange(T) + 1)[:, None], T))[None, None]
    mean, mass, there = by_hand(scores, labels)
    for layer in range(2):
        np.testing.assert_allclose(flow.mean[layer], mean[0, 0], rtol=1e-4)
        np.testing.assert_allclose(flow.mass[layer], mass[0, 0], rtol=1e-4)
    np.testing.assert_array_equal(flow.samples, there[0, 0])

    order = np.array([2, 0, 3, 1])
    permuted = attention_flow(params, config, [(tokens, np.where(labels < 0, -1, order[labels]))])
    np.testing.assert_allclose(permuted.mean[:, order][:, :, order], flow.mean, atol=1e-9)


def square_buffers(function, *args, T):
    text = jax.jit(function).lower(*args).compile().as_text()
    return f",{T},{T}]" in text or f"[{T},{T}]" in text


def test_long_prompts_make_no_square_array_and_equal_the_whole_form(monkeypatch):
    from analysis import flows
    from models import attention

    T = 1300
    config = Config(vocab_size=50, dim=8, layers=2, heads=2, kv_heads=1, head_dim=4, ffn_dim=8, init_std=0.5)
    params = models.init(config, jax.random.key(1))
    tokens = RNG.integers(0, 50, (1, T), dtype=np.int32)
    labels = RNG.integers(-1, 4, (1, T))
    batch = (tokens, labels, np.array([[T - 1]]), np.array([[7]]))
    step = lambda *a: flows._saliency_step.__wrapped__(  # noqa: E731
        params, *a, config=config.replace(remat="block"), count=4
    )
    assert not square_buffers(step, *batch, T=T)
    blocks = attention_flow(params, config, [batch[:2]]), saliency_flow(params, config, [batch])
    effect = knock_out_effects(params, config, *batch, source="key", target="answer", width=2)
    monkeypatch.setattr(attention, "_LONGEST_WHOLE", 4096)
    jax.clear_caches()
    assert square_buffers(step, *batch, T=T)
    whole = attention_flow(params, config, [batch[:2]]), saliency_flow(params, config, [batch])
    for a, b in zip(blocks, whole):
        np.testing.assert_allclose(a.mean, b.mean, rtol=1e-3, atol=1e-9)
    again = knock_out_effects(params, config, *batch, source="key", target="answer", width=2)
    np.testing.assert_allclose(effect, again, atol=1e-5)
    assert abs(effect).max() > 1e-4
    jax.clear_caches()


def test_saliency_by_hand():
    """One query, two keys, two heads; the sum over heads comes before the absolute value."""
    A = np.array([[0.2, 0.8], [0.5, 0.5]], np.float32)
    G = np.array([[1, -1], [0, 1]], np.float32)
    V = np.array([[[2, 0], [0, 1]], [[1, 1], [1, 2]]], np.float32)
    gradient = np.einsum("hx,hjx->hj", G, V)
    np.testing.assert_allclose(gradient, [[2, -1], [1, 2]])
    shaped = [jnp.asarray(x)[None, :, None, None] for x in (A, gradient)]  # [B, K, G, t, S]
    np.testing.assert_allclose(saliency_scores(*shaped)[0, 0], [0.9, 0.2], atol=1e-6)

    # The same through the probe: the query is token 2, the keys are segments 0 and 1.
    labels, slots = jnp.array([[0, 1, 2]]), jnp.array([[2]])
    probs = jnp.pad(jnp.asarray(A), ((0, 0), (0, 1)))[None, :, None, None]
    values = jnp.pad(jnp.asarray(V), ((0, 0), (0, 1), (0, 0)))

    def loss(probe):
        edit = saliency_probe(probe, labels)["attn.probs"]
        layer = jax.tree.map(lambda x: x[0], edit)
        return jnp.sum(jnp.einsum("bkgts,ksx->bkgtx", layer(probs, slots), values) * G[None, :, None, None])

    sums = jax.grad(loss)(jnp.zeros((1, 1, 3, 3)))[0, 0]
    np.testing.assert_allclose(sums[:, 2], [0.9, 0.2, 0.0], atol=1e-6)
    assert not np.asarray(sums[:, :2]).any()


def answer_loss(logits):
    chosen = jax.nn.log_softmax(logits)[np.arange(B)[:, None], np.maximum(POSITIONS, 0), TARGETS]
    return -jnp.sum(jnp.where(POSITIONS >= 0, chosen, 0.0))


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_saliency_is_that_of_values_times_gradients_and_of_autodiff(name):
    model = models.load(FIXTURES / name)
    params, config = model.params, model.config
    probs = record(model, "attn.probs")
    L, _, K, G = probs.shape[:4]

    # Autodiff with the probabilities as leaves.
    leaf = lambda zeros: answer_loss(  # noqa: E731
        FORWARD(params, config, TOKENS, edit={"attn.probs": Add(zeros)}).logits
    )
    wanted = np.abs((probs * np.asarray(jax.jit(jax.grad(leaf))(jnp.zeros(probs.shape)))).sum((2, 3)))

    # The gradient at the heads' outputs times the values.
    values = record(model, "attn.v")
    at_heads = lambda zeros: answer_loss(  # noqa: E731
        FORWARD(params, config, TOKENS, edit={"attn.heads": Add(zeros)}).logits
    )
    g = np.asarray(jax.jit(jax.grad(at_heads))(jnp.zeros((L, B, T, K * G, values.shape[-1])))).reshape(
        L, B, T, K, G, -1
    )
    product = np.einsum("lbtkgx,lbskx->lbkgts", g, values)
    route = np.abs((probs * product).sum((2, 3)))
    scale = wanted.max()
    np.testing.assert_allclose(route, wanted, atol=1e-5 * scale)

    flow = saliency_flow(params, config, [(TOKENS, LABELS, POSITIONS, TARGETS)])
    check(flow, wanted, atol=1e-5 * scale)
    parts = [tuple(x[i : i + 1] for x in (TOKENS, LABELS, POSITIONS, TARGETS)) for i in range(B)]
    streamed = saliency_flow(params, config, parts)
    np.testing.assert_allclose(streamed.mean, flow.mean, atol=1e-5 * scale)


def test_saliency_with_bfloat16_activations_is_close(model):
    batch = (TOKENS, LABELS, POSITIONS, TARGETS)
    exact = saliency_flow(model.params, model.config, [batch])
    rough = saliency_flow(model.params, model.config.replace(dtype="bfloat16"), [batch])
    np.testing.assert_allclose(rough.mean, exact.mean, atol=0.1 * exact.mean.max())
    assert np.abs(rough.mean - exact.mean).max() > 0


def test_no_gradient_is_no_saliency_and_a_bad_one_names_its_layer(model):
    none = saliency_flow(model.params, model.config, [(TOKENS, LABELS, np.full((B, 1), -1), TARGETS[:, :1])])
    assert not none.mean.any()
    layers = model.params["layers"]
    bad = {**model.params, "layers": {**layers, "wo": layers["wo"].at[1].set(jnp.nan)}}
    with pytest.raises(ValueError, match=r"gradient at attention in layer 2 is not finite \(batch 0"):
        saliency_flow(bad, model.config, [(TOKENS, LABELS, POSITIONS, TARGETS)])


def test_segment_sums_leave_out_queries_without_a_place():
    scores = jnp.ones((1, 1, 3, 4))
    sums = segment_sums(scores, jnp.array([[0, 0, 1, 1]]), jnp.array([[2, 3, -1]]), 2)
    np.testing.assert_array_equal(sums[0, 0], [[0, 4], [0, 1]])


def bump(center, width, L=24):
    return np.exp(-(((np.arange(L) - center) / width) ** 2))


def test_stages_are_where_they_were_planted():
    steps = lambda *levels: np.repeat(levels, 6).astype(float)  # noqa: E731
    got = stage_boundaries(steps(3, 1, 1, 1), steps(1, 4, 2, 1), steps(0, 0, 8, 2))
    # Smoothed, of their maxima: at 6, 5/9 against 9/12; at 12, 8/12 and 16/24; at 18, 12/24.
    assert got == Stages(6, 13, 19)
    moved = stage_boundaries(10 * bump(4, 3), 2 * bump(11, 3), 0.1 * bump(18, 3))  # they meet at 7.5 and 14.5
    assert moved == Stages(8, 15, 18 + 3)  # smoothed, a bump is 0.68 of its peak at distance 2, 0.42 at 3


def test_stages_that_do_not_exist_are_absent():
    rising = np.linspace(0, 1, 10)
    assert stage_boundaries(rising, rising, rising) == Stages(None, None, None)
    assert stage_boundaries(np.ones(10), rising, rising) == Stages(None, None, None)
    assert stage_boundaries(rising[::-1], rising, 0 * rising) == Stages(5, None, None)
    assert stage_boundaries(None, rising, rising) == Stages(None, None, None)
    assert stage_boundaries(rising, rising, None) == Stages(None, None, None)
    back = np.array([0, 4, 8, 8, 1, 1, 8, 8.0])  # falls, but does not stay low
    assert stage_boundaries(None, None, back).contestation is None
    np.testing.assert_allclose(smooth([3, 0, 0, 3]), [1.5, 1, 1, 1.5] / np.float64(1.5))
    np.testing.assert_allclose(smooth([2]), [1])
    with pytest.raises(ValueError, match=r"same number of layers, got \[9, 10\]"):
        stage_boundaries(rising, rising[1:], None)


def masks():
    rows, columns = np.ones((1, T), bool), np.zeros((1, T), bool)
    rows[:, 3:5], columns[:, 3:5] = False, True
    return rows, columns


def logits(model, tokens, edit=None):
    return np.asarray(FORWARD(model.params, model.config, jnp.asarray(tokens), edit=edit).logits)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "deepseek_v3"])
def test_who_cannot_see_the_key_does_not_depend_on_it(name):
    model = models.load(FIXTURES / name)
    config, (rows, columns) = model.config, masks()
    other = TOKENS.copy()
    other[:, 3:5] = (other[:, 3:5] + 50) % 290 + 5
    edit = knock_out(rows, columns, config)
    one, two = logits(model, TOKENS, edit), logits(model, other, edit)
    scale = np.abs(one).max()
    np.testing.assert_allclose(one[:, rows[0]], two[:, rows[0]], atol=1e-5 * scale)
    assert np.abs(one - logits(model, TOKENS)).max() > 1e-3 * scale
    only_one = knock_out(rows, columns, config, start=1, width=1)
    assert np.abs(logits(model, TOKENS, only_one) - logits(model, other, only_one))[:, 5:].max() > 1e-3 * scale


def test_a_knock_out_is_a_large_negative_number_added_to_scores(model):
    config, (_, columns) = model.config, masks()
    later = np.arange(T)[None] >= 5
    value = np.zeros((config.layers, 1, config.kv_heads, config.heads // config.kv_heads, T, T), np.float32)
    value[1, 0, 0, 2, 5:, 3:5] = -1e9
    heads = np.arange(config.heads) == 2
    ours = logits(model, TOKENS, knock_out(later, columns, config, start=1, width=1, heads=heads))
    added = logits(model, TOKENS, {"attn.logits": Add(jnp.asarray(value))})
    np.testing.assert_allclose(ours[:, 5:], added[:, 5:], atol=1e-5 * np.abs(added).max())
    everyone = knock_out(np.ones((1, T), bool), np.ones((1, T), bool), config)  # all that is left is oneself
    assert np.isfinite(logits(model, TOKENS, everyone)).all()
    nothing = knock_out(later, columns & False, config)
    np.testing.assert_allclose(logits(model, TOKENS, nothing), logits(model, TOKENS), atol=1e-4)


def test_the_sampler_takes_sums_and_knock_outs(model):
    config, (rows, columns) = model.config, masks()
    lengths = np.array([12, 9, 11], np.int32)
    weights = decode_weights(model.params, config)
    session = prefill(weights, config, TOKENS, lengths, 32, edit=knock_out(rows, columns, config, 0, 2))
    want = logits(model, TOKENS, knock_out(rows, columns, config, 0, 2))[np.arange(B), lengths - 1]
    np.testing.assert_allclose(session.logits, want, atol=1e-4)
    sums = {"sums": attention_sums(jnp.asarray(LABELS))}
    session = prefill(weights, config, TOKENS, lengths, 32, reduce=sums)
    want = FORWARD(model.params, config, TOKENS, reduce=sums).records["sums"]
    np.testing.assert_allclose(session.records["sums"], want, atol=1e-5)


def test_effects_of_windows_share_one_program(model):
    run = lambda **options: knock_out_effects(  # noqa: E731
        model.params, model.config, TOKENS, LABELS, POSITIONS, TARGETS, **options
    )
    effects = run(source="key", target="answer", width=2)
    before = _answer_logprobs._cache_size()
    run(source="context", target="query", width=1)
    assert _answer_logprobs._cache_size() == before
    assert effects.shape == (2, B, 2)
    np.testing.assert_allclose(effects[:, 2], 0, atol=1e-5)  # it has no key
    edit = knock_out(LABELS == 3, LABELS == 1, model.config, 1, 2)
    plain, cut = (answer_logprobs(model.params, model.config, TOKENS, POSITIONS, TARGETS, e) for e in (None, edit))
    np.testing.assert_allclose(effects[1], np.asarray(cut) - np.asarray(plain), atol=1e-6)


def test_errors(model):
    params, config = model.params, model.config
    with pytest.raises(ValueError, match=r"labels are integers from -1 \(none\) to 3 \(context, key, query, answer\)"):
        attention_flow(params, config, [(TOKENS, LABELS + 1)])
    with pytest.raises(ValueError, match="labels has shape"):
        attention_flow(params, config, [(TOKENS, LABELS[:, 1:])])
    with pytest.raises(ValueError, match="no batch"):
        attention_flow(params, config, [])
    with pytest.raises(ValueError, match=r"positions lie in -1 \(none\) .. 11, got -1 .. 12"):
        saliency_flow(params, config, [(TOKENS, LABELS, np.where(POSITIONS == 11, 12, POSITIONS), TARGETS)])
    rows, columns = masks()
    with pytest.raises(ValueError, match=r"layers 2 .. 3 do not lie in 0 .. 2"):
        knock_out(rows, columns, config, 2, 2)
    with pytest.raises(ValueError, match="rows must be bool"):
        knock_out(rows.astype(int), columns, config)
    with pytest.raises(ValueError, match=r"heads must be bool \[6\]"):
        knock_out(rows, columns, config, heads=np.ones(4, bool))
    with pytest.raises(ValueError, match="no segment 'keys'; segments: context, key"):
        knock_out_effects(params, config, TOKENS, LABELS, POSITIONS, TARGETS, source="keys", target="query", width=1)
