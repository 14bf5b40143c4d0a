"""What is found out about one call of `xgboost.train`: what it was given, and how it ended."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import numpy as np

from trainbus.events import Best


class Training:
    """What is known of one call of `train`, by its variables; of none where there are none."""

    def __init__(self, variables: Mapping[str, Any]) -> None:
        self.offset = self.epoch = 0
        self.history: Mapping[str, Any] = {}
        self.values: dict[str, Any] = {}
        """What was measured in the round that ended last."""
        self._file: tuple[str | None, Any] = (None, None)
        self.callbacks = callbacks = getattr(variables.get("cb_container"), "callbacks", ())
        kinds = [[t.__name__ for t in type(callback).__mro__] for callback in callbacks]
        found = {name: c for c, names in zip(callbacks, kinds, strict=True) for name in names}
        self._stopper, self._saver = found.get("EarlyStopping"), found.get("TrainingCheckPoint")
        self.has_schedule = "LearningRateScheduler" in found
        self.save_dir = None if self._saver is None else os.path.abspath(self._saver._path)
        model = variables.get("xgb_model")
        is_path = isinstance(model, str | os.PathLike)
        self.resumed_from = os.path.dirname(os.path.abspath(str(model))) if is_path else None
        own = {"num_boost_round": variables.get("num_boost_round")}
        own["early_stopping_rounds"] = getattr(self._stopper, "rounds", None)
        given = {**dict(variables.get("params") or {}), **own}
        self.params = {name: value for name, value in given.items() if value is not None}
        matrix = variables.get("dtrain")
        self._trained = {name for data, name in variables.get("evals") or () if data is matrix}

    def begin_round(self, epoch: int, history: Mapping[str, Any]) -> None:
        """Go on to a round, and remember what is there at the path that it may be saved at."""
        self.epoch, self.history = epoch + self.offset, history
        path = self._checkpoint()
        self._file = path, None if path is None else _stamp(path)

    def end_round(self) -> dict[str, dict[str, Any]]:
        """Return what was measured in the round, by data sets, under the names of its metrics."""
        found = {
            data: {f"{data}-{name}": measured[-1] for name, measured in metrics.items()}
            for data, metrics in self.history.items()
        }
        self.values = {name: value for values in found.values() for name, value in values.items()}
        return found

    def measured(self) -> int:
        """Return in how many rounds something was measured."""
        return max((len(v) for found in self.history.values() for v in found.values()), default=0)

    def phase(self, data: str) -> str:
        """Return what a data set is for: the training's own by identity, others by their names."""
        if data in self._trained or data.lower().startswith(("train", "learn")):
            return "train"
        return "test" if data.lower().startswith("test") else "validation"

    def saved(self) -> str | None:
        """Return the path of this round's checkpoint, once it is written."""
        path, before = self._file
        return path if path is not None and _stamp(path) not in (None, before) else None

    def best(self, model: Any) -> Best | None:
        """Return the best round of early stopping; a model keeps one of an earlier training too."""
        for data, metrics in getattr(self._stopper, "best_scores", {}).items():
            for name, values in metrics.items():
                epoch = int(model.attr("best_iteration"))
                return Best(metric=f"{data}-{name}", value=float(values[-1]), epoch=epoch)
        return None

    def reason(self) -> str | None:
        """Return why there were fewer rounds than asked for."""
        if self.epoch + 1 >= self.offset + self.params.get("num_boost_round", 0):
            return None
        if self._stopper is None or self._stopper.current_rounds < self._stopper.rounds:
            return "stopped by a callback"
        names = [f"{d}-{name}" for d, found in self._stopper.best_scores.items() for name in found]
        return f"early stop: no better {names[0]} in {self._stopper.rounds} rounds"

    def _checkpoint(self) -> str | None:
        if self._saver is None or self.save_dir is None:
            return None
        end = "pkl" if self._saver._as_pickle else self._saver.default_format
        return os.path.join(self.save_dir, f"{self._saver._name}_{self.epoch}.{end}")


def variables_of_train() -> dict[str, Any]:
    """Return the variables of the `train` that calls: it tells callbacks neither its arguments
    nor the other callbacks."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if (
            frame.f_code.co_name == "train"
            and frame.f_globals.get("__name__") == "xgboost.training"
        ):
            return dict(frame.f_locals)
        frame = frame.f_back
    return {}


def config(model: Any) -> dict[str, Any]:
    """Return the parameters that a model is trained with, given or default."""
    found: dict[str, Any] = {}
    todo: list[Any] = [json.loads(model.save_config())["learner"]]
    while todo:
        for name, item in todo.pop().items():
            if isinstance(item, dict) and name != "gbtree_model_param":  # that counts its trees
                todo.append(item)
            elif isinstance(item, str) and name != "name":
                found[name] = _value(item)
    return found


def _value(text: str) -> int | float | str:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(str(np.float32(text)))  # 0.3, where XGBoost writes 0.300000012
    except ValueError:
        return text


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino
