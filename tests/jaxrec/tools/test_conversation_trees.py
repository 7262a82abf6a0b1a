"""Finished searches over conversations: what fewer beams or levels would have given, and resuming from a file."""

import collections
import dataclasses
import json

import pytest

from jaxrec.data.dialogues import USER, Turn
from jaxrec.tools.conversation_search import replay, search
from jaxrec.tools.conversation_trees import read_counts, search_all, tree_key
from tests.jaxrec.tools.players import CONFIG, SMALL, Drawn, Judge, Partly, Speechless, dialogue, level, one


def test_a_replay_of_fewer_levels_is_the_search_itself():
    tree = one(CONFIG)
    for depth in range(1, 6):
        config = dataclasses.replace(CONFIG, depth=depth, init=16)
        assert replay(tree, depth=depth) == one(config)
        assert len(replay(tree, depth=depth).final) == 4


def test_a_replay_of_fewer_beams_is_the_search_itself_where_all_parents_are_there():
    config = dataclasses.replace(CONFIG, depth=4)
    dialogues = [dialogue(i) for i in range(24)]
    large = search(dialogues, Drawn(), Judge(), config)
    exact = 0
    for beams in (1, 2, 3):
        small = search(dialogues, Drawn(), Judge(), dataclasses.replace(config, beams=beams, init=16))
        for tree, fresh in zip(large, small):
            again = replay(tree, beams=beams)
            if again.unexpanded == 0:
                assert again == fresh
                exact += 1
            else:
                assert again.costs().lists < fresh.costs().lists
                assert {node.path for node in again.nodes} < {node.path for node in tree.nodes}
    assert 20 < exact < 72  # both kinds are there
    assert replay(large[0], beams=4) == dataclasses.replace(
        large[0], config=dataclasses.replace(config, init=16)
    )  # fmt: skip


def test_a_replay_as_released_keeps_all_lists_and_selects_by_level():
    tree = one(CONFIG)
    again = replay(tree, beams=2, depth=3, released=True)
    assert [node.path for node in again.nodes] == [node.path for node in tree.nodes if node.depth <= 3]
    for depth in (1, 2, 3):
        best = sorted(level(tree, depth), key=lambda node: -node.reward)[:2]
        assert {node.path for node in level(again, depth) if node.kept} == {node.path for node in best}


@pytest.mark.filterwarnings("ignore:1 of 1 searches")
def test_a_replay_counts_only_what_would_have_been_skipped():
    tree = one(dataclasses.replace(SMALL, allow_shrink=True), user=Speechless(2))
    again = replay(tree, depth=2)
    assert [len(path) for path in again.skipped] == [2, 2]
    assert again.costs().critiques == 4
    best = max(level(tree, 1), key=lambda node: node.reward).path
    assert [path for path in replay(tree, beams=1).skipped if len(path) == 2] == [(*best, 0)]


def test_a_replay_holds_no_more_than_its_tree():
    with pytest.raises(ValueError, match="2 beams and 3 levels holds none of 3 and 3"):
        replay(one(SMALL), beams=3)
    with pytest.raises(ValueError, match="holds none of 2 and 4"):
        replay(one(SMALL), depth=4)
    with pytest.raises(ValueError, match="patience=1"):
        replay(one(dataclasses.replace(SMALL, patience=1)), beams=1)


def test_a_search_that_is_killed_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "new" / "trees.jsonl"
    dialogues = [dialogue(i) for i in range(5)]
    whole = search(dialogues, Drawn(), Partly(), SMALL)

    class Killed(Drawn):
        def recommend(self, asks):
            if len(self.calls) == 4:  # in the second batch
                raise KeyboardInterrupt
            return super().recommend(asks)

    with pytest.raises(KeyboardInterrupt):
        search_all(dialogues, Killed(), Partly(), SMALL, path, batch=2)
    with open(path, "ab") as file:
        file.write(path.read_bytes()[:100])  # a line that was cut short
    crs = Drawn()
    trees = search_all(dialogues[::-1], crs, Partly(), SMALL, path, batch=2)
    assert {ask.dialogue.id for ask in crs.asks} == {"d2", "d3", "d4"}
    assert repr(trees[::-1]) == repr(whole)  # NaN scores are not equal to themselves
    assert any(tree.costs().unscored for tree in whole)
    assert len(path.read_text().splitlines()) == 5
    assert repr(search_all(dialogues, None, None, SMALL, path)) == repr(whole)  # nothing is left to ask


def test_counts_of_a_search_that_is_killed_are_those_of_its_trees(tmp_path):
    """What the batch that was killed counted is counted once, when it is searched again."""

    class Counting(Drawn):
        def __init__(self, most=100):
            super().__init__()
            self.most, self.counts = most, collections.Counter({"before": 3})

        def recommend(self, asks):
            if len(self.calls) == self.most:
                raise KeyboardInterrupt
            self.counts.update({"lists": len(asks), "levels": 1})
            return super().recommend(asks)

    path, dialogues = tmp_path / "trees.jsonl", [dialogue(i) for i in range(5)]
    keys = [tree_key(own, SMALL) for own in dialogues]
    assert read_counts(path, keys) == {}
    with pytest.raises(KeyboardInterrupt):
        search_all(dialogues, Counting(4), Judge(), SMALL, path, batch=2)
    assert read_counts(path, keys) == {"recommender": {"lists": 2 * 12, "levels": 3}}
    search_all(dialogues, Counting(), Judge(), SMALL, path, batch=2)
    whole = {"recommender": {"lists": 5 * 12, "levels": 3 * 3}}
    assert read_counts(path, keys) == whole
    search_all(dialogues, Counting(), Judge(), SMALL, path, batch=2)
    assert read_counts(path, keys) == whole
    assert read_counts(path, [tree_key(dialogue(9), SMALL)]) == {}


def test_trees_of_another_search_are_not_taken(tmp_path):
    path, dialogues = tmp_path / "trees.jsonl", [dialogue(0), dialogue(1)]
    first = search_all(dialogues, Drawn(), Judge(), SMALL, path)
    other = dialogue(0), dataclasses.replace(dialogue(1), turns=(Turn(USER, "something else?"),))
    for some, config, players, new in (
        (dialogues, dataclasses.replace(SMALL, seed=1), "", {"d0", "d1"}),
        (dialogues, SMALL, "another user", {"d0", "d1"}),
        (other, SMALL, "", {"d1"}),
        (dialogues, SMALL, "", set()),
    ):
        crs = Drawn()
        trees = search_all(some, crs, Judge(), config, path, players=players)
        assert {ask.dialogue.id for ask in crs.asks} == new
        assert [tree.config for tree in trees] == [config] * 2
    assert trees == first


@pytest.mark.parametrize("change", ["{", '{"key": 3}', "scores", "nodes"])
def test_lines_that_are_no_trees_are_named(tmp_path, change):
    path = tmp_path / "trees.jsonl"
    search_all([dialogue()], Drawn(), Judge(), SMALL, path)
    entry = json.loads(path.read_text())
    if change == "scores":
        entry["nodes"][0]["scores"].pop()
    elif change == "nodes":
        entry["nodes"] = []
    line = {"{": "{", '{"key": 3}': "[1]"}.get(change) or json.dumps(entry)
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"trees.jsonl:1 holds no search tree .*; delete that line"):
        search_all([dialogue()], Drawn(), Judge(), SMALL, path)
