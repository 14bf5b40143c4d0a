"""The `trackio` sink, read back from Trackio's database by Trackio."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trackio
import trackio.fragments
from trackio.sqlite_storage import SQLiteStorage
from trainbus.sinks.trackio import TrackioOptions, TrackioSink

import trainbus
from support.records import CONTENT, records
from trainbus import config
from trainbus.events import (
    AlertRaised,
    ArtifactLogged,
    CheckpointSaved,
    ConfusionMatrixLogged,
    CurveLogged,
    Event,
    HistogramLogged,
    ImageLogged,
    MetricsLogged,
    ModelDescribed,
    ParamsUpdated,
    Resumed,
    RunEnded,
    RunStarted,
    TableLogged,
    TextLogged,
)
from trainbus.testing import SinkConformance

UNREPEATABLE = {"_Created", "created_at"}
RUN = trainbus.RunInfo(id="run", started=RunStarted(project="p", name="shown"))


def keep_in(folder: Path) -> None:
    """Have Trackio store in a folder, as if it had been imported with `TRACKIO_DIR`."""
    folders = {"TRACKIO_DIR": folder, "MEDIA_DIR": folder / "media"}
    folders["ARTIFACTS_DIR"] = folder / "artifacts"
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "trackio":
            for constant, path in folders.items():
                if constant in vars(module):
                    setattr(module, constant, path)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test stores below its own folder, and no more is looked for."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRACKIO_SQLITE_SYNCHRONOUS", "off")  # no test cuts the power
    before = trackio.utils.TRACKIO_DIR
    keep_in(tmp_path)
    yield
    keep_in(before)


def value_of(value: Any) -> Any:
    """Return a value of a row; a picture as the hash of its file, and without its random name."""
    if isinstance(value, dict) and value.get("_type") == "trackio.image":
        content = (trackio.utils.MEDIA_DIR / value["file_path"]).read_bytes()
        return {"image": hashlib.sha256(content).hexdigest(), "caption": value["caption"]}
    return value


def stored(folder: Path, project: str) -> dict[str, Any]:
    """Return what Trackio has of a project, with the runs by their ids."""
    keep_in(folder)
    found: dict[str, Any] = {"artifacts": {}}
    for run in SQLiteStorage.get_run_records(project):
        logs = SQLiteStorage.get_logs(project, run["name"], run_id=run["id"])
        shown = [{k: value_of(v) for k, v in row.items()} for row in logs]
        settings = SQLiteStorage.get_run_config(project, run_id=run["id"]) or {}
        found[run["id"]] = {
            "name": run["name"],
            "rows": [row for row in shown if row.keys() - {"step", "timestamp"}],
            "system": SQLiteStorage.get_system_logs(project, run["name"], run_id=run["id"]),
            "config": {k: v for k, v in settings.items() if k not in UNREPEATABLE},
            "alerts": SQLiteStorage.get_alerts(project, run_id=run["id"]),
        }
    for artifact in SQLiteStorage.list_artifacts(project):
        name = artifact["name"]
        manifest = SQLiteStorage.get_artifact_manifest(project, name, "latest")
        found["artifacts"][name] = {
            "type": artifact["type"],
            "versions": len(artifact["versions"]),
            "aliases": sorted(manifest["aliases"]),
            "files": {entry["path"]: entry["digest"] for entry in manifest["manifest"]},
            "metadata": manifest["metadata"],
        }
    return found


class TestTrackio(SinkConformance):
    """Trackio's own database holds each record once."""

    package = "trackio"
    extra = "trackio"
    heavy = ("matplotlib", "PIL")
    stores = CONTENT

    def make(self, folder: Path) -> TrackioSink:
        """Store in a folder of the suite's."""
        keep_in(folder)
        return TrackioSink(TrackioOptions(dir=str(folder)))

    def read(self, folder: Path) -> object:
        """Read all projects of a folder."""
        keep_in(folder)
        return {name: stored(folder, name) for name in SQLiteStorage.get_projects()}


def opened(folder: Path, run: trainbus.RunInfo = RUN, **options: Any) -> TrackioSink:
    """Return an open sink that stores in a folder."""
    keep_in(folder)
    sink = TrackioSink(TrackioOptions(**options))
    sink.open(run)
    return sink


