"""Stands around the methods of a trainer, and of a framework's classes.

What is put around one object can be taken away again, in any order, and the object is then as it
was; what is put into a class stays.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from inspect import Parameter, signature
from types import MethodType
from typing import Any

from trainbus.interfaces import Detach


def wrap(target: Any, name: str, around: Callable[..., Any]) -> Detach:
    """Have `around(method, *args, **kwargs)` called in the place of one object's method.

    A copy of the object is wrapped too, unless its class makes copies in its own way; a pickle is
    not: it can be loaded without trainbus.

    Args:
        target: the object; others of its class are left alone.
        name: the method.
        around: calls `method(*args, **kwargs)` and returns what it returns.

    Returns:
        A function that puts the object back as it was, whoever wrapped the method since.
    """
    layer = _Layer(vars(target).get(name), around)
    plain = layer.plain or getattr(type(target), name)

    # Signature and name stay: frameworks ask a method what it takes, and pickle it by its name.
    @wraps(plain)
    def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = MethodType(plain, self)
        return around(method, *args, **kwargs) if layer.active else method(*args, **kwargs)

    call.__name__, call.__trainbus__ = name, layer  # type: ignore[attr-defined]
    wrapped = MethodType(call, target)
    setattr(target, name, wrapped)

    def detach() -> None:
        layer.active = False
        if vars(target).get(name) is wrapped:
            before = layer.before
            while (below := _layer_of(before)) is not None and not below.active:
                before = below.before
            if before is None:
                delattr(target, name)
            else:
                setattr(target, name, before)

    return detach


class _Layer:
    """One wrapping of a method, and what the object's own attribute was before."""

    def __init__(self, before: Any, around: Callable[..., Any]) -> None:
        self.before = before
        self.around = around
        self.active = True

    @property
    def plain(self) -> Any:
        """The function below, with the object as its first argument; None for the class's own."""
        before = self.before
        if before is None or isinstance(before, MethodType):
            return before and before.__func__

        @wraps(before)
        def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
            return before(*args, **kwargs)

        with suppress(TypeError, ValueError):  # there are builtins that tell none
            found = signature(before)
            parameters = [Parameter("__self__", Parameter.POSITIONAL_ONLY)]
            parameters += found.parameters.values()
            vars(call)["__signature__"] = found.replace(parameters=parameters)
        return call


def around_of(target: Any, name: str) -> Any:
    """Return what `wrap` has put around an object's method last, None if there is nothing."""
    layer = _layer_of(vars(target).get(name))
    return layer.around if layer is not None and layer.active else None


def _layer_of(method: Any) -> _Layer | None:
    return getattr(method, "__trainbus__", None)


def patch(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Have `around(function, *args, **kwargs)` called in the place of a class's or module's own.

    It is for the whole process, for an adapter's `hook`: the first stays, a second changes nothing.

    Args:
        owner: the class or module.
        name: the method, whose object is then the first of `args`, or the function.
        around: calls `function(*args, **kwargs)` and returns what it returns.
    """
    function = getattr(owner, name)
    if getattr(function, "__patched__", None) is owner:  # of a class above it, it is not this one
        return

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return around(function, *args, **kwargs)

    vars(call)["__patched__"] = owner
    setattr(owner, name, call)
