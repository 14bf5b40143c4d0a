"""Turns the fits of a scikit-learn estimator into events: each `fit` is a run.

Epochs are recorded live for gradient boosting (each stage is one), for loops of `partial_fit` (each
call is one, and all are one run), and where scikit-learn calls its own callbacks for tasks. Curves
that other estimators keep are recorded after the fit, as metrics of epochs without start and end.
Nothing is computed.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any

from trainbus import events
from trainbus.interfaces import Detach, Emit
from trainbus.toolkit.adapters import (
    Hooks,
    Origin,
    argument,
    best_of,
    early_stop,
    guarded,
    version,
    when_gone,
    with_argument,
    wrap,
    wrong_target,
)

TESTED_VERSIONS = "1.9.1"
REQUIRED_NAMES = (
    "sklearn.base:BaseEstimator.get_params",
    "sklearn.base:BaseEstimator.__getstate__",
    "sklearn.callback:CallbackSupportMixin.set_callbacks",
    "sklearn.callback:CallbackContext.subcontext",
    "sklearn.callback:FitCallback",
    "sklearn.ensemble:GradientBoostingClassifier.fit",
    "sklearn.utils:get_tags",
)

_FITS = ("fit", "fit_transform", "fit_predict")
_LBFGS = "lbfgs-iter"


def attach(target: Any, emit: Emit) -> Detach:
    """Report the fits of an estimator; its clones, copies and pickles emit nothing.

    Args:
        target: an estimator, or a `BusCallback` of this module.
        emit: where the events go.

    Returns:
        A function that restores the estimator, and ends a run of `partial_fit` calls.

    Raises:
        AttachError: the object is neither.
    """
    if isinstance(target, BusCallback):
        return target.report.connect(emit)
    if isinstance(target, type) or not (hasattr(target, "fit") and hasattr(target, "get_params")):
        advice = "attach the object that you call `fit()` on"
        raise wrong_target(target, "an estimator of scikit-learn or a BusCallback", advice)
    hooks = _Hooks(origin=Origin.ATTACH)
    around = {
        **dict.fromkeys(_FITS, hooks.fit),
        "partial_fit": hooks.partial_fit,
        "__getstate__": _state_for_copies,
    }
    undo = [wrap(target, n, partial(f, target)) for n, f in around.items() if hasattr(target, n)]
    # No partial fit is known to be the last one until the estimator is deleted.
    when_gone(target, hooks.end_partial, if_due=lambda: hooks.report.is_open)

    def release() -> None:
        hooks.end_partial()
        for each in undo:
            each()

    return hooks.report.connect(emit, release)


def _state_for_copies(target: Any, method: Callable[[], Any]) -> Any:
    """Return the state of an estimator without the wrappers of its methods."""
    state = method()
    if not isinstance(state, dict):
        return state
    ours = (*_FITS, "partial_fit", "__getstate__")
    return {name: value for name, value in state.items() if name not in ours}


class _Hooks(Hooks):
    """Reports the fits of one estimator; `setup` to `teardown` are scikit-learn's own hooks."""

    def reset(self) -> None:
        self._root: Any = None
        self._inside = False
        self._calls: int | None = None
        """Number of partial fits, None if the last call was a fit."""
        self._monitor: _Monitor | None = None
        self._done = 0
        self._tasks = count()
        self._epoch_began = self._fit_began = 0.0

    def __getstate__(self) -> dict[str, Any]:
        """Copies are silent: a search gives them to its workers."""
        return {"active": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.report.active = False

    def fit(self, target: Any, method: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a fit as a run of its own."""
        if self._skips(target):
            return method(*args, **kwargs)
        self.end_partial()
        self._inside = True
        try:
            self._start(target, args[0] if args else kwargs.get("X"))
            if self.report.is_open and _takes_monitor(target):
                users = argument(method, "monitor", args, kwargs)
                self._monitor = _Monitor(users, self._record_stage)
                args, kwargs = with_argument(method, "monitor", self._monitor, args, kwargs)
            with self._among_callbacks(target):
                result = self.report.watch()(method, *args, **kwargs)
            self._end(target)
        finally:
            self._inside = False
        return result

    def partial_fit(self, target: Any, method: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a partial fit as one epoch of a run that stays open for the next."""
        if self._skips(target):
            return method(*args, **kwargs)
        self._inside = True
        try:
            if self._calls is None or not self.report.is_open:
                self._calls = self._calls or 0
                self._start(target, args[0] if args else kwargs.get("X"), self._calls)
            if self.report.is_open:
                self.report.start_epoch(self._calls)
            result = self.report.watch()(method, *args, **kwargs)
            self._end_call(target)
        finally:
            self._inside = False
        return result

    def end_partial(self) -> None:
        """End a run of partial fits, if one is open."""
        if self._calls is not None and self.report.is_open:
            self.report.end()
        self._calls = None

    def _skips(self, target: Any) -> bool:
        """Return whether a fit is part of another, or is reported by the user's `BusCallback`."""
        users = any(isinstance(c, BusCallback) for c in vars(target).get("_skl_callbacks", ()))
        return users or self._inside or not self.report.active

    @guarded
    def _start(self, target: Any, data: Any, calls: int | None = None) -> None:
        """Start a run on the main rank.

        Args:
            target: the estimator.
            data: its training data.
            calls: number of earlier partial fits, None for a whole fit.
        """
        self._tasks, self._monitor = count(), None
        self._epoch_began = self._fit_began = time.monotonic()
        self._done = calls or 0
        if calls is None and getattr(target, "warm_start", False):
            self._done = _rounds(vars(target))
        if not self.report.rank():
            self.report.start(
                _started(target, data, self._done),
                loggers=vars(target).get("_skl_callbacks", ()),
                remedy="leave it out of set_callbacks()",
            )

    @guarded
    def _record_stage(self, stage: int, own: dict[str, Any]) -> None:
        names = ("train_score_", "oob_improvement_")
        self._record_epoch(stage, {name: own[name][stage] for name in names if name in own})

    def _record_epoch(self, epoch: int, values: dict[str, Any]) -> None:
        """Record an epoch that ended, if scikit-learn calls no hook at its start."""
        began, self._epoch_began = self._epoch_began, time.monotonic()
        self.report.record(events.EpochStarted(epoch=epoch))
        self.report.metrics(values, "train", epoch=epoch)
        seconds = self._epoch_began - began
        self.report.record(events.EpochEnded(epoch=epoch, duration_s=seconds, outcome="completed"))

    @guarded
    def _end_call(self, target: Any) -> None:
        own = vars(target)
        curve = own.get("loss_curve_")
        if curve is not None and own.get("n_iter_") == 0:  # the network caught Ctrl-C
            self.report.fail(KeyboardInterrupt(), rank=0)
            return
        values = {"loss_curve_": curve[-1]} if curve else {}
        values |= {n: own[n] for n in ("inertia_", "lower_bound_") if n in own}
        self.report.metrics(values, "train", epoch=self._calls)
        self.report.end_epoch()
        self._calls = (self._calls or 0) + 1

    @guarded
    def _end(self, target: Any) -> None:
        """Record the results of a fit, and end the run."""
        if not self.report.is_open:
            return
        own = vars(target)
        if not _takes_monitor(target):
            for phase, epoch, values in _rows(own, self._done):
                self.report.metrics(values, phase, epoch=epoch, step=0 if epoch is None else None)
        # Histogram boosting counts its rounds in a property.
        own = {"n_iter_": getattr(target, "n_iter_", None), **own}
        more: dict[str, Any] = {"fit_time": time.monotonic() - self._fit_began}
        for phase, names in _RESULTS.items():
            self.report.metrics(more | {n: own[n] for n in names if n in own}, phase)
            more = {}
        for event in _model_and_table(own):
            self.report.record(event)
        if _is_interrupted(own):
            self.report.fail(KeyboardInterrupt(), rank=0)
            return
        is_stopped = self._monitor is not None and self._monitor.has_stopped
        why = "stopped by the monitor" if is_stopped else _why_ended(own)
        self.report.end(why, best_of("best_score_", own.get("best_score_")))

    @contextmanager
    def _among_callbacks(self, target: Any) -> Iterator[None]:
        """Add this to the callbacks of an estimator that takes some, for one fit."""
        if not (hasattr(target, "set_callbacks") and self.report.is_open):
            yield
            return
        from sklearn.callback import CallbackSupportMixin

        # An estimator's own `set_callbacks` may warn that it calls none of them.
        set_callbacks = partial(CallbackSupportMixin.set_callbacks, target)
        before = list(vars(target).get("_skl_callbacks", ()))
        set_callbacks(*before, self)
        try:
            yield
        finally:
            self._root = None
            set_callbacks(*before)

    @guarded
    def setup(self, estimator: Any, context: Any) -> None:
        self._root = context

    @guarded
    def on_fit_task_begin(self, estimator: Any, context: Any, *, X: Any = None) -> None:  # noqa: N803
        if self._is_outermost(context) and context.task_name != _LBFGS:
            self.report.start_epoch(next(self._tasks))

    @guarded
    def on_fit_task_end(self, estimator: Any, context: Any, *, X: Any = None) -> None:  # noqa: N803
        if not self._is_outermost(context):
            return
        if context.task_name != _LBFGS:
            self.report.end_epoch()
        elif X is not None:  # else the iteration was started, but did not run
            self._record_epoch(next(self._tasks), {})

    @guarded
    def teardown(self, estimator: Any, context: Any) -> None:
        self._root = None

    def _is_outermost(self, context: Any) -> bool:
        return self._root is not None and context.parent is self._root


class BusCallback(_Hooks):
    """The callback of `estimator.set_callbacks(BusCallback(bus))`: each fit is a run.

    Args:
        bus: where the events go.
    """

    _outer: BaseException | None = None
    """The exception that was being handled when the fit started."""

    @guarded
    def setup(self, estimator: Any, context: Any) -> None:
        """Choose a fit that is not part of another as the one to report."""
        if self._root is None and context.parent is None:
            self._root, self._outer = context, sys.exc_info()[1]

    @guarded
    def on_fit_task_begin(self, estimator: Any, context: Any, *, X: Any = None) -> None:  # noqa: N803
        """Start the run with the fit itself, an epoch with each of its tasks."""
        if self._root is not None and context is self._root:
            self._start(estimator, X)
        super().on_fit_task_begin(estimator, context)

    @guarded
    def teardown(self, estimator: Any, context: Any) -> None:
        """End the run, with the exception that left the fit if there is one."""
        if self._root is None or context is not self._root:
            return
        self._root, error = None, sys.exc_info()[1]
        if error is None or error is self._outer:
            self._end(estimator)
        else:
            self.report.fail(error)


class _Monitor:
    """The monitor that `fit` of gradient boosting is called with.

    Args:
        users: the user's monitor, or None.
        record: called with each stage, from 0, and the estimator's attributes; must not raise.
    """

    def __init__(self, users: Any, record: Callable[[int, dict[str, Any]], None]) -> None:
        self.has_stopped = False
        """Whether the user's monitor ended the fit."""
        self._users = users
        self._record = record

    def __call__(self, stage: int, estimator: Any, frame: Any) -> Any:
        self._record(stage, vars(estimator))
        stop = None if self._users is None else self._users(stage, estimator, frame)
        self.has_stopped = bool(stop)
        return stop


def _takes_monitor(target: Any) -> bool:
    """Return whether the estimator calls a monitor at each stage of its boosting."""
    bases = {f"{c.__module__}.{c.__qualname__}" for c in type(target).__mro__}
    if "sklearn.ensemble._gb.BaseGradientBoosting" not in bases:
        return False
    return "monitor" in inspect.signature(type(target).fit).parameters


# The attributes of estimators. `own` is always `vars(estimator)`.

_CURVES = {
    "train_score_": "train",
    "loss_curve_": "train",
    "validation_score_": "validation",
    "validation_scores_": "validation",
}
_RESULTS = {
    "train": ("n_iter_", "inertia_", "lower_bound_"),
    "validation": ("best_score_", "best_validation_score_", "oob_score_"),
}


def _started(target: Any, data: Any, done: int) -> events.RunStarted:
    """Return the start of a fit.

    Args:
        target: the estimator.
        data: its training data, of any type.
        done: number of epochs before this fit, which continues from there.
    """
    shape = getattr(data, "shape", None) or ((len(data),) if hasattr(data, "__len__") else ())
    params = {
        "class": f"{type(target).__module__}.{type(target).__qualname__}",
        **dict(zip(("n_samples", "n_features"), shape, strict=False)),
        **target.get_params(),
    }
    return events.RunStarted(
        task=_task(target),
        params=params,
        framework="sklearn",
        framework_version=version("sklearn"),
        resumed=events.Resumed(epoch=done - 1) if done else None,
        goals={"best_score_": "max"},
    )


def _task(target: Any) -> str | None:
    from sklearn.utils import get_tags

    try:
        kind = get_tags(target).estimator_type
    except Exception:  # a user's estimator without tags
        return None
    return None if kind is None else str(kind)


def _rounds(own: Mapping[str, Any]) -> int:
    """Return the number of rounds or epochs that an estimator has curves of."""
    return max([0, *(len(curve) - _offset(own) for curve in _curves(own).values())])


def _rows(own: Mapping[str, Any], done: int) -> Iterator[tuple[str, int | None, dict[str, Any]]]:
    """Yield phase, epoch and values of the curves; values before the first round have no epoch.

    Args:
        own: attributes of the estimator.
        done: number of epochs before this fit, which are left out.
    """
    offset, rounds = _offset(own), _rounds(own)
    for epoch in range(done or -offset, rounds) if rounds else ():
        for phase in ("train", "validation"):
            row = {n: c[epoch + offset] for n, c in _curves(own).items() if _CURVES[n] == phase}
            yield phase, None if epoch < 0 else epoch, row


def _curves(own: Mapping[str, Any]) -> dict[str, Any]:
    return {n: own[n] for n in _CURVES if own.get(n) is not None and len(own[n])}


def _offset(own: Mapping[str, Any]) -> int:
    """Return 1 for histogram boosting, whose curves start before its first round, else 0."""
    return int("do_early_stopping_" in own)


def _model_and_table(
    own: Mapping[str, Any],
) -> Iterator[events.ModelDescribed | events.TableLogged]:
    """Yield the size of a model with coefficients, and the result table of a search."""
    weights = [own[n] for n in ("coef_", "intercept_", "coefs_", "intercepts_") if n in own]
    parts = [part for w in weights for part in (w if isinstance(w, list) else [w])]
    if parts:
        yield events.ModelDescribed(parameters=sum(int(getattr(part, "size", 1)) for part in parts))
    if own.get("cv_results_"):
        table = {n: list(v) for n, v in own["cv_results_"].items() if n != "params"}
        lines = [list(line) for line in zip(*table.values(), strict=True)]
        yield events.TableLogged(key="cv_results_", columns=list(table), rows=lines)


def _why_ended(own: Mapping[str, Any]) -> str | None:
    """Return why `n_iter_no_change` ended a fit before its last round, None if it did not."""
    patience = own.get("n_iter_no_change")
    done, limit = own.get("n_iter_"), own.get("max_iter")
    if "n_estimators_" in own:
        done, limit = own["n_estimators_"], own["n_estimators"]
    is_counted = own.get("do_early_stopping_", own.get("solver") != "lbfgs")
    if patience is None or not is_counted or done is None or limit is None or done >= limit:
        return None
    what = "training loss" if own.get("early_stopping") is False else "validation score"
    return early_stop(what, patience, "iterations")


def _is_interrupted(own: Mapping[str, Any]) -> bool:
    """Return whether Ctrl-C ended the fit of a neural network, which catches it."""
    misses = own.get("_no_improvement_count")
    if misses is None or own.get("solver") == "lbfgs":
        return False
    return bool(own["n_iter_"] < own["max_iter"] and misses <= own["n_iter_no_change"])
