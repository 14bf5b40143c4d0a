"""The suites bite: each of these broken plugins is caught by the check that is there for it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import random
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest import SkipTest, mock

import msgspec
import numpy as np
import pytest

from support import tinytrainer
from trainbus import (
    AttachedRun,
    Bus,
    Detach,
    Emit,
    JournalSpec,
    MissingPackageError,
    Options,
    Record,
    RunInfo,
    Sink,
    registry,
)
from trainbus import bus as bus_module
from trainbus.events import (
    CurveLogged,
    EpochEnded,
    EpochStarted,
    Event,
    Failure,
    ImageLogged,
    MetricsLogged,
    RunEnded,
    RunStarted,
    TableLogged,
    UnknownEvent,
    decode,
    encode,
    ended_by,
    event_name,
)
from trainbus.recording.settings import RunSettings
from trainbus.testing import (
    AdapterConformance,
    MemorySink,
    SinkConformance,
    Training,
    check_grammar,
    sample_records,
)
from trainbus.toolkit.adapters import guarded


def checks(suite: type[Any]) -> list[str]:
    return [name for name in dir(suite) if name.startswith("test_")]


class FileOptions(Options, frozen=True, kw_only=True):
    path: str = "out.jsonl"
    token: str = ""


class FileSink(Sink):
    """A healthy sink: appends to a file what it does not find there."""

    Options = FileOptions
    options: FileOptions

    def __repr__(self) -> str:
        return f"FileSink({self.options.path})"

    def open(self, run: RunInfo) -> None:
        self.path = Path(self.options.path)
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        self.known = {(r.run, r.source, r.position) for r in map(decode, lines)}

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            if self.is_new(record) and not isinstance(record.event, UnknownEvent):
                self.append(record)

    def is_new(self, record: Record) -> bool:
        key = (record.run, record.source, record.position)
        return key not in self.known and not self.known.add(key)  # type: ignore[func-returns-value]

    def append(self, record: Record) -> None:
        with self.path.open("ab") as file:
            file.write(encode(record) + b"\n")


class FileSuite(SinkConformance):
    kind: ClassVar[type[FileSink]] = FileSink
    package: ClassVar[str | None] = "wave"
    token: ClassVar[str] = ""

    def make(self, folder: Path) -> Sink:
        return self.kind(FileOptions(path=str(folder / "out.jsonl"), token=self.token))

    def read(self, folder: Path) -> object:
        path = folder / "out.jsonl"
        return path.read_text() if path.exists() else ""


class WaveSink(FileSink):
    """A healthy sink that needs a package, and says so."""

    def open(self, run: RunInfo) -> None:
        try:
            import wave  # noqa: F401
        except ImportError as error:
            raise MissingPackageError("wave", extra="wave") from error
        super().open(run)


class TestHealthySink(FileSuite):
    """A healthy sink passes every check."""

    kind = WaveSink
    extra = "wave"
    secrets = ("hunter2",)
    stores = (MetricsLogged, CurveLogged, TableLogged)

    def make(self, folder: Path) -> Sink:
        return WaveSink(SecretiveOptions(path=str(folder / "out.jsonl"), token="hunter2"))


class SecretiveOptions(FileOptions, frozen=True, kw_only=True):
    def __repr__(self) -> str:
        return f"SecretiveOptions(path={self.path!r})"


class TestMemorySink(SinkConformance):
    """The memory sink passes the checks that a store in memory can pass."""

    reopens = True
    keeps_unknown = True
    sinks: ClassVar[dict[Path, MemorySink]] = {}

    def make(self, folder: Path) -> Sink:
        return self.sinks.setdefault(folder, MemorySink())

    def read(self, folder: Path) -> object:
        return [encode(record) for record in self.sinks[folder].records]


class Mutates(FileSink):
    def write(self, records: Sequence[Record]) -> None:
        super().write(records)
        for record in records:
            if isinstance(record.event, RunStarted):
                record.event.params.pop("lr", None)


class EmptiesTheBatch(FileSink):
    def write(self, records: Sequence[Record]) -> None:
        super().write(records)
        assert isinstance(records, list)
        records.clear()


class ScalesArrays(FileSink):
    def append(self, record: Record) -> None:
        super().append(record)
        if isinstance(record.event, ImageLogged) and record.event.array is not None:
            record.event.array[:] = 0


class LosesOddBatches(FileSink):
    def write(self, records: Sequence[Record]) -> None:
        super().write(records[: len(records) // 2 * 2] if len(records) > 1 else records)


class DropsTheLastBatch(FileSink):
    held: Sequence[Record] = ()

    def write(self, records: Sequence[Record]) -> None:
        super().write(self.held)
        self.held = list(records)


class RaisesOnNan(FileSink):
    def append(self, record: Record) -> None:
        if isinstance(record.event, MetricsLogged):
            [int(value) for value in record.event.values.values()]
        super().append(record)


class RaisesOnUnknown(FileSink):
    def append(self, record: Record) -> None:
        super().append(record)

    def is_new(self, record: Record) -> bool:
        if isinstance(record.event, UnknownEvent):
            raise TypeError("unknown")
        return super().is_new(record)


class TakesUnknownForMetrics(FileSink):
    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            if self.is_new(record):
                self.append(record)


class Forgets(FileSink):
    def append(self, record: Record) -> None:
        if not isinstance(record.event, MetricsLogged):
            super().append(record)


class StoresNothing(FileSink):
    def append(self, record: Record) -> None:
        pass


class Duplicates(FileSink):
    def is_new(self, record: Record) -> bool:
        return True


class ForgetsWhatItHas(FileSink):
    def open(self, run: RunInfo) -> None:
        self.path = Path(self.options.path)
        self.known = set()


class ClosesOnce(FileSink):
    closed = False

    def close(self) -> None:
        if self.closed:
            raise ValueError("closed already")
        self.closed = True


class ClosesOnlyWhatIsOpen(FileSink):
    def close(self) -> None:
        assert self.path is not None


class SticksToItsThread(FileSink):
    def open(self, run: RunInfo) -> None:
        super().open(run)
        self.thread = threading.get_ident()

    def append(self, record: Record) -> None:
        if threading.get_ident() != self.thread:  # as a connection of sqlite3 does
            raise sqlite3.ProgrammingError("opened in another thread")
        super().append(record)


class StartsAfresh(FileSink):
    def open(self, run: RunInfo) -> None:
        Path(self.options.path).unlink(missing_ok=True)
        super().open(run)


class ShowsSecrets(FileSink):
    def __repr__(self) -> str:
        return f"FileSink({self.options})"


class LogsSecrets(FileSink):
    def open(self, run: RunInfo) -> None:
        print(f"logging in with {self.options.token}")
        super().open(run)


class NeedsSilently(FileSink):
    def open(self, run: RunInfo) -> None:
        import wave  # noqa: F401

        super().open(run)


class ServesOneRun(FileSink):
    used = False

    def open(self, run: RunInfo) -> None:
        if self.used:
            raise RuntimeError("one run only")
        self.used = True
        super().open(run)


class CountsOn(FileSink):
    last = (0, 0)

    def is_new(self, record: Record) -> bool:
        is_new = record.position > self.last
        self.last = max(self.last, record.position)
        return is_new


class HasOnePosition(FileSink):
    """Takes what is behind the last record for a repeated one, whatever its stream."""

    def open(self, run: RunInfo) -> None:
        super().open(run)
        self.last = (0, 0)

    def is_new(self, record: Record) -> bool:
        is_new = record.position > self.last and super().is_new(record)
        self.last = max(self.last, record.position)
        return is_new


class NumbersAllStreamsAlike(FileSink):
    """Recognizes a record by its number alone."""

    def is_new(self, record: Record) -> bool:
        return super().is_new(msgspec.structs.replace(record, stream=""))


@pytest.mark.parametrize(
    ("kind", "check", "error"),
    [
        (StoresNothing, "test_accepts_every_event_type", AssertionError),
        (RaisesOnNan, "test_accepts_every_event_type", ValueError),
        (Forgets, "test_keeps_what_it_says", AssertionError),
        (LosesOddBatches, "test_is_indifferent_to_batching", AssertionError),
        (DropsTheLastBatch, "test_is_indifferent_to_batching", AssertionError),
        (RaisesOnUnknown, "test_ignores_types_from_the_future", TypeError),
        (TakesUnknownForMetrics, "test_ignores_types_from_the_future", AssertionError),
        (Mutates, "test_mutates_nothing", AssertionError),
        (EmptiesTheBatch, "test_mutates_nothing", AssertionError),
        (ScalesArrays, "test_mutates_nothing", AssertionError),
        (ClosesOnce, "test_closes_idempotently", ValueError),
        (ClosesOnlyWhatIsOpen, "test_closes_idempotently", AttributeError),
        (SticksToItsThread, "test_opens_in_one_thread_and_writes_in_another", sqlite3.Error),
        (Duplicates, "test_takes_a_repeated_record_once", AssertionError),
        (
            ForgetsWhatItHas,
            "test_takes_a_record_repeated_after_reopening_once",
            AssertionError,
        ),
        (HasOnePosition, "test_takes_the_records_of_each_stream_once", AssertionError),
        (NumbersAllStreamsAlike, "test_takes_the_records_of_each_stream_once", AssertionError),
        (StartsAfresh, "test_resumes_the_same_run", AssertionError),
        (NeedsSilently, "test_says_what_to_install", AssertionError),
        (ShowsSecrets, "test_shows_no_secret", AssertionError),
        (LogsSecrets, "test_shows_no_secret", AssertionError),
        (ServesOneRun, "test_works_through_a_bus", AssertionError),
        (CountsOn, "test_keeps_nothing_from_the_run_before", AssertionError),
    ],
)
def test_broken_sink_is_caught(
    kind: type[FileSink], check: str, error: type[Exception], tmp_path: Path
) -> None:
    """Each broken sink fails the check for what is broken in it."""
    suite = type(
        "Suite", (FileSuite,), {"kind": kind, "token": "hunter2", "secrets": ("hunter2",)}
    )()
    with pytest.raises(error):
        getattr(suite, check)(tmp_path)


def test_sink_that_imports_at_the_top_is_caught(tmp_path: Path) -> None:
    """A module that imports its package at the top fails the check in a process of its own."""
    path = tmp_path / "eager_sink.py"
    path.write_text(
        "import wave\nfrom trainbus import Sink\n"
        "class EagerSink(Sink):\n    def write(self, records): pass\n"
    )
    spec = importlib.util.spec_from_file_location("eager_sink", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict("sys.modules", eager_sink=module):
        spec.loader.exec_module(module)

        class Suite(FileSuite):
            def make(self, folder: Path) -> Sink:
                sink: Sink = module.EagerSink()
                return sink

        with pytest.raises(AssertionError, match="wave"):
            Suite().test_imports_nothing_heavy_until_opened(tmp_path)
        with pytest.raises(AssertionError, match="raised nothing without wave"):
            Suite().test_says_what_to_install(tmp_path)


def test_check_that_does_not_apply_is_skipped(tmp_path: Path) -> None:
    """A sink without secrets or packages skips their checks instead of passing them."""

    class Suite(FileSuite):
        package = None
        reopens = False

    suite = Suite()
    for check in (
        suite.test_shows_no_secret,
        suite.test_says_what_to_install,
        suite.test_imports_nothing_heavy_until_opened,
        suite.test_takes_a_record_repeated_after_reopening_once,
    ):
        with pytest.raises(SkipTest):
            check(tmp_path)


def attach_by(adapter: Callable[[Any, Emit], Detach]) -> Callable[..., AttachedRun]:
    """Return a suite's `attach` for an adapter that no entry point registers."""

    def attach(suite: object, bus: Bus, target: object) -> AttachedRun:
        with mock.patch.object(registry, "adapter_for", return_value=adapter):
            return bus.attach(target)

    return attach


