"""The `wandb` sink, read back from W&B's own offline file."""

from __future__ import annotations

import logging
import math
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import wandb
from trainbus.sinks.wandb import WandbOptions, WandbSink, charts, session
from trainbus.sinks.wandb.options import artifact_name, project_name, run_id, run_name

import trainbus
from support import wandb_file
from support.emitting import emit
from support.records import records as make_records
from support.wandb_file import WandbRun
from trainbus.events import (
    Best,
    CheckpointSaved,
    ConfusionMatrixLogged,
    CurveLogged,
    EpochEnded,
    EpochStarted,
    Event,
    HistogramLogged,
    ImageLogged,
    MetricsLogged,
    RunEnded,
    RunStarted,
)
from trainbus.testing import SinkConformance, samples

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
            emit(bus, event)
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
    """The last value stands under the metric's own name, the best one beside it."""
    maxima = ["acc_top1", "head[0]/acc", "metrics/mAP50(B)", "a.b", "val acc", "c*d"]
    started = RunStarted(goals={"acc*": "max", **dict.fromkeys(maxima[1:], "max"), "loss": "min"})
    values = dict.fromkeys([*maxima, "loss", "head0/acc"], 0.0)
    events = [epoch(i, **dict.fromkeys(values, a)) for i, a in enumerate((1.0, math.nan, 3.0, 2.0))]
    summary = log(tmp_path, started, *events).summary
    assert dict.fromkeys(values, 2) == {name: summary[name] for name in values}
    assert {"loss.min": 1, **{f"{name}.max": 3 for name in maxima}} == {
        name: value for name, value in summary.items() if name.endswith((".max", ".min"))
    }


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
    assert ("epoch", "trainer/step") == (
        run.metrics["loss"]["step_metric"],
        run.metrics["loss_step"]["step_metric"],
    )
    assert [1, 2] == [row["trainer/step"] for row in run.history if "loss_step" in row]


def test_metrics_named_like_an_axis_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A metric overwrites neither an axis nor what W&B notes of a row, nor the other way round."""
    names = ("epoch", "step", "trainer/step", "_step", "_timestamp", "_runtime", "_wandb")
    named = {name: 50.0 + index for index, name in enumerate(names)}
    by_step = MetricsLogged(values=named, phase="train", epoch=0, step=7)
    by_epoch = MetricsLogged(values=named, phase="val", epoch=0)
    run = log(tmp_path, by_step, by_epoch)
    kept = {name if name == "step" else f"logged/{name}": named[name] for name in names}
    of_step, of_epoch = run.history
    assert {**kept, "trainer/step": 7, "epoch": 1} == {
        name: of_step[name] for name in (*kept, "trainer/step", "epoch")
    }
    assert {**kept, "epoch": 1} == {name: of_epoch[name] for name in (*kept, "epoch")}
    assert of_step["_timestamp"] > 1e9
    assert "'epoch' as 'logged/epoch'" in caplog.text


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
    assert 0 == bus.receipts[0].sinks[0].pending + bus.receipts[0].sinks[0].dead
    assert [] == wandb_file.find_runs(tmp_path)


def test_a_run_that_is_never_ended_is_closed_as_failed(tmp_path: Path) -> None:
    """A sink that is closed before the end of its run leaves a failed run."""
    sink = WandbSink(WandbOptions(mode="offline", dir=str(tmp_path)))
    sink.open(trainbus.RunInfo(id="r", started=RunStarted()))
    sink.close()
    (path,) = wandb_file.find_runs(tmp_path)
    assert 1 == wandb_file.read_finished(path).exit_code


# Rows ---------------------------------------------------------------------------------------------


def run_rows(folder: Path, log_it: Callable[[trainbus.LoopRun], None], **options: Any) -> WandbRun:
    """Log by hand through a run, and return what W&B's file holds."""
    sink = WandbSink(WandbOptions(**{"mode": "offline", "dir": str(folder), **options}))
    with trainbus.Bus({"w": sink}, on_receipt=lambda r: None) as bus, bus.run() as run:
        log_it(run)
    (path,) = wandb_file.find_runs(folder)
    return wandb_file.read_finished(path)


