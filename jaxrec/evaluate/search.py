"""Judge models that search: test questions, closed-book probes, what was left out of training, paired intervals.

Greedy play; every question gives one row, whatever became of it. The closed-book probe makes a model recall: its answer
begins inside the tag of known facts, and it may not search.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrec.config import write_atomic
from jaxrec.data.qa import Question
from jaxrec.evaluate import questions as judged
from jaxrec.evaluate.answers import Protocol, cover_em
from jaxrec.evaluate.figures import lines
from jaxrec.evaluate.ranking import paired_interval
from jaxrec.progress import progress
from jaxrec.tools.rollouts import Rollout, from_state
from jaxrec.tools.search_task import asked
from jaxrec.world.encyclopaedia import Fact
from jaxrec.world.questions import chain_text, split_of
from rl.envs.search import Question as Asked
from rl.envs.search import SearchEnv, State
from rl.envs.tags import find_style

PROBES = ("looked up in training", "never asked for", "known from pretraining")


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """How a system is judged. names: what is printed for each model. compared: (metric, model, rival, sign that the
    criterion wants of the difference, 0 without one)."""

    protocol: Protocol
    names: Mapping[str, str]
    compared: Sequence[tuple[str, str, str, int]]


@dataclasses.dataclass(frozen=True, eq=False)
class SeedResult:
    """rows: model -> rows of the test questions. probes: model -> kind of fact -> float64 [n], 1 where it was told."""

    rows: dict[str, list[Mapping[str, Any]]]
    probes: dict[str, dict[str, np.ndarray]]


def write_selection(
    folder: Path, states: Sequence[State], kept: Sequence[State], dropped: Mapping[str, int], failed: Mapping[str, int]
) -> None:
    """``cold_start.json``: how many rollouts there were, how many are learned from, and why the others are not.

    Raises RuntimeError when these numbers do not add up.
    """
    if len(states) != len(kept) + sum(dropped.values()):
        raise RuntimeError(f"{len(states)} rollouts, but {len(kept)} kept and {dict(dropped)} dropped")
    searched = float(np.mean([s.searches > 0 for s in kept]))
    found = {
        "rollouts": len(states), "kept": len(kept), "dropped": dict(dropped), "teacher failed": dict(failed),
        "share of kept ones that search": searched,
    }  # fmt: skip
    write_atomic(folder / "cold_start.json", json.dumps(found, indent=1) + "\n")


def note_rewrites(folder: Path, name: str, step: int, counts: Mapping[str, int]) -> None:
    """A line of ``rewrites.jsonl``: what became of a step's rollouts on their way into the memorisation loss."""
    if jax.process_index() == 0:
        with open(folder / "rewrites.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": name, "step": step, **counts}) + "\n")


class _Recalling:
    """An environment whose prompts end inside the tag of known facts."""

    def __init__(self, env: SearchEnv):
        self._env, self.stop = env, env.stop

    def reset(self, examples: Sequence[Any], copies: int = 1) -> tuple[list[State], list[str]]:
        states, prompts = self._env.reset(examples, copies)
        return states, [f"{prompt} {self._env.style.internal_open}" for prompt in prompts]

    def step(self, states: Sequence[State], actions: Sequence[Any]) -> Any:
        return self._env.step(states, actions)


def _play(this: Any, model: Any, env: Any, questions: Sequence[Any]) -> list[State]:
    """Final states of greedy play."""
    return [state for state, _, _ in this.sample(model, env, questions, 1, temperature=0.0)]


def probe_facts(this: Any) -> dict[str, list[Fact]]:
    """Facts for the closed-book probes, by kind: those that reinforcement learning's questions begin with and the base
    model's text does not state, others that it does not state about subjects of test questions, and those it does."""
    task, rng = this.task, np.random.Generator(np.random.PCG64([this.seed, 47]))
    first = {task.chains[q.id].facts[0] for q in task.train}
    pools = (
        [f for f in task.facts if f in first and not f.internal],
        [f for f in task.facts if split_of([f]) == "test" and not f.internal],
        [f for f in task.facts if split_of([f]) == "test" and f.internal],
    )
    most = this.config.evaluate.probes
    return {name: [pool[i] for i in rng.permutation(len(pool))[:most]] for name, pool in zip(PROBES, pools)}


def closed_book(this: Any, model: Any, facts: Sequence[Fact]) -> np.ndarray:
    """float64 [n]: whether the model tells a fact's object from memory when asked for it."""
    env = _Recalling(this.env(model.tokenizer, k=1, max_searches=0))
    questions = [Asked(str(i), chain_text([fact]), (fact.object,)) for i, fact in enumerate(facts)]
    states = _play(this, model, env, questions)
    close = env._env.style.internal_close
    told = [state.policy_text.partition(close)[0] for state in states]
    return np.array([cover_em(text, fact.object, "run", "r1_searcher") for text, fact in zip(told, facts)])


def _up_to(step: Callable[..., None]) -> Callable[[int], None]:
    """A function to call with the number of pieces done so far, made of one that takes the number of new ones."""
    done = 0

    def onward(count: int) -> None:
        nonlocal done
        step(count - done)
        done = count

    return onward


