"""Takes a run to Weights & Biases: config, metrics, pictures, interactive curves, model artifacts.

Guarantees: rows are never logged behind the run's step, so none is dropped; `epoch` (and `step` for
per-step metrics) is the x axis; names obey W&B's rules; a chart is never cut without a word; a run
that was open before is used and left open; a run opened here is closed with the training's outcome.
"""

from __future__ import annotations

import logging
import math
import os
import shlex
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainbus.errors import MissingPackageError, SinkError
from trainbus.events import (
    AlertRaised,
    ArtifactLogged,
    CheckpointSaved,
    ConfusionMatrixLogged,
    CurveLogged,
    EpochEnded,
    EpochStarted,
    HistogramLogged,
    ImageLogged,
    MetricsLogged,
    ModelDescribed,
    ParamsUpdated,
    Record,
    RunEnded,
    TableLogged,
    TextLogged,
)
from trainbus.interfaces import RunInfo, Sink
from trainbus.storing import check_folder

from ._wandb_options import WandbOptions, artifact_name, project_name, run_id, run_name

if TYPE_CHECKING:
    from wandb import Artifact as WandbArtifact
    from wandb import Run as WandbRun

logger = logging.getLogger("trainbus.sinks.wandb")

TESTED = "0.31.0"
NEEDS = (
    "wandb:init",
    "wandb:Settings",
    "wandb:Artifact",
    "wandb:Api",
    "wandb:Error",
    "wandb:Image",
    "wandb:Table",
    "wandb:Histogram",
    "wandb:Html",
    "wandb:plot.line",
    "wandb:plot_table",
)
"""What the sink relies on; `trainbus doctor` looks whether it is there."""

_ATTEMPT = "trainbus-attempt.txt"
"""File in an offline run's folder that says which attempt of the run it holds."""

_EXIT_CODES = {"finished": 0, "failed": 1, "stopped": 255}
"""255 is what wandb itself reports for Ctrl-C."""

_STARTING = threading.Lock()
"""Two runs that start at once would each take itself for the only one."""

_OURS: weakref.WeakSet[WandbRun] = weakref.WeakSet()
"""Runs opened here, told apart only so that a second training does not log into the first one's."""


