"""What CAFE's stages and their rivals give: documents found, answers, paired intervals, pooled over seeds."""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.heads import document_scores, gold_recall
from jaxrec.config import write_atomic
from jaxrec.data.documents import Question
from jaxrec.evaluate import widgets
from jaxrec.evaluate.answers import sub_em, token_f1
from jaxrec.evaluate.explore import document_widgets
from jaxrec.evaluate.figures import heatmap, lines
from jaxrec.evaluate.ranking import paired_interval

# What a method is called, and what it does.
METHODS = {
    "direct": "direct: all documents",
    "stage1": "CAFE, stage 1 only",
    "cafe": "CAFE",
    "random_heads": "CAFE, random heads for stage 1",
    "bm25": "as many by BM25, best last",
    "first": "as many, the first ones",
    "last": "as many, the last ones",
    "oracle": "gold documents only",
    "no_filter": "CAFE without stage 1",
    "random_order": "CAFE, random order",
    "original_order": "CAFE, original order",
    "gold_hidden": "all documents, gold hidden from the question",
    "others_hidden": "all documents, as many others hidden",
}
METRICS = ("sub_em", "f1", "gold_recall", "gold_last")
_BINS = 5  # of the gold document's place
_SHOWN = 12  # questions of the ranking's figure


@dataclasses.dataclass(frozen=True)
class Answer:
    """order: numbers of the documents in the prompt, in their order. candidates: numbers of those steered towards,
    empty where nothing is steered."""

    order: tuple[int, ...]
    prediction: str
    candidates: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class SeedResult:
    """values: method -> metric -> float64 [n]. places: float64 [n], where the first gold document stands, 0 first, 1
    last. figures: what the report draws. dropped: validation questions whose gold documents stage 1 lost.
    explore: widgets of the report."""

    values: dict[str, dict[str, np.ndarray]]
    places: np.ndarray
    figures: list[dict[str, Any]]
    documents: float
    dropped: int
    explore: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def bm25(question: str, documents: Sequence[str], k1: float = 1.2, b: float = 0.75) -> np.ndarray:
    """Scores float64 [n] of Okapi BM25 (Robertson and Zaragoza, 2009), with the weight log(1 + (n - df + 0.5) / (df +
    0.5)) of a word, which is never negative, counted over these documents alone. Words are runs of letters and digits,
    lower case."""
    words = [Counter(re.findall(r"\w+", text.lower())) for text in documents]
    lengths = np.array([sum(counts.values()) for counts in words], np.float64)
    n, relative = len(words), lengths / max(lengths.mean(), 1.0)
    scores = np.zeros(n)
    for word in re.findall(r"\w+", question.lower()):
        tf = np.array([counts[word] for counts in words], np.float64)
        df = float((tf > 0).sum())
        weight = math.log1p((n - df + 0.5) / (df + 0.5))
        scores += weight * tf * (k1 + 1) / (tf + k1 * (1 - b + b * relative))
    return scores


def best_last(scores: np.ndarray, count: int) -> tuple[int, ...]:
    """The ``count`` best of scores [n], the best last; equal ones in their order, as CAFE's filter has them."""
    best = np.sort(np.argsort(-scores, kind="stable")[:count])
    return tuple(best[np.argsort(scores[best], kind="stable")].tolist())


def judge(questions: Sequence[Question], answers: Sequence[Answer], word_boundary: bool) -> dict[str, np.ndarray]:
    """Metric -> float64 [n]: SubEM and F1 of the answer, the share of gold documents in the prompt, and whether the
    last of them, next to the question, is gold."""
    pairs = list(zip(questions, answers, strict=True))
    return {
        "sub_em": np.array([sub_em(a.prediction, q.answers, word_boundary) for q, a in pairs]),
        "f1": np.array([token_f1(a.prediction, q.answers) for q, a in pairs]),
        "gold_recall": np.array([gold_recall(a.order, q.gold) for q, a in pairs]),
        "gold_last": np.array([float(a.order[-1] in q.gold) for q, a in pairs]),
    }


def evaluate_seed(
    questions: Sequence[Question], answers: Mapping[str, Sequence[Sequence[Answer]]], eta: Mapping[str, np.ndarray],
    alpha: np.ndarray, heads: Mapping[str, Sequence[tuple[int, int]]], dropped: int, config: Any, folder: Path,
) -> SeedResult:  # fmt: skip
    """Judge the answers of every method, the mean over draws where a method has several, and write a record of each
    question to questions.jsonl.

    answers: method -> draws -> questions. eta: stage -> float64 [L, N], scores of heads. alpha: float32 [n, L, N, D],
    attention from each test question to its documents. heads: stage -> those chosen, H1 of "1" and H2 of "2".
    """
    judged = {m: [judge(questions, draw, config.evaluate.word_boundary) for draw in d] for m, d in answers.items()}
    values = {m: {k: np.mean([draw[k] for draw in d], axis=0) for k in METRICS} for m, d in judged.items()}
    records = []
    for i, question in enumerate(questions):
        methods = {
            m: {
                "order": draws[0][i].order, "candidates": draws[0][i].candidates, "prediction": draws[0][i].prediction,
                **{k: float(v[i]) for k, v in judged[m][0].items()},
            }
            for m, draws in answers.items()
        }  # fmt: skip
        about = {"id": question.id, "question": question.question, "answers": question.answers, "gold": question.gold}
        about |= {"documents": len(question.documents), "kinds": question.kinds, "methods": methods}
        records.append(about)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomic(folder / "questions.jsonl", lines)
    places = np.array([min(q.gold) / max(len(q.documents) - 1, 1) for q in questions])
    documents = float(np.mean([len(q.documents) for q in questions]))
    explore = document_widgets(questions, records, METHODS, alpha, eta, heads)
    return SeedResult(values, places, _figures(questions, eta, alpha, heads["1"]), documents, dropped, explore)


