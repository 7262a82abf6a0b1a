"""Tasks: texts, examples, which events are prompts, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxrec.config import resolve_config
from jaxrec.data.interactions import PAD, Interactions
from jaxrec.data.recommendation import config_task, files_task, make_task, prepare


def interactions(sequences, titles, categories, ratings=None) -> Interactions:
    users = np.concatenate([[u + 1] * len(s) for u, s in enumerate(sequences)]).astype(np.int32)
    items = np.concatenate(sequences).astype(np.int32)
    return Interactions(
        users=users, items=items, times=np.arange(len(items), dtype=np.int64),
        ratings=None if ratings is None else np.asarray(ratings, np.float32),
        user_tokens=np.array([PAD, *(f"u{i + 1}" for i in range(len(sequences)))]),
        item_tokens=np.array([PAD, *(f"i{i + 1}" for i in range(len(titles)))]),
        titles=("", *titles), categories=("", *categories), report={},
    )  # fmt: skip


SEQUENCES = ([1, 2, 3, 4, 5], [2, 1, 4, 3], [5, 4, 3, 2, 1], [1, 3, 5])
TITLES = ("Brass (1994)", "Comet", "Delta. Two", "Ember (2001)", "Fjord")
CATEGORIES = ("dark, cold", "warm calm", "", "dark", "old;new")


@pytest.fixture(scope="module")
def task():
    return make_task("toy", interactions(SEQUENCES, TITLES, CATEGORIES), max_len=3, text_dim=8)


def test_phrases_split_at_commas_or_else_blanks_and_fall_back_to_the_title(task):
    assert task.phrases == ((), ("dark", "cold"), ("warm", "calm"), ("Delta.", "Two"), ("dark",), ("old", "new"))
    assert task.vocabulary == tuple(sorted({"dark", "cold", "warm", "calm", "Delta.", "Two", "old", "new"}))
    assert task.catalogue.categories[1] == "dark cold"
    assert task.item_text.shape == (6, 8)
    assert not task.item_text[0].any()
    np.testing.assert_allclose(np.linalg.norm(task.item_text[1:], axis=1), 1.0, atol=1e-5)


def test_examples_follow_the_split(task):
    (first, *_) = task.examples("test")
    assert (first.index, first.history, first.target) == (0, (2, 3, 4), 5)  # max_len keeps the last three
    assert [e.target for e in task.examples("valid")] == [4, 4, 2]  # three events give no validation target
    assert [(e.history, e.target) for e in task.examples("train")][:2] == [((1,), 2), ((1, 2), 3)]
    for e in task.examples("train"):
        assert e.target not in e.history


def test_a_limit_draws_rows_by_seed_and_keeps_their_order(task):
    everyone = task.examples("test")
    some = task.examples("test", 2, seed=3)
    assert some == task.examples("test", 2, seed=3)
    assert [e.index for e in some] == sorted(e.index for e in some)
    assert all(everyone[e.index] == e for e in some)
    assert task.examples("test", 10) == everyone
    assert len({tuple(e.index for e in task.examples("test", 2, seed=s)) for s in range(20)}) > 1


def test_prompt_rows_are_each_users_last_training_targets(task):
    samples = task.split.samples("train", 3)
    every = task.prompt_rows(0)
    np.testing.assert_array_equal(every, np.arange(len(samples)))
    rows = task.prompt_rows(1)
    # users 1 and 3 train on their first three events, users 2 and 4 on two
    assert {int(samples.users[r]): int(samples.targets[r]) for r in rows} == {1: 3, 2: 1, 3: 3, 4: 3}
    assert set(task.prompt_rows(2)) == set(every.tolist())
    for user in np.unique(samples.users):
        own = np.flatnonzero(samples.users == user)
        assert set(rows) & set(own) == {own.max()}
    for part in ("valid", "test"):
        held = task.split.samples(part, 3)
        pairs = set(zip(held.users.tolist(), held.targets.tolist(), strict=True))
        assert not pairs & set(zip(samples.users[rows].tolist(), samples.targets[rows].tolist(), strict=True))


def test_prepare_filters_names_and_counts():
    inter = interactions(
        ([1, 2, 3, 4], [1, 2, 4, 3], [2, 1, 4]), ("Comet (1987)", "comet  (1987)", "", "Ember"), ("a", "b", "c", "d"),
        ratings=[5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 1],
    )  # fmt: skip
    done = prepare(inter, min_rating=2.0, decades=True)
    assert done.report["below_minimum_rating"] == 1
    assert done.report["items_without_title"] == 1
    assert done.report["titles_disambiguated"] == 1
    assert done.titles == ("", "Comet (1987)", "comet  (1987) [i2]", "Ember")
    assert done.categories == ("", "1980s, a", "1980s, b", "d")
    assert len(prepare(inter, k_user=3, k_item=3).user_tokens) == 4


def test_titles_that_cannot_name_one_item_are_refused():
    with pytest.raises(ValueError, match=r"1 titles name two items: 'comet ' \(items 1 and 2\)"):
        make_task("toy", interactions(SEQUENCES, ("Comet", "comet ", *TITLES[2:]), CATEGORIES), max_len=3, text_dim=8)
    with pytest.raises(ValueError, match="item 2 has no title"):
        make_task("toy", interactions(SEQUENCES, ("Comet", " ", *TITLES[2:]), CATEGORIES), max_len=3, text_dim=8)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["data.source=word"], ValueError, "data.source='word': choose 'world' or 'files'"),
        (["data.source=files"], ValueError, "needs the folder of the files: --config.data.path=FOLDER"),
        (["data.source=files", "data.path=/nowhere/at/all"], FileNotFoundError, "/nowhere/at/all does not exist"),
        (["data.source=files", "data.path=/tmp", "data.kind=atomc"], ValueError, "unknown kind 'atomc'"),
        (["data.scale=tinny"], ValueError, "unknown world scale 'tinny'"),
    ],
)
def test_sources_that_do_not_exist(overrides, error, message):
    chosen = resolve_config("deeprec:tiny", [f"--config.{o}" for o in overrides])
    with pytest.raises(error, match=message):
        config_task(chosen.data, chosen.text, 0)


def test_files_become_a_task(tmp_path: Path):
    lines = [f"u{u}\ti{i}\t5\t{n}" for n, (u, i) in enumerate((u, i) for u in range(4) for i in (u, u + 1, u + 2, 9))]
    (tmp_path / "toy.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + "\n".join(lines) + "\n"
    )
    rows = [f"i{i}\tTitle {i}\tnoir tale" for i in range(10)]
    (tmp_path / "toy.item").write_text("item_id:token\ttitle:token_seq\tclass:token_seq\n" + "\n".join(rows) + "\n")
    task = files_task(str(tmp_path), max_len=5, text_dim=8, min_rating=4.0)
    assert len(task.catalogue) == 7  # six of the sliding windows and the one that all share; never touched ones go
    assert task.phrases[1] == ("noir", "tale")
    assert task.kinds is None
    assert {task.catalogue.titles[e.target] for e in task.examples("test")} == {"Title 9"}


def test_the_world_labels_its_held_out_events():
    chosen = resolve_config("deeprec:tiny", ["--config.data.world.users=40"])
    task = config_task(chosen.data, chosen.text, 0)
    assert task.kinds.keys() == {"valid", "test"}
    assert len(task.kinds["test"]) == len(task.examples("test")) == 40
    again = config_task(chosen.data, chosen.text, 0)
    assert again.examples("test") == task.examples("test")
    assert config_task(chosen.data, chosen.text, 1).examples("test") != task.examples("test")
