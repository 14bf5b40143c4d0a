"""Writes an HTML page for each run, to be opened from disk: charts, pictures, tables, parameters.

Guarantees: the page needs no files outside its folder and no network; each of its files is complete
or missing; text of the training is displayed, never executed; a resumed run continues its page.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from trainbus import events
from trainbus.errors import SinkError
from trainbus.interfaces import FilePath, Options, RunInfo, Sink
from trainbus.toolkit.plots import png
from trainbus.toolkit.sinks import (
    MAIN,
    SeenRecords,
    check_folder,
    check_package,
    folder_of,
    required_package,
    writing_to,
)

from .data import Data, Gatherer, Picture
from .page import page

logger = logging.getLogger(__name__)

TESTED_VERSIONS = "7.1.0"
REQUIRED_NAMES = ("plotly:offline.get_plotlyjs",)
"""Names of plotly that the sink uses."""

_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".avif")
"""Types that browsers show and never execute."""

_MILESTONES = (
    events.RunStarted
    | events.EpochStarted
    | events.EpochEnded
    | events.AlertRaised
    | events.RunEnded
)
_COST = 20.0
_PAUSE_S = 5.0
"""The page is rewritten at these events and otherwise every few seconds, and writing it takes at
most a twentieth of the time."""


class HtmlOptions(Options, frozen=True, kw_only=True):
    """Options of the `html` sink."""

    dir: Annotated[
        FilePath,
        Meta(
            pattern=r"\{run\}",
            extra={"expected": "a folder with {run} in it, so that each run has its own"},
            description="Folder for the page; `{run}` is replaced by the run's id",
        ),
    ] = "trainbus-pages/{run}"
    points: Annotated[
        int, Meta(ge=10, le=100_000, description="Maximum number of values per metric")
    ] = 2000
    curve_points: Annotated[
        int, Meta(ge=2, le=100_000, description="Maximum number of points per curve")
    ] = 200
    pictures: Annotated[
        int, Meta(ge=0, le=10_000, description="Number of latest pictures to keep per name")
    ] = 10


class HtmlSink(Sink):
    """Writes the page of a run."""

    Options = HtmlOptions
    packages = ("plotly",)
    durable_only_after_close = True
    options: HtmlOptions

    _location: str | None = None
    _is_new = False

    def check(self) -> str:
        """Make sure that plotly is installed and the folder can be written.

        Raises:
            MissingPackageError: plotly is not installed.
            SinkError: the folder can't be written.
        """
        check_package("plotly", extra="html")
        return check_folder(self.options.dir)

    def open(self, run: RunInfo) -> None:
        """Create the folder, and read what it holds of the run.

        Raises:
            MissingPackageError: plotly is not installed.
            SinkError: the folder can't be written, or its data is not that of a page.
        """
        with required_package("plotly", extra="html"):
            from plotly.offline import get_plotlyjs
        folder, options = folder_of(self.options.dir, run.id), self.options
        with writing_to(folder):
            (folder / "pictures").mkdir(parents=True, exist_ok=True)
            _write_plotly(folder, get_plotlyjs())
            data = _read(folder) if (folder / "data.json").exists() else Data(run=run.id)
        self._gatherer = Gatherer(data, points=options.points, curve_points=options.curve_points)
        self._seen = SeenRecords(last={MAIN: data.position, **data.streams})
        self._stale: list[Path] = []
        self._is_new = self._is_due = False
        self._written, self._cost = 0.0, 0.0
        self.lost = 0
        self._folder, self._location = folder, str(folder / "index.html")

    def write(self, records: Sequence[events.Record]) -> None:
        """Take the records that are new, and write the page if it is time.

        Raises:
            OSError: the disk is full or gone; the records are written next time.
        """
        for record in self._seen.new(records):
            try:
                self._gatherer.take(record)
            except (ValueError, IndexError, TypeError) as error:  # such as a curve without its x
                self._lose(repr(getattr(record.event, "key", "?")), error)
            if isinstance(record.event, events.ImageLogged) and self.options.pictures:
                self._keep(record, record.event)
            self._is_new = True
            self._is_due = self._is_due or isinstance(record.event, _MILESTONES)
        pause = self._cost * _COST if self._is_due else max(self._cost * _COST, _PAUSE_S)
        if self._is_new and time.monotonic() - self._written >= pause:
            self.flush()

    def flush(self) -> None:
        """Write the page, unless nothing is new."""
        if not self._is_new:
            return
        begun = time.monotonic()
        data = self._gatherer.data
        _write(self._folder / "data.json", msgspec.json.encode(data))
        _write(self._folder / "index.html", page([data]))
        for path in self._stale:
            path.unlink(missing_ok=True)
        self._stale = []
        self._is_new = self._is_due = False
        self._written = time.monotonic()
        self._cost = self._written - begun

    def close(self) -> None:
        """Write the page, unless nothing is new."""
        self.flush()

    @property
    def location(self) -> str | None:
        """Path of the page."""
        return self._location

    def _keep(self, record: events.Record, event: events.ImageLogged) -> None:
        """Copy a picture into the folder, and drop the oldest one of its name."""
        suffix = Path(event.path or "").suffix.lower() if event.array is None else ".png"
        source = record.source and f"{record.source}-"
        file = f"pictures/{source}{record.attempt}-{record.seq}{suffix}"
        try:
            if suffix not in _PICTURES:
                raise ValueError(f"browsers show {' '.join(_PICTURES)}, found {event.path!r}")
            if event.array is not None:
                _write(self._folder / file, png(event.array))
            else:
                shutil.copyfile(str(event.path), self._folder / file)
        except (OSError, ValueError, TypeError) as error:
            self._lose(f"picture {event.key!r}", error)
            return
        kept = self._gatherer.data.pictures.setdefault(event.key, [])
        kept.append(Picture(file=file, caption=event.caption, epoch=event.epoch, step=event.step))
        while len(kept) > self.options.pictures:
            self._stale.append(self._folder / kept.pop(0).file)

    def _lose(self, name: str, error: Exception) -> None:
        self.lost += 1
        logger.warning("%s can't be shown: %s", name, error)


def compare(folders: Sequence[Path], out: Path) -> Path:
    """Write a page that compares runs: metrics in common charts, parameters that differ, results.

    Args:
        folders: pages of runs, as the `html` sink writes them.
        out: folder of the new page; it is created if necessary.

    Returns:
        The path of the page's `index.html`.

    Raises:
        MissingPackageError: plotly is not installed.
        SinkError: `folders` is empty, one is not the page of a run, or `out` can't be written.
    """
    with required_package("plotly", extra="html"):
        from plotly.offline import get_plotlyjs
    if not folders:
        raise SinkError("expected folders of pages to compare, found none")
    runs = []
    for folder in folders:
        try:
            runs.append(_read(folder))
        except OSError as error:
            raise SinkError(
                f"expected the page of a run with its data.json in {folder}: {error.strerror}; "
                "the `html` sink writes one"
            ) from error
    with writing_to(out, option="out"):
        out.mkdir(parents=True, exist_ok=True)
        _write_plotly(out, get_plotlyjs())
        _write(out / "index.html", page(runs, compares=True))
    return out / "index.html"


def _read(folder: Path) -> Data:
    path = folder / "data.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise SinkError(
            f"expected in {path} the data of a page, found something else ({error}); "
            "move the folder away"
        ) from error


def _write_plotly(folder: Path, source: str) -> None:
    path, content = folder / "plotly.min.js", source.encode()
    if not path.exists() or path.stat().st_size != len(content):
        _write(path, content)


def _write(path: Path, content: bytes) -> None:
    """Write a file completely or not at all, readable by other users such as a web server."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
