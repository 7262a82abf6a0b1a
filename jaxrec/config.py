"""Configs: finding and loading a config file, overrides from the command line, and the copy kept in a workdir.

A config file is Python with `get_config(variant) -> ml_collections.ConfigDict` and `VARIANTS`, a tuple of the variants'
names whose first is the default. It is data only. The dict carries `system` and `variant` (both str), and may carry
`runtime_fields`: dotted names (or prefixes) of fields that describe the machine rather than the experiment, such as a
folder of data; they may differ between a run and its continuation.

Sequences in a config are tuples: that is the form the flag library can override, and the form `from_json` returns.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FieldReference, FrozenConfigDict, config_dict
from ml_collections.config_flags import config_flags

CONFIG_FILE = "config.json"
_OVERRIDE = re.compile(r"--?(no)?config\.([^=]+)(?:=(.*))?$", re.DOTALL)
_SHOWN_DIFFERENCES = 12


class UsageError(ValueError):
    """A command, flag, config or workdir that cannot be used as given; the message says what to do instead."""


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the closest known name, or '' when nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def packaged_configs() -> dict[str, Path]:
    """Name -> file of every config that is installed with the library."""
    spec = importlib.util.find_spec("configs")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return {path.stem: path for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")}


def find_config(spec: str) -> tuple[Path, str]:
    """The file and the variant ('' for the default one) that `--config=SPEC` means.

    SPEC is `path/to/file.py[:variant]`, or `name[:variant]` for a packaged config; a path that does not exist but
    ends in the name of a packaged config (`configs/deeprec.py`) finds that one.

    Raises:
      UsageError: no such file and no such packaged config.
    """
    name, _, variant = spec.partition(":")
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        return path, variant
    packaged = packaged_configs()
    is_name = path.parent in (Path("."), Path("configs")) and path.suffix in ("", ".py")
    if is_name and path.stem in packaged:
        return packaged[path.stem], variant
    raise UsageError(
        f"--config={spec}: no file {name}, and no packaged config of that name"
        f"{nearest(path.stem, packaged)}. Packaged configs: {', '.join(packaged) or 'none'}."
    )


def load_config(spec: str) -> ConfigDict:
    """Loads `--config=SPEC`: the config as its file makes it, open to changes; required fields may be without a value.

    Raises:
      UsageError: the file is missing or broken, the variant is unknown, or `system`/`variant` are missing.
    """
    path, variant = find_config(spec)
    loader = importlib.util.spec_from_file_location(f"_jaxrec_config_{path.stem}", path)
    module = importlib.util.module_from_spec(loader)
    try:
        loader.loader.exec_module(module)
    except SyntaxError as error:
        raise UsageError(f"{path}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        raise UsageError(f"{path}: the config file fails with {type(error).__name__}: {error}") from error
    variants = tuple(getattr(module, "VARIANTS", ()))
    if not variants or not callable(getattr(module, "get_config", None)):
        raise UsageError(f"{path}: a config file defines get_config(variant) and VARIANTS, a tuple of its variants")
    if variant and variant not in variants:
        hint = nearest(variant, variants)
        raise UsageError(f"--config={spec}: no variant '{variant}'{hint}. Variants of {path}: {', '.join(variants)}.")
    try:
        config = module.get_config(variant or variants[0])
    except Exception as error:
        raise UsageError(f"{path}: get_config fails with {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UsageError(f"{path}: get_config returned {type(config).__name__}, not an ml_collections.ConfigDict")
    for field in ("system", "variant"):
        if not isinstance(config.get(field), str):
            raise UsageError(f"{path}: the config lacks the text field '{field}'")
    return config


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted field name -> value of every leaf, sorted by name within a group; None for a required field left open."""
    leaves: dict[str, Any] = {}
    items = (
        config.items(preserve_field_references=True) if isinstance(config, ConfigDict) else config.items()
    )  # a reference is looked into below: reading an open required field directly would raise
    for key, value in items:
        if isinstance(value, FieldReference):
            try:
                value = value.get()
            except config_dict.RequiredValueError:
                value = None
        if isinstance(value, Mapping | ConfigDict):
            leaves.update(flatten(value, f"{prefix}{key}."))
        else:
            leaves[prefix + key] = value
    return leaves


