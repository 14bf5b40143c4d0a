"""The last evaluation of an Ultralytics validator: curves, class table, confusion matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainbus.events import ConfusionMatrixLogged, CurveLogged, Event, TableLogged


def evaluation(validator: Any, epoch: int | None) -> Iterator[Event]:
    """Yield the curves, the table of classes and the confusion matrix of the last validation."""
    metrics = validator.metrics
    parts = [getattr(metrics, name) for name in ("box", "seg", "pose") if hasattr(metrics, name)]
    names = getattr(metrics, "names", None) or {}
    if isinstance(names, list | tuple):
        names = dict(enumerate(names))
    titles = getattr(metrics, "curves", ())
    curves = list(zip(titles, getattr(metrics, "curves_results", ()), strict=False))
    per_part = max(len(curves) // max(len(parts), 1), 1)
    if validator.args.plots:
        for index, (title, (x, y, x_label, y_label)) in enumerate(curves):
            part = parts[index // per_part]
            rows = np.atleast_2d(np.asarray(y, dtype=float))
            found = _classes(part, rows, names)
            if rows.size and found is not None:
                yield CurveLogged(
                    key=f"curves/{title}",
                    title=title,
                    x=np.asarray(x, dtype=float),
                    y=rows,
                    classes=found,
                    x_label=x_label,
                    y_label=y_label,
                    epoch=epoch,
                )
    if parts and len(parts[0].ap_class_index):
        yield _per_class(validator, parts, names, epoch)
    matrix = getattr(getattr(validator, "confusion_matrix", None), "matrix", None)
    if matrix is not None and np.any(matrix):
        known = getattr(validator.confusion_matrix, "names", None) or names or validator.names
        classes = [str(n) for n in (known.values() if isinstance(known, Mapping) else known)]
        # Ultralytics counts predicted × true, and adds a row and column for the background.
        yield ConfusionMatrixLogged(
            key="confusion_matrix/counts",
            matrix=np.asarray(matrix, dtype=float).T,
            classes=[*classes, "background"][: len(matrix)],
            epoch=epoch,
        )


def _classes(part: Any, rows: NDArray[np.float64], names: Mapping[int, str]) -> list[str] | None:
    """Return the class of each row, None if unknown: classes without instances have no row.

    In the precision-recall curve of older versions, classes that were never predicted have no row
    either: their precision is zero everywhere.
    """
    index = [int(i) for i in part.ap_class_index]
    if len(index) != len(rows):
        index = [i for i, p in zip(index, part.p_curve, strict=False) if np.any(p)]
    if len(index) != len(rows):
        return None
    return [str(names.get(i, i)) for i in index]


def _per_class(
    validator: Any, parts: list[Any], names: Mapping[int, str], epoch: int | None
) -> TableLogged:
    metrics = validator.metrics
    instances = getattr(metrics, "nt_per_class", None)
    instances = getattr(validator, "nt_per_class", None) if instances is None else instances
    suffixes = ["(B)", "(M)" if hasattr(metrics, "seg") else "(P)"]
    columns = ["class", "instances"]
    for suffix in suffixes[: len(parts)]:
        columns += [f"{n}{suffix}" for n in ("precision", "recall", "mAP50", "mAP50-95")]
    rows = []
    for row, index in enumerate(parts[0].ap_class_index):
        count = None if instances is None else int(instances[int(index)])
        results = [float(v) for part in parts for v in part.class_result(row)]
        rows.append([str(names.get(int(index), index)), count, *results])
    return TableLogged(key="metrics/per_class", columns=columns, rows=rows, epoch=epoch)
