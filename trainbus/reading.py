"""Reads the records of a run back, also while they are being written.

Guarantees: every whole record is returned, in order; a damaged line costs itself alone and is
counted; a torn last line is left until it is whole; nothing that a journal says opens a file
outside its directory, decides how much memory is taken, or raises.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from trainbus.blobs import Blobs
from trainbus.events import Codec, Record
from trainbus.lines import unseal
from trainbus.recordfile import Entry, RecordFile, entry_of
from trainbus.runfolder import RunFolder


class RunReader:
    """The records of a run in order, over all its attempts, from a position on.

    Args:
        folder: the run's directory.
        after: (attempt, seq) of the last record that is not wanted.
        offset: where the record after it begins in its file, if that is known.
        upto: the last attempt that is wanted; None for all there are.
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
        """Where to go on in the records file of the attempt of the last record."""
        return self._parts[0].offset if self._parts else 0

    def add(self, lines: Sequence[bytes]) -> None:
        """Take lines that are in no file to be the last ones of the last attempt."""
        self._extra = deque(lines)

    def read(self, limit: int = 500) -> list[Entry]:
        """Return at most `limit` further records, all of one attempt; none if there are no more.

        Raises:
            JournalError: a file is a link, or no plain file.
        """
        while True:
            if self._attempt is None and not self._next():
                return []
            found = self._read(limit)
            is_last = True
            if not found:
                # Asked first: once there is a further attempt, this one gets no more.
                last = self._last_attempt()
                # Where the directory was deleted no attempt is known, and this one is still open.
                is_last = last is None or self._attempt == last
                found = self._read(limit)
            if found:
                self._after = found[-1].record.position
                return found
            if is_last:
                return self._read_extra(limit)
            self._leave()

    def close(self) -> None:
        """Close the files, and count what is damaged in them."""
        self._leave()

    def _read(self, limit: int) -> list[Entry]:
        main, end = self._parts
        # Asked first: once the end is there, the training process writes no more.
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
            entry = entry_of(body, codec) if body else None
            if entry is not None and entry.record.position > self._after:
                found.append(entry)
        if found:
            self._after = found[-1].record.position
        return found

    def _last_attempt(self) -> int | None:
        known = [n for n in self._folder.attempts() if self._upto is None or n <= self._upto]
        return known[-1] if known else None

    def _next(self) -> bool:
        """Open the next attempt that may have records after the position."""
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

    def _leave(self) -> None:
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
    """Return the first record of an attempt that can be read."""
    file = RecordFile(folder, folder.records(attempt))
    try:
        found = file.read(1)
    finally:
        file.close()
    return found[0] if found else None
