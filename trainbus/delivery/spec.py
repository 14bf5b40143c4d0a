"""One sink as configured."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import msgspec

from trainbus.delivery.transforms import TransformSpec
from trainbus.interfaces import Sink
from trainbus.journal.blobs import blob_name

logger = logging.getLogger("trainbus")


Isolation: TypeAlias = Literal["auto", "process", "thread", "inline"]


class SinkSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One sink as configured: how to make it, and what is done to records on the way to it.

    `options` are those of a registered sink, named by `kind`, which another process can make again;
    None for a sink that is an object of this process.
    """

    name: str
    make: Callable[[], Sink]
    kind: str
    service: str | None = None
    transforms: TransformSpec = TransformSpec()
    on_error: Literal["warn", "raise"] = "warn"
    options: dict[str, Any] | None = None
    sink: Sink | None = None
    isolation: Isolation | None = None
    base: str | None = None
    """Folder that what a sink writes by default is relative to; None for the working directory."""

    def sample(self) -> Sink | None:
        """Return a sink that is not opened, to ask what it is like; None where that can't be."""
        if self.options is None:
            return self.sink
        try:
            return self.make()
        except Exception:  # the worker says what is wrong with it
            return None

    @property
    def key(self) -> str:
        """Name of the cursor: another kind or other options are another place to deliver to."""
        about = msgspec.json.encode([self.name, self.kind, self.options], order="sorted")
        return f"{blob_name(self.name)[:80]}-{hashlib.sha256(about).hexdigest()[:8]}"


def isolation_of(route: SinkSpec, isolation: Isolation) -> Isolation:
    """Return where a sink runs: the last resort of `auto` is a thread."""
    mode = route.isolation or isolation
    if mode == "auto":
        sample = route.sample()
        is_free = route.options is not None and sample is not None and not sample.in_process
        return "process" if is_free else "thread"
    if mode == "process" and route.options is None:
        logger.warning(
            "sink %r is an object of this process, so it runs in a thread instead of a process",
            route.name,
        )
        return "thread"
    return mode
