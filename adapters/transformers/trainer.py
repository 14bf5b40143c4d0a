"""Reads a transformers Trainer: its arguments, state and log, and why it ended."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from trainbus.events import Best, CheckpointSaved, ModelDescribed, Resumed, RunStarted
from trainbus.toolkit.adapters import early_stop, numbers, version

_PHASES = {"eval_": "validation", "test_": "test"}
_ROUNDING = 1e-6


def phase(name: str) -> str:
    """Return the phase of a logged value, by the prefix of its name."""
    return next((phase for prefix, phase in _PHASES.items() if name.startswith(prefix)), "train")


def started(args: Any, state: Any, model: Any, folder: Path, checkpoint: Any) -> RunStarted:
    """Return the start of a training.

    Args:
        args: its `TrainingArguments`.
        state: its `TrainerState`, past step 0 if it is resumed.
        model: the model.
        folder: absolute path of its output folder.
        checkpoint: `resume_from_checkpoint`: a path, True or None.
    """
    config: Any = getattr(model, "config", None)
    config = config.to_dict() if hasattr(config, "to_dict") else config
    metric = _monitored(args)
    return RunStarted(
        name=args.run_name,
        params={**args.to_dict(), **({"model": config} if config else {})},
        framework="transformers",
        framework_version=version("transformers"),
        save_dir=str(folder),
        world_size=int(args.world_size),
        resumed=_resumed(state, folder, checkpoint) if state.global_step else None,
        goals={metric: "max" if args.greater_is_better else "min"} if metric else {},
    )


def _resumed(state: Any, folder: Path, checkpoint: Any) -> Resumed:
    begun, before = next_epoch(state), folder
    if isinstance(checkpoint, str | os.PathLike):
        before = Path(checkpoint).absolute().parent
    return Resumed(
        epoch=begun - 1 if begun else None,
        step=int(state.global_step),
        save_dir=None if before == folder else str(before),
    )


def next_epoch(state: Any) -> int:
    """Return the next epoch, from 0; the state has a float, which is whole where an epoch ends."""
    return int((state.epoch or 0) + _ROUNDING)


def described(model: Any) -> ModelDescribed:
    """Return the size of a model, also if DeepSpeed shards it."""
    from transformers.trainer_pt_utils import get_model_param_count

    return ModelDescribed(
        parameters=get_model_param_count(model),
        gradients=get_model_param_count(model, trainable_only=True),
        layers=sum(1 for _ in model.modules()),
    )


def checkpoints(state: Any, folder: Path, epoch: int | None) -> list[CheckpointSaved]:
    """Return the events of a new checkpoint: as periodic, best (if it is) and last."""
    saved = partial(
        CheckpointSaved,
        path=str(folder),
        epoch=epoch,
        step=int(state.global_step),
        metrics=_scores(state),
        final=True,
    )
    found = [saved(kind="periodic"), saved(kind="last")]
    top = state.best_model_checkpoint
    if top is not None and Path(top).absolute() == folder:
        found.insert(1, saved(kind="best"))
    return found


def _scores(state: Any) -> dict[str, Any]:
    """Return the values of the evaluation of this step."""
    found: dict[str, Any] = {}
    for log in reversed(state.log_history):
        if log.get("step") != state.global_step:
            break
        found |= numbers({k: v for k, v in log.items() if phase(k) == "validation"})
    return found


def best(args: Any, state: Any) -> Best | None:
    """Return the best value of `metric_for_best_model`, and the first epoch that reached it."""
    metric = _monitored(args)
    if metric is None or state.best_metric is None:
        return None
    for log in state.log_history:
        if log.get(metric) == state.best_metric:
            # A float, which is whole where an epoch ends.
            epoch = max(math.ceil(log.get("epoch", 0) - _ROUNDING) - 1, 0)
            return Best(metric=metric, value=float(state.best_metric), epoch=epoch)
    return None


def why_ended(args: Any, state: Any, control: Any, *, by_evaluation: bool) -> str | None:
    """Return why a training ended, None if it did all planned steps.

    Args:
        args: its `TrainingArguments`.
        state: its `TrainerState` at the end.
        control: its `TrainerControl` at the end.
        by_evaluation: whether the last step was evaluated before anything stopped the training.
    """
    if state.global_step >= state.max_steps:
        return f"max_steps of {args.max_steps} done" if args.max_steps > 0 else None
    at = f"at step {state.global_step} of {state.max_steps}"
    if not control.should_training_stop:
        return f"ended {at}"
    if by_evaluation:
        patience = next(_patience(state), None)
        if patience is not None:
            return early_stop(str(_monitored(args)), patience, "evaluations")
        return f"early stop: by a callback, after the evaluation {at}"
    return f"stopped by a callback {at}"


def _patience(state: Any) -> Iterator[int]:
    for kept in state.stateful_callbacks.values():
        for each in kept if isinstance(kept, list) else [kept]:
            if "early_stopping_patience" in each.get("args", {}):
                yield each["args"]["early_stopping_patience"]


def _monitored(args: Any) -> str | None:
    metric = args.metric_for_best_model
    return metric if metric is None or metric.startswith("eval_") else f"eval_{metric}"