class TinySuite(AdapterConformance):
    adapter: ClassVar[Callable[[Any, Emit], Detach]] = staticmethod(tinytrainer.attach)

    def start(self, folder: Path, epochs: int) -> Training:
        return tinytrainer.setup(folder, epochs)

    def attach(self, bus: Bus, target: Any) -> AttachedRun:
        return attach_by(type(self).adapter)(self, bus, target)

    def trace(self, target: Any) -> object:
        return list(target.callbacks)

    def handles(self, target: Any) -> object:
        return target.callbacks


class TestHealthyAdapter(TinySuite):
    """A healthy adapter passes every check."""


class TellsTheError(tinytrainer.Reporter):
    def on_exception(self, trainer: tinytrainer.Trainer, error: BaseException) -> None:
        self.emit(ended_by(error))


class TestWrappingFramework(TinySuite):
    """A framework that raises its own exception in place of the user's passes with `raises`."""

    adapter = staticmethod(partial(tinytrainer.attach, kind=TellsTheError))

    def start(self, folder: Path, epochs: int) -> Training:
        training = tinytrainer.setup(folder, epochs)

        def run() -> None:
            try:
                training.run()
            except BaseException:
                raise RuntimeError("training failed") from None

        return dataclasses.replace(training, run=run, raises=RuntimeError, resume=None)


