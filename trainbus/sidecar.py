"""The process that delivers a run beside the training, and outlives a training that is killed.

It is started with `subprocess`, never by a fork, in a session of its own, so that Ctrl-C does not
reach it. Its standard input carries one line of JSON that says what to deliver (options may be
secret, and arguments are seen by everybody) and then is the lifeline: when it closes, the training
process is gone. Its standard output carries lines of JSON back; all else it says goes to
`worker.log`.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import msgspec

from trainbus.delivery import POLL_S
from trainbus.receipt import SinkReport
from trainbus.resolving import working_directory
from trainbus.route import Route
from trainbus.runfolder import RunFolder
from trainbus.transforms import TransformSpec

logger = logging.getLogger("trainbus")

_MAX_RESTARTS = 3
_OF_TRAINING = {"RANK", "LOCAL_RANK", "TRAINBUS_CONFIG"}
_EXIT_S = 10.0
_PROGRAM = """
import sys
if sys.path[0] == "":  # the folder that training runs in, unless Python was told to leave it out
    del sys.path[0]
from trainbus.sidecarmain import main
main()
"""


class Task(msgspec.Struct, kw_only=True):
    """What a sidecar is told to deliver."""

    class Sink(msgspec.Struct, kw_only=True):
        """One sink: the type that it is registered under, its options, and what is done before."""

        name: str
        type: str
        options: dict[str, Any]
        transforms: TransformSpec

    folder: str
    attempt: int
    sinks: list[Sink]
    flush_secs: float
    pid: int
    argv: list[str]
    main: str | None = None


class Message(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What training process and sidecar say to each other, one line each."""

    lines: list[str] | None = None
    """To the sidecar: no more records come, but for these lines of the journal."""
    emitted: int = 0
    stop: bool = False
    """To the sidecar: time is up."""
    opened: str | None = None
    """To the training: a sink is open, or `error` says why not."""
    error: str | None = None
    log: str | None = None
    reports: list[SinkReport] | None = None
    """To the training: what each sink got; the sidecar has nothing more to do."""


