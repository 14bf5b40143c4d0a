"""What a training appends is on disk, whole and once, whatever the disk or Ctrl-C do."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import stat
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from zlib import crc32

import msgspec
import numpy as np
import pytest

from support.journals import (
    SAMPLE,
    Disk,
    as_json,
    folder_in,
    read_file,
    read_records,
)
from trainbus import events as ev
from trainbus.errors import JournalError
from trainbus.journal import writer as journals_module
from trainbus.journal.blobs import Blob
from trainbus.journal.directory import RunFolder
from trainbus.journal.encoding import Entry, unseal
from trainbus.journal.file_access import FileResolver
from trainbus.journal.reader import RunReader
from trainbus.journal.recovery import write_end
from trainbus.journal.writer import JournalWriter


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """The directory of a run."""
    return folder_in(tmp_path)


@pytest.fixture
def journal(folder: RunFolder) -> Iterator[JournalWriter]:
    """A journal that copies every file that it may copy."""
    opened = JournalWriter(folder, wants_files=lambda event: True)
    yield opened
    opened.close()


class Clock:
    """A clock that only the test advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time in seconds."""
        return self.now


def step(n: int) -> ev.MetricsLogged:
    """Return a metric of a step."""
    return ev.MetricsLogged(values={"loss": float(n)}, phase="train", step=n)


def epoch(n: int) -> ev.MetricsLogged:
    """Return a metric of an epoch."""
    return ev.MetricsLogged(values={"map": float(n)}, phase="validation", epoch=n)


def seqs(folder: RunFolder) -> list[int]:
    """Return the seqs in the first records file, all of whose lines have to be whole."""
    data = folder.records(1).read_bytes()
    lines = data.split(b"\n")
    assert b"" == lines.pop()
    bodies = [unseal(line) for line in lines]
    assert [] == [line for line, body in zip(lines, bodies, strict=True) if body is None]
    return [json.loads(line)["seq"] for line in lines]


def blob_files(folder: RunFolder) -> list[Path]:
    """Return the files of all blobs."""
    return [path for path in folder.blobs.rglob("*") if path.is_file()]


def blob_of(folder: RunFolder, number: int = 0) -> list[Blob]:
    """Return the copies of files that a record names."""
    return list(read_file(folder)[0][number].blobs)


def resolved(folder: RunFolder, number: int = 0, trusted: list[str] | None = None) -> Any:
    """Return an event as sinks get it."""
    return FileResolver(folder, trusted or []).resolve(read_file(folder)[0][number]).event


def test_line_is_json_with_a_checksum_of_its_rest(
    folder: RunFolder, journal: JournalWriter
) -> None:
    """A line is JSON whose first field is the CRC-32 of all bytes from the next quote on."""
    records = [journal.append(event, 1.5) for event in SAMPLE]
    lines = folder.records(1).read_bytes().split(b"\n")
    assert b"" == lines.pop()
    for line, record in zip(lines, records, strict=True):
        assert b'{"crc":"%08x","' % crc32(line[18:]) == line[:19]
        told = json.loads(line)
        assert ["crc", "seq", "run"] == list(told)[:3]
        assert (record.seq, "run", 1.5, 1, 0, 1) == tuple(
            told[key] for key in ("seq", "run", "time", "attempt", "rank", "schema")
        )
        assert ev.event_name(record.event) == told["event"]["type"]
    assert list(map(as_json, records)) == list(map(as_json, read_records(folder)))


def test_record_is_one_write(journal: JournalWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every record reaches the system in one call, large and small ones alike."""
    disk = Disk(journal.fileno(), lambda call: None)
    monkeypatch.setattr(os, "write", disk)
    large = ev.TextLogged(key="t", text="x" * 900_000)
    for event in (*SAMPLE, large):
        journal.append(event, 1.0)
    assert len(SAMPLE) + 1 == disk.calls


