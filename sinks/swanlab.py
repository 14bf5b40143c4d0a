"""Takes a run to SwanLab: settings, metrics, pictures, charts, tables, texts, files.

Guarantees: of a run of SwanLab's no handler of signals or exceptions stays in the process; nothing
of the machine, the terminal or the repository is collected; a value that SwanLab would drop, as
its step is taken, is counted. SwanLab's files can't be continued: each process that delivers
writes one of its own with the id of the run, and one that was cut short is set aside.
"""

from __future__ import annotations

import atexit
import glob
import importlib.util
import io
import itertools
import logging
import math
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from trainbus.drawing import png
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
    TableLogged,
    TextLogged,
)
from trainbus.interfaces import Options, RunInfo, Sink
from trainbus.storing import Names, Taken, axis, check_folder, flat, metric_name

logger = logging.getLogger("trainbus.sinks.swanlab")

TESTED = "0.10.3"
NEEDS = (
    "swanlab:init",
    "swanlab:has_run",
    "swanlab:Settings.Probe",
    "swanlab:Settings.Terminal",
    "swanlab:Image",
    "swanlab:Text",
    "swanlab:ECharts",
    "swanlab:Run.log",
    "swanlab:Run.save",
    "swanlab:Run.finish",
    "swanlab:Run._handle_atexit",
    "swanlab:echarts.Bar",
    "swanlab:echarts.HeatMap",
    "swanlab:echarts.Line",
    "swanlab:echarts.Table",
    "swanlab:echarts.options",
)
"""What the sink relies on; `trainbus doctor` looks whether it is there."""

_STATES: dict[str, Any] = {"finished": "success", "failed": "crashed", "stopped": "aborted"}
_CLOSED = "trainbus-closed.json"
_OPEN = "trainbus-open-"
_MAX_CELLS = 30
_COLLECTED = ("hardware", "runtime", "requirements", "conda", "git", "swanlab", "monitor")


class SwanlabOptions(Options, frozen=True, kw_only=True):
    """Options of the `swanlab` sink; what is not set here comes from the training."""

    project: (
        Annotated[
            str,
            Meta(
                pattern=r"^[0-9a-zA-Z_+.-]+$",
                max_length=100,
                extra={"expected": "a SwanLab project name: 1 to 100 letters, digits, _ - + and ."},
                description="Project; by default the trainer's, made valid",
            ),
        ]
        | None
    ) = None
    workspace: Annotated[str, Meta(description="User or team that owns the project")] | None = None
    mode: (
        Annotated[
            Literal["cloud", "offline", "local", "disabled"],
            Meta(description="By default `SWANLAB_MODE`, else `cloud`"),
        ]
        | None
    ) = None
    logdir: (
        Annotated[
            str,
            Meta(
                min_length=1,
                description="Folder for SwanLab's files, `{run}` stands for the run's id; by "
                "default `SWANLAB_LOG_DIR`, else `swanlog`",
            ),
        ]
        | None
    ) = None
    save_checkpoints: Annotated[
        Literal["best", "last", "all", "none"],
        Meta(description="Checkpoints kept; `best` keeps the last where none is best"),
    ] = "best"


class _State(msgspec.Struct):
    """What is kept beside a file of SwanLab's when it is closed, for the next of its run."""

    run: str
    taken: tuple[int, int]
    config: dict[str, Any]
    steps: dict[str, int]
    axes: dict[str, str]


