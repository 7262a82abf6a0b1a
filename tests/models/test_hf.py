"""Import, export, round trips and refusals of Hugging Face folders, against stored checkpoints."""

import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import models
from models import Config, hf_read
from models.config import FAMILIES, RopeScaling
from models.hf import Model, read_config
from models.hf_config import config_from_hf, config_to_hf, text_part

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "models"
NAMES = (
    "llama", "llama3", "mistral", "qwen2", "qwen3", "qwen3_untied", "yarn", "gemma2", "gemma3", "mixtral",
    "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v2_groups", "deepseek_v3",
)  # fmt: skip


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def _fields(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def _copy(name: str, folder: Path, **changes) -> Path:
    """A copy of a fixture with config fields changed (None removes one)."""
    shutil.copytree(FIXTURES / name, folder)
    fields = {k: v for k, v in (_fields(folder) | changes).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers(name):
    model = models.load(FIXTURES / name)
    expected = np.load(FIXTURES / name / "expected.npz")
    logits = models.forward(model.params, model.config, jnp.asarray(expected["tokens"])).logits
    real = np.arange(logits.shape[1]) < expected["lengths"][:, None]
    error = np.abs(np.asarray(logits) - expected["logits"])[real].max()
    assert error <= 1e-4 * np.abs(expected["logits"][real]).max(), error


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_equal_transformers(name):
    from models.layout import decode_weights
    from models.sample import decode, prefill

    model = models.load(FIXTURES / name)
    expected = np.load(FIXTURES / name / "expected.npz")
    lengths, greedy = expected["lengths"], expected["greedy"]
    config = model.config.replace(eos_ids=())
    weights = decode_weights(model.params, config)
    session = prefill(weights, config, expected["tokens"], lengths, size=lengths.max() + greedy.shape[1])
    limits = np.full(len(lengths), greedy.shape[1], np.int32)
    out, _ = decode(weights, config, session, jax.random.key(0), limits, temperature=0.0)
    np.testing.assert_array_equal(np.asarray(out.tokens)[:, : greedy.shape[1]], greedy)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_bit_equal(name, tmp_path):
    models.save(models.load(FIXTURES / name), tmp_path / "out", max_shard_bytes=100_000)
    before, after = _tensors(FIXTURES / name), _tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype, key
        np.testing.assert_array_equal(value, after[key], err_msg=key)
    assert _fields(FIXTURES / name) == _fields(tmp_path / "out")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if (FIXTURES / name / file).exists():
            assert (FIXTURES / name / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / "out" / file, "numpy") as handle:
            assert handle.metadata() == {"format": "pt"}
            size = sum(handle.get_tensor(k).nbytes for k in handle.keys())  # noqa: SIM118 (no mapping)
            assert size <= 100_000 or len(handle.keys()) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files_round_trip(dtype, tmp_path):
    source = tmp_path / "source"
    model = models.load(FIXTURES / "qwen3")
    half = jax.tree.map(lambda w: w.astype(dtype), model.params)
    # Norms kept in float32 beside half-precision matrices: every tensor keeps its own type.
    half["final_norm"] = model.params["final_norm"]
    models.save(model.replace(params=half), source)
    assert _fields(source)["dtype"] == dtype
    loaded = models.load(source)
    assert loaded.params["embed"].dtype == dtype
    assert loaded.params["final_norm"].dtype == jnp.float32
    assert loaded.config.dtype == ("bfloat16" if dtype == "bfloat16" else "float32")
    models.save(loaded, tmp_path / "again")
    assert (source / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["gemma3", "deepseek_v3"])
def test_a_config_is_read_without_weights(name, tmp_path):
    shutil.copytree(FIXTURES / name, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors*", "tokenizer*"))
    expected = models.load(FIXTURES / name).config
    assert read_config(tmp_path / name).replace(dtype=expected.dtype) == expected


def test_dtype_converts_weights_and_activations(tmp_path):
    model = models.load(FIXTURES / "llama", dtype="bfloat16")
    assert model.config.dtype == "bfloat16"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"bfloat16"}
    models.save(model, tmp_path / "half")
    wide = models.load(tmp_path / "half", dtype="float32")
    assert wide.config.dtype == "float32"
    np.testing.assert_array_equal(wide.params["embed"], model.params["embed"].astype(jnp.float32))
    with pytest.raises(ValueError, match="dtype must be"):
        models.load(FIXTURES / "llama", dtype="int8")


@pytest.mark.parametrize("name", ["qwen2", "qwen3_untied"])
@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 3, "fsdp": 2}, {"fsdp": 8}])
def test_load_onto_a_mesh(name, axes, tmp_path):
    plain = models.load(FIXTURES / name)
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    mesh = models.make_mesh(**axes, devices=devices)
    model = models.load(FIXTURES / name, mesh=mesh)
    wanted = models.shardings(model.config, mesh)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), plain.params, model.params)
    assert jax.tree.all(jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), model.params, wanted))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(model.params))
    models.save(model, tmp_path / "out")
    before, after = _tensors(FIXTURES / name), _tensors(tmp_path / "out")
    assert all(np.array_equal(before[k], after[k]) for k in before)
    # The pieces are the arrays' own: giving them up must not touch what another device holds.
    kept = jax.tree.map(np.array, model.params)
    jax.jit(lambda p: jax.tree.map(lambda w: w * 0, p), donate_argnums=0)(model.params)
    again = models.load(FIXTURES / name, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, kept, jax.tree.map(np.asarray, again.params))


