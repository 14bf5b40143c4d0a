"""Emits the events of a transformers `Trainer`, and of TRL's trainers.

Values have the names under which the Trainer logs them, and are recorded when it logs them. An
epoch ends where the next one starts, so that its evaluation and checkpoint belong to it. Checkpoint
folders are recorded by path; they are written once, and `save_total_limit` may delete them. No
callback is called on an exception: an attached trainer records it, while a `BusCallback` leaves it
to the end of the bus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from trainbus.events import Best, CheckpointSaved, ParamsUpdated
from trainbus.interfaces import Detach, Emit
from trainbus.toolkit.adapters import (
    Hooks,
    Origin,
    guarded,
    late_class,
    lazy,
    patch,
    wrap,
    wrong_target,
)

from . import trainer as facts

TESTED_VERSIONS = "5.23.0"
_ARGUMENTS = (
    *("to_dict", "output_dir", "run_name", "world_size", "process_index", "n_gpu", "max_steps"),
    *("metric_for_best_model", "greater_is_better", "auto_find_batch_size"),
    "resume_from_checkpoint",
)
_STATE = (
    *("epoch", "global_step", "max_steps", "train_batch_size", "is_world_process_zero"),
    *("log_history", "best_metric", "best_model_checkpoint", "stateful_callbacks"),
)
_EVENTS = ("train_begin", "epoch_begin", "log", "evaluate", "predict", "save", "train_end")
REQUIRED_NAMES: tuple[str, ...] = (
    *(f"transformers.trainer:Trainer.{name}" for name in ("train", "_get_output_dir")),
    "transformers.integrations.integration_utils:INTEGRATION_TO_CALLBACK",
    "transformers.trainer_callback:TrainerControl.should_training_stop",
    "transformers.trainer_pt_utils:get_model_param_count",
    *(f"transformers.trainer_callback:TrainerCallback.on_{name}" for name in _EVENTS),
    *(f"transformers.trainer_callback:TrainerState.{name}" for name in _STATE),
    *(f"transformers.training_args:TrainingArguments.{name}" for name in _ARGUMENTS),
)
"""Names that the adapter uses; `trainbus doctor` checks that they exist."""

_NAME = "trainbus"
"""The adapter's name in `TrainingArguments(report_to=…)`."""


def attach(target: Any, emit: Emit) -> Detach:
    """Add a callback to a trainer, so that its trainings emit events.

    Args:
        target: a `Trainer` of transformers or TRL, or a `BusCallback`.
        emit: where the events go.

    Returns:
        A function that removes the callback.

    Raises:
        AttachError: the object is neither.
    """
    from transformers import Trainer

    if isinstance(target, _Hooks):
        return target.report.connect(emit)
    if not isinstance(target, Trainer):
        expected = "a transformers Trainer or a BusCallback"
        raise wrong_target(target, expected, "attach what you call `train()` on")
    callback = _bus_callback()(origin=Origin.ATTACH)
    # First, like the Trainer's own integrations: a later callback may change the values, or raise.
    target.callback_handler.callbacks.insert(0, callback)
    unwrap = wrap(target, "train", partial(callback.watch, target))

    def release() -> None:
        unwrap()
        callbacks = target.callback_handler.callbacks
        callbacks[:] = [c for c in callbacks if c is not callback]

    return callback.report.connect(emit, release)  # type: ignore[no-any-return]


def register(bus: Any) -> Callable[[], None]:
    """Enable `TrainingArguments(report_to="trainbus")`: such trainers report to this bus.

    Returns:
        A function that disables it.
    """
    known = _integrations()

    class Registered:
        """What the Trainer calls without arguments."""

        def __new__(cls) -> Any:
            return _bus_callback()(bus)

    previous = known.get(_NAME)
    known[_NAME] = Registered

    def unregister() -> None:
        if known.get(_NAME) is Registered:
            del known[_NAME]
            known.update({} if previous is None else {_NAME: previous})

    return unregister


def hook(module: Any, attach: Callable[[object], object]) -> None:
    """Attach every new trainer; `report_to="trainbus"` is accepted, and adds nothing.

    Args:
        module: `transformers.trainer`.
        attach: called with the trainer.
    """
    from transformers import TrainerCallback

    _integrations().setdefault(_NAME, TrainerCallback)

    def make(init: Callable[..., None], trainer: Any, *args: Any, **kwargs: Any) -> None:
        init(trainer, *args, **kwargs)
        before = list(_active_hooks(trainer))
        attach(trainer)
        for callback in _active_hooks(trainer):
            if callback not in before:
                callback.report.origin = Origin.HOOK

    patch(module.Trainer, "__init__", make)


def _integrations() -> dict[str, Any]:
    from transformers.integrations import integration_utils

    found: dict[str, Any] = integration_utils.INTEGRATION_TO_CALLBACK
    return found


