"""What does not fit is an error that names it and what to do, before a device is asked for anything."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import models
from models import Config
from models.layout import decode_weights
from models.sample import decode, extend, prefill

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "models"
INDEX = "model.safetensors.index.json"
CONFIG = Config(
    vocab_size=20, dim=16, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=12, qk_norm=True, max_len=24, init_std=0.3
)
MOE = CONFIG.replace(family="qwen3_moe", experts=6, top_k=3)


@pytest.fixture
def no_device(monkeypatch):
    """Putting anything on a device fails."""

    def fail(*args, **kwargs):
        pytest.fail("a device was asked for before the input was checked")

    monkeypatch.setattr(jax, "device_put", fail)
    monkeypatch.setattr("models.hf_read._insert", fail)


def copy(name: str, folder: Path, **changes) -> Path:
    shutil.copytree(FIXTURES / name, folder)
    fields = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_a_shard_that_is_not_there_or_not_named(tmp_path, no_device):
    folder = copy("qwen2", tmp_path / "gone")
    (folder / "model-00003-of-00004.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"00003-of-00004\.safetensors is named by .*; fetch the folder again"):
        models.load(folder)
    folder = copy("qwen2", tmp_path / "unnamed")
    index = json.loads((folder / INDEX).read_text())
    named = {k: v for k, v in index["weight_map"].items() if v != "model-00003-of-00004.safetensors"}
    (folder / INDEX).write_text(json.dumps(index | {"weight_map": named}))
    lost = len(index["weight_map"]) - len(named)
    with pytest.raises(ValueError, match=rf"{lost} tensors are missing: .*model-00003-of-00004.*does not name it") as e:
        models.load(folder)
    assert str(folder) in str(e.value)
    # An index that names a file which does not hold the tensor.
    moved = index["weight_map"] | {"model.norm.weight": "model-00001-of-00004.safetensors"}
    (folder / INDEX).write_text(json.dumps(index | {"weight_map": moved}))
    with pytest.raises(ValueError, match=r"model-00001-of-00004\.safetensors: cannot read tensor model\.norm\.weight"):
        models.load(folder)


def test_tensors_missing_unknown_or_of_another_shape(tmp_path, no_device):
    key = "model.layers.1.mlp.experts.2.up_proj.weight"

    def changed(name: str, change) -> Path:
        folder = copy("olmoe", tmp_path / name)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    with pytest.raises(ValueError, match=rf"missing: {key}; fetch the folder again, or correct config\.json"):
        models.load(changed("a", lambda t: t.pop(key)))
    with pytest.raises(ValueError, match=r"odd\.weight \(in model\.safetensors\); is this config\.json that of these"):
        models.load(changed("b", lambda t: t.update({"odd.weight": np.ones(2, np.float32)})))
    with pytest.raises(ValueError, match=rf"model\.safetensors: tensor {key} has shape \(24, 7\).*asks for \(24, 48\)"):
        models.load(changed("c", lambda t: t.update({key: t[key][:, :7].copy()})))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen3", {"num_attention_heads": 0}, "'num_attention_heads' .* above 0 .found 0"),
        ("qwen3", {"num_hidden_layers": -1}, "'num_hidden_layers'"),
        ("qwen3", {"num_key_value_heads": 0}, "kv_heads must be at least 1, not 0"),
        ("qwen3", {"num_key_value_heads": 4}, r"heads \(6\) must be a multiple of kv_heads \(4\)"),
        ("qwen3", {"max_position_embeddings": 0}, "max_len must be at least 1"),
        ("qwen3", {"max_position_embeddings": "512"}, "str"),
        ("qwen3", {"rms_norm_eps": -1e-6}, "norm_eps must be at least 0"),
        ("qwen3", {"rms_norm_eps": float("nan")}, "norm_eps must be at least 0"),
        ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "rope_theta must be above 0"),
        ("qwen3", {"eos_token_id": [1, 300]}, r"eos_ids=\(1, 300\) must lie below vocab_size=300"),
        ("mistral", {"sliding_window": 0}, "sliding_window must be above 0"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_softcap must be above 0"),
        ("olmoe", {"num_experts_per_tok": 9}, "top_k=9 must lie between 1 and experts=8"),
        ("olmoe", {"num_experts": 0}, "needs experts"),
        ("deepseek_v3", {"n_group": 3}, "groups=3 must divide experts=8"),
        ("deepseek_v3", {"first_k_dense_replace": 3}, "first_dense=3 must be less than layers=3"),
        ("deepseek_v3", {"kv_lora_rank": -1}, "kv_lora must be at least 0"),
    ],
)
def test_fields_out_of_range(name, change, message, tmp_path, no_device):
    folder = copy(name, tmp_path / "m", **change)
    with pytest.raises(ValueError, match=message) as caught:
        models.load(folder)
    assert str(folder / "config.json") in str(caught.value)


def test_a_pad_id_outside_the_vocabulary_is_not_used(tmp_path):
    """Published files have such; padding is never looked at, so that any id will do."""
    folder = copy("qwen3", tmp_path / "m", pad_token_id=300)
    model = models.load(folder)
    assert model.config.pad_id == 1
    models.save(model, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["pad_token_id"] == 300
    with pytest.raises(ValueError, match="pad_id=20 must lie below vocab_size=20"):
        CONFIG.replace(pad_id=20)


def masks(rows: int = 2, experts: int = 6, kept: int = 6) -> np.ndarray:
    return np.tile(np.arange(experts) < kept, (rows, 1))


@pytest.mark.parametrize(
    ("config", "mask", "message"),
    [
        (MOE, masks(kept=2), "keeps 2 experts in layer 0, fewer than the 3"),
        (MOE, masks(rows=1), r"\[2, 6\], got bool \[1, 6\]"),
        (MOE, masks().astype(np.float32), r"got float32 \[2, 6\]"),
        (CONFIG, masks(), "a qwen3 has none: leave it out"),
    ],
)
def test_expert_masks(config, mask, message, key):
    params = models.init(config, key)
    with pytest.raises(ValueError, match=message):
        models.forward(params, config, np.ones((1, 3), np.int32), expert_mask=mask)
    with pytest.raises(ValueError, match=message):
        decode_weights(params, config, expert_mask=mask)
    with pytest.raises(ValueError, match=message):
        decode_weights(params, config, expert_mask=jnp.asarray(mask))
    run = jax.jit(lambda m: models.forward(params, config, jnp.ones((1, 3), jnp.int32), expert_mask=m).logits)
    if "keeps" in message:  # values that a traced program cannot know
        assert run(mask).shape == (1, 3, 20)
    else:
        with pytest.raises(ValueError, match=message):
            run(mask)


def test_heads_and_meshes(no_device):
    mesh = models.make_mesh(data=2, tensor=4)
    with pytest.raises(ValueError, match=r"tensor=4, which does not divide the model's heads=6: take a divisor of 6"):
        models.load(FIXTURES / "qwen3", mesh=mesh)
    with pytest.raises(ValueError, match=r"tensor=8.*heads=4"):
        models.init(CONFIG, jax.random.key(0), mesh=models.make_mesh(tensor=8))


@pytest.mark.parametrize("token", [-1, 20])
def test_tokens_outside_the_vocabulary(token, key):
    params = models.init(CONFIG, key)
    tokens = np.array([[3, token, 5]], np.int32)
    message = f"token id {token} is outside the model's vocabulary of 20"
    with pytest.raises(ValueError, match=message):
        models.forward(params, CONFIG, tokens)
    with pytest.raises(ValueError, match=message):
        models.generate_tokens(params, CONFIG, tokens.tolist(), 2)


def test_rows_longer_than_the_context(key):
    params = models.init(CONFIG, key)
    weights, sample = decode_weights(params, CONFIG), jax.random.key(1)
    tokens = np.ones((2, 25), np.int32)
    with pytest.raises(ValueError, match=r"a prompt has 25 tokens.*max_len=24"):
        prefill(weights, CONFIG, tokens, np.array([25, 3]), 40)
    with pytest.raises(ValueError, match=r"prompt 1 has 20 tokens, with max_new_tokens=5 .*max_len=24"):
        models.generate_tokens(params, CONFIG, [[1] * 3, [1] * 20], 5)
    out = models.generate_tokens(params, CONFIG, [[1] * 3, [1] * 20], 4)
    assert out.counts.tolist() == [4, 4]

    def start():
        return prefill(weights, CONFIG, tokens[:, :20], np.array([20, 3]), 40)

    with pytest.raises(ValueError, match=r"would hold 25 tokens.*max_len=24"):
        extend(weights, CONFIG, start(), tokens[:, :5], np.array([5, 0]), 25)
    for longest in (None, 20):
        with pytest.raises(ValueError, match=r"may grow to 25 tokens.*max_len=24"):
            decode(weights, CONFIG, start(), sample, np.array([5, 5]), longest=longest)
        # The longest row and the largest limit are not of one row: each row by itself stays inside.
        written, session = decode(weights, CONFIG, start(), sample, np.array([4, 12]), longest=longest)
        assert written.counts.tolist() == [4, 12]
        assert session.lens.tolist() == [24, 15]
