"""Writes a run as DVCLive's files: TSV curves, metrics.json, params.yaml, plots and images.

Guarantees: only files in the run's folder are written (and `dvc.yaml`, if requested); no Git or DVC
repository is created, changed or read, and nothing is sent to DVC Studio; each record is stored
once; different names never share a file.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from trainbus import events
from trainbus.interfaces import FilePath, Options, RunInfo
from trainbus.toolkit.plots import picture
from trainbus.toolkit.sinks import (
    SaveCheckpoints,
    SeenRecords,
    Superseded,
    TrackerSink,
    best_values,
    check_folder,
    check_package,
    folder_of,
    is_wanted,
    metric_name,
    model_values,
    set_fields,
    side_by_side,
    writing_to,
    x_position,
)

from .charts import plot_of
from .files import FileNames, open_live

TESTED_VERSIONS = "3.49.1"
REQUIRED_NAMES = (
    "dvclive:Live",
    *(f"dvclive:Live._init_{part}" for part in ("dvc", "studio", "dvc_file")),
    *(f"dvclive:Live.log_{what}" for what in ("metric", "params", "image", "plot")),
    *(f"dvclive:Live.make_{what}" for what in ("summary", "dvcyaml")),
    "dvclive.serialize:load_yaml",
)
"""Names that the sink needs; `trainbus doctor` checks that they exist."""

_DESCRIPTION = ("name", "project", "group", "job_type", "tags", "notes", "task", "framework")


class DvcliveOptions(Options, frozen=True, kw_only=True):
    """Options of the `dvclive` sink."""

    dir: Annotated[
        FilePath,
        Meta(min_length=1, description="Folder for the files; `{run}` is replaced by the run's id"),
    ] = "dvclive/{run}"
    dvcyaml: (
        Annotated[
            FilePath,
            Meta(
                pattern=r"(^|/)dvc\.yaml$",
                extra={"expected": "a path that ends in `dvc.yaml`"},
                description="File that tells DVC how to draw the plots; by default none is written",
            ),
        ]
        | None
    ) = None
    save_checkpoints: SaveCheckpoints = "none"


class DvcliveSink(TrackerSink):
    """Writes the files of a run that DVC, its VS Code extension and DVC Studio show."""

    Options = DvcliveOptions
    service = "dvclive"
    tracker = "DVCLive"
    options: DvcliveOptions

    _live: Any = None

    def check(self) -> str:
        """Check that dvclive is installed and that the folder can be written.

        Raises:
            MissingPackageError: dvclive is not installed.
            SinkError: the folder can't be written.
        """
        check_package("dvclive")
        return check_folder(self.options.dir)

    def open(self, run: RunInfo) -> None:
        """Open the folder of the run, and continue the files in it.

        Raises:
            MissingPackageError: dvclive is not installed.
            SinkError: the folder can't be written.
        """
        super().open(run)
        folder, dvcyaml = folder_of(self.options.dir, run.id), None
        if self.options.dvcyaml is not None:
            dvcyaml = folder_of(self.options.dvcyaml, run.id)
        self._names, self._superseded = FileNames(), Superseded()
        self._kinds: dict[str, type] = {}
        with writing_to(folder):
            self._live, self._params = open_live(folder, dvcyaml)
        self._seen, self._folder = SeenRecords(folder / ".trainbus-dvclive.json"), folder
        self._location = str(folder)

    def write(self, records: Sequence[events.Record]) -> None:
        """Write the records that are new.

        Raises:
            OSError: the disk is full or gone.
        """
        before = dict(self._seen.last)
        for record in self._seen.new(records):
            self._write(record.event)
        if self._seen.last != before:
            self._live.make_summary()
            self._seen.save()

    def close(self) -> None:
        """Write `dvc.yaml`, if it is requested."""
        live, self._live = self._live, None
        if live is not None:
            self.lose_superseded(self._superseded)
            if self.options.dvcyaml is not None:
                live.make_dvcyaml()

    def _write(self, event: object) -> None:
        match event:
            case events.RunStarted():
                description = set_fields(event, *_DESCRIPTION)
                # A parameter named `run` takes precedence.
                self._log_params({**({"run": description} if description else {}), **event.params})
            case events.ParamsUpdated():
                self._log_params(event.params)
            case events.ModelDescribed():
                for name, value in model_values(event).items():
                    self._log_metric(name, value, plot=False)
            case events.MetricsLogged():
                if not event.final and (event.step is not None or event.epoch is not None):
                    self._live.step = x_position(event)
                for name, value in event.values.items():
                    name = metric_name(name, final=event.final)
                    self._log_metric(name, value, plot=not event.final)
            case events.ImageLogged() | events.TableLogged():
                self._log_image(event)
            case events.CurveLogged() | events.ConfusionMatrixLogged() | events.HistogramLogged():
                self._log_plot(event)
            case events.TextLogged():
                path = self._file("texts", self._names.slide(event) + ".txt")
                path.write_text(event.text, encoding="utf-8", errors="replace", newline="")
            case events.CheckpointSaved():
                self._log_checkpoint(event)
            case events.ArtifactLogged():
                for file, name in side_by_side(event.paths).items():
                    self._copy(file, f"artifacts/{self._names.file(event.name)}", name)
            case events.RunEnded():
                self.lose_superseded(self._superseded)
                ended = {"run/status": event.status, "run/reason": event.reason}
                for name, found in {**ended, **best_values(event)}.items():
                    if found is not None:
                        self._log_metric(name, found, plot=False)

    def _log_metric(self, name: str, value: float | str, *, plot: bool) -> None:
        name = self._names.metric(name, self._live.summary)
        self._live.log_metric(name, value if isinstance(value, str) else float(value), plot=plot)

    def _log_params(self, params: Mapping[str, Any]) -> None:
        self._params = _merged(self._params, _plain(params))
        self._live.log_params(self._params)

    def _log_image(self, event: Any) -> None:
        with self.showing(event.key), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "picture.png"
            path.write_bytes(picture(event)[0])
            self._live.log_image(f"{self._names.slide(event)}.png", path)

    def _log_plot(
        self, event: events.CurveLogged | events.ConfusionMatrixLogged | events.HistogramLogged
    ) -> None:
        plot = plot_of(event)
        if plot is None:
            self._log_image(event)
            return
        name = self._names.file(event.key)
        if self._kinds.setdefault(name, type(event)) is not type(event):
            name = f"{name}_{type(event).__name__.removesuffix('Logged').lower()}"
        self._live.log_plot(name, plot.points, **plot.settings)

    def _log_checkpoint(self, event: events.CheckpointSaved) -> None:
        folder = self._folder / "artifacts/checkpoints"
        is_for_best = self.options.save_checkpoints == "best"
        # The last one is stored until the training names one best.
        has_best = is_for_best and (folder / "best").exists()
        if not is_wanted(self.options.save_checkpoints, event, has_best=has_best):
            return
        if not Path(event.path).exists():
            self._superseded.missed(event)
            return
        self._superseded.stored(event.kind)
        is_periodic = event.kind == "periodic"
        place = str(x_position(event)) if is_periodic else event.kind
        name = Path(event.path).name
        self._copy(event.path, f"artifacts/checkpoints/{place}", name, replace=not is_periodic)
        if is_for_best and event.kind == "best":
            self._superseded.stored("last")
            shutil.rmtree(folder / "last", ignore_errors=True)

    def _copy(self, path: str, folder: str, name: str, *, replace: bool = False) -> None:
        try:
            source = Path(path)
            if not source.exists():
                raise FileNotFoundError("the file does not exist")
            target = self._file(folder, name)
            if replace:
                shutil.rmtree(target.parent)
                target.parent.mkdir()
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                shutil.copyfile(source, target)
        except (OSError, ValueError) as error:
            self.lose(path, error)

    def _file(self, *parts: str) -> Path:
        path = self._folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain parameters in which new values replace old ones at every depth."""
    both = {
        key: _merged(old[key], value)
        for key, value in new.items()
        if isinstance(value, Mapping) and isinstance(old.get(key), Mapping)
    }
    return {**old, **new, **both}


def _plain(value: Any) -> Any:
    """Return a value that YAML can represent; unlike JSON, it has NaN and ±Inf."""
    match value:
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case np.ndarray() | np.generic():
            return _plain(value.tolist())
        case list() | tuple() | set() | frozenset():
            return [_plain(item) for item in value]
        case None | bool() | int() | float() | str():
            return value
        case _:
            return str(value)
