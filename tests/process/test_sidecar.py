"""One process beside the training delivers all runs of a bus, whatever a sink does to it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from support.journals import folder_in, write_journal
from support.plugins import make_plugin
from support.wandb_file import find_runs, read_finished
from trainbus import Bus, JournalSpec, Receipt, Record, RunInfo, Sink, SinkReport, SinkSpec, config
from trainbus.delivery.receipt import write_receipt
from trainbus.delivery.sidecar import Sidecar
from trainbus.delivery.sidecar_protocol import FinishRun, Mailbox, StopRun
from trainbus.delivery.worker import SinkWorker
from trainbus.events import CheckpointSaved, RunEnded, RunStarted, decode
from trainbus.journal.file_access import FileResolver
from trainbus.testing import MemorySink

_DEADLINE_S = 240.0

SINKS = """
    import ctypes, os, time
    from trainbus import Options, Sink

    class OddOptions(Options, frozen=True, kw_only=True):
        path: str = ""
        how: str = ""
        at: int = 0

    class OddSink(Sink):
        Options = OddOptions
        shares_process = False
        opened = 0

        def open(self, run):
            assert OddSink.opened == 0
            OddSink.opened = 1

        def close(self):
            OddSink.opened = 0

        def write(self, records):
            here = os.path.exists(self.options.path)
            if self.options.how == "stays once" and not here:
                open(self.options.path, "w").close()
                time.sleep(3600)
            if self.options.how == "waits and exits":
                while not os.path.exists(self.options.path):
                    time.sleep(0.01)
                os._exit(3)
            for record in records:
                if record.seq == self.options.at:
                    match self.options.how:
                        case "segfault":
                            ctypes.string_at(0)
                        case "exit":
                            os._exit(3)
                        case "abort":
                            os.abort()
                        case "prints":
                            for n in range(30_000):
                                print(f"line {n} of {record.run} ", "x" * 1000)
                            print("the last line of", record.run)
                        case "tells":
                            about = [os.getcwd(), os.environ.get("ODD", "")]
                            print(*about, file=open(self.options.path, "a"))
                if self.options.how in ("segfault", "exit", "abort"):
                    print(record.seq, file=open(self.options.path, "a"))
"""

BESIDE = """
    import os

    def beside():
        found = []
        for name in os.listdir("/proc"):
            try:
                stat = open(f"/proc/{name}/stat").read().rpartition(")")[2].split()
                arguments = open(f"/proc/{name}/cmdline").read()
            except OSError:
                continue
            if int(stat[1]) == os.getpid() and stat[0] != "Z" and "sidecar_main" in arguments:
                found.append(int(name))
        return found
"""


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    """A folder for `sys.path` with a sink of type `odd`."""
    return make_plugin(tmp_path / "plugins", "odd", SINKS, "OddSink")


def python(source: str, folder: Path, plugins: Path, *arguments: object) -> Any:
    """Run a program in a folder; return what it prints, from JSON, and what it says on stderr."""
    done = start(source, folder, plugins, *arguments)
    out, errors = done.communicate(timeout=_DEADLINE_S)
    assert 0 == done.returncode, errors
    return json.loads(out), errors


def start(source: str, folder: Path, plugins: Path, *arguments: object) -> subprocess.Popen[str]:
    """Start a program in a folder."""
    code = textwrap.dedent(BESIDE) + textwrap.dedent(source)
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(plugins)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], Any]) -> Any:
    """Return what the condition returns once it is true."""
    deadline = time.monotonic() + _DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, "the deadline has come"
        time.sleep(0.05)
    return found


def numbers(report: Any) -> tuple[int, int, int, int]:
    """Return the counts of a report, read from JSON."""
    return tuple(report.get(key, 0) for key in ("taken", "dead", "pending", "unsaved"))


def seqs(path: Path, run: str) -> list[int]:
    """Return the numbers of one run's records in a file of JSON lines."""
    records = map(json.loads, path.read_text().splitlines())
    return [record["seq"] for record in records if record["run"] == run]


