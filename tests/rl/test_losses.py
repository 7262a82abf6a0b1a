"""Losses against numbers worked by hand, against definitions, and against stored TRL outputs and gradients."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models import params as model_params
from models.config import Config
from rl import losses
from rl.logprobs import token_logprobs

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "rl" / "trl.npz"


def single(rho, advantage, **options):
    logp = jnp.log(jnp.full((1, 1), rho))
    value, _ = losses.policy_loss(logp, jnp.zeros((1, 1)), jnp.full((1, 1), advantage), jnp.ones((1, 1)), **options)
    return float(value[0, 0])


@pytest.mark.parametrize(("rho", "advantage", "expected"), [(1.5, 1, -1.28), (1.25, 1, -1.25), (0.5, -1, 0.8)])
def test_deeprec_clip_numbers(rho, advantage, expected):
    assert single(rho, advantage) == pytest.approx(expected, abs=1e-6)


def test_dual_clip_bounds_only_negative_advantages():
    assert single(10.0, -1.0) == pytest.approx(10.0, rel=1e-6)
    assert single(10.0, -1.0, dual_clip=3.0) == pytest.approx(3.0, rel=1e-6)
    assert single(10.0, 1.0, dual_clip=3.0) == pytest.approx(-1.28, rel=1e-6)


def test_deeprec_token_mean_denominator_and_overlong():
    """Section 6 step 4: sum / (count + 1e-5); section 10.12: an empty mask gives 0, not NaN."""
    mask = jnp.array([[1.0, 1.0, 0.0]])
    value, _ = losses.policy_loss(jnp.zeros((1, 3)), jnp.zeros((1, 3)), jnp.ones((1, 3)), mask)
    loss = losses.numerator(value, mask, "token") / losses.denominator(mask, "token")
    assert float(loss) == pytest.approx(-2 / (2 + 1e-5), rel=1e-7)
    empty = jnp.zeros((1, 3))
    for aggregation in losses.AGGREGATIONS:
        loss = losses.numerator(value, empty, aggregation) / losses.denominator(empty, aggregation, 8)
        assert float(loss) == 0.0


def test_aggregations_differ_as_defined():
    values, mask = jnp.array([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]]), jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])

    def loss(kind, constant=None):
        return float(losses.numerator(values, mask, kind) / losses.denominator(mask, kind, constant))

    assert loss("token") == pytest.approx(7 / 3, rel=1e-5)
    assert loss("sequence") == pytest.approx((1.5 + 4) / 2)
    assert loss("constant", 10) == pytest.approx(7 / 20)


def test_sequence_ratio_is_gspo(rng):
    logp, old = rng.normal(size=(2, 5)).astype(np.float32), rng.normal(size=(2, 5)).astype(np.float32)
    mask = np.array([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0.0]], np.float32)
    value, _ = losses.policy_loss(logp, old, np.ones((2, 5), np.float32), mask, ratio="sequence", clip_high=1e6)
    for row in range(2):
        keep = mask[row] > 0
        expected = -np.exp((logp - old)[row][keep].mean())
        np.testing.assert_allclose(value[row][keep], expected, rtol=1e-5)
        np.testing.assert_array_equal(value[row][~keep], 0.0)


def test_kl_values():
    difference = np.array([-0.7, 0.0, 0.4], np.float32)
    k3 = np.exp(-difference) + difference - 1
    zero = np.zeros(3, np.float32)
    for kind, expected in {
        "k1": difference, "k2": difference**2 / 2, "k3": k3, "k1+": difference, "k3+": k3
    }.items():  # fmt: skip
        np.testing.assert_allclose(losses.kl_penalty(difference, zero, kind), expected, atol=1e-6)
    assert (k3 >= 0).all()


def test_kl_gradients_are_what_the_docstring_says():
    """Exact expectation over a small vocabulary: E_pi[grad k] against the true divergences' gradients."""
    logits, reference = jnp.array([0.3, -1.0, 0.8, 0.1]), jax.nn.log_softmax(jnp.array([0.0, 0.5, -0.2, 1.0]))

    def expected_gradient(kind):
        probs = jax.nn.softmax(logits)  # the sampling distribution: fixed while the loss is differentiated
        return jax.grad(lambda x: (probs * losses.kl_penalty(jax.nn.log_softmax(x), reference, kind)).sum())(logits)

    def kl(x):
        return (jax.nn.softmax(x) * (jax.nn.log_softmax(x) - reference)).sum()

    def reverse(x):
        return (jnp.exp(reference) * (reference - jax.nn.log_softmax(x))).sum()

    np.testing.assert_allclose(expected_gradient("k1"), 0.0, atol=1e-6)
    for kind in ("k2", "k1+", "k3+"):
        np.testing.assert_allclose(expected_gradient(kind), jax.grad(kl)(logits), atol=1e-6)
    np.testing.assert_allclose(expected_gradient("k3"), jax.grad(reverse)(logits), atol=1e-6)


