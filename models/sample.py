"""Sampling: prefill once per group, one device loop per segment, the cache kept between turns.

A :class:`Session` holds the key-value cache of B rows. Slots equal positions and rows are packed to the left, so rows
of different lengths need no left padding; ``lens`` says how far each is filled. Three device programs drive it:

* ``prefill``: run each prompt once and copy its cache to the ``repeat`` members of its group;
* ``extend``: run new observation tokens of each row behind what the row already holds (nothing is run twice);
* ``decode``: one ``lax.while_loop`` that samples until every row has stopped.

All three donate the session. Lengths are arrays, and token and cache sizes are rounded up to buckets, so that a second
rollout compiles nothing new.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from models.attention import Look, attention
from models.config import Config
from models.params import Param, Params, declare, stacks
from models.rope import rope_table
from models.sharding import constrain
from models.stops import StopTable
from models.taps import Taps
from models.transformer import block, embed, rms_norm, unembed

FINISH_LENGTH, FINISH_EOS, FINISH_STOP = 0, 1, 2  # FINISH_STOP + j means stop string j


@struct.dataclass
class Session:
    """keys, values: one [B, K, S, H] array per layer; lens: int32 [B]; logits: float32 [B, V] for the next token.
    With latent attention keys are [B, 1, S, latent + turning part] and there are no values. routing: int16
    [B, S, layers with experts, k], the experts that each token was sent to, -1 in slots that are not filled; or None.

    Heads stand before time: the other way round, attention over the cache takes two to nine times as long on CPU.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lens: jax.Array
    logits: jax.Array
    routing: jax.Array | None = None

    @property
    def size(self) -> int:
        return self.keys[0].shape[2]


@struct.dataclass
class Decoded:
    """What one ``decode`` wrote. tokens int32 [B, M], logprobs float32 [B, M] (0 past the end), counts int32 [B],
    finish int32 [B]: FINISH_LENGTH, FINISH_EOS, or FINISH_STOP + index of the stop string. Idle rows have count 0."""

    tokens: jax.Array
    logprobs: jax.Array
    counts: jax.Array
    finish: jax.Array


