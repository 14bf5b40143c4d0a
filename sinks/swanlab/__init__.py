"""Sends a run to SwanLab: settings, metrics, images, charts, tables, texts, files.

Guarantees: SwanLab leaves no signal or exception handler in the process; nothing about the machine,
the terminal or the repository is collected; a value that SwanLab drops because its step has one
already is counted. SwanLab can't continue its files: each process that delivers writes a file of
its own under the id of the run, and an incomplete one is set aside.
"""

from __future__ import annotations

import atexit
import glob
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from trainbus import events
from trainbus.interfaces import FilePath, Options, RunInfo
from trainbus.toolkit.sinks import (
    MAIN,
    LatestCheckpoints,
    Names,
    SaveCheckpoints,
    SeenRecords,
    Timeline,
    TrackerSink,
    check_folder,
    check_package,
    epochs_done,
    flat,
    metric_name,
    required_package,
    set_fields,
    to_json,
    utf8,
)

from . import session
from .charts import media

logger = logging.getLogger("trainbus.sinks.swanlab")

TESTED_VERSIONS = "0.10.3"
_REQUIRED_NAMES = (
    "init has_run Settings.Probe Settings.Terminal Image Text ECharts "
    "Run.log Run.save Run.finish Run._handle_atexit "
    "echarts.Bar echarts.HeatMap echarts.Line echarts.Table echarts.options"
)
REQUIRED_NAMES = tuple(f"swanlab:{name}" for name in _REQUIRED_NAMES.split())
"""Names that the sink needs; `trainbus doctor` checks that they exist."""


class SwanlabOptions(Options, frozen=True, kw_only=True):
    """Options of the `swanlab` sink; the training provides what is not set here."""

    project: (
        Annotated[
            str,
            Meta(
                pattern=r"^[0-9a-zA-Z_+.-]+$",
                max_length=100,
                extra={"expected": "a SwanLab project name: 1 to 100 letters, digits, _ - + and ."},
                description="Project; by default the run's, with invalid characters replaced",
            ),
        ]
        | None
    ) = None
    workspace: Annotated[str, Meta(description="User or team that owns the project")] | None = None
    mode: (
        Annotated[
            Literal["cloud", "offline", "local", "disabled"],
            Meta(description="Where to log the run; by default `SWANLAB_MODE`, else `cloud`"),
        ]
        | None
    ) = None
    logdir: (
        Annotated[
            FilePath,
            Meta(
                min_length=1,
                description="Folder for SwanLab's files; `{run}` is replaced by the run's id; by "
                "default `SWANLAB_LOG_DIR`, else `swanlog`",
            ),
        ]
        | None
    ) = None
    save_checkpoints: SaveCheckpoints = "best"


