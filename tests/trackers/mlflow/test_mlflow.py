"""The `mlflow` sink, read back by a client of MLflow's own."""

from __future__ import annotations

import json
import math
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from trainbus.sinks.mlflow import MlflowOptions, MlflowSink
from urllib3.util.retry import Retry

import trainbus
from support.emitting import emit
from support.mlflow_server import Server, database
from support.records import CONTENT
from support.records import records as make_records
from trainbus import Bus, RunInfo, SinkError, config
from trainbus.delivery.retry import classify
from trainbus.events import (
    AlertRaised,
    ArtifactLogged,
    Best,
    CheckpointSaved,
    ConfusionMatrixLogged,
    CurveLogged,
    Event,
    Failure,
    HistogramLogged,
    ImageLogged,
    MetricsLogged,
    ModelDescribed,
    ParamsUpdated,
    RunEnded,
    RunStarted,
    TableLogged,
    TextLogged,
)
from trainbus.testing import SinkConformance, sample_records

# MLflow asks its database for what SQLAlchemy will no longer do.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


@pytest.fixture(autouse=True)
def _nothing_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow writes to the home directory and to the current one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


class TestMlflow(SinkConformance):
    package = "mlflow"
    extra = "mlflow"
    heavy = ("sqlalchemy", "pandas", "matplotlib", "PIL")
    stores = CONTENT

    def make(self, folder: Path) -> MlflowSink:
        return MlflowSink(options(folder))

    def read(self, folder: Path) -> object:
        return content(folder)


def options(folder: Path, **others: Any) -> MlflowOptions:
    """Return options for a database and files in a folder."""
    given = {"tracking_uri": database(folder), "artifact_location": str(folder / "artifacts")}
    return MlflowOptions(**{**given, **others})


def content(folder: Path, uri: str | None = None) -> list[dict[str, Any]]:
    """Return all that MLflow has of all runs, without its own ids."""
    from mlflow import MlflowClient

    client = MlflowClient(uri or database(folder))
    found = []
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            has_files = client.list_artifacts(run.info.run_id)
            root = Path(client.download_artifacts(run.info.run_id, "")) if has_files else folder
            found.append(
                {
                    "name": run.info.run_name,
                    "experiment": experiment.name,
                    "status": run.info.status,
                    "times": (run.info.start_time, run.info.end_time),
                    "params": run.data.params,
                    "tags": run.data.tags,
                    "metrics": {
                        name: sorted(
                            (m.step, m.timestamp, repr(m.value))
                            for m in client.get_metric_history(run.info.run_id, name)
                        )
                        for name in run.data.metrics
                    },
                    "files": {
                        str(path.relative_to(root)): path.read_bytes()
                        for path in sorted(root.rglob("*"))
                        if has_files and path.is_file()
                    },
                }
            )
    return sorted(found, key=lambda run: str(run["tags"]["trainbus.run"]))


RUN = RunInfo(id="run", started=RunStarted(name="a run", project="shapes"))


records = partial(make_records, time=1_700_000_000.5)


def stored(folder: Path, *events: Event, **others: Any) -> dict[str, Any]:
    """Store the events, and return what MLflow has."""
    sink = MlflowSink(options(folder, **others))
    sink.open(RUN)
    sink.write(records(*events))
    sink.close()
    (run,) = content(folder)
    return run


def epoch(number: int, **values: float) -> MetricsLogged:
    """Return metrics of an epoch."""
    return MetricsLogged(values=values, phase="train", epoch=number)


# Metrics ------------------------------------------------------------------------------------------


def test_metrics_have_their_values_steps_and_times(tmp_path: Path) -> None:
    """Values are exact; a step is the step, else the epochs done; the time is the record's."""
    run = stored(
        tmp_path,
        epoch(0, loss=0.1 + 0.2, tiny=5e-324),
        epoch(1, loss=math.nan, up=math.inf, down=-math.inf),
        MetricsLogged(values={"batch": 1.5}, phase="train", epoch=0, step=7),
        MetricsLogged(values={"map": 0.75}, phase="validation", final=True),
    )
    first, second = 1_700_000_001_500, 1_700_000_002_500
    largest = "1.7976931348623157e+308"
    assert {
        "loss": [(1, first, "0.30000000000000004"), (2, second, "nan")],
        "tiny": [(1, first, "5e-324")],
        "up": [(2, second, largest)],
        "down": [(2, second, f"-{largest}")],
        "batch": [(7, 1_700_000_003_500, "1.5")],
        "final/map": [(7, 1_700_000_004_500, "0.75")],
    } == run["metrics"]


