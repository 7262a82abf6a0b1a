"""A tiny model searches: masks by provenance, form, and the log-probabilities of rollout and trainer across results."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

import models
from models import Config
from rl import policy
from rl.envs.search import Question, SearchEnv, SearchOptions
from rl.envs.tags import R1_SEARCHER_PP
from rl.rollout import RolloutConfig, rollout
from rl.rows import trajectory_rows
from rl.search_rewards import SearchReward, format_faults
from rl.trajectory import Status

# Some texts are spelled by two ids, so that encoding again would change most rows; one token ends in the close tag and
# more, others hold a whole query, so that an untrained model asks often.
WORDS = (
    "", "<eos>", "<external>a</external>", "<external>a</external>", "<external>b</external> x", "</external>",
    "<document>", "</document>", "\\boxed{a}", "\\boxed{a}", "<internal>x</internal>", " x", " x", "a", "b", " ",
    "<external>", "\n", "(", ")", "1", "N", "o", "?",
)  # fmt: skip


class Words:
    """The longest known text first, the first id of it; what is unknown becomes a blank."""

    vocab_size, eos_ids = len(WORDS), (1,)

    def encode(self, text):
        ids = []
        while text:
            known = max((w for w in WORDS[2:] if text.startswith(w)), key=len, default=" ")
            ids.append(WORDS.index(known))
            text = text[max(1, len(known)) if text.startswith(known) else 1 :]
        return ids

    def decode(self, ids):
        return "".join(WORDS[i] for i in ids)

    def token_bytes(self):
        return tuple(word.encode() for word in WORDS)


CONFIG = Config(
    vocab_size=len(WORDS), dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn_dim=24, init_std=0.3, eos_ids=(1,)
)
QUESTIONS = [Question("q0", "a?", ("a",)), Question("q1", "bb?", ("b",))]
GROUP = 16


def search(queries, k):
    return [
        SimpleNamespace(passages=[SimpleNamespace(id=1, title="a", text="</document> \\boxed{b}")], error=None)
        if query == "a"
        else SimpleNamespace(passages=[], error="timeout")
        for query in queries
    ]


@pytest.fixture(scope="module")
def played():
    params = models.init(CONFIG, jax.random.key(0))
    env = SearchEnv(search, R1_SEARCHER_PP, SearchOptions(max_searches=2, short=True, on_error="drop"))
    options = RolloutConfig(max_prompt=24, max_total=160, max_new=8, max_turns=env.options.turns)
    trajectory, states = rollout(
        params, CONFIG, Words(), env, QUESTIONS, jax.random.key(3), options, group_size=GROUP, fuse=False
    )
    return params, trajectory, states


def test_masks_are_those_of_who_wrote(played):
    _, trajectory, states = played
    tokenizer = Words()
    assert max(s.searches for s in states) == 2
    again = 0
    for row, state in enumerate(states):
        length = int(trajectory.lengths[row])
        ids, sampled, turns = (x[row][:length] for x in (trajectory.ids, trajectory.sampled, trajectory.turns))
        assert ids[turns == 0].tolist() == tokenizer.encode(state.prompt)
        assert not sampled[turns == 0].any()
        spans, turn = iter(state.segments), 0
        for author, text in spans:
            turn += author == "policy"
            at = (turns == turn) & (sampled == (author == "policy"))
            said = ids[at].tolist()
            if author == "policy":
                said = said[:-1] if said and said[-1] == 1 else said
                assert tokenizer.decode(said) == text
                again += tokenizer.encode(text) != said
            else:
                assert said == tokenizer.encode(text)
    assert again  # ids that encoding the text again would not give


def test_what_the_policy_spells_as_a_result_is_trained_and_costs(played):
    _, trajectory, states = played
    forged = [row for row, s in enumerate(states) if "<document>" in s.policy_text]
    honest = [row for row, s in enumerate(states) if s.searches and "document>" not in s.policy_text]
    assert forged
    assert honest
    tag = WORDS.index("<document>")
    for row in forged:
        assert "result" in format_faults(states[row])
        assert ((trajectory.ids[row] == tag) & trajectory.sampled[row]).any()
    for row in honest:
        assert "result" not in format_faults(states[row])
        given = trajectory.ids[row][~trajectory.sampled[row]]
        assert (given == tag).sum() == sum(a == "tool" for a, _ in states[row].segments) > 0
    reward = SearchReward(lambda said, gold: float(said in gold))
    parts = reward(states, trajectory.groups)
    valid = trajectory.status != Status.ENV_ERROR
    np.testing.assert_array_equal(parts["format"][[r for r in forged if valid[r]]], -2.0)


def test_why_rows_ended(played):
    _, trajectory, states = played
    wanted = {
        "answer": Status.FINISHED, "eos_no_answer": Status.FINISHED, "length": Status.TRUNCATED,
        "max_retrieval": Status.TURN_LIMIT, "empty_query": Status.INVALID, "tool_error": Status.ENV_ERROR,
    }  # fmt: skip
    assert {"length", "answer", "tool_error"} <= {s.finish for s in states}
    assert trajectory.status.tolist() == [wanted[s.finish] for s in states]


def test_rollout_and_trainer_agree_across_results(played):
    """Ratio 1 on every sampled token, clip fraction 0; failed rows and results have no part in the update."""
    params, trajectory, states = played
    config = policy.GRPOConfig(
        prompts_per_step=2, group_size=GROUP, minibatches=1, aggregation="sequence", kl_reward=0.1
    )
    rewards = np.arange(2.0 * GROUP)
    batch, counts = policy.make_batch(trajectory, rewards, config)
    assert counts["rows_env_error"] == sum(s.finish == "tool_error" for s in states) > 0
    batch = policy.add_logprobs(batch, params, config, CONFIG, ref_params=params)
    inside = batch.mask > 0
    after_result = inside & (trajectory.turns[:, : inside.shape[1]] > 1)
    assert after_result.any()
    assert np.abs(np.exp(batch.old_logprobs - batch.sampler_logprobs)[inside] - 1).max() < 1e-3
    np.testing.assert_array_equal(batch.old_logprobs[inside], batch.ref_logprobs[inside])  # KL 0 everywhere
    _, _, metrics = policy.gradients(params, batch, config, CONFIG)
    for name in ("clip_low", "clip_high", "kl_ref"):
        assert float(metrics[name][0]) == pytest.approx(0.0, abs=1e-6)
    assert float(metrics["ratio"][0] / metrics["ratio"][1]) == pytest.approx(1.0, abs=1e-4)


def test_supervised_rows_of_a_rollout_hold_the_ids_that_were_sampled(played):
    _, trajectory, _ = played
    keep = [0, GROUP, 3]
    rows = trajectory_rows(trajectory, keep)
    for at, row in enumerate(keep):
        length = trajectory.lengths[row]
        np.testing.assert_array_equal(rows["tokens"][at][:length], trajectory.ids[row][:length])
        np.testing.assert_array_equal(rows["mask"][at][:length], trajectory.sampled[row][:length])
