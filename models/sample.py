"""Sampling: prefill once per group, one device loop per segment, the cache kept between turns.

A :class:`Session` holds the key-value cache of B rows. Slots equal positions and rows are packed to the left, so rows
of different lengths need no left padding; ``lens`` says how far each is filled. Three device programs drive it:

* ``prefill``: run each prompt once and copy its cache to the ``repeat`` members of its group;
* ``extend``: run new observation tokens of each row behind what the row already holds (nothing is run twice);
* ``decode``: one ``lax.while_loop`` that samples until every row has stopped.

All three donate the session and take hooks (``models.taps``): ``edit`` changes what flows through a site, ``record``
and ``reduce`` leave what they keep in ``records``. Lengths are arrays, and token and cache sizes are rounded up to
buckets, so that a second rollout compiles nothing new.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec

from models.attention import Look, attention
from models.config import Config
from models.draw import sample_token
from models.linear import Quantized, quantize
from models.platform import platform
from models.rope import rope_table
from models.sharding import constrain, spec_for, to_host
from models.stops import StopTable
from models.taps import Edit, Reduced, Taps, check_sites, layers_of
from models.transformer import block, check_tokens, embed, rms_norm, unembed

_SORTED = {"mode": "drop", "unique_indices": True, "indices_are_sorted": True}  # of scatters into a cache
FINISH_LENGTH, FINISH_EOS, FINISH_STOP = 0, 1, 2  # FINISH_STOP + j means stop string j


@struct.dataclass
class Session:
    """keys, values: one [B, K, S, H] array per layer, or in eight bits with a scale per key; lens: int32 [B]; logits:
    float32 [B, V] for the next token. With latent attention keys are [B, 1, S, latent + turning part], for TPUs with
    zeros behind (:func:`_latent_width`), and there are no values. routing: int16 [B, S, layers with experts, k], the
    experts that each token was sent to, -1 in slots that are not filled; or None. records: what hooks kept of the last
    ``prefill`` (of its prompts, once each) or ``extend``, as
    ``models.forward`` gives it.

    Heads stand before time: the other way round, attention over the cache takes two to nine times as long on CPU.
    """

    keys: tuple[jax.Array | Quantized, ...]
    values: tuple[jax.Array | Quantized, ...]
    lens: jax.Array
    logits: jax.Array
    routing: jax.Array | None = None
    records: dict[str, Any] = struct.field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.keys[0].shape[2]


@struct.dataclass
class Decoded:
    """What one ``decode`` wrote. tokens int32 [B, M], logprobs float32 [B, M] (0 past the end), counts int32 [B],
    finish int32 [B]: FINISH_LENGTH, FINISH_EOS, or FINISH_STOP + index of the stop string. Idle rows have count 0.
    records: what hooks kept while token m was run is at [m] of a leading axis M, for all rows: ``counts`` says which of
    them were still running."""

    tokens: jax.Array
    logprobs: jax.Array
    counts: jax.Array
    finish: jax.Array
    records: dict[str, Any] = struct.field(default_factory=dict)


def bucket(n: int, smallest: int = 16) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that holds ``n``: at most a third of a buffer is padding."""
    size = smallest
    while size < n:
        size = size * 3 // 2 if (size & (size - 1)) == 0 else size // 3 * 4
    return size


@struct.dataclass
class _Hooks:
    """What is to be recorded, edited and reduced; the names are part of the program, numbers are not."""

    edit: dict[str, Edit]
    record: tuple[str, ...] = struct.field(pytree_node=False, default=())
    reduce: dict[str, Reduced] = struct.field(default_factory=dict)

    def of_layer(self, config: Config, i: int, routing: bool) -> Taps:
        here = layers_of(config, i, 1)
        edit = {
            site: jax.tree.map(lambda v, at=here[site].start: v[at], hook)
            for site, hook in self.edit.items() if site in here
        }  # fmt: skip
        record = tuple(site for site in self.record if site in here)
        if routing and "moe.index" in here:
            record += ("moe.index",)
        return Taps(record, edit, {name: what for name, what in self.reduce.items() if set(what.sites) <= set(here)})

    @property
    def keep(self) -> bool:
        return bool(self.record or self.reduce)


