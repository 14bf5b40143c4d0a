"""The `comet` sink, read back from the messages in Comet's offline archives."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
from trainbus.sinks.comet import CometOptions, CometSink, experiment_key
from trainbus.sinks.comet.session import import_comet

import trainbus
from support.records import CONTENT
from support.records import records as make_records
from trainbus import RunInfo, config
from trainbus.errors import ConfigError, SinkError
from trainbus.events import (
    ArtifactLogged,
    Best,
    ConfusionMatrixLogged,
    CurveLogged,
    Event,
    Failure,
    HistogramLogged,
    ImageLogged,
    MetricsLogged,
    ParamsUpdated,
    RunEnded,
    RunStarted,
    TableLogged,
    TextLogged,
)
from trainbus.testing import SinkConformance

# Comet's imports emit warnings, and it leaves open sockets and files to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:unclosed:ResourceWarning"
)


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide any configuration and key from Comet, and shorten its polling interval."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in [name for name in os.environ if name.startswith("COMET_")]:
        monkeypatch.delenv(name)
    streamer = import_comet().streamer.offline
    wait, make = streamer.wait_for_done, streamer.BaseStreamer.__init__
    monkeypatch.setattr(
        streamer,
        "wait_for_done",
        lambda *args, **given: wait(*args, **{**given, "sleep_time": 0.01}),
    )
    monkeypatch.setattr(
        streamer.BaseStreamer, "__init__", lambda self, queue_timeout: make(self, 0.01)
    )


class TestComet(SinkConformance):
    package = "comet_ml"
    extra = "comet"
    heavy = ("matplotlib", "PIL")
    # run.started is required, and Comet does not show epochs.
    stores = CONTENT
    reopens = False  # an archive can't be continued: records that come again are a second one

    def make(self, folder: Path) -> CometSink:
        return CometSink(CometOptions(mode="offline", dir=str(folder), save_checkpoints="all"))

    def read(self, folder: Path) -> object:
        return sorted(
            (content(path) for path in folder.glob("*.zip")),
            key=lambda found: (found["experiment"]["offline_id"], repr(found)),
        )


_UNREPEATABLE = ("start_time", "stop_time", "local_timestamp", "message_id", "imageId", "assetId")


def content(path: Path) -> dict[str, Any]:
    """Return the content of an archive without times and random names, which always differ."""
    with ZipFile(path) as archive:

        def same(value: Any) -> Any:
            if isinstance(value, list):
                return [same(item) for item in value]
            if not isinstance(value, dict):
                return value
            kept = {k: same(v) for k, v in value.items() if k not in _UNREPEATABLE}
            if "file_path" in kept:
                kept["file_path"] = archive.read(kept["file_path"])
            return kept

        lines = archive.read("messages.json").decode().splitlines()
        return {
            "experiment": same(json.loads(archive.read("experiment.json"))),
            "messages": [same(json.loads(line)) for line in lines],
        }


class Archive:
    """The content of an archive as a person sees it."""

    def __init__(self, path: Path) -> None:
        found = content(path)
        self.experiment = found["experiment"]
        by_type: dict[str, list[Any]] = {}
        for message in found["messages"]:
            by_type.setdefault(message["type"], []).append(message["payload"])
        metrics = [payload["metric"] for payload in by_type.get("metric_msg", [])]
        self.metrics = [(m["metricName"], m["metricValue"], m["step"], m["epoch"]) for m in metrics]
        params = [p.get("param") or p["params"] for p in by_type.get("parameter_msg", [])]
        self.params = {p["paramName"]: p["paramValue"] for p in params}
        self.others = {p["key"]: p["value"] for p in by_type.get("log_other", [])}
        self.files = by_type.get("file_upload", [])

    def named(self, name: str) -> Any:
        """Return the data of a file."""
        names = ("fileName", "figName")
        (found,) = [
            file for file in self.files if name in (file["additional_params"].get(n) for n in names)
        ]
        return found["file_path"]


records = partial(make_records, run="r")


def archives(folder: Path) -> list[Archive]:
    return [Archive(path) for path in sorted(folder.glob("*.zip"), key=os.path.getmtime)]


def log(
    folder: Path,
    *events: Event,
    started: RunStarted | None = None,
    attempt: int = 1,
    **options: Any,
) -> Archive:
    """Log events of one run and return its newest archive."""
    sink = CometSink(CometOptions(mode="offline", dir=str(folder), **options))
    first = started or RunStarted()
    sink.open(RunInfo(id="r", started=first, attempt=attempt))
    sink.write(records(first, *events, attempt=attempt))
    sink.close()
    return archives(folder)[-1]


def metrics(value: float, **about: Any) -> MetricsLogged:
    return MetricsLogged(values={"loss": value}, phase="train", **about)


def test_values_and_steps_are_exact(tmp_path: Path) -> None:
    """Step values are at their step, epoch values at the number of epochs done; all are exact."""
    values = [0.1, math.nan, math.inf, -math.inf, 5e-324]
    found = log(
        tmp_path,
        *(metrics(v, epoch=i) for i, v in enumerate(values)),
        metrics(2.0, step=70, epoch=9),
        metrics(3.0, final=True),
        metrics(4.0),
    )
    shown = [0.1, "NaN", "Infinity", "-Infinity", 5e-324]
    expected = [("loss", v, i, i) for i, v in enumerate(shown, 1)]
    last = [("loss", 2.0, 70, 10), ("final/loss", 3.0, 70, 10), ("loss", 4.0, 70, 10)]
    assert [*expected, *last] == found.metrics


def test_names_stay_apart(tmp_path: Path) -> None:
    """Names that Comet would shorten or reject stay different; valid names are unchanged."""
    names = ["x" * 150 + "a", "x" * 150 + "b", "", " ", "a\nb", "a_b", "~", "µ/loss", "a b"]
    values = {name: float(i) for i, name in enumerate(names)}
    found = log(tmp_path, MetricsLogged(values=values, phase="train", epoch=0)).metrics
    assert list(values.values()) == [value for _, value, _, _ in found]
    assert len(names) == len({name for name, *_ in found})
    assert {"a_b", "µ/loss", "a b"} <= {name for name, *_ in found}
    assert 100 >= max(len(name) for name, *_ in found)


def test_params_are_flat_and_updated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nested parameters have dotted names; shortening a text logs a warning."""
    params: dict[str, Any] = {"a": {"b": 1, "c": [1, 2]}, "none": None, "long": "x" * 5000}
    params |= {f"p{i}": i for i in range(500)}
    found = log(tmp_path, ParamsUpdated(params={"a": {"b": 2}}), started=RunStarted(params=params))
    assert (2, [1, 2], None, 499) == tuple(found.params[k] for k in ("a.b", "a.c", "none", "p499"))
    assert "x" * 1000 == found.params["long"]
    assert "'long': Comet can show 1000 of its 5000 characters" in caplog.text


