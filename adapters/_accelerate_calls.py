"""Listens to calls of an accelerator's methods, of which accelerate tells its trackers nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from trainbus.interfaces import Detach
from trainbus.toolkit.adapters import around_of, wrap

Told: TypeAlias = Callable[..., None]


class Calls:
    """What is listened to: the methods of one accelerator at a time."""

    def __init__(self) -> None:
        self.accelerator: Any = None
        self._unwrap: list[Detach] = []

    def join(self, accelerator: Any, before: Mapping[str, Told], after: Mapping[str, Told]) -> None:
        """Listen to an accelerator, and no longer to another.

        Args:
            accelerator: whose methods are called.
            before: of the methods that are told of first, what is called with their arguments.
            after: of those that are told of when done, what is called with result and arguments.
        """
        if accelerator is not self.accelerator:
            self.leave()
            self.accelerator = accelerator
            around = {name: _before(tell) for name, tell in before.items()}
            around |= {name: _after(tell) for name, tell in after.items()}
            self._unwrap = [wrap(accelerator, name, each) for name, each in around.items()]

    def leave(self) -> None:
        """Listen no longer."""
        for unwrap in self._unwrap:
            unwrap()
        self.accelerator, self._unwrap = None, []


def is_attached(accelerator: Any) -> bool:
    """Return whether somebody listens to an accelerator who is not one of its trackers."""
    return accelerator is not None and around_of(accelerator, "init_trackers") is not None


def _before(tell: Told) -> Callable[..., Any]:
    def call(method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        tell(*args, **kwargs)
        return method(*args, **kwargs)

    return call


def _after(tell: Told) -> Callable[..., Any]:
    def call(method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        tell(result, *args, **kwargs)
        return result

    return call
