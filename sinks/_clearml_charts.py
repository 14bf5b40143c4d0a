"""Shows pictures as ClearML's debug samples; curves, matrices, histograms, tables as its plots."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from trainbus.events import (
    ConfusionMatrixLogged,
    CurveLogged,
    HistogramLogged,
    ImageLogged,
    TableLogged,
)
from trainbus.toolkit.plots import picture

from ._clearml_names import title_and_series


def show(logger: Any, event: Any, named: Callable[[str], str], at: int) -> None:
    """Report a picture, chart or table; other events are not shown.

    Args:
        logger: ClearML's.
        event: what is to be shown.
        named: returns the name of an event's key for ClearML, the same for no other.
        at: where the event stands.

    Raises:
        MissingPackageError: pillow is not installed.
        OSError: a file can't be read.
        TypeError: what the event holds is of a wrong type.
        ValueError: what the event holds can't be shown.
    """
    chart = figure(event)
    if chart is not None:
        logger.report_plotly(*title_and_series(named(event.key)), chart, at)
    elif isinstance(event, ImageLogged):
        data, suffix = picture(event)
        # The bytes and not the path: ClearML reads a file later, when it may be another.
        logger.report_media(
            *title_and_series(named(event.key)),
            iteration=at,
            stream=io.BytesIO(data),
            file_extension=suffix or ".png",
            max_history=-1,
        )


def figure(event: Any) -> dict[str, Any] | None:
    """Return an event as a Plotly figure; None if it is none."""
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
        case _:
            return None
    layout["xaxis"]["title"] = x_label
    layout["yaxis"]["title"] = y_label
    return {"data": data, "layout": layout}


def _numbers(array: Any) -> Any:
    """Return an array as lists, with None where JSON has no number."""
    found = array.tolist() if isinstance(array, np.ndarray) else array
    if isinstance(found, list):
        return [_numbers(item) for item in found]
    return found if math.isfinite(found) else None


def _cell(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else str(value)
