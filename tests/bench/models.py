"""Forward pass and train step beside torch, experts beside dense dispatch, and compile time by depth.

    python tests/bench/models.py [--quick] [--repeats 5] [--parts torch moe compile] [--out models.json]
                                                                                        (needs pip install '.[bench]')

``torch``: the same random Qwen3 weights in float32 and the same batch; a forward pass over whole sequences with all
logits, and a train step (mean cross-entropy, backward pass, AdamW). ``of peak`` is 6 (forward: 2) FLOPs per weight and
token over our time and the matrix-product rate measured in the same run; attention is left out of the count.
``moe``: value and gradients of one layer, 2,048 tokens, two experts each, by blocks of one expert and by all experts on
every token, as the number of experts grows. ``compile``: seconds until the first train step of a narrow model has run,
by layers. Calls are interleaved and the fastest of each counts.
"""

import argparse
import functools
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

_spec = importlib.util.spec_from_file_location("bench_decode", Path(__file__).with_name("decode.py"))
decode = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(decode)


def beside_torch(name: str, fields: dict, batch: int, length: int, repeats: int, flop_per_s: float) -> list[dict]:
    """Rows "forward" and "train" of one model size."""
    import jax
    import jax.numpy as jnp
    import torch
    from transformers import AutoModelForCausalLM

    import models
    from models.hf import Model
    from rl.finetune import SFTConfig, jitted_sft_step
    from rl.optimizer import OptimizerConfig, init_state

    config = models.Config(**fields, qk_norm=True)
    params = models.init(config, jax.random.key(0))
    with tempfile.TemporaryDirectory() as folder:
        models.save(Model(config, params), Path(folder) / "m")
        theirs = AutoModelForCausalLM.from_pretrained(Path(folder) / "m", dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length), dtype=np.int32)
    ids = torch.tensor(tokens, dtype=torch.long)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-5)
    settings = SFTConfig(OptimizerConfig(lr=1e-5))
    step, state = jitted_sft_step(), init_state(jax.tree.map(jnp.copy, params), settings.optimizer)
    rows = {"tokens": tokens, "mask": np.ones(tokens.shape, bool), "lengths": np.full(batch, length, np.int32)}
    forward = jax.jit(lambda p, t: models.forward(p, config, t).logits)

    def our_step():
        nonlocal state
        state, metrics = step(state, rows, settings, config)
        jax.block_until_ready(state)
        return metrics

    def their_forward():
        with torch.no_grad():
            return theirs(ids).logits

    def their_step():
        optimizer.zero_grad()
        theirs(ids, labels=ids).loss.backward()
        optimizer.step()

    difference = float(np.abs(np.asarray(forward(params, tokens)) - their_forward().numpy()).max())
    our_step()
    their_step()
    best = decode.fastest(
        {
            "forward": lambda: forward(params, tokens).block_until_ready(), "forward_torch": their_forward,
            "train": our_step, "train_torch": their_step,
        },
        repeats,
    )  # fmt: skip
    matrices = config.num_params() + (0 if config.tie_embeddings else -config.vocab_size * config.dim)
    flops = {"forward": 2 * matrices * tokens.size, "train": 6 * matrices * tokens.size}
    return [
        {
            "model": name, "what": what, "seconds": best[what], "torch_seconds": best[what + "_torch"],
            "ratio": best[what + "_torch"] / best[what], "of_peak": flops[what] / best[what] / flop_per_s,
            "logit_difference": difference,
        }
        for what in ("forward", "train")
    ]  # fmt: skip


def experts(counts: list[int], dim: int, tokens: int, repeats: int) -> list[dict]:
    """Seconds of value and gradients per form and number of experts."""
    import jax
    import jax.numpy as jnp

    import models
    from models.moe import moe
    from models.taps import Taps

    rows = []
    for count in counts:
        config = models.Config(
            vocab_size=8, dim=dim, layers=1, heads=2, kv_heads=1, head_dim=8, ffn_dim=dim, family="mixtral",
            norm_topk=True, experts=count, top_k=2, init_std=0.1,
        )  # fmt: skip
        layer = {name: w[0] for name, w in models.init(config, jax.random.key(0))["layers"].items()}
        layer = {name: w for name, w in layer.items() if name == "router" or name.startswith("e_")}
        x = jax.random.normal(jax.random.key(1), (1, tokens, dim))

        def loss(layer, x, settings):
            return jnp.sum(moe(x, layer, settings, Taps()) ** 2)

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnames="settings")
        forms = {
            form: functools.partial(gradient, settings=config.replace(moe_form=form)) for form in ("block", "dense")
        }
        calls = {form: lambda f=f, layer=layer, x=x: jax.block_until_ready(f(layer, x)) for form, f in forms.items()}
        decode.fastest(calls, 1)
        best = decode.fastest(calls, repeats)
        rows.append({"experts": count, **best, "ratio": best["dense"] / best["block"]})
    return rows


def compile_times(depths: list[int]) -> list[dict]:
    """Seconds from the call to the end of a first train step, without a compilation cache."""
    import jax

    import models
    from rl.finetune import SFTConfig, sft_step
    from rl.optimizer import OptimizerConfig, init_state

    rows, settings = [], SFTConfig(OptimizerConfig(lr=1e-5))
    for layers in depths:
        config = models.Config(
            vocab_size=512, dim=64, layers=layers, heads=4, kv_heads=2, head_dim=16, ffn_dim=128, qk_norm=True
        )
        state = init_state(models.init(config, jax.random.key(0)), settings.optimizer)
        batch = {"tokens": np.ones((2, 32), np.int32), "mask": np.ones((2, 32), bool)}
        start = time.perf_counter()
        jax.block_until_ready(jax.jit(sft_step, static_argnums=(2, 3))(state, batch, settings, config))
        rows.append({"layers": layers, "seconds": time.perf_counter() - start})
    return rows


def show(title: str, rows: list[dict]) -> None:
    """Print rows as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for checking that the script runs")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved runs of each side; the fastest counts")
    parser.add_argument("--parts", nargs="+", choices=("torch", "moe", "compile"), default=["torch", "moe", "compile"])
    parser.add_argument("--out", type=Path, default=Path("models.json"), help="where the figures go as JSON")
    options = parser.parse_args(argv)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    quick = options.quick
    machine = decode.measure_machine(20 if quick else 200, 256 if quick else 2048, 2 * options.repeats)
    report: dict = {"machine": machine, "cores": os.cpu_count()}
    if "torch" in options.parts:
        sizes = decode.QUICK if quick else decode.SIZES
        batch, length = (2, 16) if quick else (8, 128)
        report["torch"] = [
            row
            for name, fields in sizes.items()
            for row in beside_torch(name, fields, batch, length, options.repeats, machine["flop_per_s"])
        ]  # fmt: skip
        show("beside torch", report["torch"])
    if "moe" in options.parts:
        counts, dim, tokens = ([4, 8], 32, 64) if quick else ([8, 16, 32, 64, 128], 256, 2048)
        report["moe"] = experts(counts, dim, tokens, options.repeats)
        show("experts, seconds", report["moe"])
    if "compile" in options.parts:
        report["compile"] = compile_times([2, 5] if quick else [2, 12, 36])
        show("compile time", report["compile"])
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main()