def hooks(config: Config, record=(), edit=None, reduce=None) -> _Hooks:
    """What the device programs below take for hooks; ``models.taps`` says what they are."""
    check_sites(record, edit, config, reduce)
    return _Hooks(dict(edit or {}), tuple(record), dict(reduce or {}))


def _latent_width(config: Config) -> int:
    """Width of a slot of the cache with latent attention: on a TPU whole lanes of 128.

    The compiler pads DeepSeek-V3's 576 to 640 anyway, unless time is last in memory, which is why arrays that go into a
    program or out of it have it last. The loop over tokens writes slots and has the width last: it would copy all of
    the cache where it begins and where it ends, a second cache in memory. Of whole lanes both have the same order.
    """
    width = config.kv_lora + config.rope_dim
    return -(-width // 128) * 128 if platform() == "tpu" else width


def _widened(x: jax.Array, width: int) -> jax.Array:
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, width - x.shape[-1]),))


def _write(cache: jax.Array | Quantized, rows, slots, x: jax.Array) -> jax.Array | Quantized:
    """x [B, T, K, H] at ``slots`` [B, T] of a cache [B, K, S, H]."""
    if isinstance(cache, Quantized):
        x = quantize(x, -1)
    if platform() == "tpu":
        return jax.tree.map(lambda cache, x: _write_by_head(cache, slots, x), cache, x)
    return jax.tree.map(lambda cache, x: cache.at[rows, :, slots].set(x, **_SORTED), cache, x)


def _write_by_head(cache: jax.Array, slots: jax.Array, x: jax.Array) -> jax.Array:
    """:func:`_write` with each head of a row as a row of its own.

    A scatter of all heads of a token at once wants heads inside time. On a TPU the loop over tokens would then hold the
    cache in that order, and copy all of it where it begins and where it ends: a second cache in memory. The compiler
    turns other forms of the scatter into that one, rows and heads in one dimension excepted; with these on a mesh it
    could not tell that every device keeps to its own, so each is told.
    """

    def local(cache, slots, x):
        (B, K, S, H), T = cache.shape, slots.shape[1]
        at = jnp.arange(B * K)[:, None], jnp.repeat(slots, K, axis=0)
        x = x.swapaxes(1, 2).reshape(B * K, T, H)
        return cache.reshape(B * K, S, H).at[at].set(x, **_SORTED).reshape(cache.shape)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        batch, heads = spec_for(mesh, cache.shape[:2], ("batch", "kv_heads"))
        whole, tokens = PartitionSpec(batch, heads), PartitionSpec(batch, None, heads)
        local = jax.shard_map(local, in_specs=(whole, PartitionSpec(batch), tokens), out_specs=whole)
    return local(cache, slots, x)


def _read(cache: jax.Array | Quantized, view: int, dtype: str) -> jax.Array:
    return cache[:, :, :view].astype(dtype)


