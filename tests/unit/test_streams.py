"""Several producers write one run: each into a file of its own, and readers get all of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from support.journals import (
    Disk,
    as_json,
    count_of,
    folder_in,
    read_file,
    read_records,
    read_run,
    write_lines,
)
from trainbus import events as ev
from trainbus.errors import JournalError
from trainbus.journal.counts import count_dropped, count_lines, count_streams
from trainbus.journal.directory import RunFolder, Stream
from trainbus.journal.encoding import seal
from trainbus.journal.locks import is_being_written
from trainbus.journal.reader import Place, RunReader
from trainbus.journal.recovery import last_record, recover
from trainbus.journal.verify import verify
from trainbus.journal.writer import JournalWriter


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """The directory of a run."""
    return folder_in(tmp_path)


def main_stream(folder: RunFolder, *, is_ended: bool = True, attempt: int = 1) -> None:
    """Write the main stream at the times 1, 3 and 5: start, a metric, and the end if it has one."""
    journal = JournalWriter(folder, attempt)
    journal.append(ev.RunStarted(), 1.0)
    journal.append(metric(3), 3.0)
    if is_ended:
        journal.append(ev.RunEnded(status="finished"), 5.0)
    journal.close()


def metric(step: int) -> ev.MetricsLogged:
    """Return an event like a training's."""
    return ev.MetricsLogged(values={"loss": 1 / step}, phase="train", step=step)


def text(line: str) -> ev.TextLogged:
    """Return an event like a console's."""
    return ev.TextLogged(key="console", text=line)


def write_stream(
    folder: RunFolder, stream: str, *times: float, attempt: int = 1, rank: int = 0
) -> None:
    """Write records of a stream at these times."""
    journal = JournalWriter(folder, attempt, stream=stream, rank=rank)
    for time in times:
        journal.append(text(f"{stream} at {time}"), time)
    journal.close()


def names_of(records: list[ev.Record]) -> list[tuple[str, int]]:
    """Return stream and seq of records."""
    return [(record.stream, record.seq) for record in records]


def test_each_stream_has_a_file_of_its_own(folder: RunFolder) -> None:
    """The name of a file says stream, rank and attempt, and the directory lists the streams."""
    main_stream(folder)
    write_stream(folder, "console", 2.0)
    write_stream(folder, "console", 2.0, rank=3)
    write_stream(folder, "system", 2.0)
    main_stream(folder, attempt=2)
    write_stream(folder, "system", 2.0, attempt=2)
    for name in ("Console-r0-a1.jsonl", "x1-r0-a1.jsonl", "r0-a1-end.jsonl", "a-r0-a01.jsonl"):
        (folder.path / name).touch()
    assert folder.path / "console-r3-a1.jsonl" == folder.records(1, 3, "console")
    expected = [Stream("console"), Stream("console", 3), Stream("system")]
    assert expected == folder.streams(1)
    assert ["console-r0", "console-r3", "system-r0"] == [stream.source for stream in expected]
    assert [Stream("system")] == folder.streams(2)
    assert [1, 2] == folder.attempts() == folder.attempts(rank=None)
    assert [0] == folder.ranks(1)


@pytest.mark.parametrize("name", ["Console", "a-b", "../x", "é", "x1", "a" * 33])
def test_a_stream_has_a_plain_name(folder: RunFolder, name: str) -> None:
    """A name with anything but lower-case letters is rejected, and no file is written."""
    main_stream(folder)
    with pytest.raises(ValueError, match=r"expected 1 to 32 lower-case letters as a stream, found"):
        JournalWriter(folder, stream=name)
    assert ["r0-a1.jsonl"] == os.listdir(folder.path)


def test_a_record_says_its_stream(folder: RunFolder) -> None:
    """Records of a stream have its name, and are numbered from 1 in each stream."""
    main_stream(folder)
    write_stream(folder, "console", 2.0, 2.5)
    entries, file = read_file(folder, folder.records(1, 0, "console"))
    found = [entry.record for entry in entries]
    assert [("console", 1), ("console", 2)] == names_of(found)
    assert {(1, 0, "run", "console-r0")} == {(r.attempt, r.rank, r.run, r.source) for r in found}
    assert (0, 0, 0) == (file.damaged, file.missing, file.torn)
    assert 2 == count_streams(folder, 1)


def test_a_stream_needs_its_attempt(folder: RunFolder) -> None:
    """A stream never begins an attempt, as the training's own file does."""
    main_stream(folder)
    with pytest.raises(JournalError, match="run run has no attempt 2"):
        JournalWriter(folder, 2, stream="system")
    assert [1] == folder.attempts()
    assert [] == folder.streams(2)


