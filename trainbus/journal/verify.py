"""Checks every record and every blob of a run's journal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from trainbus.errors import JournalError
from trainbus.events import RunEnded, event_name
from trainbus.journal.blobs import Blobs
from trainbus.journal.directory import RunFolder
from trainbus.journal.locks import is_being_written
from trainbus.journal.reader import RecordFile


class FileReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `verify` for one records file."""

    file: str
    records: int
    damaged: int
    missing: int
    torn: int
    state: str
    faults: list[str]

    @property
    def is_sound(self) -> bool:
        """Whether no record and no blob is damaged or missing."""
        return not (self.damaged or self.missing or self.faults)


def verify(folder: RunFolder, progress: Callable[[int], None] = lambda n: None) -> list[FileReport]:
    """Check every record and every blob of a run.

    Args:
        folder: the run's directory.
        progress: called with the number of bytes read so far.
    """
    blobs, found = Blobs(folder), []
    for attempt in folder.attempts(rank=None):
        for rank in folder.ranks(attempt):
            for path in (folder.records(attempt, rank), folder.end(attempt, rank)):
                if path.exists():
                    found.append(_check(folder, path, blobs, progress))
        for stream in folder.streams(attempt):
            path = folder.records(attempt, stream.rank, stream.name)
            # Only the main stream has an end.
            found.append(_check(folder, path, blobs, progress, state="complete"))
    return found


def _check(
    folder: RunFolder,
    path: Path,
    blobs: Blobs,
    progress: Callable[[int], None],
    *,
    state: str = "open",
) -> FileReport:
    file = RecordFile(folder, path)
    faults: list[str] = []
    records = 0
    try:
        while entries := file.read():
            records += len(entries)
            for entry in entries:
                for blob in entry.blobs:
                    try:
                        blobs.find(blob)
                    except JournalError as error:
                        faults.append(f"{event_name(entry.record.event)}: {error}")
                if isinstance(entry.record.event, RunEnded):
                    state = entry.record.event.status
            progress(file.offset)
        file.finish()
    except JournalError as error:
        faults.append(str(error))
    finally:
        file.close()
    if state in ("open", "complete") and is_being_written(path):
        state = "being written"
    return FileReport(
        file=path.name,
        records=records,
        damaged=file.damaged,
        missing=file.missing,
        torn=file.torn,
        state=state,
        faults=[*file.faults, *faults],
    )
