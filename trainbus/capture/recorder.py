"""Records a training besides its events: its environment, the load of its machine, its console.

Guarantees: the first two happen in a thread, in the delivery process where there is one; their
records are in the stream `system`, so no two processes write one file; a restarted process
continues it; the records end when the training ends or is gone. Lines of the console are recorded
by the process that prints them, before `print` returns.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Literal

import msgspec

from trainbus import redaction
from trainbus.capture.console import ConsoleCapture, ConsoleChunk
from trainbus.errors import JournalError
from trainbus.events import ConsoleLogged, Event, MetricsLogged
from trainbus.journal.directory import RunFolder
from trainbus.journal.writer import JournalWriter

logger = logging.getLogger("trainbus")

STREAM = "system"
"""Stream with the environment and the system metrics."""

CONSOLE = "console"
"""Stream with what the program prints."""


class CaptureSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What is recorded besides the events of a training."""

    environment: bool = False
    """Whether the environment is recorded, once an attempt."""
    system_secs: float = 0.0
    """Seconds between two samples of the machine; 0 for none."""
    console: Literal["off", "python"] = "off"
    """Whether what Python prints is recorded."""
    redact: list[str] = []
    """Extra names of values to redact."""

    def task(self) -> CaptureTask | None:
        """Return the task for a training of this process, None if nothing is recorded."""
        if not self.environment and not self.system_secs:
            return None
        return CaptureTask(
            spec=self,
            argv=[*sys.orig_argv],
            cwd=_working_directory(),
            executable=sys.executable,
            path=[*map(str, sys.path)],
            launcher=_launcher(os.environ),
        )


class CaptureTask(msgspec.Struct, frozen=True, kw_only=True):
    """What is recorded of one training, which may be that of another process."""

    spec: CaptureSpec
    argv: list[str]
    cwd: str
    executable: str
    path: list[str]
    launcher: dict[str, str]
    """Variables of the scheduler and launcher, which the delivery process does not have."""


class CaptureRecorder:
    """Records one attempt; a second recorder of the same attempt does nothing.

    Args:
        task: what to record.
        folder: the run's directory.
        attempt: the attempt, whose main stream exists.
        pid: id of the training process.
    """

    def __init__(self, task: CaptureTask, folder: RunFolder, attempt: int, pid: int) -> None:
        self._task = task
        self._pid = pid
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._journal: JournalWriter | None = None
        with suppress(JournalError):  # another process records this attempt
            self._journal = JournalWriter(folder, attempt, stream=STREAM)

    def start(self) -> None:
        """Start recording; without a thread, a warning says what is missing."""
        if self._journal is None:
            return
        self._thread = threading.Thread(
            target=self._run, args=(self._journal,), name="trainbus records the system", daemon=True
        )
        try:
            self._thread.start()
        except (RuntimeError, OSError, MemoryError) as error:
            logger.warning("environment and system metrics are not recorded: %s", error)
            self._thread = None
            self._journal.close()

    def stop(self) -> None:
        """Ask the recorder to end; an environment that is being gathered is still recorded."""
        self._stop.set()

    def join(self, secs: float) -> None:
        """Wait that long for the end."""
        if self._thread is not None:
            self._thread.join(secs)

    def abandon(self) -> None:
        """Release the file in a forked child, without writing to it: the parent records."""
        journal, self._journal, self._thread = self._journal, None, None
        if journal is not None and journal.fileno() >= 0:
            with suppress(OSError):
                os.close(journal.fileno())

    def _run(self, journal: JournalWriter) -> None:
        try:
            if self._task.spec.environment and not journal.seq:
                self._record_environment(journal)
            if self._task.spec.system_secs and not self._stop.is_set():
                self._sample(journal)
        except Exception:
            logger.warning("environment and system metrics are incomplete", exc_info=True)
        finally:
            journal.close()

    def _record_environment(self, journal: JournalWriter) -> None:
        from trainbus.capture.environment import describe_environment

        task = self._task
        found = describe_environment(
            argv=task.argv,
            cwd=task.cwd,
            environ={**os.environ, **task.launcher},
            pid=self._pid,
            executable=task.executable,
            path=task.path,
        )
        self._append(journal, found)

    def _sample(self, journal: JournalWriter) -> None:
        from trainbus.capture.system import SystemSampler

        sampler = SystemSampler(self._pid)
        try:
            while not self._stop.wait(self._task.spec.system_secs):
                if values := sampler.sample():
                    self._append(journal, MetricsLogged(values=values, phase="system"))
        finally:
            sampler.close()

    def _append(self, journal: JournalWriter, event: Event) -> None:
        secret = frozenset(self._task.spec.redact)
        journal.append(redaction.event(event, secret), time.time())


class ConsoleRecorder:
    """Records what Python prints, in the stream `console`, until `stop`.

    Args:
        folder: the run's directory.
        attempt: the attempt, whose main stream exists.

    Raises:
        JournalError: the stream can't be written.
    """

    def __init__(self, folder: RunFolder, attempt: int) -> None:
        self._journal = JournalWriter(folder, attempt, stream=CONSOLE)
        self._capture = ConsoleCapture(self._write)
        self._capture.start()

    def stop(self) -> None:
        """Record what is left, and close the stream."""
        self._capture.stop()
        self._journal.close()

    def abandon(self) -> None:
        """Release the file in a forked child, without writing to it: the parent records."""
        if self._journal.fileno() >= 0:
            with suppress(OSError):
                os.close(self._journal.fileno())

    def _write(self, chunk: ConsoleChunk) -> None:
        event = ConsoleLogged(
            stream=chunk.stream,
            text=chunk.text,
            first_line=chunk.line,
            time=chunk.time,
            dropped_lines=chunk.dropped_lines,
            dropped_bytes=chunk.dropped_bytes,
        )
        self._journal.append(event, time.time())


def _launcher(environ: Mapping[str, str]) -> dict[str, str]:
    from trainbus.capture.environment import SCHEDULERS

    names: Sequence[str] = [name for row in SCHEDULERS.values() for name in row]
    return {name: environ[name] for name in names if name in environ}


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return ""
