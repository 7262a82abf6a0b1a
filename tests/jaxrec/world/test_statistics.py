"""Statistics of a data set against counting by hand, and the recipe that prints them."""

import json

import numpy as np
import pytest

from jaxrec.cli import main
from jaxrec.data.atomic import save_atomic
from jaxrec.data.interactions import PAD, Interactions
from jaxrec.world import INTENT, generate, world_config
from jaxrec.world.conversations import Conversations, TalkConfig
from jaxrec.world.interactions import to_interactions
from jaxrec.world.statistics import (
    describe,
    describe_conversations,
    describe_world,
    floors,
    gini,
    intent_candidates,
    statistics_table,
)


@pytest.fixture(scope="module")
def world():
    return generate(world_config("tiny"))


def test_gini_by_hand():
    assert gini(np.array([3, 3, 3])) == pytest.approx(0)
    assert gini(np.array([0, 0, 0, 8])) == pytest.approx(3 / 4)
    assert gini(np.array([1, 3])) == pytest.approx(1 / 4)
    with pytest.raises(ValueError, match="not all 0"):
        gini(np.zeros(3))


def test_candidates_equal_a_search_through_the_catalogue(world):
    found, expected = intent_candidates(world), []
    for i in np.flatnonzero(world.kind == INTENT):
        fits = np.ones(world.num_items + 1, bool)
        fits[0] = False
        for attribute, offset, shift in world.config.rules[world.rule[i]]:
            values = world.attributes[attribute]
            fits &= values == values[world.items[i - offset]] + shift
        first = np.searchsorted(world.users, world.users[i])
        fits[world.items[first:i]] = False
        fits[0] = False
        expected.append(int(fits.sum()))
    assert min(expected) >= 1
    np.testing.assert_array_equal(found, expected)


def small() -> Interactions:
    users = np.array([1, 1, 1, 2, 2, 2, 2], np.int32)
    items = np.array([1, 2, 3, 1, 2, 3, 1], np.int32)
    return Interactions(
        users, items, np.arange(7, dtype=np.int64), None, np.array([PAD, "a", "b"]), np.array([PAD, "x", "y", "z"]),
        ("", "X", "Y", "Z"), ("",) * 4,
    )  # fmt: skip


def test_counts_by_hand():
    values = describe(small(), "small", with_floors=False).values
    assert (values["users"], values["items"], values["events"]) == (2, 3, 7)
    assert values["events per user, fewest"] == 3
    assert values["events per user, most"] == 4
    assert values["events per user, median"] == 3.5
    assert values["events per item, most"] == 3
    assert values["share of all pairs that are events"] == pytest.approx(7 / 6)
    assert values["events that repeat an earlier pair"] == pytest.approx(1 / 7)


def test_floors_know_the_kinds(world):
    measured = floors(to_interactions(world), world=world)
    assert set(measured) == {"popularity", "Markov"}
    for metrics in measured.values():
        assert {"recall@10", "recall@10_intent", "recall@10_taste", "recall@10_noise"} <= set(metrics)
        assert all(0 <= value <= 1 for value in metrics.values())


def test_shares_and_candidates_of_a_world(world):
    each = describe_world(world, with_floors=False)
    total = sum(each.values[f"{kind} events"] for kind in ("taste", "intent", "noise"))
    assert total == pytest.approx(1)
    off = describe_world(generate(world_config("tiny", intent_share=0.0)), with_floors=False)
    assert off.candidates is None
    assert off.values["intent events"] == 0
    table = statistics_table([each, off])
    assert table.row_count == len(each.values)
    assert len(table.columns) == 3


