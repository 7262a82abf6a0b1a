"""Finding, overriding, storing and comparing configs; every mistake is answered with what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from jaxrec import config as config_lib
from jaxrec.config import UsageError
from jaxrec.config_docs import field_comments

CONFIG = """
from ml_collections import ConfigDict, config_dict

VARIANTS = ("demo", "small")

def _optimizer():
    return ConfigDict({
        "lr": 1e-3,  # step size
        # both moments' decay
        "betas": (0.9, 0.99),
    })

def get_config(variant):
    config = ConfigDict()
    config.system = "deeprec"
    config.variant = variant
    config.seed = 0  # of everything
    rl = config.rl = ConfigDict(dict(
        group_size=8,  # answers per prompt
        stop=("</q>", "</a>"),
        clip=False,
    ))
    rl.optimizer = _optimizer()
    # where the files are
    config.data = ConfigDict({"path": config_dict.placeholder(str)})
    if variant == "small":
        config.data.path = config_dict.placeholder(str, required=True)
    config.runtime_fields = ("data.path",)
    return config
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(CONFIG)
    return file


def test_default_and_named_variant(path: Path):
    assert config_lib.resolve_config(str(path)).variant == "demo"
    config = config_lib.resolve_config(f"{path}:small", ["--config.data.path=/files"])
    assert config.variant == "small"
    assert config.data.path == "/files"
    assert isinstance(config, FrozenConfigDict)


@pytest.mark.parametrize(
    ("argument", "field", "value"),
    [
        ("--config.rl.group_size=4", "rl.group_size", 4),
        ("-config.rl.group_size=4", "rl.group_size", 4),
        ("--config.rl.optimizer.lr=1e-5", "rl.optimizer.lr", 1e-5),
        ("--config.rl.optimizer.lr=1", "rl.optimizer.lr", 1.0),
        ("--config.rl.optimizer.betas=(0.8, 0.9)", "rl.optimizer.betas", (0.8, 0.9)),
        ("--config.rl.optimizer.betas=(0, 1)", "rl.optimizer.betas", (0, 1)),
        ("--config.rl.stop=('a',)", "rl.stop", ("a",)),
        ("--config.rl.clip", "rl.clip", True),
        ("--noconfig.rl.clip", "rl.clip", False),
        ("--config.rl.clip=true", "rl.clip", True),
        ("--config.data.path=x=y", "data.path", "x=y"),
    ],
)
def test_overrides(path: Path, argument: str, field: str, value: object):
    config = config_lib.resolve_config(str(path), [argument])
    assert config_lib.flatten(config)[field] == value


def test_override_with_the_value_as_next_word(path: Path):
    assert config_lib.resolve_config(str(path), ["--config.rl.group_size", "2"]).rl.group_size == 2


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.rl.gruop_size=4", ["no field 'rl.gruop_size'", "--config.rl.group_size"]),
        ("--config.lr=4", ["no field 'lr'", "--config.rl.optimizer.lr"]),
        ("--config.rl=4", ["group of fields", "rl.group_size"]),
        ("--config.zzzzzzz=4", ["no field 'zzzzzzz'", "--help"]),
        ("--config.rl.group_size=four", ["rl.group_size", "expected int", "'four'", "str"]),
        ("--config.rl.group_size=1.5", ["rl.group_size", "expected int", "'1.5'", "float"]),
        ("--config.seed=x", ["seed", "expected int"]),
        ("--config.rl.clip=maybe", ["rl.clip", "expected bool", "'maybe'"]),
        ("--config.rl.optimizer.lr=high", ["rl.optimizer.lr", "expected float"]),
        ("--config.rl.optimizer.betas=('a', 1)", ["rl.optimizer.betas", "tuple of float", "'a'"]),
        ("--config.rl.stop=3", ["rl.stop", "tuple of str", "3 (int)"]),
    ],
)
def test_wrong_overrides_name_field_and_remedy(path: Path, argument: str, words: list[str]):
    with pytest.raises(UsageError) as error:
        config_lib.resolve_config(str(path), [argument])
    for word in words:
        assert word in str(error.value)


def test_open_required_field_is_named(path: Path):
    with pytest.raises(UsageError, match=r"needs a value for data\.path: add --config\.data\.path="):
        config_lib.resolve_config(f"{path}:small")


def test_unknown_variant_lists_the_variants(path: Path):
    with pytest.raises(UsageError, match=r"no variant 'smal' \(did you mean small\?\).*demo, small"):
        config_lib.load_config(f"{path}:smal")


@pytest.mark.parametrize("spec", ["nowhere.py", "nowhere", "some/where/deeprec.py", "configs/deeprek.py:demo"])
def test_missing_file_lists_the_packaged_configs(spec: str):
    with pytest.raises(UsageError, match="Packaged configs"):
        config_lib.find_config(spec)


