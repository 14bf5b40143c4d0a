"""Lines of a journal: a JSON object each, with its checksum in front, and what is kept beside it.

{"crc":"<8 hex digits: crc32 of the bytes from the next quote to the line feed>","seq":1,…}

A record that names files says before `seq` what is known of them: `blobs` are copies in the run's
directory, `files` the size and time of those that are where they were.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
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
from trainbus.journal.file_states import states_of

MAX_LINE = 2**20
"""Longer events are kept as blobs."""

LONGEST_LINE = 16 * MAX_LINE
"""An event that finds no room as a blob is one long line; what is longer is no line of ours."""

_MAX_ARTIFACT = 64 * 2**20
_ARRAY_IN_LINE = 32 * 2**10
_WITH_FILES = (ImageLogged, CheckpointSaved, ArtifactLogged)


def seal(body: bytes) -> bytes:
    """Return a line of the journal: a JSON object with its checksum in front."""
    rest = body[1:]
    return b'{"crc":"%08x",%b\n' % (crc32(rest), rest)


def unseal(line: bytes) -> bytes | None:
    """Return the JSON object of a line (without its line feed), None if the line is damaged."""
    rest = line[18:]
    # The digits are compared as text: a flip of a letter's case is damage too.
    if line[:8] == b'{"crc":"' and line[8:18] == b'%08x",' % crc32(rest):
        return b"{" + rest
    return None


class RecordEncoder:
    """Makes lines of records; what is too large for one is kept as a blob.

    Args:
        folder: the run's directory.
        size: returns the bytes of the records so far.
        max_bytes: size of records and blobs together that is not exceeded by a blob.
        keeps: says whether a copy of an event's file is wanted.
        warn: told what can't be kept; of each kind of thing, by its first argument, once.
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
        self._keeps = wants_files
        self._warn = warn
        self._blobs = Blobs(folder)
        self._codec = Codec(store=array_store(self._blobs, _ARRAY_IN_LINE, self._fits))

    @property
    def is_full(self) -> bool:
        """Whether records and blobs have the bytes that they may have."""
        return self._room <= 0

    @property
    def _room(self) -> int:
        return self._max_bytes - self._size() - self._blobs.written

    def _fits(self, size: int) -> bool:
        return size <= self._room

    def line(self, record: Record) -> bytes:
        """Return the line of a record."""
        about: dict[str, Any] = {}
        if isinstance(record.event, _WITH_FILES):
            about = self._about_files(record.event)
        body = self._codec.encode(record)
        if len(body) > MAX_LINE:
            body = self._shorten(record, body)
        if about:
            return seal(msgspec.json.encode(about)[:-1] + b"," + body[1:])
        return seal(body)

    def _about_files(self, event: Any) -> dict[str, Any]:
        """Return what is known of an event's files: their copies, or what they are now."""
        blobs = self._copy_files(event)
        copied = {blob.path for blob in blobs}
        paths = event.paths if isinstance(event, ArtifactLogged) else [event.path]
        states = states_of(path for path in paths if path and path not in copied)
        return {key: found for key, found in (("blobs", blobs), ("files", states)) if found}

    def _copy_files(self, event: Any) -> list[Blob]:
        if isinstance(event, ImageLogged):
            paths, limit = [event.path] if event.path else [], float(self._max_bytes)
        elif not self._keeps(event):
            return []
        elif isinstance(event, CheckpointSaved):
            # A file that is written again and again is not worth a copy each time.
            paths, limit = [event.path] if event.final else [], float(self._max_bytes)
        else:
            # Files of one name are told apart by their folders, which copies don't have.
            names = {os.path.basename(path) for path in event.paths}
            paths = event.paths if len(names) == len(event.paths) else []
            limit = float(_MAX_ARTIFACT)
        found = []
        for path in paths:
            try:
                blob = self._blobs.add_file(path, min(limit, self._room))
            except (OSError, ValueError) as error:
                self._warn("blob", f"no copy of {path!r} can be kept: {error}")
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
        }
        return msgspec.json.encode(line)


class _Event(msgspec.Struct):
    event: msgspec.Raw
