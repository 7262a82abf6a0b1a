"""Prompts from pieces: every span is exact, batches are padded alike, and what cannot work is refused by name."""

import numpy as np
import pytest

from analysis import Prompt, build_prompt, pad_prompts, split_at_question
from models import Config

CONFIG = Config(vocab_size=60, dim=8, layers=1, heads=2, kv_heads=1, head_dim=4, ffn_dim=8, max_len=40)


def example(**changes):
    pieces = {
        "documents": [[11, 12], [13], [14, 15, 16]], "question": [21, 22], "system": [1], "separator": [2],
        "instruction": [3, 4], "cue": [5],
    }  # fmt: skip
    return build_prompt(**(pieces | changes))


def test_spans_hold_exactly_the_pieces():
    prompt = example()
    assert prompt.tokens.tolist() == [1, 11, 12, 2, 13, 2, 14, 15, 16, 2, 3, 4, 21, 22, 5]
    assert prompt.tokens.dtype == np.int32
    inside = [prompt.tokens[start:end].tolist() for start, end in prompt.documents]
    assert inside == [[11, 12], [13], [14, 15, 16]]
    assert prompt.tokens[slice(*prompt.question)].tolist() == [21, 22]
    bare = build_prompt([[7]], [8])
    assert (bare.tokens.tolist(), bare.documents, bare.question) == ([7, 8], ((0, 1),), (1, 2))


def test_a_batch_marks_each_token():
    two = build_prompt([[31], [32, 33]], [34], name="two")
    batch = pad_prompts([example(), two], CONFIG)
    assert batch.tokens.shape == batch.document.shape == batch.question.shape == (2, 16)
    assert (batch.tokens.dtype, batch.document.dtype, batch.question.dtype) == (np.int32, np.int32, np.bool_)
    assert batch.document[0].tolist() == [-1, 0, 0, -1, 1, -1, 2, 2, 2, -1, -1, -1, -1, -1, -1, -1]
    assert batch.document[1].tolist() == [0, 1, 1] + [-1] * 13
    assert np.flatnonzero(batch.question[0]).tolist() == [12, 13]
    assert np.flatnonzero(batch.question[1]).tolist() == [3]
    assert batch.lengths.tolist() == [15, 4]
    assert (batch.counts.tolist(), batch.starts.tolist(), batch.ends.tolist()) == ([3, 2], [12, 3], [14, 4])
    assert batch.documents == 4  # a bucket
    wide = pad_prompts([two], CONFIG, width=24, documents=10)
    assert wide.tokens.shape == (1, 24)
    assert wide.documents == 10


def test_the_parts_of_a_batch_are_its_prompts():
    prompts = [example(), build_prompt([[31], [32, 33]], [34, 35, 36], cue=[5, 6])]
    batch = pad_prompts(prompts, CONFIG)
    before, starts, behind, rest = split_at_question(batch)
    for b, prompt in enumerate(prompts):
        joined = before[b, : starts[b]].tolist() + behind[b, : rest[b]].tolist()
        assert joined == prompt.tokens.tolist()
        assert starts[b] == prompt.question[0]
    assert not before[1, starts[1] :].any()
    at_the_end = split_at_question(pad_prompts([build_prompt([[7] * 8], [8] * 8)], CONFIG))
    assert at_the_end[2].tolist() == [[8] * 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents": []}, "no documents"),
        ({"documents": [[11], [], [12]]}, r"document 1 at \[3, 3\) is empty"),
        ({"question": []}, r"the question at \[12, 12\) is empty"),
    ],
)
def test_missing_pieces_are_named(changes, message):
    with pytest.raises(ValueError, match=rf"sample 7: .*{message}"):
        example(**changes, name="sample 7")


@pytest.mark.parametrize(
    ("documents", "question", "message"),
    [
        ([(0, 2), (1, 3)], (4, 5), r"document 0 at \[0, 2\) and document 1 at \[1, 3\) overlap"),
        ([(0, 2), (2, 5)], (4, 6), r"document 1 at \[2, 5\) and the question at \[4, 6\) overlap"),
        ([(0, 2), (1, 1)], (4, 5), r"document 1 at \[1, 1\) is empty"),
        ([(0, 2), (2, 11)], (4, 5), r"document 1 at \[2, 11\) is outside of the 10 tokens"),
        ([(-1, 2)], (4, 5), r"document 0 at \[-1, 2\) is outside of the 10 tokens"),
        ([(0, 2)], (8, 12), r"the question at \[8, 12\) is outside of the 10 tokens"),
        ([(3, 2)], (8, 9), r"document 0 at \[3, 2\) is outside"),
        ([(0, 2), (6, 8)], (4, 5), r"document 1 at \[6, 8\) stands behind the question at \[4, 5\)"),
    ],
)
def test_wrong_spans_are_named(documents, question, message):
    with pytest.raises(ValueError, match=rf"prompt: {message}"):
        Prompt(np.arange(10), tuple(documents), question)


def test_documents_may_stand_in_any_order():
    Prompt(np.arange(10), ((4, 6), (0, 2)), (7, 8))


def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths():
    long = build_prompt([[7] * 39], [8, 9], name="long one")
    with pytest.raises(ValueError, match=r"long one: a prompt of 41 tokens does not fit the model's context of 40"):
        pad_prompts([example(), long], CONFIG)
    with pytest.raises(ValueError, match=r"a prompt of 15 tokens and an answer of 30 .* context of 40"):
        pad_prompts([example()], CONFIG, new_tokens=30)
    with pytest.raises(ValueError, match="token id 60 is outside the model's vocabulary of 60"):
        pad_prompts([build_prompt([[60]], [8])], CONFIG)


def test_a_batch_needs_prompts_and_room():
    with pytest.raises(ValueError, match="no prompts"):
        pad_prompts([], CONFIG)
    with pytest.raises(ValueError, match="width=14 is too small: prompts have up to 15 tokens"):
        pad_prompts([example()], CONFIG, width=14)
    with pytest.raises(ValueError, match="documents=2 is too small"):
        pad_prompts([example()], CONFIG, documents=2)
    with pytest.raises(ValueError, match="must be one row"):
        Prompt(np.zeros((2, 3)), ((0, 1),), (1, 2))
