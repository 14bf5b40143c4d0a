"""A sink that collects records in a list, for tests and for exploring a training's events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainbus.events import Event, Record, UnknownEvent
from trainbus.interfaces import Sink


class MemorySink(Sink):
    """Collects every record once, in order of arrival: `Bus({"memory": MemorySink()})`."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.records: list[Record] = []
        self._known: set[tuple[str, str, tuple[int, int]]] = set()

    def write(self, records: Sequence[Record]) -> None:
        """Collect the new records."""
        for record in records:
            identity = (record.run, record.source, record.position)
            if identity not in self._known:
                self._known.add(identity)
                self.records.append(record)

    @property
    def events(self) -> list[Event | UnknownEvent]:
        """The events of the records."""
        return [record.event for record in self.records]
