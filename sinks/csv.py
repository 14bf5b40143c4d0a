"""Writes a run as CSV files: one row an epoch, as Ultralytics' `results.csv`, for each phase.

Guarantees: a column that comes later leaves the rows before it as they are; a step or an epoch
that is measured again replaces its row; a name is a column whatever characters it has, and two
names are two; numbers read back exactly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from trainbus.errors import SinkError
from trainbus.events import (
    ConfusionMatrixLogged,
    CurveLogged,
    HistogramLogged,
    MetricsLogged,
    ModelDescribed,
    ParamsUpdated,
    Record,
    RunEnded,
    RunStarted,
    TableLogged,
)
from trainbus.interfaces import FilePath, Options, RunInfo, Sink
from trainbus.toolkit.sinks import Names, SeenRecords, check_folder, flat

from ._csv_table import Table, changes_of, encoded, replace

_KEYS = ("phase", "step", "epoch", "time", "name", "value")
"""Columns of ours, which no metric may have."""

_ENDED = ("reason", "error.", "best.", "seconds")
"""Beginnings of what the end of a run adds to `run.csv`."""

_LONGEST = 100_000
"""Characters of a cell; Python's reader refuses more than 131,072."""

_PAIR = ("name", "value")
_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""Beginnings of what spreadsheets take for a formula, the wide forms of East Asia among them."""

_FILES = {"final": ("phase", "epoch", "time"), "params": _PAIR, "run": _PAIR}
"""Files of ours, which no phase may have, and their first columns."""

_STEPS = "_steps"
"""End of the name of a file of steps, which no phase may have."""


class CsvOptions(Options, frozen=True, kw_only=True):
    """Options of the `csv` sink."""

    dir: Annotated[
        FilePath,
        Meta(
            pattern=r"\{run\}",
            extra={"expected": "a path with `{run}` in it: each run has a folder of its own"},
            description="Folder of the files; `{run}` is replaced by the run's id",
        ),
    ] = "trainbus-runs/{run}-csv"
    escape_formulas: Annotated[
        bool,
        Meta(
            description="Whether a text that a spreadsheet would run as a formula gets a `'` in "
            "front"
        ),
    ] = True


class CsvSink(Sink):
    """Keeps the numbers of a run in a folder of CSV files."""

    Options = CsvOptions
    reads_files = False
    options: CsvOptions

    def __init__(self, options: CsvOptions | None = None) -> None:
        super().__init__(options)
        self._folder: Path | None = None
        self._is_open = False

    def check(self) -> str:
        """Make sure that the folder can be written.

        Raises:
            SinkError: the folder can't be written.
        """
        return check_folder(self.options.dir)

    def open(self, run: RunInfo) -> None:
        """Make the folder, and read what it holds of this run.

        Raises:
            SinkError: the folder can't be written, or holds what is no table of this sink.
        """
        folder = Path(self.options.dir.replace("{run}", run.id)).expanduser().absolute()
        self._columns = Names(lambda name: self._safe(_column(name)), longest=1000)
        self._names = Names(lambda name: self._safe(_clean(name)), longest=1000)
        self._phases, self._keys = Names(_phase, longest=100), Names(_file, longest=100)
        self._tables: dict[str, Table] = {}
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._taken = SeenRecords(folder / ".trainbus-csv.json")
            began = self._table("run").get("began")
            for left in folder.glob(changes_of("*.csv")):  # by a process that was killed
                self._table(left.name[1:].removesuffix(changes_of(".csv")[1:]))
        except OSError as error:
            raise SinkError(f"can't write {folder}: {error.strerror}; set another `dir`") from error
        try:
            self._began = float(began) if began else None
        except ValueError as error:
            text = f"expected seconds as `began` in {folder / 'run.csv'}, found {began!r}; mend it"
            raise SinkError(text) from error
        self._is_open = True

    def write(self, records: Sequence[Record]) -> None:
        """Write the rows of the records that are new.

        Raises:
            SinkError: nothing was opened, or a file holds what is no table of this sink.
            OSError: the disk is full or gone.
        """
        if not self._is_open:
            raise SinkError("write came before open; call open(run) first")
        last = self._taken.last
        try:
            new = list(self._taken.new(records))
            for record in new:
                if self._began is None:
                    self._began = record.time
                    self._list("run", {"began": self._began})
                self._take(record)
            for table in self._tables.values():
                table.save()
            if new:
                self._taken.save()
        except BaseException:
            self._taken.last = last  # the rows have keys: taken again, they stay the same
            raise

    def close(self) -> None:
        """Let go of the rows, once all of them are in their places.

        Raises:
            OSError: the disk is full or gone; the next sink of the run puts them there.
        """
        tables = self._tables if self._is_open else {}
        self._is_open, self._tables = False, {}
        for table in tables.values():
            table.close()

    @property
    def location(self) -> str | None:
        """Path of the folder."""
        return str(self._folder) if self._folder else None

    def _take(self, record: Record) -> None:
        match record.event:
            case RunStarted() as event:
                about = {k: v for k, v in _fields(event).items() if k != "params"}
                self._list("run", {"run": record.run, **about, "attempt": record.attempt})
                stale = [n for n in self._table("run").names() if n.startswith(_ENDED)]
                self._list("run", {**dict.fromkeys(stale), "status": "running"})
                self._list("params", event.params)
            case ParamsUpdated() as event:
                self._list("params", event.params)
            case ModelDescribed() as event:
                self._list("run", {"model": _fields(event)})
            case MetricsLogged() as event if event.values:
                self._take_metrics(event, self._since(record))
            case TableLogged() as event:
                self._sheet(event.key, event.columns, event.rows)
            case CurveLogged() as event if len(event.y):
                points = np.column_stack([event.x, np.asarray(event.y).T])
                self._sheet(event.key, [event.x_label, *event.classes], points.tolist())
            case ConfusionMatrixLogged() as event:
                rows = zip(event.classes, np.asarray(event.matrix).tolist(), strict=False)
                header = ["true/predicted", *event.classes]
                self._sheet(event.key, header, [[name, *row] for name, row in rows])
            case HistogramLogged() as event:
                bins = np.column_stack([event.edges[:-1], event.edges[1:], event.counts])
                self._sheet(event.key, ["from", "to", "count"], bins.tolist())
            case RunEnded() as event:
                self._list("run", {**_fields(event), "seconds": self._since(record)})

    def _take_metrics(self, event: MetricsLogged, time: float) -> None:
        epoch = "" if event.epoch is None else str(event.epoch + 1)
        row = {"epoch": epoch, "time": _number(time)}
        row |= {self._columns(name): _number(value) for name, value in event.values.items()}
        if event.final:
            phase = self._text(event.phase)
            self._table("final").put((phase, epoch), {"phase": phase, **row})
        elif event.step is not None:
            table = self._table(f"{self._phases(event.phase)}{_STEPS}")
            table.put((str(event.step),), {"step": str(event.step), **row})
        else:
            table = self._table(self._phases(event.phase))
            table.put((epoch, "" if epoch else row["time"]), row)

    def _since(self, record: Record) -> float:
        return round(record.time - (self._began or 0.0), 6)

    def _table(self, name: str) -> Table:
        if name not in self._tables:
            assert self._folder is not None
            by_steps = ("step",) if name.endswith(_STEPS) else ()
            columns = _FILES.get(name, (*by_steps, "epoch", "time"))
            self._tables[name] = Table(self._folder / f"{name}.csv", columns)
        return self._tables[name]

    def _list(self, name: str, values: Mapping[str, Any]) -> None:
        """Put values under their names; those of a run that goes on replace what it had."""
        table = self._table(name)
        for key, value in flat(values).items():
            cell = self._names(key)
            table.put((cell,), {"name": cell, "value": self._text(value)})

    def _text(self, value: Any) -> str:
        """Return a value as a cell."""
        if value is None:
            return ""
        if isinstance(value, float):
            return _number(value)
        return self._safe(_clean(str(value)))

    def _safe(self, text: str) -> str:
        """Return a text that no spreadsheet takes for a formula; numbers stay as they are."""
        if not self.options.escape_formulas or not text.startswith(_FORMULAS) or _is_number(text):
            return text
        return f"'{text}"

    def _sheet(self, key: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Write a file of its own, in the place of the one that had its key before."""
        assert self._folder is not None
        folder = self._folder / "tables"
        folder.mkdir(exist_ok=True)
        lines = [list(map(self._text, line)) for line in [header, *rows]]
        replace(folder / f"{self._keys(key)}.csv", encoded(lines))


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
    """Return a text without what readers of CSV refuse; line breaks are kept, and quoted."""
    return re.sub("[\0\ud800-\udfff]", "\ufffd", re.sub("\r\n?", "\n", text))[:_LONGEST]


def _column(name: str) -> str:
    found = re.sub("[\0-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]", "_", name)
    return f"{found}_" if found in _KEYS or not found.strip() else found


def _file(name: str) -> str:
    """Return a name for a file on any system; some see no difference between `A` and `a`."""
    return re.sub(r"[^a-z0-9_.()@-]|^\.", "_", name.lower())


def _phase(name: str) -> str:
    found = _file(name)
    return f"{found}_" if found in _FILES or found.endswith(_STEPS) else found
