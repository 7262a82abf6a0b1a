"""Drawing tokens from logits: temperature, nucleus and top-k, without sorting the vocabulary."""

import jax
import jax.numpy as jnp


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
    return sample_rows(logits, jax.random.uniform(key, logits.shape[:1]), temperature, top_p, top_k, truncate)


def sample_rows(logits, uniform, temperature, top_p, top_k, truncate: bool):
    """:func:`sample_token` by given random numbers uniform [B]. The settings are scalars, or [B, 1] where each row has
    its own."""
    scale = jnp.where(temperature > 0, temperature, 1.0)
    scaled = logits / scale
    top = jnp.max(scaled, axis=-1, keepdims=True)
    allowed = _truncate(scaled, top_p, top_k) if truncate else scaled
    drawn = _pick(jnp.exp(allowed - top), uniform)
    tokens = jnp.where(jnp.ravel(temperature) > 0, drawn, jnp.argmax(logits, axis=-1).astype(jnp.int32))
    chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(scaled, axis=-1)