def test_truncated_importance_sampling_scales_the_gradient_and_has_none_itself():
    old, sampler = jnp.array([[-1.0, -1.0, -1.0]]), jnp.array([[-1.0, -2.0, -0.5]])
    ones = jnp.ones((1, 3))

    def loss(logp, **options):
        return losses.policy_loss(logp, old, ones, ones, sampler_logp=sampler, **options)[0].sum()

    plain, corrected = jax.grad(loss)(old), jax.grad(lambda x: loss(x, tis_cap=2.0))(old)
    np.testing.assert_allclose(corrected, plain * jnp.array([[1.0, 2.0, np.exp(-0.5)]]), rtol=1e-6)

    # With old = stop_gradient of the same forward the weight must still be a constant.
    def same_forward(x):
        old = jax.lax.stop_gradient(x)
        return losses.policy_loss(x, old, ones, ones, sampler_logp=sampler, tis_cap=2.0)[0].sum()

    on_policy = jax.grad(same_forward)(old)
    np.testing.assert_allclose(on_policy, corrected, rtol=1e-6)


def test_metrics_are_sums_over_masked_tokens():
    logp = jnp.log(jnp.array([[1.5, 0.5, 1.0, 7.0]]))
    mask = jnp.array([[1.0, 1.0, 1.0, 0.0]])
    _, metrics = losses.policy_loss(logp, jnp.zeros((1, 4)), jnp.array([[1.0, -1.0, 1.0, 1.0]]), mask)
    means = losses.mean_metrics(metrics)
    assert means["ratio"] == pytest.approx(1.0)
    assert means["clip_high"] == pytest.approx(1 / 3)
    assert means["clip_low"] == pytest.approx(1 / 3)
    assert losses.mean_metrics({"none": (jnp.zeros(()), jnp.zeros(()))}) == {}


@pytest.mark.parametrize("aggregation", losses.AGGREGATIONS)
@pytest.mark.parametrize("ratio", losses.RATIOS)
def test_gradient_of_masked_tokens_is_exactly_zero_at_the_logits(aggregation, ratio):
    """DeepRec section 10.3, on a tiny model with every term switched on and rubbish outside the mask."""
    config = Config(vocab_size=17, dim=8, layers=1, heads=2, kv_heads=1, head_dim=4, ffn_dim=8)
    params = model_params.init(config, jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (3, 9), 0, 17)
    mask = (jax.random.uniform(jax.random.key(2), (3, 9)) < 0.5).astype(jnp.float32).at[:, 0].set(0.0)
    logits = models.forward(params, config, ids).logits
    rubbish = jnp.where(mask > 0, -2.0, jnp.inf)

    def loss(logits):
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], -1)[..., 0]
        logp = jnp.pad(logp, ((0, 0), (1, 0)))
        value, _ = losses.policy_loss(
            logp, rubbish, jnp.ones((3, 9)), mask, ratio=ratio, kl_coef=0.1, ref_logp=rubbish, sampler_logp=rubbish,
            tis_cap=2.0, dual_clip=3.0,
        )  # fmt: skip
        return losses.numerator(value, mask, aggregation) / losses.denominator(mask, aggregation, 16)

    gradient = jax.grad(loss)(logits)
    predicts_masked = np.asarray(mask[:, 1:] == 0)  # the logits at t predict the token at t + 1
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(np.asarray(gradient[:, :-1])[predicts_masked], 0.0)
    assert (np.abs(np.asarray(gradient[:, :-1])[~predicts_masked]).max(-1) > 0).all()


