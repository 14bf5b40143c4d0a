"""The plain loop: a run for trainings without a framework."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainbus import Bus
from trainbus.events import (
    AlertRaised,
    ArtifactLogged,
    CheckpointSaved,
    ConfusionMatrixLogged,
    CurveLogged,
    EpochEnded,
    EpochStarted,
    HistogramLogged,
    ImageLogged,
    MetricsLogged,
    RunEnded,
    RunStarted,
    TableLogged,
    TextLogged,
    event_name,
)
from trainbus.testing import MemorySink, check_grammar


@pytest.fixture
def memory() -> MemorySink:
    return MemorySink()


@pytest.fixture
def bus(memory: MemorySink) -> Bus:
    return Bus({"memory": memory}, on_receipt=lambda receipt: None)


def names(memory: MemorySink) -> list[str]:
    return [event_name(event) for event in memory.events]


def only(memory: MemorySink, kind: type[Any]) -> Any:
    (event,) = [event for event in memory.events if isinstance(event, kind)]
    return event


def test_a_loop_obeys_the_grammar(bus: Bus, memory: MemorySink) -> None:
    """A plain loop starts, counts its epochs and ends as every run does."""
    with bus.run(name="plain", project="p", params={"lr": 0.1}, tags=["demo"]) as run:
        for epoch in run.epochs(2):
            run.log({"loss": 1.0 / (epoch + 1)})
    assert [] == check_grammar(memory.records)
    started = RunStarted(name="plain", project="p", params={"lr": 0.1}, tags=["demo"])
    assert started == memory.events[0]
    each = ["epoch.started", "metrics.logged", "epoch.ended"]
    assert ["run.started", *each, *each, "run.ended"] == names(memory)
    assert RunEnded(status="finished") == memory.events[-1]


def test_epochs_measure_their_time(bus: Bus, memory: MemorySink) -> None:
    """An epoch that ran to its end is completed, with its duration."""
    with bus.run() as run:
        assert [2, 3] == list(run.epochs(4, start=2))
    ended = [event for event in memory.events if isinstance(event, EpochEnded)]
    assert [2, 3] == [event.epoch for event in ended]
    for event in ended:
        assert "completed" == event.outcome
        assert event.duration_s is not None
        assert 0 <= event.duration_s < 60


def test_a_loop_that_is_left_ends_its_epoch(bus: Bus, memory: MemorySink) -> None:
    """`break` completes the epoch, and what is logged afterwards belongs to none."""
    with bus.run() as run:
        for epoch in run.epochs(5):
            if epoch == 1:
                break
        run.log({"loss": 0.5})
    assert [] == check_grammar(memory.records)
    assert 2 == names(memory).count("epoch.ended")
    assert only(memory, MetricsLogged).epoch is None


def test_an_epoch_that_raised_is_not_completed(bus: Bus, memory: MemorySink) -> None:
    """The epoch in which an exception left the loop has no end of its own; the run has."""
    with pytest.raises(ValueError, match="diverged"), bus.run() as run:  # noqa: PT012
        for epoch in run.epochs(3):
            if epoch == 1:
                raise ValueError("diverged")
    assert [] == check_grammar(memory.records)
    ended = [event.epoch for event in memory.events if isinstance(event, EpochEnded)]
    assert [0] == ended
    assert "failed" == only(memory, RunEnded).status


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("diverged"), "failed"),
        (KeyboardInterrupt(), "stopped"),
        (SystemExit(0), "stopped"),
    ],
)
def test_the_exception_passes_through(
    error: BaseException, status: str, bus: Bus, memory: MemorySink
) -> None:
    """What leaves the block ends the run, and is the same object outside."""
    with pytest.raises(type(error)) as raised, bus.run():
        raise error
    assert error is raised.value
    ended = only(memory, RunEnded)
    assert status == ended.status
    assert type(error).__qualname__ == ended.error.type
    assert "test_run.py" in ended.error.traceback


def test_the_id_is_known_while_the_run_is_open(bus: Bus, memory: MemorySink) -> None:
    """The run's id is there to be printed or stored, as long as there is a run."""
    run = bus.run(name="µ/run")
    assert run.id is None
    with run:
        found = run.id
        assert found is not None
        assert found.startswith("run_")
    assert memory.records[0].run == found
    assert run.id is None


