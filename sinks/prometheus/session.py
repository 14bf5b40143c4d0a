"""The ways to Prometheus: a port to scrape, a file for node_exporter, a group in a Pushgateway."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from trainbus.errors import SinkError
from trainbus.toolkit.sinks import writing_to

from .rows import Values

_PORT = 9464
_THREAD = "trainbus prometheus"


class Server:
    """Answers scrapes until it is closed.

    Args:
        registry: the registry that scrapes read.
        values: values of the run; a scrape after its end is the last one.
        address: address to listen on.
        port: the port; None for 9464, the default of Prometheus exporters.
        next_ports: number of next ports to try if it is in use.

    Raises:
        SinkError: it can't listen there.
    """

    def __init__(
        self, registry: Any, values: Values, address: str, port: int | None, next_ports: int
    ) -> None:
        self._seen_over = threading.Event()
        self._server = _listen(
            address, _PORT if port is None else port, next_ports, self._handler(registry, values)
        )
        threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name=_THREAD, daemon=True
        ).start()
        host = f"[{address}]" if ":" in address else address
        self.location = f"http://{host}:{self._server.server_port}/metrics"

    def _handler(self, registry: Any, values: Values) -> Any:
        from prometheus_client import MetricsHandler

        base: Any = MetricsHandler.factory(registry)
        seen_over = self._seen_over

        class Handler(base):  # type: ignore[misc]
            timeout = 30.0  # for a client that sends nothing

            def do_GET(self) -> None:  # noqa: N802
                was_over = values.is_over
                super().do_GET()
                if was_over:
                    seen_over.set()

        return Handler

    def close(self, linger_secs: float) -> None:
        """Stop listening after a scrape of the ended run, or after that many seconds."""
        self._seen_over.wait(linger_secs)
        self._server.shutdown()
        self._server.server_close()


def _listen(address: str, port: int, next_ports: int, handler: Any) -> Any:
    from http.server import ThreadingHTTPServer

    class HttpServer(ThreadingHTTPServer):
        address_family = _family(address)

    last = min(port + next_ports, 65535) if port else 0
    for number in range(port, last + 1):
        try:
            return HttpServer((address, number), handler)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise _unusable(address, number, error) from error
            if number == last:
                found = f"port {port}" if last == port else f"every port from {port} to {last}"
                text = f"{found} of {address} is in use, expected a free one"
                raise SinkError(f"{text}; set another `port`, or more `next_ports`") from error
    return None


def check_port(address: str, port: int | None) -> str:
    """Make sure that a port is free, and return a line saying so.

    Raises:
        SinkError: it is not.
    """
    number = _PORT if port is None else port
    try:
        with socket.socket(_family(address)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, number))
    except OSError as error:
        raise _unusable(address, number, error) from error
    return f"port {number} is free"


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _unusable(address: str, port: int, error: OSError) -> SinkError:
    text = f"can't listen on port {port} of {address} ({error.strerror or error})"
    return SinkError(f"{text}; set another `port` or `address`")


class Textfile:
    """A file that node_exporter reads."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def publish(self, registry: Any) -> None:
        """Write the file.

        Raises:
            SinkError: it can't be written.
        """
        from prometheus_client import write_to_textfile

        with writing_to(self.path, option="textfile"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_to_textfile(str(self.path), registry)

    def forget(self) -> None:
        """Remove the file.

        Raises:
            SinkError: it can't be removed.
        """
        with writing_to(self.path, option="textfile"):
            self.path.unlink(missing_ok=True)


class Gateway:
    """A group of metrics in a Pushgateway."""

    def __init__(self, url: str, job: str, run: str) -> None:
        self.location = f"{url.rstrip('/')}/metrics/job/{job}"
        self._url = url
        self._group: dict[str, Any] = {"job": job, "grouping_key": {"run": run}, "timeout": 10}

    def publish(self, registry: Any) -> None:
        """Push the group.

        Raises:
            SinkError: the Pushgateway can't be reached, or rejects it.
        """
        from prometheus_client import push_to_gateway

        with self._reaching():
            push_to_gateway(self._url, registry=registry, **self._group)

    def forget(self) -> None:
        """Remove the group.

        Raises:
            SinkError: the Pushgateway can't be reached, or rejects it.
        """
        from prometheus_client import delete_from_gateway

        with self._reaching():
            delete_from_gateway(self._url, **self._group)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, HTTPError):
                error.close()
            status = getattr(error, "code", None)
            is_temporary = status is None or status >= 500 or status in (408, 425, 429)
            text = f"the Pushgateway at {self._url} failed ({error}); check that it runs there"
            raise SinkError(text, retry=is_temporary) from error
