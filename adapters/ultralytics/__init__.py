"""Emits the events of an Ultralytics training (detect, segment, pose, obb, classify).

Attaches to a `YOLO` model or to a trainer. Checkpoints are recorded by path: `last.pt` and
`best.pt` are overwritten during training, and recorded as `final` after it; `epochN.pt` is written
once.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainbus.errors import SinkError
from trainbus.events import ImageLogged, ParamsUpdated
from trainbus.interfaces import Detach, Emit
from trainbus.toolkit.adapters import Hooks, guarded, patch, wrap, wrong_target

from . import trainer as facts
from .checkpoints import Checkpoints
from .evaluation import evaluation

TESTED_VERSIONS = "8.3.0, 8.3.200, 8.4.90, 8.4.190"
_TRAINER = ("run_callbacks", "train", "label_loss_items", "add_callback")
REQUIRED_NAMES = (
    *(f"ultralytics.engine.model:Model.{name}" for name in ("add_callback", "train")),
    *(f"ultralytics.engine.trainer:BaseTrainer.{name}" for name in _TRAINER),
    "ultralytics.utils.metrics:ConfusionMatrix",
    "ultralytics.utils.torch_utils:EarlyStopping",
)
"""Names that the adapter uses; `trainbus doctor` checks that they exist."""


def attach(target: Any, emit: Emit) -> Detach:
    """Add callbacks to a `YOLO` model or a trainer, so that its trainings emit events.

    Args:
        target: an Ultralytics model, before `train()`, or a trainer.
        emit: where the events go.

    Returns:
        A function that removes the callbacks.

    Raises:
        AttachError: the object is neither.
    """
    if not all(hasattr(target, name) for name in ("callbacks", "add_callback", "train")):
        raise wrong_target(target, "a YOLO model or a trainer", "attach what you call `train()` on")
    hooks = _Hooks()
    names = [name for name in vars(_Hooks) if name.startswith("on_") or name == "teardown"]
    for name in names:
        target.callbacks[name].append(getattr(hooks, name))
    # In most versions no callback is called on an exception.
    unwrap = wrap(target, "train", hooks.train)

    def release() -> None:
        for name in names:
            hook = getattr(hooks, name)
            target.callbacks[name] = [c for c in target.callbacks[name] if c != hook]
        unwrap()

    detach = hooks.report.connect(emit, release)
    if hasattr(target, "save_dir"):  # a trainer: its set-up begins in its constructor
        hooks.begin(target)
    return detach


def hook(module: Any, attach: Callable[[object], object]) -> None:
    """Attach every new trainer whose model is not attached, also in multi-GPU processes.

    Args:
        module: `ultralytics.engine.trainer`.
        attach: called with the trainer.
    """

    def make(init: Callable[..., None], trainer: Any, *args: Any, **kwargs: Any) -> None:
        init(trainer, *args, **kwargs)
        owners = [getattr(c, "__self__", None) for each in trainer.callbacks.values() for c in each]
        if not any(isinstance(hooks, _Hooks) and hooks.report.active for hooks in owners):
            attach(trainer)

    patch(module.BaseTrainer, "__init__", make)


class _Hooks(Hooks):
    """The callbacks, named after Ultralytics' hooks; one training at a time.

    Multi-GPU trainings pickle them into each process.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hooks:
        """Share the hooks: a copied model reports to the same bus, until the original detaches."""
        return self

    def reset(self, trainer: Any = None) -> None:
        self.report.is_open, self.report.epoch = False, None
        self._trainer = trainer
        self._outer_error = sys.exc_info()[1]
        self._finished = self._validated = self._train_epoch_over = False
        self._step = 0
        self._params: dict[str, Any] = {}
        self._plots: dict[str, float] = {}
        self._checkpoints = Checkpoints()

    def train(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Train, and end the run as failed or stopped if an exception leaves the training."""
        try:
            result = method(*args, **kwargs)
        except SinkError:
            raise
        except BaseException as error:
            self._record_failure(error)
            raise
        self._conclude(method.__self__)  # type: ignore[attr-defined]
        return result

    def begin(self, trainer: Any) -> None:
        """Report this trainer from now on; its set-up has begun."""
        self.reset(trainer)
        if self.report.emit is not None:
            facts.silence_own_loggers(trainer, self.report.emit.services)

    @guarded
    def on_pretrain_routine_start(self, trainer: Any) -> None:
        if self._reports():
            self.begin(trainer)

    @guarded
    def on_pretrain_routine_end(self, trainer: Any) -> None:
        if self._reports():
            if self._trainer is not trainer:
                self.reset(trainer)
            self._start(trainer)

    @guarded
    def on_train_epoch_start(self, trainer: Any) -> None:
        if not self.report.is_open:
            return
        # An epoch is still open if memory ran out in its batches, or NaNs were found after them.
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
            self._record_plots(trainer)

    @guarded
    def on_val_end(self, validator: Any) -> None:
        self._validated = True

    @guarded
    def on_model_save(self, trainer: Any) -> None:
        if self.report.is_open:
            for saved in self._checkpoints.saved(trainer):
                self.report.record(saved)

    @guarded
    def on_fit_epoch_end(self, trainer: Any) -> None:
        if not self.report.is_open:
            return
        epoch = self.report.epoch
        if epoch is None:
            # The final evaluation of the best weights is reported like one more epoch.
            self.report.metrics(trainer.metrics, "validation", final=True)
            return
        self._record_plots(trainer)
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
        self._record_plots(trainer)
        self._evaluate(trainer)
        for saved in self._checkpoints.final(trainer, self.report.last_epoch):
            self.report.record(saved)

    @guarded
    def teardown(self, trainer: Any) -> None:
        if not self.report.is_open:
            return
        error = sys.exc_info()[1]
        if error is not None and error is not self._outer_error:
            self._fail(error)
        elif self._finished:
            self._finish(facts.why_ended(trainer, self.report.last_epoch))

    def _reports(self) -> bool:
        # Ultralytics' launcher sets RANK, and Ultralytics identifies its main process by it.
        return self.report.active and os.environ.get("RANK", "-1") in ("-1", "0")

    def _start(self, trainer: Any) -> None:
        self._params = {"epochs": trainer.epochs, "batch": trainer.args.batch}
        self._step = facts.steps(trainer)
        self.report.start(facts.started(trainer))

    @guarded
    def _record_failure(self, error: BaseException) -> None:
        with contextlib.suppress(SinkError):  # the user needs to see their own error
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        rank = max(int(os.environ.get("RANK", "-1")), 0)
        if not rank and not self.report.is_open:
            # If the run is in a child process, the child recorded its end.
            if self._trainer is None or facts.only_launches(self._trainer):
                return
            self._start(self._trainer)
        self.report.fail(error, rank=rank, best=self._checkpoints.best(self._trainer))
        self.reset()

    def _finish(self, reason: str | None = None) -> None:
        self.report.end(reason, self._checkpoints.best(self._trainer))
        self.reset()

    def _update_params(self, trainer: Any) -> None:
        now = {"epochs": trainer.epochs, "batch": trainer.args.batch}
        changed = {k: v for k, v in now.items() if v != self._params.get(k)}
        if changed:
            self._params = now
            self.report.record(ParamsUpdated(params=changed))

    @guarded
    def _conclude(self, target: Any) -> None:
        if self._reports():
            self._finish()  # a hook of ours raised at the end, or the trainer has no teardown
            facts.warn_if_children_have_no_callbacks(getattr(target, "trainer", target))

    @guarded
    def _evaluate(self, trainer: Any) -> None:
        for event in evaluation(trainer.validator, self.report.last_epoch):
            self.report.record(event)

    @guarded
    def _record_plots(self, trainer: Any) -> None:
        epoch = self.report.last_epoch if self.report.epoch is None else self.report.epoch
        for path, drawn in facts.plots(trainer):
            if self._plots.get(path) != drawn:
                self._plots[path] = drawn
                self.report.record(ImageLogged(key=Path(path).stem, path=path, epoch=epoch))

    @guarded
    def _describe(self, trainer: Any) -> None:
        self.report.record(facts.model_described(trainer))
