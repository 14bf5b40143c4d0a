"""Takes a run to Weights & Biases: config, metrics, pictures, interactive curves, model artifacts.

Guarantees: rows are never logged behind the run's step, so none is dropped; `epoch` (and `step` for
per-step metrics) is the x axis; names obey W&B's rules; a chart is never cut without a word; a run
that was open before is used and left open; a run opened here is closed with the training's outcome.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from threading import Event
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
from trainbus.toolkit.sinks import LatestCheckpoints, interrupt_training, is_wanted, model_values

from . import session as runs
from .files import Curves, log_files
from .options import WandbOptions, artifact_name
from .rows import Rows

if TYPE_CHECKING:
    from wandb import Run as WandbRun

logger = logging.getLogger("trainbus.sinks.wandb")

TESTED_VERSIONS = "0.31.0"
REQUIRED_NAMES = (
    *(f"wandb:{name}" for name in ("init", "Settings", "Artifact", "Api", "Error")),
    *(f"wandb:{name}" for name in ("Image", "Table", "Histogram", "Html", "plot.line")),
    "wandb:plot_table",
)
"""What the sink relies on; `trainbus doctor` looks whether it is there."""

_LEVELS = {"info": "INFO", "warning": "WARN", "error": "ERROR"}


class WandbSink(Sink):
    """Feeds one Weights & Biases run."""

    Options = WandbOptions
    service = "wandb"
    durable_only_after_close = True
    options: WandbOptions

    def __init__(self, options: WandbOptions | None = None) -> None:
        super().__init__(options)
        self._run: WandbRun | None = None
        self._location: str | None = None

    def check(self) -> str:
        """Log in, or make sure that the folder of an offline run can be written.

        Raises:
            MissingPackageError: wandb is not installed.
            SinkError: W&B knows no such login, can't be reached, or the folder can't be written.
        """
        _imported()
        return runs.check(self.options)

    def open(self, run: RunInfo) -> None:
        """Start the W&B run, go on in the one that is resumed, or use the one that is active.

        Raises:
            MissingPackageError: wandb is not installed.
            SinkError: W&B refuses to start the run.
        """
        active = _imported().run
        # A run that the framework's own logger feeds would get everything twice.
        is_fed = "wandb" in run.started.own_loggers
        self._last = self._last_upload = self._sent = self._position = (0, 0)
        self.lost = 0
        self._stop = Event()
        self._checkpoints = LatestCheckpoints(self.options.save_checkpoints)
        self._owned = is_fed or not runs.is_users(active)
        if not self._owned:
            self._run = runs.use(active, run, self.options)
        else:
            self._run = runs.start(run, self.options, _interrupter(run, self._stop))
            if run.reopened:
                self._last = runs.stored(self._run)
        is_new = self._owned and not run.reopened and not run.resumed
        is_shared = not self._owned or self._run.settings.mode == "shared"
        goal_of = run.started.goal_of
        self._rows = Rows(self._run, goal_of, is_shared=is_shared, is_new=is_new)
        self._curves = Curves(self._run)
        self._location = runs.location(self._run)

    def write(self, records: Sequence[Record]) -> None:
        """Log the records that are new.

        Raises:
            SinkError: nothing was opened, or the user's run was finished too early.
        """
        for record in records:
            if record.position > self._last:
                run = self._opened()
                self._rows.time, self._position = record.time, record.position
                self._take_safely(run, record.event)
                self._last = record.position
                if self._rows.are_sent:
                    self._sent = record.position
        if self._run is not None:
            self._note(self._run, self._sent)

    def upload(self, records: Sequence[Record]) -> None:
        """Take checkpoints and artifacts, which may be large, beside the rows.

        Raises:
            SinkError: nothing was opened, or the user's run was finished too early.
        """
        for record in records:
            if record.position > self._last_upload:
                self._take_safely(self._opened(), record.event)
                self._last_upload = record.position

    def _opened(self) -> WandbRun:
        if self._run is None:
            raise SinkError("no run is open; call open(run) first")
        return self._run

    def wants_files(self, event: CheckpointSaved | ArtifactLogged) -> bool:
        """Return whether the files of an event become an artifact."""
        return is_wanted(self.options.save_checkpoints, event)

    @property
    def in_process(self) -> bool:
        """Whether a run of the user's is open in this process, which is used then."""
        return runs.is_users(getattr(sys.modules.get("wandb"), "run", None))

    def close(self) -> None:
        """Close a run that was opened here, as failed unless its end was written."""
        try:
            if self._run is not None:
                self._rows.end(is_cut_short=False)
        finally:
            self._finish("failed")

    @property
    def location(self) -> str | None:
        """Address of the run, or the command that uploads it."""
        return self._location

    def _take_safely(self, run: WandbRun, event: object) -> None:
        try:
            self._take(run, event)
        except _imported().errors.UsageError as error:
            if self._owned:
                raise
            raise SinkError(
                f"your program's W&B run can't be logged to any more ({error}); finish it after "
                "the training, or give this sink a run of its own with `isolation: process`"
            ) from error

    def _take(self, run: WandbRun, event: object) -> None:
        from . import charts

        match event:
            case MetricsLogged(final=True):
                run.summary.update({f"final/{k}": v for k, v in event.values.items()})
            case MetricsLogged(step=None):
                self._rows.log(event.values, event.epoch)
            case MetricsLogged():
                self._rows.log_step(event)
            case ParamsUpdated():
                run.config.update(event.params, allow_val_change=True)  # type: ignore[no-untyped-call]
            case ModelDescribed():
                self._rows.log(model_values(event), None)
            case EpochStarted():
                self._rows.start_epoch(event.epoch)
            case EpochEnded():
                self._rows.end_epoch(event)
            case ImageLogged() if self.options.log_images:
                self._show(event, partial(charts.image, event))
            case CurveLogged():
                self._log_curve(event)
            case ConfusionMatrixLogged():
                size, rest = event.matrix.size, ", the largest"
                self._say_cut(event.key, size, charts.ROW_LIMIT, "cells", rest)
                self._show(event, partial(charts.confusion_matrix, event))
            case TableLogged():
                self._say_cut(event.key, len(event.rows), charts.ROW_LIMIT, "rows")
                self._show(event, partial(charts.table, event))
            case HistogramLogged():
                self._show(event, partial(charts.histogram, event))
            case TextLogged():
                self._show(event, partial(charts.text, event))
            case CheckpointSaved():
                if not self._checkpoints.put_off(event):
                    self._log_checkpoint(run, event, f"epoch-{_counted(event.epoch)}")
            case ArtifactLogged():
                about = event.kind, event.paths, event.aliases, event.metadata
                self.lost += not log_files(run, artifact_name(event.name), *about)
            case AlertRaised():
                run.alert(event.title, event.text or event.title, level=_LEVELS[event.level])
            case RunEnded():
                self._end(run, event)

    def _show(self, event: Any, build: Callable[[], Any]) -> None:
        """Log a picture, chart or table; one that can't be shown costs only itself."""
        try:
            value = build()
        except (OSError, TypeError, ValueError) as error:
            self.lost += 1
            logger.warning("%r can't be shown in W&B: %s", event.key, error)
            return
        self._rows.show(event.key, event.epoch, value)

    def _log_curve(self, event: CurveLogged) -> None:
        from . import charts

        x, y = charts.curve_arrays(event)
        if not x.size or not y.size:
            return
        points, per_class = self.options.curve_points, self.options.curves == "per_class"
        shown = charts.points_shown(event, points, per_class=per_class)
        self._show(event, partial(charts.curve, event, shown, per_class=per_class))
        if shown < points and (name := self._curves.add(event)) is not None:
            rest = f" a class; all of them, of every curve, are in artifact {name!r}"
            self._say_cut(event.key, points, shown, "points", rest)

    def _log_checkpoint(self, run: WandbRun, event: CheckpointSaved, alias: str) -> None:
        about = {"epoch": _counted(event.epoch), "metrics": event.metrics, **event.metadata}
        name = artifact_name(f"run_{run.id}_model")
        self.lost += not log_files(run, name, "model", [event.path], [alias], about)

    def _end(self, run: WandbRun, event: RunEnded) -> None:
        try:
            self._rows.end(is_cut_short=event.status != "finished")
            if event.best is not None:
                run.summary.update({f"best/{event.best.metric}": event.best.value})
                if event.best.epoch is not None:
                    run.summary.update({"best/epoch": _counted(event.best.epoch)})
            is_from_here = self._stop.is_set() and event.status == "stopped"
            if reason := "stopped from W&B" if is_from_here else event.reason:
                run.summary.update({"ended": reason})
            for checkpoint in self._checkpoints.at_end():
                self._log_checkpoint(run, checkpoint, checkpoint.kind)
            self._curves.log()
            self._note(run, self._position)
        finally:
            self._finish(event.status)

    def _note(self, run: WandbRun, position: tuple[int, int]) -> None:
        """Keep in W&B itself how far the run is there, for a process that has to go on with it."""
        if self._owned and position > (0, 0):
            run.summary.update({"trainbus/attempt": position[0], "trainbus/seq": position[1]})

    def _finish(self, status: str) -> None:
        run, self._run = self._run, None
        if run is not None:
            self.lost += self._rows.held
            runs.finish(run, status)

    def _say_cut(self, key: str, found: int, shown: int, what: str, rest: str = "") -> None:
        if found > shown:
            logger.warning("%r: W&B can show %d of its %d %s%s", key, shown, found, what, rest)


def _imported() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise MissingPackageError("wandb", extra="wandb") from error
    return wandb


def _interrupter(run: RunInfo, is_asked: Event) -> Callable[[], None]:
    """Return what stops the training when somebody asks for it in W&B."""

    def interrupt() -> None:  # a plain function, as W&B copies its settings with all they hold
        is_asked.set()
        if interrupt_training(run):
            logger.warning("the run was stopped in W&B; the training is interrupted as by Ctrl-C")

    return interrupt


def _counted(epoch: int | None) -> int | None:
    """Return an epoch counted from 1, as the x axis in W&B counts them."""
    return None if epoch is None else epoch + 1
