"""Conformance suites and support for plugin authors; trainbus itself never imports this.

A plugin's test file derives from a suite and says how to make the plugin and how to read back what
it stored; the suite holds every check that all plugins must pass.
"""

from __future__ import annotations

import pytest

# Without this the asserts of a shipped suite fail without saying what was compared.
pytest.register_assert_rewrite("trainbus.testing.sinks", "trainbus.testing.adapters")

from trainbus.testing.adapters import AdapterConformance, Training  # noqa: E402
from trainbus.testing.grammar import check_grammar  # noqa: E402
from trainbus.testing.memory import MemorySink  # noqa: E402
from trainbus.testing.samples import sample_records  # noqa: E402
from trainbus.testing.sinks import SinkConformance  # noqa: E402

__all__ = [
    "AdapterConformance",
    "MemorySink",
    "SinkConformance",
    "Training",
    "check_grammar",
    "sample_records",
]
