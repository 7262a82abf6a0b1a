"""What attention (MHA) and the MLPs add to the logit of an answer, layer by layer, and what taking them away does
(arXiv 2505.11995 compares the two; its measure was not at hand, so these are our reading).

Letters as in the README; A answer places per row and Y tokens compared at each.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from analysis.batches import (
    answer_logprobs,
    check_answers,
    check_tokens,
    log_probabilities,
    rows_at,
    site_means,
    window_of_layers,
)
from models.config import Config
from models.linear import dense
from models.params import Params
from models.taps import Edit, Reduced, Replace
from models.transformer import forward, rms_norm, unembed

SUBLAYERS = ("attn.out", "mlp.out")


@struct.dataclass
class Contributions:
    """Parts of the logits of given tokens, float32, 0 where there is no position.

    logit: [B, A, Y], before a cap on logits if the model has one. embed: [B, A, Y]; attn, mlp: [L, B, A, Y]; the three,
    summed over layers, are ``logit``. attn_cosine, mlp_cosine: [L, B, A, Y], between a sub-layer's output and the
    token's column of the output head.
    """

    logit: jax.Array
    embed: jax.Array
    attn: jax.Array
    mlp: jax.Array
    attn_cosine: jax.Array
    mlp_cosine: jax.Array


def _head_columns(params: Params, config: Config, targets: jax.Array) -> jax.Array:
    """The output head's column of each target, float32 [B, A, Y, D]."""
    if config.tie_embeddings:
        columns = dense(params["embed"])[targets]
    else:
        columns = jnp.moveaxis(dense(params["head"])[:, targets], 0, -1)
    return columns.astype(jnp.float32)


def _dot(x: jax.Array, columns: jax.Array) -> jax.Array:
    """x [.., A, D] with columns [.., A, Y, D] -> [.., A, Y]."""
    return jnp.einsum("...ad,...ayd->...ay", x, columns, precision="highest")


def _cosine(x: jax.Array, columns: jax.Array) -> jax.Array:
    norms = jnp.linalg.norm(x, axis=-1)[..., None] * jnp.linalg.norm(columns, axis=-1)
    return jnp.where(norms > 0, _dot(x, columns) / jnp.where(norms > 0, norms, 1.0), 0.0)


@functools.partial(jax.jit, static_argnums=1)
def _contributions(params, config, tokens, positions, targets):
    columns = _head_columns(params, config, targets)
    scale = params["final_norm"].astype(jnp.float32)
    scaled = columns * (1.0 + scale if config.norm_offset else scale)
    at = lambda x: rows_at(x, positions).astype(jnp.float32)  # noqa: E731

    def parts(values):
        outs = [at(values[site]) for site in SUBLAYERS]
        return [_dot(x, scaled) for x in outs], [_cosine(x, columns) for x in outs]

    reduce = {"parts": Reduced(SUBLAYERS, parts), "after": Reduced(("resid.post",), lambda v: at(v["resid.post"]))}
    records = forward(params, config, tokens, head=False, record=("embed",), reduce=reduce).records
    final = records["after"][-1]
    frozen = jax.lax.rsqrt(jnp.mean(final * final, axis=-1, keepdims=True) + config.norm_eps)
    here = (positions >= 0)[..., None]
    (attn, mlp), (attn_cosine, mlp_cosine) = records["parts"]
    logit, embed = _dot(final, scaled), _dot(at(records["embed"]), scaled)
    frozen, own = jnp.where(here, frozen, 0.0), jnp.where(here, 1.0, 0.0)
    return Contributions(
        logit * frozen, embed * frozen, attn * frozen, mlp * frozen, attn_cosine * own, mlp_cosine * own
    )


def _three(targets: np.ndarray) -> np.ndarray:
    if targets.ndim != 3:
        raise ValueError(f"targets must be [B, A, Y], Y tokens compared at each place, got {list(targets.shape)}")
    return targets


def _check_params(params: Params) -> None:
    if "head_out" in params or not isinstance(params.get("layers"), dict):
        raise ValueError("these are weights in the sampler's layout; pass the model's own params")


