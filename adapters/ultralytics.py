"""Turns the hooks of an Ultralytics training (detect, segment, pose, obb, classify) into events.

Attaches to a `YOLO` model or to a trainer. Checkpoints are named by path: `last.pt` and `best.pt`
are overwritten while training goes on (`final` marks the last time), `epochN.pt` never again.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial, wraps
from inspect import getsource
from pathlib import Path
from typing import Any

from trainbus.errors import AttachError, SinkError
from trainbus.events import (
    Best,
    CheckpointSaved,
    EpochEnded,
    EpochStarted,
    ImageLogged,
    MetricsLogged,
    ModelDescribed,
    ParamsUpdated,
    Resumed,
    RunEnded,
    RunStarted,
    ended_by,
)
from trainbus.interfaces import Detach, Emit

from ._ultralytics_evaluation import evaluation, number, numbers

logger = logging.getLogger("trainbus.adapters.ultralytics")

TESTED = "8.3.0, 8.3.200, 8.4.90, 8.4.190"
NEEDS = (
    "ultralytics.engine.model:Model.add_callback",
    "ultralytics.engine.model:Model.train",
    "ultralytics.engine.trainer:BaseTrainer.run_callbacks",
    "ultralytics.engine.trainer:BaseTrainer.train",
    "ultralytics.engine.trainer:BaseTrainer.label_loss_items",
    "ultralytics.engine.trainer:BaseTrainer.add_callback",
    "ultralytics.utils.metrics:ConfusionMatrix",
    "ultralytics.utils.torch_utils:EarlyStopping",
)
"""What the adapter relies on; `trainbus doctor` looks whether it is there."""

_OWN_LOGGERS = {
    "wandb": "wb",
    "mlflow": "mlflow",
    "tensorboard": "tensorboard",
    "comet_ml": "comet",
    "clearml": "clearml",
    "dvclive": "dvc",
}
"""Import name of a tracker → module of Ultralytics' own callbacks for it."""

_GOALS: dict[str, Any] = {
    **{f"metrics/{name}*": "max" for name in ("precision", "recall", "mAP", "accuracy")},
    "val/*": "min",
}

_PLOT_DEADLINE_S = 10.0


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
    hooks.before = vars(target).get("train")
    watched = partial(hooks.watch, target, target.train)
    target.train = watched

    def detach() -> None:
        hooks.active = False
        for name in names:
            hook = getattr(hooks, name)
            target.callbacks[name] = [c for c in target.callbacks[name] if c != hook]
        if vars(target).get("train") is watched:
            del target.train
            before = _underneath(hooks.before)
            if before is not None:
                target.train = before

    return detach


def hook(module: Any, attach: Callable[[object], object]) -> None:
    """Have every trainer that is made attached, unless its model is: multi-GPU children too.

    Args:
        module: `ultralytics.engine.trainer`.
        attach: called with the trainer.
    """
    made = module.BaseTrainer.__init__

    @wraps(made)
    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        heard = (getattr(c, "__self__", None) for hooks in self.callbacks.values() for c in hooks)
        if not any(isinstance(hooks, _Hooks) and hooks.active for hooks in heard):
            attach(self)

    module.BaseTrainer.__init__ = make


def _only_launches(trainer: Any) -> bool:
    """Return whether a trainer leaves the training to processes that it starts, one a GPU."""
    return int(getattr(trainer, "world_size", 0) or 0) > 1 and "LOCAL_RANK" not in os.environ


def _underneath(train: Any) -> Any:
    """Return what a model's own `train` was before hooks watched it that are detached by now."""
    while isinstance(train, partial):
        hooks = getattr(train.func, "__self__", None)
        if not isinstance(hooks, _Hooks) or hooks.active:
            break
        train = hooks.before
    return train


def _guarded(hook: Callable[[_Hooks, Any], None]) -> Callable[[_Hooks, Any], None]:
    """Keep what goes wrong in a hook of ours away from the training, and say it once."""

    @wraps(hook)
    def guarded(self: _Hooks, source: Any) -> None:
        try:
            hook(self, source)
        except SinkError:  # the user wants no training without that sink
            raise
        except Exception as error:
            name = hook.__name__.lstrip("_")
            if name not in self.failed:
                self.failed.add(name)
                logger.warning(
                    "%s of this %s can't be read, its events are missing: %s: %s",
                    *(name, type(source).__qualname__, type(error).__name__, error),
                )

    return guarded


