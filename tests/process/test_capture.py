"""The environment and the system metrics of a run: who records them, when, and where they go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support import train
from trainbus import Bus, Record
from trainbus.capture.recorder import CaptureRecorder, CaptureSpec
from trainbus.config import loads
from trainbus.events import (
    ConsoleLogged,
    EnvironmentDescribed,
    MetricsLogged,
    RunEnded,
    RunStarted,
    decode,
)
from trainbus.journal.directory import RunFolder
from trainbus.journal.locks import is_being_written
from trainbus.journal.reader import RunReader
from trainbus.journal.writer import JournalWriter
from trainbus.testing import check_grammar

CONFIG = """
isolation: {isolation}
environment: {environment}
system_secs: {secs}
console: {console}
sinks: {{local: {{type: jsonl, path: events.jsonl}}}}
"""
EVERYWHERE = pytest.mark.parametrize("isolation", ["process", "thread", "inline"])


def bus_of(
    isolation: str = "process",
    *,
    environment: bool = False,
    secs: float = 0.0,
    console: str = "off",
) -> Bus:
    """Return a bus that sends to a local file."""
    more = {"environment": str(environment).lower(), "secs": secs, "console": console}
    return loads(CONFIG.format(isolation=isolation, **more))


def records_in(file: Path) -> list[Record]:
    """Return the records that the sink received."""
    return [decode(line) for line in file.read_bytes().splitlines()] if file.exists() else []


def samples_in(records: list[Record]) -> list[Record]:
    """Return the records with system metrics."""
    return [
        record
        for record in records
        if isinstance(record.event, MetricsLogged) and record.event.phase == "system"
    ]


def environments_in(records: list[Record]) -> list[EnvironmentDescribed]:
    """Return the environments that are described."""
    return [record.event for record in records if isinstance(record.event, EnvironmentDescribed)]


def wait_for(condition: Callable[[], bool], secs: float = 120.0) -> None:
    """Wait for a condition, with a deadline."""
    deadline = time.monotonic() + secs
    while not condition():
        assert time.monotonic() < deadline, "deadline"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@EVERYWHERE
def test_the_environment_is_recorded_once(isolation: str, folder: Path) -> None:
    """It is in the stream `system`, between the start and the end, wherever the sinks run."""
    with bus_of(isolation, environment=True) as bus, bus.run() as run:
        run.log({"loss": 1.0})
    records = records_in(folder / "events.jsonl")
    (found,) = environments_in(records)
    assert [*sys.orig_argv][:1] == found.command[:1]
    assert (str(folder), sys.executable) == (found.cwd, found.executable)
    assert {"numpy", "msgspec"} <= found.packages.keys()
    assert ["system-r0"] == [r.source for r in records if isinstance(r.event, EnvironmentDescribed)]
    assert isinstance(records[-1].event, RunEnded)
    assert [] == check_grammar([record for record in records if not record.stream])
    (receipt,) = bus.receipts
    assert (len(records), 0) == (receipt.emitted, receipt.pending)


@EVERYWHERE
def test_the_console_is_recorded(
    isolation: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines are in the stream `console`, in order, before the end; they are still printed."""
    with bus_of(isolation, console="python") as bus, bus.run() as run:
        print("one")
        run.log({"loss": 1.0})
        print("two", file=sys.stderr)
        print("password=hunter2hunter2")
        print("unfinished", end="")
    print("after the run")
    records = records_in(folder / "events.jsonl")
    lines = [record.event for record in records if isinstance(record.event, ConsoleLogged)]
    expected = [("stdout", "one"), ("stderr", "two"), ("stdout", "password=[redacted]")]
    assert [*expected, ("stdout", "unfinished")] == [(line.stream, line.text) for line in lines]
    assert [1, 2, 3, 4] == [line.first_line for line in lines]
    assert isinstance(records[-1].event, RunEnded)
    assert capsys.readouterr().out.startswith("one\npassword=hunter2hunter2\nunfinishedafter the")
    (receipt,) = bus.receipts
    assert (len(records), 0) == (receipt.emitted, receipt.pending)


