"""Checks that the records of a run follow the grammar that every run must follow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from trainbus.events import (
    ConfusionMatrixLogged,
    CurveLogged,
    EpochEnded,
    EpochStarted,
    HistogramLogged,
    ImageLogged,
    MetricsLogged,
    Record,
    RunEnded,
    RunStarted,
    TableLogged,
    UnknownEvent,
    encode,
    event_name,
)


def check_grammar(records: Sequence[Record]) -> list[str]:
    """Return one line for each error in the records of one attempt; empty if there is none.

    The grammar: exactly one `run.started`, first; exactly one `run.ended`, last; `seq` from 1
    without gaps; one run id and attempt; each `epoch.ended` after its `epoch.started`; no epoch
    completed twice unless the training recovered in between; and values and shapes as documented in
    `trainbus.events`.
    """
    if not records:
        return ["expected at least run.started and run.ended, found no records"]
    return [*_frame(records), *_epochs(records), *_values(records)]


def _frame(records: Sequence[Record]) -> Iterator[str]:
    first, last = records[0].event, records[-1].event
    if not isinstance(first, RunStarted):
        yield f"expected run.started first, found {event_name(first)}"
    if not isinstance(last, RunEnded):
        yield f"expected run.ended last, found {event_name(last)}"
    for kind in (RunStarted, RunEnded):
        count = sum(isinstance(record.event, kind) for record in records)
        if count != 1:
            yield f"expected one {event_name(kind)}, found {count}"
    for expected, record in enumerate(records, 1):
        if record.seq != expected:
            yield f"expected seq {expected}, found {record.seq} ({event_name(record.event)})"
            break
    runs = sorted({(record.run, record.attempt) for record in records})
    if len(runs) != 1 or not runs[0][0] or runs[0][1] < 1:
        yield f"expected one run id and one attempt from 1, found {runs}"


def _epochs(records: Sequence[Record]) -> Iterator[str]:
    current: int | None = None
    completed: set[int] = set()
    for record in records:
        event = record.event
        if isinstance(event, EpochStarted):
            if current is not None:
                yield f"seq {record.seq}: epoch {event.epoch} started while {current} was open"
            current = event.epoch
        elif isinstance(event, EpochEnded):
            if event.epoch != current:
                yield f"seq {record.seq}: epoch {event.epoch} ended while {current} was open"
            current = None
            if event.outcome == "recovered":  # training may continue from any epoch
                completed.clear()
            elif event.outcome == "completed":
                if event.epoch in completed:
                    yield f"seq {record.seq}: epoch {event.epoch} was completed twice"
                completed.add(event.epoch)
        elif isinstance(event, RunEnded) and event.status == "finished" and current is not None:
            yield f"seq {record.seq}: the run finished while epoch {current} was open"


def _values(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        if isinstance(record.event, UnknownEvent):
            continue
        for problem in _event(record.event):
            yield f"seq {record.seq} ({event_name(record.event)}): {problem}"
        try:
            encode(record)
        except Exception as error:
            yield f"seq {record.seq} ({event_name(record.event)}): can't be encoded: {error}"


def _event(event: Any) -> Iterator[str]:
    for counter in ("epoch", "step"):
        value = getattr(event, counter, None)
        if value is not None and (type(value) is not int or value < 0):
            yield f"expected {counter} to be an int from 0, found {value!r}"
    match event:
        case MetricsLogged():
            for name, value in event.values.items():
                if type(value) is not float:
                    yield f"expected {name!r} to be a float, found {type(value).__qualname__}"
                if type(name) is not str or not name:
                    yield f"expected the name of a metric, found {name!r}"
        case EpochEnded(duration_s=float() as seconds) if not seconds >= 0:
            yield f"expected a duration from 0 s, found {seconds!r}"
        case RunEnded():
            if (event.status == "failed") != (
                event.error is not None
            ) and event.status != "stopped":
                yield f"expected an error if and only if the run failed, found {event.error!r}"
        case _:
            yield from _shapes(event)


def _shapes(event: Any) -> Iterator[str]:
    match event:
        case ImageLogged():
            if (event.path is None) == (event.array is None):
                yield "expected either a path or an array"
            if event.array is not None and event.array.ndim not in (2, 3):
                yield f"expected an array (H, W) or (H, W, C), found {event.array.shape}"
        case CurveLogged():
            expected = (len(event.classes), *event.x.shape)
            if event.x.ndim != 1 or event.y.shape != expected:
                yield f"expected x (N,) and y {expected}, found {event.x.shape}, {event.y.shape}"
        case ConfusionMatrixLogged():
            square = (len(event.classes),) * 2
            if event.matrix.shape != square:
                yield f"expected a matrix {square}, found {event.matrix.shape}"
        case HistogramLogged():
            if event.edges.shape != (len(event.counts) + 1,):
                yield f"expected edges ({len(event.counts) + 1},), found {event.edges.shape}"
        case TableLogged():
            for row in event.rows:
                if len(row) != len(event.columns):
                    yield f"expected {len(event.columns)} values per row, found {len(row)}"
                    break
