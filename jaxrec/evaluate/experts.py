"""What masks of experts cost: exact answers and loss by domain, paired over questions, pooled over seeds."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from analysis import experts
from jaxrec.config import write_atomic
from jaxrec.evaluate import widgets
from jaxrec.evaluate.explore import expert_widgets
from jaxrec.evaluate.figures import heatmap
from jaxrec.evaluate.ranking import paired_interval
from jaxrec.tools.world_model import judge
from models.hf import Model

NAMES = {"easy_ep": "EASY-EP", "gate": "gate score", "frequency": "frequency", "random": "random"}
Key = tuple[str, str, int]  # domain of the mask, method, experts kept


@dataclasses.dataclass(frozen=True, eq=False)
class SeedResult:
    """By (domain of the mask, method, experts kept), with method "full" for no mask, and domain of the questions: right
    float [n], 1 for an exact answer (random: the mean over draws), and loss in nats per answer token. figures: what the
    report draws. samples: questions of a domain. explore: widgets of the report."""

    right: dict[Key, dict[str, np.ndarray]]
    loss: dict[Key, dict[str, float]]
    figures: list[dict[str, Any]]
    samples: int
    explore: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def evaluate_seed(
    model: Model, rows: Mapping[str, dict[str, np.ndarray]], found: Mapping[str, experts.Statistics],
    masks: Mapping[Key, np.ndarray], draws: Mapping[tuple[str, int], list[np.ndarray]], config: Any,
) -> SeedResult:  # fmt: skip
    """Judge the full model and every mask on every domain's questions; EASY-EP's and "mix" masks on all domains, the
    other methods' in their own."""
    right: dict[Key, dict[str, np.ndarray]] = {}
    loss: dict[Key, dict[str, float]] = {}

    def add(key: Key, domain: str, mask: np.ndarray | None, params=None) -> None:
        got = judge(params or model.params, model.config, rows[domain], mask, config.evaluate.batch_size)
        right.setdefault(key, {})[domain] = got["right"].astype(float)
        loss.setdefault(key, {})[domain] = float(got["nll"].sum() / got["tokens"].sum())

    for domain in rows:
        add(("", "full", model.config.experts), domain, None)
    for key, mask in masks.items():
        own, method, _ = key
        if method == "random" and own in rows:
            continue
        for domain in rows if method == "easy_ep" or own not in rows else [own]:
            add(key, domain, mask)
    for (domain, keep), several in draws.items():
        parts = [judge(model.params, model.config, rows[domain], m, config.evaluate.batch_size) for m in several]
        right.setdefault((domain, "random", keep), {})[domain] = np.mean([p["right"] for p in parts], axis=0)
        total = sum(p["nll"].sum() for p in parts) / sum(p["tokens"].sum() for p in parts)
        loss.setdefault((domain, "random", keep), {})[domain] = float(total)
    if config.evaluate.merge:
        for domain in rows:
            for keep in config.select.keep:
                params, _ = experts.merge_experts(model.params, model.config, found[domain], keep)
                add((domain, "merge", keep), domain, None, params)
    count = len(next(iter(rows.values()))["tokens"])
    explore = expert_widgets(found, masks, right, NAMES, model.config.first_dense)
    return SeedResult(right, loss, _figures(found, masks, right, list(rows), config), count, explore)


def _figures(found, masks, right, domains: list[str], config: Any) -> list[dict[str, Any]]:
    """Maps of scores, the overlap of masks, and accuracy of each domain's mask in each domain."""
    out = []
    for name, statistics in found.items():
        share = statistics.score / statistics.score.sum(axis=1, keepdims=True)
        out.append(heatmap(f"Expert scores: {name}", np.sort(share)[:, ::-1], "layer", "expert, best first"))
    keep = min(config.select.keep)
    own = {name: masks[name, "easy_ep", keep] for name in domains if (name, "easy_ep", keep) in masks}
    if own:
        title = f"Share of kept experts in common ({keep} kept)"
        out.append(heatmap(title, experts.overlap(own), "mask of", "mask of", labels=list(own)))
        table = np.array([[right[name, "easy_ep", keep][other].mean() for other in domains] for name in own])
        out.append(heatmap(f"Accuracy with {keep} experts", table, "mask of", "questions of", labels=list(own)))
    return out


