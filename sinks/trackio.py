"""Takes a run to Trackio: metrics, pictures, tables, histograms, reports, alerts, artifacts.

Guarantees: rows go straight into the project's database, so no thread, server or run of Trackio's
is left in the process and a run of the user's is not touched; each record has one key there, so
that what comes again, after a crash or in a replay, changes nothing.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
import sqlite3
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
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
)
from trainbus.interfaces import Options, RunInfo, Sink
from trainbus.storing import Names, Taken, axis, check_folder, flat, metric_name

logger = logging.getLogger("trainbus.sinks.trackio")

TESTED = "0.43.0"
NEEDS = (
    "trackio:Image.TYPE",
    "trackio:Table._to_dict",
    "trackio:Histogram._to_dict",
    "trackio:Markdown._to_dict",
    "trackio:Artifact._build_manifest",
    "trackio.fragments:FragmentWriter.write_local",
    "trackio.fragments:import_records",
    "trackio.media:get_project_media_path",
    "trackio.sqlite_storage:SQLiteStorage.commit_artifact_version",
    "trackio.sqlite_storage:SQLiteStorage.get_max_step_for_run",
    "trackio.sqlite_storage:SQLiteStorage.get_run_config",
    "trackio.sqlite_storage:SQLiteStorage.get_run_records",
    "trackio.sqlite_storage:SQLiteStorage.validate_project_name",
    "trackio.utils:MEDIA_DIR",
    "trackio.utils:RESERVED_KEYS",
    "trackio.utils:get_storage_mode",
)
"""What the sink relies on; `trainbus doctor` looks whether it is there."""

_LEVELS = {"info": "info", "warning": "warn", "error": "error"}


class TrackioOptions(Options, frozen=True, kw_only=True):
    """Options of the `trackio` sink; what is not set here comes from the training."""

    project: (
        Annotated[
            str,
            Meta(
                pattern=r"^(?!registry-)\w[\w .-]*$",
                max_length=128,
                extra={
                    "expected": "a Trackio project name: letters, digits, _ - . and spaces, not "
                    "beginning with `registry-`"
                },
                description="Project; by default the trainer's, made valid",
            ),
        ]
        | None
    ) = None
    dir: (
        Annotated[
            str,
            Meta(
                min_length=1,
                description="Folder of the databases, one for a process; by default Trackio's own: "
                "`TRACKIO_DIR`, else `trackio` in Hugging Face's cache",
            ),
        ]
        | None
    ) = None
    save_checkpoints: Annotated[
        Literal["best", "last", "all", "none"],
        Meta(description="Checkpoints kept as artifacts; `best` keeps the last until one is best"),
    ] = "best"


class TrackioSink(Sink):
    """Feeds one Trackio run, in the database of its project."""

    Options = TrackioOptions
    service = "trackio"
    options: TrackioOptions

    def __init__(self, options: TrackioOptions | None = None) -> None:
        super().__init__(options)
        self._where: str | None = None
        self._run: str | None = None
        self._rows: list[dict[str, Any]] = []

    def check(self) -> str:
        """Make sure that the package is there and its folder can be written.

        Raises:
            MissingPackageError: trackio is not installed.
            SinkError: the folder can't be used.
        """
        _imported(self.options.dir)
        from trackio import utils

        return check_folder(str(utils.TRACKIO_DIR))

    def open(self, run: RunInfo) -> None:
        """Find the database of the project, and what it has of this run.

        Raises:
            MissingPackageError: trackio is not installed.
            SinkError: the project or the folder can't be used.
        """
        self._trackio = _imported(self.options.dir)
        from trackio import fragments, utils
        from trackio.sqlite_storage import SQLiteStorage

        self._fragments, self._utils, self._storage = fragments, utils, SQLiteStorage
        self._taken, self._rows, self.lost = Taken(), [], 0
        self._names = Names(self._clean)
        self._keys = Names(lambda key: _text(key).lstrip("_"))
        self._artifacts = Names(_artifact_name)
        self._has_best = False
        started = run.started
        self._project = self._project_name(self.options.project, started.project)
        self._run = run.id
        self._name = re.sub(r"[/\\\x00]|^\.+$", "-", started.name or run.id)
        self._name = _text(self._name)[:200]
        try:
            utils.TRACKIO_DIR.mkdir(parents=True, exist_ok=True)
            names = {r["id"]: r["name"] for r in SQLiteStorage.get_run_records(self._project)}
            self._name = names.get(run.id, self._name)
            stored = SQLiteStorage.get_run_config(self._project, run_id=run.id)
            step = SQLiteStorage.get_max_step_for_run(self._project, self._name, run_id=run.id)
            self._writer = None
            if utils.get_storage_mode() == "jsonl":  # on a network drive
                self._writer = fragments.FragmentWriter()
        except (OSError, sqlite3.Error) as error:
            text = f"can't use {utils.TRACKIO_DIR} ({error}); set another `dir`"
            raise SinkError(text) from error
        self._config: dict[str, Any] = dict(stored or {})
        self._step = step or 0
        command = f"trackio show --project {shlex.quote(self._project)}"
        prefix = f"TRACKIO_DIR={shlex.quote(str(utils.TRACKIO_DIR))} " if self.options.dir else ""
        self._where = prefix + command

    def write(self, records: Sequence[Record]) -> None:
        """Store the records that are new.

        Raises:
            SinkError: nothing was opened, or the database can't be written.
        """
        if self._run is None:
            raise SinkError("no run is open; call open(run) first")
        try:
            for record in self._taken.new(records):
                self._take(record)
        finally:
            self._store()

    def flush(self) -> None:
        """Store what could not be stored before."""
        self._store()

    def close(self) -> None:
        """Store what could not be stored before, and let go of the run."""
        try:
            self._store()
        finally:
            self._run = None

    def keeps(self, event: CheckpointSaved | ArtifactLogged) -> bool:
        """Return whether the files of an event become an artifact."""
        if isinstance(event, ArtifactLogged):
            return True
        wanted = self.options.save_checkpoints
        return wanted in ("all", event.kind) or (wanted == "best" and event.kind == "last")

    @property
    def where(self) -> str | None:
        """Command that shows the run."""
        return self._where

    def _take(self, record: Record) -> None:
        trackio, event = self._trackio, record.event
        match event:
            case RunStarted():
                self._configure(record, self._about(record, event))
            case ParamsUpdated():
                self._configure(record, flat(event.params))
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
                self._configure(record, about)
            case MetricsLogged():
                self._log_metrics(record, event)
            case ImageLogged() | CurveLogged() | ConfusionMatrixLogged():
                self._show(record, event)
            case TableLogged():
                names = event.columns
                names = [n if names.index(n) == i else f"{n} ({i})" for i, n in enumerate(names)]
                self._log_object(record, trackio.Table(names, event.rows)._to_dict("", ""))
            case HistogramLogged():
                histogram = trackio.Histogram(np_histogram=(event.counts, event.edges))
                self._log_object(record, histogram._to_dict())
            case TextLogged():
                self._log_object(record, trackio.Markdown(event.text)._to_dict())
            case CheckpointSaved() if self.keeps(event) and not self._is_superseded(event):
                self._has_best |= event.kind == "best"
                name = f"{self._run}-{event.kind}"
                metadata = {"epoch": event.epoch, "step": event.step, "metrics": event.metrics}
                metadata |= event.metadata
                # What the trainer overwrites at each epoch is not kept more often than there.
                replaces = event.kind != "periodic"
                kinds = [event.kind]
                self._keep(name, "model", [event.path], kinds, metadata, overwrite=replaces)
            case ArtifactLogged():
                self._keep(event.name, event.kind, event.paths, event.aliases, event.metadata)
            case AlertRaised():
                level = _LEVELS[event.level]
                alert: dict[str, Any] = {"level": level, "step": self._step}
                alert |= {"title": _text(event.title), "text": _text(event.text) or None}
                alert["alert_id"] = self._key(record)
                self._add(self._fragments.alert_record, record, alert)
            case RunEnded():
                ended: dict[str, Any] = {"status": event.status, "reason": event.reason}
                if event.best is not None:
                    ended[f"best/{event.best.metric}"] = event.best.value
                    ended["best/epoch"] = None if event.best.epoch is None else event.best.epoch + 1
                self._configure(record, {f"trainbus.{k}": v for k, v in ended.items()})

    def _about(self, record: Record, event: RunStarted) -> dict[str, Any]:
        """Return the parameters, and what a dashboard of Trackio's wants to know of a run."""
        self._config.setdefault("_Created", _iso(record.time))
        self._config["_Group"] = event.group
        names = ("tags", "notes", "job_type", "task", "framework", "framework_version")
        about = {f"trainbus.{name}": getattr(event, name) for name in names}
        return {**flat(event.params), **{k: v for k, v in about.items() if v}}

    def _configure(self, record: Record, values: Mapping[str, Any]) -> None:
        """Change the config, which is stored with a row; an empty one shows nothing."""
        self._config |= {self._keys(str(key)): _plain(value) for key, value in values.items()}
        self._log(record, 0, {}, config=dict(self._config))

    def _log_metrics(self, record: Record, event: MetricsLogged) -> None:
        values = {
            self._names(metric_name(name, final=event.final)): _plain(value)
            for name, value in event.values.items()
        }
        if values and event.phase == "system" and event.step is None and event.epoch is None:
            entry = {"metrics": values, "log_id": self._key(record)}
            self._add(self._fragments.system_metric_record, record, entry)
        elif values:
            self._log(record, axis(event), values)

    def _log_object(self, record: Record, value: Mapping[str, Any]) -> None:
        event: Any = record.event
        self._log(record, axis(event), {self._names(event.key): _plain(value)})

    def _show(self, record: Record, event: Any) -> None:
        """Store a picture where Trackio keeps them, under a name that a replay gives it again."""
        from trackio.media import get_project_media_path

        try:
            content, suffix = _picture(event)
            folder = get_project_media_path(self._project, self._name, axis(event))
            path = folder / f"{self._key(record)}{suffix}"
            path.write_bytes(content)
        except (OSError, TypeError, ValueError, MissingPackageError) as error:
            self.lost += 1
            logger.warning("%r can't be shown in Trackio: %s", event.key, error)
            return
        self._log_object(
            record,
            {
                "_type": self._trackio.Image.TYPE,
                "file_path": str(path.relative_to(self._utils.MEDIA_DIR)),
                "caption": getattr(event, "caption", None),
            },
        )

    def _is_superseded(self, event: CheckpointSaved) -> bool:
        wanted = self.options.save_checkpoints
        return wanted == "best" and event.kind == "last" and self._has_best

    def _keep(
        self,
        name: str,
        kind: str,
        paths: Sequence[str],
        aliases: Sequence[str],
        metadata: Mapping[str, Any],
        *,
        overwrite: bool = False,
    ) -> None:
        """Store files as a version of an artifact; the same files again are the same version."""
        try:
            artifact = self._trackio.Artifact(self._artifacts(name), kind)
            for number, path in enumerate(map(Path, paths)):
                is_first = path.name not in [Path(other).name for other in paths[:number]]
                inside = path.name if is_first else f"{number}/{path.name}"
                if path.is_dir():
                    artifact.add_dir(path, inside)
                elif path.is_file():
                    artifact.add_file(path, inside)
                else:
                    self.lost += 1
                    logger.warning("artifact %r: %s is gone", name, path)
            if not artifact._pending_files and paths:
                return
            self._storage.commit_artifact_version(
                project=self._project,
                name=artifact.name,
                type=kind,
                description=None,
                manifest=artifact._build_manifest(self._project),
                metadata=_plain(metadata),
                aliases=[_artifact_name(a) for a in aliases if not re.match(r"latest$|v\d+$", a)],
                run_name=self._name,
                run_id=self._run,
                overwrite=overwrite,
            )
        except (OSError, TypeError, ValueError, sqlite3.Error) as error:
            self.lost += 1
            logger.warning("artifact %r can't be kept in Trackio: %s", name, error)

    def _log(self, record: Record, step: int, values: Any, **more: Any) -> None:
        self._step = max(self._step, step)
        entry = {"metrics": values, "step": step, "log_id": self._key(record), **more}
        self._add(self._fragments.metric_record, record, entry)

    def _add(self, build: Any, record: Record, entry: Mapping[str, Any]) -> None:
        run = {"project": self._project, "run": self._name, "run_id": self._run}
        self._rows.append(build({**run, **entry}) | {"timestamp": _iso(record.time)})

    def _store(self) -> None:
        if not self._rows:
            return
        try:
            if self._writer is None:
                self._fragments.import_records(self._rows)
            else:
                self._writer.write_local(self._rows)
        except (OSError, sqlite3.Error) as error:
            text = f"Trackio's database can't be written ({error}); check {self._utils.TRACKIO_DIR}"
            raise SinkError(text, retry=True) from error
        self._rows = []

    def _key(self, record: Record) -> str:
        return f"{self._run}-{record.attempt}-{record.seq}"

    def _clean(self, name: str) -> str:
        name = _text(name).removeprefix("__")
        return f"{name}_" if name in self._utils.RESERVED_KEYS else name

    def _project_name(self, wanted: str | None, given: str | None) -> str:
        name: str = wanted or _text(given or "").strip() or "trainbus"
        try:
            self._storage.validate_project_name(name)
        except ValueError as error:
            if wanted is not None:
                raise SinkError(f"{error}; set another `project`") from error
            return f"trainbus-{name}-runs"
        return name


