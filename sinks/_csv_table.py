"""A CSV file whose rows have keys: what is put under a key again replaces what was there.

Guarantees: rows keep the order in which their keys came; a later column leaves them as they are; a
row that was saved survives a kill at any moment; however long the file is, only its last rows are
in memory.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from trainbus.errors import SinkError

Key = tuple[str, ...]

_MAX_ROWS = 2_000
_MAX_CELLS = 100_000
"""Rows and cells of a file that stay in memory."""

_COST = 20.0
"""The file is not copied for longer than a twentieth of the time while it is written."""

_CHUNK = 1_000


class _Row:
    """A row in memory; `at` is its place in the file in bytes, None if it is not there yet."""

    __slots__ = ("at", "cells")

    def __init__(self, cells: list[str], at: int | None) -> None:
        self.cells, self.at = cells, at


class Table:
    """The rows of a file, each with a key.

    The last rows are in memory and are written in place. A change of an earlier row is kept in a
    file beside until the whole file is copied, which puts all such changes in their places.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        """Read the file, if it is there.

        Args:
            path: the file.
            columns: its first columns; what comes before `time` tells its rows apart. Without
                `time` the rows have names, of which there are few: all of them are in memory.

        Raises:
            SinkError: the file holds something else.
        """
        self._path = path
        self._first = tuple(columns)
        self._columns: dict[str, int] = {}
        self._rows: dict[Key, _Row] = {}
        self._highest: dict[str, float] = {}
        """The highest number of each kind of row; a row with a higher one is new."""
        self._size = self._clean = 0
        """Bytes of the file, and how many of them stay as they are."""
        self._has_earlier = False
        """Whether the file has rows that are not in memory."""
        self._must_copy = self._is_changed = False
        self._copied, self._cost = -math.inf, 0.0
        self._changes = _Changes(path.with_name(changes_of(path.name)))
        self._read()
        self._is_changed = False
        for key, cells in self._changes.read():
            self._must_copy = True
            self.put(key, cells)

    def _read(self) -> None:
        names: Sequence[str] = self._first
        for number, (cells, begin, end) in enumerate(_lines(self._path)):
            self._size = self._clean = end
            if not number:
                names = cells
                self._add_columns(names)
                continue
            key = self._key(cells)
            if key in self._rows:  # the file was edited
                self._must_copy = True
                self.put(key, dict(zip(self._columns, cells, strict=False)))
            else:
                self._is_new(key)
                self._rows[key] = _Row(cells, begin)
            if len(self._rows) >= 2 * _MAX_ROWS:
                self._forget()
        self._add_columns(names)
        if tuple(self._columns)[: len(self._first)] != self._first:
            text = f"expected the columns {self._first} in {self._path}; move the file away"
            raise SinkError(text)
        self._forget()

    def _add_columns(self, names: Sequence[str]) -> None:
        for name in names:
            self._columns.setdefault(name, len(self._columns))

    def _key(self, cells: Sequence[str]) -> Key:
        """Return the key of a row that was read, as `put` had it."""
        row = dict(zip(self._columns, cells, strict=False))
        match self._first:
            case ("phase", *_):
                return row.get("phase", ""), row.get("epoch", "")
            case ("epoch", *_):
                return row.get("epoch", ""), "" if row.get("epoch") else row.get("time", "")
        return (row.get(self._first[0], ""),)

    def _is_new(self, key: Key) -> bool:
        """Return whether a key is higher than all of its kind that came before."""
        if "time" not in self._first:
            return True
        match self._first:
            case ("phase", *_):
                kind, text = key
            case ("epoch", *_):
                kind, text = ("epoch", key[0]) if key[0] else ("time", key[1])
            case _:
                kind, text = "step", key[0]
        try:
            number = float(text)
        except ValueError:
            number = -math.inf
        is_new = kind not in self._highest or number > self._highest[kind]
        if is_new:
            self._highest[kind] = number
        return is_new

    def get(self, key: str) -> str | None:
        """Return the value under a name."""
        return self._rows[key,].cells[1] if (key,) in self._rows else None

    def names(self) -> list[str]:
        """Return the first parts of the keys that are in memory."""
        return [key[0] for key in self._rows]

    def put(self, key: Key, cells: Mapping[str, str]) -> None:
        """Put cells into the row of a key; those that it has besides stay."""
        width = len(self._columns)
        self._add_columns([*cells])
        self._must_copy |= len(self._columns) > width
        self._is_changed = True
        row = self._rows.get(key)
        if row is None:
            is_new = self._is_new(key)
            if not is_new and self._has_earlier:
                self._changes.put(key, cells)
                return
            row = self._rows[key] = _Row([], None)
        elif row.at is not None:
            self._clean = min(self._clean, row.at)
        self._fill(row.cells, cells)

    def _fill(self, row: list[str], cells: Mapping[str, str]) -> None:
        row += [""] * (len(self._columns) - len(row))
        for name, cell in cells.items():
            row[self._columns[name]] = cell

    def save(self) -> None:
        """Write what changed: the last rows in place, or the whole file where that must be.

        Raises:
            OSError: the disk is full or gone.
        """
        if not self._is_changed:
            return
        changes = len(self._changes.rows)
        is_time = time.monotonic() - self._copied >= self._cost * _COST
        is_due = changes >= _MAX_ROWS or (changes and is_time)
        if self._must_copy or is_due or not self._path.exists():
            self._copy()
        else:
            self._changes.save()
            self._write_last()
        self._is_changed = False
        self._forget()

    def close(self) -> None:
        """Put what is kept beside the file into it.

        Raises:
            OSError: the disk is full or gone.
        """
        if self._changes.rows:
            self._copy()

    def _write_last(self) -> None:
        """Write the rows in memory that are new or changed, and those behind them."""
        changed = []
        for key, row in reversed(self._rows.items()):
            if row.at is not None and row.at < self._clean:
                break
            changed.append((key, row))
        if not changed:
            return
        changed.reverse()
        old = {
            key: dict(zip(self._columns, row.cells, strict=False))
            for key, row in changed
            if row.at is not None
        }
        if len(old) > 1:  # a kill could leave them half written
            self._changes.save(old)
        lines = self._encoded([row for _, row in changed])
        with self._path.open("r+b") as file:
            file.seek(self._clean)
            file.writelines(lines)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        self._place([row for _, row in changed], lines, self._clean)
        if len(old) > 1:
            self._changes.rewrite()

    def _copy(self) -> None:
        """Write the file anew, with all changes in their places, and all columns in each row."""
        begun = time.monotonic()
        rows = [*self._rows.values()]
        left = dict(self._changes.rows)
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(encoded([[*self._columns]]))
                earlier = self._earlier(left)
                while chunk := list(islice(earlier, _CHUNK)):
                    file.write(encoded(chunk))
                begin = file.tell()
                added = {key: _Row([], None) for key in left}
                for key, row in added.items():
                    self._fill(row.cells, left[key])
                rows += added.values()
                lines = self._encoded(rows)
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        self._rows |= added
        self._place(rows, lines, begin)
        self._must_copy = False
        self._changes.clear()
        self._copied = time.monotonic()
        self._cost = self._copied - begun

    def _earlier(self, changes: dict[Key, dict[str, str]]) -> Iterator[list[str]]:
        """Yield the rows that are only in the file, changed; take what was used out of changes."""
        if not self._has_earlier:
            return
        first = next((row.at for row in self._rows.values() if row.at is not None), self._size)
        for number, (cells, begin, _) in enumerate(_lines(self._path)):
            if begin >= first:
                return
            if number:
                self._fill(cells, changes.pop(self._key(cells), {}))
                yield cells

    def _encoded(self, rows: Sequence[_Row]) -> list[bytes]:
        for row in rows:
            self._fill(row.cells, {})
        return [encoded([row.cells]) for row in rows]

    def _place(self, rows: Sequence[_Row], lines: Sequence[bytes], at: int) -> None:
        for row, line in zip(rows, lines, strict=True):
            row.at = at
            at += len(line)
        self._size = self._clean = at

    def _forget(self) -> None:
        """Let go of all but the last rows, which must be in the file."""
        if "time" not in self._first:
            return
        most = max(min(_MAX_ROWS, _MAX_CELLS // len(self._columns)), 1)
        gone = [*islice(self._rows, max(len(self._rows) - most, 0))]
        for key in gone:
            del self._rows[key]
        self._has_earlier |= bool(gone)


class _Changes:
    """Changes of rows that are not in the file yet: JSON, a line each."""

    def __init__(self, path: Path) -> None:
        self.rows: dict[Key, dict[str, str]] = {}
        self._path = path
        self._unsaved: dict[Key, dict[str, str]] = {}
        self._size = 0

    def read(self) -> list[tuple[Key, dict[str, str]]]:
        """Return what an earlier process left; a line that a crash cut short is left out."""
        found: list[tuple[Key, dict[str, str]]] = []
        with suppress(OSError, ValueError):
            for line in self._path.read_bytes().splitlines(keepends=True):
                key, cells = json.loads(line)
                found.append((tuple(key), cells))
                self._size += len(line)
        return found

    def put(self, key: Key, cells: Mapping[str, str]) -> None:
        self.rows.setdefault(key, {}).update(cells)
        self._unsaved.setdefault(key, {}).update(cells)

    def save(self, more: Mapping[Key, Mapping[str, str]] | None = None) -> None:
        """Write what is new, and more that will be in the file in a moment."""
        new = [*self._unsaved.items(), *(more or {}).items()]
        if not new:
            return
        data = b"".join(json.dumps(each).encode() + b"\n" for each in new)
        with self._path.open("r+b" if self._size else "wb") as file:
            file.seek(self._size)
            file.write(data)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        self._size += len(data)
        self._unsaved = {}

    def rewrite(self) -> None:
        """Keep only what is not in the file."""
        rows = self.rows
        self.clear()
        self.rows, self._unsaved = rows, dict(rows)
        self.save()

    def clear(self) -> None:
        """Forget everything: it is in the file."""
        self._path.unlink(missing_ok=True)
        self.rows, self._unsaved, self._size = {}, {}, 0


def changes_of(name: str) -> str:
    """Return the name of the file beside one of a name."""
    return f".{name}.changes"


def encoded(lines: Sequence[Sequence[str]]) -> bytes:
    """Return lines as CSV in UTF-8, cells quoted where that is needed."""
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue().encode()


def _lines(path: Path) -> Iterator[tuple[list[str], int, int]]:
    """Yield the lines of a file, and where each begins and ends; not one that a crash cut short."""
    if not path.exists():
        return
    end = 0

    def read(file: io.BufferedReader) -> Iterator[str]:
        nonlocal end
        for line in file:
            if not line.endswith(b"\n"):
                return
            end += len(line)
            yield line.decode()

    try:
        with path.open("rb") as file:
            begin = 0
            for cells in csv.reader(read(file)):
                yield cells, begin, end
                begin = end
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
