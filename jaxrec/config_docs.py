"""The comments of a config file, field by field, for `--help`: the file stays the one place that explains a field.

A field's comment is the one at the end of its line, or else the comment lines directly above it. Understood are
`config.a.b = value`, nested `ConfigDict(...)`, `dict(...)` and `{...}`, names for a part (`rl = config.rl = ...`), and
functions of the same file that build a part.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Sequence
from pathlib import Path

from jaxrec import config as config_lib

_DICTS = {"ConfigDict", "dict", "FrozenConfigDict"}


def config_tree(spec: str, overrides: Sequence[str]) -> list[str]:
    """Lines that list every field of a config with its value and meaning."""
    path, _ = config_lib.find_config(spec)
    config = config_lib.apply_overrides(config_lib.load_config(spec), overrides, f"--config={spec}")
    comments = field_comments(path)
    lines = ["", f"Fields of {spec} ({path}) and their values:", ""]
    group = ""
    for field, value in config_lib.flatten(config).items():
        parent = field.rpartition(".")[0]
        if parent != group:
            group = parent
            if parent and parent in comments:
                lines += ["", f"  # {parent}: {comments[parent]}"]
            else:
                lines.append("")
        text = f"  --config.{field}={value!r}"
        lines.append(f"{text:<52} # {comments[field]}" if field in comments else text)
    return lines


def field_comments(path: Path) -> dict[str, str]:
    """Dotted field name -> its comment; fields without one are left out."""
    source = path.read_text(encoding="utf-8")
    reader = _Reader(source)
    return {field: text for field, line, last in reader.fields() if (text := reader.comment(line, last))}


class _Reader:
    def __init__(self, source: str) -> None:
        self._lines = source.splitlines()
        self._comments = {
            token.start[0]: (token.start[1], token.string.lstrip("#: ").strip())
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        self._tree = ast.parse(source)
        self._functions = {node.name: node for node in self._tree.body if isinstance(node, ast.FunctionDef)}

    def comment(self, line: int, last: int) -> str:
        for number in (last, line):
            if number in self._comments and self._code(number):
                return self._comments[number][1]
        above: list[str] = []
        line -= 1
        while line in self._comments and not self._code(line):
            above.insert(0, self._comments[line][1])
            line -= 1
        return " ".join(above)

    def _code(self, line: int) -> bool:
        return bool(self._lines[line - 1][: self._comments[line][0]].strip())

    def fields(self) -> list[tuple[str, int, int]]:
        """(dotted name, first line, last line) of each assignment, the first of a name only."""
        found: dict[str, tuple[int, int]] = {}
        main = self._functions.get("get_config")
        if main is not None:
            self._function(main, "", found, ())
        return [(name, *lines) for name, lines in found.items()]

    def _function(self, node: ast.FunctionDef, prefix: str, found: dict, active: tuple[str, ...]) -> None:
        returned = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Return)]
        roots = {value.id for value in returned if isinstance(value, ast.Name)}
        names = dict.fromkeys(roots, prefix)
        for inner in ast.walk(node):
            if isinstance(inner, ast.Assign):
                places = [place for target in inner.targets if (place := _dotted(target, names)) is not None]
                for target in inner.targets:
                    if isinstance(target, ast.Name) and target.id not in roots and places:
                        names[target.id] = places[0] + "."
                for place in places:
                    if place.rstrip("."):
                        found.setdefault(place.rstrip("."), (inner.lineno, inner.end_lineno))
                    base = place if not place or place.endswith(".") else place + "."
                    self._value(inner.value, base, found, (*active, node.name))
        for value in returned:
            if not isinstance(value, ast.Name):
                self._value(value, prefix, found, (*active, node.name))

    def _value(self, value: ast.AST | None, prefix: str, found: dict, active: tuple[str, ...]) -> None:
        if isinstance(value, ast.Dict):
            pairs = [
                (key.value, key.lineno, inner)
                for key, inner in zip(value.keys, value.values)
                if isinstance(key, ast.Constant) and isinstance(key.value, str)
            ]
        elif isinstance(value, ast.Call) and isinstance(value.func, ast.Name | ast.Attribute):
            name = value.func.id if isinstance(value.func, ast.Name) else value.func.attr
            if name in self._functions and name not in active:
                self._function(self._functions[name], prefix, found, active)
            if name not in _DICTS:
                return
            for inner in value.args:
                self._value(inner, prefix, found, active)
            pairs = [(word.arg, word.lineno, word.value) for word in value.keywords if word.arg]
        else:
            return
        for key, line, inner in pairs:
            nested = isinstance(inner, ast.Dict | ast.Call)
            found.setdefault(prefix + key, (line, line if nested else inner.end_lineno))
            self._value(inner, f"{prefix}{key}.", found, active)


def _dotted(target: ast.AST, names: dict[str, str]) -> str | None:
    """'rl.lr' for `config.rl.lr`, given what the root names stand for; None for a target that is not a field."""
    parts: list[str] = []
    while isinstance(target, ast.Attribute):
        parts.insert(0, target.attr)
        target = target.value
    if not isinstance(target, ast.Name) or target.id not in names:
        return None
    return names[target.id] + ".".join(parts)
