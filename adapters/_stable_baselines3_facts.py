"""What an algorithm and its callbacks say of a training: how it starts, and why it ended."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from trainbus.events import Resumed, RunStarted
from trainbus.toolkit.adapters import version

SCORE = "eval/mean_reward"

# Attributes of an algorithm that are no parameters of it.
_STATE = {"exploration_rate", "lr_schedule", "num_timesteps", "start_time"}


def callbacks_of(callback: Any) -> Iterator[Any]:
    """Yield a callback and all that it calls; nothing if it is none of the framework's."""
    from stable_baselines3.common.callbacks import BaseCallback

    if isinstance(callback, BaseCallback):
        yield callback
        inner = [getattr(callback, name, None) for name in ("callback", "callback_on_new_best")]
        for each in (*getattr(callback, "callbacks", ()), *inner):
            yield from callbacks_of(each)


def started(model: Any, name: str | None, callbacks: Sequence[Any], run: str | None) -> RunStarted:
    """Return the start of a `learn`.

    Args:
        model: the algorithm, which has set it up.
        name: the name that the user gave it.
        callbacks: all that are called in it.
        run: id of the run that it goes on with, if it goes on with one.
    """
    from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback

    judges = [c for c in callbacks if isinstance(c, EvalCallback)]
    folders = [c.save_path for c in callbacks if isinstance(c, CheckpointCallback)]
    folders += [c.best_model_save_path for c in judges]
    steps = int(model.num_timesteps)
    return RunStarted(
        name=name,
        task="reinforcement learning",
        params=_params(model),
        framework="stable_baselines3",
        framework_version=version("stable_baselines3"),
        save_dir=next((os.path.abspath(f) for f in folders if f is not None), None),
        resumed=Resumed(run=run, step=steps) if steps else None,
        goals={SCORE: "max"} if judges else {},
    )


def _params(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "algorithm": type(model).__name__,
        "policy": model.policy_class.__name__,
        "policy_kwargs": model.policy_kwargs,
        "env": _env(model.env),
        "device": str(model.device),
        "total_timesteps": model._total_timesteps,
    }
    for name, value in vars(model).items():
        if name.startswith("_") or name in _STATE | found.keys():
            continue
        value = getattr(getattr(value, "value_schedule", None), "val", value)  # a constant one
        if value is None or isinstance(value, bool | int | float | str):
            found[name] = value
        elif name == "train_freq":  # such as 4 of TrainFrequencyUnit.STEP
            found[name] = " ".join(str(getattr(part, "value", part)) for part in value)
        elif name in ("learning_rate", "clip_range", "clip_range_vf"):
            found[name] = str(value)
    return found


def _env(env: Any) -> str | None:
    try:
        spec = env.get_attr("spec", indices=[0])[0]
        return str(spec.id if spec is not None else type(env.unwrapped.envs[0].unwrapped).__name__)
    except Exception:  # an environment of the user's, or one in a process of its own
        return None


def stop_reason(callbacks: Sequence[Any]) -> str:
    """Return which of the callbacks has ended a training inside a rollout."""
    from stable_baselines3.common import callbacks as known

    for stop in callbacks:
        match stop:
            case known.StopTrainingOnRewardThreshold(reward_threshold=least):
                if stop.parent.best_mean_reward >= least:
                    return f"early stop: {SCORE} reached {least:g}"
            case known.StopTrainingOnNoModelImprovement(no_improvement_evals=count):
                if count > stop.max_no_improvement_evals:
                    return f"early stop: no better {SCORE} in {count} evaluations"
            case known.StopTrainingOnMaxEpisodes(n_episodes=count):
                if count >= stop._total_max_episodes:
                    return f"early stop: {count} episodes were played"
    return "early stop: a callback returned False"
