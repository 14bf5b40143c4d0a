"""Base of adapters: hooks that never break a training, and a reporter of runs.

Guarantees: an exception that leaves the framework's entry call passes through unchanged and ends
the run; a hook that raises is logged once and loses only its own events; values are emitted as
plain floats, counters as plain ints.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Hashable, Iterable, Mapping
from enum import IntEnum
from functools import wraps
from inspect import signature
from pkgutil import resolve_name
from types import FrameType
from typing import Any, Literal, TypeVar

from msgspec import structs

from trainbus import normalize
from trainbus.distributed import current_rank
from trainbus.errors import AttachError, SinkError
from trainbus.events import (
    Best,
    CheckpointSaved,
    EpochEnded,
    EpochStarted,
    Event,
    ModelDescribed,
    RunEnded,
    RunStarted,
    ended_by,
)
from trainbus.interfaces import Detach, Emit
from trainbus.toolkit import splitting
from trainbus.toolkit.patching import (
    after,
    around_of,
    arounds_of,
    before,
    patch,
    when_gone,
    wrap,
)

__all__ = [
    "Hooks",
    "Origin",
    "Reporter",
    "after",
    "argument",
    "around_of",
    "arounds_of",
    "before",
    "best_of",
    "described",
    "early_stop",
    "guarded",
    "late_class",
    "lazy",
    "number",
    "numbers",
    "patch",
    "phase_of",
    "tracker_of",
    "users_of",
    "variables_of",
    "version",
    "when_gone",
    "with_argument",
    "wrap",
    "wrong_target",
]

logger = logging.getLogger("trainbus")

_Hook = TypeVar("_Hook", bound=Callable[..., Any])


def number(value: Any) -> float | None:
    """Return a number, numpy scalar or tensor of one element as a float, None for anything else."""
    found, _ = normalize.metrics({"": value})
    return found.get("")


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the values that are numbers, as floats; the others are dropped."""
    found = {name: number(value) for name, value in values.items()}
    return {name: value for name, value in found.items() if value is not None}


def phase_of(data: str) -> Literal["train", "validation", "test"]:
    """Return the phase of a data set, by the beginning of its name; validation if unknown."""
    name = data.lower()
    if name.startswith(("train", "learn")):
        return "train"
    return "test" if name.startswith("test") else "validation"


def best_of(metric: str, value: Any, epoch: int | None = None) -> Best | None:
    """Return the best value of a metric, None if the value is no number."""
    found = number(value)
    return None if found is None else Best(metric=metric, value=found, epoch=epoch)


def early_stop(metric: str, patience: int, unit: str = "epochs") -> str:
    """Return the reason of a run that ended because a metric no longer improved.

    Args:
        metric: its name.
        patience: number of `unit` without an improvement.
        unit: what the framework counts: epochs, rounds, iterations, evaluations.
    """
    return f"early stop: no better {metric} in {patience} {unit}"


def wrong_target(target: object, expected: str, advice: str) -> AttachError:
    """Return the error to raise for an object that the adapter can't attach.

    Args:
        target: the object.
        expected: what the adapter attaches, with an article: "a Lightning Trainer".
        advice: what the user should do.
    """
    return AttachError(f"expected {expected}, found {type(target).__qualname__}; {advice}")


def guarded(hook: _Hook) -> _Hook:
    """Decorate a method that a framework calls, so that its errors never reach the training.

    A hook that raises returns None, and is logged once. Only the `SinkError` of a sink with
    `on_error: raise` passes. Where the framework uses what a hook returns, guard an inner method
    and return from the outer one.
    """

    @wraps(hook)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return hook(self, *args, **kwargs)
        except SinkError:
            raise
        except Exception as error:
            logged = self.__dict__.setdefault("_logged_hooks", set())
            if hook.__name__ not in logged:
                logged.add(hook.__name__)
                logger.warning(
                    "hook %s in %s raised; its events were not recorded: %s: %s (%s)",
                    *(hook.__name__.lstrip("_"), type(self).__module__),
                    *(type(error).__name__, error, _place_of(error)),
                )
            return None

    return call  # type: ignore[return-value]


def late_class(
    module: str, name: str, mixin: type, base: str | Callable[[], type]
) -> Callable[[], Any]:
    """Return a function that makes a class of `mixin` and a framework's base class, once.

    With `lazy`, a module offers the class without importing the framework, and instances can be
    pickled.

    Args:
        module: `__name__` of the adapter.
        name: name of the class.
        mixin: the hooks.
        base: the framework's class as `"package.module:Class"`, or a function that returns it.
    """
    made: list[type] = []

    def make() -> type:
        if not made:
            base_class = resolve_name(base) if isinstance(base, str) else base()
            about = {"__module__": module, "__qualname__": name, "__doc__": mixin.__doc__}
            made.append(type(name, (mixin, base_class), about))
        return made[0]

    return make


