"""Takes a run to Trackio: metrics, pictures, tables, histograms, reports, alerts, artifacts.

Guarantees: rows go straight into the project's database, so no thread, server or run of Trackio's
is left in the process and a run of the user's is not touched; each record has one key there, so
that what comes again, after a crash or in a replay, changes nothing.
"""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

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
    RunStarted,
    TableLogged,
    TextLogged,
)
from trainbus.interfaces import RunInfo, Sink
from trainbus.toolkit.plots import picture
from trainbus.toolkit.sinks import (
    Names,
    SeenRecords,
    Superseded,
    check_folder,
    flat,
    is_wanted,
    metric_name,
)

from ._trackio_artifacts import Artifacts
from ._trackio_database import Database, imported
from ._trackio_options import TrackioOptions
from ._trackio_values import iso, plain, valid_text

logger = logging.getLogger("trainbus.sinks.trackio")

TESTED_VERSIONS = "0.43.0"
_REQUIRED_NAMES = (
    ":Image.TYPE :Table._to_dict :Histogram._to_dict :Markdown._to_dict :Artifact._build_manifest "
    ".fragments:FragmentWriter.write_local .fragments:import_records "
    ".media:get_project_media_path "
    ".sqlite_storage:SQLiteStorage.commit_artifact_version "
    ".sqlite_storage:SQLiteStorage.get_max_step_for_run "
    ".sqlite_storage:SQLiteStorage.get_run_config .sqlite_storage:SQLiteStorage.get_run_records "
    ".sqlite_storage:SQLiteStorage.validate_project_name "
    ".utils:MEDIA_DIR .utils:RESERVED_KEYS .utils:get_storage_mode"
)
REQUIRED_NAMES = tuple(f"trackio{name}" for name in _REQUIRED_NAMES.split())
"""What the sink relies on; `trainbus doctor` looks whether it is there."""


