"""Advantages: what each sampled token is worth, given one scalar reward per trajectory.

All estimators share one signature, ``(rewards [B], groups [B], mask [B, T], *, valid, num_groups) -> [B, T]`` float32,
are pure, and run under ``jit``. Groups are explicit ids 0..num_groups-1, so rows may stand in any order. Rows that are
not ``valid`` (the environment broke, not the policy) take no part in any statistic and get advantage 0. Tokens that the
mask leaves out get advantage 0.

Group checks need concrete ids, so they run on the host: :func:`check_groups`, or :func:`compute`, which calls it first.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

EPS = 1e-4  # added to a group's standard deviation, as in TRL
VAR_EPS = 1e-8  # added to the batch variance, as in OpenRLHF


def check_groups(groups: np.ndarray, group_size: int, *, baseline: bool = True) -> np.ndarray:
    """Validate group ids and renumber them 0..n-1 in order of first appearance.

    groups: int [B]. Returns int32 [B]. Raises ValueError when a group-relative estimator (``baseline``) is asked for
    with groups of one, or when a group does not have exactly ``group_size`` rows.
    """
    groups = np.asarray(groups)
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, not {group_size}")
    if baseline and group_size == 1:
        raise ValueError(
            "group_size is 1, and the advantage relative to a group of one is 0 everywhere; "
            "use group_size >= 2, or advantage='reinforce_pp', which has no group baseline"
        )
    ids, first, inverse, counts = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    wrong = np.flatnonzero(counts != group_size)
    if wrong.size:
        shown = ", ".join(f"{ids[i]} has {counts[i]} rows" for i in wrong[:5])
        raise ValueError(
            f"every group must have group_size={group_size} rows, but group {shown} "
            f"({wrong.size} of {ids.size} groups are wrong in a batch of {groups.size})"
        )
    order = np.empty(ids.size, np.int32)
    order[np.argsort(first)] = np.arange(ids.size, dtype=np.int32)
    return order[inverse.reshape(-1)]


def _prepare(rewards, groups, mask, valid, num_groups):
    rewards, mask = jnp.asarray(rewards, jnp.float32), jnp.asarray(mask, jnp.float32)
    if rewards.ndim != 1 or mask.ndim != 2 or rewards.shape != groups.shape or rewards.shape[0] != mask.shape[0]:
        shapes = f"{rewards.shape}, {groups.shape}, {mask.shape}"
        raise ValueError(f"want rewards [B], groups [B], mask [B, T]; got {shapes}")
    valid = jnp.ones_like(rewards) if valid is None else jnp.asarray(valid, jnp.float32)
    # A reward of an excluded row may be NaN; 0 * NaN would leak it into the group's mean.
    rewards = jnp.where(valid > 0, rewards, 0.0)
    return rewards, jnp.asarray(groups, jnp.int32), mask * valid[:, None], valid, num_groups or rewards.shape[0]


def _group_sum(x, groups, num_groups):
    return jax.ops.segment_sum(x, groups, num_groups)[groups]


def _centred(rewards, groups, valid, num_groups):
    """Reward minus the mean over the valid rows of its group, and that number of rows; both [B]."""
    count = _group_sum(valid, groups, num_groups)
    mean = _group_sum(rewards * valid, groups, num_groups) / jnp.maximum(count, 1.0)
    return (rewards - mean) * valid, count


def _spread(advantage, mask):
    # where, not a product: an unmasked token must carry exactly 0 whatever the row's value.
    return jnp.where(mask > 0, advantage[:, None], 0.0)


def normalize_tokens(advantages: jax.Array, mask: jax.Array, scale: str = "divide_std") -> jax.Array:
    """Whiten over all masked tokens of the batch: REINFORCE++ (arXiv 2501.03262).

    mu = sum(m a) / sum(m); var = sum(m (a - mu)^2) / sum(m); returns (a - mu) / sqrt(var + 1e-8) on masked tokens.
    ``scale="multiply_std"`` multiplies instead of dividing, which is what DeepRec's released code does.
    mu is weighted by tokens, so it is not 0 in general and an all-equal group gets -mu/std.
    """
    if scale not in ("divide_std", "multiply_std"):
        raise ValueError(f"adv_scale must be 'divide_std' or 'multiply_std', not {scale!r}")
    count = jnp.maximum(mask.sum(), 1.0)
    mean = (mask * advantages).sum() / count
    centred = jnp.where(mask > 0, advantages - mean, 0.0)
    std = jnp.sqrt((mask * centred**2).sum() / count + VAR_EPS)
    return centred / std if scale == "divide_std" else centred * std


def grpo(rewards, groups, mask, *, valid=None, num_groups: int | None = None) -> jax.Array:
    """GRPO (arXiv 2402.03300, eq. 3): A_i = (R_i - mean_g) / (std_g + 1e-4), unbiased std as in TRL.

    rewards: float [B]; groups: int32 [B] in 0..num_groups-1; mask: [B, T]; valid: [B] or None. Returns float32 [B, T].
    A group with fewer than two valid rows gets 0.
    """
    rewards, groups, mask, valid, num_groups = _prepare(rewards, groups, mask, valid, num_groups)
    centred, count = _centred(rewards, groups, valid, num_groups)
    std = jnp.sqrt(_group_sum(centred**2, groups, num_groups) / jnp.maximum(count - 1.0, 1.0))
    return _spread(centred / (std + EPS), mask)


def dr_grpo(rewards, groups, mask, *, valid=None, num_groups: int | None = None) -> jax.Array:
    """Dr. GRPO (arXiv 2503.20783, section 3.2): A_i = R_i - mean_g, not divided by the std. See :func:`grpo`."""
    rewards, groups, mask, valid, num_groups = _prepare(rewards, groups, mask, valid, num_groups)
    return _spread(_centred(rewards, groups, valid, num_groups)[0], mask)


def rloo(rewards, groups, mask, *, valid=None, num_groups: int | None = None) -> jax.Array:
    """RLOO (arXiv 2402.14740, section 2.3): A_i = R_i - mean of the *other* rows of the group. See :func:`grpo`.

    Equals (R_i - mean_g) n / (n - 1) with n the group's valid rows; 0 when n < 2.
    """
    rewards, groups, mask, valid, num_groups = _prepare(rewards, groups, mask, valid, num_groups)
    centred, count = _centred(rewards, groups, valid, num_groups)
    return _spread(centred * count / jnp.maximum(count - 1.0, 1.0), mask)


def token_returns(rewards: jax.Array, mask: jax.Array, penalty: jax.Array | None = None, gamma: float = 1.0):
    """G_t = sum over s >= t of gamma^(s-t) r_s on masked tokens, float32 [B, T] (arXiv 2503.05592).

    r_s is the row's reward at its last masked token, minus ``penalty`` [B, T] (such as a KL estimate times its weight)
    at every masked one. gamma discounts by positions, those of tools included.
    """
    mask = mask > 0
    left = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]  # masked tokens from here on
    each = jnp.where(mask & (left == 1), rewards[:, None], 0.0)
    if penalty is not None:
        each = each - jnp.where(mask, penalty, 0.0)

    def back(after, now):
        total = now + gamma * after
        return total, total

    _, returns = jax.lax.scan(back, jnp.zeros_like(rewards), each.T, reverse=True)
    return jnp.where(mask, returns.T, 0.0)


def _returns(rewards, mask, penalty, gamma):
    if penalty is None and gamma == 1.0:  # every masked token's return is the row's reward
        return _spread(rewards, mask)
    return token_returns(rewards, mask, penalty, gamma)


def reinforce_pp(
    rewards, groups, mask, *, valid=None, num_groups: int | None = None, clip: float = 10.0, scale: str = "divide_std",
    penalty=None, gamma: float = 1.0,
) -> jax.Array:  # fmt: skip
    """REINFORCE++ (arXiv 2501.03262): the clipped reward's return at every token, whitened over the batch's tokens.

    ``clip`` bounds R_i to [-clip, clip] before whitening. ``penalty`` [B, T] and ``gamma``: see :func:`token_returns`;
    without them every masked token's return is R_i. ``groups`` is not used. See :func:`grpo` for shapes.
    """
    rewards, groups, mask, valid, num_groups = _prepare(rewards, groups, mask, valid, num_groups)
    return normalize_tokens(_returns(jnp.clip(rewards, -clip, clip), mask, penalty, gamma), mask, scale)


def reinforce_pp_baseline(
    rewards, groups, mask, *, valid=None, num_groups: int | None = None, clip: float = 10.0, scale: str = "divide_std",
    penalty=None, gamma: float = 1.0,
) -> jax.Array:  # fmt: skip
    """REINFORCE++ with the group mean as baseline (arXiv 2501.03262; DeepRec, arXiv 2505.16810).

    As :func:`reinforce_pp` with clip(R_i - mean_g, -clip, clip) in the place of the reward.
    """
    rewards, groups, mask, valid, num_groups = _prepare(rewards, groups, mask, valid, num_groups)
    centred, _ = _centred(rewards, groups, valid, num_groups)
    return normalize_tokens(_returns(jnp.clip(centred, -clip, clip), mask, penalty, gamma), mask, scale)


ADVANTAGES: dict[str, Callable[..., jax.Array]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
}
HAS_BASELINE = frozenset(ADVANTAGES) - {"reinforce_pp"}
WHITENED = frozenset({"reinforce_pp", "reinforce_pp_baseline"})


def compute(name: str, rewards, groups, mask, *, group_size: int, valid=None, **options) -> jax.Array:
    """Check the groups on the host, then run the estimator ``name``.

    ``options`` (``clip``, ``scale``, ``penalty``, ``gamma``) exist for the two REINFORCE++ forms. Raises ValueError for
    an unknown name, an option the estimator does not have, groups of one under a baseline, and groups that are not
    full.
    """
    if name not in ADVANTAGES:
        raise ValueError(f"unknown advantage {name!r}; known: {', '.join(ADVANTAGES)}")
    if options and name not in WHITENED:
        raise ValueError(f"advantage {name!r} takes no options, got {', '.join(options)}")
    groups = check_groups(groups, group_size, baseline=name in HAS_BASELINE)
    return ADVANTAGES[name](rewards, groups, mask, valid=valid, num_groups=len(groups) // group_size, **options)


def equal_reward_groups(rewards: np.ndarray, groups: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """bool [B], True on rows of groups whose valid rewards are all equal: they carry no group-relative signal.

    The filter of dynamic sampling (DAPO, arXiv 2503.14476, section 3.2). Host side; a group without a valid row counts
    as equal.
    """
    rewards = np.asarray(rewards, np.float64)
    valid = np.ones(len(rewards), bool) if valid is None else np.asarray(valid, bool)
    _, inverse = np.unique(np.asarray(groups), return_inverse=True)
    inverse = inverse.reshape(-1)
    high = np.full(inverse.max(initial=-1) + 1, -np.inf)
    low = -high
    np.maximum.at(high, inverse[valid], rewards[valid])
    np.minimum.at(low, inverse[valid], rewards[valid])
    return (high <= low)[inverse]
