"""Turns what a Stable-Baselines3 algorithm learns into events, from what its own logger writes.

`step` is the number of environment timesteps, over which this framework counts everything, and not
of optimizer updates, which are the metric `train/n_updates`. There are no epochs. What an update
measured carries the timestep of that update, where the framework's own files have it one log later.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from msgspec.structs import replace

from trainbus.errors import AttachError, SinkError
from trainbus.events import Best, CheckpointSaved, ModelDescribed, Resumed, RunStarted
from trainbus.hooking import Reporter, guarded, late_class, version, wrap
from trainbus.interfaces import Detach, Emit

logger = logging.getLogger("trainbus.adapters.stable_baselines3")

TESTED = "2.9.2"

_WRAPPED = ("learn", "_setup_learn", "_excluded_save_params")

NEEDS: tuple[str, ...] = tuple(
    f"stable_baselines3.common.{name}"
    for name in (
        *(f"base_class:BaseAlgorithm.{name}" for name in ("__init__", "logger", *_WRAPPED)),
        *(
            f"callbacks:BaseCallback.{name}"
            for name in (
                *("_on_training_start", "_on_rollout_start", "_on_step"),
                *("_on_rollout_end", "_on_training_end"),
            )
        ),
        "callbacks:CallbackList",
        "callbacks:CheckpointCallback._checkpoint_path",
        "callbacks:EvalCallback",
        "callbacks:StopTrainingOnMaxEpisodes",
        "callbacks:StopTrainingOnNoModelImprovement",
        "callbacks:StopTrainingOnRewardThreshold",
        "logger:KVWriter.write",
        "logger:Logger.dump",
    )
)

_SCORE = "eval/mean_reward"
_COUNTERS = {
    f"time/{name}" for name in ("episodes", "iterations", "time_elapsed", "total_timesteps")
}
# Attributes of an algorithm that are no parameters of it.
_STATE = {"exploration_rate", "lr_schedule", "num_timesteps", "start_time"}


def attach(target: Any, emit: Emit) -> Detach:
    """Have each `learn` of an algorithm, or each with a `BusCallback`, emit events.

    Args:
        target: an algorithm such as `PPO`, or a `BusCallback`.
        emit: where the events go.

    Returns:
        A function that takes the hooks out again.

    Raises:
        AttachError: the object is neither.
    """
    if isinstance(target, _Hooks):
        target.report.emit, target.report.active = emit, True
        return target.detach
    from stable_baselines3.common.base_class import BaseAlgorithm

    if not isinstance(target, BaseAlgorithm):
        raise AttachError(
            f"expected a Stable-Baselines3 algorithm, found {type(target).__qualname__}; attach "
            "the model that you call `learn()` on, or pass `callback=BusCallback(bus)` to it"
        )
    hooks = _bus_callback()()
    hooks.report.emit = emit
    around = (hooks.watch, hooks.join, hooks.exclude)
    undo = [wrap(target, name, each) for name, each in zip(_WRAPPED, around, strict=True)]

    def detach() -> None:
        hooks.detach()
        for each in undo:
            each()

    return detach


def hook(module: ModuleType, attach: Callable[[object], object]) -> None:
    """Have every algorithm attached when it first learns.

    Args:
        module: `stable_baselines3.common.base_class`.
        attach: attaches an algorithm.
    """
    init = module.BaseAlgorithm.__init__
    if hasattr(init, "_trainbus"):
        return

    @wraps(init)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        # Algorithms override `learn`: that of the object's own class is the outermost.
        _attach_at_learn(type(self), attach)
        init(self, *args, **kwargs)

    made._trainbus = True  # type: ignore[attr-defined]
    module.BaseAlgorithm.__init__ = made


def _attach_at_learn(cls: Any, attach: Callable[[object], object]) -> None:
    if hasattr(vars(cls).get("learn"), "_trainbus"):
        return
    learn = cls.learn

    @wraps(learn)
    def attached(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "learn" in vars(self):
            return learn(self, *args, **kwargs)
        try:
            attach(self)
        except Exception as error:
            logger.warning("this training is not logged: %s", error)
        return vars(self).get("learn", partial(learn, self))(*args, **kwargs)

    attached._trainbus = True  # type: ignore[attr-defined]
    cls.learn = attached


class _Hooks:
    """Reports to a bus: `model.learn(…, callback=BusCallback(bus))`.

    An algorithm tells its callbacks of no exception: the bus tells it, where its `with` ends.

    Args:
        bus: where the events go.
    """

    model: Any
    locals: dict[str, Any]

    def __init__(self, bus: Any = None) -> None:
        super().__init__()
        self.report = Reporter()
        self.is_users = bus is not None
        self._last_run: tuple[Any, str | None] = None, None
        self._formats: list[list[Any]] = []
        self._began: float | None = None
        self._of_before: dict[str, Any] = {}
        self._of_update: dict[str, Any] = {}
        if bus is not None:
            bus.attach(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the algorithm out: a copy is called by another one."""
        return {"report": self.report, "is_users": self.is_users}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        vars(self).update(state)

    def detach(self) -> None:
        """Tell nothing more."""
        self.report.active = False
        self._leave()

    # What stands around the methods of an attached algorithm.

    def watch(self, learn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Tell of the exception that leaves `learn`."""
        try:
            return learn(*args, **kwargs)
        except SinkError:
            raise
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._leave()

    def join(self, setup: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Begin the run once `_setup_learn` is done, and come after all callbacks of the user's."""
        total_timesteps, theirs = setup(*args, **kwargs)
        name = kwargs.get("tb_log_name", args[3] if len(args) > 3 else None)
        return total_timesteps, self._join(theirs, name) or theirs

    def exclude(self, excluded: Callable[[], list[str]]) -> list[str]:
        """Have the model saved without what is hung into it."""
        return [*excluded(), *_WRAPPED]

    @guarded
    def _join(self, theirs: Any, name: str | None) -> Any:
        from stable_baselines3.common.callbacks import CallbackList

        if any(isinstance(c, _Hooks) and c.is_users and c.report.active for c in _tree(theirs)):
            return None
        both: Any = CallbackList([theirs, self])
        # `init_callback` would prepare the user's callbacks a second time.
        both.model = self.model = theirs.model
        self._start(theirs, name)
        return both

    # What the algorithm calls.

    @guarded
    def _on_training_start(self) -> None:
        if self._began != self.model.start_time:
            self._start(self.locals.get("callback"), self.locals.get("tb_log_name"))
        self._enter()

    @guarded
    def _on_rollout_start(self) -> None:
        self._enter()
        self._is_in_rollout = True
        # What is there by now was measured by the update before.
        self._updated_at = self.model.num_timesteps
        self._of_update = dict(self.model.logger.name_to_value)

    @guarded
    def _on_rollout_end(self) -> None:
        self._is_in_rollout = False

    def _on_step(self) -> bool:
        self._look()
        return True

    @guarded
    def _on_training_end(self) -> None:
        if not self.report.is_open:
            return
        self._look()
        if not self._is_in_rollout:  # an update came after it
            self._of_update = {}
        self.write(self.model.logger.name_to_value, self.model.logger.name_to_excluded)
        for saved in self._best_saved.values():
            self.report.tell(replace(saved, final=True))
        self.report.end(self._reason(), self._best)
        self._leave()

    @guarded
    def write(self, key_values: Any, key_excluded: Any, step: int = 0) -> None:
        """Take what the algorithm's logger writes to its outputs."""
        if self._began != self.model.start_time:  # left behind by a `learn` that failed
            return
        kept = {
            name: value
            for name, value in key_values.items()
            if name not in _COUNTERS
            and "trainbus" not in (key_excluded.get(name) or ())
            and self._of_before.get(name) is not value
        }
        earlier = {name: v for name, v in kept.items() if self._of_update.get(name) is v}
        recent = {name: v for name, v in kept.items() if name not in earlier}
        self._of_before, self._of_update = {}, {}
        for at, values in ((self._updated_at, earlier), (self.model.num_timesteps, recent)):
            judged = {name: v for name, v in values.items() if name.startswith("eval/")}
            self.report.metrics(
                {name: v for name, v in values.items() if name not in judged}, "train", step=at
            )
            self.report.metrics(judged, "validation", step=at)

    def close(self) -> None:
        """Do nothing: the logger may be closed before the run ends."""

    # What is told.

    @guarded
    def _start(self, callback: Any, name: str | None) -> None:
        from stable_baselines3.common import callbacks as known

        if _rank():
            return
        model, (last, run) = self.model, self._last_run
        self._began, self._updated_at = model.start_time, model.num_timesteps
        # A logger of the user's may still hold what the last update of an earlier `learn` measured.
        self._of_before, self._of_update = dict(model.logger.name_to_value), {}
        self._is_in_rollout = False
        self._best: Best | None = None
        self._best_saved: dict[str, CheckpointSaved] = {}
        self._callbacks = list(_tree(callback))
        savers = [c for c in self._callbacks if isinstance(c, known.CheckpointCallback)]
        judges = [c for c in self._callbacks if isinstance(c, known.EvalCallback)]
        self._calls = {saver: saver.n_calls for saver in savers}
        self._scores = {judge: judge.best_mean_reward for judge in judges}
        folders = [*(c.save_path for c in savers), *(c.best_model_save_path for c in judges)]
        steps = int(model.num_timesteps)
        self.report.start(
            RunStarted(
                name=name,
                task="reinforcement learning",
                params=_params(model),
                framework="stable_baselines3",
                framework_version=version("stable_baselines3"),
                save_dir=next((os.path.abspath(f) for f in folders if f is not None), None),
                resumed=Resumed(run=run if last is model else None, step=steps) if steps else None,
                goals={_SCORE: "max"} if judges else {},
            )
        )
        self._last_run = model, getattr(self.report.emit, "run_id", None)
        sizes = [(w.numel(), w.requires_grad) for w in model.policy.parameters()]
        trained = sum(size for size, is_trained in sizes if is_trained)
        self.report.tell(ModelDescribed(parameters=sum(s for s, _ in sizes), gradients=trained))

    @guarded
    def _look(self) -> None:
        """Tell of the checkpoints that were written since the last look."""
        if not self.report.is_open:
            return
        for saver, calls in self._calls.items():
            if saver.n_calls != calls:
                self._calls[saver] = saver.n_calls
                if saver.n_calls % saver.save_freq == 0:
                    path = os.path.abspath(saver._checkpoint_path(extension="zip"))
                    self._save(path, "periodic", saver.num_timesteps, final=True)
        for judge, best in self._scores.items():
            score = float(judge.best_mean_reward)
            if score == best:
                continue
            self._scores[judge] = score
            if self._best is None or score > self._best.value:
                self._best = Best(metric=_SCORE, value=score)
            if judge.best_model_save_path is not None:
                path = os.path.abspath(os.path.join(judge.best_model_save_path, "best_model.zip"))
                saved = self._save(path, "best", judge.num_timesteps, metrics={_SCORE: score})
                self._best_saved |= {path: saved} if saved else {}

    def _save(self, path: str, kind: Any, step: int, **about: Any) -> CheckpointSaved | None:
        if not Path(path).exists():
            return None
        saved = CheckpointSaved(path=path, kind=kind, step=int(step), **about)
        self.report.tell(saved)
        return saved

    @guarded
    def _fail(self, error: BaseException) -> None:
        self._look()
        self.report.fail(error, rank=_rank(), best=self._best if self.report.is_open else None)

    def _reason(self) -> str | None:
        """Return what ended the training inside a rollout, None if nothing did."""
        from stable_baselines3.common import callbacks as known

        if not self._is_in_rollout:
            return None
        for stop in self._callbacks:
            match stop:
                case known.StopTrainingOnRewardThreshold(reward_threshold=least):
                    if stop.parent.best_mean_reward >= least:
                        return f"early stop: {_SCORE} reached {least:g}"
                case known.StopTrainingOnNoModelImprovement(no_improvement_evals=count):
                    if count > stop.max_no_improvement_evals:
                        return f"early stop: no better {_SCORE} in {count} evaluations"
                case known.StopTrainingOnMaxEpisodes(n_episodes=count):
                    if count >= stop._total_max_episodes:
                        return f"early stop: {count} episodes were played"
        return "early stop: a callback returned False"

    def _enter(self) -> None:
        """Be an output of the algorithm's logger, also of one that was set meanwhile."""
        formats = self.model.logger.output_formats
        if self.report.is_open and self not in formats:
            formats.append(self)
            self._formats.append(formats)

    def _leave(self) -> None:
        for formats in self._formats:
            formats[:] = [each for each in formats if each is not self]
        self._formats = []


def _tree(callback: Any) -> Iterator[Any]:
    """Yield a callback and all that it calls."""
    from stable_baselines3.common.callbacks import BaseCallback

    if isinstance(callback, BaseCallback):
        yield callback
        inner = [getattr(callback, name, None) for name in ("callback", "callback_on_new_best")]
        for each in (*getattr(callback, "callbacks", ()), *inner):
            yield from _tree(each)


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


def _rank() -> int:
    """Return the rank that a launcher gave to this process: the framework knows of none."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", ""))
    return int(rank) if rank.isdigit() else 0


def _base() -> type:
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import KVWriter

    return type("_Base", (BaseCallback, KVWriter), {})


_bus_callback = late_class(__name__, "BusCallback", _Hooks, _base)


def __getattr__(name: str) -> Any:
    if name == "BusCallback":
        return _bus_callback()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