def test_the_suite_keeps_its_journals_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever runs it has no folder more than before."""
    monkeypatch.setattr(bus_module, "JournalSpec", JournalSpec)  # not below a folder of this test
    monkeypatch.chdir(tmp_path)

    class Suite(TinySuite):
        """One that nothing was trained for yet."""

    Suite().test_obeys_the_grammar()
    Suite().test_resumes()
    Suite().test_survives_copies_and_pickles()
    assert [] == list(tmp_path.iterdir())


class FinishesAnyway(tinytrainer.Reporter):
    def on_exception(self, trainer: tinytrainer.Trainer, error: BaseException) -> None:
        self.on_fit_end(trainer)


class StopsForEveryError(tinytrainer.Reporter):
    def on_exception(self, trainer: tinytrainer.Trainer, error: BaseException) -> None:
        failure = Failure(type=type(error).__name__, message=str(error))
        self.emit(RunEnded(status="failed", error=failure))


class ChangesTheError(tinytrainer.Reporter):
    def on_exception(self, trainer: tinytrainer.Trainer, error: BaseException) -> None:
        raise RuntimeError("training failed") from error


class EmitsNumpy(tinytrainer.Reporter):
    def on_epoch_end(self, trainer: tinytrainer.Trainer) -> None:
        values: dict[str, Any] = {"train/other": np.float32(0.5)}
        self.emit(MetricsLogged(values=values, phase="train", epoch=trainer.epoch))
        super().on_epoch_end(trainer)


class CountsFromOne(tinytrainer.Reporter):
    def on_epoch_start(self, trainer: tinytrainer.Trainer) -> None:
        self.emit(EpochStarted(epoch=trainer.epoch + 1))

    def on_epoch_end(self, trainer: tinytrainer.Trainer) -> None:
        self.emit(EpochEnded(epoch=trainer.epoch + 1, outcome="completed"))


class InventsAnEpoch(tinytrainer.Reporter):
    """One that nobody trained follows the one in which the training failed."""

    def on_exception(self, trainer: tinytrainer.Trainer, error: BaseException) -> None:
        self.emit(EpochEnded(epoch=trainer.epoch, outcome="retried"))
        self.emit(EpochStarted(epoch=trainer.epoch + 1))
        self.emit(EpochEnded(epoch=trainer.epoch + 1, outcome="completed"))
        self.emit(ended_by(error))


class CompletesWhatFailed(tinytrainer.Reporter):
    """The epoch in which the user's exception came counts as completed."""

    def on_exception(self, trainer: tinytrainer.Trainer, error: BaseException) -> None:
        self.emit(EpochEnded(epoch=trainer.epoch, outcome="completed"))
        self.emit(ended_by(error))