def test_each_piece_is_read_once(monkeypatch):
    read = []
    original = hf_read._read_layer
    monkeypatch.setattr(
        hf_read, "_read_layer", lambda p, t, r: read.append((p.hf, id(t), tuple(r))) or original(p, t, r)
    )
    mesh = models.make_mesh(data=4, tensor=2)
    config = models.load(FIXTURES / "llama", mesh=mesh).config
    assert len(read) == len(set(read))
    norms = [entry for entry in read if "input_layernorm" in entry[0]]
    assert len(norms) == config.layers  # eight devices hold it, it was read once


def test_own_models_are_written_and_read(tmp_path, rng):
    gemma = {"sliding_window": 3, "sliding_layers": (True, False), "query_scalar": 16}
    more = {
        "llama": {"rope_scaling": RopeScaling("llama3", 8.0, 32, high_freq=3.0)},
        "mistral": {"sliding_window": 9},
        "qwen2": {"sliding_window": 4, "sliding_layers": (False, True), "rope_scaling": RopeScaling("yarn", 2.0, 16)},
        "qwen3": {},
        "mixtral": {"experts": 4, "top_k": 2},
        "qwen3_moe": {"experts": 5, "top_k": 2, "norm_topk": True},
        "olmoe": {"experts": 3, "top_k": 3, "head_dim": 4},
        "gemma2": gemma | {"attn_softcap": 7.0, "final_softcap": 5.0},
        "gemma3_text": gemma | {"local_rope_theta": 1e3, "rope_scaling": RopeScaling("linear", 4.0)},
    }
    for family, fields in more.items():
        config = Config(
            vocab_size=40, dim=16, layers=2, heads=4, kv_heads=2, ffn_dim=24, family=family,
            tie_embeddings=family not in ("llama", "mistral"), eos_ids=(3, 4), bos_id=2, rope_theta=7e5, max_len=99,
            pad_id=1, **FAMILIES[family], **({"head_dim": 8} | fields),
        )  # fmt: skip
        params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), models.abstract(config))
        models.save(Model(config, params), tmp_path / family)
        back = models.load(tmp_path / family)
        assert back.config == config
        assert back.tokenizer is None
        jax.tree.map(np.testing.assert_array_equal, params, back.params)


def test_changed_config_changes_its_fields_only(tmp_path):
    fields = _fields(FIXTURES / "qwen2") | {"made_by": "someone", "rope_scaling": None}
    config = config_from_hf(fields)
    assert config_to_hf(config, "float32", fields) == fields
    smaller = config_to_hf(config.replace(vocab_size=200, layers=2, rope_theta=1e6), "bfloat16", fields)
    different = {k for k in smaller if smaller[k] != fields.get(k)}
    assert different == {"vocab_size", "num_hidden_layers", "rope_parameters", "layer_types", "dtype"}
    assert config_from_hf(smaller) == config.replace(vocab_size=200, layers=2, rope_theta=1e6)