class _Hooks:
    """The callbacks, each named after the hook it is hung on; one training at a time."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self.active = True
        self.failed: set[str] = set()
        self.before: Any = None
        self._reset(None)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the training out: multi-GPU runs pickle the callbacks into each child process."""
        return {"_emit": self._emit, "active": self.active, "failed": set(), "before": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset(None)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hooks:
        """A copied model reports as the original does, and falls silent with it."""
        return self

    def _reset(self, trainer: Any) -> None:
        self._trainer = trainer
        self._outer_error = sys.exc_info()[1]
        self._started = self._finished = self._validated = self._train_epoch_over = False
        self._epoch: int | None = None
        self._epoch_began = 0.0
        self._last_epoch: int | None = None
        self._best_epoch: int | None = None
        self._step = 0
        self._known: dict[str, Any] = {}
        self._plots: dict[str, float] = {}
        self._saved: dict[str, dict[str, float]] = {}

    def watch(self, target: Any, entry: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call the training, and end the run as failed or stopped where an exception leaves it."""
        try:
            result = entry(*args, **kwargs)
        except SinkError:
            raise
        except BaseException as error:
            try:
                self._fail(error)
            except Exception as second:  # the user's own error is the one to see
                logger.warning("the end of this run can't be reported: %s", second)
            raise
        self._conclude(target)
        return result

    def begin(self, trainer: Any) -> None:
        """Take a trainer whose set-up has begun for the one that is heard."""
        self._reset(trainer)
        self.silence_own_loggers(trainer)

    @_guarded
    def on_pretrain_routine_start(self, trainer: Any) -> None:
        if self._listens():
            self.begin(trainer)

    @_guarded
    def on_pretrain_routine_end(self, trainer: Any) -> None:
        if self._listens():
            if self._trainer is not trainer:
                self._reset(trainer)
            self._start(trainer)

    @_guarded
    def on_train_epoch_start(self, trainer: Any) -> None:
        if not self._listens():
            return
        if self._epoch is not None:
            # No end came for it: memory ran out in its batches, or NaNs were found after them.
            self._end_epoch("recovered" if self._train_epoch_over else "retried")
        self._update_params(trainer)
        self._epoch, self._epoch_began = trainer.epoch, time.monotonic()
        self._validated = self._train_epoch_over = False
        self._emit(EpochStarted(epoch=trainer.epoch))

    @_guarded
    def on_train_batch_end(self, trainer: Any) -> None:
        every = self._emit.every("train") if self._listens() else None
        if every is None:
            return
        step = _steps(trainer)
        if step == self._step or step % every:
            return
        self._step = step
        values = trainer.label_loss_items(trainer.loss_items, prefix="batch")
        self._log(values, phase="train", epoch=trainer.epoch, step=step, on_request=True)

    @_guarded
    def on_train_epoch_end(self, trainer: Any) -> None:
        if not self._listens():
            return
        self._train_epoch_over = True
        losses = trainer.label_loss_items(trainer.tloss, prefix="train")
        self._log({**losses, **trainer.lr}, phase="train", epoch=trainer.epoch)
        self._log_plots(trainer)

    @_guarded
    def on_val_end(self, validator: Any) -> None:
        self._validated = True

    @_guarded
    def on_model_save(self, trainer: Any) -> None:
        if not self._listens():
            return
        is_best = trainer.best_fitness == trainer.fitness
        for kind in ("last", "periodic", "best") if is_best else ("last", "periodic"):
            # After training, `trainer.metrics` are those of the final evaluation.
            self._saved[kind] = numbers(trainer.metrics)
        self._save(trainer, "last", trainer.last)
        if is_best:
            self._best_epoch = trainer.epoch
            self._save(trainer, "best", trainer.best)
        periodic = Path(trainer.wdir) / f"epoch{trainer.epoch}.pt"
        if trainer.save_period > 0 and trainer.epoch % trainer.save_period == 0:
            self._save(trainer, "periodic", periodic)

    @_guarded
    def on_fit_epoch_end(self, trainer: Any) -> None:
        if not self._listens():
            return
        if self._epoch is None:
            # The final evaluation of the best weights comes after the last epoch, as one more.
            self._log(trainer.metrics, phase="validation", final=True)
            return
        self._log_plots(trainer)
        if self._epoch == 0:
            self._describe(trainer)
        try:
            if self._validated:  # else the metrics are those of an earlier epoch
                self._log(trainer.metrics, phase="validation", epoch=self._epoch)
        finally:
            self._end_epoch("completed")

    @_guarded
    def on_train_end(self, trainer: Any) -> None:
        if not self._listens():
            return
        self._finished = True
        _await_plots()
        self._log_plots(trainer)
        self._evaluate(trainer)
        for kind, path in (("last", trainer.last), ("best", trainer.best)):
            if Path(path).exists():
                self._save(trainer, kind, path, final=True)

    @_guarded
    def teardown(self, trainer: Any) -> None:
        if not self._listens() or not self._started:
            return
        error = sys.exc_info()[1]
        if error is not None and error is not self._outer_error:
            self._fail(error)
        elif self._finished:
            self._finish(_why_ended(trainer, self._last_epoch))

    def silence_own_loggers(self, trainer: Any) -> None:
        """Take Ultralytics' own callbacks for the trackers of this bus out of this trainer."""
        for service in sorted(self._emit.services & _OWN_LOGGERS.keys()):
            module = f"ultralytics.utils.callbacks.{_OWN_LOGGERS[service]}"
            found = False
            for callbacks in trainer.callbacks.values():
                kept = [c for c in callbacks if getattr(c, "__module__", None) != module]
                found = found or len(kept) < len(callbacks)
                callbacks[:] = kept
            if found:
                logger.warning(
                    "Ultralytics' own %s logging is off for this training: trainbus does it",
                    service,
                )

    def _listens(self) -> bool:
        # Ultralytics itself tells its main process by this variable, which its launcher sets.
        return self.active and os.environ.get("RANK", "-1") in ("-1", "0")

    def _start(self, trainer: Any) -> None:
        from ultralytics import __version__

        args = vars(trainer.args)
        start_epoch = getattr(trainer, "start_epoch", 0)
        resumed = bool(args.get("resume")) and start_epoch > 0
        self._known = {"epochs": trainer.epochs, "batch": args.get("batch")}
        self._step = _steps(trainer)
        self._emit(
            RunStarted(
                name=_text(args.get("name")),
                project=_text(args.get("project")) or "Ultralytics",
                task=_text(args.get("task")),
                params=dict(args),
                framework="ultralytics",
                framework_version=__version__,
                save_dir=str(trainer.save_dir),
                world_size=max(int(getattr(trainer, "world_size", 0) or 0), 1),
                resumed=self._resumed(args["resume"], start_epoch) if resumed else None,
                goals=_GOALS,
            )
        )
        self._started = True

    def _resumed(self, checkpoint: Any, epoch: int) -> Resumed:
        # Where the folder was moved, the trainer makes the old one anew, and it is empty.
        folder = Path(str(checkpoint)).absolute().parent.parent
        return Resumed(epoch=epoch, step=self._step, save_dir=str(folder))

    def _fail(self, error: BaseException) -> None:
        rank = int(os.environ.get("RANK", "-1"))
        if self.active and rank > 0:
            self._emit.failed_on(rank, error)
        if not self._listens() or self._trainer is None:
            return
        if not self._started:
            if _only_launches(self._trainer):  # its child has the run, and told what ended it
                return
            self._start(self._trainer)
        self._end(ended_by(error, best=self._best()))

    def _finish(self, reason: str | None = None) -> None:
        self._end(RunEnded(status="finished", reason=reason, best=self._best()))

    def _best(self) -> Best | None:
        fitness = number(getattr(self._trainer, "best_fitness", None))
        if fitness is None:
            return None
        return Best(metric="fitness", value=fitness, epoch=self._best_epoch)

    def _end(self, event: RunEnded) -> None:
        self._reset(None)
        self._emit(event)

    def _end_epoch(self, outcome: Any) -> None:
        if self._epoch is None:
            return
        took = time.monotonic() - self._epoch_began
        self._emit(EpochEnded(epoch=self._epoch, duration_s=took, outcome=outcome))
        self._last_epoch, self._epoch = self._epoch, None

    def _update_params(self, trainer: Any) -> None:
        now = {"epochs": trainer.epochs, "batch": trainer.args.batch}
        changed = {k: v for k, v in now.items() if v != self._known.get(k)}
        if changed:
            self._known = now
            self._emit(ParamsUpdated(params=changed))

    def _log(self, values: Mapping[str, Any], **fields: Any) -> None:
        kept = numbers(values)
        if kept:
            self._emit(MetricsLogged(values=kept, **fields))

    @_guarded
    def _conclude(self, target: Any) -> None:
        if not self._listens():
            return
        if self._started:  # a hook of ours failed at the end, or the trainer has no teardown
            self._finish()
        _warn_of_deaf_children(getattr(target, "trainer", target))

    @_guarded
    def _evaluate(self, trainer: Any) -> None:
        for event in evaluation(trainer.validator, self._last_epoch):
            self._emit(event)

    @_guarded
    def _log_plots(self, trainer: Any) -> None:
        validator = getattr(trainer, "validator", None)
        for plots in (trainer.plots, getattr(validator, "plots", None) or {}):
            for path, about in plots.copy().items():  # drawing threads add to it meanwhile
                if self._plots.get(str(path)) != about["timestamp"]:
                    self._plots[str(path)] = about["timestamp"]
                    epoch = self._last_epoch if self._epoch is None else self._epoch
                    self._emit(ImageLogged(key=Path(path).stem, path=str(path), epoch=epoch))

    @_guarded
    def _describe(self, trainer: Any) -> None:
        from ultralytics.utils.torch_utils import model_info_for_loggers

        info = {
            k.removeprefix("model/"): number(v) for k, v in model_info_for_loggers(trainer).items()
        }
        speed = {
            k.removeprefix("speed_").removesuffix("(ms)"): v
            for k, v in info.items()
            if k.startswith("speed_") and v is not None
        }
        for stage in ("preprocess", "postprocess"):
            speed[stage] = float(trainer.validator.speed[stage])
        parameters = list(trainer.model.parameters())
        self._emit(
            ModelDescribed(
                parameters=int(info.get("parameters") or sum(p.numel() for p in parameters)),
                gradients=sum(p.numel() for p in parameters if p.requires_grad),
                layers=sum(1 for _ in trainer.model.modules()),
                gflops=info.get("GFLOPs"),
                speed_ms=speed,
                classes=[str(name) for name in trainer.data["names"].values()],
            )
        )

    def _save(self, trainer: Any, kind: Any, path: Any, *, final: bool = False) -> None:
        fitness = trainer.fitness
        epoch = self._last_epoch if final else trainer.epoch
        if final and kind == "best":
            fitness, epoch = trainer.best_fitness, self._best_epoch
        self._emit(
            CheckpointSaved(
                path=str(path),
                kind=kind,
                epoch=epoch,
                step=_steps(trainer),
                metrics=self._saved.get(kind, {}),
                metadata={"fitness": number(fitness), "args": dict(vars(trainer.args))},
                final=final,
            )
        )


def _steps(trainer: Any) -> int:
    """Return the optimizer updates done, which Ultralytics counts in its averaged weights."""
    return int(getattr(getattr(trainer, "ema", None), "updates", 0) or 0)


def _why_ended(trainer: Any, last_epoch: int | None) -> str | None:
    stopper = trainer.stopper
    if last_epoch is None:
        return None
    if last_epoch + 1 - stopper.best_epoch >= stopper.patience:
        return f"early stop: no better fitness in {stopper.patience} epochs"
    if trainer.args.time:
        return f"time limit of {trainer.args.time} h"
    if last_epoch + 1 >= trainer.epochs:
        return None
    return "stopped by a callback"


def _warn_of_deaf_children(trainer: Any) -> None:
    """Say so where a multi-GPU training ran in processes that were given no callbacks."""
    from ultralytics.utils import dist

    if not _only_launches(trainer) or "TRAINBUS_CONFIG" in os.environ:  # whose hooks they have
        return
    if "callbacks" not in getsource(dist.generate_ddp_file):
        logger.warning(
            "nothing was logged: this Ultralytics gives its multi-GPU processes no callbacks; "
            "start it by `trainbus run`, update it (8.4.190 does), or train on one GPU"
        )


def _await_plots() -> None:
    """Wait for the threads that still draw plots, whose files would be missing."""
    deadline = time.monotonic() + _PLOT_DEADLINE_S
    for thread in threading.enumerate():
        if "(plot_images)" in thread.name:
            thread.join(max(deadline - time.monotonic(), 0.0))


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
