"""Sorts what a program gives to `Accelerator.log`: numbers by phase, texts, and counters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from trainbus.hooking import number

_VALIDATION = re.compile(r"val[/_]|valid|eval[/_]")
_TEST = re.compile(r"test[/_]")


def phases(values: Mapping[str, Any], step: int | None) -> dict[str, dict[str, Any]]:
    """Return what is neither a text nor a counter, by phase; the names decide on it.

    Args:
        values: what was given to `log`.
        step: the step that was given beside it, which the values may repeat.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, value in _flat(values):
        repeats = name in ("step", "global_step") and step is not None and number(value) == step
        if name != "epoch" and not repeats and not isinstance(value, str):
            found.setdefault(_phase(name), {})[name] = value
    return found


def texts(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the names and values of what is a text."""
    return ((name, value) for name, value in _flat(values) if isinstance(value, str))


def counter(value: Any) -> int | None:
    """Return a whole number from 0 as an int, None for anything else."""
    found = number(value)
    return int(found) if found is not None and found.is_integer() and found >= 0 else None


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{key}", inner) for key, inner in value.items())
        else:
            yield str(name), value


def _phase(name: str) -> str:
    return "validation" if _VALIDATION.match(name) else "test" if _TEST.match(name) else "train"
