"""Turns the fits of a scikit-learn estimator into events: each `fit` is a run.

Epochs are live for gradient boosting (a stage each), for loops of `partial_fit` (a call each, all
in one run), and where scikit-learn's own callbacks tell of tasks. Curves that other estimators keep
are told after the fit, as metrics of epochs that have no start and end. Nothing is
computed.
"""

from __future__ import annotations

import inspect
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from trainbus.errors import AttachError
from trainbus.events import (
    Best,
    EpochEnded,
    EpochStarted,
    ModelDescribed,
    Resumed,
    RunStarted,
    TableLogged,
)
from trainbus.hooking import Reporter, guarded, number, version, wrap
from trainbus.interfaces import Detach, Emit

TESTED = "1.9.1"
NEEDS = (
    "sklearn.base:BaseEstimator.get_params",
    "sklearn.base:BaseEstimator.__getstate__",
    "sklearn.callback:CallbackSupportMixin.set_callbacks",
    "sklearn.callback:CallbackContext.subcontext",
    "sklearn.callback:FitCallback",
    "sklearn.ensemble:GradientBoostingClassifier.fit",
    "sklearn.utils:get_tags",
)

_FITS = ("fit", "fit_transform", "fit_predict")
_CURVES = {
    "train_score_": "train",
    "loss_curve_": "train",
    "validation_score_": "validation",
    "validation_scores_": "validation",
}
_NUMBERS = {
    "train": ("n_iter_", "inertia_", "lower_bound_"),
    "validation": ("best_score_", "best_validation_score_", "oob_score_"),
}
_LBFGS = "lbfgs-iter"


def attach(target: Any, emit: Emit) -> Detach:
    """Have the fits of an estimator emit events; its clones, copies and pickles emit none.

    Args:
        target: an estimator, or a `BusCallback` of this module.
        emit: where the events go.

    Returns:
        A function that leaves the estimator as it was; a run of `partial_fit` calls ends with it.

    Raises:
        AttachError: the object is neither.
    """
    if isinstance(target, BusCallback):
        target.report.emit, target.report.active = emit, True
        return partial(setattr, target.report, "active", False)
    if isinstance(target, type) or not (hasattr(target, "fit") and hasattr(target, "get_params")):
        raise AttachError(
            f"expected an estimator of scikit-learn or a BusCallback, found "
            f"{type(target).__qualname__}; attach the object that you call `fit()` on"
        )
    hooks = _Hooks(emit)
    undo = [wrap(target, n, partial(hooks.fit, target)) for n in _FITS if hasattr(target, n)]
    if hasattr(target, "partial_fit"):
        undo.append(wrap(target, "partial_fit", partial(hooks.partial_fit, target)))
    if hasattr(target, "__getstate__"):
        undo.append(_hide_from_copies(target))

    def detach() -> None:
        hooks.end_partial()
        hooks.report.active = False
        for each in reversed(undo):
            each()

    return detach


def _hide_from_copies(target: Any) -> Detach:
    """Leave what is hung into an estimator out of its copies and pickles, which emit nothing."""
    names = (*_FITS, "partial_fit", "__getstate__")

    def state(method: Callable[[], Any]) -> Any:
        found = method()
        if not isinstance(found, dict):
            return found
        return {name: value for name, value in found.items() if name not in names}

    return wrap(target, "__getstate__", state)