class SwanlabSink(Sink):
    """Feeds one SwanLab run."""

    Options = SwanlabOptions
    service = "swanlab"
    volatile = True
    options: SwanlabOptions

    def __init__(self, options: SwanlabOptions | None = None) -> None:
        super().__init__(options)
        self._run: Any = None
        self._folder: Path | None = None
        self._taken = Taken()
        self._where: str | None = None

    def check(self) -> str:
        """Make sure that the package is there and the folder can be written.

        Raises:
            MissingPackageError: swanlab is not installed.
            SinkError: the folder can't be written.
        """
        if find_spec("swanlab") is None:
            raise MissingPackageError("swanlab", extra="swanlab")
        return check_folder(self.options.logdir or "swanlog")

    def open(self, run: RunInfo) -> None:
        """Start a SwanLab run, or one that goes on with the run of the same id.

        Raises:
            MissingPackageError: swanlab is not installed.
            SinkError: SwanLab refuses to start the run, or has one open in this process.
        """
        try:
            import swanlab
            from swanlab import echarts
        except ImportError as error:
            raise MissingPackageError("swanlab", extra="swanlab") from error
        if swanlab.has_run():
            raise SinkError(
                "a SwanLab run is open in this process, and there can be only one; call "
                "swanlab.finish(), or set `isolation: process`"
            )
        self._swanlab, self._echarts, self.lost = swanlab, echarts, 0
        self._names = Names(_clean, longest=512)
        self._files = Names(_folder_name)
        self._axes: dict[str, str] = {}
        self._steps: dict[str, int] = {}
        self._repeated: set[str] = set()
        self._checkpoints: dict[str, CheckpointSaved] = {}
        try:
            # SwanLab takes over Ctrl-C where it starts in the main thread.
            with _hook_kept(), ThreadPoolExecutor(1) as thread:
                self._run = thread.submit(self._start, run).result()
            atexit.unregister(self._run._handle_atexit)
        except SinkError:
            raise
        except Exception as error:  # SwanLab's own errors have no common class
            advice = "run `swanlab login`, set SWANLAB_API_KEY, or set `mode: offline`"
            is_key = "API key" in str(error) or "login" in str(error)
            text = f"SwanLab can't start the run ({' '.join(str(error).split())}); "
            text += advice if is_key else "check `logdir` and the network, or set `mode: offline`"
            raise SinkError(text, retry=isinstance(error, OSError) and not is_key) from error
        folder = None if self._run.mode == "disabled" else Path(self._run.dir).absolute()
        before = None if folder is None else _before(folder, run)
        if before is not None:
            self._steps, self._axes = before.steps, before.axes
        self._taken = Taken(None, (0, 0) if before is None else before.taken)
        if folder is not None:
            (folder / f"{_OPEN}{run.attempt}").write_text(run.id, "utf-8")
        self._folder, self._id = folder, run.id
        self._config: dict[str, Any] = {} if before is None else before.config
        is_new = self._taken.last[0] < run.attempt
        self._configure(run.started.params if is_new else {})
        self._where = self._place(folder)

    def _start(self, run: RunInfo) -> Any:
        started, options = run.started, self.options
        if options.mode == "local" and importlib.util.find_spec("swanboard") is None:
            raise SinkError("`mode: local` needs `pip install 'swanlab[dashboard]'`")
        folder = options.logdir and str(Path(options.logdir.replace("{run}", run.id)).expanduser())
        settings = self._swanlab.Settings
        return self._swanlab.init(
            mode="online" if options.mode == "cloud" else options.mode,
            log_dir=folder,
            workspace=options.workspace,
            project=options.project or _project(started.project),
            name=_text(started.name or "")[:512] or None,
            description=_text(started.notes or "")[:1024] or None,
            group=_text(started.group or "")[:512] or None,
            job_type=_text(started.job_type or "")[:512] or None,
            tags=[_text(tag)[:512] for tag in started.tags[:30]] or None,
            id=re.sub(r'[<>:"/\\|?*#%\x00-\x1f\x7f]', "-", _text(run.id))[:512],
            resume="allow",
            settings=settings(
                interactive=False,
                terminal=settings.Terminal(proxy_type="none"),
                probe=settings.Probe(**dict.fromkeys(_COLLECTED, False)),
            ),
        )

    def _place(self, folder: Path | None) -> str | None:
        match self._run.mode:
            case "online":
                return str(self._run.url)
            case "offline":
                run, path = shlex.quote(self._run.id), shlex.quote(str(folder))
                return f"swanlab sync --id {run} {path}"
            case "local" if folder is not None:
                return f"swanlab watch {shlex.quote(str(folder.parent))}"
        return None

    def write(self, records: Sequence[Record]) -> None:
        """Hand the records that are new to SwanLab.

        Raises:
            SinkError: nothing was opened.
        """
        for record in self._taken.new(records):
            if self._run is None:
                raise SinkError("no run is open; call open(run) first")
            self._take(record.event)

    def close(self) -> None:
        """Finish the run, as crashed unless its end was written."""
        self._finish("failed", "its end was not written")

    def keeps(self, event: CheckpointSaved | ArtifactLogged) -> bool:
        """Return whether the files of an event are kept with the run."""
        wanted = self.options.save_checkpoints
        if isinstance(event, ArtifactLogged):
            return True
        return wanted in ("all", event.kind) or (wanted == "best" and event.kind == "last")

    @property
    def where(self) -> str | None:
        """Address of the run, or the command that uploads or shows it."""
        return self._where

    def _take(self, event: object) -> None:
        swanlab = self._swanlab
        match event:
            case ParamsUpdated():
                self._configure(event.params)
            case ModelDescribed():
                about = {name: getattr(event, name) for name in event.__struct_fields__}
                about = {k: v for k, v in about.items() if v not in (None, [], {})}
                self._configure({"model": about})
            case MetricsLogged():
                for name, value in event.values.items():
                    self._log(metric_name(name, final=event.final), event, value)
            case ImageLogged():
                self._show(event, lambda: swanlab.Image(_picture(event), caption=event.caption))
            case CurveLogged():
                self._show(event, lambda: swanlab.ECharts(self._curve(event)))
            case ConfusionMatrixLogged():
                self._show(event, lambda: swanlab.ECharts(self._matrix(event)))
            case TableLogged():
                self._show(event, lambda: swanlab.ECharts(self._table(event)))
            case HistogramLogged():
                self._show(event, lambda: swanlab.ECharts(self._histogram(event)))
            case TextLogged():
                self._show(event, lambda: swanlab.Text(_text(event.text)))
            case CheckpointSaved() if self.keeps(event):
                if event.kind == "periodic":
                    self._save_checkpoint(event, f"epoch-{_counted(event.epoch)}")
                else:  # the trainer overwrites these: what they hold at the end counts
                    self._checkpoints[event.kind] = event
            case ArtifactLogged():
                about = {"kind": event.kind, "aliases": event.aliases, "metadata": event.metadata}
                self._save(event.name, event.paths, about)
            case AlertRaised():
                text = _text(f"[{event.level}] {event.title}\n{event.text}".rstrip())
                self._log("alerts", None, swanlab.Text(text))
            case RunEnded():
                if event.best is not None:
                    best = {event.best.metric: event.best.value}
                    self._configure({"best": {**best, "epoch": _counted(event.best.epoch)}})
                self._configure({"ended": {"status": event.status, "reason": event.reason}})
                error = event.error.traceback if event.error is not None else event.reason
                self._finish(event.status, error)

    def _configure(self, values: Mapping[str, Any]) -> None:
        """Change the settings; those of a file are all that SwanLab shows of them."""
        self._config |= {_text(key): _plain(value) for key, value in flat(values).items()}
        self._run.config.update(self._config)

    def _log(self, name: str, event: Any, value: Any) -> None:
        """Log a value, on an axis of its own where its name stands on the other already."""
        key, at = self._names(name), 0 if event is None else axis(event)
        if event is None or (event.step is None and event.epoch is None):
            at = self._steps.get(key, -1) + 1  # counted, as it comes
        else:
            kind = "epoch" if event.step is None else "step"
            if self._axes.setdefault(key, kind) != kind:
                key = self._names(f"{name} ({kind})")
        if at <= self._steps.get(key, -1):
            self.lost += 1
            if key not in self._repeated:
                self._repeated.add(key)
                logger.warning("SwanLab keeps the first value that %r had at step %d", key, at)
        self._steps[key] = max(at, self._steps.get(key, -1))
        self._run.log({key: value}, step=at)

    def _show(self, event: Any, build: Callable[[], Any]) -> None:
        try:
            value = build()
        except (ImportError, OSError, TypeError, ValueError, MissingPackageError) as error:
            self.lost += 1
            logger.warning("%r can't be shown in SwanLab: %s", event.key, error)
            return
        self._log(event.key, event, value)

    def _curve(self, event: CurveLogged) -> Any:
        echarts, options = self._echarts, self._echarts.options
        chart = echarts.Line().add_xaxis(np.asarray(event.x).tolist())
        for name, values in zip(event.classes, event.y, strict=False):
            chart.add_yaxis(_text(name), np.asarray(values).tolist(), is_symbol_show=False)
        chart.set_global_opts(
            title_opts=options.TitleOpts(title=_text(event.title or event.key)),
            xaxis_opts=options.AxisOpts(type_="value", name=_text(event.x_label)),
            yaxis_opts=options.AxisOpts(type_="value", name=_text(event.y_label)),
            legend_opts=options.LegendOpts(type_="scroll", pos_bottom="0"),
            tooltip_opts=options.TooltipOpts(trigger="axis"),
        )
        return chart.set_series_opts(label_opts=options.LabelOpts(is_show=False))

    def _matrix(self, event: ConfusionMatrixLogged) -> Any:
        options, names = self._echarts.options, [_text(name) for name in event.classes]
        shares = np.asarray(event.matrix, dtype=float)
        cells = [[column, row, value] for (row, column), value in np.ndenumerate(shares.round(4))]
        chart = self._echarts.HeatMap().add_xaxis(names)
        label = options.LabelOpts(is_show=len(names) <= _MAX_CELLS, position="inside")
        chart.add_yaxis("", names, cells, label_opts=label)
        most = float(np.nanmax(shares, initial=0.0, where=np.isfinite(shares)))
        return chart.set_global_opts(
            title_opts=options.TitleOpts(title=_text(event.key)),
            legend_opts=options.LegendOpts(is_show=False),
            xaxis_opts=options.AxisOpts(type_="category", name="predicted"),
            yaxis_opts=options.AxisOpts(type_="category", name="true"),
            visualmap_opts=options.VisualMapOpts(min_=0, max_=most or 1.0),
        )

    def _table(self, event: TableLogged) -> Any:
        names = [_text(name) for name in event.columns]
        names = [n if names.index(n) == i else f"{n} ({i})" for i, n in enumerate(names)]
        return self._echarts.Table().add(names, [_plain(row) for row in event.rows])

    def _histogram(self, event: HistogramLogged) -> Any:
        edges = [f"{edge:.4g}" for edge in np.asarray(event.edges).tolist()]
        bins = [f"{low} – {high}" for low, high in itertools.pairwise(edges)]
        chart = self._echarts.Bar().add_xaxis(bins)
        chart.add_yaxis(_text(event.key), np.asarray(event.counts).tolist(), category_gap=0)
        return chart.set_series_opts(label_opts=self._echarts.options.LabelOpts(is_show=False))

    def _save_checkpoint(self, event: CheckpointSaved, name: str) -> None:
        about = {"epoch": _counted(event.epoch), "step": event.step, "metrics": event.metrics}
        self._save(f"checkpoints/{name}", [event.path], {**about, "metadata": event.metadata})

    def _save(self, name: str, paths: Sequence[str], about: Mapping[str, Any]) -> None:
        """Copy files into the run's folder and have SwanLab keep them from there.

        SwanLab itself would only link to files that may soon be others.
        """
        if self._folder is None:
            return
        base, found, inside = self._folder / "trainbus", 0, self._files(name)
        for number, path in enumerate(map(Path, paths)):
            is_first = path.name not in [Path(other).name for other in paths[:number]]
            target = base / inside / (path.name if is_first else f"{number}-{path.name}")
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                if path.is_dir():
                    shutil.copytree(path, target, dirs_exist_ok=True)
                else:
                    shutil.copyfile(path, target)
            except OSError as error:
                self.lost += 1
                logger.warning("%r can't be kept in SwanLab: %s", name, error)
                continue
            found += 1
            files = [target] if target.is_file() else [p for p in target.rglob("*") if p.is_file()]
            for file in files:
                self._run.save(glob.escape(str(file)), base_path=str(base), policy="now")
        if found or not paths:
            self._configure({f"files/{name}": about})

    def _finish(self, status: str, error: str | None) -> None:
        run = self._run
        if run is None:
            return
        wanted = self.options.save_checkpoints
        kinds = {"all": ["last", "best"]}.get(wanted, [wanted])
        kept = [kind for kind in kinds if kind in self._checkpoints] or list(self._checkpoints)
        try:
            for kind in kept:
                self._save_checkpoint(self._checkpoints[kind], kind)
        finally:
            self._run = None
            text = None if status == "finished" else _text(error or status)
            with _hook_kept():
                run.finish(state=_STATES[status], error=text)
        if self._folder is not None:
            # Only now is everything in SwanLab's file.
            state = _State(self._id, self._taken.last, self._config, self._steps, self._axes)
            partial = self._folder / f"{_CLOSED}.part"
            partial.write_bytes(msgspec.json.encode(state))
            partial.replace(self._folder / _CLOSED)
            for mark in self._folder.glob(f"{_OPEN}*"):
                mark.unlink()


@contextmanager
def _hook_kept() -> Iterator[None]:
    """Keep SwanLab from changing what this process does with an exception that ends it."""
    hook = sys.excepthook
    try:
        yield
    finally:
        sys.excepthook = hook


def _before(folder: Path, run: RunInfo) -> _State | None:
    """Return where the run stands; set aside a file of this attempt that was cut short.

    What SwanLab took before it was killed may be on disk in part, and comes again, as a whole.
    """
    found: list[_State] = []
    own = [file.name for file in folder.glob("run-*.swanlab")]
    for other in folder.parent.glob("run-*"):
        closed, mark = other / _CLOSED, other / f"{_OPEN}{run.attempt}"
        if not any((other / name).exists() for name in own):
            continue
        with suppress(OSError, ValueError):  # one that can't be read tells nothing
            if closed.exists():
                found.append(msgspec.json.decode(closed.read_bytes(), type=_State))
            elif run.again and mark.exists() and mark.read_text("utf-8") == run.id:
                other.rename(other.with_name(f"incomplete-{other.name}"))
    found = [state for state in found if state.run == run.id]  # names of files tell less
    return max(found, key=lambda state: state.taken, default=None)


def _picture(event: ImageLogged) -> Any:
    """Return what SwanLab makes a picture of."""
    if event.path is not None:
        return event.path
    if event.array is None:
        raise ValueError("it has neither a path nor an array")
    from PIL import Image

    return Image.open(io.BytesIO(png(event.array)))


def _counted(epoch: int | None) -> int | None:
    """Return an epoch counted from 1, as on the axis."""
    return None if epoch is None else epoch + 1


def _project(name: str | None) -> str:
    return re.sub(r"[^0-9a-zA-Z_+.-]", "-", name or "")[:100] or "trainbus"


def _clean(name: str) -> str:
    """Return a key that SwanLab takes: no control characters, no dots or slashes at its ends."""
    name = re.sub(r"[\x00-\x1f\x7f]", "_", _text(name)).removeprefix("__swanlab__.")
    return name.strip(" ./")


def _folder_name(name: str) -> str:
    """Return a name that leads to no other folder than one of its own."""
    return "/".join(re.sub(r"[^\w.-]|^\.+$", "-", part) or "-" for part in name.split("/"))


def _text(text: str) -> str:
    """Return a text that can be written as UTF-8."""
    return text.encode("utf-8", "replace").decode()


def _plain(value: Any) -> Any:
    """Return a value that fits into JSON and YAML; non-finite numbers as text."""
    if isinstance(value, Mapping):
        return {_text(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, bool | int | float) or value is None:
        return value if abs(value or 0) < 2**63 else str(value)
    return _text(str(value))
