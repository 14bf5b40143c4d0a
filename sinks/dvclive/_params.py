"""Parameters of a run as params.yaml has them: nested, of plain values, with what the run is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trainbus.events import RunStarted

_ABOUT = ("name", "project", "group", "job_type", "tags", "notes", "task", "framework")


def params_of(event: RunStarted) -> dict[str, Any]:
    """Return the parameters of a training, and under `run` what it is, unless one is named so."""
    about = {name: getattr(event, name) for name in _ABOUT if getattr(event, name)}
    return {**({"run": about} if about else {}), **event.params}


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain parameters in which new values replace old ones, each at its own depth."""
    both = {
        key: merged(old[key], value)
        for key, value in new.items()
        if isinstance(value, Mapping) and isinstance(old.get(key), Mapping)
    }
    return {**old, **new, **both}


def plain(value: Any) -> Any:
    """Return a value as YAML has it."""
    match value:
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case np.ndarray() | np.generic():
            return plain(value.tolist())
        case list() | tuple() | set() | frozenset():
            return [plain(item) for item in value]
        case None | bool() | int() | float() | str():
            return value
        case _:
            return str(value)
