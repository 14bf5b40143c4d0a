"""Takes a run to DVCLive's files: TSV curves, metrics.json, params.yaml, plots and pictures.

Guarantees: only files in the run's folder are written (and `dvc.yaml`, if wanted): no Git or DVC
repository is made, changed or asked, and nothing is sent to DVC Studio; each record is there once;
two names never share a file.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainbus.errors import MissingPackageError, SinkError
from trainbus.events import (
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
from trainbus.interfaces import RunInfo, Sink
from trainbus.toolkit.plots import picture
from trainbus.toolkit.sinks import (
    SeenRecords,
    Superseded,
    check_folder,
    folder_of,
    is_wanted,
    metric_name,
    model_values,
    side_by_side,
    x_position,
)

from .files import open_live
from ._names import FileNames
from ._options import DvcliveOptions
from ._params import merged, params_of, plain
from .charts import plot_of

logger = logging.getLogger("trainbus.sinks.dvclive")

TESTED_VERSIONS = "3.49.1"
REQUIRED_NAMES = (
    "dvclive:Live",
    *(f"dvclive:Live._init_{part}" for part in ("dvc", "studio", "dvc_file")),
    *(f"dvclive:Live.log_{what}" for what in ("metric", "params", "image", "plot")),
    *(f"dvclive:Live.make_{what}" for what in ("summary", "dvcyaml")),
    "dvclive.serialize:load_yaml",
)
"""What the sink relies on; `trainbus doctor` looks whether it is there."""

_CHECKPOINTS = "artifacts/checkpoints"


class DvcliveSink(Sink):
    """Writes what DVC, its VS Code extension and DVC Studio show of a run."""

    Options = DvcliveOptions
    service = "dvclive"
    options: DvcliveOptions

    def __init__(self, options: DvcliveOptions | None = None) -> None:
        super().__init__(options)
        self._live: Any = None
        self._folder: Path | None = None

    def check(self) -> str:
        """Make sure that the package is there and the folder can be written.

        Raises:
            MissingPackageError: dvclive is not installed.
            SinkError: the folder can't be written.
        """
        if find_spec("dvclive") is None:
            raise MissingPackageError("dvclive", extra="dvclive")
        return check_folder(self.options.dir)

    def open(self, run: RunInfo) -> None:
        """Open the folder of the run, or go on in it.

        Raises:
            MissingPackageError: dvclive is not installed.
            SinkError: the folder can't be written.
        """
        folder, dvcyaml = folder_of(self.options.dir, run.id), None
        if self.options.dvcyaml is not None:
            dvcyaml = folder_of(self.options.dvcyaml, run.id)
        self.lost = 0
        self._names, self._superseded = FileNames(), Superseded()
        self._kinds: dict[str, type] = {}
        try:
            self._live, self._params = open_live(folder, dvcyaml)
        except OSError as error:
            raise SinkError(f"can't write {folder}: {error.strerror}; set another `dir`") from error
        self._taken, self._folder = SeenRecords(folder / ".trainbus-dvclive.json"), folder

    def write(self, records: Sequence[Record]) -> None:
        """Write the records that are new.

        Raises:
            SinkError: nothing was opened.
            OSError: the disk is full or gone.
        """
        if self._live is None:
            raise SinkError("write came before open; call open(run) first")
        before = self._taken.last
        for record in self._taken.new(records):
            self._take(record.event)
        if self._taken.last > before:
            self._live.make_summary()
            self._taken.save()

    def close(self) -> None:
        """Write `dvc.yaml`, if it is wanted."""
        live, self._live = self._live, None
        if live is not None:
            self._count_lost()
        if live is not None and self.options.dvcyaml is not None:
            live.make_dvcyaml()

    def wants_files(self, event: CheckpointSaved | ArtifactLogged) -> bool:
        """Return whether the files of an event are copied into the folder."""
        return is_wanted(self.options.save_checkpoints, event)

    @property
    def location(self) -> str | None:
        """Path of the folder."""
        return str(self._folder) if self._folder else None

    def _take(self, event: object) -> None:
        match event:
            case RunStarted():
                self._log_params(params_of(event))
            case ParamsUpdated():
                self._log_params(event.params)
            case ModelDescribed():
                for name, value in model_values(event).items():
                    self._log_metric(name, value, plot=False)
            case MetricsLogged():
                if not event.final and (event.step is not None or event.epoch is not None):
                    self._live.step = x_position(event)
                for name, value in event.values.items():
                    name = metric_name(name, final=event.final)
                    self._log_metric(name, value, plot=not event.final)
            case ImageLogged() | TableLogged():
                self._log_image(event)
            case CurveLogged() | ConfusionMatrixLogged() | HistogramLogged():
                self._log_plot(event)
            case TextLogged():
                path = self._file("texts", self._names.slide(event) + ".txt")
                path.write_text(event.text, encoding="utf-8", errors="replace", newline="")
            case CheckpointSaved():
                self._take_checkpoint(event)
            case ArtifactLogged():
                for file, name in side_by_side(event.paths).items():
                    self._copy(file, f"artifacts/{self._names.file(event.name)}", name)
            case RunEnded():
                self._end(event)

    def _log_metric(self, name: str, value: float | str, *, plot: bool) -> None:
        name = self._names.metric(name, self._live.summary)
        self._live.log_metric(name, value if isinstance(value, str) else float(value), plot=plot)

    def _log_params(self, params: Mapping[str, Any]) -> None:
        self._params = merged(self._params, plain(params))
        self._live.log_params(self._params)

    def _log_image(self, event: Any) -> None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "picture.png"
                path.write_bytes(picture(event)[0])
                self._live.log_image(f"{self._names.slide(event)}.png", path)
        except (OSError, TypeError, ValueError) as error:
            self.lost += 1
            logger.warning("%r can't be shown in DVC: %s", event.key, error)

    def _log_plot(self, event: CurveLogged | ConfusionMatrixLogged | HistogramLogged) -> None:
        plot = plot_of(event)
        if plot is None:
            self._log_image(event)
            return
        name = self._names.file(event.key)
        if self._kinds.setdefault(name, type(event)) is not type(event):
            name = f"{name}_{type(event).__name__.removesuffix('Logged').lower()}"
        self._live.log_plot(name, plot.points, **plot.about)

    def _take_checkpoint(self, event: CheckpointSaved) -> None:
        is_for_best = self.options.save_checkpoints == "best"
        best = Path(self._folder or "", _CHECKPOINTS, "best")
        if not self.wants_files(event):
            return
        # The last one stands in as long as the training names none its best.
        if is_for_best and event.kind == "last" and best.exists():
            return
        if not Path(event.path).exists():
            self._superseded.missed(event)
            return
        self._superseded.stored(event.kind)
        place = str(x_position(event)) if event.kind == "periodic" else event.kind
        name, is_anew = Path(event.path).name, event.kind != "periodic"
        self._copy(event.path, f"{_CHECKPOINTS}/{place}", name, anew=is_anew)
        if is_for_best and event.kind == "best":
            self._superseded.stored("last")
            shutil.rmtree(best.with_name("last"), ignore_errors=True)

    def _count_lost(self) -> None:
        """Count checkpoints that were gone, and that no newer one took the place of."""
        for event in self._superseded.lost():
            self.lost += 1
            logger.warning("%s can't be kept: it is not there", event.path)

    def _end(self, event: RunEnded) -> None:
        self._count_lost()
        found: dict[str, Any] = {"run/status": event.status, "run/reason": event.reason}
        if event.best is not None:
            found[f"best/{event.best.metric}"] = event.best.value
            found["best/epoch"] = None if event.best.epoch is None else event.best.epoch + 1
        for name, value in found.items():
            if value is not None:
                self._log_metric(name, value, plot=False)

    def _copy(self, path: str, folder: str, name: str, *, anew: bool = False) -> None:
        try:
            source = Path(path)
            if not source.exists():
                raise FileNotFoundError("it is not there")
            target = self._file(folder, name)
            if anew:
                shutil.rmtree(target.parent)
                target.parent.mkdir()
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                shutil.copyfile(source, target)
        except (OSError, ValueError) as error:
            self.lost += 1
            logger.warning("%s can't be kept: %s", path, error)

    def _file(self, *parts: str) -> Path:
        if self._folder is None:
            raise SinkError("nothing was opened; call open(run) first")
        path = self._folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
