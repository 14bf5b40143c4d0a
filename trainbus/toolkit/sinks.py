"""What sinks have in common: a base class, de-duplication, names, axes, folders, plain values."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import numpy as np
from msgspec import Meta

from trainbus.errors import MissingPackageError, SinkError
from trainbus.events import (
    ArtifactLogged,
    CheckpointSaved,
    MetricsLogged,
    ModelDescribed,
    Record,
    RunEnded,
)
from trainbus.interfaces import RunInfo, Sink
from trainbus.journal.directory import write_atomically

Position = tuple[int, int]
"""Attempt and seq of a record."""

Positions = dict[str, Position]
"""Position of the last record of each source, such as `console-r0`."""

MAIN = ""
"""Source of the records of the training itself."""

NO_POSITION: Position = (0, 0)
"""Position before the first record."""

Wanted = Literal["best", "last", "all", "none"]
"""Which checkpoints a sink stores; `best` stores the last one until one is named best."""

SaveCheckpoints = Annotated[
    Wanted,
    Meta(
        description="Which checkpoints to store; `best` stores the last one if the training names "
        "no best one"
    ),
]
"""Type of the option `save_checkpoints`."""


class TrackerSink(Sink):
    """Base of sinks that feed a tracker: location, wanted checkpoints, and a count of losses.

    A subclass sets `_location` in `open`, after `super().open(run)`.
    """

    tracker: ClassVar[str]
    """Name of the tracker in log lines."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._location: str | None = None

    def open(self, run: RunInfo) -> None:
        """Reset the count of losses and the location."""
        self.lost, self._location = 0, None

    @property
    def location(self) -> str | None:
        """Where a person finds the run: an address, a path, or a command; None before `open`."""
        return self._location

    def wants_files(self, event: CheckpointSaved | ArtifactLogged) -> bool:
        """Return whether the files of an event are stored, by the option `save_checkpoints`."""
        return is_wanted(getattr(self.options, "save_checkpoints", "none"), event)

    def lose(self, name: str, reason: object, verb: str = "stored") -> None:
        """Count a record, or a file of one, that the tracker can't take, and log why."""
        self.lost += 1
        logger = logging.getLogger(type(self).__module__)
        logger.warning("%r can't be %s in %s: %s", name, verb, self.tracker, reason)

    @contextmanager
    def showing(self, name: str) -> Iterator[None]:
        """Lose a picture, chart or table whose content can't be built in this context.

        Missing files and packages and invalid values are caught, so that one picture never blocks
        the records after it.
        """
        try:
            yield
        except (ImportError, MissingPackageError, OSError, TypeError, ValueError) as error:
            self.lose(name, error, "shown")

    def lose_superseded(self, superseded: Superseded) -> None:
        """Count the checkpoints that were gone and that no newer one replaced."""
        for event in superseded.lost():
            self.lose(f"checkpoint {event.kind}", f"no file at {event.path}")


@contextmanager
def required_package(name: str, *, extra: str | None = None) -> Iterator[None]:
    """Turn the ImportError of imports in this context into one that names the extra to install.

    Args:
        name: the package.
        extra: extra of trainbus that installs it; by default its own name.

    Raises:
        MissingPackageError: an import fails.
    """
    try:
        yield
    except ImportError as error:
        raise MissingPackageError(name, extra=extra or name) from error


def check_package(name: str, *, extra: str | None = None) -> None:
    """Make sure that a package is installed, without importing it.

    Raises:
        MissingPackageError: it is not.
    """
    if find_spec(name) is None:
        raise MissingPackageError(name, extra=extra or name)


@contextmanager
def writing_to(path: Path, *, option: str = "dir") -> Iterator[None]:
    """Turn an OSError in this context into a SinkError that names the option to change.

    Raises:
        SinkError: `path` can't be written.
    """
    try:
        yield
    except OSError as error:
        text = f"can't write {path}: {error.strerror or error}; set another `{option}`"
        raise SinkError(text) from error


def make_folder(path: Path, *, option: str = "dir") -> Path:
    """Create a folder with its parents, unless it exists, and return it.

    Raises:
        SinkError: it can't be created; the text names the option to change.
    """
    with writing_to(path, option=option):
        path.mkdir(parents=True, exist_ok=True)
    return path


def append(fd: int, data: bytes, path: Path) -> None:
    """Append data to a file that was opened with `O_APPEND`: all of it, or nothing.

    Raises:
        OSError: the disk is full or gone.
    """
    written = os.write(fd, data)
    if written < len(data):  # a full disk writes short, without an error
        os.ftruncate(fd, os.fstat(fd).st_size - written)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