# One process for all runs

MANY = """
    import json, trainbus

    with trainbus.load("config.yaml") as bus:
        found, runs = [], []
        for n in range(2):
            with bus.run(name=f"run{n}", project="p") as run:
                for epoch in run.epochs(3):
                    run.log({"loss": 1 / (epoch + 1), "run": float(n)})
                runs.append(run.id)
            found.append(beside())
        with bus.run(name="one") as one, bus.run(name="two") as two:
            for step in range(5):
                one.log({"loss": 1.0}, step=step)
                two.log({"loss": 2.0}, step=step)
            runs += [one.id, two.id]
        found.append(beside())
    print(json.dumps({
        "beside": found, "after": beside(), "runs": runs,
        "receipts": {r.run: [r.status, [[s.taken, s.pending] for s in r.sinks], r.emitted]
                     for r in bus.receipts},
    }))
"""


def test_one_process_delivers_all_runs(plugins: Path, tmp_path: Path) -> None:
    """Runs one after another and at once share a process, which ends with the bus."""
    (tmp_path / "config.yaml").write_text(
        "sinks: {kept: {type: jsonl, path: kept.jsonl}, t: {type: wandb, mode: offline}}\n"
    )
    found, errors = python(MANY, tmp_path, plugins)
    first, *others = found["beside"]
    assert (1, [first, first], []) == (len(first), others, found["after"]), errors
    for run in found["runs"]:
        status, counts, emitted = found["receipts"][run]
        assert ("finished", [[emitted, 0]] * 2) == (status, counts)
        assert [*range(1, emitted + 1)] == seqs(tmp_path / "kept.jsonl", run)
    runs = [read_finished(path) for path in find_runs(tmp_path)]
    assert [0] * 4 == [run.exit_code for run in runs]
    rows = [[(row["epoch"], row["train/run"]) for row in run.history] for run in runs[:2]]
    assert [[(epoch, n) for epoch in (1, 2, 3)] for n in (0.0, 1.0)] == rows


OPEN = """
    import json, os, signal, trainbus

    bus = trainbus.load("config.yaml")
    one, two = bus.run(name="one"), bus.run(name="two")
    for run in (one, two):
        run.log({"loss": 1.0})
    print(json.dumps({"runs": [one.id, two.id], "beside": beside()}), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_all_open_runs_of_a_killed_training_get_their_end(plugins: Path, tmp_path: Path) -> None:
    """Two runs that were open at SIGKILL both end as failed, and the process ends with them."""
    (tmp_path / "config.yaml").write_text("sinks: {kept: {type: jsonl, path: kept.jsonl}}\n")
    training = start(OPEN, tmp_path, plugins)
    found = json.loads(training.communicate(timeout=_DEADLINE_S)[0])
    (sidecar,) = found["beside"]
    wait_for(lambda: not is_alive(sidecar))
    for run in found["runs"]:
        receipt = json.loads((tmp_path / "trainbus-runs" / run / "receipt.json").read_text())
        assert ("failed", 3, [3], str(tmp_path / "config.yaml")) == (
            receipt["status"],
            receipt["emitted"],
            [sink["taken"] for sink in receipt["sinks"]],
            receipt["config"],
        )
        assert [1, 2, 3] == seqs(tmp_path / "kept.jsonl", run)


STREAMED = """
    import json, os, signal, sys, threading, trainbus
    from trainbus.events import TextLogged
    from trainbus.journal.directory import RunFolder
    from trainbus.journal.writer import JournalWriter

    def stream_of(run, name):
        stream = JournalWriter(RunFolder("trainbus-runs/" + run.id), stream=name)
        for n in range(100):
            stream.append(TextLogged(key=name, text=str(n)), 1.0)
        return stream

    bus = trainbus.load("config.yaml")
    run = bus.run(name="one")
    run.log({"loss": 1.0})
    console, system = stream_of(run, "console"), stream_of(run, "system")
    run.log({"loss": 0.5})
    console.close()
    print(json.dumps({"run": run.id, "beside": beside()}), flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] == "later":
        rest = threading.Timer(0.5, lambda: (
            system.append(TextLogged(key="system", text="last"), 1.0), system.close()))
        rest.start()
    bus.close()
