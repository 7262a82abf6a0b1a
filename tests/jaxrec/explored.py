"""What a page embeds to be explored, read back, and its script run by Node where there is one."""

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from jaxrec import report_explore


class _Scripts(html.parser.HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[dict, str]] = []
        self._open = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self._open = tag == "script"
        if self._open:
            self.found.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        self._open = False

    def handle_data(self, data):
        if self._open:
            attributes, text = self.found.pop()
            self.found.append((attributes, text + data))


def scripts(page: str) -> list[tuple[dict, str]]:
    """(attributes, text) of each script element, as a browser cuts them out."""
    return _Scripts(page).found


def widgets_of(page: str) -> list[dict]:
    """The widgets that a page holds."""
    (text,) = [text for attributes, text in scripts(page) if attributes.get("id") == "explore-data"]
    return json.loads(text)


def choices(widget: dict) -> list[tuple[str, ...]]:
    """Of each view the options that it is chosen by."""
    return [tuple(s["options"][o] for s, o in zip(widget["selects"], v["choice"])) for v in widget["views"]]


def _node(*arguments: str | Path, given: str = "") -> str:
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node is not installed, which runs the report's script here")
    command = [node, *map(str, arguments)]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def computed(folder: Path, expression: str, **values) -> object:
    """What a JavaScript expression over the script's pure functions and ``values`` is."""
    (folder / "script.js").write_text(report_explore.script(), encoding="utf-8")
    names = ", ".join(values)
    code = (
        f"const explore = require({str(folder / 'script.js')!r});"
        f"const {{{names}}} = JSON.parse(require('fs').readFileSync(0, 'utf8'));"
        f"console.log(JSON.stringify({expression}));"
    )
    return json.loads(_node("-e", code, given=json.dumps(values)))


def played(folder: Path, widgets: list[dict], steps: list[list]) -> dict:
    """What the page becomes when its script draws ``widgets`` and a reader takes ``steps``: see fake_page.js."""
    (folder / "script.js").write_text(report_explore.script(), encoding="utf-8")
    given = json.dumps({"data": report_explore.embedded(widgets), "steps": steps})
    return json.loads(_node(Path(__file__).with_name("fake_page.js"), folder / "script.js", given=given))


def balanced(script: str) -> bool:
    """Whether brackets match outside of texts, comments and the one regular expression; what Python can tell."""
    plain = re.sub(r"/\*.*?\*/", "", script, flags=re.DOTALL)
    plain = re.sub(r"= /\[.*\]/g;", "= 0;", plain)
    plain = re.sub(r'"(?:\\.|[^"\\\n])*"', "''", plain)
    plain = re.sub(r"//[^\n]*", "", plain)
    waiting: list[str] = []  # "`" stands for a template, "$" for an expression in it
    place = 0
    while place < len(plain):
        c = plain[place]
        if waiting and waiting[-1] == "`":
            if c == "`":
                waiting.pop()
            elif plain.startswith("${", place):
                waiting.append("}")
                place += 1
        elif c == "`":
            waiting.append("`")
        elif c in "([{":
            waiting.append({"(": ")", "[": "]", "{": "}"}[c])
        elif c in ")]}" and (not waiting or waiting.pop() != c):
            return False
        place += 1
    return not waiting
