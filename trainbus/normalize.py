"""Turns what frameworks and users hand over into plain values that always encode.

Nothing here raises on a value: what can't be kept as it is becomes text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import numpy as np

from trainbus.events import MetricsLogged

_MAX_DEPTH = 16
_MAX_TEXT = 64 * 1024
_MAX_ITEMS = 10_000
_EXACT = (int, bool, type(None))


def plain(value: Any, depth: int = 0) -> Any:
    """Return `value` as None, bool, int, float, str, list or dict with str keys, all the way down.

    0-d tensors and numpy scalars become numbers, paths and everything unknown text. More than 16
    levels, 10,000 items or 64 KiB of one text are cut.
    """
    kind = type(value)
    if kind in _EXACT or kind is float:
        return value
    if isinstance(value, str):
        return _text(value)
    if depth >= _MAX_DEPTH:
        return _text(_repr(value))
    if isinstance(value, Mapping):
        items = _take(value.items())
        return {
            _text(k) if isinstance(k, str) else str(plain(k)): plain(v, depth + 1) for k, v in items
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item, depth + 1) for item in _take(value)]
    if isinstance(value, np.ndarray):
        return (
            [plain(item, depth + 1) for item in value.tolist()]
            if value.ndim
            else plain(value.item())
        )
    number = to_number(value)
    if number is not None:
        return number
    if hasattr(value, "__fspath__"):
        return _text(str(value))
    return _text(_repr(value))


def to_number(value: Any) -> bool | int | float | None:
    """Return a number, numpy scalar or tensor of one element as a plain number, else None."""
    if isinstance(value, bool | int | float):
        return value if type(value) in (bool, int, float) else float(value)
    item = getattr(value, "item", None)
    if item is None:
        return None
    try:
        found = item()
    except Exception:  # an array or tensor with more than one element, or one that can't be read
        return None
    return found if isinstance(found, bool | int | float) else None


def metrics(values: Mapping[Any, Any]) -> tuple[dict[str, float], list[str]]:
    """Return the values that are numbers, as floats, and the names of those that are not."""
    kept: dict[str, float] = {}
    refused: list[str] = []
    for name, value in values.items():
        number = to_number(value)
        if number is None:
            refused.append(str(name))
        else:
            kept[str(name)] = _float(number)
    return kept, refused


def event(value: Any) -> tuple[Any, list[str]]:
    """Return an event whose values all encode, and the names of the metrics it had to leave out."""
    refused: list[str] = []
    changed: dict[str, Any] = {}
    for field in value.__struct_fields__:
        found = getattr(value, field)
        kind = type(found)
        if kind in _EXACT or kind is float or isinstance(found, msgspec.Struct | np.ndarray):
            continue
        if kind is str and found.isascii():
            continue
        if field == "values" and isinstance(value, MetricsLogged):
            if all(type(v) is float and type(k) is str for k, v in found.items()):
                continue
            changed[field], refused = metrics(found)
        else:
            changed[field] = plain(found)
    return (msgspec.structs.replace(value, **changed) if changed else value), refused


def _take(items: Iterable[Any]) -> list[Any]:
    taken = []
    for index, item in enumerate(items):
        if index >= _MAX_ITEMS:
            break
        taken.append(item)
    return taken


def _text(value: str) -> str:
    text = value[:_MAX_TEXT]
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _repr(value: Any) -> str:
    try:
        return repr(value)[:1000]
    except Exception as error:  # a broken __repr__ is no reason to lose the rest of the event
        return f"<{type(value).__qualname__}: {type(error).__name__} in repr>"


def _float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.copysign(math.inf, number)
