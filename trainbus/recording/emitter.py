"""Turns the events of one trainer into the records of its runs, one run after another.

Guarantees, whatever is called in whatever order: each run has one `run.started` first and one
`run.ended` last, `seq` has no gaps, and nothing raised by a subscriber or a sink reaches training.
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
from trainbus.delivery.dispatcher import RunDispatcher
from trainbus.delivery.sidecar import Sidecar
from trainbus.delivery.worker import delivering
from trainbus.distributed import current_rank
from trainbus.errors import SinkError
from trainbus.events import (
    Event,
    RunEnded,
    RunStarted,
    ended_by,
    event_name,
)
from trainbus.interfaces import RunInfo
from trainbus.journal.recovery import end_with_cause
from trainbus.journal.writer import JournalWriter, NullJournal
from trainbus.paths import with_absolute_paths
from trainbus.recording import launched, peers, process_hooks
from trainbus.recording.run_id import identify, mark
from trainbus.recording.settings import RunSettings
from trainbus.recording.subscribers import Subscribers

if TYPE_CHECKING:
    from trainbus.bus import Bus

logger = logging.getLogger("trainbus")

_MAX_NESTING = 3
_MAX_LEFT_OUT = 20  # lines on what can't be recorded; further ones are only counted
_T = TypeVar("_T")


class Emitter:
    """What `attach` gives to an adapter, and what a plain loop emits through."""

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
        self._owner = 0
        self._helps: bool | None = False
        self._shares_run = False
        self._ended_once = False
        self._dropped = 0
        self._is_kept = False
        self._warned: set[str] = set()
        self._left_out: set[str] = set()
        self._unrecorded = 0

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

    def __call__(self, event: Event, /) -> None:
        """Hand an event to the bus: it becomes the next record of the run.

        Raises:
            SinkError: a sink with `on_error: raise` can't be opened.
        """
        if os.getpid() != self._pid and not self._is_adopted():
            return
        if self._helps is None:
            self._helps = _is_helper()
        if self._helps:
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
                    self._is_kept = False
                    self._take_or_count(following)
            finally:
                self._busy = False
                self._nesting = 0
                process_hooks.finish_sigterm()

    def failed_on(self, rank: int, error: BaseException) -> None:
        """Tell what ended another rank, so that the run of rank 0 ends with the true cause."""
        if ended_by(error).status != "failed":  # who leaves by an exit or by Ctrl-C is no cause
            return
        try:
            if not peers.report(self.settings.journal_folders(), rank, error, time.time()):
                self._warn("rank", f"rank {rank} found no run to tell its failure to: {error!r}")
        except Exception as second:
            self._warn("rank", f"the failure of rank {rank} can't be told: {second}")

    def leave_out(self, what: str) -> None:
        """Say once what of this run can't be recorded, and count it."""
        if os.getpid() != self._pid or (self._run is None and self._ended_once):
            return
        self._unrecorded += 1
        if what not in self._left_out and len(self._left_out) <= _MAX_LEFT_OUT:
            self._left_out.add(what)
            is_last = len(self._left_out) > _MAX_LEFT_OUT
            more = "more is left out, which the receipt counts"
            logger.warning("not recorded: %s", more if is_last else redaction.text(what))

    def _is_adopted(self) -> bool:
        """Return whether this forked process logs: it does if its parent had no run to go on with.

        A forked child shares the parent's files and must not write to them.
        """
        if self._shares_run:
            self._warn("fork", "a forked process logs nothing: its parent has the run")
            return False
        self._pid = os.getpid()
        self._helps = None
        return True

    def may_be_helper(self) -> None:
        """Find out, when the first event comes, whether this process only helps a training."""
        self._helps = None

    def end(self, error: BaseException | None = None) -> None:
        """End the run that is open, if one is: as failed or stopped by `error`, else finished.

        On another rank, where none is, the error is told to the run of rank 0.
        """
        if self._run is not None:
            self(ended_by(error))
            return
        if error is not None and (rank := current_rank()):
            self.failed_on(rank, error)
        self._try("the hooks for the end of the process stay", process_hooks.unwatch, self)

    def watch_other_rank(self) -> None:
        """Have what ends this process told, if it is not the one that has the run."""
        if current_rank():
            watch = functools.partial(process_hooks.watch, self, of_signals=False)
            self._try("an error that ends this process is not told to rank 0", watch)

    def interrupt(self, event: RunEnded, flush_secs: float) -> bool:
        """End the run from a signal handler; False if that is done when the emit under way is over.

        The sinks are waited for no longer than `flush_secs`.
        """
        if self._run is None or not self._lock.acquire(timeout=flush_secs):
            return True
        try:
            dispatcher, is_over = self._dispatcher, not self._busy
            if dispatcher is not None:
                dispatcher.hurry(flush_secs)
            self(event)
            return is_over
        finally:
            self._lock.release()

    def fail(self, error: BaseException, thread: int) -> None:
        """End the run that a thread started and died in."""
        if self._run is not None and self._owner == thread:
            self.end(error)

    def abandon(self) -> None:
        """Let go of everything in a forked child, which shares the files of its parent."""
        self._lock = threading.RLock()
        self._run, dispatcher = None, self._dispatcher
        self._shares_run = True
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

    def _take_or_count(self, event: Event) -> None:
        """Take an event; what goes wrong is said once, and costs that event alone."""
        try:
            self._take(event)
        except SinkError:  # `on_error: raise`
            raise
        except Exception as error:
            if process_hooks.comes_from_handler(error):
                raise
            self._dropped += not self._is_kept
            what = "handed on" if self._is_kept else "recorded"
            text = f"{event_name(event)} could not be {what}: {error!r}"
            self._warn(f"not {what}", f"training goes on, but {text}")

    def _take(self, event: Event) -> None:
        if isinstance(event, RunEnded):
            if self._run is not None:
                self._finish(event)
            return
        ready = self._ready(event)
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

    def _ready(self, event: Event) -> Event | None:
        """Return an event as it may be written, None for what is no event of the schema."""
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
        """End a run that a new one of the same trainer takes the place of."""
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
        self._is_kept = True
        folder = self._journal.folder
        if folder is not None:
            self._try("failures of other ranks will not be told", peers.announce, folder, attempt)
        dispatcher = self._deliver(self._run, self._journal)
        self._subscribers.send(record)
        if dispatcher is None:
            return
        try:
            dispatcher.demand()
        except SinkError as error:
            self._finish(ended_by(error))
            raise

    def _with_defaults(self, event: RunStarted) -> RunStarted:
        """Return a run's start with what the user sets for every run."""
        changed = self.settings.defaults.apply(event)
        # Those that were not read from a file have types that nobody has looked at.
        ready = event if changed is event else self._ready(changed)
        return ready if isinstance(ready, RunStarted) else event

    def _record(self, event: Event) -> None:
        run, journal = self._opened()
        record = journal.append(event, time.time())
        self._is_kept = True
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
                ready = self._ready(event)
                if not isinstance(ready, RunEnded):
                    return
                if (folder := journal.folder) is not None:
                    what = "what ended other ranks is not known"
                    ready = self._try(what, end_with_cause, folder, run.attempt, ready) or ready
                    self._try("the note of this job stays", peers.withdraw, folder)
                record = journal.append(ready, time.time())
                self._is_kept = True
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
        """Start what takes the run's records to the sinks; None if that failed before, or fails."""
        # It is missing after a Ctrl-C too, that came while the run was started.
        what = "no sink gets anything of this run before `trainbus replay`"
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
            self._run = self._journal = self._dispatcher = None
            self._ended_once = True
            with suppress(ValueError):
                self._open_runs.remove(self)
            self._try("the hooks for the end of the process stay", process_hooks.unwatch, self)

    def _try(self, consequence: str, call: Callable[..., _T], *args: Any) -> _T | None:
        """Return what a call returns; what it raises costs the run no more than a line says."""
        try:
            return call(*args)
        except Exception as error:
            if process_hooks.comes_from_handler(error):
                raise
            self._warn(consequence, f"{consequence}: {error}")
            return None

    def _warn(self, what: str, text: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("%s", text)


class NullEmitter:
    """Stands where an emitter was, in a process that has no configuration to make a bus from."""

    services: frozenset[str] = frozenset()
    run_id: str | None = None

    def __call__(self, event: Event, /) -> None:
        """Do nothing."""

    def every(self, phase: str) -> int | None:
        """Ask for nothing."""
        return None

    def failed_on(self, rank: int, error: BaseException) -> None:
        """Do nothing."""

    def leave_out(self, what: str) -> None:
        """Do nothing."""


def reopen(rebuild: Callable[[], Bus] | None) -> Emitter | NullEmitter:
    """Return an emitter for this process, of a bus made anew from the configuration."""
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
    except Exception as error:  # a configuration fault must not end a training that runs elsewhere
        logger.warning("this process logs nothing: %s", error)
        return NullEmitter()


def _is_helper() -> bool:
    """Return whether this is a daemonic child, such as a worker of a data loader or of a pool.

    Frameworks train in children that are no daemons; at the time of unpickling it can't be told.
    """
    return bool(multiprocessing.current_process().daemon)
