"""The recommender as a tool: what it leaves out and what the controls do to a query."""

from __future__ import annotations

import numpy as np
import pytest
from flax import nnx

from jaxrec.tools.trm import RecommenderTool, random_words
from models.recsys import TRM, Recommender, TRMConfig, UnknownItemError, get_params, set_params
from rl.envs.recommend import OPEN_QUERY, Example

N, D = 20, 6


@pytest.fixture(scope="module")
def server() -> Recommender:
    text = np.random.default_rng(0).normal(size=(N + 1, D)).astype(np.float32)
    config = TRMConfig(num_items=N, max_len=4, dim=8, layers=1, heads=2, ffn_dim=8, experts=2, text_dim=D)
    module = TRM(config, text, rngs=nnx.Rngs(0))
    # Untrained, the words hardly matter; a louder adaptor lets them.
    louder = {name: value * (30.0 if "adaptor" in name else 1.0) for name, value in get_params(module).items()}
    return Recommender(set_params(module, louder))


class Encoder:
    """Texts to unit vectors; remembers what it was asked."""

    def __init__(self):
        self.asked: list[str] = []

    def __call__(self, texts) -> np.ndarray:
        self.asked += list(texts)
        vectors = np.stack([np.random.default_rng(sum(map(ord, t))).normal(size=D) for t in texts])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


EXAMPLES = [Example(0, (3,), 5), Example(1, (7, 8, 9, 10, 11, 12), 2)]
NOTHING = [np.zeros(0, np.int64)] * 2


def test_history_is_left_out_also_what_the_model_no_longer_sees(server):
    found = RecommenderTool(server, Encoder(), exclude_history=True)(EXAMPLES, ["a", "b"], 14, NOTHING)
    assert found.shape == (2, 14)
    for row, example in zip(found, EXAMPLES, strict=True):
        assert not set(row.tolist()) & set(example.history)
        assert len(set(row.tolist())) == 14
        assert 0 not in row
    assert set(found[1].tolist()) == set(range(1, N + 1)) - set(EXAMPLES[1].history)
    shown = RecommenderTool(server, Encoder())(EXAMPLES, ["a", "b"], N, NOTHING)
    assert set(shown[1].tolist()) == set(range(1, N + 1))  # the released tool leaves nothing out


def test_seen_items_are_left_out_only_when_asked(server):
    free = RecommenderTool(server, Encoder())
    first = free(EXAMPLES, ["a", "b"], 5, NOTHING)
    np.testing.assert_array_equal(free(EXAMPLES, ["a", "b"], 5, list(first)), first)
    fresh = RecommenderTool(server, Encoder(), exclude_seen=True)
    np.testing.assert_array_equal(fresh(EXAMPLES, ["a", "b"], 5, NOTHING), first)
    ten = free(EXAMPLES, ["a", "b"], 10, NOTHING)
    np.testing.assert_array_equal(fresh(EXAMPLES, ["a", "b"], 5, list(first)), ten[:, 5:])
    one = fresh(EXAMPLES, ["a", "b"], 5, [first[0], NOTHING[0]])
    np.testing.assert_array_equal(one, [ten[0, 5:], first[1]])


def test_too_few_items_left_is_an_error(server):
    tool = RecommenderTool(server, Encoder(), exclude_history=True)
    with pytest.raises(ValueError, match="k"):
        tool(EXAMPLES, ["a", "b"], 15, NOTHING)


def test_blank_text_ignores_the_words(server):
    encoder = Encoder()
    blank = RecommenderTool(server, encoder, blank=True)
    np.testing.assert_array_equal(blank(EXAMPLES, ["a", "b"], 5, NOTHING), blank(EXAMPLES, ["c", "d"], 5, NOTHING))
    assert encoder.asked == []
    own = RecommenderTool(server, encoder)
    lists = [own(EXAMPLES, [w, w], 5, NOTHING)[0].tolist() for w in "abcdefgh"]
    assert len({tuple(x) for x in lists}) > 1  # and otherwise they matter


def test_an_open_query_is_answered_from_the_history_alone(server):
    tool, blank = RecommenderTool(server, Encoder()), RecommenderTool(server, Encoder(), blank=True)
    found, alone = tool(EXAMPLES, [OPEN_QUERY, "b"], N, NOTHING), blank(EXAMPLES, ["", ""], N, NOTHING)
    np.testing.assert_array_equal(found[0], alone[0])
    assert found[1].tolist() != alone[1].tolist()


def test_random_words_keep_the_number_of_phrases_and_repeat_by_seed(server):
    vocabulary = ["sea", "old", "dark", "sea"]
    edit = random_words(vocabulary, 5)
    for query, count in (("noir", 1), ("noir; tale", 2), ("a; b; c; d", 4)):
        words = edit(query).split("; ")
        assert len(words) == count
        assert set(words) <= set(vocabulary)
    assert [random_words(vocabulary, 5)("a; b") for _ in range(2)] == [random_words(vocabulary, 5)("c; d")] * 2
    encoder = Encoder()
    RecommenderTool(server, encoder, edit_text=random_words(vocabulary, 0))(EXAMPLES, ["x", "x; y"], 3, NOTHING)
    assert set("; ".join(encoder.asked).split("; ")) <= set(vocabulary)


def test_an_unknown_item_is_named(server):
    with pytest.raises(UnknownItemError, match=str(N + 1)):
        RecommenderTool(server, Encoder())([Example(0, (N + 1,), 1)], ["a"], 3, NOTHING[:1])
