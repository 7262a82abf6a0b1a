"""A recommender that writes queries, trained by reinforcement learning against a simulated user.

The policy reads a dialogue and writes a query, a search answers it with a list, the simulated user scores and
criticises the list, and the policy writes the next query. It starts from supervised traces of a heuristic that repeats
what was said last and, by chance, some of what was said before. The reward may be the user's score, which is a model's
opinion, or whether a list holds the hidden item; both are measured, to see whether the policy learned to please the one
at the other's cost. A KL penalty keeps it near its supervised start.
"""

import collections
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxrec.config import UsageError, write_atomic
from jaxrec.data.dialogues import USER
from jaxrec.data.item_catalogue import ItemCatalogue
from jaxrec.systems.grsu_counts import PLAYERS, as_metrics
from jaxrec.tools.conversation import Tally, User
from jaxrec.tools.crs.environment import query_env, talks
from jaxrec.tools.crs.prompts import QueryPrompts
from jaxrec.tools.crs.retrieval import SearchedLists
from jaxrec.tools.talk_task import item_search
from models.sharding import use_mesh
from rl.envs.base import Action
from rl.envs.user import State, Talk, UserEnv
from rl.optimizer import OptimizerConfig
from rl.policy import GRPOConfig
from rl.rollout import RolloutConfig, rollout
from rl.rows import encode_rows
from rl.user_rewards import UserReward, UserRewardConfig, hit, score, user_counts

COLD, TRAINED = "cold_start", "rl"  # what the two are called in a run's folder
WRITER = "query writer"  # what a policy's lists are counted under
REWARDS = {"score": UserRewardConfig(hit=0.0), "hit": UserRewardConfig(score=0.0, hit_lists="any")}
_CLAUSE = re.compile(r"[.,;?!]")
_NOT = re.compile(r"\b(no|not|nothing|without|too)\b|n't\b", re.IGNORECASE)
_WORD = re.compile(r"\w+")
_LONGEST = 12  # words of a heuristic query


def check_rl(config: Any) -> None:
    """Raise UsageError or ValueError for settings of ``rl`` that training would stumble over."""
    r = config.rl
    if r.reward not in REWARDS:
        raise UsageError(f"rl.reward={r.reward!r} must be one of {', '.join(REWARDS)}")
    if not 0 < r.max_prompt < r.max_total or r.max_new < 1 or r.rounds < 1 or r.steps < 0:
        raise UsageError(
            f"rl.max_total={r.max_total} must leave room behind rl.max_prompt={r.max_prompt}, and rl.max_new and "
            "rl.rounds must be at least 1"
        )
    if not (math.isfinite(r.kl_coef) and r.kl_coef >= 0):
        raise UsageError(f"rl.kl_coef={r.kl_coef} must be finite and not negative")
    if not 0 <= r.cold_recall <= 1:
        raise UsageError(f"rl.cold_recall={r.cold_recall} must lie between 0 and 1")
    policy_config(config, 0)


