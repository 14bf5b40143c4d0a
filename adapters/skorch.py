"""Turns the training of a skorch net into events: each `fit` or `partial_fit` is a run.

The metrics of an epoch are recorded once its row of `net.history` is complete, which is when the
next epoch starts or training ends: so they include the values of later callbacks. Ctrl-C, which
skorch catches, ends the run as stopped; its `EarlyStopping`, which raises the same, as finished.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from msgspec.structs import replace

from trainbus.distributed import current_rank
from trainbus.events import Best, CheckpointSaved, Resumed, RunStarted
from trainbus.interfaces import Detach, Emit
from trainbus.toolkit.adapters import (
    Hooks,
    Origin,
    best_of,
    described,
    early_stop,
    guarded,
    late_class,
    lazy,
    patch,
    version,
    wrap,
    wrong_target,
)

TESTED_VERSIONS = "1.4.0"
REQUIRED_NAMES = (
    "skorch.callbacks:Callback",
    "skorch.callbacks:Checkpoint._format_target",
    "skorch.callbacks:EarlyStopping.on_epoch_end",
    *(f"skorch.callbacks:{name}" for name in ("LoadInitState", "TrainEndCheckpoint")),
    *(f"skorch.net:NeuralNet.{name}" for name in ("fit_loop", "get_params", "partial_fit")),
)


def attach(target: Any, emit: Emit) -> Detach:
    """Report the trainings of a net.

    Args:
        target: a net, initialized or not, or a `BusCallback` of this module.
        emit: where the events go.

    Returns:
        A function that removes the callback from the net.

    Raises:
        AttachError: the object is neither.
    """
    from skorch import NeuralNet

    if isinstance(target, _Hooks):
        return target.report.connect(emit)
    if not isinstance(target, NeuralNet):
        advice = "attach the NeuralNet that you call `fit()` on"
        raise wrong_target(target, "a skorch net or a BusCallback", advice)
    hooks: _Hooks = _bus_callback()(origin=Origin.ATTACH)
    before = target.callbacks
    target.callbacks = [*(before or ()), hooks]
    if target.initialized_:
        target.callbacks_ = [*target.callbacks_, ("trainbus", hooks)]

    def release() -> None:
        if any(each is hooks for each in target.callbacks or ()):
            left = [each for each in target.callbacks if each is not hooks]
            target.callbacks = before if left == list(before or ()) else left
        if target.initialized_:
            target.callbacks_ = [pair for pair in target.callbacks_ if pair[1] is not hooks]

    return hooks.report.connect(emit, release)


def hook(module: ModuleType, attach: Callable[[object], object]) -> None:
    """Attach every net when it trains, unless it has a callback of ours.

    Args:
        module: `skorch.net`.
        attach: called with the net.
    """

    def partial_fit(function: Any, net: Any, /, *args: Any, **kwargs: Any) -> Any:
        given = [each[1] if type(each) in (tuple, list) else each for each in net.callbacks or ()]
        if not any(isinstance(callback, _Hooks) for callback in given):
            attach(net)
        return function(net, *args, **kwargs)

    patch(module.NeuralNet, "partial_fit", partial_fit)


class _Hooks(Hooks):
    """A callback of skorch: `NeuralNet(…, callbacks=[("bus", BusCallback(bus))])`.

    Args:
        bus: where the events go.
    """

    _source: _Hooks | None = None
    """The callback that this one was copied from."""
    _unwrap: Detach | None = None

    def reset(self) -> None:
        if self._unwrap is not None:
            self._unwrap()
        self._unwrap = None
        self._row: dict[str, Any] = {}
        self._newest: dict[int, CheckpointSaved] = {}
        """`id` of a `Checkpoint` → the file that it overwrites with the next one."""
        self._is_over = False
        self._interrupt: BaseException | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hooks:
        """Report a copied net's trainings as runs of their own, until the original is detached."""
        copied = type(self)(origin=self.report.origin)
        copied.report.emit = self.report.emit
        copied._source = self._source or self
        return copied

    def __sklearn_clone__(self) -> _Hooks:
        return self.__deepcopy__({})

    def _get_param_names(self) -> list[str]:
        return []

    @guarded
    def on_train_begin(self, net: Any, *args: Any, **kwargs: Any) -> None:
        # skorch does not pass exceptions to callbacks, and others may load a checkpoint first.
        self.reset()  # a callback may have raised before the loop
        self._unwrap = wrap(net, "fit_loop", partial(self._train, net))

    def _train(self, net: Any, method: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Wrap one call of `net.fit_loop`."""
        self.reset()
        self._start(net)
        try:
            return method(*args, **kwargs)
        except KeyboardInterrupt as error:
            self._interrupt = error  # skorch catches it, and calls `on_train_end`
            raise
        except BaseException as error:
            self._end_epoch(net)
            self.report.fail(error, rank=_rank(net))
            raise

    @guarded
    def _start(self, net: Any) -> None:
        if self._source is not None:
            self.report.active = self._source.report.active
        self._step = sum(int(row.get("train_batch_count", 0)) for row in net.history)
        callbacks = _callbacks_of(net)
        others = (each.report for each in callbacks if isinstance(each, _Hooks))
        if _rank(net) or self.report.yields_to(others):
            return
        self.report.start(
            _started(net, self._step), loggers=callbacks, remedy="leave it out of the callbacks"
        )
        self._describe(net)

    @guarded
    def _describe(self, net: Any) -> None:
        self.report.record(described(net.module_.parameters()))

    @guarded
    def on_epoch_begin(self, net: Any, *args: Any, **kwargs: Any) -> None:
        self._end_epoch(net)
        self._row, self._is_over = net.history[-1], False
        self._rates = _rates(net)
        self.report.start_epoch(self._row["epoch"] - 1)

    @guarded
    def on_batch_end(
        self, net: Any, batch: Any = None, training: Any = None, **kwargs: Any
    ) -> None:
        if not training:
            return
        self._step += 1
        if self.report.wants_step(self._step):
            loss = self._row["batches"][-1]["train_loss"]
            values, epoch = {"batch/train_loss": loss}, self.report.epoch
            self.report.metrics(values, "train", epoch=epoch, step=self._step, on_request=True)

    @guarded
    def on_epoch_end(self, net: Any, *args: Any, **kwargs: Any) -> None:
        self._is_over = True

    @guarded
    def on_train_end(self, net: Any, *args: Any, **kwargs: Any) -> None:
        interrupt, self._interrupt = self._interrupt, None
        why = _why_stopped(net) if interrupt is not None else None
        self._is_over = self._is_over or why is not None
        self._end_epoch(net)
        self._record_final_checkpoints(net)
        if interrupt is None or why is not None:
            self.report.end(why)
        else:
            self.report.fail(interrupt, rank=_rank(net))

    @guarded
    def _end_epoch(self, net: Any) -> None:
        """Record the epoch that ended, if there is one, from its row of the history."""
        epoch = self.report.epoch
        if epoch is None or not self._is_over:
            return
        self._is_over = False
        values = _values(self._row)
        if "event_lr" not in values:
            values |= self._rates
        for phase, found in _by_phase(net, values).items():
            self.report.metrics(found, phase, epoch=epoch)
        self.report.best = _best(net, self._row, epoch) or self.report.best
        self._record_checkpoints(net, epoch)
        self.report.end_epoch()

    def _record_checkpoints(self, net: Any, epoch: int) -> None:
        """Record the files that were saved for an epoch, by the flags in its row of the history."""
        for checkpoint in _checkpoints_of(net):
            monitor = checkpoint.monitor
            flag = monitor if checkpoint.event_name is None else checkpoint.event_name
            if flag is not None and not (isinstance(flag, str) and self._row.get(flag)):
                continue
            path, pattern = _file(net, checkpoint, epoch)
            if path is None:
                continue
            is_kept = "{last_epoch" in pattern
            kind: Literal["best", "last", "periodic"] = "periodic" if is_kept else "last"
            monitored = str(monitor).removesuffix("_best")
            saved = CheckpointSaved(
                path=path,
                kind=kind if monitor is None else "best",
                epoch=epoch,
                step=self._step,
                metrics={n: v for n, v in _values(self._row).items() if n == monitored},
                final=is_kept,
            )
            self.report.record(saved)
            if not is_kept:
                self._newest[id(checkpoint)] = saved

    @guarded
    def _record_final_checkpoints(self, net: Any) -> None:
        """Record the files that are not overwritten any more, also of an interrupted training."""
        for saved in self._newest.values():
            self.report.record(replace(saved, final=True))
        callbacks = _callbacks_of(net)
        for callback in callbacks[: callbacks.index(self)]:  # later ones have not saved yet
            if hasattr(callback, "checkpoint_") and net.history:
                path, _ = _file(net, callback.checkpoint_, -1)
                if path is not None:
                    epoch = len(net.history) - 1
                    event = CheckpointSaved(path=path, kind="last", epoch=epoch, step=self._step)
                    self.report.record(replace(event, final=True))


_bus_callback = late_class(__name__, "BusCallback", _Hooks, "skorch.callbacks:Callback")
__getattr__ = lazy(__name__, BusCallback=_bus_callback)


def _callbacks_of(net: Any) -> list[Any]:
    """Return the callbacks of an initialized net, in the order in which they are called."""
    return [callback for _, callback in net.callbacks_]


def _started(net: Any, step: int) -> RunStarted:
    """Return the start of a net's training.

    Args:
        net: is initialized.
        step: number of batches in its history.
    """
    accelerator = getattr(net, "accelerator", None)
    folders = (getattr(callback, "dirname", "") for callback in _callbacks_of(net))
    tags = getattr(net, "__sklearn_tags__", None)
    kind = None if tags is None else tags().estimator_type
    return RunStarted(
        params={
            name: _plain(value)
            for name, value in net.get_params().items()
            if name != "callbacks" and not isinstance(value, _Hooks)
        },
        framework="skorch",
        framework_version=version("skorch"),
        save_dir=next((_absolute(folder) for folder in folders if folder), None),
        world_size=int(getattr(accelerator, "num_processes", 1)),
        task=None if kind is None else str(kind),
        resumed=_resumed(net, step),
        goals={
            name: "min" if callback.lower_is_better else "max"
            for name, callback in _scorings(net)
            if callback.lower_is_better is not None
        },
    )


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float | Mapping | list | tuple):
        return value
    name = getattr(value, "__qualname__", None)  # a class or a function
    return name or re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _resumed(net: Any, step: int) -> Resumed | None:
    """Return where a net with a history continues, and the folder of the files it loads."""
    if not net.history:
        return None
    loaded = [cb.checkpoint for cb in _callbacks_of(net) if type(cb).__name__ == "LoadInitState"]
    folder = next((_absolute(cb.dirname) for cb in loaded if cb.dirname), None)
    return Resumed(epoch=len(net.history) - 1, step=step, save_dir=folder)


def _rates(net: Any) -> dict[str, Any]:
    """Return the learning rate of each group of parameters."""
    groups: Any = getattr(getattr(net, "optimizer_", None), "param_groups", ())
    if len(groups) == 1:
        return {"lr": groups[0]["lr"]}
    return {f"lr/{index}": group["lr"] for index, group in enumerate(groups)}


def _why_stopped(net: Any) -> str | None:
    """Return the reason of skorch's early stopping, None if something else stopped the training."""
    from skorch.callbacks import EarlyStopping

    for callback in _callbacks_of(net):
        if isinstance(callback, EarlyStopping) and callback.misses_ == callback.patience:
            return early_stop(callback.monitor, callback.patience)
    return None


def _rank(net: Any) -> int:
    """Return the rank of this process: the accelerator's, else that of torch or a launcher."""
    found = getattr(getattr(net, "accelerator", None), "process_index", None)
    return current_rank() if found is None else int(found)


def _absolute(path: str) -> str:
    return str(Path(path).absolute())  # links are not resolved


def _scorings(net: Any) -> Iterator[tuple[str, Any]]:
    """Yield the callbacks that write a score into the history, with its name."""
    for callback in _callbacks_of(net):
        name = getattr(callback, "name_", getattr(callback, "name", None))
        is_scoring = hasattr(callback, "lower_is_better") and hasattr(callback, "on_train")
        if isinstance(name, str) and is_scoring:
            yield name, callback


_NO_METRICS = re.compile(r"epoch|batches|.*_batch_count|.*_best")


def _values(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the measured values in a row of the history."""
    return {
        name: value
        for name, value in row.items()
        if not _NO_METRICS.fullmatch(name) and not isinstance(value, bool | np.bool_)
    }


def _by_phase(net: Any, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return values by the phase that the net's scoring callbacks give, else by their names."""
    phases = {name: "train" if cb.on_train else "validation" for name, cb in _scorings(net)}
    found: dict[str, dict[str, Any]] = {"train": {}, "validation": {}}
    for name, value in values.items():
        guess = "validation" if name.startswith("valid") else "train"
        found[phases.get(name, guess)][name] = value
    return found


def _best(net: Any, row: Mapping[str, Any], epoch: int) -> Best | None:
    """Return the score of an epoch if it is the best so far that a checkpoint monitors."""
    flags = [c.monitor for c in _checkpoints_of(net) if str(c.monitor).endswith("_best")]
    flag = next(iter(flags), "valid_loss_best")
    metric = flag.removesuffix("_best")
    return best_of(metric, row.get(metric), epoch) if row.get(flag) else None


def _checkpoints_of(net: Any) -> list[Any]:
    from skorch.callbacks import Checkpoint

    return [callback for callback in _callbacks_of(net) if isinstance(callback, Checkpoint)]


def _file(net: Any, checkpoint: Any, epoch: int) -> tuple[str | None, str]:
    """Return the main file of a checkpoint, if it exists, and the pattern of its name."""
    for pattern in (checkpoint.f_params, checkpoint.f_pickle):
        if isinstance(pattern, str):
            path = checkpoint._format_target(net, pattern, epoch)
            if Path(path).exists():
                return _absolute(path), pattern
    return None, ""
