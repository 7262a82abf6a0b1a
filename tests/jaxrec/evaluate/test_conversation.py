"""Ranking of what a search came across, and its metrics: worked figures, ties, and comparisons (arXiv 2504.20458)."""

import dataclasses
import json
import math
import random

import numpy as np
import pytest

from jaxrec.data.dialogues import USER, Dialogue, Instance, Turn
from jaxrec.evaluate.conversation import (
    ARM_RANKINGS,
    KS,
    Ranking,
    arms,
    compare,
    judge,
    label_values,
    pool,
    rank,
    summarize,
)
from jaxrec.tools.conversation import Reply
from jaxrec.tools.conversation_search import Node, SearchConfig, Tree, search

A, B, C, D, X = range(5)
TITLES = "ABCDX"


def node(path, kept=False, reward=None, **scores):
    values = tuple(scores.values())
    reward = sum(values) / len(values) if reward is None else reward
    return Node(path, tuple(map(TITLES.index, scores)), "", "", values, reward, kept)


def tree(*nodes, beams=2, id="d"):
    return Tree(id, SearchConfig(beams=beams, depth=max(n.depth for n in nodes), k=2), nodes)


# The worked example of the ranking.
WORKED = tree(
    node((0,), A=0.9, B=0.2), node((1,), kept=True, A=0.9, C=0.8), node((2,), kept=True, B=0.2, C=0.8, D=0.85)
)  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "order"), [("mean", [A, D, C, B]), ("sum", [A, C, D, B]), ("vote", [A, B, C, D]), ("raw", [A, C])]
)
def test_the_worked_ranking_in_any_order_of_nodes(strategy, order):
    for seed in range(20):
        nodes = random.Random(seed).sample(WORKED.nodes, 3)
        assert rank(dataclasses.replace(WORKED, nodes=tuple(nodes)), TITLES, Ranking(strategy)) == order


def test_the_pool_of_the_worked_example():
    pooled = pool(WORKED)
    assert {TITLES[i]: p.scores for i, p in pooled.items()} == {
        "A": (0.9, 0.9), "B": (0.2, 0.2), "C": (0.8, 0.8), "D": (0.85,),
    }  # fmt: skip
    assert [(pooled[i].depth, pooled[i].position) for i in (A, B, C, D)] == [(1, 0), (1, 1), (1, 1), (1, 2)]


def test_nodes_that_are_ranked():
    deep = tree(
        node((0,), A=0.9, X=0.95), node((1,), kept=True, B=0.5, C=0.4), node((1, 0), kept=True, C=0.4, D=0.1),
        node((1, 1), B=0.5, X=0.95), beams=1,
    )  # fmt: skip
    assert rank(deep, TITLES) == [X, A, B, C, D]  # the first ones stand in pruned nodes alone
    assert rank(deep, TITLES, Ranking(nodes="selected")) == [B, C, D]
    assert rank(deep, TITLES, Ranking(nodes="final")) == [C, D]
    assert rank(deep, TITLES, Ranking("raw")) == [A, X]
    assert rank(deep, TITLES, Ranking("raw", "final")) == [C, D]


def test_ties_go_by_count_then_depth_then_place_then_title():
    scores = {"A": 0.5, "B": 0.5, "C": 0.5, "D": 0.5, "X": 0.5}
    some = lambda names: {name: scores[name] for name in names}  # noqa: E731
    assert rank(tree(node((0,), **some("DX")), node((1,), **some("CX"))), TITLES) == [X, C, D]  # count, then title
    assert rank(tree(node((0,), **some("D")), node((0, 0), **some("C"))), TITLES) == [D, C]  # depth
    assert rank(tree(node((0,), **some("XD")), node((0, 0), **some("CX"))), TITLES) == [X, D, C]  # depth before place
    assert rank(tree(node((0,), **some("DCA"))), TITLES) == [D, C, A]  # place
    assert rank(tree(node((1,), **some("BD")), node((0,), **some("DB"))), TITLES) == [D, B]  # in the first list
    assert rank(tree(node((0,), **some("DB")), node((1,), **some("CA"))), TITLES) == [C, D, A, B]
    titles = ["z", "y", "x", "w", "v"]
    assert rank(tree(node((0,), **some("A")), node((1,), **some("B"))), titles) == [B, A]  # titles, not numbers


