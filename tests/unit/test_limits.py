"""What is bounded stays within its bounds, and what is counted is counted right."""

from __future__ import annotations

import errno
import json
import os
import tracemalloc
from pathlib import Path

import pytest

from support.journals import Disk, folder_in, read_file, read_records, write_journal
from trainbus.events import (
    AlertRaised,
    EpochStarted,
    Event,
    MetricsLogged,
    ParamsUpdated,
    Record,
    RunEnded,
    TextLogged,
)
from trainbus.journal import writer as journals
from trainbus.journal.directory import RunFolder
from trainbus.journal.encoding import seal
from trainbus.journal.writer import JournalWriter

MIB = 2**20
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """The directory of a run."""
    return folder_in(tmp_path)


def epoch(n: int) -> MetricsLogged:
    """Return a metric of an epoch, which is dropped last."""
    return MetricsLogged(values={"map": 0.5}, phase="validation", epoch=n)


def peak_of_reading(folder: RunFolder) -> tuple[int, int]:
    """Return the bytes that reading a records file took at most, and what it found damaged."""
    tracemalloc.start()
    try:
        _, file = read_file(folder)
        return tracemalloc.get_traced_memory()[1], file.damaged
    finally:
        tracemalloc.stop()


# Memory of the writer


def test_a_disk_that_takes_a_record_now_and_then_costs_none(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written records no longer count as waiting, so none is dropped."""
    monkeypatch.setattr(journals, "MAX_HELD", 2_000)
    now = 0.0
    journal = JournalWriter(folder, clock=lambda: now)
    # Three records wait; from then on each try gets one of them to the disk.
    disk = Disk(journal.fileno(), lambda call: FULL if call < 3 or call % 2 == 0 else None)
    monkeypatch.setattr(os, "write", disk)
    longest = 0
    for n in range(100):
        now += 60.0
        journal.append(epoch(n), 1.0)
        longest = max(longest, sum(map(len, journal.held)))
    disk.plan = lambda call: None
    journal.append(RunEnded(status="finished"), 2.0)
    journal.close()
    assert longest < 1_000
    assert {} == journal.dropped
    assert [*range(1, 102)] == [record.seq for record in read_records(folder)]


def test_what_waits_in_memory_is_bounded_whatever_the_disk_does(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With records of all sizes and a disk that comes and goes, each is written or counted."""
    monkeypatch.setattr(journals, "MAX_HELD", 5_000)
    now = 0.0
    journal = JournalWriter(folder, clock=lambda: now)
    disk = Disk(journal.fileno(), lambda call: None if call % 7 == 0 else FULL)
    monkeypatch.setattr(os, "write", disk)
    written: list[Record] = []
    for n in range(400):
        now += 3.0
        event: Event = TextLogged(key="t", text="x" * (n * 37 % 1500)) if n % 3 else epoch(n)
        written.append(journal.append(event, 1.0))
        assert sum(map(len, journal.held)) <= 5_000
    disk.plan = lambda call: None
    journal.append(RunEnded(status="finished"), 2.0)
    journal.close()
    found = read_records(folder)
    alerts = [r.event for r in found if isinstance(r.event, AlertRaised)]
    told = sum(
        int(part.split()[0]) for a in alerts for part in a.text.split(" could")[0].split(",")
    )
    assert journal.dropped.total() == told
    kept = {record.seq for record in found}
    assert journal.dropped.total() == sum(record.seq not in kept for record in written)
    assert sorted(kept) == [record.seq for record in found]


# Memory of the reader


def test_an_endless_line_takes_no_memory(folder: RunFolder) -> None:
    """Of 300 MiB without a line feed, at most twice the longest line is held in memory."""
    with folder.records(1).open("wb") as file:
        file.truncate(300 * MIB)  # takes no room on the disk
        file.seek(0, os.SEEK_END)
        file.write(b"\n")
    peak, damaged = peak_of_reading(folder)
    assert peak < 48 * MIB
    assert 1 == damaged


def test_many_damaged_lines_take_little_memory(folder: RunFolder) -> None:
    """What is wrong with a million lines is not all kept."""
    line = seal(b'{"seq":1,"run":"run","time":1.0,"event":{"type":"image.logged","key":1}}')
    folder.records(1).write_bytes(line * 200_000)
    assert peak_of_reading(folder)[0] < 16 * MIB


# Counts of the reader


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_every_damaged_record_is_counted(folder: RunFolder, where: str, count: int) -> None:
    """As many records as were damaged are counted, also where no whole one comes after them."""
    write_journal(folder, *map(epoch, range(12)))
    lines = folder.records(1).read_bytes().splitlines(keepends=True)
    first = {"first": 0, "middle": 4, "last": 12 - count}[where]
    for n in range(first, first + count):
        lines[n] = lines[n][:60] + b"#" + lines[n][61:]
    folder.records(1).write_bytes(b"".join(lines))
    entries, file = read_file(folder)
    assert 12 - count == len(entries)
    assert (count, 0) == (file.damaged, file.missing)


@pytest.mark.parametrize(
    "params", [{"crc": "x"}, {"a": {"crc": "00000000"}}, {"b": [{"crc": "1"}]}]
)
def test_a_lost_line_feed_costs_one_record_whatever_the_next_one_says(
    folder: RunFolder, params: dict[str, object]
) -> None:
    """A record behind a damaged line feed is found, also if a parameter is called `crc`."""
    write_journal(folder, epoch(0), ParamsUpdated(params=params), EpochStarted(epoch=1))
    data = bytearray(folder.records(1).read_bytes())
    data[data.index(b"\n")] ^= 1
    folder.records(1).write_bytes(data)
    entries, file = read_file(folder)
    assert [2, 3] == [entry.record.seq for entry in entries]
    assert (1, 0) == (file.damaged, file.missing)


def test_no_record_can_be_hidden_inside_another(folder: RunFolder) -> None:
    """A parameter that contains a journal line is not read as one, damaged or not."""
    body = {"seq": 2, "run": "run", "time": 1.0, "event": {"type": "epoch.started", "epoch": 7}}
    hidden = json.loads(seal(json.dumps(body, separators=(",", ":")).encode()))
    text = seal(json.dumps(body, separators=(",", ":")).encode()).decode()
    write_journal(folder, ParamsUpdated(params=hidden), TextLogged(key="t", text=text), epoch(1))
    data = folder.records(1).read_bytes()
    found = []
    for at in range(len(data)):
        folder.records(1).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        found += [type(record.event) for record in read_records(folder)]
    assert {ParamsUpdated, TextLogged, MetricsLogged} == set(found)
