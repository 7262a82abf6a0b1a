"""A model of ours writes queries: it reads in a search what it read in the environment of reinforcement learning."""

import jax
import numpy as np
import pytest

import models
from jaxrec.data.dialogues import Dialogue, Instance, Turn
from jaxrec.data.item_catalogue import ItemCatalogue
from jaxrec.tools.conversation import Ask
from jaxrec.tools.crs.environment import query_env, talks
from jaxrec.tools.crs.prompts import QueryPrompts
from jaxrec.tools.crs.query import QueryRecommender, writer
from models.hf import Model
from rl.envs.base import Action
from rl.trajectory import Status

CATALOGUE = ItemCatalogue(
    ["Heat (1995)", "Ran (1985)", "Query: Alien", "Stem", "Jaws\n(1975)"], [{"genre": ["war", "sea"]}, *[{}] * 4]
)
TALK = Dialogue("d1", (Turn("user", "some\nhorror Seeker: x"), Turn("system", "ok"), Turn("user", "now")))


class User:
    """Scores are item / 10; critiques name the first item and try to write a query."""

    def __init__(self):
        self.asked = []

    def score(self, dialogues, items):
        self.asked.append(("score", dialogues, items))
        return [np.array(own) / 10 for own in items]

    def criticise(self, requests):
        self.asked.append(("criticise", requests))
        return [f"no {request.shown[0]}\nQuery: mine" for request in requests]


def lists(requests):
    """ "n" is item n and the next; anything else is no query; items of earlier lists are not looked at."""
    return [(int(r.text), (int(r.text) + 1) % 5) if r.text.strip().isdigit() else None for r in requests]


class Write:
    """Says the texts that are queued for it; keeps what it read."""

    def __init__(self, *texts):
        self.texts, self.read, self.seeds = list(texts), [], []

    def __call__(self, conversations, seeds):
        self.read.append(list(conversations))
        self.seeds.append(list(seeds))
        return [self.texts.pop(0) for _ in conversations]


def test_prompt_and_what_follows_a_query():
    prompts = QueryPrompts(CATALOGUE)
    assert prompts.prompt(TALK) == "Seeker: some horror \u00b7eeker: x\nRecommender: ok\nSeeker: now\nQuery:"
    assert QueryPrompts(CATALOGUE, turns=1).prompt(TALK) == "Seeker: now\nQuery:"
    assert prompts.show((0, 2, 4), "no\n<|x|> more") == (
        "Recommender: Heat (1995); \u00b7uery: Alien; Jaws (1975)\nSeeker: no \u2039|x\u00b7> more\nQuery:"
    )
    assert prompts.show((1,), "") == "Recommender: Ran (1985)\nQuery:"
    told = QueryPrompts(CATALOGUE, attributes=True, roles=("A", "B"))
    assert told.show((0, 1), "") == "B: Heat (1995) - war sea; Ran (1985)\nQuery:"
    with pytest.raises(ValueError, match="turns=-1"):
        QueryPrompts(CATALOGUE, turns=-1)


def test_a_search_and_the_environment_read_alike():
    prompts, user = QueryPrompts(CATALOGUE), User()
    env = query_env(prompts, lists, user, 2, rounds=3)
    (state,), (prompt,) = env.reset(talks([Instance(TALK, (3,))]), 1)
    for text in ("0", "1", "2"):
        env.step([state], [Action(f"{text}\n", "\n")])
    assert state.status == Status.FINISHED
    assert state.example.target == (3,)
    write = Write("0", "1", "2")
    made = QueryRecommender(write, prompts, lists, 2)
    ask, past = Ask(TALK), ()
    for critique in [*state.critiques, ""]:
        (reply,) = made.recommend([ask])
        past = tuple(dict.fromkeys((*past, *reply.items)))
        ask = Ask(TALK, reply.items, critique, past)
    for round_, (pieces,) in enumerate(write.read):
        assert pieces == (prompt, *(text for _, text in state.segments[: 2 * round_]))
    assert made.counts["resumed"] == 0
    requests = [asked[1][0] for asked in user.asked if asked[0] == "criticise"]
    assert [(r.dialogue, r.shown, r.name) for r in requests] == [
        (TALK, (0, 1), "example 0"),
        (TALK, (1, 2), "example 0"),
    ]


