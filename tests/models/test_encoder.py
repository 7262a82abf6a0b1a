"""The BERT-family encoder against transformers: stored outputs, and live under the parity mark."""

import importlib.util
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from models import encoder as encoder_module
from models.encoder import load_encoder

_FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
FOLDER = _FIXTURES / "encoder"


def _expected(folder: Path = FOLDER) -> dict:
    with np.load(folder / "expected.npz") as f:
        out = {name: f[name] for name in f.files}
    out["texts"] = out["texts"].tobytes().decode().split("\n")
    return out


def _close(ours, theirs):
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(np.asarray(ours) / scale, theirs / scale, atol=1e-4)


def _compare(folder: Path):
    want, got = _expected(folder), load_encoder(folder)
    states = np.asarray(got.module(want["tokens"], want["lengths"]))
    real = np.arange(states.shape[1]) < want["lengths"][:, None]
    _close(states[real], want["states"][real])
    _close(got.encode(want["texts"], max_length=64), want["mean"])


def _copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "encoder"))


def test_states_and_mean_pooling_match_the_stored_referee():
    _compare(FOLDER)


def test_cls_pooling_is_read_from_the_folder(tmp_path):
    folder, want = _copy(tmp_path), _expected()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    _close(load_encoder(folder).encode(want["texts"], max_length=64), want["cls"])
    with pytest.raises(ValueError, match="contradicts"):
        load_encoder(folder, pooling="mean")


def test_pooling_argument_without_a_pooling_file(tmp_path):
    folder, want = _copy(tmp_path), _expected()
    shutil.rmtree(folder / "1_Pooling")
    _close(load_encoder(folder, pooling="cls").encode(want["texts"], max_length=64), want["cls"])
    _close(load_encoder(folder).encode(want["texts"], max_length=64), want["mean"])


@pytest.mark.parity
def test_live_referee_on_another_random_checkpoint(tmp_path):
    spec = importlib.util.spec_from_file_location("make_encoder", _FIXTURES / "make_encoder.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.make(tmp_path / "random", seed=7, layers=3)
    _compare(tmp_path / "random")


def test_vectors_do_not_depend_on_the_batch_and_shapes_compile_once():
    got, texts = load_encoder(FOLDER), _expected()["texts"]
    alone = np.concatenate([got.encode([t], max_length=64) for t in texts])
    np.testing.assert_allclose(got.encode(texts, max_length=64), alone, atol=1e-5)
    before = encoder_module._embed._cache_size()
    for count in (1, 3, 4, 2):
        got.encode(texts[:count], max_length=64)
    got.encode(["dark war", "the old sea"], max_length=64)
    # batch sizes and lengths fall into buckets: at most (4 rows, 64), (4, 16 or 32), (2, ...) are new
    assert encoder_module._embed._cache_size() - before <= 3
    settled = encoder_module._embed._cache_size()
    for count in (1, 3, 4, 2):
        got.encode(texts[:count], max_length=64)
    assert encoder_module._embed._cache_size() == settled


def test_prefix_norm_truncation_and_no_text():
    got = load_encoder(FOLDER)
    np.testing.assert_array_equal(got.encode(["comedy"], prefix="a funny "), got.encode(["a funny comedy"]))
    vectors = got.encode(["dark war " * 100, "drama"])  # far beyond the 64 positions
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    assert got.encode([]).shape == (0, 24)
    assert vectors.dtype == np.float32


def test_bad_folders_and_arguments(tmp_path):
    folder = _copy(tmp_path)
    got = load_encoder(folder)
    with pytest.raises(TypeError, match="list"):
        got.encode("one string")
    with pytest.raises(ValueError, match=r"3\.\.64"):
        got.encode(["a"], max_length=65)
    config = json.loads((folder / "config.json").read_text())
    for field, value in (("model_type", "roberta"), ("hidden_act", "relu")):
        (folder / "config.json").write_text(json.dumps(config | {field: value}))
        with pytest.raises(ValueError, match=value):
            load_encoder(folder)
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 41}))
    with pytest.raises(ValueError, match=r"intermediate\.dense\.bias has shape"):
        load_encoder(folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"encoder\.layer\.2.*missing"):
        load_encoder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load_encoder(folder)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_encoder(tmp_path)


def test_weights_are_the_files_weights():
    got = load_encoder(FOLDER)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(got._state))
