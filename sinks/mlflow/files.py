"""The files of a run in MLflow: pictures, tables, texts, artifacts and checkpoints.

A file that is sent again has the same name, and so replaces itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainbus.events import AlertRaised, CheckpointSaved, Record, TableLogged
from trainbus.toolkit.plots import picture
from trainbus.toolkit.sinks import (
    Names,
    Superseded,
    TrackerSink,
    Wanted,
    epochs_done,
    is_wanted,
    set_fields,
    side_by_side,
    to_json,
)

from .rows import TrackedRun, clean_text, without_dots
from .session import Store

logger = logging.getLogger("trainbus.sinks.mlflow")

_THUMBNAIL = 256
_CHECKPOINTS, _IMAGES = "checkpoints", "images"


class Artifacts:
    """Uploads the files of one run.

    Args:
        client: MLflow's client.
        run: the run; `begin` it before anything is uploaded.
        sink: counts what can't be stored.
    """

    def __init__(self, client: Any, run: TrackedRun, sink: TrackerSink) -> None:
        self._client, self.run, self._sink = client, run, sink
        self._paths = Names(_clean_path, 120)

    def stamp(self, record: Record) -> str:
        """Return a name that is unique to a record, and that sorts by its position."""
        at = 0 if isinstance(record.event, AlertRaised) else self.run.timeline(record.event)
        return "{:06}-{}.{}".format(at, *record.position) + (record.source and f".{record.source}")

    def picture(self, record: Record, event: Any) -> None:
        """Log a picture as `log_image` does, but under a name that is always the same."""
        with tempfile.TemporaryDirectory() as folder:
            images = Path(folder, _IMAGES)
            images.mkdir()
            stem = "+".join(
                (
                    self._paths(event.key).replace("/", "~"),
                    f"step+{self.run.timeline(event)}+timestamp+{int(record.time * 1000)}",
                    str(
                        uuid.uuid5(
                            uuid.NAMESPACE_OID, f"{record.run} {record.position}{record.source}"
                        )
                    ),
                )
            )
            if self._render(event, images / stem):
                self.upload(str(images), _IMAGES)
                self.run.tag("mlflow.loggedImages", "True")

    def _render(self, event: Any, stem: Path) -> bool:
        """Write a picture and its thumbnail as `<stem>.…`; return whether that was possible."""
        from mlflow import Image

        with self._sink.showing(event.key):
            source = stem.parent.with_name("source")
            source.write_bytes(picture(event)[0])
            image = Image(str(source))
            image.save(f"{stem}.png")
            scale = _THUMBNAIL / max(image.size)
            small = image.resize(tuple(max(round(side * scale), 1) for side in image.size))
            small.save(f"{stem}+compressed.webp")
            return True
        return False

    def table(self, record: Record, event: TableLogged) -> None:
        """Log a table as `log_table` does, which would append a table that comes again."""
        name = f"{self.stamp(record)}.json"
        text = json.dumps({"columns": event.columns, "data": to_json(event.rows)})
        folder = self.write(f"tables/{event.key}", text, name)
        tables = json.loads(self.run.tags.get("mlflow.loggedArtifacts", "[]"))
        table = {"path": f"{folder}/{name}", "type": "table"}
        listed = json.dumps([*tables, *([table] if table not in tables else [])])
        if len(listed) <= self.run.longest_tag:
            self.run.tag("mlflow.loggedArtifacts", listed)

    def store(self, name: str, paths: Sequence[str]) -> None:
        """Upload the files of an artifact; those of the same name keep their folders."""
        for path, file in side_by_side(paths).items():
            folder = _clean_path(os.path.dirname(file))
            self.upload(path, self._paths(f"artifacts/{name}") + (folder and f"/{folder}"))

    def write(self, folder: str, content: str | bytes, name: str) -> str:
        """Log text or JSON as a file, and return the folder of it."""
        data = content if isinstance(content, bytes) else clean_text(content).encode()
        folder = self._paths(folder)
        with tempfile.TemporaryDirectory() as made:
            Path(made, name).write_bytes(data)
            self.upload(str(Path(made, name)), folder)
        return folder

    def upload(self, path: str, folder: str) -> None:
        """Send a file, or the files of a folder; those that can't be stored are lost."""
        try:
            self.send(path, folder)
        # The store for files may need a package or a right that the metrics don't.
        except (FileNotFoundError, ImportError, PermissionError) as error:
            self._sink.lose(folder, error)

    def send(self, path: str, folder: str) -> None:
        """Put a file, or a folder with its files, into a folder of the artifacts.

        Raises:
            FileNotFoundError: it no longer exists.
            ImportError: the store for files needs a package.
            PermissionError: the store for files refuses it.
        """
        if os.path.isdir(path):
            place = folder if folder == _IMAGES else f"{folder}/{Path(path).name}"
            self._client.log_artifacts(self.run.id, path, place)
        elif os.path.isfile(path):
            self._client.log_artifact(self.run.id, path, folder)
        else:
            raise FileNotFoundError(f"no file at {path}")


