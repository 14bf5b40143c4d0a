"""Sends a run to Weights & Biases: config, metrics, pictures, interactive curves, model artifacts.

Guarantees: rows are never logged behind the run's step, so W&B drops none; `epoch` (`trainer/step`
for metrics of single steps) is the x axis; names follow W&B's rules; a chart that has to be cut is
logged; an active run is used and left open; a run started here is finished with the training's
status.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, Any

from trainbus import events
from trainbus.errors import SinkError
from trainbus.interfaces import RunInfo
from trainbus.toolkit.sinks import (
    LatestCheckpoints,
    Positions,
    SeenRecords,
    TrackerSink,
    best_values,
    epochs_done,
    interrupt_training,
    model_values,
    required_package,
)

from . import session
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
"""Names that the sink relies on; `trainbus doctor` checks that they exist."""

_LEVELS = {"info": "INFO", "warning": "WARN", "error": "ERROR"}


class WandbSink(TrackerSink):
    """Feeds one Weights & Biases run."""

    Options = WandbOptions
    service = "wandb"
    tracker = "W&B"
    durable_only_after_close = True
    options: WandbOptions

    _run: WandbRun | None = None

    def check(self) -> str:
        """Log in, or make sure that the folder of an offline run can be written.

        Raises:
            MissingPackageError: wandb is not installed.
            SinkError: W&B rejects the login, can't be reached, or the folder can't be written.
        """
        return session.check(self.options)

    def open(self, run: RunInfo) -> None:
        """Start the W&B run, continue the one that is resumed, or use the active one.

        Raises:
            MissingPackageError: wandb is not installed.
            SinkError: W&B can't start the run.
        """
        super().open(run)
        with required_package("wandb"):
            import wandb
        self._seen, self._uploaded = SeenRecords(), SeenRecords()
        self._position: Positions = {}
        self._stop = Event()
        self._checkpoints = LatestCheckpoints(self.options.save_checkpoints)
        # An active run that the framework's own logger feeds would get every value twice.
        is_fed = "wandb" in run.started.own_loggers
        self._owned = is_fed or not session.is_users(wandb.run)
        if self._owned:
            self._run = session.start(run, self.options, _interrupter(run, self._stop))
            if run.reopened:
                self._position = session.stored(self._run)
                self._seen = SeenRecords(last=self._position)
        else:
            assert wandb.run is not None
            self._run = session.use(wandb.run, run, self.options)
        self._rows = Rows(
            self._run,
            run.started.goal_of,
            is_shared=not self._owned or self._run.settings.mode == "shared",
            is_new=self._owned and not run.reopened and not run.resumed,
        )
        # W&B samples the machine by itself while the training runs.
        is_live = run.pid is not None or not self._owned
        self._measures_system = is_live and not self._run.settings.x_disable_stats
        self._sent = dict(self._position)
        self._curves = Curves(self._run)
        self._location = session.location(self._run)

    def write(self, records: Sequence[events.Record]) -> None:
        """Log the records that are new.

        Raises:
            SinkError: the user's run was finished too early.
        """
        for record in self._seen.new(records):
            self._rows.time = record.time
            self._position[record.source] = record.position
            if not (record.stream == "system" and self._measures_system):
                self._take_safely(record.event)
            if self._rows.are_sent:
                self._sent = dict(self._position)
        if self._run is not None:
            self._save_position(self._run, self._sent)

    def upload(self, records: Sequence[events.Record]) -> None:
        """Take checkpoints and artifacts, which may be large, in another thread than rows.

        Raises:
            SinkError: the user's run was finished too early.
        """
        for record in self._uploaded.new(records):
            self._take_safely(record.event)

    @property
    def in_process(self) -> bool:
        """Whether the user's program has an active run, which the sink then uses."""
        return session.is_users(getattr(sys.modules.get("wandb"), "run", None))

    def close(self) -> None:
        """Finish a run that was started here, as failed unless its end was written."""
        try:
            if self._run is not None:
                self._rows.end(is_cut_short=False)
        finally:
            self._finish("failed")

    def _take_safely(self, event: object) -> None:
        from wandb.errors import UsageError

        assert self._run is not None
        try:
            self._take(self._run, event)
        except UsageError as error:
            if self._owned:
                raise
            raise SinkError(
                f"your program's W&B run no longer accepts records ({error}); finish it after "
                "the training, or give this sink its own run with `isolation: process`"
            ) from error

    def _take(self, run: WandbRun, event: object) -> None:
        from . import charts

        match event:
            case events.MetricsLogged(final=True):
                run.summary.update({f"final/{k}": v for k, v in event.values.items()})
            case events.MetricsLogged(phase="system", epoch=None, step=None):
                self._rows.log_apart(event.values)
            case events.MetricsLogged(step=None):
                self._rows.log(event.values, event.epoch)
            case events.MetricsLogged():
                self._rows.log_step(event)
            case events.ParamsUpdated():
                run.config.update(event.params, allow_val_change=True)  # type: ignore[no-untyped-call]
            case events.ModelDescribed():
                self._rows.log(model_values(event), None)
            case events.EpochStarted():
                self._rows.start_epoch(event.epoch)
            case events.EpochEnded():
                self._rows.end_epoch(event)
            case events.ImageLogged() if self.options.log_images:
                self._show(event, partial(charts.image, event))
            case events.CurveLogged():
                self._log_curve(event)
            case events.ConfusionMatrixLogged():
                size, rest = event.matrix.size, ", the largest"
                self._log_cut(event.key, size, charts.ROW_LIMIT, "cells", rest)
                self._show(event, partial(charts.confusion_matrix, event))
            case events.TableLogged():
                self._log_cut(event.key, len(event.rows), charts.ROW_LIMIT, "rows")
                self._show(event, partial(charts.table, event))
            case events.HistogramLogged():
                self._show(event, partial(charts.histogram, event))
            case events.TextLogged():
                self._show(event, partial(charts.text, event))
            case events.CheckpointSaved():
                if not self._checkpoints.put_off(event):
                    self._log_checkpoint(run, event, f"epoch-{epochs_done(event.epoch)}")
            case events.ArtifactLogged():
                about = event.kind, event.paths, event.aliases, event.metadata
                log_files(run, artifact_name(event.name), *about, self.lose)
            case events.AlertRaised():
                run.alert(event.title, event.text or event.title, level=_LEVELS[event.level])
            case events.RunEnded():
                self._end(run, event)

    def _show(self, event: Any, build: Callable[[], Any]) -> None:
        """Log a picture, chart or table, unless it can't be built."""
        value = None
        with self.showing(event.key):
            value = build()
        if value is not None:
            self._rows.show(event.key, event.epoch, value)

    def _log_curve(self, event: events.CurveLogged) -> None:
        from . import charts

        x, y = charts.curve_arrays(event)
        if not x.size or not y.size:
            return
        points, per_class = self.options.curve_points, self.options.curves == "per_class"
        shown = charts.points_shown(event, points, per_class=per_class)
        self._show(event, partial(charts.curve, event, shown, per_class=per_class))
        if shown < points and (name := self._curves.add(event)) is not None:
            rest = f" per class; artifact {name!r} has all points of all curves"
            self._log_cut(event.key, points, shown, "points", rest)

    def _log_checkpoint(self, run: WandbRun, event: events.CheckpointSaved, alias: str) -> None:
        about = {"epoch": epochs_done(event.epoch), "metrics": event.metrics, **event.metadata}
        name = artifact_name(f"run_{run.id}_model")
        log_files(run, name, "model", [event.path], [alias], about, self.lose)

    def _end(self, run: WandbRun, event: events.RunEnded) -> None:
        try:
            self._rows.end(is_cut_short=event.status != "finished")
            if best := best_values(event):
                run.summary.update(best)
            is_from_here = self._stop.is_set() and event.status == "stopped"
            if reason := "stopped from W&B" if is_from_here else event.reason:
                run.summary.update({"ended": reason})
            for checkpoint in self._checkpoints.at_end():
                self._log_checkpoint(run, checkpoint, checkpoint.kind)
            self._curves.log()
            self._save_position(run, self._position)
        finally:
            self._finish(event.status)

    def _save_position(self, run: WandbRun, positions: Positions) -> None:
        """Save in W&B itself which records the run has, for a process that continues it."""
        if self._owned and positions:
            run.summary.update(session.as_summary(positions))

    def _finish(self, status: str) -> None:
        run, self._run = self._run, None
        if run is not None:
            self.lost += self._rows.held
            session.finish(run, status)

    def _log_cut(self, key: str, found: int, shown: int, what: str, rest: str = "") -> None:
        if found > shown:
            logger.warning("%r: W&B can show %d of its %d %s%s", key, shown, found, what, rest)


def _interrupter(run: RunInfo, is_stopped: Event) -> Callable[[], None]:
    """Return what W&B calls when somebody stops the run there."""

    def interrupt() -> None:  # a plain function, as W&B deep-copies its settings
        is_stopped.set()
        if interrupt_training(run):
            logger.warning("the run was stopped in W&B; interrupting the training as Ctrl-C does")

    return interrupt
