"""Handles on a run: what `bus.attach` and `current_run` return."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import trainbus
from support import tinytrainer
from support.heard import Heard
from trainbus import Record, config, registry
from trainbus.events import (
    EpochEnded,
    EpochStarted,
    ImageLogged,
    MetricsLogged,
    RunEnded,
    RunStarted,
    TableLogged,
)
from trainbus.testing import MemorySink, check_grammar


@pytest.fixture(autouse=True)
def adapter() -> Iterator[None]:
    with mock.patch.object(registry, "adapter_for", return_value=tinytrainer.attach):
        yield


@pytest.fixture
def heard() -> Heard:
    return Heard()


class OwnCallback(tinytrainer.Callback):
    """A callback of the user's own, which logs when an epoch ends."""

    def __init__(self, log: Callable[[tinytrainer.Trainer], object]) -> None:
        self.log = log

    def on_epoch_end(self, trainer: tinytrainer.Trainer) -> None:
        self.log(trainer)


def metrics(heard: Heard) -> dict[str, tuple[float, int | None]]:
    """Return each metric's last value and epoch."""
    return {
        name: (value, event.epoch)
        for event in heard.of(MetricsLogged)
        for name, value in event.values.items()
    }


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "trainbus"]


def test_what_is_logged_joins_the_run_of_the_adapter(heard: Heard, tmp_path: Path) -> None:
    """Values of a user's callback have the epoch in progress, whatever the order of callbacks."""
    trainer = tinytrainer.Trainer(tmp_path, 2)
    with heard.bus as bus:
        trainer.callbacks.append(OwnCallback(lambda _: run.log({"before": 1.0})))
        run = bus.attach(trainer)
        trainer.callbacks.append(OwnCallback(lambda _: run.log({"after": 2.0})))
        trainer.fit()
    assert [] == check_grammar(heard.records)
    assert 1 == len(heard.of(RunStarted))
    found = [
        (name, event.epoch)
        for event in heard.of(MetricsLogged)
        for name in event.values
        if name != "train/loss"
    ]
    assert [
        ("train/before", 0),
        ("train/after", 0),
        ("train/before", 1),
        ("train/after", 1),
    ] == found


def test_images_and_tables_join_the_run_too(heard: Heard, tmp_path: Path) -> None:
    """Everything that a plain loop can log can be logged with a handle."""
    trainer = tinytrainer.Trainer(tmp_path, 1)
    with heard.bus as bus:
        run = bus.attach(trainer)
        image = np.zeros((8, 8), np.uint8)
        trainer.callbacks.append(OwnCallback(lambda _: run.image("picture", image)))
        trainer.callbacks.append(OwnCallback(lambda _: run.table("rows", ["a"], [[1]])))
        trainer.fit()
    assert [0, 0] == [e.epoch for kind in (ImageLogged, TableLogged) for e in heard.of(kind)]


def test_what_is_logged_early_waits_for_the_run(heard: Heard, tmp_path: Path) -> None:
    """Before the training, values are kept; they come right after the start of the run."""
    trainer = tinytrainer.Trainer(tmp_path, 1)
    with heard.bus as bus:
        run = bus.attach(trainer)
        run.log({"samples": 100})
        assert ([], None) == (heard.records, run.id)
        trainer.fit()
    assert ["run.started", "metrics.logged", "epoch.started"] == heard.names[:3]
    assert (100.0, None) == metrics(heard)["train/samples"]


