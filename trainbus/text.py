"""Formats strings for people: safe for a terminal, quoted, on one line."""

from __future__ import annotations

import re

_MAX_SHOWN = 60


def printable(text: str) -> str:
    """Return the text with escapes in place of the characters that could control a terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def quoted(text: str) -> str:
    """Return a text in quotes on one line, truncated if it is long."""
    return repr(text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…")


def joined(path: str, key: str) -> str:
    """Return a key path extended by a key, which is quoted if it is not a plain word."""
    word = key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else quoted(key)
    return f"{path}.{word}" if path else word
