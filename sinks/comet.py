"""Takes a run to Comet: online, or into an archive that `comet upload` sends later.

Guarantees: the experiment's key is made of the run's id, so that all attempts and archives of a run
are one experiment; an experiment of the user's own stays the global one; Comet logs nothing of its
own accord, and patches nothing; names are never cut into one.
"""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainbus.errors import SinkError
from trainbus.events import (
    AlertRaised,
    ArtifactLogged,
    CheckpointSaved,
    EpochEnded,
    EpochStarted,
    MetricsLogged,
    ModelDescribed,
    ParamsUpdated,
    Record,
    RunEnded,
    RunStarted,
    UnknownEvent,
)
from trainbus.interfaces import RunInfo, Sink
from trainbus.toolkit.sinks import (
    LatestCheckpoints,
    Names,
    SeenRecords,
    Timeline,
    check_folder,
    flat,
    folder_of,
    is_wanted,
    metric_name,
    model_values,
    side_by_side,
    x_position,
)

from ._comet_charts import show
from ._comet_experiment import experiment_key, import_comet, look_for_key, remove_unfinished, start
from ._comet_options import CometOptions, clean

logger = logging.getLogger("trainbus.sinks.comet")

TESTED_VERSIONS = "3.58.8"
REQUIRED_NAMES = (
    "comet_ml:start",
    "comet_ml:ExperimentConfig",
    "comet_ml:OfflineExperiment._report_experiment_error",
    "comet_ml:OfflineExperiment.log_curve",
    "comet_ml:OfflineExperiment.log_confusion_matrix",
    "comet_ml:OfflineExperiment.log_histogram_3d",
    "comet_ml:OfflineExperiment.log_model",
    "comet_ml.config:get_global_experiment",
    "comet_ml.config:set_global_experiment",
    "comet_ml.data_structure:Histogram",
)
"""What the sink relies on; `trainbus doctor` looks whether it is there."""

_MOST_WAITING = 2000
_LONGEST = 1000
"""Characters of a parameter that Comet takes."""


