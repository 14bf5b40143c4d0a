"""Shows how a training stands to Prometheus: scraped over HTTP, or by a textfile or a Pushgateway.

Guarantees: every series carries the run's id, and a run has a bounded number of them; what is shown
depends on the records alone, except the lag; the process-wide registry is never touched.
"""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.error import HTTPError

from msgspec import Meta

from trainbus.errors import MissingPackageError, SinkError
from trainbus.events import (
    AlertRaised,
    CheckpointSaved,
    EpochEnded,
    EpochStarted,
    MetricsLogged,
    ModelDescribed,
    Record,
    RunEnded,
    RunStarted,
    UnknownEvent,
    event_name,
)
from trainbus.interfaces import Options, RunInfo, Sink
from trainbus.storing import Names, check_folder, metric_name

if TYPE_CHECKING:
    from http.server import ThreadingHTTPServer

logger = logging.getLogger("trainbus.sinks.prometheus")

TESTED = "0.26.0"
NEEDS = (
    "prometheus_client:CollectorRegistry",
    "prometheus_client:MetricsHandler.factory",
    "prometheus_client:push_to_gateway",
    "prometheus_client:delete_from_gateway",
    "prometheus_client:write_to_textfile",
    "prometheus_client.core:CounterMetricFamily",
    "prometheus_client.core:GaugeMetricFamily",
    "prometheus_client.parser:text_string_to_metric_families",
)
"""What the sink relies on; `trainbus doctor` resolves it."""

_PORT = 9464
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


class PrometheusOptions(Options, frozen=True, kw_only=True):
    """Options of the `prometheus` sink; a port is opened unless another way out is set."""

    port: (
        Annotated[
            int,
            Meta(
                ge=0,
                le=65535,
                description="Port to be scraped at, 0 for any free one; by default 9464, and none "
                "where `textfile` or `pushgateway` is set",
            ),
        ]
        | None
    ) = None
    next_ports: Annotated[
        int, Meta(ge=0, le=1000, description="Ports behind it to try while it is in use")
    ] = 0
    address: Annotated[
        str, Meta(min_length=1, description="Address to listen on; `0.0.0.0` for every network")
    ] = "127.0.0.1"
    linger_secs: Annotated[
        float,
        Meta(ge=0, le=300, description="How long the end of the run waits for a last scrape"),
    ] = 0.0
    textfile: (
        Annotated[
            str,
            Meta(
                pattern=r"\.prom$",
                extra={"expected": "a path that ends in .prom, as node_exporter reads no other"},
                description="File for node_exporter's textfile collector; `{run}` is the run's id",
            ),
        ]
        | None
    ) = None
    pushgateway: (
        Annotated[
            str,
            Meta(
                pattern=r"^https?://[^@\s/]+(?:/[^@\s]*)?$",
                extra={"expected": "an http:// or https:// address without a login in it"},
                description="Address of a Pushgateway",
            ),
        ]
        | None
    ) = None
    job: Annotated[str, Meta(min_length=1, description="Job in the Pushgateway")] = "trainbus"
    interval_secs: Annotated[
        float, Meta(gt=0, description="Shortest time between two writes of the file, or two pushes")
    ] = 5.0
    keep: Annotated[
        bool, Meta(description="Whether file and pushed group stay when the run is over")
    ] = True
    max_metrics: Annotated[
        int, Meta(ge=1, description="Series of metrics that a run may have; more are left out")
    ] = 500


