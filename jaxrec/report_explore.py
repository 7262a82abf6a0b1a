"""The interactive part of report.html: widgets that a recipe wrote into explore.json, and the script that draws them.

The widgets stand in the page as JSON, in which no "<" is left, and the script makes text nodes of their texts. The
page's policy names the script by its hash, so that the browser runs nothing else. Nothing is loaded: the page works
from a file. Without JavaScript a sentence says where the averages and the numbers are.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

MAX_BYTES = 32 * 2**20  # of explore.json; what recipes write stays far below
_SCRIPTS = ("report_explore_data.js", "report_explore_view.js")
_LISTS = {  # what the script walks through
    "map": ("selects", "compare", "grids", "views"),
    "curves": ("selects", "at", "views"),
    "table": ("columns",),
    "ranking": ("scores", "marks", "outcomes", "filters", "records"),
}
_FALLBACK = (
    "This part needs JavaScript, which is off or blocked here. The figures above show the averages; the numbers "
    "themselves are in explore.json beside this page."
)

CSS = """
:root{--warm:#d55e00;--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#cc79a7;--c4:#e69f00;--c5:#56b4e9;--c6:#7f7f7f;
--c7:#b8a800}
@media (prefers-color-scheme:dark){:root{--warm:#ff8a4c;--c0:#56b4e9;--c1:#ff8a4c;--c2:#2fc79a;--c3:#e79bc6;
--c4:#f0b840;--c5:#8fa8ff;--c6:#a0a0a0;--c7:#e6dc5a}}
.widget{border:1px solid var(--line);border-radius:.6rem;margin:1rem 0;padding:.2rem .9rem .9rem;background:var(--card)}
.widget h4{margin:.9rem 0 .1rem;font-size:1rem;unicode-bidi:plaintext;overflow-wrap:anywhere}
.widget td,.widget option{unicode-bidi:plaintext}.widget :is(td,th):first-child{min-width:0}
.widget th.text{text-align:left}
.picks{display:flex;flex-wrap:wrap;gap:.4rem .9rem;margin:.6rem 0;align-items:center;font-size:.9rem}
.pick,.tick,.pair{display:inline-flex;gap:.4rem;align-items:center;color:var(--soft);max-width:100%}
.pair{flex-wrap:wrap}
.widget select,.widget input,.widget button{font:inherit;color:var(--ink);background:var(--bg);max-width:100%;
border:1px solid var(--line);border-radius:.35rem;padding:.2rem .45rem}
.widget input[type=number]{width:6.5rem}.widget button{cursor:pointer}.widget button:disabled{opacity:.5;cursor:default}
.widget th button{border:0;padding:0;background:none;color:inherit;font-weight:600}
.widget select.list{width:100%;padding:.2rem}
.widget :focus-visible{outline:2px solid var(--accent);outline-offset:1px}
.widget canvas:focus-visible,.plot:focus-visible{outline-offset:-2px}
.told{font-size:.95rem;min-height:1.6em;font-variant-numeric:tabular-nums}
.plot{display:block;width:100%;min-width:32rem;height:auto}.sample{width:1.6rem;height:.5rem}
.axis{font-size:12px;fill:var(--soft)}.end{text-anchor:end}.middle{text-anchor:middle}
.rule{stroke:var(--line)}.here{stroke:var(--soft);stroke-dasharray:2 3}
.band{fill:var(--accent);opacity:.05}.band.b1{opacity:.16}
.curve{fill:none;stroke-width:2.2;stroke:currentColor}.dot{fill:currentColor}
.c0{color:var(--c0)}.c1{color:var(--c1);stroke-dasharray:7 3}.c2{color:var(--c2);stroke-dasharray:2 3}
.c3{color:var(--c3);stroke-dasharray:8 3 2 3}.c4{color:var(--c4)}.c5{color:var(--c5);stroke-dasharray:7 3}
.c6{color:var(--c6);stroke-dasharray:2 3}.c7{color:var(--c7);stroke-dasharray:8 3 2 3}.dot{stroke-dasharray:none}
.widget td.score{min-width:8rem}.bar{display:block;height:.35rem;margin-left:auto;background:var(--accent);
border-radius:.2rem}
tr.first{background:var(--best)}.widget td.long{min-width:16rem;width:50%;overflow-wrap:anywhere}
.widget td .badge{margin:.05rem}
"""


def read(workdir: Path) -> tuple[list[dict[str, Any]], str]:
    """The widgets of explore.json, none without that file, and a note where it is too large to be shown ("" otherwise).

    Raises:
      ValueError: a damaged file; names it and the widget.
    """
    path = workdir / "explore.json"
    if not path.exists():
        return [], ""
    if (size := path.stat().st_size) > MAX_BYTES:
        most = MAX_BYTES // 2**20
        return [], f"explore.json has {size / 2**20:,.0f} MiB and is left out: a page shows at most {most} MiB"
    try:
        widgets = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; run the last stage again") from error
    if not isinstance(widgets, list):
        raise ValueError(f"{path}: a list of widgets was expected; run the last stage again")
    for number, widget in enumerate(widgets):
        if fault := _fault(widget):
            raise ValueError(f"{path}: widget {number}: {fault}; run the last stage again")
    return widgets, ""


def _fault(widget: Any) -> str:
    """What the script could not begin with; "" if there is nothing."""
    if not isinstance(widget, Mapping) or widget.get("kind") not in _LISTS:
        return f"its kind must be one of {', '.join(_LISTS)}"
    for name in ("title", "about", "note"):
        if not isinstance(widget.get(name), str):
            return f"{name} must be a text"
    for name in _LISTS[widget["kind"]]:
        if not isinstance(widget.get(name), list):
            return f"{name} must be a list"
    return ""


def embedded(widgets: Sequence[Mapping[str, Any]]) -> str:
    """JSON that may stand inside a script element: ASCII, without "<", ">" and "&"; numbers that are none become
    null."""
    text = json.dumps(_finite(widgets), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    """``value`` with None for numbers that JSON does not know (Python reads NaN and Infinity from files)."""
    if isinstance(value, Mapping):
        return {str(name): _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and value - value != 0 else value


@cache
def script() -> str:
    """The script of the page, of the files in this package."""
    return "".join(resources.files("jaxrec").joinpath(name).read_text(encoding="utf-8") for name in _SCRIPTS)


def policy() -> str:
    """What the page's Content-Security-Policy says about scripts: this one alone, by its hash."""
    digest = hashlib.sha256(script().encode("utf-8")).digest()
    return f"script-src 'sha256-{base64.b64encode(digest).decode('ascii')}'"


def section(widgets: Sequence[Mapping[str, Any]]) -> str:
    """The part of the page: what readers without scripts see, the data, the script. No text of a run is markup."""
    return (
        "<h2>Explore</h2>\n"
        f'<div id="explore"><p class="soft">{_FALLBACK}</p></div>\n'
        f'<script type="application/json" id="explore-data">{embedded(widgets)}</script>\n'
        f"<script>{script()}</script>"
    )
