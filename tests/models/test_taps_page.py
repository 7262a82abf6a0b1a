"""The recipes of models/TAPS.md run as they are printed, and do what the page says."""

import re
from pathlib import Path

import numpy as np

from models.taps import SITES

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "models"
PAGE = ROOT / "models" / "TAPS.md"


def recipes(folder: Path, leave_out: str) -> dict:
    """The variables after running the page's Python blocks in order, but for those that hold a text to leave out."""
    space: dict = {"FOLDER": folder}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        if leave_out not in code:
            exec(compile(code, PAGE.name, "exec"), space)  # noqa: S102 our own page
    return space


def test_recipes_of_taps():
    space = recipes(FIXTURES / "qwen3", leave_out="config.experts")
    plain = np.asarray(space["run"]().logits)
    np.testing.assert_array_equal(space["guesses"][-1], plain.argmax(-1))
    for name in ("without", "steered", "patched"):
        assert np.abs(np.asarray(space[name]) - plain).max() > 1e-3, name
    np.testing.assert_allclose(space["by_key"], space["steered"], atol=1e-5 * np.abs(plain).max())
    np.testing.assert_array_equal(np.asarray(space["patched"])[:, :2], plain[:, :2])  # nothing before position 2


def test_the_recipe_of_expert_load():
    space = recipes(FIXTURES / "qwen3_moe", leave_out="mlp.act")
    load, config = np.asarray(space["load"]), space["config"]
    assert load.shape == (config.moe_layers, config.experts)
    assert (load.sum(axis=1) == space["tokens"].size * config.top_k).all()


def test_every_site_is_named():
    assert [name for name in SITES if f"`{name}`" not in PAGE.read_text()] == []
