"""Questions over chains of facts: true, apart by split, answered by the passages of their hops."""

import numpy as np
import pytest

from jaxrec.world import generate, world_config
from jaxrec.world.encyclopaedia import facts
from jaxrec.world.questions import SPLITS, chain_text, chains, encyclopaedia, questions, split_of


@pytest.fixture(scope="module")
def world():
    return generate(world_config("tiny"))


@pytest.fixture(scope="module")
def known(world):
    return facts(world)


def test_every_hop_asks_for_what_the_one_before_names(world, known):
    found = chains(known, 3)
    assert len(found) == world.num_items
    for first, second, third in found:
        assert (first.relation, second.relation, third.relation) == ("maker", "birthplace", "region")
        assert second.subject == first.object
        assert third.subject == second.object
    item = world.titles.index(found[0][0].subject)
    assert found[0][2].object == world.word("region", item)  # the catalogue's own way from item to region
    assert chain_text(found[0][:2]) == f"What is the birthplace of the maker of {world.titles[item]}?"


def test_counts_of_chains(world, known):
    makers, places = (len(world.values[name]) for name in ("maker", "place"))
    assert len(chains(known, 1)) == 5 * world.num_items + makers + places
    assert len(chains(known, 2)) == world.num_items + makers
    with pytest.raises(ValueError, match="between 1 and 3"):
        chains(known, 4)


def test_splits_share_no_first_subject(known):
    parts = {s: questions(known, s, np.random.default_rng(0), 18) for s in SPLITS}
    firsts = [{q.facts[0].subject for q in part} for part in parts.values()]
    assert len(set.union(*firsts)) == sum(map(len, firsts))
    for part in parts.values():
        assert len({q.text for q in part}) == len({q.id for q in part}) == 18
        assert [sum(q.hops == h for q in part) for h in (1, 2, 3)] == [6, 6, 6]
    for split, share in (("test", 0.2), ("cold", 0.2), ("train", 0.6)):
        assert abs(np.mean([split_of(c) == split for c in chains(known, 1)]) - share) < 0.15


def test_the_same_seed_gives_the_same_questions(known):
    one, two = (questions(known, "train", np.random.default_rng(3), 24) for _ in range(2))
    assert one == two
    with pytest.raises(ValueError, match="ask for fewer"):
        questions(known, "test", np.random.default_rng(0), 10_000)
    with pytest.raises(ValueError, match="no split"):
        questions(known, "valid", np.random.default_rng(0), 1)


def test_one_passage_per_subject_answers_each_hop(known):
    passages = dict(encyclopaedia(known))
    assert len(passages) == len({f.subject for f in known})
    for question in questions(known, "test", np.random.default_rng(1), 24):
        for fact in question.facts:
            assert fact.object in passages[fact.subject]
        assert 0 <= question.known <= question.hops
