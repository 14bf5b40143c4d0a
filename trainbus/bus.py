"""The bus: takes events in, hands records to subscribers and sinks.

It keeps nothing at module level: two buses, and two trainings on one bus, never see each other's
run.
"""

from __future__ import annotations

import inspect
import logging
import os
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, TypeAlias

import msgspec
from blinker import Namespace
from msgspec import Meta

from trainbus import normalize, registry
from trainbus.delivery.dispatcher import RunDispatcher
from trainbus.delivery.receipt import Receipt
from trainbus.delivery.sidecar import Sidecar
from trainbus.delivery.spec import Isolation, SinkSpec
from trainbus.errors import JournalError, SubscribeError
from trainbus.events import (
    ArtifactLogged,
    CheckpointSaved,
    Event,
    Record,
    RunEnded,
    RunStarted,
    event_name,
)
from trainbus.interfaces import Detach, RunInfo, Sink
from trainbus.journal.directory import RunFolder, existing_spare_folder, spare_folder
from trainbus.journal.writer import JournalSpec, JournalWriter, NullJournal
from trainbus.paths import resolve_options, resolved, working_directory
from trainbus.recording import process_hooks
from trainbus.recording.emitter import Emitter, print_receipt
from trainbus.run import Run
from trainbus.toolkit.patching import weakly, when_gone

logger = logging.getLogger("trainbus")

SinkSource: TypeAlias = SinkSpec | Sink | Callable[[], Sink]

_FAILURES_TO_MUTE = 5
_ABANDONED = "what reported this run was deleted before the run had ended"


class RunDefaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the user sets for every run, over what the adapter finds."""

    name: Annotated[str | None, Meta(description="What a run is called")] = None
    project: Annotated[str | None, Meta(description="What the runs belong to")] = None
    group: Annotated[str | None, Meta(description="Runs that are compared as one")] = None
    job_type: Annotated[str | None, Meta(description="Part in a group, such as `train`")] = None
    tags: Annotated[list[str] | None, Meta(description="Words to find the runs by")] = None
    notes: Annotated[str | None, Meta(description="Remarks for the reader")] = None

    def apply(self, started: RunStarted) -> RunStarted:
        """Return the start with these values in place of the adapter's."""
        given = {k: v for k, v in msgspec.structs.asdict(self).items() if v is not None}
        return msgspec.structs.replace(started, **given) if given else started


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
        base: folder that relative paths are relative to, of the journal and of sinks; by default
            the working directory at this time. A later change of directory moves nothing.
    """

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
        base: str | os.PathLike[str] | None = None,
    ) -> None:
        self.base = working_directory() if base is None else Path(base).absolute()
        self.routes = tuple(
            _route(name, source, self.base) for name, source in (sinks or {}).items()
        )
        self.defaults = defaults or RunDefaults()
        self.rebuild = rebuild
        self.receipts: list[Receipt] = []
        self.journal = journal or JournalSpec()
        self._journals = resolved(os.fspath(self.journal.dir), self.base)
        self.secret_keys = frozenset(self.journal.redact)
        self._isolation = isolation
        self._flush_secs = flush_secs
        self._config = config
        self._on_receipt = on_receipt
        self._signals = Namespace()
        self._emitters: list[Emitter] = []
        """Those that have an open run; others live as long as somebody emits by them."""
        self._idle: weakref.WeakSet[Emitter] = weakref.WeakSet()
        self._attached: dict[int, weakref.ref[_Handle]] = {}
        """Id of a target → what its hooks emit by. The target keeps it alive, not the bus."""
        self._main: Emitter | None = None
        self._sidecar = Sidecar(base=self.base)

    def emit(self, event: Event) -> None:
        """Hand an event to the bus's own run; the first one starts it."""
        if self._main is None:
            self._main = self._emitter()
        self._main(event)

    def attach(self, target: object) -> Detach:
        """Hang the framework's hooks into `target`, so that its training reports to this bus.

        The bus does not keep the target alive. A run whose hooks no longer exist ends as stopped.

        Args:
            target: what the framework trains with, such as a `YOLO` model or a trainer.

        Returns:
            A function that takes the hooks out again. Attaching the same object twice is the same
            as attaching it once.

        Raises:
            NoAdapterError: no installed adapter knows the object's framework.
            AttachError: the object is not one that its framework trains with.
        """
        key = id(target)
        known = self._attached[key]() if key in self._attached else None
        if known is None or known.target() is not target:
            known = _Handle(self._emitter(), target)
            known.detach_hooks = registry.adapter_for(target)(target, known)
            known.detach = self._detach(found := weakref.ref(known, partial(self._forget, key)))
            self._attached[key] = found
        return known.detach

    def run(
        self,
        *,
        name: str | None = None,
        project: str | None = None,
        params: Any = None,
        **started: Any,
    ) -> Run:
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
        return Run(self._emitter(), event)

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
        call = getattr(receiver, "__call__", None)  # noqa: B004  an object may have an async __call__
        if call is None:
            raise SubscribeError(f"expected a function that takes a record, found {receiver!r}")
        if inspect.iscoroutinefunction(receiver) or inspect.iscoroutinefunction(call):
            raise SubscribeError(
                f"{receiver!r} is a coroutine function and would never run; pass a plain function "
                "that hands the record to your event loop"
            )
        guarded = _Guarded(receiver)
        try:
            names = [event_name(event) for event in events] or ["*"]
        except TypeError as error:
            raise SubscribeError(str(error)) from error
        signals = [self._signals.signal(name) for name in names]
        for signal in signals:
            signal.connect(guarded, weak=False)

        def unsubscribe() -> None:
            for signal in signals:
                signal.disconnect(guarded)

        return unsubscribe

    def close(self, error: BaseException | None = None) -> None:
        """End every open run, as `error` says if there is one, and detach from every trainer."""
        with ExitStack() as stack:  # all of it happens, even if Ctrl-C comes in one of the sinks
            stack.callback(process_hooks.tidy)
            stack.callback(self._sidecar.close)
            for found in self._attached.copy().values():
                stack.callback(_guarded_detach, self._detach(found))
            for emitter in reversed([*self._emitters, *self._idle]):
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

    def dispatch(self, record: Record) -> None:
        """Send a record to the subscribers; called by emitters."""
        if not self._signals:
            return
        for name in (event_name(record.event), "*"):
            signal = self._signals.get(name)
            if signal is not None and signal.receivers:
                signal.send(record)

    def hold(self, emitter: Emitter) -> None:
        """Keep an emitter, whose run has begun, until `release`; called by emitters."""
        self._emitters.append(emitter)

    def release(self, emitter: Emitter) -> None:
        """Let go of an emitter whose run has ended; called by emitters."""
        with suppress(ValueError):
            self._emitters.remove(emitter)

    def open_journal(self, run: str, attempt: int) -> JournalWriter | NullJournal:
        """Create the journal of an attempt, where one can be written; called by emitters."""
        try:
            folder = self._create_folder(run)
            return JournalWriter(
                folder, attempt, max_bytes=self.journal.max_bytes, wants_files=self._keeper()
            )
        except Exception as error:
            if process_hooks.comes_from_handler(error):
                raise
            logger.warning("training goes on, but this run is not logged: %s", error)
            return NullJournal(run, attempt)

    def journal_folders(self) -> list[Path]:
        """Return where journals of this bus may be; called by emitters."""
        spare = existing_spare_folder()
        return [Path(self._journals), *([] if spare is None else [spare])]

    def open_delivery(self, run: RunInfo, journal: JournalWriter | NullJournal) -> RunDispatcher:
        """Start what takes a run's records to the sinks; called by emitters."""
        return RunDispatcher(
            self.routes,
            run,
            journal,
            sidecar=self._sidecar,
            isolation=self._isolation,
            flush_secs=self._flush_secs,
            config=self._config,
        )

    def close_run(self, delivery: RunDispatcher, status: str) -> None:
        """Close the sinks of a run that has ended; called by emitters."""
        receipt = delivery.close(status)
        self.receipts.append(receipt)
        if self.routes:
            try:
                self._on_receipt(receipt)
            except Exception:
                logger.warning("the receipt of run %s can't be shown", receipt.run, exc_info=True)
        delivery.raise_interrupt()

    def _create_folder(self, run: str) -> RunFolder:
        """Create the directory of a run, in the temporary folder where it can't be elsewhere.

        Raises:
            JournalError: it can't be created anywhere.
        """
        try:
            return RunFolder.create([self._journals], run)
        except JournalError as first:
            try:
                spare = spare_folder()
            except OSError as error:
                reason = error.strerror or error
                raise JournalError(f"{first}, nor a temporary folder: {reason}") from first
            folder = RunFolder.create([self.journal.dir, spare], run)
            logger.warning(
                "%s can't be written, the journal is in %s", self.journal.dir, folder.path
            )
            return folder

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

    def _keeper(self) -> Callable[[CheckpointSaved | ArtifactLogged], bool]:
        """Return what says whether a sink sends the files of an event."""
        samples = [route.sample() for route in self.routes]

        def wants_files(event: CheckpointSaved | ArtifactLogged) -> bool:
            try:
                return any(sample is None or sample.wants_files(event) for sample in samples)
            except Exception:
                return True

        return wants_files

    def _emitter(self) -> Emitter:
        emitter = self._new_emitter()
        self._idle.add(emitter)
        emitter.watch_other_rank()
        return emitter

    def _new_emitter(self) -> Emitter:
        return Emitter(self)


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
        self.detach: Detach = lambda: None
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


class _Guarded:
    """A subscriber that can't hurt training: what it raises is reported, not passed on."""

    def __init__(self, receiver: Callable[[Record], object]) -> None:
        self._receiver = receiver
        self._failures = 0

    def __call__(self, record: Record) -> None:
        if self._failures >= _FAILURES_TO_MUTE:
            return
        try:
            self._receiver(record)
        except Exception:
            self._failures += 1
            last = " and is muted now" if self._failures == _FAILURES_TO_MUTE else ""
            logger.warning("subscriber %r failed%s", self._receiver, last, exc_info=True)
        else:
            self._failures = 0


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


def _route(name: str, source: SinkSource, base: Path | None) -> SinkSpec:
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
