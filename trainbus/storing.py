"""What sinks have in common: what is new, where it stands on an axis, and what it may be called."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainbus.errors import SinkError
from trainbus.events import Record
from trainbus.runfolder import write_atomically

Position = tuple[int, int]


class Taken:
    """Which records a store has: what comes again, after a crash or in a replay, is left out.

    For stores that can't be asked: the position of the last record is kept in a file beside them.
    """

    def __init__(self, path: Path | None = None, last: Position = (0, 0)) -> None:
        """Begin where the store is.

        Args:
            path: file that keeps the position; None where the store itself can be asked.
            last: attempt and seq of the last record that the store has.
        """
        self._path = path
        self.last = max(last, _read(path))

    def new(self, records: Sequence[Record]) -> Iterator[Record]:
        """Yield the records that are not in the store, each once.

        A record counts as taken when the next one is asked for: one that could not be stored comes
        again.
        """
        for record in records:
            if record.position > self.last:
                yield record
                self.last = record.position

    def save(self) -> None:
        """Keep the position, after the store has everything up to it.

        Raises:
            OSError: the file can't be written.
        """
        if self._path is not None:
            write_atomically(self._path, json.dumps(self.last).encode())


def _read(path: Path | None) -> Position:
    try:
        attempt, seq = json.loads(path.read_bytes()) if path is not None else (0, 0)
        return int(attempt), int(seq)
    except (OSError, ValueError, TypeError, OverflowError, RecursionError):
        return 0, 0


class Names:
    """Names as a tracker allows them; two that differ stay two.

    Args:
        clean: returns a name with nothing in it that the tracker refuses.
        longest: characters that it takes.
    """

    def __init__(self, clean: Callable[[str], str], longest: int = 250) -> None:
        self._clean = clean
        self._longest = longest
        self._given: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        """Return the name that the tracker gets; the same one every time, in every process."""
        if name not in self._given:
            found = self._clean(name)
            if found != name or len(found) > self._longest or not found:
                mark = hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:6]
                found = f"{found[: self._longest - 7]}_{mark}"
            self._given[name] = found
        return self._given[name]


def check_folder(path: str | Path) -> str:
    """Return a folder as text, after making sure that files can be written there or below it.

    Raises:
        SinkError: they can't.
    """
    wanted = Path(str(path).partition("{run}")[0] or ".").expanduser().absolute()
    existing = next(p for p in (wanted, *wanted.parents) if p.exists())
    try:
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryFile(dir=existing):
            return f"{wanted} can be written"
    except OSError as error:
        text = f"can't write below {existing}: {error.strerror}; set another folder"
        raise SinkError(text) from error


def axis(event: Any) -> int:
    """Return where an event stands for trackers with one axis: its step, else epochs done."""
    if event.step is not None:
        return int(event.step)
    return 0 if event.epoch is None else int(event.epoch) + 1


def metric_name(name: str, *, final: bool) -> str:
    """Return a metric's name; what was measured of the chosen weights at the end is set apart."""
    return f"final/{name}" if final else name


def flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested parameters with dotted names: `{"a": {"b": 1}}` as `{"a.b": 1}`."""
    found: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
