"""Writes each record as one line of JSON: the reference sink, and the one to copy.

Guarantees: one line per record, in order; one `write` per batch; a record that this process or an
earlier one has written for the run is not written again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from msgspec import DecodeError, Meta

from trainbus.events import Record, decode, encode
from trainbus.interfaces import FilePath, Options, RunInfo, Sink
from trainbus.toolkit.sinks import (
    Positions,
    SeenRecords,
    append,
    check_folder,
    folder_of,
    writing_to,
)

_BINARY = getattr(os, "O_BINARY", 0)  # without it Windows writes another end of line


class JsonlOptions(Options, frozen=True, kw_only=True):
    """Options of the `jsonl` sink."""

    path: Annotated[
        FilePath,
        Meta(min_length=1, description="File to append to; `{run}` is replaced by the run's id"),
    ] = "trainbus-runs/{run}.jsonl"


class JsonlSink(Sink):
    """Appends each record to a file as one line of JSON."""

    Options = JsonlOptions
    reads_files = False
    options: JsonlOptions

    _location: str | None = None
    _fd = -1

    def check(self) -> str:
        """Make sure that the file can be written.

        Raises:
            SinkError: it can't.
        """
        return check_folder(Path(self.options.path).parent)

    def open(self, run: RunInfo) -> None:
        """Open the file, and find the last record of this run in it.

        Raises:
            SinkError: the file can't be written.
        """
        path = folder_of(self.options.path, run.id)
        with writing_to(path, option="path"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._last = _last_positions(path, run.id)
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _BINARY, 0o644)
            if _is_torn(path):  # else the next record would be lost with the half line before it
                os.write(self._fd, b"\n")
        self._path, self._location = path, str(path)

    def write(self, records: Sequence[Record]) -> None:
        """Append the records that are new.

        Raises:
            OSError: the disk is full or gone.
        """
        seen = SeenRecords(last=self._last)
        lines = b"".join(encode(record) + b"\n" for record in seen.new(records))
        append(self._fd, lines, self._path)
        self._last = seen.last  # not before: records that could not be written come again

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    @property
    def location(self) -> str | None:
        """Path of the file."""
        return self._location


def _last_positions(path: Path, run: str) -> Positions:
    """Return the positions of the run's last records in the file."""
    seen = SeenRecords()
    if path.exists():
        with path.open("rb") as lines:
            for line in lines:
                try:
                    record = decode(line)
                except DecodeError:  # a line that a crash cut short, or another program's
                    continue
                if record.run == run and not seen.has(record):
                    seen.add(record)
    return seen.last


def _is_torn(path: Path) -> bool:
    """Return whether a crash left the file without the line feed of its last line."""
    with path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
        return file.read() not in (b"", b"\n")