def logit_contributions(
    params: Params, config: Config, tokens: np.ndarray, positions: np.ndarray, targets: np.ndarray
) -> Contributions:
    """Direct logit attribution with the scale of the final norm frozen (arXiv 2505.11995, our reading of its roles of
    MHA and MLP): ``((o * gamma) / rms(x_final)) . W_U[:, y]`` for each sub-layer's output o.

    tokens: int32 [B, T], right-padded. positions: int32 [B, A], where logits are read; -1: none. targets: int32
    [B, A, Y], for instance the answer of the passage and the internal one. The parts are complete: embedding, attention
    and MLPs sum to the logit, but for rounding of the residual stream in bfloat16. Models with experts too.
    """
    _check_params(params)
    tokens = check_tokens(tokens, config)
    positions, targets = check_answers(tokens, positions, targets, config)
    return _contributions(params, config, tokens, positions, _three(targets))


@functools.partial(jax.jit, static_argnums=1)
def _lens(params, config, tokens, positions, targets):
    def after(site):
        def read(values):
            normed = rms_norm(rows_at(values[site], positions), params["final_norm"], config)
            return log_probabilities(unembed(params, config, normed), positions, targets)

        return Reduced((site,), read)

    reduce = {"attn": after("resid.mid"), "mlp": after("resid.post")}
    records = forward(params, config, tokens, head=False, reduce=reduce).records
    return records["attn"], records["mlp"]


def logit_lens(
    params: Params, config: Config, tokens: np.ndarray, positions: np.ndarray, targets: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of given tokens if the model ended after this sub-layer (logit lens; arXiv 2505.11995, our
    reading).

    Arguments as in :func:`logit_contributions`. Returns float32 [L, B, A, Y] after attention and [L, B, A, Y] after the
    MLP of each layer; the last of the latter is the model's own. Logits are made one layer at a time.
    """
    tokens = check_tokens(tokens, config)
    positions, targets = check_answers(tokens, positions, targets, config)
    return _lens(params, config, tokens, positions, _three(targets))


def _check_site(site: str) -> None:
    if site not in SUBLAYERS:
        raise ValueError(f"a sub-layer is one of {', '.join(SUBLAYERS)}, not {site!r}")


def ablate_window(
    config: Config, site: str, start: int, width: int = 5, mean: np.ndarray | None = None
) -> dict[str, Edit]:
    """The edit that puts zeros, or a mean, in the place of a sub-layer's output in the layers [start, start + width)
    (our reading).

    site: "attn.out" or "mlp.out". mean: float [L, D] of ``mean_outputs``. Other windows and means compile nothing.
    """
    _check_site(site)
    inside = window_of_layers(start, width, config)
    value = np.zeros((config.layers, config.dim)) if mean is None else np.asarray(mean)
    if value.shape != (config.layers, config.dim):
        raise ValueError(f"mean must be [L, D] = {[config.layers, config.dim]}, got {list(value.shape)}")
    return {site: Replace(jnp.asarray(inside)[:, None, None, None], jnp.asarray(value, config.dtype)[:, None, None])}


def mean_outputs(
    params: Params, config: Config, batches: Iterable[tuple[np.ndarray, np.ndarray]], site: str
) -> np.ndarray:
    """Mean output of a sub-layer over counted tokens, float32 [L, D] (our reading). batches: (tokens int32 [B, T],
    counted bool [B, T]). site: "attn.out" or "mlp.out"."""
    _check_site(site)
    return site_means(params, config, batches, site)


def window_effects(
    params: Params, config: Config, tokens: np.ndarray, positions: np.ndarray, targets: np.ndarray, *,
    site: str, width: int = 5, mean: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """What taking a sub-layer away in a window of layers does to given tokens (arXiv 2505.11995, our reading).

    Arguments as in ``answer_logprobs`` and :func:`ablate_window`. Returns float32 [L - width + 1, *targets.shape]:
    log-probability with the window that begins at this layer ablated minus without. All windows share one program.
    """
    ablate_window(config, site, 0, width, mean)  # refuse before the model runs
    run = lambda edit: np.asarray(answer_logprobs(params, config, tokens, positions, targets, edit))  # noqa: E731
    plain = run(None)
    starts = range(config.layers - width + 1)
    return np.stack([run(ablate_window(config, site, start, width, mean)) - plain for start in starts])
