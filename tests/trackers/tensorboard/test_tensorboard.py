"""The `tensorboard` sink, read back by TensorBoard's own readers."""

from __future__ import annotations

import io
import json
import logging
import math
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.pr_curve import metadata as pr_curve
from tensorboard.util.tensor_util import make_ndarray
from trainbus.sinks.tensorboard import TensorboardOptions, TensorboardSink

import trainbus
from support.records import CONTENT
from trainbus import RunInfo, SinkError, config
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
    Record,
    RunEnded,
    RunStarted,
    TableLogged,
    TextLogged,
)
from trainbus.testing import SinkConformance

ALL = {"scalars": 0, "images": 0, "tensors": 0}
"""How much the reader keeps of each kind: all of it."""


def reader(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance=ALL).Reload()


def content(folder: Path) -> dict[str, Any]:
    """Return all that TensorBoard reads in a folder."""
    found = reader(folder)
    tags = found.Tags()
    return {
        **{t: [(e.wall_time, e.step, e.value) for e in found.Scalars(t)] for t in tags["scalars"]},
        **{t: [(e.step, e.encoded_image_string) for e in found.Images(t)] for t in tags["images"]},
        **{t: [(e.step, array(e)) for e in found.Tensors(t)] for t in tags["tensors"]},
        "metadata": {
            tag: found.SummaryMetadata(tag).SerializeToString(deterministic=True)
            for kind in ("scalars", "images", "tensors")
            for tag in tags[kind]
        },
    }


def array(event: Any) -> Any:
    return make_ndarray(event.tensor_proto).tolist()


class TestTensorboardSink(SinkConformance):
    """The sink passes the suite."""

    package = "tensorboard"
    extra = "tensorboard"
    heavy = ("tensorflow", "torch", "PIL", "matplotlib")
    stores = CONTENT

    def make(self, folder: Path) -> TensorboardSink:
        return TensorboardSink(TensorboardOptions(logdir=str(folder / "{run}")))

    def read(self, folder: Path) -> object:
        return {path.name: content(path) for path in sorted(folder.iterdir())}


def records(*events: Event, attempt: int = 1, begin: float = 100.0) -> list[Record]:
    """Return records a second apart."""
    return [
        Record(seq=seq, run="run", time=begin + seq - 1, event=event, attempt=attempt)
        for seq, event in enumerate(events, 1)
    ]


def sink_for(folder: Path, *, attempt: int = 1, reopened: bool = False, **options: Any) -> Any:
    sink = TensorboardSink(TensorboardOptions(logdir=str(folder / "{run}"), **options))
    sink.open(RunInfo(id="run", started=RunStarted(), attempt=attempt, reopened=reopened))
    return sink


def written(folder: Path, *events: Event, **options: Any) -> EventAccumulator:
    sink = sink_for(folder, **options)
    sink.write(records(*events))
    sink.close()
    return reader(folder / "run")


def text(found: EventAccumulator, tag: str) -> str:
    """Return the last text under a tag of the text plugin."""
    assert tag in found.PluginTagToContent("text")
    return str(array(found.Tensors(tag)[-1]).decode())


def metrics(epoch: int | None = None, step: Any = None, **values: Any) -> MetricsLogged:
    return MetricsLogged(values=values, phase="train", epoch=epoch, step=step)


# Scalars ------------------------------------------------------------------------------------------


def test_metrics_are_scalars_at_their_step_and_time(tmp_path: Path) -> None:
    """Values stand at their optimizer step, those of an epoch at the epochs done."""
    found = written(
        tmp_path,
        metrics(0, loss=0.5),
        metrics(1, loss=0.25),
        metrics(0, step=7, batch=2.0),
        MetricsLogged(values={"loss": 0.125}, phase="test", epoch=1, final=True),
    )
    points = {t: [(e.wall_time, e.step, e.value) for e in found.Scalars(t)] for t in scalars(found)}
    assert {
        "loss": [(100.0, 1, 0.5), (101.0, 2, 0.25)],
        "batch": [(102.0, 7, 2.0)],
        "final/loss": [(103.0, 2, 0.125)],
    } == points


