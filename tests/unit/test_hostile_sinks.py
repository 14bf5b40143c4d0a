"""A run's directory that a stranger prepared: links, cursors, markers and values set as traps."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.emitting import emit
from support.journals import SAMPLE, folder_in, read_file, read_run, write_journal, write_lines
from trainbus import Bus, JournalSpec, Record, SinkSpec
from trainbus.delivery.receipt import Receipt, SinkReport
from trainbus.delivery.worker import SinkWorker
from trainbus.events import (
    Event,
    ImageLogged,
    ParamsUpdated,
    Resumed,
    RunEnded,
    RunStarted,
    TextLogged,
)
from trainbus.journal.blobs import Blob
from trainbus.journal.directory import RunFolder
from trainbus.journal.encoding import Entry
from trainbus.journal.file_access import FileResolver
from trainbus.journal.reader import RunReader
from trainbus.recording.run_id import MARKER
from trainbus.testing import MemorySink

SECRET = "secret of the host"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """The directory of a run, with a file and a folder beside it that are none of its business."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "secret").write_text(SECRET)
    return folder_in(tmp_path)


class Picky(MemorySink):
    """Rejects every call with a text, an image or parameters in it."""

    def write(self, records: Sequence[Record]) -> None:
        """Refuse, or keep."""
        if any(isinstance(r.event, TextLogged | ImageLogged | ParamsUpdated) for r in records):
            raise ValueError("not this one")
        super().write(records)


class Replay:
    """A worker that sends a run to a sink, on a clock of its own."""

    def __init__(self, folder: RunFolder, sink: MemorySink) -> None:
        self.sink = sink
        self.now = 0.0
        route = SinkSpec(name="memory", kind="MemorySink", make=lambda: sink)
        self.cursor = folder.cursor(route.key)
        self.dead = folder.dead(route.key)
        self.worker = SinkWorker(
            route,
            folder,
            FileResolver(folder, []),
            attempt=1,
            is_replay=True,
            in_background=False,
            clock=lambda: self.now,
        )

    def drain(self, emitted: int) -> SinkReport:
        """Work until everything is sent, or nothing more can be, and return the report."""
        for _ in range(200):
            if self.worker.done or self.worker.main.stopped:
                break
            self.now += self.worker.step() + 100
        self.worker.close()
        return self.worker.report(emitted)


def picture(path: str, *blobs: Blob) -> Entry:
    """Return an entry with a picture."""
    event = ImageLogged(key="k", path=path)
    return Entry(Record(seq=1, run="run", time=1.0, event=event), blobs)


def path_given(files: FileResolver, entry: Entry) -> str:
    """Return the path that a sink is given for a picture."""
    event = files.resolve(entry).event
    assert isinstance(event, ImageLogged)
    assert event.path is not None
    return event.path


# What is read


@pytest.mark.parametrize("how", ["file", "folder"])
@pytest.mark.parametrize("trusts", [False, True])
@pytest.mark.needs("posix")
def test_what_stands_for_a_refused_file_opens_nothing(
    folder: RunFolder, tmp_path: Path, how: str, trusts: bool
) -> None:
    """A journal cannot put a link to where a sink is sent instead of a file it may not have."""
    nowhere = folder.path / "not-available"
    if how == "file":
        nowhere.mkdir()
        (nowhere / "secret").symlink_to(tmp_path / "secret")
    else:
        nowhere.symlink_to(tmp_path)
    files = FileResolver(folder, [tmp_path / "outside"] if trusts else [])
    assert not os.path.exists(path_given(files, picture("/elsewhere/secret")))


@pytest.mark.needs("posix")
def test_a_blob_folder_that_is_a_link_to_itself_is_damage(folder: RunFolder) -> None:
    """A loop of symbolic links is rejected like a link that leads out of the directory."""
    folder.blobs.symlink_to(folder.blobs)
    epoch = {"type": "epoch.started", "epoch": 1}
    blob = {"type": "text.logged", "blob": "0" * 64}
    write_lines(
        folder, {"seq": 1, "event": epoch}, {"seq": 2, "event": blob}, {"seq": 3, "event": epoch}
    )
    entries, file = read_file(folder)
    assert [1, 3] == [entry.record.seq for entry in entries]
    assert 1 == file.damaged


@pytest.mark.needs("posix")
def test_a_copy_in_a_folder_that_is_a_link_to_itself_is_damage(folder: RunFolder) -> None:
    """The copy of a file is not found where links lead round in a circle, and nothing raises."""
    folder.blobs.symlink_to(folder.blobs)
    files = FileResolver(folder, [])
    entry = picture("/x", Blob(path="/x", sha256="0" * 64, name="x", size=1))
    assert not os.path.exists(path_given(files, entry))
    assert 1 == len(files.damaged)


def test_records_of_other_attempts_hide_none(folder: RunFolder) -> None:
    """Records that claim to be of another attempt keep those of the true ones from nobody."""
    event = {"type": "epoch.started", "epoch": 1}
    claims = [(1, 1), (99, 1), (1, 2), (-5, 7), (2, 9), (1, 3)]
    write_lines(folder, *({"attempt": a, "seq": n, "event": event} for a, n in claims))
    write_journal(folder, *SAMPLE[:2])
    reader = RunReader(folder)
    found = [record.position for record in read_run(reader)]
    reader.close()
    assert [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)] == found


# What is written


@pytest.mark.parametrize("name", ["cursors", "dead"])
@pytest.mark.needs("posix")
def test_nothing_is_written_through_a_linked_folder(
    folder: RunFolder, tmp_path: Path, name: str
) -> None:
    """Cursors and dead letters are not written where a link in the run's directory leads."""
    write_journal(folder)
    (folder.path / name).symlink_to(tmp_path / "outside")
    Replay(folder, Picky()).drain(10)
    assert [] == os.listdir(tmp_path / "outside")