class SkipsWhatWasTrained(tinytrainer.Reporter):
    """An epoch after the first is only completed where it is the last one."""

    def on_epoch_end(self, trainer: tinytrainer.Trainer) -> None:
        if trainer.resumed and trainer.epoch == trainer.first:
            self.emit(EpochEnded(epoch=trainer.epoch, outcome="retried"))
        else:
            super().on_epoch_end(trainer)


class CompletesTwice(tinytrainer.Reporter):
    def on_epoch_end(self, trainer: tinytrainer.Trainer) -> None:
        super().on_epoch_end(trainer)
        self.on_epoch_start(trainer)
        super().on_epoch_end(trainer)


class LeavesEpochsOpen(tinytrainer.Reporter):
    def on_epoch_end(self, trainer: tinytrainer.Trainer) -> None:
        values = {"train/loss": 1.0}
        self.emit(MetricsLogged(values=values, phase="train", epoch=trainer.epoch))


class EmitsEverywhere(tinytrainer.Reporter):
    def on_epoch_start(self, trainer: tinytrainer.Trainer) -> None:
        self.emit(EpochStarted(epoch=trainer.epoch))


class DrawsRandomNumbers(tinytrainer.Reporter):
    def on_epoch_start(self, trainer: tinytrainer.Trainer) -> None:
        random.random()
        super().on_epoch_start(trainer)