"""


@pytest.mark.parametrize(
    ("how", "status", "count"),
    [("killed", "failed", 100), ("later", "finished", 101), ("open", "finished", 100)],
)
def test_the_streams_of_a_run_are_delivered_before_its_end(
    how: str, status: str, count: int, plugins: Path, tmp_path: Path
) -> None:
    """Killed, with a stream that ends after the training, or with one that is never closed."""
    (tmp_path / "config.yaml").write_text(
        "flush_secs: 6\nsinks: {kept: {type: jsonl, path: kept.jsonl}}\n"
    )
    training = start(STREAMED, tmp_path, plugins, how)
    found = json.loads(training.communicate(timeout=_DEADLINE_S)[0])
    (sidecar,) = found["beside"]
    wait_for(lambda: not is_alive(sidecar))
    lines = (tmp_path / "kept.jsonl").read_bytes().splitlines()
    records = [decode(line) for line in lines]
    for stream, expected in (("", 4), ("console", 100), ("system", count)):
        assert [*range(1, expected + 1)] == [r.seq for r in records if r.stream == stream]
    assert (RunStarted, RunEnded) == (type(records[0].event), type(records[-1].event))
    receipt = json.loads((tmp_path / f"trainbus-runs/{found['run']}/receipt.json").read_text())
    assert (status, 104 + count, [(104 + count, 0, 0, 0)]) == (
        receipt["status"],
        receipt["emitted"],
        [numbers(sink) for sink in receipt["sinks"]],
    )


def is_alive(pid: int) -> bool:
    """Return whether a process is there, and not only its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


FORGOTTEN = """
    import gc, json, os, sys, trainbus

    bus = trainbus.load("config.yaml")
    with bus.run() as run:
        run.log({"loss": 1.0})
    (sidecar,) = beside()
    if sys.argv[1] == "dropped":
        del bus, run
        gc.collect()
        assert [] == beside()
    print(json.dumps(sidecar))
"""


@pytest.mark.parametrize("how", ["dropped", "kept"])
def test_a_bus_that_is_not_closed_leaves_no_process(
    how: str, plugins: Path, tmp_path: Path
) -> None:
    """The process ends with the bus object, or with the training process."""
    (tmp_path / "config.yaml").write_text("sinks: {kept: {type: jsonl, path: kept.jsonl}}\n")
    sidecar, errors = python(FORGOTTEN, tmp_path, plugins, how)
    assert "Warning" not in errors
    wait_for(lambda: not is_alive(sidecar))


def bus_of(folder: Path, **sinks: dict[str, Any]) -> Bus:
    """Return a bus of configured sinks in a process of their own, with its journals in a folder."""
    about = {"isolation": "process", "journal": {"dir": str(folder / "runs")}, "sinks": sinks}
    return config.loads(json.dumps(about))


