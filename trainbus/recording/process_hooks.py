"""Ends the runs that are open when the process ends, whichever way it does.

What is global to a process can only be kept once: the hooks are hung in when the first run opens
and taken out when the last one has ended. What others hung in before stays in and is called; a
signal that somebody else handles is left to them.

    exception       `sys.excepthook`, `threading.excepthook`: the run has failed
    normal end      `atexit`: the run is finished
    SIGTERM         a handler, where there was none: the run is stopped, then the signal works
    os.fork         the child lets go of what belongs to its parent
    os._exit, SIGKILL, a crash    nothing can be done here; the sidecar closes the run
"""

from __future__ import annotations

import atexit
import functools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType, TracebackType
from typing import Any, Protocol
from weakref import WeakSet

from trainbus.events import RunEnded

_SIGTERM_FLUSH_S = 3.0


class OpenRun(Protocol):
    """What is watched: an emitter with an open run."""

    def end(self, error: BaseException | None = None) -> None:
        """End the run."""

    def fail(self, error: BaseException, thread: int) -> None:
        """End the run if that thread started it."""

    def interrupt(self, event: RunEnded, flush_secs: float) -> bool:
        """End the run from a signal handler; False if that happens later."""

    def abandon(self) -> None:
        """Let go of everything in a forked child."""


_open: WeakSet[Any] = WeakSet()
_killed_by: int | None = None
_before: dict[str, Any] = {}
_mutex = threading.RLock()
_once: set[str] = set()


def watch(run: OpenRun, *, of_signals: bool = True) -> None:
    """Take care of a run from here on; not `of_signals` where it is only told of errors."""
    with _mutex:
        _open.add(run)
        if not _once:
            _once.add("installed")
            atexit.register(_at_exit)
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=_in_child)
        if "excepthook" not in _before:
            _before["excepthook"], sys.excepthook = sys.excepthook, _on_exception
            _before["thread"], threading.excepthook = threading.excepthook, _on_thread_exception
        is_main = threading.current_thread() is threading.main_thread()
        if of_signals and is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _on_sigterm)


def unwatch(run: OpenRun) -> None:
    """Forget a run that has ended, and with the last one take the hooks out again."""
    with _mutex:
        _open.discard(run)
        remove_unused_hooks()


def remove_unused_hooks() -> None:
    """Take the hooks out where no run is open any more: one may be gone without an end."""
    with _mutex:
        if _open:
            return
        # Who hung in a hook of their own meanwhile calls ours, which then only passes on.
        if sys.excepthook is _on_exception and threading.excepthook is _on_thread_exception:
            sys.excepthook = _before.pop("excepthook")
            threading.excepthook = _before.pop("thread")
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGTERM) is _on_sigterm and _killed_by is None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Run a block, of no more than a few lines for the disk, before any handler of others.

    What handles SIGTERM or Ctrl-C may raise wherever the signal finds the main thread, as Python's
    own handler and Lightning's do. What was due runs when the block is over.
    """
    with _holding(signal.SIGTERM), _holding(signal.SIGINT):
        yield


@contextmanager
def _holding(number: int) -> Iterator[None]:
    handler = signal.getsignal(number)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not callable(handler) or handler is _on_sigterm:
        yield
        return
    due: list[FrameType | None] = []
    try:
        signal.signal(number, lambda _, frame: due.append(frame))
        yield
    finally:
        signal.signal(number, handler)
        for frame in due[:1]:
            handler(number, frame)


def finish_sigterm() -> None:
    """Let a SIGTERM that came during an `emit` do its work; called after each."""
    if _killed_by is not None and threading.current_thread() is threading.main_thread():
        _die(_killed_by)


def comes_from_handler(error: BaseException) -> bool:
    """Return whether a signal handler of the program raised an exception, which is the program's.

    Python runs handlers between any two lines, also of ours, as a time limit by SIGALRM does.
    """
    handlers = {_code(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in handlers:
            return True
        trace = trace.tb_next
    return False


def _code(handler: Any) -> CodeType | None:
    """Return the code that runs when a signal comes."""
    if isinstance(handler, functools.partial):
        handler = handler.func
    if not hasattr(handler, "__code__"):  # an object that is called
        handler = getattr(type(handler), "__call__", None)  # noqa: B004
    return getattr(handler, "__code__", None)


def _on_exception(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    try:
        (_before.get("excepthook") or sys.__excepthook__)(kind, error, trace)
    finally:
        if _is_over():
            for run in list(_open):
                run.end(error)


def _is_over() -> bool:
    """Return whether the program is over: when the interpreter calls a hook, it has no caller.

    Others call the hook to print an exception that they ignore, as extensions in C do.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_back is not None:
        frame = frame.f_back
    return frame is None or frame.f_code.co_name not in ("<module>", "_run_module_as_main")


def _on_thread_exception(args: threading.ExceptHookArgs) -> None:
    try:
        (_before.get("thread") or threading.__excepthook__)(args)
    finally:
        if args.exc_value is not None and args.thread is not None:
            for run in list(_open):
                run.fail(args.exc_value, args.thread.ident or 0)


def _at_exit() -> None:
    for run in list(_open):
        run.end()


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    global _killed_by
    if signal.getsignal(number) is not _on_sigterm:
        # A handler that found this one calls it after its own work, as Lightning's does. Without
        # trainbus it would have found none: whether the training goes on is for it to say.
        return
    _killed_by = number
    event = RunEnded(status="stopped", reason="SIGTERM")
    is_over = [run.interrupt(event, _SIGTERM_FLUSH_S) for run in list(_open)]
    if all(is_over):
        _die(number)


def _die(number: int) -> None:
    """Let the signal end the process, as it would have without a handler."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _in_child() -> None:
    global _mutex
    _mutex = threading.RLock()
    for run in list(_open):
        run.abandon()
    _open.clear()
