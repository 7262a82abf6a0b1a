"""report.html: one file, no network, and no script but that of ``jaxrec.report_explore`` where there are widgets.

Every text from a run is escaped: models and data are not trusted.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrec.config import flatten
from jaxrec.report import Run, best_rows, by_reach, format_value, is_number, protocol_line, total_reward
from jaxrec.report_explore import CSS, policy, section
from jaxrec.report_plots import FIGURES, Plot
from jaxrec.systems import SYSTEMS

_LONG_TEXT = 6000

_CSS = """
:root{--bg:#fff;--ink:#1f2328;--soft:#59636e;--line:#d8dee4;--card:#f6f8fa;--best:#dafbe1;--bestink:#116329;
--yes:#1a7f37;--no:#cf222e;--mark:#fff3b0;--tool:#ddf4ff;--toolink:#0550ae;--accent:#0072b2}
@media (prefers-color-scheme:dark){:root{--bg:#0f1419;--ink:#e2e8ef;--soft:#98a4b3;--line:#2b333d;--card:#181f27;
--best:#12351f;--bestink:#7ee2a0;--yes:#3fb950;--no:#ff7b72;--mark:#5c4a00;--tool:#10283c;--toolink:#79c0ff;
--accent:#56b4e9}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:64rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.6rem;margin:.2rem 0 .1rem;line-height:1.25}
h2{font-size:1.15rem;margin:2.4rem 0 .7rem;padding-bottom:.25rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:1.2rem 0 .4rem}
p{margin:.4rem 0}.soft{color:var(--soft);font-size:.9rem}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.92rem}
th,td{padding:.42rem .65rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap;vertical-align:top}
th{color:var(--soft);font-weight:600}
th:first-child,td:first-child{text-align:left;white-space:normal;min-width:9rem}
td.best{background:var(--best);color:var(--bestink);font-weight:650}
tr.reference{font-style:italic;color:var(--soft)}
td small{display:block;color:var(--soft);font-weight:400;font-size:.78em}
td.text{text-align:left;white-space:normal}
.badge{display:inline-block;border-radius:1rem;padding:.08rem .6rem;font-size:.82rem;font-weight:600;white-space:nowrap;
border:1px solid currentColor}
.badge.yes{color:var(--yes)}.badge.no{color:var(--no)}.badge.none{color:var(--soft)}
.badges{display:flex;flex-wrap:wrap;gap:.4rem;margin:.7rem 0}
.note{border-left:3px solid var(--no);padding:.2rem .8rem;background:var(--card)}
figure{margin:1rem 0}figure img{width:100%;height:auto;display:block}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr));gap:.8rem}.grid figure{margin:0}
details{border:1px solid var(--line);border-radius:.5rem;margin:.7rem 0;background:var(--card)}
summary{cursor:pointer;padding:.55rem .8rem;font-weight:600}
details>.in{padding:0 .8rem .8rem}
.traj{border:1px solid var(--line);border-radius:.6rem;margin:1rem 0;padding:.8rem;background:var(--card)}
.traj header{display:flex;flex-wrap:wrap;gap:.3rem .7rem;align-items:baseline;margin-bottom:.5rem}
.traj header b{font-size:1rem}
.seg{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.92rem;padding:.45rem .7rem;margin:.4rem 0;
border-radius:.4rem}
.seg .who{display:block;font-size:.72rem;letter-spacing:.04em;text-transform:uppercase;color:var(--soft)}
.policy{background:var(--bg);border:1px solid var(--line)}
.tool{background:var(--tool);border-left:3px solid var(--toolink)}
.tool .who{color:var(--toolink)}
.traj details{background:transparent;margin:.4rem 0}.traj summary{font-size:.88rem;padding:.3rem .6rem}
mark{background:var(--mark);color:inherit;border-radius:.2rem;padding:0 .15em;font-weight:600}
.parts{display:flex;flex-wrap:wrap;gap:.3rem;font-size:.85rem;font-variant-numeric:tabular-nums}
.parts span{border:1px solid var(--line);border-radius:.35rem;padding:.05rem .45rem;background:var(--bg)}
.conf td{text-align:left;white-space:normal;overflow-wrap:anywhere;font-family:ui-monospace,monospace;font-size:.82rem}
.given{margin:.3rem 0;padding-left:1.8rem}.given li{overflow-wrap:anywhere;font-size:.92rem}
.forest{display:block;width:12rem;height:1.3rem}
@media (max-width:40rem){main{padding:1rem .7rem 3rem}h1{font-size:1.3rem}th,td{padding:.35rem .45rem}}
"""


def page(run: Run, plots: Sequence[Plot]) -> str:
    """The whole report as one HTML text."""
    result = run.result
    name = str(run.config.get("system", "run"))
    title = f"{SYSTEMS[name].title if name in SYSTEMS else name} · {run.config.get('variant', '')}".strip(" ·")
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="soft">{_text(protocol_line(result) if result else "not evaluated yet")}</p>',
        *(f'<p class="note">{_text(note)}</p>' for note in run.notes),
    ]
    if result:
        body += [_badges(result), "<h2>Result</h2>", _table(result), _comparisons(result)]
        for more in result.get("tables", ()):
            body += [f"<h2>{_text(more['title'])}</h2>", _table(more)]
    if drawn := [plot for plot in plots if plot.stage == FIGURES]:
        body += ["<h2>Figures</h2>", _figures(drawn)]
    if run.explore:
        body.append(section(run.explore))
    for stage in dict.fromkeys(plot.stage for plot in plots if plot.stage and plot.stage != FIGURES):
        own = [plot for plot in plots if plot.stage == stage]
        body += [f"<h2>Learning curves: {_text(stage)}</h2>", _figures([plot for plot in own if plot.main])]
        if more := [plot for plot in own if not plot.main]:
            body.append(f'<details><summary>More curves</summary><div class="in">{_figures(more)}</div></details>')
    if total := [plot for plot in plots if not plot.stage]:
        body += ["<h2>Where the time went</h2>", *map(_figure, total)]
    if run.trajectories:
        body += [
            "<h2>Trajectories</h2>",
            '<p class="soft">From the last step of each stage, the latest first: the best reward, the worst, one in '
            "the middle. The target is <mark>marked</mark>.</p>",
            *(_trajectory(row) for row in run.trajectories),
        ]
    if isinstance(samples := (result or {}).get("samples"), list) and samples:
        body += ["<h2>Samples</h2>", *(_sample(number, sample) for number, sample in enumerate(samples, 1))]
    body += ["<h2>Config</h2>", _config(run)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        # Nothing but the embedded images and styles may load, and no script but ours run, whatever a text contains.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'{'; ' + policy() if run.explore else ''}\">"
        f"<title>{_text(title)}</title><style>{_CSS}{CSS if run.explore else ''}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def _text(value: Any) -> str:
    """Escaped text; control characters, which HTML forbids, become visible, and lone surrogates a question mark."""
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", str(value))
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"), quote=True)


def _badges(result: Mapping[str, Any]) -> str:
    marks = []
    for row in result.get("comparisons") or ():
        if row.get("met") is not None:
            kind, word = ("yes", "met") if row["met"] else ("no", "not met")
            marks.append(f'<span class="badge {kind}">{word}: {_text(row.get("name", ""))}</span>')
    return f'<div class="badges">{"".join(marks)}</div>' if marks else ""


def _table(result: Mapping[str, Any]) -> str:
    names = by_reach(result)
    best = {name: best_rows(result, name) for name in names}
    head = "".join(f"<th>{_text(name.replace('_', ' '))}</th>" for name in ["", *names])
    rows = []
    for i, row in enumerate(result["rows"]):
        note = f"<small>{_text(row['note'])}</small>" if row.get("note") else ""
        cells = [f"<td>{_text(row.get('name', i))}{note}</td>"]
        for name in names:
            interval = (row.get("intervals") or {}).get(name)
            ends = f"<small>{' – '.join(_text(format_value(name, v)) for v in interval)}</small>" if interval else ""
            mark = ' class="best"' if i in best[name] else ""
            cells.append(f"<td{mark}>{_text(format_value(name, row.get(name)))}{ends}</td>")
        kind = ' class="reference"' if row.get("reference") else ""
        rows.append(f"<tr{kind}>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _comparisons(result: Mapping[str, Any]) -> str:
    rows = result.get("comparisons") or []
    if not rows:
        return ""
    ends = [abs(row[key]) for row in rows for key in ("difference", "low", "high") if is_number(row.get(key))]
    reach = max(ends, default=0.0) or 1.0
    lines = []
    for row in rows:
        difference, low, high = (row.get(key) for key in ("difference", "low", "high"))
        shown = [f"{value:+.4f}" if is_number(value) else "–" for value in (difference, low, high)]
        met = row.get("met")
        kind, word = {True: ("yes", "met"), False: ("no", "not met")}.get(met, ("none", "no criterion"))
        criterion = f"<small>{_text(row['criterion'])}</small>" if row.get("criterion") else ""
        lines.append(
            f"<tr><td>{_text(row.get('name', ''))}{criterion}</td><td>{_text(row.get('metric', ''))}</td>"
            f"<td>{shown[0]}<small>{shown[1]} to {shown[2]}</small></td>"
            f"<td>{_forest(difference, low, high, reach)}</td>"
            f'<td><span class="badge {kind}">{word}</span></td></tr>'
        )
    head = "<th>comparison</th><th>metric</th><th>difference</th><th>interval</th><th>criterion</th>"
    return (
        '<h3>Paired comparisons</h3><div class="scroll"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _forest(difference: Any, low: Any, high: Any, reach: float) -> str:
    """An interval as a bar about zero (middle of the drawing); `reach` is the value at either edge."""
    if not all(map(is_number, (difference, low, high))):
        return ""
    x = [100 + 92 * value / reach for value in (low, difference, high)]
    colour = "var(--yes)" if low > 0 else "var(--no)" if high < 0 else "var(--soft)"
    return (
        '<svg class="forest" viewBox="0 0 200 20" preserveAspectRatio="none" aria-hidden="true">'
        '<line x1="100" y1="1" x2="100" y2="19" stroke="var(--line)" stroke-width="2"/>'
        f'<line x1="{x[0]:.1f}" y1="10" x2="{x[2]:.1f}" y2="10" stroke="{colour}" stroke-width="3"/>'
        f'<circle cx="{x[1]:.1f}" cy="10" r="5" fill="{colour}"/></svg>'
    )


def _figures(plots: Sequence[Plot]) -> str:
    return f'<div class="grid">{"".join(map(_figure, plots))}</div>' if plots else ""


def _figure(plot: Plot) -> str:
    light, dark = (
        "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
        for path in (plot.light, plot.dark)
    )
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{_text(plot.alt)}"></picture></figure>'
    )


def _marked(text: str, target: str) -> str:
    """Escaped text with every occurrence of the target marked."""
    if len(text) > _LONG_TEXT:
        text = text[:_LONG_TEXT] + f" … ({len(text) - _LONG_TEXT:,} more characters)"
    if not target:
        return _text(text)
    return f"<mark>{_text(target)}</mark>".join(_text(part) for part in text.split(target))


def _trajectory(row: Mapping[str, Any]) -> str:
    target = str(row.get("target") or "")
    rank = row.get("hit_rank")
    kind, word = ("yes", f"target at rank {rank}") if rank is not None else ("none", "target not listed")
    where = " · ".join(str(part) for part in (row.get("stage"), f"step {row.get('step')}") if part)
    parts = [
        f"<span>{_text(name)} {value:+.3g}</span>"
        for name, value in (row.get("reward") or {}).items()
        if is_number(value) and name != "total"
    ]
    history = [str(item) for item in row.get("history") or ()]
    out = [
        '<article class="traj"><header>',
        f"<b>reward {total_reward(row):+.3g}</b>" if row.get("reward") else "",
        f'<span class="badge {kind}">{_text(word)}</span>',
        f'<span class="soft">{_text(where)} · example {_text(row.get("example", ""))}</span></header>',
        f'<div class="parts">{"".join(parts)}</div>' if parts else "",
        f"<p>Target: <mark>{_text(target)}</mark></p>" if target else "",
    ]
    if history:
        shown = " → ".join(_text(item) for item in history[-20:])
        out.append(f'<details><summary>History ({len(history)})</summary><div class="in seg">{shown}</div></details>')
    turn = 0
    for segment in row.get("segments") or ():
        by, text = str(segment.get("by", "")), str(segment.get("text", "")).strip("\n")
        if by == "prompt":
            out.append(f'<details><summary>Prompt</summary><div class="in seg">{_marked(text, target)}</div></details>')
            continue
        turn += by == "policy"
        style, who = ("tool", "tool result") if by == "tool" else ("policy", f"model, turn {turn}")
        out.append(f'<div class="seg {style}"><span class="who">{who}</span>{_marked(text, target)}</div>')
    return "".join(out) + "</article>"


def _sample(number: int, sample: Any) -> str:
    """What a recipe shows of its work: fields of any names, holding texts, numbers, lists, and objects of the same."""
    fields = sample if isinstance(sample, Mapping) else {"": sample}
    parts = "".join(_field(str(name), value) for name, value in fields.items())
    return (
        f'<details{" open" * (number == 1)}><summary>Sample {number}</summary><div class="in">{parts}</div></details>'
    )


def _field(name: str, value: Any) -> str:
    """A field under its name: a text as it stands, a list with numbers."""
    if isinstance(value, list | tuple):
        items = "".join(f"<li>{_value(part)}</li>" for part in value)
        return f'<h3>{_text(name)}</h3><ol class="given">{items}</ol>' if items else ""
    if value in ("", None):
        return ""
    return f'<div class="seg policy"><span class="who">{_text(name)}</span>{_value(value)}</div>'


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "".join(_field(str(name), part) for name, part in value.items())
    if isinstance(value, list | tuple):
        return _field("", value)
    return _marked(value if isinstance(value, str) else format_value("", value), "")


def _config(run: Run) -> str:
    rows = "".join(
        f"<tr><td>{_text(field)}</td><td>{_text(json.dumps(value, ensure_ascii=False))}</td></tr>"
        for field, value in flatten(run.config).items()
    )
    table = f'<table class="conf">{rows}</table>'
    return f'<details><summary>All fields</summary><div class="in scroll">{table}</div></details>'
