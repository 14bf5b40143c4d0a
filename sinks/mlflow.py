"""Takes a run to MLflow: parameters, metrics, pictures, tables, texts, files, and how it ended.

Guarantees: only MLflow's client is used, so no active run or setting of the user's is touched; the
position of the last record is a tag, and what comes again has the names and times that it had, so
that nothing is there twice; a server that is down is noticed at once and left to the bus to retry.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from trainbus.drawing import drawn, png
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
    encode,
)
from trainbus.interfaces import Options, RunInfo, Sink
from trainbus.storing import Names, Taken, axis, check_folder, flat, metric_name

logger = logging.getLogger("trainbus.sinks.mlflow")

TESTED = "3.17.2"
NEEDS = (
    "mlflow:Image",
    "mlflow:MlflowClient.delete_tag",
    "mlflow:MlflowClient.log_artifact",
    "mlflow:MlflowClient.log_artifacts",
    "mlflow:MlflowClient.log_batch",
    "mlflow:MlflowClient.search_runs",
    "mlflow:MlflowClient.set_terminated",
    "mlflow.entities:Metric",
    "mlflow.entities:Param",
    "mlflow.entities:RunTag",
    "mlflow.exceptions:MlflowException.get_http_status_code",
    "mlflow.utils.validation:MAX_PARAM_VAL_LENGTH",
    "mlflow.utils.validation:MAX_TAG_VAL_LENGTH",
)
"""What the sink relies on; `trainbus doctor` looks whether it is there."""

_TELEMETRY = "MLFLOW_DISABLE_TELEMETRY"
_OWN_PROCESS = {
    _TELEMETRY: "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Set where the process is the sink's: the bus itself tries again, and does so without an end."""

_RUN, _POSITION, _BEST = "trainbus.run", "trainbus.position", "checkpoint.best"
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_METRICS_AT_ONCE, _PARAMS_AT_ONCE = 200, 20  # what is in a request of 1 MB, however long it is
_THUMBNAIL = 256


class MlflowOptions(Options, frozen=True, kw_only=True):
    """Options of the `mlflow` sink; what is not set here comes from the training."""

    tracking_uri: (
        Annotated[
            str,
            Meta(
                pattern=r"^(databricks|(?!file:)[A-Za-z][A-Za-z0-9+.-]*:.+)$",
                extra={
                    "expected": "a URI such as `sqlite:///mlflow.db` or `http://host:5000`; "
                    "MLflow's store of plain files is no more"
                },
                description="Database or server; by default `MLFLOW_TRACKING_URI`, else "
                "`sqlite:///mlflow.db`",
            ),
        ]
        | None
    ) = None
    experiment: (
        Annotated[
            str,
            Meta(
                pattern=r"\S",
                max_length=500,
                extra={"expected": "an MLflow experiment name: 1 to 500 characters, not blank"},
                description="Experiment; by default the trainer's project, else `Default`",
            ),
        ]
        | None
    ) = None
    run_name: (
        Annotated[str, Meta(min_length=1, max_length=250, description="Name of the run")] | None
    ) = None
    artifact_location: (
        Annotated[
            str,
            Meta(
                min_length=1,
                description="Where files are kept, if the experiment is made by this sink; by "
                "default MLflow decides: the server's store, or `./mlruns` beside a database",
            ),
        ]
        | None
    ) = None
    save_checkpoints: Annotated[
        Literal["best", "last", "all", "none"],
        Meta(description="Checkpoints kept as artifacts; `best` keeps the last until one is best"),
    ] = "best"
    tags: Annotated[dict[str, str], Meta(description="Tags of the run, with values")] | None = None


