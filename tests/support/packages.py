"""Packages that tests need: where one is missing, its tests are skipped, but never in CI."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

_OTHER_NAMES = {
    "comet": "comet_ml",
    "console": "rich",
    "csv": "pandas",
    "html": "plotly",
    "jsonl": "msgspec",
    "memory": "msgspec",
    "notify": "apprise",
    "prometheus": "prometheus_client",
}
"""Folders of tests that are not called as the package that they need."""


def check(package: str) -> None:
    """Skip a test or a file whose package is missing.

    In CI it fails instead, so that no test is skipped unnoticed. `TRAINBUS_SMALL` says that the
    environment is meant to have few packages.

    Args:
        package: its import name.
    """
    if importlib.util.find_spec(package) is not None:
        return
    if os.environ.get("CI") == "true" and not os.environ.get("TRAINBUS_SMALL"):
        pytest.fail(f"needs {package}, which is not installed", pytrace=False)
    pytest.skip(f"needs {package}, which is not installed", allow_module_level=True)


def check_item(item: pytest.Item) -> None:
    """Skip a test that is marked with `needs` and whose packages are missing."""
    for marker in item.iter_markers("needs"):
        for package in marker.args:
            check(package)


class PackageModule(pytest.Module):
    """A file of tests in a folder that is named for the package that they need."""

    def collect(self) -> list[pytest.Item | pytest.Collector]:
        """Return the tests, without importing the file where the package is missing."""
        folder = self.path.parent.name
        check(_OTHER_NAMES.get(folder, folder))
        return list(super().collect())


def module_of(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Return the collector of a file in such a folder, None for files elsewhere."""
    if module_path.parents[1].name not in ("frameworks", "trackers"):
        return None
    found: pytest.Module = PackageModule.from_parent(parent, path=module_path)
    return found
