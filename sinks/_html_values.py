"""Values, charts and tables as a page has them: as JSON and JavaScript can hold them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainbus.events import (
    ConfusionMatrixLogged,
    CurveLogged,
    HistogramLogged,
    ModelDescribed,
    TableLogged,
)

MAX_ROWS = 1_000
MAX_TEXT = 20_000
"""Kept rows of a table, and characters of a text."""

Number = float | str


def number(value: float) -> Number:
    """Return a number as JSON has it, or its name if it is not finite."""
    found = float(value)
    if math.isfinite(found):
        return found
    return "NaN" if math.isnan(found) else "Infinity" if found > 0 else "-Infinity"


def plain(value: Any) -> Any:
    """Return a value as JSON and JavaScript have it; integers that a float can't hold are text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**53 else str(value)
    return number(value) if isinstance(value, float) else str(value)


def text_of(value: Any) -> str:
    """Return a parameter's value as a person reads it."""
    shown = plain(value)
    text = shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False)
    return text[:MAX_TEXT]


def model(event: ModelDescribed) -> dict[str, str]:
    """Return what is known of a model."""
    known: dict[str, Any] = {
        "parameters": event.parameters,
        "gradients": event.gradients,
        "layers": event.layers,
        "GFLOPs": event.gflops,
        **{f"{name} (ms)": value for name, value in event.speed_ms.items()},
        **event.extra,
    }
    return {name: text_of(value) for name, value in known.items() if value is not None}


def curve(event: CurveLogged, points: int) -> dict[str, Any]:
    """Return a curve with evenly picked points of six digits, its mean over the classes first."""
    x = np.asarray(event.x, dtype=float).ravel()
    y = np.atleast_2d(np.asarray(event.y, dtype=float))
    picked = np.unique(np.linspace(0, len(x) - 1, min(points, len(x))).round().astype(int))
    with np.errstate(all="ignore"):
        mean = y.mean(axis=0) if y.size else x
    names = [*event.classes, *map(str, range(len(event.classes), len(y)))]
    return {
        "title": event.title or event.key,
        "x_label": event.x_label,
        "y_label": event.y_label,
        "epoch": event.epoch,
        "classes": names[: len(y)],
        "x": [_short(value) for value in x[picked]],
        "mean": [_short(value) for value in mean[picked]],
        "y": [[_short(value) for value in row[picked]] for row in y] if y.size else [],
    }


def matrix(event: ConfusionMatrixLogged) -> dict[str, Any]:
    """Return a confusion matrix, true × predicted."""
    return {
        "matrix": plain(np.atleast_2d(np.asarray(event.matrix))),
        "classes": list(event.classes),
        "normalized": event.normalized,
        "epoch": event.epoch,
    }


def histogram(event: HistogramLogged) -> dict[str, Any]:
    """Return a histogram."""
    counts, edges = plain(np.asarray(event.counts)), plain(np.asarray(event.edges))
    return {"counts": counts, "edges": edges, "epoch": event.epoch}


def table(event: TableLogged) -> dict[str, Any]:
    """Return the first rows of a table."""
    return {
        "columns": list(event.columns),
        "rows": [_cells(row) for row in event.rows[:MAX_ROWS]],
        "length": len(event.rows),
        "epoch": event.epoch,
    }


def _cells(row: Sequence[Any]) -> list[Any]:
    shown = [plain(cell) for cell in row]
    return [text_of(cell) if isinstance(cell, list | dict) else cell for cell in shown]


def _short(value: float) -> Number:
    return number(float(f"{value:.6g}"))
