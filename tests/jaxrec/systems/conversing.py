"""GRSU on files: a tiny Hugging Face folder for the simulated user, a teacher behind an OpenAI-compatible address, and
flags of a small run."""

import collections
import contextlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np

import models
from jaxrec.data.dialogues import Dialogue, Turn
from jaxrec.data.item_catalogue import ItemCatalogue
from jaxrec.tools.user_prompts import UserPrompts
from models.hf import Model
from tests.jaxrec.systems import scripted_endpoint

CRITIQUES = ("I would rather have another genre.", "Not these, please something older.", "Too long a film for me.")
GENRES = ["comedy", "drama", "war"] * 4
NAMES = ["Amber", "Broad", "Cold", "Dusty", "Early", "Far", "Green", "High", "Inner", "Jade", "Kind", "Last"]
ROADS = [{"title": f"{name} Road (2001)", "genre": [genre]} for name, genre in zip(NAMES, GENRES, strict=True)]
TITLES = [item["title"] for item in ROADS]
_WORDS = 6000  # of a tokenizer
SIZES = {
    "recommender.k": 3, "sft.length": 512, "sft.steps": 40, "sft.batch_size": 8, "sft.micro_batches": 1,
    "sft.lr": 0.03, "sft.warmup": 1, "search.beams": 2, "search.depth": 2, "search.expand": 2, "search.max_new": 12,
    "search.temperature": 0.3,
    "rl.steps": 0, "rl.cold_steps": 2, "rl.group_size": 2, "rl.prompts_per_step": 2, "rl.max_env_errors": 1.0,
    "rl.max_prompt": 512, "rl.max_total": 1024, "rl.max_new": 16,
}  # fmt: skip


def tiny_folder(folder: Path, texts: Iterable[str], max_len: int = 8192) -> Path:
    """A random Qwen3 model of one layer, in float32. Its tokens are the frequent words of the texts, whole critiques,
    and the decisions; everything else is spelled."""
    tokenizer = _tokenizer(texts, CRITIQUES)
    config = models.Config(
        vocab_size=tokenizer.vocab_size, dim=16, layers=1, heads=4, kv_heads=2, head_dim=8, ffn_dim=24, qk_norm=True,
        init_std=0.05, max_len=max_len, eos_ids=tokenizer.eos_ids, family="qwen3",
    )  # fmt: skip
    models.save(Model(config, models.init(config, jax.random.key(0)), tokenizer), folder)
    return folder


def parrot(
    folder: Path, says: Sequence[str], texts: Iterable[str] = (), others: Sequence[str] = (), max_len: int = 8192
) -> Path:
    """A Qwen3 model of one layer that says one of these, with equal probability, and ends, whatever it has read; "Yes"
    and "No" are equally likely. Its layer adds nothing, so that what comes next depends on the last token alone.
    others: more tokens; models of one vocabulary share compiled programs."""
    tokenizer = _tokenizer(texts, dict.fromkeys([*says, *others]))
    config = models.Config(
        vocab_size=tokenizer.vocab_size, dim=8, layers=1, heads=1, kv_heads=1, head_dim=8, ffn_dim=8, qk_norm=True,
        init_std=0.0, max_len=max_len, eos_ids=tokenizer.eos_ids, family="qwen3", tie_embeddings=False,
    )  # fmt: skip
    params = models.init(config, jax.random.key(0))
    said = np.array([tokenizer.encode(text) for text in says])[:, 0]
    params["embed"] = params["embed"].at[:, 0].set(1.0).at[said].set(0.0).at[said, 1].set(1.0)
    params["head"] = params["head"].at[0, said].set(30.0).at[1, tokenizer.eos_ids[0]].set(30.0)
    models.save(Model(config, params, tokenizer), folder)
    return folder


def _tokenizer(texts: Iterable[str], whole: Iterable[str]):
    prompts = UserPrompts(ItemCatalogue(["x"], [{}]))
    dialogue = Dialogue("", (Turn("user", "x"), Turn("system", "x")))
    own = ["".join(prompts.score_prompt(dialogue, 0)), "".join(prompts.critique_prompt(dialogue, [0, 0]))]
    own += [f"\n  - {name}: x" for name in prompts.catalogue.order]
    found = collections.Counter(word for text in [*own * 1000, *texts] for word in re.findall(r"\s*[^\s,]+|,", text))
    words = [word for word, _ in found.most_common(_WORDS)]
    return models.build_word_tokenizer([" Yes", " No", *whole, *words])


def critique(prompt: str) -> tuple[str, str]:
    """(text, finish reason) of a teacher; words in the dialogue make it fail in a way of its own."""
    talk, _, rest = prompt.partition("## Recommendation")
    wish = re.search(r"^1\. (.*)$", rest.partition("## Hidden Wish")[2], re.MULTILINE)[1]
    if "talkative" in talk:
        return CRITIQUES[0], "length"
    if "indiscreet" in talk:
        return f"I had hoped for {wish}.", "stop"
    if "silent" in talk:
        return " \n ", "stop"
    return CRITIQUES[len(talk) % len(CRITIQUES)], "stop"


def endpoint(status: int = 200) -> contextlib.AbstractContextManager:
    """A server whose ``url`` is a teacher's; ``asked`` lists its prompts. status: of every answer."""
    return scripted_endpoint.endpoint(lambda prompt, seed: (prompt, *critique(prompt)), status)


def flags(model: Path, url: str, train: Path, test: Path, catalogue: Path | None = None, **settings) -> list[str]:
    """Flags of a small run. settings: more of the config, with "__" for dots."""
    values = {
        "model.path": model, "model.dtype": "float32", "data.train": train, "data.test": test,
        "data.catalogue": catalogue or "", "teacher.url": url, "teacher.model": "scripted", "teacher.key_variable": "",
        **SIZES, **{name.replace("__", "."): value for name, value in settings.items()},
    }  # fmt: skip
    return [f"--config.{name}={value}" for name, value in values.items()]


def road_files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Files of six training and two test conversations about :data:`ROADS`, two instances each, and their texts."""
    talks = [_road_talk(number, number % 12, (number + 5) % 12) for number in range(8)]
    files = {
        "train": lines(folder / "train.jsonl", talks[:6]), "test": lines(folder / "test.jsonl", talks[6:]),
        "catalogue": lines(folder / "items.jsonl", ROADS),
    }  # fmt: skip
    return files, [turn["text"] for row in talks for turn in row["turns"]] + TITLES + GENRES


def _road_talk(number: int, first: int, second: int) -> dict:
    def turn(role: str, text: str, *items: int) -> dict:
        return {"role": role, "text": text, "items": [TITLES[item] for item in items]}

    said = f"A funny comedy, number {number}"
    return {"id": f"talk:{number}", "turns": [turn("user", said), turn("system", "This?", first),
                                              turn("user", "no drama"), turn("system", "That?", second)]}  # fmt: skip


def lines(path: Path, rows: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
