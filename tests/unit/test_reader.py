"""Every whole record is read back, whatever happened to the bytes around it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from support.journals import (
    SAMPLE,
    as_json,
    count_of,
    folder_in,
    read_file,
    read_records,
    read_run,
    write_journal,
    write_lines,
)
from trainbus import events as ev
from trainbus.journal.directory import RunFolder
from trainbus.journal.encoding import seal
from trainbus.journal.locks import is_being_written
from trainbus.journal.reader import RecordFile, RunReader, first_entry
from trainbus.journal.recovery import REASON_LOST, last_record, recover
from trainbus.journal.writer import JournalWriter


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """The directory of a run."""
    return folder_in(tmp_path)


def events_of(records: list[ev.Record]) -> list[tuple[int, int, str]]:
    """Return attempt, seq and event name of records."""
    return [(r.attempt, r.seq, ev.event_name(r.event)) for r in records]


def lines_of(folder: RunFolder, attempt: int = 1) -> list[bytes]:
    """Return the lines of a records file with their line feeds."""
    return folder.records(attempt).read_bytes().splitlines(keepends=True)


def test_sample_is_read_back_as_it_was_written(folder: RunFolder) -> None:
    """A journal of ten kinds of records comes back equal, with nothing counted."""
    written = write_journal(folder)
    entries, file = read_file(folder)
    assert written == [as_json(entry.record) for entry in entries]
    assert (10, 0, 0, 0) == (len(written), file.damaged, file.missing, file.torn)


def test_every_truncation_gives_the_whole_records_before_it(folder: RunFolder) -> None:
    """Cut off at any byte, a journal gives exactly the records that are whole."""
    written = write_journal(folder)
    path = folder.records(1)
    data = path.read_bytes()
    faults = []
    for size in range(len(data), -1, -1):
        path.write_bytes(data[:size])
        entries, file = read_file(folder)
        whole = data[:size].count(b"\n")
        torn = size - (data.rfind(b"\n", 0, size) + 1)
        found = [as_json(entry.record) for entry in entries]
        if (found, file.damaged, file.missing, file.torn) != (written[:whole], 0, 0, torn):
            faults.append((size, len(found), file.damaged, file.missing, file.torn))
    assert [] == faults


def test_every_flipped_bit_costs_one_record(folder: RunFolder) -> None:
    """With any bit flipped, all records but the one it lies in come back, and one is damaged."""
    written = write_journal(folder)
    path = folder.records(1)
    data = path.read_bytes()
    faults = []
    with path.open("r+b", buffering=0) as file:
        for bit in range(len(data) * 8):
            at, mask = bit // 8, 1 << bit % 8
            file.seek(at)
            file.write(bytes([data[at] ^ mask]))
            hit = data.count(b"\n", 0, at)
            entries, reader = read_file(folder)
            found = [as_json(entry.record) for entry in entries]
            expected = written[:hit] + written[hit + 1 :]
            # Without its line feed the last line is not damaged, but not whole yet.
            damaged = 0 if at == len(data) - 1 else 1
            if (expected, damaged, 0) != (found, reader.damaged, reader.missing):
                faults.append((at, mask, hit, len(found), reader.damaged, reader.missing))
            file.seek(at)
            file.write(data[at : at + 1])
    assert [] == faults


def test_random_overwrites_make_up_no_record(folder: RunFolder) -> None:
    """Bytes that are overwritten at random never yield a record that was not written."""
    written = write_journal(folder)
    path = folder.records(1)
    data = path.read_bytes()
    chance = random.Random(3)
    made_up = []
    for turn in range(2_000):
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 3)):
            size, at = chance.randint(1, 64), chance.randrange(len(data))
            taken = chance.randrange(len(data))
            piece = chance.choice(
                [chance.randbytes(size), data[taken : taken + size], b"\0" * size]
            )
            damaged[at : at + len(piece)] = piece
        path.write_bytes(damaged)
        entries, _ = read_file(folder)
        made_up += [(turn, entry) for entry in entries if as_json(entry.record) not in written]
    assert [] == made_up


def test_bytes_that_come_one_by_one_give_each_record_once(
    folder: RunFolder, tmp_path: Path
) -> None:
    """A reader that follows a file returns a record with the byte that makes it whole."""
    write_journal(folder)
    data = folder.records(1).read_bytes()
    growing = RunFolder.create([tmp_path / "growing"], "run")
    reader = RecordFile(growing, growing.records(1))
    assert [] == reader.read()
    found, seen = [], []
    with growing.records(1).open("wb", buffering=0) as file:
        for at in range(len(data)):
            file.write(data[at : at + 1])
            new = reader.read()
            found += [entry.record for entry in new]
            seen += [at] * len(new)
    reader.close()
    assert [at for at in range(len(data)) if data[at] == 10] == seen
    assert list(range(1, 11)) == [record.seq for record in found]
    assert (0, 0, len(data)) == (reader.damaged, reader.missing, reader.offset)


@pytest.mark.parametrize("limit", [1, 3, 10])
def test_limit_bounds_a_read_and_loses_nothing(folder: RunFolder, limit: int) -> None:
    """No read returns more than it was asked for, and all of them together return all."""
    write_journal(folder)
    file = RecordFile(folder, folder.records(1))
    sizes = []
    while found := file.read(limit):
        sizes.append(len(found))
    file.close()
    assert [limit] * (10 // limit) + [10 % limit] * (10 % limit > 0) == sizes


def test_offset_is_where_reading_goes_on(folder: RunFolder) -> None:
    """A reader that starts where another one stopped returns the remaining records."""
    write_journal(folder)
    first = RecordFile(folder, folder.records(1))
    assert [1, 2, 3, 4] == [entry.record.seq for entry in first.read(4)]
    first.close()
    assert sum(map(len, lines_of(folder)[:4])) == first.offset
    second = RecordFile(folder, folder.records(1), offset=first.offset)
    assert list(range(5, 11)) == [entry.record.seq for entry in second.read()]
    second.close()
    assert (0, 0) == (second.damaged, second.missing)


def test_lines_that_are_not_there_are_missing(folder: RunFolder) -> None:
    """Records that are gone whole are counted as missing, not as damaged."""
    write_journal(folder)
    lines = lines_of(folder)
    folder.records(1).write_bytes(b"".join(lines[:2] + lines[5:]))
    entries, file = read_file(folder)
    assert [1, 2, 6, 7, 8, 9, 10] == [entry.record.seq for entry in entries]
    assert (0, 3) == (file.damaged, file.missing)


def test_first_record_torn_in_two_counts_once(folder: RunFolder) -> None:
    """A line feed that appears in the first record makes one damaged record of it, not two."""
    write_journal(folder)
    data = bytearray(folder.records(1).read_bytes())
    data[30] = 10
    folder.records(1).write_bytes(data)
    entries, file = read_file(folder)
    assert list(range(2, 11)) == [entry.record.seq for entry in entries]
    assert (1, 0) == (file.damaged, file.missing)


def test_line_of_20_mb_is_skipped(folder: RunFolder) -> None:
    """A line that is too long to be one of ours costs itself alone."""
    write_journal(folder)
    lines = lines_of(folder)
    long = seal(b'{"seq":4,"run":"run","time":1.0,"junk":"' + b"x" * (20 * 2**20) + b'"}')
    folder.records(1).write_bytes(b"".join([*lines[:3], long, *lines[4:]]))
    entries, file = read_file(folder)
    assert [1, 2, 3, 5, 6, 7, 8, 9, 10] == [entry.record.seq for entry in entries]
    assert (1, 0) == (file.damaged, file.missing)


def test_20_mb_without_a_line_feed_are_not_kept_in_memory(folder: RunFolder) -> None:
    """A file that is one endless line gives nothing, and is damaged once."""
    folder.records(1).write_bytes(b"x" * (40 * 2**20))
    entries, file = read_file(folder)
    assert [] == entries
    assert 1 == file.damaged
    assert file.torn < 20 * 2**20


def test_unknown_event_passes(folder: RunFolder) -> None:
    """An event of a newer schema is returned with all that it says."""
    event = {"type": "thing.happened", "depth": {"a": [1, "two"]}}
    write_lines(folder, {"event": event, "seq": 1}, {"event": event, "seq": 2, "newer": True})
    entries, file = read_file(folder)
    expected = ev.UnknownEvent("thing.happened", event)
    assert [expected, expected] == [entry.record.event for entry in entries]
    assert (0, 0) == (file.damaged, file.missing)


def test_empty_and_absent_files_give_nothing(folder: RunFolder) -> None:
    """An empty or missing records file has no records and no errors."""
    assert ([], 0) == (read_records(folder), read_file(folder)[1].damaged)
    folder.records(1).touch()
    assert ([], 0) == (read_records(folder), read_file(folder)[1].damaged)
    assert (None, None) == (first_entry(folder, 1), last_record(folder, 1))


def test_run_is_read_attempt_by_attempt(folder: RunFolder) -> None:
    """All attempts come in order, each with the end that was written in its place."""
    write_journal(folder, *SAMPLE[:3])
    write_journal(folder, *SAMPLE)
    write_journal(folder, *SAMPLE[:2])
    assert 2 == recover(folder, now=9.0)
    reader = RunReader(folder)
    records = read_run(reader, limit=3)
    reader.close()
    names = [ev.event_name(event) for event in SAMPLE]
    expected = [(1, n + 1, name) for n, name in enumerate([*names[:3], "run.ended"])]
    expected += [(2, n + 1, name) for n, name in enumerate(names)]
    expected += [(3, n + 1, name) for n, name in enumerate([*names[:2], "run.ended"])]
    assert expected == events_of(records)
    assert (0, 0) == (reader.damaged, reader.missing)


def test_run_is_read_up_to_an_attempt(folder: RunFolder) -> None:
    """`upto` leaves later attempts out."""
    for _ in range(3):
        write_journal(folder, *SAMPLE[:2])
    reader = RunReader(folder, upto=2)
    assert [1, 1, 2, 2] == [record.attempt for record in read_run(reader)]
    reader.close()


@pytest.mark.parametrize("knows_offset", [True, False])
@pytest.mark.parametrize("done", range(11))
def test_run_is_read_from_a_position(folder: RunFolder, done: int, knows_offset: bool) -> None:
    """From any position, with or without its offset, the records after it come, and none twice."""
    write_journal(folder)
    write_journal(folder, *SAMPLE[:2])
    offset = sum(map(len, lines_of(folder)[:done])) if knows_offset else 0
    reader = RunReader(folder, after=(1, done), offset=offset)
    expected = [(1, seq) for seq in range(done + 1, 11)] + [(2, 1), (2, 2)]
    assert expected == [record.position for record in read_run(reader, limit=4)]
    reader.close()
    assert (0, 0) == (reader.damaged, reader.missing)


def test_offset_of_a_run_leads_to_the_rest_of_it(folder: RunFolder) -> None:
    """Position and offset after any read are enough to continue in a new process."""
    write_journal(folder, *SAMPLE[:5])
    write_journal(folder, *SAMPLE[:5])
    recover(folder, now=9.0)
    after, offset, found = (0, 0), 0, []
    while True:
        reader = RunReader(folder, after=after, offset=offset)
        new = reader.read(2)
        if not new:
            reader.close()
            break
        found += [entry.record.position for entry in new]
        after, offset = new[-1].record.position, reader.offset
        reader.close()
    assert [(attempt, seq) for attempt in (1, 2) for seq in range(1, 7)] == found


def test_reader_follows_a_run_into_its_next_attempt(folder: RunFolder) -> None:
    """What a training adds, in this attempt or a new one, comes with the next read, once."""
    reader = RunReader(folder)
    assert [] == reader.read()
    found = []
    for attempt in (1, 2):
        journal = JournalWriter(folder)
        for event in SAMPLE:
            journal.append(event, 1.0)
            found += [record.position for record in read_run(reader)]
        journal.close()
        assert [(a, n) for a in range(1, attempt + 1) for n in range(1, 11)] == found
    reader.close()


def test_lines_that_are_in_no_file_come_last(folder: RunFolder) -> None:
    """Records that could not be written are read after those that could, each once."""
    write_journal(folder, *SAMPLE[:3])
    reader = RunReader(folder)
    assert 3 == len(read_run(reader))
    held = [
        seal(as_json(ev.Record(seq=seq, run="run", time=1.0, event=ev.EpochStarted(epoch=seq))))
        for seq in (3, 4, 5)
    ]
    reader.add(held)
    assert [4, 5] == [record.seq for record in read_run(reader)]
    assert [] == reader.read()
    reader.close()


def test_damage_in_several_attempts_adds_up(folder: RunFolder) -> None:
    """A reader counts the damaged lines in all files of a run, and returns all other records."""
    write_journal(folder)
    write_journal(folder)
    for attempt in (1, 2):
        lines = lines_of(folder, attempt)
        lines[4] = b"#" + lines[4][1:]
        folder.records(attempt).write_bytes(b"".join(lines))
    reader = RunReader(folder)
    assert 18 == len(read_run(reader))
    reader.close()
    assert (2, 0) == (reader.damaged, reader.missing)


def test_recover_gives_an_end_exactly_once(folder: RunFolder) -> None:
    """An attempt whose process is gone gets exactly one end, however often it is recovered."""
    write_journal(folder, *SAMPLE[:4])
    assert [1, 0, 0] == [recover(folder, now=9.0) for _ in range(3)]
    reader = RunReader(folder)
    records = read_run(reader)
    reader.close()
    assert [1, 2, 3, 4, 5] == [record.seq for record in records]
    error = ev.Failure(type="ProcessLost", message=REASON_LOST)
    end = ev.RunEnded(status="failed", reason=REASON_LOST, error=error)
    assert end == records[-1].event
    assert ("run", 1, 0) == (records[-1].run, records[-1].attempt, records[-1].rank)
    assert records[-1].time >= records[-2].time
    assert records[-1] == last_record(folder, 1)
    assert [] == [name.name for name in folder.path.iterdir() if name.name.startswith(".")]


def test_recover_leaves_an_attempt_with_an_end_alone(folder: RunFolder) -> None:
    """An attempt that ended by itself gets no second end."""
    write_journal(folder)
    assert 0 == recover(folder, now=9.0)
    assert not folder.end(1).exists()


def test_recover_leaves_a_live_attempt_alone(folder: RunFolder) -> None:
    """A file that a journal has open is not ended, until it is closed."""
    journal = JournalWriter(folder)
    journal.append(SAMPLE[0], 1.0)
    assert is_being_written(folder.records(1))
    assert 0 == recover(folder, now=9.0)
    journal.append(SAMPLE[1], 2.0)
    journal.close()
    assert not is_being_written(folder.records(1))
    assert 1 == recover(folder, now=9.0)
    assert 3 == len(read_records(folder) + read_records(folder, folder.end(1)))


def test_recover_ends_all_attempts_up_to_one(folder: RunFolder) -> None:
    """Every attempt that was killed gets an end, later ones only if they are asked for."""
    for _ in range(3):
        write_journal(folder, *SAMPLE[:2])
    assert 2 == recover(folder, now=9.0, upto=2)
    assert [True, True, False] == [folder.end(attempt).exists() for attempt in (1, 2, 3)]


def test_recover_ends_an_attempt_of_which_nothing_is_left(folder: RunFolder) -> None:
    """An empty file gets an end with the first seq and the time of now."""
    folder.records(1).touch()
    assert 1 == recover(folder, now=9.0)
    end = last_record(folder, 1)
    assert end is not None
    assert (1, "run", 9.0) == (end.seq, end.run, end.time)


def test_recover_counts_on_after_a_torn_line(folder: RunFolder) -> None:
    """A line that the kill cut off is not a record; the end gets its seq."""
    write_journal(folder, *SAMPLE[:3])
    with folder.records(1).open("r+b") as file:
        file.truncate(folder.records(1).stat().st_size - 5)
    assert 1 == recover(folder, now=9.0)
    reader = RunReader(folder)
    records = read_run(reader)
    reader.close()
    assert [1, 2, 3] == [record.seq for record in records]
    assert 1 == count_of(records, ev.RunEnded)
