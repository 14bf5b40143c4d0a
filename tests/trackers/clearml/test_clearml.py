"""The `clearml` sink, read back from ClearML's offline archives."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
from trainbus.sinks.clearml import ClearmlOptions, ClearmlSink

import trainbus
from support.records import CONTENT
from support.records import records as make_records
from trainbus import RunInfo, config
from trainbus.errors import ConfigError, SinkError
from trainbus.events import (
    AlertRaised,
    ArtifactLogged,
    Best,
    ConfusionMatrixLogged,
    CurveLogged,
    Event,
    Failure,
    HistogramLogged,
    ImageLogged,
    MetricsLogged,
    ModelDescribed,
    ParamsUpdated,
    Record,
    RunEnded,
    RunStarted,
    TableLogged,
    TextLogged,
)
from trainbus.testing import SinkConformance

# ClearML's imports emit warnings, and it leaves open files to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:unclosed:ResourceWarning"
)


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide any configuration and server from ClearML."""
    for name in [name for name in os.environ if name.startswith(("CLEARML_", "TRAINS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CLEARML_CACHE_DIR", str(tmp_path / "cache"))


class TestClearml(SinkConformance):
    package = "clearml"
    extra = "clearml"
    heavy = ("matplotlib", "PIL")
    # run.started is required, and ClearML does not show epochs.
    stores = CONTENT

    def make(self, folder: Path) -> ClearmlSink:
        return ClearmlSink(ClearmlOptions(dir=str(folder), save_checkpoints="all"))

    def read(self, folder: Path) -> object:
        return {path.name: content(path) for path in sorted(folder.glob("*.zip"))}


_UNREPEATABLE = ("timestamp", "task", "key", "url", "uri", "id", "offline_folder", "worker")


def content(path: Path) -> dict[str, Any]:
    """Return the content of an archive without times and random names, which always differ."""
    with ZipFile(path) as archive:
        names = archive.namelist()
        task = json.loads(archive.read("task.json"))

        def same(value: Any) -> Any:
            if isinstance(value, list):
                return [same(item) for item in value]
            if not isinstance(value, dict):
                return value
            kept = {k: same(v) for k, v in value.items() if k not in _UNREPEATABLE}
            file = value.get("uri") or (value.get("key") and value.get("url"))
            if file:
                kept["file"] = archive.read(file.replace(f"{task['offline_folder']}/", "", 1))
                kept["suffix"] = Path(file).suffix
            if "uri" in value:
                kept["name"] = value["key"]
            return kept

        # The file does not exist if there are no events.
        reported = archive.read("metrics.jsonl") if "metrics.jsonl" in names else b""
        lines = reported.decode().splitlines()
        return {
            "task": same(task),
            "events": [same(event) for line in lines for event in json.loads(line)],
            "files": len([name for name in names if name.startswith("data/")]),
        }


class Archive:
    """The content of an archive as a person sees it."""

    def __init__(self, path: Path) -> None:
        found = content(path)
        self.task = found["task"]
        by_type: dict[str, list[Any]] = {}
        for event in found["events"]:
            by_type.setdefault(event["type"], []).append(event)
        scalars = [
            (f"{e['metric']}:{e['variant']}", e["value"], e["iter"])
            for e in by_type.get("training_stats_scalar", [])
        ]
        self.scalars = [s for s in scalars if s[2] >= 0]
        self.singles = {name: value for name, value, step in scalars if step < 0}
        self.log = [(e["level"], e["msg"]) for e in by_type.get("log", [])]
        self.plots = {e["metric"]: json.loads(e["plot_str"]) for e in by_type.get("plot", [])}
        self.media = [
            (e["metric"], e["variant"], e["iter"], e["file"], e["suffix"])
            for e in by_type.get("training_debug_image", [])
        ]
        self.params = {
            section: {name: item["value"] for name, item in items.items()}
            for section, items in self.task["hyperparams"].items()
        }
        artifacts = self.task.get("execution", {}).get("artifacts", [])
        self.artifacts = {artifact["name"]: artifact["file"] for artifact in artifacts}


records = partial(make_records, run="r")


def log(
    folder: Path,
    *events: Event,
    started: RunStarted | None = None,
    attempt: int = 1,
    **options: Any,
) -> Archive:
    """Log events of one attempt and return its archive."""
    sink = ClearmlSink(ClearmlOptions(dir=str(folder), **options))
    first = started or RunStarted()
    sink.open(RunInfo(id="r", started=first, attempt=attempt))
    sink.write(records(first, *events, attempt=attempt))
    sink.close()
    return Archive(folder / f"r-{attempt}.zip")


def metrics(value: float, **about: Any) -> MetricsLogged:
    return MetricsLogged(values={"loss": value}, phase="train", **about)


def test_values_and_steps_are_exact(tmp_path: Path) -> None:
    """Step values are at their step, epoch values at the number of epochs done; all are exact."""
    found = log(
        tmp_path,
        *(metrics(v, epoch=i) for i, v in enumerate([0.1, 5e-324, 1e308])),
        metrics(2.0, step=70, epoch=9),
        metrics(3.0, final=True),
        metrics(4.0),
    )
    points = [(0.1, 1), (5e-324, 2), (1e308, 3), (2.0, 70), (4.0, 70)]
    scalars = [("loss:loss", value, step) for value, step in points]
    assert scalars == found.scalars
    assert {"Summary:final/loss": 3.0} == found.singles


def test_non_finite_values_are_console_lines(tmp_path: Path) -> None:
    """NaN and ±Inf are console lines instead of points, because ClearML would store 0."""
    values = [math.nan, math.inf, -math.inf]
    found = log(
        tmp_path,
        *(metrics(v, epoch=i) for i, v in enumerate(values)),
        metrics(math.nan, final=True),
    )
    texts = ["loss is nan at 1", "loss is inf at 2", "loss is -inf at 3", "final/loss is nan"]
    assert [("INFO", text) for text in texts] == found.log
    assert ([], {}) == (found.scalars, found.singles)


def test_names_stay_apart(tmp_path: Path) -> None:
    """Different names stay different when they are shortened or split into title and series."""
    long = "x" * 300
    names = ["a", "a/a", "/a", "a/", "a//a", "b/a", "b/c/a", f"{long}1", f"{long}2"]
    names += ["", " ", "a\nb", "a_b", "..", "../..", "µ/loss", "\ud800"]
    values = {name: float(i) for i, name in enumerate(names)}
    found = log(tmp_path, MetricsLogged(values=values, phase="train", epoch=0)).scalars
    assert list(values.values()) == [value for _, value, _ in found]
    assert len(names) == len({name for name, *_ in found})
    assert {"a:a", "b:a", "b/c:a", "µ:loss"} <= {name for name, *_ in found}


def test_params_are_flat_and_updated(tmp_path: Path) -> None:
    """Nested parameters have dotted names; ClearML stores all values as strings."""
    params: dict[str, Any] = {"a": {"b": 1, "c": [1, 2]}, "none": None, "long": "x" * 5000}
    params |= {f"p{i}": i for i in range(300)} | {"s/l": True, "f": math.nan, "e": {}}
    found = log(tmp_path, ParamsUpdated(params={"a": {"b": 2}}), started=RunStarted(params=params))
    general = found.params["General"]
    names = ("a.b", "a.c", "none", "p299", "s/l", "f", "e")
    assert ("2", "[1, 2]", "", "299", "True", "nan", "{}") == tuple(general[n] for n in names)
    assert "x" * 5000 == general["long"]


def test_the_run_is_described(tmp_path: Path) -> None:
    """Project, name, tags, group, notes and model arrive; options override the trainer's values."""
    started = RunStarted(name="n", project="p", tags=["a"], group="g", notes="text")
    described = ModelDescribed(parameters=7, speed_ms={"inference": 1.5})
    found = log(tmp_path, described, started=started, project="mine", tags=("b",))
    about = [found.task[k] for k in ("project_name", "name", "tags", "comment")]
    assert ["mine", "n", ["b", "a", "run:r"], "text"] == about
    assert {"run": "r", "attempt": "1", "group": "g"} == found.params["trainbus"]
    speed = "Summary:model/speed_inference(ms)"
    assert {"Summary:model/parameters": 7, speed: 1.5} == found.singles


@pytest.mark.parametrize("name", ["../../../out", "a/../../b", "/", "..", "a\nb", "x" * 400])
def test_names_do_not_leave_the_folder(tmp_path: Path, name: str) -> None:
    """No name of a project, run or image makes ClearML write outside the archive."""
    picture = ImageLogged(key=name, array=np.zeros((2, 2)))
    found = log(tmp_path / "in", picture, started=RunStarted(name=name, project=name))
    assert 1 == len(found.media)
    assert {"in", "r-1.zip"} == {p.name for p in [tmp_path / "in", *(tmp_path / "in").iterdir()]}
    assert not [path for path in tmp_path.rglob("*.png") if path.is_file()]


def test_charts_are_clearmls_own(tmp_path: Path) -> None:
    """Curves, matrices, histograms, tables, texts and images use ClearML's own types."""
    found = log(
        tmp_path,
        CurveLogged(
            key="pr",
            x=np.array([0.0, 0.5]),
            y=np.array([[1, 2], [math.nan, 3]]),
            classes=["a", "b"],
            x_label="recall",
        ),
        ConfusionMatrixLogged(key="m", matrix=np.array([[2, math.nan], [0, 1]]), classes=["a", ""]),
        HistogramLogged(key="h", counts=np.array([3, 1]), edges=np.array([1.0, 2.0, 4.0])),
        TableLogged(key="t", columns=["c", "d"], rows=[["µ", None], [math.inf, {"a": 1}]]),
        TextLogged(key="note", text="a\nb", epoch=0),
        AlertRaised(title="slow", text="very", level="warning"),
        ImageLogged(key="i", array=np.zeros((2, 2)), epoch=0, caption="c"),
        ImageLogged(key="f/file", path=__file__),
    )
    curves = [(d["name"], d["x"], d["y"]) for d in found.plots["pr"]["data"]]
    assert [("a", [0.0, 0.5], [1.0, 2.0]), ("b", [0.0, 0.5], [None, 3.0])] == curves
    assert "recall" == found.plots["pr"]["layout"]["xaxis"]["title"]
    (matrix,) = found.plots["m"]["data"]
    assert ("heatmap", [[2, None], [0, 1]], ["a", ""]) == (matrix["type"], matrix["z"], matrix["x"])
    (histogram,) = found.plots["h"]["data"]
    assert ([1.5, 3.0], [1.0, 2.0], [3, 1]) == tuple(histogram[k] for k in ("x", "width", "y"))
    (table,) = found.plots["t"]["data"]
    assert [["µ", "inf"], [None, "{'a': 1}"]] == table["cells"]["values"]
    lines = [("INFO", "note at 1:\na\nb"), ("WARNING", "slow: very"), ("INFO", "i at 1: c")]
    assert lines == found.log
    (image, file) = found.media
    assert (("i", "i", 1), b"\x89PNG", ".png") == (image[:3], image[3][:4], image[4])
    assert ("f", "file", 0, Path(__file__).read_bytes(), ".py") == file


def test_every_image_of_a_name_is_kept(tmp_path: Path) -> None:
    """ClearML's limit on the number of images per name does not apply."""
    pictures = [ImageLogged(key="i", array=np.full((2, 2), i / 255), epoch=i) for i in range(120)]
    found = log(tmp_path, *pictures)
    assert (120, 120) == (len(found.media), len({data for *_, data, _ in found.media}))


def test_an_event_that_can_not_be_shown_is_the_only_loss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Missing files and arrays that are not images are counted; everything else arrives."""
    sink = ClearmlSink(ClearmlOptions(dir=str(tmp_path)))
    sink.open(RunInfo(id="r", started=RunStarted()))
    gone = str(tmp_path / "gone.png")
    broken: list[Event] = [
        ImageLogged(key="gone", path=gone),
        ImageLogged(key="none", array=np.zeros((2, 2, 7))),
        ArtifactLogged(name="a", paths=[gone]),
    ]
    sink.write(records(RunStarted(), *broken, metrics(1.0, epoch=0)))
    sink.close()
    assert (3, [("loss:loss", 1.0, 1)]) == (sink.lost, Archive(tmp_path / "r-1.zip").scalars)
    assert "'gone' can't be shown in ClearML" in caplog.text


def test_artifacts_are_kept_as_they_were(tmp_path: Path) -> None:
    """The archive has the files of an artifact as they were when they were logged."""
    file, folder = tmp_path / "a b.txt", tmp_path / "folder"
    folder.mkdir()
    (folder / "one").write_text("1")
    file.write_text("then")
    sink = ClearmlSink(ClearmlOptions(dir=str(tmp_path / "out")))
    sink.open(RunInfo(id="r", started=RunStarted()))
    paths = [str(file), str(folder)]
    sink.write(records(RunStarted(), ArtifactLogged(name="set/ä", paths=paths)))
    file.write_text("later")
    sink.close()
    found = Archive(tmp_path / "out/r-1.zip").artifacts
    assert [b"then", b"PK"] == [data[:4] if data[:2] != b"PK" else b"PK" for data in found.values()]


def test_files_of_one_name_are_both_kept(tmp_path: Path) -> None:
    """Files of an artifact that share a name keep their folders in their names."""
    paths = [tmp_path / name / "x.txt" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(path.parent.name)
    event = ArtifactLogged(name="data", paths=[str(path) for path in paths])
    log(tmp_path, event)
    (archive,) = tmp_path.glob("*.zip")
    assert [b"a", b"b"] == sorted(Archive(archive).artifacts.values())


@pytest.mark.parametrize(
    ("ended", "tags"),
    [
        (RunEnded(status="finished", best=Best(metric="acc", value=0.5, epoch=1)), ["run:r"]),
        (RunEnded(status="stopped", reason="KeyboardInterrupt"), ["run:r", "stopped"]),
        (
            RunEnded(status="failed", reason="E: no", error=Failure(type="E", message="no")),
            ["run:r", "failed"],
        ),
    ],
)
def test_the_end_is_stored(tmp_path: Path, ended: RunEnded, tags: list[str]) -> None:
    """The status is a parameter, a failure is in the console, and an unfinished run has a tag."""
    found = log(tmp_path, ended)
    values = found.params["trainbus"]
    assert (ended.status, ended.reason) == (values["status"], values.get("ended"))
    assert tags == found.task["tags"]
    assert ([("ERROR", "no")] if ended.status == "failed" else []) == found.log
    if ended.best:
        assert ({"Summary:best/acc": 0.5}, "2") == (found.singles, values["best_epoch"])


def test_attempts_are_archives_of_one_run(tmp_path: Path) -> None:
    """A resumed run is a second archive with the same tag as the first."""
    first = log(tmp_path, metrics(1.0, epoch=0))
    second = log(tmp_path, metrics(2.0, epoch=1), attempt=2)
    assert (["run:r"], ["run:r"]) == (first.task["tags"], second.task["tags"])
    assert [("loss:loss", 1.0, 1)] == Archive(tmp_path / "r-1.zip").scalars
    assert [("loss:loss", 2.0, 2)] == second.scalars


_KILLED = """
import os, sys, time
from pathlib import Path
from trainbus import RunInfo
from trainbus.events import MetricsLogged, Record, RunStarted
from trainbus.sinks.clearml import ClearmlOptions, ClearmlSink
sink = ClearmlSink(ClearmlOptions(dir=sys.argv[1]))
sink.open(RunInfo(id="r", started=RunStarted()))
for seq in (1, 2, 3):
    event = MetricsLogged(values={"loss": 0.5}, phase="train", epoch=seq)
    sink.write([Record(seq=seq, run="r", time=0.0, event=event)])
while not any(Path(sys.argv[1]).rglob("metrics.jsonl")):
    time.sleep(0.05)
os._exit(9)
"""


def test_records_of_a_killed_process_are_stored_once(tmp_path: Path) -> None:
    """The archive of the next process replaces what a killed process left."""
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "out")]
    assert 9 == subprocess.run(command, timeout=400, check=False).returncode
    assert ["r-1"] == [path.name for path in (tmp_path / "out").iterdir()]
    sink = ClearmlSink(ClearmlOptions(dir=str(tmp_path / "out")))
    sink.open(RunInfo(id="r", started=RunStarted(), reopened=True))
    sink.write(records(RunStarted(), *(metrics(float(i), epoch=i) for i in range(4))))
    sink.close()
    (found,) = (tmp_path / "out").iterdir()
    assert [0.0, 1.0, 2.0, 3.0] == [value for _, value, _ in Archive(found).scalars]


def test_the_rest_of_an_attempt_is_a_second_archive(tmp_path: Path) -> None:
    """The rest of an attempt becomes a second archive and does not replace the first."""
    log(tmp_path, metrics(1.0, epoch=0))
    sink = ClearmlSink(ClearmlOptions(dir=str(tmp_path)))
    sink.open(RunInfo(id="r", started=RunStarted(), reopened=True, resume_after=2))
    sink.write([Record(seq=3, run="r", time=0.0, event=metrics(2.0, epoch=1))])
    sink.close()
    values = [s[1] for path in sorted(tmp_path.glob("*.zip")) for s in Archive(path).scalars]
    assert [1.0, 2.0] == sorted(values)


@pytest.mark.parametrize(
    ("save", "expected"),
    [("none", []), ("best", ["best"]), ("last", ["last"]), ("all", ["best", "last", "periodic-1"])],
)
def test_save_checkpoints_chooses(tmp_path: Path, save: Any, expected: Sequence[str]) -> None:
    """The option selects the checkpoints to store; each is stored in its final state."""
    options = ClearmlOptions(dir=str(tmp_path / "out"), save_checkpoints=save)
    files = {kind: tmp_path / f"{kind}.pt" for kind in ("best", "last", "periodic")}
    bus = trainbus.Bus({"c": ClearmlSink(options)}, on_receipt=lambda r: None)
    with bus, bus.run() as run:
        for number in range(2):
            for kind in ("best", "last"):
                files[kind].write_text(f"{kind} of {number}")
                run.checkpoint(files[kind], kind=kind, epoch=number)
        files["periodic"].write_text("periodic of 1")
        run.checkpoint(files["periodic"], kind="periodic", epoch=0)
    (path,) = (tmp_path / "out").glob("*.zip")
    found = {name: data.decode() for name, data in Archive(path).artifacts.items()}
    assert {name: f"{name.split('-')[0]} of 1" for name in expected} == found


def test_two_runs_at_a_time_are_two_archives(tmp_path: Path) -> None:
    """Two runs can be open at the same time."""

    def make() -> ClearmlSink:
        return ClearmlSink(ClearmlOptions(dir=str(tmp_path)))

    bus = trainbus.Bus({"c": make}, on_receipt=lambda r: None)
    with bus, bus.run(name="a") as first, bus.run(name="b") as second:
        for i in range(2):
            first.log({"x": i})
            second.log({"y": i})
    archives = [Archive(path) for path in tmp_path.glob("*.zip")]
    found = {a.task["name"]: [name for name, *_ in a.scalars] for a in archives}
    assert {"a": ["train:x"] * 2, "b": ["train:y"] * 2} == found


@pytest.fixture
def state() -> Iterator[Any]:
    """Return a function that reads the state of the process that a sink must not change."""
    from clearml import Task
    from clearml.backend_api import Session
    from clearml.backend_interface.base import InterfaceBase

    offline = (InterfaceBase._offline_mode, Session._offline_mode)

    def read() -> Any:
        return (
            (Task.is_offline(), Session._offline_mode, InterfaceBase._default_session),
            (vars(Task)["_Task__main_task"], Task._random_seed),
            {k: v for k, v in os.environ.items() if k.startswith(("CLEARML", "TRAINS"))},
            (sys.excepthook, sys.stdout, sys.stderr, os.fork, list(sys.meta_path)),
        )

    yield read
    InterfaceBase._offline_mode, Session._offline_mode = offline


def test_the_process_is_left_as_it_was(tmp_path: Path, state: Any) -> None:
    """Afterwards ClearML's mode is restored, and no hooks or files of it are left."""
    before, threads = state(), set(threading.enumerate())
    log(tmp_path / "out", metrics(1.0, epoch=0))
    assert before == state()
    kept = [t for t in set(threading.enumerate()) - threads if not t.daemon]
    assert ([], False) == (kept, (tmp_path / "home").exists())
    assert ["r-1.zip"] == [path.name for path in tmp_path.rglob("*") if path.is_file()]


def test_an_inherited_task_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: Any
) -> None:
    """The inherited id of a training process's own ClearML task is ignored."""
    monkeypatch.setenv("CLEARML_PROC_MASTER_ID", "1:abc")
    before = state()
    assert [("loss:loss", 1.0, 1)] == log(tmp_path, metrics(1.0, epoch=0)).scalars
    assert before == state()


def test_an_online_task_of_the_user_stays_online(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: Any
) -> None:
    """The sink refuses to take the process offline under an online task, and says what to do."""
    from clearml import Task

    monkeypatch.setattr(Task, "current_task", lambda: object())
    before = state()[0]
    with pytest.raises(SinkError, match=r"task of your own is online .* `isolation: inline`"):
        log(tmp_path, metrics(1.0, epoch=0))
    assert before == state()[0]


def test_a_cache_that_can_not_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: Any
) -> None:
    """If ClearML's cache can't be written, the error names the setting to change."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLEARML_CACHE_DIR", str(tmp_path / "file"))
    before = state()
    with pytest.raises(SinkError, match=r"can't start a session: .* set CLEARML_CACHE_DIR"):
        log(tmp_path / "out", metrics(1.0, epoch=0))
    assert before == state()


def test_the_error_names_what_can_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error names a folder that can't be created; a missing archive is an error."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SinkError, match=r"can't write .*/file/x: .*; set another `dir`"):
        log(tmp_path / "file/x")
    from clearml import Task

    close = Task.close

    def close_on_a_full_disk(self: Any) -> None:
        close(self)
        (tmp_path / "out/r-1.zip").write_bytes(b"PK")

    monkeypatch.setattr(Task, "close", close_on_a_full_disk)
    with pytest.raises(SinkError, match=r"no archive at .*r-1.zip .*the session is in .*r-1"):
        log(tmp_path / "out", metrics(1.0, epoch=0))
    assert (tmp_path / "out/r-1").is_dir()


@pytest.mark.parametrize("run", ["", "a b/ä", "x" * 300, "\ud800", ".."])
def test_every_run_has_an_archive(tmp_path: Path, run: str) -> None:
    """The archive is in the folder for every run id."""
    sink = ClearmlSink(ClearmlOptions(dir=str(tmp_path / "out")))
    sink.open(RunInfo(id=run, started=RunStarted()))
    sink.close()
    (path,) = (tmp_path / "out").iterdir()
    command = "clearml-task --import-offline-session"
    assert f"{command} {shlex.quote(str(path))}" == sink.location


def test_options_are_checked() -> None:
    """An unknown choice is rejected when the configuration is read."""
    with pytest.raises(ConfigError, match="save_checkpoints"):
        config.loads("sinks: {c: {type: clearml, save_checkpoints: some}}")


def test_a_configured_bus_writes_an_archive(tmp_path: Path) -> None:
    """A run of a YAML configuration arrives, and `location` is the command that uploads it."""
    text = f"sinks: {{c: {{type: clearml, dir: '{tmp_path}/my out'}}}}"
    with config.loads(text) as bus, bus.run(name="n") as run:
        for i in run.epochs(2):
            run.log({"loss": i})
    where = bus.receipts[0].sinks[0].location
    assert where is not None
    *_, path = shlex.split(where)
    found = [m for m in Archive(Path(path)).scalars if m[0] == "train:loss"]
    assert [("train:loss", 0.0, 1), ("train:loss", 1.0, 2)] == found
