"""Texts as TensorBoard shows them, which is as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_ROW_LIMIT = 1000


def listed(values: Mapping[str, Any]) -> str:
    """Return names and values as a table."""
    return table(["name", "value"], [[name, value] for name, value in values.items()])


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return the first rows of a table."""
    lines = [columns, ["---"] * len(columns), *rows[:_ROW_LIMIT]]
    text = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
    left_out = len(rows) - _ROW_LIMIT
    return f"{text}\n\n{left_out} more rows" if left_out > 0 else text


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return re.sub(r"\s*[\r\n]+\s*", "<br>", text.strip()).replace("|", r"\|")


def utf8(text: str) -> str:
    """Return a text as UTF-8 can hold it."""
    return text.encode("utf-8", "backslashreplace").decode()
