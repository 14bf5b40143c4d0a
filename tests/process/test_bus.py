"""The bus: events in, records out, and nothing that hurts the training in between."""

from __future__ import annotations

import _thread
import contextlib
import copy
import functools
import gc
import io
import json
import logging
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
import yaml

from support import tinytrainer
from support.emitting import emit
from support.plugins import make_plugin
from trainbus import (
    Bus,
    JournalSpec,
    NoAdapterError,
    Receipt,
    Record,
    RunDefaults,
    RunInfo,
    Sink,
    SinkError,
    SinkReport,
    SinkSpec,
    SubscribeError,
    config,
    registry,
)
from trainbus.delivery.spec import Isolation
from trainbus.delivery.transforms import Transform, TransformSpec
from trainbus.events import (
    AlertRaised,
    EpochEnded,
    EpochStarted,
    Event,
    ImageLogged,
    MetricsLogged,
    Resumed,
    RunEnded,
    RunStarted,
    TextLogged,
    decode,
    encode,
    event_name,
)
from trainbus.recording.emitter import Emitter, NullEmitter
from trainbus.recording.run_id import MARKER
from trainbus.testing import MemorySink, check_grammar
from trainbus.testing.samples import png, sample_events

METRICS = MetricsLogged(values={"loss": 1.0}, phase="train")

FOREVER_S = 3600.0
"""Longer than a test may take: who waits for this is stopped by pytest."""


def quiet(receipt: Receipt) -> None:
    """Take the place of the print at the end of a run."""


class Listener:
    """A bus and the records that one of its subscribers heard."""

    def __init__(self, sinks: dict[str, Any] | None = None, **options: Any) -> None:
        self.bus = Bus(sinks, on_receipt=quiet, **options)
        self.records: list[Record] = []
        self.bus.subscribe(self.records.append)

    @property
    def names(self) -> list[str]:
        return [event_name(record.event) for record in self.records]

    def of_run(self, run: str) -> list[Record]:
        return [record for record in self.records if record.run == run]


@pytest.fixture
def listener() -> Listener:
    return Listener()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "trainbus"]


# Subscribers


def test_a_subscriber_hears_everything(listener: Listener) -> None:
    """A function is called with every record, in order."""
    with listener.bus as bus:
        emit(bus, RunStarted(name="a"))
        emit(bus, METRICS)
    assert ["run.started", "metrics.logged", "run.ended"] == listener.names
    assert [] == check_grammar(listener.records)


def test_a_subscriber_hears_the_types_it_asked_for() -> None:
    """With event types given, only those come."""
    bus = Bus()
    heard: list[Record] = []
    bus.subscribe(heard.append, EpochStarted, EpochEnded)
    with bus.run() as run:
        for _ in run.epochs(2):
            run.log({"loss": 1.0})
    expected = ["epoch.started", "epoch.ended"] * 2
    assert expected == [event_name(record.event) for record in heard]


def test_a_subscription_can_be_ended() -> None:
    """After `unsubscribe`, called twice, nothing comes any more."""
    bus = Bus()
    heard: list[Record] = []
    unsubscribe = bus.subscribe(heard.append)
    emit(bus, METRICS)
    unsubscribe()
    unsubscribe()
    emit(bus, METRICS)
    assert 2 == len(heard)


def test_a_subscriber_can_end_its_subscription_while_it_is_called(listener: Listener) -> None:
    """A function that unsubscribes itself is not called again, and the others are."""
    calls: list[Record] = []

    def once(record: Record) -> None:
        calls.append(record)
        unsubscribe()

    unsubscribe = listener.bus.subscribe(once)
    emit(listener.bus, METRICS)
    assert 1 == len(calls)
    assert 2 == len(listener.records)


def test_subscribers_are_not_forgotten() -> None:
    """A lambda that nobody else holds stays subscribed."""
    bus, heard = Bus(), []
    bus.subscribe(lambda record: heard.append(record.seq))
    emit(bus, METRICS)
    assert [1, 2] == heard


async def coroutine(record: Record) -> None:
    """Never run."""


class AsyncCall:
    async def __call__(self, record: Record) -> None:
        """Never run."""


@pytest.mark.parametrize(
    "receiver",
    [coroutine, AsyncCall(), functools.partial(coroutine), AsyncCall().__call__],
    ids=["function", "object", "partial", "method"],
)
def test_coroutines_are_refused(receiver: Callable[[Record], object]) -> None:
    """A coroutine function would never run, and the error says what to pass instead."""
    with pytest.raises(SubscribeError, match="would never run; pass a plain function"):
        Bus().subscribe(receiver)


def test_what_can_not_be_called_is_refused() -> None:
    """The error says what was found and expected."""
    with pytest.raises(SubscribeError, match="expected a function that takes a record, found 3"):
        Bus().subscribe(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [int, "metrics.logged", Record])
def test_what_is_no_event_type_is_refused(kind: Any) -> None:
    """Subscribing to something that never comes is an error at once."""
    with pytest.raises(SubscribeError, match=r"expected an event of trainbus\.events, found"):
        Bus().subscribe(print, kind)


