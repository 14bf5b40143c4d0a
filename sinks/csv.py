"""Writes a run as CSV files: one row per epoch for each phase, as Ultralytics' `results.csv`.

Guarantees: a new column leaves the rows before it as they are; a step or an epoch that is measured
again replaces its row; rows keep the order in which they first came; any metric name is a column,
and different names stay different; numbers read back exactly; a saved row survives a kill at any
moment; however long a file is, only its last rows are in memory.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from trainbus import events
from trainbus.errors import SinkError
from trainbus.interfaces import FilePath, Options, RunInfo, Sink
from trainbus.toolkit.sinks import (
    Names,
    SeenRecords,
    check_folder,
    flat,
    folder_of,
    make_folder,
    writing_to,
)

_Key = tuple[str, ...]

_KEYS = ("phase", "step", "epoch", "time", "name", "value")
"""Columns that no metric may have."""

_ENDED = ("reason", "error.", "best.", "seconds")
"""Prefixes of the names that the end of a run adds to `run.csv`."""

_LONGEST = 100_000
"""Characters of a cell; Python's reader refuses more than 131,072."""

_PAIR = ("name", "value")
_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""Prefixes by which spreadsheets recognize a formula, with the full-width forms of East Asia."""

_FILES = {"final": ("phase", "epoch", "time"), "params": _PAIR, "run": _PAIR}
"""Files that no phase may have, and their first columns."""

_STEPS = "_steps"
"""Suffix of the name of a file of steps, which no phase may have."""

_MAX_ROWS = 2_000
_MAX_CELLS = 100_000
"""Most rows and cells of a file that stay in memory."""

_COST = 20.0
"""Copying a file takes at most a twentieth of the time."""

_CHUNK = 1_000


class CsvOptions(Options, frozen=True, kw_only=True):
    """Options of the `csv` sink."""

    dir: Annotated[
        FilePath,
        Meta(
            pattern=r"\{run\}",
            extra={"expected": "a path with `{run}` in it: each run has a folder of its own"},
            description="Folder for the files; `{run}` is replaced by the run's id",
        ),
    ] = "trainbus-runs/{run}-csv"
    escape_formulas: Annotated[
        bool,
        Meta(
            description="Whether to put a `'` in front of text that a spreadsheet would run as a "
            "formula"
        ),
    ] = True


class CsvSink(Sink):
    """Writes the numbers of a run to a folder of CSV files."""

    Options = CsvOptions
    reads_files = False
    options: CsvOptions

    _location: str | None = None

    def __init__(self, options: CsvOptions | None = None) -> None:
        super().__init__(options)
        self._tables: dict[str, _Table] = {}

    def check(self) -> str:
        """Make sure that the folder can be written.

        Raises:
            SinkError: the folder can't be written.
        """
        return check_folder(self.options.dir)

    def open(self, run: RunInfo) -> None:
        """Create the folder, and read what it holds of this run.

        Raises:
            SinkError: the folder can't be written, or holds a file that is no table of this sink.
        """
        self._columns = Names(lambda name: self._safe(_column(name)), longest=1000)
        self._names = Names(lambda name: self._safe(_clean(name)), longest=1000)
        self._phases, self._keys = Names(_phase, longest=100), Names(_file, longest=100)
        self._tables = {}
        self._folder = folder = make_folder(folder_of(self.options.dir, run.id))
        with writing_to(folder):
            self._seen = SeenRecords(folder / ".trainbus-csv.json")
            began = self._table("run").get("began")
            for left in folder.glob(_changes_of("*.csv")):  # by a process that was killed
                self._table(left.name[1:].removesuffix(_changes_of(".csv")[1:]))
        try:
            self._began = float(began) if began else None
        except ValueError as error:
            text = f"expected seconds as `began` in {folder / 'run.csv'}, found {began!r}; fix it"
            raise SinkError(text) from error
        self._location = str(folder)

    def write(self, records: Sequence[events.Record]) -> None:
        """Write the rows of the records that are new.

        Raises:
            SinkError: a file is no table of this sink.
            OSError: the disk is full or gone.
        """
        last = dict(self._seen.last)
        try:
            new = list(self._seen.new(records))
            for record in new:
                if self._began is None:
                    self._began = record.time
                    self._list("run", {"began": self._began})
                self._take(record)
            for table in self._tables.values():
                table.save()
            if new:
                self._seen.save()
        except BaseException:
            self._seen.last = last  # rows have keys: written again, they stay the same
            raise

    def close(self) -> None:
        """Move all rows to their places in the files.

        Raises:
            OSError: the disk is full or gone; the next sink of the run moves them.
        """
        tables, self._tables = self._tables, {}
        for table in tables.values():
            table.close()

    @property
    def location(self) -> str | None:
        """Path of the folder."""
        return self._location

    def _take(self, record: events.Record) -> None:
        match record.event:
            case events.RunStarted() as event:
                about = {k: v for k, v in _fields(event).items() if k != "params"}
                self._list("run", {"run": record.run, **about, "attempt": record.attempt})
                stale = [n for n in self._table("run").names() if n.startswith(_ENDED)]
                self._list("run", {**dict.fromkeys(stale), "status": "running"})
                self._list("params", event.params)
            case events.ParamsUpdated() as event:
                self._list("params", event.params)
            case events.ModelDescribed() as event:
                self._list("run", {"model": _fields(event)})
            case events.MetricsLogged() as event if event.values:
                self._take_metrics(event, self._since(record))
            case events.TableLogged() as event:
                self._sheet(event.key, event.columns, event.rows)
            case events.CurveLogged() as event if len(event.y):
                points = np.column_stack([event.x, np.asarray(event.y).T])
                self._sheet(event.key, [event.x_label, *event.classes], points.tolist())
            case events.ConfusionMatrixLogged() as event:
                rows = zip(event.classes, np.asarray(event.matrix).tolist(), strict=False)
                header = ["true/predicted", *event.classes]
                self._sheet(event.key, header, [[name, *row] for name, row in rows])
            case events.HistogramLogged() as event:
                bins = np.column_stack([event.edges[:-1], event.edges[1:], event.counts])
                self._sheet(event.key, ["from", "to", "count"], bins.tolist())
            case events.RunEnded() as event:
                self._list("run", {**_fields(event), "seconds": self._since(record)})

    def _take_metrics(self, event: events.MetricsLogged, time: float) -> None:
        epoch = "" if event.epoch is None else str(event.epoch + 1)
        row = {"epoch": epoch, "time": _number(time)}
        row |= {self._columns(name): _number(value) for name, value in event.values.items()}
        if event.final:
            phase = self._text(event.phase)
            self._table("final").put({"phase": phase, **row})
        elif event.step is not None:
            table = self._table(f"{self._phases(event.phase)}{_STEPS}")
            table.put({"step": str(event.step), **row})
        else:
            self._table(self._phases(event.phase)).put(row)

    def _since(self, record: events.Record) -> float:
        return round(record.time - (self._began or 0.0), 6)

    def _table(self, name: str) -> _Table:
        if name not in self._tables:
            by_steps = ("step",) if name.endswith(_STEPS) else ()
            columns = _FILES.get(name, (*by_steps, "epoch", "time"))
            self._tables[name] = _Table(self._folder / f"{name}.csv", columns)
        return self._tables[name]

    def _list(self, name: str, values: Mapping[str, Any]) -> None:
        """Put values under their names, in place of earlier ones."""
        table = self._table(name)
        for key, value in flat(values).items():
            table.put({"name": self._names(key), "value": self._text(value)})

    def _text(self, value: Any) -> str:
        """Return a value as a cell."""
        if value is None:
            return ""
        if isinstance(value, float):
            return _number(value)
        return self._safe(_clean(str(value)))

    def _safe(self, text: str) -> str:
        """Return text that no spreadsheet runs as a formula; numbers stay as they are."""
        if not self.options.escape_formulas or not text.startswith(_FORMULAS) or _is_number(text):
            return text
        return f"'{text}"

    def _sheet(self, key: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Write a table to its own file, in place of the last one of the same key."""
        folder = self._folder / "tables"
        folder.mkdir(exist_ok=True)
        lines = [list(map(self._text, line)) for line in [header, *rows]]
        with _replacing(folder / f"{self._keys(key)}.csv") as file:
            file.write(_as_csv(lines))


