"""Counts the records of the streams of an attempt, for those who did not write them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from trainbus.journal.directory import RunFolder, open_within
from trainbus.journal.encoding import LONGEST_LINE, unseal
from trainbus.journal.recovery import read_tail


class Lines(NamedTuple):
    """Numbers of complete lines of a records file."""

    sound: int
    damaged: int


def count_lines(folder: RunFolder, path: Path) -> Lines:
    """Count the complete lines of a records file by their checksums, without decoding them.

    Raises:
        JournalError: the file is a link, or not a regular file.
    """
    try:
        fd = open_within(folder.path, path)
    except OSError:
        return Lines(0, 0)
    total = sound = 0
    with os.fdopen(fd, "rb") as file:
        while line := file.readline(LONGEST_LINE):
            is_complete = line.endswith(b"\n")
            total += is_complete
            sound += is_complete and unseal(line[:-1]) is not None
    return Lines(sound, total - sound)


def count_streams(folder: RunFolder, attempt: int) -> int:
    """Return how many records the streams of an attempt have, besides the main stream.

    Raises:
        JournalError: a file is a link, or not a regular file.
    """
    return sum(count_lines(folder, path).sound for path in _paths(folder, attempt))


def count_dropped(folder: RunFolder, attempt: int) -> int:
    """Return how many records the writers of the streams of an attempt dropped: the gaps in seq.

    Raises:
        JournalError: a file is a link, or not a regular file.
    """
    dropped = 0
    for path in _paths(folder, attempt):
        tail = read_tail(folder, path)
        if tail.last is not None:
            written = sum(count_lines(folder, path))
            dropped += max(tail.last.seq + tail.damaged - written, 0)
    return dropped


def _paths(folder: RunFolder, attempt: int) -> list[Path]:
    return [folder.records(attempt, s.rank, s.name) for s in folder.streams(attempt)]
