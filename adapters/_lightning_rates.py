"""The learning rates that a Lightning training goes at, and the interval they are told at."""

from __future__ import annotations

from collections import Counter
from typing import Any

from trainbus.toolkit.adapters import number


class Rates:
    """The rates of one training: those of each step that is logged, or of each epoch."""

    def __init__(self) -> None:
        self._newest: dict[str, float | None] = {}
        self._is_by_step = True

    def start(self, trainer: Any) -> None:
        """Look whether epochs are long enough for Lightning to log steps."""
        every = trainer.log_every_n_steps * trainer.accumulate_grad_batches
        is_reached = 0 < every <= trainer.num_training_batches
        self._is_by_step = is_reached and not trainer.fast_dev_run

    def start_batch(self, trainer: Any) -> None:
        """Keep the rates that a batch is trained with, if they are going to be told."""
        # Not those when its values are logged: schedulers move on before.
        if not self._is_by_step or trainer._logger_connector.should_update_logs:
            self._newest = rates_of(trainer.optimizers)

    @property
    def of_step(self) -> dict[str, float | None]:
        """What comes with the values of a step."""
        return self._newest if self._is_by_step else {}

    @property
    def of_epoch(self) -> dict[str, float | None]:
        """What comes with the values of an epoch."""
        return {} if self._is_by_step else self._newest


def rates_of(optimizers: Any) -> dict[str, float | None]:
    """Return the learning rates, named as `LearningRateMonitor` names them."""
    found: dict[str, float | None] = {}
    count: Counter[str] = Counter()
    for each in optimizers:
        kind, groups = type(each).__name__, each.param_groups
        name = f"lr-{kind}-{count[kind]}" if count[kind] else f"lr-{kind}"
        count[kind] += 1
        for index, group in enumerate(groups, 1):
            found[name if len(groups) == 1 else f"{name}/pg{index}"] = number(group["lr"])
    return found
