"""Reads the records of a run, also while they are being written.

Guarantees: every complete record is returned, in the order of its stream; a damaged line is skipped
and counted, and affects no other line; an incomplete last line is left until it is complete; no
content of a journal opens a file outside its directory, decides how much memory is allocated, or
raises an exception.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from trainbus.errors import JournalError
from trainbus.events import Codec, Record, RunEnded, RunStarted
from trainbus.journal.blobs import Blobs
from trainbus.journal.directory import (
    RunFolder,
    Stream,
    is_run_id,
    open_within,
    read_at,
    stream_of,
)
from trainbus.journal.encoding import LINE_START, LONGEST_LINE, Entry, decode_entry, unseal
from trainbus.journal.locks import is_being_written

_CHUNK = 2**20
_MAX_FAULTS = 100
_MAX_PARTS = 100
_LIST_S = 1.0
"""Seconds between two looks for new streams."""


class RecordFile:
    """One records file; `read` returns the records that are new since the last call."""

    def __init__(self, folder: RunFolder, path: Path, *, offset: int = 0) -> None:
        self._folder = folder
        self._path = path
        self._codec = Codec(load=Blobs(folder).load)
        self._fd: int | None = None
        self._offset = offset
        self._rest = b""
        self._skips = False
        self._bad = 0
        self._is_in_piece = False
        self._stream = stream_of(path)
        # A stream starts with seq 1; an end that another process wrote can have any seq.
        is_whole = offset == 0 and not path.stem.endswith("-end")
        self._last_seq: int | None = 0 if is_whole else None
        self.damaged = 0
        """Number of records that can't be read."""
        self.faults: list[str] = []
        """Errors for some of them."""
        self.missing = 0
        """Number of records that are missing, according to the seq of the others."""

    @property
    def offset(self) -> int:
        """Position in the file of the first line that has not been returned."""
        return self._offset

    @property
    def torn(self) -> int:
        """Number of bytes after the last line feed."""
        return len(self._rest)

    def exists(self) -> bool:
        """Return whether the file exists."""
        return self._path.exists()

    def read(self, limit: int = 500) -> list[Entry]:
        """Return the next records, at most `limit`; fewer only at the end of the file.

        Raises:
            JournalError: the file is a link, or not a regular file.
        """
        found: list[Entry] = []
        if b"\n" not in self._rest:
            self._rest = b""  # an incomplete line is read again: its writer may have removed it
        while len(found) < limit:
            end = self._rest.find(b"\n")
            if end >= 0:
                self._take(end, limit, found)
            elif not self._fill():
                break
        return found

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def finish(self) -> None:
        """Count the damaged lines at the end of a file that is complete."""
        self.damaged += self._bad
        self._bad = 0

    def _take(self, end: int, limit: int, found: list[Entry]) -> None:
        """Decode complete lines from the buffer until `found` has `limit` records."""
        start, rest = 0, self._rest
        while end >= 0 and len(found) < limit:
            line = rest[start:end]
            if self._skips:  # the end of a line that is too long
                self._skips = False
            else:
                self._line(line, found, self._offset + end + 1)
            start = end + 1
            end = rest.find(b"\n", start)
        self._offset += start
        self._rest = rest[start:]

    def _line(self, line: bytes, found: list[Entry], end: int) -> None:
        body = unseal(line)
        if body is None:
            # A flipped bit can become a line feed and split one line into two pieces.
            self._bad += not (self._is_in_piece and not line.startswith(LINE_START))
            self._is_in_piece = not line.endswith(b"}")
            # A lost line feed joins two lines, of which the second is complete.
            body = _last_complete(line)
            if body is None:
                return
        try:
            entry = decode_entry(body, self._codec, end)
            record = entry.record
            if not is_run_id(record.run):
                raise JournalError(f"rejected a record of run {record.run[:80]!r}")
            if self._stream is not None or record.stream:
                self._check_stream(record)
        except (msgspec.DecodeError, JournalError, ValueError, RecursionError) as error:
            if len(self.faults) < _MAX_FAULTS:
                self.faults.append(str(error))
            self._bad += 1
            return
        self._count(record.seq)
        found.append(entry)

    def _check_stream(self, record: Record) -> None:
        """Reject a record that belongs into another file, or to no stream at all.

        Raises:
            JournalError: it is one.
        """
        found = Stream(record.stream, record.rank), record.attempt
        if found != self._stream:
            name = record.source[:80]
            raise JournalError(f"rejected a record of {name!r}, attempt {record.attempt}")
        if isinstance(record.event, RunStarted | RunEnded):
            raise JournalError("rejected the start or end of a run: only the main stream has them")

    def _count(self, seq: int) -> None:
        gap = 0 if self._last_seq is None else seq - self._last_seq - 1
        damaged = min(self._bad, gap) if gap > 0 and self._last_seq is not None else self._bad
        self.damaged += damaged
        self.missing += max(gap - damaged, 0)
        self._bad = 0
        self._is_in_piece = False
        self._last_seq = seq

    def _fill(self) -> bool:
        """Read on; return whether that gave the end of a line, or there is more to read."""
        if self._fd is None:
            try:
                self._fd = open_within(self._folder.path, self._path)
            except OSError:
                return False
        chunk = read_at(self._fd, _CHUNK, self._offset + len(self._rest))
        self._rest += chunk
        if len(self._rest) > LONGEST_LINE and b"\n" not in chunk:
            self._bad += not self._skips
            self._skips = True
            self._offset += len(self._rest)
            self._rest = b""
        return len(chunk) == _CHUNK or b"\n" in chunk


