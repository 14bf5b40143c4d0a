"""What all layers of tests share; it imports no tracker and no framework."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import packages, shared
from trainbus import JournalSpec, bus
from trainbus.recording import process_hooks

pytest_plugins = ["support.trainings"]

# Read when the packages are imported, so they are set before any test can; nothing is written home.
SETTINGS = tempfile.mkdtemp(prefix="trainbus-")
atexit.register(shutil.rmtree, SETTINGS, ignore_errors=True)
os.environ |= {
    "YOLO_OFFLINE": "True",
    "YOLO_CONFIG_DIR": SETTINGS,
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    **{f"WANDB_{kind}_DIR": f"{SETTINGS}/{kind}" for kind in ("CACHE", "CONFIG", "DATA")},
}
# Models this small gain nothing from threads, which wait for each other where all cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# It holds matplotlib's list of the fonts of this machine, which takes seconds to make.
os.environ.setdefault("MPLCONFIGDIR", str(Path(sys.prefix) / "matplotlib"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Let `support.scheduling` say which tests go together, in the order that it gives them."""
    from support.scheduling import ByFile

    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_warning_recorded(warning_message: warnings.WarningMessage) -> None:
    """Make a framework's own warning a plain one.

    pytest-xdist imports the class of a warning where it shows it, and with that the framework.
    """
    if warning_message.category.__module__ != "builtins":
        text = f"{warning_message.category.__name__}: {warning_message.message}"
        warning_message.message, warning_message.category = UserWarning(text), UserWarning


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start with what takes longest, where several workers share the tests."""
    if shared.is_worker(config):
        from support.scheduling import longest_first

        items[:] = longest_first(items)


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    """Skip the files of a framework or tracker that is missing, without importing them."""
    return packages.module_of(module_path, parent)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose packages are missing before any fixture of it is made."""
    packages.check_item(item)


@pytest.fixture(autouse=True)
def journals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the journals of this test, where it names none."""
    folder = tmp_path / "trainbus-runs"
    monkeypatch.setattr(bus, "JournalSpec", functools.partial(JournalSpec, dir=str(folder)))
    return folder


@pytest.fixture(autouse=True)
def end_runs() -> Iterator[None]:
    """Runs that a test leaves open end with it, as they would with its process."""
    yield
    process_hooks.end_open_runs()
