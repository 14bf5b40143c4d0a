"""The position of a sink in a run, and its counts, stored on disk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from trainbus.delivery.retry import QueuedRecord
from trainbus.events import Record
from trainbus.journal.directory import make_folder, write_atomically
from trainbus.journal.reader import Place

_MANY = 500
_MAX_OFFSET = 2**60


class StreamCursor(msgspec.Struct, kw_only=True):
    """The position of a sink in one stream of an attempt, besides the main stream."""

    seq: int = 0
    offset: int = 0
    uploads: list[int] = []
    """Seqs up to `seq` whose upload has not finished."""


class Cursor(msgspec.Struct, kw_only=True):
    """The position of a sink, and counts of the records of all streams of that attempt."""

    attempt: int = 0
    seq: int = 0
    offset: int = 0
    streams: dict[str, StreamCursor] = {}
    """Positions in the other streams, by their source, such as `console-r0`."""
    taken: int = 0
    skipped: int = 0
    dead: int = 0
    lost: int = 0
    superseded: int = 0
    closed: bool = True
    """Whether the sink was closed after its last record."""
    uploads: list[int] = []
    """Seqs up to `seq` whose upload has not finished."""
    location: str | None = None

    def place(self, source: str) -> Place:
        """Return where to continue to read a stream."""
        part = self.part(source)
        if part is None:
            return Place()
        if part.uploads or not 0 <= part.offset < _MAX_OFFSET:
            return Place(min([*part.uploads, part.seq + 1]) - 1)
        return Place(part.seq, part.offset)

    def part(self, source: str) -> Cursor | StreamCursor | None:
        """Return the position in a stream, None if nothing of it was delivered."""
        return self.streams.get(source) if source else self

    def has(self, record: Record) -> bool:
        """Return whether a record of this attempt was delivered; one being uploaded was not."""
        part = self.part(record.source)
        return part is not None and record.seq <= part.seq and record.seq not in part.uploads


class Ledger:
    """Updates and saves the cursor of one sink; the upload thread may use it too.

    Args:
        path: file of the cursor.
        clock: monotonic time in seconds.
    """

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self.cursor = Cursor()
        self._path = path
        self._clock = clock
        self._mutex = threading.Lock()
        self._is_begun = False
        self._saved_at = clock()
        self._unsaved = 0

    def read(self) -> Cursor | None:
        """Return the saved cursor, None if there is none or it can't be read."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Cursor)
        except (OSError, msgspec.DecodeError):
            return None

    def start(self, cursor: Cursor) -> None:
        """Start from a cursor; only from now on `save` writes it."""
        self.cursor, self._is_begun = cursor, True

    def count_taken(self, items: Sequence[QueuedRecord], offsets: Mapping[str, int]) -> None:
        """Count delivered and skipped records; `offsets` says where to read next, if known."""
        with self._mutex:
            self._count(items)
            for item in items:
                self._pass(item.record)
            for source, offset in offsets.items():
                if (part := self.cursor.part(source)) is not None:
                    part.offset = offset
        self._unsaved += len(items)

    def start_upload(self, record: Record) -> None:
        """Note that the upload of a record has started."""
        with self._mutex:
            part = self._pass(record)
            if record.seq not in part.uploads:
                part.uploads = [*part.uploads, record.seq]

    def finish_upload(self, items: Sequence[QueuedRecord]) -> None:
        """Count records whose upload has finished."""
        with self._mutex:
            for item in items:
                self._end_upload(item.record)
            self._count(items)

    def _count(self, items: Sequence[QueuedRecord]) -> None:
        skipped = sum(item.is_filtered_out for item in items)
        self.cursor.skipped += skipped
        self.cursor.taken += len(items) - skipped
        self.cursor.superseded += sum(item.is_superseded for item in items)

    def count_rejected(self, record: Record) -> None:
        """Count a record that the sink rejected."""
        with self._mutex:
            self.cursor.dead += 1
            self._end_upload(record)

    def _pass(self, record: Record) -> Cursor | StreamCursor:
        """Move the position in the record's stream behind the record, and return it."""
        source = record.source
        part = self.cursor.part(source)
        if part is None:
            part = self.cursor.streams[source] = StreamCursor()
        part.seq = max(part.seq, record.seq)
        return part

    def _end_upload(self, record: Record) -> None:
        part = self._pass(record)
        if record.seq in part.uploads:
            part.uploads = [seq for seq in part.uploads if seq != record.seq]

    def save(self, after_s: float) -> None:
        """Save the cursor if it has changed and was last saved `after_s` seconds ago or earlier."""
        now = self._clock()
        due = self._unsaved >= _MANY or now - self._saved_at >= after_s
        if not self._is_begun or not due or (after_s and not self._unsaved):
            return
        with self._mutex:
            data = msgspec.json.encode(self.cursor)
        self._saved_at, self._unsaved = now, 0
        with suppress(OSError):  # a full disk: after a crash records may be delivered twice
            make_folder(self._path.parent)
            write_atomically(self._path, data)
