"""The plain loop in two gloo processes: rank 0 has the run, and any rank can say what ended it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from trainbus import Bus
from trainbus.events import MetricsLogged, RunEnded, RunStarted, decode
from trainbus.journal.directory import RunFolder
from trainbus.journal.writer import JournalWriter
from trainbus.recording import peers
from trainbus.testing import check_grammar

LOOP = """
import os, pathlib, signal, sys, time
from contextlib import contextmanager
import torch
import torch.distributed as dist
import trainbus

@contextmanager
def cleaning_up(how):
    try:
        yield
    finally:
        if "clean up" in how:
            dist.destroy_process_group()
            deadline = time.monotonic() + 120
            while dist_rank == 0 and time.monotonic() < deadline:  # until rank 1 has told its error
                if list(pathlib.Path("trainbus-runs").glob("*/r1-a1.jsonl")):
                    break
                time.sleep(0.01)

def train(how):
    global dist_rank
    dist_rank = dist.get_rank()
    with trainbus.load("config.yaml") as bus, bus.run(name="ranks") as run, cleaning_up(how):
        for step in (1, 2):
            if step == 2 and dist.get_rank() == 1:
                if how == "fail":
                    raise ValueError("boom on rank 1")
                if how == "exit":
                    sys.exit(3)
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
            total = torch.tensor(float(dist.get_rank()))
            dist.all_reduce(total)
            if step == 2 and "fail on 0" in how and dist.get_rank() == 0:
                raise ValueError("boom on rank 0")
            run.log({"rank": dist.get_rank(), "sum": total}, step=step)
        if how == "leave" and dist.get_rank() == 1:
            sys.exit(0)
        dist.barrier()
    dist.destroy_process_group()
"""

LAUNCHED = """
if __name__ == "__main__":
    dist.init_process_group("gloo")
    train(sys.argv[1])
"""

SPAWNED = """
import torch.multiprocessing as mp

def child(rank, how, store):
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    train(how)

if __name__ == "__main__":
    for number, how in enumerate(sys.argv[1:]):
        store = f"file://{os.getcwd()}/store-{number}"
        try:
            mp.spawn(child, (how, store), nprocs=2)
        except mp.ProcessRaisedException as error:
            print(error, file=sys.stderr)