def test_a_run_without_epochs_keeps_every_row(tmp_path: Path) -> None:
    """Where no epochs are counted, each call of `log` is a row of its own."""

    def log_it(run: trainbus.LoopRun) -> None:
        for i in range(5):
            run.log({"loss": i})
            run.text("note", str(i))

    history = run_rows(tmp_path, log_it).history
    assert [0, 1, 2, 3, 4] == [row["train/loss"] for row in history if "train/loss" in row]
    assert 5 == sum("note" in row for row in history)
    assert not any("epoch" in row for row in history)


@pytest.mark.parametrize("pid", [None, os.getpid()], ids=["replay", "training"])
def test_system_metrics_neither_split_rows_nor_come_twice(pid: int | None, tmp_path: Path) -> None:
    """W&B measures the machine of a training itself; in a replay, samples have their own rows."""
    training = make_records(
        RunStarted(),
        EpochStarted(epoch=0),
        MetricsLogged(values={"a": 1.0}, phase="train", epoch=0),
        MetricsLogged(values={"b": 2.0}, phase="validation", epoch=0),
        EpochEnded(epoch=0, outcome="completed"),
        RunEnded(status="finished"),
    )
    values = {"system/cpu.percent": 50.0}
    sample = msgspec.structs.replace(
        training[2], seq=1, stream="system", event=MetricsLogged(values=values, phase="system")
    )
    sink = WandbSink(WandbOptions(mode="offline", dir=str(tmp_path)))
    sink.open(trainbus.RunInfo(id="run", started=RunStarted(), pid=pid))
    sink.write([*training[:3], sample, *training[3:]])
    sink.close()
    (path,) = wandb_file.find_runs(tmp_path)
    rows = [
        {name: value for name, value in row.items() if not name.startswith("_")}
        for row in wandb_file.read_finished(path).history
    ]
    epoch_row = {"a": 1.0, "b": 2.0, "epoch": 1}
    assert ([values, epoch_row] if pid is None else [epoch_row]) == rows


def test_epochs_that_are_only_named_have_rows_of_their_own(tmp_path: Path) -> None:
    """`log(…, epoch=i)` without `epochs` gives a row for each epoch, at its place on the x axis."""

    def log_it(run: trainbus.LoopRun) -> None:
        for i in range(3):
            run.log({"loss": i}, epoch=i)
            run.log({"accuracy": i}, phase="validation", epoch=i)

    rows = run_rows(tmp_path, log_it).history
    assert [(1, 0, 0), (2, 1, 1), (3, 2, 2)] == [
        (row["epoch"], row["train/loss"], row["validation/accuracy"]) for row in rows
    ]


def test_a_name_logged_again_in_an_epoch_loses_nothing(tmp_path: Path) -> None:
    """Values of the same name in one epoch are rows at the same place on the x axis."""

    def log_it(run: trainbus.LoopRun) -> None:
        for _ in run.epochs(1):
            for i in range(3):
                run.log({"loss": i})

    rows = run_rows(tmp_path, log_it).history
    assert [(1, 0), (1, 1), (1, 2)] == [(row["epoch"], row["train/loss"]) for row in rows]


def test_the_losses_of_an_epoch_that_fails_are_at_that_epoch(tmp_path: Path) -> None:
    """What was logged in the epoch that raised is not taken for the epoch before."""
    sink = WandbSink(WandbOptions(mode="offline", dir=str(tmp_path)))
    bus = trainbus.Bus({"w": sink}, on_receipt=lambda r: None)

    def train() -> None:
        with bus, bus.run() as run:
            for i in run.epochs(3):
                run.log({"loss": i})
                if i == 1:
                    raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        train()
    (path,) = wandb_file.find_runs(tmp_path)
    rows = wandb_file.read_finished(path).history
    assert [(1, 0), (2, 1)] == [(row["epoch"], row["train/loss"]) for row in rows]


