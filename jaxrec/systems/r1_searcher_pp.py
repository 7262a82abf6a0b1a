"""R1-Searcher++: recall what is known, search for what is not, memorise what was found (arXiv 2505.17005).

    cold_start  supervised steps on right, well-formed rollouts of a teacher or of the model itself
    rl          REINFORCE++ with rewards for form, answer and few searches, beside a loss that memorises what the
                right rollouts retrieved, rewritten by the teacher as recall
    evaluate    greedy play on test questions, closed-book probes, ablations, paired intervals

The paper's code is not public; what it leaves open is decided in ``jaxrec.tools.authors``, ``rl.search_rewards`` and
the config. The embedded world's figures say that the machinery works; the paper's tables need its models.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrec.config import UsageError
from jaxrec.evaluate import search as judging
from jaxrec.evaluate.answers import R1_SEARCHER, cover_em
from jaxrec.systems import by_seed
from jaxrec.systems.search_run import SearchRun, check_judge, check_lengths, check_source, policy_config
from jaxrec.tools import search_task
from jaxrec.tools.authors import rewrite_from_memory, select_rollouts, write_rollouts
from jaxrec.tools.search_task import asked
from models.sharding import make_mesh
from rl.envs.search import SearchOptions, State
from rl.envs.tags import find_style
from rl.rows import encode_rows, pad_rows
from rl.search_rewards import SearchReward, SearchRewardConfig

STAGES = ("cold_start", "rl", "evaluate")
ABLATIONS = {"no_group": {"eta": 0.0}, "no_memory": {"memory": 0.0}}
PLAN = judging.Plan(
    R1_SEARCHER,
    {"cold_start": "SFT", "rl": "R1-Searcher++", "no_group": "without the group reward", "no_memory": "mu = 0"},
    (
        ("cover", "rl", "cold_start", 1),
        ("searches", "rl", "cold_start", 0),
        ("searches", "rl", "no_group", -1),
        ("cover", "rl", "no_group", 0),
        ("cover", "rl", "no_memory", 0),
        (f"closed book, {judging.PROBES[0]}", "rl", "no_memory", 1),
    ),
)


class Run(SearchRun):
    """One seed of one config."""

    @functools.cached_property
    def teacher(self) -> Any:
        t, path = self.config.teacher, self.folder / "teacher" / "replies.jsonl"
        if self.config.data.source == "files":
            return search_task.endpoint_teacher(t, path)
        return search_task.world_teacher(self.task, find_style(self.config.env.style), t.recall, t.error, path)

    def reward(self, eta: float | None = None) -> SearchReward:
        r = self.config.reward
        kind = "r1_searcher" if self.config.env.style == "r1_searcher" else "r1_searcher_pp"
        fit = functools.partial(cover_em, form=R1_SEARCHER.cover, normalization=R1_SEARCHER.normalization)
        return SearchReward(fit, SearchRewardConfig(kind, eta=r.eta if eta is None else eta, ddof=r.ddof))


def check(config: Any) -> None:
    """Raise UsageError or ValueError for settings that a stage would stumble over. No device is used."""
    c = config
    if c.env.style not in ("r1_searcher_pp", "r1_searcher"):
        raise UsageError(f"env.style={c.env.style!r} must be r1_searcher_pp or r1_searcher")
    if c.memory.weight and not find_style(c.env.style).internal_open:
        raise UsageError(f"memory.weight={c.memory.weight}: style {c.env.style!r} has no tag for recall; set it to 0")
    if c.cold_start.author not in ("teacher", "self"):
        raise UsageError(f"cold_start.author={c.cold_start.author!r} must be teacher or self")
    check_source(c)
    if c.data.source == "files":
        needed = c.memory.weight or c.cold_start.author == "teacher"
        search_task.check_files(c.data, c.teacher if needed else None)
    for name in c.evaluate.ablations:
        if name not in ABLATIONS:
            raise UsageError(f"evaluate.ablations: no {name!r}; known: {', '.join(ABLATIONS)}")
        if (name == "no_group" and not c.reward.eta) or (name == "no_memory" and not c.memory.weight):
            raise UsageError(f"evaluate.ablations: {name!r} is the run itself with these settings; leave it out")
    for name in ("weight", "share"):
        if c.memory[name] < 0:
            raise UsageError(f"memory.{name}={c.memory[name]} must be at least 0")
    check_lengths(c)
    check_judge(c)
    SearchOptions(k=c.env.k, max_searches=c.env.max_searches)
    SearchRewardConfig(eta=c.reward.eta, ddof=c.reward.ddof)
    policy_config(c, 0, aux_weight=c.memory.weight)


# --- cold_start ------------------------------------------------------------------------------------------------------


def cold_start(this: Run) -> None:
    """Supervised steps on kept rollouts; ``cold_start.json`` says how many were dropped and why."""
    c, target = this.config.cold_start, this.checkpoint("cold_start") / "model"
    if target.exists():
        return
    model = this.load(this.base)
    env, reward = this.env(model.tokenizer, k=this.config.env.k), this.reward()
    this.check_prompts(model.tokenizer, env, [*this.task.cold, *this.task.train, *this.task.test])
    questions = [asked(q) for q in this.task.cold]
    if c.author == "self":
        states, failed = [state for state, _, _ in this.sample(model, env, questions, c.samples)], {}
    else:
        sampling = search_task.teacher_sampling(this.config.teacher, this.seed)
        written = write_rollouts(env, questions, this.teacher, sampling, c.samples)
        states, failed = written.states, written.failed

    def keep(state: State) -> str:
        if faults := reward.faults(state):
            return f"form: {faults[0]}"
        return "" if reward.answer(state) >= 1.0 else "wrong answer"

    kept, dropped = select_rollouts(states, keep, c.per_question)
    if not kept:
        raise ValueError(
            f"cold_start: no rollout of {len(states)} can be learned from; dropped: {dropped}; not written by the "
            f"teacher: {failed}"
        )
    judging.write_selection(this.folder, states, kept, dropped, failed)
    rows, long = encode_rows(
        [(s.prompt, s.segments) for s in kept], model.tokenizer, model.config.eos_ids[0], this.config.rollout.max_total
    )
    print(f"cold_start: {len(kept)} of {len(states)} rollouts kept, {long} of them too long; dropped: {dropped}")
    this.supervise("cold_start", model, rows, c)


# --- rl --------------------------------------------------------------------------------------------------------------


def reinforce(this: Run, name: str, *, eta: float | None = None, memory: float | None = None) -> None:
    """Train the cold start's model into ``checkpoints/<name>``. eta, memory: in the place of the config's."""
    target = this.checkpoint(name) / "model"
    if target.exists():
        return
    model, m = this.model("cold_start"), this.config.memory
    settings = policy_config(this.config, this.seed, aux_weight=m.weight if memory is None else memory)
    env, reward = this.env(model.tokenizer, k=this.config.env.k, on_error="drop"), this.reward(eta)
    sampling = search_task.teacher_sampling(this.config.teacher, this.seed)

    def memorise(step: int, params: Any, states: list[State]):
        rows, counts = rewrite_from_memory(states, env, reward, this.teacher, sampling, m.per_question)
        judging.note_rewrites(this.folder, name, step, counts)
        most = max(1, int(m.share * len(states)))
        order = np.random.Generator(np.random.PCG64([this.seed, step])).permutation(len(rows))
        chosen = [rows[i] for i in order[:most]]
        if not chosen:
            return None
        arrays, _ = encode_rows(chosen, model.tokenizer, model.config.eos_ids[0], this.config.rollout.max_total)
        # One number of rows whatever was found: each other one would be a program of its own.
        return pad_rows(arrays, most, arrays["tokens"].shape[1])

    this.explore(name, model, settings, env, reward, [asked(q) for q in this.task.train], memorise)


def rl(this: Run) -> None:
    """The paper's second stage."""
    reinforce(this, "rl")


def evaluate(this: Run) -> judging.SeedResult:
    """Play the test questions with every model; what is finished is read back."""
    for name in this.config.evaluate.ablations:
        reinforce(this, name, **ABLATIONS[name])
    return judging.evaluate_seed(this, ("cold_start", "rl", *this.config.evaluate.ablations), R1_SEARCHER)


RECIPE = {"cold_start": cold_start, "rl": rl, "evaluate": evaluate}


def run(config: Any, workdir: Path, stages: Sequence[str]) -> dict[str, Any] | None:
    """Run the stages for every seed; returns the result that is also in result.json."""
    check(config)
    sizes = config.mesh.to_dict()
    mesh = make_mesh(**sizes) if set(sizes.values()) != {1} else None
    results = by_seed(RECIPE, stages, config.seeds, workdir, lambda seed, folder: Run(config, seed, folder, mesh))
    return judging.pool(config, results, workdir, PLAN) if results else None
