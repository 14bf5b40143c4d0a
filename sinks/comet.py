"""Takes a run to Comet: online, or into an archive that `comet upload` sends later.

Guarantees: the experiment's key is made of the run's id, so that all attempts and archives of a run
are one experiment; an experiment of the user's own stays the global one; Comet logs nothing of its
own accord, and patches nothing; names are never cut into one.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import math
import os
import shlex
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from zipfile import BadZipFile, ZipFile

import numpy as np
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

logger = logging.getLogger("trainbus.sinks.comet")

TESTED = "3.58.8"
NEEDS = (
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

_LONGEST = 1000
"""Characters of a parameter that Comet takes."""

_ADVICE = "set COMET_API_KEY, check the network, or set `mode: offline`"

_QUIET = {"COMET_DISABLE_AUTO_LOGGING": "1", "COMET_ERROR_TRACKING_ENABLE": "false"}
_STARTING = threading.Lock()
"""Comet's global experiment is set aside while one is started."""


class CometOptions(Options, frozen=True, kw_only=True):
    """Options of the `comet` sink; Comet reads the API key from COMET_API_KEY or its own file."""

    mode: Annotated[
        Literal["online", "offline"],
        Meta(description="Send to Comet at once, or write an archive for `comet upload`"),
    ] = "online"
    project: (
        Annotated[str, Meta(min_length=1, description="Project; by default the trainer's")] | None
    ) = None
    workspace: Annotated[str, Meta(min_length=1, description="Workspace")] | None = None
    name: (
        Annotated[str, Meta(description="Name of the experiment; by default the trainer's")] | None
    ) = None
    tags: Annotated[tuple[str, ...], Meta(description="Tags besides the trainer's")] = ()
    dir: Annotated[
        str,
        Meta(min_length=1, description="Folder of archives; `{run}` is replaced by the run's id"),
    ] = "comet"
    save_checkpoints: Annotated[
        Literal["best", "last", "all", "none"], Meta(description="Checkpoints kept as models")
    ] = "best"


