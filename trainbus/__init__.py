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
from trainbus.run import Run

if TYPE_CHECKING:
    import os

__version__ = _version("trainbus")

__all__ = [
    "Adapter",
    "AttachError",
    "Bus",
    "ConfigError",
    "Detach",
    "Emit",
    "Event",
    "FilePath",
    "JournalError",
    "JournalSpec",
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
    "load",
]


def load(path: str | os.PathLike[str]) -> Bus:
    """Return a bus with the sinks that a YAML file configures.

    Raises:
        ConfigError: the file can't be read or is not valid; the error lists every problem in it.
    """
    from trainbus import config  # imports yaml, which nothing else needs

    return config.load(path)