def test_the_run_is_described(tmp_path: Path) -> None:
    """Project, name, tags, group and notes arrive; options override the trainer's values."""
    started = RunStarted(name="n", project="p", tags=["a"], group="g", notes="text")
    found = log(tmp_path, started=started, project="mine", workspace="w", tags=("b",))
    about = {k: found.experiment[k] for k in ("project_name", "workspace")}
    assert {"project_name": "mine", "workspace": "w"} == about
    assert {"a", "b"} == set(found.experiment["tags"])
    assert ("n", "g", "text") == tuple(found.others[k] for k in ("Name", "group", "notes"))


def test_charts_are_comets_own(tmp_path: Path) -> None:
    """Curves, matrices, histograms, tables, texts and images use Comet's own types."""
    found = log(
        tmp_path,
        CurveLogged(
            key="pr",
            x=np.array([0.0, 0.5]),
            y=np.array([[1, 2], [math.nan, 3]]),
            classes=["a", "b"],
        ),
        ConfusionMatrixLogged(key="m", matrix=np.array([[2, 1], [0, 1]]), classes=["a", "b"]),
        HistogramLogged(key="h", counts=np.array([3, 1]), edges=np.array([1.0, 2.0, 4.0])),
        TableLogged(key="t", columns=["c", "d"], rows=[["µ", None]]),
        TextLogged(key="note", text="a\nb"),
        TextLogged(key="path", text=__file__),
        ImageLogged(key="i", array=np.zeros((2, 2)), epoch=0, caption="c"),
        ImageLogged(key="file", path=__file__),
    )
    curves = [json.loads(found.named(f"pr/{name}")) for name in "ab"]
    assert {"x": [0.0, 0.5], "y": [1.0, 2.0], "name": "pr/a"} == curves[0]
    assert ([0.5], [3.0]) == (curves[1]["x"], curves[1]["y"])
    matrix = json.loads(found.named("m.json"))
    assert (["a", "b"], [[2, 1], [0, 1]]) == (matrix["labels"], matrix["matrix"])
    assert 4 == sum(json.loads(found.named("h"))["index_values"][i][1] for i in range(2))
    assert "c,d\r\nµ,\r\n" == found.named("t.csv").decode()
    texts = [f["file_path"] for f in found.files if f["upload_type"] == "text-sample"]
    assert ["a\nb", f"{__file__}\n"] == [text.decode() for text in texts]
    assert b"\x89PNG" == found.named("i.png")[:4]
    assert Path(__file__).read_bytes() == found.named("file.py")