def _given_type(text: str) -> str:
    try:
        return type(ast.literal_eval(text)).__name__
    except (ValueError, SyntaxError):
        return "bool" if text in ("true", "false") else "str"


def _check_override(argument: str, leaves: Mapping[str, Any], source: str) -> None:
    match = _OVERRIDE.match(argument)
    if not match:
        return
    field = re.sub(r"\[.*?\]", "", match.group(2))
    if field in leaves:
        return
    inner = sorted(name for name in leaves if name.startswith(field + "."))
    if inner:
        raise UsageError(f"--config.{field} is a group of fields; set one of them: {', '.join(inner[:8])}")
    # Full names first, then the last part alone: `--config.lr` should lead to `rl.lr`.
    close = difflib.get_close_matches(field, leaves, n=1, cutoff=0.6)
    if not close:
        last = {name.rpartition(".")[2]: name for name in leaves}
        close = [last[name] for name in difflib.get_close_matches(field.rpartition(".")[2], last, n=1, cutoff=0.5)]
    hint = f"; did you mean --config.{close[0]}?" if close else "."
    raise UsageError(f"{source} has no field '{field}'{hint} (`--help` lists all fields)")


def _check_elements(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """A tuple keeps its elements' type; the flag library only checks that it stays a tuple."""
    for field, old in before.items():
        new = after[field]
        kinds = {type(x) for x in old} if isinstance(old, tuple) else set()
        if len(kinds) != 1 or new == old:
            continue
        kind = kinds.pop()
        wrong = [x for x in new if type(x) is not kind and not (kind is float and type(x) is int)]
        if wrong:
            raise UsageError(
                f"--config.{field}: expected a tuple of {kind.__name__}, got {wrong[0]!r} ({type(wrong[0]).__name__})"
            )


def apply_overrides(config: ConfigDict, arguments: Sequence[str], source: str = "the config") -> FrozenConfigDict:
    """Applies `--config.a.b=value` arguments through ml_collections' flag library.

    Args:
      config: changed in place.
      arguments: command-line words, each starting with `--config.` or `--noconfig.` or a value following one.
      source: what the config is called in messages.

    Returns:
      The frozen (immutable, hashable) config.

    Raises:
      UsageError: an unknown field, or a value of the wrong type.
    """
    for field, holder, reference in list(_required(config)):
        # The flag library reads a field before it sets it, which a required one without a value does not allow.
        holder[field.rpartition(".")[2]] = config_dict.placeholder(reference.get_type())
    before = flatten(config)
    for argument in arguments:
        _check_override(argument, before, source)
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    argv = ["jaxrec", *arguments]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, lock_config=False, sys_argv=argv)
        left = values(argv)[1:]
    except flags.IllegalFlagValueError as error:
        match = re.match(r"flag --config\.([^=]+)=(.*?): ", str(error), re.DOTALL)
        if match is None:
            raise UsageError(str(error)) from error
        field, text = match.groups()
        kind = config.get_type(field) if "." not in field else _type_of(config, field)
        raise UsageError(f"--config.{field}: expected {kind.__name__}, got {text!r} ({_given_type(text)})") from error
    except (flags.Error, ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    if left:
        raise UsageError(f"unexpected argument {left[0]!r}")
    _check_elements(before, flatten(config))
    return FrozenConfigDict(config)


def _type_of(config: ConfigDict, field: str) -> type:
    parent, _, leaf = field.rpartition(".")
    for part in parent.split("."):
        config = config[part]
    return config.get_type(leaf)


def resolve_config(spec: str, overrides: Sequence[str] = ()) -> FrozenConfigDict:
    """`load_config` plus `apply_overrides`, plus the check that no required field is left open."""
    config = load_config(spec)
    given = {match.group(2) for match in map(_OVERRIDE.match, overrides) if match}
    missing = [field for field, _, _ in _required(config) if field not in given]
    if missing:
        raise UsageError(f"--config={spec} needs a value for {', '.join(missing)}: add --config.{missing[0]}=...")
    return apply_overrides(config, overrides, f"--config={spec}")


def _required(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, ConfigDict, FieldReference]]:
    """(dotted name, the dict that holds it, its reference) of every required field that has no value yet."""
    for key, value in config.items(preserve_field_references=True):
        if isinstance(value, FieldReference):
            try:
                value.get()
            except config_dict.RequiredValueError:
                yield prefix + key, config, value
        elif isinstance(value, ConfigDict):
            yield from _required(value, f"{prefix}{key}.")


