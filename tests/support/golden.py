"""The journal that every later version has to read: what it says, and how it was written.

    python tests/support/golden.py FOLDER

writes it anew, below a folder that does not exist; `tests/data/journal-1` is what version 1 of the
schema wrote, and no file of it is ever written again. New event types get a new attempt, in a file
of its own.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

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
    Failure,
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
)
from trainbus.journal import encoding
from trainbus.journal.directory import RunFolder
from trainbus.journal.recovery import write_end
from trainbus.journal.writer import JournalWriter

BEGUN = 1_700_000_000.0
FILES = {
    "picture é.png": b"\x89PNG\r\n\x1a\n no picture, but bytes \x00\xff",
    "best.pt": bytes(range(256)),
    "notes.txt": "métrique\n".encode(),
}
"""The files that the records name, and that were gone when the journal was finished."""

NUMBERS = {
    "nan": math.nan,
    "inf": math.inf,
    "minus_inf": -math.inf,
    "minus_zero": -0.0,
    "smallest": 5e-324,
    "largest": 1.7976931348623157e308,
    "third": 1 / 3,
    "métrique/µ": 0.5,
}


def events(untyped_nan: Any = math.nan) -> list[tuple[int, Event]]:
    """Return the events with their attempts, as they were logged.

    Args:
        untyped_nan: what stands for NaN where a value may be of any type: read back, it is text.
    """
    attempts = (_first(untyped_nan), _second(), _third())
    return [(number, event) for number, each in enumerate(attempts, 1) for event in each]


def records(untyped_nan: Any = "NaN") -> list[Record]:
    """Return the records, as they are read back."""
    found: list[Record] = []
    for attempt, event in events(untyped_nan):
        seq = 1 + sum(record.attempt == attempt for record in found)
        time = BEGUN + 3600 * attempt + seq / 4
        found.append(
            Record(seq=seq, run="journal-1", time=time, event=event, attempt=attempt, rank=0)
        )
    return found


def write(folder: Path) -> RunFolder:
    """Write the journal below a folder, with small limits, so that little has to be kept."""
    with (
        tempfile.TemporaryDirectory() as elsewhere,
        mock.patch.object(encoding, "MAX_LINE", 4096),
        mock.patch.object(encoding, "ARRAY_IN_LINE", 1024),
    ):
        before = os.getcwd()
        os.chdir(elsewhere)  # the paths in it are relative, as they would differ otherwise
        try:
            for name, content in FILES.items():
                Path(name).write_bytes(content)
            return _write(folder)
        finally:
            os.chdir(before)


def _write(folder: Path) -> RunFolder:
    run = RunFolder.create([folder], "journal-1")
    told = records(math.nan)
    for attempt in (1, 2, 3):
        journal = JournalWriter(run, wants_files=lambda event: True)
        for record in told:
            if record.attempt == attempt and (attempt, type(record.event)) != (1, RunEnded):
                journal.append(record.event, record.time)  # type: ignore[arg-type]
        journal.close()
    [lost] = [r for r in told if r.attempt == 1 and isinstance(r.event, RunEnded)]
    write_end(run, lost)
    return run


def _first(untyped_nan: Any) -> list[Event]:
    """Return what a training logged that was killed, and the end that it was given."""
    params = {
        "epochs": 4,
        "big": 2**70,
        "none": None,
        "flag": True,
        "text": 'quotes " and \\, lines\n, \u2028, \x00, ☃, 🙂',
        "nested": {"list": [1, [2.5, {"deep": [None, [], {}]}]], "": "no name", "a.b/c": -0.0},
        "nan": untyped_nan,
    }
    return [
        RunStarted(
            name="métrique/µ ☃",
            project="golden",
            group="group",
            job_type="train",
            tags=["tag", "µ"],
            notes="two\nlines",
            task="detect",
            params=params,
            framework="none",
            framework_version="0.0",
            save_dir="runs/golden",
            world_size=2,
            goals={"metrics/*": "max", "loss": "min"},
        ),
        ParamsUpdated(params={"batch": 16, "crc": {"crc": "00000000"}}),
        ModelDescribed(
            parameters=2**40,
            gradients=0,
            layers=12,
            gflops=math.nan,
            speed_ms={"inference": math.inf},
            classes=["cat", "µ"],
            extra={"µ": -0.0},
        ),
        EpochStarted(epoch=0),
        MetricsLogged(values=dict(NUMBERS), phase="train", epoch=0, step=1, on_request=True),
        MetricsLogged(values={"metrics/mAP50(B)": 0.25}, phase="validation", epoch=0),
        EpochEnded(epoch=0, duration_s=0.5, outcome="completed"),
        *_pictures(),
        *_numbers(),
        TextLogged(key="text/µ", text="[red]two\nlines\x1b[31m\u2028", epoch=0, step=9),
        TextLogged(key="text/long", text="é☃ " * 3000),
        RunEnded(
            status="failed",
            reason="killed",
            error=Failure(type="ProcessLost", message="killed"),
        ),
    ]


def _pictures() -> list[Event]:
    return [
        ImageLogged(key="image/file", path="picture é.png", caption="ünder", epoch=0, step=9),
        ImageLogged(key="image/gone", path="gone.png"),
        ImageLogged(key="image/small", array=np.arange(6, dtype=np.uint8).reshape(1, 2, 3)),
        ImageLogged(key="image/large", array=np.arange(1200).reshape(20, 20, 3).astype(np.uint8)),
        ImageLogged(key="image/grey", array=np.linspace(0, 1, 300, dtype=np.float32)[None]),
    ]


def _numbers() -> list[Event]:
    x = np.linspace(0, 1, 5)
    many = np.arange(144, dtype=np.int64).reshape(12, 12) * 2**40
    return [
        CurveLogged(
            key="curves/µ",
            x=x,
            y=np.array([x, [0, math.nan, math.inf, -math.inf, -0.0]]),
            classes=["cat", "µ"],
            title="title",
            x_label="recall",
            y_label="precision",
            epoch=0,
        ),
        ConfusionMatrixLogged(key="matrix", matrix=many, classes=[f"c{n}" for n in range(12)]),
        ConfusionMatrixLogged(
            key="matrix/share",
            matrix=np.array([[math.nan, 1.0], [0.0, 0.0]], dtype=np.float16),
            classes=["a", "b"],
            normalized=True,
            epoch=0,
        ),
        TableLogged(
            key="table/µ",
            columns=["text", "number", "any"],
            rows=[["µ", 1.5, None], ["", math.nan, {"a": [1, "x"]}], ["x", -math.inf, True]],
            epoch=0,
            step=9,
        ),
        TableLogged(key="table/long", columns=["n"], rows=[[n] for n in range(2000)]),
        TableLogged(key="table/empty", columns=[], rows=[]),
        HistogramLogged(key="histogram", counts=np.array([0, 3, 1]), edges=np.arange(4) / 2),
        HistogramLogged(
            key="histogram/large", counts=np.arange(200), edges=np.arange(201, dtype=">f8") / 8
        ),
    ]


def _second() -> list[Event]:
    """Return what the training logged that went on with the run."""
    return [
        RunStarted(
            name="métrique/µ ☃",
            project="golden",
            resumed=Resumed(run="journal-1", epoch=0, step=9, save_dir="runs/before"),
        ),
        CheckpointSaved(path="best.pt", kind="best", epoch=1, step=10, metrics={"fit": math.nan}),
        CheckpointSaved(
            path="best.pt", kind="best", metrics={"fit": 0.25}, metadata={"a": [1]}, final=True
        ),
        ArtifactLogged(
            name="files",
            kind="dataset",
            paths=["best.pt", "notes.txt", "gone.bin"],
            aliases=["latest"],
            metadata={"n": None},
        ),
        AlertRaised(title="wärning", text="two\nlines", level="warning"),
        RunEnded(
            status="stopped",
            reason="KeyboardInterrupt",
            error=Failure(type="KeyboardInterrupt", message="", traceback="Traceback\n  …"),
            best=Best(metric="métrique/µ", value=math.nan, epoch=1),
        ),
    ]


def _third() -> list[Event]:
    """Return a training with the event types that came later: its file was added then."""
    return [
        RunStarted(name="métrique/µ ☃", project="golden", resumed=Resumed(run="journal-1")),
        EnvironmentDescribed(
            command=["python", "train ☃.py"],
            packages={"numpy": "2.0"},
            memory=2**40,
            gpus=[Gpu(name="GPU", memory=2**36)],
            git=GitState(commit="0" * 40, dirty=True, diff="--- a\n+++ b\n"),
            scheduler={"SLURM_JOB_ID": "1"},
        ),
        ConsoleLogged(stream="stderr", text="one\ntwo ☃", first_line=3, time=1.5),
        RunEnded(status="finished"),
    ]


if __name__ == "__main__":
    print(write(Path(sys.argv[1])).path)
