"""The bus: takes events in, hands records to subscribers and sinks.

It keeps nothing at module level: two buses, and two trainings on one bus, never see each other's
run.
"""

from __future__ import annotations

import logging
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, TypeAlias

import msgspec

from trainbus import normalize, registry
from trainbus.capture.recorder import CaptureSpec
from trainbus.delivery.receipt import Receipt
from trainbus.delivery.sidecar import Sidecar
from trainbus.delivery.spec import Isolation, SinkSpec
from trainbus.events import (
    Event,
    Record,
    RunEnded,
    RunStarted,
)
from trainbus.interfaces import Detach, Sink
from trainbus.journal.writer import JournalSpec
from trainbus.paths import resolve_options, working_directory
from trainbus.recording import process_hooks
from trainbus.recording.emitter import Emitter
from trainbus.recording.settings import RunDefaults, RunSettings
from trainbus.recording.subscribers import Subscribers
from trainbus.run import AttachedRun, LoopRun
from trainbus.toolkit.patching import weakly, when_gone

logger = logging.getLogger("trainbus")

SinkSource: TypeAlias = SinkSpec | Sink | Callable[[], Sink]

_ABANDONED = "what reported this run was deleted before the run had ended"


def print_receipt(receipt: Receipt) -> None:
    """Print what each sink received, on stderr, where trainers print too."""
    print(receipt, file=sys.stderr, flush=True)


class Bus:
    """Takes events in and hands records on.

    Args:
        sinks: name → sink. A sink may be an object, or a callable that makes one (needed where
            several runs are open at a time).
        defaults: what the user sets for every run.
        on_receipt: called with the receipt of every run that ends; by default it is printed.
        rebuild: makes an equal bus in another process; `trainbus.load` supplies it.
        isolation: where sinks run; `auto` is a process for configured sinks, a thread for objects.
        journal: where the journals of the runs are written, and what they may hold.
        flush_secs: how long the end of a run waits for the sinks.
        config: file that the bus was made from, for the command that sends the rest.
        environment: whether the command, code, packages and machine of each attempt are recorded.
        system_secs: seconds between two samples of how busy the machine is; 0 for none.
        console: `python` records what Python prints to stdout and stderr.
        base: folder that relative paths are relative to, of the journal and of sinks; by default
            the working directory at this time. A later change of directory moves nothing.
    """

    emitter_type: ClassVar[type[Emitter]] = Emitter

    def __init__(
        self,
        sinks: Mapping[str, SinkSource] | None = None,
        *,
        defaults: RunDefaults | None = None,
        on_receipt: Callable[[Receipt], None] = print_receipt,
        rebuild: Callable[[], Bus] | None = None,
        isolation: Isolation = "auto",
        journal: JournalSpec | None = None,
        flush_secs: float = 60.0,
        config: str | None = None,
        environment: bool = False,
        system_secs: float = 0.0,
        console: Literal["off", "python"] = "off",
        base: str | os.PathLike[str] | None = None,
    ) -> None:
        folder = working_directory() if base is None else Path(base).absolute()
        specs = tuple(_spec(name, source, folder) for name, source in (sinks or {}).items())
        self.receipts: list[Receipt] = []
        self.settings = RunSettings(
            sinks=specs,
            defaults=defaults or RunDefaults(),
            journal=journal or JournalSpec(),
            isolation=isolation,
            flush_secs=flush_secs,
            base=folder,
            config=config,
            capture=CaptureSpec(
                environment=environment,
                system_secs=system_secs,
                console=console,
                redact=(journal or JournalSpec()).redact,
            ),
            rebuild=rebuild,
            # Without a reference to the bus, which goes with the last one of its user's.
            on_receipt=partial(_receive, self.receipts, on_receipt if specs else None),
        )
        self._subscribers = Subscribers()
        self.sidecar = Sidecar(base=folder)
        """The delivery processes."""
        self.open_runs: list[Emitter] = []
        """Emitters with an open run, which this list keeps alive."""
        self._idle: weakref.WeakSet[Emitter] = weakref.WeakSet()
        self._attached: dict[int, weakref.ref[_Handle]] = {}
        """Id of a target → what its hooks emit by. The target keeps it alive, not the bus."""

    def attach(self, target: object) -> AttachedRun:
        """Register the adapter's hooks in `target`, so that its trainings are recorded.

        The bus does not keep the target alive. A run whose hooks no longer exist ends as stopped.

        Args:
            target: what the framework trains with, such as a `YOLO` model or a trainer.

        Returns:
            A handle to log with into the run of `target`, and to detach it again. Attaching the
            same object twice is the same as attaching it once.

        Raises:
            NoAdapterError: no installed adapter knows the object's framework.
            AttachError: the object is not one that its framework trains with.
        """
        key = id(target)
        known = self._attached[key]() if key in self._attached else None
        if known is None or known.target() is not target:
            emitter = self.emitter()
            known = _Handle(emitter, target)
            known.detach_hooks = registry.adapter_for(target)(target, known)
            found = weakref.ref(known, partial(self._forget, key))
            known.run = AttachedRun(emitter, self._detach(found))
            self._attached[key] = found
        return known.run

    def run(
        self,
        *,
        name: str | None = None,
        project: str | None = None,
        params: Any = None,
        **started: Any,
    ) -> LoopRun:
        """Return a run for a training loop of your own, to be used in a `with` statement.

        Args:
            name: what the run is called.
            project: what it belongs to.
            params: its configuration: a mapping, a namespace, an instance of a dataclass or of a
                class of attrs or pydantic, or a configuration of OmegaConf.
            started: further fields of `RunStarted`, such as `tags`, `task` or `save_dir`.

        Raises:
            TypeError: a field has a value of another type, or there is no such field.
        """
        event = RunStarted(
            name=name, project=project, params=normalize.plain_mapping(params, "params"), **started
        )
        fields = msgspec.structs.replace(event, params={})
        try:
            msgspec.convert(msgspec.to_builtins(fields, enc_hook=repr), RunStarted)
        except msgspec.ValidationError as error:
            raise TypeError(f"bus.run: {error}") from error
        return LoopRun(self.emitter(), event)

    def subscribe(
        self, receiver: Callable[[Record], object], *events: type[Any]
    ) -> Callable[[], None]:
        """Call `receiver(record)` for every event, or for the given event types only.

        Receivers run inside `emit`, in no defined order; one that raises is reported, and muted
        after five failures in a row.

        Returns:
            A function that ends the subscription.

        Raises:
            SubscribeError: the receiver is a coroutine function or no function, or what it is to
                hear is no event type.
        """
        return self._subscribers.subscribe(receiver, *events)

    def emitter(self, *, is_main: bool = True) -> Emitter:
        """Return what emits the events of one trainer, one run after another.

        Args:
            is_main: whether an error that ends this process ends the training. On another rank
                than 0, it is then recorded in the run of rank 0.
        """
        emitter = self.emitter_type(self.settings, self._subscribers, self.sidecar, self.open_runs)
        self._idle.add(emitter)
        if is_main:
            emitter.watch_other_rank()
        return emitter

    def close(self, error: BaseException | None = None) -> None:
        """End every open run, as `error` says if there is one, and detach from every trainer."""
        with ExitStack() as stack:  # all of it happens, even if Ctrl-C comes in one of the sinks
            stack.callback(process_hooks.remove_unused_hooks)
            stack.callback(self.sidecar.close)
            for found in self._attached.copy().values():
                stack.callback(_guarded_detach, self._detach(found))
            for emitter in reversed([*self.open_runs, *self._idle]):
                stack.callback(emitter.end, error)

    def __enter__(self) -> Bus:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(error)

    def _detach(self, found: weakref.ref[_Handle]) -> Detach:
        def detach() -> None:
            handle = found()
            if handle is not None and self._forget(handle.key, found):
                handle.detach_hooks()

        return detach

    def _forget(self, key: int, found: weakref.ref[_Handle]) -> bool:
        is_known = self._attached.get(key) is found
        if is_known:
            self._attached.pop(key, None)
        return is_known


