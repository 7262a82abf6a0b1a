"""Trajectories: arrays only, masks from provenance."""

import enum

import numpy as np
from flax import struct


class Status(enum.IntEnum):
    """Why a trajectory ended."""

    FINISHED = 0  # the policy ended it, or the environment accepted it
    TRUNCATED = 1  # a segment or the whole ran into its length limit
    TURN_LIMIT = 2  # the policy wanted another turn than the environment allows
    ENV_ERROR = 3  # a tool failed: the row takes no part in the update
    INVALID = 4  # the policy wrote an action that cannot be carried out


@struct.dataclass
class Trajectory:
    """B rows of at most T tokens: a prompt, then what policy and environment wrote in turn.

    ids int32 [B, T], 0 past the end. sampled bool [B, T]: True exactly on tokens our sampler drew, whatever they spell.
    logprobs float32 [B, T]: the sampler's log-probability of each sampled token, 0 elsewhere.
    turns int32 [B, T]: 0 on the prompt, t on the t-th policy segment and on the observation after it.
    lengths, prompt_lengths, groups int32 [B]; status int32 [B] (:class:`Status`); version: the weights' version.
    routing int16 [B, T, layers with experts, k] or None: the experts of each token, -1 where it has not been run.
    """

    ids: np.ndarray
    sampled: np.ndarray
    logprobs: np.ndarray
    turns: np.ndarray
    lengths: np.ndarray
    prompt_lengths: np.ndarray
    groups: np.ndarray
    status: np.ndarray
    routing: np.ndarray | None = None
    version: int = struct.field(pytree_node=False, default=0)


def append(trajectory: Trajectory, rows: np.ndarray, tokens: np.ndarray, counts: np.ndarray, turn: int, logprobs=None):
    """Write ``tokens`` [n, M] (counts [n] of them real) behind ``rows`` of a trajectory, in place.

    ``logprobs`` [n, M] marks the tokens as sampled; without it they count as given.
    """
    steps = np.arange(tokens.shape[1])[None, :]
    real = steps < counts[:, None]
    at_row = np.broadcast_to(rows[:, None], real.shape)[real]
    at_slot = (trajectory.lengths[rows][:, None] + steps)[real]
    trajectory.ids[at_row, at_slot] = tokens[real]
    trajectory.turns[at_row, at_slot] = turn
    if logprobs is not None:
        trajectory.sampled[at_row, at_slot] = True
        trajectory.logprobs[at_row, at_slot] = logprobs[real]
    trajectory.lengths[rows] += counts


def empty(prompts: np.ndarray, lengths: np.ndarray, group_size: int, size: int, version: int = 0) -> Trajectory:
    """A trajectory that holds only prompts [P, T]; each prompt gets ``group_size`` adjacent rows of ``size`` slots."""
    P = len(prompts)
    B = P * group_size
    trajectory = Trajectory(
        ids=np.zeros((B, size), np.int32), sampled=np.zeros((B, size), bool),
        logprobs=np.zeros((B, size), np.float32), turns=np.zeros((B, size), np.int32),
        lengths=np.zeros(B, np.int32), prompt_lengths=np.repeat(lengths, group_size).astype(np.int32),
        groups=np.repeat(np.arange(P, dtype=np.int32), group_size), status=np.zeros(B, np.int32), version=version,
    )  # fmt: skip
    append(trajectory, np.arange(B), np.repeat(prompts, group_size, axis=0), trajectory.prompt_lengths, 0)
    return trajectory
