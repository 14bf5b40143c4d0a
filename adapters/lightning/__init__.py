"""Emits the events of trainings of a Lightning `Trainer` (`lightning`, `pytorch_lightning`).

Metrics are what `self.log` passes to loggers, with Lightning's names, values and intervals; the
trainer's loggers are unchanged, and none is needed. Values that are written to a logger directly
(`self.logger.log_metrics`) are not recorded. A run is one `trainer.fit`; `validate`, `test` and
`predict` emit nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

from trainbus.errors import SinkError
from trainbus.events import Best
from trainbus.interfaces import Detach, Emit
from trainbus.toolkit.adapters import (
    Hooks,
    Origin,
    after,
    described,
    guarded,
    late_class,
    lazy,
    number,
    patch,
    wrap,
    wrong_target,
)

from . import trainer as facts
from .checkpoints import Checkpoints

TESTED_VERSIONS = "2.6.6"
_REQUIRED_NAMES = """
    callbacks:Callback.setup callbacks:Callback.teardown callbacks:Callback.on_exception
    callbacks:Callback.on_train_start callbacks:Callback.on_train_batch_start
    callbacks:Callback.on_train_epoch_start callbacks:Callback.on_train_epoch_end
    callbacks:ModelCheckpoint callbacks:EarlyStopping callbacks:Timer.time_remaining
    trainer.trainer:Trainer.fit trainer.trainer:Trainer._run_stage
    trainer.trainer:Trainer.save_checkpoint trainer.trainer:Trainer.checkpoint_callbacks
    trainer.trainer:Trainer.ckpt_path trainer.trainer:Trainer.sanity_checking
    trainer.connectors.logger_connector.logger_connector:_LoggerConnector.log_metrics
    trainer.connectors.logger_connector.logger_connector:_LoggerConnector.should_update_logs
    strategies.launchers.multiprocessing:_MultiProcessingLauncher