def log(folder: Path, *events: Event, **options: Any) -> dict[str, Any]:
    """Log events to a run, and return what Trackio has of it."""
    sink = opened(folder, **options)
    sink.write(records(RUN.started, *events))
    sink.close()
    found = stored(folder, "p")
    return {**found["run"], **found}


def metric(value: float, *, name: str = "loss", **more: Any) -> MetricsLogged:
    """Return one training metric."""
    return MetricsLogged(values={name: value}, phase="train", **more)


def test_metrics_keep_their_values_and_steps(tmp_path: Path) -> None:
    """A step is the axis where there is one, else the epochs done; no value is too odd."""
    found = log(
        tmp_path,
        metric(0.1 + 0.2, step=7, epoch=0),
        metric(math.nan, epoch=0),
        metric(math.inf, epoch=1),
        metric(-math.inf, epoch=2),
        metric(5e-324, epoch=3),
        metric(0.5, name="acc", final=True),
    )
    rows = [(row["step"], row.get("loss", row.get("final/acc"))) for row in found["rows"]]
    expected = [(7, 0.1 + 0.2), (1, math.nan), (2, math.inf), (3, -math.inf), (4, 5e-324), (7, 0.5)]
    assert str(sorted(expected, key=str)) == str(sorted(rows, key=str))


def test_what_sums_up_stands_at_the_last_step(tmp_path: Path) -> None:
    """What has neither step nor epoch stands at the last step, after a restart too."""
    made = records(
        RUN.started,
        metric(1.0, step=40, epoch=0),
        metric(0.5, name="train_loss"),
        TextLogged(key="note", text="at the end"),
    )
    for part in (made[:2], made[2:]):
        sink = opened(tmp_path)
        sink.write(part)
        sink.close()
    rows = stored(tmp_path, "p")["run"]["rows"]
    steps = {name: row["step"] for row in rows for name in row.keys() - {"step", "timestamp"}}
    assert {"loss": 40, "train_loss": 40, "note": 40} == steps


def test_a_superseded_best_is_no_loss(tmp_path: Path) -> None:
    """A best file that the training removed for a better one is not missed; the last one is."""
    (tmp_path / "2.pt").write_text("better")
    best = [CheckpointSaved(path=str(tmp_path / f"{n}.pt"), kind="best") for n in (1, 2, 3)]
    for expected, events in ((0, best[:2]), (1, best)):
        sink = opened(tmp_path / str(expected))
        sink.write(records(RUN.started, *events))
        sink.close()
        (artifact,) = stored(tmp_path / str(expected), "p")["artifacts"].values()
        assert (expected, ["2.pt"]) == (sink.lost, [*artifact["files"]])


def test_rows_have_the_time_of_their_records(tmp_path: Path) -> None:
    """What comes late, after a crash, is shown where it was measured."""
    (row,) = log(tmp_path, metric(1.0, step=1))["rows"]
    assert "1970-01-01T00:00:03+00:00" == row["timestamp"]


def test_system_metrics_have_no_steps(tmp_path: Path) -> None:
    """What is measured of the machine stands on Trackio's axis of time."""
    found = log(tmp_path, MetricsLogged(values={"gpu": 9.5}, phase="system"))
    assert [9.5] == [row["gpu"] for row in found["system"]]
    assert [] == found["rows"]


def test_names_stay_apart(tmp_path: Path) -> None:
    """Names that Trackio keeps for itself are changed, and two never become one."""
    names = [
        "step",
        "step_",
        "timestamp",
        "__x",
        "x",
        "métrique/µ",
        "",
        "a" * 400,
        "a" * 401,
        "time",
        "epoch",
    ]
    values = {name: float(i) for i, name in enumerate(names)}
    (row,) = log(tmp_path, MetricsLogged(values=values, phase="train", step=3))["rows"]
    assert 3 == row["step"]
    found = {k: v for k, v in row.items() if k not in ("step", "timestamp")}
    assert sorted(values.values()) == sorted(found.values())
    assert (5.0, 4.0) == (found["métrique/µ"], found["x"])


