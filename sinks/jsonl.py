"""Writes every record as one line of JSON: the reference sink, and the one to copy.

Guarantees: one line a record, in their order; each batch is one `write`; a record that was
written for the run before, by this process or an earlier one, is not written again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from msgspec import DecodeError, Meta

from trainbus.errors import SinkError
from trainbus.events import Record, decode, encode
from trainbus.interfaces import FilePath, Options, RunInfo, Sink
from trainbus.toolkit.sinks import check_folder


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

    def __init__(self, options: JsonlOptions | None = None) -> None:
        super().__init__(options)
        self._path: Path | None = None
        self._fd: int | None = None
        self._last = (0, 0)

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
        path = Path(self.options.path.replace("{run}", run.id)).expanduser().absolute()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._last = _last_position(path, run.id)
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            if _is_torn(path):  # else the next record would be lost with the half line before it
                os.write(self._fd, b"\n")
        except OSError as error:
            raise SinkError(f"can't write {path}: {error.strerror}; set another `path`") from error
        self._path = path

    def write(self, records: Sequence[Record]) -> None:
        """Append the records that are new.

        Raises:
            OSError: the disk is full or gone.
        """
        if self._fd is None:
            raise SinkError("write came before open; call open(run) first")
        new, last = [], self._last
        for record in records:
            if record.position > last:
                new.append(record)
                last = record.position
        if not new:
            return
        lines = b"".join(encode(record) + b"\n" for record in new)
        written = os.write(self._fd, lines)
        if written < len(lines):  # a full disk writes short, without an error
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
            raise OSError(28, "no space left on device", str(self._path))
        self._last = last

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    @property
    def location(self) -> str | None:
        """Path of the file."""
        return str(self._path) if self._path else None


def _last_position(path: Path, run: str) -> tuple[int, int]:
    """Return the position of the run's last record in the file, (0, 0) if there is none."""
    last = (0, 0)
    if path.exists():
        with path.open("rb") as lines:
            for line in lines:
                try:
                    record = decode(line)
                except DecodeError:  # a line cut short by a crash, or one that is not ours
                    continue
                if record.run == run:
                    last = max(last, record.position)
    return last


def _is_torn(path: Path) -> bool:
    """Return whether a crash left the file without the line feed of its last line."""
    with path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
        return file.read() not in (b"", b"\n")
