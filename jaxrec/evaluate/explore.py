"""What a person can look into of EASY-EP, KAPE and CAFE: the widgets of their reports, made of what the runs keep."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis import experts
from analysis.flows import Flow
from analysis.heads import Head, document_scores
from jaxrec.data.documents import Question
from jaxrec.evaluate.widgets import CurvesView, MapView, Record, curves, grid_map, ranking, table

_MEASURES = {"easy_ep": "score", "gate": "gate", "frequency": "frequency"}  # method -> field of the statistics
_BINS = 20  # of entropy
STAGES = ("refinement", "elicitation", "expression", "contestation")  # of arXiv 2505.11995


# --- EASY-EP ---------------------------------------------------------------------------------------------------------


def expert_widgets(
    found: Mapping[str, experts.Statistics], masks: Mapping[tuple[str, str, int], np.ndarray],
    right: Mapping[tuple[str, str, int], Mapping[str, np.ndarray]], names: Mapping[str, str], first_layer: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Experts' shares of their layer's score, with the kept ones marked, by domain, method and size.

    found: statistics by domain. masks: (domain, method, experts kept) -> bool [L, E]. right: mask -> domain of the
    questions -> exact answers, as far as they were asked. names: of the methods. first_layer: number of the first layer
    with experts.
    """
    grids, views = {}, []
    for (domain, method, keep), mask in masks.items():
        grid = f"{domain}/{method}" if method in _MEASURES else None
        if grid and grid not in grids:
            of = [domain] if domain in found else found
            grids[grid] = experts.mix({name: getattr(found[name], _MEASURES[method]) for name in of})
        asked = right.get((domain, method, keep), {})
        told = ", ".join(f"{name} {values.mean():.3f}" for name, values in asked.items())
        text = f"Exact answers with the experts kept, by the questions' domain: {told}." if told else ""
        views.append(MapView((domain, names[method], str(keep)), grid, mask, text))
    layers, count = next(iter(masks.values())).shape
    about = (
        "Each expert's share of its layer's score, and the experts that are kept. Choose something to compare with "
        "to see which kept experts two masks have in common."
    )
    return [
        grid_map(
            "Experts", about, ("layer", range(first_layer, first_layer + layers)), ("expert", range(count)),
            "share of the layer's score", grids, views, ("domain", "method", "experts kept"), "kept",
            ("domain", "method"), "row", "root",
        )
    ]  # fmt: skip


# --- KAPE ------------------------------------------------------------------------------------------------------------


