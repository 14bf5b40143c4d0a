"""Records for sinks, made of events."""

from __future__ import annotations

from trainbus.events import (
    EVENT_TYPES,
    ConsoleLogged,
    EnvironmentDescribed,
    EpochEnded,
    EpochStarted,
    Event,
    Record,
    RunStarted,
)

NOT_SHOWN = (RunStarted, EpochStarted, EpochEnded, EnvironmentDescribed, ConsoleLogged)
CONTENT = tuple(each for each in EVENT_TYPES if each not in NOT_SHOWN)
"""The events that a tracker has something to show of."""


def records(
    *events: Event, run: str = "run", attempt: int = 1, first: int = 1, time: float = 1.0
) -> list[Record]:
    """Return events as the records of a run: one a second, after `time`."""
    return [
        Record(seq=seq, run=run, time=time + seq, event=event, attempt=attempt)
        for seq, event in enumerate(events, first)
    ]
