"""What is found out about a Lightning trainer: its settings, and why it ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainbus.events import Resumed, RunStarted
from trainbus.toolkit.adapters import version

from ._lightning_packages import package_of

_ARGUMENTS = """
    max_epochs min_epochs max_steps min_steps accumulate_grad_batches precision gradient_clip_val
    gradient_clip_algorithm num_devices num_nodes fast_dev_run log_every_n_steps overfit_batches
    check_val_every_n_epoch val_check_interval limit_train_batches limit_val_batches
    reload_dataloaders_every_n_epochs
"""


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
        # What was saved with `save_hyperparameters(logger=False)` is not for loggers.
        if getattr(source, "_log_hyperparams", False):
            found |= {k: v for k, v in source.hparams_initial.items() if k != "_class_path"}
    return found


def validates_within_epochs(trainer: Any) -> bool:
    """Return whether a validation may come in the middle of an epoch."""
    every = trainer.val_check_batch
    if trainer.check_val_every_n_epoch is None or every is None:
        return True
    return bool(every < trainer.num_training_batches)


def is_launched(trainer: Any) -> bool:
    """Return whether the training runs in children of the process that `fit` was called in.

    Then `on_exception` comes in the parent alone, which has no run and no more than a dead child.
    """
    return hasattr(trainer.strategy.launcher, "_start_method")


def why_ended(trainer: Any, first_epoch: int) -> str | None:
    """Return why a training ended before its last epoch, None if it did not.

    Args:
        trainer: its trainer.
        first_epoch: the epoch that it began with.
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
        said = getattr(each, "stopping_reason_message", None)
        # What it said in an earlier training is kept in checkpoints too.
        if said and each.stopped_epoch >= first_epoch:
            return f"early stop: {said.removesuffix(' Signaling Trainer to stop.')}"
        if said is None and getattr(each, "wait_count", -1) >= getattr(each, "patience", 0):
            return f"early stop: {each.monitor} did not improve in {each.patience} checks"
    return "stopped by a callback"
