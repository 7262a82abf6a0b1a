"""A tiny model, a tiny task and a resumable prompt stream for the trainer's tests (and their subprocesses)."""

import jax
import jax.numpy as jnp
import numpy as np

from models import params as model_params
from models.config import Config
from models.transformer import forward
from rl.optimizer import OptimizerConfig
from rl.policy import GRPOConfig
from rl.trajectory import Status, Trajectory

CONFIG = Config(vocab_size=11, dim=8, layers=1, heads=2, kv_heads=1, head_dim=4, ffn_dim=8)
PROMPT, NEW, TARGET = 3, 4, 5


def params(seed: int = 0):
    return model_params.init(CONFIG, jax.random.key(seed))


def grpo_config(**changes) -> GRPOConfig:
    settings = {
        "optimizer": OptimizerConfig(lr=3e-2), "prompts_per_step": 2, "group_size": 4, "minibatches": 2,
        "micro_batches": 1, "logprob_chunk": 4,
    }  # fmt: skip
    return GRPOConfig(**(settings | changes))


class Prompts:
    """Endless prompts [P, 3] int32 made from a counter, with Grain's two methods."""

    def __init__(self, count: int = 2):
        self.count, self.position = count, 0

    def __next__(self):
        rng = np.random.default_rng((7, self.position))
        self.position += 1
        return rng.integers(1, CONFIG.vocab_size, (self.count, PROMPT)).astype(np.int32)

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


@jax.jit
def sample(weights, ids, key):
    """Draw NEW tokens after each prompt by full forward passes; also their log-probs."""

    def step(ids, t):
        logp = jax.nn.log_softmax(forward(weights, CONFIG, ids).logits[:, t - 1])
        token = jax.random.categorical(jax.random.fold_in(key, t), logp)
        return ids.at[:, t].set(token), jnp.take_along_axis(logp, token[:, None], 1)[:, 0]

    return jax.lax.scan(step, ids, jnp.arange(PROMPT, PROMPT + NEW))


def rollout(weights, examples, key, group_size: int = 4):
    """Reward: the share of sampled tokens that are TARGET."""
    prompts = np.repeat(examples, group_size, axis=0)
    B, T = len(prompts), PROMPT + NEW
    ids, logp = sample(weights, jnp.pad(prompts, ((0, 0), (0, NEW))), key)
    sampled = np.zeros((B, T), bool)
    sampled[:, PROMPT:] = True
    logprobs = np.zeros((B, T), np.float32)
    logprobs[:, PROMPT:] = np.asarray(logp).T
    trajectory = Trajectory(
        ids=np.asarray(ids), sampled=sampled, logprobs=logprobs, turns=sampled.astype(np.int32),
        lengths=np.full(B, T, np.int32), prompt_lengths=np.full(B, PROMPT, np.int32),
        groups=np.repeat(np.arange(len(examples), dtype=np.int32), group_size),
        status=np.full(B, Status.FINISHED, np.int32),
    )  # fmt: skip
    reward = (trajectory.ids[:, PROMPT:] == TARGET).mean(axis=1).astype(np.float32)
    return trajectory, {"target": reward}, {"extra": 1.0}