def test_conversations_by_counting(world):
    """Against a walk through the catalogue that knows attributes by their names alone."""
    talks = Conversations(world, 3, TalkConfig(wishes=3, avoid=0.6))
    found = describe_conversations(talks, {"train": 40, "valid": 0, "test": 9})
    assert list(found) == ["train", "test"]
    for split, count in (("train", 40), ("test", 9)):
        part, fitting, nearly, unwanted, own = talks.sample(split, count), [], [], 0, found[split]
        for instance in part:
            wishes = talks.stated(instance.dialogue)
            unwanted += any(not wish.wanted for wish in wishes)
            missed = [
                sum((known[w.attribute][0] == w.value) != w.wanted for w in wishes)
                for known in talks.catalogue.attributes
            ]
            assert missed[instance.labels[0]] == 0
            fitting.append(missed.count(0))
            nearly.append(missed.count(1))
        assert own["conversations"] == count
        assert own["conversations that say what is not wanted"] == unwanted / count
        assert own["wishes, mean"] == 3 + unwanted / count
        assert (
            own["turns, mean"] == np.mean([len(i.dialogue.turns) for i in part]) == 2 * own["turns of the seeker, mean"]
        )
        assert own["different targets"] == len({i.labels for i in part})
        assert own["share of all items that are a target"] == own["different targets"] / 64
        for name, counts in (("all wishes", fitting), ("all wishes but one", nearly)):
            assert own[f"items that meet {name}, fewest"] == min(counts)
            assert own[f"items that meet {name}, median"] == np.median(counts)
            assert own[f"items that meet {name}, most"] == max(counts)
        blind = np.mean([min(10 / n, 1) for n in fitting])
        assert own["recall@10 of a blind draw among those that meet all"] == pytest.approx(blind)
    assert found["train"]["items that may be a target"] == 64 - 6 - 13
    assert sum(talks.items[split].size for split in talks.items) == 64


def test_the_recipe_sets_real_data_beside_the_world(world, tmp_path, capsys):
    real = to_interactions(generate(world_config("tiny", seed=5)))
    save_atomic(real, tmp_path / "other", "other")
    workdir = tmp_path / "run"
    code = main(
        ["run", "--config=world:tiny", f"--workdir={workdir}", f"--config.compare={tmp_path / 'other'}"]
    )  # fmt: skip
    out = capsys.readouterr()
    assert code == 0, out.err
    assert "popularity Gini" in out.out
    result = json.loads((workdir / "result.json").read_text())
    assert [row["name"].split(": ")[1] for row in result["rows"]] == ["popularity", "Markov"] * 2
    described = json.loads((workdir / "statistics.json").read_text())
    assert [list(each["conversations"]) for each in described] == [["train", "valid", "test"], []]
    assert "items that meet all wishes but one, median" in out.out
    statistics, talks = result["tables"]
    assert [table["title"] for table in (statistics, talks)] == ["Statistics", "Conversations"]
    assert talks["rows"][0] == {"name": "conversations", "train": 24, "valid": 4, "test": 4}
    items = next(row for row in talks["rows"] if row["name"] == "items that meet all wishes, fewest")
    assert all(type(items[split]) is int for split in ("train", "valid", "test"))
    page = (workdir / "report.html").read_text()
    assert "items that meet all wishes but one, median" in page
    assert "popularity Gini" in page
    assert (workdir / "statistics.png").read_bytes().startswith(b"\x89PNG")
    assert (workdir / "report.html").is_file()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.scale=enormous", "tiny, demo, full, talk, huge"),
        ("--config.world.num_rules=9", "between 0 and 4"),
        ("--config.world.intent_share=2.0", "between 0 and 1"),
        ("--config.compare=/nowhere", "/nowhere"),
        ("--config.conversations.valid=-1", "conversations.valid=-1 must not be negative"),
        ("--config.conversations.wishes=9", "conversations: wishes=9 must lie between 1 and 5"),
    ],
)
def test_bad_settings(override, message, tmp_path, capsys):
    assert main(["run", "--config=world:tiny", f"--workdir={tmp_path / 'run'}", "--config.floors=False", override]) > 0
    assert message in capsys.readouterr().err


def test_too_much_to_rank_is_said(world, monkeypatch):
    monkeypatch.setattr("jaxrec.world.statistics._LARGEST", 10)
    with pytest.raises(ValueError, match=r"--config\.floors=False"):
        floors(to_interactions(world))


@pytest.mark.real_data
def test_movielens_beside_the_world(ml100k):
    from jaxrec.data.sources import load_interactions

    each = describe(load_interactions(ml100k), "ml-100k")
    assert (each.values["users"], each.values["items"], each.values["events"]) == (943, 1682, 100_000)
    assert each.floors["Markov"]["recall@10"] > each.floors["popularity"]["recall@10"] > 0.02
