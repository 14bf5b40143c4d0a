"""Splits what a training logs under names into events: each value becomes what it is.

Numbers become metrics, text a text, figures and pictures an image, numbers in rows and data frames
a table, long vectors a curve or a histogram; mappings and short vectors are flattened. Nothing here
raises on a value: what is none of these is named, with what to do about it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from trainbus import normalize
from trainbus.events import (
    Array,
    CurveLogged,
    Event,
    HistogramLogged,
    ImageLogged,
    MetricsLogged,
    TableLogged,
    TextLogged,
)
from trainbus.toolkit import plots

_FLOATS = {float}
_MAX_DEPTH = 16
_MAX_METRICS = 10_000
_MAX_SPREAD = 100  # as many classes as users look at one by one; more are a curve
_MAX_POINTS = 10_000  # of a vector that is kept to the last value; more are a histogram
_MAX_CELLS = 100_000
_MIN_SIDE = 8  # of a picture among values: kernels of a convolution have smaller sides
_BINS = 64


def split(
    values: Any,
    phase: str,
    *,
    epoch: Any = None,
    step: Any = None,
    final: bool = False,
    on_request: bool = False,
    prefix: str = "",
) -> tuple[list[Event], list[str]]:
    """Return the events that named values are, and what can't be recorded of them.

    Args:
        values: a mapping, or what `normalize.mapping` makes one of.
        phase: what the values were measured in.
        epoch: the epoch that they belong to.
        step: optimizer updates done.
        final: whether they evaluate the chosen weights after training.
        on_request: whether they were measured only because a sink asked.
        prefix: comes before names without a `/`.
    """
    numbers = _only_floats(values, prefix)
    if numbers is None:
        found = _Split(epoch, step)
        found.take(values, prefix)
        numbers, events, left_out = found.numbers, found.events, found.left_out
    else:
        events, left_out = [], []
    if numbers:
        measured = MetricsLogged(
            values=numbers,
            phase=phase if isinstance(phase, str) else str(phase),
            epoch=epoch,
            step=step,
            final=final,
            on_request=on_request,
        )
        events = [measured, *events]
    return events, left_out


def _only_floats(values: Any, prefix: str) -> dict[str, float] | None:
    """Return the most frequent of all values: floats with names, and nothing else."""
    try:
        if type(values) is not dict or set(map(type, values.values())) != _FLOATS:
            return None
        if len(values) > _MAX_METRICS:
            return None
        if not prefix:
            return dict(values) if set(map(type, values)) == {str} else None
        return dict(zip(_prefixed(tuple(values), prefix), values.values(), strict=True))
    except TypeError:  # a name that is no text
        return None


@lru_cache(maxsize=256)
def _prefixed(names: tuple[str, ...], prefix: str) -> tuple[str, ...]:
    """Return names with their prefix; those of a training are the same at every step."""
    return tuple(prefixed(prefix, name) for name in names)


class _Split:
    def __init__(self, epoch: Any, step: Any) -> None:
        self.numbers: dict[str, float] = {}
        self.events: list[Event] = []
        self.left_out: list[str] = []
        self._at = {"epoch": epoch, "step": step}

    def take(self, values: Any, prefix: str) -> None:
        try:
            named = normalize.mapping(values)
            if named is None and callable(getattr(values, "items", None)):
                named = dict(values.items())  # of a row of a data frame
        except Exception:
            named = None
        if named is None:
            self._refuse("values", f"expected names with values, found {_type(values)}")
            return
        for key, value in named.items():
            self._put(normalize.name_of(key), value, prefix, ())

    def _put(self, name: str, value: Any, prefix: str, inside: tuple[int, ...]) -> None:
        try:
            if value is None:
                return  # which is how frameworks say that there is no value this time
            if id(value) in inside or len(inside) >= _MAX_DEPTH:
                self._refuse(name, "it is nested without end")
                return
            is_one = not isinstance(value, str) and not hasattr(value, "columns")
            if is_one and (number := normalize.to_number(value)) is not None:
                self._number(prefixed(prefix, name), number)
                return
            if not isinstance(value, str | np.ndarray):
                parts = _parts(value)
                if parts is not None:
                    for key, part in parts.items():
                        under = f"{name}/{normalize.name_of(key)}"
                        self._put(under, part, prefix, (*inside, id(value)))
                    return
            self._one(prefixed(prefix, name), value, inside)
        except Exception as error:  # a value that can't be looked at
            self._refuse(name, f"{type(error).__name__}: {error}")

    def _number(self, name: str, number: float) -> None:
        if name not in self.numbers and len(self.numbers) >= _MAX_METRICS:
            self._refuse(name, f"there are more than {_MAX_METRICS} values")
        elif name in self.numbers:
            self._refuse(name, "another value has the same name")
        else:
            self.numbers[name] = normalize.to_float(number)

    def _one(self, name: str, value: Any, inside: tuple[int, ...]) -> None:
        """Take a value that is neither a number nor a mapping."""
        text = value if isinstance(value, str) else _text(value)
        if text is not None:
            self._add(TextLogged, name, text=text)
        elif (picture := _picture_of(value)) is not None:
            self._add(ImageLogged, name, array=plots.pixels(picture))
        elif _are_pictures(value):
            for index, picture in enumerate(value):
                self._put(f"{name}/{index}", picture, "", inside)
        elif (table := table_of(value)) is not None:
            self._add(TableLogged, name, columns=table[0], rows=table[1])
        elif (histogram := _histogram_of(value)) is not None:
            self._add(HistogramLogged, name, counts=histogram[0], edges=histogram[1])
        elif (array := normalize.to_array(value)) is not None:
            self._array(name, array)
        else:
            self._refuse(name, f"{_type(value)} is {_hint(value)}")

    def _array(self, name: str, array: Array) -> None:
        picture = _picture(array)
        if not array.size:
            self._refuse(name, "it is empty")
        elif array.ndim == 1 and array.size <= _MAX_SPREAD:
            for index, number in enumerate(array.tolist()):
                self._number(f"{name}/{index}", number)
        elif array.ndim == 1 and array.size <= _MAX_POINTS:
            self._add(
                CurveLogged,
                name,
                x=np.arange(array.size),
                y=array[np.newaxis],
                classes=[name],
                title=name,
                x_label="index",
                y_label="value",
            )
        elif picture is not None:
            self._add(ImageLogged, name, array=picture)
        elif array.ndim == 2 and array.size <= _MAX_CELLS:
            columns = [str(index) for index in range(array.shape[1])]
            self._add(TableLogged, name, columns=columns, rows=array.tolist())
        elif array.ndim > 3 and _picture(array[0]) is not None:
            self._refuse(name, f"{array.shape} are pictures in a batch: log each on its own")
        else:
            counts, edges = _counted(array)
            self._add(HistogramLogged, name, counts=counts, edges=edges)

    def _add(self, kind: Callable[..., Event], key: str, **fields: Any) -> None:
        self.events.append(kind(key=key, **fields, **self._at))

    def _refuse(self, name: str, why: str) -> None:
        self.left_out.append(f"{name!r}: {why}")


def prefixed(prefix: str, name: str) -> str:
    """Return a name with its prefix, which a name with a `/` does not get."""
    return name if not prefix or "/" in name else prefix + name


def table_of(value: Any) -> tuple[list[str], list[list[Any]]] | None:
    """Return the columns and rows of a table; None for what is none.

    It may be a data frame of pandas or polars, a table of Arrow, columns and data as `wandb.Table`
    has them, or a list of mappings, of lists with other than numbers, or of strings.
    """
    if hasattr(value, "iloc") and hasattr(value, "columns"):
        return _of_pandas(value)
    if callable(getattr(value, "rows", None)) and hasattr(value, "columns"):
        return _names(value.columns), [list(row) for row in value.rows()]
    if callable(getattr(value, "to_pylist", None)) and hasattr(value, "column_names"):
        names = _names(value.column_names)
        return names, [[row[name] for name in value.column_names] for row in value.to_pylist()]
    columns, data = getattr(value, "columns", None), getattr(value, "data", None)
    if isinstance(columns, list) and isinstance(data, list):
        return _names(columns), [list(row) for row in data]
    if not isinstance(value, list | tuple) or not value:
        return None
    if all(isinstance(row, Mapping) for row in value):
        keys = list(dict.fromkeys(key for row in value for key in row))
        return _names(keys), [[row.get(key) for key in keys] for row in value]
    if all(isinstance(item, str) for item in value):
        return ["value"], [[item] for item in value]
    if all(isinstance(row, list | tuple) for row in value) and normalize.to_array(value) is None:
        width = max(map(len, value))
        rows = [[*row, *[None] * (width - len(row))] for row in value]
        is_cell = all(_is_cell(cell) for row in rows for cell in row)
        return ([str(index) for index in range(width)], rows) if width and is_cell else None
    return None


def _of_pandas(frame: Any) -> tuple[list[str], list[list[Any]]]:
    columns, index = frame.columns, frame.index
    names = ["/".join(map(str, c)) if isinstance(c, tuple) else str(c) for c in columns]
    lists = [_cells(frame.iloc[:, place]) for place in range(len(names))]
    if type(index).__name__ != "RangeIndex" or index.name is not None:
        names.insert(0, "/".join(str(n) for n in index.names if n is not None) or "index")
        lists.insert(0, ["/".join(map(str, i)) if isinstance(i, tuple) else i for i in index])
    rows = [list(row) for row in zip(*lists, strict=True)]
    return names, rows


def _cells(column: Any) -> list[Any]:
    kind = getattr(column.dtype, "kind", "O")
    if kind in "biuf" and isinstance(column.dtype, np.dtype):
        return column.tolist()  # type: ignore[no-any-return]
    return [None if missing else cell for cell, missing in zip(column, column.isna(), strict=True)]


def _names(columns: Iterable[Any]) -> list[str]:
    return [normalize.name_of(column) for column in columns]


def _is_cell(value: Any) -> bool:
    return value is None or isinstance(value, str | bool | int | float | np.generic)


def _parts(value: Any) -> Mapping[Any, Any] | None:
    """Return what a value flattens to: the parts of a mapping, or of a labelled series."""
    if hasattr(value, "iloc") and not hasattr(value, "columns"):
        is_labelled = type(value.index).__name__ != "RangeIndex" and len(value) <= _MAX_SPREAD
        return dict(value.items()) if is_labelled else None
    if hasattr(value, "columns") or callable(getattr(value, "detach", None)):
        return None
    if type(value) in (list, tuple) or plots.is_pillow(value):
        return None
    return normalize.mapping(value)


def _text(value: Any) -> str | None:
    """Return the text that stands for a value better than its numbers, None if none does."""
    if isinstance(value, enum.Enum) or hasattr(value, "isoformat") or hasattr(value, "__fspath__"):
        return str(normalize.plain(value))
    return None


def _histogram_of(value: Any) -> tuple[Array, Array] | None:
    """Return counts and edges as `np.histogram` or a histogram of W&B's has them, else None."""
    if isinstance(value, tuple) and len(value) == 2:
        counts, edges = value
    else:
        counts, edges = getattr(value, "histogram", None), getattr(value, "bins", None)
    if isinstance(counts, np.ndarray | list) and isinstance(edges, np.ndarray | list):
        found = normalize.to_array(counts), normalize.to_array(edges)
        if found[0] is not None and found[1] is not None:
            fits = found[0].ndim == found[1].ndim == 1 and found[1].size == found[0].size + 1
            return (found[0], found[1]) if fits else None
    return None


