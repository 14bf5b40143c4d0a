"""Turns a LightGBM training into events; a boosting round stands for an epoch.

Attaches to an estimator of the scikit-learn API, or to a `BusCallback` in the callbacks of `train`.
Exact in what was measured in which round, also where a training goes on with an earlier model.
LightGBM tells a callback nothing of the end: where nothing stands around the training, the bus ends
one that stops early or fails. A `cv`, which trains several models at once, is left alone.
"""

from __future__ import annotations

import socket
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from inspect import signature
from types import MethodType, ModuleType
from typing import Any

from trainbus.errors import AttachError
from trainbus.events import Best, EpochEnded, EpochStarted, Resumed, RunStarted
from trainbus.hooking import Reporter, guarded, number, version
from trainbus.interfaces import Detach, Emit

TESTED = "4.7.0"
NEEDS = (
    *(f"lightgbm:LGBM{kind}.fit" for kind in ("Model", "Classifier", "Regressor", "Ranker")),
    *(f"lightgbm{module}:train" for module in ("", ".engine", ".sklearn")),
    *(f"lightgbm.callback:{name}" for name in ("CallbackEnv", "EarlyStopException")),
    "lightgbm:Booster",
)

_FIRST = -(10**6)
"""Order of our callbacks: what stands before them can end the training in its last round."""


def attach(target: Any, emit: Emit) -> Detach:
    """Have the trainings of an estimator, or those that a `BusCallback` is given to, emit events.

    Clones and unpickled copies of the estimator are not attached.

    Args:
        target: an estimator such as `LGBMClassifier`, or a `BusCallback` of this module.
        emit: where the events go.

    Returns:
        A function that leaves the target as it was.

    Raises:
        AttachError: the object is neither.
    """
    import lightgbm

    if isinstance(target, BusCallback):
        report = target.report
        report.emit, report.active = emit, True

        def detach() -> None:
            report.active = False

        return detach
    if not isinstance(target, lightgbm.LGBMModel):
        raise AttachError(
            f"expected a LightGBM estimator, found {type(target).__qualname__}; "
            "for lightgbm.train add BusCallback(bus) to its callbacks"
        )
    return _attach_estimator(target, emit)


def hook(module: ModuleType, attach: Callable[[object], None]) -> None:
    """Have every `train` of the program, also those of estimators, emit events.

    Args:
        module: the package, which was imported.
        attach: called with the callback of each training.
    """
    for name in ("", ".engine", ".sklearn"):
        home: Any = sys.modules.get(module.__name__ + name)
        train = getattr(home, "train", None)
        if train is not None and not hasattr(train, "hooked_by"):
            home.train = _hooked(train, attach)