class PrometheusSink(Sink):
    """Holds the last values of one run, for whoever asks."""

    Options = PrometheusOptions
    service = "prometheus_client"
    volatile = True
    reads_files = False
    options: PrometheusOptions

    def __init__(self, options: PrometheusOptions | None = None) -> None:
        super().__init__(options)
        self._is_open = False
        self._where: str | None = None
        self._server: ThreadingHTTPServer | None = None

    def check(self) -> str:
        """Make sure that the port is free and the file's folder can be written.

        Raises:
            MissingPackageError: prometheus_client is not installed.
            SinkError: the port is taken, or the folder can't be written.
        """
        if find_spec("prometheus_client") is None:
            raise MissingPackageError("prometheus_client", extra="prometheus")
        options, found = self.options, []
        if options.textfile is not None:
            found.append(check_folder(Path(options.textfile).parent))
        if options.port is not None or (options.textfile is None and options.pushgateway is None):
            port = _PORT if options.port is None else options.port
            family = socket.AF_INET6 if ":" in options.address else socket.AF_INET
            try:
                with socket.socket(family) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind((options.address, port))
            except OSError as error:
                text = f"can't listen on port {port} of {options.address} ({error.strerror})"
                raise SinkError(f"{text}; set another `port` or `address`") from error
            found.append(f"port {port} is free")
        return ", ".join(found) or "the Pushgateway is not tried"

    def open(self, run: RunInfo) -> None:
        """Begin to be scraped, and go on with the metrics that the run's file has.

        Raises:
            MissingPackageError: prometheus_client is not installed.
            SinkError: the port or the file can't be used.
        """
        try:
            import prometheus_client
        except ImportError as error:
            raise MissingPackageError("prometheus_client", extra="prometheus") from error
        options = self.options
        self.lost = 0
        self._last = (0, 0)
        self._values: dict[str, dict[tuple[str, ...], float]] = {}
        self._label = Names(_clean, _LONGEST)
        self._mutex, self._publishing = threading.Lock(), threading.Lock()
        self._is_over, self._seen_over = False, threading.Event()
        self._is_dirty, self._published = False, 0.0
        self._stop = threading.Event()
        self._registry = prometheus_client.CollectorRegistry()
        self._registry.register(_Collector(self))
        self._id, self._where = run.id, None
        self._file: Path | None = None
        places = []
        if options.textfile is not None:
            self._file = Path(options.textfile.replace("{run}", run.id)).expanduser().absolute()
            self._restore(self._file)
            places.append(str(self._file))
        if options.pushgateway is not None:
            places.append(f"{options.pushgateway.rstrip('/')}/metrics/job/{options.job}")
        self._set("trainbus_run_info", 1, *_info(run.started), str(run.attempt))
        self._set_status("running")
        if options.port is not None or not places:
            places.insert(0, self._serve(_PORT if options.port is None else options.port))
        self._where, self._is_open = ", ".join(places), True
        if self._file is not None or options.pushgateway is not None:
            name = "trainbus prometheus"
            threading.Thread(target=self._catch_up, name=name, daemon=True).start()

    def write(self, records: Sequence[Record]) -> None:
        """Take the records that are new, and write or push what became of it when it is time.

        Raises:
            SinkError: the file can't be written, or the Pushgateway can't be reached.
        """
        if not self._is_open:
            raise SinkError("write came before open; call open(run) first")
        with self._mutex:
            for record in records:
                if record.position > self._last:
                    self._last = record.position
                    self._is_dirty = True
                    self._take(record)
        if self._is_over or time.monotonic() - self._published >= self.options.interval_secs:
            self._publish()

    def flush(self) -> None:
        """Write or push what was taken.

        Raises:
            SinkError: the file can't be written, or the Pushgateway can't be reached.
        """
        if self._is_open:
            self._publish()

    def close(self) -> None:
        """Show the last values until they were scraped or `linger_secs` are over, then no more."""
        if not self._is_open:
            return
        self._is_open = False
        self._stop.set()
        try:
            self._publish()
            if not self.options.keep:
                self._forget()
        finally:
            server, self._server = self._server, None
            if server is not None:
                if self._is_over:
                    self._seen_over.wait(self.options.linger_secs)
                server.shutdown()
                server.server_close()

    @property
    def where(self) -> str | None:
        """Address that is scraped, path of the file, and address of the pushed group."""
        return self._where

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
                self._is_over = True

    def _take_metrics(self, event: MetricsLogged) -> None:
        series = self._values.setdefault("trainbus_metric", {})
        phase, left_out = self._label(event.phase), 0
        for name, value in event.values.items():
            key = (self._label(metric_name(name, final=event.final)), phase)
            if key in series or len(series) < self.options.max_metrics:
                series[key] = float(value)
            else:
                left_out += 1
        if left_out:
            if not self.lost:
                text = "found more than %s metrics, of which no more are shown; set `max_metrics`"
                logger.warning(text, self.options.max_metrics)
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
        for name, value in list(found.items())[: self.options.max_metrics]:
            if value is not None:
                self._set("trainbus_model", value, self._label(name))

    def _set(self, family: str, value: float, *labels: str) -> None:
        self._values.setdefault(family, {})[labels] = float(value)

    def _add(self, family: str, *labels: str) -> None:
        self._set(family, self._values.get(family, {}).get(labels, 0) + 1, *labels)

    def _set_status(self, status: str) -> None:
        for state in _STATES:
            self._set("trainbus_run_status", state == status, state)

    def _restore(self, path: Path) -> None:
        """Take over the metrics of the attempt before, which do not come again."""
        from prometheus_client.parser import text_string_to_metric_families as parse

        series = self._values.setdefault("trainbus_metric", {})
        with suppress(OSError, ValueError, LookupError):  # no file, or not one of ours
            for family in parse(path.read_text("utf-8")):
                for sample in family.samples:
                    labels = sample.labels
                    if sample.name == "trainbus_metric" and labels.get("run") == self._id:
                        series[labels["metric"], labels["phase"]] = sample.value

    def _serve(self, port: int) -> str:
        from http.server import ThreadingHTTPServer

        from prometheus_client import MetricsHandler

        sink, address = self, self.options.address
        base: Any = MetricsHandler.factory(self._registry)

        class Handler(base):  # type: ignore[misc]
            timeout = 30.0  # for a client that sends nothing

            def do_GET(self) -> None:  # noqa: N802
                was_over = sink._is_over
                super().do_GET()
                if was_over:
                    sink._seen_over.set()

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in address else socket.AF_INET

        last = min(port + self.options.next_ports, 65535) if port else 0
        for number in range(port, last + 1):
            try:
                self._server = Server((address, number), Handler)
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    text = f"can't listen on port {number} of {address} ({error.strerror or error})"
                    raise SinkError(f"{text}; set another `port` or `address`") from error
                if number == last:
                    found = f"port {port}" if last == port else f"every port from {port} to {last}"
                    text = f"{found} of {address} is in use, expected a free one"
                    raise SinkError(f"{text}; set another `port`, or more `next_ports`") from error
        assert self._server is not None
        name = "trainbus prometheus"
        serve = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name=name, daemon=True
        )
        serve.start()
        host = f"[{address}]" if ":" in address else address
        return f"http://{host}:{self._server.server_port}/metrics"

    def _catch_up(self) -> None:
        """Publish what came too soon after the last time, if nothing follows it."""
        stop = self._stop
        while not stop.wait(self.options.interval_secs):
            with suppress(SinkError):  # `write` and `flush` say it
                self._publish()

    def _publish(self) -> None:
        """Write and push, unless nothing is new."""
        from prometheus_client import CollectorRegistry, push_to_gateway, write_to_textfile

        with self._publishing:
            if not self._is_dirty:
                return
            self._is_dirty = False
            registry = CollectorRegistry()
            registry.register(_Collector(self, is_live=False))
            try:
                if self._file is not None:
                    with self._telling_of_file(self._file):
                        self._file.parent.mkdir(parents=True, exist_ok=True)
                        write_to_textfile(str(self._file), registry)
                if self.options.pushgateway is not None:
                    with self._telling_of_gateway(self.options.pushgateway) as group:
                        push_to_gateway(**group, registry=registry)
            except BaseException:
                self._is_dirty = True
                raise
            self._published = time.monotonic()

    def _forget(self) -> None:
        from prometheus_client import delete_from_gateway

        if self._file is not None:
            with self._telling_of_file(self._file):
                self._file.unlink(missing_ok=True)
        if self.options.pushgateway is not None:
            with self._telling_of_gateway(self.options.pushgateway) as group:
                delete_from_gateway(**group)

    @contextmanager
    def _telling_of_file(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            text = f"can't write {path} ({error.strerror or error}); set another `textfile`"
            raise SinkError(text) from error

    @contextmanager
    def _telling_of_gateway(self, url: str) -> Iterator[dict[str, Any]]:
        key = {"run": self._id}
        try:
            yield {"gateway": url, "job": self.options.job, "grouping_key": key, "timeout": 10}
        except OSError as error:
            if isinstance(error, HTTPError):
                error.close()
            status = getattr(error, "code", None)
            is_passing = status is None or status >= 500 or status in (408, 425, 429)
            text = f"the Pushgateway at {url} takes nothing ({error}); see whether it runs there"
            raise SinkError(text, retry=is_passing) from error

    def _families(self, *, is_live: bool) -> list[Any]:
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
                metric.add_metric((self._id, *key), value)
            if metric.samples:
                found.append(metric)
        return found


class _Collector:
    """What a registry asks for the values."""

    def __init__(self, sink: PrometheusSink, *, is_live: bool = True) -> None:
        self._sink = sink
        self._is_live = is_live

    def collect(self) -> Iterable[Any]:
        return self._sink._families(is_live=self._is_live)


def _info(started: RunStarted) -> list[str]:
    return [_clean(str(getattr(started, name) or ""))[:_LONGEST] for name in _INFO]


def _clean(text: str) -> str:
    """Return a text as UTF-8 can hold it."""
    return text.encode("utf-8", "backslashreplace").decode()
