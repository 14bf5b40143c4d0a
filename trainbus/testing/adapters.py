"""What every adapter must do, as tests.

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

A training of a real framework takes seconds: what several checks look at is trained once.
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

from trainbus.bus import Bus, SinkSource
from trainbus.events import (
    EpochEnded,
    EpochStarted,
    Event,
    MetricsLogged,
    Record,
    RunEnded,
    RunStarted,
    decode,
    encode,
    event_name,
)
from trainbus.interfaces import Detach, RunInfo, Sink
from trainbus.journal.writer import JournalSpec
from trainbus.recording.emitter import Emitter, NullEmitter
from trainbus.testing.child import run_in_child
from trainbus.testing.grammar import check_grammar
from trainbus.testing.scratch import Scratch

_EPOCHS = 3


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training that is set up and not begun.

    Args:
        target: what an adapter attaches to.
        run: trains.
        result: a digest of the outcome, equal for trainings that went the same way.
        fail_at: arranges that an exception is raised inside the user's part of the training, such
            as a callback or a data loader of theirs, in an epoch after the first.
        epochs_trained: how many epochs of this training ran to their end, counted without the
            adapter: by the framework itself or by a callback. Not needed where there are none.
        resume: sets up the training that goes on where this one failed, if the framework can.
        stop_early: arranges that the framework's own early stopping ends the training before its
            last epoch, if it has one.
        raises: what leaves `run` in the place of the user's exception, if that is another one.
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
    """What one training emitted, and how it ended."""

    training: Training
    records: list[Record]
    raw: list[Event]
    raised: BaseException | None
    result: Hashable
    trained: int | None
    """How many epochs ran to their end, None if nobody knows."""

    @property
    def ended(self) -> RunEnded:
        """The last event."""
        event = self.records[-1].event if self.records else None
        assert isinstance(event, RunEnded), f"expected run.ended last, found {event!r}"
        return event

    def passes_on(self, error: BaseException) -> bool:
        """Return whether the user's exception left the training, or what stands for it."""
        wrapped = self.training.raises
        return self.raised is error if wrapped is None else isinstance(self.raised, wrapped)

    def of(self, kind: type[Any]) -> list[Any]:
        """Return the events of one type."""
        return [record.event for record in self.records if isinstance(record.event, kind)]


