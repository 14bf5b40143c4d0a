"""Ends the open runs when the process ends, in whatever way.

The hooks are global to the process: they are installed when the first run opens, and removed when
the last one has ended. Hooks that others have installed stay and are called; a signal that the
program handles itself is left to it.

    exception       `sys.excepthook`, `threading.excepthook`: the run ends as failed
    normal exit     `atexit`: the run ends as finished
    SIGTERM         a handler, if there was none: the run ends as stopped, then the process dies
    os.fork         the child releases what belongs to its parent
    os._exit, SIGKILL, a crash    no hook runs; the delivery process ends the run
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Protocol
from weakref import WeakSet

from trainbus.events import RunEnded

_SIGTERM_FLUSH_S = 3.0


class OpenRun(Protocol):
    """An emitter with an open run."""

    def end(self, error: BaseException | None = None) -> None:
        """End the run."""

    def fail(self, error: BaseException, thread: int) -> None:
        """End the run if that thread started it."""

    def interrupt(self, event: RunEnded, flush_secs: float) -> bool:
        """End the run from a signal handler; False if it has to end later."""

    def abandon(self) -> None:
        """Release everything in a forked child."""


_open: WeakSet[Any] = WeakSet()
_killed_by: int | None = None
_before: dict[str, Any] = {}
_mutex = threading.RLock()
_once: set[str] = set()


def watch(run: OpenRun, *, of_signals: bool = True) -> None:
    """Install the hooks for a run; without `of_signals`, only those for exceptions and exit."""
    with _mutex:
        _open.add(run)
        if not _once:
            _once.add("installed")
            atexit.register(end_open_runs)
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=_in_child)
        if "excepthook" not in _before:
            _before["excepthook"], sys.excepthook = sys.excepthook, _on_exception
            _before["thread"], threading.excepthook = threading.excepthook, _on_thread_exception
        is_main = threading.current_thread() is threading.main_thread()
        if of_signals and is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _on_sigterm)


def unwatch(run: OpenRun) -> None:
    """Forget a run that has ended; after the last one, remove the hooks."""
    with _mutex:
        _open.discard(run)
        remove_unused_hooks()


def remove_unused_hooks() -> None:
    """Remove the hooks if no run is open: an emitter can be freed without ending its run."""
    with _mutex:
        if _open:
            return
        # A hook that was installed after ours calls ours, which then stays and only passes on.
        if sys.excepthook is _on_exception and threading.excepthook is _on_thread_exception:
            sys.excepthook = _before.pop("excepthook")
            threading.excepthook = _before.pop("thread")
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGTERM) is _on_sigterm and _killed_by is None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Defer the program's handlers of SIGTERM and Ctrl-C until the end of a short block.

    Such a handler can raise between any two lines of the main thread, as those of Python and
    Lightning do. A deferred signal is handled when the block ends.
    """
    with _deferred(signal.SIGTERM), _deferred(signal.SIGINT):
        yield


@contextmanager
def _deferred(number: int) -> Iterator[None]:
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
    """Let a SIGTERM that arrived during an `emit` end the process; called after each `emit`."""
    if _killed_by is not None and threading.current_thread() is threading.main_thread():
        _die(_killed_by)


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
    """Return whether the program is ending: the interpreter then calls the hook without a caller.

    C extensions also call the hook, to print an exception that they ignore.
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


def end_open_runs() -> None:
    """End every open run, as at the end of the process."""
    for run in list(_open):
        run.end()


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    global _killed_by
    if signal.getsignal(number) is not _on_sigterm:
        # A handler installed after this one may call it, as Lightning's does. Without trainbus it
        # would have nothing to call: it decides itself whether training continues.
        return
    _killed_by = number
    event = RunEnded(status="stopped", reason="SIGTERM")
    is_over = [run.interrupt(event, _SIGTERM_FLUSH_S) for run in list(_open)]
    if all(is_over):
        _die(number)


def _die(number: int) -> None:
    """Let the signal end the process, as without a handler."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _in_child() -> None:
    global _mutex
    _mutex = threading.RLock()
    for run in list(_open):
        run.abandon()
    _open.clear()
