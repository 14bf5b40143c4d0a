"""What a page shows of a run, gathered from its records: this is what lies in `data.json`.

Guarantees: it depends on the records alone, and not on how they were cut into batches; a value that
JSON has no number for is the text `NaN`, `Infinity` or `-Infinity`; no list grows without bound.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import msgspec
import numpy as np

from trainbus.events import (
    AlertRaised,
    ArtifactLogged,
    Best,
    CheckpointSaved,
    ConfusionMatrixLogged,
    CurveLogged,
    EpochEnded,
    EpochStarted,
    Failure,
    HistogramLogged,
    MetricsLogged,
    ModelDescribed,
    ParamsUpdated,
    Record,
    RunEnded,
    RunStarted,
    TableLogged,
    TextLogged,
    UnknownEvent,
    event_name,
)
from trainbus.storing import flat

MAX_ROWS = 1_000
MAX_TEXT = 20_000
MAX_ITEMS = 500
"""Kept rows of a table, characters of a text, and texts, alerts, checkpoints and artifacts."""

_EPOCHS = ("epochs", "num_train_epochs", "max_epochs", "num_epochs", "n_epochs")
_STEPS = ("max_steps", "total_timesteps", "max_iters", "total_steps")
_PHASES = re.compile(r"(?:train|training|val|valid|validation|eval|test)[/_]", re.IGNORECASE)
_TELLING = ("map50-95", "map", "f1", "auc", "acc", "iou", "dice", "recall", "precision", "score")
_COSTS = ("loss", "error")
_AVERAGES = {"all", "mean", "average", "overall", "accuracy", "macro avg", "micro avg"} | {
    "weighted avg",
    "background",
}
_CLASS_COLUMNS = {"class", "classes", "class_name", "label"}
_LAST_EPOCHS = 5

Number = float | str


class Series(msgspec.Struct):
    """Values of one metric, over epochs done or steps; `t` is seconds since the run began."""

    name: str
    phase: str
    axis: Literal["epoch", "step"]
    base: str
    x: list[int] = []
    y: list[Number] = []
    t: list[float] = []
    low: tuple[float, int] | None = None
    """Smallest value, and where it was: of all values, the thinned ones too."""
    high: tuple[float, int] | None = None
    odd: int = 0
    """Values that are no finite number."""
    attempt: int = 1
    stride: int = 1
    seen: int = 0
    loose: bool = False
    """Whether the last point is there only until the next one comes."""

    def add(self, x: int, value: float, t: float, attempt: int, points: int) -> None:
        """Take a value; every second one is let go when there are `points`."""
        if attempt > self.attempt:
            self.cut(x - 1)  # a resumed training went back, and does again what follows
            self.attempt = attempt
        is_last = not self.x or x > self.x[-1]
        if is_last and self.loose:
            del self.x[-1], self.y[-1], self.t[-1]
        if is_last:
            self.loose = self.seen % self.stride != 0
            self.seen += 1
        self._put(x, number(value), t)
        if len(self.x) > points:
            self._thin()

    def cut(self, last: int) -> None:
        """Drop what stands behind `last`."""
        end = bisect_left(self.x, last + 1)
        if end < len(self.x):
            del self.x[end:], self.y[end:], self.t[end:]
            self.loose = False
            self._measure()

    def _thin(self) -> None:
        """Let go of every second value, but never of the last one."""
        last = len(self.x) - 1
        kept = list(range(0, last + (not self.loose), 2))
        self.loose = kept[-1] != last
        kept += [last] * self.loose
        self.x = [self.x[i] for i in kept]
        self.y = [self.y[i] for i in kept]
        self.t = [self.t[i] for i in kept]
        self.stride *= 2

    def _put(self, x: int, value: Number, t: float) -> None:
        at = bisect_left(self.x, x)
        is_known = at < len(self.x) and self.x[at] == x
        self.x[at : at + is_known] = [x]
        self.y[at : at + is_known] = [value]
        self.t[at : at + is_known] = [t]
        if is_known:
            self._measure()
        else:
            self._extend(value, x)

    def _measure(self) -> None:
        self.low = self.high = None
        self.odd = 0
        for value, x in zip(self.y, self.x, strict=True):
            self._extend(value, x)

    def _extend(self, value: Number, x: int) -> None:
        if isinstance(value, str):
            self.odd += 1
            return
        if self.low is None or value < self.low[0]:
            self.low = (value, x)
        if self.high is None or value > self.high[0]:
            self.high = (value, x)


class Picture(msgspec.Struct):
    """A picture in the page's folder."""

    file: str
    caption: str | None = None
    epoch: int | None = None
    step: int | None = None