def test_what_sums_up_stands_at_the_last_step(tmp_path: Path) -> None:
    """What has neither step nor epoch stands where the last metric does, after a restart too."""
    summary = MetricsLogged(values={"train_loss": 0.5}, phase="train")
    final = MetricsLogged(values={"f1": 0.75}, phase="test", final=True)
    made = records(
        RunStarted(),
        MetricsLogged(values={"loss": 1.0}, phase="train", epoch=0, step=40),
        TextLogged(key="note", text="at the end"),
        summary,
        final,
        RunEnded(status="finished", best=Best(metric="f1", value=0.75)),
    )
    for part in (made[:3], made[3:]):
        sink = MlflowSink(options(tmp_path))
        sink.open(RUN)
        sink.write(part)
        sink.close()
    (run,) = content(tmp_path)
    steps = {name: step for name, ((step, *_),) in run["metrics"].items()}
    assert {"loss": 40, "train_loss": 40, "final/f1": 40, "best/f1": 40} == steps
    assert ["text/note/000040-1.3.txt"] == [*run["files"]]


def test_an_end_and_a_new_start_come_together(tmp_path: Path) -> None:
    """A run that failed and went on is replayed at once: what is told of the end is the last."""
    error = Failure(type="E", message="no")
    sink = MlflowSink(options(tmp_path))
    sink.open(RUN)
    first = records(RunStarted(), RunEnded(status="failed", reason="E: no", error=error))
    sink.write([*first, *records(RunStarted(), RunEnded(status="finished"), attempt=2)])
    sink.close()
    (run,) = content(tmp_path)
    assert ("FINISHED", "finished", None) == (
        run["status"],
        run["tags"]["ended"],
        run["tags"].get("error"),
    )


def test_many_metrics_arrive(tmp_path: Path) -> None:
    """A record of more metrics than fit into a request, and many records, arrive whole."""
    many = {f"m{i}": float(i) for i in range(2500)}
    run = stored(tmp_path, epoch(0, **many), *(epoch(i, loss=i) for i in range(1, 700)))
    assert {name: [(1, 1_700_000_001_500, repr(v))] for name, v in many.items()} == {
        name: found for name, found in run["metrics"].items() if name != "loss"
    }
    assert [i + 1 for i in range(1, 700)] == [step for step, *_ in run["metrics"]["loss"]]
    assert "1.700.700" == run["tags"]["trainbus.position"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train/loss", r"train/loss"),
        ("a b-c_d.e:f", r"a b-c_d\.e:f"),
        ("métrique/µ", r"métrique/µ"),
        ("mAP50(B)", r"mAP50_B__\w{6}"),
        ("/a//b/", r"a/b_\w{6}"),
        ("../../x", r"x_\w{6}"),
        ("a\n", r"a__\w{6}"),
        ("", r"_\w{6}"),
        ("x" * 300, r"x{243}_\w{6}"),
    ],
)
def test_names_are_made_valid(tmp_path: Path, name: str, expected: str) -> None:
    """MLflow takes every name, whether of a metric, a parameter or a tag."""
    started = RunStarted(params={name: 1}, tags=[name])
    run = stored(tmp_path, started, MetricsLogged(values={name: 1.0}, phase="train"))
    (metric,), (param,) = run["metrics"], run["params"]
    assert re.fullmatch(expected, metric), metric
    assert metric == param
    assert "true" == run["tags"][metric]


def test_names_that_differ_stay_two(tmp_path: Path) -> None:
    """Names that would be the same once made valid are told apart."""
    run = stored(tmp_path, MetricsLogged(values={"a(b": 1, "a)b": 2, "a_b": 3}, phase="train"))
    assert ["1.0", "2.0", "3.0"] == sorted(v for ((_, _, v),) in run["metrics"].values())


# Parameters ---------------------------------------------------------------------------------------


def test_parameters_are_flat_and_whole(tmp_path: Path) -> None:
    """Nested ones have dotted names, and any number of them arrives."""
    many = {f"p{i}": i for i in range(300)}
    params = {"lr": 0.1, "nested": {"deep": {"list": [1, None]}}, "none": None, "empty": "", **many}
    run = stored(tmp_path, RunStarted(params=params))
    expected = {"lr": "0.1", "nested.deep.list": "[1, None]", "none": "None", "empty": ""}
    assert {**expected, **{name: str(i) for name, i in many.items()}} == run["params"]


def test_long_parameters_are_cut_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A value that is longer than MLflow keeps is cut, and half characters do no harm."""
    run = stored(tmp_path, RunStarted(params={"long": "µ" * 6001, "half": "a\ud800b"}))
    assert {"long": "µ" * 6000, "half": "a\\ud800b"} == run["params"]
    assert "'long': MLflow keeps 6000 of 6001 characters" in caplog.text


def test_parameters_that_change_become_tags(tmp_path: Path) -> None:
    """MLflow's parameters can't change: new ones are added, and the last value is in a tag."""
    run = stored(
        tmp_path,
        RunStarted(params={"batch": -1, "same": 1}),
        ParamsUpdated(params={"batch": 16, "same": 1, "new": {"a": 2}}),
        ParamsUpdated(params={"batch": 32}),
    )
    assert {"batch": "-1", "same": "1", "new.a": "2"} == run["params"]
    updated = {name: v for name, v in run["tags"].items() if name.startswith("updated/")}
    assert {"updated/batch": "32"} == updated


# The run ------------------------------------------------------------------------------------------


def test_the_run_says_what_it_is(tmp_path: Path) -> None:
    """Name, project, notes, tags and what the trainer says of itself are there."""
    started = RunStarted(
        tags=["fast"], notes="two\nlines", group="g", framework="keras", task="detect"
    )
    run = stored(tmp_path, started, tags={"team": "a"})
    assert ("a run", "shapes", "RUNNING") == (run["name"], run["experiment"], run["status"])
    expected = {"fast": "true", "mlflow.note.content": "two\nlines", "group": "g", "team": "a"}
    expected |= {"framework": "keras", "task": "detect", "trainbus.run": "run"}
    assert expected.items() <= run["tags"].items()


def test_options_win_over_the_training(tmp_path: Path) -> None:
    """The experiment and the name of the configuration are what MLflow gets."""
    run = stored(tmp_path, RunStarted(), experiment="mine", run_name="my run")
    assert ("mine", "my run") == (run["experiment"], run["name"])


@pytest.mark.parametrize(
    ("status", "expected"), [("finished", "FINISHED"), ("failed", "FAILED"), ("stopped", "KILLED")]
)
def test_a_run_ends_as_the_training_did(tmp_path: Path, status: str, expected: str) -> None:
    """Status, end, reason, error and best value are MLflow's."""
    failure = Failure(type="ValueError", message="no", traceback="Traceback …")
    best = Best(metric="map", value=0.5, epoch=3)
    error = None if status == "finished" else failure
    end = msgspec.convert({"status": status, "reason": "why"}, type=dict)
    run = stored(tmp_path, RunStarted(), RunEnded(**end, error=error, best=best))
    assert (expected, "why") == (run["status"], run["tags"]["ended"])
    assert (1_700_000_001_500, 1_700_000_002_500) == run["times"]
    assert [(4, 1_700_000_002_500, "0.5")] == run["metrics"]["best/map"]
    assert (None if error is None else "ValueError: no") == run["tags"].get("error")
    assert (None if error is None else "Traceback …".encode()) == run["files"].get(
        "errors/attempt-1.txt"
    )


def test_a_resumed_training_goes_on_in_its_run(tmp_path: Path) -> None:
    """A second attempt adds to the run of the first, whose failure is over."""
    failed = RunEnded(status="failed", error=Failure(type="E", message="no"))
    first = records(RunStarted(params={"epochs": 1}), epoch(0, loss=1.0), failed)
    second = records(
        RunStarted(params={"epochs": 2}),
        epoch(1, loss=0.5),
        RunEnded(status="finished"),
        attempt=2,
        first=1,
    )
    for attempt, batch in ((1, first), (2, second)):
        sink = MlflowSink(options(tmp_path))
        sink.open(msgspec.structs.replace(RUN, attempt=attempt))
        sink.write(batch)
        sink.close()
    (run,) = content(tmp_path)
    assert [(1, "1.0"), (2, "0.5")] == [(step, v) for step, _, v in run["metrics"]["loss"]]
    assert ("1", "2") == (run["params"]["epochs"], run["tags"]["updated/epochs"])
    assert ("FINISHED", "finished") == (run["status"], run["tags"]["ended"])
    assert "error" not in run["tags"]


@pytest.mark.parametrize("kept", [1, 5, 17, 30])
def test_an_abandoned_sink_leaves_nothing_twice(tmp_path: Path, kept: int) -> None:
    """A process that was killed is gone on with: all is there once, as if it had not been."""
    sample = sample_records(tmp_path / "samples")
    info = RunInfo(id=sample[0].run, started=RunStarted(project="conformance"))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder, parts in ((whole, [sample]), (cut, [sample[:kept], sample])):
        folder.mkdir()
        for number, part in enumerate(parts):
            sink = MlflowSink(options(folder))  # and never closed
            sink.open(msgspec.structs.replace(info, reopened=number > 0))
            sink.write(part)
    assert content(whole) == content(cut)


