"""The simulated user: worked scores, batches against single forward passes, critiques by seed, and few programs."""

from __future__ import annotations

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from jaxrec.tools import simulated_user
from jaxrec.tools.conversation import Criticise
from jaxrec.tools.simulated_user import ModelUser, UserConfig, code_score, normalised_score, resampled
from models import sample, slots
from models.sample import bucket
from models.slots import Advanced
from tests.jaxrec.tools.user_world import DIALOGUES, prompts, talk, tiny_model

ITEMS = [[3, 0, 7, 3], [5], [1, 2, 0, 4, 6, 7]]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def user(model, style="short", mesh=None, **settings) -> ModelUser:
    return ModelUser(model, prompts(style, model.tokenizer), UserConfig(**settings), mesh)


@functools.partial(jax.jit, static_argnums=1)
def _after(params, config, tokens, lengths):
    hidden = models.forward(params, config, tokens, head=False, record=("final",)).records["final"]
    hidden = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
    return jax.nn.log_softmax(models.unembed(params, config, hidden)[:, 0]), hidden[:, 0]


def reference(model, pairs, style="short"):
    """Forward passes over whole prompts, of pairs (dialogue, item): log P(next token) [n, V], last hidden [n, D]."""
    made = prompts(style, model.tokenizer)
    rows = [[i for piece in made.score_prompt(*pair) for i in model.tokenizer.encode(piece)] for pair in pairs]
    tokens = np.zeros((len(rows), bucket(max(map(len, rows)), 128)), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return jax.device_get(_after(model.params, model.config, tokens, np.array([len(row) for row in rows])))


def expected(model, pairs, style="short") -> np.ndarray:
    p = np.exp(reference(model, pairs, style)[0].astype(np.float64))
    yes, no = (p[:, model.tokenizer.encode(word)[0]] for word in (" Yes", " No"))
    return yes / (yes + no)


def test_worked_values_of_the_paper():
    """Of arXiv 2504.20458: said "Yes" at .8, "No" at .7, and of Yes .6 / No .3 and Yes .2 / No .7 both readings."""
    said = code_score(
        np.log([0.8, 0.7, 0.6, 0.7, 0.5]), np.array([1, 0, 1, 0, 0], bool), np.array([0, 1, 0, 1, 0], bool)
    )
    np.testing.assert_allclose(said, [0.8, 0.3, 0.6, 0.3, np.nan], atol=1e-6)
    np.testing.assert_allclose(normalised_score(np.log([0.6, 0.2]), np.log([0.3, 0.7])), [2 / 3, 2 / 9], atol=1e-6)


def test_normalised_scores_stay_in_range_however_unlikely_both_words_are():
    yes, no = np.array([-900.0, -900.0, -np.inf, 0.0]), np.array([-905.0, -10.0, -1.0, -np.inf])
    np.testing.assert_allclose(normalised_score(yes, no), [1 / (1 + np.exp(-5)), 0, 0, 1], atol=1e-12)
    assert np.isnan(normalised_score(np.array(-np.inf), np.array(-np.inf)))


@pytest.mark.parametrize("style", ["short", "full"])
def test_a_batch_of_ragged_dialogues_scores_as_each_prompt_alone(model, style):
    count = 3 if style == "short" else 2  # the instruction is spelled letter by letter here
    found = user(model, style).score(DIALOGUES[:count], ITEMS[:count])
    assert [scores.shape for scores in found] == [(4,), (1,), (6,)][:count]
    asked = zip(DIALOGUES[:count], ITEMS[:count], strict=True)
    pairs = [(dialogue, item) for dialogue, items in asked for item in items]
    scores = np.concatenate(found)
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, expected(model, pairs, style), atol=1e-5)
    assert np.ptp(scores) > 1e-3  # else anything would agree


