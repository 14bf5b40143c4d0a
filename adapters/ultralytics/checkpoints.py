"""Checkpoints of one Ultralytics training: the files, and the metrics of the weights in them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainbus.events import Best, CheckpointSaved
from trainbus.toolkit.adapters import best_of, number, numbers

from .trainer import steps


class Checkpoints:
    """The files that one training has saved."""

    def __init__(self) -> None:
        self._metrics: dict[str, dict[str, float]] = {}
        self._best_epoch: int | None = None

    def saved(self, trainer: Any) -> Iterator[CheckpointSaved]:
        """Yield the files that a trainer saved after an epoch."""
        files = [("last", trainer.last)]
        if trainer.best_fitness == trainer.fitness:
            self._best_epoch = trainer.epoch
            files.append(("best", trainer.best))
        if trainer.save_period > 0 and trainer.epoch % trainer.save_period == 0:
            files.append(("periodic", Path(trainer.wdir) / f"epoch{trainer.epoch}.pt"))
        for kind, path in files:
            # After training, `trainer.metrics` are those of the final evaluation.
            self._metrics[kind] = numbers(trainer.metrics)
            yield self._event(trainer, kind, path, trainer.epoch, trainer.fitness)

    def final(self, trainer: Any, last_epoch: int | None) -> Iterator[CheckpointSaved]:
        """Yield the files that remain after training, also those of the training it resumed."""
        for kind, path, epoch, fitness in (
            ("last", trainer.last, last_epoch, trainer.fitness),
            ("best", trainer.best, self._best_epoch, trainer.best_fitness),
        ):
            if Path(path).exists():
                yield self._event(trainer, kind, path, epoch, fitness, final=True)

    def best(self, trainer: Any) -> Best | None:
        """Return the best fitness so far."""
        return best_of("fitness", getattr(trainer, "best_fitness", None), self._best_epoch)

    def _event(
        self,
        trainer: Any,
        kind: Any,
        path: Any,
        epoch: int | None,
        fitness: Any,
        *,
        final: bool = False,
    ) -> CheckpointSaved:
        return CheckpointSaved(
            path=str(path),
            kind=kind,
            epoch=epoch,
            step=steps(trainer),
            metrics=self._metrics.get(kind, {}),
            metadata={"fitness": number(fitness), "args": dict(vars(trainer.args))},
            final=final,
        )
