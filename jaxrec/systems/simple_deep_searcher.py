"""SimpleDeepSearcher: few rollouts of a searching teacher, strictly chosen, then plain fine-tuning (arXiv 2505.16834).

    synthesize  a teacher annotates questions; a diverse sample of them is played by it, several times each, with
                results summed up by it
    curate      at most one short, right, well-formed rollout of each question; whatever is dropped is counted
    sft         supervised steps on these, with what the environment wrote masked
    dpo         pairs of them with faulty rollouts of the fine-tuned model (optional)
    rl          REINFORCE++ from the fine-tuned model, on questions that it gets right now and then (optional)
    evaluate    greedy play on test questions beside the base model and fine-tuning on as many uncurated rollouts

The paper's code for dpo and rl is not public. Pairs are made as its section 4.2 says, and results are masked there too.
Of rl the paper gives the questions, the reward and that it is strictly on-policy (appendix C): one update a rollout
batch (rl.minibatches). Its learning rate, KL weight, batch and steps are not told; the config has R1-Searcher's, and
its form of the advantage (arXiv 2503.05592). The paper's scores fall by rl and its responses become much shorter
(table 3), so that a model that got worse is no sign of a fault. The embedded world's figures say that the machinery
works; the paper's tables need its models.
"""

import functools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import models
from jaxrec.config import UsageError, write_atomic
from jaxrec.data.pipeline import batches
from jaxrec.data.qa import Question, sample_questions
from jaxrec.evaluate import search as judging
from jaxrec.evaluate.answers import SIMPLE_DEEP_SEARCHER as PROTOCOL
from jaxrec.evaluate.answers import token_f1
from jaxrec.systems import by_seed
from jaxrec.systems.search_run import SearchRun, check_judge, check_lengths, check_source, policy_config
from jaxrec.tools import authors, search_task
from jaxrec.tools.curation import CurationConfig, curate, describe, faults
from jaxrec.tools.deep_search import Annotated, Summariser, annotate
from jaxrec.tools.rollouts import Rollout, from_state, read_rollouts, scored, write_rollouts
from jaxrec.tools.samples import Sample, read_samples, write_samples
from jaxrec.tools.sampling import Sampled, SamplingConfig, sample_queries
from jaxrec.world.oracle_searcher import SearcherConfig
from models.sharding import make_mesh
from rl.checkpoint import Checkpointer
from rl.dpo import DPOConfig, add_reference, dpo, pair_rows
from rl.envs.search import DEEP_SEARCHER_OPTIONS, SearchEnv, SearchOptions
from rl.envs.tags import SIMPLE_DEEP_SEARCHER
from rl.metrics import MetricsWriter
from rl.optimizer import OptimizerConfig, init_state
from rl.rows import Segments, encode_rows, encode_segments, stack_rows
from rl.search_rewards import SearchReward, SearchRewardConfig

STAGES = ("synthesize", "curate", "sft", "dpo", "rl", "evaluate")
FILTERS = ("format", "path", "difficulty", "search")
ABLATIONS = ("uncurated", *(f"no_{name}" for name in FILTERS))
PLAN = judging.Plan(
    PROTOCOL,
    {
        "base": "base model", "sft": "SimpleDeepSearcher", "dpo": "SimpleDeepSearcher + DPO",
        "rl": "SimpleDeepSearcher + REINFORCE++",
        "uncurated": "as many uncurated rollouts", **{f"no_{name}": f"without the {name} filter" for name in FILTERS},
    },
    (
        ("cover", "sft", "uncurated", 1), ("em", "sft", "uncurated", 0), ("searches", "sft", "uncurated", 0),
        ("cover", "sft", "base", 0), *(("cover", "sft", f"no_{name}", 0) for name in FILTERS),
        *((metric, name, "sft", 0) for name in ("dpo", "rl") for metric in ("cover", "searches", "words")),
    ),
)  # fmt: skip


