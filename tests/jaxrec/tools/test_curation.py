"""Curation of rollouts: SimpleDeepSearcher's filters at their bounds, who wins, and that nothing goes uncounted."""

import dataclasses
import itertools
from collections import Counter

import pytest

from jaxrec.data.qa import Question
from jaxrec.tools.curation import (
    REFLECTIONS,
    CurationConfig,
    Drop,
    Ledger,
    canonical_url,
    count_reflections,
    curate,
    describe,
    faults,
    final_faults,
    has_bad_marker,
    is_dropped_as_easy,
    is_valid_history,
    top_trigram_share,
)
from jaxrec.tools.rollouts import Rollout, Search
from jaxrec.tools.samples import to_sample
from rl.envs.tags import SIMPLE_DEEP_SEARCHER, TagStyle

QUERY = "I look it up.<|begin_search_query|>{}<|end_search_query|>"
RESULT = "\n\n<|begin_search_result|>{}<|end_search_result|>\n\n"
FINAL = "So it is Ann.</think>\n\n\\boxed{Ann}"
CONFIG = CurationConfig(rollouts=0)
RIGHT, WRONG = {"em": 1.0, "cover": 1.0, "f1": 1.0}, {"em": 0.0, "cover": 0.0, "f1": 0.0}


def question(id: str = "q") -> Question:
    return Question(id, f"Who is {id}?", ("Ann",), "test")


def search(number: int, pages: int = 10, start: int = 0) -> Search:
    urls = tuple(f"https://x.org/{number}/{i}" for i in range(start, start + pages))
    return Search(f"query {number}", urls, tuple(f"page {number} {i}" for i in range(pages)))


def rollout(searches: int = 1, id: str = "q", final: str = FINAL, metrics=RIGHT, **changes) -> Rollout:
    """A rollout that every filter passes, unless the searches are none."""
    segments = []
    for i in range(searches):
        segments += [("policy", QUERY.format(f"query {i}")), ("tool", RESULT.format(f"fact {i}"))]
    fields = {"searches": tuple(search(i) for i in range(searches)), "metrics": metrics, "prompt": "P", **changes}
    return Rollout(id, (*segments, ("policy", final)), **fields)


def why(a: Rollout, config: CurationConfig = CONFIG) -> list[str]:
    return faults(describe(a, config), config)


def words(count: int, end: str = "") -> str:
    """So many words, none of them a repetition: they are in no order of three that comes twice."""
    return " ".join(f"w{i}" for i in range(count - len(end.split()))) + (f" {end}" if end else "")


def test_a_plain_rollout_is_valid_and_one_without_search_is_not():
    assert why(rollout(1)) == why(rollout(5)) == []
    assert why(rollout(0)) == ["too few distinct pages"]
    assert why(rollout(0), dataclasses.replace(CONFIG, search=False)) == []
    assert why(rollout(metrics=WRONG)) == ["wrong answer"]


@pytest.mark.parametrize(("count", "reasons"), [(299, []), (300, ["first turn too long", "turn too long"])])
def test_the_first_turn_is_short(count, reasons):
    first = words(count, "<|begin_search_query|>q<|end_search_query|>")
    segments = (("policy", first), *rollout().segments[1:])
    found = Rollout("q", segments, (search(0),), metrics=RIGHT)
    meta = describe(found, CONFIG)
    assert (meta.first_len, meta.max_len) == (count, count)
    assert faults(meta, CONFIG) == reasons


@pytest.mark.parametrize(("count", "reasons"), [(299, []), (300, ["turn too long"])])
def test_every_turn_is_short(count, reasons):
    found = rollout(final=words(count, "x</think> \\boxed{Ann}"))
    assert describe(found, CONFIG).max_len == count
    assert why(found) == reasons


def test_the_first_turn_is_split_at_blanks_and_the_others_at_white_space():
    meta = describe(rollout(0, final="a  b\nc</think>"), CONFIG)
    assert (meta.first_len, meta.max_len) == (3, 3)  # "a", "", "b\nc</think>"; a, b, c</think>


