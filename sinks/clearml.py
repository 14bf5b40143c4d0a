"""Takes a run to ClearML: into an offline session that `clearml-task` imports later.

Guarantees: one archive an attempt, written when it ends; no main task is made, so that ClearML
hooks, seeds and patches nothing, and a task of the user's own stays the current one; that the
process is offline is undone with the last run; names are never cut into one.
"""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainbus.errors import MissingPackageError, SinkError
from trainbus.events import (
    AlertRaised,
    ArtifactLogged,
    CheckpointSaved,
    EpochEnded,
    EpochStarted,
    ImageLogged,
    MetricsLogged,
    ModelDescribed,
    ParamsUpdated,
    Record,
    RunEnded,
    RunStarted,
    TextLogged,
    UnknownEvent,
)
from trainbus.interfaces import RunInfo, Sink
from trainbus.toolkit.sinks import (
    LatestCheckpoints,
    Names,
    SeenRecords,
    Timeline,
    check_folder,
    flat,
    folder_of,
    is_wanted,
    metric_name,
    model_values,
    side_by_side,
    x_position,
)

from . import _clearml_session as session
from ._clearml_charts import show
from ._clearml_names import clean, file_name, project_name, title_and_series
from ._clearml_options import ClearmlOptions

logger = logging.getLogger("trainbus.sinks.clearml")

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
"""What the sink relies on; `trainbus doctor` looks whether it is there."""

