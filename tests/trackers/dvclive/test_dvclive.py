"""The `dvclive` sink, read back from the files as DVC and any reader of TSV, JSON and YAML do."""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
import math
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from trainbus.sinks.dvclive import DvcliveOptions, DvcliveSink

import trainbus
from support.records import CONTENT
from support.records import records as make_records
from trainbus import RunInfo, config
from trainbus.errors import ConfigError, SinkError
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
    ParamsUpdated,
    RunEnded,
    RunStarted,
    TableLogged,
    TextLogged,
)
from trainbus.testing import SinkConformance

# DVC's imports emit warnings, and Pillow leaves DVCLive's open file to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:unclosed file:ResourceWarning"
)


class TestDvclive(SinkConformance):
    package = "dvclive"
    extra = "dvclive"
    heavy = ("dvc", "PIL", "matplotlib", "ruamel.yaml")
    # run.started is required, and DVC does not show the others.
    stores = tuple(set(CONTENT) - {AlertRaised})

    def make(self, folder: Path) -> DvcliveSink:
        return DvcliveSink(
            DvcliveOptions(dir=str(folder / "{run}"), save_checkpoints="all", dvcyaml=None)
        )

    def read(self, folder: Path) -> object:
        files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name[0] != ".")
        return [(str(f.relative_to(folder)), content(f)) for f in files]


def content(path: Path) -> Any:
    """Return the content of a file."""
    match path.suffix:
        case ".tsv":
            with path.open(encoding="utf-8", newline="") as file:
                return list(csv.DictReader(file, delimiter="\t"))
        case ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        case ".yaml":
            return yaml.safe_load(path.read_text(encoding="utf-8"))
        case ".txt":
            return path.read_text(encoding="utf-8")
        case _:
            return hashlib.sha256(path.read_bytes()).hexdigest()


def log(folder: Path, *events: Event, started: RunStarted | None = None, **options: Any) -> Path:
    """Log events of one run and return its folder."""
    sink = DvcliveSink(DvcliveOptions(dir=str(folder), **options))
    first = started or RunStarted()
    sink.open(RunInfo(id="r", started=first))
    sink.write(records(first, *events))
    sink.close()
    return folder


records = partial(make_records, run="r")


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """Return the steps and values of a metric."""
    rows = content(folder / f"plots/metrics/{name}.tsv")
    return [(int(row["step"]), float(row[name.split("/")[-1]])) for row in rows]


def metrics(value: float, **about: Any) -> MetricsLogged:
    return MetricsLogged(values={"train/loss": value}, phase="train", **about)


def test_values_and_steps_are_exact(tmp_path: Path) -> None:
    """Step values are at their step, epoch values at the number of epochs done; all are exact."""
    values = [0.1, math.nan, math.inf, -math.inf, 5e-324]
    log(tmp_path, *(metrics(v, epoch=i) for i, v in enumerate(values)), metrics(2.0, step=70))
    expected = [*enumerate(values, 1), (70, 2.0)]
    assert repr(expected) == repr(curve(tmp_path, "train/loss"))
    summary = content(tmp_path / "metrics.json")
    assert (70, 2.0) == (summary["step"], summary["train"]["loss"])


def test_final_values_are_a_summary_and_no_curve(tmp_path: Path) -> None:
    """Values of the final evaluation are under `final` and do not change the step."""
    log(tmp_path, metrics(1.0, epoch=3), metrics(9.0, final=True))
    summary = content(tmp_path / "metrics.json")
    assert (4, 1.0, 9.0) == (
        summary["step"],
        summary["train"]["loss"],
        summary["final"]["train"]["loss"],
    )
    assert [(4, 1.0)] == curve(tmp_path, "train/loss")