def _mean(parts: list[Mapping[str, Any]], own: list[str]) -> float:
    return float(np.mean([np.mean([np.mean(p[d]) for d in own]) for p in parts]))


def pool(config: Any, results: list[SeedResult], workdir: Path) -> dict[str, Any]:
    """Means over domains and seeds, the share of the full model's accuracy, and paired intervals over all questions;
    written to result.json, with figures.json beside it."""
    first = results[0]
    full = ("", "full", next(k[2] for k in first.right if k[1] == "full"))
    domains = list(first.right[full])
    rows, comparisons = [], []
    base = _mean([r.right[full] for r in results], domains)

    def row(name: str, keys: Mapping[str, Key]) -> dict[str, Any]:
        own = [{d: r.right[keys[d]][d] for d in domains} for r in results]
        lost = [{d: r.loss[keys[d]][d] for d in domains} for r in results]
        accuracy = _mean(own, domains)
        kept = accuracy / base if base else 0.0
        out = {"name": name, "accuracy": accuracy, "kept": kept, "loss": _mean(lost, domains)}
        others = [
            {d: np.mean([r.right[keys[d]][o].mean() for o in domains if o != d]) for d in domains}
            for r in results if len(domains) > 1 and all(set(domains) <= set(r.right[keys[d]]) for d in domains)
        ]  # fmt: skip
        if others and keys[domains[0]][1] == "easy_ep" and keys[domains[0]][0] != "mix":
            out["accuracy_elsewhere"] = _mean(others, domains)
        return out

    rows.append(row(f"all {full[2]} experts", dict.fromkeys(domains, full)))
    for keep in config.select.keep:
        for method in [*config.select.methods, *(["merge"] if config.evaluate.merge else [])]:
            keys = {d: (d, method, keep) for d in domains}
            rows.append(row(f"{NAMES.get(method, 'M-SMoE (our reading)')}, {keep} experts", keys))
        if config.select.mix:
            for method in config.select.methods:
                keys = dict.fromkeys(domains, ("mix", method, keep))
                rows.append(row(f"one mask for all domains: {NAMES[method]}, {keep} experts", keys))

    def stacked(keys: Mapping[str, Key]) -> np.ndarray:
        return np.concatenate([r.right[keys[d]][d] for r in results for d in domains])

    half, least = max(config.select.keep), min(config.select.keep)
    easy = {d: (d, "easy_ep", half) for d in domains}
    share = config.evaluate.kept_share
    difference, low, high = paired_interval(stacked(easy), share * stacked(dict.fromkeys(domains, full)))
    comparisons.append(
        {"name": f"EASY-EP with {half} experts keeps {share:.0%} of accuracy: accuracy - {share:g} of the full model's",
         "metric": "accuracy", "difference": difference, "low": low, "high": high,
         "criterion": "the mean is at least 0", "met": bool(base > 0 and difference >= 0)}
    )  # fmt: skip
    for method in config.select.methods:
        if method == "easy_ep":
            continue
        pair = [stacked({d: (d, m, least) for d in domains}) for m in ("easy_ep", method)]
        difference, low, high = paired_interval(*pair)
        comparisons.append(
            {"name": f"with {least} experts: EASY-EP - {NAMES[method]}", "metric": "accuracy",
             "difference": difference, "low": low, "high": high,
             "criterion": "lower end of the paired 95 % interval over 0", "met": bool(low > 0)}
        )  # fmt: skip
    protocol = {"part": "test", "domains": len(domains), "samples": first.samples, "answers": "exact, greedy",
                "mask mode": config.select.mask_mode, "seeds": list(config.seeds)}  # fmt: skip
    result = {
        "system": config.system, "variant": config.variant, "seed": list(config.seeds), "protocol": protocol,
        "rows": rows, "comparisons": comparisons,
        "by_domain": {d: {f"{m}_{k}": float(np.mean([r.right[o, m, k][d].mean() for r in results]))
                          for o, m, k in first.right if o in (d, "")} for d in domains},
    }  # fmt: skip
    write_atomic(workdir / "result.json", json.dumps(result, indent=1) + "\n")
    write_atomic(workdir / "figures.json", json.dumps(first.figures) + "\n")
    widgets.write(workdir, first.explore)
    return result