def lazy(module: str, **makers: Callable[[], Any]) -> Callable[[str], Any]:
    """Return a module's `__getattr__`, which makes an attribute when it is first used.

    Args:
        module: `__name__` of the module.
        **makers: name of the attribute → function that makes it.
    """

    def get(name: str) -> Any:
        if name in makers:
            return makers[name]()
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return get


def _place_of(error: BaseException) -> str:
    """Return file and line that an exception was raised in."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return f"{frame.f_code.co_filename}:{line}"


class Origin(IntEnum):
    """Who added a callback to a training. Of several callbacks, the highest origin reports."""

    HOOK = 0
    """`trainbus run`, by the adapter's `hook`."""
    ATTACH = 1
    """`bus.attach(…)`, by the adapter's `attach`."""
    USER = 2
    """The user's own code."""


class Reporter:
    """Reports the trainings of one framework object, one run at a time, on one rank.

    Events are dropped while no run is open: frameworks call their hooks in evaluations too.

    Args:
        emit: where the events go; None until the callback is attached.
        origin: who added the callback that reports.
        rank: returns the rank of this process.
    """

    def __init__(
        self,
        emit: Emit | None = None,
        *,
        origin: Origin = Origin.USER,
        rank: Callable[[], int] = current_rank,
    ) -> None:
        self.emit = emit
        self.origin = origin
        self.rank = rank
        self.active = True
        """Whether events are emitted; an adapter's `detach` sets it to False."""
        self.is_open = False
        self.epoch: int | None = None
        """The epoch in progress."""
        self.last_epoch: int | None = None
        """The epoch that ended last, whatever its outcome."""
        self.best: Best | None = None
        """The best value so far; `end` and `fail` record it."""
        self._epoch_began = 0.0
        self._checkpoints: dict[Hashable, CheckpointSaved] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the run out: an unpickled reporter opens runs of its own."""
        return {name: getattr(self, name) for name in ("emit", "origin", "rank", "active")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        vars(self).update(state)

    def yields_to(self, others: Iterable[Reporter]) -> bool:
        """Return whether an active one of the others has a higher origin, and reports instead."""
        return any(other.active and other.origin > self.origin for other in others)

    def connect(self, emit: Emit, release: Callable[[], object] = lambda: None) -> Detach:
        """Report to `emit` from the next run on.

        Args:
            emit: where the events go.
            release: called by the returned function, for example to unwrap a method.

        Returns:
            A function that disconnects, unless another `emit` was connected since.
        """
        self.emit, self.active = emit, True
        self.is_open, self.epoch = False, None

        def detach() -> None:
            if self.emit is emit:  # else it belongs to another bus by now
                release()
                self.active = False

        return detach

    def start(
        self, started: RunStarted, *, loggers: Iterable[object] = (), remedy: str = ""
    ) -> None:
        """Open the run.

        Args:
            started: its first event.
            loggers: callbacks of the framework, or their classes. One that logs to a tracker that
                the bus feeds too is reported in a warning.
            remedy: how the user switches the framework's own loggers off.
        """
        if self.active:
            self.is_open, self.epoch, self.last_epoch = True, None, None
            self.best, self._checkpoints = None, {}
            self.record(self._with_own_loggers(started, loggers, remedy))

    def _with_own_loggers(
        self, started: RunStarted, loggers: Iterable[object], remedy: str
    ) -> RunStarted:
        own: dict[str, str] = {}
        for each in loggers:
            kind = each if isinstance(each, type) else type(each)
            if (service := tracker_of(kind)) is not None:
                own.setdefault(service, kind.__qualname__.lstrip("_"))
        fed: frozenset[str] = frozenset() if self.emit is None else self.emit.services
        for service in sorted(own.keys() & fed):
            logger.warning(
                "%s's own %s and a sink of trainbus both log to %s; remove one of them%s",
                *(started.framework, own[service], _TRACKERS[service][0]),
                f" ({remedy})" if remedy else "",
            )
        return structs.replace(started, own_loggers=sorted(own)) if own else started

    def record(self, event: Event) -> None:
        """Emit an event if a run is open.

        Raises:
            AttachError: the callback was never attached to a bus.
        """
        if self.is_open and self.active:
            if self.emit is None:
                raise AttachError("this callback has no bus: make it with one, as `…(bus)`")
            self.emit(event)

    def start_epoch(self, epoch: int) -> None:
        """Record that an epoch starts, counted from 0."""
        self.epoch, self._epoch_began = int(epoch), time.monotonic()
        self.record(EpochStarted(epoch=self.epoch))

    def end_epoch(
        self, outcome: Literal["completed", "retried", "recovered"] = "completed"
    ) -> None:
        """Record the end of the epoch in progress, if there is one."""
        if self.epoch is not None:
            epoch, self.epoch = self.epoch, None
            self.last_epoch = epoch
            seconds = time.monotonic() - self._epoch_began
            self.record(EpochEnded(epoch=epoch, duration_s=seconds, outcome=outcome))

    def metrics(
        self,
        values: Mapping[str, Any],
        phase: str,
        *,
        epoch: int | None = None,
        step: int | None = None,
        final: bool = False,
        on_request: bool = False,
    ) -> None:
        """Record values: numbers as metrics, others as the text, image, figure or table they are.

        Args:
            values: name → number, numpy scalar, tensor, string, image, figure, table, or a mapping
                of these, which is flattened; None is skipped.
            phase: phase in which they were measured.
            epoch: their epoch.
            step: optimizer updates done.
            final: whether they evaluate the chosen weights after training.
            on_request: whether they were measured only because a sink asked for them.
        """
        if not self.is_open:
            return
        events, left_out = splitting.split(
            values,
            phase,
            epoch=None if epoch is None else int(epoch),
            step=None if step is None else int(step),
            final=final,
            on_request=on_request,
        )
        for event in events:
            self.record(event)
        if left_out and self.active and self.emit is not None:
            for what in left_out:
                self.emit.leave_out(what)

    def wants_step(self, step: int, phase: str = "train") -> bool:
        """Return whether a sink asked for the values of this step; record them `on_request`."""
        every = self.emit.every(phase) if self.emit is not None and self.is_open else None
        return every is not None and step % every == 0

    def checkpoint(self, saved: CheckpointSaved, *, slot: Hashable = None) -> None:
        """Record a saved file. `end` records the best and last files again, as final.

        Args:
            saved: the file.
            slot: what the file belongs to, for example a framework's checkpoint callback: of the
                files of one slot only the newest becomes final. Default: the path.
        """
        self.record(saved)
        slot = saved.path if slot is None else slot
        if saved.final or saved.kind == "periodic":
            self._checkpoints.pop(slot, None)
        else:
            self._checkpoints[slot] = saved

    def end(
        self,
        reason: str | None = None,
        best: Best | None = None,
        *,
        status: Literal["finished", "stopped"] = "finished",
    ) -> None:
        """Record that the training ended without an error.

        Args:
            reason: why it ended before all planned epochs were done.
            best: the best value; default: `self.best`.
            status: `finished` completes the epoch in progress and records the files that are still
                there as final; `stopped` is for a training that was interrupted.
        """
        self._end(RunEnded(status=status, reason=reason, best=best or self.best))

    def fail(
        self, error: BaseException, *, rank: int | None = None, best: Best | None = None
    ) -> None:
        """Record the exception that ended the training: `stopped` by Ctrl-C or exit, else `failed`.

        Args:
            error: what left the framework's entry call.
            rank: rank of this process; default: `self.rank()`. Only the main rank has a run open.
            best: the best value; default: `self.best`.
        """
        try:
            self._fail(error, rank, best)
        except SinkError:
            raise
        except Exception:
            # A signal handler may raise anywhere in this thread, but only once.
            self._fail(error, rank, best)

    def _fail(self, error: BaseException, rank: int | None, best: Best | None) -> None:
        rank = self.rank() if rank is None else rank
        if rank and self.active and self.emit is not None:
            self.emit.failed_on(rank, error)
        else:
            self._end(ended_by(error, best=best or self.best))

    def watch(
        self,
        rank: Callable[[], int] | None = None,
        best: Callable[[], Best | None] = lambda: None,
    ) -> Callable[..., Any]:
        """Return the wrapper of a framework's entry call that records its exceptions.

        Args:
            rank: returns the rank of this process, called on an exception; default: `self.rank`.
            best: returns the best value so far, called on an exception.
        """
        return _Watch(self, rank or self.rank, best)

    def _end(self, event: RunEnded) -> None:
        if event.status == "finished":
            for saved in self._checkpoints.values():
                if os.path.exists(saved.path):
                    self.record(structs.replace(saved, final=True))
            self.end_epoch()
        self.record(event)
        self.is_open = False
        self.epoch = None


class Hooks:
    """Base of an adapter's hooks, which `late_class` mixes into a framework's callback.

    It creates the `report`, attaches itself to the given bus, and leaves the run out of copies and
    pickles. A subclass keeps the state of a run in attributes that `reset` sets.

    Args:
        bus: the bus to attach to.
        origin: who adds the callback to a training.
    """

    def __init__(self, bus: Any = None, *, origin: Origin = Origin.USER) -> None:
        super().__init__()
        self.report = Reporter(origin=origin)
        self.reset()
        if bus is not None:
            bus.attach(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the run out: a copy opens runs of its own."""
        return {"report": self.report}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.report = state["report"]

    def reset(self) -> None:
        """Forget the run; called before the first one."""


