"""Preference loss, gradient and metrics against the installed TRL's ``DPOTrainer``."""

import contextlib
import importlib.util
import io
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import dpo

pytestmark = pytest.mark.parity


def _load(name: str):
    path = Path(__file__).with_name(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


to_ours = _load("test_losses_trl.py").to_ours


def trl_loss(logp: np.ndarray, mask: np.ndarray, reference: np.ndarray, beta: float):
    """TRL's loss, its gradient by token and its metrics. logp, mask: [2P, T], chosen rows first; reference [P, 2]."""
    import torch
    from trl.trainer.dpo_trainer import DPOTrainer

    inside = torch.tensor(mask)
    tokens = torch.tensor(logp, requires_grad=True)
    column = torch.zeros(len(mask), 1)

    def model(**_):  # what TRL's fused head gives: 0 where there is no label
        zero = torch.zeros_like(tokens)
        return SimpleNamespace(log_probs=tokens * inside, entropy=zero, mean_logits=zero, is_top1=zero.bool())

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0], beta=beta, use_weighting=False,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(len(mask), mask.shape[1] + 1, dtype=torch.long),
        "attention_mask": torch.ones(len(mask), mask.shape[1] + 1, dtype=torch.long),
        "completion_mask": torch.cat([column, inside], 1).long(),
        "ref_chosen_logps": torch.tensor(reference[:, 0]), "ref_rejected_logps": torch.tensor(reference[:, 1]),
    }  # fmt: skip
    loss = DPOTrainer._compute_loss(trainer, model, inputs, False)
    loss.backward()
    return float(loss.detach()), tokens.grad.numpy(), {k: v[-1] for k, v in trainer._metrics["train"].items()}


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_gradient_and_metrics(seed, beta):
    """Tokens of a tool stand inside the completion and are left out by the mask, as ours are."""
    rng = np.random.default_rng(seed)
    P, T = 6, 9
    logp = (-rng.random((2 * P, T)) - 0.5).astype(np.float32)
    mask = (rng.random((2 * P, T)) < 0.6).astype(np.float32)
    sums = (logp * mask).sum(1).reshape(2, P).T
    reference = (sums + rng.normal(size=(P, 2))).astype(np.float32)

    def ours(logp):
        scores = jnp.where(mask > 0, logp, 0.0).sum(-1).reshape(2, P).T
        each, metrics = dpo.preference_loss(scores, reference, beta)
        return each.mean(), metrics

    (value, metrics), gradient = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(logp))
    expected, expected_gradient, theirs = trl_loss(logp, mask, reference, beta)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-7)
    names = {
        "accuracy": "rewards/accuracies", "margin": "rewards/margins", "reward_chosen": "rewards/chosen",
        "reward_rejected": "rewards/rejected", "logp_chosen": "logps/chosen", "logp_rejected": "logps/rejected",
    }  # fmt: skip
    for name, other in names.items():
        total, count = metrics[name]
        np.testing.assert_allclose(total / count, theirs[other], rtol=1e-4, atol=1e-5, err_msg=name)


def tiny_model(seed: int):
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        initializer_range=0.5,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def test_a_step_end_to_end(tmp_path):
    """TRL tokenises, runs policy and reference on tiny models and computes one loss; ours gets the same tokens."""
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[PAD]", "[EOS]", *"abcdefghijklmn"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="a"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    policy, reference = tiny_model(0), tiny_model(1)
    (config, params), (_, ref_params) = to_ours(policy), to_ours(reference)
    caught = {}
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = trl.DPOTrainer(
            model=policy, ref_model=reference,
            args=trl.DPOConfig(
                str(tmp_path), beta=0.1, per_device_train_batch_size=4, max_steps=1, report_to=[], save_strategy="no",
                use_cpu=True, bf16=False, logging_steps=1, disable_tqdm=True, learning_rate=1e-3,
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_dict({
                "prompt": ["a b c", "d e", "g h i", "b d n m"], "chosen": [" f", " a b c", " d e f g", " h"],
                "rejected": [" a a a", " b", " c d", " n e l l"],
            }),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", eos_token="[EOS]"),
        )  # fmt: skip
        original = trainer._compute_loss

        def spy(model, inputs, return_outputs):
            caught["inputs"] = {k: v.clone() for k, v in inputs.items()}
            caught["loss"] = original(model, inputs, return_outputs)
            return caught["loss"]

        trainer._compute_loss = spy
        trainer.train()
    inputs = {k: v.numpy() for k, v in caught["inputs"].items()}
    pair = lambda x: np.stack(np.split(x, 2), axis=1)  # noqa: E731
    settings = dpo.DPOConfig(logprob_chunk=4)
    rows = {
        "tokens": pair(inputs["input_ids"]).astype(np.int32), "mask": pair(inputs["completion_mask"]) > 0,
        "lengths": pair(inputs["attention_mask"].sum(1)).astype(np.int32),
    }  # fmt: skip
    rows = dpo.add_reference(ref_params, rows, settings, config)
    scores = dpo.pair_scores(params, {k: jnp.asarray(v) for k, v in rows.items()}, settings, config)
    each, _ = dpo.preference_loss(scores, rows["reference"], 0.1)
    loss = float(caught["loss"].detach())
    assert abs(loss - np.log(2)) > 1e-3  # policy and reference differ, so the comparison says something
    np.testing.assert_allclose(each.mean(), loss, rtol=1e-4)