def _fields(event: Any) -> dict[str, Any]:
    """Return the fields of an event that are set."""
    return {k: v for k, v in msgspec.to_builtins(event).items() if k != "type"}


def _number(value: float) -> str:
    """Return a number as text; it reads back exactly, and pandas knows `NaN`, `inf`, `-inf`."""
    return "NaN" if math.isnan(value) else repr(float(value))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _clean(text: str) -> str:
    """Return text that every reader of CSV accepts; line breaks stay, as they are quoted."""
    return re.sub("[\0\ud800-\udfff]", "\ufffd", re.sub("\r\n?", "\n", text))[:_LONGEST]


def _column(name: str) -> str:
    found = re.sub("[\0-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]", "_", name)
    return f"{found}_" if found in _KEYS or not found.strip() else found


def _file(name: str) -> str:
    """Return a file name for any system; some do not distinguish `A` and `a`."""
    return re.sub(r"[^a-z0-9_.()@-]|^\.", "_", name.lower())


def _phase(name: str) -> str:
    found = _file(name)
    return f"{found}_" if found in _FILES or found.endswith(_STEPS) else found


class _Row:
    """A row in memory; `at` is its place in the file in bytes, None if it is not there yet."""

    __slots__ = ("at", "cells")

    def __init__(self, cells: list[str], at: int | None) -> None:
        self.cells, self.at = cells, at