def test_packaged_configs_are_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name, file in config_lib.packaged_configs().items():
        for spec in (name, f"{name}.py", f"configs/{name}.py"):
            assert config_lib.find_config(spec + ":demo") == (file, "demo")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def get_config(:", r"broken\.py:1"),
        ("VARIANTS = ('a',)", "get_config"),
        ("def get_config(v): return 1", "VARIANTS"),
        ("VARIANTS = ('a',)\ndef get_config(v): return {}", "dict, not an ml_collections"),
        ("VARIANTS = ('a',)\ndef get_config(v): return 1 / 0", "ZeroDivisionError"),
        ("import nothing_of_that_name", "ModuleNotFoundError"),
        ("VARIANTS=('a',)\nfrom ml_collections import ConfigDict\ndef get_config(v): return ConfigDict()", "'system'"),
    ],
)
def test_broken_config_files_are_named(tmp_path: Path, source: str, message: str):
    file = tmp_path / "broken.py"
    file.write_text(source)
    with pytest.raises(UsageError, match=message) as error:
        config_lib.load_config(str(file))
    assert "broken.py" in str(error.value)


def test_every_packaged_config_loads_in_every_variant_and_survives_json():
    for name, file in config_lib.packaged_configs().items():
        source = file.read_text(encoding="utf-8")
        assert "VARIANTS" in source
        config = config_lib.load_config(name)
        again = config_lib.from_json(config_lib.to_json(config))
        assert config_lib.flatten(again) == config_lib.flatten(config)


def test_json_round_trip(path: Path):
    config = config_lib.resolve_config(str(path))
    again = config_lib.from_json(config_lib.to_json(config))
    assert config_lib.flatten(again) == config_lib.flatten(config)
    assert again.rl.stop == ("</q>", "</a>")
    assert config_lib.to_json(again) == config_lib.to_json(config)


def test_values_that_json_cannot_hold_are_named():
    with pytest.raises(UsageError, match=r"'model\.dtype' holds type"):
        config_lib.to_json(ConfigDict({"model": {"dtype": float}}))


def test_workdir_of_the_same_config_is_continued(path: Path, tmp_path: Path):
    config = config_lib.resolve_config(str(path))
    workdir = tmp_path / "deep" / "run"
    assert not config_lib.check_workdir(workdir, config)
    config_lib.save_config(workdir, config)
    assert config_lib.check_workdir(workdir, config)
    assert [file.name for file in workdir.iterdir()] == ["config.json"]
    json.loads((workdir / "config.json").read_text())


def test_workdir_of_another_config_lists_the_fields(path: Path, tmp_path: Path):
    workdir = tmp_path / "run"
    config_lib.save_config(workdir, config_lib.resolve_config(str(path)))
    other = config_lib.resolve_config(str(path), ["--config.rl.group_size=4", "--config.seed=3"])
    with pytest.raises(UsageError) as error:
        config_lib.check_workdir(workdir, other)
    message = str(error.value)
    assert "rl.group_size: 8 there, 4 now" in message
    assert "seed: 0 there, 3 now" in message
    assert "optimizer" not in message
    assert "another --workdir" in message


def test_runtime_fields_may_differ(path: Path, tmp_path: Path):
    config_lib.save_config(tmp_path / "run", config_lib.resolve_config(str(path), ["--config.data.path=/a"]))
    assert config_lib.check_workdir(tmp_path / "run", config_lib.resolve_config(str(path), ["--config.data.path=/b"]))


def test_workdirs_that_cannot_be_used(path: Path, tmp_path: Path):
    config = config_lib.resolve_config(str(path))
    with pytest.raises(UsageError, match="is a file"):
        config_lib.check_workdir(path, config)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    with pytest.raises(UsageError, match="not empty"):
        config_lib.check_workdir(tmp_path / "photos", config)
    (tmp_path / "photos" / "config.json").write_text('{"a": ')
    with pytest.raises(UsageError, match=r"config\.json is damaged"):
        config_lib.check_workdir(tmp_path / "photos", config)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path):
    file = tmp_path / "config.json"
    config_lib.write_atomic(file, "old")
    with pytest.raises(UnicodeEncodeError):
        config_lib.write_atomic(file, "new \ud800")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_comments_are_found_where_fields_are_set(path: Path):
    assert field_comments(path) == {
        "seed": "of everything",
        "rl.group_size": "answers per prompt",
        "rl.optimizer.lr": "step size",
        "rl.optimizer.betas": "both moments' decay",
        "data": "where the files are",
        "data.path": "where the files are",
    }