def test_what_was_printed_before_a_kill_is_there(folder: Path) -> None:
    """Each line is on the disk when `print` returns."""
    script = """
        import os, signal, sys
        from trainbus.config import loads
        with loads(sys.argv[1]) as bus, bus.run():
            for line in range(100):
                print(line)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    (folder / "script.py").write_text(textwrap.dedent(script))
    config = CONFIG.format(isolation="process", environment="false", secs=0, console="python")
    done = subprocess.run(
        [sys.executable, "script.py", config],
        cwd=folder,
        env=train.hermetic(folder),
        capture_output=True,
        timeout=400,
        check=False,
    )
    assert -signal.SIGKILL == done.returncode
    file = folder / "events.jsonl"
    wait_for(lambda: any(isinstance(r.event, RunEnded) for r in records_in(file)))
    lines = [r.event.text for r in records_in(file) if isinstance(r.event, ConsoleLogged)]
    assert [str(line) for line in range(100)] == lines


def test_a_child_that_prints_records_nothing(folder: Path) -> None:
    """What a forked child prints is not mixed with the lines of its parent."""
    with bus_of("thread", console="python") as bus, bus.run():
        child = os.fork()
        if child == 0:
            print("of the child")
            os._exit(0)
        os.waitpid(child, 0)
        print("of the parent")
    records = records_in(folder / "events.jsonl")
    texts = [record.event.text for record in records if isinstance(record.event, ConsoleLogged)]
    assert ["of the parent"] == texts


@pytest.mark.parametrize(
    ("value", "expected"),
    [("python", "python"), ("on", "python"), ("off", "off"), ("'off'", "off"), ("false", "off")],
)
def test_the_console_can_be_switched_off_by_any_word(value: str, expected: str) -> None:
    """YAML reads `off` as false, and `on` as true."""
    bus = loads(f"console: {value}\nsinks: {{a: {{type: jsonl}}}}")
    assert expected == bus.settings.capture.console


@pytest.mark.needs("psutil")
@EVERYWHERE
def test_the_machine_is_sampled_while_the_run_is_open(isolation: str, folder: Path) -> None:
    """Samples arrive during the training, and end with it."""
    file = folder / "events.jsonl"
    with bus_of(isolation, secs=0.05) as bus, bus.run() as run:

        def has_samples() -> bool:
            run.log({"loss": 1.0})  # inline sinks run when an event is emitted
            return len(samples_in(records_in(file))) >= 3

        wait_for(has_samples)
    records = records_in(file)
    samples = samples_in(records)
    assert isinstance(records[-1].event, RunEnded)
    assert [*range(1, len(samples) + 1)] == [record.seq for record in samples]
    names = {name for s in samples if isinstance(s.event, MetricsLogged) for name in s.event.values}
    assert {"system/cpu.percent", "system/process.memory.bytes"} <= names
    (receipt,) = bus.receipts
    assert (len(records), 0) == (receipt.emitted, receipt.pending)
    journal = RunFolder(receipt.journal or "")
    assert not is_being_written(journal.records(1, stream="system"))


def test_a_run_without_sinks_is_captured_too(folder: Path) -> None:
    """The journal has it, for a later replay."""
    with Bus(environment=True, on_receipt=lambda receipt: None) as bus, bus.run():
        pass
    (run,) = (folder / "trainbus-runs").iterdir()
    reader, records = RunReader(RunFolder(run)), []
    while found := reader.read():
        records += [entry.record for entry in found]
    reader.close()
    assert 1 == len(environments_in(records))
    assert isinstance(records[-1].event, RunEnded)


def test_nothing_is_captured_unless_asked(folder: Path) -> None:
    """By default there is no stream beside the training's."""
    with bus_of() as bus, bus.run():
        pass
    assert [] == [record for record in records_in(folder / "events.jsonl") if record.stream]
    assert [] == list((folder / "trainbus-runs").rglob("system-*"))


