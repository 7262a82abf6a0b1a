"""SASRec and GRU4Rec: sizes, causality, padding, PAD scores, serving, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.recsys import (
    GRU4Rec,
    GRU4RecConfig,
    Recommender,
    SASRec,
    SASRecConfig,
    UnknownItemError,
    get_params,
    pad_histories,
    set_params,
)
from models.recsys import base as base_module
from models.recsys.functional import bce, bpr, cross_entropy, draw_negatives, dropout, fit_length

ITEMS = 12


def _sasrec(form="recbole", **sizes):
    sizes = {"dim": 8, "heads": 2, "ffn_dim": 16, "max_len": 6} | sizes
    return SASRec(SASRecConfig(ITEMS, form=form, **sizes), rngs=nnx.Rngs(0))


def _gru():
    return GRU4Rec(GRU4RecConfig(ITEMS, max_len=6, dim=8, hidden=10), rngs=nnx.Rngs(0))


MODELS = {"sasrec": _sasrec, "paper": lambda: _sasrec("paper"), "gru4rec": _gru}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def _size(module):
    return sum(x.size for x in get_params(module).values())


@pytest.mark.parametrize(("items", "sasrec", "gru"), [(1682, 211_008, 189_696), (3123, 303_232, 281_920)])
def test_parameter_counts(items, sasrec, gru):
    shapes = nnx.eval_shape(lambda: SASRec(SASRecConfig(items), rngs=nnx.Rngs(0)))
    assert _size(shapes) == sasrec
    assert _size(nnx.eval_shape(lambda: GRU4Rec(GRU4RecConfig(items), rngs=nnx.Rngs(0)))) == gru


@every_model
def test_causal_and_blind_to_padding(make):
    module = make()
    history, lengths = jnp.array([[3, 1, 4, 1, 5, 9]]), jnp.array([6])
    states = module.states(history, lengths)
    changed = module.states(history.at[0, 3].set(7), lengths)
    np.testing.assert_allclose(states[:, :3], changed[:, :3], atol=1e-6)
    assert np.abs(states[:, 3:] - changed[:, 3:]).max() > 1e-3
    short = module.states(history[:, :4], jnp.array([4]))
    wide = module.states(history.at[0, 4:].set(0), jnp.array([4]))
    np.testing.assert_allclose(short, wide[:, :4], atol=1e-6)
    # whatever stands behind the length is padding
    np.testing.assert_allclose(module.states(history, jnp.array([4]))[:, :4], short, atol=1e-6)


@every_model
def test_last_state_is_the_state_at_the_last_item(make):
    module = make()
    history, lengths = pad_histories([[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]], 6)
    states = module.states(jnp.asarray(history), jnp.asarray(lengths))
    np.testing.assert_allclose(
        module.last_state(jnp.asarray(history), jnp.asarray(lengths)), states[jnp.arange(3), lengths - 1], atol=1e-5
    )


@every_model
def test_pad_is_never_scored_and_top_items_are_distinct(make):
    module = make()
    history, lengths = pad_histories([[1, 2, 3], [4]], 6)
    server = Recommender(module)
    scores = np.asarray(server.scores(history, lengths))
    assert scores.shape == (2, ITEMS + 1)
    assert np.isneginf(scores[:, 0]).all()
    assert np.isfinite(scores[:, 1:]).all()
    ids, values = server.recommend(history, lengths, k=ITEMS)
    np.testing.assert_array_equal(np.sort(ids, axis=1), np.tile(np.arange(1, ITEMS + 1), (2, 1)))
    assert (np.diff(values, axis=1) <= 0).all()
    np.testing.assert_allclose(values, np.take_along_axis(scores, ids, axis=1), atol=1e-6)
    states = module.last_state(jnp.asarray(history), jnp.asarray(lengths))
    np.testing.assert_allclose(module.score_items(states, jnp.asarray(ids)), values, atol=1e-5)


def test_batched_and_single_calls_agree_and_shapes_do_not_recompile():
    server = Recommender(_sasrec())
    histories = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [2, 2]]
    history, lengths = pad_histories(histories, 6)
    together = np.asarray(server.scores(history, lengths))
    for row, single in enumerate(histories):
        one = np.asarray(server.scores(*pad_histories([single], 6)))
        np.testing.assert_allclose(one[0, 1:], together[row, 1:], atol=1e-5)
    server.recommend(history, lengths, k=3)
    compiled = base_module._recommend._cache_size()
    for rows in (4, 3, 4):  # all are padded to the smallest batch
        ids, _ = server.recommend(history[:rows], lengths[:rows], k=3)
        assert ids.shape == (rows, 3)
    assert base_module._recommend._cache_size() == compiled


def test_many_rows_go_in_parts(monkeypatch, rng):
    server = Recommender(_sasrec())
    history, lengths = rng.integers(1, ITEMS + 1, (21, 6)), rng.integers(1, 7, 21)
    seen = rng.integers(0, ITEMS + 1, (21, 2))
    whole = server.recommend(history, lengths, k=4, exclude_seen=seen)
    monkeypatch.setattr(Recommender, "SMALLEST", 4)
    monkeypatch.setattr(Recommender, "LARGEST", 8)
    parts = server.recommend(history, lengths, k=4, exclude_seen=seen)
    np.testing.assert_array_equal(parts[0], whole[0])
    np.testing.assert_allclose(parts[1], whole[1], atol=1e-6)


def test_exclusion():
    server = Recommender(_sasrec())
    history, lengths = pad_histories([[1, 2, 3], [4]], 6)
    history[1, 3] = 9  # padding: not part of the history
    ids, _ = server.recommend(history, lengths, k=9, exclude_history=True)
    assert not np.isin(ids[0], [1, 2, 3]).any()
    assert 4 not in ids[1]
    ids, _ = server.recommend(history, lengths, k=10, exclude_seen=np.array([[5, 6], [7, 0]]))
    assert not np.isin(ids[0], [5, 6]).any()
    assert 7 not in ids[1]
    with pytest.raises(ValueError, match="row 0 has only 9 items left"):
        server.recommend(history, lengths, k=10, exclude_history=True)
    with pytest.raises(ValueError, match="id 13"):
        server.recommend(history, lengths, k=1, exclude_seen=np.array([[13], [0]]))


def test_a_long_history_is_its_most_recent_part(rng):
    server = Recommender(_sasrec())
    long = rng.integers(1, ITEMS + 1, 9)
    np.testing.assert_allclose(
        server.scores(long[None], np.array([9])), server.scores(long[None, -6:], np.array([6])), atol=1e-6
    )
    padded, lengths = pad_histories([long.tolist(), [1]], 6)
    np.testing.assert_array_equal(padded, [long[-6:], [1, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(lengths, [6, 1])
    cut, cut_lengths = fit_length(jnp.asarray(long[None]), jnp.array([8]), 6)
    np.testing.assert_array_equal(cut[0], long[2:8])
    assert int(cut_lengths[0]) == 6


def test_bad_input_is_named():
    server = Recommender(_sasrec())
    history, lengths = np.array([[1, 2, 0]]), np.array([2])
    for wrong, error in (([[1, 13, 0]], "unknown item id 13"), ([[0, 2, 0]], "unknown item id 0")):
        for kind in (KeyError, IndexError, UnknownItemError):
            with pytest.raises(kind, match=error):
                server.scores(np.array(wrong), lengths)
    for wrong in (0, 4):
        with pytest.raises(ValueError, match="at least one known item"):
            server.scores(history, np.array([wrong]))
    for k in (0, ITEMS + 1, 2.0):
        with pytest.raises(ValueError, match="k must be"):
            server.recommend(history, lengths, k=k)
    with pytest.raises(ValueError, match="integers"):
        server.scores(history.astype(float), lengths)
    with pytest.raises(ValueError, match="takes no text"):
        server.scores(history, lengths, np.zeros((1, 4)))
    with pytest.raises(ValueError, match="9 is not divisible by 2 heads"):
        _sasrec(dim=9)
    with pytest.raises(ValueError, match="form"):
        _sasrec("other")


def test_parameters_by_name_round_trip():
    module = _sasrec()
    params = get_params(module)
    assert {"items", "positions", "blocks/0/wq", "blocks/1/w2"} <= set(params)
    other = set_params(_sasrec(), {name: x + 1 for name, x in params.items()})
    np.testing.assert_array_equal(other.items[...], module.items[...] + 1)
    with pytest.raises(ValueError, match=r"missing.*positions"):
        set_params(module, {name: x for name, x in params.items() if name != "positions"})
    with pytest.raises(ValueError, match="positions must have shape"):
        set_params(module, params | {"positions": np.zeros((2, 2))})


def test_loss_values_by_hand():
    np.testing.assert_allclose(bpr(jnp.array([2.0, 1.0]), jnp.array([1.0, 1.0])), [0.3133, 0.6931], atol=1e-4)
    np.testing.assert_allclose(bce(jnp.array([0.0]), jnp.array([0.0])), [2 * np.log(2)], atol=1e-6)
    scores = jnp.array([[-jnp.inf, 1.0, 1.0, 1.0]])
    np.testing.assert_allclose(cross_entropy(scores, jnp.array([2])), [np.log(3)], atol=1e-6)  # PAD is outside
    assert float(cross_entropy(scores, jnp.array([0]))[0]) == 0.0
    assert np.isfinite(jax.grad(lambda s: cross_entropy(s, jnp.array([2])).sum())(scores)).all()


def test_negatives_are_exactly_uniform_over_the_unseen():
    seen = jnp.array([[1, 3, 3, 0, 6], [0, 0, 0, 0, 0], [2, 1, 4, 5, 6]])
    drawn = np.asarray(draw_negatives(jax.random.key(0), seen, 6, 6000))
    for row, allowed in enumerate([[2, 4, 5], [1, 2, 3, 4, 5, 6], [3]]):
        ids, counts = np.unique(drawn[row], return_counts=True)
        np.testing.assert_array_equal(ids, allowed)
        np.testing.assert_allclose(counts / 6000, 1 / len(allowed), atol=0.03)


def test_dropout_rate_scale_and_independence():
    x = jnp.ones((1000, 500))
    for rate in (0.2, 0.5):
        a, b = (np.asarray(dropout(x, rate, jax.random.key(s))) for s in (0, 1))
        assert set(np.unique(a)) == {0.0, np.float32(1 / (1 - rate))}
        np.testing.assert_allclose([(a == 0).mean(), (b == 0).mean()], rate, atol=0.003)
        np.testing.assert_allclose(((a == 0) & (b == 0)).mean(), rate**2, atol=0.003)
        # neighbours in a row and in a column are independent
        np.testing.assert_allclose(((a[:, 1:] == 0) & (a[:, :-1] == 0)).mean(), rate**2, atol=0.003)
        np.testing.assert_allclose(((a[1:] == 0) & (a[:-1] == 0)).mean(), rate**2, atol=0.003)
    assert dropout(x, 0.5, None) is x
