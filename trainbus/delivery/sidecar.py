"""The delivery processes of one bus, which outlive a training that is killed.

One process serves all runs, one after another and several at once. It starts with the first run
that has a sink for it, and ends with the bus. It is started with `subprocess`, never by a fork, in
a session of its own, so that Ctrl-C does not reach it. Its standard input is the lifeline: when
that closes, the training process is gone. Their messages are in `sidecar_protocol`; options may be
secret and everybody can read arguments, so these only name the files with the messages.

A sink can end the process that it runs in. A sink that was being called when the process died gets
a process of its own; if that dies too, the sink is disabled and the others continue.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from trainbus.capture.recorder import CaptureTask
from trainbus.delivery.receipt import SinkReport
from trainbus.delivery.sidecar_protocol import (
    FinishRun,
    Hello,
    LogWarning,
    Mailbox,
    Marks,
    OpenRun,
    ReplayTask,
    RunDone,
    RunProgress,
    SinkOpened,
    SinkTask,
    StopRun,
    ToSidecar,
    ToTraining,
    anonymous_file,
)
from trainbus.delivery.spec import SinkSpec
from trainbus.delivery.worker import POLL_S, STREAM_WAIT_S, report_on_disk, reserve_cursor
from trainbus.delivery.worker_log import Output, append
from trainbus.journal.directory import RunFolder

logger = logging.getLogger("trainbus")

_MAX_DEATHS = 2
_OF_TRAINING = {"RANK", "LOCAL_RANK", "TRAINBUS_CONFIG"}
_EXIT_S = 10.0
_RELEASE_S = 1.0
_ANSWER = 0.8
"""Part of the time left in which a run that is stopped has to be reported."""
_PROGRAM = """
import sys
if sys.path[0] == "":  # the folder that training runs in, unless Python was told to leave it out
    del sys.path[0]
