"""A recommender, a simulated user and prompts as the environment of reinforcement learning (``rl.envs.user``)."""

from collections.abc import Callable, Sequence

import numpy as np

from jaxrec.data.dialogues import Instance
from jaxrec.tools.conversation import Criticise, User
from jaxrec.tools.crs.prompts import QueryPrompts
from rl.envs.user import Lists, Talk, UserEnv


def talks(instances: Sequence[Instance]) -> list[Talk]:
    """Instances as the environment's examples, numbered from 0; labels are the hidden targets."""
    return [Talk(number, instance.dialogue, instance.labels) for number, instance in enumerate(instances)]


def query_env(
    prompts: QueryPrompts, lists: Lists, user: User, k: int, *, rounds: int = 3, seed: int = 0,
    stop_when: Callable[[np.ndarray], bool] | None = None,
) -> UserEnv:  # fmt: skip
    """The environment of a policy that writes queries, as :class:`jaxrec.tools.crs.query.QueryRecommender` plays it."""

    def score(examples: Sequence[Talk], items: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return user.score([example.dialogue for example in examples], items)

    def criticise(examples: Sequence[Talk], items: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[str]:
        return user.criticise(
            [
                Criticise(example.dialogue, tuple(shown), seed_, f"example {example.index}")
                for example, shown, seed_ in zip(examples, items, seeds, strict=True)
            ]
        )

    return UserEnv(
        lambda talk: prompts.prompt(talk.dialogue), lists, score, criticise, prompts.show, k=k, rounds=rounds,
        stop=prompts.stop, stop_when=stop_when, reserved=prompts.reserved, seed=seed,
    )  # fmt: skip
