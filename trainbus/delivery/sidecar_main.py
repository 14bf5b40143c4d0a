"""What runs in the sidecar process: the workers of its runs, and the watch over the training."""

from __future__ import annotations

import faulthandler
import functools
import io
import logging
import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from trainbus import registry
from trainbus.capture.recorder import CaptureRecorder
from trainbus.delivery.receipt import SinkReport, write_receipt
from trainbus.delivery.sidecar import apply_environment
from trainbus.delivery.sidecar_protocol import (
    FinishRun,
    Hello,
    LogWarning,
    Mailbox,
    Marks,
    OpenRun,
    RunDone,
    RunProgress,
    SinkOpened,
    SinkTask,
    StopRun,
    ToSidecar,
    ToTraining,
)
from trainbus.delivery.spec import SinkSpec
from trainbus.delivery.worker import POLL_S, SinkWorker, ThreadedWorker, report_on_disk
from trainbus.delivery.worker_log import Output
from trainbus.errors import JournalError
from trainbus.events import Record, RunEnded
from trainbus.interfaces import Sink
from trainbus.journal.counts import count_dropped, count_streams
from trainbus.journal.directory import NO_BLOCK, NO_FOLLOW, RunFolder, sync_data
from trainbus.journal.file_access import FileResolver
from trainbus.journal.recovery import last_record, recover

logger = logging.getLogger("trainbus")

_SYNC_S = 1.0
_IDLE_S = 1.0
_RETRY_S = 1.0
_BLOCKED_S = 30.0
_OPENING_S = 60.0
_RECOVER_S = 30.0
_HALT_S = 2.0
_NICENESS = 10
"""Training goes first where both want the processor."""


