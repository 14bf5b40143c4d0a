"""What users log with: handles on runs that an adapter opens, and runs of loops of their own.

Guarantees: nothing that is logged raises, whatever it is. It becomes what can be recorded, or is
left out, reported once and counted in the receipt. Only a sink with `on_error: raise` stops a
training. In a distributed training rank 0 logs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import numpy as np

from trainbus import normalize
from trainbus.distributed import current_rank
from trainbus.events import (
    AlertRaised,
    Array,
    ArtifactLogged,
    CheckpointSaved,
    ConfusionMatrixLogged,
    CurveLogged,
    EpochEnded,
    EpochStarted,
    Event,
    ImageLogged,
    RunStarted,
    TableLogged,
    TextLogged,
    ended_by,
)
from trainbus.interfaces import Detach
from trainbus.recording import current
from trainbus.recording.current import UserEmitter
from trainbus.recording.emitter import Emitter
from trainbus.toolkit import plots, splitting


class Run:
    """A handle on a run: what is logged with it joins what the adapter records.

    Values belong to the epoch in progress, or to the last one between two epochs, unless an epoch
    is given. What is logged before the run opens is recorded once it opens. On other ranks than 0
    nothing is recorded.
    """

    def __init__(self, emitter: UserEmitter) -> None:
        self._emitter = emitter
        self._rank: int | None = None

    @property
    def id(self) -> str | None:
        """Id of the run while it is open, else None."""
        return self._emitter.run_id

    @property
    def name(self) -> str | None:
        """Name of the run while it is open, else None."""
        return self._emitter.run_name

    @property
    def links(self) -> dict[str, str]:
        """Where each sink shows the run, for the sinks that are open: name → URL, path or command.

        Sinks open in the background: shortly after the start of the run there may be none.
        """
        return self._emitter.links()

    def log(
        self,
        values: Mapping[str, Any],
        *,
        epoch: int | None = None,
        step: int | None = None,
        phase: str = "train",
        final: bool = False,
    ) -> None:
        """Log values: of one optimizer step if `step` is given, else of the epoch.

        Numbers are metrics. Anything else becomes what it is: a text, a figure or picture, a data
        frame or two-dimensional array (a table), a vector (up to 100 numbers are metrics by their
        index, up to 10,000 a curve, more a histogram). Mappings are flattened: `{"val": {"f1": …}}`
        is `val/f1`. None is no value.

        Args:
            values: name → value. A name without a `/` gets the phase before it: `loss` becomes
                `train/loss`.
            epoch: counts from 0; by default the current epoch.
            step: optimizer updates done.
            phase: `train`, `validation`, `test`, `system`, or a name of your own.
            final: the numbers are an evaluation of the chosen weights after training.
        """
        events, left_out = splitting.split(
            values, phase, epoch=self._at(epoch), step=step, final=final, prefix=f"{phase}/"
        )
        self._emit(*events)
        for each in left_out:
            self._leave_out(each)

    def image(
        self,
        key: str,
        image: Any,
        *,
        caption: str | None = None,
        epoch: int | None = None,
        step: int | None = None,
    ) -> None:
        """Log a picture.

        Args:
            key: name of the picture.
            image: the path of a file, a figure or axes of matplotlib, a picture of Pillow, or an
                array or tensor (H, W), (H, W, C), or (C, H, W) with 1, 3 or 4 channels. Values are
                0…255 or 0…1; floats beyond are scaled from the least to the greatest.
            caption: a line of text below it.
            epoch: counts from 0; by default the current epoch.
            step: optimizer updates done.
        """

        def make() -> Event:
            path = os.fspath(image) if isinstance(image, str | os.PathLike) else None
            return ImageLogged(
                key=normalize.name_of(key),
                path=path,
                array=plots.pixels(image) if path is None else None,
                caption=caption,
                epoch=self._at(epoch),
                step=step,
            )

        self._make(f"image {key!r}", make)

    def curve(
        self,
        key: str,
        x: Any,
        y: Any,
        *,
        classes: Sequence[str] | None = None,
        title: str | None = None,
        x_label: str = "x",
        y_label: str = "y",
        epoch: int | None = None,
    ) -> None:
        """Log curves y (C, N), or one curve (N,), over x (N,), with one name a class."""

        def make() -> Event:
            rows = np.atleast_2d(_numbers(y))
            names = [] if classes is None else _names(classes)
            return CurveLogged(
                key=normalize.name_of(key),
                x=_numbers(x),
                y=rows,
                classes=names or ([key] if len(rows) == 1 else [str(i) for i in range(len(rows))]),
                title=key if title is None else title,
                x_label=x_label,
                y_label=y_label,
                epoch=self._at(epoch),
            )

        self._make(f"curve {key!r}", make)

    def table(
        self,
        key: str,
        columns: Any,
        rows: Iterable[Iterable[Any]] | None = None,
        *,
        epoch: int | None = None,
    ) -> None:
        """Log a table: rows of plain values under named columns.

        Args:
            key: name of the table.
            columns: names of the columns. Without `rows`, the whole table: a data frame of pandas
                or polars, an Arrow table, a two-dimensional array, or a list of mappings.
            rows: one list of cells a row.
            epoch: counts from 0; by default the current epoch.
        """

        def make() -> Event:
            names, cells = _table(columns) if rows is None else (_names(columns), rows)
            found = [list(row) for row in cells]
            return TableLogged(
                key=normalize.name_of(key), columns=names, rows=found, epoch=self._at(epoch)
            )

        self._make(f"table {key!r}", make)

    def confusion_matrix(
        self, key: str, matrix: Any, classes: Sequence[str], *, epoch: int | None = None
    ) -> None:
        """Log counts (C, C): row i, column j is true class i predicted as j."""

        def make() -> Event:
            return ConfusionMatrixLogged(
                key=normalize.name_of(key),
                matrix=_numbers(matrix),
                classes=_names(classes),
                epoch=self._at(epoch),
            )

        self._make(f"confusion matrix {key!r}", make)

    def text(self, key: str, text: str, *, epoch: int | None = None) -> None:
        """Log a piece of text; what is none is written as its plain value."""

        def make() -> Event:
            whole = text if isinstance(text, str) else normalize.name_of(text)
            return TextLogged(key=normalize.name_of(key), text=whole, epoch=self._at(epoch))

        self._make(f"text {key!r}", make)

    def checkpoint(
        self,
        path: str | os.PathLike[str],
        *,
        kind: Literal["best", "last", "periodic"] = "last",
        epoch: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        final: bool = False,
    ) -> None:
        """Log that a checkpoint was written; `final` says that this path won't be written again."""

        def make() -> Event:
            return CheckpointSaved(
                path=os.fspath(path),
                kind=kind,
                epoch=self._at(epoch),
                metrics=normalize.mapping(metrics) or {},
                metadata=normalize.plain_mapping(metadata),
                final=final,
            )

        self._make("checkpoint", make)

    def artifact(
        self,
        name: str,
        *paths: str | os.PathLike[str],
        kind: str = "file",
        aliases: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Log files that are to be kept together under a name."""

        def make() -> Event:
            return ArtifactLogged(
                name=normalize.name_of(name),
                kind=kind,
                paths=[os.fspath(p) for p in paths],
                aliases=_names(aliases),
                metadata=normalize.plain_mapping(metadata),
            )

        self._make(f"artifact {name!r}", make)

    def alert(
        self, title: str, text: str = "", *, level: Literal["info", "warning", "error"] = "info"
    ) -> None:
        """Log something that a person should see now."""
        whole = text if isinstance(text, str) else normalize.name_of(text)
        self._emit(AlertRaised(title=normalize.name_of(title), text=whole, level=level))

    def _make(self, what: str, make: Callable[[], Event]) -> None:
        """Emit the event that is made of what the user gave, if one can be made of it."""
        if self._is_other_rank():
            return
        try:
            event = make()
        except Exception as error:
            self._leave_out(f"{what}: {error}")
        else:
            self._emit(event)

    def _leave_out(self, what: str) -> None:
        if not self._is_other_rank():
            self._emitter.leave_out(what)

    def _is_other_rank(self) -> bool:
        """Return whether another process has the run, which is that of rank 0."""
        if self._rank is None:
            self._rank = current_rank()
        return bool(self._rank)

    def _emit(self, *events: Event) -> None:
        if not self._is_other_rank():
            for event in events:
                self._emitter.log(event)

    def _at(self, epoch: int | None) -> int | None:
        return self._emitter.epoch if epoch is None else epoch


class AttachedRun(Run):
    """The handle that `bus.attach` returns: on the run of one trainer, or on its next one."""

    def __init__(self, emitter: UserEmitter, detach: Detach) -> None:
        super().__init__(emitter)
        self._detach = detach

    def detach(self) -> None:
        """Remove the hooks from the trainer; a second call does nothing."""
        self._detach()


class LoopRun(Run):
    """A run for a training loop of your own, made by `bus.run(…)`.

    In a `with` statement the run ends with the block: finished, or failed or stopped by the
    exception that leaves it, which passes through unchanged. In a notebook, where a training spans
    several cells, `start` and `finish` take its place.
    """

    def __init__(self, emitter: Emitter, started: RunStarted) -> None:
        super().__init__(emitter)
        self._own_emitter = emitter
        self._started = started
        self._unsaid: RunStarted | None = started
        self._epoch: int | None = None
        self._left: EpochEnded | None = None

    def start(self) -> LoopRun:
        """Open the run, and return it; it stays open until `finish` or the end of the bus."""
        self._unsaid, self._left = self._started, None
        self._rank = current_rank()
        self._emit()
        return self

    def finish(self, error: BaseException | None = None) -> None:
        """End the run: as failed or stopped by `error` if one is given, else as finished."""
        if error is not None:
            self._left = None
        if self._rank and error is not None:
            self._own_emitter.failed_on(self._rank, error)
        self._emit(ended_by(error))

    def __enter__(self) -> LoopRun:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.finish(error)

    def epochs(self, count: int, *, start: int = 0) -> Iterator[int]:
        """Yield the epochs `start` to `count` - 1; what is logged meanwhile belongs to them."""
        for epoch in range(start, count):
            self._epoch = epoch
            self._emit(EpochStarted(epoch=epoch))
            begun = time.monotonic()
            try:
                yield epoch
            finally:
                self._epoch = None
                # An exception leaves the loop like `break` does, and only `__exit__` knows which it
                # was: the epoch's end waits for the next event.
                self._left = EpochEnded(
                    epoch=epoch, duration_s=time.monotonic() - begun, outcome="completed"
                )
            self._emit()

    def _leave_out(self, what: str) -> None:
        self._emit()
        super()._leave_out(what)

    def _emit(self, *events: Event) -> None:
        if self._is_other_rank():
            return
        # A run that is used without `with` starts with what is first said of it.
        started, self._unsaid = self._unsaid, None
        left, self._left = self._left, None
        for event in (started, left, *events):
            if event is not None:
                self._own_emitter(event)

    def _at(self, epoch: int | None) -> int | None:
        return self._epoch if epoch is None else epoch


def current_run() -> Run:
    """Return a handle on the run that is open in this process, for code that has no bus.

    If several are open, it is the newest one that this thread started, else the newest of all. If
    none is open, the handle logs to the run that is open when it is used; without one, it drops
    what is logged, and says so once. So the same code works with and without trainbus.
    """
    return Run(current.find() or current.CurrentEmitter())


def _numbers(value: Any) -> Array:
    found = normalize.to_array(value)
    if found is None:
        raise ValueError(f"expected numbers, found {type(value).__qualname__}")
    return found


def _names(values: Any) -> list[str]:
    if isinstance(values, Mapping):  # of indices to names
        values = values.values()
    return [values] if isinstance(values, str) else [normalize.name_of(each) for each in values]


def _table(value: Any) -> tuple[list[str], list[list[Any]]]:
    if (found := splitting.table_of(value)) is not None:
        return found
    if isinstance(value, Mapping):
        columns = [list(column) for column in value.values()]
        return list(map(normalize.name_of, value)), [
            list(row) for row in zip(*columns, strict=True)
        ]
    array = normalize.to_array(value)
    if array is None or array.ndim != 2:
        raise ValueError("expected columns and rows, a data frame or a two-dimensional array")
    return [str(index) for index in range(array.shape[1])], array.tolist()
