"""Turns the training of a Stable-Baselines3 algorithm into events, from what its logger writes.

`step` is the number of environment timesteps, by which this framework counts everything, not that
of optimizer updates, which is the metric `train/n_updates`. There are no epochs. The metrics of an
update have the timestep of that update; the framework's own files have them one log later.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from trainbus.events import Best, CheckpointSaved, Resumed, RunStarted
from trainbus.interfaces import Detach, Emit
from trainbus.toolkit.adapters import (
    Hooks,
    Origin,
    Reporter,
    described,
    early_stop,
    guarded,
    late_class,
    lazy,
    patch,
    version,
    wrap,
    wrong_target,
)

TESTED_VERSIONS = "2.9.2"

_WRAPPED = ("learn", "_setup_learn", "_excluded_save_params")
_ALGORITHM = ("__init__", "logger", *_WRAPPED)
_CALLED = ("training_start", "rollout_start", "step", "rollout_end", "training_end")
_STOPS = ("MaxEpisodes", "NoModelImprovement", "RewardThreshold")

REQUIRED_NAMES: tuple[str, ...] = (
    *(f"stable_baselines3.common.base_class:BaseAlgorithm.{name}" for name in _ALGORITHM),
    *(f"stable_baselines3.common.callbacks:BaseCallback._on_{name}" for name in _CALLED),
    *(f"stable_baselines3.common.callbacks:StopTrainingOn{name}" for name in _STOPS),
    "stable_baselines3.common.callbacks:CallbackList",
    "stable_baselines3.common.callbacks:CheckpointCallback._checkpoint_path",
    "stable_baselines3.common.callbacks:EvalCallback",
    "stable_baselines3.common.logger:KVWriter.write",
    "stable_baselines3.common.logger:Logger.dump",
)

_SCORE = "eval/mean_reward"


def attach(target: Any, emit: Emit) -> Detach:
    """Report each `learn` of an algorithm, or each that a `BusCallback` is passed to.

    Args:
        target: an algorithm such as `PPO`, or a `BusCallback`.
        emit: where the events go.

    Returns:
        A function that removes the hooks.

    Raises:
        AttachError: the object is neither.
    """
    if isinstance(target, _Hooks):
        return target.report.connect(emit, target.leave_loggers)
    from stable_baselines3.common.base_class import BaseAlgorithm

    if not isinstance(target, BaseAlgorithm):
        advice = "attach the model that you call `learn()` on, or pass `callback=BusCallback(bus)`"
        raise wrong_target(target, "a Stable-Baselines3 algorithm", advice)
    hooks: _Hooks = _bus_callback()(origin=Origin.ATTACH)
    # A model is saved without its wrappers.
    around = (hooks.watch, hooks.join, lambda excluded: [*excluded(), *_WRAPPED])
    undo = [wrap(target, name, each) for name, each in zip(_WRAPPED, around, strict=True)]

    def release() -> None:
        hooks.leave_loggers()
        for each in undo:
            each()

    return hooks.report.connect(emit, release)


def hook(module: ModuleType, attach: Callable[[object], object]) -> None:
    """Attach every algorithm when it first learns.

    Args:
        module: `stable_baselines3.common.base_class`.
        attach: attaches an algorithm.
    """

    def make(init: Callable[..., Any], model: Any, /, *args: Any, **kwargs: Any) -> None:
        # Algorithms override `learn`: the one of the object's own class is the outermost.
        patch(type(model), "learn", learn)
        init(model, *args, **kwargs)

    def learn(method: Callable[..., Any], model: Any, /, *args: Any, **kwargs: Any) -> Any:
        if "learn" not in vars(model):
            attach(model)
            if "learn" in vars(model):  # its wrapper calls this function again
                return model.learn(*args, **kwargs)
        return method(model, *args, **kwargs)

    patch(module.BaseAlgorithm, "__init__", make)


class _Hooks(Hooks):
    """Reports to a bus: `model.learn(…, callback=BusCallback(bus))`.

    An algorithm does not pass exceptions to its callbacks: the bus records them when its `with`
    block ends.

    Args:
        bus: where the events go.
    """

    model: Any
    locals: dict[str, Any]

    def reset(self) -> None:
        self._last_run: tuple[Any, str | None] = None, None
        self._outputs: list[list[Any]] = []
        """Outputs of the loggers that this was added to."""
        self._began: float | None = None
        self._values = _Values()

    def watch(self, learn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Record the exception that leaves `learn`."""
        try:
            return self.report.watch(best=self._last_best)(learn, *args, **kwargs)
        finally:
            self.leave_loggers()

    def join(self, setup: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Start the run when `_setup_learn` returns, and add this after the user's callbacks."""
        total_timesteps, users = setup(*args, **kwargs)
        name = kwargs.get("tb_log_name", args[3] if len(args) > 3 else None)
        return total_timesteps, self._join(users, name) or users

    @guarded
    def _join(self, users: Any, name: str | None) -> Any:
        from stable_baselines3.common.callbacks import CallbackList

        others = (each.report for each in _callbacks_of(users) if isinstance(each, _Hooks))
        if self.report.yields_to(other for other in others if other.emit is not None):
            return None
        both: Any = CallbackList([users, self])
        # `init_callback` would prepare the user's callbacks a second time.
        both.model = self.model = users.model
        self._start(users, name)
        return both

    @guarded
    def _on_training_start(self) -> None:
        if self._began != self.model.start_time:
            self._start(self.locals.get("callback"), self.locals.get("tb_log_name"))
        self._join_logger()

    @guarded
    def _on_rollout_start(self) -> None:
        self._join_logger()
        self._is_in_rollout = True
        # The logger holds the values of the update before.
        self._values.updated(self.model.num_timesteps, self.model.logger.name_to_value)

    @guarded
    def _on_rollout_end(self) -> None:
        self._is_in_rollout = False

    def _on_step(self) -> bool:
        self._record_checkpoints()
        return True

    @guarded
    def _on_training_end(self) -> None:
        if not self.report.is_open:
            return
        self._record_checkpoints()
        if not self._is_in_rollout:  # an update came after it
            self._values.updated(self.model.num_timesteps, {})
        self.write(self.model.logger.name_to_value, self.model.logger.name_to_excluded)
        self.report.end(_stop_reason(self._callbacks) if self._is_in_rollout else None)
        self.leave_loggers()

    def _join_logger(self) -> None:
        """Become an output of the model's logger, which may have been replaced meanwhile."""
        outputs = self.model.logger.output_formats
        if self.report.is_open and self not in outputs:
            outputs.append(self)
            self._outputs.append(outputs)

    def leave_loggers(self) -> None:
        """Remove this from the outputs of every logger."""
        for outputs in self._outputs:
            outputs[:] = [each for each in outputs if each is not self]
        self._outputs = []

    @guarded
    def write(self, key_values: Any, key_excluded: Any, step: int = 0) -> None:
        """Record what the algorithm's logger writes to its outputs."""
        if self._began != self.model.start_time:  # added by a `learn` that failed
            return
        now = self.model.num_timesteps
        for at, phase, values in self._values.split(key_values, key_excluded, now):
            self.report.metrics(values, phase, step=at)

    def close(self) -> None:
        """Do nothing: the logger may be closed before the run ends."""

    @guarded
    def _start(self, callback: Any, name: str | None) -> None:
        if self.report.rank():
            return
        model, (last, run) = self.model, self._last_run
        self._began = model.start_time
        # The user's logger may still hold values from the last update of an earlier `learn`.
        self._values = _Values(model.num_timesteps, model.logger.name_to_value)
        self._is_in_rollout = False
        self._callbacks = list(_callbacks_of(callback))
        self._checkpoints = _Checkpoints(self.report, self._callbacks)
        self.report.start(
            _started(model, name, self._callbacks, run if last is model else None),
            loggers=(*self._callbacks, *model.logger.output_formats),
            remedy="leave out tensorboard_log, or the callback",
        )
        self._last_run = model, getattr(self.report.emit, "run_id", None)
        self.report.record(described(model.policy.parameters()))

    @guarded
    def _record_checkpoints(self) -> None:
        if self.report.is_open:
            self._checkpoints.record()

    def _last_best(self) -> Best | None:
        """Return the best evaluation, after recording the last checkpoints."""
        self._record_checkpoints()
        return self.report.best


def _base() -> type:
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import KVWriter

    return type("_Base", (BaseCallback, KVWriter), {})


_bus_callback = late_class(__name__, "BusCallback", _Hooks, _base)
__getattr__ = lazy(__name__, BusCallback=_bus_callback)


class _Values:
    """The values of one `learn`; the logger writes those of an update one log late.

    Args:
        step: timestep at which it starts.
        earlier: what the logger holds at that time, which belongs to an earlier `learn`.
    """

    def __init__(self, step: int = 0, earlier: Mapping[str, Any] | None = None) -> None:
        self._earlier = dict(earlier or {})
        self._of_update: dict[str, Any] = {}
        self._updated_at = step

    def updated(self, step: int, held: Mapping[str, Any]) -> None:
        """Set the timestep of the last update, and its values that the logger still holds."""
        self._updated_at, self._of_update = step, dict(held)

    def split(
        self, written: Mapping[str, Any], excluded: Mapping[str, Any], step: int
    ) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """Yield the values that are written to the logger's outputs: timestep, phase and values.

        Args:
            written: all that the logger holds.
            excluded: name → the outputs that must not get it.
            step: the current timestep.
        """
        kept = {
            name: value
            for name, value in written.items()
            if name not in _COUNTERS
            and "trainbus" not in (excluded.get(name) or ())
            and self._earlier.get(name) is not value
        }
        of_update = {name: v for name, v in kept.items() if self._of_update.get(name) is v}
        recent = {name: v for name, v in kept.items() if name not in of_update}
        self._earlier, self._of_update = {}, {}
        for at, values in ((self._updated_at, of_update), (step, recent)):
            evaluated = {name: v for name, v in values.items() if name.startswith("eval/")}
            yield at, "train", {name: v for name, v in values.items() if name not in evaluated}
            yield at, "validation", evaluated


_COUNTERS = {
    f"time/{name}" for name in ("episodes", "iterations", "time_elapsed", "total_timesteps")
}


class _Checkpoints:
    """The checkpoints and best evaluations of the user's callbacks, which announce neither.

    Args:
        report: records them.
        callbacks: all callbacks of one `learn`, before they are called.
    """

    def __init__(self, report: Reporter, callbacks: Sequence[Any]) -> None:
        from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback

        self._report = report
        self._calls = {c: c.n_calls for c in callbacks if isinstance(c, CheckpointCallback)}
        self._scores = {c: c.best_mean_reward for c in callbacks if isinstance(c, EvalCallback)}

    def record(self) -> None:
        """Record the checkpoints that were written since the last call."""
        for saver, calls in self._calls.items():
            if saver.n_calls == calls:
                continue
            self._calls[saver] = saver.n_calls
            if saver.n_calls % saver.save_freq == 0:
                path = os.path.abspath(saver._checkpoint_path(extension="zip"))
                step = int(saver.num_timesteps)
                self._record(CheckpointSaved(path=path, kind="periodic", step=step, final=True))
        for evaluator, before in self._scores.items():
            score = float(evaluator.best_mean_reward)
            if score == before:
                continue
            self._scores[evaluator] = score
            if self._report.best is None or score > self._report.best.value:
                self._report.best = Best(metric=_SCORE, value=score)
            if evaluator.best_model_save_path is not None:
                path = os.path.join(evaluator.best_model_save_path, "best_model.zip")
                step, scores = int(evaluator.num_timesteps), {_SCORE: score}
                path = os.path.abspath(path)
                self._record(CheckpointSaved(path=path, kind="best", step=step, metrics=scores))

    def _record(self, saved: CheckpointSaved) -> None:
        if os.path.exists(saved.path):
            self._report.checkpoint(saved)


def _callbacks_of(callback: Any) -> Iterator[Any]:
    """Yield a callback and all that it calls; nothing for what is not a callback."""
    from stable_baselines3.common.callbacks import BaseCallback

    if isinstance(callback, BaseCallback):
        yield callback
        inner = [getattr(callback, name, None) for name in ("callback", "callback_on_new_best")]
        for each in (*getattr(callback, "callbacks", ()), *inner):
            yield from _callbacks_of(each)


def _started(model: Any, name: str | None, callbacks: Sequence[Any], run: str | None) -> RunStarted:
    """Return the start of a `learn`.

    Args:
        model: the algorithm, which is set up.
        name: the user's name for it.
        callbacks: all that are called in it.
        run: id of the run that it continues, if it does.
    """
    from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback

    evaluators = [c for c in callbacks if isinstance(c, EvalCallback)]
    folders = [c.save_path for c in callbacks if isinstance(c, CheckpointCallback)]
    folders += [c.best_model_save_path for c in evaluators]
    steps = int(model.num_timesteps)
    return RunStarted(
        name=name,
        task="reinforcement learning",
        params=_params(model),
        framework="stable_baselines3",
        framework_version=version("stable_baselines3"),
        save_dir=next((os.path.abspath(f) for f in folders if f is not None), None),
        resumed=Resumed(run=run, step=steps) if steps else None,
        goals={_SCORE: "max"} if evaluators else {},
    )


_STATE = {"exploration_rate", "lr_schedule", "num_timesteps", "start_time"}
"""Attributes of an algorithm that are not parameters."""


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
    except Exception:  # a user's environment, or one in a process of its own
        return None


def _stop_reason(callbacks: Sequence[Any]) -> str:
    """Return which of the callbacks ended a training inside a rollout."""
    from stable_baselines3.common import callbacks as known

    for stop in callbacks:
        match stop:
            case known.StopTrainingOnRewardThreshold(reward_threshold=least):
                if stop.parent.best_mean_reward >= least:
                    return f"early stop: {_SCORE} reached {least:g}"
            case known.StopTrainingOnNoModelImprovement(no_improvement_evals=count):
                if count > stop.max_no_improvement_evals:
                    return early_stop(_SCORE, count, "evaluations")
            case known.StopTrainingOnMaxEpisodes(n_episodes=count):
                if count >= stop._total_max_episodes:
                    return f"early stop: {count} episodes were played"
    return "early stop: a callback returned False"