@pytest.mark.parametrize("word", REFLECTIONS)
def test_reflections_per_turn(word):
    for count, reasons in ((3, []), (4, [f"too many {word!r}"])):
        said = rollout(final=f"{word.upper()}, " * 2 + f"{word} " * (count - 2) + FINAL)
        assert describe(said, CONFIG).reflections[word] == count
        assert why(said) == reasons
    spread = Rollout(
        "q", (("policy", f"{word} " * 3 + QUERY.format("a")), HISTORY[1], ("policy", f"{word} {FINAL}")), (search(0),),
        metrics=RIGHT,
    )  # fmt: skip
    assert describe(spread, CONFIG).reflections[word] == 3  # most in one turn


def test_reflections_as_released_are_substrings_with_that_case():
    text = "Alternatively alternatively Hmm hmm, Wait wait awaiting waiter"
    assert count_reflections(text) == {"alternatively": 2, "hmm": 2, "wait": 2}
    assert count_reflections(text, official=True) == {"alternatively": 1, "hmm": 1, "wait": 3}
    official = dataclasses.replace(CONFIG, official_counts=True)
    assert describe(rollout(final=f"{text} {FINAL}"), official).reflections["wait"] == 3


def pages(*groups: tuple[int, int]) -> Rollout:
    """One search for each (first page, number of pages)."""
    found = tuple(Search("q", tuple(f"https://x.org/{i}" for i in range(low, low + n))) for low, n in groups)
    return dataclasses.replace(rollout(len(groups)), searches=found)


def test_distinct_pages_per_search():
    assert describe(pages((0, 10), (9, 10)), CONFIG).url_per_search == 9.5  # 19 pages of two searches
    assert why(pages((0, 10), (9, 10))) == ["too few distinct pages"]
    assert why(pages((0, 10), (10, 10))) == []
    fives = pages((0, 10), (10, 10), (20, 10), (30, 10), (38, 10))  # 48 pages of five searches
    assert describe(fives, CONFIG).url_per_search == pytest.approx(9.6)
    assert why(fives) == []
    failed = dataclasses.replace(rollout(2), searches=(search(0), Search("query 1", failed=True)))
    assert why(failed) == ["too few distinct pages"]


def test_pages_are_counted_by_address_not_by_title():
    same = ["http://X.org:80/a/", "http://x.org/a", "http://x.org/a#part"]
    assert {canonical_url(url) for url in same} == {"http://x.org/a"}
    other = [
        "https://x.org/a",
        "http://x.org:8080/a",
        "http://x.org/a?p=1",
        "http://x.org/A",
        "wiki:12",
        "12",
        "http://[x",
    ]
    assert len({canonical_url(url) for url in [*same, *other]}) == 8
    assert [canonical_url(url) for url in ("wiki:12", " 12 ", "http://[x")] == ["wiki:12", "12", "http://[x"]


def test_repetition():
    assert top_trigram_share("x y z x y z x y z") == pytest.approx(3 / 7)
    assert top_trigram_share("x y") == 0
    said = rollout(final="x " * 60 + FINAL)
    assert why(said) == ["repeats itself"]
    short = rollout(0, final="x y z x y z x y z")
    off = dataclasses.replace(CONFIG, search=False, format=False)
    assert why(short, off) == []  # fewer than 30 words
    assert why(short, dataclasses.replace(off, min_words=0)) == ["repeats itself"]
    assert why(short, dataclasses.replace(off, min_words=0, path=False)) == []


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("<|begin_search_query|>q<|end_search_query|>", False),
        ("<begin_search_query>q<|end_search_query|>", True),
        ("<|begin_search_query|>q<|end_search_query>", True),
        ("begin_search_result", True),
        ("< |end_search_result|>", True),
        ("search query, begin search result", False),
        ("</think></think>", False),
        ("</think>" * 3, True),
    ],
)
def test_bad_markers(text, bad):
    assert has_bad_marker(text, SIMPLE_DEEP_SEARCHER) is bad
    assert ("bad marker" in why(rollout(final=f"{text} {FINAL}"))) == (bad or text == "</think></think>")


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("<external>q</external> an external view, https://x.org/document", False),
        ("internal | document", False),
        ("< external>q</external>", True),
        ("<|external|>q", True),
        ("/external>", True),
        ("<documents>", False),
    ],
)
def test_bad_markers_of_tags_that_are_words(text, bad):
    tags = TagStyle("other", "<external>", "</external>", "<document>", "</document>")
    assert has_bad_marker(text, tags) is bad


