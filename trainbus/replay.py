"""Sends a run that is on disk to sinks, and checks what is on disk: `trainbus replay` and `verify`.

The journal may come from anywhere: only the operator's configuration decides where records go, and
files outside of the run's directory are sent only from folders that the operator names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from trainbus.blobs import Blobs
from trainbus.delivery import SinkWorker
from trainbus.endings import last_record, recover
from trainbus.errors import JournalError
from trainbus.events import RunEnded, event_name
from trainbus.files import Files
from trainbus.receipt import Receipt
from trainbus.recordfile import RecordFile
from trainbus.route import Route
from trainbus.runfolder import RunFolder, is_being_written
from trainbus.workers import save_receipt


class Progress(msgspec.Struct, frozen=True):
    """How far a replay is: records that one sink has, of all there are."""

    sink: str
    done: int
    total: int


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a replay would send to one sink."""

    sink: str
    kind: str
    missing: int


def replay(
    folder: RunFolder,
    routes: Sequence[Route],
    *,
    after: tuple[int, int] | None = None,
    trusted: Sequence[str] = (),
    flush_secs: float = 60.0,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> tuple[Receipt, Files]:
    """Send to each sink what it has not got, and return what became of it.

    Args:
        folder: the run's directory.
        routes: the sinks.
        after: send what comes after this (attempt, seq), whatever was sent before.
        trusted: folders outside of the run's directory whose files may be sent.
        flush_secs: how long a network that is down is waited for, each time anew.
        tell: called with the progress.

    Returns:
        The receipt of the last attempt, and the files that records named.

    Raises:
        JournalError: a training is writing this journal, or it can't be read.
    """
    attempts = folder.attempts()
    if is_being_written(folder.records(attempts[-1])):
        raise JournalError(
            f"the training that writes {folder.path} is still running; its own sinks are fed "
            "by it, and a replay has to wait for its end"
        )
    try:
        recover(folder, now=time.time())
    except OSError as error:
        raise JournalError(f"{folder.path} can't be written: {error.strerror}") from error
    last = last_record(folder, attempts[-1])
    if last is None:
        raise JournalError(f"found no whole record in {folder.path}")
    files = Files(folder, trusted)
    reports = []
    for route in routes:
        worker = SinkWorker(route, folder, files, attempt=attempts[-1], after=after, is_replay=True)
        _drain(worker, flush_secs, partial(_tell, tell, worker, last.seq))
        worker.close()
        # What was read to its end was counted on the way.
        total = worker.count if worker.is_complete() else count(folder, attempts[-1])
        reports.append(worker.report(total))
    receipt = Receipt(
        run=last.run,
        status=last.event.status if isinstance(last.event, RunEnded) else "open",
        attempt=attempts[-1],
        emitted=total,
        sinks=reports,
        journal=str(folder.path),
    )
    save_receipt(folder, receipt)
    return receipt, files


def plan(
    folder: RunFolder, routes: Sequence[Route], *, after: tuple[int, int] | None = None
) -> list[Plan]:
    """Return what a replay would send, without sending or writing anything."""
    found = []
    for route in routes:
        worker = SinkWorker(
            route,
            folder,
            Files(folder, []),
            attempt=folder.attempts()[-1],
            after=after,
            is_replay=True,
        )
        found.append(Plan(sink=route.name, kind=route.kind, missing=worker.missing()))
    return found


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What `verify` found in one records file."""

    file: str
    records: int
    damaged: int
    missing: int
    torn: int
    state: str
    faults: list[str]

    @property
    def is_sound(self) -> bool:
        """Whether every record that was written is there, and every blob that they name."""
        return not (self.damaged or self.missing or self.faults)


def verify(folder: RunFolder, tell: Callable[[int], None] = lambda n: None) -> list[Finding]:
    """Check every record and every blob of a run.

    Args:
        folder: the run's directory.
        tell: called with the bytes that were looked at.
    """
    blobs, found = Blobs(folder), []
    for attempt in folder.attempts(rank=None):
        for rank in folder.ranks(attempt):
            for path in (folder.records(attempt, rank), folder.end(attempt, rank)):
                if path.exists():
                    found.append(_check(folder, path, blobs, tell))
    return found


def count(folder: RunFolder, attempt: int) -> int:
    """Return how many whole records an attempt has."""
    total = 0
    for path in (folder.records(attempt), folder.end(attempt)):
        file = RecordFile(folder, path)
        while entries := file.read():
            total += len(entries)
        file.close()
    return total


def _check(folder: RunFolder, path: Path, blobs: Blobs, tell: Callable[[int], None]) -> Finding:
    file = RecordFile(folder, path)
    faults: list[str] = []
    records, state = 0, "open"
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
            tell(file.offset)
        file.finish()
    except JournalError as error:
        faults.append(str(error))
    finally:
        file.close()
    if state == "open" and is_being_written(path):
        state = "being written"
    return Finding(
        file=path.name,
        records=records,
        damaged=file.damaged,
        missing=file.missing,
        torn=file.torn,
        state=state,
        faults=[*file.faults, *faults],
    )


def _tell(tell: Callable[[Progress], None], worker: SinkWorker, total: int) -> None:
    tell(Progress(worker.route.name, worker.count, total))


def _drain(worker: SinkWorker, flush_secs: float, tell: Callable[[], None]) -> None:
    """Step until everything is sent, or nothing more can be."""
    worker.finish()
    patience = time.monotonic() + flush_secs
    while not worker.done and not worker.main.stopped and time.monotonic() < patience:
        before = worker.count
        wait = worker.step()
        if worker.count != before:
            patience = time.monotonic() + flush_secs
        elif wait and worker.is_idle():
            break
        tell()
        if wait:
            time.sleep(wait)
