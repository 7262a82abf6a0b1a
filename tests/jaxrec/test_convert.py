"""`jaxrec convert`: expert masks in their published form, and folders written anew."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import models
from jaxrec.convert import convert, read_expert_mask, write_expert_mask

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "models"


def test_a_mask_round_trips_byte_for_byte(tmp_path):
    text = "[[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]"
    (tmp_path / "a.json").write_text(text)
    mask = read_expert_mask(tmp_path / "a.json")
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, [[1, 0, 1], [0, 1, 1]])
    write_expert_mask(tmp_path / "b.json", mask)
    assert (tmp_path / "b.json").read_text() == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[1.0, 0.0], [1.0]]", "row 1 has 1 values"),
        ("[[1.0, 0.0], [1.0, 0.5]]", "row 1 holds something other"),
        ("[[1.0, true]]", "row 0 holds something other"),
        ('{"0": [1.0]}', "list of rows"),
        ("[1.0, 0.0]", "list of rows"),
        ("[[1.0,", "not JSON"),
    ],
)
def test_other_files_are_refused(text, message, tmp_path):
    (tmp_path / "mask.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_expert_mask(tmp_path / "mask.json")
    assert "mask.json" in str(caught.value)


def test_experts_are_removed(tmp_path):
    source = FIXTURES / "olmoe"
    model = models.load(source)
    mask = np.ones((model.config.layers, model.config.experts), bool)
    mask[:, [0, 5]] = False
    write_expert_mask(tmp_path / "mask.json", mask)
    line = convert(str(source), tmp_path / "small", keep_experts=tmp_path / "mask.json")
    assert "6 of 8 experts" in line
    small = models.load(tmp_path / "small")
    assert small.config == model.config.replace(experts=6)
    tokens = jnp.asarray([[5, 9, 200, 41]])
    masked = models.forward(model.params, model.config, tokens, expert_mask=jnp.asarray(mask)).logits
    np.testing.assert_allclose(models.forward(small.params, small.config, tokens).logits, masked, atol=1e-4)
    write_expert_mask(tmp_path / "mask.json", mask[:, :7])
    with pytest.raises(ValueError, match=r"\[3, 8\]"):
        convert(str(source), tmp_path / "other", keep_experts=tmp_path / "mask.json")
    with pytest.raises(ValueError, match="dense qwen3"):
        convert(str(FIXTURES / "qwen3"), tmp_path / "other", keep_experts=tmp_path / "mask.json")
    assert not (tmp_path / "other").exists()


def test_the_dtype_changes(tmp_path):
    convert(str(FIXTURES / "gemma2"), tmp_path / "half", dtype="bfloat16")
    half = models.load(tmp_path / "half")
    assert half.params["embed"].dtype == jnp.bfloat16
    assert half.config.replace(dtype="float32") == models.load(FIXTURES / "gemma2").config
