"""The directory of one run: where its records, blobs, cursors, dead letters and receipt lie.

    trainbus-runs/<run id>/
      r0-a1.jsonl             records of rank 0, attempt 1; written by the training process alone
      r0-a1-end.jsonl         the end of an attempt that could not write its own
      blobs/<sha256>/<name>   pictures, arrays and files, as they were when they were logged
      cursors/  dead/         how far each sink is, and what it refused
      receipt.json  worker.log

Guarantees: directories are 0700 and files 0600; no name that is read from a journal leaves the
directory, and no link in it is followed.
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

from trainbus.errors import JournalError

try:
    import fcntl
except ImportError:  # not on Windows, where a second writer is not noticed
    fcntl = None  # type: ignore[assignment]


_RUN_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_RECORDS = re.compile(r"r(0|[1-9][0-9]{0,5})-a([1-9][0-9]{0,5})\.jsonl")


class RunFolder:
    """The directory of one run; its name is the run's id."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.blobs = self.path / "blobs"
        self.receipt = self.path / "receipt.json"
        self.log = self.path / "worker.log"

    @property
    def run(self) -> str:
        """Id of the run."""
        return self.path.name

    @classmethod
    def create(cls, parents: Sequence[str | os.PathLike[str]], run: str) -> RunFolder:
        """Return the run's directory below the first of `parents` that can be written.

        Raises:
            JournalError: none of them can.
        """
        faults = []
        for parent in parents:
            try:
                # Neither the home of a user nor the working directory has to be there.
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
        """Return the directory of a run that is there.

        Raises:
            JournalError: there is none, or it holds no journal.
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

    def records(self, attempt: int, rank: int = 0) -> Path:
        """Return the path of an attempt's records."""
        return self.path / f"r{rank}-a{attempt}.jsonl"

    def end(self, attempt: int, rank: int = 0) -> Path:
        """Return the path of the end that was written in an attempt's place."""
        return self.path / f"r{rank}-a{attempt}-end.jsonl"

    def cursor(self, sink: str) -> Path:
        """Return the path of a sink's cursor."""
        return self.path / "cursors" / f"{sink}.json"

    def dead(self, sink: str) -> Path:
        """Return the path of what a sink refused."""
        return self.path / "dead" / f"{sink}.jsonl"

    def attempts(self, rank: int | None = 0) -> list[int]:
        """Return the numbers of the attempts that have records, of one rank or of any."""
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

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.path)
        except OSError:
            return []


def spare_folder() -> Path:
    """Return the user's private folder for journals below the system's temporary one.

    Where something else has its name, such as a folder of another user, a fresh one is made.

    Raises:
        OSError: there is no temporary folder that can be written.
    """
    path = _spare_path()
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    return path if _is_private(path) else Path(tempfile.mkdtemp(prefix="trainbus-runs-"))


def existing_spare_folder() -> Path | None:
    """Return the user's private folder for journals if there is one."""
    try:
        path = _spare_path()
    except OSError:
        return None
    return path if _is_private(path) else None


def _spare_path() -> Path:
    # A user need not have a name: containers run under any uid.
    uid = os.getuid() if hasattr(os, "getuid") else 0
    return Path(tempfile.gettempdir()) / f"trainbus-runs-{uid}"


def _is_private(path: Path) -> bool:
    """Return whether a path is a folder that this user owns and nobody else can write."""
    try:
        found = path.lstat()
    except OSError:
        return False
    if not hasattr(os, "getuid"):  # on Windows temporary folders are each user's own
        return stat.S_ISDIR(found.st_mode)
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return is_own and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def is_run_id(text: str) -> bool:
    """Return whether a text can name a run: letters, digits and `_ - .`, at most 128."""
    return _RUN_ID.fullmatch(text) is not None


def run_id(text: str) -> str:
    """Return a text as one that can name a run."""
    kept = re.sub(r"[^A-Za-z0-9._-]+", "_", text).lstrip(".")[:128]
    return kept or "run"


def open_within(root: Path, path: Path) -> int:
    """Return a descriptor of a plain file below `root`, for reading.

    Raises:
        JournalError: the path leaves the directory, or is a link or no plain file.
        OSError: it can't be opened.
    """
    try:
        is_inside = path.parent.resolve().is_relative_to(root.resolve())
    except RuntimeError:  # a link that leads to itself
        is_inside = False
    if not is_inside:
        raise JournalError(f"refused {path}: it leads out of {root}")
    try:
        fd = os.open(path, os.O_RDONLY | NO_FOLLOW | NO_BLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise JournalError(f"refused {path}: it is a link") from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise JournalError(f"refused {path}: it is no plain file")
    return fd


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, even after a power cut.

    Raises:
        OSError: it can't be written.
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
    """Create a folder in a run's directory; a link is refused, it may lead out of it.

    Raises:
        OSError: it is a link, or can't be created.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def open_private(path: Path) -> int:
    """Return a descriptor for appending to a file that only the user may read, and no link.

    Raises:
        OSError: it can't be opened.
    """
    make_folder(path.parent)
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_FOLLOW, 0o600)


NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
NO_BLOCK = getattr(os, "O_NONBLOCK", 0)
