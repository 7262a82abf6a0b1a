"""Rotary positions (arXiv 2104.09864): frequencies, their scaling to longer contexts, and the turning itself."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from models.config import Config, RopeScaling


def frequencies(config: Config, local: bool = False) -> tuple[np.ndarray, float]:
    """Radians per position of each pair, float32 [H/2], and what cos and sin are multiplied by.

    local: those of the layers that slide, where a model has its own for them.
    """
    own = local and config.local_rope_theta is not None
    theta, scaling = (config.local_rope_theta, None) if own else (config.rope_theta, config.rope_scaling)
    width = config.rope_dim or config.head_dim
    plain = 1.0 / theta ** (np.arange(0, width, 2, dtype=np.float64) / width)
    turned, factor = _scaled(plain, theta, width, scaling) if scaling else (plain, 1.0)
    return turned.astype(np.float32), factor


def _scaled(plain: np.ndarray, theta: float, width: int, s: RopeScaling) -> tuple[np.ndarray, float]:
    if s.kind == "linear":
        return plain / s.factor, 1.0
    if s.kind == "llama3":
        turns = s.original_len * plain / (2 * math.pi)  # full turns within the trained context
        keep = np.clip((turns - s.low_freq) / (s.high_freq - s.low_freq), 0.0, 1.0)
        return keep * plain + (1.0 - keep) * plain / s.factor, 1.0

    def dimension(turns: float) -> float:  # the pair that turns so often within the trained context
        return width * math.log(s.original_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(s.beta_fast), dimension(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    stretch = np.clip((np.arange(width // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    factor = s.attention_factor
    if factor is None:
        grow = math.log(s.factor)  # 0 for a factor of 1
        factor = 0.1 * grow + 1.0
        if s.mscale and s.mscale_all:
            factor = (0.1 * s.mscale * grow + 1.0) / (0.1 * s.mscale_all * grow + 1.0)
    return plain * (1.0 - stretch) + plain / s.factor * stretch, factor


def rope_table(positions: jax.Array, config: Config, local: bool = False) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, 1, H/2] float32 for integer positions [B, T]."""
    radians, factor = frequencies(config, local)
    angle = positions[..., None].astype(jnp.float32) * radians
    return factor * jnp.cos(angle)[:, :, None, :], factor * jnp.sin(angle)[:, :, None, :]


def apply_rope(x: jax.Array, rope: tuple[jax.Array, jax.Array], interleaved: bool = False) -> jax.Array:
    """Turn the pairs (i, i + H/2) of x [B, T, heads, H]: the half-split layout of HF checkpoints.

    interleaved: the pairs are (2i, 2i + 1) instead; what comes out is half-split, which no score can tell.
    """
    (cos, sin), dtype = rope, x.dtype
    x = x.astype(jnp.float32)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(dtype)