class SeenRecords:
    """The records that a store has: those that come again after a crash or in a replay are skipped.

    Each stream of a run is numbered on its own, so the last position of each is known. For stores
    that can't be asked, the positions are kept in a file beside them.
    """

    def __init__(
        self, path: Path | None = None, last: Mapping[str, Position] | None = None
    ) -> None:
        """Begin at the positions of the store.

        Args:
            path: file that keeps the positions; None where the store itself can be asked.
            last: position of the last record of each source that the store has.
        """
        self._path = path
        self.last: Positions = {MAIN: NO_POSITION}
        """Position of the last record of each source that the store has."""
        for positions in (last or {}, _read(path)):
            for source, position in positions.items():
                self.last[source] = max(self.last.get(source, NO_POSITION), position)

    def has(self, record: Record) -> bool:
        """Return whether the record is in the store."""
        return record.position <= self.last.get(record.source, NO_POSITION)

    def add(self, record: Record) -> None:
        """Note that the record is in the store."""
        self.last[record.source] = record.position

    def new(self, records: Sequence[Record]) -> Iterator[Record]:
        """Yield the records that are not in the store, each once.

        A record counts as stored when the next one is requested: a record whose storing raises
        is yielded again by the next call.
        """
        for record in records:
            if not self.has(record):
                yield record
                self.add(record)

    def save(self) -> None:
        """Save the positions, after the store has everything up to them.

        Raises:
            OSError: the file can't be written.
        """
        if self._path is not None:
            streams = {source: at for source, at in self.last.items() if source != MAIN}
            data = [*self.last[MAIN], *([streams] if streams else [])]
            write_atomically(self._path, json.dumps(data).encode())


def _read(path: Path | None) -> Positions:
    try:
        attempt, seq, *rest = json.loads(path.read_bytes()) if path is not None else (0, 0)
        streams = rest[0] if rest else {}
        return {MAIN: (int(attempt), int(seq)), **positions_of(streams)}
    except (OSError, ValueError, TypeError, OverflowError, RecursionError):
        return {}


def positions_of(found: Any) -> Positions:
    """Return positions that were read from JSON: lists of attempt and seq by their source.

    Raises:
        TypeError, ValueError, OverflowError: it has another form.
    """
    return {str(source): (int(attempt), int(seq)) for source, (attempt, seq) in dict(found).items()}


_MOST_NAMES = 10_000


class Names:
    """Names as a tracker accepts them; different names stay different.

    Args:
        clean: returns a name without anything that the tracker rejects.
        longest: maximum length in characters.
    """

    def __init__(self, clean: Callable[[str], str], longest: int = 250) -> None:
        self._clean = clean
        self._longest = longest
        self._given: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        """Return the name for the tracker; it is the same every time, in every process."""
        if name not in self._given:
            if len(self._given) >= _MOST_NAMES:
                self._given.clear()  # they are computed again
            found = self._clean(name)
            if found != name or len(found) > self._longest or not found:
                mark = hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:6]
                found = f"{found[: self._longest - 7]}_{mark}"
            self._given[name] = found
        return self._given[name]


def is_wanted(
    wanted: Wanted, event: CheckpointSaved | ArtifactLogged, *, has_best: bool = False
) -> bool:
    """Return whether the files of an event may be stored; those of an artifact always are.

    Args:
        wanted: the option `save_checkpoints`.
        event: the event.
        has_best: whether a best checkpoint is stored, so that the last one need not replace it.
    """
    if isinstance(event, ArtifactLogged) or wanted in ("all", event.kind):
        return True
    return wanted == "best" and event.kind == "last" and not has_best


class LatestCheckpoints:
    """Checkpoints that the trainer overwrites, so that only their files' final state counts.

    For stores that can't replace a file.
    """

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._newest: dict[str, CheckpointSaved] = {}

    def put_off(self, event: CheckpointSaved) -> bool:
        """Return whether to store nothing now: the checkpoint may be one of `at_end`."""
        if event.kind != "periodic":
            self._newest[event.kind] = event
        return event.kind != "periodic" or not is_wanted(self._wanted, event)

    def at_end(self) -> list[CheckpointSaved]:
        """Return the checkpoints to store when the training is over, the best one last."""
        kinds = [kind for kind in ("last", "best") if self._wanted in ("all", kind)]
        found = [self._newest[kind] for kind in kinds if kind in self._newest]
        return found or [event for event in self._newest.values() if self._wanted == "best"]


class Superseded:
    """Checkpoints whose files were replaced by newer ones before they could be stored.

    For stores that take each checkpoint as it comes. Such a file is lost only if no newer one of
    its kind is stored.
    """

    def __init__(self) -> None:
        self._gone: dict[str, CheckpointSaved] = {}

    def missed(self, event: CheckpointSaved) -> None:
        """Note that the file of an event no longer exists."""
        self._gone[event.kind] = event

    def stored(self, *kinds: str) -> None:
        """Note that newer checkpoints of these kinds are stored."""
        for kind in kinds:
            self._gone.pop(kind, None)

    def lost(self) -> list[CheckpointSaved]:
        """Return the checkpoints that nothing replaced, each once."""
        found, self._gone = [*self._gone.values()], {}
        return found