def test_the_mean_of_equal_scores_is_their_score():
    for value in (0.1, 0.3, 0.7, 1 / 3):
        for count in range(2, 12):
            many = [node((number,), A=value, B=value) for number in range(count)]
            alone = node((count,), D=value)
            # B has more nodes than D and would come after it if its mean were rounded down.
            assert rank(tree(*many, alone), TITLES) == [A, B, D]


def test_items_without_a_score_come_last():
    nan = math.nan
    missing = tree(node((0,), reward=0, A=nan, B=0.1), node((1,), reward=0, A=nan, D=0.0, C=nan))
    assert rank(missing, TITLES) == [B, D, A, C]
    assert rank(missing, TITLES, Ranking("sum")) == [B, D, A, C]
    assert rank(missing, TITLES, Ranking("vote"))[0] == A
    assert rank(tree(node((0,), A=nan), node((1,), A=0.4), node((2,), B=0.3)), TITLES) == [A, B]


def test_unknown_rankings_are_refused():
    with pytest.raises(ValueError, match=r"'median' .* mean, sum, vote, raw"):
        Ranking("median")
    with pytest.raises(ValueError, match=r"'some' .* all, selected, final"):
        Ranking(nodes="some")


def test_the_worked_metrics():
    values = label_values([A, D, C, B], [D, X])
    assert values["recall@1"] == 0
    assert values["recall@5"] == 0.5
    assert values["ndcg@5"] == pytest.approx(0.6309 / 2, abs=1e-4)
    assert values["mrr@5"] == 0.25
    both = label_values([A, D, C, B], [A, C])
    assert (both["ndcg@5"], both["ndcg@1"]) == (pytest.approx(0.75), 0.5)
    assert label_values([A, D, C, B], [A, C], released=True)["ndcg@1"] == pytest.approx(0.75)


def by_definition(ranked, labels, k):
    """Recall, NDCG and MRR, label by label."""
    rows = []
    for label in labels:
        place = ranked[:k].index(label) + 1 if label in ranked[:k] else None
        rows.append((1, 1 / math.log2(place + 1), 1 / place) if place else (0, 0, 0))
    return [sum(column) / len(rows) for column in zip(*rows)]


def test_metrics_by_definition_and_as_released():
    draw = random.Random(0)
    for length in (0, 1, 7, 49, 50, 51, 120):
        ranked = draw.sample(range(200), length)
        labels = draw.sample(range(200), 20) + ranked[:2] + ranked[-2:]
        labels = list(dict.fromkeys(labels))
        values, released = label_values(ranked, labels), label_values(ranked, labels, released=True)
        last = by_definition(ranked, labels, 50)
        for k in KS:
            recall, ndcg, mrr = by_definition(ranked, labels, k)
            assert [values[f"{name}@{k}"] for name in ("recall", "ndcg", "mrr")] == pytest.approx([recall, ndcg, mrr])
            assert [released[f"{name}@{k}"] for name in ("recall", "ndcg", "mrr")] == pytest.approx([recall, *last[1:]])
        assert values["ndcg@1"] <= values["ndcg@5"] <= values["ndcg@10"]


def test_what_is_not_ranked_is_a_miss():
    for ranked in ([], [A, B]):
        assert set(label_values(ranked, [X]).values()) == {0.0}
    with pytest.raises(ValueError, match="no label"):
        label_values([A], [])
    with pytest.raises(ValueError, match="1 items twice"):
        label_values([A, B, A], [A])


def instance(id, *labels):
    return Instance(Dialogue(id, (Turn(USER, "Hi"),)), labels)


def test_a_summary_by_hand():
    given = [instance("a", D, X), instance("b", A)]
    trees = [dataclasses.replace(WORKED, dialogue="a"), tree(node((0,), kept=True, B=0.4, A=0.2), id="b")]
    judged = judge(given, trees, TITLES)
    assert judged.values["recall@5"].tolist() == [0.5, 1.0]
    assert judged.values["recall@1"].tolist() == [0.0, 0.0]
    assert judged.values["mrr@5"].tolist() == [0.25, 0.5]
    assert judged.values["pool_recall"].tolist() == [0.5, 1.0]
    out = summarize(judged, trees)
    assert (out["recall@5"], out["mrr@5"], out["pool_recall"], out["pool_size"]) == (0.75, 0.375, 0.75, 3.0)
    assert out["kept_reward"] == {"1": pytest.approx((0.85 + (0.2 + 0.8 + 0.85) / 3 + 0.3) / 3)}
    assert (out["costs"]["lists"], out["costs"]["scored"], out["costs"]["critiques"]) == (4, 6, 0)
    assert (out["protocol"]["instances"], out["protocol"]["labels"], out["protocol"]["ranking"]) == (2, 3, "mean")
    low, high = out["intervals"]["recall@5"]
    assert 0.5 <= low <= 0.75 <= high <= 1
    assert json.loads(json.dumps(out)) == out
    assert "released" in judge(given, trees, TITLES, released=True).protocol["ndcg_mrr"]


