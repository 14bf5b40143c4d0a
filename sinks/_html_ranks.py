"""What a person looks for first: which class is the worst, and which metric tells most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

_TELLING = ("map50-95", "map", "f1", "auc", "acc", "iou", "dice", "recall", "precision", "score")
_COSTS = ("loss", "error")
_AVERAGES = {"all", "mean", "average", "overall", "accuracy", "macro avg", "micro avg"} | {
    "weighted avg",
    "background",
}
_CLASS_COLUMNS = {"class", "classes", "class_name", "label"}


class Worst(msgspec.Struct):
    """The class with the worst result, and by what."""

    key: str
    name: str
    metric: str
    value: float


def worst_of_table(
    key: str, table: Mapping[str, Any], rows: Sequence[Sequence[Any]]
) -> Worst | None:
    """Return the class with the worst result, None if the table is not one of results by class."""
    columns = [str(name) for name in table["columns"]]
    if not columns or columns[0].lower() not in _CLASS_COLUMNS:
        return None
    for telling in (*_TELLING, *_COSTS):
        for index, column in enumerate(columns[1:], 1):
            results = [
                (float(row[index]), str(row[0]))
                for row in rows
                if len(row) > index and _is_result(row[index]) and not _is_average(str(row[0]))
            ]
            if telling in column.lower() and len(results) > 1:
                pick = max if telling in _COSTS else min
                value, name = pick(results, key=lambda result: result[0])
                return Worst(key=key, name=name, metric=column, value=value)
    return None


def worst_of_matrix(key: str, matrix: Mapping[str, Any]) -> Worst | None:
    """Return the class of which the smallest share was found."""
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


def weight(name: str) -> int:
    """Return the place of a metric among those that tell of a model, the most telling first."""
    telling = (i for i, word in enumerate(_TELLING) if word in name.lower())
    return next(telling, len(_TELLING))
