"""Roll a policy out in an environment: token in, token out.

The sampled ids are never decoded and encoded again: text is made from them only for the environment to read. Only new
observation text is tokenised, and only its tokens are run; the cache stays between turns. A group shares one prefill.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from models.config import Config
from models.generation import pad_rows
from models.layout import decode_weights
from models.sample import FINISH_EOS, FINISH_STOP, bucket, decode, extend, prefill
from models.sharding import no_mesh, to_host
from models.stops import stop_table
from rl import trajectory as tr
from rl.envs.base import Action, Environment
from rl.trajectory import Status, Trajectory


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """max_prompt, max_total: tokens per row (prompt; prompt and response). max_new: tokens per segment.
    max_turns: segments per row, a guard against an environment that never ends a row. temperature 0 is greedy;
    top_p below 1 biases the importance ratio, since the trainer normalises over the whole vocabulary. int8_weights,
    int8_cache: sample from weights or a cache in eight bits, for memory; ``GRPOConfig.tis_cap`` then corrects for the
    difference. routing: keep the experts that each token was sent to, for ``GRPOConfig.replay_routing``."""

    max_prompt: int = 4096
    max_total: int = 16384
    max_new: int = 2048
    max_turns: int = 9
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    int8_weights: bool = False
    int8_cache: bool = False
    routing: bool = False


def _read(decoded, rows: np.ndarray, tokenizer, stop: tuple[str, ...]) -> list[Action]:
    counts, finish = decoded.counts[rows], decoded.finish[rows]
    shown = counts - (finish == FINISH_EOS)  # the end-of-text token is no part of what the policy said
    texts = [tokenizer.decode(ids[:n].tolist()) for ids, n in zip(decoded.tokens[rows], shown, strict=True)]
    names = {FINISH_EOS: "eos", **{FINISH_STOP + j: s for j, s in enumerate(stop)}}
    return [Action(text, names.get(int(f), "length")) for text, f in zip(texts, finish, strict=True)]


def rollout(
    params,
    config: Config,
    tokenizer,
    env: Environment,
    examples: Sequence[Any],
    key: jax.Array,
    options: RolloutConfig,
    *,
    group_size: int = 1,
    version: int = 0,
    fuse: bool = True,
) -> tuple[Trajectory, list[Any]]:
    """Play every example ``group_size`` times; returns the trajectories [P * group_size rows] and the final states.

    Raises ValueError without examples, when ``max_total`` is more than the model's context, and when a prompt is longer
    than ``max_prompt``, naming the example;
    FloatingPointError naming the row when the model's log-probabilities are not finite.
    """
    if len(examples) == 0 or group_size < 1:
        raise ValueError(f"nothing to roll out: {len(examples)} examples, group_size={group_size}")
    if options.max_total > config.max_len:
        raise ValueError(
            f"max_total={options.max_total} is more than the model's context, max_len={config.max_len}: lower max_total"
        )
    with no_mesh():
        states, prompts = env.reset(examples, group_size)
    ids, lengths = pad_rows([tokenizer.encode(p) for p in prompts], config.pad_id)
    if lengths.max() > options.max_prompt:
        worst = int(lengths.argmax())
        raise ValueError(
            f"prompt of example {worst} has {lengths.max()} tokens, more than max_prompt={options.max_prompt}; "
            "shorten the history or raise the limit"
        )
    stops = stop_table(tuple(env.stop), tuple(tokenizer.token_bytes()))
    weights = decode_weights(params, config, fuse, int8=options.int8_weights)
    size = bucket(options.max_total)
    session = prefill(
        weights, config, ids, lengths, size, repeat=group_size, routing=options.routing, int8=options.int8_cache
    )
    trajectory = tr.empty(ids, lengths, group_size, size, version)
    running = np.arange(len(states))

    for turn in range(1, options.max_turns + 1):
        room = options.max_total - trajectory.lengths
        limits = np.zeros(len(states), np.int32)
        limits[running] = np.minimum(options.max_new, room[running])
        decoded, session = decode(
            weights, config, session, jax.random.fold_in(key, turn), limits, stops=stops,
            temperature=options.temperature, top_p=options.top_p, top_k=options.top_k,
            longest=min(int(trajectory.lengths.max()), size - int(limits.max())), steps=bucket(options.max_new),
        )  # fmt: skip
        decoded = to_host(decoded)
        if not np.isfinite(decoded.logprobs).all():
            row = int(np.flatnonzero(~np.isfinite(decoded.logprobs).all(1))[0])
            raise FloatingPointError(
                f"the policy's log-probabilities are not finite: row {row} (example {row // group_size}), turn {turn}, "
                f"weights version {version}"
            )
        tr.append(
            trajectory, running, decoded.tokens[running], decoded.counts[running], turn, decoded.logprobs[running]
        )
        with no_mesh():
            answer = env.step([states[i] for i in running], _read(decoded, running, tokenizer, stops.strings))
        for i, state in zip(running, answer.states, strict=True):
            states[i] = state

        waiting = np.array([text is not None for text in answer.observations], bool)
        trajectory.status[running[~waiting]] = answer.status[~waiting]
        texts = [text for text in answer.observations if text is not None]
        running = running[waiting]
        if not len(running):
            break
        new, counts = pad_rows([tokenizer.encode(text) for text in texts], config.pad_id)
        # An observation that leaves no room to answer ends the row: half a tool result would mislead the policy.
        fits = trajectory.lengths[running] + counts < options.max_total
        trajectory.status[running[~fits]] = Status.TRUNCATED
        running, new, counts = running[fits], new[fits], counts[fits]
        if turn == options.max_turns or not len(running):
            trajectory.status[running] = Status.TURN_LIMIT
            break
        tr.append(trajectory, running, new, counts, turn)
        tokens = np.zeros((len(states), new.shape[1]), np.int32)
        tokens[running] = new
        given = np.zeros(len(states), np.int32)
        given[running] = counts
        session = extend(weights, config, session, tokens, given, int(trajectory.lengths.max()))
    if options.routing:
        trajectory = trajectory.replace(routing=to_host(session.routing[:, :size]))
    return trajectory, states