def _plain(value: Any, field: str) -> Any:
    """A config value as JSON types; tuples become lists."""
    if isinstance(value, ConfigDict):
        value = dict(value.items())
    if isinstance(value, Mapping):
        return {key: _plain(inner, f"{field}.{key}".lstrip(".")) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, field) for inner in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UsageError(
        f"config field '{field}' holds {type(value).__name__}; use numbers, text, tuples, or a name for it"
    )


def to_json(config: ConfigDict) -> str:
    """The config as indented JSON."""
    return json.dumps(_plain(config, ""), indent=2) + "\n"


def from_json(text: str) -> FrozenConfigDict:
    """The config that `to_json` wrote (sequences come back as tuples).

    Raises:
      ValueError: `text` is not a JSON object.
    """

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tuples(inner) for key, inner in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    data = json.loads(text)
    if not isinstance(data, dict):
        raise ValueError(f"a config is a JSON object, found {type(data).__name__}")
    return FrozenConfigDict(tuples(data))


def write_atomic(path: Path, text: str) -> None:
    """Writes `path` so that a reader, or a kill in between, sees the old text or the new one, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes private files; results are meant to be shared
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def save_config(workdir: Path, config: ConfigDict) -> None:
    """Writes `workdir/config.json` atomically, making the folder if needed."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomic(workdir / CONFIG_FILE, to_json(config))


def read_config(workdir: Path) -> FrozenConfigDict:
    """Reads `workdir/config.json`.

    Raises:
      UsageError: the file is missing or not a config; the message names it.
    """
    path = workdir / CONFIG_FILE
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{workdir} is not a run's folder: it has no {CONFIG_FILE}") from error
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}); restore it or use another --workdir") from error


def differences(old: ConfigDict, new: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Dotted field -> (old, new) for every field that differs and is not a runtime field of `new`."""
    absent = "<absent>"
    before, after = flatten(from_json(to_json(old))), flatten(from_json(to_json(new)))
    runtime = (*tuple(new.get("runtime_fields", ())), "runtime_fields")
    return {
        field: (before.get(field, absent), after.get(field, absent))
        for field in {**before, **after}
        if before.get(field, absent) != after.get(field, absent)
        and not any(field == name or field.startswith(name + ".") for name in runtime)
    }


def check_workdir(workdir: Path, config: ConfigDict) -> bool:
    """Whether `workdir` already holds a run of this config (True: it will be continued).

    Raises:
      UsageError: the folder belongs to a run with another config, or is not a run's folder at all.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UsageError(f"--workdir={workdir} is a file; name a folder")
    if not (workdir / CONFIG_FILE).exists():
        if workdir.exists() and any(workdir.iterdir()):
            raise UsageError(
                f"--workdir={workdir} is not empty and has no {CONFIG_FILE}, so it is not a run of this program; "
                "name a new or empty folder"
            )
        return False
    changed = differences(read_config(workdir), config)
    if not changed:
        return True
    shown = [f"  {field}: {old!r} there, {new!r} now" for field, (old, new) in changed.items()]
    more = [f"  ... and {len(shown) - _SHOWN_DIFFERENCES} more"] if len(shown) > _SHOWN_DIFFERENCES else []
    raise UsageError(
        "\n".join(
            [f"--workdir={workdir} holds a run with another config:", *shown[:_SHOWN_DIFFERENCES], *more]
            + ["Give the same settings to continue it, name another --workdir, or remove that folder to start anew."]
        )
    )
