"""The conformance suite for adapters.

    class TestMyFramework(AdapterConformance):
        def start(self, folder, epochs):
            trainer = Trainer(epochs=epochs, seed=0)
            return Training(
                target=trainer,
                run=trainer.fit,
                result=lambda: trainer.weights.tobytes(),
                fail_at=lambda error: trainer.on_batch(raise_in_second_epoch(error)),
                epochs_trained=lambda: len(trainer.losses),
            )

Training with a real framework takes seconds, so checks share trainings where possible.
"""

# ruff: noqa: SIM300  asserts read `expected == actual`, as in all tests

from __future__ import annotations

import copy
import gc
import importlib
import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, ClassVar
from unittest import SkipTest

import numpy as np

from trainbus.bus import Bus, SinkSource
from trainbus.events import (
    EpochEnded,
    EpochStarted,
    Event,
    ImageLogged,
    MetricsLogged,
    Record,
    RunEnded,
    RunStarted,
    TableLogged,
    decode,
    encode,
    event_name,
)
from trainbus.interfaces import RunInfo, Sink
from trainbus.journal.writer import JournalSpec
from trainbus.recording.emitter import Emitter, NullEmitter
from trainbus.run import AttachedRun, current_run
from trainbus.testing.child import run_in_child
from trainbus.testing.grammar import check_grammar
from trainbus.testing.scratch import Scratch

_EPOCHS = 3


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training that is set up but not started.

    Args:
        target: the object that an adapter attaches to.
        run: runs the training.
        result: returns a digest of the result, equal for identical trainings.
        fail_at: makes the user's code in the training, such as a callback or a data loader, raise
            an exception in an epoch after the first.
        epochs_trained: returns the number of completed epochs, counted without the adapter: by the
            framework itself or by a callback. Not needed for a framework without epochs.
        resume: sets up the training that resumes this one after it failed, if supported.
        stop_early: makes the framework's own early stopping end the training before its last
            epoch, if it has one.
        raises: type of the exception that `run` raises in place of the user's, if it differs.
    """

    target: Any
    run: Callable[[], object]
    result: Callable[[], Hashable]
    fail_at: Callable[[BaseException], None]
    epochs_trained: Callable[[], int] | None = None
    resume: Callable[[], Training] | None = None
    stop_early: Callable[[], None] | None = None
    raises: type[BaseException] | None = None


@dataclass(frozen=True, kw_only=True)
class Recording:
    """The events that one training emitted, and how it ended."""

    training: Training
    records: list[Record]
    raw: list[Event]
    raised: BaseException | None
    result: Hashable
    trained: int | None
    """Number of completed epochs, None if unknown."""

    @property
    def ended(self) -> RunEnded:
        """The last event."""
        event = self.records[-1].event if self.records else None
        assert isinstance(event, RunEnded), f"expected run.ended last, found {event!r}"
        return event

    def passes_on(self, error: BaseException) -> bool:
        """Return whether the training raised the user's exception, or the one in its place."""
        wrapped = self.training.raises
        return self.raised is error if wrapped is None else isinstance(self.raised, wrapped)

    def of(self, kind: type[Any]) -> list[Any]:
        """Return the events of one type."""
        return [record.event for record in self.records if isinstance(record.event, kind)]


