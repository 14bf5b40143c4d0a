"""A sample run for plugins: every event type, and values that break naive code."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from trainbus.events import (
    AlertRaised,
    ArtifactLogged,
    Best,
    CheckpointSaved,
    ConfusionMatrixLogged,
    ConsoleLogged,
    CurveLogged,
    EnvironmentDescribed,
    EpochEnded,
    EpochStarted,
    Event,
    GitState,
    Gpu,
    HistogramLogged,
    ImageLogged,
    MetricsLogged,
    ModelDescribed,
    ParamsUpdated,
    Record,
    Resumed,
    RunEnded,
    RunStarted,
    TableLogged,
    TextLogged,
    UnknownEvent,
)
from trainbus.interfaces import RunInfo

RUN = "conformance_20240102_030405_abcdef"
"""Id of the sample run."""

_BEGUN = 1_700_000_000.0
_STREAMS = ("console", "system")
_EARLY, _LATE = 3, 5
"""Records of each stream before a crash, and records of the main stream after it."""
_NASTY = {
    "nan": math.nan,
    "inf": math.inf,
    "minus_inf": -math.inf,
    "minus_zero": -0.0,
    "smallest": 5e-324,
    "largest": 1.7976931348623157e308,
    "métrique/µ": 0.5,
}


def sample_records(folder: Path) -> list[Record]:
    """Return one run with every event type in it; its few small files are written to `folder`."""
    return _records(sample_events(folder))


def sample_events(folder: Path) -> list[Event]:
    """Return the events of `sample_records`."""
    folder.mkdir(parents=True, exist_ok=True)
    picture, weights = folder / "picture.png", folder / "weights.bin"
    picture.write_bytes(png(4, 3))
    weights.write_bytes(bytes(range(256)))
    gone = str(folder / "gone")
    return [
        *_beginning(folder),
        *_training(),
        *_surroundings(folder),
        *_payloads(picture, gone),
        *_files(weights, gone),
        *_ending(),
    ]


def future_records(folder: Path) -> list[Record]:
    """Return the sample run with events of a newer schema in between."""
    events: list[Event | UnknownEvent] = list(sample_events(folder))
    for index in (len(events) - 1, len(events) // 2, 1):
        events.insert(index, future_event())
    return _records(events)


def future_event() -> UnknownEvent:
    """Return an event of a newer schema, whose fields look much like those of known ones."""
    data = {"type": "weights.pruned", "key": "k", "values": {"x": 1.0}, "epoch": 1, "step": 9}
    return UnknownEvent("weights.pruned", data)


def attempts(folder: Path) -> tuple[list[Record], list[Record]]:
    """Return the records of a training that was killed, and of the one that resumed its run.

    The first logs the metric `train/firstpart`, the second `train/secondpart`.
    """
    started = RunStarted(
        name="resumed", project="conformance", params={"epochs": 2}, save_dir=str(folder)
    )
    again = msgspec.structs.replace(started, resumed=Resumed(run=RUN, epoch=0, step=8))
    first: list[Event] = [started, *_epoch(0, {"train/firstpart": 1.5})]
    second: list[Event] = [again, *_epoch(1, {"train/secondpart": 2.5})]
    return _records(first), _records([*second, RunEnded(status="finished")], attempt=2)


def streams(folder: Path) -> tuple[list[Record], list[Record], list[Record]]:
    """Return the records of a run with two more streams, `console` and `system`.

    They log metrics with the names of `stream_metrics`.

    Returns:
        The run; the part of it that a sink has received when it crashes; and what it receives after
        that: the whole run again, with its streams interleaved in another way. The records that are
        new to it have the same order in the first and in the last list.
    """
    main = sample_records(folder)
    early, late = main[:-_LATE], main[-_LATE:]
    parts = {name: _stream_records(name) for name in _STREAMS}
    received: list[Record] = []
    for index, record in enumerate(early):
        received.append(record)
        if index % 9 == 8:  # so that a stream is behind the others in seq
            received += [part[index // 9] for part in parts.values() if index // 9 < _EARLY]
    new = [record for part in parts.values() for record in part[_EARLY:]]
    repeated = [record for part in parts.values() for record in part]
    return [*received, *new, *late], received, [early[0], *repeated, *early[1:], *late]


def stream_metrics() -> list[str]:
    """Return parts of the metrics' names in the streams of `streams`, each of one record."""
    return [f"{name}part{seq}" for name in _STREAMS for seq in range(1, _EARLY + 3, 3)]


