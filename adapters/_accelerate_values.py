"""Sorts what a program gives to `Accelerator.log`: numbers by phase, texts, and counters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from trainbus.toolkit.adapters import number

_VALIDATION = re.compile(r"val[/_]|valid|eval[/_]")
_TEST = re.compile(r"test[/_]")


def phases(values: Mapping[str, Any], step: int | None) -> dict[str, dict[str, Any]]:
    """Return what is neither a text nor a counter, by phase; the names decide on it.

    Args:
        values: what was given to `log`.
        step: the step that was given beside it, which the values may repeat.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, value in _flat(values):
        repeats = name in ("step", "global_step") and step is not None and number(value) == step
        if name != "epoch" and not repeats and not isinstance(value, str):
            found.setdefault(_phase(name), {})[name] = value
    return found


def texts(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the names and values of what is a text."""
    return ((name, value) for name, value in _flat(values) if isinstance(value, str))


def counter(value: Any) -> int | None:
    """Return a whole number from 0 as an int, None for anything else."""
    found = number(value)
    return int(found) if found is not None and found.is_integer() and found >= 0 else None


def pictures(values: Mapping[str, Any], *, is_chw: bool) -> Iterator[tuple[str, Any]]:
    """Yield names and arrays (H, W) or (H, W, C) of what is given to `log_images`.

    Args:
        values: name → list of arrays or pictures of PIL, or one array of several pictures.
        is_chw: whether channels stand before height and width.
    """
    for name, found in values.items():
        several = found if isinstance(found, list | tuple) else _array(found)
        if isinstance(several, np.ndarray) and several.ndim < 4:
            several = [several]
        arrays = [_array(each) for each in several]
        for i, array in enumerate(arrays):
            array = np.moveaxis(array, 0, -1) if is_chw and array.ndim == 3 else array
            yield (f"{name}/{i}" if len(arrays) > 1 else str(name)), array


def table(columns: Any, data: Any, dataframe: Any) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and rows of what is given to `log_table`."""
    if dataframe is not None:
        columns = list(dataframe.columns)
        data = zip(*(list(dataframe[name]) for name in columns), strict=True)
    rows = [list(row) for row in (() if data is None else data)]
    if columns is None:
        columns = range(max(map(len, rows), default=0))
    return [str(name) for name in columns], rows


def _array(picture: Any) -> Any:
    if hasattr(picture, "detach"):  # a tensor, of any device
        return picture.detach().cpu().numpy()
    if hasattr(picture, "convert"):  # of PIL, whose palettes are no colours
        picture = picture if picture.mode in ("L", "RGB", "RGBA") else picture.convert("RGB")
    return np.asarray(picture)


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{key}", inner) for key, inner in value.items())
        else:
            yield str(name), value


def _phase(name: str) -> str:
    return "validation" if _VALIDATION.match(name) else "test" if _TEST.match(name) else "train"
