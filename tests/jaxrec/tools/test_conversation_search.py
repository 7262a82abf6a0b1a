"""Beam search over conversations (arXiv 2504.20458): shape and costs of trees, what is asked and kept, resuming."""

import dataclasses
import math
import random
from collections import Counter

import pytest

from jaxrec.data.dialogues import SYSTEM, USER, Dialogue, Turn, instances
from jaxrec.data.item_catalogue import ItemCatalogue
from jaxrec.tools.conversation import Reply
from jaxrec.tools.conversation_search import SHORT, Costs, SearchConfig, search
from jaxrec.tools.conversation_trees import search_all
from tests.jaxrec.tools.players import CONFIG, SMALL, Drawn, Judge, K, Partly, Speechless, dialogue, level, one


def test_the_default_tree_has_80_nodes_64_critiques_and_4_terminals():
    crs, user = Drawn(), Judge()
    tree = one(CONFIG, crs, user)
    assert [len(level(tree, depth)) for depth in range(1, 6)] == [16] * 5
    assert len(tree.final) == 4
    assert all(node.depth == 5 for node in tree.final)
    assert [sum(node.kept for node in level(tree, depth)) for depth in range(1, 6)] == [4] * 5
    assert [len(call) for call in user.criticised] == [16] * 4
    assert [len(call) for call in crs.calls] == [16] * 5
    distinct = len({item for node in tree.nodes for item in node.items})
    assert tree.costs() == Costs(80, 160, 64, 0, distinct, 0, 0, 80)
    assert CONFIG.lists == 80


@pytest.mark.parametrize(
    ("fields", "levels"),
    [
        ({"beams": 1}, [4] * 5),
        ({"depth": 1}, [16]),
        ({"beams": 2, "expand": 3, "depth": 3}, [9, 6, 6]),
        ({"beams": 1, "expand": 1, "init": 7, "depth": 2}, [7, 1]),
        ({"beams": 3, "expand": 2, "init": 2, "depth": 3, "allow_shrink": True}, [2, 4, 6]),
    ],
)
@pytest.mark.filterwarnings("ignore:1 of 1 searches")
def test_levels(fields, levels):
    config = dataclasses.replace(CONFIG, **fields)
    tree = one(config)
    assert [len(level(tree, depth + 1)) for depth in range(config.depth)] == levels
    assert config.lists == sum(levels) == tree.costs().lists


def test_a_level_is_one_call_to_each_whatever_the_number_of_dialogues():
    crs, user = Drawn(), Judge()
    trees = search([dialogue(i) for i in range(7)], crs, user, SMALL)
    assert [len(call) for call in crs.calls] == [7 * 4] * 3
    assert [len(call) for call in user.criticised] == [7 * 4] * 2
    assert len(user.scored) <= 3
    asked = Counter(pair for call in user.scored for pair in call)
    assert set(asked.values()) == {1}  # an item of a dialogue once
    assert set(asked) == {(tree.dialogue, item) for tree in trees for node in tree.nodes for item in node.items}


def test_an_item_of_seven_nodes_is_scored_once_for_each_dialogue():
    class Fond(Drawn):
        def reply(self, ask):
            return Reply((0, *random.Random(ask.seed).sample(range(1, 60), self.k - 1)))

    user = Judge()
    config = dataclasses.replace(CONFIG, depth=1, init=7)
    trees = search([dialogue(0), dialogue(1)], Fond(), user, config)
    for tree in trees:
        scores = [node.scores[0] for node in tree.nodes]
        assert len(scores) == 7
        assert len(set(scores)) == 1
    assert trees[0].nodes[0].scores[0] != trees[1].nodes[0].scores[0]
    assert Counter(pair for call in user.scored for pair in call if pair[1] == 0) == {("d0", 0): 1, ("d1", 0): 1}


def test_nothing_depends_on_the_other_dialogues_their_order_or_the_run():
    dialogues = [dialogue(i) for i in range(5)]
    whole = search(dialogues, Drawn(), Judge(), SMALL)
    shuffled = [dialogues[i] for i in (3, 0, 4, 2, 1)]
    again = {tree.dialogue: tree for tree in search(shuffled, Drawn(), Judge(), SMALL)}
    assert [again[d.id] for d in dialogues] == whole
    assert [search([d], Drawn(), Judge(), SMALL)[0] for d in dialogues] == whole
    assert search(dialogues, Drawn(), Judge(), dataclasses.replace(SMALL, seed=1)) != whole
    assert len({tree.nodes[0].items for tree in whole}) == 5  # dialogues draw each their own


