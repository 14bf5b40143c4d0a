"""Exposes the state of a training to Prometheus: over HTTP, in a textfile, or by a Pushgateway.

Guarantees: every series carries the run's id, and a run has a bounded number of them; all values
except the lag depend on the records alone; the process-wide registry is never touched.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from trainbus.errors import SinkError
from trainbus.events import Record
from trainbus.interfaces import FilePath, Options, RunInfo, Sink
from trainbus.toolkit.sinks import (
    SeenRecords,
    check_folder,
    check_package,
    folder_of,
    required_package,
)

from .rows import Values
from .session import Gateway, Server, Textfile, check_port

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
"""Names of prometheus_client that the sink uses; `trainbus doctor` resolves them."""


class PrometheusOptions(Options, frozen=True, kw_only=True):
    """Options of the `prometheus` sink; it opens a port unless another way out is set."""

    port: (
        Annotated[
            int,
            Meta(
                ge=0,
                le=65535,
                description="Port to listen on, 0 for any free one; by default 9464, or none "
                "if `textfile` or `pushgateway` is set",
            ),
        ]
        | None
    ) = None
    next_ports: Annotated[
        int,
        Meta(
            ge=0, le=1000, description="How many of the following ports to try if `port` is in use"
        ),
    ] = 0
    address: Annotated[
        str, Meta(min_length=1, description="Address to listen on; `0.0.0.0` for all networks")
    ] = "127.0.0.1"
    linger_secs: Annotated[
        float,
        Meta(
            ge=0, le=300, description="Maximum time that the end of the run waits for a last scrape"
        ),
    ] = 0.0
    textfile: (
        Annotated[
            FilePath,
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
        float, Meta(gt=0, description="Minimum time between two writes of the file, or two pushes")
    ] = 5.0
    keep: Annotated[
        bool, Meta(description="Whether to keep the file and the pushed group after the run")
    ] = True
    max_metrics: Annotated[
        int,
        Meta(ge=1, description="Maximum number of metric series per run; further ones are dropped"),
    ] = 500


class PrometheusSink(Sink):
    """Exposes the last values of one run."""

    Options = PrometheusOptions
    service = "prometheus_client"
    durable_only_after_close = True
    reads_files = False
    options: PrometheusOptions

    _is_open = False
    _location: str | None = None
    _server: Server | None = None

    def check(self) -> str:
        """Make sure that the port is free and the file's folder can be written.

        Raises:
            MissingPackageError: prometheus_client is not installed.
            SinkError: the port is in use, or the folder can't be written.
        """
        check_package("prometheus_client", extra="prometheus")
        options, found = self.options, []
        if options.textfile is not None:
            found.append(check_folder(Path(options.textfile).parent))
        if self._is_scraped:
            found.append(check_port(options.address, options.port))
        return ", ".join(found) or "the Pushgateway was not tried"

    @property
    def _is_scraped(self) -> bool:
        options = self.options
        has_other_way = options.textfile is not None or options.pushgateway is not None
        return options.port is not None or not has_other_way

    def open(self, run: RunInfo) -> None:
        """Start to listen, and restore the metrics of the run's file.

        Raises:
            MissingPackageError: prometheus_client is not installed.
            SinkError: the port or the file can't be used.
        """
        with required_package("prometheus_client", extra="prometheus"):
            import prometheus_client  # noqa: F401
        options = self.options
        self._seen, self.lost = SeenRecords(), 0
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
            place = options.address, options.port, options.next_ports
            self._server = Server(_registry(self._values, is_live=True), self._values, *place)
            places.insert(0, self._server.location)
        self._location, self._is_open = ", ".join(places), True
        if self._ways:
            threading.Thread(target=self._catch_up, name="trainbus prometheus", daemon=True).start()

    def write(self, records: Sequence[Record]) -> None:
        """Take the records that are new, and write or push the values if it is time.

        Raises:
            SinkError: the file can't be written, or the Pushgateway can't be reached.
        """
        for record in self._seen.new(records):
            self._is_dirty = True
            self._values.take(record)
        self.lost = self._values.lost
        is_time = time.monotonic() - self._published >= self.options.interval_secs
        if self._values.is_over or is_time:
            self.flush()

    def flush(self) -> None:
        """Write the file and push the group, unless nothing is new.

        Raises:
            SinkError: the file can't be written, or the Pushgateway can't be reached.
        """
        with self._publishing:
            if not self._is_dirty:
                return
            self._is_dirty = False
            registry = _registry(self._values, is_live=False)
            try:
                for way in self._ways:
                    way.publish(registry)
            except BaseException:
                self._is_dirty = True
                raise
            self._published = time.monotonic()

    def close(self) -> None:
        """Publish the last values, and wait up to `linger_secs` until they are scraped."""
        if not self._is_open:
            return
        self._is_open = False
        self._stop.set()
        try:
            self.flush()
            if not self.options.keep:
                for way in self._ways:
                    way.forget()
        finally:
            if self._server is not None:
                self._server.close(self.options.linger_secs if self._values.is_over else 0)

    @property
    def location(self) -> str | None:
        """Address to scrape, path of the file, and address of the pushed group."""
        return self._location

    def _catch_up(self) -> None:
        """Publish values that came too soon after the last time, if no record follows."""
        stop = self._stop
        while not stop.wait(self.options.interval_secs):
            with suppress(SinkError):  # `write` raises it too
                self.flush()


def _registry(values: Values, *, is_live: bool) -> Any:
    """Return a registry of these values; `is_live` adds the lag."""
    from prometheus_client import CollectorRegistry

    class Collector:
        def collect(self) -> list[Any]:
            return values.families(is_live=is_live)

    registry: Any = CollectorRegistry()
    registry.register(Collector())
    return registry
