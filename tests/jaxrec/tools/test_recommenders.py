"""Training a recommender for a task: what it may see, the search, and folders that are finished or interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxrec.config import resolve_config
from jaxrec.data.recommendation import config_task
from jaxrec.evaluate.ranking import evaluate_ranking
from jaxrec.tools import recommenders
from jaxrec.tools.recommenders import build, scorer, train_recommender
from models.recsys import get_params
from rl.metrics import read_metrics
from rl.recommender import RecommenderConfig

TRAINING = RecommenderConfig(lr=3e-3, batch_size=64, epochs=2, patience=5, seed=1, length_buckets=1)
TRM = {"dim": 8, "layers": 1, "heads": 2, "ffn_dim": 8, "experts": 2}
TEXTS = {"history_only": 0.3, "no_text": 0.25, "max_phrases": 4}
SASREC = {"dim": 8}


@pytest.fixture(scope="module")
def task():
    words = ["data.world.users=60", "data.max_history=8", "text.dim=16"]
    chosen = resolve_config("deeprec:tiny", [f"--config.{w}" for w in words])
    return config_task(chosen.data, chosen.text, 0)


def assert_same(a, b) -> None:
    first, second = get_params(a.module), get_params(b.module)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


class Enough(Exception):
    """Ends a fit before it begins."""


@pytest.fixture
def seen_by_fit(monkeypatch) -> list[dict]:
    """The arrays that every fit was given; none is run."""
    seen: list[dict] = []

    def fit(module, arrays, training, **more):
        seen.append({**arrays, **more})
        raise Enough

    monkeypatch.setattr(recommenders, "fit", fit)
    return seen


@pytest.mark.parametrize("holdout", [0, 1, 2])
def test_held_out_events_never_reach_the_fit(task, seen_by_fit, tmp_path: Path, holdout: int):
    with pytest.raises(Enough):
        train_recommender(
            "trm", task, TRM, TRAINING, tmp_path / "checkpoints" / "trm", texts=TEXTS, exclude_history=True,
            holdout=holdout,
        )  # fmt: skip
    (arrays,) = seen_by_fit
    samples = task.split.samples("train", 8)
    keep = np.ones(len(samples), bool)
    if holdout:
        keep[task.prompt_rows(holdout)] = False
        assert (~keep).sum() == holdout * 60
    for name in ("history", "lengths", "targets"):
        np.testing.assert_array_equal(arrays[name], getattr(samples, name)[keep])
    assert set(arrays) >= {"history", "lengths", "targets", "text"}
    users = samples.users[keep]
    for part in ("valid", "test"):  # no held-out event is a target, and none is in a history
        held = task.split.samples(part, 8)
        for user, target in zip(held.users, held.targets, strict=True):
            own = users == user
            assert target not in arrays["targets"][own]
            assert target not in arrays["history"][own]


def test_a_baseline_is_fitted_without_texts_and_to_all_events(task, seen_by_fit, tmp_path: Path):
    for kind, sizes in (("sasrec", SASREC), ("trm_no_text", TRM)):
        with pytest.raises(Enough):
            train_recommender(kind, task, sizes, TRAINING, tmp_path / "checkpoints" / kind, exclude_history=True)
    for arrays in seen_by_fit:
        assert arrays["text"] is None
        assert len(arrays["targets"]) == len(task.split.samples("train", 8))


def test_the_search_keeps_the_best_on_validation_and_reads_finished_folders_back(task, monkeypatch, tmp_path: Path):
    folder = tmp_path / "checkpoints" / "sasrec"
    how = {"grid": {"dropout": (0.0, 0.6), "lr": (1e-2, 1e-4)}, "exclude_history": True}
    best = train_recommender("sasrec", task, SASREC, TRAINING, folder, **how)
    facts = [json.loads((folder / f"setting{n}" / "done.json").read_text()) for n in range(4)]
    assert [(f["settings"]["dropout"], f["settings"]["lr"]) for f in facts] == [
        (0.0, 1e-2), (0.0, 1e-4), (0.6, 1e-2), (0.6, 1e-4),
    ]  # fmt: skip
    scores = [f["valid"]["ndcg@10"] for f in facts]
    assert best.valid["ndcg@10"] == max(scores)
    assert best.settings == {**SASREC, **facts[int(np.argmax(scores))]["settings"]}
    assert best.seconds == pytest.approx(sum(f["seconds"] for f in facts))
    measured = evaluate_ranking(
        scorer(best.server), task.split, "valid", max_len=8, exclude_history=True, batch_size=1024
    ).metrics  # fmt: skip
    assert measured == best.valid
    assert {r["stage"] for r in read_metrics(tmp_path)} == {f"sasrec/setting{n}" for n in range(4)}

    monkeypatch.setattr(recommenders, "fit", None)  # what is finished must not be fitted again
    again = train_recommender("sasrec", task, SASREC, TRAINING, folder, **how)
    assert (again.valid, again.settings, again.seconds) == (best.valid, best.settings, best.seconds)
    assert_same(again, best)


def test_a_fit_goes_on_from_its_last_epoch(task, monkeypatch, tmp_path: Path):
    def train(folder: Path):
        return train_recommender(
            "trm", task, TRM, TRAINING, folder / "checkpoints" / "trm", texts=TEXTS, exclude_history=True, holdout=1,
            save_every=1,
        )  # fmt: skip

    whole = train(tmp_path / "a")
    real, epochs = recommenders.fit, []

    def interrupted(*arguments, on_epoch, **more):
        def stop(epoch, state):
            on_epoch(epoch, state)
            raise KeyboardInterrupt

        return real(*arguments, on_epoch=stop, **more)

    monkeypatch.setattr(recommenders, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b")

    def counted(*arguments, state, **more):
        epochs.append(int(state["epoch"]))
        return real(*arguments, state=state, **more)

    monkeypatch.setattr(recommenders, "fit", counted)
    resumed = train(tmp_path / "b")
    assert epochs == [1]
    assert resumed.valid == whole.valid
    assert_same(resumed, whole)
    assert [r["step"] for r in read_metrics(tmp_path / "b", "trm")] == [1, 2]

    # Stopped after the last weights were written, before done.json was: nothing is lost.
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    (tmp_path / "c" / "checkpoints" / "trm" / "done.json").unlink()
    finished = train(tmp_path / "c")
    assert epochs == [1, 2]
    assert finished.valid == whole.valid
    assert_same(finished, whole)


def test_build_names_what_it_knows(task):
    with pytest.raises(ValueError, match="unknown recommender 'sasrek'; known: sasrec, gru4rec, trm, trm_no_text"):
        build("sasrek", task, {}, 0)
    assert build("gru4rec", task, {"dim": 8}, 0).max_len == 8
    trm = build("trm_no_text", task, TRM, 0)
    assert (trm.num_items, trm.text_dim) == (64, 16)
