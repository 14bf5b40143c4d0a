"""A CSV file whose rows have keys: what is put under a key again replaces what was there.

Guarantees: rows keep the order in which their keys came; a later column leaves them as they are.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from trainbus.errors import SinkError


class Table:
    """The rows of a file, each with a key; only the last rows are written anew, as a rule."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        """Read the file, if it is there.

        Args:
            path: the file.
            columns: its first columns; what comes before `time` tells its rows apart.

        Raises:
            SinkError: the file holds something else.
        """
        self._path = path
        self._columns: dict[str, int] = {}
        self._rows: list[list[str]] = []
        self._places: dict[tuple[str, ...], int] = {}
        self._kept = self._size = 0
        """Rows of the file that stay as they are, and its bytes up to there."""
        self._is_changed = False
        lines = _lines(path)
        for name in lines[0] if lines else columns:
            self._columns[name] = len(self._columns)
        if tuple(self._columns)[: len(columns)] != tuple(columns):
            raise SinkError(f"expected the columns {columns} in {path}; move the file away")
        for cells in lines[1:]:
            row = dict(zip(self._columns, cells, strict=False))
            self.put(self._key(row, columns), row)
        self._is_changed = False

    @staticmethod
    def _key(row: Mapping[str, str], columns: Sequence[str]) -> tuple[str, ...]:
        """Return the key of a row that was read, as `put` had it."""
        get = row.get
        match columns:
            case ("phase", *_):
                return get("phase", ""), get("epoch", "")
            case ("epoch", *_):
                return get("epoch", ""), "" if get("epoch") else get("time", "")
        return (get(columns[0], ""),)

    def get(self, key: str) -> str | None:
        """Return the value under a name."""
        return self._rows[self._places[key,]][1] if (key,) in self._places else None

    def names(self) -> list[str]:
        """Return the first parts of the keys."""
        return [key[0] for key in self._places]

    def put(self, key: tuple[str, ...], cells: Mapping[str, str]) -> None:
        """Put cells into the row of a key; those that it has besides stay."""
        place = self._places.setdefault(key, len(self._rows))
        if place == len(self._rows):
            self._rows.append([])
        for name in cells:
            if name not in self._columns:
                self._columns[name] = len(self._columns)
                self._kept = 0
        row = self._rows[place]
        row += [""] * (len(self._columns) - len(row))
        for name, cell in cells.items():
            row[self._columns[name]] = cell
        if place < self._kept:
            self._kept = 0
        self._is_changed = True

    def save(self) -> None:
        """Write what changed: behind the rows that stay, or else the whole file at once.

        Raises:
            OSError: the disk is full or gone.
        """
        if not self._is_changed:
            return
        width = len(self._columns)
        rows = [row + [""] * (width - len(row)) for row in self._rows[self._kept :]]
        if self._kept and self._path.exists():
            data = encoded(rows)
            with self._path.open("r+b") as file:
                file.seek(self._size)
                file.write(data)
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
            end = self._size + len(data)
        else:
            data = encoded([list(self._columns), *rows])
            replace(self._path, data)
            end = len(data)
        # The last row may get more cells, such as those of the same epoch.
        self._kept = len(self._rows) - 1
        self._size = end - len(encoded(rows[-1:]))
        self._is_changed = False


def encoded(lines: Sequence[Sequence[str]]) -> bytes:
    """Return lines as CSV in UTF-8, cells quoted where that is needed."""
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue().encode()


def _lines(path: Path) -> list[list[str]]:
    """Return the lines of a file, without one that a crash cut short."""
    if not path.exists():
        return []
    try:
        data = path.read_bytes()
        text = data[: data.rfind(b"\n") + 1].decode()
        return list(csv.reader(io.StringIO(text, newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise SinkError(f"found no CSV in {path}: {error}; move the file away") from error


def replace(path: Path, data: bytes) -> None:
    """Put a file in the place of the one that is there, whole or not at all.

    Raises:
        OSError: it can't be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
