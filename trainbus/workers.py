"""Runs the workers of one run where they belong: in a sidecar process, in threads, or in `emit`.

`auto` means the sidecar: a busy thread makes the steps of a training several times longer, as both
need the interpreter's lock, and a process does not; it also outlives a training that is killed. A
sink that is an object of this process, or that uses something of it, gets a thread.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from trainbus.delivery import POLL_S, SinkWorker
from trainbus.errors import SinkError
from trainbus.files import Files
from trainbus.interfaces import RunInfo
from trainbus.journal import Journal, NoJournal
from trainbus.receipt import Receipt
from trainbus.route import Isolation, Route
from trainbus.runfolder import RunFolder, write_atomically
from trainbus.sidecar import Sidecar

logger = logging.getLogger("trainbus")

_SYNC_S = 1.0
_HALT_S = 2.0
_SAY_AFTER_S = 2.0
_OPEN_DEADLINE_S = 120.0


class Delivery:
    """The way of one run's records to all its sinks."""

    def __init__(
        self,
        routes: Sequence[Route],
        run: RunInfo,
        journal: Journal | NoJournal,
        *,
        isolation: Isolation = "auto",
        flush_secs: float = 60.0,
        config: str | None = None,
        base: Path | None = None,
    ) -> None:
        """Start the workers; the run's start must be in the journal."""
        self.dropped = 0
        """Events that never came into the journal."""
        self._run = run
        self._routes = routes
        self._journal = journal
        self._flush_secs = flush_secs
        self._config = config
        self._deadline: float | None = None
        self._polled_at = time.monotonic()
        self._interrupt: BaseException | None = None
        self._inline: list[SinkWorker] = []
        self._threads: list[ThreadedWorker] = []
        self._sidecar: Sidecar | None = None
        if isinstance(journal, NoJournal):
            return
        elsewhere = []
        for route in routes:
            mode = _mode(route, isolation)
            if mode == "inline":
                self._inline.append(self._worker(route, journal, in_background=False))
            elif mode == "thread":
                self._start_thread(route, journal)
            else:
                elsewhere.append(route)
        if elsewhere:
            self._sidecar = Sidecar(journal.folder, run.attempt, elsewhere, flush_secs, base=base)
            if not self._sidecar.start():
                # No further process can be started here: a thread is the next best.
                self._sidecar = None
                for route in elsewhere:
                    self._start_thread(route, journal)

    def poke(self) -> None:
        """Do what is to be done after a record was written; raises a Ctrl-C that came in a sink."""
        interrupt = None
        for worker in self._inline:
            while not worker.step() and worker.main.interrupt is None:
                pass
            interrupt = worker.interrupt or interrupt
        if interrupt is not None:
            raise interrupt
        if time.monotonic() - self._polled_at >= _SYNC_S:
            self._polled_at = time.monotonic()
            if self._sidecar is not None:
                self._sidecar.poll()
            elif not self._threads and isinstance(self._journal, Journal):
                self._journal.sync()
            if isinstance(self._journal, Journal):
                self._journal.look()

    def hurry(self, secs: float) -> None:
        """Wait no longer than that for the sinks, also if `close` is waiting already."""
        deadline = time.monotonic() + secs
        self._deadline = min(self._deadline or deadline, deadline)

    def close(self, status: str) -> Receipt:
        """Wait until the sinks have everything or the deadline comes; return what they got."""
        begun = time.monotonic()
        self.hurry(self._flush_secs)
        if isinstance(self._journal, NoJournal):
            count = self._journal.seq
            return Receipt(run=self._run.id, status=status, emitted=count, sinks=[], unsaved=count)
        self._journal.catch_up()
        held = self._journal.held
        emitted = self._journal.seq - self._journal.dropped.total()
        interrupt: BaseException | None = None
        for worker in self._inline:
            worker.add(held)
            worker.finish()
            while not (worker.done or worker.main.stopped or worker.step()):
                pass
            interrupt = worker.interrupt or interrupt
            worker.close()
        for thread in self._threads:
            thread.finish(held)
        if self._sidecar is not None:
            self._sidecar.finish(held, emitted)
        try:
            self._wait(begun)
        except BaseException as error:  # Ctrl-C: what is not sent waits in the journal
            interrupt = error
            self._halt()
        self._interrupt = interrupt
        return self._receipt(self._journal, status, emitted)

    def raise_interrupt(self) -> None:
        """Raise the Ctrl-C that came while the run was closed."""
        interrupt, self._interrupt = self._interrupt, None
        if interrupt is not None:
            raise interrupt

    def abandon(self) -> None:
        """Let go of everything in a forked child, whose parent has the run."""
        self._threads, self._inline = [], []
        if self._sidecar is not None:
            self._sidecar.abandon()
            self._sidecar = None
        if isinstance(self._journal, Journal):
            self._journal.close()

    def _wait(self, begun: float) -> None:
        said = False
        while not self._is_done() and time.monotonic() < (self._deadline or 0.0):
            time.sleep(POLL_S / 5)
            if not said and time.monotonic() - begun > _SAY_AFTER_S:
                said = True
                self._say_waiting()
        self._halt()

    def _halt(self) -> None:
        """End the workers, which then know what they got."""
        for thread in self._threads:
            thread.halt()
        for thread in self._threads:
            thread.join()
        if self._sidecar is not None:
            self._sidecar.stop()

    def _is_done(self) -> bool:
        sidecar = self._sidecar is None or self._sidecar.is_finished()
        return sidecar and all(thread.is_finished() for thread in self._threads)

    def _say_waiting(self) -> None:
        left = (self._deadline or 0.0) - time.monotonic()
        print(
            f"trainbus: waiting for the sinks, at most {left:.0f} s more; "
            "Ctrl-C leaves the rest for `trainbus replay`",
            file=sys.stderr,
            flush=True,
        )

    def _receipt(self, journal: Journal, status: str, emitted: int) -> Receipt:
        workers = [*self._inline, *(thread.worker for thread in self._threads)]
        found = {worker.route.name: worker.report(emitted) for worker in workers}
        if self._sidecar is not None:
            found |= {report.name: report for report in self._sidecar.reports(emitted)}
        journal.look()
        receipt = Receipt(
            run=self._run.id,
            status=status,
            attempt=self._run.attempt,
            emitted=emitted,
            sinks=[found[route.name] for route in self._routes if route.name in found],
            dropped=self.dropped + journal.dropped.total(),
            unsaved=journal.unsaved,
            journal=None if journal.is_gone else str(journal.folder.path),
            config=self._config,
        )
        save_receipt(journal.folder, receipt)
        journal.close()
        return receipt

    def demand(self) -> None:
        """Wait for the sinks without which there shall be no training.

        Raises:
            SinkError: a sink with `on_error: raise` could not be opened.
        """
        wanted = {route.name: route for route in self._routes if route.on_error == "raise"}
        if wanted and isinstance(self._journal, NoJournal):
            raise SinkError("no directory for the journal can be written, sinks get nothing")
        deadline = time.monotonic() + _OPEN_DEADLINE_S
        while wanted:
            errors: dict[str, str | None] = {}
            for worker in [*self._inline, *(thread.worker for thread in self._threads)]:
                if worker.opened is not None or worker.main.error is not None:
                    errors[worker.route.name] = None if worker.opened else worker.main.error or ""
            if self._sidecar is not None:
                self._sidecar.poll()
                errors |= self._sidecar.opened
            for name, error in errors.items():
                if name in wanted and error is not None:
                    route = wanted[name]
                    raise SinkError(f"sink {name!r} ({route.kind}) can't be opened: {error}")
                wanted.pop(name, None)
            if wanted and time.monotonic() > deadline:
                raise SinkError(f"sink {min(wanted)!r} did not open in {_OPEN_DEADLINE_S:.0f} s")
            if wanted:
                time.sleep(POLL_S / 5)

    def _worker(self, route: Route, journal: Journal, *, in_background: bool = True) -> SinkWorker:
        return SinkWorker(
            route,
            journal.folder,
            Files(journal.folder, None),  # the training process itself says which files there are
            attempt=self._run.attempt,
            in_background=in_background,
        )

    def _start_thread(self, route: Route, journal: Journal) -> None:
        thread = ThreadedWorker(self._worker(route, journal), journal)
        self._threads.append(thread)
        thread.start()


