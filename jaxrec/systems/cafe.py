"""CAFE: retrieval heads find the documents a question needs, steered attention reads them (arXiv 2505.10063).

    detect    scores of all heads on validation questions: H1 on whole prompts, H2 on prompts that H1 has filtered
    filter    test questions: what each head sees of each document; what H1 keeps, the best next to the question
    steer     candidates by H2 among these, and answers with attention steered towards the candidates
    evaluate  the same questions answered by every rival; documents found, SubEM and F1, paired intervals

No weight changes. The embedded world's figures say that the machinery works; the paper's tables need its models.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import models
from analysis import heads as finding
from analysis import steering
from analysis.prompts import Prompt
from jaxrec.config import UsageError, write_atomic
from jaxrec.data.documents import FORMATS, Document, Question, read_questions
from jaxrec.evaluate import cafe as judging
from jaxrec.evaluate.cafe import Answer, best_last, bm25
from jaxrec.systems import by_seed, world_lm
from jaxrec.systems.cafe_reader import Heads, Places, answer, attention, make_prompts
from models.layout import decode_weights
from models.sharding import make_mesh, use_mesh

STAGES = ("detect", "filter", "steer", "evaluate")


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One seed of one config."""

    config: Any
    seed: int
    folder: Path
    mesh: jax.sharding.Mesh | None

    @functools.cached_property
    def model_folder(self) -> Path:
        m = self.config.model
        return Path(m.path or world_lm.cached(m.base, self.seed))

    @functools.cached_property
    def name(self) -> str:
        """The id of the weights, in files of heads."""
        folder = self.model_folder.resolve()
        return folder.name if self.config.model.path else folder.parent.name

    @functools.cached_property
    def model(self) -> models.Model:
        model = models.load(self.model_folder, mesh=self.mesh, dtype=self.config.model.dtype or None)
        if model.tokenizer is None:
            raise UsageError(f"{self.model_folder} holds no tokenizer files, which prompts are made with")
        d, have = self.config.detect, model.config.layers * model.config.heads
        for field in ("coarse_heads", "fine_heads"):
            if d[field] > have:
                raise UsageError(f"detect.{field}={d[field]}: the model has {have} heads")
        return model

    @functools.cached_property
    def weights(self) -> dict[str, Any]:
        with use_mesh(self.mesh):
            return decode_weights(self.model.params, self.model.config, fuse=self.mesh is None)

    @functools.cached_property
    def questions(self) -> dict[str, list[Question]]:
        """Part ("coarse", "fine", "test") -> its questions; no question is in two parts."""
        c = self.config
        counts = {"coarse": c.detect.samples, "fine": c.detect.samples, "test": c.evaluate.samples}
        rng = np.random.Generator(np.random.PCG64([self.seed, 23]))
        if c.data.source == "world":
            texts = world_lm.make_texts(world_lm.base_config(c.model.base, self.seed))
            return {part: world_questions(texts, part, count, c.data, rng) for part, count in counts.items()}
        files = {"test": c.data.path, "validation": c.data.validation}
        wanted = {"test": counts["test"], "validation": 2 * c.detect.samples}
        if not files["validation"]:
            found = read_questions(files["test"], c.data.format, rng, c.data.documents, sum(wanted.values()))
            test, validation = found[: wanted["test"]], found[wanted["test"] :]
        else:
            test, validation = (
                read_questions(files[n], c.data.format, rng, c.data.documents, wanted[n]) for n in wanted
            )
        half = c.detect.samples
        return {"coarse": validation[:half], "fine": validation[half:], "test": test}

    def heads(self, stage: str) -> finding.HeadSet:
        """The saved head set of "coarse" or "fine"."""
        path = self.folder / "heads" / f"{stage}.json"
        if not path.exists():
            raise UsageError(f"{path} does not exist: run --stages=detect first")
        return finding.load_head_set(path, self.name, self.model.config)


def world_questions(texts: Any, part: str, count: int, data: Any, rng: np.random.Generator) -> list[Question]:
    """Questions over passages of the embedded world: of test subjects, or of those that the reader was trained on."""
    split, out = "test" if part == "test" else "train", []
    for number in range(count):
        found = texts.reading(split, rng, data.documents, data.same, data.similar)
        documents = tuple(Document("", text) for text in found.passages)
        out.append(
            Question(f"{part}-{number}", found.question, (found.answer,), documents, found.gold, found.kinds)
        )  # fmt: skip
    return out