@pytest.mark.needs("posix")
def test_only_the_owner_may_read_a_run(
    folder: RunFolder, journal: JournalWriter, tmp_path: Path
) -> None:
    """Directories of a run are 0700 and files 0600, also those that a later process writes."""
    picture = tmp_path / "a.png"
    picture.write_bytes(b"png")
    journal.append(ev.ImageLogged(key="k", path=str(picture)), 1.0)
    journal.append(ev.ImageLogged(key="k", array=np.zeros(2**16, np.uint8)), 1.0)
    end = ev.Record(seq=3, run="run", time=1.0, event=ev.RunEnded(status="failed"))
    assert write_end(folder, end)
    paths = [folder.path, *folder.path.rglob("*")]
    modes = {
        str(path.relative_to(folder.path)): oct(stat.S_IMODE(path.stat().st_mode)) for path in paths
    }
    expected = {
        str(path.relative_to(folder.path)): oct(0o700 if path.is_dir() else 0o600) for path in paths
    }
    assert expected == modes
    assert 8 == len(paths)


def test_second_journal_gets_the_next_attempt(folder: RunFolder) -> None:
    """No two journals share a file: each gets the first attempt that is free."""
    first, second, later, after = (JournalWriter(folder, attempt) for attempt in (1, 1, 7, 1))
    assert [1, 2, 7, 8] == [j.attempt for j in (first, second, later, after)]
    for opened in (first, second, later, after):
        record = opened.append(SAMPLE[1], 1.0)
        assert (opened.attempt, 1) == record.position
        opened.close()
    assert [1, 2, 7, 8] == folder.attempts()


def test_ranks_have_files_of_their_own(folder: RunFolder) -> None:
    """Another rank counts its attempts by itself."""
    first, second = JournalWriter(folder), JournalWriter(folder, rank=1)
    assert (1, 1) == (first.attempt, second.attempt)
    assert 1 == second.append(SAMPLE[1], 1.0).rank
    first.close()
    second.close()
    assert [0, 1] == folder.ranks(1)


def test_journal_that_cannot_be_created_says_why(tmp_path: Path) -> None:
    """A run's directory that is gone is a JournalError with the path and the cause."""
    folder = RunFolder(tmp_path / "gone")
    with pytest.raises(JournalError, match=r"gone/r0-a1\.jsonl can't be created: No such file"):
        JournalWriter(folder)


def test_closing_twice_is_nothing(journal: JournalWriter) -> None:
    """A journal that is closed can be closed again."""
    journal.close()
    journal.close()
    assert -1 == journal.fileno()


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64", "int64", "bool"])
def test_large_array_is_kept_beside_the_journal(
    folder: RunFolder, journal: JournalWriter, dtype: str
) -> None:
    """An array over 32 KiB is a blob, and what is done to it after the append does no harm."""
    array = np.arange(300 * 200).reshape(300, 200).astype(dtype)
    before = array.copy()
    journal.append(ev.ImageLogged(key="k", array=array), 1.0)
    array[:] = 0
    assert folder.records(1).stat().st_size < 1_000
    event: Any = read_records(folder)[0].event
    assert dtype == event.array.dtype
    np.testing.assert_array_equal(before, event.array)


def test_small_array_stays_in_its_line(folder: RunFolder, journal: JournalWriter) -> None:
    """An array below 32 KiB makes no blob."""
    journal.append(ev.ImageLogged(key="k", array=np.zeros(32 * 2**10 - 1, np.uint8)), 1.0)
    assert [] == blob_files(folder)
    event: Any = read_records(folder)[0].event
    assert (32 * 2**10 - 1,) == event.array.shape


def test_odd_arrays_come_back(folder: RunFolder, journal: JournalWriter) -> None:
    """Transposed, strided and non-finite arrays are read back equal."""
    base = np.random.default_rng(0).normal(size=(200, 400))
    base[0, :3] = [np.nan, np.inf, -np.inf]
    for array in (base, base.T, base[::2, ::-1], np.asfortranarray(base), base.astype(">f8")):
        journal.append(ev.ImageLogged(key="k", array=array), 1.0)
    found: list[Any] = [record.event for record in read_records(folder)]
    for array, event in zip(
        (base, base.T, base[::2, ::-1], base, base), (e.array for e in found), strict=True
    ):
        np.testing.assert_array_equal(array, event)