"""
REQUIRED_NAMES: tuple[str, ...] = tuple(
    f"{package}.{name}" for package in facts.PACKAGES for name in _REQUIRED_NAMES.split()
)
"""Names that the adapter uses; `trainbus doctor` checks that they exist."""


def attach(target: Any, emit: Emit) -> Detach:
    """Add a callback to a trainer, so that its trainings emit events.

    Args:
        target: a Lightning `Trainer`, before `fit()`, or a `BusCallback`.
        emit: where the events go.

    Returns:
        A function that removes the callback. If the trainer was made with a `BusCallback`, only
        that one reports.

    Raises:
        AttachError: the object is neither.
    """
    if isinstance(target, _Hooks):
        return target.report.connect(emit, target.unwrap)
    if facts.package_of(target) is None:
        advice = "attach the Trainer that you call `fit()` on"
        raise wrong_target(target, "a Lightning Trainer", advice)
    callback = _bus_callback()(origin=Origin.ATTACH)
    target.callbacks.append(callback)

    def release() -> None:
        callback.unwrap()
        target.callbacks = [each for each in target.callbacks if each is not callback]

    return callback.report.connect(emit, release)  # type: ignore[no-any-return]


def hook(module: ModuleType, attach: Callable[[object], object]) -> None:
    """Attach every trainer, once, when its `fit` is called."""

    def fit(function: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(each, _Hooks) for each in trainer.callbacks):
            attach(trainer)
        return function(trainer, *args, **kwargs)

    patch(module.Trainer, "fit", fit)


class _Hooks(Hooks):
    """Reports the trainings of its trainer: `Trainer(callbacks=[BusCallback(bus)])`."""

    def reset(self) -> None:
        self._wraps = ExitStack()
        self._is_over = self._in_batch = False
        self._epoch: int | None = None
        self._first_epoch = 0
        self._rates: dict[str, float | None] = {}
        self._has_step_rates = True
        self._checkpoints = Checkpoints()

    def unwrap(self) -> None:
        """Unwrap the trainer's methods."""
        self._wraps.close()

    @guarded
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit" or not self._reports(trainer):
            return
        self.unwrap()
        self.reset()
        # Last, so that a checkpoint saved on an exception comes before the end of the run. A new
        # list, because Lightning iterates over the old one.
        trainer.callbacks = [*(each for each in trainer.callbacks if each is not self), self]
        self._wraps.callback(wrap(trainer, "_run_stage", partial(self._run_stage, trainer)))

    def _reports(self, trainer: Any) -> bool:
        others = (each.report for each in trainer.callbacks if isinstance(each, _Hooks))
        return self.report.active and not self.report.yields_to(others)

    def _run_stage(self, trainer: Any, method: Callable[..., Any], /, *args: Any) -> Any:
        """Run the training; by now all is set up, and Lightning handles signals."""
        self._begin(trainer)
        if facts.is_launched(trainer):
            rank, best = partial(getattr, trainer, "global_rank"), partial(self._best, trainer)
            method = partial(self.report.watch(rank, best), method)
        return method(*args)

    @guarded
    def _begin(self, trainer: Any) -> None:
        if not trainer.is_global_zero or not self.report.active:
            return
        for target, name, record in (
            (trainer._logger_connector, "log_metrics", self._record_metrics),
            (trainer, "save_checkpoint", self._record_checkpoint),
        ):
            self._wraps.callback(wrap(target, name, after(partial(record, trainer))))
        own = (*trainer.loggers, *trainer.callbacks)
        self.report.start(facts.started(trainer), loggers=own, remedy="Trainer(logger=False)")
        self._describe(trainer.lightning_module)

    @guarded
    def _describe(self, module: Any) -> None:
        self.report.record(described(module.parameters()))

    @guarded
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._first_epoch = trainer.current_epoch
        self._has_step_rates = facts.logs_steps(trainer)

    @guarded
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._epoch = trainer.current_epoch
        self.report.start_epoch(trainer.current_epoch)

    @guarded
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        self._in_batch = True
        if not self.report.is_open:
            return
        if self.report.epoch is None:  # resumed within an epoch
            self.on_train_epoch_start(trainer, pl_module)
        # Schedulers change the rates before the values of the batch are logged.
        if not self._has_step_rates or trainer._logger_connector.should_update_logs:
            self._rates = facts.learning_rates(trainer.optimizers)

    @guarded
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._in_batch = False

    @guarded
    def _record_metrics(
        self, trainer: Any, _: None, metrics: Mapping[str, Any], step: int | None = None
    ) -> None:
        if trainer.sanity_checking:
            return
        values = {k: v for k, v in metrics.items() if k != "epoch"}
        done, epoch = trainer.global_step, trainer.current_epoch
        # Without a step, Lightning takes it from the metric of this name.
        own = number(values.pop("step", None)) if step is None else None
        at = int(own) if own is not None and math.isfinite(own) else None
        if trainer.validating:
            # Values of single validation batches have a step.
            if at is None and (step is not None or facts.validates_within_epochs(trainer)):
                at = done
            self.report.metrics(values, "validation", epoch=epoch, step=at)
        elif self._in_batch:
            rates = self._rates if self._has_step_rates else {}
            at = done if at is None else at
            self.report.metrics(rates | values, "train", epoch=epoch, step=at)
        elif self.report.epoch is not None:  # the one call at the end of an epoch, even if empty
            rates = {} if self._has_step_rates else self._rates
            self.report.metrics(rates | values, "train", epoch=epoch, step=at)
            self.report.end_epoch()

    @guarded
    def _record_checkpoint(
        self, trainer: Any, _: None, filepath: Any, *args: Any, **kwargs: Any
    ) -> None:
        self.report.record(self._checkpoints.saved(trainer, str(filepath), self._epoch))

    @guarded
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._is_over or trainer.state.fn != "fit" or facts.is_launched(trainer):
            return
        if not self._reports(trainer):
            return
        self._is_over = True
        try:
            if not self.report.is_open:  # it failed during its set-up
                with suppress(SinkError):  # the user needs to see their own error
                    self._begin(trainer)
            self.unwrap()
        finally:
            self.report.fail(exception, rank=trainer.global_rank, best=self._best(trainer))

    @guarded
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        self.unwrap()
        self._is_over = True
        if self.report.is_open:
            self._record_final_checkpoints(trainer)
            self.report.end(self._why_ended(trainer), self._best(trainer))

    @guarded
    def _record_final_checkpoints(self, trainer: Any) -> None:
        for saved in self._checkpoints.final(trainer):
            self.report.record(saved)

    @guarded
    def _best(self, trainer: Any) -> Best | None:
        return self._checkpoints.best(trainer)

    @guarded
    def _why_ended(self, trainer: Any) -> str | None:
        return facts.why_ended(trainer, self._first_epoch)


_bus_callback = late_class(__name__, "BusCallback", _Hooks, facts.callback_base)

if TYPE_CHECKING:
    BusCallback: Any

__getattr__ = lazy(__name__, BusCallback=_bus_callback)
