"""However a process ends: one run.ended, and everybody else's handlers and exit codes stay."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.journals import read_run
from support.signals import SignalAt
from trainbus import Bus, JournalSpec
from trainbus.events import MetricsLogged, RunEnded, RunStarted
from trainbus.journal import verify
from trainbus.journal.directory import RunFolder
from trainbus.journal.reader import RunReader
from trainbus.journal.recovery import recover
from trainbus.testing import MemorySink, check_grammar
from trainbus.toolkit.adapters import Reporter

START = """
import atexit, os, signal, sys, threading, time
import trainbus

bus = trainbus.load("config.yaml")
run = bus.run(name="exits")
run.log({"loss": 1.0}, step=1)
"""


def ended(
    folder: Path, source: str, *, isolation: str = "auto", head: str = START
) -> tuple[subprocess.CompletedProcess[str], list[Any]]:
    """Run a program that ends in some way; return its process and the events of its only run."""
    (folder / "config.yaml").write_text(
        f"isolation: {isolation}\nsinks: {{kept: {{type: jsonl, path: kept.jsonl}}}}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(source)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    (path,) = (folder / "trainbus-runs").iterdir()
    run = RunFolder(path)
    deadline = time.monotonic() + 240
    while not run.receipt.exists() and time.monotonic() < deadline and isolation != "thread":
        time.sleep(0.05)
    if isolation == "thread":
        recover(run, now=time.time())
    records, reader = [], RunReader(run)
    while entries := reader.read():
        records += [entry.record for entry in entries]
    reader.close()
    assert [] == check_grammar(records)
    return done, [record.event for record in records]


@pytest.mark.parametrize("isolation", ["auto", "thread"])
@pytest.mark.parametrize(
    ("source", "code", "status", "reason"),
    [
        ("run.__exit__(None, None, None)", 0, "finished", None),
        ("", 0, "finished", None),
        ("raise ValueError('mine')", 1, "failed", "ValueError: mine"),
        ("raise KeyboardInterrupt", -2, "stopped", "KeyboardInterrupt"),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", -15, "stopped", "SIGTERM"),
        ("os._exit(7)", 7, "failed", "the training process was killed"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9, "failed", "the training process was killed"),
        ("os.abort()", -6, "failed", "the training process was killed"),
    ],
    ids=["with", "end", "exception", "ctrl-c", "sigterm", "_exit", "sigkill", "abort"],
)
def test_a_run_has_one_end_whatever_ends_the_process(
    source: str, code: int, status: str, reason: str | None, isolation: str, tmp_path: Path
) -> None:
    """The journal is complete, the end says how it was, and the exit code is what it would be."""
    done, events = ended(tmp_path, source, isolation=isolation)
    assert code == done.returncode, done.stderr
    end = events[-1]
    assert isinstance(end, RunEnded)
    assert status == end.status
    assert (end.reason or "").startswith(reason or "")
    assert "mine" not in source or "ValueError: mine" in done.stderr
    if isolation == "auto":
        lines = (tmp_path / "kept.jsonl").read_text().splitlines()
        assert len(events) == len(lines)
    else:
        (path,) = (tmp_path / "trainbus-runs").iterdir()
        assert all(finding.is_sound for finding in verify.verify(RunFolder(path)))


def test_sys_exit_in_a_with_block_is_a_stop(tmp_path: Path) -> None:
    """The exit code stays, and the run is stopped."""
    source = 'with trainbus.load("config.yaml") as bus, bus.run() as run:\n    sys.exit(3)'
    done, events = ended(tmp_path, source, head="import sys, trainbus\n")
    assert 3 == done.returncode
    assert "stopped" == events[-1].status


def test_an_exception_that_is_only_shown_ends_nothing(tmp_path: Path) -> None:
    """A program that calls `sys.excepthook` and continues, as C extensions do, keeps its run."""
    source = """
    try:
        1 / 0
    except ZeroDivisionError:
        sys.excepthook(*sys.exc_info())
    run.log({"loss": 2.0}, step=2)
    run.__exit__(None, None, None)
    """
    done, events = ended(tmp_path, source)
    assert (0, 1) == (done.returncode, done.stderr.count("ZeroDivisionError: "))
    assert 2 == sum(type(event) is MetricsLogged for event in events)
    assert "finished" == events[-1].status


def test_a_hook_that_calls_ours_is_heard(tmp_path: Path) -> None:
    """The run fails of an exception that ends a module that is run, too, behind another's hook."""
    (tmp_path / "program.py").write_text(
        textwrap.dedent(START)
        + textwrap.dedent(
            """
            found = sys.excepthook
            sys.excepthook = lambda *about: found(*about)
            1 / 0
            """
        )
    )
    done, events = ended(tmp_path, "", head="import runpy; runpy.run_module('program')")
    assert 1 == done.returncode
    assert ("failed", "ZeroDivisionError") == (events[-1].status, events[-1].error.type)


