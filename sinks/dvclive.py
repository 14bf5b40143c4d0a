"""Takes a run to DVCLive's files: TSV curves, metrics.json, params.yaml, plots and pictures.

Guarantees: only files in the run's folder are written (and `dvc.yaml`, if wanted): no Git or DVC
repository is made, changed or asked, and nothing is sent to DVC Studio; each record is there once;
two names never share a file.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from trainbus.drawing import drawn, png
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
from trainbus.interfaces import Options, RunInfo, Sink
from trainbus.storing import Names, Taken, axis, check_folder, metric_name

logger = logging.getLogger("trainbus.sinks.dvclive")

TESTED = "3.49.1"
NEEDS = (
    "dvclive:Live",
    "dvclive:Live._init_dvc",
    "dvclive:Live._init_studio",
    "dvclive:Live._init_dvc_file",
    "dvclive:Live.log_metric",
    "dvclive:Live.log_params",
    "dvclive:Live.log_image",
    "dvclive:Live.log_plot",
    "dvclive:Live.make_summary",
    "dvclive:Live.make_dvcyaml",
    "dvclive.serialize:load_yaml",
)
"""What the sink relies on; `trainbus doctor` looks whether it is there."""

_TAKEN = ".trainbus.json"
_MAX_CASES = 100_000
_OWN = ("", ".", "..", "step", "timestamp")
"""Parts of names that mean something else to DVCLive."""


class DvcliveOptions(Options, frozen=True, kw_only=True):
    """Options of the `dvclive` sink."""

    dir: Annotated[
        str,
        Meta(min_length=1, description="Folder of the files; `{run}` is replaced by the run's id"),
    ] = "dvclive/{run}"
    dvcyaml: (
        Annotated[
            str,
            Meta(
                pattern=r"(^|/)dvc\.yaml$",
                extra={"expected": "a path that ends in `dvc.yaml`"},
                description="File that tells DVC how to draw the plots; by default none is written",
            ),
        ]
        | None
    ) = None
    save_checkpoints: Annotated[
        Literal["best", "last", "all", "none"],
        Meta(description="Checkpoints copied into the folder"),
    ] = "none"


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
        try:
            from dvclive.serialize import load_yaml
        except ImportError as error:
            raise MissingPackageError("dvclive", extra="dvclive") from error
        folder = Path(self.options.dir.replace("{run}", run.id)).expanduser().absolute()
        dvcyaml = self.options.dvcyaml
        if dvcyaml is not None:
            dvcyaml = str(Path(dvcyaml.replace("{run}", run.id)).expanduser().absolute())
        self.lost = 0
        self._names, self._dotless = Names(_clean), Names(_clean_dotless)
        self._nested = Names(lambda name: name.replace("/", "_") + "_")
        self._kinds: dict[str, type] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _drop_torn(folder / "metrics.json", lambda path: json.loads(path.read_bytes()))
            _drop_torn(folder / "params.yaml", load_yaml)
            self._taken = Taken(folder / _TAKEN)
            self._live = _live(folder, dvcyaml)
            self._live.step = self._live.read_step()
            params = folder / "params.yaml"
            self._params: dict[str, Any] = load_yaml(params) if params.exists() else {}
        except OSError as error:
            raise SinkError(f"can't write {folder}: {error.strerror}; set another `dir`") from error
        self._folder = folder

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
        if live is not None and self.options.dvcyaml is not None:
            live.make_dvcyaml()

    def keeps(self, event: CheckpointSaved | ArtifactLogged) -> bool:
        """Return whether the files of an event are copied into the folder."""
        wanted = self.options.save_checkpoints
        if isinstance(event, ArtifactLogged):
            return True
        return wanted == "all" or (wanted != "none" and event.kind != "periodic")

    @property
    def where(self) -> str | None:
        """Path of the folder."""
        return str(self._folder) if self._folder else None

    def _take(self, event: object) -> None:
        match event:
            case RunStarted():
                self._log_params({**_about(event), **event.params})
            case ParamsUpdated():
                self._log_params(event.params)
            case ModelDescribed():
                for name, value in _model_values(event).items():
                    self._log_metric(name, value, plot=False)
            case MetricsLogged():
                if not event.final and (event.step is not None or event.epoch is not None):
                    self._live.step = axis(event)
                for name, value in event.values.items():
                    name = metric_name(name, final=event.final)
                    self._log_metric(name, value, plot=not event.final)
            case ImageLogged():
                self._log_image(event, lambda: _pixels(event))
            case CurveLogged():
                self._log_curve(event)
            case ConfusionMatrixLogged():
                self._log_matrix(event)
            case HistogramLogged():
                self._log_histogram(event)
            case TableLogged():
                self._log_image(event, lambda: drawn(event))
            case TextLogged():
                path = self._file("texts", _placed(self._dotless(event.key), event) + ".txt")
                path.write_text(event.text, encoding="utf-8", errors="replace", newline="")
            case CheckpointSaved():
                self._take_checkpoint(event)
            case ArtifactLogged():
                folder = f"artifacts/{self._dotless(event.name)}"
                for file in event.paths:
                    self._copy(file, folder)
            case RunEnded():
                self._end(event)

    def _log_metric(self, name: str, value: float | str, *, plot: bool) -> None:
        name = self._free(self._names(name))
        self._live.log_metric(name, value if isinstance(value, str) else float(value), plot=plot)

    def _free(self, name: str) -> str:
        """Return a name for metrics.json, where `a/b` lies in `a`, which can't be a number then."""
        *folders, last = name.split("/")
        found: Any = self._live.summary
        for part in folders:
            found = found.get(part, {})
            if not isinstance(found, dict):
                return self._nested(name)
        return self._nested(name) if isinstance(found.get(last), dict) else name

    def _log_params(self, params: Mapping[str, Any]) -> None:
        self._params = _merged(self._params, _plain(params))
        self._live.log_params(self._params)

    def _log_image(self, event: Any, pixels: Callable[[], bytes | None]) -> None:
        name = _placed(self._dotless(event.key), event)
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "picture.png"
                path.write_bytes(pixels() or b"")
                self._live.log_image(f"{name}.png", path)
        except (OSError, TypeError, ValueError) as error:
            self.lost += 1
            logger.warning("%r can't be shown in DVC: %s", event.key, error)

    def _log_plot(self, event: Any, points: list[dict[str, Any]], **about: Any) -> None:
        name = self._dotless(event.key)
        if self._kinds.setdefault(name, type(event)) is not type(event):
            name = f"{name}_{type(event).__name__.removesuffix('Logged').lower()}"
        self._live.log_plot(name, points, **about)

    def _log_curve(self, event: CurveLogged) -> None:
        columns = _distinct([event.x_label or "x", *event.classes])
        points = [
            dict(zip(columns, map(_number, row), strict=False))
            for row in zip(event.x, *event.y, strict=False)
        ]
        title, label = event.title or event.key, event.y_label or None
        self._log_plot(event, points, x=columns[0], y=columns[1:], title=title, y_label=label)

    def _log_matrix(self, event: ConfusionMatrixLogged) -> None:
        counts = np.asarray(event.matrix, dtype=float)
        is_counts = np.isfinite(counts).all() and (counts >= 0).all() and (counts % 1 == 0).all()
        # DVC counts the cases itself, so each must be there.
        if event.normalized or not is_counts or counts.sum() > _MAX_CASES:
            self._log_image(event, lambda: drawn(event))
            return
        names = _distinct(event.classes)
        cases = [
            {"actual": names[row], "predicted": names[column]}
            for (row, column), count in np.ndenumerate(counts)
            for _ in range(int(count))
        ]
        self._log_plot(
            event, cases, x="actual", y="predicted", template="confusion", title=event.key
        )

    def _log_histogram(self, event: HistogramLogged) -> None:
        bars = [
            {"bin": f"{low:g} … {high:g}", "count": _number(count)}
            for low, high, count in zip(event.edges, event.edges[1:], event.counts, strict=False)
        ]
        self._log_plot(event, bars, x="count", y="bin", template="bar_horizontal", title=event.key)

    def _take_checkpoint(self, event: CheckpointSaved) -> None:
        folder, wanted = "artifacts/checkpoints", self.options.save_checkpoints
        best = (self._folder or Path()) / folder / "best"
        if event.kind == "periodic":
            if wanted == "all":
                self._copy(event.path, f"{folder}/{axis(event)}")
        elif wanted in (event.kind, "all"):
            self._copy(event.path, f"{folder}/{event.kind}", anew=True)
            if wanted == "best":
                shutil.rmtree(best.with_name("last"), ignore_errors=True)
        elif wanted == "best" and not best.exists():  # as long as the training names none its best
            self._copy(event.path, f"{folder}/last", anew=True)

    def _end(self, event: RunEnded) -> None:
        best = event.best
        found: dict[str, Any] = {"run/status": event.status, "run/reason": event.reason}
        if best is not None:
            found[f"best/{best.metric}"] = best.value
            found["best/epoch"] = None if best.epoch is None else best.epoch + 1
        for name, value in found.items():
            if value is not None:
                self._log_metric(name, value, plot=False)

    def _copy(self, path: str, folder: str, *, anew: bool = False) -> None:
        try:
            source = Path(path)
            if not source.exists():
                raise FileNotFoundError("it is not there")
            target = self._file(folder, source.name)
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


