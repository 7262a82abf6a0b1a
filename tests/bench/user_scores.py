"""Scores of a level of the search over conversations: all items in one call beside one call for each item.

    python tests/bench/user_scores.py [--quick] [--size 10M] [--dialogues 16] [--items 40] [--alone 40] [--repeats 3]

A random model in float32; dialogues of 8 turns of 20 drawn words, items of five attributes and a plot of 15 words.
``batched``: ``ModelUser.score`` for all dialogues. ``one call each``: the same with one item in a call. ``bare``: a
compiled forward pass over one prompt, padded to a common length, which reads the decision too. ``generated``: a greedy
reply of 12 tokens to one prompt, which is what is asked of a server that forces no tokens. The last three get a sample
of the prompts. Sides take turns; the fastest of each counts, by wall clock and by CPU seconds of all threads, which say
more where the machine is shared. Programs are compiled before.
"""

import argparse
import functools
import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]  # models.py here is no package
_spec = importlib.util.spec_from_file_location("bench_models", Path(__file__).with_name("models.py"))
bench = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bench)

_REPLY = 12  # tokens of "1. <title>? Yes"


def setting(style: str, size: str, dialogues: int, items: int):
    """(model, prompts, dialogues, items of each)."""
    import jax

    import models
    from jaxrec.data.dialogues import SYSTEM, USER, Dialogue, Turn
    from jaxrec.data.item_catalogue import ATTRIBUTES, ItemCatalogue
    from jaxrec.tools.user_prompts import UserPrompts
    from models.hf import Model

    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(2000)]

    def say(count: int) -> str:
        return " ".join(rng.choice(words, count))

    count = dialogues * items
    known = [{name: say(15 if name == "plot" else 2) for name in ATTRIBUTES} for _ in range(count)]
    catalogue = ItemCatalogue([f"{say(2)} ({number})" for number in range(count)], known)
    talks = [Dialogue(str(d), tuple(Turn((USER, SYSTEM)[t % 2], say(20)) for t in range(8))) for d in range(dialogues)]
    bare = UserPrompts(catalogue, style)
    pieces = dict.fromkeys(word for part in bare.score_prompt(talks[0], 0) for word in part.split())
    phrases = [form for word in [*pieces, *words] for form in (word, f" {word}")]
    tokenizer = models.build_word_tokenizer([*phrases, " Yes", " No"])
    sizes = {**bench.decode.SIZES[size], "vocab_size": max(tokenizer.vocab_size, 8192)}
    config = models.Config(**sizes, qk_norm=True)
    model = Model(config, models.init(config, jax.random.key(0)), tokenizer)
    own = [list(range(d * items, (d + 1) * items)) for d in range(dialogues)]
    return model, UserPrompts(catalogue, style, tokenizer=tokenizer), talks, own


def compare(style: str, size: str, dialogues: int, items: int, alone: int, repeats: int) -> list[dict]:
    """A row for each side. alone: prompts of the sides that take one at a time."""
    import jax
    import jax.numpy as jnp

    import models
    from jaxrec.tools.simulated_user import ModelUser
    from jaxrec.tools.user_prompts import spellings
    from models.sample import bucket

    model, prompts, talks, own = setting(style, size, dialogues, items)
    user = ModelUser(model, prompts)
    rows = [
        [i for piece in prompts.score_prompt(talk, item) for i in model.tokenizer.encode(piece)]
        for talk, chosen in zip(talks, own, strict=True) for item in chosen
    ]  # fmt: skip
    some = rows[:: max(1, len(rows) // alone)][:alone]
    width = bucket(max(map(len, rows)))
    yes, no = (jnp.array(spellings(model.tokenizer, word)) for word in ("Yes", "No"))

    @functools.partial(jax.jit, static_argnames="config")
    def score_one(params, config, tokens, length):
        hidden = models.forward(params, config, tokens, head=False, record=("final",)).records["final"]
        p = jax.nn.softmax(models.unembed(params, config, jnp.take(hidden, length - 1, axis=1))[0])
        return p[yes].sum() / (p[yes].sum() + p[no].sum())

    pairs = [(talk, item) for talk, chosen in zip(talks, own, strict=True) for item in chosen]
    pairs = pairs[:: max(1, len(rows) // alone)][:alone]

    def one_call_each():
        return np.concatenate([user.score([talk], [[item]])[0] for talk, item in pairs])

    def bare():
        out = []
        for row in some:
            tokens = np.zeros((1, width), np.int32)
            tokens[0, : len(row)] = row
            out.append(float(score_one(model.params, model.config, tokens, len(row))))
        return np.array(out)

    weights, key = models.decode_weights(model.params, model.config), jax.random.key(0)

    def generated():
        for row in some:
            session = models.prefill(weights, model.config, np.array([row]), np.array([len(row)]), width + _REPLY)
            out, _ = models.decode(weights, model.config, session, key, [_REPLY], temperature=0.0)
            np.asarray(out.tokens)

    calls = {
        "batched": lambda: np.concatenate(user.score(talks, own)), "one call each": one_call_each,
        "bare": bare, "generated": generated,
    }  # fmt: skip
    close = 1e-5 if jax.default_backend() == "cpu" else 5e-3  # elsewhere float32 products are rounded on the way
    np.testing.assert_allclose(calls["batched"]()[:: len(rows) // len(some)][: len(some)], bare(), atol=close)
    np.testing.assert_allclose(one_call_each(), bare(), atol=close)
    generated()
    best = {name: [float("inf")] * 2 for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter(), time.process_time()
            call()
            took = time.perf_counter() - start[0], time.process_time() - start[1]
            count = len(rows if name == "batched" else some)
            best[name] = [min(old, seconds / count * 1e3) for old, seconds in zip(best[name], took, strict=True)]
    tokens = sum(map(len, rows)) / len(rows)
    return [
        {
            "style": style, "side": name, "tokens": round(tokens), "ms_per_score": wall, "CPU_ms_per_score": cpu,
            "batched_is": f"{wall / best['batched'][0]:.1f}x", "by_CPU": f"{cpu / best['batched'][1]:.1f}x",
        }
        for name, (wall, cpu) in best.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 dialogues of 5 items, one repeat")
    parser.add_argument("--size", choices=["10M", "100M"], default="10M")
    parser.add_argument("--dialogues", type=int, default=16)
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--alone", type=int, default=40, help="prompts that are run one at a time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--styles", nargs="+", default=["short", "full"])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    sizes = (2, 5, 5, 1) if given.quick else (given.dialogues, given.items, given.alone, given.repeats)
    table = [row for style in given.styles for row in compare(style, given.size, *sizes)]
    bench.show("scores", table)
    if given.out:
        given.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
