"""The plots of a run: learning curves per stage, and where the time went; each for light and for dark pages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxrec.report import Run, is_number

# Okabe and Ito's colours: told apart with every common colour blindness, readable on white and on near-black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#B8A800")
_BRIGHT = ("#56B4E9", "#FF8A4C", "#2FC79A", "#E79BC6", "#F0B840", "#8FA8FF", "#A0A0A0", "#E6DC5A")
_THEMES = {
    "": {"ink": "#24292f", "faint": "#d0d7de", "colours": COLOURS},
    "_dark": {"ink": "#d5dbe3", "faint": "#3a424d", "colours": _BRIGHT},
}
Curve = tuple[list[float], list[float]]  # steps, values
_MAIN = ("reward", "valid format", "turns", "response length (tokens)", "ranking", "loss")
_NOT_CURVES = {"step", "time", "epoch"}
FIGURES = "figures"  # the stage of what a recipe wrote into figures.json
# Panel title -> how the metrics that belong in it begin or what they contain; the first that fits takes the metric.
_PANELS = (
    ("reward", ("reward",)),
    ("what the players count", ("counted",)),
    ("valid format", ("valid_format", "format_valid", "format_rate", "valid")),
    ("turns", ("turn", "calls")),
    ("response length (tokens)", ("length", "response_len", "tokens_per")),
    ("ranking", ("recall", "ndcg", "mrr", "hit")),
    ("loss", ("loss",)),
    ("KL", ("kl",)),
    ("entropy", ("entropy",)),
    ("gradient norm", ("grad_norm", "gradient")),
    ("clipped share", ("clip",)),
    ("learning rate", ("lr", "learning_rate")),
    ("tokens per second", ("tokens_per_second", "tok/s", "tok_s")),
)


@dataclass(frozen=True)
class Plot:
    """One plot: its stage ('' for the plot of all stages), what it shows, and its files for light and dark pages."""

    stage: str
    title: str
    alt: str
    main: bool  # shown at once; the others are folded away
    light: Path
    dark: Path


def draw(run: Run, folder: Path) -> list[Plot]:
    """Draws each stage's learning curves and the time per phase into `folder`; old plots there go."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    plots: list[Plot] = []
    for stage in dict.fromkeys(str(row.get("stage", "")) for row in run.metrics):
        rows = [row for row in run.metrics if str(row.get("stage", "")) == stage]
        for title, curves in _panels(rows).items():
            name = _file_name(f"{stage}_{title}")
            plots.append(_save(folder, name, (stage, title), lambda figure, c=curves, t=title: _curves(figure, t, c)))
    seconds = phase_seconds(run.metrics, run.stage_seconds)
    if seconds:
        plots.append(_save(folder, "time", ("", "Time per phase"), lambda figure: _time(figure, seconds)))
    for number, spec in enumerate(run.figures):
        label = (FIGURES, str(spec.get("title", "")))
        paint = figure_kinds()[spec["kind"]]
        plots.append(_save(folder, f"figure_{number}", label, lambda figure, s=spec, p=paint: p(figure, s), main=True))
    return plots


def _file_name(text: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c == "-") else "_" for c in text).strip("_") or "curve"


def phase_seconds(
    metrics: Iterable[Mapping[str, Any]], stages: Mapping[str, float] = MappingProxyType({})
) -> dict[str, dict[str, float]]:
    """stage -> phase -> seconds over all its steps; what is left of a stage's whole time is its phase "other"."""
    total: dict[str, dict[str, float]] = {stage: {} for stage in stages}
    for row in metrics:
        for phase, seconds in (row.get("seconds") or {}).items():
            if is_number(seconds):
                stage = total.setdefault(str(row.get("stage", "")), {})
                stage[str(phase)] = stage.get(str(phase), 0.0) + float(seconds)
    for stage, whole in stages.items():
        rest = whole - sum(total[stage].values())
        if rest > 0.01 * whole:
            total[stage]["other"] = rest
    return {stage: phases for stage, phases in total.items() if phases}


