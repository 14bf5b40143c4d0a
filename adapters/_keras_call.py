"""Reads a call of `fit`: its arguments, and the callbacks in whatever form it takes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from trainbus.errors import AttachError


class Call:
    """One call of a model's `fit`, which can be given a further callback.

    Args:
        fit: the method, Keras' own or a subclass's.
        args: what it is called with.
        kwargs: likewise.

    Raises:
        AttachError: the method takes no callbacks.
    """

    def __init__(
        self, fit: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.args = args
        self.kwargs = kwargs
        self._undo: Callable[[], object] = lambda: None
        self._names = _parameters(fit)
        self.arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        self.callbacks = flat(self.arguments.get("callbacks"))

    def add(self, callback: Any) -> None:
        """Have Keras call a callback as the last."""
        import keras

        given = self.arguments.get("callbacks")
        callbacks, place = [*self.callbacks, callback], self._names.index("callbacks")
        if isinstance(given, keras.callbacks.CallbackList):
            callback.set_params(given.params)
            given.callbacks.append(callback)
            self._undo = partial(given.callbacks.remove, callback)
        elif place < len(self.args):
            self.args = (*self.args[:place], callbacks, *self.args[place + 1 :])
        else:
            self.kwargs = {**self.kwargs, "callbacks": callbacks}

    def release(self) -> None:
        """Leave what the call was given as it was."""
        self._undo()


def flat(callbacks: Any) -> list[Any]:
    """Return the callbacks that `fit` is given, in whatever form it takes them."""
    import keras

    if isinstance(callbacks, keras.callbacks.CallbackList):
        return callbacks.callbacks  # type: ignore[no-any-return]
    return keras.tree.flatten(callbacks) if callbacks else []


def _parameters(fit: Callable[..., Any]) -> list[str]:
    import keras

    parameters = inspect.signature(fit).parameters
    if "callbacks" in parameters:
        return list(parameters)
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise AttachError("this `fit` takes no `callbacks`: put a BusCallback into those it uses")
    return list(inspect.signature(keras.Model.fit).parameters)[1:]
