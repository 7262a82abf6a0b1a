"""What it costs to look inside: calibration of experts and taps beside a plain forward pass, memory by prompt length,
and a masked model beside the smaller one.

    python tests/bench/looking.py [--quick] [--repeats 5] [--parts calibrate memory pruned taps] [--out looking.json]

``calibrate``: expert statistics of a batch over a plain forward pass without logits (goal 1.3x). ``memory``: temporary
bytes of the compiled calibration of one row, by its length; and of the sums that leave it. ``pruned``: a forward pass
with half of the experts masked, and of the model without them, over the full one. ``taps``: a forward pass that counts
how often each neuron fires, or records the residual, over a plain one. Calls are interleaved and the fastest counts.
"""

import argparse
import functools
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

sys.path = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]  # models.py here is no package
_spec = importlib.util.spec_from_file_location("bench_models", Path(__file__).with_name("models.py"))
bench = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bench)


def _model(experts: int, dim: int = 256):
    import jax

    import models

    if experts:
        config = models.Config(
            family="qwen3_moe", vocab_size=2000, dim=dim, layers=4, heads=4, kv_heads=4, head_dim=64, ffn_dim=dim,
            qk_norm=True, experts=experts, top_k=2, norm_topk=True,
        )  # fmt: skip
    else:
        config = models.Config(
            vocab_size=2000, dim=dim, layers=4, heads=4, kv_heads=4, head_dim=64, ffn_dim=4 * dim, qk_norm=True
        )
    return models.init(config, jax.random.key(0)), config


def _fastest(calls: dict, repeats: int) -> dict[str, float]:
    bench.decode.fastest(calls, 1)
    return bench.decode.fastest(calls, repeats)


def calibrate(repeats: int, rows: int, length: int) -> list[dict]:
    import jax

    import models
    from analysis.experts import statistics

    plain = jax.jit(functools.partial(models.forward, head=False), static_argnums=1)
    scored = jax.jit(statistics, static_argnums=1)

    def one(experts: int) -> dict:
        params, config = _model(experts)
        tokens = np.random.default_rng(0).integers(0, 2000, (rows, length), dtype=np.int32)
        valid = np.ones(tokens.shape, bool)
        best = _fastest(
            {
                "plain": lambda: jax.block_until_ready(plain(params, config, tokens).hidden),
                "scored": lambda: jax.block_until_ready(scored(params, config, tokens, valid)),
            },
            repeats,
        )
        return {"experts": experts, "tokens": tokens.size, **best, "ratio": best["scored"] / best["plain"]}

    return [one(16), one(64)]


def memory(lengths: list[int]) -> list[dict]:
    import jax
    import jax.numpy as jnp

    from analysis.experts import statistics

    params, config = _model(16)
    out = []
    for length in lengths:
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        valid = jax.ShapeDtypeStruct((1, length), jnp.bool_)
        made = jax.jit(statistics, static_argnums=1).lower(params, config, tokens, valid).compile().memory_analysis()
        kept = made.output_size_in_bytes
        out.append(
            {"tokens": length, "temporary_bytes_per_token": made.temp_size_in_bytes / length, "kept_bytes": kept}
        )
    return out


def pruned(repeats: int, rows: int, length: int) -> list[dict]:
    import jax

    import models
    from analysis.experts import select
    from models.moe import keep_experts

    run = jax.jit(functools.partial(models.forward, head=False), static_argnums=1)

    def one(experts: int) -> dict:
        params, config = _model(experts)
        tokens = np.random.default_rng(0).integers(0, 2000, (rows, length), dtype=np.int32)
        mask = select(np.random.default_rng(0).random((4, experts)), experts // 2)
        smaller, small = keep_experts(params, config, mask)
        best = _fastest(
            {
                "full": lambda: run(params, config, tokens).hidden.block_until_ready(),
                "masked": lambda: run(params, config, tokens, expert_mask=mask).hidden.block_until_ready(),
                "pruned": lambda: run(smaller, small, tokens).hidden.block_until_ready(),
            },
            repeats,
        )
        size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
        ratios = {"masked_ratio": best["masked"] / best["full"], "pruned_ratio": best["pruned"] / best["full"]}
        return {"experts": experts, **best, **ratios, "weights_ratio": size(smaller) / size(params)}

    return [one(16), one(64)]


def taps(repeats: int, rows: int, length: int) -> list[dict]:
    import jax

    import models
    from models.taps import Reduced

    params, config = _model(0)
    tokens = np.random.default_rng(0).integers(0, 2000, (rows, length), dtype=np.int32)
    fired = {"fired": Reduced(("mlp.gate",), lambda v: (v["mlp.gate"] > 0).sum(axis=(0, 1)))}
    run = functools.partial(models.forward, head=False)
    forms = {
        "plain": jax.jit(run, static_argnums=1),
        "fired": jax.jit(functools.partial(run, reduce=fired), static_argnums=1),
        "recorded": jax.jit(functools.partial(run, record=("resid.post",)), static_argnums=1),
    }
    best = _fastest(
        {n: lambda f=f: jax.block_until_ready(f(params, config, tokens)) for n, f in forms.items()}, repeats
    )
    return [{"tap": name, "seconds": best[name], "ratio": best[name] / best["plain"]} for name in forms]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, one repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", nargs="+", default=["calibrate", "memory", "pruned", "taps"])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows, length, repeats = (2, 64, 1) if given.quick else (8, 256, given.repeats)
    lengths = [1024, 2048] if given.quick else [1024, 4096, 16384, 65536]
    parts = {
        "calibrate": lambda: calibrate(repeats, rows, length), "memory": lambda: memory(lengths),
        "pruned": lambda: pruned(repeats, rows, length), "taps": lambda: taps(repeats, rows, length),
    }  # fmt: skip
    found = {}
    for name in given.parts:
        found[name] = parts[name]()
        bench.show(name, found[name])
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
