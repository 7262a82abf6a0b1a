"""Answer metrics: worked cases of the papers, values of the official evaluations, aliases, answers that are nothing.

The table's values were computed by the rules of the evaluation scripts of SQuAD 1.1, HotpotQA and R1-Searcher.
"""

from __future__ import annotations

import pytest

from jaxrec.evaluate.answers import (
    COVER_FORMS,
    NORMALIZATIONS,
    R1_SEARCHER,
    SIMPLE_DEEP_SEARCHER,
    Protocol,
    cover_em,
    exact_match,
    last_boxed,
    normalize_answer,
    parse_verdict,
    score_answer,
    short_cover_em,
    sub_em,
    token_f1,
)

METRICS = [exact_match, sub_em, cover_em, token_f1]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  The  Beatles!", "beatles"),
        ("An apple, a day; the end.", "apple day end"),
        ("U.S.A.", "usa"),
        ("well-known Theatre", "wellknown theatre"),
        ("a-b", "ab"),  # punctuation goes first, so this "a" is no article
        ("The", ""),
        ("?!", ""),
        ("Ünïcode\tCafé\n", "ünïcode café"),
    ],
)
def test_normalisation_is_squads(text: str, normal: str):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answer", "plain", "words"),
    [
        ("Yes.", "yes", 1, 1),
        ("The Beatles", "beatles", 1, 1),
        ("113", "13", 1, 0),
        ("13", "113", 0, 0),
        ("It was the Beatles, in 1963.", "Beatles", 1, 1),
        ("", "yes", 0, 0),
        ("yes", "", 0, 0),
        ("the", "a", 0, 0),
        ("no idea", "new york city", 0, 0),
    ],
)
def test_sub_em(prediction: str, answer: str, plain: int, words: int):
    assert sub_em(prediction, answer) == plain
    assert sub_em(prediction, answer, word_boundary=True) == words


@pytest.mark.parametrize("metric", METRICS)
def test_the_best_alias_counts_and_nothing_never_matches(metric):
    assert metric("Paris", ["Lyon", "paris"]) == 1
    assert metric("Paris", ["Lyon", "Nice"]) == 0
    assert metric("", ["", "the"]) == metric("...", ["..."]) == 0
    with pytest.raises(ValueError, match="no right answers"):
        metric("Paris", [])
    with pytest.raises(ValueError, match="are texts, not 13"):
        metric("13", [13])


def test_exact_match():
    assert exact_match("The Eiffel tower.", "eiffel tower") == 1
    assert exact_match("The Eiffel tower in Paris", "eiffel tower") == 0


@pytest.mark.parametrize(
    ("prediction", "answer", "tokens", "run", "substring"),
    [
        ("City of New York", "New York City", 1, 0, 0),
        ("The city is New York City.", "New York City", 1, 1, 1),
        ("artist", "art", 0, 0, 1),
        ("york", "york york", 1, 0, 0),  # multiplicity does not count
        ("new orleans", "new york", 0, 0, 0),
    ],
)
def test_cover_em(prediction: str, answer: str, tokens: int, run: int, substring: int):
    assert [cover_em(prediction, answer, form) for form in ("tokens", "run", "substring")] == [tokens, run, substring]
    assert cover_em(prediction, answer) == tokens


def test_token_f1():
    assert token_f1("red blue", "blue green yellow") == pytest.approx(2 / 5)  # precision 1/2, recall 1/3
    assert token_f1("blue blue", "blue") == pytest.approx(2 / 3)
    assert token_f1("the blue", "blue") == 1
    assert token_f1("red", "blue") == 0
    assert token_f1("one two", ["three", "two", "one two three"]) == pytest.approx(0.8)


def test_unknown_forms_are_named():
    with pytest.raises(ValueError, match="form must be one of tokens, run, substring, overlap, not 'words'"):
        cover_em("a", "b", form="words")
    with pytest.raises(ValueError, match="normalization must be one of squad, r1_searcher, not 'official'"):
        token_f1("a", "b", normalization="official")


