"""Seconds of one GRPO step of ours beside TRL's ``GRPOTrainer``, and beside what this machine could do at most.

    python tests/bench/grpo.py [--quick] [--steps 5] [--out grpo.json]      (needs pip install '.[bench]')

A step is 8 prompts x 8 samples of a random Qwen3 in float32 (2 layers, width 128), 32 prompt tokens, 64 new ones, a
reward, and one AdamW update over all of it. The weights, prompts, reward, clipping and learning rate are the same; no
row ends early on either side, and both learn from the tokens they sampled themselves. TRL's gradient checkpointing is
off. The two sides take turns step by step in one process, after one warm-up step each (ours compiles in it). The
median step counts; CPU seconds (all threads) stand beside the clock's, since other load moves the clock more. ``limit``
is counted, not measured: the floating-point operations of all matrix products at the rate measured in the same run.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {"dim": 128, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn_dim": 256, "vocab_size": 1000}
QUICK = {"dim": 32, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn_dim": 64, "vocab_size": 100}
LEARNING_RATE = 1e-4


class Clock:
    """Wall and CPU seconds between ``start`` and ``stop``."""

    def start(self) -> "Clock":
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self

    def stop(self) -> dict[str, float]:
        return {"wall": time.perf_counter() - self.wall, "cpu": time.process_time() - self.cpu}


class Words:
    """The tokenizer of both sides: ids are words w0, w1, ... between spaces; 0 pads, 1 ends a text."""

    def __init__(self, vocab_size: int):
        from tokenizers import Tokenizer, models, pre_tokenizers

        self.words = ["[PAD]", "[EOS]", *(f"w{i}" for i in range(2, vocab_size))]
        self.fast = Tokenizer(models.WordLevel({w: i for i, w in enumerate(self.words)}, unk_token="[PAD]"))
        self.fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()

    def encode(self, text: str) -> list[int]:
        return self.fast.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids)

    def token_bytes(self) -> list[bytes]:
        return [f"{word} ".encode() for word in self.words]


class OneAnswer:
    """An environment of one segment without stop strings."""

    stop = ()

    def reset(self, examples, copies: int):
        return [None] * (len(examples) * copies), list(examples)

    def step(self, states, actions):
        from rl.envs.base import Step
        from rl.trajectory import Status

        return Step(list(states), [None] * len(actions), np.full(len(actions), Status.FINISHED, np.int32))


class Recorder:
    """What ``rl.trainer.train`` wants of a metrics writer; keeps the phases' seconds of the last step."""

    def resume(self, done: int) -> None:
        pass

    def write(self, step: int, scalars: dict, seconds: dict[str, float]) -> None:
        self.scalars, self.seconds = scalars, seconds


def reward_of(ids: np.ndarray) -> np.ndarray:
    """Share of even ids per row [B, T] -> [B]."""
    return (np.asarray(ids) % 2 == 0).mean(axis=1).astype(np.float32)


def ours(config, params, words: Words, prompts: list[str], sizes: dict[str, int]):
    """A function that takes one training step and returns its clocks."""
    import jax

    from rl.optimizer import OptimizerConfig, init_state
    from rl.policy import GRPOConfig
    from rl.rollout import RolloutConfig, rollout
    from rl.trainer import train

    settings = GRPOConfig(
        optimizer=OptimizerConfig(lr=LEARNING_RATE, b2=0.999), prompts_per_step=sizes["prompts"], minibatches=1,
        group_size=sizes["group"], advantage="grpo", max_total=sizes["prompt"] + sizes["new"],
    )  # fmt: skip
    options = RolloutConfig(
        max_prompt=sizes["prompt"], max_total=sizes["prompt"] + sizes["new"], max_new=sizes["new"], max_turns=1
    )

    def play(weights, examples, key):
        trajectory, _ = rollout(
            weights, config, words, OneAnswer(), examples, key, options, group_size=sizes["group"]
        )  # fmt: skip
        return trajectory, {"even": reward_of(trajectory.ids[:, sizes["prompt"] : options.max_total])}, {}

    held = {"state": init_state(params, settings.optimizer), "step": 0}
    recorder = Recorder()

    def step() -> dict[str, float]:
        held["step"] += 1
        state = held["state"].replace(key=jax.random.key(held["step"]))
        clock = Clock().start()
        held["state"] = train(settings, config, state, iter([prompts]), play, steps=1, writer=recorder)
        taken = clock.stop()
        if recorder.scalars["trained_tokens"] != sizes["prompts"] * sizes["group"] * sizes["new"]:
            raise RuntimeError(f"only {recorder.scalars['trained_tokens']} tokens were sampled: a row ended early")
        return taken | {"rollout": recorder.seconds["rollout"], "update": recorder.seconds["update"]}

    return step


