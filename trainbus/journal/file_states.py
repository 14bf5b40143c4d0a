"""Detects files that have changed since they were logged, by size and modification time.

Copies in the journal have a digest; for all other files the journal stores this state instead.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from itertools import islice
from typing import Literal, TypeAlias

import msgspec

MAX_STATES = 1000
"""Files per event whose state is stored; further ones are not checked."""

Change: TypeAlias = Literal["gone", "changed"]


class FileState(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a file when it was logged; `mtime_ns` is nanoseconds since the Unix epoch."""

    path: str
    size: int
    mtime_ns: int

    def __str__(self) -> str:
        return f"{self.size} bytes, written at {_time(self.mtime_ns)}"


def states_of(paths: Iterable[str]) -> list[FileState]:
    """Return the state of each file, and of each file in a folder."""
    files = (file for path in paths for file in _files(path))
    found = (_state(file) for file in islice(files, MAX_STATES))
    return [state for state in found if state is not None]


def change_of(path: str, states: Sequence[FileState]) -> tuple[Change, str] | None:
    """Return how a file, or a file in a folder, differs from its stored state; None if unchanged.

    A path without a stored state counts as unchanged, and so does a folder with additional files.

    Returns:
        The kind of change, and a text with what was expected and found.
    """
    below = os.path.join(path, "")
    for expected in states:
        if expected.path != path and not _is_below(expected.path, below):
            continue
        found = _state(expected.path)
        if found is None:
            return "gone", f"{expected.path}: expected {expected}, found no file"
        if found != expected:
            return "changed", f"{expected.path}: expected {expected}, found {found}"
    return None


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder) and ".." not in path.removeprefix(folder).split(os.sep)


def _files(path: str) -> Iterator[str]:
    if not os.path.isdir(path):
        yield path
        return
    for folder, _, names in os.walk(path):
        for name in names:
            yield os.path.join(folder, name)


def _state(path: str) -> FileState | None:
    try:
        path.encode()  # JSON can't store a name that is not valid UTF-8
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return FileState(path=path, size=found.st_size, mtime_ns=found.st_mtime_ns)


def _time(ns: int) -> str:
    try:
        second = datetime.fromtimestamp(ns // 10**9, tz=timezone.utc)
    except (OverflowError, ValueError, OSError):
        return f"{ns} ns after 1970"
    return f"{second:%Y-%m-%d %H:%M:%S}.{ns % 10**9:09d} UTC"
