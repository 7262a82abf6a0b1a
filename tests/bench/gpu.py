"""What one GPU gives: decoding against its bandwidth, training against its products' rate, forms against forms.

    python tests/bench/gpu.py [--parts attention moe decode train] [--quick] [--repeats 5] [--out gpu.json]

Measured first, whatever is asked for: the rate of bfloat16 products of 8,192 x 8,192 and the bytes per second of a copy
(read and written). ``decode``: a random model of Qwen3-4B's sizes in bfloat16, greedy, 64 + 128 tokens; ``of
bandwidth`` is weights x steps / s over the measured bandwidth. ``train``: an SFT step of a random model of Qwen3-1.7B's
sizes, float32 weights and moments, products in bfloat16, rows of 2,048 tokens; ``MFU`` is 6 FLOPs per weight and token
(attention left out, recomputation too) over the time and the measured rate. ``moe``: one layer of Qwen3-30B-A3B's
width, value and gradients, 8 experts per token, in every form that fits, with the memory the compiler allots.
``attention``: the fused kernel beside our two forms, value and gradients, and how far each is from float32.
``--quick`` takes tiny sizes and runs on any backend, to see that the script works.
"""

import argparse
import concurrent.futures
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp

import models
from models.attention import Look, _blocks, _cudnn, _whole
from models.layout import decode_weights
from models.moe import moe
from models.sample import decode, prefill
from models.taps import Taps
from rl.finetune import SFTConfig, jitted_sft_step
from rl.optimizer import OptimizerConfig, init_state


def _sizes(vocab_size, dim, layers, heads, kv_heads, head_dim, ffn_dim) -> models.Config:
    return models.Config(vocab_size, dim, layers, heads, kv_heads, head_dim, ffn_dim, qk_norm=True, dtype="bfloat16")


QWEN3_4B = _sizes(151_936, 2560, 36, 32, 8, 128, 9728)
QWEN3_2B = _sizes(151_936, 2048, 28, 16, 8, 128, 6144)
QUICK = _sizes(512, 64, 2, 4, 2, 16, 128)