def test_names_get_their_phase(bus: Bus, memory: MemorySink) -> None:
    """A name without a phase gets the one it was logged for; numbers of all kinds are floats."""
    with bus.run() as run:
        run.log({"loss": np.float32(0.5), "lr/pg0": 1}, phase="validation", epoch=3, step=7)
    expected = MetricsLogged(
        values={"validation/loss": 0.5, "lr/pg0": 1.0}, phase="validation", epoch=3, step=7
    )
    assert expected == only(memory, MetricsLogged)


def test_everything_can_be_logged(bus: Bus, memory: MemorySink, tmp_path: Path) -> None:
    """Each method makes its event, in the epoch that runs, and arrays arrive as they are."""
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    with bus.run() as run:
        for _ in run.epochs(1):
            run.log({"acc": 0.5}, final=True)
            run.image("array", pixels, caption="c", step=1)
            run.image("file", tmp_path / "x.png")
            run.curve("pr", [0, 1], [[1, 0], [1, 1]], classes=["a", "b"], x_label="recall")
            run.table("t", ["a", "b"], [(1, 2)])
            run.confusion_matrix("m", [[1, 0], [0, 1]], ["a", "b"])
            run.text("note", "text")
            run.checkpoint(tmp_path / "w.pt", kind="best", metrics={"acc": 1}, final=True)
            run.artifact("data", tmp_path / "d", kind="dataset", aliases=["v1"])
            run.alert("hot", "91 °C", level="warning")
    assert [] == check_grammar(memory.records)
    array, file = (event for event in memory.events if isinstance(event, ImageLogged))
    assert (None, "c", 0, 1) == (array.path, array.caption, array.epoch, array.step)
    np.testing.assert_array_equal(pixels, array.array, strict=True)
    assert (str(tmp_path / "x.png"), None, 0) == (file.path, file.array, file.epoch)
    curve = only(memory, CurveLogged)
    assert ((2,), (2, 2), ["a", "b"], "pr", "recall") == (
        curve.x.shape,
        curve.y.shape,
        curve.classes,
        curve.title,
        curve.x_label,
    )
    np.testing.assert_array_equal([[1, 0], [1, 1]], curve.y)
    assert TableLogged(key="t", columns=["a", "b"], rows=[[1, 2]], epoch=0) == only(
        memory, TableLogged
    )
    matrix = only(memory, ConfusionMatrixLogged)
    assert ((2, 2), ["a", "b"], 0) == (matrix.matrix.shape, matrix.classes, matrix.epoch)
    assert TextLogged(key="note", text="text", epoch=0) == only(memory, TextLogged)
    assert CheckpointSaved(
        path=str(tmp_path / "w.pt"), kind="best", epoch=0, metrics={"acc": 1.0}, final=True
    ) == only(memory, CheckpointSaved)
    assert ArtifactLogged(
        name="data", kind="dataset", paths=[str(tmp_path / "d")], aliases=["v1"]
    ) == only(memory, ArtifactLogged)
    assert AlertRaised(title="hot", text="91 °C", level="warning") == only(memory, AlertRaised)


def test_one_curve_needs_no_class(bus: Bus, memory: MemorySink) -> None:
    """A single curve is one row named after its key; several get numbers."""
    with bus.run() as run:
        run.curve("loss", [0, 1], [3, 2])
        run.curve("many", [0, 1], np.zeros((3, 2)), title="")
    one, many = (event for event in memory.events if isinstance(event, CurveLogged))
    assert (["loss"], (1, 2), "loss") == (one.classes, one.y.shape, one.title)
    assert (["0", "1", "2"], "") == (many.classes, many.title)