def _live(folder: Path, dvcyaml: str | None) -> Any:
    """Return DVCLive's writer, without what it does to repositories and the network."""
    from dvclive import Live

    class FilesOnly(Live):  # type: ignore[misc]
        def _init_dvc(self) -> None:  # else `dvc init` is run in a Git repository
            self._dvc_file = self._init_dvc_file()

        def _init_studio(self) -> None:
            self._studio_events_to_skip = {"start", "data", "done"}

    return FilesOnly(str(folder), resume=True, save_dvc_exp=False, dvcyaml=dvcyaml)


def _drop_torn(path: Path, load: Callable[[Path], Any]) -> None:
    """Remove a file that a crash cut short: DVCLive could not go on, and writes it anew."""
    try:
        if path.exists() and not isinstance(load(path), dict):
            path.unlink()
    except OSError:
        raise
    except Exception:  # what a YAML parser raises is no one class
        path.unlink()
        logger.warning("%s was cut short, and is written anew", path)


def _clean(name: str) -> str:
    """Return a name that is a path below a folder, and no name that DVCLive uses itself."""
    parts = [re.sub(r"[^\w.()\[\]=@+ -]", "_", part)[:60] for part in name.split("/")]
    return "/".join(f"{p}_" if p in _OWN or p.endswith(".tsv") else p for p in parts)


