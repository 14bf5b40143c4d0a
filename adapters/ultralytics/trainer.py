"""Reads an Ultralytics trainer: settings, model, steps, plots, and why it ended."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Collection, Iterator
from inspect import getsource
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from trainbus.events import ModelDescribed, Resumed, RunStarted
from trainbus.toolkit.adapters import described, early_stop, numbers, version

logger = logging.getLogger("trainbus.adapters.ultralytics")

_OWN_LOGGERS = {
    "wandb": "wb",
    "mlflow": "mlflow",
    "tensorboard": "tensorboard",
    "comet_ml": "comet",
    "clearml": "clearml",
    "dvclive": "dvc",
}
"""Import name of a tracker → module of Ultralytics' callbacks for it."""

_GOALS: dict[str, Any] = {
    **{f"metrics/{name}*": "max" for name in ("precision", "recall", "mAP", "accuracy")},
    "val/*": "min",
}

_PLOT_DEADLINE_S = 10.0


def started(trainer: Any) -> RunStarted:
    """Return the start of a trainer's run."""
    args = vars(trainer.args)
    epoch, resumed = getattr(trainer, "start_epoch", 0), None
    if args.get("resume") and epoch > 0:
        # If the folder was moved, the trainer creates its old path again, which is empty.
        folder = Path(str(args["resume"])).absolute().parent.parent
        resumed = Resumed(epoch=epoch, step=steps(trainer), save_dir=str(folder))
    return RunStarted(
        name=_text(args.get("name")),
        project=_text(args.get("project")) or "Ultralytics",
        task=_text(args.get("task")),
        params=dict(args),
        framework="ultralytics",
        framework_version=version("ultralytics"),
        save_dir=str(trainer.save_dir),
        world_size=max(int(getattr(trainer, "world_size", 0) or 0), 1),
        resumed=resumed,
        goals=_GOALS,
    )


def model_described(trainer: Any) -> ModelDescribed:
    """Return the size and speed of a trainer's model, which must have been validated."""
    from ultralytics.utils.torch_utils import model_info_for_loggers

    found = model_info_for_loggers(trainer).items()
    info = numbers({name.removeprefix("model/"): value for name, value in found})
    speed = {
        name.removeprefix("speed_").removesuffix("(ms)"): value
        for name, value in info.items()
        if name.startswith("speed_")
    }
    for stage in ("preprocess", "postprocess"):
        speed[stage] = float(trainer.validator.speed[stage])
    model = described(trainer.model.parameters(), layers=sum(1 for _ in trainer.model.modules()))
    return replace(
        model,
        parameters=int(info.get("parameters") or model.parameters or 0),
        gflops=info.get("GFLOPs"),
        speed_ms=speed,
        classes=[str(name) for name in trainer.data["names"].values()],
    )


def steps(trainer: Any) -> int:
    """Return the number of optimizer updates, which Ultralytics counts for its averaged weights."""
    return int(getattr(getattr(trainer, "ema", None), "updates", 0) or 0)


def why_ended(trainer: Any, last_epoch: int | None) -> str | None:
    """Return why a training ended before its last epoch, None if it did not."""
    stopper = trainer.stopper
    if last_epoch is None:
        return None
    if last_epoch + 1 - stopper.best_epoch >= stopper.patience:
        return early_stop("fitness", stopper.patience)
    if trainer.args.time:
        return f"time limit of {trainer.args.time} h"
    if last_epoch + 1 >= trainer.epochs:
        return None
    return "stopped by a callback"


def plots(trainer: Any) -> Iterator[tuple[str, float]]:
    """Yield the paths of the plots, each with the time when it was drawn."""
    validator = getattr(trainer, "validator", None)
    for drawn in (trainer.plots, getattr(validator, "plots", None) or {}):
        for path, about in drawn.copy().items():  # drawing threads add to it meanwhile
            yield str(path), about["timestamp"]


def await_plots() -> None:
    """Wait for the threads that are still drawing plots."""
    deadline = time.monotonic() + _PLOT_DEADLINE_S
    for thread in threading.enumerate():
        if "(plot_images)" in thread.name:
            thread.join(max(deadline - time.monotonic(), 0.0))


def silence_own_loggers(trainer: Any, services: Collection[str]) -> None:
    """Remove Ultralytics' own callbacks for these trackers from a trainer."""
    for service in sorted(services & _OWN_LOGGERS.keys()):
        module = f"ultralytics.utils.callbacks.{_OWN_LOGGERS[service]}"
        found = False
        for callbacks in trainer.callbacks.values():
            kept = [c for c in callbacks if getattr(c, "__module__", None) != module]
            found = found or len(kept) < len(callbacks)
            callbacks[:] = kept
        if found:
            logger.warning(
                "Ultralytics' own %s logging is off for this training: trainbus logs to it", service
            )


def only_launches(trainer: Any) -> bool:
    """Return whether a trainer starts one process per GPU, which do the training."""
    return int(getattr(trainer, "world_size", 0) or 0) > 1 and "LOCAL_RANK" not in os.environ


def warn_if_children_have_no_callbacks(trainer: Any) -> None:
    """Log a warning if a multi-GPU training ran in processes that got no callbacks."""
    from ultralytics.utils import dist

    if not only_launches(trainer) or "TRAINBUS_CONFIG" in os.environ:  # `trainbus run` hooks them
        return
    if "callbacks" not in getsource(dist.generate_ddp_file):
        logger.warning(
            "nothing was logged: this Ultralytics gives its multi-GPU processes no callbacks; "
            "start the script with `trainbus run`, update to 8.4.190, or train on one GPU"
        )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
