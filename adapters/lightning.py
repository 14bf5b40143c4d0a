"""Turns the trainings of a Lightning `Trainer` (`lightning`, `pytorch_lightning`) into events.

Metrics are what `self.log` gives to loggers, taken where Lightning hands them out: names, values
and intervals are Lightning's own, and the trainer's loggers are left as they are, also where there
are none. What is written to a logger directly (`self.logger.log_metrics`) is not seen.
A run is one `trainer.fit`; `validate`, `test` and `predict` tell nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial, wraps
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from msgspec import structs

from trainbus.errors import AttachError, SinkError
from trainbus.events import Best, CheckpointSaved, ModelDescribed, Resumed, RunStarted
from trainbus.hooking import Reporter, guarded, late_class, number, version, wrap
from trainbus.interfaces import Detach, Emit

logger = logging.getLogger("trainbus.adapters.lightning")

TESTED = "2.6.6"
_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_NEEDS = """
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
NEEDS: tuple[str, ...] = tuple(f"{p}.{need}" for p in _PACKAGES for need in _NEEDS.split())

_ARGUMENTS = """
    max_epochs min_epochs max_steps min_steps accumulate_grad_batches precision gradient_clip_val
    gradient_clip_algorithm num_devices num_nodes fast_dev_run log_every_n_steps overfit_batches
    check_val_every_n_epoch val_check_interval limit_train_batches limit_val_batches
    reload_dataloaders_every_n_epochs
"""


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
        target.report.emit = emit
        return target.detach
    if _package(target) is None:
        raise AttachError(
            f"expected a Lightning Trainer, found {type(target).__qualname__}; "
            "attach the Trainer that you call `fit()` on"
        )
    if any(isinstance(each, _Hooks) and not each.hung_in for each in target.callbacks):
        return lambda: None
    callback = _bus_callback()()
    callback.report.emit, callback.hung_in = emit, True
    target.callbacks.append(callback)

    def detach() -> None:
        callback.detach()
        target.callbacks = [each for each in target.callbacks if each is not callback]

    return detach


