"""The world's searching teacher: clean rollouts without errors, and faults of the kinds that the filters look for."""

import dataclasses
import json

import numpy as np
import pytest

from jaxrec.evaluate.answers import SIMPLE_DEEP_SEARCHER as PROTOCOL
from jaxrec.tools.curation import CurationConfig, describe, faults
from jaxrec.tools.rollouts import Rollout, Search, scored
from jaxrec.tools.search import Passage
from jaxrec.world import generate, world_config
from jaxrec.world.encyclopaedia import facts
from jaxrec.world.oracle_searcher import FAULTS, MARKER, SearcherConfig, SearcherOracle
from jaxrec.world.questions import encyclopaedia, questions
from rl.envs.search import web_pages
from rl.envs.tags import SIMPLE_DEEP_SEARCHER as TAGS
from rl.envs.tags import parse_query

FILTERS = CurationConfig(max_first=40, max_turn=40, min_words=60, min_urls=1.2, rollouts=0)


@pytest.fixture(scope="module")
def known():
    return facts(generate(world_config("tiny")))


@pytest.fixture(scope="module")
def asked(known):
    return questions(known, "train", np.random.default_rng(0), 12)


def played(oracle, question, seed=0):
    """The rollout with one result a query, as an environment would play it: each search finds two pages."""
    prompt, segments, searches = f"Question: {question.text}\nAnswer:", [], []
    while True:
        text = oracle.author(prompt + "".join(t for _, t in segments), seed)
        segments.append(("policy", text))
        if not text.endswith(TAGS.query_close):
            rollout = Rollout(question.id, tuple(segments), tuple(searches), "answer", prompt=prompt)
            return scored(rollout, [question.answer], PROTOCOL)
        query = parse_query(text, TAGS)
        fact = oracle._queries[query]
        searches.append(Search(query, (fact.subject, f"beside {fact.subject}")))
        segments.append(("tool", f"\n\n{TAGS.result_open} {fact.statement(0)}{TAGS.result_close}\n\n"))


def why(rollout):
    return faults(describe(rollout, FILTERS), FILTERS)


def test_without_errors_every_hop_is_searched_once_and_nothing_is_filtered(known, asked):
    oracle = SearcherOracle(known, asked)
    for question in asked:
        rollout = played(oracle, question)
        assert rollout.prediction == question.answer
        assert [s.query for s in rollout.searches] == [fact.question(0) for fact in question.facts]
        assert why(rollout) == []


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("wrong_fact", "wrong answer"), ("guess", "wrong answer"), ("reflect", "too many"), ("ramble", "too long"),
        ("own_result", "broken turns"), ("no_close", "broken turns"),
    ],
)  # fmt: skip
def test_the_filters_find_faults(known, asked, fault, reason):
    oracle = SearcherOracle(known, asked, SearcherConfig(1.0, (fault,)))
    found = [why(played(oracle, question)) for question in asked if question.hops == 1]
    assert len(found) >= 4
    assert all(reason in reasons[0] for reasons in found)


@pytest.mark.parametrize("fault", ["extra", "repeat"])
def test_superfluous_searches_cost_searches_and_distinct_pages(known, asked, fault):
    oracle = SearcherOracle(known, asked, SearcherConfig(1.0, (fault,)))
    for question in asked:
        rollout = played(oracle, question)
        assert rollout.search_count == 2 * question.hops
        assert rollout.prediction == question.answer
        assert why(rollout) == ["too few distinct pages"]


def test_later_hops_go_wrong_more_often(known, asked):
    oracle = SearcherOracle(known, asked, SearcherConfig(0.25))
    clean = SearcherOracle(known, asked)
    share = {}
    for hops in (1, 2, 3):
        those = [q for q in asked if q.hops == hops]
        same = [oracle.turns(q.text, s) == clean.turns(q.text, s) for q in those for s in range(100)]
        share[hops] = np.mean(same)
    wanted = {1: 0.75, 2: 0.75 * 0.5, 3: 0.75 * 0.5 * 0.25}
    for hops, value in wanted.items():  # 400 draws each
        assert abs(share[hops] - value) < 4 * np.sqrt(value * (1 - value) / 400)


def test_a_rollout_is_a_function_of_question_and_seed(known, asked):
    oracle = SearcherOracle(known, asked, SearcherConfig(0.5))
    assert [oracle.turns(q.text, 3) for q in asked] == [oracle.turns(q.text, 3) for q in asked]
    assert any(oracle.turns(q.text, 3) != oracle.turns(q.text, 4) for q in asked)
    text = f"Question: {asked[0].text}\nAnswer:"
    assert oracle.author(text, 3) == oracle.turns(asked[0].text, 3)[0]


def test_annotations_name_the_last_relation_and_what_is_asked(known, asked):
    question = next(q for q in asked if q.hops == 3)
    found = json.loads(SearcherOracle(known, asked).annotate(question.text))
    assert found["domain"] == "region"
    assert found["key_points"] == [question.facts[0].subject.lower(), "maker", "birthplace", "region"]


def test_summaries_pick_what_the_query_asks(known, asked):
    oracle = SearcherOracle(known, asked)
    fact = next(f for f in known if f.relation == "mood")
    passages = [Passage(str(i), title, text) for i, (title, text) in enumerate(encyclopaedia(known))]
    own = next(p for p in passages if p.title == fact.subject)
    pages = web_pages([next(p for p in passages if p.title != fact.subject), own], 1000)
    said = oracle.summarise(f"Pick.\n\nQuery: {fact.question(0)}\n\nPages:\n{pages}")
    assert said.removeprefix(f"{MARKER} ") in {fact.statement(way) for way in range(3)}
    other = oracle.summarise(f"Pick.\n\nQuery: tell me {fact.subject}\n\nPages:\n{pages}")
    assert other.removeprefix(f"{MARKER} ") == own.text
    nothing = oracle.summarise(f"Pick.\n\nQuery: who are you?\n\nPages:\n{pages}")
    assert nothing == f"{MARKER} None"
    assert oracle.summarise(f"Pick.\n\nQuery: {fact.question(0)}\n\nPages:\n") == f"{MARKER} None"


def test_bad_input_is_refused(known, asked):
    oracle = SearcherOracle(known, asked)
    for call, message in (
        (lambda: oracle.author("Question: Who are you?\nAnswer:", 0), "knows no question"),
        (lambda: oracle.author("Tell me", 0), "must hold"),
        (lambda: oracle.author(f"Question: {asked[0].text}\nAnswer: something else", 0), "no beginning of the rollout"),
        (lambda: oracle.summarise("Sum this up"), "must hold 'Query"),
        (lambda: SearcherConfig(1.5), "error must lie between 0 and 1"),
        (lambda: SearcherConfig(0.5, ("sloth",)), "no fault 'sloth'"),
        (lambda: SearcherConfig(0.5, ()), "needs faults"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert dataclasses.replace(SearcherConfig(), faults=FAULTS) == SearcherConfig()
