"""Turns Keras 3's `fit` into events: one run a call, with its epochs, metrics and checkpoints.

Attaches to a `keras.Model`, or is a `BusCallback(bus)` among the callbacks of `fit`. Epoch values
are exactly those of Keras' `History`; values of a batch are Keras' running means over the epoch.
Checkpoints are what `save` and `save_weights` of the model write during `fit`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

from trainbus.distributed import current_rank
from trainbus.errors import AttachError, SinkError
from trainbus.interfaces import Detach, Emit
from trainbus.toolkit.adapters import Reporter, around_of, guarded, late_class, patch, wrap

from ._keras_call import Call, flat
from ._keras_facts import Facts
from ._keras_training import Training

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
    """Have every `fit` of a model, or those that a `BusCallback` is given to, emit events.

    Args:
        target: a `keras.Model`, or a `BusCallback` of this module.
        emit: where the events go.

    Returns:
        A function that leaves the target as it was.

    Raises:
        AttachError: the object is neither.
    """
    import keras

    if isinstance(target, _Hooks):
        target.is_users = True
        return target.report.connect(emit, target.detach)
    if not isinstance(target, keras.Model):
        raise AttachError(
            f"expected a keras.Model or a BusCallback, found {type(target).__qualname__}; "
            "attach the model that you call `fit()` on"
        )
    hooks = _callback_class()()
    hooks.report.connect(emit)
    unwrap = wrap(target, "fit", _Fit(hooks))

    def detach() -> None:
        hooks.detach()
        unwrap()

    return detach


def hook(module: Any, attach: Callable[[object], object]) -> None:
    """Have every model attached when its `fit` is called, unless a callback of ours hears it.

    Args:
        module: `keras`.
        attach: called with the model.
    """

    def fit(function: Any, model: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = MethodType(function, model)
        try:
            given = inspect.signature(method).bind(*args, **kwargs).arguments
            is_heard = any(_listens(callback) for callback in flat(given.get("callbacks")))
        except Exception:  # no call that will train: Keras says what is wrong with it
            is_heard = True
        if not is_heard and _around(model) is None:
            attach(model)
        # Not through `model.fit`: a subclass may be on its way here from one of its own.
        around = None if is_heard else _around(model)
        return around(method, *args, **kwargs) if around else method(*args, **kwargs)

    patch(module.Model, "fit", fit)


class _Fit:
    """Stands around a model's `fit`: gives it our callback as the last, and sees what leaves it."""

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
        """Return the callback that hears this call, and the call with it."""
        call = Call(method, args, kwargs)
        hooks = next((c for c in call.callbacks if _listens(c) and c.is_users), self.hooks)
        if not hooks.report.active:
            return None
        hooks.prepare(method.__self__, call.callbacks, call.arguments)
        if hooks is self.hooks:
            call.add(hooks)
        return hooks, call


class _Hooks:
    """Reports to a bus each training that it is a callback of: `callbacks=[BusCallback(bus)]`.

    It is best the last of them. An exception is told at once only where the model is attached, too.
    """

    model: Any
    params: Any

    def __init__(self, bus: Any = None) -> None:
        super().__init__()
        self.report = Reporter()
        self.is_users = False  # but made for a model that is attached
        self._callbacks: Sequence[Any] = ()
        self._arguments: dict[str, Any] = {}
        self._facts = Facts()
        self._training: Training | None = None
        if bus is not None:
            bus.attach(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the training out: tuners copy their callbacks for each trial."""
        return {**vars(self), "_model": None, "_callbacks": (), "_training": None}

    def release(self) -> None:
        """Take away what was hung in for one training."""
        if self._training is not None:
            self._training.release()

    def detach(self) -> None:
        """Fall silent."""
        self.report.active = False
        self.release()

    def prepare(self, model: Any, callbacks: Sequence[Any], arguments: Mapping[str, Any]) -> None:
        """Get ready for a call of `fit`."""
        self._forget()
        self.set_model(model)
        self._arguments = {k: v for k, v in arguments.items() if isinstance(v, int | float | str)}
        self._callbacks = callbacks

    def set_model(self, model: Any) -> None:
        super().set_model(model)  # type: ignore[misc]
        # Keras tells a callback nothing of the others; the list that calls this method has them.
        caller = sys._getframe(1).f_locals.get("self")
        self._callbacks = getattr(caller, "callbacks", ())

    @guarded
    def on_train_begin(self, logs: Any = None) -> None:
        self._forget()  # a `fit` before this one, of a model that is not attached

    def _forget(self) -> None:
        self.release()
        self._training = None

    @guarded
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        # Not before: BackupAndRestore finds the first epoch when training begins.
        self._begin(epoch).start_epoch(epoch)

    def _begin(self, epoch: int) -> Training:
        if self._training is None:
            given = {**self._arguments, **(self.params or {})}
            self._training = Training(self.report, self._facts, self.model, self._callbacks, given)
            self._training.begin(epoch)
        return self._training

    @property
    def on_train_batch_end(self) -> Any:
        # Where all have the method of the base class, Keras reads no values between two batches.
        emit = self.report.emit
        is_asked = emit is not None and emit.every("train") is not None
        return self._batch_end if is_asked else super().on_train_batch_end  # type: ignore[misc]

    @guarded
    def _batch_end(self, batch: int, logs: Any = None) -> None:
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
        """Tell what left `fit`, also before its first epoch."""
        best = None if self._training is None else self._training.best
        self._begin(self._arguments.get("initial_epoch", 0))
        self.report.fail(error, rank=current_rank(), best=best)


def _listens(callback: object) -> bool:
    return isinstance(callback, _Hooks) and callback.report.active


def _around(model: Any) -> Any:
    """Return what stands around a model's `fit`, if that is of ours."""
    around = around_of(model, "fit")
    return around if isinstance(around, _Fit) and around.hooks.report.active else None


def _base() -> type:
    import keras

    return keras.callbacks.Callback  # type: ignore[no-any-return]


_callback_class = late_class(__name__, "BusCallback", _Hooks, _base)


def __getattr__(name: str) -> Any:
    if name == "BusCallback":
        return _callback_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
