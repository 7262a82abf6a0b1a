"""Rollouts: token in, token out; masks from provenance; statuses; the recommendation environment's protocol."""

import functools
import operator

import jax
import numpy as np
import pytest

import models
from models import Config
from rl.envs.base import Action, Step
from rl.envs.recommend import (
    ANSWER_CLOSE,
    QUERY_CLOSE,
    QUERY_OPEN,
    Catalogue,
    Example,
    PromptStyle,
    RecommendEnv,
    parse_query,
)
from rl.rollout import RolloutConfig, rollout
from rl.trajectory import Status

CONFIG = Config(vocab_size=24, dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn_dim=24, init_std=0.5)


class Doubled:
    """Ids 2i and 2i+1 spell the same letter, so decoding and encoding again would change most ids."""

    vocab_size, eos_ids = 24, ()

    def encode(self, text):
        return [2 * (ord(c) - 97) for c in text]

    def decode(self, ids):
        return "".join(chr(97 + i // 2) for i in ids)

    def token_bytes(self):
        return tuple(bytes([97 + i // 2]) for i in range(24))


class Echo:
    """Answers with two letters until ``turns`` are done."""

    stop = ("c",)

    def __init__(self, turns, reply="ab", status=Status.FINISHED):
        self.turns, self.reply, self.status, self.seen = turns, reply, status, []

    def reset(self, examples, copies):
        return [0] * (len(examples) * copies), ["abc" * (1 + i) for i in range(len(examples))]

    def step(self, states, actions):
        self.seen.append([a.text for a in actions])
        states = [s + 1 for s in states]
        observations = [None if s >= self.turns else self.reply for s in states]
        return Step(states, observations, np.full(len(states), self.status))


@pytest.fixture(scope="module")
def params():
    return models.init(CONFIG, jax.random.key(0))


def play(params, env, fuse=True, **options):
    options = RolloutConfig(**{"max_prompt": 8, "max_total": 40, "max_new": 6, "max_turns": 4, **options})
    return rollout(params, CONFIG, Doubled(), env, ["x", "y"], jax.random.key(1), options, group_size=3, fuse=fuse)


def test_the_trainer_gets_exactly_the_sampled_ids(params):
    env = Echo(turns=3)
    trajectory, _ = play(params, env)
    assert (trajectory.ids[trajectory.sampled] % 2 == 1).any()  # ids that encoding again would never give
    for row in range(6):
        given = [Doubled().encode("abc" * (1 + row // 3)), *[Doubled().encode("ab")] * 2]
        length = trajectory.lengths[row]
        ids, sampled = trajectory.ids[row][:length], trajectory.sampled[row][:length]
        assert ids[~sampled].tolist() == functools.reduce(operator.iadd, given, [])
        for turn in (1, 2, 3):
            at = sampled & (trajectory.turns[row][: len(ids)] == turn)
            assert Doubled().decode(ids[at]) == env.seen[turn - 1][row]
    logp = jax.nn.log_softmax(models.forward(params, CONFIG, trajectory.ids).logits)
    rows, columns = np.nonzero(trajectory.sampled)
    expected = np.asarray(logp)[rows, columns - 1, trajectory.ids[rows, columns]]
    np.testing.assert_allclose(trajectory.logprobs[trajectory.sampled], expected, atol=1e-4)
    assert not trajectory.logprobs[~trajectory.sampled].any()
    assert trajectory.groups.tolist() == [0, 0, 0, 1, 1, 1]


def test_segments_end_on_the_stop_string_or_the_limit(params):
    env = Echo(turns=2)
    trajectory, _ = play(params, env)
    for text in env.seen[0]:
        assert text.endswith("c") or len(text) == 6
        assert "c" not in text[:-1]
    assert (trajectory.status == Status.FINISHED).all()


def test_same_key_same_rollout(params):
    (one, _), (two, _) = play(params, Echo(2)), play(params, Echo(2))
    np.testing.assert_array_equal(one.ids, two.ids)


def test_a_tool_on_one_device_serves_a_policy_on_a_mesh(params):
    """The tool's arrays are not on the policy's mesh, and the answers are those without one."""
    count = jax.jit(lambda weights, x: (weights * x).sum())
    weights = jax.device_put(np.ones(3, np.float32), jax.devices()[1])

    class Tool(Echo):
        def step(self, states, actions):
            assert count(weights, np.ones(3, np.float32)) == 3
            return super().step(states, actions)

    alone, _ = play(params, Tool(2))
    mesh = models.make_mesh(fsdp=4, data=2)
    with models.use_mesh(mesh):
        spread, _ = play(jax.device_put(params, models.shardings(CONFIG, mesh)), Tool(2), fuse=False)
    np.testing.assert_array_equal(spread.ids, alone.ids)
    np.testing.assert_allclose(spread.logprobs, alone.logprobs, atol=1e-5)


@pytest.mark.parametrize(
    ("env", "options", "status"),
    [
        (Echo(turns=99), {}, Status.TURN_LIMIT),
        (Echo(turns=99, reply="ab" * 18), {}, Status.TRUNCATED),
        (Echo(turns=1, status=Status.ENV_ERROR), {}, Status.ENV_ERROR),
    ],
)
def test_statuses(params, env, options, status):
    trajectory, _ = play(params, env, **options)
    assert (trajectory.status == status).all()
    assert (trajectory.lengths <= 40).all()


def test_a_prompt_that_is_too_long_is_refused(params):
    with pytest.raises(ValueError, match="example 1 has 6 tokens"):
        play(params, Echo(1), max_prompt=5)


def test_conversations_longer_than_the_models_context_are_refused(params):
    options, config = RolloutConfig(max_prompt=8, max_total=40, max_new=6), CONFIG.replace(max_len=39)
    with pytest.raises(ValueError, match=r"max_total=40 is more than the model's context, max_len=39"):
        rollout(params, config, Doubled(), Echo(1), ["x"], jax.random.key(1), options)


# --- the recommendation environment -----------------------------------------------------------------------------------

CATALOGUE = Catalogue(("", *(f"T{i}" for i in range(1, 31))), ("", *["c"] * 30))


def env(**options) -> RecommendEnv:
    calls = []

    def retrieve(examples, texts, k, seen):
        calls.append((list(texts), [s.tolist() for s in seen]))
        return np.tile(np.arange(1, k + 1), (len(examples), 1))

    made = RecommendEnv(
        CATALOGUE, retrieve, **{"results": 3, "answers": 2, "style": PromptStyle(instructions=False), **options}
    )
    made.calls_made = calls
    return made


def ask(text: str) -> Action:
    return Action(f"hm {QUERY_OPEN}{text}{QUERY_CLOSE}", QUERY_CLOSE)


def test_the_tool_is_called_once_for_the_whole_batch():
    e = env()
    states, prompts = e.reset([Example(0, (1, 2), 3), Example(1, (4,), 5)], 2)
    assert len(states) == 4
    assert len(prompts) == 2
    assert prompts[0].endswith("<think>")
    step = e.step(states, [ask("a"), Action("bye", "eos"), ask("b"), ask("  ")])
    assert e.calls_made == [(["a", "b"], [[], []])]
    assert [o is None for o in step.observations] == [False, True, False, True]
    assert step.status.tolist() == [Status.FINISHED, Status.FINISHED, Status.FINISHED, Status.INVALID]
    body = "1. T1 - c\n2. T2 - c\n3. T3 - c"
    assert step.observations[0] == f"\n\n<|begin_of_item_list|>\n{body}\n<|end_of_item_list|>\n\n"


def test_first_query_only_asks_the_same_again_and_keeps_what_the_policy_wrote():
    e = env(first_query_only=True)
    states, _ = e.reset([Example(0, (1, 2), 3), Example(1, (4,), 5)], 1)
    e.step(states, [ask("a"), ask("b")])
    e.step(states, [ask("c"), Action("bye", "eos")])
    assert e.calls_made == [(["a", "b"], [[], []]), (["a"], [[1, 2, 3]])]
    assert states[0].preferences == ["a", "c"]


def test_a_policy_that_always_queries_makes_exactly_max_calls():
    e = env(max_calls=8)
    states, _ = e.reset([Example(0, (1,), 2)], 1)
    for turn in range(9):
        step = e.step(states, [ask(f"q{turn}")])
        assert (step.observations[0] is None) == (turn == 8)
    assert states[0].calls == 8
    assert step.status[0] == Status.TURN_LIMIT


def test_an_empty_tool_result_is_the_tools_fault():
    e = env()
    e.retrieve = lambda *_: [np.zeros(0, int)]
    states, _ = e.reset([Example(0, (1,), 2)], 1)
    assert e.step(states, [ask("a")]).status[0] == Status.ENV_ERROR


@pytest.mark.parametrize(
    ("text", "query"),
    [
        (f"x {QUERY_OPEN} a \n b {QUERY_CLOSE}", "a b"),
        (f'{QUERY_OPEN}""{QUERY_CLOSE}', ""),
        ("no tag", None),
        (f"{QUERY_OPEN}old{QUERY_CLOSE}{QUERY_OPEN}new{QUERY_CLOSE}", "new"),
    ],
)
def test_parse_query(text, query):
    assert parse_query(text) == query


def test_evaluation_also_stops_on_the_answer():
    assert env(stop_on_answer=True).stop == (QUERY_CLOSE, ANSWER_CLOSE)


@pytest.mark.parametrize("history", [(1,), tuple(range(1, 21)), tuple(range(1, 22))])
def test_history_is_cut_to_the_newest(history):
    prompt = env().prompt(Example(0, history, 25))
    shown = history[-20:]
    assert f"1. T{shown[0]} - c\n" in prompt
    assert f"{len(shown)}. T{shown[-1]} - c\n" in prompt
    assert f"{len(shown) + 1}." not in prompt


def test_bad_input():
    with pytest.raises(ValueError, match="at least one known item"):
        env().reset([Example(7, (), 1)], 1)
    with pytest.raises(KeyError, match="example 7: item 99"):
        env().reset([Example(7, (99,), 1)], 1)
    with pytest.raises(ValueError, match="two items"):
        Catalogue(("", "Same", " same "), ("",) * 3)
    with pytest.raises(ValueError, match="no title"):
        Catalogue(("", " "), ("", ""))
    for options in ({"results": 31}, {"answers": 0}, {"max_calls": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            env(**options)


MOE = CONFIG.replace(family="qwen3_moe", qk_norm=True, experts=6, top_k=2, norm_topk=True, layers=2)


def test_routing_that_was_kept_makes_the_ratio_one_and_moves_with_the_rows():
    """Trainer and sampler send every token to the same experts, whatever the router has become since."""
    from rl.logprobs import token_logprobs
    from rl.policy import GRPOConfig, make_batch

    params = models.init(MOE, jax.random.key(0))
    options = RolloutConfig(max_prompt=8, max_total=40, max_new=6, max_turns=4, routing=True)
    trajectory, _ = rollout(params, MOE, Doubled(), Echo(3), ["x", "y"], jax.random.key(1), options, group_size=3)
    assert trajectory.routing.shape == (*trajectory.ids.shape, 2, 2)
    config = GRPOConfig(prompts_per_step=2, group_size=3, minibatches=1, replay_routing=True, advantage="grpo")
    batch, _ = make_batch(trajectory, np.arange(6.0), config)
    T = batch.ids.shape[1]
    assert batch.routing.shape == (6, T, 2, 2)
    before = np.arange(T) < batch.lengths[:, None] - 1  # the last token of a row need not have been run
    assert (batch.routing[before] >= 0).all()

    def score(params, routing):
        return np.asarray(token_logprobs(params, MOE, batch.ids, batch.lengths, routing=routing))

    sampled = batch.mask > 0
    np.testing.assert_allclose(score(params, batch.routing)[sampled], batch.sampler_logprobs[sampled], atol=1e-5)
    other = {**params, "layers": {**params["layers"], "router": -params["layers"]["router"]}}
    index = models.forward(other, MOE, batch.ids, record=("moe.index",)).records["moe.index"]
    assert (np.sort(index.reshape(2, 6, T, 2)) != np.sort(batch.routing.transpose(2, 0, 1, 3)))[:, sampled].any()
    assert np.abs(score(other, None) - score(other, batch.routing))[sampled].max() > 1e-3


def test_replay_needs_what_the_rollout_did_not_keep(params):
    from rl.policy import GRPOConfig, make_batch

    trajectory, _ = play(params, Echo(1))
    config = GRPOConfig(prompts_per_step=2, group_size=3, minibatches=1, replay_routing=True, advantage="grpo")
    with pytest.raises(ValueError, match=r"set RolloutConfig\.routing"):
        make_batch(trajectory, np.arange(6.0), config)


def test_eight_bits_are_corrected_by_the_trainer(params):
    """The sampler's log-probs are those of what it sampled from, so the trainer sees the difference."""
    from rl.logprobs import token_logprobs

    trajectory, _ = play(params, Echo(2), int8_weights=True, int8_cache=True)
    exact = np.asarray(token_logprobs(params, CONFIG, trajectory.ids, trajectory.lengths))
    gap = np.abs(exact - trajectory.logprobs)[trajectory.sampled]
    assert 0 < gap.mean() < 0.05
