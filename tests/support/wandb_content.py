"""What a W&B run shows, in forms that two runs can be compared by."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from support import wandb_file
from support.wandb_file import WandbRun

TIMED = {
    "model/speed_PyTorch(ms)",
    "model/speed_preprocess(ms)",
    "model/speed_postprocess(ms)",
}
"""Measured in wall time, so never twice the same."""


def numbers(run: WandbRun, without: Collection[str] = ()) -> dict[int, dict[str, float]]:
    """Return the numbers of each epoch, epochs counted from 1."""
    found: dict[int, dict[str, float]] = {}
    for row in run.history:
        values = {
            k: v
            for k, v in row.items()
            if isinstance(v, int | float) and k[0] != "_" and k not in {*TIMED, *without}
        }
        if len(values) > 1:
            found[int(values.pop("epoch"))] = values
    return found


def pictures(run: WandbRun) -> set[tuple[str, str]]:
    """Return key and digest of every picture."""
    return {
        (key, value["sha256"])
        for row in run.history
        for key, value in row.items()
        if isinstance(value, dict) and value.get("_type") == "image-file"
    }


def tables(run: WandbRun) -> dict[str, list[list[Any]]]:
    """Return the tables of the curves."""
    return {
        key: wandb_file.read_table(run, value)[1]
        for row in run.history
        for key, value in row.items()
        if key.startswith("curves/")
    }
