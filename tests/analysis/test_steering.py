"""Steering towards documents: worked numbers, what stays as it is, and the sampler's cache used twice."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from analysis import build_prompt, hide, pad_prompts, rewind, split_at_question, steer
from analysis.heads import from_question
from analysis.steering import ROWS, bias, pasta
from models import Config, attention
from models.layout import decode_weights
from models.sample import decode, extend, prefill

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "models"
CONFIG = Config(
    vocab_size=40, dim=16, layers=3, heads=4, kv_heads=2, head_dim=6, ffn_dim=20, qk_norm=True, init_std=0.4
)
CANDIDATES = [{1, 3}, {0}]


@pytest.fixture(scope="module")
def params():
    return models.init(CONFIG, jax.random.key(1))


def batch_of(seed=0, length=3, config=CONFIG, **options):
    rng = np.random.default_rng(seed)
    prompts = [
        build_prompt(
            rng.integers(1, 40, (count, length)).tolist(), rng.integers(1, 40, 4).tolist(), system=[1, 2],
            separator=[3], cue=[4, 5], name=f"p{count}",
        )
        for count in (5, 3)
    ]  # fmt: skip
    return pad_prompts(prompts, config, **options)


def run(params, batch, edit=None, config=CONFIG, **options):
    return models.forward(params, config, jnp.asarray(batch.tokens), edit=edit, **options)


def on_rows(edit, scores, slots):
    """The edit of the first layer on scores [B, K, G, t, S]."""
    return jax.tree.map(lambda v: v[0], edit["attn.logits"])(scores, slots)


# --- Worked numbers ---------------------------------------------------------------------------------------------------

BEFORE = np.array([[0.4, 0.1, 0.3, 0.2], [0.05, 0.8, 0.05, 0.1]])  # sink, document A, document B, question
AFTER = {
    "bias_after_scale": [[0.2105263, 0.5263158, 0.1578947, 0.1052632], [0.0060976, 0.9756098, 0.0060976, 0.0121951]],
    "literal_eq8": [[0.3911708, 0.1198657, 0.2933781, 0.1955854], None],
}


@pytest.mark.parametrize("scaling", AFTER)
def test_the_worked_example(scaling):
    config = CONFIG.replace(layers=1, heads=2, kv_heads=1, head_dim=128)
    batch = pad_prompts([build_prompt([[7], [8]], [9], system=[1])], config)
    edit = steer(config, batch, [{0}], math.log(10), scaling=scaling)
    scores = jnp.log(jnp.asarray(BEFORE, jnp.float32))[None, None, :, None]
    after = np.asarray(jax.nn.softmax(on_rows(edit, scores, jnp.array([[3]])), axis=-1))[0, 0, :, 0]
    np.testing.assert_allclose(after.sum(axis=-1), 1, atol=1e-6)
    for got, want in zip(after, AFTER[scaling]):
        if want is not None:
            np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_allclose(after[0, [0, 2]] / after[0, 3], [2.0, 1.5], atol=1e-5)
    if scaling == "bias_after_scale":
        np.testing.assert_allclose(pasta(BEFORE, jnp.array([False, True, False, False]), 0.1), after, atol=1e-6)
    else:
        assert math.exp(bias(math.log(13), config, scaling)) == pytest.approx(1.254, abs=1e-3)


def test_pasta_is_the_same_on_random_scores(rng):
    batch = batch_of()
    scores = jnp.asarray(rng.normal(size=(2, 2, 2, 4, 24)) * 3, jnp.float32)
    slots = jnp.asarray(batch.starts)[:, None] + jnp.arange(4)  # the questions' own rows
    highlighted = np.stack([np.isin(row, list(chosen)) for row, chosen in zip(batch.document, CANDIDATES)])[:, :24]
    for a in (0.5, 0.1, 0.01):
        edit = steer(CONFIG, batch, CANDIDATES, -math.log(a))
        steered = jax.nn.softmax(on_rows(edit, scores, slots), axis=-1)
        want = pasta(jax.nn.softmax(scores, axis=-1), jnp.asarray(highlighted)[:, None, None, None], a)
        np.testing.assert_allclose(steered, want, atol=1e-6)


# --- What it does and does not do -------------------------------------------------------------------------------------


def test_delta_zero_changes_nothing(params):
    batch = batch_of()
    plain = run(params, batch).logits
    for scaling in AFTER:
        np.testing.assert_array_equal(
            run(params, batch, steer(CONFIG, batch, CANDIDATES, 0.0, scaling=scaling)).logits, plain
        )


def test_what_is_hidden_from_the_question_cannot_change_what_follows_it(params):
    prompts = [build_prompt([[7, 8], [9, 3], [12, 13]], [5, 6, 2], system=[1], cue=[4]), build_prompt([[7], [8]], [9])]
    batch = pad_prompts(prompts, CONFIG)
    last = [{2}, {1}]  # no other document reads these
    other = batch.replace(tokens=np.where(batch.document == np.array([[2], [1]]), 33, batch.tokens))
    behind = np.arange(batch.tokens.shape[1]) >= np.asarray(batch.starts)[:, None]
    plain, changed = (np.asarray(run(params, b).logits)[behind] for b in (batch, other))
    assert np.abs(plain - changed).max() > 0.1
    hidden = [np.asarray(run(params, b, hide(CONFIG, batch, last)).logits) for b in (batch, other)]
    np.testing.assert_array_equal(hidden[0][behind], hidden[1][behind])
    np.testing.assert_array_equal(hidden[0][~behind], np.asarray(run(params, batch).logits)[~behind])
    np.testing.assert_array_equal(run(params, batch, hide(CONFIG, batch, [(), ()])).logits, run(params, batch).logits)
    probs = run(params, batch, hide(CONFIG, batch, last), record=("attn.probs",)).records["attn.probs"]
    probs = np.asarray(probs).reshape(3, 2, 4, *probs.shape[-2:])
    for b, (place,) in enumerate(last):
        rows = probs[:, b][..., batch.question[b], :]
        assert not rows[..., batch.document[b] == place].any()
        np.testing.assert_allclose(rows.sum(-1), 1.0, atol=1e-5)


def candidate_mass(params, batch, delta, config=CONFIG, **options):
    """[L, B, N], averaged over the question's rows."""
    edit = steer(config, batch, CANDIDATES, delta, **options)
    reduce = {"alpha": from_question(batch)}
    alpha = np.asarray(run(params, batch, edit, config, reduce=reduce).records["alpha"])
    return np.stack([alpha[:, b][..., list(chosen)].sum(-1) for b, chosen in enumerate(CANDIDATES)], axis=1)