def test_a_raising_subscriber_is_muted(
    listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    """After five failures in a row a subscriber is no longer called; the others hear everything."""
    calls = []

    def broken(record: Record) -> None:
        calls.append(record)
        raise ValueError("broken")

    listener.bus.subscribe(broken)
    for _ in range(10):
        emit(listener.bus, METRICS)
    assert 5 == len(calls)
    assert 11 == len(listener.records)
    texts = warnings_of(caplog)
    assert 5 == len(texts)
    assert texts[-1].endswith("failed and is muted now")
    assert "broken" in caplog.text


def test_a_subscriber_that_recovers_is_not_muted(listener: Listener) -> None:
    """Only failures in a row count."""
    calls = []

    def sometimes(record: Record) -> None:
        calls.append(record)
        if record.seq % 5:
            raise ValueError("broken")

    listener.bus.subscribe(sometimes)
    for _ in range(19):
        emit(listener.bus, METRICS)
    assert 20 == len(calls)


# Events that come from subscribers, threads and processes


def test_events_of_a_subscriber_come_after_the_one_it_heard() -> None:
    """Every subscriber hears records in the order of seq, whoever emitted them while they ran."""
    bus = Bus()
    heard: tuple[list[int], list[int]] = ([], [])

    def answer(record: Record) -> None:
        if isinstance(record.event, EpochStarted):
            emit(bus, TextLogged(key="answer", text="1"))
            emit(bus, TextLogged(key="answer", text="2"))

    bus.subscribe(lambda record: heard[0].append(record.seq))
    bus.subscribe(answer)
    bus.subscribe(lambda record: heard[1].append(record.seq))
    emit(bus, EpochStarted(epoch=0))
    emit(bus, METRICS)
    assert [1, 2, 3, 4, 5] == heard[0] == heard[1]


def test_a_subscriber_that_answers_itself_is_stopped(
    listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    """An endless echo ends after a few rounds, with one line in the log."""
    listener.bus.subscribe(lambda record: emit(listener.bus, METRICS), MetricsLogged)
    emit(listener.bus, METRICS)
    emit(listener.bus, METRICS)
    assert ["run.started", *["metrics.logged"] * 6] == listener.names
    assert ["dropped metrics.logged: emitted by its own subscribers"] == warnings_of(caplog)


def test_threads_may_emit_at_once() -> None:
    """Sixteen threads lose no event, and seq has no gaps for any subscriber or sink."""
    memory = MemorySink()
    listener = Listener({"memory": memory})
    barrier = threading.Barrier(16)

    def emit_all(thread: int) -> None:
        barrier.wait(timeout=60)
        for step in range(100):
            emit(listener.bus, MetricsLogged(values={str(thread): 1.0}, phase="t", step=step))

    with listener.bus, contextlib.ExitStack() as stack:
        threads = [threading.Thread(target=emit_all, args=(n,), daemon=True) for n in range(16)]
        for thread in threads:
            thread.start()
            stack.callback(thread.join, timeout=60)
    assert 16 * 100 + 2 == len(listener.records)
    assert listener.records == memory.records
    assert [] == check_grammar(listener.records)
    for name in map(str, range(16)):
        steps = [
            record.event.step
            for record in listener.records
            if isinstance(record.event, MetricsLogged) and name in record.event.values
        ]
        assert [*range(100)] == steps


def test_a_forked_child_is_silent(tmp_path: Path) -> None:
    """A child that a data loader forks writes nothing, closes nothing, and does not hang."""
    script = textwrap.dedent(
        """
        import os, sys
        from trainbus import Bus
        from trainbus.events import MetricsLogged
        from trainbus.sinks.jsonl import JsonlOptions, JsonlSink
        bus = Bus({"file": JsonlSink(JsonlOptions(path="out.jsonl"))})
        event = MetricsLogged(values={"loss": 1.0}, phase="train")
        with bus:
            emit = bus.emitter()
            emit(event)
            def forked(record):
                if record.seq == 3:
                    child = os.fork()
                    if child == 0:
                        emit(event)
                        bus.close()
                        os._exit(7)
                    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
            bus.subscribe(forked)
            emit(event)
            emit(event)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=400
    )
    assert 0 == done.returncode, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [1, 2, 3, 4, 5] == [line["seq"] for line in lines]
    assert "run.ended" == lines[-1]["event"]["type"]


# Runs


def test_two_buses_do_not_mix() -> None:
    """What is emitted on one bus is not heard on another."""
    one, two = Listener(), Listener()
    with one.bus, two.bus:
        emit(one.bus, RunStarted(name="one"))
        emit(two.bus, RunStarted(name="two"))
        emit(one.bus, METRICS)
    for listener, count in ((one, 3), (two, 2)):
        assert count == len(listener.records)
        assert [] == check_grammar(listener.records)


def test_two_runs_on_one_bus_do_not_mix() -> None:
    """Runs that are open at a time have sinks, ids and counts of their own."""
    sinks: list[MemorySink] = []

    def make() -> MemorySink:
        sinks.append(MemorySink())
        return sinks[-1]

    listener = Listener({"memory": make})
    with listener.bus.run(name="one") as one, listener.bus.run(name="two") as two:
        ids = [one.id, two.id]
        for _ in one.epochs(2):
            one.log({"loss": 1.0})
            two.log({"loss": 2.0}, epoch=0)
    of_run = {sink.records[0].run: sink.records for sink in sinks}  # opened in any order
    for run in ids:
        assert run is not None
        records = listener.of_run(run)
        assert [] == check_grammar(records)
        assert records == of_run[run]
    assert [8, 4] == [len(of_run[run]) for run in ids if run]
    assert [4, 8] == [receipt.emitted for receipt in listener.bus.receipts]


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (None, "finished", None),
        (ValueError("bad"), "failed", "ValueError: bad"),
        (KeyboardInterrupt(), "stopped", "KeyboardInterrupt"),
        (SystemExit(3), "stopped", "SystemExit"),
        (GeneratorExit(), "stopped", "GeneratorExit"),
    ],
)
def test_the_block_supplies_the_end(
    error: BaseException | None, status: str, reason: str | None, listener: Listener
) -> None:
    """What leaves the `with` block ends the run, and is the same object outside."""
    raised: BaseException | None = None
    try:
        with listener.bus as bus:
            emit(bus, METRICS)
            if error is not None:
                raise error
    except BaseException as caught:
        raised = caught
    assert error is raised
    assert [] == check_grammar(listener.records)
    ended = listener.records[-1].event
    assert isinstance(ended, RunEnded)
    assert (status, reason) == (ended.status, ended.reason)


def test_an_end_that_was_emitted_is_the_only_one(listener: Listener) -> None:
    """A run that its trainer ended is not ended again, however the block is left."""
    with contextlib.suppress(ValueError), listener.bus as bus:
        emit(bus, METRICS)
        emit(bus, RunEnded(status="finished", reason="early stopping"))
        emit(bus, RunEnded(status="failed"))
        raise ValueError("later")
    bus.close()
    assert ["run.started", "metrics.logged", "run.ended"] == listener.names
    assert RunEnded(status="finished", reason="early stopping") == listener.records[-1].event


def test_what_comes_after_the_end_is_dropped(
    listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    """Late events are not taken for a new run; the log says so once."""
    emit(listener.bus, RunStarted())
    listener.bus.close()
    emit(listener.bus, METRICS)
    emit(listener.bus, METRICS)
    assert ["run.started", "run.ended"] == listener.names
    assert ["dropped metrics.logged: its run has ended"] == warnings_of(caplog)


def test_a_start_after_the_end_is_a_new_run(listener: Listener) -> None:
    """The same trainer may train again; an end of nothing is nothing."""
    emit(listener.bus, RunEnded(status="finished"))
    assert [] == listener.records
    for _ in range(2):
        emit(listener.bus, RunStarted())
        emit(listener.bus, RunEnded(status="finished"))
    assert 2 == len({record.run for record in listener.records})
    for record in listener.records:
        assert [] == check_grammar(listener.of_run(record.run))


def test_a_second_start_ends_the_first_run(listener: Listener) -> None:
    """A trainer that begins anew without an end has stopped the run before."""
    emit(listener.bus, RunStarted(name="one"))
    emit(listener.bus, RunStarted(name="two"))
    listener.bus.close()
    first, second = dict.fromkeys(record.run for record in listener.records)
    assert [] == check_grammar(listener.of_run(first)) == check_grammar(listener.of_run(second))
    ended = listener.of_run(first)[-1].event
    assert isinstance(ended, RunEnded)
    assert "stopped" == ended.status


def test_the_first_event_starts_a_run(listener: Listener) -> None:
    """A loop that emits without a start still has one."""
    emit(listener.bus, EpochStarted(epoch=0))
    assert ["run.started", "epoch.started"] == listener.names


@pytest.mark.parametrize(
    "garbage",
    [
        None,
        1,
        "metrics.logged",
        EpochStarted,
        object(),
        Record(seq=1, run="r", time=0.0, event=METRICS),
        MetricsLogged(values=None, phase=object(), epoch="x"),  # type: ignore[arg-type]
        RunStarted(tags=3, params=[1], resumed="x", goals=None),  # type: ignore[arg-type]
    ],
    ids=range(8),
)
def test_garbage_does_not_raise(garbage: Any, listener: Listener) -> None:
    """What is no event, or has nonsense in it, hurts neither training nor the events after it."""
    with listener.bus as bus:
        emit(bus, METRICS)
        emit(bus, garbage)
        emit(bus, METRICS)
    assert "run.ended" == listener.names[-1]
    assert METRICS == listener.records[-2].event


def test_a_metric_that_is_no_number_is_named_once(
    listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    """The other metrics of the event go on; the log names the one that was left out."""
    for _ in range(3):
        values: dict[str, Any] = {"loss": 1, "text": "x"}
        emit(listener.bus, MetricsLogged(values=values, phase="train"))
    assert METRICS == listener.records[-1].event
    assert ["not recorded: metrics.logged: metric 'text': expected a number"] == warnings_of(caplog)


def test_ids_are_unique() -> None:
    """Trainers seed `random`, and two runs may start within one second."""
    ids = set()
    for _ in range(50):
        random.seed(0)
        with Bus().run(name="same") as run:
            ids.add(run.id)
    assert 50 == len(ids)


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("yolo11n", "yolo11n"),
        ("a b/../µ", "a_b"),
        ("///", "run"),
        (None, "run"),
        ("x" * 99, "x" * 64),
    ],
)
def test_ids_are_file_names(name: str | None, stem: str) -> None:
    """An id is the run's name as far as it can be part of a path, its date and six digits."""
    with Bus().run(name=name) as run:
        found = re.fullmatch(r"(.*)_(\d{8}_\d{6})_([0-9a-f]{6})", run.id or "")
    assert found is not None
    assert stem == found[1]


def test_defaults_replace_what_the_adapter_found() -> None:
    """What the user sets holds for every run, and what is not set stays."""
    listener = Listener(defaults=RunDefaults(project="mine", tags=["a"]))
    with listener.bus.run(project="theirs", name="kept"):
        pass
    assert RunStarted(project="mine", name="kept", tags=["a"]) == listener.records[0].event


# Resuming


def train(folder: Path | None, resumed: Resumed | None = None) -> Record:
    """Return the first record of a training that is saved in a folder."""
    listener = Listener()
    with listener.bus as bus:
        emit(bus, RunStarted(save_dir=str(folder) if folder else None, resumed=resumed))
    assert [] == check_grammar(listener.records)
    return listener.records[0]


def test_a_resumed_training_finds_its_run(tmp_path: Path) -> None:
    """The marker in the save directory names the run, and counts its attempts."""
    folder = tmp_path / "new" / "folder"
    first = train(folder)
    assert {"run": first.run, "attempt": 1} == json.loads((folder / MARKER).read_text())
    second, third = train(folder, Resumed(epoch=2)), train(folder, Resumed())
    assert {first.run} == {second.run, third.run}
    assert [1, 2, 3] == [first.attempt, second.attempt, third.attempt]


def test_a_training_that_is_not_resumed_is_a_new_run(tmp_path: Path) -> None:
    """A save directory that is used again is no resume, and the marker follows the new run."""
    first, second = train(tmp_path), train(tmp_path)
    assert first.run != second.run
    assert second.run == train(tmp_path, Resumed()).run


def test_a_run_id_of_the_frameworks_wins(tmp_path: Path) -> None:
    """Where the checkpoint itself names the run, the marker is not needed."""
    train(tmp_path)
    found = train(tmp_path, Resumed(run="known"))
    assert ("known", 2) == (found.run, found.attempt)
    assert "known" == train(None, Resumed(run="known")).run


@pytest.mark.parametrize(
    "marker",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"run":1}',
        '{"run":"../x","attempt":1}',
        '{"run":"r","attempt":"x"}',
        "\xff",
    ],
)
def test_a_damaged_marker_is_no_run(marker: str, tmp_path: Path) -> None:
    """What is in the marker is not trusted; the training becomes a new run."""
    (tmp_path / MARKER).write_text(marker, encoding="latin-1")
    found = train(tmp_path, Resumed())
    assert 1 == found.attempt
    assert found.run.startswith("run_")


def test_a_folder_that_can_not_be_marked_is_no_fault(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Training goes on, and the log says what will not work later."""
    (tmp_path / "file").write_text("")
    train(tmp_path / "file")
    (text,) = warnings_of(caplog)
    assert "a resumed training will not find this run again" in text


# Sinks


class Failing(Sink):
    """Raises wherever it is told to."""

    def __init__(self, *where: str, times: int = 10**6, error: BaseException | None = None) -> None:
        super().__init__()
        self.fails_in = where
        self.times = times
        self.error = error or ValueError("odd record")
        self.calls: list[str] = []
        self.records: list[Record] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fails_in and self.times > 0:
            self.times -= 1
            raise self.error

    def open(self, run: RunInfo) -> None:
        self._call("open")

    def write(self, records: Sequence[Record]) -> None:
        self._call("write")
        self.records += records

    def flush(self) -> None:
        self._call("flush")

    def close(self) -> None:
        self._call("close")

    @property
    def location(self) -> str | None:
        self._call("location")
        return "somewhere"


def numbers(report: SinkReport) -> tuple[int, int, int, int]:
    """Return what was taken, filtered out, refused, and what waits."""
    return report.taken, report.skipped, report.dead, report.pending


def deliver(
    *routes: SinkSpec, isolation: Isolation = "inline", metrics: int = 10
) -> tuple[Receipt, list[Record]]:
    """Return the receipt of a run, and the records that a healthy sink beside the others got."""
    memory = MemorySink()
    bus = Bus(
        {**{route.name: route for route in routes}, "memory": memory},
        on_receipt=quiet,
        isolation=isolation,
        flush_secs=FOREVER_S,
    )
    with bus.run() as run:
        for step in range(metrics):
            run.log({"loss": 1.0}, step=step)
    (receipt,) = bus.receipts
    assert [] == check_grammar(memory.records)
    for report in receipt.sinks:
        assert receipt.emitted == metrics + 2 == sum(numbers(report))
    return receipt, memory.records


def route(sink: Sink, **options: Any) -> SinkSpec:
    return SinkSpec(name="tested", make=lambda: sink, kind="failing", **options)


def wherever(test: Any) -> Any:
    """Run a test with its sinks inside of `emit`, and once more with each in a thread."""
    return pytest.mark.parametrize("isolation", ["inline", "thread"])(test)


@wherever
def test_a_receipt_counts_what_was_taken(isolation: Isolation) -> None:
    """A sink that works has taken every record, and says where they are."""
    sink = Failing()
    receipt, records = deliver(route(sink), isolation=isolation)
    report = receipt.sinks[0]
    assert ((12, 0, 0, 0), "somewhere", None) == (numbers(report), report.location, report.error)
    assert records == sink.records
    batches = sink.calls.count("write")
    assert 1 <= batches <= 12
    assert isolation == "thread" or batches == 12
    assert ["open", *["write"] * batches, "flush", "close", "location"] == sink.calls
    assert ("finished", 12) == (receipt.status, receipt.emitted)


@wherever
def test_a_receipt_counts_what_was_filtered_out(isolation: Isolation) -> None:
    """What transforms left out is neither taken nor refused."""
    spec = TransformSpec(every={"train": 5})
    receipt, _ = deliver(route(MemorySink(), transforms=spec), isolation=isolation)
    assert (4, 8, 0, 0) == numbers(receipt.sinks[0])


def test_a_sink_that_fails_at_times_gets_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    """A record that a sink refused three times is counted, those after it are written."""
    sink = Failing("write", times=3)
    report = deliver(route(sink))[0].sinks[0]
    assert ((11, 0, 1, 0), "ValueError: odd record") == (numbers(report), report.error)
    assert [
        "sink 'tested' (failing) failed, training continues: ValueError: odd record"
    ] == warnings_of(caplog)


class Picky(MemorySink):
    """Raises on every batch with one of some steps in it."""

    def __init__(self, *steps: int) -> None:
        super().__init__()
        self.steps = steps

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            if getattr(record.event, "step", None) in self.steps:
                raise ValueError("odd record")
        super().write(records)


@wherever
def test_refused_records_are_kept_and_cost_no_other(isolation: Isolation) -> None:
    """However records are batched, those that a sink refuses, and only those, are dead letters."""
    sink = Picky(3, 4, 9)
    receipt, records = deliver(route(sink), isolation=isolation)
    assert (9, 0, 3, 0) == numbers(receipt.sinks[0])
    refused = [
        r for r in records if isinstance(r.event, MetricsLogged) and r.event.step in (3, 4, 9)
    ]
    assert [record for record in records if record not in refused] == sink.records
    (file,) = Path(receipt.journal or "", "dead").iterdir()
    letters = [json.loads(line) for line in file.read_text().splitlines()]
    assert ["ValueError: odd record"] * 3 == [letter["error"] for letter in letters]
    assert refused == [decode(json.dumps(letter["record"])) for letter in letters]


@wherever
def test_a_sink_that_always_fails_is_left_alone(
    isolation: Isolation, caplog: pytest.LogCaptureFixture
) -> None:
    """After five refused records in a row the rest waits, and delays neither training nor end."""
    sink = Failing("write", "flush", "close", "location")
    receipt, _ = deliver(route(sink), isolation=isolation)
    assert (0, 0, 5, 7) == numbers(receipt.sinks[0])
    assert 5 * 3 < sink.calls.count("write") < 5 * 3 + 10
    assert 1 == sink.calls.count("close")
    first, last = warnings_of(caplog)
    assert "training continues" in first
    assert "rejected 5 records in a row; the others wait in the journal" in last
    assert "to send the rest: trainbus replay" in str(receipt)


@wherever
@pytest.mark.parametrize("where", ["open", "write"])
def test_a_network_that_comes_back_costs_nothing(where: str, isolation: Isolation) -> None:
    """What failed for the network's sake is tried again, and the sink then has everything."""
    sink = Failing(where, times=1, error=ConnectionError("no route"))
    receipt, records = deliver(route(sink), isolation=isolation)
    assert ((12, 0, 0, 0), None) == (numbers(receipt.sinks[0]), receipt.sinks[0].error)
    assert records == sink.records


@wherever
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "disk full"), "OSError: [Errno 28] disk full"),
        (PermissionError("not yours"), "PermissionError: not yours"),
        (ImportError("no module"), "ImportError: no module"),
    ],
)
def test_what_is_no_records_fault_makes_no_dead_letters(
    error: Exception, said: str, isolation: Isolation
) -> None:
    """A full disk or a refused login kills no record: all wait, and nobody waits for them."""
    receipt, _ = deliver(route(Failing("write", error=error)), isolation=isolation)
    assert ((0, 0, 0, 12), said) == (numbers(receipt.sinks[0]), receipt.sinks[0].error)


