"""The `swanlab` sink, read back from SwanLab's own offline file."""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import swanlab
import yaml
from swanlab.proto.swanlab.record.v1.record_pb2 import Record as SwanlabRecord
from swanlab.sdk.internal.core_python.store import DataStoreReader
from trainbus.sinks.swanlab import SwanlabOptions, SwanlabSink

import trainbus
from support.records import CONTENT, records
from trainbus import config
from trainbus.events import (
    AlertRaised,
    ArtifactLogged,
    Best,
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

RUN = trainbus.RunInfo(id="run", started=RunStarted(project="p", name="shown"))


@pytest.fixture(autouse=True)
def _no_run_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep tests out of the user's home, and finish any run that a test leaves open."""
    monkeypatch.setenv("HOME", str(tmp_path))
    yield
    if swanlab.has_run():
        swanlab.finish()


def read(folder: Path) -> dict[str, Any]:
    """Return the runs in a folder by id, each with the content of all its files."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("run-*/run-*.swanlab")):
        if path.parent.name.startswith("run-"):
            _read_file(path, found)
    return found


def _read_file(path: Path, found: dict[str, Any]) -> None:
    reader = DataStoreReader()
    reader.open(path)
    run: dict[str, Any] = {}
    for line in reader:
        record = SwanlabRecord()
        record.ParseFromString(line)
        match record.WhichOneof("record_type"):
            case "start":
                start = record.start
                empty: dict[str, Any] = {
                    "scalars": {},
                    "media": {},
                    "config": {},
                    "files": {},
                    "finish": None,
                }
                run = found.setdefault(start.id, {**empty, "folders": []})
                about = (start.project, start.name, start.description, start.group)
                run["about"] = (*about, start.job_type, tuple(start.tags))
                run["folders"].append(path.parent)
            case "scalar":
                points = run["scalars"].setdefault(record.scalar.key, [])
                points.append((record.scalar.step, record.scalar.value.number))
            case "media":
                for item in record.media.value.items:
                    file = next((path.parent / "media").rglob(item.filename))
                    shown = (record.media.step, item.caption, file.read_bytes())
                    run["media"].setdefault(record.media.key, []).append(shown)
            case "save" if record.save.target_path:
                run["files"][record.save.name] = Path(record.save.target_path).read_bytes()
            case "finish":
                run["finish"] = (record.finish.state, record.finish.error)
    reader.close()
    settings = yaml.safe_load((path.parent / "files" / "config.yaml").read_text("utf-8")) or {}
    run["config"] |= {key: entry["value"] for key, entry in settings.items()}


class TestSwanlab(SinkConformance):
    """SwanLab's own files hold each record once."""

    package = "swanlab"
    extra = "swanlab"
    heavy = ("matplotlib", "PIL", "pyecharts")
    stores = CONTENT

    def make(self, folder: Path) -> SwanlabSink:
        """Return a sink that writes to a folder."""
        return SwanlabSink(SwanlabOptions(mode="offline", logdir=str(folder)))

    def read(self, folder: Path) -> object:
        """Read all runs of a folder."""
        runs = read(folder).items()
        return {id: {k: v for k, v in run.items() if k != "folders"} for id, run in runs}


def opened(folder: Path, run: trainbus.RunInfo = RUN, **options: Any) -> SwanlabSink:
    """Return an open sink that stores in a folder."""
    sink = SwanlabSink(SwanlabOptions(**{"mode": "offline", "logdir": str(folder), **options}))
    sink.open(run)
    return sink


def log(folder: Path, *events: Event, **options: Any) -> dict[str, Any]:
    """Log events to a run and return SwanLab's data of it."""
    sink = opened(folder, **options)
    sink.write(records(RUN.started, *events))
    sink.close()
    found: dict[str, Any] = read(folder)["run"]
    return found


def metric(value: float, *, name: str = "loss", **more: Any) -> MetricsLogged:
    """Return one training metric."""
    return MetricsLogged(values={name: value}, phase="train", **more)


def test_metrics_keep_their_values_and_steps(tmp_path: Path) -> None:
    """The x axis is the step, else the number of epochs done; all values are exact."""
    values = [0.1 + 0.2, math.nan, math.inf, -math.inf, 5e-324]
    epochs = [metric(value, epoch=epoch) for epoch, value in enumerate(values)]
    found = log(tmp_path, *epochs, metric(0.5, name="acc", step=7), metric(1, name="a", final=True))
    assert str(list(enumerate(values, 1))) == str(found["scalars"]["loss"])
    assert [(7, 0.5)] == found["scalars"]["acc"]
    assert [(7, 1.0)] == found["scalars"]["final/a"]


def test_a_summary_is_at_the_last_step(tmp_path: Path) -> None:
    """A value with neither step nor epoch is at the last metric's step, also after a restart."""
    made = records(RUN.started, metric(1.0, step=40, epoch=0), metric(0.5, name="train_loss"))
    for part in (made[:2], made[2:]):
        sink = opened(tmp_path)
        sink.write(part)
        sink.close()
    assert [(40, 0.5)] == read(tmp_path)["run"]["scalars"]["train_loss"]


def test_a_name_on_both_axes_becomes_two(tmp_path: Path) -> None:
    """A name with step values and epoch values becomes two names."""
    found = log(tmp_path, metric(1.0, step=1, epoch=0), metric(2.0, epoch=0), metric(3.0, step=2))
    expected = {"loss": [(1, 1.0), (2, 3.0)], "loss (epoch)": [(1, 2.0)]}
    assert expected == found["scalars"]


def test_values_that_swanlab_drops_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SwanLab keeps the first value of a step; the second one is counted as lost."""
    sink = opened(tmp_path)
    with caplog.at_level(logging.WARNING):
        sink.write(records(RUN.started, metric(1.0, epoch=0), metric(2.0, epoch=0)))
    sink.close()
    assert 1 == sink.lost
    assert "SwanLab keeps only the first value of 'loss' at step 1" in caplog.text
    assert {"loss": [(1, 1.0)]} == read(tmp_path)["run"]["scalars"]


def test_names_stay_apart(tmp_path: Path) -> None:
    """Invalid names are replaced, and different names stay different."""
    names = ["/a", "a", "a.", "b\n", "b_", "métrique/µ", "", "...", "x" * 600, "x" * 601, "\ud800"]
    names += ["__swanlab__.gpu", "a/b"]
    values = {name: float(i) for i, name in enumerate(names)}
    found = log(tmp_path, MetricsLogged(values=values, phase="train", step=3))["scalars"]
    assert sorted(values.values()) == sorted(value for ((_, value),) in found.values())
    assert ([(3, 1.0)], [(3, 5.0)]) == (found["a"], found["métrique/µ"])


def test_parameters_are_in_the_config(tmp_path: Path) -> None:
    """The config has all parameters: nested, long, huge, non-finite, and updated ones."""
    params = {"a": {"b": 1, "c": [1, None]}, "big": 2**70, "long": "x" * 9000, "odd": "\ud800\x1b"}
    params |= {f"many/{i}": i for i in range(500)} | {"inf": -math.inf}
    started = RunStarted(project="a b/c", params=params, tags=["t"], notes="n", group="g")
    sink = opened(tmp_path, trainbus.RunInfo(id="run", started=started))
    model = ModelDescribed(parameters=10, speed_ms={"inference": 2.5}, classes=["a"])
    sink.write(records(started, ParamsUpdated(params={"a": {"b": 2}, "batch": math.nan}), model))
    sink.close()
    run = read(tmp_path)["run"]
    found = run["config"]
    assert (2, [1, None], str(2**70)) == (found["a.b"], found["a.c"], found["big"])
    assert ("x" * 9000, "\\ud800\x1b") == (found["long"], found["odd"])
    assert ("NaN", "-Infinity", 499) == (found["batch"], found["inf"], found["many/499"])
    assert (10, 2.5) == (found["model.parameters"], found["model.speed_ms.inference"])
    project, _, notes, group, _, tags = run["about"]
    assert ("a-b-c", "n", "g", ("t",)) == (project, notes, group, tags)


def test_charts_arrive_as_swanlabs_own(tmp_path: Path) -> None:
    """Curves, matrices, tables and histograms are ECharts that contain the values."""
    x = np.linspace(0, 1, 3)
    table = TableLogged(
        key="t", columns=["a", "a"], rows=[[1, math.nan], ["µ", {"x": [1]}]], epoch=0
    )
    found = log(
        tmp_path,
        CurveLogged(key="c", x=x, y=np.array([x, [0, math.nan, 1]]), classes=["a", "µ"], step=4),
        ConfusionMatrixLogged(key="m", matrix=np.array([[3, 1], [0, 2]]), classes=["a", "b"]),
        table,
        HistogramLogged(key="h", counts=np.array([0, 3]), edges=np.arange(3) / 2, epoch=1),
    )["media"]
    charts = {key: (item[0][0], json.loads(item[0][2])) for key, item in found.items()}
    step, curve = charts["c"]
    assert (4, ["a", "µ"]) == (step, [series["name"] for series in curve["series"]])
    assert [[0.0, 0], [0.5, None], [1.0, 1]] == curve["series"][1]["data"]
    matrix = charts["m"][1]["series"][0]["data"]
    # The cell in column 1 (predicted as b) and row 0 (true a) is 1.
    assert [[0, 0, 3.0], [1, 0, 1.0], [0, 1, 0.0], [1, 1, 2.0]] == matrix
    assert 3.0 == charts["m"][1]["visualMap"]["max"]
    rows = [{"a": 1, "a (1)": "NaN"}, {"a": "µ", "a (1)": {"x": [1]}}]
    assert (1, rows) == (charts["t"][0], charts["t"][1]["rowData"])
    step, histogram = charts["h"]
    assert (2, ["0 – 0.5", "0.5 – 1"]) == (step, histogram["xAxis"][0]["data"])
    assert [0, 3] == histogram["series"][0]["data"]


def test_pictures_and_texts_arrive(tmp_path: Path) -> None:
    """Images from files and arrays, and texts, arrive with their steps and captions."""
    import io

    from PIL import Image

    Image.new("RGB", (4, 3), "red").save(tmp_path / "a.jpg")
    found = log(
        tmp_path,
        ImageLogged(key="file", path=str(tmp_path / "a.jpg"), caption="µ", step=3),
        ImageLogged(key="array", array=np.array([[0.0, 1.0]])),
        TextLogged(key="text", text="two\nlines µ", epoch=1),
        TextLogged(key="text", text="without a place"),
    )["media"]
    ((step, caption, content),) = found["file"]
    with Image.open(io.BytesIO(content)) as picture:
        assert (3, "µ", (4, 3)) == (step, caption, picture.size)
    with Image.open(io.BytesIO(found["array"][0][2])) as picture:
        assert [[0, 255]] == np.asarray(picture.convert("L")).tolist()
    texts = [(step, text.decode()) for step, _, text in found["text"]]
    assert [(2, "two\nlines µ"), (3, "without a place")] == texts


def test_a_missing_file_is_the_only_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Missing files and arrays that are not images are counted and logged."""
    sink = opened(tmp_path)
    gone = str(tmp_path / "gone")
    with caplog.at_level(logging.WARNING):
        sink.write(
            records(
                RUN.started,
                ImageLogged(key="gone", path=gone),
                ImageLogged(key="odd", array=np.zeros((2, 2, 9))),
                ImageLogged(key="none"),
                ArtifactLogged(name="files", paths=[gone]),
                metric(1.0, step=1),
            )
        )
    sink.close()
    found = read(tmp_path)["run"]
    assert (4, {}, {}) == (sink.lost, found["media"], found["files"])
    assert {"loss": [(1, 1.0)]} == found["scalars"]
    assert "'gone' can't be shown in SwanLab" in caplog.text
    assert "'files' can't be stored in SwanLab" in caplog.text


def test_artifacts_keep_their_files(tmp_path: Path) -> None:
    """Folders and files that share a name are all stored as copies."""
    for name in "ab":
        (tmp_path / name / "x").mkdir(parents=True)
        (tmp_path / name / "x" / "f[1]").write_text(name)
    paths = [str(tmp_path / p) for p in ("a/x/f[1]", "b/x/f[1]", "a/x")]
    artifact = ArtifactLogged(name="../set/1", kind="data", paths=paths, metadata={"n": math.nan})
    sink = opened(tmp_path / "log")
    sink.write(records(RUN.started, artifact))
    for path in paths[:2]:
        Path(path).write_text("changed")
    sink.close()
    found = read(tmp_path / "log")["run"]
    (base,) = {name.partition("/set/")[0] + "/set/" + name.split("/")[2] for name in found["files"]}
    assert base.startswith("-/set/1_")
    expected = {f"{base}/f[1]": b"a", f"{base}/1-f[1]": b"b", f"{base}/x/f[1]": b"a"}
    assert expected == found["files"]
    assert "data" == found["config"]["files/../set/1.kind"]
    assert "NaN" == found["config"]["files/../set/1.metadata.n"]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("best", {"best/3.pt"}),
        ("last", {"last/4.pt"}),
        ("all", {"best/3.pt", "last/4.pt", "epoch-3/2.pt", "epoch-6/5.pt"}),
        ("none", set()),
    ],
)
def test_checkpoints(tmp_path: Path, wanted: Any, expected: set[str]) -> None:
    """The option selects the checkpoints to store; each is stored in its final state."""
    events: list[Event] = []
    for epoch, kind in enumerate(("last", "best", "periodic", "best", "last", "periodic")):
        path = tmp_path / f"{epoch}.pt"
        path.write_text(str(epoch))
        events.append(CheckpointSaved(path=str(path), kind=kind, epoch=epoch))  # type: ignore[arg-type]
    found = log(tmp_path, *events, save_checkpoints=wanted)["files"]
    assert {f"checkpoints/{name}" for name in expected} == found.keys()