@pytest.mark.parametrize("fate", ["overwritten", "deleted", "truncated", "replaced"])
def test_picture_is_kept_as_it_was(
    folder: RunFolder, journal: JournalWriter, tmp_path: Path, fate: str
) -> None:
    """Whatever happens to a picture's file after the append, its bytes are those at the append."""
    picture = tmp_path / "a b.png"
    content = bytes(range(256)) * 20
    picture.write_bytes(content)
    journal.append(ev.ImageLogged(key="k", path=str(picture)), 1.0)
    if fate == "overwritten":
        with picture.open("r+b") as file:
            file.write(b"other")
    elif fate == "deleted":
        picture.unlink()
    elif fate == "truncated":
        os.truncate(picture, 0)
    else:
        (tmp_path / "new").write_bytes(b"new")
        (tmp_path / "new").replace(picture)
    blob = blob_of(folder)[0]
    assert (str(picture), hashlib.sha256(content).hexdigest()) == (blob.path, blob.sha256)
    assert ("a_b.png", len(content)) == (blob.name, blob.size)
    assert content == Path(resolved(folder).path).read_bytes()


@pytest.mark.needs("posix")
def test_missing_picture_is_a_record_all_the_same(
    folder: RunFolder, journal: JournalWriter, tmp_path: Path
) -> None:
    """A file that is not there, or no file at all, costs nothing but its copy."""
    os.mkfifo(tmp_path / "pipe")
    paths = [str(tmp_path / "none.png"), str(tmp_path), str(tmp_path / "pipe"), "a\0b", ""]
    for path in paths:
        journal.append(ev.ImageLogged(key="k", path=path), 1.0)
    entries, file = read_file(folder)
    found: list[Any] = [entry.record.event for entry in entries]
    assert paths == [event.path for event in found]
    assert ([], 0) == ([blob for entry in entries for blob in entry.blobs], file.damaged)


def test_same_content_is_stored_once(
    folder: RunFolder, journal: JournalWriter, tmp_path: Path
) -> None:
    """An image that is logged repeatedly is stored once."""
    for n in range(3):
        picture = tmp_path / str(n) / "a.png"
        picture.parent.mkdir()
        picture.write_bytes(b"same" * 100)
        journal.append(ev.ImageLogged(key="k", path=str(picture)), 1.0)
        journal.append(ev.ImageLogged(key="k", array=np.zeros(2**16, np.uint8)), 1.0)
    assert 2 == len(blob_files(folder))
    assert [b"same" * 100] * 3 == [
        Path(resolved(folder, n).path).read_bytes() for n in range(0, 6, 2)
    ]


@pytest.mark.parametrize("wants_files", [True, False])
@pytest.mark.parametrize("final", [True, False])
def test_only_a_final_checkpoint_that_is_wanted_is_copied(
    folder: RunFolder, tmp_path: Path, final: bool, wants_files: bool
) -> None:
    """A checkpoint is copied if it is written no more, and if a sink wants it."""
    weights = tmp_path / "best.pt"
    weights.write_bytes(b"weights")
    asked = []

    def keeper(event: ev.CheckpointSaved | ev.ArtifactLogged) -> bool:
        """Remember what was asked for."""
        asked.append(event)
        return wants_files

    journal = JournalWriter(folder, wants_files=keeper)
    event = ev.CheckpointSaved(path=str(weights), kind="best", final=final)
    journal.append(event, 1.0)
    journal.close()
    assert [event] == asked
    assert int(final and wants_files) == len(blob_of(folder)) == len(blob_files(folder))


def test_files_of_an_artifact_are_copied(
    folder: RunFolder, journal: JournalWriter, tmp_path: Path
) -> None:
    """All files of an artifact that is wanted are kept, under the paths that it names."""
    paths = [tmp_path / name for name in ("a.txt", "b.txt", "none.txt")]
    for path in paths[:2]:
        path.write_text(path.name)
    journal.append(ev.ArtifactLogged(name="n", paths=[str(path) for path in paths]), 1.0)
    assert [str(path) for path in paths[:2]] == [blob.path for blob in blob_of(folder)]
    for path in paths[:2]:
        path.unlink()
    found = [Path(path) for path in resolved(folder).paths]
    assert ["a.txt", "b.txt"] == [path.read_text() for path in found[:2]]
    assert (False, "none.txt") == (found[2].exists(), found[2].name)


