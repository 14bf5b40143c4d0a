"""The files that a training of Keras writes: for whom each is, and which are the last."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, Literal

from msgspec.structs import replace

from trainbus.events import Best, CheckpointSaved
from trainbus.toolkit.adapters import number


class Checkpoints:
    """The checkpoints of one training, and the best value that a callback has saved one for."""

    def __init__(self) -> None:
        self.best: Best | None = None
        self._saver: Any = None
        self._score: dict[str, float] = {}
        self._written: dict[str, CheckpointSaved] = {}

    def saving(self, saver: Any, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Stand around the `_save_model` of a callback of Keras: what is written in it is its."""
        logs = {name: number(value) for name, value in (kwargs.get("logs") or {}).items()}
        self._saver = saver
        self._score = {name: value for name, value in logs.items() if value is not None}
        try:
            return method(*args, **kwargs)
        finally:
            self._saver, self._score = None, {}

    def written(self, path: str, epoch: int, step: int | None) -> CheckpointSaved:
        """Return the event for a file that was written."""
        saver, path = self._saver, path if "://" in path else os.path.abspath(path)
        kind: Literal["best", "last", "periodic"] = "periodic"
        if getattr(saver, "save_best_only", False):
            kind, best = "best", number(saver.best)
            if best is not None:
                self.best = Best(metric=saver.monitor, value=best, epoch=epoch)
        elif saver is not None and "{" not in getattr(saver, "filepath", ""):
            kind = "last"
        event = CheckpointSaved(path=path, kind=kind, epoch=epoch, step=step, metrics=self._score)
        self._written[path] = event
        return event

    def finals(self) -> Iterator[CheckpointSaved]:
        """Yield the best and last files once more, which are written no further."""
        for path, event in self._written.items():
            if event.kind != "periodic" and os.path.exists(path):
                yield replace(event, final=True)
