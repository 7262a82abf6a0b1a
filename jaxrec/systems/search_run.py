"""What the search systems' recipes share: one seed of one config with its task, models, environment and sampling."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import models
from jaxrec.chat import has_template
from jaxrec.config import UsageError
from jaxrec.data import qa
from jaxrec.evaluate.answer_judge import teacher_judge
from jaxrec.evaluate.questions import Judge
from jaxrec.systems import world_lm
from jaxrec.systems.model_run import ModelRun
from jaxrec.tools import search_task
from jaxrec.tools.search_task import SearchTask
from jaxrec.tools.teacher import StoredTeacher
from jaxrec.world.questions import SPLITS
from models.sharding import use_mesh
from rl.envs.search import SearchEnv, SearchOptions, State, search_counts
from rl.envs.tags import check_round_trip, find_style
from rl.optimizer import OptimizerConfig
from rl.policy import GRPOConfig
from rl.rollout import RolloutConfig, rollout
from rl.search_rewards import SearchReward
from rl.trainer import Auxiliary
from rl.trajectory import Trajectory


class SearchRun(ModelRun):
    """One seed of one config of a search system."""

    def load(self, path: str | Path) -> models.Model:
        """As :meth:`ModelRun.load`. Raises ValueError for a tokenizer that does not give the style's tags back."""
        model = super().load(path)
        check_round_trip(find_style(self.config.env.style), model.tokenizer)
        if (most := self.config.rollout.max_total) > model.config.max_len:
            raise UsageError(f"rollout.max_total={most} is more than the context of {path}, {model.config.max_len}")
        return model

    @functools.cached_property
    def task(self) -> SearchTask:
        c, folder = self.config, self.folder / "index"
        if c.data.source == "files":
            task = search_task.file_task(c.data, self.seed, folder)
            most = max(c.env.k, c.env.test_k)
            if most > (size := getattr(task.backend, "size", most)):
                raise UsageError(f"env.k and env.test_k ask for {most} passages; {c.data.corpus} holds {size}")
            return task
        texts = world_lm.make_texts(world_lm.base_config(c.model.base, self.seed))
        facts = [fact for known in texts.subjects.values() for fact in known]
        try:
            counts = {name: c.data.get(f"{name}_questions", 0) for name in SPLITS}
            return search_task.world_task(facts, self.seed, counts, c.data.hops, folder)
        except ValueError as error:
            raise UsageError(f"data: {error}") from error

    @functools.cached_property
    def judge(self) -> Judge | None:
        """Who judges answers beside the rules, None for nobody; replies are kept in ``teacher/judge.jsonl``."""
        if not self.config.evaluate.judge:
            return None
        path = self.folder / "teacher" / "judge.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        asked = search_task.judge_endpoint(self.config.evaluate, self.config.teacher)
        return teacher_judge(StoredTeacher(asked, path), self.config.evaluate.judge_max_tokens)

    def options(self, k: int, max_searches: int, on_error: str) -> SearchOptions:
        """The environment's rules."""
        return SearchOptions(k=k, max_searches=max_searches, on_error=on_error, short=self.config.env.short)

    def env(self, tokenizer: Any, *, k: int, max_searches: int | None = None, on_error: str = "continue") -> SearchEnv:
        """The environment. tokenizer: renders the prompt, where it has a template and the prompt is no bare question;
        None does without."""
        e = self.config.env
        most = e.max_searches if max_searches is None else max_searches
        chat = tokenizer.chat if not e.short and tokenizer is not None and has_template(tokenizer) else None
        return self.task.env(find_style(e.style), self.options(k, most, on_error), chat)

    def check_prompts(self, tokenizer: Any, env: SearchEnv, questions: Sequence[qa.Question]) -> None:
        """Raise UsageError for a question whose prompt is longer than ``rollout.max_prompt``, before hours of training
        end at it."""
        most = self.config.rollout.max_prompt
        for question in questions:
            if (length := len(tokenizer.encode(env.prompt(question.text)))) > most:
                raise UsageError(
                    f"the prompt of question {question.id!r} has {length} tokens, more than rollout.max_prompt={most}: "
                    "raise it, or leave the question out of its file"
                )

    def rollout_config(self, temperature: float = 1.0) -> RolloutConfig:
        r = self.config.rollout
        top_p = r.top_p if temperature else 1.0
        turns = self.options(1, self.config.env.max_searches, "continue").turns
        return RolloutConfig(r.max_prompt, r.max_total, r.max_new, turns, temperature, top_p)

    def sample(
        self, model: models.Model, env: SearchEnv, questions: Sequence[Any], count: int, temperature: float = 1.0
    ) -> list[tuple[State, Trajectory, int]]:
        """``count`` sampled conversations of a model for each question: the final state, and the trajectory with the
        number of its row there."""
        out: list[tuple[State, Trajectory, int]] = []
        size = max(1, self.config.evaluate.batch_size // count)
        for low in range(0, len(questions), size):
            part = list(questions[low : low + size])
            filled = part + part[-1:] * (size - len(part))
            key = jax.random.fold_in(jax.random.key(self.seed), low)
            with use_mesh(self.mesh):
                trajectory, ended = rollout(
                    model.params, model.config, model.tokenizer, env, filled, key, self.rollout_config(temperature),
                    group_size=count, fuse=self.mesh is None,
                )  # fmt: skip
            out += [(state, trajectory, row) for row, state in enumerate(ended[: len(part) * count])]
        return out

    def explore(
        self, name: str, model: models.Model, settings: GRPOConfig, env: SearchEnv, reward: SearchReward,
        questions: Sequence[Any], auxiliary: Auxiliary | None = None,
    ) -> None:  # fmt: skip
        """Policy optimisation in the environment into ``checkpoints/<name>``, ``rl.steps`` steps of it.

        questions: as the environment takes them. auxiliary: see :func:`rl.trainer.train`; it gets the final states. The
        model is the reference of a KL penalty; its buffers are given away. "right" counts answers that fit in full."""

        def counts(states: Sequence[State], parts: Mapping[str, np.ndarray]) -> dict[str, float]:
            right, valid = parts["answer"] >= 1.0, parts["format"] == 0
            return {**search_counts(states), "right": float(right.mean()), "valid_format": float(valid.mean())}

        shown = ("reward", "right", "searches", "valid_format")
        self.reinforce(
            name, model, settings, env, questions, self.rollout_config(), reward, counts, self.config.rl.steps, shown,
            auxiliary,
        )  # fmt: skip


def policy_config(config: Any, seed: int, **changes: Any) -> GRPOConfig:
    """The update of a stage ``rl`` by the config's ``rl`` and ``rollout``. changes: more of it."""
    r, longest = config.rl, config.rollout.max_total
    optimizer = OptimizerConfig(lr=r.lr, warmup_steps=r.warmup, b2=r.b2)
    return GRPOConfig(
        optimizer=optimizer, prompts_per_step=r.prompts_per_step, group_size=r.group_size,
        minibatches=r.minibatches, micro_batches=r.micro_batches, advantage=r.advantage, aggregation=r.aggregation,
        clip_low=r.clip, clip_high=r.clip, kl_reward=r.kl, max_total=longest, length_buckets=(longest // 2, longest),
        save_every=r.save_every, logprob_chunk=r.logprob_chunk, seed=seed, log_entropy=False, max_env_errors=0.02,
        **changes,
    )  # fmt: skip


def check_source(config: Any) -> None:
    """Raise UsageError where questions and model do not go together. No device is used."""
    source = config.data.source
    if source not in search_task.SOURCES:
        raise UsageError(f"data.source={source!r} must be one of {', '.join(search_task.SOURCES)}")
    if (source == "files") != bool(config.model.path):
        raise UsageError("model.path goes with data.source=files: the world's questions need the world's own model")


def check_judge(config: Any) -> None:
    """Raise UsageError where answers are to be judged and the judge has no address, no key or no token to say so."""
    if (most := config.evaluate.judge_max_tokens) < 1:
        raise UsageError(f"evaluate.judge_max_tokens={most} must be at least 1")
    if config.evaluate.judge:
        search_task.judge_endpoint(config.evaluate, config.teacher)


def check_lengths(config: Any) -> None:
    """Raise UsageError where a prompt leaves no room for a response."""
    r = config.rollout
    if not 0 < r.max_prompt < r.max_total or r.max_new < 1:
        raise UsageError(f"rollout.max_total={r.max_total} must leave room behind rollout.max_prompt={r.max_prompt}")
