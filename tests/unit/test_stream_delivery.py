"""A sink gets the records of every stream of a run, each once, and the run's end last."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from support.emitting import emit
from support.journals import folder_in
from trainbus import Bus, JournalSpec, Record, RunInfo, Sink, SinkSpec
from trainbus.delivery.cursor import Cursor, StreamCursor
from trainbus.delivery.receipt import Receipt, SinkReport
from trainbus.delivery.replay import plan, replay
from trainbus.delivery.transforms import TransformSpec
from trainbus.delivery.worker import SinkWorker, count, report_on_disk
from trainbus.events import (
    ArtifactLogged,
    Event,
    MetricsLogged,
    RunEnded,
    RunStarted,
    TextLogged,
)
from trainbus.journal.directory import RunFolder
from trainbus.journal.file_access import FileResolver
from trainbus.journal.recovery import recover
from trainbus.journal.writer import JournalWriter

Name = tuple[str, int]


class Kept(Sink):
    """Keeps the records that it gets in a list that outlives it, also those that come twice."""

    def __init__(self, kept: list[Record]) -> None:
        super().__init__()
        self.kept = kept
        self.opened: list[RunInfo] = []

    def open(self, run: RunInfo) -> None:
        """Keep what it was opened with."""
        self.opened.append(run)

    def write(self, records: Sequence[Record]) -> None:
        """Keep the records; poison is rejected."""
        if any(isinstance(r.event, TextLogged) and r.event.text == "poison" for r in records):
            raise ValueError("poison")
        self.kept += records


class Uploads(Kept):
    """Also takes artifacts, in a call of their own."""

    is_offline = True

    def upload(self, records: Sequence[Record]) -> None:
        """Keep the records, once there is a network."""
        if self.is_offline:
            raise ConnectionError("no network")
        self.kept += records


class Delivery:
    """A run on disk, its writers, and the worker that feeds a sink from it."""

    def __init__(self, folder: RunFolder, sink: type[Kept] = Kept) -> None:
        self.folder = folder
        self.now = 0.0
        self.kept: list[Record] = []
        self.sink = sink(self.kept)
        self.spec = SinkSpec(name="kept", kind="kept", make=lambda: self.sink)
        self.writers: dict[str, JournalWriter] = {}
        self.worker = self.new_worker()

    def new_worker(self, *, is_replay: bool = False) -> SinkWorker:
        """Return a worker of a process that has just begun."""
        self.worker = SinkWorker(
            self.spec,
            self.folder,
            FileResolver(self.folder, []),
            attempt=1,
            is_replay=is_replay,
            in_background=type(self.sink) is Uploads,
            clock=lambda: self.now,
        )
        return self.worker

    def write(self, stream: str, *events: Event) -> None:
        """Write events to a stream; the first ones open its file."""
        if stream not in self.writers:
            self.writers[stream] = JournalWriter(self.folder, stream=stream)
        for event in events:
            self.writers[stream].append(event, 1.0)

    def close(self, *streams: str) -> None:
        """Close the writers of streams."""
        for stream in streams:
            self.writers.pop(stream).close()

    def work(self, secs: float = 0.0) -> SinkReport:
        """Step until there is nothing to do, for that many seconds of the clock at least."""
        until = self.now + secs
        while not (self.worker.done or self.worker.main.stopped):
            wait = self.worker.step()
            if wait and self.now >= until and not self.worker.main.wait():
                break
            self.now += wait
        return self.worker.report(count(self.folder, 1))

    def names(self) -> list[Name]:
        """Return stream and seq of what the sink was given."""
        return [(record.stream, record.seq) for record in self.kept]

    def cursor(self) -> Cursor:
        """Return the cursor on disk."""
        return msgspec.json.decode(self.folder.cursor(self.spec.key).read_bytes(), type=Cursor)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """The directory of a run."""
    return folder_in(tmp_path)


@pytest.fixture
def delivery(folder: RunFolder) -> Delivery:
    """A delivery to a sink that keeps everything."""
    return Delivery(folder)


START, END = RunStarted(), RunEnded(status="finished")


def text(line: str = "line") -> TextLogged:
    """Return an event like a console's."""
    return TextLogged(key="console", text=line)


def counts(report: SinkReport) -> tuple[int, int, int, int]:
    """Return what was taken, filtered out, rejected, and is pending."""
    return report.taken, report.skipped, report.dead, report.pending


