"""The plugin contract: the interfaces of sinks and adapters, and the objects they receive.

A sink is a class with one required method, `write`. An adapter is a function,
`attach(target, emit) -> detach`. Both are registered as entry points: `trainbus.sinks` (named
after the YAML `type`) and `trainbus.adapters` (named after the framework's import name).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Annotated, Any, ClassVar, Protocol, TypeAlias

import msgspec
from msgspec import Meta

from trainbus.events import ArtifactLogged, CheckpointSaved, Event, Record, RunStarted


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class of a sink's options: each field is a YAML key; unknown keys and types are errors.

    Describe a field with `Annotated[str, msgspec.Meta(description="…")]`; the JSON Schema shows it.
    `Meta(pattern=…, extra={"expected": "…"})` validates a service's naming rule.
    """


FilePath: TypeAlias = Annotated[str, Meta(extra={"path": True})]
"""Type of an option that is a path: the sink always receives an absolute path.

A relative path is resolved against the folder of the configuration file, or, for a bus created in
code, against the working directory at that time; `~` is the home folder. A URI is left unchanged.
Describe it like any other field: `Annotated[FilePath, msgspec.Meta(description="…")]`.
"""


class RunInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The run that a sink is opened for; `attempt` counts the trainings of the run from 1."""

    id: str
    started: RunStarted
    attempt: int = 1
    reopened: bool = False
    """Whether an earlier process already delivered records of this attempt."""
    resume_after: int = 0
    """Seq of the last record of the main stream that is not delivered again."""
    pid: int | None = None
    """Id of the training process; None if the sink runs in it."""
    base: str | None = None
    """Folder for files whose location no option sets; None for the working directory."""

    @property
    def resumed(self) -> bool:
        """Whether this run continues an earlier training."""
        return self.attempt > 1


class Sink(ABC):
    """Sends the records of a run to one destination.

    A sink is opened once per run, before the first record, and closed after the last; `close` may
    also be called without `open`, and more than once. Records of a stream arrive in order, in
    batches of any size, and a record may arrive again after a crash: neither may change the stored
    result (`record.source` and `record.position` identify repeated records). `open` and `write`
    may run in different threads, but never at the same time. Exceptions of a sink are caught,
    counted and logged; training continues.
    """

    Options: ClassVar[type[Options]] = Options
    """Class of the sink's options; the constructor takes one instance of it."""

    service: ClassVar[str | None] = None
    """Import name of the tracker, used to turn off a framework's own logger for it."""

    packages: ClassVar[tuple[str, ...]] = ()
    """Import names of other required packages, besides `service`."""

    durable_only_after_close: ClassVar[bool] = False
    """Whether records are stored durably only after `close`: after a crash, a new sink receives the
    whole attempt again, and must skip what is already stored."""

    reads_files: ClassVar[bool] = True
    """Whether the sink opens files named in records. If so, paths point to copies made when the
    files were logged; a file that has no copy and has changed since gets a path that does not
    exist. Otherwise paths are those that the trainer wrote to."""

    shares_process: ClassVar[bool] = True
    """Whether two sinks of this type can be open in one process at the same time. If not, each run
    that is open at the same time gets its own process."""

    lost: int = 0
    """Records of this run that the tracker can't show; `open` resets it to 0."""

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options

    def check(self) -> str | None:
        """Check what `open` needs, without starting a run: package, login, address, permissions.

        Returns:
            The result, in a few words; None if there is nothing to check.

        Raises:
            TrainbusError: `open` would fail; the message says what to do.
        """
        return None

    def open(self, run: RunInfo) -> None:  # noqa: B027
        """Prepare to receive the records of `run`; import heavy packages here, not at the top."""

    @abstractmethod
    def write(self, records: Sequence[Record]) -> None:
        """Store the records; `match record.event` on the event classes and ignore all others."""

    def flush(self) -> None:  # noqa: B027
        """Send everything that is still buffered."""

    def close(self) -> None:  # noqa: B027
        """Release all resources; no more records of this run follow."""

    def upload(self, records: Sequence[Record]) -> None:
        """Upload checkpoints and artifacts in a separate thread, in parallel with `write`.

        Only sinks with slow uploads need this; otherwise `write` receives these records.
        """
        raise NotImplementedError

    def wants_files(self, event: CheckpointSaved | ArtifactLogged) -> bool:
        """Return whether this sink sends the files of an event; if so, the journal keeps a copy.

        A checkpoint that the trainer overwrites before it is sent is skipped.
        """
        return False

    @property
    def in_process(self) -> bool:
        """Whether the sink must run in the training process, because it uses state of it."""
        return False

    @property
    def location(self) -> str | None:
        """Where to find the stored run: a path, a URL, or a command."""
        return None


class Emit(Protocol):
    """The handle with which an adapter emits events.

    It never raises into training, unless a sink is configured with `on_error: raise`. It can be
    pickled and deep-copied, as frameworks do with callbacks.
    """

    def __call__(self, event: Event, /) -> None:
        """Emit an event."""

    @property
    def services(self) -> frozenset[str]:
        """Import names of the trackers that this bus feeds."""

    @property
    def run_id(self) -> str | None:
        """Id of the open run, None if no run is open."""

    def every(self, phase: str) -> int | None:
        """Return the smallest step interval that a sink requests for a phase, None if none does."""

    def failed_on(self, rank: int, error: BaseException) -> None:
        """Record the error that ended another rank of a distributed training.

        Rank 0 only sees a lost connection; with this, its run ends with the actual cause.
        """

    def leave_out(self, what: str) -> None:
        """Warn once that something can't be recorded, and count it in the receipt."""


Detach: TypeAlias = Callable[[], None]
"""Removes an adapter's hooks from the framework; a second call does nothing."""

Adapter: TypeAlias = Callable[[Any, Emit], Detach]
"""`attach(target, emit) -> detach`: register hooks with a framework's object that emit events."""

Hook: TypeAlias = Callable[[ModuleType, Callable[[object], object]], None]
"""`hook(module, attach)`: make the framework call `attach` with every trainer it creates.

`trainbus run` calls it once the module that it is registered for has been imported.
"""