@pytest.mark.parametrize("call", ["log_batch", "log_artifact", "log_artifacts"])
def test_a_batch_that_fails_in_its_middle_is_there_once(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes again after a request or its answer was lost is complete, and there once."""
    from mlflow import MlflowClient

    sample = sample_records(tmp_path / "samples")
    info = RunInfo(id=sample[0].run, started=RunStarted(project="conformance"))
    real = getattr(MlflowClient, call)
    contents = []
    for times in (0, 3):
        folder = tmp_path / str(times)
        folder.mkdir()
        sink = MlflowSink(options(folder))
        sink.open(info)
        failures = iter(range(times))

        def fails(self: Any, *args: Any, left: Iterator[int] = failures, **named: Any) -> None:
            is_lost = next(left, None) is not None
            if call == "log_batch" or not is_lost:
                real(self, *args, **named)
            if is_lost:
                raise ConnectionResetError("the network is gone")

        with monkeypatch.context() as faults:
            faults.setattr(MlflowClient, call, fails)
            for _ in range(times):
                with pytest.raises(ConnectionResetError):
                    sink.write(sample)
            sink.write(sample)
        contents.append(content(folder))
    assert contents[0] == contents[1]


# Pictures, tables, texts --------------------------------------------------------------------------


def test_pictures_are_in_the_grid_of_pictures(tmp_path: Path) -> None:
    """A picture has the names that MLflow's pages look for, with its step and its time."""
    from PIL import Image

    pixels = np.zeros((3, 600, 3), dtype=np.uint8)
    pixels[0, 0] = (255, 0, 7)
    run = stored(tmp_path, ImageLogged(key="val/batch (1)", array=pixels, epoch=4))
    small, large = run["files"]
    stem = r"images/val~batch _1__\w{6}\+step\+5\+timestamp\+1700000001500\+[0-9a-f-]{36}"
    assert re.fullmatch(stem + r"\+compressed\.webp", small), small
    assert re.fullmatch(stem + r"\.png", large), large
    sizes = []
    for name in (small, large):
        (tmp_path / "found").write_bytes(run["files"][name])
        with Image.open(tmp_path / "found") as image:
            sizes.append(image.size)
            first = image.getpixel((0, 0))
    assert ([(256, 1), (600, 3)], (255, 0, 7)) == (sizes, first)
    assert "True" == run["tags"]["mlflow.loggedImages"]


def test_curves_matrices_and_histograms_are_pictures_and_numbers(tmp_path: Path) -> None:
    """Each is drawn, and its numbers are beside it as JSON."""
    x = np.linspace(0, 1, 3)
    run = stored(
        tmp_path,
        CurveLogged(key="pr", x=x, y=np.stack([x, [0, math.nan, 1]]), classes=["a", "b"], epoch=0),
        ConfusionMatrixLogged(key="cm", matrix=np.eye(2, dtype=int), classes=["a", "b"], epoch=1),
        HistogramLogged(key="h", counts=np.array([3, 4]), edges=np.arange(3.0), step=9),
    )
    pngs = [name for name in run["files"] if name.endswith(".png")]
    assert ["cm", "h", "pr"] == sorted(name.split("/")[1].split("+")[0] for name in pngs)
    read = {name: json.loads(data) for name, data in run["files"].items() if "data/" in name}
    curve = read["data/pr/000001-1.1.json"]["event"]
    assert [[0, 0.5, 1], [0, "NaN", 1]] == curve["y"]["data"]
    assert [[1, 0], [0, 1]] == read["data/cm/000002-1.2.json"]["event"]["matrix"]["data"]
    assert [3, 4] == read["data/h/000009-1.3.json"]["event"]["counts"]["data"]


def test_tables_are_mlflows_own(tmp_path: Path) -> None:
    """Each table is listed and laid out as `log_table` does it; one logged twice is two."""
    import mlflow

    def table(text: str) -> TableLogged:
        return TableLogged(key="t(1)", columns=["text", "n"], rows=[[text, 1], ["µ", math.nan]])

    run = stored(tmp_path, table("a"), table("b"))
    listed = json.loads(run["tags"]["mlflow.loggedArtifacts"])
    assert sorted(run["files"]) == [entry["path"] for entry in listed]
    client = mlflow.MlflowClient(database(tmp_path))
    experiment = client.get_experiment_by_name("shapes")
    assert experiment is not None
    (info,) = client.search_runs([experiment.experiment_id])
    for entry, text in zip(listed, "ab", strict=True):
        path = client.download_artifacts(info.info.run_id, entry["path"])
        read = json.loads(Path(path).read_text())
        assert {"columns": ["text", "n"], "data": [[text, 1], ["µ", "NaN"]]} == read


def test_texts_and_alerts_are_files(tmp_path: Path) -> None:
    """A text is a file of its own each time; the last alert is a tag as well."""
    run = stored(
        tmp_path,
        TextLogged(key="note", text="one\r\nµ", epoch=0),
        TextLogged(key="note", text="two\ud800", epoch=0),
        AlertRaised(title="wärning", text="two\nlines", level="warning"),
    )
    assert {
        "text/note/000001-1.1.txt": "one\r\nµ".encode(),
        "text/note/000001-1.2.txt": b"two\\ud800",
        "alerts/000000-1.3.txt": "warning: wärning\ntwo\nlines".encode(),
    } == run["files"]
    assert "warning: wärning" == run["tags"]["alert"]


def test_what_can_not_be_shown_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Files that are gone and pictures that are none cost only themselves."""
    (tmp_path / "no.png").write_text("no picture")
    sink = MlflowSink(options(tmp_path))
    sink.open(RUN)
    sink.write(
        records(
            ImageLogged(key="gone", path=str(tmp_path / "gone.png")),
            ImageLogged(key="none", path=str(tmp_path / "no.png")),
            ImageLogged(key="cube", array=np.zeros((2, 2, 9))),
            CheckpointSaved(path=str(tmp_path / "gone.pt"), kind="best"),
            ArtifactLogged(name="gone", paths=[str(tmp_path / "gone.bin")]),
            epoch(0, loss=1.0),
        )
    )
    sink.close()
    (run,) = content(tmp_path)
    assert (5, {}, {"loss"}) == (sink.lost, run["files"], set(run["metrics"]))
    assert "'gone' can't be shown in MLflow: " in caplog.text
    assert "checkpoint.best" not in run["tags"]


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("save", "expected"),
    [
        ("none", []),
        ("best", ["best/best.pt"]),
        ("last", ["last/last.pt"]),
        ("all", ["best/best.pt", "epoch-1/e.pt", "epoch-2/e.pt", "last/last.pt"]),
    ],
)
def test_save_checkpoints_chooses(tmp_path: Path, save: str, expected: Sequence[str]) -> None:
    """`best`, `last`, `all` or `none` are kept; `best` keeps the last one until one is best."""
    kinds: dict[Any, str] = {"last": "last.pt", "best": "best.pt", "periodic": "e.pt"}
    sink = MlflowSink(options(tmp_path, save_checkpoints=save))
    sink.open(RUN)
    for number in range(2):
        for seq, (kind, name) in enumerate(kinds.items(), 1):
            (tmp_path / name).write_text(f"{kind} {number}")
            event = CheckpointSaved(
                path=str(tmp_path / name), kind=kind, epoch=number, metrics={"fit": math.nan}
            )
            sink.write(records(event, first=3 * number + seq))
    if save == "none":
        sink.write(records(epoch(0, loss=1.0), first=9))
    (run,) = content(tmp_path)
    assert [f"checkpoints/{name}" for name in expected] == sorted(run["files"])
    if "best/best.pt" in expected:
        assert b"best 1" == run["files"]["checkpoints/best/best.pt"]
        about = {"path": "checkpoints/best/best.pt", "epoch": 1, "metrics": {"fit": "NaN"}}
        assert about == json.loads(run["tags"]["checkpoint.best"])


def test_only_the_newest_best_is_kept(tmp_path: Path) -> None:
    """Of checkpoints that each have a folder, as those of transformers, the last best one stays."""
    sink = MlflowSink(options(tmp_path))
    sink.open(RUN)
    for number in (1, 2, 3):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "model.bin").write_text(str(number))
        (folder / "optimizer.pt").write_text(str(number))
        saved = [CheckpointSaved(path=str(folder), kind=kind, step=number, final=True)
                 for kind in ("last", "best")]  # fmt: skip
        sink.write(records(*saved, first=2 * number))
    sink.close()
    (run,) = content(tmp_path)
    place = "checkpoints/best/checkpoint-3"
    assert {f"{place}/{n}": b"3" for n in ("model.bin", "optimizer.pt")} == run["files"]
    assert {"checkpoint.best"} == {name for name in run["tags"] if name.startswith("checkpoint.")}
    assert (place, 0) == (json.loads(run["tags"]["checkpoint.best"])["path"], sink.lost)


def test_one_file_is_kept_once(tmp_path: Path) -> None:
    """A best file that comes again as its copy, or a folder for several purposes, is there once."""
    for name in ("epoch=1.ckpt", "epoch_1.ckpt", "checkpoint-1"):
        (tmp_path / name).write_text("weights")

    def saved(name: str, kind: Any, *, final: bool) -> CheckpointSaved:
        return CheckpointSaved(path=str(tmp_path / name), kind=kind, epoch=0, final=final)

    best = [saved("epoch=1.ckpt", "best", final=False), saved("epoch_1.ckpt", "best", final=True)]
    assert ["checkpoints/best/epoch=1.ckpt"] == [*stored(tmp_path, *best)["files"]]
    (tmp_path / "all").mkdir()
    same = [saved("checkpoint-1", kind, final=True) for kind in ("periodic", "best", "last")]
    run = stored(tmp_path / "all", *same, save_checkpoints="all")
    assert ["checkpoints/epoch-1/checkpoint-1"] == [*run["files"]]
    tags = [json.loads(run["tags"][f"checkpoint.{kind}"])["path"] for kind in ("best", "last")]
    assert ["checkpoints/epoch-1/checkpoint-1"] * 2 == tags


def test_a_superseded_best_is_no_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A best file that the training removed for a better one is not missed; the last one is."""
    (tmp_path / "2.pt").write_text("better")
    best = [
        CheckpointSaved(path=str(tmp_path / f"{n}.pt"), kind="best", epoch=n) for n in (1, 2, 3)
    ]
    for expected, events in ((0, best[:2]), (1, best)):
        (tmp_path / str(expected)).mkdir()
        sink = MlflowSink(options(tmp_path / str(expected)))
        sink.open(RUN)
        sink.write(records(*events, RunEnded(status="finished")))
        assert expected == sink.lost
        sink.close()
        (run,) = content(tmp_path / str(expected))
        assert (expected, ["checkpoints/best/2.pt"]) == (sink.lost, [*run["files"]])
    assert ["3.pt"] == re.findall(r"no file at .*?(\d\.pt)", caplog.text)


def test_artifacts_keep_files_folders_and_metadata(tmp_path: Path) -> None:
    """Files of one name are told apart, a folder is kept whole, and metadata is a tag."""
    for name in ("a/x.bin", "b/x.bin", "c/d/y.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    run = stored(
        tmp_path,
        ArtifactLogged(name="two", paths=[str(tmp_path / p / "x.bin") for p in "ab"]),
        ArtifactLogged(name="one", kind="dataset", paths=[str(tmp_path / "c")], aliases=["v1"]),
    )
    assert {
        "artifacts/two/a/x.bin": b"a/x.bin",
        "artifacts/two/b/x.bin": b"b/x.bin",
        "artifacts/one/c/d/y.bin": b"c/d/y.bin",
    } == run["files"]
    assert {"kind": "dataset", "aliases": ["v1"]} == json.loads(run["tags"]["artifact/one"])


def test_the_model_is_described(tmp_path: Path) -> None:
    """Sizes are metrics, so that runs can be ordered by them, and classes are a file."""
    described = ModelDescribed(parameters=2**40, speed_ms={"inference": 1.5}, classes=["cat", "µ"])
    run = stored(tmp_path, described)
    expected = {"model/parameters": "1099511627776.0", "model/speed_inference_ms": "1.5"}
    assert expected == {name: v for name, ((_, _, v),) in run["metrics"].items()}
    assert {"classes": ["cat", "µ"]} == json.loads(run["files"]["model/classes.json"])


# Configuration ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tracking_uri: ./mlruns", "tracking_uri: .*sqlite:///mlflow.db"),
        ("tracking_uri: file:/x", "tracking_uri: .*no longer has a store of plain files"),
        ("experiment: ' '", "experiment: .*MLflow experiment name"),
        ("save_checkpoints: some", "save_checkpoints: "),
        ("tags: [a]", "tags: "),
        ("experimnt: x", "experiment"),
    ],
)
def test_faults_of_the_configuration_are_named(line: str, message: str) -> None:
    """What MLflow would refuse is an error of the file, with what is expected."""
    with pytest.raises(trainbus.ConfigError, match=message):
        config.loads(f"sinks:\n  m:\n    type: mlflow\n    {line}\n")