_MOST_WAITING = 500
"""Records that ClearML may keep before its thread has written them; it has no bound of its own."""

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class ClearmlSink(Sink):
    """Feeds one offline session of ClearML."""

    Options = ClearmlOptions
    service = "clearml"
    durable_only_after_close = True
    options: ClearmlOptions

    def __init__(self, options: ClearmlOptions | None = None) -> None:
        super().__init__(options)
        self._task: Any = None
        self._folder = Path()
        self._location: str | None = None

    def check(self) -> str:
        """Make sure that the package is there and the folder can be written.

        Raises:
            MissingPackageError: clearml is not installed.
            SinkError: the folder can't be written.
        """
        if find_spec("clearml") is None:
            raise MissingPackageError("clearml", extra="clearml")
        return check_folder(self.options.dir)

    def open(self, run: RunInfo) -> None:
        """Begin the session of an attempt; what an earlier process left of it is replaced.

        Raises:
            MissingPackageError: clearml is not installed.
            SinkError: the folder can't be written, or a ClearML task is online in this process.
        """
        options, started = self.options, run.started
        self.lost = 0
        self._names, self._files = Names(clean), Names(file_name)
        self._overwritten = LatestCheckpoints(options.save_checkpoints)
        self._timeline, self._waiting = Timeline(), 0
        self._taken = SeenRecords()
        self._tags = list(dict.fromkeys([*options.tags, *started.tags, f"run:{run.id}"]))
        # A sink that lost what it held, or need not be told all again, begins another part.
        part = f"-{run.resume_after}" if run.resume_after else ""
        name = f"{Names(file_name, 80)(run.id)}-{run.attempt}{part}"
        self._folder = folder_of(options.dir, run.id) / name
        self._task = session.begin(
            self._folder,
            project=project_name(options.project or started.project or "trainbus"),
            name=file_name(options.task_name or started.name or run.id),
            tags=self._tags,
            about={"trainbus/run": run.id, "trainbus/attempt": run.attempt},
        )
        self._logger = self._task.get_logger()
        self._location = (
            f"clearml-task --import-offline-session {shlex.quote(f'{self._folder}.zip')}"
        )

    def write(self, records: Sequence[Record]) -> None:
        """Report the records that are new.

        Raises:
            SinkError: nothing was opened.
        """
        if self._task is None:
            raise SinkError("write came before open; call open(run) first")
        for record in self._taken.new(records):
            self._take(record.event)
            self._waiting += 1
            if self._waiting >= _MOST_WAITING:
                session.wait(self._task)
                self._waiting = 0

    def close(self) -> None:
        """End the session, and make it an archive.

        Raises:
            SinkError: ClearML wrote none, which it does not tell.
        """
        task, self._task = self._task, None
        if task is not None:
            session.end(task, self._folder)

    def wants_files(self, event: CheckpointSaved | ArtifactLogged) -> bool:
        """Return whether the files of an event are sent."""
        return is_wanted(self.options.save_checkpoints, event)

    @property
    def location(self) -> str | None:
        """The command that uploads the session."""
        return self._location

    def _take(self, event: object) -> None:
        match event:
            case RunStarted():
                names = ("group", "job_type", "task", "framework", "framework_version")
                known = {name: getattr(event, name) for name in names if getattr(event, name)}
                self._task.update_parameters({f"trainbus/{k}": v for k, v in known.items()})
                if event.notes:
                    self._task.set_comment(event.notes)
                self._log_params(event.params)
            case ParamsUpdated():
                self._log_params(event.params)
            case ModelDescribed():
                for name, value in model_values(event).items():
                    self._log_single(name, value)
            case MetricsLogged():
                at = self._timeline(event)
                for name, value in event.values.items():
                    if event.final:
                        self._log_single(metric_name(name, final=True), value)
                    elif math.isfinite(value):
                        place = title_and_series(self._names(name))
                        self._logger.report_scalar(*place, value, at)
                    else:
                        self._say(f"{name} is {value} at {at}")
            case TextLogged():
                self._say(f"{event.key} at {self._timeline(event)}:\n{event.text}")
            case AlertRaised():
                self._say(f"{event.title}: {event.text}", _LEVELS[event.level])
            case CheckpointSaved():
                if not self._overwritten.put_off(event):
                    self._log_checkpoint(event, f"periodic-{x_position(event)}")
            case ArtifactLogged():
                about = {"kind": event.kind, **event.metadata}
                for path, name in side_by_side(event.paths).items():
                    self._log_file(path, f"{event.name}/{name}", about)
            case RunEnded():
                self._take_end(event)
            case EpochStarted() | EpochEnded() | UnknownEvent():
                pass
            case _:
                self._show(event)

    def _say(self, text: str, level: int = logging.INFO) -> None:
        self._logger.report_text(text, level=level, print_console=False)

    def _log_params(self, params: Mapping[str, Any]) -> None:
        found = {f"General/{self._names(k)}": _plain(v) for k, v in flat(params).items()}
        self._task.update_parameters(found)

    def _log_single(self, name: str, value: float) -> None:
        # ClearML makes 0 of what is not finite.
        if math.isfinite(value):
            self._logger.report_single_value(self._names(name), value)
        else:
            self._say(f"{name} is {value}")

    def _show(self, event: Any) -> None:
        """Report a picture, chart or table; one that can't be shown costs only itself."""
        try:
            at = self._timeline(event)
            show(self._logger, event, self._names, at)
            if isinstance(event, ImageLogged) and event.caption:
                self._say(f"{event.key} at {at}: {event.caption}")
        except (OSError, TypeError, ValueError) as error:
            self.lost += 1
            logger.warning("%r can't be shown in ClearML: %s", event.key, error)

    def _log_checkpoint(self, event: CheckpointSaved, name: str) -> None:
        epoch = None if event.epoch is None else event.epoch + 1
        self._log_file(event.path, name, {"epoch": epoch, **event.metrics, **event.metadata})

    def _log_file(self, path: str, name: str, about: Mapping[str, Any]) -> None:
        known = {k: str(v) for k, v in about.items() if v is not None}
        try:
            if not Path(path).exists():
                raise FileNotFoundError(f"no file at {path}")
            key = self._files(name)
            if not self._task.upload_artifact(key, Path(path), known, wait_on_upload=True):
                raise OSError(f"ClearML refused {path}")
        except (OSError, ValueError) as error:
            self.lost += 1
            logger.warning("%r can't be kept in ClearML: %s", name, error)

    def _take_end(self, event: RunEnded) -> None:
        told: dict[str, Any] = {"status": event.status, "ended": event.reason}
        if event.best is not None:
            self._log_single(f"best/{event.best.metric}", event.best.value)
            if event.best.epoch is not None:
                told["best_epoch"] = event.best.epoch + 1
        self._task.update_parameters({f"trainbus/{k}": v for k, v in told.items() if v is not None})
        if event.status != "finished":
            # An import marks every task completed.
            self._task.set_tags([*self._tags, event.status])
        if event.status == "failed":
            text = event.error.traceback or event.error.message if event.error else event.reason
            self._say(text or "failed", logging.ERROR)
        for saved in self._overwritten.at_end():
            self._log_checkpoint(saved, saved.kind)


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | list | None) else str(value)
