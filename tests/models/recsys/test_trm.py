"""DeepRec's TRM (arXiv:2505.16810): the acceptance properties of the preference-aware recommender."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.recsys import TRM, Recommender, TRMConfig, get_params, mean_vectors, pad_histories, phrase_mixer, recommend
from models.recsys.blocks import key_mask
from models.recsys.functional import cross_entropy, layer_norm

ITEMS, WIDTH = 60, 12


def _module(seed=0, **sizes):
    rng = np.random.default_rng(seed)
    sizes = {"max_len": 20, "dim": 16, "text_dim": WIDTH, "ffn_dim": 32, "experts": 4} | sizes
    module = TRM(TRMConfig(ITEMS, **sizes), rng.normal(size=(ITEMS + 1, WIDTH)), rngs=nnx.Rngs(seed))
    # spread the weights as training would: the initial ones are tiny, and the gates zero
    for name in ("items", "filter", "positions"):
        getattr(module, name)[...] = getattr(module, name)[...] * 20
    module.adaptor.experts[...] = module.adaptor.experts[...] * 20
    module.adaptor.gate[...] = jnp.asarray(rng.normal(size=(WIDTH, sizes["experts"])), jnp.float32)
    return module


def _batch(*histories):
    return (jnp.asarray(x) for x in pad_histories(histories, 20))


@pytest.mark.parametrize(("items", "count"), [(25_612, 4_746_114), (3_668, 1_937_282)])
def test_parameter_count(items, count):
    module = nnx.eval_shape(lambda: TRM(TRMConfig(items), np.zeros((items + 1, 1024), np.float32), rngs=nnx.Rngs(0)))
    params = get_params(module)
    assert sum(x.size for x in params.values()) == count
    assert params["filter"].shape == (1, 11, 128, 2)  # real pairs, for L = 20


def test_text_and_history_both_steer_the_list(rng):
    server = Recommender(_module())
    history, lengths = pad_histories([[1, 2, 3], [40, 41, 42, 43]], 20)
    texts = np.asarray(rng.normal(size=(2, WIDTH)), np.float32)

    def top(rows, t):
        return server.recommend(history[rows], lengths[rows], texts[t], k=20)[0]

    same_history, same_text = top([0, 0], [0, 1]), top([0, 1], [0, 0])
    assert len(set(same_history[0]) & set(same_history[1])) < 20
    assert len(set(same_text[0]) & set(same_text[1])) < 20


def test_no_text_is_the_normalised_history():
    module = _module()
    history, lengths = _batch([1, 2, 3], [5])
    h = module.history_state(history, lengths)
    want = layer_norm(h, module.out_scale[...], module.out_bias[...], module.config.eps)
    np.testing.assert_array_equal(module.adaptor(jnp.zeros((2, WIDTH))), 0.0)
    np.testing.assert_allclose(module.last_state(history, lengths, jnp.zeros((2, WIDTH))), want, atol=1e-6)
    np.testing.assert_allclose(module.last_state(history, lengths), want, atol=1e-6)


def test_the_adaptor_is_a_soft_mixture_with_noise_in_training_only(rng):
    module = _module()
    x = jnp.asarray(rng.normal(size=(3, WIDTH)), jnp.float32)
    gates = np.asarray(jax.nn.softmax(x @ module.adaptor.gate[...], -1))
    want = sum(gates[:, [j]] * np.asarray(x @ module.adaptor.experts[j]) for j in range(4))
    np.testing.assert_allclose(module.adaptor(x), want, atol=1e-4)
    noisy = [module.adaptor(x, jax.random.key(s)) for s in (0, 1)]
    assert np.abs(noisy[0] - noisy[1]).max() > 1e-3
    np.testing.assert_array_equal(module.adaptor(jnp.zeros((2, WIDTH)), jax.random.key(0)), 0.0)


def test_fusion_against_direct_circular_convolution(rng):
    module = _module(max_len=5)
    ids, text = (jnp.asarray(rng.normal(size=(1, 5, 16)), jnp.float32) for _ in range(2))
    # with the orthonormal transform, irfft(rfft(a) * rfft(b)) is the circular convolution over sqrt(L)
    index = (np.arange(5)[:, None] - np.arange(5)) % 5
    mixed = np.einsum("tsd,sd->td", np.asarray(text)[0][index], np.asarray(ids)[0]) / np.sqrt(5)
    kernel = np.fft.irfft(np.asarray(module.filter[0, ..., 0] + 1j * module.filter[0, ..., 1]), n=5, axis=0)
    filtered = np.einsum("tsd,sd->td", kernel[index], np.asarray(ids)[0])

    def gate(x, w, b):
        return 1 / (1 + np.exp(-(x @ np.asarray(w[...]) + np.asarray(b[...]))))

    want = 2 * filtered * gate(filtered, module.id_gate, module.id_gate_bias)
    want += 2 * mixed * gate(mixed, module.text_gate, module.text_gate_bias)
    np.testing.assert_allclose(module.fuse(ids, text)[0], want, atol=1e-3, rtol=1e-3)


def test_padding_has_no_weight_and_no_vector():
    module = _module()
    history, lengths = _batch([1, 2, 3])
    x = jax.random.normal(jax.random.key(0), (1, 20, 16))
    probs = module.blocks[0].probs(x, x, key_mask(lengths, 20))
    assert np.asarray(probs[..., 3:]).max() == 0.0
    np.testing.assert_allclose(probs.sum(-1), 1.0, atol=1e-6)
    assert not np.asarray(module.items[0]).any()
    assert not np.asarray(module.item_text[0]).any()
    assert not np.asarray(module.adapted_items()[0]).any()
    junk = history.at[0, 5].set(7)  # behind the length
    np.testing.assert_array_equal(module.last_state(junk, lengths), module.last_state(history, lengths))


def test_attention_is_bidirectional_and_the_last_layer_prunes_only_queries():
    module = _module()
    history, lengths = _batch([1, 2, 3, 4], [5])
    full = module.fuse(module.items[...][history], module.adapted_items()[history]) + module.positions[...]
    full = layer_norm(full, module.in_scale[...], module.in_bias[...], module.config.eps)
    for block in module.blocks:
        full = block(full, key_mask(lengths, 20))
    np.testing.assert_allclose(module.history_state(history, lengths), full[jnp.arange(2), lengths - 1], atol=1e-4)


def test_history_of_21_is_its_last_20_and_a_prepared_server_agrees(rng):
    module = _module()
    server, long = Recommender(module), rng.integers(1, ITEMS + 1, 21)
    texts = np.asarray(rng.normal(size=(1, WIDTH)), np.float32)
    a = server.scores(long[None], np.array([21]), texts)
    b = server.scores(long[None, 1:], np.array([20]), texts)
    np.testing.assert_allclose(a, b, atol=1e-6)
    direct = module.scores(module.last_state(jnp.asarray(long[None, 1:]), jnp.array([20]), jnp.asarray(texts)))
    np.testing.assert_allclose(b, direct, atol=1e-5)


def test_top_k_is_distinct_without_pad_and_cosine_bounded():
    history, lengths = pad_histories([[1], list(range(1, 21)), list(range(1, 22))], 21)
    ids, scores = recommend(_module(), history, lengths, k=ITEMS)
    np.testing.assert_array_equal(np.sort(ids, axis=1), np.tile(np.arange(1, ITEMS + 1), (3, 1)))
    assert np.abs(scores).max() <= 1 + 1e-5
    ids, _ = recommend(_module(), history, lengths, k=20, exclude_history=True)
    assert not np.isin(ids[2], np.arange(1, 22)).any()


def test_loss_at_two_items():
    scores = jnp.array([[-jnp.inf, 0.5, 0.4]]) / TRMConfig(2).temperature
    np.testing.assert_allclose(cross_entropy(scores, jnp.array([1])), [0.21483], atol=5e-6)


def test_adaptor_scopes_agree_without_noise():
    a, b = _module(), _module(adaptor_scope="occurrence")
    history, lengths = _batch([1, 2, 3], [7, 7])
    np.testing.assert_allclose(a.last_state(history, lengths), b.last_state(history, lengths), atol=1e-4)


def test_bad_input():
    history, lengths = pad_histories([[1, 2]], 20)
    server = Recommender(_module())
    for shape in ((1, WIDTH + 1), (2, WIDTH)):
        with pytest.raises(ValueError, match=r"text_vectors must be \[1, 12\]"):
            server.recommend(history, lengths, np.zeros(shape, np.float32), k=5)
    for rows, width in ((ITEMS, WIDTH), (ITEMS + 1, WIDTH - 1)):
        with pytest.raises(ValueError, match=f"{rows}, {width}"):
            TRM(TRMConfig(ITEMS, text_dim=WIDTH), np.zeros((rows, width)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="NaN"):
        TRM(TRMConfig(ITEMS, text_dim=WIDTH), np.full((ITEMS + 1, WIDTH), np.nan), rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="prefix"):
        _module().states(*_batch([1]))
    with pytest.raises(KeyError, match="unknown item id 61"):
        server.recommend(np.array([[61]]), np.array([1]), k=5)


# --- preference texts ------------------------------------------------------------------------------------------------

PHRASES = [(), ("red", "big"), ("blue",), ("green", "small"), ()]


def _one_hot(texts):
    return np.eye(5, dtype=np.float32)[: len(texts)]  # sorted: big blue green red small


def test_mixer_uses_target_history_or_nothing_at_the_given_rates():
    mixer = phrase_mixer(PHRASES, _one_hot)
    rows = 4000
    batch = {
        "history": jnp.tile(jnp.array([[3, 2, 0]]), (rows, 1)),
        "lengths": jnp.full((rows,), 2),
        "targets": jnp.full((rows,), 1),
    }
    vectors = np.asarray(mixer(jax.random.key(0), batch))
    norms = np.linalg.norm(vectors, axis=1)
    np.testing.assert_allclose((norms == 0).mean(), 0.15, atol=0.02)
    np.testing.assert_allclose(norms[norms > 0], 1.0, atol=1e-5)
    has_target = (vectors[:, [0, 3]] > 0).any(1)
    np.testing.assert_allclose(has_target.mean(), 0.85 * 0.7, atol=0.03)
    history_only = (norms > 0) & ~has_target
    assert (vectors[history_only][:, 1] > 0).all()  # the most recent item's phrase
    np.testing.assert_allclose((vectors[history_only][:, 2] > 0).mean(), 0.5, atol=0.05)  # the one before: half
    assert (mixer(jax.random.key(0), batch) == vectors).all()
    assert not (mixer(jax.random.key(1), batch) == vectors).all()


def test_mixer_limits_and_edges():
    rows = 500
    batch = {"history": jnp.full((rows, 2), 3), "lengths": jnp.full((rows,), 2), "targets": jnp.full((rows,), 1)}
    one = phrase_mixer(PHRASES, _one_hot, max_phrases=1, history_only=0.0, no_text=0.0)
    vectors = np.asarray(one(jax.random.key(0), batch))
    np.testing.assert_allclose(vectors.max(1), 1.0, atol=1e-6)  # one phrase, and always one of the target
    assert set(vectors.argmax(1)) == {0, 3}
    nothing = {"history": jnp.full((2, 2), 4), "lengths": jnp.full((2,), 2), "targets": jnp.full((2,), 4)}
    assert not np.asarray(one(jax.random.key(0), nothing)).any()  # items without phrases: no text
    np.testing.assert_allclose(one.oracle(np.array([1]))[0], np.array([1, 0, 0, 1, 0]) / np.sqrt(2), atol=1e-6)
    np.testing.assert_allclose(
        one.from_history(np.array([[2, 3, 0]]), np.array([1]))[0], np.array([0, 1, 0, 0, 0]), atol=1e-6
    )
    np.testing.assert_array_equal(mean_vectors(one.vectors, jnp.zeros((1, 3), int)), 0.0)
    with pytest.raises(ValueError, match="no item has a phrase"):
        phrase_mixer([(), (), ()], _one_hot)
    with pytest.raises(ValueError, match="probabilities"):
        phrase_mixer(PHRASES, _one_hot, no_text=1.5)