def test_an_epoch_that_is_redone_replaces_its_numbers(tmp_path: Path) -> None:
    """Losses of an attempt that was given up are not logged; step values do not take them along."""
    run = log(
        tmp_path,
        EpochStarted(epoch=0),
        epoch(0, loss=9.0),
        EpochEnded(epoch=0, outcome="recovered"),
        EpochStarted(epoch=0),
        MetricsLogged(values={"batch": 1.0}, phase="train", epoch=0, step=1),
        epoch(0, loss=1.0),
        EpochEnded(epoch=0, outcome="completed"),
    )
    assert [1] == [row["loss"] for row in run.history if "loss" in row]


# What can't be shown ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bool"])
def test_pictures_of_shares_are_as_bright_as_they_say(tmp_path: Path, dtype: str) -> None:
    """Floats in 0…1 and booleans fill the range of brightness."""
    from PIL import Image

    pixels = np.array([[0.0, 1.0], [1.0, 0.0]], dtype=dtype)
    run = run_rows(tmp_path, lambda run: run.image("picture", pixels))
    (value,) = [row["picture"] for row in run.history if "picture" in row]
    with Image.open(wandb_file.media_path(run, value)) as picture:
        assert [[0, 255], [255, 0]] == np.asarray(picture.convert("L")).tolist()


def test_broken_pictures_cost_only_themselves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Pictures that W&B can't show are counted and told of; what comes after them arrives."""
    sink = WandbSink(WandbOptions(mode="offline", dir=str(tmp_path)))
    bus = trainbus.Bus({"w": sink}, on_receipt=lambda r: None)
    with bus:
        emit(bus, RunStarted())
        for i in range(7):
            emit(bus, ImageLogged(key=f"bad {i}", array=np.zeros((3, 64, 64, 7), dtype=np.uint8)))
        emit(bus, ImageLogged(key="gone", path=str(tmp_path / "none.png")))
        emit(bus, MetricsLogged(values={"train/loss": 1.0}, phase="train"))
    (path,) = wandb_file.find_runs(tmp_path)
    assert 1 == wandb_file.read_finished(path).history[-1]["train/loss"]
    (report,) = bus.receipts[0].sinks
    assert (8, 0, 0) == (report.lost, report.dead, report.pending)
    assert "(8 not supported by this tracker)" in str(bus.receipts[0])
    assert "'gone' can't be shown in W&B: no file at" in caplog.text


def test_an_artifact_that_fails_does_not_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full at the end costs the artifact; the run keeps its status and summary."""

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wandb.Artifact, "add_file", no_space)
    (tmp_path / "best.pt").write_text("weights")
    ended = RunEnded(status="finished", best=Best(metric="fitness", value=0.5, epoch=0))
    saved = CheckpointSaved(path=str(tmp_path / "best.pt"), kind="best", epoch=0)
    run = log(tmp_path, saved, ended)
    assert (0, 0.5) == (run.exit_code, run.summary["best/fitness"])


def test_files_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    """Files of one name keep the folders that differ."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.pt").write_text(name)
    paths = [tmp_path / name / "model.pt" for name in "ab"]
    run = run_rows(tmp_path, lambda run: run.artifact("both", *paths))
    (artifact,) = [a for a in run.artifacts if a.name == "both"]
    assert {"a/model.pt", "b/model.pt"} == set(artifact.files)


def test_a_large_curve_of_each_epoch_arrives(tmp_path: Path) -> None:
    """A curve of more classes than there is room for can be logged again."""
    x = np.linspace(0, 1, 10)
    names = [f"c{i}" for i in range(200)]

    def log_it(run: trainbus.LoopRun) -> None:
        for _ in run.epochs(2):
            run.curve("curves/a", x, np.ones((200, 10)), classes=names)

    run = run_rows(tmp_path, log_it)
    assert 2 == sum("curves/a_table" in row for row in run.history)


def test_the_last_checkpoint_is_kept_where_none_is_best(tmp_path: Path) -> None:
    """`save_checkpoints: best` keeps the last one of a training that names none its best."""
    (tmp_path / "m.pt").write_text("weights")
    run = run_rows(tmp_path, lambda run: run.checkpoint(tmp_path / "m.pt"))
    (artifact,) = [a for a in run.artifacts if a.type == "model"]
    assert "last" in artifact.aliases


# Places -------------------------------------------------------------------------------------------


def test_two_sinks_of_one_bus_are_two_runs(tmp_path: Path) -> None:
    """Two W&B sinks, as for two projects, both get everything."""

    def sink(project: str) -> WandbSink:
        return WandbSink(WandbOptions(mode="offline", dir=str(tmp_path), project=project))

    bus = trainbus.Bus({"a": sink("a"), "b": sink("b")}, on_receipt=lambda r: None)
    with bus, bus.run() as run:
        run.log({"loss": 1})
    runs = list(map(wandb_file.read_finished, wandb_file.find_runs(tmp_path)))
    assert {"a", "b"} == {run.project for run in runs}
    assert [1, 1] == [run.history[0]["train/loss"] for run in runs]
    assert {(0, 0)} == {(report.dead, report.pending) for report in bus.receipts[0].sinks}


def test_where_is_a_command_that_can_be_pasted(tmp_path: Path) -> None:
    """Spaces are quoted, and a disabled run is nowhere."""
    places = []
    for mode in ("offline", "disabled"):
        sink = WandbSink(WandbOptions(mode=mode, dir=str(tmp_path / "my runs")))
        with trainbus.Bus({"w": sink}, on_receipt=lambda r: None) as bus, bus.run():
            pass
        places.append(bus.receipts[0].sinks[0].location)
    offline, disabled = places
    assert disabled is None
    assert offline is not None
    _, _, folder = shlex.split(offline)
    assert [Path(folder)] == [p.parent for p in wandb_file.find_runs(tmp_path)]


def test_what_an_active_run_ignores_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Options that can't be set on a run of the user's are named."""
    mine = wandb.init(mode="offline", dir=str(tmp_path))
    run = trainbus.RunInfo(id="r", started=RunStarted())
    sink = WandbSink(WandbOptions(project="other", tags=["a"]))
    sink.open(run)
    sink.close()
    assert "using the active W&B run as it is; ignored options: project, tags" in caplog.text
    mine.finish()


# Streams ------------------------------------------------------------------------------------------


def test_the_summary_has_the_position_of_each_stream(tmp_path: Path) -> None:
    """A process that continues the run finds there what it has of each stream."""
    records, *_ = samples.streams(tmp_path / "samples")
    sink = WandbSink(WandbOptions(mode="offline", dir=str(tmp_path)))
    sink.open(samples.run_info(records))
    sink.write(records)
    sink.close()
    run = wandb_file.read_finished(wandb_file.find_runs(tmp_path)[-1])
    main = max(record.position for record in records if not record.stream)
    expected = {"": main, "console-r0": (1, 6), "system-r0": (1, 6)}
    assert expected == session.stored(SimpleNamespace(summary=run.summary))


def test_a_summary_without_streams_is_read(tmp_path: Path) -> None:
    """Runs of older versions have the position of the main stream alone."""
    old = {"trainbus/attempt": 2, "trainbus/seq": 7}
    assert {"": (2, 7)} == session.stored(SimpleNamespace(summary=old))
    assert old == session.as_summary({"": (2, 7)})
    assert {} == session.stored(SimpleNamespace(summary={}))
