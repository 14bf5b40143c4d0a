"""Turns an XGBoost training into events; a boosting round stands for an epoch.

Attaches to an estimator of the scikit-learn API, or to a `BusCallback` in the callbacks of `train`.
Exact in what was measured in which round, also where a training goes on with an earlier model. A
callback alone is told of no exception, and a `cv`, which trains several models at once, is left
alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from inspect import signature
from types import FrameType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from trainbus.errors import AttachError
from trainbus.events import Best, CheckpointSaved, Resumed, RunStarted
from trainbus.hooking import Reporter, guarded, late_class, version
from trainbus.interfaces import Detach, Emit

TESTED = "3.2.0"
NEEDS = (
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
    """Have the trainings of an estimator, or those that a `BusCallback` is given to, emit events.

    Clones and unpickled copies of the estimator are not attached.

    Args:
        target: an estimator such as `XGBClassifier`, or a `BusCallback` of this module.
        emit: where the events go.

    Returns:
        A function that leaves the target as it was.

    Raises:
        AttachError: the object is neither, or is a random forest.
    """
    import xgboost

    if isinstance(target, _Hooks):
        report = target.report
        report.emit, report.active = emit, True

        def detach() -> None:
            report.active = False

        return detach
    if not isinstance(target, getattr(xgboost, "XGBModel", ())):  # it needs scikit-learn
        raise AttachError(
            f"expected an XGBoost estimator, found {type(target).__qualname__}; "
            "for xgboost.train add BusCallback(bus) to its callbacks"
        )
    if isinstance(target, xgboost.XGBRFClassifier | xgboost.XGBRFRegressor):
        raise AttachError(
            f"expected an estimator that boosts, found {type(target).__qualname__}: XGBoost takes "
            "no callbacks for a forest, which is one round"
        )
    return _attach_estimator(target, emit)


def hook(module: ModuleType, attach: Callable[[object], None]) -> None:
    """Have every `train` of the program, also those of estimators, emit events.

    Args:
        module: the package, which was imported.
        attach: called with the callback of each training.
    """
    for name in ("", ".training", ".sklearn"):
        home = sys.modules.get(module.__name__ + name)
        train = getattr(home, "train", None)
        if train is not None and not hasattr(train, "hooked_by"):
            home.train = _hooked(train, attach)  # type: ignore[union-attr]


def __getattr__(name: str) -> Any:
    if name == "BusCallback":
        return _callback_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Hooks:
    """Callback of `xgboost.train` that reports to a bus: `callbacks=[BusCallback(bus)]`."""

    def __init__(self, bus: Any = None, *, guest: bool = False) -> None:
        super().__init__()
        self.guest = guest
        """Whether the adapter put it into the callbacks, and not the user."""
        self.report = Reporter()
        self._training = _Training({})
        if bus is not None:
            bus.attach(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the training out: who is copied or unpickled begins its own."""
        return {"guest": self.guest, "report": self.report, "_training": _Training({})}

    def before_training(self, model: Any) -> Any:
        self._start(model)
        return model

    def before_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        self._begin_round(model, epoch, evals_log)
        return False

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        self._end_round()
        return False

    def after_training(self, model: Any) -> Any:
        self._finish(model)
        return model

    @guarded
    def _start(self, model: Any) -> None:
        import xgboost

        self._training = now = _Training(_variables_of_train())
        if xgboost.collective.get_rank() or not isinstance(model, xgboost.Booster):
            self.report.is_open = False  # what an earlier training left open is not this one's
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
            )
        )

    @guarded
    def _begin_round(self, model: Any, epoch: int, history: Mapping[str, Any]) -> None:
        if not self.report.is_open:
            return
        now = self._training
        self._tell_checkpoint()
        now.history, now.epoch = history, epoch + now.offset
        now.file = now.checkpoint(now.epoch)
        self.report.start_epoch(now.epoch)
        if now.has_schedule:  # it sets the rate of a round after the one before
            rate = {"learning_rate": _config(model)["learning_rate"]}
            self.report.metrics(rate, "train", epoch=now.epoch)

    @guarded
    def _end_round(self) -> None:
        now, epoch = self._training, self.report.epoch
        if epoch is not None:
            now.values = {}
            for data, metrics in now.history.items():
                values = {f"{data}-{name}": measured[-1] for name, measured in metrics.items()}
                now.values |= values
                self.report.metrics(values, now.phase(data), epoch=epoch)
            self.report.end_epoch()

    @guarded
    def _finish(self, model: Any) -> None:
        if not self.report.is_open:
            return
        now = self._training
        # A callback that stands before this one and stops the training hides its last call.
        if now.epoch < model.num_boosted_rounds() or now.epoch - now.offset < now.measured():
            self._end_round()
        else:  # or stopped it before the round, which then never was
            self.report.end_epoch("retried")
        self._tell_checkpoint()
        self.report.end(now.reason(), now.best(model))
        self._training = _Training({})

    @guarded
    def _tell_checkpoint(self) -> None:
        now = self._training
        path, before = now.file
        if path is not None and _stamp(path) not in (None, before):
            self.report.tell(
                CheckpointSaved(
                    path=path,
                    kind="periodic",
                    epoch=now.epoch,
                    step=now.epoch + 1,
                    metrics=now.values,
                    final=True,
                )
            )