def test_parameters_are_in_the_config(tmp_path: Path) -> None:
    """Nested, long, huge and reserved ones too, and what was changed later."""
    params = {
        "a": {"b": 1, "c": [1, None]},
        "big": 2**70,
        "long": "x" * 9000,
        "_own": 1,
        "\ud800": 1,
    }
    params |= {f"many/{i}": i for i in range(500)}
    started = RunStarted(project="p", params=params, tags=["t"], notes="n", group="g")
    sink = opened(tmp_path)
    sink.write(records(started, ParamsUpdated(params={"a": {"b": 2}, "batch": math.nan})))
    sink.close()
    found = stored(tmp_path, "p")["run"]["config"]
    assert (2, [1, None], str(2**70)) == (found["a.b"], found["a.c"], found["big"])
    assert "x" * 9000 == found["long"]
    assert math.isnan(found["batch"])
    assert 499 == found["many/499"]
    assert (["t"], "n") == (found["trainbus.tags"], found["trainbus.notes"])
    assert [1] == [value for key, value in found.items() if key.startswith("own_")]
    reserved = [key for key in found if key.startswith("_")]
    assert ["_Group"] == reserved


def test_a_model_is_in_the_config(tmp_path: Path) -> None:
    """Size, speed and classes are next to the parameters."""
    model = ModelDescribed(parameters=10, speed_ms={"inference": 2.5}, classes=["a"])
    found = log(tmp_path, model)["config"]
    assert (10, 2.5, ["a"]) == (
        found["model/parameters"],
        found["model/speed_inference(ms)"],
        found["model/classes"],
    )


def test_objects_arrive_as_trackios_own(tmp_path: Path) -> None:
    """Tables, histograms and texts are Trackio's; columns of one name stay two."""
    table = TableLogged(
        key="t", columns=["a", "a"], rows=[[1, math.nan], ["µ", {"x": [1]}]], epoch=0
    )
    histogram = HistogramLogged(key="h", counts=np.array([0, 3]), edges=np.arange(3) / 2, epoch=1)
    rows = log(tmp_path, table, histogram, TextLogged(key="x", text="# µ", step=9))["rows"]
    found = {key: (row["step"], row[key]) for row in rows for key in ("t", "h", "x") if key in row}
    cells = [{"a": 1, "a (1)": "NaN"}, {"a": "µ", "a (1)": {"x": [1]}}]
    assert (1, {"_type": "trackio.table", "_value": cells}) == found["t"]
    bins = {"_type": "trackio.histogram", "bins": [0.0, 0.5, 1.0], "values": [0, 3]}
    assert (2, bins) == found["h"]
    assert (9, {"_type": "trackio.markdown", "_value": "# µ"}) == found["x"]


def test_pictures_arrive(tmp_path: Path) -> None:
    """Files are copied as they are, arrays, curves and matrices are drawn."""
    from PIL import Image

    (tmp_path / "a.jpg").write_bytes(b"a picture")
    sink = opened(tmp_path)
    x = np.linspace(0, 1, 5)
    events: list[Event] = [
        ImageLogged(key="file", path=str(tmp_path / "a.jpg"), caption="µ", step=3),
        ImageLogged(key="array", array=np.full((2, 3), 0.5)),
        CurveLogged(key="curve", x=x, y=np.array([x]), classes=["a"]),
        ConfusionMatrixLogged(key="matrix", matrix=np.eye(2), classes=["a", "b"]),
    ]
    sink.write(records(RUN.started, *events))
    sink.close()
    rows = [row for row in SQLiteStorage.get_logs("p", "shown", run_id="run") if len(row) > 2]
    found = {key: row[key] for row in rows for key in row if key not in ("step", "timestamp")}
    paths = {key: trackio.utils.MEDIA_DIR / value["file_path"] for key, value in found.items()}
    assert (b"a picture", "µ") == (paths["file"].read_bytes(), found["file"]["caption"])
    assert paths["file"].is_relative_to(tmp_path / "media" / "p" / "shown" / "3")
    sizes = {}
    for key in ("array", "curve", "matrix"):
        with Image.open(paths[key]) as picture:
            sizes[key] = picture.size
    assert {"array": (3, 2), "curve": (960, 720), "matrix": (960, 720)} == sizes