def test_a_value_logged_while_the_run_opens_is_not_lost(
    heard: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread can open the run at any moment of the call."""
    trainer = tinytrainer.Trainer(tmp_path, 1)
    release = threading.Event()
    with heard.bus as bus:
        run = bus.attach(trainer)
        trainer.callbacks.append(OwnCallback(lambda _: release.wait(60)))
        training = threading.Thread(target=trainer.fit, daemon=True)
        getpid, is_open = os.getpid, threading.Event()
        bus.subscribe(lambda record: is_open.set(), EpochStarted)

        def open_meanwhile() -> int:
            if threading.current_thread() is threading.main_thread() and not training.ident:
                training.start()
                assert is_open.wait(60)
            return getpid()

        monkeypatch.setattr(os, "getpid", open_meanwhile)
        run.log({"own": 1.0})
        release.set()
        training.join(60)
        monkeypatch.undo()
    assert "train/own" in metrics(heard)


def test_values_for_a_run_that_never_opens_are_reported(
    heard: Heard, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a training there is no run, and a warning counts what is lost."""
    with heard.bus as bus:
        run = bus.attach(tinytrainer.Trainer(tmp_path, 1))
        run.log({"a": 1.0})
        run.text("note", "b")
    assert [] == heard.records
    assert ["dropped 2 events: their run never opened"] == warnings_of(caplog)


def test_values_wait_in_bounded_memory(
    heard: Heard, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At most a thousand events wait for a run; the first one too many is reported."""
    trainer = tinytrainer.Trainer(tmp_path, 1)
    with heard.bus as bus:
        run = bus.attach(trainer)
        for step in range(1002):
            run.log({"early": 1.0}, step=step)
        trainer.fit()
    early = [e for e in heard.of(MetricsLogged) if "train/early" in e.values]
    assert 1000 == len(early)
    assert ["dropped metrics.logged: too many before the run opens"] == warnings_of(caplog)
    assert [2] == [receipt.dropped for receipt in heard.bus.receipts]


def test_values_after_the_run_are_dropped_and_reported(
    heard: Heard, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A handle never starts a run of its own."""
    trainer = tinytrainer.Trainer(tmp_path, 1)
    with heard.bus as bus:
        run = bus.attach(trainer)
        trainer.fit()
        for _ in range(3):
            run.log({"late": 1.0})
    assert isinstance(heard.records[-1].event, RunEnded)
    assert ["dropped metrics.logged: its run has ended"] == warnings_of(caplog)


def test_values_after_the_final_evaluation_have_no_epoch(heard: Heard) -> None:
    """Ultralytics calls the hook of an epoch once more after it: that is not another epoch."""
    with heard.bus as bus:
        emit = bus.emitter()
        emit(RunStarted())
        emit(EpochStarted(epoch=0))
        emit(EpochEnded(epoch=0, outcome="completed"))
        trainbus.current_run().log({"between": 1.0})
        emit(MetricsLogged(values={"final": 1.0}, phase="validation", final=True))
        trainbus.current_run().log({"afterwards": 1.0})
    found = metrics(heard)
    assert (0, None) == (found["train/between"][1], found["train/afterwards"][1])


def test_an_explicit_epoch_counts(heard: Heard, tmp_path: Path) -> None:
    """`epoch=` of a call takes precedence over the epoch in progress."""
    trainer = tinytrainer.Trainer(tmp_path, 1)
    with heard.bus as bus:
        run = bus.attach(trainer)
        trainer.callbacks.append(OwnCallback(lambda _: run.log({"own": 1.0}, epoch=7)))
        trainer.fit()
    assert (1.0, 7) == metrics(heard)["train/own"]


def test_a_handle_knows_its_run(heard: Heard, tmp_path: Path) -> None:
    """`id` and `name` are those of the open run, and None otherwise."""
    seen: list[tuple[str | None, str | None]] = []
    bus = Heard(trainbus.Bus(defaults=trainbus.RunDefaults(name="mine"), on_receipt=quiet)).bus
    trainer = tinytrainer.Trainer(tmp_path, 1)
    with bus:
        run = bus.attach(trainer)
        trainer.callbacks.append(OwnCallback(lambda _: seen.append((run.id, run.name))))
        assert (None, None) == (run.id, run.name)
        trainer.fit()
    ((run_id, name),) = seen
    assert (bus.receipts[0].run, "mine") == (run_id, name)
    assert (None, None, {}) == (run.id, run.name, run.links)


def quiet(receipt: trainbus.Receipt) -> None:
    """Print nothing."""


class Shown(MemorySink):
    """A sink that shows the run somewhere."""

    @property
    def location(self) -> str | None:
        return "https://tracker.example/run"


class Closed(MemorySink):
    """A sink that can't be opened."""

    def open(self, run: trainbus.RunInfo) -> None:
        raise OSError("no network")


def test_links_name_the_sinks_that_are_open(tmp_path: Path) -> None:
    """A sink that shows the run nowhere, or that can't be opened, has no link."""
    sinks = {"shown": Shown(), "hidden": MemorySink(), "closed": Closed()}
    bus = trainbus.Bus(sinks, isolation="inline", on_receipt=quiet)
    with bus, bus.run() as run:
        assert {"shown": "https://tracker.example/run"} == run.links


def test_attaching_twice_gives_the_same_handle(heard: Heard, tmp_path: Path) -> None:
    """The second call changes nothing, and both handles log to the one run."""
    trainer = tinytrainer.Trainer(tmp_path, 1)
    with heard.bus as bus:
        assert bus.attach(trainer) is bus.attach(trainer)
        trainer.fit()
    assert 1 == heard.names.count("epoch.started")


def test_detach_removes_the_hooks(heard: Heard, tmp_path: Path) -> None:
    """A second call does nothing, and the training is not recorded."""
    trainer = tinytrainer.Trainer(tmp_path, 1)
    with heard.bus as bus:
        run = bus.attach(trainer)
        run.detach()
        run.detach()
        trainer.fit()
    assert ([], []) == (trainer.callbacks, heard.records)


def test_other_ranks_log_nothing(
    heard: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run is that of rank 0; elsewhere the same code drops its values silently."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    trainer = tinytrainer.Trainer(tmp_path, 1)
    with heard.bus as bus:
        run = bus.attach(trainer)
        run.log({"a": 1.0})
        trainer.fit()
    assert ([], []) == (heard.records, warnings_of(caplog))


def test_current_run_finds_the_open_run(heard: Heard, tmp_path: Path) -> None:
    """Code that has neither bus nor handle logs to the run that is open."""
    trainer = tinytrainer.Trainer(tmp_path, 2)
    own = OwnCallback(lambda t: trainbus.current_run().log({"own": float(t.epoch)}))
    trainer.callbacks.append(own)
    with heard.bus as bus:
        bus.attach(trainer)
        trainer.fit()
    found = [
        (e.values["train/own"], e.epoch) for e in heard.of(MetricsLogged) if "train/own" in e.values
    ]
    assert [(0.0, 0), (1.0, 1)] == found


def test_current_run_can_be_asked_for_before_the_run(heard: Heard) -> None:
    """A handle that was made outside of a run logs to the one that is open when it is used."""
    early = trainbus.current_run()
    with heard.bus as bus, bus.run() as run:
        early.log({"a": 1.0})
        assert run.id == early.id
    assert {"train/a": (1.0, None)} == metrics(heard)


def test_outside_of_a_run_values_are_dropped_once_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Code that uses `current_run` works without trainbus; a warning says what is dropped."""
    monkeypatch.setattr("trainbus.recording.current.CurrentEmitter.has_warned", False)
    for _ in range(2):
        run = trainbus.current_run()
        run.log({"a": 1.0, "b": object()})
        run.alert("title")
    assert (None, None, {}) == (run.id, run.name, run.links)
    (line,) = warnings_of(caplog)
    assert line.startswith("dropped metrics.logged: `trainbus.current_run()` was used while no run")


def test_each_thread_finds_its_own_run() -> None:
    """Two trainings in two threads do not mix; a third thread finds the newest."""
    barrier = threading.Barrier(2)
    both, found = [Heard(), Heard()], {}

    def train(index: int) -> None:
        with both[index].bus as bus, bus.run(name=str(index)):
            barrier.wait(60)
            trainbus.current_run().log({"index": float(index)})
            found[index] = trainbus.current_run().name
            barrier.wait(60)

    threads = [threading.Thread(target=train, args=(i,), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {0: "0", 1: "1"} == found
    assert [{"train/index": (0.0, None)}, {"train/index": (1.0, None)}] == [
        metrics(h) for h in both
    ]


def test_the_innermost_run_is_the_current_one(heard: Heard) -> None:
    """When it ends, the run around it is current again."""
    with heard.bus as bus, bus.run(name="outer"):
        with bus.run(name="inner"):
            assert "inner" == trainbus.current_run().name
        assert "outer" == trainbus.current_run().name
    assert trainbus.current_run().name is None


def test_a_forked_child_has_no_current_run(heard: Heard) -> None:
    """Values of a child are not written into the run of its parent."""
    with heard.bus as bus, bus.run():
        child = os.fork()
        if child == 0:
            is_none = trainbus.current_run().id is None
            trainbus.current_run().log({"child": 1.0})
            os._exit(0 if is_none else 1)
        assert 0 == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert {} == metrics(heard)


def test_a_run_can_span_cells(heard: Heard) -> None:
    """`start` and `finish` open and end a run without a `with` statement."""
    with heard.bus as bus:
        run = bus.run(name="cells").start()
        for _ in run.epochs(2):
            run.log({"loss": 1.0})
        run.finish()
        assert isinstance(heard.records[-1].event, RunEnded)
    assert [] == check_grammar(heard.records)
    assert "finished" == heard.of(RunEnded)[0].status


def test_a_run_that_is_never_finished_ends_with_the_bus(heard: Heard) -> None:
    """It counts as finished if nothing raised."""
    with heard.bus as bus:
        bus.run().start().log({"loss": 1.0})
    assert "finished" == heard.of(RunEnded)[0].status


def test_finish_takes_the_error_that_ended_the_training(heard: Heard) -> None:
    """The run of a training that raised is failed, with the error."""
    with heard.bus as bus:
        run = bus.run().start()
        run.finish(ValueError("diverged"))
    assert ("failed", "ValueError: diverged") == (
        heard.of(RunEnded)[0].status,
        heard.of(RunEnded)[0].reason,
    )


def write(folder: Path, run: str) -> Path:
    path = folder / "t.yaml"
    path.write_text(f"isolation: inline\nrun: {run}\nsinks: {{a: {{type: jsonl}}}}\n")
    return path


@pytest.mark.parametrize(
    ("run", "call", "expected"),
    [
        ("{}", {}, ("found", ["t"])),
        ("{name: file}", {}, ("file", ["t"])),
        ("{name: file}", {"name": "call"}, ("call", ["t"])),
        ("{tags: [a]}", {"tags": ["b", "a"]}, ("found", ["a", "b"])),
        ("{}", {"tags": ["b"]}, ("found", ["b"])),
    ],
    ids=["none", "file", "name", "tags", "tags alone"],
)
def test_name_and_tags_can_be_given_at_the_call(
    run: str,
    call: dict[str, Any],
    expected: tuple[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name replaces that of the file and of the trainer; tags come in addition to the file's."""
    records: list[Record] = []
    monkeypatch.chdir(tmp_path)
    bus = config.load(write(tmp_path, run), **call)
    bus.subscribe(records.append)
    with bus, bus.run(name="found", tags=["t"]):
        pass
    started = records[0].event
    assert isinstance(started, RunStarted)
    assert expected == (started.name, started.tags)


def test_name_and_tags_reach_other_processes(tmp_path: Path) -> None:
    """A bus that is made again from the configuration has them too."""
    bus = trainbus.load(write(tmp_path, "{tags: [a]}"), name="n", tags=["b"])
    assert bus.settings.rebuild is not None
    again = bus.settings.rebuild()
    assert bus.settings.defaults == again.settings.defaults
    assert ("n", ["a", "b"]) == (again.settings.defaults.name, again.settings.defaults.tags)


@pytest.fixture(autouse=True)
def warnings_are_heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "trainbus")
