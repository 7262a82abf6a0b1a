"""Advantages against numbers worked by hand, against a plain numpy reference, and against stored TRL outputs."""

from pathlib import Path

import jax
import numpy as np
import pytest

from rl import advantages

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "rl" / "trl.npz"
GROUPED = ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline")


def test_deeprec_group_baseline():
    out = advantages.dr_grpo(np.array([3.0, 1.0, 0.0, 0.0]), np.zeros(4, np.int32), np.ones((4, 1)), num_groups=1)
    np.testing.assert_allclose(out[:, 0], [2.0, 0.0, -1.0, -1.0], atol=1e-6)


def test_rloo_is_the_mean_of_the_others():
    out = advantages.rloo(np.array([3.0, 1.0, 0.0, 0.0]), np.zeros(4, np.int32), np.ones((4, 1)), num_groups=1)
    np.testing.assert_allclose(out[:, 0], [3 - 1 / 3, 1 - 1.0, -4 / 3, -4 / 3], atol=1e-6)


@pytest.mark.parametrize(
    ("scale", "expected"), [("divide_std", [1.4142, -0.7071]), ("multiply_std", [1.2571, -0.6285])]
)
def test_deeprec_token_normalisation(scale, expected):
    """A = +1 on 2 tokens and -1 on 4: mu = -1/3, var = .8889, std = .9428."""
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1.0]])
    # Rewards 2 and 0 have mean 1, so the group baseline makes +1 and -1 of them.
    out = advantages.reinforce_pp_baseline(np.array([2.0, 0.0]), np.zeros(2, np.int32), mask, num_groups=1, scale=scale)
    np.testing.assert_allclose(out[0, :2], expected[0], atol=1e-4)
    np.testing.assert_allclose(out[1], expected[1], atol=1e-4)
    np.testing.assert_array_equal(out[0, 2:], 0.0)


def test_deeprec_clip_comes_before_normalisation():
    rewards, groups = np.array([100.0, 0.0, 1.0, 0.0]), np.array([0, 0, 1, 1])
    out = advantages.reinforce_pp_baseline(rewards, groups, np.ones((4, 1)), num_groups=2)
    clipped = np.array([10.0, -10.0, 0.5, -0.5])
    np.testing.assert_allclose(out[:, 0], clipped / np.sqrt((clipped**2).mean() + 1e-8), rtol=1e-5)


def test_equal_group_has_zero_advantage_before_whitening_and_minus_mu_after():
    rewards, groups = np.array([1.0, 1.0, 3.0, 0.0]), np.array([0, 0, 1, 1])
    mask = np.array([[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1.0]])
    for name in ("grpo", "dr_grpo", "rloo"):
        out = advantages.compute(name, rewards, groups, mask, group_size=2)
        np.testing.assert_array_equal(out[:2], 0.0)
    out = advantages.compute("reinforce_pp_baseline", rewards, groups, mask, group_size=2)
    tokens = np.array([0.0, 0.0, 1.5, -1.5, -1.5, -1.5])
    np.testing.assert_allclose(out[0, 0], -tokens.mean() / tokens.std(), rtol=1e-5)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_group_mean_is_zero(name, rng):
    rewards, groups = rng.normal(size=64).astype(np.float32), rng.permutation(np.repeat(np.arange(8), 8))
    out = np.asarray(advantages.compute(name, rewards, groups, np.ones((64, 1)), group_size=8))[:, 0]
    np.testing.assert_allclose([out[groups == g].mean() for g in range(8)], 0.0, atol=1e-6)


def reference(name, rewards, groups, mask, valid):
    """The definitions again, with loops over groups and no shared code."""
    advantage = np.zeros(len(rewards))
    for g in np.unique(groups):
        rows = np.flatnonzero((groups == g) & (valid > 0))
        r = rewards[rows].astype(np.float64)
        if name == "reinforce_pp":
            advantage[rows] = np.clip(r, -10, 10)
        elif len(rows) >= 2:
            if name == "grpo":
                advantage[rows] = (r - r.mean()) / (r.std(ddof=1) + 1e-4)
            elif name == "rloo":
                advantage[rows] = [r[i] - np.delete(r, i).mean() for i in range(len(r))]
            else:
                advantage[rows] = r - r.mean()
    if name == "reinforce_pp_baseline":
        advantage = np.clip(advantage, -10, 10)
    keep = mask * valid[:, None] > 0
    out = np.broadcast_to(advantage[:, None], mask.shape).copy()
    if name.startswith("reinforce_pp"):
        out = (out - out[keep].mean()) / np.sqrt(out[keep].var() + 1e-8)
    return np.where(keep, out, 0.0)


