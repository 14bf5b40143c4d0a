"""The `wandb` sink, read back from W&B's own offline file."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from trainbus.sinks import _wandb_charts as charts
from trainbus.sinks._wandb_options import artifact_name, project_name, run_id, run_name
from trainbus.sinks.wandb import WandbOptions, WandbSink

import trainbus
from support import wandb_file
from support.wandb_file import WandbRun
from trainbus.events import (
    ConfusionMatrixLogged,
    CurveLogged,
    Event,
    HistogramLogged,
    MetricsLogged,
    RunStarted,
)
from trainbus.testing import SinkConformance

# wandb warns of its own and of pydantic's deprecations, and leaves folders to the collector.
pytestmark = pytest.mark.filterwarnings(
    "default", "ignore:Implicitly cleaning up <TemporaryDirectory:ResourceWarning"
)

UNREPEATABLE = {"_timestamp", "_runtime", "_wandb"}


@pytest.fixture(autouse=True)
def _no_run_is_left() -> Iterator[None]:
    """No test leaves a W&B run open for the next."""
    yield
    wandb.finish()


class TestConformance(SinkConformance):
    package = "wandb"
    reopens = False  # an offline file can't be asked what it holds

    def make(self, folder: Path) -> WandbSink:
        return WandbSink(WandbOptions(project="p", mode="offline", dir=str(folder)))

    def read(self, folder: Path) -> object:
        return [content(wandb_file.read_finished(path)) for path in wandb_file.find_runs(folder)]


def content(run: WandbRun) -> dict[str, Any]:
    """Return what a run holds, without what no two runs share, such as times and random names."""

    def same(value: Any) -> Any:
        if isinstance(value, dict):
            return value.get("sha256") or {k: same(v) for k, v in value.items()}
        return "NaN" if isinstance(value, float) and math.isnan(value) else value

    return {
        "run": (run.run_id, run.project, run.name, run.exit_code, run.tags, run.notes),
        "config": same(run.config),
        "history": [
            {k: same(v) for k, v in row.items() if k not in UNREPEATABLE} for row in run.history
        ],
        "summary": {k: same(v) for k, v in run.summary.items() if k not in UNREPEATABLE},
        "metrics": run.metrics,
        "charts": run.charts,
        "artifacts": sorted(
            (a.name, a.type, a.aliases, str(a.metadata), sorted(a.files))
            for a in run.artifacts
            if a.type != "run_table"
        ),
    }


def log(folder: Path, *events: Event, **options: Any) -> WandbRun:
    """Log events through a bus, and return what W&B's file holds."""
    sink = WandbSink(WandbOptions(**{"mode": "offline", "dir": str(folder), **options}))
    with trainbus.Bus({"w": sink}, on_receipt=lambda receipt: None) as bus:
        for event in events:
            bus.emit(event)
    return wandb_file.read_finished(wandb_file.find_runs(folder)[-1])


# Names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shapes", "shapes"),
        (r"a/b\c#d?e%f:g", "a-b-c-d-e-f-g"),
        ("x" * 200 + "end", "x" * 125 + "end"),
        ("", "trainbus"),
    ],
)
def test_project_names_are_made_valid(name: str, expected: str) -> None:
    """Only what W&B refuses is changed."""
    assert expected == project_name(name)


def test_wandb_takes_every_name_that_was_made_valid() -> None:
    """W&B's own checks accept the names, whatever they were made of."""
    odd = "".join(map(chr, range(1, 256))) * 2
    settings = wandb.Settings()
    settings.project = project_name(odd)
    settings.run_id = run_id(odd)
    settings.run_name = run_name(odd)
    artifact = wandb.Artifact(artifact_name(odd), "model")
    assert 128 == len(settings.project) == len(artifact.name)


@pytest.mark.parametrize("project", ["a/b", "x" * 129, "", "50%"])
def test_a_project_in_the_configuration_must_be_valid(tmp_path: Path, project: str) -> None:
    """What a person wrote is not changed behind their back: it is an error."""
    file = tmp_path / "bus.yaml"
    file.write_text(f"sinks:\n  w:\n    type: wandb\n    project: {project!r}\n")
    with pytest.raises(
        trainbus.ConfigError, match=r"bus\.yaml:4: sinks\.w\.project: .*W&B project"
    ):
        trainbus.load(file)