def test_a_stream_is_continued(folder: RunFolder) -> None:
    """A second writer appends after the last record of the first one."""
    main_stream(folder)
    write_stream(folder, "system", 2.0, 2.5)
    write_stream(folder, "system", 4.0)
    entries, file = read_file(folder, folder.records(1, 0, "system"))
    assert [(1, 2.0), (2, 2.5), (3, 4.0)] == [(e.record.seq, e.record.time) for e in entries]
    assert (0, 0) == (file.damaged, file.missing)


def test_a_stream_has_one_writer(folder: RunFolder) -> None:
    """While a writer has the file, a second one is rejected and changes nothing."""
    main_stream(folder)
    first = JournalWriter(folder, stream="system")
    first.append(text("one"), 2.0)
    with pytest.raises(JournalError, match="is being written: expected one writer of a stream"):
        JournalWriter(folder, stream="system")
    first.append(text("two"), 3.0)
    first.close()
    assert 2 == len(read_file(folder, folder.records(1, 0, "system"))[0])


def test_a_killed_writer_leaves_at_most_a_part_of_a_line(folder: RunFolder) -> None:
    """Cut at any byte of its last line, a stream is continued without a gap or damage."""
    main_stream(folder)
    write_stream(folder, "system", 2.0, 2.5)
    path = folder.records(1, 0, "system")
    data = path.read_bytes()
    first = data.index(b"\n") + 1
    for size in range(first, len(data)):
        path.write_bytes(data[:size])
        write_stream(folder, "system", 4.0)
        entries, file = read_file(folder, path)
        assert [(1, 2.0), (2, 4.0)] == [(e.record.seq, e.record.time) for e in entries], size
        assert (0, 0, 0) == (file.damaged, file.missing, file.torn)


def test_a_torn_line_that_is_replaced_while_it_is_read(folder: RunFolder) -> None:
    """The same reader returns the record that a second writer puts in place of a torn line."""
    main_stream(folder, is_ended=False)
    write_stream(folder, "system", 2.0, 2.5)
    path = folder.records(1, 0, "system")
    path.write_bytes(path.read_bytes()[:-5])
    reader = RunReader(folder)
    assert [("", 1), ("system", 1), ("", 2)] == names_of(read_run(reader))
    write_stream(folder, "system", 4.0)
    assert [(2, 4.0)] == [(record.seq, record.time) for record in read_run(reader)]
    reader.close()
    assert (0, 0) == (reader.damaged, reader.missing)


def test_the_seq_of_a_damaged_line_is_not_used_again(folder: RunFolder) -> None:
    """Sinks may have received the record before its line was damaged, so its number stays taken."""
    main_stream(folder)
    write_stream(folder, "system", 2.0, 2.5)
    path = folder.records(1, 0, "system")
    path.write_bytes(path.read_bytes().replace(b"system at 2.5", b"system at 9.5"))
    write_stream(folder, "system", 4.0)
    entries, file = read_file(folder, path)
    assert [1, 3] == [entry.record.seq for entry in entries]
    assert (1, 0) == (file.damaged, file.missing)
    assert (2, 1) == count_lines(folder, path)
    assert (2, 0) == (count_streams(folder, 1), count_dropped(folder, 1))


def test_a_start_or_end_is_not_written_to_a_stream(folder: RunFolder) -> None:
    """A run has one start and one end, both in the main stream."""
    main_stream(folder)
    journal = JournalWriter(folder, stream="system")
    with pytest.raises(ValueError, match=r"run\.ended belongs to the main stream, not 'system'"):
        journal.append(ev.RunEnded(status="finished"), 2.0)
    journal.close()
    assert b"" == folder.records(1, 0, "system").read_bytes()


def test_a_stream_has_a_limit_of_its_own(folder: RunFolder) -> None:
    """A stream at its limit drops its step metrics, and the main stream none."""
    main = JournalWriter(folder)
    main.append(ev.RunStarted(), 1.0)
    stream = JournalWriter(folder, stream="system", max_bytes=500)
    for step in range(1, 11):
        stream.append(metric(step), 2.0)
        main.append(metric(step), 2.0)
    assert 0 == main.dropped.total()
    found = read_records(folder, folder.records(1, 0, "system"))
    kept = count_of(found, ev.MetricsLogged)
    assert 10 == kept + stream.dropped.total()
    assert 0 < kept < 10
    main.close()
    stream.close()