def test_what_sums_up_stands_at_the_last_step(tmp_path: Path) -> None:
    """What has neither step nor epoch stands where the last metric does, after a restart too."""
    made = records(
        metrics(0, step=40, loss=1.0),
        metrics(train_loss=0.5),
        MetricsLogged(values={"f1": 0.75}, phase="test", final=True),
        TextLogged(key="note", text="at the end"),
        RunEnded(status="finished", best=Best(metric="f1", value=0.75)),
    )
    for part in (made[:2], made[2:]):
        sink = sink_for(tmp_path)
        sink.write(part)
        sink.close()
    found = reader(tmp_path / "run")
    steps = {tag: [e.step for e in found.Scalars(tag)] for tag in scalars(found)}
    assert {"loss": [40], "train_loss": [40], "final/f1": [40], "best/f1": [40]} == steps
    assert [40] == [e.step for e in found.Tensors("note")]


def scalars(found: EventAccumulator) -> list[str]:
    return list(found.Tags()["scalars"])


def test_numbers_are_those_that_a_scalar_can_hold(tmp_path: Path) -> None:
    """NaN and ±Inf arrive as such; others as the nearest 32 bits."""
    values = {"nan": math.nan, "inf": math.inf, "minus": -math.inf, "large": 1e308, "small": 5e-324}
    found = written(tmp_path, metrics(0, third=1 / 3, **values))
    read = {tag: found.Scalars(tag)[0].value for tag in scalars(found)}
    assert math.isnan(read.pop("nan"))
    expected = {"inf": math.inf, "minus": -math.inf, "large": math.inf, "small": 0.0}
    assert {**expected, "third": float(np.float32(1 / 3))} == read


