"""The recommender trainer: it learns, it resumes exactly, PAD stays zero, batches cover everything once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from models.recsys import (
    TRM,
    GRU4Rec,
    GRU4RecConfig,
    Popularity,
    Recommender,
    SASRec,
    SASRecConfig,
    TRMConfig,
    get_params,
    phrase_mixer,
)
from rl import recommender
from rl.recommender import RecommenderConfig, fit, init_state

ITEMS, LENGTH = 10, 8
CYCLE = np.array([3, 7, 1, 9, 5, 10, 2, 8, 4, 6])
FOLLOWS = dict(zip(CYCLE.tolist(), np.roll(CYCLE, -1).tolist(), strict=True))


def _prefix_samples(sequences=20):
    rng = np.random.default_rng(0)
    starts, lengths = rng.integers(0, ITEMS, sequences * 5), rng.integers(1, LENGTH + 1, sequences * 5)
    steps = np.arange(LENGTH)
    history = np.where(steps < lengths[:, None], CYCLE[(starts[:, None] + steps) % ITEMS], 0).astype(np.int32)
    targets = CYCLE[(starts + lengths) % ITEMS].astype(np.int32)
    return {"history": history, "lengths": lengths.astype(np.int32), "targets": targets}


def _windows(sequences=20):
    rows = CYCLE[(np.arange(sequences)[:, None] + np.arange(LENGTH + 1)) % ITEMS].astype(np.int32)
    return {"items": rows[:, :-1], "targets": rows[:, 1:]}


def _sasrec(form="recbole", rate=0.1):
    config = SASRecConfig(ITEMS, LENGTH, 16, 2, 2, 32, dropout=rate, attention_dropout=rate, form=form)
    return SASRec(config, rngs=nnx.Rngs(0))


def _gru():
    return GRU4Rec(GRU4RecConfig(ITEMS, LENGTH, 16, 24, dropout=0.1), rngs=nnx.Rngs(0))


def _trm(**sizes):
    config = TRMConfig(ITEMS, LENGTH, 16, 16, 1, 2, 32, dropout=0.1, experts=2, **sizes)
    return TRM(config, np.random.default_rng(0).normal(size=(ITEMS + 1, 16)), rngs=nnx.Rngs(0))


def _recall1(module, data=None, exclude_history=False):
    data = _prefix_samples() if data is None else data
    top = Recommender(module).recommend(data["history"], data["lengths"], k=1, exclude_history=exclude_history)[0][:, 0]
    return float((top == data["targets"]).mean())


def _config(**changes):
    return RecommenderConfig(**({"lr": 1e-2, "batch_size": 32, "epochs": 60, "seed": 0, "length_buckets": 1} | changes))


def _equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (_sasrec, {}),
        (_sasrec, {"form": "all", "epochs": 120}),
        (lambda: _sasrec("paper", rate=0.0), {"form": "all", "loss": "bce", "epochs": 200, "beta2": 0.98}),
        (lambda: _sasrec(rate=0.0), {"loss": "bpr", "epochs": 100}),
        (_gru, {}),
        (_gru, {"form": "all", "epochs": 120}),
        (_trm, {"epochs": 100}),
    ],
    ids=["sasrec", "sasrec-all", "sasrec-paper-bce", "sasrec-bpr", "gru4rec", "gru4rec-all", "trm"],
)
def test_learns_a_cycle_by_heart(make, changes):
    data = _windows() if changes.get("form") == "all" else _prefix_samples()
    result = fit(make(), data, _config(**changes))
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    # sampled losses never push history items down (they are no negatives), so those are left out of the list
    assert _recall1(result.module, exclude_history=changes.get("loss", "ce") != "ce") == 1.0


def test_popularity_cannot_learn_the_cycle_and_shuffled_histories_hurt():
    data = _prefix_samples()
    scores = Popularity.fit(data["targets"], ITEMS).scores(data["history"], data["lengths"])
    assert (scores.argmax(1) == data["targets"]).mean() < 0.3
    trained = fit(_sasrec(), data, _config()).module
    rng = np.random.default_rng(1)
    shuffled = data | {"history": data["history"].copy()}
    for row, length in zip(shuffled["history"], data["lengths"], strict=True):
        row[:length] = rng.permutation(row[:length])
    assert _recall1(trained, shuffled) < 0.7 < _recall1(trained, data)


@pytest.mark.parametrize("make", [_sasrec, _gru, _trm], ids=["sasrec", "gru4rec", "trm"])
def test_the_pad_row_stays_exactly_zero(make):
    seen = []

    def look(_, state):
        seen.append(np.abs(state["params"]["items"][0]).max())
        assert np.abs(state["params"]["items"][1:]).max() > 0

    module = make()
    result = fit(module, _prefix_samples(), _config(epochs=3, weight_decay=0.1), on_epoch=look)
    assert seen == [0.0] * 3
    if isinstance(module, TRM):
        assert not np.asarray(result.module.adapted_items()[0]).any()
        np.testing.assert_array_equal(result.module.item_text[...], module.item_text[...])  # frozen


def test_resume_equals_the_uninterrupted_run():
    data, config = _prefix_samples(), _config(epochs=6, patience=4)
    scores = iter([0.1, 0.5, 0.3, 0.2, 0.6, 0.4] * 2)

    def evaluate(module):
        return {"ndcg@10": next(scores)}

    states = {}
    whole = fit(_sasrec(), data, config, evaluate=evaluate, on_epoch=lambda epoch, state: states.update({epoch: state}))
    for _ in range(3):
        next(scores)
    resumed = fit(_sasrec(), data, config, evaluate=evaluate, state=states[3])
    for name in ("params", "opt", "best"):
        _equal(whole.state[name], resumed.state[name])
    np.testing.assert_array_equal(whole.state["score"], resumed.state["score"])
    np.testing.assert_array_equal(whole.state["loss"], resumed.state["loss"])
    assert whole.best_epoch == resumed.best_epoch == 4
    assert jax.tree.structure(init_state(_sasrec(), config)) == jax.tree.structure(states[3])
    # a shorter run is a prefix of a longer one
    short = fit(_sasrec(), data, _config(epochs=3))
    _equal(short.state["params"], states[3]["params"])
    longer = fit(_sasrec(), data, _config(epochs=6), state=short.state)
    _equal(longer.state["params"], whole.state["params"])


def test_early_stopping_keeps_the_best_weights():
    kept, scores = [], iter([0.2, 0.4, 0.3, 0.4, 0.1, 0.9])
    before = get_params(module := _sasrec())
    before = {name: np.array(x) for name, x in before.items()}

    def evaluate(module):
        kept.append({name: np.array(x) for name, x in get_params(module).items()})
        return {"ndcg@10": next(scores), "recall@10": 0.0}

    records = []
    config = _config(epochs=50, patience=3)
    result = fit(module, _prefix_samples(), config, evaluate=evaluate, progress=records.append)
    assert len(result.history) == len(kept) == 5  # an equal score is no improvement
    assert (result.best_epoch, round(result.best_score, 6)) == (1, 0.4)
    _equal(kept[1], get_params(result.module))
    _equal(before, get_params(module))  # the given module is untouched
    assert set(records[0]) == {"epoch", "loss", "seconds", "ndcg@10", "recall@10"}
    assert fit(module, _prefix_samples(), config, evaluate=evaluate, state=result.state).history == result.history


def test_length_buckets_chunks_and_devices_do_not_change_the_result():
    data = _prefix_samples()
    base = {"batch_size": 128, "epochs": 3, "lr": 1e-3}
    want = fit(_sasrec(rate=0.0), data, _config(**base, length_buckets=1))
    devices = Mesh(np.array(jax.devices()[:8]), ("data",))
    others = {
        "buckets": fit(_sasrec(rate=0.0), data, _config(**base, length_buckets=3)),
        "chunks": fit(_sasrec(rate=0.0), data, _config(**base, length_buckets=1, score_budget=200)),
        "mesh": fit(_sasrec(rate=0.0), data, _config(**base, length_buckets=1), mesh=devices),
    }
    for got in others.values():
        np.testing.assert_allclose(
            [r["loss"] for r in got.history], [r["loss"] for r in want.history], rtol=1e-5, atol=1e-5
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got.state["params"], want.state["params"]
        )


def test_one_compilation_serves_all_epochs():
    before = recommender._epoch._cache_size()
    fit(_sasrec(rate=0.3), _prefix_samples(), _config(epochs=4))
    assert recommender._epoch._cache_size() == before + 1


def test_batches_hold_every_sample_once_and_every_length():
    data, config = _prefix_samples(), _config(batch_size=16, length_buckets=3)
    plan = recommender._plan(_sasrec(), data, config, 1)
    assert plan.widths == (3, 6, 8)
    used = []
    for members, quota, width in zip(plan.members, plan.quotas, plan.widths, strict=True):
        index, weight = recommender._shuffled(jax.random.key(0), jnp.asarray(members), quota, plan.steps)
        assert index.shape == (plan.steps, quota)
        rows = np.asarray(index)[np.asarray(weight) > 0]
        used.append(rows)
        assert (data["lengths"][rows] <= width).all()
        assert np.ptp(np.asarray(weight).sum(1)) <= 1  # the share of a bucket is the same in every batch
    np.testing.assert_array_equal(np.sort(np.concatenate(used)), np.arange(len(data["targets"])))


def test_trm_learns_to_use_the_preference_text():
    """Histories say nothing here; the text names the target's phrase."""
    rng = np.random.default_rng(0)
    phrases = [()] + [(f"kind {i}",) for i in range(ITEMS)]
    mixer = phrase_mixer(phrases, lambda texts: np.eye(16, dtype=np.float32)[: len(texts)], history_only=0.2)
    rows = 400
    data = {
        "history": rng.integers(1, ITEMS + 1, (rows, LENGTH)).astype(np.int32),
        "lengths": np.full(rows, LENGTH, np.int32),
        "targets": rng.integers(1, ITEMS + 1, rows).astype(np.int32),
    }
    trained = Recommender(fit(_trm(), data, _config(epochs=40, batch_size=64), text=mixer).module)
    check = {name: array[:100] for name, array in data.items()}

    def recall(text):
        ids, _ = trained.recommend(check["history"], check["lengths"], text, k=1)
        return (ids[:, 0] == check["targets"]).mean()

    oracle = recall(np.asarray(mixer.oracle(check["targets"])))
    history_only = recall(np.asarray(mixer.from_history(check["history"], check["lengths"])))
    assert oracle > 0.9
    assert history_only < 0.6