def test_the_last_checkpoint_is_stored_if_none_is_best(tmp_path: Path) -> None:
    """`save_checkpoints: best` stores the last one if the training names no best one."""
    (tmp_path / "m.pt").write_text("weights")
    saved = CheckpointSaved(path=str(tmp_path / "m.pt"), kind="last")
    assert {"checkpoints/last/m.pt": b"weights"} == log(tmp_path, saved)["files"]


def test_alerts_are_texts(tmp_path: Path) -> None:
    """Alerts are stored as texts, because SwanLab has no alerts."""
    alerts = [AlertRaised(title="µ", text=text, level="error") for text in ("", "two\nlines")]
    found = log(tmp_path, *alerts)["media"]["alerts"]
    assert [(0, b"[error] \xc2\xb5"), (1, b"[error] \xc2\xb5\ntwo\nlines")] == [
        (step, text) for step, _, text in found
    ]


@pytest.mark.parametrize(("status", "state"), [("finished", 1), ("failed", 2), ("stopped", 3)])
def test_a_run_ends_as_the_training_did(tmp_path: Path, status: Any, state: int) -> None:
    """SwanLab's state is the status of the run, and the config has the reason."""
    error = (
        None
        if status == "finished"
        else trainbus.events.Failure(type="E", message="m", traceback="where")
    )
    best = Best(metric="acc", value=0.5, epoch=2)
    found = log(tmp_path, RunEnded(status=status, reason="why", error=error, best=best))
    assert (state, "where" if error else "") == found["finish"]
    keys = ("ended.status", "ended.reason", "best.acc", "best.epoch")
    assert (status, "why", 0.5, 3) == tuple(found["config"][key] for key in keys)