def test_a_matrix_with_nan_is_a_picture(tmp_path: Path) -> None:
    """A matrix with NaN, which Comet's type can't represent, is drawn as an image."""
    matrix = ConfusionMatrixLogged(key="m", matrix=np.array([[math.nan]]), classes=["a"])
    assert b"\x89PNG" == log(tmp_path, matrix).named("m.png")[:4]


def test_an_event_that_can_not_be_shown_is_the_only_loss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Missing files and arrays that are not images are counted; everything else arrives."""
    sink = CometSink(CometOptions(mode="offline", dir=str(tmp_path)))
    sink.open(RunInfo(id="r", started=RunStarted()))
    gone = str(tmp_path / "gone.png")
    broken: list[Event] = [
        ImageLogged(key="gone", path=gone),
        ImageLogged(key="none", array=np.zeros((2, 2, 7))),
        ArtifactLogged(name="a", paths=[gone]),
    ]
    sink.write(records(RunStarted(), *broken, metrics(1.0, epoch=0)))
    sink.close()
    assert (3, [("loss", 1.0, 1, 1)]) == (sink.lost, archives(tmp_path)[0].metrics)
    assert "'gone' can't be shown in Comet" in caplog.text


def test_files_of_one_name_are_both_kept(tmp_path: Path) -> None:
    """Files of an artifact that share a name keep their folders in their names."""
    paths = [tmp_path / name / "x.txt" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(path.parent.name)
    event = ArtifactLogged(name="data", paths=[str(path) for path in paths])
    found = log(tmp_path, event)
    assert ["data/a/x.txt", "data/b/x.txt"] == [
        f["additional_params"]["fileName"] for f in found.files
    ]


@pytest.mark.parametrize(
    ("ended", "crashed"),
    [
        (RunEnded(status="finished", best=Best(metric="acc", value=0.5, epoch=1)), False),
        (RunEnded(status="stopped", reason="KeyboardInterrupt"), False),
        (
            RunEnded(status="failed", reason="E: no", error=Failure(type="E", message="no")),
            True,
        ),
    ],
)
def test_the_end_is_stored(tmp_path: Path, ended: RunEnded, crashed: bool) -> None:
    """A failure is an error of the experiment; the status is under Other."""
    found = log(tmp_path, ended)
    assert (ended.status, ended.reason) == (found.others["status"], found.others.get("ended"))
    assert crashed == found.experiment["customer_error_reported"]
    if ended.best:
        assert (0.5, 2) == (found.others["best/acc"], found.others["best/epoch"])


def test_attempts_are_one_experiment(tmp_path: Path) -> None:
    """A resumed run is a second archive that an upload adds to the same experiment."""
    log(tmp_path, metrics(1.0, epoch=0))
    log(tmp_path, metrics(2.0, epoch=1), attempt=2)
    first, second = archives(tmp_path)
    for found in (first, second):
        about = (found.experiment["offline_id"], found.experiment["resume_strategy"])
        assert (experiment_key("r"), "get_or_create") == about
    assert ([1.0], [2.0]) == tuple([m[1] for m in found.metrics] for found in (first, second))


@pytest.mark.parametrize("run", ["", "a b/ä", "x" * 300, "\ud800"])
def test_every_run_has_a_key_that_comet_accepts(run: str) -> None:
    """The key has 32 to 50 letters and digits for every run id."""
    key = experiment_key(run)
    assert (True, True) == (key.isalnum(), 32 <= len(key) <= 50)


def test_records_of_a_killed_process_are_stored_once(tmp_path: Path) -> None:
    """The next process removes the unfinished archive of a killed process."""
    events = records(RunStarted(), *(metrics(float(i), epoch=i) for i in range(4)))
    first = CometSink(CometOptions(mode="offline", dir=str(tmp_path)))
    first.open(RunInfo(id="r", started=RunStarted()))
    first.write(events[:3])
    second = CometSink(CometOptions(mode="offline", dir=str(tmp_path)))
    second.open(RunInfo(id="r", started=RunStarted(), reopened=True))
    second.write(events)
    second.close()
    (found,) = archives(tmp_path)
    assert [0.0, 1.0, 2.0, 3.0] == [value for _, value, _, _ in found.metrics]
    first.close()


@pytest.mark.parametrize(
    ("save", "expected"),
    [("none", []), ("best", ["best"]), ("last", ["last"]), ("all", ["best", "last", "periodic-1"])],
)
def test_save_checkpoints_chooses(tmp_path: Path, save: Any, expected: Sequence[str]) -> None:
    """The option selects the checkpoints to store; each is stored in its final state."""
    options = CometOptions(mode="offline", dir=str(tmp_path / "out"), save_checkpoints=save)
    files = {kind: tmp_path / f"{kind}.pt" for kind in ("best", "last", "periodic")}
    bus = trainbus.Bus({"c": CometSink(options)}, on_receipt=lambda r: None)
    with bus, bus.run() as run:
        for number in range(2):
            for kind in ("best", "last"):
                files[kind].write_text(f"{kind} of {number}")
                run.checkpoint(files[kind], kind=kind, epoch=number)
        files["periodic"].write_text("periodic of 1")
        run.checkpoint(files["periodic"], kind="periodic", epoch=0)
    (found,) = archives(tmp_path / "out")
    models = {
        file["additional_params"]["groupingName"]: file["file_path"].decode()
        for file in found.files
        if file["upload_type"] == "model-element"
    }
    assert {name: f"{name.split('-')[0]} of 1" for name in expected} == models


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[Any]:
    """Return an experiment of the user."""
    from comet_ml import OfflineExperiment

    experiment = OfflineExperiment(
        offline_directory=str(tmp_path / "mine"),
        log_code=False,
        log_env_details=False,
        log_git_metadata=False,
        auto_output_logging=False,
    )
    yield experiment
    experiment.end()


def test_an_experiment_of_the_user_continues(tmp_path: Path, mine: Any) -> None:
    """An experiment that was active before stays active and receives no data of the sink."""
    import comet_ml

    log(tmp_path / "out", metrics(1.0, epoch=0))
    assert mine is comet_ml.get_global_experiment()
    assert mine.alive
    assert {} == mine.metrics


def test_two_runs_at_a_time_are_two_experiments(tmp_path: Path) -> None:
    """Two runs can be open at the same time."""

    def make() -> CometSink:
        return CometSink(CometOptions(mode="offline", dir=str(tmp_path)))

    bus = trainbus.Bus({"c": make}, on_receipt=lambda r: None)
    with bus, bus.run(name="a") as first, bus.run(name="b") as second:
        for i in range(2):
            first.log({"x": i})
            second.log({"y": i})
    found = {a.others["Name"]: [name for name, *_ in a.metrics] for a in archives(tmp_path)}
    assert {"a": ["train/x"] * 2, "b": ["train/y"] * 2} == found


LEFT = """
import sys
import trainbus.config
hook, out = sys.excepthook, sys.stdout
text = "isolation: inline\\nsinks: {c: {type: comet, mode: offline, dir: out}}"
bus = trainbus.config.loads(text)
with bus, bus.run() as run:
    run.log({"x": 1.0}, epoch=0)