def test_handlers_of_others_stay(tmp_path: Path) -> None:
    """Hooks that were there before are called and are back afterwards; a SIGTERM handler stays."""
    head = """
    import signal, sys, threading
    before = (sys.excepthook, threading.excepthook, signal.getsignal(signal.SIGTERM))
    """
    source = """
    assert sys.excepthook is not before[0]
    run.__exit__(None, None, None)
    after = (sys.excepthook, threading.excepthook, signal.getsignal(signal.SIGTERM))
    assert before == after

    mine = lambda *_: print("mine")
    signal.signal(signal.SIGTERM, mine)
    sys.excepthook = lambda *_: print("hook")
    with bus.run() as second:
        assert signal.getsignal(signal.SIGTERM) is mine
        os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    """
    (tmp_path / "config.yaml").write_text("sinks: {kept: {type: jsonl, path: kept.jsonl}}\n")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(head) + START + textwrap.dedent(source)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    assert "mine\n" == done.stdout


def test_a_handler_that_calls_ours_decides(tmp_path: Path) -> None:
    """A framework that handles SIGTERM also calls what it found: that does not end the process."""
    source = """
    import signal, threading
    found = signal.getsignal(signal.SIGTERM)
    def handle(number, frame):
        found(number, frame)
        print("handled")
    signal.signal(signal.SIGTERM, handle)
    os.kill(os.getpid(), signal.SIGTERM)
    run.log({"loss": 2.0}, step=2)
    run.__exit__(None, None, None)
    """
    done, events = ended(tmp_path, source)
    assert (0, "handled\n") == (done.returncode, done.stdout), done.stderr
    assert "finished" == events[-1].status
    assert 2 == sum(type(event) is MetricsLogged for event in events)


def test_another_rank_keeps_its_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without the run reports the error that ends it; a signal has none to report."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = sys.excepthook, signal.getsignal(signal.SIGTERM)
    with Bus() as bus:
        bus.run()
        assert before[0] is not sys.excepthook
        assert before[1] is signal.getsignal(signal.SIGTERM)
    assert before == (sys.excepthook, signal.getsignal(signal.SIGTERM))


def test_sigterm_in_the_midst_of_an_emit(tmp_path: Path) -> None:
    """A signal that comes inside `emit` ends the run after the record that is being written."""
    source = """
    bus.subscribe(lambda record: os.kill(os.getpid(), signal.SIGTERM) if record.seq == 3 else None)
    run.log({"loss": 2.0}, step=2)
    print("not reached")
    """
    done, events = ended(tmp_path, source)
    assert (-15, "") == (done.returncode, done.stdout)
    assert ("stopped", "SIGTERM") == (events[-1].status, events[-1].reason)
    assert 4 == len(events)


