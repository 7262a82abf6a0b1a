"""DeepRec: autonomous reasoning and retrieval for recommendation (arXiv 2505.16810).

A language model talks to a preference-aware recommender over several turns, then ranks. Read from top to bottom:

    trm         train the recommender that answers queries, and the baselines it is compared with
    cold_start  supervised traces of a heuristic (ours: a model without pre-training cannot follow the protocol)
    cold_rl     stage 1, rewards for form, for calling, and for calling in different words
    rec_rl      stage 2, rewards for form, for the hit, its rank, and the likeness of all that is listed
    evaluate    greedy play on test users, controls, paired intervals

Every stage reads and writes ``<workdir>/checkpoints/<stage>`` and is skipped when that is finished. The paper's own
numbers are not reproduced here: its tables and training texts are not public.
"""

import dataclasses
import functools
import json
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import models
from jaxrec.config import UsageError, write_atomic
from jaxrec.data.pipeline import batches
from jaxrec.data.recommendation import Task, config_task
from jaxrec.evaluate import deeprec as judging
from jaxrec.evaluate.ranking import evaluate_ranking
from jaxrec.systems.deeprec_settings import check, policy_config, reward_config
from jaxrec.tools.recommenders import Trained, scorer, train_recommender
from jaxrec.tools.scratch import catalogue_tokenizer, scratch_model
from jaxrec.tools.traces import TraceConfig, encode_traces, write_traces
from jaxrec.tools.trm import RecommenderTool
from models import lora
from models.sharding import make_mesh, use_mesh
from rl.checkpoint import Checkpointer
from rl.envs.recommend import OPEN_QUERY, Example, PromptStyle, RecommendEnv
from rl.finetune import SFTConfig, sft
from rl.metrics import MetricsWriter
from rl.optimizer import OptimizerConfig, init_state
from rl.recommender import RecommenderConfig
from rl.rewards import DeepRecReward
from rl.rollout import RolloutConfig, rollout
from rl.trainer import train

