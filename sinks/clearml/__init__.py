"""Sends a run to ClearML as an offline session, which `clearml-task` imports later.

Guarantees: each attempt becomes one archive, written when the attempt ends; no main task is
created, so ClearML installs no hooks, sets no seeds and patches nothing, and a task of the user
stays the current one; the process leaves offline mode after its last run; different names stay
different.
"""

from __future__ import annotations

import io
import logging
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from trainbus import events
from trainbus.interfaces import FilePath, Options, RunInfo
from trainbus.toolkit.plots import picture
from trainbus.toolkit.sinks import (
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
    folder_of,
    metric_name,
    model_values,
    set_fields,
    side_by_side,
    x_position,
)

from . import session
from .charts import figure

TESTED_VERSIONS = "2.1.12"
REQUIRED_NAMES = (
    "clearml:Task._create",
    "clearml:Task.current_task",
    "clearml:Task.is_offline",
    "clearml:Task.get_offline_mode_folder",
    "clearml:Task.update_parameters",
    "clearml:Task.upload_artifact",
    *(f"clearml:Logger.report_{what}" for what in ("plotly", "media", "single_value")),
    "clearml.backend_api:Session._offline_mode",
    "clearml.backend_interface.base:InterfaceBase._offline_mode",
    "clearml.backend_interface.base:InterfaceBase._default_session",
)
"""Names that the sink needs; `trainbus doctor` checks that they exist."""

_MAX_PENDING = 500
"""Records that ClearML may hold in memory before they are written; it has no limit of its own."""

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class ClearmlOptions(Options, frozen=True, kw_only=True):
    """Options of the `clearml` sink; it needs neither a server nor credentials."""

    project: (
        Annotated[str, Meta(min_length=1, description="Project; by default the run's")] | None
    ) = None
    task_name: (
        Annotated[str, Meta(min_length=1, description="Task name; by default the run's name")]
        | None
    ) = None
    tags: Annotated[tuple[str, ...], Meta(description="Tags to add to the run's")] = ()
    dir: Annotated[
        FilePath,
        Meta(
            min_length=1, description="Folder for the archives; `{run}` is replaced by the run's id"
        ),
    ] = "clearml"
    save_checkpoints: SaveCheckpoints = "best"