def evaluate_seed(this: Any, names: Sequence[str], protocol: Protocol) -> SeedResult:
    """Rows of every model, kept in ``questions/<name>.jsonl``, and its probes (of the embedded world, where the style
    has a tag for recall)."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    probes: dict[str, dict[str, np.ndarray]] = {}
    (this.folder / "questions").mkdir(parents=True, exist_ok=True)
    recalls = bool(find_style(this.config.env.style).internal_open)
    facts = probe_facts(this) if this.task.chains and recalls else {}
    for name in names:
        model = this.model(name)
        env = this.env(model.tokenizer, k=this.config.env.test_k)

        def play(batch: Sequence[Question], model=model, env=env) -> list[Rollout]:
            return [from_state(state) for state in _play(this, model, env, [asked(q) for q in batch])]

        size = this.config.evaluate.batch_size
        path = this.folder / "questions" / f"{name}.jsonl"
        with progress(len(this.task.test), f"evaluate: {name}") as step:
            rows[name] = judged.evaluate_questions(
                this.task.test, play, path, protocol, judge=this.judge, batch_size=size, progress=_up_to(step)
            )
        if this.judge is not None:
            print(f"evaluate: {name}: judge: {judged.judge_score(rows[name])}")
        probes[name] = {kind: closed_book(this, model, part) for kind, part in facts.items() if part}
    return SeedResult(rows, probes)


def pool(config: Any, results: Sequence[SeedResult], workdir: Path, plan: Plan) -> dict[str, Any]:
    """Means over questions of all seeds and paired intervals; written to result.json, with figures.json beside it."""
    names, protocol = list(results[0].rows), plan.protocol
    result = {
        "system": config.system, "variant": config.variant, "seed": list(config.seeds),
        "protocol": {
            "part": "test", "samples": len(results[0].rows[names[0]]), "answers": "greedy, last box",
            "normalization": protocol.normalization, "cover": protocol.cover, "passages": config.env.test_k,
            "max_searches": config.env.max_searches, "source": config.data.source,
            **_judged_by(config),
        },
        "rows": [_means(results, name, plan, bool(config.evaluate.judge)) for name in names],
        "comparisons": [c for rule in plan.compared if (c := _compared(results, plan, *rule)) is not None],
        "by_seed": [{n: judged.summarize(r.rows[n], protocol) for n in names} for r in results],
    }  # fmt: skip
    write_atomic(workdir / "result.json", json.dumps(result, indent=1) + "\n")
    write_atomic(workdir / "figures.json", json.dumps(_figures(results, names, plan)) + "\n")
    return result


def _judged_by(config: Any) -> dict[str, str]:
    """The judge as the protocol names it; empty without one."""
    if not config.evaluate.judge:
        return {}
    return {"judge": f"{config.evaluate.judge}, lasj is the share of True among its replies, invalid ones included"}


def _means(results: Sequence[SeedResult], name: str, plan: Plan, judged_too: bool) -> dict[str, Any]:
    """A model's figures: metrics, what a judge says of its answers (lasj, with the numbers of replies that are neither
    True nor False and of questions without one), searches a question (all that were made, and those of them that the
    tool failed to answer), how often a right answer stands in what it wrote, found and read, all of them by kind of
    question, and its probes."""
    every = [row for r in results for row in r.rows[name]]
    entry = {"name": plan.names[name], **{k: float(np.mean([row[k] for row in every])) for k in judged.METRICS}}
    if judged_too:
        score = judged.judge_score(every)
        entry |= {key: score[key] for key in ("lasj", "lasj_invalid", "lasj_missing")}
    for key, field in (("searches", "searches"), ("searches that failed", "failed_searches")):
        entry[key] = float(np.mean([row[field] for row in every]))
    for stage in judged.STAGES:
        entry[f"answer in {stage}"] = float(np.mean([row["contained"][stage] for row in every]))
    for kind in sorted({row["kind"] for row in every} - {""}):
        of = [row for row in every if row["kind"] == kind]
        entry |= {f"cover_{kind}": float(np.mean([row["cover"] for row in of]))}
        entry |= {f"searches_{kind}": float(np.mean([row["searches"] for row in of]))}
    for kind in results[0].probes[name]:
        entry[f"closed book, {kind}"] = float(np.mean(np.concatenate([r.probes[name][kind] for r in results])))
    return entry


def _values(result: SeedResult, name: str, metric: str) -> np.ndarray | None:
    """A metric of the test questions' rows, or of a probe; None where there is no such thing."""
    if metric.startswith("closed book, "):
        return result.probes.get(name, {}).get(metric.removeprefix("closed book, "))
    return np.array([float(row[metric]) for row in result.rows[name]]) if name in result.rows else None


def _compared(
    results: Sequence[SeedResult], plan: Plan, metric: str, one: str, other: str, sign: int
) -> dict[str, Any] | None:
    ours, theirs = ([_values(r, name, metric) for r in results] for name in (one, other))
    if any(part is None for part in (*ours, *theirs)):
        return None
    interval = paired_interval(np.concatenate(ours), np.concatenate(theirs))
    return _entry(f"{plan.names[one]} - {plan.names[other]}", metric, interval, sign)


def _entry(name: str, metric: str, interval: tuple[float, float, float], sign: int) -> dict[str, Any]:
    difference, low, high = interval
    entry = {"name": name, "metric": metric, "difference": difference, "low": low, "high": high}
    if sign > 0:
        entry |= {"criterion": "lower end of the paired 95 % interval over 0", "met": bool(low > 0)}
    if sign < 0:
        entry |= {"criterion": "upper end of the paired 95 % interval under 0", "met": bool(high < 0)}
    return entry


def _figures(results: Sequence[SeedResult], names: Sequence[str], plan: Plan) -> list[dict[str, Any]]:
    """Right answers and searches by what the base model's text says of a question's facts."""
    kinds = ("known", "mixed", "unknown")
    out = []
    for metric, title in (("cover", "Right answers"), ("searches", "Searches per question")):
        series = {}
        for name in names:
            every = [row for r in results for row in r.rows[name]]
            of = [[row[metric] for row in every if row["kind"] == kind] for kind in kinds]
            if all(of):
                series[plan.names[name]] = [float(np.mean(part)) for part in of]
        if series:
            x = "facts of the question in the base model's text: all, some, none"
            out.append(lines(title, series, x))
    return out
