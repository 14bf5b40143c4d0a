"""What an Ultralytics trainer is, and what it tells only by its attributes."""

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
from trainbus.toolkit.adapters import described, number, version

logger = logging.getLogger("trainbus.adapters.ultralytics")

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


def run_of(trainer: Any) -> RunStarted:
    """Return how a trainer's run starts."""
    args = vars(trainer.args)
    epoch, resumed = getattr(trainer, "start_epoch", 0), None
    if args.get("resume") and epoch > 0:
        # Where the folder was moved, the trainer makes the old one anew, and it is empty.
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


def model_of(trainer: Any) -> ModelDescribed:
    """Return what a trainer's model is, once it has been validated."""
    from ultralytics.utils.torch_utils import model_info_for_loggers

    found = model_info_for_loggers(trainer).items()
    info = {name.removeprefix("model/"): number(value) for name, value in found}
    speed = {
        name.removeprefix("speed_").removesuffix("(ms)"): value
        for name, value in info.items()
        if name.startswith("speed_") and value is not None
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
    """Return the optimizer updates done, which Ultralytics counts in its averaged weights."""
    return int(getattr(getattr(trainer, "ema", None), "updates", 0) or 0)


def why_ended(trainer: Any, last_epoch: int | None) -> str | None:
    """Return why a training ended before its last epoch; None if it did not."""
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


def plots(trainer: Any) -> Iterator[tuple[str, float]]:
    """Yield the plots that were drawn, each with the time of its drawing."""
    validator = getattr(trainer, "validator", None)
    for drawn in (trainer.plots, getattr(validator, "plots", None) or {}):
        for path, about in drawn.copy().items():  # drawing threads add to it meanwhile
            yield str(path), about["timestamp"]


def await_plots() -> None:
    """Wait for the threads that still draw plots, whose files would be missing."""
    deadline = time.monotonic() + _PLOT_DEADLINE_S
    for thread in threading.enumerate():
        if "(plot_images)" in thread.name:
            thread.join(max(deadline - time.monotonic(), 0.0))


def silence_own_loggers(trainer: Any, services: Collection[str]) -> None:
    """Take Ultralytics' own callbacks for these trackers out of a trainer."""
    for service in sorted(services & _OWN_LOGGERS.keys()):
        module = f"ultralytics.utils.callbacks.{_OWN_LOGGERS[service]}"
        found = False
        for callbacks in trainer.callbacks.values():
            kept = [c for c in callbacks if getattr(c, "__module__", None) != module]
            found = found or len(kept) < len(callbacks)
            callbacks[:] = kept
        if found:
            logger.warning(
                "Ultralytics' own %s logging is off for this training: trainbus does it", service
            )


def only_launches(trainer: Any) -> bool:
    """Return whether a trainer leaves the training to processes that it starts, one a GPU."""
    return int(getattr(trainer, "world_size", 0) or 0) > 1 and "LOCAL_RANK" not in os.environ


def warn_of_deaf_children(trainer: Any) -> None:
    """Say so where a multi-GPU training ran in processes that were given no callbacks."""
    from ultralytics.utils import dist

    if not only_launches(trainer) or "TRAINBUS_CONFIG" in os.environ:  # whose hooks they have
        return
    if "callbacks" not in getsource(dist.generate_ddp_file):
        logger.warning(
            "nothing was logged: this Ultralytics gives its multi-GPU processes no callbacks; "
            "start it by `trainbus run`, update it (8.4.190 does), or train on one GPU"
        )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
