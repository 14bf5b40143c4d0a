"""The `wandb` sink in a W&B run that somebody else logs to, read back from W&B's own file."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from trainbus.sinks.wandb import WandbOptions, WandbSink

import trainbus
from support import wandb_file
from support.records import records
from support.wandb_file import WandbRun
from trainbus.errors import SinkError
from trainbus.events import (
    EpochEnded,
    EpochStarted,
    Event,
    ImageLogged,
    MetricsLogged,
    RunEnded,
    RunStarted,
)

# wandb warns of its own and of pydantic's deprecations, and leaves folders to the collector.
pytestmark = pytest.mark.filterwarnings(
    "default", "ignore:Implicitly cleaning up <TemporaryDirectory:ResourceWarning"
)


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[Any]:
    """A run of the user's."""
    settings = wandb.Settings(console="off", silent=True)
    yield wandb.init(project="mine", mode="offline", dir=str(tmp_path), settings=settings)
    wandb.finish()


def finished(mine: Any) -> WandbRun:
    """Return what the file of the user's run holds."""
    mine.finish()
    return wandb_file.read_finished(Path(mine.dir).parent / f"run-{mine.id}.wandb")


def opened(started: RunStarted | None = None, **options: Any) -> WandbSink:
    """Return a sink that was opened in this process."""
    sink = WandbSink(WandbOptions(**options))
    sink.open(trainbus.RunInfo(id="run", started=started or RunStarted()))
    return sink


def epoch(number: int, **values: float) -> list[Event]:
    """Return the events of an epoch with a picture in it."""
    picture = np.full((2, 2, 3), number, np.uint8)
    return [
        EpochStarted(epoch=number),
        ImageLogged(key="picture", array=picture, epoch=number),
        MetricsLogged(values=values, phase="train", epoch=number),
        EpochEnded(epoch=number, outcome="completed"),
    ]


def shaded(run: WandbRun) -> list[int]:
    """Return the brightness of each picture that arrived, which says of which epoch it is."""
    from PIL import Image

    found = []
    for row in run.history:
        if "picture" in row:
            with Image.open(wandb_file.media_path(run, row["picture"])) as picture:
                found.append(int(np.asarray(picture)[0, 0, 0]))
    return found


@pytest.mark.parametrize(("epochs", "pause_ms"), [(20, 20), (200, 0.5), (4, 200)])
def test_no_row_is_lost_beside_rows_of_the_user(mine: Any, epochs: int, pause_ms: float) -> None:
    """However fast the user's program logs, every row and picture arrives once, at its epoch."""
    pause = threading.Event()
    receipts: list[trainbus.Receipt] = []
    with (
        trainbus.Bus({"w": WandbSink()}, on_receipt=receipts.append) as bus,
        bus.run() as run,
    ):
        for index in run.epochs(epochs):
            for part in range(5):
                mine.log({"mine": 5 * index + part})
                pause.wait(pause_ms / 1000)
            run.log({"loss": index})
            if index % 2 == 0:
                run.image("picture", np.full((2, 2, 3), index, np.uint8))
    found = finished(mine)
    ours = [(row["epoch"], row["train/loss"]) for row in found.history if "train/loss" in row]
    assert [(index + 1, index) for index in range(epochs)] == ours
    assert list(range(0, epochs, 2)) == shaded(found)
    theirs = [row["mine"] for row in found.history if "mine" in row]
    assert list(range(5 * epochs)) == theirs
    assert not any({"mine", "epoch"} <= row.keys() for row in found.history)
    assert "epoch" == found.metrics["train/loss"]["step_metric"]
    (report,) = receipts[0].sinks
    assert (receipts[0].emitted, 0, 0) == (report.taken, report.lost, report.dead)


def test_a_program_that_sets_the_step_keeps_its_rows(mine: Any) -> None:
    """Rows join the one of the program's step, so that what it logs there next is not dropped."""
    sink = opened()
    for index in range(4):
        mine.log({"first": index}, step=index)
        sink.write(records(*epoch(index, loss=float(index)), first=1 + 4 * index))
        mine.log({"second": index}, step=index)
    sink.write(records(RunEnded(status="finished"), first=17))
    sink.close()
    found = finished(mine)
    assert [(i, i, i, i, i + 1) for i in range(4)] == [
        (row["_step"], row["first"], row["second"], row["loss"], row["epoch"])
        for row in found.history
    ]
    assert [0, 1, 2, 3] == shaded(found)


def test_rows_faster_than_the_programs_steps_arrive(
    mine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows that find no step of their own wait; at the end they come, and a line says so."""
    sink = opened()
    mine.log({"mine": 0}, step=0)
    events = [event for index in range(4) for event in epoch(index, loss=float(index))]
    sink.write(records(*events, RunEnded(status="finished")))
    sink.close()
    found = finished(mine)
    assert [(i + 1, i) for i in range(4)] == [
        (row["epoch"], row["loss"]) for row in found.history if "loss" in row
    ]
    assert [0, 1, 2, 3] == shaded(found)
    assert "give this sink its own run with `isolation: process`" in caplog.text


def test_a_run_that_is_finished_too_early_does_not_have_what_is_left(mine: Any) -> None:
    """What W&B refuses is an error; what waited to be sent with it is counted as lost."""
    sink = opened()
    start, _, metrics, end = records(*epoch(0, loss=1.0))
    sink.write([start, metrics])
    mine.finish()
    with pytest.raises(SinkError, match="finish it after the training"):
        sink.write([end])
    with pytest.raises(wandb.Error):
        sink.close()
    assert 1 == sink.lost


def test_the_epoch_of_the_user_is_not_hidden(mine: Any) -> None:
    """A metric `epoch` of the user's own is drawn as before."""
    sink = opened()
    sink.write(records(*epoch(0, loss=1.0)))
    sink.close()
    assert "epoch" not in finished(mine).metrics


def test_a_second_training_in_the_run_continues_the_best_value(mine: Any) -> None:
    """The best value is that of all that the run holds."""
    for loss in (1.0, 3.0):
        sink = opened(RunStarted(goals={"loss": "min"}))
        sink.write(records(*epoch(0, loss=loss), RunEnded(status="finished")))
        sink.close()
    summary = finished(mine).summary
    assert (3, 1) == (summary["loss"], summary["loss.min"])


# A run that the framework's own logger feeds ------------------------------------------------------


def test_a_run_that_a_framework_feeds_is_left_alone(mine: Any, tmp_path: Path) -> None:
    """Beside a framework's own W&B logger the sink has a run of its own, and nothing is twice."""
    started = RunStarted(own_loggers=["wandb"], project="p", params={"lr": 1})
    sink = opened(started, mode="offline", dir=str(tmp_path))
    assert wandb.run.id == mine.id  # type: ignore[union-attr]
    sink.write(records(*epoch(0, loss=1.0), RunEnded(status="finished")))
    sink.close()
    theirs = finished(mine)
    (ours,) = [
        wandb_file.read_finished(path)
        for path in wandb_file.find_runs(tmp_path)
        if mine.id not in path.name
    ]
    assert ([], {}) == (theirs.history, theirs.config)
    assert [1] == [row["loss"] for row in ours.history if "loss" in row]


def test_a_framework_does_not_find_the_run_of_the_sink(tmp_path: Path) -> None:
    """The framework's own logger, which comes later, would take `wandb.run` for its own."""
    sink = opened(RunStarted(own_loggers=["wandb"]), mode="offline", dir=str(tmp_path))
    assert wandb.run is None
    sink.close()
