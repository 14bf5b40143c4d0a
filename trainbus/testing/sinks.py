"""The conformance suite for sinks.

class TestCsvSink(SinkConformance):
    def make(self, folder):
        return CsvSink(CsvOptions(path=str(folder / "out.csv")))

    def read(self, folder):
        return (folder / "out.csv").read_text()
"""

# ruff: noqa: SIM300  asserts read `expected == actual`, as in all tests

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar
from unittest import SkipTest

import msgspec
import numpy as np

from trainbus.bus import Bus
from trainbus.delivery.receipt import Receipt
from trainbus.events import MetricsLogged, Record, RunEnded, RunStarted, UnknownEvent, encode
from trainbus.interfaces import Sink
from trainbus.testing import samples
from trainbus.testing.child import run_in_child
from trainbus.testing.grammar import check_grammar
from trainbus.testing.scratch import Scratch

_ODD_SPLITS = (1, 2, 3, 5, 7, 11)


class SinkConformance(ABC):
    """Derive `Test…` from this class, and define how to create the sink and read what it stored.

    Attributes:
        package: import name of the third-party package that the sink needs.
        heavy: modules that must not be imported before `open`, besides `package`.
        extra: extra that installs the package; the error for a missing package names it.
        secrets: strings in the options of `make` that must never be shown.
        stores: event types that change the stored result.
        keeps_unknown: whether the sink stores complete records, including those of a newer schema.
        stores_steps: whether metrics of single steps are stored under their names.
        reopens: whether the sink can detect, after reopening, which records are already stored.
        deadline_s: maximum number of seconds for storing the sample run.
    """

    package: ClassVar[str | None] = None
    heavy: ClassVar[Sequence[str]] = ()
    extra: ClassVar[str | None] = None
    secrets: ClassVar[Sequence[str]] = ()
    stores: ClassVar[Sequence[type[Any]]] = (MetricsLogged,)
    keeps_unknown: ClassVar[bool] = False
    stores_steps: ClassVar[bool] = True
    reopens: ClassVar[bool] = True
    deadline_s: ClassVar[float] = 120.0

    _scratch: ClassVar[Scratch]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._scratch = Scratch()

    @abstractmethod
    def make(self, folder: Path) -> Sink:
        """Return a new sink that stores in `folder`; sinks with one folder share their store."""

    @abstractmethod
    def read(self, folder: Path) -> object:
        """Return what is stored in `folder`, read without the plugin's code, to compare with ==.

        Leave out what varies between identical runs, such as the date of a file.
        """

    def test_accepts_every_event_type(self, tmp_path: Path) -> None:
        """A run with every event type and extreme values is accepted, and something is stored."""
        records = self._records()
        ends = [record for record in records if isinstance(record.event, RunStarted | RunEnded)]
        stored = self._stored(tmp_path / "ends", [ends])
        assert stored != self._whole()

    def test_keeps_what_it_says(self, tmp_path: Path) -> None:
        """Each event type that the sink supports changes what is stored."""
        for kind in self.stores:
            others = [record for record in self._records() if not isinstance(record.event, kind)]
            stored = self._stored(tmp_path / kind.__name__, [others])
            assert stored != self._whole(), f"{kind.__name__} stored nothing"

    def test_is_indifferent_to_batching(self, tmp_path: Path) -> None:
        """The same records in other batches, flushed in between, store the same."""
        records = self._records()
        single = [[record] for record in records]
        assert self._whole() == self._stored(tmp_path / "single", single), "one by one"
        odd = [*_cut(records, _ODD_SPLITS), []]
        assert self._whole() == self._stored(tmp_path / "odd", odd, flush=True), "odd batches"

    def test_ignores_types_from_the_future(self, tmp_path: Path) -> None:
        """Events of a newer schema neither raise nor affect what is stored for the others."""
        records = samples.future_records(tmp_path / "samples")
        known = [record for record in records if not isinstance(record.event, UnknownEvent)]
        without = self._stored(tmp_path / "without", [known])
        stored = self._stored(tmp_path / "with", _cut(records, _ODD_SPLITS))
        if self.keeps_unknown:
            assert without != stored, "expected the unknown events to be stored"
        else:
            assert without == stored

    def test_mutates_nothing(self, tmp_path: Path) -> None:
        """The sink changes neither the records nor the batch."""
        records = self._records()
        batch = list(records)
        before = [encode(record) for record in records]
        self._deliver(tmp_path / "store", [batch])
        assert [id(record) for record in records] == [id(record) for record in batch]
        assert before == [encode(record) for record in records]

    def test_closes_idempotently(self, tmp_path: Path) -> None:
        """`close` can be called unused, twice, or right after `open`; the store stays the same."""
        unused = self.make(_made(tmp_path / "unused"))
        unused.close()
        unused.close()
        opened = self.make(_made(tmp_path / "opened"))
        opened.open(samples.run_info(self._records()))
        opened.close()
        opened.close()
        used = self._deliver(tmp_path / "used", [self._records()])
        used.close()
        stored = self._read(tmp_path / "used")
        assert self._whole() == stored

    def test_opens_in_one_thread_and_writes_in_another(self, tmp_path: Path) -> None:
        """A sink can be opened in one thread, and written to and closed in another."""
        records = self._records()
        sink = self.make(_made(tmp_path / "store"))
        sink.open(samples.run_info(records))

        def deliver() -> None:
            try:
                sink.write(records)
                sink.flush()
            finally:
                sink.close()

        _in_thread(deliver, self.deadline_s)
        stored = self._read(tmp_path / "store")
        assert self._whole() == stored

    def test_takes_a_repeated_record_once(self, tmp_path: Path) -> None:
        """A record that arrives twice, in one batch or in two, is stored once."""
        records = self._records()
        overlapping = [records[start : start + 6] for start in range(0, len(records), 3)]
        stored = self._stored(tmp_path / "overlapping", [*overlapping, records])
        assert self._whole() == stored, "overlapping batches"
        doubled = [record for record in records for _ in range(2)]
        assert self._whole() == self._stored(tmp_path / "doubled", [doubled]), "in one batch"

    def test_takes_a_record_repeated_after_reopening_once(self, tmp_path: Path) -> None:
        """A record that arrives again at a new sink for the same run is stored once."""
        if not self.reopens:
            raise SkipTest("the sink can't detect stored records after reopening")
        records = self._records()
        self._deliver(tmp_path / "store", [records[:-5]])
        self._deliver(tmp_path / "store", [records])
        stored = self._read(tmp_path / "store")
        assert self._whole() == stored

    def test_takes_the_records_of_each_stream_once(self, tmp_path: Path) -> None:
        """Records of several streams, repeated in another order after a crash, are stored once."""
        run, received, again = samples.streams(tmp_path / "samples")
        whole = self._stored(tmp_path / "whole", [run])
        if MetricsLogged in self.stores and self.stores_steps:
            for part in samples.stream_metrics():
                assert part in repr(whole), f"the metric {part!r} of a stream is not stored"
        if not self.reopens:
            assert whole == self._stored(tmp_path / "again", [received, again])
            return
        self._deliver(tmp_path / "again", [received])
        stored = self._stored(tmp_path / "again", [again])
        if whole != stored:  # the sink starts over, so that the order after the crash counts
            assert self._stored(tmp_path / "afresh", [again]) == stored

    def test_resumes_the_same_run(self, tmp_path: Path) -> None:
        """A resumed run continues the stored run of the earlier attempt, and loses none of it."""
        first, second = samples.attempts(tmp_path / "samples")
        begun = self._stored(tmp_path / "first", [first])
        continued = self._stored(tmp_path / "second", [second])
        self._deliver(tmp_path / "both", [first])
        both = self._stored(tmp_path / "both", [second])
        assert begun != both, "nothing of the second attempt is stored"
        assert continued != both, "nothing of the first attempt is left"
        if MetricsLogged in self.stores:
            for part in ("firstpart", "secondpart"):
                assert part in repr(both), f"the metric {part!r} is not stored"

    def test_keeps_nothing_from_the_run_before(self, tmp_path: Path) -> None:
        """A sink that is reopened for another run stores the same as a new sink."""
        first = self._records()
        second = [msgspec.structs.replace(r, run=f"{r.run}-2") for r in self._records()]
        for batch in (first, second):
            self._deliver(tmp_path / "apart", [batch])
        apart = self._read(tmp_path / "apart")
        sink = self.make(_made(tmp_path / "together"))
        for batch in (first, second):
            sink.open(samples.run_info(batch))
            sink.write(batch)
            sink.flush()
            sink.close()
        assert apart == self._read(tmp_path / "together")

    def test_imports_nothing_heavy_until_opened(self, tmp_path: Path) -> None:
        """Importing and constructing the sink imports no module that only `open` needs."""
        sink = self.make(_made(tmp_path / "store"))
        heavy = [*self.heavy, *([self.package] if self.package else [])]
        if not heavy:
            raise SkipTest("the sink lists no heavy module")
        imported = run_in_child(
            "imported_by_construction",
            type(sink),
            {"options": msgspec.to_builtins(sink.options), "heavy": heavy},
            cwd=tmp_path / "child",
        )
        sink.close()
        assert [] == imported

    def test_says_what_to_install(self, tmp_path: Path) -> None:
        """Without its package, `open` raises an error of one line that says what to install."""
        if self.package is None:
            raise SkipTest("the sink needs no package")
        sink = self.make(_made(tmp_path / "store"))
        error = run_in_child(
            "error_without",
            type(sink),
            {"options": msgspec.to_builtins(sink.options), "package": self.package},
            cwd=tmp_path / "child",
        )
        sink.close()
        assert error is not None, f"open raised nothing without {self.package}"
        assert "MissingPackageError" in error["types"], error["text"]
        assert len(error["text"].splitlines()) == 1
        assert "pip install" in error["text"]
        assert self.package in error["text"]
        if self.extra is not None:
            assert f"[{self.extra}]'" in error["text"]

    def test_shows_no_secret(self, tmp_path: Path) -> None:
        """No secret in the options appears in a repr, in `location`, in the log or in output."""
        if not self.secrets:
            raise SkipTest("the sink has no secrets")
        with _shown() as shown:
            sink = self._deliver(tmp_path / "store", [self._records()])
        given = repr(msgspec.to_builtins(sink.options))
        texts = [repr(sink), str(sink), repr(sink.options), str(sink.options), str(sink.location)]
        for secret in self.secrets:
            assert secret in given, "the options of `make` don't contain this secret"
            for text in (*texts, shown.getvalue()):
                assert secret not in text

    def test_works_through_a_bus(self, tmp_path: Path) -> None:
        """A bus delivers two runs, one after the other, and the receipts are correct."""
        heard: list[Record] = []
        receipts: list[Receipt] = []
        sink = self.make(_made(tmp_path / "store"))
        bus = Bus({"sink": sink}, on_receipt=receipts.append)
        bus.subscribe(heard.append)
        with bus:
            emit = bus.emitter()
            for run in ("one", "two"):
                for event in samples.sample_events(tmp_path / run):
                    emit(event)
        assert 2 == len(receipts)
        for receipt in receipts:
            records = [record for record in heard if record.run == receipt.run]
            assert [] == check_grammar(records)
            (report,) = receipt.sinks
            assert report.error is None
            assert (0, 0) == (report.dead, report.pending)
            assert len(records) == receipt.emitted == report.taken + report.skipped

    def _records(self) -> list[Record]:
        # A copy, so that a sink that mutates records fails only one check.
        return copy.deepcopy(self._scratch.once("samples", samples.sample_records))

    def _whole(self) -> object:
        return self._scratch.once("whole", lambda folder: self._stored(folder, [self._records()]))

    def _stored(
        self,
        folder: Path,
        batches: Iterable[Sequence[Record]],
        *,
        flush: bool = False,
    ) -> object:
        self._deliver(folder, batches, flush=flush)
        return self._read(folder)

    def _deliver(
        self,
        folder: Path,
        batches: Iterable[Sequence[Record]],
        *,
        flush: bool = False,
    ) -> Sink:
        sink = self.make(_made(folder))
        cut = list(batches)
        try:
            sink.open(samples.run_info(cut[0]))
            for batch in cut:
                sink.write(batch)
                if flush:
                    sink.flush()
            sink.flush()
        finally:
            sink.close()
        return sink

    def _read(self, folder: Path) -> object:
        return _comparable(self.read(folder))


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _cut(records: Sequence[Record], sizes: Sequence[int]) -> list[Sequence[Record]]:
    batches: list[Sequence[Record]] = []
    start = 0
    while start < len(records):
        size = sizes[len(batches) % len(sizes)]
        batches.append(records[start : start + size])
        start += size
    return batches


def _comparable(value: Any) -> object:
    """Return the value with NaN as a string, because NaN is not equal to itself."""
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else value
    if isinstance(value, dict):
        return {_comparable(key): _comparable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_comparable(item) for item in value]
    if isinstance(value, np.ndarray):
        return _comparable(value.tolist())
    return value


def _in_thread(call: Callable[[], None], deadline_s: float) -> None:
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(deadline_s)
    assert not thread.is_alive(), f"the sink was not done after {deadline_s} s"
    if raised:
        raise raised[0]


@contextlib.contextmanager
def _shown() -> Iterator[io.StringIO]:
    shown = io.StringIO()
    handler = logging.StreamHandler(shown)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            yield shown
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