def run_tokens(weights, config: Config, session: Session, tokens, counts, view: int, hooks: _Hooks):
    """Run tokens [B, T] (the first counts[b] of row b are real) behind each row; returns the session, with records,
    and hidden."""
    B, T = tokens.shape
    S = session.size
    offsets = jnp.arange(T)[None, :]
    positions = session.lens[:, None] + offsets
    real = offsets < counts[:, None]
    # Padding goes out of range, each token to its own slot, since the scatter drops those and is told of no repeats.
    slots = jnp.where(real, positions, S + offsets)
    rows = jnp.arange(B)[:, None]

    def kind(local: bool):  # what the queries of a layer turn by and look at
        window = jnp.int32(config.sliding_window) if local else None
        return rope_table(positions, config, local), Look(positions, window)

    kinds = {local: kind(local) for local in set(config.slides)}
    edge = Taps(hooks.record, hooks.edit)
    x = edge("embed", embed(weights, config, tokens))
    keys, values, routing = list(session.keys), list(session.values), session.routing
    parts: dict[str, list] = {}
    for i, layer in enumerate(weights["layers"]):
        rope, look = kinds[config.slides[i]]

        def attend(q, k, v, taps, i=i, look=look):
            if v is None:  # zeros behind both leave products of queries and keys as they are
                q, k = (_widened(x, _latent_width(config)) for x in (q, k))
            keys[i] = _write(keys[i], rows, slots, k)
            seen = _read(keys[i], view, k.dtype)
            if v is None:
                return attention(q, seen, seen[..., : config.kv_lora], look, config, taps)
            values[i] = _write(values[i], rows, slots, v)
            return attention(q, seen, _read(values[i], view, v.dtype), look, config, taps)

        taps = hooks.of_layer(config, i, routing is not None)
        x = block(x, layer, rope, attend, config, taps)
        records = taps.finish()
        if routing is not None and "moe.index" in records:
            index = records["moe.index"].reshape(B, T, -1).astype(routing.dtype)
            routing = routing.at[rows, slots, i - config.first_dense].set(index, **_SORTED)
        for name, value in records.items():
            parts.setdefault(name, []).append(value)
    if "moe.index" not in hooks.record:
        parts.pop("moe.index", None)
    records = {name: jax.tree.map(lambda *x: jnp.stack(x), *layers) for name, layers in parts.items()}
    hidden = edge("final", rms_norm(x, weights["final_norm"], config))
    session = session.replace(
        keys=tuple(keys), values=tuple(values), lens=session.lens + counts, routing=routing,
        records={**records, **edge.values},
    )  # fmt: skip
    return session, hidden


def routing_of(session: Session, width: int) -> jax.Array:
    """The experts that the first ``width`` tokens of each row were sent to, as ``models.forward`` takes them: int16
    [layers with experts, B, width, k], -1 for tokens that have not been run. A last sampled token has been."""
    return session.routing[:, :width].transpose(2, 0, 1, 3)


def _last_logits(weights, config, hidden, counts):
    last = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    return unembed(weights, config, last)


@functools.partial(jax.jit, static_argnames=("config", "size", "repeat", "routing", "int8"))
def _prefill(weights, tokens, lengths, hooks, *, config, size, repeat, routing, int8):
    B, T = tokens.shape
    shape = (B, 1, T, _latent_width(config)) if config.kv_lora else (B, config.kv_heads, T, config.head_dim)

    def zeros():
        if int8:
            return Quantized(jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:-1], 1), jnp.float32))
        return jnp.zeros(shape, config.dtype)

    empty = tuple(zeros() for _ in range(config.layers))
    session = Session(
        empty, () if config.kv_lora else empty, jnp.zeros(B, jnp.int32), jnp.zeros((B, config.vocab_size), jnp.float32)
    )
    if routing:
        session = session.replace(routing=jnp.full((B, T, config.moe_layers, config.top_k), -1, jnp.int16))
    session, hidden = run_tokens(weights, config, session, tokens, lengths, T, hooks)
    session, records = (
        session.replace(logits=_last_logits(weights, config, hidden, lengths), records={}),
        session.records,
    )
    session = jax.tree.map(lambda x: jnp.repeat(x, repeat, axis=0), session)

    def grow(x):
        x = jnp.pad(x, ((0, 0), (0, 0), (0, size - T), (0, 0)))
        return constrain(x, "batch", "kv_heads", "time", "head_dim")

    if routing:
        longer = ((0, 0), (0, size - T), (0, 0), (0, 0))
        session = session.replace(routing=jnp.pad(session.routing, longer, constant_values=-1))
    keys, values = jax.tree.map(grow, (session.keys, session.values))
    return session.replace(keys=keys, values=values, records=records)


