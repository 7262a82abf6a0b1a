"""The wheel: complete, installable, and usable without a checkout."""

from __future__ import annotations

import ast
import os
import site
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("jaxrec", "models", "rl", "analysis", "configs")


def packages_in_tree() -> set[str]:
    return {
        ".".join(path.parent.relative_to(ROOT).parts)
        for floor in FLOORS
        for path in (ROOT / floor).rglob("__init__.py")
    }


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_is_listed():
    assert set(project()["tool"]["setuptools"]["packages"]) == packages_in_tree()


def test_every_dependency_is_pinned_without_addresses():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in text.splitlines() if "==" in line}
    listed = [*project()["project"]["dependencies"], *project()["project"]["optional-dependencies"]["test"]]
    names = {entry.partition(">")[0].lower().replace("_", "-") for entry in listed}
    assert names <= pinned
    assert "://" not in text
    assert " @ " not in text


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**clean, "JAX_PLATFORMS": "cpu", **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: building in the checkout would leave build/ and egg-info behind
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", *FLOORS):
        (source / name).symlink_to(ROOT / name)
    script = f"import sys, setuptools.build_meta as backend\nprint(backend.build_wheel({str(folder)!r}))\n"
    done = run(sys.executable, "-c", script, cwd=source)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a fresh venv that holds the wheel and sees this interpreter's other packages."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    done = run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder)
    target = Path(done.stdout.strip())
    done = run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet"),
        *("--disable-pip-version-check", wheel),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    # A plain path line adds the packages, but does not run their .pth files: an editable install stays unseen.
    (target / "others.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder / "bin"


def test_wheel_holds_the_five_packages_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(FLOORS)
    modules = {str(path.relative_to(ROOT)) for floor in FLOORS for path in (ROOT / floor).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    scripts = {str(path.relative_to(ROOT)) for path in (ROOT / "jaxrec").glob("*.js")}
    assert scripts
    assert {name for name in names if not name.endswith(".py") and ".dist-info/" not in name} == scripts


def test_every_module_imports_from_the_wheel(installed: Path, tmp_path: Path):
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for floor in FLOORS
        for path in (ROOT / floor).rglob("*.py")
        if path.name != "__main__.py"
    )
    code = (
        "import importlib, pathlib, sys\n"
        f"for name in {modules!r}:\n"
        "    module = importlib.import_module(name)\n"
        "    assert pathlib.Path(module.__file__).is_relative_to(sys.prefix), module.__file__\n"
    )
    done = run(installed / "python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_commands_work_without_a_checkout(installed: Path, tmp_path: Path):
    # A package of the same name in the working directory must not be picked up by the command.
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("raise SystemExit('imported from the working directory')")
    for words in (["--help"], ["systems"], ["run", "--help"], ["demo", "--help"]):
        done = run(installed / "jaxrec", *words, cwd=tmp_path)
        assert done.returncode == 0, (words, done.stderr)
        assert "jaxrec" in done.stdout or "DeepRec" in done.stdout


@pytest.mark.parametrize("spec", ["deeprec:demo", "configs/deeprec.py:demo"])
def test_packaged_config_is_found_without_a_checkout(installed: Path, tmp_path: Path, spec: str):
    done = run(installed / "jaxrec", "run", f"--config={spec}", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--config.system='deeprec'" in done.stdout
    assert "--config.variant='demo'" in done.stdout


def test_python_files_parse_on_the_oldest_python():
    oldest = tuple(map(int, project()["project"]["requires-python"].removeprefix(">=").split(".")))
    for floor in FLOORS:
        for path in (ROOT / floor).rglob("*.py"):
            ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=oldest)