def _counted(array: Array) -> tuple[Array, Array]:
    values = array.astype(np.float64).ravel()
    known = values[np.isfinite(values)]
    if not known.size:
        raise ValueError("it has no finite number")
    return np.histogram(known, bins=_BINS)


def _picture(array: Array) -> Array | None:
    """Return an array as a picture if its shape and type leave no doubt, else None."""
    sides = sorted(array.shape)[-2:]
    if array.ndim not in (2, 3) or min(sides) < _MIN_SIDE:
        return None
    if array.ndim == 2:
        return array if array.dtype == np.uint8 and min(sides) >= 4 * _MIN_SIDE else None
    if array.shape[2] not in (1, 3, 4) and array.shape[0] not in (1, 3, 4):
        return None
    return plots.pixels(array)


def _are_pictures(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and 0 < len(value) <= _MAX_SPREAD
        and all(_picture_of(each) is not None for each in value)
    )


def _picture_of(value: Any) -> Any:
    """Return a figure, a picture of Pillow, or what a tracker's or logger's own image holds."""
    if isinstance(value, np.ndarray | list | tuple) and not plots.figure_of(value):
        return None
    inner = getattr(value, "image", None)
    is_array = isinstance(inner, np.ndarray) or callable(getattr(inner, "detach", None))
    is_wrapped = plots.is_pillow(inner) or is_array
    if is_wrapped or plots.is_pillow(value) or plots.figure_of(value) is not None:
        return inner if is_wrapped else value
    return None


def _hint(value: Any) -> str:
    kind = type(value)
    if kind.__module__.startswith("plotly"):
        return (
            "drawn by a browser alone: log `write_image` of it as a picture, "
            "or `write_html` as an artifact"
        )
    if isinstance(value, bytes | bytearray | memoryview):
        return "no value: log a picture by its path or array, a file as an artifact"
    if callable(getattr(value, "detach", None)) or isinstance(value, np.ndarray):
        return f"without real numbers to read ({getattr(value, 'dtype', '')}): log its parts"
    if isinstance(value, Sequence):
        return "neither numbers nor rows: log its items under names of their own"
    return "no number, text, picture or table: log one of these"


def _type(value: Any) -> str:
    kind = type(value)
    return (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )
