"""The database of a project, and the rows of one run that are written to it."""

from __future__ import annotations

import os
import re
import sqlite3
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from trainbus.errors import SinkError
from trainbus.events import AlertRaised, Record
from trainbus.interfaces import RunInfo
from trainbus.toolkit.sinks import Names, Timeline, required_package, to_json, utf8

_LEVELS = {"info": "info", "warning": "warn", "error": "error"}


def import_trackio(folder: str | None) -> Any:
    """Import Trackio, which reads the folder for its data once, when it is imported.

    Raises:
        MissingPackageError: trackio is not installed.
        SinkError: it has already been imported with another folder.
    """
    wanted = None if folder is None else Path(folder).expanduser().absolute()
    before = os.environ.get("TRACKIO_DIR")
    is_new = "trackio" not in sys.modules
    if wanted is not None and is_new:
        os.environ["TRACKIO_DIR"] = str(wanted)
    try:
        with required_package("trackio"):
            import trackio
            from trackio.utils import TRACKIO_DIR
    finally:
        if before is not None:
            os.environ["TRACKIO_DIR"] = before
        elif wanted is not None and is_new:
            os.environ.pop("TRACKIO_DIR", None)
    if wanted is not None and wanted != TRACKIO_DIR.absolute():
        raise SinkError(
            f"Trackio already stores in {TRACKIO_DIR} in this process, not in {wanted}; remove "
            "`dir`, or set `isolation: process`"
        )
    return trackio


class Database:
    """A run in the database of its project.

    Args:
        project: name of the project; None for that of the training, made valid.
        run: the run, which the database knows by its id.

    Raises:
        SinkError: the project or the folder can't be used.
    """

    def __init__(self, project: str | None, run: RunInfo) -> None:
        from trackio import fragments, utils
        from trackio.sqlite_storage import SQLiteStorage

        self._fragments, self._folder = fragments, utils.TRACKIO_DIR
        self._keys = Names(lambda key: utf8(key).lstrip("_"))
        self._rows: list[dict[str, Any]] = []
        self.run = run.id
        self.project = _project_name(project, run.started.project)
        name = utf8(re.sub(r"[/\\\x00]|^\.+$", "-", run.started.name or run.id))[:200]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            names = {r["id"]: r["name"] for r in SQLiteStorage.get_run_records(self.project)}
            self.name = names.get(run.id, name)
            stored = SQLiteStorage.get_run_config(self.project, run_id=run.id)
            step = SQLiteStorage.get_max_step_for_run(self.project, self.name, run_id=run.id)
            is_on_network_drive = utils.get_storage_mode() == "jsonl"
            self._writer = fragments.FragmentWriter() if is_on_network_drive else None
        except (OSError, sqlite3.Error) as error:
            text = f"can't use {self._folder} ({error}); set another `dir`"
            raise SinkError(text) from error
        self.config: dict[str, Any] = dict(stored or {})
        self.last = step or 0
        """The highest step that has a value."""

    def key(self, record: Record) -> str:
        """Return the key of a record, which is the same each time it comes."""
        return f"{self.run}-{record.attempt}-{record.seq}" + (record.source and f"-{record.source}")

    def configure(self, record: Record, values: Mapping[str, Any]) -> None:
        """Change the config, which is stored with a row that has no values."""
        self.config |= {self._keys(str(key)): to_json(value) for key, value in values.items()}
        self.log(record, 0, {}, config=dict(self.config))

    def place(self, event: Any) -> int:
        """Return the step of an event; one without a step or epoch is at the last step."""
        return Timeline(self.last)(event)

    def log(self, record: Record, step: int, values: Mapping[str, Any], **more: Any) -> None:
        """Add a row of values at a step."""
        self.last = max(self.last, step)
        entry = {"metrics": values, "step": step, "log_id": self.key(record), **more}
        self._add(self._fragments.metric_record, record, entry)

    def log_system(self, record: Record, values: Mapping[str, Any]) -> None:
        """Add a row of system metrics, whose x axis is time."""
        entry = {"metrics": values, "log_id": self.key(record)}
        self._add(self._fragments.system_metric_record, record, entry)

    def alert(self, record: Record, event: AlertRaised) -> None:
        """Add an alert at the last step."""
        entry = {
            "level": _LEVELS[event.level],
            "step": self.last,
            "title": utf8(event.title),
            "text": utf8(event.text) or None,
            "alert_id": self.key(record),
        }
        self._add(self._fragments.alert_record, record, entry)

    def _add(self, build: Any, record: Record, entry: Mapping[str, Any]) -> None:
        run = {"project": self.project, "run": self.name, "run_id": self.run}
        self._rows.append(build({**run, **entry}) | {"timestamp": iso(record.time)})

    def store(self) -> None:
        """Write the rows that are not stored yet.

        Raises:
            SinkError: the database can't be written; the rows are kept.
        """
        if not self._rows:
            return
        try:
            if self._writer is None:
                self._fragments.import_records(self._rows)
            else:
                self._writer.write_local(self._rows)
        except (OSError, sqlite3.Error) as error:
            text = f"Trackio's database can't be written ({error}); check {self._folder}"
            raise SinkError(text, retry=True) from error
        self._rows = []


def iso(time: float) -> str:
    """Return a time as Trackio writes it."""
    return datetime.fromtimestamp(time, timezone.utc).isoformat()


def _project_name(wanted: str | None, given: str | None) -> str:
    from trackio.sqlite_storage import SQLiteStorage

    name = wanted or utf8(given or "").strip() or "trainbus"
    try:
        SQLiteStorage.validate_project_name(name)
    except ValueError as error:
        if wanted is not None:
            raise SinkError(f"{error}; set another `project`") from error
        return f"trainbus-{name}-runs"
    return name