def test_scores_do_not_depend_on_order_or_on_the_size_of_the_batch(model):
    whole = user(model).score(DIALOGUES, ITEMS)
    turned = user(model, rows=4, cache_tokens=100).score(DIALOGUES[::-1], [items[::-1] for items in ITEMS[::-1]])
    for one, other in zip(whole, turned[::-1], strict=True):
        np.testing.assert_allclose(one, other[::-1], atol=1e-5)
    assert whole[0][0] == whole[0][3]
    assert [scores.shape for scores in user(model).score(DIALOGUES[:2], [[], [1]])] == [(0,), (1,)]
    assert user(model).score([], []) == []


@pytest.mark.parametrize(
    ("word", "score"), [(" Yes", lambda p: p), (" No", lambda p: 1 - p), (" dark", lambda p: np.nan)]
)
def test_a_score_of_the_code_reads_the_likeliest_token(model, word, score):
    """The head's column of a word is turned towards what this prompt ends in."""
    pair = (DIALOGUES[0], 2)
    hidden = reference(model, [pair])[1][0]
    head = np.array(model.params["head"]) * 0.05
    head[:, model.tokenizer.encode(word)[0]] = hidden / np.sum(hidden**2) * 5
    bent = model.replace(params={**model.params, "head": head})
    likeliest = np.exp(reference(bent, [pair])[0].astype(np.float64).max())
    ((found,),) = user(bent, score="code").score([pair[0]], [[pair[1]]])
    np.testing.assert_allclose(found, score(likeliest), atol=1e-5)
    assert 0.2 < likeliest < 0.9


def test_both_spellings_of_a_decision_count(model):
    words = models.build_word_tokenizer([" Yes", "Yes", " No", "No", "\nAccept?", "\nItem:"])
    config = model.config.replace(vocab_size=words.vocab_size)
    two, pair = models.Model(config, models.init(config, jax.random.key(1)), words), (DIALOGUES[0], 1)
    p = np.exp(reference(two, [pair])[0][0].astype(np.float64))
    yes, no = (p[words.encode(" " + w)[0]] + p[words.encode(w)[0]] for w in ("Yes", "No"))
    ((found,),) = user(two).score([pair[0]], [[pair[1]]])
    np.testing.assert_allclose(found, yes / (yes + no), atol=1e-5)


def test_other_sizes_inside_the_buckets_compile_nothing(model, monkeypatch):
    monkeypatch.setattr(simulated_user, "MOST_ROUNDS", 1)  # later rounds have as many rows as chance wants
    mine = user(model, rows=16, max_new=8)
    programs = (sample._prefill, sample._extend, slots._resize, slots._advance, simulated_user._decision)

    def play(dialogues, items, lists):
        mine.score(dialogues, items)
        mine.criticise([Criticise(d, shown, seed) for d in dialogues for shown in lists for seed in range(2)])

    play(DIALOGUES[:2], [[0, 1, 2], [3, 4, 5, 6, 7]], [(0, 1), (2, 3)])
    before = [program._cache_size() for program in programs]
    play([talk(8, "no more please"), talk(9, "I want drama")], [[5, 4, 3, 6], [1, 2, 3, 0]], [(4, 1), (5,)])
    assert [program._cache_size() for program in programs] == before


def test_critiques_belong_to_their_seed_not_to_the_batch(model):
    mine = user(model, max_new=40)
    seeds = [3, 3, 7, 2**31 - 1, 5]
    requests = [Criticise(DIALOGUES[i % 2], (i % 5, 5 + i % 3), seed) for i, seed in enumerate(seeds)]
    requests.append(Criticise(DIALOGUES[0], (0, 5), 4))  # the first one's list, another seed
    whole = mine.criticise(requests)
    assert whole[::-1] == mine.criticise(requests[::-1])
    assert [mine.criticise([requests[i]])[0] for i in (0, 5)] == [whole[0], whole[5]]
    assert len(set(whole)) > 3
    assert whole[0] != whole[5]


def test_a_greedy_critique_is_the_models_own_continuation(model):
    mine = user(model, max_new=24, temperature=0.0)
    asked = Criticise(DIALOGUES[1], (2, 6))
    ids = [i for p in mine.prompts.critique_prompt(asked.dialogue, asked.shown) for i in model.tokenizer.encode(p)]
    out = models.generate_tokens(model.params, model.config, [ids], 24)
    made = out.tokens[0][: out.counts[0]].tolist()
    text = model.tokenizer.decode([i for i in made if i not in model.config.eos_ids])
    line, found, _ = text.lstrip().partition("\n")
    ended = found or made[-1] in model.config.eos_ids
    assert mine.criticise([asked]) == [line.strip() if ended else ""]


@pytest.mark.parametrize(("style", "said"), [("short", "dark ocean"), ("full", "dark ocean\n dark")])
def test_a_critique_ends_with_its_end_token_or_its_line_and_what_is_cut_is_drawn_again(model, monkeypatch, style, said):
    """What each (seed, round) writes is given: two texts that end, one that is cut, and one of blanks alone."""
    mine = user(model, style, max_new=50)
    texts = {(1, 0): " dark ocean\n dark<|eos|>", (2, 0): " dark" * 90, (2, 1): "  <|eos|>", (2, 2): " drama<|eos|>"}
    script = {key: model.tokenizer.encode(text) for key, text in texts.items()}
    drawn = collections.Counter()

    def advance(weights, config, session, rows, lengths, steps):
        tokens, counts, ended = np.zeros((len(lengths), steps), np.int32), np.zeros(len(lengths), np.int32), []
        for i, limit in enumerate(rows.limits):
            key = int(rows.seeds[i, 0]), int(rows.choices[i])
            new = script[key][rows.drawn[i] :][: min(limit, steps)]
            tokens[i, : len(new)], counts[i] = new, len(new)
            ended.append(bool(new) and new[-1] in config.eos_ids)
            drawn[key] += len(new)
        return Advanced(tokens, np.zeros(tokens.shape), counts, np.array(ended)), session

    monkeypatch.setattr(simulated_user, "advance", advance)
    assert mine.criticise([Criticise(DIALOGUES[0], (1,), 1), Criticise(DIALOGUES[0], (2,), 2)]) == [said, "drama"]
    assert drawn[2, 0] >= 50


def test_rounds_are_bounded_and_a_list_with_a_critique_asks_for_no_more():
    asked: list[tuple[list[int], int]] = []

    def sample(wanted, again):
        asked.append((wanted, again))
        return ["x" if i == 0 or (i == 3 and again == 4) else "" for i in wanted]

    assert resampled([0, 0, 1, 2], sample) == ["x", "", "", "x"]
    assert asked == [([0, 1, 2, 3], 0), ([1, 2, 3], 1), ([1, 2, 3], 2), ([2, 3], 3), ([2, 3], 4)]


def test_a_mesh_gives_the_scores_of_one_device(model):
    mesh = models.make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
    placed = model.replace(params=jax.device_put(model.params, models.shardings(model.config, mesh)))
    one, other = user(model).score(DIALOGUES, ITEMS), user(placed, mesh=mesh).score(DIALOGUES, ITEMS)
    np.testing.assert_allclose(np.concatenate(one), np.concatenate(other), atol=1e-5)


def test_what_cannot_be_asked_is_an_error(model):
    with pytest.raises(ValueError, match="score='mean' must be one of normalised, code"):
        UserConfig(score="mean")
    with pytest.raises(ValueError, match="rows must be at least 1"):
        UserConfig(rows=0)
    with pytest.raises(ValueError, match="no token for 'Yes'"):
        ModelUser(model.replace(tokenizer=models.build_word_tokenizer(["x"])), prompts())
    with pytest.raises(ValueError, match="needs its tokenizer"):
        ModelUser(model.replace(tokenizer=None), prompts())
    with pytest.raises(ValueError, match=r"dialogue d2: its prompt has \d+ tokens"):
        user(tiny_model(max_len=40)).score(DIALOGUES, ITEMS)
    broken = model.replace(params={**model.params, "head": model.params["head"] * np.nan})
    with pytest.raises(FloatingPointError, match="not finite"):
        user(broken).score(DIALOGUES[:2], [[1], []])
