"""Neurons that were put into a model by hand are found by how it answers, with the right source, and switching them off
moves its answers; and a neuron of the prompt's format is found only where conditions differ in format."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from analysis.neurons import (
    Selection,
    activation_probabilities,
    count_firings,
    deactivate,
    random_sets,
    select_neurons,
    split_by_source,
)
from models import Config

D, F, NORM = 32, 32, 6.0
CONFIG = Config(
    vocab_size=30, dim=D, layers=2, heads=1, kv_heads=1, head_dim=16, ffn_dim=F, family="llama", tie_embeddings=False
)
QUESTION, CUE, USABLE, NOISY, FORMAT, PASSAGE_ANSWERS, INTERNAL = 1, 2, 3, 4, 5, (6, 7), 8
FILLERS = range(9, 30)
# Features of the residual stream. READ: what the cue has read of the passage.
ONE, MARKER, CODE, IS_FORMAT, READ_MARKER, READ_CODE, SAYS_INTERNAL, SAYS_PASSAGE, REST = 0, 1, 2, 3, 4, 5, 6, 7, 31
NOISE, READ_NOISE, UNREAD = slice(8, 16), slice(16, 24), slice(24, 31)
INTERNAL_UNIT, PASSAGE_UNIT, FORMAT_UNIT = (0, 3), (1, 5), (0, 7)
LENGTH = 32


def embeddings(rng):
    """Every token has the norm NORM, so that the norm before attention treats all alike."""
    x = np.zeros((CONFIG.vocab_size, D))
    x[:, ONE] = 1.0
    x[USABLE, MARKER], x[NOISY, MARKER], x[FORMAT, IS_FORMAT] = 1.0, -1.0, 1.0
    x[PASSAGE_ANSWERS[0], CODE], x[PASSAGE_ANSWERS[1], CODE] = 1.0, -1.0
    noise = rng.normal(0, 0.5, (len(FILLERS), 8))
    x[FILLERS, NOISE] = noise - noise.mean(0)
    x[:, REST] = np.sqrt(NORM**2 - (x**2).sum(1))
    return x


def planted(seed=0):
    """Layer 0's attention averages the prompt: the cue learns whether the passage is usable, its answer, and noise.

    Unit (0, 3) fires unless a usable passage was read and says the memorised answer. Unit (1, 5) fires unless (0, 3)
    has spoken and says the passage's answer. The memorised answer is a little more likely than all others anyway.
    """
    rng = np.random.default_rng(seed)
    p = jax.tree.map(lambda x: np.zeros(x.shape), models.init(CONFIG, jax.random.key(0)))
    p["embed"], p["final_norm"] = embeddings(rng), np.ones(D)
    layers = p["layers"]
    layers["attn_norm"], layers["mlp_norm"] = np.ones((2, D)), np.ones((2, D))
    gain = LENGTH * NORM / np.sqrt(D)
    reads = [(MARKER, READ_MARKER), (CODE, READ_CODE), *zip(range(8, 16), range(16, 24))]
    for h, (source, target) in enumerate(reads):
        layers["wv"][0, source, 0, h], layers["wo"][0, 0, h, target] = 1.0, gain
    # Units that know nothing of the source: they fire by the noise that was read, and nobody reads what they write.
    layers["w_gate"][:, READ_NOISE] = rng.normal(0, 1, (2, 8, F))
    layers["w_gate"][:, ONE] = rng.normal(0, 0.1, (2, F))
    layers["w_up"][:] = rng.normal(0, 0.3, (2, D, F))
    layers["w_down"][:, :, UNREAD] = rng.normal(0, 0.02, (2, F, 7))
    for layer, unit in (INTERNAL_UNIT, PASSAGE_UNIT, FORMAT_UNIT):
        for name in ("w_gate", "w_up"):
            layers[name][layer, :, unit] = 0.0
        layers["w_down"][layer, unit] = 0.0
    gate, up, down = layers["w_gate"], layers["w_up"], layers["w_down"]
    gate[0, READ_MARKER, 3], gate[0, ONE, 3], up[0, ONE, 3], down[0, 3, SAYS_INTERNAL] = -20.0, 5.0, 1.0, 0.5
    gate[1, SAYS_INTERNAL, 5], gate[1, ONE, 5], up[1, READ_CODE, 5], down[1, 5, SAYS_PASSAGE] = -40.0, 10.0, 1.0, 1.0
    gate[0, IS_FORMAT, 7], gate[0, ONE, 7] = 10.0, -5.0
    p["head"][ONE] = -5.0
    p["head"][ONE, [INTERNAL, *PASSAGE_ANSWERS]] = 0.3, 0.0, 0.0
    p["head"][SAYS_INTERNAL, INTERNAL] = 1.0
    p["head"][SAYS_PASSAGE, PASSAGE_ANSWERS] = 1.0, -1.0
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), p)


def prompts(rng, count, marker):
    """[marker, answer, fillers, format..., question, cue]: tokens [count, LENGTH] and the passage's answer [count]."""
    answers = rng.choice(PASSAGE_ANSWERS, count)
    fillers = rng.choice(FILLERS, (count, 4))
    fixed = np.tile([FORMAT] * (LENGTH - 8) + [QUESTION, CUE], (count, 1))
    return np.concatenate([np.full((count, 1), marker), answers[:, None], fillers, fixed], 1).astype(np.int32), answers