def test_a_list_that_somebody_else_made_is_gone_on_from():
    write = Write("1")
    made = QueryRecommender(write, QueryPrompts(CATALOGUE, turns=1), lists, 2)
    (reply,) = made.recommend([Ask(TALK, (3, 1), "no", (3, 1))])
    assert write.read == [[("Seeker: now\nRecommender: Stem; Ran (1985)\nSeeker: no\nQuery:",)]]
    assert (reply.items, reply.text, made.counts["resumed"]) == ((1, 2), "1", 1)


def test_counts_are_those_of_the_model_and_of_its_lists():
    def counting(requests):
        return lists(requests)

    counting.counts = {"search: filled": 3, "query: empty": 0}
    made = QueryRecommender(Write("hm", "0"), QueryPrompts(CATALOGUE), counting, 2)
    made.recommend([Ask(TALK)])
    assert made.counts == {"tries": 2, "asked again": 1, "misfits": 1, "search: filled": 3}


def test_unusable_queries_are_written_again_together():
    write = Write("hm", "0", "", "2", "what", "3")
    made = QueryRecommender(write, QueryPrompts(CATALOGUE), lists, 2)
    replies = made.recommend([Ask(TALK, seed=s) for s in (1, 2, 3)])
    assert [len(batch) for batch in write.read] == [3, 2, 1]
    assert [(r.items[0], r.tries) for r in replies] == [(2, 2), (0, 1), (3, 3)]
    assert len({seed for batch in write.seeds for seed in batch}) == 6
    with pytest.raises(RuntimeError, match="node 1, dialogue d1: none of 2 replies can be used; the last one: 'hm'"):
        QueryRecommender(Write("eh", "hm"), QueryPrompts(CATALOGUE), lists, 2, tries=2).recommend(
            [Ask(TALK, name="node 1")]
        )
    nothing = QueryRecommender(Write("x"), QueryPrompts(CATALOGUE), lambda requests: [()], 2)
    with pytest.raises(RuntimeError, match="dialogue d1: no list was found for 'x'"):
        nothing.recommend([Ask(TALK)])


def test_no_callable_gets_a_label():
    """What the model, the search and the user are given is the same, byte for byte, whatever the labels are."""

    def seen(labels):
        user, requests = User(), []

        def spy(asked):
            requests.extend(asked)
            return lists(asked)

        env = query_env(QueryPrompts(CATALOGUE), spy, user, 2, rounds=2)
        states, prompts = env.reset(talks([Instance(TALK, labels)]), 1)
        step = env.step(states, [Action("0\n", "\n")])
        env.step(states, [Action("1\n", "\n")])
        return repr((prompts, step.observations, requests, user.asked))

    assert seen((3,)) == seen((4, 2))


@pytest.fixture(scope="module")
def model():
    tokenizer = models.build_word_tokenizer([" a", " b", "\n", "Query:", " go"])
    config = models.Config(
        vocab_size=tokenizer.vocab_size, dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn_dim=24, init_std=0.3,
        max_len=64, eos_ids=tokenizer.eos_ids,
    )  # fmt: skip
    return Model(config, models.init(config, jax.random.key(0)), tokenizer)


def test_a_model_writes_by_its_own_seed(model):
    write = writer(model, max_new=6)
    conversations = [("Query:",), ("Query:", " a\n", " b Query:"), ("Query: a\n b Query:",), ("Query:",)]
    texts = write(conversations, [1, 2, 2, 3])
    assert texts[1] == texts[2]  # the same tokens, in other pieces
    assert texts[0] != texts[3]
    assert write(conversations[:1], [1]) == texts[:1]
    assert not any("\n" in text for text in texts)
    assert write([], []) == []
    greedy = writer(model, temperature=0.0, max_new=6)
    (said,) = models.generate(model, ["Query:"], max_new_tokens=6, stop=["\n"])
    assert greedy([("Query:",)], [5]) == [said.text.partition("\n")[0]]
    with pytest.raises(ValueError, match="64"):
        write([("Query:" + " a" * 70,)], [0])
