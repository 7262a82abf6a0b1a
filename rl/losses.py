"""Policy losses as pure functions over log-probs, with every choice an argument.

Everything returns numerators and takes denominators, so micro-batches add up to exactly the whole batch's loss:
``loss = numerator(micro) / denominator(batch)`` summed over micro-batches. Metrics are (sum, count) pairs for the same
reason. B trajectories, T tokens; masks are float32 [B, T], 1 on tokens the policy sampled.
"""

import jax
import jax.numpy as jnp
import numpy as np

KL_KINDS = ("k1", "k2", "k3", "k1+", "k3+")
AGGREGATIONS = ("token", "sequence", "constant")
RATIOS = ("token", "sequence")
TOKEN_EPS = 1e-5  # denominator guard of OpenRLHF's token mean: a batch whose mask is empty has loss 0, not NaN

Metrics = dict[str, tuple[jax.Array, jax.Array]]


def kl_penalty(logp: jax.Array, ref_logp: jax.Array, kind: str = "k3") -> jax.Array:
    """Per-token estimate of KL(policy || reference) from tokens the policy sampled (J. Schulman, 2020).

    With d = logp - ref_logp: k1 = d; k2 = d^2/2; k3 = exp(-d) + d - 1. Same shape as the inputs.

    *Gradients.* As a term of a loss, k1's gradient is grad log p, whose expectation is 0: it regularises nothing.
    k2's gradient d * grad log p is the gradient of the KL divergence. k3's gradient (1 - exp(-d)) grad log p is
    that of the *reverse* divergence KL(reference || policy), as GRPO uses it (arXiv 2402.03300). ``k1+`` and ``k3+``
    report the value of k1 and k3 with the gradient of k2.
    """
    difference = logp - ref_logp
    squared = 0.5 * difference**2
    if kind == "k1":
        return difference
    if kind == "k2":
        return squared
    if kind not in KL_KINDS:
        raise ValueError(f"kl must be one of {', '.join(KL_KINDS)}, not {kind!r}")
    k3 = jnp.exp(-difference) + difference - 1.0
    if kind == "k3":
        return k3
    value = difference if kind == "k1+" else k3
    return squared + jax.lax.stop_gradient(value - squared)


def denominator(mask: jax.Array, aggregation: str, constant: float | None = None) -> jax.Array:
    """What :func:`numerator` is divided by, a scalar, from the mask [B, T] of the *whole* batch.

    token: number of masked tokens + 1e-5 (DAPO, DeepRec). sequence: number of rows with at least one masked token
    (GRPO); rows that were masked out entirely do not count. constant: those rows times ``constant``, the generation
    budget in tokens (Dr. GRPO, arXiv 2503.20783).
    """
    rows = jnp.maximum((mask.sum(axis=-1) > 0).sum().astype(jnp.float32), 1.0)
    if aggregation == "token":
        return mask.sum() + TOKEN_EPS
    if aggregation == "sequence":
        return rows
    if aggregation != "constant":
        raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, not {aggregation!r}")
    if constant is None or constant <= 0:
        raise ValueError(f"aggregation 'constant' needs a positive number of tokens, got {constant}")
    return rows * constant


def numerator(values: jax.Array, mask: jax.Array, aggregation: str) -> jax.Array:
    """Sum over tokens of ``values`` [B, T] ("token", "constant"), or sum over rows of their token mean ("sequence")."""
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, not {aggregation!r}")
    values = jnp.where(mask > 0, values * mask, 0.0)
    if aggregation == "sequence":
        return (values.sum(axis=-1) / jnp.maximum(mask.sum(axis=-1), 1.0)).sum()
    return values.sum()


def policy_loss(
    logp: jax.Array,
    old_logp: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    ratio: str = "token",
    kl: str = "k3",
    kl_coef: float = 0.0,
    ref_logp: jax.Array | None = None,
    sampler_logp: jax.Array | None = None,
    tis_cap: float | None = None,
) -> tuple[jax.Array, Metrics]:
    """Clipped policy-gradient loss per token, and metrics; feed the first to :func:`numerator`.

    All arrays float32 [B, T]. With rho = exp(logp - old_logp), or under ``ratio="sequence"`` the exponential of its
    mean over the row's masked tokens (GSPO, arXiv 2507.18071):

        l = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)                        PPO; clip-higher, DAPO
        l = min(l, -dual_clip A) where A < 0                                             arXiv 1912.09729, eq. 5
        l = stop_grad(min(exp(old_logp - sampler_logp), tis_cap)) l                      truncated importance sampling
        l = l + kl_coef kl_penalty(logp, ref_logp)

    dual_clip: an upper bound on rho for negative advantages, > 1 + clip_high; None switches it off.
    tis_cap: corrects for the sampler computing other probabilities than the trainer; needs ``sampler_logp``.
    The gradient at tokens outside the mask is exactly 0. Returns ([B, T], {name: (sum, count)}).
    """
    if ratio not in RATIOS:
        raise ValueError(f"ratio must be 'token' or 'sequence', not {ratio!r}")
    if dual_clip is not None and dual_clip <= 1 + clip_high:
        raise ValueError(f"dual_clip ({dual_clip}) must be above 1 + clip_high ({1 + clip_high})")
    if kl_coef and ref_logp is None:
        raise ValueError("kl_coef is not 0, so the loss needs ref_logp: pass reference parameters, or set kl_coef=0")
    if tis_cap is not None and sampler_logp is None:
        raise ValueError("tis_cap is set, so the loss needs sampler_logp")
    inside = mask > 0
    count = mask.sum()

    def total(values):  # (sum, count) over masked tokens
        return jax.lax.stop_gradient(jnp.where(inside, values * mask, 0.0).sum()), count

    # Selected before exp: outside the mask log-probs mean nothing, and inf * 0 would poison the gradient.
    log_ratio = jnp.where(inside, logp - old_logp, 0.0)
    log_weight = log_ratio
    if ratio == "sequence":
        log_weight = (log_ratio * mask).sum(-1, keepdims=True) / jnp.maximum(mask.sum(-1, keepdims=True), 1.0)
        log_weight = jnp.broadcast_to(log_weight, logp.shape)
    rho = jnp.exp(log_weight)
    loss = -jnp.minimum(rho * advantages, jnp.clip(rho, 1 - clip_low, 1 + clip_high) * advantages)
    low = (rho < 1 - clip_low) & (advantages < 0)
    high = (rho > 1 + clip_high) & (advantages > 0)
    metrics = {
        "ratio": total(rho),
        "clip_low": total(low.astype(jnp.float32)),
        "clip_high": total(high.astype(jnp.float32)),
        "kl_old": total(jnp.exp(-log_ratio) + log_ratio - 1.0),
    }
    if dual_clip is not None:
        bound = jnp.where(advantages < 0, -dual_clip * advantages, jnp.inf)
        metrics["clip_dual"] = total((loss > bound).astype(jnp.float32))
        loss = jnp.minimum(loss, bound)
    if sampler_logp is not None:
        mismatch = jnp.where(inside, jax.lax.stop_gradient(old_logp) - sampler_logp, 0.0)
        metrics["sampler_mismatch"] = total(jnp.abs(mismatch))
        if tis_cap is not None:
            weight = jnp.exp(mismatch)
            metrics["tis_capped"] = total((weight > tis_cap).astype(jnp.float32))
            loss = loss * jnp.minimum(weight, tis_cap)
    if ref_logp is not None:
        penalty = kl_penalty(jnp.where(inside, logp, 0.0), jnp.where(inside, ref_logp, 0.0), kl)
        metrics["kl_ref"] = total(penalty)
        if kl_coef:
            loss = loss + kl_coef * penalty
    return jnp.where(inside, loss, 0.0), metrics