def test_what_is_gone_costs_only_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Files that are gone, and arrays that are no pictures, are counted and told of."""
    sink = opened(tmp_path)
    gone = str(tmp_path / "gone")
    with caplog.at_level(logging.WARNING):
        sink.write(
            records(
                RUN.started,
                ImageLogged(key="gone", path=gone),
                ImageLogged(key="odd", array=np.zeros((2, 2, 9))),
                ImageLogged(key="none"),
                CheckpointSaved(path=gone, kind="best"),
                metric(1.0, step=1),
            )
        )
    sink.close()
    assert (4, 1) == (sink.lost, len(stored(tmp_path, "p")["run"]["rows"]))
    assert {} == stored(tmp_path, "p")["artifacts"]
    assert "'gone' can't be shown in Trackio" in caplog.text
    assert f"no file at {gone}" in caplog.text


def test_artifacts_keep_their_files(tmp_path: Path) -> None:
    """Folders and files of one name are all there, with aliases and metadata made valid."""
    for name in "ab":
        (tmp_path / name / "x").mkdir(parents=True)
        (tmp_path / name / "x" / "f").write_text(name)
    paths = [str(tmp_path / p) for p in ("a/x/f", "b/x/f", "a/x", "gone")]
    aliases = ["latest", "v1", "my alias"]
    artifact = ArtifactLogged(name="data set/1", kind="dataset", paths=paths, aliases=aliases)
    other = ArtifactLogged(name="data-set-1", paths=paths[:1])
    artifacts = log(tmp_path, artifact, other)["artifacts"]
    assert ["data-set-1", "data-set-1_"] == sorted(name[:11] for name in artifacts)
    found = artifacts[max(artifacts)]
    digest = {name: hashlib.sha256(name.encode()).hexdigest() for name in "ab"}
    assert {"f": digest["a"], "1/f": digest["b"], "x/f": digest["a"]} == found["files"]
    assert (["latest", "my-alias"], "dataset") == (found["aliases"], found["type"])


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("best", {"run-best": 1, "run-last": 1}),
        ("last", {"run-last": 1}),
        ("all", {"run-best": 1, "run-last": 1, "run-periodic": 2}),
        ("none", {}),
    ],
)
def test_checkpoints(tmp_path: Path, wanted: Any, expected: dict[str, int]) -> None:
    """Only those asked for are kept, and what the trainer overwrites once."""
    events: list[Event] = []
    for epoch, kind in enumerate(("last", "best", "periodic", "best", "last", "periodic")):
        path = tmp_path / f"{epoch}.pt"
        path.write_text(str(epoch))
        events.append(CheckpointSaved(path=str(path), kind=kind, epoch=epoch))  # type: ignore[arg-type]
    found = log(tmp_path, *events, save_checkpoints=wanted)["artifacts"]
    assert expected == {name: artifact["versions"] for name, artifact in found.items()}
    if "run-best" in found:
        assert ["3.pt"] == list(found["run-best"]["files"])
    kept = len(list((tmp_path / "artifacts").rglob("blobs/sha256/*/*")))
    assert sum(expected.values()) == kept


def test_alerts_arrive(tmp_path: Path) -> None:
    """Alerts have Trackio's levels, and the step at which they were raised."""
    levels = ("info", "warning", "error")
    alerts = [AlertRaised(title=level, text="µ", level=level) for level in levels]  # type: ignore[arg-type]
    found = log(tmp_path, metric(1.0, step=5), *alerts)["alerts"]
    expected = {("info", "info", "µ", 5), ("warning", "warn", "µ", 5), ("error", "error", "µ", 5)}
    assert expected == {(a["title"], a["level"], a["text"], a["step"]) for a in found}


@pytest.mark.parametrize("status", ["finished", "failed", "stopped"])
def test_how_a_run_ended_is_in_its_config(tmp_path: Path, status: Any) -> None:
    """Trackio knows no status: it is a setting, like the best value."""
    best = trainbus.events.Best(metric="acc", value=0.5, epoch=2)
    found = log(tmp_path, RunEnded(status=status, reason="why", best=best))["config"]
    ended = {k.partition(".")[2]: v for k, v in found.items() if k.startswith("trainbus.")}
    assert {"status": status, "reason": "why", "best/acc": 0.5, "best/epoch": 3} == ended


def test_a_resumed_training_goes_on_in_its_run(tmp_path: Path) -> None:
    """The second attempt is in the same run, with the settings of both."""
    first = RunStarted(project="p", name="shown", params={"a": 1, "b": 1})
    second = RunStarted(project="p", name="renamed", params={"b": 2}, resumed=Resumed(run="run"))
    for attempt, started in enumerate((first, second), 1):
        sink = opened(tmp_path, trainbus.RunInfo(id="run", started=started, attempt=attempt))
        sink.write(records(started, metric(float(attempt), step=attempt), attempt=attempt))
        sink.close()
    found = stored(tmp_path, "p")
    assert {"run", "artifacts"} == found.keys()
    assert "shown" == found["run"]["name"]
    assert [(1, 1.0), (2, 2.0)] == [(row["step"], row["loss"]) for row in found["run"]["rows"]]
    assert (1, 2) == (found["run"]["config"]["a"], found["run"]["config"]["b"])