def test_what_is_asked_of_a_revision():
    crs, user = Drawn(), Judge()
    tree = one(SMALL, crs, user)
    nodes = {node.path: node for node in tree.nodes}
    assert len({ask.seed for ask in crs.asks} | {r.seed for call in user.criticised for r in call}) == 12 + 8
    for node, ask in zip(tree.nodes, crs.asks):
        assert ask.dialogue == dialogue()
        assert ask.name == f"dialogue d0, node {'.'.join(map(str, node.path))}"
        above = [nodes[node.path[:depth]] for depth in range(1, node.depth)]
        assert ask.shown == (above[-1].items if above else ())
        assert (ask.critique, bool(ask.critique)) == (node.critique, bool(above))
        assert list(ask.past) == list(dict.fromkeys(item for earlier in above for item in earlier.items))
        assert all(earlier.kept for earlier in above)
    revised = [node for node in tree.nodes if node.depth > 1]
    for node, request in zip(revised, (r for call in user.criticised for r in call)):
        assert (request.dialogue, request.shown) == (dialogue(), nodes[node.parent].items)
        assert node.critique == f"no, {request.seed}"


def test_rewards_are_compared_over_all_parents():
    class Script(Drawn):
        """One of the first lists leads to the good items, 50 and up."""

        def reply(self, ask):
            if not ask.shown:
                return Reply(
                    tuple(range(ask.seed % 2, 5 + ask.seed % 2)) if ask.name[-2:] != " 2" else (10, 11, 12, 13, 14)
                )
            good = 10 in ask.shown
            return Reply(tuple(random.Random(ask.seed).sample(range(50, 60) if good else range(20, 30), K)))

    class Taste(Judge):
        def value(self, dialogue, item):
            return 0.9 if item >= 50 else 0.5 if item in range(10, 15) else 0.1

    tree = one(dataclasses.replace(CONFIG, depth=2), Script(), Taste())
    assert [node.path for node in level(tree, 1) if node.kept] == [(0,), (1,), (2,), (3,)]  # equal ones: the first
    assert [node.parent for node in tree.final] == [(2,)] * 4


GENRES = ["comedy"] * 20 + ["horror"] * 10


class Obedient(Drawn):
    """Gives comedies unless the critique names another genre."""

    def reply(self, ask):
        wanted = "horror" if "horror" in ask.critique else "comedy"
        known = [item for item, genre in enumerate(GENRES) if genre == wanted]
        return Reply(tuple(random.Random(ask.seed).sample(known, self.k)))


@pytest.mark.parametrize("feedback", ["negative", "none"])
def test_a_critique_reaches_what_resampling_does_not(feedback):
    class Wish(Judge):
        def critique(self, request):
            return "No comedy please, horror."

    crs, user = Obedient(), Wish()
    tree = one(dataclasses.replace(CONFIG, feedback=feedback), crs, user)
    genres = {GENRES[item] for node in level(tree, 2) for item in node.items}
    assert genres == ({"horror"} if feedback == "negative" else {"comedy"})
    if feedback == "none":
        assert not user.criticised
        assert all((ask.shown, ask.critique, ask.past) == ((), "", ()) for ask in crs.asks)
        assert len({ask.seed for ask in crs.asks}) == tree.costs().lists == 80
        assert tree.costs().critiques == 0


def test_labels_are_seen_by_nobody():
    def requests(labels):
        turns = Turn(USER, "Hi"), Turn(SYSTEM, "Hello."), Turn(USER, "A film!"), Turn(SYSTEM, "Try this.", labels)
        (instance,), _ = instances([Dialogue("x", turns)])
        crs, user = Drawn(), Judge()
        search([instance.dialogue], crs, user, SMALL)
        return repr((crs.calls, user.scored, user.criticised))

    assert requests((1, 2)) == requests((33,))


def test_lists_are_different_items_of_the_catalogue_whatever_is_written():
    titles = ["Toy Story (1995)", "Alien (1979)", "Heat (1995)", "Fargo (1996)", "Big"]
    catalogue = ItemCatalogue(titles, [{}] * 5)

    class Sloppy(Drawn):
        def reply(self, ask):
            found = catalogue.match(["Toy Stroy (1995)", "Toy Story (1995)", "heat", "Heat (1995)"])
            return Reply(tuple(match.item for match in found))

    tree = one(dataclasses.replace(SMALL, k=4), Sloppy(4))
    for node in tree.nodes:
        assert len(set(node.items)) == 4
        assert set(node.items) <= set(range(5))
        assert titles[node.items[0]] == "Toy Story (1995)"


@pytest.mark.parametrize("items", [(0, 1, 2), (0, 1, 2, 2, 3)])
def test_lists_of_another_size_are_refused(items):
    class Short(Drawn):
        def reply(self, ask):
            return Reply(items)

    with pytest.raises(ValueError, match=r"node 0: the recommender gave \d items, \d of them different, where k=5"):
        one(SMALL, Short())


