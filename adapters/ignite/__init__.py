"""Turns the trainings of an ignite trainer, and the evaluations inside them, into events.

The step is ignite's iteration: with gradient accumulation there are fewer updates of the weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from trainbus.errors import AttachError
from trainbus.events import Event, RunEnded
from trainbus.interfaces import Detach, Emit
from trainbus.toolkit.adapters import Reporter, described, guarded, patch

from . import _ignite_facts as facts
from . import _ignite_handlers as handlers
from ._ignite_checkpoints import Checkpoints
from ._ignite_engines import Engines
from ._ignite_hooks import BEFORE, Hooks, outermost

TESTED_VERSIONS = "0.5.5"
_EVENTS = (*BEFORE, "EPOCH_COMPLETED", "INTERRUPT", "EXCEPTION_RAISED")
REQUIRED_NAMES = (
    *(f"ignite.engine:Engine.{name}" for name in ("run", "_fire_event")),
    *(f"ignite.engine:Events.{name}" for name in _EVENTS),
    *(f"ignite.handlers:{name}" for name in ("Checkpoint.SAVED_CHECKPOINT", "EarlyStopping")),
    *(f"ignite.distributed:{name}" for name in ("backend", "get_rank", "get_world_size")),
)
"""What the adapter relies on; `trainbus doctor` looks whether it is there."""

_REMEDY = "leave out either logger"


def attach(target: Any, emit: Emit) -> Detach:
    """Have the trainings of an engine emit events.

    Args:
        target: the `Engine` that trains, before `run()`, or a `BusLogger`.
        emit: where the events go.

    Returns:
        A function that takes the hooks out again.

    Raises:
        AttachError: the object is neither.
    """
    from ignite.engine import Engine

    if isinstance(target, BusLogger):
        return target.report.connect(emit, target.close)
    if not isinstance(target, Engine):
        raise AttachError(
            f"expected an ignite Engine that trains, found {type(target).__qualname__}; attach "
            "the trainer, before `run()`, or call `BusLogger(bus).attach(trainer, …)`"
        )
    return Hooks(_Listener(Reporter(emit), target)).hang()


def __getattr__(name: str) -> Any:
    makers = {
        "OutputHandler": handlers.output_handler,
        "OptimizerParamsHandler": handlers.params_handler,
    }
    if name in makers:
        return makers[name]()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def hook(module: Any, attach: Callable[[object], object]) -> None:
    """Have every engine attached that is run for epochs or iterations, and inside no other one.

    Args:
        module: `ignite.engine.engine`.
        attach: called with the trainer.
    """
    patch(module.Engine, "run", outermost(attach))


class BusLogger:
    """The bus as one of ignite's loggers: `BusLogger(bus).attach(trainer, evaluators={"val": e})`.

    It has the methods of ignite's own loggers, too. What their handlers log goes into the run of
    the trainer that is attached; where none is, into a run that ends with the logger.

    Args:
        bus: where the events go.
    """

    def __init__(self, bus: Any) -> None:
        self.report = Reporter()
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
            self.report.fail(error, rank=facts.rank())
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
        """Have the trainings of an engine emit events, or a handler called as ignite's loggers do.

        Args:
            trainer: the engine that trains; with a handler, any engine.
            log_handler: such as an `OutputHandler` of this module.
            event_name: when the handler is called.
            *args: what the handler is called with besides engine, logger and event.
            evaluators: name → engine; the name stands before those of its metrics.
            optimizer: whose learning rates are logged.
            params: configuration of the training, of which ignite knows little.
            output_transform: makes a number, or a dict of them, of the trainer's output.
            **kwargs: what the handler is called with.

        Returns:
            A function that takes the hooks out again; with a handler, ignite's handle to remove it.

        Raises:
            RuntimeError: ignite has no such event.
        """
        if log_handler is not None:
            from ignite.handlers.base_logger import BaseLogger

            return BaseLogger.attach(self, trainer, log_handler, event_name, *args, **kwargs)
        self._detach.pop(trainer, lambda: None)()
        report = Reporter(self.report.emit)
        report.active = self.report.active
        named, given = dict(evaluators or {}), dict(params or {})
        listener = _Listener(report, trainer, named, optimizer, given, output_transform)
        self._detach[trainer] = detach = Hooks(listener, logger=self).hang()
        return detach

    def attach_output_handler(self, engine: Any, event_name: Any, *args: Any, **kwargs: Any) -> Any:
        """Log metrics or outputs of an engine at an event, as ignite's loggers do.

        Args:
            engine: the engine.
            event_name: when they are logged.
            *args: arguments of `OutputHandler`: `tag`, `metric_names`, `output_transform`,
                `global_step_transform`, `state_attributes`.
            **kwargs: likewise.

        Returns:
            ignite's handle to remove the handler.
        """
        return self.attach(engine, handlers.output_handler()(*args, **kwargs), event_name)

    def attach_opt_params_handler(
        self, engine: Any, event_name: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Log a parameter of an optimizer's groups at an event, as ignite's loggers do.

        Args:
            engine: the engine.
            event_name: when it is logged.
            *args: arguments of `OptimizerParamsHandler`: `optimizer`, `param_name`, `tag`.
            **kwargs: likewise.

        Returns:
            ignite's handle to remove the handler.
        """
        return self.attach(engine, handlers.params_handler()(*args, **kwargs), event_name)

    @guarded
    def log(self, engine: Any, events: Iterable[Event]) -> None:
        """Take what a handler logs; called by handlers."""
        if facts.rank() or self.report.emit is None:
            return
        if self.report.emit.run_id is None and not self._detach:
            own = Engines(engine, {}).loggers()
            self.report.start(facts.logging(engine), loggers=own, remedy=_REMEDY)
        for event in events if self.report.active else ():
            self.report.emit(event)

    def close(self) -> None:
        """Take the hooks out of every engine, and end the run of the handlers if there is one."""
        self.report.end()
        self.report.active = False
        while self._detach:
            self._detach.popitem()[1]()


