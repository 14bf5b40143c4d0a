"""Delivers the records of one run from its journal to one sink, and accounts for each of them.

The run's end is delivered last, after the records of all streams: while a stream is still being
written, it is held back for a limited time.

The same worker runs in a delivery process, in a thread, inside `emit`, and in `trainbus replay`. It
saves its cursor after the sink has accepted a batch: a record is delivered at least once after a
crash, and exactly once otherwise.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from trainbus.delivery.cursor import Cursor, Ledger
from trainbus.delivery.receipt import SinkReport
from trainbus.delivery.retry import QueuedRecord, RetryQueue, line
from trainbus.delivery.spec import SinkSpec
from trainbus.delivery.transforms import Transform
from trainbus.errors import JournalError
from trainbus.events import ArtifactLogged, CheckpointSaved, Record, RunEnded, RunStarted, encode
from trainbus.interfaces import RunInfo, Sink
from trainbus.journal.counts import count_streams
from trainbus.journal.directory import RunFolder, open_private
from trainbus.journal.encoding import Entry
from trainbus.journal.file_access import FileResolver
from trainbus.journal.locks import open_lock, try_lock
from trainbus.journal.reader import RecordFile, RunReader, first_entry
from trainbus.journal.writer import JournalWriter

logger = logging.getLogger("trainbus")

POLL_S = 0.1
_BATCH = 500
_SAVE_S = 1.0
_SYNC_S = 1.0
_BLOCKED_S = 0.1
STREAM_WAIT_S = 5.0
"""Longest wait for streams that are still being written when the run has ended, by default."""
_OPEN_STREAM = "the run's end waits for a stream that is still being written"
_LOCKED = "another process delivers to this sink"


class SinkWorker:
    """Delivers one run to one sink; only one thread at a time calls `step`."""

    def __init__(
        self,
        spec: SinkSpec,
        folder: RunFolder,
        files: FileResolver,
        *,
        attempt: int,
        after: tuple[int, int] | None = None,
        is_replay: bool = False,
        in_background: bool = True,
        pid: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        mark: Callable[[int, bool], None] = lambda lane, is_called: None,
    ) -> None:
        """Prepare; the first step that finds a record opens the sink.

        Args:
            spec: the sink.
            folder: the run's directory.
            files: which files records may name.
            attempt: the last attempt that is delivered, and the one that the report is about.
            after: deliver the records after this (attempt, seq), whatever the cursor says.
            is_replay: a sink without a cursor receives the whole run, otherwise this attempt only.
            in_background: whether uploads may have a thread of their own.
            pid: the training process, where that is another one.
            clock: seconds, for retries.
            mark: called with the lane (0, or 1 for uploads) before and after each call of the sink.
        """
        self.spec = spec
        self.done = False
        """Whether the sink received the end of the attempt and was closed."""
        self.opened: bool | None = None
        """Whether the sink could be opened; None before the first try."""
        self._folder = folder
        self._files = files
        self.attempt = attempt
        self._given_after = after
        self._is_replay = is_replay
        self._pid = pid
        self._clock = clock
        self._sink: Sink | None = None
        self._transform = Transform(spec.transforms)
        self._ledger = Ledger(folder.cursor(spec.key), clock)
        self._reader: RunReader | None = None
        self._staged: deque[Entry] = deque()
        self._extra: list[bytes] = []
        self._known_attempt = 0
        self._is_at_end = False
        self._waits_until = math.inf
        self._lock_fd: int | None = None
        self.main = RetryQueue(
            self._delivered, self._reject, self._warn, clock=clock, mark=functools.partial(mark, 0)
        )
        self._uploads: RetryQueue | None = None
        if in_background:
            self._uploads = RetryQueue(
                self._ledger.finish_upload,
                self._reject,
                self._warn,
                clock=clock,
                mark=functools.partial(mark, 1),
            )
        self._uploader: threading.Thread | None = None
        self._stop = threading.Event()
        self._warned: set[str] = set()

    @property
    def interrupt(self) -> KeyboardInterrupt | None:
        """The Ctrl-C that came in the sink, if one did; reading it clears it."""
        found, self.main.interrupt = self.main.interrupt, None
        return found

    def add(self, lines: Sequence[bytes]) -> None:
        """Append lines to the journal's records that the disk had no room for."""
        self._extra = list(lines)
        if self._reader is not None:
            self._reader.add(self._extra)

    def step(self) -> float:
        """Make one call of the sink; return the seconds to wait before the next step."""
        if self.done or self.main.stopped:
            return POLL_S
        if wait := self.main.wait():
            return min(wait, POLL_S)
        try:
            if self._uploader is None and self._uploads and self._push_upload(self._uploads):
                return 0.0
            if self._reader is None and not self._begin():
                return POLL_S
            if not self.main.todo and not self._staged and not self._read():
                self._ledger.save(POLL_S)
                return POLL_S
            if self._sink is None and not self._open():
                return POLL_S
            self._dispatch()
            if not self.main.todo:  # uploads are under way
                return 0.0 if self._staged and not self._must_wait() else POLL_S
            self.main.push(self._open_sink().write)
        except (OSError, JournalError) as error:  # of the journal, not of the sink
            self.main.error = f"the journal can't be read: {line(error)}"
            self.main.stopped = True
        return 0.0

    def finish(self, *, stream_wait_s: float = STREAM_WAIT_S) -> None:
        """Retry at once what failed; from now on only network errors are waited for.

        Args:
            stream_wait_s: how long streams that are still being written hold back the run's end.
        """
        self._waits_until = self._clock() + stream_wait_s
        for lane in (self.main, self._uploads):
            if lane is not None:
                lane.finish()

    @property
    def location(self) -> str | None:
        """Where the sink shows the run; None while it is not open."""
        with suppress(Exception):
            if self._sink is not None and self.opened:
                return self._sink.location
        return None

    @property
    def count(self) -> int:
        """How many records of the current attempt were delivered, filtered out or rejected."""
        return self._ledger.cursor.taken + self._ledger.cursor.skipped + self._ledger.cursor.dead

    @property
    def is_waiting(self) -> bool:
        """Whether the run's end is held back because a stream is still being written."""
        return self._reader is not None and self._reader.is_waiting

    def is_idle(self) -> bool:
        """Return whether no record waits to be sent or retried."""
        lanes = [lane for lane in (self.main, self._uploads) if lane is not None]
        waits = self._staged or self._reader is None or any(lane.todo for lane in lanes)
        return not waits and not self.is_waiting and not any(lane.wait() for lane in lanes)

    def is_complete(self) -> bool:
        """Return whether the sink is done with every record of the attempt."""
        return self._ledger.cursor.attempt == self.attempt and (self.done or self._is_at_end)

    def has_everything(self) -> bool:
        """Return whether the sink was done with every record when the last step began."""
        return self.is_idle() and (self._is_replay or self.is_complete())

    def total(self) -> int:
        """Return how many records the attempt has."""
        if not self.is_complete():
            return count(self._folder, self.attempt)
        # A stream may have been written after the sink received the run's end.
        return self.count + self._missing(self._ledger.cursor)

    def missing(self) -> int:
        """Return how many records the sink has not received, without changing anything."""
        return self._missing(self._start_cursor(self._ledger.read()))

    def _missing(self, cursor: Cursor) -> int:
        reader, found = self._read_from(cursor, waits=False), 0
        while entries := reader.read(_BATCH):
            is_same = entries[0].record.attempt == cursor.attempt
            found += sum(not (is_same and cursor.has(entry.record)) for entry in entries)
        reader.close()
        return found

    def blocked_for(self) -> float:
        """Return the seconds that a call of the sink has taken so far."""
        since = [lane.busy_since for lane in (self.main, self._uploads) if lane is not None]
        return max((self._clock() - s for s in since if s is not None), default=0.0)

    def blocked(self, secs: float) -> str | None:
        """Return a text about a call that has taken that long, None if there is none."""
        hung = self.blocked_for()
        if hung < secs:
            return None
        took = f"{hung:.0f} s" if hung >= 10 else f"{hung:.1f} s"
        return f"has been blocked for {took}" if self.opened else f"is still opening after {took}"

    def close(self) -> None:
        """Close the sink, save the cursor and release everything; no step may be running."""
        self._stop.set()
        if self._uploader is not None:
            self._uploader.join(POLL_S * 10)
        self._close_sink()
        self.release()

    def release(self) -> None:
        """Close the journal and unlock the sink, and save nothing, as the end of a process does."""
        if self._reader is not None:
            self._reader.close()
        fd, self._lock_fd = self._lock_fd, None
        if fd is not None:
            os.close(fd)

    def report(self, emitted: int) -> SinkReport:
        """Return what became of the attempt's records; may be called while a step is blocked."""
        cursor = self._ledger.cursor
        counts = (cursor.taken, cursor.skipped, cursor.dead)
        taken, skipped, dead = counts if cursor.attempt == self.attempt else (0, 0, 0)
        with suppress(Exception):
            if self._sink is not None and not self.blocked_for():
                cursor.lost, cursor.location = self._sink.lost, self._sink.location
        pending = max(emitted - taken - skipped - dead, 0)
        errors = [
            self.main.error if pending or dead or self.opened is False else None,
            self._uploads.error if self._uploads and (dead or pending) else None,
            self.blocked(_BLOCKED_S) if pending else None,
            _OPEN_STREAM if self.is_waiting else None,
        ]
        return SinkReport(
            name=self.spec.name,
            kind=self.spec.kind,
            taken=taken,
            skipped=skipped,
            dead=dead,
            pending=pending,
            lost=cursor.lost,
            superseded=cursor.superseded,
            location=cursor.location,
            error=next((e for e in errors if e), None),
        )

    def _begin(self) -> bool:
        """Read the cursor; False while another process delivers to this sink."""
        if self._lock_fd is None:
            path = self._folder.cursor(self.spec.key)
            self._lock_fd = open_lock(path.with_suffix(".lock"))
        if not try_lock(self._lock_fd):
            self.main.error = _LOCKED
            return False
        self.main.error = None
        found = self._ledger.read()
        self._known_attempt = found.attempt if found else 0
        self._ledger.start(self._start_cursor(found))
        self._reader = self._read_from(self._ledger.cursor)
        self._reader.add(self._extra)
        if found is None:
            # A sink that receives nothing of this attempt must receive it in the next one.
            self._ledger.save(0.0)
        return True

    def _start_cursor(self, found: Cursor | None) -> Cursor:
        if self._given_after is not None:
            attempt, seq = self._given_after
            return Cursor(attempt=attempt, seq=seq, skipped=seq)
        if found is None:
            return Cursor(attempt=0 if self._is_replay else self.attempt)
        if not found.closed and _is_durable_only_after_close(self.spec):
            # Records delivered since it was opened may be lost with its process.
            return Cursor(attempt=found.attempt, location=found.location)
        return found

    def _read_from(self, cursor: Cursor, *, waits: bool = True) -> RunReader:
        main = cursor.place("")
        return RunReader(
            self._folder,
            after=(cursor.attempt, main.seq),
            offset=main.offset,
            streams={source: cursor.place(source) for source in cursor.streams},
            upto=self.attempt,
            waits=waits,
            clock=self._clock,
        )

    def _read(self) -> bool:
        """Read the next records; False if there are none."""
        assert self._reader is not None
        if self.is_waiting and self._clock() >= self._waits_until:
            self._reader.stop_waiting()
        self._staged.extend(self._reader.read(_BATCH))
        self._is_at_end = not self._staged and not self.is_waiting
        if not self._staged:
            return False
        attempt = self._staged[0].record.attempt
        if attempt != self._ledger.cursor.attempt:
            self._close_sink()
            self._ledger.start(Cursor(attempt=attempt))
        return True

    def _dispatch(self) -> None:
        """Queue the records that were read; the end of a run waits for all others."""
        cursor = self._ledger.cursor
        sink = self._open_sink()
        uploads = self._uploads if type(sink).upload is not Sink.upload else None
        while self._staged and not self._must_wait():
            entry = self._staged.popleft()
            record, is_superseded = entry.record, False
            if cursor.has(record):
                continue
            if sink.reads_files:
                record, is_superseded = self._files.take(entry, is_sent=_sends_file(sink, record))
            wanted = self._transform(record)
            is_superseded = is_superseded and wanted is not None
            item = QueuedRecord(record, None if is_superseded else wanted, is_superseded)
            if uploads is not None and isinstance(record.event, CheckpointSaved | ArtifactLogged):
                self._upload(item)
            else:
                self.main.todo.append(item)

    def _must_wait(self) -> bool:
        uploads = self._uploads
        is_uploading = uploads is not None and bool(uploads.todo) and not uploads.stopped
        is_end = isinstance(self._staged[0].record.event, RunEnded)
        return is_end and (bool(self.main.todo) or is_uploading)

    def _open_sink(self) -> Sink:
        assert self._sink is not None
        return self._sink

    def _open(self) -> bool:
        record = self.main.todo[0].record if self.main.todo else self._staged[0].record
        first = first_entry(self._folder, record.attempt)
        event = self._files.resolve(first).event if first else None
        if not isinstance(event, RunStarted):
            event = RunStarted()
        start = Record(seq=0, run=record.run, time=record.time, event=event)
        seen = Transform(self.spec.transforms)(start)
        if seen is not None and isinstance(seen.event, RunStarted):
            event = seen.event
        run = RunInfo(
            id=record.run,
            started=event,
            attempt=record.attempt,
            reopened=self._known_attempt == record.attempt,
            resume_after=self._ledger.cursor.seq,
            pid=self._pid,
            base=self.spec.base,
        )
        self._ledger.cursor.closed = False
        text = "can't be opened; training continues without it"
        if not self.main.attempt(self._make_and_open, run, failure_text=text):
            self.opened = False
            return False
        self.opened = True
        self._ledger.save(0.0)
        return True

    def _make_and_open(self, run: RunInfo) -> None:
        sink = self.spec.make()
        try:
            sink.open(run)
        except BaseException:
            with suppress(Exception):
                sink.close()
            raise
        self._sink = sink

    def _close_sink(self) -> None:
        """Flush and close the sink."""
        sink = self._sink
        if sink is None:
            return
        for call in (sink.flush, sink.close):
            self.main.attempt(call)
        with suppress(Exception):
            self._ledger.cursor.lost, self._ledger.cursor.location = sink.lost, sink.location
        self._sink = None
        self._ledger.cursor.closed = True
        self._ledger.save(0.0)

    def _delivered(self, items: Sequence[QueuedRecord]) -> None:
        is_all = not self.main.todo and not self._staged
        reader = self._reader if is_all else None
        self._ledger.count_taken(items, {"": reader.offset, **reader.offsets} if reader else {})
        if isinstance(items[-1].record.event, RunEnded):
            self._close_sink()
            self.done = items[-1].record.attempt >= self.attempt
        else:
            self._ledger.save(_SAVE_S)

    def _upload(self, item: QueuedRecord) -> None:
        assert self._uploads is not None
        self._ledger.start_upload(item.record)
        self._uploads.todo.append(item)
        if self._uploader is None:
            name = f"trainbus uploads to {self.spec.name}"
            thread = threading.Thread(target=self._run_uploads, name=name, daemon=True)
            try:
                thread.start()
            except (RuntimeError, OSError, MemoryError) as error:
                # Until a thread can be started, `step` uploads.
                self._warn_once(f"uploads have no thread of their own: {line(error)}")
            else:
                self._uploader = thread

    def _run_uploads(self) -> None:
        lane = self._uploads
        assert lane is not None
        while not self._stop.is_set():
            if not self._push_upload(lane):
                self._stop.wait(POLL_S)

    def _push_upload(self, lane: RetryQueue) -> bool:
        """Make one upload; False if there is none to make now."""
        sink = self._sink
        if sink is None or lane.stopped or not lane.todo or lane.wait():
            return False
        lane.push(sink.upload)
        return True

    def _reject(self, record: Record, reason: str) -> None:
        self._ledger.count_rejected(record)
        path = self._folder.dead(self.spec.key)
        about: Any = {"run": record.run, "attempt": record.attempt, "seq": record.seq}
        about |= {"stream": record.stream, "rank": record.rank} if record.stream else {}
        with suppress(RecursionError):  # a record nested too deep to be written is still counted
            about = msgspec.Raw(encode(record))
        letter = msgspec.json.encode({"error": reason, "record": about})
        with suppress(OSError), open(open_private(path), "ab") as file:
            file.write(letter + b"\n")
        self._ledger.save(0.0)
        if isinstance(record.event, RunEnded):
            self._close_sink()
            self.done = record.attempt >= self.attempt

    def _warn(self, text: str) -> None:
        logger.warning("sink %r (%s) %s", self.spec.name, self.spec.kind, text)

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self._warn(text)


