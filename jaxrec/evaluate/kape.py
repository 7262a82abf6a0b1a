"""Where answers come from when neurons are off, KAPE (our reading of arXiv 2505.11995): shifts between the internal and
the external answer, paired over facts, against the largest shift of random sets; what it costs; and the report's
figures, pooled over seeds."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.flows import Flow, stage_boundaries
from analysis.neurons import CONDITIONS, deactivate
from jaxrec.config import write_atomic
from jaxrec.evaluate import widgets
from jaxrec.evaluate.figures import heatmap, lines
from jaxrec.evaluate.ranking import paired_interval
from jaxrec.tools.world_model import judge
from models.hf import Model

METHOD = "KAPE (our reading)"
Rows = Mapping[str, np.ndarray]
SOURCES = {"internal": 0, "external": 1, "other": -1}


@dataclasses.dataclass(frozen=True, eq=False)
class Off:
    """Neurons to switch off. neurons: bool [L, F]. mean: float [L, F] in their place, or None for 0. answer_only: only
    from the answer's cue onwards."""

    neurons: np.ndarray
    mean: np.ndarray | None = None
    answer_only: bool = False


def judged(model: Model, rows: Rows, off: Off, batch: int) -> dict[str, np.ndarray]:
    """:func:`jaxrec.tools.world_model.judge` with neurons off. rows: of ``world_model.arrays``."""
    total, out = len(rows["tokens"]), []
    for low in range(0, total, batch):
        chosen = np.minimum(np.arange(low, low + batch), total - 1)
        part = {name: rows[name][chosen] for name in ("tokens", "lengths", "mask")}
        positions = None
        if off.answer_only:
            positions = np.arange(part["tokens"].shape[1]) >= part["mask"].argmax(axis=1)[:, None] - 1
        edit = deactivate(off.neurons, model.config, positions=positions, mean=off.mean)
        found = judge(model.params, model.config, part, batch=batch, edit=edit)
        out.append({name: x[: total - low] for name, x in found.items()})
    return {name: np.concatenate([part[name] for part in out]) for name in out[0]}


def sources(model: Model, internal: Rows, external: Rows, off: Off, answers: str, batch: int):
    """Which answer the model gives to each prompt, int64 [n] as in ``SOURCES``, and log-probability of the external one
    minus that of the internal one, float [n].

    internal, external: the same prompts with either answer. answers: "exact", what greedy decoding writes, or
    "likelier", the likelier of the two.
    """
    a, b = (judged(model, rows, off, batch) for rows in (internal, external))
    margin = a["nll"] - b["nll"]
    if answers == "likelier":
        return (margin > 0).astype(np.int64), margin
    return np.where(a["right"], 0, np.where(b["right"], 1, -1)), margin


@dataclasses.dataclass(frozen=True, eq=False)
class SeedResult:
    """interventions: name -> {"sources", "margin", "known", "reading", "neutral"} of each set that was off ("none",
    "internal", "external", and as many neurons by another rule, "difference_internal", "difference_external"), or a
    list of these ("random_internal", "random_external"). facts: for each prompt the number of its fact. figures: what
    the report draws. about: figures on the neurons and the flows. explore: widgets of the report."""

    interventions: Mapping[str, Any]
    facts: np.ndarray
    figures: list[dict[str, Any]]
    about: Mapping[str, Any]
    explore: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def rate(self, found: Mapping[str, Any], source: str) -> np.ndarray:
        """Share of the prompts of each fact that were answered from ``source``, float [facts]."""
        hits = np.asarray(found["sources"]) == SOURCES[source]
        return np.bincount(self.facts, hits) / np.bincount(self.facts)

    def strongest(self, of: str, source: str) -> Mapping[str, Any]:
        """Of the random sets that match a set, the one with the highest rate of ``source``."""
        return max(self.interventions[f"random_{of}"], key=lambda found: self.rate(found, source).mean())


def _summary(parts: Sequence[tuple[SeedResult, Mapping[str, Any]]]) -> dict[str, float]:
    """Means over seeds and, for random sets, over draws."""
    mean = lambda values: float(np.mean(list(values)))  # noqa: E731
    rates = {f"{s}_rate": mean(r.rate(found, s).mean() for r, found in parts) for s in SOURCES}
    return {
        **rates, "margin": mean(np.mean(found["margin"]) for _, found in parts),
        "accuracy": mean(found["known"] for _, found in parts),
        "reading": mean(found["reading"] for _, found in parts),
        "neutral_loss": mean(found["neutral"] for _, found in parts),
    }  # fmt: skip


