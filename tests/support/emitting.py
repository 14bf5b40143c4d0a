"""Emits single events through a bus, as an adapter does."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from trainbus import Bus, Event
from trainbus.recording.emitter import Emitter

_EMITTERS: WeakKeyDictionary[Bus, Emitter] = WeakKeyDictionary()


def emit(bus: Bus, event: Event) -> None:
    """Emit an event; all events of a bus go through one emitter."""
    emitter = _EMITTERS.get(bus)
    if emitter is None:
        emitter = _EMITTERS[bus] = bus.emitter()
    emitter(event)
