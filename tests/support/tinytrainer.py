"""A framework as small as can be, with what real ones have: callbacks, ranks, checkpoints.

Its adapter is at the end. Broken variants of it are in `test_testing.py`.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

from trainbus.events import (
    CheckpointSaved,
    EpochEnded,
    EpochStarted,
    MetricsLogged,
    Resumed,
    RunEnded,
    RunStarted,
)
from trainbus.interfaces import Detach, Emit
from trainbus.testing import Training


class Callback:
    """Base of what can be hung into a trainer; each method is a hook."""

    def on_fit_start(self, trainer: Trainer) -> None: ...
    def on_epoch_start(self, trainer: Trainer) -> None: ...
    def on_epoch_end(self, trainer: Trainer) -> None: ...
    def on_exception(self, trainer: Trainer, error: BaseException) -> None: ...
    def on_fit_end(self, trainer: Trainer) -> None: ...


class Trainer:
    """Trains one weight, from noise that the global random generator makes, as many do."""

    def __init__(self, folder: Path, epochs: int, *, resumed: bool = False) -> None:
        self.folder = folder
        self.epochs = epochs
        self.callbacks: list[Callback] = []
        self.on_batch: Callable[[int], None] = lambda epoch: None
        self.patience: int | None = None
        self.resumed = resumed
        self.epoch = json.loads(self.last.read_text())["epoch"] + 1 if resumed else 0
        self.first = self.epoch
        self.done = 0
        self.weight = 0.0

    @property
    def last(self) -> Path:
        return self.folder / "last.json"

    @property
    def is_main(self) -> bool:
        return os.environ.get("RANK", "0") == "0"

    def fit(self) -> None:
        random.seed(0)
        try:
            self._call("on_fit_start")
            for epoch in range(self.first, self.epochs):
                self.epoch = epoch
                self._call("on_epoch_start")
                self.on_batch(self.epoch)
                self.weight += random.random()
                self.folder.mkdir(parents=True, exist_ok=True)
                self.last.write_text(json.dumps({"epoch": self.epoch}))
                self.done += 1
                self._call("on_epoch_end")
                if self.patience == epoch - self.first:
                    break
        except BaseException as error:
            for callback in self.callbacks:
                callback.on_exception(self, error)
            raise
        self._call("on_fit_end")

    def _call(self, hook: str) -> None:
        for callback in list(self.callbacks):
            getattr(callback, hook)(self)


def setup(folder: Path, epochs: int, *, resumed: bool = False) -> Training:
    """Return a training of the trainer for the conformance suite."""
    trainer = Trainer(folder, epochs, resumed=resumed)

    def fail_at(error: BaseException) -> None:
        def on_batch(epoch: int) -> None:
            if epoch == 1:
                raise error

        trainer.on_batch = on_batch

    def stop_early() -> None:
        trainer.patience = 1

    return Training(
        target=trainer,
        run=trainer.fit,
        result=lambda: trainer.weight,
        fail_at=fail_at,
        epochs_trained=lambda: trainer.done,
        resume=lambda: setup(folder, epochs, resumed=True),
        stop_early=stop_early,
    )


class Reporter(Callback):
    """Emits what the trainer's hooks tell."""

    def __init__(self, emit: Emit) -> None:
        self.emit = emit

    def on_fit_start(self, trainer: Trainer) -> None:
        if trainer.is_main:
            resumed = Resumed(epoch=trainer.first - 1) if trainer.resumed else None
            self.emit(
                RunStarted(
                    params={"epochs": trainer.epochs},
                    save_dir=str(trainer.folder),
                    resumed=resumed,
                )
            )

    def on_epoch_start(self, trainer: Trainer) -> None:
        if trainer.is_main:
            self.emit(EpochStarted(epoch=trainer.epoch))

    def on_epoch_end(self, trainer: Trainer) -> None:
        if trainer.is_main:
            epoch, values = trainer.epoch, {"train/loss": 1.0 / (1.0 + trainer.weight)}
            self.emit(MetricsLogged(values=values, phase="train", epoch=epoch))
            self.emit(CheckpointSaved(path=str(trainer.last), kind="last", epoch=epoch))
            self.emit(EpochEnded(epoch=epoch, outcome="completed"))

    def on_fit_end(self, trainer: Trainer) -> None:
        if trainer.is_main:
            is_early = trainer.epoch + 1 < trainer.epochs
            reason = f"early stop: patience of {trainer.patience}" if is_early else None
            self.emit(RunEnded(status="finished", reason=reason))


def attach(trainer: Trainer, emit: Emit, kind: type[Reporter] = Reporter) -> Detach:
    """Hang a reporter into the trainer."""
    reporter = kind(emit)
    trainer.callbacks.append(reporter)

    def detach() -> None:
        if reporter in trainer.callbacks:
            trainer.callbacks.remove(reporter)

    return detach
