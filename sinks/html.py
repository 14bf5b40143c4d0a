"""Writes a page for each run that a browser opens from the disk: charts, pictures, tables, params.

Guarantees: the page's folder is all it needs, and it asks nothing of a network; a file in it is
there whole or not at all; text of the training is shown and never run; a resumed run goes on in its
page.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from trainbus.errors import MissingPackageError, SinkError
from trainbus.events import (
    AlertRaised,
    EpochEnded,
    EpochStarted,
    ImageLogged,
    Record,
    RunEnded,
    RunStarted,
)
from trainbus.interfaces import FilePath, Options, RunInfo, Sink
from trainbus.toolkit.plots import png
from trainbus.toolkit.sinks import SeenRecords, check_folder

from ._html_data import Data, Picture
from ._html_gatherer import Gatherer
from ._html_page import page

logger = logging.getLogger("trainbus.sinks.html")

TESTED_VERSIONS = "7.1.0"
REQUIRED_NAMES = ("plotly:offline.get_plotlyjs",)
"""What the sink relies on in plotly."""

_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".avif")
"""What browsers show, and never run."""

_TURNS = RunStarted | EpochStarted | EpochEnded | AlertRaised | RunEnded
_COST = 20.0
_PAUSE_S = 5.0
"""The page is rewritten at the turns of a run, between them every few seconds, and in all not
longer than a twentieth of the time."""


class HtmlOptions(Options, frozen=True, kw_only=True):
    """Options of the `html` sink."""

    dir: Annotated[
        FilePath,
        Meta(
            pattern=r"\{run\}",
            extra={"expected": "a folder with {run} in it, so that each run has its own"},
            description="Folder of the page; `{run}` is replaced by the run's id",
        ),
    ] = "trainbus-pages/{run}"
    points: Annotated[
        int, Meta(ge=10, le=100_000, description="Values of a metric that are kept")
    ] = 2000
    curve_points: Annotated[
        int, Meta(ge=2, le=100_000, description="Points of a curve that are kept")
    ] = 200
    pictures: Annotated[
        int, Meta(ge=0, le=10_000, description="Pictures of one name that are kept, the last ones")
    ] = 10


class HtmlSink(Sink):
    """Keeps the page of a run."""

    Options = HtmlOptions
    packages = ("plotly",)
    durable_only_after_close = True
    options: HtmlOptions

    def __init__(self, options: HtmlOptions | None = None) -> None:
        super().__init__(options)
        self._folder: Path | None = None
        self._is_open = False

    def check(self) -> str:
        """Make sure that the package is there and the folder can be written.

        Raises:
            MissingPackageError: plotly is not installed.
            SinkError: the folder can't be written.
        """
        if find_spec("plotly") is None:
            raise MissingPackageError("plotly", extra="html")
        return check_folder(self.options.dir)

    def open(self, run: RunInfo) -> None:
        """Make the folder, and go on with what it holds of the run.

        Raises:
            MissingPackageError: plotly is not installed.
            SinkError: the folder can't be written, or holds something else.
        """
        try:
            from plotly.offline import get_plotlyjs
        except ImportError as error:
            raise MissingPackageError("plotly", extra="html") from error
        folder = Path(self.options.dir.replace("{run}", run.id)).expanduser().absolute()
        try:
            (folder / "pictures").mkdir(parents=True, exist_ok=True)
            _write_plotly(folder, get_plotlyjs())
            data = _read(folder) if (folder / "data.json").exists() else Data(run=run.id)
        except OSError as error:
            raise SinkError(f"can't write {folder}: {error.strerror}; set another `dir`") from error
        self._gatherer = Gatherer(
            data, points=self.options.points, curve_points=self.options.curve_points
        )
        self._taken = SeenRecords(last=data.position)
        self._stale: list[Path] = []
        self._is_new = self._is_turn = False
        self._written, self._cost = 0.0, 0.0
        self.lost = 0
        self._folder, self._is_open = folder, True

    def write(self, records: Sequence[Record]) -> None:
        """Take the records that are new, and write the page if it is time.

        Raises:
            OSError: the disk is full or gone; what was taken is written next time.
        """
        if self._folder is None or not self._is_open:
            raise SinkError("write came before open; call open(run) first")
        for record in self._taken.new(records):
            try:
                self._gatherer.take(record)
            except (ValueError, IndexError, TypeError) as error:  # such as a curve without its x
                self.lost += 1
                logger.warning("%r can't be shown: %s", getattr(record.event, "key", "?"), error)
            if isinstance(record.event, ImageLogged) and self.options.pictures:
                self._keep(self._folder, record, record.event)
            self._is_new = True
            self._is_turn = self._is_turn or isinstance(record.event, _TURNS)
        pause = self._cost * _COST if self._is_turn else max(self._cost * _COST, _PAUSE_S)
        if self._is_new and time.monotonic() - self._written >= pause:
            self.flush()

    def flush(self) -> None:
        """Write the page."""
        if self._folder is None or not self._is_open or not self._is_new:
            return
        begun = time.monotonic()
        data = self._gatherer.data
        _write(self._folder / "data.json", msgspec.json.encode(data))
        _write(self._folder / "index.html", page([data]))
        for path in self._stale:
            path.unlink(missing_ok=True)
        self._stale = []
        self._is_new = self._is_turn = False
        self._written = time.monotonic()
        self._cost = self._written - begun

    def close(self) -> None:
        """Write what is not in the page yet."""
        try:
            self.flush()
        finally:
            self._is_open = False

    @property
    def location(self) -> str | None:
        """Path of the page."""
        return str(self._folder / "index.html") if self._folder else None

    def _keep(self, folder: Path, record: Record, event: ImageLogged) -> None:
        """Copy a picture into the folder, and let go of the oldest one of its name."""
        suffix = Path(event.path or "").suffix.lower() if event.array is None else ".png"
        file = f"pictures/{record.attempt}-{record.seq}{suffix}"
        try:
            if suffix not in _PICTURES:
                raise ValueError(f"browsers show {' '.join(_PICTURES)}, found {event.path!r}")
            if event.array is not None:
                _write(folder / file, png(event.array))
            else:
                shutil.copyfile(str(event.path), folder / file)
        except (OSError, ValueError, TypeError) as error:
            self.lost += 1
            logger.warning("picture %r can't be shown: %s", event.key, error)
            return
        kept = self._gatherer.data.pictures.setdefault(event.key, [])
        kept.append(Picture(file=file, caption=event.caption, epoch=event.epoch, step=event.step))
        while len(kept) > self.options.pictures:
            self._stale.append(folder / kept.pop(0).file)


def compare(folders: Sequence[Path], out: Path) -> Path:
    """Write one page over several runs: metrics in common charts, params that differ, results.

    Args:
        folders: pages of runs, as the `html` sink writes them.
        out: folder of the new page; it is made if it is not there.

    Returns:
        The path of the page's `index.html`.

    Raises:
        MissingPackageError: plotly is not installed.
        SinkError: a folder is no page of a run, there are none, or `out` can't be written.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingPackageError("plotly", extra="html") from error
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
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write_plotly(out, get_plotlyjs())
        _write(out / "index.html", page(runs, compares=True))
    except OSError as error:
        raise SinkError(f"can't write {out}: {error.strerror}; name another folder") from error
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
    """Write a file that is there whole or not at all, and that a web server may read."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