def test_changing_masked_tokens_changes_only_the_context(rng):
    """Text of a tool that no sampled token can see (it stands at the end) must not touch the gradient at all."""
    config = Config(vocab_size=17, dim=8, layers=1, heads=2, kv_heads=1, head_dim=4, ffn_dim=8)
    params = model_params.init(config, jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (2, 8), 0, 17)
    mask = jnp.ones((2, 8)).at[:, 0].set(0.0).at[:, 5:].set(0.0)

    def loss(params, ids):
        return losses.cross_entropy(token_logprobs(params, config, ids), mask)

    other = ids.at[:, 5:].set((ids[:, 5:] + 3) % 17)
    first, second = jax.grad(loss)(params, ids), jax.grad(loss)(params, other)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_check_finite_names_the_sample():
    losses.check_finite("reward", np.ones(4))
    with pytest.raises(FloatingPointError, match="reward is not finite for sample 2"):
        losses.check_finite("reward", np.array([0.0, 1.0, np.nan, 2.0]))
    values, mask = np.zeros((3, 4)), np.ones((3, 4))
    values[1, 2] = -np.inf
    mask[1, 2] = 0
    losses.check_finite("log-prob", values, mask)
    values[2, 0] = np.inf
    with pytest.raises(FloatingPointError, match="log-prob is not finite for sample 2"):
        losses.check_finite("log-prob", values, mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": "word"}, "ratio"),
        ({"dual_clip": 1.1}, "dual_clip"),
        ({"kl_coef": 0.1}, "ref_logp"),
        ({"tis_cap": 2.0}, "sampler_logp"),
        ({"kl": "k9", "ref_logp": np.zeros((1, 1))}, "kl must be one of"),
    ],
)
def test_bad_options(options, message):
    one = jnp.ones((1, 1))
    with pytest.raises(ValueError, match=message):
        losses.policy_loss(one, one, one, one, **options)


def test_bad_aggregations():
    one = jnp.ones((1, 1))
    for call in (losses.denominator, lambda m, kind: losses.numerator(m, m, kind)):
        with pytest.raises(ValueError, match="aggregation must be one of"):
            call(one, "mean")
    with pytest.raises(ValueError, match="positive number of tokens"):
        losses.denominator(one, "constant")


VARIANTS = {
    "grpo": ({"clip_high": 0.2}, "sequence", None),
    "grpo_kl": ({"clip_high": 0.2, "kl_coef": 0.04}, "sequence", None),
    "bnpo_clip_higher": ({}, "token", None),
    "dapo_delta": ({"dual_clip": 2.0}, "token", None),
    "dr_grpo": ({"clip_high": 0.2}, "constant", 32),
    "gspo": ({"clip_low": 0.03, "clip_high": 0.04, "ratio": "sequence"}, "sequence", None),
    "tis": ({"tis_cap": 2.0}, "token", None),
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_loss_and_gradient_equal_stored_trl(variant):
    options, aggregation, constant = VARIANTS[variant]
    with np.load(FIXTURE) as stored:
        data = {name: stored[name] for name in stored.files}
    mask = jnp.asarray(data["mask"])
    extra = {"ref_logp": data["ref_logp"]} if "kl_coef" in options else {}
    extra |= {"sampler_logp": data["sampler_logp"]} if "tis_cap" in options else {}

    def loss(logp):
        value, _ = losses.policy_loss(logp, data["old_logp"], data["token_advantages"], mask, **options, **extra)
        return losses.numerator(value, mask, aggregation) / losses.denominator(mask, aggregation, constant)

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(data["logp"]))
    np.testing.assert_allclose(value, data[f"loss_{variant}"], rtol=1e-5)
    np.testing.assert_allclose(gradient, data[f"gradient_{variant}"], rtol=1e-4, atol=1e-7)


def test_r1_searcher_mask_number():
    """arXiv 2505.17005, section 5: ratios 1, 1.3, .9, 1 with A = .5 and a tool's token at 2: .533333, not .5125."""
    logp, advantage = jnp.log(jnp.array([[1.0, 1.3, 0.9, 1.0]])), jnp.full((1, 4), 0.5)
    for mask, expected in (([[1.0, 1.0, 0.0, 1.0]], 0.533333), ([[1.0] * 4], 0.5125)):
        mask = jnp.array(mask)
        value, _ = losses.policy_loss(logp, jnp.zeros((1, 4)), advantage, mask, clip_low=0.2, clip_high=0.2)
        for aggregation in ("sequence", "token"):
            loss = losses.numerator(value, mask, aggregation) / losses.denominator(mask, aggregation)
            assert -float(loss) == pytest.approx(expected, abs=1e-5)
