"""Decides which files the records of a journal may name, and where they are now."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from trainbus.blobs import Blob, Blobs
from trainbus.errors import JournalError
from trainbus.events import (
    ArtifactLogged,
    CheckpointSaved,
    ImageLogged,
    Record,
    RunStarted,
    UnknownEvent,
)
from trainbus.recordfile import Entry
from trainbus.runfolder import RunFolder

_NAMING_FILES = frozenset({RunStarted, ImageLogged, CheckpointSaved, ArtifactLogged})


class Files:
    """Resolves the paths in records.

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


def _with(record: Record, **fields: Any) -> Record:
    event = record.event
    if isinstance(event, UnknownEvent):
        return record
    return msgspec.structs.replace(record, event=msgspec.structs.replace(event, **fields))
