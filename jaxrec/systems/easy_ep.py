"""EASY-EP: keep the experts that a domain needs, found in a few demonstrations (arXiv 2504.06792).

    calibrate  one forward pass over 25 demonstrations of each domain, with the model's own answers: expert statistics
    select     masks of every method and size, for each domain and for all together
    prune      smaller Hugging Face folders without the experts that a mask leaves out
    evaluate   loss and exact answers, in the mask's own domain and in the others, paired with the full model

The embedded world's figures say that the machinery works; the paper's tables need its models and benchmarks.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import models
from analysis import experts
from jaxrec.config import UsageError, write_atomic
from jaxrec.convert import read_expert_mask, write_expert_mask
from jaxrec.data.demonstrations import Demonstration, read_demonstrations
from jaxrec.evaluate import experts as judging
from jaxrec.systems import by_seed, world_lm
from jaxrec.tools.world_model import arrays, encode
from jaxrec.world.texts import Sample
from models.generation import generate_tokens, pad_rows
from models.moe import check_expert_mask, keep_experts
from models.sharding import make_mesh, use_mesh

STAGES = ("calibrate", "select", "prune", "evaluate")
MIX = "mix"
ANSWERS = ("own", "gold", "none")
ORDERS = ("random", "longest")


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One seed of one config."""

    config: Any
    seed: int
    folder: Path
    mesh: jax.sharding.Mesh | None

    @functools.cached_property
    def model(self) -> models.Model:
        m = self.config.model
        path = m.path or world_lm.cached(m.base, self.seed)
        model = models.load(path, mesh=self.mesh, dtype=m.dtype or None)
        if not model.config.experts:
            raise UsageError(f"{path} is a dense {model.config.family} model: EASY-EP removes experts")
        return model.replace(config=model.config.replace(mask_mode=self.config.select.mask_mode))

    @functools.cached_property
    def domains(self) -> dict[str, tuple[list[Demonstration], list[Demonstration]]]:
        """Name -> demonstrations to calibrate with, and others to evaluate with."""
        c = self.config
        rng = np.random.Generator(np.random.PCG64([self.seed, 17]))
        if c.data.source == "files":
            return read_demonstrations(c.data.files, c.calibrate.samples, c.calibrate.order, rng)
        base = world_lm.base_config(c.model.base, self.seed)
        texts = world_lm.make_texts(base)

        def draw(name: str, split: str, count: int) -> list[Demonstration]:
            samples = texts.sample(name, split, rng, count)
            return [Demonstration(name, s.prompt, s.answer) for s in samples]

        out = {}
        for name in base.text.domains:
            longest = c.calibrate.order == "longest"
            pool = draw(name, "train", (8 if longest else 1) * c.calibrate.samples)
            pool = sorted(pool, key=lambda d: -len(d.prompt + d.response)) if longest else pool
            out[name] = pool[: c.calibrate.samples], draw(name, "test", c.evaluate.samples)
        return out

    def mask(self, domain: str, method: str, keep: int) -> np.ndarray:
        path = self.folder / "masks" / mask_name(domain, method, keep)
        if not path.exists():
            raise UsageError(f"{path} does not exist: run --stages=select first")
        mask = read_expert_mask(path)
        check_expert_mask(mask, self.model.config)
        return mask


def mask_name(domain: str, method: str, keep: int) -> str:
    return f"{domain}_{method}_{keep}.json"


def check(config: Any) -> None:
    """Raise UsageError for settings that a stage would stumble over."""
    choices = {
        "calibrate.answers": ANSWERS, "calibrate.order": ORDERS, "data.source": ("world", "files"),
        "select.mask_mode": models.config.MASK_MODES,
    }  # fmt: skip
    for field, known in choices.items():
        group, name = field.split(".")
        if config[group][name] not in known:
            raise UsageError(f"{field}={config[group][name]!r} must be one of {', '.join(known)}")
    for method in config.select.methods:
        if method not in experts.METHODS:
            raise UsageError(f"select.methods: no {method!r}; known: {', '.join(experts.METHODS)}")
    if "easy_ep" not in config.select.methods:
        raise UsageError("select.methods must name easy_ep, which the others are compared with")
    if config.evaluate.random_draws < 1 or config.calibrate.samples < 1:
        raise UsageError("evaluate.random_draws and calibrate.samples must be at least 1")
    if MIX in config.prune.domains and not config.select.mix:
        raise UsageError(f"prune.domains names {MIX!r}, which select.mix=False leaves out")
    if not config.select.keep or min(config.select.keep) < 1:
        raise UsageError(f"select.keep={config.select.keep} must name at least one number of experts")
    if config.prune.domains and config.prune.keep not in config.select.keep:
        raise UsageError(f"prune.keep={config.prune.keep} must be one of select.keep={config.select.keep}")
    if (config.data.source == "files") != bool(config.data.files):
        raise UsageError("data.files goes with data.source=files: NAME=FILE.jsonl for every domain")
    if config.data.source == "files" and not config.model.path:
        raise UsageError("data.source=files needs model.path, the folder of a model with experts")
    if config.data.source == "world" and config.model.path:
        raise UsageError("model.path goes with data.source=files: the world's text needs the world's own model")


