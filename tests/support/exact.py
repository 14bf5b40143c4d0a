"""Tells apart what `==` does not: NaN from NaN, 1 from 1.0, 0.0 from -0.0, arrays by dtype."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from trainbus.events import UnknownEvent

_SPELLED = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def exact(value: Any) -> Any:
    """Return a value as one of plain types that equals only what is the same in every detail."""
    if isinstance(value, msgspec.Struct):
        fields = {name: exact(getattr(value, name)) for name in value.__struct_fields__}
        return type(value).__name__, fields
    if isinstance(value, UnknownEvent):
        return value.name, exact(value.data)
    if isinstance(value, np.ndarray):
        return "array", str(value.dtype), value.shape, np.ascontiguousarray(value).tobytes()
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [exact(item) for item in value]
    return type(value).__name__, repr(value)


def spelled(value: Any) -> Any:
    """Return plain data with the numbers that JSON has not as the texts that stand for them."""
    if type(value) is float:
        return _SPELLED.get(repr(value), value)
    if isinstance(value, dict):
        return {key: spelled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [spelled(item) for item in value]
    return value