STAGES = ("trm", "cold_start", "cold_rl", "rec_rl", "evaluate")


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One seed of one config: the task and what every stage needs."""

    config: Any
    seed: int
    folder: Path
    task: Task
    mesh: jax.sharding.Mesh | None

    def checkpoint(self, name: str) -> Path:
        return self.folder / "checkpoints" / name

    def model(self, name: str) -> models.Model:
        """The language model a stage left. Raises UsageError when that stage has not run."""
        path = self.checkpoint(name) / "model"
        if not path.exists():
            raise UsageError(f"stage {name!r} has not finished in {self.folder}: run --stages={name} first")
        return self.load(path)

    def load(self, path: str | Path) -> models.Model:
        """A model as it is trained: weights in float32, since steps of 1e-6 vanish in bfloat16's eight bits (unless
        low-rank changes leave them frozen), run in ``model.dtype``. Neither this nor ``remat`` is a field of a Hugging
        Face config, so every stage sets them."""
        m = self.config.model
        model = models.load(path, mesh=self.mesh, dtype=m.dtype if m.lora_rank else "float32")
        return model.replace(config=model.config.replace(dtype=m.dtype, remat=m.remat))

    def trainable(self, model: models.Model) -> models.Model:
        """The model that a stage trains; with low-rank changes these are merged where the stage saves it."""
        m, key = self.config.model, jax.random.key(self.seed)
        return lora.adapt(model, m.lora_rank, m.lora_on, m.lora_alpha, key, self.mesh)

    @functools.cached_property
    def trm(self) -> Trained:
        if not (self.checkpoint("trm") / "done.json").exists():
            raise UsageError(f"stage 'trm' has not finished in {self.folder}: run --stages=trm first")
        return train_trm(self)

    @functools.cached_property
    def server(self):
        return self.trm.server

    def env(
        self, *, stop_on_answer: bool = False, max_calls: int = 0, first_query_only: bool = False, **control: Any
    ) -> RecommendEnv:
        """The environment around the trained recommender; ``control`` changes its tool."""
        e = self.config.env
        tool = RecommenderTool(
            self.server, self.task.encode, exclude_history=e.exclude_history, exclude_seen=e.exclude_seen, **control
        )
        style = PromptStyle(e.instructions, e.history_categories, e.result_categories, e.history)
        return RecommendEnv(
            self.task.catalogue, tool, results=e.results, answers=e.answers, max_calls=max_calls or e.max_calls,
            style=style, stop_on_answer=stop_on_answer, first_query_only=first_query_only,
        )  # fmt: skip

    @functools.cached_property
    def reward(self) -> DeepRecReward:
        return DeepRecReward(
            self.task.catalogue, self.task.encode, self.task.item_text, np.asarray(self.trm.module.item_table()),
            reward_config(self.config),
        )  # fmt: skip

    def rollout_config(self, temperature: float = 1.0) -> RolloutConfig:
        r = self.config.rollout
        return RolloutConfig(
            r.max_prompt, r.max_total, r.max_new, self.config.env.max_calls + 1, temperature,
            r.top_p if temperature else 1.0, int8_weights=r.int8_weights, int8_cache=r.int8_cache,
            routing=self.config.rl.replay_routing and temperature > 0,
        )  # fmt: skip


def check_task(this: Run) -> None:
    """Raise UsageError or ValueError where the task's sizes do not fit the conversation. No device is used."""
    e, task = this.config.env, this.task
    style = PromptStyle(e.instructions, e.history_categories, e.result_categories, e.history)
    env = RecommendEnv(task.catalogue, None, results=e.results, answers=e.answers, max_calls=e.max_calls, style=style)
    left_out = task.max_len * bool(e.exclude_history) + (e.max_calls - 1) * e.results * bool(e.exclude_seen)
    if e.results + left_out > len(task.catalogue):
        raise UsageError(
            f"env.max_calls={e.max_calls} calls of env.results={e.results} new items, beside {task.max_len} of the "
            f"history, need {e.results + left_out} items; the catalogue has {len(task.catalogue)}"
        )
    folder = this.config.model.path
    tokenizer = models.load_tokenizer(folder) if folder and Path(folder).is_dir() else None
    if not folder:
        tokenizer = catalogue_tokenizer(task, max(e.results, e.answers, e.history))
    if tokenizer is None:  # a hub id is not fetched before it is needed
        return
    characters = np.array([len(a) + len(b) for a, b in zip(task.catalogue.titles, task.catalogue.categories)])
    longest = 0
    for part in ("train", "test"):
        samples = task.split.samples(part, min(task.max_len, e.history))
        # Tokenising every prompt takes too long; the longest in characters are the ones to fear.
        worst = np.argsort(-characters[samples.history].sum(axis=1))[:32]
        for i in worst:
            history = tuple(samples.history[i, : samples.lengths[i]].tolist())
            longest = max(longest, len(tokenizer.encode(env.prompt(Example(int(i), history, int(samples.targets[i]))))))
    if longest > this.config.rollout.max_prompt:
        raise UsageError(
            f"the longest prompt has {longest} tokens, more than rollout.max_prompt={this.config.rollout.max_prompt}; "
            "raise it, or lower env.history"
        )


def check_order(this: Run, stages: Sequence[str]) -> None:
    """Raise UsageError when a stage's forerunner has neither run nor been asked for."""
    for name in STAGES[: max(map(STAGES.index, stages), default=0)]:
        done = this.checkpoint(name) / ("done.json" if name == "trm" else "model")
        if name not in stages and not done.exists():
            raise UsageError(f"stage {name!r} has not finished in {this.folder}: run --stages={name} first")