def model_values(event: ModelDescribed) -> dict[str, float]:
    """Return the numbers that describe a model, under the names of Ultralytics' W&B callback."""
    known = {
        "model/parameters": event.parameters,
        "model/gradients": event.gradients,
        "model/layers": event.layers,
        "model/GFLOPs": event.gflops,
        **{f"model/speed_{name}(ms)": value for name, value in event.speed_ms.items()},
        **{f"model/{name}": value for name, value in event.extra.items()},
    }
    return {name: value for name, value in known.items() if value is not None}


def best_values(event: RunEnded) -> dict[str, float]:
    """Return the best value of a run as `best/<metric>`, and its epoch from 1 as `best/epoch`."""
    if event.best is None:
        return {}
    epoch = {} if event.best.epoch is None else {"best/epoch": event.best.epoch + 1}
    return {f"best/{event.best.metric}": event.best.value, **epoch}


def set_fields(event: Any, *names: str) -> dict[str, Any]:
    """Return the fields of an event that are set, as plain values: all of them, or those named.

    None and what is empty count as not set.
    """
    fields = {name: getattr(event, name) for name in names or event.__struct_fields__}
    found = {
        name: set_fields(value) if isinstance(value, msgspec.Struct) else value
        for name, value in fields.items()
    }
    return {name: v for name, v in found.items() if v is not None and v not in ("", [], {})}


def folder_of(template: str, run: str) -> Path:
    """Return the path that an option names, with the run's id in place of `{run}`."""
    return Path(template.replace("{run}", run)).expanduser().absolute()


def side_by_side(paths: Sequence[str]) -> dict[str, str]:
    """Return for each path a file name that is unique among them.

    Files of the same name keep their folders below the one that they have in common.
    """
    files = [os.path.abspath(path) for path in paths]
    names = [os.path.basename(file) for file in files]
    if len(set(names)) < len(set(files)):
        common = os.path.commonpath([os.path.dirname(file) for file in files])
        names = [os.path.relpath(file, common) for file in files]
    return dict(zip(paths, names, strict=True))


def check_folder(path: str | Path) -> str:
    """Make sure that files can be written in a folder or below it, and return a line saying so.

    Raises:
        SinkError: they can't.
    """
    wanted = Path(str(path).partition("{run}")[0] or ".").expanduser().absolute()
    existing = next(p for p in (wanted, *wanted.parents) if p.exists())
    try:
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryFile(dir=existing):
            return f"{wanted} can be written"
    except OSError as error:
        text = f"can't write below {existing}: {error.strerror}; set another folder"
        raise SinkError(text) from error


def interrupt_training(run: RunInfo) -> bool:
    """Interrupt the training process as Ctrl-C does, for a tracker in which a run can be stopped.

    Returns:
        Whether it was interrupted: False if the sink runs in the training process, or if that
        process has ended.
    """
    if run.pid is None or os.getppid() != run.pid:
        return False
    os.kill(run.pid, signal.SIGINT)
    return True


def epochs_done(epoch: int | None) -> int | None:
    """Return an epoch counted from 1, as trackers show it; None stays None."""
    return None if epoch is None else epoch + 1


def x_position(event: Any) -> int:
    """Return the position of an event on the x axis: its step, else the epochs done, else 0."""
    if event.step is not None:
        return int(event.step)
    return 0 if event.epoch is None else int(event.epoch) + 1


class Timeline:
    """Positions of a run's events on the only x axis of a tracker.

    An event with neither step nor epoch, such as a summary of the training, has the position of
    the last metric.
    """

    def __init__(self, last: int = 0) -> None:
        """Begin at the position of the store.

        Args:
            last: position of the last metric that the store has.
        """
        self.last = last

    def __call__(self, event: Any) -> int:
        """Return the position of an event: its step, else the epochs done, else the last one."""
        if event.step is None and event.epoch is None:
            return self.last
        at = x_position(event)
        if isinstance(event, MetricsLogged) and not event.final:
            self.last = at
        return at


def metric_name(name: str, *, final: bool) -> str:
    """Return the name of a metric; values of the final evaluation get the prefix `final/`."""
    return f"final/{name}" if final else name


def flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested parameters with dotted names: `{"a": {"b": 1}}` as `{"a.b": 1}`."""
    found: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def utf8(text: str) -> str:
    """Return a string that can be encoded as UTF-8; lone surrogates are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def to_json(value: Any, *, largest: int = 2**63) -> Any:
    """Return a value that JSON can represent.

    NaN and ±Inf become the strings `NaN`, `Infinity` and `-Infinity`; integers of `largest` or
    more in magnitude become strings; arrays, tuples and sets become lists; keys and values of
    other types become strings.
    """
    match value:
        case Mapping():
            return {utf8(str(k)): to_json(v, largest=largest) for k, v in value.items()}
        case list() | tuple() | set() | frozenset():
            return [to_json(item, largest=largest) for item in value]
        case np.ndarray() | np.generic() if not isinstance(inner := value.tolist(), np.generic):
            return to_json(inner, largest=largest)
        case None | bool():
            return value
        case int():
            return value if abs(value) < largest else str(value)
        case float() if math.isfinite(value):
            return value
        case float():
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        case _:
            return utf8(str(value))