class MlflowSink(Sink):
    """Feeds one MLflow run."""

    Options = MlflowOptions
    service = "mlflow"
    options: MlflowOptions

    def __init__(self, options: MlflowOptions | None = None) -> None:
        super().__init__(options)
        self._client: Any = None
        self._id: str | None = None
        self._where: str | None = None

    def check(self) -> str:
        """Ask the server, or make sure that the database can be written.

        Raises:
            MissingPackageError: mlflow is not installed.
            PermissionError: the server refuses.
            SinkError: the server is down, or the database's folder can't be written.
        """
        self._mlflow = _imported()
        given = self.options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._uri = _absolute(given or "sqlite:///mlflow.db")
        if self._uri.startswith("sqlite:///"):
            return check_folder(Path(self._uri.removeprefix("sqlite:///")).parent)
        with self._asking():
            self._mlflow.MlflowClient(self._uri).search_experiments(max_results=1)
        return "the server answers"

    def open(self, run: RunInfo) -> None:
        """Find the experiment, or make it, and what it has of this run.

        Raises:
            MissingPackageError: mlflow is not installed.
            PermissionError: the server refuses.
            SinkError: the server is down, or the experiment can't be used.
        """
        self._client, self._id, self._where = None, None, None
        self.lost, self._info = 0, run
        self._names, self._paths = Names(_name), Names(_path, 120)
        if run.pid is not None:
            for name, value in _OWN_PROCESS.items():
                os.environ.setdefault(name, value)
        self._mlflow = _imported()
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_TAG_VAL_LENGTH

        self._longest_param, self._longest_tag = MAX_PARAM_VAL_LENGTH, MAX_TAG_VAL_LENGTH
        given = self.options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._uri = _absolute(given or "sqlite:///mlflow.db")
        with self._asking():
            client = self._mlflow.MlflowClient(self._uri)
            name = self.options.experiment or _text(run.started.project or "").strip()[:500]
            self._experiment = self._find_experiment(client, name or "Default")
            self._client = client
            self._find()

    def _find_experiment(self, client: Any, name: str) -> str:
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(client.create_experiment(name, self.options.artifact_location))
            except self._mlflow.MlflowException:
                found = client.get_experiment_by_name(name)  # another process was faster
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise SinkError(
                f"the MLflow experiment {name!r} is deleted; set another `experiment`, or run "
                f"`mlflow experiments restore -x {found.experiment_id}`"
            )
        return str(found.experiment_id)

    def _find(self) -> None:
        """Read from MLflow what it has of the run; what was not sent yet comes again."""
        filter_ = f"tags.`{_RUN}` = '{self._info.id}'"
        found = self._client.search_runs([self._experiment], filter_, max_results=1)
        run = found[0] if found else None
        self._id = run.info.run_id if run else None
        self._is_running = run is None or run.info.status == "RUNNING"
        self._known: dict[str, str] = dict(run.data.params) if run else {}
        self._noted: dict[str, str] = dict(run.data.tags) if run else {}
        self._taken = Taken(last=_position(self._noted.get(_POSITION)))
        self._sent = self._taken.last
        self._metrics: list[Any] = []
        self._params: list[Any] = []
        self._tags: dict[str, str] = {}
        self._is_stale = False
        if self._id is not None:
            self._where = self._address(self._id)

    def write(self, records: Sequence[Record]) -> None:
        """Log the records that are new.

        Raises:
            PermissionError: the server refuses.
            SinkError: nothing was opened, or MLflow can't take it; `retry` where it is down.
        """
        if self._client is None:
            raise SinkError("no run is open; call open(run) first")
        with self._asking():
            if self._is_stale:
                self._find()
            self._is_stale = True  # until all of it is there
            for record in self._taken.new(records):
                self._begin(record)
                self._take(record)
                if len(self._metrics) >= _METRICS_AT_ONCE:
                    self._send()
            self._send()
            self._is_stale = False

    def keeps(self, event: CheckpointSaved | ArtifactLogged) -> bool:
        """Return whether the files of an event become artifacts."""
        wanted = self.options.save_checkpoints
        if isinstance(event, ArtifactLogged) or wanted == "all":
            return True
        return wanted != "none" and event.kind in ("last", wanted)

    def close(self) -> None:
        """Let go of the client; a run whose end was not written stays as it is."""
        self._client = None

    @property
    def where(self) -> str | None:
        """Address of the run, or the command that shows it."""
        return self._where

    def _address(self, run: str) -> str:
        if self._uri.startswith("http"):
            return f"{_shown(self._uri)}/#/experiments/{self._experiment}/runs/{run}"
        if self._uri.startswith("databricks"):
            return f"{self._uri}: experiment {self._experiment}, run {run}"
        return f"mlflow ui --backend-store-uri {shlex.quote(_shown(self._uri))}"

    def _begin(self, record: Record) -> None:
        if self._id is None:
            name = self.options.run_name or _text(self._info.started.name or "") or self._info.id
            self._id = self._client.create_run(
                self._experiment,
                start_time=int(record.time * 1000),
                tags={_RUN: self._info.id},
                run_name=name[:250],
            ).info.run_id
            self._where = self._address(str(self._id))
        elif not self._is_running:
            self._client.update_run(self._id, status="RUNNING")
        self._is_running = True

    def _send(self) -> None:
        """Send what was gathered; the position goes with, or after, all that it stands for."""
        if self._taken.last == self._sent:
            return
        from mlflow.entities import RunTag

        tags = [RunTag(name, value) for name, value in self._tags.items()]
        while self._params or tags or len(self._metrics) > _METRICS_AT_ONCE:
            parts = self._metrics[:_METRICS_AT_ONCE], self._params[:_PARAMS_AT_ONCE]
            self._client.log_batch(self._id, *parts, tags[:_PARAMS_AT_ONCE])
            del self._metrics[:_METRICS_AT_ONCE], self._params[:_PARAMS_AT_ONCE]
            del tags[:_PARAMS_AT_ONCE]
        position = RunTag(_POSITION, "{}.{}".format(*self._taken.last))
        self._client.log_batch(self._id, metrics=self._metrics, tags=[position])
        self._sent, self._metrics, self._tags = self._taken.last, [], {}

    def _take(self, record: Record) -> None:
        event = record.event
        match event:
            case RunStarted():
                self._start(event)
            case ParamsUpdated():
                self._log_params(event.params)
            case ModelDescribed():
                self._log(record, _model_values(event), 0)
                if event.classes:
                    self._file("model", json.dumps({"classes": event.classes}), "classes.json")
            case MetricsLogged():
                named = {metric_name(k, final=event.final): v for k, v in event.values.items()}
                self._log(record, named, axis(event))
            case ImageLogged():
                self._picture(record, event)
            case CurveLogged() | ConfusionMatrixLogged() | HistogramLogged():
                self._picture(record, event)
                self._file(f"data/{event.key}", encode(record), f"{_stamp(record)}.json")
            case TableLogged():
                self._table(record, event)
            case TextLogged():
                self._file(f"text/{event.key}", event.text, f"{_stamp(record)}.txt")
            case CheckpointSaved():
                self._checkpoint(record, event)
            case ArtifactLogged():
                about = _plain(record, "kind", "aliases", "metadata")
                self._tag(f"artifact/{event.name}", json.dumps(about))
                for path, folder in _placed(event.paths).items():
                    self._upload(path, self._paths(f"artifacts/{event.name}") + folder)
            case AlertRaised():
                self._tag("alert", f"{event.level}: {event.title}")
                text = f"{event.level}: {event.title}\n{event.text}"
                self._file("alerts", text, f"{_stamp(record)}.txt")
            case RunEnded():
                self._end(record, event)

    def _start(self, event: RunStarted) -> None:
        for stale in {"ended", "error"} & self._noted.keys():
            self._client.delete_tag(self._id, stale)
            del self._noted[stale]
        for tag in event.tags:
            self._tag(tag, "true")
        names = ("group", "job_type", "task", "framework", "framework_version", "save_dir")
        about = {name: getattr(event, name) for name in names}
        for name, value in {**about, "mlflow.note.content": event.notes}.items():
            if value:
                self._tag(name, value)
        for name, value in (self.options.tags or {}).items():
            self._tag(name, value)
        self._tag(_RUN, self._info.id)  # whatever a tag of the training is called
        self._log_params(event.params)

    def _log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters; MLflow keeps the first value of each, so a later one becomes a tag."""
        from mlflow.entities import Param

        for name, value in flat(params).items():
            text = self._cut(name, _text(str(value)), self._longest_param)
            key, later = self._names(name), self._names(f"updated/{name}")
            if key not in self._known:
                self._known[key] = text
                self._params.append(Param(key, text))
            elif text != self._noted.get(later, self._known[key]):
                self._tag(f"updated/{name}", text)

    def _tag(self, name: str, value: str) -> None:
        key = self._names(name)
        self._noted[key] = self._tags[key] = self._cut(name, _text(value), self._longest_tag)

    def _log(self, record: Record, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        time = int(record.time * 1000)
        self._metrics += [Metric(self._names(k), v, time, step) for k, v in values.items()]

    def _picture(self, record: Record, event: Any) -> None:
        """Log a picture as `log_image` does, but under a name that is the same the next time."""
        with tempfile.TemporaryDirectory() as folder:
            images = Path(folder, "images")
            images.mkdir()
            stem = "+".join(
                (
                    self._paths(event.key).replace("/", "~"),
                    f"step+{axis(event)}+timestamp+{int(record.time * 1000)}",
                    str(uuid.uuid5(uuid.NAMESPACE_OID, f"{record.run} {record.position}")),
                )
            )
            try:
                source = Path(folder, "source")
                source.write_bytes(_pixels(event))
                image = self._mlflow.Image(str(source))
                image.save(str(images / f"{stem}.png"))
                scale = _THUMBNAIL / max(image.size)
                small = image.resize(tuple(max(round(side * scale), 1) for side in image.size))
                small.save(str(images / f"{stem}+compressed.webp"))
            # A picture that can't be made is not a reason to stop.
            except (OSError, ValueError, TypeError, ImportError, MissingPackageError) as error:
                self._lose(event.key, error)
                return
            self._upload(str(images), "images")
        self._tag("mlflow.loggedImages", "True")

    def _table(self, record: Record, event: TableLogged) -> None:
        """Log a table as `log_table` does, which would append what comes again."""
        rows = _plain(record, "rows").get("rows", [])
        name = f"{_stamp(record)}.json"
        text = json.dumps({"columns": event.columns, "data": rows})
        folder = self._file(f"tables/{event.key}", text, name)
        tables = json.loads(self._noted.get("mlflow.loggedArtifacts", "[]"))
        table = {"path": f"{folder}/{name}", "type": "table"}
        listed = json.dumps([*tables, *([table] if table not in tables else [])])
        if len(listed) <= self._longest_tag:
            self._tag("mlflow.loggedArtifacts", listed)

    def _checkpoint(self, record: Record, event: CheckpointSaved) -> None:
        if not self.keeps(event):
            return
        wanted = self.options.save_checkpoints
        if wanted == "best" and event.kind == "last" and _BEST in self._noted:
            return
        at = f"step-{event.step}" if event.epoch is None else f"epoch-{event.epoch + 1}"
        place = f"checkpoints/{at if event.kind == 'periodic' else event.kind}"
        if self._upload(event.path, place):
            about = _plain(record, "epoch", "step", "metrics", "metadata")
            about = {"path": f"{place}/{Path(event.path).name}", **about}
            self._tag(f"checkpoint.{event.kind}", json.dumps(about))

    def _end(self, record: Record, event: RunEnded) -> None:
        self._tag("ended", event.reason or event.status)
        if event.error is not None:
            self._tag("error", f"{event.error.type}: {event.error.message}")
            if event.error.traceback:
                self._file("errors", event.error.traceback, f"attempt-{record.attempt}.txt")
        if event.best is not None:
            step = 0 if event.best.epoch is None else event.best.epoch + 1
            self._log(record, {f"best/{event.best.metric}": event.best.value}, step)
        end = int(record.time * 1000)
        self._client.set_terminated(self._id, _STATUS[event.status], end)
        self._is_running = False

    def _file(self, folder: str, content: str | bytes, name: str) -> str:
        """Log a text or JSON as a file, and return the folder that it is in."""
        data = content if isinstance(content, bytes) else _text(content).encode()
        folder = self._paths(folder)
        with tempfile.TemporaryDirectory() as made:
            Path(made, name).write_bytes(data)
            self._upload(str(Path(made, name)), folder)
        return folder

    def _upload(self, path: str, folder: str) -> bool:
        """Return whether a file, or the files of a folder, are among the artifacts now."""
        try:
            if os.path.isdir(path):
                name = "" if folder == "images" else f"/{Path(path).name}"
                self._client.log_artifacts(self._id, path, folder + name)
            elif os.path.isfile(path):
                self._client.log_artifact(self._id, path, folder)
            else:
                raise FileNotFoundError(f"no file at {path}")
        # The store for files may need a package or a right that the metrics don't.
        except (FileNotFoundError, ImportError, PermissionError) as error:
            self._lose(folder, error)
            return False
        return True

    def _lose(self, name: str, error: Exception) -> None:
        self.lost += 1
        logger.warning("%r can't be kept in MLflow: %s", name, error)

    def _cut(self, name: str, text: str, longest: int) -> str:
        if len(text) > longest:
            logger.warning("%r: MLflow keeps %d of %d characters", name, longest, len(text))
        return text[:longest]

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Turn MLflow's errors into such as tell the bus whether to try again."""
        place = _shown(self._uri)
        _reach(self._uri)
        try:
            yield
        except self._mlflow.MlflowException as error:
            status = error.get_http_status_code()
            text = f"MLflow at {place} failed: {_shown(str(error))}"
            if status in (401, 403):
                advice = "check MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN"
                raise PermissionError(f"{text}; {advice}") from error
            # A database says by 503 that it is locked or away, and by 500 that something is wrong.
            is_away = status >= (500 if self._uri.startswith(("http", "databricks")) else 502)
            raise SinkError(text, retry=is_away or status in (408, 429)) from error


