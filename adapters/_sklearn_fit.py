"""Tells the fits of a scikit-learn estimator, one after the other: start, epochs, results, end."""

from __future__ import annotations

import time
from itertools import count
from typing import Any

from trainbus.distributed import current_rank
from trainbus.events import Best, EpochEnded, EpochStarted
from trainbus.toolkit.adapters import Reporter, guarded, number

from . import _sklearn_facts as facts
from ._sklearn_boosting import Monitor, measured, monitored, takes_monitor


class Fit:
    """The fit that is under way; `start` begins the next.

    Args:
        report: what it is told to; nothing is told where the start opened no run.
    """

    def __init__(self, report: Reporter) -> None:
        self._report = report
        self._monitor: Monitor | None = None
        self._done = 0
        self._tasks = count()
        self._began = self._fit_began = 0.0

    @guarded
    def start(self, target: Any, data: Any, calls: int | None = None) -> None:
        """Begin a run, if this is the main rank.

        Args:
            target: the estimator.
            data: what it is fitted on.
            calls: how many partial fits it had, None for a whole fit.
        """
        self._tasks, self._monitor = count(), None
        self._began = self._fit_began = time.monotonic()
        self._done = calls or 0
        if calls is None and getattr(target, "warm_start", False):
            self._done = facts.rounds(vars(target))
        if not current_rank():
            self._report.start(
                facts.started(target, data, self._done),
                loggers=vars(target).get("_skl_callbacks", ()),
                remedy="leave it out of set_callbacks()",
            )

    def monitored(self, target: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return the arguments of a `fit`, by which gradient boosting is heard."""
        if self._report.is_open and takes_monitor(target):
            self._monitor, args, kwargs = monitored(args, kwargs, self._tell_stage)
        return args, kwargs

    @guarded
    def _tell_stage(self, stage: int, own: dict[str, Any]) -> None:
        self._tell_epoch(stage, measured(own, stage))

    def start_task(self) -> None:
        """Begin the next epoch."""
        self._report.start_epoch(next(self._tasks))

    def tell_task(self) -> None:
        """Tell of the next epoch, which is over."""
        self._tell_epoch(next(self._tasks), {})

    def _tell_epoch(self, epoch: int, values: dict[str, Any]) -> None:
        """Tell of an epoch that is over, where scikit-learn says nothing at its start."""
        began, self._began = self._began, time.monotonic()
        self._report.tell(EpochStarted(epoch=epoch))
        self._report.metrics(values, "train", epoch=epoch)
        seconds = self._began - began
        self._report.tell(EpochEnded(epoch=epoch, duration_s=seconds, outcome="completed"))

    @guarded
    def finish(self, target: Any) -> None:
        """Tell what the fit left, and end the run."""
        if not self._report.is_open:
            return
        own = vars(target)
        if not takes_monitor(target):
            for phase, epoch, values in facts.rows(own, self._done):
                self._report.metrics(values, phase, epoch=epoch, step=0 if epoch is None else None)
        # Histogram boosting counts its rounds in a property.
        own = {"n_iter_": getattr(target, "n_iter_", None), **own}
        self._tell_results(own)
        if facts.is_interrupted(own):
            self._report.fail(KeyboardInterrupt())
            return
        by_monitor = self._monitor is not None and self._monitor.has_stopped
        best = number(own.get("best_score_"))
        self._report.end(
            "stopped by the monitor" if by_monitor else facts.why_ended(own),
            None if best is None else Best(metric="best_score_", value=best),
        )

    def _tell_results(self, own: dict[str, Any]) -> None:
        more: dict[str, Any] = {"fit_time": time.monotonic() - self._fit_began}
        for phase, values in facts.results(own):
            self._report.metrics(more | values, phase)
            more = {}
        for event in facts.model_and_table(own):
            self._report.tell(event)