def test_a_summary_is_at_the_last_step(tmp_path: Path) -> None:
    """A value with neither step nor epoch is at the last metric's position."""
    summary = MetricsLogged(values={"train_loss": 0.5}, phase="train")
    log(tmp_path, metrics(1.0, step=40, epoch=0), summary)
    assert [(40, 0.5)] == curve(tmp_path, "train_loss")


def test_a_superseded_best_is_no_loss(tmp_path: Path) -> None:
    """A replaced best checkpoint is not a loss; a missing newest one is."""
    (tmp_path / "2.pt").write_text("better")
    best = [CheckpointSaved(path=str(tmp_path / f"{n}.pt"), kind="best") for n in (1, 2, 3)]
    for expected, events in ((0, best[:2]), (1, best)):
        sink = DvcliveSink(
            DvcliveOptions(dir=str(tmp_path / f"{expected}"), save_checkpoints="best")
        )
        sink.open(RunInfo(id="r", started=RunStarted()))
        sink.write(records(RunStarted(), *events, RunEnded(status="finished")))
        assert expected == sink.lost
        sink.close()
        folder = tmp_path / f"{expected}" / "artifacts" / "checkpoints" / "best"
        assert ["2.pt"] == [path.name for path in folder.iterdir()]


def test_names_stay_apart_and_in_the_folder(tmp_path: Path) -> None:
    """Names that are too long, reserved or invalid as file names get separate files."""
    names = ["../../up", "/etc/x", "a:b", "a?b", "x" * 300, "𠀀" * 200, "step", "t/step", "", "a/"]
    names += [
        "epoch",
        "time",
        "timestamp",
        "a.tsv/b",
        "a",
        "..",
        "a//b",
        "train/loss",
        "train",
        "train/loss/box",
        "step/x",
    ]
    values = {name: float(i) for i, name in enumerate(names)}
    log(tmp_path / "out", MetricsLogged(values=values, phase="train", epoch=0))
    files = list((tmp_path / "out/plots/metrics").rglob("*.tsv"))
    found = {}
    for file in files:
        with file.open(encoding="utf-8") as rows:
            header, row = list(csv.reader(rows, delimiter="\t"))
        assert ["step", "1"] == [header[0], row[0]]
        found[float(row[1])] = file
    assert set(values.values()) == found.keys()
    assert ["out"] == [p.name for p in tmp_path.iterdir() if p.name != "trainbus-runs"]


def test_names_are_the_same_in_every_process(tmp_path: Path) -> None:
    """A name that was replaced has the same file in the next attempt."""
    values = {"loss": 1.0, "loss/box": 2.0, "a?b": 3.0}
    log(tmp_path, MetricsLogged(values=values, phase="train", epoch=0))
    before = sorted(tmp_path.rglob("*.tsv"))
    sink = DvcliveSink(DvcliveOptions(dir=str(tmp_path)))
    sink.open(RunInfo(id="r", started=RunStarted(), attempt=2))
    event = MetricsLogged(values=values, phase="train", epoch=1)
    sink.write(records(event, attempt=2))
    sink.close()
    assert before == sorted(tmp_path.rglob("*.tsv"))
    assert {2} == {len(content(path)) for path in before}


def test_params_are_nested_and_updated(tmp_path: Path) -> None:
    """Parameters keep their nesting; an update leaves the others unchanged."""
    params: dict[str, Any] = {"a": {"b": 1, "c": [1, {"d": None}]}, "long": "x" * 10_000}
    params |= {f"p{i}": i for i in range(500)}
    started = RunStarted(name="n", tags=["t"], params={**params, "n": np.float32(0.5), "t": (1, 2)})
    log(tmp_path, ParamsUpdated(params={"a": {"b": 2}}), started=started)
    found = content(tmp_path / "params.yaml")
    assert {"name": "n", "tags": ["t"]} == found["run"]
    assert {"b": 2, "c": [1, {"d": None}]} == found["a"]
    assert ("x" * 10_000, 499, 0.5, [1, 2]) == tuple(found[k] for k in ("long", "p499", "n", "t"))