def test_more_delta_is_more_mass_in_the_first_layer_and_all_of_it_in_the_end(params):
    batch = batch_of()
    masses = [candidate_mass(params, batch, delta) for delta in (0.0, 0.5, math.log(10), 5.0, 12.0)]
    assert (np.diff(np.stack([mass[0] for mass in masses]), axis=0) >= -1e-6).all()  # later layers have other queries
    probs = run(params, batch, steer(CONFIG, batch, CANDIDATES, 30.0), record=("attn.probs",)).records["attn.probs"]
    probs = np.asarray(probs).reshape(3, 2, 4, *probs.shape[-2:])
    for b, chosen in enumerate(CANDIDATES):
        rows = probs[:, b][..., batch.question[b], :]
        assert rows[..., np.isin(batch.document[b], list(chosen))].sum(-1).min() >= 0.999
        np.testing.assert_allclose(rows.sum(-1), 1.0, atol=1e-5)


@pytest.mark.parametrize("rows", ROWS)
def test_other_rows_and_masks_stay(params, rows):
    batch = batch_of()
    sites = ("attn.probs", "resid.post")
    plain = run(params, batch, record=sites).records
    steered = run(params, batch, steer(CONFIG, batch, CANDIDATES, 4.0, rows=rows), record=sites).records
    for b in range(2):
        start, end, length = int(batch.starts[b]), int(batch.ends[b]), int(batch.lengths[b])
        for site, time in (("attn.probs", -2), ("resid.post", -2)):
            one, other = (np.moveaxis(np.asarray(r[site])[:, b], time, 1) for r in (plain, steered))
            np.testing.assert_allclose(other[:, :start], one[:, :start], atol=1e-6)  # documents, in all layers
            changed = np.abs(other[0] - one[0]).reshape(len(one[0]), -1).max(axis=1) > 1e-3
            last = end if rows == "question_only" else length
            assert changed[start:last].all()
            assert not changed[last:length].any()
    probs = np.asarray(steered["attn.probs"])
    np.testing.assert_allclose(probs.sum(-1), 1.0, atol=1e-5)
    assert (np.triu(np.ones(probs.shape[-2:]), 1) * probs == 0).all()


@pytest.mark.parametrize("delta", [30.0, float(np.finfo(np.float32).max)])
def test_masked_columns_stay_zero_inside_candidates(params, delta):
    """Packed rows mask the first document away from the question, a window does too."""
    batch = batch_of()
    T = batch.tokens.shape[1]
    far = np.where(np.arange(T) < 6, 1, 2)[None].repeat(2, axis=0)  # document 0 and the system text apart
    edit = steer(CONFIG, batch, [{0, 2}, {0, 2}], delta)
    out = run(params, batch, edit, segment_ids=jnp.asarray(far), record=("attn.probs",), positions=jnp.arange(T)[None])
    probs = np.asarray(out.records["attn.probs"])
    assert not probs[..., 6:, :6].any()
    np.testing.assert_allclose(probs.sum(-1), 1.0, atol=1e-5)
    config = CONFIG.replace(sliding_window=8)
    probs = np.asarray(run(params, batch, edit, config, record=("attn.probs",)).records["attn.probs"])
    back = np.arange(T)[:, None] - np.arange(T)
    assert not probs[..., (back < 0) | (back >= 8)].any()