class FailsUnseen(tinytrainer.Reporter):
    @guarded
    def on_epoch_start(self, trainer: tinytrainer.Trainer) -> None:
        super().on_epoch_start(trainer)
        raise ValueError("nobody hears it")


class LooksAtTheBus(tinytrainer.Reporter):
    def on_epoch_start(self, trainer: tinytrainer.Trainer) -> None:
        super().on_epoch_start(trainer)
        settings: RunSettings = vars(self.emit)["settings"]
        if settings.sinks:
            raise OSError(f"{len(settings.sinks)} sinks")


class HoldsALock(tinytrainer.Reporter):
    def __init__(self, emit: Emit) -> None:
        super().__init__(emit)
        self.lock = threading.Lock()


class LosesItsEmitter(tinytrainer.Reporter):
    def __reduce__(self) -> tuple[Any, ...]:
        return tinytrainer.Callback, ()


class KeepsTheReason(tinytrainer.Reporter):
    def on_fit_end(self, trainer: tinytrainer.Trainer) -> None:
        self.emit(RunEnded(status="finished"))


class StopsWhenItIsEarly(tinytrainer.Reporter):
    def on_fit_end(self, trainer: tinytrainer.Trainer) -> None:
        self.emit(RunEnded(status="stopped", reason="early stop"))


class StartsAnew(tinytrainer.Reporter):
    def on_fit_start(self, trainer: tinytrainer.Trainer) -> None:
        self.emit(RunStarted(save_dir=str(trainer.folder)))


def stays_attached(trainer: tinytrainer.Trainer, emit: Emit) -> Detach:
    tinytrainer.attach(trainer, emit)
    return lambda: None


def only_mutes(trainer: tinytrainer.Trainer, emit: Emit) -> Detach:
    """Detaching mutes the hooks, and attaching again wakes the old ones beside the new."""
    muted = vars(trainer).setdefault("muted", set())
    muted.clear()

    class Muted(tinytrainer.Reporter):
        def on_epoch_start(self, trainer: tinytrainer.Trainer) -> None:
            if not muted:
                super().on_epoch_start(trainer)

    tinytrainer.attach(trainer, emit, Muted)
    return lambda: muted.add(True)


def keeps_its_trainers(
    trainer: tinytrainer.Trainer,
    emit: Emit,
    kept: list[tinytrainer.Trainer] = [],  # noqa: B006  what is wrong with it
) -> Detach:
    kept.append(trainer)
    return tinytrainer.attach(trainer, emit)


def swallows(trainer: tinytrainer.Trainer, emit: Emit) -> Detach:
    user = trainer.on_batch

    def on_batch(epoch: int) -> None:
        with contextlib.suppress(Exception):
            user(epoch)

    trainer.on_batch = on_batch
    return tinytrainer.attach(trainer, emit)


_shared: list[tinytrainer.Reporter] = []


def hears_every_trainer(trainer: tinytrainer.Trainer, emit: Emit) -> Detach:
    """Hooks of an earlier trainer hear the later ones too."""
    detach = tinytrainer.attach(trainer, emit)
    _shared.append(trainer.callbacks[-1])  # type: ignore[arg-type]
    trainer.callbacks[:] = _shared
    return detach