def policy_config(config: Any, seed: int) -> GRPOConfig:
    """The update."""
    r = config.rl
    return GRPOConfig(
        optimizer=OptimizerConfig(lr=r.lr, warmup_steps=r.warmup, b2=r.b2), prompts_per_step=r.prompts_per_step,
        group_size=r.group_size, micro_batches=r.micro_batches, advantage=r.advantage, clip_low=r.clip,
        clip_high=r.clip, max_total=r.max_total, length_buckets=(r.max_total // 2, r.max_total),
        save_every=r.save_every, logprob_chunk=r.logprob_chunk, seed=seed, log_entropy=False,
        max_env_errors=r.max_env_errors, kl=r.kl, kl_coef=r.kl_coef,
    )  # fmt: skip


def query_prompts(this: Any, tokenizer: Any) -> QueryPrompts:
    """What a policy reads."""
    reserved = tokenizer.control_tokens()
    return QueryPrompts(this.task.catalogue, roles=this.task.roles, turns=this.config.rl.turns, reserved=reserved)


def check_prompts(this: Any, model: Any) -> None:
    """Raise UsageError, before anything is trained, for a dialogue that is longer than rl.max_prompt, and for
    conversations that are longer than the model's context."""
    r, prompts = this.config.rl, query_prompts(this, model.tokenizer)
    if r.max_total > model.config.max_len:
        raise UsageError(f"rl.max_total={r.max_total} is more than the context of the model, {model.config.max_len}")
    dialogues = [instance.dialogue for part in ("train", "test") for instance in this.task.parts[part]]
    sizes = [len(model.tokenizer.encode(prompts.prompt(dialogue))) for dialogue in dialogues]
    if max(sizes) > r.max_prompt:
        worst = dialogues[int(np.argmax(sizes))]
        raise UsageError(
            f"dialogue {worst.id}: its prompt has {max(sizes)} tokens, more than rl.max_prompt={r.max_prompt}: raise "
            "it, or lower rl.turns"
        )


def query_room(this: Any, model: Any) -> None:
    """Raise UsageError where a conversation of the search might not fit into the context of a model that writes its
    queries: the longest prompt, and in every round a query, the k longest items and a critique."""
    c, prompts = this.config, query_prompts(this, model.tokenizer)
    sizes = [len(ids) for ids in model.tokenizer.encode_batch(list(this.task.catalogue.titles))]
    longest = sorted(range(len(sizes)), key=sizes.__getitem__)[-c.recommender.k :]
    round_ = len(model.tokenizer.encode(prompts.show(longest, "x"))) + c.search.max_new + c.recommender.policy.max_new
    dialogues = [instance.dialogue for instance in this.task.parts["test"]]
    opening = max(len(ids) for ids in model.tokenizer.encode_batch([prompts.prompt(d) for d in dialogues]))
    if (most := opening + c.search.depth * round_) > model.config.max_len:
        raise UsageError(
            f"recommender.kind=policy: a conversation of search.depth={c.search.depth} rounds may have {most} tokens, "
            f"but the context of the model that writes queries holds {model.config.max_len}: lower rl.turns, "
            "recommender.k, search.depth, search.max_new or recommender.policy.max_new"
        )


def searched_lists(this: Any) -> SearchedLists:
    """Lists for queries, the best of what the search over items finds."""
    c = this.config.recommender
    search = item_search(c.index, this.task, c.k, this.folder / "recommender")
    return SearchedLists(search, exclude_mentioned=c.index.exclude_mentioned)


def environment(this: Any, user: User, tokenizer: Any) -> UserEnv:
    """The conversation that a policy has."""
    c, prompts = this.config, query_prompts(this, tokenizer)
    return query_env(prompts, this.lists, user, c.recommender.k, rounds=c.rl.rounds, seed=this.seed)


def catalogue_words(catalogue: ItemCatalogue) -> frozenset[str]:
    """Words of short attribute values (names, genres; not of a plot), in lower case."""
    values = {value for known in catalogue.attributes for values in known.values() for value in values}
    return frozenset(word for v in values if len(words := _WORD.findall(v.lower())) <= 3 for word in words)


def keywords(text: str, known: frozenset[str]) -> list[str]:
    """Words of the catalogue that a text says, but those in clauses that negate."""
    clauses = [clause for clause in _CLAUSE.split(text) if not _NOT.search(clause)]
    return list(dict.fromkeys(word for clause in clauses for word in _WORD.findall(clause) if word.lower() in known))


def drawn_query(state: State, known: frozenset[str], recall: float, rng: np.random.Generator) -> str:
    """Words of the catalogue that the user said last, in the critique or the dialogue, and before them those of each
    other turn with probability ``recall``. Where no turn holds any, the words of the latest turn that has words, else
    "anything". At most :data:`_LONGEST` words, the latest."""
    said = [turn.text for turn in state.example.dialogue.turns if turn.role == USER] + [state.critique]
    found = [words for text in said if (words := keywords(text, known))]
    found = found or [words for text in said if (words := _WORD.findall(text))][-1:] or [["anything"]]
    *before, last = found
    chosen = [words for words, draw in zip(before, rng.random(len(before)), strict=True) if draw < recall]
    return " ".join(list(dict.fromkeys(word for words in (*chosen, last) for word in words))[-_LONGEST:])


def traces(
    env: UserEnv, examples: Sequence[Talk], known: frozenset[str], recall: float, rng: np.random.Generator
) -> list[State]:
    """Conversations in which a heuristic writes the queries (:func:`drawn_query`)."""
    states, _ = env.reset(examples)
    running = states
    while running:
        actions = [Action(f" {drawn_query(state, known, recall, rng)}\n", "\n") for state in running]
        step = env.step(running, actions)
        running = [state for state, text in zip(running, step.observations, strict=True) if text is not None]
    return states


def cold_start(this: Any, env: UserEnv, tally: Tally) -> None:
    """Supervised steps on :func:`traces`; ``cold_start.json`` says how many there are, what was left out, and what the
    players of ``tally`` counted."""
    if (this.checkpoint(COLD) / "model").exists():
        return
    model, r = this.load(this.base), this.config.rl
    rng, known = np.random.Generator(np.random.PCG64([this.seed, 41])), catalogue_words(this.task.catalogue)
    states = traces(env, talks(this.task.parts["train"]), known, r.cold_recall, rng)
    whole = [s for s in states if not s.failure]
    if not whole:
        failed = dict(collections.Counter(s.failure for s in states))
        raise UsageError(
            f"{COLD}: none of {len(states)} conversations came to its end; what failed: {failed}; a simulated user "
            "without a critique needs more sft.steps or a greater search.max_new"
        )
    rows, long = encode_rows(
        [(s.prompt, s.segments) for s in whole], model.tokenizer, model.config.eos_ids[0], r.max_total
    )
    print(f"{COLD}: {len(whole) - long} traces; {long} too long, {len(states) - len(whole)} without an answer")
    failed = dict(collections.Counter(s.failure for s in states if s.failure))
    found = {"traces": len(whole) - long, "too long": long, "failed": failed, PLAYERS: tally.take()}
    write_atomic(this.folder / f"{COLD}.json", json.dumps(found, indent=1) + "\n")
    settings = type(r)({"steps": r.cold_steps, "lr": r.cold_lr, "batch_size": this.config.sft.batch_size})
    this.supervise(COLD, model, rows, settings)


def reinforce(this: Any, user: User) -> None:
    """Train the cold start's policy against a user into ``checkpoints/rl``."""
    target = this.checkpoint(TRAINED) / "model"
    if target.exists():
        return
    base = this.load(this.base)
    check_prompts(this, base)
    env = environment(this, user, base.tokenizer)
    tally = Tally({WRITER: this.lists, "simulated user": user})
    cold_start(this, env, tally)
    model, r = this.model(COLD), this.config.rl
    settings, options, reward = policy_config(this.config, this.seed), rollout_config(r), UserReward(REWARDS[r.reward])
    examples = talks(this.task.parts["train"])

    def counts(states: Sequence[State], parts: Mapping[str, np.ndarray]) -> dict[str, float]:
        return {**user_counts(states), "hit": float(hit(states, "any").mean()), **as_metrics(tally.take())}

    shown = ("reward", "hit", "score_last", "failed_critique", "kl_ref")
    judged = lambda states, groups: reward(states)  # noqa: E731
    this.reinforce(TRAINED, model, settings, env, examples, options, judged, counts, r.steps, shown)


def rollout_config(settings: Any, temperature: float = 1.0) -> RolloutConfig:
    """Lengths of a conversation."""
    r = settings
    return RolloutConfig(r.max_prompt, r.max_total, r.max_new, r.rounds, temperature)


def conversations(this: Any, user: User, name: str) -> tuple[Mapping[str, np.ndarray], list[State]]:
    """Greedy conversations of a policy about the test dialogues: "hit" in any list, "hit_last", "score" of the last
    list, float64 [n] each, and the final states."""
    model, size = this.model(name), this.config.search.batch
    env, examples = environment(this, user, model.tokenizer), talks(this.task.parts["test"])
    states: list[State] = []
    for low in range(0, len(examples), size):
        part = examples[low : low + size]
        filled = part + part[-1:] * (size - len(part))  # one shape
        with use_mesh(this.mesh):
            _, ended = rollout(
                model.params, model.config, model.tokenizer, env, filled, jax.random.key(this.seed),
                rollout_config(this.config.rl, 0.0), fuse=this.mesh is None,
            )  # fmt: skip
        states += ended[: len(part)]
    values = {"hit": hit(states, "any"), "hit_last": hit(states), "score": score(states)}
    return {name: np.asarray(v, np.float64) for name, v in values.items()}, states
