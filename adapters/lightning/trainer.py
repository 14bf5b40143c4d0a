"""Reads a Lightning trainer: its package, settings, learning rates, and why it ended."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainbus.events import Resumed, RunStarted
from trainbus.toolkit.adapters import number, version

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
"""The packages that Lightning comes in; a program may use either or both."""

_ARGUMENTS = """
    max_epochs min_epochs max_steps min_steps accumulate_grad_batches precision gradient_clip_val
    gradient_clip_algorithm num_devices num_nodes fast_dev_run log_every_n_steps overfit_batches
    check_val_every_n_epoch val_check_interval limit_train_batches limit_val_batches
    reload_dataloaders_every_n_epochs
"""


def package_of(trainer: Any) -> str | None:
    """Return `lightning` or `pytorch_lightning`, None if the object is not their trainer."""
    for cls in type(trainer).__mro__:
        if cls.__name__ == "Trainer" and cls.__module__.startswith(PACKAGES):
            return str(cls.__module__.partition(".")[0])
    return None


def callback_base() -> type:
    """Return the `Callback` of the imported package, or a class of both if both are imported."""
    used = [name for name in PACKAGES if name in sys.modules]
    used = used or [name for name in PACKAGES if find_spec(name.partition(".")[0])][:1]
    return type("Callback", tuple(importlib.import_module(name).Callback for name in used), {})


def started(trainer: Any) -> RunStarted:
    """Return the start of the training that a trainer is set up for."""
    package = package_of(trainer) or "lightning"
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
        # False after `save_hyperparameters(logger=False)`.
        if getattr(source, "_log_hyperparams", False):
            found |= {k: v for k, v in source.hparams_initial.items() if k != "_class_path"}
    return found


def learning_rates(optimizers: Any) -> dict[str, float | None]:
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


def logs_steps(trainer: Any) -> bool:
    """Return whether epochs are long enough for Lightning to log the values of steps."""
    every = trainer.log_every_n_steps * trainer.accumulate_grad_batches
    return 0 < every <= trainer.num_training_batches and not trainer.fast_dev_run


def validates_within_epochs(trainer: Any) -> bool:
    """Return whether a validation may run in the middle of an epoch."""
    every = trainer.val_check_batch
    if trainer.check_val_every_n_epoch is None or every is None:
        return True
    return bool(every < trainer.num_training_batches)


def is_launched(trainer: Any) -> bool:
    """Return whether the training runs in child processes of the one that called `fit`.

    Lightning then calls `on_exception` only in the parent process, which has no run.
    """
    return hasattr(trainer.strategy.launcher, "_start_method")


def why_ended(trainer: Any, first_epoch: int) -> str | None:
    """Return why a training ended before its last epoch, None if it did not.

    Args:
        trainer: its trainer.
        first_epoch: its first epoch.
    """
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
        message = getattr(each, "stopping_reason_message", None)
        # Checkpoints keep the message of an earlier training.
        if message and each.stopped_epoch >= first_epoch:
            return f"early stop: {message.removesuffix(' Signaling Trainer to stop.')}"
        if message is None and getattr(each, "wait_count", -1) >= getattr(each, "patience", 0):
            return f"early stop: {each.monitor} did not improve in {each.patience} checks"
    return "stopped by a callback"