def test_chosen_heads_alone(params):
    batch = batch_of()
    edit = steer(CONFIG, batch, CANDIDATES, 4.0, heads=[(0, 1), (0, 2)])
    plain = np.asarray(run(params, batch, record=("attn.probs",)).records["attn.probs"])
    steered = np.asarray(run(params, batch, edit, record=("attn.probs",)).records["attn.probs"])
    moved = np.abs(steered - plain).reshape(3, 2, 4, -1).max(axis=(1, 3)) > 1e-3
    assert moved[0].tolist() == [False, True, True, False]


def test_blocks_of_queries_equal_all_scores_at_once(params, monkeypatch):
    batch = batch_of(length=6)
    edit = steer(CONFIG, batch, CANDIDATES, 3.0)
    whole = run(params, batch, edit).logits
    monkeypatch.setattr(attention, "_LONGEST_WHOLE", 8)
    monkeypatch.setattr(attention, "_BLOCK", 8)
    np.testing.assert_allclose(run(params, batch, edit).logits, whole, atol=1e-4)


def test_new_documents_candidates_and_deltas_compile_nothing(params):
    program = jax.jit(lambda p, tokens, edit: models.forward(p, CONFIG, tokens, edit=edit).logits)
    results = []
    for seed, delta, rows in ((0, 1.0, "question_only"), (1, 2.0, "include_generated"), (1, 3.0, "include_generated")):
        batch = batch_of(seed)
        results.append(program(params, batch.tokens, steer(CONFIG, batch, [{seed}, {2}], delta, rows=rows)))
    assert program._cache_size() == 1
    assert not np.allclose(results[1], results[2])


# --- With the sampler -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS)
def test_the_documents_cache_serves_both_passes_and_the_answer(params, rows):
    batch, weights = batch_of(), decode_weights(params, CONFIG)
    longest = int(batch.lengths.max())
    edit = steer(CONFIG, batch, CANDIDATES, math.log(13), rows=rows)
    expected = run(params, batch, edit).logits[np.arange(2), batch.lengths - 1]
    assert np.abs(expected - run(params, batch).logits[np.arange(2), batch.lengths - 1]).max() > 0.05

    at_once = prefill(weights, CONFIG, batch.tokens, batch.lengths, 64, edit=edit)
    np.testing.assert_allclose(at_once.logits, expected, atol=1e-4)

    before, starts, behind, rest = split_at_question(batch)
    session = prefill(weights, CONFIG, before, starts, 64)
    session = extend(weights, CONFIG, session, behind, rest, longest, reduce={"alpha": from_question(batch)})
    unsteered = np.asarray(session.logits)
    session = extend(weights, CONFIG, rewind(session, starts), behind, rest, longest, edit=edit)
    np.testing.assert_allclose(session.logits, at_once.logits, atol=1e-5)
    assert np.abs(session.logits - unsteered).max() > 0.05
    assert session.lens.tolist() == batch.lengths.tolist()

    # The answer: as a forward pass over prompt and answer has it, steered behind the prompt or not.
    out, _ = decode(weights, CONFIG, session, jax.random.key(0), np.full(2, 6), steps=6, temperature=0.0, edit=edit)
    for b in range(2):
        n, drawn = int(batch.lengths[b]), np.asarray(out.tokens)[b]
        row = np.zeros(64, np.int32)
        row[:n], row[n : n + 6] = batch.tokens[b, :n], drawn
        one = jax.tree.map(lambda v, b=b: v[:, b : b + 1], edit)
        logits = models.forward(params, CONFIG, jnp.asarray(row)[None], edit=one).logits[0]
        np.testing.assert_array_equal(drawn, logits[n - 1 : n + 5].argmax(-1))


def test_generated_rows_are_steered_only_when_asked(params):
    batch, weights = batch_of(), decode_weights(params, CONFIG)
    kept = {}
    for rows in ROWS:
        edit = steer(CONFIG, batch, CANDIDATES, 30.0, rows=rows)
        session = prefill(weights, CONFIG, batch.tokens, batch.lengths, 64, edit=edit)
        out, _ = decode(
            weights, CONFIG, session, jax.random.key(0), np.full(2, 3), steps=3, temperature=0.0, edit=edit,
            record=("attn.probs",),
        )  # fmt: skip
        probs = np.asarray(out.records["attn.probs"]).reshape(3, 3, 2, 4, -1)[..., : batch.tokens.shape[1]]
        chosen = np.stack([np.isin(row, list(c)) for row, c in zip(batch.document, CANDIDATES)])
        kept[rows] = np.einsum("mlbhs,bs->mlbh", probs, chosen).min()
    assert kept["include_generated"] >= 0.999
    assert max(kept["question_only"], kept["question_and_tail"]) < 0.9


