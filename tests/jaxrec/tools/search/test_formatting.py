"""Passages as text: the two styles, hard caps, and control tags that must not survive."""

import pytest

from jaxrec.tools.search import Caps, Passage, Result, failure, format_passages
from jaxrec.tools.search.base import from_json, to_json

TAGS = ("<document>", "</document>", "<external>", "\\boxed{", "<|begin_search_result|>", "**Final Information**")


def passage(title: str, text: str, **more) -> Passage:
    return Passage("7", title, text, **more)


def test_styles():
    found = [passage("Ada", "She  wrote\nnotes.", score=2.0), passage("Babbage", "He built.", url="https://b.org/x")]
    assert format_passages(found, tags=TAGS) == "(1)Ada   She wrote notes.\n(2)Babbage   He built."
    assert (
        format_passages(found, "numbered", tags=TAGS)
        == "1. Ada\nShe wrote notes.\n\n2. Babbage (https://b.org/x)\nHe built."
    )
    assert format_passages([], tags=TAGS) == "None"
    with pytest.raises(ValueError, match="unknown style 'plain'"):
        format_passages(found, "plain", tags=TAGS)
    with pytest.raises(ValueError, match="failed search"):
        format_passages(failure("timeout", "late").passages, tags=TAGS)


def test_a_failure_is_no_empty_result():
    failed = failure("quota", "no more")
    assert failed.failed
    assert failed.passages is None
    assert not Result(()).failed
    for wrong in ({"passages": None}, {"passages": None, "kind": "odd", "error": "x"}, {"passages": (), "error": "x"}):
        with pytest.raises(ValueError, match=r"failed|failure"):
            Result(**wrong)
    with pytest.raises(ValueError, match="not stored"):
        to_json(failed)
    whole = Result((passage("a", "b", score=0.1, url="u"),), failed_pages=2)
    assert from_json(to_json(whole)) == whole


def test_caps_are_hard():
    long = [passage("T", " ".join(f"w{i}" for i in range(400)))] * 9
    text = format_passages(long, tags=TAGS, caps=Caps(passage_words=150, response_words=750))
    lines = text.split("\n")
    words = [line.partition(")")[2].removesuffix(" ...").split() for line in lines]
    assert [len(w) for w in words] == [150] * 5  # title and text together; the last one is cut by neither cap alone
    assert all(line.endswith("w148 ...") for line in lines)
    text = format_passages(long, tags=TAGS, caps=Caps(passage_words=150, response_words=200))
    assert [len(line.removesuffix(" ...").split()) for line in text.split("\n")] == [150, 50]
    title = format_passages([passage("t " * 500, "x y")], tags=TAGS, caps=Caps(passage_words=10))
    assert title == f"(1){' '.join('t' * 9)}   x ..."
    no_spaces = format_passages([passage("T", "x" * 10**6)], tags=TAGS, caps=Caps(characters=1000))
    assert len(no_spaces) <= 1000
    assert no_spaces.endswith(" ...")
    with pytest.raises(ValueError, match="passage_words=0"):
        Caps(passage_words=0)


def test_tags_that_appear_only_in_the_finished_text():
    split = format_passages([passage("x", "a </docu\x00ment> b")], tags=TAGS)  # once the control character is gone
    assert "</document>" not in split
    assert "‹/document>" in split
    joined = format_passages([passage("a<b", "c>")], tags=["a<b   c>"])  # over the join of title and text
    assert "a<b   c>" not in joined
    cut = format_passages([passage("T", "x <external ...")], tags=["<external ..."])
    assert "<external ..." not in cut
    marked = format_passages([passage("T", "x <external y")], tags=["<external ..."], caps=Caps(passage_words=3))
    assert marked == "(1)T   x ‹external ..."
