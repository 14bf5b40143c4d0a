"""File locks: only one process writes a records file, only one process delivers to a sink."""

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
    """Lock a file until its descriptor is closed; return False if another process has locked it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def is_being_written(path: Path) -> bool:
    """Return whether a training process still holds the lock of its records file."""
    try:
        fd = os.open(path, os.O_RDONLY | NO_FOLLOW | NO_BLOCK)
    except OSError:
        return False
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode) and not try_lock(fd)
    finally:
        os.close(fd)


def open_lock(path: Path) -> int:
    """Open or create a lock file for `try_lock`, and return its descriptor.

    Raises:
        OSError: it can't be created.
    """
    make_folder(path.parent)
    return os.open(path, os.O_RDWR | os.O_CREAT | NO_FOLLOW, 0o600)