def cross_entropy(logp: jax.Array, mask: jax.Array) -> jax.Array:
    """Sum over masked tokens of -logp, a scalar; divide by the whole batch's mask sum. logp, mask: float32 [B, T]."""
    return -jnp.where(mask > 0, logp * mask, 0.0).sum()


def mean_metrics(metrics: Metrics) -> dict[str, float]:
    """(sum, count) pairs to plain means on the host; a metric nobody counted is left out."""
    metrics = jax.device_get(metrics)
    return {name: float(total) / float(count) for name, (total, count) in metrics.items() if float(count) > 0}


def check_finite(name: str, values: np.ndarray, mask: np.ndarray | None = None) -> None:
    """Raise FloatingPointError naming the rows of ``values`` ([B] or [B, T]) that are not finite.

    mask: same shape; entries it leaves out are not looked at. Host side: it waits for the device.
    """
    values = np.asarray(values)
    bad = ~np.isfinite(values)
    if mask is not None:
        bad &= np.asarray(mask) > 0
    rows = np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1)) if bad.ndim else np.flatnonzero(bad)
    if rows.size:
        shown = ", ".join(map(str, rows[:8])) + (", ..." if rows.size > 8 else "")
        first = values[rows[0]] if values.ndim == 1 else values[rows[0]][bad[rows[0]]][0]
        raise FloatingPointError(
            f"{name} is not finite for sample {shown} ({rows.size} of {len(bad)}; first value {first}); "
            "look at that sample's trajectory, then lower the learning rate or fix the reward"
        )


def router_balance(logits: jax.Array, index: jax.Array, valid: jax.Array) -> jax.Array:
    """E * sum over experts of (share of choices) * (mean probability): 1 where tokens are spread evenly, up to E where
    one expert gets all (arXiv 2101.03961, equation 4; with k choices their shares sum to 1).

    logits float [M, E] of a layer's router, index int [M, k] the experts taken, valid float [M] 1 on tokens that count.
    """
    M, E = logits.shape
    count = jnp.maximum(valid.sum(), 1.0)
    chosen = jax.lax.stop_gradient(jnp.zeros(E).at[index].add(valid[:, None]))
    mean = (jax.nn.softmax(logits.astype(jnp.float32), axis=-1) * valid[:, None]).sum(axis=0) / count
    return E * (chosen / (count * index.shape[1]) * mean).sum()


def router_home(logits: jax.Array, home: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean over tokens of -log of the probability that the router gives to the experts ``home`` together, in nats.

    logits float [M, E], home bool [M, E], valid float [M] 1 on tokens that count.
    """
    logits = logits.astype(jnp.float32)
    inside = jax.nn.logsumexp(jnp.where(home, logits, -jnp.inf), axis=-1)
    nats = jax.nn.logsumexp(logits, axis=-1) - inside
    return (nats * valid).sum() / jnp.maximum(valid.sum(), 1.0)


def mlp_sparsity(act: jax.Array, gate: jax.Array, valid: jax.Array, away: jax.Array | None = None) -> jax.Array:
    """Mean over tokens and units of |act| and half of what the gate stands above 0: units that do nothing for a token
    are closed there, and what an open or a half-closed gate (SiLU's negative side) lets through costs.

    act, gate float [B, T, F], a layer's activated product and its gate before the activation; valid bool [B, T]; away
    bool [B, F], the units of each row that are counted (None: all).
    """
    cost = jnp.abs(act.astype(jnp.float32)) + 0.5 * jax.nn.relu(gate.astype(jnp.float32))
    counted = jnp.broadcast_to(valid[..., None], cost.shape)
    if away is not None:
        counted &= away[:, None]
    return (cost * counted).sum() / jnp.maximum(counted.sum(), 1)
