"""Turns the training of a skorch net into events, by a callback: each `fit` or `partial_fit` a run.

An epoch is told when its row of `net.history` is complete, which is when the next epoch begins or
training ends: so the values of callbacks that come later in the list are there too. Ctrl-C, which
skorch catches, ends the run as stopped, its `EarlyStopping`, which raises the same, as finished.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np

from trainbus.errors import AttachError
from trainbus.events import Best, CheckpointSaved, ModelDescribed, Resumed, RunStarted
from trainbus.hooking import Reporter, guarded, late_class, number, version
from trainbus.interfaces import Detach, Emit

TESTED = "1.4.0"
NEEDS = (
    "skorch.callbacks:Callback",
    "skorch.callbacks:Checkpoint._format_target",
    "skorch.callbacks:EarlyStopping.on_epoch_end",
    "skorch.callbacks:LoadInitState",
    "skorch.callbacks:TrainEndCheckpoint",
    "skorch.net:NeuralNet.fit_loop",
    "skorch.net:NeuralNet.get_params",
    "skorch.net:NeuralNet.partial_fit",
)

Kind: TypeAlias = Literal["best", "last", "periodic"]

_NO_METRICS = re.compile(r"epoch|batches|.*_batch_count|.*_best")


def attach(target: Any, emit: Emit) -> Detach:
    """Have the trainings of a net emit events.

    Args:
        target: a net, initialized or not, or a `BusCallback` of this module.
        emit: where the events go.

    Returns:
        A function that takes the callback out of the net again.

    Raises:
        AttachError: the object is neither.
    """
    from skorch import NeuralNet

    if isinstance(target, _Hooks):
        target.report.emit, target.report.active = emit, True
        return partial(setattr, target.report, "active", False)
    if not isinstance(target, NeuralNet):
        raise AttachError(
            f"expected a skorch net or a BusCallback, found {type(target).__qualname__}; "
            "attach the NeuralNet that you call `fit()` on"
        )
    if any(hooks.is_the_users and hooks.report.active for hooks in _hooks_of(target)):
        return lambda: None
    hooks = _bus_callback().__new__(_bus_callback())
    hooks.report, hooks.is_the_users = Reporter(emit), False
    before = target.callbacks
    target.callbacks = [*(before or ()), hooks]
    if target.initialized_:
        target.callbacks_ = [*target.callbacks_, ("trainbus", hooks)]

    def detach() -> None:
        hooks.report.active = False
        if any(each is hooks for each in target.callbacks or ()):
            left = [each for each in target.callbacks if each is not hooks]
            target.callbacks = before if left == list(before or ()) else left
        if target.initialized_:
            target.callbacks_ = [pair for pair in target.callbacks_ if pair[1] is not hooks]

    return detach


def hook(module: ModuleType, attach: Callable[[object], object]) -> None:
    """Have every net attached when it trains, unless a callback of ours is in it.

    Args:
        module: `skorch.net`.
        attach: attaches to a net.
    """
    original = module.NeuralNet.partial_fit
    if hasattr(original, "attaches"):
        return

    @wraps(original)
    def partial_fit(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not list(_hooks_of(self)):
            attach(self)
        return original(self, *args, **kwargs)

    vars(partial_fit)["attaches"] = True
    module.NeuralNet.partial_fit = partial_fit


class _Hooks:
    """A callback of skorch: `NeuralNet(…, callbacks=[("bus", BusCallback(bus))])`.

    Args:
        bus: where the events go.
    """

    report: Reporter
    is_the_users = True
    _source: _Hooks | None = None
    _interrupt: BaseException | None = None

    def __init__(self, bus: Any) -> None:
        self.report = Reporter()
        bus.attach(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the training out."""
        return {"report": self.report, "is_the_users": self.is_the_users}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hooks:
        """Report a copied net's trainings as runs of their own, until the original is detached."""
        twin = type(self).__new__(type(self))
        twin.report, twin.is_the_users = Reporter(self.report.emit), self.is_the_users
        twin._source = self._source or self
        return twin

    def __sklearn_clone__(self) -> _Hooks:
        return self.__deepcopy__({})

    def _get_param_names(self) -> list[str]:
        return []

    @guarded
    def on_train_begin(self, net: Any, *args: Any, **kwargs: Any) -> None:
        # skorch tells nothing of exceptions, and other callbacks may load a checkpoint first.
        before = vars(net).get("fit_loop")
        if getattr(before, "func", None) == self._train:  # a callback raised before the loop
            del net.fit_loop
            before = None
        net.fit_loop = partial(self._train, net, before)

    def _train(self, net: Any, before: Any, *args: Any, **kwargs: Any) -> Any:
        """Stand in for one call of `net.fit_loop`, which is put back first."""
        del net.fit_loop
        if before is not None:
            net.fit_loop = before
        self._row: dict[str, Any] = {}
        self._best: Best | None = None
        self._saved: dict[int, CheckpointSaved] = {}
        self._is_over, self._interrupt = False, None
        self._start(net)
        try:
            return net.fit_loop(*args, **kwargs)
        except KeyboardInterrupt as error:
            self._interrupt = error  # skorch catches it, and calls `on_train_end`
            raise
        except BaseException as error:
            self._end_epoch(net)
            self.report.fail(error, rank=_rank(net), best=self._best)
            raise

    @guarded
    def _start(self, net: Any) -> None:
        if self._source is not None:
            self.report.active = self._source.report.active
        self._step = sum(int(row.get("train_batch_count", 0)) for row in net.history)
        if _rank(net):
            return
        folders = [cb.dirname for cb in _others(net) if getattr(cb, "dirname", "")]
        loaded = [cb.checkpoint for cb in _others(net) if type(cb).__name__ == "LoadInitState"]
        resumed = None
        if net.history:
            resumed = Resumed(
                epoch=len(net.history) - 1,
                step=self._step,
                save_dir=next((_absolute(cb.dirname) for cb in loaded if cb.dirname), None),
            )
        accelerator = getattr(net, "accelerator", None)
        self.report.start(
            RunStarted(
                params=_params(net),
                framework="skorch",
                framework_version=version("skorch"),
                save_dir=_absolute(folders[0]) if folders else None,
                world_size=int(getattr(accelerator, "num_processes", 1)),
                task=_task(net),
                resumed=resumed,
                goals={
                    name: "min" if cb.lower_is_better else "max"
                    for name, cb in _scorings(net)
                    if cb.lower_is_better is not None
                },
            )
        )
        self._describe(net)

    @guarded
    def _describe(self, net: Any) -> None:
        parameters = list(net.module_.parameters())
        self.report.tell(
            ModelDescribed(
                parameters=sum(p.numel() for p in parameters),
                gradients=sum(p.numel() for p in parameters if p.requires_grad),
            )
        )

    @guarded
    def on_epoch_begin(self, net: Any, *args: Any, **kwargs: Any) -> None:
        self._end_epoch(net)
        self._row, self._is_over = net.history[-1], False
        self._lr = _rates(net)
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
            values = {"batch/train_loss": loss}
            self.report.metrics(
                values, "train", epoch=self.report.epoch, step=self._step, on_request=True
            )

    @guarded
    def on_epoch_end(self, net: Any, *args: Any, **kwargs: Any) -> None:
        self._is_over = True

    @guarded
    def on_train_end(self, net: Any, *args: Any, **kwargs: Any) -> None:
        interrupt, self._interrupt = self._interrupt, None
        why = _why_stopped(net) if interrupt is not None else None
        self._is_over = self._is_over or why is not None
        self._end_epoch(net)
        self._tell_final_checkpoints(net)
        if interrupt is None or why is not None:
            self.report.end(why, self._best)
        else:
            self.report.fail(interrupt, rank=_rank(net), best=self._best)

    @guarded
    def _end_epoch(self, net: Any) -> None:
        """Tell of the epoch that is over, if one is, from its row of the history."""
        epoch = self.report.epoch
        if epoch is None or not self._is_over:
            return
        self._is_over = False
        values = _values(self._row)
        if "event_lr" not in values:
            values |= self._lr
        phases = {name: "train" if cb.on_train else "validation" for name, cb in _scorings(net)}
        by_phase: dict[str, dict[str, float]] = {"train": {}, "validation": {}}
        for name, value in values.items():
            guess = "validation" if name.startswith("valid") else "train"
            by_phase[phases.get(name, guess)][name] = value
        for phase, found in by_phase.items():
            self.report.metrics(found, phase, epoch=epoch)
        self._note_best(net, epoch)
        for checkpoint in _checkpoints(net):
            self._tell_checkpoint(net, checkpoint, epoch)
        self.report.end_epoch()

    def _note_best(self, net: Any, epoch: int) -> None:
        flags = [c.monitor for c in _checkpoints(net) if str(c.monitor).endswith("_best")]
        flag = next(iter(flags), "valid_loss_best")
        value = number(self._row.get(flag.removesuffix("_best")))
        if self._row.get(flag) and value is not None:
            self._best = Best(metric=flag.removesuffix("_best"), value=value, epoch=epoch)

    def _tell_checkpoint(self, net: Any, checkpoint: Any, epoch: int) -> None:
        monitor = checkpoint.monitor
        flag = monitor if checkpoint.event_name is None else checkpoint.event_name
        if flag is not None and not (isinstance(flag, str) and self._row.get(flag)):
            return
        path, pattern = _path(net, checkpoint, epoch)
        if path is None:
            return
        is_kept = "{last_epoch" in pattern
        monitored = str(monitor).removesuffix("_best")
        kind: Kind = "best" if monitor is not None else "periodic" if is_kept else "last"
        event = CheckpointSaved(
            path=path,
            kind=kind,
            epoch=epoch,
            step=self._step,
            metrics={n: v for n, v in _values(self._row).items() if n == monitored},
            final=is_kept,
        )
        self.report.tell(event)
        if not is_kept:
            self._saved[id(checkpoint)] = event

    @guarded
    def _tell_final_checkpoints(self, net: Any) -> None:
        """Tell which files are written no more, and of those that are written at the end."""
        for event in self._saved.values():
            self.report.tell(msgspec.structs.replace(event, final=True))
        before = [cb for _, cb in net.callbacks_]
        for cb in before[: before.index(self)]:  # those that come later have not saved yet
            if hasattr(cb, "checkpoint_") and net.history:
                path, _ = _path(net, cb.checkpoint_, -1)
                if path is not None:
                    epoch = len(net.history) - 1
                    self.report.tell(
                        CheckpointSaved(
                            path=path, kind="last", epoch=epoch, step=self._step, final=True
                        )
                    )