@pytest.mark.parametrize(
    "names",
    [
        ("métrique/µ", "日本", "a b", "a\\b", "x?y#z", ""),
        ("x" * 3000, "x" * 3001),
        ("\ud800", "\\ud800"),
    ],
)
def test_every_name_is_a_tag(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Names with anything in them are tags, and no two become one."""
    values = {name: float(number) for number, name in enumerate(names)}
    found = written(tmp_path, metrics(0, **values))
    assert list(values.values()) == sorted(found.Scalars(tag)[0].value for tag in scalars(found))
    for name in set(names) & {"métrique/µ", "日本", "a b", "a\\b", "x?y#z"}:
        assert values[name] == found.Scalars(name)[0].value


def test_two_axes_are_two_tags(tmp_path: Path) -> None:
    """A name logged by epoch and by step is two curves, also in a later attempt."""
    events = [metrics(0, loss=1.0), metrics(0, step=9, loss=2.0), metrics(0, step=9, loss_step=3.0)]
    first = sink_for(tmp_path)
    first.write(records(RunStarted(), *events))
    first.close()
    second = sink_for(tmp_path, attempt=2)
    second.write(records(RunStarted(), *reversed(events), attempt=2))
    second.close()
    found = reader(tmp_path / "run")
    read = {tag: [e.value for e in found.Scalars(tag)] for tag in scalars(found)}
    assert {"loss": [1, 1], "loss_step": [2, 2], "loss_step_step": [3, 3]} == read


def test_values_of_nothing_counted_have_steps_of_their_own(tmp_path: Path) -> None:
    """TensorBoard shows one value of a step, so that what has none is counted, across attempts."""
    for attempt in (1, 2):
        sink = sink_for(tmp_path, attempt=attempt)
        alert = AlertRaised(title="t", level="error")
        events: list[Event] = [metrics(gpu=1.0), metrics(gpu=2.0, cpu=1.0), alert, alert]
        sink.write(records(RunStarted(), *events, attempt=attempt))
        sink.close()
    found = reader(tmp_path / "run")
    assert [(0, 1), (1, 2), (2, 1), (3, 2)] == [(e.step, e.value) for e in found.Scalars("gpu")]
    assert [1, 3] == [e.step for e in found.Scalars("cpu")]
    assert [0, 1, 2, 3] == [e.step for e in found.Tensors("alert/error")]
    assert [0, 1] == [e.step for e in found.Tensors("run/about")]


def test_kinds_of_one_key_are_two_tags(tmp_path: Path) -> None:
    """A picture and a text with the name of a metric hide nothing."""
    pixels = np.zeros((2, 3), np.uint8)
    found = written(
        tmp_path,
        metrics(0, a=1.0),
        ImageLogged(key="a", array=pixels),
        TextLogged(key="a", text="t"),
    )
    assert (["a"], ["a_images"]) == (scalars(found), list(found.Tags()["images"]))
    assert "t" == text(found, "a_text")


# Pictures, curves, tables -------------------------------------------------------------------------


def test_pictures_arrive_as_they_were(tmp_path: Path) -> None:
    """A file keeps its bytes, an array its pixels; both have their size, caption and step."""
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    files = {}
    for kind in ("png", "jpeg"):
        files[kind] = tmp_path / f"p.{kind}"
        Image.fromarray(pixels).save(files[kind])
    found = written(
        tmp_path,
        ImageLogged(key="array", array=pixels, caption="µ", epoch=2),
        *(ImageLogged(key=kind, path=str(path), step=9) for kind, path in files.items()),
    )
    (image,) = found.Images("array")
    assert (3, 4, 2) == (image.step, image.width, image.height)
    assert "µ" == found.SummaryMetadata("array").summary_description
    with Image.open(io.BytesIO(image.encoded_image_string)) as picture:
        assert pixels.tolist() == np.asarray(picture).tolist()
    for kind, path in files.items():
        (image,) = found.Images(kind)
        assert (9, 4, 2) == (image.step, image.width, image.height)
        assert path.read_bytes() == image.encoded_image_string


def test_pictures_that_can_not_be_shown_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that is gone or empty, and an array that is no picture, cost only themselves."""
    (tmp_path / "empty.png").write_bytes(b"")
    sink = sink_for(tmp_path)
    sink.write(
        records(
            ImageLogged(key="gone", path=str(tmp_path / "none.png")),
            ImageLogged(key="empty", path=str(tmp_path / "empty.png")),
            ImageLogged(key="odd", array=np.zeros((2, 2, 7), np.uint8)),
            metrics(0, a=1.0),
        )
    )
    sink.close()
    assert 3 == sink.lost
    assert ["a"] == scalars(reader(tmp_path / "run"))
    assert "'gone' can't be shown in TensorBoard" in caplog.text


def test_pictures_can_be_left_out(tmp_path: Path) -> None:
    """`log_images: false` writes no logged picture."""
    event = ImageLogged(key="a", array=np.zeros((2, 3), np.uint8))
    assert [] == written(tmp_path, event, log_images=False).Tags()["images"]


def test_precision_over_recall_is_for_the_pr_curve_plugin(tmp_path: Path) -> None:
    """The mean and each class have precision and recall to the point, at the curve's step."""
    x = np.linspace(0, 1, 5)
    curve = CurveLogged(
        key="curves/Precision-Recall(B)",
        x=x,
        y=np.stack([1 - x, 1 - x / 2]),
        classes=["cat", "µ"],
        x_label="Recall",
        y_label="Precision",
        epoch=1,
    )
    found = written(tmp_path, curve)
    for name, expected in (("", 1 - x * 0.75), ("/cat", 1 - x), ("/µ", 1 - x / 2)):
        tag = curve.key + name
        plugin = pr_curve.parse_plugin_metadata(found.PluginTagToContent("pr_curves")[tag])
        (event,) = found.Tensors(tag)
        data = np.array(array(event))
        assert (5, 2) == (plugin.num_thresholds, event.step)
        assert np.allclose(x[::-1], data[pr_curve.RECALL_INDEX])
        assert np.allclose(expected[::-1], data[pr_curve.PRECISION_INDEX])
    assert [] == found.Tags()["images"]


def test_other_curves_are_pictures(tmp_path: Path) -> None:
    """A curve over anything else is drawn."""
    x = np.linspace(0, 1, 5)
    curve = CurveLogged(
        key="f1", x=x, y=x[None], classes=["cat"], x_label="Confidence", y_label="F1", epoch=0
    )
    (image,) = written(tmp_path, curve).Images("f1")
    assert 1 == image.step
    with Image.open(io.BytesIO(image.encoded_image_string)) as picture:
        assert (image.width, image.height) == picture.size


def test_a_confusion_matrix_is_a_picture_and_a_table(tmp_path: Path) -> None:
    """The picture has the key, and the numbers are beside it."""
    matrix = np.array([[3, 1], [0, 2]])
    event = ConfusionMatrixLogged(key="m", matrix=matrix, classes=["cat", "dog|cow"], epoch=3)
    found = written(tmp_path, event)
    (image,) = found.Images("m")
    assert 4 == image.step
    expected = [
        "| true / predicted | cat | dog\\|cow |",
        "| --- | --- | --- |",
        "| cat | 3 | 1 |",
        "| dog\\|cow | 0 | 2 |",
    ]
    assert expected == text(found, "m/table").splitlines()


def test_tables_are_markdown(tmp_path: Path) -> None:
    """Each row is a row, with line breaks and bars in cells; of very many the first are shown."""
    table = TableLogged(key="t", columns=["a", "b"], rows=[["x\ny", math.nan], ["|", None]])
    many = TableLogged(key="many", columns=["n"], rows=[[i] for i in range(1200)])
    found = written(tmp_path, table, many)
    expected = ["| a | b |", "| --- | --- |", "| x<br>y | nan |", "| \\| | None |"]
    assert expected == text(found, "t").splitlines()
    assert ["| 999 |", "", "200 more rows"] == text(found, "many").splitlines()[-3:]


def test_histograms_keep_their_bins(tmp_path: Path) -> None:
    """Each bin is its edges and its count."""
    event = HistogramLogged(key="h", counts=np.array([4, 5]), edges=np.array([0, 0.5, 1]), step=3)
    found = written(tmp_path, event)
    assert ["h"] == list(found.PluginTagToContent("histograms"))
    (tensor,) = found.Tensors("h")
    assert (3, [[0, 0.5, 4], [0.5, 1, 5]]) == (tensor.step, array(tensor))


def test_texts_arrive_as_they_are(tmp_path: Path) -> None:
    """Texts, checkpoints, artifacts, alerts and the model are texts."""
    found = written(
        tmp_path,
        TextLogged(key="t", text="[red]a\nb\u2028µ", epoch=1),
        CheckpointSaved(path="w/best.pt", kind="best", epoch=1, metrics={"fit": 0.5}),
        ArtifactLogged(name="files", paths=["a.txt"]),
        AlertRaised(title="Look", text="here", level="warning"),
        ModelDescribed(parameters=2**40),
    )
    assert "[red]a\nb\u2028µ" == text(found, "t")
    assert 2 == found.Tensors("t")[0].step
    assert "| path | w/best.pt |" in text(found, "checkpoint/best")
    assert "| metrics.fit | 0.5 |" in text(found, "checkpoint/best")
    assert "['a.txt']" in text(found, "artifact/files")
    assert "**Look**\n\nhere" == text(found, "alert/warning")
    assert f"| parameters | {2**40} |" in text(found, "run/model")


# Params and the end -------------------------------------------------------------------------------


def hparams(found: EventAccumulator) -> dict[str, Any]:
    """Return what the HPARAMS tab is fed with, by tag."""
    return {
        tag.partition("/")[2]: plugin_data_pb2.HParamsPluginData.FromString(data)
        for tag, data in found.PluginTagToContent("hparams").items()
    }


def test_params_are_hyperparameters(tmp_path: Path) -> None:
    """Nested ones have dotted names; what is no number, text or truth value is text."""
    params = {"lr": 0.5, "n": 3, "on": True, "a": {"b": [1]}, "none": None, "inf": math.inf}
    params |= {"big": 10**400, "text": "x" * 5000, **{f"p{i}": i for i in range(500)}}
    found = written(
        tmp_path, RunStarted(name="my run", params=params), ParamsUpdated(params={"x": 1})
    )
    started = hparams(found)["session_start_info"].session_start_info
    assert 100.0 == started.start_time_secs
    read = {name: getattr(v, v.WhichOneof("kind")) for name, v in started.hparams.items()}
    expected = {"lr": 0.5, "n": 3, "on": True, "a.b": "[1]", "none": "None", "inf": "inf"}
    assert {
        k: str(v) if v in (10**400,) else v for k, v in params.items() if k != "a"
    } | expected == read
    assert "| name | my run |" in text(found, "run/about")
    assert "| x | 1 |" in text(found, "run/params")


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("finished", api_pb2.STATUS_SUCCESS),
        ("failed", api_pb2.STATUS_FAILURE),
        ("stopped", api_pb2.STATUS_UNKNOWN),
    ],
)
def test_the_end_is_the_status_of_the_session(tmp_path: Path, status: Any, expected: int) -> None:
    """Each end is told as TensorBoard tells it; reason and best value are shown."""
    error = Failure(type="ValueError", message="no")
    best = Best(metric="acc", value=0.5, epoch=3)
    found = written(tmp_path, RunEnded(status=status, reason="because", error=error, best=best))
    ended = hparams(found)["session_end_info"].session_end_info
    assert (expected, 100.0) == (ended.status, ended.end_time_secs)
    assert "| reason | because |" in text(found, "run/end")
    assert "| error.message | no |" in text(found, "run/end")
    assert [(4, 0.5)] == [(e.step, e.value) for e in found.Scalars("best/acc")]