from trainbus.delivery.sidecar_main import main
main()
"""


class Sidecar:
    """Starts, feeds and restarts the delivery processes; needs no thread."""

    def __init__(self, *, base: Path | None = None) -> None:
        """Prepare; the first run starts a process.

        Args:
            base: working directory of the processes, if it can be entered.
        """
        self._base = base
        self._pid = os.getpid()
        self._lock = threading.RLock()  # a signal handler may end a run in the midst of another
        self._children: list[_Child] = []
        self._runs: dict[int, SidecarRun] = {}
        self._numbers = itertools.count(1)
        self._deaths: Counter[str] = Counter()
        self._unexplained = 0
        self._isolated: set[str] = set()
        self._disabled: dict[str, str] = {}
        self._finalizer = weakref.finalize(self, _release, self._children)

    @property
    def pids(self) -> list[int]:
        """Ids of the processes that deliver now."""
        return [child.process.pid for child in self._children]

    def open(
        self,
        folder: RunFolder,
        attempt: int,
        specs: Sequence[SinkSpec],
        flush_secs: float,
        *,
        config: str | None = None,
        replay: ReplayTask | None = None,
        capture: CaptureTask | None = None,
    ) -> SidecarRun:
        """Deliver a run; `refused` of the result lists the sinks that have no process.

        Args:
            folder: the run's directory.
            attempt: the attempt that is delivered.
            specs: the sinks.
            flush_secs: how long the sinks may take once the training process is gone.
            config: file that the sinks are configured in, for the receipt.
            replay: set for a replay.
            capture: what to record of the training besides its events.
        """
        if self._pid != os.getpid():
            self.abandon()
        run = SidecarRun(
            self, next(self._numbers), folder, attempt, specs, flush_secs, config, replay, capture
        )
        try:
            with self._lock:
                self.poll()
                self._runs[run.number] = run
                self._serve(run, [spec.name for spec in specs])
                # A sink that may have ended a process must not run in the training process.
                run.refused = [run.specs[n] for n in run.unserved if n not in self._isolated]
        except BaseException:  # Ctrl-C: the run will be opened again, and must not be served twice
            run.is_over = True
            self._runs.pop(run.number, None)
            for child in self._serving(run):
                child.send(StopRun(run=run.number, secs=0.0))
            raise
        return run

    def poll(self) -> None:
        """Read the messages of the processes, and restart those that have died."""
        if self._pid != os.getpid() or not self._lock.acquire(blocking=False):
            return
        try:
            for child in list(self._children):
                self._receive(child)
                if child.process.poll() is not None:
                    self._receive(child)
                    self._clean_up(child)
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the processes, which have no run left."""
        if self._pid != os.getpid():
            self.abandon()
            return
        with self._lock:
            children = list(self._children)
            self._children.clear()
        try:
            _end(children, _EXIT_S)
        finally:
            for child in children:
                child.release(kill=True)

    def abandon(self) -> None:
        """Release everything in a forked child, whose parent has the processes."""
        if self._pid == os.getpid():
            return
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._runs.clear()
        for child in self._children:
            child.abandon()
        self._children.clear()

    def finish(self, run: SidecarRun) -> None:
        """Announce that no more records of a run will come; called by the run."""
        self.poll()
        with self._lock:
            for child in self._serving(run):
                child.finish(run)
            # No process could be started for these before.
            waiting, run.unserved = run.unserved, {}
            refused = {spec.name for spec in run.refused}
            self._serve(run, [name for name in waiting if name not in refused])

    def stop(self, run: SidecarRun, secs: float) -> None:
        """Request the reports of a run, and kill a process that does not answer."""
        deadline = time.monotonic() + secs
        run.is_over = True
        with self._lock:
            for child in self._serving(run):
                child.send(StopRun(run=run.number, secs=secs * _ANSWER))
        while not run.is_finished() and time.monotonic() < deadline:
            time.sleep(POLL_S / 10)
        with self._lock:
            for child in self._serving(run):
                child.was_killed = True
                with suppress(OSError):
                    child.process.kill()
                self._clean_up(child)
            self._runs.pop(run.number, None)

    def is_serving(self, run: SidecarRun) -> bool:
        """Return whether a process still has to report a run; called by the run."""
        return bool(self._serving(run))

    def is_calling(self, run: SidecarRun) -> bool:
        """Return whether a sink is being called with a run; called by the run."""
        return any(child.called(run.number) for child in self._serving(run))

    def _serving(self, run: SidecarRun) -> list[_Child]:
        return [child for child in self._children if run.number in child.serves]

    def _serve(self, run: SidecarRun, names: Iterable[str]) -> None:
        """Give each sink of a run to the process that it belongs to."""
        groups: dict[str | None, list[str]] = {}
        for name in names:
            if name in self._disabled:
                run.opened[name] = self._disabled[name]
                reserve_cursor(run.specs[name], run.folder, run.attempt)
            else:
                groups.setdefault(name if name in self._isolated else None, []).append(name)
        for isolated, group in groups.items():
            try:
                child = self._child(isolated, run, group) or self._start(isolated, run.folder)
                child.open(run, group, self._disabled)
            except (OSError, RuntimeError, ValueError, MemoryError) as error:
                for name in group:
                    run.unserved[name] = f"no process can be started: {error}"

    def _child(self, isolated: str | None, run: SidecarRun, names: Sequence[str]) -> _Child | None:
        """Return the running process for some sinks of a run, if there is one."""
        alone = {run.specs[name].kind for name in names if not _shares_process(run.specs[name])}
        for child in self._children:
            if child.isolated != isolated or child.is_retired or child.process.poll() is not None:
                continue
            others = [self._runs[n] for n in child.serves if n in self._runs and n != run.number]
            if not alone & {spec.kind for other in others for spec in other.specs.values()}:
                return child
        return None

    def _start(self, isolated: str | None, folder: RunFolder) -> _Child:
        child = _Child(isolated, folder, self._base)
        self._children.append(child)
        return child

    def _receive(self, child: _Child) -> None:
        for message, _ in child.outbox.take():
            match message:
                case LogWarning():
                    logger.warning("%s", message.text)
                case SinkOpened() if run := self._runs.get(message.run):
                    run.opened[message.sink] = message.error
                    run.locations[message.sink] = message.location
                case RunProgress() if run := self._runs.get(message.run):
                    run.progress[message.sink] = message.count
                case RunDone():
                    self._done(child, message)
                case _:
                    pass

    def _done(self, child: _Child, message: RunDone) -> None:
        child.leave(message.run)
        run = self._runs.get(message.run)
        if run is not None:
            run.done |= {report.name: report for report in message.reports}
            run.emitted = message.emitted
            run.damaged += message.damaged
            run.refused_files += message.refused
            run.changed_files += message.changed
            if not self._serving(run):
                self._runs.pop(run.number, None)
        if message.is_hung:  # a blocked call must not continue beside the next run
            child.is_retired = True
        else:
            self._unexplained = 0
            for report in message.reports:
                self._deaths.pop(report.name, None)
        if child.is_retired and not child.serves:
            child.close_lifeline()

    def _clean_up(self, child: _Child) -> None:
        """Restart the delivery of the runs of a dead process, and find the sink that ended it."""
        if child in self._children:
            self._children.remove(child)
        called = {name for number in child.serves for name in child.called(number)}
        served = {number: list(slots) for number, slots in child.serves.items()}
        child.serves = {}
        child.release(kill=False)
        runs = [run for number in served if (run := self._runs.get(number)) is not None]
        names = {name for run in runs for name in served[run.number]}
        if names and not child.was_killed:
            text = self._blame(child, called & names, names)
            logger.warning("%s", text)
            for run in runs:
                append(run.folder.log, f"trainbus: {text}\n".encode())
        for run in runs:
            if not run.is_over:
                self._serve(run, [name for name in served[run.number] if name not in run.done])

    def _blame(self, child: _Child, called: set[str], names: set[str]) -> str:
        """Find the sink that may have ended a process; return a text about it."""
        how = _death(child.process.returncode)
        suspects = called if child.isolated is None else {child.isolated}
        text = f"the delivery process died ({how})"
        if not suspects:
            self._unexplained += 1
            if self._unexplained > 1:  # it may be any of them, between two calls
                self._isolated |= names
            return f"{text}; restarting it"
        for name in suspects:
            self._deaths[name] += 1
            self._isolated.add(name)
        who = ", ".join(map(repr, sorted(suspects)))
        text = f"the delivery process of {who} died ({how})" if child.isolated else text
        ended = [name for name in suspects if self._deaths[name] >= _MAX_DEATHS]
        if not ended:
            return (
                f"{text} while it called {who}; restarting it, with a process of its own for each"
            )
        for name in ended:
            times = f"{self._deaths[name]} times"
            self._disabled[name] = (
                f"disabled: it ended the delivery process {times}; see worker.log"
            )
        return f"{text}, too; the sink is disabled, the others continue"