class _Table:
    """The rows of a file, each with a key; a row that is put again replaces the earlier one.

    The last rows are in memory and are written in place. A change of an earlier row goes to a
    second file until the whole file is copied, with all such changes in their places.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        """Read the file, if it is there.

        Args:
            path: the file.
            columns: its first columns; those before `time` are the key. Without `time` the key
                is a name: there are few, and all rows are in memory.

        Raises:
            SinkError: the file is something else.
        """
        self._path = path
        self._first = tuple(columns)
        self._columns: dict[str, int] = {}
        self._rows: dict[_Key, _Row] = {}
        self._highest: dict[str, float] = {}
        """Highest number of each kind of row; a row with a higher one is new."""
        self._size = self._clean = 0
        """Bytes of the file, and how many of them need not be written again."""
        self._has_earlier = False
        """Whether rows of the file are not in memory."""
        self._must_copy = self._is_changed = False
        self._copied, self._cost = -math.inf, 0.0
        self._changes = _Changes(path.with_name(_changes_of(path.name)))
        self._read()
        self._is_changed = False
        for cells in self._changes.read():
            self._must_copy = True
            self.put(cells)

    def _read(self) -> None:
        names: Sequence[str] = self._first
        for number, (cells, begin, end) in enumerate(_lines(self._path)):
            self._size = self._clean = end
            if not number:
                names = cells
                self._add_columns(names)
                continue
            row = self._named(cells)
            key = self._key(row)
            if key in self._rows:  # the file was edited
                self._must_copy = True
                self.put(row)
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

    def _named(self, cells: Sequence[str]) -> dict[str, str]:
        return dict(zip(self._columns, cells, strict=False))

    def _key(self, row: Mapping[str, str]) -> _Key:
        """Return the cells that distinguish a row; a row without an epoch has its time."""
        match self._first:
            case ("phase", *_):
                return row.get("phase", ""), row.get("epoch", "")
            case ("epoch", *_):
                return row.get("epoch", ""), "" if row.get("epoch") else row.get("time", "")
        return (row.get(self._first[0], ""),)

    def _is_new(self, key: _Key) -> bool:
        """Return whether a key is the highest of its kind so far, and remember it."""
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

    def put(self, cells: Mapping[str, str]) -> None:
        """Put cells into the row with their key; its other cells stay."""
        key, width = self._key(cells), len(self._columns)
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
        """Write the changes: the last rows in place, or the whole file if necessary.

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
        """Move the changes of earlier rows into the file.

        Raises:
            OSError: the disk is full or gone.
        """
        if self._changes.rows:
            self._copy()

    def _write_last(self) -> None:
        """Write the rows in memory from the first new or changed one on."""
        changed: list[_Row] = []
        for row in reversed(self._rows.values()):
            if row.at is not None and row.at < self._clean:
                break
            changed.append(row)
        if not changed:
            return
        changed.reverse()
        old = [self._named(row.cells) for row in changed if row.at is not None]
        if len(old) > 1:  # a kill could leave them half written
            self._changes.save(old)
        lines = self._encoded(changed)
        with self._path.open("r+b") as file:
            file.seek(self._clean)
            file.writelines(lines)
            file.truncate()
            _sync(file)
        self._place(changed, lines, self._clean)
        if len(old) > 1:
            self._changes.rewrite()

    def _copy(self) -> None:
        """Rewrite the file with all changes in their places and all columns in each row."""
        begun = time.monotonic()
        rows = [*self._rows.values()]
        left = dict(self._changes.rows)
        with _replacing(self._path) as file:
            file.write(_as_csv([[*self._columns]]))
            earlier = self._earlier(left)
            while chunk := list(islice(earlier, _CHUNK)):
                file.write(_as_csv(chunk))
            begin = file.tell()
            added = {key: _Row([], None) for key in left}
            for key, row in added.items():
                self._fill(row.cells, left[key])
            rows += added.values()
            lines = self._encoded(rows)
            file.writelines(lines)
        self._rows |= added
        self._place(rows, lines, begin)
        self._must_copy = False
        self._changes.clear()
        self._copied = time.monotonic()
        self._cost = self._copied - begun

    def _earlier(self, changes: dict[_Key, dict[str, str]]) -> Iterator[list[str]]:
        """Yield the rows that are only in the file, with their changes, which are removed."""
        if not self._has_earlier:
            return
        first = next((row.at for row in self._rows.values() if row.at is not None), self._size)
        for number, (cells, begin, _) in enumerate(_lines(self._path)):
            if begin >= first:
                return
            if number:
                self._fill(cells, changes.pop(self._key(self._named(cells)), {}))
                yield cells

    def _encoded(self, rows: Sequence[_Row]) -> list[bytes]:
        for row in rows:
            self._fill(row.cells, {})
        return [_as_csv([row.cells]) for row in rows]

    def _place(self, rows: Sequence[_Row], lines: Sequence[bytes], at: int) -> None:
        for row, line in zip(rows, lines, strict=True):
            row.at = at
            at += len(line)
        self._size = self._clean = at

    def _forget(self) -> None:
        """Drop all but the last rows from memory; they must be in the file."""
        if "time" not in self._first:
            return
        most = max(min(_MAX_ROWS, _MAX_CELLS // len(self._columns)), 1)
        gone = [*islice(self._rows, max(len(self._rows) - most, 0))]
        for key in gone:
            del self._rows[key]
        self._has_earlier |= bool(gone)


class _Changes:
    """Changes of rows that are not in the file yet: one line of JSON each."""

    def __init__(self, path: Path) -> None:
        self.rows: dict[_Key, dict[str, str]] = {}
        self._path = path
        self._unsaved: dict[_Key, dict[str, str]] = {}
        self._size = 0

    def read(self) -> list[dict[str, str]]:
        """Return what an earlier process left; a line that a crash cut short is skipped."""
        found: list[dict[str, str]] = []
        with suppress(OSError, ValueError):
            for line in self._path.read_bytes().splitlines(keepends=True):
                found.append(json.loads(line))
                self._size += len(line)
        return found

    def put(self, key: _Key, cells: Mapping[str, str]) -> None:
        self.rows.setdefault(key, {}).update(cells)
        self._unsaved.setdefault(key, {}).update(cells)

    def save(self, more: Sequence[Mapping[str, str]] = ()) -> None:
        """Write the new changes, and more that are about to be written to the table."""
        new = [*self._unsaved.values(), *more]
        if not new:
            return
        data = b"".join(json.dumps(each).encode() + b"\n" for each in new)
        with self._path.open("r+b" if self._size else "wb") as file:
            file.seek(self._size)
            file.write(data)
            file.truncate()
            _sync(file)
        self._size += len(data)
        self._unsaved = {}

    def rewrite(self) -> None:
        """Keep only the changes that are not in the table."""
        rows = self.rows
        self.clear()
        self.rows, self._unsaved = rows, dict(rows)
        self.save()

    def clear(self) -> None:
        """Drop all changes: they are in the table."""
        self._path.unlink(missing_ok=True)
        self.rows, self._unsaved, self._size = {}, {}, 0


def _changes_of(name: str) -> str:
    """Return the name of the file with the changes of another."""
    return f".{name}.changes"


def _as_csv(lines: Sequence[Sequence[str]]) -> bytes:
    """Return lines as CSV in UTF-8, with quotes where necessary."""
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue().encode()


def _lines(path: Path) -> Iterator[tuple[list[str], int, int]]:
    """Yield the lines of a file, each with its first and last byte; skip one that was cut short."""
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


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """Replace a file by what is written in this context: completely, or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            _sync(file)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