def check(config: Any) -> None:
    """Raise UsageError for settings that a stage would stumble over."""
    c = config
    choices = {
        "data.source": ("world", "files"), "data.format": FORMATS, "detect.aggregation": finding.AGGREGATIONS,
        "filter.order": finding.ORDERS, "steer.scaling": steering.SCALINGS, "steer.rows": steering.ROWS,
    }  # fmt: skip
    for field, known in choices.items():
        group, name = field.split(".")
        if c[group][name] not in known:
            raise UsageError(f"{field}={c[group][name]!r} must be one of {', '.join(known)}")
    positive = (
        "detect.samples", "detect.coarse_heads", "detect.fine_heads", "filter.per_head", "steer.per_head",
        "evaluate.samples", "evaluate.batch_size", "evaluate.max_new", "evaluate.random_draws",
    )  # fmt: skip
    for field in positive:
        group, name = field.split(".")
        if c[group][name] < 1:
            raise UsageError(f"{field}={c[group][name]} must be at least 1")
    if not (math.isfinite(c.steer.delta) and c.steer.delta >= 0):
        raise UsageError(f"steer.delta={c.steer.delta} must be finite and at least 0 (0 steers nothing)")
    for method in c.evaluate.methods:
        if method not in judging.METHODS:
            raise UsageError(f"evaluate.methods: no {method!r}; known: {', '.join(judging.METHODS)}")
    if (c.data.source == "files") != bool(c.data.path):
        raise UsageError("data.path goes with data.source=files: the JSON file of the questions")
    if c.data.source == "files" and not c.model.path:
        raise UsageError("data.source=files needs model.path, the folder of a model")
    if c.data.source == "world":
        if c.model.path:
            raise UsageError("model.path goes with data.source=files: the world's text needs the world's own model")
        if c.data.documents < 1:
            raise UsageError(f"data.documents={c.data.documents} must be at least 1")
    try:
        _ = c.prompt.document.format(title="", text="", number=1), c.prompt.question.format(question="")
    except (KeyError, IndexError, ValueError) as error:
        raise UsageError(
            f"prompt: {error!r}; document knows {{title}}, {{text}}, {{number}}, question {{question}}"
        ) from error


def filtered(this: Run, questions: Sequence[Question], alpha: np.ndarray, heads: Heads, order: str, seed: int = 0):
    """What the coarse filter keeps of each question (``analysis.heads.coarse_filter``)."""
    m = this.config.filter.per_head
    return [
        finding.coarse_filter(
            alpha[i], heads, min(m, len(q.documents)), count=len(q.documents), order=order, seed=seed + i, sample=q.id
        )
        for i, q in enumerate(questions)
    ]  # fmt: skip


def _whole(questions: Sequence[Question]) -> list[range]:
    return [range(len(q.documents)) for q in questions]


# --- detect ----------------------------------------------------------------------------------------------------------


def _scores(this: Run, alpha: np.ndarray, gold: Sequence[Collection[int]], ids: Sequence[str], counts: Sequence[int]):
    empty = finding.HeadScores.empty(this.model.config, this.config.detect.aggregation)
    return finding.add_samples(empty, alpha.transpose(1, 0, 2, 3), gold, ids, counts)


def detect(this: Run) -> None:
    """Writes ``heads/coarse.json`` (H1) and ``heads/fine.json`` (H2), each with the scores eta [L, N] of all heads in
    an ``.npz`` beside it. Validation questions whose gold documents H1 drops do not score H2; they are counted."""
    folder, c = this.folder / "heads", this.config.detect
    folder.mkdir(parents=True, exist_ok=True)
    asked = this.questions
    if not (folder / "coarse.json").exists():
        prompts = make_prompts(this, asked["coarse"], _whole(asked["coarse"]))
        alpha = attention(this, prompts)
        found = _scores(
            this, alpha, [q.gold for q in asked["coarse"]], [q.id for q in asked["coarse"]],
            [len(q.documents) for q in asked["coarse"]],
        )  # fmt: skip
        _save(this, folder, found, c.coarse_heads, "coarse", 0, prompts)
    if not (folder / "fine.json").exists():
        alpha = attention(this, make_prompts(this, asked["fine"], _whole(asked["fine"])))
        kept = filtered(this, asked["fine"], alpha, this.heads("coarse").heads, this.config.filter.order)
        pairs = [(q, k.order) for q, k in zip(asked["fine"], kept) if set(k.order) & set(q.gold)]
        lost = len(kept) - len(pairs)
        if not pairs:
            raise ValueError(
                f"stage 1 dropped the gold documents of all {lost} validation questions of stage 2: raise "
                "filter.per_head or detect.coarse_heads"
            )
        questions, orders = (list(part) for part in zip(*pairs))
        prompts = make_prompts(this, questions, orders)
        alpha = attention(this, prompts)
        gold = [[order.index(i) for i in q.gold if i in order] for q, order in pairs]
        found = _scores(this, alpha, gold, [q.id for q in questions], [len(order) for order in orders])
        _save(this, folder, found, c.fine_heads, "fine", lost, prompts)
    finding.check_head_sets(this.heads("coarse"), this.heads("fine"), [q.id for q in asked["test"]])