class SidecarRun:
    """One run that the processes deliver; made by `Sidecar.open`."""

    def __init__(
        self,
        sidecar: Sidecar,
        number: int,
        folder: RunFolder,
        attempt: int,
        specs: Sequence[SinkSpec],
        flush_secs: float,
        config: str | None,
        replay: ReplayTask | None,
        capture: CaptureTask | None,
    ) -> None:
        self.number = number
        self.folder = folder
        self.attempt = attempt
        self.specs = {spec.name: spec for spec in specs}
        self.flush_secs = flush_secs
        self.config = config
        self.replay = replay
        self.capture = capture
        self.opened: dict[str, str | None] = {}
        """Sinks whose opening was tried: None for one that is open, else the reason why not."""
        self.locations: dict[str, str | None] = {}
        """Where the sinks that are open show the run."""
        self.refused: list[SinkSpec] = []
        """Sinks for which no process could be started when the run was opened."""
        self.unserved: dict[str, str] = {}
        """Sinks that no process delivers to, and why."""
        self.progress: dict[str, int] = {}
        """How many records of a replay a sink is done with."""
        self.final: tuple[FinishRun, Sequence[bytes]] | None = None
        self.is_over = False
        """Whether no process is to be started for the run any more."""
        self.done: dict[str, SinkReport] = {}
        self.emitted: int | None = None
        self.damaged: list[str] = []
        self.refused_files: list[str] = []
        self.changed_files: list[str] = []
        self._sidecar = sidecar

    def poll(self) -> None:
        """Read the messages of the processes."""
        self._sidecar.poll()

    def finish(
        self, lines: Sequence[bytes], emitted: int, stream_wait_s: float = STREAM_WAIT_S
    ) -> None:
        """Announce that no more records will come, except `lines` that the disk had no room for.

        Other streams than the main one may be written for another `stream_wait_s` seconds.
        """
        end = FinishRun(run=self.number, emitted=emitted, stream_wait_s=stream_wait_s)
        self.final = (end, lines)
        self._sidecar.finish(self)

    def is_finished(self) -> bool:
        """Return whether no process serves the run any more."""
        self._sidecar.poll()
        return not self._sidecar.is_serving(self)

    def is_calling(self) -> bool:
        """Return whether one of the sinks is being called."""
        return self._sidecar.is_calling(self)

    def stop(self, secs: float) -> None:
        """End the delivery, and wait that long for the reports."""
        self._sidecar.stop(self, secs)

    def reports(self, emitted: int) -> list[SinkReport]:
        """Return a report for each sink, from its cursor if no process has reported it."""
        found = []
        refused = {spec.name for spec in self.refused}
        for name, spec in self.specs.items():
            if name in refused:
                continue
            why = self.unserved.get(name)
            if why is None and name in self.opened and name not in self.done:
                why = self.opened[name]
            if why is None:
                why = f"the delivery process gave no answer; see {self.folder.log}"
            found.append(
                self.done.get(name)
                or report_on_disk(
                    spec, self.folder, attempt=self.attempt, emitted=emitted, error=why
                )
            )
        return found

    def abandon(self) -> None:
        """Release it in a forked child."""
        self._sidecar.abandon()


