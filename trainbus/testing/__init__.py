"""Conformance suites for plugin authors: a plugin that passes works with the rest of trainbus.

A plugin's test file derives from a suite and defines how to create the plugin and how to read back
the stored result; the suite contains every check that all plugins must pass. trainbus itself never
imports this package.
"""

from __future__ import annotations

import pytest

# Without this, failed asserts of a shipped suite don't show the compared values.
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