def test_sinks_and_subscribers_that_fail_do_not_stop_a_loop(memory: MemorySink) -> None:
    """Whatever listens may fail: the loop goes on, and who works gets everything."""

    def broken(*_: object) -> Any:
        raise OSError("broken")

    bus = Bus({"broken": broken, "memory": memory}, on_receipt=broken)
    bus.subscribe(broken)
    with bus.run() as run:
        for _ in run.epochs(10):
            run.log({"loss": 1.0})
    assert [] == check_grammar(memory.records)
    assert 32 == len(memory.records)


def test_a_picture_is_the_one_that_was_logged(bus: Bus, memory: MemorySink, tmp_path: Path) -> None:
    """A loop may write its next picture over the last one: each sink gets both."""
    file = tmp_path / "sample.png"
    with bus.run() as run:
        for content in (b"first", b"second"):
            file.write_bytes(content)
            run.image("sample", file)
        file.unlink()
    logged = [event for event in memory.events if isinstance(event, ImageLogged)]
    assert [b"first", b"second"] == [Path(event.path or "").read_bytes() for event in logged]


def test_a_run_object_serves_one_run_after_another(bus: Bus, memory: MemorySink) -> None:
    """Two blocks are two runs with two ids."""
    for _ in range(2):
        with bus.run(name="again") as run:
            run.log({"loss": 1.0}, epoch=0)
    assert 2 == len({record.run for record in memory.records})
    epochs = [event for event in memory.events if isinstance(event, EpochStarted)]
    assert [] == epochs


def torch_tensors() -> tuple[Any, Any]:
    """Return a tensor that numpy refuses twice over, and one that has no data."""
    import torch

    whole = torch.full((2, 2), 0.5, dtype=torch.bfloat16, requires_grad=True)
    return whole, torch.ones(2, 2, device="meta")


@pytest.mark.needs("torch")
def test_tensors_of_any_kind_are_values(bus: Bus, memory: MemorySink) -> None:
    """A tensor in a graph, of a dtype that numpy has not, is a matrix, a curve, or a picture."""
    whole, _ = torch_tensors()
    with bus.run() as run:
        run.log({"score": whole.sum(), "each": whole[0], "sparse": whole.detach().to_sparse()})
        run.image("picture", whole)
        run.confusion_matrix("matrix", whole, {0: "a", 1: "b"})  # type: ignore[arg-type]
        run.curve("curve", whole[0], [whole[0], whole[1]], classes=np.array(["a", "b"]))  # type: ignore[arg-type]
    values = {"train/score": 2.0, "train/each/0": 0.5, "train/each/1": 0.5}
    assert values == only(memory, MetricsLogged).values
    halves = np.full((2, 2), 0.5)
    assert halves.tolist() == only(memory, TableLogged).rows
    np.testing.assert_array_equal(halves, only(memory, ImageLogged).array)
    matrix, curve = only(memory, ConfusionMatrixLogged), only(memory, CurveLogged)
    np.testing.assert_array_equal(halves, matrix.matrix)
    np.testing.assert_array_equal(halves, curve.y)
    assert (["a", "b"], ["a", "b"]) == (matrix.classes, curve.classes)