class Checkpoints:
    """Stores the newest best and last checkpoint of a run, and each periodic one.

    The tag `checkpoint.<kind>` holds the path of the newest one of each kind.

    Args:
        wanted: which to store.
        store: where the run is.
        files: the run's files.
        superseded: collects the checkpoints whose files are gone.
        sink: counts what can't be stored.
    """

    def __init__(
        self,
        wanted: Wanted,
        store: Store,
        files: Artifacts,
        superseded: Superseded,
        sink: TrackerSink,
    ) -> None:
        self._wanted, self._store, self._files, self._run = wanted, store, files, files.run
        self._superseded, self._sink = superseded, sink
        self._periodic: tuple[CheckpointSaved, str] | None = None
        self._digests: dict[str, str | None] = {}
        self._can_delete = True

    def store(self, event: CheckpointSaved) -> None:
        """Send a checkpoint unless it is stored already, and delete those that it replaces."""
        if not is_wanted(self._wanted, event, has_best=self._path("best") is not None):
            return
        before = self._path(event.kind)
        try:
            path = self._send(event, before)
        except FileNotFoundError:
            self._superseded.missed(event)
            return
        # The store for files may need a package or a right that the metrics don't.
        except (ImportError, PermissionError) as error:
            self._sink.lose(f"{_CHECKPOINTS}/{event.kind}", error)
            return
        known = set_fields(event, "epoch", "step", "metrics", "metadata")
        about = {"path": path, **to_json(known)}
        self._run.tag(f"checkpoint.{event.kind}", json.dumps(about))
        if event.kind != "periodic":
            self._superseded.stored(event.kind)
            self._delete(event.kind, before, path)
        if self._wanted == "best" and event.kind == "best":
            self._superseded.stored("last")
            self._delete("last", self._path("last"), None)
            self._run.untag("checkpoint.last")

    def _path(self, kind: str) -> str | None:
        """Return the path of the newest checkpoint of a kind among the files."""
        try:
            return str(json.loads(self._run.tags[f"checkpoint.{kind}"])["path"])
        except (KeyError, ValueError, TypeError):
            return None

    def _send(self, event: CheckpointSaved, before: str | None) -> str:
        """Send a checkpoint unless the same file is stored already, and return its path."""
        if event.kind == "periodic":
            epoch = epochs_done(event.epoch)
            at = f"step-{event.step}" if epoch is None else f"epoch-{epoch}"
            place = f"{_CHECKPOINTS}/{at}/{Path(event.path).name}"
            self._files.send(event.path, f"{_CHECKPOINTS}/{at}")
            self._periodic = (event, place)
            return place
        if self._periodic is not None and _is_same(event, self._periodic[0]):
            return self._periodic[1]
        digest = _digest(event.path)
        if before is None or digest is None or digest != self._digests.get(event.kind):
            before = f"{_CHECKPOINTS}/{event.kind}/{Path(event.path).name}"
            self._files.send(event.path, f"{_CHECKPOINTS}/{event.kind}")
        self._digests[event.kind] = digest
        return before

    def _delete(self, kind: str, path: str | None, kept: str | None) -> None:
        if path is None or path == kept or not path.startswith(f"{_CHECKPOINTS}/{kind}/"):
            return
        try:
            self._store.delete(self._run.files, path)
        except Exception as error:  # the errors of the stores have no common class
            if self._can_delete:
                logger.warning("superseded checkpoints can't be deleted in MLflow: %s", error)
            self._can_delete = False


def _is_same(event: CheckpointSaved, other: CheckpointSaved) -> bool:
    """Return whether two events name the same file, which is never written again."""
    same = (event.path, event.epoch, event.step) == (other.path, other.epoch, other.step)
    return same and event.final and other.final


def _digest(path: str) -> str | None:
    """Return the digest of a file, None for a folder."""
    if not Path(path).is_file():
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _clean_path(path: str) -> str:
    """Return a path that every store for artifacts accepts."""
    return without_dots(re.sub(r"[^A-Za-z0-9_./ -]", "_", path))
