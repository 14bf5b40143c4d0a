"""Sends a run to Comet: online, or as an archive that `comet upload` sends later.

Guarantees: the experiment key is derived from the run id, so all attempts and archives of a run
belong to one experiment; an experiment of the user stays the global one; Comet logs nothing
automatically and patches nothing; different names stay different.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from trainbus import events
from trainbus.interfaces import FilePath, Options, RunInfo
from trainbus.toolkit.plots import picture
from trainbus.toolkit.sinks import (
    LatestCheckpoints,
    Names,
    SaveCheckpoints,
    SeenRecords,
    Timeline,
    TrackerSink,
    best_values,
    check_folder,
    epochs_done,
    flat,
    folder_of,
    metric_name,
    model_values,
    set_fields,
    side_by_side,
    to_json,
    writing_to,
    x_position,
)

from .session import check_key, experiment_key, import_comet, remove_unfinished, start

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
"""Names that the sink needs; `trainbus doctor` checks that they exist."""

_MAX_PENDING = 2000
"""Records between two flushes; Comet keeps everything that it has not sent in memory."""

_MAX_PARAM_LENGTH = 1000
"""Characters of a parameter that Comet accepts."""


class CometOptions(Options, frozen=True, kw_only=True):
    """Options of the `comet` sink; Comet reads the API key from COMET_API_KEY or its own file."""

    mode: Annotated[
        Literal["online", "offline"],
        Meta(description="Send to Comet directly, or write an archive for `comet upload`"),
    ] = "online"
    project: (
        Annotated[str, Meta(min_length=1, description="Project; by default the run's")] | None
    ) = None
    workspace: Annotated[str, Meta(min_length=1, description="Workspace")] | None = None
    name: Annotated[str, Meta(description="Experiment name; by default the run's name")] | None = (
        None
    )
    tags: Annotated[tuple[str, ...], Meta(description="Tags to add to the run's")] = ()
    dir: Annotated[
        FilePath,
        Meta(
            min_length=1, description="Folder for the archives; `{run}` is replaced by the run's id"
        ),
    ] = "comet"
    save_checkpoints: SaveCheckpoints = "best"


class CometSink(TrackerSink):
    """Feeds one Comet experiment."""

    Options = CometOptions
    service = "comet_ml"
    tracker = "Comet"
    durable_only_after_close = True
    options: CometOptions

    _experiment: Any = None

    def check(self) -> str:
        """Check the API key if online, and that the folder of archives can be written.

        Raises:
            MissingPackageError: comet_ml is not installed.
            SinkError: there is no key, or the folder can't be written.
        """
        import_comet()
        if self.options.mode == "online":
            check_key()
        return f"{self.options.mode}, {check_folder(self.options.dir)}"

    def open(self, run: RunInfo) -> None:
        """Start the experiment, or continue it.

        Raises:
            MissingPackageError: comet_ml is not installed.
            SinkError: Comet can't start the experiment.
        """
        super().open(run)
        comet = import_comet()
        options = self.options
        folder, key = folder_of(options.dir, run.id), experiment_key(run.id)
        is_online = options.mode == "online"
        self._names = Names(_printable, 100)
        self._checkpoints = LatestCheckpoints(options.save_checkpoints)
        self._timeline, self._pending = Timeline(), 0
        # A flush confirms what was sent; an archive that was not closed is lost as a whole.
        self._sent = SeenRecords(folder / f".{key}.json") if is_online else None
        self._seen = SeenRecords(last=self._sent.last if self._sent else None)
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if run.reopened and not run.resume_after:
                remove_unfinished(folder, key)
        if is_online:
            check_key()
        self._experiment = start(comet, key, folder, options, run.started)
        if is_online:
            self._location = self._experiment.url
        else:
            name = f"{key}-{self._experiment.offline_archive_name_suffix}.zip"
            self._location = f"comet upload {shlex.quote(str(folder / name))}"

    def write(self, records: Sequence[events.Record]) -> None:
        """Log the records that are new."""
        for record in self._seen.new(records):
            self._write(self._experiment, record.event)
        self._pending += len(records)
        if self._pending >= _MAX_PENDING:
            self.flush()

    def flush(self) -> None:
        """Wait until Comet has everything, if it is online."""
        sent = None if self._experiment is None else self._sent
        self._pending = 0
        if sent is not None and self._seen.last != sent.last and self._experiment.flush():
            sent.last = dict(self._seen.last)
            sent.save()

    def close(self) -> None:
        """End the experiment: send the rest, or write the archive."""
        experiment, self._experiment = self._experiment, None
        if experiment is not None:
            experiment.end()
            if self._sent is not None:
                self._sent.last = dict(self._seen.last)
                self._sent.save()

    def _write(self, experiment: Any, event: object) -> None:
        match event:
            case events.RunStarted():
                names = ("group", "job_type", "notes", "task", "framework", "framework_version")
                experiment.log_others(set_fields(event, *names))
                self._log_params(experiment, event.params)
            case events.ParamsUpdated():
                self._log_params(experiment, event.params)
            case events.ModelDescribed():
                for name, value in model_values(event).items():
                    experiment.log_other(self._names(name), to_json(value))
            case events.MetricsLogged():
                place = {"step": self._timeline(event), "epoch": epochs_done(event.epoch)}
                for name, value in event.values.items():
                    key = self._names(metric_name(name, final=event.final))
                    experiment.log_metric(key, value, **place)
            case events.TextLogged():
                # Comet replaces a text that is the path of a file by the content of that file.
                text = f"{event.text}\n" if os.path.isfile(event.text) else event.text
                metadata = {"key": event.key}
                experiment.log_text(text, step=self._timeline(event), metadata=metadata)
            case events.AlertRaised():
                experiment.log_other(self._names(f"{event.level}: {event.title}"), event.text)
            case events.CheckpointSaved():
                if not self._checkpoints.put_off(event):
                    self._log_checkpoint(experiment, event, f"periodic-{x_position(event)}")
            case events.ArtifactLogged():
                for path, name in side_by_side(event.paths).items():
                    self._log_file(experiment, path, f"{_printable(event.name)}/{name}")
            case events.RunEnded():
                self._end(experiment, event)
            case _ if hasattr(event, "key"):  # an image, chart or table
                with self.showing(event.key):
                    self._show(experiment, event, self._timeline(event))

    def _log_params(self, experiment: Any, params: Mapping[str, Any]) -> None:
        found = {self._names(name): value for name, value in flat(params).items()}
        for name, value in found.items():
            if isinstance(value, str) and len(value) > _MAX_PARAM_LENGTH:
                text = "%r: Comet can show %d of its %d characters"
                logger.warning(text, name, _MAX_PARAM_LENGTH, len(value))
                found[name] = value[:_MAX_PARAM_LENGTH]
        experiment.log_parameters(found)

    def _show(self, experiment: Any, event: Any, step: int) -> None:
        name = _printable(event.key)
        match event:
            case events.ConfusionMatrixLogged() if np.isfinite(event.matrix).all():
                experiment.log_confusion_matrix(
                    matrix=event.matrix.tolist(),
                    labels=event.classes,
                    title=event.key,
                    file_name=f"{name}.json",
                    max_categories=max(len(event.classes), 1),
                    step=step,
                )
            case events.ImageLogged() | events.ConfusionMatrixLogged():
                data, suffix = picture(event)
                caption = getattr(event, "caption", None)
                metadata = {"caption": caption} if caption else None
                # Bytes instead of the path: Comet reads files later, when they may have changed.
                image = io.BytesIO(data)
                experiment.log_image(image, name=f"{name}{suffix}", step=step, metadata=metadata)
            case events.CurveLogged():
                for label, values in zip(event.classes, event.y, strict=False):
                    points = np.array([event.x, values], dtype=float)
                    x, y = points[:, np.isfinite(points).all(axis=0)].tolist()
                    if x:
                        experiment.log_curve(self._names(f"{event.key}/{label}"), x, y, step=step)
            case events.HistogramLogged():
                from comet_ml.data_structure import Histogram

                histogram, edges = Histogram(), np.asarray(event.edges, dtype=float)
                histogram.add((edges[:-1] + edges[1:]) / 2, counts=event.counts)
                experiment.log_histogram_3d(histogram, name=name, step=step)
            case events.TableLogged():
                text = io.StringIO()
                csv.writer(text).writerows([event.columns, *event.rows])
                experiment.log_asset_data(text.getvalue(), name=f"{name}.csv", step=step)

    def _log_checkpoint(self, experiment: Any, event: events.CheckpointSaved, name: str) -> None:
        metadata = {"epoch": epochs_done(event.epoch), "metrics": to_json(event.metrics)}
        self._log_file(experiment, event.path, name, metadata)

    def _log_file(
        self, experiment: Any, path: str, name: str, metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Log a model if metadata is given, else an asset."""
        if not Path(path).exists():
            self.lose(name, f"no file at {path}")
        elif metadata is not None:
            experiment.log_model(name, path, metadata=metadata)
        elif Path(path).is_dir():
            experiment.log_asset_folder(path, log_file_name=True, recursive=True)
        else:
            experiment.log_asset(path, file_name=name)

    def _end(self, experiment: Any, event: events.RunEnded) -> None:
        experiment.log_other("status", event.status)
        if event.reason:
            experiment.log_other("ended", event.reason)
        for name, value in best_values(event).items():
            experiment.log_other(self._names(name), to_json(value))
        if event.status == "failed":
            text = event.error.traceback or event.error.message if event.error else event.reason
            experiment._report_experiment_error(text or "failed", has_crashed=True)
        for saved in self._checkpoints.at_end():
            self._log_checkpoint(experiment, saved, saved.kind)


def _printable(name: str) -> str:
    """Return a name that Comet does not change: no line breaks, not empty, no home folder."""
    return "".join(c if c.isprintable() else "_" for c in name).strip(" ~") or "_"
