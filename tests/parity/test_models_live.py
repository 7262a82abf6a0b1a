"""Live comparison with transformers and torch: logits, greedy tokens, gradients, our export read back by them."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models import Config
from models.config import FAMILIES, MLA_FAMILIES, MOE_FAMILIES
from models.hf import Model
from models.moe import keep_experts

pytestmark = pytest.mark.parity

TESTS = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("make_models", TESTS / "fixtures" / "make_models.py")
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)


def _close(ours, theirs, lengths, tolerance):
    real = np.arange(theirs.shape[1]) < np.asarray(lengths)[:, None]
    ours, theirs = np.asarray(ours)[real], theirs[real]
    # Two orders of summing in float32: 1e-5 apart on some processors, whatever the code.
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error <= tolerance, error


@pytest.mark.parametrize("name", make.MODELS)
def test_stored_fixtures_are_what_transformers_computes_now(name):
    kind, fields, _, _ = make.MODELS[name]
    expected = np.load(TESTS / "fixtures" / "models" / name / "expected.npz")
    reference = make.make_model(kind, fields)
    theirs = make.hf_logits(reference, expected["tokens"])
    _close(expected["logits"], theirs, expected["lengths"], 1e-5)
    greedy = make.hf_greedy(reference, expected["tokens"], expected["lengths"])
    np.testing.assert_array_equal(expected["greedy"], greedy)


@pytest.mark.parametrize("name", make.MODELS)
def test_fresh_weights_logits_and_greedy_tokens(name, tmp_path):
    kind, fields, _, _ = make.MODELS[name]
    reference = make.make_model(kind, fields, seed=7)
    reference.save_pretrained(tmp_path)
    model = models.load(tmp_path)
    tokens, lengths = make.make_batch(model.config.vocab_size, lengths=(3, 40, 22), seed=5)
    logits = models.forward(model.params, model.config, jnp.asarray(tokens)).logits
    _close(logits, make.hf_logits(reference, tokens), lengths, 1e-4)
    prompts = [row[:n].tolist() for row, n in zip(tokens, lengths)]
    config = model.config.replace(eos_ids=())
    out = models.generate_tokens(model.params, config, prompts, make.NEW)
    greedy = make.hf_greedy(reference, tokens, lengths)
    np.testing.assert_array_equal(np.asarray(out.tokens)[:, : make.NEW], greedy)


# transformers' Llama has no sliding window, and ours refuses to write one. None: as wide as the sequence in all layers.
@pytest.mark.parametrize(
    ("name", "window"), [(n, None) for n in make.MODELS] + [(n, 6) for n in ("qwen2", "qwen3", "mistral", "gemma3")]
)
def test_our_export_is_read_by_transformers(name, window, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    model = models.load(TESTS / "fixtures" / "models" / name)
    config = model.config.replace(sliding_window=window, sliding_layers=())
    models.save(model.replace(config=config), tmp_path / "out", max_shard_bytes=120_000)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    assert models.load(tmp_path / "out").config == config
    tokens, lengths = make.make_batch(config.vocab_size)
    ours = models.forward(model.params, config, jnp.asarray(tokens)).logits
    _close(ours, make.hf_logits(reference, tokens), lengths, 5e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_our_random_init_is_read_by_transformers(family, dtype, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    latent = {"kv_heads": 4, "kv_lora": 10, "q_lora": 12, "rope_dim": 4, "value_dim": 6, "rope_interleaved": True}
    latent |= {"first_dense": 1, "dense_ffn_dim": 40, "shared_dim": 48, "routed_scale": 1.5}
    more = {"kv_heads": 2} if family not in MLA_FAMILIES else latent
    config = Config(
        vocab_size=64, dim=32, layers=2, heads=4, head_dim=8 if family in ("llama", "olmoe") else 12,
        ffn_dim=48, family=family, tie_embeddings=family != "llama", rope_theta=2e5, init_std=0.3, eos_ids=(5,),
        **FAMILIES[family], **({"experts": 4, "top_k": 2} if family in MOE_FAMILIES else {}), **more,
    )  # fmt: skip
    params = models.init(config, jax.random.key(3), dtype=dtype)
    models.save(Model(config, params), tmp_path / "m")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager")
    assert reference.dtype == getattr(torch, dtype)
    biases = [b for name, b in reference.named_buffers() if name.endswith("e_score_correction_bias")]
    assert sum(p.numel() for p in [*reference.parameters(), *biases]) == config.num_params()
    tokens, lengths = make.make_batch(config.vocab_size, seed=2)
    # Same weights, computed in float32 on both sides; read anew, since Gemma's embedding scale would stay rounded.
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32, attn_implementation="eager")
    theirs = make.hf_logits(reference, tokens)
    _close(models.forward(params, config, jnp.asarray(tokens)).logits, theirs, lengths, 5e-5)


def test_bfloat16_is_as_close_to_float32_as_theirs(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    folder = TESTS / "fixtures" / "models" / "qwen3"
    tokens, _ = make.make_batch(300)
    exact = np.load(folder / "expected.npz")["logits"]
    theirs = make.hf_logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), tokens)
    model = models.load(folder, dtype="bfloat16")
    ours = np.asarray(models.forward(model.params, model.config, jnp.asarray(tokens)).logits)
    assert np.sqrt(np.mean((ours - exact) ** 2)) <= 1.5 * np.sqrt(np.mean((theirs - exact) ** 2))


@pytest.mark.parametrize("name", ["qwen2", "qwen3_untied", "gemma2"])
def test_gradients_equal_torch_autograd(name):
    import torch

    kind, fields, _, _ = make.MODELS[name]
    reference = make.make_model(kind, fields)
    model = models.load(TESTS / "fixtures" / "models" / name)
    tokens, _ = make.make_batch(300, lengths=(9, 9, 9))

    def loss(params):
        logits = models.forward(params, model.config, jnp.asarray(tokens)).logits
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1))

    value, gradient = jax.jit(jax.value_and_grad(loss))(model.params)
    ids = torch.tensor(tokens, dtype=torch.long)
    theirs = torch.nn.functional.cross_entropy(reference(ids).logits[:, :-1].reshape(-1, 300), ids[:, 1:].reshape(-1))
    theirs.backward()
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-5)
    # Written as a checkpoint, so that names, transposes and layers are compared too.
    from models.hf import _plan

    named = {n: p.grad.numpy() for n, p in reference.named_parameters()}
    plan = {n: fetch() for n, fetch, _ in _plan(model.replace(params=gradient))}
    assert plan.keys() == named.keys()
    for key, ours in plan.items():
        scale = np.abs(named[key]).max()
        np.testing.assert_allclose(ours, named[key], atol=1e-4 * scale, rtol=0, err_msg=key)


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_untied"])
def test_exported_tokenizer_is_read_by_transformers(name, tmp_path):
    from transformers import AutoTokenizer

    model = models.load(TESTS / "fixtures" / "models" / name)
    models.save(model, tmp_path / "m")
    reference = AutoTokenizer.from_pretrained(tmp_path / "m")
    for text in ("Brass Lantern costs 12.", " größere\n\nCafé <think>", "<|im_end|>"):
        assert reference.encode(text, add_special_tokens=False) == model.tokenizer.encode(text)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_a_model_with_fewer_experts_is_read_by_transformers(name, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    model = models.load(TESTS / "fixtures" / "models" / name)
    mask = np.zeros((model.config.layers, model.config.experts), bool)
    for layer, row in enumerate(mask):
        row[(np.arange(3) + layer) % len(row)] = True
    params, config = keep_experts(model.params, model.config, mask)
    models.save(model.replace(params=params, config=config), tmp_path / "small")
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", dtype=torch.float32, attn_implementation="eager"
    )
    tokens, lengths = make.make_batch(config.vocab_size)
    masked = models.forward(model.params, model.config, jnp.asarray(tokens), expert_mask=jnp.asarray(mask)).logits
    _close(masked, make.hf_logits(reference, tokens), lengths, 5e-5)


def test_the_text_part_of_gemma_3_with_images(tmp_path):
    """transformers' own class with images, saved by itself: our logits for text are its logits."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = dict(make.MODELS["gemma3"][1])
    text |= {name: make._COMMON[name] for name in make._COMMON if not name.endswith("_id")}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=299)
    torch.manual_seed(0)
    theirs = Gemma3ForConditionalGeneration._from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    theirs.save_pretrained(tmp_path / "both")
    with pytest.warns(UserWarning, match="beside the language model"):
        model = models.load(tmp_path / "both")
    tokens, lengths = make.make_batch(299)
    ids = torch.tensor(tokens, dtype=torch.long)
    with torch.no_grad():
        expected = theirs(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits.numpy()
    logits = models.forward(model.params, model.config, jnp.asarray(tokens)).logits
    _close(logits, expected, lengths, 1e-4)
