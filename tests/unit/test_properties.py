"""For any values and any order of failures: nothing raises, and every record is accounted for."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from support.emitting import emit
from trainbus import Bus, JournalSpec, Record, RunInfo, Sink, SinkSpec
from trainbus.delivery.receipt import SinkReport
from trainbus.delivery.worker import SinkWorker
from trainbus.events import (
    ArtifactLogged,
    CheckpointSaved,
    MetricsLogged,
    ParamsUpdated,
    RunEnded,
    RunStarted,
    TableLogged,
    encode,
)
from trainbus.journal.directory import RunFolder
from trainbus.journal.file_access import FileResolver
from trainbus.journal.writer import JournalWriter
from trainbus.testing.memory import MemorySink


class Broken:
    """An object of which nothing can be asked."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __float__(self) -> float:
        raise RuntimeError("no float")


class Odd:
    """An object that claims to be a number but is not."""

    def item(self) -> Any:
        """Return nothing that could be used."""
        raise ValueError("no item")

    def __repr__(self) -> str:
        return "odd \ud800 \x00 \u2028"


def _recursive(kind: str) -> Any:
    """Return a container that holds itself."""
    if kind == "list":
        items: list[Any] = [1]
        items.append(items)
        return items
    values: dict[str, Any] = {"a": [1]}
    values["a"].append(values)
    return values


TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["\ud800", "a\x00b", "\u2028\u2029", "\x1b[31m", "", "\udfff\ud800", "🙂"]),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 2**70, -(2**70), 10**400]),
    st.binary(max_size=8),
    st.complex_numbers(),
    TEXTS,
    st.sampled_from(
        [np.float32("nan"), np.float16(0.1), np.int64(-5), np.uint8(7), np.bool_(True)]
    ),
    st.sampled_from(
        [np.float64("inf"), np.str_("x\ud800"), np.datetime64("2024-01-01"), np.bytes_()]
    ),
    st.builds(lambda: 2**20000),
    st.builds(Broken),
    st.builds(Odd),
    st.sampled_from(["list", "dict"]).map(_recursive),
    st.sampled_from([np.arange(3), np.array(1.5), np.array([[np.nan]]), np.array([None, "x"])]),
)
KEYS = st.one_of(
    TEXTS, st.integers(), st.none(), st.floats(), st.binary(max_size=4), st.tuples(TEXTS)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(KEYS, inner, max_size=3),
        st.sets(KEYS, max_size=3),
        st.frozensets(KEYS, max_size=3),
    ),
    max_leaves=8,
)
MAPPINGS: Any = st.dictionaries(KEYS, VALUES, max_size=4)


@settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(MAPPINGS, MAPPINGS, MAPPINGS, st.lists(st.lists(VALUES, max_size=3), max_size=3))
def test_any_value_reaches_the_sink_as_subscribers_heard_it(
    tmp_path: Path, params: Any, values: Any, metadata: Any, rows: Any
) -> None:
    """Nothing that is logged raises, is dropped, or differs between subscribers and sinks."""
    sink, heard = MemorySink(), list[Record]()
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        bus = Bus(
            {"memory": sink},
            isolation="inline",
            journal=JournalSpec(dir=folder),
            on_receipt=lambda receipt: None,
        )
        bus.subscribe(heard.append)
        with bus:
            emit(bus, RunStarted(name="any", params=params))
            emit(bus, ParamsUpdated(params=metadata))
            emit(bus, MetricsLogged(values=values, phase="train", epoch=0))
            emit(bus, TableLogged(key="table", columns=["a", "b", "c"], rows=rows))
            emit(bus, CheckpointSaved(path="x.pt", kind="last", metrics=values, metadata=metadata))
            emit(bus, ArtifactLogged(name="a", metadata=metadata))
            emit(bus, RunEnded(status="finished"))
    (receipt,) = bus.receipts
    assert (7, 0, 0) == (receipt.emitted, receipt.dropped, receipt.unsaved)
    assert 7 == len(heard)
    assert [encode(record) for record in heard] == [encode(record) for record in sink.records]


class Store:
    """What a tracker has, and how it feels; it outlives the processes that talk to it."""

    def __init__(self) -> None:
        self.positions: list[tuple[int, int]] = []
        self.mood = "well"


