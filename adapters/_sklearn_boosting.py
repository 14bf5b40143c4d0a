"""Hears each stage of scikit-learn's gradient boosting, beside a monitor of the user's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


class Monitor:
    """What `fit` is given as its monitor.

    Args:
        theirs: the user's monitor, or None.
        tell: called with each stage, from 0, and the estimator's attributes; it doesn't raise.
    """

    def __init__(self, theirs: Any, tell: Callable[[int, dict[str, Any]], None]) -> None:
        self.has_stopped = False
        """Whether the user's monitor ended the fit."""
        self._theirs = theirs
        self._tell = tell

    def __call__(self, stage: int, estimator: Any, frame: Any) -> Any:
        """Tell of a stage, and return what the user's monitor returns."""
        self._tell(stage, vars(estimator))
        stop = None if self._theirs is None else self._theirs(stage, estimator, frame)
        self.has_stopped = bool(stop)
        return stop


def takes_monitor(target: Any) -> bool:
    """Return whether the estimator calls a function of ours at each stage of its boosting."""
    bases = {f"{c.__module__}.{c.__qualname__}" for c in type(target).__mro__}
    if "sklearn.ensemble._gb.BaseGradientBoosting" not in bases:
        return False
    return "monitor" in inspect.signature(type(target).fit).parameters


def monitored(
    args: tuple[Any, ...], kwargs: dict[str, Any], tell: Callable[[int, dict[str, Any]], None]
) -> tuple[Monitor, tuple[Any, ...], dict[str, Any]]:
    """Return a monitor, and the arguments of a `fit` with it in the place of the user's."""
    if len(args) > 3:
        monitor = Monitor(args[3], tell)
        return monitor, (*args[:3], monitor, *args[4:]), kwargs
    monitor = Monitor(kwargs.get("monitor"), tell)
    return monitor, args, {**kwargs, "monitor": monitor}


def measured(own: dict[str, Any], stage: int) -> dict[str, Any]:
    """Return what the estimator has measured at a stage, by the names of its attributes."""
    names = ("train_score_", "oob_improvement_")
    return {name: own[name][stage] for name in names if name in own}
