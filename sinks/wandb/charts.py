"""Builds the objects that W&B shows: curves, confusion matrices, pictures, tables, histograms.

W&B shows the first 10,000 rows of a chart's table and silently drops the rest; charts built here
fit that limit.
"""

from __future__ import annotations

import csv
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import wandb
from numpy.typing import NDArray

from trainbus import events

ROW_LIMIT = 10_000
_BIN_LIMIT = 512

Floats = NDArray[np.float64]


def points_shown(event: events.CurveLogged, points: int, *, per_class: bool) -> int:
    """Return how many of the requested `points` per class W&B can show."""
    curves = 1 + len(event.classes) if per_class else 1
    return min(points, max(ROW_LIMIT // curves, 2))


def curve(event: events.CurveLogged, points: int, *, per_class: bool) -> Any:
    """Return the chart of a curve: the mean over the classes first, then each class.

    Every curve is interpolated at `points` evenly spaced positions from x[0] to x[-1].
    """
    x, y = curve_arrays(event)
    names = ["mean", *event.classes] if per_class else ["mean"]
    at = np.linspace(x[0], x[-1], points).round(5)
    curves = interpolate(at, x, y.mean(axis=0, keepdims=True)).round(3)
    if per_class:
        curves = np.vstack([curves, interpolate(at, x, y)])
    rows = [
        [name, value, position]
        for name, row in zip(names, curves.round(3).tolist(), strict=True)
        for value, position in zip(row, at.round(3).tolist(), strict=True)
    ]
    data = _table(["class", "y", "x"], [str, float, float], rows)
    title = event.title or event.key
    if not per_class:
        return wandb.plot.line(data, "x", "y", title=title)
    return wandb.plot_table(
        "wandb/area-under-curve/v0",
        data,
        fields={"x": "x", "y": "y", "class": "class"},
        string_fields={
            "title": title,
            "x-axis-title": event.x_label,
            "y-axis-title": event.y_label,
        },
    )


def curve_arrays(event: events.CurveLogged) -> tuple[Floats, Floats]:
    """Return x (N,) and y (C, N) of a curve as floats."""
    return np.asarray(event.x, dtype=float), np.atleast_2d(np.asarray(event.y, dtype=float))


def write_curve(event: events.CurveLogged, path: Path) -> None:
    """Write a whole curve as CSV: a row for each of its N points, a column for each class."""
    x, y = curve_arrays(event)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["x", "mean", *event.classes])
        writer.writerows(np.vstack([x, y.mean(axis=0), y]).T.tolist())


def confusion_matrix(event: events.ConfusionMatrixLogged) -> Any:
    """Return the chart of a confusion matrix; if not all cells fit, of the largest ones."""
    matrix = np.asarray(event.matrix, dtype=float)
    flat = np.arange(matrix.size)
    if matrix.size > ROW_LIMIT:
        flat = np.sort(np.argsort(-matrix, axis=None, kind="stable")[:ROW_LIMIT])
    actual, predicted = np.unravel_index(flat, matrix.shape)
    names = [*event.classes, *map(str, range(len(event.classes), len(matrix)))]
    columns = ["Actual", "Predicted", "nPredictions"]
    rows = [
        [names[i], names[j], value]
        for i, j, value in zip(actual, predicted, matrix.ravel()[flat].tolist(), strict=True)
    ]
    return wandb.plot_table(
        "wandb/confusion_matrix/v1",
        _table(columns, [str, str, float], rows),
        fields={name: name for name in columns},
        string_fields={"title": event.key},
    )


def image(event: events.ImageLogged) -> Any:
    """Return a picture; floats are in 0…1, unlike in wandb itself."""
    if event.array is None:
        if event.path is None or not Path(event.path).is_file():
            raise FileNotFoundError(f"no file at {event.path}")
        return wandb.Image(event.path, caption=event.caption)
    pixels = np.asarray(event.array)
    if pixels.dtype.kind in "fb":
        shares = np.clip(np.nan_to_num(pixels.astype(np.float64)), 0, 1)
        pixels = (shares * 255).round().astype(np.uint8)
    return wandb.Image(pixels, caption=event.caption)


def table(event: events.TableLogged) -> Any:
    """Return a table, whose columns may have values of mixed types."""
    return wandb.Table(columns=list(event.columns), data=event.rows, allow_mixed_types=True)


def text(event: events.TextLogged) -> Any:
    """Return a preformatted text."""
    return wandb.Html(f"<pre>{html.escape(event.text)}</pre>", inject=False)


def histogram(event: events.HistogramLogged) -> Any:
    """Return a histogram of at most 512 bins, the limit of W&B; neighbouring bins are merged."""
    counts, edges = np.asarray(event.counts), np.asarray(event.edges)
    width = -(-len(counts) // _BIN_LIMIT)
    if width > 1:
        starts = np.arange(0, len(counts), width)
        counts, edges = np.add.reduceat(counts, starts), np.append(edges[starts], edges[-1])
    return wandb.Histogram(np_histogram=(counts, edges))


def interpolate(at: Floats, x: Floats, y: Floats) -> Floats:
    """Return y (C, N) over ascending x (N,), interpolated linearly at `at` (M,): an array (C, M).

    It equals `numpy.interp` for each row to the last bit: slope · (at - x[j]) + y[j]
    inside, the first and the last value outside.
    """
    if len(x) == 1:
        return np.repeat(y, len(at), axis=1)
    left = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(x) - 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = (y[:, left + 1] - y[:, left]) / (x[left + 1] - x[left])
        inside = slope * (at - x[left]) + y[:, left]
    inside = np.where(at == x[left], y[:, left], inside)
    inside = np.where(at < x[0], y[:, :1], inside)
    return np.where(at >= x[-1], y[:, -1:], inside)


def _table(columns: Sequence[str], types: list[type], rows: list[list[Any]]) -> wandb.Table:
    # Declared types avoid wandb's inference, which takes seconds for many rows.
    table = wandb.Table(columns=list(columns), dtype=types)
    table.data = rows
    return table