def _save(
    this: Run, folder: Path, found: finding.HeadScores, k: int, stage: str, lost: int, prompts: Sequence[Prompt]
) -> None:
    layers = finding.whole_layers(this.model.config, max(len(p.tokens) for p in prompts))
    if not layers:
        raise ValueError("every layer of the model has a sliding window that is shorter than the prompts")
    chosen = finding.head_set(found, k, this.name, stage, layers)
    np.savez(
        folder / f"{stage}.npz",
        eta=found.eta / len(found.samples),
        degenerate=found.degenerate,
        lost=lost,
        layers=layers,
    )
    draft = folder / f".{stage}.json"
    finding.save_head_set(draft, chosen)
    draft.replace(folder / f"{stage}.json")
    best = ", ".join(
        f"{head}: {value / len(found.samples):.2f}" for head, value in zip(chosen.heads, chosen.values)
    )  # fmt: skip
    print(f"detect: {stage}, {len(found.samples)} questions, mean share of gold documents by (layer, head): {best}")


# --- filter, steer ---------------------------------------------------------------------------------------------------


def filter(this: Run) -> None:
    """Writes ``filter/alpha.npz``, alpha float32 [n, L, N, documents] of the test questions, and
    ``filter/documents.jsonl``: of each question the documents kept in their order, their scores and the recall."""
    folder, questions = this.folder / "filter", this.questions["test"]
    heads = this.heads("coarse").heads
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "documents.jsonl").exists():
        return
    alpha = attention(this, make_prompts(this, questions, _whole(questions)))
    draft = folder / ".alpha.npz"
    np.savez(draft, alpha=alpha)
    draft.replace(folder / "alpha.npz")
    kept = filtered(this, questions, alpha, heads, this.config.filter.order)
    lines = [
        {"id": q.id, **dataclasses.asdict(k), "gold_recall": finding.gold_recall(k.order, q.gold)}
        for q, k in zip(questions, kept)
    ]
    write_atomic(folder / "documents.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    recall, size = (np.mean(x) for x in zip(*((line["gold_recall"], len(line["order"])) for line in lines)))
    print(f"filter: {size:.1f} documents are kept of each question, {recall:.1%} of the gold ones among them")


def read_filter(this: Run) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    """(alpha [n, L, N, documents], D' of each test question). Raises UsageError before the filter stage has run."""
    folder = this.folder / "filter"
    if not (folder / "documents.jsonl").exists():
        raise UsageError(f"{folder / 'documents.jsonl'} does not exist: run --stages=filter first")
    lines = [json.loads(line) for line in (folder / "documents.jsonl").read_text(encoding="utf-8").splitlines()]
    with np.load(folder / "alpha.npz", allow_pickle=False) as stored:
        return stored["alpha"], [tuple(line["order"]) for line in lines]


def _answers(
    this: Run, method: str, orders: Sequence[Sequence[int]], fine: Heads | None, hidden: Places | None = None
) -> list[Answer]:
    """Answers of a method, from ``answers/<method>.jsonl`` where they are there."""
    path, questions = this.folder / "answers" / f"{method}.jsonl", this.questions["test"]
    if path.exists():
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [Answer(tuple(x["order"]), x["prediction"], tuple(x["candidates"])) for x in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    texts, places = answer(this, make_prompts(this, questions, orders), fine, hidden)
    out = [
        Answer(tuple(order), text, tuple(order[i] for i in chosen))
        for order, text, chosen in zip(orders, texts, places, strict=True)
    ]
    lines = [{"id": q.id, **dataclasses.asdict(a)} for q, a in zip(questions, out)]
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return out


def steer(this: Run) -> None:
    """Writes ``answers/cafe.jsonl``: of each test question the documents in their order, the candidates among them and
    the answer."""
    _, orders = read_filter(this)
    found = _answers(this, "cafe", orders, this.heads("fine").heads)
    gold = [len(set(a.candidates) & set(q.gold)) / len(q.gold) for a, q in zip(found, this.questions["test"])]
    print(f"steer: {np.mean(gold):.1%} of the gold documents are candidates")


# --- evaluate --------------------------------------------------------------------------------------------------------


def evaluate(this: Run) -> judging.SeedResult:
    """Every method's answers to the test questions, judged."""
    alpha, orders = read_filter(this)
    if not (this.folder / "answers" / "cafe.jsonl").exists():
        raise UsageError(f"{this.folder / 'answers' / 'cafe.jsonl'} does not exist: run --stages=steer first")
    questions, fine, coarse = this.questions["test"], this.heads("fine").heads, this.heads("coarse").heads
    size, whole = [len(order) for order in orders], _whole(questions)

    def kept(heads: Heads, order: str, seed: int = 0) -> list[tuple[int, ...]]:
        return [k.order for k in filtered(this, questions, alpha, heads, order, seed)]

    def by_bm25(i: int, q: Question) -> tuple[int, ...]:
        return best_last(bm25(q.question, [f"{d.title} {d.text}" for d in q.documents]), size[i])

    numbered = list(enumerate(questions))
    recipes = {
        "direct": lambda: (whole, None),
        "stage1": lambda: (orders, None),
        "cafe": lambda: (orders, fine),
        "bm25": lambda: ([by_bm25(i, q) for i, q in numbered], None),
        "first": lambda: ([range(size[i]) for i, _ in numbered], None),
        "last": lambda: ([range(len(q.documents) - size[i], len(q.documents)) for i, q in numbered], None),
        "oracle": lambda: ([q.gold for q in questions], None),
        "no_filter": lambda: (whole, fine),
        "random_order": lambda: (kept(coarse, "random", 7 * this.seed), fine),
        "original_order": lambda: (kept(coarse, "original"), fine),
        "gold_hidden": lambda: (whole, None, [q.gold for q in questions]),
        "others_hidden": lambda: (whole, None, _others(this.seed, questions)),
    }
    answers: dict[str, list[list[Answer]]] = {}
    for method in dict.fromkeys(("direct", "cafe", *this.config.evaluate.methods)):
        if method == "random_heads":
            drawn = _random_heads(this, coarse)
            answers[method] = [
                _answers(this, f"{method}_{n}", kept(h, this.config.filter.order), fine) for n, h in enumerate(drawn)
            ]
        else:
            answers[method] = [_answers(this, method, *recipes[method]())]
    scores, lost = {}, 0
    for number, stage in enumerate(("coarse", "fine"), 1):
        with np.load(this.folder / "heads" / f"{stage}.npz", allow_pickle=False) as stored:
            scores[str(number)], lost = stored["eta"], int(stored["lost"])
    chosen = {"1": coarse, "2": fine}
    return judging.evaluate_seed(questions, answers, scores, alpha, chosen, lost, this.config, this.folder)


def _others(seed: int, questions: Sequence[Question]) -> list[list[int]]:
    """Of each question as many documents as are gold, drawn among those that are not (all of these, if fewer)."""
    rng, out = np.random.Generator(np.random.PCG64([seed, 37])), []
    for q in questions:
        rest = [i for i in range(len(q.documents)) if i not in q.gold]
        out.append(rng.permutation(rest)[: len(q.gold)].tolist())
    return out


def _random_heads(this: Run, coarse: Heads) -> list[list[finding.Head]]:
    """As many heads as H1 has, drawn among the others that H1 was chosen from (among all these, where there are too
    few others)."""
    with np.load(this.folder / "heads" / "coarse.npz", allow_pickle=False) as stored:
        layers = stored["layers"].tolist()
    everything = [(layer, head) for layer in layers for head in range(this.model.config.heads)]
    others = [head for head in everything if head not in coarse]
    pool = others if len(others) >= len(coarse) else everything
    rng = np.random.Generator(np.random.PCG64([this.seed, 29]))
    draws = range(this.config.evaluate.random_draws)
    return [[pool[i] for i in rng.choice(len(pool), len(coarse), replace=False)] for _ in draws]


def run(config: Any, workdir: Path, stages: Sequence[str]) -> dict[str, Any] | None:
    """Run ``stages`` for every seed; with "evaluate", returns the result that is also in result.json."""
    check(config)
    sizes = config.mesh.to_dict()
    mesh = make_mesh(**sizes) if set(sizes.values()) != {1} else None
    recipe = {"detect": detect, "filter": filter, "steer": steer, "evaluate": evaluate}
    results = by_seed(recipe, stages, config.seeds, workdir, lambda seed, folder: Run(config, seed, folder, mesh))
    return judging.pool(config, results, workdir) if results else None
