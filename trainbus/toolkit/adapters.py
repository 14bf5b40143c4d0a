"""What adapters have in common: hooks that can't hurt a training, and a run told in a few calls.

Guarantees: an exception that leaves the framework's entry call passes through unchanged, and ends
the run; what goes wrong in a hook is said once and costs the events of that hook alone; numbers
leave as plain floats and counters as plain ints.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, Literal, TypeVar

from msgspec import structs

from trainbus import normalize
from trainbus.errors import AttachError, SinkError
from trainbus.events import (
    Best,
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
from trainbus.toolkit.patching import around_of, arounds_of, patch, when_gone, wrap

__all__ = [
    "Reporter",
    "around_of",
    "arounds_of",
    "described",
    "guarded",
    "late_class",
    "number",
    "patch",
    "tracker_of",
    "version",
    "when_gone",
    "wrap",
]

logger = logging.getLogger("trainbus")

_Hook = TypeVar("_Hook", bound=Callable[..., Any])


def number(value: Any) -> float | None:
    """Return a number, numpy scalar or tensor of one element as a float, None for anything else."""
    found, _ = normalize.metrics({"": value})
    return found.get("")


def guarded(hook: _Hook) -> _Hook:
    """Decorate a method that a framework calls: what goes wrong in it never reaches the training.

    A guarded hook that fails returns None, and says so once. Only a sink with `on_error: raise`
    stops a training. Where the framework looks at what a hook returns, guard an inner method, and
    return from the outer one.
    """

    @wraps(hook)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return hook(self, *args, **kwargs)
        except SinkError:
            raise
        except Exception as error:
            said = self.__dict__.setdefault("_said", set())
            if hook.__name__ not in said:
                said.add(hook.__name__)
                logger.warning(
                    "%s of %s went wrong, its events are missing: %s: %s (%s)",
                    *(hook.__name__.lstrip("_"), type(self).__module__),
                    *(type(error).__name__, error, _place_of(error)),
                )
            return None

    return call  # type: ignore[return-value]


def late_class(module: str, name: str, mixin: type, base: Callable[[], type]) -> Callable[[], Any]:
    """Return a function that makes a class of `mixin` and a framework's own base class, once.

    An adapter's module gives it out by its `__getattr__`: importing the adapter loads no framework,
    and the class can be pickled by its name.
    """
    made: list[type] = []

    def make() -> type:
        if not made:
            about = {"__module__": module, "__qualname__": name, "__doc__": mixin.__doc__}
            made.append(type(name, (mixin, base()), about))
        return made[0]

    return make


def _place_of(error: BaseException) -> str:
    """Return file and line that an exception was raised in."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return f"{frame.f_code.co_filename}:{line}"


