"""Begins and ends offline sessions of ClearML, and keeps the process offline in between.

`Task.set_offline(False)` would have every session connect to a server: what was is put back here.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from trainbus.errors import MissingPackageError, SinkError

_MASTERS = ("CLEARML_PROC_MASTER_ID", "TRAINS_PROC_MASTER_ID")
_FLUSH_S = 0.5
_WAIT_S = 60.0


def begin(
    folder: Path, *, project: str, name: str, tags: list[str], about: Mapping[str, Any]
) -> Any:
    """Return the task of a new session; what its folder held before is removed.

    Args:
        folder: where it is until it is an archive.
        project: of the task.
        name: of the task.
        tags: of the task.
        about: parameters of the task.

    Raises:
        MissingPackageError: clearml is not installed.
        SinkError: the folder can't be written, or a ClearML task is online in this process.
    """
    try:
        from clearml import Task
    except ImportError as error:
        raise MissingPackageError("clearml", extra="clearml") from error
    try:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "data").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        text = f"can't write {folder.parent}: {error.strerror}; set another `dir`"
        raise SinkError(text) from error
    _OFFLINE.begin()
    try:
        task = Task._create(project_name=project, task_name=name)
        # ClearML can't be told where: it has begun in its cache.
        shutil.rmtree(task.get_offline_mode_folder(), ignore_errors=True)
        task._offline_dir = folder
        task.get_logger()
        # ClearML's 5 s are also what it may wait for its own thread when it closes.
        task._reporter._report_service._wait_timeout = _FLUSH_S
        # What may still come when the process is online again must not be sent.
        task._offline_mode = task._metrics_manager._offline_mode = True
        task.set_tags(tags)
        task.update_parameters(about)
    except BaseException as error:
        _OFFLINE.end()
        if isinstance(error, OSError):
            text = f"ClearML can't begin a session: {error}; set CLEARML_CACHE_DIR or `dir`"
            raise SinkError(text) from error
        raise
    return task


def wait(task: Any) -> None:
    """Wait until all that was reported is written."""
    task._reporter.wait_for_events(timeout=_WAIT_S)


def end(task: Any, folder: Path) -> None:
    """End the session of a task, and make an archive of its folder.

    Raises:
        SinkError: ClearML wrote none, which it does not tell.
    """
    archive = Path(f"{folder}.zip")
    try:
        archive.unlink(missing_ok=True)
        task.close()
    finally:
        _OFFLINE.end()
    if not is_zipfile(archive):
        raise SinkError(
            f"ClearML wrote no archive at {archive} (is the disk full?); the session is in {folder}"
        )
    shutil.rmtree(folder, ignore_errors=True)


class _Offline:
    """Keeps ClearML offline in this process while there is a session, and puts back what was."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._before: list[tuple[type, str, Any]] = []
        self._masters: dict[str, str] = {}

    def begin(self) -> None:
        """Go offline, if this is the first session.

        Raises:
            SinkError: a ClearML task is online in this process.
        """
        with self._lock:
            if not self._count:
                self._begin_first()
            self._count += 1

    def _begin_first(self) -> None:
        from clearml import Task
        from clearml.backend_api import Session
        from clearml.backend_interface.base import InterfaceBase

        # The id that a training process hands down makes this one a part of its task:
        # ClearML would connect to the server, and write no archive.
        masters = {name: os.environ.get(name, "") for name in _MASTERS}
        ours = ("", str(os.getpid()))
        self._masters = {k: v for k, v in masters.items() if v.partition(":")[0] not in ours}
        for name in self._masters:
            del os.environ[name]
        if Task.current_task() is not None and not Task.is_offline():
            os.environ.update(self._masters)
            raise SinkError(
                "a ClearML task of your own is online in this process, and would go "
                "offline; let the sink run in its own process (no `isolation: inline`)"
            )
        changed = (
            (InterfaceBase, "_offline_mode"),
            (Session, "_offline_mode"),
            (InterfaceBase, "_default_session"),
        )
        self._before = [(owner, name, getattr(owner, name)) for owner, name in changed]
        InterfaceBase._offline_mode = Session._offline_mode = True

    def end(self) -> None:
        """Put back what was, if this was the last session."""
        with self._lock:
            self._count -= 1
            if not self._count:
                for owner, name, value in self._before:
                    setattr(owner, name, value)
                os.environ.update(self._masters)


_OFFLINE = _Offline()
