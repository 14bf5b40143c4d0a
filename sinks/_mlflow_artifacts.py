"""The files of a run in MLflow: pictures, tables and texts, and the files that a training has.

What comes again has the names that it had, and so replaces itself.
"""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainbus.errors import MissingPackageError
from trainbus.events import AlertRaised, Record, TableLogged
from trainbus.toolkit.plots import picture
from trainbus.toolkit.sinks import Names, side_by_side

from ._mlflow_run import TrackedRun
from ._mlflow_text import clean_path, clean_text, fields

_THUMBNAIL = 256
_IMAGES = "images"


class Artifacts:
    """Uploads the files of one run.

    Args:
        client: MLflow's client.
        run: the run, which has begun.
        lose: called with what can't be kept, and why.
    """

    def __init__(
        self, client: Any, run: TrackedRun, lose: Callable[[str, Exception], None]
    ) -> None:
        self._client, self._run, self._lose = client, run, lose
        self._paths = Names(clean_path, 120)

    def stamp(self, record: Record) -> str:
        """Return a name that no other record has, and that sorts by its place on the axis."""
        at = 0 if isinstance(record.event, AlertRaised) else self._run.timeline(record.event)
        return "{:06}-{}.{}".format(at, *record.position)

    def picture(self, record: Record, event: Any) -> None:
        """Log a picture as `log_image` does, but under a name that is the same the next time."""
        with tempfile.TemporaryDirectory() as folder:
            images = Path(folder, _IMAGES)
            images.mkdir()
            stem = "+".join(
                (
                    self._paths(event.key).replace("/", "~"),
                    f"step+{self._run.timeline(event)}+timestamp+{int(record.time * 1000)}",
                    str(uuid.uuid5(uuid.NAMESPACE_OID, f"{record.run} {record.position}")),
                )
            )
            try:
                source = Path(folder, "source")
                source.write_bytes(picture(event)[0])
                _render(source, images / stem)
            # A picture that can't be made is not a reason to stop.
            except (OSError, ValueError, TypeError, ImportError, MissingPackageError) as error:
                self._lose(event.key, error)
                return
            self.upload(str(images), _IMAGES)
        self._run.tag("mlflow.loggedImages", "True")

    def table(self, record: Record, event: TableLogged) -> None:
        """Log a table as `log_table` does, which would append what comes again."""
        rows = fields(record, "rows").get("rows", [])
        name = f"{self.stamp(record)}.json"
        text = json.dumps({"columns": event.columns, "data": rows})
        folder = self.write(f"tables/{event.key}", text, name)
        tables = json.loads(self._run.tags.get("mlflow.loggedArtifacts", "[]"))
        table = {"path": f"{folder}/{name}", "type": "table"}
        listed = json.dumps([*tables, *([table] if table not in tables else [])])
        if len(listed) <= self._run.longest_tag:
            self._run.tag("mlflow.loggedArtifacts", listed)

    def keep(self, name: str, paths: Sequence[str]) -> None:
        """Upload the files of an artifact; those of one name keep their folders."""
        for path, file in side_by_side(paths).items():
            folder = clean_path(os.path.dirname(file))
            self.upload(path, self._paths(f"artifacts/{name}") + (folder and f"/{folder}"))

    def write(self, folder: str, content: str | bytes, name: str) -> str:
        """Log a text or JSON as a file, and return the folder that it is in."""
        data = content if isinstance(content, bytes) else clean_text(content).encode()
        folder = self._paths(folder)
        with tempfile.TemporaryDirectory() as made:
            Path(made, name).write_bytes(data)
            self.upload(str(Path(made, name)), folder)
        return folder

    def upload(self, path: str, folder: str) -> bool:
        """Return whether a file, or the files of a folder, are among the artifacts now."""
        try:
            self.send(path, folder)
        # The store for files may need a package or a right that the metrics don't.
        except (FileNotFoundError, ImportError, PermissionError) as error:
            self._lose(folder, error)
            return False
        return True

    def send(self, path: str, folder: str) -> None:
        """Put a file, or a folder with its files, into a folder of the artifacts.

        Raises:
            FileNotFoundError: it is not there any more.
            ImportError: the store for files needs a package.
            PermissionError: the store for files refuses it.
        """
        if os.path.isdir(path):
            place = folder if folder == _IMAGES else f"{folder}/{Path(path).name}"
            self._client.log_artifacts(self._run.id, path, place)
        elif os.path.isfile(path):
            self._client.log_artifact(self._run.id, path, folder)
        else:
            raise FileNotFoundError(f"no file at {path}")


def _render(source: Path, stem: Path) -> None:
    """Write a picture and its thumbnail as files whose names begin with a stem."""
    from mlflow import Image

    image = Image(str(source))
    image.save(f"{stem}.png")
    scale = _THUMBNAIL / max(image.size)
    small = image.resize(tuple(max(round(side * scale), 1) for side in image.size))
    small.save(f"{stem}+compressed.webp")