def count(folder: RunFolder, attempt: int) -> int:
    """Return how many whole records an attempt has, in all its streams."""
    total = count_streams(folder, attempt)
    for path in (folder.records(attempt), folder.end(attempt)):
        file = RecordFile(folder, path)
        while entries := file.read():
            total += len(entries)
        file.close()
    return total


def report_on_disk(
    spec: SinkSpec, folder: RunFolder, *, attempt: int, emitted: int, error: str | None
) -> SinkReport:
    """Return a report from the cursor of a sink whose worker can't be asked.

    Args:
        spec: the sink.
        folder: the run's directory.
        attempt: the attempt that the report is about.
        emitted: how many records it has.
        error: why the worker can't be asked; ignored if no record is pending.
    """
    cursor = Ledger(folder.cursor(spec.key), time.monotonic).read() or Cursor()
    if cursor.attempt != attempt or (not cursor.closed and _is_durable_only_after_close(spec)):
        cursor = Cursor(location=cursor.location)
    pending = max(emitted - cursor.taken - cursor.skipped - cursor.dead, 0)
    return SinkReport(
        name=spec.name,
        kind=spec.kind,
        taken=cursor.taken,
        skipped=cursor.skipped,
        dead=cursor.dead,
        pending=pending,
        lost=cursor.lost,
        location=cursor.location,
        error=error if pending else None,
    )