class StoreSink(Sink):
    """Stores each record once, unless the tracker raises."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store

    def open(self, run: RunInfo) -> None:
        """Begin, if there is a network."""
        if self._store.mood == "offline":
            raise ConnectionError("no network")

    def write(self, records: Sequence[Record]) -> None:
        """Store the records that are new; what comes before an error may be stored already."""
        for record in records:
            if self._store.mood == "offline":
                raise ConnectionError("no network")
            if self._store.mood == "refusing":
                raise ValueError("not this one")
            if record.position not in self._store.positions:
                self._store.positions.append(record.position)


def report_is_full(worker: SinkWorker, emitted: int) -> bool:
    """Return whether a worker that went on after the end finds nothing to do."""
    return worker.is_idle() and worker.report(emitted).pending == 0


class Deliveries(RuleBasedStateMachine):
    """A training, a worker that crashes, and a tracker that fails, in any order."""

    @initialize()
    def begin(self) -> None:
        """Start a training and its delivery."""
        self.root = tempfile.mkdtemp(prefix="trainbus-test-")
        self.folder = RunFolder.create([self.root], "run")
        self.store, self.now, self.ended = Store(), 0.0, False
        self.route = SinkSpec(name="store", kind="StoreSink", make=lambda: StoreSink(self.store))
        self.journal = JournalWriter(self.folder)
        self.journal.append(RunStarted(), 0.0)
        self.worker = self.new_worker()

    def new_worker(self) -> SinkWorker:
        """Return a worker of a process that has just begun."""
        return SinkWorker(
            self.route,
            self.folder,
            FileResolver(self.folder, None),
            attempt=1,
            in_background=False,
            clock=lambda: self.now,
        )

    @precondition(lambda self: not self.ended)
    @rule(count=st.integers(1, 20))
    def append(self, count: int) -> None:
        """Let the training continue."""
        for step in range(count):
            values = {"loss": float(step)}
            self.journal.append(MetricsLogged(values=values, phase="train", epoch=step), 1.0)

    @precondition(lambda self: not self.ended)
    @rule()
    def end(self) -> None:
        """End the training."""
        self.journal.append(RunEnded(status="finished"), 2.0)
        self.ended = True

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        """Let the worker work."""
        for _ in range(count):
            self.worker.step()

    @rule(mood=st.sampled_from(["well", "offline", "refusing"]))
    def change(self, mood: str) -> None:
        """Let the tracker fail or recover."""
        self.store.mood = mood

    @rule(secs=st.sampled_from([0.5, 2.0, 70.0]))
    def wait(self, secs: float) -> None:
        """Let time pass."""
        self.now += secs

    @rule()
    def crash(self) -> None:
        """Kill the worker's process, and start another one."""
        self.worker.release()
        self.worker = self.new_worker()

    def check(self, report: SinkReport) -> None:
        """Compare what a worker says with what the journal has."""
        counts = (report.taken, report.skipped, report.dead, report.pending)
        assert self.journal.seq == sum(counts)

    def teardown(self) -> None:
        """Recover, and account for every record."""
        if not hasattr(self, "root"):
            return
        try:
            self.check(self.worker.report(self.journal.seq))
            if not self.ended:
                self.end()
            self.store.mood = "well"
            for _ in range(2000):
                if self.worker.done or report_is_full(self.worker, self.journal.seq):
                    break
                self.now += self.worker.step() + 1.0
            report = self.worker.report(self.journal.seq)
            self.check(report)
            assert 0 == report.pending
            dead = self.dead()
            assert len(dead) <= report.dead or report.dead == len(set(dead))
            seqs = [seq for _, seq in self.store.positions]
            assert sorted(set(seqs)) == seqs
            wanted = set(range(1, self.journal.seq + 1))
            assert wanted == set(seqs) | set(dead)
        finally:
            self.worker.close()
            self.journal.close()
            shutil.rmtree(self.root)

    def dead(self) -> list[int]:
        """Return the numbers of the dead letters."""
        path = self.folder.dead(self.route.key)
        if not path.exists():
            return []
        import msgspec

        letters = path.read_bytes().splitlines()
        return [msgspec.json.decode(letter)["record"]["seq"] for letter in letters]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_order_of_failures_loses_a_record() -> None:
    """Emitted is taken + filtered + dead + pending, and the tracker has each record once."""
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        Deliveries,
        settings=settings(
            max_examples=60,
            stateful_step_count=25,
            derandomize=True,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
