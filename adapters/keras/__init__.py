"""Turns the `fit` of Keras 3 into events: each call is a run with epochs, metrics and checkpoints.

Attaches to a `keras.Model`, or is a `BusCallback(bus)` among the callbacks of `fit`. Epoch values
equal those of Keras' `History`; values of a batch are Keras' running means over the epoch.
Checkpoints are what `save` and `save_weights` of the model write during `fit`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from types import MethodType
from typing import Any

from trainbus.errors import AttachError, SinkError
from trainbus.interfaces import Detach, Emit
from trainbus.toolkit.adapters import (
    Hooks,
    Origin,
    argument,
    around_of,
    guarded,
    late_class,
    lazy,
    patch,
    with_argument,
    wrap,
    wrong_target,
)

from .trainer import Facts, Training

TESTED_VERSIONS = "3.15.1"
_TRAIN_HOOKS = ("train_begin", "epoch_begin", "train_batch_end", "epoch_end", "train_end")
REQUIRED_NAMES = (
    *(f"keras:Model.{name}" for name in ("fit", "save", "save_weights", "count_params")),
    *(f"keras:callbacks.Callback.on_{name}" for name in _TRAIN_HOOKS),
    *(f"keras:callbacks.{kind}.set_model" for kind in ("Callback", "CallbackList")),
    *(f"keras:callbacks.{kind}._save_model" for kind in ("BackupAndRestore", "ModelCheckpoint")),
    *(f"keras:callbacks.{kind}" for kind in ("EarlyStopping", "TerminateOnNaN")),
    "keras:optimizers.Optimizer.iterations",
    "keras:tree.flatten",
)


def attach(target: Any, emit: Emit) -> Detach:
    """Report every `fit` of a model, or those that a `BusCallback` is passed to.

    Args:
        target: a `keras.Model`, or a `BusCallback` of this module.
        emit: where the events go.

    Returns:
        A function that restores the target.

    Raises:
        AttachError: the object is neither.
    """
    import keras

    if isinstance(target, _Hooks):
        return target.report.connect(emit, target.release)
    if not isinstance(target, keras.Model):
        advice = "attach the model that you call `fit()` on"
        raise wrong_target(target, "a keras.Model or a BusCallback", advice)
    hooks: _Hooks = _callback_class()(origin=Origin.ATTACH)
    unwrap = wrap(target, "fit", _Fit(hooks))

    def release() -> None:
        hooks.release()
        unwrap()

    return hooks.report.connect(emit, release)


def hook(module: Any, attach: Callable[[object], object]) -> None:
    """Attach every model when its `fit` is called, unless a callback of ours reports the call.

    Args:
        module: `keras`.
        attach: called with the model.
    """

    def fit(function: Any, model: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = MethodType(function, model)
        try:
            given = signature(method).bind(*args, **kwargs).arguments
            is_reported = any(_reports(callback) for callback in _flat(given.get("callbacks")))
        except Exception:  # an invalid call, for which Keras raises an error of its own
            is_reported = True
        if not is_reported and _around(model) is None:
            attach(model)
        # Not `model.fit`: the `fit` of a subclass may be the caller.
        around = None if is_reported else _around(model)
        return around(method, *args, **kwargs) if around else method(*args, **kwargs)

    patch(module.Model, "fit", fit)


class _Fit:
    """Wraps a model's `fit`: adds our callback as the last, and records exceptions."""

    def __init__(self, hooks: Any) -> None:
        self.hooks = hooks

    def __call__(self, method: Any, /, *args: Any, **kwargs: Any) -> Any:
        joined = self._join(method, args, kwargs)
        if joined is None:
            return method(*args, **kwargs)
        hooks, call = joined
        try:
            return method(*call.args, **call.kwargs)
        except SinkError:
            raise
        except BaseException as error:
            hooks.fail(error)
            raise
        finally:
            hooks.release()
            call.release()

    @guarded
    def _join(self, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the callback that reports this call, and the call with that callback."""
        call = _Call(method, args, kwargs)
        users = (c for c in call.callbacks if _reports(c) and c.report.emit is not None)
        hooks = next((c for c in users if c.report.origin is Origin.USER), self.hooks)
        if not hooks.report.active:
            return None
        hooks.prepare(method.__self__, call.callbacks, call.arguments)
        if hooks is self.hooks:
            call.add(hooks)
        return hooks, call


class _Hooks(Hooks):
    """Reports each training that it is a callback of: `callbacks=[BusCallback(bus)]`.

    It should be the last callback. Exceptions are recorded only if the model is attached, too.
    """

    model: Any
    params: Any
    _training: Training | None = None
    _callbacks: Sequence[Any] = ()
    _arguments: Mapping[str, Any] = {}

    def __init__(self, bus: Any = None, *, origin: Origin = Origin.USER) -> None:
        self._facts = Facts()
        super().__init__(bus, origin=origin)

    def reset(self) -> None:
        self.release()
        self._training = None

    def release(self) -> None:
        """Unwrap what was wrapped for one training."""
        if self._training is not None:
            self._training.release()

    def prepare(self, model: Any, callbacks: Sequence[Any], arguments: Mapping[str, Any]) -> None:
        """Prepare for a call of `fit`."""
        self.reset()
        self.set_model(model)
        self._arguments = {k: v for k, v in arguments.items() if isinstance(v, int | float | str)}
        self._callbacks = callbacks

    def set_model(self, model: Any) -> None:
        super().set_model(model)  # type: ignore[misc]
        # Keras does not pass the other callbacks; the list that calls this method has them.
        caller = sys._getframe(1).f_locals.get("self")
        self._callbacks = getattr(caller, "callbacks", ())

    @guarded
    def on_train_begin(self, logs: Any = None) -> None:
        self.reset()  # an earlier `fit`, of a model that is not attached, may have failed

    @guarded
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        # Not earlier: BackupAndRestore sets the first epoch when training begins.
        self._start(epoch).start_epoch(epoch)

    def _start(self, epoch: int) -> Training:
        if self._training is None:
            given = {**self._arguments, **(self.params or {})}
            self._training = Training(self.report, self._facts, self.model, self._callbacks, given)
            self._training.start(epoch)
        return self._training

    @property
    def on_train_batch_end(self) -> Any:
        # If all callbacks have the method of the base class, Keras skips the values of batches.
        emit = self.report.emit
        is_requested = emit is not None and emit.every("train") is not None
        return self._end_batch if is_requested else super().on_train_batch_end  # type: ignore[misc]

    @guarded
    def _end_batch(self, batch: int, logs: Any = None) -> None:
        if self._training is not None:
            self._training.end_batch(logs or {})

    @guarded
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._training is not None:
            self._training.end_epoch(epoch, logs or {})

    @guarded
    def on_train_end(self, logs: Any = None) -> None:
        if self._training is not None:
            self._training.end()

    @guarded
    def fail(self, error: BaseException) -> None:
        """Record the exception that left `fit`, even before its first epoch."""
        best = None if self._training is None else self._training.best
        self._start(self._arguments.get("initial_epoch", 0))
        self.report.fail(error, best=best)


def _reports(callback: object) -> bool:
    return isinstance(callback, _Hooks) and callback.report.active


def _around(model: Any) -> Any:
    """Return our active wrapper of a model's `fit`, None if there is none."""
    around = around_of(model, "fit")
    return around if isinstance(around, _Fit) and around.hooks.report.active else None


_callback_class = late_class(__name__, "BusCallback", _Hooks, "keras:callbacks.Callback")
__getattr__ = lazy(__name__, BusCallback=_callback_class)


class _Call:
    """One call of a model's `fit`, to which a callback can be added.

    Args:
        fit: the method, Keras' own or a subclass's.
        args: its arguments.
        kwargs: likewise.

    Raises:
        AttachError: the method takes no callbacks.
    """

    def __init__(
        self, fit: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.args = args
        self.kwargs = kwargs
        self._fit = _taking_callbacks(fit)
        names = signature(self._fit).parameters
        self.arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        self.callbacks = _flat(self.arguments.get("callbacks"))
        self.release: Callable[[], object] = lambda: None
        """Restores what the user passed."""

    def add(self, callback: Any) -> None:
        """Add a callback as the last one."""
        import keras

        given = argument(self._fit, "callbacks", self.args, self.kwargs)
        if isinstance(given, keras.callbacks.CallbackList):
            callback.set_params(given.params)
            given.callbacks.append(callback)
            self.release = partial(given.callbacks.remove, callback)
        else:
            callbacks = [*self.callbacks, callback]
            self.args, self.kwargs = with_argument(
                self._fit, "callbacks", callbacks, self.args, self.kwargs
            )


def _flat(callbacks: Any) -> list[Any]:
    """Return the callbacks that are passed to `fit` as a list."""
    import keras

    if isinstance(callbacks, keras.callbacks.CallbackList):
        return callbacks.callbacks  # type: ignore[no-any-return]
    return keras.tree.flatten(callbacks) if callbacks else []


def _taking_callbacks(fit: Callable[..., Any]) -> Callable[..., Any]:
    """Return `fit`, or Keras' own if `fit` passes its arguments on to that."""
    import keras

    parameters = signature(fit).parameters
    if "callbacks" in parameters:
        return fit
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise AttachError("this `fit` takes no `callbacks`: put a BusCallback into those it uses")
    return partial(keras.Model.fit, None)