class WandbSink(Sink):
    """Feeds one Weights & Biases run."""

    Options = WandbOptions
    service = "wandb"
    volatile = True
    options: WandbOptions

    def __init__(self, options: WandbOptions | None = None) -> None:
        super().__init__(options)
        self._run: WandbRun | None = None
        self._where: str | None = None

    def check(self) -> str:
        """Log in, or make sure that the folder of an offline run can be written.

        Raises:
            MissingPackageError: wandb is not installed.
            SinkError: W&B knows no such login, can't be reached, or the folder can't be written.
        """
        try:
            import wandb
        except ImportError as error:
            raise MissingPackageError("wandb", extra="wandb") from error
        mode = self.options.mode or os.environ.get("WANDB_MODE", "online")
        if mode in ("offline", "disabled"):
            folder = check_folder(self.options.dir) if self.options.dir else "nothing to log in to"
            return f"{mode}, {folder}"
        try:
            user = wandb.Api(timeout=10).viewer.username
        except (wandb.Error, OSError, ValueError) as error:
            raise SinkError(
                f"W&B can't be used ({error}); run `wandb login`, set WANDB_API_KEY, check the "
                "network, or set `mode: offline`"
            ) from error
        return f"logged in as {user}"

    def open(self, run: RunInfo) -> None:
        """Start the W&B run, go on in the one that is resumed, or use the one that is active.

        Raises:
            MissingPackageError: wandb is not installed.
            SinkError: W&B refuses to start the run.
        """
        try:
            import wandb
        except ImportError as error:
            raise MissingPackageError("wandb", extra="wandb") from error
        self._last = self._last_upload = self._logged = self._position = (0, 0)
        self.lost = 0
        self._goals = dict(run.started.goals)
        self._axes: dict[str, str] = {}
        self._checkpoints: dict[str, CheckpointSaved] = {}
        self._curves: WandbArtifact | None = None
        self._epoch: int | None = None
        self._open_epoch: int | None = None
        self._row: dict[str, Any] = {}
        self._row_epoch: int | None = None
        self._row_media: set[str] = set()
        self._row_names: set[str] = set()
        self._time = time.time()  # of the record, as it may be much later when it comes
        active = wandb.run
        self._owned = active is None or active in _OURS
        if active is not None and not self._owned:
            self._run = active
            self._say_ignored()
            active.config.setdefaults(run.started.params)  # type: ignore[no-untyped-call]
        else:
            try:
                with _STARTING:
                    self._run = self._start(run)
                    _OURS.add(self._run)
            except (wandb.Error, OSError) as error:
                advice = (
                    "run `wandb login`, set WANDB_API_KEY, or set `mode: offline`"
                    if "API key" in str(error)
                    else "check `dir`, the network and the account, or set `mode: offline`"
                )
                text = f"W&B can't start the run ({error}); {advice}"
                retry = isinstance(error, wandb.errors.CommError) and "API key" not in str(error)
                raise SinkError(text, retry=retry) from error
            if run.again:
                self._last = _stored(self._run)
        self._run.define_metric("epoch", hidden=True)
        mode = self._run.settings.mode
        if mode == "offline":
            self._where = f"wandb sync {shlex.quote(str(Path(self._run.dir).parent))}"
        else:
            self._where = None if mode == "disabled" else self._run.url

    def _start(self, run: RunInfo) -> WandbRun:
        import wandb

        started, options = run.started, self.options
        folder = options.dir or started.save_dir
        if folder is not None:
            folder = str(Path(folder).expanduser())
            Path(folder).mkdir(parents=True, exist_ok=True)
        wanted = options.id or run_id(run.id)
        settings: dict[str, Any] = {"init_timeout": options.init_timeout_secs}
        if run.pid is not None:  # this is not the training process, whose service ends with it
            os.environ.pop("WANDB_SERVICE", None)
            settings["x_stats_pid"] = run.pid
        # A second W&B sink on the same bus has a run of its own.
        taken = sum(other.id.startswith(wanted) for other in _OURS)
        project = options.project or (started.project and project_name(started.project))
        found = wandb.init(
            project=project or None,
            entity=options.entity,
            name=options.name or run_name(started.name),
            group=options.group or started.group,
            job_type=options.job_type or started.job_type,
            tags=[tag[:64] for tag in options.tags or started.tags if tag] or None,
            notes=options.notes or started.notes,
            config=started.params,
            id=f"{wanted}-{taken + 1}" if taken else wanted,
            resume=options.resume or ("allow" if run.resumed or run.again else None),
            dir=folder,
            mode=options.mode,
            reinit="default" if wandb.run is None else "create_new",
            settings=wandb.Settings(**settings),
        )
        if found.settings.mode == "offline":
            _set_aside(found, run)
        return found

    def write(self, records: Sequence[Record]) -> None:
        """Log the records that are new.

        Raises:
            SinkError: nothing was opened.
        """
        for record in records:
            if record.position > self._last:
                if self._run is None:
                    raise SinkError("no run is open; call open(run) first")
                self._time, self._position = record.time, record.position
                self._take(self._run, record.event)
                self._last = record.position
                if not self._row and not self._row_media:
                    self._logged = record.position
        if self._run is not None:
            self._note(self._run, self._logged)

    def upload(self, records: Sequence[Record]) -> None:
        """Take checkpoints and artifacts, which may be large, beside the rows.

        Raises:
            SinkError: nothing was opened.
        """
        for record in records:
            if record.position > self._last_upload:
                if self._run is None:
                    raise SinkError("no run is open; call open(run) first")
                self._take(self._run, record.event)
                self._last_upload = record.position

    def keeps(self, event: CheckpointSaved | ArtifactLogged) -> bool:
        """Return whether the files of an event become an artifact."""
        wanted = self.options.save_checkpoints
        if isinstance(event, ArtifactLogged):
            return True
        return wanted == "all" or (wanted != "none" and event.kind != "periodic")

    @property
    def in_process(self) -> bool:
        """Whether a run of the user's is open in this process, which is used then."""
        active = getattr(sys.modules.get("wandb"), "run", None)
        return active is not None and active not in _OURS

    def close(self) -> None:
        """Close a run that was opened here, as failed unless its end was written."""
        try:
            if self._run is not None:
                self._commit(self._run)
        finally:
            self._finish("failed")

    @property
    def where(self) -> str | None:
        """Address of the run, or the command that uploads it."""
        return self._where

    def _take(self, run: WandbRun, event: object) -> None:
        from . import _wandb_charts as charts

        match event:
            case MetricsLogged(final=True):
                run.summary.update({f"final/{k}": v for k, v in event.values.items()})
            case MetricsLogged(step=None):
                self._log(run, event.values, event.epoch)
            case MetricsLogged():
                self._log_step(run, event)
            case ParamsUpdated():
                run.config.update(event.params, allow_val_change=True)  # type: ignore[no-untyped-call]
            case ModelDescribed():
                self._log(run, _model_values(event), None)
            case EpochStarted():
                self._epoch = self._open_epoch = event.epoch
            case EpochEnded(outcome="completed"):
                self._open_epoch = None
                if self._row_epoch != event.epoch:
                    self._commit(run)
                self._row_epoch = event.epoch
                self._commit(run)
            case EpochEnded():
                self._row.clear()  # the epoch comes again, with other values
            case ImageLogged() if self.options.log_images:
                self._show(run, event.key, event.epoch, partial(charts.image, event))
            case CurveLogged():
                self._log_curve(run, event)
            case ConfusionMatrixLogged():
                self._log_confusion_matrix(run, event)
            case TableLogged():
                self._say_cut(event.key, len(event.rows), charts.ROW_LIMIT, "rows")
                self._show(run, event.key, event.epoch, partial(charts.table, event))
            case HistogramLogged():
                self._show(run, event.key, event.epoch, partial(charts.histogram, event))
            case TextLogged():
                self._show(run, event.key, event.epoch, partial(charts.text, event))
            case CheckpointSaved():
                self._take_checkpoint(run, event)
            case ArtifactLogged():
                name = artifact_name(event.name)
                self._log_files(run, name, event.kind, event.paths, event.aliases, event.metadata)
            case AlertRaised():
                level = {"info": "INFO", "warning": "WARN", "error": "ERROR"}[event.level]
                run.alert(event.title, event.text or event.title, level=level)
            case RunEnded():
                self._end(run, event)

    def _log(self, run: WandbRun, values: Mapping[str, Any], epoch: int | None) -> None:
        """Put numbers into the row of their epoch, which is sent when it is complete."""
        at = self._epoch if epoch is None else epoch
        if at is None:  # a training without epochs
            run.log({**values, "_timestamp": self._time}, commit=True)
            return
        self._define(run, values, "epoch")
        if at != self._row_epoch or values.keys() & self._row.keys():
            self._commit(run)
        self._row_epoch = at
        self._row |= values

    def _show(self, run: WandbRun, key: str, epoch: int | None, build: Callable[[], Any]) -> None:
        """Log a picture, chart or table into the row of its epoch at once: its file may change."""
        try:
            value = build()
        except (OSError, TypeError, ValueError) as error:
            self.lost += 1
            logger.warning("%r can't be shown in W&B: %s", key, error)
            return
        at = self._epoch if epoch is None else epoch
        if at is None:
            run.log({key: value}, commit=True)
            return
        if at != self._row_epoch or key in self._row_media:
            self._commit(run)
        self._row_epoch = at
        self._row_media.add(key)
        run.log({key: value}, step=max(at + 1, run.step), commit=False)

    def _commit(self, run: WandbRun) -> None:
        """Send the row of an epoch; W&B drops what is logged behind its step."""
        at, row, media = self._row_epoch, self._row, self._row_media
        self._row_epoch, self._row, self._row_media = None, {}, set()
        if at is not None and (row or media or self._epoch == at):
            values = row if media and not row else {**row, "epoch": at + 1}
            self._row_names = set(row) or self._row_names
            values = {**values, "_timestamp": self._time}
            run.log(values, step=max(at + 1, run.step), commit=True)

    def _log_step(self, run: WandbRun, event: MetricsLogged) -> None:
        values: dict[str, Any] = {
            (f"{k}_step" if self._axes.get(k, "step") != "step" else k): v
            for k, v in event.values.items()
        }
        self._define(run, values, "step")
        values |= {"step": event.step, "_timestamp": self._time}
        if event.epoch is not None:
            values["epoch"] = event.epoch + 1
        run.log(values, commit=True)

    def _define(self, run: WandbRun, values: Mapping[str, Any], axis: str) -> None:
        for name in values:
            if name not in self._axes:
                self._axes[name] = axis
                goal = next((g for p, g in self._goals.items() if fnmatchcase(name, p)), None)
                summary = f"last,{goal}" if goal else None
                # W&B reads `*` in a name as a pattern, and a `.` as nesting.
                if "*" not in name:
                    run.define_metric(
                        name.replace(".", "\\."), step_metric=axis, step_sync=True, summary=summary
                    )

    def _log_curve(self, run: WandbRun, event: CurveLogged) -> None:
        import wandb

        from . import _wandb_charts as charts

        x, y = charts.curve_arrays(event)
        if not x.size or not y.size:
            return
        points, per_class = self.options.curve_points, self.options.curves == "per_class"
        shown = charts.points_shown(event, points, per_class=per_class)
        self._show(
            run, event.key, event.epoch, partial(charts.curve, event, shown, per_class=per_class)
        )
        if shown < points:
            if self._curves is None:
                self._curves = wandb.Artifact(artifact_name(f"run_{run.id}_curves"), "curves")
                rest = (
                    f" a class; all of them, of every curve, are in artifact {self._curves.name!r}"
                )
                self._say_cut(event.key, points, shown, "points", rest)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "curve.csv"
                charts.write_curve(event, path)
                name = f"{artifact_name(event.key)}.csv"
                self._curves.add_file(str(path), name=name, overwrite=True)

    def _log_confusion_matrix(self, run: WandbRun, event: ConfusionMatrixLogged) -> None:
        from . import _wandb_charts as charts

        limit, rest = charts.ROW_LIMIT, ", the largest"
        self._say_cut(event.key, event.matrix.size, limit, "cells", rest)
        self._show(run, event.key, event.epoch, partial(charts.confusion_matrix, event))

    def _take_checkpoint(self, run: WandbRun, event: CheckpointSaved) -> None:
        wanted = self.options.save_checkpoints
        if wanted == "all" and event.kind == "periodic":
            self._log_checkpoint(run, event, f"epoch-{_counted(event.epoch)}")
        elif event.kind != "periodic":
            # The trainer overwrites these files: what they hold at the end is what counts.
            self._checkpoints[event.kind] = event

    def _log_checkpoint(self, run: WandbRun, event: CheckpointSaved, alias: str) -> None:
        epoch = _counted(event.epoch)
        metadata = {"epoch": epoch, "metrics": event.metrics, **event.metadata}
        name = artifact_name(f"run_{run.id}_model")
        self._log_files(run, name, "model", [event.path], [alias], metadata)

    def _log_files(
        self,
        run: WandbRun,
        name: str,
        kind: str,
        paths: Sequence[str],
        aliases: Sequence[str],
        metadata: Mapping[str, Any],
    ) -> None:
        import wandb

        try:
            artifact = wandb.Artifact(name, kind, metadata=_metadata(metadata))
            _add_files(artifact, paths)
            run.log_artifact(artifact, aliases=list(aliases) or None)
        except (wandb.Error, OSError, TypeError, ValueError) as error:
            self.lost += 1
            logger.warning("artifact %r can't be kept in W&B: %s", name, error)

    def _end(self, run: WandbRun, event: RunEnded) -> None:
        try:
            if event.status != "finished" and self._is_partial():
                # A resumed training redoes the epoch, which would then be there twice.
                run.summary.update(self._row)
                self._row, self._row_epoch = {}, None
            self._commit(run)
            if event.best is not None:
                run.summary.update({f"best/{event.best.metric}": event.best.value})
                if event.best.epoch is not None:
                    run.summary.update({"best/epoch": _counted(event.best.epoch)})
            if event.reason:
                run.summary.update({"ended": event.reason})
            for kind in self._wanted_checkpoints():
                self._log_checkpoint(run, self._checkpoints[kind], kind)
            if self._curves is not None:
                run.log_artifact(self._curves)
            self._note(run, self._position)
        finally:
            self._finish(event.status)

    def _note(self, run: WandbRun, position: tuple[int, int]) -> None:
        """Keep in W&B itself how far the run is there, for a process that has to go on with it."""
        if self._owned and position > (0, 0):
            run.summary.update({"trainbus/attempt": position[0], "trainbus/seq": position[1]})

    def _is_partial(self) -> bool:
        """Return whether the row is of an epoch that was cut short, as its numbers tell."""
        return self._open_epoch == self._row_epoch and self._row.keys() < self._row_names

    def _wanted_checkpoints(self) -> list[str]:
        """Return the kinds to keep: `last` also where a training names none its best."""
        wanted = self.options.save_checkpoints
        kinds = {"all": ["last", "best"], "none": []}.get(wanted, [wanted])
        found = [kind for kind in kinds if kind in self._checkpoints]
        return found or [kind for kind in self._checkpoints if wanted == "best"]

    def _finish(self, status: str) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        if self._owned:
            _OURS.discard(run)
            run.finish(exit_code=_EXIT_CODES[status])
        else:
            run.log({}, commit=True)  # what was logged last must not wait for the user's next row

    def _say_cut(self, key: str, found: int, shown: int, what: str, rest: str = "") -> None:
        if found > shown:
            logger.warning("%r: W&B can show %d of its %d %s%s", key, shown, found, what, rest)

    def _say_ignored(self) -> None:
        names = ("project", "entity", "name", "group", "job_type", "tags", "notes", "id", "dir")
        given = [name for name in names if getattr(self.options, name) is not None]
        if given:
            logger.warning(
                "a W&B run is active and is used as it is; not set: %s", ", ".join(given)
            )