def test_a_thread_that_dies_with_its_run(tmp_path: Path) -> None:
    """An exception ends the run of the thread that it kills, not those of others."""
    source = """
    def train():
        with_thread = bus.run(name="thread")
        with_thread.log({"loss": 1.0})
        raise ValueError("mine")
    thread = threading.Thread(target=train)
    thread.start(); thread.join()
    print([(r.run[:5], r.status) for r in bus.receipts])
    run.__exit__(None, None, None)
    """
    (tmp_path / "config.yaml").write_text("sinks: {kept: {type: jsonl, path: kept.jsonl}}\n")
    done = subprocess.run(
        [sys.executable, "-c", START + textwrap.dedent(source)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    assert "[('threa', 'failed')]" == done.stdout.strip()


LOADER = """
import json, sys
import torch, trainbus
from torch.utils.data import DataLoader, Dataset

class Emitting(Dataset):
    def __init__(self, run):
        self.run = run
    def __len__(self):
        return 32
    def __getitem__(self, index):
        self.run.log({"child": float(index)}, step=index)
        return torch.tensor(index)

if __name__ == "__main__":
    with trainbus.load("config.yaml") as bus, bus.run(name="loader") as run:
        for epoch in run.epochs(2):
            loader = DataLoader(
                Emitting(run), num_workers=2, batch_size=4, multiprocessing_context=sys.argv[1]
            )
            total = sum(int(batch.sum()) for batch in loader)
            run.log({"total": total})
    print(total)
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.needs("torch")
def test_workers_of_a_data_loader_neither_hang_nor_write(method: str, tmp_path: Path) -> None:
    """What workers emit is left out, in the parent's journal as in one of their own."""
    (tmp_path / "config.yaml").write_text("sinks: {kept: {type: jsonl, path: kept.jsonl}}\n")
    (tmp_path / "script.py").write_text(LOADER)
    done = subprocess.run(
        [sys.executable, "script.py", method],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    assert str(sum(range(32))) == done.stdout.strip()
    assert 1 == len(list((tmp_path / "trainbus-runs").iterdir()))
    records = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert list(range(1, 9)) == [record["seq"] for record in records]


FORKS = """
stop = threading.Event()
def emit():
    while not stop.is_set():
        run.log({"loss": 1.0}, step=1)
threads = [threading.Thread(target=emit) for _ in range(2)]
for thread in threads:
    thread.start()
for number in range(100):
    pid = os.fork()
    if pid == 0:
        run.log({"child": 1.0}, step=1)
        os._exit(0)
    assert (pid, 0) == os.waitpid(pid, 0)
stop.set()
for thread in threads:
    thread.join()
run.__exit__(None, None, None)
"""


def test_forks_while_others_emit(tmp_path: Path) -> None:
    """A child that is forked while another thread is inside `emit` neither blocks nor writes."""
    done, events = ended(tmp_path, FORKS)
    assert 0 == done.returncode, done.stderr
    assert not any("train/child" in getattr(event, "values", {}) for event in events)


def test_a_forked_child_leaves_the_run_to_its_parent(tmp_path: Path) -> None:
    """A child that ends normally, with its `atexit`, ends nothing of its parent's."""
    source = """
    pid = os.fork()
    if pid == 0:
        sys.exit(0)
    os.waitpid(pid, 0)
    run.log({"loss": 2.0}, step=2)
    run.__exit__(None, None, None)
    """
    done, events = ended(tmp_path, source)
    assert 0 == done.returncode, done.stderr
    assert ("finished", 4) == (events[-1].status, len(events))


@pytest.mark.parametrize("is_watched", [True, False], ids=["watched", "told"])
def test_a_handler_that_raises_leaves_the_failure_its_end(is_watched: bool, tmp_path: Path) -> None:
    """Whichever line a signal comes at, whose handler raises, the run that failed ends as failed.

    Torch ends the other processes of a training by SIGTERM when one has failed, and Lightning's
    handler then talks to those that are gone.
    """
    ends = []
    for at in itertools.count(1 if is_watched else 2):  # the first is the `try` of `Reporter.fail`
        folder = tmp_path / str(at)
        signalled = SignalAt(at, f"{os.sep}trainbus{os.sep}")
        sinks = {"kept": MemorySink()} if is_watched else {}
        with Bus(sinks, isolation="thread", journal=JournalSpec(dir=str(folder))) as bus:
            report = Reporter(bus.emitter())
            with signalled.ready() as begin, pytest.raises(ValueError, match="mine"):
                fail(report, is_watched, begin)
        (path,) = folder.glob("run_*")
        found = [record.event for record in read_run(RunReader(RunFolder(path)))]
        if not signalled.came_at:
            break
        ends.append([e.reason for e in found if isinstance(e, RunEnded)])
    assert 100 < len(ends)
    assert [["ValueError: mine"]] * len(ends) == ends


def fail(report: Reporter, is_watched: bool, begin: Callable[[], None]) -> None:
    """Have a training fail, which a framework's entry call is watched for, or a hook hears of."""

    def train() -> None:
        report.start(RunStarted())
        if is_watched:
            begin()
        raise ValueError("mine")

    if is_watched:
        report.watch()(train)
    try:
        train()
    except ValueError as error:
        begin()
        report.fail(error)
        raise


THREADS = """
def emit(number):
    for step in range(2_000):
        run.log({"n": float(number), "i": float(step)}, step=step)
threads = [threading.Thread(target=emit, args=(n,)) for n in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
run.__exit__(None, None, None)
"""


def test_sixteen_threads_at_once(tmp_path: Path) -> None:
    """Every record of every thread is there once, each thread's in its order."""
    done, events = ended(tmp_path, THREADS)
    assert 0 == done.returncode, done.stderr
    assert 16 * 2_000 + 3 == len(events)
    for number in range(16):
        mine = [e.values["train/i"] for e in events[2:-1] if e.values["train/n"] == number]
        assert list(range(2_000)) == mine