def test_a_sink_gets_every_stream(delivery: Delivery) -> None:
    """The start comes first, the end last, and the counts include all streams."""
    delivery.write("", START)
    delivery.write("console", text(), text())
    delivery.write("system", text())
    delivery.write("", text(), END)
    delivery.close("console", "system")
    report = delivery.work()
    names = delivery.names()
    assert (("", 1), ("", 3)) == (names[0], names[-1])
    expected = [("", 1), ("", 2), ("", 3), ("console", 1), ("console", 2), ("system", 1)]
    assert expected == sorted(names)
    assert (6, 0, 0, 0) == counts(report)
    assert 6 == count(delivery.folder, 1) == delivery.worker.total()


def test_the_cursor_has_a_place_in_each_stream(delivery: Delivery) -> None:
    """It has the seq and offset of each stream, and the next process continues there."""
    delivery.write("", START, text())
    delivery.write("console", text(), text())
    delivery.work()
    delivery.worker.close()
    size = delivery.folder.records(1, 0, "console").stat().st_size
    found = delivery.cursor()
    assert {"console-r0": StreamCursor(seq=2, offset=size)} == found.streams
    assert (1, 2, 4) == (found.attempt, found.seq, found.taken)
    delivery.new_worker()
    delivery.write("console", text())
    delivery.write("", text(), END)
    delivery.close("console")
    report = delivery.work()
    new = delivery.names()[4:]
    assert ([("", 3), ("", 4), ("console", 3)], ("", 4)) == (sorted(new), new[-1])
    assert (7, 0, 0, 0) == counts(report)


def test_a_cursor_of_an_older_version_is_read(delivery: Delivery) -> None:
    """A cursor without streams continues the main stream, and starts all others."""
    delivery.write("", START, text(), END)
    delivery.write("console", text())
    delivery.close("console")
    path = delivery.folder.cursor(delivery.spec.key)
    path.parent.mkdir()
    path.write_bytes(b'{"attempt":1,"seq":2,"offset":0,"taken":2,"skipped":0,"dead":0,"lost":0}')
    report = delivery.work()
    assert [("console", 1), ("", 3)] == delivery.names()
    assert (4, 0, 0, 0) == counts(report)


@pytest.mark.parametrize("killed_after", range(8))
def test_a_delivery_that_is_killed_goes_on_in_each_stream(
    delivery: Delivery, killed_after: int
) -> None:
    """Killed after any step, it delivers each record at least once, in order, and the end last."""
    delivery.write("", START)
    delivery.write("console", text(), text())
    for _ in range(killed_after):
        delivery.worker.step()
    delivery.write("system", text())
    delivery.write("", text())
    for _ in range(2):
        delivery.worker.step()
        delivery.now += 0.4
    delivery.worker.release()  # as the system does for a killed process
    delivery.new_worker()
    delivery.write("console", text())
    delivery.write("", END)
    delivery.close("console", "system")
    report = delivery.work()
    names = delivery.names()
    everything = [("", n) for n in (1, 2, 3)] + [("console", n) for n in (1, 2, 3)]
    assert {*everything, ("system", 1)} == set(names)
    assert (("", 1), ("", 3), 1) == (names[0], names[-1], names.count(("", 3)))
    for stream in ("", "console"):
        firsts = list(dict.fromkeys(name for name in names if name[0] == stream))
        assert sorted(firsts) == firsts
    assert (7, 0, 0, 0) == counts(report)


def test_the_end_waits_for_a_stream_that_is_open(delivery: Delivery) -> None:
    """While a writer has a stream open, its records are delivered and the end is not."""
    delivery.write("", START, END)
    delivery.write("system", text())
    report = delivery.work(100)
    assert [("", 1), ("system", 1)] == delivery.names()
    assert (2, 0, 0, 1) == counts(report)
    assert "the run's end waits for a stream that is still being written" == report.error
    assert (False, False) == (delivery.worker.is_idle(), delivery.worker.is_complete())
    delivery.write("system", text())
    delivery.close("system")
    report = delivery.work()
    assert [("system", 2), ("", 2)] == delivery.names()[2:]
    assert ((4, 0, 0, 0), None) == (counts(report), report.error)
    assert delivery.worker.done


