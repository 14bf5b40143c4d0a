"""The files that the `Checkpoint` handlers of a training save, and which of them are the best."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from trainbus.events import Best, CheckpointSaved
from trainbus.toolkit.adapters import Reporter


class Checkpoints:
    """The files of one training.

    Args:
        report: records them.
        handlers: returns the handlers of the trainer and its evaluators.
    """

    def __init__(self, report: Reporter, handlers: Callable[[], Iterable[Any]]) -> None:
        self._report = report
        self._all_handlers = handlers
        self._seen: dict[int, Any] = {}
        self._bests: dict[int, Best] = {}

    @property
    def folder(self) -> str | None:
        """The folder of the first handler that saves to one."""
        folders = [_folder(handler) for handler in self._handlers()]
        return next((str(folder) for folder in folders if folder is not None), None)

    def saving(self, attribute: str) -> dict[str, Any]:
        """Return the saved objects that have an attribute, as models and optimizers do, by name."""
        found = {k: v for h in self._handlers() for k, v in dict(h.to_save or {}).items()}
        return {name: value for name, value in found.items() if hasattr(value, attribute)}

    def skip(self) -> None:
        """Leave out what was saved up to now."""
        self._new_items()

    def record(self, state: Any) -> None:
        """Record the files that were saved since the last call.

        Args:
            state: that of the trainer.
        """
        epoch = state.epoch - 1 if self._report.epoch is None else self._report.epoch
        for handler, item in self._new_items():
            folder = _folder(handler)
            if folder is None or not (folder / item.filename).exists():
                continue
            kind: Literal["best", "last", "periodic"]
            kind, metrics = "periodic" if handler.n_saved is None else "last", {}
            if handler.score_function is not None:
                name, value = str(handler.score_name or "score"), float(item.priority)
                kind, metrics = "periodic", {name: value}
                if item is handler._saved[-1]:
                    kind = "best"
                    self._bests[id(handler)] = Best(metric=name, value=value, epoch=epoch)
                    self._report.best = next(iter(self._bests.values()))
            has_own_name = kind == "periodic" and handler.filename_pattern is None and not metrics
            self._report.checkpoint(
                CheckpointSaved(
                    path=str(folder / item.filename),
                    kind=kind,
                    epoch=epoch if epoch >= 0 else None,
                    step=int(state.iteration),
                    metrics=metrics,
                    final=has_own_name,
                ),
                slot=None if kind == "periodic" else id(handler),
            )

    def _handlers(self) -> list[Any]:
        from ignite.handlers import Checkpoint

        return [h for h in self._all_handlers() if isinstance(h, Checkpoint)]

    def _new_items(self) -> list[tuple[Any, Any]]:
        """Return what was saved since the last call: the handler, and its entry for the file."""
        found = [(h, i) for h in self._handlers() for i in h._saved if id(i) not in self._seen]
        self._seen.update((id(item), item) for _, item in found)
        return found


def _folder(checkpoint: Any) -> Path | None:
    """Return the folder of a handler, None if it saves elsewhere than on this machine."""
    folder = getattr(checkpoint.save_handler, "dirname", None)
    return None if folder is None else Path(folder).absolute()
