"""What is found out about a training of Keras: by its model, its callbacks, its launcher."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from trainbus.events import Best, ModelDescribed
from trainbus.toolkit.adapters import guarded, number


class Facts:
    """Reads one fact at a time: what can't be read is None, and that is said once."""

    @guarded
    def params(self, model: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a training, with the loss and the optimizer of the model."""
        optimizer, loss = model.optimizer, getattr(model, "loss", None)
        config = {} if optimizer is None else optimizer.get_config()
        return {
            **arguments,
            "loss": getattr(loss, "name", None) or getattr(loss, "__name__", loss),
            "optimizer": {"class_name": type(optimizer).__name__, **config},
        }

    @guarded
    def goals(self, model: Any, callbacks: Sequence[Any]) -> dict[str, Literal["max", "min"]]:
        """Return which way is better, for the values that callbacks watch."""
        metrics = [m for each in model.metrics for m in getattr(each, "metrics", [each])]
        ways = {m.name: getattr(m, "_direction", None) for m in metrics} | {"loss": "down"}
        goals: dict[str, Literal["max", "min"]] = {}
        for callback in of_kind(callbacks, "EarlyStopping", "ModelCheckpoint"):
            way = ways.get(callback.monitor.removeprefix("val_"))
            if callback.mode == "max" or (callback.mode == "auto" and way == "up"):
                goals[callback.monitor] = "max"
            elif callback.mode == "min" or way == "down":
                goals[callback.monitor] = "min"
        return goals

    @guarded
    def described(self, model: Any) -> ModelDescribed:
        """Return how large a model is."""
        return ModelDescribed(
            parameters=model.count_params(),
            gradients=sum(math.prod(v.shape) for v in model.trainable_variables),
            layers=len(model.layers),
        )

    @guarded
    def save_dir(self, callbacks: Sequence[Any]) -> str | None:
        """Return the first local folder that callbacks save to."""
        folders = [str(backup.backup_dir) for backup in of_kind(callbacks, "BackupAndRestore")]
        for saver in of_kind(callbacks, "ModelCheckpoint"):
            # What stands before the first placeholder has a folder that does not change.
            folders.append(os.path.dirname(saver.filepath.partition("{")[0]))
        return next((os.path.abspath(folder) for folder in folders if "://" not in folder), None)

    @guarded
    def rate(self, model: Any) -> float | None:
        """Return the learning rate of a model's optimizer."""
        rate = getattr(model.optimizer, "learning_rate", None)
        return None if rate is None else float(rate)

    @guarded
    def updates(self, model: Any) -> int | None:
        """Return the optimizer updates done; none where a model trains with other optimizers."""
        iterations = getattr(model.optimizer, "iterations", None)
        return None if iterations is None else int(iterations) or None

    @guarded
    def best(self, callbacks: Sequence[Any]) -> Best | None:
        """Return the best value that an EarlyStopping has seen."""
        for callback in of_kind(callbacks, "EarlyStopping"):
            value = number(getattr(callback, "best", None))
            if value is not None:
                return Best(metric=callback.monitor, value=value, epoch=callback.best_epoch)
        return None

    @guarded
    def reason(
        self, model: Any, callbacks: Sequence[Any], loss: float | None, *, is_early: bool
    ) -> str | None:
        """Return what a callback has stopped a training for.

        Args:
            model: has trained.
            callbacks: all that were called.
            loss: that of the last epoch.
            is_early: whether there were epochs left.
        """
        if not model.stop_training:
            return None
        for callback in of_kind(callbacks, "EarlyStopping"):
            if callback.stopped_epoch > 0:
                return f"early stop: no better {callback.monitor} in {callback.patience} epochs"
        if loss is not None and not math.isfinite(loss) and of_kind(callbacks, "TerminateOnNaN"):
            return f"TerminateOnNaN: the loss is {loss}"
        return "stopped by a callback" if is_early else None


def of_kind(callbacks: Sequence[Any], *kinds: str) -> list[Any]:
    """Return those of the callbacks that are of classes of Keras, by their names."""
    import keras

    classes = tuple(getattr(keras.callbacks, kind) for kind in kinds)
    return [callback for callback in callbacks if isinstance(callback, classes)]


def world_size() -> int:
    """Return the number of processes, which Keras leaves to torch and its launchers."""
    torch = sys.modules.get("torch.distributed")
    if torch is not None and torch.is_available() and torch.is_initialized():
        return int(torch.get_world_size())
    size = os.environ.get("WORLD_SIZE", "")
    return max(int(size), 1) if size.isdigit() else 1
