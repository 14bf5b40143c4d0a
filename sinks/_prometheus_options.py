"""Options of the `prometheus` sink."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from trainbus.interfaces import FilePath, Options


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
        float, Meta(gt=0, description="Shortest time between two writes of the file, or two pushes")
    ] = 5.0
    keep: Annotated[
        bool, Meta(description="Whether file and pushed group stay when the run is over")
    ] = True
    max_metrics: Annotated[
        int, Meta(ge=1, description="Series of metrics that a run may have; more are left out")
    ] = 500
