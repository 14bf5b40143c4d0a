"""Trainings that many tests look at: each is run once, in a process of its own."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support import shared
from support.train import LEARNER
from trainbus import JournalSpec, bus
from trainbus.recording import process_hooks

if TYPE_CHECKING:  # a file that trains nothing starts without W&B and pictures
    from support.trained import Trained

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
    process_hooks._at_exit()


@pytest.fixture(scope="session")
def workspace(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the data and trainings of the whole session, the same for all its workers."""
    return shared.folder(pytestconfig, tmp_path_factory) / "session"


@pytest.fixture(scope="session")
def data(workspace: Path) -> Path:
    """Red, green and blue shapes; no green one in the validation pictures."""
    import shapes

    def make(folder: Path) -> Path:
        return shapes.make_dataset(
            folder, images=64, val_images=8, size=64, val_names=("red", "blue")
        )

    return shared.once(workspace / "data", make)


@pytest.fixture(scope="session")
def train(workspace: Path, data: Path) -> Callable[..., Trained]:
    """Train a scenario by name, once a session; see `train_once`."""
    from support.trained import train_once

    def trained(name: str, **options: Any) -> Trained:
        return shared.once(workspace / name, lambda root: train_once(root, data, **options))

    return trained


@pytest.fixture(scope="session")
def ours(train: Callable[..., Trained]) -> Trained:
    """Ten epochs of the newest Ultralytics, logged by trainbus into W&B and a file."""
    return train("ours", epochs=10, model=LEARNER)


@pytest.fixture(scope="session")
def builtin(train: Callable[..., Trained]) -> Trained:
    """The same training, logged by Ultralytics' own W&B callback."""
    return train("builtin", epochs=10, model=LEARNER, builtin=True, config=None)


@pytest.fixture(scope="session")
def older_builtin(train: Callable[..., Trained]) -> Trained:
    """The same training in Ultralytics 8.4.90, logged by that version's own W&B callback."""
    options = {"epochs": 10, "model": LEARNER, "builtin": True, "config": None}
    return train("older", version="8.4.90", **options)
