"""Advantages, losses and gradients against the installed TRL, computed by TRL's own trainers during the test."""

import contextlib
import importlib.util
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import Config
from rl import advantages, losses
from rl.logprobs import token_logprobs

pytestmark = pytest.mark.parity


def _load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TESTS = Path(__file__).resolve().parents[1]
make_rl = _load(TESTS / "fixtures" / "make_rl.py")
VARIANTS = _load(TESTS / "rl" / "test_losses.py").VARIANTS


def our_loss(data, variant):
    options, aggregation, constant = VARIANTS[variant]
    extra = {"ref_logp": data["ref_logp"]} if "kl_coef" in options else {}
    extra |= {"sampler_logp": data["sampler_logp"]} if "tis_cap" in options else {}
    mask = jnp.asarray(data["mask"])

    def loss(logp):
        value, _ = losses.policy_loss(logp, data["old_logp"], data["token_advantages"], mask, **options, **extra)
        return losses.numerator(value, mask, aggregation) / losses.denominator(mask, aggregation, constant)

    return jax.value_and_grad(loss)(jnp.asarray(data["logp"]))


@pytest.mark.parametrize("variant", list(make_rl.LOSSES))
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loss_and_gradient(variant, seed):
    data = make_rl.arrays(seed)
    value, gradient = our_loss(data, variant)
    expected, expected_gradient = make_rl.trl_loss(data, make_rl.LOSSES[variant])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-7)


def test_reinforce_pp_token_loss():
    """REINFORCE++: token-normalised advantages [B, T] through TRL's token-mean clip-higher loss, which takes them."""
    data = make_rl.arrays(4)
    groups = data["groups"]
    data["token_advantages"] = np.asarray(
        advantages.compute("reinforce_pp_baseline", data["rewards"], groups, data["mask"], group_size=make_rl.GROUP)
    )
    value, gradient = our_loss(data, "bnpo_clip_higher")
    expected, expected_gradient = make_rl.trl_loss(data, make_rl.LOSSES["bnpo_clip_higher"])
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-7)


