"""Trainings, crashes and moods of a tracker in any order: every record is accounted for."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from support.emitting import emit
from trainbus import Bus, JournalSpec, Record, RunInfo, Sink, SinkSpec
from trainbus.delivery.replay import replay
from trainbus.delivery.transforms import TransformSpec
from trainbus.delivery.worker import SinkWorker
from trainbus.events import (
    CheckpointSaved,
    EpochStarted,
    MetricsLogged,
    Resumed,
    RunEnded,
    RunStarted,
    TextLogged,
)
from trainbus.journal.directory import RunFolder
from trainbus.journal.file_access import FileResolver

Position = tuple[int, int]

ERRORS: dict[str, BaseException] = {
    "offline": ConnectionError("no network"),
    "busy": TimeoutError("too slow"),
    "full": OSError(28, "no space left on device"),
    "locked out": PermissionError("no access"),
    "confused": ValueError("not this one"),
}


class Tracker:
    """What is stored of each run, and the mood it is in; it outlives the workers."""

    def __init__(self) -> None:
        self.stored: dict[str, list[Position]] = {}
        self.mood = "well"
        self.patience = 0
        """Records that it takes before it does as its mood is."""


class TrackerSink(Sink):
    """Stores each record once, as far as the tracker lets it; poison it never takes."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()
        self._tracker = tracker

    def open(self, run: RunInfo) -> None:
        """Begin, unless the tracker can't be reached."""
        if self._tracker.mood in ("offline", "busy", "locked out"):
            raise ERRORS[self._tracker.mood]

    def write(self, records: Sequence[Record]) -> None:
        """Store the records that are new, up to the one that goes wrong."""
        for record in records:
            if self._tracker.mood != "well":
                self._tracker.patience -= 1
                if self._tracker.patience < 0:
                    raise ERRORS[self._tracker.mood]
            if isinstance(record.event, TextLogged):
                raise ValueError("poison")
            known = self._tracker.stored.setdefault(record.run, [])
            if record.position not in known:
                known.append(record.position)


class Delivered:
    """A run, the worker that brings it to the tracker, and what there is to bring."""

    def __init__(self, machine: Deliveries, folder: RunFolder) -> None:
        self._machine = machine
        self.folder = folder
        self.records: list[Record] = []
        self.worker: SinkWorker = self.new_worker()

    def new_worker(self) -> SinkWorker:
        """Return a worker of a process that has just begun."""
        machine = self._machine
        self.worker = SinkWorker(
            machine.route,
            self.folder,
            FileResolver(self.folder, None),
            attempt=self.folder.attempts()[-1],
            is_replay=True,
            in_background=False,
            clock=lambda: machine.now,
        )
        return self.worker

    def crash(self) -> None:
        """Kill the worker's process: nothing is saved or closed, but the system lets go."""
        self.worker.release()

    @property
    def attempt(self) -> int:
        """The attempt that the worker counts."""
        return self.worker.attempt

    def emitted(self) -> int:
        """Return the number of the records of that attempt."""
        return sum(record.attempt == self.attempt for record in self.records)

    def dead(self) -> list[Position]:
        """Return the positions of the dead letters."""
        path = self.folder.dead(self._machine.route.key)
        lines = path.read_bytes().splitlines() if path.exists() else []
        letters = [msgspec.json.decode(line)["record"] for line in lines]
        return [(letter["attempt"], letter["seq"]) for letter in letters]