def _clean_dotless(name: str) -> str:
    return _clean(name).replace(".", "_")


def _placed(name: str, event: Any) -> str:
    """Return the file's name: what is logged again and again gets a slider in DVC."""
    return name if event.step is None and event.epoch is None else f"{name}/{axis(event)}"


def _pixels(event: ImageLogged) -> bytes | None:
    return png(event.array) if event.array is not None else Path(event.path or "").read_bytes()


def _about(event: RunStarted) -> dict[str, Any]:
    names = ("name", "project", "group", "job_type", "tags", "notes", "task", "framework")
    found = {name: getattr(event, name) for name in names if getattr(event, name)}
    return {"run": found} if found else {}


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


def _number(value: Any) -> float | None:
    """Return a number as JSON has them; NaN and ±Inf, which it has not, become a gap."""
    found = float(value)
    return found if math.isfinite(found) else None


def _distinct(names: Sequence[str]) -> list[str]:
    """Return names of which none is there twice."""
    found: list[str] = []
    for name in names:
        while name in found:
            name += "_"
        found.append(name)
    return found


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(old[key], value)
        for key, value in new.items()
        if isinstance(value, Mapping) and isinstance(old.get(key), Mapping)
    }
    return {**old, **new, **both}


def _plain(value: Any) -> Any:
    """Return a value as YAML has it."""
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
