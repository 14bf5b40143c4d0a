"""Turns the trainings of an ignite trainer, and the evaluations inside them, into events.

Events come from around the trainer's handlers, so their order of registration does not matter.
While a trainer runs, `Engine.run` tells of the engines that run inside it: those are evaluators.
The step is ignite's iteration: with gradient accumulation there are fewer updates of the weights.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import msgspec

from trainbus.errors import AttachError
from trainbus.events import (
    Best,
    CheckpointSaved,
    ModelDescribed,
    Resumed,
    RunEnded,
    RunStarted,
)
from trainbus.hooking import Reporter, guarded, number, version, wrap
from trainbus.interfaces import Detach, Emit

_BEFORE = {
    "STARTED": "_start",
    "EPOCH_STARTED": "_start_epoch",
    "ITERATION_COMPLETED": "_step",
    "TERMINATE": "_terminate",
    "COMPLETED": "_cut_epoch",
}
_AFTER = {
    "EPOCH_COMPLETED": "_end_epoch",
    "SAVED_CHECKPOINT": "_tell_saved",
    "INTERRUPT": "_interrupt",
}
_HEARD = {*_BEFORE, *_AFTER, "EXCEPTION_RAISED"}
_PARAMS = ("max_epochs", "max_iters", "epoch_length")

TESTED = "0.5.5"
NEEDS = (
    *(f"ignite.engine:Engine.{name}" for name in ("run", "_fire_event")),
    *(f"ignite.engine:Events.{name}" for name in (*_BEFORE, "EPOCH_COMPLETED", "INTERRUPT")),
    "ignite.engine:Events.EXCEPTION_RAISED",
    "ignite.handlers:Checkpoint.SAVED_CHECKPOINT",
    "ignite.handlers:EarlyStopping",
    *(f"ignite.distributed:{name}" for name in ("backend", "get_rank", "get_world_size")),
)
"""What the adapter relies on; `trainbus doctor` looks whether it is there."""


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
        target.report.emit, target.report.active = emit, True
        return target.close
    if not isinstance(target, Engine):
        raise AttachError(
            f"expected an ignite Engine that trains, found {type(target).__qualname__}; attach "
            "the trainer, before `run()`, or call `BusLogger(bus).attach(trainer, …)`"
        )
    if any(hooks.is_logger for hooks in _hooks_of(target)):
        return lambda: None
    return _Hooks(Reporter(emit), target).hang()


def hook(module: Any, attach: Callable[[object], object]) -> None:
    """Have every engine attached that is run for epochs or iterations, and inside no other one.

    Args:
        module: `ignite.engine.engine`.
        attach: called with the trainer.
    """
    before = module.Engine.run
    if getattr(before, "is_hooked", False):
        return
    here = threading.local()

    @wraps(before)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_outer = not getattr(here, "runs", False)
        if is_outer and not _hooks_of(self) and _trains(self, *args, **kwargs):
            attach(self)
            if _hooks_of(self):
                return self.run(*args, **kwargs)
        here.runs = True
        try:
            return before(self, *args, **kwargs)
        finally:
            here.runs = not is_outer

    vars(run)["is_hooked"] = True
    module.Engine.run = run


class BusLogger:
    """The bus as one of ignite's loggers: `BusLogger(bus).attach(trainer, evaluators={"val": e})`.

    Args:
        bus: where the events go.
    """

    def __init__(self, bus: Any) -> None:
        self.report = Reporter()
        self._detach: dict[int, Detach] = {}
        bus.attach(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the engines out, which can't be pickled."""
        return {"report": self.report}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.report = state["report"]
        self._detach = {}

    def attach(
        self,
        trainer: Any,
        *,
        evaluators: Mapping[str, Any] | None = None,
        optimizer: Any = None,
        params: Mapping[str, Any] | None = None,
        output_transform: Callable[[Any], Any] | None = None,
    ) -> Detach:
        """Have the trainings of an engine emit events.

        Args:
            trainer: the engine that trains.
            evaluators: name → engine; the name stands before those of its metrics.
            optimizer: whose learning rates are logged.
            params: configuration of the training, of which ignite knows little.
            output_transform: makes a number, or a dict of them, of the trainer's output.

        Returns:
            A function that takes the hooks out again.
        """
        self._detach.pop(id(trainer), lambda: None)()
        report = Reporter(self.report.emit)
        report.active = self.report.active
        hooks = _Hooks(report, trainer, is_logger=True)
        hooks.named = dict(evaluators or {})
        hooks.optimizer, hooks.params = optimizer, dict(params or {})
        hooks.output_transform = output_transform
        self._detach[id(trainer)] = detach = hooks.hang()
        return detach

    def close(self) -> None:
        """Take the hooks out of every engine."""
        self.report.active = False
        while self._detach:
            self._detach.popitem()[1]()


