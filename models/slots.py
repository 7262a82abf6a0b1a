"""A session whose rows belong to different conversations: they come and go while others go on.

A server keeps one :class:`models.sample.Session` of B rows. ``admit`` copies prompts that were run by
``models.sample.prefill`` into rows that are free, ``advance`` writes a few tokens in every row that is asked to, each
with settings of its own, and ``resize`` changes the number of rows and slots. A row that is left alone costs its share
of the products and nothing else; what an earlier conversation left in it lies behind ``lens``, where nothing looks.
All three take their numbers as arrays: a program is made per shape, never per request.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from models.config import Config
from models.draw import sample_rows
from models.sample import Session, hooks, run_tokens, view_of
from models.sharding import constrain
from models.transformer import unembed


@struct.dataclass
class Rows:
    """Settings of each row. limits int32 [B]: tokens to write, 0 where the row is free or waits. seeds uint32 [B, 2]
    and choices int32 [B] name its random numbers, drawn int32 [B] how many of them it has used. temperature (0:
    greedy), top_p float32 [B]; top_k int32 [B] (0: all)."""

    limits: np.ndarray
    seeds: np.ndarray
    choices: np.ndarray
    drawn: np.ndarray
    temperature: np.ndarray
    top_p: np.ndarray
    top_k: np.ndarray


@struct.dataclass
class Advanced:
    """What one ``advance`` wrote: tokens int32 [B, M] and their logprobs float32 [B, M] under the model itself
    (temperature 1); counts int32 [B]; ended bool [B], where the last token is an end token. With ``top`` the likeliest
    tokens of each step too: top_tokens int32 and top_logprobs float32 [B, M, top], the likeliest first, else None."""

    tokens: jax.Array
    logprobs: jax.Array
    counts: jax.Array
    ended: jax.Array
    top_tokens: jax.Array | None = None
    top_logprobs: jax.Array | None = None


def _along_time(session: Session, change) -> Session:
    """``change`` applied to every array of keys and values, whose third axis is time."""
    keys, values = jax.tree.map(change, (session.keys, session.values))
    return session.replace(keys=keys, values=values)


def _pinned(session: Session) -> Session:
    """The session laid out on the mesh as ``prefill`` lays out its cache, logits whole in every row.

    What all three programs return, and so take: left to the compiler, each would lay it out in a way of its own, and
    the others would be compiled anew for every way that occurs.
    """
    session = _along_time(session, lambda x: constrain(x, "batch", "kv_heads", "time", "head_dim"))
    return session.replace(
        lens=constrain(session.lens, "batch"), logits=constrain(session.logits, "batch", "model")
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("size",))
def _resize(session: Session, rows: jax.Array, *, size: int) -> Session:
    def change(x):
        x = x[rows]
        if size <= x.shape[2]:
            return x[:, :, :size]
        return jnp.pad(x, ((0, 0), (0, 0), (0, size - x.shape[2]), (0, 0)))

    session = _along_time(session, change)
    return _pinned(session.replace(lens=session.lens[rows], logits=session.logits[rows]))


def resize(session: Session, rows: np.ndarray, size: int) -> Session:
    """The session of the given rows int32 [B'] (of those repeated all but one are free), with ``size`` slots each.

    The caller knows that no row that matters is longer than ``size``.
    """
    return _resize(session, jnp.asarray(rows, jnp.int32), size=size)


@functools.partial(jax.jit, donate_argnums=0)
def _admit(session: Session, new: Session, source: jax.Array, target: jax.Array) -> Session:
    keys, values = jax.tree.map(
        lambda old, new: old.at[target, :, : new.shape[2]].set(new[source], mode="drop"),
        (session.keys, session.values), (new.keys, new.values),
    )  # fmt: skip
    return _pinned(session.replace(
        keys=keys, values=values, lens=session.lens.at[target].set(new.lens[source], mode="drop"),
        logits=session.logits.at[target].set(new.logits[source], mode="drop"),
    ))  # fmt: skip


def admit(session: Session, new: Session, source: np.ndarray, target: np.ndarray) -> Session:
    """Copies row ``source[i]`` of ``new`` into row ``target[i]``, int32 [R]; the session is donated.

    A target of B or more copies nothing, so that R need not be the number of rows. Raises ValueError where ``new`` has
    more slots.
    """
    if new.size > session.size:
        raise ValueError(f"prompts of {new.size} slots do not fit rows of {session.size}: resize the session first")
    return _admit(
        session, new.replace(records={}, routing=None), jnp.asarray(source, jnp.int32), jnp.asarray(target, jnp.int32)
    )


@functools.partial(
    jax.jit, static_argnames=("config", "view", "steps", "truncate", "top"), donate_argnames=("session",)
)
def _advance(weights, session: Session, rows: Rows, is_eos, hooks, *, config, view, steps, truncate, top):
    B = rows.limits.shape[0]

    def of_row(seed, choice):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed[0]), seed[1]), choice)

    keys = jax.vmap(of_row)(rows.seeds, rows.choices)
    shape = (B, steps, top)
    out = Advanced(
        jnp.full((B, steps), config.pad_id, jnp.int32), jnp.zeros((B, steps), jnp.float32), jnp.zeros(B, jnp.int32),
        jnp.zeros(B, bool),
        *((jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)) if top else (None, None)),
    )  # fmt: skip

    def body(carry):
        step, session, out, active = carry
        uniform = jax.vmap(lambda key, n: jax.random.uniform(jax.random.fold_in(key, n)))(keys, rows.drawn + step)
        logits = session.logits
        token, _ = sample_rows(
            logits, uniform, rows.temperature[:, None], rows.top_p[:, None], rows.top_k[:, None], truncate
        )
        token = jnp.where(active, token, config.pad_id)
        logp = jax.nn.log_softmax(logits)
        logprob = jnp.take_along_axis(logp, token[:, None], axis=-1)[:, 0]
        counts = out.counts + active
        ended = active & is_eos[token]
        out = out.replace(
            tokens=out.tokens.at[:, step].set(token),
            logprobs=out.logprobs.at[:, step].set(jnp.where(active, logprob, 0.0)),
            counts=counts,
            ended=out.ended | ended,
        )
        if top:
            best, index = jax.lax.top_k(logp, top)
            out = out.replace(
                top_tokens=out.top_tokens.at[:, step].set(index.astype(jnp.int32)),
                top_logprobs=out.top_logprobs.at[:, step].set(best),
            )
        session, hidden = run_tokens(weights, config, session, token[:, None], active.astype(jnp.int32), view, hooks)
        new = unembed(weights, config, hidden[:, 0])
        session = _pinned(session.replace(logits=jnp.where(active[:, None], new, logits), records={}))
        return step + 1, session, out, active & ~ended & (counts < rows.limits)

    def unfinished(carry):
        step, _, _, active = carry
        return (step < steps) & jnp.any(active)

    _, session, out, _ = jax.lax.while_loop(unfinished, body, (jnp.int32(0), session, out, rows.limits > 0))
    return out, session


@functools.lru_cache(maxsize=16)
def _end_tokens(eos_ids: tuple[int, ...], vocab_size: int) -> jax.Array:
    is_eos = np.zeros(vocab_size, bool)
    is_eos[list(eos_ids)] = True
    return jnp.asarray(is_eos)


def advance(
    weights, config: Config, session: Session, rows: Rows, lengths: np.ndarray, steps: int, *, top: int = 0
) -> tuple[Advanced, Session]:
    """Samples at most ``steps`` tokens in every row with a limit, or until its end token. The session is donated.

    lengths: int [B], tokens that each row holds before the call, which the caller knows on the host. top: how many of
    the likeliest tokens to return at each step. A row's tokens depend on its own prompt and settings alone, up to the
    rounding of products of other shapes: its n-th token is drawn by the n-th random number of (seed, choice).
    Raises ValueError where a row does not fit the session or the model's context, or ``top`` the vocabulary.
    """
    reach = int(np.max(np.where(rows.limits > 0, lengths + np.minimum(rows.limits, steps), 0), initial=0))
    if reach > session.size or reach > config.max_len:
        raise ValueError(
            f"a row may grow to {reach} tokens, but the session has {session.size} slots and the model's context is "
            f"max_len={config.max_len}: resize the session or lower the limit"
        )
    if not 0 <= top <= config.vocab_size:
        raise ValueError(f"top={top} likeliest tokens of a vocabulary of {config.vocab_size}")
    truncate = bool(np.any(rows.top_p < 1) or np.any(rows.top_k > 0))
    return _advance(
        weights, session.replace(records={}), rows, _end_tokens(config.eos_ids, config.vocab_size), hooks(config),
        config=config, view=view_of(reach, session.size), steps=steps, truncate=truncate, top=top,
    )  # fmt: skip
