"""Turns Keras 3's `fit` into events: one run a call, with its epochs, metrics and checkpoints.

Attaches to a `keras.Model`, or is a `BusCallback(bus)` among the callbacks of `fit`. Epoch values
are exactly those of Keras' `History`; values of a batch are Keras' running means over the epoch.
Checkpoints are what `save` and `save_weights` of the model write during `fit`.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Literal

from msgspec.structs import replace

from trainbus.errors import AttachError, SinkError
from trainbus.events import (
    Best,
    CheckpointSaved,
    MetricsLogged,
    ModelDescribed,
    Resumed,
    RunStarted,
)
from trainbus.hooking import Reporter, around_of, guarded, late_class, number, version, wrap
from trainbus.interfaces import Detach, Emit

TESTED = "3.15.1"
_TRAIN_HOOKS = ("train_begin", "epoch_begin", "train_batch_end", "epoch_end", "train_end")
NEEDS = (
    *(f"keras:Model.{name}" for name in ("fit", "save", "save_weights", "count_params")),
    *(f"keras:callbacks.Callback.on_{name}" for name in _TRAIN_HOOKS),
    *(f"keras:callbacks.{kind}.set_model" for kind in ("Callback", "CallbackList")),
    *(f"keras:callbacks.{kind}._save_model" for kind in ("BackupAndRestore", "ModelCheckpoint")),
    *(f"keras:callbacks.{kind}" for kind in ("EarlyStopping", "TerminateOnNaN")),
    "keras:optimizers.Optimizer.iterations",
    "keras:tree.flatten",
)

if TYPE_CHECKING:
    BusCallback: Any


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
        target.report.emit, target.report.active, target.is_users = emit, True, True
        return target.detach
    if not isinstance(target, keras.Model):
        raise AttachError(
            f"expected a keras.Model or a BusCallback, found {type(target).__qualname__}; "
            "attach the model that you call `fit()` on"
        )
    hooks = _callback_class()()
    hooks.report.emit = emit
    unwrap = wrap(target, "fit", _Fit(target, hooks))

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
    fit = module.Model.fit
    if getattr(fit, "attaches", False):
        return

    @wraps(fit)
    def fit_attached(self: Any, *args: Any, **kwargs: Any) -> Any:
        method = fit.__get__(self)
        try:
            given = inspect.signature(method).bind(*args, **kwargs).arguments
            is_heard = any(_listens(callback) for callback in _flat(given.get("callbacks")))
        except Exception:  # no call that will train: Keras says what is wrong with it
            is_heard = True
        if not is_heard and _around(self) is None:
            attach(self)
        # Not through `self.fit`: a subclass may be on its way here from one of its own.
        around = None if is_heard else _around(self)
        return around(method, *args, **kwargs) if around else method(*args, **kwargs)

    vars(fit_attached)["attaches"] = True
    module.Model.fit = fit_attached


class _Fit:
    """Stands around a model's `fit`: gives it our callback as the last, and sees what leaves it."""

    def __init__(self, model: Any, hooks: Any) -> None:
        self.model = model
        self.hooks = hooks

    def __call__(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        joined = self._join(method, args, kwargs)
        if joined is None:
            return method(*args, **kwargs)
        hooks, args, kwargs = joined
        try:
            return method(*args, **kwargs)
        except SinkError:
            raise
        except BaseException as error:
            hooks.fail(error)
            raise
        finally:
            hooks.release()

    @guarded
    def _join(self, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the callback that hears this call, and arguments that have Keras call it."""
        import keras

        names = _parameters(method)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        callbacks: Any = given.get("callbacks")
        known = _flat(callbacks)
        theirs = next((c for c in known if _listens(c) and c.is_users), None)
        hooks = theirs or self.hooks
        if not hooks.report.active:
            return None
        hooks.prepare(self.model, known, given)
        if theirs is not None:
            pass
        elif isinstance(callbacks, keras.callbacks.CallbackList):
            hooks.set_params(callbacks.params)
            known.append(hooks)
            hooks.undo.append(partial(known.remove, hooks))
        elif (place := names.index("callbacks")) < len(args):
            args = (*args[:place], [*known, hooks], *args[place + 1 :])
        else:
            kwargs = {**kwargs, "callbacks": [*known, hooks]}
        return hooks, args, kwargs


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
        self.undo: list[Callable[[], object]] = []
        self._callbacks: Sequence[Any] = ()
        self._arguments: dict[str, Any] = {}
        self._reset()
        if bus is not None:
            bus.attach(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the training out: tuners copy their callbacks for each trial."""
        return {**vars(self), "_model": None, "undo": [], "_callbacks": (), "_saver": None}

    def _reset(self) -> None:
        self.release()
        self._has_begun = False
        self._epoch = self._step = 0
        self._loss: float | None = None
        self._saver: Any = None
        self._score: dict[str, float] = {}
        self._saved: dict[str, CheckpointSaved] = {}
        self._best: Best | None = None

    def release(self) -> None:
        """Take away what was hung in for one training."""
        while self.undo:
            self.undo.pop()()

    def detach(self) -> None:
        """Fall silent."""
        self.report.active = False
        self.release()

    def prepare(self, model: Any, callbacks: Sequence[Any], arguments: Mapping[str, Any]) -> None:
        """Get ready for a call of `fit`."""
        self._reset()
        self.set_model(model)
        plain = bool | int | float | str
        self._arguments = {k: v for k, v in arguments.items() if isinstance(v, plain)}
        self._callbacks = callbacks

    def set_model(self, model: Any) -> None:
        super().set_model(model)  # type: ignore[misc]
        # Keras tells a callback nothing of the others; the list that calls this method has them.
        caller = sys._getframe(1).f_locals.get("self")
        self._callbacks = getattr(caller, "callbacks", ())

    @guarded
    def on_train_begin(self, logs: Any = None) -> None:
        if self._has_begun:  # a `fit` before this one, of a model that is not attached
            self._reset()

    @guarded
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        # Not before: BackupAndRestore finds the first epoch when training begins.
        self._begin(epoch)
        self._epoch = epoch
        self.report.start_epoch(epoch)

    @property
    def on_train_batch_end(self) -> Any:
        # Where all have the method of the base class, Keras reads no values between two batches.
        emit = self.report.emit
        is_asked = emit is not None and emit.every("train") is not None
        return self._batch_end if is_asked else super().on_train_batch_end  # type: ignore[misc]

    @guarded
    def _batch_end(self, batch: int, logs: Any = None) -> None:
        # A call stands for many updates, or for none: steps_per_execution, accumulation.
        before, self._step = self._step, self._updates() or 0
        if any(self.report.wants_step(step) for step in range(before + 1, self._step + 1)):
            values = {f"batch_{name}": value for name, value in _numbers(logs).items()}
            self.report.tell(
                MetricsLogged(
                    values=values,
                    phase="train",
                    epoch=self._epoch,
                    step=self._step,
                    on_request=True,
                )
            )

    @guarded
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        values = _numbers(logs)
        self._loss = values.get("loss")
        validation = {k: v for k, v in values.items() if k.startswith("val_")}
        train = {k: v for k, v in values.items() if k not in validation}
        rate = self._rate()
        if rate is not None:  # callbacks that change it have put in the one that was used
            train.setdefault("learning_rate", rate)
        self.report.metrics(train, "train", epoch=epoch)
        self.report.metrics(validation, "validation", epoch=epoch)
        self.report.end_epoch()

    @guarded
    def on_train_end(self, logs: Any = None) -> None:
        for path, event in self._saved.items():
            if event.kind != "periodic" and os.path.exists(path):
                self.report.tell(replace(event, final=True))
        self.report.end(self._why_ended(), self._find_best())
        self.release()

    @guarded
    def fail(self, error: BaseException) -> None:
        """Tell what left `fit`, also before its first epoch."""
        best = self._find_best() if self._has_begun else None
        self._begin(self._arguments.get("initial_epoch", 0))
        self.report.fail(error, rank=_rank_and_size()[0], best=best)

    def _begin(self, epoch: int) -> None:
        if self._has_begun:
            return
        self._has_begun = True
        rank, world_size = _rank_and_size()
        if rank:
            return
        folder, updates = self._save_dir(), self._updates()
        self._step = updates or 0
        self.report.start(
            RunStarted(
                name=self.model.name,
                params=self._params() or {},
                framework="keras",
                framework_version=version("keras"),
                save_dir=folder,
                world_size=world_size,
                resumed=Resumed(epoch=epoch - 1, step=updates, save_dir=folder) if epoch else None,
                goals=self._goals() or {},
            )
        )
        self._describe()
        for callback in self._all("BackupAndRestore", "ModelCheckpoint"):
            self.undo.append(wrap(callback, "_save_model", partial(self._saving, callback)))
        for name in ("save", "save_weights"):
            self.undo.append(wrap(self.model, name, self._saves))

    @guarded
    def _params(self) -> dict[str, Any]:
        optimizer, loss = self.model.optimizer, getattr(self.model, "loss", None)
        config = {} if optimizer is None else optimizer.get_config()
        return {
            **self._arguments,
            **(self.params or {}),
            "loss": getattr(loss, "name", None) or getattr(loss, "__name__", loss),
            "optimizer": {"class_name": type(optimizer).__name__, **config},
        }

    @guarded
    def _goals(self) -> dict[str, Literal["max", "min"]]:
        metrics = [m for each in self.model.metrics for m in getattr(each, "metrics", [each])]
        ways = {m.name: getattr(m, "_direction", None) for m in metrics} | {"loss": "down"}
        goals: dict[str, Literal["max", "min"]] = {}
        for callback in self._all("EarlyStopping", "ModelCheckpoint"):
            way = ways.get(callback.monitor.removeprefix("val_"))
            if callback.mode == "max" or (callback.mode == "auto" and way == "up"):
                goals[callback.monitor] = "max"
            elif callback.mode == "min" or way == "down":
                goals[callback.monitor] = "min"
        return goals

    @guarded
    def _describe(self) -> None:
        self.report.tell(
            ModelDescribed(
                parameters=self.model.count_params(),
                gradients=sum(math.prod(v.shape) for v in self.model.trainable_variables),
                layers=len(self.model.layers),
            )
        )

    def _saving(self, saver: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        self._saver, self._score = saver, _numbers(kwargs.get("logs"))
        try:
            return method(*args, **kwargs)
        finally:
            self._saver, self._score = None, {}

    def _saves(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        self._tell_saved(str(args[0] if args else kwargs["filepath"]))
        return result

    @guarded
    def _tell_saved(self, path: str) -> None:
        saver, path = self._saver, path if "://" in path else os.path.abspath(path)
        kind: Literal["best", "last", "periodic"] = "periodic"
        if getattr(saver, "save_best_only", False):
            kind, best = "best", number(saver.best)
            if best is not None:
                self._best = Best(metric=saver.monitor, value=best, epoch=self._epoch)
        elif saver is not None and "{" not in getattr(saver, "filepath", ""):
            kind = "last"
        step, metrics = self._updates(), self._score
        event = CheckpointSaved(path=path, kind=kind, epoch=self._epoch, step=step, metrics=metrics)
        self._saved[path] = event
        self.report.tell(event)

    @guarded
    def _find_best(self) -> Best | None:
        if self._best is not None:
            return self._best
        for callback in self._all("EarlyStopping"):
            value = number(getattr(callback, "best", None))
            if value is not None:
                return Best(metric=callback.monitor, value=value, epoch=callback.best_epoch)
        return None

    @guarded
    def _why_ended(self) -> str | None:
        if not self.model.stop_training:
            return None
        for callback in self._all("EarlyStopping"):
            if callback.stopped_epoch > 0:
                return f"early stop: no better {callback.monitor} in {callback.patience} epochs"
        if self._loss is not None and not math.isfinite(self._loss) and self._all("TerminateOnNaN"):
            return f"TerminateOnNaN: the loss is {self._loss}"
        return "stopped by a callback" if self._epoch + 1 < self.params.get("epochs", 0) else None

    @guarded
    def _save_dir(self) -> str | None:
        folders: list[str] = [
            str(callback.backup_dir) for callback in self._all("BackupAndRestore")
        ]
        # What stands before the first placeholder has a folder that does not change.
        paths: list[str] = [
            callback.filepath.partition("{")[0] for callback in self._all("ModelCheckpoint")
        ]
        for folder in (*folders, *map(os.path.dirname, paths)):
            if "://" not in folder:
                return os.path.abspath(folder)
        return None

    @guarded
    def _rate(self) -> float | None:
        rate = getattr(self.model.optimizer, "learning_rate", None)
        return None if rate is None else float(rate)

    @guarded
    def _updates(self) -> int | None:
        """Return the optimizer updates done; none where a model trains with other optimizers."""
        iterations = getattr(self.model.optimizer, "iterations", None)
        return None if iterations is None else int(iterations) or None

    def _all(self, *kinds: str) -> list[Any]:
        import keras

        classes = tuple(getattr(keras.callbacks, kind) for kind in kinds)
        return [callback for callback in self._callbacks if isinstance(callback, classes)]


def _listens(callback: object) -> bool:
    return isinstance(callback, _Hooks) and callback.report.active


def _around(model: Any) -> Any:
    """Return what stands around a model's `fit`, if that is of ours."""
    around = around_of(model, "fit")
    return around if isinstance(around, _Fit) and around.hooks.report.active else None


def _flat(callbacks: Any) -> Any:
    """Return the callbacks that `fit` is given, in whatever form it takes them."""
    import keras

    if isinstance(callbacks, keras.callbacks.CallbackList):
        return callbacks.callbacks
    return keras.tree.flatten(callbacks) if callbacks else []


def _parameters(fit: Any) -> list[str]:
    """Return the names of the parameters of a `fit`, the model's own or a subclass's."""
    import keras

    parameters = inspect.signature(fit).parameters
    if "callbacks" in parameters:
        return list(parameters)
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise AttachError("this `fit` takes no `callbacks`: put a BusCallback into those it uses")
    return list(inspect.signature(keras.Model.fit).parameters)[1:]


def _numbers(logs: Any) -> dict[str, float]:
    found = {name: number(value) for name, value in (logs or {}).items()}
    return {name: value for name, value in found.items() if value is not None}


def _rank_and_size() -> tuple[int, int]:
    """Return rank and number of processes, which Keras leaves to torch and its launchers."""
    torch = sys.modules.get("torch.distributed")
    if torch is not None and torch.is_available() and torch.is_initialized():
        return torch.get_rank(), torch.get_world_size()
    ranks = [os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
    rank, local, size = (int(text) if text.isdigit() else None for text in ranks)
    return rank or local or 0, size or 1


def _base() -> type:
    import keras

    return keras.callbacks.Callback  # type: ignore[no-any-return]


_callback_class = late_class(__name__, "BusCallback", _Hooks, _base)


def __getattr__(name: str) -> Any:
    if name == "BusCallback":
        return _callback_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
