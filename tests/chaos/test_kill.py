"""Nothing is lost when a process is killed: the training, the sidecar, at any instant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support import nursery, train
from support.plugins import make_plugin
from support.trained import UNDRAWN, train_once
from support.wandb_file import find_runs, read_finished
from trainbus.delivery.spec import SinkSpec
from trainbus.delivery.worker import SinkWorker, ThreadedWorker
from trainbus.events import EpochEnded, RunEnded, RunStarted
from trainbus.journal.directory import RunFolder
from trainbus.journal.file_access import FileResolver
from trainbus.journal.writer import JournalWriter
from trainbus.testing import MemorySink, check_grammar

_DEADLINE_S = 240.0
_KILLS = 200
_SIDECAR_KILLS = 50

COUNTING = """
    import os
    from trainbus import Options, Sink

    class CountingOptions(Options, frozen=True, kw_only=True):
        path: str

    class CountingSink(Sink):
        Options = CountingOptions

        def write(self, records):
            with open(self.options.path, "a") as file:
                for record in records:
                    file.write(f"{record.attempt} {record.seq}\\n")
"""

TRAINING = """
    import os, random, signal, sys, time
    import trainbus

    chance = random.Random(int(sys.argv[2]))
    with trainbus.load(sys.argv[1]) as bus, bus.run(name="killed") as run:
        (sidecar,) = bus.sidecar.pids
        for epoch in run.epochs(1):
            begun, kill_after = time.monotonic(), chance.uniform(0.0, 0.8)
            for step in range(10_000):
                run.log({"loss": 1.0}, step=step)
                if kill_after is not None and time.monotonic() - begun > kill_after:
                    os.kill(sidecar, signal.SIGKILL)
                    kill_after = None
                time.sleep(0.0001)
                if kill_after is None and step > 500:
                    break
    print(run.id, bus.receipts[0].emitted, bus.receipts[0].sinks)
"""


def run_python(
    source: str, *arguments: object, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def wait_for(condition: Callable[[], Any], deadline_s: float = _DEADLINE_S) -> Any:
    """Return what the condition returns once it is true."""
    deadline = time.monotonic() + deadline_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "the deadline has come"
        time.sleep(0.05)
    return found


def receipt_of(folder: Path) -> Callable[[], dict[str, Any] | None]:
    """Return what looks for the receipt of the only run in a folder."""

    def look() -> dict[str, Any] | None:
        for path in folder.glob("trainbus-runs/*/receipt.json"):
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        return None

    return look


def test_a_killed_training_loses_nothing_it_was_told_is_kept(tmp_path: Path) -> None:
    """After SIGKILL at any instant, each acknowledged record is there once, without gaps."""
    done = subprocess.run(
        [sys.executable, nursery.__file__, tmp_path, str(_KILLS), "7"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert _KILLS == len(kills)
    for kill in kills:
        first, last, different, count = kill["seqs"]
        assert 1 == first
        assert last == different == count  # no gap, no record twice
        # One record may be written whose acknowledgement never came, and recovery adds the end.
        assert last - 2 <= kill["acknowledged"] <= last - 1
        assert (1, 1, "RunEnded") == (kill["recovered"], kill["ends"], kill["last"])
        assert 0 == kill["damaged"]
        assert kill["delivered"]
    torn = sum(kill["torn"] for kill in kills)
    print(f"{_KILLS} kills: nothing lost, no gap, nothing twice; {torn} in the middle of a write")


@pytest.mark.parametrize("seed", range(_SIDECAR_KILLS))
def test_a_killed_sidecar_loses_nothing(seed: int, tmp_path: Path) -> None:
    """The next sidecar goes on; a sink that knows what it has gets each record exactly once."""
    plugins = make_plugin(tmp_path / "plugins", "counting", COUNTING, "CountingSink")
    (tmp_path / "config.yaml").write_text(
        "sinks:\n  kept: {type: jsonl, path: kept.jsonl}\n  counted: {type: counting, path: ids}\n"
    )
    done = run_python(TRAINING, "config.yaml", seed, cwd=tmp_path, env={"PYTHONPATH": str(plugins)})
    assert 0 == done.returncode, done.stderr
    assert done.stdout, done.stderr
    _, emitted, *_ = done.stdout.split()
    expected = list(range(1, int(emitted) + 1))
    lines = (tmp_path / "kept.jsonl").read_text().splitlines()
    kept = [json.loads(line)["seq"] for line in lines]
    assert expected == kept
    # What a sink was given when it died comes again, as nobody knows whether it was taken.
    lines = (tmp_path / "ids").read_text().splitlines()
    counted = Counter(int(line.split()[1]) for line in lines)
    assert expected == sorted(counted)
    assert max(counted.values()) <= 2
    receipt = receipt_of(tmp_path)()
    assert receipt is not None
    for sink in receipt["sinks"]:
        assert (int(emitted), 0, 0) == (sink["taken"], sink["dead"], sink["pending"])


EPOCHS = """
    import os, signal, sys, time
    import trainbus

    with trainbus.load("config.yaml") as bus:
        with bus.run(name="killed", project="p", params={"lr": 0.1, "layers": [1, 2]}) as run:
            for epoch in run.epochs(20):
                run.log({"loss": 1 / (epoch + 1)})
                run.log({"accuracy": epoch / 20}, phase="validation")
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
"""

PLAIN = """
    import os, signal, time
    import wandb

    run = wandb.init(project="p", mode="offline", config={"lr": 0.1, "layers": [1, 2]})
    for epoch in range(20):
        run.log({"train/loss": 1 / (epoch + 1), "validation/accuracy": epoch / 20})
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_training_reaches_wandb(tmp_path: Path) -> None:
    """All rows, the config and a failed end are in W&B's file soon after SIGKILL."""
    (tmp_path / "config.yaml").write_text("sinks: {t: {type: wandb, mode: offline}}\n")
    assert -9 == run_python(EPOCHS, cwd=tmp_path).returncode
    wait_for(receipt_of(tmp_path), 30.0)
    (path,) = find_runs(tmp_path)
    run = read_finished(path)
    expected = [(e + 1, 1 / (e + 1), e / 20) for e in range(20)]
    found = [(r["epoch"], r["train/loss"], r["validation/accuracy"]) for r in run.history]
    assert expected == found
    assert {"lr": 0.1, "layers": [1, 2]} == run.config
    assert 1 == run.exit_code
    assert "killed" in run.summary["ended"]

    (tmp_path / "plain").mkdir()
    assert -9 == run_python(PLAIN, cwd=tmp_path / "plain").returncode
    rows = sum(len(_rows(path)) for path in find_runs(tmp_path / "plain"))
    print(f"rows in W&B's file after SIGKILL: {len(run.history)} of 20 here, {rows} with wandb.log")


