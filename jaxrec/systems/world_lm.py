"""The base language model of the embedded world as a recipe: write the text, train, evaluate by domain.

    train     supervised next-token training on packed rows of every domain
    evaluate  loss and exact answers on test questions that share no sample with the training text

The model is an ordinary Hugging Face folder, ``<workdir>/model``.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import models
from jaxrec.config import UsageError, resolve_config, save_config, to_json, write_atomic
from jaxrec.data.pipeline import batches
from jaxrec.tools.world_model import (
    arrays,
    judge,
    new_model,
    rows_at_home,
    rows_by_source,
    search_phrases,
    training_rows,
)
from jaxrec.world import SCALES, generate, world_config
from jaxrec.world.conversations import talk_phrases
from jaxrec.world.texts import DOMAINS, Texts
from models.sharding import make_mesh
from rl.checkpoint import Checkpointer
from rl.finetune import SFTConfig, sft
from rl.metrics import MetricsWriter
from rl.optimizer import OptimizerConfig, init_state

STAGES = ("train", "evaluate")


def make_texts(config: Any) -> Texts:
    """The texts of a config's world. Raises UsageError for what cannot be."""
    w = config.world
    if w.scale not in SCALES:
        raise UsageError(f"world.scale={w.scale!r} must be one of {', '.join(SCALES)}")
    words = {"title_words": w.title_words} if "title_words" in w else {}
    try:
        world = generate(world_config(w.scale, seed=config.seed, **words))
        return Texts(
            world, config.seed, w.internal, w.both, w.titles, tuple(w.documents), tuple(w.get("distractors", (0, 0))),
            w.get("dialects", 0),
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(f"world: {error}") from error


def _more(config: Any) -> dict[str, Any]:
    """What some variants' training text has besides: see ``training_rows``."""
    names = ("conflicts", "conflict_share", "prompt_weight", "repeats", "seen", "unhelpful")
    return {name: config.text[name] for name in names if name in config.text}


def check(config: Any) -> None:
    """Raise UsageError or ValueError for settings that a stage would stumble over."""
    for name in config.text.domains:
        if name not in DOMAINS:
            raise UsageError(f"text.domains: no {name!r}; domains: {', '.join(DOMAINS)}")
    if config.train.router_balance and not config.model.experts:
        raise UsageError("train.router_balance is for models with experts: set model.experts, or take :moe")
    if config.train.get("domain_experts", 0) > config.model.experts:
        raise UsageError(f"train.domain_experts={config.train.domain_experts} of model.experts={config.model.experts}")
    count, share = config.text.get("conflicts", 0), config.text.get("conflict_share", 0.5)
    if (unhelpful := config.text.get("unhelpful", 0)) < 0:
        raise UsageError(f"text.unhelpful={unhelpful} must be a count")
    if count < 0 or not 0 <= share <= 1:
        raise UsageError(f"text.conflicts={count} must be a count, text.conflict_share={share} lie between 0 and 1")
    if (sparsity := config.train.get("mlp_sparsity", 0.0)) and config.model.experts:
        raise UsageError(f"train.mlp_sparsity={sparsity} is for models without experts: set model.experts=0")
    if not 0 <= 2 * (units := config.train.get("source_units", 0)) <= config.model.ffn_dim:
        raise UsageError(
            f"train.source_units={units}: two sets of so many must fit model.ffn_dim={config.model.ffn_dim}"
        )
    if stray := [at for at in config.model.get("narrow", ()) if not 0 <= at < config.model.layers]:
        raise UsageError(f"model.narrow names layer {stray[0]}; of model.layers={config.model.layers} the first is 0")
    if (seen := config.text.get("seen", 0)) < 0:
        raise UsageError(f"text.seen={seen} must be a count")
    SFTConfig(_optimizer(config), router_balance=config.train.router_balance, mlp_sparsity=sparsity)


def _optimizer(config: Any) -> OptimizerConfig:
    t = config.train
    return OptimizerConfig(
        lr=t.lr, schedule="cosine", warmup_steps=max(1, t.steps // 20), horizon_steps=t.steps + 1, muon_lr=t.muon_lr,
        muon_skip=tuple(t.get("muon_skip", ())),
    )  # fmt: skip


def base_config(spec: str, seed: int) -> Any:
    """The config that makes the base model of a seed, e.g. of "world_lm:moe"."""
    if (system := resolve_config(spec).system) != "world_lm":
        raise UsageError(f"{spec} is a config of {system}; a base model is made by world_lm")
    return resolve_config(spec, [f"--config.seed={seed}"])


def cached(spec: str, seed: int) -> Path:
    """The folder of the base model that a config makes, trained now where it has not been.

    It lies in JAXREC_CACHE, or ~/.cache/jaxrec, under a hash of the config: other settings are another model.
    """
    config = base_config(spec, seed)
    digest = hashlib.sha256(to_json(config).encode()).hexdigest()[:16]
    root = Path(os.environ.get("JAXREC_CACHE") or Path.home() / ".cache" / "jaxrec")
    workdir = root / "world_lm" / f"{config.variant}-{seed}-{digest}"
    if not (workdir / "model").exists():
        print(f"{spec}, seed {seed}: the embedded world's base model is made once, in {workdir}", flush=True)
        check(config)
        save_config(workdir, config)
    return train(config, workdir)


def train(config: Any, workdir: Path) -> Path:
    """The trained model's folder; does nothing when it is there."""
    target = workdir / "model"
    if target.exists():
        return target
    texts, t = make_texts(config), config.train
    sizes = config.mesh.to_dict()
    mesh = make_mesh(**sizes) if set(sizes.values()) != {1} else None
    more = [*(search_phrases() if config.text.get("search", False) else ())]
    talks = {"talk", "match"} & set(config.text.domains) or config.text.get("seen", 0)
    more += talk_phrases() if talks else ()
    model = new_model(texts, config.model.to_dict(), config.model.max_len, config.seed, more)
    x, home = config.text, t.get("domain_experts", 0)
    options = texts, model.tokenizer, x.per_domain, x.statements, x.length, config.seed, x.domains
    if home:
        rows = rows_at_home(*options, config.model.experts, home)
    elif units := t.get("source_units", 0):
        rows = rows_by_source(*options, units, config.model.ffn_dim, **_more(config))
    else:
        rows = training_rows(*options, **_more(config))
    print(f"world_lm: {len(rows['tokens'])} rows of {config.text.length} tokens, {model.config.num_params():,} weights")
    params = models.init(model.config, jax.random.key(config.seed), mesh=mesh)
    settings = SFTConfig(
        _optimizer(config), save_every=t.save_every, router_balance=t.router_balance,
        router_home=t.domain_weight if home else 0.0, mlp_sparsity=t.get("mlp_sparsity", 0.0),
    )  # fmt: skip
    state = init_state(params, settings.optimizer, config.seed)
    with (
        MetricsWriter(workdir, "train", t.steps) as writer,
        Checkpointer(workdir / "checkpoints" / "train", keep=2) as keeper,
    ):
        feed = batches(rows, t.batch_size, config.seed)
        state = sft(settings, model.config, state, feed, t.steps, writer, keeper, mesh)
    models.save(model.replace(params=state.params), target)
    return target


def test_rows(config: Any, texts: Texts, tokenizer) -> dict[str, dict[str, np.ndarray]]:
    """Test questions by domain, the same for every model of a config."""
    rng = np.random.Generator(np.random.PCG64([config.seed, 11]))
    count = config.evaluate.samples
    return {name: arrays(tokenizer, texts.sample(name, "test", rng, count)) for name in config.text.domains}


def evaluate(config: Any, workdir: Path) -> dict[str, Any]:
    """Loss in nats per answer token and the share of exact answers, by domain."""
    folder = workdir / "model"
    if not folder.exists():
        raise UsageError(f"{workdir} holds no trained model: run --stages=train first")
    model, texts = models.load(folder), make_texts(config)
    rows = []
    for name, questions in test_rows(config, texts, model.tokenizer).items():
        found = judge(model.params, model.config, questions)
        rows.append(
            {"name": name, "loss": float(found["nll"].sum() / found["tokens"].sum()),
             "accuracy": float(found["right"].mean())}
        )  # fmt: skip
    protocol = {"part": "test", "samples": config.evaluate.samples, "answers": "exact, greedy"}
    return {
        "system": config.system, "variant": config.variant, "seed": config.seed, "protocol": protocol, "rows": rows,
        "comparisons": [],
    }  # fmt: skip


def run(config: Any, workdir: Path, stages: Sequence[str]) -> dict[str, Any] | None:
    """Train the model and say what it can do; returns the result that is also in result.json."""
    check(config)
    if "train" in stages:
        train(config, workdir)
    if "evaluate" not in stages:
        return None
    result = evaluate(config, workdir)
    write_atomic(workdir / "result.json", json.dumps(result, indent=2) + "\n")
    return result
