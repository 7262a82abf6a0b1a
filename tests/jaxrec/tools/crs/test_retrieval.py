"""Recommenders by search: the index of items, who is found for which query, variety, and what is left out."""

import numpy as np
import pytest

from jaxrec.data.dialogues import Dialogue, Turn
from jaxrec.data.item_catalogue import ItemCatalogue
from jaxrec.tools.conversation import Ask
from jaxrec.tools.crs.prompts import RecommenderPrompts
from jaxrec.tools.crs.retrieval import (
    ItemSearch,
    RetrievalRecommender,
    SearchedLists,
    WrittenQueries,
    choose,
    item_passages,
    item_store,
    latest_turns,
)  # fmt: skip
from jaxrec.tools.search.base import Passage, Result, failure
from jaxrec.tools.search.bm25 import build_bm25
from jaxrec.tools.search.dense import DenseSearch, Embedder, build_dense
from jaxrec.tools.teacher import Failure, Reply
from rl.envs.user import ListRequest, Talk

TITLES = ("Heat (1995)", "Ran (1985)", "Alien (1979)", "Stem", "Jaws (1975)", "Tomcats (2001)")
GENRES = ("crime", "war", ("horror", "space"), "crime", "horror", "")
CATALOGUE = ItemCatalogue(
    TITLES, [{"genre": g, "star": ["Al\nPacino"] if i == 0 else ()} for i, g in enumerate(GENRES)]
)
TALK = Dialogue(
    "d1:4", (Turn("user", "hello"), Turn("system", "hi"), Turn("user", "some horror"), Turn("system", "Jaws?", (4,)))
)


@pytest.fixture(scope="module")
def bm25(tmp_path_factory):
    folder = tmp_path_factory.mktemp("items")
    return build_bm25(item_store(CATALOGUE, folder / "store"), folder / "bm25")


class Fixed:
    """Every query gets the items 0, 1, 2, ... with these scores."""

    id = "fixed"

    def __init__(self, *scores):
        self.scores, self.asked = scores, []

    def search(self, queries, k):
        self.asked.append((list(queries), k))
        hits = tuple(Passage(str(i), "", "", s) for i, s in enumerate(self.scores))
        return [failure("unavailable", "down") if q == "fail" else Result(hits[:k]) for q in queries]


def test_items_are_indexed_with_their_attributes():
    assert item_passages(CATALOGUE)[:3] == [
        Passage("0", "Heat (1995)", "genre: crime; star: Al Pacino"),
        Passage("1", "Ran (1985)", "genre: war"),
        Passage("2", "Alien (1979)", "genre: horror, space"),
    ]
    ids = [p.id for p in item_passages(ItemCatalogue([f"F{i}" for i in range(12)], [{}] * 12))]
    assert ids == sorted(ids)


def test_attributes_are_found_and_not_titles_alone(bm25):
    """The released code embeds titles only; no title holds the word."""
    search = ItemSearch(CATALOGUE, bm25, 2)
    assert search(["horror", "pacino crimes"], [(), ()], [0, 0]) == [(4, 2), (0, 3)]  # Jaws: the shorter text
    assert not search.counts


def test_an_encoder_sees_attributes_too(tmp_path):
    words = ("horror", "crime", "war")
    count = lambda texts: np.array([[1e-3, *(t.count(w) for w in words)] for t in texts], np.float32)  # noqa: E731
    store, embedder = item_store(CATALOGUE, tmp_path / "store"), Embedder("counts", count)
    build_dense(store, tmp_path / "dense", embedder)
    search = ItemSearch(CATALOGUE, DenseSearch(store, tmp_path / "dense", embedder), 2)
    assert set(search(["horror"], [()], [0])[0]) == {2, 4}
    assert search(["horror"], [(2, 4)], [0])[0] == (5, 0)  # no direction at all, then cosine near 0, lower number


