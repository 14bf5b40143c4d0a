"""Writes the records of one training: append-only, one line per record, one `write` per line.

Guarantees: once `append` returns, the operating system has the record, so SIGKILL does not lose it;
a line is written completely, or removed again; a disk that is full or gone never raises. Records
are then kept in memory. If there are too many, the least important ones are dropped and counted,
and an `alert.raised` in the journal reports them.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from trainbus.errors import JournalError
from trainbus.events import (
    AlertRaised,
    ArtifactLogged,
    CheckpointSaved,
    Event,
    MetricsLogged,
    ParamsUpdated,
    Record,
    RunEnded,
    RunStarted,
    event_name,
)
from trainbus.interfaces import FilePath
from trainbus.journal.directory import BINARY, NO_FOLLOW, RunFolder, sync_data
from trainbus.journal.encoding import LONGEST_LINE, RecordEncoder
from trainbus.journal.locks import try_lock
from trainbus.journal.recovery import read_tail

logger = logging.getLogger("trainbus")

MAX_HELD = 64 * 2**20
"""Bytes of records that wait in memory if the disk is full."""

_RETRY_S = 5.0
_LOCK_TRIES, _LOCK_PAUSE_S = 20, 0.01
_VANISHED = {errno.ENOENT, errno.ENOTDIR, getattr(errno, "ESTALE", errno.ENOENT)}
_SYNCED = (RunStarted, ParamsUpdated, RunEnded)


class JournalSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where journals are written, and their limits."""

    dir: Annotated[
        FilePath, Meta(min_length=1, description="Folder with one directory for each run")
    ] = "trainbus-runs"
    max_bytes: Annotated[
        int,
        Meta(ge=2**20, description="Size above which step metrics and file copies are dropped"),
    ] = 2**31
    redact: Annotated[
        list[str],
        Meta(description="Extra parameter names to redact"),
    ] = []