def hook(module: ModuleType, attach: Callable[[object], object]) -> None:
    """Have every trainer attached, once, when its `fit` is called."""
    fit = getattr(getattr(module, "Trainer", None), "fit", None)
    if fit is None or hasattr(fit, "is_hooked"):
        return

    @wraps(fit)
    def attached(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            if not any(isinstance(each, _Hooks) for each in self.callbacks):
                attach(self)
        except Exception as error:
            logger.warning("this training is not logged: %s", error)
        return fit(self, *args, **kwargs)

    vars(attached)["is_hooked"] = True
    module.Trainer.fit = attached


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
        self._wraps: list[Detach] = []
        self._is_over = self._in_batch = False
        self._epoch: int | None = None
        self._first_epoch = 0
        self._rates: dict[str, float | None] = {}
        self._has_rates_by_step = True
        self._saved: dict[str, CheckpointSaved] = {}

    def detach(self) -> None:
        """Say nothing more."""
        self.report.active = False
        self._release()

    def _release(self) -> None:
        while self._wraps:
            self._wraps.pop()()

    @guarded
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit" or not self.report.active:
            return
        self._release()
        self._forget()
        # Last, so that a checkpoint that is saved because of an exception comes before the end. A
        # new list: the old one is being walked through.
        trainer.callbacks = [*(each for each in trainer.callbacks if each is not self), self]
        self._wraps.append(wrap(trainer, "_run_stage", partial(self._run_stage, trainer)))

    def _run_stage(self, trainer: Any, method: Callable[..., Any], *args: Any) -> Any:
        """Stand around the training: by now all is set up, and Lightning handles the signals."""
        self._begin(trainer)
        try:
            return method(*args)
        except BaseException as error:
            if _is_launched(trainer):
                self._fail(trainer, error)
            raise

    @guarded
    def _begin(self, trainer: Any) -> None:
        if not trainer.is_global_zero or not self.report.active:
            return
        for target, name, tell in (
            (trainer._logger_connector, "log_metrics", self._tell_metrics),
            (trainer, "save_checkpoint", self._tell_checkpoint),
        ):
            self._wraps.append(wrap(target, name, partial(_then, partial(tell, trainer))))
        self.report.start(_started(trainer))
        self._describe(trainer.lightning_module)

    @guarded
    def _describe(self, module: Any) -> None:
        sizes = [(each.numel(), each.requires_grad) for each in module.parameters()]
        trained = sum(size for size, is_trained in sizes if is_trained)
        total = sum(size for size, _ in sizes)
        self.report.tell(ModelDescribed(parameters=total, gradients=trained))

    @guarded
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._first_epoch = trainer.current_epoch
        every = trainer.log_every_n_steps * trainer.accumulate_grad_batches
        is_reached = 0 < every <= trainer.num_training_batches
        self._has_rates_by_step = is_reached and not trainer.fast_dev_run

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
        # Those that this batch is trained with: schedulers move on before its values are logged.
        if not self._has_rates_by_step or trainer._logger_connector.should_update_logs:
            self._rates = _rates(trainer.optimizers)

    @guarded
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._in_batch = False

    @guarded
    def _tell_metrics(
        self, trainer: Any, metrics: Mapping[str, Any], step: int | None = None
    ) -> None:
        if trainer.sanity_checking:
            return
        values = {k: v for k, v in metrics.items() if k not in ("epoch", "step")}
        done, epoch = trainer.global_step, trainer.current_epoch
        if trainer.validating:
            # A step comes with the values of single batches of the validation.
            at_step = step is not None or _validates_within_epochs(trainer)
            self.report.metrics(values, "validation", epoch=epoch, step=done if at_step else None)
        elif self._in_batch:
            rates = self._rates if self._has_rates_by_step else {}
            self.report.metrics({**rates, **values}, "train", epoch=epoch, step=done)
        elif self.report.epoch is not None:  # called once at the end of it, without values too
            rates = {} if self._has_rates_by_step else self._rates
            self.report.metrics({**rates, **values}, "train", epoch=epoch)
            self.report.end_epoch()

    @guarded
    def _tell_checkpoint(self, trainer: Any, filepath: Any, *args: Any, **kwargs: Any) -> None:
        path = str(filepath) if "://" in str(filepath) else os.path.abspath(filepath)
        kind, score, is_kept = "periodic", {}, False
        for each in trainer.checkpoint_callbacks:
            found = _kind(each, str(filepath))
            if found is not None:
                kind, value = found, number(trainer.callback_metrics.get(each.monitor))
                score = {} if value is None else {each.monitor: value}
                # With all of them kept, a name that is taken gets a number.
                is_numbered = getattr(each, "_enable_version_counter", False)
                is_kept = is_numbered and getattr(each, "save_top_k", None) == -1
        self._saved[path] = CheckpointSaved(
            path=path,
            kind=kind,  # type: ignore[arg-type]
            epoch=self._epoch,
            step=trainer.global_step,
            metrics=score,
            final=kind == "periodic" and is_kept,
        )
        self.report.tell(self._saved[path])

    @guarded
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if trainer.state.fn == "fit" and not _is_launched(trainer):
            self._fail(trainer, exception)

    @guarded
    def _fail(self, trainer: Any, error: BaseException) -> None:
        if self._is_over:
            return
        try:
            self._tell_failure(trainer, error)
        except SinkError:
            raise
        except Exception:
            # Lightning's handler of SIGTERM talks to the other ranks, and raises wherever the
            # signal finds this one if they are gone.
            self._tell_failure(trainer, error)

    def _tell_failure(self, trainer: Any, error: BaseException) -> None:
        self._is_over = True
        if not self.report.is_open:  # it failed while it was set up
            with contextlib.suppress(SinkError):  # the user's own error is the one to see
                self._begin(trainer)
        self._release()
        self.report.fail(error, rank=trainer.global_rank, best=self._best(trainer))

    @guarded
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        self._release()
        self._is_over = True
        if self.report.is_open:
            self._tell_last_files(trainer)
            self.report.end(self._why_ended(trainer), self._best(trainer))

    @guarded
    def _tell_last_files(self, trainer: Any) -> None:
        """Say which files nobody writes again, or removes to make room."""
        for each in trainer.checkpoint_callbacks:
            files: list[tuple[str, Literal["last", "best"]]]
            files = [(getattr(each, "last_model_path", ""), "last")]
            if getattr(each, "monitor", None):
                files.append((each.best_model_path, "best"))
            elif getattr(each, "save_top_k", None) == 1:
                files.append((each.best_model_path, "last"))
            for path, kind in files:
                if path and Path(path).exists():
                    path = os.path.abspath(path)
                    saved = self._saved.get(path) or CheckpointSaved(path=path, kind=kind)
                    self.report.tell(structs.replace(saved, kind=kind, final=True))

    @guarded
    def _best(self, trainer: Any) -> Best | None:
        for each in trainer.checkpoint_callbacks:
            score = number(getattr(each, "best_model_score", None))
            if getattr(each, "monitor", None) and score is not None:
                saved = self._saved.get(os.path.abspath(each.best_model_path))
                return Best(metric=each.monitor, value=score, epoch=saved.epoch if saved else None)
        return None

    @guarded
    def _why_ended(self, trainer: Any) -> str | None:
        if 0 <= trainer.max_steps <= trainer.global_step:
            return f"max_steps of {trainer.max_steps} reached"
        if not trainer.should_stop:
            return None
        for each in trainer.callbacks:
            left = each.time_remaining() if hasattr(each, "time_remaining") else None
            if left is not None and left <= 0:
                return f"time limit of {each.time_elapsed() + left:g} s"
        if 0 <= trainer.max_epochs <= trainer.current_epoch:
            return None
        for each in trainer.callbacks:
            said = getattr(each, "stopping_reason_message", None)
            # What it said in an earlier training is kept in checkpoints too.
            if said and each.stopped_epoch >= self._first_epoch:
                return f"early stop: {said.removesuffix(' Signaling Trainer to stop.')}"
            if said is None and getattr(each, "wait_count", -1) >= getattr(each, "patience", 0):
                return f"early stop: {each.monitor} did not improve in {each.patience} checks"
        return "stopped by a callback"


def _then(tell: Callable[..., Any], method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    result = method(*args, **kwargs)
    tell(*args, **kwargs)
    return result


def _package(trainer: Any) -> str | None:
    for cls in type(trainer).__mro__:
        if cls.__name__ == "Trainer" and cls.__module__.startswith(_PACKAGES):
            return str(cls.__module__.partition(".")[0])
    return None


def _started(trainer: Any) -> RunStarted:
    package = _package(trainer) or "lightning"
    folders = [str(getattr(c, "dirpath", None) or "") for c in trainer.checkpoint_callbacks]
    ranked = [c for c in trainer.callbacks if getattr(c, "monitor", None) and hasattr(c, "mode")]
    resumed = None
    if trainer.ckpt_path is not None and trainer.global_step:
        done = trainer.fit_loop.epoch_progress.current.processed
        resumed = Resumed(
            epoch=done - 1 if done else None,
            step=trainer.global_step,
            save_dir=str(Path(trainer.ckpt_path).absolute().parent),
        )
    return RunStarted(
        params=_params(trainer),
        framework=package,
        framework_version=version(package),
        save_dir=next((each for each in folders if each and "://" not in each), None),
        world_size=trainer.world_size,
        resumed=resumed,
        goals={each.monitor: each.mode for each in ranked},
    )


def _params(trainer: Any) -> dict[str, Any]:
    module, optimizers = trainer.lightning_module, trainer.optimizers
    parts = {name: getattr(trainer, name, None) for name in ("strategy", "accelerator")}
    found: dict[str, Any] = {
        "module": type(module).__name__,
        "trainer": {name: getattr(trainer, name, None) for name in _ARGUMENTS.split()}
        | {name: type(part).__name__ for name, part in parts.items()},
        "optimizers": [{"type": type(o).__name__} | getattr(o, "defaults", {}) for o in optimizers],
    }
    for source in (trainer.datamodule, module):
        # What was saved with `save_hyperparameters(logger=False)` is not for loggers.
        if getattr(source, "_log_hyperparams", False):
            found |= {k: v for k, v in source.hparams_initial.items() if k != "_class_path"}
    return found


def _kind(checkpoint: Any, path: str) -> Literal["best", "last", "periodic"] | None:
    """Return what a file is to a `ModelCheckpoint`, None if it is not one of its own.

    Without a metric to rank by, what it calls the best is the last.
    """
    if path == getattr(checkpoint, "last_model_path", None):
        return "last"
    is_best = path == getattr(checkpoint, "best_model_path", None)
    if not is_best and path not in getattr(checkpoint, "best_k_models", ()):
        return None
    if not is_best or getattr(checkpoint, "save_top_k", None) == -1:
        return "periodic"
    return "best" if getattr(checkpoint, "monitor", None) else "last"


def _rates(optimizers: Any) -> dict[str, float | None]:
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


def _validates_within_epochs(trainer: Any) -> bool:
    every = trainer.val_check_batch
    if trainer.check_val_every_n_epoch is None or every is None:
        return True
    return bool(every < trainer.num_training_batches)


def _is_launched(trainer: Any) -> bool:
    """Return whether the training runs in children of the process that `fit` was called in.

    Then `on_exception` comes in the parent alone, which has no run and no more than a dead child.
    """
    return hasattr(trainer.strategy.launcher, "_start_method")


def _callback_base() -> type:
    """Return the `Callback` of the package that is in use, or one that is both if both are."""
    used = [name for name in _PACKAGES if name in sys.modules]
    used = used or [name for name in _PACKAGES if find_spec(name.partition(".")[0])][:1]
    return type("Callback", tuple(importlib.import_module(name).Callback for name in used), {})


_bus_callback = late_class(__name__, "BusCallback", _Hooks, _callback_base)

if TYPE_CHECKING:
    BusCallback: Any


def __getattr__(name: str) -> Any:
    if name == "BusCallback":
        return _bus_callback()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
