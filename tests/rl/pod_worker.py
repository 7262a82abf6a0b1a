"""One process of a pod, started by test_pods.py: supervised and reinforced steps on a mesh over all devices.

python pod_worker.py MODEL WORKDIR ADDRESS PROCESS COUNT [STEPS]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import numpy as np

from models.sharding import join

DEVICES = 8  # of all processes together
AXES = {"fsdp": 4, "tensor": 2}  # two processes hold two halves of the weights
SFT_STEPS, RL_STEPS, GROUP = 3, 2, 4


class Batches:
    """Endless supervised batches, made from a counter that can be stored."""

    def __init__(self, rows: int = 8, width: int = 12):
        self.rows, self.width, self.position = rows, width, 0

    def __next__(self):
        rng = np.random.default_rng((3, self.position))
        self.position += 1
        return {
            "tokens": rng.integers(2, 300, (self.rows, self.width)).astype(np.int32),
            "mask": rng.random((self.rows, self.width)) < 0.6,
        }

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


class Prompts(Batches):
    """Endless pairs of texts."""

    def __next__(self):
        self.position += 1
        return [f"say {self.position}", f"tell {self.position + 1}"]


class Echo:
    """Answers once, then ends the row."""

    stop = ("e",)

    def reset(self, examples, copies):
        return [0] * (len(examples) * copies), list(examples)

    def step(self, states, actions):
        from rl.envs.base import Step

        states = [state + 1 for state in states]
        return Step(states, [None if s == 2 else "and?" for s in states], np.zeros(len(states), np.int64))


def store_model(folder: Path) -> None:
    """A small model with the tokenizer of a stored one."""
    import models

    tokenizer = models.load_tokenizer(Path(__file__).resolve().parents[1] / "fixtures" / "models" / "qwen3")
    config = models.Config(
        vocab_size=300, dim=16, layers=1, heads=4, kv_heads=2, head_dim=8, ffn_dim=16, qk_norm=True, init_std=0.3
    )
    models.save(models.Model(config, models.init(config, jax.random.key(0)), tokenizer), folder)


def optimizer():
    from rl.optimizer import OptimizerConfig

    # A large eps keeps the step proportional to the gradient, so that rounding of tiny gradients stays rounding.
    return OptimizerConfig(lr=1e-2, eps=1e-3)


def train(folder: Path, workdir: Path, steps: int = RL_STEPS) -> None:
    """Load a stored model onto the mesh, tune it, reinforce it, write it to ``workdir/model``."""
    import models
    from models.sharding import make_mesh, use_mesh
    from rl import trainer
    from rl.checkpoint import Checkpointer
    from rl.finetune import SFTConfig, sft
    from rl.metrics import MetricsWriter
    from rl.optimizer import init_state
    from rl.policy import GRPOConfig
    from rl.rollout import RolloutConfig, rollout

    mesh = make_mesh(**AXES)
    model = models.load(folder, mesh)
    tokenizer = models.load_tokenizer(folder)
    settings = SFTConfig(optimizer(), micro_batches=2, logprob_chunk=8, save_every=2)
    with MetricsWriter(workdir, "sft", console=False) as writer, Checkpointer(workdir / "sft") as keeper:
        state = init_state(model.params, settings.optimizer)
        state = sft(settings, model.config, state, Batches(), SFT_STEPS, writer, keeper, mesh)

    settings = GRPOConfig(
        optimizer(), prompts_per_step=2, group_size=GROUP, minibatches=2, kl_coef=0.01, logprob_chunk=8
    )
    options = RolloutConfig(max_prompt=16, max_total=40, max_new=6, max_turns=2)

    def play(params, examples, key):
        with use_mesh(mesh):
            trajectory, _ = rollout(
                params, model.config, tokenizer, Echo(), examples, key, options, group_size=GROUP, fuse=False
            )
        even = ((trajectory.ids % 2 == 0) & trajectory.sampled).sum(axis=1) / trajectory.sampled.sum(axis=1)
        return trajectory, {"even": even.astype(np.float32)}, {}

    reference = models.load(folder, mesh).params
    with MetricsWriter(workdir, "rl", console=False) as writer, Checkpointer(workdir / "rl") as keeper:
        state = trainer.train(
            settings, model.config, init_state(state.params, settings.optimizer, seed=1), Prompts(), play,
            steps=steps, writer=writer, checkpointer=keeper, mesh=mesh, ref_params=reference,
        )  # fmt: skip
    models.save(model.replace(params=state.params), workdir / "model")


def keep_local(workdir: Path) -> None:
    """Save and restore what every process holds by itself: no mesh, NumPy arrays too."""
    import jax.numpy as jnp

    from rl.checkpoint import Checkpointer

    state = {"w": jnp.arange(6.0).reshape(2, 3), "epoch": np.int32(4), "key": jax.random.key(3)}
    with Checkpointer(workdir / "local") as keeper:
        keeper.save(1, state)
        blank = {"w": jnp.zeros((2, 3)), "epoch": np.int32(0), "key": jax.random.key(0)}
        restored = keeper.restore(blank).state
    assert restored["w"].sharding == state["w"].sharding
    np.testing.assert_array_equal(restored["w"], state["w"])
    np.testing.assert_array_equal(jax.random.key_data(restored["key"]), jax.random.key_data(state["key"]))
    assert int(restored["epoch"]) == 4


def main(folder: Path, workdir: Path, address: str, process: int, count: int, *steps: int) -> None:
    join(address, process, count)
    assert (jax.process_count(), jax.device_count()) == (count, DEVICES)
    keep_local(workdir)
    train(folder, workdir, *steps)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
