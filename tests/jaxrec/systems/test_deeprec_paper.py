"""The paper's variant on a real checkpoint folder: byte-level BPE, tags of many tokens, bfloat16, a BERT encoder.

The checkpoint is a Qwen2 whose blocks add nothing and whose head holds the bigram counts of a few protocol texts: a
random walk over tokens that asks, reads and answers, with the tag ends now and then inside a token.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from jaxrec.config import resolve_config
from jaxrec.systems import deeprec
from models.hf import Model
from rl.envs.recommend import ANSWER_CLOSE, ANSWER_OPEN, QUERY_CLOSE, QUERY_OPEN, TAGS, THINK_CLOSE
from rl.metrics import read_metrics
from rl.rollout import rollout
from rl.trajectory import Status

ENCODER = Path(__file__).resolve().parents[2] / "fixtures" / "encoder"
ITEMS = 24
TITLES = [f"{a} {b}" for a, b in itertools.product(("Dark", "Old", "Funny", "Space"), ("Sea", "War", "Robots"))]
TITLES += [f"The {t}" for t in TITLES]
QUERY = f"so{QUERY_OPEN} dark war; old sea{QUERY_CLOSE}"
ANSWER = f"so{THINK_CLOSE}\n{ANSWER_OPEN}\n1. Dark Sea\n2. Old War\n{ANSWER_CLOSE}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE

    folder = tmp_path_factory.mktemp("qwen2")
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=316, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    # "|>;" becomes one token: it begins inside the stop string and ends outside it.
    backend.train_from_iterator(["|>;"] * 99 + [*TITLES, QUERY, ANSWER] * 4, trainer)
    # Without these two a walk over bigrams would seldom spell a tag to its end; a tag is still three tokens.
    backend.add_tokens(["begin_of_preference", "end_of_preference"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    tokenizer = models.load_tokenizer(folder)
    size = tokenizer.vocab_size
    config = models.Config(
        family="qwen2", vocab_size=size, dim=size, layers=1, heads=2, kv_heads=1, head_dim=8, ffn_dim=8, qkv_bias=True,
        tie_embeddings=False, max_len=4096, eos_ids=tuple(tokenizer.eos_ids), dtype="bfloat16",
    )  # fmt: skip
    params = models.init(config, jax.random.key(0))
    counts = np.full((size, size), 1e-6)
    starts = tokenizer.encode("<think>")[-1]
    for text in (QUERY, QUERY + ";", ANSWER):
        ids = [starts, *tokenizer.encode(text)]
        np.add.at(counts, (ids[:-1], ids[1:]), 1.0)
    ends = tokenizer.encode("\n\n")[-1]  # what a tool result ends with
    counts[ends, tokenizer.encode("so")[0]] += 1.0
    head = np.log(counts / counts.sum(axis=1, keepdims=True)) / np.sqrt(size)  # a unit row normalises to sqrt(size)
    params["embed"], params["head"] = jnp.eye(size), jnp.asarray(head, jnp.float32)
    params["final_norm"] = jnp.ones(size)
    layers = params["layers"]
    layers["wo"], layers["w_down"] = jnp.zeros_like(layers["wo"]), jnp.zeros_like(layers["w_down"])
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    models.save(Model(config, params, tokenizer), folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("atomic") / "toy"
    folder.mkdir()
    events = [f"u{u}\ti{(3 * u + k) % ITEMS}\t5\t{10 * u + k}" for u in range(24) for k in range(7)]
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    (folder / "toy.inter").write_text("\n".join([header, *events]) + "\n")
    rows = [f"i{i}\t{title}\t{title.lower()}" for i, title in enumerate(TITLES)]
    (folder / "toy.item").write_text("\n".join(["item_id:token\ttitle:token_seq\tclass:token_seq", *rows]) + "\n")
    return folder


def paper(checkpoint: Path, data: Path):
    words = {
        "data.path": data, "model.path": checkpoint, "text.encoder": ENCODER,
        "trm.dim": 8, "trm.ffn_dim": 8, "trm.heads": 2, "trm.layers": 1, "trm.experts": 2, "trm.epochs": 1,
        "trm.batch_size": 64, "baselines.dim": 8, "baselines.epochs": 1, "baselines.batch_size": 64,
        "rollout.max_prompt": 2048, "rollout.max_total": 4096, "rollout.max_new": 64,
        "rl.prompts_per_step": 2, "rl.group_size": 4, "rl.micro_batches": 2,
        "cold_rl.steps": 1, "rec_rl.steps": 1, "data.test_users": 4, "evaluate.batch_size": 4,
        "evaluate.trajectories": 4,
    }  # fmt: skip
    return resolve_config("deeprec:paper", [f"--config.{k}={v}" for k, v in words.items()])


def test_the_papers_switches_stand(checkpoint, data):
    c = paper(checkpoint, data)
    assert (c.env.results, c.env.max_calls, c.env.history, c.env.answers) == (20, 8, 20, 10)
    assert (c.env.exclude_history, c.env.exclude_seen, c.env.instructions) == (False, False, True)
    assert (c.cold_start.steps, c.rollout.top_p, c.rl.minibatches, c.rl.kl_coef) == (0, 0.95, 2, 0.0)
    assert (c.model.dtype, c.model.remat, c.rl.clip_low, c.rl.clip_high) == ("bfloat16", "block", 0.2, 0.28)
    released = resolve_config("deeprec:paper")
    assert (released.rl.lr, released.rl.prompts_per_step, released.rl.group_size) == (1e-6, 128, 8)
    assert (released.rollout.max_prompt, released.rollout.max_total, released.rollout.max_new) == (4096, 16384, 2048)
    assert (released.cold_rl.steps, released.rec_rl.steps, released.rl.difficulty) == (20, 80, 100)


def test_one_rollout_from_the_folder(checkpoint, data, tmp_path: Path):
    c = paper(checkpoint, data)
    deeprec.check(c)
    this = deeprec.Run(c, 0, tmp_path, deeprec.config_task(c.data, c.text, 0), None)
    deeprec.check_task(this)
    model = this.load(checkpoint)
    assert (model.config.dtype, model.config.remat) == ("bfloat16", "block")
    assert model.params["embed"].dtype == jnp.float32
    for tag in TAGS:
        assert len(model.tokenizer.encode(tag)) > 1
    table = model.tokenizer.token_bytes()
    assert b"|>;" in table

    this.__dict__["server"] = _Fixed(this.task)  # the tool's own tests use a trained one
    env = this.env()
    examples = this.task.examples("train")[-2:]
    trajectory, states = rollout(
        model.params, model.config, model.tokenizer, env, examples, jax.random.key(1), this.rollout_config(),
        group_size=16,
    )  # fmt: skip
    assert sum(s.calls for s in states) > 0
    assert all("<|" not in preference for state in states for preference in state.preferences)
    inside = 0
    for i, state in enumerate(states):
        ids = trajectory.ids[i, : trajectory.lengths[i]]
        whole = model.tokenizer.decode(ids.tolist())
        assert whole.startswith(state.prompt)
        response = whole[len(state.prompt) :].removesuffix("<|endoftext|>")
        # A tool result that would leave no room to answer is in the conversation, but was never fed to the model.
        cut_off = trajectory.status[i] == Status.TRUNCATED
        assert state.text.startswith(response) if cut_off else state.text == response
        for items in state.retrieved:
            assert len(items) == 20
        for (author, text), (after, _) in itertools.pairwise(state.segments):
            if author == "policy" and after == "tool":
                assert QUERY_CLOSE in text
                inside += not text.endswith(QUERY_CLOSE)
        policy = "".join(model.tokenizer.decode(ids[trajectory.sampled[i, : len(ids)]].tolist()))
        assert policy.removesuffix("<|endoftext|>") == state.policy_text
    assert inside  # some query ended in the middle of a token
    assert (trajectory.status != Status.ENV_ERROR).all()


class _Fixed:
    """A recommender that always returns the first items."""

    def __init__(self, task):
        self.dim = task.item_text.shape[1]

    def recommend(self, history, lengths, vectors, *, k, **_):
        assert vectors.shape == (len(history), self.dim)
        return np.tile(np.arange(1, k + 1), (len(history), 1)), None


@pytest.mark.slow
def test_every_stage_of_the_paper(checkpoint, data, tmp_path: Path):
    c = paper(checkpoint, data)
    result = deeprec.run(c, tmp_path, deeprec.STAGES)
    assert result["variant"] == "paper"
    assert result["protocol"]["history_excluded"] is False
    rows = {row["name"]: row for row in result["rows"]}
    assert {"DeepRec after SFT", "DeepRec after stage 1", "DeepRec after stage 2"} <= rows.keys()
    for stage in ("cold_rl", "rec_rl"):
        (record,) = read_metrics(tmp_path, stage)
        assert np.isfinite(record["loss"])
        model = models.load(tmp_path / "checkpoints" / stage / "model")
        assert model.config.family == "qwen2"
        assert model.params["embed"].dtype == jnp.float32
    given, start = models.load(checkpoint), models.load(tmp_path / "checkpoints" / "cold_start" / "model")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(jnp.float32), b), given.params, start.params)
    # A step of 1e-6 must not be rounded away: bfloat16 weights would stay as they are.
    after = models.load(tmp_path / "checkpoints" / "cold_rl" / "model")
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), start.params, after.params)))