def neuron_widgets(p: np.ndarray, entropy: np.ndarray, chosen: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """How entropy is spread in each layer, and a table of the neurons.

    p: float [2, L, F], how often each fires, internal first. entropy: [L, F], in nats, not finite where a neuron was
    filtered out. chosen: condition -> bool [L, F].
    """
    layers, width = entropy.shape
    passed = np.isfinite(entropy)
    sets = {"all that pass the filter": passed, **chosen, "not chosen": passed & ~np.any(list(chosen.values()), axis=0)}
    ends = 0.0, float(np.log(2.0))
    grids = {
        name: np.stack([np.histogram(row[of & ok], _BINS, ends)[0] for row, of, ok in zip(entropy, which, passed)])
        for name, which in sets.items()
    }
    edges = np.linspace(*ends, _BINS + 1)
    views = [
        MapView((name,), name, text=f"{int((which & passed).sum()):,} of {passed.size:,} neurons.")
        for name, which in sets.items()
    ]
    spread = grid_map(
        "Entropy of neurons by layer",
        "How many neurons of a layer have an entropy between two values, in nats: 0 fires for one source alone, "
        "ln 2 = 0.693 for both alike.",
        ("layer", range(layers)), ("entropy", [f"{a:.3f} – {b:.3f}" for a, b in itertools.pairwise(edges)]),
        "neurons", grids, views, ("neurons",), shade="root",
    )  # fmt: skip
    kind = np.where(passed, "not chosen", "filtered out").astype(object)
    for name, which in chosen.items():
        kind[which] = [name if before == "not chosen" else f"{before}, {name}" for before in kind[which]]
    rest = ~np.any(list(chosen.values()), axis=0)
    order = np.lexsort((np.where(passed, entropy, np.inf).ravel(), rest.ravel()))
    layer, unit = np.divmod(order, width)
    columns = {
        "layer": layer, "unit": unit, "p internal": p[0].ravel()[order], "p external": p[1].ravel()[order],
        "entropy": entropy.ravel()[order], "set": kind.ravel()[order].tolist(),
    }  # fmt: skip
    about = "How often each neuron fires where the internal and where the external answer is given, and its entropy."
    filters = {name: "choice" if name == "set" else "range" for name in columns}
    return [spread, table("Neurons", about, columns, filters, "the chosen ones first, then by entropy")]


def stage_bands(begin: Mapping[str, int | None], layers: int) -> list[tuple[str, int, int]]:
    """(name, first layer, layer behind the last) of the stages that there are: each lasts until another begins, and of
    two that begin together the later one counts. begin: where the three later stages begin, None for absent ones."""
    begins = {0: STAGES[0]} | {begin[name]: name for name in STAGES[1:] if begin[name] is not None}
    starts = sorted(begins)
    return [(begins[a], a, b) for a, b in itertools.pairwise([*starts, layers])]


def flow_widgets(
    flows: Mapping[str, Flow], boundaries: Mapping[tuple[str, bool], Mapping[str, int | None]], targets: Sequence[str]
) -> list[dict[str, Any]]:
    """Flows from the key by layer with the bands of the stages. flows: "<measure>_<passage>" -> flow. boundaries: of
    each of these, for means and for masses (True)."""
    views = []
    for name, flow in flows.items():
        measure, passage = name.split("_")
        for mass, quantity in ((False, "mean over pairs"), (True, "sum over keys")):
            found = {f"key to {target}": flow.curve("key", target, mass) for target in targets}
            series = {key: curve for key, curve in found.items() if curve is not None}
            bands = stage_bands(boundaries[name, mass], len(flow.mean))
            views.append(CurvesView((measure, passage, quantity), series, bands))
    about = (
        "How much the passage's word for the answer (key) gives to the rest of the passage, the question and the cue "
        "of the answer. The stages are read off the smoothed curves, each divided by its maximum."
    )
    layers = range(len(next(iter(flows.values())).mean))
    return [curves("Streams", about, "layer", layers, views, ("measure", "passage", "quantity"), True)]


# --- CAFE ------------------------------------------------------------------------------------------------------------


def document_widgets(
    questions: Sequence[Question], records: Sequence[Mapping[str, Any]], names: Mapping[str, str], alpha: np.ndarray,
    eta: Mapping[str, np.ndarray], heads: Mapping[str, Sequence[Head]],
) -> list[dict[str, Any]]:  # fmt: skip
    """Documents of each question, ranked by what the heads of stage 1 see of them, and the map of all heads.

    records: the lines of questions.jsonl. names: of the methods. alpha: float [n, L, N, D], attention from each
    question to its documents. eta: stage -> float [L, N], scores of heads. heads: stage -> those chosen, of stage "1"
    first.
    """
    first = next(iter(heads.values()))
    methods = list(records[0]["methods"])
    made = []
    for question, record, seen in zip(questions, records, alpha, strict=True):
        beta, _ = document_scores(seen[tuple(zip(*first))][:, : len(question.documents)])
        own = record["methods"]["cafe"]
        marks = (question.gold, own["order"], own["candidates"])
        answers = [
            (record["methods"][m]["sub_em"] >= 1, record["methods"][m]["prediction"]) for m in methods
        ]  # fmt: skip
        for marked in marks[1:]:
            hits, all_ = len(set(question.gold) & set(marked)), len(set(question.gold))
            answers.append((hits == all_, f"{hits} of {all_} gold documents"))
        facts = {"answers": " | ".join(question.answers), "id": question.id, "documents": str(len(question.documents))}
        texts = [f"{d.title}: {d.text}" if d.title else d.text for d in question.documents]
        labels = question.kinds or [""] * len(question.documents)
        made.append(
            Record(question.question, facts, np.stack([beta.sum(axis=0), *beta]), labels, texts, marks, answers)
        )  # fmt: skip
    scores = ["sum over the heads of stage 1", *(f"layer {layer}, head {head}" for layer, head in first)]
    outcomes = [*(names[m] for m in methods), "what stage 1 keeps", "what stage 2 chooses"]
    about = (
        "Documents of a question by the attention that the heads of stage 1 share out among them. Kept documents are "
        "told with their place in CAFE's prompt, whose last one stands next to the question; candidates are those that "
        "stage 2 steers towards. An answer is right by SubEM, a choice if it has all gold documents."
    )
    marks = (("gold", False), ("kept", True), ("candidate", False))
    layers, count = next(iter(eta.values())).shape
    chosen = {stage: np.zeros((layers, count), bool) for stage in eta}
    for stage, mask in chosen.items():
        mask[tuple(zip(*heads[stage]))] = True
    return [
        ranking(
            "Documents and answers", about, ("question", "document"), scores, marks, outcomes, made,
            (names["cafe"], names["direct"]),
        ),
        grid_map(
            "Heads", "Mean share of a head's attention on documents that lies on gold ones, over validation questions.",
            ("layer", range(layers)), ("head", range(count)), "share on gold documents", eta,
            [MapView((stage,), stage, mask) for stage, mask in chosen.items()], ("stage",), "chosen", ("stage",), "all",
        ),
    ]  # fmt: skip
