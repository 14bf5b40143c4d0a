"""Turns the trainings of a Lightning `Trainer` (`lightning`, `pytorch_lightning`) into events.

Metrics are what `self.log` gives to loggers, taken where Lightning hands them out: names, values
and intervals are Lightning's own, and the trainer's loggers are left as they are, also where there
are none. What is written to a logger directly (`self.logger.log_metrics`) is not seen.
A run is one `trainer.fit`; `validate`, `test` and `predict` tell nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

from trainbus.errors import AttachError, SinkError
from trainbus.events import Best
from trainbus.interfaces import Detach, Emit
from trainbus.toolkit.adapters import Reporter, described, guarded, late_class, number, patch, wrap

from . import _lightning_facts as facts
from ._lightning_checkpoints import Checkpoints
from ._lightning_packages import PACKAGES, callback_base, package_of
from ._lightning_rates import Rates

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
    f"{p}.{need}" for p in PACKAGES for need in _REQUIRED_NAMES.split()
)


def attach(target: Any, emit: Emit) -> Detach:
    """Have the trainings of a trainer emit events.

    Args:
        target: a Lightning `Trainer`, before `fit()`, or a `BusCallback`.
        emit: where the events go.

    Returns:
        A function that takes the hooks out again. A trainer that was made with a `BusCallback`
        reports by that one alone.

    Raises:
        AttachError: the object is neither.
    """
    if isinstance(target, _Hooks):
        return target.report.connect(emit, target.detach)
    if package_of(target) is None:
        raise AttachError(
            f"expected a Lightning Trainer, found {type(target).__qualname__}; "
            "attach the Trainer that you call `fit()` on"
        )
    callback = _bus_callback()()
    callback.hung_in = True
    callback.report.connect(emit)
    target.callbacks.append(callback)

    def detach() -> None:
        callback.detach()
        target.callbacks = [each for each in target.callbacks if each is not callback]

    return detach


def hook(module: ModuleType, attach: Callable[[object], object]) -> None:
    """Have every trainer attached, once, when its `fit` is called."""

    def fit(function: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(each, _Hooks) for each in trainer.callbacks):
            attach(trainer)
        return function(trainer, *args, **kwargs)

    patch(module.Trainer, "fit", fit)


class _Hooks:
    """Reports the trainings of the trainer that it is given to: `Trainer(callbacks=[…(bus)])`."""

    hung_in = False
    """Whether `attach` put it into the trainer, and not the user."""

    def __init__(self, bus: Any = None) -> None:
        self.report = Reporter()
        self._forget()
        if bus is not None:
            bus.attach(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the training out: spawned processes unpickle the callback and begin their own."""
        return {"report": self.report, "hung_in": self.hung_in}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._wraps = ExitStack()
        self._is_over = self._in_batch = False
        self._epoch: int | None = None
        self._first_epoch = 0
        self._rates = Rates()
        self._checkpoints = Checkpoints()

    def detach(self) -> None:
        """Say nothing more."""
        self.report.active = False
        self._wraps.close()

    @guarded
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit" or not self._reports(trainer):
            return
        self._wraps.close()
        self._forget()
        # Last, so that a checkpoint that is saved because of an exception comes before the end. A
        # new list: the old one is being walked through.
        trainer.callbacks = [*(each for each in trainer.callbacks if each is not self), self]
        self._wraps.callback(wrap(trainer, "_run_stage", partial(self._run_stage, trainer)))

    def _reports(self, trainer: Any) -> bool:
        """Return whether this callback reports: what `attach` put there yields to the user's."""
        theirs = (c for c in trainer.callbacks if isinstance(c, _Hooks) and not c.hung_in)
        is_heard = self.hung_in and any(each.report.active for each in theirs)
        return self.report.active and not is_heard

    def _run_stage(self, trainer: Any, method: Callable[..., Any], /, *args: Any) -> Any:
        """Stand around the training: by now all is set up, and Lightning handles the signals."""
        self._begin(trainer)
        if facts.is_launched(trainer):
            rank, best = partial(getattr, trainer, "global_rank"), partial(self._best, trainer)
            method = partial(self.report.watch(rank, best), method)
        return method(*args)

    @guarded
    def _begin(self, trainer: Any) -> None:
        if not trainer.is_global_zero or not self.report.active:
            return
        for target, name, tell in (
            (trainer._logger_connector, "log_metrics", self._tell_metrics),
            (trainer, "save_checkpoint", self._tell_checkpoint),
        ):
            self._wraps.callback(wrap(target, name, partial(_then, partial(tell, trainer))))
        own = (*trainer.loggers, *trainer.callbacks)
        self.report.start(facts.started(trainer), loggers=own, remedy="Trainer(logger=False)")
        self._describe(trainer.lightning_module)

    @guarded
    def _describe(self, module: Any) -> None:
        self.report.tell(described(module.parameters()))

    @guarded
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._first_epoch = trainer.current_epoch
        self._rates.start(trainer)

    @guarded
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._epoch = trainer.current_epoch
        self.report.start_epoch(trainer.current_epoch)

    @guarded
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        self._in_batch = True
        if not self.report.is_open:
            return
        if self.report.epoch is None:  # resumed in the middle of it
            self.on_train_epoch_start(trainer, pl_module)
        self._rates.start_batch(trainer)

    @guarded
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._in_batch = False

    @guarded
    def _tell_metrics(
        self, trainer: Any, metrics: Mapping[str, Any], step: int | None = None
    ) -> None:
        if trainer.sanity_checking:
            return
        values = {k: v for k, v in metrics.items() if k != "epoch"}
        done, epoch = trainer.global_step, trainer.current_epoch
        # Where no step is given, Lightning takes a metric of this name for the position.
        own = number(values.pop("step", None)) if step is None else None
        at = int(own) if own is not None and math.isfinite(own) else None
        if trainer.validating:
            # A step comes with the values of single batches of the validation.
            if at is None and (step is not None or facts.validates_within_epochs(trainer)):
                at = done
            self.report.metrics(values, "validation", epoch=epoch, step=at)
        elif self._in_batch:
            at = done if at is None else at
            self.report.metrics(self._rates.of_step | values, "train", epoch=epoch, step=at)
        elif self.report.epoch is not None:  # called once at the end of it, without values too
            self.report.metrics(self._rates.of_epoch | values, "train", epoch=epoch, step=at)
            self.report.end_epoch()

    @guarded
    def _tell_checkpoint(self, trainer: Any, filepath: Any, *args: Any, **kwargs: Any) -> None:
        self.report.tell(self._checkpoints.saved(trainer, str(filepath), self._epoch))

    @guarded
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._is_over or trainer.state.fn != "fit" or facts.is_launched(trainer):
            return
        if not self._reports(trainer):
            return
        self._is_over = True
        try:
            if not self.report.is_open:  # it failed while it was set up
                with suppress(SinkError):  # the user's own error is the one to see
                    self._begin(trainer)
            self._wraps.close()
        finally:
            self.report.fail(exception, rank=trainer.global_rank, best=self._best(trainer))

    @guarded
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        self._wraps.close()
        self._is_over = True
        if self.report.is_open:
            self._tell_last_files(trainer)
            self.report.end(self._why_ended(trainer), self._best(trainer))

    @guarded
    def _tell_last_files(self, trainer: Any) -> None:
        for saved in self._checkpoints.final(trainer):
            self.report.tell(saved)

    @guarded
    def _best(self, trainer: Any) -> Best | None:
        return self._checkpoints.best(trainer)

    @guarded
    def _why_ended(self, trainer: Any) -> str | None:
        return facts.why_ended(trainer, self._first_epoch)


def _then(
    tell: Callable[..., Any], method: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    result = method(*args, **kwargs)
    tell(*args, **kwargs)
    return result


_bus_callback = late_class(__name__, "BusCallback", _Hooks, callback_base)

if TYPE_CHECKING:
    BusCallback: Any


def __getattr__(name: str) -> Any:
    if name == "BusCallback":
        return _bus_callback()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