def _checked(tokens: np.ndarray, counts: np.ndarray, config: Config) -> tuple[np.ndarray, np.ndarray]:
    tokens, counts = np.asarray(tokens, np.int32), np.asarray(counts, np.int32)
    if counts.max(initial=0) > tokens.shape[1]:
        raise ValueError(f"a row is said to hold {counts.max()} tokens but the array has {tokens.shape[1]} columns")
    check_tokens(tokens, config)
    return tokens, counts


def _check_reach(tokens: int, config: Config, what: str) -> None:
    """Raise ValueError where a row would leave the positions that the weights were made for."""
    if tokens > config.max_len:
        raise ValueError(
            f"{what} {tokens} tokens, but the model's context is max_len={config.max_len}: shorten the prompt or lower "
            "the limit"
        )


def prefill(
    weights, config: Config, tokens: np.ndarray, lengths: np.ndarray, size: int, repeat: int = 1, *,
    routing: bool = False, int8: bool = False, record: tuple[str, ...] = (), edit: Mapping[str, Edit] | None = None,
    reduce: Mapping[str, Reduced] | None = None,
) -> Session:  # fmt: skip
    """Start a session: each prompt is run once, its rows copied ``repeat`` times (group members are adjacent).

    tokens int32 [P, T] right-padded, lengths int32 [P] in 1..T, size = slots per row (rounded up to a bucket).
    routing: keep the experts of every token too, now and in later turns, see :func:`routing_of`. int8: the cache in
    eight bits with a scale per key and head, half of bfloat16's memory. record, edit, reduce: hooks on the P prompts.
    Raises ValueError when a prompt is empty, does not fit or is longer than the model's context, and for ids outside
    the vocabulary.
    """
    tokens, lengths = _checked(tokens, lengths, config)
    if routing and not config.experts:
        raise ValueError(f"routing can be kept of models with experts, a {config.family} has none")
    if lengths.min(initial=1) < 1:
        raise ValueError("a prompt must hold at least one token")
    if lengths.max(initial=1) > size:
        raise ValueError(f"a prompt of {lengths.max()} tokens does not fit a session of {size} slots")
    _check_reach(int(lengths.max(initial=0)), config, "a prompt has")
    width = bucket(tokens.shape[1])
    tokens = np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))
    size = max(bucket(size), width)
    return _prefill(
        weights, tokens, lengths, hooks(config, record, edit, reduce), config=config, size=size, repeat=repeat,
        routing=routing, int8=int8,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("config", "view"), donate_argnums=1)
def _extend(weights, session, tokens, counts, hooks, *, config, view):
    old = session.logits
    session, hidden = run_tokens(weights, config, session, tokens, counts, view, hooks)
    logits = _last_logits(weights, config, hidden, counts)
    return session.replace(logits=jnp.where(counts[:, None] > 0, logits, old))


def extend(
    weights, config: Config, session: Session, tokens: np.ndarray, counts: np.ndarray, longest: int, *,
    record: tuple[str, ...] = (), edit: Mapping[str, Edit] | None = None, reduce: Mapping[str, Reduced] | None = None,
) -> Session:  # fmt: skip
    """Run new tokens behind each row. The session is donated.

    tokens int32 [B, T] right-padded, counts int32 [B] (0 leaves a row as it is), longest = the longest row after this
    call, which the caller knows on the host; it bounds what attention reads. record, edit, reduce: hooks, whose values
    are of all rows. Raises ValueError when it does not fit the session or the model's context, and for ids outside the
    vocabulary.
    """
    tokens, counts = _checked(tokens, counts, config)
    if longest > session.size:
        raise ValueError(f"a row would hold {longest} tokens but the session has {session.size} slots")
    _check_reach(longest, config, "a row would hold")
    width = bucket(tokens.shape[1])
    tokens = np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))
    return _extend(
        weights, session.replace(records={}), tokens, counts, hooks(config, record, edit, reduce), config=config,
        view=view_of(longest, session.size),
    )  # fmt: skip


