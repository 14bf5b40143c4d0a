"""The messages between the training process and a sidecar, and the mailboxes for them.

Messages are written to anonymous files in memory. So a write never blocks, whatever its size and
whatever the other process does; it fails neither on a full disk nor if the reader has stopped; and
the messages of a process that has died can still be read.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Generic, TypeAlias, TypeVar

import msgspec

from trainbus.capture.recorder import CaptureTask
from trainbus.delivery.receipt import SinkReport
from trainbus.delivery.transforms import TransformSpec

try:
    import fcntl
except ImportError:  # not on Windows, where sinks run in threads
    fcntl = None  # type: ignore[assignment]


_HEAD = 32
_PARTS = 1000
"""Buffers per `writev`; systems allow 1024."""
_BIG = 2**20
_MARKS = 2**16
_FIRST_SLOT = 8


class Hello(msgspec.Struct, kw_only=True, tag="hello"):
    """To the sidecar, first: the training process."""

    pid: int
    argv: list[str]
    main: str | None = None


class SinkTask(msgspec.Struct, kw_only=True):
    """One sink of a run: its registered type, its options and its transforms."""

    name: str
    type: str
    options: dict[str, Any]
    transforms: TransformSpec
    slot: int | None = None
    """Slot in `Marks` for its calls; None for a sink that this process does not deliver to."""
    base: str | None = None
    """Folder for files whose location no option sets."""
    error: str | None = None
    """Why no process delivers to it."""


class ReplayTask(msgspec.Struct, kw_only=True):
    """Settings of a replay."""

    after: tuple[int, int] | None = None
    trusted: list[str] = []


class OpenRun(msgspec.Struct, kw_only=True, tag="open"):
    """To the sidecar: deliver this run."""

    run: int
    folder: str
    attempt: int
    sinks: list[SinkTask]
    flush_secs: float
    config: str | None = None
    """File that the sinks are configured in, for the receipt of a run whose training is gone."""
    variables: dict[str, str | None]
    """Environment variables that have changed in the training process; None for deleted ones."""
    replay: ReplayTask | None = None
    capture: CaptureTask | None = None
    """What to record of the training besides its events."""


class FinishRun(msgspec.Struct, kw_only=True, tag="finish"):
    """To the sidecar: no more records follow, apart from the lines sent with this message."""

    run: int
    emitted: int
    """Records of the main stream."""
    stream_wait_s: float = 0.0
    """How long streams that are still being written hold back the run's end."""


class StopRun(msgspec.Struct, kw_only=True, tag="stop"):
    """To the sidecar: the time limit has passed; report within `secs` seconds."""

    run: int
    secs: float


class SinkOpened(msgspec.Struct, kw_only=True, tag="opened"):
    """To the training process: a sink is open, or `error` says why not."""

    run: int
    sink: str
    error: str | None = None
    location: str | None = None
    """Where the open sink shows the run."""


class LogWarning(msgspec.Struct, kw_only=True, tag="warning"):
    """To the training process: a warning to log."""

    text: str


class RunProgress(msgspec.Struct, kw_only=True, tag="progress"):
    """To the training process: how many records of a replay a sink has processed."""

    run: int
    sink: str
    count: int


class RunDone(msgspec.Struct, kw_only=True, tag="done"):
    """To the training process: a run is closed, with the report of each sink."""

    run: int
    reports: list[SinkReport]
    emitted: int
    """Records of all streams."""
    is_hung: bool = False
    """Whether a call of a sink has not returned, so that this process can't be used again."""
    damaged: list[str] = []
    refused: list[str] = []
    changed: list[str] = []


