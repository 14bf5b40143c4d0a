"""Turns a LightGBM training into events; each boosting round is an epoch.

Attaches to an estimator of the scikit-learn API, or to a `BusCallback` in the callbacks of `train`.
Every metric belongs to the round it was measured in, also when training continues an earlier
model. LightGBM does not call callbacks when training ends: if the training is not wrapped, the bus
ends a run that stops early or fails. `cv`, which trains several models at once, is not reported.
"""

from __future__ import annotations

import socket
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType, ModuleType
from typing import Any

from trainbus.events import Best, EpochEnded, EpochStarted, Resumed, RunStarted
from trainbus.interfaces import Detach, Emit
from trainbus.toolkit.adapters import (
    Hooks,
    Origin,
    argument,
    best_of,
    early_stop,
    guarded,
    patch,
    phase_of,
    users_of,
    variables_of,
    version,
    with_argument,
    wrap,
    wrong_target,
)

TESTED_VERSIONS = "4.7.0"
REQUIRED_NAMES = (
    *(f"lightgbm:LGBM{kind}.fit" for kind in ("Model", "Classifier", "Regressor", "Ranker")),
    *(f"lightgbm{module}:train" for module in ("", ".engine", ".sklearn")),
    *(f"lightgbm.callback:{name}" for name in ("CallbackEnv", "EarlyStopException")),
    "lightgbm:Booster",
)

_FIRST = -(10**6)
"""Order of our callbacks: an earlier one could end the training in its last round."""


def attach(target: Any, emit: Emit) -> Detach:
    """Report the trainings of an estimator, or those that a `BusCallback` is passed to.

    Clones and unpickled copies of the estimator are not attached.

    Args:
        target: an estimator such as `LGBMClassifier`, or a `BusCallback` of this module.
        emit: where the events go.

    Returns:
        A function that restores the target.

    Raises:
        AttachError: the object is neither.
    """
    import lightgbm

    if isinstance(target, BusCallback):
        return target.report.connect(emit)
    if not isinstance(target, lightgbm.LGBMModel):
        raise wrong_target(
            target,
            "a LightGBM estimator",
            "for lightgbm.train add BusCallback(bus) to its callbacks",
        )
    callback = BusCallback(origin=Origin.ATTACH)
    return callback.report.connect(emit, wrap(target, "fit", partial(_call, callback)))


def hook(module: ModuleType, attach: Callable[[object], None]) -> None:
    """Attach to every `train` call of the program, also those of estimators.

    Args:
        module: the package, which was imported.
        attach: called with the callback of each training.
    """
    for name in ("", ".engine", ".sklearn"):
        home = sys.modules.get(module.__name__ + name)
        if hasattr(home, "train"):
            patch(home, "train", partial(_train, attach))


class BusCallback(Hooks):
    """Callback of `lightgbm.train` that reports to a bus: `callbacks=[BusCallback(bus)]`.

    LightGBM calls it after each round, and `before`, its other part, before each round: without
    that in the callbacks, the run starts when the first round has ended.
    """

    def __init__(self, bus: Any = None, *, origin: Origin = Origin.USER) -> None:
        self.order = _FIRST
        self.before_iteration = False
        self.before = _Before(self)
        self.is_watched = False
        """Whether the training is wrapped, so that its end is noticed."""
        super().__init__(bus, origin=origin)

    def reset(self) -> None:
        """Forget the training."""
        self._training = _Training({})

    def __call__(self, env: Any) -> None:
        """Record the metrics of a round that ended."""
        self._end_round(env)

    def rank(self) -> int:
        """Return the rank of this process in the training in progress."""
        return self._training.rank

    @guarded
    def start_round(self, env: Any) -> None:
        """Record that a round starts; the first one starts the run."""
        if env.iteration == env.begin_iteration:
            self._start(env)
        if self.report.is_open:
            self.report.start_epoch(env.iteration)

    @guarded
    def end(self) -> None:
        """Record that the training ended without an error."""
        if self.report.is_open:
            best = self._training.best()
            self.report.end(self._training.reason(best), best)
            self.reset()

    def _start(self, env: Any) -> None:
        import lightgbm

        if self._training.best() is not None:  # a training before that stopped early
            self.end()
        self._training = now = _Training(env.params)
        if now.rank or not isinstance(env.model, lightgbm.Booster):
            self.report.is_open = False
            return
        now.start(env)
        done = env.begin_iteration
        # LightGBM does not pass the other callbacks to a callback.
        variables = variables_of("lightgbm.engine", "train")
        names = ("callbacks_before_iter", "callbacks_after_iter")
        self.report.start(
            RunStarted(
                params={k: v for k, v in env.params.items() if v is not None},
                framework="lightgbm",
                framework_version=version("lightgbm"),
                world_size=max(len(_machines(env.params)), 1),
                resumed=Resumed(epoch=done - 1, step=done) if done else None,
            ),
            loggers=[each for name in names for each in variables.get(name, ())],
            remedy="leave it out of the callbacks",
        )

    @guarded
    def _end_round(self, env: Any) -> None:
        report, epoch = self.report, env.iteration
        is_late = report.epoch is None
        if is_late and epoch == env.begin_iteration:
            self._start(env)
        if not report.is_open:
            return
        if is_late:
            report.record(EpochStarted(epoch=epoch))
        self._training.last = epoch
        self._record_metrics(env)
        if is_late:  # `before` is missing: the round began where the previous one ended
            seconds = self._training.since_last_round()
            report.record(EpochEnded(epoch=epoch, duration_s=seconds, outcome="completed"))
        else:
            report.end_epoch()
        if epoch == env.end_iteration - 1 and not self.is_watched:
            self.end()

    @guarded
    def _record_metrics(self, env: Any) -> None:
        for phase, values in self._training.measured(env).items():
            self.report.metrics(values, phase, epoch=env.iteration)


