"""Train a recommender for a task and keep it: by name, with a search over settings on validation users."""

import dataclasses
import itertools
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from jaxrec.config import write_atomic
from jaxrec.data.recommendation import Task
from jaxrec.evaluate.ranking import evaluate_ranking
from models.recsys import (
    TRM,
    GRU4Rec,
    GRU4RecConfig,
    PhraseMixer,
    Recommender,
    SASRec,
    SASRecConfig,
    SequenceModel,
    TRMConfig,
    phrase_mixer,
    set_params,
)
from rl.checkpoint import Checkpointer
from rl.metrics import MetricsWriter
from rl.recommender import RecommenderConfig, fit, init_state

# name -> (module, its config); "trm" is trained with preference texts, "trm_no_text" without.
KINDS: dict[str, tuple[type, type]] = {
    "sasrec": (SASRec, SASRecConfig),
    "gru4rec": (GRU4Rec, GRU4RecConfig),
    "trm": (TRM, TRMConfig),
    "trm_no_text": (TRM, TRMConfig),
}


class Stopped(RuntimeError):
    """A fit was asked to end early; it goes on from its last checkpoint."""


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A fitted recommender. valid: its validation metrics; settings: what the search chose; seconds: of all fits."""

    name: str
    module: SequenceModel
    valid: dict[str, float]
    settings: dict[str, Any]
    seconds: float

    @property
    def server(self) -> Recommender:
        return Recommender(self.module)


def build(kind: str, task: Task, settings: Mapping[str, Any], seed: int) -> SequenceModel:
    """A fresh module of a kind. settings: fields of its config; ``max_len`` defaults to the task's."""
    if kind not in KINDS:
        raise ValueError(f"unknown recommender {kind!r}; known: {', '.join(KINDS)}")
    module, config = KINDS[kind]
    fields = {"num_items": len(task.catalogue), "max_len": task.max_len, **settings}
    if config is SASRecConfig and "dropout" in fields:  # one rate for both, so that a search covers them together
        fields.setdefault("attention_dropout", fields["dropout"])
    if config is TRMConfig:
        fields["text_dim"] = task.item_text.shape[1]
        return TRM(TRMConfig(**fields), task.item_text, rngs=nnx.Rngs(seed))
    return module(config(**fields), rngs=nnx.Rngs(seed))


def preference_texts(task: Task, *, history_only: float, no_text: float, max_phrases: int) -> PhraseMixer:
    """The texts a TRM is trained with: words of the next item mixed with words of the history."""
    return phrase_mixer(task.phrases, task.encode, history_only=history_only, no_text=no_text, max_phrases=max_phrases)


def scorer(server: Recommender, texts: np.ndarray | None = None) -> Callable[[np.ndarray, np.ndarray], Any]:
    """``(history, lengths) -> scores`` for ``evaluate_ranking``, without any text."""
    return lambda history, lengths: server.scores(history, lengths)


def _expand(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    names = list(grid)
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(grid[name] for name in names))]


def train_recommender(
    kind: str,
    task: Task,
    settings: Mapping[str, Any],
    training: RecommenderConfig,
    folder: Path,
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    texts: Mapping[str, Any] | None = None,
    exclude_history: bool,
    holdout: int = 0,
    stride: int = 0,
    save_every: int = 0,
    stop: threading.Event | None = None,
) -> Trained:
    """Fit every setting of ``grid`` (none: one fit), keep the best on validation users, resume where it stopped.

    holdout: last training targets per user that are kept from the fit (prefix form). stride: items between the starts
    of a user's windows in the "all" form; 0 is ``max_len``, windows that do not overlap.
    texts: arguments of :func:`preference_texts` for kind "trm". folder: ``<workdir>/checkpoints/<name>``; metrics go
    to the workdir's metrics.jsonl. A finished folder is loaded, not trained again. stop: once set, the fit ends with
    :class:`Stopped` after its present epoch.
    """
    how = _How(texts, exclude_history, holdout, stride, save_every, stop)
    results = []
    for number, choice in enumerate(_expand(grid or {})):
        part = folder / f"setting{number}" if grid else folder
        results.append(_train_one(kind, task, {**settings, **choice}, training, part, how))
    best = max(results, key=lambda r: r.valid[training.select])
    return dataclasses.replace(best, seconds=sum(r.seconds for r in results))