@pytest.mark.needs("torch")
def test_nothing_that_is_logged_raises(
    bus: Bus, memory: MemorySink, caplog: pytest.LogCaptureFixture
) -> None:
    """What can't be recorded is said once, with what to do, and counted in the receipt."""
    _, empty = torch_tensors()
    with bus.run() as run:
        for _ in range(2):
            run.log(None)  # type: ignore[arg-type]
        run.log({0: 0.5, "none": None, "raw": b"x", "meta": empty, "wave": 3j})  # type: ignore[dict-item]
        run.image("meta", empty)
        run.image("none", None)
        run.image("flat", np.zeros(3))
        run.curve("curve", ["a"], [1])
        run.confusion_matrix("matrix", None, ["a"])
        run.table("table", ["a"], 5)  # type: ignore[arg-type]
        run.table("alone", "a")
        run.checkpoint(None)  # type: ignore[arg-type]
        run.artifact("data", 5)  # type: ignore[arg-type]
        run.text("number", 5)  # type: ignore[arg-type]
        run.alert(5)  # type: ignore[arg-type]
    assert [] == check_grammar(memory.records)
    assert {"train/0": 0.5} == only(memory, MetricsLogged).values
    assert ("5", "5") == (only(memory, TextLogged).text, only(memory, AlertRaised).title)
    said = [r.getMessage() for r in caplog.records if "not recorded" in r.getMessage()]
    assert 13 == len(said) == len(set(said))
    assert "not recorded: 'values': expected names with values, found NoneType" == said[0]
    assert 14 == bus.receipts[0].unrecorded
    assert "14 values not recorded" in str(bus.receipts[0]).splitlines()[0]


def test_values_become_what_they_are(bus: Bus, memory: MemorySink) -> None:
    """Of what `log` is given, each value is the event that fits it."""
    long, longer = np.linspace(0, 1, 101), np.linspace(0, 1, 10_001)
    with bus.run() as run:
        run.log(
            {
                "val": {"f1": 0.5, "deep": {"er": 1}},
                "per class": [0.25, 0.75],
                "note": "good",
                "confusion": np.array([[1, 2], [3, 4]]),
                "rows": [{"a": 1}, {"b": "x"}],
                "long": long,
                "longer": longer,
                "counted": np.histogram([0.0, 1.0], bins=2),
                "pixels": np.zeros((3, 16, 17), dtype=np.uint8),
                "grey": np.zeros((32, 32), dtype=np.uint8),
                "nothing": None,
            },
            epoch=3,
        )
    values = {"val/f1": 0.5, "val/deep/er": 1.0, "train/per class/0": 0.25}
    assert {**values, "train/per class/1": 0.75} == only(memory, MetricsLogged).values
    assert TextLogged(key="train/note", text="good", epoch=3) == only(memory, TextLogged)
    square, rows = (event for event in memory.events if isinstance(event, TableLogged))
    assert [[1, 2], [3, 4]] == square.rows
    assert (["a", "b"], [[1, None], [None, "x"]]) == (rows.columns, rows.rows)
    np.testing.assert_array_equal(long, only(memory, CurveLogged).y[0])
    large, counted = (event for event in memory.events if isinstance(event, HistogramLogged))
    assert (10_001, [1, 1]) == (large.counts.sum(), counted.counts.tolist())
    shapes = [event.array.shape for event in memory.events if isinstance(event, ImageLogged)]  # type: ignore[union-attr]
    assert [(16, 17, 3), (32, 32)] == shapes
    assert 0 == bus.receipts[0].unrecorded


def test_figures_and_pictures_are_pictures(bus: Bus, memory: MemorySink) -> None:
    """A figure of matplotlib is drawn, a picture of Pillow kept, and neither is changed."""
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(2, 1), dpi=50, facecolor=(1, 0, 0))
    axes = figure.subplots(1, 2)
    canvas = figure.canvas
    picture = Image.new("P", (5, 4), 1)
    with bus.run() as run:
        run.log({"figure": figure, "picture": picture, "several": [picture, picture]})
        run.image("axes", axes)
        run.image("picture", picture)
    found = {e.key: e.array for e in memory.events if isinstance(e, ImageLogged)}
    names = ["figure", "picture", "several/0", "several/1"]
    assert [*(f"train/{name}" for name in names), "axes", "picture"] == list(found)
    for key in ("train/figure", "axes"):
        assert (50, 100, 3) == found[key].shape  # type: ignore[union-attr]
        assert [255, 0, 0] == found[key][0, 0].tolist()  # type: ignore[index]
    assert (4, 5, 3) == found["picture"].shape  # type: ignore[union-attr]
    assert canvas is figure.canvas


