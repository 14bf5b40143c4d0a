"""What a transformers Trainer logs in one training: each value once, by the phase it is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainbus.toolkit.adapters import Reporter

_PHASES = {"eval_": "validation", "test_": "test"}


class Log:
    """Tells what is logged, and what is evaluated beside the log.

    Args:
        report: the run, which knows its epoch.
    """

    def __init__(self, report: Reporter) -> None:
        self._report = report
        self._logged: set[str] = set()
        self._evaluation: tuple[int, bool] | None = None

    def log(self, logs: Mapping[str, Any], state: Any, control: Any) -> None:
        """Tell what `on_log` brings; the summary of the training ends its last epoch."""
        if {"train_runtime", "train_loss"} <= logs.keys():
            self._report.end_epoch()
            self._tell(logs, None)
            return
        self._tell(logs, state.global_step)
        evaluated = {name for name in logs if phase_of(name) != "train"}
        if evaluated:
            self._logged = evaluated
            self._evaluation = (state.global_step, control.should_training_stop)

    def evaluate(self, metrics: Mapping[str, Any], state: Any) -> None:
        """Tell what `on_evaluate` or `on_predict` brings and was not logged.

        All of it was logged a moment ago, unless the user's Trainer logs in another way.
        """
        logged, self._logged = self._logged, set()
        self._tell({n: v for n, v in metrics.items() if n not in logged}, state.global_step)

    def has_evaluated_last(self, state: Any) -> bool:
        """Return whether the last step was evaluated, and nothing had stopped the training then."""
        return self._evaluation == (state.global_step, False)

    def _tell(self, logs: Mapping[str, Any], step: int | None) -> None:
        for phase in ("train", *_PHASES.values()):
            values = {
                name: value
                for name, value in logs.items()
                if phase_of(name) == phase and name != "epoch"
            }
            self._report.metrics(values, phase, epoch=self._report.epoch, step=step)


def phase_of(name: str) -> str:
    """Return the phase that a value is of, by what its name begins with."""
    return next((phase for start, phase in _PHASES.items() if name.startswith(start)), "train")
