"""Turns the trainings of an ignite trainer, and the evaluations inside them, into events.

The step is ignite's iteration: with gradient accumulation there are fewer updates of the weights.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

from trainbus.events import Event, MetricsLogged, TextLogged
from trainbus.interfaces import Detach, Emit
from trainbus.toolkit.adapters import (
    Origin,
    Reporter,
    guarded,
    late_class,
    lazy,
    numbers,
    patch,
    wrong_target,
)

from .evaluation import Engines
from .hooks import BEFORE, EngineHooks, outermost
from .trainer import REMEDY, Training, rank, settings, started

TESTED_VERSIONS = "0.5.5"
_EVENTS = (*BEFORE, "EPOCH_COMPLETED", "INTERRUPT", "EXCEPTION_RAISED")
REQUIRED_NAMES = (
    *(f"ignite.engine:Engine.{name}" for name in ("run", "_fire_event")),
    *(f"ignite.engine:Events.{name}" for name in _EVENTS),
    *(f"ignite.handlers:{name}" for name in ("Checkpoint.SAVED_CHECKPOINT", "EarlyStopping")),
    *(f"ignite.distributed:{name}" for name in ("backend", "get_rank", "get_world_size")),
)
"""What the adapter relies on; `trainbus doctor` checks that it exists."""


def attach(target: Any, emit: Emit) -> Detach:
    """Report the trainings of an engine.

    Args:
        target: the `Engine` that trains, before `run()`, or a `BusLogger`.
        emit: where the events go.

    Returns:
        A function that removes the hooks.

    Raises:
        AttachError: the object is neither.
    """
    from ignite.engine import Engine

    if isinstance(target, BusLogger):
        return target.report.connect(emit, target.close)
    if not isinstance(target, Engine):
        raise wrong_target(
            target,
            "an ignite Engine that trains",
            "attach the trainer, before `run()`, or call `BusLogger(bus).attach(trainer, …)`",
        )
    report = Reporter(emit, origin=Origin.ATTACH, rank=rank)
    return EngineHooks(Training(report, target)).install()


def hook(module: Any, attach: Callable[[object], object]) -> None:
    """Attach every engine that runs for epochs or iterations, and not inside another engine.

    Args:
        module: `ignite.engine.engine`.
        attach: called with the trainer.
    """
    patch(module.Engine, "run", outermost(attach))


class BusLogger:
    """The bus as one of ignite's loggers: `BusLogger(bus).attach(trainer, evaluators={"val": e})`.

    It also has the methods of ignite's own loggers. What their handlers log goes into the run of
    the attached trainer; if there is none, into a run that ends with the logger.

    Args:
        bus: where the events go.
    """

    def __init__(self, bus: Any) -> None:
        self.report = Reporter(rank=rank)
        self._detach: weakref.WeakKeyDictionary[Any, Detach] = weakref.WeakKeyDictionary()
        bus.attach(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the engines out, which can't be pickled."""
        return {"report": self.report}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _detach=weakref.WeakKeyDictionary())

    def __enter__(self) -> BusLogger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.report.fail(error)
        self.close()

    def attach(
        self,
        trainer: Any,
        log_handler: Callable[..., Any] | None = None,
        event_name: Any = None,
        *args: Any,
        evaluators: Mapping[str, Any] | None = None,
        optimizer: Any = None,
        params: Mapping[str, Any] | None = None,
        output_transform: Callable[[Any], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Report the trainings of an engine, or add a handler as ignite's loggers do.

        Args:
            trainer: the engine that trains; with a handler, any engine.
            log_handler: such as an `OutputHandler` of this module.
            event_name: the event that calls the handler.
            *args: arguments of the handler after engine, logger and event.
            evaluators: name → engine; the name becomes a prefix of its metrics.
            optimizer: the optimizer whose learning rates are logged.
            params: configuration of the training, of which ignite knows little.
            output_transform: turns the trainer's output into a number, or a dict of numbers.
            **kwargs: arguments of the handler.

        Returns:
            A function that removes the hooks; with a handler, ignite's handle to remove it.

        Raises:
            RuntimeError: ignite has no such event.
        """
        if log_handler is not None:
            from ignite.handlers.base_logger import BaseLogger

            return BaseLogger.attach(self, trainer, log_handler, event_name, *args, **kwargs)
        self._detach.pop(trainer, lambda: None)()
        report = Reporter(self.report.emit, rank=rank)
        report.active = self.report.active
        named, given = dict(evaluators or {}), dict(params or {})
        training = Training(report, trainer, named, optimizer, given, output_transform)
        self._detach[trainer] = detach = EngineHooks(training, logger=self).install()
        return detach

    def attach_output_handler(self, engine: Any, event_name: Any, *args: Any, **kwargs: Any) -> Any:
        """Log metrics or outputs of an engine at an event, as ignite's loggers do.

        Args:
            engine: the engine.
            event_name: the event.
            *args: arguments of `OutputHandler`: `tag`, `metric_names`, `output_transform`,
                `global_step_transform`, `state_attributes`.
            **kwargs: likewise.

        Returns:
            ignite's handle to remove the handler.
        """
        return self.attach(engine, _output_handler()(*args, **kwargs), event_name)

    def attach_opt_params_handler(
        self, engine: Any, event_name: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Log a parameter of an optimizer's groups at an event, as ignite's loggers do.

        Args:
            engine: the engine.
            event_name: the event.
            *args: arguments of `OptimizerParamsHandler`: `optimizer`, `param_name`, `tag`.
            **kwargs: likewise.

        Returns:
            ignite's handle to remove the handler.
        """
        return self.attach(engine, _params_handler()(*args, **kwargs), event_name)

    @guarded
    def log(self, engine: Any, events: Iterable[Event]) -> None:
        """Emit what a handler logs; called by handlers."""
        if rank() or self.report.emit is None:
            return
        if self.report.emit.run_id is None and not self._detach:
            own = Engines(engine, {}).loggers()
            self.report.start(started(settings(engine, {})), loggers=own, remedy=REMEDY)
        for event in events if self.report.active else ():
            self.report.emit(event)

    def close(self) -> None:
        """Remove the hooks from every engine, and end the run of the handlers if there is one."""
        self.report.end()
        self.report.active = False
        while self._detach:
            self._detach.popitem()[1]()


class _OutputHandler:
    """Logs metrics, outputs and attributes of an engine: `OutputHandler("training", "all")`.

    Arguments, names and values are those of ignite's own `OutputHandler`.
    """

    tag: str
    global_step_transform: Callable[..., int]
    _setup_output_metrics_state_attrs: Callable[..., Mapping[str, Any]]

    def __call__(self, engine: Any, logger: Any, event_name: Any) -> None:
        found = self._setup_output_metrics_state_attrs(engine, log_text=True, key_tuple=False)
        at, transform = self.global_step_transform(engine, event_name), self.global_step_transform
        phase = next(
            (p for start, p in _PHASES.items() if str(self.tag).startswith(start)), "train"
        )
        logger.log(engine, _events(found, phase, at, event_name, transform))


class _OptimizerParamsHandler:
    """Logs a parameter of an optimizer's groups: `OptimizerParamsHandler(optimizer)`.

    Arguments, names and values are those of ignite's own `OptimizerParamsHandler`.
    """

    tag: str | None
    optimizer: Any
    param_name: str

    def __call__(self, engine: Any, logger: Any, event_name: Any) -> None:
        name = f"{self.tag}/{self.param_name}" if self.tag else self.param_name
        found = {
            f"{name}/group_{i}": group[self.param_name]
            for i, group in enumerate(self.optimizer.param_groups)
        }
        at = engine.state.get_event_attrib_value(event_name)
        logger.log(engine, _events(found, "train", at, event_name))


_PHASES = {"train": "train", "test": "test", "val": "validation", "eval": "validation"}


def _events(
    found: Mapping[str, Any],
    phase: str,
    at: int,
    event: Any,
    transform: Callable[..., int] | None = None,
) -> Iterator[Event]:
    """Yield the values as events.

    Args:
        found: name → value.
        phase: their phase.
        at: the position that ignite's loggers would use: an epoch, counted from 1, or a step.
        event: the event that called the handler.
        transform: the function that gave the position.
    """
    is_epoch = _counts_epochs(event, transform)
    epoch, step = (int(at) - 1 if at > 0 else None, None) if is_epoch else (None, int(at))
    if values := numbers(found):
        yield MetricsLogged(values=values, phase=phase, epoch=epoch, step=step)
    for name, value in found.items():
        if isinstance(value, str):
            yield TextLogged(key=name, text=value, epoch=epoch, step=step)


def _counts_epochs(event: Any, transform: Callable[..., int] | None) -> bool:
    """Return whether a position is an epoch; that of a user's transform counts as a step."""
    from ignite.engine import State

    name = getattr(transform, "__qualname__", "")
    if transform is not None and name.startswith("global_step_from_engine"):
        event = inspect.getclosurevars(transform).nonlocals.get("custom_event_name") or event
    elif transform is not None and not name.startswith("BaseOutputHandler."):
        return False
    return bool(State.event_to_attr.get(event) == "epoch")


_BASE = "ignite.handlers.base_logger:Base"
_output_handler = late_class(__name__, "OutputHandler", _OutputHandler, f"{_BASE}OutputHandler")
_params_handler = late_class(
    __name__,
    "OptimizerParamsHandler",
    _OptimizerParamsHandler,
    f"{_BASE}OptimizerParamsHandler",
)
__getattr__ = lazy(__name__, OutputHandler=_output_handler, OptimizerParamsHandler=_params_handler)