@pytest.mark.parametrize(
    ("reward", "expected"), [("relevance", (0.2 + 0.6 + 0.4) / 3), ("relevance-max", 0.6), ("random", None)]
)
def test_rewards(reward, expected):
    class Fixed(Judge):
        def value(self, dialogue, item):
            return {0: 0.2, 1: 0.6, 2: 0.4}[item]

    class Same(Drawn):
        def reply(self, ask):
            return Reply((0, 1, 2))

    config = SearchConfig(beams=1, depth=2, expand=3, k=3, reward=reward)
    tree = one(config, Same(3), Fixed())
    rewards = [node.reward for node in tree.nodes]
    if expected is not None:
        assert rewards == pytest.approx([expected] * 6)
    else:
        assert len(set(rewards)) == 6
        assert all(0 <= reward < 1 for reward in rewards)
    assert [node.scores for node in tree.nodes] == [(0.2, 0.6, 0.4)] * 6


def test_diversity_adds_the_share_of_new_items():
    class Script(Drawn):
        def reply(self, ask):
            return Reply(tuple(range(10)) if not ask.shown else tuple(range(6, 16)))

    class Even(Judge):
        def value(self, dialogue, item):
            return 0.25

    tree = one(SearchConfig(beams=1, depth=2, expand=1, k=10, diversity=0.5), Script(10), Even())
    assert [node.reward for node in tree.nodes] == pytest.approx([0.25 + 0.5 * 1.0, 0.25 + 0.5 * 0.6])


def test_missing_scores_are_left_out_of_the_mean_and_counted():
    class Two(Drawn):
        def reply(self, ask):
            return Reply((0, 1, 2, 3) if ask.name.endswith("node 0") else (10, 11, 13, 4))

    user = Partly()
    tree = one(SearchConfig(beams=1, depth=2, expand=2, k=4), Two(4), user)
    assert [node.reward for node in tree.nodes] == [0.0, 0.5, 0.5, 0.5]
    assert (tree.costs().unscored, tree.costs().unscored_nodes, tree.costs().scored) == (6, 1, 8)
    assert sum(map(len, user.scored)) == 8  # a score that could not be had is not asked for again


@pytest.mark.parametrize("bad", [1.5, -0.1, math.inf])
def test_scores_that_are_none_are_refused(bad):
    class Wrong(Judge):
        def value(self, dialogue, item):
            return bad

    with pytest.raises(ValueError, match=r"dialogue d0: .*\[0, 1\] or NaN"):
        one(SMALL, user=Wrong())


def test_children_without_a_critique_are_skipped_and_counted():
    tree = one(SMALL, user=Speechless(2))
    assert [len(level(tree, depth)) for depth in (1, 2, 3)] == [4, 2, 2]
    assert [len(path) for path in tree.skipped] == [2, 2, 3, 3]
    assert (tree.costs().critiques, tree.costs().empty, tree.short_levels()) == (8, 4, {})
    assert {node.sample for node in tree.nodes if node.depth > 1} == {1}  # others keep their places


def test_too_few_children_are_an_error_or_a_smaller_level():
    with pytest.raises(RuntimeError, match=r"dialogue d0: 1 lists at depth 2 are fewer than 2 beams; 3 of 4"):
        one(SMALL, user=Speechless(4))
    shrink = dataclasses.replace(SMALL, allow_shrink=True)
    tree = one(shrink, user=Speechless(4))
    assert [len(level(tree, depth)) for depth in (1, 2, 3)] == [4, 1, 0]
    assert tree.final == (level(tree, 2)[0],)
    assert tree.short_levels() == {"no critique could be had": 2}
    crs = Drawn()
    tree = one(shrink, crs, Speechless(0))
    assert [len(call) for call in crs.calls] == [4]  # nothing is asked once nothing is left
    assert tree.final == tuple(node for node in tree.nodes if node.kept)
    assert len(tree.final) == 2
    assert tree.short_levels() == {"no critique could be had": 1, "the search had ended": 1}


def test_why_a_level_is_short():
    """By hand: a level of one list has one beam to expand, which gives two lists where three beams were wanted."""
    wide = dataclasses.replace(SMALL, beams=3, allow_shrink=True)

    class Once(Judge):
        def critique(self, request):
            return "no" if len(self.criticised) > 1 or request is self.criticised[0][0] else ""

    tree = one(wide, user=Once())
    assert [len(level(tree, depth)) for depth in (1, 2, 3)] == [4, 1, 2]
    assert tree.short_levels() == {"no critique could be had": 1, "too few lists to revise": 1}
    few = one(dataclasses.replace(wide, init=2, depth=1))
    assert few.short_levels() == {"fewer first lists than beams": 1}
    assert one(SMALL).short_levels() == {}
    still = one(dataclasses.replace(SMALL, patience=1, reward="relevance-max", depth=5), user=Flat())
    assert (still.depth, still.short_levels()) == (2, {})
    assert {reason for tree in (tree, few) for reason in tree.short_levels()} <= set(SHORT)


