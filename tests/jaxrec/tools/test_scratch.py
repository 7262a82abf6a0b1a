"""The tokenizer and model made for one catalogue."""

from __future__ import annotations

import numpy as np
import pytest

import models
from jaxrec.config import resolve_config
from jaxrec.data.recommendation import config_task
from jaxrec.tools.scratch import catalogue_tokenizer, scratch_model
from rl.envs.recommend import (
    ANSWER_CLOSE,
    QUERY_CLOSE,
    QUERY_OPEN,
    TAGS,
    THINK_CLOSE,
    PromptStyle,
    RecommendEnv,
)  # fmt: skip


@pytest.fixture(scope="module")
def task():
    chosen = resolve_config("deeprec:tiny", ["--config.data.world.users=40"])
    return config_task(chosen.data, chosen.text, 0)


@pytest.fixture(scope="module")
def tokenizer(task):
    return catalogue_tokenizer(task, 10)


def test_every_title_word_and_tag_is_one_token(task, tokenizer):
    pieces = [" " + t for t in task.catalogue.titles[1:]] + [" " + w for w in task.vocabulary]
    pieces += [f"\n{n}." for n in range(1, 11)] + [QUERY_OPEN, QUERY_CLOSE, THINK_CLOSE, f"\n{ANSWER_CLOSE}"]
    for piece in pieces:
        assert len(tokenizer.encode(piece)) == 1, piece
    assert len({tokenizer.encode(piece)[0] for piece in pieces}) == len(set(pieces))


def test_protocol_text_survives_a_round_trip(task, tokenizer):
    env = RecommendEnv(
        task.catalogue, None, results=5, answers=10, max_calls=2, style=PromptStyle(False, True, True, 4)
    )  # fmt: skip
    texts = [env.prompt(e) for e in task.examples("train")[:20]] + [env.observation([1, 5, 64 - 1])]
    texts += [*TAGS, "Ein Café für 15 €, 映画", "  two  blanks\n\n\ttab", ""]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    joined = b"".join(tokenizer.token_bytes()[i] for i in tokenizer.encode(texts[0]))
    assert joined.decode() == texts[0]


def test_scratch_model_fits_its_tokenizer_and_repeats(task):
    sizes = {"dim": 16, "layers": 1, "heads": 2, "head_dim": 8, "ffn_dim": 16, "dtype": "float32"}
    model = scratch_model(task, sizes, 10, 64, seed=3)
    assert model.config.vocab_size == model.tokenizer.vocab_size
    assert model.config.eos_ids == tuple(model.tokenizer.eos_ids) != ()
    assert (model.config.max_len, model.config.family) == (64, "qwen3")
    again = scratch_model(task, sizes, 10, 64, seed=3)
    np.testing.assert_array_equal(model.params["embed"], again.params["embed"])
    ids = np.array([model.tokenizer.encode("User:\n1. x")], np.int32)
    assert models.forward(model.params, model.config, ids).logits.shape == (*ids.shape, model.config.vocab_size)
