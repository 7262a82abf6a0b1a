"""Search agents on files: a tiny folder with a chat template, a teacher behind an OpenAI-compatible address, and the
official scores of short answers, written anew."""

import collections
import contextlib
import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

import models
from jaxrec.evaluate.answer_judge import JUDGE
from jaxrec.tools.authors import REWRITE
from jaxrec.tools.deep_search import ANNOTATE, SUMMARISE
from models.hf import Model
from rl.envs.search import instructions
from rl.envs.tags import R1_SEARCHER_PP, SIMPLE_DEEP_SEARCHER
from tests.jaxrec.systems import scripted_endpoint

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What the teacher says: one token each, so that a model without attention to speak of learns the whole exchange.
R1_TURNS = (" I look it up. ", "<external>", " old capital ", "</external>", " It is said. ", "\\boxed{Ann}")
SDS_TURNS = (
    "I look it up. ", "<|begin_search_query|>", "old capital", "<|end_search_query|>", "It is said. ", "</think>",
    " So it is ", "\\boxed{Ann}", ".",
)  # fmt: skip

VERDICTS = {"yes": "True.", "Lee": "<think>Ann is short for Ann Lee.</think> True", "Ann": "True"}  # by right answers


def tiny_folder(folder: Path) -> Path:
    """A random Qwen3 model of one layer, in float32, with a tokenizer of words and a chat template."""
    phrases = [*R1_TURNS, *SDS_TURNS, "<|im_start|>", "<|im_end|>\n", "system\n", "user\n", "assistant\n"]
    for style in (R1_SEARCHER_PP, SIMPLE_DEEP_SEARCHER):
        phrases += [*style.tags, *(f" {word}" for word in instructions(style, 2).split())]
    tokenizer = models.build_word_tokenizer(phrases, specials=["<|im_start|>"])
    config = models.Config(
        vocab_size=tokenizer.vocab_size, dim=32, layers=1, heads=4, kv_heads=2, head_dim=8, ffn_dim=32, qk_norm=True,
        init_std=0.05, max_len=4096, eos_ids=tokenizer.eos_ids, family="qwen3",
    )  # fmt: skip
    models.save(Model(config, models.init(config, jax.random.key(0)), tokenizer), folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": TEMPLATE}))
    return folder


def reply(text: str, seed: int) -> tuple[str, str]:
    """(role, reply) of a teacher that always tells the same. Every third seed is wrong."""
    if text.startswith(ANNOTATE):
        return "annotator", json.dumps({"domain": "history", "key_points": ["people", f"point {len(text) % 7}"]})
    if text.startswith(SUMMARISE):
        page = re.search(r'"context": "([^"\\]{1,60})', text)
        return "summariser", f"Thinking.\n**Final Information**\n{page.group(1) if page else 'nothing'}"
    if text.startswith(REWRITE[:40]):
        return "rewriter", " <internal> It is said. </internal> \\boxed{Ann}"
    if text.startswith(JUDGE):
        right = text.rpartition("Right answers: ")[2].partition("\n")[0]
        return "judge", next((said for name, said in VERDICTS.items() if name in right), "False")
    old = R1_SEARCHER_PP.query_open in text
    turns, style = (R1_TURNS, R1_SEARCHER_PP) if old else (SDS_TURNS, SIMPLE_DEEP_SEARCHER)
    if f"{style.result_close}\n\n" not in text:
        return "author", "".join(turns[: 3 + old])  # R1's query is closed, the other one is left to the stop string
    said = "".join(turns[4:])
    return "author", said.replace("Ann", "Bob") if seed % 3 == 2 else said


def endpoint() -> contextlib.AbstractContextManager:
    """A server whose ``url`` is a teacher's; ``asked`` lists (role, text) of its requests."""

    def answer(prompt: str, seed: int) -> tuple[tuple[str, str], str, str]:
        role, said = reply(prompt, seed)
        return (role, prompt), said, "stop"

    return scripted_endpoint.endpoint(answer)


def flags(folder: Path, model: Path, url: str, train: Path, test: Path, corpus: Path, **settings) -> list[str]:
    """Flags of a small run on files. settings: more of the config, with "__" for dots."""
    values = {
        "model.path": model, "model.dtype": "float32", "data.train": train, "data.test": test, "data.corpus": corpus,
        "teacher.url": url, "teacher.model": "scripted", "teacher.key_variable": "", "rollout.max_new": 24,
        "env.max_searches": 2,
        **{name.replace("__", "."): value for name, value in settings.items()},
    }  # fmt: skip
    return [f"--config.{name}={value}" for name, value in values.items()]


def _squad_words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in text.split() if word not in ("a", "an", "the")]


def _r1_words(text: str) -> list[str]:
    text = {"True": "yes", "False": "no"}.get(text, text).lower()
    text = "".join(" " if c in string.punctuation + "‘’´`" else c for c in text)
    return [word for word in text.split() if word not in ("a", "an", "the")]


def official(prediction: str, answers: Sequence[str], r1: bool) -> Mapping[str, float]:
    """em, f1 and cover (words in a row) by the rules of SQuAD's and HotpotQA's evaluation scripts, for R1-Searcher with
    spaces in place of punctuation and the rule for yes and no."""
    words: Callable[[str], list[str]] = _r1_words if r1 else _squad_words
    said, best = words(prediction), {"em": 0.0, "f1": 0.0, "cover": 0.0}
    for answer in map(words, answers):
        if not said or not answer:
            continue
        same = sum((collections.Counter(said) & collections.Counter(answer)).values())
        f1 = 0.0
        if same:
            precision, recall = same / len(said), same / len(answer)
            f1 = 2 * precision * recall / (precision + recall)
        if r1 and said != answer and {" ".join(said), " ".join(answer)} & {"yes", "no", "noanswer"}:
            f1 = 0.0
        runs = [said[i : i + len(answer)] for i in range(len(said))]
        found = {"em": float(said == answer), "f1": f1, "cover": float(answer in runs)}
        best = {name: max(best[name], found[name]) for name in best}
    return best
