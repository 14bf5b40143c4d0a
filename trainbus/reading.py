"""Reads the records of a run back, also while they are being written.

Guarantees: every whole record is returned, in order; a damaged line costs itself alone and is
counted; a torn last line is left until it is whole; nothing that a journal says opens a file
outside its directory, decides how much memory is taken, or raises.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from trainbus.blobs import Blob, Blobs
from trainbus.errors import JournalError
from trainbus.events import (
    ArtifactLogged,
    CheckpointSaved,
    Codec,
    Failure,
    ImageLogged,
    Record,
    RunEnded,
    RunStarted,
    UnknownEvent,
)
from trainbus.journal import LONGEST_LINE, MAX_LINE, unseal, write_end
from trainbus.runfolder import RunFolder, is_being_written, is_run_id, open_within

_CHUNK = 2**20
_START = b'{"crc":"'
_MAX_FAULTS = 100
_MAX_PARTS = 100

REASON_LOST = "the training process was killed, or ended without ending its run"


class _Blobs(msgspec.Struct):
    blobs: list[Blob] = []


_BLOBS = msgspec.json.Decoder(_Blobs)
_NAMING_FILES = frozenset({RunStarted, ImageLogged, CheckpointSaved, ArtifactLogged})
_TAIL = 2 * MAX_LINE


class Entry(NamedTuple):
    """A record as it stands in the journal, and the copies of the files that it names."""

    record: Record
    blobs: Sequence[Blob]


class Files:
    """Decides which files the records of a journal may name.

    Args:
        folder: the run's directory.
        trusted: folders outside of it whose files may be used; None trusts every path, which is
            right only for a journal that the training process is writing itself.
    """

    def __init__(self, folder: RunFolder, trusted: Sequence[str | os.PathLike[str]] | None) -> None:
        self._folder = folder
        self._blobs = Blobs(folder)
        self._trusted = None if trusted is None else [Path(t).resolve() for t in trusted]
        self._nowhere = folder.path / "not-available"
        while os.path.lexists(self._nowhere):  # put there by who made the journal
            self._nowhere = folder.path / f"not-available-{secrets.token_hex(8)}"
        self.refused: list[str] = []
        """Paths outside of the directory that records named, and that were not used."""
        self.damaged: list[str] = []
        """What is wrong with blobs that records named."""

    def resolve(self, entry: Entry) -> Record:
        """Return the record with the paths of files as they can be opened now."""
        record, blobs = entry
        event: Any = record.event
        if type(event) not in _NAMING_FILES:
            return record
        if isinstance(event, RunStarted):
            if event.save_dir is not None and not self._may_use(event.save_dir):
                record = _with(record, save_dir=None)
            resumed = event.resumed
            if resumed and resumed.save_dir is not None and not self._may_use(resumed.save_dir):
                resumed = msgspec.structs.replace(resumed, save_dir=None)
                record = _with(record, resumed=resumed)
            return record
        kept = {blob.path: blob for blob in blobs}
        if getattr(event, "path", None) is not None:
            return _with(record, path=self._find(event.path, kept))
        if getattr(event, "paths", None):
            return _with(record, paths=[self._find(path, kept) for path in event.paths])
        return record

    def _find(self, path: str, kept: dict[str, Blob]) -> str:
        if path in kept:
            try:
                return str(self._blobs.find(kept[path]))
            except JournalError as error:
                self.damaged.append(str(error))
        elif self._may_use(path):
            return path
        else:
            self.refused.append(path)
        # A path below the run's directory, where nothing is: sinks say that it can't be read.
        return str(self._nowhere / Path(path).name)

    def _may_use(self, path: str) -> bool:
        if self._trusted is None:
            return True
        try:
            real = Path(path).resolve()
        except (OSError, ValueError, RuntimeError):
            return False
        return any(real.is_relative_to(folder) for folder in self._trusted)


class RecordFile:
    """One records file; `read` returns what has come since."""

    def __init__(self, folder: RunFolder, path: Path, *, offset: int = 0) -> None:
        self._folder = folder
        self._path = path
        self._codec = Codec(load=Blobs(folder).load)
        self._fd: int | None = None
        self._offset = offset
        self._rest = b""
        self._skips = False
        self._bad = 0
        self._is_in_piece = False
        # An attempt begins with 1; the end that was written in its place has any seq.
        is_whole = offset == 0 and not path.stem.endswith("-end")
        self._last_seq: int | None = 0 if is_whole else None
        self.damaged = 0
        """Records that can't be read."""
        self.faults: list[str] = []
        """What is wrong with some of them."""
        self.missing = 0
        """Records that are not there at all, as their numbers tell."""

    @property
    def offset(self) -> int:
        """Where in the file the first line begins that was not returned yet."""
        return self._offset

    @property
    def torn(self) -> int:
        """Bytes after the last line feed that `read` has seen."""
        return len(self._rest)

    def exists(self) -> bool:
        """Return whether there is a file."""
        return self._path.exists()

    def read(self, limit: int = 500) -> list[Entry]:
        """Return at most `limit` further records, fewer only if the file has no more.

        Raises:
            JournalError: the file is a link, or no plain file.
        """
        found: list[Entry] = []
        while len(found) < limit:
            end = self._rest.find(b"\n")
            if end < 0:
                if not self._fill():
                    break
                continue
            self._take(end, limit, found)
        return found

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def finish(self) -> None:
        """Count what is damaged at the end of a file that gets no more lines."""
        self.damaged += self._bad
        self._bad = 0

    def _take(self, end: int, limit: int, found: list[Entry]) -> None:
        """Take lines that are whole from what was read, as many as are wanted."""
        start, rest = 0, self._rest
        while end >= 0 and len(found) < limit:
            line = rest[start:end]
            if self._skips:  # the end of a line that was too long to be kept
                self._skips = False
            else:
                self._line(line, found)
            start = end + 1
            end = rest.find(b"\n", start)
        self._offset += start
        self._rest = rest[start:]

    def _line(self, line: bytes, found: list[Entry]) -> None:
        body = unseal(line)
        if body is None:
            # A flipped bit may be a line feed, and make two pieces of one line.
            self._bad += not (self._is_in_piece and not line.startswith(_START))
            self._is_in_piece = not line.endswith(b"}")
            # A lost line feed makes one line of two, of which the second is whole.
            body = _whole_part(line)
            if body is None:
                return
        try:
            record = self._codec.decode(body)
            blobs = _BLOBS.decode(body).blobs if body.startswith(b'{"blobs":') else ()
            if not is_run_id(record.run):
                raise JournalError(f"refused a record of run {record.run[:80]!r}")
        except (msgspec.DecodeError, JournalError, ValueError, RecursionError) as error:
            if len(self.faults) < _MAX_FAULTS:
                self.faults.append(str(error))
            self._bad += 1
            return
        self._count(record.seq)
        found.append(Entry(record, blobs))

    def _count(self, seq: int) -> None:
        gap = 0 if self._last_seq is None else seq - self._last_seq - 1
        damaged = min(self._bad, gap) if gap > 0 and self._last_seq is not None else self._bad
        self.damaged += damaged
        self.missing += max(gap - damaged, 0)
        self._bad = 0
        self._is_in_piece = False
        self._last_seq = seq

    def _fill(self) -> bool:
        if self._fd is None:
            try:
                self._fd = open_within(self._folder.path, self._path)
            except OSError:
                return False
        chunk = os.pread(self._fd, _CHUNK, self._offset + len(self._rest))
        self._rest += chunk
        if len(self._rest) > LONGEST_LINE and b"\n" not in chunk:
            self._bad += not self._skips
            self._skips = True
            self._offset += len(self._rest)
            self._rest = b""
        return bool(chunk)


