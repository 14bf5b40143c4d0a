"""Takes a run to ClearML: into an offline session that `clearml-task` imports later.

Guarantees: one archive an attempt, written when it ends; no main task is made, so that ClearML
hooks, seeds and patches nothing, and a task of the user's own stays the current one; that the
process is offline is undone with the last run; names are never cut into one.
"""

from __future__ import annotations

import io
import logging
import math
import os
import re
import shlex
import shutil
import threading
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal
from zipfile import is_zipfile

import numpy as np
from msgspec import Meta

from trainbus.drawing import png
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

logger = logging.getLogger("trainbus.sinks.clearml")

TESTED = "2.1.12"
NEEDS = (
    "clearml:Task._create",
    "clearml:Task.current_task",
    "clearml:Task.is_offline",
    "clearml:Task.get_offline_mode_folder",
    "clearml:Task.update_parameters",
    "clearml:Task.upload_artifact",
    "clearml:Logger.report_plotly",
    "clearml:Logger.report_media",
    "clearml:Logger.report_single_value",
    "clearml.backend_api:Session._offline_mode",
    "clearml.backend_interface.base:InterfaceBase._offline_mode",
    "clearml.backend_interface.base:InterfaceBase._default_session",
)
"""What the sink relies on; `trainbus doctor` looks whether it is there."""

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_MASTERS = ("CLEARML_PROC_MASTER_ID", "TRAINS_PROC_MASTER_ID")
_FLUSH_S = 0.5


class ClearmlOptions(Options, frozen=True, kw_only=True):
    """Options of the `clearml` sink; neither a server nor credentials are needed."""

    project: (
        Annotated[str, Meta(min_length=1, description="Project; by default the trainer's")] | None
    ) = None
    task_name: (
        Annotated[str, Meta(min_length=1, description="Name of the task; by default the trainer's")]
        | None
    ) = None
    tags: Annotated[tuple[str, ...], Meta(description="Tags besides the trainer's")] = ()
    dir: Annotated[
        str,
        Meta(min_length=1, description="Folder of archives; `{run}` is replaced by the run's id"),
    ] = "clearml"
    save_checkpoints: Annotated[
        Literal["best", "last", "all", "none"], Meta(description="Checkpoints kept as artifacts")
    ] = "best"


