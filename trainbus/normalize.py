"""Turns what frameworks and users hand over into plain values that always encode.

Nothing here raises on a value: what can't be kept as it is becomes text.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import msgspec
import numpy as np

from trainbus.events import (
    Array,
    Best,
    CheckpointSaved,
    Failure,
    MetricsLogged,
    ModelDescribed,
    Resumed,
    RunEnded,
)

_MAX_DEPTH = 16
_MAX_TEXT = 64 * 1024
_MAX_ITEMS = 10_000
_MAX_TOTAL = 1_000_000
_MAX_BITS = 8192  # Python refuses to write much longer integers as decimals
_CONTAINERS = (Mapping, list, tuple, set, frozenset, np.ndarray)
_FLOATS = {float}
_PARTS = (Best, Failure, Resumed)
_ARRAYS = ("array", "x", "y", "matrix", "counts", "edges")
_PATHS = ("save_dir", "path")
_NAMES = ("classes", "columns", "tags", "aliases", "paths", "own_loggers")
_NUMBERS: dict[type[Any], tuple[str, ...]] = {
    MetricsLogged: ("values",),
    CheckpointSaved: ("metrics",),
    ModelDescribed: ("speed_ms", "extra"),
}


def plain(value: Any) -> Any:
    """Return `value` as None, bool, int, float, str, list or dict with str keys, all the way down.

    0-d tensors and numpy scalars become numbers, paths and everything unknown text. More than 16
    levels, 10,000 items of one container, 1,000,000 of all together or 64 KiB of one text are cut.
    """
    return _plain(value, (), [_MAX_TOTAL])


def to_number(value: Any) -> bool | int | float | None:
    """Return a number, numpy scalar or tensor of one element as a plain number, else None."""
    try:
        found = value if isinstance(value, bool | int | float) else value.item()
        if isinstance(found, float | np.floating):
            return float(found)
        if isinstance(found, int):
            return found if type(found) in (bool, int) else int(found)
    except Exception:  # no number, more than one element, or one that can't be read
        return None
    return None


def metrics(values: Any) -> tuple[dict[str, float], list[str]]:
    """Return the values that are numbers, as floats, and the names of those that are not."""
    kept: dict[str, float] = {}
    refused: list[str] = []
    for name, value in _take(values.items()):
        number = to_number(value)
        if number is None:
            refused.append(_key(name))
        else:
            kept[_key(name)] = _float(number)
    return kept, refused


def event(value: Any) -> tuple[Any, list[str]]:
    """Return an event that encodes and can be read again, and what had to be left out of it.

    Raises:
        msgspec.ValidationError: a field that the event can't do without has another type.
    """
    refused: list[str] = []
    if type(value) is MetricsLogged and _is_plain(value):
        return value, refused
    value = _struct(value, refused)
    said = [f"metric {name!r}: expected a number" for name in refused]
    try:
        return _convert(value), said
    except msgspec.ValidationError:
        value, wrong = _without_mistyped(value)
        return _convert(value), said + wrong


def _is_plain(value: MetricsLogged) -> bool:
    """Return whether there is nothing to do for the most frequent of all events."""
    values = value.values
    try:
        return (
            type(values) is dict
            and len(values) <= _MAX_ITEMS
            and set(map(type, values.values())) == _FLOATS
            and "".join(values).isascii()
            and type(value.phase) is str
            and value.phase.isascii()
            and (value.epoch is None or type(value.epoch) is int)
            and (value.step is None or type(value.step) is int)
            and abs(value.epoch or 0) < 2**63
            and abs(value.step or 0) < 2**63
        )
    except TypeError:  # a key that is no text
        return False


def _struct(value: Any, refused: list[str]) -> Any:
    changed: dict[str, Any] = {}
    for field in value.__struct_fields__:
        found = getattr(value, field)
        try:
            new = _field(value, field, found, refused)
        except Exception:  # an object that does not even tell what it is
            new = [_repr(found)] if field in _PATHS else _repr(found)
        if new is not found:
            changed[field] = new
    return msgspec.structs.replace(value, **changed) if changed else value


def _field(value: Any, field: str, found: Any, refused: list[str]) -> Any:
    kind = type(found)
    if found is None or kind is bool or kind is float or (kind is int and abs(found) < 2**63):
        return found
    if kind is str:
        return found if found.isascii() else _utf8(found)
    if field in _PATHS and not isinstance(found, os.PathLike):
        return [_repr(found)]  # the text of an object is no place to write to: this is refused
    if isinstance(found, _PARTS):
        return _struct(found, refused)
    if isinstance(found, np.ndarray) and field in _ARRAYS:
        return _array(found)
    if field in _NUMBERS.get(type(value), ()):
        return _metrics(found, field, refused)
    if field in _NAMES:
        return _names(found)
    if field == "rows":
        found = [list(row) if isinstance(row, tuple) else row for row in found]
    if type(found) is list:  # classes and rows must stay as many as they are
        return [plain(item) for item in found]
    return plain(found)


def _names(found: Any) -> Any:
    """Return names as texts: frameworks number columns, and keep classes by their index."""
    if isinstance(found, Mapping):
        found = list(found.values())
    if isinstance(found, str) or not isinstance(found, Iterable):
        return plain(found)
    return [_key(item) for item in found]


def _convert(value: Any) -> Any:
    """Return the event with the types of the schema: what is written otherwise is never read."""
    fields = {name: _builtins(getattr(value, name)) for name in value.__struct_fields__}
    return msgspec.convert(fields, type(value), strict=False, dec_hook=_to_array)


def _without_mistyped(value: Any) -> tuple[Any, list[str]]:
    """Return the event with the defaults of the fields whose values have another type."""
    changed, wrong = {}, []
    for field in msgspec.structs.fields(value):
        try:
            found = _builtins(getattr(value, field.name))
            msgspec.convert(found, field.type, strict=False, dec_hook=_to_array)
        except msgspec.ValidationError as error:
            if not field.required:
                changed[field.name] = field.default
                if field.default is msgspec.NODEFAULT:
                    changed[field.name] = field.default_factory()
                wrong.append(f"{field.name}: {error}")
            elif isinstance(value, RunEnded):  # whatever it says, the run is over
                changed[field.name] = "failed"
                wrong.append(f"{field.name}: {error}")
    return msgspec.structs.replace(value, **changed), wrong


def _builtins(value: Any) -> Any:
    return msgspec.structs.asdict(value) if isinstance(value, _PARTS) else value


def _to_array(kind: type, value: Any) -> Any:
    """Return what stands where an array is expected as one, for numbers in lists."""
    array = value if isinstance(value, np.ndarray) else np.asarray(value)
    if array is not value and array.dtype.kind not in "biuf":
        raise ValueError(f"Expected an array of numbers, got {type(value).__name__}")
    return array


def _metrics(values: Any, field: str, refused: list[str]) -> Any:
    try:
        if all(type(v) is float and type(k) is str and k.isascii() for k, v in values.items()):
            return values
        kept, names = metrics(values)
    except Exception:  # no mapping, or one that can't be read
        kept, names = {}, [field]
    refused += names
    return kept


def _plain(value: Any, inside: tuple[int, ...], left: list[int]) -> Any:
    """Return a value in containers with the ids `inside`, of which `left[0]` more may be taken."""
    try:
        kind = type(value)
        if value is None or kind is bool or kind is float:
            return value
        if isinstance(value, str):
            return _text(value)
        if isinstance(value, _CONTAINERS):
            return _container(value, inside, left)
        number = to_number(value)
        if isinstance(number, int) and number.bit_length() > _MAX_BITS:
            return _text(hex(number))
        if number is not None:
            return number
        return _text(str(value) if hasattr(value, "__fspath__") else _repr(value))
    except Exception:
        return _text(_repr(value))


def _container(value: Any, inside: tuple[int, ...], left: list[int]) -> Any:
    if isinstance(value, np.ndarray):
        if value.ndim == 0:
            return _plain(value.item(), (*inside, id(value)), left)
        value = value[:_MAX_ITEMS].tolist()
    if id(value) in inside or len(inside) >= _MAX_DEPTH or left[0] <= 0:
        return f"<{type(value).__qualname__}: left out>"  # its repr may be as endless as itself
    inside = (*inside, id(value))
    if isinstance(value, Mapping):
        items = _take(value.items())
        left[0] -= len(items)
        return {_key(k): _plain(v, inside, left) for k, v in items}
    taken = _take(value)
    left[0] -= len(taken)
    return [_plain(item, inside, left) for item in taken]


def _array(value: Array) -> Array:
    """Return the array if JSON has numbers for it, else one with text in it."""
    if isinstance(value, np.ma.MaskedArray):
        value = np.ma.filled(value.astype(np.float64), np.nan)
    kind, size = value.dtype.kind, value.dtype.itemsize
    if kind in "biu" or (kind == "f" and size <= 8):
        return value
    if kind == "f":
        with np.errstate(all="ignore"):
            return value.astype(np.float64)
    texts = [_utf8(item) if isinstance(item, str) else _repr(item) for item in value.ravel()]
    return np.array(texts, dtype=np.str_).reshape(value.shape)


def _take(items: Iterable[Any]) -> list[Any]:
    return list(islice(items, _MAX_ITEMS))


def _key(key: Any) -> str:
    return _text(key if isinstance(key, str) else str(plain(key)))


def _text(value: str) -> str:
    return _utf8(str.__getitem__(value, slice(_MAX_TEXT)))


def _utf8(value: str) -> str:
    return str.encode(value, "utf-8", "backslashreplace").decode("utf-8")


def _repr(value: Any) -> str:
    try:
        return _utf8(repr(value)[:1000])
    except Exception as error:  # a broken __repr__ is no reason to lose the rest of the event
        return f"<{type(value).__qualname__}: {type(error).__name__} in repr>"


def _float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf
