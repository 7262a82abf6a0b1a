"""Retrieval heads: worked numbers, a head planted by hand that is found, and a filter that keeps what it points at."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from analysis import build_prompt, heads, pad_prompts, split_at_question
from analysis.heads import (
    TOP_KEY,
    HeadScores,
    add_samples,
    check_head_sets,
    coarse_filter,
    copy_score,
    document_scores,
    fine_candidates,
    from_question,
    gold_recall,
    head_set,
    load_head_set,
    question_attention,
    save_head_set,
    top_heads,
    whole_layers,
)
from models import Config, attention
from models.layout import decode_weights
from models.sample import decode, extend, prefill

# A model whose head (1, 2) looks from a question's key symbol to the document with the same symbol. A token is
# [1, code as a document's key (6), code as a question's key (6), filler (3)]; angles of all but the first pair of a
# head's dimensions do not turn, so that (0, 0) looks at what is near and all other heads look everywhere alike.
SYMBOLS, FILLERS = 60, 8
PLANTED = Config(
    vocab_size=FILLERS + 2 * SYMBOLS, dim=16, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=4, family="llama",
    rope_theta=1e30, max_len=8192,
)  # fmt: skip
STILL = np.array([1, 2, 3, 5, 6, 7])  # dimensions of a head that do not turn
FOUND = (1, 2)


@pytest.fixture(scope="module")
def planted():
    params = jax.tree.map(lambda shape: np.zeros(shape.shape, np.float32), models.abstract(PLANTED, "float32"))
    signs = lambda i, n: np.array([1.0 if i >> bit & 1 else -1.0 for bit in range(n)])  # noqa: E731
    table = params["embed"]
    table[:, 0] = 1.0
    for i in range(FILLERS):
        table[i, 13:] = signs(i, 3) * 2**0.5  # all tokens have the same norm
    for i in range(SYMBOLS):
        table[FILLERS + i, 1:7] = signs(i, 6)
        table[FILLERS + SYMBOLS + i, 7:13] = signs(i, 6)
    params["final_norm"][:] = 1.0
    layers = params["layers"]
    layers["attn_norm"][:] = layers["mlp_norm"][:] = 1.0
    layers["wq"][0, 0, 0, 0], layers["wk"][0, 0, 0, 0] = 2.0, 2.0
    layers["wq"][1, np.arange(7, 13), 2, STILL] = 8.0
    layers["wk"][1, np.arange(1, 7), 1, STILL] = 1.0
    return jax.tree.map(jnp.asarray, params)


def document(symbol: int, rng: np.random.Generator, length: int = 6) -> list[int]:
    """Fillers with the key symbol among them."""
    tokens = rng.integers(2, FILLERS, length)
    tokens[rng.integers(length)] = FILLERS + symbol
    return tokens.tolist()


def sample(rng: np.random.Generator, documents: int, name: str = "prompt", length: int = 6, **pieces):
    """(prompt, place of the gold document, its documents)."""
    symbols = rng.permutation(SYMBOLS)[:documents]
    gold = int(rng.integers(documents))
    texts = [document(s, rng, length) for s in symbols]
    question = [FILLERS + SYMBOLS + int(symbols[gold])] * 2
    pieces = {"system": [1], "separator": [0], "cue": [1, 2]} | pieces
    return build_prompt(texts, question, name=name, **pieces), gold, texts


# --- Worked numbers ---------------------------------------------------------------------------------------------------

ROWS = np.array(
    [[0.30, 0.10, 0.20, 0.05, 0.05, 0.10, 0.10, 0.10], [0.20, 0.05, 0.15, 0.20, 0.10, 0.10, 0.10, 0.10]], np.float32
)


@pytest.mark.parametrize(
    ("aggregation", "alpha", "beta"),
    [
        ("mass", (0.25, 0.125, 0.175), (0.4545455, 0.2272727, 0.3181818)),
        ("mean_over_doc_tokens", (0.125, 0.125, 0.0875), (0.3703704, 0.3703704, 0.2592593)),
    ],
)
def test_alpha_and_beta_of_the_worked_example(aggregation, alpha, beta):
    prompt = build_prompt([[1, 1], [1], [1, 1]], [1, 1], system=[1])
    batch = pad_prompts([prompt], PLANTED, documents=3)
    reduce = from_question(batch, aggregation).function
    probs = jnp.asarray(ROWS)[None, None, None]
    slots = jnp.array([[6, 7]])
    found = reduce({"attn.probs": probs}, slots)
    np.testing.assert_allclose(found[0, 0], alpha, atol=1e-6)
    np.testing.assert_allclose(document_scores(found)[0][0, 0], beta, atol=1e-6)
    # The same in two blocks of queries, with rows that are none and rows of no question.
    other = jnp.full((1, 1, 1, 2, 8), 0.125)
    parts = reduce({"attn.probs": jnp.concatenate([probs[..., :1, :], other], axis=3)}, jnp.array([[6, 3, -1]]))
    parts += reduce({"attn.probs": probs[..., 1:, :]}, jnp.array([[7]]))
    np.testing.assert_allclose(parts, found, atol=1e-6)


def test_eta_and_the_best_head_of_the_worked_example():
    config = PLANTED.replace(layers=1, heads=2, kv_heads=1)
    beta = np.array([[[[0.7, 0.2, 0.1], [0.4, 0.3, 0.3]], [[0.1, 0.5, 0.4], [0.5, 0.3, 0.2]]]])  # [L, B, N, n]
    scores = add_samples(HeadScores.empty(config), beta * 0.37, [{0}, [1, 2]], ["s1", "s2"], [3, 3])
    np.testing.assert_allclose(scores.eta, [[1.6, 0.9]], atol=1e-6)
    assert top_heads(scores.eta, 1) == ((0, 0),)
    one = add_samples(HeadScores.empty(config), beta[:, :1], [{0}], ["s1"], [3])
    both = add_samples(one, beta[:, 1:], [{1, 2}], ["s2"], [3])
    np.testing.assert_allclose(both.eta, scores.eta, atol=1e-9)
    assert both.samples == scores.samples == ("s1", "s2")


def test_the_filter_of_the_worked_example():
    alpha = np.array([[[0.05, 0.40, 0.30, 0.15, 0.10], [0.30, 0.25, 0.05, 0.35, 0.05]]]) * 0.8
    kept = coarse_filter(alpha, [(0, 0), (0, 1)], m=2)
    assert kept.order == (0, 2, 3, 1)
    np.testing.assert_allclose(kept.gamma, (0.35, 0.35, 0.50, 0.65), atol=1e-6)
    assert coarse_filter(alpha, [(0, 0), (0, 1)], m=2, order="original").order == (0, 1, 2, 3)
    shuffled = {coarse_filter(alpha, [(0, 0), (0, 1)], 2, order="random", seed=s).order for s in range(9)}
    assert len(shuffled) > 3
    assert {tuple(sorted(order)) for order in shuffled} == {(0, 1, 2, 3)}
    assert fine_candidates(alpha, [(0, 0), (0, 1)], m=2) == (0, 1, 2, 3)
    assert fine_candidates(alpha, [(0, 0)], m=2) == (1, 2)


# --- Properties -------------------------------------------------------------------------------------------------------


def test_beta_sums_to_one_over_documents_and_knows_no_mass_elsewhere(rng):
    alpha = rng.random((2, 3, 4, 7)) * 0.1
    counts = np.array([7, 5, 1])
    beta, degenerate = document_scores(alpha, counts[None, :, None])
    np.testing.assert_allclose(beta.sum(axis=-1), 1.0, atol=1e-12)
    assert not degenerate.any()
    assert not beta[:, 1, :, 5:].any()
    assert not beta[:, 2, :, 1:].any()
    less = document_scores(alpha * rng.random((2, 3, 4, 1)), counts[None, :, None])[0]
    np.testing.assert_allclose(less, beta, atol=1e-12)


def test_instructions_take_mass_but_leave_beta(planted, rng):
    """Heads without positions: (0, 0) has some."""
    short, _, texts = sample(rng, 5)
    question = short.tokens[slice(*short.question)].tolist()
    long = build_prompt(texts, question, system=[1] * 9, separator=[0], instruction=[3] * 12, cue=[1])
    batch = pad_prompts([short, long], PLANTED)
    alpha = np.asarray(question_attention(planted, PLANTED, batch))
    beta, _ = document_scores(alpha, batch.counts[None, :, None])
    assert (alpha[0, 0, 1:].sum(-1) > alpha[0, 1, 1:].sum(-1) + 0.1).all()
    free = np.ones((2, 4), bool)
    free[0, 0] = False
    np.testing.assert_allclose(beta[:, 0][free], beta[:, 1][free], atol=1e-5)


def test_sizes_and_order_of_what_is_kept(rng):
    for _ in range(20):
        n, k, m = int(rng.integers(6, 20)), int(rng.integers(1, 5)), int(rng.integers(1, 5))
        alpha = rng.random((2, 4, n)) ** 4
        chosen = top_heads(rng.random((2, 4)), k)
        kept = coarse_filter(alpha, chosen, m)
        assert m <= len(kept.order) <= k * m
        assert set(kept.order) <= set(range(n))
        assert (np.diff(kept.gamma) >= 0).all()
        inner = rng.random((2, 4, len(kept.order)))
        candidates = fine_candidates(inner, chosen, m)
        assert m <= len(candidates) <= k * m
        assert {kept.order[i] for i in candidates} <= set(kept.order)


def test_heads_that_look_alike_come_in_order():
    assert top_heads(np.array([[1.0, 2.0], [2.0, 0.0]]), 3) == ((0, 1), (1, 0), (0, 0))


def test_heads_that_cannot_see_all_documents_are_not_chosen():
    scores = np.array([[9.0, 8.0], [1.0, 2.0], [7.0, 7.0], [3.0, 0.0]])
    config = Config(
        vocab_size=8, dim=8, layers=4, heads=2, kv_heads=2, head_dim=4, ffn_dim=8, sliding_window=16,
        sliding_layers=(True, False, True, False),
    )  # fmt: skip
    assert whole_layers(config, 17) == (1, 3)
    assert whole_layers(config, 16) == (0, 1, 2, 3)
    assert top_heads(scores, 3, whole_layers(config, 17)) == ((3, 0), (1, 1), (1, 0))
    with pytest.raises(ValueError, match="4 heads of layers"):
        top_heads(scores, 5, whole_layers(config, 17))


# --- The planted head -------------------------------------------------------------------------------------------------


def test_the_planted_head_is_found(planted, rng):
    L, N = PLANTED.layers, PLANTED.heads
    scores, shuffled, mass, before = HeadScores.empty(PLANTED), HeadScores.empty(PLANTED), 0.0, None
    for batch_number in range(3):
        drawn = [sample(rng, 8 - b, f"{batch_number}/{b}") for b in range(4)]
        batch = pad_prompts([prompt for prompt, _, _ in drawn], PLANTED, width=96, documents=8)
        alpha = question_attention(planted, PLANTED, batch)
        assert alpha.shape == (L, 4, N, 8)
        names, counts = [prompt.name for prompt, _, _ in drawn], batch.counts
        scores = add_samples(scores, alpha, [{gold} for _, gold, _ in drawn], names, counts)
        wrong = [{(gold + 1 + int(rng.integers(c - 1))) % c} for (_, gold, _), c in zip(drawn, counts.tolist())]
        shuffled = add_samples(shuffled, alpha, wrong, names, counts)
        beta = document_scores(np.asarray(alpha), counts[None, :, None])[0]
        mass += sum(beta[1, b, 2, gold] for b, (_, gold, _) in enumerate(drawn))
        assert before in (None, heads._alpha._cache_size())  # other documents compile nothing
        before = heads._alpha._cache_size()
    assert top_heads(scores.eta, 1) == (FOUND,)
    np.testing.assert_allclose(scores.eta[FOUND], mass, atol=1e-6)
    assert scores.eta[FOUND] > 0.99 * 12
    rest = np.delete(scores.eta.reshape(-1), 6)
    assert rest.max() < 0.5 * 12
    assert top_heads(shuffled.eta, 8)[-1] == FOUND
    assert not scores.degenerate.any()


@pytest.mark.parametrize("gold_at", [0, 24, 49])
def test_fifty_documents(planted, rng, gold_at):
    symbols = rng.permutation(SYMBOLS)[:50]
    texts = [document(s, rng) for s in symbols]
    question = [FILLERS + SYMBOLS + int(symbols[gold_at])] * 2
    alpha = np.asarray(question_attention(planted, PLANTED, pad_prompts([build_prompt(texts, question)], PLANTED)))
    for k, m in ((1, 1), (1, 4)):
        kept = coarse_filter(alpha[:, 0], [FOUND][:k], m, count=50)
        assert gold_recall(kept.order, [gold_at]) == 1.0
        assert kept.order[-1] == gold_at
        assert len(kept.order) == m
    # The set does not depend on the order of documents: of the heads without positions, this one sees a difference.
    turn = rng.permutation(50)
    other = pad_prompts([build_prompt([texts[i] for i in turn], question)], PLANTED)
    again = coarse_filter(np.asarray(question_attention(planted, PLANTED, other))[:, 0], [FOUND], 1, count=50)
    assert {int(turn[i]) for i in again.order} == {gold_at}
    # The second prompt, with the filtered documents, has the same head find the same one.
    shorter = build_prompt([texts[i] for i in kept.order], question)
    second = np.asarray(question_attention(planted, PLANTED, pad_prompts([shorter], PLANTED)))
    assert fine_candidates(second[:, 0], [FOUND], 1, count=4) == (3,)


# --- Long prompts, the sampler ----------------------------------------------------------------------------------------

SMALL = Config(
    vocab_size=40, dim=16, layers=2, heads=4, kv_heads=2, head_dim=6, ffn_dim=20, init_std=0.4, max_len=10_000
)


def random_batch(rng, documents=6, length=5, count=2, config=SMALL, **options):
    prompts = [
        build_prompt(
            rng.integers(1, 40, (documents, length)).tolist(), rng.integers(1, 40, 7 + b).tolist(), system=[1, 2],
            separator=[3], cue=[4, 5], name=f"p{b}",
        )
        for b in range(count)
    ]  # fmt: skip
    return pad_prompts(prompts, config, **options)


@pytest.mark.parametrize("aggregation", heads.AGGREGATIONS)
def test_blocks_of_queries_equal_all_scores_at_once(rng, key, aggregation, monkeypatch):
    params = models.init(SMALL, key)
    batch = random_batch(rng, documents=10, length=119, count=1)  # about 1,200 tokens
    assert batch.tokens.shape[1] > attention._LONGEST_WHOLE
    blocked = np.asarray(question_attention(params, SMALL, batch, aggregation))
    monkeypatch.setattr(attention, "_LONGEST_WHOLE", 10_000)
    reduce = {"alpha": from_question(batch, aggregation)}
    run = jax.jit(lambda p: models.forward(p, SMALL, jnp.asarray(batch.tokens), reduce=reduce, record=("attn.probs",)))
    records = run(params).records
    np.testing.assert_allclose(records["alpha"], blocked, atol=1e-6)
    probs = np.asarray(records["attn.probs"], np.float64).reshape(2, 1, 4, *records["attn.probs"].shape[-2:])
    rows = probs[..., batch.question[0], :].mean(axis=-2)
    total = np.mean if aggregation == "mean_over_doc_tokens" else np.sum
    by_hand = np.stack([total(rows[..., batch.document[0] == i], axis=-1) for i in range(10)], axis=-1)
    np.testing.assert_allclose(blocked[..., :10], by_hand, atol=1e-6)
    assert not blocked[..., 10:].any()


def test_memory_grows_with_the_length_and_not_its_square(rng, key):
    params = models.init(SMALL, key)

    def compiled(T):
        batch = random_batch(rng, documents=T // 256, length=200, count=1, width=T)
        return heads._alpha.lower(params, batch, config=SMALL, aggregation="mass").compile()

    sizes = []
    for T in (2048, 4096, 8192):
        program = compiled(T)
        assert not re.search(rf"\[([0-9]+,)*{T},{T}\]", program.as_text())
        sizes.append(program.memory_analysis().temp_size_in_bytes)
    assert sizes[2] < 2.3 * sizes[1] < 2.3 * 2.3 * sizes[0]


def test_the_sampler_gives_the_same_alpha_and_compiles_nothing_for_other_documents(rng, key):
    from models import sample as sampler

    params, programs = models.init(SMALL, key), (sampler._prefill, sampler._extend)
    weights, before = decode_weights(params, SMALL), None
    for aggregation in (*heads.AGGREGATIONS, heads.AGGREGATIONS[1]):
        batch = random_batch(rng, count=2)
        expected = question_attention(params, SMALL, batch, aggregation)
        kept = {"alpha": from_question(batch, aggregation)}
        whole = prefill(weights, SMALL, batch.tokens, batch.lengths, 64, reduce=kept)
        np.testing.assert_allclose(whole.records["alpha"], expected, atol=1e-5)
        first, starts, behind, rest = split_at_question(batch)
        session = prefill(weights, SMALL, first, starts, 64)
        session = extend(weights, SMALL, session, behind, rest, int(batch.lengths.max()), reduce=kept)
        np.testing.assert_allclose(session.records["alpha"], expected, atol=1e-5)
        before, last = [program._cache_size() for program in programs], before
    assert before == last


def test_alpha_is_the_same_on_a_mesh(rng, key):
    params, batch = models.init(SMALL, key), random_batch(rng, count=4)
    alone = question_attention(params, SMALL, batch)
    mesh = models.make_mesh(data=2, fsdp=2, tensor=2)
    with models.use_mesh(mesh):
        spread = question_attention(jax.device_put(params, models.shardings(SMALL, mesh)), SMALL, batch)
    np.testing.assert_allclose(spread, alone, atol=1e-5)


# --- Heads that copy --------------------------------------------------------------------------------------------------


def test_copy_score():
    prompt = np.array([5, 6, 7, 8, 6])
    attended = np.array([[[1, 1, 4]], [[2, 0, 1]], [[2, 2, 2]]])  # three tokens, one layer, three heads
    generated = np.array([6, 7, 9])
    # Head 0 copies 6 and 7; head 1 copies 6; head 2 looks at another 6, and at 6 where 7 is generated.
    np.testing.assert_allclose(copy_score(attended, generated, prompt, (1, 3)), [[1.0, 0.5, 0.0]])
    with pytest.raises(ValueError, match=r"needle \[3, 6\)"):
        copy_score(attended, generated, prompt, (3, 6))
    with pytest.raises(ValueError, match="for 2 tokens"):
        copy_score(attended, generated[:2], prompt, (1, 3))


def test_where_heads_look_most_comes_from_the_sampler(rng, key):
    params, batch = models.init(SMALL, key), random_batch(rng, count=2)
    weights = decode_weights(params, SMALL)
    first, starts, behind, rest = split_at_question(batch)
    session = prefill(weights, SMALL, first, starts, 64)
    session = extend(weights, SMALL, session, behind, rest, int(batch.lengths.max()), reduce={"top": TOP_KEY})
    last = np.asarray(session.records["top"])[:, np.arange(2), :, rest - 1]  # [B, L, N]
    out, _ = decode(
        weights, SMALL, session, jax.random.key(0), np.full(2, 3), steps=3, temperature=0.0, reduce={"top": TOP_KEY}
    )
    tokens = np.asarray(out.tokens)
    for b in range(2):
        n = int(batch.lengths[b])
        row = np.concatenate([batch.tokens[b, :n], tokens[b]])
        probs = models.forward(params, SMALL, jnp.asarray(row)[None], record=("attn.probs",)).records["attn.probs"]
        want = np.asarray(probs).reshape(2, 4, n + 3, n + 3).argmax(-1)
        np.testing.assert_array_equal(last[b], want[:, :, n - 1])
        np.testing.assert_array_equal(np.asarray(out.records["top"])[:, :, b, :, 0], want[:, :, n:].transpose(2, 0, 1))


# --- Files, and what is refused ---------------------------------------------------------------------------------------


def some_scores(ids=("a", "b"), config=SMALL) -> HeadScores:
    alpha = np.random.default_rng(len(ids)).random((config.layers, len(ids), config.heads, 3))
    return add_samples(HeadScores.empty(config), alpha, [{0}] * len(ids), ids, [3] * len(ids))


def test_a_file_of_heads_says_what_it_is_for(tmp_path):
    heads_of = head_set(some_scores(), 4, "tiny-1", "coarse")
    path = tmp_path / "heads.json"
    save_head_set(path, heads_of)
    content = json.loads(path.read_text())
    assert {name: content[name] for name in ("model", "layers", "num_heads", "samples", "aggregation", "stage")} == {
        "model": "tiny-1", "layers": 2, "num_heads": 4, "samples": 2, "aggregation": "mass", "stage": "coarse",
    }  # fmt: skip
    again = load_head_set(path, "tiny-1", SMALL)
    assert dataclasses.asdict(again) == dataclasses.asdict(heads_of)
    assert list(again.values) == sorted(again.values, reverse=True)
    for name, message in {
        "model": r"heads\.json: model is 'tiny-1', not 'tiny-2'",
        "layers": r"heads\.json: layers is 2, not 3",
        "num_heads": r"heads\.json: num_heads is 4, not 8",
        "score": r"heads\.json: score is 'retrieval', not 'copy'",
    }.items():
        config = {"layers": SMALL.replace(layers=3), "num_heads": SMALL.replace(heads=8)}.get(name, SMALL)
        model, score = "tiny-2" if name == "model" else "tiny-1", "copy" if name == "score" else "retrieval"
        with pytest.raises(ValueError, match=message):
            load_head_set(path, model, config, score)
    for name, value, message in [
        ("heads", [[0, 1], [1, 4], [1, 1], [1, 2]], r"head \(1, 4\) is outside of the model's 2 layers and 4 heads"),
        ("heads", [[0, 1], [0, 1], [1, 1], [1, 2]], "one value for each of its different heads"),
        ("aggregation", "max", "aggregation must be one of mass"),
        ("samples", 3, "samples is 3, with 2 ids"),
    ]:
        path.write_text(json.dumps(content | {name: value}))
        with pytest.raises(ValueError, match=message):
            load_head_set(path, "tiny-1", SMALL)
    path.write_text(json.dumps({name: content[name] for name in content if name != "values"}))
    with pytest.raises(ValueError, match="field 'values' is missing"):
        load_head_set(path, "tiny-1", SMALL)


def test_stages_with_the_same_samples_are_warned_of_and_test_samples_refused(recwarn):
    coarse, fine = (
        head_set(some_scores(ids), 2, "tiny", stage) for ids, stage in ((("a", "b"), "coarse"), (("c", "d"), "fine"))
    )
    check_head_sets(coarse, fine, ["e"])
    assert not recwarn.list
    with pytest.warns(UserWarning, match="same validation samples"):
        check_head_sets(coarse, dataclasses.replace(coarse, stage="fine"))
    with pytest.raises(ValueError, match="test sample 'd' chose the heads of stage 'fine'"):
        check_head_sets(coarse, fine, ["d", "e"])
    with pytest.raises(ValueError, match="differ in model: 'tiny' and 'other'"):
        check_head_sets(coarse, dataclasses.replace(fine, model="other"))


@pytest.mark.parametrize("k", [0, -1, 9])
def test_numbers_of_heads_out_of_range(k):
    with pytest.raises(ValueError, match=rf"k={k} heads: must lie between 1 and the model's 8 heads"):
        head_set(some_scores(), k, "tiny")


def test_wrong_validation_samples_are_named():
    alpha, empty = np.ones((2, 1, 4, 3)), HeadScores.empty(SMALL)
    for gold, message in (([], "it has no gold document"), ([3], "gold document 3 is not one of its 3"), ([-1], "-1")):
        with pytest.raises(ValueError, match=rf"sample 'x7': .*{message}"):
            add_samples(empty, alpha, [gold], ["x7"], [3])
    with pytest.raises(ValueError, match="sample 'x7' was counted before"):
        add_samples(add_samples(empty, alpha, [[0]], ["x7"], [3]), alpha, [[0]], ["x7"], [3])
    with pytest.raises(ValueError, match="2 layers and 4 heads; got 2 gold sets"):
        add_samples(empty, alpha, [[0], [0]], ["x7"], [3])
    with pytest.raises(ValueError, match="no validation samples"):
        head_set(empty, 1, "tiny")
    with pytest.raises(ValueError, match="aggregation must be one of"):
        HeadScores.empty(SMALL, "max")
    with pytest.raises(ValueError, match="counts must lie between 1 and the 3 columns"):
        document_scores(alpha, 4)


def test_heads_without_mass_are_left_out_of_eta_and_counted():
    alpha = np.ones((1, 2, 3, 4))
    alpha[0, :, 1] = 0.0
    alpha[0, 1, 2, 1] = np.nan
    config = SMALL.replace(layers=1, heads=3, kv_heads=1)
    scores = add_samples(HeadScores.empty(config), alpha, [[0], [0, 1]], ["a", "b"], [4, 4])
    np.testing.assert_allclose(scores.eta, [[0.75, 0.0, 0.25]])
    assert scores.degenerate.tolist() == [[0, 2, 1]]
    beta, degenerate = document_scores(alpha)
    np.testing.assert_allclose(beta[0, 1, 1:], 0.25)
    assert degenerate[0].tolist() == [[False, True, False], [False, True, True]]
    with pytest.raises(ValueError, match=r"head \(0, 1\) is among the best 3 but has no attention"):
        head_set(scores, 3, "tiny")
    kept = coarse_filter(alpha[:, 1], [(0, 0), (0, 1)], 1)
    assert kept.degenerate == 1
    with pytest.raises(ValueError, match=r"sample 'b': none of the heads \[\(0, 1\), \(0, 2\)\] has attention"):
        coarse_filter(alpha[:, 1], [(0, 1), (0, 2)], 1, sample="b")


def test_wrong_choices_of_documents_are_named():
    alpha = np.ones((2, 4, 3))
    with pytest.warns(UserWarning, match="sample 'q': 3 documents are fewer than m=4, so all are taken"):
        assert coarse_filter(alpha, [(0, 0)], 4, sample="q").order == (0, 1, 2)
    for m in (0, -2):
        with pytest.raises(ValueError, match=f"m={m} documents per head: must be at least 1"):
            fine_candidates(alpha, [(0, 0)], m)
    with pytest.raises(ValueError, match=r"head \(2, 0\) is outside of the model's 2 layers and 4 heads"):
        coarse_filter(alpha, [(0, 0), (2, 0)], 1)
    with pytest.raises(ValueError, match="no heads were given"):
        coarse_filter(alpha, [], 1)
    with pytest.raises(ValueError, match="order must be one of ascending"):
        coarse_filter(alpha, [(0, 0)], 1, order="descending")
    with pytest.raises(ValueError, match=r"must be \[L, N, n\] of one sample"):
        coarse_filter(alpha[None], [(0, 0)], 1)
    with pytest.raises(ValueError, match="count=4 must lie between 1 and 3"):
        coarse_filter(alpha, [(0, 0)], 1, count=4)
    with pytest.raises(ValueError, match="at least one gold"):
        gold_recall([1], [])
    with pytest.raises(ValueError, match="aggregation must be one of mass"):
        from_question(random_batch(np.random.default_rng(0)), "max")
