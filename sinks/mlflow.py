"""Takes a run to MLflow: parameters, metrics, pictures, tables, texts, files, and how it ended.

Guarantees: only MLflow's client is used, so no active run or setting of the user's is touched; the
position of the last record is a tag, and what comes again has the names and times that it had, so
that nothing is there twice; a server that is down is noticed at once and left to the bus to retry.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from trainbus.errors import SinkError
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
    encode,
)
from trainbus.interfaces import RunInfo, Sink
from trainbus.toolkit.sinks import Superseded, is_wanted, metric_name

from ._mlflow_artifacts import Artifacts
from ._mlflow_checkpoints import Checkpoints
from ._mlflow_options import MlflowOptions
from ._mlflow_run import RUN, TrackedRun
from ._mlflow_store import Store
from ._mlflow_text import clean_text, fields

logger = logging.getLogger("trainbus.sinks.mlflow")

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
"""What the sink relies on; `trainbus doctor` looks whether it is there."""

_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


class MlflowSink(Sink):
    """Feeds one MLflow run."""

    Options = MlflowOptions
    service = "mlflow"
    options: MlflowOptions

    def __init__(self, options: MlflowOptions | None = None) -> None:
        super().__init__(options)
        self._client: Any = None
        self._location: str | None = None

    def check(self) -> str:
        """Ask the server, or make sure that the database can be written.

        Raises:
            MissingPackageError: mlflow is not installed.
            PermissionError: the server refuses.
            SinkError: the server is down, or the database's folder can't be written.
        """
        return Store(self.options.tracking_uri).check()

    def open(self, run: RunInfo) -> None:
        """Find the experiment, or make it, and what it has of this run.

        Raises:
            MissingPackageError: mlflow is not installed.
            PermissionError: the server refuses.
            SinkError: the server is down, or the experiment can't be used.
        """
        self._client, self._location = None, None
        self._superseded = Superseded()
        self.lost, self._info, options = 0, run, self.options
        self._name = options.run_name or clean_text(run.started.name or "") or run.id
        project = clean_text(run.started.project or "").strip()[:500]
        is_own = run.pid is not None
        self._store = Store(options.tracking_uri, base=run.base, in_own_process=is_own)
        with self._store.asking():
            client = self._store.client()
            self._experiment = self._store.experiment(
                client, options.experiment, project or "Default", options.artifact_location
            )
            self._client = client
            self._find()

    def _find(self) -> None:
        """Read from MLflow what it has of the run; what was not sent yet comes again."""
        self._run = TrackedRun(self._client, self._experiment, self._info.id)
        self._files = Artifacts(self._client, self._run, self._lose)
        self._checkpoints = Checkpoints(
            self.options.save_checkpoints,
            self._store,
            self._files,
            self._run,
            self._superseded,
            self._lose,
        )
        self._is_stale = False
        if self._run.id is not None:
            self._location = self._store.address(self._experiment, self._run.id)

    def write(self, records: Sequence[Record]) -> None:
        """Log the records that are new.

        Raises:
            PermissionError: the server refuses.
            SinkError: nothing was opened, or MLflow can't take it; `retry` where it is down.
        """
        if self._client is None:
            raise SinkError("no run is open; call open(run) first")
        with self._store.asking():
            if self._is_stale:
                self._find()
            self._is_stale = True  # until all of it is there
            for record in self._run.taken.new(records):
                run_id = self._run.begin(self._name, record.time)
                self._location = self._store.address(self._experiment, run_id)
                self._take(record)
                if self._run.is_full:
                    self._run.send()
            self._run.send()
            self._is_stale = False

    def wants_files(self, event: CheckpointSaved | ArtifactLogged) -> bool:
        """Return whether the files of an event become artifacts."""
        return is_wanted(self.options.save_checkpoints, event)

    def close(self) -> None:
        """Let go of the client; a run whose end was not written stays as it is."""
        if self._client is not None:
            self._checkpoints.end()
        self._client = None

    @property
    def location(self) -> str | None:
        """Address of the run, or the command that shows it."""
        return self._location

    def _take(self, record: Record) -> None:
        run, files, event = self._run, self._files, record.event
        match event:
            case RunStarted():
                self._start(event)
            case ParamsUpdated():
                run.log_params(event.params)
            case ModelDescribed():
                run.log(record, _model_values(event), 0)
                if event.classes:
                    files.write("model", json.dumps({"classes": event.classes}), "classes.json")
            case MetricsLogged():
                named = {metric_name(k, final=event.final): v for k, v in event.values.items()}
                run.log(record, named, run.timeline(event))
            case ImageLogged():
                files.picture(record, event)
            case CurveLogged() | ConfusionMatrixLogged() | HistogramLogged():
                files.picture(record, event)
                files.write(f"data/{event.key}", encode(record), f"{files.stamp(record)}.json")
            case TableLogged():
                files.table(record, event)
            case TextLogged():
                files.write(f"text/{event.key}", event.text, f"{files.stamp(record)}.txt")
            case CheckpointSaved():
                self._checkpoints.keep(record, event)
            case ArtifactLogged():
                about = fields(record, "kind", "aliases", "metadata")
                run.tag(f"artifact/{event.name}", json.dumps(about))
                files.keep(event.name, event.paths)
            case AlertRaised():
                title = f"{event.level}: {event.title}"
                run.tag("alert", title)
                files.write("alerts", f"{title}\n{event.text}", f"{files.stamp(record)}.txt")
            case RunEnded():
                self._end(record, event)

    def _start(self, event: RunStarted) -> None:
        run = self._run
        run.untag("ended", "error")
        names = ("group", "job_type", "task", "framework", "framework_version", "save_dir")
        about = {name: getattr(event, name) for name in names}
        tags = {
            **dict.fromkeys(event.tags, "true"),
            **{n: v for n, v in {**about, "mlflow.note.content": event.notes}.items() if v},
            **(self.options.tags or {}),
            RUN: self._info.id,  # whatever a tag of the training is called
        }
        for name, value in tags.items():
            run.tag(name, value)
        run.log_params(event.params)

    def _end(self, record: Record, event: RunEnded) -> None:
        run, best, error = self._run, event.best, event.error
        run.tag("ended", event.reason or event.status)
        if error is not None:
            run.tag("error", f"{error.type}: {error.message}")
            if error.traceback:
                self._files.write("errors", error.traceback, f"attempt-{record.attempt}.txt")
        if best is not None:
            step = run.timeline.last if best.epoch is None else best.epoch + 1
            run.log(record, {f"best/{best.metric}": best.value}, step)
        self._checkpoints.end()
        run.end(_STATUS[event.status], record.time)

    def _lose(self, name: str, error: Exception) -> None:
        self.lost += 1
        logger.warning("%r can't be kept in MLflow: %s", name, error)


def _model_values(event: ModelDescribed) -> dict[str, float]:
    known = {
        **{name: getattr(event, name) for name in ("parameters", "gradients", "layers", "gflops")},
        **{f"speed_{name}_ms": value for name, value in event.speed_ms.items()},
        **event.extra,
    }
    return {f"model/{name}": float(v) for name, v in known.items() if v is not None}
