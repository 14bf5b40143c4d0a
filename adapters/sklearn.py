"""Turns the fits of a scikit-learn estimator into events: each `fit` is a run.

Epochs are live for gradient boosting (a stage each), for loops of `partial_fit` (a call each, all
in one run), and where scikit-learn's own callbacks tell of tasks. Curves that other estimators keep
are told after the fit, as metrics of epochs that have no start and end. Nothing is
computed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from trainbus.distributed import current_rank
from trainbus.errors import AttachError
from trainbus.interfaces import Detach, Emit
from trainbus.toolkit.adapters import Reporter, guarded, when_gone, wrap

from ._sklearn_fit import Fit

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
        return target.report.connect(emit)
    if isinstance(target, type) or not (hasattr(target, "fit") and hasattr(target, "get_params")):
        raise AttachError(
            f"expected an estimator of scikit-learn or a BusCallback, found "
            f"{type(target).__qualname__}; attach the object that you call `fit()` on"
        )
    hooks = _Hooks(emit)
    around = {
        **dict.fromkeys(_FITS, hooks.fit),
        "partial_fit": hooks.partial_fit,
        "__getstate__": _hide_from_copies,
    }
    undo = [wrap(target, n, partial(f, target)) for n, f in around.items() if hasattr(target, n)]
    # Partial fits have no last one: who deletes the estimator has had enough of them.
    when_gone(target, hooks.end_partial, if_due=lambda: hooks.report.is_open)

    def detach() -> None:
        hooks.end_partial()
        hooks.report.active = False
        for each in undo:
            each()

    return detach


def _hide_from_copies(target: Any, method: Callable[[], Any]) -> Any:
    """Leave what is hung into an estimator out of its copies and pickles, which emit nothing."""
    state = method()
    if not isinstance(state, dict):
        return state
    ours = (*_FITS, "partial_fit", "__getstate__")
    return {name: value for name, value in state.items() if name not in ours}


class _Hooks:
    """Tells the fits of one estimator; `setup` to `teardown` are scikit-learn's own hooks."""

    def __init__(self, emit: Emit | None = None) -> None:
        self.report = Reporter(emit)
        self._fit = Fit(self.report)
        self._root: Any = None
        self._inside = False
        self._calls: int | None = None
        """How many partial fits there were, None where the last call was a fit."""

    def __getstate__(self) -> dict[str, Any]:
        """Copies are silent: a search hands them to its workers."""
        return {"active": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        _Hooks.__init__(self)
        self.report.active = False

    def fit(self, target: Any, method: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a fit as a run of its own."""
        if self._is_deaf(target):
            return method(*args, **kwargs)
        self.end_partial()
        self._inside = True
        try:
            self._fit.start(target, args[0] if args else kwargs.get("X"))
            args, kwargs = self._fit.monitored(target, args, kwargs)
            with self._among_callbacks(target):
                result = self.report.watch(current_rank)(method, *args, **kwargs)
            self._fit.finish(target)
        finally:
            self._inside = False
        return result

    def partial_fit(self, target: Any, method: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a partial fit as one epoch of a run that stays open for the next."""
        if self._is_deaf(target):
            return method(*args, **kwargs)
        self._inside = True
        try:
            if self._calls is None or not self.report.is_open:
                self._calls = self._calls or 0
                self._fit.start(target, args[0] if args else kwargs.get("X"), self._calls)
            if self.report.is_open:
                self.report.start_epoch(self._calls)
            result = self.report.watch(current_rank)(method, *args, **kwargs)
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
            self._fit.start_task()

    @guarded
    def on_fit_task_end(self, estimator: Any, context: Any, *, X: Any = None) -> None:  # noqa: N803
        if not self._is_outermost(context):
            return
        if context.task_name != _LBFGS:
            self.report.end_epoch()
        elif X is not None:  # else it is an iteration that was begun and never ran
            self._fit.tell_task()

    @guarded
    def teardown(self, estimator: Any, context: Any) -> None:
        self._root = None

    def _is_outermost(self, context: Any) -> bool:
        return self._root is not None and context.parent is self._root

    def _is_deaf(self, target: Any) -> bool:
        """Return whether a fit is part of another, or told by the user's own `BusCallback`."""
        theirs = any(isinstance(c, BusCallback) for c in vars(target).get("_skl_callbacks", ()))
        return theirs or self._inside or not self.report.active

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
            self._fit.start(estimator, X)
        super().on_fit_task_begin(estimator, context)

    @guarded
    def teardown(self, estimator: Any, context: Any) -> None:
        """End the run, by the exception that is under way if there is one."""
        if self._root is None or context is not self._root:
            return
        self._root, error = None, sys.exc_info()[1]
        if error is None or error is self._outer:
            self._fit.finish(estimator)
        else:
            self.report.fail(error, rank=current_rank())