class _Handle:
    """What an adapter emits by; when the last hook that has it is gone, its open run ends.

    It has the way out of the target: a target that is gone takes hooks, handle and that with it,
    whatever they refer to.
    """

    def __init__(self, emitter: Emitter, target: object) -> None:
        self._emitter = emitter
        self.key = id(target)
        self.target = weakly(target)
        self.detach_hooks: Detach = lambda: None
        self.run = AttachedRun(emitter, lambda: None)
        when_gone(self, partial(_end, emitter), if_due=lambda: emitter.run_id is not None)

    def __call__(self, event: Event, /) -> None:
        self._emitter(event)

    @property
    def services(self) -> frozenset[str]:
        return self._emitter.services

    @property
    def run_id(self) -> str | None:
        return self._emitter.run_id

    def every(self, phase: str) -> int | None:
        return self._emitter.every(phase)

    def failed_on(self, rank: int, error: BaseException) -> None:
        self._emitter.failed_on(rank, error)

    def leave_out(self, what: str) -> None:
        self._emitter.leave_out(what)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Handle:
        """Frameworks copy their callbacks; the copy reports to the same run."""
        return self

    def __copy__(self) -> _Handle:
        return self

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._emitter.__reduce__()


def _end(emitter: Emitter) -> None:
    try:
        emitter(RunEnded(status="stopped", reason=_ABANDONED))
    except Exception:
        logger.warning("a run could not be ended", exc_info=True)


def _guarded_detach(detach: Detach) -> None:
    try:
        detach()
    except Exception:
        logger.warning("an adapter could not detach", exc_info=True)


def _resolve_paths(sink: Sink, base: Path | None) -> None:
    """Make the paths in a sink's options absolute."""
    given = getattr(sink, "options", None)
    options = resolve_options(given, base)
    if options is not given:
        sink.options = options


def _spec(name: str, source: SinkSource, base: Path | None) -> SinkSpec:
    place = None if base is None else str(base)
    if isinstance(source, SinkSpec):
        return msgspec.structs.replace(source, name=name, base=source.base or place)
    if isinstance(source, Sink):
        _resolve_paths(source, base)
        return SinkSpec(
            name=name,
            make=lambda: source,
            kind=type(source).__name__,
            service=source.service,
            sink=source,
            base=place,
        )

    def make() -> Sink:
        sink = source()
        _resolve_paths(sink, base)
        return sink

    kind = getattr(source, "__name__", type(source).__name__)
    service = getattr(source, "service", None)
    return SinkSpec(name=name, make=make, kind=kind, service=service, base=place)


def _receive(
    receipts: list[Receipt], show: Callable[[Receipt], None] | None, receipt: Receipt
) -> None:
    receipts.append(receipt)
    if show is None:
        return
    try:
        show(receipt)
    except Exception:
        logger.warning("the receipt of run %s can't be shown", receipt.run, exc_info=True)
