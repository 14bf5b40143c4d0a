"""Locks of files: one process writes a records file, one process delivers to a sink."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from trainbus.journal.directory import NO_BLOCK, NO_FOLLOW, make_folder

try:
    import fcntl
except ImportError:  # not on Windows, where a second writer is not noticed
    fcntl = None  # type: ignore[assignment]


def try_lock(fd: int) -> bool:
    """Return whether this process has the file to itself now, until the descriptor is closed."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a filesystem without locks
        return True
    return True


def is_being_written(path: Path) -> bool:
    """Return whether a training process still has its records file open."""
    try:
        fd = os.open(path, os.O_RDONLY | NO_FOLLOW | NO_BLOCK)
    except OSError:
        return False
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode) and not try_lock(fd)
    finally:
        os.close(fd)


def open_lock(path: Path) -> int:
    """Return a descriptor of a lock file, for `try_lock`.

    Raises:
        OSError: it can't be created.
    """
    make_folder(path.parent)
    return os.open(path, os.O_RDWR | os.O_CREAT | NO_FOLLOW, 0o600)
