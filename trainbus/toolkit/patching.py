"""Wraps methods of objects so that they can be unwrapped in any order, and patches classes.

Unwrapping restores the object; a patched class stays patched. No returned function keeps an object
alive.
"""

from __future__ import annotations

import _thread
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import wraps
from inspect import Parameter, signature
from types import MethodType
from typing import Any

from trainbus.interfaces import Detach


def wrap(target: Any, name: str, around: Callable[..., Any]) -> Detach:
    """Replace one object's method by `around(method, *args, **kwargs)`.

    A copy of the object is wrapped too, unless its class defines its own copying. A pickle is not,
    and loads without trainbus.

    Args:
        target: the object; others of its class are unchanged.
        name: name of the method.
        around: calls `method(*args, **kwargs)` and returns its result.

    Returns:
        A function that unwraps the method, even if others wrapped it since.
    """
    layer = _Layer(vars(target).get(name), around)
    plain = layer.plain or getattr(type(target), name)

    # Frameworks inspect a method's signature, and pickle it by name.
    @wraps(plain)
    def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = MethodType(plain, self)
        return around(method, *args, **kwargs) if layer.active else method(*args, **kwargs)

    call.__name__, call.__trainbus__ = name, layer  # type: ignore[attr-defined]
    setattr(target, name, MethodType(call, target))
    of_target, of_call = weakly(target), weakref.ref(call)

    def detach() -> None:
        target, call = of_target(), of_call()
        if call is not None:
            call.__trainbus__.active = False  # type: ignore[attr-defined]  # in copies, too
            if target is not None:
                _unwrap(target, call)

    return detach


def _unwrap(target: Any, call: Any) -> None:
    name, layer = call.__name__, call.__trainbus__
    if getattr(vars(target).get(name), "__func__", None) is not call:
        return  # others wrapped it since; the inactive layer only passes calls on
    before = layer.before
    while (below := _layer_of(before)) is not None and not below.active:
        before = below.before
    if before is None:
        delattr(target, name)
    else:
        setattr(target, name, before)


class _Layer:
    """One wrapper of a method, and the object's own attribute before it."""

    def __init__(self, before: Any, around: Callable[..., Any]) -> None:
        self.before = before
        self.around = around
        self.active = True

    @property
    def plain(self) -> Any:
        """The wrapped function, taking the object first; None for the method of the class."""
        before = self.before
        if before is None or isinstance(before, MethodType):
            return before and before.__func__

        @wraps(before)
        def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
            return before(*args, **kwargs)

        with suppress(TypeError, ValueError):  # some builtins have no signature
            found = signature(before)
            parameters = [Parameter("__self__", Parameter.POSITIONAL_ONLY)]
            parameters += found.parameters.values()
            vars(call)["__signature__"] = found.replace(parameters=parameters)
        return call


def around_of(target: Any, name: str) -> Any:
    """Return the outermost `around` of an object's method, None if it is not wrapped."""
    return next(arounds_of(target, name), None)


def arounds_of(target: Any, name: str) -> Iterator[Any]:
    """Yield each `around` of an object's method, the outermost first."""
    layer = _layer_of(vars(target).get(name))
    while layer is not None:
        if layer.active:
            yield layer.around
        layer = _layer_of(layer.before)


def _layer_of(method: Any) -> _Layer | None:
    return getattr(method, "__trainbus__", None)


def patch(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a method of a class, or a function of a module, by `around(function, …)`.

    It lasts for the whole process, and is meant for an adapter's `hook`. A second patch of the same
    name does nothing.

    Args:
        owner: the class or module.
        name: name of the method, which gets its object as the first of `args`, or of the function.
        around: calls `function(*args, **kwargs)` and returns its result.
    """
    function = getattr(owner, name)
    if getattr(function, "__patched__", None) is owner:  # not that of a base class
        return

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return around(function, *args, **kwargs)

    vars(call)["__patched__"] = owner
    setattr(owner, name, call)


def before(call: Callable[..., object]) -> Callable[..., Any]:
    """Return an `around` that first calls `call(*args, **kwargs)`, then the method."""

    def around(method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        call(*args, **kwargs)
        return method(*args, **kwargs)

    return around


def after(call: Callable[..., object]) -> Callable[..., Any]:
    """Return an `around` that calls the method, then `call(result, *args, **kwargs)`."""

    def around(method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        call(result, *args, **kwargs)
        return result

    return around


def when_gone(
    owner: object, do: Callable[[], object], *, if_due: Callable[[], bool] = lambda: True
) -> None:
    """Call `do` in a new thread once an object is garbage-collected, but not at exit.

    Args:
        owner: the object; neither function may refer to it.
        do: may block, must not raise.
        if_due: whether to call `do`; runs inside the garbage collector and must take no locks.
    """

    def gone() -> None:
        # The collector runs in any thread, whatever locks it holds, so nothing here may block;
        # `threading.Thread` takes locks to start.
        if if_due():
            with suppress(RuntimeError):  # the interpreter can't start threads any more
                _thread.start_new_thread(do, ())

    with suppress(TypeError):  # it can't be referenced weakly
        weakref.finalize(owner, gone).atexit = False


def weakly(target: Any) -> Callable[[], Any]:
    """Return a function that returns an object, or None once it is garbage-collected.

    An object that doesn't support weak references is kept alive.
    """
    try:
        return weakref.ref(target)
    except TypeError:
        return lambda: target
