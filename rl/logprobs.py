"""Log-probabilities of given tokens without ever holding a full [B, T, V] float32 array.

The head and the softmax run over chunks of time, and where there is more than one, each is recomputed in the backward
pass, so memory is that of one chunk: [B, chunk, V].
"""

from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np

from models.config import Config
from models.params import Params
from models.sample import bucket
from models.taps import Reduced
from models.transformer import forward, unembed


def _chunk_logprobs(params, config, hidden, targets, temperature, entropy):
    """hidden [B, C, D], targets [B, C] -> log-probs [B, C] and entropies [B, C] or None, in nats."""
    logits = unembed(params, config, hidden).astype(jnp.float32) / temperature
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    # Compare-and-sum instead of a gather: under a vocabulary split over devices it needs one all-reduce, and its
    # gradient is a select where a gather's would be a scatter.
    chosen = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    logp = jnp.where(chosen, logits, 0.0).sum(axis=-1) - normaliser
    if not entropy:
        return logp, None
    probs = jnp.exp(logits - normaliser[..., None])
    return logp, normaliser - (probs * logits).sum(axis=-1)


def selection(mask: np.ndarray, smallest: int = 64) -> np.ndarray | None:
    """Columns to score, int32 [B, M], from a host mask [B, T]: every masked column of a row, filled up with others.

    M is a bucket of at least ``smallest``, so that few shapes reach the compiler. None when that saves nothing.
    """
    mask = np.asarray(mask) > 0
    most = bucket(int(mask.sum(axis=1).max(initial=1)), smallest)
    if most >= mask.shape[1]:
        return None
    return np.argsort(~mask, axis=1, kind="stable")[:, :most].astype(np.int32)


def token_logprobs(
    params: Params,
    config: Config,
    ids: jax.Array,
    lengths: jax.Array | None = None,
    temperature: float | jax.Array = 1.0,
    chunk: int = 256,
    *,
    entropy: bool = False,
    select: jax.Array | None = None,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    routing: jax.Array | None = None,
    reduce: Mapping[str, Reduced] | None = None,
):
    """log p(ids[b, t] | ids[b, :t]) at every position, float32 [B, T]; column 0 and padding are 0.

    ids: int32 [B, T], right-padded. lengths: int32 [B] or None (all T count). temperature: what the sampler divided
    its logits by (> 0). chunk: positions per recomputed piece; memory grows with B * chunk * V * 4 bytes.
    select: int32 [B, M], the columns whose values are wanted (see :func:`selection`); the head and its softmax run on
    these alone and all other columns are 0. Tool text and prompts are most of a trajectory, so this saves most of it.
    routing: int [B, T, layers with experts, k], experts to take as ``models.forward`` does, tokens first.
    positions, segment_ids: for packed rows, see ``models.forward``; the value at a segment's first token conditions on
    the segment before and must be masked by the caller.
    entropy: also return the entropy in nats of the distribution ids[b, t] was drawn from, float32 [B, T].
    reduce: hooks, as ``models.forward`` takes them; what they keep is returned too, last.
    """
    chex.assert_rank(ids, 2)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 position, not {chunk}")
    if isinstance(temperature, int | float) and temperature <= 0:
        raise ValueError(f"temperature must be above 0, not {temperature}: greedy choices have no log-probability")
    B, T = ids.shape
    routing = None if routing is None else jnp.moveaxis(routing, 2, 0)
    run = forward(
        params, config, ids, head=False, positions=positions, segment_ids=segment_ids, routing=routing, reduce=reduce
    )
    hidden = run.hidden
    rows = jnp.arange(B)[:, None]
    if select is None:
        hidden, targets = hidden[:, :-1], ids[:, 1:]
    else:
        hidden, targets = hidden[rows, jnp.maximum(select - 1, 0)], ids[rows, select]
    M = targets.shape[1]
    pieces = max(1, -(-M // chunk))
    size = -(-M // pieces)
    pad = pieces * size - M
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(B, pieces, size, -1)
    targets = jnp.pad(targets, ((0, 0), (0, pad))).reshape(B, pieces, size)

    # Only the head is closed over, so that the scan's backward pass accumulates one gradient, not the model's.
    head = {name: params[name] for name in ("embed", "head") if name in params}

    def piece(head, hidden, targets):
        return _chunk_logprobs(head, config, hidden, targets, temperature, entropy)

    if pieces > 1:  # a single piece would only be computed twice: its backward pass comes right after it
        piece = jax.checkpoint(piece)
    with jax.named_scope("token_logprobs"):
        _, out = jax.lax.scan(
            lambda carry, xs: (carry, piece(head, *xs)), None, (hidden.swapaxes(0, 1), targets.swapaxes(0, 1))
        )

    def restore(values):  # [pieces, B, size] -> [B, T]
        values = values.swapaxes(0, 1).reshape(B, pieces * size)[:, :M]
        if select is None:
            values = jnp.pad(values, ((0, 0), (1, 0)))
        else:
            values = jnp.zeros((B, T)).at[rows, select].set(jnp.where(select > 0, values, 0.0))
        return values if lengths is None else jnp.where(jnp.arange(T) < lengths[:, None], values, 0.0)

    logp, entropies = out
    found = (restore(logp),) + ((restore(entropies),) if entropy else ()) + ((run.records,) if reduce else ())
    return found if len(found) > 1 else found[0]
