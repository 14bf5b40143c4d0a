"""Takes the records of one run to its sinks, and accounts for every one of them.

Sinks run inline here: they are called inside `emit`, each guarded, so that one that fails neither
stops training nor keeps a record from the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal

import msgspec

from trainbus.errors import SinkError, TrainbusError
from trainbus.events import Record, RunEnded, UnknownEvent
from trainbus.interfaces import RunInfo, Sink
from trainbus.transforms import Transform, TransformSpec

logger = logging.getLogger("trainbus")

_FAILURES_TO_OPEN = 5


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One sink as configured: how to make it, and what is done to records on the way to it."""

    name: str
    make: Callable[[], Sink]
    kind: str
    service: str | None = None
    transforms: TransformSpec = TransformSpec()
    on_error: Literal["warn", "raise"] = "warn"


class SinkReport(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one run's records in one sink: taken + failed + skipped = emitted."""

    name: str
    kind: str
    taken: int = 0
    failed: int = 0
    skipped: int = 0
    lost: int = 0
    """Of what was taken: records that the tracker has no way to show, such as a broken picture."""
    where: str | None = None
    error: str | None = None


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What each sink got of one run."""

    run: str
    status: str
    emitted: int
    sinks: list[SinkReport]
    dropped: int = 0
    """What was emitted and is no event of the schema."""

    def __str__(self) -> str:
        """Return the receipt as the lines that a person reads at the end of a training."""
        lines = [f"trainbus: run {self.run} {self.status}, {self.emitted} records"]
        if self.dropped:
            lines[0] += f", {self.dropped} DROPPED as no events"
        width = max((len(s.name) for s in self.sinks), default=0)
        for sink in self.sinks:
            counts = f"{sink.taken} taken"
            if sink.skipped:
                counts += f", {sink.skipped} filtered out"
            if sink.lost:
                counts += f", {sink.lost} of them can't be shown there"
            if sink.failed:
                counts += f", {sink.failed} FAILED"
            lines.append(f"  {sink.name:<{width}}  {sink.kind}: {counts}")
            if sink.error:
                lines.append(f"  {'':<{width}}  {sink.error}")
            if sink.where:
                lines.append(f"  {'':<{width}}  {sink.where}")
        return "\n".join(lines)


class Delivery:
    """The way of one run's records to all its sinks."""

    def __init__(self, routes: Sequence[Route], run: RunInfo) -> None:
        """Open each sink for the run.

        Raises:
            SinkError: a sink with `on_error: raise` could not be opened.
        """
        self._run = run
        self._emitted = 0
        self.dropped = 0
        self._status = "open"
        self._lines = [_Line(route, run) for route in routes]
        for index, line in enumerate(self._lines):
            try:
                line.open()
            except BaseException:
                for opened in self._lines[:index]:
                    opened.close()
                raise

    def put(self, record: Record) -> None:
        """Take one record to every sink, even if Ctrl-C comes in one of them."""
        self._emitted += 1
        if isinstance(record.event, RunEnded):
            self._status = record.event.status
        for line in self._lines:
            line.put(record)
        self.raise_interrupt()

    def raise_interrupt(self) -> None:
        """Raise the Ctrl-C that came in a sink, if one did; every sink has had its turn by then."""
        for line in self._lines:
            interrupt, line.interrupt = line.interrupt, None
            if interrupt is not None:
                raise interrupt

    def close(self) -> Receipt:
        """Flush and close every sink, and return what became of the run's records."""
        return Receipt(
            run=self._run.id,
            status=self._status,
            emitted=self._emitted,
            sinks=[line.close() for line in self._lines],
            dropped=self.dropped,
        )


class _Line:
    """One sink of one run: guarded calls, counts, and an end of calls after repeated failure."""

    def __init__(self, route: Route, run: RunInfo) -> None:
        self._route = route
        self._run = run
        self._sink: Sink | None = None
        self._where: str | None = None
        self._lost = 0
        self._transform = Transform(route.transforms)
        self._taken = self._failed = self._skipped = self._in_a_row = 0
        self._error: str | None = None
        self.interrupt: BaseException | None = None

    def open(self) -> None:
        sink: Sink | None = None
        try:
            sink = self._route.make()
            started = self._transform(Record(seq=0, run="", time=0.0, event=self._run.started))
            if started is not None and not isinstance(started.event, UnknownEvent):
                run = msgspec.structs.replace(self._run, started=started.event)
            sink.open(run)
        except BaseException as error:
            if sink is not None:
                with suppress(Exception):
                    sink.close()
            if not isinstance(error, Exception):
                raise
            self._error = _line(error)
            if self._route.on_error == "raise":
                name, kind = self._route.name, self._route.kind
                raise SinkError(
                    f"sink {name!r} ({kind}) can't be opened: {_line(error)}"
                ) from error
            logger.warning(
                "sink %r (%s) can't be opened, training goes on without it: %s",
                self._route.name,
                self._route.kind,
                _line(error),
            )
        else:
            self._sink = sink

    def put(self, record: Record) -> None:
        is_open = self._in_a_row < _FAILURES_TO_OPEN or isinstance(record.event, RunEnded)
        if self._sink is None or not is_open:
            self._failed += 1
        elif not self._guarded(self._write, self._sink, record):
            self._failed += 1
            self._in_a_row += 1
            if self._in_a_row == _FAILURES_TO_OPEN:
                logger.warning(
                    "sink %r (%s) failed %d times in a row and gets no more of this run",
                    self._route.name,
                    self._route.kind,
                    _FAILURES_TO_OPEN,
                )

    def close(self) -> SinkReport:
        if self._sink is not None:
            self._guarded(self._sink.flush)
            self._guarded(self._sink.close)
            self._guarded(self._find, self._sink)
            self._sink = None
        return SinkReport(
            name=self._route.name,
            kind=self._route.kind,
            taken=self._taken,
            failed=self._failed,
            skipped=self._skipped,
            lost=self._lost,
            where=self._where,
            error=self._error,
        )

    def _write(self, sink: Sink, record: Record) -> None:
        wanted = self._transform(record)
        if wanted is None:
            self._skipped += 1
            return
        sink.write([wanted])
        self._taken += 1
        self._in_a_row = 0

    def _find(self, sink: Sink) -> None:
        self._where, self._lost = sink.where, sink.lost

    def _guarded(self, call: Callable[..., None], *args: Any) -> bool:
        """Return whether a call of the sink went well."""
        try:
            call(*args)
        except Exception as error:
            if self._error is None:
                logger.warning(
                    "sink %r (%s) failed, training goes on: %s",
                    self._route.name,
                    self._route.kind,
                    _line(error),
                )
            self._error = _line(error)
        except BaseException as interrupt:
            self._error = f"interrupted by {type(interrupt).__qualname__}"
            self.interrupt = interrupt
        else:
            return True
        return False


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, TrainbusError) else f"{type(error).__name__}: {text}"