class RunReader:
    """The records of a run in order, over all its attempts, from a position on.

    Args:
        folder: the run's directory.
        after: (attempt, seq) of the last record that is not wanted.
        offset: where the record after it begins in its file, if that is known.
        upto: the last attempt that is wanted; None for all there are.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        after: tuple[int, int] = (0, 0),
        offset: int = 0,
        upto: int | None = None,
    ) -> None:
        self._folder = folder
        self._after = after
        self._upto = upto
        self._attempt: int | None = None
        self._parts: list[RecordFile] = []
        self._offset = offset
        self._extra: list[bytes] = []
        self.damaged = 0
        self.missing = 0

    @property
    def offset(self) -> int:
        """Where to go on in the records file of the attempt of the last record."""
        return self._parts[0].offset if self._parts else 0

    def add(self, lines: Sequence[bytes]) -> None:
        """Take lines that are in no file to be the last ones of the last attempt."""
        self._extra = list(lines)

    def read(self, limit: int = 500) -> list[Entry]:
        """Return at most `limit` further records, all of one attempt; none if there are no more.

        Raises:
            JournalError: a file is a link, or no plain file.
        """
        while True:
            if self._attempt is None and not self._next():
                return []
            found = self._read(limit)
            is_last = True
            if not found:
                # Asked first: once there is a further attempt, this one gets no more.
                is_last = self._attempt == self._last_attempt()
                found = self._read(limit)
            if found:
                self._after = found[-1].record.position
                return found
            if is_last:
                return self._read_extra() if self._extra else []
            self._leave()

    def close(self) -> None:
        """Close the files, and count what is damaged in them."""
        self._leave()

    def _read(self, limit: int) -> list[Entry]:
        main, end = self._parts
        # Asked first: once the end is there, the training process writes no more.
        parts = [main, end] if end.exists() else [main]
        for part in parts:
            while found := part.read(limit):
                new = [entry for entry in found if self._is_new(entry.record)]
                if new:
                    return new
        return []

    def _is_new(self, record: Record) -> bool:
        return record.attempt == self._attempt and record.position > self._after

    def _read_extra(self) -> list[Entry]:
        codec, found = Codec(load=Blobs(self._folder).load), []
        for line in self._extra:
            body = unseal(line.rstrip(b"\n"))
            record = codec.decode(body) if body else None
            if record is not None and record.position > self._after:
                found.append(Entry(record, _BLOBS.decode(body or b"").blobs))
        self._extra = []
        if found:
            self._after = found[-1].record.position
        return found

    def _last_attempt(self) -> int | None:
        known = [n for n in self._folder.attempts() if self._upto is None or n <= self._upto]
        return known[-1] if known else None

    def _next(self) -> bool:
        """Open the next attempt that may have records after the position."""
        left = self._after[0] if self._attempt is None else self._attempt
        known = [n for n in self._folder.attempts() if self._upto is None or n <= self._upto]
        wanted = [n for n in known if n >= left]
        if not wanted:
            return False
        self._attempt = wanted[0]
        offset = self._offset if wanted[0] == self._after[0] else 0
        paths = (self._folder.records(wanted[0]), self._folder.end(wanted[0]))
        self._parts = [
            RecordFile(self._folder, path, offset=offset * (n == 0)) for n, path in enumerate(paths)
        ]
        return True

    def _leave(self) -> None:
        for part in self._parts:
            part.finish()
            part.close()
            self.damaged += part.damaged
            self.missing += part.missing
        self._parts = []
        if self._attempt is not None:
            self._after = max(self._after, (self._attempt + 1, 0))
            self._offset = 0
        self._attempt = None


def _whole_part(line: bytes) -> bytes | None:
    """Return the whole line that a damaged one ends with, if its line feed was lost."""
    at = 0
    for _ in range(_MAX_PARTS):
        at = line.find(_START, at + 1)
        if at < 0:
            break
        if body := unseal(line[at:]):
            return body
    return None


def first_entry(folder: RunFolder, attempt: int) -> Entry | None:
    """Return the first record of an attempt that can be read."""
    file = RecordFile(folder, folder.records(attempt))
    try:
        found = file.read(1)
    finally:
        file.close()
    return found[0] if found else None


def last_record(folder: RunFolder, attempt: int, rank: int = 0) -> Record | None:
    """Return the last record of an attempt that can be read, its end included."""
    last = None
    for path in (folder.records(attempt, rank), folder.end(attempt, rank)):
        # The last lines will do, as a rule; a reader finds its way into the midst of a file.
        begin = max(path.stat().st_size - _TAIL, 0) if path.exists() else 0
        for offset in (begin, 0) if begin else (0,):
            file = RecordFile(folder, path, offset=offset)
            try:
                while found := file.read():
                    last = found[-1].record
            finally:
                file.close()
            if last is not None:
                break
    return last


def recover(folder: RunFolder, *, now: float, upto: int | None = None) -> int:
    """Give every attempt whose process is gone the end it could not write; return how many.

    Args:
        folder: the run's directory.
        now: Unix seconds.
        upto: the last attempt to look at; None for all.

    Raises:
        OSError: an end can't be written.
    """
    count = 0
    for attempt in folder.attempts():
        path = folder.records(attempt)
        if (upto is not None and attempt > upto) or is_being_written(path):
            continue
        last = last_record(folder, attempt)
        if last is not None and isinstance(last.event, RunEnded):
            continue
        seq = last.seq if last else 0
        time = max(last.time, path.stat().st_mtime) if last else now
        error = Failure(type="ProcessLost", message=REASON_LOST)
        event = RunEnded(status="failed", reason=REASON_LOST, error=error)
        event = true_end(folder, attempt, event)
        run = last.run if last else folder.run
        end = Record(seq=seq + 1, run=run, time=time, event=event, attempt=attempt)
        count += write_end(folder, end)
    return count


def true_end(folder: RunFolder, attempt: int, end: RunEnded) -> RunEnded:
    """Return the end of a run, with the failure of another rank as its cause if there is one."""
    if end.status == "finished":
        return end
    found: list[tuple[bool, float, int, Failure]] = []
    for rank in folder.ranks(attempt):
        if rank == 0:
            continue
        file = RecordFile(folder, folder.records(attempt, rank))
        for entry in file.read():
            event = entry.record.event
            if isinstance(event, RunEnded) and event.status == "failed" and event.error:
                is_effect = _lost_connection(event.error)
                found.append((is_effect, entry.record.time, rank, event.error))
        file.close()
    if not found:
        return end
    is_effect, _, rank, error = min(found, key=lambda item: item[:3])
    if is_effect and end.error is not None and not _lost_connection(end.error):
        return end
    reason = f"rank {rank}: {error.type}: {error.message}"
    return RunEnded(status="failed", reason=reason, error=error, best=end.best)


def _lost_connection(error: Failure) -> bool:
    """Return whether a failure is what one rank sees of another one's end."""
    text = f"{error.type}: {error.message}"
    return re.search(r"\b(gloo|NCCL|Dist\w*Error|[Cc]onnection \w+)\b", text) is not None


def _with(record: Record, **fields: Any) -> Record:
    event = record.event
    if isinstance(event, UnknownEvent):
        return record
    return msgspec.structs.replace(record, event=msgspec.structs.replace(event, **fields))
