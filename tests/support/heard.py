"""A bus, and what is heard on it."""

from __future__ import annotations

from typing import Any

from trainbus import Bus
from trainbus.events import Record, event_name


class Heard:
    """Listens to a bus, by default to one without sinks."""

    def __init__(self, bus: Bus | None = None) -> None:
        self.bus = Bus(on_receipt=lambda receipt: None) if bus is None else bus
        self.records: list[Record] = []
        self.bus.subscribe(self.records.append)

    def of(self, kind: type[Any]) -> list[Any]:
        """Return the events of one type."""
        return [record.event for record in self.records if isinstance(record.event, kind)]

    @property
    def names(self) -> list[str]:
        """The names of all events."""
        return [event_name(record.event) for record in self.records]

    def runs(self) -> list[list[Record]]:
        """Return the records of each attempt, in the order in which they began."""
        runs: dict[tuple[str, int], list[Record]] = {}
        for record in self.records:
            runs.setdefault((record.run, record.attempt), []).append(record)
        return list(runs.values())
