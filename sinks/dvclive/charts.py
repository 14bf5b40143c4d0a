"""Curves, confusion matrices and histograms as points that DVC draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from trainbus.events import ConfusionMatrixLogged, CurveLogged, HistogramLogged

_MAX_CASES = 100_000


class Plot(NamedTuple):
    """Points, and how `Live.log_plot` shows them."""

    points: list[dict[str, Any]]
    settings: dict[str, Any]


def plot_of(event: CurveLogged | ConfusionMatrixLogged | HistogramLogged) -> Plot | None:
    """Return the points of an event for DVC to draw; None if only an image can show it."""
    match event:
        case CurveLogged():
            return _curve(event)
        case ConfusionMatrixLogged():
            return _matrix(event)
        case HistogramLogged():
            return _histogram(event)


def _curve(event: CurveLogged) -> Plot:
    x, *y = _distinct([event.x_label or "x", *event.classes])
    points = [
        dict(zip([x, *y], map(_number, row), strict=False))
        for row in zip(event.x, *event.y, strict=False)
    ]
    title, label = event.title or event.key, event.y_label or None
    return Plot(points, {"x": x, "y": y, "title": title, "y_label": label})


def _matrix(event: ConfusionMatrixLogged) -> Plot | None:
    counts = np.asarray(event.matrix, dtype=float)
    is_counts = np.isfinite(counts).all() and (counts >= 0).all() and (counts % 1 == 0).all()
    # DVC counts the cases itself, so each one is a point.
    if event.normalized or not is_counts or counts.sum() > _MAX_CASES:
        return None
    names = _distinct(event.classes)
    cases = [
        {"actual": names[row], "predicted": names[column]}
        for (row, column), count in np.ndenumerate(counts)
        for _ in range(int(count))
    ]
    settings = {"x": "actual", "y": "predicted", "template": "confusion", "title": event.key}
    return Plot(cases, settings)


def _histogram(event: HistogramLogged) -> Plot:
    bars = [
        {"bin": f"{low:g} … {high:g}", "count": _number(count)}
        for low, high, count in zip(event.edges, event.edges[1:], event.counts, strict=False)
    ]
    settings = {"x": "count", "y": "bin", "template": "bar_horizontal", "title": event.key}
    return Plot(bars, settings)


def _number(value: Any) -> float | None:
    """Return a number that JSON can represent; NaN and ±Inf become a gap."""
    found = float(value)
    return found if math.isfinite(found) else None


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the names, with `_` added where a name occurs twice."""
    found: list[str] = []
    for name in names:
        while name in found:
            name += "_"
        found.append(name)
    return found
