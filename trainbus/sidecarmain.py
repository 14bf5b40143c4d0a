"""What runs in the sidecar process: the workers, and the watch over the training process."""

from __future__ import annotations

import functools
import json
import logging
import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress

import msgspec

from trainbus import registry
from trainbus.delivery import POLL_S, SinkWorker
from trainbus.endings import last_record, recover
from trainbus.events import RunEnded
from trainbus.files import Files
from trainbus.interfaces import Sink
from trainbus.receipt import Receipt
from trainbus.route import Route
from trainbus.runfolder import RunFolder
from trainbus.sidecar import Message, Task
from trainbus.workers import ThreadedWorker, save_receipt

logger = logging.getLogger("trainbus")

_SYNC_S = 1.0
_HANGS_S = 30.0
_NICENESS = 10
"""Training goes first where both want the processor."""


def main() -> None:
    """Deliver until the run has ended or the training process is gone; the sidecar's whole life."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # its life is bound to the training's, not to these
    with suppress(OSError):
        os.nice(_NICENESS)
    output = os.dup(1)
    os.dup2(2, 1)  # what sinks print is no message
    watch = _Watch(output)
    watch.run()
    sys.stdout.flush()
    if watch.hangs:
        os._exit(0)


class _Watch:
    def __init__(self, output: int) -> None:
        self._output = output
        self._mutex = threading.Lock()
        self._input = b""
        self._parent = os.getppid()
        self._orphaned = False
        self._final: Message | None = None
        self._deadline: float | None = None
        self._said: set[str] = set()
        self._synced = (time.monotonic(), 0)
        self.hangs = False
        """Whether a call of a sink never came back."""

    def run(self) -> None:
        task = msgspec.convert(json.loads(self._first_line()), Task)
        sys.argv[:] = task.argv  # trackers note by which command a training was started
        if task.main is not None:
            sys.modules["__main__"].__file__ = task.main
        self._task = task
        self._folder = RunFolder(task.folder)
        logging.getLogger("trainbus").addHandler(_Forward(self))
        self._threads = [ThreadedWorker(self._worker(sink)) for sink in task.sinks]
        for thread in self._threads:
            thread.start()
        while not self._is_over():
            self._listen()
            self._tell_opened()
            self._sync()
        self._end()

    def say(self, message: Message) -> None:
        with self._mutex, suppress(OSError):  # the training process may be gone
            os.write(self._output, msgspec.json.encode(message) + b"\n")

    def _worker(self, sink: Task.Sink) -> SinkWorker:
        route = Route(
            name=sink.name,
            make=functools.partial(_make, sink),
            kind=sink.type,
            transforms=sink.transforms,
            options=sink.options,
        )
        files = Files(self._folder, None)
        return SinkWorker(
            route, self._folder, files, attempt=self._task.attempt, pid=self._task.pid
        )

    def _is_over(self) -> bool:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return True
        is_last = self._final is not None or self._orphaned
        return is_last and all(thread.is_finished() for thread in self._threads)

    def _first_line(self) -> bytes:
        while b"\n" not in self._input:
            chunk = os.read(0, 65536)
            if not chunk:
                sys.exit(0)
            self._input += chunk
        line, _, self._input = self._input.partition(b"\n")
        return line

    def _listen(self) -> None:
        if self._orphaned:
            time.sleep(POLL_S)
            return
        ready = select.select([0], [], [], POLL_S)[0]
        chunk = os.read(0, 65536) if ready else b""
        self._input += chunk
        *lines, self._input = self._input.split(b"\n")
        for line in lines:
            message = msgspec.json.decode(line, type=Message)
            if message.stop:
                self._deadline = 0.0
            elif message.lines is not None:
                self._final = message
                for thread in self._threads:
                    thread.finish([text.encode() for text in message.lines])
        # A child that the training process forked may keep the pipe open after its death.
        if (ready and not chunk) or os.getppid() != self._parent:
            self._orphaned = True
            self._deadline = self._deadline or time.monotonic() + self._task.flush_secs
            self._recover()

    def _recover(self) -> None:
        """Write the end that the training process could not write, once its file is closed."""
        until = time.monotonic() + _HANGS_S
        while time.monotonic() < until:
            with suppress(OSError):
                recover(self._folder, now=time.time(), upto=self._task.attempt)
            last = last_record(self._folder, self._task.attempt)
            if last is None or isinstance(last.event, RunEnded):
                break
            time.sleep(POLL_S)
        for thread in self._threads:
            thread.finish()

    def _tell_opened(self) -> None:
        for thread in self._threads:
            worker = thread.worker
            name, error = worker.route.name, worker.main.error
            if name not in self._said and (worker.opened is not None or error is not None):
                self._said.add(name)
                self.say(Message(opened=name, error=None if worker.opened else error or ""))
            hung = worker.hung_for()
            if hung > _HANGS_S and f"{name} hangs" not in self._said:
                self._said.add(f"{name} hangs")
                logger.warning("sink %r (%s) hangs since %.0f s", name, worker.route.kind, hung)

    def _sync(self) -> None:
        """Have the journal written to the disk, which costs the training process nothing here."""
        at, size = self._synced
        if time.monotonic() - at < _SYNC_S:
            return
        with suppress(OSError, AttributeError):
            fd = os.open(self._folder.records(self._task.attempt), os.O_RDONLY)
            try:
                now = os.fstat(fd).st_size
                if now != size:
                    os.fdatasync(fd)
            finally:
                os.close(fd)
            self._synced = (time.monotonic(), now)

    def _end(self) -> None:
        for thread in self._threads:
            thread.halt()
        for thread in self._threads:
            thread.join()
        self.hangs = not all(thread.is_finished() for thread in self._threads)
        last = last_record(self._folder, self._task.attempt)
        emitted = self._final.emitted if self._final else last.seq if last else 0
        reports = [thread.worker.report(emitted) for thread in self._threads]
        self.say(Message(reports=reports))
        if self._orphaned:
            ended = last.event if last and isinstance(last.event, RunEnded) else None
            receipt = Receipt(
                run=self._folder.run,
                status=ended.status if ended else "open",
                attempt=self._task.attempt,
                emitted=emitted,
                sinks=reports,
                journal=str(self._folder.path),
            )
            save_receipt(self._folder, receipt)


class _Forward(logging.Handler):
    """Hands what trainbus has to say to the training process, which the user sees."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__(logging.WARNING)
        self._watch = watch

    def emit(self, record: logging.LogRecord) -> None:
        self._watch.say(Message(log=record.getMessage()))


def _make(sink: Task.Sink) -> Sink:
    cls = registry.sink_class(sink.type)
    return cls(msgspec.convert(sink.options, cls.Options))
