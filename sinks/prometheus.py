"""Shows how a training stands to Prometheus: scraped over HTTP, or by a textfile or a Pushgateway.

Guarantees: every series carries the run's id, and a run has a bounded number of them; what is shown
depends on the records alone, except the lag; the process-wide registry is never touched.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from trainbus.errors import MissingPackageError, SinkError
from trainbus.events import Record
from trainbus.interfaces import RunInfo, Sink
from trainbus.toolkit.sinks import check_folder, folder_of

from ._prometheus_options import PrometheusOptions
from ._prometheus_places import Gateway, Server, Textfile, check_port
from ._prometheus_values import Values

TESTED_VERSIONS = "0.26.0"
REQUIRED_NAMES = (
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


class PrometheusSink(Sink):
    """Holds the last values of one run, for whoever asks."""

    Options = PrometheusOptions
    service = "prometheus_client"
    durable_only_after_close = True
    reads_files = False
    options: PrometheusOptions

    def __init__(self, options: PrometheusOptions | None = None) -> None:
        super().__init__(options)
        self._is_open = False
        self._location: str | None = None
        self._server: Server | None = None

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
        if self._is_scraped:
            found.append(check_port(options.address, options.port))
        return ", ".join(found) or "the Pushgateway is not tried"

    @property
    def _is_scraped(self) -> bool:
        options = self.options
        has_other_way = options.textfile is not None or options.pushgateway is not None
        return options.port is not None or not has_other_way

    def open(self, run: RunInfo) -> None:
        """Begin to be scraped, and go on with the metrics that the run's file has.

        Raises:
            MissingPackageError: prometheus_client is not installed.
            SinkError: the port or the file can't be used.
        """
        try:
            from prometheus_client import CollectorRegistry
        except ImportError as error:
            raise MissingPackageError("prometheus_client", extra="prometheus") from error
        options = self.options
        self._last, self.lost = (0, 0), 0
        self._values = Values(run, options.max_metrics)
        self._publishing, self._stop = threading.Lock(), threading.Event()
        self._is_dirty, self._published = False, 0.0
        self._ways: list[Textfile | Gateway] = []
        places = []
        if options.textfile is not None:
            file = Textfile(folder_of(options.textfile, run.id))
            self._values.restore(file.path)
            self._ways.append(file)
            places.append(str(file.path))
        if options.pushgateway is not None:
            gateway = Gateway(options.pushgateway, options.job, run.id)
            self._ways.append(gateway)
            places.append(gateway.location)
        if self._is_scraped:
            registry = CollectorRegistry()
            registry.register(self._values.collector())
            place = options.address, options.port, options.next_ports
            self._server = Server(registry, self._values, *place)
            places.insert(0, self._server.location)
        self._location, self._is_open = ", ".join(places), True
        if self._ways:
            threading.Thread(target=self._catch_up, name="trainbus prometheus", daemon=True).start()

    def write(self, records: Sequence[Record]) -> None:
        """Take the records that are new, and write or push what became of it when it is time.

        Raises:
            SinkError: the file can't be written, or the Pushgateway can't be reached.
        """
        if not self._is_open:
            raise SinkError("write came before open; call open(run) first")
        for record in records:
            if record.position > self._last:
                self._last = record.position
                self._is_dirty = True
                self._values.take(record)
        self.lost = self._values.lost
        is_time = time.monotonic() - self._published >= self.options.interval_secs
        if self._values.is_over or is_time:
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
                for way in self._ways:
                    way.forget()
        finally:
            server, self._server = self._server, None
            if server is not None:
                server.close(self.options.linger_secs if self._values.is_over else 0)

    @property
    def location(self) -> str | None:
        """Address that is scraped, path of the file, and address of the pushed group."""
        return self._location

    def _catch_up(self) -> None:
        """Publish what came too soon after the last time, if nothing follows it."""
        stop = self._stop
        while not stop.wait(self.options.interval_secs):
            with suppress(SinkError):  # `write` and `flush` say it
                self._publish()

    def _publish(self) -> None:
        """Write and push, unless nothing is new."""
        from prometheus_client import CollectorRegistry

        with self._publishing:
            if not self._is_dirty:
                return
            self._is_dirty = False
            registry = CollectorRegistry()
            registry.register(self._values.collector(is_live=False))
            try:
                for way in self._ways:
                    way.publish(registry)
            except BaseException:
                self._is_dirty = True
                raise
            self._published = time.monotonic()