class ClearmlSink(Sink):
    """Feeds one offline session of ClearML."""

    Options = ClearmlOptions
    service = "clearml"
    volatile = True
    options: ClearmlOptions

    def __init__(self, options: ClearmlOptions | None = None) -> None:
        super().__init__(options)
        self._task: Any = None
        self._folder = Path()
        self._where: str | None = None

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
        try:
            import clearml
        except ImportError as error:
            raise MissingPackageError("clearml", extra="clearml") from error
        options, started = self.options, run.started
        self.lost = 0
        self._names, self._keys, self._files = Names(_clean), Names(_clean), Names(_file)
        self._checkpoints: dict[str, CheckpointSaved] = {}
        self._taken = Taken()
        # A sink is volatile or told what need not come again: then this is another part.
        part = f"-{run.after}" if run.after else ""
        name = f"{Names(_file, 80)(run.id)}-{run.attempt}{part}"
        folder = Path(options.dir.replace("{run}", run.id)).expanduser().absolute() / name
        try:
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "data").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SinkError(
                f"can't write {folder.parent}: {error.strerror}; set another `dir`"
            ) from error
        _OFFLINE.begin()
        try:
            task = clearml.Task._create(
                project_name=_project(options.project or started.project or "trainbus"),
                task_name=_file(options.task_name or started.name or run.id),
            )
            # ClearML can't be told where: it has begun in its cache.
            shutil.rmtree(task.get_offline_mode_folder(), ignore_errors=True)
            task._offline_dir = folder
            self._task, self._folder = task, folder
            self._logger = task.get_logger()
            # ClearML's 5 s are also what it may wait for its own thread when it closes.
            task._reporter._report_service._wait_timeout = _FLUSH_S
            # What may still come when the process is online again must not be sent.
            task._offline_mode = task._metrics_manager._offline_mode = True
            self._tags = list(dict.fromkeys([*options.tags, *started.tags, f"run:{run.id}"]))
            task.set_tags(self._tags)
            task.update_parameters({"trainbus/run": run.id, "trainbus/attempt": run.attempt})
        except BaseException as error:
            self._task = None
            _OFFLINE.end()
            if isinstance(error, OSError):
                text = f"ClearML can't begin a session: {error}; set CLEARML_CACHE_DIR or `dir`"
                raise SinkError(text) from error
            raise
        self._where = f"clearml-task --import-offline-session {shlex.quote(f'{folder}.zip')}"

    def write(self, records: Sequence[Record]) -> None:
        """Report the records that are new.

        Raises:
            SinkError: nothing was opened.
        """
        if self._task is None:
            raise SinkError("write came before open; call open(run) first")
        for record in self._taken.new(records):
            self._take(record.event)

    def close(self) -> None:
        """End the session, and make it an archive.

        Raises:
            SinkError: ClearML wrote none, which it does not tell.
        """
        task, self._task = self._task, None
        if task is None:
            return
        archive = Path(f"{self._folder}.zip")
        try:
            archive.unlink(missing_ok=True)
            task.close()
        finally:
            _OFFLINE.end()
        if not is_zipfile(archive):
            raise SinkError(
                f"ClearML wrote no archive at {archive} (is the disk full?); "
                f"the session is in {self._folder}"
            )
        shutil.rmtree(self._folder, ignore_errors=True)

    def keeps(self, event: CheckpointSaved | ArtifactLogged) -> bool:
        """Return whether the files of an event are sent."""
        wanted = self.options.save_checkpoints
        if isinstance(event, ArtifactLogged):
            return True
        return wanted == "all" or (wanted != "none" and event.kind != "periodic")

    @property
    def where(self) -> str | None:
        """The command that uploads the session."""
        return self._where

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
                for name, value in _model_values(event).items():
                    self._log_single(name, value)
            case MetricsLogged():
                for name, value in event.values.items():
                    if event.final:
                        self._log_single(metric_name(name, final=True), value)
                    elif math.isfinite(value):
                        title, series = _place(self._names(name))
                        self._logger.report_scalar(title, series, value, axis(event))
                    else:
                        self._say(f"{name} is {value} at {axis(event)}")
            case TextLogged():
                self._say(f"{event.key} at {axis(event)}:\n{event.text}")
            case AlertRaised():
                self._say(f"{event.title}: {event.text}", _LEVELS[event.level])
            case CheckpointSaved():
                wanted = self.options.save_checkpoints
                if event.kind != "periodic":
                    # The trainer overwrites these files: what they hold at the end counts.
                    self._checkpoints[event.kind] = event
                elif wanted == "all":
                    self._log_checkpoint(event, f"periodic-{axis(event)}")
            case ArtifactLogged():
                for path in event.paths:
                    name = f"{event.name}/{Path(path).name}"
                    self._log_file(path, name, {"kind": event.kind, **event.metadata})
            case RunEnded():
                self._take_end(event)
            case _:
                self._show(event)

    def _say(self, text: str, level: int = logging.INFO) -> None:
        self._logger.report_text(text, level=level, print_console=False)

    def _log_params(self, params: Mapping[str, Any]) -> None:
        found = {f"General/{self._keys(k)}": _plain(v) for k, v in flat(params).items()}
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
            figure = _figure(event)
            if figure is not None:
                title, series = _place(self._names(event.key))
                self._logger.report_plotly(title, series, figure, axis(event))
            elif isinstance(event, ImageLogged):
                self._log_image(event)
        except (OSError, TypeError, ValueError) as error:
            self.lost += 1
            logger.warning("%r can't be shown in ClearML: %s", event.key, error)

    def _log_image(self, event: ImageLogged) -> None:
        path = Path(event.path or "")
        # The bytes and not the path: ClearML reads a file later, when it may be another.
        data = path.read_bytes() if event.array is None else png(event.array)
        title, series = _place(self._names(event.key))
        self._logger.report_media(
            title,
            series,
            iteration=axis(event),
            stream=io.BytesIO(data),
            file_extension=path.suffix or ".png",
            max_history=-1,
        )
        if event.caption:
            self._say(f"{event.key} at {axis(event)}: {event.caption}")

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
        wanted = self.options.save_checkpoints
        kinds = {"all": ["last", "best"], "none": []}.get(wanted, [wanted])
        found = [kind for kind in kinds if kind in self._checkpoints]
        for kind in found or [kind for kind in self._checkpoints if wanted == "best"]:
            self._log_checkpoint(self._checkpoints[kind], kind)


