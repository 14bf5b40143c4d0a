"""The position of a sink in a run, and its counts, stored on disk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from trainbus.delivery.retry import QueuedRecord
from trainbus.journal.directory import make_folder, write_atomically

_MANY = 500


class Cursor(msgspec.Struct, kw_only=True):
    """The position of a sink, and counts of the records of that attempt."""

    attempt: int = 0
    seq: int = 0
    offset: int = 0
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

    def count_taken(self, items: Sequence[QueuedRecord], offset: int | None) -> None:
        """Count delivered and skipped records; `offset` is where to read next, if known."""
        with self._mutex:
            self._count(items)
            self.cursor.seq = max(self.cursor.seq, items[-1].record.seq)
            if offset is not None:
                self.cursor.offset = offset
        self._unsaved += len(items)

    def start_upload(self, seq: int) -> None:
        """Note that the upload of a record has started."""
        with self._mutex:
            if seq not in self.cursor.uploads:
                self.cursor.uploads = [*self.cursor.uploads, seq]
            self.cursor.seq = max(self.cursor.seq, seq)

    def finish_upload(self, items: Sequence[QueuedRecord]) -> None:
        """Count records whose upload has finished."""
        with self._mutex:
            done = {item.record.seq for item in items}
            self.cursor.uploads = [s for s in self.cursor.uploads if s not in done]
            self._count(items)

    def _count(self, items: Sequence[QueuedRecord]) -> None:
        skipped = sum(item.is_filtered_out for item in items)
        self.cursor.skipped += skipped
        self.cursor.taken += len(items) - skipped
        self.cursor.superseded += sum(item.is_superseded for item in items)

    def count_rejected(self, seq: int) -> None:
        """Count a record that the sink rejected."""
        with self._mutex:
            self.cursor.dead += 1
            self.cursor.seq = max(self.cursor.seq, seq)
            self.cursor.uploads = [s for s in self.cursor.uploads if s != seq]

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
