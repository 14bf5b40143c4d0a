"""What is found out about a LightGBM training: its machines, what was measured, how it ended."""

from __future__ import annotations

import socket
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from trainbus.events import Best
from trainbus.toolkit.adapters import number


class Training:
    """What is known of one training, by what LightGBM gives to callbacks."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.rank = rank(params)
        self.last = self._end = 0
        """The last round that ended, from 0, and how many there are to be."""
        self._model: Callable[[], Any] = lambda: None
        self._best: dict[tuple[str, str], tuple[float, int]] = {}
        self._ended: float | None = None

    def begin(self, env: Any) -> None:
        """Take in which model is trained, and how many rounds are asked for."""
        self._model, self._end = weakref.ref(env.model), env.end_iteration

    def lap(self) -> float | None:
        """Return the seconds since it was called for the round before, None for the first."""
        before, self._ended = self._ended, time.monotonic()
        return None if before is None else self._ended - before

    def measured(self, env: Any) -> dict[str, dict[str, Any]]:
        """Return what was measured in a round, by its phases, and remember the best of it."""
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
        return values

    def best(self) -> Best | None:
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

    def reason(self, best: Best | None) -> str | None:
        """Return why there were fewer rounds than asked for."""
        if self.last + 1 >= self._end:
            return None
        if best is None or best.epoch is None or best.epoch >= self.last:
            return "early stop by a callback"
        return f"early stop: no better {best.metric} in {self.last - best.epoch} rounds"


def _phase(data: str) -> str:
    """Return what a data set is for, as its name says."""
    if data.lower().startswith(("train", "learn")):
        return "train"
    return "test" if data.lower().startswith("test") else "validation"


def machines(params: Mapping[str, Any]) -> list[str]:
    """Return the addresses of the machines that train together."""
    return [m for m in str(_first(params, "machines", "workers", "nodes") or "").split(",") if m]


def rank(params: Mapping[str, Any]) -> int:
    """Return the place of this process in the machines: LightGBM finds its rank the same way."""
    port = str(_first(params, "local_listen_port", "local_port", "port") or 12400)
    for place, machine in enumerate(machines(params)):
        host, _, its_port = machine.strip().rpartition(":")
        if its_port == port and _is_here(host):
            return place
    return 0


def _is_here(host: str) -> bool:
    """Return whether an address is this machine's: it would be reached from itself."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # of a datagram socket; nothing is sent
            return bool(probe.getsockname()[0] == probe.getpeername()[0])
    except OSError:
        return False


def callbacks_of_train() -> list[Any]:
    """Return the callbacks of the `lightgbm.train` that is under way: it tells none of others."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "train" and frame.f_globals.get("__name__") == "lightgbm.engine":
            names = ("callbacks_before_iter", "callbacks_after_iter")
            return [each for name in names for each in frame.f_locals.get(name, ())]
        frame = frame.f_back
    return []


def _first(params: Mapping[str, Any], *names: str) -> Any:
    """Return the value of a parameter that has several names."""
    return next((params[name] for name in names if params.get(name) is not None), None)