_HooksT = TypeVar("_HooksT", bound=Hooks)


def users_of(callbacks: Iterable[object], kind: type[_HooksT]) -> list[_HooksT]:
    """Return the callbacks of a class that the user's own code added."""
    ours = [each for each in callbacks if isinstance(each, kind)]
    return [each for each in ours if each.report.origin is Origin.USER]


def variables_of(module: str, function: str) -> dict[str, Any]:
    """Return the local variables of a function that is running, the innermost call of it.

    For frameworks that pass a callback neither their arguments nor the other callbacks.

    Args:
        module: `__name__` of the module that defines the function.
        function: its name.

    Returns:
        name → value; empty if the function is not running in this thread.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == function and frame.f_globals.get("__name__") == module:
            return dict(frame.f_locals)
        frame = frame.f_back
    return {}


def argument(
    function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Return what a call passes for a parameter, by position or name; None if nothing."""
    place = _place(function, name)
    return args[place] if place < len(args) else kwargs.get(name)


def with_argument(
    function: Callable[..., Any],
    name: str,
    value: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with another value for a parameter."""
    place = _place(function, name)
    if place < len(args):
        return (*args[:place], value, *args[place + 1 :]), dict(kwargs)
    return args, {**kwargs, name: value}


def _place(function: Callable[..., Any], name: str) -> int:
    names = list(signature(function).parameters)
    return names.index(name) if name in names else sys.maxsize


_TRACKERS = {
    "wandb": ("Weights & Biases", "wandb"),
    "mlflow": ("MLflow", "mlflow"),
    "tensorboard": ("TensorBoard", "tensorboard"),
    "comet_ml": ("Comet", "comet"),
    "clearml": ("ClearML", "clearml"),
    "dvclive": ("DVCLive", "dvclive"),
    "swanlab": ("SwanLab", "swanlab"),
    "trackio": ("Trackio", "trackio"),
    "neptune": ("Neptune", "neptune"),
    "aim": ("Aim", "aim"),
}
"""Import name of a tracker → its display name, and the prefix of classes that log to it."""

_FRAMEWORKS = (
    *("accelerate", "ignite", "keras", "lightgbm", "lightning", "pytorch_lightning", "sklearn"),
    *("skorch", "stable_baselines3", "transformers", "xgboost", "optuna"),
)


def tracker_of(callback: type) -> str | None:
    """Return the import name of the tracker that a class logs to, None if it is no logger.

    These are the classes of the tracker's own package, such as `wandb.integration`, and those of a
    framework that are named after it, such as `WandbLogger`. Nothing is imported.
    """
    for kind in callback.__mro__:
        package = str(kind.__module__).partition(".")[0]
        name = kind.__name__.lstrip("_").lower()
        if package in _TRACKERS:
            return package
        if package in _FRAMEWORKS:
            for service, (_, start) in _TRACKERS.items():
                if name.startswith(start):
                    return service
    return None


class _Watch:
    def __init__(
        self, reporter: Reporter, rank: Callable[[], int], best: Callable[[], Best | None]
    ) -> None:
        self._reporter = reporter
        self._rank = rank
        self._best = best

    def __call__(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except SinkError:
            raise
        except BaseException as error:
            try:
                self._reporter.fail(error, rank=self._rank(), best=self._best())
            except SinkError as second:
                self._warn(second)  # the user needs to see their own error
            except Exception:  # rank or best can't be found out any more
                try:
                    self._reporter.fail(error, rank=self._rank())
                except Exception as second:
                    self._warn(second)
            raise

    def _warn(self, error: Exception) -> None:
        logger.warning("the end of this run was not recorded: %s", error)


def described(parameters: Iterable[Any], layers: int | None = None) -> ModelDescribed:
    """Return the size of a PyTorch model; parameters that are shared count once.

    Args:
        parameters: tensors of one or several models.
        layers: number of modules.
    """
    found = {id(each): each for each in parameters}.values()
    return ModelDescribed(
        parameters=sum(each.numel() for each in found),
        gradients=sum(each.numel() for each in found if each.requires_grad),
        layers=layers,
    )


def version(framework: str) -> str | None:
    """Return the version of an imported framework, None if it has none."""
    return getattr(sys.modules.get(framework), "__version__", None)