@dataclasses.dataclass(frozen=True)
class _How:
    """What all fits of one search share."""

    texts: Mapping[str, Any] | None
    exclude_history: bool
    holdout: int
    stride: int
    save_every: int
    stop: threading.Event | None


def _train_one(kind, task, settings, training, folder: Path, how: _How) -> Trained:
    # Fields of the training config may be searched over too (lr, epochs).
    names = {field.name for field in dataclasses.fields(RecommenderConfig)}
    training = dataclasses.replace(training, **{k: v for k, v in settings.items() if k in names})
    sizes = {k: v for k, v in settings.items() if k not in names}
    module = build(kind, task, sizes, training.seed)
    done = folder / "done.json"
    with Checkpointer(folder, keep=1) as checkpointer:
        if done.exists():
            facts = json.loads(done.read_text())
            best = checkpointer.restore(init_state(module, training), step=facts["step"])
            return Trained(
                kind, set_params(module, best.state["best"]), facts["valid"], dict(settings), facts["seconds"]
            )
        return _fit(kind, task, module, settings, training, folder, checkpointer, how)


def _fit(kind, task, module, settings, training, folder, checkpointer, how: _How) -> Trained:
    start = time.perf_counter()
    if training.form == "all":
        items, targets = task.split.train_windows(module.max_len, how.stride or module.max_len)
        arrays = {"items": items, "targets": targets}
    else:
        samples = task.split.samples("train", module.max_len)
        arrays = {"history": samples.history, "lengths": samples.lengths, "targets": samples.targets}
        if how.holdout:
            keep = np.ones(len(samples), bool)
            keep[task.prompt_rows(how.holdout)] = False
            arrays = {name: array[keep] for name, array in arrays.items()}
    text = preference_texts(task, **how.texts) if kind == "trm" and how.texts is not None else None

    def evaluate(candidate: SequenceModel) -> dict[str, float]:
        return evaluate_ranking(
            scorer(Recommender(candidate)), task.split, "valid", max_len=module.max_len,
            exclude_history=how.exclude_history, batch_size=1024,
        ).metrics  # fmt: skip

    state, before = None, 0.0
    if (restored := checkpointer.restore(init_state(module, training))) is not None:
        state, before = restored.state, restored.meta.get("seconds", 0.0)
    workdir = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent.parent.parent
    stage = folder.name if folder.parent.name == "checkpoints" else f"{folder.parent.name}/{folder.name}"
    with MetricsWriter(workdir, stage, training.epochs, show=("loss", training.select)) as writer:
        writer.resume(int(state["epoch"]) if state else 0)

        def progress(record: dict[str, float]) -> None:
            scalars = {k: v for k, v in record.items() if k not in ("epoch", "seconds")}
            writer.write(int(record["epoch"]) + 1, scalars, {"epoch": record["seconds"]})

        def save(epoch: int, now: dict[str, Any]) -> None:
            if how.stop is not None and how.stop.is_set():
                raise Stopped(f"{stage} stopped after epoch {epoch}")
            if how.save_every and epoch % how.save_every == 0:
                checkpointer.save(epoch, now, meta={"seconds": before + time.perf_counter() - start})

        result = fit(
            module, arrays, training, evaluate=evaluate, text=text, progress=progress, on_epoch=save, state=state
        )  # fmt: skip
    seconds = before + time.perf_counter() - start
    valid = evaluate(result.module)
    step = int(result.state["epoch"]) + 1  # one past the last epoch: the finished weights have a step of their own
    if checkpointer.latest_step() != step:  # else a run was stopped between this line and the next ones
        checkpointer.save(step, result.state, meta={"seconds": seconds})
    facts = {"step": step, "valid": valid, "seconds": seconds, "settings": dict(settings)}
    write_atomic(folder / "done.json", json.dumps(facts, indent=1))
    return Trained(kind, result.module, valid, dict(settings), seconds)
