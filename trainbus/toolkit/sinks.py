"""What sinks have in common: what is new, where it stands on an axis, and what it may be called."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from trainbus.errors import SinkError
from trainbus.events import (
    ArtifactLogged,
    CheckpointSaved,
    MetricsLogged,
    ModelDescribed,
    Record,
)
from trainbus.interfaces import RunInfo
from trainbus.journal.directory import write_atomically

Position = tuple[int, int]


class SeenRecords:
    """Which records a store has: what comes again, after a crash or in a replay, is left out.

    For stores that can't be asked: the position of the last record is kept in a file beside them.
    """

    def __init__(self, path: Path | None = None, last: Position = (0, 0)) -> None:
        """Begin where the store is.

        Args:
            path: file that keeps the position; None where the store itself can be asked.
            last: attempt and seq of the last record that the store has.
        """
        self._path = path
        self.last = max(last, _read(path))

    def new(self, records: Sequence[Record]) -> Iterator[Record]:
        """Yield the records that are not in the store, each once.

        A record counts as taken when the next one is asked for: one that could not be stored comes
        again.
        """
        for record in records:
            if record.position > self.last:
                yield record
                self.last = record.position

    def save(self) -> None:
        """Keep the position, after the store has everything up to it.

        Raises:
            OSError: the file can't be written.
        """
        if self._path is not None:
            write_atomically(self._path, json.dumps(self.last).encode())


def _read(path: Path | None) -> Position:
    try:
        attempt, seq = json.loads(path.read_bytes()) if path is not None else (0, 0)
        return int(attempt), int(seq)
    except (OSError, ValueError, TypeError, OverflowError, RecursionError):
        return 0, 0


_MOST_NAMES = 10_000


class Names:
    """Names as a tracker allows them; two that differ stay two.

    Args:
        clean: returns a name with nothing in it that the tracker refuses.
        longest: characters that it takes.
    """

    def __init__(self, clean: Callable[[str], str], longest: int = 250) -> None:
        self._clean = clean
        self._longest = longest
        self._given: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        """Return the name that the tracker gets; the same one every time, in every process."""
        if name not in self._given:
            if len(self._given) >= _MOST_NAMES:
                self._given.clear()  # they are found again
            found = self._clean(name)
            if found != name or len(found) > self._longest or not found:
                mark = hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:6]
                found = f"{found[: self._longest - 7]}_{mark}"
            self._given[name] = found
        return self._given[name]


Wanted = Literal["best", "last", "all", "none"]
"""Which checkpoints a sink keeps; `best` keeps the last one as long as none is named best."""


def is_wanted(wanted: Wanted, event: CheckpointSaved | ArtifactLogged) -> bool:
    """Return whether the files of an event may be kept; those of an artifact are."""
    if isinstance(event, ArtifactLogged) or wanted in ("all", event.kind):
        return True
    return wanted == "best" and event.kind == "last"


class LatestCheckpoints:
    """Checkpoints of which only the files' state at the end counts: the trainer overwrites them.

    For stores that can't replace what they have.
    """

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._newest: dict[str, CheckpointSaved] = {}

    def put_off(self, event: CheckpointSaved) -> bool:
        """Return whether there is nothing to store of it now: it may be one of `at_end`."""
        if event.kind != "periodic":
            self._newest[event.kind] = event
        return event.kind != "periodic" or not is_wanted(self._wanted, event)

    def at_end(self) -> list[CheckpointSaved]:
        """Return those to store when the training is over, the best as the last of them."""
        kinds = [kind for kind in ("last", "best") if self._wanted in ("all", kind)]
        found = [self._newest[kind] for kind in kinds if kind in self._newest]
        return found or [event for event in self._newest.values() if self._wanted == "best"]


class Superseded:
    """Checkpoints that were gone before they could be stored, because a newer one took their place.

    For stores that take each one when it comes. Such a file is lost only if no newer one of its
    kind is stored.
    """

    def __init__(self) -> None:
        self._gone: dict[str, CheckpointSaved] = {}

    def missed(self, event: CheckpointSaved) -> None:
        """Note that the file of an event is not there any more."""
        self._gone[event.kind] = event

    def stored(self, *kinds: str) -> None:
        """Note that a newer one of these kinds is stored."""
        for kind in kinds:
            self._gone.pop(kind, None)

    def lost(self) -> list[CheckpointSaved]:
        """Return those that nothing took the place of, each once."""
        found, self._gone = [*self._gone.values()], {}
        return found


def model_values(event: ModelDescribed) -> dict[str, float]:
    """Return what is known of a model, by the names that Ultralytics' users know from W&B."""
    known = {
        "model/parameters": event.parameters,
        "model/gradients": event.gradients,
        "model/layers": event.layers,
        "model/GFLOPs": event.gflops,
        **{f"model/speed_{name}(ms)": value for name, value in event.speed_ms.items()},
        **{f"model/{name}": value for name, value in event.extra.items()},
    }
    return {name: value for name, value in known.items() if value is not None}


def folder_of(template: str, run: str) -> Path:
    """Return the folder that an option names, in which `{run}` stands for the run's id."""
    return Path(template.replace("{run}", run)).expanduser().absolute()


def side_by_side(paths: Sequence[str]) -> dict[str, str]:
    """Return for each path the name that its file gets beside the others: two never have one.

    Files of the same name keep their folders below the one that they have in common.
    """
    files = [os.path.abspath(path) for path in paths]
    names = [os.path.basename(file) for file in files]
    if len(set(names)) < len(set(files)):
        common = os.path.commonpath([os.path.dirname(file) for file in files])
        names = [os.path.relpath(file, common) for file in files]
    return dict(zip(paths, names, strict=True))


def check_folder(path: str | Path) -> str:
    """Return a folder as text, after making sure that files can be written there or below it.

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
        Whether there is a training process: not where the sink runs in it, and not after its end.
    """
    if run.pid is None or os.getppid() != run.pid:
        return False
    os.kill(run.pid, signal.SIGINT)
    return True


def x_position(event: Any) -> int:
    """Return where an event says that it stands: at its step, else the epochs done, else 0."""
    if event.step is not None:
        return int(event.step)
    return 0 if event.epoch is None else int(event.epoch) + 1


class Timeline:
    """Where the events of a run stand on the one axis that a tracker has.

    What has neither step nor epoch, as what sums a training up, stands where the last metric did.
    """

    def __init__(self, last: int = 0) -> None:
        """Begin where the store is.

        Args:
            last: where the last metric stands that the store has.
        """
        self.last = last

    def __call__(self, event: Any) -> int:
        """Return where an event stands: at its step, else at the epochs done, else at the last."""
        if event.step is None and event.epoch is None:
            return self.last
        at = x_position(event)
        if isinstance(event, MetricsLogged) and not event.final:
            self.last = at
        return at


def metric_name(name: str, *, final: bool) -> str:
    """Return a metric's name; what was measured of the chosen weights at the end is set apart."""
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