# Going on -----------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_in_its_folder(tmp_path: Path) -> None:
    """Both attempts are one run, in a file each, whose status is that of the last one."""
    for attempt, status in enumerate(("failed", "stopped", "finished"), 1):
        sink = sink_for(tmp_path, attempt=attempt)
        events = (RunStarted(), metrics(attempt, loss=float(attempt)), RunEnded(status=status))  # type: ignore[arg-type]
        sink.write(records(*events, attempt=attempt))
        sink.close()
    found = reader(tmp_path / "run")
    assert 3 == len(list((tmp_path / "run").iterdir()))
    assert [(2, 1.0), (3, 2.0), (4, 3.0)] == [(e.step, e.value) for e in found.Scalars("loss")]
    ended = hparams(found)["session_end_info"].session_end_info
    assert api_pb2.STATUS_SUCCESS == ended.status
    assert [0, 1, 2] == [e.step for e in found.Tensors("run/end")]


def everything() -> list[Record]:
    curve = CurveLogged(key="c", x=np.arange(3.0), y=np.ones((1, 3)), classes=["a"])
    best = Best(metric="loss", value=1.0)
    return records(
        RunStarted(params={"lr": 0.1}),
        metrics(0, loss=1.0),
        metrics(0, step=4, loss=2.0),
        TextLogged(key="loss", text="t"),
        ConfusionMatrixLogged(key="m", matrix=np.eye(2), classes=["a", "b"]),
        curve,
        metrics(1, loss=1.0),
        RunEnded(status="finished", best=best),
    )