def test_an_abandoned_run_is_there_once(tmp_path: Path) -> None:
    """After a sink that was never closed, a new one takes what comes again, each record once."""
    (tmp_path / "a.png").write_bytes(b"picture")
    (tmp_path / "m.pt").write_bytes(b"weights")
    events = records(
        RUN.started,
        metric(1.0, step=1),
        ImageLogged(key="image", path=str(tmp_path / "a.png")),
        CheckpointSaved(path=str(tmp_path / "m.pt"), kind="periodic"),
        AlertRaised(title="t", level="info"),
        MetricsLogged(values={"gpu": 1.0}, phase="system"),
        ParamsUpdated(params={"batch": 2}),
        metric(2.0, step=2),
        RunEnded(status="finished"),
    )
    abandoned = opened(tmp_path, save_checkpoints="all")
    abandoned.write(events[:-2])
    again = trainbus.RunInfo(id="run", started=RUN.started, reopened=True)
    sink = opened(tmp_path, again, save_checkpoints="all")
    sink.write(events)
    sink.close()
    found = stored(tmp_path, "p")
    run = found["run"]
    assert [1.0, 2.0] == [row["loss"] for row in run["rows"] if "loss" in row]
    assert (1, 1) == (len(run["alerts"]), len(run["system"]))
    assert 1 == len([row for row in run["rows"] if "image" in row])
    assert 1 == len([path for path in (tmp_path / "media").rglob("*") if path.is_file()])
    assert 1 == found["artifacts"]["run-periodic"]["versions"]
    assert ("finished", 2) == (run["config"]["trainbus.status"], run["config"]["batch"])


def test_a_locked_database_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be stored is stored when the sink is asked again."""
    sink = opened(tmp_path)

    def locked(*_: Any) -> None:
        raise OSError("Could not acquire database lock")

    with monkeypatch.context() as patch:
        patch.setattr(trackio.fragments, "import_records", locked)
        with pytest.raises(trainbus.SinkError, match=r"can't be written .*lock") as caught:
            sink.write(records(RUN.started, metric(1.0, step=1)))
    assert caught.value.retry
    sink.write(records(RUN.started, metric(1.0, step=1)))
    sink.close()
    assert [1.0] == [row["loss"] for row in stored(tmp_path, "p")["run"]["rows"]]


def test_on_a_network_drive_trackios_inbox_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a database is not safe, rows go through files that Trackio's dashboard takes in."""
    monkeypatch.setenv("TRACKIO_STORAGE_MODE", "jsonl")
    sink = opened(tmp_path)
    sink.write(records(RUN.started, metric(1.0, step=1)))
    sink.close()
    assert not (tmp_path / "p.db").exists()
    trackio.fragments.import_inbox_dir()
    assert [1.0] == [row["loss"] for row in stored(tmp_path, "p")["run"]["rows"]]


def test_a_run_of_the_users_is_left_alone(tmp_path: Path) -> None:
    """No thread stays, no run becomes the current one, and one that is open goes on."""
    mine = trackio.Run(None, "p", None, name="mine")
    trackio.context_vars.current_run.set(mine)
    try:
        threads, environment = set(threading.enumerate()), dict(os.environ)
        log(tmp_path, metric(1.0, step=1))
        assert threads >= set(threading.enumerate())
        assert environment == dict(os.environ)
        assert mine is trackio.context_vars.current_run.get()
        trackio.log({"x": 2.0})
    finally:
        trackio.finish()
    assert [2.0] == [r["x"] for r in SQLiteStorage.get_logs("p", "mine", run_id=mine.id)]


