"""The errors that trainbus raises: each says what was found, what was expected and what to do.

`comes_from_handler` distinguishes the errors of the program from those of trainbus.
"""

from __future__ import annotations

import difflib
import functools
import signal
from collections.abc import Iterable, Sequence
from types import CodeType
from typing import Any


class TrainbusError(Exception):
    """Base class of all errors that trainbus raises."""


class ConfigError(TrainbusError):
    """The configuration is not valid; `problems` has one line for each problem found."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class UnknownPluginError(TrainbusError):
    """No installed package registers a sink or adapter under this name."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        super().__init__(
            f"no {kind} is named {name!r}{did_you_mean(name, names)}; "
            f"installed: {', '.join(names) or 'none'} (`trainbus plugins` lists them)"
        )


class PluginError(TrainbusError):
    """An installed plugin can't be imported, or is not what its entry point requires."""


class AttachError(TrainbusError):
    """`attach` was called with an object that can't train."""


class NoAdapterError(AttachError):
    """`attach` was called with an object of a framework that no installed adapter supports."""

    def __init__(self, target: object, known: Iterable[str]) -> None:
        cls = type(target)
        super().__init__(
            f"no adapter for {cls.__module__}.{cls.__qualname__}; there are adapters for: "
            f"{', '.join(sorted(known)) or 'nothing'}. Use `with bus.run(...) as run:` in a loop "
            "of your own, or write an adapter (README, 'Write an adapter')"
        )


class MissingPackageError(TrainbusError):
    """A plugin needs a package that is not installed.

    Args:
        package: import name of the package.
        extra: extra of `distribution` that installs the package.
        distribution: distribution that contains the plugin.
    """

    def __init__(self, package: str, *, extra: str, distribution: str = "trainbus") -> None:
        super().__init__(
            f"the package {package!r} is not installed; run `pip install '{distribution}[{extra}]'`"
        )


class SinkError(TrainbusError):
    """A sink can't be opened, or rejects a record.

    Args:
        retry: whether the same call may succeed later, for example once a server is back.
    """

    def __init__(self, *args: object, retry: bool = False) -> None:
        super().__init__(*args)
        self.retry = retry


class JournalError(TrainbusError):
    """A journal, or a part of one, can't be written, can't be read, or is not trusted."""


class SubscribeError(TrainbusError):
    """The bus can't call this subscriber."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `, did you mean 'x'?` with the most similar name in `known`, or an empty string."""
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {nearest[0]!r}?" if nearest else ""


def comes_from_handler(error: BaseException) -> bool:
    """Return whether an exception comes from a signal handler of the program.

    Python can run handlers between any two lines, also of ours: for example a time limit that uses
    SIGALRM. Such an exception belongs to the program and is not caught.
    """
    handlers = {_code_of(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in handlers:
            return True
        trace = trace.tb_next
    return False


def _code_of(handler: Any) -> CodeType | None:
    """Return the code object of a signal handler, None if it has none."""
    if isinstance(handler, functools.partial):
        handler = handler.func
    if not hasattr(handler, "__code__"):  # a callable object
        handler = getattr(type(handler), "__call__", None)  # noqa: B004
    return getattr(handler, "__code__", None)