class CometSink(Sink):
    """Feeds one Comet experiment."""

    Options = CometOptions
    service = "comet_ml"
    durable_only_after_close = True
    options: CometOptions

    def __init__(self, options: CometOptions | None = None) -> None:
        super().__init__(options)
        self._experiment: Any = None
        self._location: str | None = None

    def check(self) -> str:
        """Look for the API key, or make sure that the folder of an archive can be written.

        Raises:
            MissingPackageError: comet_ml is not installed.
            SinkError: there is no key, or the folder can't be written.
        """
        import_comet()
        if self.options.mode == "online":
            look_for_key()
        return f"{self.options.mode}, {check_folder(self.options.dir)}"

    def open(self, run: RunInfo) -> None:
        """Start the experiment, or go on in it.

        Raises:
            MissingPackageError: comet_ml is not installed.
            SinkError: Comet refuses to start the experiment.
        """
        comet = import_comet()
        options = self.options
        folder, key = folder_of(options.dir, run.id), experiment_key(run.id)
        is_online = options.mode == "online"
        self.lost = 0
        self._names = Names(clean, 100)
        self._overwritten = LatestCheckpoints(options.save_checkpoints)
        self._timeline, self._waiting = Timeline(), 0
        # What was sent is known after a flush; an archive that was not closed is lost as a whole.
        self._sent = SeenRecords(folder / f".{key}.json") if is_online else None
        self._taken = SeenRecords(last=self._sent.last if self._sent else (0, 0))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if run.reopened and not run.resume_after:
                remove_unfinished(folder, key)
        except OSError as error:
            raise SinkError(f"can't write {folder}: {error.strerror}; set another `dir`") from error
        if is_online:
            look_for_key()
        self._experiment = start(comet, key, folder, options, run.started)
        if is_online:
            self._location = self._experiment.url
        else:
            name = f"{key}-{self._experiment.offline_archive_name_suffix}.zip"
            self._location = f"comet upload {shlex.quote(str(folder / name))}"

    def write(self, records: Sequence[Record]) -> None:
        """Log the records that are new.

        Raises:
            SinkError: nothing was opened.
        """
        if self._experiment is None:
            raise SinkError("write came before open; call open(run) first")
        for record in self._taken.new(records):
            self._take(self._experiment, record.event)
        self._waiting += len(records)
        if self._waiting >= _MOST_WAITING:  # Comet would keep all that it has not sent
            self.flush()

    def flush(self) -> None:
        """Wait until Comet has everything, if it is online."""
        sent = None if self._experiment is None else self._sent
        self._waiting = 0
        if sent is not None and self._taken.last > sent.last and self._experiment.flush():
            sent.last = self._taken.last
            sent.save()

    def close(self) -> None:
        """End the experiment: send what is left, or write the archive."""
        experiment, self._experiment = self._experiment, None
        if experiment is not None:
            experiment.end()
            if self._sent is not None:
                self._sent.last = self._taken.last
                self._sent.save()

    def wants_files(self, event: CheckpointSaved | ArtifactLogged) -> bool:
        """Return whether the files of an event are sent."""
        return is_wanted(self.options.save_checkpoints, event)

    @property
    def location(self) -> str | None:
        """Address of the experiment, or the command that uploads it."""
        return self._location

    def _take(self, experiment: Any, event: object) -> None:
        match event:
            case RunStarted():
                names = ("group", "job_type", "notes", "task", "framework", "framework_version")
                known = {name: getattr(event, name) for name in names if getattr(event, name)}
                experiment.log_others(known)
                self._log_params(experiment, event.params)
            case ParamsUpdated():
                self._log_params(experiment, event.params)
            case ModelDescribed():
                for name, value in model_values(event).items():
                    experiment.log_other(self._names(name), _finite(value))
            case MetricsLogged():
                place = {"step": self._timeline(event), "epoch": _epochs_done(event)}
                for name, value in event.values.items():
                    key = self._names(metric_name(name, final=event.final))
                    experiment.log_metric(key, value, **place)
            case AlertRaised():
                experiment.log_other(self._names(f"{event.level}: {event.title}"), event.text)
            case CheckpointSaved():
                if not self._overwritten.put_off(event):
                    self._log_checkpoint(experiment, event, f"periodic-{x_position(event)}")
            case RunEnded():
                self._take_end(experiment, event)
            case ArtifactLogged():
                for path, name in side_by_side(event.paths).items():
                    self._log_file(experiment, path, f"{clean(event.name)}/{name}")
            case EpochStarted() | EpochEnded() | UnknownEvent():
                pass
            case _:
                self._show(experiment, event)

    def _log_params(self, experiment: Any, params: Mapping[str, Any]) -> None:
        found = {self._names(name): value for name, value in flat(params).items()}
        for name, value in found.items():
            if isinstance(value, str) and len(value) > _LONGEST:
                text = "%r: Comet can show %d of its %d characters"
                logger.warning(text, name, _LONGEST, len(value))
                found[name] = value[:_LONGEST]
        experiment.log_parameters(found)

    def _show(self, experiment: Any, event: Any) -> None:
        """Log a picture, chart, table or text; one that can't be shown costs only itself."""
        try:
            show(experiment, event, self._names, self._timeline(event))
        except (OSError, TypeError, ValueError) as error:
            self.lost += 1
            logger.warning("%r can't be shown in Comet: %s", event.key, error)

    def _log_checkpoint(self, experiment: Any, event: CheckpointSaved, name: str) -> None:
        numbers = {k: _finite(v) for k, v in event.metrics.items()}
        about = {"epoch": _epochs_done(event), "metrics": numbers}
        self._log_file(experiment, event.path, name, about)

    def _log_file(
        self, experiment: Any, path: str, name: str, about: Mapping[str, Any] | None = None
    ) -> None:
        """Log a model, if it is told what about it, else an asset."""
        if not Path(path).exists():
            self.lost += 1
            logger.warning("%r can't be kept in Comet: no file at %s", name, path)
        elif about is not None:
            experiment.log_model(name, path, metadata=about)
        elif Path(path).is_dir():
            experiment.log_asset_folder(path, log_file_name=True, recursive=True)
        else:
            experiment.log_asset(path, file_name=name)

    def _take_end(self, experiment: Any, event: RunEnded) -> None:
        experiment.log_other("status", event.status)
        if event.reason:
            experiment.log_other("ended", event.reason)
        if event.best is not None:
            name = self._names(f"best/{event.best.metric}")
            experiment.log_other(name, _finite(event.best.value))
            if event.best.epoch is not None:
                experiment.log_other("best/epoch", event.best.epoch + 1)
        if event.status == "failed":
            text = event.error.traceback or event.error.message if event.error else event.reason
            experiment._report_experiment_error(text or "failed", has_crashed=True)
        for saved in self._overwritten.at_end():
            self._log_checkpoint(experiment, saved, saved.kind)


def _epochs_done(event: MetricsLogged | CheckpointSaved) -> int | None:
    return None if event.epoch is None else event.epoch + 1


def _finite(value: float) -> float | str:
    """Return a number as JSON has them, NaN and ±Inf as text."""
    return value if math.isfinite(value) else str(value)
