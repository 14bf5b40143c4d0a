"""Turns the training of a skorch net into events, by a callback: each `fit` or `partial_fit` a run.

An epoch is told when its row of `net.history` is complete, which is when the next epoch begins or
training ends: so the values of callbacks that come later in the list are there too. Ctrl-C, which
skorch catches, ends the run as stopped, its `EarlyStopping`, which raises the same, as finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

from trainbus.errors import AttachError
from trainbus.events import Best
from trainbus.interfaces import Detach, Emit
from trainbus.toolkit.adapters import Reporter, described, guarded, late_class, patch, wrap

from . import _skorch_facts as facts
from . import _skorch_history as history
from ._skorch_checkpoints import Checkpoints, best

TESTED_VERSIONS = "1.4.0"
REQUIRED_NAMES = (
    "skorch.callbacks:Callback",
    "skorch.callbacks:Checkpoint._format_target",
    "skorch.callbacks:EarlyStopping.on_epoch_end",
    *(f"skorch.callbacks:{name}" for name in ("LoadInitState", "TrainEndCheckpoint")),
    *(f"skorch.net:NeuralNet.{name}" for name in ("fit_loop", "get_params", "partial_fit")),
)


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
        return target.report.connect(emit)
    if not isinstance(target, NeuralNet):
        raise AttachError(
            f"expected a skorch net or a BusCallback, found {type(target).__qualname__}; "
            "attach the NeuralNet that you call `fit()` on"
        )
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

    def partial_fit(function: Any, net: Any, /, *args: Any, **kwargs: Any) -> Any:
        if not list(_hooks_of(net)):
            attach(net)
        return function(net, *args, **kwargs)

    patch(module.NeuralNet, "partial_fit", partial_fit)


class _Hooks:
    """A callback of skorch: `NeuralNet(…, callbacks=[("bus", BusCallback(bus))])`.

    Args:
        bus: where the events go.
    """

    report: Reporter
    is_the_users = True
    _source: _Hooks | None = None
    _unwrap: Detach | None = None
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
        if self._unwrap is not None:  # a callback raised before the loop
            self._unwrap()
        self._unwrap = wrap(net, "fit_loop", partial(self._train, net))

    def _train(self, net: Any, method: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Stand around one call of `net.fit_loop`."""
        if self._unwrap is not None:
            self._unwrap()
        self._row: dict[str, Any] = {}
        self._best: Best | None = None
        self._checkpoints = Checkpoints()
        self._is_over, self._interrupt = False, None
        self._start(net)
        try:
            return method(*args, **kwargs)
        except KeyboardInterrupt as error:
            self._interrupt = error  # skorch catches it, and calls `on_train_end`
            raise
        except BaseException as error:
            self._end_epoch(net)
            self.report.fail(error, rank=facts.rank(net), best=self._best)
            raise

    @guarded
    def _start(self, net: Any) -> None:
        if self._source is not None:
            self.report.active = self._source.report.active
        self._step = sum(int(row.get("train_batch_count", 0)) for row in net.history)
        theirs = (c for c in facts.callbacks_of(net) if isinstance(c, _Hooks) and c.is_the_users)
        is_heard = not self.is_the_users and any(each.report.active for each in theirs)
        if facts.rank(net) or is_heard:
            return
        self.report.start(
            facts.started(net, self._step, without=_Hooks),
            loggers=facts.callbacks_of(net),
            remedy="leave it out of the callbacks",
        )
        self._describe(net)

    @guarded
    def _describe(self, net: Any) -> None:
        self.report.tell(described(net.module_.parameters()))

    @guarded
    def on_epoch_begin(self, net: Any, *args: Any, **kwargs: Any) -> None:
        self._end_epoch(net)
        self._row, self._is_over = net.history[-1], False
        self._rates = facts.rates(net)
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
        why = facts.why_stopped(net) if interrupt is not None else None
        self._is_over = self._is_over or why is not None
        self._end_epoch(net)
        self._tell_final_checkpoints(net)
        if interrupt is None or why is not None:
            self.report.end(why, self._best)
        else:
            self.report.fail(interrupt, rank=facts.rank(net), best=self._best)

    @guarded
    def _end_epoch(self, net: Any) -> None:
        """Tell of the epoch that is over, if one is, from its row of the history."""
        epoch = self.report.epoch
        if epoch is None or not self._is_over:
            return
        self._is_over = False
        values: dict[str, Any] = history.values(self._row)
        if "event_lr" not in values:
            values |= self._rates
        for phase, found in history.by_phase(net, values).items():
            self.report.metrics(found, phase, epoch=epoch)
        self._best = best(net, self._row, epoch) or self._best
        for event in self._checkpoints.of_epoch(net, self._row, epoch, self._step):
            self.report.tell(event)
        self.report.end_epoch()

    @guarded
    def _tell_final_checkpoints(self, net: Any) -> None:
        callbacks = facts.callbacks_of(net)
        # Those that come later have not saved yet.
        saved = callbacks[: callbacks.index(self)]
        for event in self._checkpoints.finals(net, saved, self._step):
            self.report.tell(event)


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