def theirs(model, words: Words, prompts: list[str], sizes: dict[str, int], folder: str, steps: int, between) -> list:
    """Train with TRL; ``between()`` runs after each of its steps. Returns the clocks of each step."""
    import trl
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words.fast, pad_token="[PAD]", eos_token="[EOS]")
    rows = sizes["prompts"] * sizes["group"]
    args = trl.GRPOConfig(
        folder, per_device_train_batch_size=rows, num_generations=sizes["group"], max_steps=steps,
        max_completion_length=sizes["new"], generation_kwargs={"min_new_tokens": sizes["new"]},
        temperature=1.0, beta=0.0, epsilon=0.2, epsilon_high=0.28, learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant", max_grad_norm=1.0, gradient_checkpointing=False, use_cpu=True, bf16=False,
        report_to=[], save_strategy="no", logging_steps=10_000, disable_tqdm=True, seed=0,
    )  # fmt: skip
    taken, clock, inner = [], Clock(), {}

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.start()

        def on_step_end(self, *_, **__):
            total = clock.stop()
            if inner["tokens"] != rows * sizes["new"]:
                raise RuntimeError(f"TRL sampled {inner['tokens']} tokens: a row ended early")
            taken.append(total | {"rollout": inner["wall"], "update": total["wall"] - inner["wall"]})
            between()

    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completion_ids, **_: reward_of(np.asarray(completion_ids)).tolist(),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts * steps}),
        processing_class=tokenizer,
        callbacks=[Turns()],
    )
    generate = trainer._generate_and_score_completions

    def timed(inputs):
        part = Clock().start()
        out = generate(inputs)
        inner.update(part.stop(), tokens=int(out["completion_mask"].sum()))
        return out

    trainer._generate_and_score_completions = timed
    trainer.train()
    return taken


def counted_seconds(config, sizes: dict[str, int], flop_per_s: float) -> dict[str, float]:
    """Least time of both phases: matrix products with weights alone, each prompt run once per group."""
    head = config.vocab_size * config.dim
    body = config.num_params() - head
    rows = sizes["prompts"] * sizes["group"]
    sampled, all_tokens = rows * sizes["new"], rows * (sizes["prompt"] + sizes["new"])
    rollout = 2 * (sizes["prompts"] * sizes["prompt"] * body + sampled * (body + head))
    return {"rollout": rollout / flop_per_s, "update": 6 * (all_tokens * body + sampled * head) / flop_per_s}


def median(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.median([row[name] for row in rows])) for name in rows[0]}


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    machine, sizes = report["machine"], report["sizes"]
    table = Table(
        title=f"one GRPO step, {sizes['prompts']} x {sizes['group']} rows, {sizes['prompt']} + {sizes['new']} tokens",
        caption=f"{machine['flop_per_s'] / 1e9:.0f} GFLOP/s measured in this run; load {report['load_average']:.1f}; "
        f"our first step, with compilation: {report['first_step_seconds']:.1f} s",
    )
    for column in ("", "step s", "rollout s", "update s", "CPU s", "x limit"):
        table.add_column(column, justify="right")
    limit = sum(report["limit"].values())
    for name in ("ours", "trl"):
        r = report[name]
        table.add_row(
            name, f"{r['wall']:.3f}", f"{r['rollout']:.3f}", f"{r['update']:.3f}", f"{r['cpu']:.3f}",
            f"{r['wall'] / limit:.1f}",
        )  # fmt: skip
    table.add_row("ratio", *(f"{report['ratio'][name]:.2f}x" for name in ("wall", "rollout", "update", "cpu")), "")
    table.add_row("limit", f"{limit:.3f}", f"{report['limit']['rollout']:.3f}", f"{report['limit']['update']:.3f}")
    Console().print(table)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, for checking that the script runs")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each side; the median counts")
    parser.add_argument("--out", type=Path, default=Path("grpo.json"), help="where the figures go as JSON")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, not {options.steps}")
    sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import jax
    import torch
    import transformers
    import trl
    from decode import measure_machine

    import models
    from models.hf import Model

    sizes = {"prompts": 8, "group": 8, "prompt": 32, "new": 64}
    if options.quick:
        sizes = {"prompts": 2, "group": 4, "prompt": 8, "new": 8}
    steps = 2 if options.quick else options.steps
    config = models.Config(**(QUICK if options.quick else SIZES), family="qwen3", qk_norm=True, init_std=0.05)
    params = models.init(config, jax.random.key(0))
    words = Words(config.vocab_size)
    ids = np.random.default_rng(0).integers(2, config.vocab_size, (sizes["prompts"], sizes["prompt"]))
    prompts = [words.decode(row) for row in ids.tolist()]
    machine = measure_machine(20, 256 if options.quick else 1024, 5)

    mine: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        models.save(Model(config, params), Path(folder) / "m")
        model = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "m", dtype=torch.float32)
        step = ours(config, params, words, prompts, sizes)
        other = theirs(model, words, prompts, sizes, folder, steps + 1, lambda: mine.append(step()))
    best, peer = median(mine[1:]), median(other[1:])
    report = {
        "sizes": sizes, "ours": best, "trl": peer, "ratio": {name: peer[name] / best[name] for name in best},
        "limit": counted_seconds(config, sizes, machine["flop_per_s"]), "first_step_seconds": mine[0]["wall"],
        "machine": machine | {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "trl": trl.__version__},
        "load_average": os.getloadavg()[0], "steps": {"ours": mine, "trl": other},
    }  # fmt: skip
    show(report)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main()
