"""The configuration of one sink: how to create it, and what is applied to its records."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import msgspec

from trainbus.delivery.transforms import TransformSpec
from trainbus.interfaces import Sink
from trainbus.journal.blobs import blob_name

logger = logging.getLogger("trainbus")


Isolation: TypeAlias = Literal["auto", "process", "thread", "inline"]


class SinkSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The configuration of one sink.

    `kind` and `options` describe a registered sink, which another process can create too. `options`
    is None for a sink that is an object of this process.
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
    """Folder for files whose location no option sets; None for the working directory."""

    def sample(self) -> Sink | None:
        """Return an unopened sink to read its properties from; None if it can't be created."""
        if self.options is None:
            return self.sink
        try:
            return self.make()
        except Exception:  # the worker reports the error
            return None

    @property
    def key(self) -> str:
        """Name of the cursor: another type or other options mean another destination."""
        about = msgspec.json.encode([self.name, self.kind, self.options], order="sorted")
        return f"{blob_name(self.name)[:80]}-{hashlib.sha256(about).hexdigest()[:8]}"


def isolation_of(spec: SinkSpec, isolation: Isolation) -> Isolation:
    """Return where a sink runs; `auto` is a process if possible, else a thread."""
    mode = spec.isolation or isolation
    if mode == "auto":
        sample = spec.sample()
        is_free = spec.options is not None and sample is not None and not sample.in_process
        return "process" if is_free and _has_processes() else "thread"
    if mode == "process" and spec.options is None:
        logger.warning(
            "sink %r is an object of this process, so it runs in a thread instead of a process",
            spec.name,
        )
        return "thread"
    if mode == "process" and not _has_processes():
        return "thread"
    return mode


@functools.cache
def _has_processes() -> bool:
    """Return whether delivery processes work on this system; if not, say so once."""
    # What they share with the training: files without a name, and a pipe that can be waited for.
    is_posix = all(hasattr(os, name) for name in ("pread", "writev", "set_blocking"))
    if not is_posix:
        logger.warning(
            "sinks run in threads of the training process: delivery processes need a POSIX system"
        )
    return is_posix
