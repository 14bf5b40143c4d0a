"""The database of a project, and the rows of one run on their way into it."""

from __future__ import annotations

import os
import re
import sqlite3
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainbus.errors import MissingPackageError, SinkError
from trainbus.events import AlertRaised, Record
from trainbus.interfaces import RunInfo
from trainbus.toolkit.sinks import Names, Timeline

from ._trackio_options import TrackioOptions
from ._trackio_values import iso, plain, valid_text

_LEVELS = {"info": "info", "warning": "warn", "error": "error"}


def imported(folder: str | None) -> Any:
    """Import Trackio, which keeps all it stores in the folder that it finds when it is imported.

    Raises:
        MissingPackageError: trackio is not installed.
        SinkError: it was imported before, with another folder.
    """
    wanted = None if folder is None else Path(folder).expanduser().absolute()
    before = os.environ.get("TRACKIO_DIR")
    is_new = "trackio" not in sys.modules
    if wanted is not None and is_new:
        os.environ["TRACKIO_DIR"] = str(wanted)
    try:
        import trackio
        from trackio.utils import TRACKIO_DIR
    except ImportError as error:
        raise MissingPackageError("trackio", extra="trackio") from error
    finally:
        if before is not None:
            os.environ["TRACKIO_DIR"] = before
        elif wanted is not None and is_new:
            os.environ.pop("TRACKIO_DIR", None)
    if wanted is not None and wanted != TRACKIO_DIR.absolute():
        raise SinkError(
            f"Trackio stores in {TRACKIO_DIR} in this process already, not in {wanted}; leave out "
            "`dir`, or set `isolation: process`"
        )
    return trackio


class Database:
    """A run in the database of its project.

    Args:
        options: those of the sink.
        run: the run; what the database has of it is found by its id.

    Raises:
        SinkError: the project or the folder can't be used.
    """

    def __init__(self, options: TrackioOptions, run: RunInfo) -> None:
        from trackio import fragments, utils
        from trackio.sqlite_storage import SQLiteStorage

        self._fragments, self._folder = fragments, utils.TRACKIO_DIR
        self._keys = Names(lambda key: valid_text(key).lstrip("_"))
        self._rows: list[dict[str, Any]] = []
        self.run = run.id
        self.project = _project_name(options.project, run.started.project)
        name = valid_text(re.sub(r"[/\\\x00]|^\.+$", "-", run.started.name or run.id))[:200]
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
        """Return the key of a record, the same one whenever it comes."""
        return f"{self.run}-{record.attempt}-{record.seq}"

    def configure(self, record: Record, values: Mapping[str, Any]) -> None:
        """Change the config, which is stored with a row; an empty one shows nothing."""
        self.config |= {self._keys(str(key)): plain(value) for key, value in values.items()}
        self.log(record, 0, {}, config=dict(self.config))

    def place(self, event: Any) -> int:
        """Return where an event stands; what has no place of its own stands at the last step."""
        return Timeline(self.last)(event)

    def log(self, record: Record, step: int, values: Mapping[str, Any], **more: Any) -> None:
        """Add a row of values at a step."""
        self.last = max(self.last, step)
        entry = {"metrics": values, "step": step, "log_id": self.key(record), **more}
        self._add(self._fragments.metric_record, record, entry)

    def log_system(self, record: Record, values: Mapping[str, Any]) -> None:
        """Add a row of what was measured of the machine, on the axis of time."""
        entry = {"metrics": values, "log_id": self.key(record)}
        self._add(self._fragments.system_metric_record, record, entry)

    def alert(self, record: Record, event: AlertRaised) -> None:
        """Add an alert, at the last step that there is."""
        entry = {
            "level": _LEVELS[event.level],
            "step": self.last,
            "title": valid_text(event.title),
            "text": valid_text(event.text) or None,
            "alert_id": self.key(record),
        }
        self._add(self._fragments.alert_record, record, entry)

    def _add(self, build: Any, record: Record, entry: Mapping[str, Any]) -> None:
        run = {"project": self.project, "run": self.name, "run_id": self.run}
        self._rows.append(build({**run, **entry}) | {"timestamp": iso(record.time)})

    def store(self) -> None:
        """Store the rows that are not stored yet.

        Raises:
            SinkError: the database can't be written; they are kept.
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


def _project_name(wanted: str | None, given: str | None) -> str:
    from trackio.sqlite_storage import SQLiteStorage

    name = wanted or valid_text(given or "").strip() or "trainbus"
    try:
        SQLiteStorage.validate_project_name(name)
    except ValueError as error:
        if wanted is not None:
            raise SinkError(f"{error}; set another `project`") from error
        return f"trainbus-{name}-runs"
    return name
