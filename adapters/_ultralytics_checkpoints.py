"""The checkpoints of one Ultralytics training: which files there are, and what they scored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainbus.events import Best, CheckpointSaved
from trainbus.toolkit.adapters import number

from ._ultralytics_evaluation import numbers
from ._ultralytics_trainer import steps


class Checkpoints:
    """Remembers what the files hold, which are told of again when training is over."""

    def __init__(self) -> None:
        self._metrics: dict[str, dict[str, float]] = {}
        self._best_epoch: int | None = None

    def saved(self, trainer: Any) -> Iterator[CheckpointSaved]:
        """Yield the files that a trainer has written after an epoch."""
        is_best = trainer.best_fitness == trainer.fitness
        for kind in ("last", "periodic", "best") if is_best else ("last", "periodic"):
            # After training, `trainer.metrics` are those of the final evaluation.
            self._metrics[kind] = numbers(trainer.metrics)
        yield self._event(trainer, "last", trainer.last, trainer.epoch, trainer.fitness)
        if is_best:
            self._best_epoch = trainer.epoch
            yield self._event(trainer, "best", trainer.best, trainer.epoch, trainer.fitness)
        if trainer.save_period > 0 and trainer.epoch % trainer.save_period == 0:
            path = Path(trainer.wdir) / f"epoch{trainer.epoch}.pt"
            yield self._event(trainer, "periodic", path, trainer.epoch, trainer.fitness)

    def final(self, trainer: Any, last_epoch: int | None) -> Iterator[CheckpointSaved]:
        """Yield the files that training has left, which nobody writes again."""
        for kind, path, epoch, fitness in (
            ("last", trainer.last, last_epoch, trainer.fitness),
            ("best", trainer.best, self._best_epoch, trainer.best_fitness),
        ):
            if Path(path).exists():
                yield self._event(trainer, kind, path, epoch, fitness, final=True)

    def best(self, trainer: Any) -> Best | None:
        """Return the best fitness so far."""
        fitness = number(getattr(trainer, "best_fitness", None))
        if fitness is None:
            return None
        return Best(metric="fitness", value=fitness, epoch=self._best_epoch)

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
