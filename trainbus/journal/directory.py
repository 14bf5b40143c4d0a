"""The directory of one run, with its records, blobs, cursors, dead letters and receipt.

    trainbus-runs/<run id>/
      r0-a1.jsonl             records of rank 0, attempt 1; only the training process writes it
      console-r0-a1.jsonl     records of the stream `console`; only its own producer writes it
      r0-a1-end.jsonl         the end of an attempt that was killed before it could write one
      blobs/<sha256>/<name>   images, arrays and files, as they were when they were logged
      cursors/  dead/         the position of each sink, and the records it rejected
      receipt.json  worker.log

Guarantees: directories have mode 0700 and files 0600; no name in a journal leads out of the
directory, and no symbolic link in it is followed.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from trainbus.errors import JournalError
from trainbus.events import stream_source

_RUN_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_RECORDS = re.compile(r"r(0|[1-9][0-9]{0,5})-a([1-9][0-9]{0,5})\.jsonl")
_STREAM = re.compile(r"[a-z]{1,32}")
_STREAM_RECORDS = re.compile(rf"({_STREAM.pattern})-{_RECORDS.pattern}")


class Stream(NamedTuple):
    """One stream of an attempt, besides the main stream."""

    name: str
    rank: int = 0

    @property
    def source(self) -> str:
        """The `source` of its records, such as `console-r0`."""
        return stream_source(self.name, self.rank)


class RunFolder:
    """The directory of one run; its name is the run id."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.blobs = self.path / "blobs"
        self.receipt = self.path / "receipt.json"
        self.log = self.path / "worker.log"

    @property
    def run(self) -> str:
        """The run id."""
        return self.path.name

    @classmethod
    def create(cls, parents: Sequence[str | os.PathLike[str]], run: str) -> RunFolder:
        """Create the run's directory in the first writable one of `parents`.

        Raises:
            JournalError: none of them is writable.
        """
        faults = []
        for parent in parents:
            try:
                # The home folder or the working directory may not exist.
                folder = cls(Path(parent).expanduser() / run)
                folder.path.parent.mkdir(parents=True, exist_ok=True)
                folder.path.mkdir(mode=0o700, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder.path):
                    return folder
            except (OSError, RuntimeError, ValueError) as error:
                faults.append(f"{os.fspath(parent)}: {getattr(error, 'strerror', None) or error}")
        raise JournalError(f"no directory for the journal can be written ({'; '.join(faults)})")

    @classmethod
    def existing(cls, path: str | os.PathLike[str]) -> RunFolder:
        """Return the directory of an existing run.

        Raises:
            JournalError: the directory does not exist, or has no journal.
        """
        folder = cls(path)
        if not folder.path.is_dir():
            raise JournalError(f"expected the directory of a run, found none at {path}")
        if not folder.attempts():
            inside = [p.name for p in folder.path.iterdir() if p.is_dir() and cls(p).attempts()]
            hint = f"; runs in it: {', '.join(sorted(inside)[:5])}" if inside else ""
            raise JournalError(
                f"expected the directory of a run, found no r0-a1.jsonl in {path}{hint}"
            )
        return folder

    def records(self, attempt: int, rank: int = 0, stream: str = "") -> Path:
        """Return the path of an attempt's records: of the main stream, or of another one.

        Raises:
            ValueError: `stream` is not one to 32 lower-case letters.
        """
        if not stream:
            return self.path / f"r{rank}-a{attempt}.jsonl"
        if not _STREAM.fullmatch(stream):
            raise ValueError(f"expected 1 to 32 lower-case letters as a stream, found {stream!r}")
        return self.path / f"{stream_source(stream, rank)}-a{attempt}.jsonl"

    def end(self, attempt: int, rank: int = 0) -> Path:
        """Return the path of the end that another process wrote for a killed attempt."""
        return self.path / f"r{rank}-a{attempt}-end.jsonl"

    def cursor(self, sink: str) -> Path:
        """Return the path of a sink's cursor."""
        return self.path / "cursors" / f"{sink}.json"

    def dead(self, sink: str) -> Path:
        """Return the path of the records that a sink rejected."""
        return self.path / "dead" / f"{sink}.jsonl"

    def attempts(self, rank: int | None = 0) -> list[int]:
        """Return the numbers of the attempts that have records, of one rank or (None) of any."""
        found = {
            int(match[2])
            for match in map(_RECORDS.fullmatch, self._names())
            if match and rank in (None, int(match[1]))
        }
        return sorted(found)

    def ranks(self, attempt: int) -> list[int]:
        """Return the ranks that have records of an attempt."""
        matches = map(_RECORDS.fullmatch, self._names())
        return sorted(int(m[1]) for m in matches if m and int(m[2]) == attempt)

    def streams(self, attempt: int) -> list[Stream]:
        """Return the streams of an attempt, without the main stream."""
        matches = map(_STREAM_RECORDS.fullmatch, self._names())
        return sorted(Stream(m[1], int(m[2])) for m in matches if m and int(m[3]) == attempt)

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.path)
        except OSError:
            return []


