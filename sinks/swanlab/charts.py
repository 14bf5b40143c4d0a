"""What SwanLab shows besides numbers: images, texts, and charts drawn by ECharts."""

from __future__ import annotations

import io
import itertools
from typing import Any

import numpy as np

from trainbus import events
from trainbus.toolkit.plots import png
from trainbus.toolkit.sinks import to_json, utf8

_MAX_CELLS = 30


def media(event: Any) -> Any:
    """Return the SwanLab object that shows an event.

    Raises:
        MissingPackageError: pillow is not installed.
        OSError: the file of an image can't be read.
        ValueError: an image has neither a path nor an array.
    """
    import swanlab

    match event:
        case events.ImageLogged():
            return swanlab.Image(_picture(event), caption=event.caption)
        case events.TextLogged():
            return swanlab.Text(utf8(event.text))
        case events.CurveLogged():
            chart = _curve(swanlab.echarts, event)
        case events.ConfusionMatrixLogged():
            chart = _matrix(swanlab.echarts, event)
        case events.TableLogged():
            chart = _table(swanlab.echarts, event)
        case _:
            chart = _histogram(swanlab.echarts, event)
    return swanlab.ECharts(chart)


def _picture(event: events.ImageLogged) -> Any:
    """Return the image as a path or an image of Pillow."""
    if event.path is not None:
        return event.path
    if event.array is None:
        raise ValueError("it has neither a path nor an array")
    content = png(event.array)
    from PIL import Image

    return Image.open(io.BytesIO(content))


def _curve(echarts: Any, event: events.CurveLogged) -> Any:
    options = echarts.options
    chart = echarts.Line().add_xaxis(np.asarray(event.x).tolist())
    for name, values in zip(event.classes, event.y, strict=False):
        chart.add_yaxis(utf8(name), np.asarray(values).tolist(), is_symbol_show=False)
    chart.set_global_opts(
        title_opts=options.TitleOpts(title=utf8(event.title or event.key)),
        xaxis_opts=options.AxisOpts(type_="value", name=utf8(event.x_label)),
        yaxis_opts=options.AxisOpts(type_="value", name=utf8(event.y_label)),
        legend_opts=options.LegendOpts(type_="scroll", pos_bottom="0"),
        tooltip_opts=options.TooltipOpts(trigger="axis"),
    )
    return chart.set_series_opts(label_opts=options.LabelOpts(is_show=False))


def _matrix(echarts: Any, event: events.ConfusionMatrixLogged) -> Any:
    options, names = echarts.options, [utf8(name) for name in event.classes]
    shares = np.asarray(event.matrix, dtype=float)
    cells = [[column, row, value] for (row, column), value in np.ndenumerate(shares.round(4))]
    chart = echarts.HeatMap().add_xaxis(names)
    label = options.LabelOpts(is_show=len(names) <= _MAX_CELLS, position="inside")
    chart.add_yaxis("", names, cells, label_opts=label)
    most = float(np.nanmax(shares, initial=0.0, where=np.isfinite(shares)))
    return chart.set_global_opts(
        title_opts=options.TitleOpts(title=utf8(event.key)),
        legend_opts=options.LegendOpts(is_show=False),
        xaxis_opts=options.AxisOpts(type_="category", name="predicted"),
        yaxis_opts=options.AxisOpts(type_="category", name="true"),
        visualmap_opts=options.VisualMapOpts(min_=0, max_=most or 1.0),
    )


def _table(echarts: Any, event: events.TableLogged) -> Any:
    names = [utf8(name) for name in event.columns]
    names = [n if names.index(n) == i else f"{n} ({i})" for i, n in enumerate(names)]
    return echarts.Table().add(names, [to_json(row) for row in event.rows])


def _histogram(echarts: Any, event: events.HistogramLogged) -> Any:
    edges = [f"{edge:.4g}" for edge in np.asarray(event.edges).tolist()]
    bins = [f"{low} – {high}" for low, high in itertools.pairwise(edges)]
    chart = echarts.Bar().add_xaxis(bins)
    chart.add_yaxis(utf8(event.key), np.asarray(event.counts).tolist(), category_gap=0)
    return chart.set_series_opts(label_opts=echarts.options.LabelOpts(is_show=False))