def reserve_cursor(spec: SinkSpec, folder: RunFolder, attempt: int) -> None:
    """Save an empty cursor for a sink to which nothing delivers in this attempt.

    Otherwise a later delivery would start at the attempt of that time.
    """
    ledger = Ledger(folder.cursor(spec.key), time.monotonic)
    if ledger.read() is None:
        ledger.start(Cursor(attempt=attempt))
        ledger.save(0.0)


def _sends_file(sink: Sink, record: Record) -> bool:
    """Return whether a sink sends the file of a checkpoint."""
    try:
        return isinstance(record.event, CheckpointSaved) and sink.wants_files(record.event)
    except Exception:  # `write` will show what is wrong
        return True


def _is_durable_only_after_close(spec: SinkSpec) -> bool:
    sample = spec.sample()
    return sample is not None and sample.durable_only_after_close


delivering = threading.local()
"""Marks the threads that deliver: an event emitted by a sink would come back to it forever."""


def drive(
    worker: SinkWorker,
    *,
    is_over: Callable[[], bool],
    is_finishing: Callable[[], bool] = lambda: True,
    wait: Callable[[float], object] = time.sleep,
) -> None:
    """Step a worker until its sink has everything or never will, or until `is_over`.

    Args:
        worker: what is driven; it is not closed.
        is_over: asked before each step.
        is_finishing: whether no more records will come; until then an idle worker waits for them.
        wait: called with seconds where there is nothing to do now.
    """
    was_delivering = getattr(delivering, "here", False)
    delivering.here = True
    try:
        while not worker.done and not is_over():
            is_last = is_finishing()  # asked first: then the step sees all that there will be
            secs = worker.step()
            if is_last and (worker.main.stopped or (secs and worker.has_everything())):
                break
            if secs:
                wait(secs)
    finally:
        delivering.here = was_delivering