def _panel_of(name: str) -> str:
    low = name.lower().replace(".", "/").replace("-", "_")
    if low.startswith(("reward", "r_")):
        return "reward"
    if "per_second" in low or "tok/s" in low:
        return "tokens per second"
    leaf = low.rpartition("/")[2]
    for title, marks in _PANELS:
        if any(leaf == mark or leaf.startswith(mark) or (len(mark) > 3 and mark in low) for mark in marks):
            return title
    return name


def _panels(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Curve]]:
    """panel title -> metric -> (steps, values); metrics seen only once are results, not curves."""
    curves: dict[str, Curve] = {}
    for place, row in enumerate(rows):
        step = float(row["step"]) if is_number(row.get("step")) else float(place)
        for name, value in row.items():
            if name not in _NOT_CURVES and is_number(value):
                xs, ys = curves.setdefault(str(name), ([], []))
                xs.append(step)
                ys.append(float(value))
    panels: dict[str, dict[str, Curve]] = {}
    order = {title: place for place, (title, _) in enumerate(_PANELS)}
    for name, curve in curves.items():
        if len(curve[0]) > 1:
            panels.setdefault(_panel_of(name), {})[name] = curve
    return dict(sorted(panels.items(), key=lambda item: order.get(item[0], len(order))))


def _save(folder: Path, name: str, label: tuple[str, str], paint: Callable[[Figure], str], main: bool = False) -> Plot:
    paths = []
    alt = ""
    for suffix, theme in _THEMES.items():
        style = {
            "text.color": theme["ink"],
            "axes.labelcolor": theme["ink"],
            "axes.edgecolor": theme["faint"],
            "xtick.color": theme["ink"],
            "ytick.color": theme["ink"],
            "grid.color": theme["faint"],
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.formatter.useoffset": False,
            "axes.prop_cycle": matplotlib.cycler(color=theme["colours"]),
            "text.parse_math": False,  # a metric's name is text, never TeX
        }
        with matplotlib.rc_context(style):
            figure = Figure()
            alt = paint(figure)
            path = folder / f"{name}{suffix}.png"
            figure.savefig(path, dpi=140, transparent=True)
            paths.append(path)
    return Plot(*label, alt, main or label[1] in _MAIN, *paths)


def _curves(figure: Figure, title: str, curves: Mapping[str, Curve]) -> str:
    figure.set_size_inches(4.6, 2.6)
    # Fixed margins: measuring them (constrained layout) would take longer than all the rest.
    figure.subplots_adjust(left=0.13, right=0.98, top=0.89, bottom=0.17)
    _panel(figure.subplots(), title, curves)
    ends = "; ".join(f"{name} from {ys[0]:.4g} to {ys[-1]:.4g}" for name, (_, ys) in curves.items())
    return f"{title} by step: {ends}"


def _panel(ax: Axes, title: str, curves: Mapping[str, Curve], x: str = "step") -> None:
    for place, (name, (xs, ys)) in enumerate(curves.items()):
        colour = f"C{place % len(COLOURS)}"  # of the theme
        dash = "-" if place < len(COLOURS) else "--"
        window = max(1, len(ys) // 20)
        label = _printable(name.partition("/")[2] or name)
        if window > 1:
            ax.plot(xs, ys, color=colour, alpha=0.25, linewidth=0.8)
            ax.plot(xs, _smooth(ys, window), color=colour, linestyle=dash, linewidth=1.8, label=label)
        else:
            marker = "o" if len(ys) < 15 else None
            ax.plot(xs, ys, color=colour, linestyle=dash, linewidth=1.8, marker=marker, markersize=3, label=label)
    low, high = min(min(ys) for _, ys in curves.values()), max(max(ys) for _, ys in curves.values())
    if high - low < 1e-6 * max(abs(low), abs(high), 1e-12):
        room = 0.5 * abs(high) or 1.0  # a constant: without this the axis would show rounding noise
        ax.set_ylim(low - room, high + room)
    ax.set_title(_printable(title), loc="left", fontsize=10, fontweight="bold")
    ax.grid(axis="y", linewidth=0.6)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    ax.set_xlabel(x, fontsize=8)
    ax.tick_params(labelsize=8)
    if len(curves) > 1:
        ax.legend(fontsize=7.5, frameon=False, ncols=2 if len(curves) > 3 else 1)


def _printable(name: str) -> str:
    """A name as one short line without control characters, for which fonts have no sign."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return text if len(text) <= 40 else text[:39] + "…"


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and up to `window - 1` before it: no look ahead, so the end of the curve is honest."""
    return [math.fsum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - window) : i + 1])]


