"""`worker.log`: what the sinks of a run print in the process that delivers, and how that died.

Guarantees: printing never fails for want of disk space, and no log takes more than some 2 MiB,
whatever is printed: its beginning and its end are kept.
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
_LEFT_OUT = b"\n[trainbus: output is left out here]\n"
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


class Output:
    """What a process prints: it goes to a file in memory, and from there to the logs.

    Args:
        fd: the file in memory.
        marks: where it is noted how much of it was saved.
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
        """Append what was printed since the last time to the logs."""
        at, size = self._marks.saved, os.fstat(self.fd).st_size
        if size <= at:
            return
        if size - at <= _HEAD + _NEWEST:
            data = os.pread(self.fd, size - at, at)
        else:  # more than the logs keep was printed at once
            newest = os.pread(self.fd, _NEWEST, size - _NEWEST)
            data = os.pread(self.fd, _HEAD, at) + _LEFT_OUT + newest
        for log in logs:
            append(log, data)
        # What is printed meanwhile would be lost; so a pause is waited for, up to a point.
        is_quiet = os.fstat(self.fd).st_size == size
        if size > _NEWEST and (is_quiet or size > _MOST):
            os.ftruncate(self.fd, 0)
            size = 0
        self._marks.saved = size


def append(log: Path, data: bytes) -> None:
    """Append to a log; where it gets too long its middle is left out."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | _NO_FOLLOW
    with suppress(OSError):
        fd = os.open(log, flags, 0o600)
        try:
            os.write(fd, data)
            size = os.fstat(fd).st_size
            if size > _HEAD + 2 * _TAIL:
                tail = os.pread(fd, _TAIL, size - _TAIL)
                os.ftruncate(fd, _HEAD)
                os.write(fd, _LEFT_OUT + tail[tail.find(b"\n") + 1 :])
        finally:
            os.close(fd)