class ThreadedWorker:
    """A worker in a thread of its own."""

    def __init__(self, worker: SinkWorker, journal: JournalWriter | None = None) -> None:
        self.worker = worker
        self._journal = journal
        self._synced_at = time.monotonic()
        self._finishing = False
        self._stopping = False
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> str | None:
        """Start the thread; return why it can't be started, None if it was."""
        name = f"trainbus delivers to {self.worker.spec.name}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        try:
            self._thread.start()
        except (RuntimeError, OSError, MemoryError) as error:
            self._thread = None
            return str(error) or type(error).__name__
        return None

    def finish(self, lines: Sequence[bytes] = (), *, stream_wait_s: float = STREAM_WAIT_S) -> None:
        """Announce that no more records will come, except `lines` that the disk had no room for.

        Other streams than the main one may be written for another `stream_wait_s` seconds.
        """
        if lines:
            self.worker.add(lines)
        self.worker.finish(stream_wait_s=stream_wait_s)
        self._finishing = True
        self._wake.set()

    def halt(self) -> None:
        """Stop soon, whatever is left."""
        self._stopping = True
        self._wake.set()

    def join(self, until: float) -> None:
        """Wait for the end, at most until then (seconds of `time.monotonic`)."""
        if self._thread is not None:
            self._thread.join(max(until - time.monotonic(), 0.0))

    def is_finished(self) -> bool:
        """Return whether the thread has ended."""
        return self._thread is not None and not self._thread.is_alive()

    def _run(self) -> None:
        delivering.here = True  # also while the sink is closed
        drive(
            self.worker,
            is_over=lambda: self._stopping,
            is_finishing=lambda: self._finishing,
            wait=self._pause,
        )
        self.worker.close()

    def _pause(self, secs: float) -> None:
        self._sync()
        self._wake.wait(secs)
        if self._finishing:
            self._wake.clear()

    def _sync(self) -> None:
        now = time.monotonic()
        if self._journal is not None and now - self._synced_at >= _SYNC_S:
            self._synced_at = now
            self._journal.sync()
