"""What ``jaxrec plan`` prints, and what it advises when a program does not fit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
PER = {"score": "rollout", "update": "update", "prefill": "rollout", "decode": "token per row"}


def size(count: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit, scale in _UNITS:
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 1000 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 * scale else f"{seconds / scale:,.0f} {unit}"
    return "0 s" if not seconds else f"{seconds * 1e6:.2g} us"


def flops(count: float) -> str:
    for unit, scale in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e6:.3g} MFLOP"


def tables(out: dict[str, Any]) -> list[Any]:
    """Renderables for rich, legible at 80 columns: a column per program, then a row per kind of collective."""
    from rich import box
    from rich.table import Table

    each = "chip" if out["devices"] == out["chips"] else "device, half a chip,"
    usable, programs = out["chip"]["usable"], out["programs"]
    if all(p["refused"] for p in programs):
        return []
    main = Table(title=f"What one {each} holds and does", title_justify="left", box=box.SIMPLE_HEAD)
    main.add_column("")
    for p in programs:
        main.add_column(p["name"], justify="right")

    def row(name: str, value: Callable[[dict[str, Any]], str], style: str | None = None) -> None:
        main.add_row(name, *("-" if p["refused"] else value(p) for p in programs), style=style)

    def at(key: str, write: Callable[[float], str]) -> Callable[[dict[str, Any]], str]:
        return lambda p: write(p[key])

    for name, key in (("arguments", "arguments"), ("+ outputs", "outputs"), ("- written in place", "aliased"),
                      ("+ temporary", "temporary"), ("+ code", "code")):  # fmt: skip
        row(name, at(key, size))
    if any(p["held"] for p in programs):
        row("+ held beside it", at("held", size))
    row("= peak memory", lambda p: size(p["peak"] + p["held"]), "bold")
    row(f"of {size(usable)} to use", lambda p: f"{(p['peak'] + p['held']) / usable:.0%} {'' if p['fits'] else 'NO'}")
    main.add_section()
    row("a step is", lambda p: PER[p["name"]])
    row("FLOPs", at("flops", flops))
    row(f"FLOPs of all {out['devices']:,}", at("total_flops", flops))
    row("memory traffic", at("memory_bytes", size))
    row("sent over links", lambda p: size(sum(one["sent"] for one in p["collectives"])))
    main.add_section()
    row("compute alone", at("compute_seconds", duration))
    row("memory alone", at("hbm_seconds", duration))
    row("links alone", at("ici_seconds", duration))
    row("step at least", lambda p: f"{duration(p['seconds'])} ({_bound(p)})", "bold")

    moved = Table(title=f"Collectives of one {each} in a step", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("program", "kind", "over", "of", "runs", "payload", "sent", "time"):
        moved.add_column(column, justify="left" if column in ("program", "kind", "over") else "right", no_wrap=True)
    for p in programs:
        largest = max((one["sent"] for one in p["collectives"]), default=0.0)
        small = [one for one in p["collectives"] if one["sent"] < 1e-3 * largest]
        for one in p["collectives"]:
            if one not in small:
                moved.add_row(
                    p["name"], one["kind"], " x ".join(one["axes"]), str(one["group"]), f"{one['calls']:,.0f}",
                    size(one["payload"]), size(one["sent"]), duration(one["seconds"]),
                )  # fmt: skip
        if small:
            sent, took = sum(one["sent"] for one in small), sum(one["seconds"] for one in small)
            calls = sum(one["calls"] for one in small)
            moved.add_row(p["name"], "others", "", "", f"{calls:,.0f}", "", size(sent), duration(took))
    return [main, *([moved] if moved.row_count else [])]


def _bound(program: dict[str, Any]) -> str:
    terms = {"compute": "compute_seconds", "memory": "hbm_seconds", "links": "ici_seconds"}
    return max(terms, key=lambda name: program[terms[name]])


def notes(out: dict[str, Any]) -> list[str]:
    """Lines around the tables, plain text."""
    model, batch = out["model"], out["batch"]
    mesh = " x ".join(f"{name}={n}" for name, n in out["mesh"].items())
    lines = [
        f"{out['config']} on {out['topology']}: {out['chips']} chips, mesh {mesh}",
        f"{model['parameters'] / 1e9:.3g}B parameters ({model['family']}, {model['layers']} layers), weights in "
        f"{model['weights']}, computing in {model['dtype']}; rollouts of {batch['rows']:,} rows of at most "
        f"{batch['tokens']:,} tokens, updates of {batch['rows'] // batch['minibatches']:,} rows in "
        f"{batch['micro_batches']} micro-batches",
    ]
    if out["state_bytes"]:
        lines.append(f"weights and Adam's moments: {size(out['state_bytes'])} per device")
    for p in out["whole_parameters"]:
        lines.append(
            f"note: {p['name']} {p['shape']} is not split along {p['axis']} ({p['size']:,} does not divide over "
            f"{' x '.join(p['mesh'])}): {size(p['bytes'])} in float32 on every device"
        )
    for p in out["programs"]:
        if not p["refused"] and p["name"] == "decode" and p["seconds"]:
            lines.append(
                f"decode: at most {batch['rows'] / p['seconds']:,.0f} tokens/s; up to {batch['new_tokens']:,} steps a "
                f"segment take {duration(p['seconds'] * batch['new_tokens'])} or more"
            )
        if not p["refused"] and p["kernels"]:
            lines.append(
                f"{p['name']}: the FLOPs leave out {p['kernels']:,.0f} runs of kernels (fused attention, products of "
                "experts), so compute is underestimated"
            )
        if not p["refused"] and p["name"] == "update" and p["flops"] and p["total_flops"]:
            more = p["flops"] * out["devices"] / p["total_flops"]
            if more > 1.05:
                lines.append(f"update: {more:.2f} times the FLOPs of the step are done: some of it on several devices")
    if out["fits"]:
        lines.append(f"fits: every program stays below {size(out['chip']['usable'])}")
    lines.append(
        "Times are lower bounds: peak rates, one resource at a time. Memory traffic is an estimate; FLOPs are those of "
        "matrix products."
    )
    return lines


def advice(out: dict[str, Any], work: Any, sizes: dict[str, int]) -> list[str]:
    """What takes the memory, largest first, and what makes it smaller. Sizes are estimates from shapes."""
    lines: list[str] = []
    for p in out["programs"]:
        if p["fits"]:
            continue
        lines.append(f"{p['name']} does not fit{': ' + p['refused'] if p['refused'] else ''}")
        suspects = (
            _of_training(p, out, work, sizes) if p["name"] in ("score", "update") else _of_sampling(p, work, sizes)
        )
        suspects.sort(key=lambda pair: -pair[0])
        lines += [f"  about {size(count)}: {what}" for count, what in suspects[:4] if count > 0]
        wanted = re.search(r"\((?:Used )?([\d.]+)([MGT])", p["refused"])
        scale = {"M": 2.0**20, "G": 2.0**30, "T": 2.0**40}
        if wanted and 4 * sum(count for count, _ in suspects) < float(wanted.group(1)) * scale[wanted.group(2)]:
            more = "; with experts: raise config.mesh.expert" if work.model.experts else ""
            lines.append(
                "  These parts are far less than that: the compiler keeps something whole on every chip, or copies of "
                f"it{more}"
            )
    return lines


def _share(count: int, ways: int) -> float:
    """What one device has of an axis that stays whole where it does not divide."""
    return count / ways if count % ways == 0 else count


def _shards(sizes: dict[str, int]) -> int:
    from models.sharding import RULES

    return math.prod(sizes[axis] for axis in RULES["batch"])


def _of_training(
    program: dict[str, Any], out: dict[str, Any], work: Any, sizes: dict[str, int]
) -> list[tuple[float, str]]:
    """(bytes, what they are and what to do), for ``score`` and ``update``."""
    c, g, tensor = work.model, work.grpo, sizes["tensor"]
    width = 2 if c.dtype == "bfloat16" else 4
    update = program["name"] == "update"
    rows = work.rows / (g.minibatches if update else 1) / g.micro_batches / _shards(sizes)
    tokens, heads = rows * work.max_total, _share(c.heads, tensor)
    scores = rows * heads * work.max_total**2 * 4
    fewer = "raise config.rl.micro_batches, " if rows > 1 else ""  # else a slice has one row per device
    square = f"{rows:g} x {heads:g} heads of {work.max_total:,} x {work.max_total:,}"
    shorter = "raise config.mesh.tensor, or lower config.rollout.max_total"
    suspects = [
        (scores, f"attention scores of one layer, {square}: {fewer}{shorter}"),
        (rows * g.logprob_chunk * _share(c.vocab_size, tensor) * 4,
         f"logits of one chunk: lower config.rl.logprob_chunk={g.logprob_chunk}, or raise config.mesh.tensor"),
        (out["state_bytes"],
         "weights and Adam's moments: raise config.mesh.fsdp (data copies them) or tensor, or take more chips"),
    ]  # fmt: skip
    if update and c.remat == "block":
        inputs = f"inputs of {c.layers} layers: {fewer}lower config.rollout.max_total"
        suspects.append((c.layers * tokens * c.dim * width, inputs))
    elif update:
        a_layer = tokens * (10 * c.dim + 3 * c.ffn_dim * max(1, c.top_k) / tensor) * width + 1.5 * scores
        kept = 0.5 if c.remat == "products" else 1.0
        suspects.append((kept * c.layers * a_layer, "activations of all layers: set --config.model.remat=block"))
    if update and g.micro_batches > 1:
        suspects.append((out["state_bytes"] / 3, "sum of gradients in float32: as for the weights"))
    return suspects


def _of_sampling(program: dict[str, Any], work: Any, sizes: dict[str, int]) -> list[tuple[float, str]]:
    """(bytes, what they are and what to do), for ``prefill`` and ``decode``."""
    c, g, tensor = work.model, work.grpo, sizes["tensor"]
    width = 2 if c.dtype == "bfloat16" else 4
    shards = _shards(sizes)
    rows = math.ceil(work.rows / shards)
    per_token = 2 * _share(c.kv_heads, tensor) * c.head_dim
    if latent := getattr(c, "kv_lora", 0):  # the latent alone, in whole lanes (models.sample)
        per_token = -(-(latent + c.rope_dim) // 128) * 128
    weights = c.num_params() * width / (tensor * sizes["expert"])
    suspects = [
        (c.layers * rows * per_token * work.max_total * width,
         f"cache of {rows} rows of {work.max_total:,} tokens: lower config.rl.prompts_per_step or "
         "config.rollout.max_total, or raise config.mesh.tensor or fsdp"),
        (weights / sizes["fsdp"], "the sampler's copy of the weights: raise config.mesh.tensor, expert or fsdp"),
        (program["held"], "the trainer's weights and moments, which stay while it samples: raise config.mesh.fsdp"),
    ]  # fmt: skip
    if sizes["fsdp"] > 1:
        suspects.append(
            (weights, "weights of other chips, gathered at every step, at most: more of config.mesh.tensor or expert, "
                      "less of fsdp")
        )  # fmt: skip
    if program["name"] == "prefill":
        prompts = math.ceil(g.prompts_per_step / shards)
        suspects.append(
            (prompts * _share(c.heads, tensor) * work.max_prompt**2 * 4,
             "attention scores of the prompts: lower config.rollout.max_prompt or rl.prompts_per_step")
        )  # fmt: skip
    return suspects


def show(out: dict[str, Any]) -> None:
    """Print the report."""
    from rich.console import Console

    console = Console()
    lines = notes(out)
    head = 3 if out["state_bytes"] else 2
    for line in lines[:head]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for table in tables(out):
        console.print()
        console.print(table)
    console.print()
    for line in lines[head:] + out["advice"]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