class ThreadedWorker:
    """A worker in a thread of its own."""

    def __init__(self, worker: SinkWorker, journal: Journal | None = None) -> None:
        self.worker = worker
        self._journal = journal
        self._synced_at = time.monotonic()
        self._finishing = False
        self._stopping = False
        self._wake = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"trainbus delivers to {worker.route.name}", daemon=True
        )

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def finish(self, lines: Sequence[bytes] = ()) -> None:
        """Say that no more records will come, but for `lines` that the disk had no room for."""
        if lines:
            self.worker.add(lines)
        self.worker.finish()
        self._finishing = True
        self._wake.set()

    def halt(self) -> None:
        """End soon, however much is left."""
        self._stopping = True
        self._wake.set()

    def join(self) -> None:
        """Wait for the end; a call of the sink that hangs is left behind."""
        self._thread.join(_HALT_S)

    def is_finished(self) -> bool:
        """Return whether the sink has everything, or will never have more."""
        return not self._thread.is_alive()

    def _run(self) -> None:
        worker = self.worker
        delivering.here = True
        while not self._stopping and not worker.done:
            is_last = self._finishing  # asked first: then the step sees all that there will be
            wait = worker.step()
            if is_last and (worker.main.stopped or (wait and worker.has_everything())):
                break
            if wait:
                self._sync()
                self._wake.wait(wait)
                if self._finishing:
                    self._wake.clear()
        worker.close()

    def _sync(self) -> None:
        now = time.monotonic()
        if self._journal is not None and now - self._synced_at >= _SYNC_S:
            self._synced_at = now
            self._journal.sync()


delivering = threading.local()
"""Marks the threads that deliver: what a sink emits from there would come back to it for ever."""


def save_receipt(folder: RunFolder, receipt: Receipt) -> None:
    """Write the receipt beside the journal; a disk that is full costs it."""
    with suppress(OSError):
        write_atomically(folder.receipt, msgspec.json.format(msgspec.json.encode(receipt)) + b"\n")


def _mode(route: Route, isolation: Isolation) -> Isolation:
    mode = route.isolation or isolation
    if mode == "auto":
        sample = route.sample()
        is_free = route.options is not None and sample is not None and not sample.in_process
        return "process" if is_free else "thread"
    if mode == "process" and route.options is None:
        logger.warning(
            "sink %r is an object of this process, so it runs in a thread instead of a process",
            route.name,
        )
        return "thread"
    return mode