def configured(folder: Path, uri: str, others: str = "") -> Bus:
    """Return the bus of a YAML text, whose sinks live in a process of their own."""
    return config.loads(
        f"sinks:\n  m:\n    type: mlflow\n    tracking_uri: {uri}\n    experiment: e\n{others}"
        f"flush_secs: 90\njournal:\n  dir: {folder}/journal\n"
    )


def test_a_bus_of_a_file_feeds_mlflow(tmp_path: Path) -> None:
    """A configured bus, with the sink in a process of its own, leaves a whole run."""
    uri = database(tmp_path)
    (tmp_path / "m.pt").write_text("weights")
    with configured(tmp_path, uri) as bus, bus.run(name="mine", params={"lr": 0.1}) as run:
        for number in run.epochs(3):
            run.log({"loss": 1 / (number + 1)})
        run.checkpoint(tmp_path / "m.pt", kind="best")
    (report,) = bus.receipts[0].sinks
    assert (None, 0, 0, 0) == (report.error, report.dead, report.pending, report.lost)
    assert f"mlflow ui --backend-store-uri {uri}" == report.location
    (found,) = content(tmp_path)
    assert ("mine", "FINISHED", {"lr": "0.1"}) == (found["name"], found["status"], found["params"])
    assert [1, 2, 3] == [step for step, *_ in found["metrics"]["train/loss"]]
    assert {"checkpoints/best/m.pt": b"weights"} == found["files"]