@wherever
def test_a_sink_that_can_not_be_opened_is_left_out(
    isolation: Isolation, caplog: pytest.LogCaptureFixture
) -> None:
    """One line says why; training goes on, and the sink may let go of what it had begun."""
    sink = Failing("open", error=SinkError("can't\nlog in"))
    report = deliver(route(sink), isolation=isolation)[0].sinks[0]
    assert ((0, 0, 0, 12), "can't log in") == (numbers(report), report.error)
    assert ["open", "close"] == sink.calls
    assert [
        "sink 'tested' (failing) can't be opened; training continues without it: can't log in"
    ] == warnings_of(caplog)


@wherever
def test_a_sink_that_can_not_be_made_is_left_out(isolation: Isolation) -> None:
    """A constructor that raises is like a sink that can't be opened."""

    def make() -> Sink:
        raise ValueError("no such option")

    failing = SinkSpec(name="tested", make=make, kind="failing")
    report = deliver(failing, isolation=isolation)[0].sinks[0]
    assert ((0, 0, 0, 12), "ValueError: no such option") == (numbers(report), report.error)


@wherever
@pytest.mark.parametrize("error", [ValueError("odd record"), OSError(28, "disk full")])
def test_on_error_raise_stops_the_training(error: Exception, isolation: Isolation) -> None:
    """Where the user wants no training without the sink, the error leaves `emit`, once."""
    memory = Failing()
    tested = route(Failing("open", error=error), on_error="raise")
    listener = Listener({"memory": memory, "tested": tested}, isolation=isolation)
    said = f"sink 'tested' (failing) can't be opened: {type(error).__name__}: {error}"
    with pytest.raises(SinkError) as raised:
        emit(listener.bus, RunStarted())
    assert said == str(raised.value)
    emit(listener.bus, METRICS)
    listener.bus.close()
    assert [] == check_grammar(listener.records)
    assert ["run.started", "run.ended"] == listener.names
    ended = listener.records[-1].event
    assert isinstance(ended, RunEnded)
    assert ("failed", f"SinkError: {said}") == (ended.status, ended.reason)
    assert listener.records == memory.records
    assert ["open", "flush", "close", "location"] == [c for c in memory.calls if c != "write"]
    (receipt,) = listener.bus.receipts
    assert "failed" == receipt.status
    assert [(2, 0, 0, 0), (0, 0, 0, 2)] == [numbers(report) for report in receipt.sinks]