def spare_folder() -> Path:
    """Return the user's private folder for journals in the system's temporary folder.

    If its name is taken, for example by another user, a new folder is created.

    Raises:
        OSError: no temporary folder is writable.
    """
    path = _spare_path()
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    return path if _is_private(path) else Path(tempfile.mkdtemp(prefix="trainbus-runs-"))


def existing_spare_folder() -> Path | None:
    """Return the user's private folder for journals, None if it does not exist."""
    try:
        path = _spare_path()
    except OSError:
        return None
    return path if _is_private(path) else None


def _spare_path() -> Path:
    # The uid may have no user name, as in containers.
    uid = os.getuid() if hasattr(os, "getuid") else 0
    return Path(tempfile.gettempdir()) / f"trainbus-runs-{uid}"


def _is_private(path: Path) -> bool:
    """Return whether a path is a folder that this user owns and only this user can write."""
    try:
        found = path.lstat()
    except OSError:
        return False
    if not hasattr(os, "getuid"):  # on Windows each user has a temporary folder
        return stat.S_ISDIR(found.st_mode)
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return is_own and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def stream_of(path: Path) -> tuple[Stream, int] | None:
    """Return the stream and the attempt of a records file, None for one of the main stream."""
    match = _STREAM_RECORDS.fullmatch(path.name)
    return (Stream(match[1], int(match[2])), int(match[3])) if match else None


def is_run_id(text: str) -> bool:
    """Return whether a string is a valid run id: letters, digits and `_ - .`, at most 128."""
    return _RUN_ID.fullmatch(text) is not None


def run_id(text: str) -> str:
    """Return a string as a valid run id."""
    kept = re.sub(r"[^A-Za-z0-9._-]+", "_", text).lstrip(".")[:128]
    return kept or "run"


def open_within(root: Path, path: Path) -> int:
    """Open a regular file below `root` for reading, and return its descriptor.

    Raises:
        JournalError: the path leads out of the directory, or is a link or not a regular file.
        OSError: the file can't be opened.
    """
    try:
        is_inside = path.parent.resolve().is_relative_to(root.resolve())
    except RuntimeError:  # a loop of symbolic links
        is_inside = False
    if not is_inside:
        raise JournalError(f"rejected {path}: it leads out of {root}")
    try:
        fd = os.open(path, os.O_RDONLY | NO_FOLLOW | NO_BLOCK | BINARY)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise JournalError(f"rejected {path}: it is a link") from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise JournalError(f"rejected {path}: it is not a regular file")
    return fd


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file completely or not at all, even if power is lost.

    Raises:
        OSError: the file can't be written.
    """
    path.parent.mkdir(mode=0o700, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def make_folder(path: Path) -> None:
    """Create a folder in a run's directory; a link is rejected, as it may lead out of it.

    Raises:
        OSError: the path is a link, or can't be created.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def open_private(path: Path) -> int:
    """Open a file for appending that only this user can read, and return its descriptor.

    Raises:
        OSError: the path is a link, or can't be opened.
    """
    make_folder(path.parent)
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_FOLLOW | BINARY, 0o600)


def read_at(fd: int, size: int, offset: int) -> bytes:
    """Return up to `size` bytes of a file from an offset; it may move the descriptor's position.

    Raises:
        OSError: the file can't be read.
    """
    if hasattr(os, "pread"):
        return os.pread(fd, size, offset)
    os.lseek(fd, offset, os.SEEK_SET)
    return os.read(fd, size)


def sync_data(fd: int) -> None:
    """Have the operating system write a file to the disk, against power loss.

    Raises:
        OSError: the disk can't be written.
    """
    getattr(os, "fdatasync", os.fsync)(fd)


NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
NO_BLOCK = getattr(os, "O_NONBLOCK", 0)
BINARY = getattr(os, "O_BINARY", 0)
"""Flags of `os.open`; 0 on systems that do not have them."""