def test_the_environment_names_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an option it is MLFLOW_TRACKING_URI, and `where` shows the whole path."""
    database(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    sink = MlflowSink()
    sink.open(RUN)
    sink.write(records(RunStarted()))
    sink.close()
    assert f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db" == sink.location
    assert ["a run"] == [run["name"] for run in content(tmp_path)]


def test_the_environment_names_the_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an option it is MLFLOW_EXPERIMENT_NAME or _ID, and only then the project."""
    from mlflow import MlflowClient

    def experiment(**given: Any) -> str:
        return str(stored(tmp_path / given.pop("to"), RunStarted(), **given)["experiment"])

    for name in "abc":
        (tmp_path / name).mkdir()
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "by name")
    assert "by name" == experiment(to="a")
    assert "mine" == experiment(to="b", experiment="mine")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    number = MlflowClient(database(tmp_path / "c")).create_experiment("by number")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", number)
    assert "by number" == experiment(to="c")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "77")
    with pytest.raises(SinkError, match="77"):
        experiment(to="c")


_SCRIPT = r"""
import os, sys
from trainbus import config
folder, other = sys.argv[1:]
os.chdir(other)
text = f"sinks: {{m: {{type: mlflow, tracking_uri: 'sqlite:///{folder}/mlflow.db'}}}}"
with config.loads(text + f"\njournal: {{dir: {folder}/journal}}") as bus, bus.run() as run:
    run.log({"loss": 1.0})
(report,) = bus.receipts[0].sinks
assert report.pending == 0, report
"""