HISTORY = [("policy", QUERY.format("a")), ("tool", RESULT.format("b")), ("policy", FINAL)]


def test_valid_histories():
    assert is_valid_history(HISTORY, SIMPLE_DEEP_SEARCHER)
    assert is_valid_history(HISTORY[2:], SIMPLE_DEEP_SEARCHER)
    assert is_valid_history(HISTORY[:2] * 3 + HISTORY[2:], SIMPLE_DEEP_SEARCHER)
    assert is_valid_history([("policy", "Ann")], SIMPLE_DEEP_SEARCHER, think_close="")


@pytest.mark.parametrize(
    "history",
    [
        [HISTORY[1], HISTORY[0]],  # not of the last turn: no matter; see below
        [("policy", RESULT.format("a")), ("tool", QUERY.format("b")), HISTORY[2]],  # tags swapped
        [*HISTORY[:2], ("policy", FINAL + "</think>")],
        [*HISTORY[:2], ("policy", QUERY.format("c") + FINAL)],
        [*HISTORY[:2], ("policy", "Ann")],  # no end of thinking
        [("policy", FINAL), *HISTORY],  # an end of thinking before the last turn
        [("policy", QUERY.format("<|begin_search_query|>a")), *HISTORY[1:]],  # a nested tag
        [("policy", QUERY.format("a") + QUERY.format("a")), *HISTORY[1:]],
        [("policy", "a<|end_search_query|>"), *HISTORY[1:]],
        [("policy", QUERY.format("a") + " and more"), *HISTORY[1:]],
        [HISTORY[0], ("tool", RESULT.format("</think>")), HISTORY[2]],
        [HISTORY[0], ("tool", "no tags"), HISTORY[2]],
        [HISTORY[0], ("tool", "<|begin_search_result|>"), HISTORY[2]],
        [HISTORY[0], ("policy", RESULT.format("made up")), HISTORY[2]],  # a result that the policy wrote
        [("policy", QUERY.format("a") + RESULT.format("made up") + FINAL)],
    ],
)  # fmt: skip
def test_invalid_histories(history):
    assert is_valid_history(history, SIMPLE_DEEP_SEARCHER) is (history == [HISTORY[1], HISTORY[0]])


def test_a_fabricated_result_makes_a_rollout_invalid():
    made_up = Rollout(
        "q", ((*HISTORY[0],), ("policy", RESULT.format("made up")), HISTORY[2]), (search(0),), metrics=RIGHT
    )
    assert why(made_up) == ["broken turns"]
    assert why(made_up, dataclasses.replace(CONFIG, format=False)) == []


def chosen(rollouts, config=CONFIG, ids=("q",)) -> list[tuple[str, int]]:
    out = curate([question(id) for id in ids], rollouts, config)
    return [(sample.id, sample.search_count) for sample in out.samples]


def test_the_fewest_searches_win_among_valid_rollouts():
    bad = rollout(1, final=f"<begin_search_query> {FINAL}")
    wrong = rollout(1, metrics=WRONG)
    assert chosen([rollout(4), rollout(2), rollout(3), bad, wrong]) == [("q", 2)]
    assert chosen([rollout(4), rollout(2), wrong], dataclasses.replace(CONFIG, search=False)) == [("q", 4)]
    out = curate([question()], [rollout(4), rollout(2), bad, wrong], CONFIG)
    assert out.samples[0].min_search == 1  # fewest of a correct rollout, valid or not
    assert out.rollouts.reasons == {"another rollout was chosen": 1, "bad marker": 1, "wrong answer": 1}
    assert out.rollouts.drops[0] == Drop("q", 0, "another rollout was chosen")
    assert (out.questions.taken, out.questions.kept, out.questions.drops) == (1, 1, ())


