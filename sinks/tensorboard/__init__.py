"""Writes a run as TensorBoard event files: one folder per run, one file per attempt.

Guarantees: TensorFlow is never imported; each record is in its file completely and once, even if
the process is killed at any moment: the last event of a record holds its position, and whatever
follows the last such event is truncated; two names never share a tag.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from trainbus.events import Record
from trainbus.interfaces import FilePath, Options, RunInfo
from trainbus.toolkit.sinks import (
    MAIN,
    NO_POSITION,
    Positions,
    SeenRecords,
    TrackerSink,
    append,
    check_folder,
    check_package,
    folder_of,
    make_folder,
    required_package,
    writing_to,
)

TESTED_VERSIONS = "2.21.0"
REQUIRED_NAMES = (
    "tensorboard.compat.proto.event_pb2:Event",
    "tensorboard.compat.proto.summary_pb2:Summary",
    "tensorboard.summary.writer.record_writer:RecordWriter",
    "tensorboard.util.tensor_util:make_tensor_proto",
    *(
        f"tensorboard.plugins.{name}.metadata:create_summary_metadata"
        for name in ("scalar", "image", "text", "histogram", "pr_curve", "hparams")
    ),
    "tensorboard.plugins.hparams.plugin_data_pb2:HParamsPluginData",
    "tensorboard.plugins.hparams.api_pb2:STATUS_SUCCESS",
)
"""Names that the sink relies on; `trainbus doctor` checks that they exist."""

_BINARY = getattr(os, "O_BINARY", 0)  # without it Windows writes another end of line
_MARK = re.compile(r"trainbus\.record\.(\d+)\.(\d+)(?:\.([a-z]+-r\d+))?")
"""Writer of the last event of a record: its attempt, its seq and, if it has one, its source."""


class TensorboardOptions(Options, frozen=True, kw_only=True):
    """Options of the `tensorboard` sink."""

    logdir: Annotated[
        FilePath,
        Meta(
            pattern=r"\{run\}",
            extra={"expected": "a path with `{run}` in it: TensorBoard needs a folder per run"},
            description="Folder for the run; `{run}` is replaced by the run's id",
        ),
    ] = "trainbus-runs/tensorboard/{run}"
    log_images: Annotated[bool, Meta(description="Whether to write logged pictures")] = True


class TensorboardSink(TrackerSink):
    """Appends what TensorBoard shows of each record to the event file of its attempt."""

    Options = TensorboardOptions
    service = "tensorboard"
    tracker = "TensorBoard"
    options: TensorboardOptions

    _fd: int | None = None
    _path: Path

    def check(self) -> str:
        """Make sure that the package is installed and the folder can be written.

        Raises:
            MissingPackageError: tensorboard is not installed.
            SinkError: the folder can't be written.
        """
        check_package("tensorboard")
        return check_folder(self.options.logdir)

    def open(self, run: RunInfo) -> None:
        """Open the attempt's event file, and read what it and the earlier ones contain.

        Raises:
            MissingPackageError: tensorboard is not installed.
            SinkError: the file can't be written.
        """
        super().open(run)
        with required_package("tensorboard"):
            from .charts import Values
        self._values = Values(self.showing, log_images=self.options.log_images)
        self._last: Positions = {}
        folder = make_folder(folder_of(self.options.logdir, run.id), option="logdir")
        path = folder / f"events.out.tfevents.{run.attempt:06}.trainbus"
        with writing_to(path, option="logdir"):
            for earlier in sorted(folder.glob("events.out.tfevents.*.trainbus")):
                if earlier < path:
                    _, ended = self._learn(earlier, is_over=True)
                    if ended:  # TensorBoard would show the first end that it finds
                        os.truncate(earlier, ended)
            end, _ = self._learn(path)
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _BINARY, 0o644)
            os.ftruncate(fd, end)
        self._path, self._fd = path, fd
        parts = Path(self.options.logdir).parts
        depth = len(parts) - next(i for i, part in enumerate(parts) if "{run}" in part)
        self._location = f"tensorboard --logdir {shlex.quote(str(folder.parents[depth - 1]))}"

    def write(self, records: Sequence[Record]) -> None:
        """Append what the new records show: all of it or, on a full disk, nothing.

        Raises:
            OSError: the disk is full or gone.
        """
        from tensorboard.summary.writer.record_writer import RecordWriter

        assert self._fd is not None
        file = io.BytesIO()
        writer = RecordWriter(file)
        seen = SeenRecords(last=self._last)
        is_empty = not os.fstat(self._fd).st_size
        for record in seen.new(records):
            if is_empty and not file.tell():
                writer.write(_event(record, file_version="brain.Event:2"))
            parts = self._values.of(record)
            for number, (step, values) in enumerate(parts, 1):
                writer.write(_event(record, step, values, is_last=number == len(parts)))
        append(self._fd, file.getvalue(), self._path)
        self._last = seen.last

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _learn(self, path: Path, *, is_over: bool = False) -> tuple[int, int]:
        """Read the position and the tags from a file; if `is_over`, those of a torn record too.

        Returns:
            The offset at which its last complete record ends, and the offset of the event that
            ended its session, 0 if there is none.
        """
        from tensorboard.plugins.hparams.metadata import SESSION_END_INFO_TAG

        whole = ended = begin = 0
        values = []
        for event, end in _events(path):
            mark = _MARK.fullmatch(event.source_metadata.writer)
            for value in event.summary.value:
                values.append((value, event.step))
                if value.tag == SESSION_END_INFO_TAG:
                    ended = begin
            if mark:
                source, position = mark[3] or MAIN, (int(mark[1]), int(mark[2]))
                self._last[source] = max(self._last.get(source, NO_POSITION), position)
                whole = end
                self._values.learn(values)
                values = []
            begin = end
        if is_over:
            self._values.learn(values)
        return whole, ended


def _event(
    record: Record,
    step: int = 0,
    values: Sequence[Any] = (),
    *,
    is_last: bool = False,
    file_version: str | None = None,
) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event

    event = Event(wall_time=record.time, step=step, file_version=file_version)
    if values:
        event.summary.value.extend(values)
    if is_last:
        source = record.source and f".{record.source}"
        event.source_metadata.writer = f"trainbus.record.{record.attempt}.{record.seq}{source}"
    data: bytes = event.SerializeToString()
    return data


def _events(path: Path) -> Iterator[tuple[Any, int]]:
    """Yield the complete events of a file and the offset at which each ends."""
    from tensorboard.compat.proto.event_pb2 import Event

    size = path.stat().st_size if path.exists() else 0
    if not size:
        return
    with path.open("rb") as file:
        while len(header := file.read(12)) == 12:
            (length,) = struct.unpack("<Q", header[:8])
            if file.tell() + length + 4 > size:
                return
            data = file.read(length + 4)
            try:
                event = Event.FromString(data[:-4])
            except Exception:  # protobuf's own; damaged events are truncated and written again
                return
            yield event, file.tell()