class AdapterConformance(ABC):
    """Derive `Test…` from this class, and define how to set up a training of the framework.

    Attributes:
        other_rank_env: environment of a process that is not the main one of a distributed training.
        pickles_with: module with which the framework pickles callbacks; some use `cloudpickle`.
        has_epochs: whether the framework counts epochs, or an equivalent.
        knows_its_run: whether a resumed training finds the run that it continues by its save
            directory.
    """

    other_rank_env: ClassVar[Mapping[str, str]] = {"RANK": "1", "LOCAL_RANK": "1"}
    pickles_with: ClassVar[str] = "pickle"
    has_epochs: ClassVar[bool] = True
    knows_its_run: ClassVar[bool] = True

    _scratch: ClassVar[Scratch]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._scratch = Scratch()

    @abstractmethod
    def start(self, folder: Path, epochs: int) -> Training:
        """Set up a training that saves to `folder`, with the same seed each time."""

    def attach(self, bus: Bus, target: Any) -> AttachedRun:
        """Attach as a user does; override this for an adapter without an entry point."""
        return bus.attach(target)

    def trace(self, target: Any) -> object:
        """Return what an adapter may change in `target`, such as callbacks, to compare with ==."""
        return None

    def handles(self, target: Any) -> object:
        """Return the hooks in an attached `target` that the framework pickles or copies."""
        return None

    def test_obeys_the_grammar(self) -> None:
        """Runs of one and of three epochs follow the grammar of runs."""
        for recording in self._one_and_three():
            assert recording.raised is None
            assert [] == check_grammar(recording.records)
            assert "finished" == recording.ended.status

    def test_reports_every_epoch(self) -> None:
        """Epochs 0 to n - 1 start, end as completed, and have metrics of the training phase."""
        for recording, count in zip(self._one_and_three(), (1, _EPOCHS), strict=True):
            if not self.has_epochs:
                logged = recording.of(MetricsLogged)
                assert count <= len({e.step for e in logged if e.phase == "train" and e.values})
                assert [] == recording.of(EpochStarted)
                continue
            expected = list(range(count))
            assert expected == [event.epoch for event in recording.of(EpochStarted)]
            ended = recording.of(EpochEnded)
            assert expected == [event.epoch for event in ended if event.outcome == "completed"]
            self._check_epochs(recording)
            metrics = recording.of(MetricsLogged)
            assert set(expected) <= {e.epoch for e in metrics if e.phase == "train" and e.values}

    def test_emits_plain_values(self) -> None:
        """The adapter emits metrics as floats and counters as ints, and records survive JSON."""
        _, three = self._one_and_three()
        for event in three.raw:
            for name, value in getattr(event, "values", {}).items():
                assert float is type(value), f"{name} of {event_name(event)}"
            for counter in ("epoch", "step"):
                value = getattr(event, counter, None)
                assert value is None or int is type(value), f"{counter} of {event_name(event)}"
        for record in three.records:
            line = encode(record)
            assert line == encode(decode(line))

    def test_leaves_the_result_unchanged(self) -> None:
        """A training has exactly the same result with and without the adapter."""
        _, three = self._one_and_three()
        assert self._plain() == three.result

    def test_lets_the_users_exception_through(self) -> None:
        """The training raises the user's exception unchanged, and the run ends as failed."""
        recording = self._failed()
        assert recording.passes_on(self._error), f"{recording.raised!r} left the training"
        assert [] == check_grammar(recording.records)
        assert "failed" == recording.ended.status
        assert recording.ended.error is not None
        assert "_UserError" == recording.ended.error.type
        self._check_epochs(recording)

    def test_ends_as_stopped_on_ctrl_c(self) -> None:
        """Ctrl-C ends the run as stopped, whether the framework re-raises it or not."""
        error = KeyboardInterrupt()
        training = self.start(self._scratch.folder / "interrupted", _EPOCHS)
        training.fail_at(error)
        recording = self._record(self._bus(), training)
        is_passed_on = recording.raised is None or recording.passes_on(error)
        assert is_passed_on, f"{recording.raised!r} left the training"
        assert [] == check_grammar(recording.records)
        assert "stopped" == recording.ended.status
        self._check_epochs(recording)

    def test_ends_as_finished_when_it_stops_early(self) -> None:
        """Early stopping ends the run as finished, with the reason."""
        training = self.start(self._scratch.folder / "early", _EPOCHS)
        if training.stop_early is None:
            raise SkipTest("the framework has no early stopping")
        training.stop_early()
        recording = self._record(self._bus(), training)
        assert recording.raised is None
        assert [] == check_grammar(recording.records)
        assert "finished" == recording.ended.status
        assert recording.ended.reason is not None
        assert recording.ended.reason.startswith("early stop")
        if self.has_epochs:
            assert 0 < len(recording.of(EpochStarted)) < _EPOCHS
        self._check_epochs(recording)

    def test_survives_failing_subscribers_and_sinks(self) -> None:
        """With a subscriber and sinks that always raise, training has the same result."""
        bus = self._bus({"mute": _NeverOpens, "broken": _AlwaysRaises})
        bus.subscribe(_raise)
        training = self.start(self._scratch.folder / "hurt", _EPOCHS)
        recording = self._record(bus, training)
        assert recording.raised is None
        assert self._plain() == recording.result
        assert [] == check_grammar(recording.records)

    def test_detaches_completely(self) -> None:
        """After `detach`, called twice, the target is as before, and a training emits nothing."""
        bus = self._bus()
        training = self.start(self._scratch.folder / "detached", 1)
        before = self.trace(training.target)
        detach = self.attach(bus, training.target).detach
        detach()
        detach()
        assert before == self.trace(training.target)
        training.run()
        assert [] == bus.raw

    def test_attaching_again_does_not_double(self) -> None:
        """Attached twice, and detached once, the adapter reports everything once."""
        bus = self._bus()
        training = self.start(self._scratch.folder / "twice", 1)
        self.attach(bus, training.target)
        self.attach(bus, training.target).detach()
        recording = self._record(bus, training)
        one, _ = self._one_and_three()
        assert _names(one.records) == _names(recording.records)

    def test_records_what_the_user_logs(self) -> None:
        """Values, an image and a table that the user logs are in the run, in the current epoch."""
        bus = self._bus()
        training = self.start(self._scratch.folder / "own", 1)
        run = self.attach(bus, training.target)
        run.log({"own/early": 1.0})

        def log(record: Record) -> None:
            unsubscribe()
            run.log({"own/handle": 2.0})
            current_run().log({"own/current": 3.0})
            run.image("own/image", np.zeros((8, 8, 3), np.uint8))
            current_run().table("own/table", ["a"], [[1]])

        unsubscribe = bus.subscribe(log, EpochStarted if self.has_epochs else MetricsLogged)
        recording = self._record(bus, training)
        assert [] == check_grammar(recording.records)
        own = {
            name: (value, event.epoch)
            for event in recording.of(MetricsLogged)
            for name, value in event.values.items()
            if name.startswith("own/")
        }
        epoch = 0 if self.has_epochs else None
        expected = {
            "own/early": (1.0, None),
            "own/handle": (2.0, epoch),
            "own/current": (3.0, epoch),
        }
        assert expected == own
        assert [epoch] == [e.epoch for e in recording.of(ImageLogged) if e.key == "own/image"]
        assert [epoch] == [e.epoch for e in recording.of(TableLogged) if e.key == "own/table"]

    def test_keeps_no_target_alive(self) -> None:
        """A target that was attached and has trained is freed with the user's last reference."""
        bus = self._bus()
        training = self.start(self._scratch.folder / "dropped", 1)
        try:
            target = weakref.ref(training.target)
        except TypeError:
            raise SkipTest("the framework's objects can't be referenced weakly") from None
        detach = self.attach(bus, training.target).detach
        training.run()
        del training
        gc.collect()
        assert target() is None
        detach()
        assert [] == bus.open_runs

    def test_keeps_two_trainings_apart(self) -> None:
        """Two trainings, one after the other on one bus, are two runs."""
        one, three = self._one_and_three()
        first, second = ({record.run for record in r.records} for r in (one, three))
        assert 1 == len(first) == len(second)
        assert first != second

    def test_is_silent_on_other_ranks(self) -> None:
        """A process that is not the main one of a distributed training emits nothing."""
        folder = self._scratch.folder / "rank"
        heard = run_in_child(
            "emitted_in",
            type(self),
            {"folder": str(folder)},
            cwd=folder,
            env=self.other_rank_env,
        )
        assert [] == heard

    def test_survives_copies_and_pickles(self) -> None:
        """The hooks in the framework can be copied and pickled, and emit without raising."""
        training = self.start(self._scratch.folder / "handles", 1)
        bus = self._bus()
        detach = self.attach(bus, training.target).detach
        handles = self.handles(training.target)
        if handles is None:
            raise SkipTest("the framework copies no callbacks")
        pickler = importlib.import_module(self.pickles_with)
        copied = list(_emitters(copy.deepcopy(handles)))
        revived = list(_emitters(pickler.loads(pickler.dumps(handles))))
        assert copied, "`handles` returned no Reporter; return None if nothing is copied"
        assert revived, "the unpickled object has no Reporter"
        for emitter in revived:
            emitter(MetricsLogged(values={"train/loss": 1.0}, phase="train"))
            emitter(RunEnded(status="finished"))
        assert [] == bus.raw, "an unpickled Reporter emits to the bus of this process"
        for emitter in copied:
            emitter(MetricsLogged(values={"train/loss": 1.0}, phase="train"))
        assert ["run.started", "metrics.logged"] == [event_name(r.event) for r in bus.records][:2]
        detach()
        bus.close()

    def test_resumes(self) -> None:
        """A resumed training is the same run, reports that, and continues the epoch count."""
        failed = self._failed()
        if failed.training.resume is None:
            raise SkipTest("the framework can't resume a training")
        recording = self._record(self._bus(), failed.training.resume())
        assert recording.raised is None
        assert [] == check_grammar(recording.records)
        (started,) = recording.of(RunStarted)
        assert started.resumed is not None
        if self.knows_its_run:
            assert failed.records[0].run == recording.records[0].run
            assert failed.records[0].attempt + 1 == recording.records[0].attempt
        if not self.has_epochs:
            return
        before = [event.epoch for event in failed.of(EpochStarted)]
        after = [event.epoch for event in recording.of(EpochStarted)]
        assert 0 < after[0] <= before[-1] + 1
        assert list(range(after[0], _EPOCHS)) == after
        self._check_epochs(recording)

    def emitted_in(self, folder: Path) -> list[str]:
        """Return the names of the events of a training in this process; called in a child."""
        bus = self._bus()
        training = self.start(folder / "training", 1)
        with bus:
            self.attach(bus, training.target)
            training.run()
        return [event_name(event) for event in bus.raw]

    def _check_epochs(self, recording: Recording) -> None:
        """The epochs reported as completed are exactly those that were trained."""
        if not self.has_epochs:
            return
        trained = recording.trained
        assert trained is not None, "`Training(epochs_trained=…)` is needed to check the epochs"
        started = [event.epoch for event in recording.of(EpochStarted)]
        ended = recording.of(EpochEnded)
        completed = [event.epoch for event in ended if event.outcome == "completed"]
        first = started[0] if started else 0
        expected = list(range(first, first + trained))
        assert expected == completed, "epochs that are reported as completed"
        # The training may have ended in one more epoch.
        assert expected == started[:trained], "epochs that are reported as started"
        assert trained <= len(started) <= trained + (recording.ended.status != "finished")

    def _bus(self, sinks: Mapping[str, SinkSource] | None = None) -> _ListeningBus:
        return _ListeningBus(sinks, JournalSpec(dir=str(self._scratch.folder / "trainbus-runs")))

    def _plain(self) -> Hashable:
        def train(folder: Path) -> Hashable:
            training = self.start(folder, _EPOCHS)
            training.run()
            return training.result()

        return self._scratch.once("plain", train)

    def _one_and_three(self) -> tuple[Recording, Recording]:
        def train(folder: Path) -> tuple[Recording, Recording]:
            bus = self._bus()
            one = self._record(bus, self.start(folder / "one", 1))
            return one, self._record(bus, self.start(folder / "three", _EPOCHS))

        return self._scratch.once("attached", train)

    def _failed(self) -> Recording:
        def train(folder: Path) -> Recording:
            training = self.start(folder, _EPOCHS)
            training.fail_at(self._error)
            return self._record(self._bus(), training)

        return self._scratch.once("failed", train)

    @property
    def _error(self) -> BaseException:
        return self._scratch.once("error", lambda _: _UserError("raised by the user"))

    def _record(self, bus: _ListeningBus, training: Training) -> Recording:
        heard, emitted = len(bus.records), len(bus.raw)
        raised: BaseException | None = None
        errors = _HookErrors()
        logging.getLogger("trainbus").addHandler(errors)
        try:
            # Not detached afterwards: a second trainer on the bus must not reach the first adapter.
            self.attach(bus, training.target)
            training.run()
        except BaseException as error:
            raised = error
        finally:
            logging.getLogger("trainbus").removeHandler(errors)
        assert [] == errors.lines
        result = training.result() if raised is None else None
        for emitter in list(bus.open_runs):
            emitter.end(raised)
        return Recording(
            training=training,
            records=bus.records[heard:],
            raw=bus.raw[emitted:],
            raised=raised,
            result=result,
            trained=None if training.epochs_trained is None else training.epochs_trained(),
        )


