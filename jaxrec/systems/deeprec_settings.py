"""What a DeepRec config says, checked before any stage runs, and as the settings of reward and trainer."""

from typing import Any

from jaxrec.config import UsageError, nearest
from jaxrec.evaluate.deeprec import CONTROLS
from rl.optimizer import OptimizerConfig
from rl.policy import GRPOConfig
from rl.recommender import FORMS
from rl.rewards import STAGES as REWARD_PARTS
from rl.rewards import RewardConfig

BASELINES = ("sasrec", "gru4rec", "trm_no_text")


def check(config: Any) -> None:
    """Raise UsageError or ValueError for settings that a stage would stumble over, hours into a run perhaps."""
    for field, known in (("evaluate.controls", CONTROLS), ("baselines.names", BASELINES)):
        group, name = field.split(".")
        for value in config[group][name]:
            if value not in known:
                raise UsageError(f"{field}: no {value!r}{nearest(value, known)}; known: {', '.join(known)}")
    if "one_call" in config.evaluate.controls and config.env.results < config.env.answers:
        raise UsageError(
            f"evaluate.controls: 'one_call' cannot fill a list of env.answers={config.env.answers} from one call of "
            f"env.results={config.env.results}; take 'one_query', where later calls are further pages of the first"
        )
    for name, same in (("no_point", 0.0), ("with_point", 1.0)):
        if name in config.evaluate.controls and config.reward.point == same:
            raise UsageError(f"evaluate.controls: {name!r} is the run itself when reward.point={same}; leave it out")
    if config.rl.replay_routing and not config.model.path:
        raise UsageError("rl.replay_routing is for models with experts: set --config.model.path to the folder of one")
    if not config.model.path and not config.cold_start.steps:
        raise UsageError("cold_start.steps=0 needs a pretrained model: set --config.model.path to its folder")
    for name in ("cold_rl", "rec_rl"):
        if config[name].steps < 1:
            raise UsageError(f"{name}.steps={config[name].steps} must be at least 1")
    if config.env.answers < 10:
        raise UsageError(f"env.answers={config.env.answers}: the figures go to rank 10, so a list needs 10 titles")
    r = config.rollout
    if not 0 < r.max_prompt < r.max_total or r.max_new < 1:
        raise UsageError(
            f"rollout.max_total={r.max_total} must leave room behind rollout.max_prompt={r.max_prompt}, and "
            f"rollout.max_new={r.max_new} be at least 1"
        )
    if config.baselines.form not in FORMS:
        raise UsageError(f"baselines.form={config.baselines.form!r} must be one of {', '.join(FORMS)}")
    if not 0 <= config.baselines.stride <= config.data.max_history:
        raise UsageError(
            f"baselines.stride={config.baselines.stride} must lie between 0 and data.max_history="
            f"{config.data.max_history}"
        )
    if not 0 <= config.trm.max_history <= config.data.max_history:
        raise UsageError(
            f"trm.max_history={config.trm.max_history} must lie between 0 (all of it) and data.max_history="
            f"{config.data.max_history}, the history that anyone is shown"
        )
    if config.evaluate.sampled_users < 0:
        raise UsageError(f"evaluate.sampled_users={config.evaluate.sampled_users} must be 0 (all) or more")
    if not 0 <= config.cold_start.open <= 1:
        raise UsageError(f"cold_start.open={config.cold_start.open} is a share of queries, from 0 to 1")
    policy_config(config, 0, "rec")
    reward_config(config)


def reward_config(config: Any) -> RewardConfig:
    return RewardConfig(
        answers=config.env.answers, gate_process=config.reward.gate_process, match=config.reward.match
    )  # fmt: skip


def policy_config(
    config: Any, seed: int, stage: str, lr_scale: float = 1.0, weights: tuple[tuple[str, float], ...] = ()
) -> GRPOConfig:
    """The update of a stage ("cold" or "rec"). Raises ValueError for sizes that do not fit together."""
    r, longest = config.rl, config.rollout.max_total
    optimizer = OptimizerConfig(lr=r.lr * lr_scale, warmup_steps=r.warmup, b2=r.b2)
    return GRPOConfig(
        optimizer=optimizer, prompts_per_step=r.prompts_per_step, group_size=r.group_size,
        minibatches=r.minibatches, micro_batches=r.micro_batches, advantage=r.advantage, adv_scale=r.adv_scale,
        clip_low=r.clip_low, clip_high=r.clip_high, kl_coef=r.kl_coef, max_total=longest, save_every=r.save_every,
        logprob_chunk=r.logprob_chunk, reward_weights=tuple((k, v) for k, v in weights if k in REWARD_PARTS[stage]),
        seed=seed, length_buckets=(longest,), log_entropy=False, dynamic_sampling=r.dynamic_sampling,
        tis_cap=r.tis_cap or None, replay_routing=r.replay_routing,
    )  # fmt: skip