def _figures(questions, eta, alpha, heads) -> list[dict[str, Any]]:
    """Maps of eta, and of what H1 sees of the documents of some questions."""
    out = [heatmap(f"Retrieval heads, stage {stage}", values, "layer", "head") for stage, values in eta.items()]
    chosen = [i for i, q in enumerate(questions) if len(q.documents) == len(questions[0].documents)][:_SHOWN]
    rows = []
    for i in chosen:
        question = questions[i]
        beta, _ = document_scores(alpha[i][tuple(zip(*heads))][:, : len(question.documents)])
        score = beta.mean(axis=0)
        rest = [d for d in np.argsort(-score, kind="stable").tolist() if d not in question.gold]
        rows.append(score[[*question.gold, *rest][: max(12, len(question.gold))]])
    width = min(map(len, rows))
    title = "Share of attention on documents"
    out.append(
        heatmap(title, np.array([row[:width] for row in rows]), "question", "gold first, then the others, best first")
    )
    return out


def _by_place(results: Sequence[SeedResult], methods: Sequence[str]) -> list[dict[str, Any]]:
    """SubEM by where the gold document stands in the whole prompt."""
    places = np.concatenate([r.places for r in results])
    bins = np.minimum((places * _BINS).astype(int), _BINS - 1)
    used = [b for b in range(_BINS) if (bins == b).any()]
    series = {}
    for method in methods:
        right = np.concatenate([r.values[method]["sub_em"] for r in results])
        series[METHODS[method]] = [float(right[bins == b].mean()) for b in used]
    at = [(b + 0.5) / _BINS for b in used]
    x = "place in the whole prompt, 0 first, 1 last"
    return [lines("SubEM by place of the gold document", series, x, at)]


# The criteria: (metric, method, rival), on the lower end of the interval, or on the mean where that is said.
_COMPARED = (
    ("sub_em", "cafe", "direct", "low"),
    ("sub_em", "stage1", "direct", "low"),
    ("sub_em", "cafe", "stage1", "mean"),
    ("sub_em", "cafe", "random_heads", "low"),
    ("sub_em", "cafe", "bm25", ""),
    ("sub_em", "cafe", "no_filter", ""),
    ("sub_em", "cafe", "random_order", ""),
    ("sub_em", "cafe", "original_order", ""),
    ("f1", "cafe", "direct", ""),
    ("gold_recall", "stage1", "bm25", "low"),
    ("gold_recall", "stage1", "first", "low"),
    ("gold_recall", "stage1", "last", "low"),
    ("gold_recall", "stage1", "random_heads", ""),
    ("gold_last", "stage1", "bm25", "low"),
    ("sub_em", "direct", "gold_hidden", "low"),
    ("sub_em", "others_hidden", "gold_hidden", "low"),
    ("sub_em", "others_hidden", "direct", ""),
)
_CRITERIA = {"low": "lower end of the paired 95 % interval over 0", "mean": "the mean is at least 0"}


def pool(config: Any, results: list[SeedResult], workdir: Path) -> dict[str, Any]:
    """Means over questions of all seeds and paired intervals; written to result.json, with figures.json beside it."""
    methods = [m for m in METHODS if m in results[0].values]
    stacked = {m: {k: np.concatenate([r.values[m][k] for r in results]) for k in METRICS} for m in methods}
    rows = [
        {"name": METHODS[m], **{k: float(v.mean()) for k, v in stacked[m].items()}, "reference": m == "oracle"}
        for m in methods
    ]  # fmt: skip
    comparisons = []
    for metric, one, other, rule in _COMPARED:
        if one not in stacked or other not in stacked:
            continue
        difference, low, high = paired_interval(stacked[one][metric], stacked[other][metric])
        entry = {"name": f"{METHODS[one]} - {METHODS[other]}", "metric": metric, "difference": difference}
        entry |= {"low": low, "high": high}
        if rule:
            entry |= {"criterion": _CRITERIA[rule], "met": bool(low > 0 if rule == "low" else difference >= 0)}
        comparisons.append(entry)
    by_seed = [{m: {k: float(v.mean()) for k, v in r.values[m].items()} for m in methods} for r in results]
    protocol = {
        "part": "test", "samples": len(results[0].places), "documents": results[0].documents, "answers": "greedy",
        "aggregation": config.detect.aggregation, "scaling": config.steer.scaling, "delta": config.steer.delta,
        "rows": config.steer.rows, "validation": config.detect.samples,
        "lost in validation": sum(r.dropped for r in results), "seeds": list(config.seeds),
    }  # fmt: skip
    result = {
        "system": config.system, "variant": config.variant, "seed": list(config.seeds), "protocol": protocol,
        "rows": rows, "comparisons": comparisons, "by_seed": by_seed,
    }  # fmt: skip
    shown = [m for m in ("direct", "stage1", "cafe") if m in methods]
    write_atomic(workdir / "result.json", json.dumps(result, indent=1) + "\n")
    write_atomic(workdir / "figures.json", json.dumps(results[0].figures + _by_place(results, shown)) + "\n")
    widgets.write(workdir, results[0].explore)
    return result