class Worst(msgspec.Struct):
    """The class with the worst result, and by what."""

    key: str
    name: str
    metric: str
    value: float


class Data(msgspec.Struct):
    """All that a page shows of one run."""

    run: str
    position: tuple[int, int] = (0, 0)
    about: dict[str, Any] = {}
    goals: dict[str, str] = {}
    status: str = "running"
    reason: str | None = None
    error: Failure | None = None
    best: dict[str, Any] | None = None
    worst: Worst | None = None
    first: float | None = None
    """Time of the first record of this attempt, in seconds since the Unix epoch."""
    last: float | None = None
    earlier: float = 0.0
    """Seconds that earlier attempts took."""
    attempt: int = 1
    resumes: bool = False
    epoch: int | None = None
    done: int = 0
    """Epochs that are completed."""
    epochs: int | None = None
    step: int | None = None
    steps: int | None = None
    eta: float | None = None
    """Seconds that the rest takes, if its epochs take as long as the last ones did."""
    took: list[float] = []
    ends: Series = msgspec.field(
        default_factory=lambda: Series(name="", phase="", axis="epoch", base="")
    )
    """Steps done at the end of each epoch."""
    params: dict[str, str] = {}
    model: dict[str, str] = {}
    classes: list[str] = []
    series: list[Series] = []
    final: dict[str, Number] = {}
    curves: dict[str, Any] = {}
    matrices: dict[str, Any] = {}
    histograms: dict[str, Any] = {}
    tables: dict[str, Any] = {}
    texts: list[dict[str, Any]] = []
    pictures: dict[str, list[Picture]] = {}
    checkpoints: list[dict[str, Any]] = []
    artifacts: list[dict[str, Any]] = []
    alerts: list[dict[str, Any]] = []
    records: dict[str, int] = {}