def test_repeated_prompts_take_a_repeated_edit(params):
    batch, weights = batch_of(), decode_weights(params, CONFIG)
    edit = steer(CONFIG, batch, CANDIDATES, 3.0)
    before, starts, behind, rest = split_at_question(batch)
    session = prefill(weights, CONFIG, before, starts, 64, repeat=2)
    many = jax.tree.map(lambda x: x.repeat(2, 1), edit)
    twice = [np.repeat(x, 2, axis=0) for x in (behind, rest)]
    session = extend(weights, CONFIG, session, *twice, int(batch.lengths.max()), edit=many)
    expected = run(params, batch, edit).logits[np.arange(2), batch.lengths - 1]
    np.testing.assert_allclose(session.logits, np.repeat(expected, 2, axis=0), atol=1e-4)


@pytest.mark.parametrize("name", ["deepseek_v3", "gemma2"])
def test_other_kinds_of_attention_in_blocks_and_in_the_sampler(name, monkeypatch):
    """Latent attention, where all heads share a key in the sampler, and windows with a cap on scores."""
    monkeypatch.setattr(attention, "_LONGEST_WHOLE", 8)
    monkeypatch.setattr(attention, "_BLOCK", 8)
    model = models.load(FIXTURES / name)
    config, batch = model.config, batch_of(length=4, config=model.config)
    weights = decode_weights(model.params, config)
    hooks = {"edit": steer(config, batch, CANDIDATES, 2.0), "reduce": {"alpha": from_question(batch)}}
    full = run(model.params, batch, config=config, **hooks)
    session = prefill(weights, config, batch.tokens, batch.lengths, 64, **hooks)
    alpha = np.asarray(full.records["alpha"])
    assert alpha.shape == (config.layers, 2, config.heads, batch.documents)
    np.testing.assert_allclose(session.records["alpha"], alpha, atol=1e-4)
    last = full.logits[np.arange(2), batch.lengths - 1]
    np.testing.assert_allclose(session.logits, last, atol=1e-4 * np.abs(last).max())
    before, starts, behind, rest = split_at_question(batch)
    session = prefill(weights, config, before, starts, 64)
    session = extend(weights, config, session, behind, rest, int(batch.lengths.max()), **hooks)
    np.testing.assert_allclose(session.records["alpha"], alpha, atol=1e-4)
    np.testing.assert_allclose(session.logits, last, atol=1e-4 * np.abs(last).max())


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [-0.1, math.nan, math.inf, 1e39])
def test_wrong_deltas(delta):
    with pytest.raises(ValueError, match="delta must be finite and at least 0"):
        steer(CONFIG, batch_of(), CANDIDATES, delta)


def test_wrong_candidates_rows_and_heads_are_named():
    batch = batch_of()
    with pytest.raises(ValueError, match="prompt 1: there are no candidates"):
        steer(CONFIG, batch, [{1}, set()])
    with pytest.raises(ValueError, match="prompt 1: 3 is not one of its 3 documents"):
        steer(CONFIG, batch, [{3}, {3}])
    with pytest.raises(ValueError, match="documents of 1 prompts were given for a batch of 2"):
        steer(CONFIG, batch, [{1}])
    with pytest.warns(UserWarning, match="prompt 1: all 3 documents are candidates"):
        steer(CONFIG, batch, [{1}, [0, 1, 2]])
    with pytest.raises(ValueError, match="scaling must be one of bias_after_scale"):
        steer(CONFIG, batch, CANDIDATES, scaling="before")
    with pytest.raises(ValueError, match="rows must be one of question_and_tail"):
        steer(CONFIG, batch, CANDIDATES, rows="all")
    with pytest.raises(ValueError, match=r"head \(3, 0\) is outside of the model's 3 layers"):
        steer(CONFIG, batch, CANDIDATES, heads=[(0, 0), (3, 0)])
    with pytest.raises(ValueError, match=r"a must lie in \(0, 1\], not 0"):
        pasta(BEFORE, BEFORE > 0.5, 0)


def test_a_session_cannot_be_rewound_to_nowhere(params):
    session = prefill(decode_weights(params, CONFIG), CONFIG, batch_of().tokens, batch_of().lengths, 64)
    for lens in ([1, 65], [-1, 2], [1]):
        with pytest.raises(ValueError, match="between 0 and the session's 64 slots"):
            rewind(session, np.array(lens))