class JournalWriter:
    """The records file of one stream of an attempt, open for writing; not thread-safe.

    The file is locked until it is closed. A forked child shares the lock and has to close its copy:
    otherwise the stream counts as being written, and the run's end waits for it.
    """

    def __init__(
        self,
        folder: RunFolder,
        attempt: int = 1,
        *,
        rank: int = 0,
        stream: str = "",
        max_bytes: int = 2**31,
        wants_files: Callable[[CheckpointSaved | ArtifactLogged], bool] = lambda event: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create the records file of an attempt, or of the next attempt without one.

        The file of another stream than the main one belongs to an attempt that exists; if there is
        one already, it is continued after its last record.

        Args:
            folder: the run's directory.
            attempt: lowest number of the attempt; of a stream, its attempt.
            rank: rank of this process.
            stream: name of the stream, in lower-case letters; empty for the main stream.
            max_bytes: size of the records and blobs of this writer together above which step
                metrics are dropped.
            wants_files: returns whether a copy of an event's files is needed.
            clock: monotonic time in seconds, for retries.

        Raises:
            JournalError: the file can't be created, another writer has it, or the attempt of a
                stream does not exist.
            ValueError: the name of the stream is not valid.
        """
        self.folder = folder
        self._run = folder.run
        self.rank = rank
        self.stream = stream
        self.dropped: Counter[str] = Counter()
        """Number of dropped records, by event name."""
        self._unreported: Counter[str] = Counter()
        self._lines = RecordEncoder(
            folder, lambda: self._state.size, max_bytes, wants_files, self._warn
        )
        self._clock = clock
        self._max_bytes = max_bytes
        self._state = _State(0, 0, False)
        self._writing: _Write | None = None
        self._held: deque[_Held] = deque()
        self._held_bytes = 0
        self._retry_at = self._last_time = 0.0
        self._fault = ""
        self._warned: set[str] = set()
        self.is_gone = False
        """Whether the last `check_file` did not find the file at its path."""
        if stream:
            self.attempt = attempt
            self._fd, self._state = _open_stream(folder, attempt, rank, stream)
        else:
            attempt = max([attempt, *(n + 1 for n in folder.attempts(rank))])
            self._fd, self.attempt = _create(folder, attempt, rank)

    @property
    def seq(self) -> int:
        """Seq of the last record."""
        return max(self._state.seq, self._held[-1].seq if self._held else 0)

    @property
    def ended(self) -> bool:
        """Whether the last record is the run's end."""
        self._finish_write()
        return self._state.ended

    @property
    def held(self) -> list[bytes]:
        """Lines that wait in memory to be written."""
        return [held.line for held in self._held]

    @property
    def unsaved(self) -> int:
        """Number of records that are not on disk, apart from the dropped ones."""
        return self.seq - self.dropped.total() if self.is_gone else len(self._held)

    def fileno(self) -> int:
        """Return the descriptor of the file, -1 once it is closed."""
        return self._fd

    def append(self, event: Event, now: float) -> Record:
        """Write an event with its time (Unix seconds), and return the record.

        Raises:
            ValueError: the start or end of a run is written to another stream than the main one.
        """
        if self.stream and isinstance(event, RunStarted | RunEnded):
            raise ValueError(f"{event_name(event)} belongs to the main stream, not {self.stream!r}")
        self._last_time = now
        self._finish_write()
        is_end = isinstance(event, RunEnded)
        if (self._held or self._unreported) and (is_end or self._clock() >= self._retry_at):
            self.catch_up()
            self._report_dropped(now)
        record = self._record(event, now)
        is_spare = isinstance(event, MetricsLogged) and event.step is not None
        if is_spare and self._lines.is_full:
            self._fault = f"the journal has reached {self._max_bytes} bytes"
            self._warn("budget", f"{self._fault}: step metrics are dropped from now on")
            self._state = self._state._replace(seq=record.seq)
            self._count_dropped(event_name(event))
            return record
        line = self._lines.line(record)
        if len(line) > LONGEST_LINE:
            self._fault = f"{event_name(event)} has {len(line)} bytes"
            self._warn("long", f"{self._fault} and is dropped: expected at most {LONGEST_LINE}")
            self._state = self._state._replace(seq=record.seq)
            self._count_dropped(event_name(event))
            return record
        after = _State(self._state.size + len(line), record.seq, is_end)
        if not self._held and self._write(line, after):
            if isinstance(event, _SYNCED):
                self.sync()
        else:
            self._hold(_Held(line, event_name(event), is_spare, record.seq))
            self._state = after._replace(size=self._state.size)
        return record

    def sync(self) -> None:
        """Flush the file to the disk, so that its records survive a power failure."""
        with suppress(OSError):
            sync_data(self._fd)

    def check_file(self) -> None:
        """Check that the file still exists: records written to a deleted file are lost."""
        if self._fd < 0:
            return
        path = self.folder.records(self.attempt, self.rank, self.stream)
        own = os.fstat(self._fd)
        try:
            found = os.stat(path)
        except OSError as error:
            # After any other error the file may still exist.
            if error.errno not in _VANISHED:
                return
            self.is_gone = True
        else:
            self.is_gone = (own.st_dev, own.st_ino) != (found.st_dev, found.st_ino)
        if self.is_gone:
            text = f"{path} was deleted, moved or unmounted while it was being written"
            self._warn(
                "gone", f"{text}; sinks get all records, but `trainbus replay` can't send them"
            )

    def catch_up(self) -> None:
        """Try again to write the lines that wait in memory."""
        while self._held:
            held = self._held[0]
            size, seq = self._state.size + len(held.line), max(self._state.seq, held.seq)
            if not self._write(held.line, self._state._replace(size=size, seq=seq), held):
                break

    def close(self) -> None:
        """Close the file; a second call does nothing.

        The main stream's lines that wait in memory still reach the sinks; those of another stream
        get a last chance to be written.
        """
        if self._fd >= 0 and self.stream:
            self._finish_write()
            self.catch_up()
            self._report_dropped(self._last_time)
            if self._held:
                text = "%d records of the stream %r are lost: they are not on disk (%s)"
                logger.warning(text, len(self._held), self.stream, self._fault)
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _record(self, event: Event, now: float) -> Record:
        return Record(
            seq=self.seq + 1,
            run=self._run,
            time=now,
            event=event,
            attempt=self.attempt,
            rank=self.rank,
            stream=self.stream,
        )

    def _write(self, line: bytes, after: _State, held: _Held | None = None) -> bool:
        """Write a line and change to the state `after` it; return False if the write failed.

        `held` is the waiting line that is written, and is removed from memory.
        """
        # Ctrl-C can interrupt between any two lines; `_finish_write` then checks what was written.
        self._finish_write()
        if self._writing is not None:
            return False
        self._writing = _Write(after, held)
        try:
            written = os.write(self._fd, line)
            if written < len(line):  # a full disk writes short, without an error
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._fault = error.strerror or str(error)
            self._retry_at = self._clock() + _RETRY_S
            self._warn(
                "disk",
                f"{self.folder.path} can't be written ({self._fault}); training continues, "
                "records are kept in memory",
            )
        self._finish_write()
        return self._state is after

    def _finish_write(self) -> None:
        """Find out whether the last line was written completely, and remove a part of one."""
        if self._writing is None:
            return
        after, held = self._writing
        try:
            size = os.fstat(self._fd).st_size
            if size == after.size:
                self._state = after
                if held is not None and self._held and self._held[0] is held:
                    self._held.popleft()
                    self._held_bytes -= len(held.line)
            elif size > self._state.size:
                os.ftruncate(self._fd, self._state.size)
        except OSError as error:
            self._fault = error.strerror or str(error)
            self._retry_at = self._clock() + _RETRY_S
        else:
            self._writing = None

    def _report_dropped(self, now: float) -> None:
        """Write an alert about the records dropped since the last alert."""
        if self._held or not self._unreported:
            return
        lost = ", ".join(f"{n} {name}" for name, n in sorted(self._unreported.items()))
        alert = AlertRaised(
            title="records are missing",
            text=f"{lost} dropped: {self._fault}",
            level="error",
        )
        record = self._record(alert, now)
        line = self._lines.line(record)
        if self._write(line, _State(self._state.size + len(line), record.seq, False)):
            self._unreported.clear()
        self._retry_at = self._clock() + _RETRY_S

    def _hold(self, held: _Held) -> None:
        self._held.append(held)
        self._held_bytes += len(held.line)
        while self._held_bytes > MAX_HELD:
            # Drop the oldest step metrics first, then the oldest records of any type.
            spare = next((h for h in self._held if h.is_spare), self._held[0])
            self._held.remove(spare)
            self._held_bytes -= len(spare.line)
            self._count_dropped(spare.name)

    def _count_dropped(self, name: str) -> None:
        self.dropped[name] += 1
        self._unreported[name] += 1

    def _warn(self, kind: str, text: str) -> None:
        """Log a warning, once for each kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("%s", text)


class NullJournal:
    """Replaces the journal if no directory is writable: numbers records, and stores none."""

    folder = None

    def __init__(self, run: str, attempt: int) -> None:
        self.attempt = attempt
        self.seq = 0
        self.ended = False
        self._run = run

    def append(self, event: Event, now: float) -> Record:
        """Return the event's record."""
        self.seq += 1
        self.ended = isinstance(event, RunEnded)
        return Record(seq=self.seq, run=self._run, time=now, event=event, attempt=self.attempt)


class _State(NamedTuple):
    """The journal's position; replaced as a whole, so that an interrupt can't corrupt it."""

    size: int
    seq: int
    ended: bool


class _Held(NamedTuple):
    line: bytes
    name: str
    is_spare: bool
    seq: int


class _Write(NamedTuple):
    """A write in progress: the state after it, and the line if it waited in memory."""

    after: _State
    held: _Held | None


def _create(folder: RunFolder, attempt: int, rank: int) -> tuple[int, int]:
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | BINARY
    while True:
        path = folder.records(attempt, rank)
        try:
            fd = os.open(path, flags, 0o600)
        except FileExistsError:  # another process was first
            attempt += 1
        except OSError as error:
            raise JournalError(f"{path} can't be created: {error.strerror}") from error
        else:
            try_lock(fd)
            return fd, attempt


def _open_stream(folder: RunFolder, attempt: int, rank: int, stream: str) -> tuple[int, _State]:
    """Open the file of a stream, and return where to continue in it."""
    path = folder.records(attempt, rank, stream)
    if not folder.records(attempt).exists():
        raise JournalError(f"{path} can't be created: run {folder.run} has no attempt {attempt}")
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | NO_FOLLOW | BINARY, 0o600)
    except OSError as error:
        raise JournalError(f"{path} can't be created: {error.strerror}") from error
    try:
        if not _has_lock(fd):
            raise JournalError(f"{path} is being written: expected one writer of a stream")
        tail = read_tail(folder, path)
        os.ftruncate(fd, tail.end)  # a process that was killed may have left a part of a line
    except OSError as error:
        os.close(fd)
        raise JournalError(f"{path} can't be continued: {error.strerror}") from error
    except BaseException:
        os.close(fd)
        raise
    # Sinks may have received a record whose line was damaged later, so its seq is not used again.
    seq = tail.damaged + (tail.last.seq if tail.last else 0)
    return fd, _State(tail.end, seq, False)


def _has_lock(fd: int) -> bool:
    """Return whether this process can lock a file, which readers lock for a moment to test it."""
    for _ in range(_LOCK_TRIES):
        if try_lock(fd):
            return True
        time.sleep(_LOCK_PAUSE_S)
    return False
