"""The files that callbacks of skorch write: for which epoch each is, and which are the last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from msgspec.structs import replace

from trainbus.events import Best, CheckpointSaved
from trainbus.toolkit.adapters import number

from ._skorch_facts import absolute, callbacks_of
from ._skorch_history import values


class Checkpoints:
    """The checkpoints of one training of a net."""

    def __init__(self) -> None:
        self._overwritten: dict[int, CheckpointSaved] = {}

    def of_epoch(
        self, net: Any, row: Mapping[str, Any], epoch: int, step: int
    ) -> Iterator[CheckpointSaved]:
        """Yield those that were written for an epoch, by the flags in its row of the history."""
        for checkpoint in _checkpoints_of(net):
            monitor = checkpoint.monitor
            flag = monitor if checkpoint.event_name is None else checkpoint.event_name
            if flag is not None and not (isinstance(flag, str) and row.get(flag)):
                continue
            path, pattern = _file(net, checkpoint, epoch)
            if path is None:
                continue
            is_kept = "{last_epoch" in pattern
            kind: Literal["best", "last", "periodic"] = "periodic" if is_kept else "last"
            monitored = str(monitor).removesuffix("_best")
            event = CheckpointSaved(
                path=path,
                kind=kind if monitor is None else "best",
                epoch=epoch,
                step=step,
                metrics={n: v for n, v in values(row).items() if n == monitored},
                final=is_kept,
            )
            yield event
            if not is_kept:
                self._overwritten[id(checkpoint)] = event

    def finals(self, net: Any, callbacks: Sequence[Any], step: int) -> Iterator[CheckpointSaved]:
        """Yield the files that are written no more, and those that are written at the end.

        Args:
            net: has trained.
            callbacks: those of its callbacks that have saved what they save at the end.
            step: the batches done.
        """
        for event in self._overwritten.values():
            yield replace(event, final=True)
        for callback in callbacks:
            if hasattr(callback, "checkpoint_") and net.history:
                path, _ = _file(net, callback.checkpoint_, -1)
                if path is not None:
                    epoch = len(net.history) - 1
                    yield CheckpointSaved(
                        path=path, kind="last", epoch=epoch, step=step, final=True
                    )


def best(net: Any, row: Mapping[str, Any], epoch: int) -> Best | None:
    """Return the score of an epoch, if it is the best so far of what a net's checkpoints watch."""
    flags = [c.monitor for c in _checkpoints_of(net) if str(c.monitor).endswith("_best")]
    flag = next(iter(flags), "valid_loss_best")
    metric = flag.removesuffix("_best")
    value = number(row.get(metric))
    if value is None or not row.get(flag):
        return None
    return Best(metric=metric, value=value, epoch=epoch)


def _checkpoints_of(net: Any) -> list[Any]:
    from skorch.callbacks import Checkpoint

    return [callback for callback in callbacks_of(net) if isinstance(callback, Checkpoint)]


def _file(net: Any, checkpoint: Any, epoch: int) -> tuple[str | None, str]:
    """Return the main file of a checkpoint, if it is there, and the pattern of its name."""
    for pattern in (checkpoint.f_params, checkpoint.f_pickle):
        if isinstance(pattern, str):
            path = checkpoint._format_target(net, pattern, epoch)
            if Path(path).exists():
                return absolute(path), pattern
    return None, ""