@pytest.mark.parametrize("isolation", ["inline", "thread", "process"])
def test_on_error_raise_holds_for_a_configured_sink(isolation: Isolation, tmp_path: Path) -> None:
    """The error of a sink in another process leaves `run.started` like that of one in this."""
    (tmp_path / "file").write_text("no folder")
    bus = configured(isolation, path=tmp_path / "file" / "out.jsonl", on_error="raise")
    with pytest.raises(SinkError, match=r"^sink 'local' \(jsonl\) can't be opened: can't write /"):
        bus.run().__enter__()
    (receipt,) = bus.receipts
    assert ("failed", (0, 0, 0, 2)) == (receipt.status, numbers(receipt.sinks[0]))


@pytest.mark.parametrize("where", ["open", "write", "flush", "close"])
def test_ctrl_c_in_a_sink_loses_nothing(where: str) -> None:
    """Ctrl-C passes through, the run has one end, and every record is accounted for."""
    error = KeyboardInterrupt()
    memory = MemorySink()
    slow = Failing(where, times=1, error=error)
    listener = Listener({"slow": slow, "memory": memory}, isolation="inline")
    with pytest.raises(KeyboardInterrupt) as raised, listener.bus.run() as run:
        run.log({"loss": 1.0})
    assert error is raised.value
    listener.bus.close()
    assert listener.records == memory.records == slow.records
    assert [] == check_grammar(memory.records)
    (receipt,) = listener.bus.receipts
    for report in receipt.sinks:
        assert (receipt.emitted, 0, 0, 0) == numbers(report)
    assert receipt.emitted == len(memory.records)