class Deliveries(RuleBasedStateMachine):
    """A bus that logs run after run, and for each run a worker that may die at any time."""

    @initialize()
    def begin(self) -> None:
        """Start the first training."""
        self.root = Path(tempfile.mkdtemp(prefix="trainbus-test-"))
        self.now = 0.0
        self.tracker = Tracker()
        self.route = SinkSpec(
            name="tracker",
            kind="TrackerSink",
            make=lambda: TrackerSink(self.tracker),
            transforms=TransformSpec(exclude=["hidden/*"]),
        )
        self.runs: dict[str, Delivered] = {}
        self.open = False
        self.bus = Bus(journal=JournalSpec(dir=str(self.root)))
        self.bus.subscribe(self.hear)
        self.start()

    def hear(self, record: Record) -> None:
        """Note a record, and have a worker for its run and attempt."""
        known = self.runs.get(record.run)
        if known is None:
            known = self.runs[record.run] = Delivered(self, RunFolder(self.root / record.run))
        elif known.attempt < record.attempt:
            known.crash()
            known.new_worker()
        known.records.append(record)
        self.open = not isinstance(record.event, RunEnded)

    def emit(self, event: Any) -> None:
        """Log an event."""
        emit(self.bus, event)

    @rule()
    def start(self) -> None:
        """Start a new run, in place of the one that is open."""
        if not hasattr(self, "runs") or len(self.runs) < 3:
            self.emit(RunStarted(name="new"))

    @rule(pick=st.randoms(use_true_random=False))
    def resume(self, pick: Any) -> None:
        """Go on with one of the runs in a further attempt."""
        run = pick.choice(sorted(self.runs))
        if self.runs[run].attempt < 4:
            self.emit(RunStarted(resumed=Resumed(run=run)))

    @precondition(lambda self: self.open)
    @rule(count=st.integers(1, 80))
    def log(self, count: int) -> None:
        """Log metrics."""
        for step in range(count):
            self.emit(MetricsLogged(values={"loss": float(step)}, phase="train", epoch=step))

    @precondition(lambda self: self.open)
    @rule()
    def log_others(self) -> None:
        """Log a few events of other types, one of which is filtered out."""
        self.emit(EpochStarted(epoch=0))
        self.emit(MetricsLogged(values={"hidden/loss": 1.0}, phase="train", step=1))
        self.emit(CheckpointSaved(path="gone.pt", kind="last"))

    @precondition(lambda self: self.open)
    @rule(count=st.integers(1, 3))
    def log_poison(self, count: int) -> None:
        """Log what the tracker never takes."""
        for _ in range(count):
            self.emit(TextLogged(key="poison", text="poison"))

    @precondition(lambda self: self.open)
    @rule()
    def end(self) -> None:
        """End the run that is open."""
        self.emit(RunEnded(status="finished"))

    @rule(count=st.integers(1, 20))
    def work(self, count: int) -> None:
        """Let all workers work."""
        for run in self.runs.values():
            for _ in range(count):
                run.worker.step()

    @rule(mood=st.sampled_from([*ERRORS, "well", "well"]), patience=st.integers(0, 40))
    def change(self, mood: str, patience: int) -> None:
        """Let the tracker fail, now or in the midst of a batch, or recover."""
        self.tracker.mood, self.tracker.patience = mood, patience

    @rule(secs=st.sampled_from([0.2, 2.0, 70.0]))
    def wait(self, secs: float) -> None:
        """Let time pass."""
        self.now += secs

    @rule(is_clean=st.booleans())
    def restart(self, is_clean: bool) -> None:
        """End the workers' processes, by a kill or by themselves, and start others."""
        for run in self.runs.values():
            if is_clean:
                run.worker.close()
            else:
                run.crash()
            run.new_worker()

    @invariant()
    def everything_is_accounted_for(self) -> None:
        """Emitted is taken + filtered + dead + pending, and nothing is stored twice or late."""
        for run in getattr(self, "runs", {}).values():
            emitted = run.emitted()
            report = run.worker.report(emitted)
            counts = (report.taken, report.skipped, report.dead, report.pending)
            assert emitted == sum(counts)
            assert min(counts) >= 0
            stored = self.tracker.stored.get(run.folder.run, [])
            assert sorted(set(stored)) == stored

    def teardown(self) -> None:
        """Let everything recover, and look at what the tracker has."""
        if not hasattr(self, "root"):
            return
        try:
            self.bus.close()
            self.tracker.mood = "well"
            for run in self.runs.values():
                self.finish(run)
                self.look_at(run)
        finally:
            self.bus.close()
            for run in self.runs.values():
                run.worker.close()
            shutil.rmtree(self.root)

    def finish(self, run: Delivered) -> None:
        """Have a run delivered as a replay does, and again where the tracker refused too much."""
        for _ in range(20):
            run.worker.finish()
            for _ in range(3_000):
                if run.worker.done or run.worker.main.stopped:
                    break
                self.now += run.worker.step() + 1.0
                if run.worker.is_complete() and run.worker.is_idle():
                    break
            if not run.worker.main.stopped:
                break
            run.worker.close()
            run.new_worker()

    def look_at(self, run: Delivered) -> None:
        """Compare what was logged of a run with what is stored, filtered and dead."""
        self.everything_is_accounted_for()
        report = run.worker.report(run.emitted())
        assert (0, run.emitted()) == (report.pending, report.taken + report.skipped + report.dead)
        hidden = {
            record.position
            for record in run.records
            if isinstance(record.event, MetricsLogged) and "hidden/loss" in record.event.values
        }
        stored, dead = set(self.tracker.stored.get(run.folder.run, [])), run.dead()
        assert len(dead) == len(set(dead))
        assert {r.position for r in run.records if isinstance(r.event, TextLogged)} <= set(dead)
        assert {record.position for record in run.records} == stored | set(dead) | hidden
        assert set() == stored & hidden


def test_nothing_is_lost_between_trainings_and_a_moody_tracker() -> None:
    """Every record that is not dead is stored once and in order, whatever happens in between."""
    run_state_machine_as_test(
        Deliveries,
        settings=settings(
            max_examples=60,
            stateful_step_count=25,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_what_a_sink_missed_of_an_earlier_attempt_can_be_replayed(tmp_path: Path) -> None:
    """A sink that was offline in a whole attempt gets it later, also if the next one went well."""
    tracker = Tracker()
    heard: list[Position] = []
    folders = set()
    route = SinkSpec(name="tracker", kind="TrackerSink", make=lambda: TrackerSink(tracker))
    for mood in ("locked out", "well"):
        tracker.mood = mood
        bus = Bus(
            {"tracker": route},
            isolation="inline",
            journal=JournalSpec(dir=str(tmp_path)),
            on_receipt=lambda receipt: None,
        )
        bus.subscribe(lambda record: heard.append(record.position))
        with bus:
            emit(bus, RunStarted(resumed=Resumed(run="known")))
            emit(bus, EpochStarted(epoch=0))
            emit(bus, RunEnded(status="finished"))
        folders.add(bus.receipts[0].journal)
    [folder] = folders
    assert folder is not None
    replay(RunFolder(folder), [route])
    assert heard == sorted(tracker.stored["known"])