def test_text_can_come_as_an_array_or_a_function():
    data = _prefix_samples()
    vectors = np.random.default_rng(0).normal(size=(len(data["targets"]), 16)).astype(np.float32)
    config = _config(epochs=2)
    stored = fit(_trm(), data | {"text": vectors}, config)
    called = fit(_trm(), data | {"other": vectors}, config, text=lambda key, batch: batch["other"])
    without = fit(_trm(), data, config)
    _equal(stored.state["params"], called.state["params"])
    assert np.abs(stored.state["params"]["items"] - without.state["params"]["items"]).max() > 0


def test_seen_table_replaces_the_samples_own_ids():
    data = _prefix_samples() | {"users": np.ones(100, np.int32)}
    seen = np.stack([np.zeros(9), np.arange(1, 10)]).astype(np.int32)  # only item 10 can be a negative
    result = fit(_sasrec(rate=0.0), data, _config(epochs=1, loss="bpr", lr=1e-3), seen=seen)
    assert np.isfinite(result.history[0]["loss"])
    with pytest.raises(ValueError, match="users"):
        fit(_sasrec(), _prefix_samples(), _config(loss="bpr"), seen=seen)


def test_bad_input():
    data = _prefix_samples()
    for changes, text in (({"loss": "mse"}, "loss"), ({"form": "cloze"}, "form"), ({"epochs": 0}, "epochs")):
        with pytest.raises(ValueError, match=text):
            _config(**changes)
    with pytest.raises(ValueError, match=r"TRM can be trained in the forms \('prefix',\)"):
        fit(_trm(), _windows(), _config(form="all"))
    with pytest.raises(ValueError, match=r"missing.*lengths"):
        fit(_sasrec(), {"history": data["history"], "targets": data["targets"]}, _config())
    with pytest.raises(ValueError, match="same, positive number of rows"):
        fit(_sasrec(), data | {"targets": data["targets"][:3]}, _config())
    with pytest.raises(IndexError, match=r"0\.\.10"):
        fit(_sasrec(), data | {"targets": np.concatenate([[0], data["targets"][1:]])}, _config())
    with pytest.raises(IndexError, match="unknown item id 11"):
        fit(_sasrec(), data | {"history": np.where(data["history"] == 3, 11, data["history"])}, _config())
    with pytest.raises(ValueError, match="at least one known item"):
        fit(_sasrec(), data | {"lengths": np.zeros(100, np.int32)}, _config())
    with pytest.raises(ValueError, match="max_len"):
        fit(_sasrec(), data | {"history": np.pad(data["history"], ((0, 0), (0, 1)))}, _config())
    with pytest.raises(ValueError, match="takes no text"):
        fit(_sasrec(), data, _config(), text=lambda key, batch: batch["targets"])
    with pytest.raises(ValueError, match=r"select = 'ndcg@10'"):
        fit(_sasrec(), data, _config(epochs=1), evaluate=lambda module: {"mrr@10": 0.0})
    broken = _sasrec()
    broken.positions[...] = broken.positions[...] * np.nan
    with pytest.raises(FloatingPointError, match="lower lr"):
        fit(broken, data, _config(epochs=1))
