"""Seconds of one training epoch of our SASRec beside RecBole's, and beside what this machine could do at most.

    python tests/bench/sasrec.py [--quick] [--data FOLDER/ml-100k] [--recbole-python PYTHON] [--users 0] [--epochs 3]

Both train RecBole's form: prefix samples of at most 50 items, batches of 2,048, width 64, two layers, dropout 0.5,
Adam, softmax over all items, from the same file. RecBole runs in a process of its own environment (it needs
older packages, see README.md) and trains an epoch whenever it is told to, so the two take turns epoch by epoch. One
warm-up epoch each (ours compiles in it), then the fastest counts; CPU seconds (all threads of that process) stand
beside the clock's. Without --data a file of MovieLens-100K's size is drawn; without --recbole-python only ours is
measured. ``limit`` is counted, not measured: all matrix products over the real lengths, without padding and with one
query in the last layer, at the rate measured in the same run.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

MAX_LEN, DIM, FFN, LAYERS, HEADS, BATCH = 50, 64, 256, 2, 2, 2048

DRIVER = """
import json, sys, time
folder, name, settings, out = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.stdout
sys.argv, sys.stdout = sys.argv[:1], sys.stderr  # RecBole reads flags from one and may print to the other
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed

config = Config(model="SASRec", dataset=name, config_dict={"data_path": folder, **settings})
init_seed(config["seed"], True)
dataset = create_dataset(config)
train, _, _ = data_preparation(config, dataset)
trainer = Trainer(config, SASRec(config, train.dataset).to(config["device"]))

def say(**values):
    print(json.dumps(values), file=out, flush=True)

say(samples=len(train.dataset), items=dataset.item_num - 1)
for epoch, _ in enumerate(sys.stdin):
    wall, cpu = time.perf_counter(), time.process_time()
    loss = trainer._train_epoch(train, epoch, show_progress=False)
    say(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu, loss=loss / len(train))