class Run(SearchRun):
    """One seed of one config."""

    @functools.cached_property
    def teacher(self) -> Any:
        path = self.folder / "teacher" / "replies.jsonl"
        if self.config.data.source == "files":
            return search_task.endpoint_teacher(self.config.teacher, path)
        return search_task.world_searcher_teacher(self.task, searcher_config(self.config), path)

    @functools.cached_property
    def asking(self) -> Any:
        """How the teacher draws."""
        return search_task.teacher_sampling(self.config.teacher, self.seed)

    @functools.cached_property
    def summariser(self) -> Summariser:
        lead = "" if self.config.data.source == "files" else " "  # the world's words have a blank before them
        return Summariser(self.teacher, self.asking, SIMPLE_DEEP_SEARCHER, self.config.env.page_words, lead)

    def options(self, k: int, max_searches: int, on_error: str) -> SearchOptions:
        return search_options(self.config, k, max_searches, on_error)

    def env(self, tokenizer: Any, *, k: int, max_searches: int | None = None, on_error: str = "continue") -> SearchEnv:
        env = super().env(tokenizer, k=k, max_searches=max_searches, on_error=on_error)
        if self.config.env.summarise:
            env.write = self.summariser
        return env

    @property
    def played(self) -> list[Question]:
        """The questions that have rollouts. Raises UsageError before they were synthesised."""
        ids = set(json.loads(self.needs("synthesize.json", "synthesize").read_text(encoding="utf-8"))["played"])
        return [question for question in self.task.train if question.id in ids]

    def needs(self, name: str, stage: str) -> Path:
        """A file that a stage leaves. Raises UsageError where it is not there."""
        if not (path := self.folder / name).exists():
            raise UsageError(f"{path} is not there: run --stages={stage} first")
        return path


# --- settings --------------------------------------------------------------------------------------------------------


def search_options(config: Any, k: int, max_searches: int, on_error: str = "continue") -> SearchOptions:
    """The paper's rules with the config's limits."""
    d, e = DEEP_SEARCHER_OPTIONS, config.env
    return SearchOptions(
        k, max_searches, e.max_turns, d.at_limit, d.repeat_notice, on_error, d.max_words, d.max_result_words, e.short
    )


def searcher_config(config: Any) -> SearcherConfig:
    """How the world's teacher errs."""
    return SearcherConfig(config.teacher.error, tuple(config.teacher.faults))


def sampling_config(config: Any) -> SamplingConfig:
    """How questions are sampled."""
    return SamplingConfig(**{name: value for name, value in config.sampling.items() if name != "max_failed"})


def curation_config(config: Any, **changes: Any) -> CurationConfig:
    """The filters. changes: in place of the config's. Failures of the teacher leave some questions fewer rollouts."""
    return CurationConfig(**{**config.curation.to_dict(), "rollouts": 0, **changes})


