"""What Prometheus is shown of one run: the last values, each a series with the run's id."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainbus.events import (
    AlertRaised,
    CheckpointSaved,
    EpochEnded,
    EpochStarted,
    MetricsLogged,
    ModelDescribed,
    Record,
    RunEnded,
    UnknownEvent,
    event_name,
)
from trainbus.interfaces import RunInfo
from trainbus.toolkit.sinks import Names, metric_name

logger = logging.getLogger("trainbus.sinks.prometheus")

_LONGEST = 200
_INFO = ("name", "project", "group", "job_type", "task", "framework", "framework_version")
_STATES = ("running", "finished", "failed", "stopped")
_FAMILIES = {
    "trainbus_metric": (("metric", "phase"), "Last value of a metric"),
    "trainbus_best": (("metric",), "Best value of the metric that the run is ranked by"),
    "trainbus_model": (("property",), "Size and speed of the model"),
    "trainbus_epoch": ((), "Epoch that was begun last, counted from 1"),
    "trainbus_epoch_duration_seconds": ((), "How long the last completed epoch took"),
    "trainbus_step": ((), "Optimizer updates done"),
    "trainbus_run_info": ((*_INFO, "attempt"), "What the run is; always 1"),
    "trainbus_run_status": (("status",), "1 for the status that the run has, 0 for the others"),
    "trainbus_records_total": (("event",), "Records of this attempt that were taken"),
    "trainbus_alerts_total": (("level",), "Alerts of this attempt"),
    "trainbus_last_checkpoint_timestamp_seconds": (("kind",), "When a checkpoint was saved last"),
    "trainbus_last_record_timestamp_seconds": ((), "When the last record was emitted"),
    "trainbus_sink_lag_seconds": ((), "Time since the last record that was taken was emitted"),
}
"""Family → its labels besides `run`, and its help text."""


class Values:
    """The last values of a run, which are read in other threads.

    Args:
        run: the run.
        max_metrics: series of metrics that it may have.
    """

    def __init__(self, run: RunInfo, max_metrics: int) -> None:
        self.lost = 0
        self.is_over = False
        self._run, self._max_metrics = run.id, max_metrics
        self._mutex = threading.Lock()
        self._values: dict[str, dict[tuple[str, ...], float]] = {}
        self._label = Names(_clean, _LONGEST)
        info = [_clean(str(getattr(run.started, name) or ""))[:_LONGEST] for name in _INFO]
        self._set("trainbus_run_info", 1, *info, str(run.attempt))
        self._set_status("running")

    def take(self, record: Record) -> None:
        """Take a record in."""
        with self._mutex:
            self._take(record)

    def restore(self, path: Path) -> None:
        """Take over the metrics of the attempt before from its file: they do not come again."""
        from prometheus_client.parser import text_string_to_metric_families as parse

        series = self._values.setdefault("trainbus_metric", {})
        with suppress(OSError, ValueError, LookupError):  # no file, or not one of ours
            for family in parse(path.read_text("utf-8")):
                for sample in family.samples:
                    labels = sample.labels
                    if sample.name == "trainbus_metric" and labels.get("run") == self._run:
                        series[labels["metric"], labels["phase"]] = sample.value

    def collector(self, *, is_live: bool = True) -> Any:
        """Return what a registry asks for the values; the lag is among those that are `is_live`."""
        return _Collector(self, is_live=is_live)

    def _take(self, record: Record) -> None:
        event = record.event
        if isinstance(event, UnknownEvent):
            return
        self._add("trainbus_records_total", event_name(event))
        self._set("trainbus_last_record_timestamp_seconds", record.time)
        match event:
            case MetricsLogged():
                self._take_metrics(event)
            case ModelDescribed():
                self._take_model(event)
            case EpochStarted():
                self._set("trainbus_epoch", event.epoch + 1)
            case EpochEnded(outcome="completed") if event.duration_s is not None:
                self._set("trainbus_epoch_duration_seconds", event.duration_s)
            case CheckpointSaved():
                name = "trainbus_last_checkpoint_timestamp_seconds"
                self._set(name, record.time, event.kind)
            case AlertRaised():
                self._add("trainbus_alerts_total", event.level)
            case RunEnded():
                self._set_status(event.status)
                if event.best is not None:
                    self._set("trainbus_best", event.best.value, self._label(event.best.metric))
                self.is_over = True

    def _take_metrics(self, event: MetricsLogged) -> None:
        series = self._values.setdefault("trainbus_metric", {})
        phase, left_out = self._label(event.phase), 0
        for name, value in event.values.items():
            key = (self._label(metric_name(name, final=event.final)), phase)
            if key in series or len(series) < self._max_metrics:
                series[key] = float(value)
            else:
                left_out += 1
        if left_out:
            if not self.lost:
                text = "found more than %s metrics, of which no more are shown; set `max_metrics`"
                logger.warning(text, self._max_metrics)
            self.lost += 1
        if event.epoch is not None and not event.final:
            self._set("trainbus_epoch", event.epoch + 1)
        if event.step is not None:
            self._set("trainbus_step", event.step)

    def _take_model(self, event: ModelDescribed) -> None:
        found: dict[str, float | None] = {
            "parameters": event.parameters,
            "gradients": event.gradients,
            "layers": event.layers,
            "gflops": event.gflops,
            **{f"speed_ms/{name}": value for name, value in event.speed_ms.items()},
            **event.extra,
        }
        for name, value in list(found.items())[: self._max_metrics]:
            if value is not None:
                self._set("trainbus_model", value, self._label(name))

    def _set(self, family: str, value: float, *labels: str) -> None:
        self._values.setdefault(family, {})[labels] = float(value)

    def _add(self, family: str, *labels: str) -> None:
        self._set(family, self._values.get(family, {}).get(labels, 0) + 1, *labels)

    def _set_status(self, status: str) -> None:
        for state in _STATES:
            self._set("trainbus_run_status", state == status, state)

    def families(self, *, is_live: bool) -> list[Any]:
        """Return everything as the library's families."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        with self._mutex:
            values = {name: dict(series) for name, series in self._values.items()}
        if is_live:  # in a file it would stand still
            for at in values.get("trainbus_last_record_timestamp_seconds", {}).values():
                values["trainbus_sink_lag_seconds"] = {(): max(time.time() - at, 0.0)}
        found = []
        for name, (labels, text) in _FAMILIES.items():
            is_counter = name.endswith("_total")
            family: Any = CounterMetricFamily if is_counter else GaugeMetricFamily
            metric = family(name, text, labels=("run", *labels))
            for key, value in values.get(name, {}).items():
                metric.add_metric((self._run, *key), value)
            if metric.samples:
                found.append(metric)
        return found


class _Collector:
    def __init__(self, values: Values, *, is_live: bool) -> None:
        self._values = values
        self._is_live = is_live

    def collect(self) -> Iterable[Any]:
        return self._values.families(is_live=self._is_live)


def _clean(text: str) -> str:
    """Return a text as UTF-8 can hold it."""
    return text.encode("utf-8", "backslashreplace").decode()
