"""Files that are kept with a run: Trackio's artifacts, in versions."""

from __future__ import annotations

import logging
import re
import sqlite3
from pathlib import Path

from trainbus.events import ArtifactLogged
from trainbus.toolkit.sinks import Names

from ._trackio_database import Database
from ._trackio_values import plain

logger = logging.getLogger("trainbus.sinks.trackio")

_OWN = r"latest$|v\d+$"
"""Aliases that Trackio itself gives."""


class Artifacts:
    """Stores files as versions of artifacts; the same files again are the same version."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._names = Names(_valid_name)

    def keep(self, event: ArtifactLogged, *, overwrite: bool = False) -> int:
        """Store the files of an event as a version, in place of the last one if told to.

        Returns:
            How much of it is lost; of that there are warnings.
        """
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        lost = 0
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
                    lost += 1
                    logger.warning("artifact %r: %s is gone", event.name, path)
            if artifact._pending_files or not event.paths:
                SQLiteStorage.commit_artifact_version(
                    project=self._database.project,
                    name=artifact.name,
                    type=event.kind,
                    description=None,
                    manifest=artifact._build_manifest(self._database.project),
                    metadata=plain(event.metadata),
                    aliases=[_valid_name(a) for a in event.aliases if not re.match(_OWN, a)],
                    run_name=self._database.name,
                    run_id=self._database.run,
                    overwrite=overwrite,
                )
        except (OSError, TypeError, ValueError, sqlite3.Error) as error:
            lost += 1
            logger.warning("artifact %r can't be kept in Trackio: %s", event.name, error)
        return lost


def _valid_name(name: str) -> str:
    """Return a name that Trackio takes: letters, digits, `.`, `_` and `-`."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name) or "artifact"