@pytest.mark.parametrize("name", list(advantages.ADVANTAGES))
def test_every_estimator_against_a_plain_reference_jitted_with_excluded_rows(name, rng):
    groups = rng.permutation(np.repeat(np.arange(6), 4)).astype(np.int32)
    rewards = (20 * rng.normal(size=24)).astype(np.float32)
    mask = (rng.random((24, 7)) < 0.6).astype(np.float32)
    valid = np.ones(24, np.float32)
    valid[np.flatnonzero(groups == 2)[:3]] = 0  # one row left
    valid[groups == 3] = 0  # none left
    valid[np.flatnonzero(groups == 4)[0]] = 0
    rewards[np.flatnonzero(valid == 0)] = np.nan
    run = jax.jit(advantages.ADVANTAGES[name], static_argnames="num_groups")
    out = run(rewards, groups, mask, valid=valid, num_groups=6)
    np.testing.assert_allclose(out, reference(name, rewards, groups, mask, valid), rtol=2e-5, atol=2e-5)
    # Row order carries no meaning: the group id does.
    order = rng.permutation(24)
    shuffled = run(rewards[order], groups[order], mask[order], valid=valid[order], num_groups=6)
    np.testing.assert_allclose(shuffled, out[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(advantages.ADVANTAGES))
def test_empty_mask_is_zero_not_nan(name):
    out = advantages.compute(name, np.array([1.0, 2.0]), np.zeros(2, int), np.zeros((2, 3)), group_size=2)
    np.testing.assert_array_equal(out, 0.0)


@pytest.mark.parametrize("name", GROUPED)
def test_group_of_one_is_refused_under_a_baseline(name):
    with pytest.raises(ValueError, match="group_size is 1"):
        advantages.compute(name, np.ones(2), np.arange(2), np.ones((2, 3)), group_size=1)


def test_group_of_one_is_fine_without_a_baseline():
    out = advantages.compute("reinforce_pp", np.array([1.0, 0.0]), np.arange(2), np.ones((2, 3)), group_size=1)
    np.testing.assert_allclose(out[:, 0], [1.0, -1.0], rtol=1e-5)


@pytest.mark.parametrize("groups", [[0, 0, 0, 1], [0, 0, 1], [5, 5, 5, 5]])
def test_groups_that_are_not_full_are_refused(groups):
    with pytest.raises(ValueError, match="must have group_size=2 rows"):
        advantages.check_groups(np.array(groups), 2)


def test_check_groups_renumbers_by_first_appearance():
    np.testing.assert_array_equal(advantages.check_groups(np.array([70, 4, 4, 70]), 2), [0, 1, 1, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: advantages.compute("ppo", np.ones(2), np.zeros(2), np.ones((2, 1)), group_size=2), "unknown adv"),
        (
            lambda: advantages.compute("grpo", np.ones(2), np.zeros(2), np.ones((2, 1)), group_size=2, clip=1.0),
            "takes no options",
        ),
        (lambda: advantages.normalize_tokens(np.ones((1, 1)), np.ones((1, 1)), "std"), "adv_scale"),
        (lambda: advantages.grpo(np.ones((2, 1)), np.zeros(2, int), np.ones((2, 1))), "want rewards"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_equal_reward_groups():
    rewards, groups = np.array([1.0, 1.0, 0.0, 2.0, 5.0, np.nan]), np.array([9, 9, 1, 1, 3, 3])
    valid = np.array([1, 1, 1, 1, 1, 0])
    out = advantages.equal_reward_groups(rewards, groups, valid)
    np.testing.assert_array_equal(out, [True, True, False, False, True, True])


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_equal_to_stored_trl(name):
    """Stored by tests/fixtures/make_rl.py from TRL's own trainers; tests/parity compares with the installed TRL."""
    with np.load(FIXTURE) as stored:
        rewards, groups = stored["rewards"], stored["groups"]
        out = advantages.compute(name, rewards, groups, np.ones((len(rewards), 1)), group_size=4)
        np.testing.assert_allclose(out[:, 0], stored[f"advantages_{name}"], rtol=1e-5, atol=1e-6)


# --- token-level rewards: the worked numbers of R1-Searcher++ (arXiv 2505.17005, section 5) ---------------------------

WORKED = np.array([1, 7 / 3, 0, 1, -2, 0, 0, -2], np.float32)
WHITENED = {
    "reinforce_pp": [0.69003, 1.65008, -0.03000, 0.69003, -1.47007, -0.03000, -0.03000, -1.47007],
    "reinforce_pp_baseline": [-0.09072, 1.36083, -1.17938, -0.09072, -1.08866, 1.08866, 1.08866, -1.08866],
}


@pytest.mark.parametrize("name", list(WHITENED))
def test_r1_searcher_numbers(name):
    groups, mask = np.arange(8) // 4, np.tile([0.0, 1, 1, 0, 1], (8, 1))  # rows of equal length, with a tool's text
    out = advantages.compute(name, WORKED, groups, mask, group_size=4)
    np.testing.assert_allclose(out, np.array(WHITENED[name])[:, None] * mask, atol=1e-4)
    same = advantages.compute(name, WORKED, groups, mask, group_size=4, penalty=np.zeros((8, 5)), gamma=1.0)
    np.testing.assert_allclose(same, out, atol=1e-6)
    if name == "reinforce_pp_baseline":
        shifted = WORKED + np.repeat([5.0, -3.0], 4)
        np.testing.assert_allclose(advantages.compute(name, shifted, groups, mask, group_size=4), out, atol=1e-5)


@pytest.mark.parametrize(("name", "zero"), [("reinforce_pp_baseline", True), ("grpo", True), ("reinforce_pp", False)])
def test_a_group_of_wrong_answers(name, zero):
    """All rewards 0: no signal under a baseline; plain REINFORCE++ pushes them down beside a group that earned more."""
    rewards, groups = np.array([0, 0, 1.0, 0, 0, 0.0]), np.array([1, 1, 0, 0, 2, 2])
    rewards[:2] = 0.0
    out = np.asarray(advantages.compute(name, rewards, groups, np.ones((6, 3)), group_size=2))
    assert (out[:2] == 0).all() == zero
    assert (out[4:] == 0).all() == zero


def test_returns_with_penalty_and_discount_equal_a_plain_loop(rng):
    rewards, gamma = rng.normal(size=5).astype(np.float32), 0.9
    mask = (rng.random((5, 9)) < 0.6).astype(np.float32)
    mask[4] = 0.0
    penalty = rng.normal(size=(5, 9)).astype(np.float32)
    penalty[mask == 0] = np.nan  # what a tool wrote has no log-prob of the policy
    expected = np.zeros((5, 9))
    for i in range(5):
        inside = np.flatnonzero(mask[i])
        for t in inside:
            later = [(s, -float(penalty[i, s]) + (rewards[i] if s == inside[-1] else 0.0)) for s in inside if s >= t]
            expected[i, t] = sum(gamma ** (s - t) * r for s, r in later)
    out = jax.jit(advantages.token_returns, static_argnames="gamma")(rewards, mask, penalty, gamma=gamma)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    whole = advantages.compute("reinforce_pp", rewards, np.arange(5), mask, group_size=1, penalty=penalty, gamma=gamma)
    tokens = expected[mask > 0]
    np.testing.assert_allclose(np.asarray(whole)[mask > 0], (tokens - tokens.mean()) / tokens.std(), atol=1e-4)


@pytest.mark.parametrize("name", list(WHITENED))
def test_statistics_over_a_mesh_are_those_of_the_whole_batch(name):
    """Rows on eight devices, every group over several of them."""
    from models.sharding import make_mesh, shard_batch, use_mesh

    rng = np.random.default_rng(0)
    rewards, groups = rng.normal(size=16).astype(np.float32), np.tile(np.arange(4), 4).astype(np.int32)
    mask, penalty = (rng.random((16, 8)) < 0.6).astype(np.float32), rng.normal(size=(16, 8)).astype(np.float32)
    run = jax.jit(
        lambda r, g, m, p: advantages.ADVANTAGES[name](r, g, m, num_groups=4, penalty=p, gamma=0.9)
    )  # fmt: skip
    mesh = make_mesh(data=8)
    with use_mesh(mesh):
        many = run(*shard_batch(mesh, (rewards, groups, mask, penalty)))
    np.testing.assert_allclose(np.asarray(many), run(rewards, groups, mask, penalty), atol=1e-5)
