"""The public API as users write it: it is never run, mypy checks its types."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from typing_extensions import assert_type

import trainbus
from trainbus import (
    Adapter,
    AttachedRun,
    Bus,
    Detach,
    Emit,
    Event,
    FilePath,
    JournalSpec,
    LoopRun,
    Options,
    Receipt,
    Record,
    Run,
    RunDefaults,
    RunInfo,
    Sink,
    SinkReport,
    SinkSpec,
    TrainbusError,
)
from trainbus.events import CheckpointSaved, MetricsLogged, RunStarted
from trainbus.testing import AdapterConformance, MemorySink, SinkConformance, Training
from trainbus.toolkit.adapters import Reporter, guarded, wrap


def use_a_file(model: object) -> None:
    bus = trainbus.load("trainbus.yaml")
    assert_type(bus, Bus)
    run = bus.attach(model)
    assert_type(run, AttachedRun)
    run.log({"mine": 1.0})
    assert_type((run.id, run.name, run.links), tuple[str | None, str | None, dict[str, str]])
    run.detach()
    assert_type(trainbus.current_run(), Run)
    assert_type(trainbus.load(Path("trainbus.yaml")), Bus)
    assert_type(trainbus.__version__, str)
    bus.close()


def use_a_bus(error: Exception) -> None:
    bus = Bus(
        {"memory": MemorySink(), "made": MemorySink},
        defaults=RunDefaults(name="a", tags=["b"]),
        on_receipt=show,
        isolation="thread",
        journal=JournalSpec(dir="journals", max_bytes=2**30, redact=["account"]),
        flush_secs=10,
        base=Path(),
    )
    bus.emitter()(RunStarted(name="by hand", params={"lr": 0.1}))
    bus.close(error)


def run_a_loop(bus: Bus, params: object) -> None:
    with bus, bus.run(name="loop", project="p", params=params, tags=["a"]) as run:
        assert_type(run, LoopRun)
        assert_type(run.id, str | None)
        assert_type(run.epochs(3), Iterator[int])
        for epoch in run.epochs(3, start=1):
            run.log({"loss": 1.0, "sizes": np.zeros(2), "part": {"a": 1}})
            run.log({"loss": 1}, epoch=epoch, step=10, phase="validation", final=True)
        run.image("picture", np.zeros((8, 8, 3), np.uint8), caption="c", epoch=0, step=1)
        run.curve("roc", [0, 1], [[0, 1]], classes=["a"], title="t", x_label="x", y_label="y")
        run.table("rows", ["a", "b"], [[1, "x"], (2, None)])
        run.table("frame", [{"a": 1}])
        run.confusion_matrix("matrix", [[3, 1], [0, 4]], ["a", "b"], epoch=1)
        run.text("summary", "good")
        run.checkpoint(Path("best.pt"), kind="best", epoch=1, metrics={"map": 0.5}, final=True)
        run.artifact(
            "data", "a.csv", Path("b.csv"), kind="dataset", aliases=("v1",), metadata={"rows": 2}
        )
        run.alert("diverged", "the loss is NaN", level="error")
    assert_type(bus.receipts, list[Receipt])


def listen(bus: Bus) -> None:
    def hear(record: Record) -> None:
        assert_type((record.seq, record.run, record.time), tuple[int, str, float])
        if isinstance(record.event, MetricsLogged):
            assert_type(record.event.values, dict[str, float])

    first: Event = RunStarted(name="a")
    bus.emitter()(first)
    unsubscribe = bus.subscribe(hear, MetricsLogged, CheckpointSaved)
    assert_type(unsubscribe, Callable[[], None])
    bus.subscribe(lambda record: record.seq)
    unsubscribe()


def show(receipt: Receipt) -> None:
    assert_type((receipt.run, receipt.status, receipt.journal), tuple[str, str, str | None])
    assert_type((receipt.attempt, receipt.emitted, receipt.dropped), tuple[int, int, int])
    assert_type((receipt.pending, receipt.lost, receipt.unrecorded), tuple[int, int, int])
    for report in receipt.sinks:
        assert_type(report, SinkReport)
        assert_type((report.name, report.kind, report.error), tuple[str, str, str | None])
        assert_type((report.taken, report.skipped, report.dead), tuple[int, int, int])
        assert_type((report.pending, report.unsaved, report.lost), tuple[int, int, int])
        assert_type(report.location, str | None)


class LinesOptions(Options, frozen=True, kw_only=True):
    path: Annotated[FilePath, msgspec.Meta(description="Where the lines go")]
    limit: int | None = None


class LinesSink(Sink):
    Options = LinesOptions
    service = "lines"
    packages = ("lines",)
    options: LinesOptions

    def check(self) -> str | None:
        return "a file"

    def open(self, run: RunInfo) -> None:
        assert_type((run.id, run.attempt, run.resumed), tuple[str, int, bool])
        self.path = Path(self.options.path)

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            match record.event:
                case RunStarted(name=name):
                    assert_type(name, str | None)
                case MetricsLogged(values=values, epoch=epoch):
                    assert_type((values, epoch), tuple[dict[str, float], int | None])
                case _:
                    pass

    def flush(self) -> None: ...

    def close(self) -> None: ...

    @property
    def location(self) -> str | None:
        return str(self.path)


def register_a_sink() -> Bus:
    sink = LinesSink(LinesOptions(path="a.txt"))
    return Bus({"lines": SinkSpec(name="lines", make=lambda: sink, kind="lines", sink=sink)})


class Callback:
    def __init__(self, emit: Emit | None = None) -> None:
        self.reporter = Reporter(emit)

    @guarded
    def on_start(self, trainer: Any) -> None:
        self.reporter.start(RunStarted(name="a", framework="acme"))
        self.reporter.start_epoch(trainer.epoch)

    @guarded
    def on_epoch_end(self, trainer: Any) -> None:
        self.reporter.metrics({"loss": trainer.loss}, "train", epoch=trainer.epoch)
        self.reporter.checkpoint(CheckpointSaved(path="last.pt", kind="last"))
        self.reporter.end_epoch()

    @guarded
    def on_end(self, trainer: Any) -> None:
        self.reporter.end("early stop")


def attach(target: Any, emit: Emit) -> Detach:
    callback = Callback()
    target.callbacks.append(callback)
    assert_type(emit.services, frozenset[str])
    return callback.reporter.connect(emit, lambda: target.callbacks.remove(callback))


adapter: Adapter = attach


class TestLines(SinkConformance):
    def make(self, folder: Path) -> Sink:
        return LinesSink(LinesOptions(path=str(folder / "a.txt")))


def fail() -> None:
    try:
        trainbus.load("missing.yaml")
    except trainbus.ConfigError as error:
        assert_type(error, trainbus.ConfigError)
    except (trainbus.JournalError, TrainbusError):
        raise


public = (AdapterConformance, Training, wrap)
