"""Which tests a worker of pytest-xdist takes together, and which come first.

The tests of a file go to one worker, which imports a framework once and makes the file's fixtures
once. In the files of `SPREAD` each test starts processes of its own, so these tests go one by one,
but for those of a class, which share what they make.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from xdist.scheduler import LoadScopeScheduling

SPREAD = (
    "tests/frameworks/ultralytics/test_ultralytics.py",
    "tests/chaos/test_faults.py",
    "tests/chaos/test_kill.py",
    "tests/process/test_launch.py",
    "tests/process/test_process_hooks.py",
    "tests/process/test_readme.py",
    "tests/chaos/test_adversity.py",
)
"""Files whose tests share nothing but what is made once a session."""

FIRST = (
    "tests/chaos/test_everything.py",
    "tests/chaos/test_parity.py",
    "tests/frameworks/lightning/test_lightning.py",
    "tests/frameworks/transformers/test_transformers.py",
    "tests/frameworks/accelerate/test_accelerate.py",
    "tests/frameworks/keras/test_keras.py",
    "tests/process/test_registry.py",
    "tests/process/test_packaging.py",
    "tests/process/test_examples.py",
    "tests/process/test_benchmarks.py",
    *SPREAD,
)
"""What takes longest: it starts first, and what is short fills the gaps at the end."""


class ByFile(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Hands out whole files, and single tests and classes of the files in `SPREAD`."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, name = nodeid.partition("::")
        if file not in SPREAD:
            return file
        of_class, separator, _ = name.partition("::")
        return f"{file}::{of_class}" if separator else nodeid


def longest_first(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Return the tests of `FIRST` in its order, then the others in theirs."""
    place = {file: index for index, file in enumerate(FIRST)}
    return sorted(items, key=lambda item: place.get(item.nodeid.partition("::")[0], len(FIRST)))