def _stored(run: WandbRun) -> tuple[int, int]:
    """Return the position of the last record that a run which goes on has, as its summary tells."""
    try:
        summary: Any = run.summary
        return int(summary["trainbus/attempt"]), int(summary["trainbus/seq"])
    except (KeyError, TypeError, ValueError):
        return 0, 0


def _set_aside(run: WandbRun, info: RunInfo) -> None:
    """Keep `wandb sync --sync-all` from a part of this attempt that is stored anew, and whole.

    What a process took that was killed may be on disk in part, and it can't be asked which part.
    """
    folder = Path(run.dir).parent
    (folder / _ATTEMPT).write_text(f"{info.attempt}\n", encoding="utf-8")
    if not info.again or info.after:
        return
    for other in folder.parent.glob(f"offline-run-*-{run.id}"):
        note = other / _ATTEMPT
        if other != folder and note.exists() and note.read_text() == f"{info.attempt}\n":
            other.rename(other.with_name(f"incomplete-{other.name}"))


def _counted(epoch: int | None) -> int | None:
    """Return an epoch counted from 1, as the x axis in W&B counts them."""
    return None if epoch is None else epoch + 1


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


def _metadata(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata that W&B takes: ±Inf, which it refuses, as text, and at most 100 keys."""

    def finite(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        if isinstance(value, Mapping):
            return {k: finite(v) for k, v in value.items()}
        return [finite(v) for v in value] if isinstance(value, list) else value

    kept = {k: finite(v) for k, v in values.items() if v is not None}
    return kept if len(kept) <= 100 else {"metadata": kept}


def _add_files(artifact: WandbArtifact, paths: Sequence[str]) -> None:
    files = [file for file in (Path(path).absolute() for path in paths) if file.exists()]
    for path in paths:
        if not Path(path).exists():
            logger.warning("artifact %r: no file at %s", artifact.name, path)
    if paths and not files:
        raise FileNotFoundError("none of its files is there")
    names = [file.name for file in files]
    if len(set(names)) < len(names):  # then their folders tell them apart
        common = os.path.commonpath([file.parent for file in files])
        names = [str(file.relative_to(common)) for file in files]
    for file, name in zip(files, names, strict=True):
        if file.is_dir():
            artifact.add_dir(str(file), name=name)
        else:
            artifact.add_file(str(file), name=name)