def main() -> None:
    """Deliver until the bus is closed or the training is gone; the sidecar's whole life."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # its life is bound to the training's, not to these
    with suppress(OSError):
        os.nice(_NICENESS)
    faulthandler.enable()
    for stream in (sys.stdout, sys.stderr):  # what is printed last must not die with the process
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    inbox, outbox, marks, output = map(int, sys.argv[2:6])
    for fd in (inbox, outbox, marks, output):
        os.set_inheritable(fd, False)
    host = _Host(Mailbox(ToSidecar, inbox), Mailbox(ToTraining, outbox), Marks(marks), output)
    host.run()
    sys.stdout.flush()
    sys.stderr.flush()
    host.save_output()
    if host.is_hung:
        os._exit(0)


class _Host:
    """All runs of one bus that this process delivers."""

    def __init__(
        self, inbox: Mailbox[ToSidecar], outbox: Mailbox[ToTraining], marks: Marks, output: int
    ) -> None:
        self.marks = marks
        self.pid = 0
        self.is_hung = False
        """Whether a call of a sink never came back."""
        self.is_orphan = False
        self._inbox = inbox
        self._outbox = outbox
        self._output = Output(output, marks)
        self._logs: list[Path] = []
        self._mutex = threading.Lock()
        self._parent = os.getppid()
        self._runs: dict[int, _Run] = {}

    def run(self) -> None:
        logging.getLogger("trainbus").addHandler(_Forward(self))
        while not self.is_orphan or self._runs:
            self._listen()
            for message, lines in self._inbox.take():
                self._obey(message, lines)
            for number, run in list(self._runs.items()):
                run.poll()
                if run.is_over():
                    del self._runs[number]
                    self.say(run.end())
                    self.is_hung = self.is_hung or run.is_hung
            self.save_output()

    def say(self, message: ToTraining) -> None:
        with self._mutex:
            self._outbox.put(message)

    def save_output(self) -> None:
        """Put what was printed into the logs of the runs that are open, or of the last one."""
        if self._runs:
            self._logs = [run.folder.log for run in self._runs.values()]
        self._output.save(self._logs)

    def _obey(self, message: ToSidecar, lines: list[bytes]) -> None:
        match message:
            case Hello():
                self.pid = message.pid
                sys.argv[:] = message.argv  # trackers note by which command a training was started
                if message.main is not None:
                    sys.modules["__main__"].__file__ = message.main
            case OpenRun():
                apply_environment(message.variables)
                self._runs[message.run] = _Run(self, message)
                self.save_output()
            case FinishRun() if run := self._runs.get(message.run):
                run.finish(message.emitted, lines, message.stream_wait_s)
            case StopRun() if run := self._runs.get(message.run):
                run.stop(message.secs)
            case _:
                pass

    def _listen(self) -> None:
        """Wait for a sign of the training process."""
        is_urgent = any(run.is_ending for run in self._runs.values())
        wait = POLL_S / 5 if is_urgent else POLL_S if self._runs else _IDLE_S
        if self.is_orphan:
            time.sleep(wait)
            return
        ready = select.select([0], [], [], wait)[0]
        # A child that the training process forked may keep the pipe open after its death.
        if (ready and not os.read(0, 65536)) or os.getppid() != self._parent:
            self.is_orphan = True


class _Run:
    """One run and its workers."""

    def __init__(self, host: _Host, order: OpenRun) -> None:
        self.folder = RunFolder(order.folder)
        self.is_hung = False
        self.is_ending = False
        """Whether it is waited for."""
        self._host = host
        self._order = order
        self._files: list[FileResolver] = []
        """Of each worker, as each is at another record."""
        self._deadline: float | None = None
        self._emitted: int | None = None
        self._unsaved = 0
        self._is_last = False
        self._is_stopped = False
        self._recover_until: float | None = None
        self._warned: set[str] = set()
        self._reported: dict[str, int] = {}
        self._synced: dict[Path, int] = {}
        """Sizes of the records files that are on the disk."""
        self._synced_at = time.monotonic()
        self._tried_at = time.monotonic()
        self._threads = [
            ThreadedWorker(self._worker(sink, sink.slot))
            for sink in order.sinks
            if sink.slot is not None
        ]
        self._waiting = [thread for thread in self._threads if not self._start(thread)]
        self._recorder: CaptureRecorder | None = None
        if order.capture is not None:
            self._recorder = CaptureRecorder(order.capture, self.folder, order.attempt, host.pid)
            self._recorder.start()
        if order.replay is not None:
            self.finish(None, [], order.flush_secs / 2)

    def poll(self) -> None:
        """Do what is to be done from time to time."""
        now = time.monotonic()
        if self._host.is_orphan:
            self._stop_recorder()
            self._end_orphan(now)
        if self._waiting and now - self._tried_at >= _RETRY_S:
            self._tried_at = now
            self._waiting = [thread for thread in self._waiting if not self._start(thread)]
        self._report()
        self._sync(now)

    def finish(self, emitted: int | None, lines: list[bytes], stream_wait_s: float) -> None:
        """Take note that no more records of the training come, but for these lines."""
        self._stop_recorder()
        self.is_ending = self._is_last = True
        self._emitted, self._unsaved = emitted, len(lines)
        for thread in self._threads:
            thread.finish(lines, stream_wait_s=stream_wait_s)

    def stop(self, secs: float) -> None:
        """End soon."""
        self._stop_recorder()
        self.is_ending = self._is_stopped = True
        self._deadline = time.monotonic() + secs
        for thread in self._threads:
            thread.halt()

    def is_over(self) -> bool:
        """Return whether all workers are at their end, or time is up."""
        is_done = all(thread.is_finished() for thread in self._started())
        is_late = self._deadline is not None and time.monotonic() >= self._deadline
        if self._is_stopped:
            return is_done or is_late
        if is_late:
            self.stop(_HALT_S)
        return is_done and self._is_last and not self._waiting

    def end(self) -> RunDone:
        """Return what each sink got; of a run without its training it is saved, too."""
        self.is_hung = any(
            not thread.is_finished() or thread.worker.blocked_for() for thread in self._started()
        )
        self._report()
        last = self._last()
        emitted = self._emitted
        if emitted is None:
            emitted = last.seq if last else 0
        dropped = 0
        with suppress(OSError, JournalError):  # the workers say what is wrong with the journal
            emitted += count_streams(self.folder, self._order.attempt)
            dropped = count_dropped(self.folder, self._order.attempt)
        if self._order.replay is not None:
            emitted = max((thread.worker.total() for thread in self._threads), default=0)
        reports = [thread.worker.report(emitted) for thread in self._threads]
        if self._host.is_orphan and self._order.replay is None:
            ended = last.event if last and isinstance(last.event, RunEnded) else None
            write_receipt(
                self.folder,
                status=ended.status if ended else "open",
                attempt=self._order.attempt,
                emitted=emitted,
                reports=self._of_all(reports, emitted),
                unsaved=self._unsaved,
                dropped=dropped,
                config=self._order.config,
            )
        return RunDone(
            run=self._order.run,
            reports=reports,
            emitted=emitted,
            is_hung=self.is_hung,
            damaged=[line for files in self._files for line in files.damaged],
            refused=[path for files in self._files for path in files.refused],
            changed=[line for files in self._files for line in files.changed],
        )

    def _stop_recorder(self) -> None:
        if self._recorder is not None:
            self._recorder.stop()

    def _of_all(self, reports: list[SinkReport], emitted: int) -> list[SinkReport]:
        """Return the reports of all sinks of the run, also of those that others deliver to."""
        ours = {report.name: report for report in reports}
        found = []
        for sink in self._order.sinks:
            report = ours.get(sink.name)
            if report is None:
                report = report_on_disk(
                    _spec(sink),
                    self.folder,
                    attempt=self._order.attempt,
                    emitted=emitted,
                    error=sink.error,
                )
            found.append(report)
        return found

    def _worker(self, sink: SinkTask, slot: int) -> SinkWorker:
        replay = self._order.replay
        files = FileResolver(self.folder, replay.trusted if replay else None)
        self._files.append(files)
        return SinkWorker(
            _spec(sink),
            self.folder,
            files,
            attempt=self._order.attempt,
            after=replay.after if replay else None,
            is_replay=replay is not None,
            pid=None if replay else self._host.pid,
            mark=functools.partial(self._host.marks.mark, slot),
        )

    def _started(self) -> list[ThreadedWorker]:
        return [thread for thread in self._threads if thread not in self._waiting]

    def _start(self, thread: ThreadedWorker) -> bool:
        fault = thread.start()
        name = thread.worker.spec.name
        if fault is not None and f"{name} waits" not in self._warned:
            self._warned.add(f"{name} waits")
            logger.warning("sink %r waits until a thread can be started: %s", name, fault)
        return fault is None

    def _end_orphan(self, now: float) -> None:
        """Write the end that the training process could not write, once its file is closed."""
        if self._order.replay is not None:
            if not self._is_stopped:
                self.stop(_HALT_S)
            return
        if self._deadline is None:
            self._deadline = now + self._order.flush_secs
        if self._is_last:
            return
        self._recover_until = self._recover_until or now + _RECOVER_S
        with suppress(OSError, JournalError):
            recover(self.folder, now=time.time(), upto=self._order.attempt)
        last = self._last()
        if last is None or isinstance(last.event, RunEnded) or now >= self._recover_until:
            self.finish(None, [], self._order.flush_secs / 2)

    def _last(self) -> Record | None:
        try:
            return last_record(self.folder, self._order.attempt)
        except (OSError, JournalError):  # the workers say what is wrong with the journal
            return None

    def _report(self) -> None:
        for thread in self._threads:
            worker = thread.worker
            name, error = worker.spec.name, worker.main.error
            if name not in self._warned and (worker.opened is not None or error is not None):
                self._warned.add(name)
                error = None if worker.opened else error or ""
                self._host.say(
                    SinkOpened(
                        run=self._order.run, sink=name, error=error, location=worker.location
                    )
                )
            blocked = worker.blocked(_BLOCKED_S if worker.opened else _OPENING_S)
            if blocked is not None and f"{name} is blocked" not in self._warned:
                self._warned.add(f"{name} is blocked")
                logger.warning("sink %r (%s) %s", name, worker.spec.kind, blocked)
            if self._order.replay is not None and self._reported.get(name) != worker.count:
                count = self._reported[name] = worker.count
                self._host.say(RunProgress(run=self._order.run, sink=name, count=count))

    def _sync(self, now: float) -> None:
        """Have the journal written to the disk, which costs the training process nothing here."""
        if now - self._synced_at < _SYNC_S or self._order.replay is not None:
            return
        attempt = self._order.attempt
        streams = [
            self.folder.records(attempt, s.rank, s.name) for s in self.folder.streams(attempt)
        ]
        for path in (self.folder.records(attempt), *streams):
            with suppress(OSError):
                self._sync_file(path)
        self._synced_at = time.monotonic()

    def _sync_file(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | NO_FOLLOW | NO_BLOCK)
        try:
            size = os.fstat(fd).st_size
            if size != self._synced.get(path):
                sync_data(fd)
                self._synced[path] = size
        finally:
            os.close(fd)


class _Forward(logging.Handler):
    """Hands what trainbus has to say to the training process, which the user sees."""

    def __init__(self, host: _Host) -> None:
        super().__init__(logging.WARNING)
        self._host = host

    def emit(self, record: logging.LogRecord) -> None:
        self._host.say(LogWarning(text=record.getMessage()))


def _spec(sink: SinkTask) -> SinkSpec:
    return SinkSpec(
        name=sink.name,
        make=functools.partial(_make, sink),
        kind=sink.type,
        transforms=sink.transforms,
        options=sink.options,
        base=sink.base,
    )


def _make(sink: SinkTask) -> Sink:
    cls = registry.sink_class(sink.type)
    return cls(msgspec.convert(sink.options, cls.Options))
