"""Ends the attempts of killed processes, and finds the cause of a failed distributed run."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

from trainbus.errors import JournalError
from trainbus.events import (
    Codec,
    Failure,
    Record,
    RunEnded,
)
from trainbus.journal.directory import RunFolder
from trainbus.journal.encoding import MAX_LINE, seal
from trainbus.journal.locks import is_being_written
from trainbus.journal.reader import RecordFile

logger = logging.getLogger("trainbus")

_TAIL = 2 * MAX_LINE

REASON_LOST = "the training process was killed, or ended without ending its run"


def last_record(folder: RunFolder, attempt: int, rank: int = 0) -> Record | None:
    """Return the last readable record of an attempt, including its end."""
    last = None
    for path in (folder.records(attempt, rank), folder.end(attempt, rank)):
        last = read_tail(folder, path).last or last
    return last


class Tail(NamedTuple):
    """The end of a records file."""

    last: Record | None
    """The last readable record."""
    damaged: int
    """Number of damaged lines after it."""
    end: int
    """Position in the file after the last complete line."""


def read_tail(folder: RunFolder, path: Path) -> Tail:
    """Return the end of a records file, reading no more of the file than necessary."""
    # The last lines usually suffice; a reader can start in the middle of a line.
    begin = max(path.stat().st_size - _TAIL, 0) if path.exists() else 0
    found = Tail(None, 0, 0)
    for offset in (begin, 0) if begin else (0,):
        file, last = RecordFile(folder, path, offset=offset), None
        try:
            while entries := file.read():
                last = entries[-1].record
            before = file.damaged
            file.finish()
            found = Tail(last, file.damaged - before, file.offset)
        finally:
            file.close()
        if last is not None:
            break
    return found


def recover(folder: RunFolder, *, now: float, upto: int | None = None) -> int:
    """Write the missing end of every attempt whose process is gone; return how many were written.

    Args:
        folder: the run's directory.
        now: Unix seconds.
        upto: the last attempt to check; None for all.

    Raises:
        OSError: an end can't be written.
    """
    count = 0
    for attempt in folder.attempts():
        path = folder.records(attempt)
        if (upto is not None and attempt > upto) or is_being_written(path):
            continue
        last = last_record(folder, attempt)
        if last is not None and isinstance(last.event, RunEnded):
            continue
        seq = last.seq if last else 0
        time = max(last.time, path.stat().st_mtime) if last else now
        error = Failure(type="ProcessLost", message=REASON_LOST)
        event = RunEnded(status="failed", reason=REASON_LOST, error=error)
        event = end_with_cause(folder, attempt, event)
        run = last.run if last else folder.run
        end = Record(seq=seq + 1, run=run, time=time, event=event, attempt=attempt)
        count += write_end(folder, end)
    return count


def end_with_cause(folder: RunFolder, attempt: int, end: RunEnded) -> RunEnded:
    """Return the end of a run; if another rank failed first, with the error of that rank."""
    if end.status == "finished":
        return end
    found: list[tuple[bool, float, int, Failure]] = []
    for rank in folder.ranks(attempt):
        if rank == 0:
            continue
        file = RecordFile(folder, folder.records(attempt, rank))
        try:
            for entry in file.read():
                event = entry.record.event
                if isinstance(event, RunEnded) and event.status == "failed" and event.error:
                    is_effect = _lost_connection(event.error)
                    found.append((is_effect, entry.record.time, rank, event.error))
        except (OSError, JournalError) as fault:
            logger.warning("can't read the records of rank %d: %s", rank, fault)
        finally:
            file.close()
    if not found:
        return end
    is_effect, _, rank, error = min(found, key=lambda item: item[:3])
    if is_effect and end.error is not None and not _lost_connection(end.error):
        return end
    reason = f"rank {rank}: {error.type}: {error.message}"
    return RunEnded(status="failed", reason=reason, error=error, best=end.best)


def _lost_connection(error: Failure) -> bool:
    """Return whether a failure looks like the loss of the connection to another rank."""
    text = f"{error.type}: {error.message}"
    return re.search(r"\b(gloo|NCCL|Dist\w*Error|[Cc]onnection \w+)\b", text) is not None


def write_end(folder: RunFolder, record: Record) -> bool:
    """Write the end of an attempt whose process is gone; return False if it already has one.

    Raises:
        OSError: it can't be written.
    """
    path = folder.end(record.attempt, record.rank)
    fd, temporary = tempfile.mkstemp(dir=folder.path, prefix=".tmp-")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(seal(Codec().encode(record)))
            file.flush()
            os.fsync(fd)
        os.link(temporary, path)  # unlike a rename, this fails if another process was first
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)
    return True
