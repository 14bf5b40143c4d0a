"""Writes a run as TensorBoard event files: one folder a run, one file an attempt.

Guarantees: TensorFlow is never imported; a record is in its file whole and once, even if the
process is killed at any moment, because each record's last event tells the record's position and
what follows the last such event is cut off; two names never share a tag.
"""

from __future__ import annotations

import errno
import io
import os
import re
import shlex
import struct
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from trainbus.errors import MissingPackageError, SinkError
from trainbus.events import Record
from trainbus.interfaces import FilePath, Options, RunInfo, Sink
from trainbus.toolkit.sinks import SeenRecords, check_folder

TESTED_VERSIONS = "2.21.0"
REQUIRED_NAMES = (
    "tensorboard.compat.proto.event_pb2:Event",
    "tensorboard.compat.proto.summary_pb2:Summary",
    "tensorboard.summary.writer.record_writer:RecordWriter",
    "tensorboard.util.tensor_util:make_tensor_proto",
    "tensorboard.plugins.scalar.metadata:create_summary_metadata",
    "tensorboard.plugins.image.metadata:create_summary_metadata",
    "tensorboard.plugins.text.metadata:create_summary_metadata",
    "tensorboard.plugins.histogram.metadata:create_summary_metadata",
    "tensorboard.plugins.pr_curve.metadata:create_summary_metadata",
    "tensorboard.plugins.hparams.metadata:create_summary_metadata",
    "tensorboard.plugins.hparams.plugin_data_pb2:HParamsPluginData",
    "tensorboard.plugins.hparams.api_pb2:STATUS_SUCCESS",
)
"""What the sink relies on; `trainbus doctor` looks whether it is there."""

_MARK = re.compile(r"trainbus\.record\.(\d+)\.(\d+)")
"""Who wrote an event, in a record's last one: its attempt and seq."""


class TensorboardOptions(Options, frozen=True, kw_only=True):
    """Options of the `tensorboard` sink."""

    logdir: Annotated[
        FilePath,
        Meta(
            pattern=r"\{run\}",
            extra={"expected": "a path with `{run}` in it: TensorBoard takes one folder a run"},
            description="Folder of the run; `{run}` is replaced by the run's id",
        ),
    ] = "trainbus-runs/tensorboard/{run}"
    log_images: Annotated[bool, Meta(description="Whether logged pictures are written")] = True


class TensorboardSink(Sink):
    """Appends what each record shows to the event file of its attempt."""

    Options = TensorboardOptions
    service = "tensorboard"
    options: TensorboardOptions

    def __init__(self, options: TensorboardOptions | None = None) -> None:
        super().__init__(options)
        self._fd: int | None = None
        self._location: str | None = None

    def check(self) -> str:
        """Make sure that the package is there and the folder can be written.

        Raises:
            MissingPackageError: tensorboard is not installed.
            SinkError: the folder can't be written.
        """
        if find_spec("tensorboard") is None:
            raise MissingPackageError("tensorboard", extra="tensorboard")
        return check_folder(self.options.logdir)

    def open(self, run: RunInfo) -> None:
        """Open the attempt's event file, and find out what it and the earlier ones hold.

        Raises:
            MissingPackageError: tensorboard is not installed.
            SinkError: the file can't be written.
        """
        try:
            import tensorboard  # noqa: F401

            from ._tensorboard_values import Values
        except ImportError as error:
            raise MissingPackageError("tensorboard", extra="tensorboard") from error
        self.lost = 0
        self._values = Values(log_images=self.options.log_images)
        self._last = (0, 0)
        folder = Path(self.options.logdir.replace("{run}", run.id)).expanduser().absolute()
        path = folder / f"events.out.tfevents.{run.attempt:06}.trainbus"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for earlier in sorted(folder.glob("events.out.tfevents.*.trainbus")):
                if earlier < path:
                    _, ended = self._learn(earlier, is_over=True)
                    if ended:  # TensorBoard would show the first end that it finds
                        os.truncate(earlier, ended)
            end, _ = self._learn(path)
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.ftruncate(fd, end)
        except OSError as error:
            text = f"can't write {path}: {error.strerror}; set another `logdir`"
            raise SinkError(text) from error
        self._path, self._fd, self._size = path, fd, end
        parts = Path(self.options.logdir).parts
        depth = len(parts) - next(i for i, part in enumerate(parts) if "{run}" in part)
        self._location = f"tensorboard --logdir {shlex.quote(str(folder.parents[depth - 1]))}"

    def write(self, records: Sequence[Record]) -> None:
        """Append what the new records show; all of it or, on a full disk, nothing.

        Raises:
            SinkError: nothing was opened.
            OSError: the disk is full or gone.
        """
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self._fd is None:
            raise SinkError("write came before open; call open(run) first")
        file = io.BytesIO()
        writer = RecordWriter(file)
        taken = SeenRecords(last=self._last)
        for record in taken.new(records):
            if not self._size and not file.tell():
                writer.write(_event(record, file_version="brain.Event:2"))
            parts = self._values.of(record)
            for number, (step, values) in enumerate(parts, 1):
                writer.write(_event(record, step, values, is_last=number == len(parts)))
        self.lost = self._values.lost
        data = file.getvalue()
        written = os.write(self._fd, data) if data else 0
        if written < len(data):  # a full disk writes short, without an error
            os.ftruncate(self._fd, self._size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        self._size += written
        self._last = taken.last

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    @property
    def location(self) -> str | None:
        """Command that shows the run, beside those in the folders next to it."""
        return self._location

    def _learn(self, path: Path, *, is_over: bool = False) -> tuple[int, int]:
        """Take over position and tags of a file; if it is over, those of a half record as well.

        Returns:
            Where its last whole record ends, and where the event begins that ended its session.
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
                self._last = max(self._last, (int(mark[1]), int(mark[2])))
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
        event.source_metadata.writer = f"trainbus.record.{record.attempt}.{record.seq}"
    data: bytes = event.SerializeToString()
    return data


def _events(path: Path) -> Iterator[tuple[Any, int]]:
    """Yield the whole events of a file, and where each ends; a torn end is left out."""
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
            except Exception:  # protobuf's own; what is damaged is cut off, and comes again
                return
            yield event, file.tell()
