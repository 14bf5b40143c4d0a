"""Sends a run to MLflow: parameters, metrics, pictures, tables, texts, files, and its status.

Guarantees: only MLflow's client is used, so the user's active run and settings are untouched; the
position of the last record is a tag, and records that come again get the same names and times, so
nothing is stored twice; a server that is down is noticed at once, and the bus retries.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

from msgspec import Meta

from trainbus import events
from trainbus.interfaces import FilePath, Options, RunInfo
from trainbus.toolkit.sinks import (
    SaveCheckpoints,
    Superseded,
    TrackerSink,
    epochs_done,
    metric_name,
    model_values,
    set_fields,
    to_json,
)

from .files import Artifacts, Checkpoints
from .rows import RUN, TrackedRun, clean_text
from .session import Store

TESTED_VERSIONS = "3.17.2"
REQUIRED_NAMES = (
    "mlflow:Image",
    *(f"mlflow:MlflowClient.log_{what}" for what in ("artifact", "artifacts", "batch")),
    *(f"mlflow:MlflowClient.{name}" for name in ("delete_tag", "search_runs", "set_terminated")),
    *(f"mlflow.entities:{name}" for name in ("Metric", "Param", "RunTag")),
    "mlflow.store.artifact.artifact_repository_registry:get_artifact_repository",
    "mlflow.tracking.context.git_context:GitRunContext",
    "mlflow.tracking.context.registry:resolve_tags",
    "mlflow.utils.git_utils:get_git_commit",
    "mlflow.exceptions:MlflowException.get_http_status_code",
    *(f"mlflow.utils.validation:MAX_{what}_VAL_LENGTH" for what in ("PARAM", "TAG")),
)
"""Names that the sink relies on; `trainbus doctor` checks that they exist."""

_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


TrackingUri = Annotated[
    str,
    Meta(
        pattern=r"^(databricks|(?!file:)[A-Za-z][A-Za-z0-9+.-]*:.+)$",
        extra={
            "expected": "a URI such as `sqlite:///mlflow.db` or `http://host:5000`; "
            "MLflow no longer has a store of plain files"
        },
        description="Database or server; by default `MLFLOW_TRACKING_URI`, else "
        "`sqlite:///mlflow.db`",
    ),
]
Experiment = Annotated[
    str,
    Meta(
        pattern=r"\S",
        max_length=500,
        extra={"expected": "an MLflow experiment name: 1 to 500 characters, not blank"},
        description="Experiment; by default `MLFLOW_EXPERIMENT_NAME` or `_ID`, else the "
        "run's project, else `Default`",
    ),
]
RunName = Annotated[str, Meta(min_length=1, max_length=250, description="Run name")]
Location = Annotated[
    FilePath,
    Meta(
        min_length=1,
        description="Where files are stored if this sink creates the experiment; by default the "
        "server's store, or, with a database, `mlruns` in the folder of the configuration file",
    ),
]


class MlflowOptions(Options, frozen=True, kw_only=True):
    """Options of the `mlflow` sink; the training provides what is not set here."""

    tracking_uri: TrackingUri | None = None
    experiment: Experiment | None = None
    run_name: RunName | None = None
    artifact_location: Location | None = None
    save_checkpoints: SaveCheckpoints = "best"
    tags: Annotated[dict[str, str], Meta(description="Further tags: name → value")] | None = None


class MlflowSink(TrackerSink):
    """Feeds one MLflow run."""

    Options = MlflowOptions
    service = "mlflow"
    tracker = "MLflow"
    options: MlflowOptions

    _client: Any = None

    def check(self) -> str:
        """Query the server, or make sure that the database can be written.

        Raises:
            MissingPackageError: mlflow is not installed.
            PermissionError: the server refuses.
            SinkError: the server is down, or the database's folder can't be written.
        """
        return Store(self.options.tracking_uri).check()

    def open(self, run: RunInfo) -> None:
        """Find or create the experiment, and find what it has of this run.

        Raises:
            MissingPackageError: mlflow is not installed.
            PermissionError: the server refuses.
            SinkError: the server is down, or the experiment can't be used.
        """
        super().open(run)
        self._client, self._superseded = None, Superseded()
        self._info, options = run, self.options
        self._name = options.run_name or clean_text(run.started.name or "") or run.id
        project = clean_text(run.started.project or "").strip()[:500]
        is_own = run.pid is not None
        self._store = Store(options.tracking_uri, base=run.base, in_own_process=is_own)
        with self._store.translated_errors():
            client = self._store.client()
            self._experiment = self._store.experiment(
                client, options.experiment, project or "Default", options.artifact_location
            )
            self._client = client
            self._find()

    def _find(self) -> None:
        """Read from MLflow what it has of the run; records that it lacks come again."""
        self._run = TrackedRun(self._client, self._experiment, self._info.id)
        self._files = Artifacts(self._client, self._run, self)
        self._checkpoints = Checkpoints(
            self.options.save_checkpoints, self._store, self._files, self._superseded, self
        )
        self._is_stale = False
        if self._run.id is not None:
            self._location = self._store.address(self._experiment, self._run.id)

    def write(self, records: Sequence[events.Record]) -> None:
        """Log the records that are new.

        Raises:
            PermissionError: the server refuses.
            SinkError: MLflow rejects it; `retry` where the server is down.
        """
        with self._store.translated_errors():
            if self._is_stale:
                self._find()
            self._is_stale = True  # until everything is sent
            for record in self._run.seen.new(records):
                run_id = self._run.begin(self._name, record.time)
                self._location = self._store.address(self._experiment, run_id)
                self._take(record)
                if self._run.is_full:
                    self._run.send()
            self._run.send()
            self._is_stale = False

    def close(self) -> None:
        """Release the client; a run without an end keeps its status."""
        if self._client is not None:
            self.lose_superseded(self._superseded)
        self._client = None

    def _take(self, record: events.Record) -> None:
        run, files, event = self._run, self._files, record.event
        match event:
            case events.RunStarted():
                self._start(event)
            case events.ParamsUpdated():
                run.log_params(event.params)
            case events.ModelDescribed():
                values = model_values(event).items()  # MLflow allows no brackets in names
                run.log(record, {k.replace("(ms)", "_ms"): float(v) for k, v in values}, 0)
                if event.classes:
                    files.write("model", json.dumps({"classes": event.classes}), "classes.json")
            case events.MetricsLogged():
                named = {metric_name(k, final=event.final): v for k, v in event.values.items()}
                run.log(record, named, run.timeline(event))
            case events.ImageLogged():
                files.picture(record, event)
            case events.CurveLogged() | events.ConfusionMatrixLogged() | events.HistogramLogged():
                files.picture(record, event)
                files.write(
                    f"data/{event.key}", events.encode(record), f"{files.stamp(record)}.json"
                )
            case events.TableLogged():
                files.table(record, event)
            case events.TextLogged():
                files.write(f"text/{event.key}", event.text, f"{files.stamp(record)}.txt")
            case events.CheckpointSaved():
                self._checkpoints.store(event)
            case events.ArtifactLogged():
                about = to_json(set_fields(event, "kind", "aliases", "metadata"))
                run.tag(f"artifact/{event.name}", json.dumps(about))
                files.store(event.name, event.paths)
            case events.AlertRaised():
                title = f"{event.level}: {event.title}"
                run.tag("alert", title)
                files.write("alerts", f"{title}\n{event.text}", f"{files.stamp(record)}.txt")
            case events.RunEnded():
                self._end(record, event)

    def _start(self, event: events.RunStarted) -> None:
        run = self._run
        run.untag("ended", "error")
        names = ("group", "job_type", "task", "framework", "framework_version", "save_dir")
        tags = {
            **dict.fromkeys(event.tags, "true"),
            **set_fields(event, *names),
            **({"mlflow.note.content": event.notes} if event.notes else {}),
            **(self.options.tags or {}),
            RUN: self._info.id,  # no tag of the training may replace it
        }
        for name, value in tags.items():
            run.tag(name, value)
        run.log_params(event.params)

    def _end(self, record: events.Record, event: events.RunEnded) -> None:
        run, best, error = self._run, event.best, event.error
        run.tag("ended", event.reason or event.status)
        if error is not None:
            run.tag("error", f"{error.type}: {error.message}")
            if error.traceback:
                self._files.write("errors", error.traceback, f"attempt-{record.attempt}.txt")
        if best is not None:
            step = epochs_done(best.epoch) or run.timeline.last
            run.log(record, {f"best/{best.metric}": best.value}, step)
        self.lose_superseded(self._superseded)
        run.end(_STATUS[event.status], record.time)
