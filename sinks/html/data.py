"""The data of a run that its page shows, gathered from the records and stored in `data.json`.

Guarantees: it depends on the records alone, not on how they were cut into batches; numbers that
JSON does not have are the strings `NaN`, `Infinity` and `-Infinity`; every list is bounded.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from trainbus import events
from trainbus.toolkit.sinks import flat

from . import charts
from .charts import (
    MAX_TEXT,
    Number,
    Worst,
    number,
    plain,
    rank_of,
    text_of,
    worst_of_matrix,
    worst_of_table,
)

_MAX_ITEMS = 500
"""Most texts, alerts, checkpoints and artifacts."""

_MAX_POINTS, _MIN_POINTS = 200_000, 10
"""Most values of all metrics together, and the least of each metric that are kept."""

_EPOCHS = ("epochs", "num_train_epochs", "max_epochs", "num_epochs", "n_epochs")
_STEPS = ("max_steps", "total_timesteps", "max_iters", "total_steps")
_PHASES = re.compile(r"(?:train|training|val|valid|validation|eval|test)[/_]", re.IGNORECASE)
_LAST_EPOCHS = 5


class Picture(msgspec.Struct):
    """A picture in the folder of the page."""

    file: str
    caption: str | None = None
    epoch: int | None = None
    step: int | None = None


class Series(msgspec.Struct):
    """Values of one metric over epochs or steps; `t` is in seconds since the start of the run."""

    name: str
    phase: str
    axis: Literal["epoch", "step"]
    base: str
    x: list[int] = []
    y: list[Number] = []
    t: list[float] = []
    low: tuple[float, int] | None = None
    """Lowest of all values, with its x; those that were dropped count too."""
    high: tuple[float, int] | None = None
    odd: int = 0
    """Number of values that are not finite."""
    attempt: int = 1
    stride: int = 1
    seen: int = 0
    loose: bool = False
    """Whether the next point replaces the last one."""

    def add(self, x: int, value: float, t: float, attempt: int, points: int) -> None:
        """Add a value; every second one is dropped beyond `points`."""
        if attempt > self.attempt:
            self.cut(x - 1)  # a resumed training repeats what follows
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
        """Drop the values after `last`."""
        end = bisect_left(self.x, last + 1)
        if end < len(self.x):
            del self.x[end:], self.y[end:], self.t[end:]
            self.loose = False
            self._measure()

    def _thin(self) -> None:
        """Drop every second value, but not the last one."""
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


class Data(msgspec.Struct):
    """The data of one run."""

    run: str
    position: tuple[int, int] = (0, 0)
    streams: dict[str, tuple[int, int]] = {}
    """Positions in the streams besides the main stream, by their source."""
    about: dict[str, Any] = {}
    goals: dict[str, Literal["max", "min"]] = {}
    status: str = "running"
    reason: str | None = None
    error: events.Failure | None = None
    best: dict[str, Any] | None = None
    worst: Worst | None = None
    first: float | None = None
    """Time of the first record of this attempt, in seconds since the Unix epoch."""
    last: float | None = None
    earlier: float = 0.0
    """Duration of earlier attempts in seconds."""
    attempt: int = 1
    resumes: bool = False
    epoch: int | None = None
    done: int = 0
    """Number of completed epochs."""
    epochs: int | None = None
    step: int | None = None
    steps: int | None = None
    eta: float | None = None
    """Remaining time in seconds, estimated from the duration of the last epochs."""
    took: list[float] = []
    ends: Series = msgspec.field(
        default_factory=lambda: Series(name="", phase="", axis="epoch", base="")
    )
    """Steps at the end of each epoch."""
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
    """Adds the records of a run to its `data`, except pictures.

    Args:
        data: the data of the run so far.
        points: most values of a metric.
        curve_points: most points of a curve.
    """

    def __init__(self, data: Data, *, points: int, curve_points: int) -> None:
        self.data = data
        self._points = points
        self._curve_points = curve_points
        self._series = {(s.name, s.phase, s.axis): s for s in data.series}
        self._goal_of = events.RunStarted(goals=data.goals).goal_of

    def take(self, record: events.Record) -> None:
        """Add a new record."""
        data, event = self.data, record.event
        if isinstance(event, events.UnknownEvent):
            return
        if record.source:
            data.streams[record.source] = record.position
        else:
            data.position = record.position
        self._clock(record)
        name = events.event_name(event)
        data.records[name] = data.records.get(name, 0) + 1
        match event:
            case events.RunStarted():
                self._start(event)
            case events.ParamsUpdated():
                self._params(event.params)
            case events.ModelDescribed():
                data.model |= charts.model(event)
                data.classes = list(event.classes) or data.classes
            case events.EpochStarted():
                if data.resumes:
                    self._redo(event.epoch)
                data.epoch, data.resumes = event.epoch, False
            case events.EpochEnded():
                self._end_epoch(event, record)
            case events.MetricsLogged(final=True):
                data.final |= {name: number(value) for name, value in event.values.items()}
            case events.MetricsLogged():
                self._metrics(event, record)
            case events.CurveLogged():
                data.curves[event.key] = charts.curve(event, self._curve_points)
            case events.ConfusionMatrixLogged():
                data.matrices[event.key] = matrix = charts.matrix(event)
                if data.worst is None or data.worst.key in data.matrices:
                    data.worst = worst_of_matrix(event.key, matrix) or data.worst
            case events.HistogramLogged():
                data.histograms[event.key] = charts.histogram(event)
            case events.TableLogged():
                data.tables[event.key] = table = charts.table(event)
                if found := worst_of_table(event.key, table, event.rows):
                    table["by"], data.worst = found.metric, found
            case events.TextLogged():
                about = {"key": event.key, "text": event.text[:MAX_TEXT], "epoch": event.epoch}
                _push(data.texts, {**about, "step": event.step, "length": len(event.text)})
            case events.CheckpointSaved():
                kept = [c for c in data.checkpoints if c["path"] != event.path]
                _push(kept, plain(msgspec.structs.asdict(event)))
                data.checkpoints = kept
            case events.ArtifactLogged():
                _push(data.artifacts, plain(msgspec.structs.asdict(event)))
            case events.AlertRaised():
                about = {"title": event.title, "text": event.text[:MAX_TEXT], "level": event.level}
                _push(data.alerts, {**about, "time": record.time})
            case events.RunEnded():
                self._end(event)

    def _clock(self, record: events.Record) -> None:
        data = self.data
        if record.attempt > data.attempt and data.first is not None and data.last is not None:
            data.earlier += max(data.last - data.first, 0.0)
            data.first = None
        data.attempt = record.attempt
        data.first = record.time if data.first is None else data.first
        data.last = record.time

    def _start(self, event: events.RunStarted) -> None:
        data = self.data
        names = ("name", "project", "group", "job_type", "task", "notes", "framework")
        about = {name: getattr(event, name) for name in (*names, "framework_version", "save_dir")}
        about |= {"tags": list(event.tags), "world_size": event.world_size}
        data.about = {name: value for name, value in about.items() if value not in (None, [])}
        data.goals, self._goal_of = dict(event.goals), event.goal_of
        data.status, data.reason, data.error = "running", None, None
        data.resumes = data.attempt > 1
        self._params(event.params)

    def _params(self, params: Mapping[str, Any]) -> None:
        data, named = self.data, flat(params)
        data.params |= {name: text_of(value) for name, value in named.items()}
        data.epochs = _total(named, _EPOCHS) or data.epochs
        data.steps = _total(named, _STEPS) or data.steps

    def _redo(self, epoch: int) -> None:
        """Drop the values since the start of an epoch, which is repeated."""
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

    def _end_epoch(self, event: events.EpochEnded, record: events.Record) -> None:
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

    def _metrics(self, event: events.MetricsLogged, record: events.Record) -> None:
        data = self.data
        if event.step is not None:
            data.step = max(event.step, data.step or 0)
        points = max(min(self._points, _MAX_POINTS // max(len(data.series), 1)), _MIN_POINTS)
        for name, value in event.values.items():
            is_step = event.step is not None
            series = self._find(name, event.phase, "step" if is_step else "epoch")
            epoch = data.epoch if event.epoch is None else event.epoch
            x = event.step if event.step is not None else 0 if epoch is None else epoch + 1
            series.add(x, value, self._seconds(record), record.attempt, points)
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
        """Keep the best value of the most important metric that has a goal."""
        data, goal = self.data, self._goal_of(name)
        if goal is None or not math.isfinite(value):
            return
        old = data.best
        if old is not None and old["metric"] != name:
            if old.get("reported") or rank_of(name) >= rank_of(old["metric"]):
                return
            old = None
        if old is None or (value > old["value"] if goal == "max" else value < old["value"]):
            data.best = {"metric": name, "value": value, "epoch": epoch, "reported": False}

    def _end(self, event: events.RunEnded) -> None:
        data = self.data
        data.status, data.reason, data.error = event.status, event.reason, event.error
        data.eta = None
        if event.best is not None:
            best = {"metric": event.best.metric, "value": number(event.best.value)}
            data.best = {**best, "epoch": event.best.epoch, "reported": True}

    def _seconds(self, record: events.Record) -> float:
        first = self.data.first or 0.0
        return round(self.data.earlier + max(record.time - first, 0.0), 3)


def _total(named: Mapping[str, Any], keys: Sequence[str]) -> int | None:
    for key in keys:
        for name, value in named.items():
            is_count = isinstance(value, int | float) and not isinstance(value, bool)
            if name.rpartition(".")[2] == key and is_count and 0 < value < 2**53:
                return int(value) or None
    return None


def _push(items: list[Any], item: Any) -> None:
    items.append(item)
    del items[:-_MAX_ITEMS]
