"""Writes `worker.log`: the output of the delivery process, and how that process died.

Guarantees: printing never fails because the disk is full, and no log grows beyond about 2 MiB: its
beginning and its end are kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from trainbus.delivery.sidecar_protocol import Marks

_HEAD, _TAIL = 2**19, 2**19
_NEWEST = 2**20
_MOST = 2**26
_OMITTED = b"\n[trainbus: output omitted]\n"
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


class Output:
    """The output of a process: it is written to a file in memory, and copied to the logs.

    Args:
        fd: descriptor of the file in memory.
        marks: stores how much of the output was saved.
    """

    def __init__(self, fd: int, marks: Marks) -> None:
        self.fd = fd
        self._marks = marks

    def close(self) -> None:
        """Close the file."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def save(self, logs: Iterable[Path]) -> None:
        """Append the output since the last call to the logs."""
        at, size = self._marks.saved, os.fstat(self.fd).st_size
        if size <= at:
            if size > _NEWEST:  # nothing was printed since the last call
                self._empty()
            return
        if size - at <= _HEAD + _NEWEST:
            data = os.pread(self.fd, size - at, at)
        else:  # more output at once than a log keeps
            newest = os.pread(self.fd, _NEWEST, size - _NEWEST)
            data = os.pread(self.fd, _HEAD, at) + _OMITTED + newest
        for log in logs:
            append(log, data)
        self._marks.saved = size
        if size > _MOST:
            self._empty()

    def _empty(self) -> None:
        """Empty the file; output printed at this moment is lost, so a pause is waited for."""
        os.ftruncate(self.fd, 0)
        self._marks.saved = 0


def append(log: Path, data: bytes) -> None:
    """Append to a log; if it becomes too long, its middle is removed."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | _NO_FOLLOW
    with suppress(OSError):
        fd = os.open(log, flags, 0o600)
        try:
            os.write(fd, data)
            size = os.fstat(fd).st_size
            if size > _HEAD + 2 * _TAIL:
                tail = os.pread(fd, _TAIL, size - _TAIL)
                os.ftruncate(fd, _HEAD)
                os.write(fd, _OMITTED + tail[tail.find(b"\n") + 1 :])
        finally:
            os.close(fd)