# prediction, answer, SQuAD's EM, SQuAD's F1, HotpotQA's F1, R1-Searcher's EM and F1, why
OFFICIAL = [
    ("The Beatles", "Beatles", 1, 1, 1, 1, 1, "articles go"),
    ("an apple a day", "apple day", 1, 1, 1, 1, 1, "articles go within a text too"),
    ("vitamin A", "vitamin", 1, 1, 1, 1, 1, "a name may look like an article"),
    ("theatre", "the atre", 0, 0, 0, 0, 0, "an article is a whole word"),
    ("a-ha", "A-ha", 1, 1, 1, 1, 1, "punctuation goes before articles"),
    ("U.S.A.", "USA", 1, 1, 1, 0, 0, "deleted: usa; spaced: u s, without the article a"),
    ("U.S.A.", "U S A", 0, 0, 0, 1, 1, "spaced: u s twice"),
    ("well-known", "well known", 0, 0, 0, 1, 1, "a hyphen joins or parts"),
    ("1,000", "1000", 1, 1, 1, 0, 0, "thousands"),
    ("3.14", "314", 1, 1, 1, 0, 0, "a decimal point is punctuation"),
    ("9/11", "911", 1, 1, 1, 0, 0, "a stroke is punctuation"),
    ("-5", "5", 1, 1, 1, 1, 1, "a minus is punctuation"),
    ("$5 million", "5 million", 1, 1, 1, 1, 1, "so is a currency's sign in ASCII"),
    ("20 June 1837", "June 20, 1837", 0, 1, 1, 0, 1, "F1 knows no order"),
    ("No, it is not known", "no", 0, 1 / 3, 0, 0, 0, "HotpotQA's rule of yes and no"),
    ("yes yes", "yes", 0, 2 / 3, 0, 0, 0, "the rule wants equal texts"),
    ("no", "No.", 1, 1, 1, 1, 1, "equal after normalisation"),
    ("noanswer", "no answer", 0, 0, 0, 0, 0, "noanswer is one word"),
    ("True", "yes", 0, 0, 0, 1, 1, "R1-Searcher reads True as yes"),
    ("true", "yes", 0, 0, 0, 0, 0, "written like that only"),
    ("False", "no", 0, 0, 0, 1, 1, "and False as no"),
    ("don't", "dont", 1, 1, 1, 0, 0, "an apostrophe joins or parts"),
    ("don’t", "don't", 0, 0, 0, 1, 1, "a typographic one is punctuation to R1-Searcher alone"),
    ("O´Brien", "O Brien", 0, 0, 0, 1, 1, "so is an acute accent alone"),
    ("“Hamlet”", "Hamlet", 0, 0, 0, 0, 0, "double typographic quotes are to neither"),
    ("1990– 1995", "1990 1995", 0, 0.5, 0.5, 0, 0.5, "nor is a dash"),
    ("new_york", "New York", 0, 0, 0, 1, 1, "an underscore joins or parts"),
    ("Beyoncé", "Beyonce", 0, 0, 0, 0, 0, "accents count"),
    ("Straße", "strasse", 0, 0, 0, 0, 0, "lower case, not case folding"),
    ("x\u00a0y", "x y", 1, 1, 1, 1, 1, "any white space parts words"),
    ("red red blue", "red blue blue", 0, 2 / 3, 2 / 3, 0, 2 / 3, "words count as often as they occur in both"),
    ("city of new york", "New York City", 0, 6 / 7, 6 / 7, 0, 6 / 7, "precision 3/4, recall 1"),
    ("artist", "The Art", 0, 0, 0, 0, 0, "whole words"),
    ("", "yes", 0, 0, 0, 0, 0, "nothing said"),
]


@pytest.mark.parametrize(("said", "gold", "em", "squad", "hotpot", "r1_em", "r1_f1", "why"), OFFICIAL)
def test_scores_are_those_of_the_official_evaluations(said, gold, em, squad, hotpot, r1_em, r1_f1, why):
    assert exact_match(said, gold) == em, why
    assert token_f1(said, gold) == pytest.approx(squad), why
    assert token_f1(said, gold, yes_no=True) == pytest.approx(hotpot), why
    assert exact_match(said, gold, "r1_searcher") == r1_em, why
    assert token_f1(said, gold, "r1_searcher", yes_no=True) == pytest.approx(r1_f1), why


@pytest.mark.parametrize(
    ("text", "normal"),
    [("U.S.A.", "u s"), ("a-b", "b"), ("new_york", "new york"), ("True", "yes"), ("True.", "true"), ("‘The’ `A´", "")],
)
def test_normalisation_of_r1_searcher(text: str, normal: str):
    assert normalize_answer(text, "r1_searcher") == normal


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(("said", "gold"), [row[:2] for row in OFFICIAL])
def test_relations_between_the_scores(normalization: str, said: str, gold: str):
    normal = normalize_answer(said, normalization)
    assert normalize_answer(normal, normalization) == normal
    em, f1 = exact_match(said, gold, normalization), token_f1(said, gold, normalization)
    cover = {form: cover_em(said, gold, form, normalization) for form in COVER_FORMS}
    assert em <= cover["run"] <= cover["overlap"] <= cover["substring"] <= 1
    assert em <= cover["run"] <= cover["tokens"] <= float(f1 > 0)
    assert em <= f1 == pytest.approx(token_f1(gold, said, normalization))
    assert token_f1(said, gold, normalization, yes_no=True) <= f1
    both = [token_f1(said, [gold, other], normalization) for other in ("elsewhere", said or "x")]
    assert both[0] == pytest.approx(f1)
    assert both[1] == pytest.approx(1 if normal else 0)


