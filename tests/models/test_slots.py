"""Rows that come and go: the same tokens and log-probs as alone, and no program per request."""

import jax
import numpy as np
import pytest

import models
from models import slots
from models.layout import decode_weights
from models.sample import bucket, prefill
from models.slots import Rows, admit, advance, resize

CONFIG = models.Config(
    vocab_size=64, dim=16, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=24, qk_norm=True, init_std=0.3,
    max_len=96,
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return models.init(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def weights(params):
    return decode_weights(params, CONFIG)


def prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(2, 64, length).tolist()


def run(weights, prompts):
    tokens, lengths = models.generation.pad_rows(prompts)
    return prefill(weights, CONFIG, tokens, lengths, tokens.shape[1])


def rows(limits, temperature=0.0, seeds=None, choices=None, drawn=None, top_p=1.0, top_k=0) -> Rows:
    B = len(limits)
    full = lambda value, dtype: np.broadcast_to(np.asarray(value, dtype), (B,)).copy()  # noqa: E731
    pairs = np.stack([full(0 if seeds is None else seeds, np.uint32), np.zeros(B, np.uint32)], axis=1)
    return Rows(
        full(limits, np.int32), pairs, full(0 if choices is None else choices, np.int32),
        full(0 if drawn is None else drawn, np.int32), full(temperature, np.float32), full(top_p, np.float32),
        full(top_k, np.int32),
    )  # fmt: skip


def test_rows_that_come_later_and_move_are_as_alone(params, weights):
    """Two rows begin, a third comes after a slice, the session shrinks and grows: greedy as ``generate_tokens``."""
    prompts = [prompt(9, 0), prompt(4, 1), prompt(14, 2)]
    alone = [models.generate_tokens(params, CONFIG, [p], 15).tokens[0][:15].tolist() for p in prompts]
    made: dict[int, list[int]] = {0: [], 1: [], 2: []}

    def step(session, who, steps, limits):
        lengths = np.array([0 if w is None else len(prompts[w]) + len(made[w]) for w in who])
        out, session = advance(weights, CONFIG, session, rows(limits), lengths, steps)
        for at, w in enumerate(who):
            if w is not None:
                made[w] += np.asarray(out.tokens)[at][: out.counts[at]].tolist()
        return session

    session = resize(run(weights, prompts[:2]), [0, 1, 0, 0], 32)
    session = step(session, [0, 1, None, None], 5, [5, 3, 0, 0])
    assert [len(made[w]) for w in (0, 1)] == [5, 3]
    session = admit(session, run(weights, prompts[2:]), [0, 0, 0, 0], [3, 4, 4, 4])
    session = step(session, [0, 1, None, 2], 5, [5, 5, 0, 5])
    session = resize(session, [3, 0], 32)
    session = step(session, [2, 0], 5, [5, 5])
    session = resize(session, [0, 0], 48)
    session = step(session, [2, None], 5, [5, 0])
    assert made[0] == alone[0]
    assert made[1] == alone[1][:8]
    assert made[2] == alone[2]


def test_logprobs_and_likeliest_tokens_are_the_forward_passs(params, weights):
    """Whatever the temperature, those of the model itself."""
    start = prompt(6, 3)
    out, _ = advance(
        weights, CONFIG, resize(run(weights, [start]), [0, 0], 32), rows([8, 0], temperature=1.7, seeds=5),
        np.array([6, 0]), 8, top=5,
    )  # fmt: skip
    tokens = np.asarray(out.tokens)[0]
    logp = np.asarray(jax.nn.log_softmax(models.forward(params, CONFIG, np.array([[*start, *tokens]])).logits[0]))
    at = logp[5:-1]
    np.testing.assert_allclose(out.logprobs[0], at[np.arange(8), tokens], atol=1e-4)
    np.testing.assert_allclose(out.top_logprobs[0], np.sort(at, axis=1)[:, :-6:-1], atol=1e-4)
    np.testing.assert_array_equal(out.top_tokens[0], np.argsort(-at, axis=1)[:, :5])


def test_a_row_is_drawn_by_its_own_seed_whoever_sits_beside_it(weights):
    start = prompt(6, 3)

    def draw(n, place, seed, others):
        source = resize(run(weights, [start]), [0] * n, 32)
        seeds = np.full(n, others)
        seeds[place] = seed
        temperature = np.full(n, 0.4)
        temperature[place] = 1.0
        first, source = advance(weights, CONFIG, source, rows([3] * n, temperature, seeds), np.full(n, 6), 3)
        later = rows([3] * n, temperature, seeds, drawn=3)
        second, _ = advance(weights, CONFIG, source, later, np.full(n, 9), 3)
        return [*np.asarray(first.tokens)[place].tolist(), *np.asarray(second.tokens)[place].tolist()]

    one = draw(1, 0, 7, 0)
    assert draw(4, 2, 7, 9) == one
    assert draw(4, 0, 8, 9) != one
    assert one[:3] != one[3:]  # the second slice goes on with further random numbers


def test_settings_hold_for_their_row_alone(weights):
    """top_k=1 is greedy; the row beside it is drawn, with temperature high enough to differ."""
    start = prompt(6, 3)
    settings = rows([12, 12, 12], [0.0, 5.0, 5.0], seeds=3, top_k=[0, 1, 0])
    out, _ = advance(weights, CONFIG, resize(run(weights, [start]), [0, 0, 0], 32), settings, np.full(3, 6), 12)
    greedy, best, drawn = np.asarray(out.tokens)
    np.testing.assert_array_equal(best, greedy)
    assert (drawn != greedy).any()


def test_draws_follow_the_distribution(params, weights):
    """512 seeds, one token each: shares within five deviations of the softmax, and nothing outside a nucleus."""
    start, n = prompt(6, 3), 512
    probs = np.asarray(jax.nn.softmax(models.forward(params, CONFIG, np.array([start])).logits[0, -1]))
    session = resize(run(weights, [start]), np.zeros(n, np.int32), bucket(7))
    out, session = advance(weights, CONFIG, session, rows([1] * n, 1.0, np.arange(n)), np.full(n, 6), 1)
    share = np.bincount(np.asarray(out.tokens)[:, 0], minlength=64) / n
    assert (np.abs(share - probs) <= 5 * np.sqrt(probs * (1 - probs) / n)).all()
    session = resize(run(weights, [start]), np.zeros(n, np.int32), bucket(7))
    out, _ = advance(weights, CONFIG, session, rows([1] * n, 1.0, np.arange(n), top_p=0.5), np.full(n, 6), 1)
    order = np.argsort(-probs)
    nucleus = order[: 1 + int((np.cumsum(probs[order]) < 0.5).sum())]
    assert set(np.asarray(out.tokens)[:, 0].tolist()) == set(nucleus.tolist())


def test_end_tokens_end_a_row(params, weights):
    start = prompt(9, 0)
    greedy = models.generate_tokens(params, CONFIG, [start], 8).tokens[0].tolist()
    config = CONFIG.replace(eos_ids=(greedy[2],))
    at = greedy.index(greedy[2])
    out, _ = advance(weights, config, resize(run(weights, [start]), [0, 0], 32), rows([8, 0]), np.array([9, 0]), 8)
    assert out.counts.tolist() == [at + 1, 0]
    assert out.ended.tolist() == [True, False]


def test_other_requests_compile_nothing_new(weights):
    def serve(length, seed, temperature):
        session = resize(run(weights, [prompt(length, seed)]), [0, 0], 32)
        session = admit(session, run(weights, [prompt(length + 1, seed)]), [0, 0], [1, 2])
        advance(weights, CONFIG, session, rows([4, 2], temperature, seed), np.array([length, length + 1]), 4)

    programs = (slots._resize, slots._admit, slots._advance)
    serve(5, 0, 0.0)
    before = [program._cache_size() for program in programs]
    serve(11, 1, [0.3, 0.9])
    assert [program._cache_size() for program in programs] == before


def test_errors(weights):
    session = resize(run(weights, [prompt(9, 0)]), [0], 16)
    with pytest.raises(ValueError, match="do not fit rows of 16"):
        admit(session, run(weights, [prompt(20, 0)]), [0], [0])
    session = resize(run(weights, [prompt(9, 0)]), [0], 16)
    with pytest.raises(ValueError, match="resize the session"):
        advance(weights, CONFIG, session, rows([8]), np.array([9]), 8)
    with pytest.raises(ValueError, match="top=65"):
        advance(weights, CONFIG, session, rows([4]), np.array([9]), 4, top=65)
