"""Shows curves, matrices, histograms, tables, texts and pictures as what Comet has for them."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from trainbus.events import (
    ConfusionMatrixLogged,
    CurveLogged,
    HistogramLogged,
    ImageLogged,
    TableLogged,
    TextLogged,
)
from trainbus.toolkit.plots import picture

from ._comet_options import clean


def show(experiment: Any, event: Any, named: Callable[[str], str], step: int) -> None:
    """Log a picture, chart, table or text; other events are not shown.

    Args:
        experiment: Comet's.
        event: what is to be shown.
        named: returns the name of a curve for Comet, the same for no other.
        step: where the event stands.

    Raises:
        MissingPackageError: what draws pictures is not installed.
        OSError: a file can't be read.
        TypeError: what the event holds is of a wrong type.
        ValueError: what the event holds can't be shown.
    """
    match event:
        case ConfusionMatrixLogged() if np.isfinite(event.matrix).all():
            experiment.log_confusion_matrix(
                matrix=event.matrix.tolist(),
                labels=event.classes,
                title=event.key,
                file_name=f"{clean(event.key)}.json",
                max_categories=max(len(event.classes), 1),
                step=step,
            )
        case ImageLogged() | ConfusionMatrixLogged():
            _log_picture(experiment, event, step)
        case CurveLogged():
            for name, values in zip(event.classes, event.y, strict=False):
                points = np.array([event.x, values], dtype=float)
                x, y = points[:, np.isfinite(points).all(axis=0)].tolist()
                if x:
                    experiment.log_curve(named(f"{event.key}/{name}"), x, y, step=step)
        case HistogramLogged():
            from comet_ml.data_structure import Histogram

            histogram, edges = Histogram(), np.asarray(event.edges, dtype=float)
            histogram.add((edges[:-1] + edges[1:]) / 2, counts=event.counts)
            experiment.log_histogram_3d(histogram, name=clean(event.key), step=step)
        case TableLogged():
            text = io.StringIO()
            csv.writer(text).writerows([event.columns, *event.rows])
            name = f"{clean(event.key)}.csv"
            experiment.log_asset_data(text.getvalue(), name=name, step=step)
        case TextLogged():
            # Comet takes a text that is the path of a file for the file.
            text_only = f"{event.text}\n" if os.path.isfile(event.text) else event.text
            experiment.log_text(text_only, step=step, metadata={"key": event.key})


def _log_picture(experiment: Any, event: ImageLogged | ConfusionMatrixLogged, step: int) -> None:
    data, suffix = picture(event)
    caption = getattr(event, "caption", None)
    # The bytes and not the path: Comet reads a file later, when it may be another.
    experiment.log_image(
        io.BytesIO(data),
        name=f"{clean(event.key)}{suffix}",
        step=step,
        metadata={"caption": caption} if caption else None,
    )