class _Child:
    """One process, with its mailboxes."""

    def __init__(self, isolated: str | None, folder: RunFolder, base: Path | None) -> None:
        """Start a process.

        Args:
            isolated: the only sink that it delivers to, None for all others.
            folder: directory of the run that it is started for, shown among its arguments.
            base: its working directory.

        Raises:
            OSError: none can be started, as is RuntimeError, ValueError or MemoryError.
        """
        self.owner = os.getpid()
        self.isolated = isolated
        self.is_retired = False
        self.was_killed = False
        self.serves: dict[int, dict[str, int]] = {}
        """Slots of the sinks, by run and name."""
        self._environ = dict(os.environ)
        self._logs: list[Path] = []
        with ExitStack() as stack:
            self.inbox: Mailbox[ToSidecar] = Mailbox(ToSidecar)
            stack.callback(self.inbox.close)
            self.outbox: Mailbox[ToTraining] = Mailbox(ToTraining)
            stack.callback(self.outbox.close)
            self.marks = Marks()
            stack.callback(self.marks.close)
            self._output = Output(anonymous_file(), self.marks)
            stack.callback(self._output.close)
            main = getattr(sys.modules.get("__main__"), "__file__", None)
            self.inbox.put(Hello(pid=os.getpid(), argv=sys.argv, main=main))
            self.process = self._popen(folder, base)
            self._files = stack.pop_all()
        assert self.process.stdin is not None
        os.set_blocking(self.process.stdin.fileno(), False)

    def open(self, run: SidecarRun, names: Sequence[str], disabled: Mapping[str, str]) -> None:
        """Deliver a run to some of its sinks.

        Raises:
            OSError: there is no memory for the message.
        """
        taken = {slot for slots in self.serves.values() for slot in slots.values()}
        free = (slot for slot in itertools.count() if slot not in taken)
        slots = self.serves.setdefault(run.number, {})
        slots |= {name: next(free) for name in names}
        environ, self._environ = self._environ, dict(os.environ)
        changed: dict[str, str | None] = {k: None for k in environ if k not in self._environ}
        changed |= {k: v for k, v in self._environ.items() if environ.get(k) != v}
        order = OpenRun(
            run=run.number,
            folder=str(run.folder.path),
            attempt=run.attempt,
            sinks=[
                SinkTask(
                    name=spec.name,
                    type=spec.kind,
                    options=spec.options or {},
                    transforms=spec.transforms,
                    base=spec.base,
                    slot=slots.get(spec.name),
                    error=disabled.get(spec.name),
                )
                for spec in run.specs.values()
            ],
            flush_secs=run.flush_secs,
            config=run.config,
            variables={k: v for k, v in changed.items() if k not in _OF_TRAINING},
            replay=run.replay,
            capture=run.capture,
        )
        if not self.inbox.put(order):
            del self.serves[run.number]
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        self._logs = [*self._logs, run.folder.log]
        self._ring()
        if run.final is not None:
            self.finish(run)

    def finish(self, run: SidecarRun) -> None:
        """Pass on that no more records of a run come; lines that memory is too short for are lost.

        The reports count them: they are pending, and the receipt knows that they are on no disk.
        """
        if run.final is not None:
            message, lines = run.final
            if not self.inbox.put(message, lines):
                self.inbox.put(message)
            self._ring()

    def send(self, message: ToSidecar) -> None:
        """Send a message to the process."""
        self.inbox.put(message)
        self._ring()

    def called(self, number: int) -> set[str]:
        """Return the sinks that are being called with a run."""
        slots = self.serves.get(number, {})
        return {name for name, slot in slots.items() if self.marks.is_called(slot)}

    def leave(self, number: int) -> None:
        """Forget a run that was reported."""
        self.serves.pop(number, None)

    def close_lifeline(self) -> None:
        """Let the process end."""
        if self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()

    def release(self, *, kill: bool) -> None:
        """Save what the process printed last, and close everything of it."""
        self.close_lifeline()
        if kill and self.process.poll() is None:
            self.process.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_RELEASE_S if kill or self.was_killed else 0.0)
        if self.process.returncode is None:
            self.process.returncode = 0  # else its finalizer complains
        if self.marks.fd >= 0:
            self._output.save(self._logs[-1:])
        self._files.close()

    def abandon(self) -> None:
        """Release the process without a message: it belongs to the parent of this fork."""
        self.close_lifeline()
        self.process.returncode = 0  # else its finalizer waits for it
        self._files.close()

    def _popen(self, folder: RunFolder, base: Path | None) -> subprocess.Popen[bytes]:
        shared = [self.inbox.fd, self.outbox.fd, self.marks.fd, self._output.fd]
        try:
            return self._popen_in(base, folder, shared)
        except OSError:
            if base is None:
                raise
            return self._popen_in(None, folder, shared)

    def _popen_in(
        self, base: Path | None, folder: RunFolder, shared: Sequence[int]
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(folder.path), *map(str, shared)],
            stdin=subprocess.PIPE,
            stdout=self._output.fd,
            stderr=self._output.fd,
            bufsize=0,
            cwd=base,
            start_new_session=True,
            pass_fds=shared,
            env=_environment(),
        )

    def _ring(self) -> None:
        """Wake the process; without it, it reads its messages a little later."""
        if self.process.stdin is not None:
            with suppress(OSError, ValueError):
                os.write(self.process.stdin.fileno(), b"\n")


