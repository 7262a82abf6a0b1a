"""A catalogue of a few words, dialogues over it, and a model of random weights that reads both."""

from __future__ import annotations

import jax

import models
from jaxrec.data.dialogues import SYSTEM, USER, Dialogue, Turn
from jaxrec.data.item_catalogue import ItemCatalogue
from jaxrec.tools.user_prompts import SHORT_WORDS, UserPrompts
from models.hf import Model

ROLES = ("Seeker", "Recommender")
TITLES = [
    "Amber Bell",
    "Silver Gate",
    "Last Harbour",
    "Who Knows?",
    "Red Lantern",
    "Cold River",
    "Blue Door",
    "Iron Sea",
]
GENRES = ["comedy", "drama", "horror", "mystery"]
ERAS = ["1950s", "1970s", "1990s"]
CATALOGUE = ItemCatalogue(
    TITLES,
    [{"genre": GENRES[i % 4], "era": ERAS[i % 3], "plot": ["dark", "ocean"] if i % 2 else []} for i in range(8)],
    order=("era", "genre", "plot"),
)
WORDS = [
    "I",
    "want",
    "something",
    "but",
    "no",
    "not",
    "more",
    "please",
    "What",
    "about",
    *GENRES,
    *ERAS,
    "dark",
    "ocean",
]


def talk(number: int, *texts: str) -> Dialogue:
    """Turns in which user and system alternate."""
    turns = (Turn((USER, SYSTEM)[i % 2], text) for i, text in enumerate(texts))
    return Dialogue(f"d{number}", tuple(turns))


DIALOGUES = [
    talk(0, "I want something dark but no comedy"),
    talk(1, "I want horror", "What about Silver Gate", "no something 1950s please"),
    talk(2, *["I want something but not drama not 1970s not dark ocean please"] * 5),
]


def tokenizer():
    """Every word of the world is one token."""
    words = [" " + word for word in (*WORDS, *TITLES)]
    return models.build_word_tokenizer(["Seeker:", "\nSeeker:", "\nRecommender:", *SHORT_WORDS, *words])


def tiny_model(seed: int = 0, max_len: int = 1024, **fields) -> Model:
    """Random weights, large enough that tokens differ in probability."""
    words = tokenizer()
    sizes = {"dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_dim": 24} | fields
    config = models.Config(
        vocab_size=words.vocab_size,
        qk_norm=True,
        init_std=0.3,
        max_len=max_len,
        eos_ids=words.eos_ids,
        tie_embeddings=False,
        **sizes,
    )
    return Model(config, models.init(config, jax.random.key(seed)), words)


def prompts(style: str = "short", words=None, catalogue: ItemCatalogue = CATALOGUE) -> UserPrompts:
    """Of the world."""
    return UserPrompts(catalogue, style, roles=ROLES, tokenizer=tokenizer() if words is None else words)
