"""What the training process and a sidecar say to each other, and through what.

Messages go through files without a name that lie in memory: writing one never blocks, however much
it carries and whatever the other process does, a process that dies leaves what it said to be read,
and neither a full disk nor a stopped reader stands in the way.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import msgspec

from trainbus.delivery.receipt import SinkReport
from trainbus.delivery.transforms import TransformSpec

try:
    import fcntl
except ImportError:  # not on Windows, where sinks run in threads
    fcntl = None  # type: ignore[assignment]


_HEAD = 32
_PARTS = 1000
"""Parts of one `writev`; systems allow 1024."""
_BIG = 2**20
_MARKS = 2**16
_FIRST_SLOT = 8


class Hello(msgspec.Struct, kw_only=True, tag="hello"):
    """To the sidecar, first: which process it works for."""

    pid: int
    argv: list[str]
    main: str | None = None


class SinkTask(msgspec.Struct, kw_only=True):
    """One sink of a run: the type that it is registered under, its options, what is done before."""

    name: str
    type: str
    options: dict[str, Any]
    transforms: TransformSpec
    slot: int | None = None
    """Where its calls are marked; None for a sink that this process does not deliver to."""
    base: str | None = None
    """Folder for what it writes where no option says so."""
    error: str | None = None
    """Why no process delivers to it."""


class ReplayTask(msgspec.Struct, kw_only=True):
    """What is different for a run that is sent again."""

    after: tuple[int, int] | None = None
    trusted: list[str] = []


class OpenRun(msgspec.Struct, kw_only=True, tag="open"):
    """To the sidecar: deliver this run."""

    run: int
    folder: str
    attempt: int
    sinks: list[SinkTask]
    flush_secs: float
    variables: dict[str, str | None]
    """What has changed in the training's environment; None for what is gone."""
    replay: ReplayTask | None = None


class FinishRun(msgspec.Struct, kw_only=True, tag="finish"):
    """To the sidecar: no more records come, but for the lines that go with this message."""

    run: int
    emitted: int


class StopRun(msgspec.Struct, kw_only=True, tag="stop"):
    """To the sidecar: time is up; report within `secs`."""

    run: int
    secs: float


class SinkOpened(msgspec.Struct, kw_only=True, tag="opened"):
    """To the training: a sink is open, or `error` says why not."""

    run: int
    sink: str
    error: str | None = None


class LogWarning(msgspec.Struct, kw_only=True, tag="warning"):
    """To the training: a warning for the user."""

    text: str


class RunProgress(msgspec.Struct, kw_only=True, tag="progress"):
    """To the training: how many records of a replay a sink is done with."""

    run: int
    sink: str
    count: int


class RunDone(msgspec.Struct, kw_only=True, tag="done"):
    """To the training: what each sink got of a run that this process has closed."""

    run: int
    reports: list[SinkReport]
    emitted: int
    is_hung: bool = False
    """Whether a call of a sink has not come back, so that this process is of no more use."""
    damaged: list[str] = []
    refused: list[str] = []
    changed: list[str] = []


ToSidecar: TypeAlias = Hello | OpenRun | FinishRun | StopRun
ToTraining: TypeAlias = SinkOpened | LogWarning | RunProgress | RunDone

T = TypeVar("T")


class Received(NamedTuple, Generic[T]):
    """A message, and the lines of a journal that go with it."""

    message: T
    lines: list[bytes]


class Mailbox(Generic[T]):
    """Messages in one direction, from one process to one other.

    Args:
        kind: type of the messages.
        fd: descriptor of the file, in the process that did not make it.
    """

    def __init__(self, kind: Any, fd: int | None = None) -> None:
        self.fd = anonymous_file() if fd is None else fd
        self._kind = kind
        self._at = 0
        self._is_writing = False

    def put(self, message: T, lines: Sequence[bytes] = ()) -> bool:
        """Write a message; False if there is no memory for it."""
        if self._is_writing:  # a signal came while another message was written
            return False
        # The json module writes infinite numbers as such, and msgspec makes them null.
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

    def take(self) -> list[Received[T]]:
        """Return the messages that have come."""
        found: list[Received[T]] = []
        at = self._at
        while len(head := os.pread(self.fd, _HEAD, at)) == _HEAD:
            size, more = int(head[:16], 16), int(head[16:], 16)
            if os.fstat(self.fd).st_size < at + _HEAD + size + more:
                break  # it is being written
            body = _read(self.fd, at + _HEAD, size)
            lines = _read(self.fd, at + _HEAD + size, more).splitlines(keepends=True)
            message: T = msgspec.convert(json.loads(body), self._kind)
            found.append(Received(message, lines))
            if more > _BIG:
                _free(self.fd, at, at + _HEAD + size + more)
            at += _HEAD + size + more
        # A signal handler may have read further meanwhile.
        self._at = max(self._at, at)
        return found

    def close(self) -> None:
        """Close the file."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Marks:
    """What a sidecar is doing, in memory that is still there when it has died.

    Args:
        fd: descriptor of the file, in the process that did not make it.
    """

    def __init__(self, fd: int | None = None) -> None:
        self.fd = anonymous_file() if fd is None else fd
        if fd is None:
            os.ftruncate(self.fd, _MARKS)
        self._map = mmap.mmap(self.fd, _MARKS)

    @property
    def saved(self) -> int:
        """How much of what the process printed is in the logs, in bytes."""
        return int.from_bytes(self._map[:_FIRST_SLOT], "little")

    @saved.setter
    def saved(self, size: int) -> None:
        self._map[:_FIRST_SLOT] = size.to_bytes(_FIRST_SLOT, "little")

    def mark(self, slot: int, lane: int, is_called: bool) -> None:
        """Note that a sink is being called, in one of its two lanes, or no more."""
        self._map[_FIRST_SLOT + 2 * slot + lane] = is_called

    def is_called(self, slot: int) -> bool:
        """Return whether a call of the sink has begun and not come back."""
        at = _FIRST_SLOT + 2 * slot
        return any(self._map[at : at + 2])

    def close(self) -> None:
        """Let go of the memory."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self._map.close()
            os.close(fd)


def anonymous_file() -> int:
    """Return a descriptor of a file without a name, in memory where there is such a thing.

    What is written to it is appended.

    Raises:
        OSError: it can't be made.
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
    """Give the memory of what was read back, as far as the system can."""
    remove = getattr(mmap, "MADV_REMOVE", None)
    start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (end - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if remove is None or size <= 0:
        return
    with suppress(OSError, ValueError), mmap.mmap(fd, size, offset=start) as pages:
        pages.madvise(remove)
