"""Strings that are shown to people."""

from __future__ import annotations

import re

_MAX_SHOWN = 60


def printable(text: str) -> str:
    """Return the text with everything that could move a terminal's cursor written as an escape."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def quoted(text: str) -> str:
    """Return a text in quotes on one line, cut short where it is long."""
    return repr(text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…")


def joined(path: str, key: str) -> str:
    """Return a key path with one more key, in quotes where it isn't a plain word."""
    word = key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else quoted(key)
    return f"{path}.{word}" if path else word