class Gatherer:
    """Takes the records of a run into its `data`; pictures are left to the caller.

    Args:
        data: what is known of the run already.
        points: values of a metric that are kept.
        curve_points: points of a curve that are kept.
    """

    def __init__(self, data: Data, *, points: int, curve_points: int) -> None:
        self.data = data
        self._points = points
        self._curve_points = curve_points
        self._series = {(s.name, s.phase, s.axis): s for s in data.series}

    def take(self, record: Record) -> None:
        """Take one record that is new."""
        data, event = self.data, record.event
        if isinstance(event, UnknownEvent):
            return
        data.position = record.position
        self._clock(record)
        name = event_name(event)
        data.records[name] = data.records.get(name, 0) + 1
        match event:
            case RunStarted():
                self._start(event)
            case ParamsUpdated():
                self._params(event.params)
            case ModelDescribed():
                data.model |= _model(event)
                data.classes = list(event.classes) or data.classes
            case EpochStarted():
                if data.resumes:
                    self._redo(event.epoch)
                data.epoch, data.resumes = event.epoch, False
            case EpochEnded():
                self._end_epoch(event, record)
            case MetricsLogged(final=True):
                data.final |= {name: number(value) for name, value in event.values.items()}
            case MetricsLogged():
                self._metrics(event, record)
            case CurveLogged():
                data.curves[event.key] = _curve(event, self._curve_points)
            case ConfusionMatrixLogged():
                data.matrices[event.key] = matrix = _matrix(event)
                if data.worst is None or data.worst.key in data.matrices:
                    data.worst = _worst_of_matrix(event.key, matrix) or data.worst
            case HistogramLogged():
                data.histograms[event.key] = _histogram(event)
            case TableLogged():
                data.tables[event.key] = table = _table(event)
                if found := worst_of_table(event.key, table, event.rows):
                    table["by"], data.worst = found.metric, found
            case TextLogged():
                about = {"key": event.key, "text": event.text[:MAX_TEXT], "epoch": event.epoch}
                _push(data.texts, {**about, "step": event.step, "length": len(event.text)})
            case CheckpointSaved():
                kept = [c for c in data.checkpoints if c["path"] != event.path]
                _push(kept, plain(msgspec.structs.asdict(event)))
                data.checkpoints = kept
            case ArtifactLogged():
                _push(data.artifacts, plain(msgspec.structs.asdict(event)))
            case AlertRaised():
                about = {"title": event.title, "text": event.text[:MAX_TEXT], "level": event.level}
                _push(data.alerts, {**about, "time": record.time})
            case RunEnded():
                self._end(event)

    def _clock(self, record: Record) -> None:
        data = self.data
        if record.attempt > data.attempt and data.first is not None and data.last is not None:
            data.earlier += max(data.last - data.first, 0.0)
            data.first = None
        data.attempt = record.attempt
        data.first = record.time if data.first is None else data.first
        data.last = record.time

    def _start(self, event: RunStarted) -> None:
        data = self.data
        names = ("name", "project", "group", "job_type", "task", "notes", "framework")
        about = {name: getattr(event, name) for name in (*names, "framework_version", "save_dir")}
        about |= {"tags": list(event.tags), "world_size": event.world_size}
        data.about = {name: value for name, value in about.items() if value not in (None, [])}
        data.goals = dict(event.goals)
        data.status, data.reason, data.error = "running", None, None
        data.resumes = data.attempt > 1
        self._params(event.params)

    def _params(self, params: Mapping[str, Any]) -> None:
        data, named = self.data, flat(params)
        data.params |= {name: text_of(value) for name, value in named.items()}
        data.epochs = _total(named, _EPOCHS) or data.epochs
        data.steps = _total(named, _STEPS) or data.steps

    def _redo(self, epoch: int) -> None:
        """Drop what was logged from an epoch on, which comes again with other values."""
        ends = self.data.ends
        at = bisect_left(ends.x, epoch)
        step = ends.y[at] if at < len(ends.x) and ends.x[at] == epoch else 0 if not epoch else None
        ends.cut(epoch)
        for series in self.data.series:
            if series.axis == "epoch":
                series.cut(epoch)
            elif isinstance(step, float | int):
                series.cut(int(step))
        if isinstance(step, float | int):
            self.data.step = int(step)

    def _end_epoch(self, event: EpochEnded, record: Record) -> None:
        data = self.data
        if event.outcome != "completed":
            self._redo(event.epoch)
            return
        data.done = event.epoch + 1
        if data.step is not None:
            t = self._seconds(record)
            data.ends.add(data.done, float(data.step), t, record.attempt, self._points)
        if event.duration_s is not None and math.isfinite(event.duration_s):
            data.took = [*data.took, event.duration_s][-_LAST_EPOCHS:]
        left = None if data.epochs is None else max(data.epochs - data.done, 0)
        mean = sum(data.took) / len(data.took) if data.took else None
        data.eta = None if left is None or mean is None else left * mean

    def _metrics(self, event: MetricsLogged, record: Record) -> None:
        data = self.data
        if event.step is not None:
            data.step = max(event.step, data.step or 0)
        for name, value in event.values.items():
            is_step = event.step is not None
            series = self._find(name, event.phase, "step" if is_step else "epoch")
            epoch = data.epoch if event.epoch is None else event.epoch
            x = event.step if event.step is not None else 0 if epoch is None else epoch + 1
            series.add(x, value, self._seconds(record), record.attempt, self._points)
            if not is_step:
                self._rank(name, value, epoch)

    def _find(self, name: str, phase: str, axis: Literal["epoch", "step"]) -> Series:
        key = (name, phase, axis)
        if key not in self._series:
            base = _PHASES.sub("", name, count=1) if _PHASES.match(name) else name
            self._series[key] = Series(name=name, phase=phase, axis=axis, base=base or name)
            self.data.series.append(self._series[key])
        return self._series[key]

    def _rank(self, name: str, value: float, epoch: int | None) -> None:
        """Keep the best value of the most telling metric that the trainer ranks by."""
        data, goal = self.data, _goal(name, self.data.goals)
        if goal is None or not math.isfinite(value):
            return
        old = data.best
        if old is not None and old["metric"] != name:
            if old.get("told") or _weight(name) >= _weight(old["metric"]):
                return
            old = None
        if old is None or (value > old["value"] if goal == "max" else value < old["value"]):
            data.best = {"metric": name, "value": value, "epoch": epoch, "told": False}

    def _end(self, event: RunEnded) -> None:
        data = self.data
        data.status, data.reason, data.error, data.eta = (
            event.status,
            event.reason,
            event.error,
            None,
        )
        if event.best is not None:
            data.best = _told(event.best)

    def _seconds(self, record: Record) -> float:
        first = self.data.first or 0.0
        return round(self.data.earlier + max(record.time - first, 0.0), 3)


def number(value: float) -> Number:
    """Return a number as JSON has it, or its name if it is not finite."""
    found = float(value)
    if math.isfinite(found):
        return found
    return "NaN" if math.isnan(found) else "Infinity" if found > 0 else "-Infinity"


def plain(value: Any) -> Any:
    """Return a value as JSON and JavaScript have it; integers that a float can't hold are text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**53 else str(value)
    return number(value) if isinstance(value, float) else str(value)


def text_of(value: Any) -> str:
    """Return a parameter's value as a person reads it."""
    shown = plain(value)
    text = shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False)
    return text[:MAX_TEXT]


