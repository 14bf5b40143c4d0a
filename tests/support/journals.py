"""Journals to be read, damaged and attacked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainbus import events as ev
from trainbus.journal.directory import RunFolder
from trainbus.journal.encoding import Entry, seal
from trainbus.journal.reader import RecordFile, RunReader
from trainbus.journal.writer import JournalWriter

SAMPLE: tuple[ev.Event, ...] = (
    ev.RunStarted(name="é ☃ J*", params={"lr": 0.1, "deep": {"a": [1, None]}}),
    ev.EpochStarted(epoch=0),
    ev.MetricsLogged(values={"loss": 0.5, "odd": float("nan")}, phase="train", step=1),
    ev.ImageLogged(key="i", array=np.arange(4, dtype=np.uint8).reshape(2, 2)),
    ev.TableLogged(key="t", columns=["a", "b"], rows=[[1, "x"], [float("inf"), None]]),
    ev.TextLogged(key="n", text='J*line\nfeed {"crc":"00000000",\u2028"'),
    ev.HistogramLogged(key="h", counts=np.array([1, 2]), edges=np.array([0.0, 0.5, 1.0])),
    ev.CheckpointSaved(path="/w/last.pt", kind="last", epoch=0, metrics={"map": 0.25}),
    ev.EpochEnded(epoch=0, duration_s=1.5, outcome="completed"),
    ev.RunEnded(status="finished", reason="J*", best=ev.Best(metric="map", value=0.25, epoch=0)),
)


def folder_in(path: Path, run: str = "run") -> RunFolder:
    """Return the directory of a run that has no journal yet."""
    return RunFolder.create([path], run)


def write_journal(folder: RunFolder, *events: ev.Event, attempt: int = 1) -> list[bytes]:
    """Write a journal as a training does, and return its records as JSON."""
    journal = JournalWriter(folder, attempt)
    written = [as_json(journal.append(e, 1.0 + n)) for n, e in enumerate(events or SAMPLE)]
    journal.close()
    return written


def write_lines(folder: RunFolder, *lines: Mapping[str, Any] | bytes, attempt: int = 1) -> None:
    """Write records that say what they like, with checksums that are right."""
    found = [
        seal(line if isinstance(line, bytes) else json.dumps({**_ENVELOPE, **line}).encode())
        for line in lines
    ]
    folder.records(attempt).write_bytes(b"".join(found))


def as_json(record: ev.Record) -> bytes:
    """Return a record as JSON with all its arrays, so that two can be compared."""
    return ev.encode(record)


def read_file(folder: RunFolder, path: Path | None = None) -> tuple[list[Entry], RecordFile]:
    """Return what a finished records file holds, and the reader that counted it."""
    file = RecordFile(folder, path or folder.records(1))
    found: list[Entry] = []
    try:
        while new := file.read():
            found += new
    finally:
        file.close()
    file.finish()
    return found, file


def read_records(folder: RunFolder, path: Path | None = None) -> list[ev.Record]:
    """Return the records of a file."""
    return [entry.record for entry in read_file(folder, path)[0]]


def read_run(reader: RunReader, limit: int = 500) -> list[ev.Record]:
    """Return all records that a reader has now."""
    found: list[ev.Record] = []
    while new := reader.read(limit):
        found += [entry.record for entry in new]
    return found


def count_of(records: list[ev.Record], kind: type[Any]) -> int:
    """Return how many records hold an event of a type."""
    return sum(isinstance(record.event, kind) for record in records)


class Disk:
    """Stands in for `os.write`: writes to one descriptor as `plan` says, and as usual to others.

    `plan` gets the number of the call, from 0, and returns how many bytes are written, None for
    all of them, or the exception that is raised instead.
    """

    def __init__(self, fd: int, plan: Callable[[int], int | BaseException | None]) -> None:
        self.fd = fd
        self.plan = plan
        self.calls = 0
        self._write = os.write

    def __call__(self, fd: int, data: bytes) -> int:
        """Write as planned."""
        if fd != self.fd:
            return self._write(fd, data)
        wanted = self.plan(self.calls)
        self.calls += 1
        if isinstance(wanted, BaseException):
            raise wanted
        return self._write(fd, data if wanted is None else data[:wanted])


_ENVELOPE = {"seq": 1, "run": "run", "time": 1.0}
