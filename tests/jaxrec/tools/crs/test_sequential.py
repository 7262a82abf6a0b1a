"""A trained recommender in conversations: what it learns from, and what it does where nothing is mentioned."""

import numpy as np
import pytest
from flax import nnx

from jaxrec.data.dialogues import Dialogue, Turn
from jaxrec.data.item_catalogue import ItemCatalogue
from jaxrec.tools.conversation import Ask
from jaxrec.tools.crs.sequential import SequentialRecommender, fit_sequential, mention_counts, mention_samples
from models.recsys import SASRec, SASRecConfig
from rl.recommender import RecommenderConfig

SMALL = {"dim": 16, "layers": 1, "heads": 1, "ffn_dim": 16, "max_len": 4, "dropout": 0.0, "attention_dropout": 0.0}
CATALOGUE = ItemCatalogue([f"Film {n}" for n in range(8)], [{}] * 8)


def dialogue(*items, id="d"):
    return Dialogue(id, tuple(Turn("user", "x", (item,)) for item in items) or (Turn("user", "hi"),))


def test_mentions_become_samples():
    samples = mention_samples([dialogue(3, 0, 3, 5), dialogue(1), dialogue(), dialogue(7, 6)], 4)
    np.testing.assert_array_equal(samples["history"], [[4, 0, 0, 0], [4, 1, 0, 0], [8, 0, 0, 0]])
    np.testing.assert_array_equal(samples["lengths"], [1, 2, 1])
    np.testing.assert_array_equal(samples["targets"], [1, 6, 7])
    np.testing.assert_array_equal(mention_counts([dialogue(3, 3, 0), dialogue(3)], 5), [1, 0, 0, 2, 0])
    with pytest.raises(ValueError, match="none of 1 dialogues mentions two items"):
        mention_samples([dialogue(1)], 4)


@pytest.fixture(scope="module")
def fitted():
    """Item n is followed by n + 1, modulo 8."""
    train = [dialogue(n, (n + 1) % 8) for n in range(8)] * 4
    training = RecommenderConfig(lr=3e-2, batch_size=8, epochs=25, patience=25, eval_every=25, length_buckets=1)
    return fit_sequential(train, train[:8], 8, training, SMALL)


def test_it_learns_what_follows(fitted):
    made = SequentialRecommender(fitted, np.zeros(8), CATALOGUE, 2)
    replies = made.recommend([Ask(dialogue(n)) for n in range(8)])
    assert [reply.items[0] for reply in replies] == [(n + 1) % 8 for n in range(8)]
    assert all(n not in reply.items for n, reply in enumerate(replies))
    (after,) = made.recommend([Ask(dialogue(2), (3, 5), "no", (3, 5))])
    assert set(after.items).isdisjoint({2, 3, 5})
    assert made.counts["no mention"] == 0
    keeping = SequentialRecommender(fitted, np.zeros(8), CATALOGUE, 8, exclude_mentioned=False)
    assert set(keeping.recommend([Ask(dialogue(2))])[0].items) == set(range(8))


def test_popular_items_where_nothing_is_mentioned(fitted):
    counts = np.array([0, 5, 1, 9, 0, 0, 2, 0])
    made = SequentialRecommender(fitted, counts, CATALOGUE, 3)
    replies = made.recommend([Ask(dialogue()), Ask(dialogue(), (3,), "", (3,))])
    assert [reply.items for reply in replies] == [(3, 1, 6), (1, 6, 2)]
    assert made.counts["no mention"] == 2
    drawing = SequentialRecommender(fitted, counts, CATALOGUE, 3, temperature=1.0)
    asks = [Ask(dialogue(), seed=seed) for seed in range(12)]
    lists = [reply.items for reply in drawing.recommend(asks)]
    assert len(set(lists)) > 3
    assert [reply.items for reply in drawing.recommend(asks)] == lists


def test_dialogues_that_mention_the_same_are_scored_once(fitted):
    made = SequentialRecommender(fitted, np.zeros(8), CATALOGUE, 2)
    asked = []
    serve = made._server.scores
    made._server.scores = lambda history, lengths: asked.append(len(history)) or serve(history, lengths)
    made.recommend([Ask(dialogue(1), seed=s) for s in range(3)] + [Ask(dialogue(2)), Ask(dialogue())])
    assert asked == [2]


def test_what_cannot_be(fitted):
    with pytest.raises(ValueError, match="k=9 must lie between 1 and"):
        SequentialRecommender(fitted, np.zeros(8), CATALOGUE, 9)
    other = SASRec(SASRecConfig(num_items=5, **SMALL), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="knows 5 items and 8 counts, the catalogue has 8"):
        SequentialRecommender(other, np.zeros(8), CATALOGUE, 2)
    made = SequentialRecommender(fitted, np.zeros(8), CATALOGUE, 2)
    with pytest.raises(RuntimeError, match="node 7, dialogue d: 7 of 8 items are left out, so that k=2"):
        made.recommend([Ask(dialogue(0), tuple(range(1, 7)), "no", tuple(range(1, 7)), name="node 7")])