def least_view() -> int:
    """The fewest slots that attention reads of a longer session. A CPU copies what is read, and of more than some 16
    rows copy and cache lie in main memory: half the time of a step with 128 rows of 60 tokens was spent on the other
    452 slots. For accelerators a program less to compile is worth more."""
    return 128 if platform() == "cpu" else 512


def view_of(longest: int, size: int) -> int:
    """How many slots attention reads: all of a short session, a power of two of a long one (few programs)."""
    view = least_view()
    while view < longest:
        view *= 2
    return min(view, size)


@functools.partial(
    jax.jit, static_argnames=("config", "view", "steps", "truncate", "first_accept"), donate_argnames=("session",)
)
def _decode(
    weights, session, key, limits, temperature, top_p, top_k, is_eos, next_state, hooks,
    *, config, view, steps, truncate, first_accept,
):  # fmt: skip
    B = limits.shape[0]
    out = Decoded(
        jnp.full((B, steps), config.pad_id, jnp.int32), jnp.zeros((B, steps), jnp.float32),
        jnp.zeros(B, jnp.int32), jnp.full(B, FINISH_LENGTH, jnp.int32),
    )  # fmt: skip

    def run(session, token, active):
        session, hidden = run_tokens(weights, config, session, token[:, None], active.astype(jnp.int32), view, hooks)
        return session.replace(records={}), hidden, session.records

    if hooks.keep:
        kept = jax.eval_shape(lambda: run(session, limits, limits > 0)[2])
        out = out.replace(records=jax.tree.map(lambda r: jnp.zeros((steps, *r.shape), r.dtype), kept))

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
            out.records,
        )
        # The stop token itself is run too: the next turn's observation goes behind it in the cache.
        session, hidden, kept = run(session, token, active)
        out = out.replace(records=jax.tree.map(lambda all, new: all.at[step].set(new), out.records, kept))
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
    record: tuple[str, ...] = (),
    edit: Mapping[str, Edit] | None = None,
    reduce: Mapping[str, Reduced] | None = None,
) -> tuple[Decoded, Session]:
    """Sample every row until EOS, a stop string or its limit. The session is donated.

    limits: int32 [B] new tokens per row, 0 for rows that only wait. longest: the longest row before this call, if the
    caller knows it. steps: width of the output, at least the largest limit; fix it to keep one program while limits
    vary. record, edit, reduce: hooks on every step; what they keep is in ``Decoded.records``. Returns what was written
    and the session, in which the written tokens are already cached. Raises ValueError where a row and its limit do not
    fit the session or the model's context.
    """
    limits = np.asarray(limits, np.int32)
    steps = steps or bucket(max(int(limits.max(initial=1)), 1))
    if steps < limits.max(initial=0):
        raise ValueError(f"steps={steps} is less than the largest limit {limits.max()}")
    longest = session.size if longest is None else longest + int(limits.max(initial=0))
    if longest > session.size:
        raise ValueError(f"rows may grow to {longest} tokens but the session has {session.size} slots; lower the limit")
    if longest > config.max_len:  # perhaps no row has both that length and the largest limit; the device knows
        reach = np.where(limits > 0, to_host(session.lens) + limits, 0)
        _check_reach(int(reach.max(initial=0)), config, "with its limit a row may grow to")
    table, is_eos = _stop_arrays(stops, config.eos_ids, config.vocab_size)
    return _decode(
        weights, session.replace(records={}), key, limits,
        jnp.float32(temperature), jnp.float32(top_p), jnp.int32(top_k), is_eos, table,
        hooks(config, record, edit, reduce),
        config=config, view=view_of(longest, session.size), steps=steps,
        truncate=top_p < 1.0 or top_k > 0, first_accept=len(table) if stops is None else stops.first_accept,
    )  # fmt: skip