def test_a_run_without_an_end_has_crashed(tmp_path: Path) -> None:
    """A run without a run.ended event is marked as crashed."""
    assert (2, "the training did not report its end") == log(tmp_path)["finish"]


def test_a_resumed_training_has_the_same_id(tmp_path: Path) -> None:
    """The second attempt is a new file with the same id."""
    for attempt in (1, 2):
        started = RunStarted(project="p", resumed=Resumed(run="run") if attempt > 1 else None)
        sink = opened(tmp_path, trainbus.RunInfo(id="run", started=started, attempt=attempt))
        sink.write(records(started, metric(float(attempt), step=attempt), attempt=attempt))
        sink.close()
    found = read(tmp_path)
    assert ["run"] == list(found)
    assert 2 == len(found["run"]["folders"])
    assert [(1, 1.0), (2, 2.0)] == found["run"]["scalars"]["loss"]


def test_an_incomplete_file_is_set_aside(tmp_path: Path) -> None:
    """The file of a killed process is set aside, and all its records are stored again."""
    program = """
import os, signal, sys
from trainbus.sinks.swanlab import SwanlabOptions, SwanlabSink
from trainbus import RunInfo
from trainbus.events import MetricsLogged, Record, RunStarted
started = RunStarted(project="p", name="shown")
sink = SwanlabSink(SwanlabOptions(mode="offline", logdir=sys.argv[1]))
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
    found = read(tmp_path)["run"]
    assert (1, [(1, 1.0), (2, 2.0)]) == (len(found["folders"]), found["scalars"]["loss"])
    assert 1 == len(list(tmp_path.glob("incomplete-run-*")))


def test_a_closed_file_is_not_set_aside(tmp_path: Path) -> None:
    """The file of a sink that was closed in the middle of an attempt is kept."""
    events = records(RUN.started, metric(1.0, step=1), metric(2.0, step=2))
    first = opened(tmp_path)
    first.write(events[:2])
    first.close()
    second = opened(
        tmp_path, trainbus.RunInfo(id="run", started=RUN.started, reopened=True, resume_after=2)
    )
    second.write(events)
    second.close()
    found = read(tmp_path)["run"]
    assert (2, [(1, 1.0), (2, 2.0)]) == (len(found["folders"]), found["scalars"]["loss"])
    assert [] == list(tmp_path.rglob("trainbus-open*"))


def test_a_damaged_state_is_ignored(tmp_path: Path) -> None:
    """A damaged state file does not stop the run from continuing."""
    log(tmp_path, metric(1.0, step=1))
    (closed,) = tmp_path.rglob("trainbus-closed.json")
    closed.write_text("{")
    assert [(1, 1.0), (2, 2.0)] == log(tmp_path, metric(2.0, step=2))["scalars"]["loss"]


def test_ids_that_look_alike_are_two_runs(tmp_path: Path) -> None:
    """Ids such as `a-b` and `a_b`, which share a folder name, are two complete runs."""
    for run in ("a-b", "a_b"):
        sink = opened(tmp_path, trainbus.RunInfo(id=run, started=RUN.started))
        sink.write(records(RUN.started, metric(1.0, step=1)))
        sink.close()
    found = read(tmp_path)
    assert {run: [(1, 1.0)] for run in ("a-b", "a_b")} == {
        run: content["scalars"]["loss"] for run, content in found.items()
    }


def test_the_process_is_unchanged(tmp_path: Path) -> None:
    """The handlers of exceptions and Ctrl-C never change, not even while the run is open."""
    before = sys.excepthook, signal.getsignal(signal.SIGINT), sys.stdout, dict(os.environ)
    sink = opened(tmp_path)
    meanwhile = sys.excepthook, signal.getsignal(signal.SIGINT), sys.stdout, dict(os.environ)
    sink.close()
    after = sys.excepthook, signal.getsignal(signal.SIGINT), sys.stdout, dict(os.environ)
    assert before == meanwhile == after
    assert not swanlab.has_run()


def test_a_closed_run_watches_no_files(tmp_path: Path) -> None:
    """A closed run leaves no thread or inotify instance, so that a sweep can have many runs."""
    log(tmp_path / "first")

    def watching() -> tuple[int, int]:
        names = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.exists()]
        return threading.active_count(), names.count("anon_inode:inotify")

    before = watching()
    log(tmp_path / "second")
    assert before == watching()


def test_nothing_of_the_machine_is_collected(tmp_path: Path) -> None:
    """The run's folder has no data about hardware, packages, repository or host."""
    (folder,) = log(tmp_path, metric(1.0, step=1))["folders"]
    assert ["config.yaml", "swanlab-metadata.json"] == sorted(
        path.name for path in (folder / "files").iterdir()
    )
    metadata = json.loads((folder / "files" / "swanlab-metadata.json").read_text())
    assert {"_version": 2} == {key: value for key, value in metadata.items() if value}


