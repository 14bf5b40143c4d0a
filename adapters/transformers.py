"""Turns the callbacks of a transformers `Trainer`, and of TRL's trainers, into events.

Values keep the names that the Trainer logs them by, and come when it logs them. An epoch ends where
the next one begins, so that its evaluation and checkpoint lie in it. Checkpoint folders are named
by path, are written once, and may be deleted later by `save_total_limit`. Callbacks hear of no
exception: only a trainer that is attached itself tells what ended it, a `BusCallback` leaves that
to the end of the bus.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any

from trainbus.errors import AttachError, SinkError
from trainbus.events import (
    Best,
    CheckpointSaved,
    ModelDescribed,
    ParamsUpdated,
    Resumed,
    RunStarted,
)
from trainbus.hooking import Reporter, guarded, late_class, version, wrap
from trainbus.interfaces import Detach, Emit

TESTED = "5.23.0"
_ARGUMENTS = (
    *("to_dict", "output_dir", "run_name", "world_size", "process_index", "n_gpu", "max_steps"),
    *("metric_for_best_model", "greater_is_better", "auto_find_batch_size"),
    "resume_from_checkpoint",
)
_STATE = (
    *("epoch", "global_step", "max_steps", "train_batch_size", "is_world_process_zero"),
    *("log_history", "best_metric", "best_model_checkpoint", "stateful_callbacks"),
)
_EVENTS = (
    *("on_train_begin", "on_epoch_begin", "on_log", "on_evaluate", "on_predict", "on_save"),
    "on_train_end",
)
NEEDS: tuple[str, ...] = (
    "transformers.trainer:Trainer.train",
    "transformers.trainer:Trainer._get_output_dir",
    "transformers.integrations.integration_utils:INTEGRATION_TO_CALLBACK",
    "transformers.trainer_callback:TrainerControl.should_training_stop",
    "transformers.trainer_pt_utils:get_model_param_count",
    *(f"transformers.trainer_callback:TrainerCallback.{name}" for name in _EVENTS),
    *(f"transformers.trainer_callback:TrainerState.{name}" for name in _STATE),
    *(f"transformers.training_args:TrainingArguments.{name}" for name in _ARGUMENTS),
)
"""What the adapter relies on; `trainbus doctor` looks whether it is there."""

_ROUNDING = 1e-6
_PHASES = {"eval_": "validation", "test_": "test"}
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
        report = target.report = Reporter(emit)
        return partial(setattr, report, "active", False)
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
    from transformers.integrations import integration_utils

    known = integration_utils.INTEGRATION_TO_CALLBACK

    class Registered:
        """What the Trainer makes without arguments."""

        def __new__(cls) -> Any:
            return _make_callback()(bus)

    before = known.get("trainbus")
    known["trainbus"] = Registered

    def unregister() -> None:
        if known.get("trainbus") is Registered:
            del known["trainbus"]
            known.update({} if before is None else {"trainbus": before})

    return unregister


def hook(module: Any, attach: Callable[[object], object]) -> None:
    """Have every trainer that is made attached; `report_to="trainbus"` is known, and adds nothing.

    Args:
        module: `transformers.trainer`.
        attach: called with the trainer.
    """
    from transformers import TrainerCallback
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    made = module.Trainer.__init__
    if getattr(made, "attaches", False):
        return
    INTEGRATION_TO_CALLBACK.setdefault("trainbus", TrainerCallback)

    @wraps(made)
    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        before = list(_ours(self))
        attach(self)
        for callback in _ours(self):
            if callback not in before:
                callback.weight = _BY_HOOK

    make.attaches = True  # type: ignore[attr-defined]
    module.Trainer.__init__ = make


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
        self._batch: int | None = None
        self._next_epoch = 0
        self._logged: set[str] = set()
        self._evaluation: tuple[int, bool] | None = None
        self._last: CheckpointSaved | None = None
        self._why: str | None = None
        self._best: Best | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the training out."""
        return {"report": self.report, "weight": self.weight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)

    def watch(self, trainer: Any, train: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a trainer's `train`, and end the run as it ends."""
        speaker = max(_ours(trainer), key=lambda callback: callback.weight, default=self)
        speaker = self if speaker.weight <= self.weight else speaker
        self._is_silent = speaker is not self
        speaker._trainer = trainer
        speaker._resumes_from = kwargs.get("resume_from_checkpoint", args[0] if args else None)
        try:
            result = train(*args, **kwargs)
        except SinkError:
            raise
        except BaseException as error:
            speaker._fail(error, trainer)
            raise
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
            self._start(args, state, model)
        self._batch = batch
        self._next_epoch = int((state.epoch or 0) + _ROUNDING)

    @guarded
    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report.end_epoch()
        self.report.start_epoch(self._next_epoch)
        self._next_epoch += 1

    @guarded
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = logs or {}
        if {"train_runtime", "train_loss"} <= logs.keys():
            self.report.end_epoch()
            self._log(logs, None)
            return
        self._log(logs, state.global_step)
        evaluated = {name for name in logs if _phase(name) != "train"}
        if evaluated:
            self._logged = evaluated
            self._evaluation = (state.global_step, control.should_training_stop)

    @guarded
    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        # All of it was logged a moment ago, unless the user's Trainer logs in another way.
        logged, self._logged = self._logged, set()
        rest = {name: value for name, value in (metrics or {}).items() if name not in logged}
        self._log(rest, state.global_step)

    on_predict = on_evaluate

    @guarded
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = self._folder(args) / f"checkpoint-{state.global_step}"
        if not folder.exists():
            return
        saved = partial(
            CheckpointSaved,
            path=str(folder),
            epoch=self.report.epoch,
            step=int(state.global_step),
            metrics=_scores(state),
            final=True,
        )
        self.report.tell(saved(kind="periodic"))
        best = state.best_model_checkpoint
        if best is not None and Path(best).absolute() == folder:
            self.report.tell(saved(kind="best"))
        self._last = saved(kind="last")

    @guarded
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._last is not None and Path(self._last.path).exists():
            self.report.tell(self._last)
        self._why, self._best = self._why_ended(args, state, control), _best(args, state)
        if self._trainer is None:
            self._finish()

    @guarded
    def _finish(self) -> None:
        self.report.end(self._why, self._best)

    @guarded
    def _fail(self, error: BaseException, trainer: Any) -> None:
        best = _best(trainer.args, trainer.state)
        self.report.fail(error, rank=int(trainer.args.process_index), best=best)

    def _start(self, args: Any, state: Any, model: Any) -> None:
        from transformers.trainer_pt_utils import get_model_param_count

        config: Any = getattr(model, "config", None)
        config = config.to_dict() if hasattr(config, "to_dict") else config
        metric = _ranked_by(args)
        self.report.start(
            RunStarted(
                name=args.run_name,
                params={**args.to_dict(), **({"model": config} if config else {})},
                framework="transformers",
                framework_version=version("transformers"),
                save_dir=str(self._folder(args)),
                world_size=int(args.world_size),
                resumed=self._resumed(args, state) if state.global_step else None,
                goals={metric: "max" if args.greater_is_better else "min"} if metric else {},
            )
        )
        self.report.tell(
            ModelDescribed(
                parameters=get_model_param_count(model),
                gradients=get_model_param_count(model, trainable_only=True),
                layers=sum(1 for _ in model.modules()),
            )
        )

    def _resumed(self, args: Any, state: Any) -> Resumed:
        begun = int((state.epoch or 0) + _ROUNDING)
        checkpoint = self._resumes_from or args.resume_from_checkpoint
        folder = None
        if isinstance(checkpoint, str | os.PathLike):
            folder = Path(checkpoint).absolute().parent
        return Resumed(
            epoch=begun - 1 if begun else None,
            step=int(state.global_step),
            save_dir=None if folder in (None, self._folder(args)) else str(folder),
        )

    def _folder(self, args: Any) -> Path:
        if self._trainer is None:
            return Path(args.output_dir).absolute()
        # Each trial of a hyperparameter search has a folder of its own, which only this tells.
        trial = getattr(self._trainer, "_trial", None)
        return Path(self._trainer._get_output_dir(trial)).absolute()

    def _log(self, logs: Mapping[str, Any], step: int | None) -> None:
        for phase in ("train", *_PHASES.values()):
            values = {
                name: value
                for name, value in logs.items()
                if _phase(name) == phase and name not in ("epoch", "step")
            }
            self.report.metrics(values, phase, epoch=self.report.epoch, step=step)

    def _why_ended(self, args: Any, state: Any, control: Any) -> str | None:
        if state.global_step >= state.max_steps:
            return f"max_steps of {args.max_steps} done" if args.max_steps > 0 else None
        at = f"at step {state.global_step} of {state.max_steps}"
        if not control.should_training_stop:
            return f"ended {at}"
        # Its step is this one, and before its callbacks nothing had stopped the training.
        if self._evaluation == (state.global_step, False):
            patience = next(_patience(state), None)
            if patience is not None:
                return f"early stop: no better {_ranked_by(args)} in {patience} evaluations"
            return f"early stop: by a callback, after the evaluation {at}"
        return f"stopped by a callback {at}"


def _ours(trainer: Any) -> Iterator[Any]:
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, _Hooks) and callback.report.active:
            yield callback


