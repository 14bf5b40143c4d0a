"""Attach once to any trainer; every metric, plot, curve and model reaches any tracker."""

from __future__ import annotations

from importlib.metadata import version as _version
from typing import TYPE_CHECKING

from trainbus.bus import Bus
from trainbus.delivery.receipt import Receipt, SinkReport
from trainbus.delivery.spec import SinkSpec
from trainbus.errors import (
    AttachError,
    ConfigError,
    JournalError,
    MissingPackageError,
    NoAdapterError,
    PluginError,
    SinkError,
    SubscribeError,
    TrainbusError,
    UnknownPluginError,
)
from trainbus.events import Event, Record
from trainbus.interfaces import Adapter, Detach, Emit, FilePath, Options, RunInfo, Sink
from trainbus.journal.writer import JournalSpec
from trainbus.recording.settings import RunDefaults
from trainbus.run import AttachedRun, LoopRun, Run, current_run

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

__version__ = _version("trainbus")

__all__ = [
    "Adapter",
    "AttachError",
    "AttachedRun",
    "Bus",
    "ConfigError",
    "Detach",
    "Emit",
    "Event",
    "FilePath",
    "JournalError",
    "JournalSpec",
    "LoopRun",
    "MissingPackageError",
    "NoAdapterError",
    "Options",
    "PluginError",
    "Receipt",
    "Record",
    "Run",
    "RunDefaults",
    "RunInfo",
    "Sink",
    "SinkError",
    "SinkReport",
    "SinkSpec",
    "SubscribeError",
    "TrainbusError",
    "UnknownPluginError",
    "current_run",
    "load",
]


def load(path: str | os.PathLike[str], *, name: str | None = None, tags: Sequence[str] = ()) -> Bus:
    """Return a bus with the sinks that a YAML file configures.

    Args:
        path: the file.
        name: name of the runs; replaces that of the file and of the trainer.
        tags: tags of the runs, in addition to those of the file.

    Raises:
        ConfigError: the file can't be read or is not valid; the error lists every problem in it.
    """
    from trainbus import config  # imports yaml, which nothing else needs

    return config.load(path, name=name, tags=tags)
