"""Answer metrics: the worked cases of the papers, aliases, and answers that are nothing."""

from __future__ import annotations

import pytest

from jaxrec.evaluate.answers import cover_em, exact_match, normalize_answer, sub_em, token_f1

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
    with pytest.raises(ValueError, match="form must be one of tokens, run, substring, not 'words'"):
        cover_em("a", "b", form="words")