def test_the_context_is_that_of_the_training(tmp_path: Path) -> None:
    """User, script and commit are noted as by `mlflow.start_run`, from another folder too."""
    project, other = tmp_path / "project", tmp_path / "other"
    for folder in (project, other):
        folder.mkdir()
        (folder / "train.py").write_text(_SCRIPT if folder == project else "")
        git = ("git", "-C", str(folder), "-c", "user.name=me", "-c", "user.email=me@here")
        subprocess.run([*git, "init", "-q", "-b", folder.name], check=True)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "-m", folder.name], check=True)
    commit = subprocess.check_output(["git", "-C", str(project), "rev-parse", "HEAD"], text=True)
    database(tmp_path)
    given = [sys.executable, "train.py", str(tmp_path), str(other)]
    subprocess.run(given, cwd=project, env={**os.environ, "LOGNAME": "somebody"}, check=True)
    (run,) = content(tmp_path)
    assert {
        "mlflow.user": "somebody",
        "mlflow.source.name": "train.py",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": commit.strip(),
        "mlflow.source.git.branch": "project",
    } == {n: v for n, v in run["tags"].items() if re.match(r"mlflow\.(user|source)", n)}


def test_a_run_of_the_users_is_not_touched(tmp_path: Path) -> None:
    """MLflow's active run, its address and its settings are the same before and after."""
    import mlflow

    uri = mlflow.get_tracking_uri()
    stored(tmp_path, RunStarted(), epoch(0, loss=1.0), RunEnded(status="finished"))
    assert (uri, None) == (mlflow.get_tracking_uri(), mlflow.active_run())


# Faults -------------------------------------------------------------------------------------------


def test_a_deleted_experiment_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    """MLflow refuses runs in an experiment that was deleted."""
    from mlflow import MlflowClient

    client = MlflowClient(database(tmp_path))
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(SinkError, match=r"'gone' is deleted; .*mlflow experiments restore -x 1"):
        MlflowSink(options(tmp_path, experiment="gone")).open(RUN)


def test_a_database_that_fails_is_tried_again(tmp_path: Path) -> None:
    """MLflow tells an error of the database from a bad record; the former may pass."""
    sink = MlflowSink(options(tmp_path))
    sink.open(RUN)
    sink.write(records(RunStarted()))
    with sqlite3.connect(tmp_path / "mlflow.db") as other:
        other.execute("ALTER TABLE metrics RENAME TO elsewhere")
    with pytest.raises(SinkError) as raised:
        sink.write(records(epoch(0, loss=1.0), first=2))
    assert "retry" == classify(raised.value)
    with sqlite3.connect(tmp_path / "mlflow.db") as other:
        other.execute("ALTER TABLE elsewhere RENAME TO metrics")
    sink.write(records(epoch(0, loss=1.0), first=2))
    (run,) = content(tmp_path)
    assert 1 == len(run["metrics"]["loss"])