class _UserError(Exception):
    """An exception type that no framework and no adapter knows."""


class _HookErrors(logging.Handler):
    """Keeps the warnings about hooks that raised."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Collect a log line about a hook."""
        if "its events were not recorded" in record.getMessage():
            self.lines.append(record.getMessage())


class _ListeningEmitter(Emitter):
    """Collects events as the adapter emitted them, before their values are normalized."""

    raw: list[Event]

    def __call__(self, event: Event, /) -> None:
        self.raw.append(event)
        super().__call__(event)


class _ListeningBus(Bus):
    """A bus that keeps what adapters hand to it, and what it makes of it."""

    emitter_type = _ListeningEmitter

    def __init__(self, sinks: Mapping[str, SinkSource] | None, journal: JournalSpec) -> None:
        super().__init__(sinks, on_receipt=lambda receipt: None, journal=journal)
        self.raw: list[Event] = []
        self.records: list[Record] = []
        self.subscribe(self.records.append)

    def emitter(self, *, is_main: bool = True) -> Emitter:
        """Return an emitter that keeps what it is given."""
        emitter = super().emitter(is_main=is_main)
        assert isinstance(emitter, _ListeningEmitter)
        emitter.raw = self.raw
        return emitter


class _AlwaysRaises(Sink):
    """A sink that can be opened but not used."""

    def write(self, records: Sequence[Record]) -> None:
        """Raise."""
        raise OSError("the sink is broken")

    def flush(self) -> None:
        """Raise."""
        raise OSError("the sink is broken")

    def close(self) -> None:
        """Raise."""
        raise OSError("the sink is broken")


class _NeverOpens(_AlwaysRaises):
    """A sink that can't be opened."""

    def open(self, run: RunInfo) -> None:
        """Raise."""
        raise OSError("the sink is gone")


def _raise(_: object) -> None:
    raise OSError("the subscriber is broken")


def _names(records: Sequence[Record]) -> list[str]:
    return [event_name(record.event) for record in records]


def _emitters(root: object) -> Iterator[Emitter | NullEmitter]:
    """Yield the emitters that are reachable from an object."""
    seen: set[int] = set()
    todo: list[object] = [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, type | ModuleType):
            continue
        seen.add(id(item))
        if isinstance(item, Emitter | NullEmitter):
            yield item
        elif isinstance(item, FunctionType):  # its globals would reach everything
            todo += [item.__closure__, item.__defaults__, item.__dict__]
        else:
            todo += gc.get_referents(item)