@pytest.mark.parametrize("is_damaged", [False, True])
def test_what_a_stream_dropped_is_counted_in_its_file(
    folder: RunFolder, *, is_damaged: bool
) -> None:
    """Who did not write a stream counts the gaps; closing reports what was dropped last."""
    main_stream(folder)
    stream = JournalWriter(folder, stream="system", max_bytes=500)
    for step in range(1, 11):
        stream.append(metric(step), 2.0 + step)
    stream.close()
    path = folder.records(1, 0, "system")
    reason = "metrics.logged dropped: the journal has reached 500 bytes"
    alerts = [
        (record.event.text, record.seq, record.time)
        for record in read_records(folder, path)
        if isinstance(record.event, ev.AlertRaised)
    ]
    assert (f"{stream.dropped.total() - 1} {reason}", 12, 12.0) == alerts[-1]
    assert [f"1 {reason}"] == [line for line, _, _ in alerts[:-1]]
    if is_damaged:
        path.write_bytes(path.read_bytes().replace(b'"seq":2,', b'"seq":9,'))
    assert stream.dropped.total() == count_dropped(folder, 1)


def test_a_stream_on_a_full_disk_is_written_when_it_is_closed(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What waits in memory gets a last chance; if the disk is still full, a warning counts it."""
    main_stream(folder)
    for is_full, kept in ((False, 2), (True, 2)):
        stream = JournalWriter(folder, stream="system")
        disk = Disk(stream.fileno(), lambda n, full=is_full: 3 if n == 0 or full else None)  # type: ignore[misc]
        monkeypatch.setattr(os, "write", disk)
        stream.append(text("one"), 2.0)
        stream.append(text("two"), 2.0)
        stream.close()
        monkeypatch.undo()
        assert kept == len(read_records(folder, folder.records(1, 0, "system")))
    (lost,) = [r.getMessage() for r in caplog.records if "are lost" in r.getMessage()]
    assert lost.startswith("2 records of the stream 'system' are lost: they are not on disk (")


FORGED: list[tuple[str, ev.Record]] = [
    ("rejected a record of 'b-r0', attempt 1", ev.Record(
        seq=1, run="run", time=1.0, event=text("x"), stream="b")),
    ("rejected a record of 'a-r7', attempt 1", ev.Record(
        seq=1, run="run", time=1.0, event=text("x"), stream="a", rank=7)),
    ("rejected a record of 'a-r0', attempt 2", ev.Record(
        seq=1, run="run", time=1.0, event=text("x"), stream="a", attempt=2)),
    ("rejected a record of '', attempt 1", ev.Record(
        seq=1, run="run", time=1.0, event=text("x"))),
    ("rejected the start or end of a run", ev.Record(
        seq=1, run="run", time=1.0, event=ev.RunEnded(status="finished"), stream="a")),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "record"), FORGED, ids=[fault for fault, _ in FORGED])
def test_a_record_in_a_wrong_file_is_damaged(
    folder: RunFolder, fault: str, record: ev.Record
) -> None:
    """A forged line neither ends a run nor takes the place of another stream's record."""
    main_stream(folder)
    path = folder.records(1, 0, "a")
    path.write_bytes(seal(as_json(record)))
    entries, file = read_file(folder, path)
    assert ([], 1) == (entries, file.damaged)
    assert [True] == [found.startswith(fault) for found in file.faults]


def test_the_main_stream_has_no_records_of_others(folder: RunFolder) -> None:
    """A record of a stream in the file of the training is damaged."""
    write_lines(folder, {"event": {"type": "text.logged", "key": "k", "text": ""}, "stream": "a"})
    entries, file = read_file(folder)
    assert ([], ["rejected a record of 'a-r0', attempt 1"]) == (entries, file.faults)


def test_streams_are_read_in_the_order_of_time(folder: RunFolder) -> None:
    """The start comes first and the end last, whatever their times; between them time decides."""
    main_stream(folder)
    write_stream(folder, "console", 0.5, 9.0)
    write_stream(folder, "system", 4.0)
    expected = [("", 1), ("console", 1), ("", 2), ("system", 1), ("console", 2), ("", 3)]
    for limit in (1, 2, 500):
        assert expected == names_of(read_run(RunReader(folder), limit)), limit


@pytest.mark.parametrize("is_new", [False, True], ids=["same", "new"])
def test_a_reader_can_begin_anywhere_in_each_stream(folder: RunFolder, is_new: bool) -> None:
    """From the places after any record, the rest is read: each record once."""
    main_stream(folder)
    write_stream(folder, "console", 2.0, 4.0)
    write_stream(folder, "system", 3.5)
    everything = names_of(read_run(RunReader(folder)))
    for done in range(len(everything) + 1):
        reader = RunReader(folder)
        seqs = {"": 0}
        for _ in range(done):
            (entry,) = reader.read(1)
            seqs[entry.record.source] = entry.record.seq
        if is_new:
            offsets = {"": reader.offset, **reader.offsets}
            reader.close()
            places = {key: Place(seq, offsets.get(key, 0)) for key, seq in seqs.items()}
            main = places.pop("")
            after = (1, main.seq) if done else (0, 0)
            reader = RunReader(folder, after=after, offset=main.offset, streams=places)
        assert everything[done:] == names_of(read_run(reader)), done
        reader.close()
        assert (0, 0) == (reader.damaged, reader.missing)


def test_the_end_waits_for_a_stream_that_is_being_written(folder: RunFolder) -> None:
    """While a writer has a stream open, the run's end is held back; then it comes last."""
    main_stream(folder)
    stream = JournalWriter(folder, stream="system")
    stream.append(text("one"), 2.0)
    reader = RunReader(folder, waits=True)
    assert [("", 1), ("system", 1), ("", 2)] == names_of(read_run(reader))
    assert reader.is_waiting
    stream.append(text("two"), 3.0)
    assert [("system", 2)] == names_of(read_run(reader))
    assert reader.is_waiting
    stream.append(text("three"), 4.0)
    stream.close()
    assert [("system", 3), ("", 3)] == names_of(read_run(reader))
    assert not reader.is_waiting


def test_waiting_can_be_given_up(folder: RunFolder) -> None:
    """The end then comes, and no record of the stream comes after it."""
    main_stream(folder)
    stream = JournalWriter(folder, stream="system")
    reader = RunReader(folder, waits=True)
    assert [("", 1), ("", 2)] == names_of(read_run(reader))
    stream.append(text("late"), 2.0)
    reader.stop_waiting()
    stream.append(text("later"), 2.0)
    assert [("system", 1), ("system", 2), ("", 3)] == names_of(read_run(reader))
    stream.append(text("too late"), 2.0)
    assert [] == read_run(reader)
    stream.close()


def test_who_only_looks_does_not_wait(folder: RunFolder) -> None:
    """Without `waits`, the end is returned after what the streams have so far."""
    main_stream(folder)
    stream = JournalWriter(folder, stream="system")
    stream.append(text("one"), 9.0)
    assert [("", 1), ("", 2), ("system", 1), ("", 3)] == names_of(read_run(RunReader(folder)))
    stream.close()


def test_records_after_the_end_are_read_from_the_place_after_it(folder: RunFolder) -> None:
    """A stream record that came too late for the end is what a reader after the end gets."""
    main_stream(folder)
    write_stream(folder, "system", 2.0)
    places = {"system-r0": Place(1)}
    reader = RunReader(folder, after=(1, 3), streams=places)
    assert [] == read_run(reader)
    write_stream(folder, "system", 6.0)
    assert [("system", 2)] == names_of(read_run(reader))


def test_a_stream_that_comes_later_is_found(folder: RunFolder) -> None:
    """A new file is looked for once a second, and once more before the run's end."""
    now = [0.0]
    main_stream(folder, is_ended=False)
    reader = RunReader(folder, clock=lambda: now[0])
    assert [("", 1), ("", 2)] == names_of(read_run(reader))
    write_stream(folder, "console", 2.0)
    assert [] == read_run(reader)
    now[0] = 1.0
    assert [("console", 1)] == names_of(read_run(reader))
    write_stream(folder, "system", 2.0)
    recover(folder, now=0.0)
    assert [("system", 1), ("", 3)] == names_of(read_run(reader))


def test_the_directory_is_not_listed_for_each_record(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader of one attempt that follows its writer lists the directory once a second."""
    calls: list[str] = []
    monkeypatch.setattr(os, "listdir", _counting(os.listdir, calls))
    journal = JournalWriter(folder)
    journal.append(ev.RunStarted(), 1.0)
    reader = RunReader(folder, upto=1, clock=lambda: 0.0)
    calls.clear()
    for step in range(1, 51):
        journal.append(metric(step), 2.0)
        assert len(read_run(reader)) in (1, 2)
    assert 2 == len(calls)  # for the attempt, and for its streams
    journal.close()


def _counting(call: Callable[[str], list[str]], calls: list[str]) -> Callable[[str], list[str]]:
    def counted(path: str) -> list[str]:
        calls.append(path)
        return call(path)

    return counted


def test_each_attempt_has_its_streams(folder: RunFolder) -> None:
    """The streams of an attempt come before the next attempt, and begin at 1 in each."""
    main_stream(folder, is_ended=False)
    write_stream(folder, "system", 9.0)
    main_stream(folder, attempt=2)
    write_stream(folder, "system", 2.0, attempt=2)
    found = [(r.attempt, r.stream, r.seq) for r in read_run(RunReader(folder))]
    first = [(1, "", 1), (1, "", 2), (1, "system", 1)]
    assert [*first, (2, "", 1), (2, "system", 1), (2, "", 2), (2, "", 3)] == found
    places = {"system-r0": Place(1)}
    after = [
        (r.attempt, r.stream, r.seq)
        for r in read_run(RunReader(folder, after=(1, 2), streams=places))
    ]
    assert [(2, "", 1), (2, "system", 1), (2, "", 2), (2, "", 3)] == after


def test_lines_that_are_on_no_disk_keep_the_end_last(folder: RunFolder) -> None:
    """If the disk was full, the end waits in memory, and still comes after all streams."""
    main_stream(folder, is_ended=False)
    write_stream(folder, "system", 9.0)
    reader = RunReader(folder, waits=True)
    found = read_run(reader)
    end = ev.Record(seq=4, run="run", time=5.0, event=ev.RunEnded(status="finished"))
    last = ev.Record(seq=3, run="run", time=4.0, event=metric(4))
    stream = JournalWriter(folder, stream="system")
    stream.append(text("more"), 10.0)
    reader.add([seal(as_json(last)), seal(as_json(end))])
    found += read_run(reader)
    assert reader.is_waiting
    stream.close()
    found += read_run(reader)
    expected = [("", 1), ("", 2), ("system", 1), ("system", 2), ("", 3), ("", 4)]
    assert expected == names_of(found)


def test_a_main_stream_without_a_whole_record_has_an_end(folder: RunFolder) -> None:
    """If the start is damaged, the streams are read before the end that recovery writes."""
    main_stream(folder, is_ended=False)
    folder.records(1).write_bytes(b"damaged\n")
    write_stream(folder, "system", 2.0)
    assert [] == read_run(RunReader(folder))
    recover(folder, now=9.0)
    assert [("system", 1), ("", 1)] == names_of(read_run(RunReader(folder)))


def test_streams_do_not_end_a_run(folder: RunFolder) -> None:
    """Recovery writes the missing end after the main stream's last record, whatever streams do."""
    main_stream(folder, is_ended=False)
    stream = JournalWriter(folder, stream="system")
    for _ in range(5):
        stream.append(text("more"), 9.0)
    assert is_being_written(folder.records(1, 0, "system"))
    assert 1 == recover(folder, now=9.0)
    last = last_record(folder, 1)
    assert last is not None
    assert ("", 3) == (last.stream, last.seq)
    stream.close()
    assert not is_being_written(folder.records(1, 0, "system"))


def test_damage_in_a_stream_costs_one_record(folder: RunFolder) -> None:
    """A damaged line is skipped and counted, and the other streams are complete."""
    main_stream(folder)
    write_stream(folder, "system", 2.0, 3.5, 4.0)
    path = folder.records(1, 0, "system")
    path.write_bytes(path.read_bytes().replace(b"3.5", b"7.5"))
    reader = RunReader(folder)
    found = names_of(read_run(reader))
    assert [("", 1), ("system", 1), ("", 2), ("system", 3), ("", 3)] == found
    reader.close()
    assert (1, 0) == (reader.damaged, reader.missing)


def test_streams_are_verified(folder: RunFolder) -> None:
    """Each stream is checked like the main stream; it is complete once nobody writes it."""
    main_stream(folder)
    write_stream(folder, "console", 2.0, 3.5, 4.0)
    path = folder.records(1, 0, "console")
    path.write_bytes(path.read_bytes().replace(b"3.5", b"7.5")[:-4])
    stream = JournalWriter(folder, stream="system")
    found = [(r.file, r.records, r.damaged, r.torn > 0, r.state) for r in verify(folder)]
    expected = [
        ("r0-a1.jsonl", 3, 0, False, "finished"),
        ("console-r0-a1.jsonl", 1, 1, True, "complete"),
        ("system-r0-a1.jsonl", 0, 0, False, "being written"),
    ]
    assert expected == found
    stream.close()


def test_a_link_is_not_read_as_a_stream(folder: RunFolder, tmp_path: Path) -> None:
    """A stream that is a link is rejected, as it may lead out of the directory."""
    main_stream(folder)
    other = folder_in(tmp_path, "other")
    main_stream(other)
    write_stream(other, "system", 2.0)
    folder.records(1, 0, "system").symlink_to(other.records(1, 0, "system"))
    with pytest.raises(JournalError, match="it is a link"):
        read_run(RunReader(folder))
    with pytest.raises(JournalError, match="can't be created"):
        JournalWriter(folder, stream="system")