# Charts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_interpolation_is_numpys(size: int) -> None:
    """All rows at once give what `numpy.interp` gives for each, to the last bit."""
    rng = np.random.default_rng(size)
    x = np.sort(rng.uniform(-1, 1, size))
    x[size // 2 :] = np.maximum(x[size // 2 :], x[size // 2])  # and a repeated value
    y = rng.normal(size=(5, size))
    at = np.concatenate([np.linspace(-2, 2, 101), x])
    expected = np.stack([np.interp(at, x, row) for row in y])
    assert np.array_equal(expected, charts.interpolate(at, x, y))


def test_the_mean_alone_is_a_line(tmp_path: Path) -> None:
    """`curves: mean` draws one line over x, of the mean over the classes."""
    x = np.linspace(0, 1, 11)
    curve = CurveLogged(key="curves/a", x=x, y=np.stack([x, x * 3]), classes=["a", "b"])
    run = log(tmp_path, curve, curves="mean", curve_points=3)
    assert "wandb/line/v0" == run.charts["curves/a"]["panel"]
    (value,) = [row["curves/a_table"] for row in run.history if "curves/a_table" in row]
    _, rows = wandb_file.read_table(run, value)
    assert [["mean", 0, 0], ["mean", 1, 0.5], ["mean", 2, 1]] == rows


def test_a_confusion_matrix_keeps_its_largest_cells(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A matrix of more cells than W&B shows rows keeps the largest, and says so."""
    matrix = np.zeros((120, 120))
    matrix[3, 4], matrix[119, 119] = 7, 9
    names = [f"c{i}" for i in range(120)]
    with caplog.at_level(logging.WARNING):
        run = log(tmp_path, ConfusionMatrixLogged(key="m", matrix=matrix, classes=names))
    (value,) = [row["m_table"] for row in run.history if "m_table" in row]
    columns, rows = wandb_file.read_table(run, value)
    assert ["Actual", "Predicted", "nPredictions"] == columns
    assert 10_000 == len(rows)
    assert [["c119", "c119", 9], ["c3", "c4", 7]] == sorted(r for r in rows if r[2])
    assert "W&B can show 10000 of its 14400 cells" in caplog.text


def test_a_histogram_of_many_bins_keeps_its_counts(tmp_path: Path) -> None:
    """More bins than W&B takes are added up in groups."""
    counts, edges = np.arange(2000), np.linspace(0, 1, 2001)
    run = log(tmp_path, HistogramLogged(key="h", counts=counts, edges=edges))
    (value,) = [row["h"] for row in run.history if "h" in row]
    assert counts.sum() == sum(value["values"])
    assert 500 == len(value["values"])
    assert (0, 1) == (value["bins"][0], value["bins"][-1])


# Metrics ------------------------------------------------------------------------------------------


def epoch(number: int, **values: float) -> MetricsLogged:
    """Return metrics of an epoch."""
    return MetricsLogged(values=values, phase="train", epoch=number)


def test_goals_become_summaries(tmp_path: Path) -> None:
    """A metric that the trainer ranks by has its best value in the summary, beside its last."""
    started = RunStarted(goals={"acc*": "max", "loss": "min"})
    events = [epoch(i, acc=a, loss=a, other=a) for i, a in enumerate((1.0, 3.0, 2.0))]
    summary = log(tmp_path, started, *events).summary
    assert (3, 2) == (summary["acc.max"], summary["acc.last"])
    assert (1, 2) == (summary["loss.min"], summary["loss.last"])
    assert 2 == summary["other"]


def test_names_with_dots_and_stars_are_logged(tmp_path: Path) -> None:
    """A `.` and a `*` in a metric's name mean nothing more than themselves."""
    run = log(tmp_path, epoch(0, **{"a.b": 1.0, "c*d": 2.0, "e*": 3.0}))
    assert {"a.b": 1, "c*d": 2, "e*": 3} == {
        k: v for k, v in run.history[0].items() if k in ("a.b", "c*d", "e*")
    }
    assert "epoch" == run.metrics["a\\.b"]["step_metric"]


def test_a_name_logged_by_epoch_and_by_step_is_two_metrics(tmp_path: Path) -> None:
    """Two x axes need two names: the one by step gets `_step` behind it."""
    by_step = [MetricsLogged(values={"loss": 1.0}, phase="train", step=i) for i in (1, 2)]
    run = log(tmp_path, epoch(0, loss=5.0), *by_step)
    assert ("epoch", "step") == (
        run.metrics["loss"]["step_metric"],
        run.metrics["loss_step"]["step_metric"],
    )
    assert [1, 2] == [row["step"] for row in run.history if "loss_step" in row]


def test_options_win_over_the_training(tmp_path: Path) -> None:
    """Project, name, group, tags and so on of the configuration are what W&B gets."""
    run = log(
        tmp_path,
        RunStarted(name="theirs", project="theirs", tags=["theirs"]),
        project="mine",
        name="my run",
        group="g",
        job_type="j",
        tags=["a", "b"],
        notes="n",
        id="my-id",
        entity="me",
    )
    assert ("mine", "my run", "g", "j", ("a", "b"), "n", "my-id", "me") == (
        *(run.project, run.name, run.group, run.job_type, run.tags, run.notes),
        *(run.run_id, run.entity),
    )


# Checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("save", "expected"),
    [
        ("none", []),
        ("best", ["best"]),
        ("last", ["last"]),
        ("all", ["best", "epoch-1", "last"]),
    ],
)
def test_save_checkpoints_chooses(tmp_path: Path, save: str, expected: Sequence[str]) -> None:
    """`best`, `last`, `all` or `none` of the checkpoints become artifacts."""
    sink = WandbSink(WandbOptions(mode="offline", dir=str(tmp_path), save_checkpoints=save))
    files = {kind: tmp_path / f"{kind}.pt" for kind in ("best", "last", "periodic")}
    with trainbus.Bus({"w": sink}, on_receipt=lambda r: None) as bus, bus.run() as run:
        for number in range(2):
            for kind in ("best", "last"):
                files[kind].write_text(f"{kind} of {number}")
                run.checkpoint(files[kind], kind=kind, epoch=number)
        files["periodic"].write_text("periodic")
        run.checkpoint(files["periodic"], kind="periodic", epoch=0)
    (path,) = wandb_file.find_runs(tmp_path)
    artifacts = [a for a in wandb_file.read_finished(path).artifacts if a.type == "model"]
    aliases = sorted(alias for a in artifacts for alias in a.aliases if alias != "latest")
    assert expected == aliases
    for artifact in artifacts:
        ((name, file),) = artifact.files.items()
        assert file.local_path is not None
        kind = name.removesuffix(".pt")
        assert files[kind].read_text() == file.local_path.read_text()


# Runs ---------------------------------------------------------------------------------------------


def test_two_runs_at_a_time_are_two_runs(tmp_path: Path) -> None:
    """A run that is open on the bus is not mistaken for one of the user's."""

    def make() -> WandbSink:
        return WandbSink(WandbOptions(mode="offline", dir=str(tmp_path)))

    bus = trainbus.Bus({"w": make}, on_receipt=lambda r: None)
    with bus, bus.run(name="first") as first, bus.run(name="second") as second:
        for _ in range(2):
            first.log({"a": 1})
            second.log({"b": 2})
    runs = {r.name: r for r in map(wandb_file.read_finished, wandb_file.find_runs(tmp_path))}
    assert {"first", "second"} == runs.keys()
    keys = {name: {k for row in run.history for k in row} for name, run in runs.items()}
    assert ("train/a" in keys["first"], "train/b" in keys["first"]) == (True, False)
    assert ("train/a" in keys["second"], "train/b" in keys["second"]) == (False, True)


def test_a_disabled_run_takes_everything(tmp_path: Path) -> None:
    """`mode: disabled` logs nothing and fails nowhere."""
    sink = WandbSink(WandbOptions(mode="disabled", dir=str(tmp_path)))
    with trainbus.Bus({"w": sink}, on_receipt=lambda r: None) as bus, bus.run() as run:
        for _ in run.epochs(2):
            run.log({"a": 1})
    assert 0 == bus.receipts[0].sinks[0].failed
    assert [] == wandb_file.find_runs(tmp_path)


def test_a_run_that_is_never_ended_is_closed_as_failed(tmp_path: Path) -> None:
    """A sink that is closed before the end of its run leaves a failed run."""
    sink = WandbSink(WandbOptions(mode="offline", dir=str(tmp_path)))
    sink.open(trainbus.RunInfo(id="r", started=RunStarted()))
    sink.close()
    (path,) = wandb_file.find_runs(tmp_path)
    assert 1 == wandb_file.read_finished(path).exit_code
