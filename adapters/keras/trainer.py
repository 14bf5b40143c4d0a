"""One training of Keras: its start, epochs, checkpoints and end."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from trainbus.events import Best, CheckpointSaved, ModelDescribed, Resumed, RunStarted
from trainbus.toolkit.adapters import (
    Reporter,
    best_of,
    early_stop,
    guarded,
    number,
    numbers,
    version,
    wrap,
)


class Training:
    """A training that has reached its first epoch.

    Args:
        report: records the run.
        facts: reads model and callbacks.
        model: the model.
        callbacks: all that Keras calls.
        arguments: the arguments of `fit`.
    """

    def __init__(
        self,
        report: Reporter,
        facts: Facts,
        model: Any,
        callbacks: Sequence[Any],
        arguments: Mapping[str, Any],
    ) -> None:
        self._report = report
        self._facts = facts
        self._model = model
        self._callbacks = callbacks
        self._arguments = arguments
        self._epoch = self._step = 0
        self._loss: float | None = None
        self._saver: Any = None
        self._score: dict[str, float] = {}
        self._unwrap: list[Callable[[], object]] = []

    @property
    def best(self) -> Best | None:
        """The best value so far, as seen by callbacks; one that saves files takes precedence."""
        return self._report.best or self._facts.best(self._callbacks)

    def start(self, epoch: int) -> None:
        """Start the run at an epoch, and wrap the methods that save."""
        if self._report.rank():
            return
        facts, model = self._facts, self._model
        folder, updates = facts.save_dir(self._callbacks), facts.updates(model)
        self._step = updates or 0
        self._report.start(
            RunStarted(
                name=model.name,
                params=facts.params(model, self._arguments) or {},
                framework="keras",
                framework_version=version("keras"),
                save_dir=folder,
                world_size=_world_size(),
                resumed=Resumed(epoch=epoch - 1, step=updates, save_dir=folder) if epoch else None,
                goals=facts.goals(model, self._callbacks) or {},
            ),
            loggers=self._callbacks,
            remedy="leave it out of the callbacks of fit()",
        )
        described = facts.described(model)
        if described is not None:
            self._report.record(described)
        for callback in _of_kind(self._callbacks, "BackupAndRestore", "ModelCheckpoint"):
            self._unwrap.append(wrap(callback, "_save_model", partial(self._saving, callback)))
        for name in ("save", "save_weights"):
            self._unwrap.append(wrap(model, name, self._save))

    def release(self) -> None:
        """Unwrap the methods that save."""
        while self._unwrap:
            self._unwrap.pop()()

    def start_epoch(self, epoch: int) -> None:
        """Record that an epoch starts."""
        self._epoch = epoch
        self._report.start_epoch(epoch)

    def end_batch(self, logs: Mapping[str, Any]) -> None:
        """Record the values after a batch, if a sink asked for them."""
        # One call may stand for many updates or none: steps_per_execution, accumulation.
        before, self._step = self._step, self._facts.updates(self._model) or 0
        if any(self._report.wants_step(step) for step in range(before + 1, self._step + 1)):
            values = {f"batch_{name}": value for name, value in logs.items()}
            self._report.metrics(
                values, "train", epoch=self._epoch, step=self._step, on_request=True
            )

    def end_epoch(self, epoch: int, logs: Mapping[str, Any]) -> None:
        """Record the values of an epoch that ended."""
        self._loss = number(logs.get("loss"))
        validation = {k: v for k, v in logs.items() if k.startswith("val_")}
        train = {k: v for k, v in logs.items() if k not in validation}
        rate = self._facts.rate(self._model)
        if rate is not None:  # callbacks that change the rate add the one that was used
            train.setdefault("learning_rate", rate)
        self._report.metrics(train, "train", epoch=epoch)
        self._report.metrics(validation, "validation", epoch=epoch)
        self._report.end_epoch()

    def end(self) -> None:
        """Record that the training ended without an error, and why it ended early."""
        is_early = self._epoch + 1 < self._arguments.get("epochs", 0)
        why = self._facts.reason(self._model, self._callbacks, self._loss, is_early=is_early)
        self._report.end(why, self.best)
        self.release()

    def _saving(self, saver: Any, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call `_save_model` of a callback, which makes the model save."""
        self._saver, self._score = saver, numbers(kwargs.get("logs") or {})
        try:
            return method(*args, **kwargs)
        finally:
            self._saver, self._score = None, {}

    def _save(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        self._record_saved(str(args[0] if args else kwargs["filepath"]))
        return result

    @guarded
    def _record_saved(self, path: str) -> None:
        saver = self._saver
        kind: Literal["best", "last", "periodic"] = "periodic"
        if getattr(saver, "save_best_only", False):
            kind = "best"
            best = best_of(saver.monitor, saver.best, self._epoch)
            self._report.best = best or self._report.best
        elif saver is not None and "{" not in getattr(saver, "filepath", ""):
            kind = "last"
        self._report.checkpoint(
            CheckpointSaved(
                path=path if "://" in path else os.path.abspath(path),
                kind=kind,
                epoch=self._epoch,
                step=self._facts.updates(self._model),
                metrics=self._score,
            )
        )


class Facts:
    """Reads facts of a model and its callbacks; one that can't be read is None, and logged once."""

    @guarded
    def params(self, model: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a training, with the model's loss and optimizer."""
        optimizer, loss = model.optimizer, getattr(model, "loss", None)
        config = {} if optimizer is None else optimizer.get_config()
        return {
            **arguments,
            "loss": getattr(loss, "name", None) or getattr(loss, "__name__", loss),
            "optimizer": {"class_name": type(optimizer).__name__, **config},
        }

    @guarded
    def goals(self, model: Any, callbacks: Sequence[Any]) -> dict[str, Literal["max", "min"]]:
        """Return whether more or less is better, for the values that callbacks monitor."""
        metrics = [m for each in model.metrics for m in getattr(each, "metrics", [each])]
        ways = {m.name: getattr(m, "_direction", None) for m in metrics} | {"loss": "down"}
        goals: dict[str, Literal["max", "min"]] = {}
        for callback in _of_kind(callbacks, "EarlyStopping", "ModelCheckpoint"):
            way = ways.get(callback.monitor.removeprefix("val_"))
            if callback.mode == "max" or (callback.mode == "auto" and way == "up"):
                goals[callback.monitor] = "max"
            elif callback.mode == "min" or way == "down":
                goals[callback.monitor] = "min"
        return goals

    @guarded
    def described(self, model: Any) -> ModelDescribed:
        """Return the size of a model."""
        return ModelDescribed(
            parameters=model.count_params(),
            gradients=sum(math.prod(v.shape) for v in model.trainable_variables),
            layers=len(model.layers),
        )

    @guarded
    def save_dir(self, callbacks: Sequence[Any]) -> str | None:
        """Return the first local folder that callbacks save to."""
        folders = [str(backup.backup_dir) for backup in _of_kind(callbacks, "BackupAndRestore")]
        for saver in _of_kind(callbacks, "ModelCheckpoint"):
            # Up to the first placeholder, the path is the same for all files.
            folders.append(os.path.dirname(saver.filepath.partition("{")[0]))
        return next((os.path.abspath(folder) for folder in folders if "://" not in folder), None)

    @guarded
    def rate(self, model: Any) -> float | None:
        """Return the learning rate of a model's optimizer."""
        rate = getattr(model.optimizer, "learning_rate", None)
        return None if rate is None else float(rate)

    @guarded
    def updates(self, model: Any) -> int | None:
        """Return the optimizer updates done, None if the model does not train by its optimizer."""
        iterations = getattr(model.optimizer, "iterations", None)
        return None if iterations is None else int(iterations) or None

    @guarded
    def best(self, callbacks: Sequence[Any]) -> Best | None:
        """Return the best value of the first EarlyStopping that has one."""
        for callback in _of_kind(callbacks, "EarlyStopping"):
            best = best_of(callback.monitor, getattr(callback, "best", None), callback.best_epoch)
            if best is not None:
                return best
        return None

    @guarded
    def reason(
        self, model: Any, callbacks: Sequence[Any], loss: float | None, *, is_early: bool
    ) -> str | None:
        """Return why a callback stopped a training.

        Args:
            model: the trained model.
            callbacks: all that were called.
            loss: that of the last epoch.
            is_early: whether epochs were left.
        """
        if not model.stop_training:
            return None
        for callback in _of_kind(callbacks, "EarlyStopping"):
            if callback.stopped_epoch > 0:
                return early_stop(callback.monitor, callback.patience)
        if loss is not None and not math.isfinite(loss) and _of_kind(callbacks, "TerminateOnNaN"):
            return f"TerminateOnNaN: the loss is {loss}"
        return "stopped by a callback" if is_early else None


def _of_kind(callbacks: Sequence[Any], *kinds: str) -> list[Any]:
    """Return the callbacks of certain classes of Keras, given by name."""
    import keras

    classes = tuple(getattr(keras.callbacks, kind) for kind in kinds)
    return [callback for callback in callbacks if isinstance(callback, classes)]


def _world_size() -> int:
    """Return the number of processes, which Keras leaves to torch and its launchers."""
    torch = sys.modules.get("torch.distributed")
    if torch is not None and torch.is_available() and torch.is_initialized():
        return int(torch.get_world_size())
    size = os.environ.get("WORLD_SIZE", "")
    return max(int(size), 1) if size.isdigit() else 1