def test_a_run_has_the_environment_of_its_time(
    plugins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variables that are set, changed and removed between two runs are so for their sinks."""
    monkeypatch.syspath_prepend(plugins)
    told = tmp_path / "told"
    with bus_of(tmp_path, odd={"type": "odd", "path": str(told), "how": "tells", "at": 1}) as bus:
        for value in ("one", "two", None):
            if value is None:
                monkeypatch.delenv("ODD")
            else:
                monkeypatch.setenv("ODD", value)
            with bus.run():
                pass
    assert [f"{os.getcwd()} {value}" for value in ("one", "two", "")] == [
        line.rstrip("\n") for line in told.read_text().splitlines()
    ]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_sidecar_works_in_its_base(
    is_there: bool, plugins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths are those of the given folder; where there is none, of the training's."""
    monkeypatch.syspath_prepend(plugins)
    base, told = tmp_path / "base", tmp_path / "told"
    if is_there:
        base.mkdir()
    routes = bus_of(
        tmp_path, odd={"type": "odd", "path": str(told), "how": "tells", "at": 1}
    ).settings.sinks
    folder = folder_in(tmp_path / "runs")
    write_journal(folder)
    sidecar = Sidecar(base=base)
    run = sidecar.open(folder, 1, routes, 60.0)
    run.finish([], 10)
    wait_for(run.is_finished)
    sidecar.close()
    assert [(10, 0)] == [(report.taken, report.pending) for report in run.reports(10)]
    assert f"{base if is_there else os.getcwd()} " == told.read_text().rstrip("\n")


# Sinks that end the process

TRAINING = """
    import json, trainbus

    with trainbus.load("config.yaml") as bus:
        for n in range(2):
            with bus.run(name=f"run{n}") as run:
                for step in range(1200):
                    run.log({"loss": 1.0}, step=step)
    print(json.dumps([[r.run, r.emitted, {s.name: [s.taken, s.dead, s.pending, s.error]
                       for s in r.sinks}] for r in bus.receipts]))
"""


@pytest.mark.parametrize("how", ["segfault", "exit", "abort"])
def test_a_sink_that_ends_the_process_is_set_aside(how: str, plugins: Path, tmp_path: Path) -> None:
    """The other sinks get everything, in this run and the next; what the bad one took is told."""
    (tmp_path / "config.yaml").write_text(
        "sinks: {kept: {type: jsonl, path: kept.jsonl}, other: {type: csv, dir: 'csv/{run}'}, "
        f"bad: {{type: odd, path: bad, how: {how}, at: 1100}}}}\n"
    )
    found, errors = python(TRAINING, tmp_path, plugins)
    for run, emitted, sinks in found:
        assert 1202 == emitted
        assert [[emitted, 0, 0, None]] * 2 == [sinks["kept"], sinks["other"]], errors
        assert [*range(1, emitted + 1)] == seqs(tmp_path / "kept.jsonl", run)
        taken, dead, pending, error = sinks["bad"]
        assert (emitted, 0) == (taken + pending, dead)
        assert "disabled: it ended the delivery process 2 times; see worker.log" == error
    (_, _, first), (_, _, second) = found
    stored = [int(line) for line in (tmp_path / "bad").read_text().splitlines()]
    assert 500 <= first["bad"][0] <= max(stored) < 1100
    assert 0 == second["bad"][0]
    assert "the delivery process of 'bad' died" in errors
    assert "the sink is disabled, the others continue" in errors
    log = (tmp_path / "trainbus-runs" / found[0][0] / "worker.log").read_text()
    assert 2 == log.count("trainbus: the delivery process")
    assert ("segfault" == how) == ("Segmentation fault" in log)

    # The replay has the others, too, and the journal keeps the rest.
    (tmp_path / "config.yaml").write_text(
        "sinks: {bad: {type: odd, path: again, "
        f"how: {how}, at: 1100}}, kept: {{type: jsonl, path: again.jsonl}}}}\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "trainbus", "replay", f"trainbus-runs/{run}", "-c", "config.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(plugins)},
        capture_output=True,
        text=True,
        timeout=_DEADLINE_S,
        check=False,
    )
    assert 1 == done.returncode, done.stderr
    assert "disabled: it ended the delivery process" in done.stdout
    assert f"kept     jsonl: {emitted} delivered" in done.stdout
    assert [*range(1, emitted + 1)] == seqs(tmp_path / "again.jsonl", run)