class _Hooks:
    """What stands around the methods of one trainer."""

    def __init__(self, report: Reporter, trainer: Any, *, is_logger: bool = False) -> None:
        self.report = report
        self.trainer = trainer
        self.is_logger = is_logger
        self.named: dict[str, Any] = {}
        self.optimizer: Any = None
        self.params: dict[str, Any] = {}
        self.output_transform: Callable[[Any], Any] | None = None
        self._watch = report.watch(_rank)
        self._is_interrupted = self._goes_on = False
        self._left: int | None = None
        self._run: str | None = None
        self._reached = 0
        self._reset()

    def _reset(self) -> None:
        self._during: str | None = None
        self._is_terminated = False
        self._error: BaseException | None = None
        self._optimizers: dict[str, Any] = {}
        self._rates: dict[str, Any] = {}
        self._evaluators = {id(engine): engine for engine in self.named.values()}
        self._names: dict[tuple[int, bool], str] = {}
        self._seen: dict[int, Any] = {}
        self._newest: dict[int, CheckpointSaved] = {}
        self._bests: dict[int, Best] = {}

    def hang(self) -> Detach:
        """Stand around the trainer's methods, and return what ends it."""
        # Handlers would not do: those that come later run later, and one for exceptions, even one
        # that was removed again, makes ignite swallow them.
        hung = _hooks_of(self.trainer)
        ends = [wrap(self.trainer, "_fire_event", self.fire), wrap(self.trainer, "run", self.run)]
        vars(self.trainer.run.__func__)["ignite_hooks"] = [*hung, self]

        def detach() -> None:
            self.report.active = False
            for end in ends:
                end()

        return detach

    def run(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Train, and end the run."""
        self._goes_on, self._is_interrupted = self._is_interrupted, False
        self._error = None
        self.trainer = method.__self__  # type: ignore[attr-defined]  # or a copy of it
        return self._watch(self._train, method, *args, **kwargs)

    def _train(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _inner_runs(self.evaluate):
            state = method(*args, **kwargs)
        self._end()
        return state

    def fire(self, method: Callable[..., Any], event: Any, *args: Any, **kwargs: Any) -> None:
        """Call the handlers of an event; tell what comes before and what after all of them."""
        name, outer = getattr(event, "name", event), self._during
        is_other = method.__self__ is not self.trainer  # type: ignore[attr-defined]
        if is_other or (name not in _HEARD and not self._goes_on):
            method(event, *args, **kwargs)
            return
        if self._goes_on:
            self._goes_on = False
            if name != "STARTED":  # it went before the interruption
                self._start(self._left)
        if name in _BEFORE:
            getattr(self, _BEFORE[name])()
        elif name == "EXCEPTION_RAISED":
            self._error = args[0] if args else None
        self._during = name
        try:
            method(event, *args, **kwargs)
        finally:
            self._during = outer
        if name in ("EPOCH_COMPLETED", "COMPLETED"):
            self._error = None  # a handler of the user's swallowed it, and training went on
        if name in _AFTER:
            getattr(self, _AFTER[name])()

    def evaluate(self, run: Callable[..., Any], engine: Any, *args: Any, **kwargs: Any) -> Any:
        """Run an engine while the trainer runs; the first one is the trainer itself."""
        if engine is self.trainer or not self.report.is_open or _hooks_of(engine):
            return run(engine, *args, **kwargs)
        name = self._meet(engine, kwargs.get("data", args[0] if args else None))
        state = run(engine, *args, **kwargs)
        self._tell_evaluation(engine, name)
        return state

    @guarded
    def _start(self, left: int | None = None) -> None:
        self._reset()
        if _rank() != 0:
            return
        from ignite import distributed

        state = self.trainer.state
        finished = state.epoch - 1 - (left is not None)
        resumed = Resumed(
            # Its own last run, unless a state was loaded since.
            run=self._run if state.iteration == self._reached else None,
            epoch=finished if finished >= 0 else None,
            step=int(state.iteration),
        )
        self._new_items()  # those of an earlier run
        folders = [_folder(handler) for handler in self._checkpoints()]
        saved = {k: v for h in self._checkpoints() for k, v in dict(h.to_save or {}).items()}
        if self.optimizer is None:
            self._optimizers = {k: v for k, v in saved.items() if hasattr(v, "param_groups")}
        else:
            self._optimizers = {"optimizer": self.optimizer}
        self.report.start(
            RunStarted(
                framework="ignite",
                framework_version=version("ignite"),
                params=self._params(),
                save_dir=next((str(folder) for folder in folders if folder is not None), None),
                world_size=int(distributed.get_world_size()),
                resumed=resumed if state.iteration else None,
            )
        )
        self._run = getattr(self.report.emit, "run_id", None)
        self._describe([v for v in saved.values() if hasattr(v, "parameters")])
        if left is not None:
            self.report.start_epoch(left)

    def _params(self) -> dict[str, Any]:
        state = self.trainer.state
        found = {name: getattr(state, name, None) for name in _PARAMS}
        found["batch_size"] = getattr(state.dataloader, "batch_size", None)
        for name, optimizer in self._optimizers.items():
            kind = type(optimizer).__qualname__
            found[name] = {"type": kind, **getattr(optimizer, "defaults", {})}
        return {**{k: v for k, v in found.items() if v is not None}, **self.params}

    @guarded
    def _describe(self, models: list[Any]) -> None:
        parameters = {id(p): p for model in models for p in model.parameters()}.values()
        if parameters:
            self.report.tell(
                ModelDescribed(
                    parameters=sum(p.numel() for p in parameters),
                    gradients=sum(p.numel() for p in parameters if p.requires_grad),
                    layers=sum(1 for model in models for _ in model.modules()),
                )
            )

    @guarded
    def _start_epoch(self) -> None:
        self._cut_epoch()  # of a `terminate_epoch(skip_epoch_completed=True)`
        self.report.start_epoch(self.trainer.state.epoch - 1)

    @guarded
    def _step(self) -> None:
        if not self.report.is_open:
            return
        # Before the handlers: a scheduler among them sets the rates of the next update.
        one = len(self._optimizers) == 1
        self._rates = {
            f"lr/group_{i}" if one else f"lr/{name}/group_{i}": group.get("lr")
            for name, optimizer in self._optimizers.items()
            for i, group in enumerate(optimizer.param_groups)
        }
        step = int(self.trainer.state.iteration)
        values = self._output() if self.report.wants_step(step) else None
        if values:
            values |= self._rates
            epoch = self.report.epoch
            self.report.metrics(values, "train", epoch=epoch, step=step, on_request=True)

    @guarded
    def _output(self) -> dict[str, float]:
        """Return what the trainer's function returned last, as far as it is numbers."""
        output = self.trainer.state.output
        if self.output_transform is not None:
            output = self.output_transform(output)
        if isinstance(output, tuple):
            output = {f"output/{i}": value for i, value in enumerate(output)}
        elif not isinstance(output, Mapping):
            output = {"output": output}
        return _numbers({f"train/{name}": value for name, value in output.items()})

    @guarded
    def _end_epoch(self) -> None:
        self._tell_saved()
        found = self.trainer.state.metrics.items()
        self._tell_epoch(_numbers({f"train/{name}": value for name, value in found}))

    @guarded
    def _cut_epoch(self) -> None:
        self._tell_epoch({})  # the metrics are still those of the epoch before

    def _tell_epoch(self, values: dict[str, float]) -> None:
        if self.report.epoch is not None:
            values = {**(values or self._output() or {}), **self._rates}
            self.report.metrics(values, "train", epoch=self.report.epoch)
            self.report.end_epoch()

    def _terminate(self) -> None:
        self._is_terminated = True
        self._cut_epoch()

    def _interrupt(self) -> None:
        self._is_interrupted, self._left = True, self.report.epoch

    @guarded
    def _meet(self, engine: Any, data: Any) -> str:
        """Return the name of an evaluator that is about to run."""
        if id(engine) not in self._evaluators:
            self._tell_saved()
            self._evaluators[id(engine)] = engine
            self._new_items()  # those of an earlier run
        given = next((name for name, each in self.named.items() if each is engine), None)
        name = given or _logger_name(engine) or "val"
        is_train = data is not None and data is self.trainer.state.dataloader
        if is_train and not name.startswith("train"):
            name = "train_eval"
        elif given:
            return given
        key = id(engine), is_train
        taken = {*self._names.values(), *self.named}
        free = (f"{name}{i}" if i > 1 else name for i in count(1))
        if key not in self._names:
            self._names[key] = next(each for each in free if each not in taken)
        return self._names[key]

    @guarded
    def _tell_evaluation(self, engine: Any, name: str) -> None:
        during = self._during
        if engine.state.times.get("EPOCH_COMPLETED"):  # else the metrics are those of a run before
            found = engine.state.metrics.items()
            is_summary = during in ("EPOCH_COMPLETED", "COMPLETED")
            self.report.metrics(
                {f"{name}/{key}": value for key, value in found},
                next((p for p in ("train", "test") if name.startswith(p)), "validation"),
                epoch=self.report.epoch,
                step=None if is_summary else self.trainer.state.iteration,
                final=during == "COMPLETED",
            )
        self._tell_saved()

    def _handlers(self) -> Iterator[Any]:
        """Yield the handlers of the trainer and its evaluators, each once."""
        engines = [self.trainer, *self._evaluators.values()]
        lists = [entries for engine in engines for entries in engine._event_handlers.values()]
        found = [entry[0] for entries in lists for entry in entries]
        # Behind an event with a filter, a function stands for the handler.
        handlers = [h._parent() if hasattr(h, "_parent") else h for h in found]
        yield from {id(h): h for h in handlers}.values()

    def _checkpoints(self) -> list[Any]:
        from ignite.handlers import Checkpoint

        return [h for h in self._handlers() if isinstance(h, Checkpoint)]

    def _new_items(self) -> list[tuple[Any, Any]]:
        """Return what was saved since the last call: the handler, and its entry of the file."""
        found = [(h, i) for h in self._checkpoints() for i in h._saved if id(i) not in self._seen]
        self._seen.update((id(item), item) for _, item in found)
        return found

    @guarded
    def _tell_saved(self) -> None:
        for handler, item in self._new_items() if self.report.is_open else ():
            folder = _folder(handler)
            if folder is None or not (folder / item.filename).exists():
                continue
            epoch = self.trainer.state.epoch - 1 if self.report.epoch is None else self.report.epoch
            kind: Literal["best", "last", "periodic"]
            kind, metrics = "periodic" if handler.n_saved is None else "last", {}
            if handler.score_function is not None:
                name, value = str(handler.score_name or "score"), float(item.priority)
                kind, metrics = "periodic", {name: value}
                if item is handler._saved[-1]:
                    kind = "best"
                    self._bests[id(handler)] = Best(metric=name, value=value, epoch=epoch)
            has_own_name = kind == "periodic" and handler.filename_pattern is None and not metrics
            saved = CheckpointSaved(
                path=str(folder / item.filename),
                kind=kind,
                epoch=epoch if epoch >= 0 else None,
                step=int(self.trainer.state.iteration),
                metrics=metrics,
                final=has_own_name,
            )
            self.report.tell(saved)
            if kind != "periodic":
                self._newest[id(handler)] = saved

    @guarded
    def _end(self) -> None:
        self._reached = self.trainer.state.iteration
        best = next(iter(self._bests.values()), None)
        if self._error is not None:  # a handler of the user's swallowed it, and training was over
            self.report.fail(self._error, rank=_rank(), best=best)
        elif self._is_interrupted:
            self.report.tell(RunEnded(status="stopped", reason="interrupted", best=best))
            self.report.is_open = False
        elif self.report.is_open:
            self._tell_saved()
            for saved in self._newest.values():
                if Path(saved.path).exists():
                    self.report.tell(msgspec.structs.replace(saved, final=True))
            self.report.end(self._why_ended(), best)

    def _why_ended(self) -> str | None:
        from ignite.handlers import EarlyStopping

        state = self.trainer.state
        planned = (state.max_epochs or 0) * (state.epoch_length or 0)
        planned = getattr(state, "max_iters", None) or planned
        if not self._is_terminated or 0 < planned <= state.iteration:
            return None
        for h in self._handlers():
            if isinstance(h, EarlyStopping) and h.trainer is self.trainer:
                score = getattr(h.score_function, "__name__", "")
                score = score if score.isidentifier() and score != "wrapper" else "score"
                if h.counter >= h.patience:
                    return f"early stop: no better {score} in {h.patience} evaluations"
        return "terminated"


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


def _hooks_of(engine: Any) -> list[_Hooks]:
    """Return what hangs on an engine."""
    hung = getattr(vars(engine).get("run"), "ignite_hooks", [])
    return [hooks for hooks in hung if hooks.report.active]


def _trains(engine: Any, *args: Any, **kwargs: Any) -> bool:
    """Return whether an engine is run for epochs or iterations, or goes on with such a run."""
    given = (*args[1:], kwargs.get("max_epochs"), kwargs.get("max_iters"))
    state = engine.state
    many = (state.max_epochs or 0) > 1 or getattr(state, "max_iters", None) is not None
    return any(each is not None for each in given) or (state.iteration > 0 and many)


def _logger_name(engine: Any) -> str:
    """Return the name that a user gave to an engine's logger: `val` of `Val Evaluator`."""
    name = engine.logger.name
    if name.startswith("ignite."):
        return ""
    return re.sub(r"\W+", "_", name.lower().replace("evaluator", "")).strip("_")


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    found = {name: number(value) for name, value in values.items()}
    return {name: value for name, value in found.items() if value is not None}


def _folder(checkpoint: Any) -> Path | None:
    """Return where a handler saves, None where that is no folder of this machine."""
    folder = getattr(checkpoint.save_handler, "dirname", None)
    return None if folder is None else Path(folder).absolute()


def _rank() -> int:
    from ignite import distributed

    if distributed.backend() is None:
        # ignite knows of no other process, but a launcher may have begun some.
        return int(os.environ.get("RANK") or 0)
    return int(distributed.get_rank())