class SwanlabSink(TrackerSink):
    """Feeds one SwanLab run."""

    Options = SwanlabOptions
    service = "swanlab"
    tracker = "SwanLab"
    durable_only_after_close = True
    shares_process = False
    options: SwanlabOptions

    _run: Any = None

    def check(self) -> str:
        """Check that swanlab is installed and that the folder can be written.

        Raises:
            MissingPackageError: swanlab is not installed.
            SinkError: the folder can't be written.
        """
        check_package("swanlab")
        return check_folder(self.options.logdir or "swanlog")

    def open(self, run: RunInfo) -> None:
        """Start a SwanLab run, or continue the one with the same id.

        Raises:
            MissingPackageError: swanlab is not installed.
            SinkError: SwanLab can't start the run, or has one open in this process.
        """
        super().open(run)
        with required_package("swanlab"):
            import swanlab
        self._swanlab = swanlab
        self._names, self._folder_names = Names(_valid_key, longest=512), Names(_folder_name)
        self._repeated: set[str] = set()
        self._checkpoints = LatestCheckpoints(self.options.save_checkpoints)
        self._run = session.start(self.options, run)
        atexit.unregister(self._run._handle_atexit)  # the sink finishes the run
        session.limit_queue(self._run)
        self._folder = None if self._run.mode == "disabled" else Path(self._run.dir).absolute()
        self._state = session.load_state(self._folder, run)
        self._timeline = Timeline(self._state.last)
        self._seen = SeenRecords(last={MAIN: self._state.seen, **self._state.streams})
        is_new = self._seen.last[MAIN][0] < run.attempt
        self._configure(run.started.params if is_new else {})
        self._location = session.location(self._run, self._folder)

    def write(self, records: Sequence[events.Record]) -> None:
        """Log the records that are new."""
        for record in self._seen.new(records):
            self._write(record.event)

    def close(self) -> None:
        """Finish the run; without a `RunEnded` event it is marked as crashed."""
        self._finish("failed", "the training did not report its end")

    def _write(self, event: object) -> None:
        match event:
            case events.ParamsUpdated():
                self._configure(event.params)
            case events.ModelDescribed():
                self._configure({"model": set_fields(event)})
            case events.MetricsLogged():
                for name, value in event.values.items():
                    self._log(metric_name(name, final=event.final), event, value)
            case (
                events.ImageLogged()
                | events.CurveLogged()
                | events.ConfusionMatrixLogged()
                | events.TableLogged()
                | events.HistogramLogged()
                | events.TextLogged()
            ):
                shown: Any = None
                with self.showing(event.key):
                    shown = media(event)
                if shown is not None:
                    self._log(event.key, event, shown)
            case events.CheckpointSaved() if not self._checkpoints.put_off(event):
                self._save_checkpoint(event, f"epoch-{epochs_done(event.epoch)}")
            case events.ArtifactLogged():
                metadata = {"kind": event.kind, "aliases": event.aliases}
                self._save(event.name, event.paths, {**metadata, "metadata": event.metadata})
            case events.AlertRaised():
                text = f"[{event.level}] {event.title}\n{event.text}".rstrip()
                self._log("alerts", event, self._swanlab.Text(utf8(text)))
            case events.RunEnded():
                if event.best is not None:
                    best = {event.best.metric: event.best.value}
                    self._configure({"best": {**best, "epoch": epochs_done(event.best.epoch)}})
                self._configure({"ended": {"status": event.status, "reason": event.reason}})
                error = event.error.traceback if event.error is not None else event.reason
                self._finish(event.status, error)

    def _configure(self, values: Mapping[str, Any]) -> None:
        """Update the config; each file has the whole of it, as SwanLab shows one file's only."""
        config = self._state.config
        config |= {utf8(key): to_json(value) for key, value in flat(values).items()}
        self._run.config.update(config)

    def _log(self, name: str, event: Any, value: Any) -> None:
        """Log a value, under another key if the key has values on the other axis already."""
        steps, key = self._state.steps, self._names(name)
        kinds = [kind for kind in ("step", "epoch") if getattr(event, kind, None) is not None]
        if not kinds:  # at the last metric's position, but never at the same one twice
            at = max(steps.get(key, -1) + 1, self._timeline.last)
        else:
            at = self._timeline(event)
            self._state.last = self._timeline.last
            if self._state.axes.setdefault(key, kinds[0]) != kinds[0]:
                key = self._names(f"{name} ({kinds[0]})")
        if at <= steps.get(key, -1):
            self.lost += 1
            if key not in self._repeated:
                self._repeated.add(key)
                logger.warning("SwanLab keeps only the first value of %r at step %d", key, at)
        steps[key] = max(at, steps.get(key, -1))
        self._run.log({key: value}, step=at)

    def _save_checkpoint(self, event: events.CheckpointSaved, name: str) -> None:
        metadata = {"epoch": epochs_done(event.epoch), "step": event.step, "metrics": event.metrics}
        metadata["metadata"] = event.metadata
        self._save(f"checkpoints/{name}", [event.path], metadata)

    def _save(self, name: str, paths: Sequence[str], metadata: Mapping[str, Any]) -> None:
        """Save copies of files and folders: SwanLab itself would only link to them."""
        if self._folder is None:
            return
        base, saved = self._folder / "trainbus", 0
        folder, names = base / self._folder_names(name), [Path(path).name for path in paths]
        for number, (path, file_name) in enumerate(zip(map(Path, paths), names, strict=True)):
            is_first = names.index(file_name) == number
            target = folder / (file_name if is_first else f"{number}-{file_name}")
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                if path.is_dir():
                    shutil.copytree(path, target, dirs_exist_ok=True)
                else:
                    shutil.copyfile(path, target)
            except OSError as error:
                self.lose(name, error)
                continue
            saved += 1
            for file in [target, *target.rglob("*")]:
                if file.is_file():
                    self._run.save(glob.escape(str(file)), base_path=str(base), policy="now")
        if saved or not paths:
            self._configure({f"files/{name}": metadata})

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
            streams = dict(self._seen.last)
            self._state.seen, self._state.streams = streams.pop(MAIN), streams
            session.save_state(self._folder, self._state)


def _valid_key(name: str) -> str:
    """Return a key that SwanLab accepts: no control characters, no dots or slashes at its ends."""
    name = re.sub(r"[\x00-\x1f\x7f]", "_", utf8(name)).removeprefix("__swanlab__.")
    return name.strip(" ./")


def _folder_name(name: str) -> str:
    """Return a relative path without `.` and `..` parts."""
    return "/".join(re.sub(r"[^\w.-]|^\.+$", "-", part) or "-" for part in name.split("/"))
