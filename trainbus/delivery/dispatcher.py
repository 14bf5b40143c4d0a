"""Runs the workers of one run: in a delivery process, in threads, or inside `emit`.

`auto` means the delivery process: a busy thread makes training steps several times longer, because
both need the interpreter's lock, and a process does not; it also outlives a training that is
killed. A sink that is an object of this process, or uses something of it, runs in a thread.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence

from trainbus.capture.recorder import CaptureRecorder, CaptureTask
from trainbus.delivery.receipt import Receipt, write_receipt
from trainbus.delivery.sidecar import Sidecar, SidecarRun
from trainbus.delivery.spec import Isolation, SinkSpec, isolation_of
from trainbus.delivery.worker import POLL_S, SinkWorker, ThreadedWorker, drive, reserve_cursor
from trainbus.errors import JournalError, SinkError
from trainbus.events import Record
from trainbus.interfaces import RunInfo
from trainbus.journal.counts import count_dropped, count_streams
from trainbus.journal.directory import RunFolder
from trainbus.journal.file_access import FileResolver
from trainbus.journal.writer import JournalWriter, NullJournal

logger = logging.getLogger("trainbus")
_POLL_SIDECAR_S = 1.0
_HALT_S = 5.0
_HALT_PART = 0.25
_MIN_HALT_S = 0.5
_INTERRUPTED_S = 2.0
_PRINT_AFTER_S = 2.0
_OPEN_DEADLINE_S = 120.0


class RunDispatcher:
    """Delivers one run to all its sinks; a receiver of the bus's signals."""

    def __init__(
        self,
        specs: Sequence[SinkSpec],
        run: RunInfo,
        journal: JournalWriter | NullJournal,
        *,
        sidecar: Sidecar,
        isolation: Isolation = "auto",
        flush_secs: float = 60.0,
        config: str | None = None,
        capture: CaptureTask | None = None,
    ) -> None:
        """Start the workers; the first record of the run must be in the journal.

        Args:
            specs: the sinks.
            run: the run.
            journal: its records.
            sidecar: the bus's, which delivers to the sinks that another process can make.
            isolation: where sinks run that don't say so themselves.
            flush_secs: how long the end of the run waits for the sinks.
            config: file that the bus was made from, for the command that sends the rest.
            capture: what to record of the training besides its events.
        """
        self.dropped = 0
        """Events that could not be recorded."""
        self.unrecorded = 0
        """Values that could not be recorded."""
        self._run = run
        self._specs = specs
        self._journal = journal
        self._flush_secs = flush_secs
        self._config = config
        self._deadline: float | None = None
        self._polled_at = time.monotonic()
        self._interrupt: BaseException | None = None
        self._inline: list[SinkWorker] = []
        self._threads: list[ThreadedWorker] = []
        self._waiting: list[ThreadedWorker] = []
        """Workers for which no thread could be started."""
        self._sidecar: SidecarRun | None = None
        self._recorder: CaptureRecorder | None = None
        """Records in this process what no delivery process records."""
        if isinstance(journal, NullJournal):
            return
        elsewhere = []
        for spec in specs:
            mode = isolation_of(spec, isolation)
            if mode == "inline":
                self._inline.append(self._worker(spec, journal, in_background=False))
            elif mode == "thread":
                self._start_thread(spec, journal)
            else:
                elsewhere.append(spec)
        if elsewhere:
            self._sidecar = sidecar.open(
                journal.folder, run.attempt, elsewhere, flush_secs, config=config, capture=capture
            )
            refused = self._sidecar.refused
            for spec in refused:  # no process can be started
                self._start_thread(spec, journal)
            if refused:
                why = self._sidecar.unserved[refused[0].name]
                logger.warning("sinks run in threads of the training process: %s", why)
        is_recorded = self._sidecar is not None and len(self._sidecar.refused) < len(elsewhere)
        if capture is not None and not is_recorded:
            self._recorder = CaptureRecorder(capture, journal.folder, run.attempt, os.getpid())
            self._recorder.start()

    def on_record(self, run: str, record: Record) -> None:
        """Run inline sinks and look after the delivery processes, after a record was written.

        Raises:
            KeyboardInterrupt: Ctrl-C came in an inline sink.
        """
        interrupt = None
        for worker in self._inline:
            while not worker.step() and worker.main.interrupt is None:
                pass
            interrupt = worker.interrupt or interrupt
        if interrupt is not None:
            raise interrupt
        if time.monotonic() - self._polled_at >= _POLL_SIDECAR_S:
            self._polled_at = time.monotonic()
            if self._sidecar is not None:
                self._sidecar.poll()
            if not self._is_synced_elsewhere() and isinstance(self._journal, JournalWriter):
                self._journal.sync()
            if isinstance(self._journal, JournalWriter):
                self._journal.check_file()

    def links(self) -> dict[str, str]:
        """Return where each open sink shows the run: name → URL, path or command."""
        found = {worker.spec.name: worker.location for worker in self._workers()}
        if self._sidecar is not None:
            self._sidecar.poll()
            found |= self._sidecar.locations
        return {
            spec.name: place for spec in self._specs if (place := found.get(spec.name)) is not None
        }

    def limit_wait(self, secs: float) -> None:
        """Shorten the time that `close` waits for the sinks, also if it waits already."""
        deadline = time.monotonic() + secs
        self._deadline = min(self._deadline or deadline, deadline)

    def close(self, status: str) -> Receipt:
        """Wait until the sinks have everything or time is up; return the receipt."""
        begun = time.monotonic()
        self.limit_wait(self._flush_secs)
        if isinstance(self._journal, NullJournal):
            count = self._journal.seq
            return Receipt(
                run=self._run.id,
                status=status,
                emitted=count,
                sinks=[],
                unsaved=count,
                unrecorded=self.unrecorded,
            )
        if self._recorder is not None:
            self._recorder.stop()
        self._journal.catch_up()
        held = self._journal.held
        emitted = self._journal.seq - self._journal.dropped.total()
        interrupt: BaseException | None = None
        # Half of the time is left for the run's end and what comes before it.
        stream_wait_s = max(self._halt_at(begun) - begun, 0.0) / 2
        self._start_waiting()
        for thread in self._threads:
            thread.finish(held, stream_wait_s=stream_wait_s)
        if self._sidecar is not None:
            self._sidecar.finish(held, emitted, stream_wait_s)
        try:
            # After the others: one of them may still have to end a stream that these wait for.
            for worker in self._inline:
                interrupt = _finish_inline(worker, held, stream_wait_s) or interrupt
            for waiting in self._waiting:
                if waiting.worker.spec.options is None:  # no replay can make it again
                    self._drain(waiting.worker, held)
            if self._recorder is not None:
                self._recorder.join(stream_wait_s)
            self._wait(begun)
        except BaseException as error:  # Ctrl-C: the rest stays in the journal
            interrupt = error
            self._halt(_INTERRUPTED_S)
        self._interrupt = interrupt
        return self._receipt(self._journal, status, emitted)

    def raise_interrupt(self) -> None:
        """Raise the Ctrl-C that came while the run was closed."""
        interrupt, self._interrupt = self._interrupt, None
        if interrupt is not None:
            raise interrupt

    def abandon(self) -> None:
        """Release everything in a forked child, whose parent has the run."""
        self._threads, self._inline, self._waiting = [], [], []
        if self._recorder is not None:
            self._recorder.abandon()
        if self._sidecar is not None:
            self._sidecar.abandon()
            self._sidecar = None
        if isinstance(self._journal, JournalWriter):
            self._journal.close()

    def _wait(self, begun: float) -> None:
        said = False
        while not self._is_done() and time.monotonic() < self._halt_at(begun):
            time.sleep(POLL_S / 5)
            if not said and time.monotonic() - begun > _PRINT_AFTER_S:
                said = True
                self._print_waiting()
        self._halt(max((self._deadline or 0.0) - time.monotonic(), _MIN_HALT_S))

    def _halt_at(self, begun: float) -> float:
        """Return when to stop the workers, so that they have ended by the deadline."""
        deadline = self._deadline or 0.0
        return deadline - min(_HALT_PART * (deadline - begun), _HALT_S)

    def _halt(self, secs: float) -> None:
        """Stop the workers; a call that is blocked is left behind."""
        until = time.monotonic() + secs
        for thread in self._threads:
            thread.halt()
        if self._sidecar is not None:
            self._sidecar.stop(secs)
        for thread in self._threads:
            thread.join(until)

    def _drain(self, worker: SinkWorker, held: Sequence[bytes]) -> None:
        """Deliver in this thread, where it no longer costs training time."""

        def is_over() -> bool:
            if interrupt := worker.interrupt:
                raise interrupt
            return time.monotonic() >= (self._deadline or 0.0)

        worker.add(held)
        worker.finish(stream_wait_s=max((self._deadline or 0.0) - time.monotonic(), 0.0) / 2)
        try:
            drive(worker, is_over=is_over)
        finally:
            worker.close()

    def _is_done(self) -> bool:
        sidecar = self._sidecar is None or self._sidecar.is_finished()
        return sidecar and all(thread.is_finished() for thread in self._threads)

    def _is_synced_elsewhere(self) -> bool:
        """Return whether a worker syncs the journal to the disk once a second."""
        return bool(self._threads) or (
            self._sidecar is not None and not self._sidecar.is_finished()
        )

    def _print_waiting(self) -> None:
        left = (self._deadline or 0.0) - time.monotonic()
        print(
            f"trainbus: waiting up to {left:.0f} s for sinks to finish; "
            "Ctrl-C stops waiting, `trainbus replay` sends the rest later",
            file=sys.stderr,
            flush=True,
        )

    def _receipt(self, journal: JournalWriter, status: str, emitted: int) -> Receipt:
        in_streams, dropped = self._count_streams(journal.folder)
        emitted += in_streams
        workers = self._workers()
        found = {worker.spec.name: worker.report(emitted) for worker in workers}
        if self._sidecar is not None:
            found |= {report.name: report for report in self._sidecar.reports(emitted)}
        journal.check_file()
        receipt = write_receipt(
            journal.folder,
            status=status,
            attempt=self._run.attempt,
            emitted=emitted,
            reports=[found[spec.name] for spec in self._specs if spec.name in found],
            unsaved=journal.unsaved,
            dropped=self.dropped + journal.dropped.total() + dropped,
            unrecorded=self.unrecorded,
            is_gone=journal.is_gone,
            config=self._config,
        )
        journal.close()
        return receipt

    def _count_streams(self, folder: RunFolder) -> tuple[int, int]:
        """Return how many records other producers wrote and dropped, counted in their files."""
        attempt = self._run.attempt
        try:
            return count_streams(folder, attempt), count_dropped(folder, attempt)
        except (OSError, JournalError) as error:
            logger.warning("the receipt has only the records of the training: %s", error)
            return 0, 0

    def require_opened(self) -> None:
        """Wait until the sinks with `on_error: raise` are open.

        Raises:
            SinkError: a sink with `on_error: raise` could not be opened.
        """
        wanted = {spec.name: spec for spec in self._specs if spec.on_error == "raise"}
        if wanted and isinstance(self._journal, NullJournal):
            raise SinkError("no directory for the journal can be written, so sinks receive nothing")
        deadline = time.monotonic() + _OPEN_DEADLINE_S
        while wanted:
            errors: dict[str, str | None] = {}
            for worker in self._workers():
                if worker.opened is not None or worker.main.error is not None:
                    errors[worker.spec.name] = None if worker.opened else worker.main.error or ""
            if self._sidecar is not None:
                self._sidecar.poll()
                errors |= self._sidecar.opened | self._sidecar.unserved
            for name, error in errors.items():
                if name in wanted and error is not None:
                    spec = wanted[name]
                    raise SinkError(f"sink {name!r} ({spec.kind}) can't be opened: {error}")
                wanted.pop(name, None)
            if wanted and time.monotonic() > deadline:
                raise SinkError(f"sink {min(wanted)!r} did not open in {_OPEN_DEADLINE_S:.0f} s")
            if wanted:
                time.sleep(POLL_S / 5)

    def _worker(
        self, spec: SinkSpec, journal: JournalWriter, *, in_background: bool = True
    ) -> SinkWorker:
        return SinkWorker(
            spec,
            journal.folder,
            FileResolver(
                journal.folder, None
            ),  # the training process itself says which files there are
            attempt=self._run.attempt,
            in_background=in_background,
        )

    def _workers(self) -> list[SinkWorker]:
        threads = [*self._threads, *self._waiting]
        return [*self._inline, *(thread.worker for thread in threads)]

    def _start_thread(self, spec: SinkSpec, journal: JournalWriter) -> None:
        thread = ThreadedWorker(self._worker(spec, journal), journal)
        self._threads.append(thread)  # first: Ctrl-C may come during the start
        fault = thread.start()
        if fault is None:
            return
        self._threads.remove(thread)
        self._waiting.append(thread)
        thread.worker.main.error = fault
        reserve_cursor(spec, journal.folder, self._run.attempt)
        rest = (
            "`trainbus replay` sends them" if spec.options is not None else "it receives them then"
        )
        logger.warning(
            "sink %r (%s) has neither process nor thread (%s); its records stay in the journal "
            "until the end of the run: if there is still no thread, %s",
            spec.name,
            spec.kind,
            fault,
            rest,
        )

    def _start_waiting(self) -> None:
        """Start the threads that could not be started, now that training may need fewer."""
        for thread in list(self._waiting):
            if thread.start() is None:
                self._waiting.remove(thread)
                self._threads.append(thread)


def _finish_inline(
    worker: SinkWorker, held: Sequence[bytes], stream_wait_s: float
) -> KeyboardInterrupt | None:
    """Deliver the rest to an inline sink and close it; return the Ctrl-C that came in it."""
    worker.add(held)
    worker.finish(stream_wait_s=stream_wait_s)
    while not (worker.done or worker.main.stopped):
        if worker.step():
            if not worker.is_waiting:
                break
            time.sleep(POLL_S / 5)
    interrupt = worker.interrupt
    worker.close()
    return interrupt
