"""Locks of files: one process writes a records file, one process delivers to a sink."""

from __future__ import annotations

import errno
import importlib
import os
import stat
from pathlib import Path
from typing import Any

from trainbus.journal.directory import BINARY, NO_BLOCK, NO_FOLLOW, make_folder

_LOCKED_BYTE = 2**40
"""The byte that is locked on Windows: nobody else can read a locked byte, so it lies beyond all."""


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


# POSIX has one of them, Windows the other.
_fcntl, _msvcrt = _module("fcntl"), _module("msvcrt")


def try_lock(fd: int) -> bool:
    """Return whether this process has the file to itself now, until the descriptor is closed.

    Where neither the system nor the filesystem has locks, it always has.
    """
    if _fcntl is not None:
        try:
            _fcntl.flock(fd, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
        except OSError as error:
            return not isinstance(error, BlockingIOError)
    elif _msvcrt is not None:
        position = os.lseek(fd, 0, os.SEEK_CUR)
        os.lseek(fd, _LOCKED_BYTE, os.SEEK_SET)
        try:
            _msvcrt.locking(fd, _msvcrt.LK_NBLCK, 1)
        except OSError as error:
            return error.errno not in (errno.EACCES, errno.EDEADLK)
        finally:
            os.lseek(fd, position, os.SEEK_SET)
    return True


def is_being_written(path: Path) -> bool:
    """Return whether a process still has a records file open for writing."""
    try:
        fd = os.open(path, os.O_RDONLY | NO_FOLLOW | NO_BLOCK | BINARY)
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
    return os.open(path, os.O_RDWR | os.O_CREAT | NO_FOLLOW | BINARY, 0o600)