class _Hooks:
    """Tells the fits of one estimator; `setup` to `teardown` are scikit-learn's own hooks."""

    def __init__(self, emit: Emit | None = None) -> None:
        self.report = Reporter(emit)
        self._root: Any = None
        self._inside = self._by_monitor = False
        self._calls: int | None = None
        """How many partial fits there were, None where the last call was a fit."""
        self._tasks = self._done = 0
        self._began = self._fit_began = 0.0

    def __getstate__(self) -> dict[str, Any]:
        """Copies are silent: a search hands them to its workers."""
        return {"active": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        _Hooks.__init__(self)
        self.report.active = False

    def fit(self, target: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a fit as a run of its own."""
        if self._is_deaf(target):
            return method(*args, **kwargs)
        self.end_partial()
        self._inside = True
        try:
            self._start(target, args[0] if args else kwargs.get("X"))
            if self.report.is_open and _takes_monitor(target):
                args, kwargs = self._with_monitor(args, kwargs)
            with self._among_callbacks(target):
                result = self.report.watch(_rank)(method, *args, **kwargs)
            self._finish(target)
        finally:
            self._inside = False
        return result

    def partial_fit(self, target: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a partial fit as one epoch of a run that stays open for the next."""
        if self._is_deaf(target):
            return method(*args, **kwargs)
        self._inside = True
        try:
            if self._calls is None or not self.report.is_open:
                self._calls = self._calls or 0
                self._start(target, args[0] if args else kwargs.get("X"), self._calls)
            if self.report.is_open:
                self.report.start_epoch(self._calls)
            result = self.report.watch(_rank)(method, *args, **kwargs)
            self._end_call(target)
        finally:
            self._inside = False
        return result

    def end_partial(self) -> None:
        """End a run of partial fits, if one is open."""
        if self._calls is not None and self.report.is_open:
            self.report.end()
        self._calls = None

    @guarded
    def setup(self, estimator: Any, context: Any) -> None:
        self._root = context

    @guarded
    def on_fit_task_begin(self, estimator: Any, context: Any, *, X: Any = None) -> None:  # noqa: N803
        if self._is_outermost(context) and context.task_name != _LBFGS:
            self.report.start_epoch(self._next_task())

    @guarded
    def on_fit_task_end(self, estimator: Any, context: Any, *, X: Any = None) -> None:  # noqa: N803
        if not self._is_outermost(context):
            return
        if context.task_name != _LBFGS:
            self.report.end_epoch()
        elif X is not None:  # else it is an iteration that was begun and never ran
            self._tell_epoch(self._next_task(), {})

    @guarded
    def teardown(self, estimator: Any, context: Any) -> None:
        self._root = None

    def _is_outermost(self, context: Any) -> bool:
        return self._root is not None and context.parent is self._root

    def _next_task(self) -> int:
        self._tasks += 1
        return self._tasks - 1

    def _is_deaf(self, target: Any) -> bool:
        """Return whether a fit is part of another, or told by the user's own `BusCallback`."""
        theirs = any(isinstance(c, BusCallback) for c in vars(target).get("_skl_callbacks", ()))
        return theirs or self._inside or not self.report.active

    @guarded
    def _start(self, target: Any, data: Any, calls: int | None = None) -> None:
        self._tasks, self._by_monitor = 0, False
        self._began = self._fit_began = time.monotonic()
        self._done = calls or 0
        if calls is None and getattr(target, "warm_start", False):
            self._done = _rounds(vars(target))
        if _rank():
            return
        shape = getattr(data, "shape", None) or ((len(data),) if hasattr(data, "__len__") else ())
        params = {
            "class": f"{type(target).__module__}.{type(target).__qualname__}",
            **dict(zip(("n_samples", "n_features"), shape, strict=False)),
            **target.get_params(),
        }
        self.report.start(
            RunStarted(
                task=_task(target),
                params=params,
                framework="sklearn",
                framework_version=version("sklearn"),
                resumed=Resumed(epoch=self._done - 1) if self._done else None,
                goals={"best_score_": "max"},
            )
        )

    @guarded
    def _finish(self, target: Any) -> None:
        if not self.report.is_open:
            return
        own = vars(target)
        if not _takes_monitor(target):
            self._tell_curves(own)
        # Histogram boosting counts its rounds in a property.
        own = {"n_iter_": getattr(target, "n_iter_", None), **own}
        self._tell_results(own)
        if _is_interrupted(own):
            self.report.fail(KeyboardInterrupt())
            return
        best = number(own.get("best_score_"))
        reason = "stopped by the monitor" if self._by_monitor else _why_ended(own)
        self.report.end(reason, None if best is None else Best(metric="best_score_", value=best))

    @guarded
    def _end_call(self, target: Any) -> None:
        own = vars(target)
        curve = own.get("loss_curve_")
        if curve is not None and own.get("n_iter_") == 0:  # the network caught Ctrl-C
            self.report.fail(KeyboardInterrupt())
            return
        values = {"loss_curve_": curve[-1]} if curve else {}
        values |= {n: own[n] for n in ("inertia_", "lower_bound_") if n in own}
        self.report.metrics(values, "train", epoch=self._calls)
        self.report.end_epoch()
        self._calls = (self._calls or 0) + 1

    def _with_monitor(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Hear each stage of gradient boosting, beside a monitor of the user's."""
        if len(args) > 3:
            return (*args[:3], partial(self._monitor, args[3]), *args[4:]), kwargs
        return args, {**kwargs, "monitor": partial(self._monitor, kwargs.get("monitor"))}

    def _monitor(self, theirs: Any, stage: int, estimator: Any, frame: Any) -> Any:
        self._tell_stage(stage, vars(estimator))
        stop = None if theirs is None else theirs(stage, estimator, frame)
        self._by_monitor = bool(stop)
        return stop

    @guarded
    def _tell_stage(self, stage: int, own: dict[str, Any]) -> None:
        names = ("train_score_", "oob_improvement_")
        self._tell_epoch(stage, {n: own[n][stage] for n in names if n in own})

    def _tell_epoch(self, epoch: int, values: dict[str, Any]) -> None:
        """Tell of an epoch that is over, where scikit-learn says nothing at its start."""
        began, self._began = self._began, time.monotonic()
        self.report.tell(EpochStarted(epoch=epoch))
        self.report.metrics(values, "train", epoch=epoch)
        seconds = self._began - began
        self.report.tell(EpochEnded(epoch=epoch, duration_s=seconds, outcome="completed"))

    def _tell_curves(self, own: dict[str, Any]) -> None:
        offset, rounds = _offset(own), _rounds(own)
        first = self._done if self._done else -offset
        for epoch in range(first, rounds) if rounds else ():
            at = (0, None) if epoch < 0 else (None, epoch)  # curves that begin before it
            for phase in ("train", "validation"):
                row = {n: c[epoch + offset] for n, c in _curves(own).items() if _CURVES[n] == phase}
                self.report.metrics(row, phase, step=at[0], epoch=at[1])

    def _tell_results(self, own: dict[str, Any]) -> None:
        values: dict[str, Any] = {"fit_time": time.monotonic() - self._fit_began}
        for phase, names in _NUMBERS.items():
            self.report.metrics(values | {n: own[n] for n in names if n in own}, phase)
            values = {}
        weights = [own[n] for n in ("coef_", "intercept_", "coefs_", "intercepts_") if n in own]
        parts = [part for w in weights for part in (w if isinstance(w, list) else [w])]
        if parts:
            count = sum(int(getattr(part, "size", 1)) for part in parts)
            self.report.tell(ModelDescribed(parameters=count))
        if own.get("cv_results_"):
            table = {n: list(v) for n, v in own["cv_results_"].items() if n != "params"}
            rows = [list(row) for row in zip(*table.values(), strict=True)]
            self.report.tell(TableLogged(key="cv_results_", columns=list(table), rows=rows))

    @contextmanager
    def _among_callbacks(self, target: Any) -> Iterator[None]:
        """Hang this among the callbacks of an estimator that has some, for one fit."""
        if not (hasattr(target, "set_callbacks") and self.report.is_open):
            yield
            return
        from sklearn.callback import CallbackSupportMixin

        # An estimator's own `set_callbacks` may warn that it calls none of them.
        hang = partial(CallbackSupportMixin.set_callbacks, target)
        before = list(vars(target).get("_skl_callbacks", ()))
        hang(*before, self)
        try:
            yield
        finally:
            self._root = None
            hang(*before)


class BusCallback(_Hooks):
    """The callback of `estimator.set_callbacks(BusCallback(bus))`: each fit is a run.

    Args:
        bus: where the events go.
    """

    def __init__(self, bus: Any) -> None:
        super().__init__()
        self._outer: BaseException | None = None
        bus.attach(self)

    @guarded
    def setup(self, estimator: Any, context: Any) -> None:
        """Take a fit that is no part of another for the one to tell of."""
        if self._root is None and context.parent is None:
            self._root, self._outer = context, sys.exc_info()[1]

    @guarded
    def on_fit_task_begin(self, estimator: Any, context: Any, *, X: Any = None) -> None:  # noqa: N803
        """Begin the run with the fit itself, an epoch with each of its tasks."""
        if self._root is not None and context is self._root:
            self._start(estimator, X)
        super().on_fit_task_begin(estimator, context)

    @guarded
    def teardown(self, estimator: Any, context: Any) -> None:
        """End the run, by the exception that is under way if there is one."""
        if self._root is None or context is not self._root:
            return
        self._root, error = None, sys.exc_info()[1]
        if error is None or error is self._outer:
            self._finish(estimator)
        else:
            self.report.fail(error, rank=_rank())


def _takes_monitor(target: Any) -> bool:
    """Return whether the estimator calls a function of ours at each stage of its boosting."""
    bases = {f"{c.__module__}.{c.__qualname__}" for c in type(target).__mro__}
    if "sklearn.ensemble._gb.BaseGradientBoosting" not in bases:
        return False
    return "monitor" in inspect.signature(type(target).fit).parameters


def _curves(own: dict[str, Any]) -> dict[str, Any]:
    return {n: own[n] for n in _CURVES if own.get(n) is not None and len(own[n])}


def _offset(own: dict[str, Any]) -> int:
    """Return 1 for histogram boosting, whose curves begin before its first round, else 0."""
    return int("do_early_stopping_" in own)


def _rounds(own: dict[str, Any]) -> int:
    """Return of how many rounds or epochs an estimator keeps a curve."""
    return max([0, *(len(curve) - _offset(own) for curve in _curves(own).values())])


def _why_ended(own: dict[str, Any]) -> str | None:
    """Return why a fit ended before its last round, where `n_iter_no_change` made it."""
    patience = own.get("n_iter_no_change")
    done, limit = own.get("n_iter_"), own.get("max_iter")
    if "n_estimators_" in own:
        done, limit = own["n_estimators_"], own["n_estimators"]
    is_counted = own.get("do_early_stopping_", own.get("solver") != "lbfgs")
    if patience is None or not is_counted or done is None or limit is None or done >= limit:
        return None
    what = "training loss" if own.get("early_stopping") is False else "validation score"
    return f"early stop: no better {what} in {patience} iterations"


def _is_interrupted(own: dict[str, Any]) -> bool:
    """Return whether Ctrl-C ended the fit of a neural network, which catches it."""
    misses = own.get("_no_improvement_count")
    if misses is None or own.get("solver") == "lbfgs":
        return False
    return bool(own["n_iter_"] < own["max_iter"] and misses <= own["n_iter_no_change"])


def _task(target: Any) -> str | None:
    from sklearn.utils import get_tags

    try:
        kind = get_tags(target).estimator_type
    except Exception:  # an estimator of the user's that has none
        return None
    return None if kind is None else str(kind)


def _rank() -> int:
    """Return the rank that a launcher such as torchrun gave this process: each fits the same."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdigit() else 0