def _imported() -> Any:
    """Return mlflow; an import by this sink does not start MLflow's telemetry."""
    given = os.environ.get(_TELEMETRY)
    os.environ[_TELEMETRY] = given or "true"
    try:
        import mlflow
    except ImportError as error:
        raise MissingPackageError("mlflow", extra="mlflow") from error
    finally:
        if given is None:
            os.environ.pop(_TELEMETRY, None)
    return mlflow


def _reach(uri: str) -> None:
    """Ask a server for a sign of life: MLflow's client would try for minutes, and tell nobody."""
    if not uri.startswith("http"):
        return
    import ssl
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import urlopen

    place, found = _shown(uri), ""
    try:
        urlopen(f"{place}/health", timeout=10).close()
    except HTTPError as error:  # it may have no such page, or ask for a password
        error.close()
        found = str(error) if error.code in (502, 503, 504) else ""
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        found = "" if isinstance(reason, ssl.SSLError) else str(reason)
    if found:
        raise SinkError(
            f"no MLflow server answers at {place} ({found}); start it, or set `tracking_uri`",
            retry=True,
        )


def _absolute(uri: str) -> str:
    """Return the URI of a database with the whole path of its file, in a folder that exists."""
    kind, separator, path = uri.partition(":///")
    if kind != "sqlite" or not separator or path in ("", ":memory:"):
        return uri.rstrip("/")
    file = Path(path).expanduser().absolute()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SinkError(f"can't make {file.parent}: {error}; set another `tracking_uri`") from error
    return f"sqlite:///{file}"