def _imported(folder: str | None) -> Any:
    """Import Trackio, which keeps all it stores in the folder that it finds when it is imported."""
    wanted = None if folder is None else Path(folder).expanduser().absolute()
    before = os.environ.get("TRACKIO_DIR")
    is_new = "trackio" not in sys.modules
    if wanted is not None and is_new:
        os.environ["TRACKIO_DIR"] = str(wanted)
    try:
        import trackio
        from trackio.utils import TRACKIO_DIR
    except ImportError as error:
        raise MissingPackageError("trackio", extra="trackio") from error
    finally:
        if before is not None:
            os.environ["TRACKIO_DIR"] = before
        elif wanted is not None and is_new:
            os.environ.pop("TRACKIO_DIR", None)
    if wanted is not None and wanted != TRACKIO_DIR.absolute():
        raise SinkError(
            f"Trackio stores in {TRACKIO_DIR} in this process already, not in {wanted}; leave out "
            "`dir`, or set `isolation: process`"
        )
    return trackio


def _picture(event: Any) -> tuple[bytes, str]:
    """Return a picture, and the suffix of its file."""
    if isinstance(event, ImageLogged) and event.path is not None:
        return Path(event.path).read_bytes(), Path(event.path).suffix
    array = getattr(event, "array", None)
    content = drawn(event) if array is None else png(array)
    if content is None:
        raise ValueError("it has neither a path nor an array")
    return content, ".png"


def _iso(time: float) -> str:
    return datetime.fromtimestamp(time, timezone.utc).isoformat()


def _text(text: str) -> str:
    """Return a text that can be written as UTF-8."""
    return text.encode("utf-8", "replace").decode()


def _artifact_name(name: str) -> str:
    """Return a name that Trackio takes: letters, digits, `.`, `_` and `-`."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name) or "artifact"


def _plain(value: Any) -> Any:
    """Return a value that fits into JSON, non-finite numbers spelled as Trackio spells them."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        return {_text(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, bool | float) or value is None:
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else str(value)
    return _plain(value.item()) if hasattr(value, "item") and value.size == 1 else str(value)
