"""Turns what a Stable-Baselines3 algorithm learns into events, from what its own logger writes.

`step` is the number of environment timesteps, over which this framework counts everything, and not
of optimizer updates, which are the metric `train/n_updates`. There are no epochs. What an update
measured carries the timestep of that update, where the framework's own files have it one log later.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from trainbus.distributed import current_rank
from trainbus.errors import AttachError
from trainbus.events import Best
from trainbus.interfaces import Detach, Emit
from trainbus.toolkit.adapters import Reporter, described, guarded, late_class, patch, wrap

from ._stable_baselines3_checkpoints import Checkpoints
from ._stable_baselines3_facts import callbacks_of, started, stop_reason
from ._stable_baselines3_outputs import Outputs
from ._stable_baselines3_values import Values

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
        return target.report.connect(emit, target.detach)
    from stable_baselines3.common.base_class import BaseAlgorithm

    if not isinstance(target, BaseAlgorithm):
        raise AttachError(
            f"expected a Stable-Baselines3 algorithm, found {type(target).__qualname__}; attach "
            "the model that you call `learn()` on, or pass `callback=BusCallback(bus)` to it"
        )
    hooks = _bus_callback()()
    hooks.report.connect(emit)
    # A model is saved without what is hung into it.
    around = (hooks.watch, hooks.join, lambda excluded: [*excluded(), *_WRAPPED])
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

    def make(init: Callable[..., Any], model: Any, /, *args: Any, **kwargs: Any) -> None:
        # Algorithms override `learn`: that of the object's own class is the outermost.
        patch(type(model), "learn", learn)
        init(model, *args, **kwargs)

    def learn(method: Callable[..., Any], model: Any, /, *args: Any, **kwargs: Any) -> Any:
        if "learn" not in vars(model):
            attach(model)
            if "learn" in vars(model):  # it comes back here
                return model.learn(*args, **kwargs)
        return method(model, *args, **kwargs)

    patch(module.BaseAlgorithm, "__init__", make)


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
        self._outputs = Outputs(self)
        self._began: float | None = None
        self._values = Values()
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
        self._outputs.leave()

    def watch(self, learn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Tell of the exception that leaves `learn`."""
        try:
            return self.report.watch(current_rank, self._last_look)(learn, *args, **kwargs)
        finally:
            self._outputs.leave()

    def join(self, setup: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Begin the run once `_setup_learn` is done, and come after all callbacks of the user's."""
        total_timesteps, theirs = setup(*args, **kwargs)
        name = kwargs.get("tb_log_name", args[3] if len(args) > 3 else None)
        return total_timesteps, self._join(theirs, name) or theirs

    @guarded
    def _join(self, theirs: Any, name: str | None) -> Any:
        from stable_baselines3.common.callbacks import CallbackList

        users = [c for c in callbacks_of(theirs) if isinstance(c, _Hooks) and c.is_users]
        if any(callback.report.active for callback in users):
            return None
        both: Any = CallbackList([theirs, self])
        # `init_callback` would prepare the user's callbacks a second time.
        both.model = self.model = theirs.model
        self._start(theirs, name)
        return both

    @guarded
    def _on_training_start(self) -> None:
        if self._began != self.model.start_time:
            self._start(self.locals.get("callback"), self.locals.get("tb_log_name"))
        if self.report.is_open:
            self._outputs.enter(self.model.logger)

    @guarded
    def _on_rollout_start(self) -> None:
        if self.report.is_open:
            self._outputs.enter(self.model.logger)
        self._is_in_rollout = True
        # What is there by now was measured by the update before.
        self._values.updated(self.model.num_timesteps, self.model.logger.name_to_value)

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
            self._values.updated(self.model.num_timesteps, {})
        self.write(self.model.logger.name_to_value, self.model.logger.name_to_excluded)
        for saved in self._checkpoints.final():
            self.report.tell(saved)
        reason = stop_reason(self._callbacks) if self._is_in_rollout else None
        self.report.end(reason, self._checkpoints.best)
        self._outputs.leave()

    @guarded
    def write(self, key_values: Any, key_excluded: Any, step: int = 0) -> None:
        """Take what the algorithm's logger writes to its outputs."""
        if self._began != self.model.start_time:  # left behind by a `learn` that failed
            return
        now = self.model.num_timesteps
        for at, phase, values in self._values.sort(key_values, key_excluded, now):
            self.report.metrics(values, phase, step=at)

    def close(self) -> None:
        """Do nothing: the logger may be closed before the run ends."""

    @guarded
    def _start(self, callback: Any, name: str | None) -> None:
        if current_rank():
            return
        model, (last, run) = self.model, self._last_run
        self._began = model.start_time
        # A logger of the user's may still hold what the last update of an earlier `learn` measured.
        self._values = Values(model.num_timesteps, model.logger.name_to_value)
        self._is_in_rollout = False
        self._callbacks = list(callbacks_of(callback))
        self._checkpoints = Checkpoints(self._callbacks)
        self.report.start(
            started(model, name, self._callbacks, run if last is model else None),
            loggers=(*self._callbacks, *model.logger.output_formats),
            remedy="leave out tensorboard_log, or the callback",
        )
        self._last_run = model, getattr(self.report.emit, "run_id", None)
        self.report.tell(described(model.policy.parameters()))

    @guarded
    def _look(self) -> None:
        """Tell of the checkpoints that were written since the last look."""
        if self.report.is_open:
            for saved in self._checkpoints.new():
                self.report.tell(saved)

    def _last_look(self) -> Best | None:
        """Return the best evaluation, after all checkpoints are told."""
        self._look()
        return self._checkpoints.best if self.report.is_open else None


def _base() -> type:
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import KVWriter

    return type("_Base", (BaseCallback, KVWriter), {})


_bus_callback = late_class(__name__, "BusCallback", _Hooks, _base)


def __getattr__(name: str) -> Any:
    if name == "BusCallback":
        return _bus_callback()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
