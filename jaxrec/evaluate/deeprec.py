"""DeepRec's test: recommenders alone, the model after each stage, controls, and paired intervals over users.

Test users are scored once per row, after every choice has been made on validation users. All methods rank the same
users over the full catalogue with the same items left out.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrec.config import write_atomic
from jaxrec.data.recommendation import Task
from jaxrec.evaluate.agent import Judged, play, readable
from jaxrec.evaluate.ranking import evaluate_ranking, paired_interval, rank_values
from jaxrec.tools.recommenders import Trained, preference_texts, scorer
from jaxrec.tools.trm import random_words
from models.recsys import Markov, Popularity

CONTROLS = (
    "lr_0", "blank_text", "random_words", "untrained", "one_call", "one_query", "no_stage1", "no_point", "with_point",
    "no_rank",
)  # fmt: skip
# Controls trained and played in another environment: arguments of its constructor.
ENV_CONTROLS = {"one_call": {"max_calls": 1}, "one_query": {"first_query_only": True}}
METRICS = ("recall@1", "recall@5", "recall@10", "ndcg@5", "ndcg@10")
STAGE1_REWARD = "stage1_reward"  # form, invocation and diversity, in sampled play: what stage 1 is trained to raise
SFT, STAGE1, STAGE2 = "DeepRec after SFT", "DeepRec after stage 1", "DeepRec after stage 2"
HISTORY_ONLY, BEST_ALONE, ORACLE = "TRM, history only", "best recommender alone", "TRM, true words (ceiling)"
NAMES = {
    "popularity": "popularity", "markov": "Markov", "sasrec": "SASRec", "gru4rec": "GRU4Rec",
    "trm_no_text": "TRM trained without texts",
}  # fmt: skip
LABELS = {
    "lr_0": "stage 2, learning rate 0", "blank_text": "stage 2, query text blanked",
    "random_words": "stage 2, random query words", "untrained": "untrained, several turns",
    "one_call": "one call, same SFT, same steps", "one_query": "one query over all calls, same SFT, same steps",
    "no_stage1": "stage 2 without stage 1", "no_point": "without r_point",
    "with_point": "with r_point", "no_rank": "without r_rank",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class SeedResult:
    """rows: name -> figures; values: name -> {metric: float [users]}; protocol: how it was measured."""

    seed: int
    rows: dict[str, dict[str, float]]
    values: dict[str, dict[str, np.ndarray]]
    protocol: dict[str, Any]


def _row(rank: np.ndarray, kinds: np.ndarray | None, intent: int = 1) -> dict[str, float]:
    row = {metric: float(rank_values(rank, metric).mean()) for metric in METRICS}
    if kinds is not None and (kinds == intent).any() and (kinds != intent).any():
        row["recall@10_intent"] = float((rank[kinds == intent] <= 10).mean())
        row["recall@10_other"] = float((rank[kinds != intent] <= 10).mean())
    return row


class _Book:
    """Rows of one seed, kept on disk as they come: an interrupted evaluation goes on where it stopped."""

    def __init__(self, folder: Path, kinds: np.ndarray | None):
        self.folder, self.kinds = folder, kinds
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, dict[str, float]] = {}
        self.values: dict[str, dict[str, np.ndarray]] = {}

    def _path(self, name: str) -> Path:
        return self.folder / ("".join(c if c.isalnum() else "_" for c in name) + ".json")

    def known(self, name: str) -> bool:
        path = self._path(name)
        if path.exists():
            kept = json.loads(path.read_text())
            self.rows[name] = kept["row"]
            self.values[name] = {metric: np.array(v) for metric, v in kept["values"].items()}
        return path.exists()

    def add(self, name: str, row: Mapping[str, float], values: Mapping[str, np.ndarray]) -> None:
        self.rows[name], self.values[name] = dict(row), dict(values)
        kept = {"row": dict(row), "values": {metric: np.asarray(v).tolist() for metric, v in values.items()}}
        write_atomic(self._path(name), json.dumps(kept))

    def add_ranks(self, name: str, rank: np.ndarray, **more: float) -> None:
        values = {metric: rank_values(rank, metric) for metric in METRICS}
        self.add(name, {**_row(rank, self.kinds), **more}, values)

    def add_judged(self, name: str, judged: Judged, stage1: np.ndarray | None, **more: float) -> None:
        row, values = {**judged.row(self.kinds), **more}, {metric: judged.values(metric) for metric in METRICS}
        if stage1 is not None:
            row[STAGE1_REWARD], values[STAGE1_REWARD] = float(stage1.mean()), stage1
        self.add(name, row, values)


def evaluate_seed(this: Any, baselines: Mapping[str, Trained], controls: Mapping[str, str]) -> SeedResult:
    """All rows of one seed. ``this`` is the run; controls: name -> the checkpoint to play."""
    config, task = this.config, this.task
    examples = task.examples("test", config.data.test_users or None, this.seed)
    rows = np.array([example.index for example in examples])
    kinds = task.kinds["test"][rows] if task.kinds else None
    book = _Book(this.checkpoint("evaluate"), kinds)
    seconds = json.loads(p.read_text()) if (p := this.folder / "seconds.json").exists() else {}
    alone(this, baselines, book, rows)

    options = this.rollout_config(temperature=0.0)
    spent = seconds.get("trm", 0.0)
    for name, checkpoint in ((SFT, "cold_start"), (STAGE1, "cold_rl"), (STAGE2, "rec_rl")):
        spent += seconds.get(checkpoint, 0.0)
        _play(this, book, name, checkpoint, this.env(stop_on_answer=True), options, examples, seconds=spent)
    tools = {
        "blank_text": {"blank": True},
        "random_words": {"edit_text": random_words(task.vocabulary, this.seed)},
    }
    for name, checkpoint in controls.items():
        env = this.env(stop_on_answer=True, **ENV_CONTROLS.get(name, {}), **tools.get(name, {}))
        _play(this, book, LABELS[name], checkpoint, env, options, examples)
    protocol = {
        "task": task.name, "split": task.split.protocol, "part": "test", "ranking": "full",
        "history_excluded": bool(config.env.exclude_history), "users": len(rows), "items": len(task.catalogue),
        "decoding": "greedy", "users_of_stage1_reward": len(_spread(examples, config.evaluate.sampled_users)),
    }  # fmt: skip
    return SeedResult(this.seed, book.rows, book.values, protocol)


def _play(this, book: _Book, name: str, checkpoint: str, env, options, examples, **more: float) -> None:
    if book.known(name):
        return
    model = this.model(checkpoint)
    print(f"evaluate: {name}", flush=True)
    size = min(this.config.evaluate.batch_size, len(examples))
    judged = play(
        model.params, model.config, model.tokenizer, env, examples, options, batch_size=size, seed=this.seed,
        mesh=this.mesh,
    )  # fmt: skip
    stage1 = None
    if name in (SFT, STAGE1):
        some = _spread(examples, this.config.evaluate.sampled_users)
        sampled = play(
            model.params, model.config, model.tokenizer, this.env(), some, this.rollout_config(),
            batch_size=min(size, len(some)), seed=this.seed, mesh=this.mesh,
        )  # fmt: skip
        stage1 = this.reward(sampled.states, "cold")["total"]
    count = this.config.evaluate.trajectories
    if checkpoint in ("cold_start", "cold_rl", "rec_rl") and name in (SFT, STAGE1, STAGE2) and count:
        found = np.flatnonzero(judged.values("recall@10") > 0)[: count // 2]
        others = np.setdiff1d(np.arange(len(examples)), found)[: count - len(found)]
        records = readable(judged, [*found, *others], this.task.catalogue, checkpoint, 0)
        _replace_records(this.folder / "trajectories.jsonl", checkpoint, records)
    book.add_judged(name, judged, stage1, **more)


def _spread(examples: Sequence[Any], limit: int) -> Sequence[Any]:
    """At most ``limit`` of the examples (0: all), evenly spaced."""
    return examples[:: -(-len(examples) // limit)] if limit else examples


def _replace_records(path: Path, stage: str, records: list[dict]) -> None:
    kept = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in kept if json.loads(line)["stage"] != stage]
    write_atomic(path, "".join(line + "\n" for line in [*kept, *(json.dumps(record) for record in records)]))


def alone(this: Any, baselines: Mapping[str, Trained], book: _Book, rows: np.ndarray) -> None:
    """Rows of the recommenders without a language model. "Best" is the one with the best validation NDCG@10."""
    task: Task = this.task
    exclude = bool(this.config.env.exclude_history)

    def rank(score, max_len: int) -> np.ndarray:
        return evaluate_ranking(
            score, task.split, "test", max_len=max_len, exclude_history=exclude, batch_size=1024, rows=rows
        ).ranks

    _users, items, previous = task.split.train_events()
    floors = {
        "popularity": lambda: Popularity.fit(items, len(task.catalogue)),
        "markov": lambda: Markov.fit(previous, items, len(task.catalogue)),
    }
    for name, fit in floors.items():
        if not book.known(NAMES[name]):
            book.add_ranks(NAMES[name], rank(fit().scores, task.max_len), seconds=0.0)
    for name, trained in baselines.items():
        if not book.known(NAMES[name]):
            ranks = rank(scorer(trained.server), trained.module.max_len)
            book.add_ranks(NAMES[name], ranks, seconds=trained.seconds)
    trm: Trained = this.trm
    if not book.known(HISTORY_ONLY):
        book.add_ranks(HISTORY_ONLY, rank(scorer(this.server), trm.module.max_len), seconds=trm.seconds)
    if not book.known(ORACLE):
        book.add_ranks(ORACLE, oracle_ranks(this, rows))
    contestants = {NAMES[name]: t.valid["ndcg@10"] for name, t in baselines.items()}
    contestants[HISTORY_ONLY] = trm.valid["ndcg@10"]
    best = max(contestants, key=contestants.get)
    book.rows[BEST_ALONE] = {**book.rows[best], "is": best}
    book.values[BEST_ALONE] = book.values[best]


def oracle_ranks(this: Any, rows: np.ndarray) -> np.ndarray:
    """Ranks when the tool is told the true words of the target: what perfect queries could reach in one call."""
    task = this.task
    samples = task.split.samples("test", task.max_len)
    mixer = preference_texts(task, history_only=0.0, no_text=0.0, max_phrases=4)
    texts = np.asarray(mixer.oracle(samples.targets[rows]))
    position = iter(range(0, len(rows), 1024))

    def score(history: np.ndarray, lengths: np.ndarray):
        low = next(position)
        part = texts[low : low + 1024]
        part = np.concatenate([part, np.repeat(part[-1:], len(history) - len(part), axis=0)])
        return this.server.scores(history, lengths, part)

    return evaluate_ranking(
        score, task.split, "test", max_len=task.max_len, exclude_history=bool(this.config.env.exclude_history),
        batch_size=1024, rows=rows,
    ).ranks  # fmt: skip


# (name, metric, a, b): the mean of a - b over users with a paired 95 % bootstrap interval. The first one decides.
QUESTIONS = (
    ("RL over its SFT start", "recall@10", STAGE2, SFT),
    ("stage 1 raises its reward", STAGE1_REWARD, STAGE1, SFT),
    ("stage 1 over its SFT start", "recall@10", STAGE1, SFT),
    ("stage 2 over stage 1", "recall@10", STAGE2, STAGE1),
    ("over the TRM with history only", "recall@10", STAGE2, HISTORY_ONLY),
    ("over the best validated recommender alone", "recall@10", STAGE2, BEST_ALONE),
    ("several calls over one", "recall@10", STAGE2, LABELS["one_call"]),
    ("several queries over one", "recall@10", STAGE2, LABELS["one_query"]),
    ("true words over blanked ones", "recall@10", STAGE2, LABELS["blank_text"]),
    ("own words over random ones", "recall@10", STAGE2, LABELS["random_words"]),
    ("stage 1 then 2 over 2 alone", "recall@10", STAGE2, LABELS["no_stage1"]),
    ("with r_point over without", "recall@10", STAGE2, LABELS["no_point"]),
    ("without r_point over with", "recall@10", STAGE2, LABELS["with_point"]),
    ("with r_rank over without", "recall@10", STAGE2, LABELS["no_rank"]),
    ("learning rate 0 against SFT", "recall@10", LABELS["lr_0"], SFT),
)


def pool(config: Any, results: list[SeedResult], workdir: Path) -> dict:
    """Mean rows over seeds, intervals over all seeds' users together; written to result.json."""
    names = [name for name in results[0].rows if all(name in r.rows for r in results)]
    rows = []
    for name in names:
        parts = [r.rows[name] for r in results]
        numbers = [k for k in parts[0] if all(isinstance(p.get(k), int | float) for p in parts)]
        row: dict[str, Any] = {"name": name, **{k: float(np.mean([p[k] for p in parts])) for k in numbers}}
        if name == BEST_ALONE:
            row["name"] = f"{name} ({', '.join(sorted({str(p['is']) for p in parts}))})"
        if len(parts) > 1:
            row["recall@10_std"] = float(np.std([p["recall@10"] for p in parts], ddof=1))
        rows.append(row)
    comparisons = []
    for number, (title, metric, a, b) in enumerate(QUESTIONS):
        if all(x in r.values for r in results for x in (a, b)):
            first, second = (np.concatenate([r.values[x][metric] for r in results]) for x in (a, b))
            difference, low, high = paired_interval(first, second, seed=0)
            comparison = {"name": f"{title}: {a} - {b}", "metric": metric, "difference": difference,
                          "low": low, "high": high}  # fmt: skip
            if number == 0:
                comparison |= {"criterion": config.evaluate.criterion, "met": bool(low > 0)}
            comparisons.append(comparison)
    protocol = {**results[0].protocol, "seeds": [r.seed for r in results],
                "users": int(sum(r.protocol["users"] for r in results))}  # fmt: skip
    result = {
        "system": config.system, "variant": config.variant, "seed": list(config.seeds), "protocol": protocol,
        "rows": rows, "comparisons": comparisons,
    }  # fmt: skip
    write_atomic(workdir / "result.json", json.dumps(result, indent=1))
    return result