def _end(children: Sequence[_Child], secs: float) -> None:
    """Ask processes to end, and wait until they have."""
    for child in children:
        child.close_lifeline()
    deadline = time.monotonic() + secs
    while time.monotonic() < deadline:
        if all(child.process.poll() is not None for child in children):
            break
        time.sleep(POLL_S / 10)


def _release(children: list[_Child]) -> None:
    """End the processes of a bus that was not closed."""
    ours = [child for child in children if child.owner == os.getpid()]
    _end(ours, _RELEASE_S)
    for child in ours:
        child.release(kill=False)


def _shares_process(spec: SinkSpec) -> bool:
    sample = spec.sample()
    return sample is None or sample.shares_process


def _death(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _environment() -> dict[str, str]:
    """Return this process's environment, in which Python finds the modules that it finds here."""
    path = []
    for entry in sys.path:
        with suppress(OSError, TypeError):  # a relative one, and the working directory is gone
            path.append(os.path.abspath(entry))
    # Variables of a launcher describe the training process, not this one.
    kept = {k: v for k, v in os.environ.items() if k not in _OF_TRAINING}
    return {**kept, "PYTHONPATH": os.pathsep.join(path)}


def apply_environment(changed: Mapping[str, str | None]) -> None:
    """Apply changes of the training's environment to this process."""
    for name, value in changed.items():
        if value is None:
            os.environ.pop(name, None)
        elif name != "PYTHONPATH":
            os.environ[name] = value
