"""A signal that comes at a chosen line, and whose handler raises there, as Lightning's does."""

from __future__ import annotations

import gc
import linecache
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class HandlerError(Exception):
    """What the handler of the signal raises."""


class SignalAt:
    """Sends SIGTERM at the n-th line, from 1, that runs in files of some folder.

    Args:
        at: which of the lines.
        files: part of the path of the files whose lines count.
    """

    def __init__(self, at: int, files: str) -> None:
        self.came_at = ""
        """Where it came; empty if fewer lines were run."""
        self._left = at
        self._files = files

    @contextmanager
    def ready(self) -> Iterator[Callable[[], None]]:
        """Yield what begins the count, in the calls that are made from there on."""
        before = signal.signal(signal.SIGTERM, _raise)
        gc.disable()  # what is raised in a finalizer that the collector calls is lost
        try:
            yield lambda: sys.settrace(self._trace)
        finally:
            sys.settrace(None)
            gc.enable()
            assert _raise is signal.signal(signal.SIGTERM, before), self.came_at

    def _trace(self, frame: FrameType, what: str, arg: Any) -> Any:
        if self._files not in frame.f_code.co_filename:
            return None
        # On its way out of a `with`, Python looks for signals only when the block has been left; a
        # trace comes before, and what is raised there would leave a lock locked.
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if what == "line" and not line.lstrip().startswith("with "):
            self._left -= 1
            if self._left == 0:
                self.came_at = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                sys.settrace(None)
                signal.raise_signal(signal.SIGTERM)
        return self._trace


def _raise(number: int, frame: FrameType | None) -> None:
    raise HandlerError