class _Before:
    """The part of a callback that is called before each round."""

    def __init__(self, after: BusCallback) -> None:
        self.order = _FIRST
        self.before_iteration = True
        self._after = after

    def __call__(self, env: Any) -> None:
        self._after.start_round(env)


def _train(
    attach: Callable[[object], None], train: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    """Train with a callback of ours; add one if there is none."""
    callbacks = argument(train, "callbacks", args, kwargs) or ()
    ours = [each for each in callbacks if isinstance(each, BusCallback)]
    if any(each.report.origin is not Origin.USER for each in ours):
        return train(*args, **kwargs)  # the estimator is attached
    added = BusCallback(origin=Origin.HOOK)
    if not ours:
        attach(added)
        if added.report.emit is None:  # attaching failed, and was logged
            return train(*args, **kwargs)
    return _call(added, train, *args, **kwargs)


def _call(
    added: BusCallback, train: Callable[..., Any] | MethodType, /, *args: Any, **kwargs: Any
) -> Any:
    """Train with the user's callbacks of ours, else with the added one; record how it ends."""
    given = list(argument(train, "callbacks", args, kwargs) or ())
    ours = users_of(given, BusCallback) or [added]
    callbacks = list(dict.fromkeys([*given, *ours, *(each.before for each in ours)]))
    args, kwargs = with_argument(train, "callbacks", callbacks, args, kwargs)
    for each in ours:
        each.is_watched = True
        train = partial(each.report.watch(each.rank), train)
    try:
        result = train(*args, **kwargs)
        for each in ours:
            each.end()
        return result
    finally:
        for each in ours:
            each.is_watched = False


class _Training:
    """One training, as seen by callbacks."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.rank = rank(params)
        self.last = self._end = 0
        """The last round that ended, from 0, and the number of rounds requested."""
        self._model: Callable[[], Any] = lambda: None
        self._best: dict[tuple[str, str], tuple[float, int]] = {}
        self._ended: float | None = None

    def start(self, env: Any) -> None:
        """Take the model and the number of rounds from a callback's argument."""
        self._model, self._end = weakref.ref(env.model), env.end_iteration

    def since_last_round(self) -> float | None:
        """Return the seconds since the previous call, None for the first one."""
        before, self._ended = self._ended, time.monotonic()
        return None if before is None else self._ended - before

    def measured(self, env: Any) -> dict[str, dict[str, Any]]:
        """Return the metrics of a round by phase, and remember the best of them."""
        trained = getattr(env.model, "_train_data_name", "training")
        values: dict[str, dict[str, Any]] = {}
        rate = _first(env.params, "learning_rate", "shrinkage_rate", "eta")
        if rate is not None:
            values["train"] = {"learning_rate": rate}
        for data, metric, value, maximize, *_ in env.evaluation_result_list or ():
            phase = "train" if data == trained else phase_of(data)
            values.setdefault(phase, {})[f"{data}/{metric}"] = value
            before = self._best.get((data, metric))
            is_better = before is None or (value > before[0] if maximize else value < before[0])
            if phase != "train" and is_better:
                self._best[data, metric] = (value, env.iteration)
        return values

    def best(self) -> Best | None:
        """Return the best round of early stopping; LightGBM does not say by which metric."""
        model = self._model()
        epoch = getattr(model, "best_iteration", 0) - 1
        if epoch < 0:
            return None
        names = [name for name, (_, at) in self._best.items() if at == epoch] or list(self._best)
        scores = getattr(model, "best_score", {})
        found = (best_of(f"{d}/{m}", scores.get(d, {}).get(m), epoch) for d, m in names)
        return next((best for best in found if best is not None), None)

    def reason(self, best: Best | None) -> str | None:
        """Return why there were fewer rounds than requested."""
        if self.last + 1 >= self._end:
            return None
        if best is None or best.epoch is None or best.epoch >= self.last:
            return "early stop by a callback"
        return early_stop(best.metric, self.last - best.epoch, "rounds")


def _machines(params: Mapping[str, Any]) -> list[str]:
    """Return the addresses of the machines that train together."""
    return [m for m in str(_first(params, "machines", "workers", "nodes") or "").split(",") if m]


def rank(params: Mapping[str, Any]) -> int:
    """Return the index of this process in the list of machines, which is LightGBM's own rule."""
    port = str(_first(params, "local_listen_port", "local_port", "port") or 12400)
    for index, machine in enumerate(_machines(params)):
        host, _, its_port = machine.strip().rpartition(":")
        if its_port == port and _is_here(host):
            return index
    return 0


def _is_here(host: str) -> bool:
    """Return whether an address belongs to this machine, which then connects from that address."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # a datagram socket sends nothing here
            return bool(probe.getsockname()[0] == probe.getpeername()[0])
    except OSError:
        return False


def _first(params: Mapping[str, Any], *names: str) -> Any:
    """Return the value of a parameter that has aliases."""
    return next((params[name] for name in names if params.get(name) is not None), None)