class Reporter:
    """Tells one training of a framework to the bus: a run at a time, on one rank.

    What is told while no run is open is dropped: frameworks call their hooks in evaluations too.
    An `emit` of None stands for a callback that was not attached yet.
    """

    def __init__(self, emit: Emit | None = None) -> None:
        self.emit = emit
        self.active = True
        """Whether it tells anything; an adapter's `detach` sets it to False."""
        self.is_open = False
        self.epoch: int | None = None
        """The epoch that is under way."""
        self.last_epoch: int | None = None
        """The epoch that ended last, in whichever way."""
        self._epoch_began = 0.0

    def __getstate__(self) -> dict[str, Any]:
        """Leave the run out: who is unpickled in another process begins its own."""
        return {"emit": self.emit, "active": self.active}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["emit"])  # type: ignore[misc]
        self.active = state["active"]

    def connect(self, emit: Emit, release: Callable[[], object] = lambda: None) -> Detach:
        """Report to `emit` from the next run on; returns what ends it.

        Args:
            emit: where the events go.
            release: called first when it is ended, unless another `emit` was connected since.
        """
        self.emit, self.active = emit, True
        self.is_open, self.epoch = False, None

        def detach() -> None:
            if self.emit is emit:  # and not of another bus by now
                release()
                self.active = False

        return detach

    def start(
        self, started: RunStarted, *, loggers: Iterable[object] = (), remedy: str = ""
    ) -> None:
        """Open the run.

        Args:
            started: its start.
            loggers: callbacks of the framework or classes of them, among which there may be loggers
                of its own. A tracker that the bus feeds too is named in a warning.
            remedy: how the user switches the framework's own loggers off.
        """
        if self.active:
            self.is_open, self.epoch, self.last_epoch = True, None, None
            self.tell(self._with_own_loggers(started, loggers, remedy))

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

    def tell(self, event: Event) -> None:
        """Emit an event, if a run is open."""
        if self.is_open and self.active:
            if self.emit is None:
                raise AttachError("this callback has no bus: make it with one, as `…(bus)`")
            self.emit(event)

    def start_epoch(self, epoch: int) -> None:
        """Say that an epoch begins, counted from 0."""
        self.epoch, self._epoch_began = int(epoch), time.monotonic()
        self.tell(EpochStarted(epoch=self.epoch))

    def end_epoch(
        self, outcome: Literal["completed", "retried", "recovered"] = "completed"
    ) -> None:
        """Say that the epoch is over, if one is under way."""
        if self.epoch is not None:
            epoch, self.epoch = self.epoch, None
            self.last_epoch = epoch
            seconds = time.monotonic() - self._epoch_began
            self.tell(EpochEnded(epoch=epoch, duration_s=seconds, outcome=outcome))

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
        """Tell the values: numbers as metrics, and whatever else can be recorded as what it is.

        Args:
            values: name → number, numpy scalar, tensor, text, picture, figure, table, or a mapping
                of them, which is flattened; None is no value.
            phase: what they were measured in.
            epoch: the epoch that they belong to.
            step: optimizer updates done.
            final: whether they evaluate the chosen weights after training.
            on_request: whether they were measured only because a sink asked.
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
            self.tell(event)
        if left_out and self.active and self.emit is not None:
            for what in left_out:
                self.emit.leave_out(what)

    def wants_step(self, step: int, phase: str = "train") -> bool:
        """Return whether a sink asked for the values of this step; they are then `on_request`."""
        every = self.emit.every(phase) if self.emit is not None and self.is_open else None
        return every is not None and step % every == 0

    def end(self, reason: str | None = None, best: Best | None = None) -> None:
        """Say that the training is over and went well, early or not.

        An epoch that is under way is taken for completed.
        """
        self._end(RunEnded(status="finished", reason=reason, best=best))

    def fail(self, error: BaseException, *, rank: int = 0, best: Best | None = None) -> None:
        """Say what ended the training: stopped by Ctrl-C or an exit, else failed.

        Args:
            error: what left the framework's entry call.
            rank: rank of this process; on another one than the main no run is open.
            best: the best value that was reached.
        """
        try:
            self._fail(error, rank, best)
        except SinkError:
            raise
        except Exception:
            # What handles a signal may raise wherever it finds this thread: that comes once.
            self._fail(error, rank, best)

    def _fail(self, error: BaseException, rank: int, best: Best | None) -> None:
        if rank and self.active and self.emit is not None:
            self.emit.failed_on(rank, error)
        else:
            self._end(ended_by(error, best=best))

    def watch(
        self,
        rank: Callable[[], int] = lambda: 0,
        best: Callable[[], Best | None] = lambda: None,
    ) -> Callable[..., Any]:
        """Return what `wrap` puts around a framework's entry call: it ends the run by exceptions.

        Args:
            rank: returns the rank of this process, when it is asked for.
            best: returns the best value that was reached.
        """
        return _Watch(self, rank, best)

    def _end(self, event: RunEnded) -> None:
        if event.status == "finished":
            self.end_epoch()
        self.tell(event)
        self.is_open = False
        self.epoch = None


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
"""Import name of a tracker → what it is called, and how names of classes that log to it begin."""

_FRAMEWORKS = (
    *("accelerate", "ignite", "keras", "lightgbm", "lightning", "pytorch_lightning", "sklearn"),
    *("skorch", "stable_baselines3", "transformers", "xgboost", "optuna"),
)


def tracker_of(callback: type) -> str | None:
    """Return the import name of the tracker that a class logs to, None if it is no logger.

    A class that came with the tracker logs to it, such as those of `wandb.integration`; so does a
    framework's own whose name says so, such as `WandbLogger`. Nothing is imported for it.
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
                self._warn(second)  # the user's own error is the one to see
            except Exception:  # also when the framework can't be asked any more
                try:
                    self._reporter.fail(error, rank=self._rank())
                except Exception as second:
                    self._warn(second)
            raise

    def _warn(self, error: Exception) -> None:
        logger.warning("the end of this run can't be told: %s", error)


def described(parameters: Iterable[Any], layers: int | None = None) -> ModelDescribed:
    """Return what a PyTorch model is, by its parameters, each counted once.

    Args:
        parameters: tensors, of one model or of several.
        layers: number of its modules.
    """
    found = {id(each): each for each in parameters}.values()
    return ModelDescribed(
        parameters=sum(each.numel() for each in found),
        gradients=sum(each.numel() for each in found if each.requires_grad),
        layers=layers,
    )


def version(framework: str) -> str | None:
    """Return the version of a framework that was imported."""
    return getattr(sys.modules.get(framework), "__version__", None)