def _comparisons(config: Any, results: Sequence[SeedResult]) -> list[dict[str, Any]]:
    out, bound = [], config.criteria.loss_rise
    for of, source in (("internal", "external"), ("external", "internal")):
        name, metric = f"{of} neurons off", f"{source} rate"
        off = np.concatenate([r.rate(r.interventions[of], source) for r in results])
        random = np.concatenate([r.rate(r.strongest(of, source), source) for r in results])
        plain = np.concatenate([r.rate(r.interventions["none"], source) for r in results])
        for other, values in (("no intervention", plain), ("the most effective random set", random)):
            difference, low, high = paired_interval(off, values)
            out.append(
                {"name": f"{name} - {other}", "metric": metric, "difference": difference, "low": low, "high": high,
                 "criterion": "lower end of the paired 95 % interval over 0", "met": bool(low > 0)}
            )  # fmt: skip
        losses = [np.array([r.interventions[k]["neutral"] for r in results]) for k in (of, "none")]
        rise = losses[0] - losses[1]
        out.append(
            {"name": f"{name} - no intervention", "metric": "neutral loss", "difference": float(rise.mean()),
             "low": float(rise.min()), "high": float(rise.max()),
             "criterion": f"at most {bound:g} on every seed (ends: smallest and largest)",
             "met": bool(rise.max() <= bound)}
        )  # fmt: skip
    return out


def pool(config: Any, results: Sequence[SeedResult], workdir: Path) -> dict[str, Any]:
    """Rates and costs by set, means over seeds, and paired intervals over the facts of all seeds; written to
    result.json, with figures.json of the first seed beside it."""
    names = {"none": "no intervention", "internal": "internal neurons off", "external": "external neurons off"}
    rows = [{"name": names[k], **_summary([(r, r.interventions[k]) for r in results])} for k in names]
    for of in CONDITIONS:
        found = [(r, r.interventions[f"difference_{of}"]) for r in results]
        rows.append({"name": f"{of} by the largest difference of probabilities, off", **_summary(found)})
        several = [(r, found) for r in results for found in r.interventions[f"random_{of}"]]
        count = len(several) // len(results)
        rows.append({"name": f"random sets like the {of} one, mean of {count}", **_summary(several)})
    d, first = config.data, results[0]
    protocol = {
        "method": METHOD, "part": "facts about other subjects than neurons were found on", "prompts": len(first.facts),
        "facts": int(first.facts.max()) + 1, "conditions": d.conditions, "counted tokens": d.counted,
        "answers": d.answers, "firing": config.identify.firing, "rate": config.identify.rate,
        "filter quantile": config.identify.filter_quantile, "bar quantile": config.identify.bar_quantile,
        "off": f"{config.intervene.value}, {config.intervene.positions} positions", "model": config.model.base,
        "seeds": list(config.seeds),
    }  # fmt: skip
    result = {
        "system": config.system, "variant": config.variant, "seed": list(config.seeds), "protocol": protocol,
        "rows": rows, "comparisons": _comparisons(config, results), "analysis": [dict(r.about) for r in results],
    }  # fmt: skip
    write_atomic(workdir / "result.json", json.dumps(result, indent=1) + "\n")
    write_atomic(workdir / "figures.json", json.dumps(first.figures) + "\n")
    widgets.write(workdir, first.explore)
    return result


# --- figures ---------------------------------------------------------------------------------------------------------


def boundaries(flow: Flow, mass: bool = False) -> dict[str, int | None]:
    """Where the three later stages begin, by :func:`analysis.stage_boundaries`."""
    found = stage_boundaries(*(flow.curve("key", target, mass) for target in ("context", "query", "answer")))
    return dataclasses.asdict(found)


def flow_figure(name: str, flow: Flow) -> dict[str, Any]:
    """Flows from the key by layer, each divided by its maximum, with the boundaries of the stages in the title."""
    curves = {f"key to {target}": flow.curve("key", target) for target in ("context", "query", "answer")}
    shown = {key: curve / max(curve.max(), 1e-30) for key, curve in curves.items() if curve is not None}
    begins = ", ".join("-" if layer is None else str(layer) for layer in boundaries(flow).values())
    return lines(f"{name}; stages at {begins}", shown, "layer")


def neuron_figures(entropy: np.ndarray, chosen: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Neurons chosen by layer and condition, and the lowest and the median finite entropy by layer."""
    counts = np.stack([chosen[name].sum(axis=1) for name in CONDITIONS])
    out = [heatmap("Neurons: internal (0), external (1)", counts, "condition", "layer")]
    layers = [layer[np.isfinite(layer)] for layer in entropy]
    ends = {"lowest": np.min, "median": np.median}
    series = {name: [float(f(x)) if len(x) else np.log(2.0) for x in layers] for name, f in ends.items()}
    return [*out, lines("Entropy by layer (nats)", series, "layer")]


def contribution_figures(parts: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """What attention and MLPs add to the logits of both answers, by layer, under fake passages. parts: "attn" and
    "mlp", float [L, 2], internal answer first."""
    names = {"attn": "MHA", "mlp": "MLP"}
    series = {f"{names[k]}, {CONDITIONS[y]}": parts[k][:, y] for k in names for y in range(2)}
    return [lines("Logit contributions, fake passages", series, "layer")]
