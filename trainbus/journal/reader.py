"""Reads the records of a run, also while they are being written.

Guarantees: every complete record is returned, in order; a damaged line is skipped and counted, and
affects no other line; an incomplete last line is left until it is complete; no content of a journal
opens a file outside its directory, decides how much memory is allocated, or raises an exception.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import msgspec

from trainbus.errors import JournalError
from trainbus.events import Codec, Record
from trainbus.journal.blobs import Blobs
from trainbus.journal.directory import RunFolder, is_run_id, open_within, read_at
from trainbus.journal.encoding import LINE_START, LONGEST_LINE, Entry, decode_entry, unseal

_CHUNK = 2**20
_MAX_FAULTS = 100
_MAX_PARTS = 100


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
        # An attempt starts with seq 1; an end that another process wrote can have any seq.
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
        while len(found) < limit:
            end = self._rest.find(b"\n")
            if end < 0:
                if not self._fill():
                    break
                continue
            self._take(end, limit, found)
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
                self._line(line, found)
            start = end + 1
            end = rest.find(b"\n", start)
        self._offset += start
        self._rest = rest[start:]

    def _line(self, line: bytes, found: list[Entry]) -> None:
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
            entry = decode_entry(body, self._codec)
            record = entry.record
            if not is_run_id(record.run):
                raise JournalError(f"rejected a record of run {record.run[:80]!r}")
        except (msgspec.DecodeError, JournalError, ValueError, RecursionError) as error:
            if len(self.faults) < _MAX_FAULTS:
                self.faults.append(str(error))
            self._bad += 1
            return
        self._count(record.seq)
        found.append(entry)

    def _count(self, seq: int) -> None:
        gap = 0 if self._last_seq is None else seq - self._last_seq - 1
        damaged = min(self._bad, gap) if gap > 0 and self._last_seq is not None else self._bad
        self.damaged += damaged
        self.missing += max(gap - damaged, 0)
        self._bad = 0
        self._is_in_piece = False
        self._last_seq = seq

    def _fill(self) -> bool:
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
        return bool(chunk)


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


class RunReader:
    """Reads the records of a run in order, across its attempts, starting at a position.

    Args:
        folder: the run's directory.
        after: (attempt, seq) of the last record to skip.
        offset: position in its file of the record after that, if known.
        upto: the last attempt to read; None for all attempts.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        after: tuple[int, int] = (0, 0),
        offset: int = 0,
        upto: int | None = None,
    ) -> None:
        self._folder = folder
        self._after = after
        self._upto = upto
        self._attempt: int | None = None
        self._parts: list[RecordFile] = []
        self._offset = offset
        self._extra: deque[bytes] = deque()
        self.damaged = 0
        self.missing = 0

    @property
    def offset(self) -> int:
        """Position in the records file of the current attempt after the last returned record."""
        return self._parts[0].offset if self._parts else 0

    def add(self, lines: Sequence[bytes]) -> None:
        """Add lines that are in no file, as the last ones of the last attempt."""
        self._extra = deque(lines)

    def read(self, limit: int = 500) -> list[Entry]:
        """Return the next records, at most `limit` and all of one attempt; empty at the end.

        Raises:
            JournalError: a file is a link, or not a regular file.
        """
        while True:
            if self._attempt is None and not self._open_next_attempt():
                return []
            found = self._read(limit)
            is_last = True
            if not found:
                # Checked before reading: once a later attempt exists, this one is complete.
                last = self._last_attempt()
                # If the directory was deleted, no attempt is listed, and this one is still open.
                is_last = last is None or self._attempt == last
                found = self._read(limit)
            if found:
                self._after = found[-1].record.position
                return found
            if is_last:
                return self._read_extra(limit)
            self._close_attempt()

    def close(self) -> None:
        """Close the files, and count the damaged lines in them."""
        self._close_attempt()

    def _read(self, limit: int) -> list[Entry]:
        main, end = self._parts
        # Checked before reading: once the end exists, the training process writes no more.
        parts = [main, end] if end.exists() else [main]
        for part in parts:
            while found := part.read(limit):
                new = [entry for entry in found if self._is_new(entry.record)]
                if new:
                    return new
        return []

    def _is_new(self, record: Record) -> bool:
        return record.attempt == self._attempt and record.position > self._after

    def _read_extra(self, limit: int) -> list[Entry]:
        codec = Codec(load=Blobs(self._folder).load)
        found: list[Entry] = []
        while self._extra and len(found) < limit:
            body = unseal(self._extra.popleft().rstrip(b"\n"))
            entry = decode_entry(body, codec) if body else None
            if entry is not None and entry.record.position > self._after:
                found.append(entry)
        if found:
            self._after = found[-1].record.position
        return found

    def _last_attempt(self) -> int | None:
        known = [n for n in self._folder.attempts() if self._upto is None or n <= self._upto]
        return known[-1] if known else None

    def _open_next_attempt(self) -> bool:
        """Open the next attempt that can have records after the position."""
        left = self._after[0] if self._attempt is None else self._attempt
        known = [n for n in self._folder.attempts() if self._upto is None or n <= self._upto]
        wanted = [n for n in known if n >= left]
        if not wanted:
            return False
        self._attempt = wanted[0]
        offset = self._offset if wanted[0] == self._after[0] else 0
        paths = (self._folder.records(wanted[0]), self._folder.end(wanted[0]))
        self._parts = [
            RecordFile(self._folder, path, offset=offset * (n == 0)) for n, path in enumerate(paths)
        ]
        return True

    def _close_attempt(self) -> None:
        for part in self._parts:
            part.finish()
            part.close()
            self.damaged += part.damaged
            self.missing += part.missing
        self._parts = []
        if self._attempt is not None:
            self._after = max(self._after, (self._attempt + 1, 0))
            self._offset = 0
        self._attempt = None


def first_entry(folder: RunFolder, attempt: int) -> Entry | None:
    """Return the first readable record of an attempt, None if there is none."""
    file = RecordFile(folder, folder.records(attempt))
    try:
        found = file.read(1)
    finally:
        file.close()
    return found[0] if found else None