@pytest.mark.parametrize(
    ("expected", "array"),
    [
        ([0.0, 1.0], np.array([[0.0, 1.0]])),
        ([0.5, 1.1], np.array([[0.5, 1.1]])),
        ([0, 200], np.array([[0.0, 200.0]])),
        ([0, 128, 255], np.array([[-1.0, 0.0, 1.0]])),
        ([0, 255], np.array([[0, 65535]], dtype=np.uint16)),
        ([0, 255], np.array([[False, True]])),
        ([3, 4], np.array([[3, 4]])),
    ],
)
def test_a_picture_is_not_white(
    expected: list[float], array: Any, bus: Bus, memory: MemorySink
) -> None:
    """Values beyond 0…1 and bytes are scaled to bytes, where a tracker would cut them off."""
    with bus.run() as run:
        run.image("picture", array)
    assert expected == only(memory, ImageLogged).array[0].tolist()


@pytest.mark.needs("pandas", "polars")
def test_data_frames_are_tables(bus: Bus, memory: MemorySink) -> None:
    """A data frame keeps the names of its columns, and of its rows where they have any."""
    import polars

    pandas: Any = importlib.import_module("pandas")
    frame = pandas.DataFrame({"a": [1, 2], "b": ["x", None], 3: [0.5, float("inf")]})
    named = pandas.DataFrame({"f1": [0.5]}, index=pandas.Index(["cat"], name="class"))
    with bus.run() as run:
        run.table("pandas", frame)
        run.table("polars", polars.DataFrame({"a": [1], "b": [None]}))
        run.log({"named": named, "mean": named.mean()})
        run.table("mapping", {"a": [1, 2], "b": [3, 4]})
    found = [(e.columns, e.rows) for e in memory.events if isinstance(e, TableLogged)]
    assert [
        (["a", "b", "3"], [[1, "x", 0.5], [2, None, float("inf")]]),
        (["a", "b"], [[1, None]]),
        (["class", "f1"], [["cat", 0.5]]),
        (["a", "b"], [[1, 3], [2, 4]]),
    ] == found
    assert {"train/mean": 0.5} == only(memory, MetricsLogged).values


@pytest.mark.needs("omegaconf")
def test_configurations_of_any_kind_are_params(bus: Bus, memory: MemorySink) -> None:
    """A namespace, a dataclass and a configuration with holes are plain names and values."""
    from argparse import Namespace

    from omegaconf import OmegaConf

    config = OmegaConf.create({"lr": "???", "of": "${lr}", "sizes": [1, "???"], "deep": {"x": 1}})
    for params in (Namespace(lr=0.1), config, None, 5):
        with bus.run(params=params):
            pass
    found = [event.params for event in memory.events if isinstance(event, RunStarted)]
    plain = {"lr": "???", "of": "${lr}", "sizes": [1, "???"], "deep": {"x": 1}}
    assert [{"lr": 0.1}, plain, {}, {"params": 5}] == found


@pytest.mark.needs("optuna")
def test_a_pruned_trial_is_stopped(bus: Bus, memory: MemorySink) -> None:
    """Optuna ends a trial by an exception, which passes through: nothing has failed."""
    import optuna

    def objective(trial: Any) -> float:
        with bus.run(name=f"trial {trial.number}") as run:
            run.log({"loss": 1.0})
            raise optuna.TrialPruned("no better than the others")

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    study.optimize(objective, n_trials=1)
    assert [optuna.trial.TrialState.PRUNED] == [trial.state for trial in study.trials]
    end = memory.events[-1]
    assert isinstance(end, RunEnded)
    assert ("stopped", "pruned") == (end.status, end.reason)
    assert end.error is not None
    assert "no better than the others" == end.error.message