def test_params_of_the_training_override_the_sinks(tmp_path: Path) -> None:
    """A parameter named `run` is not replaced by the run's name and tags."""
    log(tmp_path, started=RunStarted(name="n", params={"run": 1}))
    assert {"run": 1} == content(tmp_path / "params.yaml")


def test_charts_are_plots_of_dvc(tmp_path: Path) -> None:
    """Curves, matrices and histograms are stored as data, and `dvc.yaml` has their templates."""
    x = np.array([0.0, 0.5])
    y = np.array([[1, math.nan], [2, 3]])
    matrix = np.array([[2, 1], [0, 1]])
    log(
        tmp_path / "out",
        CurveLogged(key="pr", x=x, y=y, classes=["x", "cat"], x_label="x", y_label="p"),
        ConfusionMatrixLogged(key="m", matrix=matrix, classes=["a", "b"]),
        ConfusionMatrixLogged(key="pr", matrix=matrix, classes=["a", "b"]),
        HistogramLogged(key="h", counts=np.array([3, 1]), edges=np.array([0, 1, 2.5])),
        dvcyaml=str(tmp_path / "dvc.yaml"),
    )
    plots = tmp_path / "out/plots/custom"
    points = [{"x": 0.0, "x_": 1.0, "cat": 2.0}, {"x": 0.5, "x_": None, "cat": 3.0}]
    assert points == content(plots / "pr.json")
    cases = [(case["actual"], case["predicted"]) for case in content(plots / "m.json")]
    assert [("a", "a"), ("a", "a"), ("a", "b"), ("b", "b")] == cases
    assert cases == [
        (c["actual"], c["predicted"]) for c in content(plots / "pr_confusionmatrix.json")
    ]
    bins = [{"bin": "0 … 1", "count": 3.0}, {"bin": "1 … 2.5", "count": 1.0}]
    assert bins == content(plots / "h.json")
    (drawn,) = [
        p for p in content(tmp_path / "dvc.yaml")["plots"] if "out/plots/custom/pr.json" in p
    ]
    about = {"template": "linear", "x": "x", "y": ["x_", "cat"], "title": "pr", "y_label": "p"}
    assert about == drawn["out/plots/custom/pr.json"]


def test_dvc_reads_what_is_written(tmp_path: Path) -> None:
    """`dvc metrics show` and `dvc plots show` find the run through `dvc.yaml`."""
    log(
        tmp_path / "out",
        metrics(0.5, epoch=0),
        CurveLogged(key="pr", x=np.arange(2.0), y=np.ones((1, 2)), classes=["c"]),
        ConfusionMatrixLogged(key="m", matrix=np.eye(2), classes=["a", "b"]),
        HistogramLogged(key="h", counts=np.ones(2), edges=np.arange(3)),
        ImageLogged(key="i", array=np.zeros((2, 2)), epoch=0),
        started=RunStarted(params={"lr": 0.1}),
        dvcyaml=str(tmp_path / "dvc.yaml"),
    )
    Repo = importlib.import_module("dvc.repo").Repo  # noqa: N806

    repo = Repo.init(str(tmp_path), no_scm=True)
    shown = repo.metrics.show()[""]["data"]
    assert 0.5 == shown["out/metrics.json"]["data"]["train"]["loss"]
    assert {"lr": 0.1} == repo.params.show()[""]["data"]["out/params.yaml"]["data"]
    sources = repo.plots.show()["workspace"]["sources"]["data"]
    names = {str(Path(name).relative_to("out/plots")) for name in sources}
    expected = {"metrics/train/loss.tsv", "custom/pr.json", "custom/m.json", "custom/h.json"}
    assert expected | {"images/i/1.png"} == names
    assert not [source for source in sources.values() if "error" in source]
    repo.close()


