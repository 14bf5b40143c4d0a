"""Files that are stored with a run, as versions of Trackio's artifacts."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

from trainbus.events import ArtifactLogged
from trainbus.toolkit.sinks import Names, to_json

from .session import Database

_OWN = r"latest$|v\d+$"
"""Aliases that Trackio itself gives."""


class Artifacts:
    """Stores files as versions of artifacts; the same files again are the same version.

    Args:
        database: the run in its database.
        lose: called with the name of an artifact and why a file of it can't be stored.
    """

    def __init__(self, database: Database, lose: Callable[[str, object], None]) -> None:
        self._database, self._lose = database, lose
        self._names = Names(_valid_name)

    def store(self, event: ArtifactLogged, *, overwrite: bool = False) -> None:
        """Store the files of an event as a new version, or in place of the last one."""
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        try:
            artifact = trackio.Artifact(self._names(event.name), event.kind)
            for number, path in enumerate(map(Path, event.paths)):
                is_first = path.name not in [Path(other).name for other in event.paths[:number]]
                inside = path.name if is_first else f"{number}/{path.name}"
                if path.is_dir():
                    artifact.add_dir(path, inside)
                elif path.is_file():
                    artifact.add_file(path, inside)
                else:
                    self._lose(event.name, f"no file at {path}")
            if artifact._pending_files or not event.paths:
                SQLiteStorage.commit_artifact_version(
                    project=self._database.project,
                    name=artifact.name,
                    type=event.kind,
                    description=None,
                    manifest=artifact._build_manifest(self._database.project),
                    metadata=to_json(event.metadata),
                    aliases=[_valid_name(a) for a in event.aliases if not re.match(_OWN, a)],
                    run_name=self._database.name,
                    run_id=self._database.run,
                    overwrite=overwrite,
                )
        except (OSError, TypeError, ValueError, sqlite3.Error) as error:
            self._lose(event.name, error)


def _valid_name(name: str) -> str:
    """Return a name that Trackio accepts: letters, digits, `.`, `_` and `-`."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name) or "artifact"
