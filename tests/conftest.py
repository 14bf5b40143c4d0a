"""Trainings that many tests look at: each is run once, in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import shapes
from support.trained import Trained, train_once

os.environ["YOLO_OFFLINE"] = "True"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the data and trainings of the whole session."""
    return tmp_path_factory.mktemp("session")


@pytest.fixture(scope="session")
def data(workspace: Path) -> Path:
    """Red, green and blue shapes; no green one in the validation pictures."""
    return shapes.make_dataset(
        workspace / "data", images=64, val_images=8, size=64, val_names=("red", "blue")
    )


@pytest.fixture(scope="session")
def train(workspace: Path, data: Path) -> Callable[..., Trained]:
    """Train a scenario by name, once a session; see `train_once`."""
    done: dict[str, Trained] = {}

    def trained(name: str, **options: object) -> Trained:
        if name not in done:
            done[name] = train_once(workspace / name, data, **options)
        return done[name]

    return trained


@pytest.fixture(scope="session")
def ours(train: Callable[..., Trained]) -> Trained:
    """Ten epochs of the newest Ultralytics, logged by trainbus into W&B and a file."""
    return train("ours", epochs=10)


@pytest.fixture(scope="session")
def builtin(train: Callable[..., Trained]) -> Trained:
    """The same training, logged by Ultralytics' own W&B callback."""
    return train("builtin", epochs=10, builtin=True, config=None)


@pytest.fixture(scope="session")
def older_builtin(train: Callable[..., Trained]) -> Trained:
    """The same training in Ultralytics 8.4.90, logged by that version's own W&B callback."""
    return train("older", epochs=10, builtin=True, config=None, version="8.4.90")