class Flat(Judge):
    """Likes everything equally, so that rewards never rise."""

    def value(self, dialogue, item):
        return 0.5


def test_one_dialogue_that_ends_does_not_end_the_others():
    class Moody(Judge):
        def critique(self, request):
            return "no" if request.dialogue.id == "d1" else ""

    trees = search(
        [dialogue(0), dialogue(1)], Drawn(), Moody(), dataclasses.replace(SMALL, allow_shrink=True)
    )  # fmt: skip
    assert [tree.depth for tree in trees] == [1, 3]


def test_an_extended_dialogue_holds_the_rounds_before_the_last():
    crs, user = Drawn(), Judge()
    tree = one(dataclasses.replace(SMALL, extend_dialogue=True), crs, user)
    nodes = {node.path: node for node in tree.nodes}
    for node, ask in zip(tree.nodes, crs.asks):
        rounds = []
        for depth in range(2, node.depth):
            shown, revised = nodes[node.path[: depth - 1]], nodes[node.path[:depth]]
            rounds += [Turn(SYSTEM, shown.text, shown.items), Turn(USER, revised.critique)]
        assert ask.dialogue == Dialogue("d0", (*dialogue().turns, *rounds))
    assert {len(ask.dialogue.turns) for ask in crs.asks} == {1, 3}
    assert {len(request.dialogue.turns) for request in user.criticised[-1]} == {3}
    assert user.judged == {dialogue()}  # scores are of the real conversation

    class Silent(Drawn):
        def reply(self, ask):
            return dataclasses.replace(super().reply(ask), text="")

    with pytest.raises(ValueError, match="node 0: extend_dialogue needs a recommender that gives its lists' text"):
        one(dataclasses.replace(SMALL, extend_dialogue=True), Silent())


def test_patience_ends_a_search_whose_best_reward_does_not_rise():
    class Fading(Drawn):
        """Lists of the first three levels get better, then no more."""

        def reply(self, ask):
            start = min(len(ask.past) // K, 2) * 10
            return Reply(tuple(range(start, start + K)))

    class ByItem(Judge):
        def value(self, dialogue, item):
            return item / 100

    config = SearchConfig(beams=1, depth=9, expand=1, k=K)
    assert one(config, Fading(), ByItem()).depth == 9
    stopped = one(dataclasses.replace(config, patience=2), Fading(), ByItem())
    assert stopped.depth == 5  # three levels rise, two do not
    assert len(stopped.final) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beams": 0}, "beams=0 .* at least 1"),
        ({"depth": 0}, "depth=0"),
        ({"expand": 0}, "expand=0"),
        ({"k": 0}, "k=0"),
        ({"k": True}, "k=True"),
        ({"init": -1}, "init=-1"),
        ({"init": 3}, "init=3 lists cannot give 4 beams"),
        ({"patience": -1}, "patience=-1"),
        ({"reward": "joy"}, "'joy' .* relevance, relevance-max, random"),
        ({"feedback": "kind"}, "'kind' .* negative, none"),
        ({"diversity": -1.0}, "diversity=-1.0"),
        ({"diversity": math.nan}, "diversity=nan"),
        ({"feedback": "none", "extend_dialogue": True}, "extend_dialogue needs feedback"),
    ],
)
def test_configs_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SearchConfig(**fields)


def test_dialogues_and_players_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="dialogue d9: at least one turn"):
        search([Dialogue("d9", ())], Drawn(), Judge(), SMALL)
    with pytest.raises(ValueError, match="1 ids of dialogues occur twice, e.g. 'd0'"):  # noqa: RUF043
        search([dialogue(), dialogue()], Drawn(), Judge(), SMALL)
    with pytest.raises(ValueError, match="1 ids of dialogues occur twice"):
        search_all([dialogue(), dialogue()], Drawn(), Judge(), SMALL, tmp_path / "t", batch=1)
    with pytest.raises(ValueError, match="lists of 4 items, but the search has k=5"):
        search([dialogue()], Drawn(4), Judge(), SMALL)
    with pytest.raises(ValueError, match="batch=0"):
        search_all([dialogue()], Drawn(), Judge(), SMALL, tmp_path / "t", batch=0)


@pytest.mark.parametrize("method", ["recommend", "score", "criticise"])
def test_an_answer_too_few_is_refused(method):
    crs, user = Drawn(), Judge()
    player = crs if method == "recommend" else user
    whole = getattr(player, method)
    setattr(player, method, lambda *args: whole(*args)[:-1])
    with pytest.raises(ValueError, match="were asked for"):
        one(SMALL, crs, user)