@dataclass(eq=False)
class _Listener:
    """Tells the trainings of one trainer to the bus."""

    report: Reporter
    trainer: Any
    named: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Any = None
    params: dict[str, Any] = field(default_factory=dict)
    output_transform: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        self._run: str | None = None
        self._reached = 0
        self._reset()

    def _reset(self) -> None:
        self._optimizers: dict[str, Any] = {}
        self._rates: dict[str, Any] = {}
        self._engines = Engines(self.trainer, self.named)
        self._checkpoints = Checkpoints(self._engines.handlers)

    @guarded
    def start(self, left: int | None = None) -> None:
        self._reset()
        if facts.rank() != 0:
            return
        self._checkpoints.skip()  # those of an earlier run
        self._optimizers = self._checkpoints.saving("param_groups")
        if self.optimizer is not None:
            self._optimizers = {"optimizer": self.optimizer}
        # Its own last run, unless a state was loaded since.
        before = self._run if self.trainer.state.iteration == self._reached else None
        self.report.start(
            facts.started(
                self.trainer,
                # The user's own come first, and count more.
                params=self.params | facts.settings(self.trainer, self._optimizers) | self.params,
                save_dir=self._checkpoints.folder,
                before=before,
                is_cut=left is not None,
            ),
            loggers=self._engines.loggers(),
            remedy=_REMEDY,
        )
        self._run = getattr(self.report.emit, "run_id", None)
        self._describe()
        if left is not None:
            self.report.start_epoch(left)

    @guarded
    def _describe(self) -> None:
        models = self._checkpoints.saving("parameters").values()
        parameters = [p for model in models for p in model.parameters()]
        if parameters:
            layers = sum(1 for model in models for _ in model.modules())
            self.report.tell(described(parameters, layers))

    @guarded
    def start_epoch(self) -> None:
        self.cut_epoch()  # of a `terminate_epoch(skip_epoch_completed=True)`
        self.report.start_epoch(self.trainer.state.epoch - 1)

    @guarded
    def step(self) -> None:
        # Before the handlers: a scheduler among them sets the rates of the next update.
        self._rates = facts.rates(self._optimizers)
        step = int(self.trainer.state.iteration)
        if self.report.wants_step(step) and (values := self._output()):
            values |= self._rates
            epoch = self.report.epoch
            self.report.metrics(values, "train", epoch=epoch, step=step, on_request=True)

    @guarded
    def _output(self) -> dict[str, float]:
        """Return what the trainer's function returned last, as far as it is numbers."""
        output = self.trainer.state.output
        if self.output_transform is not None:
            output = self.output_transform(output)
        return facts.numbers(output)

    @guarded
    def end_epoch(self) -> None:
        self.tell_saved()
        self._tell_epoch(facts.metrics(self.trainer.state))

    @guarded
    def cut_epoch(self) -> None:
        self._tell_epoch({})  # the metrics are still those of the epoch before

    def _tell_epoch(self, values: dict[str, Any]) -> None:
        if self.report.epoch is not None:
            values = {**(values or self._output() or {}), **self._rates}
            self.report.metrics(values, "train", epoch=self.report.epoch)
            self.report.end_epoch()

    @guarded
    def meet(self, engine: Any, data: Any) -> str:
        if engine not in self._engines:
            self.tell_saved()
            self._engines.add(engine)
            self._checkpoints.skip()  # those of an earlier run
        is_train = data is not None and data is self.trainer.state.dataloader
        return self._engines.name(engine, is_train=is_train)

    @guarded
    def tell_evaluation(self, engine: Any, name: str, during: str | None) -> None:
        if engine.state.times.get("EPOCH_COMPLETED"):  # else the metrics are those of a run before
            is_summary = during in ("EPOCH_COMPLETED", "COMPLETED")
            self.report.metrics(
                {f"{name}/{key}": value for key, value in engine.state.metrics.items()},
                next((p for p in ("train", "test") if name.startswith(p)), "validation"),
                epoch=self.report.epoch,
                step=None if is_summary else self.trainer.state.iteration,
                final=during == "COMPLETED",
            )
        self.tell_saved()

    @guarded
    def tell_saved(self) -> None:
        if self.report.is_open:
            for saved in self._checkpoints.saved(self.trainer.state, self.report.epoch):
                self.report.tell(saved)

    @guarded
    def end(
        self, error: BaseException | None, *, is_interrupted: bool, is_terminated: bool
    ) -> None:
        self._reached = self.trainer.state.iteration
        best = self._checkpoints.best
        if error is not None:  # a handler of the user's swallowed it, and training was over
            self.report.fail(error, rank=facts.rank(), best=best)
        elif is_interrupted:
            self.report.tell(RunEnded(status="stopped", reason="interrupted", best=best))
            self.report.is_open = False
        elif self.report.is_open:
            self.tell_saved()
            for saved in self._checkpoints.final():
                self.report.tell(saved)
            handlers = self._engines.handlers()
            why = facts.why_terminated(self.trainer, handlers) if is_terminated else None
            self.report.end(why, best)