def test_comparisons_are_paired_by_instance():
    given = [instance("a", A), instance("b", B), instance("c", X)]
    good = [tree(node((0,), A=0.9, B=0.1), id="a"), tree(node((0,), B=0.9), id="b"), tree(node((0,), A=0.5), id="c")]
    bad = [tree(node((0,), D=0.9), id=id) for id in "abc"]
    ours, theirs = judge(given, good, TITLES), judge(given[::-1], bad[::-1], TITLES)
    difference, low, high = compare(ours, theirs, "recall@10")
    assert difference == pytest.approx(2 / 3)
    assert 0 <= low <= difference <= high <= 1
    assert compare(theirs, ours, "ndcg@1")[0] == pytest.approx(-2 / 3)
    assert compare(ours, judge(given[::-1], good[::-1], TITLES), "recall@10") == (0, 0, 0)
    with pytest.raises(ValueError, match="only the same instances can be compared: 3 and 2"):
        compare(ours, judge(given[:2], bad[:2], TITLES), "recall@1")
    for wrong in (good[:2], good[::-1]):
        with pytest.raises(ValueError, match=r"\d trees for 3 instances: one is needed for each, in their order"):
            judge(given, wrong, TITLES)
    with pytest.raises(ValueError, match="0 trees for 0 instances"):
        judge([], [], TITLES)


class Players:
    """A recommender and a user in one, whose calls are counted."""

    def __init__(self, k):
        self.k, self.lists, self.critiques, self.scores = k, 0, 0, 0

    def recommend(self, asks):
        self.lists += len(asks)
        return [Reply(tuple(random.Random(ask.seed).sample(range(30), self.k))) for ask in asks]

    def score(self, dialogues, items):
        self.scores += sum(map(len, items))
        return [np.array([(item * 7 % 30) / 30 for item in some]) for some in items]

    def criticise(self, requests):
        self.critiques += len(requests)
        return ["no"] * len(requests)


@pytest.mark.parametrize(
    ("config", "lists", "best_of"),
    [(SearchConfig(k=3), 80, 16), (SearchConfig(beams=2, expand=3, depth=3, k=3), 21, 9),
     (SearchConfig(beams=1, expand=2, depth=4, k=3), 8, 2), (SearchConfig(depth=1, init=5, k=3), 5, 5)],
)  # fmt: skip
def test_arms_ask_for_as_many_lists(config, lists, best_of):
    dialogues = [Dialogue("d", (Turn(USER, "Hi"),))]
    made = {}
    for name, arm in arms(config).items():
        players = Players(3)
        (made[name],) = search(dialogues, players, players, arm)
        assert players.lists == arm.lists == {"crs_alone": 1, "best_of": best_of}.get(name, lists)
        assert players.critiques == (0 if name in ("crs_alone", "resampled", "best_of") else lists - best_of)
        before = vars(players).copy()
        assert len(rank(made[name], range(30), ARM_RANKINGS[name])) >= 3
        assert vars(players) == before  # ranking asks nothing
    assert made.keys() == ARM_RANKINGS.keys()
    assert made["full"].config == config
    # The first level is the same in all of them: what differs comes from what follows.
    first = [node.items for node in made["full"].nodes if node.depth == 1]
    for name in ("resampled", "best_of", "beam_1", "random_reward"):
        assert [node.items for node in made[name].nodes if node.depth == 1] == first
    assert [node.items for node in made["crs_alone"].nodes] == first[:1]
    best = max(made["best_of"].nodes, key=lambda node: node.reward)
    assert rank(made["best_of"], range(30), ARM_RANKINGS["best_of"]) == list(best.items)
