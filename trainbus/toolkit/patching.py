"""Wraps the methods of a trainer, and of a framework's classes.

What is put around one object can be taken away again, in any order, and the object is then as it
was; what is put into a class stays. What is returned keeps no object alive.
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
        return  # somebody wrapped it since, and calls what is silent now
    before = layer.before
    while (below := _layer_of(before)) is not None and not below.active:
        before = below.before
    if before is None:
        delattr(target, name)
    else:
        setattr(target, name, before)


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
    return next(arounds_of(target, name), None)


def arounds_of(target: Any, name: str) -> Iterator[Any]:
    """Yield what `wrap` has put around an object's method, the last one first."""
    layer = _layer_of(vars(target).get(name))
    while layer is not None:
        if layer.active:
            yield layer.around
        layer = _layer_of(layer.before)


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


def when_gone(
    owner: object, do: Callable[[], object], *, if_due: Callable[[], bool] = lambda: True
) -> None:
    """Call `do` in a thread of its own when an object no longer exists, but not at exit.

    Args:
        owner: the object; the functions do not refer to it.
        do: may take its time, and does not raise.
        if_due: asked first, by the garbage collector: it takes no locks.
    """

    def gone() -> None:
        # The collector may come at any point of any thread, which may hold any lock: nothing that
        # waits is done in here, and `threading.Thread` itself takes locks to start.
        if if_due():
            with suppress(RuntimeError):  # no thread can be started
                _thread.start_new_thread(do, ())

    with suppress(TypeError):  # it can't be referenced weakly
        weakref.finalize(owner, gone).atexit = False


def weakly(target: Any) -> Callable[[], Any]:
    """Return a function that returns an object as long as it lives, and does not keep it alive.

    An object that can't be referenced weakly lives on.
    """
    try:
        return weakref.ref(target)
    except TypeError:
        return lambda: target
