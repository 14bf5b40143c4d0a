"""The values of one run that Prometheus reads: the last ones, each a series with the run's id."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainbus import events
from trainbus.interfaces import RunInfo
from trainbus.toolkit.sinks import Names, metric_name, model_values, utf8

logger = logging.getLogger("trainbus.sinks.prometheus")

_LONGEST = 200
_INFO = ("name", "project", "group", "job_type", "task", "framework", "framework_version")
_STATES = ("running", "finished", "failed", "stopped")
_FAMILIES = {
    "trainbus_metric": (("metric", "phase"), "Last value of a metric"),
    "trainbus_best": (("metric",), "Best value of the metric that the trainer ranks by"),
    "trainbus_model": (("property",), "Size and speed of the model"),
    "trainbus_epoch": ((), "Epoch that began last, counted from 1"),
    "trainbus_epoch_duration_seconds": ((), "Duration of the last completed epoch"),
    "trainbus_step": ((), "Optimizer steps"),
    "trainbus_run_info": ((*_INFO, "attempt"), "Description of the run; always 1"),
    "trainbus_run_status": (("status",), "1 for the status of the run, 0 for the others"),
    "trainbus_records_total": (("event",), "Records of this attempt that were delivered"),
    "trainbus_alerts_total": (("level",), "Alerts of this attempt"),
    "trainbus_last_checkpoint_timestamp_seconds": (("kind",), "Time of the last checkpoint"),
    "trainbus_last_record_timestamp_seconds": ((), "Time of the last record"),
    "trainbus_sink_lag_seconds": ((), "Time since the last delivered record was emitted"),
}
"""Family → its labels other than `run`, and its help text."""


class Values:
    """The last values of a run, which other threads read.

    Args:
        run: the run.
        max_metrics: maximum series of metrics.
    """

    def __init__(self, run: RunInfo, max_metrics: int) -> None:
        self.lost = 0
        self.is_over = False
        self._run, self._max_metrics = run.id, max_metrics
        self._mutex = threading.Lock()
        self._values: dict[str, dict[tuple[str, ...], float]] = {}
        self._label = Names(utf8, _LONGEST)
        info = [utf8(str(getattr(run.started, name) or ""))[:_LONGEST] for name in _INFO]
        self._set("trainbus_run_info", 1, *info, str(run.attempt))
        self._set_status("running")

    def take(self, record: events.Record) -> None:
        """Take the values of a record."""
        with self._mutex:
            self._take(record)

    def restore(self, path: Path) -> None:
        """Restore the metrics of the last attempt from its file: its records do not come again."""
        from prometheus_client.parser import text_string_to_metric_families as parse

        series = self._values.setdefault("trainbus_metric", {})
        with suppress(OSError, ValueError, LookupError):  # no file, or another program's
            for family in parse(path.read_text("utf-8")):
                for sample in family.samples:
                    labels = sample.labels
                    if sample.name == "trainbus_metric" and labels.get("run") == self._run:
                        series[labels["metric"], labels["phase"]] = sample.value

    def _take(self, record: events.Record) -> None:
        event = record.event
        if isinstance(event, events.UnknownEvent):
            return
        self._add("trainbus_records_total", events.event_name(event))
        self._set("trainbus_last_record_timestamp_seconds", record.time)
        match event:
            case events.MetricsLogged():
                self._take_metrics(event)
            case events.ModelDescribed():
                for name, value in list(model_values(event).items())[: self._max_metrics]:
                    self._set("trainbus_model", value, self._label(name.removeprefix("model/")))
            case events.EpochStarted():
                self._set("trainbus_epoch", event.epoch + 1)
            case events.EpochEnded(outcome="completed") if event.duration_s is not None:
                self._set("trainbus_epoch_duration_seconds", event.duration_s)
            case events.CheckpointSaved():
                name = "trainbus_last_checkpoint_timestamp_seconds"
                self._set(name, record.time, event.kind)
            case events.AlertRaised():
                self._add("trainbus_alerts_total", event.level)
            case events.RunEnded():
                self._set_status(event.status)
                if event.best is not None:
                    self._set("trainbus_best", event.best.value, self._label(event.best.metric))
                self.is_over = True

    def _take_metrics(self, event: events.MetricsLogged) -> None:
        series = self._values.setdefault("trainbus_metric", {})
        phase, dropped = self._label(event.phase), 0
        for name, value in event.values.items():
            key = (self._label(metric_name(name, final=event.final)), phase)
            if key in series or len(series) < self._max_metrics:
                series[key] = float(value)
            else:
                dropped += 1
        if dropped:
            if not self.lost:
                text = "dropping the metrics after the first %s; set `max_metrics`"
                logger.warning(text, self._max_metrics)
            self.lost += 1
        if event.epoch is not None and not event.final:
            self._set("trainbus_epoch", event.epoch + 1)
        if event.step is not None:
            self._set("trainbus_step", event.step)

    def _set(self, family: str, value: float, *labels: str) -> None:
        self._values.setdefault(family, {})[labels] = float(value)

    def _add(self, family: str, *labels: str) -> None:
        self._set(family, self._values.get(family, {}).get(labels, 0) + 1, *labels)

    def _set_status(self, status: str) -> None:
        for state in _STATES:
            self._set("trainbus_run_status", state == status, state)

    def families(self, *, is_live: bool) -> list[Any]:
        """Return all values as families of prometheus_client; `is_live` adds the lag."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        with self._mutex:
            values = {name: dict(series) for name, series in self._values.items()}
        if is_live:  # in a file it would not change
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
