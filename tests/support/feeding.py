"""A bus that feeds a tracker, as far as adapters can see."""

from __future__ import annotations

from support.heard import Heard
from trainbus import Bus, SinkSpec
from trainbus.testing import MemorySink


def feeding(service: str) -> Heard:
    """Return a listener to a bus with a sink for the tracker of this import name."""
    sink = MemorySink()
    route = SinkSpec(name="tracking", make=lambda: sink, kind="memory", service=service, sink=sink)
    return Heard(Bus({"tracking": route}, on_receipt=lambda receipt: None))
