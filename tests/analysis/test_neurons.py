"""Knowledge neurons: the statistic by hand, the counts, what switching off does, and files."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from analysis import neurons as module
from analysis.batches import _answer_logprobs, answer_logprobs, site_means
from analysis.neuron_file import NeuronFile, neuron_mask, read_neurons, write_neurons
from analysis.neurons import (
    Firings,
    Selection,
    activation_probabilities,
    check_disjoint,
    count_firings,
    deactivate,
    filtered_entropy,
    firing_counter,
    kape,
    kth_smallest,
    random_sets,
    select_neurons,
    split_by_source,
)
from models.layout import decode_weights
from models.sample import prefill

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "models"
FORWARD = jax.jit(models.forward, static_argnames=("config", "record"))
# Probabilities [2, 5] of five neurons, internal and external.
P = np.array([[0.80, 0.45, 0.05, 0.02, 0.0], [0.20, 0.50, 0.60, 0.0, 0.0]])
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(1, 300, (6, 9), dtype=np.int32)
COUNTED = RNG.random((6, 9)) < 0.6


@pytest.fixture(scope="module")
def model():
    return models.load(FIXTURES / "qwen3")


def test_entropy_by_hand_is_in_nats():
    np.testing.assert_allclose(kape(P)[:4], [0.500402, 0.691761, 0.271189, 0.0], atol=1e-6)
    assert np.isnan(kape(P)[4])
    assert kape(P)[0] == pytest.approx(0.721928 * np.log(2), abs=1e-6)  # 0.721928 bits


def test_the_filter_keeps_what_is_active_somewhere():
    np.testing.assert_allclose(filtered_entropy(P, 0.4), [0.500402, 0.691761, 0.271189, np.inf, np.inf], atol=1e-6)
    assert kth_smallest(P, 0.6) == 0.2  # the 6th smallest of 10
    found = select_neurons(P[:, None], Selection(rate=0.4, filter_quantile=0.6, bar_quantile=0.6))
    assert found.internal.tolist() == [[True, False, False, False, False]]
    assert found.external.tolist() == [[False, False, True, False, False]]
    assert (found.threshold, found.bar, found.inactive) == (0.2, 0.2, 1)
    assert not found.both.any()
    assert not found.unassigned.any()


def test_bounds_swap_and_scale():
    p = RNG.random((2, 4, 50))
    entropy = kape(p)
    assert (entropy >= 0).all()
    assert (entropy <= np.log(2)).all()
    np.testing.assert_allclose(kape(np.stack([p[0], p[0]])), np.log(2), rtol=1e-15)
    np.testing.assert_allclose(kape(0.1 * p), entropy, atol=1e-12)
    assert (np.isinf(filtered_entropy(0.1 * p, 0.2))).all()  # though the filter may decide otherwise
    one, other = select_neurons(p, Selection(rate=0.05)), select_neurons(p[::-1], Selection(rate=0.05))
    np.testing.assert_array_equal(one.entropy, other.entropy)
    np.testing.assert_array_equal(one.internal, other.external)
    np.testing.assert_array_equal(one.external, other.internal)
    assert one.internal.sum() + one.external.sum() == 10


@pytest.mark.parametrize("seed", range(5))
def test_ranking_is_that_of_the_log_ratio(seed):
    p = np.random.default_rng(seed).integers(1, 400, (2, 300)) / 400
    ratio = np.abs(np.log(p[0] / p[1]))
    by_entropy = ratio[np.argsort(filtered_entropy(p, 0.3), kind="stable")][: (p.max(0) > 0.3).sum()]
    assert (np.diff(by_entropy) <= 1e-7).all()


def test_never_and_always_firing_neurons():
    p = np.full((2, 1, 40), 0.3)
    p[:, 0, 0] = 0.0
    p[:, 0, 1] = 1.0
    p[:, 0, 2] = 0.9, 0.1
    found = select_neurons(p, Selection(rate=1 / 40, filter_quantile=0.9))
    assert np.flatnonzero(found.internal).tolist() == [2]
    assert not found.external.any()
    assert found.entropy[0, 0] == np.inf
    both = select_neurons(p, Selection(rate=2 / 40, filter_quantile=0.9))
    assert np.argwhere(both.both).tolist() == [[0, 1]]
    assert np.argwhere(both.unassigned).tolist() == [[0, 1]]
    by_bar = select_neurons(p, Selection(rate=2 / 40, filter_quantile=0.9, assign="bar"))
    assert np.flatnonzero(by_bar.internal).tolist() == [1, 2]
    assert np.flatnonzero(by_bar.external).tolist() == [1]


@pytest.mark.parametrize(("firing", "site"), [("gate>0", "mlp.gate"), ("z>0", "mlp.act")])
@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_counts_are_those_of_the_record_however_the_stream_is_cut(name, firing, site):
    model = models.load(FIXTURES / name)
    record = FORWARD(model.params, model.config, jnp.asarray(TOKENS), record=(site,)).records[site]
    want = ((np.asarray(record) > 0) & COUNTED[None, ..., None]).sum((1, 2))
    padded = np.pad(TOKENS, ((0, 0), (0, 4))), np.pad(COUNTED, ((0, 0), (0, 4)))
    streams = [
        [(TOKENS, COUNTED)],
        [(TOKENS[i : i + 2], COUNTED[i : i + 2]) for i in (4, 0, 2)],
        [padded],
    ]
    for stream in streams:
        got = count_firings(model.params, model.config, stream, firing)
        assert got.counts.dtype == np.int64
        np.testing.assert_array_equal(got.counts, want)
        assert got.tokens == COUNTED.sum()


def test_the_gate_test_is_that_of_the_activated_gate():
    """The tap stands before the activation; both activations that models have keep the sign."""
    x = np.linspace(-30, 30, 2001, dtype=np.float32)
    for activation in (jax.nn.silu, jax.nn.gelu):
        np.testing.assert_array_equal(np.asarray(activation(x)) > 0, x > 0)


def test_batches_of_one_shape_compile_once_and_the_sampler_takes_the_counter(model):
    params, config = model.params, model.config
    want = count_firings(params, config, [(TOKENS, COUNTED)]).counts
    before = module._count._cache_size()
    count_firings(params, config, [(TOKENS, ~COUNTED), (TOKENS[::-1], COUNTED)])
    assert module._count._cache_size() == before
    weights = decode_weights(params, config)
    lengths = np.full(len(TOKENS), TOKENS.shape[1], np.int32)
    taps = {"fired": firing_counter(jnp.asarray(COUNTED))}
    session = prefill(weights, config, TOKENS, lengths, 32, reduce=taps)
    np.testing.assert_array_equal(session.records["fired"], want)  # though the prompts are padded there


def logits(model, edit=None, params=None):
    return np.asarray(FORWARD(params or model.params, model.config, jnp.asarray(TOKENS), edit=edit).logits)


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_switching_off_is_taking_the_weights_out(name):
    model = models.load(FIXTURES / name)
    config, layers = model.config, model.params["layers"]
    off = RNG.random((config.layers, config.ffn_dim)) < 0.2
    edited, plain = logits(model, deactivate(off, config)), logits(model)
    assert np.abs(edited - plain).max() > 1e-3
    for weight, mask in (("w_gate", off[:, None]), ("w_down", off[:, :, None])):
        cut = {**model.params, "layers": {**layers, weight: jnp.where(mask, 0.0, layers[weight])}}
        np.testing.assert_allclose(edited, logits(model, params=cut), atol=1e-6 * np.abs(plain).max())
    np.testing.assert_array_equal(logits(model, deactivate(np.zeros_like(off), config)), plain)


def test_switching_off_at_positions_and_putting_means(model):
    config = model.config
    off = RNG.random((config.layers, config.ffn_dim)) < 0.3
    run = lambda edit: np.asarray(  # noqa: E731
        FORWARD(model.params, config, jnp.asarray(TOKENS), record=("mlp.act",), edit=edit).records["mlp.act"]
    )
    here = np.zeros(TOKENS.shape, bool)
    here[:, 6:] = True
    where = off[:, None, None] & here[None, ..., None]
    edited = run(deactivate(off, config, positions=here))
    assert (edited[where] == 0).all()
    np.testing.assert_array_equal(edited[:, :, :6], run(None)[:, :, :6])

    mean = site_means(model.params, config, [(TOKENS[:2], COUNTED[:2]), (TOKENS[2:], COUNTED[2:])], "mlp.act")
    np.testing.assert_allclose(mean, run(None)[:, COUNTED].mean(1), atol=1e-5)
    replaced = run(deactivate(off, config, mean=mean))
    np.testing.assert_array_equal(replaced[:, 0, 0][off], mean[off])
    both = run(deactivate(off, config, positions=here, mean=mean))
    np.testing.assert_array_equal(both[:, :, :6], run(None)[:, :, :6])
    np.testing.assert_array_equal(both[:, 0, 7][off], mean[off])


def test_other_neurons_compile_nothing(model):
    config = model.config
    positions, targets = np.full((6, 1), 8), np.full((6, 1), 3)
    run = lambda off: answer_logprobs(  # noqa: E731
        model.params, config, TOKENS, positions, targets, deactivate(off, config)
    )
    first = run(np.zeros((config.layers, config.ffn_dim), bool))
    before = _answer_logprobs._cache_size()
    second = run(np.ones((config.layers, config.ffn_dim), bool))
    assert _answer_logprobs._cache_size() == before
    assert np.abs(np.asarray(first) - np.asarray(second)).max() > 1e-3
    want = jax.nn.log_softmax(logits(model)[:, 8])[:, 3]
    np.testing.assert_allclose(first[:, 0], want, atol=1e-5)


def test_positions_hold_in_the_sampler_too(model):
    config, lengths = model.config, np.array([9, 9, 9, 7, 9, 9], np.int32)
    off = RNG.random((config.layers, config.ffn_dim)) < 0.3
    here = np.arange(9)[None] >= 5
    weights = decode_weights(model.params, config)
    session = prefill(weights, config, TOKENS, lengths, 32, edit=deactivate(off, config, positions=here))
    want = logits(model, deactivate(off, config, positions=here))[np.arange(6), lengths - 1]
    np.testing.assert_allclose(session.logits, want, atol=1e-4)


def test_random_sets_have_the_same_counts_and_the_matched_ones_the_same_rates():
    neurons, other = np.zeros((3, 400), bool), np.zeros((3, 400), bool)
    neurons[0, :7], neurons[2, 10:15], other[0, 7:20] = True, True, True
    p = RNG.random((3, 400))
    for match in (None, p):
        sets = random_sets(neurons, 5, seed=3, exclude=other, match=match)
        assert (sets.sum(-1) == [7, 0, 5]).all()
        assert not (sets & (neurons | other)).any()
        assert len({draw.tobytes() for draw in sets}) == 5
        np.testing.assert_array_equal(sets, random_sets(neurons, 5, seed=3, exclude=other, match=match))
    assert all(abs(p[draw].mean() - p[neurons].mean()) < 0.02 for draw in sets)
    with pytest.raises(ValueError, match="layer 1 has 1 other neurons to draw 3 from"):
        random_sets(np.array([[True, False, False, False], [True, True, True, False]]))


def chosen(config, **changes):
    internal, external = np.zeros((2, config.layers, config.ffn_dim), bool)
    internal[0, [3, 7]] = external[2, 5] = True
    fields = {"model": "tiny", "conditions": "conflict", "selection": Selection(0.02, 0.9), "internal": internal}
    return NeuronFile(**{**fields, "external": external, **changes})


def test_files_come_back_and_say_what_is_wrong_with_them(model, tmp_path):
    config, path = model.config, tmp_path / "neurons.json"
    write_neurons(path, chosen(config), config)
    data = json.loads(path.read_text())
    assert data == {
        "model": "tiny", "n_layers": 3, "width": config.ffn_dim, "firing": "gate>0", "conditions": "conflict",
        "rate": 0.02, "filter_q": 0.9, "bar_q": 0.95, "internal": [[3, 7], [], []], "external": [[], [], [5]],
    }  # fmt: skip
    back = read_neurons(path, config)
    np.testing.assert_array_equal(back.internal, chosen(config).internal)
    np.testing.assert_array_equal(back.external, chosen(config).external)
    assert (back.selection, back.model, back.conditions) == (Selection(0.02, 0.9), "tiny", "conflict")
    for change, message in (
        ({"internal": [[3, 7], []]}, "internal must hold one list of indices for each of 3 layers, got 2 lists"),
        ({"external": [[], [], [5, 5]]}, "external, layer 2: indices must increase"),
        ({"external": [[], [80], []]}, "external, layer 1: neuron 80 is not one of 0 .. 79"),
        ({"external": [[], [1.0], []]}, "layer 1: neuron 1.0"),
        ({"rate": 0.0}, "rate is a share"),
        ({"filter_q": 1}, "filter_quantile must lie between"),
        ({"firing": "up>0"}, "firing must be one of 'gate>0', 'z>0'"),
        ({"rate": "0.01"}, "field 'rate' has the wrong type"),
        ({"widht": 3}, "unknown field 'widht'"),
        ({"width": 90}, "it is for 3 layers of 90 neurons"),
    ):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(ValueError, match="neuron file .*neurons.json: .*" + message.replace("'", ".")):
            read_neurons(path, config)
    del data["external"]
    for text, message in (
        (json.dumps(data), "field 'external' is missing"),
        ("{", "Expecting"),
        ("[]", "an object|a JSON"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_neurons(path)
    with pytest.raises(ValueError, match="made for another model"):
        write_neurons(path, chosen(config, internal=np.zeros((2, 80), bool)), config)
    assert not neuron_mask([[], []], 2, 4).any()


def test_errors_of_counts_and_conditions(model):
    counts = np.ones((2, 3), np.int64)
    with pytest.raises(ValueError, match=r"40 tokens were counted under the internal .* and 2000 under the external"):
        activation_probabilities(Firings(counts, 40), Firings(counts, 2000))
    with pytest.raises(ValueError, match="0 tokens were counted under the internal"):
        activation_probabilities(Firings(counts, 0), Firings(counts, 9), min_tokens=0)
    with pytest.raises(ValueError, match="none of the 6 neurons ever fires under the test 'gate>0'"):
        activation_probabilities(Firings(0 * counts, 10), Firings(0 * counts, 10), min_tokens=5)
    with pytest.raises(ValueError, match="conditions differ"):
        activation_probabilities(Firings(counts, 10), Firings(counts, 10, "z>0"), min_tokens=5)
    with pytest.raises(ValueError, match="cannot be added"):
        Firings(counts, 10) + Firings(counts, 10, "z>0")
    with pytest.raises(ValueError, match="4 samples were answered from parameters and 0 from the passage, of 5"):
        split_by_source([0, 0, -1, 0, 0])
    assert [part.tolist() for part in split_by_source([0, 1, -1, 1])] == [[0], [1, 3]]
    with pytest.raises(
        ValueError, match=r"1 questions are among both the 2 .* and the 1 they are tested on, such as 'b'"
    ):
        check_disjoint(["a", "b"], ["b"], "questions")
    check_disjoint(["a"], ["b"])
    with pytest.raises(ValueError, match=r"token id 300 is outside the model's vocabulary of 300"):
        count_firings(model.params, model.config, [(TOKENS * 0 + 300, COUNTED)])
    with pytest.raises(ValueError, match=r"counted has shape \[2, 9\], but tokens have \[6, 9\]"):
        count_firings(model.params, model.config, [(TOKENS, COUNTED[:2])])


def test_errors_of_selection():
    for change, message in (
        ({"rate": 0}, "rate is a share"),
        ({"rate": 1.5}, "rate is a share"),
        ({"filter_quantile": 1.0}, "filter_quantile must lie between 0 and 1, not 1.0"),
        ({"bar_quantile": 0}, "bar_quantile must lie"),
        ({"assign": "both"}, "assign must be"),
        ({"firing": "mlp.act"}, "firing must be one of"),
        ({"min_tokens": 0}, "min_tokens must be"),
    ):
        with pytest.raises(ValueError, match=message):
            Selection(**change)
    ones = np.ones((2, 3, 10))
    with pytest.raises(ValueError, match=r"3 neurons are wanted .* and 0 have a probability above .* threshold 1"):
        select_neurons(ones, Selection(rate=0.1))
    with pytest.raises(ValueError, match="0 neurons are wanted"):
        select_neurons(RNG.random((2, 3, 10)), Selection(rate=0.01))
    with pytest.raises(ValueError, match=r"p holds probabilities \[2, L, F\]"):
        select_neurons(2 * ones)


def test_errors_of_edits(model):
    config = model.config
    with pytest.raises(ValueError, match=r"bool \[layers, ffn_dim\] = \[3, 80\], got bool \[2, 80\]"):
        deactivate(np.zeros((2, 80), bool), config)
    with pytest.raises(ValueError, match="got float64"):
        deactivate(np.zeros((3, 80)), config)
    with pytest.raises(ValueError, match="mean has shape"):
        deactivate(np.zeros((3, 80), bool), config, mean=np.zeros(80))
    with pytest.raises(ValueError, match="positions must be bool"):
        deactivate(np.zeros((3, 80), bool), config, positions=np.zeros((2, 9)))
    with pytest.raises(ValueError, match="no token was counted"):
        site_means(model.params, config, [(TOKENS, COUNTED & False)], "mlp.act")


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_models_with_experts_are_refused(name):
    model = models.load(FIXTURES / name)
    with pytest.raises(ValueError, match=r"experts in . of its 3 layers"):
        count_firings(model.params, model.config, [(TOKENS, COUNTED)])
    with pytest.raises(ValueError, match="without experts"):
        deactivate(np.zeros((3, model.config.ffn_dim), bool), model.config)