def _last_complete(line: bytes) -> bytes | None:
    """Return the complete line that a damaged line ends with, if a line feed was lost."""
    at = 0
    for _ in range(_MAX_PARTS):
        at = line.find(LINE_START, at + 1)
        if at < 0:
            break
        if body := unseal(line[at:]):
            return body
    return None


class Place(NamedTuple):
    """Where the reading of a stream begins."""

    seq: int = 0
    """Seq of the last record to skip."""
    offset: int = 0
    """Position in its file of the record after that, if known."""


class _Source:
    """The records of one stream of an attempt: those that were read and not returned yet."""

    def __init__(self, files: Sequence[RecordFile], attempt: int, place: Place) -> None:
        self.files = files
        self.offset = place.offset
        """Position in the first file after the last returned record."""
        self.entries: deque[Entry] = deque()
        self._attempt = attempt
        self._seq = place.seq

    def fill(self, limit: int) -> bool:
        """Read the next records, unless some are left; return whether there are any."""
        if self.entries:
            return True
        # Checked before reading: once a further file exists, the first one is complete.
        for file in [f for n, f in enumerate(self.files) if n == 0 or f.exists()]:
            while not self.entries and (found := file.read(limit)):
                # The offset is one in the first file.
                self.add(found if file is self.files[0] else [e._replace(end=0) for e in found])
        return bool(self.entries)

    def add(self, found: Sequence[Entry]) -> None:
        """Add the records that are new."""
        self.entries.extend(
            entry
            for entry in found
            if entry.record.attempt == self._attempt and entry.record.seq > self._seq
        )
        if self.entries:
            self._seq = max(self._seq, self.entries[-1].record.seq)

    def pop(self) -> Entry:
        """Return the next record."""
        entry = self.entries.popleft()
        self.offset = entry.end or self.offset
        return entry


def _time_of_next(source: _Source) -> float:
    return source.entries[0].record.time