"""

SETTINGS = {
    "USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "TIME_FIELD": "timestamp",
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "MAX_ITEM_LIST_LENGTH": MAX_LEN,
    "hidden_size": DIM, "inner_size": FFN, "n_layers": LAYERS, "n_heads": HEADS, "loss_type": "CE",
    "train_neg_sample_args": None, "train_batch_size": BATCH, "learning_rate": 1e-3, "state": "ERROR",
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
    "use_gpu": False, "gpu_id": "", "save_dataset": False, "save_dataloaders": False,
}  # fmt: skip


class RecBole:
    """A RecBole process that trains one epoch per line it is sent."""

    def __init__(self, python: str, folder: Path, scratch: Path):
        environment = os.environ | {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "CUDA_VISIBLE_DEVICES": ""}
        settings = SETTINGS | {"checkpoint_dir": str(scratch)}
        self.log = scratch / "recbole.log"
        self.process = subprocess.Popen(
            [python, "-c", DRIVER, str(folder.parent), folder.name, json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"), text=True, cwd=scratch,
            env=environment,
        )  # fmt: skip
        self.about = self._read()

    def _read(self) -> dict[str, float]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"RecBole ended early; its last words:\n{self.log.read_text()[-2000:]}")
        return json.loads(line)

    def epoch(self) -> dict[str, float]:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)


def draw_interactions(path: Path, users: int, items: int, events: int, seed: int = 0) -> None:
    """A file of interactions in RecBole's format, its sizes and skew like MovieLens-100K's."""
    rng = np.random.default_rng(seed)
    shares = rng.lognormal(sigma=1.0, size=users)
    counts = np.maximum(20 * events // 100_000, (events * shares / shares.sum()).astype(int)) + 3
    popularity = 1.0 / np.arange(10, items + 10)
    who = np.repeat(np.arange(1, users + 1), counts)
    what = rng.choice(np.arange(1, items + 1), len(who), p=popularity / popularity.sum())
    path.parent.mkdir(parents=True)
    with path.open("w") as file:
        file.write("user_id:token\titem_id:token\trating:float\ttimestamp:float\n")
        file.writelines(f"{u}\t{i}\t1\t{t}\n" for t, (u, i) in enumerate(zip(who, what, strict=True)))


def first_users(source: Path, path: Path, users: int) -> None:
    """Copy the interactions of the first ``users`` users (0: all) that the file names."""
    lines = source.read_text().splitlines(keepends=True)
    names = [line.split("\t", 1)[0] for line in lines[1:]]
    kept = set(list(dict.fromkeys(names))[: users or None])
    path.parent.mkdir(parents=True)
    path.write_text("".join([lines[0], *(x for x, name in zip(lines[1:], names, strict=True) if name in kept)]))


def counted_seconds(lengths: np.ndarray, items: int, flop_per_s: float) -> float:
    """Least time of an epoch: forward and twice as much backward, over the real lengths."""
    lengths = np.asarray(lengths, np.float64)
    whole = lengths * (8 * DIM**2 + 4 * DIM * FFN) + 4 * lengths**2 * DIM / 2
    last = lengths * 4 * DIM**2 + 4 * DIM**2 + 4 * DIM * FFN + 4 * lengths * DIM
    return 3 * float((whole * (LAYERS - 1) + last + 2 * DIM * (items + 1)).sum()) / flop_per_s


def train_ours(train: dict[str, np.ndarray], items: int, epochs: int, between) -> list[dict[str, float]]:
    """Clocks of our epochs; ``between()`` runs after each."""
    from flax import nnx

    from models.recsys import SASRec, SASRecConfig
    from rl.recommender import RecommenderConfig, fit

    module = SASRec(SASRecConfig(items, max_len=MAX_LEN, dim=DIM, layers=LAYERS, heads=HEADS), rngs=nnx.Rngs(0))
    taken: list[dict[str, float]] = []
    started = [time.process_time()]

    def progress(record):
        cpu = time.process_time() - started[0]
        taken.append({"wall": record["seconds"], "cpu": cpu, "loss": record["loss"]})
        between()
        started[0] = time.process_time()

    fit(module, train, RecommenderConfig(epochs=epochs, batch_size=BATCH), progress=progress)
    return taken


def fastest(rows: list[dict[str, float]]) -> dict[str, float]:
    """Least seconds of the epochs after the first, and the last loss."""
    return {name: min(row[name] for row in rows[1:]) for name in ("wall", "cpu")} | {"loss": rows[-1]["loss"]}


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"one SASRec epoch, {report['samples']} samples, {report['items']} items, seconds",
        caption=f"{report['machine']['flop_per_s'] / 1e9:.0f} GFLOP/s measured in this run; load "
        f"{report['load_average']:.1f}; our first epoch, with compilation: {report['first_epoch_seconds']:.1f} s",
    )
    for column in ("", "epoch", "CPU", "x limit", "loss"):
        table.add_column(column, justify="right")
    for name in ("ours", "recbole"):
        if r := report.get(name):
            times = r["wall"] / report["limit"]
            table.add_row(name, f"{r['wall']:.2f}", f"{r['cpu']:.2f}", f"{times:.1f}", f"{r['loss']:.3f}")
    if ratio := report.get("ratio"):
        table.add_row("ratio", f"{ratio['wall']:.2f}x", f"{ratio['cpu']:.2f}x")
    table.add_row("limit", f"{report['limit']:.2f}")
    Console().print(table)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few users, for checking that the script runs")
    parser.add_argument("--data", type=Path, help="folder with <folder's name>.inter, e.g. .../ml-100k")
    parser.add_argument("--recbole-python", help="python of an environment with RecBole; without it only ours runs")
    parser.add_argument("--users", type=int, default=0, help="train on the first so many users; 0 is all")
    parser.add_argument("--epochs", type=int, default=3, help="measured epochs of each side; the fastest counts")
    parser.add_argument("--out", type=Path, default=Path("sasrec.json"), help="where the figures go as JSON")
    options = parser.parse_args(argv)
    if options.epochs < 1 or options.users < 0:
        parser.error("--epochs must be at least 1 and --users at least 0")
    if options.data and not (options.data / f"{options.data.name}.inter").is_file():
        parser.error(f"--data: there is no {options.data.name}.inter in {options.data}")
    sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
    import jax
    from decode import measure_machine

    from jaxrec.data import leave_one_out, load_interactions

    epochs = 1 if options.quick else options.epochs
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "data" / "interactions"
        path = folder / f"{folder.name}.inter"
        if options.data:
            first_users(options.data / f"{options.data.name}.inter", path, 30 if options.quick else options.users)
        elif options.quick:
            draw_interactions(path, 30, 100, 3000)
        else:
            draw_interactions(path, options.users or 943, 1682, (options.users or 943) * 106)
        split = leave_one_out(load_interactions(folder))
        samples = split.samples("train", MAX_LEN)
        arrays = {"history": samples.history, "lengths": samples.lengths, "targets": samples.targets}
        machine = measure_machine(20, 256 if options.quick else 1024, 5)
        peer = RecBole(options.recbole_python, folder, Path(scratch)) if options.recbole_python else None
        other: list[dict[str, float]] = []
        if peer and (peer.about["samples"], peer.about["items"]) != (len(samples.lengths), split.num_items):
            raise RuntimeError(f"RecBole made {peer.about} of the file, we {len(samples.lengths)}, {split.num_items}")
        mine = train_ours(arrays, split.num_items, epochs + 1, lambda: peer and other.append(peer.epoch()))
        if peer:
            peer.close()
    report = {
        "samples": len(samples.lengths), "items": split.num_items, "data": "ml-100k" if options.data else "drawn",
        "ours": fastest(mine), "first_epoch_seconds": mine[0]["wall"],
        "limit": counted_seconds(samples.lengths, split.num_items, machine["flop_per_s"]),
        "machine": machine | {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"jax": jax.__version__}, "load_average": os.getloadavg()[0],
        "epochs": {"ours": mine, "recbole": other},
    }  # fmt: skip
    if peer:
        report["recbole"] = fastest(other)
        report["ratio"] = {name: report["recbole"][name] / report["ours"][name] for name in ("wall", "cpu")}
    show(report)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main()
