"""Trainings that many tests look at: each is run once a session, in a process of its own.

The root conftest loads this file for every test, so it imports no tracker and no framework.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support import shared

if TYPE_CHECKING:
    from support.trained import Trained


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
    """Ten epochs of the newest Ultralytics, logged by trainbus to W&B and a file."""
    from support.train import LEARNER

    return train("ours", epochs=10, model=LEARNER)


@pytest.fixture(scope="session")
def builtin(train: Callable[..., Trained]) -> Trained:
    """The same training, logged by Ultralytics' own W&B callback."""
    from support.train import LEARNER

    return train("builtin", epochs=10, model=LEARNER, builtin=True, config=None)


@pytest.fixture(scope="session")
def older_builtin(train: Callable[..., Trained]) -> Trained:
    """The same training in Ultralytics 8.4.90, logged by that version's own W&B callback."""
    from support.train import LEARNER

    options = {"epochs": 10, "model": LEARNER, "builtin": True, "config": None}
    return train("older", version="8.4.90", **options)
