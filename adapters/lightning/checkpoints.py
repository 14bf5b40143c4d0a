"""Checkpoints of one Lightning training: their kind, by its `ModelCheckpoint` callbacks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from msgspec import structs

from trainbus.events import Best, CheckpointSaved
from trainbus.toolkit.adapters import number


class Checkpoints:
    """The files that one training has saved."""

    def __init__(self) -> None:
        self._saved: dict[str, CheckpointSaved] = {}

    def saved(self, trainer: Any, file: str, epoch: int | None) -> CheckpointSaved:
        """Return the event of a file that was just saved.

        Args:
            trainer: the trainer that saved it.
            file: path or URL, as passed to the trainer.
            epoch: the epoch in which it was saved.
        """
        kind: Literal["best", "last", "periodic"] = "periodic"
        score, is_kept = {}, False
        for each in trainer.checkpoint_callbacks:
            found = _kind(each, file)
            if found is not None:
                kind, value = found, number(trainer.callback_metrics.get(each.monitor))
                score = {} if value is None else {each.monitor: value}
                # If all files are kept, a name that is taken gets a number.
                is_numbered = getattr(each, "_enable_version_counter", False)
                is_kept = is_numbered and getattr(each, "save_top_k", None) == -1
        path = file if "://" in file else os.path.abspath(file)
        self._saved[path] = CheckpointSaved(
            path=path,
            kind=kind,
            epoch=epoch,
            step=trainer.global_step,
            metrics=score,
            final=kind == "periodic" and is_kept,
        )
        return self._saved[path]

    def final(self, trainer: Any) -> Iterator[CheckpointSaved]:
        """Yield the last and best files that remain after training."""
        for each in trainer.checkpoint_callbacks:
            files: list[tuple[str, Literal["last", "best"]]]
            files = [(getattr(each, "last_model_path", ""), "last")]
            if getattr(each, "monitor", None):
                files.append((each.best_model_path, "best"))
            elif getattr(each, "save_top_k", None) == 1:
                files.append((each.best_model_path, "last"))
            for path, kind in files:
                if path and Path(path).exists():
                    path = os.path.abspath(path)
                    saved = self._saved.get(path) or CheckpointSaved(path=path, kind=kind)
                    yield structs.replace(saved, kind=kind, final=True)

    def best(self, trainer: Any) -> Best | None:
        """Return the best value of the first callback that monitors a metric."""
        for each in trainer.checkpoint_callbacks:
            score = number(getattr(each, "best_model_score", None))
            if getattr(each, "monitor", None) and score is not None:
                saved = self._saved.get(os.path.abspath(each.best_model_path))
                return Best(metric=each.monitor, value=score, epoch=saved.epoch if saved else None)
        return None


def _kind(checkpoint: Any, path: str) -> Literal["best", "last", "periodic"] | None:
    """Return the kind of a file of a `ModelCheckpoint`, None if it is not one of its files.

    If it monitors no metric, its best file is its last one.
    """
    if path == getattr(checkpoint, "last_model_path", None):
        return "last"
    is_best = path == getattr(checkpoint, "best_model_path", None)
    if not is_best and path not in getattr(checkpoint, "best_k_models", ()):
        return None
    if not is_best or getattr(checkpoint, "save_top_k", None) == -1:
        return "periodic"
    return "best" if getattr(checkpoint, "monitor", None) else "last"