def test_pictures_tables_and_texts_are_files(tmp_path: Path) -> None:
    """Images and drawn tables are PNG files per step; texts are unchanged."""
    from PIL import Image

    pixels = np.array([[0.0, 1.0]])
    text = "a\r\nb\u2028µ"
    log(
        tmp_path,
        ImageLogged(key="a.png", array=pixels, epoch=0),
        ImageLogged(key="a", array=pixels),
        TableLogged(key="t", columns=["c"], rows=[[1]], step=3),
        TextLogged(key="note", text=text),
    )
    images = tmp_path / "plots/images"
    with Image.open(images / "a.png") as picture:
        assert [[0, 255]] == np.asarray(picture).tolist()
    assert 3 == len(list(images.rglob("*.png")))
    assert (images / "t/3.png").is_file()
    assert text.encode() == (tmp_path / "texts/note.txt").read_bytes()


def test_an_event_that_can_not_be_shown_is_the_only_loss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Missing and invalid images are counted and logged; later events arrive."""
    sink = DvcliveSink(DvcliveOptions(dir=str(tmp_path)))
    sink.open(RunInfo(id="r", started=RunStarted()))
    gone = ImageLogged(key="gone", path=str(tmp_path / "gone.png"))
    none = ImageLogged(key="none", array=np.zeros((2, 2, 7)))
    sink.write(records(RunStarted(), gone, none, metrics(1.0, epoch=0)))
    sink.close()
    assert (2, [(1, 1.0)]) == (sink.lost, curve(tmp_path, "train/loss"))
    assert "'gone' can't be shown in DVCLive" in caplog.text


@pytest.mark.parametrize(
    ("ended", "expected"),
    [
        (RunEnded(status="stopped", reason="KeyboardInterrupt"), ("stopped", "KeyboardInterrupt")),
        (
            RunEnded(status="failed", reason="E: no", error=Failure(type="E", message="no")),
            ("failed", "E: no"),
        ),
    ],
)
def test_the_end_is_in_the_summary(
    tmp_path: Path, ended: RunEnded, expected: tuple[str, str]
) -> None:
    """The status and reason of the end are in metrics.json."""
    log(tmp_path, ended)
    run = content(tmp_path / "metrics.json")["run"]
    assert expected == (run["status"], run["reason"])


def test_the_best_value_is_in_the_summary(tmp_path: Path) -> None:
    """The best value and its epoch, counted from 1, are always in metrics.json."""
    best = Best(metric="acc", value=0.5, epoch=1)
    own = MetricsLogged(values={"best": 1.0}, phase="train", epoch=0)
    log(tmp_path / "a", RunEnded(status="finished", best=best))
    assert {"acc": 0.5, "epoch": 2} == content(tmp_path / "a/metrics.json")["best"]
    log(tmp_path / "b", own, RunEnded(status="finished", best=best))
    summary = content(tmp_path / "b/metrics.json")
    assert (1.0, True) == (summary["best"], 0.5 in summary.values())


def test_records_of_a_killed_process_are_stored_once(tmp_path: Path) -> None:
    """The next process continues the files of a killed process."""
    events = records(RunStarted(), *(metrics(float(i), epoch=i) for i in range(4)))
    first = DvcliveSink(DvcliveOptions(dir=str(tmp_path)))
    first.open(RunInfo(id="r", started=RunStarted()))
    first.write(events[:3])
    second = DvcliveSink(DvcliveOptions(dir=str(tmp_path)))
    second.open(RunInfo(id="r", started=RunStarted(), reopened=True))
    second.write(events)
    second.close()
    assert [(i + 1, float(i)) for i in range(4)] == curve(tmp_path, "train/loss")


@pytest.mark.parametrize("torn", ["", "{", "[1]"])
def test_continues_files_that_a_crash_truncated(tmp_path: Path, torn: str) -> None:
    """A truncated metrics.json or params.yaml is written again."""
    log(tmp_path, metrics(1.0, epoch=0), started=RunStarted(params={"a": 1}))
    for name in ("metrics.json", "params.yaml"):
        (tmp_path / name).write_text(torn)
    sink = DvcliveSink(DvcliveOptions(dir=str(tmp_path)))
    sink.open(RunInfo(id="r", started=RunStarted(), attempt=2))
    sink.write(records(RunStarted(params={"a": 2}), metrics(2.0, epoch=1), attempt=2))
    sink.close()
    assert [(1, 1.0), (2, 2.0)] == curve(tmp_path, "train/loss")
    assert {"a": 2} == content(tmp_path / "params.yaml")
    assert 2.0 == content(tmp_path / "metrics.json")["train"]["loss"]


def test_a_git_repository_is_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sink does not run `dvc init` in a Git repository, unlike DVCLive."""
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_STUDIO_TOKEN", "secret")
    log(tmp_path / "out", metrics(1.0, epoch=0))
    assert {".git", "out"} == {p.name for p in tmp_path.iterdir()} - {"trainbus-runs"}