def _time(figure: Figure, seconds: Mapping[str, Mapping[str, float]]) -> str:
    """One bar per stage, its phases stacked."""
    figure.set_size_inches(8.8, 0.9 + 0.45 * len(seconds))
    figure.set_layout_engine("constrained")
    ax = figure.subplots()
    phases = list(dict.fromkeys(phase for stage in seconds.values() for phase in stage))
    stages = list(seconds)
    left = [0.0] * len(stages)
    for place, phase in enumerate(phases):
        wide = [seconds[stage].get(phase, 0.0) for stage in stages]
        ax.barh(
            range(len(stages)), wide, left=left, height=0.6, color=f"C{place % len(COLOURS)}", label=_printable(phase)
        )
        left = [a + b for a, b in zip(left, wide)]
    for place, total in enumerate(left):
        ax.text(total, place, f" {total:,.1f} s", va="center", fontsize=8)
    ax.set_yticks(range(len(stages)), [_printable(stage) for stage in stages])
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.set_xlim(left=0)
    ax.set_xlabel("seconds", fontsize=8)
    ax.tick_params(labelsize=8)
    ax.legend(fontsize=7.5, frameon=False, ncols=min(6, len(phases)), loc="lower right", bbox_to_anchor=(1.0, 1.0))
    return "; ".join(f"{stage} {total:,.1f} s" for stage, total in zip(stages, left))


def figure_kinds() -> dict[str, Callable[[Figure, Mapping[str, Any]], str]]:
    """What a recipe may write into figures.json: the kind of a figure and who paints it."""
    return {"heatmap": _heatmap, "lines": _lines}


def _heatmap(figure: Figure, spec: Mapping[str, Any]) -> str:
    """``values`` [rows, columns]; ``labels`` for both axes of a square one, or None."""
    values, labels = spec["values"], spec.get("labels")
    figure.set_size_inches(4.6, 2.9)
    figure.subplots_adjust(left=0.22 if labels else 0.13, right=0.99, top=0.89, bottom=0.3 if labels else 0.17)
    ax = figure.subplots()
    shown = ax.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
    ax.set_title(_printable(str(spec["title"])), loc="left", fontsize=10, fontweight="bold")
    figure.colorbar(shown, ax=ax)
    if labels:
        places = range(len(labels))
        ax.set_xticks(places, [_printable(str(label)) for label in labels], rotation=40, ha="right")
        ax.set_yticks(places, [_printable(str(label)) for label in labels])
        for i in places:
            for j in places:
                ink = "w" if shown.norm(values[i][j]) < 0.6 else "k"
                ax.text(j, i, f"{values[i][j]:.2f}", ha="center", va="center", fontsize=8, color=ink)
    ax.set_xlabel(_printable(str(spec["x"])), fontsize=8)
    ax.set_ylabel(_printable(str(spec["y"])), fontsize=8)
    ax.tick_params(labelsize=8)
    flat = [v for row in values for v in row]
    return f"{spec['title']}: {len(values)} by {len(values[0])}, from {min(flat):.3g} to {max(flat):.3g}"


def _lines(figure: Figure, spec: Mapping[str, Any]) -> str:
    """``series``: name -> values over ``at``."""
    at = [float(x) for x in spec["at"]]
    curves = {str(name): (at, [float(v) for v in values]) for name, values in spec["series"].items()}
    figure.set_size_inches(4.6, 2.6)
    figure.subplots_adjust(left=0.13, right=0.98, top=0.89, bottom=0.17)
    _panel(figure.subplots(), str(spec["title"]), curves, _printable(str(spec["x"])))
    return f"{spec['title']}: {', '.join(curves)}"