def test_a_store_is_used_again_for_its_own_catalogue_alone(tmp_path):
    store = item_store(CATALOGUE, tmp_path / "s")
    assert item_store(CATALOGUE, tmp_path / "s").hash == store.hash
    other = ItemCatalogue(TITLES, [{"genre": "war"}] * len(TITLES))
    with pytest.raises(ValueError, match="the items of another catalogue"):
        item_store(other, tmp_path / "s")


def test_items_of_the_path_are_left_out_and_the_list_is_filled_up(bm25):
    search = ItemSearch(CATALOGUE, bm25, 2)
    assert search(["crime"], [(0,)], [0]) == [(3, 1)]
    assert search.counts["filled"] == 1
    assert search(["nothing of the kind"], [(0,)], [0]) == [(1, 2)]
    drawn = {ItemSearch(CATALOGUE, bm25, 2, temperature=1.0)(["zzz"], [(0,)], [seed])[0] for seed in range(20)}
    assert len(drawn) > 3
    assert all(0 not in items and len(set(items)) == 2 for items in drawn)
    with pytest.raises(ValueError, match="5 of 6 items are left out, so that k=2 cannot be had"):
        search(["crime"], [(0, 1, 2, 3, 4)], [0])


def test_one_search_for_all_and_equal_queries_once():
    backend = Fixed(3.0, 2.0, 1.0, 0.5)
    search = ItemSearch(CATALOGUE, backend, 2, pool=2)
    assert search(["a", "b", "a"], [(), (0, 1), (1,)], [0, 0, 0]) == [(0, 1), (2, 3), (0, 2)]
    assert backend.asked == [(["a", "b"], 4)]
    assert search(["fail", "a"], [(), ()], [0, 0]) == [(), (0, 1)]
    assert search.counts["failed_unavailable"] == 1
    assert search([], [], []) == []


def test_draws_are_those_of_a_softmax():
    """Of one item: frequencies against exp(score / temperature), normalised."""
    scores = np.array([2.0, 1.0, 0.0])
    drawn = np.bincount([choose(np.arange(3), scores, 1, 0.5, seed)[0] for seed in range(4000)], minlength=3) / 4000
    wanted = np.exp(scores / 0.5) / np.exp(scores / 0.5).sum()
    np.testing.assert_allclose(drawn, wanted, atol=0.03)  # four standard errors are .022
    assert choose(np.arange(3), scores, 2, 0.5, 7) == choose(np.arange(3), scores, 2, 0.5, 7)
    pairs = {choose(np.arange(3), scores, 2, 1.0, seed) for seed in range(50)}
    assert pairs == {(0, 1), (0, 2), (1, 2)}  # best score first
    assert choose(np.array([5, 3, 9]), np.array([1.0, 1.0, 2.0]), 9, 0.0, 0) == (9, 5, 3)


def test_queries_of_the_latest_turns():
    asks = [Ask(TALK), Ask(TALK, (0,), "not crime", (0,)), Ask(Dialogue("d2", (Turn("system", "hi there"),)))]
    assert latest_turns(1)(asks) == ["some horror", "some horror not crime", "hi there"]
    assert latest_turns(5)(asks)[0] == "hello some horror"
    with pytest.raises(ValueError, match="turns=0"):
        latest_turns(0)


def test_recommendations_differ_by_seed_and_leave_out_the_path(bm25):
    made = RetrievalRecommender(ItemSearch(CATALOGUE, bm25, 2), latest_turns(1))
    first, again, revised = made.recommend([Ask(TALK), Ask(TALK, seed=5), Ask(TALK, (4, 2), "more crime", (4, 2))])
    assert first.items == again.items == (4, 2)
    assert first.text == "some horror"
    assert revised.items == (3, 0)
    drawing = RetrievalRecommender(ItemSearch(CATALOGUE, bm25, 2, temperature=3.0), latest_turns(1))
    broad = Dialogue("d3", (Turn("user", "horror, crime or war"),))
    asks = [Ask(broad, seed=seed) for seed in range(16)]
    lists = [reply.items for reply in drawing.recommend(asks)]
    assert len(set(lists)) > 1
    assert [reply.items for reply in drawing.recommend(asks[::-1])][::-1] == lists
    without = RetrievalRecommender(ItemSearch(CATALOGUE, bm25, 2), latest_turns(1), exclude_mentioned=True)
    assert 4 not in without.recommend([Ask(TALK)])[0].items