def test_runs_of_one_name_are_two(tmp_path: Path) -> None:
    """The id tells runs apart, not what a person calls them, and no name leaves the folder."""
    for run in ("one", "two"):
        started = RunStarted(project="p", name="../../same")
        sink = opened(tmp_path, trainbus.RunInfo(id=run, started=started))
        image = ImageLogged(key="i", array=np.zeros((2, 2)))
        sink.write(records(started, image, metric(1.0, step=1)))
        sink.close()
    found = stored(tmp_path, "p")
    assert [2, 2] == [len(found[run]["rows"]) for run in ("one", "two")]
    assert ["..-..-same"] == [p.name for p in (tmp_path / "media" / "p").iterdir()]


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, "trainbus"), ("a/b", "a/b"), ("model_artifacts", "trainbus-model_artifacts-runs")],
)
def test_the_trainers_project_is_made_valid(
    tmp_path: Path, given: str | None, expected: str
) -> None:
    """Names that Trackio keeps for itself are changed."""
    started = RunStarted(project=given)
    sink = opened(tmp_path, trainbus.RunInfo(id="run", started=started))
    sink.write(records(started))
    sink.close()
    assert f"trackio show --project {expected}" == sink.location
    assert "run" in stored(tmp_path, expected)


@pytest.mark.parametrize("project", ["registry-a", "", "/"])
def test_a_project_in_the_configuration_must_be_valid(project: str) -> None:
    """What a person wrote is not changed behind their back: it is an error."""
    text = f"sinks: {{t: {{type: trackio, project: {project!r}}}}}"
    with pytest.raises(trainbus.ConfigError, match=r"sinks\.t\.project: .*a Trackio project name"):
        config.loads(text)


def test_a_project_that_collides_is_refused(tmp_path: Path) -> None:
    """Endings that Trackio keeps for itself are told of when the run begins."""
    with pytest.raises(trainbus.SinkError, match="set another `project`"):
        opened(tmp_path, project="model_artifacts")


def test_one_process_has_one_folder(tmp_path: Path) -> None:
    """Trackio can't store in a second folder, and that is said."""
    with pytest.raises(
        trainbus.SinkError, match=r"already stores in .* in this process, not in .*isolation"
    ):
        opened(tmp_path / "a", dir=str(tmp_path / "b"))


def test_a_folder_that_can_not_be_used_is_named(tmp_path: Path) -> None:
    """A file in the place of the folder, or a database that is none, is told of."""
    (tmp_path / "file").write_text("")
    with pytest.raises(trainbus.SinkError, match=r"can't use .*/file .*; set another `dir`"):
        opened(tmp_path / "file")
    (tmp_path / "p.db").write_text("no database" * 100)
    with pytest.raises(trainbus.SinkError, match=r"can't use .*not a database"):
        opened(tmp_path)


def test_through_a_configuration(tmp_path: Path) -> None:
    """A bus from YAML delivers in a process of its own, into the folder that is named."""
    text = f"sinks: {{t: {{type: trackio, project: mine, dir: {tmp_path / 'own'}}}}}"
    with config.loads(text) as bus, bus.run(params={"lr": 0.1}) as run:
        for _ in run.epochs(2):
            run.log({"loss": 0.5})
    report = bus.receipts[0].sinks[0]
    assert (None, 0, 0) == (report.error, report.dead, report.pending)
    assert f"TRACKIO_DIR={tmp_path / 'own'} trackio show --project mine" == report.location
    found = stored(tmp_path / "own", "mine")
    (run_id,) = found.keys() - {"artifacts"}
    rows = [(row["step"], row["train/loss"]) for row in found[run_id]["rows"]]
    assert [(1, 0.5), (2, 0.5)] == rows
    assert (0.1, "finished") == tuple(
        found[run_id]["config"][key] for key in ("lr", "trainbus.status")
    )


def test_a_killed_process_loses_nothing_that_was_written(tmp_path: Path) -> None:
    """What `write` took is in the database when the process is killed right after."""
    program = """
import os, signal, sys
from trainbus.sinks.trackio import TrackioOptions, TrackioSink
from trainbus import RunInfo
from trainbus.events import MetricsLogged, Record, RunStarted
started = RunStarted(project="p", name="shown")
sink = TrackioSink(TrackioOptions(dir=sys.argv[1]))
sink.open(RunInfo(id="run", started=started))
event = MetricsLogged(values={"loss": 1.0}, phase="train", step=1)
sink.write([Record(seq=i, run="run", time=i, event=e) for i, e in enumerate((started, event), 1)])
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=tmp_path, check=False)
    assert -signal.SIGKILL == done.returncode
    again = trainbus.RunInfo(id="run", started=RUN.started, reopened=True)
    sink = opened(tmp_path, again)
    sink.write(records(RUN.started, metric(1.0, step=1), metric(2.0, step=2)))
    sink.close()
    assert [1.0, 2.0] == [row["loss"] for row in stored(tmp_path, "p")["run"]["rows"]]
