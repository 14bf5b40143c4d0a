"""Finds the files that records name: their copies, or the originals if they may be used.

Guarantees: a sink never receives a file that has changed since it was logged, nor, in a replay, a
file outside of the run's directory and the trusted folders.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from trainbus.errors import JournalError
from trainbus.events import (
    ArtifactLogged,
    CheckpointSaved,
    ImageLogged,
    Record,
    RunEnded,
    RunStarted,
    UnknownEvent,
)
from trainbus.journal.blobs import Blob, Blobs
from trainbus.journal.directory import RunFolder
from trainbus.journal.encoding import Entry
from trainbus.journal.file_states import FileState, change_of
from trainbus.paths import is_absolute

logger = logging.getLogger("trainbus")

_NAMING_FILES = frozenset({RunStarted, ImageLogged, CheckpointSaved, ArtifactLogged})


class Resolved(NamedTuple):
    """A record with paths that can be opened now."""

    record: Record
    is_superseded: bool = False
    """Whether it is a checkpoint that the trainer has since overwritten or removed."""


class FileResolver:
    """Resolves the paths in records.

    Args:
        folder: the run's directory.
        trusted: folders outside of it whose files may be used; None trusts every path, which is
            only safe for a journal that the training process itself is writing.
    """

    def __init__(self, folder: RunFolder, trusted: Sequence[str | os.PathLike[str]] | None) -> None:
        self._folder = folder
        self._blobs = Blobs(folder)
        self._trusted = None if trusted is None else [Path(t).resolve() for t in trusted]
        self._nowhere = folder.path / "not-available"
        while os.path.lexists(self._nowhere):  # created by whoever made the journal
            self._nowhere = folder.path / f"not-available-{secrets.token_hex(8)}"
        self.refused: list[str] = []
        """Paths in records that are outside of the trusted folders, and were not used."""
        self.damaged: list[str] = []
        """Errors of blobs that records name."""
        self._changed: dict[str, str] = {}
        self._superseded: dict[str, str] = {}

    @property
    def changed(self) -> list[str]:
        """One line for each file that has changed since it was logged.

        An overwritten checkpoint is only included if no later one of its kind was found.
        """
        return list({**self._changed, **self._superseded}.values())

    def add_changed(self, changed: Sequence[str]) -> None:
        """Add lines of another process to `changed`."""
        self._changed |= {line: line for line in changed}

    def resolve(self, entry: Entry) -> Record:
        """Return the record with paths that can be opened now."""
        return self.take(entry).record

    def take(self, entry: Entry, *, is_sent: bool = False) -> Resolved:
        """Return the record with paths that can be opened now.

        Args:
            entry: the record, and what the journal stores about its files.
            is_sent: whether the sink sends checkpoint files; an overwritten checkpoint is then
                superseded, as a later record names the new file.
        """
        event = entry.record.event
        if isinstance(event, CheckpointSaved):
            return self._take_checkpoint(entry, event, is_sent=is_sent)
        if isinstance(event, RunEnded) and self._is_live:
            for kind in list(self._superseded):
                self._add_change(kind, self._superseded.pop(kind))
        return Resolved(self._resolve(entry))

    @property
    def _is_live(self) -> bool:
        return self._trusted is None

    def _take_checkpoint(self, entry: Entry, event: CheckpointSaved, *, is_sent: bool) -> Resolved:
        may_come_again = not event.final and event.kind != "periodic"
        if may_come_again and (is_sent or self._is_live) and self._may_use(event.path):
            change = change_of(event.path, entry.files)
            if change is not None:
                if is_sent:
                    self._superseded[event.kind] = _change_text(change[1])
                # Sinks that only show the path still get it: the trainer did save there.
                return Resolved(entry.record, is_superseded=is_sent)
        record: Any = self._resolve(entry)
        if not record.event.path.startswith(str(self._nowhere)):
            self._superseded.pop(event.kind, None)
        return Resolved(record)

    def _add_change(self, path: str, text: str) -> None:
        if path not in self._changed:
            self._changed[path] = text
            if self._is_live:  # a replay shows all of them at its end
                logger.warning("%s", text)

    def _resolve(self, entry: Entry) -> Record:
        record, blobs, states = entry.record, entry.blobs, entry.files
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
            return _with(record, path=self._find(event.path, kept, states))
        if getattr(event, "paths", None):
            return _with(record, paths=[self._find(path, kept, states) for path in event.paths])
        return record

    def _find(self, path: str, kept: dict[str, Blob], states: Sequence[FileState]) -> str:
        if path in kept:
            try:
                return str(self._blobs.find(kept[path]))
            except JournalError as error:
                self.damaged.append(str(error))
        elif not is_absolute(path):
            self._add_change(
                path, f"{path!r} is not sent: found a relative path, expected an absolute one"
            )
        elif not (self._is_live or os.path.isabs(path)):
            self._add_change(path, f"{path} is not sent: found a URL, expected a file")
        elif not self._may_use(path):
            self.refused.append(path)
        elif (change := change_of(path, states)) is not None and change[0] == "changed":
            self._add_change(path, _change_text(change[1]))
        else:
            return path
        # Nothing exists at this path: sinks report that the file can't be read.
        return str(self._nowhere / Path(path).name)

    def _may_use(self, path: str) -> bool:
        if self._trusted is None:
            return True
        try:
            real = Path(path).resolve()
        except (OSError, ValueError, RuntimeError):
            return False
        return os.path.isabs(path) and any(real.is_relative_to(folder) for folder in self._trusted)


def _change_text(difference: str) -> str:
    return f"{difference}; the file has changed since it was logged, and is not sent"


def _with(record: Record, **fields: Any) -> Record:
    event = record.event
    if isinstance(event, UnknownEvent):
        return record
    return msgspec.structs.replace(record, event=msgspec.structs.replace(event, **fields))