def test_the_wait_for_a_stream_is_limited(delivery: Delivery) -> None:
    """After the time limit the end is delivered; what is written then stays pending."""
    delivery.write("", START, END)
    delivery.write("system", text())
    delivery.worker.finish(stream_wait_s=10)
    delivery.work(9)
    assert [("", 1), ("system", 1)] == delivery.names()
    delivery.work(2)
    assert [("", 1), ("system", 1), ("", 2)] == delivery.names()
    delivery.write("system", text())
    report = delivery.work(100)
    assert (3, 0, 0, 1) == counts(report)
    assert 4 == delivery.worker.total()
    delivery.worker.close()
    assert 1 == delivery.new_worker(is_replay=True).missing()
    assert (4, 0, 0, 0) == counts(delivery.work())
    assert ("system", 2) == delivery.names()[-1]
    delivery.close("system")


def test_a_killed_writer_ends_its_stream(delivery: Delivery) -> None:
    """The lock of a killed process is gone; a part of a line that it left is not delivered."""
    delivery.write("", START)
    delivery.write("system", text(), text())
    delivery.close("", "system")
    path = delivery.folder.records(1, 0, "system")
    path.write_bytes(path.read_bytes()[:-7])
    recover(delivery.folder, now=2.0)
    report = delivery.work()
    assert [("", 1), ("system", 1), ("", 2)] == delivery.names()
    assert (3, 0, 0, 0) == counts(report)
    disk = report_on_disk(delivery.spec, delivery.folder, attempt=1, emitted=3, error="gone")
    assert ((3, 0, 0, 0), None) == (counts(disk), disk.error)


def test_the_cursor_of_a_recovered_run_is_at_the_end_of_its_files(delivery: Delivery) -> None:
    """The end that another process wrote is in another file, in which the cursor has no place."""
    delivery.write("", START, text())
    delivery.write("system", text())
    delivery.close("", "system")
    recover(delivery.folder, now=2.0)
    delivery.work()
    delivery.worker.close()
    found = delivery.cursor()
    sizes = [delivery.folder.records(1, 0, name).stat().st_size for name in ("", "system")]
    assert (3, sizes) == (found.seq, [found.offset, found.streams["system-r0"].offset])


def test_each_attempt_has_counts_of_its_own(folder: RunFolder) -> None:
    """A replay of two attempts sends the streams of both, and its counts are of the last one."""
    kept: list[Record] = []
    for attempt in (1, 2):
        main = JournalWriter(folder, attempt)
        main.append(START, 1.0)
        stream = JournalWriter(folder, attempt, stream="system")
        for _ in range(3 * attempt):
            stream.append(text(), 2.0)
        main.append(END, 3.0)
        main.close()
        stream.close()
    spec = SinkSpec(name="new", kind="kept", make=lambda: Kept(kept))
    receipt, _ = replay(folder, [spec])
    found = [(r.attempt, r.stream, r.seq) for r in kept]
    expected = [
        (attempt, *name)
        for attempt in (1, 2)
        for name in [("", 1), *[("system", n + 1) for n in range(3 * attempt)], ("", 2)]
    ]
    assert expected == found
    assert (2, 8, [(8, 0, 0, 0)]) == (
        receipt.attempt,
        receipt.emitted,
        [counts(sink) for sink in receipt.sinks],
    )


def test_a_damaged_line_is_no_pending_record(delivery: Delivery) -> None:
    """A damaged line of a stream is neither emitted nor delivered."""
    delivery.write("", START, END)
    delivery.write("system", text("first"), text("second"), text("third"))
    delivery.close("system")
    path = delivery.folder.records(1, 0, "system")
    path.write_bytes(path.read_bytes().replace(b"second", b"sec0nd"))
    assert (4, 0, 0, 0) == counts(delivery.work())
    assert [("system", 1), ("system", 3)] == delivery.names()[1:-1]


def test_a_rejected_record_of_a_stream_is_a_dead_letter(delivery: Delivery) -> None:
    """It is kept with its stream, and neither repeated nor pending after a restart."""
    delivery.write("", START)
    delivery.write("console", text(), text("poison"), text())
    delivery.work()
    (line,) = delivery.folder.dead(delivery.spec.key).read_bytes().splitlines()
    letter = msgspec.json.decode(line)
    assert ("ValueError: poison", "console", 2) == (
        letter["error"],
        letter["record"]["stream"],
        letter["record"]["seq"],
    )
    delivery.worker.close()
    delivery.new_worker()
    delivery.write("", END)
    delivery.close("console")
    assert (4, 0, 1, 0) == counts(delivery.work())
    assert [("", 1), ("console", 1), ("console", 3), ("", 2)] == delivery.names()


