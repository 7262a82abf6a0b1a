"""Sampling of questions: the worked example of SimpleDeepSearcher's algorithm, quotas, and pools that run out."""

import collections

import pytest

from jaxrec.tools.sampling import (
    AUXILIARIES,
    INTERROGATIVES,
    Candidate,
    SamplingConfig,
    complexity,
    domain_quotas,
    interrogatives,
    merge_domains,
    parse_annotation,
    sample_queries,
    take_diverse,
)

WORKED = "What is the birthdate of the person who plays X and who broke the record?"


def test_interrogatives_are_whole_words_in_any_case():
    assert (complexity(WORKED), complexity(WORKED, "total"), complexity(WORKED, "none")) == (3, 4, 0)
    counts = interrogatives("WHO'S whose; whoever, This is: Is it?")
    assert list(counts) == [*INTERROGATIVES, *AUXILIARIES]
    assert len(counts) == 16
    assert {word: n for word, n in counts.items() if n} == {"who": 1, "whose": 1, "is": 2}


def candidate(id: str, score: float = 0, points=(), domain: str = "d", text: str = "") -> Candidate:
    return Candidate(id, text or id, domain, tuple(points), score)


WORKED_EXAMPLE = [
    candidate("A", 3, ["director", "age"]),
    candidate("B", 2, ["director"]),
    candidate("C", 1, ["population"]),
    candidate("D", 1, ["age", "city"]),
]


def names(items) -> str:
    return "".join(c.id for c in items)


def test_the_greedy_sampler_reproduces_the_worked_example():
    taken, left = take_diverse(WORKED_EXAMPLE, 3, set())
    assert (names(taken), names(left)) == ("ACB", "D")
    assert names(take_diverse(WORKED_EXAMPLE, 4, set())[0]) == "ACBD"  # B and D share nothing: the second pass has both
    assert names(take_diverse(WORKED_EXAMPLE, 3, set(), diverse=False)[0]) == "ABC"
    assert names(take_diverse(WORKED_EXAMPLE[::-1], 3, set())[0]) == "ACB"


def test_equal_scores_keep_their_order():
    items = [candidate(id, 1) for id in "zya"]
    assert names(take_diverse(items, 3, set())[0]) == "zya"


def test_an_impossible_quota_ends_and_seen_texts_are_not_taken_again():
    items = [candidate("a", text="same"), candidate("b", text="same"), candidate("c", points=["k"])]
    taken, left = take_diverse(items, 100, {"c"})
    assert (names(taken), left) == ("a", [])


@pytest.mark.parametrize(
    ("total", "domains", "quotas"),
    [
        (10, "abc", {"a": 4, "b": 3, "c": 3}),
        (10, "cab", {"a": 4, "b": 3, "c": 3}),  # by name, not as given
        (2, "abc", {"a": 1, "b": 1, "c": 0}),
        (3, "a", {"a": 3}),
    ],
)
def test_quotas(total, domains, quotas):
    assert domain_quotas(domains, total) == quotas
    assert sum(domain_quotas(domains, total).values()) == total


def test_small_domains_are_merged():
    pool = [candidate(f"{d}{i}", domain=d) for d, n in (("big", 3), ("small", 2), ("tiny", 1)) for i in range(n)]
    sizes = collections.Counter(c.domain for c in merge_domains(pool, 3))
    assert sizes == {"big": 3, "other": 3}
    assert [c.id for c in merge_domains(pool, 3)] == [c.id for c in pool]


def pool(sizes: dict[str, int]) -> list[Candidate]:
    return [candidate(f"{d}{i}", points=[f"{d}{i % 2}"], domain=d) for d, n in sizes.items() for i in range(n)]


def test_shortfall_is_reported_or_redistributed():
    candidates = pool({"b": 2, "a": 20, "c": 20})
    found = sample_queries(candidates, SamplingConfig(30, min_domain=0))
    assert found.quotas == {"a": 10, "b": 10, "c": 10}
    assert found.shortfall == {"a": 0, "b": 8, "c": 0}
    assert len(found.chosen) == 22
    assert [c.domain for c in found.chosen] == ["a"] * 10 + ["b"] * 2 + ["c"] * 10
    more = sample_queries(candidates, SamplingConfig(30, min_domain=0, redistribute=True))
    assert collections.Counter(c.domain for c in more.chosen) == {"a": 14, "b": 2, "c": 14}
    assert more.shortfall == found.shortfall
    assert len({c.id for c in more.chosen}) == 30
    repeated = [candidate(str(i), text=f"t{i // 2}") for i in range(10)]  # each text twice: five can be had
    ended = sample_queries(repeated, SamplingConfig(10, min_domain=0, redistribute=True))
    assert (len(ended.chosen), ended.shortfall) == (5, {"d": 5})


def test_the_whole_sampler_is_deterministic_and_diverse():
    texts = ["Who and who?", "Is it?", "What is it?", "Where?", "It was."]
    candidates = [candidate(str(i), points=["k"], text=t, domain="xy"[i % 2]) for i, t in enumerate(texts)]
    config = SamplingConfig(4, min_domain=0)
    assert names(sample_queries(candidates, config).chosen) == "0231"
    assert sample_queries(candidates, config) == sample_queries(candidates, config)
    assert names(sample_queries(candidates, SamplingConfig(3, score="total", by_domain=False)).chosen) == "021"
    assert names(sample_queries(candidates, SamplingConfig(3, score="none", by_domain=False)).chosen) == "012"
    everything = sample_queries(candidates, SamplingConfig(5))  # both domains are below 500
    assert everything.quotas == {"other": 5}
    assert not any(everything.shortfall.values())


def test_bad_pools_are_named():
    with pytest.raises(ValueError, match="total=0 must be at least 1"):
        SamplingConfig(0)
    with pytest.raises(ValueError, match="score must be one of special, total, none, not 'all'"):
        SamplingConfig(1, score="all")
    with pytest.raises(ValueError, match="total=3 questions were asked for; the pool has 1"):
        sample_queries([candidate("a")], SamplingConfig(3))
    with pytest.raises(ValueError, match="id 'a' of a question occurs twice"):
        sample_queries([candidate("a"), candidate("a")], SamplingConfig(1))
    with pytest.raises(ValueError, match="question 'a' has no text or no domain"):
        sample_queries([candidate("a", text=" ")], SamplingConfig(1))


GOOD = '{"domain": " Film ", "key_points": ["Director", "age", "age"]}'


@pytest.mark.parametrize("reply", [GOOD, f"{{}} hm</think>\n{GOOD}", f"<think>x</think>{GOOD}\n\nHope this helps."])
def test_annotations(reply):
    assert parse_annotation(reply) == ("film", ("director", "age"))


@pytest.mark.parametrize(
    "reply",
    ["", "Film", GOOD[:-1], "[1]", '{"domain": "x"}', '{"domain": "", "key_points": ["a"]}', "[" * 99_999,
     '{"domain": "x", "key_points": "a"}', '{"domain": "x", "key_points": [1]}', '{"domain": "x", "key_points": []}'],
)  # fmt: skip
def test_replies_without_an_annotation_are_none(reply):
    assert parse_annotation(reply) is None
