"""Every error that trainbus raises on purpose: it says what was found, expected, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class TrainbusError(Exception):
    """Base of every deliberate error of trainbus."""


class ConfigError(TrainbusError):
    """A configuration that can't be used; `problems` holds one line for each fault found."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class UnknownPluginError(TrainbusError):
    """No sink or adapter is registered under a name."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        super().__init__(
            f"no {kind} is named {name!r}{did_you_mean(name, names)}; "
            f"installed: {', '.join(names) or 'none'} (`trainbus plugins` lists them)"
        )


class PluginError(TrainbusError):
    """An installed plugin could not be loaded, or is not what its entry point promises."""


class AttachError(TrainbusError):
    """`attach` was given an object that its framework does not train with."""


class NoAdapterError(AttachError):
    """`attach` was given an object of a framework that no installed adapter knows."""

    def __init__(self, target: object, known: Iterable[str]) -> None:
        cls = type(target)
        super().__init__(
            f"no adapter for {cls.__module__}.{cls.__qualname__}; there are adapters for: "
            f"{', '.join(sorted(known)) or 'nothing'}. Use `with bus.run(...) as run:` in a loop "
            "of your own, or write an adapter (README, 'Write an adapter')"
        )


class MissingPackageError(TrainbusError):
    """A plugin needs a package that is not installed.

    `extra` of `distribution` brings it: name your own distribution where the plugin is in one.
    """

    def __init__(self, package: str, *, extra: str, distribution: str = "trainbus") -> None:
        super().__init__(
            f"the package {package!r} is not installed; run `pip install '{distribution}[{extra}]'`"
        )


class SinkError(TrainbusError):
    """A sink can't be opened or can't take what it was given.

    `retry` says whether the same may go well later, such as after a server has come back.
    """

    def __init__(self, *args: object, retry: bool = False) -> None:
        super().__init__(*args)
        self.retry = retry


class JournalError(TrainbusError):
    """A journal, or a part of one, that can't be written, read, or trusted."""


class SubscribeError(TrainbusError):
    """A subscriber that can't be called the way the bus calls it."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `, did you mean 'x'?` with the nearest of `known`, or an empty string."""
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {nearest[0]!r}?" if nearest else ""