assert "comet_ml" in sys.modules
assert 3 == bus.receipts[0].sinks[0].taken
assert (hook, out) == (sys.excepthook, sys.stdout)
assert [] == [f for f in sys.meta_path if "comet" in type(f).__module__]
"""


def test_the_process_is_left_as_it_was(tmp_path: Path) -> None:
    """Comet leaves no hooks in an interpreter in which only the sink imports it."""
    env = {**os.environ, "HOME": str(tmp_path), "COMET_DISABLE_SENTRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LEFT],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert 0 == done.returncode, done.stderr


def test_an_unreachable_server_may_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Online, a missing key is a permanent error, and an unreachable server is retried."""
    sink = CometSink(CometOptions(dir=str(tmp_path)))
    run = RunInfo(id="r", started=RunStarted())
    with pytest.raises(SinkError, match=r"no API key for Comet; set COMET_API_KEY") as caught:
        sink.open(run)
    assert not caught.value.retry
    monkeypatch.setenv("COMET_API_KEY", "secret-key-of-comet-01234")
    monkeypatch.setenv("COMET_URL_OVERRIDE", "http://127.0.0.1:9/")
    for name in ("GET_OR_ADD_EXPERIMENT_RETRY_TOTAL", "HTTP_SESSION_RETRY_TOTAL"):
        monkeypatch.setenv(f"COMET_{name}", "0")
    with pytest.raises(SinkError, match=r"can't start the experiment .* `mode: offline`") as caught:
        sink.open(run)
    assert caught.value.retry
    assert "secret-key" not in str(caught.value)
    sink.close()


def test_options_are_checked() -> None:
    """An unknown mode is rejected when the configuration is read."""
    with pytest.raises(ConfigError, match="mode"):
        config.loads("sinks: {c: {type: comet, mode: disabled}}")


def test_the_error_names_what_can_not_be_written(tmp_path: Path) -> None:
    """The error names a folder that can't be created, and the option to change."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SinkError, match=r"can't write .*/file/x: .*; set another `dir`"):
        log(tmp_path / "file/x")


def test_a_configured_bus_writes_an_archive(tmp_path: Path) -> None:
    """A run of a YAML configuration arrives, and `location` is the command that uploads it."""
    text = f"sinks: {{c: {{type: comet, mode: offline, dir: '{tmp_path}/my out'}}}}"
    with config.loads(text) as bus, bus.run(name="n") as run:
        for i in run.epochs(2):
            run.log({"loss": i})
    where = bus.receipts[0].sinks[0].location
    assert where is not None
    command, upload, path = shlex.split(where)
    assert ("comet", "upload") == (command, upload)
    found = [m for m in Archive(Path(path)).metrics if m[0] == "train/loss"]
    assert [("train/loss", 0.0, 1, 1), ("train/loss", 1.0, 2, 2)] == found
