"""Everything that changes weights: supervised tuning, policy optimisation, rollouts, environments, checkpoints.

Names are resolved on first use, so that importing the package costs nothing.
"""

import importlib

_EXPORTS = {
    "ADVANTAGES": ("advantages", "ADVANTAGES"),
    "Action": ("envs.base", "Action"),
    "Checkpointer": ("checkpoint", "Checkpointer"),
    "DPOConfig": ("dpo", "DPOConfig"),
    "DeepRecReward": ("rewards", "DeepRecReward"),
    "Environment": ("envs.base", "Environment"),
    "GRPOConfig": ("policy", "GRPOConfig"),
    "MetricsWriter": ("metrics", "MetricsWriter"),
    "OptimizerConfig": ("optimizer", "OptimizerConfig"),
    "RecommendEnv": ("envs.recommend", "RecommendEnv"),
    "RecommenderConfig": ("recommender", "RecommenderConfig"),
    "RewardConfig": ("rewards", "RewardConfig"),
    "RolloutConfig": ("rollout", "RolloutConfig"),
    "SFTConfig": ("finetune", "SFTConfig"),
    "SearchEnv": ("envs.search", "SearchEnv"),
    "SearchOptions": ("envs.search", "SearchOptions"),
    "SearchReward": ("search_rewards", "SearchReward"),
    "SearchRewardConfig": ("search_rewards", "SearchRewardConfig"),
    "Status": ("trajectory", "Status"),
    "Step": ("envs.base", "Step"),
    "TagStyle": ("envs.tags", "TagStyle"),
    "TrainState": ("optimizer", "TrainState"),
    "Trajectory": ("trajectory", "Trajectory"),
    "encode_rows": ("rows", "encode_rows"),
    "fit_recommender": ("recommender", "fit"),
    "grpo": ("trainer", "train"),
    "init_state": ("optimizer", "init_state"),
    "make_optimizer": ("optimizer", "make_optimizer"),
    "play": ("rollout", "rollout"),
    "policy_loss": ("losses", "policy_loss"),
    "sft": ("finetune", "sft"),
    "token_logprobs": ("logprobs", "token_logprobs"),
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        module, attribute = _EXPORTS[name]
        value = getattr(importlib.import_module(f"rl.{module}"), attribute)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'rl' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