def dpo_config(config: Any) -> DPOConfig:
    """The update of the stage ``dpo``."""
    d = config.dpo
    optimizer = OptimizerConfig(lr=d.lr, warmup_steps=max(1, round(0.1 * d.steps)))
    return DPOConfig(optimizer, d.beta, d.micro_batches, save_every=max(d.steps // 4, 1))


def reward_config(config: Any) -> SearchRewardConfig:
    """The reward of the stage ``rl``."""
    return SearchRewardConfig("simple_deep_searcher", **config.reward.to_dict())


def check(config: Any, stages: Sequence[str] = STAGES) -> None:
    """Raise UsageError or ValueError for settings that a stage would stumble over, a missing file or key included. No
    device is used."""
    c = config
    if c.env.style != SIMPLE_DEEP_SEARCHER.name:
        raise UsageError(f"env.style={c.env.style!r} must be {SIMPLE_DEEP_SEARCHER.name}")
    check_source(c)
    for name in c.evaluate.ablations:
        if name not in ABLATIONS:
            raise UsageError(f"evaluate.ablations: no {name!r}; known: {', '.join(ABLATIONS)}")
        if name != "uncurated" and not c.curation[name.removeprefix("no_")]:
            raise UsageError(f"evaluate.ablations: {name!r} is the run itself with these settings; leave it out")
    if c.curation.search and c.curation.min_urls >= c.env.k:
        raise UsageError(
            f"curation.min_urls={c.curation.min_urls} distinct pages per search cannot be exceeded with env.k={c.env.k}"
        )
    if c.synthesize.samples < 1 or c.sft.steps < 1:
        raise UsageError(f"synthesize.samples={c.synthesize.samples} and sft.steps={c.sft.steps} must be at least 1")
    if c.dpo.steps < 0 or c.dpo.samples < 1:
        raise UsageError(f"dpo.steps={c.dpo.steps} must be at least 0, dpo.samples={c.dpo.samples} at least 1")
    r = c.rl
    if r.steps < 0 or r.pool < 0 or not 0 <= r.least_right <= r.most_right <= r.samples or r.samples < 1:
        raise UsageError(
            f"rl.steps={r.steps} and rl.pool={r.pool} must be at least 0, and of rl.samples={r.samples} rollouts "
            f"rl.least_right={r.least_right} to rl.most_right={r.most_right} right ones be possible"
        )
    if not 0 <= c.sampling.max_failed <= 1:
        raise UsageError(f"sampling.max_failed={c.sampling.max_failed} must lie between 0 and 1")
    if 0 < c.data.train_questions < c.sampling.total:
        raise UsageError(
            f"sampling.total={c.sampling.total} questions of a pool of data.train_questions={c.data.train_questions}"
        )
    check_lengths(c)
    searcher_config(c), sampling_config(c), curation_config(c), dpo_config(c), reward_config(c)
    policy_config(c, 0)
    for k in (c.env.k, c.env.test_k):
        search_options(c, k, c.env.max_searches)
    if c.data.source == "files" and {*stages} - {"curate", "sft"}:
        search_task.check_files(c.data, c.teacher)
    if "evaluate" in stages:
        check_judge(c)


# --- synthesize ------------------------------------------------------------------------------------------------------


def sampled_questions(this: Run) -> tuple[list[Question], Annotated, Sampled]:
    """The questions to play, in the order of the pool, and where the others went."""
    annotated = annotate(this.task.train, this.teacher, this.asking, this.config.sampling.max_failed)
    sampled = sample_queries(annotated.candidates, sampling_config(this.config))
    ids = {candidate.id for candidate in sampled.chosen}
    return [q for q in this.task.train if q.id in ids], annotated, sampled


def synthesize(this: Run) -> None:
    """``rollouts.jsonl``, and ``synthesize.json``: what became of the pool's questions and of the rollouts."""
    target = this.folder / "synthesize.json"
    if target.exists():
        return
    model = None if this.config.env.short else this.model("base")  # a prompt in full is the base model's template
    env, copies = this.env(model and model.tokenizer, k=this.config.env.k), this.config.synthesize.samples
    if model is not None:
        this.check_prompts(model.tokenizer, env, [*this.task.train, *this.task.test])
    questions, annotated, sampled = sampled_questions(this)
    asked = [search_task.asked(q) for q in questions]
    written = authors.write_rollouts(env, asked, this.teacher, this.asking, copies)
    answers = {q.id: q.answers for q in questions}
    rollouts = [scored(r, answers[r.id], PROTOCOL) for r in map(from_state, written.states)]
    played = [q.id for q in questions if q.id in {r.id for r in rollouts}]
    if not played:
        raise ValueError(f"synthesize: the teacher failed in every rollout: {written.failed}")
    write_rollouts(this.folder / "rollouts.jsonl", rollouts)
    found = {
        "pool": len(this.task.train), "annotated": len(annotated.candidates), "not annotated": dict(annotated.failed),
        "sampled": len(questions), "quotas": dict(sampled.quotas), "shortfall": dict(sampled.shortfall),
        "rollouts wanted": len(questions) * copies, "rollouts": len(rollouts), "teacher failed": written.failed,
        "summaries": dict(this.summariser.counts), "questions without a rollout": len(questions) - len(played),
        "prompt": env.prompt_id, **_figures(rollouts), "played": played,
    }  # fmt: skip
    write_atomic(target, json.dumps(found, indent=1) + "\n")
    print(f"synthesize: {len(rollouts)} rollouts of {len(played)} questions; teacher failed: {written.failed}")


def _figures(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Share of right ones, mean searches, and how many ended in which way."""
    return {
        "right": float(np.mean([r.metrics["cover"] for r in rollouts])),
        "searches": float(np.mean([r.search_count for r in rollouts])),
        "ended": dict(sorted(Counter(r.reason for r in rollouts).items())),
    }


# --- curate ----------------------------------------------------------------------------------------------------------


def curated(this: Run, **changes: Any) -> tuple[list[Sample], dict[str, Any]]:
    """Samples of the rollouts and what was dropped why. changes: of the filters. Raises ValueError without samples."""
    rollouts = read_rollouts(this.needs("rollouts.jsonl", "synthesize"))
    made = curate(this.played, rollouts, curation_config(this.config, **changes))
    counts = {
        name: {"in": ledger.taken, "out": ledger.kept, "dropped": ledger.reasons}
        for name, ledger in (("rollouts", made.rollouts), ("questions", made.questions))
    }
    if not made.samples:
        raise ValueError(f"curate: no sample is left of {len(rollouts)} rollouts: {counts['rollouts']['dropped']}")
    return list(made.samples), counts


def curate_rollouts(this: Run) -> None:
    """``samples.jsonl``, and ``curation.json``: rollouts and questions in, out, and dropped by reason."""
    target = this.folder / "curation.json"
    if target.exists():
        return
    samples, counts = curated(this)
    write_samples(this.folder / "samples.jsonl", samples)
    write_atomic(target, json.dumps(counts, indent=1) + "\n")
    print(f"curate: {len(samples)} samples; rollouts dropped: {counts['rollouts']['dropped']}")


# --- sft -------------------------------------------------------------------------------------------------------------

Example = tuple[str, Segments]


def uncurated(rollouts: Sequence[Rollout], seed: int) -> list[Example]:
    """All rollouts that the policy ends, in random order: first one of each question, then another, and so on."""
    rng, turn = np.random.Generator(np.random.PCG64([seed, 53])), Counter()
    shuffled = [rollouts[i] for i in rng.permutation(len(rollouts))]
    placed = []
    for rollout in shuffled:
        turn[rollout.id] += 1
        placed.append((turn[rollout.id], rollout))
    placed.sort(key=lambda pair: pair[0])
    return [(r.prompt, r.segments) for _, r in placed if r.segments[-1][0] == "policy"]


def training_rows(this: Run, model: models.Model, name: str) -> tuple[dict[str, np.ndarray], int]:
    """Rows of one training run, "sft" or an ablation, and how many were too long. An ablation has as many rows as
    "sft", or fewer where a filter less leaves fewer samples."""
    encode = lambda part: encode_rows(  # noqa: E731
        part, model.tokenizer, model.config.eos_ids[0], this.config.rollout.max_total
    )
    samples = read_samples(this.needs("samples.jsonl", "curate"))
    rows, long = encode([(s.input, s.segments) for s in samples])
    if name == "sft":
        return rows, long
    if name == "uncurated":
        examples = uncurated(read_rollouts(this.needs("rollouts.jsonl", "synthesize")), this.seed)
    else:
        others, _ = curated(this, **{name.removeprefix("no_"): False})
        rng = np.random.Generator(np.random.PCG64([this.seed, 59]))
        examples = [(others[i].input, others[i].segments) for i in rng.permutation(len(others))]
    count = len(rows["tokens"])
    rows, long = encode(examples)
    return {key: values[:count] for key, values in rows.items()}, long


def fine_tune(this: Run, name: str) -> None:
    """Supervised steps into ``checkpoints/<name>``; ``<name>.json`` says on how many rows."""
    if (this.checkpoint(name) / "model").exists():
        return
    model = this.model("base")
    rows, long = training_rows(this, model, name)
    found = {
        "rows": len(rows["tokens"]), "too long": long, "tokens": int(rows["lengths"].sum()),
        "learned tokens": int(rows["mask"].sum()),
    }  # fmt: skip
    write_atomic(this.folder / f"{name}.json", json.dumps(found, indent=1) + "\n")
    print(f"{name}: {found}")
    this.supervise(name, model, rows, this.config.sft)


def sft_stage(this: Run) -> None:
    """The paper's fine-tuning."""
    fine_tune(this, "sft")


# --- dpo -------------------------------------------------------------------------------------------------------------


def preference_pairs(this: Run, model: models.Model) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
    """Pairs of a question's curated sample and a faulty rollout of the model's own (section 4.2): one that breaks the
    format or the path filter, or is wrong. Own rollouts are learned from as they were sampled, not encoded again.

    Raises ValueError where there is no pair.
    """
    samples = {s.id: s for s in read_samples(this.needs("samples.jsonl", "curate"))}
    questions = [q for q in this.played if q.id in samples]
    config, most = curation_config(this.config, search=False), this.config.rollout.max_total
    env = this.env(model.tokenizer, k=this.config.env.k)
    chosen, rejected, counts = [], [], Counter()
    made = this.sample(model, env, [search_task.asked(q) for q in questions], this.config.dpo.samples)
    answers = {q.id: q.answers for q in questions}
    paired: set[str] = set()
    for state, trajectory, row in made:
        id = state.example.id
        broken = faults(describe(scored(from_state(state), answers[id], PROTOCOL), config), config)
        better = encode_segments(samples[id].input, samples[id].segments, model.tokenizer, model.config.eos_ids[0])
        if not broken:
            counts["nothing wrong with it"] += 1
        elif id in paired:
            counts["another rollout was chosen"] += 1
        elif len(better[0]) > most:
            counts["the curated sample is too long"] += 1
        else:
            paired.add(id)
            counts[f"paired: {broken[0]}"] += 1
            length = int(trajectory.lengths[row])
            chosen.append(better)
            rejected.append((trajectory.ids[row][:length].tolist(), trajectory.sampled[row][:length].tolist()))
    if not chosen:
        raise ValueError(f"dpo: none of {len(made)} own rollouts is faulty ({dict(counts)}); set dpo.steps=0")
    found = {"questions": len(questions), "rollouts": len(made), "pairs": len(chosen), "became": dict(counts)}
    return pair_rows(stack_rows(chosen), stack_rows(rejected)), found


def dpo_stage(this: Run) -> None:
    """Preference steps from the fine-tuned model, which is also the reference; ``dpo.json`` counts the pairs."""
    d, target = this.config.dpo, this.checkpoint("dpo") / "model"
    if target.exists() or not d.steps:
        return
    model, settings = this.model("sft"), dpo_config(this.config)
    pairs, found = preference_pairs(this, model)
    write_atomic(this.folder / "dpo.json", json.dumps(found, indent=1) + "\n")
    print(f"dpo: {found}")
    pairs = add_reference(model.params, pairs, settings, model.config, min(8, d.batch_size), this.mesh)
    state = init_state(model.params, settings.optimizer, this.seed)
    with (
        MetricsWriter(this.folder, "dpo", d.steps) as writer,
        Checkpointer(this.checkpoint("dpo") / "steps", keep=2) as keeper,
    ):
        feed = batches(pairs, d.batch_size, this.seed)
        state = dpo(settings, model.config, state, feed, d.steps, writer, keeper, this.mesh)
    models.save(model.replace(params=state.params), target)


# --- rl --------------------------------------------------------------------------------------------------------------


def questions_to_explore(this: Run, model: models.Model) -> list[Question]:
    """Questions of the pool that the model gets right in some of its rollouts, neither too few nor too many (appendix
    C); ``rl.json`` keeps them, and how many questions were right how often. Raises ValueError for fewer than a step
    takes."""
    r, target = this.config.rl, this.folder / "rl.json"
    if not target.exists():
        pool = this.task.train
        pool = sample_questions(pool, r.pool, this.seed) if 0 < r.pool < len(pool) else pool
        env, answers = this.env(model.tokenizer, k=this.config.env.k), {q.id: q.answers for q in pool}
        right = dict.fromkeys(answers, 0)
        for state, _, _ in this.sample(model, env, [search_task.asked(q) for q in pool], r.samples):
            id = state.example.id
            right[id] += int(scored(from_state(state), answers[id], PROTOCOL).metrics["cover"])
        chosen = [id for id, count in right.items() if r.least_right <= count <= r.most_right]
        times = {str(count): number for count, number in sorted(Counter(right.values()).items())}
        found = {"pool": len(pool), "rollouts of each": r.samples, "questions by right rollouts": times}
        print(f"rl: {len(chosen)} questions; {found}")
        write_atomic(target, json.dumps({**found, "chosen": chosen}, indent=1) + "\n")
    found = json.loads(target.read_text(encoding="utf-8"))
    ids = set(found["chosen"])
    if len(ids) < r.prompts_per_step:
        raise ValueError(
            f"rl: {len(ids)} questions are right in {r.least_right} to {r.most_right} of {r.samples} rollouts, fewer "
            f"than rl.prompts_per_step={r.prompts_per_step}; questions by right rollouts: "
            f"{found['questions by right rollouts']}: raise rl.pool, set other bounds and remove {target}, or set "
            "rl.steps=0"
        )
    return [q for q in this.task.train if q.id in ids]


def rl_stage(this: Run) -> None:
    """REINFORCE++ from the fine-tuned model, with token F1 less a penalty of form for a reward."""
    if (this.checkpoint("rl") / "model").exists() or not this.config.rl.steps:
        return
    model = this.model("sft")
    questions = [search_task.asked(q) for q in questions_to_explore(this, model)]
    fit = functools.partial(token_f1, normalization=PROTOCOL.normalization, yes_no=PROTOCOL.yes_no)
    count = lambda text: len(model.tokenizer.encode(text))  # noqa: E731
    reward = SearchReward(fit, reward_config(this.config), count_tokens=count)
    env = this.env(model.tokenizer, k=this.config.env.k, on_error="drop")
    this.explore("rl", model, policy_config(this.config, this.seed), env, reward, questions)


# --- evaluate --------------------------------------------------------------------------------------------------------


def evaluate(this: Run) -> judging.SeedResult:
    """Play the test questions with every model; what is finished is read back."""
    for name in this.config.evaluate.ablations:
        fine_tune(this, name)
    after = [name for name in ("dpo", "rl") if this.config[name].steps]
    return judging.evaluate_seed(this, ("base", "sft", *this.config.evaluate.ablations, *after), PROTOCOL)


RECIPE = {
    "synthesize": synthesize, "curate": curate_rollouts, "sft": sft_stage, "dpo": dpo_stage, "rl": rl_stage,
    "evaluate": evaluate,
}  # fmt: skip


def run(config: Any, workdir: Path, stages: Sequence[str]) -> dict[str, Any] | None:
    """Run the stages for every seed; returns the result that is also in result.json."""
    check(config, stages)
    sizes = config.mesh.to_dict()
    mesh: jax.sharding.Mesh | None = make_mesh(**sizes) if set(sizes.values()) != {1} else None
    results = by_seed(RECIPE, stages, config.seeds, workdir, lambda seed, folder: Run(config, seed, folder, mesh))
    return judging.pool(config, results, workdir, PLAN) if results else None