def test_a_failed_search_is_an_error():
    made = RetrievalRecommender(ItemSearch(CATALOGUE, Fixed(1.0), 1), lambda asks: ["fail"] * len(asks))
    with pytest.raises(RuntimeError, match="node 3, dialogue d1:4: the search for 'fail' failed"):
        made.recommend([Ask(TALK, name="node 3")])


class Writer:
    """A teacher that needs a second try for whoever is not content."""

    id = "writer"

    def __init__(self):
        self.batches = []

    def ask(self, requests, done=None):
        self.batches.append([r.messages[0].content for r in requests])
        return [Reply((self.say(r, text),), ("stop",)) for r, text in zip(requests, self.batches[-1], strict=True)]

    def say(self, request, text):
        if "## Feedback" in text and len(self.batches) == 1:
            return "hm"
        return f"Analysis: hm\nQuery: crime {request.sampling.seed % 2}"


def test_written_queries():
    teacher = Writer()
    queries = WrittenQueries(teacher, RecommenderPrompts(CATALOGUE, 2))
    asks = [Ask(TALK), Ask(TALK, (4,), "not horror", (4,))]
    assert all(query in ("crime 0", "crime 1") for query in queries(asks))
    first, second = teacher.batches
    assert (len(first), len(second)) == (2, 1)
    assert "genre, star, director, writer, plot" in first[0]
    assert "Name no title in the query" in first[0]
    assert "## Feedback\nUser: not horror" in second[0]
    assert +queries.counts == {"tries": 3, "asked again": 1, "misfits": 1, "empty": 1}
    broken = WrittenQueries(Failing(), RecommenderPrompts(CATALOGUE, 2), tries=2)
    with pytest.raises(RuntimeError, match=r"d1:4: none of 2 replies holds a query; .*refused: no"):
        broken(asks)
    assert +broken.counts == {"tries": 4, "asked again": 2, "misfits": 4, "failed_refused": 4}


def test_counts_of_queries_and_of_searches_are_told_apart(bm25):
    made = RetrievalRecommender(ItemSearch(CATALOGUE, bm25, 2), latest_turns(1))
    made.recommend([Ask(Dialogue("d3", (Turn("user", "crime"),)), past=(0,))])
    assert +made.counts == {"search: filled": 1}
    written = WrittenQueries(Writer(), RecommenderPrompts(CATALOGUE, 1))
    made = RetrievalRecommender(ItemSearch(CATALOGUE, bm25, 1), written)
    made.recommend([Ask(TALK), Ask(TALK, (4,), "not horror", (4,))])
    assert +made.counts == {"query: tries": 3, "query: asked again": 1, "query: misfits": 1, "query: empty": 1}


class Failing:
    id = "failing"

    def ask(self, requests, done=None):
        return [Failure("refused", "no")] * len(requests)


def test_lists_of_a_policy_that_writes_queries(bm25):
    lists = SearchedLists(ItemSearch(CATALOGUE, bm25, 1))
    talk = Talk(0, TALK)
    requests = [
        ListRequest(talk, text, (), "", past, 0) for text, past in ((" crime\t", ()), (" \n", ()), ("crime", (0, 3)))
    ]
    assert lists(requests) == [(3,), None, (1,)]  # the shorter text; blank; no crime is left
    assert lists([requests[1]]) == [None]
    assert lists.counts == {"query: empty": 2, "search: filled": 1}
    horror = ListRequest(talk, "horror", (), "", (), 0)
    assert lists([horror]) == [(4,)]
    assert SearchedLists(ItemSearch(CATALOGUE, bm25, 1), exclude_mentioned=True)([horror]) == [(2,)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"k": 7}, "k=7 must lie between 1 and"), ({"temperature": -1}, "temperature=-1"), ({"pool": 0}, "pool=0")],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        ItemSearch(CATALOGUE, Fixed(), **({"k": 2} | settings))