def test_a_sink_that_was_called_beside_the_guilty_one_goes_on(
    plugins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sinks that were being called at a death get a process each, and one of them is clear."""
    monkeypatch.syspath_prepend(make_plugin(tmp_path / "plugins", "even", SINKS, "OddSink"))
    path = str(tmp_path / "here")
    with (
        bus_of(
            tmp_path,
            clear={"type": "even", "path": path, "how": "stays once"},
            guilty={"type": "odd", "path": path, "how": "waits and exits"},
            kept={"type": "jsonl", "path": str(tmp_path / "kept.jsonl")},
        ) as bus,
        bus.run() as run,
    ):
        run.log({"loss": 1.0})
    counts = {report.name: (report.taken, report.pending) for report in bus.receipts[0].sinks}
    assert {"clear": (3, 0), "guilty": (0, 3), "kept": (3, 0)} == counts


def test_a_tracker_of_one_run_a_process_has_two_open(
    plugins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs that are open at once have a process each, where the sink asks for it."""
    monkeypatch.syspath_prepend(plugins)
    with bus_of(tmp_path, odd={"type": "odd"}) as bus:
        with bus.run(name="one") as one, bus.run(name="two") as two:
            for run in (one, two):
                run.log({"loss": 1.0})
            assert 2 == len(set(bus.sidecar.pids))
        with bus.run(name="three"):
            assert 2 == len(bus.sidecar.pids)
    assert [(3, 0), (3, 0), (2, 0)] == [(r.sinks[0].taken, r.pending) for r in bus.receipts]


# worker.log


def test_the_log_of_a_printing_sink_is_bounded(
    plugins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 60 MB that a sink prints in two runs each log keeps its own beginning and end."""
    monkeypatch.syspath_prepend(plugins)
    with bus_of(tmp_path, odd={"type": "odd", "how": "prints", "at": 2}) as bus:
        for name in ("one", "two"):
            with bus.run(name=name) as run:
                run.log({"loss": 1.0})
    for receipt in bus.receipts:
        assert (3, 0) == (receipt.sinks[0].taken, receipt.pending)
        log = (tmp_path / "runs" / receipt.run / "worker.log").read_bytes()
        assert 2**19 < len(log) < 3 * 2**20
        assert log.startswith(f"line 0 of {receipt.run} ".encode())
        assert log.rstrip().endswith(f"the last line of {receipt.run}".encode())
        assert b"output omitted" in log


# A process that is stopped

STOPPED = """
    import json, os, signal, time, trainbus
    from pathlib import Path

    with trainbus.load("config.yaml") as bus:
        with bus.run() as run:
            run.log({"loss": 1.0})
            until = time.monotonic() + 60
            while not Path("kept.jsonl").exists() and time.monotonic() < until:
                time.sleep(0.05)
            (sidecar,) = beside()
            os.kill(sidecar, signal.SIGSTOP)
            for n in range(100):
                run.text("t", "x" * 15_000)
            begun = time.monotonic()
        took = time.monotonic() - begun
    took_all = time.monotonic() - begun
    receipt = bus.receipts[0]
    print(json.dumps({
        "took": took, "all": took_all, "unsaved": receipt.unsaved, "text": str(receipt),
        "sinks": [[receipt.emitted, s.taken, s.pending, s.unsaved] for s in receipt.sinks],
        "beside": beside(),
    }))
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_stopped_process_costs_no_more_than_it_may(
    plugins: Path, tmp_path: Path, small_disk: Path
) -> None:
    """The end takes `flush_secs`, whatever waits in memory; what is nowhere is called lost."""
    (tmp_path / "config.yaml").write_text(
        f"flush_secs: 8\njournal: {{dir: {small_disk}}}\n"
        "sinks: {kept: {type: jsonl, path: kept.jsonl}}\n"
    )
    found, errors = python(STOPPED, tmp_path, plugins)
    assert found["all"] < 2 * 8, errors
    assert [] == found["beside"]
    ((emitted, taken, pending, unsaved),) = found["sinks"]
    assert 103 == emitted == taken + pending + unsaved
    assert found["unsaved"] == unsaved > 80
    assert f"{unsaved} NOT ON DISK, {unsaved} LOST" in found["text"]


FULL = """
    import json, time, trainbus

    with trainbus.load("config.yaml") as bus:
        with bus.run() as run:
            for n in range(1500):
                run.log({f"a_metric_{i}": 1 / (n + i + 1) for i in range(600)})
    receipt = bus.receipts[0]
    print(json.dumps({
        "unsaved": receipt.unsaved, "text": str(receipt),
        "sinks": [[receipt.emitted, s.taken, s.pending, s.unsaved] for s in receipt.sinks],
    }))
"""


def test_much_that_waits_in_memory_reaches_the_sinks(
    plugins: Path, tmp_path: Path, small_disk: Path
) -> None:
    """30 MB that a full disk has no room for are in every sink, and the receipt advises nothing."""
    (tmp_path / "config.yaml").write_text(
        f"flush_secs: 60\njournal: {{dir: {small_disk}}}\n"
        "sinks: {one: {type: jsonl, path: one.jsonl}, two: {type: jsonl, path: two.jsonl}}\n"
    )
    found, errors = python(FULL, tmp_path, plugins)
    assert found["unsaved"] > 1400
    assert [[1502, 1502, 0, 0]] * 2 == found["sinks"], errors
    for name in ("one", "two"):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert [*range(1, 1503)] == [json.loads(line)["seq"] for line in lines]
    assert "NOT ON DISK" in found["text"]
    assert "LOST" not in found["text"]
    assert "replay" not in found["text"]


def test_a_receipt_advises_no_replay_of_what_is_nowhere(tmp_path: Path) -> None:
    """Records that are neither on disk nor in a sink are lost; those on disk are pending."""

    def receipt_of(*reports: SinkReport) -> Receipt:
        return write_receipt(
            folder_in(tmp_path),
            status="finished",
            attempt=1,
            emitted=100,
            reports=reports,
            unsaved=40,
        )

    one = SinkReport(name="one", kind="k", taken=10, pending=90)
    two = SinkReport(name="two", kind="k", taken=70, pending=30)
    every = SinkReport(name="all", kind="k", taken=100)
    receipt = receipt_of(one, two, every)
    assert [(50, 40), (0, 30), (0, 0)] == [(r.pending, r.unsaved) for r in receipt.sinks]
    assert 0 == receipt.lost
    receipt = receipt_of(one, two)
    assert 30 == receipt.lost
    assert "to send the rest" in str(receipt)
    receipt = receipt_of(two)
    assert "two      k: 70 delivered, 30 LOST" in str(receipt)
    assert "replay" not in str(receipt)


# No process and no thread

NOTHING = """
    import json, os, resource, sys, trainbus
    from trainbus.testing import MemorySink

    memory = MemorySink()
    bus = trainbus.load("config.yaml")
    bus = trainbus.Bus(
        {**{spec.name: spec for spec in bus.settings.sinks}, "memory": memory},
        journal=bus.settings.journal,
    )
    if sys.argv[1] == "limit":
        os.environ["USER"] = "somebody"
        os.setgroups([])
        os.setuid(int(sys.argv[2]))
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    else:
        import subprocess, threading

        def refuse(*args, **kwargs):
            raise RuntimeError("can't start new thread")

        threading.Thread.start = subprocess.Popen.__init__ = refuse
        subprocess.Popen.__del__ = lambda self: None
    with bus:
        with bus.run() as run:
            for step in range(20):
                run.log({"loss": 1.0}, step=step)
    receipt = bus.receipts[0]
    print(json.dumps({
        "emitted": receipt.emitted, "memory": len(memory.records), "text": str(receipt),
        "sinks": {s.name: [s.taken, s.pending] for s in receipt.sinks},
    }))
"""


@pytest.mark.parametrize("how", ["limit", "refused"])
def test_training_goes_on_where_nothing_can_be_started(how: str, plugins: Path) -> None:
    """The journal keeps what a replay can send; a sink object gets it at the end of the run."""
    if how == "limit" and os.getuid() != 0:
        pytest.skip("only root can become a user of no processes")
    folder = Path(tempfile.mkdtemp(prefix="trainbus-test-"))
    try:
        folder.chmod(0o777)
        (folder / "config.yaml").write_text(
            f"journal: {{dir: {folder}/runs}}\n"
            "sinks: {kept: {type: jsonl, path: kept.jsonl}, t: {type: csv, dir: 'csv/{run}'}}\n"
        )
        found, errors = python(NOTHING, folder, plugins, how, 61234)
        assert "Traceback" not in errors
        assert 1 == errors.count("sink 'kept' (jsonl) has neither process nor thread")
        assert (22, 22) == (found["emitted"], found["memory"])
        assert {"kept": [0, 22], "t": [0, 22], "memory": [22, 0]} == found["sinks"]
        assert "to send the rest: trainbus replay" in found["text"]
        lines = next(folder.glob("runs/*/r0-a1.jsonl")).read_text().splitlines()
        assert [*range(1, 23)] == [json.loads(line)["seq"] for line in lines]
    finally:
        shutil.rmtree(folder)


class Uploading(MemorySink):
    """Takes checkpoints beside all else."""

    def __init__(self) -> None:
        super().__init__()
        self.uploaded: list[int] = []

    def upload(self, records: Sequence[Record]) -> None:
        """Note the checkpoints."""
        self.uploaded += [record.seq for record in records]


def test_uploads_need_no_thread_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no thread can be started for uploads, the sink's own thread makes them."""
    begin = threading.Thread.start

    def start_some(self: threading.Thread) -> None:
        if "uploads" in self.name:
            raise RuntimeError("can't start new thread")
        begin(self)

    monkeypatch.setattr(threading.Thread, "start", start_some)
    sink = Uploading()
    with Bus({"sink": sink}, journal=JournalSpec(dir=str(tmp_path))) as bus, bus.run():
        for epoch in range(3):
            bus.open_runs[-1](CheckpointSaved(path="m.pt", kind="last", epoch=epoch))
    assert [2, 3, 4] == sink.uploaded
    assert (5, 0) == (bus.receipts[0].sinks[0].taken, bus.receipts[0].pending)


# What is said of a call that takes long


def test_a_tracker_that_is_opening_is_not_blocked(tmp_path: Path) -> None:
    """What takes long before the sink is open is its opening, afterwards a call."""
    now, said = 0.0, []

    class Slow(Sink):
        def open(self, run: RunInfo) -> None:
            self.write([])

        def write(self, records: Sequence[Record]) -> None:
            nonlocal now
            said.append(worker.blocked(30.0))
            now += 31.0
            said.append(worker.blocked(30.0))

    folder = folder_in(tmp_path)
    write_journal(folder)
    route = SinkSpec(name="slow", make=Slow, kind="Slow")
    worker = SinkWorker(route, folder, FileResolver(folder, None), attempt=1, clock=lambda: now)
    worker.step()
    assert [None, "is still opening after 31 s", None, "has been blocked for 31 s"] == said
    worker.close()


# Messages


def test_a_mailbox_carries_lines_and_survives_a_full_memory() -> None:
    """What is put in comes out in order, at once or not at all."""
    box: Mailbox[FinishRun | StopRun] = Mailbox(FinishRun | StopRun)
    other: Mailbox[FinishRun | StopRun] = Mailbox(FinishRun | StopRun, os.dup(box.fd))
    lines = [b"%d %s\n" % (n, b"x" * 1000) for n in range(5000)]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        assert box.put(StopRun(run=1, secs=float("inf")))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limit[1]))
        assert not box.put(FinishRun(run=1, emitted=5), lines)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert [(StopRun(run=1, secs=float("inf")), [])] == other.take()
    assert box.put(FinishRun(run=2, emitted=7), lines)
    assert box.put(StopRun(run=3, secs=1.0))
    assert [
        (FinishRun(run=2, emitted=7), lines),
        (StopRun(run=3, secs=1.0), []),
    ] == other.take()
    assert [] == other.take()
    for each in (box, other):
        each.close()
