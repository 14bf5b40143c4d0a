"""The handlers that a `BusLogger` has in common with ignite's own loggers.

They take the arguments of ignite's, give the same names, and log the same values. Where the
position is that of an epoch, the event carries the epoch, counted from 0; else it is the step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from trainbus.events import Event, MetricsLogged, TextLogged
from trainbus.hooking import late_class, number

_PHASES = {"train": "train", "test": "test", "val": "validation", "eval": "validation"}
_ADAPTER = "trainbus.adapters.ignite"


class _Output:
    """Logs metrics, outputs and attributes of an engine: `OutputHandler("training", "all")`."""

    tag: str
    global_step_transform: Callable[..., int]
    _setup_output_metrics_state_attrs: Callable[..., Mapping[str, Any]]

    def __call__(self, engine: Any, logger: Any, event_name: Any) -> None:
        found = self._setup_output_metrics_state_attrs(engine, log_text=True, key_tuple=False)
        at = self.global_step_transform(engine, event_name)
        position = _position(at, event_name, self.global_step_transform)
        logger.log(engine, _events(found, _phase(self.tag), position))


class _Params:
    """Logs a parameter of an optimizer's groups: `OptimizerParamsHandler(optimizer)`."""

    tag: str | None
    optimizer: Any
    param_name: str

    def __call__(self, engine: Any, logger: Any, event_name: Any) -> None:
        name = f"{self.tag}/{self.param_name}" if self.tag else self.param_name
        found = {
            f"{name}/group_{i}": group[self.param_name]
            for i, group in enumerate(self.optimizer.param_groups)
        }
        position = _position(engine.state.get_event_attrib_value(event_name), event_name)
        logger.log(engine, _events(found, "train", position))


def _events(
    found: Mapping[str, Any], phase: str, position: Mapping[str, int]
) -> Iterator[Event]:
    values = {name: number(value) for name, value in found.items()}
    numbers = {name: value for name, value in values.items() if value is not None}
    if numbers:
        yield MetricsLogged(values=numbers, phase=phase, **position)
    for name, value in found.items():
        if isinstance(value, str):
            yield TextLogged(key=name, text=value, **position)


def _phase(tag: str | None) -> str:
    return next((p for start, p in _PHASES.items() if str(tag).startswith(start)), "train")


def _position(
    at: int, event: Any, transform: Callable[..., int] | None = None
) -> dict[str, int]:
    """Return the epoch or the step that ignite's loggers would place values at.

    A transform of the user's returns what it likes: only ignite's own returns an epoch.
    """
    from ignite.engine import State

    name = getattr(transform, "__qualname__", "")
    if name.startswith("global_step_from_engine"):
        event = inspect.getclosurevars(transform).nonlocals.get("custom_event_name") or event
    elif transform is not None and not name.startswith("BaseOutputHandler."):
        return {"step": int(at)}
    if State.event_to_attr.get(event) == "epoch":
        return {"epoch": int(at) - 1} if at > 0 else {}
    return {"step": int(at)}


def _base(name: str) -> type:
    from ignite.handlers import base_logger

    return getattr(base_logger, name)  # type: ignore[no-any-return]


output_handler = late_class(
    _ADAPTER, "OutputHandler", _Output, lambda: _base("BaseOutputHandler")
)
params_handler = late_class(
    _ADAPTER, "OptimizerParamsHandler", _Params, lambda: _base("BaseOptimizerParamsHandler")
)
