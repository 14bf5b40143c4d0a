"""Names, texts and values as SwanLab takes them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any


def valid_text(text: str) -> str:
    """Return a text that can be written as UTF-8."""
    return text.encode("utf-8", "replace").decode()


def valid_key(name: str) -> str:
    """Return a key that SwanLab takes: no control characters, no dots or slashes at its ends."""
    name = re.sub(r"[\x00-\x1f\x7f]", "_", valid_text(name)).removeprefix("__swanlab__.")
    return name.strip(" ./")


def plain(value: Any) -> Any:
    """Return a value that fits into JSON and YAML; non-finite numbers as text."""
    if isinstance(value, Mapping):
        return {valid_text(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, bool | int | float) or value is None:
        return value if abs(value or 0) < 2**63 else str(value)
    return valid_text(str(value))


def counted(epoch: int | None) -> int | None:
    """Return an epoch counted from 1, as on the axis."""
    return None if epoch is None else epoch + 1
