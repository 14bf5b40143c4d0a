"""Takes a run to SwanLab: settings, metrics, pictures, charts, tables, texts, files.

Guarantees: of a run of SwanLab's no handler of signals or exceptions stays in the process; nothing
of the machine, the terminal or the repository is collected; a value that SwanLab would drop, as
its step is taken, is counted. SwanLab's files can't be continued: each process that delivers
writes one of its own with the id of the run, and one that was cut short is set aside.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from trainbus.errors import MissingPackageError, SinkError
from trainbus.events import (
    AlertRaised,
    ArtifactLogged,
    CheckpointSaved,
    ConfusionMatrixLogged,
    CurveLogged,
    HistogramLogged,
    ImageLogged,
    MetricsLogged,
    ModelDescribed,
    ParamsUpdated,
    Record,
    RunEnded,
    TableLogged,
    TextLogged,
)
from trainbus.interfaces import RunInfo, Sink
from trainbus.toolkit.sinks import (
    LatestCheckpoints,
    Names,
    SeenRecords,
    Timeline,
    check_folder,
    flat,
    is_wanted,
    metric_name,
)

from . import session
from . import _state as state
from .files import FileResolver
from .charts import media
from ._options import SwanlabOptions
from ._values import counted, plain, valid_key, valid_text

logger = logging.getLogger("trainbus.sinks.swanlab")

TESTED_VERSIONS = "0.10.3"
_REQUIRED_NAMES = (
    "init has_run Settings.Probe Settings.Terminal Image Text ECharts "
    "Run.log Run.save Run.finish Run._handle_atexit "
    "echarts.Bar echarts.HeatMap echarts.Line echarts.Table echarts.options"
)
REQUIRED_NAMES = tuple(f"swanlab:{name}" for name in _REQUIRED_NAMES.split())
"""What the sink relies on; `trainbus doctor` looks whether it is there."""


class SwanlabSink(Sink):
    """Feeds one SwanLab run."""

    Options = SwanlabOptions
    service = "swanlab"
    durable_only_after_close = True
    shares_process = False
    options: SwanlabOptions

    def __init__(self, options: SwanlabOptions | None = None) -> None:
        super().__init__(options)
        self._run: Any = None
        self._folder: Path | None = None
        self._taken = SeenRecords()
        self._location: str | None = None

    def check(self) -> str:
        """Make sure that the package is there and the folder can be written.

        Raises:
            MissingPackageError: swanlab is not installed.
            SinkError: the folder can't be written.
        """
        if find_spec("swanlab") is None:
            raise MissingPackageError("swanlab", extra="swanlab")
        return check_folder(self.options.logdir or "swanlog")

    def open(self, run: RunInfo) -> None:
        """Start a SwanLab run, or one that goes on with the run of the same id.

        Raises:
            MissingPackageError: swanlab is not installed.
            SinkError: SwanLab refuses to start the run, or has one open in this process.
        """
        try:
            import swanlab
        except ImportError as error:
            raise MissingPackageError("swanlab", extra="swanlab") from error
        self._swanlab, self.lost = swanlab, 0
        self._names = Names(valid_key, longest=512)
        self._repeated: set[str] = set()
        self._checkpoints = LatestCheckpoints(self.options.save_checkpoints)
        self._run = session.begin(self.options, run)
        atexit.unregister(self._run._handle_atexit)  # the sink finishes the run
        session.bound(self._run)
        folder = None if self._run.mode == "disabled" else Path(self._run.dir).absolute()
        self._state = state.begin(folder, run)
        self._timeline = Timeline(self._state.at)
        self._folder = folder
        self._files = None if folder is None else FileResolver(self._run, folder)
        self._taken = SeenRecords(None, self._state.taken)
        is_new = self._taken.last[0] < run.attempt
        self._configure(run.started.params if is_new else {})
        self._location = session.location(self._run, folder)

    def write(self, records: Sequence[Record]) -> None:
        """Hand the records that are new to SwanLab.

        Raises:
            SinkError: nothing was opened.
        """
        for record in self._taken.new(records):
            if self._run is None:
                raise SinkError("no run is open; call open(run) first")
            self._take(record.event)

    def close(self) -> None:
        """Finish the run, as crashed unless its end was written."""
        self._finish("failed", "its end was not written")

    def wants_files(self, event: CheckpointSaved | ArtifactLogged) -> bool:
        """Return whether the files of an event are kept with the run."""
        return is_wanted(self.options.save_checkpoints, event)

    @property
    def location(self) -> str | None:
        """Address of the run, or the command that uploads or shows it."""
        return self._location

    def _take(self, event: object) -> None:
        match event:
            case ParamsUpdated():
                self._configure(event.params)
            case ModelDescribed():
                about = msgspec.structs.asdict(event)
                about = {k: v for k, v in about.items() if v not in (None, [], {})}
                self._configure({"model": about})
            case MetricsLogged():
                for name, value in event.values.items():
                    self._log(metric_name(name, final=event.final), event, value)
            case (
                ImageLogged()
                | CurveLogged()
                | ConfusionMatrixLogged()
                | TableLogged()
                | HistogramLogged()
                | TextLogged()
            ):
                self._show(event)
            case CheckpointSaved() if not self._checkpoints.put_off(event):
                self._save_checkpoint(event, f"epoch-{counted(event.epoch)}")
            case ArtifactLogged():
                about = {"kind": event.kind, "aliases": event.aliases, "metadata": event.metadata}
                self._save(event.name, event.paths, about)
            case AlertRaised():
                text = f"[{event.level}] {event.title}\n{event.text}".rstrip()
                self._log("alerts", event, self._swanlab.Text(valid_text(text)))
            case RunEnded():
                if event.best is not None:
                    best = {event.best.metric: event.best.value}
                    self._configure({"best": {**best, "epoch": counted(event.best.epoch)}})
                self._configure({"ended": {"status": event.status, "reason": event.reason}})
                error = event.error.traceback if event.error is not None else event.reason
                self._finish(event.status, error)

    def _configure(self, values: Mapping[str, Any]) -> None:
        """Change the settings; those of a file are all that SwanLab shows of them."""
        config = self._state.config
        config |= {valid_text(key): plain(value) for key, value in flat(values).items()}
        self._run.config.update(config)

    def _log(self, name: str, event: Any, value: Any) -> None:
        """Log a value, on an axis of its own where its name stands on the other already."""
        steps, key = self._state.steps, self._names(name)
        kinds = [kind for kind in ("step", "epoch") if getattr(event, kind, None) is not None]
        if not kinds:  # where the run is, and counted, as it comes
            at = max(steps.get(key, -1) + 1, self._timeline.last)
        else:
            at = self._timeline(event)
            self._state.at = self._timeline.last
            if self._state.axes.setdefault(key, kinds[0]) != kinds[0]:
                key = self._names(f"{name} ({kinds[0]})")
        if at <= steps.get(key, -1):
            self.lost += 1
            if key not in self._repeated:
                self._repeated.add(key)
                logger.warning("SwanLab keeps the first value that %r had at step %d", key, at)
        steps[key] = max(at, steps.get(key, -1))
        self._run.log({key: value}, step=at)

    def _show(self, event: Any) -> None:
        try:
            value = media(event)
        except (ImportError, OSError, TypeError, ValueError, MissingPackageError) as error:
            self.lost += 1
            logger.warning("%r can't be shown in SwanLab: %s", event.key, error)
            return
        self._log(event.key, event, value)

    def _save_checkpoint(self, event: CheckpointSaved, name: str) -> None:
        about = {"epoch": counted(event.epoch), "step": event.step, "metrics": event.metrics}
        self._save(f"checkpoints/{name}", [event.path], {**about, "metadata": event.metadata})

    def _save(self, name: str, paths: Sequence[str], about: Mapping[str, Any]) -> None:
        if self._files is None:
            return
        kept = self._files.keep(name, paths)
        self.lost += len(paths) - kept
        if kept or not paths:
            self._configure({f"files/{name}": about})

    def _finish(self, status: str, error: str | None) -> None:
        run = self._run
        if run is None:
            return
        try:
            for event in self._checkpoints.at_end():
                self._save_checkpoint(event, event.kind)
        finally:
            self._run = None
            session.finish(run, status, error)
        if self._folder is not None:
            self._state.taken = self._taken.last
            state.close(self._folder, self._state)
