"""Segments of a prompt: where the key stands, what overlaps, and when too many samples are skipped."""

import numpy as np
import pytest

from analysis.segments import check_skipped, find_key, pad_labels, prompt_segments

TEXT = "Paris is old. Rome lies in Italy, and Rome is older. Where is Rome?"
PASSAGE = (14, 52)


def words(text):
    """Character spans of words, each with the white space before it, and of single marks."""
    spans, start = [], 0
    for at, mark in enumerate(text):
        if mark in " .,?" and at > start:
            spans.append((start, at))
            start = at
        if mark in ".,?":
            spans.append((at, at + 1))
            start = at + 1
    return [(0, 0), *spans]


def test_labels_of_a_prompt():
    labels = prompt_segments(12, (1, 6), [(2, 4)], (7, 9), (10, 12))
    assert labels.dtype == np.int32
    assert labels.tolist() == [-1, 0, 1, 1, 0, 0, -1, 2, 2, -1, 3, 3]
    closed = prompt_segments(4, (0, 0), [], (0, 2), (2, 3))
    assert closed.tolist() == [2, 2, 3, -1]
    padded = pad_labels([labels, closed], 13)
    assert padded.shape == (2, 13)
    assert padded[1].tolist() == [2, 2, 3] + [-1] * 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": [(7, 9)]}, "key .7, 9. ends behind the start of query .7, 9.: the question must follow"),
        ({"keys": [(0, 2)]}, "does not lie in passage .1, 6."),
        ({"keys": [(2, 4), (3, 5)]}, "keys .2, 4. and .3, 5. overlap"),
        ({"keys": [(3, 3)]}, "key span .3, 3. is empty"),
        ({"query": (5, 9)}, "passage .1, 6. must end before query .5, 9. begins"),
        ({"answer": (8, 12)}, "query .7, 9. must end before answer"),
        ({"answer": (10, 13)}, "answer span .10, 13. does not lie in a prompt of 12 tokens"),
        ({"query": (10, 12), "answer": (7, 9)}, "query .10, 12. must end before answer .7, 9. begins"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    spans = {"passage": (1, 6), "keys": [(2, 4)], "query": (7, 9), "answer": (10, 12), **changes}
    with pytest.raises(ValueError, match=message):
        prompt_segments(12, **spans)


def test_keys_are_found_in_the_passage_only():
    offsets = words(TEXT)
    tokens = lambda spans: [TEXT[offsets[a][0] : offsets[b - 1][1]].strip() for a, b in spans]  # noqa: E731
    first, reason = find_key(TEXT, PASSAGE, ["Rome"], offsets)
    assert (tokens(first), reason) == (["Rome"], None)
    every, _ = find_key(TEXT, PASSAGE, ["Rome"], offsets, every=True)
    assert tokens(every) == ["Rome", "Rome"]
    longest, _ = find_key(TEXT, PASSAGE, ["Rome", "Rome lies in Italy", ""], offsets)
    assert tokens(longest) == ["Rome lies in Italy"]
    assert find_key(TEXT, PASSAGE, ["Paris"], offsets) == ([], "key not in the passage")
    assert find_key(TEXT, PASSAGE, ["Rom"], offsets) == ([], "key split by tokenization")
    assert find_key(TEXT, PASSAGE, ["old"], offsets) == ([], "key split by tokenization")  # in "older"


def test_too_many_skipped_samples_are_an_error():
    check_skipped([None] * 8 + ["key not in the passage"] * 2)
    with pytest.raises(ValueError, match=r"3 of 10 samples would be skipped \(1 a, 2 b\), more than 20%"):
        check_skipped([None] * 7 + ["b", "a", "b"])
