"""A sink that keeps its records in a list: for tests, and for a look at what a training emits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainbus.events import Event, Record, UnknownEvent
from trainbus.interfaces import Sink


class MemorySink(Sink):
    """Keeps every record once, in the order it came; `Bus({"memory": MemorySink()})`."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.records: list[Record] = []
        self._known: set[tuple[str, tuple[int, int]]] = set()

    def write(self, records: Sequence[Record]) -> None:
        """Keep the records that are new."""
        for record in records:
            identity = (record.run, record.position)
            if identity not in self._known:
                self._known.add(identity)
                self.records.append(record)

    @property
    def events(self) -> list[Event | UnknownEvent]:
        """The events of the records."""
        return [record.event for record in self.records]