def test_files_of_one_name_are_both_kept(tmp_path: Path) -> None:
    """Files of an artifact that share a name keep their folders."""
    paths = [tmp_path / name / "x.txt" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(path.parent.name)
    event = ArtifactLogged(name="data", paths=[str(path) for path in paths])
    folder = log(tmp_path / "out", event) / "artifacts" / "data"
    assert ["a", "b"] == [(folder / name / "x.txt").read_text() for name in ("a", "b")]


@pytest.mark.parametrize(
    ("save", "expected"),
    [
        ("none", []),
        ("best", ["best/best.pt"]),
        ("last", ["last/last.pt"]),
        ("all", ["1/periodic.pt", "best/best.pt", "last/last.pt"]),
    ],
)
def test_save_checkpoints_chooses(tmp_path: Path, save: Any, expected: Sequence[str]) -> None:
    """The option selects the checkpoints to copy; each is copied in its final state."""
    sink = DvcliveSink(DvcliveOptions(dir=str(tmp_path / "out"), save_checkpoints=save))
    files = {kind: tmp_path / f"{kind}.pt" for kind in ("best", "last", "periodic")}
    with trainbus.Bus({"d": sink}, on_receipt=lambda r: None) as bus, bus.run() as run:
        for number in range(2):
            for kind in ("best", "last"):
                files[kind].write_text(f"{kind} of {number}")
                run.checkpoint(files[kind], kind=kind, epoch=number)
        files["periodic"].write_text("periodic of 1")
        run.checkpoint(files["periodic"], kind="periodic", epoch=0)
    folder = tmp_path / "out/artifacts/checkpoints"
    found = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*.pt")}
    assert {name: f"{Path(name).stem} of 1" for name in expected} == found


def test_options_are_checked() -> None:
    """A `dvc.yaml` with another name is rejected when the configuration is read."""
    with pytest.raises(ConfigError, match=r"dvc\.yaml"):
        config.loads("sinks: {d: {type: dvclive, dvcyaml: other.yaml}}")


def test_the_error_names_what_can_not_be_written(tmp_path: Path) -> None:
    """The error names a folder that can't be created, and the option to change."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SinkError, match=r"can't write .*/file/x: .*; set another `dir`"):
        log(tmp_path / "file/x")


def test_a_configured_bus_fills_the_folder(tmp_path: Path) -> None:
    """A run of a YAML configuration arrives in the folder of its id."""
    text = f"sinks:\n  dvc:\n    type: dvclive\n    dir: {tmp_path}/out/{{run}}\n"
    with config.loads(text) as bus, bus.run(name="n") as run:
        for i in run.epochs(2):
            run.log({"loss": i})
    (folder,) = (tmp_path / "out").iterdir()
    assert [(1, 0.0), (2, 1.0)] == curve(folder, "train/loss")
    assert str(folder) == bus.receipts[0].sinks[0].location
