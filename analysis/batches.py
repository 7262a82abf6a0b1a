"""What the analyses share: checks of token batches before device work, log-probabilities of given answers, and means of
a site over a stream of batches."""

import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from models.config import Config
from models.params import Params
from models.taps import Edit, Reduced, check_sites
from models.transformer import forward, unembed


def check_tokens(tokens: np.ndarray, config: Config) -> np.ndarray:
    """``tokens`` as int32 [B, T]. Raises ValueError for another shape and for ids outside the vocabulary, where a
    gather on device would silently take another row."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be integers [B, T], got {tokens.dtype} {list(tokens.shape)}")
    outside = (tokens < 0) | (tokens >= config.vocab_size)
    if outside.any():
        raise ValueError(
            f"token id {tokens[outside][0]} is outside the model's vocabulary of {config.vocab_size}: pad with "
            "config.pad_id and tokenize with the model's own tokenizer"
        )
    return tokens.astype(np.int32)


def check_per_token(values: np.ndarray, tokens: np.ndarray, name: str) -> np.ndarray:
    """``values`` as an array of the shape of ``tokens``, or ValueError naming ``name``."""
    values = np.asarray(values)
    if values.shape != np.shape(tokens):
        raise ValueError(f"{name} has shape {list(values.shape)}, but tokens have {list(np.shape(tokens))}")
    return values


def check_answers(
    tokens: np.ndarray, positions: np.ndarray, targets: np.ndarray, config: Config
) -> tuple[np.ndarray, np.ndarray]:
    """``positions`` as int32 [B, A] and ``targets`` as int32 [B, A] or [B, A, Y]; ValueError where they do not fit."""
    positions, targets = np.asarray(positions, np.int32), np.asarray(targets, np.int32)
    B, T = np.shape(tokens)
    if positions.ndim != 2 or len(positions) != B:
        raise ValueError(f"positions must be [B, A] with B = {B}, got {list(positions.shape)}")
    if targets.shape[:2] != positions.shape or targets.ndim not in (2, 3):
        raise ValueError(
            f"targets must be [B, A] or [B, A, Y] with [B, A] = {list(positions.shape)}, got {list(targets.shape)}"
        )
    if positions.max(initial=-1) >= T or positions.min(initial=-1) < -1:
        raise ValueError(f"positions lie in -1 (none) .. {T - 1}, got {positions.min()} .. {positions.max()}")
    used = targets[positions >= 0]
    if used.size and (used.min() < 0 or used.max() >= config.vocab_size):
        raise ValueError(f"target ids lie in 0 .. {config.vocab_size - 1}, got {used.min()} .. {used.max()}")
    return positions, np.where(np.expand_dims(positions, tuple(range(2, targets.ndim))) >= 0, targets, 0)


def window_of_layers(start: int, width: int, config: Config) -> np.ndarray:
    """bool [L], the layers [start, start + width). Raises ValueError where they are not all layers of the model."""
    if start < 0 or width < 1 or start + width > config.layers:
        raise ValueError(
            f"layers {start} .. {start + width - 1} do not lie in 0 .. {config.layers - 1}: change start or width"
        )
    layers = np.arange(config.layers)
    return (layers >= start) & (layers < start + width)


def rows_at(x: jax.Array, positions: jax.Array) -> jax.Array:
    """x [B, T, D] at ``positions`` int32 [B, A] (-1 reads position 0) -> [B, A, D]."""
    return jnp.take_along_axis(x, jnp.maximum(positions, 0)[:, :, None], axis=1)


def log_probabilities(logits: jax.Array, positions: jax.Array, targets: jax.Array) -> jax.Array:
    """Float32 log-probabilities of ``targets`` [B, A] or [B, A, Y] under logits [B, A, V]; 0 where positions are -1."""
    chosen = targets if targets.ndim == 3 else targets[..., None]
    logits = logits.astype(jnp.float32)
    found = jnp.take_along_axis(logits, chosen, axis=-1) - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return jnp.where(positions[..., None] >= 0, found, 0.0).reshape(targets.shape)


def traced_answer_logprobs(params, config, tokens, positions, targets, edit=None) -> jax.Array:
    """:func:`answer_logprobs` for callers that are being traced: nothing is checked."""
    hidden = forward(params, config, tokens, head=False, edit=edit).hidden
    return log_probabilities(unembed(params, config, rows_at(hidden, positions)), positions, targets)


_answer_logprobs = jax.jit(traced_answer_logprobs, static_argnums=1)


def answer_logprobs(
    params: Params, config: Config, tokens: np.ndarray, positions: np.ndarray, targets: np.ndarray,
    edit: Mapping[str, Edit] | None = None,
) -> jax.Array:  # fmt: skip
    """Log-probability of given tokens at given places, under any edit; new numbers in an edit compile nothing.

    tokens: int32 [B, T], right-padded. positions: int32 [B, A], where logits are read, that is, one before the token
    that is predicted; -1: none. targets: int32 [B, A], or [B, A, Y] to compare Y tokens at each place. Returns float32
    of the shape of ``targets``, 0 where there is no position. Only these rows pass the output head.
    """
    tokens = check_tokens(tokens, config)
    positions, targets = check_answers(tokens, positions, targets, config)
    return _answer_logprobs(params, config, tokens, positions, targets, dict(edit or {}))


@functools.partial(jax.jit, static_argnums=(1, 4))
def _site_sums(params, config, tokens, counted, site):
    def total(values):
        x = values[site].astype(jnp.float32)
        return jnp.sum(jnp.where(counted[..., None], x, 0.0), axis=(0, 1))

    return forward(params, config, tokens, head=False, reduce={"sum": Reduced((site,), total)}).records["sum"]


def site_means(
    params: Params, config: Config, batches: Iterable[tuple[np.ndarray, np.ndarray]], site: str
) -> np.ndarray:
    """Mean of a site over counted tokens, for mean ablation (our reading, arXiv 2505.11995 states none).

    batches: (tokens int32 [B, T], counted bool [B, T]). site: a name of ``models.taps`` whose values are [B, T, D].
    Returns float32 [L, D]; sums are float32 in a step and float64 between steps, and nothing per token leaves a layer.
    """
    check_sites((), None, config, {"sum": Reduced((site,), len)})
    total, count = 0.0, 0
    for tokens, counted in batches:
        tokens = check_tokens(tokens, config)
        counted = check_per_token(counted, tokens, "counted").astype(bool)
        total = total + np.asarray(_site_sums(params, config, tokens, counted, site), np.float64)
        count += int(counted.sum())
    if not count:
        raise ValueError(f"no token was counted for the mean of {site!r}; the masks are all False")
    return (total / count).astype(np.float32)