class _Offline:
    """Keeps ClearML offline in this process while there is a session, and puts back what was.

    `Task.set_offline(False)` would have every session connect to a server.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._before: tuple[Any, ...] = ()
        self._masters: dict[str, str] = {}

    def begin(self) -> None:
        from clearml import Task
        from clearml.backend_api import Session
        from clearml.backend_interface.base import InterfaceBase

        with self._lock:
            if not self._count:
                # The id that a training process hands down makes this one a part of its task:
                # ClearML would connect to the server, and write no archive.
                masters = {name: os.environ.get(name, "") for name in _MASTERS}
                ours = ("", str(os.getpid()))
                self._masters = {
                    k: v for k, v in masters.items() if v.partition(":")[0] not in ours
                }
                for name in self._masters:
                    del os.environ[name]
                if Task.current_task() is not None and not Task.is_offline():
                    os.environ.update(self._masters)
                    raise SinkError(
                        "a ClearML task of your own is online in this process, and would go "
                        "offline; let the sink run in its own process (no `isolation: inline`)"
                    )
                self._before = (
                    InterfaceBase._offline_mode,
                    Session._offline_mode,
                    InterfaceBase._default_session,
                )
                InterfaceBase._offline_mode = Session._offline_mode = True
            self._count += 1

    def end(self) -> None:
        from clearml.backend_api import Session
        from clearml.backend_interface.base import InterfaceBase

        with self._lock:
            self._count -= 1
            if not self._count:
                (
                    InterfaceBase._offline_mode,
                    Session._offline_mode,
                    InterfaceBase._default_session,
                ) = self._before
                self._before = ()
                os.environ.update(self._masters)


_OFFLINE = _Offline()


def _clean(name: str) -> str:
    """Return a name without characters that can't be seen, no path upwards, not empty."""
    seen = "".join(c if c.isprintable() else "_" for c in name).strip() or "_"
    return "/".join("_" if part in (".", "..") else part for part in seen.split("/"))


def _file(name: str) -> str:
    """Return a name that is one of a file too."""
    return re.sub(r"[^\w .=+@,-]", "_", name).strip(" .") or "_"


def _project(name: str) -> str:
    """Return a project's name, in which `/` parts projects, and which leads to no other folder."""
    return "/".join(_file(part) for part in name.split("/") if part.strip(" .")) or "_"


def _place(name: str) -> tuple[str, str]:
    """Return ClearML's title and series of a name; two names never have the same."""
    title, _, series = name.rpartition("/")
    return (title, series) if title and series and title != series else (name, name)


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | list | None) else str(value)


def _numbers(array: Any) -> Any:
    """Return an array as lists, with None where JSON has no number."""
    if isinstance(array, list):
        return [_numbers(item) for item in array]
    return array if math.isfinite(array) else None


def _figure(event: Any) -> dict[str, Any] | None:
    """Return an event as a Plotly figure; None if it is none."""
    x_label, y_label = getattr(event, "x_label", ""), getattr(event, "y_label", "")
    layout: dict[str, Any] = {}
    match event:
        case CurveLogged():
            x, y = np.asarray(event.x).tolist(), np.asarray(event.y).tolist()
            data = [
                {"type": "scatter", "mode": "lines", "name": n, "x": _numbers(x), "y": _numbers(v)}
                for n, v in zip(event.classes, y, strict=False)
            ]
        case ConfusionMatrixLogged():
            z = _numbers(np.asarray(event.matrix, dtype=float).tolist())
            cells = {"texttemplate": "%{z}", "colorscale": "Blues"}
            data = [{"type": "heatmap", "z": z, "x": event.classes, "y": event.classes, **cells}]
            x_label, y_label = "predicted", "true"
            layout = {"xaxis": {"type": "category"}, "yaxis": {"type": "category"}}
            layout["yaxis"]["autorange"] = "reversed"
        case HistogramLogged():
            edges = np.asarray(event.edges, dtype=float)
            middles, widths = ((edges[:-1] + edges[1:]) / 2).tolist(), np.diff(edges).tolist()
            counts = _numbers(np.asarray(event.counts).tolist())
            data = [{"type": "bar", "x": _numbers(middles), "width": _numbers(widths), "y": counts}]
        case TableLogged():
            rows = [[_cell(value) for value in row] for row in event.rows]
            columns = [list(column) for column in zip(*rows, strict=False)]
            header = {"values": list(event.columns)}
            data = [{"type": "table", "header": header, "cells": {"values": columns}}]
        case _:
            return None
    layout.setdefault("xaxis", {})["title"] = x_label
    layout.setdefault("yaxis", {})["title"] = y_label
    return {"data": data, "layout": layout}


def _cell(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else str(value)


def _model_values(event: ModelDescribed) -> dict[str, float]:
    known = {
        "model/parameters": event.parameters,
        "model/gradients": event.gradients,
        "model/layers": event.layers,
        "model/GFLOPs": event.gflops,
        **{f"model/speed_{name}(ms)": value for name, value in event.speed_ms.items()},
        **{f"model/{name}": value for name, value in event.extra.items()},
    }
    return {name: value for name, value in known.items() if value is not None}
