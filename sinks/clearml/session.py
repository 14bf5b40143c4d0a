"""Starts and ends offline sessions of ClearML, and keeps the process offline in between.

`Task.set_offline(False)` makes every session connect to a server, so the previous state is saved
and restored here.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from trainbus.errors import SinkError
from trainbus.toolkit.sinks import required_package, writing_to

_MASTERS = ("CLEARML_PROC_MASTER_ID", "TRAINS_PROC_MASTER_ID")
_FLUSH_S = 0.5
_WAIT_S = 60.0


def start(
    folder: Path, *, project: str, name: str, tags: list[str], params: Mapping[str, Any]
) -> Any:
    """Return the task of a new session; earlier content of its folder is removed.

    Args:
        folder: folder of the session until it is archived.
        project: project of the task.
        name: name of the task.
        tags: tags of the task.
        params: parameters of the task.

    Raises:
        MissingPackageError: clearml is not installed.
        SinkError: the folder can't be written, or a ClearML task is online in this process.
    """
    with required_package("clearml"):
        from clearml import Task
    with writing_to(folder.parent):
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "data").mkdir(parents=True, exist_ok=True)
    _OFFLINE.enter()
    try:
        task = Task._create(project_name=project, task_name=name)
        # ClearML has no option for the folder, and has created one in its cache.
        shutil.rmtree(task.get_offline_mode_folder(), ignore_errors=True)
        task._offline_dir = folder
        task.get_logger()
        # The default of 5 s is also how long ClearML may wait for its own thread on close.
        task._reporter._report_service._wait_timeout = _FLUSH_S
        # Late reports must not be sent once the process is online again.
        task._offline_mode = task._metrics_manager._offline_mode = True
        task.set_tags(tags)
        task.update_parameters(params)
    except BaseException as error:
        _OFFLINE.leave()
        if isinstance(error, OSError):
            text = f"ClearML can't start a session: {error}; set CLEARML_CACHE_DIR or `dir`"
            raise SinkError(text) from error
        raise
    return task


def wait(task: Any) -> None:
    """Wait until everything reported so far is written."""
    task._reporter.wait_for_events(timeout=_WAIT_S)


def end(task: Any, folder: Path) -> None:
    """End the session of a task and archive its folder.

    Raises:
        SinkError: ClearML wrote no archive; ClearML itself raises nothing then.
    """
    archive = Path(f"{folder}.zip")
    try:
        archive.unlink(missing_ok=True)
        task.close()
    finally:
        _OFFLINE.leave()
    if not is_zipfile(archive):
        raise SinkError(
            f"ClearML wrote no archive at {archive} (is the disk full?); the session is in {folder}"
        )
    shutil.rmtree(folder, ignore_errors=True)


class _Offline:
    """Keeps ClearML offline in this process while a session is open, and restores it afterwards."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._before: list[tuple[type, str, Any]] = []
        self._masters: dict[str, str] = {}

    def enter(self) -> None:
        """Go offline if this is the first session.

        Raises:
            SinkError: a ClearML task is online in this process.
        """
        with self._lock:
            if not self._count:
                self._go_offline()
            self._count += 1

    def _go_offline(self) -> None:
        from clearml import Task
        from clearml.backend_api import Session
        from clearml.backend_interface.base import InterfaceBase

        # The task id inherited from a training process would make this process a part of that
        # task: ClearML would connect to the server and write no archive.
        masters = {name: os.environ.get(name, "") for name in _MASTERS}
        own = ("", str(os.getpid()))
        self._masters = {k: v for k, v in masters.items() if v.partition(":")[0] not in own}
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

    def leave(self) -> None:
        """Restore the previous state if this was the last session."""
        with self._lock:
            self._count -= 1
            if not self._count:
                for owner, name, value in self._before:
                    setattr(owner, name, value)
                os.environ.update(self._masters)


_OFFLINE = _Offline()