def _stream_records(name: str) -> list[Record]:
    records = []
    for seq in range(1, _EARLY + 4):
        events: list[Event] = [
            MetricsLogged(values={f"{name}/{name}part{seq}": 0.5}, phase="system", step=20 + seq),
            TextLogged(key=f"{name}/text{seq}", text=f"{name} {seq}", step=20 + seq),
            AlertRaised(title=f"{name} {seq}", level="warning"),
        ]
        event, time = events[(seq - 1) % 3], _BEGUN + 3600 + 2 * seq
        records.append(Record(seq=seq, run=RUN, time=time, event=event, stream=name))
    return records


def run_info(records: Sequence[Record]) -> RunInfo:
    """Return what a sink is opened with for these records.

    Raises:
        ValueError: they do not begin with `run.started`.
    """
    first = records[0]
    if not isinstance(first.event, RunStarted):
        raise ValueError(f"expected run.started first, found {first.event!r}")
    return RunInfo(id=first.run, started=first.event, attempt=first.attempt)


def png(width: int, height: int) -> bytes:
    """Return a red picture as a PNG file (8 bits, RGB)."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = (b"\x00" + b"\xff\x00\x00" * width) * height
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _records(events: Iterable[Event | UnknownEvent], *, attempt: int = 1) -> list[Record]:
    begun = _BEGUN + 3600 * attempt
    return [
        Record(seq=seq, run=RUN, time=begun + seq / 4, event=event, attempt=attempt)
        for seq, event in enumerate(events, 1)
    ]


def _epoch(epoch: int, values: dict[str, float]) -> list[Event]:
    return [
        EpochStarted(epoch=epoch),
        MetricsLogged(values=values, phase="train", epoch=epoch),
        EpochEnded(epoch=epoch, duration_s=0.5, outcome="completed"),
    ]


def _beginning(folder: Path) -> list[Event]:
    params: dict[str, Any] = {
        "epochs": 4,
        "lr": 0.01,
        "big": 2**70,
        "text": "x" * 5000,
        "none": None,
        "nested": {"list": [1, {"deep": [None, [], {}]}], "": "no name", "a.b/c": True, **_NASTY},
    }
    return [
        RunStarted(
            name="métrique/µ",
            project="conformance",
            group="group",
            job_type="train",
            tags=["tag", "µ"],
            notes="two\nlines",
            task="detect",
            params=params,
            framework="none",
            framework_version="0.0",
            save_dir=str(folder),
            resumed=Resumed(epoch=1, step=8),
            goals={"metrics/*": "max"},
        ),
        ParamsUpdated(params={"batch": 16, "nested": {"list": []}}),
        ModelDescribed(
            parameters=2**40,
            gradients=0,
            layers=12,
            gflops=math.nan,
            speed_ms={"inference": math.inf},
            classes=["cat", "µ"],
            extra={"µ": -0.0},
        ),
    ]


def _surroundings(folder: Path) -> list[Event]:
    return [
        EnvironmentDescribed(
            command=["python", "train µ.py", "--lr", "0.1", ""],
            cwd=str(folder),
            script="train µ.py",
            python="3.11.0",
            executable="/usr/bin/python",
            packages={"numpy": "2.0", "µ": ""},
            os="Linux",
            host="höst",
            user="me",
            cpu="[b]CPU[/b]",
            cpus=2,
            cores=1,
            memory=2**40,
            gpus=[Gpu(name="GPU µ", memory=2**36), Gpu(name="")],
            git=GitState(commit="0" * 40, dirty=True, diff="--- a\n+++ b\n\x1b[31mred\u2028"),
            scheduler={"SLURM_JOB_ID": "1"},
        ),
        EnvironmentDescribed(),
        ConsoleLogged(stream="stdout", text="[red]one\ntwo µ\u2028", first_line=1, time=_BEGUN),
        ConsoleLogged(stream="stderr", text="", first_line=3),
        ConsoleLogged(
            stream="stderr", text="dropped", first_line=4, dropped_lines=9, dropped_bytes=2**40
        ),
    ]


def _training() -> list[Event]:
    return [
        EpochStarted(epoch=1),
        MetricsLogged(values={"train/loss": 3.5}, phase="train", epoch=1, step=9),
        EpochEnded(epoch=1, outcome="retried"),
        EpochStarted(epoch=1),
        MetricsLogged(values={"train/loss": 2.5}, phase="train", epoch=1, step=9),
        MetricsLogged(values={"lr": 0.1}, phase="train", epoch=1, step=10, on_request=True),
        MetricsLogged(values={"train/loss": 2.25, **_NASTY}, phase="train", epoch=1),
        MetricsLogged(values={"metrics/mAP50(B)": 0.25}, phase="validation", epoch=1),
        EpochEnded(epoch=1, duration_s=0.5, outcome="completed"),
        EpochStarted(epoch=2),
        EpochEnded(epoch=2, duration_s=0.0, outcome="recovered"),
        *_epoch(2, {"train/loss": math.nan}),
        *_epoch(3, {"train/loss": 1.125}),
        MetricsLogged(values={}, phase="test"),
        MetricsLogged(values={"system/gpu": 99.5}, phase="system"),
        MetricsLogged(values={"metrics/mAP50(B)": 0.75}, phase="validation", final=True),
    ]


def _payloads(picture: Path, gone: str) -> list[Event]:
    colours = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
    x = np.linspace(0, 1, 5)
    return [
        ImageLogged(key="image/file", path=str(picture), caption="ünder", epoch=1, step=9),
        ImageLogged(key="image/gone", path=gone + ".png"),
        ImageLogged(key="image/array", array=colours, epoch=1),
        ImageLogged(key="image/grey", array=np.linspace(0, 1, 12).reshape(3, 4)),
        CurveLogged(
            key="curves/µ",
            x=x,
            y=np.array([x, [0, math.nan, math.inf, -0.0, 1]]),
            classes=["cat", "µ"],
            title="[b]title[/b]",
            epoch=1,
        ),
        CurveLogged(key="curves/point", x=np.zeros(1), y=np.zeros((1, 1)), classes=["one"]),
        ConfusionMatrixLogged(key="matrix", matrix=np.array([[3, 1], [0, 2]]), classes=["a", "b"]),
        ConfusionMatrixLogged(
            key="matrix/share",
            matrix=np.array([[math.nan, 1.0], [0.0, 0.0]]),
            classes=["a", "b"],
            normalized=True,
            epoch=1,
        ),
        TableLogged(
            key="table/µ",
            columns=["text", "number"],
            rows=[["µ", 1], ["none", None], ["nan", math.nan], ["nested", {"a": [1]}]],
        ),
        TableLogged(key="table/empty", columns=[], rows=[]),
        HistogramLogged(key="histogram", counts=np.array([0, 3, 1]), edges=np.arange(4) / 2),
        TextLogged(key="text/µ", text="[red]two\nlines\x1b[31m\u2028", epoch=1, step=9),
    ]


def _files(weights: Path, gone: str) -> list[Event]:
    metadata = {"nested": {"list": [None, math.nan]}}
    return [
        CheckpointSaved(path=str(weights), kind="best", epoch=1, step=10, metrics={"fit": 0.25}),
        CheckpointSaved(path=gone + ".pt", kind="last", epoch=2, metrics=dict(_NASTY)),
        CheckpointSaved(path=str(weights), kind="periodic", metadata=metadata, final=True),
        ArtifactLogged(
            name="conformance-files",
            kind="dataset",
            paths=[str(weights), gone + ".bin"],
            aliases=["latest"],
            metadata=metadata,
        ),
        ArtifactLogged(name="nothing"),
    ]


def _ending() -> list[Event]:
    return [
        AlertRaised(title="information", level="info"),
        AlertRaised(title="wärning", text="two\nlines", level="warning"),
        AlertRaised(title="[b]error[/b]", text="\x1b[31mred", level="error"),
        RunEnded(
            status="finished",
            reason="early stopping",
            best=Best(metric="métrique/µ", value=math.nan, epoch=1),
        ),
    ]
