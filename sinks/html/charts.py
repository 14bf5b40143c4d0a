"""Values, charts and tables as JSON that JavaScript can read, and the worst class in them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from trainbus.events import (
    ConfusionMatrixLogged,
    CurveLogged,
    HistogramLogged,
    ModelDescribed,
    TableLogged,
)
from trainbus.toolkit.sinks import model_values, to_json

MAX_ROWS = 1_000
MAX_TEXT = 20_000
"""Most rows of a table, and most characters of a text."""

Number = float | str

_IMPORTANT = ("map50-95", "map", "f1", "auc", "acc", "iou", "dice", "recall", "precision", "score")
_COSTS = ("loss", "error")
_AVERAGES = {"all", "mean", "average", "overall", "accuracy", "macro avg", "micro avg"} | {
    "weighted avg",
    "background",
}
_CLASS_COLUMNS = {"class", "classes", "class_name", "label"}


class Worst(msgspec.Struct):
    """The class with the worst result, and the metric that it was judged by."""

    key: str
    name: str
    metric: str
    value: float


def number(value: float) -> Number:
    """Return a number, or its name if it is not finite."""
    found: Number = to_json(float(value))
    return found


def plain(value: Any) -> Any:
    """Return a value as JSON; integers that a float can't represent become strings."""
    return to_json(value, largest=2**53)


def text_of(value: Any) -> str:
    """Return the value of a parameter as people read it."""
    shown = plain(value)
    text = shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False)
    return text[:MAX_TEXT]


def model(event: ModelDescribed) -> dict[str, str]:
    """Return the size and speed of a model."""
    return {name.removeprefix("model/"): text_of(v) for name, v in model_values(event).items()}


def curve(event: CurveLogged, points: int) -> dict[str, Any]:
    """Return a curve at evenly spaced points, to six digits, with its mean over the classes."""
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


def worst_of_table(
    key: str, table: Mapping[str, Any], rows: Sequence[Sequence[Any]]
) -> Worst | None:
    """Return the class with the worst result; None if the table has no results by class."""
    columns = [str(name) for name in table["columns"]]
    if not columns or columns[0].lower() not in _CLASS_COLUMNS:
        return None
    for word in (*_IMPORTANT, *_COSTS):
        for index, column in enumerate(columns[1:], 1):
            results = [
                (float(row[index]), str(row[0]))
                for row in rows
                if len(row) > index and _is_result(row[index]) and not _is_average(str(row[0]))
            ]
            if word in column.lower() and len(results) > 1:
                pick = max if word in _COSTS else min
                value, name = pick(results, key=lambda result: result[0])
                return Worst(key=key, name=name, metric=column, value=value)
    return None


def worst_of_matrix(key: str, matrix: Mapping[str, Any]) -> Worst | None:
    """Return the class with the lowest recall."""
    shares = []
    for index, row in enumerate(matrix["matrix"]):
        name = matrix["classes"][index] if index < len(matrix["classes"]) else str(index)
        if all(_is_result(cell) for cell in row) and sum(row) > 0 and not _is_average(name):
            shares.append((row[index] / sum(row), name))
    if len(shares) < 2:
        return None
    value, name = min(shares, key=lambda share: share[0])
    return Worst(key=key, name=name, metric="recall", value=value)


def _is_result(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_average(name: str) -> bool:
    return name.strip().lower() in _AVERAGES


def rank_of(name: str) -> int:
    """Return the rank of a metric by importance; 0 is the most important."""
    found = (i for i, word in enumerate(_IMPORTANT) if word in name.lower())
    return next(found, len(_IMPORTANT))