class _Hooks(Hooks):
    """Reports the trainings of its trainer: `Trainer(…, callbacks=[BusCallback(bus)])`."""

    _trainer: Any = None
    _resumes_from: Any = None
    _is_silent = False

    def reset(self) -> None:
        self._logged: set[str] = set()
        self._evaluation: tuple[int, bool] | None = None
        """The step that was evaluated last, and whether the training was stopping by then."""
        self._batch: int | None = None
        self._next_epoch = 0
        self._last: CheckpointSaved | None = None
        self._end: tuple[str | None, Best | None] = (None, None)

    def watch(self, trainer: Any, train: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a trainer's `train`, and end the run with it."""
        reporting = max([self, *_active_hooks(trainer)], key=lambda hooks: hooks.report.origin)
        self._is_silent = reporting is not self
        reporting._trainer = trainer
        reporting._resumes_from = kwargs.get("resume_from_checkpoint", args[0] if args else None)
        call = reporting.report.watch(
            rank=lambda: int(trainer.args.process_index),
            best=lambda: facts.best(trainer.args, trainer.state),
        )
        try:
            result = call(train, *args, **kwargs)
        finally:
            reporting._trainer = reporting._resumes_from = None
        reporting._finish()
        return result

    @guarded
    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if self._is_silent or not state.is_world_process_zero:
            return
        batch = state.train_batch_size
        if self.report.is_open and args.auto_find_batch_size and batch != self._batch:
            # Memory ran out, and the training starts again with smaller batches.
            self.report.end_epoch("retried")
            size = {"per_device_train_batch_size": batch // max(args.n_gpu, 1)}
            self.report.record(ParamsUpdated(params=size))
        else:
            self.reset()
            checkpoint = self._resumes_from or args.resume_from_checkpoint
            self.report.start(
                facts.started(args, state, model, self._folder(args), checkpoint),
                loggers=self._own_loggers(args),
                remedy='TrainingArguments(report_to="none")',
            )
            self.report.record(facts.described(model))
        self._batch = batch
        self._next_epoch = facts.next_epoch(state)

    @guarded
    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report.end_epoch()
        self.report.start_epoch(self._next_epoch)
        self._next_epoch += 1

    @guarded
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = logs or {}
        if {"train_runtime", "train_loss"} <= logs.keys():  # the summary of the training
            self.report.end_epoch()
            self._record(logs, None)
            return
        self._record(logs, state.global_step)
        evaluated = {name for name in logs if facts.phase(name) != "train"}
        if evaluated:
            self._logged = evaluated
            self._evaluation = (state.global_step, control.should_training_stop)

    @guarded
    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        # All values were logged just before, unless the user's Trainer logs in another way.
        logged, self._logged = self._logged, set()
        values = {n: v for n, v in (metrics or {}).items() if n not in logged}
        self._record(values, state.global_step)

    on_predict = on_evaluate

    @guarded
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = self._folder(args) / f"checkpoint-{state.global_step}"
        if folder.exists():
            *found, self._last = facts.checkpoints(state, folder, self.report.epoch)
            for each in found:
                self.report.record(each)

    @guarded
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._last is not None and Path(self._last.path).exists():
            self.report.record(self._last)
        by_evaluation = self._evaluation == (state.global_step, False)
        reason = facts.why_ended(args, state, control, by_evaluation=by_evaluation)
        self._end = (reason, facts.best(args, state))
        if self._trainer is None:
            self._finish()

    @guarded
    def _finish(self) -> None:
        self.report.end(*self._end)

    def _record(self, logs: Mapping[str, Any], step: int | None) -> None:
        for phase in ("train", "validation", "test"):
            values = {k: v for k, v in logs.items() if facts.phase(k) == phase and k != "epoch"}
            self.report.metrics(values, phase, epoch=self.report.epoch, step=step)

    def _own_loggers(self, args: Any) -> list[Any]:
        if self._trainer is not None:
            return list(self._trainer.callback_handler.callbacks)
        # A callback has no access to the others; Trainer makes those of these names.
        known = _integrations()
        return [known[name] for name in args.report_to or () if name in known]

    def _folder(self, args: Any) -> Path:
        if self._trainer is None:
            return Path(args.output_dir).absolute()
        # Only this method knows the folder of a trial of a hyperparameter search.
        trial = getattr(self._trainer, "_trial", None)
        return Path(self._trainer._get_output_dir(trial)).absolute()


def _active_hooks(trainer: Any) -> Iterator[Any]:
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, _Hooks) and callback.report.active:
            yield callback


_bus_callback = late_class(__name__, "BusCallback", _Hooks, "transformers:TrainerCallback")
__getattr__ = lazy(__name__, BusCallback=_bus_callback)