def _phase(name: str) -> str:
    return next((phase for start, phase in _PHASES.items() if name.startswith(start)), "train")


def _ranked_by(args: Any) -> str | None:
    metric = args.metric_for_best_model
    return metric if metric is None or metric.startswith("eval_") else f"eval_{metric}"


def _scores(state: Any) -> dict[str, Any]:
    """Return what was evaluated at this step."""
    found: dict[str, Any] = {}
    for log in reversed(state.log_history):
        if log.get("step") != state.global_step:
            break
        found |= {k: v for k, v in log.items() if _phase(k) == "validation"}
    return found


def _best(args: Any, state: Any) -> Best | None:
    metric = _ranked_by(args)
    if metric is None or state.best_metric is None:
        return None
    for log in state.log_history:
        if log.get(metric) == state.best_metric:
            # A float that is whole where an epoch ends.
            epoch = max(math.ceil(log.get("epoch", 0) - _ROUNDING) - 1, 0)
            return Best(metric=metric, value=float(state.best_metric), epoch=epoch)
    return None


def _patience(state: Any) -> Iterator[int]:
    for kept in state.stateful_callbacks.values():
        for each in kept if isinstance(kept, list) else [kept]:
            if "early_stopping_patience" in each.get("args", {}):
                yield each["args"]["early_stopping_patience"]


def _base() -> Any:
    from transformers import TrainerCallback

    return TrainerCallback


_make_callback = late_class(__name__, "BusCallback", _Hooks, _base)


def __getattr__(name: str) -> Any:
    if name == "BusCallback":
        return _make_callback()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