def _base() -> type:
    from skorch.callbacks import Callback

    return Callback  # type: ignore[no-any-return]


_bus_callback = late_class(__name__, "BusCallback", _Hooks, _base)


def __getattr__(name: str) -> Any:
    if name == "BusCallback":
        return _bus_callback()
    raise AttributeError(name)


def _hooks_of(net: Any) -> Iterator[_Hooks]:
    """Yield the callbacks of this adapter that a net was given."""
    for item in net.callbacks or ():
        callback = item[1] if type(item) in (tuple, list) else item
        if isinstance(callback, _Hooks):
            yield callback


def _others(net: Any) -> list[Any]:
    return [cb for _, cb in net.callbacks_ if not isinstance(cb, _Hooks)]


def _checkpoints(net: Any) -> list[Any]:
    from skorch.callbacks import Checkpoint

    return [cb for cb in _others(net) if isinstance(cb, Checkpoint)]


def _scorings(net: Any) -> Iterator[tuple[str, Any]]:
    """Yield the callbacks that write a score into the history, by its name there."""
    for cb in _others(net):
        name = getattr(cb, "name_", getattr(cb, "name", None))
        if isinstance(name, str) and hasattr(cb, "lower_is_better") and hasattr(cb, "on_train"):
            yield name, cb


def _values(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers in a row of the history that measure something."""
    found = {
        name: number(value)
        for name, value in row.items()
        if not _NO_METRICS.fullmatch(name) and not isinstance(value, bool | np.bool_)
    }
    return {name: value for name, value in found.items() if value is not None}


def _rates(net: Any) -> dict[str, Any]:
    groups: Any = getattr(getattr(net, "optimizer_", None), "param_groups", ())
    if len(groups) == 1:
        return {"lr": groups[0]["lr"]}
    return {f"lr/{index}": group["lr"] for index, group in enumerate(groups)}


def _path(net: Any, checkpoint: Any, epoch: int) -> tuple[str | None, str]:
    """Return the main file of a checkpoint, if it is there, and the pattern of its name."""
    for pattern in (checkpoint.f_params, checkpoint.f_pickle):
        if isinstance(pattern, str):
            path = checkpoint._format_target(net, pattern, epoch)
            if Path(path).exists():
                return _absolute(path), pattern
    return None, ""


def _why_stopped(net: Any) -> str | None:
    """Return what stopped a training, if it was skorch's own early stopping."""
    from skorch.callbacks import EarlyStopping

    for cb in _others(net):
        if isinstance(cb, EarlyStopping) and cb.misses_ == cb.patience:
            return f"early stop: no better {cb.monitor} in {cb.patience} epochs"
    return None


def _task(net: Any) -> str | None:
    tags = getattr(net, "__sklearn_tags__", None)
    kind = None if tags is None else tags().estimator_type
    return None if kind is None else str(kind)


def _params(net: Any) -> dict[str, Any]:
    found = net.get_params().items()
    return {k: _plain(v) for k, v in found if k != "callbacks" and not isinstance(v, _Hooks)}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float | Mapping | list | tuple):
        return value
    name = getattr(value, "__qualname__", None)  # a class or a function
    return name or re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _absolute(path: str) -> str:
    return str(Path(path).absolute())


def _rank(net: Any) -> int:
    """Return the rank of this process: its accelerator's, or what a launcher gave it."""
    found = getattr(getattr(net, "accelerator", None), "process_index", None)
    rank = os.environ.get("RANK", "0") if found is None else str(found)
    return int(rank) if rank.isdigit() else 0
