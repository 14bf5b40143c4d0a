"""The directory of a journal is deleted or unmounted while it is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from trainbus import Bus, Receipt, config
from trainbus.events import decode
from trainbus.journal.directory import RunFolder
from trainbus.journal.writer import JournalWriter
from trainbus.run import Run

SAID = "was deleted, moved or unmounted while it was being written"


def bus_of(folder: Path, isolation: str, journals: Path) -> Bus:
    """Return a bus with a local file."""
    sinks = {"kept": {"type": "jsonl", "path": str(folder / "kept.jsonl")}}
    text = {"isolation": isolation, "journal": {"dir": str(journals)}, "sinks": sinks}
    return config.loads(json.dumps(text))


def kept(folder: Path) -> list[int]:
    """Return the numbers of the records in the file."""
    file = folder / "kept.jsonl"
    lines = file.read_bytes().splitlines() if file.exists() else []
    return [decode(line).seq for line in lines]


def log_until(run: Run, condition: Callable[[], bool], step: int) -> int:
    """Log until something has happened; return the next step."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        run.log({"loss": 1.0}, step=step)
        step += 1
        time.sleep(0.01)
    return step


def trained(
    folder: Path,
    isolation: str,
    journals: Path,
    vanish: Callable[[], object],
    caplog: pytest.LogCaptureFixture,
) -> Receipt:
    """Return the receipt of a training whose journal vanished when a sink had begun with it."""
    bus = bus_of(folder, isolation, journals)
    with bus, bus.run(name="r") as run:
        step = log_until(run, lambda: len(kept(folder)) > 2, 0)
        vanish()
        step = log_until(run, lambda: SAID in caplog.text, step)
        run.image("picture", np.zeros((200, 200, 3), np.uint8))
        for n in range(step, step + 100):
            run.log({"loss": 1.0}, step=n)
    return bus.receipts[0]


@pytest.mark.parametrize("isolation", ["process", "thread", "inline"])
def test_a_deleted_journal_goes_on_to_the_sinks(
    isolation: str, tmp_path: Path, journals: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every record arrives; none is on disk, which is counted and was said once, at once."""
    receipt = trained(tmp_path, isolation, journals, lambda: shutil.rmtree(journals), caplog)
    assert list(range(1, receipt.emitted + 1)) == kept(tmp_path)
    assert (receipt.emitted, 0, 0) == (receipt.unsaved, receipt.pending, receipt.dropped)
    assert 1 == caplog.text.count(SAID)
    assert not journals.exists()
    assert receipt.journal is None
    assert f"{receipt.emitted} NOT ON DISK" in str(receipt)
    assert "trainbus replay" not in str(receipt)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that can be removed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root can mount a disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], capture_output=True, check=False)


def test_an_unmounted_journal_goes_on_to_the_sinks(
    disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A removed disk is detected like a deleted folder, and nothing is written in its place."""

    def unmount() -> None:
        subprocess.run(["umount", "-l", str(disk)], check=True)

    receipt = trained(tmp_path, "process", disk / "runs", unmount, caplog)
    assert list(range(1, receipt.emitted + 1)) == kept(tmp_path)
    assert (receipt.emitted, 0) == (receipt.unsaved, receipt.pending)
    assert 1 == caplog.text.count(SAID)
    assert [] == list(disk.iterdir())


@pytest.mark.parametrize("how", ["deleted", "replaced", "moved"])
def test_a_journal_that_vanishes_at_the_end_is_counted(
    how: str, tmp_path: Path, journals: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Between the last look and the end of a run there is one more."""
    bus = bus_of(tmp_path, "inline", journals)
    with bus, bus.run(name="r") as run:
        run.log({"loss": 1.0})
        path = journals / str(run.id) / "r0-a1.jsonl"
        if how == "moved":
            journals.rename(tmp_path / "elsewhere")
        else:
            path.unlink()
        if how == "replaced":
            path.touch()
    (receipt,) = bus.receipts
    assert (3, 3, 0) == (receipt.emitted, receipt.unsaved, receipt.pending)
    assert 1 == caplog.text.count(SAID)


def test_a_journal_that_is_there_is_not_said_to_be_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that can't be asked, or that is back again, has what is on it."""
    folder = RunFolder.create([tmp_path], "run")
    journal = JournalWriter(folder)
    real = os.stat

    def refused(path: str, **options: bool) -> os.stat_result:
        raise PermissionError(13, "no", path)

    monkeypatch.setattr(os, "stat", refused)
    journal.check_file()
    monkeypatch.setattr(os, "stat", real)
    assert (False, 0) == (journal.is_gone, journal.unsaved)
    folder.path.rename(tmp_path / "away")
    journal.check_file()
    assert journal.is_gone
    (tmp_path / "away").rename(folder.path)
    journal.check_file()
    assert not journal.is_gone
    journal.close()
    journal.check_file()
    assert not journal.is_gone