@pytest.mark.parametrize("kind", [RunStarted, MetricsLogged, RunEnded])
def test_ctrl_c_in_a_subscriber_loses_nothing(kind: type[Event]) -> None:
    """Ctrl-C in a subscriber passes through, and the sinks still get the record and one end."""
    memory = MemorySink()
    bus = Bus({"memory": memory}, on_receipt=quiet)

    def interrupted(record: Record) -> None:
        raise KeyboardInterrupt

    unsubscribe = bus.subscribe(interrupted, kind)
    with contextlib.suppress(KeyboardInterrupt), bus:
        emit(bus, METRICS)
        emit(bus, RunEnded(status="finished"))
    unsubscribe()
    bus.close()
    assert [] == check_grammar(memory.records)
    assert 1 == len(bus.receipts)


def test_a_receipt_is_readable() -> None:
    """The lines that a person reads have the counts, the error and the place."""
    sink = Failing("write", times=3)
    receipt, _ = deliver(route(sink, transforms=TransformSpec(every={"train": 5})))
    receipt = msgspec.structs.replace(receipt, run="run_1", journal="/runs/run 1", config="c.yaml")
    assert str(receipt) == textwrap.dedent(
        """\
        trainbus: run run_1 finished, 12 records
          tested   failing: 3 delivered, 8 filtered out, 1 rejected
                   ValueError: odd record
                   somewhere
          memory   MemorySink: 12 delivered
          journal  /runs/run 1"""
    )
    waiting = [msgspec.structs.replace(receipt.sinks[0], dead=0, pending=1)]
    receipt = msgspec.structs.replace(receipt, sinks=waiting)
    assert "1 PENDING" in str(receipt)
    assert "to send the rest: trainbus replay '/runs/run 1' -c c.yaml" in str(receipt)