def test_a_run_of_the_user_is_left_alone(tmp_path: Path) -> None:
    """If the user has a run open, the sink raises an error and leaves that run alone."""
    mine = swanlab.init(project="mine", mode="offline", log_dir=str(tmp_path / "mine"))
    with pytest.raises(trainbus.SinkError, match=r"a SwanLab run is open.*isolation: process"):
        opened(tmp_path)
    assert mine is swanlab.get_run()
    assert mine.alive


def test_without_a_key_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a key for the cloud, the error says what to do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SWANLAB_API_KEY", raising=False)
    with pytest.raises(trainbus.SinkError, match=r"set SWANLAB_API_KEY, or set `mode: offline`"):
        opened(tmp_path, mode="cloud")
    assert not swanlab.has_run()


def test_local_mode_says_what_to_install(tmp_path: Path) -> None:
    """Local mode without SwanLab's dashboard is an error that says what to install."""
    with pytest.raises(trainbus.SinkError, match=r"pip install 'swanlab\[dashboard\]'"):
        opened(tmp_path, mode="local")


def test_a_folder_that_can_not_be_used_is_named(tmp_path: Path) -> None:
    """If a file has the folder's path, there is an error, and no run is left open."""
    (tmp_path / "file").write_text("")
    with pytest.raises(trainbus.SinkError, match=r"can't start the run .*; check `logdir`"):
        opened(tmp_path / "file")
    assert not swanlab.has_run()


