"""Sends a run to Trackio: metrics, pictures, tables, histograms, reports, alerts, artifacts.

Guarantees: rows are written directly into the project's database, so no thread, server or run of
Trackio remains in the process and a run of the user's is untouched; each record has one key there,
so that records which come again, after a crash or in a replay, change nothing.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from msgspec import Meta

from trainbus import events
from trainbus.interfaces import FilePath, Options, RunInfo
from trainbus.toolkit.plots import picture
from trainbus.toolkit.sinks import (
    Names,
    SaveCheckpoints,
    SeenRecords,
    Superseded,
    TrackerSink,
    best_values,
    check_folder,
    flat,
    is_wanted,
    metric_name,
    model_values,
    set_fields,
    to_json,
    utf8,
)

from .files import Artifacts
from .session import Database, import_trackio, iso

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
"""Names that the sink relies on; `trainbus doctor` checks that they exist."""


Project = Annotated[
    str,
    Meta(
        pattern=r"^(?!registry-)\w[\w .-]*$",
        max_length=128,
        extra={
            "expected": "a Trackio project name: letters, digits, _ - . and spaces, not "
            "beginning with `registry-`"
        },
        description="Project; by default the run's, made valid",
    ),
]
Folder = Annotated[
    FilePath,
    Meta(
        min_length=1,
        description="Folder for the databases; a process can use only one "
        "folder; by default Trackio's own: "
        "`TRACKIO_DIR`, else `trackio` in Hugging Face's cache",
    ),
]


class TrackioOptions(Options, frozen=True, kw_only=True):
    """Options of the `trackio` sink; the training provides what is not set here."""

    project: Project | None = None
    dir: Folder | None = None
    save_checkpoints: SaveCheckpoints = "best"


class TrackioSink(TrackerSink):
    """Feeds one Trackio run, in the database of its project."""

    Options = TrackioOptions
    service = "trackio"
    tracker = "Trackio"
    shares_process = False  # Trackio has one folder per process
    options: TrackioOptions

    _database: Database | None = None

    def check(self) -> str:
        """Make sure that the package is installed and its folder can be written.

        Raises:
            MissingPackageError: trackio is not installed.
            SinkError: the folder can't be used.
        """
        import_trackio(self.options.dir)
        from trackio import utils

        return check_folder(str(utils.TRACKIO_DIR))

    def open(self, run: RunInfo) -> None:
        """Open the project's database, and find what it has of this run.

        Raises:
            MissingPackageError: trackio is not installed.
            SinkError: the project or the folder can't be used.
        """
        super().open(run)
        self._trackio = import_trackio(self.options.dir)
        from trackio import utils

        self._seen, self._database = SeenRecords(), None
        self._names = Names(_valid_name)
        self._has_best, self._superseded = False, Superseded()
        self._database = Database(self.options.project, run)
        self._artifacts = Artifacts(self._database, self.lose)
        command = f"trackio show --project {shlex.quote(self._database.project)}"
        prefix = f"TRACKIO_DIR={shlex.quote(str(utils.TRACKIO_DIR))} " if self.options.dir else ""
        self._location = prefix + command

    def write(self, records: Sequence[events.Record]) -> None:
        """Store the records that are new.

        Raises:
            SinkError: the database can't be written.
        """
        assert self._database is not None
        try:
            for record in self._seen.new(records):
                self._take(self._database, record)
        finally:
            self._database.store()

    def flush(self) -> None:
        """Store rows that could not be stored before.

        Raises:
            SinkError: the database can't be written.
        """
        if self._database is not None:
            self._database.store()

    def close(self) -> None:
        """Store rows that could not be stored before, and count the checkpoints that are lost."""
        try:
            self.flush()
        finally:
            if self._database is not None:
                self.lose_superseded(self._superseded)

    def _take(self, database: Database, record: events.Record) -> None:
        trackio, event = self._trackio, record.event
        match event:
            case events.RunStarted():
                database.config.setdefault("_Created", iso(record.time))
                database.config["_Group"] = event.group
                names = ("tags", "notes", "job_type", "task", "framework", "framework_version")
                about = {f"trainbus.{k}": v for k, v in set_fields(event, *names).items()}
                database.configure(record, {**flat(event.params), **about})
            case events.ParamsUpdated():
                database.configure(record, flat(event.params))
            case events.ModelDescribed():
                classes = {"model/classes": event.classes} if event.classes else {}
                database.configure(record, {**model_values(event), **classes})
            case events.MetricsLogged():
                self._log_metrics(database, record, event)
            case events.ImageLogged() | events.CurveLogged() | events.ConfusionMatrixLogged():
                self._show(database, record, event)
            case events.TableLogged():
                given = event.columns
                columns = [n if given.index(n) == i else f"{n} ({i})" for i, n in enumerate(given)]
                table = trackio.Table(columns, event.rows)
                self._log_object(database, record, table._to_dict("", ""))
            case events.HistogramLogged():
                histogram = trackio.Histogram(np_histogram=(event.counts, event.edges))
                self._log_object(database, record, histogram._to_dict())
            case events.TextLogged():
                self._log_object(database, record, trackio.Markdown(event.text)._to_dict())
            case events.CheckpointSaved():
                self._take_checkpoint(database, event)
            case events.ArtifactLogged():
                self._artifacts.store(event)
            case events.AlertRaised():
                database.alert(record, event)
            case events.RunEnded():
                self.lose_superseded(self._superseded)
                about = {"status": event.status, "reason": event.reason, **best_values(event)}
                database.configure(record, {f"trainbus.{k}": v for k, v in about.items()})

    def _log_metrics(
        self, database: Database, record: events.Record, event: events.MetricsLogged
    ) -> None:
        values = {
            self._names(metric_name(name, final=event.final)): to_json(value)
            for name, value in event.values.items()
        }
        if values and event.phase == "system" and event.step is None and event.epoch is None:
            database.log_system(record, values)
        elif values:
            database.log(record, database.place(event), values)

    def _log_object(
        self, database: Database, record: events.Record, value: Mapping[str, Any]
    ) -> None:
        event: Any = record.event
        database.log(record, database.place(event), {self._names(event.key): to_json(value)})

    def _show(self, database: Database, record: events.Record, event: Any) -> None:
        """Store a picture in Trackio's media folder, under the same name in a replay."""
        from trackio.media import get_project_media_path
        from trackio.utils import MEDIA_DIR

        with self.showing(event.key):
            content, suffix = picture(event)
            folder = get_project_media_path(database.project, database.name, database.place(event))
            path = folder / f"{database.key(record)}{suffix}"
            path.write_bytes(content)
            shown = {
                "_type": self._trackio.Image.TYPE,
                "file_path": str(path.relative_to(MEDIA_DIR)),
                "caption": getattr(event, "caption", None),
            }
            self._log_object(database, record, shown)

    def _take_checkpoint(self, database: Database, event: events.CheckpointSaved) -> None:
        wanted = self.options.save_checkpoints
        if not is_wanted(wanted, event, has_best=self._has_best):
            return
        if not os.path.exists(event.path):
            self._superseded.missed(event)
            return
        self._has_best |= event.kind == "best"
        is_for_best = self._has_best and wanted == "best"
        self._superseded.stored(event.kind, *(["last"] if is_for_best else []))
        about = {"epoch": event.epoch, "step": event.step, "metrics": event.metrics}
        artifact = events.ArtifactLogged(
            name=f"{database.run}-{event.kind}",
            kind="model",
            paths=[event.path],
            aliases=[event.kind],
            metadata={**about, **event.metadata},
        )
        # A file that the trainer overwrites in each epoch has only one version here, too.
        self._artifacts.store(artifact, overwrite=event.kind != "periodic")


def _valid_name(name: str) -> str:
    """Return a metric's name that is not one of Trackio's own."""
    from trackio.utils import RESERVED_KEYS

    name = utf8(name).removeprefix("__")
    return f"{name}_" if name in RESERVED_KEYS else name
