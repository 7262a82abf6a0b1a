"""A language model from scratch for a closed catalogue: its tokenizer and its configuration."""

from typing import Any

import jax

import models
from jaxrec.data.recommendation import Task
from models.hf import Model
from rl.envs.recommend import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    ITEMS_CLOSE,
    ITEMS_OPEN,
    QUERY_CLOSE,
    QUERY_OPEN,
    THINK_CLOSE,
    THINK_OPEN,
)


def catalogue_tokenizer(task: Task, numbers: int, more_words: tuple[str, ...] = ()):
    """A tokenizer in which every title, descriptive word, line number and tag of the protocol is one token, and each
    of ``more_words`` too."""
    tags = [
        THINK_OPEN, THINK_CLOSE, "\n" + QUERY_OPEN, QUERY_OPEN, QUERY_CLOSE, f"\n\n{ITEMS_OPEN}",
        f"\n{ITEMS_CLOSE}\n\n", f"\n{ANSWER_OPEN}", f"\n{ANSWER_CLOSE}", "User:", "\nAssistant:\n", "Next", "Rank", ";",
        " -",
    ]  # fmt: skip
    lines = [f"\n{n}." for n in range(1, numbers + 1)]
    words = [" " + word for word in (*task.vocabulary, *more_words)]
    titles = [" " + title for title in task.catalogue.titles[1:]]
    return models.build_word_tokenizer([*tags, *lines, *words, *titles])


def scratch_model(
    task: Task, sizes: dict[str, Any], numbers: int, max_len: int, seed: int, more_words: tuple[str, ...] = ()
) -> Model:
    """Random weights of the given sizes (dim, layers, heads, head_dim, ffn_dim) over :func:`catalogue_tokenizer`."""
    tokenizer = catalogue_tokenizer(task, numbers, more_words)
    config = models.Config(
        family="qwen3", vocab_size=tokenizer.vocab_size, kv_heads=sizes["heads"], qk_norm=True, tie_embeddings=True,
        eos_ids=tuple(tokenizer.eos_ids), max_len=max_len, **sizes,
    )  # fmt: skip
    return Model(config, models.init(config, jax.random.key(seed)), tokenizer)
