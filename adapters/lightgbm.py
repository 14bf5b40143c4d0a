"""Turns a LightGBM training into events; a boosting round stands for an epoch.

Attaches to an estimator of the scikit-learn API, or to a `BusCallback` in the callbacks of `train`.
Exact in what was measured in which round, also where a training goes on with an earlier model.
LightGBM tells a callback nothing of the end: where nothing stands around the training, the bus ends
one that stops early or fails. A `cv`, which trains several models at once, is left alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from types import MethodType, ModuleType
from typing import Any

from trainbus.errors import AttachError
from trainbus.events import EpochEnded, EpochStarted, Resumed, RunStarted
from trainbus.interfaces import Detach, Emit
from trainbus.toolkit.adapters import Reporter, guarded, patch, version, wrap

from ._lightgbm_facts import Training, callbacks_of_train, machines

TESTED_VERSIONS = "4.7.0"
REQUIRED_NAMES = (
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
        return target.report.connect(emit)
    if not isinstance(target, lightgbm.LGBMModel):
        raise AttachError(
            f"expected a LightGBM estimator, found {type(target).__qualname__}; "
            "for lightgbm.train add BusCallback(bus) to its callbacks"
        )
    callback = BusCallback(guest=True)
    silence = callback.report.connect(emit)
    unwrap = wrap(target, "fit", partial(_fit, callback))

    def detach() -> None:
        silence()
        unwrap()

    return detach


def hook(module: ModuleType, attach: Callable[[object], None]) -> None:
    """Have every `train` of the program, also those of estimators, emit events.

    Args:
        module: the package, which was imported.
        attach: called with the callback of each training.
    """
    for name in ("", ".engine", ".sklearn"):
        home = sys.modules.get(module.__name__ + name)
        if hasattr(home, "train"):
            patch(home, "train", partial(_train, attach))


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
        self._training = Training({})
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

    def rank(self) -> int:
        """Return the rank of this process in the training that is under way."""
        return self._training.rank

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
        best = self._training.best()
        self.report.end(self._training.reason(best), best)
        self._training = Training({})

    def _start(self, env: Any) -> None:
        import lightgbm

        if self._training.best() is not None:  # an earlier one stopped early, and nobody said so
            self.finish()
        self._training = now = Training(env.params)
        if now.rank or not isinstance(env.model, lightgbm.Booster):
            self.report.is_open = False
            return
        now.begin(env)
        done = env.begin_iteration
        self.report.start(
            RunStarted(
                params={k: v for k, v in env.params.items() if v is not None},
                framework="lightgbm",
                framework_version=version("lightgbm"),
                world_size=max(len(machines(env.params)), 1),
                resumed=Resumed(epoch=done - 1, step=done) if done else None,
            ),
            loggers=callbacks_of_train(),
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
            report.tell(EpochStarted(epoch=epoch))
        self._training.last = epoch
        self._log(env)
        if is_late:  # there was no call at the beginning of the round: it began where one ended
            took = self._training.lap()
            report.tell(EpochEnded(epoch=epoch, duration_s=took, outcome="completed"))
        else:
            report.end_epoch()
        if epoch == env.end_iteration - 1 and not self.is_watched:
            self.finish()

    @guarded
    def _log(self, env: Any) -> None:
        for phase, values in self._training.measured(env).items():
            self.report.metrics(values, phase, epoch=env.iteration)


class _Before:
    """The part of a callback that is called before each round."""

    def __init__(self, after: BusCallback) -> None:
        self.order = _FIRST
        self.before_iteration = True
        self._after = after

    def __call__(self, env: Any) -> None:
        self._after.begin_round(env)


def _fit(guest: BusCallback, fit: MethodType, /, *args: Any, **kwargs: Any) -> Any:
    """Fit an estimator with a callback of ours, or the user's where there are."""
    return _call(fit, guest, _place(fit), args, kwargs)


def _train(
    attach: Callable[[object], None], train: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    """Train with a callback of ours, or the user's where there are."""
    place = _place(train)
    ours = [each for each in _given(place, args, kwargs) if isinstance(each, BusCallback)]
    if any(each.guest for each in ours):
        return train(*args, **kwargs)  # the estimator is attached
    added = BusCallback(guest=True)
    if not ours:
        attach(added)
        if added.report.emit is None:  # it said why
            return train(*args, **kwargs)
    return _call(train, added, place, args, kwargs)


def _call(train: Callable[..., Any], guest: BusCallback, place: int, args: Any, kwargs: Any) -> Any:
    """Train with the guest, or the user's callbacks of ours where there are; tell how it ends."""
    given = _given(place, args, kwargs)
    ours = [each for each in given if isinstance(each, BusCallback) and not each.guest] or [guest]
    callbacks = list(dict.fromkeys([*given, *ours, *(each.before for each in ours)]))
    if len(args) > place:
        args = [*args[:place], callbacks, *args[place + 1 :]]
    else:
        kwargs = {**kwargs, "callbacks": callbacks}
    for each in ours:
        each.is_watched = True
        train = partial(each.report.watch(each.rank), train)
    try:
        result = train(*args, **kwargs)
        for each in ours:
            each.finish()
        return result
    finally:
        for each in ours:
            each.is_watched = False


def _place(function: Callable[..., Any]) -> int:
    names = list(signature(function).parameters)
    return names.index("callbacks") if "callbacks" in names else sys.maxsize


def _given(place: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    return list((args[place] if len(args) > place else kwargs.get("callbacks")) or ())
