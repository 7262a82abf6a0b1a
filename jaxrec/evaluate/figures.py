"""What a recipe writes into figures.json for the report to paint: see ``jaxrec.report_plots.figure_kinds``."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def heatmap(title: str, values: np.ndarray, y: str, x: str, labels: Sequence[str] | None = None) -> dict[str, Any]:
    """values: [rows, columns]. y, x: what rows and columns are. labels: of both axes, where they are the same."""
    shown = np.round(np.asarray(values, float), 5).tolist()
    return {"kind": "heatmap", "title": title, "x": x, "y": y, "labels": labels and list(labels), "values": shown}


def lines(
    title: str, series: Mapping[str, Sequence[float]], x: str, at: Sequence[float] | None = None
) -> dict[str, Any]:
    """series: name -> values over ``at``, by default 0, 1, 2 and so on. x: what these are."""
    kept = {name: np.round(np.asarray(values, float), 6).tolist() for name, values in series.items()}
    places = range(len(next(iter(kept.values())))) if at is None else at
    return {"kind": "lines", "title": title, "x": x, "at": list(places), "series": kept}
