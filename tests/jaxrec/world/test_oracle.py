"""The world's scripted teacher: rollouts that the environment accepts, rewrites that only recall, errors on purpose."""

import numpy as np
import pytest

from jaxrec.world import generate, world_config
from jaxrec.world.encyclopaedia import facts
from jaxrec.world.oracle import Oracle, OracleConfig
from jaxrec.world.questions import encyclopaedia, questions
from rl.envs.tags import R1_SEARCHER_PP, SIMPLE_DEEP_SEARCHER


@pytest.fixture(scope="module")
def known():
    return facts(generate(world_config("tiny")))


@pytest.fixture(scope="module")
def asked(known):
    return questions(known, "train", np.random.default_rng(0), 12)


def play(oracle, question, passages, rng):
    """A whole rollout, results included."""
    style, text = oracle.style, ""
    for _ in range(5):
        new = oracle.author(f"Question: {question.text}\nAnswer:{text}", rng)
        text += new
        if not new.endswith(style.query_close):
            return text
        searched = question.facts[text.count(style.result_close) + text.count(style.internal_close or "\0")]
        text += f"\n\n{style.result_open}\n {passages[searched.subject]}\n{style.result_close}\n\n"
    raise AssertionError("the teacher never answers")


@pytest.mark.parametrize("recall", [0.0, 0.5, 1.0])
def test_every_fact_of_a_rollout_is_recalled_or_searched(known, asked, recall):
    passages, rng = dict(encyclopaedia(known)), np.random.default_rng(1)
    oracle = Oracle(asked, R1_SEARCHER_PP, OracleConfig(recall))
    shares = []
    for question in asked:
        text = play(oracle, question, passages, rng)
        recalled, searched = text.count("<internal>"), text.count("<external>")
        assert recalled + searched == question.hops
        assert text.endswith(f"\\boxed{{ {question.answer} }}")
        shares.append(recalled / question.hops)
    low, high = {0.0: (0, 0), 0.5: (0.2, 0.8), 1.0: (1, 1)}[recall]
    assert low <= np.mean(shares) <= high


def test_a_style_without_a_tag_for_recall_searches_always(asked):
    oracle = Oracle(asked, SIMPLE_DEEP_SEARCHER, OracleConfig(1.0))
    text = oracle.author(f"Question: {asked[0].text}\nAnswer:", np.random.default_rng(0))
    assert text.startswith(" <|begin_search_query|>")


def test_a_rewrite_needs_its_documents(known, asked):
    passages = dict(encyclopaedia(known))
    oracle = Oracle(asked, R1_SEARCHER_PP)
    question = next(q for q in asked if q.hops == 2)
    documents = [passages[f.subject] for f in question.facts]
    text = oracle.rewrite(question.text, documents, np.random.default_rng(0))
    assert text.count("<internal>") == 2
    assert "<external>" not in text
    assert oracle.rewrite(question.text, documents[:1], np.random.default_rng(0)) == ""


def test_errors_are_wrong_facts_of_the_right_kind(asked):
    oracle = Oracle(asked, R1_SEARCHER_PP, OracleConfig(1.0, 1.0))
    text = oracle.author(f"Question: {asked[0].text}\nAnswer:", np.random.default_rng(0))
    assert asked[0].facts[-1].fake in text
    assert f"{{ {asked[0].answer} }}" not in text


def test_bad_input_is_refused(asked):
    with pytest.raises(ValueError, match="recall must lie between 0 and 1"):
        OracleConfig(recall=1.5)
    oracle = Oracle(asked, R1_SEARCHER_PP)
    with pytest.raises(ValueError, match="knows no question"):
        oracle.author("Question: Who are you?\nAnswer:", np.random.default_rng(0))
    with pytest.raises(ValueError, match="must hold"):
        oracle.author("Tell me", np.random.default_rng(0))