def _rows(path: Path) -> list[dict[str, Any]]:
    from support.wandb_file import read_run

    try:
        return list(read_run(path).history)
    except Exception:  # a file of zero bytes is none
        return []


KILL = """
import os, signal
model.add_callback(
    "{hook}", lambda trainer: trainer.epoch == 1 and os.kill(os.getpid(), signal.SIGKILL)
)
"""


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end"])
def test_a_killed_yolo_that_is_resumed_is_one_run(hook: str, tmp_path: Path, data: Path) -> None:
    """Killed in its second epoch, then resumed: one W&B run, no epoch missing and none double."""
    root = tmp_path / "yolo"
    killed = train_once(
        root, data, epochs=4, arguments=UNDRAWN, before=KILL.format(hook=hook), check=False
    )
    assert -9 == killed.process.returncode, killed.process.stderr
    wait_for(receipt_of(root))
    last = root / "runs" / "train" / "weights" / "last.pt"
    resumed = replace(killed.scenario, model=str(last), before="", train={"resume": True})
    done = train.run(resumed)
    assert 0 == done.returncode, done.stderr
    runs = [read_finished(path) for path in find_runs(root)]
    assert [1, 0] == [run.exit_code for run in runs]
    assert 1 == len({path.stem for path in find_runs(root)})
    rows = [row for run in runs for row in run.history if "train/box_loss" in row]
    assert [1, 2, 3, 4] == [row["epoch"] for row in rows]
    assert all("metrics/mAP50(B)" in row for row in rows)
    records = killed.records
    assert 1 == len({record.run for record in records})
    assert [] == check_grammar([record for record in records if record.attempt == 1])
    assert [] == check_grammar([record for record in records if record.attempt == 2])
    completed = [r.event.epoch for r in records if isinstance(r.event, EpochEnded)]
    assert [0, 1, 2, 3] == completed


def test_a_worker_that_finds_nothing_left_is_finished(tmp_path: Path) -> None:
    """A process that died between the last record and its report leaves nothing to wait for."""
    sink = MemorySink()
    folder = RunFolder.create([tmp_path], "run")
    journal = JournalWriter(folder)
    journal.append(RunStarted(), 1.0)
    journal.append(RunEnded(status="finished"), 2.0)
    journal.close()
    route = SinkSpec(name="memory", make=lambda: sink, kind="memory", sink=sink)
    for _ in range(2):
        worker = ThreadedWorker(SinkWorker(route, folder, FileResolver(folder, None), attempt=1))
        worker.start()
        worker.finish()
        wait_for(worker.is_finished)
        report = worker.worker.report(2)
        assert (2, 0) == (report.taken, report.pending)
    assert 2 == len(sink.records)