@pytest.fixture
def _forget() -> Iterator[None]:
    yield
    _shared.clear()


@pytest.mark.usefixtures("_forget")
@pytest.mark.parametrize(
    ("broken", "check", "error"),
    [
        (LeavesEpochsOpen, "test_obeys_the_grammar", AssertionError),
        (FailsUnseen, "test_obeys_the_grammar", AssertionError),
        (CompletesTwice, "test_obeys_the_grammar", AssertionError),
        (CountsFromOne, "test_reports_every_epoch", AssertionError),
        (CountsFromOne, "test_records_what_the_user_logs", AssertionError),
        (CompletesWhatFailed, "test_lets_the_users_exception_through", AssertionError),
        (CompletesWhatFailed, "test_ends_as_stopped_on_ctrl_c", AssertionError),
        (InventsAnEpoch, "test_lets_the_users_exception_through", AssertionError),
        (SkipsWhatWasTrained, "test_resumes", AssertionError),
        (EmitsNumpy, "test_emits_plain_values", AssertionError),
        (DrawsRandomNumbers, "test_leaves_the_result_unchanged", AssertionError),
        (FinishesAnyway, "test_lets_the_users_exception_through", AssertionError),
        (ChangesTheError, "test_lets_the_users_exception_through", AssertionError),
        (swallows, "test_lets_the_users_exception_through", AssertionError),
        (StopsForEveryError, "test_ends_as_stopped_on_ctrl_c", AssertionError),
        (LooksAtTheBus, "test_survives_failing_subscribers_and_sinks", AssertionError),
        (stays_attached, "test_detaches_completely", AssertionError),
        (only_mutes, "test_attaching_again_does_not_double", AssertionError),
        (hears_every_trainer, "test_keeps_two_trainings_apart", AssertionError),
        (keeps_its_trainers, "test_keeps_no_target_alive", AssertionError),
        (HoldsALock, "test_survives_copies_and_pickles", TypeError),
        (LosesItsEmitter, "test_survives_copies_and_pickles", AssertionError),
        (StartsAnew, "test_resumes", AssertionError),
        (KeepsTheReason, "test_ends_as_finished_when_it_stops_early", AssertionError),
        (StopsWhenItIsEarly, "test_ends_as_finished_when_it_stops_early", AssertionError),
    ],
)
def test_broken_adapter_is_caught(broken: Any, check: str, error: type[Exception]) -> None:
    """Each broken adapter fails the check for what is broken in it."""
    adapter = (
        functools.partial(tinytrainer.attach, kind=broken) if isinstance(broken, type) else broken
    )
    suite = type("Suite", (TinySuite,), {"adapter": staticmethod(adapter)})()
    with pytest.raises(error):
        getattr(suite, check)()


def test_epochs_that_nobody_counts_are_no_proof() -> None:
    """A framework with epochs has to say how many were trained."""

    class Suite(TinySuite):
        def start(self, folder: Path, epochs: int) -> Training:
            return dataclasses.replace(super().start(folder, epochs), epochs_trained=None)

    with pytest.raises(AssertionError, match=re.escape("`Training(epochs_trained=…)` is needed")):
        Suite().test_reports_every_epoch()


class StepsSuite(TinySuite):
    """The suite as for a framework that counts no epochs."""

    has_epochs = False


def test_epochs_of_a_framework_that_has_none_are_caught() -> None:
    """An adapter that makes epochs up, or logs no steps, fails the check for what it reports."""
    with pytest.raises(AssertionError):
        StepsSuite().test_reports_every_epoch()


class EverywhereSuite(TinySuite):
    """Stands at module level, where a process of its own finds it."""

    adapter = staticmethod(functools.partial(tinytrainer.attach, kind=EmitsEverywhere))


def test_adapter_that_emits_on_other_ranks_is_caught() -> None:
    """A hook that does not ask for the rank fails the check in a process of that rank."""
    with pytest.raises(AssertionError, match=re.escape("epoch.started")):
        EverywhereSuite().test_is_silent_on_other_ranks()