class AdapterConformance(ABC):
    """Derive `Test…` from this, and say how to set up a training of the framework.

    Attributes:
        other_rank_env: environment of a process that is not the main one of a distributed training.
        pickles_with: module that the framework pickles its callbacks with; some use `cloudpickle`.
        has_epochs: whether the framework counts epochs, or something that stands for them.
        knows_its_run: whether a resumed training finds the run that it continues, by where it
            saves.
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
        """Set up a training that writes into `folder`, with the same seed each time."""

    def attach(self, bus: Bus, target: Any) -> Detach:
        """Attach as a user does; override it for an adapter that no entry point registers."""
        return bus.attach(target)

    def trace(self, target: Any) -> object:
        """Return what an adapter may change of `target`, such as callbacks, to compare with ==."""
        return None

    def handles(self, target: Any) -> object:
        """Return what is hung into an attached `target` and is pickled or copied with it."""
        return None

    def test_obeys_the_grammar(self) -> None:
        """Runs of one and of three epochs start, go on and end as every run must."""
        for recording in self._one_and_three():
            assert recording.raised is None
            assert [] == check_grammar(recording.records)
            assert "finished" == recording.ended.status

    def test_reports_every_epoch(self) -> None:
        """Epochs 0 to n - 1 start, end completed, and have metrics of the training in them."""
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
        """Metrics leave the adapter as floats and counters as ints, and records survive JSON."""
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
        """A training that is listened to ends in exactly what it ends in without."""
        _, three = self._one_and_three()
        assert self._plain() == three.result

    def test_lets_the_users_exception_through(self) -> None:
        """An exception of the user's leaves the training as it is, and the run ends as failed."""
        recording = self._failed()
        assert recording.passes_on(self._error), f"{recording.raised!r} left the training"
        assert [] == check_grammar(recording.records)
        assert "failed" == recording.ended.status
        assert recording.ended.error is not None
        assert "_UserError" == recording.ended.error.type
        self._check_epochs(recording)

    def test_ends_as_stopped_on_ctrl_c(self) -> None:
        """Ctrl-C ends the run as stopped, whether the framework passes it on or not."""
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
        """A training that its own early stopping ends went well, and says why it ended."""
        training = self.start(self._scratch.folder / "early", _EPOCHS)
        if training.stop_early is None:
            raise SkipTest("the framework stops no training early")
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
        """With a subscriber and sinks that always raise, training ends as it does without."""
        bus = self._bus({"mute": _NeverOpens, "broken": _AlwaysRaises})
        bus.subscribe(_raise)
        training = self.start(self._scratch.folder / "hurt", _EPOCHS)
        recording = self._record(bus, training)
        assert recording.raised is None
        assert self._plain() == recording.result
        assert [] == check_grammar(recording.records)

    def test_detaches_completely(self) -> None:
        """After `detach`, called twice, the target is as it was, and a training emits nothing."""
        bus = self._bus()
        training = self.start(self._scratch.folder / "detached", 1)
        before = self.trace(training.target)
        detach = self.attach(bus, training.target)
        detach()
        detach()
        assert before == self.trace(training.target)
        training.run()
        assert [] == bus.raw

    def test_attaching_again_does_not_double(self) -> None:
        """Attached twice, and once more after a detach, the adapter reports everything once."""
        bus = self._bus()
        training = self.start(self._scratch.folder / "twice", 1)
        self.attach(bus, training.target)
        self.attach(bus, training.target)()
        recording = self._record(bus, training)
        one, _ = self._one_and_three()
        assert _names(one.records) == _names(recording.records)

    def test_keeps_no_target_alive(self) -> None:
        """A target that was attached, and has trained, is freed with its last user's reference."""
        bus = self._bus()
        training = self.start(self._scratch.folder / "dropped", 1)
        try:
            target = weakref.ref(training.target)
        except TypeError:
            raise SkipTest("the framework's objects can't be referenced weakly") from None
        detach = self.attach(bus, training.target)
        training.run()
        del training
        gc.collect()
        assert target() is None
        detach()
        assert [] == bus.open_runs

    def test_keeps_two_trainings_apart(self) -> None:
        """Two trainings, one after another on one bus, are two runs."""
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
        """What is hung into the framework can be copied and pickled, and emits without raising."""
        training = self.start(self._scratch.folder / "handles", 1)
        bus = self._bus()
        detach = self.attach(bus, training.target)
        handles = self.handles(training.target)
        if handles is None:
            raise SkipTest("the framework copies no callbacks")
        pickler = importlib.import_module(self.pickles_with)
        copied = list(_emitters(copy.deepcopy(handles)))
        revived = list(_emitters(pickler.loads(pickler.dumps(handles))))
        assert copied, "`handles` returned what holds no Reporter; None says that nothing is copied"
        assert revived, "what was pickled holds no Reporter when it is loaded"
        for emitter in revived:
            emitter(MetricsLogged(values={"train/loss": 1.0}, phase="train"))
            emitter(RunEnded(status="finished"))
        assert [] == bus.raw, "what was unpickled emits into the bus of this process"
        for emitter in copied:
            emitter(MetricsLogged(values={"train/loss": 1.0}, phase="train"))
        assert ["run.started", "metrics.logged"] == [event_name(r.event) for r in bus.records][:2]
        detach()
        bus.close()

    def test_resumes(self) -> None:
        """A resumed training is the same run, says so, and goes on with its epochs."""
        failed = self._failed()
        if failed.training.resume is None:
            raise SkipTest("the framework resumes no training")
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
        """Every epoch that is reported as completed was trained, and each that was is reported."""
        if not self.has_epochs:
            return
        trained = recording.trained
        assert trained is not None, "`Training(epochs_trained=…)` is needed to prove the epochs"
        started = [event.epoch for event in recording.of(EpochStarted)]
        ended = recording.of(EpochEnded)
        completed = [event.epoch for event in ended if event.outcome == "completed"]
        first = started[0] if started else 0
        expected = list(range(first, first + trained))
        assert expected == completed, "epochs that are reported as completed"
        # One more may have begun, in which the training ended.
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
        said = _Said()
        logging.getLogger("trainbus").addHandler(said)
        try:
            # Not detached afterwards: a second trainer on the bus must not be heard by the first.
            self.attach(bus, training.target)
            training.run()
        except BaseException as error:
            raised = error
        finally:
            logging.getLogger("trainbus").removeHandler(said)
        assert [] == said.faults
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
    """What no framework and no adapter knows."""


class _Said(logging.Handler):
    """Keeps the warnings about hooks that raised."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line of the log."""
        if "its events were not recorded" in record.getMessage():
            self.faults.append(record.getMessage())


class _ListeningEmitter(Emitter):
    """Keeps events as the adapter made them, before the bus turns their values into plain ones."""

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
    """A sink that can be opened and nothing else."""

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
    """A sink that can't even be opened."""

    def open(self, run: RunInfo) -> None:
        """Raise."""
        raise OSError("the sink is gone")


def _raise(_: object) -> None:
    raise OSError("the subscriber is broken")


def _names(records: Sequence[Record]) -> list[str]:
    return [event_name(record.event) for record in records]


def _emitters(root: object) -> Iterator[Emitter | NullEmitter]:
    """Yield the emitters that an object holds, however deep."""
    seen: set[int] = set()
    todo: list[object] = [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, type | ModuleType):
            continue
        seen.add(id(item))
        if isinstance(item, Emitter | NullEmitter):
            yield item
        elif isinstance(item, FunctionType):  # its globals would lead everywhere
            todo += [item.__closure__, item.__defaults__, item.__dict__]
        else:
            todo += gc.get_referents(item)
