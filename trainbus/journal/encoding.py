"""The line format of a journal: one JSON object per line, with a checksum as its first field.

    {"crc":"<8 hex digits>","seq":1,"run":…,"time":…,"event":{"type":…}}
    {"crc":"<8 hex digits>","blobs":[…],"files":[…],"seq":2,…}

`crc` is the CRC-32 of the bytes after it, from the quote of the next key to the closing brace.
The line of a record that names files has two more fields before `seq`: `blobs` lists the copies in
the run's directory, `files` the size and modification time of the files without a copy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from zlib import crc32

import msgspec

from trainbus.events import (
    ArtifactLogged,
    CheckpointSaved,
    Codec,
    ImageLogged,
    Record,
    event_name,
)
from trainbus.journal.blobs import Blob, Blobs, array_store
from trainbus.journal.directory import RunFolder
from trainbus.journal.file_states import FileState, states_of

MAX_LINE = 2**20
"""Longer events are stored as blobs."""

LONGEST_LINE = 16 * MAX_LINE
"""Longest line that is ever written: a long event stays in its line if no blob can be written."""

ARRAY_IN_LINE = 32 * 2**10
"""Arrays of this size in bytes and larger ones are stored as blobs."""

_MAX_ARTIFACT = 64 * 2**20
_WITH_FILES = (ImageLogged, CheckpointSaved, ArtifactLogged)

LINE_START = b'{"crc":"'
"""First bytes of every line."""

_CHECKSUM = b'%08x",'
_CHECKSUM_END = len(LINE_START) + len(_CHECKSUM % 0)
_FILE_FIELDS = (b'{"blobs":', b'{"files":')


class Entry(NamedTuple):
    """A line of the journal: the record, and what is stored about the files that it names."""

    record: Record
    blobs: Sequence[Blob]
    """Copies of files."""
    files: Sequence[FileState] = ()
    """The state of the other files when they were logged."""
    end: int = 0
    """Position in the records file after the line; 0 if the line is in no file."""


class _Files(msgspec.Struct, omit_defaults=True):
    blobs: list[Blob] = []
    files: list[FileState] = []


_FILES = msgspec.json.Decoder(_Files)


def seal(body: bytes) -> bytes:
    """Return the line for a JSON object: the object with its checksum, and a line feed."""
    rest = body[1:]
    return LINE_START + _CHECKSUM % crc32(rest) + rest + b"\n"


def unseal(line: bytes) -> bytes | None:
    """Return the JSON object of a line (without its line feed), None if the line is damaged."""
    rest = line[_CHECKSUM_END:]
    # The digits are compared as bytes: a letter in another case is damage too.
    if line.startswith(LINE_START) and (
        line[len(LINE_START) : _CHECKSUM_END] == _CHECKSUM % crc32(rest)
    ):
        return b"{" + rest
    return None


def decode_entry(body: bytes, codec: Codec, end: int = 0) -> Entry:
    """Return the entry for the JSON object of a line.

    Args:
        body: the JSON object.
        codec: decodes the record.
        end: position in the records file after the line.

    Raises:
        msgspec.DecodeError: the object is not JSON, or not a record.
        JournalError: a blob that the record needs can't be read.
    """
    record = codec.decode(body)
    if not body.startswith(_FILE_FIELDS):
        return Entry(record, (), (), end)
    found = _FILES.decode(body)
    return Entry(record, found.blobs, found.files, end)


class RecordEncoder:
    """Encodes records as lines; stores what is too large for a line as blobs.

    Args:
        folder: the run's directory.
        size: returns the bytes of the records so far.
        max_bytes: no blob is written if it would make records and blobs together exceed this size.
        wants_files: returns whether a copy of an event's files is needed.
        warn: called with a kind and a message for what can't be stored.
    """

    def __init__(
        self,
        folder: RunFolder,
        size: Callable[[], int],
        max_bytes: int,
        wants_files: Callable[[CheckpointSaved | ArtifactLogged], bool],
        warn: Callable[[str, str], None],
    ) -> None:
        self._size = size
        self._max_bytes = max_bytes
        self._wants_files = wants_files
        self._warn = warn
        self._blobs = Blobs(folder)
        self._codec = Codec(store=array_store(self._blobs, ARRAY_IN_LINE, self._fits))

    @property
    def is_full(self) -> bool:
        """Whether records and blobs have reached their maximum size."""
        return self._room <= 0

    @property
    def _room(self) -> int:
        return self._max_bytes - self._size() - self._blobs.written

    def _fits(self, size: int) -> bool:
        return size <= self._room

    def line(self, record: Record) -> bytes:
        """Return the line of a record."""
        # The copies are made first: a record must never name a missing blob.
        named: _Files | None = None
        if isinstance(record.event, _WITH_FILES):
            named = self._copy_or_note(record.event)
        body = self._codec.encode(record)
        if len(body) > MAX_LINE:
            body = self._shorten(record, body)
        if named and (named.blobs or named.files):
            return seal(msgspec.json.encode(named)[:-1] + b"," + body[1:])
        return seal(body)

    def _copy_or_note(self, event: Any) -> _Files:
        """Return the copies of an event's files, and the state of the files without a copy."""
        blobs = self._copy_files(event)
        copied = {blob.path for blob in blobs}
        paths = event.paths if isinstance(event, ArtifactLogged) else [event.path]
        states = states_of(path for path in paths if path and path not in copied)
        return _Files(blobs=blobs, files=states)

    def _copy_files(self, event: Any) -> list[Blob]:
        if isinstance(event, ImageLogged):
            paths, limit = [event.path] if event.path else [], float(self._max_bytes)
        elif not self._wants_files(event):
            return []
        elif isinstance(event, CheckpointSaved):
            # A file that is overwritten again and again is not copied each time.
            paths, limit = [event.path] if event.final else [], float(self._max_bytes)
        else:
            # Copies have no folders, so files of the same name can't be distinguished.
            names = {os.path.basename(path) for path in event.paths}
            paths = event.paths if len(names) == len(event.paths) else []
            limit = float(_MAX_ARTIFACT)
        found = []
        for path in paths:
            try:
                blob = self._blobs.add_file(path, min(limit, self._room))
            except (OSError, ValueError) as error:
                self._warn("blob", f"can't copy {path!r} into the journal: {error}")
            else:
                found += [blob] if blob else []
        return found

    def _shorten(self, record: Record, body: bytes) -> bytes:
        event = msgspec.json.encode(msgspec.json.decode(body, type=_Event).event)
        try:
            digest = self._blobs.add_event(event) if self._fits(len(event)) else None
        except OSError:
            digest = None
        if digest is None:
            return body
        line = {
            "seq": record.seq,
            "run": record.run,
            "time": record.time,
            "event": {"type": event_name(record.event), "blob": digest},
            "attempt": record.attempt,
            "rank": record.rank,
            "schema": record.schema,
            **({"stream": record.stream} if record.stream else {}),
        }
        return msgspec.json.encode(line)


class _Event(msgspec.Struct):
    event: msgspec.Raw