def big_table(rows: int = 100_000) -> ev.TableLogged:
    """Return a table that is too long for a line."""
    return ev.TableLogged(
        key="t", columns=["n", "x", "s"], rows=[[n, n / 7, f"row {n}"] for n in range(rows)]
    )


def test_long_event_is_kept_beside_the_journal(folder: RunFolder, journal: JournalWriter) -> None:
    """A table of 100,000 rows leaves a short line and comes back equal."""
    table = big_table()
    journal.append(table, 1.0)
    journal.append(SAMPLE[1], 2.0)
    first, second = folder.records(1).read_bytes().splitlines()
    assert len(first) < 1_000
    assert ["type", "blob"] == list(json.loads(first)["event"])
    assert (1, 2) == (json.loads(first)["seq"], json.loads(second)["seq"])
    entries, file = read_file(folder)
    assert [table, SAMPLE[1]] == [entry.record.event for entry in entries]
    assert 0 == file.damaged


@pytest.mark.parametrize(("rows", "is_kept"), [(10_000, True), (20_000, False)])
def test_long_event_without_room_as_a_blob(rows: int, is_kept: bool, folder: RunFolder) -> None:
    """It stays in its line if lines of that length can be read; else it is dropped and reported."""
    journal = JournalWriter(folder, max_bytes=1_000)
    table = ev.TableLogged(key="t", columns=["s"], rows=[["x" * 1_000]] * rows)
    journal.append(table, 1.0)
    journal.append(SAMPLE[1], 1.0)
    journal.close()
    entries, file = read_file(folder)
    first = entries[0].record.event
    assert (2, 0) == (len(entries), file.damaged)
    assert (first == table) == is_kept
    if not is_kept:
        assert isinstance(first, ev.AlertRaised)
        assert first.text.startswith("1 table.logged dropped")


def test_budget_leaves_out_step_metrics_alone(folder: RunFolder) -> None:
    """A journal that is full keeps all but step metrics, and says how many it left out."""
    clock = Clock()
    journal = JournalWriter(folder, max_bytes=5_000, clock=clock)
    journal.append(SAMPLE[0], 1.0)
    for n in range(200):
        journal.append(step(n), 1.0)
        if n % 20 == 19:
            journal.append(epoch(n), 1.0)
    end = journal.append(ev.RunEnded(status="finished"), 2.0)
    journal.close()
    records = read_records(folder)
    kept = [record.event.step for record in records if isinstance(record.event, ev.MetricsLogged)]
    steps = [n for n in kept if n is not None]
    assert list(range(len(steps))) == steps
    assert 0 < len(steps) < 60
    assert 10 == kept.count(None)
    assert end == records[-1]
    lost = 200 - len(steps)
    assert Counter({"metrics.logged": lost}) == journal.dropped
    alerts = [r.event for r in records if isinstance(r.event, ev.AlertRaised)]
    told = [int(alert.text.split()[0]) for alert in alerts]
    assert lost == sum(told)
    assert records[-2].event == alerts[-1]
    assert "metrics.logged dropped: the journal has reached 5000 bytes" in alerts[-1].text


def test_budget_makes_no_copies_that_do_not_fit(folder: RunFolder, tmp_path: Path) -> None:
    """A file that is larger than what is left is not copied; the next one that fits is."""
    large, small = tmp_path / "large.png", tmp_path / "small.png"
    large.write_bytes(b"x" * 6_000)
    small.write_bytes(b"x" * 1_000)
    journal = JournalWriter(folder, max_bytes=5_000)
    for path in (large, small):
        journal.append(ev.ImageLogged(key="k", path=str(path)), 1.0)
    journal.close()
    assert [0, 1] == [len(blob_of(folder, n)) for n in range(2)]


def mixed(call: int) -> int | BaseException | None:
    """Fail in another way at each call."""
    faults: list[int | BaseException | None] = [40, OSError(errno.EIO, "EIO"), 7]
    return faults[call % 3]