def test_advantages():
    data = make_rl.arrays(3)
    for name, expected in make_rl.all_advantages(data["rewards"]).items():
        ours = advantages.compute(
            name, data["rewards"], data["groups"], np.ones((make_rl.ROWS, 1)), group_size=make_rl.GROUP
        )
        np.testing.assert_allclose(ours[:, 0], expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_reinforce_pp_baseline_is_trl_batch_scaling_up_to_its_epsilon_and_degrees_of_freedom():
    """With one token per row, TRL's batch-scaled advantages divide the same centred rewards by the rewards' own
    unbiased deviation plus 1e-4; ours divide by the deviation of the centred rewards. Directions are equal."""
    data = make_rl.arrays(5)
    theirs = make_rl.trl_advantages(data["rewards"], "grpo", scale_rewards="batch")
    ours = np.asarray(
        advantages.compute(
            "reinforce_pp_baseline", data["rewards"], data["groups"], np.ones((make_rl.ROWS, 1)),
            group_size=make_rl.GROUP,
        )
    )[:, 0]  # fmt: skip
    centred = np.asarray(
        advantages.compute("dr_grpo", data["rewards"], data["groups"], np.ones((make_rl.ROWS, 1)), group_size=4)
    )[:, 0]
    np.testing.assert_allclose(theirs * (data["rewards"].std(ddof=1) + 1e-4), centred, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ours * centred.std(), centred, rtol=1e-4, atol=1e-5)


def to_ours(model) -> tuple[Config, dict]:
    """A transformers Qwen3 as our configuration and parameters, written out here so that the importer is not its own
    referee."""
    c = model.config
    config = Config(
        vocab_size=c.vocab_size, dim=c.hidden_size, layers=c.num_hidden_layers, heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads, head_dim=c.head_dim, ffn_dim=c.intermediate_size, qk_norm=True,
        rope_theta=c.rope_parameters["rope_theta"], norm_eps=c.rms_norm_eps, tie_embeddings=True,
    )  # fmt: skip
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}

    def stack(name, shape=None):
        each = [weights[f"model.layers.{i}.{name}.weight"] for i in range(config.layers)]
        return jnp.stack([jnp.asarray(x.T.reshape(shape) if shape else (x.T if x.ndim == 2 else x)) for x in each])

    D, N, K, H = config.dim, config.heads, config.kv_heads, config.head_dim
    layers = {
        "attn_norm": stack("input_layernorm"), "mlp_norm": stack("post_attention_layernorm"),
        "q_norm": stack("self_attn.q_norm"), "k_norm": stack("self_attn.k_norm"),
        "wq": stack("self_attn.q_proj", (D, N, H)), "wk": stack("self_attn.k_proj", (D, K, H)),
        "wv": stack("self_attn.v_proj", (D, K, H)), "wo": stack("self_attn.o_proj", (N, H, D)),
        "w_gate": stack("mlp.gate_proj"), "w_up": stack("mlp.up_proj"), "w_down": stack("mlp.down_proj"),
    }  # fmt: skip
    tree = {"embed": weights["model.embed_tokens.weight"], "layers": layers, "final_norm": weights["model.norm.weight"]}
    return config, jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def test_a_grpo_step_end_to_end(tmp_path):
    """TRL rolls out, scores and computes one loss on a tiny Qwen3; ours gets the same tokens, rewards and weights."""
    caught = {}
    rewards = make_rl.arrays(0)["rewards"]
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = make_rl.tiny_trainer("grpo", rewards, str(tmp_path), loss_type="dapo", epsilon_high=0.28)
        config, params = to_ours(trainer.model)
        original = trainer._compute_loss

        def spy(model, inputs):
            caught["loss"] = original(model, inputs)
            caught["inputs"] = {k: v.clone() if hasattr(v, "clone") else v for k, v in inputs.items()}
            return caught["loss"]

        trainer._compute_loss = spy
        trainer.train()
    inputs = {k: v.detach().cpu().numpy() for k, v in caught["inputs"].items() if hasattr(v, "detach")}

    # TRL pads prompts on the left, so its real prompt tokens end where completions begin.
    rows, size = len(rewards), inputs["prompt_ids"].shape[1] + inputs["completion_ids"].shape[1]
    ids, mask = np.zeros((rows, size), np.int32), np.zeros((rows, size), np.float32)
    lengths = np.zeros(rows, np.int32)
    for row in range(rows):
        prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row] > 0]
        answer = inputs["completion_ids"][row][inputs["completion_mask"][row] > 0]
        lengths[row] = len(prompt) + len(answer)
        ids[row, : lengths[row]] = np.concatenate([prompt, answer])
        mask[row, len(prompt) : lengths[row]] = 1.0
    logp = token_logprobs(params, config, ids, lengths, chunk=4)
    # TRL shuffles a rollout's rows before the loss, so its own advantages are taken; test_advantages checks those.
    advantage = np.broadcast_to(inputs["advantages"][:, None], mask.shape)
    values, _ = losses.policy_loss(logp, logp, advantage, mask)
    ours = losses.numerator(values, jnp.asarray(mask), "token") / losses.denominator(jnp.asarray(mask), "token")
    np.testing.assert_allclose(ours, float(caught["loss"].detach()), rtol=1e-4, atol=1e-6)
    expected = sorted(advantages.compute("grpo", rewards, np.arange(rows) // 4, np.ones((rows, 1)), group_size=4)[:, 0])
    np.testing.assert_allclose(sorted(inputs["advantages"]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layers", [1, 3])
def test_router_balance_is_the_mean_over_layers_of_transformers_loss(layers):
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    rng = np.random.default_rng(layers)
    logits = rng.normal(size=(layers, 40, 8)).astype(np.float32)
    index = np.argsort(-logits, axis=-1)[..., :2]
    ours = np.mean([losses.router_balance(x, i, jnp.ones(40)) for x, i in zip(logits, index)])
    # Theirs sums over the choices of a token where ours takes shares that sum to 1.
    theirs = np.mean([float(load_balancing_loss_func((torch.tensor(x),), 8, 2)) for x in logits]) / 2
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
