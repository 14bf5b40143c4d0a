"""Turns the callbacks of a transformers `Trainer`, and of TRL's trainers, into events.

Values keep the names that the Trainer logs them by, and come when it logs them. An epoch ends where
the next one begins, so that its evaluation and checkpoint lie in it. Checkpoint folders are named
by path, are written once, and may be deleted later by `save_total_limit`. Callbacks hear of no
exception: only a trainer that is attached itself tells what ended it, a `BusCallback` leaves that
to the end of the bus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from trainbus.errors import AttachError
from trainbus.events import Best, CheckpointSaved, ParamsUpdated
from trainbus.interfaces import Detach, Emit
from trainbus.toolkit.adapters import Reporter, guarded, late_class, patch, wrap

from . import _transformers_facts as facts
from . import _transformers_report_to as report_to
from ._transformers_log import Log

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
"""What the adapter relies on; `trainbus doctor` looks whether it is there."""

_BY_HOOK, _BY_ATTACH, _BY_USER = range(3)


def attach(target: Any, emit: Emit) -> Detach:
    """Hang a callback into a trainer, so that its trainings emit events.

    Args:
        target: a `Trainer` of transformers or TRL, or a `BusCallback`.
        emit: where the events go.

    Returns:
        A function that takes the callback out again.

    Raises:
        AttachError: the object is neither.
    """
    from transformers import Trainer

    if isinstance(target, _Hooks):
        return target.report.connect(emit)
    if not isinstance(target, Trainer):
        raise AttachError(
            f"expected a transformers Trainer or a BusCallback, found {type(target).__qualname__}; "
            "attach what you call `train()` on"
        )
    callback = _make_callback()()
    callback.report, callback.weight = Reporter(emit), _BY_ATTACH
    # First, as the Trainer's own integrations: a later callback may change the values, or raise.
    target.callback_handler.callbacks.insert(0, callback)
    unwrap = wrap(target, "train", partial(callback.watch, target))

    def detach() -> None:
        callback.report.active = False
        unwrap()
        callbacks = target.callback_handler.callbacks
        callbacks[:] = [c for c in callbacks if c is not callback]

    return detach


def register(bus: Any) -> Callable[[], None]:
    """Make `TrainingArguments(report_to="trainbus")` known: its trainers report to this bus.

    Returns:
        A function that makes it unknown again.
    """
    return report_to.make_known(lambda: _make_callback()(bus))


def hook(module: Any, attach: Callable[[object], object]) -> None:
    """Have every trainer that is made attached; `report_to="trainbus"` is known, and adds nothing.

    Args:
        module: `transformers.trainer`.
        attach: called with the trainer.
    """
    report_to.accept()

    def make(init: Callable[..., None], trainer: Any, *args: Any, **kwargs: Any) -> None:
        init(trainer, *args, **kwargs)
        before = list(_ours(trainer))
        attach(trainer)
        for callback in _ours(trainer):
            if callback not in before:
                callback.weight = _BY_HOOK

    patch(module.Trainer, "__init__", make)


class _Hooks:
    """Emits what a Trainer tells its callbacks: `Trainer(…, callbacks=[BusCallback(bus)])`."""

    def __init__(self, bus: Any = None) -> None:
        self.report = Reporter()
        self.weight = _BY_USER
        """Of the callbacks in one trainer, those of less weight than another are silent."""
        self._trainer: Any = None
        self._resumes_from: Any = None
        self._is_silent = False
        self._reset()
        if bus is not None:
            bus.attach(self)

    def _reset(self) -> None:
        self._log = Log(self.report)
        self._batch: int | None = None
        self._next_epoch = 0
        self._last: CheckpointSaved | None = None
        self._end: tuple[str | None, Best | None] = (None, None)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the training out."""
        return {"report": self.report, "weight": self.weight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)

    def watch(self, trainer: Any, train: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a trainer's `train`, and end the run as it ends."""
        speaker = max([self, *_ours(trainer)], key=lambda callback: callback.weight)
        self._is_silent = speaker is not self
        speaker._trainer = trainer
        speaker._resumes_from = kwargs.get("resume_from_checkpoint", args[0] if args else None)
        call = speaker.report.watch(
            rank=lambda: int(trainer.args.process_index),
            best=lambda: facts.best(trainer.args, trainer.state),
        )
        try:
            result = call(train, *args, **kwargs)
        finally:
            speaker._trainer = speaker._resumes_from = None
        speaker._finish()
        return result

    @guarded
    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if self._is_silent or not state.is_world_process_zero:
            return
        batch = state.train_batch_size
        if self.report.is_open and args.auto_find_batch_size and batch != self._batch:
            # Memory ran out, and the training begins anew with smaller batches.
            self.report.end_epoch("retried")
            size = {"per_device_train_batch_size": batch // max(args.n_gpu, 1)}
            self.report.tell(ParamsUpdated(params=size))
        else:
            self._reset()
            checkpoint = self._resumes_from or args.resume_from_checkpoint
            self.report.start(
                facts.started(args, state, model, self._folder(args), checkpoint),
                loggers=self._own_loggers(args),
                remedy='TrainingArguments(report_to="none")',
            )
            self.report.tell(facts.described(model))
        self._batch = batch
        self._next_epoch = facts.next_epoch(state)

    @guarded
    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report.end_epoch()
        self.report.start_epoch(self._next_epoch)
        self._next_epoch += 1

    @guarded
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._log.log(logs or {}, state, control)

    @guarded
    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        self._log.evaluate(metrics or {}, state)

    on_predict = on_evaluate

    @guarded
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = self._folder(args) / f"checkpoint-{state.global_step}"
        if folder.exists():
            *found, self._last = facts.checkpoints(state, folder, self.report.epoch)
            for each in found:
                self.report.tell(each)

    @guarded
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._last is not None and Path(self._last.path).exists():
            self.report.tell(self._last)
        by_evaluation = self._log.has_evaluated_last(state)
        reason = facts.why_ended(args, state, control, by_evaluation=by_evaluation)
        self._end = (reason, facts.best(args, state))
        if self._trainer is None:
            self._finish()

    @guarded
    def _finish(self) -> None:
        self.report.end(*self._end)

    def _own_loggers(self, args: Any) -> list[Any]:
        if self._trainer is not None:
            return list(self._trainer.callback_handler.callbacks)
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK as KNOWN

        # A callback alone is not told of the others: those that Trainer makes have these names.
        return [KNOWN[name] for name in args.report_to or () if name in KNOWN]

    def _folder(self, args: Any) -> Path:
        if self._trainer is None:
            return Path(args.output_dir).absolute()
        # Each trial of a hyperparameter search has a folder of its own, which only this tells.
        trial = getattr(self._trainer, "_trial", None)
        return Path(self._trainer._get_output_dir(trial)).absolute()


def _ours(trainer: Any) -> Iterator[Any]:
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, _Hooks) and callback.report.active:
            yield callback


def _base() -> Any:
    from transformers import TrainerCallback

    return TrainerCallback


_make_callback = late_class(__name__, "BusCallback", _Hooks, _base)


def __getattr__(name: str) -> Any:
    if name == "BusCallback":
        return _make_callback()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