FAULTS: dict[str, Callable[[int], int | BaseException | None]] = {
    "full": lambda call: OSError(errno.ENOSPC, "No space left on device"),
    "broken": lambda call: OSError(errno.EIO, "Input/output error"),
    "quota": lambda call: OSError(errno.EDQUOT, "Disk quota exceeded"),
    "half": lambda call: 40,
    "nothing": lambda call: 0,
    "one byte": lambda call: 1,
    "mixed": mixed,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_disk_that_recovers_gets_all_records_in_order(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """While the disk is full records wait, and are written in order once there is space."""
    clock = Clock()
    journal = JournalWriter(folder, clock=clock)
    disk = Disk(journal.fileno(), lambda call: None)
    monkeypatch.setattr(os, "write", disk)
    written = [journal.append(event, 1.0) for event in SAMPLE[:3]]
    disk.plan = FAULTS[fault]
    written += [journal.append(event, 2.0) for event in SAMPLE[3:6]]
    assert [1, 2, 3] == seqs(folder)
    assert 3 == len(journal.held)
    clock.now = 60.0  # the second try fails too
    written.append(journal.append(SAMPLE[6], 3.0))
    assert [1, 2, 3] == seqs(folder)
    disk.plan = lambda call: None
    written.append(journal.append(SAMPLE[7], 3.5))  # too early for another try
    assert [1, 2, 3] == seqs(folder)
    clock.now = 120.0
    written += [journal.append(event, 4.0) for event in SAMPLE[8:]]
    journal.close()
    assert list(range(1, 11)) == seqs(folder)
    assert list(map(as_json, written)) == list(map(as_json, read_records(folder)))
    assert ([], Counter()) == (journal.held, journal.dropped)


def test_end_does_not_wait_for_another_try(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's end tries at once to write what waits, before itself."""
    journal = JournalWriter(folder, clock=Clock())
    disk = Disk(journal.fileno(), lambda call: OSError(errno.ENOSPC, "full") if call == 0 else None)
    monkeypatch.setattr(os, "write", disk)
    journal.append(SAMPLE[0], 1.0)
    journal.append(SAMPLE[1], 1.0)
    assert [] == seqs(folder)
    journal.append(SAMPLE[-1], 1.0)
    journal.close()
    assert [1, 2, 3] == seqs(folder)
    assert journal.ended


def test_disk_that_stays_full_leaves_the_records_to_the_reader(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records that never got to the disk can be handed to a reader, which returns all."""
    journal = JournalWriter(folder)
    disk = Disk(journal.fileno(), lambda call: None if call < 4 else 11)
    monkeypatch.setattr(os, "write", disk)
    written = [journal.append(event, 1.0) for event in SAMPLE]
    reader = RunReader(folder)
    found = [entry.record for entry in reader.read()]
    reader.add(journal.held)
    while entries := reader.read():
        found += [entry.record for entry in entries]
    reader.close()
    journal.close()
    assert list(map(as_json, written)) == list(map(as_json, found))


def test_random_faults_of_the_disk_lose_nothing(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a third of all writes failing in any way, every record is there once, in order."""
    chance = np.random.default_rng(7)
    clock = Clock()
    journal = JournalWriter(folder, clock=clock)

    def plan(call: int) -> int | BaseException | None:
        """Fail one call in three."""
        faults: list[int | BaseException | None] = [OSError(errno.EIO, "EIO"), 0, 1, 60]
        return faults[chance.integers(4)] if chance.random() < 1 / 3 else None

    disk = Disk(journal.fileno(), plan)
    monkeypatch.setattr(os, "write", disk)
    for n in range(500):
        clock.now += float(chance.integers(8))
        journal.append(step(n), 1.0)
    disk.plan = lambda call: None
    journal.append(SAMPLE[-1], 1.0)
    journal.close()
    assert list(range(1, 502)) == seqs(folder)


def test_torn_line_that_cannot_be_cut_off_harms_no_other(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a short write can't be undone at once, no later record is lost, not even with Ctrl-C."""
    clock = Clock()
    journal = JournalWriter(folder, clock=clock)
    disk = Disk(journal.fileno(), lambda call: 40 if call == 1 else None)
    real = os.ftruncate
    failed: list[int] = []

    def ftruncate(fd: int, length: int) -> None:
        """Fail the first time."""
        if not failed:
            failed.append(length)
            raise OSError(errno.EIO, "EIO")
        real(fd, length)

    monkeypatch.setattr(os, "write", disk)
    monkeypatch.setattr(os, "ftruncate", ftruncate)
    for n in range(4):
        journal.append(epoch(n), 1.0)
        clock.now += 10.0
    disk.plan = lambda call: KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        journal.append(epoch(4), 1.0)
    disk.plan = lambda call: None
    journal.append(epoch(5), 1.0)
    journal.close()
    values = [r.event.epoch for r in read_records(folder) if isinstance(r.event, ev.MetricsLogged)]
    assert [0, 1, 2, 3, 5] == values
    assert [1, 2, 3, 4, 5] == seqs(folder)


def test_memory_limit_drops_step_metrics_first(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where too much waits, the oldest step metrics go, and an alert says how many."""
    monkeypatch.setattr(journals_module, "MAX_HELD", 4_000)
    clock = Clock()
    journal = JournalWriter(folder, clock=clock)
    disk = Disk(journal.fileno(), lambda call: OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(os, "write", disk)
    journal.append(SAMPLE[0], 1.0)
    for n in range(100):
        journal.append(step(n), 1.0)
        if n % 10 == 9:
            journal.append(epoch(n), 1.0)
    assert sum(map(len, journal.held)) <= 4_000
    disk.plan = lambda call: None
    clock.now = 60.0
    journal.append(ev.RunEnded(status="finished"), 2.0)
    journal.close()
    records = read_records(folder)
    assert sorted(seqs(folder)) == seqs(folder)
    assert SAMPLE[0] == records[0].event
    metrics = [r.event for r in records if isinstance(r.event, ev.MetricsLogged)]
    assert [epoch(n) for n in range(9, 100, 10)] == [m for m in metrics if m.step is None]
    steps = [m.step for m in metrics if m.step is not None]
    assert list(range(100 - len(steps), 100)) == steps
    lost = journal.dropped["metrics.logged"]
    assert 100 - len(steps) == lost
    assert 0 < lost < 100
    alert: Any = records[-2].event
    assert f"{lost} metrics.logged dropped: No space left on device" == alert.text
    assert isinstance(records[-1].event, ev.RunEnded)


def test_memory_limit_keeps_the_last_record(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no step metrics are left to drop, the oldest records go, and the end stays."""
    monkeypatch.setattr(journals_module, "MAX_HELD", 1_000)
    journal = JournalWriter(folder, clock=Clock())
    disk = Disk(journal.fileno(), lambda call: OSError(errno.ENOSPC, "full"))
    monkeypatch.setattr(os, "write", disk)
    for n in range(50):
        journal.append(epoch(n), 1.0)
    journal.append(SAMPLE[-1], 1.0)
    lines = [json.loads(line)["event"]["type"] for line in journal.held]
    journal.close()
    assert "run.ended" == lines[-1]
    assert 51 - len(lines) == journal.dropped["metrics.logged"]


def interrupt(at: int, journal: JournalWriter, event: ev.Event, returned: list[ev.Record]) -> bool:
    """Append with Ctrl-C at the k-th line that is run; return whether it came before the end."""
    left = at
    interrupted = []

    def trace(frame: FrameType, what: str, arg: Any) -> Any:
        """Count the lines of the journal's module."""
        nonlocal left
        if frame.f_code.co_filename != journals_module.__file__:
            return None
        if what == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    def append() -> None:
        """Append in a thread, whose end also ends the exceptions that were being handled."""
        sys.settrace(trace)
        try:
            returned.append(journal.append(event, 1.0))
        except KeyboardInterrupt:
            interrupted.append(True)
        finally:
            sys.settrace(None)

    thread = threading.Thread(target=append)
    thread.start()
    thread.join()
    return bool(interrupted)


SCENES: dict[str, ev.Event] = {
    "metric": step(7),
    "synced": ev.ParamsUpdated(params={"lr": 1}),
    "array": ev.ImageLogged(key="k", array=np.zeros(2**16, np.uint8)),
    "file": ev.ImageLogged(key="k", path=__file__),
    "long": ev.TextLogged(key="t", text="x" * 2**20),
    "end": ev.RunEnded(status="finished"),
}


@pytest.mark.parametrize("scene", SCENES)
def test_ctrl_c_at_any_line_of_an_append_does_no_harm(tmp_path: Path, scene: str) -> None:
    """Whichever line Ctrl-C interrupts, later records have unique seqs without gaps."""
    faults = []
    for at in itertools.count(1):
        folder = folder_in(tmp_path, f"run{at}")
        journal = JournalWriter(folder)
        returned = [journal.append(epoch(n), 1.0) for n in range(2)]
        interrupted = interrupt(at, journal, SCENES[scene], returned)
        returned += [journal.append(epoch(n), 1.0) for n in range(2, 4)]
        journal.close()
        if fault := damage(folder, returned):
            faults.append((at, fault))
        if not interrupted:
            break
    assert [] == faults
    assert at > 15


def damage(folder: RunFolder, returned: list[ev.Record], gapless: bool = True) -> str:
    """Return what is wrong with a journal into which these records were written, or nothing."""
    found = seqs(folder)
    if len(set(found)) != len(found):
        return f"twice: {found}"
    if gapless and found != list(range(1, len(found) + 1)):
        return f"gaps: {found}"
    told = Counter(map(as_json, read_records(folder)))
    missing = [record.seq for record in returned if told[as_json(record)] != 1]
    return f"not there once: {missing} of {found}" if missing else ""


def test_ctrl_c_while_waiting_records_are_written_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while waiting records are written neither repeats nor loses a record."""
    faults = []
    for at in itertools.count(1):
        folder, clock = folder_in(tmp_path, f"run{at}"), Clock()
        journal = JournalWriter(folder, clock=clock)
        disk = Disk(journal.fileno(), lambda call: OSError(errno.ENOSPC, "full"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", disk)
            returned = [journal.append(epoch(n), 1.0) for n in range(3)]
            disk.plan = lambda call: None
            clock.now = 60.0
            interrupted = interrupt(at, journal, epoch(3), returned)
            clock.now = 120.0
            returned += [journal.append(epoch(n), 1.0) for n in range(4, 6)]
        journal.close()
        if fault := damage(folder, returned):
            faults.append((at, fault))
        if not interrupted:
            break
    assert [] == faults


def test_ctrl_c_while_the_disk_is_full_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a write fails half-way leaves neither half a line nor a gap."""
    faults = []
    for at in itertools.count(1):
        folder, clock = folder_in(tmp_path, f"run{at}"), Clock()
        journal = JournalWriter(folder, clock=clock)
        with monkeypatch.context() as patch:
            disk = Disk(journal.fileno(), lambda call: None)
            patch.setattr(os, "write", disk)
            returned = [journal.append(epoch(n), 1.0) for n in range(2)]
            disk.plan = lambda call: 30
            interrupted = interrupt(at, journal, epoch(2), returned)
            disk.plan = lambda call: None
            clock.now = 60.0
            returned += [journal.append(epoch(n), 1.0) for n in range(3, 5)]
        journal.close()
        if fault := damage(folder, returned):
            faults.append((at, fault))
        if not interrupted:
            break
    assert [] == faults


def test_ctrl_c_at_the_budget_repeats_no_seq(tmp_path: Path) -> None:
    """Ctrl-C while a step metric is left out harms no record that is kept."""
    faults = []
    for at in itertools.count(1):
        folder = folder_in(tmp_path, f"run{at}")
        journal = JournalWriter(folder, max_bytes=300, clock=Clock())
        kept = [journal.append(epoch(n), 1.0) for n in range(3)]
        interrupted = interrupt(at, journal, step(1), [])
        kept += [journal.append(epoch(n), 1.0) for n in range(3, 5)]
        journal.close()
        if fault := damage(folder, kept, gapless=False):
            faults.append((at, fault))
        if not interrupted:
            break
    assert [] == faults


def interrupted_write(journal: JournalWriter, part: int | None) -> Callable[[int, bytes], int]:
    """Return an `os.write` that is interrupted after some bytes of a line, or after all."""
    real = os.write

    def write(fd: int, data: bytes) -> int:
        """Write a part, and be interrupted if it is the journal's file."""
        if fd != journal.fileno():
            return real(fd, data)
        if part != 0:
            real(fd, data[:part])
        raise KeyboardInterrupt

    return write


@pytest.mark.parametrize("part", [0, 1, 40, -1, None])
def test_ctrl_c_around_the_write_does_no_harm(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, part: int | None
) -> None:
    """Whether Ctrl-C comes before, in or after the write, a line is there whole or not at all."""
    journal = JournalWriter(folder)
    returned = [journal.append(epoch(0), 1.0)]
    for n in range(1, 4):
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", interrupted_write(journal, part))
            with pytest.raises(KeyboardInterrupt):
                journal.append(epoch(n), 1.0)
        returned.append(journal.append(epoch(10 + n), 1.0))
    journal.close()
    assert "" == damage(folder, returned)
    assert (7 if part is None else 4) == len(seqs(folder))


@pytest.mark.parametrize("part", [0, 40, None])
def test_second_ctrl_c_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int | None
) -> None:
    """Ctrl-C in the append after one that was interrupted repeats no seq and cuts nothing off."""
    faults = []
    for at in itertools.count(1):
        folder = folder_in(tmp_path, f"run{at}")
        journal = JournalWriter(folder)
        returned = [journal.append(epoch(0), 1.0)]
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", interrupted_write(journal, part))
            with pytest.raises(KeyboardInterrupt):
                journal.append(epoch(1), 1.0)
        interrupted = interrupt(at, journal, epoch(2), returned)
        returned += [journal.append(epoch(n), 1.0) for n in range(3, 5)]
        journal.close()
        if fault := damage(folder, returned):
            faults.append((at, fault))
        if not interrupted:
            break
    assert [] == faults


def test_end_that_was_interrupted_is_known(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After Ctrl-C in the write of a run's end, the journal knows whether the end is there."""
    journal = JournalWriter(folder)
    journal.append(SAMPLE[0], 1.0)
    for part, expected in ((0, False), (40, False), (None, True)):
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", interrupted_write(journal, part))
            with pytest.raises(KeyboardInterrupt):
                journal.append(SAMPLE[-1], 1.0)
        assert expected == journal.ended
    journal.close()
    assert [1, 2] == seqs(folder)


def test_end_is_written_in_an_attempts_place_once(folder: RunFolder) -> None:
    """The first process to write an end wins, and the others leave it as it is."""
    ends = [
        ev.Record(seq=4, run="run", time=float(n), event=ev.RunEnded(status="failed"), attempt=2)
        for n in range(3)
    ]
    assert [True, False, False] == [write_end(folder, end) for end in ends]
    assert [ends[0]] == read_records(folder, folder.end(2))
    assert ["r0-a2-end.jsonl"] == [path.name for path in folder.path.iterdir()]


def test_end_that_cannot_be_written_leaves_nothing(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If an end can't be written, neither an end nor a temporary file remains."""
    end = ev.Record(seq=4, run="run", time=1.0, event=ev.RunEnded(status="failed"))

    def fsync(fd: int) -> None:
        """Find the disk full."""
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            write_end(folder, end)
    assert [] == list(folder.path.iterdir())
    assert write_end(folder, end)


def test_blob_that_cannot_be_written_costs_no_record(folder: RunFolder, tmp_path: Path) -> None:
    """Where no blob can be stored, arrays and long events stay in their lines."""
    folder.blobs.write_text("in the way")
    picture = tmp_path / "a.png"
    picture.write_bytes(b"png")
    journal = JournalWriter(folder)
    array = np.arange(2**14, dtype=np.int32)
    journal.append(ev.ImageLogged(key="k", array=array), 1.0)
    journal.append(ev.ImageLogged(key="k", path=str(picture)), 1.0)
    table = big_table(40_000)
    journal.append(table, 1.0)
    journal.close()
    entries, file = read_file(folder)
    found: list[Any] = [entry.record.event for entry in entries]
    np.testing.assert_array_equal(array, found[0].array)
    assert (str(picture), table, 0) == (found[1].path, found[2], file.damaged)
    assert isinstance(entries[1], Entry)
    assert msgspec.json.encode(list(entries[1].blobs)) == b"[]"