# --- calibrate -------------------------------------------------------------------------------------------------------


def _encoded(this: Run, name: str) -> tuple[list[list[int]], int]:
    """Ids of a domain's calibration samples, with the answers that the config asks for, and how many were too long."""
    c, model = this.config.calibrate, this.model
    samples = this.domains[name][0]
    prompts = [encode(model.tokenizer, Sample(name, d.prompt, ""))[0][:-1] for d in samples]
    rows = prompts
    if c.answers == "gold":
        rows = [encode(model.tokenizer, Sample(name, d.prompt, d.response))[0] for d in samples]
    if c.answers == "own":
        rows = []
        for low in range(0, len(prompts), c.batch_size):
            part = prompts[low : low + c.batch_size]
            with use_mesh(this.mesh):
                out = generate_tokens(model.params, model.config, part, c.max_new, seed=this.seed)
            rows += [p + t[:n].tolist() for p, t, n in zip(part, out.tokens, out.counts, strict=True)]
    short = [row for row in rows if len(row) <= c.max_tokens]
    if not short:
        raise ValueError(
            f"{name}: all {len(rows)} samples are longer than calibrate.max_tokens={c.max_tokens}; raise it"
        )
    return short, len(rows) - len(short)


def calibrate(this: Run) -> None:
    """Writes ``statistics/<domain>.npz``: score, gate, frequency [L, E], count, layer_ids [L], likeness [L, E, E]."""
    config, folder = this.model.config, this.folder / "statistics"
    folder.mkdir(parents=True, exist_ok=True)
    for name in this.domains:
        path = folder / f"{name}.npz"
        if path.exists():
            continue
        rows, dropped = _encoded(this, name)
        tokens, lengths = pad_rows(rows)
        width = models.sample.bucket(tokens.shape[1])
        tokens = np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))
        calibration = experts.Calibration(this.model.params, config, likeness=this.config.evaluate.merge)
        size = this.config.calibrate.batch_size
        for low in range(0, len(tokens), size):
            chosen = np.minimum(np.arange(low, low + size), len(tokens) - 1)  # one shape: filled up with empty rows
            real = np.where(np.arange(low, low + size) < len(tokens), lengths[chosen], 0)
            with use_mesh(this.mesh):
                calibration.add(tokens[chosen], real)
        found = calibration.result(name)
        left_out = f", {dropped} longer than calibrate.max_tokens are left out" if dropped else ""
        print(f"calibrate: {name}: {len(rows)} samples, {int(lengths.sum())} tokens{left_out}")
        sums = {k: v for k, v in dataclasses.asdict(found).items() if v is not None}
        layers = np.arange(config.moe_layers) + config.first_dense
        draft = folder / f".{name}.npz"
        np.savez(draft, **sums, layer_ids=layers, n_tokens=int(lengths.sum()))
        draft.replace(path)


def read_statistics(this: Run) -> dict[str, experts.Statistics]:
    """Statistics by domain. Raises UsageError when the calibrate stage has not finished."""
    out = {}
    for name in this.domains:
        path = this.folder / "statistics" / f"{name}.npz"
        if not path.exists():
            raise UsageError(f"{path} does not exist: run --stages=calibrate first")
        with np.load(path, allow_pickle=False) as stored:
            fields = {f.name: stored[f.name] for f in dataclasses.fields(experts.Statistics) if f.name in stored}
        out[name] = experts.Statistics(**fields)
    return out


# --- select, prune ---------------------------------------------------------------------------------------------------


def _mixed(found: Mapping[str, experts.Statistics], method: str, keep: int, seed: int) -> np.ndarray:
    if method == "random":
        return experts.select_by(method, next(iter(found.values())), keep, seed)
    field = {"easy_ep": "score"}.get(method, method)
    return experts.select(experts.mix({name: getattr(s, field) for name, s in found.items()}), keep)