ToSidecar: TypeAlias = Hello | OpenRun | FinishRun | StopRun
ToTraining: TypeAlias = SinkOpened | LogWarning | RunProgress | RunDone

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Messages in one direction between two processes.

    Args:
        kind: type of the messages.
        fd: descriptor of the file, in the process that did not create it.
    """

    def __init__(self, kind: Any, fd: int | None = None) -> None:
        self.fd = anonymous_file() if fd is None else fd
        self._kind = kind
        self._at = 0
        self._is_writing = False

    def put(self, message: T, lines: Sequence[bytes] = ()) -> bool:
        """Write a message; return False if there is not enough memory."""
        if self._is_writing:  # called by a signal handler during another write
            return False
        # The json module keeps infinite numbers; msgspec encodes them as null.
        body = json.dumps(msgspec.to_builtins(message)).encode()
        begun = os.fstat(self.fd).st_size
        try:
            self._is_writing = True
            head = b"%016x%016x" % (len(body), sum(map(len, lines)))
            _write(self.fd, [head, body])
            for first in range(0, len(lines), _PARTS):
                _write(self.fd, lines[first : first + _PARTS])
        except BaseException as error:
            with suppress(OSError):
                os.ftruncate(self.fd, begun)
            if isinstance(error, OSError):
                return False
            raise
        finally:
            self._is_writing = False
        return True

    def take(self) -> list[tuple[T, list[bytes]]]:
        """Return the messages that have arrived, each with the journal lines sent with it."""
        found: list[tuple[T, list[bytes]]] = []
        at = self._at
        while len(head := os.pread(self.fd, _HEAD, at)) == _HEAD:
            size, more = int(head[:16], 16), int(head[16:], 16)
            if os.fstat(self.fd).st_size < at + _HEAD + size + more:
                break  # still being written
            body = _read(self.fd, at + _HEAD, size)
            lines = _read(self.fd, at + _HEAD + size, more).splitlines(keepends=True)
            message: T = msgspec.convert(json.loads(body), self._kind)
            found.append((message, lines))
            if more > _BIG:
                _free(self.fd, at, at + _HEAD + size + more)
            at += _HEAD + size + more
        # A signal handler may have read more messages in the meantime.
        self._at = max(self._at, at)
        return found

    def close(self) -> None:
        """Close the file."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Marks:
    """State of a sidecar in shared memory, which can still be read after it has died.

    Args:
        fd: descriptor of the file, in the process that did not create it.
    """

    def __init__(self, fd: int | None = None) -> None:
        self.fd = anonymous_file() if fd is None else fd
        if fd is None:
            os.ftruncate(self.fd, _MARKS)
        self._map = mmap.mmap(self.fd, _MARKS)

    @property
    def saved(self) -> int:
        """Number of printed bytes that are saved in the logs."""
        return int.from_bytes(self._map[:_FIRST_SLOT], "little")

    @saved.setter
    def saved(self, size: int) -> None:
        self._map[:_FIRST_SLOT] = size.to_bytes(_FIRST_SLOT, "little")

    def mark(self, slot: int, lane: int, is_called: bool) -> None:
        """Note whether a call of a sink is in progress, in one of its two queues."""
        self._map[_FIRST_SLOT + 2 * slot + lane] = is_called

    def is_called(self, slot: int) -> bool:
        """Return whether a call of the sink is in progress."""
        at = _FIRST_SLOT + 2 * slot
        return any(self._map[at : at + 2])

    def close(self) -> None:
        """Release the memory."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self._map.close()
            os.close(fd)


def anonymous_file() -> int:
    """Create an anonymous file for appending, in memory if supported; return its descriptor.

    Raises:
        OSError: it can't be created.
    """
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("trainbus")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    if fcntl is not None:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)
    return fd


def _write(fd: int, parts: Sequence[bytes]) -> None:
    written, size = os.writev(fd, parts), sum(map(len, parts))
    if written == size:
        return
    rest = memoryview(b"".join(parts))[written:]
    while rest:
        rest = rest[os.write(fd, rest) :]


def _read(fd: int, at: int, size: int) -> bytes:
    parts = []
    while size > 0 and (part := os.pread(fd, size, at)):
        parts.append(part)
        at, size = at + len(part), size - len(part)
    return b"".join(parts)


def _free(fd: int, start: int, end: int) -> None:
    """Free the memory of messages that have been read, if the system supports it."""
    remove = getattr(mmap, "MADV_REMOVE", None)
    start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (end - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if remove is None or size <= 0:
        return
    with suppress(OSError, ValueError), mmap.mmap(fd, size, offset=start) as pages:
        pages.madvise(remove)
