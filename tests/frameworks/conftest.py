"""The tests of a folder are skipped where the package that it is named for is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import packages


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    """Look for the package before a file is imported."""
    return packages.module_of(module_path, parent)