def test_questions_without_a_rollout_to_show():
    assert chosen([rollout(metrics=WRONG)] * 10) == []
    out = curate([question()], [rollout(metrics=WRONG)] * 10, CONFIG)
    assert out.questions.drops == (Drop("q", -1, "no correct rollout"),)
    out = curate([question()], [rollout(0), rollout(metrics=WRONG)], CONFIG)
    assert out.questions.reasons == {"no valid rollout": 1}


def test_questions_that_are_always_answered_are_dropped_by_chance():
    ids = [f"q{i}" for i in range(1000)]
    config = CurationConfig(rollouts=2)
    rollouts = [rollout(id=id) for id in ids for _ in range(2)]
    out = curate([question(id) for id in ids], rollouts, config)
    kept = {sample.id for sample in out.samples}
    assert 160 <= len(kept) <= 240  # 200 expected, standard deviation 12.6
    assert out.questions.reasons == {"easy question": 1000 - len(kept)}
    assert out.rollouts.reasons == {"easy question": 2 * (1000 - len(kept)), "another rollout was chosen": len(kept)}
    again = curate([question(id) for id in ids[::-1]], rollouts, config)  # another order of the questions
    assert {sample.id for sample in again.samples} == kept
    other = dataclasses.replace(config, seed=43)
    assert {id for id in ids if not is_dropped_as_easy(id, 1.0, other)} != kept
    assert (
        len(curate([question(id) for id in ids], rollouts, dataclasses.replace(config, difficulty=False)).samples)
        == 1000
    )
    assert not any(is_dropped_as_easy(id, 0.9, config) for id in ids)
    assert all(is_dropped_as_easy(id, 0.9, dataclasses.replace(config, easy_ratio=0.9, easy_drop=1.0)) for id in ids)


def test_hard_questions_come_first_then_those_that_need_many_searches():
    wrong = {id: [rollout(id=id, metrics=WRONG)] for id in "abcd"}
    rollouts = [rollout(1, "a"), *wrong["a"], rollout(3, "b"), *wrong["b"], rollout(2, "c"), *wrong["c"] * 3]
    assert chosen(rollouts, ids="abc") == [("c", 2), ("b", 3), ("a", 1)]
    assert chosen(rollouts, dataclasses.replace(CONFIG, difficulty=False), "abc") == [("a", 1), ("b", 3), ("c", 2)]
    out = curate([question(id) for id in "abc"], rollouts, dataclasses.replace(CONFIG, keep=2))
    assert [sample.id for sample in out.samples] == ["c", "b"]
    assert out.questions.drops == (Drop("a", -1, "beyond the first 2"),)


FINAL_CASES = [
    ({}, "I \\boxed{Ann} </think>\n\n\\boxed{Ann}", "box before the end of thinking", "format"),
    ({}, "中 " + FINAL, "CJK characters", "format"),
    ({"metrics": RIGHT | {"em": 0.0}}, FINAL, "right but not exact", "format"),
]


@pytest.mark.parametrize(("changes", "final", "reason", "switch"), FINAL_CASES)
def test_the_final_check(changes, final, reason, switch):
    rollouts = [rollout(final=final, **changes), rollout(metrics=WRONG)]
    out = curate([question()], rollouts, CONFIG)
    assert out.samples == ()
    assert out.questions.reasons == {reason: 1}
    assert out.rollouts.reasons == {reason: 1, "wrong answer": 1}
    assert len(curate([question()], rollouts, dataclasses.replace(CONFIG, **{switch: False})).samples) == 1


def final(a: Rollout, **changes) -> list[str]:
    return final_faults(to_sample(a, question(), 1, SIMPLE_DEEP_SEARCHER), dataclasses.replace(CONFIG, **changes))


def test_the_final_check_of_words_reads_the_policy_or_everything():
    tool = Rollout("q", (HISTORY[0], ("tool", RESULT.format("Alternatively " * 4 + "中")), HISTORY[2]), metrics=RIGHT)
    assert final(tool) == []
    assert final(tool, official_check=True) == ["too many 'alternatively' in all", "CJK characters"]
    assert final(tool, official_check=True, reject_cjk=False, path=False) == []
    turn = ("policy", "alternatively Alternatively " + QUERY.format("a"))
    for more, reasons in ((1, []), (2, ["too many 'alternatively' in all"])):  # never more than three in a turn
        last = ("policy", "Alternatively, " * more + FINAL)
        spread = Rollout("q", (turn, HISTORY[1], last), metrics=RIGHT)
        assert final(spread) == reasons


