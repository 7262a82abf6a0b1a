"""The notebooks run from top to bottom at reduced size, and equal their source scripts."""

import os
from pathlib import Path

import jupytext
import pytest
from nbclient import NotebookClient

COLAB = Path(__file__).resolve().parents[1] / "colab"
NOTEBOOKS = sorted(COLAB.glob("*.ipynb"))
# What each prints of its result.
RESULTS = {"deeprec_in_ten_minutes": "DeepRec after stage 2", "grsu_simulated_user": "simulated user - chance"}


def _cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_equals_its_source(path):
    assert _cells(jupytext.read(path)) == _cells(jupytext.read(path.with_suffix(".py")))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXREC_NOTEBOOK_VARIANT", "tiny")
    monkeypatch.setenv("JAXREC_NOTEBOOK_WORKDIR", str(tmp_path / "run"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(COLAB.parent), os.environ.get("PYTHONPATH", "")]))
    notebook = jupytext.read(path)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "run" / "report.html").exists()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert RESULTS[path.stem] in printed


def test_every_notebook_is_known():
    assert {path.stem for path in NOTEBOOKS} == set(RESULTS)
