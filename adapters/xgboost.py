"""Turns an XGBoost training into events; each boosting round is an epoch.

Attaches to an estimator of the scikit-learn API, or to a `BusCallback` in the callbacks of `train`.
Every metric belongs to the round it was measured in, also when training continues an earlier
model. XGBoost does not pass exceptions to callbacks, so only a wrapped training records them. `cv`,
which trains several models at once, is not reported.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from trainbus.errors import AttachError
from trainbus.events import Best, CheckpointSaved, Resumed, RunStarted
from trainbus.interfaces import Detach, Emit
from trainbus.toolkit.adapters import (
    Hooks,
    Origin,
    argument,
    early_stop,
    guarded,
    late_class,
    lazy,
    patch,
    phase_of,
    users_of,
    variables_of,
    version,
    with_argument,
    wrap,
    wrong_target,
)

TESTED_VERSIONS = "3.2.0"
REQUIRED_NAMES = (
    *(f"xgboost.callback:TrainingCallback.before_{name}" for name in ("training", "iteration")),
    *(f"xgboost.callback:TrainingCallback.after_{name}" for name in ("training", "iteration")),
    *(f"xgboost.callback:{name}" for name in ("CallbackContainer", "EarlyStopping")),
    *(f"xgboost.callback:{name}" for name in ("LearningRateScheduler", "TrainingCheckPoint")),
    *(f"xgboost:Booster.{name}" for name in ("attr", "num_boosted_rounds", "save_config")),
    *(f"xgboost.collective:get_{name}" for name in ("rank", "world_size")),
    *(f"xgboost:XGB{name}" for name in ("Model.fit", "RFClassifier", "RFRegressor")),
    *(f"xgboost{module}:train" for module in ("", ".training", ".sklearn")),
)

if TYPE_CHECKING:
    BusCallback: Any


def attach(target: Any, emit: Emit) -> Detach:
    """Report the trainings of an estimator, or those that a `BusCallback` is passed to.

    Clones and unpickled copies of the estimator are not attached.

    Args:
        target: an estimator such as `XGBClassifier`, or a `BusCallback` of this module.
        emit: where the events go.

    Returns:
        A function that restores the target.

    Raises:
        AttachError: the object is neither, or is a random forest.
    """
    import xgboost

    if isinstance(target, _Hooks):
        return target.report.connect(emit)
    if not isinstance(target, getattr(xgboost, "XGBModel", ())):  # it needs scikit-learn
        raise wrong_target(
            target,
            "an XGBoost estimator",
            "for xgboost.train add BusCallback(bus) to its callbacks",
        )
    if isinstance(target, xgboost.XGBRFClassifier | xgboost.XGBRFRegressor):
        raise AttachError(
            f"expected an estimator that boosts, found {type(target).__qualname__}: XGBoost takes "
            "no callbacks for a forest, which is one round"
        )
    hooks: _Hooks = _callback_class()(origin=Origin.ATTACH)
    return hooks.report.connect(emit, wrap(target, "fit", partial(_fit, hooks)))


def hook(module: ModuleType, attach: Callable[[object], None]) -> None:
    """Attach to every `train` call of the program, also those of estimators.

    Args:
        module: the package, which was imported.
        attach: called with the callback of each training.
    """
    for name in ("", ".training", ".sklearn"):
        home = sys.modules.get(module.__name__ + name)
        if hasattr(home, "train"):
            patch(home, "train", partial(_train, attach))


class _Hooks(Hooks):
    """Callback of `xgboost.train` that reports to a bus: `callbacks=[BusCallback(bus)]`."""

    def reset(self) -> None:
        self._training = _Training({})

    def before_training(self, model: Any) -> Any:
        self._start(model)
        return model

    def before_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        self._start_round(model, epoch, evals_log)
        return False

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        self._end_round()
        return False

    def after_training(self, model: Any) -> Any:
        self._end(model)
        return model

    @guarded
    def _start(self, model: Any) -> None:
        import xgboost

        # XGBoost passes callbacks neither the arguments nor the other callbacks.
        self._training = now = _Training(variables_of("xgboost.training", "train"))
        if xgboost.collective.get_rank() or not isinstance(model, xgboost.Booster):
            self.report.is_open = False  # a run that an earlier training left open
            return
        now.offset = done = model.num_boosted_rounds()
        before = Resumed(epoch=done - 1, step=done, save_dir=now.resumed_from) if done else None
        self.report.start(
            RunStarted(
                params={**_config(model), **now.params},
                framework="xgboost",
                framework_version=version("xgboost"),
                save_dir=now.save_dir,
                world_size=xgboost.collective.get_world_size(),
                resumed=before,
            ),
            loggers=now.callbacks,
            remedy="leave it out of the callbacks",
        )

    @guarded
    def _start_round(self, model: Any, epoch: int, history: Mapping[str, Any]) -> None:
        if not self.report.is_open:
            return
        now = self._training
        self._record_checkpoint()
        now.start_round(epoch, history)
        self.report.start_epoch(now.epoch)
        if now.has_schedule:  # it sets the rate of a round after the one before
            rate = {"learning_rate": _config(model)["learning_rate"]}
            self.report.metrics(rate, "train", epoch=now.epoch)

    @guarded
    def _end_round(self) -> None:
        now, epoch = self._training, self.report.epoch
        if epoch is not None:
            for data, values in now.end_round().items():
                self.report.metrics(values, now.phase(data), epoch=epoch)
            self.report.end_epoch()

    @guarded
    def _end(self, model: Any) -> None:
        if not self.report.is_open:
            return
        now = self._training
        # An earlier callback that stops the training after a round prevents our last call.
        if now.epoch < model.num_boosted_rounds() or now.epoch - now.offset < now.measured():
            self._end_round()
        else:  # it stopped the training before the round, which was not trained
            self.report.end_epoch("retried")
        self._record_checkpoint()
        self.report.end(now.reason(), now.best(model))
        self.reset()

    @guarded
    def _record_checkpoint(self) -> None:
        now, path = self._training, self._training.saved()
        if path is not None:
            self.report.checkpoint(
                CheckpointSaved(
                    path=path,
                    kind="periodic",
                    epoch=now.epoch,
                    step=now.epoch + 1,
                    metrics=now.values,
                    final=True,
                )
            )


_callback_class = late_class(__name__, "BusCallback", _Hooks, "xgboost.callback:TrainingCallback")
__getattr__ = lazy(__name__, BusCallback=_callback_class)


def _fit(hooks: _Hooks, fit: MethodType, /, *args: Any, **kwargs: Any) -> Any:
    """Fit an estimator with our callback, unless the user gave it one."""
    estimator: Any = fit.__self__
    callbacks = estimator.callbacks
    if users := users_of(callbacks or (), _Hooks):
        return _watched(fit, users)(*args, **kwargs)
    estimator.callbacks = [hooks, *(callbacks or ())]
    try:
        return _watched(fit, [hooks])(*args, **kwargs)
    finally:
        estimator.callbacks = callbacks


def _train(
    attach: Callable[[object], None], train: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    """Train with a callback of ours; add one if there is none."""
    callbacks = list(argument(train, "callbacks", args, kwargs) or ())
    ours = [callback for callback in callbacks if isinstance(callback, _Hooks)]
    if not ours:
        added = _callback_class()(origin=Origin.HOOK)
        attach(added)
        if added.report.emit is None:  # attaching failed, and was logged
            return train(*args, **kwargs)
        ours = [added]
        args, kwargs = with_argument(train, "callbacks", [added, *callbacks], args, kwargs)
    return _watched(train, ours)(*args, **kwargs)


def _watched(method: Callable[..., Any], ours: Sequence[_Hooks]) -> Callable[..., Any]:
    """Return the method, recording exceptions in the runs of these callbacks."""
    from xgboost import collective

    for callback in ours:
        method = partial(callback.report.watch(collective.get_rank), method)
    return method


class _Training:
    """One call of `train`.

    Args:
        variables: its local variables; empty if there are none.
    """

    def __init__(self, variables: Mapping[str, Any]) -> None:
        self.offset = self.epoch = 0
        self.history: Mapping[str, Any] = {}
        self.values: dict[str, Any] = {}
        """Metrics of the round that ended last."""
        self._file: tuple[str | None, Any] = (None, None)
        self.callbacks = callbacks = getattr(variables.get("cb_container"), "callbacks", ())
        found = {kind.__name__: c for c in callbacks for kind in type(c).__mro__}
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

    def start_round(self, epoch: int, history: Mapping[str, Any]) -> None:
        """Start a round, and remember the state of the file that it may be saved to."""
        self.epoch, self.history = epoch + self.offset, history
        path = self._checkpoint()
        self._file = path, None if path is None else _stamp(path)

    def end_round(self) -> dict[str, dict[str, Any]]:
        """Return the metrics of the round: data set → name → value."""
        found = {
            data: {f"{data}-{name}": measured[-1] for name, measured in metrics.items()}
            for data, metrics in self.history.items()
        }
        self.values = {name: value for values in found.values() for name, value in values.items()}
        return found

    def measured(self) -> int:
        """Return the number of rounds with metrics."""
        return max((len(v) for found in self.history.values() for v in found.values()), default=0)

    def phase(self, data: str) -> str:
        """Return the phase of a data set; the training data is known by identity."""
        return "train" if data in self._trained else phase_of(data)

    def saved(self) -> str | None:
        """Return the path of this round's checkpoint, once it is written."""
        path, before = self._file
        return path if path is not None and _stamp(path) not in (None, before) else None

    def best(self, model: Any) -> Best | None:
        """Return the best round, if this training has early stopping.

        A model also keeps the best round of an earlier training.
        """
        for data, metrics in getattr(self._stopper, "best_scores", {}).items():
            for name, values in metrics.items():
                epoch = int(model.attr("best_iteration"))
                return Best(metric=f"{data}-{name}", value=float(values[-1]), epoch=epoch)
        return None

    def reason(self) -> str | None:
        """Return why there were fewer rounds than requested."""
        if self.epoch + 1 >= self.offset + self.params.get("num_boost_round", 0):
            return None
        if self._stopper is None or self._stopper.current_rounds < self._stopper.rounds:
            return "stopped by a callback"
        names = [f"{d}-{name}" for d, found in self._stopper.best_scores.items() for name in found]
        return early_stop(names[0], self._stopper.rounds, "rounds")

    def _checkpoint(self) -> str | None:
        if self._saver is None or self.save_dir is None:
            return None
        end = "pkl" if self._saver._as_pickle else self._saver.default_format
        return os.path.join(self.save_dir, f"{self._saver._name}_{self.epoch}.{end}")


def _config(model: Any) -> dict[str, Any]:
    """Return the parameters of a model, set or default."""
    found: dict[str, Any] = {}
    todo: list[Any] = [json.loads(model.save_config())["learner"]]
    while todo:
        for name, item in todo.pop().items():
            if isinstance(item, dict) and name != "gbtree_model_param":  # it counts the trees
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