def worst_of_table(
    key: str, table: Mapping[str, Any], rows: Sequence[Sequence[Any]]
) -> Worst | None:
    """Return the class with the worst result, None if the table is not one of results by class."""
    columns = [str(name) for name in table["columns"]]
    if not columns or columns[0].lower() not in _CLASS_COLUMNS:
        return None
    for telling in (*_TELLING, *_COSTS):
        for index, column in enumerate(columns[1:], 1):
            results = [
                (float(row[index]), str(row[0]))
                for row in rows
                if len(row) > index and _is_result(row[index]) and not _is_average(str(row[0]))
            ]
            if telling in column.lower() and len(results) > 1:
                pick = max if telling in _COSTS else min
                value, name = pick(results, key=lambda result: result[0])
                return Worst(key=key, name=name, metric=column, value=value)
    return None


def _worst_of_matrix(key: str, matrix: Mapping[str, Any]) -> Worst | None:
    shares = []
    for index, row in enumerate(matrix["matrix"]):
        name = matrix["classes"][index] if index < len(matrix["classes"]) else str(index)
        if all(_is_result(cell) for cell in row) and sum(row) > 0 and not _is_average(name):
            shares.append((row[index] / sum(row), name))
    if len(shares) < 2:
        return None
    value, name = min(shares, key=lambda share: share[0])
    return Worst(key=key, name=name, metric="recall", value=value)


def _is_result(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_average(name: str) -> bool:
    return name.strip().lower() in _AVERAGES


def _weight(name: str) -> int:
    telling = (i for i, word in enumerate(_TELLING) if word in name.lower())
    return next(telling, len(_TELLING))


def _goal(name: str, goals: Mapping[str, str]) -> str | None:
    return next((goal for pattern, goal in goals.items() if fnmatchcase(name, pattern)), None)


def _told(best: Best) -> dict[str, Any]:
    value = number(best.value)
    return {"metric": best.metric, "value": value, "epoch": best.epoch, "told": True}


def _total(named: Mapping[str, Any], keys: Sequence[str]) -> int | None:
    for key in keys:
        for name, value in named.items():
            is_count = isinstance(value, int | float) and not isinstance(value, bool)
            if name.rpartition(".")[2] == key and is_count and 0 < value < 2**53:
                return int(value) or None
    return None


def _push(items: list[Any], item: Any) -> None:
    items.append(item)
    del items[:-MAX_ITEMS]


def _model(event: ModelDescribed) -> dict[str, str]:
    known: dict[str, Any] = {
        "parameters": event.parameters,
        "gradients": event.gradients,
        "layers": event.layers,
        "GFLOPs": event.gflops,
        **{f"{name} (ms)": value for name, value in event.speed_ms.items()},
        **event.extra,
    }
    return {name: text_of(value) for name, value in known.items() if value is not None}


def _short(value: float) -> Number:
    return number(float(f"{value:.6g}"))


def _curve(event: CurveLogged, points: int) -> dict[str, Any]:
    """Return a curve with evenly picked points of six digits, its mean over the classes first."""
    x = np.asarray(event.x, dtype=float).ravel()
    y = np.atleast_2d(np.asarray(event.y, dtype=float))
    picked = np.unique(np.linspace(0, len(x) - 1, min(points, len(x))).round().astype(int))
    with np.errstate(all="ignore"):
        mean = y.mean(axis=0) if y.size else x
    names = [*event.classes, *map(str, range(len(event.classes), len(y)))]
    return {
        "title": event.title or event.key,
        "x_label": event.x_label,
        "y_label": event.y_label,
        "epoch": event.epoch,
        "classes": names[: len(y)],
        "x": [_short(value) for value in x[picked]],
        "mean": [_short(value) for value in mean[picked]],
        "y": [[_short(value) for value in row[picked]] for row in y] if y.size else [],
    }


def _matrix(event: ConfusionMatrixLogged) -> dict[str, Any]:
    return {
        "matrix": plain(np.atleast_2d(np.asarray(event.matrix))),
        "classes": list(event.classes),
        "normalized": event.normalized,
        "epoch": event.epoch,
    }


def _histogram(event: HistogramLogged) -> dict[str, Any]:
    counts, edges = plain(np.asarray(event.counts)), plain(np.asarray(event.edges))
    return {"counts": counts, "edges": edges, "epoch": event.epoch}


def _table(event: TableLogged) -> dict[str, Any]:
    return {
        "columns": list(event.columns),
        "rows": [_cells(row) for row in event.rows[:MAX_ROWS]],
        "length": len(event.rows),
        "epoch": event.epoch,
    }


def _cells(row: Sequence[Any]) -> list[Any]:
    shown = [plain(cell) for cell in row]
    return [text_of(cell) if isinstance(cell, list | dict) else cell for cell in shown]