@pytest.mark.parametrize(("count", "reasons"), [(3000, []), (3001, ["too long in all"])])
def test_the_final_check_of_length(count, reasons):
    sample = Rollout("q", tuple(HISTORY), metrics=RIGHT)
    more = " " * (count - len(sample.text.split(" ")))  # each blank parts two pieces
    sample = Rollout("q", (HISTORY[0], ("tool", RESULT.format(more + "b")), HISTORY[2]), metrics=RIGHT)
    assert len(sample.text.split(" ")) == count
    assert final(sample) == reasons


def test_rewriting_must_keep_the_answer():
    two = rollout(final="Hm.</think>\n\n\\boxed{Bob} no, \\boxed{Ann}")  # the first is kept, the last was scored
    out = curate([question()], [two, rollout(metrics=WRONG)], CONFIG)
    assert out.questions.reasons == {"rewriting changes the answer": 1}
    none = rollout(final="Ann</think>")
    assert curate([question()], [none, rollout(metrics=WRONG)], CONFIG).questions.reasons == {
        "no box after the thinking": 1
    }
    kept = curate([question()], [none, rollout(metrics=WRONG)], dataclasses.replace(CONFIG, format=False))
    assert kept.samples[0].output[-1] == ("gen", "Ann</think>")


def test_a_whole_pool_adds_up_whatever_is_switched_off():
    finals = [FINAL, "x " * 60 + FINAL, "wait " * 4 + FINAL, f"<end_search_query> {FINAL}", "中" + FINAL, "Ann"]
    ids = [f"q{i}" for i in range(8)]
    rollouts = [
        rollout((i + j) % 3, id, finals[(2 * i + j) % len(finals)], WRONG if j > i else RIGHT)
        for i, id in enumerate(ids)
        for j in range(1, 6)
    ]
    sizes = {}
    for switches in itertools.product((True, False), repeat=4):
        names = dict(zip(("format", "path", "difficulty", "search"), switches))
        out = curate([question(id) for id in ids], rollouts, CurationConfig(rollouts=5, **names))
        for ledger, total in ((out.rollouts, len(rollouts)), (out.questions, len(ids))):
            assert ledger.taken == total == len(out.samples) + sum(ledger.reasons.values())
        assert max(Counter((d.id, d.rollout) for d in out.rollouts.drops).values()) == 1
        assert len({s.id for s in out.samples}) == len(out.samples)
        sizes[switches] = len(out.samples)
    assert 0 < sizes[(True,) * 4] < sizes[(False,) * 4] == 7  # the first question has no correct rollout
    assert len(set(sizes.values())) > 2  # the filters do something


def test_ledgers_that_do_not_add_up_are_refused():
    with pytest.raises(AssertionError, match="3 records in, 1 out and 1 dropped do not add up"):
        Ledger(3, 1, (Drop("q", 0, "x"),))


def test_bad_pools_are_named():
    with pytest.raises(ValueError, match="question 'q' has 2 rollouts, not 10"):
        curate([question()], [rollout()] * 2, CurationConfig())
    with pytest.raises(ValueError, match="question 'q' has 0 rollouts, not at least 1"):
        curate([question()], [], CONFIG)
    with pytest.raises(ValueError, match="a rollout is of question 'other', which is none of the 1 questions"):
        curate([question()], [rollout(id="other")], CONFIG)
    with pytest.raises(ValueError, match="1 ids of questions occur twice"):
        curate([question(), question()], [rollout()], CONFIG)
    with pytest.raises(ValueError, match="rollout of question 'q' has no em and cover"):
        curate([question()], [rollout(metrics={})], CONFIG)
    with pytest.raises(ValueError, match=r"easy_drop=1.5 must lie in \[0, 1\]"):
        CurationConfig(easy_drop=1.5)
    with pytest.raises(ValueError, match="max_turn=-1 must not be negative"):
        CurationConfig(max_turn=-1)
