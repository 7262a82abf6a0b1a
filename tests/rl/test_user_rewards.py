"""Rewards of conversations with a simulated user, against values worked out by hand."""

import numpy as np
import pytest

from rl.envs.user import State, Talk
from rl.trajectory import Status
from rl.user_rewards import UserReward, UserRewardConfig, distinct, hit, rank, score, user_counts

NAN = np.nan


def state(lists=(), scores=(), target=(7,), status=Status.FINISHED, **more):
    arrays = [np.array(x, float) for x in scores] or [np.zeros(len(x)) for x in lists]
    return State(Talk(0, "d", target), "p", lists=[np.array(x) for x in lists], scores=arrays, status=status, **more)


def test_hits_in_the_last_list_or_any():
    states = [state([[7, 1], [2, 3]]), state([[1, 2], [3, 7]]), state([[1, 2]]), state()]
    np.testing.assert_array_equal(hit(states), [0, 1, 0, 0])
    np.testing.assert_array_equal(hit(states, "any"), [1, 1, 0, 0])
    assert hit(states).dtype == np.float32
    with pytest.raises(ValueError, match="lists must be one of last, any, not 'all'"):
        hit(states, "all")
    with pytest.raises(ValueError, match="example 0 has no target"):
        hit([state([[1]], target=())])


def test_the_best_target_is_ranked():
    states = [state([[1, 7, 3]]), state([[1, 2, 3, 4, 7]], target=(9, 7)), state([[4, 7]], target=(7, 4)), state([[1]])]
    np.testing.assert_allclose(rank(states), [1 / 2, 1 / 5, 1, 0])


def test_scores_of_the_last_list():
    # The worked numbers of arXiv 2504.20458's node rewards: means .55, .85 and .6167.
    states = [state([[0, 1]], [[0.9, 0.2]]), state([[0, 2]], [[0.9, 0.8]]), state([[1, 2, 3]], [[0.2, 0.8, 0.85]])]
    np.testing.assert_allclose(score(states), [0.55, 0.85, 0.6166667], rtol=1e-6)
    np.testing.assert_allclose(score(states, "max"), [0.9, 0.9, 0.85], rtol=1e-6)
    two = state([[0, 1], [2, 3]], [[0.1, 0.1], [0.4, NAN]])
    np.testing.assert_allclose(score([two, state()]), [0.4, 0], rtol=1e-6)


def test_share_of_items_that_are_new():
    ten = list(range(10))
    states = [state([ten, [*range(4), *range(10, 16)]]), state([[1, 2]]), state([[1, 2], [2, 3], [1, 3]]), state()]
    np.testing.assert_allclose(distinct(states), [0.6, 1, 0.25, 0], rtol=1e-6)


def test_parts_are_paid_only_to_the_end():
    good = {"lists": [[1, 7]], "scores": [[0.2, 0.6]]}
    states = [state(**good, status=status) for status in Status]
    parts = UserReward(UserRewardConfig(hit=2, rank=1, score=0.5, distinct=0.1, form=3))(states)
    np.testing.assert_allclose(parts["hit"], [2, 0, 0, 0, 0])
    np.testing.assert_allclose(parts["rank"], [0.5, 0, 0, 0, 0])
    np.testing.assert_allclose(parts["score"], [0.2, 0, 0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(parts["distinct"], [0.1, 0, 0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(parts["form"], [0, -3, -3, 0, -3])  # a failure of the environment costs nothing
    assert set(UserReward(UserRewardConfig(hit=0))(states)) == {"form", "score"}


def test_the_reward_model_alone_needs_no_target():
    parts = UserReward(UserRewardConfig(hit=0))([state([[1]], [[0.5]], target=())])
    assert parts["score"][0] == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"form": -1}, "form=-1"), ({"reduce": "min"}, "mean, max, not 'min'"), ({"hit_lists": "x"}, "hit_lists")],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        UserRewardConfig(**settings)


def test_counts():
    states = [
        state([[1, 2], [2, 3]], [[0.1, 0.3], [0.5, NAN]], accepted=True),
        state([[1, 2]], [[NAN, NAN]], status=Status.ENV_ERROR, failure="score"),
        state(status=Status.INVALID),
        state([[1, 2]], [[0.4, 0.4]], status=Status.ENV_ERROR, failure="critique"),
    ]
    counts = user_counts(states)
    assert counts["rounds"] == 1
    assert counts["distinct_items"] == (3 + 2 + 0 + 2) / 4
    assert counts["accepted"] == 0.25
    assert counts["unscored_items"] == 3
    assert counts["score_first"] == pytest.approx((0.2 + 0.4) / 2)
    assert counts["score_last"] == pytest.approx((0.5 + 0.4) / 2)
    assert (counts["failed_score"], counts["failed_critique"], counts["failed_lists"]) == (1, 1, 0)
    assert counts["status/env_error"] == 0.5
    assert user_counts([])["rounds"] == 0