def test_a_disabled_run_writes_nothing(tmp_path: Path) -> None:
    """`mode: disabled` accepts all records and writes no files."""
    (tmp_path / "m.pt").write_text("weights")
    sink = opened(tmp_path / "log", mode="disabled")
    saved = CheckpointSaved(path=str(tmp_path / "m.pt"), kind="best")
    sink.write(records(RUN.started, metric(1.0, step=1), saved, RunEnded(status="finished")))
    sink.close()
    assert sink.location is None
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("project: 'a b'", "a SwanLab project name"),
        ("project: ''", "project"),
        ("mode: online", "found 'online', expected one of 'cloud'"),
        ("logdir: ''", "at least 1 long"),
    ],
)
def test_options_must_be_valid(given: str, expected: str) -> None:
    """An invalid option is an error and is never silently replaced."""
    with pytest.raises(trainbus.ConfigError, match=expected):
        config.loads(f"sinks: {{s: {{type: swanlab, {given}}}}}")


def test_through_a_configuration(tmp_path: Path) -> None:
    """A bus from YAML delivers in the delivery process, and reports the upload command."""
    folder = tmp_path / "log of {run}"
    text = f"sinks: {{s: {{type: swanlab, mode: offline, project: mine, logdir: '{folder}'}}}}"
    with config.loads(text) as bus, bus.run(params={"lr": 0.1}) as run:
        for _ in run.epochs(2):
            run.log({"loss": 0.5})
    report = bus.receipts[0].sinks[0]
    assert (None, 0, 0) == (report.error, report.dead, report.pending)
    ((run_id, found),) = read(tmp_path).items()
    assert [(1, 0.5), (2, 0.5)] == found["scalars"]["train/loss"]
    assert (0.1, "finished", 1) == (
        found["config"]["lr"],
        found["config"]["ended.status"],
        found["finish"][0],
    )
    (stored,) = found["folders"]
    assert f"log of {run_id}" == stored.parent.name
    assert ["swanlab", "sync", "--id", run_id, str(stored)] == shlex.split(report.location or "")
