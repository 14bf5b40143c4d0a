"""Turns the events of one trainer into records, one run after another.

Guarantees, whatever is called in whatever order: each run has one `run.started` first and one
`run.ended` last, `seq` has no gaps, and no exception of a subscriber or sink reaches the training.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from trainbus import normalize, redaction
from trainbus.capture.recorder import ConsoleRecorder
from trainbus.delivery.dispatcher import RunDispatcher
from trainbus.delivery.sidecar import Sidecar
from trainbus.delivery.worker import delivering
from trainbus.distributed import current_rank
from trainbus.errors import SinkError, comes_from_handler
from trainbus.events import (
    EpochStarted,
    Event,
    MetricsLogged,
    RunEnded,
    RunStarted,
    ended_by,
    event_name,
)
from trainbus.interfaces import RunInfo
from trainbus.journal.recovery import end_with_cause
from trainbus.journal.writer import JournalWriter, NullJournal
from trainbus.paths import with_absolute_paths
from trainbus.recording import current, launched, peers, process_hooks
from trainbus.recording.run_id import identify, mark
from trainbus.recording.settings import RunSettings
from trainbus.recording.subscribers import Subscribers

if TYPE_CHECKING:
    from trainbus.bus import Bus

logger = logging.getLogger("trainbus")

_MAX_NESTING = 3
_MAX_LEFT_OUT = 20  # lines on what can't be recorded; further ones are only counted
_MAX_EARLY = 1_000  # events that are kept until the run opens
_T = TypeVar("_T")


class Emitter:
    """Records the events of one trainer: of an adapter, or of a plain loop."""

    def __init__(
        self,
        settings: RunSettings,
        subscribers: Subscribers,
        sidecar: Sidecar,
        open_runs: list[Emitter],
    ) -> None:
        """Prepare; the first event opens a run.

        Args:
            settings: of the bus.
            subscribers: the bus's receivers; each open run connects its dispatcher to them.
            sidecar: the bus's delivery processes.
            open_runs: the bus's list of emitters that have an open run, which keeps them alive.
        """
        self.settings = settings
        self._subscribers = subscribers
        self._sidecar = sidecar
        self._open_runs = open_runs
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._pending: deque[tuple[Event, int]] = deque()
        self._nesting = 0
        self._busy = False
        self._run: RunInfo | None = None
        self._journal: JournalWriter | NullJournal | None = None
        self._dispatcher: RunDispatcher | None = None
        self._console: ConsoleRecorder | None = None
        self._owner = 0
        self._is_helper_process: bool | None = False
        self._shares_run = False
        self._ended_once = False
        self._dropped = 0
        self._is_recorded = False
        self._warned: set[str] = set()
        self._left_out: set[str] = set()
        self._unrecorded = 0
        self._early: list[Event] = []
        """What the user logged before the run opened."""
        self.epoch: int | None = None
        """The epoch in progress, or between two epochs the last one; None after the last epoch."""

    @property
    def services(self) -> frozenset[str]:
        """Import names of the trackers that this bus feeds."""
        return self.settings.services

    def every(self, phase: str) -> int | None:
        """Return the smallest interval in steps at which a sink asks for step values."""
        return self.settings.every(phase)

    @property
    def run_id(self) -> str | None:
        """Id of the run that is open, None when none is."""
        return self._run.id if self._run else None

    @property
    def run_name(self) -> str | None:
        """Name of the run that is open."""
        return self._run.started.name if self._run else None

    def links(self) -> dict[str, str]:
        """Return where each sink shows the run, for the sinks that are open."""
        with self._lock:
            return {} if self._dispatcher is None else self._dispatcher.links()

    def log(self, event: Event, /) -> None:
        """Record an event of the user's own, which never opens a run.

        Before the run of an adapter opens, the event is kept and recorded once it does.
        """
        if os.getpid() != self._pid and not self._is_adopted():
            return
        with self._lock:  # another thread may be opening the run
            if self._run is None:
                self._keep(event)
                return
        self(event)

    def _keep(self, event: Event) -> None:
        """Keep an event until the run opens, or drop it."""
        if self._ended_once:
            self._warn("late", f"dropped {event_name(event)}: its run has ended")
        elif len(self._early) < _MAX_EARLY:
            self._early.append(event)
        else:
            self._dropped += 1
            self._warn("early", f"dropped {event_name(event)}: too many before the run opens")

    def __call__(self, event: Event, /) -> None:
        """Record an event as the next record of the run.

        Raises:
            SinkError: a sink with `on_error: raise` can't be opened.
        """
        if os.getpid() != self._pid and not self._is_adopted():
            return
        if self._is_helper_process is None:
            self._is_helper_process = _is_helper()
        if self._is_helper_process:
            return
        if getattr(delivering, "here", False):
            self._warn("sink", f"dropped {event_name(event)}: emitted by a sink")
            return
        with self._lock:
            if self._nesting >= _MAX_NESTING:
                self._dropped += 1
                self._warn("nested", f"dropped {event_name(event)}: emitted by its own subscribers")
                return
            self._pending.append((event, self._nesting))
            if self._busy:
                return
            try:
                self._busy = True
                while self._pending:
                    following, nesting = self._pending.popleft()
                    self._nesting = nesting + 1
                    self._is_recorded = False
                    self._record_or_count(following)
            finally:
                self._busy = False
                self._nesting = 0
                process_hooks.finish_sigterm()

    def failed_on(self, rank: int, error: BaseException) -> None:
        """Record what ended another rank, so that the run of rank 0 ends with the true cause."""
        if ended_by(error).status != "failed":  # an exit or Ctrl-C is not a cause
            return
        try:
            if not peers.report(self.settings.journal_folders(), rank, error, time.time()):
                self._warn(
                    "rank", f"rank {rank} failed, but no run was found to record it in: {error!r}"
                )
        except Exception as second:
            self._warn("rank", f"the failure of rank {rank} can't be recorded: {second}")

    def leave_out(self, what: str) -> None:
        """Warn once about a value that can't be recorded, and count it."""
        if os.getpid() != self._pid or (self._run is None and self._ended_once):
            return
        self._unrecorded += 1
        if what not in self._left_out and len(self._left_out) <= _MAX_LEFT_OUT:
            self._left_out.add(what)
            is_last = len(self._left_out) > _MAX_LEFT_OUT
            more = "further values are only counted, in the receipt"
            logger.warning("not recorded: %s", more if is_last else redaction.text(what))

    def _is_adopted(self) -> bool:
        """Return whether this forked process logs: only if its parent has no run.

        A forked child shares the parent's files and must not write to them.
        """
        if self._shares_run:
            self._warn("fork", "a forked process logs nothing: its parent has the run")
            return False
        self._pid = os.getpid()
        self._is_helper_process = None
        return True

    def may_be_helper(self) -> None:
        """At the first event, check whether this process is a helper, as workers of loaders are."""
        self._is_helper_process = None

    def end(self, error: BaseException | None = None) -> None:
        """End the run that is open, if one is: as failed or stopped by `error`, else finished.

        On another rank, where no run is open, the error is recorded in the run of rank 0.
        """
        if self._run is not None:
            self(ended_by(error))
            return
        if error is not None and (rank := current_rank()):
            self.failed_on(rank, error)
        if self._early:
            count, self._early = len(self._early), []
            self._warn("unopened", f"dropped {count} events: their run never opened")
        self._try(
            "the hooks for the end of the process stay installed", process_hooks.unwatch, self
        )

    def watch_other_rank(self) -> None:
        """On another rank than 0, record the error that ends this process in the run of rank 0."""
        if current_rank():
            watch = functools.partial(process_hooks.watch, self, of_signals=False)
            self._try("an error that ends this process is not recorded by rank 0", watch)

    def interrupt(self, event: RunEnded, flush_secs: float) -> bool:
        """End the run from a signal handler; False if the running `emit` does that.

        It waits at most `flush_secs` for the sinks.
        """
        if self._run is None or not self._lock.acquire(timeout=flush_secs):
            return True
        try:
            dispatcher, is_over = self._dispatcher, not self._busy
            if dispatcher is not None:
                dispatcher.limit_wait(flush_secs)
            self(event)
            return is_over
        finally:
            self._lock.release()

    def fail(self, error: BaseException, thread: int) -> None:
        """End the run if the thread that started it died."""
        if self._run is not None and self._owner == thread:
            self.end(error)

    def abandon(self) -> None:
        """Release everything in a forked child, which shares the files of its parent."""
        self._lock = threading.RLock()
        current.remove(self)
        self._run, dispatcher = None, self._dispatcher
        self._shares_run = True
        console, self._console = self._console, None
        if console is not None:
            console.abandon()
        if dispatcher is not None:
            self._subscribers.disconnect(dispatcher.on_record)
            dispatcher.abandon()

    def __deepcopy__(self, memo: dict[int, Any]) -> Emitter:
        """Frameworks copy their callbacks; the copy reports to the same run."""
        return self

    def __copy__(self) -> Emitter:
        return self

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Unpickle, in another process, to an emitter of a bus made from the same configuration."""
        return reopen, (self.settings.rebuild,)

    def _record_or_count(self, event: Event) -> None:
        """Record an event; an error is reported once and costs only that event."""
        try:
            self._record_or_drop(event)
        except SinkError:  # `on_error: raise`
            raise
        except Exception as error:
            if comes_from_handler(error):
                raise
            self._dropped += not self._is_recorded
            what = "handed on" if self._is_recorded else "recorded"
            text = f"{event_name(event)} could not be {what}: {error!r}"
            self._warn(f"not {what}", f"training continues, but {text}")

    def _record_or_drop(self, event: Event) -> None:
        if isinstance(event, RunEnded):
            if self._run is not None:
                self._finish(event)
            return
        ready = self._prepared(event)
        if ready is None:
            return
        if self._run is not None and type(ready) is not RunStarted:
            self._record(ready)
        elif isinstance(ready, RunStarted):
            self.end_previous()
            self._start(ready)
        elif self._ended_once:
            self._warn("late", f"dropped {event_name(ready)}: its run has ended")
        else:
            self._start(RunStarted())
            self._record(ready)

    def _prepared(self, event: Event) -> Event | None:
        """Return an event with plain values and no secrets, None if it is none of the schema."""
        try:
            event_name(event)
            event, left_out = normalize.event(event)
            secret = frozenset(self.settings.journal.redact)
            event = redaction.event(with_absolute_paths(event), secret)
        except Exception as error:
            what = f"dropped a {type(event).__qualname__} that is no event of the schema: {error}"
            self._warn(what, what)
            self._dropped += 1
            return None
        for what in left_out:
            self.leave_out(f"{event_name(event)}: {what}")
        return event

    def end_previous(self) -> None:
        """End the run that is open because the same trainer starts another one."""
        if self._run is not None:
            self._finish(RunEnded(status="stopped", reason="another run started in its place"))

    def _start(self, event: RunStarted) -> None:
        event = self._with_defaults(event)
        found = self._try("a resumed training may begin a new run", identify, event)
        run_id, attempt = found or (f"run_{secrets.token_hex(8)}", 1)
        self._journal = self.settings.open_journal(run_id, attempt)
        attempt = self._journal.attempt
        self._run = RunInfo(id=run_id, started=event, attempt=attempt)
        self._owner = threading.get_ident()
        self._open_runs.append(self)
        self._try("the end of the process may not end the run", process_hooks.watch, self)
        self._try("`trainbus run` may say that nothing was recorded", launched.note_recorded)
        if event.save_dir is not None:
            what = "a resumed training will not find this run again"
            self._try(what, mark, event.save_dir, run_id, attempt)
        record = self._journal.append(event, time.time())
        self._is_recorded = True
        folder = self._journal.folder
        if folder is not None:
            self._try(
                "failures of other ranks will not be recorded", peers.announce, folder, attempt
            )
        if self.settings.capture.console == "python":
            self._console = self._try(
                "what the program prints is not recorded", self._open_console, self._journal
            )
        dispatcher = self._deliver(self._run, self._journal)
        self._subscribers.send(record)
        if dispatcher is not None:
            try:
                dispatcher.require_opened()
            except SinkError as error:
                self._finish(ended_by(error))
                raise
        current.add(self)
        early, self._early = self._early, []
        self._pending.extendleft((event, 0) for event in reversed(early))

    def _open_console(self, journal: JournalWriter | NullJournal) -> ConsoleRecorder | None:
        if isinstance(journal, NullJournal):
            return None
        return ConsoleRecorder(journal.folder, journal.attempt)

    def _close_console(self) -> None:
        console, self._console = self._console, None
        if console is not None:
            self._try("the last lines that the program printed may be missing", console.stop)

    def _with_defaults(self, event: RunStarted) -> RunStarted:
        """Return the start of a run with the user's defaults."""
        changed = self.settings.defaults.apply(event)
        # Defaults that were not read from a file have unchecked types.
        ready = event if changed is event else self._prepared(changed)
        return ready if isinstance(ready, RunStarted) else event

    def _record(self, event: Event) -> None:
        run, journal = self._opened()
        record = journal.append(event, time.time())
        self._is_recorded = True
        if type(event) is EpochStarted:
            self.epoch = event.epoch
        elif type(event) is MetricsLogged and event.final:
            self.epoch = None
        if self._dispatcher is None:
            self._deliver(run, journal)
        self._subscribers.send(record)

    def _finish(self, event: RunEnded) -> None:
        run, journal = self._opened()
        if self._dispatcher is None:
            self._deliver(run, journal)
        if journal.ended:  # and then a signal came
            self._close(event.status)
            return
        record = None
        try:
            with process_hooks.signals_deferred():
                self._close_console()
                ready = self._prepared(event)
                if not isinstance(ready, RunEnded):
                    return
                if (folder := journal.folder) is not None:
                    what = "failures of other ranks are unknown"
                    ready = self._try(what, end_with_cause, folder, run.attempt, ready) or ready
                    self._try("the note for other ranks stays", peers.withdraw, folder)
                record = journal.append(ready, time.time())
                self._is_recorded = True
        finally:
            if record is not None:
                try:
                    self._subscribers.send(record)
                finally:
                    self._close(event.status)

    def _opened(self) -> tuple[RunInfo, JournalWriter | NullJournal]:
        assert self._run is not None
        assert self._journal is not None
        return self._run, self._journal

    def _deliver(self, run: RunInfo, journal: JournalWriter | NullJournal) -> RunDispatcher | None:
        """Open the run's dispatcher; None if that fails or failed before."""
        # It is also missing after a Ctrl-C during the start of the run.
        what = "sinks receive nothing of this run before `trainbus replay`"
        if self._dispatcher is None and what not in self._warned:
            found = self._try(what, self._open_dispatcher, run, journal)
            if found is not None:
                self._dispatcher = found
                self._subscribers.connect(run.id, found.on_record)
        return self._dispatcher

    def _open_dispatcher(self, run: RunInfo, journal: JournalWriter | NullJournal) -> RunDispatcher:
        return RunDispatcher(
            self.settings.sinks,
            run,
            journal,
            sidecar=self._sidecar,
            isolation=self.settings.isolation,
            flush_secs=self.settings.flush_secs,
            config=self.settings.config,
            capture=self.settings.capture.task(),
        )

    def _close(self, status: str) -> None:
        dispatcher, journal = self._dispatcher, self._journal
        dropped, self._dropped = self._dropped, 0
        unrecorded, self._unrecorded = self._unrecorded, 0
        try:
            if dispatcher is not None:
                self._subscribers.disconnect(dispatcher.on_record)
                dispatcher.dropped += dropped
                dispatcher.unrecorded += unrecorded
                self.settings.on_receipt(dispatcher.close(status))
                dispatcher.raise_interrupt()
            elif isinstance(journal, JournalWriter):
                journal.close()
        finally:
            current.remove(self)
            self._close_console()
            self._run = self._journal = self._dispatcher = self.epoch = None
            self._ended_once = True
            with suppress(ValueError):
                self._open_runs.remove(self)
            self._try(
                "the hooks for the end of the process stay installed", process_hooks.unwatch, self
            )

    def _try(self, consequence: str, call: Callable[..., _T], *args: Any) -> _T | None:
        """Return the result of a call, None if it raises; `consequence` is then reported once."""
        try:
            return call(*args)
        except Exception as error:
            if comes_from_handler(error):
                raise
            self._warn(consequence, f"{consequence}: {error}")
            return None

    def _warn(self, what: str, text: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("%s", text)


class NullEmitter:
    """Replaces an emitter in a process that has no configuration to make a bus from."""

    services: frozenset[str] = frozenset()
    run_id: str | None = None

    def __call__(self, event: Event, /) -> None:
        """Do nothing."""

    def every(self, phase: str) -> int | None:
        """Return None."""
        return None

    def failed_on(self, rank: int, error: BaseException) -> None:
        """Do nothing."""

    def leave_out(self, what: str) -> None:
        """Do nothing."""


def reopen(rebuild: Callable[[], Bus] | None) -> Emitter | NullEmitter:
    """Return an emitter for this process, of a new bus from the configuration."""
    if rebuild is None:
        logger.warning(
            "a callback of trainbus reached another process without its sinks: "
            "configure them in a file (`trainbus.load`) to have that process log too"
        )
        return NullEmitter()
    try:
        emitter = rebuild().emitter(is_main=False)
        emitter.may_be_helper()
        return emitter
    except Exception as error:  # training runs elsewhere
        logger.warning("this process logs nothing: %s", error)
        return NullEmitter()


def _is_helper() -> bool:
    """Return whether this is a daemonic child, such as a worker of a data loader or of a pool.

    Frameworks don't train in daemonic children. Whether this is one is unknown while unpickling.
    """
    return bool(multiprocessing.current_process().daemon)