def run(config: Any, workdir: Path, stages: Sequence[str]) -> dict:
    """All seeds of a config; returns the contents of result.json (empty before ``evaluate``)."""
    check(config)
    sizes = dict(config.mesh)
    mesh = make_mesh(**sizes) if any(size != 1 for size in sizes.values()) else None
    results = []
    for seed in config.seeds:
        folder = workdir if len(config.seeds) == 1 else workdir / f"seed{seed}"
        this = Run(config, int(seed), folder, config_task(config.data, config.text, int(seed)), mesh)
        check_task(this)
        check_order(this, stages)
        for stage in stages:
            start = time.perf_counter()
            outcome = RECIPE[stage](this)
            _note_seconds(folder, stage, time.perf_counter() - start)
            if stage == "evaluate":
                results.append(outcome)
    return judging.pool(config, results, workdir) if results else {}


# --- trm -------------------------------------------------------------------------------------------------------------


def _recommender_config(options: Any, seed: int, form: str = "prefix") -> RecommenderConfig:
    return RecommenderConfig(
        lr=options.lr, batch_size=options.batch_size, epochs=options.epochs, patience=options.patience, seed=seed,
        form=form,
    )  # fmt: skip


def _save_every(epochs: int) -> int:
    """Epochs between checkpoints: short runs save once on the way, long ones lose ten epochs at most."""
    return max(1, min(10, epochs // 2))


def train_trm(this: Run) -> Trained:
    """The recommender behind the tool, trained with preference texts (spec: full softmax of cosines over 0.07)."""
    c = this.config.trm
    return train_recommender(
        "trm", this.task,
        {"dim": c.dim, "layers": c.layers, "heads": c.heads, "ffn_dim": c.ffn_dim, "dropout": c.dropout,
         "experts": c.experts, "max_len": c.max_history or this.task.max_len},
        _recommender_config(c, this.seed), this.checkpoint("trm"),
        texts={"history_only": c.history_only, "no_text": c.no_text, "max_phrases": c.max_phrases},
        exclude_history=this.config.env.exclude_history, holdout=c.holdout, save_every=_save_every(c.epochs),
    )  # fmt: skip


def train_baselines(this: Run, stop: threading.Event | None = None) -> dict[str, Trained]:
    """Recommenders that work alone, each at its best setting on validation users; no event is held out from them."""
    c = this.config.baselines
    return {
        name: train_recommender(
            name, this.task, {"dim": c.dim},
            _recommender_config(c, this.seed, "prefix" if name == "trm_no_text" else c.form), this.checkpoint(name),
            grid={"dropout": c.dropout}, exclude_history=this.config.env.exclude_history, stride=c.stride,
            save_every=_save_every(c.epochs), stop=stop,
        )
        for name in c.names
    }  # fmt: skip


def trm(this: Run) -> None:
    """The tool and the baselines: side by side on a CPU, where one compiles while the other trains."""
    # Several processes must save in the same order, since they wait for each other there.
    if this.mesh is not None or jax.process_count() > 1 or jax.default_backend() != "cpu":
        train_trm(this)
        train_baselines(this)
        return
    stop = threading.Event()
    with ThreadPoolExecutor(1) as other:
        baselines = other.submit(train_baselines, this, stop)
        try:
            train_trm(this)
        except BaseException:
            stop.set()
            raise
        baselines.result()


# --- cold_start ------------------------------------------------------------------------------------------------------


def cold_start(this: Run) -> None:
    """Supervised start on heuristic traces, or the pretrained model as it is when ``cold_start.steps`` is 0."""
    c, target = this.config.cold_start, this.checkpoint("cold_start") / "model"
    if target.exists():
        return
    m = this.config.model
    if m.path:
        model = this.load(m.path)
    else:
        numbers = max(this.config.env.results, this.config.env.answers, this.config.env.history)
        sizes = {name: m[name] for name in ("dim", "layers", "heads", "head_dim", "ffn_dim", "dtype")}
        more = (OPEN_QUERY,) if c.open else ()
        model = scratch_model(this.task, sizes, numbers, this.config.rollout.max_total, this.seed, more)
    models.save(model, this.checkpoint("untrained") / "model")
    if c.steps:
        examples = this.task.examples("train")
        options = TraceConfig(
            c.traces, c.calls, c.words, hindsight=c.hindsight, recent=c.recent, open=c.open, merges=c.merges
        )
        _users, items, _previous = this.task.split.train_events()
        popular = np.argsort(-np.bincount(items, minlength=len(this.task.catalogue) + 1)[1:], kind="stable") + 1
        traces = write_traces(
            this.env(), examples, this.task.phrases, options, this.seed, popular[: this.config.env.answers].tolist()
        )
        eos, longest = model.config.eos_ids[0], this.config.rollout.max_total
        arrays, dropped = encode_traces(traces, model.tokenizer, eos, longest)
        if dropped:
            print(f"cold_start: {dropped} of {len(traces)} traces are longer than rollout.max_total and are left out")
        optimizer = OptimizerConfig(
            lr=c.lr, schedule="cosine", warmup_steps=max(1, c.steps // 20), horizon_steps=c.steps + 1, b2=c.b2,
            muon_lr=c.muon_lr,
        )  # fmt: skip
        model = this.trainable(model)
        state = init_state(model.params, optimizer, this.seed)
        feed = batches(arrays, c.batch_size, this.seed)
        settings = SFTConfig(optimizer, save_every=max(c.steps // 4, 1))
        with (
            MetricsWriter(this.folder, "cold_start", c.steps) as writer,
            Checkpointer(this.checkpoint("cold_start") / "steps", keep=2) as keeper,
        ):
            state = sft(settings, model.config, state, feed, c.steps, writer, keeper, this.mesh)
        model = model.replace(params=state.params)
    models.save(model, target)


# --- reinforcement learning ------------------------------------------------------------------------------------------


def prompts(this: Run) -> np.ndarray:
    """Rows of the training samples that serve as prompts: each user's last ``trm.holdout`` ones (all, when 0), kept
    when the recommender alone ranks their target within ``rl.difficulty`` (spec, section 3: within the top 100)."""
    rows = this.task.prompt_rows(this.config.trm.holdout)
    limit = this.config.rl.difficulty
    if limit:
        result = evaluate_ranking(
            scorer(this.server), this.task.split, "train", max_len=this.task.max_len,
            exclude_history=this.config.env.exclude_history, batch_size=1024, rows=rows,
        )  # fmt: skip
        kept = rows[result.ranks <= limit]
        print(f"prompts: {len(kept)} of {len(rows)} have their target within the recommender's top {limit}")
        rows = kept
    if len(rows) < 2 * this.config.rl.prompts_per_step:
        raise ValueError(
            f"only {len(rows)} prompts pass rl.difficulty={limit}, too few for two stages of "
            f"{this.config.rl.prompts_per_step} prompts a step; raise the limit or take more users"
        )
    return np.random.Generator(np.random.PCG64(this.seed)).permutation(rows)


def reinforce(
    this: Run, name: str, stage: str, start: str, steps: int, *, lr_scale: float = 1.0,
    changes: Mapping[str, Any] | None = None, weights: tuple[tuple[str, float], ...] = (),
) -> None:  # fmt: skip
    """Train the model of ``start`` with the rewards of ``stage`` ("cold" or "rec") into ``checkpoints/<name>``.
    changes: arguments of ``Run.env``."""
    target = this.checkpoint(name) / "model"
    if target.exists():
        return
    model, r = this.model(start), this.config.rl
    rows = prompts(this)
    # The stages' prompts are disjoint: stage 1 takes its share from the front of one fixed order, stage 2 the rest.
    front = min(this.config.cold_rl.steps * r.prompts_per_step, len(rows) // 2)
    rows = rows[:front] if stage == "cold" else rows[front:]
    examples = this.task.examples("train")
    feed = batches({"index": rows}, min(r.prompts_per_step, len(rows)), this.seed)
    env, options = this.env(**(changes or {})), this.rollout_config()
    settings = policy_config(this.config, this.seed, stage, lr_scale, weights)

    def play(params: Any, batch: dict[str, np.ndarray], key: jax.Array):
        chosen = [examples[i] for i in batch["index"]]
        with use_mesh(this.mesh):
            trajectory, states = rollout(
                params, model.config, model.tokenizer, env, chosen, key, options, group_size=r.group_size,
                fuse=this.mesh is None,
            )  # fmt: skip
        begin = time.perf_counter()
        parts = this.reward(states, stage)
        parts.pop("total")
        info = {
            "calls": float(np.mean([s.calls for s in states])),
            "valid_format": float((parts["format"] == 0).mean()),
            "seconds": {"reward": time.perf_counter() - begin},
        }
        return trajectory, parts, info

    reference = jax.tree.map(jnp.copy, model.params) if r.kl_coef else None  # the state's buffers are given away
    model = this.trainable(model)
    state = init_state(model.params, settings.optimizer, this.seed)
    with (
        MetricsWriter(this.folder, name, steps, show=("reward", "valid_format", "calls", "reward/hit")) as writer,
        Checkpointer(this.checkpoint(name) / "steps", keep=2) as keeper,
    ):
        state = train(
            settings, model.config, state, feed, play, steps=steps, writer=writer, checkpointer=keeper, mesh=this.mesh,
            ref_params=reference,
        )  # fmt: skip
    models.save(model.replace(params=state.params), target)


def _weights(this: Run, **changes: float) -> tuple[tuple[str, float], ...]:
    return tuple({"point": this.config.reward.point, "rank": this.config.reward.rank, **changes}.items())


def cold_rl(this: Run) -> None:
    """Stage 1: form, invocation, diversity."""
    c = this.config.cold_rl
    reinforce(this, "cold_rl", "cold", "cold_start", c.steps, lr_scale=c.lr_scale)


def rec_rl(this: Run) -> None:
    """Stage 2: form, hit, rank, point; from the weights of stage 1."""
    c = this.config.rec_rl
    reinforce(this, "rec_rl", "rec", "cold_rl", c.steps, lr_scale=c.lr_scale, weights=_weights(this))


def control(this: Run, name: str) -> str:
    """Train what a control needs; returns the checkpoint to play."""
    c1, c2 = this.config.cold_rl, this.config.rec_rl
    stage2 = functools.partial(
        reinforce, this, f"control_{name}", "rec", steps=c2.steps, lr_scale=c2.lr_scale, weights=_weights(this)
    )
    if name == "lr_0":
        stage2(start="cold_start", steps=2, lr_scale=0.0)
    elif name in judging.ENV_CONTROLS:
        stage2(start="cold_start", steps=c1.steps + c2.steps, changes=judging.ENV_CONTROLS[name])
    elif name == "no_stage1":
        stage2(start="cold_start")
    elif name in ("no_point", "no_rank"):
        stage2(start="cold_rl", weights=_weights(this, **{name.removeprefix("no_"): 0.0}))
    elif name == "with_point":
        stage2(start="cold_rl", weights=_weights(this, point=1.0))
    elif name == "untrained":
        return "untrained"
    elif name in ("blank_text", "random_words"):
        return "rec_rl"
    return f"control_{name}"


# --- evaluate --------------------------------------------------------------------------------------------------------


def evaluate(this: Run) -> judging.SeedResult:
    """Recommenders alone, the three models, then the controls; what is finished is read back."""
    controls = {name: control(this, name) for name in this.config.evaluate.controls}
    return judging.evaluate_seed(this, train_baselines(this), controls)


RECIPE = {"trm": trm, "cold_start": cold_start, "cold_rl": cold_rl, "rec_rl": rec_rl, "evaluate": evaluate}


def _note_seconds(folder: Path, stage: str, seconds: float) -> None:
    """Add to <workdir>/seconds.json what a stage took, over all runs that worked on it."""
    if jax.process_index():
        return
    path = folder / "seconds.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[stage] = round(known.get(stage, 0.0) + seconds, 2)
    write_atomic(path, json.dumps(known))