class BusCallback:
    """Callback of `lightgbm.train` that reports to a bus: `callbacks=[BusCallback(bus)]`.

    LightGBM calls it after each round. `before` is its part that is called before each round:
    without it in the callbacks, the run starts when the first round is over.
    """

    def __init__(self, bus: Any = None, *, guest: bool = False) -> None:
        self.order = _FIRST
        self.before_iteration = False
        self.guest = guest
        """Whether the adapter put it into the callbacks, and not the user."""
        self.before = _Before(self)
        self.report = Reporter()
        self.is_watched = False
        """Whether the adapter stands around the training, and sees how it ends."""
        self._reset()
        if bus is not None:
            bus.attach(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the training out: who is copied or unpickled begins its own."""
        return {"guest": self.guest, "report": self.report}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(guest=state["guest"])  # type: ignore[misc]
        self.report = state["report"]

    def __call__(self, env: Any) -> None:
        """Tell what was measured after a round."""
        self._end_round(env)

    def _reset(self) -> None:
        self._model: Callable[[], Any] = lambda: None
        self._best: dict[tuple[str, str], tuple[float, int]] = {}
        self._last = self._end = self.rank = 0
        self._ended: float | None = None

    @guarded
    def begin_round(self, env: Any) -> None:
        """Say that a round begins, and with the first one the run."""
        if env.iteration == env.begin_iteration:
            self._start(env)
        if self.report.is_open:
            self.report.start_epoch(env.iteration)

    @guarded
    def finish(self) -> None:
        """Say that the training is over and went well."""
        if not self.report.is_open:
            return
        best = self._best_round()
        reason = None
        if self._last + 1 < self._end:
            reason = "early stop by a callback"
            if best is not None and best.epoch is not None and best.epoch < self._last:
                reason = f"early stop: no better {best.metric} in {self._last - best.epoch} rounds"
        self.report.end(reason, best)
        self._reset()

    def _start(self, env: Any) -> None:
        import lightgbm

        if self._best_round() is not None:  # an earlier training stopped early, and nobody said so
            self.finish()
        self._reset()
        self.rank = _rank(env.params)
        if self.rank or not isinstance(env.model, lightgbm.Booster):
            self.report.is_open = False
            return
        self._model, self._end = weakref.ref(env.model), env.end_iteration
        done = env.begin_iteration
        self.report.start(
            RunStarted(
                params={k: v for k, v in env.params.items() if v is not None},
                framework="lightgbm",
                framework_version=version("lightgbm"),
                world_size=max(len(_machines(env.params)), 1),
                resumed=Resumed(epoch=done - 1, step=done) if done else None,
            )
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
            report.tell(EpochStarted(epoch=epoch))
        self._last = epoch
        self._log(env)
        if is_late:  # there was no call at the beginning of the round: it began where one ended
            now = time.monotonic()
            took = None if self._ended is None else now - self._ended
            report.tell(EpochEnded(epoch=epoch, duration_s=took, outcome="completed"))
            self._ended = now
        else:
            report.end_epoch()
        if epoch == env.end_iteration - 1 and not self.is_watched:
            self.finish()

    @guarded
    def _log(self, env: Any) -> None:
        trained = getattr(env.model, "_train_data_name", "training")
        values: dict[str, dict[str, Any]] = {}
        rate = _first(env.params, "learning_rate", "shrinkage_rate", "eta")
        if rate is not None:
            values["train"] = {"learning_rate": rate}
        for data, metric, value, maximize, *_ in env.evaluation_result_list or ():
            phase = "train" if data == trained else _phase(data)
            values.setdefault(phase, {})[f"{data}/{metric}"] = value
            before = self._best.get((data, metric))
            is_better = before is None or (value > before[0] if maximize else value < before[0])
            if phase != "train" and is_better:
                self._best[data, metric] = (value, env.iteration)
        for phase, measured in values.items():
            self.report.metrics(measured, phase, epoch=env.iteration)

    def _best_round(self) -> Best | None:
        """Return the best round of early stopping; LightGBM does not say by which metric."""
        model = self._model()
        epoch = getattr(model, "best_iteration", 0) - 1
        if epoch < 0:
            return None
        names = [name for name, (_, at) in self._best.items() if at == epoch] or list(self._best)
        for data, metric in names:
            value = number(getattr(model, "best_score", {}).get(data, {}).get(metric))
            if value is not None:
                return Best(metric=f"{data}/{metric}", value=value, epoch=epoch)
        return None


class _Before:
    """The part of a callback that is called before each round."""

    def __init__(self, after: BusCallback) -> None:
        self.order = _FIRST
        self.before_iteration = True
        self._after = after

    def __call__(self, env: Any) -> None:
        self._after.begin_round(env)


def _attach_estimator(target: Any, emit: Emit) -> Detach:
    """Stand before the `fit` of one estimator, as a method that copies and pickles as such."""
    callback = BusCallback(guest=True)
    callback.report.emit = emit
    before = vars(target).get("fit")
    plain = type(target).fit

    @wraps(plain)
    def fit(self: Any, *args: Any, **kwargs: Any) -> Any:
        method = before  # which is bound to the original, where this is a copy
        if before is None or isinstance(before, MethodType):
            method = MethodType(getattr(before, "__func__", plain), self)
        if not callback.report.active:
            return method(*args, **kwargs)
        return _call(method, callback, args, kwargs)

    fit.before, fit.report = before, callback.report  # type: ignore[attr-defined]
    bound = target.fit = MethodType(fit, target)

    def detach() -> None:
        callback.report.active = False
        if vars(target).get("fit") is bound:
            below = before
            while below is not None and hasattr(below, "report") and not below.report.active:
                below = below.before
            del target.fit
            if below is not None:
                target.fit = below

    return detach


def _hooked(train: Callable[..., Any], attach: Callable[[object], None]) -> Callable[..., Any]:
    @wraps(train)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        if any(
            isinstance(each, BusCallback) and each.guest for each in _given(train, args, kwargs)
        ):
            return train(*args, **kwargs)  # the estimator is attached
        added = BusCallback(guest=True)
        if not any(isinstance(each, BusCallback) for each in _given(train, args, kwargs)):
            attach(added)
            if added.report.emit is None:  # it said why
                return train(*args, **kwargs)
        return _call(train, added, args, kwargs)

    hooked.hooked_by = __name__  # type: ignore[attr-defined]
    return hooked


def _call(
    method: Callable[..., Any], guest: BusCallback, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Train with a callback of ours, or the user's where there are, and tell how it ends."""
    given = _given(method, args, kwargs)
    ours = [each for each in given if isinstance(each, BusCallback) and not each.guest] or [guest]
    callbacks = list(dict.fromkeys([*given, *ours, *(each.before for each in ours)]))
    place = _place(method)
    if len(args) > place:
        args = [*args[:place], callbacks, *args[place + 1 :]]
    else:
        kwargs = {**kwargs, "callbacks": callbacks}
    for each in ours:
        each.is_watched = True
        method = partial(each.report.watch(partial(getattr, each, "rank")), method)
    try:
        result = method(*args, **kwargs)
        for each in ours:
            each.finish()
        return result
    finally:
        for each in ours:
            each.is_watched = False


def _given(method: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    place = _place(method)
    return list((args[place] if len(args) > place else kwargs.get("callbacks")) or ())


def _place(method: Callable[..., Any]) -> int:
    return list(signature(method).parameters).index("callbacks")


def _first(params: Mapping[str, Any], *names: str) -> Any:
    """Return the value of a parameter that has several names."""
    return next((params[name] for name in names if params.get(name) is not None), None)


def _phase(data: str) -> str:
    """Return what a data set is for, as its name says."""
    if data.lower().startswith(("train", "learn")):
        return "train"
    return "test" if data.lower().startswith("test") else "validation"


def _machines(params: Mapping[str, Any]) -> list[str]:
    return [m for m in str(_first(params, "machines", "workers", "nodes") or "").split(",") if m]


def _rank(params: Mapping[str, Any]) -> int:
    """Return the place of this process in the machines: LightGBM finds its rank the same way."""
    port = str(_first(params, "local_listen_port", "local_port", "port") or 12400)
    for rank, machine in enumerate(_machines(params)):
        host, _, its_port = machine.strip().rpartition(":")
        if its_port == port and _is_here(host):
            return rank
    return 0


def _is_here(host: str) -> bool:
    """Return whether an address is this machine's: it would be reached from itself."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # of a datagram socket; nothing is sent
            return bool(probe.getsockname()[0] == probe.getpeername()[0])
    except OSError:
        return False