class CometSink(Sink):
    """Feeds one Comet experiment."""

    Options = CometOptions
    service = "comet_ml"
    volatile = True
    options: CometOptions

    def __init__(self, options: CometOptions | None = None) -> None:
        super().__init__(options)
        self._experiment: Any = None
        self._where: str | None = None

    def check(self) -> str:
        """Look for the API key, or make sure that the folder of an archive can be written.

        Raises:
            MissingPackageError: comet_ml is not installed.
            SinkError: there is no key, or the folder can't be written.
        """
        _comet()
        if self.options.mode == "online" and not _has_api_key():
            raise SinkError(f"found no API key for Comet; {_ADVICE}")
        return f"{self.options.mode}, {check_folder(self.options.dir)}"

    def open(self, run: RunInfo) -> None:
        """Start the experiment, or go on in it.

        Raises:
            MissingPackageError: comet_ml is not installed.
            SinkError: Comet refuses to start the experiment.
        """
        comet = _comet()
        options, started = self.options, run.started
        folder = Path(options.dir.replace("{run}", run.id)).expanduser().absolute()
        key = experiment_key(run.id)
        self.lost = 0
        self._names, self._keys = Names(_clean, 100), Names(_clean, 100)
        self._checkpoints: dict[str, CheckpointSaved] = {}
        is_online = options.mode == "online"
        # What was sent is known after a flush; an archive that was not closed is lost as a whole.
        self._sent = Taken(folder / f".{key}.json") if is_online else None
        self._taken = Taken(last=self._sent.last if self._sent else (0, 0))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if run.again and not run.after:
                _remove_unfinished(folder, key)
        except OSError as error:
            raise SinkError(f"can't write {folder}: {error.strerror}; set another `dir`") from error
        if is_online and not _has_api_key():
            raise SinkError(f"found no API key for Comet; {_ADVICE}")
        try:
            with _STARTING:
                self._experiment = _start(
                    comet,
                    workspace=options.workspace,
                    project_name=options.project or started.project,
                    experiment_key=key,
                    online=is_online,
                    config={
                        "offline_directory": str(folder),
                        "name": options.name or started.name,
                        "tags": list(dict.fromkeys([*options.tags, *started.tags])) or None,
                    },
                )
        except Exception as error:  # Comet's, those of requests and ValueError share no base
            raise _refused(str(error), retry=isinstance(error, OSError)) from error
        if not self._experiment.alive:
            self.close()
            raise _refused("its own message is above")
        if is_online:
            self._where = self._experiment.url
        else:
            name = f"{key}-{self._experiment.offline_archive_name_suffix}.zip"
            self._where = f"comet upload {shlex.quote(str(folder / name))}"

    def write(self, records: Sequence[Record]) -> None:
        """Log the records that are new.

        Raises:
            SinkError: nothing was opened.
        """
        if self._experiment is None:
            raise SinkError("write came before open; call open(run) first")
        for record in self._taken.new(records):
            self._take(self._experiment, record.event)

    def flush(self) -> None:
        """Wait until Comet has everything, if it is online."""
        sent = None if self._experiment is None else self._sent
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

    def keeps(self, event: CheckpointSaved | ArtifactLogged) -> bool:
        """Return whether the files of an event are sent."""
        wanted = self.options.save_checkpoints
        if isinstance(event, ArtifactLogged):
            return True
        return wanted == "all" or (wanted != "none" and event.kind != "periodic")

    @property
    def where(self) -> str | None:
        """Address of the experiment, or the command that uploads it."""
        return self._where

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
                for name, value in _model_values(event).items():
                    experiment.log_other(self._keys(name), _finite(value))
            case MetricsLogged(final=True):
                for name, value in event.values.items():
                    experiment.log_metric(self._names(metric_name(name, final=True)), value)
            case MetricsLogged():
                epoch = None if event.epoch is None else event.epoch + 1
                for name, value in event.values.items():
                    experiment.log_metric(self._names(name), value, step=axis(event), epoch=epoch)
            case AlertRaised():
                experiment.log_other(self._keys(f"{event.level}: {event.title}"), event.text)
            case CheckpointSaved():
                self._take_checkpoint(experiment, event)
            case RunEnded():
                self._take_end(experiment, event)
            case ArtifactLogged():
                for path in event.paths:
                    self._log_file(experiment, path, f"{_clean(event.name)}/{Path(path).name}")
            case _:
                self._show(experiment, event)

    def _log_params(self, experiment: Any, params: Mapping[str, Any]) -> None:
        found = {self._keys(name): value for name, value in flat(params).items()}
        for name, value in found.items():
            if isinstance(value, str) and len(value) > _LONGEST:
                logger.warning(
                    "%r: Comet can show %d of its %d characters", name, _LONGEST, len(value)
                )
                found[name] = value[:_LONGEST]
        experiment.log_parameters(found)

    def _show(self, experiment: Any, event: Any) -> None:
        """Log a picture, chart, table or text; one that can't be shown costs only itself."""
        try:
            match event:
                case ImageLogged():
                    self._log_image(experiment, event)
                case CurveLogged():
                    for name, values in zip(event.classes, event.y, strict=False):
                        points = np.array([event.x, values], dtype=float)
                        x, y = points[:, np.isfinite(points).all(axis=0)].tolist()
                        if x:
                            key = self._names(f"{event.key}/{name}")
                            experiment.log_curve(key, x, y, step=axis(event))
                case ConfusionMatrixLogged() if np.isfinite(event.matrix).all():
                    experiment.log_confusion_matrix(
                        matrix=event.matrix.tolist(),
                        labels=event.classes,
                        title=event.key,
                        file_name=f"{_clean(event.key)}.json",
                        max_categories=max(len(event.classes), 1),
                        step=axis(event),
                    )
                case HistogramLogged():
                    from comet_ml.data_structure import Histogram

                    histogram, edges = Histogram(), np.asarray(event.edges, dtype=float)
                    histogram.add((edges[:-1] + edges[1:]) / 2, counts=event.counts)
                    name = _clean(event.key)
                    experiment.log_histogram_3d(histogram, name=name, step=axis(event))
                case TableLogged():
                    text = io.StringIO()
                    csv.writer(text).writerows([event.columns, *event.rows])
                    experiment.log_asset_data(
                        text.getvalue(), name=f"{_clean(event.key)}.csv", step=axis(event)
                    )
                case TextLogged():
                    # Comet takes a text that is the path of a file for the file.
                    text_only = f"{event.text}\n" if os.path.isfile(event.text) else event.text
                    about = {"key": event.key}
                    experiment.log_text(text_only, step=axis(event), metadata=about)
                case _:
                    picture = drawn(event)
                    if picture is not None:
                        self._log_picture(experiment, event, picture, ".png")
        except (OSError, TypeError, ValueError) as error:
            self.lost += 1
            logger.warning("%r can't be shown in Comet: %s", event.key, error)

    def _log_image(self, experiment: Any, event: ImageLogged) -> None:
        if event.array is not None:
            self._log_picture(experiment, event, png(event.array), ".png", event.caption)
        else:
            path = Path(event.path or "")
            self._log_picture(experiment, event, path.read_bytes(), path.suffix, event.caption)

    def _log_picture(
        self, experiment: Any, event: Any, data: bytes, suffix: str, caption: str | None = None
    ) -> None:
        # The bytes and not the path: Comet reads a file later, when it may be another.
        experiment.log_image(
            io.BytesIO(data),
            name=f"{_clean(event.key)}{suffix}",
            step=axis(event),
            metadata={"caption": caption} if caption else None,
        )

    def _take_checkpoint(self, experiment: Any, event: CheckpointSaved) -> None:
        wanted = self.options.save_checkpoints
        if event.kind != "periodic":
            # The trainer overwrites these files: what they hold at the end is what counts.
            self._checkpoints[event.kind] = event
        elif wanted == "all":
            self._log_checkpoint(experiment, event, f"periodic-{axis(event)}")

    def _log_checkpoint(self, experiment: Any, event: CheckpointSaved, name: str) -> None:
        numbers = {k: _finite(v) for k, v in event.metrics.items()}
        epoch = None if event.epoch is None else event.epoch + 1
        self._log_file(experiment, event.path, name, {"epoch": epoch, "metrics": numbers})

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
            name, value = f"best/{event.best.metric}", _finite(event.best.value)
            experiment.log_other(self._keys(name), value)
            if event.best.epoch is not None:
                experiment.log_other("best/epoch", event.best.epoch + 1)
        if event.status == "failed":
            text = event.error.traceback or event.error.message if event.error else event.reason
            experiment._report_experiment_error(text or "failed", has_crashed=True)
        wanted = self.options.save_checkpoints
        kinds = {"all": ["last", "best"], "none": []}.get(wanted, [wanted])
        found = [kind for kind in kinds if kind in self._checkpoints]
        for kind in found or [kind for kind in self._checkpoints if wanted == "best"]:
            self._log_checkpoint(experiment, self._checkpoints[kind], kind)


