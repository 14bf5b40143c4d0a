"""Turns an XGBoost training into events; a boosting round stands for an epoch.

Attaches to an estimator of the scikit-learn API, or to a `BusCallback` in the callbacks of `train`.
Exact in what was measured in which round, also where a training goes on with an earlier model. A
callback alone is told of no exception, and a `cv`, which trains several models at once, is left
alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from types import MethodType, ModuleType
from typing import TYPE_CHECKING, Any

from trainbus.errors import AttachError
from trainbus.events import CheckpointSaved, Resumed, RunStarted
from trainbus.interfaces import Detach, Emit
from trainbus.toolkit.adapters import Reporter, guarded, late_class, patch, version, wrap

from ._xgboost_facts import Training, config, variables_of_train

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
        return target.report.connect(emit)
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
    hooks = _callback_class()(guest=True)
    silence = hooks.report.connect(emit)
    unwrap = wrap(target, "fit", partial(_fit, hooks))

    def detach() -> None:
        silence()
        unwrap()

    return detach


def hook(module: ModuleType, attach: Callable[[object], None]) -> None:
    """Have every `train` of the program, also those of estimators, emit events.

    Args:
        module: the package, which was imported.
        attach: called with the callback of each training.
    """
    for name in ("", ".training", ".sklearn"):
        home = sys.modules.get(module.__name__ + name)
        if hasattr(home, "train"):
            patch(home, "train", partial(_train, attach))


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
        self._training = Training({})
        if bus is not None:
            bus.attach(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the training out: who is copied or unpickled begins its own."""
        return {"guest": self.guest, "report": self.report, "_training": Training({})}

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

        self._training = now = Training(variables_of_train())
        if xgboost.collective.get_rank() or not isinstance(model, xgboost.Booster):
            self.report.is_open = False  # what an earlier training left open is not this one's
            return
        now.offset = done = model.num_boosted_rounds()
        before = Resumed(epoch=done - 1, step=done, save_dir=now.resumed_from) if done else None
        self.report.start(
            RunStarted(
                params={**config(model), **now.params},
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
    def _begin_round(self, model: Any, epoch: int, history: Mapping[str, Any]) -> None:
        if not self.report.is_open:
            return
        now = self._training
        self._tell_checkpoint()
        now.begin_round(epoch, history)
        self.report.start_epoch(now.epoch)
        if now.has_schedule:  # it sets the rate of a round after the one before
            rate = {"learning_rate": config(model)["learning_rate"]}
            self.report.metrics(rate, "train", epoch=now.epoch)

    @guarded
    def _end_round(self) -> None:
        now, epoch = self._training, self.report.epoch
        if epoch is not None:
            for data, values in now.end_round().items():
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
        self._training = Training({})

    @guarded
    def _tell_checkpoint(self) -> None:
        now = self._training
        path = now.saved()
        if path is not None:
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


def _fit(hooks: _Hooks, fit: MethodType, /, *args: Any, **kwargs: Any) -> Any:
    """Fit an estimator with a callback of ours, unless the user gave it one."""
    estimator: Any = fit.__self__
    callbacks = estimator.callbacks
    mine = [c for c in callbacks or () if isinstance(c, _Hooks) and not c.guest]
    if mine:
        return _watched(fit, mine)(*args, **kwargs)
    estimator.callbacks = [hooks, *(callbacks or ())]
    try:
        return _watched(fit, [hooks])(*args, **kwargs)
    finally:
        estimator.callbacks = callbacks


def _train(
    attach: Callable[[object], None], train: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    """Train with a callback of ours, unless there is one."""
    place = list(signature(train).parameters).index("callbacks")
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


def _watched(method: Callable[..., Any], ours: Sequence[Any]) -> Callable[..., Any]:
    """Return the method that ends the runs of these callbacks where an exception leaves it."""
    from xgboost import collective

    for callback in ours:
        method = partial(callback.report.watch(collective.get_rank), method)
    return method
