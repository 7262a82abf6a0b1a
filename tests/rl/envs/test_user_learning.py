"""A policy learns from a simulated user what only the critique tells (acceptance property 7 of GRSU, as a policy)."""

import jax
import numpy as np
import pytest

import models
from models import Config
from rl.envs.user import Talk, UserEnv
from rl.optimizer import OptimizerConfig, init_state
from rl.policy import GRPOConfig
from rl.rollout import RolloutConfig, rollout
from rl.trainer import train
from rl.user_rewards import UserReward, UserRewardConfig

WORDS = ("", "<eos>", "\n", "talk:", "want", "?", "0", "1", "2", "3")
CONFIG = Config(
    vocab_size=len(WORDS), dim=32, layers=1, heads=2, kv_heads=2, head_dim=16, ffn_dim=32, eos_ids=(1,), max_len=64
)


class Words:
    """The longest known text first."""

    vocab_size, eos_ids = len(WORDS), (1,)

    def encode(self, text):
        ids = []
        while text:
            known = max((w for w in WORDS[2:] if text.startswith(w)), key=len)
            ids.append(WORDS.index(known))
            text = text[len(known) :]
        return ids

    def decode(self, ids):
        return "".join(WORDS[i] for i in ids)

    def token_bytes(self):
        return tuple(word.encode() for word in WORDS)


class Prompts:
    def __next__(self):
        return [Talk(wish, wish) for wish in range(4)]


def env(told):
    """Four users who begin alike and want one item each; the critique says which (told) or does not."""
    return UserEnv(
        prompt=lambda talk: "talk:",
        lists=lambda requests: [(int(r.text),) if r.text in ("0", "1", "2", "3") else None for r in requests],
        score=lambda talks, lists: [
            np.array([float(items[0] == talk.dialogue)]) for talk, items in zip(talks, lists, strict=True)
        ],
        criticise=lambda talks, lists, seeds: [f"want{talk.dialogue if told else '?'}" for talk in talks],
        show=lambda items, critique: critique,
        k=1, rounds=2,
    )  # fmt: skip


@pytest.mark.slow
def test_a_critique_is_learned_from():
    reward, options = UserReward(UserRewardConfig(hit=0, form=0.5)), RolloutConfig(4, 16, max_new=2, max_turns=2)
    config = GRPOConfig(
        optimizer=OptimizerConfig(lr=4e-3), prompts_per_step=4, group_size=32, minibatches=1, logprob_chunk=16
    )

    def learned(told):
        made, last = env(told), []

        def play(params, examples, key):
            trajectory, states = rollout(
                params, CONFIG, Words(), made, examples, key, options, group_size=32, fuse=False
            )
            return trajectory, reward(states), {}

        def keep(step, state, trajectory, rewards, scalars):
            last.append(rewards["score"].mean())

        state = init_state(models.init(CONFIG, jax.random.key(0)), config.optimizer)
        train(config, CONFIG, state, Prompts(), play, steps=120, on_step=keep)
        return np.mean(last[-10:])

    assert learned(told=True) > 0.9
    assert learned(told=False) < 0.4  # chance is a quarter
