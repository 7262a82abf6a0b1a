"""The floors of the house: imports point downwards only, files stay readable, `import jaxrec` stays cheap."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("models", "rl", "analysis", "configs", "jaxrec")
# What a package may import of the others; everything else is an upward (or sideways) arrow.
MAY_IMPORT = {
    "models": {"models"},
    "rl": {"rl", "models"},
    "analysis": {"analysis", "models"},
    "configs": set(),
    "jaxrec": {"jaxrec", "rl", "analysis", "models"},
}
HEAVY = ("jax", "transformers", "grain", "orbax", "tensorflow", "tensorflow_datasets", "torch", "matplotlib", "flax")


def source_files(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def imported_packages(tree: ast.AST, module: str) -> Iterator[tuple[str, int]]:
    """Top-level package and line of every import in `module`, those inside functions included.

    Relative imports and `importlib.import_module("...")` / `__import__("...")` with a literal name count too.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name.partition(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = module.split(".")[: -node.level]
                yield (base or [(node.module or node.names[0].name).partition(".")[0]])[0], node.lineno
            else:
                yield node.module.partition(".")[0], node.lineno
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value.partition(".")[0], node.lineno


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts)  # `package.__init__` keeps its last part, so that relative levels count right


def violations(path: Path, source: str) -> list[str]:
    module = module_name(path)
    allowed = MAY_IMPORT[module.partition(".")[0]]
    return [
        f"{path.relative_to(ROOT)}:{line} imports {package}"
        for package, line in imported_packages(ast.parse(source), module)
        if package in (*PACKAGES, "tests") and package not in allowed
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_downwards(package: str):
    found = [line for path in source_files(package) for line in violations(path, path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/a.py", "import rl.losses"),
        ("models/sub/a.py", "def f():\n    from jaxrec import config"),
        ("rl/a.py", "from analysis import collect"),
        ("analysis/a.py", "import importlib\nimportlib.import_module('rl.policy')"),
        ("rl/a.py", "from .. import jaxrec"),
        ("configs/a.py", "from models.config import Config"),
        ("jaxrec/systems/a.py", "import configs.deeprec"),
        ("jaxrec/a.py", "import tests.conftest"),
    ],
)
def test_the_check_sees_upward_imports(path: str, source: str):
    assert violations(ROOT / path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("rl/envs/a.py", "from ..trajectory import Trajectory\nfrom . import base"),
        ("rl/__init__.py", "from .losses import x"),
        ("jaxrec/systems/a.py", "from rl import grpo\nimport models\nfrom jaxrec.config import to_json"),
        ("configs/a.py", "from ml_collections import ConfigDict"),
    ],
)
def test_the_check_lets_downward_imports_pass(path: str, source: str):
    assert not violations(ROOT / path, source)


def test_no_relative_import_leaves_its_package():
    for path in source_files(*PACKAGES):
        depth = len(path.relative_to(ROOT).parts) - 1
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= depth, f"{path}:{node.lineno}"


def test_files_stay_below_500_lines():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in source_files(*PACKAGES, "tests")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) >= 500
    }
    assert not long


def test_every_folder_with_modules_is_a_package():
    folders = {path.parent for path in source_files(*PACKAGES)}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]


def run_python(code: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_import_jaxrec_is_light():
    code = f"import sys, jaxrec; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = run_python(code, ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_command_line_is_light():
    """Help, checks of flags and `systems` must answer at once, so the command line imports nothing heavy either."""
    code = (
        "import sys, jaxrec.cli\n"
        "assert jaxrec.cli.main(['systems']) == 0\n"
        "assert jaxrec.cli.main(['run', '--config=nothing']) == 2\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = run_python(code, ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize("package", ["models", "rl", "analysis", "configs"])
def test_importing_a_floor_starts_no_backend_and_nothing_heavy(package: str):
    heavy = ("transformers", "grain", "orbax.checkpoint", "tensorflow", "tensorflow_datasets", "torch", "matplotlib")
    code = (
        f"import sys, {package}\n"
        "started = False\n"
        "if 'jax' in sys.modules:\n"
        "    from jax._src import xla_bridge\n"
        "    started = xla_bridge.backends_are_initialized()\n"
        f"print([m for m in {heavy!r} if m in sys.modules], started)"
    )
    done = run_python(code, ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[] False"


@pytest.mark.parametrize("form", ["package", "module"])
def test_a_shadowing_folder_is_named(tmp_path: Path, form: str):
    if form == "package":
        (tmp_path / "models").mkdir()
        (tmp_path / "models" / "__init__.py").write_text("raise SystemExit('imported')")
        culprit = tmp_path / "models"
    else:
        culprit = tmp_path / "rl.py"
        culprit.write_text("raise SystemExit('imported')")
    done = run_python("import jaxrec", tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("ImportError:") == 1
    assert str(culprit.resolve()) in done.stderr
    assert "Rename" in done.stderr


def test_a_plain_folder_of_the_same_name_does_no_harm(tmp_path: Path):
    (tmp_path / "models").mkdir()  # without __init__.py a regular package further down the path wins
    done = run_python("import jaxrec, models; print(models.__file__)", tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(ROOT) in done.stdout