class RunReader:
    """Reads the records of a run across its attempts and streams, starting at a position.

    The records of a stream keep their order. Records of different streams are in the order of their
    times, as far as they are there to be read; the first record of an attempt is always one of the
    main stream, and the last one is the run's end.

    Args:
        folder: the run's directory.
        after: (attempt, seq) of the last record of the main stream to skip.
        offset: position in its file of the record after that, if known.
        streams: where to begin in the streams of that attempt; by default at their first records.
        upto: the last attempt to read; None for all attempts.
        waits: whether the run's end is held back while a stream is still being written.
        clock: monotonic time in seconds, for looking for new streams.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        after: tuple[int, int] = (0, 0),
        offset: int = 0,
        streams: Mapping[str, Place] | None = None,
        upto: int | None = None,
        waits: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._next_attempt = after[0]
        self._upto = upto
        self._waits = waits
        self._clock = clock
        self._places = {"": Place(after[1], offset), **(streams or {})}
        self._attempt: int | None = None
        self._main = _Source([], 0, Place())
        self._streams: dict[Stream, _Source] = {}
        self._listed_at: float | None = None
        self._has_begun = self._has_ended = False
        self._end: Entry | None = None
        self._extra: deque[bytes] = deque()
        self.is_waiting = False
        """Whether the run's end is held back because a stream is still being written."""
        self.damaged = 0
        self.missing = 0

    @property
    def offset(self) -> int:
        """Position in the main stream's file of this attempt after its last returned record."""
        return self._main.offset

    @property
    def offsets(self) -> dict[str, int]:
        """Positions in the files of the other streams after their last returned records."""
        return {stream.source: source.offset for stream, source in self._streams.items()}

    def add(self, lines: Sequence[bytes]) -> None:
        """Add lines that are in no file, as the last ones of the main stream."""
        self._extra = deque(lines)

    def stop_waiting(self) -> None:
        """Return the run's end although a stream is still being written."""
        self._waits = False

    def read(self, limit: int = 500) -> list[Entry]:
        """Return the next records, at most `limit` and all of one attempt; empty at the end.

        Raises:
            JournalError: a file is a link, or not a regular file.
        """
        while True:
            if self._attempt is None and not self._open_next_attempt():
                return []
            self._find_streams()
            found = self._read(limit)
            is_last = True
            if not found:
                # Checked before reading: once a later attempt exists, this one is complete.
                is_last = self._is_last()
                found = self._read(limit)
            if not found and is_last and self._extra:
                self._main.add(self._decoded_extra())
                found = self._read(limit)
            found = found or self._read_end(limit)
            if found or is_last or self.is_waiting:
                return found
            self._close_attempt()

    def close(self) -> None:
        """Close the files, and count the damaged lines in them."""
        self._close_attempt()

    def _read(self, limit: int) -> list[Entry]:
        """Return what can be read now, without the run's end."""
        found: list[Entry] = []
        if self._streams and not self._has_begun:
            limit = 1  # the first record is one of the main stream, whatever the others have
        left = [self._main, *self._streams.values()]
        while len(found) < limit:
            # A stream that is at its end is not asked again for each record of the others.
            left = [source for source in left if self._has_next(source, limit)]
            if not left:
                break
            oldest = min(left, key=_time_of_next) if len(left) > 1 else left[0]
            found.append(oldest.pop())
            self._has_begun = True
        return found

    def _has_next(self, source: _Source, limit: int) -> bool:
        """Return whether the next record of a stream may be returned now."""
        if source is not self._main:
            is_inside = (self._has_begun or self._end is not None) and not self._has_ended
            return is_inside and source.fill(limit)
        if self._end is not None or not source.fill(limit):
            return False
        if isinstance(source.entries[0].record.event, RunEnded):
            self._end = source.entries.popleft()
        return self._end is None

    def _read_end(self, limit: int) -> list[Entry]:
        """Return the run's end, or what else came before it; empty while it is held back."""
        if self._end is None:
            return []
        if not self._must_wait():
            self._find_streams(at_once=True)
        # Checked before reading: once a stream is not being written, it is complete.
        self.is_waiting = self._must_wait()
        if found := self._read(limit):
            return found
        if self.is_waiting:
            return []
        end, self._end = self._end, None
        self._main.offset = end.end or self._main.offset
        self._has_ended = True
        return [end]

    def _must_wait(self) -> bool:
        """Return whether the run's end is to be held back for a stream that is being written."""
        if not self._waits:
            return False
        assert self._attempt is not None
        paths = [self._folder.records(self._attempt, s.rank, s.name) for s in self._streams]
        return any(map(is_being_written, paths))

    def _find_streams(self, *, at_once: bool = False) -> None:
        """Look for new streams, at most once a second unless `at_once` is set."""
        assert self._attempt is not None
        now, last = self._clock(), self._listed_at
        if not at_once and last is not None and now - last < _LIST_S:
            return
        self._listed_at = now
        for stream in self._folder.streams(self._attempt):
            if stream not in self._streams:
                path = self._folder.records(self._attempt, stream.rank, stream.name)
                place = self._places.get(stream.source, Place())
                file = RecordFile(self._folder, path, offset=place.offset)
                self._streams[stream] = _Source([file], self._attempt, place)

    def _decoded_extra(self) -> list[Entry]:
        codec = Codec(load=Blobs(self._folder).load)
        bodies = [unseal(line.rstrip(b"\n")) for line in self._extra]
        self._extra.clear()
        return [decode_entry(body, codec) for body in bodies if body]

    def _is_last(self) -> bool:
        """Return whether no later attempt is to be read."""
        if self._upto is not None and self._attempt == self._upto:
            return True
        known = self._known_attempts()
        # If the directory was deleted, no attempt is listed, and this one is still open.
        return not known or self._attempt == known[-1]

    def _known_attempts(self) -> list[int]:
        return [n for n in self._folder.attempts() if self._upto is None or n <= self._upto]

    def _open_next_attempt(self) -> bool:
        """Open the next attempt that can have records after the position."""
        wanted = [n for n in self._known_attempts() if n >= self._next_attempt]
        if not wanted:
            return False
        attempt = self._attempt = wanted[0]
        if attempt != self._next_attempt:
            self._places = {}
        place = self._places.get("", Place())
        paths = (self._folder.records(attempt), self._folder.end(attempt))
        files = [
            RecordFile(self._folder, path, offset=place.offset * (n == 0))
            for n, path in enumerate(paths)
        ]
        self._main = _Source(files, attempt, place)
        self._has_begun, self._has_ended = place.seq > 0, False
        self._listed_at = None
        return True

    def _close_attempt(self) -> None:
        for source in (self._main, *self._streams.values()):
            for file in source.files:
                file.finish()
                file.close()
                self.damaged += file.damaged
                self.missing += file.missing
        self._main, self._streams, self._end = _Source([], 0, Place()), {}, None
        if self._attempt is not None:
            self._next_attempt, self._places = self._attempt + 1, {}
        self._attempt = None


def first_entry(folder: RunFolder, attempt: int) -> Entry | None:
    """Return the first readable record of an attempt, None if there is none."""
    file = RecordFile(folder, folder.records(attempt))
    try:
        found = file.read(1)
    finally:
        file.close()
    return found[0] if found else None
