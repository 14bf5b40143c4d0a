"""Texts, times and values as Trackio takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any


def valid_text(text: str) -> str:
    """Return a text that can be written as UTF-8."""
    return text.encode("utf-8", "replace").decode()


def iso(time: float) -> str:
    """Return a time as Trackio writes it."""
    return datetime.fromtimestamp(time, timezone.utc).isoformat()


def plain(value: Any) -> Any:
    """Return a value that fits into JSON, non-finite numbers spelled as Trackio spells them."""
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, Mapping):
        return {valid_text(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, bool | float) or value is None:
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else str(value)
    return plain(value.item()) if hasattr(value, "item") and value.size == 1 else str(value)