_callback_class = late_class(
    __name__, "BusCallback", _Hooks, lambda: __import__("xgboost").callback.TrainingCallback
)


class _Training:
    """What is known of one call of `train`, by its variables; of none where there are none."""

    def __init__(self, variables: Mapping[str, Any]) -> None:
        self.offset = self.epoch = 0
        self.history: Mapping[str, Any] = {}
        self.values: dict[str, Any] = {}
        self.file: tuple[str | None, Any] = (None, None)
        callbacks = getattr(variables.get("cb_container"), "callbacks", ())
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

    def measured(self) -> int:
        """Return in how many rounds something was measured."""
        return max((len(v) for found in self.history.values() for v in found.values()), default=0)

    def phase(self, data: str) -> str:
        """Return what a data set is for: the training's own by identity, others by their names."""
        if data in self._trained or data.lower().startswith(("train", "learn")):
            return "train"
        return "test" if data.lower().startswith("test") else "validation"

    def checkpoint(self, epoch: int) -> tuple[str | None, Any]:
        """Return the path that a round may be saved at, and what is there now."""
        if self._saver is None or self.save_dir is None:
            return None, None
        end = "pkl" if self._saver._as_pickle else self._saver.default_format
        path = os.path.join(self.save_dir, f"{self._saver._name}_{epoch}.{end}")
        return path, _stamp(path)

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


def _attach_estimator(target: Any, emit: Emit) -> Detach:
    """Stand before the `fit` of one estimator, as a method that copies and pickles as such."""
    hooks = _callback_class()(guest=True)
    hooks.report.emit = emit
    before = vars(target).get("fit")
    plain = type(target).fit

    @wraps(plain)
    def fit(self: Any, *args: Any, **kwargs: Any) -> Any:
        method = before  # which is bound to the original, where this is a copy
        if before is None or isinstance(before, MethodType):
            method = MethodType(getattr(before, "__func__", plain), self)
        mine = [c for c in self.callbacks or () if isinstance(c, _Hooks) and not c.guest]
        if not hooks.report.active or mine:
            return _watched(method, mine)(*args, **kwargs)
        callbacks = self.callbacks
        self.callbacks = [hooks, *(callbacks or ())]
        try:
            return _watched(method, [hooks])(*args, **kwargs)
        finally:
            self.callbacks = callbacks

    fit.before, fit.report = before, hooks.report  # type: ignore[attr-defined]
    bound = target.fit = MethodType(fit, target)

    def detach() -> None:
        hooks.report.active = False
        if vars(target).get("fit") is bound:
            below = before
            while below is not None and hasattr(below, "report") and not below.report.active:
                below = below.before
            del target.fit
            if below is not None:
                target.fit = below

    return detach


def _watched(method: Callable[..., Any], ours: Sequence[Any]) -> Callable[..., Any]:
    """Return the method that ends the runs of these callbacks where an exception leaves it."""
    from xgboost import collective

    for callback in ours:
        method = partial(callback.report.watch(collective.get_rank), method)
    return method


def _hooked(train: Callable[..., Any], attach: Callable[[object], None]) -> Callable[..., Any]:
    place = list(signature(train).parameters).index("callbacks")

    @wraps(train)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        is_positional = len(args) > place
        callbacks = list((args[place] if is_positional else kwargs.get("callbacks")) or ())
        ours = [callback for callback in callbacks if isinstance(callback, _Hooks)]
        if not ours:
            added = _callback_class()(guest=True)
            attach(added)
            if added.report.emit is None:  # it said why
                return train(*args, **kwargs)
            ours = [added]
            if is_positional:
                args = (*args[:place], [added, *callbacks], *args[place + 1 :])
            else:
                kwargs["callbacks"] = [added, *callbacks]
        return _watched(train, ours)(*args, **kwargs)

    hooked.hooked_by = __name__  # type: ignore[attr-defined]
    return hooked


def _variables_of_train() -> dict[str, Any]:
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


def _config(model: Any) -> dict[str, Any]:
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
