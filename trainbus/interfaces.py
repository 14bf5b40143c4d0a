"""The whole plugin contract: what a sink is, what an adapter is, and what each is given.

A sink is a class with one method that matters, `write`. An adapter is a function,
`attach(target, emit) -> detach`. Both are found by their entry points, `trainbus.sinks` (the YAML
`type`) and `trainbus.adapters` (the import name of the framework).
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
    """Base of a sink's options: each field is a YAML key; unknown keys and wrong types are errors.

    Describe a field with `Annotated[str, msgspec.Meta(description="…")]`; the JSON Schema shows it.
    `Meta(pattern=…, extra={"expected": "…"})` puts a service's naming rule into validation.
    """


FilePath: TypeAlias = Annotated[str, Meta(extra={"path": True})]
"""Type of an option that is a path: the sink gets an absolute one, whatever the file says.

A relative path is relative to the folder of the configuration file, or, for a bus that is made in
code, to the working directory at that time; `~` is the home folder. A URI stays as it is. Describe
it as any field: `Annotated[FilePath, msgspec.Meta(description="…")]`.
"""


class RunInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The run that a sink is opened for; `attempt` counts its trainings from 1."""

    id: str
    started: RunStarted
    attempt: int = 1
    reopened: bool = False
    """Whether an earlier process delivered records of this attempt."""
    resume_after: int = 0
    """Seq of the last record that need not come again."""
    pid: int | None = None
    """The training process, None where it is the sink's own."""
    base: str | None = None
    """Folder for what a sink writes where no option says so; None for the working directory."""

    @property
    def resumed(self) -> bool:
        """Whether an earlier training had the same id."""
        return self.attempt > 1


class Sink(ABC):
    """Takes the records of one run to one place.

    A sink is opened once a run, before its first record, and closed after its last; `close` also
    comes when nothing was opened, and may come twice. Records arrive in order, cut into batches at
    any point, and the same record may come again after a crash: what is stored must depend on
    neither (`record.position` tells a record that came before). `open` and `write` may run in
    different threads, never at the same time. Whatever a sink raises is caught, counted and
    reported; training goes on.
    """

    Options: ClassVar[type[Options]] = Options
    """The class of the sink's options; an instance of it is the constructor's only argument."""

    service: ClassVar[str | None] = None
    """Import name of the tracker, so that a framework's own logger for it can be switched off."""

    packages: ClassVar[tuple[str, ...]] = ()
    """Import names of further packages that it can't do without, besides `service`."""

    durable_only_after_close: ClassVar[bool] = False
    """Whether what was taken is safe only after `close`: after a crash the whole attempt comes
    again, to a new sink, which must leave out what is stored already."""

    reads_files: ClassVar[bool] = True
    """Whether files that records name are opened: their paths are then those of copies, which are
    as the files were when they were logged, and where a file without a copy has changed since, a
    path at which nothing is; else the paths are those that the trainer wrote to."""

    shares_process: ClassVar[bool] = True
    """Whether sinks of this type can be open for two runs at once in one process; else a second
    run that is open at the same time has a process of its own."""

    lost: int = 0
    """Records of this run that were taken but can't be shown; `open` sets it back to 0."""

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options

    def check(self) -> str | None:
        """Try what `open` needs, without starting a run: package, login, address, rights.

        Returns:
            What was found, in a few words; None where there is nothing to try.

        Raises:
            TrainbusError: `open` would fail; the text says what to do.
        """
        return None

    def open(self, run: RunInfo) -> None:  # noqa: B027
        """Prepare to take the records of `run`; import heavy packages here, not at the top."""

    @abstractmethod
    def write(self, records: Sequence[Record]) -> None:
        """Take the records; `match record.event` on the event classes and ignore the others."""

    def flush(self) -> None:  # noqa: B027
        """Hand on everything that was taken so far."""

    def close(self) -> None:  # noqa: B027
        """Let go of everything; the records of this run are over."""

    def upload(self, records: Sequence[Record]) -> None:
        """Take checkpoints and artifacts in a thread of their own, beside `write`.

        Only a sink whose uploads take long need have this: without it such records come to `write`.
        """
        raise NotImplementedError

    def wants_files(self, event: CheckpointSaved | ArtifactLogged) -> bool:
        """Return whether the files of an event are sent: a copy of them is kept until then.

        A checkpoint of these that the trainer has overwritten before it is sent does not come.
        """
        return False

    @property
    def in_process(self) -> bool:
        """Whether the sink must live in the training process, of which it uses something."""
        return False

    @property
    def location(self) -> str | None:
        """Where a person finds what arrived: a path, an address, or a command."""
        return None


class Emit(Protocol):
    """What an adapter is given: called with an event, it hands the event to the bus.

    It never raises into training, unless a sink is configured with `on_error: raise`. It may be
    pickled and deep-copied, as frameworks do with callbacks.
    """

    def __call__(self, event: Event, /) -> None:
        """Hand an event to the bus."""

    @property
    def services(self) -> frozenset[str]:
        """Import names of the trackers that this bus feeds."""

    @property
    def run_id(self) -> str | None:
        """Id of the run that is open, None when none is."""

    def every(self, phase: str) -> int | None:
        """Return the interval in steps at which a sink asks for step values, None if none does."""

    def failed_on(self, rank: int, error: BaseException) -> None:
        """Tell what ended a process of a distributed training whose run rank 0 has.

        Rank 0 only sees its connection break; its run ends with what is told here.
        """

    def leave_out(self, what: str) -> None:
        """Say once what can't be recorded and what to do, and count it in the receipt."""


Detach: TypeAlias = Callable[[], None]
"""Takes an adapter's hooks out of the framework again; calling it twice does nothing more."""

Adapter: TypeAlias = Callable[[Any, Emit], Detach]
"""`attach(target, emit) -> detach`: hang hooks into a framework's object that emit events."""

Hook: TypeAlias = Callable[[ModuleType, Callable[[object], object]], None]
"""`hook(module, attach)`: have the framework call `attach` with every trainer that it makes.

It is called under `trainbus run`, once the module it is registered for was imported.
"""