class ClearmlSink(TrackerSink):
    """Writes one offline session of ClearML."""

    Options = ClearmlOptions
    service = "clearml"
    tracker = "ClearML"
    durable_only_after_close = True
    options: ClearmlOptions

    _task: Any = None

    def check(self) -> str:
        """Check that clearml is installed and that the folder can be written.

        Raises:
            MissingPackageError: clearml is not installed.
            SinkError: the folder can't be written.
        """
        check_package("clearml")
        return check_folder(self.options.dir)

    def open(self, run: RunInfo) -> None:
        """Start the session of an attempt; it replaces an unfinished one of an earlier process.

        Raises:
            MissingPackageError: clearml is not installed.
            SinkError: the folder can't be written, or a ClearML task is online in this process.
        """
        super().open(run)
        options, started = self.options, run.started
        self._names, self._files = Names(_printable), Names(_file_name)
        self._checkpoints = LatestCheckpoints(options.save_checkpoints)
        self._timeline, self._pending = Timeline(), 0
        self._seen = SeenRecords()
        self._tags = list(dict.fromkeys([*options.tags, *started.tags, f"run:{run.id}"]))
        # Records up to `resume_after` are in an earlier archive, which must not be replaced.
        part = f"-{run.resume_after}" if run.resume_after else ""
        name = f"{Names(_file_name, 80)(run.id)}-{run.attempt}{part}"
        self._folder = folder_of(options.dir, run.id) / name
        self._task = session.start(
            self._folder,
            project=_project_name(options.project or started.project or "trainbus"),
            name=_file_name(options.task_name or started.name or run.id),
            tags=self._tags,
            params={"trainbus/run": run.id, "trainbus/attempt": run.attempt},
        )
        self._logger = self._task.get_logger()
        archive = shlex.quote(f"{self._folder}.zip")
        self._location = f"clearml-task --import-offline-session {archive}"

    def write(self, records: Sequence[events.Record]) -> None:
        """Report the records that are new."""
        for record in self._seen.new(records):
            self._write(record.event)
            self._pending += 1
            if self._pending >= _MAX_PENDING:
                session.wait(self._task)
                self._pending = 0

    def close(self) -> None:
        """End the session and archive it.

        Raises:
            SinkError: ClearML wrote no archive.
        """
        task, self._task = self._task, None
        if task is not None:
            session.end(task, self._folder)

    def _write(self, event: object) -> None:
        match event:
            case events.RunStarted():
                self._log_run(
                    set_fields(event, "group", "job_type", "task", "framework", "framework_version")
                )
                if event.notes:
                    self._task.set_comment(event.notes)
                self._log_params(event.params)
            case events.ParamsUpdated():
                self._log_params(event.params)
            case events.ModelDescribed():
                for name, value in model_values(event).items():
                    self._log_single(name, value)
            case events.MetricsLogged():
                at = self._timeline(event)
                for name, value in event.values.items():
                    if event.final:
                        self._log_single(metric_name(name, final=True), value)
                    elif math.isfinite(value):
                        place = _title_and_series(self._names(name))
                        self._logger.report_scalar(*place, value, at)
                    else:
                        self._log_text(f"{name} is {value} at {at}")
            case events.TextLogged():
                self._log_text(f"{event.key} at {self._timeline(event)}:\n{event.text}")
            case events.AlertRaised():
                self._log_text(f"{event.title}: {event.text}", _LEVELS[event.level])
            case events.CheckpointSaved():
                if not self._checkpoints.put_off(event):
                    self._log_checkpoint(event, f"periodic-{x_position(event)}")
            case events.ArtifactLogged():
                metadata = {"kind": event.kind, **event.metadata}
                for path, name in side_by_side(event.paths).items():
                    self._log_file(path, f"{event.name}/{name}", metadata)
            case events.RunEnded():
                self._end(event)
            case _ if hasattr(event, "key"):  # an image, chart or table
                with self.showing(event.key):
                    self._show(event)

    def _log_text(self, text: str, level: int = logging.INFO) -> None:
        self._logger.report_text(text, level=level, print_console=False)

    def _log_run(self, values: Mapping[str, Any]) -> None:
        self._task.update_parameters({f"trainbus/{name}": value for name, value in values.items()})

    def _log_params(self, params: Mapping[str, Any]) -> None:
        found = {f"General/{self._names(k)}": _plain(v) for k, v in flat(params).items()}
        self._task.update_parameters(found)

    def _log_single(self, name: str, value: float) -> None:
        # ClearML turns NaN and ±Inf into 0.
        if math.isfinite(value):
            self._logger.report_single_value(self._names(name), value)
        else:
            self._log_text(f"{name} is {value}")

    def _show(self, event: Any) -> None:
        place, at = _title_and_series(self._names(event.key)), self._timeline(event)
        if not isinstance(event, events.ImageLogged):
            self._logger.report_plotly(*place, figure(event), at)
            return
        data, suffix = picture(event)
        # Bytes instead of the path: ClearML reads files later, when they may have changed.
        self._logger.report_media(
            *place,
            iteration=at,
            stream=io.BytesIO(data),
            file_extension=suffix or ".png",
            max_history=-1,
        )
        if event.caption:
            self._log_text(f"{event.key} at {at}: {event.caption}")

    def _log_checkpoint(self, event: events.CheckpointSaved, name: str) -> None:
        epoch = epochs_done(event.epoch)
        self._log_file(event.path, name, {"epoch": epoch, **event.metrics, **event.metadata})

    def _log_file(self, path: str, name: str, metadata: Mapping[str, Any]) -> None:
        known = {k: str(v) for k, v in metadata.items() if v is not None}
        try:
            if not Path(path).exists():
                raise FileNotFoundError(f"no file at {path}")
            key = self._files(name)
            if not self._task.upload_artifact(key, Path(path), known, wait_on_upload=True):
                raise OSError(f"ClearML rejected {path}")
        except (OSError, ValueError) as error:
            self.lose(name, error)

    def _end(self, event: events.RunEnded) -> None:
        values: dict[str, Any] = {"status": event.status, "ended": event.reason}
        if event.best is not None:
            self._log_single(f"best/{event.best.metric}", event.best.value)
            values["best_epoch"] = epochs_done(event.best.epoch)
        self._log_run({name: value for name, value in values.items() if value is not None})
        if event.status != "finished":
            # The import marks every task as completed.
            self._task.set_tags([*self._tags, event.status])
        if event.status == "failed":
            text = event.error.traceback or event.error.message if event.error else event.reason
            self._log_text(text or "failed", logging.ERROR)
        for saved in self._checkpoints.at_end():
            self._log_checkpoint(saved, saved.kind)


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | list | None) else str(value)


def _printable(name: str) -> str:
    """Return a name without unprintable characters and without `.` or `..` as a path part."""
    found = "".join(c if c.isprintable() else "_" for c in name).strip() or "_"
    return "/".join("_" if part in (".", "..") else part for part in found.split("/"))


def _file_name(name: str) -> str:
    """Return a name that is also a valid file name."""
    return re.sub(r"[^\w .=+@,-]", "_", name).strip(" .") or "_"


def _project_name(name: str) -> str:
    """Return a project name, in which `/` separates subprojects."""
    return "/".join(_file_name(part) for part in name.split("/") if part.strip(" .")) or "_"


def _title_and_series(name: str) -> tuple[str, str]:
    """Return a name as ClearML's title and series; different names never get the same pair."""
    title, _, series = name.rpartition("/")
    return (title, series) if title and series and title != series else (name, name)
