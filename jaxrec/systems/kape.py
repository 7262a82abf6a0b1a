"""KAPE: which neurons carry internal or external knowledge, and how both flow (arXiv 2505.11995, our reading).

    collect    prompts whose passage contradicts what the model knows, which answer it gives, and how often each neuron
               fires under either: firing counts
    identify   entropy over the two sources, filter, selection: a neuron file
    intervene  the same questions about other subjects with the internal set, the external set and random sets off
    report     flows between the parts of a prompt and the stages they show, knock-outs, what attention and MLPs add to
               either answer, and the result

The embedded world's figures say that the machinery works; the paper's models and data are others.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import analysis
import models
from analysis.neurons import CONDITIONS, Firings, check_disjoint
from jaxrec.config import UsageError, write_atomic
from jaxrec.data import conflicts
from jaxrec.data.conflicts import Item, counted_tokens, encode_prompts
from jaxrec.evaluate import kape as judging
from jaxrec.evaluate.explore import flow_widgets, neuron_widgets
from jaxrec.evaluate.kape import Off
from jaxrec.systems import by_seed, world_lm
from jaxrec.tools.world_model import arrays
from jaxrec.world.encyclopaedia import Fact
from jaxrec.world.texts import CUE, DOMAINS, Sample, Texts

STAGES = ("collect", "identify", "intervene", "report")
CONDITION_KINDS = ("conflict", "open_closed")
FLOW_KINDS = ("golden", "fake")
TARGETS = ("context", "query", "answer")  # of flows that begin at the key


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One seed of one config."""

    config: Any
    seed: int
    folder: Path

    @functools.cached_property
    def base(self) -> Any:
        return world_lm.base_config(self.config.model.base, self.seed)

    @functools.cached_property
    def model(self) -> models.Model:
        return models.load(world_lm.cached(self.config.model.base, self.seed), dtype=self.config.model.dtype or None)

    @functools.cached_property
    def texts(self) -> Texts:
        return world_lm.make_texts(self.base)

    @property
    def batch(self) -> int:
        return self.config.data.batch_size

    def rng(self, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, stream]))

    def rows(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        return arrays(self.model.tokenizer, samples)

    def nothing(self) -> Off:
        return Off(np.zeros((self.model.config.layers, self.model.config.ffn_dim), bool))

    def answered(self, items: Sequence[Item], kind: str) -> np.ndarray:
        """Which answer the model gives to prompts of a kind, int64 [n] as ``judging.SOURCES``."""
        rows = [self.rows([item.sample(kind, external) for item in items]) for external in (False, True)]
        return judging.sources(self.model, *rows, self.nothing(), self.config.data.answers, self.batch)[0]

    def stored(self, name: str, stage: str) -> Path:
        path = self.folder / name
        if not path.exists():
            raise UsageError(f"{path} does not exist: run --stages={stage} first")
        return path

    def items(self) -> dict[str, list[Item]]:
        """The items of "find" and "judge". Raises UsageError before ``collect``."""
        found = json.loads(self.stored("items.json", "collect").read_text(encoding="utf-8"))
        out = {name: [Item(**item) for item in found[name]] for name in ("find", "judge")}
        check_disjoint(*({item.subject for item in part} for part in out.values()), what="subjects")
        return out


def save_arrays(path: Path, **values: np.ndarray) -> None:
    """Write an .npz file that a reader sees whole or not at all."""
    draft = path.with_name(f".{path.name}")
    np.savez(draft, **values)
    draft.replace(path)


def check(config: Any) -> None:
    """Raise UsageError for settings that a stage would stumble over."""
    choices = {
        "data.conditions": CONDITION_KINDS, "data.counted": ("answer", "cue", "all"),
        "data.answers": ("exact", "likelier"), "intervene.value": ("zero", "mean"),
        "intervene.positions": ("all", "answer"),
    }  # fmt: skip
    for field, known in choices.items():
        group, name = field.split(".")
        if config[group][name] not in known:
            raise UsageError(f"{field}={config[group][name]!r} must be one of {', '.join(known)}")
    try:
        analysis.Selection(**config.identify.to_dict())
    except ValueError as error:
        raise UsageError(f"identify: {error}") from error
    if config.intervene.draws < 5:
        raise UsageError(f"intervene.draws={config.intervene.draws} must be at least 5: the criteria want five sets")
    for name in config.intervene.neutral_domains:
        if name not in DOMAINS:
            raise UsageError(f"intervene.neutral_domains: no {name!r}; domains: {', '.join(DOMAINS)}")
    for group, name in (("data", "find"), ("data", "judge"), ("data", "batch_size"), ("report", "samples"),
                        ("intervene", "neutral")):  # fmt: skip
        if config[group][name] < 1:
            raise UsageError(f"{group}.{name}={config[group][name]} must be at least 1")
    if not config.intervene.neutral_domains:
        raise UsageError("intervene.neutral_domains must name at least one domain: its loss is a cost")
    base = world_lm.base_config(config.model.base, 0)
    if base.model.experts:
        raise UsageError(f"model.base={config.model.base} has experts: KAPE's neurons are those of dense MLPs")
    if not 1 <= config.report.window <= base.model.layers:
        raise UsageError(f"report.window={config.report.window} must lie in 1 .. {base.model.layers}, the layers")


# --- collect ---------------------------------------------------------------------------------------------------------


def _closed(fact: Fact, question: int) -> Sample:
    return Sample("facts", f"Question: {fact.question(question)}{CUE}", f" {fact.object}")


def _known(this: Run, facts: Sequence[Fact]) -> list[tuple[int, int]]:
    """(number of a fact, number of a question) that the model answers without a passage; all with data.known=False."""
    asked = [(at, question) for at in range(len(facts)) for question in range(2)]
    if not this.config.data.known:
        return asked
    samples = [_closed(facts[at], question) for at, question in asked]
    right = judging.judged(this.model, this.rows(samples), this.nothing(), this.batch)["right"]
    return [pair for pair, yes in zip(asked, right, strict=True) if yes]


def _firings(this: Run, samples: Sequence[Sample]) -> Firings:
    """Firing counts of prompts with their answers, over the tokens that data.counted names."""
    rows = this.rows(samples)
    counted = counted_tokens(rows, this.config.data.counted)

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for low in range(0, len(samples), this.batch):  # of one shape: filled up with rows that are not counted
            chosen = np.minimum(np.arange(low, low + this.batch), len(samples) - 1)
            real = np.arange(low, low + this.batch) < len(samples)
            yield rows["tokens"][chosen], counted[chosen] & real[:, None]

    config = this.model.config
    return analysis.count_firings(this.model.params, config, batches(), this.config.identify.firing)


def _conditions(this: Run, items: Sequence[Item], judged: Sequence[Item]) -> tuple[list[Sample], list[Sample]]:
    """Prompts with the answers given, under the internal and the external condition (our reading).

    "conflict": ``items`` with fake passages, by the answer given. "open_closed": known facts without a passage, and
    facts that the model knows with their passage only; about other subjects than those ``judged``, not other answers.
    """
    if this.config.data.conditions == "conflict":
        internal, external = analysis.split_by_source(this.answered(items, "fake"))
        return [items[i].sample("fake") for i in internal], [items[i].sample("fake", True) for i in external]
    apart = {item.subject for item in judged}
    inside = [f for f in this.texts.known if f.subject not in apart]
    closed = [_closed(inside[at], question) for at, question in _known(this, inside)]
    facts = [f for s in this.texts.readable["test"] for f in this.texts.subjects[s]]
    part = conflicts.Part(tuple(facts), tuple(tuple(this.texts.wrong_objects(f)) for f in facts))
    pairs = [(at, question) for at in range(len(facts)) for question in range(2)]
    read = conflicts.make_items(this.texts, part, pairs, len(items), this.rng(23))
    if this.config.data.known:
        open_ = (this.answered(read, "closed") != 0) & (this.answered(read, "golden") == 0)
        read = [item for item, yes in zip(read, open_, strict=True) if yes]
    return closed, [item.sample("golden") for item in read]


def collect(this: Run) -> None:
    """Writes ``items.json`` (the prompts' parts, "find" and "judge") and ``firings.npz``: int64 [L, F] "internal" and
    "external", and of both how many tokens and prompts were counted."""
    path, d = this.folder / "firings.npz", this.config.data
    if path.exists():
        return
    this.folder.mkdir(parents=True, exist_ok=True)
    items, about = {}, {}
    for stream, (name, part) in enumerate(conflicts.parts(this.texts, d.split_answers).items()):
        asked = _known(this, part.facts)
        about[name] = {"facts": len(part.facts), "questions": 2 * len(part.facts), "known": len(asked)}
        if not asked:
            raise ValueError(
                f"the model knows none of the {len(part.facts)} facts to {name} neurons on: train it longer, or set "
                "data.known=False"
            )
        items[name] = conflicts.make_items(this.texts, part, asked, d[name], this.rng(20 + stream))
        print(f"collect: {name}: {len(asked)} of {2 * len(part.facts)} questions known, {len(items[name])} prompts")
    write_atomic(
        this.folder / "items.json",
        json.dumps({"about": about, **{k: [dataclasses.asdict(i) for i in v] for k, v in items.items()}}) + "\n",
    )
    values = {}
    for name, samples in zip(CONDITIONS, _conditions(this, items["find"], items["judge"]), strict=True):
        fired = _firings(this, samples)
        values |= {name: fired.counts, f"{name}_tokens": fired.tokens, f"{name}_prompts": len(samples)}
        print(f"collect: {name}: {len(samples)} prompts, {fired.tokens} counted tokens")
    save_arrays(path, **values)


# --- identify --------------------------------------------------------------------------------------------------------


def identify(this: Run) -> None:
    """Writes ``neurons.json`` (see ``analysis.write_neurons``) and ``entropy.npz``: p [2, L, F], entropy [L, F]."""
    path, config = this.folder / "neurons.json", this.config
    selection = analysis.Selection(**config.identify.to_dict())
    with np.load(this.stored("firings.npz", "collect")) as stored:
        fired = [Firings(stored[n], int(stored[f"{n}_tokens"]), selection.firing) for n in CONDITIONS]
    if path.exists():
        return
    p = analysis.activation_probabilities(*fired, selection.min_tokens)
    found = analysis.select_neurons(p, selection)
    sizes = {name: int(getattr(found, name).sum()) for name in CONDITIONS}
    extra = {"both": int(found.both.sum()), "unassigned": int(found.unassigned.sum()), "inactive": found.inactive}
    print(f"identify: {sizes} {extra}, threshold {found.threshold:.4f}")
    if not all(sizes.values()):
        raise ValueError(
            f"of {sum(sizes.values())} chosen neurons {sizes['internal']} are internal and {sizes['external']} "
            "external: raise identify.rate or lower its quantiles, so that there is something to switch off"
        )
    save_arrays(
        this.folder / "entropy.npz", p=p, entropy=found.entropy, threshold=found.threshold, bar=found.bar,
        **{name: np.asarray(value) for name, value in extra.items()},
    )  # fmt: skip
    draft = path.with_name(".neurons.json")
    file = analysis.NeuronFile(
        f"{config.model.base}, seed {this.seed}", config.data.conditions, selection, found.internal, found.external
    )
    analysis.write_neurons(draft, file, this.model.config)
    draft.replace(path)


def neuron_sets(this: Run) -> dict[str, np.ndarray]:
    """The chosen sets, bool [L, F] by condition. Raises UsageError before ``identify``."""
    file = analysis.read_neurons(this.stored("neurons.json", "identify"), this.model.config)
    return {name: getattr(file, name) for name in CONDITIONS}


# --- intervene -------------------------------------------------------------------------------------------------------


def _means(this: Run, items: Sequence[Item]) -> np.ndarray:
    """Mean of each neuron over the counted tokens of contradicted prompts, float32 [L, F]."""
    rows = this.rows([item.sample("fake", external) for item in items for external in (False, True)])
    counted = counted_tokens(rows, this.config.data.counted)
    parts = ((rows["tokens"][at : at + 64], counted[at : at + 64]) for at in range(0, len(counted), 64))
    return analysis.site_means(this.model.params, this.model.config, parts, "mlp.act")


def most_different(p: np.ndarray, count: int) -> np.ndarray:
    """bool [L, F], the ``count`` neurons whose probability is most above that of the other condition: what entropy is
    compared with. p: float [2, L, F], their own condition first."""
    difference = (p[0] - p[1]).ravel()
    out = np.zeros(difference.size, bool)
    out[np.argsort(-difference, kind="stable")[:count]] = True
    return out.reshape(p[0].shape)


def intervene(this: Run) -> None:
    """Writes ``interventions.json``: which answer each "judge" prompt gets with a set of neurons off, and what that
    costs (accuracy on known facts without a passage and on passages about unknown ones, loss on neutral domains)."""
    path, c = this.folder / "interventions.json", this.config.intervene
    sets, items = neuron_sets(this), this.items()
    if path.exists():
        return
    with np.load(this.stored("entropy.npz", "identify")) as stored:
        p = stored["p"]
    mean = _means(this, items["find"]) if c.value == "mean" else None
    judge = items["judge"]
    rows = [this.rows([item.sample("fake", external) for item in judge]) for external in (False, True)]
    closed = this.rows(list({item.question: item.sample("closed") for item in judge}.values()))
    rng = this.rng(31)
    reading = this.rows(this.texts.sample("reading", "test", rng, c.neutral))
    neutral = [s for name in c.neutral_domains for s in this.texts.sample(name, "test", rng, c.neutral)]
    plain = this.rows(neutral)

    def result(neurons: np.ndarray) -> dict[str, Any]:
        off = Off(neurons, mean, c.positions == "answer")
        answers, margin = judging.sources(this.model, *rows, off, this.config.data.answers, this.batch)
        known, read, other = (judging.judged(this.model, r, off, this.batch) for r in (closed, reading, plain))
        return {
            "sources": answers.tolist(), "margin": np.round(margin.astype(float), 5).tolist(),
            "known": float(known["right"].mean()), "reading": float(read["right"].mean()),
            "neutral": float(other["nll"].sum() / other["tokens"].sum()),
        }  # fmt: skip

    taken = sets["internal"] | sets["external"]
    found: dict[str, Any] = {"none": result(np.zeros_like(taken))}
    for number, name in enumerate(CONDITIONS):
        found[name] = result(sets[name])
        found[f"difference_{name}"] = result(most_different(p if number == 0 else p[::-1], int(sets[name].sum())))
        draws = [
            analysis.random_sets(sets[name], c.draws, 1000 * this.seed + number, exclude=taken, match=match)
            for match in (None, p.mean(axis=0))
        ]
        found[f"random_{name}"] = [result(drawn) for several in draws for drawn in several]
        print(f"intervene: {name}: {int(sets[name].sum())} neurons and {2 * c.draws} random sets")
    write_atomic(path, json.dumps(found) + "\n")


# --- report ----------------------------------------------------------------------------------------------------------


def _flow_batches(prompts: conflicts.Prompts, size: int, answer: int) -> Iterator[tuple[np.ndarray, ...]]:
    for low in range(0, len(prompts.tokens), size):
        part = slice(low, low + size)
        yield prompts.tokens[part], prompts.labels[part], prompts.cues[part], prompts.targets[part, :, answer]


def _flows(this: Run, prompts: Mapping[str, conflicts.Prompts]) -> dict[str, analysis.Flow]:
    """Attention and saliency flows by kind of prompt; the loss is that of the passage's answer."""
    params, config, out = this.model.params, this.model.config, {}
    for kind in FLOW_KINDS:
        batches = list(_flow_batches(prompts[kind], this.batch, int(kind == "fake")))
        out[f"attention_{kind}"] = analysis.attention_flow(params, config, [b[:2] for b in batches])
        out[f"saliency_{kind}"] = analysis.saliency_flow(params, config, batches)
    return out


def streams(this: Run) -> None:
    """Writes ``flows.npz``: per measure and kind of prompt "mean", "mass" [L, P, P] and "samples" [P, P]; knock-outs
    "knock_out_<target>" [L - w + 1, 2], change of the log-probability of the internal and the external answer; and
    ``contributions.npz``: "attn", "mlp" and their cosines [L, 2], lens [L, 2], ablated windows [L - w + 1, 2]."""
    target, c = this.folder / "contributions.npz", this.config.report
    items = this.items()["judge"]
    if target.exists():
        return
    params, config = this.model.params, this.model.config
    chosen = this.rng(41).permutation(len(items))[: c.samples]
    kinds = ("golden", "irrelevant", "fake")
    prompts = {k: encode_prompts(this.model.tokenizer, [items[i] for i in chosen], k) for k in kinds}
    values = {
        f"{name}_{field}": getattr(flow, field)
        for name, flow in _flows(this, prompts).items()
        for field in ("mean", "mass", "samples")
    }
    fake = prompts["fake"]
    for segment in TARGETS:
        effects = analysis.knock_out_effects(
            params, config, fake.tokens, fake.labels, fake.cues, fake.targets, source="key", target=segment,
            width=c.window,
        )  # fmt: skip
        values[f"knock_out_{segment}"] = effects.mean(axis=(1, 2))
    save_arrays(this.folder / "flows.npz", **values)
    values = {}
    for kind, p in prompts.items():
        parts = analysis.logit_contributions(params, config, p.tokens, p.cues, p.targets)
        for name in ("attn", "mlp", "attn_cosine", "mlp_cosine"):
            values[f"{kind}_{name}"] = np.asarray(getattr(parts, name)).mean(axis=(1, 2))
        lens = analysis.logit_lens(params, config, p.tokens, p.cues, p.targets)
        for name, found in zip(("attn", "mlp"), lens, strict=True):
            values[f"{kind}_{name}_lens"] = np.asarray(found).mean(axis=(1, 2))
            effects = analysis.window_effects(
                params, config, p.tokens, p.cues, p.targets, site=f"{name}.out", width=c.window
            )
            values[f"{kind}_{name}_ablated"] = effects.mean(axis=(1, 2))
    save_arrays(target, **values)


def report(this: Run) -> judging.SeedResult:
    """Flows and contributions, then everything that the result is made of."""
    interventions = json.loads(this.stored("interventions.json", "intervene").read_text(encoding="utf-8"))
    sets, items = neuron_sets(this), this.items()["judge"]
    streams(this)
    with np.load(this.stored("flows.npz", "report")) as f:
        flows = {
            name: analysis.Flow(analysis.SEGMENTS, *(f[f"{name}_{field}"] for field in ("mean", "mass", "samples")))
            for name in (f"{measure}_{kind}" for measure in ("attention", "saliency") for kind in FLOW_KINDS)
        }  # fmt: skip
    with np.load(this.folder / "contributions.npz") as f:
        parts = {name: f[f"fake_{name}"] for name in ("attn", "mlp")}
        shift = {name: float((f[f"fake_{name}"] - f[f"golden_{name}"])[:, 1].sum()) for name in ("attn", "mlp")}
    with np.load(this.stored("entropy.npz", "identify")) as f:
        p, entropy = f["p"], f["entropy"]
        about = {name: float(f[name]) for name in ("threshold", "bar", "both", "unassigned", "inactive")}
    about |= {name: int(chosen.sum()) for name, chosen in sets.items()}
    about["stages"] = {name: judging.boundaries(flow) for name, flow in flows.items()}
    about["contribution to the fake token, fake - golden passage"] = shift
    names = {key: number for number, key in enumerate(dict.fromkeys((i.subject, i.relation) for i in items))}
    facts = np.array([names[i.subject, i.relation] for i in items])
    titles = {"attention_fake": "Attention from key", "saliency_fake": "Saliency from key"}
    figures = judging.neuron_figures(entropy, sets)
    figures += [judging.flow_figure(title, flows[name]) for name, title in titles.items()]
    begin = {(name, mass): judging.boundaries(flow, mass) for name, flow in flows.items() for mass in (False, True)}
    explore = neuron_widgets(p, entropy, sets) + flow_widgets(flows, begin, TARGETS)
    return judging.SeedResult(interventions, facts, figures + judging.contribution_figures(parts), about, explore)


def run(config: Any, workdir: Path, stages: Sequence[str]) -> dict[str, Any] | None:
    """Run ``stages`` for every seed; with "report", returns the result that is also in result.json."""
    check(config)
    recipe = {"collect": collect, "identify": identify, "intervene": intervene, "report": report}
    results = by_seed(recipe, stages, config.seeds, workdir, lambda seed, folder: Run(config, seed, folder))
    return judging.pool(config, results, workdir) if results else None