def test_config_reads_old_and_new_fields():
    fields = _fields(FIXTURES / "qwen3")
    assert config_from_hf(fields).head_dim == 12
    assert config_from_hf(fields | {"head_dim": None}).head_dim == 8
    old = {k: v for k, v in fields.items() if k != "rope_parameters"}
    assert config_from_hf(old | {"rope_theta": 5e5}).rope_theta == 5e5
    assert config_from_hf(fields | {"rope_parameters": {"rope_theta": 3.0, "rope_type": "default"}}).rope_theta == 3.0
    assert config_from_hf(fields | {"eos_token_id": [5, 6]}).eos_ids == (5, 6)
    assert config_from_hf(fields, generation={"eos_token_id": [7, 1]}).eos_ids == (7, 1)
    assert config_from_hf(fields | {"pad_token_id": None}).pad_id == 1
    llama = _fields(FIXTURES / "llama")
    assert config_from_hf({k: v for k, v in llama.items() if k != "num_key_value_heads"}).kv_heads == 6
    mixed = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None}
    assert config_from_hf(fields | mixed).sliding_layers == (False, True, True)
    window = {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 3}
    assert config_from_hf(fields | window).sliding_window == 8
    assert config_from_hf(fields | {"sliding_window": 8}).sliding_window is None


def test_what_a_file_leaves_out_is_its_class_default():
    """Fields that files written by older transformers lack, with the values of the classes' signatures."""
    gemma = {k: v for k, v in _fields(FIXTURES / "gemma3").items() if k not in ("rope_parameters", "layer_types")}
    old = config_from_hf(gemma | {"sliding_window_pattern": 2})
    assert (old.rope_theta, old.local_rope_theta, old.sliding_layers) == (1e6, 1e4, (True, False, True))
    flat = {"rope_theta": 5e4, "rope_local_base_freq": 1e3, "rope_scaling": {"type": "linear", "factor": 8.0}}
    new = config_from_hf(_fields(FIXTURES / "gemma3"))
    assert config_from_hf(gemma | flat | {"sliding_window_pattern": 3}) == new
    less = {k: v for k, v in gemma.items() if k not in ("sliding_window", "head_dim", "query_pre_attn_scalar")}
    bare = config_from_hf(less)
    assert (bare.sliding_window, bare.head_dim, bare.query_scalar) == (4096, 256, 256)
    mistral = _fields(FIXTURES / "mistral")
    assert config_from_hf({k: v for k, v in mistral.items() if k != "sliding_window"}).sliding_window == 4096
    assert config_from_hf(mistral | {"sliding_window": None}).sliding_window is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gemma3"}, "gemma3"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.*linear"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "llama3.*original_len"),
        ({"rope_parameters": {"chunked_attention": {"rope_type": "default"}}}, "chunked_attention"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "chunked_attention"),
        ({"use_sliding_window": True, "sliding_window": None, "layer_types": ["sliding_attention"] * 3}, "sliding_win"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"hidden_size": "48"}, "hidden_size"),
    ],
)
def test_what_is_not_implemented_is_named(change, named, tmp_path):
    with pytest.raises(ValueError, match=named) as caught:
        models.load(_copy("qwen3", tmp_path / "m", **change))
    assert str(tmp_path) in str(caught.value)


def _edit(folder: Path, edit) -> Path:
    tensors = _tensors(folder)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_wrong_tensors_are_named(tmp_path):
    key = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(ValueError, match=rf"missing: {key}"):
        models.load(_edit(_copy("qwen3", tmp_path / "a"), lambda t: t.pop(key)))
    with pytest.raises(ValueError, match=r"strange\.weight \(in model\.safetensors\)"):
        models.load(_edit(_copy("qwen3", tmp_path / "b"), lambda t: t.update({"strange.weight": np.ones(3)})))
    with pytest.raises(ValueError, match=r"k_proj\.weight has shape \(24, 47\).*\(24, 48\)"):
        models.load(_edit(_copy("qwen3", tmp_path / "c"), lambda t: t.update({key: t[key][:, :47].copy()})))
    with pytest.raises(ValueError, match="type I32"):
        models.load(_edit(_copy("qwen3", tmp_path / "d"), lambda t: t.update({key: t[key].astype(np.int32)})))
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        models.load(_copy("qwen3", tmp_path / "e", tie_word_embeddings=False))
    # Some tied files carry the second name, older ones the rotary table: both are ours to compute.
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    models.load(_edit(_copy("qwen3", tmp_path / "f"), lambda t: t.update(extra | {"lm_head.weight": np.ones(2)})))


