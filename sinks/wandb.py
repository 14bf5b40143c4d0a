"""Takes a run to Weights & Biases: config, metrics, pictures, interactive curves, model artifacts.

Guarantees: rows are never logged behind the run's step, so none is dropped; `epoch` (and `step` for
per-step metrics) is the x axis; names obey W&B's rules; a chart is never cut without a word; a run
that was open before is used and left open; a run opened here is closed with the training's outcome.
"""

from __future__ import annotations

import html
import logging
import math
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
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

from ._wandb_options import WandbOptions, artifact_name, project_name, run_id, run_name

if TYPE_CHECKING:
    from wandb import Artifact as WandbArtifact
    from wandb import Run as WandbRun

logger = logging.getLogger("trainbus.sinks.wandb")

_EXIT_CODES = {"finished": 0, "failed": 1, "stopped": 255}
"""255 is what wandb itself reports for Ctrl-C."""

_OURS: weakref.WeakSet[WandbRun] = weakref.WeakSet()
"""Runs opened here, told apart only so that a second training does not log into the first one's."""


class WandbSink(Sink):
    """Feeds one Weights & Biases run."""

    Options = WandbOptions
    service = "wandb"
    options: WandbOptions

    def __init__(self, options: WandbOptions | None = None) -> None:
        super().__init__(options)
        self._run: WandbRun | None = None
        self._owned = False
        self._where: str | None = None
        self._last = (0, 0)
        self._epoch = 0
        self._goals: dict[str, str] = {}
        self._axes: dict[str, str] = {}
        self._checkpoints: dict[str, CheckpointSaved] = {}
        self._curves: WandbArtifact | None = None

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
        active = wandb.run
        started, options = run.started, self.options
        self._goals = dict(started.goals)
        if active is not None and active not in _OURS:
            self._run, self._owned = active, False
            active.config.setdefaults(started.params)  # type: ignore[no-untyped-call]
        else:
            folder = options.dir or started.save_dir
            try:
                if folder is not None:
                    Path(folder).mkdir(parents=True, exist_ok=True)
                self._run = wandb.init(
                    project=options.project or project_name(started.project or "trainbus"),
                    entity=options.entity,
                    name=options.name or run_name(started.name),
                    group=options.group or started.group,
                    job_type=options.job_type or started.job_type,
                    tags=[tag[:64] for tag in options.tags or started.tags if tag] or None,
                    notes=options.notes or started.notes,
                    config=started.params,
                    id=options.id or run_id(run.id),
                    resume=options.resume or ("allow" if run.resumed else None),
                    dir=folder,
                    mode=options.mode,
                    reinit="default" if active is None else "create_new",
                )
            except (wandb.Error, OSError) as error:
                advice = (
                    "run `wandb login`, set WANDB_API_KEY, or set `mode: offline`"
                    if "API key" in str(error)
                    else "check `dir`, the network and the account, or set `mode: offline`"
                )
                raise SinkError(f"W&B can't start the run ({error}); {advice}") from error
            self._owned = True
            _OURS.add(self._run)
        self._run.define_metric("epoch", hidden=True)
        offline = self._run.settings.mode != "online"
        self._where = f"wandb sync {Path(self._run.dir).parent}" if offline else self._run.url

    def write(self, records: Sequence[Record]) -> None:
        """Log the records that are new.

        Raises:
            SinkError: nothing was opened.
        """
        for record in records:
            if record.position > self._last:
                if self._run is None:
                    raise SinkError("no run is open; call open(run) first")
                self._take(self._run, record.event)
                self._last = record.position

    def close(self) -> None:
        """Close a run that was opened here, as failed unless its end was written."""
        self._finish("failed")

    @property
    def where(self) -> str | None:
        """Address of the run, or the command that uploads it."""
        return self._where

    def _take(self, run: WandbRun, event: object) -> None:
        import wandb

        from . import _wandb_charts as charts

        match event:
            case MetricsLogged(final=True):
                run.summary.update({f"final/{k}": v for k, v in event.values.items()})
            case MetricsLogged(step=None):
                self._define(run, event.values, "epoch")
                self._log(run, event.values, event.epoch)
            case MetricsLogged():
                self._log_step(run, event)
            case ParamsUpdated():
                run.config.update(event.params, allow_val_change=True)  # type: ignore[no-untyped-call]
            case ModelDescribed():
                self._log(run, _model_values(event), self._epoch)
            case EpochStarted():
                self._epoch = event.epoch
            case EpochEnded(outcome="completed"):
                self._log(run, {"epoch": event.epoch + 1}, event.epoch, commit=True)
            case ImageLogged() if self.options.log_images:
                self._log_image(run, event)
            case CurveLogged():
                self._log_curve(run, event)
            case ConfusionMatrixLogged():
                self._log_confusion_matrix(run, event)
            case TableLogged():
                table = wandb.Table(
                    columns=list(event.columns), data=event.rows, allow_mixed_types=True
                )
                if len(event.rows) > charts.ROW_LIMIT:
                    self._say_cut(event.key, len(event.rows), charts.ROW_LIMIT, "rows")
                self._log(run, {event.key: table}, event.epoch)
            case HistogramLogged():
                self._log(run, {event.key: charts.histogram(event)}, event.epoch)
            case TextLogged():
                page = wandb.Html(f"<pre>{html.escape(event.text)}</pre>", inject=False)
                self._log(run, {event.key: page}, event.epoch)
            case CheckpointSaved():
                self._take_checkpoint(run, event)
            case ArtifactLogged():
                artifact = wandb.Artifact(
                    artifact_name(event.name), event.kind, metadata=_metadata(event.metadata)
                )
                _add_files(artifact, event.paths)
                run.log_artifact(artifact, aliases=event.aliases or None)
            case AlertRaised():
                level = {"info": "INFO", "warning": "WARN", "error": "ERROR"}[event.level]
                run.alert(event.title, event.text or event.title, level=level)
            case RunEnded():
                self._end(run, event)

    def _log(
        self,
        run: WandbRun,
        values: Mapping[str, Any],
        epoch: int | None,
        *,
        commit: bool = False,
    ) -> None:
        at = self._epoch if epoch is None else epoch
        # W&B drops what is logged behind its step, which pictures of a finished epoch would be.
        run.log(dict(values), step=max(at + 1, run.step), commit=commit)

    def _log_step(self, run: WandbRun, event: MetricsLogged) -> None:
        values: dict[str, Any] = {
            (f"{k}_step" if self._axes.get(k, "step") != "step" else k): v
            for k, v in event.values.items()
        }
        self._define(run, values, "step")
        values["step"] = event.step
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

    def _log_image(self, run: WandbRun, event: ImageLogged) -> None:
        import wandb

        if event.path is not None and not Path(event.path).is_file():
            logger.warning("picture %r is gone: no file at %s", event.key, event.path)
            return
        source = event.path if event.array is None else event.array
        image = wandb.Image(source, caption=event.caption)
        self._log(run, {event.key: image}, event.epoch)

    def _log_curve(self, run: WandbRun, event: CurveLogged) -> None:
        import wandb

        from . import _wandb_charts as charts

        x, y = charts.curve_arrays(event)
        if not x.size or not y.size:
            return
        points = self.options.curve_points
        chart, shown = charts.curve_chart(
            event, points=points, per_class=self.options.curves == "per_class"
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
                self._curves.add_file(str(path), name=f"{artifact_name(event.key)}.csv")
        self._log(run, {event.key: chart}, event.epoch)

    def _log_confusion_matrix(self, run: WandbRun, event: ConfusionMatrixLogged) -> None:
        from . import _wandb_charts as charts

        chart, shown = charts.confusion_chart(event)
        if shown < event.matrix.size:
            self._say_cut(event.key, event.matrix.size, shown, "cells, the largest")
        self._log(run, {event.key: chart}, event.epoch)

    def _take_checkpoint(self, run: WandbRun, event: CheckpointSaved) -> None:
        wanted = self.options.save_checkpoints
        if wanted == "all" and event.kind == "periodic":
            self._log_checkpoint(run, event, [f"epoch-{_counted(event.epoch)}"])
        elif wanted in ("all", event.kind):
            # The trainer overwrites these files: what they hold at the end is what counts.
            self._checkpoints[event.kind] = event

    def _log_checkpoint(self, run: WandbRun, event: CheckpointSaved, aliases: list[str]) -> None:
        import wandb

        if not Path(event.path).is_file():
            logger.warning("checkpoint is gone: no file at %s", event.path)
            return
        metadata = {"epoch": _counted(event.epoch), "metrics": event.metrics, **event.metadata}
        artifact = wandb.Artifact(
            artifact_name(f"run_{run.id}_model"), "model", metadata=_metadata(metadata)
        )
        _add_files(artifact, [event.path])
        run.log_artifact(artifact, aliases=aliases)

    def _end(self, run: WandbRun, event: RunEnded) -> None:
        for kind in ("last", "best"):
            if kind in self._checkpoints:
                self._log_checkpoint(run, self._checkpoints.pop(kind), [kind])
        if self._curves is not None:
            run.log_artifact(self._curves)
        if event.best is not None:
            run.summary.update({f"best/{event.best.metric}": event.best.value})
            if event.best.epoch is not None:
                run.summary.update({"best/epoch": _counted(event.best.epoch)})
        if event.reason:
            run.summary.update({"ended": event.reason})
        self._finish(event.status)

    def _finish(self, status: str) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        if self._owned:
            run.finish(exit_code=_EXIT_CODES[status])
        else:
            run.log({}, commit=True)  # what was logged last must not wait for the user's next row

    def _say_cut(self, key: str, found: int, shown: int, what: str, rest: str = "") -> None:
        logger.warning("%r: W&B can show %d of its %d %s%s", key, shown, found, what, rest)


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
    for path in map(Path, paths):
        if path.is_dir():
            artifact.add_dir(str(path), name=path.name)
        elif path.is_file():
            artifact.add_file(str(path))
        else:
            logger.warning("artifact %r: no file at %s", artifact.name, path)