def test_a_server_that_is_down_is_noticed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is one line without the password, and the bus is told to try again."""
    server = Server(tmp_path)
    uri = server.uri.replace("//", "//me:secret@")
    waits: list[object] = []
    monkeypatch.setattr(Retry, "sleep", lambda *given: waits.append(given))
    with pytest.raises(SinkError, match=f"no MLflow server answers at {server.uri} ") as raised:
        MlflowSink(MlflowOptions(tracking_uri=uri)).open(RUN)
    assert [] == waits
    assert "retry" == classify(raised.value)
    assert "secret" not in str(raised.value)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server that is up, and stopped in the end."""
    made = Server(tmp_path)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def test_a_server_that_is_away_for_a_while_loses_nothing(tmp_path: Path, server: Server) -> None:
    """What was logged while it was stopped is there once it is back: all of it, and once.

    Meanwhile the training and the other sinks go on.
    """
    file = tmp_path / "records.jsonl"
    bus = configured(tmp_path, server.uri, f"  file:\n    type: jsonl\n    path: {file}\n")
    heard: list[Any] = []
    bus.subscribe(heard.append)
    odd = {"nan": math.nan, "inf": math.inf, "minus": -math.inf, "µ": -0.0}
    with bus, bus.run(name="served", params={"lr": 0.1, "empty": "", "µ": "µ" * 10}) as run:
        for number in run.epochs(6):
            if number == 2:
                wait_for(lambda: len(history(tmp_path)) == 2)
                server.stop()
            if number == 4:
                wait_for(lambda: len(file.read_bytes().splitlines()) == len(heard))
                assert 2 == len(history(tmp_path))
                server.start()
            run.log({"loss": float(number), **odd})
            run.image("a picture/µ", np.zeros((4, 4), dtype=np.uint8))
            run.text("note", f"text {number}")
    report, other = bus.receipts[0].sinks
    assert (0, 0, 0) == (report.dead, report.pending, report.lost)
    assert (len(heard), 0) == (other.taken, other.pending)
    assert re.fullmatch(rf"{server.uri}/#/experiments/1/runs/\w+", report.location or "")
    (found,) = content(tmp_path, server.uri)
    assert ("served", "FINISHED") == (found["name"], found["status"])
    assert {"lr": "0.1", "empty": "", "µ": "µ" * 10} == found["params"]
    assert list(range(1, 7)) == history(tmp_path)
    largest = "1.7976931348623157e+308"
    odds = [("nan", "nan"), ("inf", largest), ("minus", f"-{largest}"), ("µ", "0.0")]
    for name, value in odds:
        assert [value] * 6 == [v for _, _, v in found["metrics"][f"train/{name}"]]
    texts = [data.decode() for name, data in found["files"].items() if name.startswith("text/")]
    assert [f"text {i}" for i in range(6)] == texts
    assert 6 == sum(name.endswith(".png") for name in found["files"])


def history(folder: Path) -> list[int]:
    """Return the steps of the loss, as the database has them."""
    with sqlite3.connect(folder / "mlflow.db") as connection:
        query = "SELECT step FROM metrics WHERE key = 'train/loss' ORDER BY step"
        return [step for (step,) in connection.execute(query)]


def wait_for(condition: Any, deadline_s: float = 30.0) -> None:
    """Wait until something is true."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)


def test_what_is_relative_lies_beside_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Database and files of a sink in the training process are in the folder of the file."""
    conf, elsewhere = tmp_path / "conf", tmp_path / "elsewhere"
    conf.mkdir()
    elsewhere.mkdir()
    database(conf)
    sinks = {"registry": {"type": "mlflow"}}
    text = {"isolation": "inline", "journal": {"dir": "runs"}, "sinks": sinks}
    (conf / "bus.yaml").write_text(json.dumps(text))
    monkeypatch.chdir(elsewhere)
    with trainbus.load("../conf/bus.yaml") as bus:
        emit(bus, RunStarted(name="r", project="p"))
        emit(bus, TextLogged(key="notes", text="hello"))
    (report,) = bus.receipts[0].sinks
    assert 0 == report.pending, report.error
    assert [] == list(elsewhere.iterdir())
    assert ["hello"] == [
        path.read_text() for path in conf.glob("mlruns/p/*/artifacts/text/**/*.txt")
    ]
    assert f"sqlite:///{conf}/mlflow.db" in (report.location or "")