def _shown(text: str) -> str:
    """Return a URI, or a text with some, without names and passwords."""
    return re.sub(r"(?<=://)[^@/\s]*@", "", text)


def _position(text: str | None) -> tuple[int, int]:
    try:
        attempt, seq = (text or "").split(".")
        return int(attempt), int(seq)
    except ValueError:
        return 0, 0


def _name(name: str) -> str:
    """Return the name of a metric, parameter or tag with nothing in it that MLflow refuses."""
    return _joined(re.sub(r"[^\w./\- :]", "_", name))


def _path(path: str) -> str:
    """Return a path of an artifact that every store takes."""
    return _joined(re.sub(r"[^A-Za-z0-9_./ -]", "_", path))


def _joined(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def _text(text: str) -> str:
    """Return a text that can be written: half of a character is replaced."""
    return text.encode("utf-8", "replace").decode().replace("\x00", "")


def _stamp(record: Record) -> str:
    """Return a name that no other record has, and that sorts by its place on the axis."""
    at = 0 if isinstance(record.event, AlertRaised) else axis(record.event)
    return "{:06}-{}.{}".format(at, *record.position)


def _plain(record: Record, *names: str) -> dict[str, Any]:
    """Return fields of an event as JSON has them, where NaN is a text."""
    event = json.loads(encode(record))["event"]
    return {name: event[name] for name in names if name in event}


def _model_values(event: ModelDescribed) -> dict[str, float]:
    known = {
        **{name: getattr(event, name) for name in ("parameters", "gradients", "layers", "gflops")},
        **{f"speed_{name}_ms": value for name, value in event.speed_ms.items()},
        **event.extra,
    }
    return {f"model/{name}": float(v) for name, v in known.items() if v is not None}


def _pixels(event: Any) -> bytes:
    if not isinstance(event, ImageLogged):
        return drawn(event) or b""
    return Path(event.path or "").read_bytes() if event.array is None else png(event.array)


def _placed(paths: Sequence[str]) -> dict[str, str]:
    """Return for each path the folder that its file goes to: "", unless two have one name."""
    names = [os.path.basename(path) for path in paths]
    if len(set(names)) == len(set(paths)):
        return dict.fromkeys(paths, "")
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    folders = {p: os.path.relpath(os.path.dirname(os.path.abspath(p)), root) for p in paths}
    return {path: "" if at == "." else f"/{_path(at)}" for path, at in folders.items()}
