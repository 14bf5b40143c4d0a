"""Curves, confusion matrices, histograms and tables as Plotly figures, as ClearML's plots are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from trainbus.events import ConfusionMatrixLogged, CurveLogged, HistogramLogged, TableLogged


def figure(
    event: CurveLogged | ConfusionMatrixLogged | HistogramLogged | TableLogged,
) -> dict[str, Any]:
    """Return the Plotly figure of an event, as plain JSON values.

    Raises:
        TypeError: a value of the event has the wrong type.
        ValueError: an array of the event has the wrong shape or values.
    """
    x_label, y_label = getattr(event, "x_label", ""), getattr(event, "y_label", "")
    layout: dict[str, Any] = {"xaxis": {}, "yaxis": {}}
    match event:
        case CurveLogged():
            x, y = _numbers(np.asarray(event.x)), _numbers(np.asarray(event.y))
            data = [
                {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": values}
                for name, values in zip(event.classes, y, strict=False)
            ]
        case ConfusionMatrixLogged():
            z = _numbers(np.asarray(event.matrix, dtype=float))
            cells = {"texttemplate": "%{z}", "colorscale": "Blues"}
            data = [{"type": "heatmap", "z": z, "x": event.classes, "y": event.classes, **cells}]
            x_label, y_label = "predicted", "true"
            layout = {"xaxis": {"type": "category"}, "yaxis": {"type": "category"}}
            layout["yaxis"]["autorange"] = "reversed"
        case HistogramLogged():
            edges = np.asarray(event.edges, dtype=float)
            middles, widths = _numbers((edges[:-1] + edges[1:]) / 2), _numbers(np.diff(edges))
            counts = _numbers(np.asarray(event.counts))
            data = [{"type": "bar", "x": middles, "width": widths, "y": counts}]
        case TableLogged():
            rows = [[_cell(value) for value in row] for row in event.rows]
            columns = [list(column) for column in zip(*rows, strict=False)]
            header = {"values": list(event.columns)}
            data = [{"type": "table", "header": header, "cells": {"values": columns}}]
    layout["xaxis"]["title"] = x_label
    layout["yaxis"]["title"] = y_label
    return {"data": data, "layout": layout}


def _numbers(array: Any) -> Any:
    """Return an array as lists, with None for numbers that JSON does not have."""
    found = array.tolist() if isinstance(array, np.ndarray) else array
    if isinstance(found, list):
        return [_numbers(item) for item in found]
    return found if math.isfinite(found) else None


def _cell(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else str(value)