def test_wrong_files_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        models.load("/nowhere/at/all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        models.load(tmp_path / "empty")
    folder = _copy("qwen2", tmp_path / "a")
    (folder / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00004"):
        models.load(folder)
    folder = _copy("qwen3", tmp_path / "b")
    (folder / "model.safetensors").write_bytes(b"nonsense" * 10)
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        models.load(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="convert it to safetensors"):
        models.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        models.load(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"could not be downloaded.*local folder"):
        models.load("nobody/no-such-model")


def test_save_is_atomic_and_careful(tmp_path, monkeypatch):
    model = models.load(FIXTURES / "qwen3")
    target = tmp_path / "model"
    models.save(model, target)
    models.save(model.replace(params=jax.tree.map(lambda w: w * 2, model.params)), target)  # replaced as a whole
    np.testing.assert_array_equal(models.load(target).params["embed"], model.params["embed"] * 2)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]

    def broken(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save_file", broken)
        with pytest.raises(OSError, match="disk full"):
            models.save(model, target)
    np.testing.assert_array_equal(models.load(target).params["embed"], model.params["embed"] * 2)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]

    (target / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        models.save(model, target)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"rl": {}}')
    with pytest.raises(FileExistsError, match="not a model"):
        models.save(model, run)
    assert (run / "config.json").read_text() == '{"rl": {}}'
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a file"):
        models.save(model, tmp_path / "file")
    models.save(model, tmp_path / "new" / "deep")
    assert (tmp_path / "new" / "deep").stat().st_mode & 0o777 == (tmp_path / "new").stat().st_mode & 0o777


def test_save_checks_the_parameters(tmp_path):
    model = models.load(FIXTURES / "qwen3")
    with pytest.raises(ValueError, match="embed_tokens"):
        models.save(model.replace(params=model.params | {"embed": jnp.ones((3, 48))}), tmp_path / "a")
    with pytest.raises(ValueError, match="parameters are not those"):
        models.save(model.replace(params={"embed": model.params["embed"]}), tmp_path / "a")
    with pytest.raises(ValueError, match="choose the family"):
        models.save(model.replace(config=model.config.replace(family="llama")), tmp_path / "a")
    with pytest.raises(ValueError, match="int32"):
        models.save(model.replace(params=jax.tree.map(lambda w: w.astype(jnp.int32), model.params)), tmp_path / "a")
    assert not (tmp_path / "a").exists()


BLOCK = (7, 5)


def _eight_bits(source: Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint with its matrices in eight bits and a scale for every block, like DeepSeek-V3's."""
    tensors = {}
    for name, value in _tensors(source).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = value.astype(jnp.bfloat16) if "bias" not in name else value
            continue
        rows, columns = (np.arange(n) // b for n, b in zip(value.shape, BLOCK, strict=True))
        largest = np.zeros((rows.max() + 1, columns.max() + 1), np.float32)
        np.maximum.at(largest, (rows[:, None], columns[None, :]), np.abs(value))
        tensors[name + "_scale_inv"] = largest / 448  # the largest number of the format
        tensors[name] = (value / (largest / 448)[np.ix_(rows, columns)]).astype(jnp.float8_e4m3fn)
    return tensors


def _as_eight_bits(source: Path, folder: Path) -> Path:
    fields = _fields(source) | {
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}
    }
    folder.mkdir()
    save_file(_eight_bits(source), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_eight_bit_weights_are_scaled_as_they_are_read(tmp_path):
    folder = _as_eight_bits(FIXTURES / "deepseek_v3", tmp_path / "fp8")
    model, exact = models.load(folder), models.load(FIXTURES / "deepseek_v3")
    assert model.params["layers"]["e_up"].dtype == model.params["embed"].dtype == jnp.bfloat16
    assert model.params["layers"]["router_bias"].dtype == jnp.float32
    np.testing.assert_array_equal(model.params["layers"]["router_bias"], exact.params["layers"]["router_bias"])
    for stack in ("dense_layers", "layers"):
        for name, value in exact.params[stack].items():
            # Half a unit of three bits behind the point, and bfloat16's rounding.
            np.testing.assert_allclose(
                model.params[stack][name].astype(jnp.float32), value, rtol=2**-4 + 2**-8, atol=3e-3
            )
    mesh = models.make_mesh(fsdp=2, expert=2, tensor=2)
    sharded = models.load(folder, mesh=mesh)
    chex.assert_trees_all_equal(jax.device_get(sharded.params), jax.device_get(model.params))
    models.save(model, tmp_path / "bf16")
    assert "quantization_config" not in _fields(tmp_path / "bf16")
    chex.assert_trees_all_equal(models.load(tmp_path / "bf16").params, model.params)


def test_wrong_scales_are_named(tmp_path):
    folder = _as_eight_bits(FIXTURES / "deepseek_v3", tmp_path / "fp8")
    file = folder / "model.safetensors"
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors = _eight_bits(FIXTURES / "deepseek_v3")
    save_file({k: v for k, v in tensors.items() if k != name + "_scale_inv"}, file)
    with pytest.raises(ValueError, match=f"{name} has eight bits.*_scale_inv are missing"):
        models.load(folder)
    save_file(tensors | {name + "_scale_inv": np.ones((2, 2), np.float32)}, file)
    with pytest.raises(ValueError, match=r"scales of .*o_proj\.weight have shape \(2, 2\)"):
        models.load(folder)
    with pytest.raises(ValueError, match="quantization_config \\(awq"):
        models.load(_copy("deepseek_v3", tmp_path / "awq", quantization_config={"quant_method": "awq"}))


def test_modules_that_predict_further_tokens_are_left_out_and_counted(tmp_path):
    folder = tmp_path / "mtp"
    shutil.copytree(FIXTURES / "deepseek_v3", folder)
    extra = {f"model.layers.3.{name}": np.ones((4, 4), np.float32) for name in ("eh_proj.weight", "enorm.weight")}
    save_file(extra, folder / "model-extra.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(extra, "model-extra.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.warns(UserWarning, match="2 tensors of layers from 3 on"):
        model = models.load(folder)
    chex.assert_trees_all_equal(model.params, models.load(FIXTURES / "deepseek_v3").params)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_language_model_of_a_model_with_images_is_read(prefix, tmp_path):
    folder = tmp_path / "gemma3"
    folder.mkdir()
    inner = {k: v for k, v in _fields(FIXTURES / "gemma3").items() if k != "architectures"}
    outer = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(outer | {"text_config": inner}))
    tensors = {prefix + k.removeprefix("model."): v for k, v in _tensors(FIXTURES / "gemma3").items()}
    images = {f"vision_tower.{i}.weight": np.zeros((2, 2), np.float32) for i in range(3)}
    save_file(tensors | images, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="3 tensors beside the language model are left out"):
        model = models.load(folder)
    plain = models.load(FIXTURES / "gemma3")
    assert model.config == plain.config
    chex.assert_trees_all_equal(model.params, plain.params)
    models.save(model, tmp_path / "text")
    assert _fields(tmp_path / "text")["model_type"] == "gemma3_text"
    chex.assert_trees_all_equal(models.load(tmp_path / "text").params, plain.params)
    (folder / "config.json").write_text(json.dumps(outer))
    with pytest.raises(ValueError, match="'text_config'"):
        models.load(folder)


def test_published_fields_of_gemma_3_with_images():
    """The fields of the text part as the 4B checkpoint has them; what it leaves out is in transformers' class."""
    fields = {
        "model_type": "gemma3", "eos_token_id": [1, 106], "torch_dtype": "bfloat16",
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
    }  # fmt: skip
    config = config_from_hf(text_part(fields))
    assert (config.heads, config.kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262_208)
    assert config.slides.count(False) == 5
    assert (config.rope_theta, config.local_rope_theta, config.eos_ids) == (1e6, 1e4, (1, 106))
