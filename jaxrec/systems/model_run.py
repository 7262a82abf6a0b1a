"""What recipes that train a language model share: one seed of one config with its folder, its models and its mesh."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import models
from jaxrec.config import UsageError
from jaxrec.data.pipeline import batches
from jaxrec.systems import world_lm
from models.sharding import use_mesh
from rl.checkpoint import Checkpointer
from rl.envs.base import Environment
from rl.finetune import SFTConfig, sft
from rl.metrics import MetricsWriter
from rl.optimizer import OptimizerConfig, init_state
from rl.policy import GRPOConfig
from rl.rollout import RolloutConfig, rollout
from rl.trainer import Auxiliary, train


@dataclasses.dataclass(frozen=True, eq=False)
class ModelRun:
    """The config has ``model`` with path, base, dtype and remat."""

    config: Any
    seed: int
    folder: Path
    mesh: jax.sharding.Mesh | None

    def checkpoint(self, name: str) -> Path:
        return self.folder / "checkpoints" / name

    def model(self, name: str) -> models.Model:
        """The model a stage left; "base" is the one that training starts from. Raises UsageError when that stage has
        not run."""
        return self.load(self.base if name == "base" else self.finished(name))

    def finished(self, name: str) -> Path:
        """The folder of the model that a stage left. Raises UsageError when it has not run."""
        path = self.checkpoint(name) / "model"
        if not path.exists():
            raise UsageError(f"stage {name!r} has not finished in {self.folder}: run --stages={name} first")
        return path

    def load(self, path: str | Path) -> models.Model:
        """A model as it is trained: weights in float32, run in ``model.dtype``."""
        m, model = self.config.model, models.load(path, mesh=self.mesh, dtype="float32")
        if model.tokenizer is None:
            raise UsageError(f"{path} holds no tokenizer files, which prompts are made with")
        return model.replace(config=model.config.replace(dtype=m.dtype, remat=m.remat))

    @functools.cached_property
    def base(self) -> Path:
        m = self.config.model
        return Path(m.path or world_lm.cached(m.base, self.seed))

    def supervise(self, name: str, model: models.Model, rows: Mapping[str, np.ndarray], settings: Any) -> None:
        """Supervised steps on rows into ``checkpoints/<name>``. settings: steps, batch_size, lr; warmup (else 3 % of
        the steps), micro_batches (else 1). Raises UsageError for fewer rows than a batch."""
        s, count = settings, len(rows["tokens"])
        if count < s.batch_size:
            raise UsageError(f"{name}: {count} samples make no batch of {s.batch_size}: lower batch_size, or have more")
        warmup = s.get("warmup", max(1, round(0.03 * s.steps)))
        optimizer = OptimizerConfig(lr=s.lr, schedule="cosine", warmup_steps=warmup, horizon_steps=s.steps + 1)
        state = init_state(model.params, optimizer, self.seed)
        config = SFTConfig(optimizer, save_every=max(s.steps // 4, 1), micro_batches=s.get("micro_batches", 1))
        with (
            MetricsWriter(self.folder, name, s.steps) as writer,
            Checkpointer(self.checkpoint(name) / "steps", keep=2) as keeper,
        ):
            feed = batches(rows, s.batch_size, self.seed)
            state = sft(config, model.config, state, feed, s.steps, writer, keeper, self.mesh)
        models.save(model.replace(params=state.params), self.checkpoint(name) / "model")

    def reinforce(
        self, name: str, model: models.Model, settings: GRPOConfig, env: Environment, examples: Sequence[Any],
        options: RolloutConfig, reward: Callable[[Sequence[Any], np.ndarray], Mapping[str, np.ndarray]],
        counts: Callable[[Sequence[Any], Mapping[str, np.ndarray]], Mapping[str, float]], steps: int,
        shown: Sequence[str], auxiliary: Auxiliary | None = None,
    ) -> None:  # fmt: skip
        """Policy optimisation in an environment into ``checkpoints/<name>``.

        examples: as the environment takes them. reward: final states and their groups -> its parts. counts: states and
        these -> metrics. shown: metrics of the terminal's line. auxiliary: see :func:`rl.trainer.train`; it gets the
        final states. The model is the reference of a KL penalty; its buffers are given away."""

        def play(params: Any, batch: dict[str, np.ndarray], key: jax.Array):
            with use_mesh(self.mesh):
                trajectory, states = rollout(
                    params, model.config, model.tokenizer, env, [examples[i] for i in batch["index"]], key, options,
                    group_size=settings.group_size, fuse=self.mesh is None,
                )  # fmt: skip
            begin = time.perf_counter()
            parts = reward(states, trajectory.groups)
            info = {**counts(states, parts), "carry": states, "seconds": {"reward": time.perf_counter() - begin}}
            return trajectory, parts, info

        penalised = settings.kl_reward or settings.kl_coef
        reference = jax.tree.map(jnp.copy, model.params) if penalised else None  # the state's buffers are given away
        feed = batches({"index": np.arange(len(examples))}, settings.prompts_per_step, self.seed)
        state = init_state(model.params, settings.optimizer, self.seed)
        with (
            MetricsWriter(self.folder, name, steps, show=shown) as writer,
            Checkpointer(self.checkpoint(name) / "steps", keep=2) as keeper,
        ):
            state = train(
                settings, model.config, state, feed, play, steps=steps, writer=writer, checkpointer=keeper,
                mesh=self.mesh, ref_params=reference, auxiliary=auxiliary,
            )  # fmt: skip
        models.save(model.replace(params=state.params), self.checkpoint(name) / "model")
