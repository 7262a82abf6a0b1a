"""Tokens per second of our sampler beside transformers' ``generate``, and beside what this machine could do at most.

    python tests/bench/decode.py [--quick] [--repeats 5] [--out decode.json]      (needs pip install '.[bench]')

The same random Qwen3 weights in float32, the same prompts, greedy, no early end; both sides prefill 64 tokens and write
128. Calls of the two sides are interleaved and the fastest of each is kept, so that other load on the machine falls on
both. Compilation is paid before the first measured call and reported apart. ``limit`` is counted, not measured: each
step reads every weight once and multiplies it with the batch, at the memory bandwidth and the matrix-product rate
measured in the same run; ``of limit`` is that time over ours. ``sampled`` is ours with temperature 1 and top_p 0.9.

    python tests/bench/decode.py --int8 world_lm:tiny [--rows 256] [--out decode.json]      (needs no bench extra)

What rounding does to a trained model: the embedded world's, made first if it has not been, answers test questions of
its domains greedily with weights, cache or both in eight bits, and in bfloat16, beside float32. ``change`` is the root
mean square of what happens to the logits over that of the logits, both less their mean over the vocabulary, at every
token of float32's answers; ``KL`` is in nats a token; ``same token`` counts those whose best token stays, ``same
answer`` answers written freely that are equal to the end, ``right`` answers that are the question's.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SIZES = {
    "10M": {"dim": 256, "layers": 8, "heads": 8, "kv_heads": 4, "head_dim": 32, "ffn_dim": 1024, "vocab_size": 8192},
    "100M": {
        "dim": 768,
        "layers": 12,
        "heads": 12,
        "kv_heads": 4,
        "head_dim": 64,
        "ffn_dim": 2304,
        "vocab_size": 16384,
    },
}
QUICK = {
    "quick": {"dim": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn_dim": 128, "vocab_size": 512}
}


def fastest(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of the fastest of ``repeats`` interleaved runs of each call."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def measure_machine(megabytes: int, side: int, repeats: int) -> dict[str, float]:
    """Read bandwidth in bytes/s (sum of a large array) and float32 matrix-product rate in FLOP/s."""
    import jax
    import jax.numpy as jnp

    flat, square = jnp.ones(megabytes * 250_000), jnp.ones((side, side))
    add, multiply = jax.jit(jnp.sum), jax.jit(jnp.matmul)
    calls = {
        "sum": lambda: add(flat).block_until_ready(),
        "matmul": lambda: multiply(square, square).block_until_ready(),
    }
    fastest(calls, 1)
    best = fastest(calls, repeats)
    return {"bytes_per_s": flat.nbytes / best["sum"], "flop_per_s": 2 * side**3 / best["matmul"]}


def counted_seconds(config, batch: int, prompt: int, new: int, machine: dict[str, float]) -> float:
    """Least time for a prefill and ``new - 1`` further steps: attention and sampling are left out."""
    matrices = config.num_params() + (0 if config.tie_embeddings else -config.vocab_size * config.dim)
    head = config.vocab_size * config.dim
    step = max(4 * matrices / machine["bytes_per_s"], 2 * batch * matrices / machine["flop_per_s"])
    flop = 2 * batch * (prompt * (matrices - head) + head)
    return max(4 * matrices / machine["bytes_per_s"], flop / machine["flop_per_s"]) + (new - 1) * step


def compare(name: str, fields: dict, batches, prompt: int, new: int, repeats: int, machine: dict) -> list[dict]:
    """Rows of one model size."""
    import jax
    import torch
    from transformers import AutoModelForCausalLM

    import models
    from models.hf import Model
    from models.layout import decode_weights
    from models.sample import decode, prefill

    config = models.Config(**fields, family="qwen3", qk_norm=True, init_std=0.05)
    params = models.init(config, jax.random.key(0))
    with tempfile.TemporaryDirectory() as folder:
        models.save(Model(config, params), Path(folder) / "m")
        reference = AutoModelForCausalLM.from_pretrained(Path(folder) / "m", dtype=torch.float32).eval()
    weights = jax.block_until_ready(decode_weights(params, config))
    rows = []
    for batch in batches:
        tokens = np.random.default_rng(0).integers(2, config.vocab_size, (batch, prompt), dtype=np.int32)
        lengths, limits = np.full(batch, prompt, np.int32), np.full(batch, new, np.int32)
        ids = torch.tensor(tokens, dtype=torch.long)
        mask = torch.ones_like(ids)

        def ours(**options):
            session = prefill(weights, config, tokens, lengths, size=prompt + new)  # noqa: B023
            out, _ = decode(weights, config, session, jax.random.key(1), limits, longest=prompt, **options)  # noqa: B023
            return np.asarray(out.tokens)

        def theirs():
            with torch.no_grad():
                return reference.generate(
                    ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0,  # noqa: B023
                )  # fmt: skip

        start = time.perf_counter()
        mine = ours(temperature=0.0)[:, :new]
        compiling = time.perf_counter() - start
        same = float((theirs()[:, prompt:].numpy() == mine).mean())
        ours(temperature=1.0, top_p=0.9)
        best = fastest(
            {
                "ours": lambda: ours(temperature=0.0),
                "theirs": theirs,
                "sampled": lambda: ours(temperature=1.0, top_p=0.9),
            },
            repeats,
        )
        least = counted_seconds(config, batch, prompt, new, machine)
        made = batch * new
        rows.append(
            {
                "model": name,
                "params": config.num_params(),
                "batch": batch,
                "prompt": prompt,
                "new": new,
                "ours_tokens_per_s": made / best["ours"],
                "sampled_tokens_per_s": made / best["sampled"],
                "transformers_tokens_per_s": made / best["theirs"],
                "ratio": best["theirs"] / best["ours"],
                "limit_tokens_per_s": made / least,
                "of_limit": least / best["ours"],
                "first_call_seconds": compiling,
                "equal_tokens": same,
            }
        )
    return rows


FORMS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "weights in 8 bits": {"weights": True},
    "cache in 8 bits": {"cache": True},
    "both in 8 bits": {"weights": True, "cache": True},
}


def rounded(spec: str, rows: int) -> list[dict]:
    """One row per form of :data:`FORMS`."""
    import jax

    import models
    from jaxrec.systems import world_lm
    from models.layout import decode_weights
    from models.sample import decode, extend, prefill
    from models.transformer import unembed

    config = world_lm.base_config(spec, 0)
    model = models.load(world_lm.cached(spec, 0))
    domains = world_lm.test_rows(config, world_lm.make_texts(config), model.tokenizer)
    width = max(part["tokens"].shape[1] for part in domains.values())
    share = -(-rows // len(domains))

    def widened(part: np.ndarray) -> np.ndarray:
        return np.pad(part[:share], ((0, 0), (0, width - part.shape[1])))

    asked, mask = (np.concatenate([widened(part[n]) for part in domains.values()]) for n in ("tokens", "mask"))
    starts = mask.argmax(axis=1)
    prompts = np.where(np.arange(width) < starts[:, None], asked, 0).astype(np.int32)
    wanted = [row[real].tolist() for row, real in zip(asked, mask)]
    longest = max(map(len, wanted))

    def run(dtype: str = "float32", weights: bool = False, cache: bool = False, forced=None):
        """(answers, logits [B, T, V] behind each token of ``forced``, or of its own answers)."""
        c = model.config.replace(dtype=dtype)
        prepared = decode_weights(jax.tree.map(lambda x: x.astype(dtype), model.params), c, int8=weights)
        size = width + longest

        def start():
            return prefill(prepared, c, prompts, starts, size, int8=cache)

        limits = np.full(len(prompts), longest, np.int32)
        out, _ = decode(prepared, c, start(), jax.random.key(0), limits, temperature=0.0)
        answers = [row[:n].tolist() for row, n in zip(np.asarray(out.tokens), np.asarray(out.counts))]
        tokens, counts = forced or (np.asarray(out.tokens)[:, :longest], np.asarray(out.counts))
        session = start()
        first = np.asarray(session.logits, np.float32)[:, None]
        session = extend(prepared, c, session, tokens, counts, int((starts + counts).max()), record=("final",))
        behind = np.asarray(unembed(prepared, c, session.records["final"]), np.float32)
        return answers, np.concatenate([first, behind], axis=1)[:, : tokens.shape[1]], (tokens, counts)

    out, exact = [], None
    for name, form in FORMS.items():
        answers, logits, forced = run(**form, forced=exact and exact[2])
        exact = exact or (answers, logits, forced)
        real = np.arange(logits.shape[1]) < exact[2][1][:, None]
        ours, theirs = (x[real] - x[real].mean(axis=-1, keepdims=True) for x in (logits, exact[1]))
        logp, logq = (np.asarray(jax.nn.log_softmax(x)) for x in (theirs, ours))
        out.append(
            {
                "model": spec,
                "form": name,
                "rows": len(answers),
                "tokens": int(real.sum()),
                "change": float(np.sqrt(((ours - theirs) ** 2).mean() / (theirs**2).mean())),
                "kl": float((np.exp(logp) * (logp - logq)).sum(axis=-1).mean()),
                "same_token": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
                "same_answer": float(np.mean([a == b for a, b in zip(answers, exact[0])])),
                "right": float(np.mean([a == b for a, b in zip(answers, wanted)])),
            }
        )
    return out


def show_rounded(rows: list[dict]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    first = rows[0]
    table = Table(title=f"{first['model']}: {first['rows']} test questions, {first['tokens']} tokens of answers")
    for column in ("", "change", "KL", "same token", "same answer", "right"):
        table.add_column(column, justify="right")
    for r in rows:
        shares = (f"{100 * r[name]:.1f}%" for name in ("same_token", "same_answer", "right"))
        table.add_row(r["form"], f"{r['change']:.4f}", f"{r['kl']:.2g}", *shares)
    Console().print(table)


def show(rows: list[dict], machine: dict[str, float]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="greedy decoding, tokens/s", caption=(
        f"{machine['bytes_per_s'] / 1e9:.1f} GB/s, {machine['flop_per_s'] / 1e9:.0f} GFLOP/s measured in this run"
    ))  # fmt: skip
    for column in ("model", "batch", "ours", "sampled", "transformers", "ratio", "limit", "of limit", "equal"):
        table.add_column(column, justify="right")
    for r in rows:
        table.add_row(
            r["model"], str(r["batch"]), f"{r['ours_tokens_per_s']:.0f}", f"{r['sampled_tokens_per_s']:.0f}",
            f"{r['transformers_tokens_per_s']:.0f}", f"{r['ratio']:.2f}x", f"{r['limit_tokens_per_s']:.0f}",
            f"{100 * r['of_limit']:.0f}%", f"{100 * r['equal_tokens']:.1f}%",
        )  # fmt: skip
    Console().print(table)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, for checking that the script runs")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=5, help="interleaved runs of each side; the fastest counts")
    parser.add_argument("--out", type=Path, default=Path("decode.json"), help="where the figures go as JSON")
    parser.add_argument("--int8", metavar="SPEC", help="measure what rounding does to this trained model instead")
    parser.add_argument("--rows", type=int, default=256, help="of --int8: test questions, all domains together")
    options = parser.parse_args(argv)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    if options.int8:
        rows = rounded(options.int8, options.rows)
        show_rounded(rows)
        options.out.write_text(json.dumps({"rows": rows}, indent=2) + "\n")
        return rows
    import jax
    import torch
    import transformers

    sizes = QUICK if options.quick else {name: SIZES[name] for name in options.sizes}
    batches = [1, 4] if options.quick else options.batches
    prompt, new = (8, 8) if options.quick else (64, 128)
    machine = measure_machine(20 if options.quick else 200, 256 if options.quick else 2048, 2 * options.repeats)
    rows = []
    for name, fields in sizes.items():
        rows += compare(name, fields, batches, prompt, new, options.repeats, machine)
    show(rows, machine)
    report = {
        "machine": machine | {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "device": jax.devices()[0].platform,
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "repeats": options.repeats, "load_average": os.getloadavg()[0], "rows": rows,
    }  # fmt: skip
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    main()
