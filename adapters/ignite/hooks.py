"""Wraps the methods of an ignite trainer, and calls its `Training` during a run.

The calls come before or after all handlers of an event, so the order in which handlers were added
does not matter. While a trainer runs, `Engine.run` is wrapped: engines that run inside the trainer
are evaluators.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any

from trainbus.interfaces import Detach
from trainbus.toolkit.adapters import arounds_of, wrap

from .trainer import Training

BEFORE = {
    "STARTED": "start",
    "EPOCH_STARTED": "start_epoch",
    "ITERATION_COMPLETED": "step",
    "TERMINATE": "cut_epoch",
    "COMPLETED": "cut_epoch",
}
"""Event → method of `Training` that is called before the handlers of the event."""
AFTER = {"EPOCH_COMPLETED": "end_epoch", "SAVED_CHECKPOINT": "record_saved"}
"""Event → method of `Training` that is called after the handlers of the event."""
_OBSERVED = {*BEFORE, *AFTER, "INTERRUPT", "EXCEPTION_RAISED"}


class EngineHooks:
    """The wrappers of one trainer's methods.

    Args:
        training: reports the trainer.
        logger: the `BusLogger` that attached the trainer, which lives as long as the trainer.
    """

    def __init__(self, training: Training, *, logger: object = None) -> None:
        self.training = training
        self.logger = logger
        self._is_silent = False
        self._watch = training.report.watch()
        self._is_interrupted = self._is_terminated = self._continues = False
        self._interrupted_epoch: int | None = None
        self._during: str | None = None
        self._error: BaseException | None = None

    def install(self) -> Detach:
        """Wrap the trainer's methods, and return the function that unwraps them."""
        # Handlers would not do: those added later run later, and a handler of exceptions makes
        # ignite swallow them, even after it was removed.
        trainer, report = self.training.trainer, self.training.report
        undo = [wrap(trainer, "_fire_event", self._fire), wrap(trainer, "run", self._run)]

        def detach() -> None:
            report.active = False
            for each in undo:
                each()

        return detach

    def _run(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        engine: Any = method.__self__  # type: ignore[attr-defined]
        others = (hooks.training.report for hooks in _all_hooks_of(engine))
        self._is_silent = self.training.report.yields_to(others)
        if self._is_silent:
            return method(*args, **kwargs)
        self._continues, self._is_interrupted = self._is_interrupted, False
        self._is_terminated, self._error = False, None
        self.training.trainer = engine  # or a copy of it
        return self._watch(self._train, method, *args, **kwargs)

    def _train(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        with _inner_runs(self._evaluate):
            state = method(*args, **kwargs)
        self.training.end(
            self._error, is_interrupted=self._is_interrupted, is_terminated=self._is_terminated
        )
        return state

    def _fire(self, method: Callable[..., Any], event: Any, *args: Any, **kwargs: Any) -> None:
        """Call the handlers of an event, and `Training` before or after all of them."""
        name, outer = getattr(event, "name", event), self._during
        is_other = method.__self__ is not self.training.trainer  # type: ignore[attr-defined]
        if self._is_silent or is_other or (name not in _OBSERVED and not self._continues):
            method(event, *args, **kwargs)
            return
        if self._continues:
            self._continues = False
            if name != "STARTED":  # that event was fired before the interruption
                self.training.start(self._interrupted_epoch)
        self._is_terminated |= name == "TERMINATE"
        if name in BEFORE:
            getattr(self.training, BEFORE[name])()
        elif name == "EXCEPTION_RAISED":
            self._error = args[0] if args else None
        self._during = name
        try:
            method(event, *args, **kwargs)
        finally:
            self._during = outer
        if name in ("EPOCH_COMPLETED", "COMPLETED"):
            self._error = None  # the user's handler swallowed it, and training continued
        if name in AFTER:
            getattr(self.training, AFTER[name])()
        elif name == "INTERRUPT":
            self._is_interrupted, self._interrupted_epoch = True, self.training.report.epoch

    def _evaluate(self, run: Callable[..., Any], engine: Any, *args: Any, **kwargs: Any) -> Any:
        """Run an engine while the trainer runs; the first one is the trainer itself."""
        training = self.training
        if engine is training.trainer or not training.report.is_open or _hooks_of(engine):
            return run(engine, *args, **kwargs)
        name = training.start_evaluation(engine, kwargs.get("data", args[0] if args else None))
        state = run(engine, *args, **kwargs)
        training.end_evaluation(engine, name, self._during)
        return state


def _hooks_of(engine: Any) -> EngineHooks | None:
    """Return the outermost active hooks of an engine, None if it is not attached."""
    return next(_all_hooks_of(engine), None)


def _all_hooks_of(engine: Any) -> Iterator[EngineHooks]:
    for around in arounds_of(engine, "run"):
        hooks = getattr(around, "__self__", None)
        if isinstance(hooks, EngineHooks) and hooks.training.report.active:
            yield hooks


def outermost(attach: Callable[[object], object]) -> Callable[..., Any]:
    """Return the `around` of `Engine.run` that attaches trainers that run in no other engine.

    Args:
        attach: called with the trainer.
    """
    here = threading.local()

    def run(before: Callable[..., Any], engine: Any, *args: Any, **kwargs: Any) -> Any:
        is_outer = not getattr(here, "runs", False)
        if is_outer and not _hooks_of(engine) and _trains(engine, *args, **kwargs):
            attach(engine)
            if _hooks_of(engine):
                return engine.run(*args, **kwargs)
        here.runs = True
        try:
            return before(engine, *args, **kwargs)
        finally:
            here.runs = not is_outer

    return run


def _trains(engine: Any, *args: Any, **kwargs: Any) -> bool:
    """Return whether `run` is called for epochs or iterations, or continues such a run.

    Args:
        engine: the engine.
        *args: arguments of `run`.
        **kwargs: likewise.
    """
    given = (*args[1:], kwargs.get("max_epochs"), kwargs.get("max_iters"))
    state = engine.state
    many = (state.max_epochs or 0) > 1 or getattr(state, "max_iters", None) is not None
    return any(each is not None for each in given) or (state.iteration > 0 and many)


@contextmanager
def _inner_runs(around: Callable[..., Any]) -> Iterator[None]:
    """Meanwhile, call `around(run, engine, …)` for every engine that runs in this thread."""
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
        # Trainers in other threads may have started later, and end earlier or later.
        top: Any = patch
        while top is not None and top.run is Engine.run and not top.active:
            Engine.run = top.before
            top = getattr(top.before, "patch", None)
