"""Captures the lines that a program prints with Python to stdout and stderr.

The stream objects stay where they are: only their `write` is wrapped, so whoever holds one, such as
a logging handler or a progress bar, is captured too. If the attributes of a stream can't be set,
`sys.stdout` or `sys.stderr` becomes a proxy of it until the capture stops.

Not captured:
    - what C code and child processes write to the file descriptors;
    - what is written to an object that replaces `sys.stdout` later, unless it passes the text on
      to the original one, as most do;
    - `writelines` of a stream whose own one does not call `write`, as those of `io` do;
    - what is written to `sys.stdout.buffer`, `sys.__stdout__` if it is another object, or through
      a `write` method that was looked up before the start;
    - text whose `write` raises;
    - the time between two writes of an unfinished line: its beginning is passed on at the first
      write after a second.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Literal
from weakref import WeakSet

import msgspec
from msgspec.structs import replace

from trainbus import redaction
from trainbus.capture.terminal import Row, Terminal
from trainbus.errors import comes_from_handler

logger = logging.getLogger("trainbus")

Stream = Literal["stdout", "stderr"]

_MAX_BYTES = 64 * 2**20
_MAX_NESTED = 10_000
_MAX_KEY_LINES = 200
_installing = threading.RLock()
_captures: WeakSet[ConsoleCapture] = WeakSet()


class ConsoleChunk(msgspec.Struct, frozen=True):
    """A line without its line feed, or an earlier state of it.

    `line` counts from 1 over both streams. A chunk with the number of an earlier one replaces it:
    the line was not finished then. `time` is when the line was begun, in Unix seconds. If
    `dropped_lines` is not 0, that many lines are missing here, and the text says so.
    """

    stream: Stream
    text: str
    line: int
    time: float
    dropped_lines: int = 0
    dropped_bytes: int = 0


class ConsoleCapture:
    """Passes on every line that is printed between `start` and `stop`.

    A line is passed on before the `write` with its line feed returns, so lines survive SIGKILL. If
    another thread is just passing on a line, that thread passes on this one too, shortly after.
    Progress bars become their last state; one state every five seconds is passed on before.

    Half of `max_bytes` is passed on as it is printed. Of what follows, the newest half is kept in
    memory and passed on by `stop`, after a chunk that says how much was dropped in between. A
    program that is killed with SIGKILL after having printed so much loses that second half: passing
    on without end would fill the disk, and passing on samples would tear tracebacks apart.

    Nothing raises into `print`. A fault ends the capture with one warning, and printing continues.
    No lock is waited for, so `write` may itself print, and so may a signal handler or a finalizer
    at any time. In a forked child nothing is captured.

    Args:
        write: is called with each chunk, in order, and never by two threads at once.
        redact: removes secrets from a complete line.
        max_bytes: maximum size of the text that is passed on, in UTF-8.
        clock: returns Unix seconds.
    """

    def __init__(
        self,
        write: Callable[[ConsoleChunk], object],
        *,
        redact: Callable[[str], str] = redaction.text,
        max_bytes: int = _MAX_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._write = write
        self._redact = redact
        self._clock = clock
        self._half = max_bytes // 2
        self._layers: list[_Layer] = []
        self._terminals: dict[Stream, Terminal] = {}
        self._key_lines: dict[Stream, int] = {}
        self._queue: deque[tuple[Stream, str, float]] = deque()
        self._busy = threading.Lock()
        self._busy_thread = 0
        self._nested = 0
        self._is_active = False
        self._lines = 0
        self._bytes = 0
        self._ring: deque[tuple[ConsoleChunk, int]] = deque()
        self._ring_bytes = 0
        self._dropped: ConsoleChunk | None = None

    def start(self) -> None:
        """Begin to capture `sys.stdout` and `sys.stderr`; a second call does nothing."""
        if self._is_active or self._layers:
            return
        self._terminals = {"stdout": Terminal(), "stderr": Terminal()}
        self._key_lines = {"stdout": 0, "stderr": 0}
        self._is_active = True
        try:
            with _installing:
                _captures.add(self)
                for name in self._terminals:
                    stream = getattr(sys, name, None)
                    # Both can be one object, whose text is then captured once.
                    if stream is not None and all(stream is not x.stream for x in self._layers):
                        layer = _Layer(self, name, stream)
                        layer.install()
                        self._layers.append(layer)
        except Exception as error:
            self._handle(error)

    def stop(self) -> None:
        """Pass on what is left, and restore the streams; a second call does nothing."""
        with _installing:
            layers, self._layers = self._layers, []
            for layer in reversed(layers):
                layer.remove()
            _captures.discard(self)
        if not self._is_active:
            return
        if self._busy_thread == threading.get_ident():  # `write` itself ends the capture
            self._is_active = False
            return
        try:
            self._pass_on()
            if not self._busy.acquire(timeout=1.0):  # held by a thread that is blocked in `write`
                self._is_active = False
                return
            try:
                self._finish()
            finally:
                self._is_active = False
                self._busy.release()
        except Exception as error:
            self._handle(error)

    def _take(self, stream: Stream, text: Any) -> None:
        """Capture a text that was written; called by the wrapped `write`."""
        if not self._is_active or type(text) is not str:
            return
        try:
            self._queue.append((stream, text, self._clock()))
            if self._busy_thread == threading.get_ident():
                self._nested += 1  # printed by `write` itself, a signal handler or a finalizer
                return
            self._pass_on()
        except Exception as error:
            self._handle(error)

    def _pass_on(self) -> None:
        # What is appended while this thread lets go of the lock is found by the outer loop.
        while self._queue and self._busy.acquire(blocking=False):
            try:
                self._busy_thread, self._nested = threading.get_ident(), 0
                while self._queue:
                    name, text, now = self._queue.popleft()
                    self._send(name, self._terminals[name].feed(text, now))
                    if self._nested > _MAX_NESTED:
                        raise RuntimeError("what receives the lines prints without end")
            finally:
                self._busy_thread = 0
                self._busy.release()

    def _send(self, stream: Stream, rows: Iterable[Row]) -> None:
        for row in rows:
            if not row.number:
                self._lines += 1
                row.number = self._lines
            text = self._clean(stream, row.shown())
            self._limit(ConsoleChunk(stream, text, row.number, row.time))

    def _clean(self, stream: Stream, text: str) -> str:
        """Return a line without secrets; a private key has several lines."""
        if self._key_lines[stream]:
            self._key_lines[stream] -= 1
            if "-----END" in text:
                self._key_lines[stream] = 0
            return redaction.REDACTED
        if "PRIVATE KEY" in text and "-----BEGIN" in text and "-----END" not in text:
            self._key_lines[stream] = _MAX_KEY_LINES
            return redaction.REDACTED
        return self._redact(text)

    def _limit(self, chunk: ConsoleChunk) -> None:
        text = chunk.text
        size = 1 + (len(text) if text.isascii() else len(text.encode("utf-8", "replace")))
        if self._bytes + size <= self._half and not self._ring:
            self._bytes += size
            self._write(chunk)
            return
        self._ring.append((chunk, size))
        self._ring_bytes += size
        while self._ring_bytes > self._half and self._ring:
            old, size = self._ring.popleft()
            self._ring_bytes -= size
            first = self._dropped or replace(old, text="", dropped_lines=0, dropped_bytes=0)
            self._dropped = replace(
                first,
                dropped_lines=first.dropped_lines + 1,
                dropped_bytes=first.dropped_bytes + size,
            )

    def _finish(self) -> None:
        for name, terminal in self._terminals.items():
            self._send(name, terminal.finish())
        if (gap := self._dropped) is not None:
            text = f"[{gap.dropped_lines} lines ({gap.dropped_bytes} bytes) dropped]"
            self._write(replace(gap, text=text))
        for chunk, _ in self._ring:
            self._write(chunk)
        self._ring.clear()

    def _handle(self, error: Exception) -> None:
        if comes_from_handler(error):  # an exception of the program, which can come at any time
            raise error
        self._fail(error)

    def _fail(self, error: Exception) -> None:
        was_active, self._is_active = self._is_active, False
        self._queue.clear()
        if was_active:
            text = "the output of the program is no longer captured: %s: %s"
            logger.warning(text, type(error).__name__, error)

    def _abandon(self) -> None:
        """Capture nothing in a forked child, whose lines would be mixed up with its parent's."""
        self._is_active = False
        self._queue.clear()
        self._busy = threading.Lock()