def test_an_upload_of_a_stream_is_repeated_after_a_crash(folder: RunFolder) -> None:
    """An artifact of a stream that was not uploaded comes again, and no record after it does."""
    delivery = Delivery(folder, Uploads)
    delivery.write("", START)
    delivery.write("system", text(), ArtifactLogged(name="a"), text())
    delivery.work()
    delivery.worker.close()
    delivery.worker.release()
    assert [2] == delivery.cursor().streams["system-r0"].uploads
    assert [("", 1), ("system", 1), ("system", 3)] == delivery.names()
    assert 1 == delivery.new_worker(is_replay=True).missing()


def test_transforms_filter_records_of_streams(folder: RunFolder) -> None:
    """A metric of a stream is filtered out and counted like any other."""
    delivery = Delivery(folder)
    transforms = TransformSpec(exclude=["system/*"])
    delivery.spec = msgspec.structs.replace(delivery.spec, transforms=transforms)
    delivery.new_worker()
    delivery.write("", START, END)
    delivery.write("system", MetricsLogged(values={"system/gpu": 1.0}, phase="system"), text())
    delivery.close("system")
    assert (3, 1, 0, 0) == counts(delivery.work())
    assert [("", 1), ("system", 2), ("", 2)] == delivery.names()


def write_run(folder: RunFolder) -> list[Name]:
    """Write a run with streams, and return what it has."""
    delivery = Delivery(folder)
    delivery.write("", START, text())
    delivery.write("console", *[text()] * 20)
    delivery.write("system", *[text()] * 30)
    delivery.write("", text(), END)
    delivery.close("", "console", "system")
    streams = (("", 4), ("console", 20), ("system", 30))
    return [(name, seq) for name, number in streams for seq in range(1, number + 1)]


def test_a_run_with_streams_is_replayed(folder: RunFolder) -> None:
    """A new sink gets all of it once; the plan, the progress and the receipt know how much."""
    expected = write_run(folder)
    kept: list[Record] = []
    spec = SinkSpec(name="new", kind="kept", make=lambda: Kept(kept))
    assert [54] == [found.missing for found in plan(folder, [spec])]
    totals = []
    receipt, _ = replay(folder, [spec], on_progress=lambda p: totals.append((p.done, p.total)))
    names = [(record.stream, record.seq) for record in kept]
    assert (expected, ("", 1), ("", 4)) == (sorted(names), names[0], names[-1])
    assert (54, [(54, 0, 0, 0)]) == (receipt.emitted, [counts(s) for s in receipt.sinks])
    assert (54, 54) == totals[-1]
    assert [0] == [found.missing for found in plan(folder, [spec])]
    again, _ = replay(folder, [spec])
    assert (54, [(54, 0, 0, 0)]) == (again.emitted, [counts(s) for s in again.sinks])
    assert 54 == len(kept)


def test_a_replay_from_a_record_sends_the_streams_whole(folder: RunFolder) -> None:
    """`--from` counts the records of the main stream; the others are sent again."""
    write_run(folder)
    kept: list[Record] = []
    spec = SinkSpec(name="new", kind="kept", make=lambda: Kept(kept))
    receipt, _ = replay(folder, [spec], after=(1, 3))
    assert ["console", "system", ""] == list(dict.fromkeys(record.stream for record in kept))
    assert (51, 54) == (len(kept), receipt.emitted)
    assert [(51, 3, 0, 0)] == [counts(sink) for sink in receipt.sinks]


@pytest.mark.parametrize("isolation", ["thread", "inline"])
def test_the_receipt_counts_all_streams(tmp_path: Path, isolation: str) -> None:
    """The training counts what others wrote when its run ends; nothing is left pending."""
    receipts: list[Receipt] = []
    kept: list[Record] = []
    spec = SinkSpec(name="kept", kind="kept", make=lambda: Kept(kept), isolation=isolation)  # type: ignore[arg-type]
    journal = JournalSpec(dir=str(tmp_path))
    bus = Bus({"kept": spec}, journal=journal, on_receipt=receipts.append)
    with bus:
        emit(bus, START)
        (path,) = tmp_path.iterdir()
        stream = JournalWriter(RunFolder(path), stream="system")
        for _ in range(10):
            stream.append(text(), 1.0)
            emit(bus, text())
        stream.close()
    (receipt,) = receipts
    assert (22, [(22, 0, 0, 0)]) == (receipt.emitted, [counts(s) for s in receipt.sinks])
    assert isinstance(kept[-1].event, RunEnded)
    assert 22 == len(kept)