@pytest.mark.parametrize("suite", [SinkConformance, AdapterConformance])
def test_help_tells_what_a_suite_can_be_told(suite: type[Any]) -> None:
    """What `help` shows of a suite describes each of its attributes."""
    names = [name for name in inspect.get_annotations(suite) if not name.startswith("_")]
    text = inspect.getdoc(suite) or ""
    assert [] == [name for name in names if not re.search(rf"^ +{name}: \w", text, re.MULTILINE)]


def test_every_check_is_proved_to_bite() -> None:
    """No check of the suites is without a broken plugin that it catches."""
    source = Path(__file__).read_text(encoding="utf-8")
    for suite in (SinkConformance, AdapterConformance):
        for check in checks(suite):
            assert f'"{check}"' in source or f"().{check}(" in source, check


def test_checks_have_a_sentence_each() -> None:
    """A check's docstring, one sentence, is what a plugin author reads when it fails."""
    for suite in (SinkConformance, AdapterConformance):
        for check in checks(suite):
            text = getattr(suite, check).__doc__
            assert text is not None
            assert text.endswith("."), check
            assert 1 == len(text.splitlines()), check


def broken_record(records: list[Record], index: int, **changes: Any) -> list[Record]:
    """Return the records with one record, or what it holds, changed."""
    record = records[index]
    where: Any = record if set(changes) <= {"seq", "run"} else record.event
    changed = msgspec.structs.replace(where, **changes)
    new = changed if where is record else msgspec.structs.replace(record, event=changed)
    return [*records[:index], new, *records[index + 1 :]]


def find(records: list[Record], kind: type[Event]) -> int:
    return next(i for i, record in enumerate(records) if isinstance(record.event, kind))


def test_grammar_finds_nothing_in_the_sample_run(tmp_path: Path) -> None:
    """The sample run, nasty as it is, obeys the grammar and has every event type in it."""
    records = sample_records(tmp_path)
    assert [] == check_grammar(records)
    kinds = {event_name(record.event) for record in records}
    assert {event_name(kind) for kind in Event.__args__} == kinds


def test_grammar_names_a_fault_of_the_frame(tmp_path: Path) -> None:
    """What is wrong with the frame of a run is named."""
    records = sample_records(tmp_path)
    assert check_grammar([]) != []
    for broken, fault in [
        (records[1:], "expected run.started first, found params.updated"),
        (records[:-1], "expected run.ended last, found alert.raised"),
        ([*records, records[-1]], "expected one run.ended, found 2"),
        ([records[0], *records], "expected one run.started, found 2"),
        ([*records[:5], *records[6:]], "expected seq 6, found 7 (epoch.started)"),
        (
            broken_record(records, 3, run="other"),
            "expected one run id and one attempt from 1, found",
        ),
    ]:
        assert any(problem.startswith(fault) for problem in check_grammar(broken)), fault


@pytest.mark.parametrize(
    ("kind", "changes", "fault"),
    [
        (EpochStarted, {"epoch": -1}, "expected epoch to be an int from 0, found -1"),
        (EpochStarted, {"epoch": 1.0}, "expected epoch to be an int from 0, found 1.0"),
        (EpochStarted, {"epoch": 7}, "epoch 1 ended while 7 was open"),
        (EpochEnded, {"duration_s": -0.5}, "expected a duration from 0 s"),
        (MetricsLogged, {"values": {"a": 1}}, "expected 'a' to be a float, found int"),
        (MetricsLogged, {"values": {"": 1.0}}, "expected the name of a metric, found ''"),
        (ImageLogged, {"path": None}, "expected either a path or an array"),
        (CurveLogged, {"classes": []}, "expected x (N,) and y (0, 5)"),
        (TableLogged, {"columns": ["a"]}, "expected 1 values per row, found 2"),
        (RunEnded, {"status": "failed"}, "expected an error if and only if the run failed"),
        (RunStarted, {"params": {"a": object()}}, "can't be encoded"),
    ],
)
def test_grammar_names_a_fault_of_a_value(
    kind: type[Event], changes: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    """What is wrong with the values of an event is named."""
    records = sample_records(tmp_path)
    broken = broken_record(records, find(records, kind), **changes)
    assert any(fault in problem for problem in check_grammar(broken)), check_grammar(broken)