def bucket(n: int, smallest: int = 16) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that holds ``n``: at most a third of a buffer is padding."""
    size = smallest
    while size < n:
        size = size * 3 // 2 if (size & (size - 1)) == 0 else size // 3 * 4
    return size


def decode_weights(
    params: Params, config: Config, fuse: bool = True, expert_mask: jax.Array | None = None
) -> dict[str, Any]:
    """The sampler's layout of the weights: one dict per layer in ``config.dtype``.

    Unstacked once per weight version rather than sliced every step; on one device (``fuse``) q, k, v and gate, up are
    joined, which halves the number of small matrix products, and every matrix is stored [out, in]: with few rows the
    product then reads it in order (1.2x to 1.3x per step measured on CPU, long prefills unchanged). Under a mesh leave
    them apart, so that each keeps its own sharding. expert_mask: bool [L, E], see ``models.transformer.forward``.
    """
    weights = _decode_weights(params, config, fuse)
    if expert_mask is None:
        return weights
    masks = iter(jnp.asarray(expert_mask))
    layers = ({**layer, "expert_mask": next(masks)} if "router" in layer else layer for layer in weights["layers"])
    return {**weights, "layers": tuple(layers)}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _decode_weights(params, config, fuse):
    exact = {name for name, p in _declared(config).items() if p.exact}

    def cast(name, w):
        return w if name in exact else w.astype(config.dtype)

    def one(stack, i):
        layer = {name: cast(name, w[i]) for name, w in params[stack].items()}
        if config.kv_lora:
            made = layer.pop("wkv_b")
            layer["wk_up"], layer["wv_up"] = made[..., : -config.value_dim], made[..., -config.value_dim :]
        if fuse:
            flat = lambda w: w.reshape(config.dim, -1).T  # noqa: E731
            if not config.kv_lora:
                layer["wqkv"] = jnp.concatenate([flat(layer.pop("w" + name)) for name in "qkv"], axis=0)
            if config.qkv_bias:
                layer["bqkv"] = jnp.concatenate([layer.pop("b" + name).reshape(-1) for name in "qkv"])
            layer["wo_out"] = layer.pop("wo").reshape(-1, config.dim).T
            for kind in ("w_", "s_"):
                if kind + "gate" in layer:
                    pair = layer.pop(kind + "gate").T, layer.pop(kind + "up").T
                    layer[kind + "gate_up"] = jnp.concatenate(pair, axis=0)
                    layer[kind + "down_out"] = layer.pop(kind + "down").T
        return layer

    names = [name for name, _, _ in stacks(config)]
    top = {name: w.astype(config.dtype) for name, w in params.items() if name not in names}
    if fuse and "head" in top:
        top["head_out"] = top.pop("head").T
    return {**top, "layers": tuple(one(name, i) for name, _, count in stacks(config) for i in range(count))}


def _declared(config: Config) -> dict[str, Param]:
    return {name: p for stack, _, _ in stacks(config) for name, p in declare(config)[stack].items()}


def _run(weights, config: Config, session: Session, tokens, counts, view: int):
    """Run tokens [B, T] (the first counts[b] of row b are real) behind each row; returns the session and hidden."""
    B, T = tokens.shape
    S = session.size
    offsets = jnp.arange(T)[None, :]
    positions = session.lens[:, None] + offsets
    # Padding goes out of range, each token to its own slot, since the scatter drops those and is told of no repeats.
    slots = jnp.where(offsets < counts[:, None], positions, S + offsets)
    rows = jnp.arange(B)[:, None]

    def kind(local: bool):  # what the queries of a layer turn by and look at
        window = jnp.int32(config.sliding_window) if local else None
        return rope_table(positions, config, local), Look(positions, window)

    kinds = {local: kind(local) for local in set(config.slides)}
    x = embed(weights, config, tokens)
    keys, values, routing = list(session.keys), list(session.values), session.routing
    write = {"mode": "drop", "unique_indices": True, "indices_are_sorted": True}
    for i, layer in enumerate(weights["layers"]):
        rope, look = kinds[config.slides[i]]

        def attend(q, k, v, taps, i=i, look=look):
            keys[i] = keys[i].at[rows, :, slots].set(k, **write)
            seen = keys[i][:, :, :view]
            if v is None:
                return attention(q, seen, seen[..., : config.kv_lora], look, config, taps)
            values[i] = values[i].at[rows, :, slots].set(v, **write)
            return attention(q, seen, values[i][:, :, :view], look, config, taps)

        taps = Taps(("moe.index",) if routing is not None else ())
        x = block(x, layer, rope, attend, config, taps)
        if "moe.index" in taps.values:
            index = taps.values["moe.index"].reshape(B, T, -1).astype(routing.dtype)
            routing = routing.at[rows, slots, i - config.first_dense].set(index, **write)
    hidden = rms_norm(x, weights["final_norm"], config)
    session = session.replace(keys=tuple(keys), values=tuple(values), lens=session.lens + counts, routing=routing)
    return session, hidden


def routing_of(session: Session, width: int) -> jax.Array:
    """The experts that the first ``width`` tokens of each row were sent to, as ``models.forward`` takes them: int16
    [layers with experts, B, width, k], -1 for tokens that have not been run. A last sampled token has been."""
    return session.routing[:, :width].transpose(2, 0, 1, 3)


def _last_logits(weights, config, hidden, counts):
    last = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    return unembed(weights, config, last)


@functools.partial(jax.jit, static_argnames=("config", "size", "repeat", "routing"))
def _prefill(weights, tokens, lengths, *, config, size, repeat, routing=False):
    B, T = tokens.shape
    latent = config.kv_lora + config.rope_dim
    shape = (B, 1, T, latent) if config.kv_lora else (B, config.kv_heads, T, config.head_dim)
    empty = tuple(jnp.zeros(shape, config.dtype) for _ in range(config.layers))
    session = Session(
        empty, () if config.kv_lora else empty, jnp.zeros(B, jnp.int32), jnp.zeros((B, config.vocab_size), jnp.float32)
    )
    if routing:
        session = session.replace(routing=jnp.full((B, T, config.moe_layers, config.top_k), -1, jnp.int16))
    session, hidden = _run(weights, config, session, tokens, lengths, T)
    session = session.replace(logits=_last_logits(weights, config, hidden, lengths))
    session = jax.tree.map(lambda x: jnp.repeat(x, repeat, axis=0), session)

    def grow(x):
        x = jnp.pad(x, ((0, 0), (0, 0), (0, size - T), (0, 0)))
        return constrain(x, "batch", "kv_heads", "time", "head_dim")

    if routing:
        longer = ((0, 0), (0, size - T), (0, 0), (0, 0))
        session = session.replace(routing=jnp.pad(session.routing, longer, constant_values=-1))
    return session.replace(keys=tuple(map(grow, session.keys)), values=tuple(map(grow, session.values)))


def _checked(tokens: np.ndarray, counts: np.ndarray, config: Config) -> tuple[np.ndarray, np.ndarray]:
    tokens, counts = np.asarray(tokens, np.int32), np.asarray(counts, np.int32)
    if counts.max(initial=0) > tokens.shape[1]:
        raise ValueError(f"a row is said to hold {counts.max()} tokens but the array has {tokens.shape[1]} columns")
    outside = (tokens < 0) | (tokens >= config.vocab_size)
    if outside.any():  # on device a gather would take another row instead, silently
        raise ValueError(
            f"token id {tokens[outside][0]} is outside the model's vocabulary of {config.vocab_size}: "
            "is this the tokenizer the model was trained with?"
        )
    return tokens, counts


def prefill(
    weights, config: Config, tokens: np.ndarray, lengths: np.ndarray, size: int, repeat: int = 1, routing: bool = False
) -> Session:
    """Start a session: each prompt is run once, its rows copied ``repeat`` times (group members are adjacent).

    tokens int32 [P, T] right-padded, lengths int32 [P] in 1..T, size = slots per row (rounded up to a bucket).
    routing: keep the experts of every token too, now and in later turns, see :func:`routing_of`.
    Raises ValueError when a prompt is empty or does not fit, and for ids outside the vocabulary.
    """
    tokens, lengths = _checked(tokens, lengths, config)
    if routing and not config.experts:
        raise ValueError(f"routing can be kept of models with experts, a {config.family} has none")
    if lengths.min(initial=1) < 1:
        raise ValueError("a prompt must hold at least one token")
    if lengths.max(initial=1) > size:
        raise ValueError(f"a prompt of {lengths.max()} tokens does not fit a session of {size} slots")
    width = bucket(tokens.shape[1])
    tokens = np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))
    size = max(bucket(size), width)
    return _prefill(weights, tokens, lengths, config=config, size=size, repeat=repeat, routing=routing)


@functools.partial(jax.jit, static_argnames=("config", "view"), donate_argnums=1)
def _extend(weights, session, tokens, counts, *, config, view):
    old = session.logits
    session, hidden = _run(weights, config, session, tokens, counts, view)
    logits = _last_logits(weights, config, hidden, counts)
    return session.replace(logits=jnp.where(counts[:, None] > 0, logits, old))


def extend(weights, config: Config, session: Session, tokens: np.ndarray, counts: np.ndarray, longest: int) -> Session:
    """Run new tokens behind each row. The session is donated.

    tokens int32 [B, T] right-padded, counts int32 [B] (0 leaves a row as it is), longest = the longest row after this
    call, which the caller knows on the host; it bounds what attention reads. Raises ValueError when it does not fit,
    and for ids outside the vocabulary.
    """
    tokens, counts = _checked(tokens, counts, config)
    if longest > session.size:
        raise ValueError(f"a row would hold {longest} tokens but the session has {session.size} slots")
    width = bucket(tokens.shape[1])
    tokens = np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))
    return _extend(weights, session, tokens, counts, config=config, view=view_of(longest, session.size))


def view_of(longest: int, size: int) -> int:
    """How many slots attention reads: all of a short session, a power of two of a long one (few programs)."""
    view = 512
    while view < longest:
        view *= 2
    return min(view, size)


def _pick(probs: jax.Array, uniform: jax.Array) -> jax.Array:
    """Index drawn from unnormalised probs [B, V] by inverting the distribution at uniform [B].

    Two levels of running sums (blocks of 64, then inside one block): one random number per row instead of the V of the
    Gumbel trick, and sums short enough for float32.
    """
    B, V = probs.shape
    blocks = jnp.pad(probs, ((0, 0), (0, -V % 64))).reshape(B, -1, 64)
    sums = jnp.cumsum(blocks.sum(-1), axis=-1)
    target = uniform * sums[:, -1]
    outer = _first_with_mass(blocks.sum(-1), (sums <= target[:, None]).sum(-1))
    inner = jnp.take_along_axis(blocks, outer[:, None, None], axis=1)[:, 0]
    before = jnp.take_along_axis(sums, outer[:, None], axis=1)[:, 0] - inner.sum(-1)
    index = _first_with_mass(inner, (jnp.cumsum(inner, axis=-1) <= (target - before)[:, None]).sum(-1))
    return (outer * 64 + index).astype(jnp.int32)


def _first_with_mass(mass: jax.Array, index: jax.Array) -> jax.Array:
    """The first place of mass [B, n] at or behind index [B] that is not 0, else the last one that is not.

    Sums round, and not in the same way for every prefix: without this, a token that may not be drawn at all (masked,
    outside the nucleus, padding of the last block) comes out about once in 10^6 draws.
    """
    n = mass.shape[-1]
    behind = (mass > 0) & (jnp.arange(n) >= index[:, None])
    last = n - 1 - jnp.argmax((mass > 0)[:, ::-1], axis=-1)
    return jnp.where(behind.any(-1), jnp.argmax(behind, axis=-1), last)


_CANDIDATES = 256


def _truncate(logits: jax.Array, top_p: jax.Array, top_k: jax.Array) -> jax.Array:
    """Set logits outside the nucleus (arXiv 1904.09751) or the top k (0 = all) to -inf; the best token always stays.

    The whole vocabulary is never sorted (on CPU that costs more than a forward of a small model). The best 256 tokens
    nearly always hold the smallest one that stays; where they do not, it is found by bisection.
    """
    count = jnp.where(top_k == 0, logits.shape[-1], top_k)
    top_p = jnp.where(top_p < 1, top_p, jnp.inf)  # else rounding of the sum would cut the tail off
    best = jax.lax.top_k(logits, min(_CANDIDATES, logits.shape[-1]))[0]
    probs = jnp.exp(best - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    rank = jnp.arange(best.shape[-1])[None, :]
    keep = ((jnp.cumsum(probs, axis=-1) - probs) < top_p) & (rank < count) | (rank == 0)
    inside = jnp.all(~keep[:, -1]) | (best.shape[-1] == logits.shape[-1])
    floor = jax.lax.cond(
        inside,
        lambda: jnp.min(jnp.where(keep, best, jnp.inf), axis=-1, keepdims=True),
        lambda: _bisect_floor(logits, top_p, count),
    )
    return jnp.where(logits >= floor, logits, -jnp.inf)


def _bisect_floor(logits: jax.Array, top_p: jax.Array, count: jax.Array) -> jax.Array:
    """The smallest logit [B, 1] above which lie less than ``top_p`` mass and fewer than ``count`` tokens.

    Exact in 32 steps: the search runs over float32 bit patterns, made to order as the numbers do.
    """
    flip = lambda bits: bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))  # noqa: E731
    keys = flip(jax.lax.bitcast_convert_type(logits, jnp.int32))
    probs = jax.nn.softmax(logits, axis=-1)

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # the mean without overflow
        above = keys > middle
        mass = jnp.sum(jnp.where(above, probs, 0.0), axis=-1, keepdims=True)
        fits = (mass < top_p) & (jnp.sum(above, axis=-1, keepdims=True) < count)
        return jnp.where(fits, low, jnp.minimum(middle + 1, high)), jnp.where(fits, middle, high)

    bounds = keys.min(-1, keepdims=True), keys.max(-1, keepdims=True)
    low, _ = jax.lax.fori_loop(0, 32, halve, bounds)
    # The bound need not be a logit itself; any value up to the next logit keeps the same tokens.
    return jax.lax.bitcast_convert_type(flip(low), jnp.float32)


def sample_token(logits, key, temperature, top_p, top_k, truncate: bool):
    """Draw one token per row; returns (tokens int32 [B], logprobs float32 [B]).

    temperature 0 takes the best token. The log-probability is that of the whole distribution at ``temperature`` (at 1
    for greedy), which is what a trainer's forward computes; truncation is not folded in.
    """
    scale = jnp.where(temperature > 0, temperature, 1.0)
    scaled = logits / scale
    top = jnp.max(scaled, axis=-1, keepdims=True)
    allowed = _truncate(scaled, top_p, top_k) if truncate else scaled
    drawn = _pick(jnp.exp(allowed - top), jax.random.uniform(key, logits.shape[:1]))
    tokens = jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1).astype(jnp.int32))
    chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(scaled, axis=-1)


@functools.partial(
    jax.jit, static_argnames=("config", "view", "steps", "truncate", "first_accept"), donate_argnames=("session",)
)
def _decode(
    weights, session, key, limits, temperature, top_p, top_k, is_eos, next_state,
    *, config, view, steps, truncate, first_accept,
):  # fmt: skip
    B = limits.shape[0]
    out = Decoded(
        jnp.full((B, steps), config.pad_id, jnp.int32), jnp.zeros((B, steps), jnp.float32),
        jnp.zeros(B, jnp.int32), jnp.full(B, FINISH_LENGTH, jnp.int32),
    )  # fmt: skip

    def body(carry):
        step, session, out, active, state = carry
        token, logprob = sample_token(
            session.logits, jax.random.fold_in(key, step), temperature, top_p, top_k, truncate
        )
        token = jnp.where(active, token, config.pad_id)
        state = jnp.where(active, next_state[state, token].astype(jnp.int32), state)
        eos, stopped = is_eos[token], state >= first_accept
        finish = jnp.where(eos, FINISH_EOS, jnp.where(stopped, FINISH_STOP + state - first_accept, FINISH_LENGTH))
        counts = out.counts + active
        out = Decoded(
            out.tokens.at[:, step].set(token),
            out.logprobs.at[:, step].set(jnp.where(active, logprob, 0.0)),
            counts,
            jnp.where(active, finish, out.finish),
        )
        # The stop token itself is run too: the next turn's observation goes behind it in the cache.
        session, hidden = _run(weights, config, session, token[:, None], active.astype(jnp.int32), view)
        logits = unembed(weights, config, hidden[:, 0])
        session = session.replace(logits=jnp.where(active[:, None], logits, session.logits))
        active = active & ~eos & ~stopped & (counts < limits)
        return step + 1, session, out, active, state

    def unfinished(carry):
        step, _, _, active, _ = carry
        return (step < steps) & jnp.any(active)

    carry = (jnp.int32(0), session, out, limits > 0, jnp.zeros(B, jnp.int32))
    _, session, out, _, _ = jax.lax.while_loop(unfinished, body, carry)
    return out, session


@functools.lru_cache(maxsize=16)
def _stop_arrays(stops: StopTable | None, eos_ids: tuple[int, ...], vocab_size: int) -> tuple[jax.Array, jax.Array]:
    """(next_state [states, V], is_eos [V]) on device, moved there once per table."""
    is_eos = np.zeros(vocab_size, bool)
    is_eos[list(eos_ids)] = True
    table = np.zeros((1, vocab_size), np.int16) if stops is None else stops.next_state[:, :vocab_size]
    # Checkpoints pad the embedding past the tokenizer's last id: such ids add nothing to the text, so the search stays
    # where it is.
    stay = np.repeat(np.arange(len(table), dtype=np.int16)[:, None], vocab_size - table.shape[1], axis=1)
    table = np.concatenate([table, stay], axis=1)
    return jnp.asarray(table), jnp.asarray(is_eos)


def decode(
    weights,
    config: Config,
    session: Session,
    key: jax.Array,
    limits: np.ndarray,
    *,
    stops: StopTable | None = None,
    longest: int | None = None,
    steps: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> tuple[Decoded, Session]:
    """Sample every row until EOS, a stop string or its limit. The session is donated.

    limits: int32 [B] new tokens per row, 0 for rows that only wait. longest: the longest row before this call, if the
    caller knows it. steps: width of the output, at least the largest limit; fix it to keep one program while limits
    vary. Returns what was written and the session, in which the written tokens are already cached.
    """
    limits = np.asarray(limits, np.int32)
    steps = steps or bucket(max(int(limits.max(initial=1)), 1))
    if steps < limits.max(initial=0):
        raise ValueError(f"steps={steps} is less than the largest limit {limits.max()}")
    longest = session.size if longest is None else longest + int(limits.max(initial=0))
    if longest > session.size:
        raise ValueError(f"rows may grow to {longest} tokens but the session has {session.size} slots; lower the limit")
    table, is_eos = _stop_arrays(stops, config.eos_ids, config.vocab_size)
    return _decode(
        weights, session, key, limits,
        jnp.float32(temperature), jnp.float32(top_p), jnp.int32(top_k), is_eos, table,
        config=config, view=view_of(longest, session.size), steps=steps,
        truncate=top_p < 1.0 or top_k > 0, first_accept=len(table) if stops is None else stops.first_accept,
    )  # fmt: skip
