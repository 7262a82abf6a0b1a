"""A recommender that writes queries, trained by either reward and held near its start, with a policy that knows three
queries and a user who says one thing."""

import json
import shutil

import numpy as np
import pytest

import models
from jaxrec.config import UsageError, resolve_config
from jaxrec.systems import grsu
from jaxrec.systems.recommender_rl import check_rl
from tests.jaxrec.systems import conversing

QUERIES = [f" {genre}\n" for genre in ("comedy", "drama", "war")]
SIZES = {
    "data__valid_dialogues": 2, "evaluate__arms": "('crs_alone',)", "search__max_new": 4, "recommender__k": 3,
    "rl__steps": 5, "rl__prompts_per_step": 4, "rl__group_size": 4, "rl__lr": 0.1, "rl__warmup": 0, "rl__max_new": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(files, user, policy)."""
    folder = tmp_path_factory.mktemp("rl")
    files, texts = conversing.road_files(folder)
    critique = [" Rather an old drama."]
    user = conversing.parrot(folder / "user", critique, texts, QUERIES)
    return files, user, conversing.parrot(folder / "policy", QUERIES, texts, critique)


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    """changes of the config -> (metrics by step, nats between the queries of the start and those of the end)."""

    def train(**changes):
        files, user, policy = place
        work = tmp_path_factory.mktemp("run")
        shutil.copytree(user, work / "checkpoints" / "sft" / "model")
        shutil.copytree(policy, work / "checkpoints" / "cold_start" / "model")
        flags = conversing.flags(user, "http://127.0.0.1:9/v1", **files, **(SIZES | changes))
        grsu.run(resolve_config("grsu:small", flags), work, ["rl"])
        rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
        return rows, divergence(work / "checkpoints" / "rl" / "model", policy)

    return train


def divergence(path, start) -> float:
    """KL(path || start) of what is written behind "Query:"."""
    logp = []
    for folder in (path, start):
        model = models.load(folder, dtype="float32")
        ids = np.array([model.tokenizer.encode("Query:")], np.int32)
        logits = np.asarray(models.forward(model.params, model.config, ids).logits, np.float64)[0, -1]
        logp.append(logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
    return float((np.exp(logp[0]) * (logp[0] - logp[1])).sum())


def test_the_users_score_is_the_reward_and_nothing_holds_the_policy(trained):
    (first, *_), _ = trained(rl__steps=1)
    assert first["reward/score"] == pytest.approx(0.5, abs=1e-3)  # of this user, whatever is shown
    assert "reward/hit" not in first
    assert "kl_ref" not in first


def test_a_penalty_holds_the_policy_near_its_start(trained):
    """With the hidden item as the reward, queries of other genres pay differently."""
    free, far = trained(rl__reward="hit")
    held, near = trained(rl__reward="hit", rl__kl_coef=10.0, rl__kl="k3+")
    assert "reward/score" not in free[0]
    assert 0 < free[0]["reward/hit"] < 1
    assert free[0]["reward/hit"] == pytest.approx(free[0]["hit"])
    assert held[0]["reward"] == free[0]["reward"]  # both begin as the same policy
    assert all(row["kl_ref"] > 0 for row in held)  # a step has two updates, of which the second is away from the start
    assert far > 2 * near > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rl__kl_coef": -0.1}, r"rl\.kl_coef=-0\.1 must be finite and not negative"),
        ({"rl__kl_coef": "nan"}, r"rl\.kl_coef=nan must be finite"),
        ({"rl__kl": "k9"}, "kl must be one of"),
        ({"rl__reward": "stars"}, r"rl\.reward='stars' must be one of score, hit"),
    ],
)
def test_bad_rewards_and_penalties_are_named(place, changes, message):
    flags = conversing.flags(place[1], "http://127.0.0.1:9/v1", **place[0], **(SIZES | changes))
    with pytest.raises((UsageError, ValueError), match=message):
        check_rl(resolve_config("grsu:small", flags))