SCRIPT = """
    import sys, time
    from trainbus.config import loads
    with loads(sys.argv[1]) as bus, bus.run() as run:
        while True:
            run.log({"loss": 1.0})
            time.sleep(0.01)
"""


@pytest.mark.needs("psutil")
def test_a_killed_training_keeps_its_samples(folder: Path) -> None:
    """After a SIGKILL, the delivery process ends the stream and closes the run as failed."""
    file = folder / "events.jsonl"
    (folder / "script.py").write_text(textwrap.dedent(SCRIPT))
    config = CONFIG.format(isolation="process", environment="true", secs=0.05, console="off")
    process = subprocess.Popen(
        [sys.executable, "script.py", config, "--token=hunter2hunter2"],
        cwd=folder,
        env=train.hermetic(folder) | {"TORCHELASTIC_RUN_ID": "job", "RANK": "0"},
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: len(samples_in(records_in(file))) >= 3)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_for(lambda: any(isinstance(r.event, RunEnded) for r in records_in(file)))
    records = records_in(file)
    end = records[-1].event
    assert isinstance(end, RunEnded)
    assert "failed" == end.status
    (found,) = environments_in(records)
    assert "job" == found.scheduler["TORCHELASTIC_RUN_ID"]
    assert "0" == found.scheduler["RANK"]  # the delivery process itself has no rank
    assert (True, False) == ("script.py" in found.command, "hunter2" in repr(found))
    assert str(folder / "script.py") == found.script


def attempt_of(folder: Path) -> RunFolder:
    """Return the directory of a run that has begun."""
    run = RunFolder.create([folder], "run")
    journal = JournalWriter(run)
    journal.append(RunStarted(), 1.0)
    return run


def recorded(run: RunFolder, spec: CaptureSpec) -> CaptureRecorder:
    """Record an attempt until the recorder has ended."""
    task = spec.task()
    assert task is not None
    recorder = CaptureRecorder(task, run, 1, os.getpid())
    recorder.start()
    recorder.stop()
    recorder.join(60)
    return recorder


def lines_of(run: RunFolder) -> int:
    """Return how many records the stream has."""
    return len(run.records(1, stream="system").read_bytes().splitlines())


def test_a_restarted_process_describes_nothing_twice(folder: Path) -> None:
    """The second recorder of an attempt continues the stream of the first one."""
    run = attempt_of(folder)
    for _ in range(2):
        recorded(run, CaptureSpec(environment=True))
    assert 1 == lines_of(run)


def test_only_one_process_records(folder: Path) -> None:
    """While one records, another one of the same attempt does nothing."""
    run = attempt_of(folder)
    writer = JournalWriter(run, stream="system")
    recorded(run, CaptureSpec(environment=True))
    writer.close()
    assert 0 == lines_of(run)


def test_further_names_are_redacted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`journal.redact` holds for the command too."""
    run = attempt_of(folder)
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", "--account=abc"])
    recorded(run, CaptureSpec(environment=True, redact=["account"]))
    assert b"abc" not in run.records(1, stream="system").read_bytes()


def test_a_forked_child_does_not_hold_the_stream(folder: Path) -> None:
    """A loader's worker that outlives the training delays nothing: the run's end is delivered."""
    read, write = os.pipe()
    with bus_of("thread", secs=60.0) as bus, bus.run() as run:
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)  # until the parent has checked
            os._exit(0)
        run.log({"loss": 1.0})
    try:
        assert isinstance(records_in(folder / "events.jsonl")[-1].event, RunEnded)
        (receipt,) = bus.receipts
        assert 0 == receipt.pending
        journal = RunFolder(receipt.journal or "")
        assert not is_being_written(journal.records(1, stream="system"))
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)