class Sidecar:
    """The training process's end of it; needs no thread."""

    def __init__(
        self,
        folder: RunFolder,
        attempt: int,
        routes: Sequence[Route],
        flush_secs: float,
        *,
        base: Path | None = None,
    ) -> None:
        """Prepare; `base` is the folder that the process runs in, if that can be entered."""
        self.opened: dict[str, str | None] = {}
        """What is known of the sinks: None for one that is open, else why it is not."""
        self._routes = routes
        self._task = Task(
            folder=str(folder.path),
            attempt=attempt,
            sinks=[
                Task.Sink(
                    name=r.name, type=r.kind, options=r.options or {}, transforms=r.transforms
                )
                for r in routes
            ],
            flush_secs=flush_secs,
            pid=os.getpid(),
            argv=sys.argv,
            main=getattr(sys.modules.get("__main__"), "__file__", None),
        )
        self._log = folder.log
        self._base = base
        self._process: subprocess.Popen[bytes] | None = None
        self._input: IO[bytes] | None = None
        self._rest = b""
        self._restarts = 0
        self._final: Message | None = None
        self._reports: list[SinkReport] | None = None

    def start(self) -> bool:
        """Start the process; False if none can be started."""
        try:
            with open(self._log, "ab", opener=_private) as log:
                process = subprocess.Popen(
                    [sys.executable, "-c", _PROGRAM, self._task.folder],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,
                    env=_environment(),
                    cwd=_enterable(self._base),
                )
        except (OSError, RuntimeError, ValueError) as error:
            logger.warning("sinks run in threads, as no process can be started: %s", error)
            return False
        assert process.stdin is not None
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self._process, self._input, self._rest = process, process.stdin, b""
        self._write(_json(self._task))
        if self._final is not None:
            self._send(self._final)
        return True

    def poll(self) -> None:
        """Hear what the sidecar has to say, and start another one if it has died."""
        self._hear()
        process = self._process
        if process is None or process.poll() is None or self._reports is not None:
            return
        self._hear()
        if self._reports is not None:
            return
        self._let_go()
        if self._restarts < _MAX_RESTARTS:
            self._restarts += 1
            logger.warning("the process that delivers has died, another one goes on")
            self.start()
        else:
            logger.warning(
                "the process that delivers has died %d times, the journal keeps the rest; see %s",
                _MAX_RESTARTS + 1,
                self._log,
            )

    def finish(self, lines: Sequence[bytes], emitted: int) -> None:
        """Say that no more records will come, but for `lines` that the disk had no room for."""
        self._final = Message(lines=[line.decode() for line in lines], emitted=emitted)
        self.poll()
        self._send(self._final)

    def is_finished(self) -> bool:
        """Return whether there is nothing more to wait for."""
        self.poll()
        return self._reports is not None or self._process is None

    def stop(self) -> None:
        """End the process, and hear what it has to say of what its sinks got."""
        if self._process is None:
            return
        if self._reports is None:
            self._send(Message(stop=True))
            self._wait_for(lambda: self._reports is not None)
        self._close_input()
        self._wait_for(lambda: self._process is None or self._process.poll() is not None)
        self._let_go()

    def reports(self, emitted: int) -> list[SinkReport]:
        """Return what each sink got."""
        if self._reports is not None:
            return self._reports
        text = f"the process that delivers gave no answer; see {self._log}"
        return [
            SinkReport(name=r.name, kind=r.kind, pending=emitted, error=text) for r in self._routes
        ]

    def abandon(self) -> None:
        """Let go of the process without a word to it: it belongs to the parent of this fork."""
        process, self._process = self._process, None
        if process is not None:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        os.close(pipe.fileno())
            process.returncode = 0  # else its finalizer waits for it

    def _send(self, message: Message) -> None:
        self._write(msgspec.json.encode(message))

    def _write(self, line: bytes) -> None:
        if self._input is not None:
            with suppress(OSError, ValueError):  # it has died, which `poll` finds out
                self._input.write(line + b"\n")
                self._input.flush()

    def _hear(self) -> None:
        process = self._process
        if process is None or process.stdout is None:
            return
        with suppress(OSError, ValueError):
            while chunk := process.stdout.read(65536):
                self._rest += chunk
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            message = msgspec.json.decode(line, type=Message)
            if message.log is not None:
                logger.warning("%s", message.log)
            if message.opened is not None:
                self.opened[message.opened] = message.error
            if message.reports is not None:
                self._reports = message.reports

    def _wait_for(self, condition: Any) -> None:
        deadline = time.monotonic() + _EXIT_S
        while not condition() and time.monotonic() < deadline:
            self._hear()
            if self._process is not None and self._process.poll() is not None:
                self._hear()
                break
            time.sleep(POLL_S / 10)

    def _close_input(self) -> None:
        pipe, self._input = self._input, None
        if pipe is not None:
            with suppress(OSError):
                pipe.close()

    def _let_go(self) -> None:
        self._close_input()
        process, self._process = self._process, None
        if process is not None:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _json(task: Task) -> bytes:
    """Return a task as JSON in which infinite numbers are themselves; msgspec makes them null."""
    return json.dumps(msgspec.to_builtins(task)).encode()


def _environment() -> dict[str, str]:
    """Return this process's environment, in which Python finds the modules that it finds here."""
    here = working_directory()
    path = [entry for entry in sys.path if entry is not None]
    if here is None:  # it was deleted
        path = [entry for entry in path if os.path.isabs(entry)]
    path = [os.path.abspath(entry) for entry in path]
    # What a launcher says of the training process is not true of this one.
    kept = {k: v for k, v in os.environ.items() if k not in _OF_TRAINING}
    return {**kept, "PYTHONPATH": os.pathsep.join(path)}


def _enterable(folder: Path | None) -> Path | None:
    """Return a folder that a process can run in, None for the one of this process."""
    return folder if folder is not None and os.access(folder, os.X_OK) else None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
