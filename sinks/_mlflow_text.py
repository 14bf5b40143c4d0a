"""Names and texts that MLflow takes, and fields of a record as JSON has them."""

from __future__ import annotations

import json
import re
from typing import Any

from trainbus.events import Record, encode


def clean_name(name: str) -> str:
    """Return the name of a metric, parameter or tag with nothing in it that MLflow refuses."""
    return _joined(re.sub(r"[^\w./\- :]", "_", name))


def clean_path(path: str) -> str:
    """Return a path of an artifact that every store takes."""
    return _joined(re.sub(r"[^A-Za-z0-9_./ -]", "_", path))


def clean_text(text: str) -> str:
    """Return a text that can be written: half of a character is replaced."""
    return text.encode("utf-8", "replace").decode().replace("\x00", "")


def fields(record: Record, *names: str) -> dict[str, Any]:
    """Return fields of an event as JSON has them, where NaN is a text; not those left unset."""
    event = json.loads(encode(record))["event"]
    return {name: event[name] for name in names if name in event}


def _joined(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))