def experiment_key(run: str) -> str:
    """Return the key of a run's experiment: 40 letters and digits."""
    return hashlib.sha1(run.encode("utf-8", "backslashreplace")).hexdigest()


def _comet() -> Any:
    """Import Comet without its hooks into frameworks, exceptions and error tracking.

    Raises:
        MissingPackageError: comet_ml is not installed.
    """
    if sys.modules.get("comet_ml") is not None:
        return sys.modules["comet_ml"]
    hook, before = sys.excepthook, {name: os.environ.get(name) for name in _QUIET}
    os.environ.update(_QUIET)
    try:
        import comet_ml
    except ImportError as error:
        raise MissingPackageError("comet_ml", extra="comet") from error
    finally:
        sys.excepthook = hook
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    return comet_ml


def _start(comet: Any, *, config: Mapping[str, Any], **given: Any) -> Any:
    from comet_ml.config import get_global_experiment, set_global_experiment

    active = get_global_experiment()
    set_global_experiment(None)  # else Comet ends it
    try:
        return comet.start(
            mode="get_or_create",
            experiment_config=comet.ExperimentConfig(
                log_code=False,
                log_graph=False,
                parse_args=False,
                display_summary_level=0,
                log_git_metadata=False,
                log_git_patch=False,
                log_env_details=False,
                auto_output_logging=False,
                auto_param_logging=False,
                auto_metric_logging=False,
                auto_log_co2=False,
                **config,
            ),
            **given,
        )
    finally:
        set_global_experiment(active)


def _has_api_key() -> bool:
    from comet_ml.config import get_api_key, get_config

    return bool(get_api_key(None, get_config()))


def _refused(why: str, *, retry: bool = False) -> SinkError:
    return SinkError(f"Comet can't start the experiment ({why[:200]}); {_ADVICE}", retry=retry)


def _remove_unfinished(folder: Path, key: str) -> None:
    """Remove archives that a killed process began: they are empty, and can't be uploaded."""
    for path in folder.glob(f"{key}-*.zip"):
        try:
            with ZipFile(path) as archive:
                is_whole = "experiment.json" in archive.namelist()
        except (OSError, BadZipFile):
            is_whole = False
        if not is_whole:
            path.unlink(missing_ok=True)


def _finite(value: float) -> float | str:
    """Return a number as JSON has them, NaN and ±Inf as text."""
    return value if math.isfinite(value) else str(value)


def _clean(name: str) -> str:
    """Return a name that Comet takes as it is: without line breaks, not empty, no home folder."""
    return "".join(c if c.isprintable() else "_" for c in name).strip(" ~") or "_"


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
