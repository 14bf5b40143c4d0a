"""Whoever else writes, reads or recovers at that moment: no record is lost, none comes twice."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.journals import SAMPLE, folder_in, read_records, write_journal
from trainbus.events import Record, RunEnded
from trainbus.journal.directory import RunFolder
from trainbus.journal.locks import is_being_written
from trainbus.journal.reader import RunReader
from trainbus.journal.recovery import last_record, recover, write_end
from trainbus.journal.writer import JournalWriter

TESTS = str(Path(__file__).parents[1])
DEADLINE_S = 60.0
PROGRAM = f"""
import sys
sys.path.insert(0, {TESTS!r})
from pathlib import Path
from support.journals import SAMPLE
from trainbus.events import Record, RunEnded
from trainbus.journal.writer import JournalWriter
from trainbus.journal.recovery import recover, write_end
from trainbus.journal.directory import RunFolder
folder = RunFolder(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
"""
MANY_JOURNALS = """
for _ in range(10):
    journal = JournalWriter(folder)
    print(journal.attempt, journal.append(SAMPLE[0], 1.0).attempt, flush=True)
    journal.close()
"""
MANY_ENDS = """
for attempt in range(1, 101):
    end = Record(seq=1, run="run", time=1.0, event=RunEnded(status="failed"), attempt=attempt)
    if write_end(folder, end):
        print(attempt, flush=True)
"""
ONE_LIVE_JOURNAL = """
journal = JournalWriter(folder)
journal.append(SAMPLE[0], 1.0)
print("open", flush=True)
sys.stdin.readline()
"""
MANY_RECOVERIES = """
print(recover(folder, now=9.0), flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """The directory of a run."""
    return folder_in(tmp_path)


@contextmanager
def process(code: str, folder: RunFolder) -> Iterator[subprocess.Popen[str]]:
    """A process that has imported everything, and waits for a line before it does its work."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM + code, str(folder.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            assert child.stdout is not None
            assert "ready\n" == child.stdout.readline()
            yield child
        finally:
            child.kill()


def go(child: subprocess.Popen[str]) -> None:
    """Let a process go on."""
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()


def all_at_once(code: str, folder: RunFolder, count: int = 3) -> list[list[str]]:
    """Run processes that begin their work together, and return the lines that each prints."""
    children = [process(code, folder) for _ in range(count)]
    opened = [child.__enter__() for child in children]
    try:
        for child in opened:
            go(child)
        return [child.communicate(timeout=DEADLINE_S)[0].splitlines() for child in opened]
    finally:
        for each in children:
            each.__exit__(None, None, None)


def in_threads(act: Callable[[], Any], count: int = 8) -> list[Any]:
    """Return what a call returns, or raises, in threads that begin together."""
    gate, found = threading.Barrier(count), []

    def run() -> None:
        """Wait for the others, and act."""
        gate.wait(DEADLINE_S)
        try:
            found.append(act())
        except Exception as error:
            found.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    return found


def end_of(attempt: int) -> Record:
    """Return the end of an attempt that could not write its own."""
    return Record(seq=1, run="run", time=1.0, event=RunEnded(status="failed"), attempt=attempt)


def test_processes_that_begin_together_get_files_of_their_own(folder: RunFolder) -> None:
    """Each attempt belongs to one journal, whichever process was faster."""
    lines = all_at_once(MANY_JOURNALS, folder)
    assert [10, 10, 10] == list(map(len, lines))
    pairs = [line.split() for each in lines for line in each]
    assert [given for given, _ in pairs] == [written for _, written in pairs]
    assert list(range(1, 31)) == sorted(int(given) for given, _ in pairs)
    assert [1] * 30 == [len(read_records(folder, folder.records(n))) for n in range(1, 31)]


def test_threads_that_begin_together_get_files_of_their_own(folder: RunFolder) -> None:
    """Journals that threads of one process open at the same moment are different attempts."""
    journals = in_threads(lambda: JournalWriter(folder))
    for journal in journals:
        journal.close()
    assert list(range(1, 9)) == sorted(journal.attempt for journal in journals)


def test_processes_write_an_end_once(folder: RunFolder) -> None:
    """Of processes that all write the end of an attempt, exactly one says that it did."""
    lines = all_at_once(MANY_ENDS, folder)
    assert list(range(1, 101)) == sorted(int(line) for each in lines for line in each)
    found = [read_records(folder, folder.end(n)) for n in range(1, 101)]
    assert [[end_of(n)] for n in range(1, 101)] == found
    assert [] == [path.name for path in folder.path.iterdir() if path.name.startswith(".")]


def test_threads_write_an_end_once(folder: RunFolder) -> None:
    """Of threads that all write the end of an attempt, exactly one says that it did."""
    expected = [False] * 7 + [True]
    for attempt in range(1, 31):
        assert expected == sorted(in_threads(lambda n=attempt: write_end(folder, end_of(n))))  # type: ignore[misc]
        assert [end_of(attempt)] == read_records(folder, folder.end(attempt))
    assert [] == [path.name for path in folder.path.iterdir() if path.name.startswith(".")]


def test_recovery_leaves_the_journal_of_another_process_alone(folder: RunFolder) -> None:
    """A file that a live process writes gets no end, and gets one when that process was killed."""
    with process(ONE_LIVE_JOURNAL, folder) as child:
        go(child)
        assert child.stdout is not None
        assert "open\n" == child.stdout.readline()
        assert is_being_written(folder.records(1))
        assert 0 == recover(folder, now=9.0)
        child.kill()
        child.wait(DEADLINE_S)
        assert not is_being_written(folder.records(1))
        assert 1 == recover(folder, now=9.0)
    last = last_record(folder, 1)
    assert last is not None
    assert (2, RunEnded) == (last.seq, type(last.event))


def test_recoveries_at_the_same_time_give_one_end(folder: RunFolder) -> None:
    """However many processes and threads find an attempt without an end, it gets one."""
    write_journal(folder, *SAMPLE[:3])
    counts = all_at_once(MANY_RECOVERIES, folder)
    assert ["0", "0", "1"] == sorted(count for [count] in counts)
    write_journal(folder, *SAMPLE[:3])
    assert 1 == sum(in_threads(lambda: recover(folder, now=9.0)))


class Meanwhile:
    """Has something happen right before or after the k-th look of a reader at the disk."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, act: Callable[[], None]) -> None:
        self._left = at
        self._act = act
        self._busy = False
        for owner, name in ((os, "pread"), (os, "listdir"), (os, "open"), (Path, "exists")):
            patch.setattr(owner, name, self._around(getattr(owner, name)))

    @property
    def happened(self) -> bool:
        """Whether there were looks enough."""
        return self._left <= 0

    def _around(self, look: Callable[..., Any]) -> Callable[..., Any]:
        def looked(*arguments: Any, **options: Any) -> Any:
            self._tick()
            found = look(*arguments, **options)
            self._tick()
            return found

        return looked

    def _tick(self) -> None:
        if self._busy:
            return
        self._left -= 1
        if self._left == 0:
            self._busy = True
            self._act()
            self._busy = False


def ends_itself(folder: RunFolder, journal: JournalWriter) -> list[tuple[int, int]]:
    """Let a training log two more records and end."""
    for event in (*SAMPLE[1:3], SAMPLE[-1]):
        journal.append(event, 1.0)
    journal.close()
    return [(1, n) for n in range(1, 7)]


def is_killed(folder: RunFolder, journal: JournalWriter) -> list[tuple[int, int]]:
    """Let a training log two more records and die, and give it its end."""
    for event in SAMPLE[1:3]:
        journal.append(event, 1.0)
    journal.close()
    recover(folder, now=9.0)
    return [(1, n) for n in range(1, 7)]


def is_resumed(folder: RunFolder, journal: JournalWriter) -> list[tuple[int, int]]:
    """Let a training end, and a resumed one log all there is."""
    found = ends_itself(folder, journal)
    write_journal(folder, *SAMPLE[:3])
    return found + [(2, n) for n in range(1, 4)]


@pytest.mark.parametrize("limit", [1, 2, 500])
@pytest.mark.parametrize("story", [ends_itself, is_killed, is_resumed])
def test_reader_skips_nothing_that_comes_between_two_looks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    story: Callable[[RunFolder, JournalWriter], list[tuple[int, int]]],
) -> None:
    """Whatever the training does between any two system calls of a reader, every record comes."""
    faults = []
    for at in itertools.count(1):
        folder = folder_in(tmp_path, f"run{at}")
        journal = JournalWriter(folder)
        for event in SAMPLE[:3]:
            journal.append(event, 1.0)
        expected: list[tuple[int, int]] = []
        reader, found = RunReader(folder), []
        with monkeypatch.context() as patch:
            meanwhile = Meanwhile(
                patch,
                at,
                lambda f=folder, j=journal, e=expected: e.extend(story(f, j)),  # type: ignore[misc]
            )
            while new := reader.read(limit):
                found += [entry.record.position for entry in new]
        if not meanwhile.happened:
            journal.close()
            break
        while new := reader.read(limit):
            found += [entry.record.position for entry in new]
        reader.close()
        if expected != found:
            faults.append((at, found))
    assert [] == faults
    assert at > 5
