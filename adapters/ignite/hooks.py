"""Stands around the methods of an ignite trainer, and says what happens inside its run.

Events come from around the trainer's handlers, so their order of registration does not matter.
While a trainer runs, `Engine.run` tells of the engines that run inside it: those are evaluators.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any, Protocol

from trainbus.interfaces import Detach
from trainbus.toolkit.adapters import Reporter, arounds_of, wrap

from ._ignite_facts import rank, trains

BEFORE = {
    "STARTED": "start",
    "EPOCH_STARTED": "start_epoch",
    "ITERATION_COMPLETED": "step",
    "TERMINATE": "cut_epoch",
    "COMPLETED": "cut_epoch",
}
"""Name of an event → what the listener is told before its handlers are called."""
AFTER = {"EPOCH_COMPLETED": "end_epoch", "SAVED_CHECKPOINT": "tell_saved"}
"""Name of an event → what the listener is told after its handlers were called."""
_HEARD = {*BEFORE, *AFTER, "INTERRUPT", "EXCEPTION_RAISED"}


class Listener(Protocol):
    """Who is told; it also has the methods that `BEFORE` and `AFTER` name."""

    report: Reporter
    trainer: Any

    def start(self, left: int | None = None) -> None:
        """Begin a run, in the epoch that an interruption left."""

    def meet(self, engine: Any, data: Any) -> str:
        """Return the name of an evaluator that is about to run."""

    def tell_evaluation(self, engine: Any, name: str, during: str | None) -> None:
        """Hear that an evaluator ran, and in the handlers of which event."""

    def end(
        self, error: BaseException | None, *, is_interrupted: bool, is_terminated: bool
    ) -> None:
        """Hear that `run` returned, and what error a handler of the user's swallowed."""


class Hooks:
    """What stands around the methods of one trainer.

    Args:
        listener: whose trainer it is, and who is told.
        logger: the `BusLogger` that put it there, which lives as long as the trainer.
    """

    def __init__(self, listener: Listener, *, logger: object = None) -> None:
        self.listener = listener
        self.logger = logger
        self._is_silent = False
        self._watch = listener.report.watch(rank)
        self._is_interrupted = self._is_terminated = self._goes_on = False
        self._left: int | None = None
        self._during: str | None = None
        self._error: BaseException | None = None

    def hang(self) -> Detach:
        """Stand around the trainer's methods, and return what ends it."""
        # Handlers would not do: those that come later run later, and one for exceptions, even one
        # that was removed again, makes ignite swallow them.
        trainer, report = self.listener.trainer, self.listener.report
        ends = [wrap(trainer, "_fire_event", self._fire), wrap(trainer, "run", self._run)]

        def detach() -> None:
            report.active = False
            for end in ends:
                end()

        return detach

    def _run(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        engine: Any = method.__self__  # type: ignore[attr-defined]
        self._is_silent = self.logger is None and any(h.logger for h in _all_hooks_of(engine))
        if self._is_silent:
            return method(*args, **kwargs)
        self._goes_on, self._is_interrupted = self._is_interrupted, False
        self._is_terminated, self._error = False, None
        self.listener.trainer = engine  # or a copy of it
        return self._watch(self._train, method, *args, **kwargs)

    def _train(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        with _inner_runs(self._evaluate):
            state = method(*args, **kwargs)
        self.listener.end(
            self._error, is_interrupted=self._is_interrupted, is_terminated=self._is_terminated
        )
        return state

    def _fire(self, method: Callable[..., Any], event: Any, *args: Any, **kwargs: Any) -> None:
        """Call the handlers of an event; tell what comes before and what after all of them."""
        name, outer = getattr(event, "name", event), self._during
        is_other = method.__self__ is not self.listener.trainer  # type: ignore[attr-defined]
        if self._is_silent or is_other or (name not in _HEARD and not self._goes_on):
            method(event, *args, **kwargs)
            return
        if self._goes_on:
            self._goes_on = False
            if name != "STARTED":  # it went before the interruption
                self.listener.start(self._left)
        self._is_terminated |= name == "TERMINATE"
        if name in BEFORE:
            getattr(self.listener, BEFORE[name])()
        elif name == "EXCEPTION_RAISED":
            self._error = args[0] if args else None
        self._during = name
        try:
            method(event, *args, **kwargs)
        finally:
            self._during = outer
        if name in ("EPOCH_COMPLETED", "COMPLETED"):
            self._error = None  # a handler of the user's swallowed it, and training went on
        if name in AFTER:
            getattr(self.listener, AFTER[name])()
        elif name == "INTERRUPT":
            self._is_interrupted, self._left = True, self.listener.report.epoch

    def _evaluate(self, run: Callable[..., Any], engine: Any, *args: Any, **kwargs: Any) -> Any:
        """Run an engine while the trainer runs; the first one is the trainer itself."""
        listener = self.listener
        if engine is listener.trainer or not listener.report.is_open or hooks_of(engine):
            return run(engine, *args, **kwargs)
        name = listener.meet(engine, kwargs.get("data", args[0] if args else None))
        state = run(engine, *args, **kwargs)
        listener.tell_evaluation(engine, name, self._during)
        return state


def hooks_of(engine: Any) -> Hooks | None:
    """Return what hangs on an engine, None if nothing does or it is silent."""
    return next(_all_hooks_of(engine), None)


def _all_hooks_of(engine: Any) -> Iterator[Hooks]:
    for around in arounds_of(engine, "run"):
        hooks = getattr(around, "__self__", None)
        if isinstance(hooks, Hooks) and hooks.listener.report.active:
            yield hooks


def outermost(attach: Callable[[object], object]) -> Callable[..., Any]:
    """Return what `patch` puts around `Engine.run`: a trainer that runs in no other is attached.

    Args:
        attach: called with the trainer.
    """
    here = threading.local()

    def run(before: Callable[..., Any], engine: Any, *args: Any, **kwargs: Any) -> Any:
        is_outer = not getattr(here, "runs", False)
        if is_outer and not hooks_of(engine) and trains(engine, *args, **kwargs):
            attach(engine)
            if hooks_of(engine):
                return engine.run(*args, **kwargs)
        here.runs = True
        try:
            return before(engine, *args, **kwargs)
        finally:
            here.runs = not is_outer

    return run


@contextmanager
def _inner_runs(around: Callable[..., Any]) -> Iterator[None]:
    """Have `around(run, engine, …)` called for every engine that runs in this thread meanwhile."""
    from ignite.engine import Engine

    before, here = Engine.run, threading.get_ident()

    @wraps(before)
    def run(engine: Any, *args: Any, **kwargs: Any) -> Any:
        if not patch.active or threading.get_ident() != here:
            return before(engine, *args, **kwargs)
        return around(before, engine, *args, **kwargs)

    patch = SimpleNamespace(active=True, run=run, before=before)
    vars(run)["patch"] = patch
    Engine.run = run
    try:
        yield
    finally:
        patch.active = False
        # Trainers in other threads may have begun later, and end earlier or later.
        top: Any = patch
        while top is not None and top.run is Engine.run and not top.active:
            Engine.run = top.before
            top = getattr(top.before, "patch", None)