@pytest.fixture(scope="module")
def setting():
    rng = np.random.default_rng(1)
    parts = [prompts(rng, 200, USABLE), prompts(rng, 200, NOISY)]
    tokens, answers = (np.concatenate(part) for part in zip(*parts))
    return planted(), tokens, answers


def last(tokens):
    return np.argmax(tokens == CUE, axis=1)


def sources(params, tokens, answers, edit=None):
    """0 where the model gives the memorised answer, 1 the passage's, -1 another."""
    run = jax.jit(lambda edit: models.forward(params, CONFIG, jnp.asarray(tokens), edit=edit).logits)
    said = np.asarray(run(edit or {}))[np.arange(len(tokens)), last(tokens)].argmax(-1)
    return np.where(said == INTERNAL, 0, np.where(said == answers, 1, -1))


def only(neuron):
    mask = np.zeros((2, F), bool)
    mask[neuron] = True
    return mask


def select(params, internal, external, count):
    """internal, external: (tokens, counted)."""
    counts = [count_firings(params, CONFIG, [part]) for part in (internal, external)]
    return select_neurons(activation_probabilities(*counts, min_tokens=100), Selection(rate=count / (2 * F)))


def by_answer(setting, count):
    """Condition "conflict": the same prompts, split by the answer that was given; answer tokens only."""
    params, tokens, answers = setting
    at_cue = tokens == CUE
    rows = split_by_source(sources(params, tokens, answers))
    return select(params, *((tokens[part], at_cue[part]) for part in rows), count)


def test_the_model_answers_by_the_passage_where_it_is_usable(setting):
    got = sources(*setting)
    assert (got[:200] == 1).all()
    assert (got[200:] == 0).all()


def test_planted_neurons_are_found_with_their_sources(setting):
    found = by_answer(setting, 2)
    np.testing.assert_array_equal(found.internal, only(INTERNAL_UNIT))
    np.testing.assert_array_equal(found.external, only(PASSAGE_UNIT))
    assert found.entropy[INTERNAL_UNIT] == found.entropy[PASSAGE_UNIT] == 0


def test_switching_them_off_moves_answers_to_the_other_source(setting):
    found = by_answer(setting, 2)
    assert (sources(*setting, deactivate(found.internal, CONFIG)) == 1).all()
    assert (sources(*setting, deactivate(found.external, CONFIG)) == 0).all()
    plain, planted_units = sources(*setting), found.internal | found.external
    for neurons in random_sets(planted_units, 5, exclude=only(FORMAT_UNIT)):
        np.testing.assert_array_equal(sources(*setting, deactivate(neurons, CONFIG)), plain)


def test_a_neuron_of_the_format_is_found_only_where_conditions_differ_in_format(setting):
    """Condition "open/closed" over all tokens confuses "a passage is there" with "the passage was used"."""
    params, tokens, answers = setting
    rng = np.random.default_rng(2)
    closed = np.concatenate([rng.choice(FILLERS, (200, 5)), np.tile([QUESTION, CUE], (200, 1))], axis=1)
    closed = np.pad(closed, ((0, 0), (0, LENGTH - 7))).astype(np.int32)
    assert (sources(params, closed, answers[:200]) == 0).all()
    confused = select(params, (closed, closed > 0), (tokens[:200], tokens[:200] > 0), 3)
    assert confused.external[FORMAT_UNIT]
    clean = by_answer(setting, 3)
    assert not (clean.internal | clean.external)[FORMAT_UNIT]
    assert clean.entropy[FORMAT_UNIT] == np.inf