@pytest.mark.parametrize("isolation", ["thread", "inline"])
def test_an_open_stream_costs_no_end(tmp_path: Path, isolation: str) -> None:
    """A stream that is never closed delays the end of the run, and the sink still gets it."""
    receipts: list[Receipt] = []
    kept: list[Record] = []
    spec = SinkSpec(name="kept", kind="kept", make=lambda: Kept(kept), isolation=isolation)  # type: ignore[arg-type]
    journal = JournalSpec(dir=str(tmp_path))
    bus = Bus({"kept": spec}, journal=journal, flush_secs=1.0, on_receipt=receipts.append)
    emit(bus, START)
    (path,) = tmp_path.iterdir()
    stream = JournalWriter(RunFolder(path), stream="system")
    stream.append(text(), 1.0)
    bus.close()
    (receipt,) = receipts
    assert (3, [(3, 0, 0, 0)]) == (receipt.emitted, [counts(s) for s in receipt.sinks])
    assert [("", 1), ("system", 1), ("", 2)] == [(r.stream, r.seq) for r in kept]
    stream.close()


class Interleavings(RuleBasedStateMachine):
    """Writers, and a worker that may be killed or closed at any time, in any order."""

    @initialize()
    def begin(self) -> None:
        """Start the run."""
        self.root = Path(tempfile.mkdtemp(prefix="trainbus-test-"))
        self.delivery = Delivery(folder_in(self.root))
        self.delivery.write("", START)
        self.written = {"": 1}
        self.has_ended = False
        self.crashes = 0

    def _write(self, stream: str) -> None:
        self.delivery.write(stream, text())
        self.written[stream] = self.written.get(stream, 0) + 1

    @precondition(lambda self: not self.has_ended)
    @rule()
    def write_main(self) -> None:
        """The training logs."""
        self._write("")

    @rule()
    def write_console(self) -> None:
        """A stream logs, which needs not be open."""
        if not self.delivery.worker.done:
            self._write("console")

    @rule()
    def write_system(self) -> None:
        """Another one logs."""
        if not self.delivery.worker.done:
            self._write("system")

    @rule()
    def close_writer(self) -> None:
        """A producer is done; it may begin again."""
        for stream in [name for name in self.delivery.writers if name][:1]:
            self.delivery.close(stream)

    @precondition(lambda self: not self.has_ended)
    @rule()
    def end(self) -> None:
        """The training ends."""
        self.delivery.write("", END)
        self.written[""] += 1
        self.has_ended = True

    @rule()
    def step(self) -> None:
        """The worker takes a step."""
        self.delivery.worker.step()

    @rule()
    def work(self) -> None:
        """The worker does what there is to do, and time passes."""
        self.delivery.work(1.1)

    @rule()
    def restart(self) -> None:
        """The worker's process ends in order, and another one continues."""
        if not self.delivery.worker.done:
            self.delivery.worker.close()
            self.delivery.new_worker()

    @rule()
    def crash(self) -> None:
        """The worker's process is killed."""
        if not self.delivery.worker.done:
            self.delivery.worker.release()
            self.delivery.new_worker()
            self.crashes += 1

    @invariant()
    def in_order(self) -> None:
        """Each stream comes in order, between the start and the end, and once unless it crashed."""
        names = self.delivery.names()
        for stream, number in self.written.items():
            seqs = [seq for name, seq in names if name == stream]
            firsts = list(dict.fromkeys(seqs))
            assert list(range(1, len(firsts) + 1)) == firsts
            assert len(firsts) <= number
            assert self.crashes or len(firsts) == len(seqs)
        assert not names or names[0] == ("", 1)
        ends = [n for n, record in enumerate(self.delivery.kept) if record.event == END]
        assert not ends or [len(names) - 1] == ends

    def teardown(self) -> None:
        """Close everything: then every record was delivered, and the end last."""
        if not hasattr(self, "delivery"):
            return
        if not self.has_ended:
            self.end()
        self.delivery.close(*[name for name in self.delivery.writers if name])
        report = self.delivery.work(1.1)
        self.in_order()
        names = set(self.delivery.names())
        expected = {(s, seq) for s, n in self.written.items() for seq in range(1, n + 1)}
        assert expected == names
        assert self.delivery.worker.done
        assert (len(expected), 0, 0, 0) == counts(report)
        self.delivery.worker.close()
        self.delivery.close("")
        shutil.rmtree(self.root)


def test_any_interleaving_delivers_each_record_once_and_the_end_last() -> None:
    """Whatever is written, read, closed, restarted and killed in whatever order."""
    run_state_machine_as_test(
        Interleavings,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            derandomize=True,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