def test_worked_examples_of_simple_deep_searcher():
    """arXiv 2505.16834, section 9 of the notes on its evaluation."""
    said = "No, it is not known"
    assert [exact_match(said, "no"), cover_em(said, "no", "run")] == [0, 1]
    assert token_f1(said, "no") == pytest.approx(0.3333, abs=1e-4)
    for form, value in {"tokens": 0, "run": 0, "overlap": 0, "substring": 1}.items():
        assert cover_em("artist", "The Art", form) == value
    assert exact_match("artist", "The Art") == token_f1("artist", "The Art") == 0
    assert cover_em("new yorker york", "new york", "overlap") == 1  # a shared word is not the whole answer
    assert cover_em("new yorker york", "new york", "run") == 0


def test_worked_examples_of_r1_searcher():
    """arXiv 2505.17005: cover forms of section 9, and the answer reward's bound of ten words."""
    for said, gold, tokens, run, substring in [
        ("City of New York", "New York City", 1, 0, 0),
        ("artist", "art", 0, 0, 1),
    ]:
        found = [cover_em(said, gold, form, "r1_searcher") for form in ("tokens", "run", "substring")]
        assert found == [tokens, run, substring]
    ten = "it was Ann of Oslo who wrote it in 1990"
    assert len(ten.split()) == 10
    assert short_cover_em(ten, ["Bob", "Ann"]) == 1
    assert short_cover_em(f"{ten} then", ["Bob", "Ann"]) == 0
    assert short_cover_em("City of New York", "New York City") == 0
    assert short_cover_em("City of New York", "New York City", Protocol("r1_searcher", "tokens", True)) == 1
    hedge = "Avatar Titanic Titanic Avatar"
    assert short_cover_em(hedge, "Titanic") == 1


def test_protocols_score_by_their_rules():
    said = "well-known: no"
    assert score_answer(said, ["well known no"], SIMPLE_DEEP_SEARCHER) == {"em": 0, "cover": 0, "f1": 0.4}
    assert score_answer(said, ["well known no"], R1_SEARCHER) == {"em": 1, "cover": 1, "f1": 1}
    assert score_answer(said, ["no"], SIMPLE_DEEP_SEARCHER)["f1"] == pytest.approx(2 / 3)
    assert score_answer(said, ["no"], R1_SEARCHER) == {"em": 0, "cover": 1, "f1": 0}


def test_the_best_of_two_golds_for_each_score():
    golds = ["red", "blue green yellow grey"]
    said = "the red and blue green yellow"
    assert cover_em(said, golds, "run") == 1  # of the first
    assert token_f1(said, golds) == pytest.approx(2 * 3 / (5 + 4))  # of the second


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{A} and \boxed{B}", "B"),
        (r"so \boxed{\text{New York}}.", "New York"),
        (r"\boxed{12\text{ km}}", "12 km"),
        (r"\boxed{(\text{a}) or (b)}", "(a) or (b)"),
        (r"\boxed{( (B) )}", "B"),
        (r"\boxed{Paris (France)}", "Paris (France)"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a \} b}", r"a \} b"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("\\boxed{two\nlines}", "two\nlines"),
        (r"\boxed{A} and \boxed{B", "A"),  # never closed
        (r"\boxed{outer \boxed{inner}}", "inner"),
        (r"} \boxed{A} }", "A"),
        (r"{ \boxed{A}", "A"),
        (r"\boxed{}", ""),
        (r"\boxed{", ""),
        (r"boxed{A}", ""),
        ("no box", ""),
        ("", ""),
    ],
)
def test_the_last_box(text: str, answer: str):
    assert last_boxed(text) == answer


def test_boxes_of_hostile_texts_are_found_in_linear_time():
    deep = 30_000
    assert last_boxed(r"\boxed{" * deep) == ""
    assert last_boxed(r"\boxed{" * deep + "x" + "}" * deep) == "x"
    assert last_boxed(r"\boxed{" + r"\text{" * deep + "x" + "}" * deep + "}") == "x"
    assert last_boxed(r"\boxed{" + "(" * deep + "x" + ")" * deep + "}") == "x"


def test_a_missing_prediction_scores_nothing():
    said = last_boxed("I do not know.")
    assert [exact_match(said, "no"), token_f1(said, "no"), *(cover_em(said, "no", form) for form in COVER_FORMS)] == [
        0
    ] * 6


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("True", True),
        ("False", False),
        ("True.", None),
        ("true", None),
        (" True", None),
        ("", None),
        ("True False", None),
    ],
)
def test_verdicts_are_exact(reply: str, verdict: bool | None):
    assert parse_verdict(reply) is verdict