@pytest.mark.parametrize("cut", range(1, 9))
def test_what_a_killed_process_took_is_there_once(tmp_path: Path, cut: int) -> None:
    """A sink that was never closed is followed by one that gets everything again."""
    made = everything()
    killed = sink_for(tmp_path)
    killed.write(made[:cut])
    again = sink_for(tmp_path, reopened=True)
    again.write(made)
    again.close()
    killed.close()
    whole = sink_for(tmp_path / "whole")
    whole.write(made)
    whole.close()
    assert TestTensorboardSink().read(tmp_path / "whole") == {"run": content(tmp_path / "run")}


def test_a_file_cut_anywhere_is_mended(tmp_path: Path) -> None:
    """However many bytes a crash left of a file, after the records came again it is whole."""
    made = [record for record in everything() if not isinstance(record.event, CurveLogged)]
    sink = sink_for(tmp_path)
    sink.write(made)
    sink.close()
    (path,) = (tmp_path / "run").iterdir()
    whole = path.read_bytes()
    for size in [
        *range(0, len(whole), max(len(whole) // 15, 1)),
        *range(len(whole) - 90, len(whole), 7),
    ]:
        path.write_bytes(whole[:size])
        again = sink_for(tmp_path, reopened=True)
        again.write(made)
        again.close()
        assert whole == path.read_bytes(), size


def test_a_full_disk_leaves_only_whole_records(tmp_path: Path) -> None:
    """A batch that does not fit is refused as a whole, and fits when there is room again."""
    sink = sink_for(tmp_path)
    made = records(*(metrics(i, loss=float(i)) for i in range(20)))
    sink.write(made[:2])
    (path,) = (tmp_path / "run").iterdir()
    size = path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
    try:
        with pytest.raises(OSError, match="No space left"):
            sink.write(made[2:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert size == path.stat().st_size
    sink.write(made[2:])
    sink.close()
    assert list(range(20)) == [e.value for e in reader(tmp_path / "run").Scalars("loss")]


# Places and mistakes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logdir", "expected"),
    [("a/{run}", "a"), ("b c/{run}/tb", "'b c'"), ("d/x-{run}", "d")],
)
def test_where_is_a_command_that_can_be_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logdir: str, expected: str
) -> None:
    """It names the folder that holds the folders of the runs."""
    monkeypatch.chdir(tmp_path)
    sink = TensorboardSink(TensorboardOptions(logdir=logdir))
    assert sink.location is None
    sink.open(RunInfo(id="run", started=RunStarted()))
    sink.close()
    folder = f"{tmp_path}/{expected}" if "'" not in expected else f"'{tmp_path}/b c'"
    assert f"tensorboard --logdir {folder}" == sink.location


@pytest.mark.parametrize("logdir", ["runs/mine", ""])
def test_the_folder_must_be_the_runs_own(logdir: str) -> None:
    """A folder that several runs would share is refused where the configuration is read."""
    made = json.dumps({"sinks": {"t": {"type": "tensorboard", "logdir": logdir}}})
    expected = r"t\.logdir: found .*, expected a path with `\{run\}`"
    with pytest.raises(trainbus.ConfigError, match=expected):
        config.loads(made)


def test_says_what_can_not_be_written(tmp_path: Path) -> None:
    """A folder that can't be made is named, with the reason and what to change."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SinkError, match=r"can't write .*/file/run: .*; set another `logdir`"):
        sink_for(tmp_path / "file")


def test_neither_tensorflow_nor_torch_is_imported(tmp_path: Path) -> None:
    """A run is written by TensorBoard's protobufs alone."""
    script = (
        "import sys, trainbus\n"
        "from trainbus.sinks.tensorboard import TensorboardSink, TensorboardOptions\n"
        f"sink = TensorboardSink(TensorboardOptions(logdir={str(tmp_path / '{run}')!r}))\n"
        "with trainbus.Bus({'t': sink}, on_receipt=lambda r: None) as bus, bus.run() as run:\n"
        "    run.log({'a': 1})\n"
        "print([m for m in ('tensorflow', 'torch', 'google.cloud') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=tmp_path)
    assert (b"[]\n", 0) == (done.stdout, done.returncode), done.stderr


def test_a_configured_bus_feeds_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run of a bus from YAML, in the sidecar process, is what TensorBoard reads."""
    made = f"sinks:\n  board:\n    type: tensorboard\n    logdir: {tmp_path}/tb/{{run}}\n"
    caplog.set_level(logging.WARNING)
    with config.loads(made) as bus, bus.run(params={"lr": 0.5}) as run:
        for epoch in run.epochs(2):
            run.log({"loss": float(epoch)})
    (report,) = bus.receipts[0].sinks
    assert (0, 0, None) == (report.dead, report.pending, report.error)
    assert f"tensorboard --logdir {tmp_path}/tb" == report.location
    (folder,) = (tmp_path / "tb").iterdir()
    found = reader(folder)
    assert [(1, 0), (2, 1)] == [(e.step, e.value) for e in found.Scalars("train/loss")]
    assert {"session_start_info", "session_end_info"} == hparams(found).keys()
    assert "" == caplog.text