def masks(this: Run, found: Mapping[str, experts.Statistics]) -> dict[tuple[str, str, int], np.ndarray]:
    """All masks by domain, method and size."""
    c, out = this.config.select, {}
    for number, name in enumerate([*found, *([MIX] if c.mix else [])]):
        for method in c.methods:
            for keep in c.keep:
                seed = 1000 * this.seed + number
                made = _mixed(found, method, keep, seed) if name == MIX else None
                out[name, method, keep] = experts.select_by(method, found[name], keep, seed) if made is None else made
    return out


def select(this: Run) -> None:
    """Writes ``masks/<domain>_<method>_<keep>.json`` in the published form, each with a ``.meta.json`` beside it."""
    folder, config = this.folder / "masks", this.model.config
    folder.mkdir(parents=True, exist_ok=True)
    found = read_statistics(this)
    for (domain, method, keep), mask in masks(this, found).items():
        check_expert_mask(mask, config)
        path = folder / mask_name(domain, method, keep)
        write_expert_mask(path, mask)
        about = {
            "family": config.family, "layers": config.moe_layers, "experts": config.experts,
            "first_layer": config.first_dense, "keep": keep, "method": method, "domain": domain, "seed": this.seed,
            "mask_mode": config.mask_mode, "calibration": this.config.calibrate.to_dict(),
        }  # fmt: skip
        write_atomic(path.with_suffix(".meta.json"), json.dumps(about, indent=1) + "\n")


def prune(this: Run) -> None:
    """Writes ``pruned/<domain>_<keep>``, an ordinary folder with fewer experts, and says how far its logits are from
    those of the masked model."""
    c = this.config.prune
    for domain in c.domains:
        target = this.folder / "pruned" / f"{domain}_{c.keep}"
        if target.exists():
            continue
        model = this.model
        mask = this.mask(domain, "easy_ep", c.keep)
        params, config = keep_experts(model.params, model.config.replace(mask_mode="mask_first"), mask)
        models.save(model.replace(params=params, config=config), target)
        rows = [_encoded(this, name)[0][0] for name in this.domains]
        tokens, _ = pad_rows(rows)
        with use_mesh(this.mesh):
            masked = models.forward(model.params, model.config, tokens, expert_mask=mask).logits
            smaller = models.load(target, mesh=this.mesh)
            got = models.forward(smaller.params, smaller.config, tokens).logits
        far = float(np.abs(np.asarray(masked) - np.asarray(got)).max() / np.abs(np.asarray(masked)).max())
        before, after = model.config.num_params(), config.num_params()
        print(f"prune: {target}: {after:,} of {before:,} weights; logits within {far:.1e} of the masked model's")


# --- evaluate --------------------------------------------------------------------------------------------------------


def evaluate(this: Run) -> judging.SeedResult:
    """Every mask on every domain; answers by question, so that methods can be compared in pairs."""
    found = read_statistics(this)
    tests = {name: test for name, (_, test) in this.domains.items()}
    for name, test in tests.items():
        if not test:
            raise UsageError(f"{name}: no demonstration is left to evaluate with: lower calibrate.samples")
    rows = {
        name: arrays(this.model.tokenizer, [Sample(name, d.prompt, d.response) for d in test])
        for name, test in tests.items()
    }  # fmt: skip
    chosen = {
        (domain, method, keep): this.mask(domain, method, keep)
        for domain in [*found, *([MIX] if this.config.select.mix else [])]
        for method in this.config.select.methods
        for keep in this.config.select.keep
    }
    draws = {
        (domain, keep): [
            experts.select_by("random", found[domain], keep, 1000 * this.seed + 100 * draw + number)
            for draw in range(this.config.evaluate.random_draws)
        ]
        for number, domain in enumerate(found)
        for keep in this.config.select.keep
        if "random" in this.config.select.methods
    }
    with use_mesh(this.mesh):
        return judging.evaluate_seed(this.model, rows, found, chosen, draws, this.config)


def run(config: Any, workdir: Path, stages: Sequence[str]) -> dict[str, Any] | None:
    """Run ``stages`` for every seed; with "evaluate", returns the result that is also in result.json."""
    check(config)
    sizes = config.mesh.to_dict()
    mesh = make_mesh(**sizes) if set(sizes.values()) != {1} else None
    recipe = {"calibrate": calibrate, "select": select, "prune": prune, "evaluate": evaluate}
    results = by_seed(recipe, stages, config.seeds, workdir, lambda seed, folder: Run(config, seed, folder, mesh))
    return judging.pool(config, results, workdir) if results else None