class _Layer:
    """The `write` of a stream while it is captured.

    Layers of several captures lie on each other. One that stops while another lies on it only
    passes text on, until it is the uppermost one and can be removed.
    """

    __slots__ = ("_capture", "_name", "_own", "_previous", "_replaced", "stream")

    def __init__(self, capture: ConsoleCapture, name: Stream, stream: Any) -> None:
        self._capture: ConsoleCapture | None = capture
        self._name: Stream = name
        self._own: Any = None
        self._previous: Any = None
        self._replaced: Any = None
        self.stream: Any = stream

    def __call__(self, text: Any, /, *more: Any, **named: Any) -> Any:
        result = self._previous(text, *more, **named)
        capture = self._capture
        if capture is not None:
            capture._take(self._name, text)
        return result

    def install(self) -> None:
        """Wrap the `write` of the stream, or put a proxy in its place."""
        stream = self.stream
        try:
            self._wrap(stream)
        except (AttributeError, TypeError):  # `__slots__`, or an object of C
            self.stream = _Proxy(stream)
            self._replaced = stream
            self._wrap(self.stream)
            setattr(sys, self._name, self.stream)

    def remove(self) -> None:
        """Restore the stream, unless something else wraps its `write` now."""
        self._capture = None
        top = getattr(self.stream, "write", None)
        while isinstance(top, _Layer) and top._capture is None:
            top._unwrap()
            top = getattr(self.stream, "write", None)

    def _wrap(self, stream: Any) -> None:
        self._own = vars(stream).get("write") if hasattr(stream, "__dict__") else None
        self._previous = stream.write
        stream.write = self

    def _unwrap(self) -> None:
        if self._own is not None:
            self.stream.write = self._own
        else:
            del self.stream.write
        if self._replaced is not None and getattr(sys, self._name, None) is self.stream:
            setattr(sys, self._name, self._replaced)


class _Proxy:
    """Stands for a stream whose attributes can't be set."""

    def __init__(self, stream: Any) -> None:
        self.wrapped = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def __iter__(self) -> Any:
        return iter(self.wrapped)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)


def _in_child() -> None:
    global _installing
    _installing = threading.RLock()
    for capture in list(_captures):
        capture._abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