def test_receipts_are_printed_on_stderr(journals: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By default the receipt is printed where trainers print; a bus without sinks prints none."""
    with Bus({"memory": MemorySink}).run(name="printed"):
        pass
    with Bus().run():
        pass
    captured = capsys.readouterr()
    assert "" == captured.out
    assert captured.err.startswith("trainbus: run printed_")
    run = captured.err.split()[2]
    assert captured.err.endswith(
        f" finished, 2 records\n  memory   MemorySink: 2 delivered\n  journal  {journals / run}\n"
    )
    assert 1 == captured.err.count("trainbus: run")


def test_a_receipt_that_can_not_be_shown_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    """What `on_receipt` raises does not reach training."""

    def broken(receipt: Receipt) -> None:
        raise OSError("no terminal")

    bus = Bus({"memory": MemorySink()}, on_receipt=broken)
    with bus.run():
        pass
    assert 1 == len(bus.receipts)
    assert "can't be shown" in caplog.text


def test_a_sink_is_opened_with_the_names_it_will_see() -> None:
    """The start that `open` is given went through the sink's transforms, as the record does."""

    class Opened(MemorySink):
        def open(self, run: RunInfo) -> None:
            self.run = run

    sink = Opened()
    spec = TransformSpec(rename={"metrics/*": "*"})
    bus = Bus({"opened": route(sink, transforms=spec)}, on_receipt=quiet, isolation="inline")
    emit(bus, RunStarted(name="n", goals={"metrics/acc": "max"}))
    assert RunStarted(name="n", goals={"acc": "max"}) == sink.run.started == sink.events[0]
    assert sink.records[0].run == sink.run.id
    bus.close()


# Where sinks run


def configured(isolation: Isolation, /, **keys: object) -> Bus:
    """Return a bus with one sink that is configured, and that another process can make again."""
    file = {"isolation": isolation, "sinks": {"local": {"type": "jsonl", **keys}}}
    return config.loads(json.dumps(file, default=str))


TRANSFORMS = {
    "include": ["train/*", "lr", "curves/*", "nan"],
    "exclude": ["train/box*"],
    "rename": {"train/*": "t/*"},
    "every": {"train": 10},
}


@pytest.mark.parametrize("keys", [{}, TRANSFORMS], ids=["plain", "transformed"])
@pytest.mark.parametrize("isolation", ["inline", "thread", "process", "auto"])
def test_a_sink_gets_the_same_wherever_it_runs(
    isolation: Isolation,
    keys: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A configured sink has the records that its transforms let through, as they were heard."""
    heard: list[Record] = []
    bus = configured(isolation, path=tmp_path / "out.jsonl", **keys)
    bus.subscribe(heard.append)
    with bus:
        for event in sample_events(tmp_path / "samples"):
            emit(bus, event)
    assert [] == check_grammar(heard)
    transform = Transform(msgspec.convert(keys, TransformSpec))
    wanted = [seen for seen in map(transform, heard) if seen is not None]
    assert len(wanted) > 10
    stored = (tmp_path / "out.jsonl").read_bytes().splitlines()
    assert [encode(record) for record in wanted] == stored
    (receipt,) = bus.receipts
    assert (len(wanted), len(heard) - len(wanted), 0, 0) == numbers(receipt.sinks[0])
    assert str(tmp_path / "out.jsonl") == receipt.sinks[0].location
    # A busy machine may have said before that it waits.
    said = re.sub(r"trainbus: waiting up to.*\n", "", capsys.readouterr().err)
    assert f"{receipt}\n" == said


@pytest.mark.parametrize("isolation", ["inline", "thread"])
def test_a_sink_object_gets_what_subscribers_heard(isolation: Isolation, tmp_path: Path) -> None:
    """A sink that is an object has the run's records when the run has ended, arrays included."""
    memory = MemorySink()
    listener = Listener({"memory": memory}, isolation=isolation)
    with listener.bus as bus:
        for event in sample_events(tmp_path / "samples"):
            emit(bus, event)
    wanted = list(filter(Transform(TransformSpec()), listener.records))
    assert without_files(wanted) == without_files(memory.records)


@wherever
def test_a_sink_is_given_a_picture_as_it_was(isolation: Isolation, tmp_path: Path) -> None:
    """The trainer may overwrite a picture at once; a sink that reads no files gets its own path."""

    class Names(MemorySink):
        reads_files = False

    picture = tmp_path / "batch.png"
    picture.write_bytes(png(4, 3))
    reads, names = MemorySink(), Names()
    bus = Bus({"reads": reads, "names": names}, on_receipt=quiet, isolation=isolation)
    with bus.run() as run:
        run.image("batch", picture)
        picture.write_bytes(b"")
    (path,) = [event.path for event in reads.events if isinstance(event, ImageLogged)]
    assert png(4, 3) == Path(path or "").read_bytes()
    assert [str(picture)] == [e.path for e in names.events if isinstance(e, ImageLogged)]


def without_files(records: Sequence[Record]) -> list[bytes]:
    """Return records as JSON, without the paths that are those of copies in a sink."""
    return [
        encode(msgspec.structs.replace(r, event=msgspec.structs.replace(r.event, path=None)))
        if isinstance(r.event, ImageLogged)
        else encode(r)
        for r in records
    ]


WITNESS = """
    import os, threading
    from trainbus import Options, Sink

    class WitnessOptions(Options, frozen=True, kw_only=True):
        path: str

    class Witness(Sink):
        Options = WitnessOptions

        def write(self, records):
            with open(self.options.path, "w") as file:
                file.write(f"{os.getpid()} {threading.get_ident()}")
"""


@pytest.mark.parametrize(
    ("of_bus", "of_sink", "expected"),
    [
        ("auto", None, "process"),
        ("process", None, "process"),
        ("thread", None, "thread"),
        ("inline", None, "inline"),
        ("inline", "process", "process"),
        ("process", "inline", "inline"),
        ("auto", "thread", "thread"),
    ],
)
def test_a_sink_runs_where_it_is_told_to(
    of_bus: Isolation,
    of_sink: Isolation | None,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bus says where sinks run, a sink's own word goes first, and `auto` is a process."""
    plugins = make_plugin(tmp_path / "plugins", "witness", WITNESS, "Witness")
    monkeypatch.syspath_prepend(plugins)
    own = {} if of_sink is None else {"isolation": of_sink}
    bus = configured(of_bus, type="witness", path=tmp_path / "seen", **own)
    with bus.run():
        pass
    process, thread = map(int, (tmp_path / "seen").read_text().split())
    where = "process" if process != os.getpid() else "thread"
    assert expected == ("inline" if thread == threading.get_ident() else where)


SHAPES = """
    import datetime
    from typing import Literal
    import msgspec
    from trainbus import Options, Sink

    class Server(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
        host_name: str
        retries: int = 0

    class ShapesOptions(Options, frozen=True, kw_only=True):
        path: str
        rate: float = 1.0
        limit: float = 1.0
        big: int = 0
        tags: tuple[str, ...] = ()
        words: set[str] = set()
        labels: dict[str, list[int]] = {}
        mode: Literal["a", "b"] | None = None
        server: Server | None = None
        since: datetime.date | None = None

    class Shapes(Sink):
        Options = ShapesOptions

        def write(self, records):
            with open(self.options.path, "w", encoding="utf-8") as file:
                file.write(repr(self.options))
"""


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"rate": 1e-9, "big": 2**63, "tags": ["a", "é"], "words": ["x"], "mode": "b"},
        {"labels": {"1": [1], "": []}, "server": {"hostName": "h"}, "since": "2024-02-29"},
        {"rate": math.inf, "limit": -math.inf},
    ],
    ids=["defaults", "plain", "nested", "infinite"],
)
def test_options_are_the_same_in_another_process(
    given: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a file says of a sink is what the sink is made with, wherever it is made."""
    monkeypatch.syspath_prepend(make_plugin(tmp_path / "plugins", "shapes", SHAPES, "Shapes"))
    path, found = tmp_path / "options", []
    for isolation in ("inline", "process"):
        sink = {"type": "shapes", "path": str(path), "isolation": isolation, **given}
        bus = config.loads(yaml.safe_dump({"sinks": {"a": sink}}))
        with bus.run():
            pass
        assert (2, 0, 0, 0) == numbers(bus.receipts[0].sinks[0])
        found.append(path.read_text(encoding="utf-8"))
    assert found[0] == found[1]


def test_an_object_can_not_run_in_another_process(caplog: pytest.LogCaptureFixture) -> None:
    """A sink that is an object gets a thread instead, has everything, and one line says so."""
    memory = MemorySink()
    listener = Listener({"memory": memory}, isolation="process")
    with listener.bus.run() as run:
        run.log({"loss": 1.0})
    assert listener.records == memory.records
    assert (3, 0, 0, 0) == numbers(listener.bus.receipts[0].sinks[0])
    assert [
        "sink 'memory' is an object of this process, so it runs in a thread instead of a process"
    ] == warnings_of(caplog)


@pytest.mark.parametrize("isolation", ["inline", "thread", "process"])
def test_a_receipt_is_saved_beside_the_journal(
    isolation: Isolation, journals: Path, tmp_path: Path
) -> None:
    """`receipt.json` in the run's directory is the receipt that the user saw, and adds up."""
    bus = configured(isolation, path=tmp_path / "out.jsonl", every={"train": 5})
    with bus.run(name="saved") as run:
        for step in range(10):
            run.log({"loss": 1.0}, step=step)
    (receipt,) = bus.receipts
    assert str(journals / receipt.run) == receipt.journal
    saved = (journals / receipt.run / "receipt.json").read_bytes()
    assert receipt == msgspec.json.decode(saved, type=Receipt)
    assert (12, 12) == (receipt.emitted, sum(numbers(receipt.sinks[0])))
    lines = (journals / receipt.run / "r0-a1.jsonl").read_bytes().splitlines()
    assert receipt.emitted == len(lines)


def test_the_end_waits_no_longer_than_it_may() -> None:
    """A sink that hangs costs `flush_secs`; what it did not take is pending, and was not lost."""
    hangs = threading.Event()

    class Hanging(MemorySink):
        def write(self, records: Sequence[Record]) -> None:
            hangs.wait(FOREVER_S)
            super().write(records)

    sink, other = Hanging(), MemorySink()
    bus = Bus({"sink": sink, "other": other}, on_receipt=quiet, flush_secs=1.0)
    begun = time.monotonic()
    with bus.run() as run:
        run.log({"loss": 1.0})
    took = time.monotonic() - begun
    hangs.set()
    assert 1.0 <= took
    assert [(0, 0, 0, 3), (3, 0, 0, 0)] == [numbers(each) for each in bus.receipts[0].sinks]
    assert "3 PENDING" in str(bus.receipts[0])
    assert "has been blocked for" in (bus.receipts[0].sinks[0].error or "")


GATED = """
    import os, time
    from trainbus import Options, Sink

    class GatedOptions(Options, frozen=True, kw_only=True):
        gate: str

    class Gated(Sink):
        Options = GatedOptions

        def write(self, records):
            until = time.monotonic() + 60
            while not os.path.exists(self.options.gate) and time.monotonic() < until:
                time.sleep(0.01)
"""


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C raises, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_ctrl_c_while_sinks_are_waited_for_tells_what_they_got(
    isolation: Isolation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends the waiting: who has everything is said to have it, the rest is pending."""
    monkeypatch.syspath_prepend(make_plugin(tmp_path / "plugins", "gated", GATED, "Gated"))
    gate, out = tmp_path / "gate", tmp_path / "out.jsonl"
    kept = {"type": "jsonl", "path": str(out)}
    slow = {"type": "gated", "gate": str(gate)}
    bus = config.loads(json.dumps({"isolation": isolation, "sinks": {"kept": kept, "slow": slow}}))

    def interrupt() -> None:
        until = time.monotonic() + 30
        while time.monotonic() < until and not (
            out.exists() and out.read_bytes().count(b"\n") == 3
        ):
            time.sleep(0.01)
        _thread.interrupt_main()

    class Screen(io.StringIO):
        def write(self, text: str) -> int:
            if "waiting up to" in text:
                threading.Thread(target=interrupt).start()
            return super().write(text)

    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with pytest.raises(KeyboardInterrupt), bus.run() as run:
        run.log({"loss": 1.0})
    gate.touch()
    (receipt,) = bus.receipts
    assert "finished" == receipt.status
    assert [(3, 0, 0, 0), (0, 0, 0, 3)] == [numbers(report) for report in receipt.sinks]
    assert 1 == screen.getvalue().count("to send the rest: trainbus replay")


@pytest.mark.parametrize("names", [("val/loss", "val_loss"), ("x" * 90, "x" * 91), ("a", ".a")])
def test_sinks_with_similar_names_are_two(names: tuple[str, str]) -> None:
    """Names that no file can have, or that differ only far behind, keep their sinks apart."""
    sinks = {name: MemorySink() for name in names}
    bus = Bus(sinks, on_receipt=quiet, flush_secs=5.0)
    with bus.run() as run:
        run.log({"loss": 1.0})
    assert [(3, 0, 0, 0)] * 2 == [numbers(report) for report in bus.receipts[0].sinks]
    assert [3, 3] == [len(sink.records) for sink in sinks.values()]


def test_routes_are_told_apart_by_the_names_that_the_bus_has_for_them() -> None:
    """Two routes that bear one name are two sinks all the same, and neither hides the other."""
    sinks = MemorySink(), MemorySink()
    routes = {name: route(sink) for name, sink in zip("ab", sinks, strict=True)}
    bus = Bus(routes, on_receipt=quiet, flush_secs=5.0)
    with bus.run() as run:
        run.log({"loss": 1.0})
    assert [3, 3] == [len(sink.records) for sink in sinks]
    reports = bus.receipts[0].sinks
    assert ["a", "b"] == [report.name for report in reports]
    assert [(3, 0, 0, 0)] * 2 == [numbers(report) for report in reports]


def test_what_a_sink_emits_does_not_come_back(caplog: pytest.LogCaptureFixture) -> None:
    """A sink that logs to its own bus would hear itself for ever; a line says what was dropped."""
    bus: Bus

    class Echo(MemorySink):
        def write(self, records: Sequence[Record]) -> None:
            super().write(records)
            emit(bus, METRICS)

    echo = Echo()
    bus = Bus({"echo": echo}, on_receipt=quiet)
    emit(bus, RunStarted())
    bus.close()
    assert ["run.started", "run.ended"] == [event_name(event) for event in echo.events]
    assert ["dropped metrics.logged: emitted by a sink"] == warnings_of(caplog)


def test_secrets_reach_nobody(tmp_path: Path) -> None:
    """Params that look like secrets, or are named in `redact`, are replaced for all that listen."""
    memory = MemorySink()
    spec = JournalSpec(dir=str(tmp_path / "runs"), redact=["house_rule"])
    listener = Listener({"memory": memory}, journal=spec)
    params = {
        "lr": 0.1,
        "api_key": "k-3f9a7c21d5e8",
        "house_rule": "b4n4na",
        "deep": {"password": "hunter2"},
    }
    with listener.bus.run(params=params):
        pass
    hidden = "[redacted]"
    expected = {"lr": 0.1, "api_key": hidden, "house_rule": hidden, "deep": {"password": hidden}}
    for records in (listener.records, memory.records):
        started = records[0].event
        assert isinstance(started, RunStarted)
        assert expected == started.params
    (journal,) = (tmp_path / "runs").glob("*/r0-a1.jsonl")
    assert [] == [s for s in ("3f9a7c21", "b4n4na", "hunter2") if s in journal.read_text()]


# What is hung into a framework


@contextlib.contextmanager
def tiny_adapter() -> Iterator[None]:
    """Make the tiny framework's adapter known."""

    def adapter_for(target: object) -> Any:  # a mock would hold what it was called with
        return tinytrainer.attach

    with mock.patch.object(registry, "adapter_for", adapter_for):
        yield


def test_attach_reports_a_training(tmp_path: Path) -> None:
    """A trainer that is attached to reports; closing the bus detaches."""
    listener = Listener()
    trainer = tinytrainer.Trainer(tmp_path, 2)
    with tiny_adapter(), listener.bus as bus:
        detach = bus.attach(trainer).detach
        assert detach == bus.attach(trainer).detach
        trainer.fit()
    assert [] == check_grammar(listener.records)
    assert [] == trainer.callbacks
    trainer.fit()
    assert 1 == listener.names.count("run.started")


def test_a_trainer_that_is_gone_has_its_run_ended(tmp_path: Path) -> None:
    """The bus keeps no trainer alive, and says of a run that was open why it has ended."""
    listener = Listener()
    training = tinytrainer.setup(tmp_path, 3)
    training.fail_at(ValueError("diverged"))
    ended = threading.Event()
    with tiny_adapter(), listener.bus as bus:
        bus.subscribe(lambda record: ended.set(), RunEnded)
        detach = bus.attach(training.target).detach
        with contextlib.suppress(ValueError):
            training.run()
        target = weakref.ref(training.target)
        del training
        gc.collect()
        assert target() is None
        assert ended.wait(60)
        detach()
    end = listener.records[-1].event
    assert isinstance(end, RunEnded)
    reason = "what reported this run was deleted before the run had ended"
    assert ("stopped", reason) == (end.status, end.reason)
    assert [] == check_grammar(listener.records)


def test_trainers_in_a_loop_are_attached_each_and_none_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object at the address of an earlier one is another one; emitters do not pile up."""
    listener = Listener()
    kept: weakref.WeakSet[Emitter] = weakref.WeakSet()

    class CountedEmitter(Emitter):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            kept.add(self)

    monkeypatch.setattr(Bus, "emitter_type", CountedEmitter)
    with tiny_adapter(), listener.bus as bus:
        for fold in range(5):
            trainer = tinytrainer.Trainer(tmp_path / str(fold), 1)
            bus.attach(trainer)
            trainer.fit()
            del trainer
            gc.collect()
            with bus.run():
                pass
        gc.collect()
        assert 10 == listener.names.count("run.ended")
        assert ([], 0) == (bus.open_runs, len(kept))


def test_an_exception_ends_the_run_of_a_trainer(tmp_path: Path) -> None:
    """Where the framework has no hook for failures, the block supplies the end."""
    listener = Listener()
    training = tinytrainer.setup(tmp_path, 3)
    error = ValueError("diverged")
    training.fail_at(error)
    raised: BaseException | None = None
    try:
        with tiny_adapter(), listener.bus as bus:
            bus.attach(training.target)
            training.run()
    except ValueError as caught:
        raised = caught
    assert error is raised
    assert [] == check_grammar(listener.records)
    ended = listener.records[-1].event
    assert isinstance(ended, RunEnded)
    assert "failed" == ended.status


def test_an_object_of_no_known_framework_is_refused() -> None:
    """The error says what it is, what there are adapters for, and what to do."""
    with pytest.raises(NoAdapterError, match=r"no adapter for builtins\.int; .*bus\.run"):
        Bus().attach(3)


class Handle(tinytrainer.Callback):
    """What an adapter hangs into a framework."""

    def __init__(self, emit: Any) -> None:
        self.emit = emit


def handle_of(bus: Bus) -> Handle:
    """Return a handle as an adapter would make it."""
    handles: list[Handle] = []

    def adapter(target: object, emit: Any) -> Callable[[], None]:
        handles.append(Handle(emit))
        return lambda: None

    with mock.patch.object(registry, "adapter_for", return_value=adapter):
        bus.attach(handles)
    return handles[0]


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy])
def test_a_copied_handle_reports_to_the_same_run(
    copier: Callable[[Handle], Handle], listener: Listener
) -> None:
    """Frameworks copy their callbacks; copy and original are one trainer."""
    handle = handle_of(listener.bus)
    copied = copier(handle)
    handle.emit(METRICS)
    copied.emit(METRICS)
    listener.bus.close()
    assert 1 == len({record.run for record in listener.records})
    assert [] == check_grammar(listener.records)


_rebuilt: list[Listener] = []


def rebuild() -> Bus:
    """Make the bus of another process."""
    _rebuilt.append(Listener())
    return _rebuilt[-1].bus


def rebuild_fails() -> Bus:
    """Find no configuration."""
    raise FileNotFoundError("trainbus.yaml")


def test_a_pickled_handle_makes_a_bus_of_its_own() -> None:
    """In another process the configuration is read again, and the handle emits there."""
    listener = Listener(rebuild=rebuild)
    handle = handle_of(listener.bus)
    revived = pickle.loads(pickle.dumps(handle))
    assert isinstance(revived.emit, Emitter)
    revived.emit(METRICS)
    assert [] == listener.records
    assert ["run.started", "metrics.logged"] == _rebuilt[-1].names


@pytest.mark.parametrize(
    ("rebuild", "text"),
    [
        (None, "configure them in a file (`trainbus.load`) to have that process log too"),
        (rebuild_fails, "this process logs nothing: trainbus.yaml"),
    ],
)
def test_a_pickled_handle_without_a_configuration_is_silent(
    rebuild: Callable[[], Bus] | None, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What can't be made again in another process says so in one line, and takes every call."""
    handle = handle_of(Listener(rebuild=rebuild).bus)
    revived = pickle.loads(pickle.dumps(handle))
    assert isinstance(revived.emit, NullEmitter)
    revived.emit(METRICS)
    assert revived.emit.every("train") is None
    assert frozenset() == revived.emit.services
    (found,) = warnings_of(caplog)
    assert found.endswith(text)


def test_a_handle_knows_what_sinks_ask_for() -> None:
    """An adapter learns which trackers are fed, and in which steps values are wanted."""

    class Tracker(MemorySink):
        service = "wandb"

    specs = [TransformSpec(every={"train": n}) for n in (50, 20)]
    routes = {str(i): route(Tracker(), transforms=spec) for i, spec in enumerate(specs)}
    emit = handle_of(Bus({**routes, "tracker": Tracker(), "other": MemorySink}))
    assert 20 == emit.emit.every("train")
    assert emit.emit.every("validation") is None
    assert frozenset({"wandb"}) == emit.emit.services


def test_nothing_is_logged_where_nothing_is_wrong(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A training that goes well leaves no line in the log."""
    caplog.set_level(logging.DEBUG)
    listener = Listener({"memory": MemorySink()})
    with listener.bus.run(save_dir=str(tmp_path)) as run:
        for _ in run.epochs(3):
            run.log({"loss": 1.0})
    assert [] == warnings_of(caplog)


def test_a_mistyped_field_drops_its_event_with_a_line(caplog: pytest.LogCaptureFixture) -> None:
    """A level that the schema doesn't know would be unreadable later: a line says so at once."""
    sink = MemorySink()
    with Bus({"memory": sink}) as bus, bus.run() as run:
        run.alert("a", level="loud")  # type: ignore[arg-type]
        run.alert("b", level="info")
    assert ["b"] == [r.event.title for r in sink.records if isinstance(r.event, AlertRaised)]
    assert "Invalid enum value 'loud'" in caplog.text


def test_a_resumed_training_without_its_marker_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no marker is found a new run begins, and a line says where it was looked for."""
    with Bus() as bus:
        emit(bus, RunStarted(save_dir=str(tmp_path), resumed=Resumed(epoch=2, save_dir="/before")))
    expected = f"found no {MARKER}, which names the run, in {tmp_path} or in /before"
    assert f"starts a new run: {expected}" in caplog.text


def test_a_resumed_training_without_a_folder_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Where the framework names no folder there is nothing to look in, and a line says that."""
    with Bus() as bus:
        emit(bus, RunStarted(resumed=Resumed(epoch=2)))
    assert "starts a new run: the framework reports no save directory" in caplog.text
    assert "None" not in caplog.text


def test_the_marker_is_hidden_and_shared_with_no_sink(tmp_path: Path) -> None:
    """Checkpoints are all that `*` finds beside it, and files of sinks in the folder stay whole."""
    text = f"sinks: {{tables: {{type: csv, dir: '{tmp_path}/{{run}}'}}}}"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.pt").write_bytes(b"")
    started = RunStarted(save_dir=str(tmp_path / "run"), resumed=Resumed(run="run"))
    for attempt in (1, 2):
        with config.loads(text) as bus:
            emit(bus, started)
            emit(bus, MetricsLogged(values={"loss": 1.0}, phase="train", epoch=attempt))
        marker = json.loads((tmp_path / "run" / MARKER).read_text())
        assert {"run": "run", "attempt": attempt + 1} == marker
    found = {path.suffix for path in (tmp_path / "run").glob("[!.]*")}
    assert {".pt", ".csv"} == found
    assert MARKER.startswith(".")
    rows = (tmp_path / "run" / "train.csv").read_text().splitlines()
    assert 3 == len(rows)


def test_a_marker_is_found_where_the_earlier_training_saved(tmp_path: Path) -> None:
    """A resumed training that saves elsewhere finds its run through the old folder."""
    ids = []
    for save_dir, resumed in (("a", None), ("b", Resumed(epoch=1, save_dir=str(tmp_path / "a")))):
        sink = MemorySink()
        with Bus({"memory": sink}) as bus:
            emit(bus, RunStarted(save_dir=str(tmp_path / save_dir), resumed=resumed))
        ids.append((sink.records[0].run, sink.records[0].attempt))
    (first, one), (second, two) = ids
    assert (first, 1, 2) == (second, one, two)


def test_what_is_dropped_is_in_the_receipt() -> None:
    """Events that the schema doesn't know are counted, and each fault is told."""
    with Bus({"memory": MemorySink()}) as bus, bus.run() as run:
        run.alert("a", level="loud")  # type: ignore[arg-type]
        run.checkpoint("m.pt", kind="Best")  # type: ignore[arg-type]
    assert 2 == bus.receipts[0].dropped
    assert "2 records, 2 DROPPED" in str(bus.receipts[0])


def test_a_run_of_wrong_types_is_refused_before_it_begins() -> None:
    """`bus.run` says at once which of its fields is of another type."""
    with pytest.raises(TypeError, match=r"bus\.run: Expected `str \| null`, got `int`"):
        Bus().run(name=7)  # type: ignore[arg-type]


def test_a_run_without_with_starts_as_itself() -> None:
    """Used without `with`, a run has its name and params all the same."""
    sink = MemorySink()
    with Bus({"memory": sink}) as bus:
        bus.run(name="mine", params={"lr": 1}).log({"loss": 1})
    started = sink.records[0].event
    assert isinstance(started, RunStarted)
    assert ("mine", {"lr": 1}) == (started.name, started.params)
