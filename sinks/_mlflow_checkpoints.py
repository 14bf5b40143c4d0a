"""Checkpoints in MLflow: of the best and the last ones only the newest, each file once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

from trainbus.events import CheckpointSaved, Record
from trainbus.toolkit.sinks import Superseded, Wanted, is_wanted

from ._mlflow_artifacts import Artifacts
from ._mlflow_run import TrackedRun
from ._mlflow_store import Store
from ._mlflow_text import fields

logger = logging.getLogger("trainbus.sinks.mlflow")

_FOLDER = "checkpoints"


class Checkpoints:
    """Keeps the checkpoints of one run; the tag `checkpoint.<kind>` says where each kind is.

    Args:
        wanted: which are kept.
        store: where the run is.
        files: the run's files.
        run: the run, which has begun.
        superseded: knows what was gone.
        lose: called with what can't be kept, and why.
    """

    def __init__(
        self,
        wanted: Wanted,
        store: Store,
        files: Artifacts,
        run: TrackedRun,
        superseded: Superseded,
        lose: Callable[[str, Exception], None],
    ) -> None:
        self._wanted, self._store, self._files, self._run = wanted, store, files, run
        self._superseded, self._lose = superseded, lose
        self._periodic: tuple[CheckpointSaved, str] | None = None
        self._digests: dict[str, str | None] = {}
        self._can_delete = True

    def keep(self, record: Record, event: CheckpointSaved) -> None:
        """Send a checkpoint, unless it is there, and delete those that it takes the place of."""
        stands_in = self._wanted == "best" and event.kind == "last"
        if not is_wanted(self._wanted, event) or (stands_in and self._path("best")):
            return
        before = self._path(event.kind)
        try:
            path = self._send(event, before)
        except FileNotFoundError:
            self._superseded.missed(event)
            return
        # The store for files may need a package or a right that the metrics don't.
        except (ImportError, PermissionError) as error:
            self._lose(f"{_FOLDER}/{event.kind}", error)
            return
        about = {"path": path, **fields(record, "epoch", "step", "metrics", "metadata")}
        self._run.tag(f"checkpoint.{event.kind}", json.dumps(about))
        if event.kind != "periodic":
            self._superseded.stored(event.kind)
            self._delete(event.kind, before, path)
        if self._wanted == "best" and event.kind == "best":
            self._superseded.stored("last")
            self._delete("last", self._path("last"), None)
            self._run.untag("checkpoint.last")

    def end(self) -> None:
        """Count the files that were gone, and that no newer one took the place of."""
        for event in self._superseded.lost():
            self._lose(f"{_FOLDER}/{event.kind}", FileNotFoundError(f"no file at {event.path}"))

    def _path(self, kind: str) -> str | None:
        """Return where the newest checkpoint of a kind is among the files."""
        try:
            return str(json.loads(self._run.tags[f"checkpoint.{kind}"])["path"])
        except (KeyError, ValueError, TypeError):
            return None

    def _send(self, event: CheckpointSaved, before: str | None) -> str:
        """Return where the file is: what is there already is not sent again."""
        if event.kind == "periodic":
            at = f"step-{event.step}" if event.epoch is None else f"epoch-{event.epoch + 1}"
            place = f"{_FOLDER}/{at}/{Path(event.path).name}"
            self._files.send(event.path, f"{_FOLDER}/{at}")
            self._periodic = (event, place)
            return place
        if self._periodic is not None and _is_same(event, self._periodic[0]):
            return self._periodic[1]
        digest = _digest(event.path)
        if before is None or digest is None or digest != self._digests.get(event.kind):
            before = f"{_FOLDER}/{event.kind}/{Path(event.path).name}"
            self._files.send(event.path, f"{_FOLDER}/{event.kind}")
        self._digests[event.kind] = digest
        return before

    def _delete(self, kind: str, path: str | None, kept: str | None) -> None:
        if path is None or path == kept or not path.startswith(f"{_FOLDER}/{kind}/"):
            return
        try:
            self._store.delete(self._run.files, path)
        except Exception as error:  # what the store of the files raises has no common class
            if self._can_delete:
                logger.warning("superseded checkpoints can't be deleted in MLflow: %s", error)
            self._can_delete = False


def _is_same(event: CheckpointSaved, other: CheckpointSaved) -> bool:
    """Return whether a file that nobody writes again was just saved for another purpose too."""
    is_final = event.final and other.final
    same = (event.path, event.epoch, event.step) == (other.path, other.epoch, other.step)
    return is_final and same


def _digest(path: str) -> str | None:
    """Return the digest of a file, None for a folder."""
    if not Path(path).is_file():
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
