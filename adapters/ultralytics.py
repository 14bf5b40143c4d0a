"""Turns the hooks of an Ultralytics training (detect, segment, pose, obb, classify) into events.

Attaches to a `YOLO` model or to a trainer. Checkpoints are named by path: `last.pt` and `best.pt`
are overwritten while training goes on (`final` marks the last time), `epochN.pt` never again.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainbus.errors import AttachError, SinkError
from trainbus.events import ImageLogged, ParamsUpdated
from trainbus.interfaces import Detach, Emit
from trainbus.toolkit.adapters import Reporter, guarded, patch, wrap

from . import _ultralytics_trainer as facts
from ._ultralytics_checkpoints import Checkpoints
from ._ultralytics_evaluation import evaluation

TESTED_VERSIONS = "8.3.0, 8.3.200, 8.4.90, 8.4.190"
_TRAINER = ("run_callbacks", "train", "label_loss_items", "add_callback")
REQUIRED_NAMES = (
    *(f"ultralytics.engine.model:Model.{name}" for name in ("add_callback", "train")),
    *(f"ultralytics.engine.trainer:BaseTrainer.{name}" for name in _TRAINER),
    "ultralytics.utils.metrics:ConfusionMatrix",
    "ultralytics.utils.torch_utils:EarlyStopping",
)
"""What the adapter relies on; `trainbus doctor` looks whether it is there."""


def attach(target: Any, emit: Emit) -> Detach:
    """Hang hooks into a `YOLO` model or a trainer, so that its trainings emit events.

    Args:
        target: an Ultralytics model, before `train()`, or a trainer.
        emit: where the events go.

    Returns:
        A function that takes the hooks out again.

    Raises:
        AttachError: the object is neither.
    """
    if not all(hasattr(target, name) for name in ("callbacks", "add_callback", "train")):
        raise AttachError(
            f"expected a YOLO model or a trainer, found {type(target).__qualname__}; "
            "attach what you call `train()` on"
        )
    hooks = _Hooks(emit)
    names = [name for name in vars(_Hooks) if name.startswith("on_") or name == "teardown"]
    for name in names:
        target.callbacks[name].append(getattr(hooks, name))
    if hasattr(target, "save_dir"):  # a trainer, whose set-up has begun when it was made
        hooks.begin(target)
    # Most versions tell a callback nothing of an exception, so the entry call is watched.
    unwrap = wrap(target, "train", hooks.train)

    def detach() -> None:
        hooks.report.active = False
        for name in names:
            hook = getattr(hooks, name)
            target.callbacks[name] = [c for c in target.callbacks[name] if c != hook]
        unwrap()

    return detach


def hook(module: Any, attach: Callable[[object], object]) -> None:
    """Have every trainer that is made attached, unless its model is: multi-GPU children too.

    Args:
        module: `ultralytics.engine.trainer`.
        attach: called with the trainer.
    """

    def make(made: Callable[..., None], trainer: Any, *args: Any, **kwargs: Any) -> None:
        made(trainer, *args, **kwargs)
        hung_in = [
            getattr(c, "__self__", None) for hooks in trainer.callbacks.values() for c in hooks
        ]
        if not any(isinstance(hooks, _Hooks) and hooks.report.active for hooks in hung_in):
            attach(trainer)

    patch(module.BaseTrainer, "__init__", make)


class _Hooks:
    """The callbacks, each named after the hook it is hung on; one training at a time."""

    def __init__(self, emit: Emit) -> None:
        self.report = Reporter(emit)
        self._reset(None)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the training out: multi-GPU runs pickle the callbacks into each child process."""
        return {"report": self.report}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.report = state["report"]
        self._reset(None)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hooks:
        """A copied model reports as the original does, and falls silent with it."""
        return self

    def _reset(self, trainer: Any) -> None:
        self.report.is_open, self.report.epoch = False, None
        self._trainer = trainer
        self._outer_error = sys.exc_info()[1]
        self._finished = self._validated = self._train_epoch_over = False
        self._step = 0
        self._known: dict[str, Any] = {}
        self._plots: dict[str, float] = {}
        self._checkpoints = Checkpoints()

    def train(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Train, and end the run as failed or stopped where an exception leaves the training."""
        try:
            result = method(*args, **kwargs)
        except SinkError:
            raise
        except BaseException as error:
            self._tell_failure(error)
            raise
        self._conclude(method.__self__)  # type: ignore[attr-defined]
        return result

    def begin(self, trainer: Any) -> None:
        """Take a trainer whose set-up has begun for the one that is heard."""
        self._reset(trainer)
        if self.report.emit is not None:
            facts.silence_own_loggers(trainer, self.report.emit.services)

    @guarded
    def on_pretrain_routine_start(self, trainer: Any) -> None:
        if self._listens():
            self.begin(trainer)

    @guarded
    def on_pretrain_routine_end(self, trainer: Any) -> None:
        if self._listens():
            if self._trainer is not trainer:
                self._reset(trainer)
            self._start(trainer)

    @guarded
    def on_train_epoch_start(self, trainer: Any) -> None:
        if not self.report.is_open:
            return
        # No end came for it: memory ran out in its batches, or NaNs were found after them.
        self.report.end_epoch("recovered" if self._train_epoch_over else "retried")
        self._update_params(trainer)
        self._validated = self._train_epoch_over = False
        self.report.start_epoch(trainer.epoch)

    @guarded
    def on_train_batch_end(self, trainer: Any) -> None:
        step = facts.steps(trainer) if self.report.is_open else 0
        if step != self._step and self.report.wants_step(step):
            self._step = step
            values = trainer.label_loss_items(trainer.loss_items, prefix="batch")
            self.report.metrics(values, "train", epoch=trainer.epoch, step=step, on_request=True)

    @guarded
    def on_train_epoch_end(self, trainer: Any) -> None:
        if self.report.is_open:
            self._train_epoch_over = True
            losses = trainer.label_loss_items(trainer.tloss, prefix="train")
            self.report.metrics({**losses, **trainer.lr}, "train", epoch=trainer.epoch)
            self._log_plots(trainer)

    @guarded
    def on_val_end(self, validator: Any) -> None:
        self._validated = True

    @guarded
    def on_model_save(self, trainer: Any) -> None:
        if self.report.is_open:
            for event in self._checkpoints.saved(trainer):
                self.report.tell(event)

    @guarded
    def on_fit_epoch_end(self, trainer: Any) -> None:
        if not self.report.is_open:
            return
        epoch = self.report.epoch
        if epoch is None:
            # The final evaluation of the best weights comes after the last epoch, as one more.
            self.report.metrics(trainer.metrics, "validation", final=True)
            return
        self._log_plots(trainer)
        if epoch == 0:
            self._describe(trainer)
        try:
            if self._validated:  # else the metrics are those of an earlier epoch
                self.report.metrics(trainer.metrics, "validation", epoch=epoch)
        finally:
            self.report.end_epoch("completed")

    @guarded
    def on_train_end(self, trainer: Any) -> None:
        if not self.report.is_open:
            return
        self._finished = True
        facts.await_plots()
        self._log_plots(trainer)
        self._evaluate(trainer)
        for event in self._checkpoints.final(trainer, self.report.last_epoch):
            self.report.tell(event)

    @guarded
    def teardown(self, trainer: Any) -> None:
        if not self.report.is_open:
            return
        error = sys.exc_info()[1]
        if error is not None and error is not self._outer_error:
            self._fail(error)
        elif self._finished:
            self._finish(facts.why_ended(trainer, self.report.last_epoch))

    def _listens(self) -> bool:
        # Ultralytics itself tells its main process by this variable, which its launcher sets.
        return self.report.active and os.environ.get("RANK", "-1") in ("-1", "0")

    def _start(self, trainer: Any) -> None:
        self._known = {"epochs": trainer.epochs, "batch": trainer.args.batch}
        self._step = facts.steps(trainer)
        self.report.start(facts.run_of(trainer))

    @guarded
    def _tell_failure(self, error: BaseException) -> None:
        with contextlib.suppress(SinkError):  # the user's own error is the one to see
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        rank = max(int(os.environ.get("RANK", "-1")), 0)
        if not rank and not self.report.is_open:
            # Where a child has the run, it told what ended it.
            if self._trainer is None or facts.only_launches(self._trainer):
                return
            self._start(self._trainer)
        self.report.fail(error, rank=rank, best=self._checkpoints.best(self._trainer))
        self._reset(None)

    def _finish(self, reason: str | None = None) -> None:
        self.report.end(reason, self._checkpoints.best(self._trainer))
        self._reset(None)

    def _update_params(self, trainer: Any) -> None:
        now = {"epochs": trainer.epochs, "batch": trainer.args.batch}
        changed = {k: v for k, v in now.items() if v != self._known.get(k)}
        if changed:
            self._known = now
            self.report.tell(ParamsUpdated(params=changed))

    @guarded
    def _conclude(self, target: Any) -> None:
        if self._listens():
            self._finish()  # a hook of ours failed at the end, or the trainer has no teardown
            facts.warn_of_deaf_children(getattr(target, "trainer", target))

    @guarded
    def _evaluate(self, trainer: Any) -> None:
        for event in evaluation(trainer.validator, self.report.last_epoch):
            self.report.tell(event)

    @guarded
    def _log_plots(self, trainer: Any) -> None:
        epoch = self.report.last_epoch if self.report.epoch is None else self.report.epoch
        for path, drawn in facts.plots(trainer):
            if self._plots.get(path) != drawn:
                self._plots[path] = drawn
                self.report.tell(ImageLogged(key=Path(path).stem, path=path, epoch=epoch))

    @guarded
    def _describe(self, trainer: Any) -> None:
        self.report.tell(facts.model_of(trainer))
