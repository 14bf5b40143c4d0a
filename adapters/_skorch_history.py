"""Reads a row of a net's history: what an epoch has measured, in which phase."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ._skorch_facts import scorings

_NO_METRICS = re.compile(r"epoch|batches|.*_batch_count|.*_best")


def values(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values in a row that measure something."""
    return {
        name: value
        for name, value in row.items()
        if not _NO_METRICS.fullmatch(name) and not isinstance(value, bool | np.bool_)
    }


def by_phase(net: Any, found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return values by the phase that the scoring callbacks of a net say, else their names."""
    phases = {name: "train" if cb.on_train else "validation" for name, cb in scorings(net)}
    sorted_out: dict[str, dict[str, Any]] = {"train": {}, "validation": {}}
    for name, value in found.items():
        guess = "validation" if name.startswith("valid") else "train"
        sorted_out[phases.get(name, guess)][name] = value
    return sorted_out