class TrackioSink(Sink):
    """Feeds one Trackio run, in the database of its project."""

    Options = TrackioOptions
    service = "trackio"
    shares_process = False  # of two folders the first would get both runs
    options: TrackioOptions

    def __init__(self, options: TrackioOptions | None = None) -> None:
        super().__init__(options)
        self._location: str | None = None
        self._database: Database | None = None
        self._is_open = False

    def check(self) -> str:
        """Make sure that the package is there and its folder can be written.

        Raises:
            MissingPackageError: trackio is not installed.
            SinkError: the folder can't be used.
        """
        imported(self.options.dir)
        from trackio import utils

        return check_folder(str(utils.TRACKIO_DIR))

    def open(self, run: RunInfo) -> None:
        """Find the database of the project, and what it has of this run.

        Raises:
            MissingPackageError: trackio is not installed.
            SinkError: the project or the folder can't be used.
        """
        self._trackio = imported(self.options.dir)
        from trackio import utils

        self._taken, self._database, self.lost = SeenRecords(), None, 0
        self._names = Names(_valid_name)
        self._has_best, self._superseded = False, Superseded()
        self._database = Database(self.options, run)
        self._artifacts = Artifacts(self._database)
        self._is_open = True
        command = f"trackio show --project {shlex.quote(self._database.project)}"
        prefix = f"TRACKIO_DIR={shlex.quote(str(utils.TRACKIO_DIR))} " if self.options.dir else ""
        self._location = prefix + command

    def write(self, records: Sequence[Record]) -> None:
        """Store the records that are new.

        Raises:
            SinkError: nothing was opened, or the database can't be written.
        """
        if self._database is None or not self._is_open:
            raise SinkError("no run is open; call open(run) first")
        try:
            for record in self._taken.new(records):
                self._take(self._database, record)
        finally:
            self._database.store()

    def flush(self) -> None:
        """Store what could not be stored before."""
        if self._database is not None:
            self._database.store()

    def close(self) -> None:
        """Store what could not be stored before, and let go of the run."""
        try:
            self.flush()
        finally:
            if self._is_open:
                self._count_lost()
            self._is_open = False

    def wants_files(self, event: CheckpointSaved | ArtifactLogged) -> bool:
        """Return whether the files of an event become an artifact."""
        return is_wanted(self.options.save_checkpoints, event)

    @property
    def location(self) -> str | None:
        """Command that shows the run."""
        return self._location

    def _take(self, database: Database, record: Record) -> None:
        trackio, event = self._trackio, record.event
        match event:
            case RunStarted():
                database.config.setdefault("_Created", iso(record.time))
                database.config["_Group"] = event.group
                names = ("tags", "notes", "job_type", "task", "framework", "framework_version")
                about = {f"trainbus.{name}": getattr(event, name) for name in names}
                about = {name: value for name, value in about.items() if value}
                database.configure(record, {**flat(event.params), **about})
            case ParamsUpdated():
                database.configure(record, flat(event.params))
            case ModelDescribed():
                about = {
                    "parameters": event.parameters,
                    "gradients": event.gradients,
                    "layers": event.layers,
                    "gflops": event.gflops,
                    "classes": event.classes,
                    **{f"speed_{name}_ms": value for name, value in event.speed_ms.items()},
                    **event.extra,
                }
                about = {f"model.{k}": v for k, v in about.items() if v not in (None, [])}
                database.configure(record, about)
            case MetricsLogged():
                self._log_metrics(database, record, event)
            case ImageLogged() | CurveLogged() | ConfusionMatrixLogged():
                self._show(database, record, event)
            case TableLogged():
                given = event.columns
                columns = [n if given.index(n) == i else f"{n} ({i})" for i, n in enumerate(given)]
                table = trackio.Table(columns, event.rows)
                self._log_object(database, record, table._to_dict("", ""))
            case HistogramLogged():
                histogram = trackio.Histogram(np_histogram=(event.counts, event.edges))
                self._log_object(database, record, histogram._to_dict())
            case TextLogged():
                self._log_object(database, record, trackio.Markdown(event.text)._to_dict())
            case CheckpointSaved() if self._is_to_be_kept(event):
                if not os.path.exists(event.path):
                    self._superseded.missed(event)
                    return
                self._has_best |= event.kind == "best"
                is_for_best = self._has_best and self.options.save_checkpoints == "best"
                self._superseded.stored(event.kind, *(["last"] if is_for_best else []))
                about = {"epoch": event.epoch, "step": event.step, "metrics": event.metrics}
                artifact = ArtifactLogged(
                    name=f"{database.run}-{event.kind}",
                    kind="model",
                    paths=[event.path],
                    aliases=[event.kind],
                    metadata={**about, **event.metadata},
                )
                # What the trainer overwrites at each epoch is not kept more often than there.
                is_overwritten = event.kind != "periodic"
                self.lost += self._artifacts.keep(artifact, overwrite=is_overwritten)
            case ArtifactLogged():
                self.lost += self._artifacts.keep(event)
            case AlertRaised():
                database.alert(record, event)
            case RunEnded():
                self._count_lost()
                about = {"status": event.status, "reason": event.reason}
                if event.best is not None:
                    about[f"best/{event.best.metric}"] = event.best.value
                    about["best/epoch"] = None if event.best.epoch is None else event.best.epoch + 1
                database.configure(record, {f"trainbus.{k}": v for k, v in about.items()})

    def _count_lost(self) -> None:
        """Count checkpoints that were gone, and that no newer one took the place of."""
        for event in self._superseded.lost():
            self.lost += 1
            logger.warning("checkpoint %r: %s is gone", event.kind, event.path)

    def _log_metrics(self, database: Database, record: Record, event: MetricsLogged) -> None:
        values = {
            self._names(metric_name(name, final=event.final)): plain(value)
            for name, value in event.values.items()
        }
        if values and event.phase == "system" and event.step is None and event.epoch is None:
            database.log_system(record, values)
        elif values:
            database.log(record, database.place(event), values)

    def _log_object(self, database: Database, record: Record, value: Mapping[str, Any]) -> None:
        event: Any = record.event
        database.log(record, database.place(event), {self._names(event.key): plain(value)})

    def _show(self, database: Database, record: Record, event: Any) -> None:
        """Store a picture where Trackio keeps them, under a name that a replay gives it again."""
        from trackio.media import get_project_media_path
        from trackio.utils import MEDIA_DIR

        try:
            content, suffix = picture(event)
            folder = get_project_media_path(database.project, database.name, database.place(event))
            path = folder / f"{database.key(record)}{suffix}"
            path.write_bytes(content)
        except (OSError, TypeError, ValueError, MissingPackageError) as error:
            self.lost += 1
            logger.warning("%r can't be shown in Trackio: %s", event.key, error)
            return
        shown = {
            "_type": self._trackio.Image.TYPE,
            "file_path": str(path.relative_to(MEDIA_DIR)),
            "caption": getattr(event, "caption", None),
        }
        self._log_object(database, record, shown)

    def _is_to_be_kept(self, event: CheckpointSaved) -> bool:
        wanted = self.options.save_checkpoints
        is_superseded = wanted == "best" and event.kind == "last" and self._has_best
        return is_wanted(wanted, event) and not is_superseded


def _valid_name(name: str) -> str:
    """Return the name of a metric, if it is not one of Trackio's own."""
    from trackio.utils import RESERVED_KEYS

    name = valid_text(name).removeprefix("__")
    return f"{name}_" if name in RESERVED_KEYS else name