def seconds(call, repeats: int) -> float:
    """The median of ``repeats`` calls after a first one that is not counted."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def many(f, repeats: int, times: int = 10):
    """Seconds of one of ``times`` calls in a row: what starting a single one costs does not count."""
    return seconds(lambda: [f() for _ in range(times)], repeats) / times


def peaks(quick: bool, repeats: int) -> dict[str, float]:
    side, count = (256, 10_000) if quick else (8192, 1_000_000_000)
    a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16) for i in (0, 1))
    flat = jax.random.normal(jax.random.key(2), (count,), jnp.bfloat16)
    multiply, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    return {
        "flop_per_s": 2 * side**3 / many(lambda: multiply(a, b), repeats),
        "bytes_per_s": 2 * flat.nbytes / many(lambda: copy(flat), repeats),
    }


def decoding(quick: bool, repeats: int, machine: dict) -> list[dict]:
    config = QUICK if quick else QWEN3_4B
    prompt, new = (8, 16) if quick else (64, 128)
    params = jax.jit(lambda key: jax.tree.map(lambda w: w.astype(jnp.bfloat16), models.init(config, key)))(
        jax.random.key(0)
    )
    layouts = {"bfloat16": decode_weights(params, config), "int8": decode_weights(params, config, int8=True)}
    del params

    def run(kind: str, batch: int) -> float:
        """Seconds of the decode alone."""
        tokens = np.random.default_rng(0).integers(2, config.vocab_size, (batch, prompt), dtype=np.int32)
        lengths = np.full(batch, prompt, np.int32)
        session = prefill(layouts[kind], config, tokens, lengths, prompt + new)
        jax.block_until_ready(session)
        start = time.perf_counter()
        limits = np.full(batch, new, np.int32)
        out, _ = decode(
            layouts[kind], config, session, jax.random.key(1), limits, longest=prompt, temperature=0.0, steps=new
        )
        assert int(np.asarray(out.counts).min()) == new
        return time.perf_counter() - start

    cases = [(kind, batch) for batch in (1, 8, 32) for kind in layouts]
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:  # compile at the same time
        first = list(pool.map(lambda case: run(*case), cases))
    rows = []
    for (kind, batch), compiling in zip(cases, first, strict=True):
        step = float(np.median([run(kind, batch) for _ in range(repeats)])) / new
        size = sum(x.nbytes for x in jax.tree.leaves(layouts[kind]))
        rows.append({
            "weights": kind, "batch": batch, "GB": size / 1e9, "ms_per_step": 1e3 * step, "tokens_per_s": batch / step,
            "of_bandwidth": size / step / machine["bytes_per_s"], "first_call_s": compiling,
        })  # fmt: skip
    return rows


def training(quick: bool, repeats: int, machine: dict) -> list[dict]:
    rows = []
    for remat, batch, chunk in (("block", 16, 256), ("products", 12, 256)):
        config = (QUICK if quick else QWEN3_2B).replace(remat=remat)
        length = 32 if quick else 2048
        settings = SFTConfig(OptimizerConfig(lr=1e-5), logprob_chunk=chunk)
        state = init_state(models.init(config, jax.random.key(0)), settings.optimizer)
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length), dtype=np.int32)
        rows_of = jax.device_put({"tokens": tokens, "mask": np.ones(tokens.shape, bool)})
        step = jitted_sft_step()
        start = time.perf_counter()
        try:
            state, _ = jax.block_until_ready(step(state, rows_of, settings, config))
        except jax.errors.JaxRuntimeError as error:
            rows.append({"remat": remat, "rows": batch, "error": str(error)[:100]})
            continue
        compiling = time.perf_counter() - start
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, rows_of, settings, config))
            times.append(time.perf_counter() - start)
        took = float(np.median(times))
        flop = 6 * config.num_params() * tokens.size  # embeddings are tied: the table counts once, as the head
        peak = jax.devices()[0].memory_stats()
        rows.append({
            "remat": remat, "rows": batch, "s_per_step": took, "tokens_per_s": tokens.size / took,
            "MFU": flop / took / machine["flop_per_s"], "peak_GB": peak["peak_bytes_in_use"] / 1e9 if peak else 0.0,
            "first_call_s": compiling,
        })  # fmt: skip
        del state
    return rows


def experts(quick: bool, repeats: int, machine: dict) -> list[dict]:
    rows = []
    dim, ffn, tokens, top_k = (32, 16, 64, 2) if quick else (2048, 768, 8192, 8)
    for count in (4, 8) if quick else (128, 32, 8):
        config = models.Config(
            vocab_size=8, dim=dim, layers=1, heads=2, kv_heads=1, head_dim=8, ffn_dim=ffn, family="qwen3_moe",
            qk_norm=True, norm_topk=True, experts=count, top_k=top_k, dtype="bfloat16", init_std=0.1,
        )  # fmt: skip
        layer = {name: w[0] for name, w in models.init(config, jax.random.key(0))["layers"].items()}
        layer = {name: w.astype(jnp.bfloat16) for name, w in layer.items() if name == "router" or name[:2] == "e_"}
        x = jax.random.normal(jax.random.key(1), (1, tokens, dim), jnp.bfloat16)

        def loss(layer, x, form, config=config):
            return jnp.sum(moe(x, layer, config.replace(moe_form=form), Taps()).astype(jnp.float32) ** 2)

        reference = None
        for form in ("triton", "block", "dense", "ragged"):
            row = {"experts": count, "form": form}
            rows.append(row)
            print(f"{count} experts, {form}", flush=True)
            if form == "ragged" and count * tokens * top_k * dim * 2 > 10e9:
                row["error"] = "left out: every row meets every expert, which takes more than 10 GB"
                continue
            start = time.perf_counter()
            program = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2).lower(layer, x, form).compile()
            row["compile_s"] = time.perf_counter() - start
            row["temporary_GB"] = program.memory_analysis().temp_size_in_bytes / 1e9
            out = jax.block_until_ready(program(layer, x))
            row["ms"] = 1e3 * many(lambda: program(layer, x), repeats, 5)  # noqa: B023
            row["of_peak"] = 3 * 2 * 3 * dim * ffn * tokens * top_k / row["ms"] * 1e3 / machine["flop_per_s"]
            gradient = jax.tree.map(lambda g: np.asarray(g, np.float32), out)
            reference = gradient if reference is None else reference
            row["difference"] = max(
                float(np.linalg.norm(a - b) / np.linalg.norm(b))
                for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(reference), strict=True)
            )
    return rows


def value_and_gradients(form):
    """The compiled function (q, k, v, g) -> (value, gradients where the value's is g)."""

    def run(q, k, v, g):
        out, back = jax.vjp(form, q, k, v)
        return out, *back(g)

    return jax.jit(run)


def attending(quick: bool, repeats: int, machine: dict) -> list[dict]:
    rows = []
    for length, window in ((64, None),) if quick else ((1024, None), (4096, None), (4096, 1024)):
        config = models.Config(
            vocab_size=8, dim=64, layers=1, heads=32, kv_heads=8, head_dim=128, ffn_dim=8, dtype="bfloat16"
        )
        keys = jax.random.split(jax.random.key(length), 4)
        q = jax.random.normal(keys[0], (2, length, 32, 128), jnp.bfloat16)
        k, v = (jax.random.normal(key, (2, 8, length, 128), jnp.bfloat16) for key in keys[1:3])
        g = jax.random.normal(keys[3], q.shape, jnp.bfloat16)
        look = Look(
            jnp.arange(length)[None], None if window is None else jnp.int32(window), straight=True, sliding=window
        )
        forms = {
            "whole": lambda *a, look=look, config=config: _whole(*a, look, config, Taps())[0],
            "blocks": lambda *a, look=look, config=config: _blocks(*a, look, config, Taps())[0],
        }
        if jax.default_backend() == "gpu":
            forms["cudnn"] = lambda *a, look=look, config=config: _cudnn(*a, look, config)
        with jax.default_matmul_precision("highest"):
            exact = value_and_gradients(forms["whole"])(*(x.astype(jnp.float32) for x in (q, k, v, g)))
            exact = [np.asarray(x) for x in exact]
        for name, form in forms.items():
            run = value_and_gradients(form)
            out = [np.asarray(x, np.float32) for x in run(q, k, v, g)]
            errors = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(out, exact, strict=True)]
            took = many(lambda run=run, a=(q, k, v, g): run(*a), repeats)
            rows.append({
                "length": length, "window": window or "none", "form": name, "ms": 1e3 * took, "value_error": errors[0],
                "gradient_error": max(errors[1:]),
            })  # fmt: skip
    return rows


PARTS = {"attention": attending, "moe": experts, "decode": decoding, "train": training}


def show(title: str, rows: list[dict]) -> None:
    """Print rows as a table, a column for every name in any of them."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        cells = (row.get(c, "") for c in columns)
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in cells))
    Console(width=120).print(table)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes on any backend, to see that the script runs")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each; the median counts")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="where the figures go as JSON")
    options = parser.parse_args(argv)
    if jax.default_backend() != "gpu" and not options.quick:
        parser.error(f"needs a GPU, and JAX found {jax.devices()[0].platform} only; --quick runs anywhere")
    machine = peaks(options.quick, options.repeats)
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {machine['flop_per_s'] / 1e12:.0f} TFLOP/s, "
        f"{machine['bytes_per_s'] / 1e12:.2f} TB/s", flush=True,
    )  # fmt: skip
    report = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "machine": machine}
    for part in options.parts:
        report[part] = PARTS[part](options.quick, options.repeats, machine)
        show(part, report[part])
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main()