@pytest.mark.needs("posix")
def test_no_dead_letter_is_written_through_a_link(folder: RunFolder, tmp_path: Path) -> None:
    """A dead letter, whose text is the stranger's, is appended to no file outside."""
    write_journal(folder)
    replay = Replay(folder, Picky())
    replay.dead.parent.mkdir()
    replay.dead.symlink_to(tmp_path / "secret")
    report = replay.drain(10)
    assert (8, 2, 0) == (report.taken, report.dead, report.pending)
    assert SECRET == (tmp_path / "secret").read_text()


@pytest.mark.parametrize("name", ["receipt", "cursor", "lock"])
@pytest.mark.needs("posix")
def test_no_file_is_overwritten_through_a_link(
    folder: RunFolder, tmp_path: Path, name: str
) -> None:
    """Cursor, lock and receipt replace a link, or fail, but do not follow it."""
    write_journal(folder)
    replay = Replay(folder, MemorySink())
    replay.cursor.parent.mkdir()
    paths = {
        "receipt": folder.receipt,
        "cursor": replay.cursor,
        "lock": replay.cursor.with_suffix(".lock"),
    }
    paths[name].symlink_to(tmp_path / "secret")
    replay.drain(10)
    assert SECRET == (tmp_path / "secret").read_text()


# Cursors


@pytest.mark.parametrize("offset", [2**63 - 1, 2**63, 2**70, -1, -(2**70), 10**12, 7])
def test_a_cursor_with_a_wrong_offset_loses_nothing_silently(
    folder: RunFolder, offset: int
) -> None:
    """Wherever a cursor points, nothing raises, and unsent records are reported as pending."""
    write_journal(folder)
    replay = Replay(folder, MemorySink())
    replay.cursor.parent.mkdir()
    cursor = {"attempt": 1, "seq": 3, "taken": 3, "offset": offset}
    replay.cursor.write_text(json.dumps(cursor))
    report = replay.drain(10)
    assert report.taken + report.pending == 10
    assert report.taken - 3 == len(replay.sink.records)


@pytest.mark.parametrize(
    "cursor",
    [
        {"attempt": 1, "seq": 3, "uploads": list(range(-5, 3))},
        {"attempt": -1, "seq": 2**70},
        {"attempt": 1, "seq": -5, "skipped": 10**20},
        {"attempt": 1, "seq": "3"},
        [],
        None,
    ],
    ids=range(6),
)
def test_a_cursor_that_is_nonsense_raises_nothing(folder: RunFolder, cursor: object) -> None:
    """Whatever a cursor contains, the worker reaches the end of the run."""
    write_journal(folder)
    replay = Replay(folder, MemorySink())
    replay.cursor.parent.mkdir()
    replay.cursor.write_text(json.dumps(cursor))
    report = replay.drain(10)
    assert (True, None) == (replay.worker.done, report.error)


# Values


@pytest.mark.parametrize("depth", [15, 100, 400, 700, 900])
def test_nesting_that_can_just_be_read_harms_no_worker(folder: RunFolder, depth: int) -> None:
    """A sink may reject a record as deep as the reader accepts; all others are delivered."""
    deep = b"[" * depth + b"]" * depth
    line = b'{"seq":2,"run":"run","time":1.0,"event":{"type":"params.updated","params":{"n":null,'
    write_lines(
        folder,
        {"seq": 1, "event": {"type": "run.started"}},
        line + b'"a":%b}}}' % deep,
        {"seq": 3, "event": {"type": "run.ended", "status": "finished"}},
    )
    replay = Replay(folder, Picky())
    report = replay.drain(3)
    assert [RunStarted, RunEnded] == [type(event) for event in replay.sink.events]
    assert 2 == report.taken


# Markers


@pytest.mark.parametrize(
    "marker",
    [
        '{"run": "known", "attempt": Infinity}',
        '{"run": "known", "attempt": -1e400}',
        '{"run": "known", "attempt": NaN}',
        '{"run": "known", "attempt": -5}',
        '{"run": "known", "attempt": 0}',
        '{"run": "known", "attempt": 999999}',
        '{"run": "known", "attempt": 1' + "0" * 300 + "}",
        '{"run": "known", "attempt": null}',
        '{"run": "../../outside", "attempt": 1}',
        '{"run": "/etc", "attempt": 1}',
        '{"run": {"a": 1}, "attempt": 1}',
        "[" * 100_000,
        '{"run": ' * 10_000,
        "[]",
        "",
    ],
    ids=range(15),
)
def test_a_marker_that_is_nonsense_stops_no_training(tmp_path: Path, marker: str) -> None:
    """A resumed training that finds a broken marker is logged whole, in the journals' folder."""
    saves, journals = tmp_path / "saves", tmp_path / "a" / "journals"
    saves.mkdir()
    (saves / MARKER).write_text(marker)
    sink, receipts = MemorySink(), list[Receipt]()
    events: list[Event] = [
        RunStarted(save_dir=str(saves), resumed=Resumed()),
        RunEnded(status="finished"),
    ]
    with Bus(
        {"memory": sink},
        isolation="inline",
        journal=JournalSpec(dir=str(journals)),
        on_receipt=receipts.append,
    ) as bus:
        for event in events:
            emit(bus, event)
    assert [RunStarted, RunEnded] == [type(event) for event in sink.events]
    [receipt] = receipts
    assert (0, 0) == (receipt.pending, receipt.dropped)
    assert {"a", "saves"} == set(os.listdir(tmp_path))
