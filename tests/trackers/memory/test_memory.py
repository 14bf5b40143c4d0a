"""Sinks keep no more of a long run in memory than of a short one."""

from __future__ import annotations

import gc
import importlib
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.mlflow_server import database
from trainbus import RunInfo, Sink
from trainbus.events import (
    AlertRaised,
    CheckpointSaved,
    Event,
    HistogramLogged,
    ImageLogged,
    MetricsLogged,
    Record,
    RunStarted,
    TableLogged,
    TextLogged,
)

# The packages' own imports warn, and leave files to the collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
]

_BATCH = 250
_A_RECORD, _AT_ALL = 40, 64 * 1024
"""Bytes by which a sink may grow: a string for each record would be more."""

SINKS: dict[str, tuple[int, dict[str, Any]]] = {
    "clearml": (100, {"dir": "{folder}"}),
    "comet": (100, {"mode": "offline", "dir": "{folder}"}),
    "console": (250, {}),
    "csv": (2500, {"dir": "{folder}/{run}"}),
    "dvclive": (20, {"dir": "{folder}/{run}"}),
    "html": (250, {"dir": "{folder}/{run}", "points": 50}),
    "jsonl": (250, {"path": "{folder}/{run}.jsonl"}),
    "mlflow": (50, {"tracking_uri": "sqlite:///{folder}/mlflow.db"}),
    "notify": (250, {"urls": ["json://localhost:9"], "state": "{folder}"}),
    "prometheus": (250, {"textfile": "{folder}/{run}.prom"}),
    "swanlab": (100, {"mode": "offline", "logdir": "{folder}"}),
    "tensorboard": (100, {"logdir": "{folder}/{run}"}),
    "trackio": (100, {}),
}
"""Sink → records of a short run, and its options."""


def events(folder: Path, kinds: int) -> Iterator[Event]:
    """Yield metrics of a step, and in every third place something else of that many kinds."""
    picture = np.zeros((64, 64), np.uint8)
    counts, edges = np.arange(8), np.arange(9.0)
    step = 0
    while True:
        others: list[Event] = [
            ImageLogged(key="picture", array=picture, step=step),
            TextLogged(key="text", text=f"{step} " * 200, step=step),
            HistogramLogged(key="histogram", counts=counts, edges=edges, step=step),
            TableLogged(key="table", columns=["a"], rows=[[step]] * 50, step=step),
            CheckpointSaved(path=str(folder / "last.pt"), kind="last", step=step),
            AlertRaised(title=f"alert {step % 3}", text="x" * 200, level="info"),
        ]
        number, is_metric = step // 3 % len(others), step % 3
        if is_metric or number >= kinds:
            yield MetricsLogged(values={"loss": step / 7}, phase="train", epoch=0, step=step)
        else:
            yield others[number]
        step += 1


@pytest.mark.parametrize("name", SINKS)
def test_memory_does_not_grow_with_records(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With four times the records a sink holds as much as before; what it still sends may go."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLEARML_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    if name == "mlflow":
        database(tmp_path)
    if name == "trackio":
        _keep_in(tmp_path, monkeypatch)
    (tmp_path / "last.pt").write_text("weights")
    count, given = SINKS[name]
    module = importlib.import_module(f"trainbus.sinks.{name}")
    cls: Any = getattr(module, f"{name.capitalize()}Sink")
    options = {k: _filled(v, tmp_path) for k, v in given.items()}
    sink: Sink = cls(cls.Options(**options))
    started = RunStarted()
    sink.open(RunInfo(id="run", started=started))
    # Files of a CSV are long before they are many; tables would only take time there.
    made = events(tmp_path, kinds=0 if name == "csv" else 6)
    seq = 1
    sink.write([Record(seq=seq, run="run", time=1.0, event=started)])

    def feed(records: int) -> None:
        nonlocal seq
        for _ in range(0, records, _BATCH):
            batch = []
            for _ in range(min(records, _BATCH)):
                seq += 1
                batch.append(Record(seq=seq, run="run", time=1.0 + seq, event=next(made)))
            sink.write(batch)

    try:
        feed(count)  # what is loaded and made once
        tracemalloc.start()
        feed(count)
        short = _held()
        feed(4 * count)
        allowed = short + _A_RECORD * 4 * count + _AT_ALL
        end = time.monotonic() + 60
        while (held := _held()) > allowed and time.monotonic() < end:
            time.sleep(0.05)
        assert max(held, allowed) == allowed
    finally:
        tracemalloc.stop()
        sink.close()


def _keep_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Trackio, which may be imported already, store in a folder."""
    importlib.import_module("trackio")
    folders = {"TRACKIO_DIR": "", "MEDIA_DIR": "media", "ARTIFACTS_DIR": "artifacts"}
    for name, module in list(sys.modules.items()):
        for constant, part in folders.items():
            if name.partition(".")[0] == "trackio" and constant in vars(module):
                monkeypatch.setattr(module, constant, folder / part)


def _filled(value: Any, folder: Path) -> Any:
    return value.replace("{folder}", str(folder)) if isinstance(value, str) else value


def _held() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]
