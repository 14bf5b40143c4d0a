"""One training into many trackers at once, from config/everything.yaml: the same values in all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import shapes
from support import readings, train
from support.mlflow_server import Server
from support.readings import Metrics
from trainbus.events import Record, decode
from trainbus.journal.directory import RunFolder

# Trackers warn of their own deprecations, in this process too.
pytestmark = pytest.mark.filterwarnings("default")

CONFIG = Path(__file__).parents[2] / "config" / "everything.yaml"
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "TRACKIO_DIR": "trackio",
}
YOLO = """
import trainbus
from support.quiet import OWN_LOGGERS_OFF
exec(OWN_LOGGERS_OFF)
from ultralytics import YOLO
model = YOLO({model!r})
with trainbus.load("everything.yaml") as bus:
    bus.attach(model)
    model.train(data={data!r}, name="train", **{arguments!r})
"""
LIGHTNING = """
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
import trainbus

class Line(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(1, 1)

    def training_step(self, batch):
        loss = torch.nn.functional.mse_loss(self.line(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch):
        self.log("val_loss", torch.nn.functional.mse_loss(self.line(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

x = torch.linspace(0, 1, 64)[:, None]
data = DataLoader(TensorDataset(x, 3 * x + 1), batch_size=16)
trainer = pl.Trainer(max_epochs=3, log_every_n_steps=2, accelerator="cpu", logger=False)
with trainbus.load("everything.yaml") as bus:
    bus.attach(trainer)
    trainer.fit(Line(), data, data)
"""


@dataclass(frozen=True)
class Fed:
    """A training that fed everything, and the address of its MLflow server."""

    folder: Path
    uri: str
    printed: str

    @property
    def journal(self) -> RunFolder:
        """The directory of its run."""
        (path,) = (self.folder / "trainbus-runs").glob("*/r0-a1.jsonl")
        return RunFolder(path.parent)

    @property
    def records(self) -> list[Record]:
        """What the file sink has."""
        (path,) = (self.folder / "trainbus-runs").glob("*.jsonl")
        return [decode(line) for line in path.read_bytes().splitlines()]


@pytest.fixture(scope="module", params=["yolo", "lightning"])
def fed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fed]:
    """A training of each kind, with a real MLflow server."""
    folder = tmp_path_factory.mktemp(request.param)
    data = shapes.make_dataset(folder / "data", images=16, val_images=8, size=64)
    # Below the git repository of its own package, if there is one, is where it would save else.
    arguments = train.FAST | {"epochs": 3, "project": str(folder / "runs")}
    model = str(train.MODELS / "detect.yaml")
    yolo = YOLO.format(model=model, data=str(data), arguments=arguments)
    script = {"yolo": yolo, "lightning": LIGHTNING}
    (folder / "script.py").write_text(script[request.param])
    (folder / "everything.yaml").write_text(CONFIG.read_text(encoding="utf-8"))
    server = Server(folder)
    server.start()
    try:
        done = subprocess.run(
            [sys.executable, str(train.HERE / "torchvision_cpu.py"), "script.py"],
            cwd=folder,
            env=train.hermetic(folder) | QUIET | {"MLFLOW_TRACKING_URI": server.uri},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert 0 == done.returncode, done.stderr[-4000:]
        yield Fed(folder, server.uri, done.stderr)
    finally:
        server.stop()


def stored(folder: Path, uri: str) -> dict[str, Callable[[], Metrics]]:
    """Return how each tracker is asked for what it has below a folder."""
    return {
        "wandb": lambda: readings.of_wandb(folder),
        "tensorboard": lambda: readings.of_tensorboard(folder / "trainbus-board"),
        "mlflow": lambda: readings.of_mlflow(uri),
        "trackio": lambda: readings.of_trackio(folder / "trackio"),
        "html": lambda: readings.of_page(folder / "trainbus-pages"),
    }


def differences(expected: Metrics, found: Metrics) -> list[str]:
    """Return the metrics that a tracker does not have as they were emitted.

    A metric that has values of steps and of epochs may stand under two names.
    """
    return [name for name, values in expected.items() if values != found.get(name)]


def test_every_tracker_took_every_record(fed: Fed) -> None:
    """The receipt has nothing pending, dead or lost."""
    receipt = fed.printed[fed.printed.index("trainbus: run ") :]
    assert str(len(fed.records)) in receipt
    taken = re.findall(r"(\w+): (\d+) delivered", receipt)
    assert {str(len(fed.records))} == {count for kind, count in taken if kind != "console"}
    assert 8 == len(taken)
    assert "PENDING" not in receipt


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "mlflow", "trackio", "html"])
def test_every_value_is_the_same_everywhere(fed: Fed, name: str) -> None:
    """Metric by metric and epoch by epoch, each tracker has what was emitted."""
    expected = readings.of_records(fed.records)
    assert len(expected) >= 4
    assert [] == differences(expected, stored(fed.folder, fed.uri)[name]())


def test_a_replay_into_other_trackers_is_the_same(
    fed: Fed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sent from the journal into empty trackers, the run is what it was live."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    env = {**os.environ, **QUIET}
    text = CONFIG.read_text(encoding="utf-8").replace("    mode: $", "    dir: .\n    mode: $")
    (tmp_path / "everything.yaml").write_text(text)
    command = [sys.executable, "-m", "trainbus", "replay", str(fed.journal.path)]
    done = subprocess.run(
        [*command, "-c", "everything.yaml", "--from", "1"],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert 0 == done.returncode, done.stdout + done.stderr
    live, again = (
        {name: read() for name, read in stored(folder, uri).items()}
        for folder, uri in ((fed.folder, fed.uri), (tmp_path, f"sqlite:///{tmp_path}/mlflow.db"))
    )
    assert live == again