"""


@pytest.fixture
def port() -> str:
    """A port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(folder: Path, how: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the loop in two processes of torch's launcher, or spawned by one of its own."""
    (folder / "config.yaml").write_text("sinks: {kept: {type: jsonl, path: 'kept/{run}.jsonl'}}\n")
    script = folder / "loop.py"
    script.write_text(LOOP + (LAUNCHED if options else SPAWNED))
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", *options]
    return subprocess.run(
        [sys.executable, *(launcher if options else []), str(script), *how.split(",")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def runs(folder: Path) -> list[Path]:
    """Return the folders of the runs, the oldest first."""
    found = (folder / "trainbus-runs").glob("ranks_*")
    return sorted(found, key=lambda run: recorded(run / "r0-a1.jsonl")[0].time)


def recorded(path: Path) -> list[Any]:
    """Return the records of a file of a journal."""
    lines = path.read_bytes().splitlines()
    return [decode(b"{" + line.split(b",", 1)[1]) for line in lines]


def journals(run: Path) -> list[str]:
    """Return the names of the records files."""
    return sorted(path.name for path in run.glob("r*-a*.jsonl"))


def events(run: Path) -> list[Any]:
    """Return the events of a run, which obey the grammar."""
    records = recorded(run / "r0-a1.jsonl")
    assert [] == check_grammar(records)
    return [record.event for record in records]


LAUNCHERS = pytest.mark.parametrize("launcher", ["torchrun", "spawn"])


def options(launcher: str, port: str) -> list[str]:
    return ["--master_port", port] if launcher == "torchrun" else []


@LAUNCHERS
@pytest.mark.needs("torch")
def test_two_processes_have_one_run(launcher: str, port: str, tmp_path: Path) -> None:
    """Rank 0 logs, once; rank 1 writes nothing, and the note of the job is gone afterwards."""
    done = start(tmp_path, "well", *options(launcher, port))
    assert 0 == done.returncode, done.stderr
    (run,) = runs(tmp_path)
    assert ["r0-a1.jsonl"] == journals(run)
    logged = [(e.step, e.values) for e in events(run) if isinstance(e, MetricsLogged)]
    assert [(step, {"train/rank": 0.0, "train/sum": 1.0}) for step in (1, 2)] == logged
    assert RunEnded(status="finished") == events(run)[-1]
    assert [] == list((tmp_path / "trainbus-runs" / ".jobs").iterdir())
    (kept,) = (tmp_path / "kept").iterdir()
    assert f"{run.name}.jsonl" == kept.name


@LAUNCHERS
@pytest.mark.needs("torch")
def test_a_failure_of_rank_1_is_the_cause(launcher: str, port: str, tmp_path: Path) -> None:
    """The run ends with what rank 1 died of, however rank 0 came to know."""
    done = start(tmp_path, "fail", *options(launcher, port))
    assert "boom on rank 1" in done.stderr
    (run,) = runs(tmp_path)
    end = events(run)[-1]
    assert ("failed", "rank 1: ValueError: boom on rank 1") == (end.status, end.reason), done.stderr
    assert "ValueError" == end.error.type
    assert 'raise ValueError("boom on rank 1")' in end.error.traceback
    assert ["r0-a1.jsonl", "r1-a1.jsonl"] == journals(run)
    (other,) = recorded(run / "r1-a1.jsonl")
    assert (1, 1, run.name) == (other.rank, other.seq, other.run)


@pytest.mark.parametrize("how", ["fail on 0", "fail on 0 and clean up"])
@pytest.mark.needs("torch")
def test_a_failure_of_rank_0_is_its_own(how: str, port: str, tmp_path: Path) -> None:
    """What rank 0 raises is the end, and not the connection that breaks in rank 1 thereupon."""
    start(tmp_path, how, "--master_port", port)
    (run,) = runs(tmp_path)
    end = events(run)[-1]
    assert ("failed", "ValueError: boom on rank 0") == (end.status, end.reason)


@pytest.mark.parametrize("how", ["kill", "exit"])
@pytest.mark.needs("torch")
def test_a_rank_that_says_nothing_leaves_the_run_failed_or_stopped(
    how: str, port: str, tmp_path: Path
) -> None:
    """Where rank 1 dies without an exception, the run ends with what rank 0 saw of it."""
    start(tmp_path, how, "--master_port", port)
    (run,) = runs(tmp_path)
    end = events(run)[-1]
    assert end.status in ("failed", "stopped")
    assert not (end.reason or "").startswith("rank")


@pytest.mark.needs("torch")
def test_a_rank_that_leaves_well_writes_nothing(port: str, tmp_path: Path) -> None:
    """`sys.exit(0)` of rank 1 is not a failure, and writes no journal."""
    start(tmp_path, "leave", "--master_port", port)
    (run,) = runs(tmp_path)
    assert ["r0-a1.jsonl"] == journals(run)


@pytest.mark.needs("torch")
def test_jobs_of_one_port_do_not_mix(port: str, tmp_path: Path) -> None:
    """The second job on a port reports to its own run, also when the first left its note behind."""
    start(tmp_path, "fail", "--master_port", port)
    start(tmp_path, "well", "--master_port", port)
    start(tmp_path, "fail", "--master_port", port)
    found = runs(tmp_path)
    reasons = [events(run)[-1].reason for run in found]
    assert ["rank 1: ValueError: boom on rank 1", None] * 2 == [*reasons, None]
    assert [2, 1, 2] == [len(journals(run)) for run in found]


@pytest.mark.needs("torch")
def test_jobs_that_one_process_spawns_do_not_mix(tmp_path: Path) -> None:
    """Jobs that one process spawns, one after another, have a run each and their own causes."""
    start(tmp_path, "fail,well,fail")
    found = runs(tmp_path)
    reasons = [events(run)[-1].reason for run in found]
    assert ["rank 1: ValueError: boom on rank 1", None] * 2 == [*reasons, None]
    assert [2, 1, 2] == [len(journals(run)) for run in found]


def test_a_note_of_a_job_that_is_gone_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that fails before its job has a run finds none, whatever an earlier job left."""
    monkeypatch.setenv("MASTER_PORT", "29500")
    folder = RunFolder.create([tmp_path], "earlier")
    journal = JournalWriter(folder)
    journal.append(RunStarted(), time.time())
    peers.announce(folder, 1)
    error = ValueError("boom")
    assert peers.report([tmp_path], 1, error, time.time())
    journal.close()
    assert not peers.report([tmp_path], 2, error, time.time())
    assert [0, 1] == folder.ranks(1)


def test_a_rank_that_can_not_be_read_leaves_the_run_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies where another rank's records would be costs its cause, and nothing else."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="mine"), Bus() as bus:
        fail_beside_what_is_no_file(bus, tmp_path)
    (run,) = runs(tmp_path)
    assert "ValueError: mine" == events(run)[-1].reason


def fail_beside_what_is_no_file(bus: Bus, folder: Path) -> None:
    """Have a run fail when a folder has the name of rank 1's records."""
    with bus.run(name="ranks"):
        (run,) = runs(folder)
        (run / "r1-a1.jsonl").mkdir()
        raise ValueError("mine")
